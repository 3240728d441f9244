"""What the parsers of all commands have in common: errors of one line, and options among positional arguments."""

import argparse
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from mopl._terminal import one_line, say


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line.

    With `options_anywhere` positional arguments may follow an option that takes several numbers, as in
    `--weights 0.7 0.3 "a prompt"`: argparse would give it all that follows.
    """

    def __init__(self, *args: Any, options_anywhere: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._options_anywhere = options_anywhere

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        say(f"{self.prog}: error: {one_line(message)}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse; where options may be anywhere, they are sorted to the front before."""
        if self._options_anywhere:
            args = self._options_first(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def _options_first(self, args: Sequence[str]) -> list[str]:
        options, positionals, rest = [], [], list(args)
        while rest:
            argument = rest.pop(0)
            if argument == "--":
                positionals += rest
                break
            if argument == "-" or not argument.startswith("-"):
                positionals.append(argument)
                continue
            options.append(argument)
            action = self._option_string_actions.get(argument)
            if action is None or action.nargs == 0:  # a flag, --option=value, or an unknown one
                continue
            if action.nargs == "+":
                while rest and _is_number(rest[0]):
                    options.append(rest.pop(0))
            elif rest:
                options.append(rest.pop(0))
        return [*options, "--", *positionals] if positionals else options


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help whose lines never break inside a name such as lora-mixture."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def add_command(
    commands: Any, name: str, act: Callable[[argparse.Namespace], None], help: str, examples: str, **options: Any
) -> Parser:
    """Add a command, whose options `act` is called with, to what `add_subparsers` returned, and return its parser."""
    parser = commands.add_parser(
        name, help=help, description=help, epilog=examples, allow_abbrev=False, formatter_class=_Help, **options
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(act=act)
    return parser


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
