"""Where a response ends: at the tokens that model and tokenizer name, and at what the chat template ends a turn with.

What a template ends a turn with is `ListTokenizer.turn_end`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mopl._extras import require
from mopl.language_models.tokenization import ListTokenizer


@dataclass(frozen=True)
class TurnEnds:
    """What ends a response."""

    tokenizer: Any  # a tokenizer of transformers
    ids: tuple[int, ...]  # tokens, each of which ends it
    # A text that ends it, where a template writes its end in tokens that also occur within answers.
    text: str | None = None

    def cut(self, tokens: Sequence[int]) -> tuple[list[int], bool]:
        """Return the tokens of a response up to the one that ends it, and whether one does."""
        length = next((i + 1 for i, token in enumerate(tokens) if token in self.ids), None)
        if self.text is not None:
            shown = tokens if length is None else tokens[: length - 1]
            length = next((n for n in range(1, len(shown) + 1) if self.is_written(shown[:n])), length)
        return list(tokens[:length]), length is not None

    def is_written(self, tokens: Sequence[int]) -> bool:
        """Say whether tokens end in the text that ends a response."""
        assert self.text is not None
        # Every token is a character at least, or a part of one; the last may hold more than the end.
        return self.text in self._decoded(tokens[-len(self.text.encode()) - 1 :])

    def texts(self, responses: Sequence[Sequence[int]]) -> list[str]:
        """Return responses that `cut` gave as texts, without what ends them and without special tokens."""
        found = []
        for tokens in responses:
            if self.text is not None and self.text in (whole := self._decoded(tokens)):
                found.append(whole[: whole.index(self.text)])
            else:
                ended = bool(tokens) and tokens[-1] in self.ids
                found.append(self.tokenizer.decode(list(tokens[:-1] if ended else tokens), skip_special_tokens=True))
        return found

    def _decoded(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

    def criteria(self, prompt_length: int) -> list[Any]:
        """Return the criteria of `generate` that stop each row at the text; the tokens go into its configuration."""
        if self.text is None:
            return []
        require("transformers", what="generation")
        import torch
        from transformers import StoppingCriteria

        written = self.is_written

        class AtText(StoppingCriteria):
            def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
                rows = input_ids[:, prompt_length:].tolist()
                return torch.tensor([written(row) for row in rows], dtype=torch.bool, device=input_ids.device)

        return [AtText()]


def end_tokens(generation_config: Any) -> list[int]:
    """Return the tokens that a `generation_config` of transformers says end a text, which says one, several or none."""
    given = getattr(generation_config, "eos_token_id", None)
    return [given] if isinstance(given, int) else list(given or ())


def turn_ends(encoder: ListTokenizer, generation_config: Any = None) -> TurnEnds:
    """Return what ends a response: the model's own list, the end-of-sequence token, the chat template's end.

    Args:
        encoder: How prompts become tokens; in plain text there is no template's end.
        generation_config: That of the model.
    """
    tokenizer = encoder.tokenizer
    ids = end_tokens(generation_config)
    end = encoder.turn_end
    for token in (tokenizer.eos_token_id, end):
        if isinstance(token, int) and token not in ids:
            ids.append(token)
    return TurnEnds(tokenizer, tuple(ids), end if isinstance(end, str) else None)


def write_turn_end(model: Any, tokenizer: Any) -> None:
    """Let a model's `generation_config` name the token that ends a turn of the chat template; a text it cannot name."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    known = end_tokens(config)
    end = ListTokenizer(tokenizer, max_length=None, append_eos=False).turn_end
    if isinstance(end, int) and end not in known:
        known += [] if known or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        config.eos_token_id = list(dict.fromkeys([*known, end]))
        config._from_model_config = False  # else versions of transformers may make it anew, without it
