"""`mopl export`: one trade-off as a plain model for transformers and vLLM."""

import argparse
from pathlib import Path
from typing import Any

from mopl._terminal import say, shell
from mopl.commands.tuned_model import add_model_command, load_tuned_model

EXAMPLES = """
The virtual tokens of the prompt become tokens of the vocabulary that the tokenizer puts in front by itself.
transformers never generates them (suppress_tokens). vLLM does not read that: there greedy decoding cannot take them,
samples practically never do, and logit_bias rules them out; mopl.json lists their ids.

examples:
  mopl export RUN --weights 0.7 0.3 exported/helpful
  mopl export RUN --method dpo-soup --weights 0.5 0.5 exported/soup
  vllm serve exported/helpful
"""


def add_parser(commands: Any) -> None:
    """Add `mopl export` to the commands."""
    help = "write the model of one trade-off as a plain directory that transformers and vLLM load"
    parser = add_model_command(commands, "export", run, help, EXAMPLES)
    parser.add_argument("directory", metavar="DIR", help="where to write; nothing may be there")
    parser.add_argument("--kind", choices=("model", "adapter"), default="model", help="adapter: a PEFT "
                        "adapter, of a mixture of adapters, a model that takes weights in words, or a prompt without "
                        "LoRA (default: model)")  # fmt: skip
    parser.add_argument("--keep-tied", action="store_true", help="leave an output head that is tied to the embeddings "
                        "tied, for loaders that need it; then rule out the new tokens with logit_bias")  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Run `mopl export`."""
    from mopl.language_models import models
    from mopl.language_models.export import export

    directory = Path(arguments.directory)
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists and is not an empty directory; name another")
    tuned = load_tuned_model(arguments)
    beta = arguments.beta
    if beta is None and tuned.beta is not None:
        # At other sums than 1 the answers are a mixture with the reference, which no plain model is.
        beta = [b / sum(tuned.beta) for b in tuned.beta]
    with models.quiet():
        export(
            tuned.model, tuned.tokenizer, arguments.weights if tuned.takes_weights else None, directory,
            kind=arguments.kind, beta=beta, text_prompt=tuned.text_prompt,
            keep_tied=arguments.keep_tied, origin=str(arguments.run), base_model=tuned.base_model,
        )  # fmt: skip
    named = ", ".join(f"{name} {w:g}" for name, w in zip(tuned.objectives, arguments.weights, strict=True))
    named += "" if arguments.kl_weight is None else f", KL weight {arguments.kl_weight:g}"
    say(f"{directory}: {arguments.kind} at {named}")
    if arguments.kind == "model":
        load = f"AutoModelForCausalLM.from_pretrained({str(directory)!r})"
        say(f"{shell('vllm', 'serve', directory)}    or transformers: {load}")
