"""Parts of parameter mixtures: what a scope names, coefficients from (w, α), rows that share a mixture."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mopl._arguments import check_choice, shape_of
from mopl._renamed import renamed_attribute, renamed_in_methods
from mopl.conditioning.causal_lm import output_head
from mopl.conditioning.sampling import check_weights
from mopl.conditioning.saved_models import CONFIG_FILE, fitting

SCOPES = ("full", "attention", "logits")
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
        smallest_kl_weight: α_min, the strongest influence of the rewards that is asked for; λ = 1 there.
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
        """Return the coefficients (..., sets) of weights (..., m) and α (...)."""
        if kl_weight is None:
            raise ValueError("kl_weight is missing; the coefficients of this mixture depend on it")
        share = (self._kappa(kl_weight) / self._kappa(self.smallest_kl_weight))[..., None]
        parts = [share * weights, 1 - share.expand(*weights.shape[:-1], 1)]
        return torch.cat(parts if self.anchor else parts[:1], -1)


def coefficients_of(
    rule: CoefficientRule | None,
    weights: Tensor | Sequence[float] | Sequence[Sequence[float]] | None,
    kl_weight: float | Tensor | None,
    objectives: int,
    sets: int,
    names: Sequence[str],
) -> Tensor:
    """Return the coefficients (sets,) or (B, sets), float64 for numbers, of (w, α)."""
    if weights is None:
        raise ValueError(f"weights are missing; pass one for each of {', '.join(names)}")
    w = check_weights(weights, objectives)
    if w.ndim > 2:
        raise ValueError(f"weights has shape {shape_of(w)}; pass (m,) = ({objectives},) or (B, m)")
    if rule is None:
        if kl_weight is not None:
            raise ValueError("kl_weight is given but the coefficients of this mixture are the weights; leave it out")
        return w
    strength = None
    if kl_weight is not None:
        strength = torch.as_tensor(kl_weight, dtype=w.dtype, device=w.device)
        if strength.ndim > 1 or (strength.ndim == 1 and w.ndim == 2 and len(strength) != len(w)):
            raise ValueError(f"kl_weight has shape {shape_of(strength)} but weights {shape_of(w)}; pass one or (B,)")
        if strength.ndim == 1 and w.ndim == 1:
            w = w.expand(len(strength), -1)
        strength = strength.expand(w.shape[:-1])
    result = rule(w, strength)
    if tuple(result.shape) != (*w.shape[:-1], sets):
        raise ValueError(
            f"coefficients gave {shape_of(result)} but must give {(*w.shape[:-1], sets)}, one for each set"
        )
    return result


def rule_to_save(rule: CoefficientRule | None) -> Any:
    """Return what a folder says of coefficients: their numbers, that they are a function, or nothing."""
    if isinstance(rule, KLWeightCoefficients):
        return {"smallest_alpha": rule.smallest_kl_weight, "kl_form": rule.kl_form, "anchor": rule.anchor}
    return "custom" if rule else None


def saved_rule(saved: Any, given: CoefficientRule | None, folder: Path) -> CoefficientRule | None:
    """Return the coefficients of a mixture in a folder.

    Raises:
        ValueError: If they are a function, which no file holds, and `given` is None; or if `given` is another rule than
            the one that the sets were trained with.
    """
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


# ---------------------------------------------------------------- which parameters


def select_parameters(model: nn.Module, scope: str) -> list[str]:
    """Return the names of the parameters of a scope; a tied parameter once, under its first name.

    "full" are all, "attention" those inside modules whose class is an attention, "logits" those of the output head,
    and anything else is a regular expression that some of a parameter's names must match (`re.search`).
    """
    aliases: dict[int, list[str]] = {}
    tensors: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
        tensors[id(parameter)] = parameter
    if scope == "attention":
        prefixes = [name for name, module in model.named_modules() if "attention" in type(module).__name__.lower()]
        chosen = [any(n.startswith(f"{p}." if p else "") for p in prefixes for n in a) for a in aliases.values()]
    elif scope == "logits":
        own = {id(parameter) for parameter in output_head(model).parameters()}
        chosen = [key in own for key in aliases]
    elif scope == "full":
        chosen = [True] * len(aliases)
    else:
        try:
            pattern = re.compile(scope)
        except re.error as error:
            raise ValueError(f"scope is {scope!r}, neither of {', '.join(SCOPES)} nor a pattern: {error}") from None
        chosen = [any(pattern.search(name) for name in names) for names in aliases.values()]
    names = [
        names[0]
        for (key, names), wanted in zip(aliases.items(), chosen, strict=True)
        if wanted and tensors[key].is_floating_point()
    ]
    if not names:
        raise ValueError(
            f"scope={scope!r} names no parameter of {type(model).__name__}; its parameters are "
            f"{', '.join(n[0] for n in list(aliases.values())[:8])}, ..."
        )
    return names


# ---------------------------------------------------------------- rows that share a mixture


def group_rows(coefficients: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the distinct rows (G, sets) of coefficients (B, sets), and for each the indices of its rows."""
    distinct, inverse = torch.unique(coefficients, dim=0, return_inverse=True)
    return distinct, [(inverse == g).nonzero()[:, 0] for g in range(len(distinct))]


def take_rows(value: Any, index: Tensor, rows: int) -> Any:
    """Return the rows of a tensor whose first dimension is the batch; anything else as it is."""
    if isinstance(value, Tensor) and value.ndim and value.shape[0] == rows:
        return value[index.to(value.device)]
    return value


def check_batch(values: Sequence[Any], rows: int) -> None:
    """Raise unless some tensor has a row for each row of the weights, and none another number of them."""
    shapes = [tuple(v.shape) for v in values if isinstance(v, Tensor) and v.ndim > 1]
    if not any(s[0] == rows for s in shapes) or any(s[0] not in (1, rows) for s in shapes):
        raise ValueError(
            f"weights has {rows} rows but the inputs have the shapes {shapes}; pass one weight vector a row, or (m,)"
        )


def no_cache(model: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword that keeps a causal language model from returning a cache, which cannot be put together."""
    if kwargs.get("past_key_values") is not None:
        raise ValueError("a cache belongs to one mixture; pass one weight vector (m,), or use generate()")
    takes = "use_cache" in inspect.signature(type(model).forward).parameters
    return {"use_cache": False} if takes and "use_cache" not in kwargs else {}


def join_rows(parts: Sequence[Any], groups: Sequence[Tensor]) -> Any:
    """Put outputs of groups of rows together in the rows' order: tensors, and tuples, mappings, dataclasses of them."""
    first = parts[0]
    if all(part is None for part in parts):
        return None
    if isinstance(first, Tensor):
        if any(p.ndim == 0 or len(p) != len(g) for p, g in zip(parts, groups, strict=True)):
            raise ValueError(
                f"an output of shape {shape_of(first)} has no row for each input, so outputs of rows with different "
                "weights cannot be put together; compute losses outside of the model (no labels), or pass (m,) weights"
            )
        order = torch.cat([g.to(first.device) for g in groups]).argsort()
        return torch.cat(list(parts))[order]
    if isinstance(first, Mapping):
        joined = {key: join_rows([part[key] for part in parts], groups) for key in first}
        return type(first)(**joined)
    if dataclasses.is_dataclass(first):
        names = [field.name for field in dataclasses.fields(first)]
        return type(first)(**{n: join_rows([getattr(part, n) for part in parts], groups) for n in names})  # type: ignore
    if isinstance(first, (tuple, list)):
        values = [join_rows(list(each), groups) for each in zip(*parts, strict=True)]
        return type(first)(*values) if hasattr(first, "_fields") else type(first)(values)
    raise ValueError(
        f"an output is a {type(first).__name__}, which cannot be put together from rows with different weights; pass "
        "one weight vector (m,)"
    )


def join_generated(parts: Sequence[Any], groups: Sequence[Tensor], pad: int | None) -> Tensor:
    """Put generated sequences together, padded on the right to the longest."""
    if any(not isinstance(part, Tensor) for part in parts):
        raise ValueError("return_dict_in_generate works with one weight vector (m,) for all rows")
    length = max(part.shape[1] for part in parts)
    if pad is None and any(part.shape[1] != length for part in parts):
        raise ValueError("rows ended at different lengths and no pad_token_id says how to fill them; pass it")
    copies = len(parts[0]) // max(len(groups[0]), 1)  # num_return_sequences: the copies of a row follow one another
    filled = [nn.functional.pad(part, (0, length - part.shape[1]), value=pad or 0) for part in parts]
    rows = torch.cat([(g[:, None] * copies + torch.arange(copies, device=g.device)).reshape(-1) for g in groups])
    return torch.cat(filled)[rows.to(filled[0].device).argsort()]
