"""Writes docs/settings.md: every setting of the commands that train, and the examples of the other pages as YAML.

python docs/make_settings.py
"""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from mopl.cli import build_parser
from mopl.commands import align, clp, rank
from mopl.experiments.settings import Setting, given, settings_of
from mopl.experiments.settings_file import dump_settings

DOCS = Path(__file__).resolve().parent
EXPERIMENTS = (rank.RANK, align.ALIGN, clp.CLP)

INTRODUCTION = """# Settings

A setting has one name: `learning_rate` is a field of the class, a key of a YAML file and of a run's `config.json`, \
and the option `--learning-rate`. Lists are written `--beta 0.1 0.2` and `beta: [0.1, 0.2]`; switches `--packing` or \
`--no-packing` and `packing: true`; a number that may be left to the run takes `none` \
(in a file also `null`). Sections, equations and appendices are those of the COS-DPO paper (arXiv 2410.08316).

```sh
# All settings, as the run would have them
mopl rank --steps 500 --print-config > my.yaml
# Options override the file
mopl rank --config my.yaml --seed 1
```

Relative paths in a file are relative to the folder in which the command runs. `mopl align` also takes the options and \
files of `mopl clp` if `--method` is one of its methods. Names in brackets are those of earlier versions and \
still work, with a warning.

Completion in a shell, with the package [shtab](https://pypi.org/project/shtab/): `shtab --shell=bash -u \
mopl.cli.build_parser > ~/.local/share/bash-completion/completions/mopl` (or `--shell=zsh`, `tcsh`).
"""

END = """Written by `python docs/make_settings.py` from the fields of `RankConfig`, `AlignConfig` and `ClpConfig`.
"""


def page() -> str:
    """Return the page as Markdown."""
    parts = [INTRODUCTION]
    for experiment in EXPERIMENTS:
        table = _table(experiment.settings, experiment.needed)
        parts += [f"## mopl {experiment.name}\n", '<div class="settings" markdown>\n', table, "\n</div>\n"]
    return "\n".join([*parts, "## Examples as YAML\n", *_examples(), END])


def _table(kind: type, needed: Sequence[str]) -> str:
    lines = ["| setting | values | default | meaning |", "|---|---|---|---|"]
    for name, known in settings_of(kind).items():
        old = f" [{known.old}]" if known.old else ""
        default = "required" if name in needed else "false" if known.default is False else known.stated_default
        cells = (f"`{name}`{old}", _values(known), default, known.help)
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("*", "\\*") for cell in cells) + " |")
    return "\n".join(lines)


def _values(known: Setting) -> str:
    entry = {int: "integer", float: "number", bool: "true, false"}.get(known.entry, "string")
    text = ", ".join(map(str, known.choices)) if known.choices else entry
    if known.many:
        text = f"{known.length} {text}s" if known.length else f"list of {text}" + "s" * (not known.choices)
    return text


def _examples() -> list[str]:
    """Return the command lines of README and docs that have settings, each beside the same settings as YAML."""
    parser, seen, parts = build_parser(), set(), []
    kinds = {experiment.name: experiment.settings for experiment in EXPERIMENTS}
    for path in (DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))):
        if path.name == "settings.md":
            continue
        for line in re.findall(
            r"mopl (?:rank|align|clp)\b[^`#\n|&]*", path.read_text(encoding="utf-8").replace("\\\n", " ")
        ):
            line = " ".join(line.split())  # of a command that goes on in the next line
            words = shlex.split(line)
            parsed = parser.parse_args(words[1:])
            settings = given(parsed, kinds[parsed.command])
            if settings and line not in seen:
                seen.add(line)
                plain = {name: list(v) if isinstance(v, tuple) else v for name, v in settings.items()}
                parts += ["```sh", line, "```", "```yaml", dump_settings(plain).rstrip(), "```", ""]
    return parts


if __name__ == "__main__":
    (DOCS / "settings.md").write_text(page(), encoding="utf-8")
    print(DOCS / "settings.md", file=sys.stderr)
