"""Listwise cross-entropy: `function.py` has its mathematics and leads on to the kernels or to the CPU path."""

from mopl.ops.listnet.function import cross_entropy, listwise_cross_entropy

__all__ = ["cross_entropy", "listwise_cross_entropy"]
