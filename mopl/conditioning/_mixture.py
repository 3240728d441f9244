"""What mixtures of parameters and of adapters have in common: coefficients from (w, α), one mixture, files."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor, nn

from mopl._arguments import check_beta_given, check_choice, readable, shape_of
from mopl._counted import counted, there_are
from mopl._records import Finite
from mopl._renamed import renamed_attribute, renamed_in_methods
from mopl._sharded import is_sharded
from mopl._threads import in_turn
from mopl.conditioning.adapted import Place, held
from mopl.conditioning.merging import set_name
from mopl.conditioning.sampling import Weights
from mopl.conditioning.saved_models import CONFIG_FILE, Record, TuningRecord, fitting
from mopl.conditioning.weighted import WeightedModel

CoefficientRule = Callable[[Tensor, "Tensor | None"], Tensor]  # (..., m), (...) -> (..., sets)


@renamed_in_methods("__init__", smallest_alpha="smallest_kl_weight")
@renamed_in_methods("__call__", alpha="kl_weight")
@dataclasses.dataclass(frozen=True)
class KLWeightCoefficients:
    """Coefficients that follow the KL weight: λ w_i with λ = κ(α) / κ(α_min), and 1 - λ for an anchor set.

    κ(α) = (1 - α)/α, or 1/α for the "penalty" form, is what multiplies the rewards in the optimal policy's exponent.
    Mixing logits of a tabular policy with these coefficients, the anchor at the reference, is exact for every (w, α) at
    once; mixing with α itself as a coefficient is not. CLP's own rule for α was not at hand: this one is ours.

    Args:
        smallest_kl_weight: α_min, the strongest influence of the rewards that is asked for; λ = 1 there, and above 1
            for a smaller α, which extrapolates.
        kl_form: "complement" or "penalty", as in `mopl.losses.policy_gradient`.
        anchor: whether the last set takes 1 - λ. A LoRA mixture needs none: its base model is the anchor.
    """

    smallest_kl_weight: float
    kl_form: str = "complement"
    anchor: bool = True

    smallest_alpha = renamed_attribute("KLWeightCoefficients.smallest_alpha", "smallest_kl_weight")

    def __post_init__(self) -> None:
        check_choice(self.kl_form, ("complement", "penalty"), "kl_form")
        if not 0 < self.smallest_kl_weight < (1 if self.kl_form == "complement" else float("inf")):
            raise ValueError(
                f"smallest_kl_weight is {self.smallest_kl_weight} but must be above 0 (complement: below 1)"
            )

    def sets(self, objectives: int) -> int:
        """Return the number of parameter sets."""
        return objectives + self.anchor

    def _kappa(self, kl_weight: Any) -> Any:
        return ((1 - kl_weight) if self.kl_form == "complement" else 1) / kl_weight

    def __call__(self, weights: Tensor, kl_weight: Tensor | None) -> Tensor:
        """Return the coefficients of weights and α.

        Args:
            weights: (..., m), on the simplex.
            kl_weight: α, (...): above 0, in the form "complement" also at most 1.

        Returns:
            (..., sets).

        Raises:
            ValueError: If `kl_weight` is missing or out of range.
        """
        if kl_weight is None:
            raise ValueError("kl_weight is missing; the coefficients of this mixture depend on it")
        largest = 1.0 if self.kl_form == "complement" else float("inf")
        if readable(kl_weight) and not bool(((kl_weight > 0) & (kl_weight <= largest)).all()):
            raise ValueError(f"kl_weight is {kl_weight.tolist()} but must be above 0 (complement: and at most 1)")
        share = (self._kappa(kl_weight) / self._kappa(self.smallest_kl_weight))[..., None]
        parts = [share * weights, 1 - share.expand(*weights.shape[:-1], 1)]
        return torch.cat(parts if self.anchor else parts[:1], -1)


# Around each kind of mixture: messages name what they are around.
renamed_in_mixture = renamed_in_methods("coefficients_of", "forward", "generate", "at", "merge", alpha="kl_weight")


class _Coefficients(msgspec.Struct, forbid_unknown_fields=True):
    smallest_alpha: Finite
    kl_form: str = "complement"
    anchor: bool = True


class MixtureRecord(Record):
    """What `mopl.json` says of a mixture."""

    coefficients: _Coefficients | Literal["custom"] | None


class Mixture(WeightedModel):
    """A model that runs with Σ_i c_i of its sets, c = w or a function of (w, α)."""

    def __init__(
        self,
        objectives: int,
        coefficients: CoefficientRule | None,
        sets: int | None,
        record: TuningRecord | Sequence[str] | None,
    ) -> None:
        super().__init__()
        if isinstance(objectives, (str, Sequence)):
            names = [objectives] if isinstance(objectives, str) else list(objectives)
            raise TypeError(
                f"objectives is {objectives!r} but must be how many there are; pass objectives={len(names)}, "
                f"record={names}, which names them"
            )
        if objectives < 1:
            raise ValueError(f"objectives is {objectives} but must be at least 1")
        if sets is None:
            sets = coefficients.sets(objectives) if isinstance(coefficients, KLWeightCoefficients) else objectives
        if coefficients is None and sets != objectives:
            raise ValueError(
                f"{there_are(sets, 'set')} for {counted(objectives, 'objective')}; pass coefficients, which map one "
                "to the other"
            )
        self.record = TuningRecord.of(record, objectives)
        self.objectives, self.coefficients, self._count = objectives, coefficients, sets
        self._checked = False  # that one mixture computes what mixed rows do

    def coefficients_of(self, weights: Weights | None, kl_weight: float | Tensor | None = None) -> Tensor:
        """Return what multiplies the sets.

        Args:
            weights: w, (m,) or (B, m), on the simplex.
            kl_weight: α, a number or (B,), if the coefficients depend on it.

        Returns:
            (sets,) or (B, sets): float64 for numbers.

        Raises:
            ValueError: If something is missing or does not fit.
        """
        w = super().conditions(weights, None, kl_weight)["weights"]
        if self.coefficients is None:
            return w
        strength = None
        if kl_weight is not None:
            strength = torch.as_tensor(kl_weight, dtype=w.dtype, device=w.device)
            if strength.ndim > 1 or (strength.ndim == 1 and w.ndim == 2 and len(strength) != len(w)):
                raise ValueError(
                    f"kl_weight has shape {shape_of(strength)} but weights {shape_of(w)}; pass one or (B,)"
                )
            if strength.ndim == 1 and w.ndim == 1:
                w = w.expand(len(strength), -1)
            strength = strength.expand(w.shape[:-1])
        result, wanted = self.coefficients(w, strength), (*w.shape[:-1], self._count)
        if tuple(result.shape) != wanted:
            raise ValueError(f"coefficients gave {shape_of(result)} but must give {wanted}, one for each set")
        return result

    @property
    def takes_kl_weight(self) -> bool:
        """Whether the coefficients are a function of (w, α)."""
        return self.coefficients is not None

    def conditions(self, weights: Weights | None, beta: Any = None, kl_weight: Any = None) -> dict[str, Any]:
        """Return the keywords of a trade-off, checked as the coefficients are; see `WeightedModel.conditions`."""
        self.coefficients_of(weights, kl_weight)
        return super().conditions(weights, beta, kl_weight)

    def _of_call(self, weights: Weights | None, beta: Any, kl_weight: Any) -> Tensor:
        """Return the coefficients of a call, (sets,) where they are those of all rows, or (B, sets)."""
        check_beta_given(beta, False, f"to a {type(self).__name__}, which is not conditioned on it; leave it out")
        values = self.coefficients_of(weights, kl_weight)
        return values[0] if values.ndim == 2 and len(values) == 1 else values

    def _one(self, weights: Weights, beta: Any, kl_weight: float | Tensor | None) -> Tensor:
        """Return the coefficients (sets,) of one mixture, to be made now."""
        if is_sharded(self):
            raise RuntimeError(
                "the model is sharded by FSDP2 or ZeRO-3, where no process has the parameters of a mixture whole; call "
                "save_pretrained in every process and load the folder in one, or generate with weights"
            )
        self.conditions(weights, beta, kl_weight)
        coefficients = self.coefficients_of(weights, kl_weight)
        if coefficients.ndim != 1:
            raise ValueError(f"weights are {len(coefficients)} vectors but one mixture has one; pass (m,)")
        return coefficients

    def _check_outside(self) -> None:
        if self._held is not None:
            raise RuntimeError("the model holds a mixture; leave the `with mixture.at(...)` block first")

    # The model inside has the mixture's parameters in the place of its own inside of `at`: copied, saved, loaded into
    # or moved there they would be taken for each other.

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles have; a RuntimeError inside of `at`."""
        self._check_outside()
        return self.__dict__

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the parameters and buffers by name; a RuntimeError inside of `at`."""
        self._check_outside()
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._check_outside()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        self._check_outside()
        return super()._apply(fn, recurse)

    # ---------------------------------------------------------------- one mixture

    @contextlib.contextmanager
    def at(self, weights: Weights, kl_weight: float | Tensor | None = None, *, beta: Any = None) -> Iterator[nn.Module]:
        """Be the plain model of one trade-off inside a `with` block, at its cost.

        Args:
            weights: w, (m,).
            kl_weight: α, a number, if the coefficients depend on it.
            beta: None; no mixture is conditioned on β.

        Yields:
            The language model, with the mixture in place: of parameters, which is made once and kept for the next time,
            in |S| more parameters, until the sets are trained further or `clear_cache()`; or of adapters, which are
            added to the weights for the time of the block.

        Raises:
            ValueError: If weights do not fit, or that model is not the mixture; see `check_merging`.
            RuntimeError: If another thread holds another mixture, or the reference.
        """
        coefficients = self._one(weights, beta, kl_weight).clone()

        def switches() -> Sequence[contextlib.AbstractContextManager[Any]]:
            self.check_merging()
            return [self._holding(coefficients)]

        with self._turns.switched(coefficients.tolist(), switches):
            yield self.causal_lm

    @in_turn
    @torch.no_grad()
    def merge(self, weights: Weights, kl_weight: float | Tensor | None = None, *, beta: Any = None) -> nn.Module:
        """Return a copy of the model at one trade-off, with no trace of the mixture: save it, export it, serve it.

        A weight that other modules share and that adapters are added to is its own in the copy, whose configuration
        then says that nothing is tied: a head with adapters, say, and embeddings without.

        Raises:
            ValueError: If weights do not fit, the merged model is not the mixture, or its files would load as another.
        """
        coefficients = self._one(weights, beta, kl_weight)
        self._check_outside()
        self.check_merging()
        merged = self._merged(coefficients)
        set_name(merged, "")  # no longer the base model's: what is trained on top would be loaded onto that
        return merged

    @contextlib.contextmanager
    def _holding(self, coefficients: Tensor) -> Iterator[None]:
        """Put the mixture of coefficients (sets,) into the model inside a `with` block; in one's turn only."""
        with held(self._places(coefficients)):
            self._held = {}
            try:
                yield
            finally:
                self._held = None

    def _places(self, coefficients: Tensor) -> Sequence[Place]:
        """Return the parameters of the model at coefficients (sets,)."""
        raise NotImplementedError

    def _merged(self, coefficients: Tensor) -> nn.Module:
        raise NotImplementedError

    # ---------------------------------------------------------------- files

    @property
    def _saved_rule(self) -> Any:
        """What a folder says of the coefficients: their numbers, that they are a function, or nothing."""
        rule = self.coefficients
        if isinstance(rule, KLWeightCoefficients):
            return {"smallest_alpha": rule.smallest_kl_weight, "kl_form": rule.kl_form, "anchor": rule.anchor}
        return "custom" if rule else None


def rule_of(saved: Any, given: CoefficientRule | None, folder: Path) -> CoefficientRule | None:
    """Return the coefficients of a folder; raise where they were a function, or `given` is another rule."""
    if saved == "custom":
        if given is None:
            raise ValueError(f"{folder} was trained with coefficients of its own; pass the function as coefficients")
        return given
    with fitting(folder / CONFIG_FILE):
        numbers = dict(saved or {})
        rule = None if saved is None else KLWeightCoefficients(numbers.pop("smallest_alpha"), **numbers)
    if given is not None and given != rule:
        raise ValueError(
            f"coefficients is {given!r} but {folder} was trained with {rule or 'the weights themselves'}; "
            "leave coefficients out"
        )
    return rule
