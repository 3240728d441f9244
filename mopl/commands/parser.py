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
    `--weights 0.7 0.3 "a prompt"`: argparse would give it all that follows. `advanced` holds the destinations of the
    options that `--help` leaves out; `--help-all` shows every option.
    """

    def __init__(self, *args: Any, options_anywhere: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._options_anywhere = options_anywhere
        self.advanced: set[str] = set()

    def format_help(self, *, everything: bool = False) -> str:
        """Return the help, without the advanced options unless `everything` is asked for."""
        hidden = [a for a in self._actions if a.dest in self.advanced and a.help != argparse.SUPPRESS]
        if everything or not hidden:
            return super().format_help()
        texts = [action.help for action in hidden]
        for action in hidden:
            action.help = argparse.SUPPRESS
        try:
            return f"{super().format_help()}\n{len(hidden)} more options: {self.prog} --help-all\n"
        finally:
            for action, text in zip(hidden, texts, strict=True):
                action.help = text

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


class _HelpAll(argparse.Action):
    """`--help-all`: the help with every option."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        options |= {"dest": argparse.SUPPRESS, "default": argparse.SUPPRESS, "nargs": 0}
        super().__init__(option_strings, **options)

    def __call__(self, parser: Any, *_: Any) -> None:
        """Print it and leave."""
        print(parser.format_help(everything=True), end="")
        parser.exit()


class Help(argparse.RawDescriptionHelpFormatter):
    """Help whose lines never break inside a name such as lora-mixture; paragraphs are wrapped, indented lines kept."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        filled = []
        for paragraph in text.strip().split("\n\n"):
            lines = paragraph.splitlines()
            if any(line.startswith(" ") for line in lines):
                filled += [*(f"{indent}{line}" for line in lines), ""]
            else:
                filled += [*(f"{indent}{line}" for line in self._split_lines(paragraph, width)), ""]
        return "\n".join(filled[:-1])

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def add_command(
    commands: Any, name: str, act: Callable[[argparse.Namespace], int | None], help: str, examples: str, **options: Any
) -> Parser:
    """Add a command to what `add_subparsers` returned and return its parser.

    `act` is called with the options, and returns the exit status if it is not 0.
    """
    parser = commands.add_parser(
        name, help=help, description=help, epilog=examples, allow_abbrev=False, formatter_class=Help, **options
    )  # fmt: skip
    parser.add_argument(
        "--quiet",
        action="store_true",
        default=False,
        help="leave out progress and remarks: print only results, warnings and errors",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(act=act)
    return parser


def add_help_all(parser: Parser, advanced: set[str]) -> None:
    """Leave options out of `--help`, by their destinations, and add `--help-all`, which shows them."""
    parser.advanced = advanced
    parser.add_argument("--help-all", action=_HelpAll, help="show all options and exit")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
