"""Writes docs/reference/command_line.md: every command with its options, from the parser that the commands use.

python docs/make_command_line.py
"""

import argparse
import sys
import textwrap
from pathlib import Path

from mopl.cli import build_parser

PAGE = Path(__file__).resolve().parent / "reference" / "command_line.md"

INTRODUCTION = """# Command line

`mopl COMMAND --help` prints the same in a terminal.

```text
mopl COMMAND [OPTIONS]
```

| Command | What it does |
|---|---|
{table}

An error is one line on stderr and exit status 2; `--debug` adds the traceback. A run that you stop with Ctrl-C exits
with status 130 and says how to continue it. Options of commands that train are also settings of a YAML file:
[Settings](../settings.md) lists their types, choices and defaults.
"""

END = "Written by `python docs/make_command_line.py` from the parser of the commands.\n"


def page() -> str:
    """Return the page as Markdown."""
    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    rows = [
        f"| [`mopl {name}`](#mopl-{name}) | {sentence(escaped(parser.description or ''))} |"
        for name, parser in commands.choices.items()
    ]
    parts = [INTRODUCTION.format(table="\n".join(rows))]
    for name, parser in commands.choices.items():
        parts += [f"## mopl {name}\n", sentence(escaped(parser.description or "")) + "\n"]
        for group in parser._action_groups:
            shown = [a for a in group._group_actions if a.help is not argparse.SUPPRESS]
            if not shown:
                continue
            title = {"positional arguments": "arguments", "optional arguments": "options"}.get(group.title or "")
            parts.append(f"**{(title or group.title or '').capitalize()}**\n")
            parts += [f"`{spelling(action)}`\n:   {escaped(help_of(action, parser))}\n" for action in shown]
        if parser.epilog:
            text = textwrap.dedent(parser.epilog.replace("%(prog)s", parser.prog)).strip()
            parts.append("```text\n" + text + "\n```\n")
    return "\n".join([*parts, END])


def spelling(action: argparse.Action) -> str:
    """Return an argument as the command line has it: every name of an option and its values."""
    if isinstance(action.metavar, tuple):
        values = " ".join(action.metavar)
    else:
        name = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
        if action.choices and not action.metavar:
            name = "{" + ",".join(map(str, action.choices)) + "}"
        forms = {0: "", "?": f"[{name}]", "*": f"[{name} ...]", "+": f"{name} [{name} ...]"}
        many = " ".join([name] * action.nargs) if isinstance(action.nargs, int) else name
        values = forms.get(action.nargs if action.nargs is not None else "", many)
    return " ".join(filter(None, [", ".join(action.option_strings), values]))


def help_of(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    """Return the help of an argument with its placeholders filled in."""
    known = {**vars(action), "prog": parser.prog}
    if action.choices is not None:
        known["choices"] = ", ".join(map(str, action.choices))
    return sentence(" ".join(((action.help or "") % known).split()))


def sentence(text: str) -> str:
    """Return a text with a capital, unless it begins with a symbol or a value, and a full stop."""
    first, _, rest = text.partition(" ")
    word = first.rstrip(",;").replace("-", "")
    if first[:1] != "-" and word.isascii() and word.isalpha() and word.islower() and not rest.startswith("("):
        text = text[:1].upper() + text[1:]
    return text if text.endswith((".", ":")) else f"{text}."


def escaped(text: str) -> str:
    """Return text, plain but for code between backticks, as Markdown."""
    parts = text.split("`")
    for mark in ("\\", "*", "_", "<", "[", "]", "|"):
        parts[::2] = [part.replace(mark, f"\\{mark}") for part in parts[::2]]
    return "`".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE, file=sys.stderr)
