"""The log of a run: one JSON object a line, TensorBoard beside it if asked for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec

from mopl._extras import require
from mopl._files import write_file
from mopl._records import check, damaged, parse_json, read_text

_MOST_BYTES = 1 << 32
_REMEDY = "delete that line, or the file: nothing but the log is lost"


class _Record(msgspec.Struct):
    """What every line of a log has."""

    stage: str = ""
    step: int = 0


class RunLog:
    """Appends records to `log.jsonl`; a resumed stage first takes back what came after its checkpoint.

    Args:
        directory: The run directory; `log.jsonl` (and `tensorboard/`) are made in it.
        enabled: False on every process but the main one: nothing is written there.
        tensorboard: Also write scalars for TensorBoard (needs the package `tensorboard`).
    """

    def __init__(self, directory: str | os.PathLike[str], *, enabled: bool = True, tensorboard: bool = False) -> None:
        self.path = Path(directory) / "log.jsonl"
        self.enabled = enabled
        self._folder = Path(directory) / "tensorboard" if tensorboard and enabled else None
        self._writers: dict[str, Any] = {}

    def rewind(self, stage: str, step: int) -> None:
        """Drop the records of `stage` after `step`, and a last line that a killed process left unfinished."""
        if self._folder is not None:
            self._open_tensorboard(stage, step)
        if not self.enabled or not self.path.exists():
            return
        kept = [r for r in read_log(self.path) if r.get("stage") != stage or r.get("step", 0) <= step]
        write_file(self.path, "".join(json.dumps(record) + "\n" for record in kept))

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; it is on its way to the disk when this returns."""
        if not self.enabled:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        writer = self._writers.get(str(record.get("stage")))
        if writer is not None:
            for name, value in record.items():
                if isinstance(value, (int, float)) and name != "step":
                    writer.add_scalar(name, value, record.get("step", 0))
            writer.flush()

    def close(self) -> None:
        """Close the TensorBoard files, if any."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _open_tensorboard(self, stage: str, step: int) -> None:
        require("tensorboard", what="the log for TensorBoard")
        from torch.utils.tensorboard import SummaryWriter

        assert self._folder is not None
        if stage in self._writers:
            self._writers[stage].close()
        # purge_step hides what a killed process wrote after its last checkpoint.
        self._writers[stage] = SummaryWriter(str(self._folder / stage), purge_step=step + 1)


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the records of a `log.jsonl`; a last line without its end is left out.

    Raises:
        FileNotFoundError: If nothing is there.
        DamagedFile: If a line is no record; the message has its number.
    """
    text, records = read_text(path, most=_MOST_BYTES, remedy=_REMEDY), []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            raise damaged(path, f"line {number}: {error}", _REMEDY) from None
        records.append(check(record, _Record, path, f"line {number}", remedy=_REMEDY))
    return records
