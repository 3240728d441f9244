"""The trainings of a run, one folder each: what is finished is loaded, what was interrupted is continued.

    base/                     the base model
    reference.safetensors     its scores of every split, which never change
    models/w-0.25-0.75/       the network trained for these weights; the experts are those at the vertices
    models/modpo-0.25-0.75/   the same for MO-DPO
    <method folder>/          the conditioned model of COS-DPO: the run itself, or a folder each under `--method all`

Each holds `model.safetensors`, `model.json` and, written last, `training.json` with steps, seconds and the step that
was kept; until then it holds `checkpoints/`, which are dropped at the end.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mopl._extras import require
from mopl._files import discard_folder, write_file
from mopl._restoring import seeded
from mopl._tensor_files import read_tensors
from mopl.conditioning.samplers import box_betas, dirichlet_weights, fixed
from mopl.experiments.run_directory import DONE, read_done
from mopl.ranking.batches import Batches
from mopl.ranking.config import RankConfig
from mopl.ranking.data import RankingData
from mopl.ranking.evaluate import reference_scores, score_items
from mopl.ranking.methods import (
    ConditionedPolicy,
    GridPolicy,
    ListSource,
    Policy,
    SoupPolicy,
    main_loss,
    modpo_loss,
    scalarized_loss,
)
from mopl.ranking.model import ListTransformer, RankingModel, RankingModelConfig
from mopl.ranking.validation import Validation, corners_and_centre
from mopl.training import BatchSource, RunLog, Selection, TrainingConfig, train
from mopl.training.parallel import exists_on_main

REFERENCE = "reference.safetensors"


def vector_name(weights: Sequence[float] | Tensor) -> str:
    """Return weights as a part of a folder's name: `0.25-0.75`."""
    return "-".join(f"{float(w):.4g}" for w in weights)


@dataclass(frozen=True)
class Trained:
    """What `training.json` holds of one training.

    Attributes:
        steps: Steps that were done, of at most `limit`.
        seconds: Seconds of all its parts, validation included.
        kept: The step whose model was kept.
        limit: Steps that were asked for.
        validation: The best figure on validation data, see `mopl.ranking.validation`; None where none was taken.
    """

    steps: int
    seconds: float
    kept: int
    limit: int
    validation: float | None = None

    @classmethod
    def read(cls, folder: Path) -> Trained:
        """Read it from a folder; runs of versions without validation hold steps and seconds alone.

        Raises:
            DamagedFile: If something else is there; the message names the key.
        """
        found = read_done(folder / DONE)
        known = {name: found[name] for name in cls.__dataclass_fields__ if name in found}
        return cls(**{"kept": found["steps"], "limit": found["steps"], **known})

    def describe(self, name: str) -> str:
        """Return it as a line."""
        line = f"{name}: {self.steps} steps in {self.seconds:.1f} s"
        if self.validation is None:
            return line
        of = "main" if name == "base" else "auxiliary"  # the two figures are not to be compared
        kept = f"{line}; kept step {self.kept} of {self.limit} ({of} NDCG on validation {self.validation:.4f})"
        waited = self.steps - self.kept
        return kept + (f", stopped at {self.steps}: no better for {waited} steps" if self.steps < self.limit else "")


class Stages:
    """Trains the models of one run.

    Args:
        path: The run directory.
        config: Settings of the run.
        data: The training split.
        validation: How trainings are validated.
        accelerator: accelerate's `Accelerator`.
        log: The log of the run.
        say: Told, in a line, about each stage.
    """

    def __init__(
        self,
        path: Path,
        config: RankConfig,
        data: RankingData,
        validation: Validation,
        accelerator: Any,
        log: RunLog,
        say: Callable[[str], None],
    ) -> None:
        self.path, self.config, self.data, self.log, self.say = path, config, data, log, say
        self.accelerator, self.validation = accelerator, validation
        self.objectives = tuple(objective.name for objective in data.objectives)
        self.temperature = torch.tensor(config.betas(len(self.objectives)))
        self.reference = torch.zeros(data.num_items)

    def base_model(self) -> ListTransformer:
        """Return the base model: the given one, or one trained on the main objective."""
        folder, config = self.path / "base", self.config
        if config.base is not None and not exists_on_main(self.accelerator, folder / DONE):
            self._finish(folder, check_base(config.base, self.data), Trained(0, 0.0, 0, 0))
        if not exists_on_main(self.accelerator, folder / DONE):
            source = Batches(self.data, config.batch_size, seed=config.seed)
            settings = config.training(config.base_steps)

            def build() -> ListTransformer:
                return ListTransformer(
                    self.data.num_features, config.base_hidden, config.base_layers, config.heads, dropout=config.dropout
                )

            self._fit("base", folder, build, source, main_loss, settings, self.validation.of_base(settings.steps))
        return ListTransformer.from_pretrained(folder)

    def references(self, base: ListTransformer, splits: dict[str, RankingData]) -> dict[str, Tensor]:
        """Return the base model's scores of every split; they are computed once and kept in the run."""
        require("safetensors", extra="demo")
        from safetensors.torch import save_file

        file = self.path / REFERENCE
        if not exists_on_main(self.accelerator, file):
            model = base.to(self.accelerator.device).eval()
            found = {name: reference_scores(model, split, self.accelerator.device) for name, split in splits.items()}
            if self.accelerator.is_main_process:
                write_file(file, lambda path: save_file(found, str(path)))
            self.accelerator.wait_for_everyone()
        return read_references(file, splits)

    def train_method(
        self, method: str, folder: Path, base: ListTransformer, grid: Tensor
    ) -> tuple[dict[str, Trained], int]:
        """Train what a method needs; return its trainings by name and its number of parameters."""
        if method in ("weight-cos-dpo", "temperature-cos-dpo"):
            trained = {method: self._conditioned(method, folder, base)}
            return trained, RankingModel.from_pretrained(folder).num_parameters
        done: dict[str, Trained] = {}
        vertices = torch.eye(len(self.objectives), dtype=torch.float64)
        # dpo-ls takes its vertices from the grid
        done |= dict(self._network(w, base) for w in (grid if method == "dpo-ls" else vertices))
        if method == "mo-dpo":
            experts = self._expert_scores(base)
            done |= dict(self._network(w, base, experts) for w in grid)
        size = sum(p.numel() for p in self._fixed_model(base).network.parameters())
        return done, len(done) * size

    def _conditioned(self, method: str, folder: Path, base: ListTransformer) -> Trained:
        """Train the one model of a COS-DPO method."""
        config, m = self.config, len(self.objectives)
        takes_temperature = method == "temperature-cos-dpo"
        batch_size = Batches(self.data, config.batch_size).batch_size
        per: dict[str, Any] = {"per": config.weights_per, "seed": config.seed}
        if takes_temperature:
            low, high = ((factor * self.temperature).tolist() for factor in config.beta_range)
            temperature = box_betas(m, batch_size, low=low, high=high, **per)
        else:
            temperature = fixed(self.temperature, batch_size)
        source = self._source(dirichlet_weights(m, batch_size, concentration=config.concentration, **per), temperature)
        common = None if takes_temperature else self._common_temperature()
        loss = scalarized_loss(
            config.list_loss, self.objectives, penalty=config.penalty, penalty_sign=config.penalty_sign,
            common_temperature=common,
        )  # fmt: skip

        def build() -> RankingModel:
            settings = self._model_config(conditioned=True, temperature=takes_temperature)
            return RankingModel(settings, base)

        settings = config.training(config.steps)
        selection = self.validation.of_tuned(corners_and_centre(m), self.temperature, settings.steps)
        return self._fit(method, folder, build, source, loss, settings, selection)

    def _network(self, weights: Tensor, base: ListTransformer, experts: Tensor | None = None) -> tuple[str, Trained]:
        """Train a network for fixed weights: DPO on their sum, or MO-DPO where experts are given."""
        kind = "w" if experts is None else "modpo"
        folder = self.path / "models" / f"{kind}-{vector_name(weights)}"
        batch_size = Batches(self.data, self.config.batch_size).batch_size
        source = self._source(fixed(weights, batch_size), fixed(self.temperature, batch_size), experts)
        if experts is None:
            loss = scalarized_loss(
                self.config.list_loss, self.objectives, common_temperature=self._common_temperature()
            )
        else:
            anchor = int(weights.argmax())
            loss = modpo_loss(self.config.list_loss, anchor, self.objectives[anchor])
        name, settings = f"{kind} {vector_name(weights)}", self.config.training(self.config.steps)
        selection = self.validation.of_tuned(weights[None], self.temperature, settings.steps)
        return name, self._fit(
            name, folder, lambda: self._fixed_model(base), source, loss, settings, selection, part="network"
        )

    def _expert_scores(self, base: ListTransformer) -> Tensor:
        """Return the experts' scores (N, m) of the training split."""
        template = self._fixed_model(base).to(self.accelerator.device).eval()
        columns = []
        for w in torch.eye(len(self.objectives)):
            state = network_state(self.path / "models" / f"w-{vector_name(w)}")
            policy = GridPolicy(template, w[None].double(), [state])
            columns.append(score_items(policy.at(w), self.data, self.reference, device=self.accelerator.device))
        return torch.stack(columns, 1)

    def _fixed_model(self, base: ListTransformer) -> RankingModel:
        return RankingModel(self._model_config(conditioned=False), base)

    def _model_config(self, **changes: Any) -> RankingModelConfig:
        return model_config(self.config, self.data.num_features, self.objectives, **changes)

    def _source(self, weights: Any, temperature: Any, experts: Tensor | None = None) -> ListSource:
        return ListSource(
            self.data, self.config.batch_size, seed=self.config.seed, reference=self.reference, weights=weights,
            temperature=temperature, experts=experts, order=self.config.list_loss.needs_order,
        )  # fmt: skip

    def _common_temperature(self) -> float | None:
        values = set(self.temperature.tolist())
        return values.pop() if len(values) == 1 else None

    def _fit(
        self,
        name: str,
        folder: Path,
        build: Callable[[], nn.Module],
        source: BatchSource,
        loss: Any,
        settings: TrainingConfig,
        selection: Selection | None,
        part: str | None = None,
    ) -> Trained:
        """Train and save a model unless it is there; return how that went, interruptions left out."""
        if exists_on_main(self.accelerator, folder / DONE):
            return Trained.read(folder)
        with seeded(self.config.seed):  # every model of a method starts from the same parameters
            model = build()
        result = train(
            model, source, loss, settings,
            accelerator=self.accelerator, directory=folder / "checkpoints", resume=True, log=self.log, stage=name,
            selection=selection,
        )  # fmt: skip
        done = Trained(result.steps, result.seconds, result.steps, settings.steps)
        if selection is not None and result.kept is not None:
            done = dataclasses.replace(done, kept=result.kept, validation=selection.best)
        self._finish(folder, getattr(model, part) if part else model, done)
        self.say(done.describe(name))
        return done

    def _finish(self, folder: Path, model: Any, done: Trained) -> None:
        if self.accelerator.is_main_process:
            model.save_pretrained(folder)
            write_file(folder / DONE, json.dumps(dataclasses.asdict(done), indent=2) + "\n")
            if (folder / "checkpoints").exists():
                discard_folder(folder / "checkpoints")
        self.accelerator.wait_for_everyone()


def read_references(file: Path, splits: dict[str, RankingData]) -> dict[str, Tensor]:
    """Return the base model's scores (N,) of every split, as a run keeps them.

    Raises:
        DamagedFile: If the file is damaged, or has other splits or other numbers of items.
    """
    remedy = "take it from a backup, or delete it: --resume then computes it again"
    return read_tensors(file, {name: (split.num_items,) for name, split in splits.items()}, remedy=remedy)


def model_config(config: RankConfig, features: int, objectives: tuple[str, ...], **changes: Any) -> RankingModelConfig:
    """Return the settings of a tuned model of a run."""
    return RankingModelConfig(
        features, objectives, config.hidden, config.layers, config.heads, dropout=config.dropout,
        parametrisation=config.parametrisation, **changes,
    )  # fmt: skip


def load_base(path: str | Path) -> ListTransformer:
    """Return the base model in a folder: of a run, or written by `ListTransformer.save_pretrained`.

    Raises:
        FileNotFoundError: If there is none.
    """
    folder = Path(path)
    return ListTransformer.from_pretrained(folder / "base" if (folder / "base").is_dir() else folder)


def check_base(path: str | Path, data: RankingData) -> ListTransformer:
    """Return the base model in a folder; raise unless it fits the data.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it takes another number of features.
    """
    base = load_base(path)
    if base.settings["features"] != data.num_features:
        raise ValueError(
            f"the base model {path} takes {base.settings['features']} features but {data.name} has "
            f"{data.num_features}; leave --base out to train one"
        )
    return base


def network_state(folder: Path) -> dict[str, Tensor]:
    """Return the parameters of a network that was trained for fixed weights."""
    return ListTransformer.from_pretrained(folder).state_dict()


def load_policy(
    path: Path,
    folder: Path,
    method: str,
    config: RankConfig,
    objectives: tuple[str, ...],
    grid: Tensor,
    device: torch.device | str = "cpu",
) -> Policy:
    """Return a trained method of a run.

    Args:
        path: The run.
        folder: The method's folder in it.
        method: Name of the method.
        config: Settings of the run.
        objectives: Names of the objectives.
        grid: (n, m) weights of the run's grid.
        device: Where its models go.
    """
    if method in ("weight-cos-dpo", "temperature-cos-dpo"):
        return ConditionedPolicy(RankingModel.from_pretrained(folder).to(device))
    base = load_base(path)
    settings = model_config(config, base.settings["features"], objectives, conditioned=False)
    template = RankingModel(settings, base).eval().to(device)
    if method == "dpo-soup":
        vertices = torch.eye(len(objectives), dtype=torch.float64)
        return SoupPolicy(template, [network_state(path / "models" / f"w-{vector_name(w)}") for w in vertices])
    kind = "w" if method == "dpo-ls" else "modpo"
    return GridPolicy(template, grid, [network_state(path / "models" / f"{kind}-{vector_name(w)}") for w in grid])
