"""What `tune` remembers takes the place of the plan of linear_logprob; old and damaged memories do no harm."""

import json
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.cards import CARDS
from mopl.ops.linear_logprob import device as _device
from mopl.ops.linear_logprob.keeping import kept_rows
from mopl.ops.linear_logprob.plan import Plan

choice = pytest.importorskip("mopl.ops.linear_logprob.choice", reason="Triton is not installed")
KEY = "9.0 bfloat16 H4096 V128256 N16384"


@pytest.fixture
def remember(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that fills the memory of an H200 whose fused kernel has two tiles."""
    monkeypatch.setenv("MOPL_CACHE", str(tmp_path))
    monkeypatch.setattr(_device, "properties_of", lambda device: CARDS["H200"].plan)
    monkeypatch.setattr(choice, "usable", lambda *_: ["wide", "short"])

    def fill(**choices: str) -> None:
        (tmp_path / "linear_logprob.json").write_text(json.dumps({k.replace("_", " "): v for k, v in choices.items()}))
        choice._choices.cache_clear()

    choice._choices.cache_clear()
    yield lambda value, flags="": fill(**{KEY + flags: value})
    choice._choices.cache_clear()


def planned(wanted: str = "scoring", softcap: bool = False, rows: int = 16000) -> Plan:
    with FakeTensorMode(), torch.device("cuda"):
        hidden, weight = (torch.empty(n, 4096, dtype=torch.bfloat16) for n in (rows, 128256))
        return choice.plan_for(hidden, weight, wanted, softcap)


def kept(workspace: int | None = None) -> int:
    with FakeTensorMode(), torch.device("cuda"):
        hidden, weight = (torch.empty(n, 4096, dtype=torch.bfloat16) for n in (16000, 128256))
        return kept_rows(hidden, weight, 16000, workspace)


def test_what_was_measured_takes_the_place_of_the_rule(remember) -> None:
    rule = planned()
    assert rule.algorithm == "descriptors" and rule.rows == rule.buffer_rows == 4096
    remember("library 2176x4000")
    assert planned()[:4] == ("library", 2176, 2176, 2176 * 4000)
    assert planned("frozen") == planned(rows=9000, wanted="frozen") == rule  # of another kind, or another size
    assert planned(rows=8192) == rule and planned(softcap=True)[:2] == ("library", 4224)
    remember("descriptors")
    assert planned() == rule and planned(softcap=True).algorithm == "library"  # which has no kernel of ours
    remember("library 8448x4000", " frozen")
    assert planned("frozen")[:3] == ("library", 8448, 4096)  # what is held at once stays within its bound
    remember("wide", " softcap")
    assert planned(softcap=True).algorithm == "wide" and planned() == rule


def test_a_trained_head_keeps_as_many_rows_as_were_best(remember) -> None:
    assert kept() == 16000
    remember("library 4224x7943 keep 8448", " trained")
    assert kept() == 8448
    assert kept(4 * 2**30) == 16000  # a number is obeyed
    remember("library 4224x7943", " trained")
    assert kept() == 16000


@pytest.mark.parametrize("value", ["wide", "library", "short"])
def test_a_memory_of_the_algorithm_alone_is_understood(remember, value: str) -> None:
    """That is what was remembered before rows and columns were chosen."""
    rule = planned()
    remember(value)
    assert planned() == rule._replace(algorithm=value)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "tall",
        "library 0x7",
        "library 12",
        "library 99999999999x1",
        "library -1x4",
        "library 1000x4000",
        "wide 1x1 keep",
        "x" * 999,
    ],
)
def test_a_memory_that_says_nothing_leaves_the_rule(remember, value: str) -> None:
    rule = planned()
    remember(value)
    assert planned() == rule


def test_a_tile_never_outgrows_its_memory(remember) -> None:
    remember("library 9999872x999999999")
    plan = planned()
    assert plan.area == 4 * 2**25 and plan.columns(16000, 128256) * 16000 <= 2 * plan.area
