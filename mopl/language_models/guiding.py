"""Whether a small model can guide a large one: what of two models and their tokenizers can be compared before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mopl.conditioning import WeightedModel
from mopl.conditioning.weighted import causal_lm_of
from mopl.language_models.models import vocabulary_of

_PARTS = {"model": "merges or other rules", "normalizer": "normalizer", "pre_tokenizer": "pre-tokenizer"}


def check_same_tokenizer(tokenizer: Any, other: Any, name: str = "guided_tokenizer") -> None:
    """Raise unless two tokenizers of transformers give each text the same tokens, and each token the same text.

    Compared are the vocabulary, the added tokens with where they swallow spaces, and of fast tokenizers the merges, or
    other rules of the model, the normalizer and the pre-tokenizer. Not compared is what a model is told around a text:
    tokens at its beginning and the chat template, for which those of the first count.

    Raises:
        ValueError: If they differ, with the first difference.
    """
    first, second = tokenizer.get_vocab(), other.get_vocab()
    if first != second:
        moved = [token for token in first if first[token] != second.get(token)]
        moved += [token for token in second if token not in first]
        one = min(moved, key=lambda token: (first.get(token, len(first)), token))  # vocabularies come in any order
        example = f"{one!r} is {first.get(one, 'not there')} and {second.get(one, 'not there')}"
        raise ValueError(
            f"{name} has another vocabulary ({len(second)} tokens) than the tokenizer of the model ({len(first)}): "
            f"{example}; take a model of the same family, whose tokens are the same"
        )
    ours, theirs = _added(tokenizer), _added(other)
    if ours != theirs:
        token = next(i for i in sorted({*ours, *theirs}) if ours.get(i) != theirs.get(i))
        raise ValueError(
            f"{name} has other added tokens than the tokenizer of the model: {token} is {theirs.get(token)} there and "
            f"{ours.get(token)} here; take a model of the same family, whose tokens are the same"
        )
    rules, other_rules = _rules(tokenizer), _rules(other)
    for part, meaning in _PARTS.items():
        if rules.get(part) != other_rules.get(part):
            raise ValueError(
                f"{name} splits texts otherwise than the tokenizer of the model: its {meaning} differ; take a model "
                "of the same family, whose tokens are the same"
            )


def _added(tokenizer: Any) -> dict[int, tuple[Any, ...]]:
    tokens = getattr(tokenizer, "added_tokens_decoder", {})
    return {i: (t.content, t.lstrip, t.rstrip, t.single_word, t.normalized) for i, t in tokens.items()}


def _rules(tokenizer: Any) -> Mapping[str, Any]:
    """Return how a fast tokenizer splits texts; nothing of one in Python, which does not say."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return {} if backend is None else json.loads(backend.to_str())


def check_guided(large: Any, tokenizer: Any, model: Any, own: Any) -> None:
    """Raise where a model cannot be guided.

    Args:
        large: The model that is to be guided.
        tokenizer: Its tokenizer, or None, where only sizes can be compared.
        model: The small model.
        own: The small model's tokenizer of transformers.

    Raises:
        ValueError: With the reason and what to do.
    """
    if isinstance(large, WeightedModel):
        raise ValueError(
            f"guided_model is a {type(large).__name__}, which would need weights of its own; pass the plain model, or "
            "its merge(weights)"
        )
    if causal_lm_of(large) is causal_lm_of(model):
        raise ValueError(
            "guided_model is the model that guides it, whose adapters would be on; load it once more, or leave "
            "guided_model out to be guided by scale alone"
        )
    if getattr(large.config, "is_encoder_decoder", False):
        raise ValueError(f"guided_model is a {type(large).__name__}, an encoder-decoder; pass a causal language model")
    if tokenizer is not None:
        check_same_tokenizer(own, tokenizer)
    sizes, tokens = [vocabulary_of(causal_lm_of(each)) for each in (large, model)], max(own.get_vocab().values()) + 1
    if sizes[0] != sizes[1] and min(size for size in sizes if size is not None) < tokens:
        raise ValueError(
            f"guided_model has embeddings of {sizes[0]} tokens and the model of {sizes[1]}, but the tokenizer has "
            f"{tokens}; guide a model of the same tokenizer"
        )
