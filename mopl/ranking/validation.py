"""How the trainings of a run are validated: which step is kept, on lists that are neither trained on nor reported.

Every training is judged by NDCG as the run measures it, larger being better:

| training                   | figure, on the validation split                                                 |
|----------------------------|---------------------------------------------------------------------------------|
| base model                 | NDCG of the main objective                                                      |
| networks for fixed weights | sum_j w_j NDCG_j of the auxiliary objectives                                    |
| conditioned models         | the mean of that over the vertices and the centre of the simplex of the weights |

Tuned models move away from the main objective by design, so its NDCG would keep their first step. Their own held-out
loss would keep an early one as well: on few lists it rises by overconfidence long before the rankings are at their
best, and confidence is what `scale` takes back without training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mopl._counted import counted
from mopl.ranking.evaluate import in_batches, reference_scores, scored
from mopl.training import Selection

if TYPE_CHECKING:
    from mopl.ranking.config import RankConfig
    from mopl.ranking.data import RankingData

# Fewer lists than this say less about a step than chance does.
FEWEST_LISTS = 10
# Lists of one validation, each at one trade-off: enough to tell steps apart, a few steps' worth of time.
MOST_LISTS = 512


class Validation:
    """Makes the `Selection` of each training of a run from its validation split: `MOST_LISTS` lists, evenly taken.

    `notes` says what is not validated and why, a line each.
    """

    def __init__(self, data: RankingData, config: RankConfig) -> None:
        kept = torch.arange(len(data))
        if len(data) > MOST_LISTS:
            kept = torch.arange(MOST_LISTS) * len(data) // MOST_LISTS
        self.data, self._items, self.config = data.subset(kept), data.items_of(kept), config
        self._reference = torch.zeros(self.data.num_items)
        self.notes: list[str] = []
        main, *auxiliary = self.data.labelled.sum(0).tolist()
        self._of_base = self._enough("the base model does", [data.main.name], [main])
        names = [objective.name for objective in data.objectives]
        self._of_tuned = self._enough("tuned models do", names, auxiliary)

    def _enough(self, who: str, names: list[str], counts: list[int]) -> bool:
        """Return whether a figure over these objectives means something; note why not."""
        fewest = min(counts)
        if self.config.patience and fewest < FEWEST_LISTS:
            self.notes.append(
                f"{who} all steps: {self.data.name} has {counted(fewest, 'list')} with a label of "
                f"{names[counts.index(fewest)]} above 0, and choosing a step needs at least {FEWEST_LISTS}"
            )
        return bool(self.config.patience) and fewest >= FEWEST_LISTS

    def take_reference(self, reference: Tensor) -> None:
        """Take the base model's scores (N,) of the whole validation split."""
        self._reference = reference[self._items]

    def of_base(self, steps: int) -> Selection | None:
        """Return the selection of the base model's training of at most `steps`; None where all steps are done."""
        data, measure = self.data, self.config.measure

        def validate(model: nn.Module) -> float:
            scores = reference_scores(model, data, next(model.parameters()).device)
            figures = [
                measure.ndcg(data.pad(scores, lists.queries), lists.main, lists.mask) for lists in in_batches(data)
            ]
            return float(torch.cat(figures).nanmean())

        return self._selection(validate, steps) if self._of_base else None

    def of_tuned(self, weights: Tensor, beta: Tensor, steps: int) -> Selection | None:
        """Return the selection of the training of a `RankingModel`; None where all steps are done.

        It is validated at trade-offs (n, m). If they are too many for `MOST_LISTS`, each list is ranked at some of
        them, in turn.
        """
        turns = min(len(weights), max(1, MOST_LISTS // len(self.data)))

        def validate(model: nn.Module) -> float:
            totals, shares = torch.zeros(weights.shape[1]), torch.zeros(weights.shape[1])
            for lists in in_batches(self.data):
                for turn in range(turns):
                    w = weights[(lists.queries + turn) % len(weights)].float()
                    figures = self._tuned_figures(model, lists, w, beta)
                    there = w * torch.isfinite(figures)
                    totals += (w * figures.nan_to_num()).sum(0)
                    shares += there.sum(0)
            # At fixed weights this is the weighted sum of the means over lists, whatever lists have no labels.
            asked = shares > 0
            return float((weights.float().mean(0)[asked] * totals[asked] / shares[asked]).sum())

        return self._selection(validate, steps) if self._of_tuned else None

    def _tuned_figures(self, model: Any, lists: Any, weights: Tensor, beta: Tensor) -> Tensor:
        """Return NDCG (B, m) of the auxiliary objectives, each list ranked at its own weights (B, m)."""
        device, takes = next(model.parameters()).device, model.config
        w = weights.to(device) if takes.conditioned else None
        given = {"beta": beta.to(device) if takes.takes_beta else None}

        def scorer(features: Tensor, mask: Tensor, reference: Tensor) -> Tensor:
            return model.score(features, w, mask=mask, reference=reference, **given)

        scores, _, mask = scored(scorer, lists, self.data, self._reference, device)
        return self.config.measure.ndcg(scores, lists.labels, mask)

    def _selection(self, validate: Callable[[nn.Module], float], steps: int) -> Selection:
        every = self.config.validate_every or max(5, steps // 20)
        return Selection(validate, every=every, patience=self.config.patience, maximise=True)
