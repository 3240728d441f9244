"""Language models: data, log-probabilities of responses, and one fine-tuned model for every trade-off."""

from typing import TYPE_CHECKING

from mopl._lazy import names_of

if TYPE_CHECKING:
    from mopl.alignment.config import AlignConfig
    from mopl.alignment.recipe import align
    from mopl.alignment.runs import open_run
    from mopl.language_models.head import FusedOutput, SequenceScores, fuse, is_fused, score_sequences, unfuse
    from mopl.language_models.readers import load_preferences

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

__getattr__, __dir__ = names_of(
    __name__,
    {
        "mopl.alignment.config": ("AlignConfig",),
        "mopl.language_models": (
            "FusedOutput",
            "SequenceScores",
            "fuse",
            "is_fused",
            "load_preferences",
            "score_sequences",
            "unfuse",
        ),
        "mopl.alignment.recipe": ("align",),
        "mopl.alignment.runs": ("open_run",),
    },
)
