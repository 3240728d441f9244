"""The LoRA form of a parameter mixture: m adapters of PEFT, and W x + Σ_i c_i (scale/r) B_i A_i x for each row."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mopl._extras import require
from mopl._files import write_files
from mopl._restoring import evaluating, generators_kept
from mopl._threads import in_turn
from mopl.conditioning._mixture import CoefficientRule, Mixture, MixtureRecord, renamed_in_mixture, rule_of
from mopl.conditioning.adapted import Place, lora_layers, one_adapter, places_of, rank_of
from mopl.conditioning.adapter_checks import adapted_parts, check_config, check_saved_whole, short_name, with_adapters
from mopl.conditioning.causal_lm import adapters_off, is_peft
from mopl.conditioning.hooked import HookedModel
from mopl.conditioning.merging import check_lora, check_mixed_rows, copied, logits_of, probe_ids, settle_ties
from mopl.conditioning.sampling import Weights
from mopl.conditioning.saved_models import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    CONFIG_FILE,
    Names,
    TuningRecord,
    base_with_adapters,
    fitting,
)

ONE_TRADE_OFF = "write one trade-off instead: mopl export --weights, or merge(weights)"


class _Record(MixtureRecord):
    adapters: Names


def write_adapter(folder: Path, config: Any, tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter of PEFT, as `LoraMixture.adapter_at` returns it, into a folder that is there."""
    require("safetensors")
    from safetensors.torch import save_file

    own = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(own, str(folder / ADAPTER_FILE), metadata={"format": "pt"})
    config.save_pretrained(str(folder))


@renamed_in_mixture
class LoraMixture(Mixture, HookedModel):
    """m LoRA adapters on a frozen model, mixed by weights: every row of a batch has its own mixture at no extra cost.

        h = W x + Σ_i c_i (lora_alpha / r) B_i A_i x,        c = w or a function of (w, α)

    All adapters run on every input, m r (in + out) multiplications a token and layer. The gradient of adapter i is c_i
    times that of the mixture. They start as PEFT starts them: B = 0, so every mixture is the base model. Calls in
    several threads take turns; `at` and `reference` hold for all of them.

    Adapters may be of rsLoRA or DoRA, have `rank_pattern`, `alpha_pattern`, `lora_bias` and `layers_to_transform`, and
    differ in these, their ranks and their targets: `mopl.conditioning.adapted` says what each of them adds.
    `modules_to_save` gives every objective a whole copy of a module, and a mixture has the copies' weighted sum: a row
    costs m products with them, and the copies m times their memory. They must be linear in their parameters (linear
    layers, embeddings, norms), and are trained in the data type of the base model.

    Args:
        model: A model of transformers without adapters, or a PEFT model whose adapters are the sets.
        objectives: m.
        config: `peft.LoraConfig` of the adapters, for a plain model, on linear layers. Not `bias`, other variants of
            PEFT, or initialisations that change the base model (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA).
        coefficients: a function of weights (..., m) and α (...) or None to coefficients (..., sets), such as
            `KLWeightCoefficients(..., anchor=False)`; None: the weights themselves.
        sets: number of adapters, if it is not m (or what `coefficients.sets(m)` says).
        record: names of the objectives and how the model was trained; `objective_1`, ... by default.
        adapters: names of a PEFT model's adapters in the order of the coefficients; None: in the model's own order,
            in which those that are called like objectives must be where these are. All of them are trained.

    Attributes:
        model: the PEFT model. Call it through this module: without coefficients its adapters raise an error.
        adapters: the adapters' names: those of the objectives, and `set_<i>` beyond.

    Raises:
        TypeError: If the model is not loaded, the objectives are names, or the config is none of PEFT's.
        ValueError: If numbers of adapters or objectives do not fit, or an adapter is what cannot be mixed.
    """

    KIND, SCHEMA, WEIGHTS_FILE = "LoraMixture", _Record, None

    def __init__(
        self,
        model: nn.Module,
        objectives: int,
        *,
        config: Any = None,
        coefficients: CoefficientRule | None = None,
        sets: int | None = None,
        record: TuningRecord | Sequence[str] | None = None,
        adapters: Sequence[str] | None = None,
    ) -> None:
        super().__init__(objectives, coefficients, sets, record)
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model is {model!r} but must be a loaded model; pass AutoModelForCausalLM.from_pretrained(...)"
            )
        sets = self._count
        wrapped: Any = model
        if is_peft(model):
            if config is not None:
                raise ValueError("the model has adapters already; leave config out, or pass the model without them")
            self.adapters = self._in_order(list(wrapped.peft_config), adapters)
            if len(self.adapters) != sets:
                raise ValueError(f"the model has the adapters {self.adapters} but {sets} are mixed")
            if any(layer.merged or layer.disable_adapters for layer in lora_layers(wrapped).values()):
                raise ValueError("adapters of the model are merged or off; unmerge_adapter(), and switch them on first")
        else:
            if config is None:
                raise ValueError("config is missing; pass the peft.LoraConfig of the adapters")
            if not hasattr(config, "peft_type"):
                raise TypeError(
                    f"config is a {type(config).__name__} but must be a peft.LoraConfig; pass LoraConfig(...)"
                )
            if adapters is not None:
                raise ValueError("adapters orders those of a PEFT model, and this one has none; leave it out")
            self.adapters = [*self._objective_names, *(f"set_{i + 1}" for i in range(objectives, sets))]
            if len(set(self.adapters)) != sets:
                raise ValueError(f"the adapters would be called {self.adapters}; give the objectives different names")
            check_config(self.adapters[0], config)
            wrapped = with_adapters(model, config, self.adapters)
        self.model = wrapped
        self._parts = adapted_parts(wrapped, self.adapters)
        check_saved_whole(wrapped, self.adapters)
        wrapped.base_model.active_adapter = self.adapters
        for part in self._parts.values():
            part.mix(self.adapters, self._call, whole=coefficients is None)

    @property
    def _objective_names(self) -> list[str]:
        return [name.replace(".", "_") for name in self.record.objectives]  # as modules can be called

    def _in_order(self, own: list[str], given: Sequence[str] | None) -> list[str]:
        """Return the adapters of a PEFT model as coefficients multiply them; raise where names say another order."""
        if given is not None:
            if sorted(given) != sorted(own):
                raise ValueError(f"adapters is {list(given)} but the model has {own}; name each of these once")
            return list(given)
        if self._saved_rule == "custom":
            return own  # a function's sets need not be in the objectives' order
        names = self._objective_names
        if any(name in names and names.index(name) != i for i, name in enumerate(own)):
            first = [*(name for name in names if name in own), *(name for name in own if name not in names)]
            raise ValueError(
                f"the model has the adapters {own}, some of which are called like objectives, but not in their "
                f"order {names}, so weights would multiply others' adapters; pass adapters={first}, or what is meant"
            )
        return own

    @property
    def varies_with_weights(self) -> bool:
        """Adapters differ from their start on, but for those that add nothing yet."""
        return True

    @property
    def is_reference(self) -> bool:
        """Whether its adapters are off and not in the weights, which is so inside of `reference()`."""
        return self._held is None and next(iter(self._parts.values())).layer.disable_adapters

    forward, generate = in_turn(HookedModel.forward), in_turn(HookedModel.generate)

    def _given(self, weights: Any, beta: Any, kl_weight: Any) -> dict[str, Tensor]:
        self._unless_fixed(weights=weights, beta=beta, kl_weight=kl_weight)
        if self._held is not None or self.is_reference:
            return {}
        self._check_switches()
        return {"coefficients": self._of_call(weights, beta, kl_weight)}

    def _check_switches(self) -> None:
        """Raise where somebody switched the model inside by PEFT's methods: all layers, so one tells."""
        if self.is_reference:
            raise RuntimeError("the model is its reference; leave the `with mixture.reference()` block first")
        layer = next(iter(self._parts.values())).layer
        if layer.merged or list(layer.active_adapters) != self.adapters:
            raise RuntimeError(
                f"the model inside has merged adapters, or others active than {', '.join(self.adapters)}, which are "
                "mixed; undo that (unmerge_adapter, base_model.set_adapter), or make the mixture again"
            )

    @contextlib.contextmanager
    def unconditioned(self, *, adapters: bool = False) -> Iterator[LoraMixture]:
        """Be the base model inside a `with` block: adapters off, which are what it is conditioned by."""
        with super().unconditioned():
            yield self

    # ---------------------------------------------------------------- one mixture

    @in_turn
    def check_merging(self) -> None:
        """Raise unless rows that are mixed have the logits of the merged model, by a probe of a few short rows.

        `at` and `merge` do so the first time; runs do so before they begin. See `mopl.conditioning.merging`.

        Raises:
            ValueError: With the modules that differ, and the targets that do not.
            RuntimeError: If the model inside is switched to something else than the mixture.
        """
        self._check_switches()
        if not self._checked:
            check_lora(self.model, self.adapters, self._mixed_logits, whole=self.coefficients is None)
            self._checked = True

    def _mixed_logits(self, ids: Tensor, coefficients: Tensor) -> Tensor:
        with self._standing_for({"coefficients": coefficients}, (ids,), {}):
            return logits_of(self.model, ids)

    @contextlib.contextmanager
    def _holding(self, coefficients: Tensor) -> Iterator[None]:
        with adapters_off(self.model), super()._holding(coefficients):
            yield

    def _places(self, coefficients: Tensor) -> Sequence[Place]:
        return places_of(self._parts.values(), self.adapters, coefficients.tolist())

    def _merged(self, coefficients: Tensor) -> nn.Module:
        with self._holding(coefficients):
            merged = copied(self.model).unload()
        if any(getattr(module, "gradient_checkpointing", False) for module in merged.modules()):
            merged.gradient_checkpointing_disable()  # which would hold a copy of the mixture, for its coefficients
        if settle_ties(merged) and (ids := probe_ids(merged)) is not None:
            # Some models do more to a head that is tied than to use its weight.
            with evaluating(self, merged), generators_kept():
                found, given = self._mixed_logits(ids, coefficients), logits_of(merged, ids)
                with self.reference():
                    plain = logits_of(self.model, ids)
            names = ", ".join(sorted({short_name(name) for name in self._parts}))
            remedy = f"leave the tied ones of {names} out of target_modules, or generate with weights"
            check_mixed_rows(type(merged).__name__, found, given, plain, remedy, merged.dtype)
        return merged

    # ---------------------------------------------------------------- files

    def save_adapter(
        self,
        weights: Weights,
        directory: str | os.PathLike[str],
        kl_weight: float | Tensor | None = None,
        *,
        beta: Any = None,
    ) -> None:
        """Write one trade-off as one LoRA adapter of PEFT, exactly: its rank is the sum of those of the sets.

        rsLoRA, patterns and biases are in its factors, so servers need know nothing of them; copies of
        `modules_to_save` are mixed.

        Args:
            weights: w, (m,), on the simplex.
            directory: The folder of the adapter.
            kl_weight: α, a number, if the coefficients depend on it.
            beta: None: no mixture is conditioned on β.

        Raises:
            ValueError: If weights do not fit, or the adapters are of DoRA.
        """
        config, tensors = self.adapter_at(weights, kl_weight, beta=beta)

        def fill(folder: Path) -> None:
            write_adapter(folder, config, tensors)
            self.model.create_or_update_model_card(str(folder))

        write_files(directory, fill, last=ADAPTER_CONFIG)

    def adapter_at(
        self, weights: Weights, kl_weight: float | Tensor | None = None, *, beta: Any = None
    ) -> tuple[Any, dict[str, Tensor]]:
        """Return what `save_adapter` writes: a `peft.LoraConfig`, and tensors by the names that PEFT's files have."""
        coefficients = self._one(weights, beta, kl_weight).tolist()
        config, tensors = one_adapter(self.model, self._parts, self.adapters, coefficients)
        config.base_model_name_or_path = self._base_name
        return self._name_targets(config, tensors), tensors

    def _name_targets(self, config: Any, tensors: Mapping[str, Tensor]) -> Any:
        """Return a configuration that names an adapter's layers: as q_proj, which servers read best, if that is all."""
        places = {key.partition(".lora_")[0].removeprefix("base_model.model.") for key in tensors if ".lora_" in key}
        short = {place.rpartition(".")[2] for place in places}
        every = (name.removesuffix(".base_layer") for name, _ in self.causal_lm.named_modules() if ".lora_" not in name)
        meant = {name for name in every if name.rpartition(".")[2] in short}
        # A list, since PEFT writes a set in any order.
        config.target_modules = sorted(short if meant == places else places)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        return config

    def adapters_by_objective(
        self, kl_weight: float | Tensor | None = None
    ) -> list[Callable[[], tuple[Any, dict[str, Tensor]]]]:
        """Return m functions that make one plain LoRA adapter for each objective, with Σ_i w_i adapter_i the mixture.

        All have one rank, the scale 1 and no patterns, as those of `adapter_at`, so the scale that a server gives
        adapter i is w_i. Where coefficients follow the KL weight, they are those of `kl_weight`, in the factors; an
        anchor's set, whose coefficient 1 - λ is (1 - λ) Σ_i w_i, is a part of each of them. A function each, since
        those of a large model are better made one after another.

        Returns:
            In the order of the objectives; each gives a `peft.LoraConfig` and tensors as `adapter_at` does.

        Raises:
            ValueError: If the coefficients are a function of one's own, which need not be linear in w, or what the
                adapters do is none of LoRA: DoRA, and copies of `modules_to_save`.
        """
        for name in self.adapters:
            config = self.model.peft_config[name]
            if config.use_dora:
                raise ValueError(
                    f"adapter {name!r} is of DoRA, which changes weights by what has their full rank, so it is no LoRA "
                    f"adapter for servers; {ONE_TRADE_OFF}"
                )
            if config.modules_to_save:
                raise ValueError(
                    f"adapter {name!r} has whole copies of {', '.join(sorted(config.modules_to_save))} "
                    f"(modules_to_save), which no server scales; {ONE_TRADE_OFF}, or train without modules_to_save"
                )
        if self._saved_rule == "custom":
            raise ValueError(
                f"coefficients is {self.coefficients!r}, a function that need not be linear in the weights, so scales "
                f"of adapters cannot follow it; {ONE_TRADE_OFF}"
            )
        vertices = torch.eye(self.objectives, dtype=torch.float64)
        shares = [self._one(each, None, kl_weight).tolist() for each in vertices]
        # Its own one is there where λ = 0, too: an adapter has a rank.
        used = [
            [(name, c) for j, (name, c) in enumerate(zip(self.adapters, each, strict=True)) if c != 0 or j == i]
            for i, each in enumerate(shares)
        ]
        rank = max(rank_of(self._parts.values(), [name for name, _ in each]) for each in used)
        return [functools.partial(self._plain_adapter, dict(each), rank) for each in used]

    def _plain_adapter(self, shares: Mapping[str, float], rank: int) -> tuple[Any, dict[str, Tensor]]:
        require("peft")
        from peft import LoraConfig, TaskType

        own, tensors = one_adapter(self.model, self._parts, list(shares), list(shares.values()), rank)
        config = LoraConfig(
            r=rank, lora_alpha=rank, target_modules=own.target_modules, fan_in_fan_out=own.fan_in_fan_out,
            lora_bias=own.lora_bias, task_type=TaskType.CAUSAL_LM, inference_mode=True,
            base_model_name_or_path=self._base_name,
        )  # fmt: skip
        return self._name_targets(config, tensors), tensors

    def _described(self) -> dict[str, Any]:
        return {"adapters": self.adapters, "coefficients": self._saved_rule, "base_model": self._base_name}

    @property
    def _adapters(self) -> list[str]:
        return self.adapters

    @classmethod
    def _load(
        cls,
        folder: Path,
        config: dict[str, Any],
        model: Any,
        *,
        trainable: bool,
        coefficients: Any = None,
        **options: Any,
    ) -> LoraMixture:
        rule = rule_of(config["coefficients"], coefficients, folder)
        wrapped = base_with_adapters(config, folder, model, options, trainable=trainable)
        record, sets = TuningRecord.read(config), len(config["adapters"])
        with fitting(folder / CONFIG_FILE):
            # In the order of the folder, for which they were trained, whatever their names say.
            order = config["adapters"]
            mixture = cls(wrapped, len(record.objectives), coefficients=rule, sets=sets, record=record, adapters=order)
        return mixture if trainable else mixture.requires_grad_(False)
