"""Files of tensors: safetensors, written and read with checks, and what `torch.save` wrote.

Names and shapes are compared with what is expected before anything is loaded, so that a file that is cut off, or is
that of another model, is named and costs no memory; weights that are not numbers are refused, too.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mopl._extras import require
from mopl._files import make_parents, write_file
from mopl._records import REMEDY, check_file, damaged

Shapes = Mapping[str, Sequence[int]]


@contextlib.contextmanager
def opened(file: str | os.PathLike[str], *, remedy: str = REMEDY) -> Iterator[Any]:
    """Open a safetensors file inside a `with` block, as `safe_open` does; a `DamagedFile` if it is none, or cut off."""
    require("safetensors")
    from safetensors import SafetensorError, safe_open

    path = check_file(file, remedy=remedy)
    try:
        with safe_open(str(path), framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise damaged(file, f"it is no whole safetensors file ({error})", remedy) from None


def _shapes(handle: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}


def shapes_of(file: str | os.PathLike[str], *, remedy: str = REMEDY) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in a safetensors file by name; errors as `opened`."""
    with opened(file, remedy=remedy) as handle:
        return _shapes(handle)


def dtype_of(file: str | os.PathLike[str], *, remedy: str = REMEDY) -> torch.dtype:
    """Return the dtype that holds every floating-point number in a safetensors file; errors as `opened`."""
    with opened(file, remedy=remedy) as handle:
        kinds = {handle.get_slice(name).get_dtype(): name for name in handle.keys()}
        dtypes = [handle.get_tensor(name).dtype for name in kinds.values()]
    return functools.reduce(torch.promote_types, [dtype for dtype in dtypes if dtype.is_floating_point])


def check_shapes(file: str | os.PathLike[str], found: Shapes, wanted: Shapes, *, remedy: str = REMEDY) -> None:
    """Raise a `DamagedFile` unless a file has the tensors that a model needs, of their shapes, and no others."""
    for names, what in ((wanted.keys() - found.keys(), "it lacks"), (found.keys() - wanted.keys(), "nothing takes")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise damaged(
                file, f"{what} {', '.join(map(repr, sorted(names)[:3]))}{more}, so it does not fit the model", remedy
            )
    for name, shape in wanted.items():
        if tuple(found[name]) != tuple(shape):
            raise damaged(file, f"{name!r} is {tuple(found[name])} but must be {tuple(shape)} to fit the model", remedy)


def check_numbers(file: str | os.PathLike[str], tensors: Mapping[str, Tensor], *, remedy: str = REMEDY) -> None:
    """Raise if a tensor that was read from a file holds NaN or infinities."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.itemsize == 1:
            tensor = tensor.float()  # PyTorch compares none of 8 bits
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise damaged(file, f"{name!r} holds numbers that are NaN or infinite", remedy)


def read_tensors(
    file: str | os.PathLike[str], wanted: Shapes | None = None, *, buffers: Collection[str] = (), remedy: str = REMEDY
) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; errors as `opened`, `check_shapes` and `check_numbers`.

    `wanted` are their shapes by name, None for any; those called in `buffers`, such as masks, may be infinite.
    """
    with opened(file, remedy=remedy) as handle:
        if wanted is not None:
            check_shapes(file, _shapes(handle), wanted, remedy=remedy)
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}
    check_numbers(file, {name: tensor for name, tensor in tensors.items() if name not in buffers}, remedy=remedy)
    return tensors


def write_tensors(
    file: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all, into a folder that is made where there is none."""
    require("safetensors")
    from safetensors.torch import save_file

    make_parents(file)
    write_file(file, lambda path: save_file(tensors, str(path), metadata=metadata))


def check_fits(file: str | os.PathLike[str], make: Callable[[], nn.Module], *, remedy: str = REMEDY) -> None:
    """Raise unless a file fits a model that has not been made yet: it is made where tensors have no memory."""
    with torch.device("meta"):
        _check_state(make(), file, remedy)


def load_state(model: nn.Module, file: str | os.PathLike[str], *, remedy: str = REMEDY) -> None:
    """Load parameters and buffers that `safetensors.torch.save_model` wrote; errors as `read_tensors`.

    Names and shapes must be those of the model; numbers are checked in parameters only.
    """
    from safetensors.torch import load_model

    _check_state(model, file, remedy)
    try:
        load_model(model, os.fspath(file), strict=True)
    except RuntimeError as error:
        raise damaged(file, f"it does not fit the model ({str(error).splitlines()[0]})", remedy) from None
    check_numbers(file, dict(model.named_parameters()), remedy=remedy)


def _check_state(model: nn.Module, file: str | os.PathLike[str], remedy: str) -> None:
    with opened(file, remedy=remedy) as handle:
        found = _shapes(handle)
        # Of tensors that share their memory the file has one, and in its metadata what the others are called.
        shared = {name for name, kept in (handle.metadata() or {}).items() if kept in found}
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in shared}
    check_shapes(file, found, wanted, remedy=remedy)


def load_pickled(file: str | os.PathLike[str], *, remedy: str = REMEDY) -> Any:
    """Return what `torch.save` wrote, on the CPU: tensors and plain values, never code; else a `DamagedFile`."""
    path = check_file(file, remedy=remedy)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:
        # A damaged archive shows as whatever the unpickler stumbles over.
        first = str(error).strip().split("\n")[0][:120]
        raise damaged(file, f"torch cannot read it ({type(error).__name__}: {first})", remedy) from None
