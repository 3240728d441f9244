"""Every kind of model that takes weights is served: answers are those of `generate`, of merged models, of runs."""

import argparse
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("openai")
pytest.importorskip("uvicorn")

from served_models import running, served
from tiny_language_models import build, conditioned, lora, tokenizer

from mopl.cli import main
from mopl.commands.serve import _served
from mopl.commands.tuned_model import load_tuned_model
from mopl.conditioning import (
    KLWeightCoefficients,
    LoraMixture,
    ParameterMixture,
    TextPrompt,
    TextPromptModel,
    TuningRecord,
)
from mopl.language_models.generate import generate

OBJECTIVES = ("helpful", "harmless")
RECORD = TuningRecord(OBJECTIVES)
WEIGHTS = [[0.7, 0.3], [0.2, 0.8], [1.0, 0.0]]
PROMPTS = ["w1 w2 w3 w4 w5", "w9 w8", "w7 w7 w20 w21"]
OLD = Path(__file__).parents[1] / "experiments" / "old_runs"


def spread(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def adapters(**options):
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_alpha=8, init_lora_weights=False)
    torch.manual_seed(2)
    return spread(LoraMixture(build(), 2, config=config, record=RECORD, **options))


def asked(server, number, scale=1.0, beta=None, **options):
    body = {"weights": WEIGHTS[number], "scale": scale} | ({} if beta is None else {"beta": beta})
    found = server.client.completions.create(
        model="tiny", prompt=PROMPTS[number], temperature=0, max_tokens=6, extra_body=body, **options
    )
    return found.choices[0].text


def texts(model, weights, **options):
    return [
        a.text for a in generate(model, tokenizer(), PROMPTS, weights, max_new_tokens=6, template="plain", **options)
    ]


def all_at_once(server, **options):
    """Ask for all of them in one batch: the queue fills while the first is answered."""
    with ThreadPoolExecutor(6) as pool:
        return list(pool.map(lambda i: asked(server, i % 3, **options), range(6)))


def test_a_mixture_of_adapters_has_rows_of_its_own():
    with running(served(adapters())) as server:
        for scale in (1.0, 2.0):
            wanted = texts(adapters(), WEIGHTS, scale=scale)
            assert len(set(wanted)) == 3 and all_at_once(server, scale=scale) == wanted * 2


@pytest.mark.parametrize("kind", ["parameters", "adapters and a KL weight"])
def test_a_mixture_that_has_one_trade_off_at_a_time_is_switched_to_each(kind):
    base, alpha = build(), None
    if kind == "parameters":
        model = spread(ParameterMixture(build(), 2, scope="full", record=RECORD))
    else:
        model, alpha = adapters(coefficients=KLWeightCoefficients(0.05, anchor=False)), 0.1
    merged = [model.merge(w, alpha) for w in WEIGHTS]  # before it is served: it holds a mixture then
    with running(served(model, reference=base, kl_weight=alpha)) as server:
        for scale in (1.0, 2.0):
            wanted = [texts(one, None, scale=scale, reference=base)[i] for i, one in enumerate(merged)]
            assert len(set(wanted)) == 3 and all_at_once(server, scale=scale) == wanted * 2


def test_weights_in_words_are_written_in_front_of_each_prompt():
    writer = TextPrompt(OBJECTIVES, template="[{weights}] ")
    model = lora(build())
    with running(served(model, text_prompt=writer)) as server:
        assert all_at_once(server, scale=2.0) == texts(model, WEIGHTS, text_prompt=writer, scale=2.0) * 2
    itself = TextPromptModel(lora(build()), writer, tokenizer(), record=RECORD).eval()
    with running(served(itself)) as server:
        assert all_at_once(server) == texts(itself, WEIGHTS) * 2
        # Its own words take positions, too.
        body = {"prompt": [3] * 50, "max_tokens": 14}
        answer = server.http.post("/v1/completions", json=body)
        assert answer.status_code == 400 and "the prompt has 5" in answer.json()["error"]["message"]


def test_beta_is_taken_where_the_model_is_conditioned_on_it():
    model = conditioned(takes_beta=True)
    with running(served(model, beta=[0.6, 0.4])) as server:
        assert server.client.models.retrieve("tiny").model_extra["mopl"]["takes_beta"] is True
        for beta in ([1.5, 0.5], None):
            wanted = texts(model, WEIGHTS, beta=beta or [0.6, 0.4])
            assert [asked(server, i, beta=beta) for i in range(3)] == wanted
        named = {"harmless": 0.5, "helpful": 1.5}
        assert asked(server, 0, beta=named) == asked(server, 0, beta=[1.5, 0.5])
        for more, name in (
            ({"beta": [1e-50, 1]}, "beta"),
            ({"beta": [1e308, 1], "scale": 1e-308}, "beta"),
            ({"beta": [1e6, 1]}, "beta"),
            ({"beta": [1e4, 1], "scale": 1e4}, "scale"),
        ):
            error = server.http.post("/v1/completions", json={"prompt": "w1", **more}).json()["error"]
            assert error["param"] == name and "must be from 1e-06 to 1e+06" in error["message"], error


@pytest.mark.parametrize("kind", ["prompt", "parameters"])
def test_a_larger_model_answers_guided_by_a_small_one(kind):
    large, base = build(num_hidden_layers=3, hidden_size=48), build()
    model = conditioned() if kind == "prompt" else spread(ParameterMixture(build(), 2, scope="full", record=RECORD))
    options = {"guided_model": large, "reference": None if kind == "prompt" else base}
    merged = [] if kind == "prompt" else [model.merge(w) for w in WEIGHTS]
    with running(served(model, **options)) as server:
        assert server.client.models.retrieve("tiny").model_extra["mopl"]["guided"] is True
        for scale in (1.0, 0.5):
            if kind == "prompt":
                wanted = texts(model, WEIGHTS, scale=scale, **options)
            else:
                wanted = [texts(one, None, scale=scale, **options)[i] for i, one in enumerate(merged)]
            assert len(set(wanted)) == 3 and all_at_once(server, scale=scale) == wanted * 2
    with pytest.raises(ValueError, match="the model has no reference; pass one"):
        served(build(), takes_weights=False, fixed=True, guided_model=large)


def test_rows_that_have_too_many_tokens_together_are_answered_apart():
    """Each is padded to the longest, so a long prompt does not take as many others along."""
    sizes = []
    with running(served(conditioned()), max_batch_tokens=4 * 20) as server:
        generate_, engine = server.model.generate, server.engine
        server.model.generate = lambda rows, *more: (sizes.append(len(rows)), generate_(rows, *more))
        answer = server.http.post("/v1/completions", json={"prompt": [[3] * 40, *[[4, 5]] * 5], "max_tokens": 4})
        assert answer.status_code == 200 and engine.max_batch == 16
    assert sizes == [1, 5]


def test_tokens_that_a_model_lacks_are_refused_before_they_reach_it():
    """A tokenizer may have more tokens than the model has rows for."""
    words = tokenizer(chat=True)
    words.add_tokens(["new1", "new2"])
    with running(served(conditioned(), words)) as server:
        for body, param in (
            ({"prompt": [63]}, "prompt"),
            ({"prompt": "w5 new1"}, "prompt"),
            ({"prompt": "w5", "logit_bias": {"62": 5}}, "logit_bias"),
        ):
            answer = server.http.post("/v1/completions", json=body)
            assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.json()
        assert server.http.post("/v1/completions", json={"prompt": [61]}).status_code == 200


def test_what_a_model_cannot_be_asked_for_is_refused_at_the_start():
    with pytest.raises(ValueError, match="beta was passed but the model is not conditioned on it"):
        served(conditioned(), beta=[3, 1])
    with pytest.raises(ValueError, match="guided_model has embeddings of 56 tokens and the model of 62"):
        served(conditioned(), guided_model=build(vocabulary=56))


@pytest.mark.parametrize(
    "options",
    [
        {"suppress_tokens": [7, 44, 48], "repetition_penalty": 3.0, "bad_words_ids": [[27]]},
        {"no_repeat_ngram_size": 1},  # which reads the padding
    ],
)
def test_what_the_configuration_does_to_scores_holds_whoever_else_is_answered(options):
    model = conditioned()
    plain = [texts(model, w)[i] for i, w in enumerate(WEIGHTS)]
    for name, value in options.items():
        setattr(model.causal_lm.generation_config, name, value)
    words = tokenizer(chat=True)
    words.pad_token = plain[1].split()[0]
    wanted = [
        generate(model, words, [prompt], w, max_new_tokens=6, template="plain")[0].text
        for prompt, w in zip(PROMPTS, WEIGHTS, strict=True)
    ]
    assert wanted != plain
    with running(served(model, words)) as server:
        assert all_at_once(server) == wanted * 2


def test_a_scaled_request_leaves_the_penalties_of_others_alone():
    """At a scale penalties are left out, and at scale 1 they hold: also for rows that wait at the same time."""
    model = conditioned()
    model.causal_lm.generation_config.repetition_penalty = 3.0
    plain, scaled = (texts(model, WEIGHTS, scale=scale) for scale in (1.0, 2.0))
    model.causal_lm.generation_config.repetition_penalty = 1.0
    assert texts(model, WEIGHTS) != plain and texts(model, WEIGHTS, scale=2.0) == scaled
    model.causal_lm.generation_config.repetition_penalty = 3.0
    with running(served(model)) as server, ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda i: asked(server, i % 3, scale=1.0 + i // 3), range(6)))
    assert found == [*plain, *scaled]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 4),
        ("stop_strings", ["w27"]),
        ("forced_eos_token_id", 2),
        ("max_time", 5.0),
        ("penalty_alpha", 0.6),
    ],
)
def test_a_configuration_that_rows_cannot_obey_is_refused_by_name(name, value):
    model = conditioned()
    setattr(model.causal_lm.generation_config, name, value)
    with pytest.raises(ValueError, match=f"generation_config has {name}="):
        served(model)


def test_a_model_of_one_trade_off_has_no_other():
    with running(served(build(), weights=[0.7, 0.3], takes_weights=False, fixed=True)) as server:
        assert asked(server, 0) == texts(build(), None)[0]
        for body, words in (({"weights": [0.6, 0.4]}, "one trade-off, 0.7,0.3"), ({"scale": 2}, "no reference")):
            answer = server.http.post("/v1/completions", json={"prompt": "w1", **body})
            assert answer.status_code == 400 and words in answer.json()["error"]["message"]


def test_rows_that_cannot_be_padded_are_answered_one_by_one(monkeypatch):
    monkeypatch.setattr("mopl.serving.model.reads_left_padding", lambda model: False)
    monkeypatch.setattr("mopl.language_models.prompt_rows.reads_left_padding", lambda model: False)
    model = conditioned()
    with running(served(model)) as server:
        assert server.engine.max_batch == 1
        assert all_at_once(server) == texts(model, WEIGHTS) * 2


def test_what_has_no_room_together_is_answered_apart():
    """A long prompt with a short answer and a short prompt with a long one: each fits, the two in one batch do not."""
    model = conditioned()
    with running(served(model), max_tokens=60) as server:
        for _ in range(2):
            bodies = [{"prompt": [3] * 50, "max_tokens": 4}, {"prompt": [4, 5], "max_tokens": 50}]
            from concurrent.futures import ThreadPoolExecutor

            with ThreadPoolExecutor(2) as pool:
                found = list(pool.map(lambda body: server.http.post("/v1/completions", json=body), bodies))
            assert [each.status_code for each in found] == [200, 200], [each.text for each in found]


@pytest.mark.parametrize("kind", ["align", "clp"])
def test_a_run_answers_as_mopl_generate_does(kind, tmp_path, capsys):
    """The one of `clp` is a mixture of adapters with a KL weight, which `mopl generate` merges."""
    for name in (kind, "model"):
        shutil.copytree(OLD / name, tmp_path / name)
    for file in tmp_path.rglob("*.json"):
        file.write_text(file.read_text().replace("{place}", str(tmp_path)))
    run = str(tmp_path / kind)
    alpha = ["--kl-weight", "0.05"] if kind == "clp" else []
    for scale in ("1", "2"):
        given = ["--weights", "0.7", "0.3", "--scale", scale, "--max-new-tokens", "6", "--raw", *alpha]
        assert main(["generate", run, *given, "w1 w2"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    options = argparse.Namespace(
        run=run, method=None, weights=None, beta=None, kl_weight=0.05 if alpha else None, base_model=None, device="cpu",
        guided_model=None,
    )  # fmt: skip
    model = _served(load_tuned_model(options, "cpu", merge=False), options, "tiny", "cpu")
    assert model.one_at_a_time is (kind == "clp") and not model.fixed
    with running(model) as server:
        for scale, wanted in ((1.0, first), (2.0, second)):
            body = {"weights": [0.7, 0.3], "scale": scale}
            found = server.client.completions.create(
                model="tiny", prompt="w1 w2", temperature=0, max_tokens=6, extra_body=body
            )
            assert found.choices[0].text == wanted


def test_a_folder_of_a_mixture_with_a_kl_weight_answers_at_the_one_that_is_named(tmp_path, capsys):
    """A run of it always did; a folder was told to name a KL weight, and then not to."""
    build(num_hidden_layers=1).save_pretrained(tmp_path / "base")
    tokenizer(chat=True).save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_alpha=8, init_lora_weights=False)
    coefficients = KLWeightCoefficients(0.05, anchor=False)
    mixture = spread(LoraMixture(base, 2, config=config, coefficients=coefficients, record=RECORD))
    mixture.save_pretrained(tmp_path / "tuned")
    options = argparse.Namespace(
        run=str(tmp_path / "tuned"), method=None, weights=None, beta=None, kl_weight=0.1, base_model=None,
        device="cpu", guided_model=None,
    )  # fmt: skip
    model = _served(load_tuned_model(options, "cpu", merge=False), options, "tiny", "cpu")
    assert model.one_at_a_time and model.kl_weight == 0.1 and not model.fixed
    wanted = [texts(mixture.merge(w, 0.1), None)[i] for i, w in enumerate(WEIGHTS)]
    with running(model) as server:
        assert [asked(server, i) for i in range(3)] == wanted
        assert server.client.models.retrieve("tiny").model_extra["mopl"]["kl_weight"] == 0.1
    given = ["generate", str(tmp_path / "tuned"), "--weights", "0.7", "0.3", "--max-new-tokens", "6", "--raw"]
    assert main([*given, "--kl-weight", "0.1", PROMPTS[0]]) == 0
    assert capsys.readouterr().out == f"{wanted[0]}\n"
    assert main([*given, PROMPTS[0]]) == 2 and "choose one with --kl-weight" in capsys.readouterr().err
