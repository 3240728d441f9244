"""verl's log-probabilities and entropies, by mopl's ops: names, arguments and results of verl 0.9.1.

Written beside these functions of the package `verl` 0.9.1 from PyPI:

    here                     there
    linear_cross_entropy     verl/utils/kernel/linear_cross_entropy.py, LinearCrossEntropy.apply; kernels.py beside it
    FusedLinearForPPO        verl/utils/experimental/torch_functional.py
    logprobs_from_logits     verl/utils/torch_functional.py
    entropy_from_logits      verl/utils/torch_functional.py

The first two are what `use_fused_kernels` calls (`fused_kernels_backend` "triton", or "torch" and "liger"), in
`forward_with_triton_backend` and `forward_with_torch_backend` of verl/models/transformers/dense_common.py and, with
Megatron, in `fused_output_processor` of verl/models/mcore/model_forward_fused.py. The others are called where logits
are there. Nothing here imports or changes verl; docs/log_probabilities.md shows the lines that put these in its place.

* **Signs.** Despite its name `linear_cross_entropy` returns log p, not its negative; the entropy is in nats.
* **Who shifts.** verl: labels are already those that each position predicts (`torch.roll` by -1, or `shift_labels`).
* **Padding.** verl has no ignored label: it scores every position and masks afterwards. -100 is taken for one here:
  log p and entropy are 0, without gradient, and the row is not computed.
* **Precision.** Results are float32, products accumulate in float32, gradients have the operands' dtypes. verl's
  `FusedLinearForPPO` rounds logits and entropies to the hidden states' dtype.
* **Entropy** has a gradient, as verl's entropy bonus needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from mopl._arguments import check_choice
from mopl.integrations._from_logits import entropy_of
from mopl.ops import gathered_logprob, linear_logprob

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["FusedLinearForPPO", "entropy_from_logits", "linear_cross_entropy", "logprobs_from_logits"]


def linear_cross_entropy(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (...)
    temperature: float | Tensor = 1.0,
    reduction: Literal["none", "sum", "mean"] = "none",
    dist_process_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Return log p(labels), (N,), and the entropy of each row, (N,), of N = the product of hidden's leading sizes.

    Args:
        hidden: (..., H), any floating dtype; verl's kernel takes widths that are multiples of 128 only.
        weight: (V, H), the head's weight; with a group this rank's rows of it, in the order of the ranks.
        labels: (...), token ids of the whole vocabulary, already shifted; -100 for none.
        temperature: divides the logits; a number, or also a tensor that broadcasts to (...).
        reduction: "none", or "sum" or "mean" of the log-probabilities over all N rows: then a scalar. The entropy is
            never reduced, as in verl.
        dist_process_group: ranks over which the vocabulary is sharded; each has the same rows. As with verl's kernel,
            the gradients of `hidden` on the ranks have to be added up by the caller (Megatron's
            `gather_from_sequence_parallel_region` does): each rank gets an equal share of the sum.

    Returns:
        (log-probabilities, entropies), float32, or float64 where an operand is; differentiable once.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes that do not fit, labels outside the vocabulary, an unknown reduction.
    """
    check_choice(reduction, ("none", "sum", "mean"), "reduction")
    if labels.shape != hidden.shape[:-1] and labels.numel() == hidden.shape[:-1].numel():
        labels = labels.reshape(hidden.shape[:-1])  # verl flattens both
    if dist_process_group is not None and hidden.requires_grad and torch.is_grad_enabled():
        ranks = torch.distributed.get_world_size(dist_process_group)
        hidden = hidden.view_as(hidden)
        hidden.register_hook(lambda gradient: gradient / ranks)
    logprob, entropy = linear_logprob(
        hidden, weight, labels, temperature=temperature, return_entropy=True, group=dist_process_group
    )
    logprob, entropy = logprob.reshape(-1), entropy.reshape(-1)
    if reduction == "none":
        return logprob, entropy
    return (logprob.sum() if reduction == "sum" else logprob.mean()), entropy


class FusedLinearForPPO(nn.Module):
    """verl's module of this name: log-probabilities and entropies of the shape of `input_ids`.

    Args:
        chunk_size: as in verl, and without effect: the op bounds its memory by itself.
        impl_backend: "torch" or "liger", as in verl, and without effect.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()
        check_choice(impl_backend, ("torch", "liger"), "impl_backend")
        self.chunk_size, self.impl_backend = chunk_size, impl_backend

    def forward(
        self,
        hidden_states: Tensor,  # (..., H)
        vocab_weights: Tensor,  # (V, H)
        input_ids: Tensor,  # (...)
        temperature: float | Tensor = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Return (log-probabilities, entropies), each of the shape of `input_ids`, float32.

        Args:
            hidden_states: (..., H), any floating dtype.
            vocab_weights: (V, H), the head's weight.
            input_ids: (...), token ids that each position predicts: already shifted; -100 for none.
            temperature: divides the logits; a number, or a tensor that broadcasts to (...).

        Raises:
            TypeError: wrong dtypes.
            ValueError: shapes that do not fit, labels outside the vocabulary.
        """
        logprob, entropy = linear_logprob(
            hidden_states, vocab_weights, input_ids, temperature=temperature, return_entropy=True
        )
        return logprob, entropy


def logprobs_from_logits(
    logits: Tensor,  # (..., V)
    labels: Tensor,  # (...)
    inplace_backward: bool = True,
) -> Tensor:
    """Return log p(labels) under softmax(logits), (...), float32 from any dtype.

    Args:
        logits: (..., V).
        labels: (...) token ids, already shifted; -100 for none, where the result is 0.
        inplace_backward: write the gradient over the logits, as verl's default does with flash-attn. Pass False where
            they are used again after the backward pass, or in it (an entropy with a gradient).

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes that do not fit, labels outside the vocabulary.
    """
    return gathered_logprob(logits, labels, inplace_backward=inplace_backward)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Return the entropy of softmax(logits) over the last dimension in nats, (...), float32 from any dtype.

    Nothing of the size of the logits is kept for the backward pass but the logits themselves; verl's
    `entropy_from_logits_with_chunking` is there for that.

    Args:
        logits: (..., V), with at least one token.

    Raises:
        TypeError: wrong dtype.
        ValueError: no token.
    """
    return entropy_of(logits)
