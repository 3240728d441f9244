"""Models whose trade-off is read inside of them: modules ask what the rows of the call are conditioned on.

A subclass registers hooks on modules of the model, and a hook asks `conditions_for(hidden)`. What stands between the
call and the hook is the model's own forward pass, of whatever family.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mopl._arguments import compute_dtype
from mopl._threads import CallOfThread
from mopl.conditioning.causal_lm import check_prompts
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
            hidden: (B, T, d); or (B T, d), all tokens of all rows. Not some tokens, as experts get them: whose they are
                nothing tells, unless the weights are those of all rows.

        Returns:
            `weights`, and `beta` (m numbers each) or `kl_weight` (one), where they were passed: (m,) if they are those
            of all rows, else (B, 1, m), or (1, N, m) of packed sequences, so that they broadcast with `hidden`; in
            float32, or float64 as `hidden`. None where nothing is to be conditioned: in the reference.

        Raises:
            RuntimeError: Outside of a call of this model.
            ValueError: If the rows of `hidden` are not those of the weights.
        """
        dtype = compute_dtype(hidden)
        given = self._call.once(
            "all", hidden, lambda: {n: v.to(dtype) for n, v in (self._call.for_rows(hidden) or {}).items()}
        )
        return dict(given) or None

    def forward(
        self,
        *args: Any,
        weights: Weights | None = None,  # (m,) or (B, m)
        beta: Any = None,  # (m,), (1, m) or (B, m)
        kl_weight: Any = None,  # a number or (B,)
        **kwargs: Any,
    ) -> Any:
        """Run the model at the weights of each row.

        Args:
            *args: What the model inside takes.
            weights: w, (m,) for all rows, (B, m), or (S, m) for S packed sequences; on the simplex.
            beta: β, of a model that `takes_beta`.
            kl_weight: α, of a model that `takes_kl_weight`.
            **kwargs: What the model inside takes.

        Returns:
            What the model inside returns.

        Raises:
            ValueError: If weights are missing or do not fit; see `conditions`. The reference ignores them.
        """
        given, kwargs = self._given(weights, beta, kl_weight), uncached(kwargs)
        with self._standing_for(given, args, kwargs):
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
        """Generate at the weights of each row, as `generate` of transformers does.

        Args:
            input_ids: (B, T) tokens of the prompts, padded on the left.
            attention_mask: (B, T), 0 where a row is padded.
            weights: w, (m,) for all rows or (B, m); on the simplex.
            beta: β, of a model that `takes_beta`.
            kl_weight: α, of a model that `takes_kl_weight`.
            **kwargs: Those of transformers, such as `max_new_tokens`.

        Returns:
            What `generate` of transformers returns: by default the tokens of prompts and answers, (B, T + new).

        Raises:
            ValueError: If weights are missing or do not fit, or prompts are not padded on the left.
        """
        if attention_mask is not None:
            check_prompts(input_ids, attention_mask, None)
        given = self._given(weights, beta, kl_weight)
        with self._generating(given, len(input_ids)):
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
        rows, tokens = _size_of(args, kwargs)
        sequence, positions = None, kwargs.get("position_ids")
        if rows == 1 and positions is not None and kwargs.get("attention_mask") is None:
            if any(values.ndim == 2 for values in given.values()):
                sequence = (positions[0] == positions[0, 0]).cumsum(-1) - 1
        self._check_count(given, rows if sequence is None else int(sequence[-1]) + 1)
        return _Standing(self._call, given, rows, tokens, sequence)

    @contextlib.contextmanager
    def _generating(self, given: dict[str, Tensor], rows: int) -> Iterator[None]:
        """Hold conditions while `generate` runs: of more rows than these, where there are beams."""
        self._check_count(given, rows)
        with contextlib.ExitStack() as held:
            held.enter_context(_Standing(self._call, given, None, None, None))
            if any(values.ndim == 2 for values in given.values()):
                measure = functools.partial(_measure, self._call)
                held.callback(self.causal_lm.register_forward_pre_hook(measure, with_kwargs=True).remove)
            yield

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
        # No method of this model: copies of its layers would hold a copy of all of it.
        kwargs["context_fn"] = functools.partial(_contexts, self._call)
        model = self.causal_lm
        prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        getattr(model, f"{prefix}_checkpointing_enable")(kwargs, **options)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """`gradient_checkpointing_enable` under its newer name."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **options)


def uncached(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords of a forward pass, with the cache off where sequences are packed.

    With one, transformers would not look for them, and each would read those before it.
    """
    positions, others = kwargs.get("position_ids"), ("attention_mask", "past_key_values")
    if positions is None or len(positions) != 1 or any(kwargs.get(name) is not None for name in others):
        return kwargs
    if kwargs.get("use_cache") is False or not bool((positions[0, 1:] == positions[0, 0]).any()):
        return kwargs
    if kwargs.get("use_cache"):
        raise ValueError("a packed row cannot use use_cache; leave it out, or pass padded rows and attention_mask")
    return {**kwargs, "use_cache": False}


class _Standing:
    """Holds the conditions of a thread's call inside a `with` block, which may be entered many times."""

    def __init__(self, call: CallOfThread, *held: Any) -> None:
        self.call, self.held, self.before = call, held, []

    def __enter__(self) -> None:
        self.before.append(self.call.held)
        self.call.held = self.held

    def __exit__(self, *_: object) -> None:
        self.call.held = self.before.pop()


def _contexts(call: CallOfThread) -> tuple[Any, Any]:
    """Return what surrounds a layer's forward pass, and its second one with the conditions of now."""
    return contextlib.nullcontext(), _Standing(call, *call.held)


def _measure(call: CallOfThread, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Note the size of a forward pass that `generate` makes; a pre-hook of the model."""
    call.rows, call.tokens = _size_of(args, kwargs)


def _size_of(args: Any, kwargs: dict[str, Any]) -> tuple[int | None, int | None]:
    """Return B and B T of the arguments of a forward pass."""
    texts = (*(kwargs.get(name) for name in ("input_ids", "inputs_embeds")), *args)
    text = next((text for text in texts if isinstance(text, Tensor) and text.ndim), None)
    if text is None:
        return None, None
    return len(text), (text.shape[:-1] if text.is_floating_point() else text.shape).numel()
