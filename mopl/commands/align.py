"""`mopl align`: a language model for every trade-off, from labelled responses."""

import argparse
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from mopl.alignment.config import AlignConfig
from mopl.clp.config import ALL, METHODS
from mopl.commands import clp
from mopl.commands.experiment import (
    TRUST_REMOTE_CODE,
    Demo,
    Experiment,
    Tell,
    add_experiment,
    ask_or_serve,
    refuse_options,
)

DEMO_FOLDER = "runs/align-demo-data"
EXAMPLES = """
data are JSON lines
  {"prompt": ..., "responses": [...], "labels": {"helpful": [...], ...}}
or a public format: PKU-SafeRLHF, UltraFeedback, HelpSteer, Nectar, pairs of
TRL, and others. For prompts without labels, and rewards, see mopl clp.

examples:
  a small model and conflicting rewards, about 10 minutes on two cores:
    mopl align --demo
  every objective that the data have:
    mopl align --model MODEL --data pairs.jsonl
  two objectives of a data set on the Hugging Face hub:
    mopl align --model MODEL --data PKU-Alignment/PKU-SafeRLHF \\
        --objectives helpful harmless
  beside the baselines:
    mopl align --model MODEL --data lists.jsonl --method all --run runs/chat
  one student of a teacher for each objective:
    mopl align --model MODEL --data lists.jsonl --method distill \\
        --teachers HELPFUL HARMLESS
  settings from a file, which options override:
    mopl align --config chat.yaml --steps 500
  continue after Ctrl-C or a crash, bit for bit:
    mopl align --run runs/chat --resume
  on two GPUs:
    accelerate launch --num_processes 2 -m mopl align --model MODEL \\
        --data lists.jsonl
"""


def _demo(settings: Mapping[str, Any], tell: Tell) -> Demo:
    """Make the demo's model and data where they are not there; its answers are judged once its run is finished."""
    demo = import_module("mopl.alignment.demo")

    return Demo(demo.prepare(Path(DEMO_FOLDER), tell), "runs/align-demo", demo.describe_answers)


ALIGN = Experiment(
    name="align",
    help="fine-tune a language model on labelled responses, for every trade-off",
    examples=EXAMPLES,
    settings=AlignConfig,
    recipe="mopl.alignment.recipe",
    train="align",
    folder="runs/align-DATA-METHOD-N",
    hint=ask_or_serve,
    basic=(
        "model",
        "data",
        "objectives",
        "method",
        "conditioning",
        "labels",
        "beta",
        "steps",
        "lists_per_batch",
        "learning_rate",
        "points",
        "seed",
        "device",
    ),
    needed=("model", "data"),
    missing="pass --model and --data, or --demo",
    demo=_demo,
    options=TRUST_REMOTE_CODE,
)


def add_parser(commands: Any) -> None:
    """Add `mopl clp` and `mopl align` to the commands; the latter also takes what the former does, by its --method."""
    on_rewards = add_experiment(commands, clp.CLP)
    parser = add_experiment(commands, ALIGN)
    own = parser.parse_known_args

    def parse_known_args(args: Any = None, namespace: Any = None) -> Any:
        if _is_for_rewards(args):
            parsed, unknown = on_rewards.parse_known_args(args, namespace)
            parsed.command, parsed.typed = clp.CLP.name, ALIGN.name
            return refuse_options(parsed, unknown, parser, "a training on rewards, as --method says; leave it out")
        return refuse_options(
            *own(args, namespace), on_rewards, "a training on labels; leave it out, or train on rewards: --method clp"
        )

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign]


def _is_for_rewards(args: Sequence[str]) -> bool:
    """Whether options of `mopl align` ask for a method on rewards, or to resume a run of one."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--method", "--run", "--config"):
        first.add_argument(flag, nargs="?")  # an option without its value: the parser of the command says so
    first.add_argument("--resume", action="store_true")
    known, _ = first.parse_known_args(args)
    method = known.method
    if method is None and known.config is not None:
        from mopl.experiments.settings_file import method_in

        method = method_in(known.config)
    if method is None and known.resume and known.run is not None:
        from mopl._records import Kind, read_json

        with suppress(OSError, ValueError):  # who opens the run says what is wrong with it
            return read_json(Path(known.run) / "config.json", Kind).get("kind") == "clp"
    return method in (*METHODS, ALL)
