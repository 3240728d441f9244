"""Learning to rank with one model for every trade-off."""

from mopl.ranking.config import RankConfig
from mopl.ranking.data import Batch, RankingData
from mopl.ranking.loading import load
from mopl.ranking.model import ListTransformer, RankingModel, RankingModelConfig
from mopl.ranking.objectives import Objective
from mopl.ranking.recipe import rank
from mopl.ranking.runs import open_run

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
