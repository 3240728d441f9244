"""NeMo-RL's log-probabilities, by mopl's ops: names, arguments and results of its main branch.

Written beside nemo_rl/distributed/model_utils.py of github.com/NVIDIA-NeMo/RL at commit
0433dae8dd63000e10a925abf2a26b7972bc23e0 (the package `nemo_rl` on PyPI is a placeholder). The functions have the names
that they have there:

    from_parallel_logits_to_logprobs                     DistributedLogprob, ChunkedDistributedLogprob
    from_parallel_logits_to_logprobs_packed_sequences    the same, of packed sequences
    from_parallel_hidden_states_to_logprobs              ChunkedDistributedHiddenStatesToLogprobs ("linear CE fusion")

Nothing here imports or changes NeMo-RL; docs/log_probabilities.md shows the lines that put these in its place.

* **Who shifts.** These functions: `target` is the unshifted (B, S), and the result is (B, S - 1).
* **Vocabulary.** Each rank of `tp_group` has the same number of consecutive entries, in the order of the ranks. With
  None the vocabulary is whole; NeMo-RL's own functions would take None for all processes.
* **Temperature.** NeMo-RL divides the logits before these functions are called. Where there are none, `temperature` is
  a keyword of its own here.
* **Padding.** NeMo-RL masks afterwards. -100 is no token here: 0, without gradient. Other ids outside the vocabulary
  raise on a CPU and give NaN on a GPU; there they give 0 and, silently, a gradient.
* **Not here**: context parallelism, and log-probabilities of what top-k and top-p leave. Both are refused.
* **Precision.** float32, from logits of any dtype without a copy of them; products of hidden states accumulate in
  float32.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from mopl._arguments import shape_of
from mopl.integrations._from_logits import sharded_logprob
from mopl.ops import linear_logprob

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "from_parallel_hidden_states_to_logprobs",
    "from_parallel_logits_to_logprobs",
    "from_parallel_logits_to_logprobs_packed_sequences",
]

_NO_TOKEN = -100


def from_parallel_logits_to_logprobs(
    vocab_parallel_logits: Tensor,  # (B, S, V / ranks)
    target: Tensor,  # (B, S)
    vocab_start_index: int,
    vocab_end_index: int,
    tp_group: ProcessGroup | None,
    inference_only: bool = False,
    cp_group: ProcessGroup | None = None,
    chunk_size: int | None = None,
    sampling_params: Any = None,
    *,
    shift_targets: bool = True,
) -> Tensor:
    """Return log p of the next tokens (B, S - 1) from logits that are sharded over the vocabulary.

    Args:
        vocab_parallel_logits: (B, S, V / ranks), already divided by the temperature; they may have more positions than
            `target`, which then are not read.
        target: (B, S) unshifted token ids of the whole vocabulary.
        vocab_start_index: the first of this rank's entries.
        vocab_end_index: one past the last.
        tp_group: ranks over which the vocabulary is sharded, or None.
        inference_only: leave no graph.
        cp_group: None, or a group of one rank.
        chunk_size: without effect: no float32 copy of the logits is made.
        sampling_params: None, or an object whose `top_k` and `top_p` leave all tokens.
        shift_targets: False for models whose position i predicts token i: then (B, S).

    Returns:
        float32, float64 for float64 logits; the same on every rank, and so must be its upstream gradient.

    Raises:
        ValueError: If a shard, a group or sampling parameters do not fit, or a target is outside the vocabulary.
    """
    _check(vocab_parallel_logits.shape[-1], vocab_start_index, vocab_end_index, tp_group, cp_group, sampling_params)
    wanted = _shifted(target) if shift_targets else target
    if (more := vocab_parallel_logits.shape[1] - target.shape[1]) > 0:
        wanted = torch.nn.functional.pad(wanted, (0, more), value=_NO_TOKEN)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not inference_only):
        found = sharded_logprob(vocab_parallel_logits, wanted, tp_group)
    return found[:, : target.shape[1] - 1 if shift_targets else target.shape[1]]


def from_parallel_logits_to_logprobs_packed_sequences(
    vocab_parallel_logits: Tensor,  # (1, T, V / ranks)
    target: Tensor,  # (1, T)
    cu_seqlens_padded: Tensor,  # (B + 1,)
    unpacked_seqlen: int,
    vocab_start_index: int,
    vocab_end_index: int,
    group: ProcessGroup | None,
    inference_only: bool = False,
    cp_group: ProcessGroup | None = None,
    chunk_size: int | None = None,
    sampling_params: Any = None,
    target_is_pre_rolled: bool = False,
) -> Tensor:
    """Return log p of the next tokens of packed sequences as rows (B, unpacked_seqlen - 1), 0 behind each one's end.

    Args:
        vocab_parallel_logits: (1, T, V / ranks) of all sequences, one behind the other.
        target: (1, T) token ids: unshifted, or with `target_is_pre_rolled` those that each position predicts.
        cu_seqlens_padded: (B + 1,), where each sequence begins, and the end of the last one.
        unpacked_seqlen: length of the rows; a sequence that is longer is cut.
        vocab_start_index: as all that follow, see `from_parallel_logits_to_logprobs`.
        vocab_end_index: see there.
        group: ranks over which the vocabulary is sharded, or None.
        inference_only: see there.
        cp_group: see there.
        chunk_size: see there.
        sampling_params: see there.
        target_is_pre_rolled: whether targets are shifted already.

    Returns:
        float32, float64 for float64 logits; the same on every rank, and so must be its upstream gradient.

    Raises:
        ValueError: If shapes, bounds, a shard, a group or sampling parameters do not fit, or a target is not in the
            vocabulary.
    """
    _check(vocab_parallel_logits.shape[-1], vocab_start_index, vocab_end_index, group, cp_group, sampling_params)
    if vocab_parallel_logits.shape[:-1] != target.shape or target.ndim != 2 or len(target) != 1:
        raise ValueError(
            f"vocab_parallel_logits has shape {shape_of(vocab_parallel_logits)} and target {shape_of(target)}; packed "
            "sequences are (1, T, V / ranks) and (1, T)"
        )
    bounds = cu_seqlens_padded.tolist()
    ascending = all(start <= end for start, end in pairwise(bounds))
    if bounds and not (bounds[0] >= 0 and ascending and bounds[-1] <= target.shape[1]):
        raise ValueError(
            f"cu_seqlens_padded is {bounds} but must rise from 0 or more to at most {target.shape[1]}, the number of "
            "positions"
        )
    if unpacked_seqlen < 1:
        raise ValueError(f"unpacked_seqlen is {unpacked_seqlen} but must be at least 1, the length of the rows")
    wanted = target.clone() if target_is_pre_rolled else torch.roll(target, -1, -1)
    # The last position of a sequence predicts nothing.
    wanted[:, [end - 1 for start, end in pairwise(bounds) if end > start]] = _NO_TOKEN
    with torch.set_grad_enabled(torch.is_grad_enabled() and not inference_only):
        found = sharded_logprob(vocab_parallel_logits, wanted, group)[0]
        rows = []
        for start, end in pairwise(bounds):
            row = found[start : max(end - 1, start)][: unpacked_seqlen - 1]
            rows.append(torch.nn.functional.pad(row, (0, unpacked_seqlen - 1 - len(row))))
        return torch.stack(rows) if rows else found.new_zeros(0, unpacked_seqlen - 1)


def from_parallel_hidden_states_to_logprobs(
    tensor_parallel_hidden_states: Tensor,  # (S / ranks, B, H)
    output_weight_layer: Tensor,  # (V / ranks, H)
    runtime_gather_output: bool | None,
    target: Tensor,  # (B, S)
    vocab_start_index: int,
    vocab_end_index: int,
    tp_group: ProcessGroup | None,
    inference_only: bool = False,
    cp_group: ProcessGroup | None = None,
    chunk_size: int | None = None,
    *,
    temperature: float | Tensor = 1.0,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return log p of the next tokens (B, S - 1) from hidden states and the head; the logits are never held.

    Args:
        tensor_parallel_hidden_states: (S / ranks, B, H), this rank's part of the positions, as Megatron's sequence
            parallelism leaves them; whole without a group. Its gradient is that of this part.
        output_weight_layer: (V / ranks, H), this rank's rows of the head; its gradient is theirs.
        runtime_gather_output: not read, as in NeMo-RL.
        target: (B, S) unshifted token ids of the whole vocabulary.
        vocab_start_index: the first of this rank's entries.
        vocab_end_index: one past the last.
        tp_group: ranks over which positions and vocabulary are sharded, or None.
        inference_only: leave no graph.
        cp_group: None, or a group of one rank.
        chunk_size: without effect: the op bounds its memory by itself.
        temperature: divides the logits: a number or (B, S). Not in NeMo-RL.
        return_entropy: also return the entropies (B, S - 1), in nats and with a gradient. Not in NeMo-RL.

    Returns:
        (B, S - 1) float32, or a pair of these; the same on every rank, and so must be its upstream gradient.

    Raises:
        ValueError: If a shard or a group does not fit, or a target is outside the vocabulary.
    """
    _check(output_weight_layer.shape[0], vocab_start_index, vocab_end_index, tp_group, cp_group, None)
    hidden = tensor_parallel_hidden_states
    with torch.set_grad_enabled(torch.is_grad_enabled() and not inference_only):
        if tp_group is not None and dist.get_world_size(tp_group) > 1:
            hidden = _GatheredPositions.apply(hidden, tp_group)
        logprob, entropy = linear_logprob(
            hidden.transpose(0, 1), output_weight_layer, _shifted(target), temperature=temperature,
            return_entropy=True, group=tp_group,
        )  # fmt: skip
    return (logprob[:, :-1], entropy[:, :-1]) if return_entropy else logprob[:, :-1]


class _GatheredPositions(torch.autograd.Function):
    """The positions of all ranks, one part behind the other.

    The gradient that `linear_logprob` gives is already summed over the group, so each rank takes its part of it.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: ProcessGroup) -> Tensor:
        ctx.rank, ctx.size = dist.get_rank(group), len(hidden)
        parts = [torch.empty_like(hidden) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, hidden.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].narrow(0, ctx.rank * ctx.size, ctx.size), None


def _shifted(target: Tensor) -> Tensor:
    """Return what each position predicts; the last one predicts nothing."""
    shifted = torch.roll(target, -1, -1)
    shifted[..., -1] = _NO_TOKEN
    return shifted


def _check(
    entries: int,
    start: int,
    end: int,
    group: ProcessGroup | None,
    context: ProcessGroup | None,
    sampling_params: Any,
) -> None:
    """Raise unless the shard is the one of this rank, and nothing is asked for that is not here."""
    rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    if (start, end) != (rank * entries, (rank + 1) * entries):
        raise ValueError(
            f"vocab_start_index and vocab_end_index are {start} and {end}, but rank {rank} of {ranks} with {entries} "
            f"entries has {rank * entries} to {(rank + 1) * entries}; shards must be of one size, in the ranks' order"
        )
    if context is not None and dist.get_world_size(context) > 1:
        raise ValueError("cp_group has several ranks; with context parallelism call NeMo-RL's own function")
    top_k, top_p = getattr(sampling_params, "top_k", None), getattr(sampling_params, "top_p", None)
    if top_k not in (None, -1) or top_p not in (None, 1.0):
        raise ValueError(
            f"sampling_params has top_k={top_k}, top_p={top_p}: log-probabilities of what a filter leaves are not "
            "computed here; call NeMo-RL's own function, or sample from the whole vocabulary"
        )
