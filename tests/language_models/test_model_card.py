"""Model cards: what others wrote stays text, and what is not known is said not to be known."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from mopl.language_models.model_card import Exported, ModelFacts, card, licence_of

HOSTILE = "a|b <script>alert(1)</script> [x](http://y) `c` *d*\n# e"


def test_names_are_text_in_every_part_of_a_card() -> None:
    exported = Exported(form="adapters", objectives=(HOSTILE, "plain"), places=("a_b", "plain"), rank=4)
    facts = ModelFacts(method="clp", training={HOSTILE: HOSTILE}, data=HOSTILE, figures=HOSTILE, front="| a |\n| --- |")
    markdown_it = pytest.importorskip("markdown_it")
    text = ModelCard(card(exported, facts)).text
    tokens = markdown_it.MarkdownIt("commonmark").enable("table").parse(text)
    inside = [child for token in tokens if token.type == "inline" for child in token.children]
    assert not [token for token in (*tokens, *inside) if token.type in ("html_block", "html_inline", "link_open")]
    assert sum(token.type == "heading_open" and token.tag == "h1" for token in tokens) == 1
    shown = "".join(child.content for child in inside)
    assert shown.count("a|b <script>alert(1)</script> [x](http://y) `c` *d* # e") == 6
    rows = [line for line in text.splitlines() if line.startswith("| w1 ")]
    assert len(rows) == 1 and rows[0].replace("\\|", "").count("|") == 4


def test_what_others_wrote_does_not_end_its_code() -> None:
    said = "`a` <b>x</b>\n\n# Heading\n```\n"
    exported = Exported(form="gguf", objectives=("a",), weights=(1.0,), base_file="model.gguf", text=said, stop=said)
    markdown_it = pytest.importorskip("markdown_it")
    tokens = markdown_it.MarkdownIt("commonmark").parse(ModelCard(card(exported, ModelFacts())).text)
    assert [token.content for token in tokens if token.info == "json"] == [json.dumps(said) + "\n"] * 2
    assert "Heading" not in [token.content for token in tokens if token.type == "inline"]


def test_a_card_of_adapters_names_the_command_for_llama_cpp_first_and_a_rank_that_vllm_takes() -> None:
    exported = Exported(form="adapters", objectives=("a", "b"), places=("a", "b"), grid=("w=0.7,0.3",), grid_rank=600)
    text = ModelCard(card(exported, ModelFacts())).text
    assert 0 < text.index("mopl export RUN --gguf DIR") < text.index("convert_lora_to_gguf.py")
    assert "llama-server -m base.gguf --lora-scaled a.gguf:0.7,b.gguf:0.3" in text
    assert "The rank is 600, and vLLM takes 512 at most." in text and "--max-lora-rank" not in text


def test_a_base_model_on_the_hub_is_linked_and_tagged() -> None:
    exported = Exported(form="adapter", objectives=("a", "b"), base="owner/model", weights=(0.7, 0.3), rank=40)
    loaded = ModelCard(card(exported, ModelFacts(dataset="owner/data", data="data")))
    said = loaded.data.to_dict()
    assert said["base_model"] == "owner/model" and said["base_model_relation"] == "adapter"
    assert said["datasets"] == ["owner/data"] and "license" not in said
    assert 'base, folder = "owner/model"' in loaded.text and "--max-lora-rank 64" in loaded.text
    assert "https://huggingface.co/datasets/owner/data" in loaded.text and "Licence: not known" in loaded.text


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("---\nlicense: mit\n---\n", {"license": "mit"}),
        (
            "---\nlicense: other\nlicense_name: own\nlicense_link: https://x.org/l\n---\n",
            {"license": "other", "license_name": "own", "license_link": "https://x.org/l"},
        ),
        (
            "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "own"},
        ),
        ("---\nlicense: other\nlicense_name: /home/alice/licence\n---\n", {"license": "other"}),
        ("---\nlicense: [a\n---\n", {}),
        ("---\nlicense: [mit, apache-2.0]\n---\n", {}),
        ("# No block\nlicense: mit\n", {}),
        ("---\nlicense_name: own\n---\n", {}),
        (b"\xff\xfe", {}),
        (None, {}),
    ],
)  # fmt: skip
def test_a_licence_is_what_the_base_model_s_own_card_says_or_none(written, wanted, tmp_path: Path) -> None:
    if isinstance(written, str):
        (tmp_path / "README.md").write_text(written)
    elif written is not None:
        (tmp_path / "README.md").write_bytes(written)
    assert licence_of(str(tmp_path)) == wanted
    assert licence_of(None) == licence_of("owner/never-downloaded") == {}
