"""Rows of text with tokens written into each: where these stand, and where the outputs of the text are then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mopl.conditioning._prefix_layout import IGNORE_INDEX, map_outputs

_OUTPUTS = ("logits", "log_probs", "logsumexp", "entropy", "kl")


class WrittenRows:
    """Padded rows, or the sequences of a packed row, with words in front of each text or behind what begins it.

        text        [pad <s> t1 t2]      [t0 t1 t2 pad]
        written     [pad <s> w w t1 t2]  [w w t0 t1 t2 pad]

    The output of a text's token is the one that predicts what follows it in the text: behind a token that begins the
    text the words' last one does. Rows whose words are fewer are padded further: on the left, but where rows are padded
    on the right.

    Args:
        text: (B, T), or (1, N) packed.
        words: The tokens to write, for each row or sequence.
        attention_mask: (B, T); None if nothing is padded.
        position_ids: (1, N) of a packed row, each sequence counted from 0; or of padded rows what the model is to get.
        bos: The token that begins a text, if the tokenizer has one.
    """

    def __init__(
        self,
        text: Tensor,
        words: Sequence[Sequence[int]],
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        bos: int | None,
    ) -> None:
        device, length = text.device, text.shape[1]
        self.length, self.text_mask = length, attention_mask
        self.packed = attention_mask is None and position_ids is not None
        counts = torch.tensor([len(each) for each in words], device=device)
        at, self.longest = torch.arange(length, device=device), int(counts.max())
        self.uniform = not self.packed and bool((counts == self.longest).all())
        front: Tensor  # where the words stand
        if self.packed:
            assert position_ids is not None
            segment = (position_ids[0] == 0).cumsum(-1) - 1  # (N,)
            first = torch.searchsorted(segment, torch.arange(len(words), device=device))  # (S,)
            start = first + self._begins(text[0, first], bos)
            before = counts.cumsum(0) - counts
            self.place = (at + (before + counts)[segment])[None]
            self.first = (at == first[segment])[None]
            moved = (at < start[segment])[None]
            own = torch.cat([torch.arange(len(each), device=device) for each in words])
            of_word = torch.arange(len(words), device=device).repeat_interleave(counts)
            front = ((start + before)[of_word] + own)[None]
            tokens, real = torch.tensor([[t for each in words for t in each]], device=device), torch.ones_like(front)
            back = counts[segment][None]
            offset = (start - first)[of_word][None] + own
        else:
            mask = torch.ones_like(text) if attention_mask is None else attention_mask
            lead = (mask.cumsum(-1) == 0).sum(-1, keepdim=True)  # (B, 1)
            start = lead + self._begins(text.gather(1, lead.clamp(max=length - 1)), bos)
            right = bool((mask[:, -1] == 0).any())
            back, spare = counts[:, None], self.longest - counts[:, None]
            shift = torch.zeros_like(spare) if right else spare
            self.place, self.first, moved = at + shift + back, at == lead, at < start
            own = torch.arange(self.longest, device=device)
            padding = length + own if right else own - back
            front = torch.where(own < back, start + shift + own, padding)
            tokens = torch.tensor([[*each, *[0] * (self.longest - len(each))] for each in words], device=device)
            real, offset = (own < back).long(), start - lead + own
        self.own_place = torch.where(moved, self.place - back, self.place)  # of the tokens, not of their outputs
        self.total = length + front.shape[1]
        self.input_ids = self._joined(front, tokens, text)
        self.attention_mask = self.position_ids = None
        if not self.packed and (attention_mask is not None or not self.uniform):
            self.attention_mask = self._joined(front, real, torch.ones_like(text) if attention_mask is None else mask)
        if position_ids is not None:
            given = position_ids.to(device).expand(len(text), -1)
            self.position_ids = self._joined(front, offset, given + back * ~moved)

    @staticmethod
    def _begins(tokens: Tensor, bos: int | None) -> Tensor:
        return torch.zeros_like(tokens) if bos is None else (tokens == bos).to(tokens.dtype)

    def _joined(self, front: Tensor, words: Tensor, text: Tensor) -> Tensor:
        rows = text.new_zeros(len(text), self.total)
        rows.scatter_(1, self.own_place.expand(text.shape), text)
        return rows.scatter_(1, front.expand(len(text), -1), words.to(text).expand(len(text), -1))

    def spread(self, values: Tensor, fill: float, *, of_outputs: bool = True) -> Tensor:  # (B, T, ...) -> (B, T', ...)
        """Put what belongs to the text's outputs, or to its tokens, to their places."""
        place = (self.place if of_outputs else self.own_place).to(values.device).expand(values.shape[:2])
        index = place.reshape(*place.shape, *[1] * (values.ndim - 2)).expand(values.shape)
        made = values.new_full((len(values), self.total, *values.shape[2:]), fill)
        return made.scatter(1, index, values)

    def labels(self, labels: Tensor | None) -> Tensor | None:
        """Extend labels; the first token of a text is not predicted, as without words."""
        if labels is None:
            return None
        return self.spread(
            labels.masked_fill(self.first.to(labels.device), IGNORE_INDEX), IGNORE_INDEX, of_outputs=False
        )

    def adapt(self, kwargs: dict[str, Any]) -> None:
        """Adapt keywords that belong to positions: `targets` of a fused model and what comes with them."""
        if "targets" not in kwargs:
            return
        targets = kwargs["targets"]
        if self.text_mask is not None:  # padding in front of a text has the place of a word now
            targets = targets.masked_fill(self.text_mask.to(targets.device) == 0, IGNORE_INDEX)
        kwargs["targets"] = self.spread(targets, IGNORE_INDEX)
        if isinstance(kwargs.get("temperature"), Tensor) and kwargs["temperature"].ndim:
            kwargs["temperature"] = self.spread(kwargs["temperature"].expand(targets.shape), 1.0)
        if kwargs.get("reference_hidden") is not None:
            kwargs["reference_hidden"] = self.spread(kwargs["reference_hidden"], 0.0)

    def cut(self, output: Any) -> Any:
        """Drop the outputs of the words."""

        def select(values: Tensor) -> Tensor:
            if self.uniform:
                return values[:, -self.length :]
            place = self.place.to(values.device).expand(len(values), -1)
            return values.gather(
                1, place.reshape(*place.shape, *[1] * (values.ndim - 2)).expand(*place.shape, *values.shape[2:])
            )

        return map_outputs(output, _OUTPUTS, select)


def mask_behind_words(mask: Tensor, counts: Tensor) -> Tensor:  # (B, T), (B,) -> (B, K + T)
    """Return the mask of rows whose words went into the cache, padded on the left, before this call."""
    longest = int(counts.max())
    joined = torch.cat([mask.new_ones(len(mask), longest), mask], 1)
    begins = (mask.cumsum(-1) == 0).sum(-1, keepdim=True) + longest  # the text, behind its words
    at = torch.arange(joined.shape[1], device=mask.device)
    joined = joined.masked_fill(at < begins, 1)
    return joined.masked_fill(at < begins - counts.to(mask.device)[:, None], 0)
