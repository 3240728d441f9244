"""Settings that the trainers for transformers and TRL share, and how trade-offs are drawn for a step's lists."""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

from mopl._arguments import check_choice
from mopl._counted import counted, there_are
from mopl._renamed import deprecated
from mopl.conditioning.sampling import check_weights, sample_betas, sample_weights
from mopl.language_models.scoring import Conditions
from mopl.pareto.grid import weight_grid
from mopl.training.zero_settings import check_config

LIST_LOSSES = ("listwise_dpo", "plackett_luce", "pairwise_logistic", "lambda_loss", "approx_ndcg")
SCALARIZATIONS = ("linear", "chebyshev", "smooth_chebyshev")


Arguments = TypeVar("Arguments", bound=type)


def with_help(arguments: Arguments) -> Arguments:
    """Give the fields of a dataclass the texts of its docstring's `Args:` as their help, for `HfArgumentParser`."""
    texts: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc(arguments.__doc__ or "").partition("\nArgs:\n")[2].splitlines():
        if found := re.match(r"    (\w+): (.*)", line):
            name, texts[found[1]] = found[1], found[2]
        elif line.startswith("     ") and name:
            texts[name] += f" {line.strip()}"
    for entry in fields(arguments):
        if entry.name in texts:
            entry.metadata = MappingProxyType({"help": texts[entry.name].replace("%", "%%")})
    return arguments


@with_help
@dataclass
class ObjectiveArguments:
    """What a training on several objectives needs besides the arguments of an ordinary one.

    Args:
        objectives: Names and order of the m objectives. By default those of the data; of rows of pairs only
            `"preference"`, which prefers chosen, so label columns beside pairs must be named here.
        list_loss: A list loss of `mopl.losses`; the trainers' argument `loss` takes one with other options, or one's
            own. Labels must not be negative for "listwise_dpo" and "approx_ndcg"; for rewards pass
            `loss=functools.partial(mopl.losses.listwise_dpo, normalize="softmax", label_temperature=...)`.
        objective_beta: β of each objective, in place of one β for all.
        beta_low: Lower end of the box that β is drawn from, for a model conditioned on it; the loss then uses
            β / ‖β‖₁ (Temperature-COS-DPO, Ren et al. 2025, equation 16).
        beta_high: Upper end of that box.
        objective_weights: One fixed w on the simplex. By default w is drawn for a model that takes `weights`, and is
            uniform for any other, whose optimum under drawn weights is that of their mean anyway.
        concentration: Of the Dirichlet distribution that w is drawn from.
        weights_per: Draw one w a `"list"`, or one a `"step"`.
        scalarization: How w makes one number of the loss vector, see `mopl.losses.scalarize`.
        cosine_penalty: λ, the factor of the cosine penalty.
        cosine_sign: `"as_printed"` or `"cosmos"`, see `mopl.losses.scalarize.cosine_penalty`.
        length_normalized: Score responses by the mean of their tokens' log-probabilities, not the sum.
        reference_free: Leave the reference out.
        eval_points: Points of the grid of w for evaluation; sizes of lattices for m = 3 and 4. The trainers' argument
            `eval_weights` takes any points. None for a model that takes no weights, which is measured at those that it
            trains for.
        reference_store: Folder of a `mopl.language_models.ReferenceStore`, from which the log-probabilities of
            `precompute_ref_log_probs` are read and to which those that it lacks are written; other trainings,
            `mopl align` and any other program may share it. By default they are kept for this training only.
        weights_alpha: Deprecated: the old name of `concentration`.
    """

    objectives: list[str] | None = None
    list_loss: str = "listwise_dpo"
    objective_beta: list[float] | None = None
    beta_low: float | None = None
    beta_high: float | None = None
    objective_weights: list[float] | None = None
    concentration: float = 1.0
    weights_per: str = "list"
    scalarization: str = "linear"
    cosine_penalty: float = 0.0
    cosine_sign: str = "as_printed"
    length_normalized: bool = False
    reference_free: bool = False
    eval_points: int | None = None
    reference_store: str | None = None
    weights_alpha: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.objectives, str):
            raise TypeError(f"objectives is {self.objectives!r} but must be a list of names: [{self.objectives!r}]")
        if self.objectives is not None and not self.objectives:
            raise ValueError("objectives is empty but must name one at least; leave it out for those of the data")
        check_choice(self.list_loss, LIST_LOSSES, "list_loss")
        check_choice(self.weights_per, ("list", "step"), "weights_per")
        check_choice(self.scalarization, SCALARIZATIONS, "scalarization")
        check_choice(self.cosine_sign, ("as_printed", "cosmos"), "cosine_sign")
        if self.cosine_sign != "as_printed" and self.cosine_penalty == 0:
            raise ValueError(
                f"cosine_sign is {self.cosine_sign!r} but cosine_penalty is 0, so there is no penalty to have a sign; "
                "pass cosine_penalty, or leave cosine_sign out"
            )
        if (self.beta_low is None) != (self.beta_high is None):
            raise ValueError(f"beta_low is {self.beta_low} and beta_high is {self.beta_high}; pass both or neither")
        if self.beta_low is not None and self.objective_beta is not None:
            raise ValueError("objective_beta and the box beta_low, beta_high exclude each other; pass one of them")
        if self.weights_alpha is not None:
            if self.concentration != 1.0:
                raise TypeError("weights_alpha is the old name of concentration, which is given too; pass that only")
            deprecated("weights_alpha", "pass concentration, its name now", stacklevel=5)
            self.concentration, self.weights_alpha = self.weights_alpha, None
        if not self.concentration > 0:
            raise ValueError(f"concentration is {self.concentration} but must be positive")
        check_config(getattr(self, "deepspeed", None))
        # The arguments of transformers and of TRL come after this class in the order of inheritance.
        other = getattr(super(), "__post_init__", None)
        if other is not None:
            other()


def settings_of(args: Any) -> ObjectiveArguments:
    """Return the settings in a trainer's arguments; plain ones of transformers or TRL have the defaults."""
    names = [entry.name for entry in fields(ObjectiveArguments)]
    return ObjectiveArguments(**{name: getattr(args, name) for name in names if hasattr(args, name)})


class TradeOffs:
    """The weights and β of lists: a function of (seed, step, place of the list in the step's batch).

    So nothing depends on how a batch is split into processes and accumulation steps, and a resumed training draws what
    the interrupted one would have drawn. `beta` is that where neither the settings nor the data have others.
    """

    def __init__(
        self, settings: ObjectiveArguments, objectives: int, conditions: Conditions, *, beta: float, seed: int
    ) -> None:
        self.settings, self.objectives, self.seed = settings, objectives, seed
        self.conditioned, takes_beta = conditions.weights, conditions.beta is not None
        if takes_beta and settings.beta_low is None:
            raise ValueError("the model is conditioned on β; pass the box beta_low and beta_high")
        if not takes_beta and settings.beta_low is not None:
            raise ValueError(
                "beta_low and beta_high are for a model conditioned on β "
                "(HyperPrompt(..., takes_beta=True)); pass beta or objective_beta"
            )
        for name, neutral in (("concentration", 1.0), ("weights_per", "list")):
            value = getattr(settings, name)
            if not self.conditioned and value != neutral:
                raise ValueError(
                    f"{name} is {value!r} but the model takes no weights that could be drawn; leave it out, or pass a "
                    "model that takes them, such as a HyperPromptModel"
                )
        if settings.concentration != 1.0 and settings.objective_weights is not None:
            raise ValueError(
                f"concentration is {settings.concentration} but objective_weights are fixed, so none are drawn; pass "
                "one of them"
            )
        given = settings.objective_beta
        if given is not None and len(given) != objectives:
            raise ValueError(
                f"objective_beta has {counted(len(given), 'number')} but {there_are(objectives, 'objective')}"
            )
        beta_of_each = [beta] * objectives if given is None else given
        if not all(math.isfinite(value) and value > 0 for value in beta_of_each):
            name, value = ("beta", beta) if given is None else ("objective_beta", given)
            raise ValueError(f"{name} is {value} but must be positive")
        # (1, 1) where all objectives share one: then one softmax serves them all.
        self.beta = torch.tensor([[beta]] if given is None else [given], dtype=torch.float32)
        self.fixed: Tensor | None = None  # (m,)
        if settings.objective_weights is not None:
            if isinstance(settings.objective_weights, str):
                raise TypeError(
                    f"objective_weights is {settings.objective_weights!r} but must be a list; pass "
                    f"{counted(objectives, 'number')} that sum to 1"
                )
            if len(settings.objective_weights) != objectives:
                raise ValueError(
                    f"objective_weights has {counted(len(settings.objective_weights), 'number')} but "
                    f"{there_are(objectives, 'objective')}"
                )
            self.fixed = check_weights(settings.objective_weights, objectives, name="objective_weights").float()
        elif not self.conditioned:
            self.fixed = torch.full((objectives,), 1.0 / objectives)

    def draw(self, step: int, offset: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return what lists `offset` to `offset + count - 1` of a step's batch train for, on the CPU.

        Returns:
            w (count, m), the β of the loss (count or 1, m or 1), and the β that the model sees (count, m).
        """
        settings, m = self.settings, self.objectives
        once = settings.weights_per == "step"
        rows = 1 if once else offset + count  # the first rows do not depend on how many are drawn
        chosen = slice(None) if once else slice(offset, offset + count)
        if self.fixed is None:
            weights = sample_weights(m, rows, settings.concentration, seed=self.seed, step=step)[chosen]
        else:
            weights = self.fixed
        weights = weights.expand(count, m)
        if settings.beta_low is None or settings.beta_high is None:
            return weights, self.beta, self.beta.expand(count, m)
        drawn = sample_betas(m, rows, settings.beta_low, settings.beta_high, seed=self.seed, step=step)
        return weights, drawn.normalized[chosen].expand(count, m), drawn.beta[chosen].expand(count, m)

    def at(self, weights: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same three for one w (m,); a box of β is represented by its middle."""
        settings, shape = self.settings, (count, self.objectives)
        weights = weights.float().expand(shape)
        if settings.beta_low is None or settings.beta_high is None:
            return weights, self.beta, self.beta.expand(shape)
        middle = torch.full(shape, 0.5 * (settings.beta_low + settings.beta_high))
        return weights, middle / middle.sum(-1, keepdim=True), middle

    def grid(self, points: int | None, given: Any = None) -> Tensor:  # (n, m)
        """Return the weights that an evaluation measures: so many `points`, or those `given`, where either is set."""
        m = self.objectives
        if not self.conditioned and points is None and given is None:
            assert self.fixed is not None
            return self.fixed.reshape(1, m)
        grid = weight_grid(m, points, density="coarse") if given is None else check_weights(given, m)
        grid = grid.float().reshape(-1, m)
        if not self.conditioned and len(grid) > 1:
            name = "eval_points" if given is None else "eval_weights"
            raise ValueError(
                f"{name} asks for {len(grid)} trade-offs, but the model takes no weights, so that it is the same "
                f"model at each of them; leave {name} out to measure it at those it trains for, or pass one point, or "
                "a model that takes weights, such as a HyperPromptModel"
            )
        return grid
