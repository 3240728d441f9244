"""The settings of `mopl rank` in one dataclass: what is checked before anything is read or written."""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mopl._renamed import warn_renamed
from mopl.experiments.common_settings import ALL, CosDpoSettings
from mopl.experiments.methods import CONDITIONED, METHODS, TABLE
from mopl.experiments.resume_settings import located, located_inside
from mopl.experiments.settings import in_data, in_evaluation, in_method, in_training, setting, settings

if TYPE_CHECKING:
    from typing_extensions import Self

    from mopl.experiments.cos_dpo import ListLoss
    from mopl.ranking.evaluate import Measure

__all__ = ["ALL", "CONDITIONED", "EMBEDDED", "METHODS", "RankConfig"]

EMBEDDED = ("travel", "synthetic")
FEWEST_STEPS = 200  # of a tuned model, where none are given


def _located_data(data: str) -> str:
    """Return files and folders by absolute paths, since a run must find its data again from any directory."""
    return data if data.partition(":")[0] in EMBEDDED else located(data)


@settings
class RankConfig(CosDpoSettings):
    """Settings of a ranking run. Every default is ours unless a section of the paper (Ren et al.) is named."""

    # What a record that lacks a setting means by it: a version without patience trained all steps.
    WHERE_MISSING: ClassVar[Mapping[str, Any]] = {"patience": 0, "conditioning": "concat", "average": 1}

    data: str = setting(
        "travel",
        "what to train on: travel, synthetic[:OPTION=VALUE,...], or a LETOR file or folder; see `mopl.ranking.load`",
        convert=_located_data,
        group="data",
        metavar="DATA",
        kw_only=False,
    )
    data_seed: int = setting(0, "random seed for drawn splits and generated data, which do not depend on seed")
    objectives: tuple[str, ...] = in_data(
        (),
        "auxiliary objectives, such as clicks=134 price=7:min:softmax dwell=@dwell.txt",
        unset="those of the data",
        convert=located_inside,
        metavar="SPEC",
    )
    normalize_features: str | None = in_data(
        None,
        "how features are normalised: none, global, query or query-minmax, alone or after log1p+",
        unset="that of the data",
        metavar="HOW",
    )
    base: str | None = in_method(
        None,
        "trained base model: a run, or a folder with a model",
        unset="one is trained",
        convert=located,
        metavar="DIR",
    )
    loss: Literal["listnet", "plackett-luce"] = in_method("listnet", "list loss; listnet is the paper's")
    beta: tuple[float, ...] = setting((1.0,), old="temperature")
    beta_range: tuple[float, float] = setting((0.67, 1.5), old="temperature_range")
    parametrisation: Literal["scratch", "augment"] = in_method(
        "augment",
        "augment: the network's output is added to the base model's scores, which needs fewer steps and is "
        "closed under equation (14); scratch: it is the scores (appendix A.6.3 has both)",
    )
    conditioning: Literal["concat", "heads", "mixture"] | None = in_method(
        None,
        "how weights enter a conditioned model; concat: appended to the features of every item, as in the paper "
        "(section 4.1); heads: the same, plus one output of the network for each objective, summed with the weights; "
        "mixture: these outputs alone, mixed as the best scores for weighted losses are, which needs the fewest steps",
        unset="mixture",
    )
    steps: int | None = setting(
        None,
        "optimizer steps of each tuned model; the base model has --base-steps",
        unset="10 epochs, at least 200",
        of_new=1,
    )
    average: int = in_training(
        1,
        "trainings of an equal share of the steps, from one start with the lists in other orders, whose parameters are "
        "averaged into each tuned model; 2 helps where there are enough steps to overfit",
        at_least=1,
        metavar="N",
    )
    base_steps: int | None = in_training(
        None, "optimizer steps of the base model", unset="3 epochs, at least 100", at_least=0, of_new=1
    )
    patience: int = in_training(
        6,
        "validations without improvement before training stops; the best step is kept. 0: train for all "
        "steps and keep the last",
        at_least=0,
        metavar="N",
    )
    validate_every: int | None = in_training(
        None, "steps between validations", unset="a twentieth of the steps, at least 5", at_least=1, metavar="STEPS"
    )
    batch_size: int = in_training(64, "lists per batch", at_least=1, metavar="LISTS")
    learning_rate: float = setting(3e-3, "learning rate of AdamW after the warm-up")
    warmup: int = setting(20)
    hidden: int = in_training(64, "width of the tuned models (section 4.1)", at_least=1)
    layers: int = in_training(2, "layers of the tuned models (section 4.1)", at_least=1)
    heads: int = in_training(4, "attention heads of every model", at_least=1)
    dropout: float = in_training(0.0, "dropout of every model", at_least=0, below=1)
    base_hidden: int = in_training(128, "width of the base model (section 4.1)", at_least=1)
    base_layers: int = in_training(2, "layers of the base model (section 4.1)", at_least=1)
    scales: tuple[float, ...] = setting((0.5, 2.0, 5.0))
    points: int | None = setting(
        None, unset="11, 28, 35 for 2, 3, 4 objectives, 32 or more above; 11, 10, 11, 12 where dpo-ls or mo-dpo train "
        "a model for each"
    )  # fmt: skip
    k: int = in_evaluation(10, "cutoff of NDCG", at_least=1)
    gain: Literal["linear", "exponential"] = in_evaluation(
        "linear", "gain of NDCG: the label (equation 22), or 2^label - 1"
    )
    empty: Literal["skip", 0, 1] = in_evaluation("skip", "NDCG of a query without labels; skip leaves the query out")
    log_every: int = setting(50)
    checkpoint_every: int = setting(200)

    def check_together(self) -> None:
        """Raise if two settings do not go together."""
        super().check_together()
        for name in ("hidden", "base_hidden"):
            if getattr(self, name) % self.heads:
                raise ValueError(f"{name} is {getattr(self, name)} but heads is {self.heads}, which must divide it")
        if self.average > max(least := FEWEST_STEPS if self.steps is None else self.steps, 1):
            raise ValueError(
                f"average is {self.average} but steps is {least}, which the trainings share; take more steps, or a "
                "smaller average"
            )
        if self.conditioning not in (None, "concat") and not set(CONDITIONED) & set(self.methods):
            raise ValueError(
                f"conditioning is {self.conditioning!r} but method {self.method!r} trains no conditioned model; leave "
                "conditioning out, or take a method that does, such as weight-cos-dpo"
            )

    def temperatures(self, objectives: int) -> tuple[float, ...]:
        """Return `betas`, whose name this was."""
        warn_renamed("temperatures", "betas", stacklevel=2)
        return self.betas(objectives)

    @property
    def conditions_by(self) -> Literal["concat", "heads", "mixture"]:
        """`conditioning`, or where none is given what a run takes: mixture, or concat if it has no part in the run."""
        return self.conditioning or ("mixture" if set(CONDITIONED) & set(self.methods) else "concat")

    @property
    def grid_density(self) -> Literal["dense", "medium"]:
        """Dense unless a method trains a model for each point of the grid."""
        return "medium" if any(TABLE[method].grid for method in self.methods) else "dense"

    @property
    def list_loss(self) -> "ListLoss":
        """The list loss."""
        from mopl.experiments.cos_dpo import ListLoss

        return ListLoss(self.loss, self.ties, self.last_group, self.top_k)

    @property
    def measure(self) -> "Measure":
        """How rankings are measured."""
        from mopl.ranking.evaluate import Measure

        return Measure(k=self.k, gain=self.gain, empty=self.empty)

    def resolved(self, lists: int) -> "Self":
        """Return the settings with what `lists` training lists ask for, where none was given: steps, conditioning."""
        epoch = math.ceil(lists / min(self.batch_size, lists))
        steps = max(FEWEST_STEPS, 10 * epoch) if self.steps is None else self.steps
        base_steps = max(100, 3 * epoch) if self.base_steps is None else self.base_steps
        return dataclasses.replace(self, steps=steps, base_steps=base_steps, conditioning=self.conditions_by)
