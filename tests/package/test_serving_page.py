"""What docs/serving.md says of mopl itself is so: commands and options, variables, names to import, requests."""

import ast
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from mopl.cli import build_parser
from mopl.conditioning import weights_name, weights_of_name

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def options_of(command):
    """Return the options of a command of mopl."""
    (subparsers,) = (each for each in build_parser()._actions if hasattr(each, "choices") and each.choices)
    return set(subparsers.choices[command]._option_string_actions)


def test_every_command_of_the_page_is_one_that_the_parser_takes():
    shown = [line for _, text in BLOCKS for line in text.replace("\\\n", " ").splitlines() if line.startswith("mopl ")]
    assert len(shown) >= 2
    for line in shown:
        build_parser().parse_args(shlex.split(line, comments=True)[1:])
    named = re.findall(r"`mopl ([a-z]+)( [^`]*)?`", PAGE)  # in the text, where a run or a folder may be left out
    assert len(named) >= 3
    for command, rest in named:
        options = re.findall(r"--[a-z][a-z-]*", rest)
        assert set(options) <= options_of(command), (command, rest)


def test_the_variables_of_the_resolver_are_those_of_the_table():
    source = (ROOT / "mopl" / "integrations" / "vllm.py").read_text(encoding="utf-8")
    described = set(re.findall(r"^\| `(MOPL_\w+)` \|", PAGE, re.MULTILINE))
    read = {word for word in re.findall(r"\"(MOPL_VLLM_\w+)\"", source)}
    assert described == read == set(re.findall(r"MOPL_VLLM_\w+", PAGE))
    assert described == set(re.findall(r"^    (MOPL_VLLM_\w+)  ", source, re.MULTILINE))  # its own list
    from mopl.conditioning.adapter_cache import MAX_CACHED
    from mopl.conditioning.adapter_files import VLLM_RANKS

    assert f"in one life of the server | {MAX_CACHED} |" in PAGE
    assert f"one of {', '.join(map(str, VLLM_RANKS))};" in PAGE


def test_what_the_examples_import_is_there():
    checked = 0
    for language, text in BLOCKS:
        if language == "python":
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ImportFrom) and node.module.startswith("mopl"):
                    module = importlib.import_module(node.module)
                    assert all(hasattr(module, each.name) for each in node.names)
                    checked += len(node.names)
    assert checked >= 5
    for name in set(re.findall(r"`mopl\.([\w.]+)`", PAGE)) - {"json"}:  # mopl.json is a file
        parent, _, last = f"mopl.{name}".rpartition(".")
        try:
            importlib.import_module(f"mopl.{name}")
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(parent), last), name


def test_bodies_of_requests_are_json_and_names_of_trade_offs_are_as_they_are_written():
    bodies = [body for _, text in BLOCKS for body in re.findall(r"-d '(\{.*?\})'", text, re.DOTALL)]
    bodies += [body for _, text in BLOCKS for body in re.findall(r"'(\{\"name\".*?\})'", text)]
    assert len(bodies) >= 6 and all(isinstance(json.loads(body), dict) for body in bodies)
    (merged,) = (json.loads(body)["parameters"]["merged_adapters"] for body in bodies if "merged_adapters" in body)
    assert sum(c * c for c in merged["weights"]) == pytest.approx(1, abs=2e-6)
    names = set(re.findall(r"w=[\d.]+,[\d.]+", PAGE)) - {"w=0.70,0.30"}  # which the page says is not how it is written
    assert names and all(weights_name(weights_of_name(name.rstrip("."), 2)) == name.rstrip(".") for name in names)


def test_links_and_files_that_the_page_names_are_there():
    anchors = {
        re.sub(r"[^\w -]", "", title).replace(" ", "-").lower() for title in re.findall(r"^#+ (.*)$", PAGE, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("https://"):
            assert (ROOT / "docs" / target).exists(), target
    for name in re.findall(r"`(tests/[\w/.]+|mopl/[\w/.]+)`", PAGE):
        assert (ROOT / name).exists(), name
