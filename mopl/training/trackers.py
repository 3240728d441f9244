"""Experiment trackers beside the log of a run, by accelerate's classes: TensorBoard, Weights & Biases, MLflow, ...

Each training of a run (`base`, `weight-cos-dpo`, every weight of `dpo-ls`, ...) is a run of the tracker, named
`<run>/<stage>`, in the group `<run>` where the tracker has groups, in the project `mopl`. So every training counts its
own steps, and the curves of several methods lie over one another; in one run they would not: W&B drops what is logged
at a step below an earlier one.

| tracker     | where it writes                                            | a stage that is resumed              |
|-------------|------------------------------------------------------------|--------------------------------------|
| tensorboard | `<run directory>/tensorboard/<stage>`                      | hides what came after the checkpoint |
| wandb       | its server, through `<run directory>/wandb` or `WANDB_DIR` | continues the run of its id          |
| mlflow      | `MLFLOW_TRACKING_URI`, `mlflow.db` or `mlruns` by default  | continues the run of its id          |
| trackio     | `TRACKIO_DIR`, a cache of the user by default              | continues the run of its name        |

What the last three have of a stage (id, last step) stands in `trackers.json`, so that no step is logged twice. Stores
of many runs stay where their users look for them: `mlflow ui` and `trackio show` compare runs of `mopl` with others.
Without a network `WANDB_MODE=offline` writes what `wandb sync` sends later (with `--append` after a resumption).

Of accelerate's other trackers, and of classes that `accelerate.tracking.register_tracker_class` knows, `RunLog` takes
the names, too; but their runs are named as they like, and a resumed stage is a new run of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from mopl._extras import TRACKERS, require
from mopl._files import write_file
from mopl._records import read_json

STATE = "trackers.json"
_REMEDY = "delete the file: the trackers begin new runs then"


class _Sent(msgspec.Struct):
    """What a tracker has of a stage: the id of its run, and the last step."""

    id: str
    step: int


class Trackers:
    """Sends the log records of a run to trackers, `TRACKERS` or registered classes; one stage at a time.

    Raises:
        ImportError: If the package of a tracker is missing; the message says how to install it.
        ValueError: If there is no such tracker.
    """

    def __init__(
        self, names: Sequence[str], directory: str | os.PathLike[str], settings: Mapping[str, Any] | None = None
    ) -> None:
        self.names = tuple(dict.fromkeys(names))
        for name in self.names:
            _check_tracker(name)
        self._run = Path(directory).absolute()
        self._settings = {name: _plain(value) for name, value in (settings or {}).items() if value is not None}
        self._stage = ""
        self._open: dict[str, Any] = {}
        self._sent: dict[str, dict[str, Any]] = {}  # by stage and tracker

    def begin(self, stage: str, step: int) -> None:
        """Open a stage, which ends the one before; `step` of its steps are done, and the next record is later."""
        if not self.names:
            return
        self.close()
        if (self._run / STATE).exists():
            self._sent = read_json(self._run / STATE, dict[str, dict[str, _Sent]], remedy=_REMEDY)
        self._stage = stage
        for name in self.names:
            sent = self._sent.get(stage, {}).get(name)
            tracker = self._tracker(name, sent, step)
            tracker.start()
            self._open[name] = tracker
            if name == "tensorboard":
                if step == 0:  # its hyperparameters would be another entry in its list of runs, without a curve
                    text = "\n".join(f"    {key}: {value}" for key, value in self._settings.items())  # code in Markdown
                    tracker.log({"settings": text}, step=0)
                continue
            if sent is None or name != "mlflow":  # which takes no other value of a setting, as a resumed run may have
                tracker.store_init_configuration(self._settings)
            identity = {"id": _id_of(name, tracker.tracker), "step": step}
            sent = self._sent.setdefault(stage, {}).setdefault(name, identity)
            if name == "wandb":  # The server knows; offline a killed process loses even what it was sent.
                sent["step"] = tracker.tracker.step - 1
        self._save()

    def log(self, record: Mapping[str, Any]) -> None:
        """Send the numbers of a record of the open stage to every tracker that has not had that step."""
        if not self._open:
            return
        step = record.get("step", 0)
        values = {n: v for n, v in record.items() if isinstance(v, (int, float)) and n != "step"}
        for name, tracker in self._open.items():
            sent = self._sent.get(self._stage, {}).get(name)
            if sent is None:
                tracker.log(values, step=step)
            elif step > sent["step"]:
                tracker.log(values, step=step)
                sent["step"] = step
        self._save()

    def close(self) -> None:
        """End the stage that is open, if any."""
        while self._open:
            self._open.popitem()[1].finish()

    def _tracker(self, name: str, sent: Mapping[str, Any] | None, step: int) -> Any:
        """Return a tracker for a run of its own that begins or goes on."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind, group, title = LOGGER_TYPE_TO_CLASS[name], self._run.name, f"{self._run.name}/{self._stage}"
        if name == "tensorboard":
            return kind(self._stage, self._run / "tensorboard", purge_step=step + 1)
        project, options = "mopl", {}
        if name == "wandb":
            project = os.environ.get("WANDB_PROJECT") or project
            options = {"name": title, "group": group, "id": sent and sent["id"], "resume": "allow"}
            if not os.environ.get("WANDB_DIR"):
                options["dir"] = str(self._run)
        elif name == "mlflow":
            options = {"run_id": sent["id"]} if sent else {"run_name": title, "tags": {"group": group}}
        elif name == "trackio":
            options = {"name": title, "group": group, "resume": "allow" if sent else "never"}
        place = (self._run / name,) if kind.requires_logging_directory else ()
        return kind(project, *place, **options)

    def _save(self) -> None:
        if self._sent:
            write_file(self._run / STATE, json.dumps(self._sent, indent=2) + "\n")


def _check_tracker(name: str) -> None:
    """Raise unless there is a tracker and its package."""
    if name in TRACKERS:
        require(name, what=f"log_with={name!r}")
        return
    require("accelerate")
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    if name not in LOGGER_TYPE_TO_CLASS:
        raise ValueError(f"log_with has {name!r}; choose from {', '.join(TRACKERS)}")


def _id_of(name: str, run: Any) -> str:
    """Return the id by which a tracker finds its run again; nothing where that is its name, or where it cannot."""
    return {"wandb": lambda: run.id, "mlflow": lambda: run.info.run_id}.get(name, str)()


def _plain(value: Any) -> Any:
    """Return a setting as every tracker takes it."""
    if isinstance(value, (bool, int, float, str)):
        return value
    return " ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
