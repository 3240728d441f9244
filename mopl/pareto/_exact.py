"""Arithmetic that extreme figures do not break: scaling by powers of two, which changes no digit; blocks of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

BLOCK = 1_000_000  # entries of a table of all pairs that are held at once: 8 MB in float64


def exponent(*arrays: np.ndarray) -> int:
    """Return e for which 2^-e times the entries can be squared and summed; 0 where they can as they are."""
    largest = max((float(np.abs(array).max()) for array in arrays if array.size), default=0.0)
    by = math.frexp(largest)[1]
    return by if abs(by) > 400 else 0


def scaled_back(value: float, by: int, what: str) -> float:
    """Return value 2^by.

    Raises:
        ValueError: If that is beyond float64.
    """
    with np.errstate(over="ignore"):
        result = float(np.ldexp(value, by))
    if not math.isfinite(result):
        raise ValueError(
            f"the {what} of these points is beyond the largest float64, about 1.8e308; divide the figures by a constant"
        )
    return result


def homogeneous(measure: Callable[..., float], what: str, *arrays: np.ndarray) -> float:
    """Return a figure that scales as the points do, without overflow or underflow of squares on the way."""
    by = exponent(*arrays)
    return scaled_back(measure(*(np.ldexp(array, -by) for array in arrays)), by, what)


def lengths(differences: np.ndarray) -> np.ndarray:
    """Return the Euclidean lengths (n,) of rows (n, m) whose squares do not overflow; tiny ones are exact too."""
    plain = np.linalg.norm(differences, axis=1)
    small = plain < 1e-150  # their squares lose digits, or are 0
    if small.any():
        part = differences[small]
        by = np.frexp(np.abs(part).max(1))[1]
        plain[small] = np.ldexp(np.linalg.norm(np.ldexp(part, -by[:, None]), axis=1), by)
    return plain


def row_blocks(n: int) -> Iterator[slice]:
    """Yield slices of rows of a table of all n x n pairs, each of about `BLOCK` entries."""
    step = max(1, BLOCK // max(n, 1))
    for first in range(0, n, step):
        yield slice(first, min(first + step, n))
