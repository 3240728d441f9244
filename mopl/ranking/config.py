"""The settings of `mopl rank` in one dataclass: what is checked before anything is read or written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mopl._arguments import check_choice
from mopl._bounds import check_bounds
from mopl._records import settings_from
from mopl._renamed import renamed
from mopl.ranking.evaluate import Measure
from mopl.ranking.methods import METHODS, ListLoss
from mopl.ranking.model import PARAMETRISATIONS
from mopl.training import TrainingConfig
from mopl.training.settings import located, located_inside

ALL = "all"
EMBEDDED = ("travel", "synthetic")
CONDITIONED = ("weight-cos-dpo", "temperature-cos-dpo")


@dataclass(frozen=True)
class RankConfig:
    """Settings of a ranking run. Every default is ours unless a section of the paper is named.

    Args:
        data: `"travel"`, `"synthetic"` with options, or a file or folder; see `mopl.ranking.load`.
        data_seed: Seed of drawn splits and of generated data; `seed` leaves the data alone.
        objectives: Auxiliary objectives in text form; empty takes those of the data set.
        normalize_features: How features are normalised; see `mopl.ranking.normalization`. None takes the data set's
            own default.
        method: One of `METHODS`, or `"all"` to train and compare every one.
        base: A trained base model to start from (a run or a folder with a model); None trains one.
        loss: `"listnet"` (the paper's) or `"plackett-luce"`.
        ties: How Plackett-Luce treats equal labels.
        last_group: Whether Plackett-Luce charges the items of the lowest label.
        top_k: How many ranks Plackett-Luce sees; None for all.
        temperature: β: one number for all objectives, or one for each.
        temperature_range: Box from which `temperature-cos-dpo` draws β, as factors of `temperature`; the paper's
            (section 4.1) by default.
        alpha: Concentration of the Dirichlet distribution of the weights. Below 1 the ends of the front, where few
            draws of the uniform distribution fall, are trained as well as its middle.
        weights_per: Draw weights for each `"list"`, or one vector for each `"step"` as in the paper's algorithm 1.
        parametrisation: `"augment"`: the network gives what is added to the base model's scores; `"scratch"`: the
            scores themselves, as in the paper's main text (appendix A.6.3 has both and finds the former better). Ours
            is the former: it starts at the base model, needs fewer steps, and is closed under equation (14).
        penalty: Factor λ of the cosine penalty (appendix A.2).
        penalty_sign: `"as_printed"` or `"cosmos"`; see `mopl.losses.scalarize.cosine_penalty`.
        steps: Updates of each tuned model; None: ten epochs, at least 200.
        base_steps: Updates of the base model; None: three epochs, at least 100.
        patience: Validations without a better figure after which a training ends; its best step is kept, see
            `mopl.ranking.validation`. 0 trains all steps and keeps the last. A run of a version that had no patience
            has 0.
        validate_every: Steps from one validation to the next; None: a twentieth of the steps, at least 5.
        batch_size: Lists in a batch.
        learning_rate: Learning rate.
        weight_decay: Decoupled weight decay.
        warmup: Steps of linear warm-up.
        schedule: `"constant"`, `"linear"` or `"cosine"`.
        gradient_clip: Largest norm of the gradient; 0 for none.
        accumulation: Parts of a batch that one process works through before an update.
        mixed_precision: `"no"`, `"bf16"` or `"fp16"`.
        hidden: Width of the tuned models (section 4.1).
        layers: Blocks of the tuned models (section 4.1).
        heads: Attention heads of all models.
        dropout: Dropout of all models.
        base_hidden: Width of the base model (section 4.1).
        base_layers: Blocks of the base model (section 4.1).
        points: Size of the grid of weights; None: 11, 15, 20 for 2, 3, 4 objectives and 11 above.
        scales: Distances from the base model, c of equation (14), at which the front is evaluated besides 1.
        k: Cut of NDCG.
        gain: Gain of NDCG, `"linear"` (equation 22) or `"exponential"`.
        empty: What a list without labels counts in NDCG: `"skip"`, 0 or 1.
        bootstrap: Resamples of the lists for intervals; 0 for none.
        seed: Seed of initialisation, batches, weights, temperatures and bootstrap.
        log_every: Steps from one line of the log to the next.
        checkpoint_every: Steps from one checkpoint to the next.
        tensorboard: Also write TensorBoard files.
        device: `"auto"` or `"cpu"`.
    """

    # What a record that lacks a setting means by it: a version without patience trained all steps.
    WHERE_MISSING: ClassVar[Mapping[str, Any]] = {"patience": 0}

    data: str = "travel"
    data_seed: int = 0
    objectives: tuple[str, ...] = ()
    normalize_features: str | None = None
    method: str = "weight-cos-dpo"
    base: str | None = None
    loss: Literal["listnet", "plackett-luce"] = "listnet"
    ties: Literal["breslow", "efron", "exact", "random"] = "breslow"
    last_group: Literal["charged", "free"] = "charged"
    top_k: int | None = None
    temperature: tuple[float, ...] = (1.0,)
    temperature_range: tuple[float, float] = (0.67, 1.5)
    alpha: float = 0.5
    weights_per: Literal["list", "step"] = "list"
    parametrisation: Literal["scratch", "augment"] = "augment"
    penalty: float = 0.0
    penalty_sign: Literal["as_printed", "cosmos"] = "as_printed"
    steps: int | None = None
    base_steps: int | None = None
    patience: int = 6
    validate_every: int | None = None
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.0
    warmup: int = 20
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    gradient_clip: float = 1.0
    accumulation: int = 1
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    dropout: float = 0.0
    base_hidden: int = 128
    base_layers: int = 2
    points: int | None = None
    scales: tuple[float, ...] = (0.5, 2.0, 5.0)
    k: int = 10
    gain: Literal["linear", "exponential"] = "linear"
    empty: Literal["skip", 0, 1] = "skip"
    bootstrap: int = 1000
    seed: int = 0
    log_every: int = 50
    checkpoint_every: int = 200
    tensorboard: bool = False
    device: Literal["auto", "cpu"] = "auto"

    def __post_init__(self) -> None:
        check_bounds(self)
        # A run must find its data again from any directory, so paths are absolute from the start; label files beside
        # the data are found from there.
        object.__setattr__(self, "data", self.data if self.data.partition(":")[0] in EMBEDDED else located(self.data))
        object.__setattr__(self, "objectives", tuple(located_inside(spec) for spec in self.objectives))
        if self.base is not None:
            object.__setattr__(self, "base", located(self.base))
        check_choice(self.method, (*METHODS, ALL), "method")
        check_choice(self.weights_per, ("list", "step"), "weights_per")
        check_choice(self.parametrisation, PARAMETRISATIONS, "parametrisation")
        check_choice(self.penalty_sign, ("as_printed", "cosmos"), "penalty_sign")
        check_choice(self.ties, ("breslow", "efron", "exact", "random"), "ties")
        check_choice(self.last_group, ("charged", "free"), "last_group")
        object.__setattr__(self, "gain", renamed("gain", self.gain, stacklevel=4))
        check_choice(self.gain, ("linear", "exponential"), "gain")
        check_choice(self.empty, ("skip", 0, 1), "empty")
        check_choice(self.device, ("auto", "cpu"), "device")
        positive = {"alpha": (self.alpha,), "temperature": self.temperature, "scales": self.scales,
                    "temperature_range": self.temperature_range}  # fmt: skip
        for name, values in positive.items():
            if not all(math.isfinite(x) and x > 0 for x in values):
                raise ValueError(f"{name} is {' '.join(f'{x:g}' for x in values)} but must be positive and finite")
        low, high = self.temperature_range
        if not self.temperature or low > high:
            raise ValueError("temperature needs a number, and temperature_range a lower and then an upper end")
        if not math.isfinite(self.penalty):
            raise ValueError(f"penalty is {self.penalty} but must be a finite number")
        for name in ("batch_size", "k", "hidden", "layers", "base_hidden", "base_layers", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} but must be at least 1")
        for name in ("hidden", "base_hidden"):
            if getattr(self, name) % self.heads:
                raise ValueError(f"{name} is {getattr(self, name)} but heads = {self.heads} must divide it")
        if (self.top_k is not None and self.top_k < 1) or self.bootstrap < 0 or self.gradient_clip < 0:
            raise ValueError("top_k must be at least 1, bootstrap and gradient_clip must not be negative")
        if self.patience < 0:
            raise ValueError(f"patience is {self.patience} but must be at least 0, which trains all steps")
        if self.validate_every is not None and self.validate_every < 1:
            raise ValueError(f"validate_every is {self.validate_every} but must be at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout} but must be at least 0 and below 1")
        # Made here so that their own checks come before anything is read or written.
        _ = self.training(self.steps), self.training(self.base_steps), self.list_loss

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that are trained."""
        return METHODS if self.method == ALL else (self.method,)

    def training(self, steps: int | None) -> TrainingConfig:
        """Return the settings of a training of `steps` updates."""
        names = {f.name for f in dataclasses.fields(TrainingConfig)} & {f.name for f in dataclasses.fields(self)}
        values: dict[str, Any] = {name: getattr(self, name) for name in names - {"steps"}}
        values["gradient_clip"] = self.gradient_clip or None
        if steps is not None:
            values["steps"] = steps
        return TrainingConfig(**values)

    @property
    def list_loss(self) -> ListLoss:
        """The list loss."""
        return ListLoss(self.loss, self.ties, self.last_group, self.top_k)

    @property
    def measure(self) -> Measure:
        """How rankings are measured."""
        return Measure(k=self.k, gain=self.gain, empty=self.empty, samples=self.bootstrap, seed=self.seed)

    def temperatures(self, objectives: int) -> tuple[float, ...]:
        """Return β, one for each of m objectives.

        Raises:
            ValueError: If there is neither one nor one for each objective.
        """
        if len(self.temperature) not in (1, objectives):
            raise ValueError(
                f"temperature has {len(self.temperature)} numbers but there are {objectives} objectives; "
                "pass one for all, or one for each"
            )
        return self.temperature * objectives if len(self.temperature) == 1 else self.temperature

    def resolved(self, lists: int) -> RankConfig:
        """Return the settings with the numbers of steps that `lists` training lists ask for, where none were given."""
        epoch = math.ceil(lists / min(self.batch_size, lists))
        steps = max(200, 10 * epoch) if self.steps is None else self.steps
        base_steps = max(100, 3 * epoch) if self.base_steps is None else self.base_steps
        return dataclasses.replace(self, steps=steps, base_steps=base_steps)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values for JSON."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RankConfig:
        """Read back what `to_dict` gave; settings that a version had not yet get the value that means what it did.

        Raises:
            ValueError: If a setting is unknown, has another type or is refused.
        """
        return settings_from(cls, values)
