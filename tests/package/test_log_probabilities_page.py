"""What docs/log_probabilities.md shows runs as it stands; what needs another package names things that are there."""

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "log_probabilities.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SECTIONS = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)


def imports(text: str) -> list[tuple[str, list[str]]]:
    """Return each module that a block imports, with the names that it takes from it."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            found.append((node.module or "", [each.name for each in node.names]))
        elif isinstance(node, ast.Import):
            found.extend((each.name, []) for each in node.names)
    return found


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_runs_or_names_what_is_there(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    needed = imports(BLOCKS[number])
    for module, names in needed:
        if module.split(".")[0] == "mopl":
            loaded = importlib.import_module(module)
            assert all(hasattr(loaded, name) for name in names), (module, names)
    others = {module.split(".")[0] for module, _ in needed} - {"mopl", "torch"}
    if others & {"verl", "openrlhf", "nemo_rl"}:
        compile(BLOCKS[number], f"block {number}", "exec")
        return  # it changes these packages, which this suite leaves alone
    if missing := sorted(name for name in others if importlib.util.find_spec(name) is None):
        pytest.skip(f"{', '.join(missing)} is not installed")
    exec(compile(BLOCKS[number], f"block {number} of log_probabilities.md", "exec"), {"__name__": "__main__"})


def test_the_page_has_its_sections_and_functions() -> None:
    wanted = ["TRL", "verl", "OpenRLHF", "NeMo-RL", "Several ids a row", "Credit of tokens"]
    assert [section for section in SECTIONS if section in wanted] == wanted
    for name in ("verl", "openrlhf", "nemo_rl"):
        module = importlib.import_module(f"mopl.integrations.{name}")
        for function in module.__all__:
            assert function in PAGE or function.replace("from_parallel_logits_to_logprobs", "the same `") in PAGE
