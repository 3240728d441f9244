"""Learning to rank with one model for every trade-off."""

from typing import TYPE_CHECKING

from mopl._lazy import names_of

if TYPE_CHECKING:
    from mopl.ranking.batch import Batch
    from mopl.ranking.config import RankConfig
    from mopl.ranking.data import RankingData
    from mopl.ranking.loading import load
    from mopl.ranking.model import RankingModel, RankingModelConfig
    from mopl.ranking.objectives import Objective
    from mopl.ranking.recipe import rank
    from mopl.ranking.runs import open_run
    from mopl.ranking.transformer import ListTransformer

__all__ = [
    "Batch",
    "ListTransformer",
    "Objective",
    "RankConfig",
    "RankingData",
    "RankingModel",
    "RankingModelConfig",
    "load",
    "open_run",
    "rank",
]

__getattr__, __dir__ = names_of(
    __name__,
    {
        ".batch": ("Batch",),
        ".model": ("RankingModel", "RankingModelConfig"),
        ".objectives": ("Objective",),
        ".config": ("RankConfig",),
        ".data": ("RankingData",),
        ".loading": ("load",),
        ".runs": ("open_run",),
        ".recipe": ("rank",),
        ".transformer": ("ListTransformer",),
    },
)
