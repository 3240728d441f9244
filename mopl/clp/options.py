"""The options of `mopl align` that are for `--method clp` and its baselines, and what is done with them.

The names of the options are the fields of `ClpConfig`, which also holds the defaults. Nothing heavy is imported until a
run begins.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from mopl._terminal import say

METHODS = ("clp", "rewarded-soups", "prompting", "logit-mixing", "dera", "clp-all")
RUN_OPTIONS = ("run", "resume", "overwrite", "demo", "debug", "act", "command", "trust_remote_code")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to those of `mopl align`."""
    group = parser.add_argument_group(
        f"policies trained on rewards (--method {', '.join(METHODS)}; --data are prompts)"
    )
    group.add_argument("--rewards", nargs="+", metavar="REWARD", help="names, with options as in length:target=20, or "
                       "module:function of (texts, prompts)")  # fmt: skip
    group.add_argument("--trust-rewards", action="store_true", help="with --resume: import the modules that the run "
                       "names for its rewards; without it name them again with --rewards")  # fmt: skip
    group.add_argument("--normalize", choices=("base", "running", "none"), help="train on rewards with mean 0 and "
                       "deviation 1 over answers of the untrained model, or also over those of the training so far "
                       "(default: base)")  # fmt: skip
    group.add_argument("--normalize-decay", type=float, metavar="RATE", help="what earlier rewards count after each "
                       "rollout, with running (default: 1)")  # fmt: skip
    group.add_argument("--normalize-prompts", type=int, metavar="PROMPTS", help="that the untrained model answers for "
                       "that (default: 64)")  # fmt: skip
    group.add_argument("--scope", help="what is mixed: full, attention, logits, lora, a pattern of names of "
                       "parameters; or prompt, virtual tokens (default: attention)")  # fmt: skip
    group.add_argument("--train-shared", action="store_true", help="also train what is outside of the scope")
    group.add_argument("--kl-weight", nargs="+", type=float, metavar="WEIGHT", help="of the KL to the reference; "
                       "several condition the policy on it (default: 0.05)")  # fmt: skip
    group.add_argument("--kl-form", choices=("complement", "penalty"), help="(1 - α) reward - α KL, or reward - α KL "
                       "(default: complement)")  # fmt: skip
    group.add_argument("--kl-in", choices=("reward", "loss"), help="where the KL enters (default: reward)")
    group.add_argument("--kl-estimator", choices=("k1", "k2", "k3", "exact"), help="exact: over the whole vocabulary "
                       "at each position, without the logits (default: k1)")  # fmt: skip
    group.add_argument("--kl-level", choices=("token", "sequence"), help="(default: token)")
    group.add_argument("--baseline", choices=("leave_one_out", "group", "value", "none"),
                       help="of the policy gradient (default: leave_one_out)")  # fmt: skip
    group.add_argument("--standardize", action="store_true", help="divide by a group's deviation; with group")
    group.add_argument("--to-go", action="store_true", help="count for each token the KL from it on only")
    group.add_argument("--value-learning-rate", type=float, metavar="RATE", help="of the value head (default: 0.001)")
    group.add_argument("--trade-offs", type=int, metavar="N", help="different ones in a step (default: 2 where "
                       "parameters are mixed, else one for each prompt)")  # fmt: skip
    group.add_argument("--prompts-per-step", type=int, metavar="N", help="(default: 8)")
    group.add_argument("--samples-per-prompt", type=int, metavar="N", help="(default: 4)")
    group.add_argument("--epochs", type=int, metavar="N", help="updates on each rollout (default: 1)")
    group.add_argument("--clip", type=float, metavar="EPSILON", help="of importance ratios, with several epochs")
    group.add_argument("--ratio-level", choices=("token", "sequence", "sequence_mean"), help="(default: token)")
    group.add_argument("--max-prompt", type=int, metavar="TOKENS", help="longer prompts are left out (default: 512)")
    group.add_argument("--max-new-tokens", type=int, metavar="TOKENS", help="of a response (default: 64)")
    group.add_argument("--temperature", type=float, metavar="T", help="of policy and reference, in training and "
                       "evaluation (default: 1)")  # fmt: skip
    group.add_argument("--rows-at-once", type=int, metavar="N", help="responses generated together (default: 64)")
    group.add_argument("--kl-limit", type=float, metavar="NATS", help="stop above this KL of a response, 0 for never "
                       "(default: 100)")  # fmt: skip
    group.add_argument("--entropy-floor", type=float, metavar="NATS", help="stop below this entropy of a token, 0 for "
                       "never (default: 0.001)")  # fmt: skip
    group.add_argument("--patience", type=int, metavar="N", help="rollouts with too little entropy, or equal rewards, "
                       "before a stop (default: 10)")  # fmt: skip
    group.add_argument("--eval-prompts", type=int, metavar="N", help="held-out prompts of the front (default: 64)")
    group.add_argument("--eval-samples", type=int, metavar="N", help="answers to each at a trade-off (default: 1)")
    group.add_argument("--log-samples", type=int, metavar="N", help="responses that samples.jsonl keeps every "
                       "--log-every steps (default: 4)")  # fmt: skip


def is_wanted(given: dict[str, Any]) -> bool:
    """Say whether options of `mopl align` ask for a method on rewards, or to resume a run of one."""
    if given.get("method") in METHODS:
        return True
    file = Path(given["run"]) / "config.json" if given.get("resume") and given.get("run") else None
    if file is None or given.get("method") is not None or not file.exists():
        return False
    from mopl.experiments.run_directory import read_run

    return read_run(given["run"]).get("kind") == "clp"


def refuse_strangers(given: dict[str, Any], known: Any) -> None:
    """Raise if an option has no part in the method.

    Raises:
        ValueError: With the options.
    """
    strangers = [f"--{name.replace('_', '-')}" for name in given if name not in known and name not in RUN_OPTIONS]
    if strangers:
        raise ValueError(f"{', '.join(strangers)} has no part in this --method; leave it out")


def run(given: dict[str, Any]) -> int:
    """Run `mopl align` with a method on rewards, and print the table and what to do next.

    Args:
        given: The options that were given, by name.
    """
    from mopl.clp.config import ClpConfig
    from mopl.clp.recipe import check_resume, train_policies
    from mopl.clp.runs import metric_of, open_run, run_fronts
    from mopl.experiments.run_directory import read_run
    from mopl.report import print_table

    refuse_strangers(given, (*ClpConfig.__dataclass_fields__, "trust_rewards"))
    settings = {name: v for name, v in given.items() if name in ClpConfig.__dataclass_fields__}
    where, resume = given.get("run"), given.get("resume", False)
    main = int(os.environ.get("RANK", "0")) == 0

    def tell(text: str) -> None:
        if main:
            say(text)

    if given.get("demo"):
        from mopl.clp.demo import RUN, demo_settings

        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("--demo makes its prompts with one process; run it once without the launcher")
        settings = {**demo_settings(tell), **settings}
        # The demo needs no name and no --resume: called again, it goes on where it stopped.
        where = where or (RUN if settings["method"] == "clp" else f"{RUN}-{settings['method']}")
        resume = resume or (not given.get("overwrite", False) and (Path(where) / "config.json").is_file())
    if resume:
        if where is None:
            raise ValueError("--resume needs the run to continue; name it with --run")
        config = check_resume(read_run(where), settings, Path(where), trust_rewards=given.get("trust_rewards", False))
    else:
        for name in ("model", "data", "rewards"):
            if name not in settings:
                raise ValueError(f"--{name} is missing; pass --model, --data with prompts and --rewards, or --demo")
        config = ClpConfig(**settings)
    path = train_policies(config, where, resume=resume, overwrite=given.get("overwrite", False), say=tell)
    if main:
        from mopl.alignment.command import generate_hint

        opened = open_run(path)
        say()
        print_table(run_fronts(path), metric=metric_of(opened.config))
        say("", f"{path}/report.html shows every trade-off; {path}/front.png and table.txt are the same in short")
        if opened.method_name in ("clp", "rewarded-soups", "prompting"):
            say(generate_hint(path, opened.objectives))
    return 0
