"""Log-probabilities of responses under a model, conditioned on a trade-off or not: of a batch, and of whole data sets.

Scores are log-probabilities of whole responses, summed over their tokens, in nats.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mopl._counted import there_are
from mopl._renamed import renamed_keywords, renamed_parameter
from mopl._restoring import evaluating
from mopl._terminal import Progress
from mopl.conditioning.weighted import WeightedModel, causal_lm_of
from mopl.language_models.collate import IGNORE_INDEX, ListBatch, ListCollator, to_lists, token_batches
from mopl.language_models.head import score_sequences
from mopl.language_models.tokenized import TokenizedList
from mopl.training.parallel import unwrapped

Conditioner = Callable[[TokenizedList, Tensor, Tensor], TokenizedList]  # list, w (m,), β (m,) -> list
Score = Callable[[nn.Module, ListBatch], Tensor]  # model, batch -> (B, K), or (B, K, columns)


@dataclass(frozen=True)
class Conditions:
    """What a model's forward takes beside text: weights of objectives, and β under a name of its own."""

    weights: bool
    beta: str | None

    @classmethod
    def of(cls, model: nn.Module) -> Conditions:
        """Read them off a model: a `WeightedModel`, or any whose forward has an argument `weights`."""
        if isinstance(model, WeightedModel):
            return cls(True, "beta" if model.takes_beta else None)
        forward = type(causal_lm_of(model)).forward
        names, beta = inspect.signature(forward).parameters, renamed_parameter(forward, "objective_temperature", "beta")
        return cls("weights" in names, beta if beta in names else None)

    def keywords(self, batch: ListBatch, weights: Tensor | None, beta: Tensor | None) -> dict[str, Any]:
        """Return that of a batch, one row a sequence, from w and β of its lists, (B, m) each; or of all, (m,)."""
        wanted = {"weights": ("weights", weights)} if self.weights else {}
        if self.beta is not None:
            wanted[self.beta] = ("β", beta)
        found: dict[str, Any] = {}
        for keyword, (name, value) in wanted.items():
            if value is None:
                raise ValueError(f"this model takes {name}; pass (m,) or one row a list, (B, m)")
            found[keyword] = value[batch.index[:, 0]] if value.ndim == 2 else value
        return found


@renamed_keywords(temperature="beta")
def score_batch(
    model: nn.Module,
    batch: ListBatch,
    weights: Tensor | None = None,  # (m,) or (B, m)
    beta: Tensor | None = None,  # (m,) or (B, m)
) -> Tensor:  # (B, K)
    """Return the summed log-probabilities of the responses of a batch, in nats, in one forward pass.

    Args:
        model: A fused model, or a `WeightedModel` around one, or any that takes the weights of each list.
        batch: The lists.
        weights: w, if the model takes it.
        beta: β, if the model takes it.
    """
    inner = unwrapped(model)
    given: dict[str, Any] = {}
    if not (isinstance(inner, WeightedModel) and inner.is_reference):
        given = Conditions.of(inner).keywords(batch, weights, beta)
    return to_lists(score_sequences(model, batch.inputs, **given).scores, batch)


def response_lengths(batch: ListBatch) -> Tensor:
    """Return how many tokens the responses of a batch have, (B, K) int64, 0 in masked places."""
    written, segment = batch.inputs["labels"] != IGNORE_INDEX, batch.inputs.get("segment")
    if segment is None:
        return to_lists(written.sum(-1), batch)
    counts = written.new_zeros(len(batch.index), dtype=torch.long)
    return to_lists(counts.index_add(0, segment[0], written[0].long()), batch)


def preferred(batch: ListBatch) -> Tensor:
    """Return (B, m, K, K): whether an objective labels response i higher than response j."""
    both = batch.label_mask[..., :, None] & batch.label_mask[..., None, :]
    return both & (batch.labels[..., :, None] > batch.labels[..., None, :])


def ordered_pairs(rewards: Tensor, batch: ListBatch) -> tuple[Tensor, Tensor]:
    """Count, in each list and for each objective, the pairs that rewards (B, K) order as the labels do.

    Their ratio over lists is what is called accuracy everywhere here. A pair is two responses to which the objective
    gives different labels; one with equal rewards counts half, so a model that is its reference has 0.5. (TRL's
    `rewards/accuracies` counts such a pair as wrong.)

    Returns:
        Right pairs (B, m) and all pairs (B, m).
    """
    better = preferred(batch)
    gap = (rewards[:, None, :, None] - rewards[:, None, None, :]).sign()
    right = ((gap + 1.0) / 2.0 * better).sum((-1, -2))
    return right, better.sum((-1, -2)).to(right.dtype)


class OneProcess:
    """What is asked of accelerate's `Accelerator` where none is passed: one process, on the device of the model."""

    num_processes, process_index, is_main_process = 1, 0, True

    def __init__(self, model: nn.Module) -> None:
        self.device = next(model.parameters()).device

    @property
    def mixed_precision(self) -> str:
        """The precision of `torch.autocast`, where the caller has switched it on."""
        if not torch.is_autocast_enabled(self.device.type):
            return "no"
        dtype = torch.get_autocast_dtype(self.device.type)
        return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, str(dtype))

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Leave the precision as it is."""
        return contextlib.nullcontext()


@renamed_keywords(temperature="beta")
@torch.no_grad()
def score_lists(
    model: nn.Module,
    lists: Sequence[TokenizedList],
    *,
    collator: ListCollator | None = None,
    tokens_per_batch: int = 8192,
    lists_per_batch: int | None = None,
    accelerator: Any = None,
    weights: Tensor | None = None,
    beta: Tensor | None = None,
    conditioner: Conditioner | None = None,
    score: Score | None = None,
    columns: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Return the summed log-probability of every response, in the order of the lists, on the CPU.

    Processes share the batches; each gets all results. Lists of like length go together.

    Args:
        model: As in `score_batch`, on the accelerator's device.
        lists: Tokenised lists.
        collator: Makes the batches; by default one that pads on the right.
        tokens_per_batch: Most tokens of a batch, padding included; a longer list is a batch of its own.
        lists_per_batch: Batches of so many lists, in the order of the data, in their place.
        accelerator: accelerate's `Accelerator`; by default this process works alone, where the model is.
        weights: (m,), for a model that takes them.
        beta: (m,), for a model that takes it.
        conditioner: Writes both into a list's prompt.
        score: Called with the model and a batch in place of `score_batch`.
        columns: `score` gives so many numbers for each response, (B, K, columns); None: one, (B, K).
        progress: Told how many lists are done.

    Returns:
        (S,) float32, in nats; (S, columns) if asked for. S counts the responses of all lists.

    Raises:
        ValueError: If the model is not fused, or takes weights or β that were not passed.
    """
    if conditioner is not None:
        assert weights is not None
        lists = [conditioner(item, weights, weights if beta is None else beta) for item in lists]
    collator, accelerator = collator or ListCollator(), accelerator or OneProcess(model)
    counts = torch.tensor([len(item.responses) for item in lists])
    start = counts.cumsum(0) - counts
    flat = torch.zeros(int(counts.sum()), *(() if columns is None else (columns,)))
    if lists_per_batch is None:
        batches = list(map(torch.from_numpy, token_batches(lists, tokens_per_batch, padded=not collator.packed)))
    else:
        batches = list(torch.arange(len(lists)).split(lists_per_batch))
    device, processes = accelerator.device, accelerator.num_processes
    there = [None if value is None else value.float().to(device) for value in (weights, beta)]
    with evaluating(model):
        for first in range(0, len(batches), processes):
            turn = batches[first : first + processes]
            own = min(accelerator.process_index, len(turn) - 1)
            # A process without a batch repeats another's: a sharded model needs all of them in each forward pass.
            batch = collator([lists[int(place)] for place in turn[own]]).to(device)
            with accelerator.autocast():
                scores = score_batch(model, batch, *there) if score is None else score(model, batch)
            if own == accelerator.process_index:
                of_lists = start[turn[own]]
                flat[of_lists[batch.index[:, 0].cpu()] + batch.index[:, 1].cpu()] = scores[batch.mask].float().cpu()
            if progress is not None:
                progress.update(sum(map(len, turn)))
    if processes > 1:
        flat = accelerator.reduce(flat.to(device), "sum").cpu()
    return flat


class ListScores:
    """One number for each response of tokenised lists, found again by the places of the lists in the data.

    Args:
        lists: The lists, whose `index` is that place.
        values: (S,), in the order of the lists and of their responses.

    Raises:
        ValueError: If there is not one value a response.
    """

    def __init__(self, lists: Sequence[TokenizedList], values: Tensor) -> None:
        counts = torch.tensor([len(item.responses) for item in lists])
        if values.shape != (int(counts.sum()),):
            raise ValueError(f"{there_are(int(counts.sum()), 'response')} but values are {tuple(values.shape)}")
        self.values = values
        self._start = torch.zeros(max(item.index for item in lists) + 1, dtype=torch.long)
        self._start[torch.tensor([item.index for item in lists])] = counts.cumsum(0) - counts

    def pad(self, batch: ListBatch, fill: float = 0.0) -> Tensor:
        """Return the values of a batch's lists as (B, K), `fill` in masked places."""
        place = self._start[batch.lists][:, None] + torch.arange(batch.mask.shape[1])
        return self.values[place.clamp(max=len(self.values) - 1)].masked_fill(~batch.mask, fill)
