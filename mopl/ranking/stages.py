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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from mopl import steering
from mopl._counted import counted
from mopl._restoring import seeded
from mopl._tensor_files import read_tensors, write_tensors
from mopl.experiments.cos_dpo import CosDpoStages, Part, model_folders, vertices
from mopl.experiments.driver import Recipe
from mopl.experiments.methods import TABLE, Method
from mopl.experiments.run import FinishedRun, method_folder
from mopl.experiments.run_directory import DONE
from mopl.experiments.stages import AVERAGED, Trained, Training
from mopl.ranking.config import RankConfig
from mopl.ranking.data import RankingData
from mopl.ranking.evaluate import reference_scores, score_items
from mopl.ranking.methods import (
    Batches,
    ConditionedPolicy,
    FixedPolicy,
    ListSource,
    Policy,
    main_loss,
    score_batch,
)
from mopl.ranking.model import RankingModel, RankingModelConfig
from mopl.ranking.transformer import ListTransformer
from mopl.ranking.validation import Validation
from mopl.training.parallel import exists_on_main

REFERENCE = "reference.safetensors"


class Stages(CosDpoStages):
    """Trains the models of one run on its training split."""

    config: RankConfig

    def __init__(self, run: Recipe, data: RankingData, validation: Validation) -> None:
        config, objectives = run.config, tuple(objective.name for objective in data.objectives)
        super().__init__(
            run, objectives, torch.tensor(config.betas(len(objectives))),
            min(config.batch_size, len(data)), score_batch, config.list_loss,
        )  # fmt: skip
        self.data, self.validation = data, validation
        self.reference = torch.zeros(data.num_items)

    def prepare_base(self) -> None:
        """Make `base`, the base model: the given one, or one trained on the main objective."""
        folder, config = self.path / "base", self.config
        if config.base is not None and not exists_on_main(self.accelerator, folder / DONE):
            given = check_base(config.base, self.data)
            self.record(folder, given.save_pretrained, Trained(0, 0.0))

        @contextmanager
        def begin() -> Iterator[Training]:
            settings = config.training(config.base_steps)
            with seeded(config.seed):
                model = ListTransformer(
                    self.data.num_features, config.base_hidden, config.base_layers, config.heads, dropout=config.dropout
                )
            yield Training(
                model, Batches(self.data, config.batch_size, seed=config.seed), main_loss, settings,
                model.save_pretrained, selection=self.validation.of_base(settings.steps),
                figure="main NDCG on validation",
            )  # fmt: skip

        self.train_once("base", folder, begin)
        self.base = ListTransformer.from_pretrained(folder)

    def references(self, splits: dict[str, RankingData]) -> dict[str, Tensor]:
        """Return the base model's scores of every split; they are computed once and kept in the run."""
        file = self.path / REFERENCE
        if not exists_on_main(self.accelerator, file):
            model = self.base.to(self.accelerator.device).eval()
            found = {name: reference_scores(model, split, self.accelerator.device) for name, split in splits.items()}
            if self.accelerator.is_main_process:
                write_tensors(file, found)
            self.accelerator.wait_for_everyone()
        return read_references(file, splits)

    def train_part(self, part: Part) -> Trained:
        """Train one model of a method unless it is there; where `average` is above 1, train its parts and average."""
        config, parts = self.config, self.config.average
        if parts == 1:
            done = self._train_share(part, part.name, part.folder, config.steps or 0, config.seed)
        elif exists_on_main(self.accelerator, part.folder / DONE):
            done = Trained.read(part.folder)
        else:
            done = self._train_average(part)
        if not done.parameters:  # records of earlier versions do not say
            model = untrained(config, self.objectives, self.base, part.method)
            done = dataclasses.replace(done, parameters=model.num_parameters)
        return done

    def _train_share(self, part: Part, name: str, folder: Path, steps: int, order: int) -> Trained:
        """Train a model of a part for `steps`, on lists in the order of a seed."""
        config, conditioned = self.config, part.method.conditioned

        @contextmanager
        def begin() -> Iterator[Training]:
            source = ListSource(
                self.data, config.batch_size, seed=order, reference=self.reference, weights=part.sample_weights,
                beta=part.sample_beta, experts=part.experts, order=config.list_loss.needs_order,
            )  # fmt: skip
            settings = dataclasses.replace(config.training(config.steps), steps=steps)
            selection = self.validation.of_tuned(part.weights, self.beta, steps)
            with seeded(config.seed):  # every model of a method starts from the same parameters
                model = untrained(config, self.objectives, self.base, part.method)
            yield Training(
                model, source, part.loss, settings, (model if conditioned else model.network).save_pretrained,
                selection=selection, figure="auxiliary NDCG on validation",
            )  # fmt: skip

        return self.train_once(name, folder, begin)

    def _train_average(self, part: Part) -> Trained:
        """Train the models that are averaged into one, and record that."""
        config = self.config
        shares = shared_out(config.steps or 0, config.average)
        folders = [part.folder / AVERAGED / str(place + 1) for place in range(config.average)]
        done = [
            self._train_share(part, f"{part.name}, {place + 1} of {len(shares)}", folder, steps,
                              order_of(config.seed, place))
            for place, (folder, steps) in enumerate(zip(folders, shares, strict=True))
        ]  # fmt: skip
        model = untrained(config, self.objectives, self.base, part.method)

        def network(folder: Path) -> ListTransformer:
            if part.method.conditioned:
                return RankingModel.from_pretrained(folder).network
            return ListTransformer.from_pretrained(folder)

        def save(folder: Path) -> None:  # by the main process alone, which then drops the folders that this reads
            states = [network(each).state_dict() for each in folders]
            model.network.load_state_dict(steering.soup(states, [1 / len(states)] * len(states)))
            (model if part.method.conditioned else model.network).save_pretrained(folder)

        whole = Trained(
            *(sum(getattr(each, name) for each in done) for name in ("steps", "seconds", "kept", "limit")),
            parameters=model.num_parameters,
        )
        self.record(part.folder, save, whole)
        self.say(f"{part.name}: the average of {counted(len(done), 'training')}, {counted(whole.steps, 'step')} in all")
        return whole

    def expert_scores(self) -> Tensor:
        """Return the experts' scores (N, m) of the training split."""
        device = self.accelerator.device
        policy = load_policy(self, "dpo-soup", device)
        scorers = [policy.at(w) for w in vertices(len(self.objectives))]
        return torch.stack([score_items(each, self.data, self.reference, device=device) for each in scorers], 1)


def shared_out(steps: int, models: int) -> list[int]:
    """Return the steps of each of some models: as even as can be, `steps` in all, each at least one.

    Raises:
        ValueError: If there are fewer steps than models.
    """
    if steps < models:
        raise ValueError(f"a budget of {steps} steps does not reach for {models} models; take a larger one")
    return [steps // models + (place < steps % models) for place in range(models)]


def order_of(seed: int, place: int) -> int:
    """Return the seed of the order of the lists of a training, by its place among those that are averaged."""
    return seed + 100_003 * place


def read_references(file: Path, splits: dict[str, RankingData]) -> dict[str, Tensor]:
    """Return the base model's scores (N,) of every split, as a run keeps them; errors as `read_tensors`."""
    remedy = "take it from a backup, or delete it: --resume then computes it again"
    return read_tensors(file, {name: (split.num_items,) for name, split in splits.items()}, remedy=remedy)


def untrained(config: RankConfig, objectives: tuple[str, ...], base: ListTransformer, method: Method) -> RankingModel:
    """Return a model that a method of a run trains, as it is before."""
    mixes = method.conditioned and config.conditions_by == "mixture"
    settings = RankingModelConfig(
        base.settings["features"], objectives, config.hidden, config.layers, config.heads, dropout=config.dropout,
        parametrisation=config.parametrisation, conditioned=method.conditioned, takes_beta=method.takes_beta,
        conditioning=config.conditions_by,
        mixture_beta=config.betas(len(objectives)) if mixes and not method.takes_beta else (),
    )  # fmt: skip
    return RankingModel(settings, base)


def load_base(path: str | Path) -> ListTransformer:
    """Return the base model in a folder: of a run, or written by `ListTransformer.save_pretrained`."""
    folder = Path(path)
    return ListTransformer.from_pretrained(folder / "base" if (folder / "base").is_dir() else folder)


def check_base(path: str | Path, data: RankingData) -> ListTransformer:
    """Return the base model in a folder; raise a `ValueError` unless it takes the features of the data."""
    base = load_base(path)
    if base.settings["features"] != data.num_features:
        raise ValueError(
            f"the base model {path} takes {counted(base.settings['features'], 'feature')} but {data.name} has "
            f"{data.num_features}; leave --base out to train one"
        )
    return base


def load_policy(run: Stages | FinishedRun, method: str, device: torch.device | str = "cpu") -> Policy:
    """Return a trained method of a run, with its models on a device."""
    if TABLE[method].conditioned:
        folder = method_folder(run.path, run.config, method)
        return ConditionedPolicy(RankingModel.from_pretrained(folder).to(device))
    template = untrained(run.config, run.objectives, load_base(run.path), TABLE[method]).eval().to(device)
    folders = model_folders(run.path, method, run.grid)
    states = [ListTransformer.from_pretrained(folder).state_dict() for folder in folders]
    return FixedPolicy(template, states, None if TABLE[method].averages else run.grid)
