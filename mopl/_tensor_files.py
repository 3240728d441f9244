"""Validated reading of files of tensors: safetensors, and what `torch.save` wrote.

Names and shapes are compared with what is expected before anything is loaded, so that a file that is cut off, or is
that of another model, is named and costs no memory; weights that are not numbers are refused, too.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mopl._extras import require
from mopl._records import REMEDY, check_file, damaged

Shapes = Mapping[str, Sequence[int]]


@contextlib.contextmanager
def opened(file: str | os.PathLike[str], *, remedy: str = REMEDY) -> Iterator[Any]:
    """Open a safetensors file inside a `with` block; gives what `safetensors.safe_open` does.

    Raises:
        FileNotFoundError: If nothing is there.
        DamagedFile: If it is no safetensors file, or cut off.
    """
    require("safetensors")
    from safetensors import SafetensorError, safe_open

    path = check_file(file, remedy=remedy)
    try:
        with safe_open(str(path), framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise damaged(file, f"it is no whole safetensors file ({error})", remedy) from None


def shapes_of(file: str | os.PathLike[str], *, remedy: str = REMEDY) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in a safetensors file by name; errors as `opened`."""
    with opened(file, remedy=remedy) as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}


def check_shapes(file: str | os.PathLike[str], found: Shapes, wanted: Shapes, *, remedy: str = REMEDY) -> None:
    """Raise unless a file has the tensors that are wanted, and no others.

    Args:
        file: The file, for the message.
        found: Shapes by name, as `shapes_of`.
        wanted: The same of the model that they are for.
        remedy: What the message says to do.

    Raises:
        DamagedFile: With the names that only one of them has, or the two shapes.
    """
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
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise damaged(file, f"{name!r} holds numbers that are NaN or infinite", remedy)


def read_tensors(
    file: str | os.PathLike[str],
    wanted: Shapes | None = None,
    *,
    buffers: Collection[str] = (),
    remedy: str = REMEDY,
) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Args:
        file: The file.
        wanted: Their shapes by name; None for any.
        buffers: Names of those that may be infinite, such as masks.
        remedy: What errors say to do.

    Raises:
        FileNotFoundError: If nothing is there.
        DamagedFile: If the file is damaged, has other tensors, or numbers that are NaN or infinite.
    """
    with opened(file, remedy=remedy) as handle:
        names = list(handle.keys())
        if wanted is not None:
            check_shapes(file, {name: handle.get_slice(name).get_shape() for name in names}, wanted, remedy=remedy)
        tensors = {name: handle.get_tensor(name) for name in names}
    check_numbers(file, {name: tensor for name, tensor in tensors.items() if name not in buffers}, remedy=remedy)
    return tensors


def check_fits(file: str | os.PathLike[str], make: Callable[[], nn.Module], *, remedy: str = REMEDY) -> None:
    """Raise unless a safetensors file holds the state of a model that has not been made yet.

    Args:
        file: The file.
        make: Makes the model; called where tensors have shapes but no memory.
        remedy: What errors say to do.

    Raises:
        DamagedFile: As `check_shapes`.
    """
    with torch.device("meta"):
        model = make()
    load_state(model, file, remedy=remedy, check_only=True)


def load_state(
    model: nn.Module, file: str | os.PathLike[str], *, remedy: str = REMEDY, check_only: bool = False
) -> None:
    """Load parameters and buffers that `safetensors.torch.save_model` wrote; they must be those of the model.

    Args:
        model: The model.
        file: The file.
        remedy: What errors say to do.
        check_only: Compare names and shapes, and load nothing.

    Raises:
        FileNotFoundError: If nothing is there.
        DamagedFile: As `read_tensors`; numbers are checked in parameters only.
    """
    from safetensors.torch import load_model

    with opened(file, remedy=remedy) as handle:
        found = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}
        # Of tensors that share their memory the file has one, and in its metadata what the others are called.
        shared = {name for name, kept in (handle.metadata() or {}).items() if kept in found}
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_shapes(file, found, {name: shape for name, shape in wanted.items() if name not in shared}, remedy=remedy)
    if check_only:
        return
    try:
        load_model(model, os.fspath(file), strict=True)
    except RuntimeError as error:
        raise damaged(file, f"it does not fit the model ({str(error).splitlines()[0]})", remedy) from None
    check_numbers(file, dict(model.named_parameters()), remedy=remedy)


def load_pickled(file: str | os.PathLike[str], *, remedy: str = REMEDY) -> Any:
    """Return what `torch.save` wrote, on the CPU: tensors and plain values, never code.

    Raises:
        FileNotFoundError: If nothing is there.
        DamagedFile: If it is cut off, no such file, or asks for code.
    """
    path: Path = check_file(file, remedy=remedy)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:
        # A damaged archive shows as whatever the unpickler stumbles over.
        first = str(error).strip().split("\n")[0][:120]
        raise damaged(file, f"torch cannot read it ({type(error).__name__}: {first})", remedy) from None
