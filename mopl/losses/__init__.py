"""Losses on scores `(B, K)`, one value for each list and objective `(B, m)`, and the policy gradient on rewards."""

from mopl.losses import scalarize
from mopl.losses.all_pairs import approx_ndcg, lambda_loss, pairwise_logistic
from mopl.losses.labels import normalize_labels, presort
from mopl.losses.listwise import listwise_dpo, plackett_luce
from mopl.losses.pairwise import DPOLoss, bradley_terry
from mopl.losses.policy_gradient import PolicyGradient, group_mean, kl_estimate, policy_gradient, value_loss

__all__ = [
    "listwise_dpo",
    "plackett_luce",
    "bradley_terry",
    "DPOLoss",
    "pairwise_logistic",
    "lambda_loss",
    "approx_ndcg",
    "policy_gradient",
    "PolicyGradient",
    "kl_estimate",
    "group_mean",
    "value_loss",
    "normalize_labels",
    "presort",
    "scalarize",
]
