"""The bench of a training step, at toy size: who is measured solves one problem, and who does not is told."""

import dataclasses
import importlib.util
import os
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("peft")

from bench import step, training_step
from bench.measuring import ON_GPU, Report, named
from bench.summary import step_table
from bench.training_step import LIGER, TRL, VARIANTS, Problem, disagreeing

pytestmark = pytest.mark.skipif(ON_GPU, reason="toy sizes are those of a machine without a GPU")
CASES = [case for model in step.SHAPES for case in step.cases(model, "mopl")]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Leave no precision behind: accelerate keeps the first one of a process, transformers writes it to os.environ."""
    from accelerate.state import AcceleratorState

    with mock.patch.dict(os.environ):
        AcceleratorState._reset_state()
        yield
    AcceleratorState._reset_state()


def test_what_is_measured() -> None:
    assert len(CASES) == len(set(CASES)) == 9
    assert step.cases("1b", TRL) + step.cases("135m", TRL) == CASES
    assert set(step.ORDER) == {*VARIANTS, step.AGAIN}
    for variant in step.ORDER:
        chosen = [case for model in step.SHAPES for case in step.cases(model, variant)]
        assert chosen and set(chosen) <= set(CASES)
    problems = [step.problem_of(case) for case in CASES]
    assert {problem.items for problem in problems} == {2, 8} and {problem.lora for problem in problems} == {True, False}
    assert [problem.reference for problem in problems].count("model") == 1


@pytest.mark.parametrize("case", ["135m full pairs", "135m LoRA lists of 8", step.LORA_STEP])
def test_a_case_is_measured_and_trl_and_mopl_agree(case: str) -> None:
    problem = step.problem_of(case)
    names = [TRL, "mopl", step.AGAIN]
    if importlib.util.find_spec("liger_kernel"):
        names.append(LIGER)
    rows = {name: step.measure(name, case) for name in names}
    losses = {name: row["loss"] for name, row in rows.items()}
    assert not disagreeing(problem, losses), losses
    assert all(row["ms"] > 0 and row["extra GB"] > 0 and row["tokens/s"] > 0 for row in rows.values())
    assert rows[TRL]["sequences"] == 2 * problem.lists * (problem.items - 1)
    assert rows["mopl"]["sequences"] == problem.lists * problem.items
    assert abs(losses["mopl"] - 0.6931) > 1e-3, "the policy is not the reference, where every loss would agree"


@pytest.mark.parametrize("name", ["mopl, 3 objectives", "mopl, HyperPrompt, 2 objectives"])
def test_several_objectives_are_measured(name: str) -> None:
    assert step.measure(name, step.cases("135m", name)[0])["loss"] > 0


@pytest.mark.parametrize("reference", ["precomputed", "model"])
def test_losses_are_those_of_the_formula(reference: str) -> None:
    """In float32, against a plain forward pass of the very model: full logits and the textbook's loss."""
    problem = Problem("tiny", 2, 2, 8, 8, reference, lora=True)
    trl = training_step.trl_variant(problem).loss()
    assert trl == pytest.approx(training_step.mopl_variant(problem).loss(), abs=1e-4)
    from peft import get_peft_model

    model = get_peft_model(problem.build_model(), problem.adapters())
    training_step.optimizer_of(model)

    def log_p() -> torch.Tensor:
        found = []
        for prompt, responses in problem.tokens():
            for response in responses:
                ids = torch.tensor([*prompt, *response])
                scores = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])
                found.append(scores[len(prompt) - 1 :].sum())
        return torch.stack(found).view(problem.lists, problem.items)

    with torch.no_grad():
        policy = log_p()
        with model.disable_adapter():
            own = log_p()
    base = own if reference == "model" else torch.from_numpy(problem.reference_scores())
    assert (policy - base).abs().max() < 40, "no gradient may vanish"
    margin = training_step.BETA * (policy - base)
    assert trl == pytest.approx(float(-torch.nn.functional.logsigmoid(margin[:, 0] - margin[:, 1]).mean()), abs=1e-4)


def test_losses_that_differ_are_told_and_fail(capsys: pytest.CaptureFixture[str]) -> None:
    pairs, lists = step.problem_of("135m full pairs"), step.problem_of("135m full lists of 8")
    losses = {TRL: 0.5, LIGER: 0.52, "mopl": 0.6, "mopl, 3 objectives": 2.0, step.AGAIN: float("nan")}
    assert disagreeing(pairs, losses) == [(TRL, "mopl"), (TRL, step.AGAIN)]
    assert disagreeing(lists, losses) == [("mopl", step.AGAIN)]
    assert disagreeing(dataclasses.replace(pairs, dtype=torch.float32), losses)[0] == (TRL, LIGER)
    report = Report(None, step.COLUMNS)
    common = {"ms": 4.0, "extra GB": 2.0, "tokens/s": 10.0, "lists/s": 1.0}
    report.add("135m full pairs", TRL, **common, loss=0.5)
    report.add("135m full pairs", "mopl", **common | {"ms": 2.0, "extra GB": 1.0}, loss=0.6)
    report.add("135m full pairs", LIGER, absent="No module named 'liger_kernel'")
    step.complete(report)
    row = report.find("135m full pairs", "mopl")
    assert row is not None and row["x TRL"] == row["memory x TRL"] == 0.5 and row["differs from"] == TRL
    assert step.differences(report) == 1 and "not the same problem" in capsys.readouterr().out
    text = "\n".join(step_table({(row["size"], row["variant"]): row for row in report.rows}))
    assert "| 135m full pairs | mopl | 2 | 0.50 | 1.0 | 0.50 | 10 | 1.0 | TRL DPOTrainer |" in text
    assert LIGER not in text and "host-bound" not in text
    row["bound"] = "host"
    assert "| 135m full pairs (host-bound) | mopl |" in "\n".join(step_table({("135m full pairs", "mopl"): row}))


def test_variants_share_a_process_under_their_own_names() -> None:
    assert named("mopl, again @ 1b full pairs") == ("1b full pairs", step.AGAIN)
    assert named("1b full pairs", TRL) == ("1b full pairs", TRL)
    assert [name for process in step.PROCESSES for name in process] == step.ORDER == list(dict.fromkeys(step.ORDER))


def test_the_host_time_of_a_step_is_measured_by_turns(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    from bench import host_time

    report = Report(tmp_path / "host.json", host_time.COLUMNS)
    host_time.measure(report, "LoRA pairs, own reference", steps=1)
    rows = {row["variant"]: row for row in report.rows}
    assert set(rows) == {TRL, "mopl"} and rows[TRL]["x TRL"] == 1 and all(row["ms"] > 0 for row in rows.values())
    assert "own reference" in capsys.readouterr().out and (tmp_path / "host.json").is_file()
