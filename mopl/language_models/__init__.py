"""What every user of language models needs: loading, data, tokens, log-probabilities, generation, export.

Names are imported on first use, so that the command line can list its options without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mopl.language_models.head import FusedOutput, SequenceScores, fuse, is_fused, score_sequences, unfuse
    from mopl.language_models.readers import load_preferences

_HOMES = {
    "FusedOutput": "head",
    "SequenceScores": "head",
    "fuse": "head",
    "is_fused": "head",
    "load_preferences": "readers",
    "score_sequences": "head",
    "unfuse": "head",
}

__all__ = ["FusedOutput", "SequenceScores", "fuse", "is_fused", "load_preferences", "score_sequences", "unfuse"]


def __getattr__(name: str) -> Any:
    """Import the module of a name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List the names beside what is loaded."""
    return sorted({*globals(), *__all__})
