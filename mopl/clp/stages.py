"""The trainings of a run, one folder each: what is finished is loaded, what was interrupted is continued.

    model/                      the policy of clp or of prompting (in a folder for each method under clp-all)
    models/expert-<reward>/     the experts, for soups and for mixing at decoding
    <method folder>/model/      the soup: the experts as sets of one mixture

A finished folder holds the model and, written last, `training.json`; until then `checkpoints/`, which are dropped at
the end, and with several epochs `rollouts/`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopl._files import discard_folder, write_file
from mopl.clp.config import ALL, ClpConfig
from mopl.clp.loss import ClpLoss, Guard, SampleLog, size_of
from mopl.clp.policies import Policy, load_policy, new_policy, release, save_soup
from mopl.clp.prompts import Prompts, PromptSource
from mopl.clp.reward_scale import RewardScale, RunningScale
from mopl.clp.rollout import RolloutStore, Sampler
from mopl.experiments.run_directory import DONE, read_done
from mopl.language_models import models
from mopl.rewards import Rewards
from mopl.training import CheckpointFolder, RunLog, train
from mopl.training.parallel import exists_on_main
from mopl.training.precision import rounding_of


def expert_folder(path: Path, objective: str) -> Path:
    """Return where the expert of a reward is."""
    return path / "models" / ("expert-" + "".join(c if c.isalnum() or c in "._" else "-" for c in objective))


class Stages:
    """Trains and loads the policies of one run.

    Args:
        path: The run directory.
        config: Settings.
        prompts: `"train"` and `"test"`.
        base: The fused, frozen language model, on the accelerator's device.
        sampler: Samples and scores.
        rewards: The m rewards.
        accelerator: accelerate's `Accelerator`.
        log: The log of the run.
        say: Told, in a line, about each stage.
    """

    def __init__(
        self,
        path: Path,
        config: ClpConfig,
        prompts: dict[str, Prompts],
        base: Any,
        sampler: Sampler,
        rewards: Rewards,
        accelerator: Any,
        log: RunLog,
        say: Callable[[str], None],
    ) -> None:
        self.path, self.config, self.prompts, self.base = path, config, prompts, base
        self.sampler, self.rewards, self.accelerator, self.log, self.say = sampler, rewards, accelerator, log, say
        self.objectives = rewards.names
        self.scale = RewardScale(torch.zeros(len(rewards)), torch.ones(len(rewards)))  # replaced by the recipe

    @property
    def clp_folder(self) -> Path:
        """Where the policy of clp is."""
        return self.path / "clp" if self.config.method == ALL else self.path

    def train_method(self, method: str, folder: Path) -> tuple[float, int]:
        """Train what a method needs; return its seconds and its number of trained parameters."""
        if method in ("clp", "dera"):  # DeRa moves the policy of clp
            return self._fit("clp", self.clp_folder / "model", "clp")
        if method == "prompting":
            return self._fit(method, folder / "model", method)
        done = [
            self._fit(f"expert {name}", expert_folder(self.path, name), "expert", expert=j)
            for j, name in enumerate(self.objectives)
        ]
        if method == "rewarded-soups" and self.accelerator.is_main_process and not (folder / "model" / DONE).exists():
            save_soup(
                [expert_folder(self.path, name) for name in self.objectives], folder / "model", self.base, self.config,
                self.objectives,
            )  # fmt: skip
            write_file(folder / "model" / DONE, "{}\n")
        self.accelerator.wait_for_everyone()
        return sum(seconds for seconds, _ in done), sum(count for _, count in done)

    def _source(self, kind: str, expert: int | None) -> PromptSource:
        config, m = self.config, len(self.objectives)
        fixed = None if expert is None else torch.eye(m)[expert]
        count = config.trade_offs
        if count is None:
            count = 2 if kind == "clp" and config.mixes_parameters else config.prompts_per_step
        return PromptSource(self.prompts["train"], config, m, fixed=fixed, trade_offs=count)

    def _fit(self, name: str, folder: Path, kind: str, expert: int | None = None) -> tuple[float, int]:
        """Train and save a policy unless it is there; return seconds, interruptions left out, and parameters."""
        if exists_on_main(self.accelerator, folder / DONE):
            done = read_done(folder / DONE)
            return done["seconds"], done["parameters"]
        config, main = self.config, self.accelerator.is_main_process
        policy = new_policy(
            self.base, config, self.objectives, kind, None if expert is None else self.objectives[expert]
        )
        if config.normalize == "running":
            policy.running = RunningScale(self.scale, config.normalize_decay)
        policy.to(self.accelerator.device)
        if note := rounding_of(policy):
            self.say(f"{name}: {note} (--dtype float32)")
        count = models.trained_parameters(policy)
        checkpoints = folder / "checkpoints"
        samples = SampleLog(self.path, enabled=main)
        latest = CheckpointFolder(checkpoints).latest()
        samples.rewind(name, latest.step if latest else 0)
        guard = Guard(config, name, checkpoints, size_of(policy.model))
        loss = ClpLoss(
            config, self.sampler, self.rewards, self.scale,
            RolloutStore(folder / "rollouts", config.epochs, checkpoints), guard,
            samples if config.log_samples else None, name,
        )  # fmt: skip
        try:
            result = train(
                policy, self._source(kind, expert), loss, config.training(), accelerator=self.accelerator,
                directory=checkpoints, resume=True, log=self.log, stage=name,
                optimizer=optimizer_of(policy, config, self.accelerator.device), save_frozen=False,
            )  # fmt: skip
            guard.check_size(policy.model, result.steps)  # no rollout has seen the last update
            if main:
                policy.model.save_pretrained(folder)
                record: dict[str, Any] = {"steps": result.steps, "seconds": result.seconds, "parameters": count}
                if policy.running is not None:
                    running = policy.running
                    record |= {"mean": running.mean.tolist(), "deviation": running.deviation.tolist()}
                write_file(folder / DONE, json.dumps(record, indent=2) + "\n")
                for part in (checkpoints, folder / "rollouts"):
                    if part.exists():
                        discard_folder(part)
            self.accelerator.wait_for_everyone()
        finally:
            release(policy)
        self.say(f"{name}: {result.steps} steps in {result.seconds:.1f} s")
        return result.seconds, count

    # ------------------------------------------------------------ trained policies

    @contextmanager
    def policy(self, method: str, folder: Path) -> Iterator[Policy]:
        """Give the trained policy of a method inside a `with` block."""
        kind = "soup" if method == "rewarded-soups" else method
        policy = load_policy(folder / "model", self.base, self.config, self.objectives, kind)
        try:
            yield policy.to(self.accelerator.device).eval()
        finally:
            release(policy)

    def experts(self) -> list[Any]:
        """Return the experts as plain models of their own, fused, on the accelerator's device."""
        return [
            plain_expert(expert_folder(self.path, name), self.base, self.config, self.objectives)
            for name in self.objectives
        ]


def plain_expert(folder: Path, base: Any, config: ClpConfig, objectives: tuple[str, ...]) -> Any:
    """Return the expert of a folder as a plain model of its own, in evaluation mode, on the base's device."""
    policy = load_policy(folder, base, config, objectives, "expert")
    try:
        model: Any = policy.model
        merged = model.merge(torch.ones(1))
    finally:
        release(policy)
    return merged.to(next(base.parameters()).device).eval()


def optimizer_of(policy: Policy, config: ClpConfig, device: torch.device) -> torch.optim.Optimizer:
    """Return AdamW with the learning rates of the policy and of the value head."""
    groups: dict[bool, list[Tensor]] = {False: [], True: []}
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            groups[name.startswith("value.")].append(parameter)
    rates = {False: config.learning_rate, True: config.value_learning_rate}
    return torch.optim.AdamW(
        [{"params": parameters, "lr": rates[kind]} for kind, parameters in groups.items() if parameters],
        weight_decay=config.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )
