"""Losses on scores `(B, K)`: pure formulas that give one value for each list and objective, `(B, m)`."""

from mopl.losses import scalarize
from mopl.losses.all_pairs import approx_ndcg, lambda_loss, pairwise_logistic
from mopl.losses.labels import normalize_labels, presort
from mopl.losses.listwise import listwise_dpo, plackett_luce
from mopl.losses.pairwise import DPOLoss, bradley_terry

__all__ = [
    "listwise_dpo",
    "plackett_luce",
    "bradley_terry",
    "DPOLoss",
    "pairwise_logistic",
    "lambda_loss",
    "approx_ndcg",
    "normalize_labels",
    "presort",
    "scalarize",
]
