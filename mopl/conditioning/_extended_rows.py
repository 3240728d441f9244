"""Rows of text with further positions in each, of virtual tokens or of words: where these stand, and what follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mopl._rows.styles import positions_of

IGNORE_INDEX = -100
_OUTPUTS = ("logits", "log_probs", "logsumexp", "entropy", "kl")


class ExtendedRows:
    """Padded rows, or the sequences of a packed row, with k positions more for each text.

        text        [pad <s> t1 t2]      [t0 t1 t2 pad]      packed   [s0 s1 t0 t1 t2]
        extended    [pad <s> v v t1 t2]  [v v t0 t1 t2 pad]           [v v s0 s1 v t0 t1 t2]

    They stand right in front of a text, or behind the token that begins it, so that a padded row is the row alone. The
    output of a text's token is the one that predicts what follows it in the text: behind a token that begins the text
    the last further position gives it. Rows that get fewer than others are padded further: on the left, but where rows
    are padded on the right. Where all get as many, the outputs of the text are therefore the last T.

    Transformers knows a packed row by what it lacks, an attention mask, and by positions that start again; both stay
    true, where the further positions count as the first of their text.

    Args:
        text: (B, T) or (B, T, d), the text of this call; (1, N) or (1, N, d) packed.
        counts: k of each row or sequence; 0 for the reference.
        attention_mask: (B, T'), over the text of this call and of the cache; None if nothing is padded.
        position_ids: (1, N) of a packed row, each sequence counted from 0; anything else is no packed row.
        past: Positions in the cache, the further ones included, which went in with the first call.
        bos: The token that begins a text, if they are to stand behind it.

    Raises:
        ValueError: If the mask does not cover the text, or the cache ends before a text begins.
    """

    def __init__(
        self,
        text: Tensor,
        counts: Sequence[int],
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past: int = 0,
        bos: int | None = None,
    ) -> None:
        device = text.device
        self.length, self.text_mask, self.enters = text.shape[1], attention_mask, past == 0
        self.packed = attention_mask is None and position_ids is not None
        self.longest, same = max(counts, default=0), len(set(counts)) <= 1
        self.uniform = same and not self.packed
        self.padded = attention_mask is not None or not (same or self.packed)  # whether a mask is needed
        before = max(past - self.longest, 0)  # positions of text in the cache
        if attention_mask is not None and attention_mask.shape[1] != before + self.length:
            raise ValueError(
                f"attention_mask covers {attention_mask.shape[1]} positions of text but there are {before} in the "
                f"cache and {self.length} in the call; pass (B, {before + self.length})"
            )
        # No copy from the host, which a GPU would wait for, where one number says it.
        count = torch.full((len(counts),), self.longest, device=device) if same else torch.tensor(counts, device=device)
        count, own = count[:, None], torch.arange(self.longest, device=device)
        self.real, right = own < count, False  # (B or S, k): some rows get fewer
        mask = attention_mask
        if mask is None:
            mask = torch.ones(len(text), before + self.length, dtype=torch.long, device=device)
        if self.packed:
            assert position_ids is not None
            segment = (position_ids[0] == 0).cumsum(-1) - 1  # (N,)
            lead = torch.searchsorted(segment, torch.arange(len(counts), device=device))[:, None]
            shift = count.cumsum(0) - count
        else:
            segment = None
            lead = (mask.cumsum(-1) == 0).sum(-1, keepdim=True).to(device)  # padding on the left
            right = not same and bool((mask[:, -1] == 0).any())
            shift = torch.zeros_like(count) if same or right else self.longest - count
        if past and self.longest and attention_mask is not None and bool((lead > before).any()):
            raise ValueError(
                f"the cache of {before} positions of text ends inside the padding of a row, so what is in front of its "
                "text went in before it began; let the first call reach every row's first token"
            )
        begins = torch.zeros_like(lead)
        if bos is not None and self.enters:
            first = text[0][lead] if self.packed else text.gather(1, lead.clamp(max=self.length - 1))
            begins = (first == bos).to(lead.dtype)

        def of_tokens(each: Tensor) -> Tensor:  # (B, 1) as it is; (S, 1) -> (1, N)
            return each if segment is None else each[segment, 0][None]

        at, start = torch.arange(mask.shape[1], device=device), lead + begins
        self.place = at + of_tokens(shift + count)  # of the text's outputs
        self.first, moved = at == of_tokens(lead), at < of_tokens(start)
        self.own_place = torch.where(moved, self.place - of_tokens(count), self.place)  # of its tokens
        self.offset = begins + own  # positions of what is added, in its own text
        self.added = of_tokens(count) * ~moved  # to the positions of the text
        front = start + shift + own
        if self.packed:
            front = front[self.real][None]
        elif not same:
            front = torch.where(self.real, front, mask.shape[1] + own if right else own - count)
        self.total = mask.shape[1] + front.shape[1]
        self.order = torch.cat([front.expand(len(text), -1), self.own_place.expand(len(text), -1)], 1).argsort(1)
        self._mask, self._kept = mask, 0

    def join(self, front: Tensor, text: Tensor) -> Tensor:  # (B or S, k, ...), (B, T', ...) -> (B, k + T', ...)
        """Put what belongs to the further positions, and to the text's tokens, to their places."""
        front = front[self.real][None] if self.packed else front
        return _picked(torch.cat([front.to(text), text], 1), self.order)

    def mask(self) -> Tensor:  # (B, k + T')
        """Return the attention mask over everything."""
        return self.join(self.real, self._mask)

    def positions(self, text: Tensor | None = None, *, front: int | None = None) -> Tensor:
        """Return the positions of what is new in this call.

        Args:
            text: (B, T) or (1, T), those of the text alone; as the mask counts them if None.
            front: The one position of all that is in front of a text, which the text does not count then; by default
                that has the first positions of its text.
        """
        text = positions_of(self._mask)[:, -self.length :] if text is None else text
        text = text.to(self.place.device).expand(len(self.order), -1)
        offset = self.offset if front is None else torch.full_like(self.offset, front)
        if front is None:
            text = text + self.added[:, -self.length :]
        return self.join(offset, text) if self.enters else text

    def adapt(self, kwargs: dict[str, Any], *, last: bool) -> None:
        """Adapt keywords that belong to positions: `labels`, `logits_to_keep`, and a fused model's `targets`.

        With `last`, a fused model is given the targets of the last T positions alone, where these are the text's.
        """
        kept = kwargs.get("logits_to_keep", 0)
        some = isinstance(kept, Tensor) or bool(kept)
        if self.packed:
            if kwargs.get("use_cache") or some:
                raise ValueError(
                    "a packed row can use neither use_cache nor logits_to_keep; pass attention_mask, or none"
                )
            kwargs["use_cache"] = False  # with a cache, transformers would not look for packed sequences
        if "targets" in kwargs and self.text_mask is not None:
            # A position of padding in front of a text may be one of those in front of it now, which predict nothing.
            seen = self.text_mask[:, -self.length :].to(kwargs["targets"].device).bool()
            kwargs["targets"] = kwargs["targets"].masked_fill(~seen, IGNORE_INDEX)
        if not self.enters:
            return
        if some and self.uniform and isinstance(kept, Tensor):
            kwargs["logits_to_keep"] = torch.where(kept < 0, kept, kept + self.longest)
        elif some and not self.uniform:
            self._kept = kwargs.pop("logits_to_keep")
        if "labels" in kwargs:  # the first token of a text is not predicted, as without what is in front of it
            labels = kwargs["labels"].masked_fill(self.first.to(kwargs["labels"].device), IGNORE_INDEX)
            kwargs["labels"] = self._spread(labels, IGNORE_INDEX, self.own_place)
        if "targets" in kwargs and not (last and self.uniform):
            shape = kwargs["targets"].shape
            for name, fill in (("targets", IGNORE_INDEX), ("temperature", 1.0), ("reference_hidden", 0.0)):
                value = kwargs.get(name)
                if isinstance(value, Tensor) and value.ndim:
                    kwargs[name] = self._spread(
                        value.expand(shape) if name == "temperature" else value, fill, self.place
                    )

    def cut(self, output: Any) -> Any:
        """Drop the outputs of all but the text."""
        for name in _OUTPUTS:
            if getattr(output, name, None) is not None:
                setattr(output, name, self._text_of(getattr(output, name)))
        if getattr(output, "divergences", None):
            output.divergences = [self._text_of(values) for values in output.divergences]
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(self._text_of(hidden) for hidden in output.hidden_states)
        if isinstance(self._kept, Tensor) or self._kept:
            output.logits = output.logits[:, self._kept if isinstance(self._kept, Tensor) else slice(-self._kept, None)]
        return output

    def _text_of(self, values: Tensor) -> Tensor:
        if self.uniform or not self.enters:
            return values[:, max(values.shape[1] - self.length, 0) :]
        return _picked(values, self.place)

    def _spread(self, values: Tensor, fill: float, place: Tensor) -> Tensor:  # (B, T, ...) -> (B, k + T, ...)
        made = values.new_full((len(values), self.total, *values.shape[2:]), fill)
        return made.scatter(1, _index(place, values), values)


def _index(place: Tensor, values: Tensor) -> Tensor:
    """Return places (B, n) as `gather` and `scatter` take them for values (B, N, ...)."""
    place = place.to(values.device).expand(len(values), -1)
    return place.reshape(*place.shape, *[1] * (values.ndim - 2)).expand(*place.shape, *values.shape[2:])


def _picked(values: Tensor, place: Tensor) -> Tensor:
    return values.gather(1, _index(place, values))
