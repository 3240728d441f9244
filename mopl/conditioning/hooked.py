"""Models whose trade-off is read inside of them: modules ask what the rows of the call are conditioned on.

A subclass registers hooks on modules of the model, and a hook asks `conditions_for(hidden)`. What stands between the
call and the hook is the model's own forward pass, of whatever family.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mopl._arguments import compute_dtype
from mopl._threads import CallOfThread
from mopl.conditioning.sampling import Weights
from mopl.conditioning.weighted import WeightedModel


class HookedModel(WeightedModel):
    """A causal language model with modules inside that are conditioned on the weights of each row."""

    def __init__(self) -> None:
        super().__init__()
        self._call = CallOfThread()

    @property
    def takes_packed_rows(self) -> bool:
        """Each sequence of a packed row has conditions of its own: `position_ids` tell them apart."""
        return True

    def conditions_for(self, hidden: Tensor) -> dict[str, Tensor] | None:
        """Return what a module is conditioned on that gets, or gives, hidden states; for hooks.

        Args:
            hidden: (B, T, d); or (B T, d), as experts get them.

        Returns:
            `weights`, and `beta` (m numbers each) or `kl_weight` (one), where they were passed: (m,) if they are those
            of all rows, else (B, 1, m), or (1, N, m) of packed sequences, so that they broadcast with `hidden`; in
            float32, or float64 as `hidden`. None where nothing is to be conditioned: in the reference.

        Raises:
            RuntimeError: Outside of a call of this model.
            ValueError: If the rows of `hidden` are not those of the weights.
        """
        given = self._call.for_rows(hidden) or {}
        return {name: values.to(compute_dtype(hidden)) for name, values in given.items()} or None

    def forward(
        self,
        *args: Any,
        weights: Weights | None = None,  # (m,) or (B, m)
        beta: Any = None,  # (m,), (1, m) or (B, m)
        kl_weight: Any = None,  # a number or (B,)
        **kwargs: Any,
    ) -> Any:
        """Run the model at the weights of each row, (S, m) for S packed sequences; `args` and `kwargs` are its own.

        Raises:
            ValueError: If weights are missing or do not fit; see `conditions`. The reference ignores them.
        """
        with self._standing_for(self._given(weights, beta, kl_weight), args, kwargs):
            return self.model(*args, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
        *,
        weights: Weights | None = None,  # (m,) or (B, m)
        beta: Any = None,
        kl_weight: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Generate at the weights of each row, as `generate` of transformers does; `kwargs` are its own."""
        given = self._given(weights, beta, kl_weight)
        self._check_count(given, len(input_ids))
        with self._standing(given):  # of more rows than these, where there are beams
            return self.model.generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    def _given(self, weights: Any, beta: Any, kl_weight: Any) -> dict[str, Tensor]:
        """Return the conditions of a call, each (k,) or (B, k); none for the reference."""
        if self._is_reference:
            return {}
        given = self.conditions(
            **{"weights": None, **self._unless_fixed(weights=weights, beta=beta, kl_weight=kl_weight)}
        )
        if "kl_weight" in given:
            given["kl_weight"] = torch.as_tensor(given["kl_weight"])[..., None]
        return {name: values[0] if values.ndim == 2 and len(values) == 1 else values for name, values in given.items()}

    def _check_count(self, given: dict[str, Tensor], rows: int | None) -> None:
        for values in given.values():
            if values.ndim == 2 and rows is not None and len(values) != rows:
                raise ValueError(f"weights has {len(values)} rows but there are {rows}; pass (m,) or one for each row")

    def _standing_for(
        self, given: dict[str, Tensor], args: Any, kwargs: dict[str, Any]
    ) -> contextlib.AbstractContextManager[None]:
        """Return what holds conditions for the time of a forward pass with these arguments."""
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim)
        rows, sequence = next((len(value) for value in tensors), None), None
        positions = kwargs.get("position_ids")
        if rows == 1 and positions is not None and kwargs.get("attention_mask") is None:
            if any(values.ndim == 2 for values in given.values()):
                sequence = (positions[0] == positions[0, 0]).cumsum(-1) - 1
        self._check_count(given, rows if sequence is None else int(sequence[-1]) + 1)
        return self._standing(given, rows, sequence)

    @contextlib.contextmanager
    def _standing(
        self, given: dict[str, Tensor] | None, rows: int | None = None, sequence: Tensor | None = None
    ) -> Iterator[None]:
        call = self._call
        before = call.conditions, call.rows, call.sequence
        call.conditions, call.rows, call.sequence = given, rows, sequence
        try:
            yield
        finally:
            call.conditions, call.rows, call.sequence = before

    # ---------------------------------------------------------------- gradient checkpointing

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Compute activations again in the backward pass, each layer with the conditions of its forward pass.

        Args:
            gradient_checkpointing_kwargs: Keywords of `torch.utils.checkpoint`, but for `use_reentrant=True` and
                `context_fn`, which carries the conditions.
            **options: Further ones of the model's own method.

        Raises:
            ValueError: If one of those two is passed.
        """
        kwargs = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if kwargs["use_reentrant"] or "context_fn" in kwargs:
            raise ValueError("context_fn carries the coefficients and needs use_reentrant=False; leave both out")
        kwargs["context_fn"] = self._checkpoint_contexts
        model = self.causal_lm
        prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        getattr(model, f"{prefix}_checkpointing_enable")(kwargs, **options)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """`gradient_checkpointing_enable` under its newer name."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **options)

    def _checkpoint_contexts(self) -> tuple[Any, Any]:
        """Return what surrounds a layer's forward pass, and its second one with the conditions of now."""
        call = self._call
        return contextlib.nullcontext(), self._standing(call.conditions, call.rows, call.sequence)
