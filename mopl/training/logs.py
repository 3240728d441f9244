"""The log of a run: one JSON object a line, and what trackers are sent of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from mopl._files import write_file
from mopl._records import check, damaged, parse_json, read_text
from mopl._renamed import warn_renamed
from mopl.training.trackers import Trackers

_MOST_BYTES = 1 << 32
_REMEDY = "delete that line, or the file: nothing but the log is lost"


class _Record(msgspec.Struct):
    """What every line of a log has."""

    stage: str = ""
    step: int = 0


class RunLog:
    """Appends records to `log.jsonl`; a resumed stage first takes back what came after its checkpoint.

    Args:
        directory: The run directory; `log.jsonl` is made in it.
        enabled: False on every process but the main one: nothing is written there.
        log_with: Trackers that get the numbers, too, by name; see `mopl.training.trackers`.
        settings: What these show as the run's settings.
        tensorboard: An old name of `log_with=("tensorboard",)`.

    Raises:
        ImportError: If the package of a tracker is missing; the message says how to install it.
        ValueError: If there is no such tracker.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        enabled: bool = True,
        log_with: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
        tensorboard: bool | None = None,
    ) -> None:
        if tensorboard is not None:
            warn_renamed("tensorboard=True", 'log_with=("tensorboard",)', stacklevel=2)
            log_with = (*log_with, *("tensorboard",) * tensorboard)
        self.path = Path(directory) / "log.jsonl"
        self.enabled = enabled
        self._trackers = Trackers(log_with if enabled else (), directory, settings)

    def rewind(self, stage: str, step: int) -> None:
        """Drop the records of `stage` after `step`, and a last line that a killed process left unfinished.

        The trackers open the stage.

        Args:
            stage: Name of the training that begins or is resumed.
            step: Steps that it has done; 0 drops all its records.
        """
        self._trackers.begin(stage, step)
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
        self._trackers.log(record)

    def close(self) -> None:
        """End the trackers' runs, if any."""
        self._trackers.close()


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the records of a `log.jsonl`; a last line without its end is left out.

    Args:
        path: The file.

    Returns:
        The records in their order. Each has the keys `stage` and `step`; a record of a training step has `loss`,
        `learning_rate`, `gradient_norm` and `seconds`, too.

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
