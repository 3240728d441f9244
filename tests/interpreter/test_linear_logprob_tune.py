"""`tune` in Triton's interpreter, where its times mean nothing: every alternative runs, one is remembered."""

import functools
import json
from pathlib import Path

import pytest
import torch

from mopl.ops.linear_logprob import choice
from mopl.ops.linear_logprob import tune as tuning
from mopl.ops.linear_logprob.tune import tune


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MOPL_CACHE", str(tmp_path / "new"))
    # The interpreter has no limits, and its tiles of a GPU take seconds.
    monkeypatch.setattr(choice, "usable", lambda *_: ["few"])
    choice._choices.cache_clear()
    yield tmp_path / "new" / "linear_logprob.json"
    choice._choices.cache_clear()


def operands(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(9, 12).to(dtype), torch.randn(30, 12).to(dtype)


def test_every_kind_is_measured_and_remembered(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each runs once and not four times: what a call costs here is no figure, and the first one shows that it works.
    monkeypatch.setattr(tuning, "_milliseconds", functools.cache(tuning._milliseconds))
    hidden, weight = operands()
    key = "0.0 float32 H12 V30 N16"
    found = tune(hidden, weight, seconds=99)
    assert "few" in found and all(name == "few" or name.startswith("library ") for name in found)
    assert len(found) > 6 and all(value > 0 for value in found.values())
    kept = tune(hidden, weight, wanted="trained", workspace=9 * 30 * 4, seconds=99)
    assert {name.partition(" keep ")[2] for name in kept} == {"9", "8"}  # what fits, and whole chunks of it
    choices = json.loads(memory.read_text())
    assert set(choices) == {key, f"{key} trained"}
    assert choices[key] == min(found, key=lambda name: found[name])
    best = min(kept, key=lambda name: kept[name])
    assert choices[f"{key} trained"] == (best.partition(" keep")[0] if best.endswith(" keep 9") else best)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_time_ends_the_sweep(memory: Path, softcap: float | None) -> None:
    hidden, weight = operands(torch.bfloat16)
    found = tune(hidden, weight, softcap, "frozen", seconds=0)
    assert len(found) == 1
    flags = " softcap frozen" if softcap else " frozen"
    assert json.loads(memory.read_text()) == {f"0.0 bfloat16 H12 V30 N16{flags}": next(iter(found))}


@pytest.mark.parametrize("wanted", ["scoring", "frozen", "trained"])
def test_the_head_of_a_model_can_be_given_as_it_is(memory: Path, wanted: str) -> None:
    hidden, weight = operands()
    assert tune(hidden.requires_grad_(), torch.nn.Parameter(weight), wanted=wanted, seconds=0)


def test_float64_has_nothing_to_choose(memory: Path) -> None:
    with pytest.raises(ValueError, match="float64"):
        tune(*operands(torch.float64))
