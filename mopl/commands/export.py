"""`mopl export`: one trade-off as a plain model for transformers and vLLM, or all of them as adapters for servers."""

import argparse
from typing import Any

from mopl._terminal import say, shell
from mopl.commands.tuned_model import add_model_command, facts_of, load_mixture, load_tokenizer, load_tuned_model

MOST_TRADE_OFFS = 10_000  # of a grid
EXAMPLES = """
--adapters takes mixtures of adapters (mopl align --conditioning lora-mixture, mopl clp --scope lora-mixture). It writes
a LoRA adapter for each objective; a server that accepts scales of adapters in a request takes the weights as scales.

The virtual tokens of a prompt become tokens of the vocabulary, which the tokenizer puts in front by itself.
transformers never generates them (suppress_tokens). vLLM ignores that setting: greedy decoding cannot choose them
there, samples practically never do, and logit_bias rules them out; mopl.json lists their ids.

examples:
  one trade-off as a plain model:
    mopl export RUN --weights 0.7 0.3 exported/helpful
  the adapters, and 11 merged ones:
    mopl export RUN --adapters exported/adapters --grid 11
  files for llama.cpp:
    mopl export RUN --gguf exported/gguf
  a trade-off of a baseline:
    mopl export RUN --method dpo-soup --weights 0.5 0.5 exported/soup
"""


def add_parser(commands: Any) -> None:
    """Add `mopl export` to the commands."""
    help = "write one trade-off, or all, as a model for other software"
    parser = add_model_command(
        commands, "export", run, help, EXAMPLES, without_weights="every trade-off, for --adapters and --gguf"
    )
    parser.add_argument("directory", metavar="DIR", nargs="?", help="where to write the model of --weights; nothing "
                        "may be there")  # fmt: skip
    parser.add_argument("--kind", choices=("model", "adapter"), help="adapter: a PEFT "
                        "adapter, of a mixture of adapters, a model that takes weights in words, or a prompt without "
                        "LoRA (default: model)")  # fmt: skip
    parser.add_argument("--keep-tied", action="store_true", help="leave an output head that is tied to the embeddings "
                        "tied, for loaders that need it; then rule out the new tokens with logit_bias")  # fmt: skip
    parser.add_argument("--adapters", metavar="DIR", help="write the adapters of a mixture, one for each objective, "
                        "which servers scale by the weights of a request; nothing may be there")  # fmt: skip
    parser.add_argument("--gguf", metavar="DIR", help="write GGUF files for llama.cpp: the base model and the adapters "
                        "of a mixture, which its server scales by the weights of a request; with --weights any model "
                        "at one trade-off; nothing may be there")  # fmt: skip
    parser.add_argument("--grid", type=int, metavar="N", help="with --adapters: also N trade-offs as one adapter each, "
                        "called w=0.7,0.3 and so on, for servers that take one adapter in a request (of three or four "
                        "objectives the number of a lattice: 3, 6, 10, 15, ... or 4, 10, 20, 35, ...)")  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Run `mopl export`."""
    if arguments.gguf is not None:
        if arguments.adapters is not None:
            raise ValueError("--adapters and --gguf are two formats; export one after the other")
        if arguments.grid is not None:
            raise ValueError(f"--grid {arguments.grid} is for --adapters; llama.cpp mixes adapters itself")
        _check_alone(arguments, "gguf")
        _export_gguf(arguments)
        return
    if arguments.adapters is not None:
        _check_alone(arguments, "adapters")
        _export_adapters(arguments)
        return
    if arguments.grid is not None:
        raise ValueError(f"--grid {arguments.grid} is for --adapters; add --adapters DIR, or leave it out")
    if arguments.weights is None:
        raise ValueError(
            "--weights is missing; pass one for each objective, or write all trade-offs of a mixture of adapters: "
            "--adapters DIR, or --gguf DIR for llama.cpp"
        )
    if arguments.directory is None:
        raise ValueError("there is no DIR to write to; name it after the weights: --weights 0.7 0.3 DIR")
    _export_one(arguments)


def _check_alone(arguments: argparse.Namespace, form: str) -> None:
    """Raise if options for one trade-off stand beside those of a form that has all of them."""
    both = f"--{form} DIR has every trade-off"
    if arguments.directory is not None:
        raise ValueError(
            f"--{form} names where to write, so {arguments.directory!r} is one place too many; leave it out"
        )
    if arguments.kind is not None and form == "gguf":
        raise ValueError(f"--gguf has its own forms, so --kind {arguments.kind} has no effect; leave it out")
    if arguments.keep_tied and form == "gguf":
        raise ValueError("llama.cpp takes the head of new tokens as its own matrix; leave out --keep-tied")
    if arguments.weights is not None and form == "gguf":
        return
    if arguments.weights is not None:
        raise ValueError(f"{both} and --weights is for one; leave out one of them")
    if arguments.beta is not None:
        raise ValueError(f"{both}, of mixtures, which take no β; leave out --beta")
    if arguments.kind is not None:
        raise ValueError(f"{both} and --kind {arguments.kind} is for one; leave out --kind, or use --weights")
    if arguments.keep_tied:
        raise ValueError(f"{both} and no new tokens, which --keep-tied is about; leave it out")


def _export_adapters(arguments: argparse.Namespace) -> None:
    from mopl.language_models import models
    from mopl.language_models.export import check_free
    from mopl.language_models.export_adapters import check_mixture, export_adapters

    directory = check_free(arguments.adapters)
    model, base_model, kl_weight = load_mixture(arguments)
    check_mixture(model)
    names = model.record.objectives
    grid = () if arguments.grid is None else _grid(len(names), arguments.grid)
    with models.quiet():
        export_adapters(
            model, directory, kl_weight=kl_weight, grid=grid, base_model=base_model,
            facts=facts_of(arguments, kl_weight), show_progress=True,
        )  # fmt: skip
    at = "" if kl_weight is None else f", KL weight {kl_weight:g}"
    more = f"; {len(grid)} trade-offs as one adapter each" if len(grid) else ""
    say(f"{directory}: adapters of {', '.join(names)}{at}{more}; scale each by its weight (README.md)")


def _grid(objectives: int, points: int) -> Any:
    from mopl.pareto import weight_grid

    if points > MOST_TRADE_OFFS:
        raise ValueError(f"--grid is {points} but must be at most {MOST_TRADE_OFFS:,}: each is an adapter on the disk")
    try:
        return weight_grid(objectives, points)
    except ValueError as error:
        raise ValueError(f"--grid {points}: {error}; pass such a number") from None


def _export_gguf(arguments: argparse.Namespace) -> None:
    from mopl._extras import require_for
    from mopl._records import read_json
    from mopl.conditioning.saved_models import CONFIG_FILE
    from mopl.language_models import models
    from mopl.language_models.export import check_free
    from mopl.language_models.export_gguf import export_gguf, export_gguf_model

    require_for("export", "gguf", "peft")
    directory = check_free(arguments.gguf)
    if arguments.weights is not None:
        tuned = load_tuned_model(arguments)
        with models.quiet():
            export_gguf_model(
                tuned.model, tuned.tokenizer, arguments.weights if tuned.takes_weights else None, directory,
                beta=_beta(arguments, tuned), text_prompt=tuned.text_prompt, base_model=tuned.base_model,
                facts=facts_of(arguments, arguments.kl_weight), show_progress=True,
            )  # fmt: skip
        say(f"{directory}: model.gguf at {_named(arguments, tuned)}")
        say(shell("llama-server", "-m", directory / "model.gguf"))
        return
    model, base_model, kl_weight = load_mixture(arguments)
    with models.quiet():
        export_gguf(
            model, load_tokenizer(arguments), directory, kl_weight=kl_weight, base_model=base_model,
            facts=facts_of(arguments, kl_weight), show_progress=True,
        )  # fmt: skip
    at = "" if kl_weight is None else f", KL weight {kl_weight:g}"
    names = ", ".join(model.record.objectives)
    say(f"{directory}: base model and adapters of {names}{at}; the scale of each is its weight (README.md)")
    record = read_json(directory / CONFIG_FILE)
    weight = f"{1 / len(record['adapters']):.6g}"
    scaled = ",".join(f"{directory / file}:{weight}" for file in record["adapters"])
    say(shell("llama-server", "-m", directory / record["base"], "--lora-scaled", scaled))


def _export_one(arguments: argparse.Namespace) -> None:
    from mopl.language_models import models
    from mopl.language_models.export import check_free, export

    directory, kind = check_free(arguments.directory), arguments.kind or "model"
    tuned = load_tuned_model(arguments)
    with models.quiet():
        export(
            tuned.model, tuned.tokenizer, arguments.weights if tuned.takes_weights else None, directory,
            kind=kind, beta=_beta(arguments, tuned), text_prompt=tuned.text_prompt,
            keep_tied=arguments.keep_tied, origin=str(arguments.run), base_model=tuned.base_model,
            facts=facts_of(arguments, arguments.kl_weight),
        )  # fmt: skip
    say(f"{directory}: {kind} at {_named(arguments, tuned)}")
    if kind == "model":
        load = f"AutoModelForCausalLM.from_pretrained({str(directory)!r})"
        say(f"{shell('vllm', 'serve', directory)}    or transformers: {load}")


def _beta(arguments: argparse.Namespace, tuned: Any) -> list[float] | None:
    """Return β of one trade-off, of the sum 1."""
    if arguments.beta is None and tuned.beta is not None:
        # At other sums than 1 the answers are a mixture with the reference, which no plain model is.
        return [b / sum(tuned.beta) for b in tuned.beta]
    return arguments.beta


def _named(arguments: argparse.Namespace, tuned: Any) -> str:
    named = ", ".join(f"{name} {w:g}" for name, w in zip(tuned.objectives, arguments.weights, strict=True))
    return named + ("" if arguments.kl_weight is None else f", KL weight {arguments.kl_weight:g}")
