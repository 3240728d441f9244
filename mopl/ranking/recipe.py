"""`mopl rank` from data to report: base model, methods, fronts, table, picture and page in one run directory.

    config.json        settings, command line, seed, versions, what the data was
    log.jsonl          one line of figures every `log_every` steps
    base/              the base model and its figures
    front.json         the front (under `--method all` in a folder for each method, with that method's model)
    model.safetensors  the conditioned model, `model.json` beside it: `RankingModel.from_pretrained(run)`
    evaluation.json    held-out losses and other figures that `front.json` has no place for
    table.txt, front.png, report.html

See `mopl.ranking.stages` for the models of the baselines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from mopl import _terminal
from mopl._counted import counted
from mopl._restoring import seeded
from mopl.experiments.driver import FREE_ON_RESUME, Measured, Recipe, execute, plain_word
from mopl.experiments.run_directory import RunInterrupted
from mopl.experiments.settings import settings_of
from mopl.experiments.stages import Trained
from mopl.ranking.config import CONDITIONED, RankConfig
from mopl.ranking.data import RankingData
from mopl.ranking.evaluate import check_measurable, distances_to_truth, evaluate, true_front
from mopl.ranking.methods import BasePolicy, Policy
from mopl.ranking.runs import RankingRun, fingerprint, load_splits, save_normalizer
from mopl.ranking.stages import Stages, check_base, load_policy
from mopl.ranking.validation import Validation
from mopl.training.parallel import on_main

__all__ = ["FREE_ON_RESUME", "RunInterrupted", "check_resume", "rank"]


def rank(
    config: RankConfig,
    run: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = _terminal.say,
) -> Path:
    """Train, evaluate and report; everything lands in one run directory.

    Args:
        config: Settings.
        run: The run directory; `runs/rank-<data>-<method>-<n>` with the next free n by default.
        resume: Continue the run that is there, bit for bit as if it had never stopped.
        overwrite: Replace the run that is there, once the data is read and found sound.
        say: Told, in a line, about each stage; on the main process only.

    Returns:
        The run directory.

    Raises:
        FileExistsError: If there is a run and neither `resume` nor `overwrite` is set.
        FileNotFoundError: If there is no run to resume, or no data.
        ImportError: If a package is missing; the message says how to install it.
        ValueError: If a setting or the data is unsound, or a resumed run had other settings or data.
        TrainingDiverged: If a loss is no longer a number.
        RunInterrupted: After Ctrl-C or SIGTERM, once a checkpoint is written.
    """
    return execute(RankingRecipe(config), run, resume=resume, overwrite=overwrite, say=say)


class RankingRecipe(Recipe):
    """What `mopl rank` does in a run."""

    kind = RankingRun.KIND
    finished = RankingRun
    chosen: ClassVar[dict[str, Any]] = dict.fromkeys(("steps", "base_steps", "conditioning"))

    @property
    def stem(self) -> str:
        """What the default name of the run begins with."""
        data = self.config.data
        word = Path(data).name if Path(data).exists() else data.split(":")[0]
        return f"rank-{plain_word(word)}-{self.config.method}"

    def read(self) -> dict[str, Any]:
        """Read and describe the splits, complete the settings, check what can be measured with them.

        Settings that do not go with the named objectives are found first: data may take minutes.
        """
        if named := [name for name in ",".join(self.config.objectives).split(",") if name.strip()]:
            self.config.betas(len(named))
            self.plan(len(named))
        if self.record is None:
            for name, known in settings_of(RankConfig).items():
                value = getattr(self.config, name)
                if known.of_new is not None and value is not None and value < known.of_new:  # allowed once
                    raise ValueError(f"{name} is {value} but must be at least {known.of_new:g}")
        self.splits = self._load()
        train, test = self.splits["train"], self.splits["test"]
        for name, split in self.splits.items():
            whole = f"{split.name}: {counted(len(split), 'query')}, {counted(split.num_items, 'item')}"
            for line in split.describe().split("\n") if name == "train" else [whole]:
                self.say(line)
        if self.config.conditioning is None:
            if self.record is None and set(CONDITIONED) & set(self.config.methods):
                self.say(f"conditioning {self.config.conditions_by}, the default; --conditioning concat is the paper's")
            elif self.record is not None:  # an earlier version took another
                begun = RankingRun.config_of(self.record, self.path).conditioning
                self.config = dataclasses.replace(self.config, conditioning=begun)
        config = self.config = self.config.resolved(len(train))
        self.beta = config.betas(len(train.objectives))
        check_measurable(train, config.measure)
        self.empty_share = check_measurable(test, config.measure)
        self.plan(len(train.objectives))
        if config.base is not None:
            check_base(config.base, train)
        self.description = {
            "name": config.data, "split": "test", "queries": len(test), "items": test.num_items,
            "fingerprint": fingerprint(self.splits),
        }  # fmt: skip
        return {
            **self.description,
            "empty_share": self.empty_share,
            "splits": {name: split.statistics() for name, split in self.splits.items()},
            "objectives": [objective.to_dict() for objective in (train.main, *train.objectives)],
        }

    def _load(self) -> dict[str, RankingData]:
        """Return the splits; one process reads files first, and the others find them in its cache."""
        found: dict[str, RankingData] = {}

        def load() -> None:
            found.update(load_splits(self.config, recorded=self.record is not None))

        on_main(self.accelerator, load)
        if not found:
            load()
        return found

    def prepare(self) -> None:
        """Train the base model, score all splits with it, find the true front of generated data."""
        config, train, test = self.config, self.splits["train"], self.splits["test"]
        validation = Validation(self.splits["valid"], config)
        for note in validation.notes:
            self.say(note)
        self.stages = Stages(self, train, validation)
        self.stages.prepare_base()
        references = self.stages.references(self.splits)
        self.stages.reference = references["train"]
        validation.take_reference(references["valid"])
        self.reference = references["test"]
        self.truth = true_front(test, self.reference, self.grid, self.beta, config.measure)
        if self.accelerator.is_main_process:
            save_normalizer(self.path, train)

    def base(self) -> Measured:
        """Evaluate the base model, which has no trade-off."""
        trained = {"base": Trained.read(self.path / "base")}
        return self._measure("base", BasePolicy(), trained, None, (1.0,))

    def evaluate(self, method: str, folder: Path, trained: dict[str, Trained]) -> Measured:
        """Evaluate a trained method at each trade-off and each distance from the base model."""
        policy = load_policy(self.stages, method, self.accelerator.device)
        return self._measure(method, policy, trained, self.grid, self.config.all_scales)

    def _parameters(self, method: str, trained: list[Trained]) -> tuple[int, int]:
        """Return `Front.parameters` and `Front.inference_parameters`.

        Scores are those of the base model and of a network added up; the experts of mo-dpo end with its training.
        """
        base, added = sum(p.numel() for p in self.stages.base.parameters()), sum(each.parameters for each in trained)
        if method == "base":
            return base, base
        return added, base + (added if method != "mo-dpo" else added // len(trained) * len(self.grid))

    def _measure(
        self, method: str, policy: Policy, trained: dict[str, Trained], weights: Tensor | None, scales: Sequence[float]
    ) -> Measured:
        config, test, truth = self.config, self.splits["test"], self.truth
        with seeded(config.seed):  # ties="random" draws in the held-out losses too
            evaluations = evaluate(
                policy, test, self.reference, weights,
                measure=config.measure, list_loss=config.list_loss, beta=self.beta,
                conditioned_on_beta=method == "temperature-cos-dpo", scales=scales, device=self.accelerator.device,
            )  # fmt: skip
        done = list(trained.values())
        parameters, kept = self._parameters(method, done)
        first = evaluations[0]
        front = self.front(
            method, [(c, each.main, each.auxiliary) for c, each in zip(scales, evaluations, strict=True)], trained,
            objectives=self.stages.objectives, main=test.main.name, weights=weights, data=self.description,
            reference_point=[0.0] * len(self.stages.objectives), parameters=parameters, inference_parameters=kept,
            steps={
                "limit": max(each.limit for each in done), "done": [each.steps for each in done],
                "kept": [each.kept for each in done],
            },
            reference_front=None if weights is None or truth is None else truth.auxiliary,
        )  # fmt: skip
        figures: dict[str, Any] = {
            "weights": None if weights is None else weights.tolist(),
            "loss": config.loss,
            "losses": first.losses.tolist(),
            "metric": config.measure.metric().describe(),
            "empty_share": self.empty_share,
            "trainings": {name: each.to_dict() for name, each in trained.items()},
        }
        if truth is not None:
            figures["true_losses"] = truth.losses.tolist()
            figures["true_auxiliary"] = truth.auxiliary.tolist()
            if weights is not None:
                distances = distances_to_truth(first, test, self.reference, self.beta)
                figures["nats_above_the_optimum"] = distances
                self.say(
                    f"{method}: {sum(distances) / len(distances):.4f} nats above the optimum, mean over the grid; "
                    f"IGD+ to the true front {front.steerability['igd_plus']:.4f}"
                )
        return Measured(front, figures)


check_resume = RankingRecipe.settings_to_resume
