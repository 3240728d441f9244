"""The papers' experiments as commands.

    python -m bench.paper mslr MSLR-WEB10K --out DIR
    python -m bench.paper safe-rlhf PKU-SafeRLHF --out DIR
    python -m bench.paper clp-summary xsum.jsonl --model MODEL --nli CLASSIFIER --out DIR
    python -m bench.paper sample DIR

Each checks its data, says how long it will take (`--plan` ends there), trains, and writes table.md, table.json and a
picture for each table into DIR. The same command goes on where it was stopped. `--small` is for a try on a CPU; every
setting of `mopl rank`, `mopl align` and `mopl clp` is an option, too (`--help-all`). `sample` writes small generated
data in the three formats.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from mopl import _terminal
from mopl._files import write_file
from mopl.cli import as_flags
from mopl.commands.parser import Parser, add_command, add_help_all
from mopl.experiments.settings import add_options, given, settings_of

HELP = {
    "mslr": "COS-DPO on MSLR-WEB10K or 30K: PATH holds Fold1 to Fold5, each with train.txt, vali.txt and test.txt",
    "safe-rlhf": "COS-DPO on PKU-SafeRLHF: PATH is JSON lines or parquet with prompt, response_0, response_1, "
    "better_response_id and safer_response_id, or a folder with its train*",
    "clp-summary": "CLP on XSum: PATH is JSON lines or parquet with document, summary and id, or a folder with its "
    "train*",
}
MOPL = {"mslr": "rank", "safe-rlhf": "align", "clp-summary": "clp"}  # the command whose settings are options
REPEATED = ("folds", "groups", "scopes", "kl_weights")  # options of which each value makes runs of its own
BASIC = ("model", "method", "steps", "points", "seed", "device", "limit", "batch_size", "lists_per_batch", "max_length")


def module_of(name: str) -> Any:
    """Return the module of an experiment."""
    from bench.paper import clp_summary, mslr, safe_rlhf

    return {"mslr": mslr, "safe-rlhf": safe_rlhf, "clp-summary": clp_summary}[name]


def door_of(name: str) -> Any:
    """Return the application of an experiment."""
    from bench.paper import plan

    return {"mslr": plan.RANK, "safe-rlhf": plan.ALIGN, "clp-summary": plan.CLP}[name]


def build_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser(prog="python -m bench.paper", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="EXPERIMENT", required=True)
    for name, text in HELP.items():
        module, door = module_of(name), door_of(name)
        command = add_command(commands, name, act, text, _defaults(module), argument_default=argparse.SUPPRESS)
        group = command.add_argument_group("experiment")
        group.add_argument("path", metavar="PATH", type=Path, help="the data in its public format")
        group.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder of runs, table and pictures")
        group.add_argument("--small", action="store_true", default=False, help="few steps on few rows, for a CPU")
        group.add_argument("--plan", action="store_true", default=False, help="check and estimate, and stop there")
        module.add_options(group)
        add_options(command, door.config)
        for action in command._actions:
            if action.dest in door.managed:
                action.help = argparse.SUPPRESS
        add_help_all(command, set(settings_of(door.config)) - set(BASIC) - set(door.managed))
    sample = add_command(commands, "sample", write_samples, "write generated data in the three formats", "")
    sample.add_argument("folder", metavar="DIR", type=Path, help="a new folder")
    return parser


def _defaults(module: Any) -> str:
    """Return in words what an experiment sets where nothing is given."""

    def said(settings: dict[str, Any]) -> str:
        words = {name: " ".join(map(str, v)) if isinstance(v, tuple) else str(v) for name, v in settings.items()}
        return ", ".join(f"{name} {value}".rstrip() for name, value in words.items())

    return f"Unless they are given, the experiment sets: {said(module.COMMON)}. With --small: {said(module.SMALL)}."


def write_samples(options: argparse.Namespace) -> None:
    """Write generated data in the three formats."""
    from bench.paper import samples

    if options.folder.exists() and any(options.folder.iterdir()):
        raise ValueError(f"{options.folder} is not empty; name a new folder")
    for path in (
        samples.mslr(options.folder / "mslr"),
        samples.safe_rlhf(options.folder / "safe-rlhf.jsonl"),
        samples.xsum(options.folder / "xsum.jsonl"),
    ):
        _terminal.say(str(path))


def planned(options: argparse.Namespace) -> Any:
    """Check what an experiment needs, and return its plan with nothing begun."""
    name, door = options.command, door_of(options.command)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("bench.paper runs in one process; start it without a launcher")
    options.path, options.out = options.path.resolve(), options.out.resolve()
    settings = given(options, door.config)
    for setting in door.managed:
        if setting in settings:
            raise ValueError(f"--{setting.replace('_', '-')} is set by the experiment; leave it out")
    for several in REPEATED:
        values = list(getattr(options, several, ()))
        if twice := [value for value in dict.fromkeys(values) if values.count(value) > 1]:
            raise ValueError(f"--{several.replace('_', '-')} names {twice[0]} more than once; name each once")
    plan = module_of(name).prepare(options, settings)
    for job in plan.jobs:
        job.config()  # settings that do not go together
    known = set(settings_of(door.config)) | {"path", "out", "plan", "act", "debug", "quiet", "command", "words_given"}
    own = {key: list(v) if isinstance(v, tuple) else v for key, v in vars(options).items() if key not in known}
    plan.options = {**own, "settings": {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}}
    return plan


def act(options: argparse.Namespace) -> int:
    """Do an experiment, or go on with it."""
    from bench.paper.estimate import estimate
    from mopl.experiments.run_directory import RunInterrupted
    from mopl.experiments.run_lock import locked

    def say(line: str) -> None:
        if not options.quiet:
            _terminal.say(line)

    module, plan = module_of(options.command), planned(options)
    say(f"{plan.name}: {', '.join(f'{value:,} {name}' for name, value in plan.counts.items() if value is not None)}")
    try:
        with locked(plan.out):
            plan.begin()
            if hasattr(module, "write_data"):
                module.write_data(plan, options)
            estimate(plan, say)
            if options.plan:
                return 0
            for place, job in enumerate(plan.jobs, 1):
                if plan.finished(job) is None:
                    say(f"{job.name}: run {place} of {len(plan.jobs)}")
                    plan.finish(job, say)
            report(plan, module, options)
    except (RunInterrupted, KeyboardInterrupt):
        _terminal.say("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def report(plan: Any, module: Any, options: argparse.Namespace) -> None:
    """Write and print the tables, and draw the pictures."""
    from bench.measuring import about
    from bench.paper.pictures import draw
    from mopl.experiments.run import read_any

    tables = module.tables(plan, {job.name: read_any(plan.folder(job)) for job in plan.jobs})
    facts: dict[str, Any] = {**about(), "data": plan.counts}
    versions = facts["versions"]
    made = (
        f"Made by `{_command(options)}` on {facts['date']}, {facts['device']}, {facts['threads']} threads, torch "
        f"{versions.get('torch')}."
    )
    text = "\n".join(f"{table.markdown()}\n![{table.title}]({table.group}.png)\n" for table in tables) + f"\n{made}\n"
    for table in tables:
        draw(table, plan.out / f"{table.group}.png")
    content = {
        "about": {**facts, "command": _command(options)},
        "tables": {
            table.group: {
                "title": table.title, "sample": table.sample, "source of the paper's rows": table.source,
                "header": table.header, "paper": table.paper, "ours": table.ours, "said": table.said,
                "differs": table.differs, "figures": table.figures,
            }
            for table in tables
        },
    }  # fmt: skip
    write_file(plan.out / "table.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    write_file(plan.out / "table.md", text)
    _terminal.say(*text.splitlines(), "", f"{plan.out / 'table.md'}")


def _command(options: argparse.Namespace) -> str:
    """Return the command without the folders that data and results have on this machine."""
    words = list(getattr(options, "words_given", sys.argv[1:]))
    shown = [Path(word).name if "/" in word and Path(word).exists() else word for word in words]
    return _terminal.shell("python", "-m", "bench.paper", *shown)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = build_parser().parse_args(arguments)
    if arguments is not None:
        options.words_given = arguments
    try:
        return options.act(options) or 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if getattr(options, "debug", False):
            raise
        _terminal.say(f"bench.paper: {as_flags(str(error), MOPL.get(options.command, 'rank'))}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
