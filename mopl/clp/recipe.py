"""`mopl clp` from prompts to report: policies, fronts, table, picture and page in one directory.

config.json        settings, command line, seed, versions, what the prompts were
log.jsonl          one line of figures every `log_every` steps: rewards, KL, entropy, lengths
samples.jsonl      responses of rollouts as text, with their trade-off and rewards
rewards.json       mean and deviation of each reward over answers of the untrained model (with `normalize="running"` the
                   scale that trainings begin with; model/training.json has the one that they end with)
base/              the front of the untrained model: one point
front.json         mean rewards and KL on the grid (under clp-all in a folder for each method, with its model)
model/             what was trained, see `mopl.clp.policies`
evaluation.json    values, cost of decoding, steerability
samples.json       answers to held-out prompts at every point of the grid
table.txt, front.png, report.html
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec
import torch

from mopl import _terminal
from mopl._counted import counted
from mopl._files import write_file
from mopl._records import Finite, damaged, read_json
from mopl._restoring import seeded
from mopl._rows import check_rows
from mopl._terminal import shell
from mopl.clp.config import ClpConfig
from mopl.clp.evaluate import MAIN, Evaluation, Evaluator, kappa, kept_parameters
from mopl.clp.policies import new_policy, release
from mopl.clp.prompts import Prompts, describe, placed_prompts, split_prompts
from mopl.clp.reward_modules import is_module, make_rewards, place_of
from mopl.clp.rollout import Sampler
from mopl.clp.runs import ClpRun
from mopl.clp.stages import Stages
from mopl.experiments.driver import FREE_ON_RESUME as FREE_IN_EVERY_RUN
from mopl.experiments.driver import Measured, Recipe, execute, plain_word
from mopl.experiments.run import BASE
from mopl.experiments.run_directory import CONFIG_FILE, RunInterrupted
from mopl.experiments.stages import Trained
from mopl.language_models.adapter_reference import checksum
from mopl.language_models.models import positions_of
from mopl.rewards import Rewards, prompt_key
from mopl.rewards.scale import RewardScale, moments
from mopl.training import make_accelerator
from mopl.training.parallel import exists_on_main

__all__ = ["FREE_ON_RESUME", "RunInterrupted", "check_resume", "measure_rewards", "read_rewards", "train_policies"]

FREE_ON_RESUME = (
    *FREE_IN_EVERY_RUN, "log_samples", "rollout_server", "rollout_folder", "rollout_timeout", "engine_kl_limit",
)  # fmt: skip
REWARDS = "rewards.json"


def train_policies(
    config: ClpConfig,
    run: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    rewards: Rewards | None = None,
    say: Callable[[str], None] = _terminal.say,
) -> Path:
    """Train, evaluate and report; everything lands in one run directory.

    Args:
        config: Settings.
        run: The run directory; `runs/<method>-<data>-<n>` with the next free n by default.
        resume: Continue the run that is there, bit for bit as if it had never stopped.
        overwrite: Replace the run that is there, once prompts, rewards and model are read and found sound.
        rewards: The rewards themselves, named as in `config.rewards`; None makes them from these names.
        say: Told, in a line, about each stage; on the main process only.

    Returns:
        The run directory.

    Raises:
        FileExistsError: If there is a run and neither `resume` nor `overwrite` is set.
        FileNotFoundError: If there is no run to resume, or no prompts.
        ImportError: If a package is missing; the message says how to install it.
        ValueError: If a setting is unsound, or a resumed run had other settings or prompts.
        PolicyCollapsed: If a guard stopped a training.
        RolloutServerError: If the server of `rollout_server` did not answer, or not as it must.
        TrainingDiverged: If a loss is no longer a number.
        RunInterrupted: After Ctrl-C or SIGTERM, once a checkpoint is written.
    """
    return execute(ClpRecipe(config, rewards), run, resume=resume, overwrite=overwrite, say=say)


class ClpRecipe(Recipe):
    """What `mopl clp` does in a run.

    Args:
        config: The settings.
        rewards: The rewards, named as in `config.rewards`; None makes them from these names.
    """

    kind = ClpRun.KIND
    finished = ClpRun
    free = FREE_ON_RESUME
    fingerprints: ClassVar[dict[str, str]] = {"fingerprint": "prompts"}

    def __init__(self, config: ClpConfig, rewards: Rewards | None) -> None:
        super().__init__(config)
        self.given = rewards

    @property
    def packages(self) -> tuple[str, ...]:
        """PEFT, where there are adapters; what asks a server."""
        adapters = self.config.scope in ("lora-mixture", "hyper-prompt")
        return ("peft",) * adapters + ("httpx",) * (self.config.rollout_server is not None)

    @property
    def stem(self) -> str:
        """What the default name of the run begins with."""
        return f"{self.config.method}-{_data_word(self.config)}"

    def make_accelerator(self) -> Any:
        """Return the `Accelerator` of the run."""
        return make_accelerator(cpu=self.config.device == "cpu")

    def read(self) -> dict[str, Any]:
        """Make the rewards, read and tokenise the prompts."""
        config = self.config
        self.rewards = rewards = make_rewards(config.rewards) if self.given is None else self.given
        m = len(rewards)
        if self.given is not None and m != len(config.rewards):
            named, passed = counted(len(config.rewards), "reward"), f"{m} {'was' if m == 1 else 'were'} passed"
            raise ValueError(f"rewards names {named} but {passed}; name each")
        self.reference_point = config.for_each("reference_point", m)
        self.plan(m)
        self.tokenizer = config.load_tokenizer()
        placed = placed_prompts(config.data, limit=config.limit, on_error=config.on_error)
        self.prompts, long = split_prompts(placed, config.list_tokenizer(self.tokenizer), config)
        self.say(
            f"{counted(len(self.prompts['train']), 'prompt')} to train on, {len(self.prompts['test'])} to evaluate on"
            + (f"; {long} of more than {config.max_prompt} tokens left out" if long else "")
        )
        return {
            "objectives": list(rewards.names),
            "fingerprint": "-".join(part.fingerprint()[:32] for part in self.prompts.values()),
            "splits": describe(self.prompts),
        }

    @classmethod
    def settings_to_resume(
        cls, record: dict[str, Any], changes: Mapping[str, Any], path: Path, *, trust_rewards: bool = False
    ) -> ClpConfig:
        """Return the settings of a run to resume as `Recipe` does.

        Args:
            record: The run's `config.json`.
            changes: Settings that were given again.
            path: The run, for the message.
            trust_rewards: Modules of rewards may be imported though `changes` does not name them again.

        Raises:
            PermissionError: If code would be imported that only the run folder asks for.
            ValueError: If a setting that matters differs, or the run has lost or got a rollout server.
        """
        config = super().settings_to_resume(record, changes, path)
        had, has = record["config"].get("rollout_server") is not None, config.rollout_server is not None
        if had and not has:
            raise ValueError(
                f"{path} was started with a rollout server, and steps without one are others; pass rollout_server and "
                "rollout_folder, which may be other ones, or start another run"
            )
        if has and not had:
            raise ValueError(
                f"{path} was started without a rollout server, and steps with one are others; leave rollout_server and "
                "rollout_folder out to resume it, or start another run"
            )
        named = tuple(changes.get("rewards") or ())
        foreign = [spec for spec in config.rewards if is_module(spec) and spec not in named]
        if foreign and not trust_rewards:
            raise PermissionError(
                f"{path / CONFIG_FILE} asks for the reward {foreign[0]!r}, for which {place_of(foreign[0])} would be "
                "imported, and so run; a run folder is data and may come from anyone. Name the rewards again ("
                f"{shell('--rewards', *config.rewards)}), or pass trust_rewards=True"
            )
        return config

    def load(self) -> None:
        """Load the model: most mistakes in settings show here."""
        config = self.config
        base = config.load_model()
        model = checksum(base.state_dict().items())
        if self.record is not None and self.record["data"].get("model", model) != model:  # older runs do not say
            raise ValueError(
                f"{config.model} is another model than when {self.path} began (its parameters differ), and the "
                "policies there were trained from that one; put it back, or start another run"
            )
        self.described = dict(self.data)
        self.data["model"] = model
        _check_length(base, config, self.prompts)
        _check_scope(base, config, self.rewards.names)
        sampler = Sampler(base, self.tokenizer, config)
        self.stages = Stages(self, self.prompts, base.to(self.accelerator.device), sampler, self.rewards)
        self.stages.connect(resumed=self.record is not None)

    def prepare(self) -> None:
        """Measure the rewards of the untrained model, which are the scale of the training."""
        config, stages = self.config, self.stages
        measured = measure_rewards(stages)
        if config.normalize != "none":
            stages.scale = measured
        self.reference_point = self.reference_point or (measured.mean - 2 * measured.deviation).tolist()
        self.test = self.prompts["test"].first(config.eval_prompts)
        self.evaluator = Evaluator(stages, self.test)

    @cached_property
    def untrained(self) -> Evaluation:
        """The figures of the untrained model: in a resumed run again, for the cost of decoding is relative to it."""
        return self.evaluator.base()

    def base(self) -> Measured:
        """Evaluate the untrained model."""
        return self._measured(BASE, [self.untrained], {})

    def train(self, method: str, folder: Path) -> dict[str, Trained]:
        """Train what a method needs; return its trainings by name."""
        _ = self.untrained  # while nothing has touched the model
        return super().train(method, folder)

    def evaluate(self, method: str, folder: Path, trained: dict[str, Trained]) -> Measured:
        """Let a trained method answer the held-out prompts at each trade-off."""
        many = f"{counted(len(self.test), 'held-out prompt')} at {counted(len(self.grid), 'trade-off')}"
        self.say(f"{method}: answering {many}")
        return self._measured(method, self.evaluator.method(method, folder, self.grid), trained)

    def _measured(self, method: str, found: list[Evaluation], trained: dict[str, Trained]) -> Measured:
        config, names, test, first = self.config, self.rewards.names, self.test, found[0]
        # As in `mopl.steering.rescale`: above 1 closer to the reference.
        scales = [kappa(config.kl_weight[0], config) / kappa(each.kl_weight, config) for each in found]
        front = self.front(
            method, [(c, each.kl, each.rewards) for c, each in zip(scales, found, strict=True)], trained,
            objectives=names, main=MAIN, weights=first.weights, reference_point=self.reference_point,
            data={"name": _data_word(config), "split": "test", "answered": len(test), **self.described},
            inference_parameters=kept_parameters(self.stages.base, config, names, method),
        )  # fmt: skip
        base = self.untrained
        figures = [each.summary(self.stages.scale, config, names, self.reference_point, base) for each in found]
        if first.weights is not None:
            self.say(_in_words(method, figures[0]))
        samples = [
            {"prompt": prompt_key(test.texts[q]), "responses": [texts[q] for texts in first.texts]}
            for q in range(min(config.samples, len(test)))
        ]
        return Measured(front, figures, samples)

    def remarks(self) -> Iterable[str]:
        """Return which rewards failed, and on how many answers."""
        report = self.rewards.report
        return str(report).splitlines() if report.failed() else ()

    def options_to_resume(self) -> tuple[str, ...]:
        """Return the rewards, where they are modules: only who names them again has them imported."""
        modules = self.given is None and any(map(is_module, self.config.rewards))
        return ("--rewards", *self.config.rewards) if modules else ()


check_resume = ClpRecipe.settings_to_resume


def _in_words(method: str, figures: dict[str, Any]) -> str:
    """Return what the table has no column for: the mean value, steerability, cost of decoding."""
    value = sum(figures["value"]) / len(figures["value"])
    # No hypervolume: that of the values has another reference point than that of the rewards, which the table shows.
    line = f"{method}: value {value:.4g} (mean over the grid)"
    if "spearman" in figures:
        line += f"; Spearman of rewards and weights {' '.join(f'{x:.2f}' for x in figures['spearman'])}"
    runs = figures["model_runs_per_token"]
    line += f"; {counted(runs, 'model')} {'runs' if runs == 1 else 'run'} for a token"
    relative = figures["seconds_relative_to_base"]
    return line if relative is None else f"{line}, {relative:.2f} times the seconds of the untrained model"


def measure_rewards(stages: Stages) -> RewardScale:
    """Return mean and deviation of the rewards over answers of the untrained model, computed once in a run."""
    file, config = stages.path / REWARDS, stages.config
    if not exists_on_main(stages.accelerator, file):
        chosen = stages.prompts["train"].first(config.normalize_prompts).repeated(max(2, config.samples_per_prompt))
        with seeded(config.seed), torch.no_grad():
            answers = stages.sampler.sample(stages.base, chosen.tokens)
        values = stages.rewards(answers.texts, chosen.texts)
        names = stages.objectives
        if config.normalize == "none":
            counts, mean, squares = moments(values)
            scale = RewardScale(mean, (squares / counts.clamp(min=1)).sqrt(), counts)
        else:
            scale = RewardScale.of(values, names, constant=config.normalize == "running")
        assert scale.counts is not None
        if stages.accelerator.is_main_process:
            content = {
                "objectives": list(names), "mean": scale.mean.tolist(), "deviation": scale.deviation.tolist(),
                "counts": scale.counts.tolist(), "answers": len(chosen), "used": config.normalize != "none",
            }  # fmt: skip
            write_file(file, json.dumps(content, indent=2) + "\n")
        stages.accelerator.wait_for_everyone()
    scale = read_rewards(file, stages.objectives)
    each = zip(stages.objectives, scale.mean.tolist(), scale.deviation.tolist(), strict=True)
    stages.say("untrained model: " + ", ".join(f"{name} {mean:.4g} ± {spread:.4g}" for name, mean, spread in each))
    return scale


class _Scale(msgspec.Struct):
    """What is read of `rewards.json`; older runs have no counts, and do not need them."""

    objectives: list[str]
    mean: list[Finite]
    deviation: list[Annotated[float, msgspec.Meta(ge=0)]]
    counts: list[Annotated[float, msgspec.Meta(ge=0)]] | None = None


def read_rewards(file: Path, objectives: Sequence[str]) -> RewardScale:
    """Return the scale of these rewards from the `rewards.json` of a run.

    Raises:
        DamagedFile: If it is damaged, or of other rewards.
    """
    remedy = "take it from a backup, or start another run: trained policies depend on it"
    found = read_json(file, _Scale, remedy=remedy)
    if found["objectives"] != list(objectives):
        raise damaged(file, f"objectives is {found['objectives']} but the rewards are {list(objectives)}", remedy)
    for name in ("mean", "deviation", "counts"):
        if found.get(name) is not None and len(found[name]) != len(objectives):
            many = f"{counted(len(found[name]), 'number')} for {counted(len(objectives), 'reward')}"
            raise damaged(file, f"{name} has {many}", remedy)
    counts = found.get("counts")
    return RewardScale(
        torch.tensor(found["mean"]), torch.tensor(found["deviation"]), None if counts is None else torch.tensor(counts)
    )


def _check_length(base: Any, config: ClpConfig, prompts: dict[str, Prompts]) -> None:
    """Raise if the model has fewer positions than the longest prompt, what is put in front, and a response."""
    positions = positions_of(base)
    longest = max(len(tokens) for part in prompts.values() for tokens in part.tokens) + config.max_new_tokens
    longest += config.virtual_tokens if config.scope == "hyper-prompt" else 0
    if positions is not None and longest > positions:
        raise ValueError(
            f"prompts and responses have up to {longest} tokens but {config.model} knows {positions} positions; lower "
            "max_prompt or max_new_tokens"
        )


def _check_scope(base: Any, config: ClpConfig, objectives: tuple[str, ...]) -> None:
    """Raise before anything is written if a scope names no parameter, takes no adapters or cannot be merged.

    Also if the model cannot take the rows of a run.
    """
    check_rows(base, virtual=config.scope == "hyper-prompt", generates=True)
    # Experts of scope hyper-prompt are adapters, which are merged for soups and logit mixing.
    for kind in ("clp", "expert") if config.scope == "hyper-prompt" else ("clp",):
        policy = new_policy(base, config, objectives, kind, objectives[0])
        try:
            policy.model.check_merging()
        finally:
            release(policy)


def _data_word(config: ClpConfig) -> str:
    """Return a short name of the prompts for the name of the run."""
    return plain_word(Path(config.data).name.split(".")[0])
