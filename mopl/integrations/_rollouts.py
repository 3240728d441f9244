"""What rollouts of several objectives need beside TRL: which prompt trains for which weights, and how TRL is told."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopl._arguments import check_choice
from mopl._counted import counted, there_are
from mopl._files import write_file
from mopl._rows import UnsupportedModelError, arranged, generation_keywords
from mopl._tensor_files import load_pickled
from mopl.conditioning.samplers import Sampler, dirichlet_weights, fixed
from mopl.conditioning.sampling import check_weights
from mopl.conditioning.weighted import WeightedModel, causal_lm_of
from mopl.integrations._options import check_sizes
from mopl.integrations._settings import with_help
from mopl.integrations._sharding import cuts_parameters
from mopl.language_models.adapter_reference import OwnReference
from mopl.training.zero_settings import check_config

FILE = "rollouts.pt"  # in a checkpoint; "rollouts_1.pt", ... of further processes


@with_help
@dataclass
class RolloutArguments:
    """What a training on rollouts needs for several objectives, besides the arguments of TRL.

    Args:
        objectives: Names of the objectives in the order of the reward functions. By default those of a model that has
            names for them, else the names of the reward functions.
        objective_weights: One fixed w on the simplex. By default w is drawn for a model that takes weights, and is
            uniform for any other.
        concentration: Of the Dirichlet distribution that w is drawn from.
        weights_per: Draw one w for each `"prompt"`, which all its completions share, or one for all prompts that are
            answered together, `"step"`.
        reward_normalization: `"none"`, or `"running"`: divide each reward by its standard deviation over all rewards of
            the training so far, before w makes one number of them. Not with `"normalize_then_sum"`.
        eval_points: Points of the grid of w for evaluation; sizes of lattices for m = 3 and 4. The trainer's argument
            `eval_weights` takes any points.
        reference_point: m numbers; with them an evaluation reports the hypervolume of the mean rewards.
    """

    objectives: list[str] | None = None
    objective_weights: list[float] | None = None
    concentration: float = 1.0
    weights_per: str = "prompt"
    reward_normalization: str = "none"
    eval_points: int | None = None
    reference_point: list[float] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.objectives, str):
            raise TypeError(f"objectives is {self.objectives!r} but must be a list of names: [{self.objectives!r}]")
        check_choice(self.weights_per, ("prompt", "step"), "weights_per")
        check_choice(self.reward_normalization, ("none", "running"), "reward_normalization")
        if (
            self.reward_normalization != "none"
            and getattr(self, "multi_objective_aggregation", "") == "normalize_then_sum"
        ):
            raise ValueError(
                f"reward_normalization is {self.reward_normalization!r} but multi_objective_aggregation is "
                "'normalize_then_sum', which standardises each reward within its group already, so that units would "
                "count again the other way round; leave reward_normalization out"
            )
        if not self.concentration > 0:
            raise ValueError(f"concentration is {self.concentration} but must be positive")
        if self.objective_weights is not None and (self.concentration != 1.0 or self.weights_per != "prompt"):
            raise ValueError(
                "objective_weights are fixed, so none are drawn; leave concentration and weights_per out, or "
                "objective_weights"
            )
        check_config(getattr(self, "deepspeed", None))
        check_sizes(self)
        other = getattr(super(), "__post_init__", None)  # of the arguments of TRL, which come after this class
        if other is not None:
            other()

    @classmethod
    def of(cls, args: Any) -> RolloutArguments:
        """Return the settings in a trainer's arguments; plain ones of TRL have the defaults."""
        names = [entry.name for entry in fields(RolloutArguments)]
        return RolloutArguments(**{name: getattr(args, name) for name in names if hasattr(args, name)})

    def sampler(self, objectives: int, prompts: int, *, conditioned: bool, seed: int) -> Sampler:
        """Return what gives the weights (prompts, m) of the prompts that are answered together, by a counter.

        Raises:
            ValueError: If there is something to be drawn for a model that takes no weights, or weights do not fit.
        """
        if self.objective_weights is not None:
            weights = check_weights(self.objective_weights, objectives, name="objective_weights")
            return fixed(weights, prompts)
        if conditioned:
            per = "list" if self.weights_per == "prompt" else "step"
            return dirichlet_weights(objectives, prompts, concentration=self.concentration, per=per, seed=seed)
        for name, neutral in (("concentration", 1.0), ("weights_per", "prompt")):
            if (value := getattr(self, name)) != neutral:
                raise ValueError(
                    f"{name} is {value!r} but the model takes no weights that could be drawn; leave it out, or pass a "
                    "model that takes them, such as a LoraMixture"
                )
        return fixed(torch.full((objectives,), 1.0 / objectives), prompts)


def unrewarded(objectives: Sequence[str], means: Tensor) -> str:
    """Say which objective has no reward at all at a point of the grid, if one does; `means` (n, m) of an evaluation."""
    for name, missing in zip(objectives, means.isnan().sum(0).tolist(), strict=True):
        if missing:
            return f"no completion of the evaluation has a reward for {name} at {counted(missing, 'point')}"
    return ""


class RowWeights:
    """What multiplies the rewards (N, m) of a generation in the place of TRL's one vector: a row of its own for each.

    TRL writes `rewards_per_func * reward_weights.to(device).unsqueeze(0)` wherever it makes one number of the rewards.
    This answers that, and nothing else: a release that writes it otherwise stops with an error.
    """

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows

    def to(self, device: Any) -> RowWeights:
        """Return the same on a device."""
        return RowWeights(self._rows.to(device))

    def unsqueeze(self, dim: int) -> Tensor:
        """Return the rows (N, m), which need no further dimension."""
        if dim != 0:
            raise ValueError(f"dim is {dim} but TRL asks for 0 in all releases that are supported")
        return self._rows


class OfRows:
    """A model that is called with parts of a batch, one after the other, each at the weights of its rows.

    Each row scores as it does alone, or `UnsupportedModelError` is raised: TRL pads prompts on the left and passes no
    positions, which some families then count from the padding.

    Args:
        model: What is called.
        weights: (B, m) of the whole batch, or None for a model that takes none.
        inner: The causal language model whose rows are arranged; None where that is done elsewhere.
    """

    def __init__(self, model: Any, weights: Tensor | None, inner: Any) -> None:
        self._model, self._weights, self._inner, self._next = model, weights, inner, 0

    def __call__(self, *, input_ids: Tensor, **inputs: Any) -> Any:
        """Run the model on the next rows."""
        begin, self._next = self._next, self._next + len(input_ids)
        if self._inner is not None and set(inputs).isdisjoint(_OF_IMAGES):
            inputs = arranged(self._inner, {"input_ids": input_ids, **inputs})
            del inputs["input_ids"]
        if self._weights is not None:
            inputs["weights"] = self._weights[begin : self._next]
        return self._model(input_ids=input_ids, **inputs)


_OF_IMAGES = ("pixel_values", "token_type_ids", "mm_token_type_ids")


def rows_model(accelerator: Any, policy: Any, *, generates: bool) -> Any:
    """Return the causal language model whose rows `OfRows` arranges, if that is needed and can be measured.

    Raises:
        UnsupportedModelError: If `generate`, as TRL calls it, would not continue rows as they are continued alone.
    """
    if cuts_parameters(accelerator):
        return None
    inner = causal_lm_of(accelerator.unwrap_model(policy))
    own = isinstance(policy, WeightedModel) and policy.arranges_rows
    if generates and not own and generation_keywords(inner, torch.ones(1, 1, dtype=torch.long)):
        raise UnsupportedModelError(
            f"{type(inner).__name__} counts positions from another number than 0, which TRL does not tell generate, so "
            "that completions would be sampled at wrong positions; train it with mopl clp"
        )
    return None if own else inner


class InnerReference:
    """The reference that a policy carries in itself, called as TRL calls a model of its own."""

    def __init__(self, own: OwnReference, model: Any) -> None:
        self._own, self._model = own, model

    def __call__(self, **inputs: Any) -> Any:
        """Run the policy as it was when its training began."""
        with self._own.active(self._model):
            return self._model(**inputs)


def objectives_of(given: Sequence[str] | None, own: Sequence[str] | None, functions: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the objectives, one for each reward function.

    Args:
        given: The names in the arguments.
        own: Those of a model that takes weights.
        functions: Those of the reward functions.

    Raises:
        ValueError: If their numbers differ, or names stand in two orders.
    """
    m = len(functions)
    unnamed = own is None or tuple(own) == tuple(f"objective_{j + 1}" for j in range(len(own)))
    if own is not None and len(own) != m:
        raise ValueError(
            f"{there_are(m, 'reward function')} ({', '.join(functions)}) but the model has "
            f"{counted(len(own), 'objective')} ({', '.join(own)}); pass one reward function for each, in that order"
        )
    names = tuple(given) if given is not None else tuple(functions) if unnamed else tuple(own or ())
    if len(names) != m:
        raise ValueError(f"objectives is {list(names)} but {there_are(m, 'reward function')}; name one for each")
    if len(set(names)) < m:
        raise ValueError(f"the objectives would be called {list(names)}; pass objectives, with a name of its own each")
    known = () if unnamed else tuple(own or ())
    for others, what in ((known, "the model's objectives are"), (tuple(functions), "the reward functions are called")):
        if others and others != names and set(others) == set(names):
            raise ValueError(f"objectives is {list(names)} but {what} {list(others)}; put both in one order")
    if known and known != names:
        raise ValueError(f"objectives is {list(names)} but the model's are {list(known)}; name the same")
    return names


# ---------------------------------------------------------------- checkpoints


def save_rollouts(folder: Path, rank: int, state: dict[str, Any]) -> None:
    """Write what one process needs to go on where it was: how far its rollouts are, and those that are not used up."""
    write_file(_file(folder, rank), lambda path: torch.save(state, path))


def load_rollouts(folder: str | os.PathLike[str], rank: int, device: Any) -> dict[str, Any]:
    """Return what `save_rollouts` wrote, tensors on a device.

    Raises:
        ValueError: If the checkpoint has none: it is not of this trainer, or of another number of processes.
    """
    file = _file(Path(folder), rank)
    if not file.is_file():
        raise ValueError(
            f"{folder} has no {file.name}, so the training could not go on where it was: the checkpoint was written by "
            "another trainer, with save_only_model=True, or by fewer processes; begin a new training from its model"
        )
    state = load_pickled(file)
    if state["buffered"] is not None:
        state["buffered"] = [
            {name: value.to(device) if isinstance(value, Tensor) else value for name, value in part.items()}
            for part in state["buffered"]
        ]
    return state


def _file(folder: Path, rank: int) -> Path:
    return folder / (FILE if rank == 0 else FILE.replace(".", f"_{rank}."))
