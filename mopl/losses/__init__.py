"""Losses on scores `(B, K)`: pure formulas that give one value for each list and objective, `(B, m)`."""

from mopl.losses import scalarize
from mopl.losses.all_pairs import approx_ndcg, lambda_loss, pairwise_logistic
from mopl.losses.pairwise import DPOLoss, bradley_terry

__all__ = [
    "bradley_terry",
    "DPOLoss",
    "pairwise_logistic",
    "lambda_loss",
    "approx_ndcg",
    "scalarize",
]
