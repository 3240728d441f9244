"""Differentiable ops, one file each: public function, autograd, and the choice between the Triton and the CPU path.

**Derivatives.** The first derivative in reverse mode is exact, in closed form. Second and higher ones (`create_graph`,
Hessian-vector products), forward mode and the transforms of `torch.func` (`grad`, `vmap`, `hessian`) are exact too, by
autograd of the plain formula and at its cost. `linear_logprob`, `linear_kl`, `linear_jsd` and `linear_topk_jsd`, whose
point is not to hold what that holds, refuse them (all but `vmap` without a derivative) by an error that names the op
and the remedy.
"""

from mopl.ops.gathered_logprob import gathered_logprob
from mopl.ops.linear_jsd import linear_jsd
from mopl.ops.linear_kl import linear_kl
from mopl.ops.linear_logprob import linear_logprob
from mopl.ops.linear_topk_jsd import linear_topk_jsd
from mopl.ops.listnet import listwise_cross_entropy
from mopl.ops.plackett_luce import plackett_luce_nll
from mopl.ops.sequence_logprob import sequence_logprob

__all__ = [
    "gathered_logprob",
    "linear_jsd",
    "linear_kl",
    "linear_logprob",
    "linear_topk_jsd",
    "listwise_cross_entropy",
    "plackett_luce_nll",
    "sequence_logprob",
]
