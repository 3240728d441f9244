"""The command `mopl`: train one model for every trade-off, turn its knobs afterwards, compare runs.

    mopl rank                      train weight-cos-dpo on the embedded data set, with table, picture and page
    mopl align --demo              fine-tune a small language model for every trade-off
    mopl clp --demo                train a small language model on rewards for every trade-off
    mopl generate RUN --weights .. answer prompts at any trade-off
    mopl export RUN --weights ..   a trade-off as a plain model; --adapters, --gguf: all of them, for other servers
    mopl serve RUN                 an endpoint of OpenAI's form, with a trade-off for each request
    mopl steer RUN --weights ...   figures and scores for any trade-off of a finished run, without training
    mopl report RUN RUN ...        one table, picture and page of several runs
    mopl doctor                    what is installed, what commands lack, and whether ops give the right numbers

An error is one line on stderr and exit status 2 (`--debug` shows where it came from); a run that was stopped by Ctrl-C
exits with 130 and says how to continue it. A training goes on to its end though nobody reads what it prints, and exits
with 0; a command that only prints exits with 141 then, and with 2 if its output could not be written.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches

from mopl import __version__
from mopl._extras import COMMANDS, require_for
from mopl._interruption import stopped_while_importing
from mopl._terminal import exit_status, is_terminal, one_line, print_traceback, quietly, say, terminal
from mopl.commands import align, doctor, export, generate, rank, report, serve, steer
from mopl.commands.experiment import process
from mopl.commands.parser import Help, Parser

DESCRIPTION = "Train one model for every trade-off between objectives, and choose the trade-off afterwards."
EXAMPLES = """
examples:
  mopl rank                 train a ranker on built-in data (ten seconds)
  mopl align --demo         fine-tune a small language model (about 10 minutes)
  mopl doctor               check what is installed and what works
  mopl rank --help          the options of a command

documentation: https://mopl-project.github.io/mopl/
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command.

    Returns:
        A parser with a subparser for each command; making it imports neither torch nor any other large package.
    """
    parser = Parser(prog="mopl", description=DESCRIPTION, epilog=EXAMPLES, allow_abbrev=False, formatter_class=Help)
    parser.add_argument("--version", action="version", version=f"mopl {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", parser_class=Parser)
    for command in (rank, steer, align, generate, serve, export, report, doctor):
        command.add_parser(commands)
    return parser


def _parser_of(command: str, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    (subparsers,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return subparsers.choices[command]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; what a command does not know is its error, and names the option that is nearest."""
    parser = build_parser()
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        if parsed.command is None:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        parser = _parser_of(parsed.command, parser)
        shown = [name for name, action in parser._option_string_actions.items() if action.help != argparse.SUPPRESS]
        if unknown[0].partition("=")[0] in shown:  # it stood in front of the command
            parser.error(f"{unknown[0]} belongs behind the command: mopl {parsed.command} {unknown[0]} ...")
        near = get_close_matches(unknown[0].partition("=")[0], shown, 1)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}" + "".join(f" (did you mean {o}?)" for o in near))
    return parsed


def as_flags(text: str, command: str) -> str:
    """Return a message with settings written as options of a command: the library says `max_length=56`.

    Args:
        text: A message of the library.
        command: The command that a reader of the message has typed, such as `"align"`.

    Returns:
        The message with `--max-length 56` in place of `max_length=56`. A bare name becomes an option if it has an
        underscore, or where a message says what it is (`steps is 0 but ...`); what stands in quotes or in a path, and
        names that the command has no option for, stay as they are.
    """
    known = _parser_of(command, build_parser())._option_string_actions
    flags = {  # by every name of an option, also by that of earlier versions
        name.removeprefix("--").replace("-", "_"): flag
        for name, action in known.items()
        if (flag := f"--{action.dest.replace('_', '-')}") in known and not name.startswith("--no-")
    }

    def flag_of(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"]
        told = said.match(match.string, match.start())
        if name not in flags or (value is None and "_" not in name and told is None):
            return match[0]
        if value == "False":
            no = flags[name].replace("--", "--no-", 1)
            return no if no in known else f"no {flags[name]}"
        return flags[name] + ("" if value is None or value == "True" else " " + value.strip("'"))

    # A bare word is taken for an option only if it has an underscore or is what the message is about, and never inside
    # a path or quotes.
    said = re.compile(r"(?:(?<!.)|(?<= but ))[a-z]+ (?:is|are|has|needs) ")
    pattern = r"(?<![\w./'\"-])(?P<name>[a-z_]+)(?:=(?P<value>'[\w.-]+'|\d[\w.-]*\w|\d|True|False))?(?![\w/'\"=(-])"
    return re.sub(pattern, flag_of, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    Args:
        arguments: The words after `mopl`; None for those of this process.

    Returns:
        The exit status: 0; 2 after an error, which is one line on stderr; 130 after Ctrl-C; 141 where a command that
        only prints has lost its reader.

    Raises:
        SystemExit: After `--help` and `--version` (0), and on a command line that is wrong (2).
    """
    with stopped_while_importing(), terminal() as out:
        parsed = _parse(arguments)
        if parsed.command is None:
            print(build_parser().format_help(), end="")
            return 0
        status = _act(parsed)
    printed = parsed.command in ("steer", "generate", "report", "doctor") or getattr(parsed, "print_config", False)
    return exit_status(status, out, output_is_the_result=printed)


def _act(parsed: argparse.Namespace) -> int:
    """Do what was asked for; an error is said in a line."""
    try:
        # A table is drawn by rich on a terminal, at the end of a run.
        drawn = parsed.command in ("rank", "align", "clp", "report") and is_terminal(sys.stdout) and not parsed.quiet
        tables = ("rich",) * drawn
        if parsed.command in COMMANDS:  # `doctor` needs nothing
            require_for(parsed.command, *tables, *getattr(parsed, "log_with", ()))
        from mopl._hub import trusting

        with trusting(getattr(parsed, "trust_remote_code", False)), quietly(parsed.quiet):
            return parsed.act(parsed) or 0
    except KeyboardInterrupt:
        say("mopl: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if _is_interruption(error):
            say(f"mopl: {error}", file=sys.stderr)
            return 130
        if getattr(parsed, "debug", False):
            sys.excepthook = print_traceback
            raise
        where = f" (process {process()})" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        text = as_flags(one_line(str(error)) or type(error).__name__, parsed.command)
        # A fault of ours, not of the input, should not look like advice.
        expected = isinstance(error, (ValueError, OSError, ImportError, ArithmeticError, NotImplementedError))
        typed = getattr(parsed, "typed", parsed.command)  # `mopl align` also does what `mopl clp` does
        say(f"mopl {typed}{where}: {'' if expected else f'{type(error).__name__}: '}{text}", file=sys.stderr)
        return 2


def _is_interruption(error: Exception) -> bool:
    """Whether a run was stopped and says how to continue it; what has not been imported cannot have been raised."""
    runs = sys.modules.get("mopl.experiments.run_directory")
    return runs is not None and isinstance(error, runs.RunInterrupted)


if __name__ == "__main__":
    sys.exit(main())
