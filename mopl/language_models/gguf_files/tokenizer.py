"""A tokenizer of the tokenizers library as the vocabulary of a GGUF file.

llama.cpp splits texts by code of its own, chosen by one word ("pre"): a wrong word gives no error but other tokens. So
the word is taken from the tokenizer's own pre-tokenizer, which must be one of those below, piece by piece; each was
compared on hard texts. The library's normalisation to NFC is not done by llama.cpp: a text that is not in NFC (an e
and an accent that are two characters) gives other tokens there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from mopl._extras import require
from mopl.language_models.gguf_files.families import REMEDY
from mopl.language_models.gguf_files.files import Entry

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = ("ByteLevel", True)
_BYTES = ("ByteLevel", False)
# What splits a text, and whether a piece that is a token is left whole without merges: llama.cpp's word for it.
PRE_TOKENIZERS = {
    ((_GPT2,), False): "gpt-2",
    ((("Digits", True), _GPT2), False): "smollm",
    ((("Split", _WORDS + r"\p{N}{1,3}" + _REST), _BYTES), True): "llama-bpe",
    ((("Split", _WORDS + r"\p{N}{1,3}" + _REST), _BYTES), False): "smaug-bpe",
    ((("Split", _WORDS + r"\p{N}" + _REST), _BYTES), False): "qwen2",
}
_CHAT = [{"role": "user", "content": "a"}]
_SAMPLES = ("Hello there, 12345.", "~zq#\n~")


def tokenizer_entries(tokenizer: Any, size: int, ends: Sequence[int], front: Sequence[int] = ()) -> list[Entry]:
    """Return what a GGUF file says of a tokenizer.

    Args:
        tokenizer: One of transformers, of the tokenizers library.
        size: Rows of the model's embeddings; those without a token get one that is never written.
        ends: Tokens at which generation ends, at most three.
        front: Tokens that the tokenizer puts before every text, behind a beginning-of-sequence token or before it.
            llama.cpp puts one token there at most, so the chat template must write them all.

    Raises:
        ValueError: If llama.cpp would split texts otherwise; the message says why.
    """
    require("gguf", "tokenizers", what="GGUF", extra="demo-lm")
    from gguf import Keys

    whole = json.loads(_backend(tokenizer).to_str())
    pre = pre_tokenizer_of(whole)
    names, kinds = _tokens(tokenizer, whole, size)
    begins = _begins(tokenizer, list(front))
    entries = [
        Entry(Keys.Tokenizer.MODEL, "gpt2", "STRING"),
        Entry(Keys.Tokenizer.PRE, pre, "STRING"),
        Entry(Keys.Tokenizer.LIST, names, "STRING"),
        Entry(Keys.Tokenizer.TOKEN_TYPE, kinds, "INT32"),
        Entry(Keys.Tokenizer.MERGES, [m if isinstance(m, str) else " ".join(m) for m in whole["model"]["merges"]],
              "STRING"),
        Entry(Keys.Tokenizer.ADD_BOS, begins, "BOOL"),
        # Never, whatever the tokenizer puts behind texts: llama.cpp's server would put it behind the prompt of a chat,
        # too, and what a model is asked to go on from has no end, in transformers' chats as in mopl's prompts.
        Entry(Keys.Tokenizer.ADD_EOS, False, "BOOL"),
    ]  # fmt: skip
    own = tokenizer.eos_token_id
    ends = list(dict.fromkeys([*([own] if own in ends else []), *ends]))
    if not 1 <= len(ends) <= 3:
        raise ValueError(
            f"generation ends at the tokens {ends} but a GGUF file names one to three; set eos_token_id of the "
            "model's generation_config, or eos_token of the tokenizer"
        )
    for key, token in (
        (Keys.Tokenizer.BOS_ID, tokenizer.bos_token_id),
        (Keys.Tokenizer.UNK_ID, tokenizer.unk_token_id),
        (Keys.Tokenizer.PAD_ID, tokenizer.pad_token_id),
        *zip((Keys.Tokenizer.EOS_ID, Keys.Tokenizer.EOT_ID, Keys.Tokenizer.EOM_ID), ends, strict=False),
    ):
        if token is not None:
            entries.append(Entry(key, token, "UINT32"))
    return entries + _templates(tokenizer, begins, list(front))


def _backend(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"a {type(tokenizer).__name__} does not say how it splits texts; load a tokenizer of the tokenizers library"
        )
    return backend


def pre_tokenizer_of(whole: dict[str, Any]) -> str:
    """Return llama.cpp's word for how a tokenizer, the content of tokenizer.json, splits texts."""
    model, normalizer = whole["model"], whole.get("normalizer")
    plain = {"type": "BPE", "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
             "byte_fallback": False}  # fmt: skip
    for name, value in plain.items():
        if (model.get(name) or None) != (value or None):
            raise ValueError(f"the tokenizer's model has {name}={model.get(name)!r} but must have {value!r}; {REMEDY}")
    if normalizer is not None and normalizer["type"] != "NFC":
        raise ValueError(f"the tokenizer's normalizer is a {normalizer['type']} but must be none or NFC; {REMEDY}")
    parts = whole.get("pre_tokenizer") or {"type": "Sequence", "pretokenizers": []}
    parts = parts["pretokenizers"] if parts["type"] == "Sequence" else [parts]
    found = tuple(_piece(part) for part in parts)
    pre = PRE_TOKENIZERS.get((found, bool(model.get("ignore_merges"))))
    if pre is None:
        raise ValueError(
            f"the tokenizer splits texts by {parts} with ignore_merges={bool(model.get('ignore_merges'))}, which is "
            f"none of {', '.join(PRE_TOKENIZERS.values())} of llama.cpp; {REMEDY}"
        )
    return pre


def _piece(part: dict[str, Any]) -> tuple[Any, ...]:
    """Return what matters of a part of a pre-tokenizer."""
    match part:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return "ByteLevel", part.get("use_regex", True)
        case {"type": "Digits"}:
            return "Digits", part["individual_digits"]
        case {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": regex}}:
            return "Split", regex
    return ("unknown", json.dumps(part))


def _tokens(tokenizer: Any, whole: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Return the texts of all tokens and their types."""
    from gguf import TokenType
    from tokenizers.pre_tokenizers import ByteLevel

    by_id = {id: token for token, id in whole["model"]["vocab"].items()}
    missing = set(ByteLevel.alphabet()) - whole["model"]["vocab"].keys()
    if missing and whole["model"].get("unk_token") is not None:  # without one both leave such bytes out
        raise ValueError(
            f"the tokenizer writes {whole['model']['unk_token']} for {len(missing)} of the 256 bytes, which have no "
            f"token, and llama.cpp would leave them out; {REMEDY}"
        )
    added = {entry["id"]: entry for entry in whole["added_tokens"]}
    if (most := max((*by_id, *added))) >= size:
        raise ValueError(f"the tokenizer has a token {most} but the model embeds {size}; are they of one model?")
    names, kinds = [], []
    for id in range(size):
        entry = added.get(id)
        if entry is not None:
            strips = [name for name in ("lstrip", "rstrip", "single_word") if entry[name]]
            if strips:
                raise ValueError(f"the token {entry['content']!r} has {strips[0]}, which llama.cpp has not; {REMEDY}")
            kinds.append(TokenType.CONTROL if entry["special"] else TokenType.USER_DEFINED)
            names.append(entry["content"])
        else:
            kinds.append(TokenType.NORMAL if id in by_id else TokenType.UNUSED)
            names.append(by_id.get(id, f"[PAD{id}]"))
    check_overlaps([(entry["content"], entry["normalized"]) for entry in added.values()])
    if len(set(names)) < len(names):
        raise ValueError("two tokens of the tokenizer have one text, which llama.cpp does not take")
    return names, [int(kind) for kind in kinds]


def check_overlaps(tokens: Sequence[tuple[str, bool]]) -> None:
    """Raise unless llama.cpp finds the same added tokens in every text as the tokenizers library does.

    In a text the library takes the first one, the longest of those that begin there; those that are looked for in
    normalised texts come last. llama.cpp looks for the longest one in the whole text, then for the next. They find
    others only where two overlap, so texts of two that do are split both ways.

    Args:
        tokens: The text of each, and whether it is looked for in normalised text.
    """
    texts = list(dict.fromkeys(text for text, _ in tokens if text))
    beginning: dict[str, list[str]] = {}
    for text in texts:
        for end in range(1, len(text)):
            beginning.setdefault(text[:end], []).append(text)
    late = [text for text, normalized in tokens if text and normalized]
    early = [text for text, normalized in tokens if text and not normalized]
    overlaps = [(one, other, one) for one in late for other in early if other in one]
    overlaps += [
        (text, other, text + other[len(text) - start :])
        for text in texts
        for start in range(1, len(text))
        for other in beginning.get(text[start:], ())
    ]
    for one, other, whole in overlaps:
        there = [text for text in texts if text in whole]
        first = _first_found(_first_found([whole], [t for t in there if t in early]), [t for t in there if t in late])
        for second in (one, other):  # llama.cpp says nothing of the order of equally long ones
            pieces = [whole]
            for text in sorted(there, key=lambda text: (-len(text.encode()), text != second)):
                pieces = _first_found(pieces, [text])
            if pieces != first:
                raise ValueError(
                    f"the tokenizer's added tokens {one!r} and {other!r} overlap, and llama.cpp splits {whole!r} into "
                    f"{_parts(pieces)} where the tokenizer splits it into {_parts(first)}; take one of them out of the "
                    "tokenizer, or serve the model with transformers or vLLM"
                )


def _first_found(pieces: Sequence[str | tuple[str]], tokens: Sequence[str]) -> list[str | tuple[str]]:
    """Split texts at tokens, which become tuples: the first one, the longest of those that begin there."""
    if not tokens:
        return list(pieces)
    pattern = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))
    found: list[str | tuple[str]] = []
    for piece in pieces:
        if isinstance(piece, tuple):
            found.append(piece)
            continue
        end = 0
        for match in pattern.finditer(piece):
            found += [piece[end : match.start()], (match[0],)]
            end = match.end()
        found.append(piece[end:])
    return [piece for piece in found if piece]


def _parts(pieces: Sequence[str | tuple[str]]) -> list[str]:
    return [piece if isinstance(piece, str) else piece[0] for piece in pieces]


def added_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens that a tokenizer puts before a text and after it."""
    found = set()
    for text in _SAMPLES:
        with_, without = (list(tokenizer(text, add_special_tokens=each)["input_ids"]) for each in (True, False))
        places = [i for i in range(len(with_)) if with_[i : i + len(without)] == without]
        start = places[-1] if places else len(with_)
        found.add((tuple(with_[:start]), tuple(with_[start + len(without) :])))
    if len(found) > 1:
        raise ValueError(f"the tokenizer adds other tokens to {_SAMPLES[0]!r} than to {_SAMPLES[1]!r}; {REMEDY}")
    ((before, after),) = found
    return list(before), list(after)


def _begins(tokenizer: Any, front: list[int]) -> bool:
    """Return whether llama.cpp is to add a beginning-of-sequence token."""
    before, _ = added_tokens(tokenizer)
    bos = tokenizer.bos_token_id
    if before not in (front, [*front, bos], [bos, *front]):
        raise ValueError(
            f"the tokenizer adds {before} before a text but llama.cpp adds a beginning-of-sequence token at most; "
            f"{REMEDY}"
        )
    return bool(before) and not front


def _templates(tokenizer: Any, begins: bool, front: list[int]) -> list[Entry]:
    """Return the chat templates, which must write `front` before all, or after a beginning-of-sequence token."""
    from gguf import Keys

    templates = tokenizer.chat_template
    if not templates:
        if front:
            raise ValueError(
                f"the tokenizer puts {len(front)} tokens of the trade-off before every text; llama.cpp does so in a "
                "chat template alone, and there is none. Give the tokenizer a chat template, or serve the model with "
                "transformers or vLLM (`mopl export RUN --weights W.. DIR`)"
            )
        return []
    templates = templates if isinstance(templates, dict) else {"default": templates}
    if tokenizer.bos_token is None and any("bos_token" in template for template in templates.values()):
        raise ValueError("the chat template writes bos_token, which the tokenizer has not; take it out of the template")
    for name in templates if begins or front else ():
        text = tokenizer.apply_chat_template(
            _CHAT, chat_template=templates[name], tokenize=False, add_generation_prompt=True
        )
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if front and front not in (ids[: len(front)], ids[1 : len(front) + 1]):
            raise ValueError(
                f"the chat template {name} does not write the tokens of the trade-off that the tokenizer puts before "
                "every text; export the model anew, with this template in its tokenizer"
            )
        # llama.cpp's server adds the token to what the template writes unless it stands there.
        if begins and ids[:1] != [tokenizer.bos_token_id]:
            raise ValueError(
                f"the tokenizer puts {tokenizer.bos_token} before texts and its chat template does not write it, so "
                "llama.cpp would put it before chats, where it was not in training; let the template write "
                "{{ bos_token }}, or the tokenizer add none (add_bos_token=False)"
            )
    named = [Entry(Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name), template, "STRING")
             for name, template in templates.items() if name != "default"]  # fmt: skip
    if named:
        named.append(Entry(Keys.Tokenizer.CHAT_TEMPLATES, [n for n in templates if n != "default"], "STRING"))
    if "default" in templates:
        named.append(Entry(Keys.Tokenizer.CHAT_TEMPLATE, templates["default"], "STRING"))
    return named
