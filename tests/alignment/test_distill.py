"""Distillation: closed forms of the optimum, divergences beside the plain formula, whole runs, what is refused."""

import dataclasses
import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")
pytest.importorskip("moocore")

from damage import error_of
from tiny_language_models import VOCABULARY, build, conditioned, lora, tokenizer

from mopl.alignment import AlignConfig, align, fuse, open_run
from mopl.alignment.distill import Distilling
from mopl.alignment.methods import AlignBatch, AlignSource
from mopl.alignment.recipe import RunInterrupted, load_data
from mopl.alignment.teachers import Teacher, load_teacher
from mopl.cli import main
from mopl.conditioning import HyperPrompt, HyperPromptModel, TuningRecord
from mopl.experiments.methods import METHODS
from mopl.language_models import models
from mopl.language_models.collate import ListCollator
from mopl.language_models.divergences import Distillation, divergences, states_of
from mopl.language_models.tokenization import tokenize
from mopl.language_models.tokenized import TokenizedList
from mopl.pareto import Front
from mopl.training import make_accelerator
from tests.alignment.test_command import quiet, tiny, write_data, write_model

BETAS = [0.0, 0.3, 1.0]


def plain_divergence(teacher, student, beta):
    """The generalised JSD of log-probabilities (..., V), in float64."""
    q, p = teacher.double(), student.double()
    if beta == 0.0:
        return (q.exp() * (q - p)).sum(-1)
    if beta == 1.0:
        return (p.exp() * (p - q)).sum(-1)
    m = (beta * q.exp() + (1 - beta) * p.exp()).log()
    return beta * (q.exp() * (q - m)).sum(-1) + (1 - beta) * (p.exp() * (p - m)).sum(-1)


# ---------------------------------------------------------------- the optimum of a model that can be anything


class Table(transformers.PreTrainedModel):
    """The logits of the next token are a row of free numbers for each token."""

    config_class = transformers.PretrainedConfig

    def __init__(self, words, seed):
        super().__init__(transformers.PretrainedConfig(vocab_size=words))
        self.rows = nn.Embedding(words, words, dtype=torch.float64)
        self.head = nn.Linear(words, words, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.rows.weight.copy_(torch.randn(words, words, generator=torch.Generator().manual_seed(seed)))
            self.head.weight.copy_(torch.eye(words))
        self.head.requires_grad_(False)

    def get_input_embeddings(self):
        return self.rows

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **_):
        return transformers.modeling_outputs.CausalLMOutput(logits=self.head(self.rows(input_ids)))


def random_lists(words=7, count=4, seed=0):
    draw = np.random.default_rng(seed)
    made = []
    for number in range(count):
        prompt = draw.integers(0, words, 1 + number % 3)
        responses = tuple(draw.integers(0, words, 2 + (number + k) % 4) for k in range(2))
        made.append(TokenizedList(prompt, responses, np.zeros((2, 2), dtype=np.float32), number))
    return made


def whole_batch(lists, w, plain=None, collator=None):
    collate = collator or ListCollator()
    weights = torch.tensor(w).expand(len(lists), len(w))
    return AlignBatch(lists=collate(lists), weights=weights, beta=torch.ones_like(weights), plain=plain)


@pytest.mark.parametrize("beta", BETAS)
def test_the_optimum_is_the_mixture_that_the_closed_form_says(beta):
    w, temperature = [0.5, 0.5] if beta in (0.0, 1.0) else [0.3, 0.7], 1.0 if beta else 1.7
    tables = [fuse(Table(7, seed)) for seed in (1, 2)]
    student, lists = fuse(Table(7, 3)), random_lists()
    learning = Distilling(
        [Teacher(str(j), table) for j, table in enumerate(tables)], Distillation(beta, temperature),
        make_accelerator("no", cpu=True),
    )  # fmt: skip
    loss, batch = learning.loss(["a", "b"]), whole_batch(lists, w)
    search = torch.optim.LBFGS(
        [student.rows.weight], max_iter=400, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        search.zero_grad()
        value, logs = loss(student, batch, 0)
        assert set(logs) == {"loss/a", "loss/b"}
        value.backward()
        return value

    search.step(closure)
    seen = {int(token) for item in lists for k, r in enumerate(item.responses) for token in [item.prompt[-1], *r[:-1]]}
    seen = sorted(seen)
    p, *teachers = ((t.rows.weight[seen] / temperature).log_softmax(-1) for t in (student, *tables))
    if beta == 0.0:
        wanted = sum(share * q.exp() for share, q in zip(w, teachers, strict=True))
        torch.testing.assert_close(p.exp(), wanted, atol=1e-7, rtol=0)
    else:
        mixed = [(beta * q.exp() + (1 - beta) * p.exp()).log() for q in teachers]
        wanted = sum(share * log for share, log in zip(w, mixed, strict=True)).softmax(-1)
        torch.testing.assert_close(p.exp(), wanted, atol=1e-7, rtol=0)
        if beta == 1.0:  # logits mixed, as `mopl.decoding.mixtures` does
            logits = sum(share * table.rows.weight[seen] for share, table in zip(w, tables, strict=True))
            torch.testing.assert_close(p.exp(), (logits / temperature).softmax(-1), atol=1e-7, rtol=0)
    assert len(seen) >= 5 and bool(((teachers[0] - teachers[1]).abs() > 1).any())


# ---------------------------------------------------------------- divergences, whatever the rows are


def logits_of(model, prompt, response, **given):
    """Logits at each token of a response, of one row."""
    ids = torch.tensor(np.concatenate([prompt, response]))[None]
    return model(ids, attention_mask=torch.ones_like(ids), **given).logits[0, len(prompt) - 1 : -1]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("packed", [False, True])
def test_divergences_are_those_of_the_logits(beta, packed):
    student, other = conditioned("llama"), fuse(build("gemma2"))  # one caps its logits, one does not
    fuse(student.causal_lm)
    lists = random_lists(words=VOCABULARY, count=3, seed=2)
    batch = ListCollator(packed=packed)(lists)
    w = torch.distributions.Dirichlet(torch.ones(2)).sample((3,))
    experts = [Teacher("cap", other), Teacher("expert", student, torch.tensor([1.0, 0.0]))]
    learning = Distilling(experts, Distillation(beta, 1.3), make_accelerator("no", cpu=True))
    with torch.no_grad():
        found, scores = learning.divergence(student, batch, batch, w, None, scores=True)
        for row, item in enumerate(lists):
            for k, response in enumerate(item.responses):
                logits = logits_of(student, item.prompt, response, weights=w[row])
                picked = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).sum()
                torch.testing.assert_close(scores[row, k], picked, atol=1e-4, rtol=1e-4)
                own = (logits.double() / 1.3).log_softmax(-1)
                for j, theirs in enumerate((
                    logits_of(other, item.prompt, response),
                    logits_of(student, item.prompt, response, weights=torch.tensor([1.0, 0.0])),
                )):  # fmt: skip
                    wanted = plain_divergence((theirs.double() / 1.3).log_softmax(-1), own, beta).mean().float()
                    torch.testing.assert_close(found[row, k, j], wanted, atol=2e-5, rtol=1e-4)
        # The other way round: now the student caps its logits and the teacher does not.
        back, none = divergences(other, batch.inputs, [states_of(student, batch.inputs, weights=w[batch.index[:, 0]])],
                                 Distillation(1 - beta, 1.3))  # fmt: skip
        there, _ = divergences(student, batch.inputs, [states_of(other, batch.inputs)], Distillation(beta, 1.3),
                               weights=w[batch.index[:, 0]])  # fmt: skip
        assert none is None
        torch.testing.assert_close(back, there, atol=2e-5, rtol=1e-4)


def test_the_loss_is_the_weighted_mean_over_responses_and_teachers_read_no_weights():
    student, other = conditioned("llama"), fuse(build("gemma2"))
    fuse(student.causal_lm)
    lists = random_lists(words=VOCABULARY, count=3, seed=2)
    lists[1] = dataclasses.replace(lists[1], responses=lists[1].responses[:1], labels=lists[1].labels[:, :1])

    def write(item, w, beta):
        return dataclasses.replace(item, prompt=np.concatenate([[9, 10 + int(10 * w[0])], item.prompt]))

    w = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
    given = {"weights": lambda step: w, "beta": lambda step: torch.ones(3, 2)}
    source = AlignSource(lists, 3, ListCollator(), seed=0, conditioner=write, taught=True, **given)
    batch = source(0)
    plain, read = batch.read_by_teachers.inputs, batch.lists.inputs
    assert (read["attention_mask"].sum(1) - plain["attention_mask"].sum(1)).tolist() == [2] * 5
    teachers = [Teacher("a", other), Teacher("b", fuse(build("llama")))]
    learning = Distilling(teachers, Distillation(0.3), make_accelerator("no", cpu=True))
    value, logs = learning.loss(["a", "b"])(student, batch, 0)
    wanted = torch.zeros(3, 2)
    with torch.no_grad():
        for row, (number, own) in enumerate(zip(batch.lists.lists.tolist(), w, strict=True)):
            item = lists[number]
            for response in item.responses:
                p = logits_of(student, write(item, own, None).prompt, response, weights=own).log_softmax(-1)
                for j, teacher in enumerate(teachers):
                    q = logits_of(teacher.model, item.prompt, response).log_softmax(-1)
                    wanted[row, j] += plain_divergence(q, p, 0.3).mean() / len(item.responses)
    torch.testing.assert_close(value.detach(), (w * wanted).sum(1).mean(), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(logs["loss/b"], wanted[:, 1].mean(), atol=2e-5, rtol=1e-4)


def test_other_responses_than_the_teachers_are_refused():
    model, lists = fuse(build()), random_lists(words=VOCABULARY)
    batch, fewer = ListCollator()(lists), ListCollator()(lists[:2])
    with pytest.raises(ValueError, match="give both the same responses"):
        divergences(model, batch.inputs, [states_of(model, fewer.inputs)], Distillation())
    with pytest.raises(ValueError, match="the teacher is not fused"):
        states_of(build(), batch.inputs)
    with pytest.raises(ValueError, match="nothing else is asked for"):
        divergences(model, batch.inputs, [], Distillation())


def test_models_that_share_a_base_hold_their_own_adapters_and_one_memory():
    base = fuse(build().requires_grad_(False))
    ids = torch.tensor([[1, 9, 10, 11]])
    before = base(ids).logits
    other = models.sharing(base)
    assert {p.data_ptr() for p in other.parameters()} == {p.data_ptr() for p in base.parameters()}
    wrapped = lora(other)
    assert not torch.allclose(wrapped(ids).logits, before, atol=1e-3)
    assert torch.equal(base(ids).logits, before) and not hasattr(base, "peft_config")
    assert len(list(base.parameters())) < len(list(wrapped.parameters()))


# ---------------------------------------------------------------- the student's own answers


@pytest.mark.parametrize("words", [False, True])
def test_own_answers_follow_the_model_and_do_not_depend_on_the_cut(words):
    from mopl.alignment.on_policy import OwnAnswers
    from mopl.language_models.tokenization import ListTokenizer

    model, tokens = conditioned("llama"), ListTokenizer(tokenizer(), max_length=None)
    fuse(model.causal_lm)
    with torch.no_grad():  # few tokens that are likely: samples then show whether numbers are those of the list
        model.causal_lm.get_output_embeddings().weight.mul_(3)
    lists = random_lists(words=VOCABULARY, count=4, seed=5)

    def write(item, w, beta):
        return dataclasses.replace(item, prompt=np.concatenate([[9, 10 + int(10 * w[0])], item.prompt]))

    answers = OwnAnswers(lists, ListCollator(), tokens, write if words else None, share=0.5, tokens=6, seed=3)
    assert 40 < sum(answers.has(step) for step in range(100)) < 60
    w = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.5, 0.5], [0.3, 0.7]])
    model = model if not words else fuse(build())

    def responses(rows):
        collated = ListCollator()([lists[row] for row in rows])
        batch = AlignBatch(lists=collated, weights=w[rows], beta=torch.ones(len(rows), 2))
        made = answers.answered(model.train(), batch, step=8)
        assert model.training and (made.plain is not None) == words and torch.equal(made.lists.lists, collated.lists)
        found = []
        for each in (made.lists, made.read_by_teachers):
            inputs = each.inputs
            found.append(
                [row[label != -100].tolist() for row, label in zip(inputs["input_ids"], inputs["labels"], strict=True)]
            )
        assert found[0] == found[1]
        front = made.lists.inputs["attention_mask"].sum(1) - made.read_by_teachers.inputs["attention_mask"].sum(1)
        assert front.tolist() == [2 * words] * len(rows)
        return found[0]

    whole = responses([0, 1, 2, 3])
    assert whole == responses([0, 1]) + responses([2, 3])
    for number, answer in enumerate(whole):  # each token is where the list's own number falls among the likeliest first
        numbers = np.random.default_rng([3, 8, 2, number]).random(6)
        item = write(lists[number], w[number], None) if words else lists[number]
        given = {} if words else {"weights": w[number]}
        with torch.no_grad():
            logits = logits_of(model.eval(), item.prompt, np.array(answer), **given)
        for token, row, at in zip(answer, logits, numbers, strict=False):
            p, ids = row.softmax(-1).sort(descending=True)
            assert token == int(ids[int((p.cumsum(0) < at * p.sum()).sum())])


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill")
    write_model(folder)
    write_data(folder / "data.jsonl", count=20)
    return folder


@pytest.fixture(scope="module")
def run(place):
    """A run with its own experts, far enough from their start to differ."""
    settings = tiny(place, method="distill", steps=4, points=3, learning_rate=0.02, distill_beta=0.4, samples=1)
    return align(settings, place / "own", say=quiet)


def divergence_at(model, teachers, w, opened, beta):
    """The figure of evaluation.json at weights w, None for a base, from logits alone."""
    held_out = load_data(opened.config)["test"]
    found = []
    with torch.no_grad():
        for item in tokenize(held_out, opened.list_tokenizer):
            for response in item.responses:
                asked = {} if w is None else {"weights": torch.tensor(w)}
                own = logits_of(model, item.prompt, response, **asked).log_softmax(-1)
                theirs = (logits_of(t, item.prompt, response, **g).log_softmax(-1) for t, g in teachers)
                found.append([float(plain_divergence(each, own, beta).mean()) for each in theirs])
    return np.mean(found, 0)


def test_a_run_teaches_one_student_by_its_own_experts(place, run, capsys):
    opened = open_run(run)
    assert opened.is_conditioned() and opened.methods == ("distill",) and opened.grid.shape == (3, 2)
    assert sorted(each.name for each in (run / "models").iterdir()) == ["w-0-1", "w-1-0"]
    evaluation = json.loads((run / "evaluation.json").read_text())["distillation"]
    assert evaluation["teachers"] == "experts" and evaluation["beta"] == 0.4
    experts = [models.load_model(run / "models" / name, opened.base_model()) for name in ("w-1-0", "w-0-1")]
    given = [(expert, {"weights": torch.tensor([0.5, 0.5])}) for expert in experts]
    for w, figures in zip(opened.grid.tolist(), evaluation["divergence"], strict=True):
        wanted = divergence_at(opened.load(), given, w, opened, 0.4)
        assert figures == pytest.approx(wanted.tolist(), rel=1e-3, abs=1e-6)
    untrained = divergence_at(opened.base_model(), given, None, opened, 0.4)
    assert evaluation["base_divergence"] == pytest.approx(untrained.tolist(), rel=1e-3, abs=1e-6)
    table = (run / "table.txt").read_text()
    mean = np.mean([np.dot(w, d) for w, d in zip(opened.grid.tolist(), evaluation["divergence"], strict=True)])
    before = np.mean([np.dot(w, evaluation["base_divergence"]) for w in opened.grid.tolist()])
    assert Front.load(run / "front.json").measures == {
        "Divergence to teachers (nats)": {"value": pytest.approx(mean), "base": pytest.approx(before)}
    }
    assert re.search(rf"^distill +{mean:.4f}\b", table, re.M)  # what it was trained for stands first in the table
    assert f"(base {before:.4f})" in table
    whole = json.loads((run / "evaluation.json").read_text())
    corner = whole["weights"].index([1.0, 0.0])  # where `low` has the most weight
    assert f"most weight: low {100 * whole['accuracy'][corner][0]:.1f} %" in table
    front, base = Front.load(run / "front.json"), Front.load(run / "base" / "front.json")
    student = front.inference_parameters - base.inference_parameters
    assert 0 < student < front.parameters  # the experts are trained too, and not asked
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert {"loss/low", "loss/middle"} <= next(e for e in logged if e["stage"] == "distill").keys()
    assert opened.training_settings("distill")["divergence"] == "generalised JSD, teacher's share 0.4, temperature 1"

    few = ["--weights", "0.3", "0.7", "--max-new-tokens", "2", "--device", "cpu", "w1 w2"]
    assert main(["generate", str(run), *few]) == 0
    assert main(["export", str(run), "--weights", "0.3", "0.7", str(place / "exported")]) == 0
    assert main(["report", str(run)]) == 0
    assert "distill" in capsys.readouterr().out


def test_experts_of_another_run_teach_to_the_same_bits(place, run):
    teachers = tuple(str(run / "models" / name) for name in ("w-1-0", "w-0-1"))
    config = open_run(run).config
    settings = AlignConfig.from_dict({**config.to_dict(), "teachers": teachers, "samples": 0})
    said: list[str] = []
    path = align(settings, place / "given", say=said.append)
    assert f"{teachers[0]} teaches low; {teachers[1]} teaches middle" in said
    assert "mean divergence to the teachers of low, middle, in nats" in said
    for file in ("adapter_model.safetensors", "hyper_prompt.safetensors"):
        assert (path / "model" / file).read_bytes() == (run / "model" / file).read_bytes()
    one, two = (json.loads((each / "evaluation.json").read_text()) for each in (run, path))
    assert one["distillation"]["divergence"] == two["distillation"]["divergence"]
    first = ", ".join(f"{value:.4f}" for value in two["distillation"]["divergence"][0])
    assert any(line.endswith(f": {first}") for line in said)
    base, tokens = open_run(run).base_model(), open_run(run).tokenizer
    for objective in (0, 1):  # a model for every trade-off is asked where its objective has all weight
        teacher = load_teacher(str(run / "model"), base, config.model, tokens, ("low", "middle"), objective)
        assert teacher.weights.tolist() == [float(objective == 0), float(objective == 1)]
    assert not (path / "models").exists() and not (path / "reference" / "train.safetensors").exists()


@pytest.mark.parametrize("conditioning", ["lora-mixture", "text"])
def test_a_model_and_an_adapter_teach_students_of_every_kind_and_a_stop_changes_no_bit(
    place, tmp_path, ctrl_c, conditioning
):
    other = write_model(tmp_path, "other", seed=5)
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    lora(base).save_pretrained(tmp_path / "adapter")
    settings = tiny(
        place, method="distill", teachers=(str(other), str(tmp_path / "adapter")), conditioning=conditioning,
        distill_beta=0.0, lora_rank=2, learning_rate=0.02, samples=0, steps=4, distill_on_policy=0.7, distill_tokens=5,
    )  # fmt: skip
    whole = align(settings, tmp_path / "whole", say=quiet)
    recorded = json.loads((whole / "config.json").read_text())["data"]["teachers"]
    assert recorded[0]["model"] != recorded[1]["model"] and recorded[0]["adapter"] == "none" != recorded[1]["adapter"]

    from mopl.alignment.distill import Distilling as Own

    before, seen = Own.divergence, []

    def stop_in_the_second_step(self, *args, **options):
        seen.append(None)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return before(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Own, "divergence", stop_in_the_second_step)
        with pytest.raises(RunInterrupted):
            align(settings, tmp_path / "cut", say=quiet)
    assert len(seen) == 2
    align(settings, tmp_path / "cut", resume=True, say=quiet)
    for file in (whole / "model").rglob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "cut" / file.relative_to(whole)).read_bytes()
    assert (
        json.loads((whole / "front.json").read_text())["points"]
        == json.loads((tmp_path / "cut" / "front.json").read_text())["points"]
    )

    opened = open_run(whole)
    teachers = [(models.load_causal_lm(str(name)), {}) for name in (other, tmp_path / "adapter")]
    if conditioning == "lora-mixture":
        for w, figures in zip(opened.grid.tolist(), json.loads(
            (whole / "evaluation.json").read_text())["distillation"]["divergence"], strict=True
        ):  # fmt: skip
            wanted = divergence_at(opened.load(), teachers, w, opened, 0.0)
            assert figures == pytest.approx(wanted.tolist(), rel=1e-3, abs=1e-6)
    write_model(tmp_path, "other", seed=6)
    with pytest.raises(ValueError, match=r"the teacher .*other is another model than when .* began \(model differ\)"):
        align(settings, whole, resume=True, say=quiet)


def test_given_teachers_teach_lists_that_nobody_labelled(place, tmp_path):
    teacher = str(write_model(tmp_path, "teacher", seed=5))
    settings = tiny(place, method="distill", teachers=(teacher, teacher), samples=0, steps=1)
    test = load_data(settings)["test"]
    kept = {test[i].prompt for i in range(len(test))}
    rows = [json.loads(line) for line in Path(settings.data).read_text().splitlines()]
    for row in rows:
        if row["prompt"] not in kept:
            row["labels"]["middle"] = None
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = dataclasses.replace(settings, data=str(tmp_path / "data.jsonl"))
    assert (align(settings, tmp_path / "run", say=quiet) / "front.json").exists()


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "distill", "--teachers", "{place}/model"], "--teachers names 1"),
        (["--teachers", "a", "b"], "teachers has no part in method 'weight-cos-dpo'"),
        (["--method", "all", "--distill-beta", "0.1"], "distill-beta has no part in method 'all'"),
        (["--method", "dpo-ls", "--distill-temperature", "2"], "distill-temperature has no part in method 'dpo-ls'"),
        (["--method", "distill", "--distill-beta", "1.5"], "distill-beta is 1.5 but must be at least 0 and at most 1"),
        (["--method", "distill", "--distill-temperature", "0"], "distill-temperature is 0 but must be positive"),
        (["--method", "distill", "--distill-tokens", "9"], "is about the student's own answers"),
        (["--method", "distill", "--distill-on-policy", "1"], "lower --distill-tokens or --max-length"),
        (["--method", "distill", "--teachers", "a", "b", "--reference", "self"], "see the teachers alone"),
        (["--method", "distill", "--teachers", "./none", "{place}/model"], "there is no model ./none"),
        (["--method", "distill", "--teachers", "{place}/foreign", "{place}/model"], "another vocabulary (44 tokens)"),
        (["--method", "distill", "--teachers", "{place}/wide", "{place}/model"], "wide has 40 rows"),
        (["--method", "distill", "--teachers", "{place}/words", "{place}/model"], "reads its weights in words"),
        (["--method", "distill", "--teachers", "{place}/named", "{place}/model"], "is for the objectives a, b"),
        (["--method", "distill", "--teachers", "{place}/mixed", "{place}/model"], "is a ParameterMixture, but"),
        (["--method", "distill", "--teachers", "{place}/moved", "{place}/model"], "was trained around elsewhere"),
        (
            ["--method", "distill", "--teachers", "{place}/beta", "{place}/model"],
            "is conditioned on β besides",
        ),
        (["--method", "distill", "--teachers", "{place}/runs", "{place}/model"], "is a run; name one of its models: "),
    ],
)
def test_what_cannot_teach_is_refused_before_anything_is_written(refused, tmp_path, capsys, more, message):
    place = refused
    given = ["align", "--model", str(place / "model"), "--data", str(place / "data.jsonl"), "--run",
             str(tmp_path / "run"), "--device", "cpu", "--max-length", "32"]  # fmt: skip
    assert message in error_of([*given, *(word.format(place=place) for word in more)], capsys)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def refused(place) -> Path:
    """Folders beside the model that cannot teach."""
    write_model(place, "foreign", words=40)
    write_model(place, "wide")
    wide = transformers.AutoModelForCausalLM.from_pretrained(place / "wide")
    wide.resize_token_embeddings(40)
    wide.save_pretrained(place / "wide")
    write_model(place, "words")
    (place / "words" / "mopl.json").write_text(json.dumps({"kind": "export", "text": "[low: 1.00, middle: 0.00]"}))
    for name, kind, objectives, base in (
        ("named", "HyperPromptModel", ["a", "b"], None), ("mixed", "ParameterMixture", ["low", "middle"], None),
        ("moved", "HyperPromptModel", ["low", "middle"], "elsewhere"),
    ):  # fmt: skip
        (place / name).mkdir()
        record = {
            "kind": kind,
            "objectives": objectives,
            "base_model": base,
            "reference": "self",
            "beta": 0.1,
            "alpha": 1,
        }
        (place / name / "mopl.json").write_text(json.dumps(record))
    hidden = HyperPrompt(2, 2, 2, wide.config.hidden_size, takes_beta=True)
    record = TuningRecord(("low", "middle"), "self", ((0.1, 0.1), (0.2, 0.2)), 1.0)
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    HyperPromptModel(base, hidden, record=record).save_pretrained(place / "beta")
    shutil.copytree(place / "named", place / "runs" / "models" / "w-1-0")
    return place


def test_all_leaves_distillation_out_and_rankers_have_none(capsys):
    assert "distill" not in METHODS and AlignConfig("m", "d", method="all").methods == METHODS
    assert "--method is 'distill' but must be one of" in error_of(["rank", "--method", "distill"], capsys)
