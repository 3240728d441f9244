"""CLP: policies trained on rewards for every trade-off, steered by mixing parameters, and their baselines."""

from typing import TYPE_CHECKING

from mopl._lazy import names_of

if TYPE_CHECKING:
    from mopl.clp.config import ClpConfig
    from mopl.clp.loss import PolicyCollapsed
    from mopl.clp.recipe import train_policies
    from mopl.clp.rollout_server import RolloutServerError
    from mopl.clp.runs import open_run

__all__ = ["ClpConfig", "PolicyCollapsed", "RolloutServerError", "open_run", "train_policies"]

__getattr__, __dir__ = names_of(
    __name__,
    {
        ".config": ("ClpConfig",),
        ".loss": ("PolicyCollapsed",),
        ".runs": ("open_run",),
        ".recipe": ("train_policies",),
        ".rollout_server": ("RolloutServerError",),
    },
)
