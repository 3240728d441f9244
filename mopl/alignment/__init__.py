"""Language models: data, log-probabilities of responses, and one fine-tuned model for every trade-off.

Names are imported on first use, so that the command line can list its options without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mopl.alignment.config import AlignConfig
    from mopl.alignment.recipe import align
    from mopl.alignment.runs import open_run
    from mopl.language_models.head import FusedOutput, SequenceScores, fuse, is_fused, score_sequences, unfuse
    from mopl.language_models.readers import load_preferences

_HOMES = {
    "AlignConfig": "mopl.alignment.config",
    "FusedOutput": "mopl.language_models",
    "SequenceScores": "mopl.language_models",
    "align": "mopl.alignment.recipe",
    "fuse": "mopl.language_models",
    "is_fused": "mopl.language_models",
    "load_preferences": "mopl.language_models",
    "open_run": "mopl.alignment.runs",
    "score_sequences": "mopl.language_models",
    "unfuse": "mopl.language_models",
}

__all__ = [
    "AlignConfig",
    "FusedOutput",
    "SequenceScores",
    "align",
    "fuse",
    "is_fused",
    "load_preferences",
    "open_run",
    "score_sequences",
    "unfuse",
]


def __getattr__(name: str) -> Any:
    """Import the module of a name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the names beside what is loaded."""
    return sorted({*globals(), *__all__})
