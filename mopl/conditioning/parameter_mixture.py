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
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mopl._extras import require
from mopl._files import write_files
from mopl._records import damaged
from mopl._tensor_files import check_shapes, read_tensors
from mopl.conditioning._causal_lm import DELEGATED
from mopl.conditioning._parameter_mixture_lora import LoraMixture
from mopl.conditioning._parameter_mixture_parts import (
    AlphaCoefficients,
    CoefficientRule,
    check_batch,
    coefficients_of,
    group_rows,
    join_generated,
    join_rows,
    no_cache,
    select_parameters,
    take_rows,
    untie_head,
)
from mopl.conditioning._saved import CONFIG_FILE, REMEDY, fitting, read_record
from mopl.conditioning.hyper_prompt_model import TuningRecord

__all__ = ["AlphaCoefficients", "LoraMixture", "ParameterMixture"]

WEIGHTS_FILE, MODEL_FOLDER = "parameter_mixture.safetensors", "architecture"
Weights = Tensor | Sequence[float] | Sequence[Sequence[float]]


class ParameterMixture(nn.Module):
    """A model that runs with Σ_i c_i θ_S^i, c = w or a function of (w, α).

    All sets start at the wrapped model's parameters. The model is changed: its own parameters become the first set, and
    for scope "logits" a head that is tied to the embedding gets a weight of its own. A parameter that several modules
    share is mixed once, for all of them. Buffers are shared.

    Args:
        model: any module; `generate`, `merge` to files and the scope "logits" are for models of transformers.
        objectives: m.
        scope: "full", "attention", "logits", or a regular expression on names of parameters.
        coefficients: a function of weights (..., m) and α (...) or None to coefficients (..., sets), such as
            `AlphaCoefficients`; None: the weights themselves.
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
            sets = coefficients.sets(objectives) if isinstance(coefficients, AlphaCoefficients) else objectives
        if coefficients is None and sets != objectives:
            raise ValueError(
                f"there are {sets} sets for {objectives} objectives; pass coefficients, which map one to the other"
            )
        if record is None:
            record = [f"objective_{j + 1}" for j in range(objectives)]
        self.record = record if isinstance(record, TuningRecord) else TuningRecord(tuple(record))
        if len(self.record.objectives) != objectives:
            raise ValueError(f"record names {self.record.objectives} but there are {objectives} objectives")
        self.untied = untie_head(model) if scope == "logits" else False
        self.model = model
        self.objectives, self.scope, self.coefficients = objectives, scope, coefficients
        self.names = select_parameters(model, scope)
        own = [model.get_parameter(name) for name in self.names]
        for parameter in own:
            parameter.requires_grad_(True)
        copies = ([nn.Parameter(p.detach().clone()) for p in own] for _ in range(sets - 1))
        self.others = nn.ModuleList(nn.ParameterList(each) for each in copies)
        self._inside = False  # a mixture stands in the model
        self._cache: tuple[Any, list[Tensor]] | None = None

    def __getattr__(self, name: str) -> Any:
        """Read from the model what trainers ask of a model."""
        if name in DELEGATED:
            return getattr(self.model, name)
        return super().__getattr__(name)

    @property
    def sets(self) -> list[list[nn.Parameter]]:
        """The parameter sets θ_S^1, θ_S^2, ...: each in the order of `names`."""
        if self._inside:
            raise RuntimeError("the model holds a mixture; leave the `with mixture.at(...)` block first")
        own = [self.model.get_parameter(name) for name in self.names]
        others: Any = self.others
        return [own, *(list(other) for other in others)]

    def coefficients_of(self, weights: Weights | None, alpha: float | Tensor | None = None) -> Tensor:
        """Return what multiplies the sets, (sets,) or (B, sets)."""
        return coefficients_of(
            self.coefficients, weights, alpha, self.objectives, len(self.others) + 1, self.record.objectives
        )

    def mixed(self, coefficients: Tensor) -> list[Tensor]:
        """Return Σ_i c_i θ_S^i for coefficients (sets,): differentiable, summed in float32 and rounded once."""
        result = []
        for each in zip(*self.sets, strict=True):
            wide = torch.float64 if each[0].dtype == torch.float64 else torch.float32
            shares = coefficients.to(each[0].device, wide)
            total = shares[0] * each[0].to(wide)
            for i, parameter in enumerate(each[1:], start=1):
                total = total + shares[i] * parameter.to(wide)
            result.append(total.to(each[0].dtype))
        return result

    def forward(
        self, *args: Any, weights: Weights | None = None, alpha: float | Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Run the model at the mixture of each row.

        Args:
            *args: of the model.
            weights: w, (m,) or (B, m), on the simplex. Not inside `at`, where the mixture is fixed.
            alpha: α, a number or (B,), if the coefficients depend on it.
            **kwargs: of the model. With (B, m), tensors whose first dimension is B are cut into rows.

        Returns:
            What the model returns; with (B, m), its tensors put together again.

        Raises:
            ValueError: If weights are missing or do not fit, or outputs of different rows cannot be put together.
            RuntimeError: If the model checkpoints gradients, which would run again with other parameters.
        """
        if self._inside:
            if weights is not None or alpha is not None:
                raise ValueError("the mixture is fixed inside `at`; leave weights and alpha out")
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
        coefficients = self.coefficients_of(weights, alpha)
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

    @contextlib.contextmanager
    def at(self, weights: Weights, alpha: float | Tensor | None = None) -> Iterator[nn.Module]:
        """Be the plain model of one trade-off inside a `with` block, at its cost; made once and kept for the next time.

        It takes |S| more parameters, until the sets are trained further or `clear_cache()`. Optimisers that write
        through `.data` outside of this module's forward pass need that call.

        Args:
            weights: w, (m,).
            alpha: α, a number.

        Yields:
            The wrapped model, with the mixture in place.
        """
        with self._holding(self.coefficients_of(weights, alpha)):
            yield self.model

    @contextlib.contextmanager
    def _holding(self, coefficients: Tensor) -> Iterator[None]:
        """Put the mixture of coefficients (sets,) into the model inside a `with` block."""
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

    @torch.no_grad()
    def merge(self, weights: Weights, alpha: float | Tensor | None = None) -> nn.Module:
        """Return a copy of the model at one trade-off, with no trace of the mixture: save it, export it, serve it."""
        values = self._materialise(self.coefficients_of(weights, alpha))
        model = copy.deepcopy(self.model)
        for name, value in zip(self.names, values, strict=True):
            model.get_parameter(name).copy_(value)
        return model

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
        *,
        weights: Weights | None = None,  # (m,) or (B, m)
        alpha: float | Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate at the mixture of each row; rows with equal coefficients together, one group after another.

        Args:
            input_ids: (B, T), padded on the left.
            attention_mask: (B, T).
            weights: w, (m,) or (B, m). Not inside `at`.
            alpha: α, a number or (B,), if the coefficients depend on it.
            **kwargs: of the model's `generate`; tensors whose first dimension is B are cut into rows.

        Returns:
            (B * num_return_sequences, T + new), padded on the right; what `generate` returns for a single mixture.
        """
        model: Any = self.model
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        if self._inside:
            if weights is not None or alpha is not None:
                raise ValueError("the mixture is fixed inside `at`; leave weights and alpha out")
            return model.generate(**given)
        coefficients = self.coefficients_of(weights, alpha)
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

    def _named_tensors(self) -> dict[str, Tensor]:
        """Return every parameter and buffer under the name that files have, tied ones once."""
        state, seen = {}, set()
        for name, value in self.model.state_dict(keep_vars=True).items():
            if id(value) not in seen:
                seen.add(id(value))
                state[f"model.{name}"] = value
        for i, parameters in enumerate(self.others, start=2):
            state.update({f"set_{i}.{name}": p for name, p in zip(self.names, parameters, strict=True)})  # type: ignore
        return state

    def save_pretrained(self, directory: str | os.PathLike[str], **_: Any) -> None:
        """Write all sets, the shared part, the model's configuration and `mopl.json` into a folder."""
        require("safetensors")
        from safetensors.torch import save_file

        if self._inside:
            raise RuntimeError("the model holds a mixture; leave the `with mixture.at(...)` block first")
        rule = self.coefficients
        config = {
            "kind": "ParameterMixture",
            **asdict(self.record),
            "scope": self.scope,
            "sets": len(self.others) + 1,
            "coefficients": asdict(rule) if isinstance(rule, AlphaCoefficients) else "custom" if rule else None,
            "untied": self.untied,
            "base_model": getattr(self.model, "name_or_path", "") or None,
        }
        state = {name: value.detach().cpu().contiguous() for name, value in self._named_tensors().items()}
        model: Any = self.model

        def fill(folder: Path) -> None:
            if hasattr(model, "config") and hasattr(model.config, "save_pretrained"):
                model.config.save_pretrained(str(folder / MODEL_FOLDER))
                if getattr(model, "generation_config", None) is not None:
                    model.generation_config.save_pretrained(str(folder / MODEL_FOLDER))
            (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            save_file(state, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})

        write_files(directory, fill, last=WEIGHTS_FILE)

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
        folder = Path(directory)
        config = read_record(folder, "ParameterMixture", WEIGHTS_FILE)
        rule = config["coefficients"]
        if rule == "custom" and coefficients is None:
            raise ValueError(f"{folder} was trained with coefficients of its own; pass the function as coefficients")
        if isinstance(rule, dict):
            with fitting(folder / CONFIG_FILE):
                coefficients = AlphaCoefficients(**rule)
        state = read_tensors(folder / WEIGHTS_FILE, remedy=REMEDY)
        sets = len({name.partition(".")[0] for name in state if name.startswith("set_")}) + 1
        if config["sets"] != sets:
            text = f"it has {sets} sets but {folder / CONFIG_FILE} says {config['sets']}"
            raise damaged(folder / WEIGHTS_FILE, f"{text}, so they do not fit", REMEDY)
        if model is None:
            if not (folder / MODEL_FOLDER).is_dir():
                raise ValueError(f"{folder} holds no configuration of a model; pass the model")
            require("transformers")
            from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

            source = str(folder / MODEL_FOLDER)
            dtype = next((value.dtype for name, value in state.items() if name.startswith("model.")), None)
            built: Any = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(source), **{"dtype": dtype, **model_kwargs}
            )
            if (folder / MODEL_FOLDER / "generation_config.json").is_file():
                built.generation_config = GenerationConfig.from_pretrained(source)
            model = built
        elif model_kwargs:
            raise ValueError(f"{sorted(model_kwargs)} are for a model that is made here, but model was passed")
        fields = {name: config[name] for name in ("reference", "beta", "alpha")}
        record = TuningRecord(tuple(config["objectives"]), **fields)
        assert model is not None
        with fitting(folder / CONFIG_FILE):
            mixture = cls(
                model, len(record.objectives), scope=config["scope"], coefficients=coefficients, sets=config["sets"],
                record=record,
            )  # fmt: skip
        own = mixture._named_tensors()
        shapes, wanted = ({name: value.shape for name, value in each.items()} for each in (state, own))
        check_shapes(folder / WEIGHTS_FILE, shapes, wanted, remedy=REMEDY)
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(value)
        return mixture.requires_grad_(trainable).eval()
