"""Rollouts from a server: it samples from the policy of the step, and what it gets wrong is an error."""

import copy
import dataclasses
import math

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

from clp_problems import LENGTH, SCOPES, disturbed, language_model, make_loss, make_rewards, parts, settings
from served_models import Running
from tiny_language_models import tokenizer
from vllm_imitation import imitating

from mopl.clp import PolicyCollapsed
from mopl.clp.policies import new_policy, release
from mopl.clp.prompts import PromptSource
from mopl.clp.rollout import Sampler, roll
from mopl.clp.rollout_server import OpenAIServer, RolloutServerError
from mopl.clp.server_rollouts import ServerAnswers
from mopl.language_models.tokenization import ListTokenizer
from mopl.losses import importance_weights
from mopl.serving.policies import PolicyFolder
from mopl.training import make_accelerator, train


@pytest.fixture(scope="module")
def accelerator():
    return make_accelerator(cpu=True)


@pytest.fixture(scope="module")
def mopl_server(tmp_path_factory):
    """`mopl serve` with policies of a folder, in a thread."""
    folder = tmp_path_factory.mktemp("policies")
    encoder = ListTokenizer(tokenizer(), max_length=None, append_eos=False)
    policies = PolicyFolder(folder, language_model(), encoder, name="base")
    server = Running(policies.plain)
    server.api.policies = policies
    yield server
    server.stop()


@pytest.fixture
def vllm():
    with imitating() as server:
        yield server


def asking(url, folder, accelerator, base, **options):
    config = settings(rollout_server=url, rollout_folder=str(folder), rollout_timeout=20.0, **options)
    sampler = Sampler(base, tokenizer(), config)
    answers = ServerAnswers(config, sampler, accelerator)
    answers.check([], [1, 7, 8])
    return config, sampler, answers


def batch_of(config, trade_offs=2, step=0):
    return PromptSource(parts(config)["train"], config, 2, trade_offs=trade_offs)(step)


def check_same_policy(policy, config, sampler, answers):
    """What the server sampled has the log-probabilities of the policy here, so that all importance weights are 1."""
    rollout = roll(policy, batch_of(config), sampler, make_rewards(), config, answers)
    assert len(rollout.responses) == 8 and rollout.sampled is not None
    arguments = policy.arguments(rollout.weights, rollout.kl_weight)
    own, _ = sampler.score(policy.model, rollout.prompts, rollout.responses, arguments)
    mask = torch.arange(own.shape[1]) < torch.tensor([len(row) for row in rollout.responses])[:, None]
    assert torch.allclose(own, rollout.sampled, atol=2e-5)
    found = importance_weights(own, rollout.sampled, mask=mask)
    assert torch.allclose(found.weights, torch.ones(8), atol=1e-4) and found.kl < 1e-8
    assert rollout.texts == sampler.ends.texts(rollout.responses)
    assert len({tuple(row) for row in rollout.responses}) > 4, "they are sampled, with seeds of their own"
    base, _ = sampler.score(language_model(), rollout.prompts, rollout.responses)
    assert not torch.allclose(base, rollout.sampled, atol=1e-2), "and not from the untrained model"
    return rollout


@pytest.mark.parametrize(
    ("scope", "kind"),
    [(scope, "clp") for scope in SCOPES if scope != "full"]
    + [("attention", "expert"), ("lora-mixture", "expert"), ("lora-mixture", "prompting")],
)
def test_a_server_of_mopl_samples_from_the_policy_of_every_scope(mopl_server, accelerator, scope, kind):
    base = language_model()
    config, sampler, answers = asking(
        mopl_server.url, mopl_server.api.policies.folder, accelerator, base, scope=scope, temperature=0.7
    )
    policy = disturbed(new_policy(base, config, ("first", "second"), kind, "first"))
    first = check_same_policy(policy, config, sampler, answers.of(kind))
    torch.manual_seed(0)
    again = roll(policy, batch_of(config), sampler, make_rewards(), config, answers)
    assert again.responses != first.responses
    torch.manual_seed(0)
    same = roll(policy, batch_of(config), sampler, make_rewards(), config, answers)
    assert same.responses == again.responses, "a step that is done again has the same answers"
    assert not list(answers.folder.iterdir()), "what was loaded is taken away"
    release(policy)


def test_a_policy_for_several_kl_weights_is_asked_at_each(mopl_server, accelerator):
    base = language_model()
    options = {"scope": "attention", "kl_weight": (0.05, 0.4)}
    config, sampler, answers = asking(mopl_server.url, mopl_server.api.policies.folder, accelerator, base, **options)
    policy = disturbed(new_policy(base, config, ("first", "second"), "clp"))
    rollout = check_same_policy(policy, config, sampler, answers.of("kl"))
    assert len(set(rollout.kl_weight.tolist())) == 2
    body = {"model": mopl_server.engine.served.name, "prompt": [1, 7], "kl_weight": 0.5}
    refused = mopl_server.http.post("/v1/completions", json=body)
    assert refused.status_code == 400 and "trained for those from 0.05 to 0.4" in refused.text


def test_a_text_that_ends_a_turn_ends_an_answer_there_too(mopl_server, accelerator):
    base = language_model()
    config, sampler, answers = asking(
        mopl_server.url, mopl_server.api.policies.folder, accelerator, base, scope="lora-mixture"
    )
    ends = [f"w{i}" for i in range(0, 50)]
    policy = disturbed(new_policy(base, config, ("first", "second"), "clp"))
    for text in ends[:50:5]:
        sampler.ends = dataclasses.replace(sampler.ends, text=text)
        rollout = check_same_policy(policy, config, sampler, answers)
        ended = [row for row in rollout.responses if tokenizer().decode(row[-1:]) == text]
        if ended and min(map(len, ended)) < LENGTH:
            break
    else:
        pytest.fail("no answer ended at a text")
    release(policy)


@pytest.mark.parametrize(("kind", "temperature"), [("clp", 0.7), ("expert", 1.0), ("prompting", 1.0)])
def test_vllm_gets_an_adapter_for_each_trade_off(vllm, accelerator, tmp_path, kind, temperature):
    base = language_model()
    config, sampler, answers = asking(
        vllm.url, tmp_path, accelerator, base, scope="lora-mixture", temperature=temperature
    )
    policy = disturbed(new_policy(base, config, ("first", "second"), kind, "first"))
    check_same_policy(policy, config, sampler, answers.of(f"{kind} first"))
    loaded = [body["lora_name"] for path, body in vllm.bodies if path == "/v1/load_lora_adapter"]
    assert len(loaded) == len(set(loaded)) == (2 if kind == "clp" else 1)
    assert not vllm.adapters and not list(tmp_path.iterdir())
    asked = [body for path, body in vllm.bodies if path == "/v1/completions" and body["model"] != "base"]
    assert {body["n"] for body in asked} == {2} and all(body["return_token_ids"] for body in asked)
    release(policy)


# ---------------------------------------------------------------- training


def trained(base, config, folder, source=None, steps=12):
    policy = new_policy(base, config, ("first", "second"), "clp")
    loss = make_loss(base, config, folder)
    loss.source = source
    prompts = PromptSource(parts(config)["train"], config, 2, trade_offs=2)
    seen = []

    def followed(model, batch, step):
        value, logs = loss(model, batch, step)
        seen.append({name: float(figure) for name, figure in logs.items()})
        return value, logs

    train(policy, prompts, followed, config.training())
    release(policy)
    return seen


@pytest.mark.parametrize(
    "options",
    [{}, {"kl_in": "loss", "importance_level": "token", "epochs": 2, "clip": 0.5, "learning_rate": 0.06}],
    ids=["answers", "tokens-epochs"],
)
def test_training_learns_what_it_learns_from_its_own_samples(mopl_server, accelerator, tmp_path, options):
    options = {
        "scope": "logits", "steps": 12, "prompts_per_step": 8, "samples_per_prompt": 4, "learning_rate": 0.04,
        "kl_weight": 0.01, **options,
    }  # fmt: skip
    base = language_model()
    alone = {name: value for name, value in options.items() if name != "importance_level"}  # which is about servers
    own = trained(base, settings(**alone), tmp_path / "own")
    config, _, answers = asking(mopl_server.url, mopl_server.api.policies.folder, accelerator, base, **options)
    found = trained(base, config, tmp_path / "served", answers.of("learning"))
    assert not {"importance", "truncated", "engine_kl"} & own[0].keys()
    for figures in found:
        assert figures["importance"] == pytest.approx(1, abs=1e-4) and figures["truncated"] == 0
        assert abs(figures["engine_kl"]) < 1e-6

    def mean(seen, rows):
        return sum(s["reward/first"] + s["reward/second"] for s in seen[rows]) / len(seen[rows])

    first, last = slice(0, 4), slice(-4, None)
    assert mean(own, last) > mean(own, first) + 0.1 and mean(found, last) > mean(found, first) + 0.1
    assert mean(found, last) == pytest.approx(mean(own, last), abs=0.12)


class Stale:
    """Answers of a policy as it was some steps ago."""

    def __init__(self, sampler, policy):
        self.sampler, self.policy, self.weighed = sampler, copy.deepcopy(policy), True

    def answer(self, policy, prompts, weights, kl_weight, batch):
        with torch.no_grad():
            answers = self.sampler.answer(self.policy, prompts, weights, kl_weight, batch)
            found, _ = self.sampler.score(
                self.policy.model, prompts, answers.tokens, self.policy.arguments(weights, kl_weight)
            )
        rows = [row[: len(tokens)].tolist() for row, tokens in zip(found, answers.tokens, strict=True)]
        return type(answers)(answers.tokens, answers.texts, token_log_probs=rows if self.weighed else None)


def test_a_stale_engine_is_weighed_and_one_of_another_model_stops_the_training(tmp_path):
    base = language_model()
    config = settings(scope="attention", importance_cap=1.2, rollout_server="http://there", rollout_folder="f")
    policy = new_policy(base, config, ("first", "second"), "clp")
    loss = make_loss(base, config, tmp_path)
    loss.source = Stale(loss.sampler, disturbed(disturbed(disturbed(copy.deepcopy(policy)))))
    with pytest.raises(PolicyCollapsed, match=r"rollout server http://there .*engine_kl_limit = 0\.1.*checkpoint"):
        loss(policy, batch_of(config), 0)
    loss.config = config = settings(
        scope="attention", importance_cap=1.2, engine_kl_limit=0.0, rollout_server="http://there", rollout_folder="f"
    )
    loss.guard.config = config
    gradients = []
    for weighed in (True, False):
        torch.manual_seed(0)
        policy.zero_grad()
        value, logs = loss(policy, batch_of(config), 0)
        value.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
        if weighed:
            assert logs["importance"] != 1 and 0 < logs["truncated"] < 1 and logs["engine_kl"] > 0.1
            loss.source.weighed = False
    assert not torch.allclose(*gradients, atol=1e-4), "without the weights it is another gradient"


# ---------------------------------------------------------------- what goes wrong


def without(answer, name):
    for choice in answer["choices"]:
        del choice[name]
    return answer


def spoilt(answer, act):
    act(answer["choices"])
    return answer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: without(a, "token_ids"), "no token_ids; use vLLM 0.10.2 or later"),
        (lambda a: without(a, "logprobs"), "no logprobs"),
        (lambda a: spoilt(a, lambda c: c.pop()), "1 answers of 2"),
        (lambda a: spoilt(a, lambda c: c[0]["logprobs"]["token_logprobs"].pop()), "log-probabilities for"),
        (lambda a: spoilt(a, lambda c: c[0].update(prompt_token_ids=[1])), "other tokens of the prompt"),
        (lambda a: spoilt(a, lambda c: c[0]["token_ids"].__setitem__(0, 9)), "are not those of its answer"),
        (lambda a: spoilt(a, lambda c: c[0]["logprobs"]["token_logprobs"].__setitem__(0, None)), "no log-probability"),
        (lambda a: spoilt(a, lambda c: c[0]["logprobs"]["token_logprobs"].__setitem__(0, -9999.0)), "no log-prob"),
        (lambda a: {"choices": "none"}, "not as OpenAI's"),
    ],
)
def test_answers_that_are_not_as_asked_for_are_refused(vllm, change, message):
    server = OpenAIServer(vllm.url, 5.0)
    server.connect()
    asked = {"answers": 2, "tokens": LENGTH, "temperature": 1.0, "seed": 1, "ends": [2], "stop": None}
    assert len(server.complete([1, 7], {"model": "base"}, **asked)) == 2
    vllm.change = change
    with pytest.raises(RolloutServerError, match=rf"{vllm.url[:-3]}: .*{message}.*can be resumed"):
        server.complete([1, 7], {"model": "base"}, **asked)


def cut_off(answer):
    for choice in answer["choices"]:
        choice["token_ids"], logs = [9], choice["logprobs"]
        logs["tokens"], logs["token_logprobs"] = ["token_id:9"], logs["token_logprobs"][:1]
    return answer


def test_an_answer_that_something_else_ended_is_refused(vllm, accelerator, tmp_path):
    base = language_model()
    config, sampler, answers = asking(vllm.url, tmp_path, accelerator, base, scope="lora-mixture")
    policy = new_policy(base, config, ("first", "second"), "clp")
    vllm.change = cut_off
    with pytest.raises(RolloutServerError, match=r"an answer of 1 tokens ends neither"):
        roll(policy, batch_of(config), sampler, make_rewards(), config, answers)
    vllm.change = lambda answer: answer
    vllm.unload_lora_adapter = lambda body: (200, "done")
    vllm.load_lora_adapter = lambda body: (200, "done")
    with pytest.raises(RolloutServerError, match=r"404: The model .* does not exist.*another training uses the server"):
        roll(policy, batch_of(config), sampler, make_rewards(), config, answers)
    release(policy)


def test_what_may_pass_is_tried_again_and_what_lasts_is_an_error(vllm, monkeypatch):
    server = OpenAIServer(vllm.url, 5.0)
    monkeypatch.setattr(server._broken, "wait", lambda seconds: None)
    server.connect()
    vllm.failures = [503, 429, 500]
    reply = {"answers": 1, "tokens": 2, "temperature": 1.0, "seed": 1, "ends": [2], "stop": None}
    assert server.complete([1, 7], {"model": "base"}, **reply)
    assert len(vllm.bodies) == 4
    vllm.failures = [500] * 9
    with pytest.raises(RolloutServerError, match=r"answered /v1/completions with 500: as told"):
        server.complete([1, 7], {"model": "base"}, **reply)
    assert len(vllm.failures) == 3
    with pytest.raises(RolloutServerError, match="500: as told"):
        server.complete([1, 7], {"model": "base"}, **reply)
    server.begin()
    vllm.failures = [401]
    with pytest.raises(RolloutServerError, match=r"401.*put its key into MOPL_API_KEY"):
        server.complete([1, 7], {"model": "base"}, **reply)


def test_a_server_that_is_not_there_or_another_one_is_named(vllm, accelerator, tmp_path):
    with pytest.raises(
        RolloutServerError, match=r"http://127\.0\.0\.1:9: it cannot be reached.*rollout_timeout = 0\.3"
    ):
        OpenAIServer("http://127.0.0.1:9/v1", 0.3).connect()
    with pytest.raises(RolloutServerError, match="give an address such as"):
        OpenAIServer("127.0.0.1:9", 0.3).connect()
    vllm.owner = "sglang"
    with pytest.raises(RolloutServerError, match="owned by sglang"):
        OpenAIServer(vllm.url, 5.0).connect()
    vllm.owner = "vllm"
    base = language_model()
    with pytest.raises(ValueError, match="is vLLM, which takes LoRA adapters, but scope 'attention'"):
        asking(vllm.url, tmp_path, accelerator, base, scope="attention")
    with pytest.raises(ValueError, match="lora_dora changes more than that"):
        asking(vllm.url, tmp_path, accelerator, base, scope="lora-mixture", lora_dora=True)


def test_log_probabilities_of_another_temperature_are_found_out(accelerator, tmp_path):
    with imitating(processed=False) as server:
        asking(server.url, tmp_path, accelerator, language_model(), scope="lora-mixture")
        with pytest.raises(RolloutServerError, match=r"samples at 0\.9; start vLLM with --logprobs-mode processed"):
            asking(server.url, tmp_path, accelerator, language_model(), scope="lora-mixture", temperature=0.9)


def test_a_policy_is_loaded_from_inside_of_the_folder_alone_and_a_name_that_is_gone_is_said(mopl_server, tmp_path):
    def load(name, path):
        return mopl_server.http.post("/v1/load_policy", json={"name": name, "path": path})

    assert load("p", "../elsewhere").status_code == 403 and load("p", str(tmp_path)).status_code == 403
    assert load("p", "nothing").status_code == 404 and "one folder" in load("p", "nothing").text
    assert load("a@b", "nothing").status_code == 400
    broken, before = mopl_server.api.policies.folder / "broken", mopl_server.engine.served
    broken.mkdir()
    (broken / "mopl.json").write_text("{")
    assert load("p", "broken").status_code == 400 and mopl_server.engine.served is before
    body = {"model": before.name, "prompt": [1, 7], "max_tokens": 2, "return_token_ids": True, "logprobs": 0}
    found = mopl_server.http.post("/v1/completions", json=body)
    assert found.status_code == 200, "after a failure what was there before answers"
    choice = found.json()["choices"][0]
    assert len(choice["token_ids"]) == len(choice["logprobs"]["token_logprobs"]) and choice["prompt_token_ids"] == [
        1,
        7,
    ]
    assert mopl_server.http.post("/v1/completions", json=body | {"model": "p"}).status_code == 404
    mopl_server.api.policies, kept = None, mopl_server.api.policies
    assert load("p", "broken").status_code == 404
    mopl_server.api.policies = kept
    (broken / "mopl.json").unlink()
    broken.rmdir()


def test_processed_log_probabilities_are_of_what_is_drawn_from(mopl_server):
    body = {"prompt": [1, 7], "max_tokens": 1, "logprobs": 5, "seed": 3, "temperature": 0.5, "top_k": 3, "n": 8}
    asked = body | {"logprobs_mode": "processed_logprobs", "return_token_ids": True}
    for choice in mopl_server.http.post("/v1/completions", json=asked).json()["choices"]:
        top = choice["logprobs"]["top_logprobs"][0]
        assert sum(math.exp(value) for value in top.values() if value > -9000) == pytest.approx(1)
    assert mopl_server.http.post("/v1/completions", json=asked | {"temperature": 0}).status_code == 400
    assert mopl_server.http.post("/v1/completions", json=asked | {"stream": True}).status_code == 400
    assert mopl_server.http.post("/v1/completions", json=asked | {"stop_token_ids": [999]}).status_code == 400
