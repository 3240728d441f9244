"""The command `mopl`: train one model for every trade-off, turn its knobs afterwards, compare runs.

    mopl rank                      train weight-cos-dpo on the embedded data set, with table, picture and page
    mopl align --demo              fine-tune a small language model for every trade-off
    mopl clp --demo                train a small language model on rewards for every trade-off
    mopl generate RUN --weights .. answer prompts at any trade-off
    mopl export RUN --weights ..   one trade-off as a plain model for transformers and vLLM
    mopl steer RUN --weights ...   figures and scores for any trade-off of a finished run, without training
    mopl report RUN RUN ...        one table, picture and page of several runs

An error is one line on stderr and exit status 2 (`--debug` shows where it came from); a run that was stopped by Ctrl-C
exits with 130 and says how to continue it. A training goes on to its end though nobody reads what it prints, and exits
with 0; a command that only prints exits with 141 then, and with 2 if its output could not be written.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from mopl import __version__
from mopl._extras import require_for
from mopl._terminal import exit_status, is_terminal, one_line, print_traceback, printable, say, terminal
from mopl.alignment.commands_after import add_export_parser, add_generate_parser
from mopl.commands import align, rank
from mopl.experiments.common_settings import METHODS

STEER_EXAMPLES = """
examples:
  mopl steer runs/rank-travel-weight-cos-dpo-1 --weights 0.6 0.3 0.1
  mopl steer RUN --weights 0.5 0.5 --scale 2         closer to the base model (equation 14), without training
  mopl steer RUN --weights 0.5 0.5 --temperature 1.1 0.9       a model of temperature-cos-dpo
  mopl steer RUN --weights 0.5 0.5 --output scores.tsv         the scores of every item of the test split
"""

REPORT_EXAMPLES = """
examples:
  mopl report runs/a                                 print its table, write table, picture and page again
  mopl report runs/a runs/b runs/c --html compare.html --png compare.png
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        say(f"{self.prog}: error: {one_line(message)}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command."""
    parser = _Parser(prog="mopl", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"mopl {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    rank.add_parser(commands)
    _steer_parser(commands)
    align.add_parser(commands)
    add_generate_parser(commands)
    add_export_parser(commands)
    _report_parser(commands)
    return parser


def _add(commands: Any, name: str, help: str, examples: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=help, description=help, epilog=examples, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _steer_parser(commands: Any) -> None:
    parser = _add(
        commands, "steer", "figures and scores of a finished run for any trade-off, without training", STEER_EXAMPLES
    )
    parser.add_argument("run", metavar="RUN", help="directory of a finished run")
    parser.add_argument("--weights", nargs="+", type=float, required=True, metavar="W",
                        help="one for each objective, in the run's order; they must sum to 1")  # fmt: skip
    parser.add_argument("--scale", type=float, metavar="C", default=1.0,
                        help="above 1 closer to the base model, below 1 further away (default: 1)")  # fmt: skip
    parser.add_argument("--temperature", nargs="+", type=float, metavar="BETA", default=None,
                        help="for temperature-cos-dpo, one for each objective (default: the run's)")  # fmt: skip
    parser.add_argument("--method", choices=METHODS, default=None, help="which method of an `all` run")
    parser.add_argument("--split", choices=("train", "valid", "test"), default="test", help="(default: test)")
    parser.add_argument(
        "--output", metavar="FILE", default=None, help="write query, item and score of every item there"
    )
    parser.add_argument("--json", action="store_true", default=False, help="print JSON instead of a table")
    parser.set_defaults(act=_steer)


def _report_parser(commands: Any) -> None:
    parser = _add(commands, "report", "one table, picture and page of one or several runs", REPORT_EXAMPLES)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="directories of finished runs")
    parser.add_argument("--html", metavar="FILE", default=None, help="write the page there")
    parser.add_argument("--png", metavar="FILE", default=None, help="write the picture there")
    parser.add_argument("--table", metavar="FILE", default=None, help="write the table there")
    parser.set_defaults(act=_report)


def _steer(arguments: argparse.Namespace) -> int:
    from mopl.ranking.steer import steer

    figures = steer(
        arguments.run, arguments.weights, scale=arguments.scale, temperature=arguments.temperature,
        method=arguments.method, split=arguments.split, output=arguments.output,
    )  # fmt: skip
    print(json.dumps(figures, indent=2) if arguments.json else _steer_table(figures))
    if arguments.output and not arguments.json:
        say(f"scores of the {figures['split']} split: {arguments.output}")
    return 0


def _steer_table(figures: dict[str, Any]) -> str:
    """Return the figures of `steer` as aligned text."""
    header = ["", *(printable(name, keep="") for name in (f"{figures['main']} (main)", *figures["objectives"]))]
    rows = [[name, *(f"{x:.4f}" for x in (row["main"], *row["auxiliary"]))] for name, row in figures["rows"].items()]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in (header, *rows)
    ]
    title = f"{figures['method']} of {figures['run']}, {figures['split']} split, {figures['metric']}"
    return "\n".join([printable(title, keep=""), *lines])


def _report(arguments: argparse.Namespace) -> int:
    from mopl.experiments import compare
    from mopl.report.plot import check_picture

    if arguments.png is not None:
        check_picture(arguments.png)  # before anything is read, printed or written
    compare(arguments.runs, html=arguments.html, png=arguments.png, table=arguments.table)
    return 0


def _process() -> int:
    """Return this process's number under a launcher, 0 alone."""
    return int(os.environ.get("RANK", "0"))


def _parser_of(command: str, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    (subparsers,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return subparsers.choices[command]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; what a command does not know is its error, and names the option that is nearest."""
    parser = build_parser()
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser = _parser_of(parsed.command, parser)
        near = get_close_matches(unknown[0].partition("=")[0], parser._option_string_actions, 1)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}" + "".join(f" (did you mean {o}?)" for o in near))
    return parsed


def as_flags(text: str, command: str) -> str:
    """Return a message with settings written as options of the command: the library says `max_length=56`.

    Args:
        text: A message of the library.
        command: The command whose options are meant.
    """
    known = _parser_of(command, build_parser())._option_string_actions
    flags = {a.dest: flag for flag, a in known.items() if flag == f"--{a.dest.replace('_', '-')}"}

    def flag_of(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"]
        if name not in flags or (value is None and "_" not in name):
            return match[0]
        if value == "False":
            no = flags[name].replace("--", "--no-", 1)
            return no if no in known else f"no {flags[name]}"
        return flags[name] + ("" if value is None or value == "True" else " " + value.strip("'"))

    # A bare word is taken for an option only if it has an underscore, and never inside a path or quotes.
    pattern = r"(?<![\w./'\"-])(?P<name>[a-z_]+)(?:=(?P<value>'[\w.-]+'|\d[\w.-]*\w|\d|True|False))?(?![\w/'\"=(-])"
    return re.sub(pattern, flag_of, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    with terminal() as out:
        parsed = _parse(arguments)
        status = _act(parsed)
    return exit_status(status, out, output_is_the_result=parsed.command in ("steer", "generate", "report"))


def _act(parsed: argparse.Namespace) -> int:
    """Do what was asked for; an error is said in a line."""
    try:
        # A table is drawn by rich on a terminal, at the end of a run.
        drawn = parsed.command in ("rank", "align", "clp", "report") and is_terminal(sys.stdout)
        tables = ("rich",) * drawn
        require_for(parsed.command, *tables, *getattr(parsed, "log_with", ()))
        from mopl._hub import trusting

        with trusting(getattr(parsed, "trust_remote_code", False)):
            return parsed.act(parsed)
    except KeyboardInterrupt:
        say("mopl: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if type(error).__name__ == "RunInterrupted":
            say(f"mopl: {error}", file=sys.stderr)
            return 130
        if getattr(parsed, "debug", False):
            sys.excepthook = print_traceback
            raise
        where = f" (process {_process()})" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        text = as_flags(one_line(str(error)) or type(error).__name__, parsed.command)
        # A fault of ours, not of the input, should not look like advice.
        expected = isinstance(error, (ValueError, OSError, ImportError, ArithmeticError, NotImplementedError))
        say(f"mopl {parsed.command}{where}: {'' if expected else f'{type(error).__name__}: '}{text}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
