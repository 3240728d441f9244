"""Tokenizers that write something in front of every text by themselves: virtual tokens, or weights in words."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mopl._extras import require

PLACE = "mopl_front"  # name of what is inserted, in the post-processor of the tokenizers library
SAMPLES = ("Hello world", "a", "  two  spaces\nand a line break", "")
CHAT_NAME = "a conversation"
CHAT = [{"role": "user", "content": "Hello there"}]


@dataclass(frozen=True)
class Front:
    """A tokenizer, a copy, and what it writes in front."""

    tokenizer: Any
    ids: list[int]
    tokens: list[str]  # their texts
    after_bos: bool  # whether they stand after a beginning-of-sequence token: words do, virtual tokens do not


def prepare_tokenizer(tokenizer: Any, virtual: int = 0, *, text: str | None = None) -> Front:
    """Return a copy that puts `virtual` new tokens before every text, or the tokens of `text` after its first token."""
    original, tokenizer = tokenizer, copy.deepcopy(tokenizer)
    if text is None:
        require("tokenizers")
        from tokenizers import AddedToken

        names = [f"<|mopl_{i}|>" for i in range(virtual)]
        first = len(tokenizer)
        tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
        ids = tokenizer.convert_tokens_to_ids(names)
        if ids != list(range(first, first + virtual)):
            raise ValueError(f"the tokenizer has {names[0]} already; export from the base model's own tokenizer")
        shown = "".join(names)
    else:
        ids = original(text, add_special_tokens=False)["input_ids"]
        names, shown = original.convert_ids_to_tokens(ids), text
    after_bos = text is not None
    _extend_post_processor(tokenizer, ids, names, after_bos)
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        tokenizer.chat_template = {name: _extend_template(t, shown, after_bos) for name, t in templates.items()}
    elif templates:
        tokenizer.chat_template = _extend_template(templates, shown, after_bos)
    return Front(tokenizer, ids, names, after_bos)


def _extend_template(template: str, shown: str, after_bos: bool) -> str:
    """Return a chat template that writes `shown` in front of all, or after its beginning-of-sequence token."""
    if not after_bos:
        return "{{- " + json.dumps(shown) + " }}" + template
    # The empty outputs keep white space as the template has it: Jinja drops a line break behind a block, and spaces
    # before one that begins a line. (Its sign + does so, too, but llama.cpp's reader of templates does not know it.)
    # Jinja itself drops one line break at the end.
    return (
        "{% set mopl_written %}{{ '' }}"
        + template.removesuffix("\n")
        + "{{ '' }}{% endset %}{%- set mopl_start = "
        + "bos_token if bos_token and mopl_written.startswith(bos_token) else '' -%}{{- mopl_start + "
        + json.dumps(shown)
        + " + mopl_written[mopl_start | length:] -}}"
    )


def _extend_post_processor(tokenizer: Any, ids: list[int], names: list[str], after_bos: bool) -> None:
    """Let the tokenizers library insert tokens: where it writes a template already, into that, else with a new one."""
    from tokenizers import Tokenizer

    backend = tokenizer.backend_tokenizer
    whole = json.loads(backend.to_str())
    processor = whole.get("post_processor") or {"type": "Sequence", "processors": []}
    parts = processor["processors"] if processor["type"] == "Sequence" else [processor]
    template = next((part for part in parts if part["type"] == "TemplateProcessing"), None)
    entry, token = {"id": PLACE, "ids": ids, "tokens": names}, {"SpecialToken": {"id": PLACE, "type_id": 0}}
    if template is not None:
        for name in ("single", "pair"):
            pieces = template[name]
            place = next(i for i, piece in enumerate(pieces) if "Sequence" in piece) if after_bos else 0
            pieces.insert(place, token)
        template["special_tokens"][PLACE] = entry
    else:
        other = next((part for part in parts if part["type"] != "ByteLevel"), None)
        if other is not None:
            raise ValueError(
                f"the tokenizer's post-processor is a {other['type']}, into which nothing can be inserted; give it a "
                "TemplateProcessing that does the same"
            )
        text, second = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
        added = {
            "type": "TemplateProcessing",
            "single": [token, text],
            "pair": [token, text, second],
            "special_tokens": {PLACE: entry},
        }
        whole["post_processor"] = {"type": "Sequence", "processors": [*parts, added]} if parts else added
    backend.post_processor = Tokenizer.from_str(json.dumps(whole)).post_processor


def check_saved(path: Path, original: Any, front: Front) -> None:
    """Make a saved tokenizer one that every version loads as it was written, and raise unless it does what it should.

    Classes of single models (LlamaTokenizer and others) make their post-processor anew when they are loaded, so the
    files name the plain class, which takes what tokenizer.json says. It should write the front before the original's
    tokens.
    """
    require("transformers")
    from transformers import AutoTokenizer

    file = path / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name in ("add_bos_token", "add_eos_token", "auto_map", "add_prefix_space", "legacy"):
        settings.pop(name, None)
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    made = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    pairs = [(text, *(list(each(text)["input_ids"]) for each in (made, original))) for text in SAMPLES]
    if original.chat_template:
        pairs.append((CHAT_NAME, _chat(made), _chat(original)))
    for text, found, before in pairs:
        bos = original.bos_token_id
        start = 1 if front.after_bos and before and bos is not None and before[0] == bos else 0
        wanted = [*before[:start], *front.ids, *before[start:]]
        if found != wanted:
            remedy = (
                "set tokenizer.chat_template = None to export without it" if text == CHAT_NAME else "write it by hand"
            )
            raise ValueError(
                f"the exported tokenizer gives {found[:24]} for {text!r} but the model was trained on {wanted[:24]}: "
                f"here the beginning of a text changes the tokens after it; {remedy}"
            )


def _chat(tokenizer: Any) -> list[int]:
    template = tokenizer.chat_template
    name = {} if not isinstance(template, dict) or "default" in template else {"chat_template": next(iter(template))}
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True, **name)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
