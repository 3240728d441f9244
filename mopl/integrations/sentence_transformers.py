"""`ListLoss`: mopl's losses of lists for sentence-transformers' `CrossEncoderTrainer`, with a head for each objective.

    model = CrossEncoder("microsoft/MiniLM-L12-H384-uncased", num_labels=2)
    loss = ListLoss(model, "plackett_luce", objectives=["relevance", "freshness"], mini_batch_size=16)
    CrossEncoderTrainer(model, args, train_dataset, loss=loss).train()

Rows are those of sentence-transformers' own losses of lists, `(query, [document, ...])` with a column `labels`:
numbers, or for m objectives m lists of numbers. `mini_batch_size` bounds the memory, which theirs does not: their
mini-batches stay in one graph until the backward pass (see `mopl.training.gradient_cache`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mopl._arguments import check_choice, shape_of
from mopl._counted import counted, there_are
from mopl._extras import require

require("sentence_transformers", what="mopl.integrations.sentence_transformers")
from sentence_transformers.util import batch_to_device

from mopl.conditioning.sampling import check_weights
from mopl.integrations._head_losses import HeadLoss, OneLoss, named
from mopl.integrations._setup import check_labels
from mopl.rewards.writing import RECORD, check_alike, longest_input, settle_padding
from mopl.training.gradient_cache import score_in_parts

__all__ = ["ListLoss"]
REMEDY = (
    "pass functools.partial(mopl.losses.listwise_dpo, normalize='softmax', label_temperature=...) to ListLoss as the "
    "loss, or 'plackett_luce', which takes their ranks"
)


class ListLoss(nn.Module):
    """A loss of lists for a `CrossEncoder` with m outputs, the scores of m objectives.

    Args:
        model: The `CrossEncoder`; `num_labels` is m.
        loss: `"listwise_dpo"` (on scores, ListNet), `"plackett_luce"` (ListMLE), `"pairwise_logistic"` (RankNet),
            `"lambda_loss"`, `"approx_ndcg"`, `"bradley_terry"` for lists of two, or a function with the arguments of
            `mopl.losses.listwise_dpo`, such as `functools.partial(listwise_dpo, normalize="softmax")`, which is
            sentence-transformers' `ListNetLoss`; one, or one for each objective.
        objectives: Names of the m objectives, which the model's configuration takes as names of its outputs. They are
            then rewards of `mopl.rewards.classifier_rewards`.
        objective_weights: Weights of the objectives' losses, on the simplex; by default all the same.
        beta: β, the factor on scores, 1 / temperature; one, or one for each objective.
        labels: How a row with several objectives has its labels: `"objectives"`, m lists of a label for each document,
            or `"documents"`, a list of m labels for each document. NaN is a label that is missing.
        activation_fn: What becomes of the model's outputs before the loss.
        mini_batch_size: Pairs of query and document in one forward pass, whose activations are all that is held at a
            time; scores are computed twice. None for all pairs of a batch at once.

    Raises:
        ImportError: If sentence-transformers is not installed.
        ValueError: If numbers do not fit the model's outputs, or a choice is unknown.
    """

    _beta: Tensor  # (1, m) or (1, 1)
    _weights: Tensor  # (1, m)

    def __init__(
        self,
        model: Any,
        loss: OneLoss | Sequence[OneLoss] = "listwise_dpo",
        *,
        objectives: Sequence[str] | None = None,
        objective_weights: Sequence[float] | None = None,
        beta: float | Sequence[float] = 1.0,
        labels: Literal["objectives", "documents"] = "objectives",
        activation_fn: nn.Module | None = None,
        mini_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        check_choice(labels, ("objectives", "documents"), "labels")
        if mini_batch_size is not None and mini_batch_size < 1:
            raise ValueError(f"mini_batch_size is {mini_batch_size} but must be at least 1; pass None for all at once")
        self.model, self.layout, self.mini_batch_size = model, labels, mini_batch_size
        # Says that the model runs in the backward pass, when a patch of its forward would be gone.
        self.uses_gradient_cache = mini_batch_size is not None
        self.activation_fn = nn.Identity() if activation_fn is None else activation_fn
        self.outputs = m = int(model.num_labels)
        for name, value in (("objectives", objectives), ("objective_weights", objective_weights)):
            if value is not None and len(value) != m:
                raise ValueError(
                    f"{name} has {counted(len(value), 'entry')} but the model has {counted(m, 'output')}; give one for "
                    f"each, or pass num_labels={len(value)} to CrossEncoder"
                )
        self.objectives = tuple(objectives or (f"objective_{j + 1}" for j in range(m)))
        self.loss = HeadLoss(loss, m)
        betas = [float(beta)] if isinstance(beta, (int, float)) else [float(value) for value in beta]
        if len(betas) not in (1, m) or not all(math.isfinite(value) and value > 0 for value in betas):
            raise ValueError(f"beta is {beta} but must be one positive number, or {m}")
        weights = torch.full((m,), 1.0 / m)
        if objective_weights is not None:
            weights = check_weights(list(objective_weights), m, name="objective_weights").float()
        self.register_buffer("_beta", torch.tensor([betas]), persistent=False)
        self.register_buffer("_weights", weights[None], persistent=False)
        inner = getattr(model, "model", None)
        if inner is not None and getattr(model.tokenizer, "pad_token_id", None) is not None:
            padded = settle_padding(inner, model.tokenizer)
            name = "max_seq_length" if hasattr(model, "max_seq_length") else "max_length"  # as newer versions call it
            longest = getattr(model, name, None) or longest_input(inner.config, model.tokenizer)
            check_alike(inner, padded, longest, mini_batch_size)
        if objectives is not None and inner is not None:
            inner.config.id2label = dict(enumerate(self.objectives))
            inner.config.label2id = {name: number for number, name in enumerate(self.objectives)}
            if not getattr(model.tokenizer, "chat_template", None):
                setattr(inner.config, RECORD, "pair")

    def forward(self, inputs: Sequence[Any], labels: Any, prompt: str | None = None, task: str | None = None) -> Tensor:
        """Return the mean over the queries of the weighted sum of the objectives' losses, float32.

        Args:
            inputs: B queries, and for each of them a list of documents.
            labels: For each query a tensor (K,), or (m, K), or (K, m) with `labels="documents"`.
            prompt: Passed on to the model's preprocessing.
            task: Likewise.

        Raises:
            ValueError: If labels do not fit the documents.
        """
        if len(inputs) != 2:
            raise ValueError(
                f"{there_are(len(inputs), 'column')} but must be two, of queries and of lists of documents"
            )
        queries, lists = inputs
        sizes = [len(documents) for documents in lists]
        if isinstance(labels, Tensor) or labels is None or len(labels) != len(queries):
            raise ValueError("labels must be a list for each query; give a column `labels` with a list in each row")
        device = next(self.model.parameters()).device
        width, m = max(sizes), self.outputs
        padded = torch.full((len(sizes), m, width), math.nan)
        for row, value in enumerate(labels):
            padded[row, :, : sizes[row]] = self._of_row(value, sizes[row], row)
        for column, function in enumerate(self.loss.functions):
            rows = enumerate(padded[:, column : column + 1].numpy())
            check_labels(function, self.objectives[column : column + 1], rows, REMEDY)
        pairs = [(query, document) for query, documents in zip(queries, lists, strict=True) for document in documents]
        scores = self._scores(pairs, prompt, task)
        place = torch.tensor([row * width + k for row, size in enumerate(sizes) for k in range(size)], device=device)
        placed = scores.new_zeros(len(sizes) * width, m).index_copy(0, place, scores)
        padded = padded.to(device)
        with torch.autocast(device.type, enabled=False):
            arranged = placed.view(len(sizes), width, m).transpose(1, 2)
            vector = self.loss(arranged, padded, ~padded.isnan(), self._beta.to(device))
            return (vector * self._weights.to(device)).sum(-1).mean()

    def _scores(self, pairs: list[tuple[str, str]], prompt: str | None, task: str | None) -> Tensor:  # (N, m)
        def run(part: list[tuple[str, str]]) -> Tensor:
            tokens = self.model.preprocess(part, prompt=prompt, task=task)
            tokens = batch_to_device(tokens, next(self.model.parameters()).device)
            found = self.model(tokens)["scores"].reshape(len(part), -1)
            if found.shape[1] != self.outputs:
                raise ValueError(f"the model gave scores {shape_of(found)} but has {counted(self.outputs, 'output')}")
            return self.activation_fn(found.float())

        if self.mini_batch_size is None:
            return run(pairs)
        order = sorted(range(len(pairs)), key=lambda place: sum(map(len, pairs[place])))  # less padding
        size = self.mini_batch_size
        parts = [[pairs[place] for place in order[start : start + size]] for start in range(0, len(order), size)]
        found = score_in_parts(run, parts, self.model)
        return found[torch.tensor(order, device=found.device).argsort()]

    def _of_row(self, value: Any, size: int, row: int) -> Tensor:  # (m, K)
        value, m = torch.as_tensor(value, dtype=torch.float32).cpu(), self.outputs
        if value.ndim == 1 and m == 1:
            value = value[None] if self.layout == "objectives" else value[:, None]
        wanted = (m, size) if self.layout == "objectives" else (size, m)
        if value.shape != wanted:
            hint = ""
            if value.shape == wanted[::-1]:
                other = "documents" if self.layout == "objectives" else "objectives"
                hint = f"; pass labels={other!r} to ListLoss if that is how they are written"
            raise ValueError(
                f"labels of row {row + 1} of the batch have shape {shape_of(value)} but must be {wanted}, for "
                f"{counted(m, 'objective')} and {counted(size, 'document')}{hint}"
            )
        return value if self.layout == "objectives" else value.T

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings, for the model card of sentence-transformers."""
        return {
            "loss": [named(loss) for loss in self.loss.names],
            "objectives": list(self.objectives),
            "objective_weights": self._weights[0].tolist(),
            "beta": self._beta[0].tolist(),
            "mini_batch_size": self.mini_batch_size,
        }
