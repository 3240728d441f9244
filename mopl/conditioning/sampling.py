"""Trade-offs for training: weights from a Dirichlet distribution, betas from a box.

Draws are counter-based: they are a function of (seed, step, rank) and of nothing else. A resumed run therefore draws
what the interrupted run would have drawn, and no global generator is read or moved. The first rows do not depend on
how many are drawn. A new version of NumPy may change the values (NEP 19), never their distribution.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mopl._arguments import check_positive, shape_of
from mopl._counted import counted, there_are
from mopl._renamed import renamed_attribute, renamed_keywords, renamed_names

Weights = Tensor | Sequence[float] | Sequence[Sequence[float]]
_WEIGHTS, _BETAS = 1, 2  # the streams of one (seed, step, rank)
NAME_PREFIX = "w="  # what the names of trade-offs begin with
_LONGEST_NUMBER = 40  # characters: float64 needs 24
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)


class Betas(NamedTuple):
    """β of each objective, and what a network is conditioned on.

    Attributes:
        beta: β, (count, m).
        normalized: β / ‖β‖₁, (count, m), on the simplex.
    """

    beta: Tensor
    normalized: Tensor

    temperature = renamed_attribute("Betas.temperature", "beta")


def _generator(seed: int, step: int, rank: int, stream: int) -> np.random.Generator:
    """Return the generator of one stream.

    Philox is keyed by seed and stream. Step and rank are the high half of its 256-bit counter, so that two streams
    overlap only after 2^128 draws.
    """
    for name, value in (("seed", seed), ("step", step), ("rank", rank)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value < 2**64:
            raise ValueError(f"{name} is {value!r} but must be an integer from 0 to 2^64 - 1")
    key = np.array([seed, stream], dtype=np.uint64)
    counter = np.array([0, 0, rank, step], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def _box(value: float | Sequence[float] | Tensor, objectives: int, name: str) -> np.ndarray:
    """Return a positive finite number, or one for each objective, as an (m,) array."""
    array = np.asarray(check_positive(value, name).double().cpu())
    if array.shape not in ((), (objectives,)):
        raise ValueError(
            f"{name} has shape {array.shape} but {there_are(objectives, 'objective')}; pass a number or one for each"
        )
    return np.broadcast_to(array, (objectives,))


def _check_count(objectives: int, count: int) -> None:
    if objectives < 1 or count < 0:
        raise ValueError(f"objectives is {objectives} and count is {count} but they must be at least 1 and 0")


@renamed_keywords(alpha="concentration")
def sample_weights(
    objectives: int,
    count: int,
    concentration: float | Sequence[float] | Tensor = 1.0,
    *,
    seed: int,
    step: int,
    rank: int = 0,
    balanced: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw weight vectors w ~ Dirichlet(α), as in Weight-COS-DPO (Ren et al., UAI 2025, equation 12).

    One vector a list has the same expectation as the paper's one vector a step, and less variance.

    Args:
        objectives: m.
        count: Number of vectors: 1 for one a step, B for one a list.
        concentration: α, positive: a number or one for each objective. 1 is uniform on the simplex, smaller favours
            the vertices, larger the mean α / Σ α. However small it is, no draw is NaN.
        seed: Seed of the run.
        step: Step of the optimiser.
        rank: Process of a distributed run.
        balanced: Draw one vector for every m rows, which have it and its rotations: each row by itself has the same
            distribution, and every objective has the same weight in the sum of the m rows.
        dtype: dtype of the result; the draw itself is in float64.

    Returns:
        (count, m) on the simplex, on the CPU.

    Raises:
        ValueError: If concentration is not positive or has another length than m, or differs between objectives where
            draws are balanced, or seed, step or rank is not an integer from 0 to 2^64 - 1.
    """
    _check_count(objectives, count)
    parameters = _box(concentration, objectives, "concentration")
    if not balanced:
        draws = _generator(seed, step, rank, _WEIGHTS).dirichlet(parameters, size=count)
        return torch.from_numpy(draws).to(dtype)
    if (parameters != parameters[0]).any():
        raise ValueError(
            f"concentration is {parameters.tolist()} but must be one number for balanced draws, which give each "
            "objective every weight in turn"
        )
    draws = _generator(seed, step, rank, _WEIGHTS).dirichlet(parameters, size=-(-count // objectives))
    turns = np.stack([np.roll(draws, turn, axis=1) for turn in range(objectives)], axis=1)
    return torch.from_numpy(turns.reshape(-1, objectives)[:count]).to(dtype)


def sample_betas(
    objectives: int,
    count: int,
    low: float | Sequence[float] | Tensor,
    high: float | Sequence[float] | Tensor,
    *,
    seed: int,
    step: int,
    rank: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Betas:
    """Draw β uniformly from a box, as in Temperature-COS-DPO (Ren et al., UAI 2025, equation 16).

    With the parametrisation of equation (15) the loss depends on β only through β / ‖β‖₁: train on `normalized` and
    the raw output of the network; `mopl.steering.beta_conditioned` brings ‖β‖₁ back afterwards. Take the box
    wider than the range that will be asked for; the paper uses [0.67, 1.5]^2.

    Args:
        objectives: m.
        count: Number of vectors: 1 for one a step, B for one a list.
        low: Lower end, positive: a number or one for each objective.
        high: Upper end, not below `low`.
        seed: Seed of the run.
        step: Step of the optimiser.
        rank: Process of a distributed run.
        dtype: dtype of the result; the draw itself is in float64.

    Returns:
        β and β / ‖β‖₁, each (count, m), on the CPU. They are independent of the weights of the same step.

    Raises:
        ValueError: If the box is empty, reaches 0, is beyond what the dtype can hold or has another length than m, or
            as `sample_weights`.
    """
    _check_count(objectives, count)
    bottom, top = _box(low, objectives, "low"), _box(high, objectives, "high")
    if (top < bottom).any():
        raise ValueError(f"high is {top.tolist()} but low is {bottom.tolist()}; pass high >= low for each objective")
    ends = torch.from_numpy(np.stack([bottom, top])).to(dtype)
    if not bool((ends.isfinite() & (ends > 0)).all()):
        raise ValueError(
            f"low is {bottom.tolist()} and high is {top.tolist()}, of which {str(dtype).removeprefix('torch.')} makes "
            "0 or infinity; pass another dtype"
        )
    uniform = _generator(seed, step, rank, _BETAS).random((count, objectives))
    draws = torch.from_numpy(bottom + (top - bottom) * uniform)
    return Betas(draws.to(dtype), (draws / draws.sum(-1, keepdim=True)).to(dtype))


def check_weights(
    weights: Weights,
    objectives: int | None = None,
    *,
    name: str = "weights",
) -> Tensor:
    """Raise unless every weight vector lies on the simplex: entries at least 0 that sum to 1.

    Reads the values, so it belongs where weights enter a program and not into a training step on a GPU.

    Args:
        weights: (m,) or (..., m), a tensor or nested numbers.
        objectives: m, if it is known.
        name: Name of the argument in errors.

    Returns:
        The weights as a floating-point tensor, not changed; numbers and integers become float64. The sum may be off
        by 1e-4 (by the rounding error of m terms in 16-bit formats).

    Raises:
        ValueError: If they are no numbers, the shape is wrong, or a vector is off the simplex; the message names the
            vector and the remedy.
    """
    try:
        tensor = weights if isinstance(weights, Tensor) else torch.as_tensor(weights, dtype=torch.float64)
    except (RuntimeError, TypeError, ValueError) as error:
        wanted = "(m,) or (..., m) numbers, in the order of the objectives"
        raise ValueError(f"{name} is {weights!r:.200} ({error}); pass {wanted}") from None
    if not tensor.is_floating_point():
        tensor = tensor.double()
    if tensor.ndim == 0 or tensor.shape[-1] == 0 or (objectives is not None and tensor.shape[-1] != objectives):
        wanted = "m" if objectives is None else str(objectives)
        raise ValueError(f"{name} has shape {shape_of(tensor)} but must be ({wanted},) or (..., {wanted})")
    rows = tensor.detach().double().cpu().reshape(-1, tensor.shape[-1])
    tolerance = max(1e-4, rows.shape[-1] * torch.finfo(tensor.dtype).eps)
    remedies = (
        (~rows.isfinite().all(-1), "has an entry that is not finite; pass numbers"),
        ((rows < 0).any(-1), "has a negative entry; set it to 0 and divide the vector by its sum"),
        ((rows.sum(-1) - 1).abs() > tolerance, "does not sum to 1; divide it by its sum"),
    )
    for bad, remedy in remedies:
        if bool(bad.any()):
            row = int(bad.nonzero()[0, 0])
            where = name if tensor.ndim == 1 else f"{name}[{row}]"
            entries = ", ".join(f"{x:g}" for x in rows[row].tolist())
            raise ValueError(f"{where} = ({entries}) must lie on the simplex but {remedy}")
    return tensor


def weights_name(weights: Weights, *, prefix: str = NAME_PREFIX) -> str:
    """Return the name of a trade-off, such as "w=0.7,0.3": of an adapter that a server has, of a folder, of a model.

    Weights are written with six significant digits (`f"{w:g}"`), so trade-offs of the same name differ by at most
    5e-7 in each weight, and what a name means lies at most that far from what it was made of. Signs, spaces and
    trailing zeros are never written: equal trade-offs have equal names.

    Args:
        weights: (m,) on the simplex.
        prefix: What the name begins with; `weights_of_name` reads names with and without "w=".

    Returns:
        The name: ASCII digits, points, commas, "e-" in weights below 1e-4, and the prefix.

    Raises:
        ValueError: If there is more than one vector, or as `check_weights`.
    """
    vector = check_weights(weights).detach().double()
    if vector.ndim != 1:
        raise ValueError(f"weights has shape {shape_of(vector)} but must be (m,): a name is that of one trade-off")
    return prefix + ",".join(f"{abs(weight):g}" for weight in vector.tolist())  # abs: -0.0 lies on the simplex, too


def weights_of_name(text: str, objectives: int, *, name: str = "the name of a trade-off") -> Tensor:
    """Return the weights that the name of a trade-off means, as `weights_name` or a person writes it.

    Args:
        text: m decimal numbers in the order of the objectives, with commas between them, such as "w=0.7,0.3", "0.7,0.3"
            or "1e-3, .999". Spaces around a number mean nothing.
        objectives: m.
        name: What the text is called in errors.

    Returns:
        (m,) float64 on the simplex, as written: the sum may be off by 1e-4.

    Raises:
        ValueError: If the text has another number of weights, something in it is no decimal number, or the weights are
            off the simplex; the message names the text, what is wrong and how such names are written.
    """
    example = f"such as {weights_name([1 / objectives] * objectives)!r}"
    shown = repr(text) if len(text) <= 80 else f"{text[:77]!r}..."
    # Counted before anything is cut in pieces: names come from strangers' requests, and may be of any length.
    written = text.strip(" ").removeprefix(NAME_PREFIX)
    count = written.count(",") + 1 if written.strip(" ") else 0
    if count != objectives:
        raise ValueError(f"{name} is {shown}: it has {counted(count, 'weight')} but must have {objectives}, {example}")
    numbers = [part.strip(" ") for part in written.split(",")]
    for number in numbers:
        if len(number) > _LONGEST_NUMBER or _NUMBER.fullmatch(number) is None:
            found = repr(number) if len(number) <= _LONGEST_NUMBER else f"a text of {len(number)} characters"
            raise ValueError(f"{name} is {shown}, where {found} is no decimal number; write it {example}")
    try:
        return check_weights([float(number) for number in numbers], objectives)
    except ValueError as error:
        raise ValueError(f"{name} is {shown}: {error}") from None


__getattr__ = renamed_names(__name__, Temperatures="Betas", sample_temperatures="sample_betas")
