"""Learning to rank with one model for every trade-off."""

from mopl.ranking.data import Batch, RankingData
from mopl.ranking.loading import load
from mopl.ranking.objectives import Objective

__all__ = ["Batch", "Objective", "RankingData", "load"]
