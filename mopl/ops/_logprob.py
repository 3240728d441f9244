"""What the log-probability ops share: arguments, the meaning of "does not count", small formulas on (N,) vectors.

Notation: N rows, V vocabulary entries, E targets. `u` is the logit that the softmax sees, that is after logit scale,
softcap and temperature:

    u = softcap * tanh(logit_scale * a / softcap) / temperature        (without softcap: logit_scale * a / temperature)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mopl._arguments import POSITIVE, as_value, check_floating, check_mask, shape_of
from mopl._counted import counted
from mopl._sharded import is_dtensor as is_dtensor
from mopl.ops._rows import times

SKIP = -1  # a target that does not count, once mask and ignore_index are applied


def as_index(value: Tensor, name: str, meaning: str) -> Tensor:
    """Return an integer tensor as int64; raise if it is no integer tensor."""
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        is_tensor = isinstance(value, Tensor)
        got = value.dtype if is_tensor else type(value).__name__
        remedy = f"{name}.long()" if is_tensor else f"torch.tensor({name})"
        raise TypeError(f"{name} is {got} but must be an integer tensor of {meaning}; pass {remedy}")
    index: Tensor = value.long()
    return index


def merge_targets(target: Tensor, mask: Tensor | None, ignore_index: int, vocabulary: int | Tensor) -> Tensor:
    """Return int64 targets with `SKIP` where an entry does not count and `vocabulary` where a target is negative.

    A negative target that is not `ignore_index` is a mistake: it becomes one past the vocabulary, so that the range
    check has one side only and a mistake is never taken for an ignored entry.
    """
    target = as_index(target, "target", "token ids")
    merged = torch.where(target < 0, vocabulary, target)
    keep = target != ignore_index
    check_mask(mask, target, "target", "target")
    keep = keep if mask is None else keep & mask
    return torch.where(keep, merged, SKIP)


def check_target_range(target: Tensor, vocabulary: int) -> None:
    """Raise if a merged target lies outside the vocabulary; reads values, so it synchronises on a GPU."""
    if target.numel() and bool((target >= vocabulary).any()):
        where = tuple((target >= vocabulary).nonzero()[0].tolist())
        raise ValueError(
            f"target holds an id that is negative or not below the vocabulary size {vocabulary} "
            f"(first at flattened position {where}); give ignored entries ignore_index, or mask them"
        )


def per_row(value: float | Tensor, name: str, shape: torch.Size, like: Tensor, counts: Callable[[], Tensor]) -> Tensor:
    """Return a number or a tensor that broadcasts to the rows' shape as a flat (N,) tensor in the compute dtype.

    It must be positive where a row counts; `counts` says which of the (N,) do, and is asked where an entry is not.
    """
    if isinstance(value, Tensor) and value.device != like.device and value.numel() > 1:
        raise ValueError(f"{name} is on {value.device} but the rows are on {like.device}; move {name} there")

    def excused(bad: Tensor) -> Tensor:  # an entry that no row uses that counts
        return counts().view(shape).long().sum_to_size(bad.shape) == 0

    try:
        return as_value(value, name, like, POSITIVE, excused).expand(shape).reshape(-1)
    except RuntimeError:
        raise ValueError(
            f"{name} has shape {shape_of(value)} but there is one row for each of {tuple(shape)}; "  # type: ignore[arg-type]
            f"pass a number or a tensor that broadcasts to {tuple(shape)}"
        ) from None


def check_scalar(value: float | None, name: str) -> float:
    """Return an optional host number as float, 0.0 for None; raise unless it is positive."""
    if value is None:
        return 0.0
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Python number, a constant of the model; got a tensor")
    if not POSITIVE.holds(value):
        raise ValueError(f"{name} is {value} but {POSITIVE.words}; pass None to leave it out")
    return float(value)


def check_bound(value: int | None, name: str) -> None:
    """Raise unless an optional bound, in rows or bytes, is a whole number from 0 on."""
    if not (value is None or isinstance(value, int) or hasattr(value, "__index__")):
        raise TypeError(f"{name} is {value!r} but must be a whole number (an int) or None")
    if value is not None and value < 0:
        raise ValueError(f"{name} is {value} but must not be negative")


def check_operands(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise unless hidden (..., H), weight (V, H) and bias (V,) fit each other."""
    given = [(hidden, "hidden", "(..., H)"), (weight, "weight", "(V, H)")]
    given += [] if bias is None else [(bias, "bias", "(V,)")]
    for value, name, shape in given:
        check_floating(value, name, shape)
        if value.device != hidden.device:
            raise ValueError(f"{name} is on {value.device} but hidden is on {hidden.device}; move {name} there")
    if is_dtensor(hidden):
        raise TypeError(
            "hidden is a DTensor but must be a plain tensor with the same rows on every rank of group; "
            "pass hidden.full_tensor()"
        )
    if hidden.ndim < 1 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden has shape {shape_of(hidden)} and weight {shape_of(weight)}, but they must be (..., H) and (V, H) "
            "with the same H; pass the weight of the head as torch.nn.Linear keeps it, not its transpose"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"weight has shape {shape_of(weight)}: there is no vocabulary; pass at least one row")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias has shape {shape_of(bias)} but weight has {shape_of(weight)}; pass one bias a row of weight, "
            f"({weight.shape[0]},)"
        )


def check_row_range(row: Tensor | None, rows: int) -> None:
    """Raise if `row` names a row that is not there; reads values."""
    if row is not None and row.numel() and bool(((row < 0) | (row >= rows)).any()):
        raise ValueError(
            f"row holds {int(row.min())} to {int(row.max())} but hidden has {counted(rows, 'row')}; "
            f"pass numbers from 0 to {rows - 1}"
        )


def rows_that_count(target: Tensor, row: Tensor | None, rows: int) -> Tensor:
    """Return which rows (N,) have a merged target (E,) that counts."""
    keep = target >= 0
    return keep if row is None else keep.new_zeros(rows).index_fill_(0, row[keep], True)


def check_row(row: Tensor | None, target: Tensor, hidden: Tensor) -> Tensor | None:
    """Return `row` flat as int64, or None; raise unless targets and rows of hidden fit each other."""
    lead = hidden.shape[:-1]
    if row is None:
        if target.shape != lead:
            raise ValueError(
                f"target has shape {shape_of(target)} but hidden has {shape_of(hidden)}; pass target of shape "
                f"{tuple(lead)}, or row= to say which row of hidden each target belongs to"
            )
        return None
    place = as_index(row, "row", "row numbers")
    if place.shape != target.shape:
        raise ValueError(f"row has shape {shape_of(place)} but target has {shape_of(target)}; pass one row a target")
    if place.device != hidden.device:
        raise ValueError(f"row is on {place.device} but hidden is on {hidden.device}; move row there")
    return place.reshape(-1)


def weighted_by_probability(value: Tensor, logprob: Tensor) -> Tensor:
    """Return exp(logprob) * value, 0 where the probability is 0 even if the value is infinite."""
    return times(logprob.exp(), value)


class Upstream(NamedTuple):
    """Upstream gradients of a log-probability op; None where there is none."""

    logprob: Tensor | None  # one a target
    logsumexp: Tensor | None  # (N,)
    entropy: Tensor | None  # (N,)


def temperature_gradient(
    upstream: Upstream,
    target: Tensor,  # one a target: negative where it does not count
    logprob: Tensor,  # one a target
    of_rows: Callable[[Tensor], Tensor],  # sums over the targets of each row: (N,)
    temperature: Tensor,  # (N,)
    logsumexp: Tensor,  # (N,)
    entropy: Tensor,  # (N,)
    variance: Tensor,  # (N,) or empty
    idle: Tensor,  # (N,) bool: rows that do not count
) -> Tensor:
    """Return the gradient of the temperature (N,) from row statistics alone.

    With mean = E_p[u] = logsumexp - entropy: d logprob/dT = -(logprob + entropy)/T, d logsumexp/dT = -mean/T and
    d entropy/dT = Var_p(u)/T.
    """
    total = torch.zeros_like(temperature)
    if upstream.logprob is not None:
        counts = upstream.logprob.masked_fill(target < 0, 0)
        total = total - of_rows(times(counts, logprob)) - of_rows(counts) * entropy
    if upstream.logsumexp is not None:
        total = total - upstream.logsumexp * (logsumexp - entropy)
    if upstream.entropy is not None:
        total = total + upstream.entropy * variance
    return (total / temperature).masked_fill(idle, 0)
