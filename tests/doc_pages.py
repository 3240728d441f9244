"""The pages for readers (README.md and docs/) as tests see them: fenced blocks, command lines, links and headings."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, takewhile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Pages whose blocks do not run, but are read: their links, options and names are those of the project, too.
OTHER_PAGES = [
    *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", ".github/PULL_REQUEST_TEMPLATE.md")),
    *sorted((ROOT / "bench").rglob("*.md")),
]
SHELL = ("sh", "console")
LANGUAGES = (*SHELL, "python", "text", "json", "jsonl", "yaml", "toml", "ini", "html", "bibtex", "diff")
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->")
NOT_COMPARED = re.compile(r"<!-- output not compared: (.+?) -->")
FENCE = re.compile(r"^(?P<indent> *)(?P<marks>`{3,}|~{3,})(?P<language>[\w-]*)(?P<rest>[^`]*)$")


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` is that of its first line of text, `comments` stand directly above it."""

    page: Path
    line: int
    language: str
    text: str
    comments: str = ""

    @property
    def reason(self) -> str | None:
        """Why it cannot run, where it says so."""
        match = NOT_RUN.search(self.comments)
        return match and match[1]

    @property
    def is_compared(self) -> bool:
        return NOT_COMPARED.search(self.comments) is None

    @property
    def where(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


@dataclass(frozen=True)
class Line:
    """A command line of a shell block, continued lines joined."""

    page: Path
    line: int
    text: str

    @property
    def where(self) -> str:
        return f"{name_of(self.page)}:{self.line}"

    def commands(self) -> list["Command"]:
        """Return the commands of the line: what `&&`, `;` and pipes separate."""
        return list(_split(self.text))


@dataclass(frozen=True)
class Command:
    """Words of a command without their quotes, with the variables before it and the files of < and >."""

    words: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    read: str | None = None
    written: str | None = None
    piped: bool = False  # its input is the output of the command before


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: Path) -> list[Block]:
    """Return the fenced blocks of a page; those in lists and tabs are indented."""
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    opened: tuple[int, re.Match[str]] | None = None
    for number, line in enumerate(lines):
        match = FENCE.match(line)
        if opened is None:
            opened = (number, match) if match else None
            continue
        start, first = opened
        if match and not match["language"] and match["marks"].startswith(first["marks"]):
            indent = len(first["indent"])
            text = "".join(
                f"{each[indent:] if each[:indent].isspace() else each}\n" for each in lines[start + 1 : number]
            )
            above = takewhile(lambda each: not each or each.startswith("<!--"), map(str.strip, reversed(lines[:start])))
            found.append(Block(page, start + 2, first["language"], text, "\n".join(above)))
            opened = None
    assert opened is None, f"{name_of(page)}:{opened[0] + 1}: a fence that is not closed"
    return found


def prose_of(page: Path) -> list[str]:
    """Return the lines of a page with those of fenced blocks empty, so that numbers of lines stay."""
    lines = page.read_text(encoding="utf-8").splitlines()
    for block in blocks_of(page):
        for number in range(block.line - 2, block.line + block.text.count("\n")):
            lines[number] = ""
    return lines


def outputs_of(page: Path) -> dict[Block, Block]:
    """Return the blocks of text that show what the block of Python above them prints: no heading is between them."""
    prose = prose_of(page)
    return {
        above: below
        for above, below in pairwise(blocks_of(page))
        if above.language == "python" and below.language == "text" and above.reason is None and below.is_compared
        if not any(line.startswith("#") for line in prose[above.line : below.line])
    }


def lines_of(block: Block) -> list[Line]:
    """Return the command lines of a block: in `console` those after `$ `, else all that are no comment."""
    found: list[Line] = []
    waiting: tuple[int, str] | None = None  # a line that goes on in the next
    for number, raw in enumerate(block.text.splitlines(), block.line):
        text = raw
        if waiting is None:
            if block.language == "console":
                if not raw.startswith("$ "):
                    continue
                text = raw[2:]
            if not text.strip() or text.lstrip().startswith("#"):
                continue
        start, before = waiting or (number, "")
        if text.endswith("\\"):
            waiting = start, before + text[:-1] + " "
        elif _is_quoted(before + text):
            waiting = start, before + text + "\n"
        else:
            waiting = None
            found.append(Line(block.page, start, (before + text).strip()))
    assert waiting is None, f"{block.where}: a line that goes on at the end of its block"
    return found


def _lexer(text: str) -> shlex.shlex:
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, "#"
    return lexer


def _is_quoted(text: str) -> bool:
    """Say whether a quotation goes on in the next line."""
    try:
        list(_lexer(text))
    except ValueError:
        return True
    return False


def _split(text: str) -> Iterator[Command]:
    words: list[str] = []
    files: dict[str, str] = {}
    piped, arrow = False, ""
    for word in [*_lexer(text), ";"]:
        if word in ("&&", "||", ";", "|", "&"):
            at = next((i for i, each in enumerate(words) if not re.fullmatch(r"[A-Z_]+=.*", each)), len(words))
            variables = tuple(tuple(each.split("=", 1)) for each in words[:at])
            if words[at:]:
                yield Command(tuple(words[at:]), variables, files.get("<"), files.get(">"), piped)  # type: ignore
            words, files, piped = [], {}, word == "|"
        elif word in ("<", ">", ">>"):
            arrow = word[0]
        elif arrow:
            files[arrow], arrow = word, ""
        else:
            words.append(word)


def slugs_of(page: Path) -> set[str]:
    """Return the anchors of a page: of its headings as GitHub and as MkDocs makes them, and those written out."""
    found: set[str] = set()
    text = page.read_text(encoding="utf-8")
    for line in prose_of(page):
        if match := re.match(r"^#+ +(.*?)(?: *\{ *#([\w-]+)[^}]*\})? *$", line):
            title = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", match[1])
            plain = re.sub(r"[^\w\s-]", "", title.replace("`", "").replace("*", "")).strip().lower()
            for slug in (re.sub(r"\s", "-", plain), re.sub(r"[-\s]+", "-", plain)):
                while slug in found and not match[2] and f"{slug}-1" not in found:
                    slug = f"{slug}-1"
                found.add(slug)
            if match[2]:
                found.add(match[2])
    found |= set(re.findall(r"<\w+[^>]* (?:id|name)=\"([\w.-]+)\"", text))
    return found | set(re.findall(r"\[\]\(\)\{ *#([\w.-]+) *\}", text))


def links_of(page: Path) -> Iterator[tuple[int, str]]:
    """Yield the targets of links and pictures, with the numbers of their lines."""
    for number, line in enumerate(prose_of(page), 1):
        shown = re.sub(r"`[^`]*`", "", line)
        for target in re.findall(r"\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)", shown):
            yield number, target
        for target in re.findall(r"<(?:a|img|source)\b[^>]*? (?:href|src|srcset)=\"([^\"]+)\"", shown):
            yield number, target
        if match := re.match(r"^\[[^\]]+\]: +(\S+)", shown):
            yield number, match[1]
