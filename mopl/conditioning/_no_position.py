"""Texts whose virtual tokens stand at no position: no embedding of a position is added to them."""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor

from mopl._rows.styles import POSITION_EMBEDDINGS
from mopl.conditioning.causal_lm import text_config

_ROTARY_SETTINGS = ("rope_parameters", "rope_scaling", "rope_theta", "rotary_dim", "rotary_pct")
NO_POSITION = -1
_CALL = threading.local()  # `kept`: which tokens have a position, between the two hooks of one embedding


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


def _before_positions(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    by_name = kwargs.get("position_ids") is not None
    ids = kwargs["position_ids"] if by_name else args[0]
    _CALL.kept = ids != NO_POSITION
    ids = ids.clamp(min=0)
    return (args, {**kwargs, "position_ids": ids}) if by_name else ((ids, *args[1:]), kwargs)


def _after_positions(_: Any, __: Any, output: Tensor) -> Tensor:
    return output * _CALL.kept[..., None].to(output)
