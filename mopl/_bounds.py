"""Upper bounds of settings: a typing error or a damaged file is refused at once instead of filling memory or a week.

They lie far above what is useful. What a setting may not be for other reasons is said where it is declared.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

LARGEST = 2**63 - 1  # of whole numbers that torch takes
_COUNT = 2**20  # of lists, prompts or answers that are in memory together
_TOKENS = 2**24
_WIDTH = 2**16

MOST: dict[str, int] = {
    "steps": 10**8, "base_steps": 10**8, "epochs": _COUNT, "accumulation": _COUNT,
    "batch_size": _COUNT, "lists_per_batch": _COUNT, "prompts_per_step": _COUNT, "samples_per_prompt": _COUNT,
    "rows_at_once": _COUNT, "eval_samples": _COUNT, "tokens_per_batch": 2**31,
    "max_length": _TOKENS, "max_prompt": _TOKENS, "max_new_tokens": _TOKENS, "sample_tokens": _TOKENS,
    "virtual_tokens": _WIDTH, "prompt_rank": _WIDTH, "lora_rank": _WIDTH, "rank": _WIDTH, "width": _WIDTH,
    "features": 10**7, "hidden": _WIDTH, "base_hidden": _WIDTH, "feedforward": _WIDTH * 16, "heads": _WIDTH,
    "layers": 1024, "base_layers": 1024, "sets": _WIDTH, "objectives": _WIDTH,
    "points": 10_000, "bootstrap": 100_000, "seed": 2**64 - 1, "data_seed": 2**64 - 1,
    "queries": 10**8, "items": 10**6,
}  # fmt: skip
# For these, infinity means that there is no limit.
_UNLIMITED = ("gradient_clip", "kl_limit")


def check_bounds(settings: Any) -> None:
    """Raise if a whole number of a dataclass or mapping is larger than its name allows, or another NaN or infinite."""
    values = vars(settings) if dataclasses.is_dataclass(settings) else settings
    assert isinstance(values, Mapping)
    for name, value in values.items():
        for number in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(number, int) and not isinstance(number, bool):
                most = MOST.get(name, LARGEST)
                if number > most:
                    shown = number if number <= LARGEST else f"about 2^{number.bit_length()}"
                    raise ValueError(f"{name} is {shown} but must be at most {most}")
            elif isinstance(number, float) and not math.isfinite(number):
                if math.isnan(number) or name not in _UNLIMITED:
                    raise ValueError(f"{name} is {number} but must be a finite number")
