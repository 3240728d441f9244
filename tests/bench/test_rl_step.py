"""The bench of GRPO and DPO steps, at toy size: its variants solve one problem, which is that of the formula."""

import importlib.util
import json
import os
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from launching import CONTEXT

pytest.importorskip("trl")
pytest.importorskip("datasets")

import trl
from packaging.version import Version

from bench import rl_step, rl_variants
from bench.measuring import ON_GPU
from bench.rl_variants import CASES, FULL, LIGER, PATCHED, TRL, Size

pytestmark = [
    pytest.mark.skipif(ON_GPU, reason="toy sizes are those of a machine without a GPU"),
    pytest.mark.skipif(Version(trl.__version__) < Version("1.15"), reason="TRL before 1.15 has no fused head"),
]
TOY = Size("tiny", prompts=1, completions=2, prompt=6, completion=6, tokens=24)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Leave no precision behind: accelerate keeps the first one of a process, transformers writes it to os.environ."""
    from accelerate.state import AcceleratorState

    with mock.patch.dict(os.environ):
        AcceleratorState._reset_state()
        yield
    AcceleratorState._reset_state()


@pytest.mark.parametrize("case", ["grpo", "dpo", "head"])
def test_variants_solve_one_problem(case: str) -> None:
    needs = {LIGER: "liger_kernel", "verl": "verl"}
    rows, gradients = [], {}
    for name, build in CASES[case].items():
        if name in needs and importlib.util.find_spec(needs[name]) is None:
            continue
        step = build(TOY)
        rows.append({"case": case, "variant": name, "loss": step.loss()})
        step.loss_and_backward()
        gradients[name] = [p.grad.clone() for group in step.optimizer.param_groups for p in group["params"]]
    assert not rl_step.disagreeing(rows, TOY), rows
    assert {TRL, FULL} < set(gradients) and (PATCHED in gradients or case == "head")
    for name, found in gradients.items():
        if "ids a row" not in name and not (case == "dpo" and name == LIGER):  # which takes no reference from before
            for one, other in zip(found, gradients[TRL], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-4 * float(other.abs().max()) + 1e-9)


def test_the_rollouts_have_something_to_learn_from() -> None:
    batch = rl_variants.rollouts(Size("tiny"))
    assert batch["completion_ids"].shape == (8, 48) and batch["prompt_ids"].shape == (8, 32)
    assert batch["prompt_mask"][:, -1].all() and batch["completion_mask"][:, 0].all()  # padding outside
    assert 1 < len(set(batch["completion_mask"].sum(-1).tolist()))


def test_processes_take_turns_and_a_file_holds_their_figures(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rl_step.measure("head", TOY, 2, variants=[TRL, "mopl", "mopl, 8 ids a row"], context=CONTEXT)
    assert [row["variant"] for row in rows] == [TRL, "mopl", "mopl, 8 ids a row"]
    assert all(len(row["rounds"]) == 2 and row["s"] > 0 and row["extra MB"] > 0 for row in rows)
    assert rows[0]["x TRL"] == 1 and rows[0]["memory x TRL"] == 1 and not rl_step.disagreeing(rows, TOY)
    with mock.patch.object(rl_step, "measure", lambda *_, **__: rows):
        path = tmp_path / "figures.json"
        assert rl_step.main(["--model", "tiny", "--cases", "head", "--json", str(path)]) == 0
        written = json.loads(path.read_text(encoding="utf-8"))
        assert written["results"][1]["variant"] == "mopl" and written["problem"]["model"] == "tiny"
        assert "| head | mopl |" in capsys.readouterr().out
        rows[1]["loss"] += 1e6
        assert rl_step.main(["--model", "tiny", "--cases", "head"]) == 1
        assert "not those of the same problem" in capsys.readouterr().out
        rows[1] = {"case": "head", "variant": "mopl", "failed": "RuntimeError: no"}
        assert rl_step.main(["--model", "tiny", "--cases", "head"]) == 1
        assert "RuntimeError: no" in capsys.readouterr().out


def test_a_variant_that_cannot_be_had_says_why() -> None:
    if importlib.util.find_spec("verl") is not None:
        pytest.skip("verl is installed")
    (row,) = rl_step.measure("head", TOY, 1, variants=["verl"], context=CONTEXT)
    assert "verl" in row["absent"] and "s" not in row
