"""The model that a policy was tuned from: the policy itself with everything trained switched off, or another one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from mopl.conditioning.causal_lm import adapters_off, is_peft
from mopl.conditioning.weighted import WeightedModel

# How a run says that the reference is the model itself, with everything that was trained switched off.
OWN_REFERENCE = ("self", "precomputed")


class Reference:
    """The distribution p0 that a model is mixed with.

    Args:
        model: The tuned model.
        reference: Another model that stands for p0; None: the tuned model with adapters and prompt off.

    Raises:
        ValueError: If `reference` is None and the model cannot be its own reference.
    """

    def __init__(self, model: nn.Module, reference: nn.Module | None = None) -> None:
        if reference is None and isinstance(model, WeightedModel):
            if model.record.reference not in OWN_REFERENCE:
                raise ValueError(
                    f"the model was regularised towards {model.record.reference!r}; load that and pass it as reference"
                )
            if not model.has_reference:
                raise ValueError(
                    f"this {type(model).__name__} trains the parameters of the model itself, so it does not hold what "
                    "it was tuned from; load that and pass it as reference"
                )
        if reference is None and not isinstance(model, WeightedModel) and not is_peft(model):
            raise ValueError(
                f"a plain {type(model).__name__} holds no reference to mix with; pass the model that it was tuned from "
                "as reference, or leave scale at 1 and guided_model out"
            )
        self.own = reference is None
        self.model: Any = model if reference is None else reference

    @contextlib.contextmanager
    def active(self) -> Iterator[Any]:
        """Give the model that is p0 inside a `with` block."""
        switched: Any = contextlib.nullcontext()
        if isinstance(self.model, WeightedModel):
            switched = self.model.reference()
        elif self.own:
            switched = adapters_off(self.model)
        with switched:
            yield self.model
