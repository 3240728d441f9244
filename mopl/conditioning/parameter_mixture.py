"""Models whose parameters are a mixture: θ_S(w) = Σ_i w_i θ_S^i for a part S, the rest shared (CLP).

Wang, Kidambi et al., "Conditional Language Policy" (EMNLP Findings 2024), keep one copy of a part S of the parameters
for each reward and run the model with their weighted sum; training goes through the sum, so the copies learn to be good
where they are mixed, which averages of separately trained experts (`mopl.steering.soup`) are not trained for. The
structure follows a paper about CLP and our memory of it; the full text was not at hand.

    full-CLP: S = everything,   attention: the attention layers,   logits: the output head,   or a pattern of names

* Memory: m |S| + |S^C| parameters. The first set *is* the wrapped model's own parameters, the others are beside it.
* Gradient: ∂L/∂θ_S^i = w_i ∂L/∂θ_S(w); the shared part is not scaled. It is trained if its parameters require a
  gradient when the model is wrapped; freeze it first (`model.requires_grad_(False)`) to train the sets only.
* Cost: a mixture costs m |S| multiplications, and the rest is the model. In a batch with a weight vector for each row,
  rows with equal coefficients run together: G distinct ones are G mixtures and G runs on their rows, together the
  model's work on the batch, but less parallel. Draw few weight vectors a batch, or use `LoraMixture`, which has none of
  this cost. Decoding is done at one mixture, made once: `with mixture.at(w) as model: model.generate(...)`.

`LoraMixture` is the same with m low-rank adapters on a frozen model.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mopl._arguments import compute_dtype
from mopl._renamed import renamed_in_methods
from mopl._restoring import evaluating, generators_kept
from mopl._threads import Turns, in_turn
from mopl.conditioning._parameter_mixture_files import fill, read, save
from mopl.conditioning._parameter_mixture_lora import LoraMixture
from mopl.conditioning._parameter_mixture_parts import (
    CoefficientRule,
    KLWeightCoefficients,
    check_batch,
    coefficients_of,
    group_rows,
    join_generated,
    join_rows,
    no_cache,
    select_parameters,
    take_rows,
)
from mopl.conditioning.causal_lm import DELEGATED, untie_head
from mopl.conditioning.merging import check_mixed_rows, logits_of, probe_ids, settle_ties
from mopl.conditioning.saved_models import CONFIG_FILE, TuningRecord, fitting

__all__ = ["KLWeightCoefficients", "LoraMixture", "ParameterMixture"]

Weights = Tensor | Sequence[float] | Sequence[Sequence[float]]


@renamed_in_methods("coefficients_of", "forward", "generate", "at", "merge", alpha="kl_weight")
class ParameterMixture(nn.Module):
    """A model that runs with Σ_i c_i θ_S^i, c = w or a function of (w, α).

    All sets start at the wrapped model's parameters. The model is changed: its own parameters become the first set, and
    for scope "logits" a head that is tied to the embedding gets a weight of its own. A parameter that several modules
    share is mixed once, for all of them. Buffers are shared. Calls in several threads take turns; `at` holds for all.

    Args:
        model: any module; `generate`, `merge` to files and the scope "logits" are for models of transformers.
        objectives: m.
        scope: "full", "attention", "logits", or a regular expression on names of parameters.
        coefficients: a function of weights (..., m) and α (...) or None to coefficients (..., sets), such as
            `KLWeightCoefficients`; None: the weights themselves.
        sets: number of parameter sets, if it is not m (or what `coefficients.sets(m)` says).
        record: names of the objectives and how the model was trained; `objective_1`, ... by default.

    Attributes:
        model: the wrapped model; called directly it runs with the first set, inside `at` with the mixture.
        others: the sets 2, 3, ..., each a list of parameters in the order of `names`.
        names: names of the mixed parameters in the model.

    Raises:
        ValueError: If the scope names no parameter, or numbers of sets or objectives do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        objectives: int,
        *,
        scope: str = "attention",
        coefficients: CoefficientRule | None = None,
        sets: int | None = None,
        record: TuningRecord | Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if objectives < 1:
            raise ValueError(f"objectives is {objectives} but must be at least 1")
        if sets is None:
            sets = coefficients.sets(objectives) if isinstance(coefficients, KLWeightCoefficients) else objectives
        if coefficients is None and sets != objectives:
            raise ValueError(
                f"there are {sets} sets for {objectives} objectives; pass coefficients, which map one to the other"
            )
        self.record = TuningRecord.of(record, objectives)
        self.untied = untie_head(model) if scope == "logits" else False
        self.model = model
        self.objectives, self.scope, self.coefficients = objectives, scope, coefficients
        self.names = select_parameters(model, scope)
        own = [model.get_parameter(name) for name in self.names]
        for parameter in own:
            parameter.requires_grad_(True)
        copies = ([nn.Parameter(p.detach().clone()) for p in own] for _ in range(sets - 1))
        self.others = nn.ModuleList(nn.ParameterList(each) for each in copies)
        self._turns = Turns()  # a mixture is in the model for the time of a call
        self._inside = False  # a mixture is in the model, for a call or a block of `at`
        self._checked = False  # that a mixture in the model computes what mixed rows do
        self._cache: tuple[Any, list[Tensor]] | None = None

    def __getattr__(self, name: str) -> Any:
        """Read from the model what trainers ask of a model."""
        if name in DELEGATED:
            return getattr(self.model, name)
        return super().__getattr__(name)

    @property
    @in_turn
    def sets(self) -> list[list[nn.Parameter]]:
        """The parameter sets θ_S^1, θ_S^2, ...: each in the order of `names`."""
        if self._inside:
            raise RuntimeError("the model holds a mixture; leave the `with mixture.at(...)` block first")
        own = [self.model.get_parameter(name) for name in self.names]
        others: Any = self.others
        return [own, *(list(other) for other in others)]

    def coefficients_of(self, weights: Weights | None, kl_weight: float | Tensor | None = None) -> Tensor:
        """Return what multiplies the sets, (sets,) or (B, sets)."""
        return coefficients_of(
            self.coefficients, weights, kl_weight, self.objectives, len(self.others) + 1, self.record.objectives
        )

    @in_turn
    def mixed(self, coefficients: Tensor) -> list[Tensor]:
        """Return Σ_i c_i θ_S^i for coefficients (sets,): differentiable, summed in float32 and rounded once."""
        result = []
        for each in zip(*self.sets, strict=True):
            wide = compute_dtype(each[0])
            shares = coefficients.to(each[0].device, wide)
            total = shares[0] * each[0].to(wide)
            for i, parameter in enumerate(each[1:], start=1):
                total = total + shares[i] * parameter.to(wide)
            result.append(total.to(each[0].dtype))
        return result

    @in_turn
    def forward(
        self, *args: Any, weights: Weights | None = None, kl_weight: float | Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Run the model at the mixture of each row.

        Args:
            *args: of the model.
            weights: w, (m,) or (B, m), on the simplex. Not inside `at`, where the mixture is fixed.
            kl_weight: α, a number or (B,), if the coefficients depend on it.
            **kwargs: of the model. With (B, m), tensors whose first dimension is B are cut into rows.

        Returns:
            What the model returns; with (B, m), its tensors put together again.

        Raises:
            ValueError: If weights are missing or do not fit, or outputs of different rows cannot be put together.
            RuntimeError: If the model checkpoints gradients, which would run again with other parameters.
        """
        if self._inside:
            if weights is not None or kl_weight is not None:
                raise ValueError("the mixture is fixed inside `at`; leave weights and kl_weight out")
            return self.model(*args, **kwargs)
        if torch.is_grad_enabled():
            self.clear_cache()
            if self.training and any(
                getattr(module, "gradient_checkpointing", False) for module in self.model.modules()
            ):
                raise RuntimeError(
                    "gradient checkpointing would run the model again with the first set in the place of the mixture; "
                    "call gradient_checkpointing_disable(), or use LoraMixture"
                )
        return self._mix(self.coefficients_of(weights, kl_weight), args, kwargs)

    def _mix(self, coefficients: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run the model at coefficients (sets,), or (B, sets) for each row."""
        if coefficients.ndim == 1:
            return self._run(coefficients, args, kwargs)
        rows = len(coefficients)
        check_batch([*args, *kwargs.values()], rows)
        distinct, groups = group_rows(coefficients)
        if len(groups) == 1:
            return self._run(distinct[0], args, kwargs)
        kwargs = {**kwargs, **no_cache(self.model, kwargs)}
        parts = []
        for one, index in zip(distinct, groups, strict=True):
            own = [take_rows(a, index, rows) for a in args]
            parts.append(self._run(one, own, {k: take_rows(v, index, rows) for k, v in kwargs.items()}))
        return join_rows(parts, groups)

    def _run(self, coefficients: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        values = dict(zip(self.names, self.mixed(coefficients), strict=True))
        return torch.func.functional_call(self.model, values, tuple(args), kwargs)

    # ---------------------------------------------------------------- one mixture

    @in_turn
    @torch.no_grad()
    def check_merging(self) -> None:
        """Raise unless rows that are mixed have the logits of the model with the mixture in place, by a short probe.

        Causal language models only. Runs do so before they begin. The sets are the same then, so the probe uses
        coefficients that do not sum to 1.

        Raises:
            ValueError: If they differ.
        """
        if self._checked or self._inside or (ids := probe_ids(self.model)) is None:
            return
        sets = len(self.others) + 1
        shares = torch.rand(len(ids), sets, generator=torch.Generator().manual_seed(0)) * 2 / sets
        with evaluating(self), generators_kept():
            try:
                plain = logits_of(self.model, ids)
            except Exception:
                return  # it needs more than input_ids, which are all that there is to compare
            found, merged = [], []
            for row, one in zip(ids[:, None], shares, strict=True):
                found.append(self._mix(one, (), {"input_ids": row}).logits.double())
                with self._holding(one):
                    merged.append(logits_of(self.model, row))
        self.clear_cache()
        remedy = f"choose another scope than {self.scope!r}, or LoraMixture"
        dtype = next(p.dtype for p in self.model.parameters())
        check_mixed_rows(type(self.model).__name__, torch.cat(found), torch.cat(merged), plain, remedy, dtype)
        self._checked = True

    @contextlib.contextmanager
    def at(self, weights: Weights, kl_weight: float | Tensor | None = None) -> Iterator[nn.Module]:
        """Be the plain model of one trade-off inside a `with` block, at its cost; made once and kept for the next time.

        It takes |S| more parameters, until the sets are trained further or `clear_cache()`. Optimisers that write
        through `.data` outside of this module's forward pass need that call.

        Args:
            weights: w, (m,).
            kl_weight: α, a number.

        Yields:
            The wrapped model, with the mixture in place.
        """
        self.check_merging()
        with self._turns.switched(self._holding(self.coefficients_of(weights, kl_weight))):
            yield self.model

    @contextlib.contextmanager
    def _holding(self, coefficients: Tensor) -> Iterator[None]:
        """Put the mixture of coefficients (sets,) into the model inside a `with` block; in one's turn only."""
        values = self._materialise(coefficients)
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in self.model.modules():
            for attribute, parameter in module._parameters.items():
                places.setdefault(id(parameter), []).append((module, attribute))
        own = self.sets[0]
        self._inside = True
        try:
            for parameter, value in zip(own, values, strict=True):
                mixture = nn.Parameter(value, requires_grad=False)
                for module, attribute in places[id(parameter)]:  # several, if it is tied
                    module._parameters[attribute] = mixture
            yield
        finally:
            for parameter in own:
                for module, attribute in places[id(parameter)]:
                    module._parameters[attribute] = parameter
            self._inside = False

    @in_turn
    def clear_cache(self) -> None:
        """Forget the mixture that `at` keeps."""
        self._cache = None

    @torch.no_grad()
    def _materialise(self, coefficients: Tensor) -> list[Tensor]:
        if coefficients.ndim != 1:
            raise ValueError(f"weights are {len(coefficients)} vectors but one mixture has one; pass (m,)")
        state = tuple((p._version, p.data_ptr(), p.dtype, p.device) for each in self.sets for p in each)
        key = (tuple(coefficients.double().tolist()), state)
        if self._cache is None or self._cache[0] != key:
            self._cache = None  # before the next is made: never two of them
            self._cache = (key, self.mixed(coefficients))
        return self._cache[1]

    @in_turn
    @torch.no_grad()
    def merge(self, weights: Weights, kl_weight: float | Tensor | None = None) -> nn.Module:
        """Return a copy of the model at one trade-off, with no trace of the mixture: save it, export it, serve it.

        Raises:
            ValueError: If its files would load as another model; see `check_merging` too.
        """
        self.check_merging()
        values = self._materialise(self.coefficients_of(weights, kl_weight))
        model = copy.deepcopy(self.model)
        for name, value in zip(self.names, values, strict=True):
            model.get_parameter(name).copy_(value)
        settle_ties(model)
        return model

    @in_turn
    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
        *,
        weights: Weights | None = None,  # (m,) or (B, m)
        kl_weight: float | Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate at the mixture of each row; rows with equal coefficients together, one group after another.

        Args:
            input_ids: (B, T), padded on the left.
            attention_mask: (B, T).
            weights: w, (m,) or (B, m). Not inside `at`.
            kl_weight: α, a number or (B,), if the coefficients depend on it.
            **kwargs: of the model's `generate`; tensors whose first dimension is B are cut into rows.

        Returns:
            (B * num_return_sequences, T + new), padded on the right; what `generate` returns for a single mixture.
        """
        model: Any = self.model
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        if self._inside:
            if weights is not None or kl_weight is not None:
                raise ValueError("the mixture is fixed inside `at`; leave weights and kl_weight out")
            return model.generate(**given)
        coefficients = self.coefficients_of(weights, kl_weight)
        rows = len(input_ids)
        if coefficients.ndim == 1:
            coefficients = coefficients.expand(rows, -1)
        check_batch([input_ids], len(coefficients))
        parts, (distinct, groups) = [], group_rows(coefficients)
        for one, index in zip(distinct, groups, strict=True):
            with self._holding(one):
                parts.append(model.generate(**{k: take_rows(v, index, rows) for k, v in given.items()}))
        if len(groups) == 1:
            return parts[0]
        pad = kwargs.get("pad_token_id")
        if pad is None:
            pad = getattr(kwargs.get("generation_config") or model.generation_config, "pad_token_id", None)
        return join_generated(parts, groups, pad)

    # ---------------------------------------------------------------- files

    @in_turn
    def save_pretrained(self, directory: str | os.PathLike[str], **_: Any) -> None:
        """Write all sets, the shared part, the model's configuration and `mopl.json` into a folder."""
        if self._inside:
            raise RuntimeError("the model holds a mixture; leave the `with mixture.at(...)` block first")
        save(self, directory)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        model: nn.Module | None = None,
        *,
        coefficients: CoefficientRule | None = None,
        trainable: bool = False,
        **model_kwargs: Any,
    ) -> ParameterMixture:
        """Load what `save_pretrained` wrote, in evaluation mode.

        Args:
            directory: The folder.
            model: A model of the same architecture, whose values are replaced; made from the saved configuration
                (causal language models of transformers) if None.
            coefficients: The function of (w, α), if it was none that a file can hold.
            trainable: Whether the sets and the shared part are to be trained further.
            **model_kwargs: Keywords of `AutoModelForCausalLM.from_config`, such as `dtype`.

        Raises:
            FileNotFoundError: If the folder holds no such model.
            ValueError: If it holds another kind, or model or coefficients are needed and missing, or do not fit.
        """
        config, state, model, coefficients = read(directory, model, coefficients, model_kwargs)
        record = TuningRecord.read(config)
        with fitting(Path(directory) / CONFIG_FILE):
            mixture = cls(
                model, len(record.objectives), scope=config["scope"], coefficients=coefficients, sets=config["sets"],
                record=record,
            )  # fmt: skip
        fill(mixture, state, directory)
        return mixture.requires_grad_(trainable).eval()
