"""Whether Triton's interpreter works with the NumPy at hand, and tensors that are far apart in its memory."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

FAR = 2**30 + 64  # elements from row to row: a 32-bit integer for a kernel, as row numbers are; their product is none


def numbers(package: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in version(package).split(".")[:2])
    except PackageNotFoundError:  # an import says so
        return (9999,)


# Before Triton 3.7 the interpreter makes a number of an array of one entry, as NumPy 2.4 no longer does.
BROKEN = numbers("triton") < (3, 7) and numbers("numpy") >= (2, 4)
REASON = "Triton's interpreter before 3.7 does not run loops with NumPy 2.4 or later"


def far_apart(x: Tensor) -> Tensor:
    """Return a tensor with the same values whose rows lie `FAR` elements apart, in memory that is hardly touched.

    The interpreter wraps 32-bit integers as a GPU does. A kernel that counts elements by them is somewhere else, which
    mostly ends the process where the fixture `careful_memory` does not see it.
    """
    import pytest
    import torch

    rows, within = x.shape[0], x[0].contiguous()
    with pytest.MonkeyPatch.context() as patch:  # deterministic algorithms fill new tensors: all of this one
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        try:
            store = torch.empty((rows - 1) * FAR + within.numel(), dtype=x.dtype)
        except RuntimeError as error:
            pytest.skip(f"cannot reserve address space: {error}")
    view = store.as_strided(x.shape, (FAR, *within.stride()))
    assert (rows - 1) * view.stride(0) > 2**31 > view.stride(0)
    return view.copy_(x)
