"""The student's own answers as responses to distil on (Agarwal et al., ICLR 2024: λ of GKD is the share of such steps).

Whether a step has them, and every random number of an answer, is a function of the run's seed, the step and the place
of the list in the data. So they do not depend on how a batch is split, and a run that goes on gives the same answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from mopl._extras import require
from mopl._restoring import evaluating
from mopl.alignment._demo_sampling import Sampling, draw
from mopl.alignment.methods import AlignBatch
from mopl.language_models.collate import ListCollator
from mopl.language_models.prompt_rows import generating_by, prompt_rows
from mopl.language_models.scoring import Conditioner, Conditions
from mopl.language_models.tokenization import ListTokenizer
from mopl.language_models.tokenized import TokenizedList
from mopl.language_models.turns import turn_ends
from mopl.training.parallel import whole_model

_WHETHER, _TOKENS = 1, 2  # what numbers are drawn for


class OwnAnswers:
    """Puts answers of the student, one for each list, into the place of the responses of a step's batch.

    Args:
        lists: The tokenised lists of the training.
        collator: Makes the batches.
        tokenizer: How the lists were tokenised.
        conditioner: Writes weights into a list's prompt, where the student reads them there.
        share: λ, the share of the steps that learn from the student's own answers.
        tokens: Most tokens of an answer.
        seed: The run's.
    """

    def __init__(
        self,
        lists: Sequence[TokenizedList],
        collator: ListCollator,
        tokenizer: ListTokenizer,
        conditioner: Conditioner | None,
        *,
        share: float,
        tokens: int,
        seed: int,
    ) -> None:
        self.lists = {item.index: item for item in lists}
        self.collator, self.tokenizer, self.conditioner = collator, tokenizer, conditioner
        self.share, self.tokens, self.seed = share, tokens, seed

    def has(self, step: int) -> bool:
        """Say whether a step learns from the student's own answers."""
        return bool(np.random.default_rng([self.seed, step, _WHETHER]).random() < self.share)

    @torch.no_grad()
    def answered(self, model: nn.Module, batch: AlignBatch, step: int) -> AlignBatch:
        """Return the batch with an answer of the model to each prompt, sampled at the list's weights.

        The answers follow the model's distribution at temperature 1, cut off after so many tokens. Every process must
        call it: a sharded model is gathered.
        """
        require("transformers", what="generation")
        with whole_model(model) as inner:
            return self._answered(inner, batch, step)

    def _answered(self, inner: Any, batch: AlignBatch, step: int) -> AlignBatch:
        from transformers import GenerationConfig

        device, places = batch.weights.device, batch.lists.lists.tolist()
        plain = [dataclasses.replace(item, prompt=item.prompt_of(0), prompt_starts=()) for item in self._of(places)]
        conditions = list(zip(plain, batch.weights.cpu(), batch.beta.cpu(), strict=True))
        read = plain if self.conditioner is None else [self.conditioner(*each) for each in conditions]
        ends = turn_ends(self.tokenizer, getattr(inner, "generation_config", None))
        config = GenerationConfig(
            do_sample=False, max_new_tokens=self.tokens, eos_token_id=list(ends.ids) or None,
            pad_token_id=self.tokenizer.pad_id,
        )  # fmt: skip
        uniform = np.stack([
            np.random.default_rng([self.seed, step, _TOKENS, place]).random(self.tokens) for place in places
        ])  # fmt: skip
        sampling = Sampling(self.tokens, 1.0, top_k=inner.get_output_embeddings().weight.shape[0])
        weighted, answers = Conditions.of(inner).weights, []
        with evaluating(inner), generating_by(inner, config):
            prompts = [item.prompt.tolist() for item in read]
            for part in prompt_rows(inner, prompts, self.tokenizer.pad_id, ends, len(prompts)):
                numbers = torch.from_numpy(uniform[part.rows]).float().to(device)
                given = {"weights": batch.weights[part.rows]} if weighted else {}
                new, _ = part.generate(logits_processor=[draw(numbers, sampling)], **given)
                answers += [np.array(ends.cut(row)[0], dtype=np.int64) for row in new.tolist()]

        def with_answers(items: Sequence[TokenizedList]) -> Any:
            made = [
                dataclasses.replace(item, responses=(answer,), labels=item.labels[:, :1])
                for item, answer in zip(items, answers, strict=True)
            ]
            return self.collator(made).to(device)

        return dataclasses.replace(
            batch, lists=with_answers(read), plain=None if self.conditioner is None else with_answers(plain)
        )

    def _of(self, places: Sequence[int]) -> list[TokenizedList]:
        return [self.lists[place] for place in places]
