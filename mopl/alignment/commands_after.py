"""`mopl generate` and `mopl export`: what a finished alignment run is for. Nothing heavy is imported before."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mopl._lines import texts_of_arguments
from mopl._terminal import json_line, say, shell

METHODS = ("weight-cos-dpo", "temperature-cos-dpo", "dpo-ls", "dpo-soup", "mo-dpo", "clp", "rewarded-soups",
           "prompting")  # fmt: skip
RUN_HELP = "directory of a finished run of mopl align, or a model that takes weights (HyperPromptModel, LoraMixture)"

GENERATE_HELP = "answer prompts at any trade-off, and at any distance from the reference, without training"
GENERATE_EXAMPLES = """
examples:
  mopl generate RUN --weights 0.7 0.3 "How do I make tea?"
  mopl generate RUN --weights 0.7 0.3 --scale 2 "How do I make tea?"        closer to the model before training
  mopl generate RUN --weights 0.7 0.3 --scale 2 --candidates 8 "Hello"      eight samples, re-ranked exactly
  mopl generate RUN --weights 0.7 0.3 --temperature 0.8 --top-p 0.9 --seed 1 "First prompt" "Second prompt"
  echo "How do I make tea?" | mopl generate RUN --weights 0.7 0.3 -
"""
SCALE_HELP = (
    "c > 0: above 1 closer to the reference, below 1 beyond the tuned model (default: 1). It is exact on whole "
    "responses, by which --candidates are re-ranked, and approximate per token, by which responses are generated"
)

EXPORT_HELP = "write the model of one trade-off as a plain directory that transformers and vLLM load"
EXPORT_EXAMPLES = """
The virtual tokens of the prompt become tokens of the vocabulary that the tokenizer puts in front by itself.
transformers never generates them (suppress_tokens). vLLM does not read that: there greedy decoding cannot take them,
samples practically never do, and logit_bias rules them out; mopl.json lists their ids.

examples:
  mopl export RUN --weights 0.7 0.3 exported/helpful
  mopl export RUN --method dpo-soup --weights 0.5 0.5 exported/soup
  vllm serve exported/helpful
"""


class _Parsing:
    """Lets positional arguments follow `--weights 0.7 0.3`: such an option takes numbers only."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser, self.parse = parser, parser.parse_known_args

    def __call__(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Parse after sorting options to the front."""
        options, positionals, rest = [], [], list(sys.argv[1:] if args is None else args)
        while rest:
            argument = rest.pop(0)
            if argument == "--":
                positionals += rest
                break
            if argument == "-" or not argument.startswith("-"):
                positionals.append(argument)
                continue
            options.append(argument)
            action = self.parser._option_string_actions.get(argument)
            if action is None or action.nargs == 0:  # a flag, --option=value, or an unknown one
                continue
            if action.nargs == "+":
                while rest and _is_number(rest[0]):
                    options.append(rest.pop(0))
            elif rest:
                options.append(rest.pop(0))
        return self.parse([*options, "--", *positionals] if positionals else options, namespace)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _add(commands: Any, name: str, help: str, examples: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=help, description=help, epilog=examples, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.parse_known_args = _Parsing(parser)
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--weights", nargs="+", type=float, required=True, metavar="W",
                        help="one for each objective, in the run's order; they must sum to 1")  # fmt: skip
    parser.add_argument("--method", choices=METHODS,
                        help="which method of an `all` run (default: weight-cos-dpo, or clp)")  # fmt: skip
    parser.add_argument("--objective-temperature", nargs="+", type=float, metavar="BETA",
                        help="β, one for each objective, for temperature-cos-dpo (default: the run's; for export its "
                        "direction)")  # fmt: skip
    parser.add_argument("--kl-weight", type=float, metavar="WEIGHT", help="of a policy trained on rewards at several, "
                        "anywhere between them (default: the run's first)")  # fmt: skip
    parser.add_argument("--base-model", metavar="DIR", help="the language model it was tuned from, if that has moved")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto",
                        help="auto takes a GPU if there is one (default: auto)")  # fmt: skip
    return parser


def add_generate_parser(commands: Any) -> argparse.ArgumentParser:
    """Add `mopl generate` to the commands and return its parser."""
    parser = _add(commands, "generate", GENERATE_HELP, GENERATE_EXAMPLES)
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="texts to answer; - reads one from stdin")
    parser.add_argument("--scale", type=float, default=1.0, metavar="C", help=SCALE_HELP)
    parser.add_argument("--candidates", type=int, default=1, metavar="N",
                        help="sample N responses and re-rank them as whole responses (default: 1)")  # fmt: skip
    parser.add_argument("--rerank", choices=("best", "resample"), default="best", help="best: the most probable at "
                        "--scale; resample: one of them, drawn as at --scale (default: best)")  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="(default: 128)")
    parser.add_argument("--temperature", type=float, metavar="T", help="of sampling; without it and --top-p "
                        "the most probable token is taken each time")  # fmt: skip
    parser.add_argument("--top-p", type=float, metavar="P", help="sample from the most probable tokens of this mass")
    parser.add_argument("--seed", type=int, help="of the samples (default: another each time)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--chat", dest="template", action="store_const", const="chat", help="write the prompt with the "
                      "tokenizer's chat template (default: as in training)")  # fmt: skip
    kind.add_argument("--raw", dest="template", action="store_const", const="plain",
                      help="let the model continue the prompt as it is")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt, with all candidates")
    parser.set_defaults(act=run_generate)
    return parser


def add_export_parser(commands: Any) -> argparse.ArgumentParser:
    """Add `mopl export` to the commands and return its parser."""
    parser = _add(commands, "export", EXPORT_HELP, EXPORT_EXAMPLES)
    parser.add_argument("directory", metavar="DIR", help="where to write; nothing may be there")
    parser.add_argument("--kind", choices=("model", "adapter"), default="model", help="adapter: for PEFT, of models "
                        "that take weights in words, or have a prompt and no LoRA (default: model)")  # fmt: skip
    parser.add_argument("--keep-tied", action="store_true", help="leave an output head that is tied to the embeddings "
                        "tied, for loaders that need it; then rule out the new tokens with logit_bias")  # fmt: skip
    parser.set_defaults(act=run_export)
    return parser


# ---------------------------------------------------------------- what is opened


@dataclass
class Opened:
    """A model with what it needs to answer.

    Attributes:
        model: The model.
        tokenizer: How prompts become tokens, a `ListTokenizer`.
        objectives: Names of the objectives.
        text_prompt: What writes weights into prompts, if the model takes them there.
        temperature: β, where the model is conditioned on temperatures and has a default.
        reference: Name of another model that stands for the reference; None where the model is its own.
        fixed: The model is that of the weights already and takes none.
    """

    model: Any
    tokenizer: Any
    objectives: tuple[str, ...]
    text_prompt: Any = None
    temperature: tuple[float, ...] | None = None
    reference: str | None = None
    fixed: bool = False


def open_tuned(
    path: str | Path,
    weights: Sequence[float],
    *,
    method: str | None = None,
    base_model: str | None = None,
    device: str = "cpu",
    kl_weight: float | None = None,
) -> Opened:
    """Open a run of `mopl align`, or a folder with a conditioned model.

    Raises:
        FileNotFoundError: If there is nothing of the kind.
        ValueError: If it is something else, or has no such method or no model for these weights, or this KL weight.
    """
    from mopl._records import read_json

    path = Path(path)
    if (path / "config.json").exists() and not (path / "mopl.json").exists():
        if "model_type" in read_json(path / "config.json"):
            raise ValueError(f"{path} is a plain language model, which takes no weights; name a run of mopl align")
        return _open_run(path, weights, method, base_model, device, kl_weight)
    if not (path / "mopl.json").exists():
        raise FileNotFoundError(
            f"{path} is neither a run of mopl align nor a model: it has no config.json or mopl.json"
        )
    if method is not None:
        raise ValueError(f"{path} is one model, not a run; leave out --method")
    _check_no_kl_weight(path, kl_weight)
    return _open_model(path, base_model, device)


def _check_no_kl_weight(path: Path, kl_weight: float | None) -> None:
    if kl_weight is not None:
        raise ValueError(f"--kl-weight is for runs of a method on rewards, which {path} is not; leave it out, or move "
                         "answers closer to the reference with --scale")  # fmt: skip


def _open_run(
    path: Path, weights: Sequence[float], method: str | None, base_model: str | None, device: str,
    kl_weight: float | None,
) -> Opened:  # fmt: skip
    import dataclasses

    from mopl.alignment.runs import open_run
    from mopl.clp.runs import is_clp_run
    from mopl.experiments.run_directory import read_run
    from mopl.language_models.reference_mixture import OWN_REFERENCE

    if is_clp_run(read_run(path)):
        return _open_policy(path, weights, method, base_model, device, kl_weight)
    _check_no_kl_weight(path, kl_weight)
    run = open_run(path)
    if base_model is not None:
        run.config = dataclasses.replace(run.config, model=base_model)
    _check_moved(run.config.model)
    _check_count(weights, run.objectives)
    reference = run.config.reference
    return Opened(
        run.load(method, weights, device),
        run.list_tokenizer,
        run.objectives,
        run.text_prompt(method),
        run.beta if run.takes_temperature(method) else None,
        None if reference in (*OWN_REFERENCE, "auto") else reference,
    )


def _open_policy(
    path: Path, weights: Sequence[float], method: str | None, base_model: str | None, device: str,
    kl_weight: float | None,
) -> Opened:  # fmt: skip
    """Open a run of a method on rewards: its model of these weights and KL weight, mixed once."""
    import dataclasses

    from mopl.clp.runs import open_run

    run = open_run(path)
    if base_model is not None:
        run.config = dataclasses.replace(run.config, model=base_model)
    _check_moved(run.config.model)
    _check_count(weights, run.objectives)
    model, fixed = run.load(method, weights, device, kl_weight=kl_weight), not run.is_conditioned(method)
    # A conditioned model here has virtual tokens, which can be switched off; every other one is a plain model.
    words = run.text_prompt(method, kl_weight)
    own = not fixed and words is None
    return Opened(
        model, run.list_tokenizer, run.objectives, words, reference=None if own else run.config.model, fixed=fixed
    )  # fmt: skip


def _open_model(path: Path, base_model: str | None, device: str) -> Opened:
    from mopl.conditioning import TextPrompt
    from mopl.conditioning.saved_models import exported_at, read_kind, read_record
    from mopl.language_models import models
    from mopl.language_models.tokenization import ListTokenizer

    kind = read_kind(path)
    if kind == "export":
        weights = " ".join(f"{w:g}" for w in exported_at(path))
        raise ValueError(
            f"{path} was exported at weights {weights} and has no others; load it with transformers or vLLM"
        )
    if kind not in ("HyperPromptModel", models.MIXTURE_KIND, models.TEXT_KIND):
        raise ValueError(f"{path / 'mopl.json'} holds a {kind}, which is no conditioned language model")
    record = read_record(path, kind)
    name = base_model or record["base_model"]
    if name is None:
        raise ValueError(f"{path / 'mopl.json'} names no base model; pass --base-model")
    _check_moved(str(name))
    model: Any = models.load_model(path, models.load_causal_lm(name)).to(device)
    home = path if (path / "tokenizer_config.json").is_file() else name
    prompt = TextPrompt(tuple(record["objectives"]), record["template"]) if kind == models.TEXT_KIND else None
    reference = record["reference"]
    return Opened(
        model,
        ListTokenizer(models.load_tokenizer(str(home)), max_length=None, append_eos=False),
        tuple(record["objectives"]),
        prompt,
        reference=None if reference in ("self", "precomputed") else reference,
    )


def _check_moved(name: str) -> None:
    """Raise if the directory of a base model is no longer there."""
    if Path(name).is_absolute() and not Path(name).exists():
        raise FileNotFoundError(
            f"the language model that was tuned, {name}, is no longer there; name its new place with --base-model"
        )


def _check_count(weights: Sequence[float], objectives: Sequence[str]) -> None:
    if len(weights) != len(objectives):
        raise ValueError(
            f"--weights has {len(weights)} numbers but there are {len(objectives)} objectives: {', '.join(objectives)}"
        )


def _device(choice: str) -> str:
    import torch

    return "cuda" if choice == "auto" and torch.cuda.is_available() else "cpu"


# ---------------------------------------------------------------- the commands


def run_generate(arguments: argparse.Namespace) -> int:
    """Run `mopl generate`."""
    prompts = texts_of_arguments(arguments.prompts)
    if not prompts:
        raise ValueError("there is no prompt; write one at the end, or - to read it from stdin")
    from mopl.language_models import models
    from mopl.language_models.generate import generate
    from mopl.language_models.tokenization import ListTokenizer

    device = _device(arguments.device)
    opened = open_tuned(
        arguments.run, arguments.weights, method=arguments.method, base_model=arguments.base_model, device=device,
        kl_weight=arguments.kl_weight,
    )  # fmt: skip
    _check_count(arguments.weights, opened.objectives)
    beta = arguments.objective_temperature or opened.temperature
    tokenizer = opened.tokenizer
    if arguments.template is not None:
        if arguments.template == "chat" and not tokenizer.tokenizer.chat_template:
            raise ValueError(f"the tokenizer of {arguments.run} has no chat template; leave out --chat")
        tokenizer = ListTokenizer(tokenizer.tokenizer, max_length=None, template=arguments.template, append_eos=False)
    reference = None
    if opened.reference is not None and (arguments.scale != 1 or beta is not None):
        reference = models.load_causal_lm(opened.reference).to(device)
    sampling = {name: getattr(arguments, name) for name in ("temperature", "top_p")}
    w = None if opened.fixed else arguments.weights
    answers = generate(
        opened.model, tokenizer, prompts, w, scale=arguments.scale, objective_temperature=beta,
        reference=reference, max_new_tokens=arguments.max_new_tokens, candidates=arguments.candidates,
        rerank=arguments.rerank, text_prompt=opened.text_prompt, seed=arguments.seed,
        **{name: value for name, value in sampling.items() if value is not None},
    )  # fmt: skip
    for number, answer in enumerate(answers):
        if arguments.json:
            say(json_line(_as_record(answer)))
            continue
        if len(answers) > 1:
            say(*([""] if number else []), f"> {answer.prompt}")
        print(answer.text)
    return 0


def _as_record(answer: Any) -> dict[str, Any]:
    record = {"prompt": answer.prompt, "text": answer.text, "finished": answer.finished}
    if answer.candidates:
        names = ("text", "log_prob", "reference_log_prob", "score", "share")
        record["effective_samples"] = answer.effective_samples
        record["candidates"] = [{name: getattr(one, name) for name in names} for one in answer.candidates]
    return record


def run_export(arguments: argparse.Namespace) -> int:
    """Run `mopl export`."""
    from mopl.language_models import models
    from mopl.language_models.export import export

    directory = Path(arguments.directory)
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists and is not an empty directory; name another")
    opened = open_tuned(
        arguments.run, arguments.weights, method=arguments.method, base_model=arguments.base_model,
        kl_weight=arguments.kl_weight,
    )  # fmt: skip
    _check_count(arguments.weights, opened.objectives)
    beta = arguments.objective_temperature
    if beta is None and opened.temperature is not None:
        # At other sums than 1 the answers are a mixture with the reference, which no plain model is.
        beta = [b / sum(opened.temperature) for b in opened.temperature]
    w = None if opened.fixed else arguments.weights
    with models.quiet():
        export(
            opened.model, opened.tokenizer, w, directory, kind=arguments.kind, objective_temperature=beta,
            text_prompt=opened.text_prompt, keep_tied=arguments.keep_tied, origin=str(arguments.run),
        )  # fmt: skip
    named = ", ".join(f"{name} {w:g}" for name, w in zip(opened.objectives, arguments.weights, strict=True))
    named += "" if arguments.kl_weight is None else f", KL weight {arguments.kl_weight:g}"
    say(f"{directory}: {arguments.kind} at {named}")
    if arguments.kind == "model":
        load = f"AutoModelForCausalLM.from_pretrained({str(directory)!r})"
        say(f"{shell('vllm', 'serve', directory)}    or transformers: {load}")
    return 0
