"""Where virtual tokens stand in rows of text, and which positions they and the text have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from mopl._rows.styles import POSITION_EMBEDDINGS, positions_of
from mopl.conditioning.causal_lm import text_config

_ROTARY_SETTINGS = ("rope_parameters", "rope_scaling", "rope_theta", "rotary_dim", "rotary_pct")
OfPrefix = Literal["count", "zero", "none"]  # the positions of virtual tokens
NO_POSITION = -1
IGNORE_INDEX = -100


class Layout:
    """Virtual tokens right before the first token of each row.

    Args:
        text: (B, T) or (B, T, d), the text of this call.
        virtual: k; 0 for the reference.
        attention_mask: (B, T'), over the text of this call and of the cache; None if nothing is padded.
        past: Positions in the cache, virtual tokens included.
    """

    def __init__(self, text: Tensor, virtual: int, attention_mask: Tensor | None, past: int) -> None:
        self.batch, length = text.shape[:2]
        self.length, self.virtual, self.past, self.device = length, virtual, past, text.device
        self.text_mask = attention_mask
        text_before = max(past - virtual, 0)
        if attention_mask is not None and attention_mask.shape[1] != text_before + length:
            raise ValueError(
                f"attention_mask covers {attention_mask.shape[1]} positions of text but there are {text_before} in the "
                f"cache and {length} in the call; pass (B, {text_before + length})"
            )
        self.text_before = text_before
        # Padding on the left, (B,): what stands before the first token.
        self.lead = None if attention_mask is None else (attention_mask.cumsum(-1) == 0).sum(-1)
        if past and self.lead is not None and bool((self.lead > text_before).any()):
            raise ValueError(
                f"the cache of {text_before} positions of text ends inside the padding of a row, so the virtual tokens "
                "went in before its text began; let the first call reach every row's first token"
            )

    @property
    def enters(self) -> bool:
        """Whether the virtual tokens enter in this call; in later ones they are in the cache."""
        return self.virtual > 0 and self.past == 0

    def join(self, front: Tensor, text: Tensor) -> Tensor:  # (B, k, ...), (B, T, ...) -> (B, k + T, ...)
        """Put what belongs to the virtual tokens before each row's first token."""
        joined = torch.cat([front, text], 1)
        if self.lead is None or not self.virtual:
            return joined
        place = torch.arange(joined.shape[1], device=joined.device)
        lead = self.lead.to(joined.device)[:, None]
        source = torch.where(place < lead + self.virtual, place - lead, place)
        source = torch.where(place < lead, place + self.virtual, source)
        source = source.reshape(*source.shape, *[1] * (joined.ndim - 2))
        return joined.gather(1, source.expand(joined.shape))

    def mask(self, *, required: bool) -> Tensor | None:
        """Return the attention mask over everything, (B, k + T'), or None where nothing is padded."""
        if self.text_mask is None:
            if not required:
                return None
            # Without a mask, positions that do not count up would be taken for packed sequences.
            length = self.virtual + self.text_before + self.length
            return torch.ones(self.batch, length, dtype=torch.long, device=self.device)
        return self.join(self.text_mask.new_ones(self.text_mask.shape[0], self.virtual), self.text_mask)

    def positions(self, position_ids: Tensor | None, *, of_prefix: OfPrefix) -> Tensor | None:
        """Return the positions of what is new in this call, or None where the model's own count is the same."""
        if self.text_mask is None and of_prefix == "count":
            return None
        if position_ids is not None:
            text = position_ids.to(self.device).expand(self.batch, -1)
        elif self.text_mask is not None:
            text = positions_of(self.text_mask)[:, -self.length :].to(self.device)
        else:
            text = torch.arange(self.text_before, self.text_before + self.length, device=self.device)
            text = text.expand(self.batch, -1)
        front = torch.arange(self.virtual, device=self.device)
        if of_prefix == "count":
            text = text + self.virtual
        else:
            front = torch.full_like(front, 0 if of_prefix == "zero" else NO_POSITION)
        if not self.enters:
            return text
        return self.join(front.expand(self.batch, -1), text)

    def cut(self, output: Any) -> Any:
        """Drop what the virtual tokens gave. (A fused head scores the last T positions by itself.)"""
        return map_outputs(output, ("logits",), lambda tensor: tensor[:, -self.length :])

    def adapt(self, kwargs: dict[str, Any]) -> None:
        """Adapt keywords that count positions: `logits_to_keep`, and `targets` of a fused model."""
        if isinstance(kwargs.get("logits_to_keep"), Tensor) and self.enters:
            kwargs["logits_to_keep"] = kwargs["logits_to_keep"] + self.virtual
        if "targets" in kwargs and self.text_mask is not None:
            # On the left, the last padding position has become the last virtual token, which predicts nothing.
            kept = self.text_mask[:, -self.length :].bool()
            kwargs["targets"] = kwargs["targets"].masked_fill(~kept, IGNORE_INDEX)

    def shift_labels(self, labels: Tensor | None) -> Tensor | None:  # (B, T) -> (B, k + T)
        """Extend labels; the first token of a row would be predicted by the last virtual token, whose output is cut."""
        if labels is None:
            return None
        first = torch.arange(labels.shape[1], device=labels.device) == (
            0 if self.lead is None else self.lead.to(labels.device)[:, None]
        )
        front = labels.new_full((labels.shape[0], self.virtual), IGNORE_INDEX)
        return self.join(front, labels.masked_fill(first, IGNORE_INDEX))


class PackedLayout:
    """Virtual tokens before each sequence of a packed row.

    Transformers knows a packed row by what it lacks, an attention mask, and by positions that start again; both stay
    true with virtual tokens in, where these count as the first positions of their sequence.

    Args:
        position_ids: (1, N), each sequence counted from 0.
        virtual: k; 0 for the reference.
    """

    def __init__(self, position_ids: Tensor, virtual: int) -> None:
        starts = position_ids[0] == 0
        if not bool(starts[:1].all()):
            raise ValueError("position_ids of a packed row must start at 0 with each sequence; pass attention_mask too")
        self.text = position_ids
        self.length, self.virtual = position_ids.shape[1], virtual
        segment = starts.cumsum(-1) - 1  # (N,)
        self.batch = int(segment[-1]) + 1 if self.length else 0
        device = position_ids.device
        self.place = torch.arange(self.length, device=device) + virtual * (segment + 1)  # of text, in the whole row
        first = torch.searchsorted(segment, torch.arange(self.batch, device=device))  # of each sequence, in the text
        before = first + virtual * torch.arange(self.batch, device=device)
        self.front_place = (before[:, None] + torch.arange(virtual, device=device)).reshape(-1)

    @property
    def enters(self) -> bool:
        """Whether virtual tokens enter."""
        return self.virtual > 0

    def join(self, front: Tensor, text: Tensor) -> Tensor:  # (S, k, ...), (1, N, ...) -> (1, N + S k, ...)
        """Put virtual tokens before their sequences."""
        place = torch.cat([self.front_place, self.place]).to(text.device)
        return torch.cat([front.flatten(0, 1), text[0]])[place.argsort()][None]

    def _spread(self, text: Tensor, fill: float) -> Tensor:  # (1, N) -> (1, N + S k)
        return self.join(text.new_full((self.batch, self.virtual), fill), text)

    def mask(self, *, required: bool) -> None:
        """Return no mask."""

    def positions(self, position_ids: Tensor | None, *, of_prefix: OfPrefix) -> Tensor:
        """Return positions (1, N + S k) that start again with each sequence's first virtual token, and count it."""
        front = torch.arange(self.virtual, device=self.text.device).expand(self.batch, -1)
        return self.join(front, self.text + self.virtual)

    def cut(self, output: Any) -> Any:
        """Drop what the virtual tokens gave."""
        names = ("logits", "log_probs", "logsumexp", "entropy")
        return map_outputs(output, names, lambda tensor: tensor[:, self.place.to(tensor.device)])

    def adapt(self, kwargs: dict[str, Any]) -> None:
        """Adapt keywords that count positions."""
        if kwargs.get("use_cache") or kwargs.get("logits_to_keep"):
            raise ValueError("a packed row can use neither use_cache nor logits_to_keep; pass attention_mask, or none")
        kwargs["use_cache"] = False  # with a cache, transformers would not look for packed sequences
        if "targets" in kwargs:
            kwargs["targets"] = self._spread(kwargs["targets"], IGNORE_INDEX)
            if isinstance(kwargs.get("temperature"), Tensor) and kwargs["temperature"].ndim:
                kwargs["temperature"] = self._spread(kwargs["temperature"].expand(1, self.length), 1.0)

    def shift_labels(self, labels: Tensor | None) -> Tensor | None:  # (1, N) -> (1, N + S k)
        """Extend labels; no first token of a sequence is predicted."""
        if labels is None:
            return None
        return self._spread(labels.masked_fill(self.text.to(labels.device) == 0, IGNORE_INDEX), IGNORE_INDEX)


def map_outputs(output: Any, names: tuple[str, ...], select: Callable[[Tensor], Tensor]) -> Any:
    for name in names:
        if getattr(output, name, None) is not None:
            setattr(output, name, select(getattr(output, name)))
    if getattr(output, "hidden_states", None) is not None:
        output.hidden_states = tuple(select(hidden) for hidden in output.hidden_states)
    return output


def silence_positions(model: Any, takes_positions: bool) -> bool:
    """Let a model's embedding of absolute positions give 0, exactly, for tokens at `NO_POSITION`.

    Say whether it has one, or else is rotary; raise if it is neither.
    """
    config = text_config(model)
    if takes_positions and not getattr(config, "alibi", False):
        embeddings = (m for name, m in model.named_modules() if name.rpartition(".")[2] in POSITION_EMBEDDINGS)
        if (module := next(embeddings, None)) is not None:
            if not getattr(module, "_mopl_silenced", False):
                module.register_forward_pre_hook(_before_positions, with_kwargs=True)
                module.register_forward_hook(_after_positions)
                module._mopl_silenced = True
            return True
        if any(getattr(config, setting, None) is not None for setting in _ROTARY_SETTINGS):
            return False
    raise ValueError(
        f"positions='paper' needs absolute or rotary positions, which {type(model).__name__} has not; use "
        "positions='hf'"
    )


def _before_positions(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    by_name = kwargs.get("position_ids") is not None
    ids = kwargs["position_ids"] if by_name else args[0]
    module._mopl_kept = ids != NO_POSITION
    ids = ids.clamp(min=0)
    return (args, {**kwargs, "position_ids": ids}) if by_name else ((ids, *args[1:]), kwargs)


def _after_positions(module: Any, _: Any, output: Tensor) -> Tensor:
    kept = module.__dict__.pop("_mopl_kept")
    return output * kept[..., None].to(output)
