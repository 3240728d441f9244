"""Runs whose answers come from `mopl serve` in a process of its own, which may die; and two processes that ask it."""

import dataclasses
import json
import os
import re
import signal
import time

import pytest
import torch
from launching import DISTRIBUTED, launch, started
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

from clp_problems import LENGTH, PROMPTS, language_model, make_rewards, settings, share
from served_models import running
from tiny_language_models import build, tokenizer

from mopl.cli import main
from mopl.clp import ClpConfig, train_policies
from mopl.clp.rollout_server import RolloutServerError
from mopl.language_models.tokenization import ListTokenizer
from mopl.rewards import FunctionReward, Rewards
from mopl.serving.policies import PolicyFolder
from mopl.training import CheckpointFolder


def address(out) -> str:
    """Where the server is, once it says so."""
    end, where = time.monotonic() + 60, r"model at (http://\S+), and the policies of"
    while not (out.exists() and (found := re.search(where, out.read_text()))):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found[1]


def quiet(text: str) -> None:
    pass


@pytest.mark.slow
def test_a_run_whose_server_dies_is_resumed_with_another_as_if_it_had_not(tmp_path):
    build(initializer_range=0.1).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "policies").mkdir()
    command = ("-m", "mopl.cli", "serve", str(tmp_path / "model"), "--policies", str(tmp_path / "policies"))

    def config(url: str, seconds: float = 60.0) -> ClpConfig:
        made = settings(
            scope="lora-mixture", steps=4, checkpoint_every=1, rollout_server=url, rollout_timeout=seconds,
            rollout_folder=str(tmp_path / "policies"),
        )  # fmt: skip
        return dataclasses.replace(made, model=str(tmp_path / "model"), data=str(tmp_path / "prompts.txt"))

    with started(*command, "--port", "0", "--quiet") as (number, out, _, wait):
        url, calls = address(out), 0

        def first(texts, prompts):
            nonlocal calls
            calls += 1
            if calls == 4:  # 1 judges the untrained model, 2 its held-out answers, then one a step
                os.kill(number, signal.SIGKILL)
                wait(10)
            return share(0, 20, "first")(texts, prompts)

        dying = Rewards([FunctionReward(first, "first", cacheable=False), share(20, 40, "second")], batch_size=10**6)
        with pytest.raises(RolloutServerError, match=rf"server {url}: it cannot be reached.*timeout = 4 seconds"):
            train_policies(config(url, 4.0), tmp_path / "run", rewards=dying, say=quiet)
    stopped = CheckpointFolder(tmp_path / "run" / "model" / "checkpoints").latest()
    assert stopped is not None and stopped.step == 2
    with started(*command, "--port", "0", "--quiet") as (_, out, _, _):
        url = address(out)
        train_policies(config(url), tmp_path / "run", resume=True, rewards=make_rewards(), say=quiet)
        train_policies(config(url), tmp_path / "whole", rewards=make_rewards(), say=quiet)
    runs = [tmp_path / name for name in ("run", "whole")]
    logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in runs]
    for one, other in zip(*logs, strict=True):
        assert one["importance"] == pytest.approx(1, abs=1e-4) and one["truncated"] == 0
        assert one["kl"] == pytest.approx(other["kl"], abs=1e-4) and one["tokens"] == other["tokens"]
    files = [sorted((run / "model").rglob("*.safetensors")) for run in runs]
    for one, other in zip(*files, strict=True):
        # Engines gather requests in batches of chance, whose sums differ in their last digits.
        assert all(torch.allclose(a, load_file(other)[name], atol=1e-4) for name, a in load_file(one).items())
    assert not list((tmp_path / "policies").iterdir())


@pytest.mark.slow
def test_a_run_is_resumed_with_a_server_if_it_began_with_one_and_needs_none_once_it_is_trained(tmp_path):
    build(initializer_range=0.1).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    encoder = ListTokenizer(tokenizer(), max_length=None, append_eos=False)

    def config(url: str | None, **options) -> ClpConfig:
        if url is not None:
            given = {"rollout_server": url, "rollout_folder": str(tmp_path / "policies"), "rollout_timeout": 20.0}
            options = {**given, **options}
        made = settings(scope="lora-mixture", steps=1, method="rewarded-soups", eval_prompts=2, **options)
        return dataclasses.replace(made, model=str(tmp_path / "model"), data=str(tmp_path / "prompts.txt"))

    def go(url: str | None, name: str, *, resume: bool = False, **options) -> None:
        train_policies(config(url, **options), tmp_path / name, resume=resume, rewards=make_rewards(), say=quiet)

    policies = PolicyFolder(tmp_path / "policies", language_model(), encoder, name="base")
    with running(policies.plain, max_tokens=LENGTH) as server:
        server.api.policies = policies
        go(server.url, "served")
        go(None, "alone")
        with pytest.raises(ValueError, match=r"served was started with a rollout server, .*; pass rollout_server and"):
            go(None, "served", resume=True)
        with pytest.raises(ValueError, match=r"alone was started without a rollout server, .*; leave rollout_server"):
            go(server.url, "alone", resume=True)
        (tmp_path / "served" / "front.json").unlink()  # trained, and to be evaluated again
        went = server.url
    go(went, "served", resume=True)
    go("http://127.0.0.1:9", "served", resume=True)
    for name in ("front.json", "models/expert-second/training.json"):
        (tmp_path / "served" / name).unlink()
    with pytest.raises(RolloutServerError, match=r"127\.0\.0\.1:9: it cannot be reached.*nothing was changed by that"):
        go("http://127.0.0.1:9", "served", resume=True, rollout_timeout=0.3)


@pytest.mark.distributed
@pytest.mark.slow
def test_each_of_two_processes_asks_for_its_own_part(tmp_path):
    (tmp_path / "policies").mkdir()
    encoder = ListTokenizer(tokenizer(), max_length=None, append_eos=False)
    policies = PolicyFolder(tmp_path / "policies", language_model(), encoder, name="base")
    with running(policies.plain) as server:
        server.api.policies = policies
        script = str(DISTRIBUTED / "server_rollouts.py")
        found = launch(2, script, server.url, str(tmp_path / "policies"), str(tmp_path / "out"))
    assert found.returncode == 0, found.stderr
    assert "both processes have one policy" in found.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "bfloat16"], "dtype is of the model of --policies"),
        (["--policies", "p", "--weights", "0.5", "0.5"], "weights is about one tuned model"),
        (["--policies", "p", "--kl-weight", "0.5"], "kl-weight is about one tuned model"),
    ],
)
def test_options_of_one_model_and_of_policies_do_not_go_together(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert main(["serve", "model", *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rollout-server", "http://127.0.0.1:9"], "there is no --rollout-folder"),
        (["--rollout-server", "http://127.0.0.1:9", "--rollout-folder", "f", "--rollout-timeout", "0.2"],
         "the rollout server http://127.0.0.1:9: it cannot be reached"),
        (["--rollout-server", "http://me:hidden@127.0.0.1:9", "--rollout-folder", "f"],
         "--rollout-server has an @, a ? or a #"),
        (["--rollout-folder", "f"], "there is no --rollout-server"),
        (["--importance-cap", "0.5"], "--importance-cap is 0.5 but must be at least 1"),
    ],
)  # fmt: skip
def test_mistakes_leave_no_run_and_say_what_to_change(tmp_path, monkeypatch, capsys, options, message):
    build(initializer_range=0.1).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    monkeypatch.chdir(tmp_path)
    given = ["clp", "--model", "model", "--data", "prompts.txt", "--rewards", "brevity", "--scope", "logits"]
    assert main([*given, "--device", "cpu", "--max-new-tokens", str(LENGTH), "--run", "run", *options]) == 2
    said = capsys.readouterr().err
    assert message in said and "hidden" not in said
    assert not (tmp_path / "run" / "config.json").exists()
