"""GGUF files: written tensor by tensor, whole or not at all, and read back before they have their name."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mopl._extras import require
from mopl._files import write_file
from mopl._terminal import Progress, progress


@dataclass(frozen=True)
class Entry:
    """One thing that a GGUF file says: its key, its value, and its type, a name of gguf.GGUFValueType."""

    key: str
    value: Any  # a list is an array of that type
    kind: str


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]  # as torch has it; GGUF lists dimensions from the last to the first
    format: str  # "F32", "F16" or "BF16"
    bytes: int
    make: Callable[[], np.ndarray]  # bfloat16 as int16


def write_gguf(
    path: str | os.PathLike[str],
    architecture: str,
    entries: Sequence[Entry],
    tensors: Sequence[Planned],
    *,
    show_progress: bool = False,
) -> Path:
    """Write a GGUF file and read it back, before it takes the place of one that is there.

    Args:
        path: The file, `.gguf` by custom.
        architecture: Of the model, as llama.cpp calls it.
        entries: What it says.
        tensors: What it holds; one at a time is in memory.
        show_progress: Show on standard error how far it is.

    Raises:
        ImportError: If gguf is not installed.
        OSError: If it cannot be written, or does not read as it was written.
    """
    require("gguf", what="GGUF", extra="demo-lm")

    def fill(file: Path) -> None:
        _write(file, architecture, entries, tensors, show_progress)
        total = sum(tensor.bytes for tensor in tensors)
        with progress(f"reading back {file.name}", total, "B", show=show_progress) as shown:
            _check(file, architecture, entries, tensors, shown)

    write_file(path, fill)
    return Path(path)


def _write(
    file: Path,
    architecture: str,
    entries: Sequence[Entry],
    tensors: Sequence[Planned],
    show_progress: bool,
) -> None:
    import gguf

    logging.getLogger("gguf.gguf_writer").setLevel(logging.WARNING)
    writer = gguf.GGUFWriter(str(file), architecture)
    try:
        for entry in entries:
            kind = gguf.GGUFValueType[entry.kind]
            array = isinstance(entry.value, list)
            writer.add_key_value(
                entry.key, entry.value, gguf.GGUFValueType.ARRAY if array else kind, kind if array else None
            )
        for tensor in tensors:
            number = np.dtype(np.int16 if tensor.format == "BF16" else f"float{tensor.format[1:]}")
            kind = gguf.GGMLQuantizationType[tensor.format]
            writer.add_tensor_info(tensor.name, tensor.shape, number, tensor.bytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        total = sum(tensor.bytes for tensor in tensors)
        with progress(f"writing {file.name}", total, "B", show=show_progress) as shown:
            for tensor in tensors:
                writer.write_tensor_data(tensor.make())
                shown.update(tensor.bytes)
    finally:
        writer.close()


def _check(
    file: Path, architecture: str, entries: Sequence[Entry], tensors: Sequence[Planned], shown: Progress
) -> None:
    """Raise unless a file reads as it was to be written."""
    import gguf

    reader = gguf.GGUFReader(str(file))
    wrong = []
    for entry in (Entry(gguf.Keys.General.ARCHITECTURE, architecture, "STRING"), *entries):
        field = reader.get_field(entry.key)
        wanted = float(np.float32(entry.value)) if entry.kind == "FLOAT32" else entry.value
        if field is None or field.contents() != wanted:
            wrong.append(entry.key)
    found = {tensor.name: tensor for tensor in reader.tensors}
    if len(found) != len(reader.tensors) or found.keys() != {tensor.name for tensor in tensors}:
        wrong.append("names of tensors")
    for tensor in tensors:
        read = found.get(tensor.name)
        same = (
            read is not None
            and read.tensor_type.name == tensor.format
            and tuple(int(n) for n in reversed(read.shape)) == tensor.shape
            and np.array_equal(np.asarray(read.data).view(np.uint8).ravel(), tensor.make().view(np.uint8).ravel())
        )
        if not same:
            wrong.append(tensor.name)
        shown.update(tensor.bytes)
    if wrong:
        listed = ", ".join(wrong[:5]) + (" and others" if len(wrong) > 5 else "")
        raise OSError(f"{file.name} does not read as it was written ({listed}); write it again, to another disk")
