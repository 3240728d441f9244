"""The trainings of an alignment run, one folder each: what is finished is loaded, what was interrupted is continued.

    reference/                log-probabilities of the reference, of held-out and, if precomputed, of training lists
    models/w-0.25-0.75/       what was trained for these weights; the experts are those at the vertices
    models/modpo-0.25-0.75/   the same for MO-DPO
    <method folder>/model/    the conditioned model of COS-DPO: in the run, or in a folder each under `--method all`

A model's folder holds adapters, prompt and `mopl.json`, and, written last, `training.json` with steps, seconds and
parameters; until then it holds `checkpoints/`, which are dropped at the end. No folder holds the frozen model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopl._restoring import seeded
from mopl._rows import check_rows
from mopl.alignment import tuned
from mopl.alignment.config import CONDITIONED, LIST_LOSSES, AlignConfig
from mopl.alignment.distill import Distilling
from mopl.alignment.methods import AlignSource, scored_for
from mopl.alignment.on_policy import OwnAnswers
from mopl.alignment.teachers import Teacher, load_teacher, of_folder
from mopl.conditioning import TextPrompt, WeightedModel
from mopl.conditioning.weighted import causal_lm_of
from mopl.experiments.cos_dpo import CosDpoStages, Part, model_folder, vertices
from mopl.experiments.driver import Recipe
from mopl.experiments.methods import TABLE, Method
from mopl.experiments.response_loss import ResponseLoss
from mopl.experiments.stages import Trained, Training
from mopl.language_models import models
from mopl.language_models.collate import ListCollator
from mopl.language_models.data import PreferenceData
from mopl.language_models.divergences import Distillation
from mopl.language_models.model_identity import identity_of
from mopl.language_models.reference_store import ReferenceStore
from mopl.language_models.scoring import Conditioner, ListScores, score_lists
from mopl.language_models.tokenization import ListTokenizer, TokenizedData, TokenizedList
from mopl.training.optimizer import adamw


@dataclasses.dataclass
class Split:
    """One part of the data, as text and as tokens."""

    data: PreferenceData
    tokens: TokenizedData


def _prefers(labels: Sequence[float | None]) -> bool:
    return len(set(labels) - {None}) > 1


def text_conditioner(tokenizer: Any, prompt: TextPrompt) -> Conditioner:
    """Return what writes a trade-off before a tokenised prompt, on top of `max_length`, so that nothing cuts it off."""

    def write(item: TokenizedList, weights: Tensor, beta: Tensor) -> TokenizedList:
        betas = beta.tolist() if prompt.takes_beta else None
        tokens = prompt.prepend_ids(item.prompt.tolist(), weights, tokenizer, betas)
        return dataclasses.replace(item, prompt=np.array(tokens, dtype=np.int64))

    return write


class Stages(CosDpoStages):
    """Trains the models of one run.

    Args:
        run: The run, its settings resolved.
        splits: `"train"` and `"test"`.
        tokenizer: How they were tokenised.
    """

    config: AlignConfig
    loss: ResponseLoss

    def __init__(self, run: Recipe, splits: dict[str, Split], tokenizer: ListTokenizer) -> None:
        config, train = run.config, splits["train"]
        loss = response_loss(config, train.data)
        super().__init__(
            run, train.data.objectives, torch.tensor(config.betas(len(train.data.objectives))),
            min(config.lists_per_batch, len(train.tokens)), scored_for(loss), loss,
        )  # fmt: skip
        self.splits, self.tokenizer = splits, tokenizer
        self.collator = ListCollator(
            packed=config.packing, pad_id=tokenizer.pad_id, partial=config.partial, order=loss.needs_order
        )
        self.base = config.load_model()
        check_length(self.base, config, splits)
        self.references: dict[str, ListScores | None] = {}

    def check(self, *, begins: bool) -> None:
        """Raise what would stop the run later: labels that are nowhere, adapters, rows or a reference that cannot be.

        Args:
            begins: Whether the run is new. One of an earlier version, which allowed equal labels, may go on.

        Raises:
            ValueError: If an objective has no labels to learn from or to measure with, if its labels are equal in each
                training list, or if no module gets adapters.
            UnsupportedModelError: If the model cannot take the run's rows, or cannot generate.
            OSError: If another model is the reference and there is none.
        """
        for name, what in (("train", "training"), ("test", "held-out")):
            if name == "train" and self.config.teachers:
                continue  # which learns from no labels
            counts = self.splits[name].data.describe()
            for objective, found in counts["objectives"].items():
                if found["missing"] == counts["lists"]:
                    raise ValueError(
                        f"objective {objective!r} has no labels in any of the {counts['lists']} {what} lists, so there "
                        "is nothing to learn or to measure; name the others in objectives, give more lists labels, or "
                        "take another held_out or data_seed"
                    )
                lists = self.splits[name].data if begins and name == "train" else ()
                if lists and not any(_prefers(item.labels.get(objective, ())) for item in lists):
                    raise ValueError(
                        f"objective {objective!r} prefers nothing: in none of the {counts['lists']} training lists do "
                        "labels differ, so there is nothing to learn; give better responses higher labels, or name the "
                        "others in objectives"
                    )
        own_experts = self.config.method not in CONDITIONED or (self.config.distils and not self.config.teachers)
        virtual = self.config.conditioning == "hyper-prompt" or own_experts
        base = self.base.to(self.accelerator.device)
        generates = self.config.samples > 0 or self.config.distill_on_policy > 0
        check_rows(base, packed=self.config.packing, virtual=virtual, generates=generates)
        if self.config.reference not in ("self", "precomputed"):
            models.load_tokenizer(self.config.reference)
        model = tuned.new_model(
            self.base, self.config, self.objectives, Method(conditioned=True), self._start_of_prompt()
        )
        try:
            if isinstance(model, WeightedModel):
                model.check_merging()
        finally:
            models.release(model)

    def prepare_references(self) -> None:
        """Compute the reference's log-probabilities of held-out lists, and of training lists unless steps do it."""
        config = self.config
        own = config.reference in ("self", "precomputed")
        model = self.base if own else self._other_reference(config.reference)
        shared = config.reference_store
        store, identity = ReferenceStore(shared or self.path / "reference"), identity_of(model)
        self.base.to(self.accelerator.device)
        model.to(self.accelerator.device)
        for name, split in self.splits.items():
            if name == "train" and (config.reference == "self" or config.teachers):  # teachers are compared with alone
                self.references[name] = None
                continue
            lists = split.tokens.lists
            found = store.load_or_compute(
                lists, model, name=None if shared else name, identity=identity, accelerator=self.accelerator,
                collator=self.collator, tokens_per_batch=config.tokens_per_batch,
            )  # fmt: skip
            self.references[name] = ListScores(lists, found)

    def _other_reference(self, name: str) -> Any:
        """Return another model to be the reference; it must know the same tokens."""
        models.check_same_tokens(name, self.config.model, self.tokenizer.tokenizer, "reference")
        return models.load_causal_lm(name, dtype=self.config.dtype, attention=self.config.attention)

    # ------------------------------------------------------------ trainings

    def train(self, method: str, folder: Path) -> dict[str, Trained]:
        """Train what a method needs; distillation also needs its teachers."""
        kind, config = TABLE[method], self.config
        if not kind.distils:
            return super().train(method, folder)
        done = {} if config.teachers else self.train_fixed("dpo-soup", vertices(len(self.objectives)))
        answers = None
        if config.distill_on_policy:
            answers = OwnAnswers(
                self.splits["train"].tokens.lists, self.collator, self.tokenizer, self.conditioner(kind),
                share=config.distill_on_policy, tokens=config.distill_tokens, seed=config.seed,
            )  # fmt: skip
        loss = self.distilling.loss(
            self.objectives, answers=answers, penalty=config.penalty, penalty_sign=config.penalty_sign
        )
        part = dataclasses.replace(self.conditioned_part(method, kind, folder), loss=loss)
        return {**done, method: self.train_part(part)}

    @functools.cached_property
    def distilling(self) -> Distilling:
        """The teachers of the run and the divergence to them; where they are its experts, these must be trained."""
        config = self.config
        how = Distillation(config.distill_beta, config.distill_temperature)
        return Distilling(self._given_teachers() if config.teachers else self._experts(), how, self.accelerator)

    def _experts(self) -> list[Teacher]:
        return [of_folder(model_folder(self.path, "dpo-soup", w), self.base, w) for w in vertices(len(self.objectives))]

    def _given_teachers(self) -> list[Teacher]:
        """Load and check the teachers that the run was given."""
        config, found = self.config, []
        for objective, name in enumerate(config.teachers):
            teacher = load_teacher(
                name, self.base, config.model, self.tokenizer.tokenizer, self.objectives, objective, dtype=config.dtype,
                attention=config.attention,
            )  # fmt: skip
            teacher.model.to(self.accelerator.device)
            check_teacher(teacher, self.base, config, self.splits)
            found.append(teacher)
        pairs = zip(self.objectives, config.teachers, strict=True)
        self.say("; ".join(f"{name} teaches {objective}" for objective, name in pairs))
        return found

    def train_part(self, part: Part) -> Trained:
        """Train one model of a method unless it is there."""
        config, method, device = self.config, part.method, self.accelerator.device
        source = AlignSource(
            self.splits["train"].tokens.lists, config.lists_per_batch, self.collator, seed=config.seed,
            weights=part.sample_weights, beta=part.sample_beta, reference=self.references["train"],
            experts=part.experts, conditioner=self.conditioner(method), taught=method.distils,
        )  # fmt: skip

        @contextmanager
        def begin() -> Iterator[Training]:
            with seeded(config.seed):  # every model of a kind starts from the same parameters
                model = tuned.new_model(self.base, config, self.objectives, method, self._start_of_prompt())
            try:
                model.to(device)
                if config.gradient_checkpointing:
                    # The other form of checkpointing would need inputs that take a gradient, which text has not.
                    models.recompute_activations(model, True)
                assert config.prompt_learning_rate is not None
                settings = config.training()
                yield Training(
                    model, source, part.loss, settings,
                    lambda folder: tuned.save_model(model, folder, config, self.objectives, method),
                    optimizer=adamw(model, settings, device, {"hyper_prompt.": config.prompt_learning_rate}),
                    save_frozen=False,
                )  # fmt: skip
            finally:
                if config.gradient_checkpointing:
                    models.recompute_activations(self.base, False)
                models.release(model)

        folder = part.folder / "model" if method.conditioned else part.folder
        return self.train_once(part.name, folder, begin)

    def expert_scores(self) -> list[ListScores]:
        """Return the log-probabilities of the training lists under the expert of each objective."""
        lists, found = self.splits["train"].tokens.lists, []
        for w in vertices(len(self.objectives)):
            model = models.load_model(model_folder(self.path, "dpo-soup", w), self.base)
            try:
                scores = score_lists(
                    model.to(self.accelerator.device), lists, collator=self.collator,
                    tokens_per_batch=self.config.tokens_per_batch, accelerator=self.accelerator, weights=w.float(),
                )  # fmt: skip
            finally:
                models.release(model)
            found.append(ListScores(lists, scores))
        return found

    def conditioner(self, method: Method) -> Conditioner | None:
        """Return what writes weights into prompts, where a method wants them there."""
        prompt = tuned.prompt_of(self.config, method, self.objectives)
        return None if prompt is None else text_conditioner(self.tokenizer.tokenizer, prompt)

    def front_of(self, prompt: list[int]) -> int:
        """Return how many positions stand in front of a prompt: virtual tokens, or words, in which no w has more."""
        front = self.config.virtual_tokens
        if self.config.conditioning == "text":
            words = tuned.text_prompt(self.objectives, takes_beta=True)
            ones = [1 / len(self.objectives)] * len(self.objectives)
            written = words.prepend_ids(prompt, ones, self.tokenizer.tokenizer, self.beta.tolist())
            front = max(front, len(written) - len(prompt))
        return front

    def _start_of_prompt(self) -> list[int]:
        """Return the tokens whose embeddings the virtual tokens start at."""
        if self.config.prompt_text is None:
            return []
        tokens = self.tokenizer.tokenizer(self.config.prompt_text, add_special_tokens=False)["input_ids"]
        if not tokens:
            raise ValueError(f"prompt_text is {self.config.prompt_text!r}, which has no tokens; write some words")
        return tokens


def response_loss(config: AlignConfig, data: PreferenceData) -> ResponseLoss:
    """Return the loss of a run; what its settings leave open is read off the data.

    Raises:
        ValueError: If l1 is asked for labels that are negative or are divided by a temperature, or a pair loss for
            lists of other lengths.
    """
    modes, rates = [], config.label_temperatures(len(data.objectives))
    for j, (name, mode) in enumerate(zip(data.objectives, config.label_modes(len(data.objectives)), strict=True)):
        values = {float(x) for i in range(len(data)) for x in data.label_array(i)[j] if x == x}
        if mode == "auto":
            mode = "l1" if values <= {0.0, 1.0} else "softmax"
        if mode == "l1" and config.loss == "listnet" and min(values, default=0.0) < 0:
            place = next(i for i in range(len(data)) if min(values) in data.label_array(i)[j])
            raise ValueError(
                f"labels of {name} go down to {min(values):g} ({data[place].place or f'list {place}'} of {data.name}), "
                "which labels='l1' cannot turn into shares; pass labels='softmax' for it (label_temperature says how "
                "sharp), or loss='plackett-luce', which takes their ranks"
            )
        if mode == "l1" and config.loss == "listnet" and rates[j] != 1:
            raise ValueError(
                f"label_temperature is {rates[j]:g} for {name}, but has no part in labels='l1', which its labels take; "
                "pass labels='softmax' for it, or 1"
            )
        modes.append(mode)
    counts = data.describe()
    sizes = counts["list_sizes"]
    if config.loss not in LIST_LOSSES and set(sizes) != {2}:
        raise ValueError(
            f"loss {config.loss!r} compares two responses but {data.name} has lists of "
            f"{', '.join(map(str, sizes))}; take loss 'listnet' or 'plackett-luce'"
        )
    partly = config.partial == "keep" and any(entry["partial"] for entry in counts["objectives"].values())
    return ResponseLoss(
        config.loss, config.ties, config.last_group, config.top_k, tuple(modes), rates, config.label_smoothing, partly
    )


def check_teacher(teacher: Teacher, base: Any, config: AlignConfig, splits: Mapping[str, Split]) -> None:
    """Raise if a teacher cannot read what the run reads, or has a head of another size.

    Raises:
        ValueError: If its vocabulary is padded to another size, or it has fewer positions than the longest sequence.
        UnsupportedModelError: If it cannot take the run's rows.
    """
    inside = causal_lm_of(teacher.model)
    theirs, ours = (model.get_output_embeddings().weight.shape[0] for model in (inside, base))
    if theirs != ours:
        raise ValueError(
            f"the head of the teacher {teacher.name} has {theirs} rows, that of {config.model} {ours}, so there is no "
            "divergence of the two; resize the embeddings of one of them (resize_token_embeddings of transformers)"
        )
    virtual = teacher.model.virtual_tokens if isinstance(teacher.model, WeightedModel) else 0
    check_rows(inside, packed=config.packing, virtual=virtual > 0)
    positions, longest = models.positions_of(inside), longest_of(splits)
    if positions is not None and longest + virtual > positions:
        raise ValueError(
            f"the longest sequence has {longest} tokens and the teacher {teacher.name} puts {virtual} in front, but it "
            f"knows {positions} positions; pass max_length={positions - virtual} or less"
        )


def check_room_for_answers(stages: Stages) -> None:
    """Raise if the student or a teacher has fewer positions than the longest prompt with an answer of the student's."""
    config = stages.config
    prompt = max((item.prompt for item in stages.splits["train"].tokens.lists), key=len).tolist()
    longest, readers = len(prompt), [(config.model, stages.base, stages.front_of(prompt))]
    if config.teachers:
        readers += [
            (each.name, causal_lm_of(each.model), getattr(each.model, "virtual_tokens", 0))
            for each in stages.distilling.teachers
        ]
    for name, model, front in readers:
        positions = models.positions_of(model)
        if positions is not None and front + longest + config.distill_tokens > positions:
            raise ValueError(
                f"the longest prompt has {longest} tokens, {front} may stand in front and distill_tokens is "
                f"{config.distill_tokens}, but {name} knows {positions} positions; lower distill_tokens or max_length"
            )


def longest_of(splits: Mapping[str, Split]) -> int:
    """Return the number of tokens of the longest sequence."""
    return max(split.tokens.describe()["longest_sequence"] for split in splits.values())


def check_length(base: Any, config: AlignConfig, splits: Mapping[str, Split]) -> None:
    """Raise if a model has fewer positions than the longest sequence with its virtual tokens."""
    positions = models.positions_of(base)
    longest = longest_of(splits)
    if positions is not None and longest + config.virtual_tokens > positions:
        raise ValueError(
            f"the longest sequence has {longest} tokens and the prompt {config.virtual_tokens} virtual ones, but "
            f"{config.model} knows {positions} positions; pass max_length={positions - config.virtual_tokens} or less"
        )
