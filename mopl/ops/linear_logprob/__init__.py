"""Log-probabilities of tokens from hidden states and a language-model head, without holding the logits."""

from mopl.ops.linear_logprob.function import linear_logprob

__all__ = ["linear_logprob"]
