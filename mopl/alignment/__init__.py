"""Language models: log-probabilities of responses from any Hugging Face causal language model."""

from mopl.alignment.head import FusedOutput, SequenceScores, fuse, is_fused, score_sequences, unfuse

__all__ = ["FusedOutput", "SequenceScores", "fuse", "is_fused", "score_sequences", "unfuse"]
