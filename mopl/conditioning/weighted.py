"""Models that take weights of objectives: one base class for every way in which a trade-off enters a model.

A kind of conditioning is a subclass: it says by `KIND` what its files are called, and registers itself by that. What
callers need to know of a model stands here, so that none of them has to ask which kind it is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mopl._arguments import check_beta_given, check_positive, shape_of
from mopl._rows import UnsupportedModelError, generation_keywords, takes_left_padding
from mopl.conditioning._saved_kinds import KINDS, SavedModel, registered_kind
from mopl.conditioning.adapter_checks import check_initialisation
from mopl.conditioning.causal_lm import DELEGATED, adapters_off, check_wrapped, is_peft
from mopl.conditioning.sampling import Weights, check_weights
from mopl.conditioning.text_prompt import TextPrompt

__all__ = [
    "KINDS", "Conditioned", "WeightedModel", "active_adapters", "causal_lm_of", "check_packed", "check_padding",
    "has_own_prompt", "keywords_for_prompts", "reads_left_padding", "registered_kind",
]  # fmt: skip


class WeightedModel(SavedModel):
    """A model around another one that takes weights of objectives.

    Attributes:
        model: The model inside.
        record: Names of the objectives and how it was trained.
    """

    SHARDS: ClassVar[bool] = True  # whether its parameters may be cut, and each layer be whole while it runs alone
    text_prompt: TextPrompt | None = None  # what writes the trade-off into prompts, where it is told in words

    def __init__(self) -> None:
        super().__init__()
        self._is_reference = False
        self._held: dict[str, Any] | None = None  # what `at` holds

    def __getattr__(self, name: str) -> Any:
        """Read from the causal language model what trainers ask of a model."""
        return getattr(self.causal_lm, name) if name in DELEGATED else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse a model inside with adapters that would be neither switched off, as of the reference, nor saved."""
        plain = isinstance(value, nn.Module) and not isinstance(value, WeightedModel)  # which looks for itself
        if name == "model" and plain and not self.SAVES_ALL:
            check_wrapped(value)
        super().__setattr__(name, value)

    # ---------------------------------------------------------------- what callers ask

    def check_merging(self) -> None:
        """Raise a ValueError unless rows at weights of their own have the logits of the merged model, if it has one."""

    @property
    def causal_lm(self) -> Any:
        """The causal language model itself, without PEFT's wrapper."""
        return self.model.get_base_model() if is_peft(self.model) else self.model

    @property
    def is_reference(self) -> bool:
        """Whether it is the model that it was tuned from now, which is so inside of `reference()`."""
        return self._is_reference

    @property
    def takes_beta(self) -> bool:
        """Whether it is conditioned on β of the objectives, too."""
        return False

    @property
    def takes_kl_weight(self) -> bool:
        """Whether it is conditioned on the KL weight α, too."""
        return False

    @property
    def virtual_tokens(self) -> int:
        """How many positions stand in front of each row that are no part of what comes back."""
        return 0

    @property
    def takes_embeddings(self) -> bool:
        """Whether the model inside is called with embeddings, as `takes_left_padding(..., embeds=)` wants to know."""
        return False

    @property
    def arranges_rows(self) -> bool:
        """Whether it takes rows by their mask alone: callers add no positions, and do not call `arranged`."""
        return False

    @property
    def decodes_rows(self) -> bool:
        """Whether rows with weights of their own are decoded together, with one cache; else one trade-off at a time."""
        return True

    @property
    def has_reference(self) -> bool:
        """Whether `reference()` can give it; not where the parameters of the model itself were trained."""
        return True

    @property
    def takes_gradient_checkpointing(self) -> bool:
        """Whether its layers may be computed again in the backward pass."""
        return True

    @property
    def takes_packed_rows(self) -> bool:
        """Whether each sequence of a packed row (1, N) may have weights of its own, (S, m)."""
        return False

    @property
    def varies_with_weights(self) -> bool:
        """Whether what is trained are sets of parameters that differ: at its start, too, it is what the weights say."""
        return False

    def write_weights(self, input_ids: list[int], weights: Weights, beta: Any = None) -> list[int]:
        """Return the tokens of a prompt as the model inside reads them: with the trade-off, if it is told in words."""
        return input_ids

    def conditions(self, weights: Weights | None, beta: Any = None, kl_weight: Any = None) -> dict[str, Any]:
        """Return the keywords by which `forward` and `generate` take a trade-off, checked.

        Args:
            weights: w, (m,) or (B, m), on the simplex.
            beta: β, (m,), (1, m) or (B, m), positive: of a model that `takes_beta`.
            kl_weight: α, a number or (B,): of a model that `takes_kl_weight`.

        Returns:
            `weights`, and `beta` or `kl_weight` where they were passed.

        Raises:
            ValueError: If one of them is missing, unexpected, out of range or of another shape.
        """
        names = self.record.objectives
        if weights is None:
            raise ValueError(f"weights are missing; pass one for each of {', '.join(names)}")
        given: dict[str, Any] = {"weights": check_weights(weights, len(names))}
        rows = given["weights"].shape[:-1]
        if len(rows) > 1:
            raise ValueError(f"weights has shape {shape_of(given['weights'])}; pass (m,) = ({len(names)},) or (B, m)")
        unwanted = f"to a {type(self).__name__} that is not conditioned on it; leave it out"
        check_beta_given(beta, self.takes_beta, unwanted)
        if beta is not None:
            given["beta"] = check_positive(torch.as_tensor(beta), "beta")
            *betas, m = given["beta"].shape or (0,)
            if m != len(names) or len(betas) > 1 or (betas and rows and betas[0] not in (1, *rows)):
                raise ValueError(
                    f"beta has shape {shape_of(given['beta'])} but weights {shape_of(given['weights'])}; pass "
                    f"({len(names)},) or one row for each of the weights"
                )
        if kl_weight is not None:
            if not self.takes_kl_weight:
                raise ValueError(f"kl_weight was passed {unwanted}")
            given["kl_weight"] = kl_weight
        return given

    def _conditions_of_one(self, weights: Weights, beta: Any, kl_weight: Any) -> dict[str, Any]:
        given = self.conditions(weights, beta, kl_weight)
        if given["weights"].ndim != 1:
            raise ValueError(f"weights are {len(given['weights'])} vectors but one trade-off has one; pass (m,)")
        if "beta" in given and given["beta"].numel() != len(given["weights"]):
            raise ValueError(f"beta has shape {shape_of(given['beta'])} but one trade-off has one vector; pass (m,)")
        return {name: value.clone() if isinstance(value, Tensor) else value for name, value in given.items()}

    def _unless_fixed(self, **given: Any) -> dict[str, Any]:
        """Return the conditions of a call, or those that `at` holds."""
        given = {name: value for name, value in given.items() if value is not None}
        if self._held is None or self._is_reference:
            return given
        if given:
            raise ValueError(f"the trade-off is fixed inside `at`; leave {' and '.join(given)} out")
        return self._held

    # ---------------------------------------------------------------- one trade-off, and none

    @contextlib.contextmanager
    def at(self, weights: Weights, kl_weight: Any = None, *, beta: Any = None) -> Iterator[Any]:
        """Be the model of one trade-off inside a `with` block; it holds for all threads.

        Blocks of `at` and `reference` nest, with every kind of model: the innermost one holds, and the one around it
        again when that ends. Blocks of several threads may overlap if they want the same.

        Args:
            weights: w, (m,).
            kl_weight: α, a number, of a model that `takes_kl_weight`.
            beta: β, (m,), of a model that `takes_beta`.

        Yields:
            A model that is called without them.

        Raises:
            ValueError: If they do not fit.
            RuntimeError: If another thread holds another trade-off, or the reference.
        """
        given = self._conditions_of_one(weights, beta, kl_weight)
        numbers = {name: (getattr(v, "dtype", None), torch.as_tensor(v).tolist()) for name, v in given.items()}
        with self._turns.switched(numbers, lambda: [self._having("_held", given)]):
            yield self

    @contextlib.contextmanager
    def _having(self, name: str, value: Any) -> Iterator[None]:
        before = getattr(self, name)
        setattr(self, name, value)
        try:
            yield
        finally:
            setattr(self, name, before)

    def merge(self, weights: Weights, kl_weight: Any = None, *, beta: Any = None) -> nn.Module:
        """Return a copy of the model at one trade-off, with no trace of the others: save it, export it, serve it.

        Args:
            weights: w, (m,), on the simplex.
            kl_weight: α, a number: of a model that `takes_kl_weight`.
            beta: β, (m,): of a model that `takes_beta`.

        Returns:
            A plain model, called without weights.

        Raises:
            ValueError: If weights do not fit, or if there is no such model.
        """
        self._conditions_of_one(weights, beta, kl_weight)
        more = ", or write a directory that needs no mopl with mopl.language_models.export.export"
        raise ValueError(
            f"a {type(self).__name__} cannot be merged: its trade-off is not in the parameters; use `with "
            f"model.at(weights) as one:`{more if self.virtual_tokens else ''}"
        )

    def prefix_of(self, weights: Weights, beta: Any = None) -> Tensor | None:
        """Return the embeddings (k, d) of the virtual tokens of one trade-off; None of a kind without any.

        An export gives them to a plain model as tokens of its own.

        Args:
            weights: w, (m,), on the simplex.
            beta: β, (m,): of a model that `takes_beta`.

        Raises:
            ValueError: If no plain model could have them where they stand.
        """
        return None

    def save_adapter(
        self, weights: Weights, directory: str | os.PathLike[str], kl_weight: Any = None, *, beta: Any = None
    ) -> None:
        """Write one trade-off as one adapter of PEFT, if there is such an adapter.

        Args:
            weights: w, (m,), on the simplex.
            directory: The folder of the adapter.
            kl_weight: α, a number: of a model that `takes_kl_weight`.
            beta: β, (m,): of a model that `takes_beta`.

        Raises:
            ValueError: Of a kind that is no adapter at one trade-off, and if weights do not fit.
        """
        raise ValueError(
            f"a {type(self).__name__} is no adapter at one trade-off; write it whole, by export of "
            "mopl.language_models.export with kind='model', or by mopl export"
        )

    @contextlib.contextmanager
    def reference(self, *, adapters: bool = False) -> Iterator[Any]:
        """Be the model that it was tuned from inside a `with` block.

        Calls may still pass weights; they change nothing. Gradients and dropout are as the caller sets them. It holds
        for all threads, and nests as `at` does.

        Args:
            adapters: Whether adapters stay that are not what it is conditioned by.

        Raises:
            ValueError: If an adapter took a part of the base model's weights when it was made (PiSSA, OLoRA, ...), or
                the parameters of the model itself are trained; see `has_reference`.
            RuntimeError: If another thread is inside `at`, or wants the other of `adapters`.
        """
        if not self.has_reference:
            raise ValueError(
                f"this {type(self).__name__} trains the parameters of the model itself, so it cannot be what it was "
                "tuned from; keep a copy of the model from before the training, or, where none of it is trained, say "
                "so by requires_grad_(False)"
            )
        with self.unconditioned(adapters=adapters):
            yield self

    @contextlib.contextmanager
    def unconditioned(self, *, adapters: bool = False) -> Iterator[Any]:
        """Be the model inside, without a trade-off, in a `with` block: the `reference` if no parameter of it changed.

        For callers who keep what the parameters were; arguments, blocks and errors as of `reference`.
        """
        off = is_peft(self.model) and not adapters
        if off:
            for name, config in self.model.peft_config.items():
                check_initialisation(name, config, self.causal_lm)

        def switches() -> list[contextlib.AbstractContextManager[Any]]:
            return [self._having("_is_reference", True), *([adapters_off(self.model)] if off else [])]

        with self._turns.switched(("reference", off), switches):
            yield self


Conditioned = WeightedModel  # its name where a mixture of any module's parameters was meant, too


def causal_lm_of(model: Any) -> Any:
    """Return the causal language model inside a `WeightedModel` or a PEFT model, or the model itself."""
    if isinstance(model, WeightedModel):
        return model.causal_lm
    return model.get_base_model() if is_peft(model) else model


def active_adapters(model: Any) -> list[Any]:
    """Return the configurations of PEFT's adapters that a call goes through, none where they are switched off.

    Args:
        model: A model, as DDP and the like, torch's compiler, or a `WeightedModel`, may have wrapped it.
    """
    while not is_peft(model):
        parts = getattr(model, "_modules", {})
        names = ("module", "_orig_mod", *["model"] * isinstance(model, WeightedModel))
        model = next((parts[name] for name in names if parts.get(name) is not None), None)
        if model is None:
            return []
    return [] if model._adapters_disabled else [model.peft_config[name] for name in model.active_adapters]


def has_own_prompt(model: Any) -> bool:
    """Say whether PEFT puts virtual tokens of its own in front of each row, and so drops the positions of a call."""
    return any(config.is_prompt_learning for config in active_adapters(model))


def check_packed(model: Any) -> None:
    """Raise where PEFT would treat a packed row as one text.

    Raises:
        UnsupportedModelError: If PEFT puts virtual tokens in front of the model's rows, or its adapters begin at tokens
            that it looks for in a row (activated LoRA).
    """
    remedy = "leave packing off (padding_free=False), so that rows are padded"
    if has_own_prompt(model):
        raise UnsupportedModelError(
            "PEFT puts virtual tokens in front of a row, not of each sequence that is packed into it, and drops "
            f"position_ids, so that the sequences would see one another; {remedy}"
        )
    if any(getattr(config, "alora_invocation_tokens", None) for config in active_adapters(model)):
        raise UnsupportedModelError(
            "an adapter has alora_invocation_tokens, which PEFT looks for once in a row, not in each sequence that is "
            f"packed into it, so that the others would be scored without the adapter, or all with it; {remedy}"
        )


def check_padding(model: Any, mask: Tensor | None, remedy: str) -> None:
    """Raise where padding on the left would stand between PEFT's virtual tokens and the text.

    Args:
        model: A model, wrapped or not.
        mask: (B, T), or None if nothing is padded.
        remedy: What to do.

    Raises:
        UnsupportedModelError: If a row is padded so, and PEFT puts virtual tokens in front.
    """
    if mask is not None and has_own_prompt(model) and bool((mask[:, 0] == 0).any()):
        raise UnsupportedModelError(
            "PEFT puts virtual tokens in front of a row's padding on the left, which moves them away from the text; "
            f"{remedy}"
        )


def reads_left_padding(model: Any) -> bool:
    """Say whether a causal language model, or one around it, can read prompts that are padded on the left."""
    if has_own_prompt(model):  # padding would stand between PEFT's virtual tokens and the text
        return False
    embeds = isinstance(model, WeightedModel) and model.takes_embeddings
    return takes_left_padding(causal_lm_of(model), embeds=embeds)


def keywords_for_prompts(model: Any, mask: Tensor) -> dict[str, Any]:
    """Return what `generate` is to be told of prompts padded as a mask (B, T) shows; some models tell by themselves."""
    if isinstance(model, WeightedModel) and model.arranges_rows:
        return {}
    check_padding(model, mask, "pass one prompt at a time (batch_size=1)")
    return generation_keywords(causal_lm_of(model), mask)
