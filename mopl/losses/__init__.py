"""Losses on scores `(B, K)`, one value for each list and objective `(B, m)`, and the policy gradient on rewards.

**Derivatives.** The first derivative in reverse mode is exact, in closed form. Second and higher ones (`create_graph`,
Hessian-vector products), forward mode and the transforms of `torch.func` (`grad`, `vmap`, `hessian`) are exact too, by
autograd of the plain formula and at its cost. Losses over all pairs then hold the K x K pairs of every list at once.
`policy_gradient` and `kl_estimate` hold parts of themselves constant, as they say: their second derivatives do so too.
"""

from mopl.losses import scalarize
from mopl.losses.all_pairs import approx_ndcg, lambda_loss, pairwise_logistic
from mopl.losses.importance import ImportanceWeights, balance_weights, importance_weights
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
    "importance_weights",
    "balance_weights",
    "ImportanceWeights",
    "kl_estimate",
    "group_mean",
    "value_loss",
    "normalize_labels",
    "presort",
    "scalarize",
]
