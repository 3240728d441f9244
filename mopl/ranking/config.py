"""The settings of `mopl rank` in one dataclass: what is checked before anything is read or written."""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mopl._renamed import warn_renamed
from mopl.experiments.common_settings import ALL, CosDpoSettings
from mopl.experiments.methods import CONDITIONED, METHODS
from mopl.experiments.resume_settings import located, located_inside
from mopl.experiments.settings import setting, settings

if TYPE_CHECKING:
    from typing_extensions import Self

    from mopl.experiments.cos_dpo import ListLoss
    from mopl.ranking.evaluate import Measure

__all__ = ["ALL", "CONDITIONED", "EMBEDDED", "METHODS", "RankConfig"]

EMBEDDED = ("travel", "synthetic")


def _located_data(data: str) -> str:
    """Return files and folders by absolute paths, since a run must find its data again from any directory."""
    return data if data.partition(":")[0] in EMBEDDED else located(data)


@settings
class RankConfig(CosDpoSettings):
    """Settings of a ranking run. Every default is ours unless a section of the paper (Ren et al.) is named."""

    # What a record that lacks a setting means by it: a version without patience trained all steps.
    WHERE_MISSING: ClassVar[Mapping[str, Any]] = {"patience": 0}

    data: str = setting(
        "travel",
        "travel, synthetic[:OPTION=VALUE,...], or a LETOR file or folder; see `mopl.ranking.load`",
        convert=_located_data,
        group="data",
        metavar="DATA",
        kw_only=False,
    )
    data_seed: int = setting(0, "random seed for drawn splits and generated data, which do not depend on seed")
    objectives: tuple[str, ...] = setting(
        (),
        "auxiliary objectives, such as clicks=134 price=7:min:softmax dwell=@dwell.txt",
        unset="those of the data",
        convert=located_inside,
        group="data",
        metavar="SPEC",
    )
    normalize_features: str | None = setting(
        None,
        "how features are normalised: none, global, query or query-minmax, alone or after log1p+",
        unset="that of the data",
        group="data",
        metavar="HOW",
    )
    base: str | None = setting(
        None,
        "trained base model: a run, or a folder with a model",
        unset="one is trained",
        convert=located,
        group="method",
        metavar="DIR",
    )
    loss: Literal["listnet", "plackett-luce"] = setting("listnet", "list loss; listnet is the paper's", group="method")
    beta: tuple[float, ...] = setting((1.0,), old="temperature")
    beta_range: tuple[float, float] = setting((0.67, 1.5), old="temperature_range")
    parametrisation: Literal["scratch", "augment"] = setting(
        "augment",
        "augment: the network's output is added to the base model's scores, which needs fewer steps and is "
        "closed under equation (14); scratch: it is the scores (appendix A.6.3 has both)",
        group="method",
    )
    steps: int | None = setting(None, unset="10 epochs, at least 200")
    base_steps: int | None = setting(
        None, "optimizer steps of the base model", unset="3 epochs, at least 100", at_least=0, group="training"
    )
    patience: int = setting(
        6,
        "validations without improvement before training stops; the best step is kept. 0: train for all "
        "steps and keep the last",
        at_least=0,
        group="training",
        metavar="N",
    )
    validate_every: int | None = setting(
        None,
        "steps between validations",
        unset="a twentieth of the steps, at least 5",
        at_least=1,
        group="training",
        metavar="STEPS",
    )
    batch_size: int = setting(64, "lists per batch", at_least=1, group="training", metavar="LISTS")
    learning_rate: float = setting(3e-3, "learning rate of AdamW after the warm-up")
    warmup: int = setting(20)
    hidden: int = setting(64, "width of the tuned models (section 4.1)", at_least=1, group="training")
    layers: int = setting(2, "layers of the tuned models (section 4.1)", at_least=1, group="training")
    heads: int = setting(4, "attention heads of every model", at_least=1, group="training")
    dropout: float = setting(0.0, "dropout of every model", at_least=0, below=1, group="training")
    base_hidden: int = setting(128, "width of the base model (section 4.1)", at_least=1, group="training")
    base_layers: int = setting(2, "layers of the base model (section 4.1)", at_least=1, group="training")
    scales: tuple[float, ...] = setting((0.5, 2.0, 5.0))
    k: int = setting(10, "cutoff of NDCG", at_least=1, group="evaluation")
    gain: Literal["linear", "exponential"] = setting(
        "linear", "gain of NDCG: the label (equation 22), or 2^label - 1", group="evaluation"
    )
    empty: Literal["skip", 0, 1] = setting(
        "skip", "NDCG of a query without labels; skip leaves the query out", group="evaluation"
    )
    log_every: int = setting(50)
    checkpoint_every: int = setting(200)

    def check_together(self) -> None:
        """Raise if two settings do not go together."""
        super().check_together()
        for name in ("hidden", "base_hidden"):
            if getattr(self, name) % self.heads:
                raise ValueError(f"{name} is {getattr(self, name)} but heads = {self.heads} must divide it")

    def temperatures(self, objectives: int) -> tuple[float, ...]:
        """Return `betas`, whose name this was."""
        warn_renamed("temperatures", "betas", stacklevel=2)
        return self.betas(objectives)

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
        """Return the settings with the numbers of steps that `lists` training lists ask for, where none were given."""
        epoch = math.ceil(lists / min(self.batch_size, lists))
        steps = max(200, 10 * epoch) if self.steps is None else self.steps
        base_steps = max(100, 3 * epoch) if self.base_steps is None else self.base_steps
        return dataclasses.replace(self, steps=steps, base_steps=base_steps)
