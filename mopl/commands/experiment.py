"""What `mopl rank`, `mopl align` and `mopl clp` do alike: their options are settings, and a run is made of them."""

import argparse
import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from mopl._terminal import printable, say, shell, spelled
from mopl.commands.parser import add_command, add_help_all
from mopl.commands.trade_off import example_weights
from mopl.experiments.settings import Settings, add_options, given, settings_of

Tell = Callable[[str], None]

PAPER = "Sections, equations and appendices in the help are those of the COS-DPO paper (arXiv 2410.08316)."
TRUST_REMOTE_CODE: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("model", "--trust-remote-code"): {
        "action": "store_true",
        "help": "run Python code that comes with a model; it is not saved with a run, so --resume needs it again",
    }
}


@dataclass(frozen=True)
class Demo:
    """What `--demo` brings."""

    settings: Mapping[str, Any]  # settings; those that are given count more
    run: str  # the run directory, where none is given
    after: Callable[[Path, Tell], None] = lambda run, tell: None  # called with the run and `tell` once it is finished


@dataclass(frozen=True)
class Experiment:
    """A command that trains."""

    name: str  # its name
    help: str  # what it does, in a line
    examples: str  # the end of its help
    settings: type[Settings]  # its settings
    recipe: str  # the module with `check_resume` and the function that trains, which `train` names
    train: str  # that function's name
    folder: str  # the run directory where none is given, in words
    hint: Callable[[Any], Sequence[str]]  # returns what to try next with a finished run, a command a line
    basic: tuple[str, ...]  # settings that `--help` shows; `--help-all` shows every one
    needed: tuple[str, ...] = ()  # settings that have no default
    missing: str = ""  # what to pass if one of them is missing
    # Makes what `--demo` needs, from the settings that were given.
    demo: Callable[[Mapping[str, Any], Tell], Demo] | None = None
    # Options beside the settings, by group and flag, as `add_argument` takes them.
    options: Mapping[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)
    on_resume: tuple[str, ...] = ()  # those of them that `check_resume` takes


def add_experiment(commands: Any, experiment: Experiment) -> argparse.ArgumentParser:
    """Add a command that trains to the commands and return its parser."""
    parser = add_command(
        commands, experiment.name, functools.partial(run, experiment), experiment.help,
        f"{experiment.examples.strip()}\n\n{PAPER}", argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    group = parser.add_argument_group("run")
    if experiment.demo is not None:
        group.add_argument("--demo", action="store_true", help="run the demo, whose model and data are made first; "
                           "other options still apply, and the same command continues an interrupted demo")  # fmt: skip
    group.add_argument("--run", metavar="DIR", help=f"run directory (default: {experiment.folder})")
    group.add_argument("--resume", action="store_true", help="continue the run in --run")
    group.add_argument("--overwrite", action="store_true", help="replace the run in --run")
    group.add_argument("--config", metavar="FILE.yaml", help="YAML file of settings by name; options override it")
    group.add_argument("--print-config", action="store_true", help="print the settings as such a file and exit")
    groups = add_options(parser, experiment.settings, {"run": group})
    for (title, flag), options in experiment.options.items():
        groups[title].add_argument(flag, **options)
    add_help_all(parser, set(settings_of(experiment.settings)) - set(experiment.basic))
    return parser


def run(experiment: Experiment, arguments: argparse.Namespace) -> None:
    """Train what the options of a command ask for, and print the table and what to do next."""
    options = vars(arguments)
    settings = given(options, experiment.settings)
    if "config" in options:
        from mopl.experiments.settings_file import read_settings

        settings = {**read_settings(options["config"], experiment.settings), **settings}
    where, resume, overwrite = options.get("run"), options.get("resume", False), options.get("overwrite", False)

    quiet = options.get("quiet", False)

    def tell(text: str) -> None:
        if process() == 0 and not quiet:
            say(text)

    only_print = options.get("print_config", False)
    demo = None
    if only_print and options.get("demo"):
        raise ValueError("--demo makes its settings with its model; config.json of its run has them")
    if options.get("demo") and experiment.demo is not None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("--demo makes what it needs with one process; run it once without the launcher")
        demo = experiment.demo(settings, tell)
        settings = {**demo.settings, **settings}
        # The demo needs no name and no --resume: called again, it goes on where it stopped.
        where = where or demo.run
        resume = resume or (not overwrite and (Path(where) / "config.json").is_file())
    if resume:
        if where is None:
            raise ValueError("--resume needs the run to continue; name it with --run")
        from mopl.experiments.run_directory import read_run

        more = {name: options[name] for name in experiment.on_resume if name in options}
        recipe = import_module(experiment.recipe)
        config = recipe.check_resume(read_run(where), settings, Path(where), **more)
    else:
        if missing := [name for name in experiment.needed if name not in settings]:
            raise ValueError(f"--{missing[0]} is missing; {experiment.missing}")
        config = experiment.settings(**settings)
    if only_print:
        _print_settings(config)
        return
    recipe = import_module(experiment.recipe)
    path = getattr(recipe, experiment.train)(config, where, resume=resume, overwrite=overwrite, say=tell)
    if process() == 0:
        from mopl.experiments.run import read_any
        from mopl.report import print_table

        finished = read_any(path)
        if not quiet:
            say()
        print_table(finished.fronts(), metric=finished.metric)
        say("")
        if not quiet:
            say("what to try next:", *(f"  {command}" for command in experiment.hint(finished)), "")
    if demo is not None:
        demo.after(path, tell)
    if process() == 0:
        say(f"open {shell(Path(path) / 'report.html')} in a browser: every trade-off of this run")


def _print_settings(config: Settings) -> None:
    """Print settings as a file that reads back to them, also where a terminal cannot show a character as it is."""
    from mopl.experiments.settings_file import dump_settings

    text = dump_settings(config.to_dict())
    shown = spelled(printable(text), getattr(sys.stdout, "encoding", None))
    say(*(text if shown == text else dump_settings(config.to_dict(), ascii=True)).splitlines())


def refuse_options(
    parsed: argparse.Namespace, unknown: list[str], other: argparse.ArgumentParser
) -> tuple[argparse.Namespace, list[str]]:
    """Return what a parser made of its arguments; if it does not know options that another one has, acting says so."""
    foreign = [word.partition("=")[0] for word in unknown if word.partition("=")[0] in other._option_string_actions]

    def act(arguments: argparse.Namespace) -> None:
        raise ValueError(f"{', '.join(foreign)} has no part in this --method; leave it out")

    if foreign:
        parsed.act, unknown = act, []
    return parsed, unknown


def try_with(command: str, run: Any, *more: str) -> str:
    """Return a command that takes a finished run at some weights, and the names of its objectives."""
    objectives = run.objectives
    words = shell("mopl", command, run.path, "--weights", *example_weights(len(objectives)), *more)
    return f"{words}    ({', '.join(objectives)})"


def ask_or_serve(run: Any) -> tuple[str, str]:
    """Return the commands that answer at any trade-off: one prompt, and everybody's."""
    served = shell("mopl", "serve", run.path)
    return try_with("generate", run, "PROMPT"), f"{served}    (a page with sliders, and OpenAI's API)"


def process() -> int:
    """Return this process's number under a launcher, 0 alone."""
    return int(os.environ.get("RANK", "0"))
