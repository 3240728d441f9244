"""The trainings of a run, one folder each: what is finished is loaded, what was interrupted is continued.

    model/                      the policy of clp or of prompting (in a folder for each method under clp-all)
    models/expert-<reward>/     the experts, for soups and for mixing at decoding
    <method folder>/model/      the soup: the experts as sets of one mixture

A finished folder holds the model and, written last, `training.json`; until then `checkpoints/`, which are dropped at
the end, and with several epochs `rollouts/`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mopl.clp.config import ALL, ClpConfig
from mopl.clp.loss import ClpLoss, Guard, size_of
from mopl.clp.policies import Policy, load_policy, new_policy, release, save_soup
from mopl.clp.prompts import Prompts, PromptSource
from mopl.clp.rollout import RolloutStore, Sampler
from mopl.experiments.driver import Recipe
from mopl.experiments.run import FRONT, method_folder
from mopl.experiments.run_directory import DONE
from mopl.experiments.stages import CHECKPOINTS, ROLLOUTS, RunStages, Trained, Training
from mopl.rewards import Rewards
from mopl.rewards.scale import RewardScale, RunningScale
from mopl.training import CheckpointFolder, RunLog, TrainingResult
from mopl.training.optimizer import adamw
from mopl.training.parallel import exists_on_main, on_main

if TYPE_CHECKING:
    from mopl.clp.server_rollouts import ServerAnswers


def expert_folder(path: Path, objective: str) -> Path:
    """Return where the expert of a reward is."""
    return path / "models" / ("expert-" + "".join(c if c.isalnum() or c in "._" else "-" for c in objective))


class Stages(RunStages):
    """Trains and loads the policies of one run.

    Args:
        run: The run.
        prompts: `"train"` and `"test"`.
        base: The fused, frozen language model, on the accelerator's device.
        sampler: Samples and scores.
        rewards: The m rewards.
    """

    config: ClpConfig
    server: ServerAnswers | None = None  # samples the answers of trainings in the policy's place

    def __init__(self, run: Recipe, prompts: dict[str, Prompts], base: Any, sampler: Sampler, rewards: Rewards) -> None:
        super().__init__(run)
        self.prompts, self.base, self.sampler, self.rewards = prompts, base, sampler, rewards
        self.objectives = rewards.names
        self.scale = RewardScale(torch.zeros(len(rewards)), torch.ones(len(rewards)))  # replaced by the recipe

    @property
    def clp_folder(self) -> Path:
        """Where the policy of clp is."""
        return self.path / "clp" if self.config.method == ALL else self.path

    def train(self, method: str, folder: Path) -> dict[str, Trained]:
        """Train what a method needs; return its trainings by name."""
        done = {name: self._policy(name, *each) for name, each in self._trainings(method, folder).items()}
        if method == "rewarded-soups" and not exists_on_main(self.accelerator, folder / "model" / DONE):

            def save(target: Path) -> None:
                experts = [expert_folder(self.path, name) for name in self.objectives]
                save_soup(experts, target, self.base, self.config, self.objectives)

            self.record(folder / "model", save, Trained(0, 0.0))
        return done

    def _trainings(self, method: str, folder: Path) -> dict[str, tuple[Path, str, str | None]]:
        """Return what a method needs: by name the folder of each training, its kind of policy, the reward of an expert.

        Args:
            method: The method.
            folder: Where it has its front.
        """
        if method in ("clp", "dera"):  # DeRa moves the policy of clp
            return {"clp": (self.clp_folder / "model", "clp", None)}
        if method == "prompting":
            return {method: (folder / "model", method, None)}
        return {f"expert {name}": (expert_folder(self.path, name), "expert", name) for name in self.objectives}

    def connect(self, *, resumed: bool) -> None:
        """Find the server of the run, if there is one and anything is left to train, and ask it for a first answer.

        Args:
            resumed: Whether what lies in the run directory is of this run.

        Raises:
            RolloutServerError: If it does not answer as it must.
            ValueError: If it cannot load such policies.
        """
        config = self.config
        if config.rollout_server is None:
            return

        def left() -> dict[str, str | None]:
            found = {}
            for method in config.methods:
                folder = method_folder(self.path, config, method)
                for place, kind, expert in self._trainings(method, folder).values():
                    if not resumed or not ((folder / FRONT).exists() or (place / DONE).exists()):
                        found[kind] = expert
            return found

        if not (kinds := on_main(self.accelerator, left)):
            return
        from mopl.clp.server_rollouts import ServerAnswers  # which needs a package

        self.server = ServerAnswers(config, self.sampler, self.accelerator)
        untrained = [partial(self._untrained, kind, expert) for kind, expert in kinds.items()]
        self.server.check(untrained, max(self.prompts["train"].tokens, key=len))

    @contextmanager
    def _untrained(self, kind: str, expert: str | None) -> Iterator[Policy]:
        policy = new_policy(self.base, self.config, self.objectives, kind, expert)
        try:
            yield policy.to(self.accelerator.device)
        finally:
            release(policy)

    def _policy(self, name: str, folder: Path, kind: str, expert: str | None = None) -> Trained:
        """Train a policy unless it is there; `expert` names the reward of one."""
        config, m = self.config, len(self.objectives)
        source = PromptSource(
            self.prompts["train"], config, m, trade_offs=config.trade_offs_of(kind, m),
            fixed=None if expert is None else torch.eye(m)[self.objectives.index(expert)],
        )  # fmt: skip

        @contextmanager
        def begin() -> Iterator[Training]:
            with self._untrained(kind, expert) as policy:
                yield training_of(policy)

        def training_of(policy: Policy) -> Training:
            if config.normalize == "running":
                policy.running = RunningScale(self.scale, config.normalize_decay).to(self.accelerator.device)
            checkpoints, settings = folder / CHECKPOINTS, config.training()
            samples = RunLog(self.path, enabled=self.accelerator.is_main_process)
            samples.path = self.path / "samples.jsonl"
            latest = CheckpointFolder(checkpoints).latest()
            samples.rewind(name, latest.step if latest else 0)
            guard = Guard(config, name, checkpoints, size_of(policy.model))
            loss = ClpLoss(
                config, self.sampler, self.rewards, self.scale,
                RolloutStore(folder / ROLLOUTS, config.epochs, checkpoints), guard,
                samples if config.log_samples else None, name, None if self.server is None else self.server.of(name),
            )  # fmt: skip

            def ended(result: TrainingResult) -> dict[str, Any]:
                guard.check_size(policy.model, result.steps)  # no rollout has seen the last update
                scale = policy.running
                if scale is None:
                    return {}
                return {"mean": tuple(scale.mean.tolist()), "deviation": tuple(scale.deviation.tolist())}

            return Training(
                policy, source, loss, settings, policy.model.save_pretrained,
                optimizer=adamw(policy, settings, self.accelerator.device, {"value.": config.value_learning_rate}),
                save_frozen=False, ended=ended,
            )  # fmt: skip

        return self.train_once(name, folder, begin)

    # ------------------------------------------------------------ trained policies

    @contextmanager
    def policy(self, kind: str, folder: Path) -> Iterator[Policy]:
        """Give the trained policy in a folder inside a `with` block; its kind is as in `load_policy`."""
        policy = load_policy(folder, self.base, self.config, self.objectives, kind)
        try:
            yield policy.to(self.accelerator.device).eval()
        finally:
            release(policy)

    def experts(self) -> list[Any]:
        """Return the experts as plain models of their own, fused, on the accelerator's device."""
        found = []
        for name in self.objectives:
            with self.policy("expert", expert_folder(self.path, name)) as policy:
                found.append(policy.merge(None, self.config.kl_weight[0]))
        return found
