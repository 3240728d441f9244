"""The tuned language model that `mopl generate`, `export` and `serve` ask: of a run, or in a folder of its own."""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mopl._terminal import say
from mopl.commands.parser import Parser, add_command
from mopl.commands.trade_off import add_trade_off, check_trade_off

RUN_HELP = (
    "directory of a finished run of mopl align or mopl clp, or of a model that takes weights, as its save_pretrained "
    "writes it"
)


def add_model_command(
    commands: Any,
    name: str,
    act: Callable[[argparse.Namespace], None],
    help: str,
    examples: str,
    *,
    without_weights: str | None = None,  # what holds without --weights, which is needed if this is None
) -> Parser:
    """Add a command with the options of `load_tuned_model` and `load_mixture` and return its parser."""
    parser = add_command(commands, name, act, help, examples, options_anywhere=True)
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    of_run = "the run's, divided by its sum" if name == "export" else "the run's"
    add_trade_off(parser, without_weights=without_weights, without_beta=of_run, old="--objective-temperature")
    parser.add_argument("--method", help="method of a run that has several (default: weight-cos-dpo, or clp)")
    parser.add_argument("--kl-weight", type=float, metavar="WEIGHT", help="for a policy trained with several KL "
                        "weights: any number between them (default: the run's first)")  # fmt: skip
    parser.add_argument("--base-model", metavar="DIR", help="the language model that was tuned, if it has moved")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto",
                        help="auto uses a GPU if there is one (default: auto)")  # fmt: skip
    return parser


@dataclasses.dataclass
class TunedModel:
    """A model with what it needs to answer."""

    model: Any  # the model
    tokenizer: Any  # how prompts become tokens, a `ListTokenizer`
    objectives: tuple[str, ...]  # names of the objectives
    text_prompt: Any = None  # what writes weights into prompts, if the model takes them there
    beta: tuple[float, ...] | None = None  # β, where the model is conditioned on it and has a default
    reference: str | None = None  # name of another model that stands for the reference; None where the model is its own
    takes_weights: bool = True  # False where the model is that of the weights already
    base_model: str | None = None  # name of the model that it was tuned from, where that is merged and has none itself
    kl_weight: float | None = None  # α at which a mixture that was not merged is asked, if it takes one
    fixed: bool = False  # whether `--weights` chose the model, which answers at no others


def load_tuned_model(arguments: argparse.Namespace, device: str = "cpu", *, merge: bool = True) -> TunedModel:
    """Load the model of a run on a language model, or of a folder, that options of `add_model_command` name.

    With `merge=False` a mixture stays one, to be asked at any weights; these may then be missing.
    """
    path = Path(arguments.run)
    if _is_run(path, arguments.method):
        return _model_of_run(path, arguments, device, merge)
    return _model_of_folder(path, arguments, device, merge)


def load_reference(tuned: TunedModel, device: str = "cpu") -> Any:
    """Load the model that stands for the reference, in the dtype of the model, as in training; None if it is its own.

    Answers away from scale 1 are made of the difference of the two, in which the rounding of one alone would stay.
    """
    from mopl.conditioning.weighted import causal_lm_of
    from mopl.language_models import models

    if tuned.reference is None:
        return None
    dtype = str(causal_lm_of(tuned.model).dtype).removeprefix("torch.")
    return models.load_causal_lm(tuned.reference, dtype=dtype).to(device)


def load_mixture(arguments: argparse.Namespace, device: str = "cpu") -> tuple[Any, str, float | None]:
    """Load the model of a run or a folder that answers at every trade-off, for an export of all of them.

    Returns:
        The model; the name of the model that it was tuned from; and the KL weight to ask it for, if it takes one.

    Raises:
        ValueError: If the method has a model for each trade-off, or one that takes weights in words.
    """
    path = Path(arguments.run)
    if not _is_run(path, arguments.method):
        _, name = _read_folder(path, arguments.base_model)
        return _load_folder(path, name, device, arguments.kl_weight), name, arguments.kl_weight
    run, kl_weight = _open_run(path, arguments), arguments.kl_weight
    of_kl_weight = {"kl_weight": kl_weight} if run.KIND == "clp" else {}
    model, kl_weight = run.load_weighted(arguments.method, device, **of_kl_weight)
    return model, run.config.model, kl_weight


def load_tokenizer(arguments: argparse.Namespace) -> Any:
    """Return the tokenizer of the run or the folder that arguments name."""
    from mopl.language_models import models

    path = Path(arguments.run)
    if _is_run(path, arguments.method):
        return _open_run(path, arguments).list_tokenizer.tokenizer
    _, name = _read_folder(path, arguments.base_model)
    return models.load_tokenizer(_home_of_tokenizer(path, name))


def _home_of_tokenizer(path: Path, name: str) -> str:
    """Return where the tokenizer of a folder is: there, or with the base model."""
    return str(path if (path / "tokenizer_config.json").is_file() else name)


def facts_of(arguments: argparse.Namespace, kl_weight: float | None) -> Any:
    """Return what the card of an export says of the run that arguments name; None for a folder, which has no front."""
    path = Path(arguments.run)
    if not _is_run(path, arguments.method):
        return None
    from mopl.experiments.model_facts import model_facts, pictured

    if not pictured():
        say("note: README.md gets no picture of the front, since matplotlib is not installed")
    return model_facts(_open_run(path, arguments), arguments.method, weights=arguments.weights, kl_weight=kl_weight)


def _is_run(path: Path, method: str | None) -> bool:
    """Return whether a path is a run, and not a folder of one model; raise if it is neither."""
    from mopl._records import read_json

    is_run = (path / "config.json").exists() and not (path / "mopl.json").exists()
    if is_run and "model_type" in read_json(path / "config.json"):
        raise ValueError(f"{path} is a plain language model, which takes no weights; name a run of mopl align")
    if not is_run and not (path / "mopl.json").exists():
        why = "it has no config.json or mopl.json" if path.is_dir() else "there is no such directory"
        raise FileNotFoundError(f"{path} is neither a run of mopl align nor a model: {why}")
    if not is_run and method is not None:
        raise ValueError(f"{path} is one model, not a run; leave out --method")
    return is_run


def _open_run(path: Path, arguments: argparse.Namespace) -> Any:
    """Return the finished run on a language model that arguments name."""
    from mopl.experiments.run import run_class
    from mopl.experiments.run_directory import check_kind, read_run

    record = read_run(path)
    if record.get("kind") != "clp":
        check_kind(record, path, "align")
        _check_kl_weight(path, arguments.kl_weight)
    run: Any = run_class(record, path).open(path)
    if arguments.base_model is not None:
        run.config = dataclasses.replace(run.config, model=arguments.base_model)
    _check_moved(run.config.model)
    return run


def _model_of_run(path: Path, arguments: argparse.Namespace, device: str, merge: bool) -> TunedModel:
    from mopl.conditioning.references import OWN_REFERENCE

    run = _open_run(path, arguments)
    method, weights, kl_weight = arguments.method, arguments.weights, arguments.kl_weight
    on_rewards = run.KIND == "clp"
    if weights is not None or merge:
        check_trade_off(weights, run.objectives)
    of_kl_weight = {"kl_weight": kl_weight} if on_rewards else {}
    model = run.load(method, weights, device, **of_kl_weight, **({"merge": merge} if on_rewards else {}))
    words = run.text_prompt(method, **of_kl_weight)
    conditioned = run.is_conditioned(method)
    beta, takes_weights = run.beta if run.takes_beta(method) else None, not on_rewards or conditioned
    if on_rewards and not merge and not conditioned:
        takes_weights, one = True, not model.decodes_rows or model.takes_kl_weight
        reference = run.config.model if one else None
        kl_weight = (kl_weight or run.config.kl_weight[0]) if model.takes_kl_weight else None
    elif on_rewards:
        # A conditioned model has virtual tokens, which can be switched off; every other one is a plain model.
        reference = None if takes_weights and words is None else run.config.model
    else:
        reference = None if run.config.reference in (*OWN_REFERENCE, "auto") else run.config.reference
    name = run.config.model
    fixed = not takes_weights or (not on_rewards and not conditioned)
    return TunedModel(
        model, run.list_tokenizer, run.objectives, words, beta, reference, takes_weights, name,
        None if merge else kl_weight, fixed,
    )  # fmt: skip


def _read_folder(path: Path, base_model: str | None) -> tuple[dict[str, Any], str]:
    """Return what the record of a folder says, and the name of the base model."""
    from mopl.conditioning.saved_models import exported_at, read_kind, read_record
    from mopl.conditioning.weighted import registered_kind

    kind = read_kind(path)
    if kind == "export":
        own = " ".join(f"{w:g}" for w in exported_at(path))
        raise ValueError(f"{path} was exported at weights {own} and has no others; load it with transformers or vLLM")
    if kind in ("adapters", "gguf"):
        what = "GGUF files" if kind == "gguf" else kind
        raise ValueError(f"{path} has {what} for servers; name the run or the model that they were exported from")
    record = read_record(path, registered_kind(path))
    name = base_model or record["base_model"]
    if name is None:
        raise ValueError(f"{path / 'mopl.json'} names no base model; pass --base-model")
    _check_moved(str(name))
    return record, str(name)


def _load_folder(path: Path, name: str, device: str, kl_weight: float | None) -> Any:
    """Load the model of a folder; raise if it takes a KL weight and has none, or the other way round."""
    from mopl._tensor_files import dtype_of
    from mopl.conditioning.weighted import KINDS, WeightedModel, registered_kind
    from mopl.language_models import models

    kind, dtype = KINDS[registered_kind(path)], "auto"
    if kind.SAVES_ALL and kind.WEIGHTS_FILE is not None:  # which a base model of 16 bit would round
        dtype = str(dtype_of(path / kind.WEIGHTS_FILE)).removeprefix("torch.")
    with models.quiet():
        model = WeightedModel.from_pretrained(path, models.load_causal_lm(name, dtype=dtype)).to(device)
    if model.takes_kl_weight and kl_weight is None:
        raise ValueError(f"{path} was trained with several KL weights; choose one with --kl-weight")
    if not model.takes_kl_weight:
        _check_kl_weight(path, kl_weight)
    return model


def _model_of_folder(path: Path, arguments: argparse.Namespace, device: str, merge: bool) -> TunedModel:
    from mopl.language_models import models
    from mopl.language_models.tokenization import ListTokenizer

    record, name = _read_folder(path, arguments.base_model)
    weights, kl_weight = arguments.weights, arguments.kl_weight
    if weights is not None or merge:
        check_trade_off(weights, record["objectives"])
    reference = None if record["reference"] in ("self", "precomputed") else record["reference"]
    model = _load_folder(path, name, device, kl_weight)
    takes_weights = model.decodes_rows and not model.takes_kl_weight
    if not takes_weights:  # one trade-off at a time
        reference = reference or name
        if merge:  # from here on it is the plain model of this one
            model = model.merge(weights, kl_weight).eval()
    return TunedModel(
        model,
        ListTokenizer(models.load_tokenizer(_home_of_tokenizer(path, name)), max_length=None, append_eos=False),
        tuple(record["objectives"]),
        reference=reference,
        takes_weights=takes_weights or not merge,
        base_model=name,
        kl_weight=None if merge else kl_weight,
        fixed=not takes_weights and merge,
    )


def _check_kl_weight(path: Path, kl_weight: float | None) -> None:
    if kl_weight is not None:
        raise ValueError(
            f"--kl-weight is for policies that were trained with several, which {path} is not; leave it out, or move "
            "answers closer to the reference with --scale"
        )


def _check_moved(name: str) -> None:
    """Raise if the directory of a base model is no longer there."""
    if Path(name).is_absolute() and not Path(name).exists():
        raise FileNotFoundError(
            f"the language model that was tuned, {name}, is no longer there; name its new place with --base-model"
        )
