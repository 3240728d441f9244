"""`MultiObjectiveGRPOTrainer`: TRL's `GRPOTrainer` with a reward function for each objective and a model that takes w.

    trainer = MultiObjectiveGRPOTrainer(
        LoraMixture(model, objectives=2, config=LoraConfig(...)),
        reward_funcs=[helpful, harmless],
        args=MultiObjectiveGRPOConfig("out", num_generations=8),
        train_dataset=dataset,
        processing_class=tokenizer,
    )

It is a subclass, not a callback: a callback sees neither the rows of a generation nor what multiplies their rewards.
Loss, advantages, clipping, buffers and log are TRL's own code. What is added goes in by doors that TRL has:

* The weights of a prompt are drawn before its completions, a function of (seed, micro-step, place of the prompt in the
  batch of all processes), and travel with each row as `objective_weights` in the dictionary that TRL shuffles, splits
  and buffers.
* `generate` gets them as one more tensor of the batch; each forward pass (policy, old policy, reference) as a keyword.
* The rewards are multiplied by a row of weights for each completion where TRL has one vector for all.

TRL prepares the causal language model inside (its head, dropout, placement), and the model around it, which takes the
weights, stands in its place from then on. What the trainer reads of TRL is the same in 1.15 and 1.16; before 1.15,
`GRPOTrainer` computed log-probabilities outside of the model's forward pass, where nothing is conditioned.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopl._extras import require

require("trl", "transformers", "accelerate", what="mopl.integrations.grpo", extra="trl")
import trl
from accelerate.utils import gather
from trl import GRPOConfig, GRPOTrainer  # type: ignore[attr-defined]

from mopl._restoring import generators_kept, seeded
from mopl.conditioning.sampling import check_weights
from mopl.conditioning.weighted import WeightedModel
from mopl.integrations._checkpoints import WeightedCheckpoints
from mopl.integrations._objective import names_of
from mopl.integrations._rollout_checks import check_model, check_release, refuse_sharded_rollouts
from mopl.integrations._rollouts import (
    InnerReference,
    OfRows,
    RolloutArguments,
    RowWeights,
    load_rollouts,
    objectives_of,
    rows_model,
    save_rollouts,
    unrewarded,
)
from mopl.integrations._settings import with_help
from mopl.integrations._setup import reference_name, warn_of_rounding
from mopl.language_models.adapter_reference import OwnReference
from mopl.pareto.front import Front
from mopl.pareto.grid import weight_grid
from mopl.pareto.indicators import hypervolume
from mopl.rewards.scale import RewardScale, RunningScale, moments

__all__ = ["MultiObjectiveGRPOConfig", "MultiObjectiveGRPOTrainer", "RolloutArguments"]

WEIGHTS = "objective_weights"  # of the rows of a batch, (B, m)
MAIN = "scalarised reward"


@with_help
@dataclass
class MultiObjectiveGRPOConfig(RolloutArguments, GRPOConfig):
    """Arguments of `MultiObjectiveGRPOTrainer`: those of `trl.GRPOConfig` and of `RolloutArguments`.

    `reward_weights` of TRL are a scale of each objective here: reward j of a completion counts w_j reward_weights_j
    times. `scale_rewards` and `multi_objective_aggregation` mean what they mean in TRL, for the rewards times w.
    """


class MultiObjectiveGRPOTrainer(WeightedCheckpoints, GRPOTrainer):
    """TRL's `GRPOTrainer` for m reward functions and a model that takes their weights.

    Args:
        model: A `LoraMixture`, a `HyperPromptModel`, or a `ParameterMixture` (with `weights_per="step"`); or whatever
            `GRPOTrainer` takes, which is then trained for one w, `objective_weights`.
        reward_funcs: m reward functions as in TRL, in the order of the objectives.
        args: `MultiObjectiveGRPOConfig`, or a plain `GRPOConfig`.
        eval_weights: (n, m) points of the grid of w for evaluation.
        **options: Further arguments of `GRPOTrainer`. A model that takes weights has neither `peft_config` nor tools,
            environments or a `rollout_func`.

    Attributes:
        objectives: Names of the m objectives, by which rewards are logged.
        eval_weights: (n, m), the grid.

    The other arguments are those of `GRPOTrainer`.

    Raises:
        ValueError: If arguments do not fit one another or the model.
        ImportError: If the installed TRL is older than 1.15.
    """

    args: Any
    num_generations: Any
    num_generations_eval: Any

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        eval_weights: Tensor | Sequence[Sequence[float]] | None = None,
        **options: Any,
    ) -> None:
        check_release(trl.__version__)
        if args is None:
            name = model if isinstance(model, str) else getattr(model, "name_or_path", "") or type(model).__name__
            args = MultiObjectiveGRPOConfig(f"{str(name).split('/')[-1]}-GRPO")
        self.settings = settings = RolloutArguments.of(args)
        weighted = model if isinstance(model, WeightedModel) else None
        if weighted is not None:
            check_model(weighted, args, settings, processing_class, options)
        self._point: tuple[int, Tensor] | None = None  # of the grid, while an evaluation is there
        self._rows: Tensor | None = None  # (B, m), weights of the rows that TRL is at
        self._found: list[list[Tensor]] = []  # rewards of an evaluation, for each point of the grid
        self._evaluation, self._batches, self._prompts = "eval", 0, None
        inner: Any = model if weighted is None else weighted.causal_lm
        with _without_reference(args, weighted is not None):
            super().__init__(
                inner, reward_funcs, args, train_dataset=train_dataset,
                eval_dataset=eval_dataset, processing_class=processing_class, **options,
            )  # fmt: skip
        names = None if weighted is None else weighted.record.objectives
        self.objectives = objectives_of(settings.objectives, names, self.reward_func_names)
        self.reward_func_names, m = list(self.objectives), len(self.objectives)
        self._factors = self.reward_weights.float()  # (m,), TRL's
        self._scale = RunningScale(RewardScale(torch.zeros(m), torch.ones(m), torch.zeros(m)))
        prompts = args.generation_batch_size // args.num_generations
        self._drawn = settings.sampler(m, prompts, conditioned=weighted is not None, seed=args.seed)
        self.eval_weights = self._grid(weighted is not None, eval_weights)
        if settings.reference_point is not None:
            require("moocore", what="reference_point")
            if len(settings.reference_point) != m:
                raise ValueError(f"reference_point is {settings.reference_point}; pass one number an objective, {m}")
        if weighted is not None:
            self._stand_around(weighted)
        warn_of_rounding(self.model, self.accelerator)

    def _stand_around(self, model: WeightedModel) -> None:
        """Put the model that takes weights into the place of the one inside, which TRL has prepared."""
        refuse_sharded_rollouts(self.accelerator, model)
        if self.place_model_on_device:
            self._move_model_to_device(model, self.args.device)
        self.model = self.model_wrapped = self.callback_handler.model = model
        self.beta = self.args.beta
        if self.beta != 0.0:
            self.own = OwnReference(model)
            self.own.spread(self.accelerator)
            self.reference_is = self.own.fingerprint(model)
            self.ref_model: Any = InnerReference(self.own, model)
        drawn = self.settings.objective_weights is None
        model.record = dataclasses.replace(
            model.record,
            objectives=self.objectives,
            reference=reference_name(model, self.own, None, self.beta == 0.0),
            concentration=self.settings.concentration if drawn else None,
        )

    def _grid(self, conditioned: bool, given: Any) -> Tensor:  # (n, m)
        m, points = len(self.objectives), self.settings.eval_points
        if not conditioned:
            if points is not None or given is not None:
                raise ValueError(
                    f"{'eval_points' if given is None else 'eval_weights'} was passed but the model takes no weights, "
                    "so that it is the same at each; leave it out, or pass a model that takes weights"
                )
            return self._drawn(0)[:1]
        grid = weight_grid(m, points, density="coarse") if given is None else check_weights(given, m)
        return grid.float().reshape(-1, m)

    # ---------------------------------------------------------------- rollouts

    def _weights_of(self, count: int) -> Tensor:
        """Return the weights (count, m) of the rows of this process in the batch that is answered now."""
        if self._point is not None:
            return self._point[1].expand(count, -1)
        if not self.model.training:  # outside of an evaluation on the grid
            return self.eval_weights[0].expand(count, -1)
        first = self.accelerator.process_index * count
        return self._drawn(self._step)[torch.arange(first, first + count) // self.num_generations]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        rows = self._weights_of(len(inputs)).to(self.accelerator.device, torch.float32)
        before, self._rows = self.reward_weights, rows
        self.reward_weights: Any = RowWeights(gather(rows) * self._factors.to(rows.device))
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self.reward_weights, self._rows = before, None
        return {**output, WEIGHTS: rows}

    def _generate_single_turn(self, prompt_ids: Any, images: Any, multimodal_fields: Any, *args: Any, **kw: Any) -> Any:
        sampler: Any = contextlib.nullcontext()
        if isinstance(self.model, WeightedModel):
            # What TRL finds here beside tokens and mask it hands on to `generate`.
            multimodal_fields = {**multimodal_fields, "weights": self._rows}
            sampler = self._served() if self.use_vllm else sampler
        with sampler:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, *args, **kw)

    @contextlib.contextmanager
    def _served(self) -> Iterator[None]:
        """Let vLLM answer as the plain model of the one w that all rows have, by TRL's own way to send it weights."""
        assert self._rows is not None
        self.vllm_generation.model = self.model.merge(self._rows[0])
        try:
            self.vllm_generation.sync_weights()
            self._last_loaded_step = self.state.global_step  # TRL would send them again otherwise
            yield
        finally:
            self.vllm_generation.model = self.model.causal_lm

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rows = self._rows
        assert rows is not None
        for name, column in zip(self.objectives, rows.T.tolist(), strict=True):
            self._log_completion_extra(f"weight/{name}", column)
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # (N, m)
        weights: Any = gather(rows)
        if self._point is not None:
            self._found[self._point[0]].append(rewards.double().cpu())
        for name, column in zip(self.objectives, weights.T, strict=True):
            self._metrics["train" if self.model.training else "eval"][f"weights/{name}"].append(column.mean().item())
        if self.settings.reward_normalization == "running":
            self.reward_weights = RowWeights(weights * self._factors.to(weights) / self._deviation(rewards))
        # A completion none of whose rewards counts at its weights is unscorable, which TRL says by NaN in all of them.
        lost = ~(~rewards.isnan() & (weights > 0)).any(1)
        return rewards.masked_fill(lost[:, None], torch.nan)

    def _deviation(self, rewards: Tensor) -> Tensor:
        """Return the standard deviation (m,) of the rewards so far, before these; of these where they are the first."""
        new = torch.stack(moments(rewards.cpu()))
        first = self._scale.counts == 0
        found = self._scale.deviation
        if self.model.training:
            self._scale.add(new)
            found = torch.where(first, self._scale.deviation, found)
        return found.to(rewards)

    # ---------------------------------------------------------------- forward passes

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        inner = rows_model(self.accelerator, self.model, generates=not self.args.use_vllm)
        model = OfRows(model, self._rows if isinstance(self.model, WeightedModel) else None, inner)
        return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._rows = inputs[WEIGHTS]
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._rows = None

    # ---------------------------------------------------------------- evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Answer prompts at every point of the grid of w and measure the rewards; the arguments are those of `Trainer`.

        Completions are sampled with the same random numbers at every point and in every evaluation, and the training's
        own generators stay where they are.

        Returns:
            What `GRPOTrainer` reports, as means over the grid, and for each point `eval_rewards/<objective>@<w>` and
            `eval_reward@<w>`, the mean rewards and their sum times w; with `reference_point` the `eval_hypervolume`.
        """
        data: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(data, dict):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # which comes back with each name
        data = self.eval_dataset[data] if isinstance(data, str) else data  # pyright: ignore[reportOptionalSubscript]
        self._prompts = len(data) if hasattr(data, "__len__") else None
        self._found, self._batches, self._evaluation = [[] for _ in self.eval_weights], 0, metric_key_prefix
        with generators_kept():  # a loader draws, too
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """Answer a batch of prompts at every point of the grid; return the mean of the losses."""
        losses = []
        seed = self.args.seed + 1 + self._batches * self.accelerator.num_processes + self.accelerator.process_index
        try:
            for number, point in enumerate(self.eval_weights):
                self._point = (number, point)
                with seeded(seed):
                    losses.append(super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)[0])
        finally:
            self._point = None
        self._batches += 1
        return torch.stack(losses).mean(), None, None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the rewards at each point of the grid after an evaluation."""
        if any(self._found) and f"{self._evaluation}_runtime" in logs:
            logs.update({f"{self._evaluation}_{name}": value for name, value in self._figures().items()})
        super().log(logs, *args, **kwargs)

    def _rewards_of_grid(self) -> Tensor:
        """Return the mean reward of each prompt (L, n, m) in the last evaluation, NaN where all are missing."""
        if not any(self._found):
            raise ValueError("there has been no evaluation yet; call evaluate() first")
        rewards = torch.stack([torch.cat(parts) for parts in self._found], 1)  # (R, n, m)
        if self._prompts is not None:  # processes repeat the first prompts to fill up the last batch
            rewards = rewards[: self._prompts * self.num_generations_eval]
        return rewards.view(-1, self.num_generations_eval, *rewards.shape[1:]).nanmean(1)

    def _figures(self) -> dict[str, float]:
        means = self._rewards_of_grid().nanmean(0)  # (n, m)
        found: dict[str, float] = {}
        for name, weights, values in zip(names_of(self.eval_weights), self.eval_weights.double(), means, strict=True):
            found |= {f"rewards/{each}@{name}": float(v) for each, v in zip(self.objectives, values, strict=True)}
            found[f"reward@{name}"] = float((weights * self._factors.double().cpu() * values).nansum())
        if self.settings.reference_point is None:
            return found
        if what := unrewarded(self.objectives, means):
            warnings.warn(f"{what}, so there is no hypervolume", stacklevel=2)
        else:
            found["hypervolume"] = hypervolume(means, self.settings.reference_point, maximise=True)
        return found

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: `evaluate(dataset)` answers prompts and measures rewards."""
        raise NotImplementedError("there is nothing to predict in rollouts; pass the prompts to evaluate()")

    def front(
        self, method: str = "grpo", *, reference_point: Sequence[float] | None = None, data: Any = "evaluation data"
    ) -> Front:
        """Return the front of the mean rewards in the last evaluation, for `mopl.report` and `front.json`.

        Args:
            method: Its name.
            reference_point: (m,) of the hypervolume; by default that of the arguments.
            data: What the prompts are: a name or a description.

        Returns:
            A front whose main figure is the scalarised reward, with bootstrap intervals over the prompts.

        Raises:
            ValueError: If there has been no evaluation, or there is no reference point.
            ImportError: If moocore is not installed.
        """
        point = self.settings.reference_point if reference_point is None else reference_point
        if point is None:
            raise ValueError("reference_point is missing; pass m numbers here, or in the arguments of the trainer")
        rewards = self._rewards_of_grid()
        if what := unrewarded(self.objectives, rewards.nanmean(0)):
            raise ValueError(f"{what}, so it has no place on a front; evaluate prompts that its function rewards")
        main = (rewards * self.eval_weights.double() * self._factors.double().cpu()).nansum(-1)
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return Front.of(
            main, rewards, method, weights=self.eval_weights, reference_point=point, seed=self.args.seed,
            objectives=self.objectives, main=MAIN, seconds=0.0, parameters=trained, data=data,
            inference_parameters=sum(p.numel() for p in self.model.parameters()),
        )  # fmt: skip

    # ---------------------------------------------------------------- checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if not self.args.save_only_model:
            unused = self._step % (self.args.steps_per_generation * self.num_iterations) != 0
            state = {"step": self._step, "buffered": self._buffered_inputs if unused else None}
            state["scale"] = self._scale.state_dict()
            save_rollouts(self._checkpoint_folder(trial), self.accelerator.process_index, state)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            state = load_rollouts(Path(checkpoint), self.accelerator.process_index, self.accelerator.device)
            self._step, self._buffered_inputs = state["step"], state["buffered"]
            self._scale.load_state_dict(state["scale"])


@contextlib.contextmanager
def _without_reference(args: Any, wanted: bool) -> Iterator[None]:
    """Let TRL load no model as the reference of a policy that is its own."""
    beta, args.beta = args.beta, 0.0 if wanted else args.beta
    try:
        yield
    finally:
        args.beta = beta
