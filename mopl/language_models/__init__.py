"""What every user of language models needs: loading, data, tokens, log-probabilities, generation, export."""

from typing import TYPE_CHECKING

from mopl._lazy import names_of

if TYPE_CHECKING:
    from mopl.language_models.head import FusedOutput, SequenceScores, fuse, is_fused, score_sequences, unfuse
    from mopl.language_models.model_identity import identity_of
    from mopl.language_models.readers import load_preferences
    from mopl.language_models.reference_store import ReferenceStore
    from mopl.language_models.scoring import score_lists

__all__ = [
    "FusedOutput", "ReferenceStore", "SequenceScores", "fuse", "identity_of", "is_fused", "load_preferences",
    "score_lists", "score_sequences", "unfuse",
]  # fmt: skip

__getattr__, __dir__ = names_of(
    __name__,
    {
        ".head": ("FusedOutput", "SequenceScores", "fuse", "is_fused", "score_sequences", "unfuse"),
        ".model_identity": ("identity_of",),
        ".readers": ("load_preferences",),
        ".reference_store": ("ReferenceStore",),
        ".scoring": ("score_lists",),
    },
)
