"""What README.md and docs/ refer to is there: languages of blocks, links, anchors, pictures, options, files, names."""

import ast
import importlib
import re
from functools import cache
from pathlib import Path

import pytest

for package in ("transformers", "peft", "accelerate", "httpx"):
    pytest.importorskip(package)

from doc_commands import options_of_mopl
from doc_pages import PAGES, ROOT, SHELL, blocks_of, links_of, name_of, prose_of, slugs_of

IDS = [name_of(page) for page in PAGES]
ROOT_PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}  # by docs/hooks.py
# Options of other programs that the pages name: accelerate, pip, vLLM, SGLang, llama.cpp, pytest, MkDocs.
OTHERS = {
    "--num_processes", "--use_fsdp", "--fsdp_version", "--index-url", "--max-lora-rank", "--max-loras", "--enable-lora",
    "--max-cpu-loras", "--lora-modules", "--lora-target-modules", "--lora-paths", "--lora-init-without-apply", "--lora",
    "--lora-scaled", "--lora-backend", "--module", "--multi_gpu", "--cpu", "--no-deps", "--fsdp_offload_params",
    "--enable-prompt-embeds", "--jinja", "--no-jinja", "--strict", "--shell",
}  # fmt: skip


@cache
def options_of_scripts() -> set[str]:
    """Return every option that a script of the project defines, and those of pytest's configuration."""
    found: set[str] = set()
    for folder in ("bench", "docs", "examples", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            found |= set(re.findall(r"[\"'](--[a-z][\w-]*)[\"']", file.read_text(encoding="utf-8")))
    return found


@cache
def anchors(page: Path) -> set[str]:
    return slugs_of(page)


def is_there(dotted: str) -> bool:
    """Say whether a name such as mopl.losses.listwise_dpo exists: the anchors of the reference are such names."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_block_names_its_language(page: Path) -> None:
    bare = [block.where for block in blocks_of(page) if not block.language]
    assert not bare, f"write ```text, ```sh or another language: {', '.join(bare)}"


def test_commands_of_the_readme_and_the_tutorials_fit_the_width_of_the_site() -> None:
    """At 1,280 pixels a block shows 86 characters; what stands further right is out of view."""
    first = [page for page in PAGES if page.name == "README.md" or page.parent.name == "tutorials"]
    wide = [
        f"{name_of(page)}:{block.line + number}: {len(line)} characters"
        for page in first
        for block in blocks_of(page)
        if block.language in SHELL
        for number, line in enumerate(block.text.splitlines())
        if len(line) > 86
    ]
    assert not wide, "end a line with \\ and go on in the next: " + ", ".join(wide)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for number, target in links_of(page):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        there = (page.parent / path).resolve() if path else page
        if there.parent == ROOT / "docs" and there.name in ROOT_PAGES:
            there = ROOT / ROOT_PAGES[there.name]
        where = f"{name_of(page)}:{number}: {target}"
        if not there.exists():
            broken.append(f"{where}: there is no such file")
        elif ROOT not in (there, *there.parents):
            broken.append(f"{where}: outside of the project")
        elif anchor and there.suffix == ".md" and anchor not in anchors(there):
            if not (anchor.startswith("mopl.") and is_there(anchor)):
                broken.append(f"{where}: there is no such heading")
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_option_that_the_text_names_exists(page: Path) -> None:
    commands, unknown = options_of_mopl(), []
    known = set().union(*commands.values()) | options_of_scripts() | OTHERS
    for number, line in enumerate(prose_of(page), 1):
        for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", line):
            options = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", span))
            if re.match(r"(python -m )?(pytest|pip|shtab|vllm|accelerate|llama-server|deepspeed)\b", span):
                continue
            match = re.match(r"mopl ([a-z]+)\b", span)
            allowed = commands[match[1]] | commands[""] if match and match[1] in commands else known
            unknown += [f"{name_of(page)}:{number}: {option} in `{span}`" for option in sorted(options - allowed)]
            if match and match[1] not in commands:
                unknown.append(f"{name_of(page)}:{number}: there is no command `mopl {match[1]}`")
    assert not unknown, "\n".join(unknown)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_file_and_name_of_mopl_that_the_text_names_exists(page: Path) -> None:
    missing = []
    for number, line in enumerate(prose_of(page), 1):
        for file in re.findall(r"`((?:mopl|tests|bench|docs|examples)/[\w/.-]+)`", line):
            if not (ROOT / file).exists() and not re.search(r"\b[A-Z]{2,}\b", file):  # CARD stands for any name
                missing.append(f"{name_of(page)}:{number}: {file}")
        for name in re.findall(r"`(mopl(?:\.[A-Za-z_]\w*)+)(?:\([^`]*)?`", line):
            if not is_there(name) and name not in ("mopl.json",):
                missing.append(f"{name_of(page)}:{number}: {name}")
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_what_code_takes_from_mopl_is_there(page: Path) -> None:
    """Also in blocks that do not run."""
    missing = []
    for block in blocks_of(page):
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.text, block.where)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mopl":
                names = [f"{node.module}.{each.name}" for each in node.names]
            elif isinstance(node, ast.Import):
                names = [each.name for each in node.names if each.name.split(".")[0] == "mopl"]
            else:
                continue
            missing += [
                f"{name_of(page)}:{block.line + node.lineno - 1}: {name}" for name in names if not is_there(name)
            ]
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("program", ["verl", "openrlhf", "nemo_rl"])
def test_every_function_for_another_program_is_on_the_page(program: str) -> None:
    page = (ROOT / "docs" / "log_probabilities.md").read_text(encoding="utf-8")
    names = importlib.import_module(f"mopl.integrations.{program}").__all__
    missing = [
        name
        for name in names
        if name not in page and name.replace("from_parallel_logits_to_logprobs", "the same `") not in page
    ]
    assert not missing, missing


def test_every_picture_says_what_it_shows() -> None:
    without = [
        f"{name_of(page)}:{number}"
        for page in PAGES
        for number, line in enumerate(prose_of(page), 1)
        for alt in [*re.findall(r"!\[([^\]]*)\]\(", line), *re.findall(r"<img (?:alt=\"([^\"]*)\")?", line)]
        if len(alt) < 10
    ]
    assert not without, f"pictures need a text for those who do not see them: {', '.join(without)}"
