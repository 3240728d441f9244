"""The Python of docs/grpo.md runs as it stands, one block after the other."""

import re
from pathlib import Path

import pytest

pytest.importorskip("grpo_cases")
from tiny_language_models import build, tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "grpo.md"


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    build().save_pretrained("MODEL")
    tokenizer().save_pretrained("MODEL")
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    names = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    said = capsys.readouterr().out
    assert "[0.9, 0.1] w1 w2" in said and "[0.1, 0.9] w1 w2" in said
    assert Path("front.html").is_file() and names["trainer"].state.global_step == 2
