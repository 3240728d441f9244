"""What every user of language models needs: loading, data, tokens, log-probabilities, generation, export."""

from typing import TYPE_CHECKING

from mopl._lazy import names_of

if TYPE_CHECKING:
    from mopl.language_models.head import FusedOutput, SequenceScores, fuse, is_fused, score_sequences, unfuse
    from mopl.language_models.readers import load_preferences

__all__ = ["FusedOutput", "SequenceScores", "fuse", "is_fused", "load_preferences", "score_sequences", "unfuse"]

__getattr__, __dir__ = names_of(
    __name__,
    {
        ".head": ("FusedOutput", "SequenceScores", "fuse", "is_fused", "score_sequences", "unfuse"),
        ".readers": ("load_preferences",),
    },
)
