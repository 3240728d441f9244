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

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mopl._arguments import compute_dtype
from mopl._bounds import check_bounds
from mopl._records import damaged
from mopl._restoring import evaluating, frozen_parameters, generators_kept
from mopl._tensor_files import check_shapes, read_tensors
from mopl._threads import in_turn
from mopl.conditioning._mixture import (
    CoefficientRule,
    KLWeightCoefficients,
    Mixture,
    MixtureRecord,
    renamed_in_mixture,
    rule_of,
)
from mopl.conditioning._parameter_mixture_lora import LoraMixture, write_adapter
from mopl.conditioning._parameter_mixture_parts import (
    MODEL_FOLDER,
    check_batch,
    check_whole,
    group_rows,
    join_generated,
    join_rows,
    new_model,
    no_cache,
    rows_of,
    select_parameters,
    state_of,
)
from mopl.conditioning.adapted import Place, shared_places
from mopl.conditioning.causal_lm import check_prompts, generate_option, untie_head
from mopl.conditioning.merging import check_mixed_rows, copied, logits_of, probe_ids, settle_ties
from mopl.conditioning.sampling import Weights
from mopl.conditioning.saved_models import CONFIG_FILE, REMEDY, TuningRecord, check_options, fitting

__all__ = ["KLWeightCoefficients", "LoraMixture", "ParameterMixture", "write_adapter"]

WEIGHTS_FILE = "parameter_mixture.safetensors"


class _Record(MixtureRecord):
    scope: str
    sets: int
    frozen: list[str] | None = None  # of the shared part; older files do not say

    @staticmethod
    def check(record: Mapping[str, Any]) -> None:
        check_bounds({"sets": record["sets"]})


@renamed_in_mixture
class ParameterMixture(Mixture):
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

    KIND, SCHEMA, WEIGHTS_FILE, SAVES_ALL, SHARDS = "ParameterMixture", _Record, WEIGHTS_FILE, True, False

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
        super().__init__(objectives, coefficients, sets, record)
        self.untied = untie_head(model) if scope == "logits" else False
        self.model, self.scope = model, scope
        self.names = select_parameters(model, scope)
        self._frozen = [name for name in frozen_parameters(model) if name not in self.names]
        own = [model.get_parameter(name).requires_grad_(True) for name in self.names]
        copies = ([nn.Parameter(p.detach().clone()) for p in own] for _ in range(self._count - 1))
        self.others = nn.ModuleList(nn.ParameterList(each) for each in copies)
        self._cache: tuple[Any, list[Tensor]] | None = None

    @property
    def causal_lm(self) -> Any:
        """The model inside, of whatever kind."""
        return self.model

    @property
    def decodes_rows(self) -> bool:
        """A mixture of parameters has one trade-off at a time; see `at`."""
        return False

    @property
    def has_reference(self) -> bool:
        """What the parameters were is no longer here."""
        return False

    @property
    def takes_gradient_checkpointing(self) -> bool:
        """Layers would be computed again with the first set in the place of the mixture."""
        return False

    @property
    def varies_with_weights(self) -> bool:
        """Whether sets differ, or their coefficients need not sum to 1."""
        own, *others = self.sets
        same = all(torch.equal(a, b) for other in others for a, b in zip(own, other, strict=True))
        return self.coefficients is not None or not same

    @property
    @in_turn
    def sets(self) -> list[list[nn.Parameter]]:
        """The parameter sets θ_S^1, θ_S^2, ...: each in the order of `names`."""
        self._check_outside()
        own = [self.model.get_parameter(name) for name in self.names]
        others: Any = self.others
        return [own, *(list(other) for other in others)]

    @in_turn
    def mixed(self, coefficients: Tensor) -> list[Tensor]:
        """Return Σ_i c_i θ_S^i for coefficients (sets,): differentiable, summed in float32 and rounded once."""
        result = []
        for each in zip(*check_whole(self.sets), strict=True):
            shares = coefficients.to(each[0].device, compute_dtype(each[0]))
            total = shares[0] * each[0].to(shares.dtype)
            for i, parameter in enumerate(each[1:], start=1):
                total = total + shares[i] * parameter.to(shares.dtype)
            result.append(total.to(each[0].dtype))
        return result

    @in_turn
    def forward(
        self,
        *args: Any,
        weights: Weights | None = None,  # (m,) or (B, m)
        beta: None = None,
        kl_weight: float | Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model at the mixture of each row.

        Args:
            *args: of the model.
            weights: w, (m,) or (B, m), on the simplex. Not inside `at`, where the mixture is fixed.
            beta: None; no mixture is conditioned on β.
            kl_weight: α, a number or (B,), if the coefficients depend on it.
            **kwargs: of the model. With (B, m) tensors with B rows are cut; not positions such as `logits_to_keep`.

        Returns:
            What the model returns; the tensors of rows that were cut are put together again.

        Raises:
            ValueError: If weights are missing or do not fit, or outputs of different rows cannot be put together.
            RuntimeError: If gradients are checkpointed: the model would run again with other parameters.
        """
        self._unless_fixed(weights=weights, beta=beta, kl_weight=kl_weight)
        if self._held is not None:
            return self.model(*args, **kwargs)
        if torch.is_grad_enabled():
            self.clear_cache()
            if self.training and any(getattr(each, "gradient_checkpointing", False) for each in self.model.modules()):
                raise RuntimeError(
                    "gradient checkpointing would run the model again with the first set in the place of the mixture; "
                    "call gradient_checkpointing_disable(), or use LoraMixture"
                )
        coefficients = self._of_call(weights, beta, kl_weight)
        if coefficients.ndim == 1:
            return self._run(coefficients, args, kwargs)
        rows = len(coefficients)
        check_batch([*args, *kwargs.values()], rows)
        distinct, groups = group_rows(coefficients)
        if len(groups) == 1:
            return self._run(distinct[0], args, kwargs)
        kwargs = {**kwargs, **no_cache(self.model, kwargs)}
        cut = [rows_of(index, rows, args, kwargs) for index in groups]
        return join_rows([self._run(one, *own) for one, own in zip(distinct, cut, strict=True)], groups)

    def _run(self, coefficients: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        values = dict(zip(self.names, self.mixed(coefficients), strict=True))
        return torch.func.functional_call(self.model, values, tuple(args), kwargs)

    @in_turn
    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
        *,
        weights: Weights | None = None,  # (m,) or (B, m)
        beta: None = None,
        kl_weight: float | Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate at the mixture of each row, in groups of equal coefficients.

        Args:
            input_ids: (B, T), padded on the left.
            attention_mask: (B, T).
            weights: As in `forward`.
            beta: As in `forward`.
            kl_weight: As in `forward`.
            **kwargs: of the model's `generate`; cut as in `forward`.

        Returns:
            (B * num_return_sequences, T + new), padded on the right; what `generate` returns for a single mixture.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        self._unless_fixed(weights=weights, beta=beta, kl_weight=kl_weight)
        if self._held is not None:
            return self.model.generate(**given)
        if attention_mask is not None:
            check_prompts(input_ids, attention_mask, None)
        coefficients, rows = self._of_call(weights, beta, kl_weight), len(input_ids)
        if coefficients.ndim == 1:
            coefficients = coefficients.expand(rows, -1)
        check_batch([input_ids], len(coefficients))
        parts, (distinct, groups) = [], group_rows(coefficients)
        for one, index in zip(distinct, groups, strict=True):
            with self._holding(one):
                parts.append(self.model.generate(**rows_of(index, rows, (), given)[1]))
        if len(groups) == 1:
            return parts[0]
        given = {name: value for name, value in kwargs.items() if value is not None}
        return join_generated(parts, groups, generate_option("pad_token_id", given, self.model.generation_config))

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
        if self._checked or self._held is not None or (ids := probe_ids(self.model)) is None:
            return
        shares = torch.rand(len(ids), self._count, generator=torch.Generator().manual_seed(0)) * 2 / self._count
        with evaluating(self), generators_kept():
            try:
                plain = logits_of(self.model, ids)
            except Exception:
                return  # it needs more than input_ids, which are all that there is to compare
            found, merged = [], []
            for row, one in zip(ids[:, None], shares, strict=True):
                found.append(self._run(one, (), {"input_ids": row}).logits.double())
                with self._holding(one):
                    merged.append(logits_of(self.model, row))
        self.clear_cache()
        remedy = f"choose another scope than {self.scope!r}, or LoraMixture"
        dtype = next(p.dtype for p in self.model.parameters())
        check_mixed_rows(type(self.model).__name__, torch.cat(found), torch.cat(merged), plain, remedy, dtype)
        self._checked = True

    def _places(self, coefficients: Tensor) -> Sequence[Place]:
        values = zip(map(id, self.sets[0]), self._materialise(coefficients), strict=True)
        return shared_places(self.model, dict(values))

    @in_turn
    def clear_cache(self) -> None:
        """Forget the mixture that `at` keeps.

        Optimisers that write through `.data` outside of this module's forward pass need that call.
        """
        self._cache = None

    @torch.inference_mode(False)  # what is kept may be asked for gradients of inputs later
    @torch.no_grad()
    def _materialise(self, coefficients: Tensor) -> list[Tensor]:
        key = tuple(coefficients.double().tolist()), state_of(self.sets)
        if self._cache is None or self._cache[0] != key:
            self._cache = None  # before the next is made: never two of them
            self._cache = (key, self.mixed(coefficients))
        return self._cache[1]

    def _merged(self, coefficients: Tensor) -> nn.Module:
        model = copied(self.model)
        for name, value in zip(self.names, self._materialise(coefficients), strict=True):
            model.get_parameter(name).copy_(value)
        settle_ties(model)
        return model

    # ---------------------------------------------------------------- files

    def _described(self) -> dict[str, Any]:
        return {
            "scope": self.scope, "sets": len(self.sets), "coefficients": self._saved_rule, "untied": self.untied,
            "base_model": self._base_name, "frozen": self._frozen,
        }  # fmt: skip

    def _write(self, folder: Path, **_: Any) -> None:
        model = self.model
        if hasattr(model, "config") and hasattr(model.config, "save_pretrained"):
            architecture = copy.deepcopy(model.config)
            if self.untied:
                # As the model came: its other ties, under the same switch, are there still, and the mixture that is
                # made from it unties the head again.
                for part in (architecture, architecture.get_text_config()):
                    part.tie_word_embeddings = True
            architecture.save_pretrained(str(folder / MODEL_FOLDER))
            if getattr(model, "generation_config", None) is not None:
                model.generation_config.save_pretrained(str(folder / MODEL_FOLDER))
        super()._write(folder)

    @property
    def _adapters(self) -> list[str]:
        return []  # parameters as all others

    def _state(self) -> dict[str, Tensor]:
        """Return every parameter and buffer under the name that files have, tied ones once."""
        state, seen = {}, set()
        for name, value in self.model.state_dict(keep_vars=True).items():
            if id(value) not in seen:
                seen.add(id(value))
                state[f"model.{name}"] = value
        for i, parameters in enumerate(self.sets[1:], start=2):
            state |= {f"set_{i}.{name}": p for name, p in zip(self.names, parameters, strict=True)}
        return state

    @classmethod
    @torch.no_grad()
    def _load(
        cls,
        folder: Path,
        config: dict[str, Any],
        model: Any,
        *,
        trainable: bool,
        coefficients: Any = None,
        **options: Any,
    ) -> ParameterMixture:
        rule = rule_of(config["coefficients"], coefficients, folder)
        file, record = folder / WEIGHTS_FILE, TuningRecord.read(config)
        state = read_tensors(file, remedy=REMEDY)
        sets = len({name.partition(".")[0] for name in state if name.startswith("set_")}) + 1
        if config["sets"] != sets:
            text = f"it has {sets} sets but {folder / CONFIG_FILE} says {config['sets']}"
            raise damaged(file, f"{text}, so they do not fit", REMEDY)
        check_options(model, options)
        made = new_model(folder, config, state, options) if model is None else model
        with fitting(folder / CONFIG_FILE):
            mixture = cls(
                made, len(record.objectives), scope=config["scope"], coefficients=rule, sets=sets, record=record
            )
        own = mixture._state()
        shapes, wanted = ({name: value.shape for name, value in each.items()} for each in (state, own))
        check_shapes(file, shapes, wanted, remedy=REMEDY)
        for name, value in state.items():
            own[name].copy_(value)
        return mixture if trainable else mixture.requires_grad_(False)  # the shared part as the model came
