"""Differentiable ops, one file each: public function, autograd, and the choice between the Triton and the CPU path."""

from mopl.ops.gathered_logprob import gathered_logprob
from mopl.ops.linear_logprob import linear_logprob
from mopl.ops.sequence_logprob import sequence_logprob

__all__ = ["gathered_logprob", "linear_logprob", "sequence_logprob"]
