"""The Python blocks of docs/reward_models.md run as they stand, one after the other."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_blocks_of_the_page_run(monkeypatch):
    for package in ("transformers", "accelerate", "datasets", "sentence_transformers"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    page = (ROOT / "docs" / "reward_models.md").read_text(encoding="utf-8")
    names: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        exec(compile(block, "docs/reward_models.md", "exec"), names)
    assert names["values"].shape == (1, 2) and len(names["functions"]) == 2
    assert {"eval_polite_accuracy", "eval_polite_ndcg@10", "eval_brief_accuracy"} <= names["found"].keys()
