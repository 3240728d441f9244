"""`mopl serve`: an endpoint of OpenAI's form that answers each request at a trade-off of its own."""

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mopl._records import read_text
from mopl._terminal import say, shell
from mopl.commands.tuned_model import TunedModel, add_model_command, load_reference, load_tuned_model

KEY_VARIABLE = "MOPL_API_KEY"
EXAMPLES = f"""
The server is for development and small teams: one process, one model, requests answered in batches. Requests are those
of OpenAI's API, with `weights`, `scale` and `beta` in addition; the model name NAME@0.7,0.3 stands for weights, too.

The server listens on this machine only. To let others in, put a key into the environment variable {KEY_VARIABLE} or a
file. The connection is not encrypted: put a proxy with TLS in front of it where others could listen.

examples:
  on port 8000:
    mopl serve RUN
  default weights, and any free port:
    mopl serve RUN --weights 0.7 0.3 --port 0
  for other machines, with a key:
    {KEY_VARIABLE}=... mopl serve RUN --host 0.0.0.0
"""


def add_parser(commands: Any) -> None:
    """Add `mopl serve` to the commands."""
    help = "serve a tuned model through OpenAI's API, a trade-off per request"
    default = "all equal; those of a request come first; needed where RUN has a model for each trade-off"
    parser = add_model_command(commands, "serve", run, help, EXAMPLES, without_weights=default)
    for name, default, metavar, text in (
        ("--host", "127.0.0.1", "HOST", "address to listen at"),
        ("--port", 8000, "PORT", "port; 0 takes any that is free"),
        ("--max-batch", 16, "N", "maximum number of answers that run together"),
        ("--max-batch-tokens", 65536, "N", "maximum number of tokens of these, prompts and answers with their padding"),
        ("--max-queue", 256, "N", "maximum number of answers that wait; more are refused"),
        ("--max-tokens", 512, "N", "maximum number of tokens of an answer"),
        ("--timeout", 300.0, "SECONDS", "how long a request may take, with the time that it waits"),
        ("--grace", 30.0, "SECONDS", "how long answers may go on once the server is stopped"),
    ):
        parser.add_argument(name, type=type(default), default=default, metavar=metavar,
                            help=f"{text} (default: {default:g})" if name != "--host"
                            else f"{text} (default: {default})")  # fmt: skip
    parser.add_argument("--guided-model", metavar="MODEL", help="a larger model of the same tokenizer, by directory or "
                        "hub name, that answers in the place of RUN's model, guided by what that learned")  # fmt: skip
    parser.add_argument("--policies", metavar="FOLDER", help="serve the policies that mopl clp --rollout-server writes "
                        "into this folder; RUN is then the model that it trains, a directory or hub name")  # fmt: skip
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="data type of the model of "
                        "--policies (default: auto, as it is stored)")  # fmt: skip
    parser.add_argument("--name", help="the model name in requests (default: the name of RUN's folder)")
    parser.add_argument("--api-key-file", metavar="FILE", help="file with the key that requests must bear (default: "
                        f"what {KEY_VARIABLE} holds, if it is set)")  # fmt: skip
    parser.add_argument("--no-key", action="store_true", help="listen beyond this machine without a key: everyone who "
                        "reaches the port may ask")  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Run `mopl serve`."""
    for name in ("max_batch", "max_batch_tokens", "max_queue", "max_tokens"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name} is {getattr(arguments, name)} but must be at least 1")
    for name, least in (("timeout", 0.001), ("grace", 0.0)):
        if not least <= getattr(arguments, name) < 1e9:
            must = f"at least {least:g} and below 1e9, in seconds"
            raise ValueError(f"{name} is {getattr(arguments, name):g} but must be {must}")
    if not 0 <= arguments.port < 65536:
        raise ValueError(f"port is {arguments.port} but must be from 0 to 65535")
    name = arguments.name or Path(arguments.run).resolve().name
    if "@" in name:
        raise ValueError(f"name is {name!r} but what follows an @ are weights; pass --name without one")
    if arguments.dtype is not None and arguments.policies is None:
        raise ValueError("dtype is of the model of --policies; a tuned model is served as it was trained; leave it out")
    if arguments.policies is not None:
        for option in ("weights", "beta", "method", "kl_weight", "base_model", "guided_model"):
            if getattr(arguments, option) is not None:
                raise ValueError(f"{option} is about one tuned model, but policies come and go; leave one of them out")
    key = _key(arguments.api_key_file)
    import torch

    from mopl.serving.api import Api
    from mopl.serving.engine import Engine
    from mopl.serving.requests import Limits
    from mopl.serving.server import Server, bound_socket, is_local, url_of

    with bound_socket(arguments.host, arguments.port) as at:
        local = is_local(at)
        if not local and key is None and not arguments.no_key:
            raise ValueError(
                f"--host {arguments.host} is reached from other machines, so requests need a key: put one into "
                f"{KEY_VARIABLE} or name a file by --api-key-file (--no-key lets everyone ask)"
            )
        if sys.stderr.isatty():
            say(f"mopl serve: loading {arguments.run} ...", file=sys.stderr)
        device = "cuda" if arguments.device == "auto" and torch.cuda.is_available() else "cpu"
        with _stopped_by_a_signal():
            policies = None if arguments.policies is None else _policies(arguments, name, device)
            served = (
                _served(load_tuned_model(arguments, device, merge=False), arguments, name, device)
                if policies is None
                else policies.plain
            )
        sizes = {name: getattr(arguments, name) for name in ("max_batch", "max_batch_tokens", "max_queue")}
        engine = Engine(served, **sizes)
        api = Api(
            engine, Limits(arguments.max_tokens, arguments.max_queue), arguments.timeout, key,
            any_host=not local, log=not arguments.quiet, policies=policies,
        )  # fmt: skip
        url = url_of(at)

        def started() -> None:
            if policies is not None:
                say(f"mopl serve: {name} at {url}, and the policies of {policies.folder}; Ctrl-C stops it")
                return
            _tell(url, served, key is not None, arguments.guided_model)

        def stopping(left: int) -> None:
            if left:
                then = f"{left} answers have {arguments.grace:g} seconds to end; another signal gives them up"
                say(f"mopl serve: stopping, {then}", file=sys.stderr)

        Server(api, at, grace=arguments.grace, started=started, stopping=stopping).run()
    say("mopl serve: stopped", file=sys.stderr)


@contextlib.contextmanager
def _stopped_by_a_signal() -> Iterator[None]:
    """End the command with a word and status 0, as the server does, if SIGTERM comes while the model is loaded."""

    def stop(*_: object) -> None:
        say("mopl serve: stopped before the model was loaded", file=sys.stderr)
        raise SystemExit(0)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _policies(arguments: argparse.Namespace, name: str, device: str) -> Any:
    """Return the base model of a training, and where its policies come from."""
    from mopl.language_models import models
    from mopl.language_models.tokenization import ListTokenizer
    from mopl.serving.policies import PolicyFolder

    encoder = ListTokenizer(models.load_tokenizer(arguments.run), max_length=None, append_eos=False)
    base = models.load_causal_lm(arguments.run, dtype=arguments.dtype or "auto").to(device)
    return PolicyFolder(arguments.policies, base, encoder, name=name)


def _served(tuned: TunedModel, arguments: argparse.Namespace, name: str, device: str) -> Any:
    from mopl.language_models import models
    from mopl.language_models.guiding import check_same_tokenizer
    from mopl.serving.model import ServedModel

    large = None
    if arguments.guided_model is not None:
        other = models.load_tokenizer(arguments.guided_model)
        check_same_tokenizer(tuned.tokenizer.tokenizer, other, f"the tokenizer of {arguments.guided_model}")
        large = models.load_causal_lm(arguments.guided_model).to(device)
    return ServedModel(
        tuned.model, tuned.tokenizer, tuned.objectives, name=name, weights=arguments.weights,
        beta=arguments.beta or tuned.beta, text_prompt=tuned.text_prompt, reference=load_reference(tuned, device),
        guided_model=large, kl_weight=tuned.kl_weight, takes_weights=tuned.takes_weights, fixed=tuned.fixed,
    )  # fmt: skip


def _key(file: str | None) -> str | None:
    """Return the key that requests must bear: never an option, which every process of a machine can read."""
    key = os.environ.get(KEY_VARIABLE) if file is None else read_text(file, most=1 << 16, remedy="write the key there")
    if key is None:
        return None
    key = key.strip()
    if not (key.isascii() and key.isprintable() and key and " " not in key):
        source = KEY_VARIABLE if file is None else file
        raise ValueError(f"the key in {source} must be visible ASCII characters without spaces, one at least")
    return key


def _tell(url: str, served: Any, has_key: bool, guided: str | None) -> None:
    """Print where the server is, and a request."""
    weights = ", ".join(f"{name} {w:g}" for name, w in zip(served.objectives, served.weights, strict=True))
    weights += "" if served.kl_weight is None else f"; KL weight {served.kl_weight:g}"
    guides = "" if guided is None else f", where {guided} answers, guided by it"
    say(f"mopl serve: {served.name} at {url}{guides} (default weights: {weights}); Ctrl-C stops it")
    chat = served.chat.encoder.chat
    ask: Any = {"messages": [{"role": "user", "content": "Hello"}]} if chat else {"prompt": "Hello"}
    ask["weights"] = [round(w, 6) for w in served.weights]
    if served.takes_beta and served.beta is None:  # then each request must say it
        ask["beta"] = [round(1 / len(served.objectives), 6)] * len(served.objectives)
    path = "chat/completions" if chat else "completions"
    bearer = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if has_key else ""
    say(f"{shell('curl', f'{url}/v1/{path}', '-H', 'Content-Type: application/json', '-d', json.dumps(ask))}{bearer}")
