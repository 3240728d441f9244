"""Models that take weights of objectives, seen from outside: each is wrapped around another one and says what it takes.

`isinstance(model, WeightedModel)` tells causal language models that take the weights of each row, by virtual tokens or
mixed adapters, from those that have weights of their own. They have `causal_lm`, `reference()`,
`forward(..., weights=)`, `generate(..., weights=)` and `save_pretrained`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from mopl._files import write_files
from mopl.conditioning.causal_lm import DELEGATED, is_peft
from mopl.conditioning.saved_models import CONFIG_FILE, TuningRecord


class Conditioned(nn.Module):
    """A model around another one that takes weights of objectives.

    Attributes:
        model: The model inside.
        record: Names of the objectives and how it was trained.
    """

    KIND: ClassVar[str]  # as `mopl.json` says
    LAST_FILE: ClassVar[str] = CONFIG_FILE  # of those that are written: where it is, all are
    model: Any
    record: TuningRecord

    def __getattr__(self, name: str) -> Any:
        """Read from the causal language model what trainers ask of a model."""
        return getattr(self.causal_lm, name) if name in DELEGATED else super().__getattr__(name)

    @property
    def takes_beta(self) -> bool:
        """Whether it is conditioned on β of the objectives, too."""
        return False

    @property
    def causal_lm(self) -> Any:
        """The causal language model itself, without PEFT's wrapper."""
        return self.model.get_base_model() if is_peft(self.model) else self.model

    def save_pretrained(self, directory: str | os.PathLike[str], **_: Any) -> None:
        """Write what is trained, prompt and adapter, and `mopl.json` into a folder; never the frozen base model."""
        described = json.dumps({"kind": self.KIND, **self.record.to_dict(), **self._described()}, indent=2) + "\n"

        def fill(folder: Path) -> None:
            (folder / CONFIG_FILE).write_text(described, encoding="utf-8")
            self._write(folder)

        write_files(directory, fill, last=self.LAST_FILE)

    def _described(self) -> dict[str, Any]:
        """Return what `mopl.json` says of this kind of model alone."""
        raise NotImplementedError

    def _write(self, folder: Path) -> None:
        """Write the other files."""
        raise NotImplementedError

    @property
    def _base_name(self) -> str | None:
        return getattr(self, "name_or_path", "") or None


class WeightedModel(Conditioned):
    """A causal language model that takes weights, one vector for each row."""


def causal_lm_of(model: Any) -> Any:
    """Return the causal language model inside a `WeightedModel` or a PEFT model, or the model itself."""
    if isinstance(model, WeightedModel):
        return model.causal_lm
    return model.get_base_model() if is_peft(model) else model
