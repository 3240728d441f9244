"""OpenRLHF's log-probabilities and entropies, by mopl's ops: names, arguments and results of OpenRLHF 0.11.2.

Written beside these functions of the package `openrlhf` 0.11.2 from PyPI:

    here                     there
    log_probs_from_logits    openrlhf/models/utils.py
    compute_entropy          openrlhf/models/utils.py
    actor_forward            openrlhf/models/actor.py, Actor.forward

`Actor.forward` is what every trainer calls (PPO, DPO, SFT): it has the model make logits, brings them to float32,
divides them by the temperature in place and calls the other two. `actor_forward` asks a fused model
(`mopl.language_models.fuse`) for the log-probabilities, so that there are no logits. Nothing here imports or changes
OpenRLHF; docs/log_probabilities.md shows the lines that put these in its place.

* **Who shifts.** `log_probs_from_logits`: the caller. `Actor.forward` rolls the sequences by itself and returns T - 1
  positions, or the last A of them, those of the actions, times their mask.
* **Padding.** OpenRLHF scores padding as if it were text and multiplies by the mask. -100 is no token here: 0, without
  gradient.
* **Temperature.** `Actor.temperature` divides the logits of the log-probabilities and of the entropy alike.
* **Precision.** float32 from logits of any dtype; OpenRLHF's function returns the dtype of the logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mopl._arguments import shape_of
from mopl.conditioning.weighted import check_packed
from mopl.integrations._from_logits import entropy_of
from mopl.ops import gathered_logprob

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["actor_forward", "compute_entropy", "log_probs_from_logits"]

_NO_TOKEN = -100


def log_probs_from_logits(
    logits: Tensor,  # (..., V)
    labels: Tensor,  # (...)
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """Return log p(labels) under softmax(logits / temperature), (...), float32 from any dtype.

    The logits are left as they are, where OpenRLHF divides them by the temperature in place.

    Args:
        logits: (..., V).
        labels: (...) token ids, already shifted; -100 for none, where the result is 0.
        temperature: a positive number, or also a tensor that broadcasts to (...).

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If shapes do not fit, the temperature is not positive, or a label is outside the vocabulary.
    """
    return gathered_logprob(logits, labels, temperature=temperature)


def compute_entropy(logits: Tensor) -> Tensor:
    """Return the entropy of softmax(logits) in nats, (...), float32 from any dtype, differentiable.

    Nothing of the size of the logits is kept for the backward pass but the logits themselves, and nothing is compiled.

    Args:
        logits: (..., V), with at least one token; divide them by the temperature first, if there is one.

    Raises:
        TypeError: If the dtype is wrong.
        ValueError: If there is no token.
    """
    return entropy_of(logits)


def actor_forward(
    self: Any,
    sequences: Tensor,  # (B, T)
    action_mask: Tensor | None = None,  # (B, A)
    attention_mask: Tensor | None = None,  # (B, T)
    return_output: bool = False,
    allgather_logits: bool = False,
    return_logprobs: bool = False,
    ring_attn_group: ProcessGroup | None = None,
    packed_seq_lens: list[int] | None = None,
    return_entropy: bool = False,
    **mm_inputs: Any,
) -> Any:
    """Do what OpenRLHF's `Actor.forward` does, with the log-probabilities of a fused model in place of its logits.

    Only positions whose log-probability is returned reach the head. With `packing_samples` the padding is taken out
    and the rows are packed, in plain PyTorch; each model is asked once whether it keeps packed rows apart
    (`mopl.language_models.fuse`).

    Args:
        self: an `Actor`: its `model` (a fused causal language model, or what wraps one: PEFT, DeepSpeed),
            `temperature`, and `packing_samples` if it has that.
        sequences: (B, T) token ids of prompts and responses.
        action_mask: (B, A), of the last A positions of T - 1; its zeros are not scored.
        attention_mask: (B, T), 1 on tokens, padding on either side.
        return_output: also return what the model's own forward returned (router losses), without its logits.
        allgather_logits: must be False: there are none.
        return_logprobs: without an action_mask, return all T - 1 positions. One of the two is needed.
        ring_attn_group: must be None: ring attention is OpenRLHF's own.
        packed_seq_lens: not read, as in OpenRLHF.
        return_entropy: set `entropy` (B, T - 1), in nats, of the distribution at `temperature`, on the returned output;
            0 where nothing was scored.
        **mm_inputs: must be empty: images are OpenRLHF's own.

    Returns:
        log-probabilities, float32: (B, A) times the mask, or (B, T - 1); with `return_output` a pair with the output.

    Raises:
        ValueError: If logits, ring attention or images are asked for, or shapes do not fit.
        TypeError: If the model is not fused.
    """
    from mopl.language_models.head import FusedOutput

    if action_mask is None and not return_logprobs:
        raise ValueError("action_mask is None and return_logprobs False, which asks for logits; there are none here")
    for value, name in ((allgather_logits, "allgather_logits"), (mm_inputs, "images (mm_inputs)")):
        if value:
            raise ValueError(f"{name} cannot be had without logits; use OpenRLHF's own Actor.forward")
    if ring_attn_group is not None:
        raise ValueError("ring_attn_group must be None: ring attention needs OpenRLHF's own Actor.forward")
    if return_entropy and not return_output:
        raise ValueError("return_entropy puts the entropy on the output; pass return_output=True, too")
    if attention_mask is None:
        attention_mask = torch.ones_like(sequences)
    if attention_mask.shape != sequences.shape:
        raise ValueError(f"attention_mask has shape {shape_of(attention_mask)}; sequences have {shape_of(sequences)}")

    targets = torch.roll(sequences, -1, 1)
    targets[:, -1] = _NO_TOKEN
    if action_mask is not None:
        actions = action_mask.shape[1]
        if action_mask.shape[0] != len(sequences) or actions >= sequences.shape[1]:
            raise ValueError(
                f"action_mask has shape {shape_of(action_mask)} but sequences {shape_of(sequences)}; pass (B, A) with "
                "A below T"
            )
        scored = torch.nn.functional.pad(action_mask.bool(), (sequences.shape[1] - 1 - actions, 1))
        targets = targets.masked_fill(~scored, _NO_TOKEN)

    there = attention_mask.bool()
    positions = attention_mask.long().cumsum(-1) - 1
    packed = getattr(self, "packing_samples", False)
    rows: dict[str, Any] = {"attention_mask": attention_mask, "position_ids": positions.masked_fill(~there, 1)}
    if packed:
        check_packed(self.model)
        rows = {"attention_mask": None, "position_ids": positions[there][None]}
        sequences, targets = sequences[there][None], targets[there][None]
    found = self.model(sequences, **rows, targets=targets, temperature=self.temperature, return_entropy=return_entropy)
    if not isinstance(found, FusedOutput):
        raise TypeError("the actor's model is not fused; call mopl.language_models.fuse on its causal language model")

    def rectangle(values: Tensor) -> Tensor:
        """Return (B, T - 1) of values in the model's rows."""
        if packed:
            values = torch.zeros(there.shape, dtype=values.dtype, device=values.device).masked_scatter(there, values)
        return values[:, :-1]

    output = found.model_output
    if found.entropy is not None:
        output.entropy = rectangle(found.entropy)
    log_probs = rectangle(found.log_probs)
    if action_mask is not None:
        log_probs = log_probs[:, log_probs.shape[1] - action_mask.shape[1] :] * action_mask.float()
    return (log_probs, output) if return_output else log_probs
