"""`mopl align` from data to report: reference, methods, fronts, answers, table, picture and page in one directory.

    config.json        settings, command line, seed, versions, what the data was
    log.jsonl          one line of figures every `log_every` steps
    reference/         log-probabilities of the reference, with fingerprints of data, tokenizer and model
    base/              the front of the untrained model: one point
    front.json         the front (under `--method all` in a folder for each method, with that method's model)
    model/             adapters, prompt and `mopl.json`: `mopl.alignment.open_run(run).load()`
    evaluation.json    held-out losses, accuracies and deviations that `front.json` has no place for
    samples.json       answers to held-out prompts at every point of the grid
    table.txt, front.png, report.html

See `mopl.alignment.stages` for the models of the baselines.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mopl import _terminal
from mopl._counted import counted
from mopl._restoring import seeded
from mopl.alignment import tuned
from mopl.alignment.config import AlignConfig
from mopl.alignment.evaluate import MAIN, Evaluation, HeldOut, evaluation_of, reference_point
from mopl.alignment.runs import AlignmentRun
from mopl.alignment.stages import Split, Stages, check_room_for_answers, response_loss
from mopl.alignment.trained import load_trained, set_weights
from mopl.conditioning import weights_name
from mopl.experiments.driver import FREE_ON_RESUME as FREE_IN_EVERY_RUN
from mopl.experiments.driver import Measured, Recipe, execute, plain_word
from mopl.experiments.methods import TABLE
from mopl.experiments.run import BASE
from mopl.experiments.run_directory import RunInterrupted
from mopl.experiments.stages import Trained
from mopl.language_models import models
from mopl.language_models.data import PreferenceData, Text
from mopl.language_models.generate import generate
from mopl.language_models.readers import load_preferences
from mopl.language_models.scoring import score_lists
from mopl.language_models.tokenization import tokenize
from mopl.training import make_accelerator

__all__ = ["FREE_ON_RESUME", "RunInterrupted", "align", "answers", "check_resume", "evaluate", "load_data"]

FREE_ON_RESUME = (*FREE_IN_EVERY_RUN, "reference_store")


def align(
    config: AlignConfig,
    run: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = _terminal.say,
) -> Path:
    """Train, evaluate and report; everything lands in one run directory.

    Args:
        config: Settings.
        run: The run directory; `runs/align-<data>-<method>-<n>` with the next free n by default.
        resume: Continue the run that is there, bit for bit as if it had never stopped.
        overwrite: Replace the run that is there, once data and model are read and found sound.
        say: Told, in a line, about each stage; on the main process only.

    Returns:
        The run directory.

    Raises:
        FileExistsError: If there is a run and neither `resume` nor `overwrite` is set.
        FileNotFoundError: If there is no run to resume, or no data.
        ImportError: If a package is missing; the message says how to install it.
        ValueError: If a setting or the data is unsound, or a resumed run had other settings, data or another model.
        TrainingDiverged: If a loss is no longer a number.
        RunInterrupted: After Ctrl-C or SIGTERM, once a checkpoint is written.
    """
    return execute(AlignmentRecipe(config), run, resume=resume, overwrite=overwrite, say=say)


class AlignmentRecipe(Recipe):
    """What `mopl align` does in a run."""

    kind = AlignmentRun.KIND
    finished = AlignmentRun
    free = FREE_ON_RESUME
    chosen: ClassVar[dict[str, Any]] = {"reference": "auto"} | dict.fromkeys(
        ("steps", "warmup", "prompt_learning_rate")
    )
    fingerprints: ClassVar[dict[str, str]] = {"fingerprint": "data", "tokens": "tokenizer"}

    @property
    def packages(self) -> tuple[str, ...]:
        """PEFT, where there are adapters."""
        return ("peft",) * (self.config.lora_rank > 0)

    @property
    def stem(self) -> str:
        """What the default name of the run begins with."""
        return f"align-{_data_word(self.config)}-{self.config.method}"

    def make_accelerator(self) -> Any:
        """Return the `Accelerator` of the run."""
        config = self.config
        return make_accelerator(config.mixed_precision, cpu=config.device == "cpu")

    def read(self) -> dict[str, Any]:
        """Read, describe and tokenise the data, complete the settings, check what they ask of it.

        A model that is not there, or settings that do not go with the named objectives, are found first: data may take
        minutes.
        """
        tokenizer = self.config.load_tokenizer()
        named = self.config.objectives
        if named and not any(re.search(r"[,;\s]", name) for name in named):  # in one word, which reading the data says
            self._check_counts(self.config, named)
        data = load_data(self.config)
        for line in _describe_data(data):
            self.say(line)
        config = self.config = self.config.resolved(len(data["train"]))
        objectives = data["train"].objectives
        self._check_counts(config, objectives)
        response_loss(config, data["train"])
        self.tokenizer = config.list_tokenizer(tokenizer)
        self.splits = splits = {}
        for name, part in data.items():
            splits[name] = Split(part, tokenize(part, self.tokenizer, on_error=config.on_error))
            self.say(_describe_tokens(name, splits[name]))
        return {
            "objectives": list(objectives),
            "fingerprint": "-".join(split.data.fingerprint()[:32] for split in splits.values()),
            "tokens": "-".join(split.tokens.fingerprint()[:32] for split in splits.values()),
            "splits": {name: {**split.data.describe(), **split.tokens.describe()} for name, split in splits.items()},
        }

    def _check_counts(self, config: AlignConfig, objectives: Sequence[str]) -> None:
        """Plan for these objectives; raise unless the settings that have an entry for each have so many."""
        m = len(objectives)
        config.betas(m)
        config.check_teachers(objectives)
        self.reference_point = config.for_each("reference_point", m)
        self.plan(m)

    def load(self) -> None:
        """Load the model: most mistakes in settings show here."""
        self.stages = Stages(self, self.splits, self.tokenizer)
        self.stages.check(begins=self.record is None)
        if self.config.teachers:
            self._remember_teachers()
        if self.config.distill_on_policy:
            check_room_for_answers(self.stages)

    def _remember_teachers(self) -> None:
        """Load the teachers, and let `config.json` remember which they were; raise if they are others than it says.

        Raises:
            ValueError: If a resumed run would find another teacher, or one cannot be a teacher here.
        """
        found = [teacher.identity() for teacher in self.stages.distilling.teachers]
        known = found if self.record is None else self.record["data"].get("teachers", found)
        for name, one, other in zip(self.config.teachers, found, known, strict=True):
            if one != other:
                parts = ", ".join(key for key in one if one[key] != other.get(key))
                raise ValueError(
                    f"the teacher {name} is another model than when {self.path} began ({parts} differ); put that one "
                    "back, or start another run"
                )
        self.data["teachers"] = found

    def prepare(self) -> None:
        """Score the lists with the reference, and choose the prompts of samples."""
        stages = self.stages
        stages.prepare_references()
        reference = stages.references["test"]
        assert reference is not None
        lists = stages.splits["test"].tokens.lists
        self.held_out = HeldOut(lists, stages.collator, stages.loss, stages.beta, reference, stages.objectives)
        self.untrained = evaluation_of(None, [self.held_out.figures(reference.values)])
        self.reference_point = self.reference_point or reference_point(self.untrained)
        self.prompts = _sample_prompts(stages)

    def base(self) -> Measured:
        """Evaluate the model before training, which is the reference or what training starts from."""
        return self._measured(BASE, self.path / BASE, [self.untrained], {})

    def evaluate(self, method: str, folder: Path, trained: dict[str, Trained]) -> Measured:
        """Evaluate a trained method on held-out lists, and let it answer prompts."""
        many = f"{counted(len(self.grid), 'trade-off')} on {counted(len(self.held_out.lists), 'list')}"
        self.say(f"{method}: evaluating {many}")
        found = evaluate(self.stages, method, folder, self.grid, self.held_out)
        return self._measured(method, folder, found, trained)

    def _measured(self, method: str, folder: Path, found: list[Evaluation], trained: dict[str, Trained]) -> Measured:
        config, stages, lists = self.config, self.stages, len(self.held_out.lists)
        samples = answers(stages, method, folder, self.grid, self.prompts)
        kept = sum(each.parameters for each in trained.values())
        if method == "mo-dpo":  # m experts and as large a model for each trade-off, which alone are asked
            kept = kept // (len(stages.objectives) + len(self.grid)) * len(self.grid)
        elif method in trained:  # one model, whose experts taught it and are not asked
            kept = trained[method].parameters
        front = self.front(
            method, [(c, each.deviation, each.losses) for c, each in zip(config.all_scales, found, strict=False)],
            trained, objectives=stages.objectives, main=MAIN, weights=found[0].weights, maximise=False,
            reference_point=self.reference_point,
            data={"name": _data_word(config), "split": "test", "lists": lists, **self.data},
            notes=found[0].notes(stages.objectives), measures=found[0].measures(),
            inference_parameters=sum(p.numel() for p in stages.base.parameters()) + kept,
        )  # fmt: skip
        figures = {"loss": config.loss, "beta": stages.beta.tolist(), **found[0].summary(stages.objectives)}
        if found[0].divergence is not None:
            figures["distillation"] = {
                "teachers": list(config.teachers) or "experts", "beta": config.distill_beta,
                "temperature": config.distill_temperature, "divergence": found[0].divergence.tolist(),
                "base_divergence": None if (own := found[0].base_divergence) is None else own.tolist(),
            }  # fmt: skip
            self.say(f"mean divergence to the teachers of {', '.join(stages.objectives)}, in nats")
            for w, row in zip(self.grid.tolist(), found[0].divergence.tolist(), strict=True):
                self.say(f"  {weights_name(w)}: {', '.join(f'{value:.4f}' for value in row)}")
            if own is not None:
                self.say(f"  base: {', '.join(f'{value:.4f}' for value in own.tolist())}")
        return Measured(front, figures, [{**entry, "method": method} for entry in samples])


check_resume = AlignmentRecipe.settings_to_resume


def load_data(config: AlignConfig) -> dict[str, PreferenceData]:
    """Return the training and the held-out lists of a run."""
    data = load_preferences(
        config.data, format=config.format, objectives=config.objectives or None, on_error=config.on_error,
        split=config.split, limit=config.limit,
    )  # fmt: skip
    train, test = data.split(config.held_out, seed=config.data_seed)
    return {"train": train, "test": test}


def evaluate(stages: Stages, method: str, folder: Path, grid: Tensor, held_out: HeldOut) -> list[Evaluation]:
    """Return the held-out figures of a trained method at each trade-off of the grid, one evaluation for each scale."""
    config, scales = stages.config, stages.config.all_scales
    columns: list[list[tuple[Tensor, ...]]] = [[] for _ in scales]
    to_teachers: list[Tensor] = []
    for w, model in _models(stages, method, folder, grid):
        more: dict[str, Any] = {}
        if TABLE[method].distils:
            score = stages.distilling.score(held_out.lists, stages.collator, w, stages.beta)
            more = {"score": score, "columns": 1 + len(stages.objectives)}
        flat = score_lists(
            model, held_out.lists, collator=stages.collator, tokens_per_batch=config.tokens_per_batch,
            accelerator=stages.accelerator, weights=w, beta=stages.beta, conditioner=stages.conditioner(TABLE[method]),
            **more,
        )  # fmt: skip
        if more:
            to_teachers.append(flat[:, 1:].double().mean(0))
            flat = flat[:, 0].contiguous()
        if TABLE[method].takes_beta:
            # Equation (15): the network answers for β / ‖β‖₁.
            base = held_out.reference.values
            flat = base + (flat - base) / stages.beta.sum()
        for column, scale in zip(columns, scales, strict=True):
            with seeded(config.seed):  # ties="random" draws in the held-out losses too
                column.append(held_out.figures(flat, scale))
    found = [evaluation_of(grid, column) for column in columns]
    if to_teachers:  # of the student itself, at no distance from it
        plain = score_lists(
            stages.base.to(stages.accelerator.device).eval(), held_out.lists, collator=stages.collator,
            tokens_per_batch=config.tokens_per_batch, accelerator=stages.accelerator,
            columns=1 + len(stages.objectives),
            score=stages.distilling.score(held_out.lists, stages.collator, grid[0], stages.beta),
        )  # fmt: skip
        found[0] = dataclasses.replace(
            found[0], divergence=torch.stack(to_teachers), base_divergence=plain[:, 1:].double().mean(0)
        )
    return found


def _models(stages: Stages, method: str, folder: Path, grid: Tensor) -> Iterator[tuple[Tensor, Any]]:
    """Yield each trade-off of the grid with the model that answers for it, on the accelerator's device."""
    model = load_trained(stages.path, folder, method, grid, stages.base)
    try:
        model.to(stages.accelerator.device).eval()
        for w in grid:
            if not TABLE[method].conditioned:
                set_weights(model, stages.path, method, grid, w)
            yield w, model
    finally:
        models.release(model)


def answers(stages: Stages, method: str, folder: Path, grid: Tensor, prompts: list[Text]) -> list[dict[str, Any]]:
    """Return greedy answers to prompts: `{"prompt", "responses": [a text for each trade-off]}`; one for the base."""
    config, found = stages.config, []
    if prompts and stages.accelerator.is_main_process:
        options: dict[str, Any] = {"max_new_tokens": config.sample_tokens, "batch_size": 8}
        asked: Iterable[tuple[Any, Any]] = [(None, stages.base)]
        if method != BASE:
            asked = ((w.tolist(), model) for w, model in _models(stages, method, folder, grid))
            options["text_prompt"] = tuned.prompt_of(config, TABLE[method], stages.objectives)
            if TABLE[method].takes_beta:
                options["beta"] = stages.beta.tolist()
        found = [generate(model, stages.tokenizer, prompts, w, **options) for w, model in asked]
    stages.accelerator.wait_for_everyone()
    return [
        {"prompt": _as_text(prompt), "responses": [each[number].text for each in found]}
        for number, prompt in enumerate(prompts)
    ]


def _as_text(prompt: Text) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message.get('content', '')}" for message in prompt)


def _sample_prompts(stages: Stages) -> list[Text]:
    """Return the first different prompts of held-out data, a random choice already, that leave room for an answer."""
    config, positions = stages.config, models.positions_of(stages.base)
    prompts: dict[str, Text] = {}
    test = stages.splits["test"]
    for item in (test.data[row.index] for row in test.tokens):  # lists that could not be tokenised are not there
        if len(prompts) == config.samples:
            break
        tokens = stages.tokenizer.prompt_tokens(item.prompt).tolist()
        if positions is None or stages.front_of(tokens) + len(tokens) + config.sample_tokens <= positions:
            prompts.setdefault(_as_text(item.prompt), item.prompt)
    if config.samples and not prompts:
        stages.say(f"no held-out prompt leaves room for {config.sample_tokens} tokens: there are no samples")
    return list(prompts.values())


def _describe_data(data: dict[str, PreferenceData]) -> Iterator[str]:
    for name, part in data.items():
        counts = part.describe()
        sizes = ", ".join(f"{count} of {size}" for size, count in counts["list_sizes"].items())
        labelled = ", ".join(
            objective + (f" ({n['missing']} without labels)" if n["missing"] else "")
            + (f" ({n['partial']} partly labelled)" if n["partial"] else "")
            for objective, n in counts["objectives"].items()
        )  # fmt: skip
        yield f"{name}: {counted(counts['lists'], 'list')} ({sizes} responses); objectives {labelled}"


def _describe_tokens(name: str, split: Split) -> str:
    counts = split.tokens.describe()
    cut = f"; {counts['prompts_cut']} prompts and {counts['responses_cut']} responses cut to max_length"
    return (
        f"{name}: {counts['tokens']:,} tokens, longest sequence {counts['longest_sequence']}"
        + (cut if counts["prompts_cut"] + counts["responses_cut"] else "")
    )  # fmt: skip


def _data_word(config: AlignConfig) -> str:
    """Return a short name of the data for the name of the run."""
    word = Path(config.data).name.split(".")[0] if Path(config.data).exists() else config.data.split("/")[-1]
    return plain_word(word)
