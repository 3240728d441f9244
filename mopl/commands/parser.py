"""What the parsers of all commands have in common: errors of one line, numbers of an option, options anywhere."""

import argparse
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from mopl._counted import counted
from mopl._terminal import one_line, say


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line.

    Numbers of an option may have spaces or commas between them, in words of their own or in one: `--weights 0.7 0.3`,
    `--weights 0.7,0.3`. With `options_anywhere` positional arguments may follow an option that takes several numbers,
    as in `--weights 0.7 0.3 "a prompt"`: argparse would give it all that follows. `advanced` holds the destinations of
    the options that `--help` leaves out; `--help-all` shows every option.
    """

    def __init__(self, *args: Any, options_anywhere: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._options_anywhere = options_anywhere
        # argparse takes -1e3 for an option.
        self._negative_number_matcher = re.compile(
            r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$|-(inf|infinity|nan)$", re.IGNORECASE
        )
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
            return f"{super().format_help()}\n{counted(len(hidden), 'more option')}: {self.prog} --help-all\n"
        finally:
            for action, text in zip(hidden, texts, strict=True):
                action.help = text

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        say(f"{self.prog}: error: {one_line(message)}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse; numbers of an option become words of their own, and options that may be anywhere go to the front."""
        options, positionals, rest = [], [], list(sys.argv[1:] if args is None else args)
        while rest:
            word = rest.pop(0)
            if word == "--":
                positionals += rest if self._options_anywhere else [word, *rest]
                break
            flag, equals, value = word.partition("=")
            action = self._option_string_actions.get(flag)
            if action is None:  # a positional argument, or an option that is not known
                positional = self._options_anywhere and (word == "-" or not word.startswith("-"))
                (positionals if positional else options).append(word)
            elif equals:  # what ends here, too
                several = _numbers(value) if action.nargs is not None and _number_type(action) else []
                options += [flag, *several] if len(several) > 1 else [word]
            elif action.nargs is None:
                options += [word, *rest[:1]]
                del rest[:1]
            else:
                options += [word, *(() if action.nargs == 0 else self._values(rest, action))]
        words = [*options, "--", *positionals] if positionals and self._options_anywhere else [*options, *positionals]
        return super().parse_known_args(words, namespace)

    def _values(self, rest: list[str], action: argparse.Action) -> list[str]:
        """Take the values of an option, of which it has several, from the words behind it."""
        found: list[str] = []
        while rest:
            numbers = _numbers(rest[0]) if _number_type(action) else []
            if rest[0] == "," and found and rest[1:] and _numbers(rest[1]):
                del rest[0]
                continue
            if not numbers:
                # What follows at once is meant for the option, and an error if it is no number.
                if self._options_anywhere and not found and rest[0][:1] != "-":
                    found.append(rest.pop(0))
                break
            # Several numbers in a word that comes later are a prompt, such as "1, 2, 3".
            if self._options_anywhere and found and len(numbers) > 1:
                break
            found += numbers
            del rest[0]
        return found

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        kind = _number_type(action)
        try:
            return super()._get_value(action, arg_string)  # type: ignore[misc]
        except argparse.ArgumentError as error:
            if kind is None or isinstance(error.__context__, argparse.ArgumentTypeError):
                raise
        flag = action.option_strings[-1]
        if action.nargs is None:
            must = "a number" if kind is float else "a whole number"
            raise argparse.ArgumentError(None, f"{flag} is {arg_string!r} but must be {must}")
        example = " ".join(f"{kind(x):g}" for x in ((0.7, 0.3) if kind is float else (1, 2)))
        raise argparse.ArgumentError(
            None, f"{flag} is {arg_string!r} but must be numbers; write nothing but them, such as {flag} {example}"
        )

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = list(map(str, action.choices))
        near = "".join(f" (did you mean {name}?)" for name in get_close_matches(str(value), known, 1))
        if isinstance(action, argparse._SubParsersAction):
            raise argparse.ArgumentError(None, f"there is no command {value!r}{near}; commands are {', '.join(known)}")
        name = action.option_strings[-1] if action.option_strings else action.metavar or action.dest
        raise argparse.ArgumentError(None, f"{name} is {value!r} but must be one of {', '.join(known)}{near}")


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


def _number_type(action: argparse.Action) -> type[int] | type[float] | None:
    """Return of which numbers an option is; its type may be a function that is called as that of its numbers."""
    return {"int": int, "float": float}.get(getattr(action.type, "__name__", ""))


def _numbers(text: str) -> list[str]:
    """Return the numbers of a text, with commas or spaces between them; none if there is something else in it."""
    words = re.split(r"\s*,\s*|\s+", text.strip().removeprefix(",").removesuffix(",").strip())
    try:
        _ = [float(word) for word in words]
    except ValueError:
        return []
    return words
