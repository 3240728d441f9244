"""Settings that do not fit a server show before the training; a rollout ends at once, and leaves nothing behind."""

import asyncio
import contextlib
import os
import threading
import time

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

from clp_problems import disturbed, language_model, make_rewards, parts, settings
from served_models import Running
from tiny_language_models import tokenizer
from vllm_imitation import imitating

from mopl.clp import bounded_http
from mopl.clp.policies import new_policy, release
from mopl.clp.prompts import PromptSource
from mopl.clp.rollout import Sampler, roll
from mopl.clp.rollout_folder import MARKER, policy_name, remove_leftovers, written
from mopl.clp.rollout_server import OpenAIServer, RolloutServerError
from mopl.clp.server_rollouts import ServerAnswers
from mopl.language_models.tokenization import ListTokenizer
from mopl.serving.policies import PolicyFolder
from mopl.training import make_accelerator

NAMES = ("first", "second")
MARK = "0123abcd"


@pytest.fixture
def vllm():
    with imitating() as server:
        yield server


def serving(folder, **limits):
    encoder = ListTokenizer(tokenizer(), max_length=None, append_eos=False)
    policies = PolicyFolder(folder, language_model(), encoder, name="base")
    server = Running(policies.plain, **limits)
    server.api.policies = policies
    return server


def answers_of(url, folder, base, seconds=20.0, **options):
    options = {"scope": "lora-mixture", **options}
    config = settings(rollout_server=url, rollout_folder=str(folder), rollout_timeout=seconds, **options)
    sampler = Sampler(base, tokenizer(), config)
    return config, sampler, ServerAnswers(config, sampler, make_accelerator(cpu=True))


def check(answers, base, kinds=("clp",), prompt=(1, 7, 8)):
    @contextlib.contextmanager
    def untrained(kind):
        policy = new_policy(base, answers.config, NAMES, kind, "first")
        try:
            yield policy
        finally:
            release(policy)

    answers.check([lambda kind=kind: untrained(kind) for kind in kinds], prompt)


def rolled(answers, config, sampler, policy):
    batch = PromptSource(parts(config)["train"], config, 2, trade_offs=2)(0)
    return roll(policy, batch, sampler, make_rewards(), config, answers)


# ---------------------------------------------------------------- before the training


@pytest.mark.parametrize("scope", ["logits", "lora-mixture", "hyper-prompt"])
def test_a_server_is_asked_for_one_token_at_the_limits_of_the_run(tmp_path, scope):
    base = language_model()
    server = serving(tmp_path)
    try:
        seen, answered = [], server.engine.submit

        def submit(rows, served=None):
            seen.extend(rows)
            return answered(rows, served)

        server.engine.submit = submit
        _, _, answers = answers_of(server.url, tmp_path, base, scope=scope, temperature=1.9, method="clp-all")
        state = torch.get_rng_state()
        check(answers, base, ("clp", "expert", "prompting"))
        assert torch.equal(torch.get_rng_state(), state)
        assert len(seen) == 3 * answers.config.samples_per_prompt
        for row in seen:
            assert len(row.tokens) == 1 and row.max_tokens == answers.config.max_new_tokens
            assert row.sampling.temperature == 1.9
        assert not list(tmp_path.iterdir())
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("options", "limits", "message"),
    [
        ({"max_new_tokens": 40}, {}, r"max_tokens.* 32.*start it with a limit of at least the run's max_new_tokens"),
        ({"temperature": 2.5}, {}, r"temperature is 2\.5 but .*change the setting of this run that it names"),
        ({"samples_per_prompt": 9}, {"max_queue": 4}, r"asks for 9 answers but 4 can wait"),
        ({"rollout_folder": "elsewhere"}, {}, r"no mopl\.json .*with the rollout_folder of this run"),
        ({"policies": None}, {}, r"loads no policies.*start `mopl serve MODEL --policies FOLDER`"),
    ],
)
def test_settings_that_do_not_fit_a_server_of_mopl_show_at_once(tmp_path, options, limits, message):
    base, options = language_model(), dict(options)
    server = serving(tmp_path / "policies", **limits)
    try:
        if "policies" in options:
            server.api.policies = options.pop("policies")
        folder = tmp_path / options.pop("rollout_folder", "policies")
        _, _, answers = answers_of(server.url, folder, base, **options)
        with pytest.raises(RolloutServerError, match=message) as refused:
            check(answers, base)
        assert "nothing was changed by that" in str(refused.value) and "checkpoint" not in str(refused.value)
        assert folder.exists() == (folder.name == "policies") and not list(tmp_path.glob("*/*"))
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("path", "reply", "message"),
    [
        ("load_lora_adapter", (404, {"detail": "Not Found"}), "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
        ("load_lora_adapter", (400, {"error": {"message": "rank 4 is greater than max_lora_rank 2"}}),
         "max_lora_rank 2; .*--max-lora-rank of all adapters together"),
        ("load_lora_adapter", (404, {"error": {"message": "No adapter found"}}), "a rollout_folder that it sees"),
        ("completions", (400, {"error": {"message": "max_tokens must be at most 3"}}), "vLLM --max-model-len"),
        ("completions", (302, {"error": "elsewhere"}), "302.*it sends to another address"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_vllm_show_at_once(vllm, tmp_path, path, reply, message):
    base = language_model()
    setattr(vllm, path, lambda body: reply)
    _, _, answers = answers_of(vllm.url, tmp_path, base)
    with pytest.raises(RolloutServerError, match=message):
        check(answers, base)
    assert not list(tmp_path.iterdir()) and not vllm.adapters


@pytest.mark.parametrize("missing", ["token_ids", "logprobs"])
def test_what_vllm_leaves_out_shows_at_once(vllm, tmp_path, missing):
    base = language_model()

    def without(answer):
        for choice in answer["choices"]:
            del choice[missing]
        return answer

    _, _, answers = answers_of(vllm.url, tmp_path, base)
    check(answers, base)
    asked = [body for path, body in vllm.bodies if path == "/v1/completions"]
    assert len(asked) == 1 and asked[0]["max_tokens"] == 6 and asked[0]["n"] == 2
    assert not vllm.adapters
    vllm.change = without
    with pytest.raises(RolloutServerError, match=f"no {missing}"):
        check(answers, base)
    assert not vllm.adapters


# ---------------------------------------------------------------- what is left behind


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, RolloutServerError])
def test_adapters_are_unloaded_whatever_ends_a_rollout(vllm, tmp_path, monkeypatch, error):
    base = language_model()
    config, sampler, answers = answers_of(vllm.url, tmp_path, base)
    check(answers, base)
    policy = disturbed(new_policy(base, config, NAMES, "clp"))

    def fail(requests, seeds):
        assert len(vllm.adapters) == 2
        raise error("in between")

    monkeypatch.setattr(answers, "_answers", fail)
    with pytest.raises(error, match="in between"):
        rolled(answers, config, sampler, policy)
    assert not vllm.adapters and not list(tmp_path.iterdir())
    monkeypatch.undo()
    # The second of two cannot be loaded.
    load, calls = vllm.load_lora_adapter, []
    vllm.load_lora_adapter = lambda body: load(body) if calls.append(body) or len(calls) < 2 else (400, {"error": "no"})
    with pytest.raises(RolloutServerError, match="400: no"):
        rolled(answers, config, sampler, policy)
    assert not vllm.adapters and not list(tmp_path.iterdir())
    vllm.load_lora_adapter = load
    assert rolled(answers, config, sampler, policy).sampled is not None, "and the next rollout goes well"
    release(policy)


def leave(folder, name):
    """What a trainer leaves that was killed: nobody holds it."""
    with written(folder / name, lambda path: (path / "tensors").write_text("x")):
        (folder / name).rename(folder / "kept")
    (folder / "kept").rename(folder / name)
    return folder / name


def test_leftovers_of_killed_trainers_are_removed_and_nothing_else(tmp_path):
    folder, foreign = tmp_path / "policies", tmp_path / "foreign"
    folder.mkdir()
    names = [policy_name("expert a/b", 3, 1, number, MARK) for number in range(9)]
    dead = leave(folder, names[0])
    half = folder / f".writing-{'0' * 16}-{names[1]}"
    half.mkdir()
    kept = [half.with_name(f".writing-{'0' * 16}-other"), folder / "results", folder / names[2], folder / names[3]]
    for path in kept:
        path.mkdir()
    (kept[-1] / MARKER).write_text("another text")
    target = leave(tmp_path, names[4])
    target.rename(foreign)
    (folder / names[4]).symlink_to(foreign)  # marked, but behind a link
    (folder / names[5]).mkdir()
    (folder / names[5] / MARKER).symlink_to(foreign / MARKER)
    (folder / names[6]).write_text("a file")
    os.mkfifo(kept[2] / MARKER)
    (dead / "link").symlink_to(foreign)
    with written(folder / names[7], lambda path: None):  # by a trainer that lives
        assert remove_leftovers(folder) == [names[0]]
        assert (folder / names[7] / MARKER).is_file()
    assert not dead.exists() and not half.exists() and not (folder / names[7]).exists()
    assert (foreign / "tensors").read_text() == "x" and all(path.is_dir() for path in kept)
    assert (folder / names[4]).is_symlink() and (folder / names[5]).is_dir() and (folder / names[6]).is_file()
    assert remove_leftovers(folder) == [] and remove_leftovers(tmp_path / "nowhere") == []


def test_the_next_trainer_removes_what_a_killed_one_left_also_from_vllm(vllm, tmp_path):
    base = language_model()
    left = leave(tmp_path, policy_name("clp", 4, 0, 7, MARK))
    vllm.adapters[left.name] = None
    _, _, answers = answers_of(vllm.url, tmp_path, base)
    check(answers, base)
    assert not vllm.adapters and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- at once


@pytest.fixture
def hanging(vllm):
    """A server that answers nothing from when `hangs` is set, until the end of the test."""
    hangs, ended, asked = threading.Event(), threading.Event(), threading.Event()
    answer = vllm.completions

    def completions(body):
        if hangs.is_set():
            vllm._lock.release()
            try:
                asked.set()
                assert ended.wait(60)
            finally:
                vllm._lock.acquire()
        return answer(body)

    vllm.completions, vllm.hangs, vllm.asked = completions, hangs, asked
    yield vllm
    ended.set()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_a_rollout_that_waits_for_a_server_that_hangs_can_be_interrupted(hanging, tmp_path, monkeypatch, error):
    from mopl.clp import server_rollouts

    base = language_model()
    config, sampler, answers = answers_of(hanging.url, tmp_path, base, seconds=60.0)
    check(answers, base)
    policy = disturbed(new_policy(base, config, NAMES, "clp"))
    hanging.hangs.set()
    before = set(threading.enumerate())  # other tests of the process may have left some

    def interrupted(tasks, return_when):
        assert hanging.asked.wait(20)
        raise error

    monkeypatch.setattr(server_rollouts, "wait", interrupted)
    began = time.monotonic()
    with pytest.raises(error):
        rolled(answers, config, sampler, policy)
    assert time.monotonic() - began < 20
    left = [each for each in set(threading.enumerate()) - before if "ThreadPool" in each.name]
    assert not left, "no thread holds the process"
    assert not hanging.adapters and not list(tmp_path.iterdir())
    release(policy)


def test_one_request_that_fails_ends_those_that_hang_and_its_error_is_told(vllm, tmp_path):
    base = language_model()
    config, sampler, answers = answers_of(vllm.url, tmp_path, base, seconds=60.0)
    check(answers, base)
    policy = disturbed(new_policy(base, config, NAMES, "clp"))
    ended, number = threading.Event(), iter(range(9))

    def completions(body):
        if next(number) == 1:
            return 400, {"error": {"message": "the second is refused"}}
        vllm._lock.release()
        ended.wait(60)
        vllm._lock.acquire()
        return 500, "late"

    answer, vllm.completions = vllm.completions, completions
    began = time.monotonic()
    with pytest.raises(RolloutServerError, match="the second is refused"):
        rolled(answers, config, sampler, policy)
    assert time.monotonic() - began < 20 and not vllm.adapters
    ended.set()
    vllm.completions = answer
    assert rolled(answers, config, sampler, policy).sampled is not None
    release(policy)


def test_what_was_given_up_is_asked_again_only_after_begin(vllm):
    server = OpenAIServer(vllm.url, 5.0)
    server.give_up()
    with pytest.raises(RolloutServerError, match="a request was given up"):
        server.connect()
    assert not vllm.bodies
    server.begin()
    server.connect()


@pytest.mark.parametrize("name", ["asyncio", "futures", "own"])
def test_a_time_that_is_up_is_one_error_in_every_version_of_python(monkeypatch, name):
    class Late(Exception):  # of asyncio, and of concurrent.futures, before Python 3.11: neither is Python's own
        pass

    async def late(work, seconds):
        work.close()
        raise TimeoutError if name == "own" else Late

    if name == "own":
        monkeypatch.setattr(bounded_http.asyncio, "TimeoutError", TimeoutError)
    else:
        monkeypatch.setattr(bounded_http.asyncio if name == "asyncio" else bounded_http.futures, "TimeoutError", Late)
    monkeypatch.setattr(asyncio, "wait_for", late)
    with pytest.raises(TimeoutError, match="no answer came in time"):
        bounded_http.BoundedClient({}).request("GET", "http://127.0.0.1:9", None, 1.0, 10)
