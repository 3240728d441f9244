"""Where virtual tokens stand in rows of text, and which positions they and the text have."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

# Names that models of transformers give to the module that embeds absolute positions.
_POSITION_EMBEDDINGS = ("wpe", "embed_positions", "position_embeddings", "position_embedding", "positions_embed")
_ROTARY_SETTINGS = ("rope_parameters", "rope_scaling", "rope_theta", "rotary_dim", "rotary_pct")
NO_POSITION = -1


class Layout:
    """Virtual tokens right before the first token of each row.

    Args:
        batch: B.
        length: T, positions of text in this call.
        virtual: k; 0 for the reference.
        attention_mask: (B, T'), over the text of this call and of the cache; None if nothing is padded.
        past: Positions in the cache, virtual tokens included.
        device: Where the text is.
    """

    def __init__(
        self,
        batch: int,
        length: int,
        virtual: int,
        attention_mask: Tensor | None,
        past: int,
        device: torch.device,
    ) -> None:
        self.batch, self.length, self.virtual, self.past, self.device = batch, length, virtual, past, device
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

    def positions(
        self,
        position_ids: Tensor | None,
        *,
        offset: int,
        of_prefix: Literal["count", "zero", "none"],
    ) -> Tensor | None:
        """Return the positions of what is new in this call, or None where the model's own count is the same."""
        if self.text_mask is None and of_prefix == "count":
            return None
        if position_ids is not None:
            text = position_ids.to(self.device).expand(self.batch, -1)
        elif self.text_mask is not None:
            text = (self.text_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -self.length :].to(self.device)
        else:
            text = torch.arange(self.text_before, self.text_before + self.length, device=self.device)
            text = text.expand(self.batch, -1)
        text = text + offset
        if not self.enters:
            return text
        front = torch.arange(self.virtual, device=self.device)
        if of_prefix != "count":
            front = torch.full_like(front, 0 if of_prefix == "zero" else NO_POSITION)
        return self.join(front.expand(self.batch, -1), text)

    def shift_labels(self, labels: Tensor | None) -> Tensor | None:  # (B, T) -> (B, k + T)
        """Extend labels; the first token of a row would be predicted by the last virtual token, whose output is cut."""
        if labels is None:
            return None
        first = torch.arange(labels.shape[1], device=labels.device) == (
            0 if self.lead is None else self.lead.to(labels.device)[:, None]
        )
        front = labels.new_full((labels.shape[0], self.virtual), -100)
        return self.join(front, labels.masked_fill(first, -100))


def check_paper_positions(model: Any, takes_positions: bool) -> bool:
    """Return whether a model embeds absolute positions (else it is rotary); raise if it does neither."""
    name = type(model).__name__
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    if takes_positions and not getattr(config, "alibi", False):
        if _position_embedding(model) is not None:
            return True
        if any(getattr(config, setting, None) is not None for setting in _ROTARY_SETTINGS):
            return False
    raise ValueError(f"positions='paper' needs absolute or rotary positions, which {name} has not; use positions='hf'")


def _position_embedding(model: nn.Module) -> nn.Module | None:
    return next((m for name, m in model.named_modules() if name.rpartition(".")[2] in _POSITION_EMBEDDINGS), None)


def silence_position_embedding(model: nn.Module) -> None:
    """Let the position embedding give 0, exactly, for tokens at `NO_POSITION`."""
    module = _position_embedding(model)
    assert module is not None
    if not getattr(module, "_mopl_silenced", False):
        module.register_forward_pre_hook(_before_positions, with_kwargs=True)
        module.register_forward_hook(_after_positions)
        module._mopl_silenced = True  # type: ignore[assignment]


def _before_positions(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    by_name = kwargs.get("position_ids") is not None
    ids = kwargs["position_ids"] if by_name else args[0]
    module._mopl_kept = ids != NO_POSITION
    ids = ids.clamp(min=0)
    return (args, {**kwargs, "position_ids": ids}) if by_name else ((ids, *args[1:]), kwargs)


def _after_positions(module: Any, _: Any, output: Tensor) -> Tensor:
    kept = module.__dict__.pop("_mopl_kept")
    return output * kept[..., None].to(output)
