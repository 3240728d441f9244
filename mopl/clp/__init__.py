"""CLP: policies trained on rewards for every trade-off, steered by mixing parameters, and what they are compared with.

Names are imported on first use, so that the command line can list its options without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mopl.clp.config import ClpConfig
    from mopl.clp.loss import PolicyCollapsed
    from mopl.clp.recipe import train_policies
    from mopl.clp.runs import open_run

_HOMES = {"ClpConfig": "config", "PolicyCollapsed": "loss", "open_run": "runs", "train_policies": "recipe"}

__all__ = ["ClpConfig", "PolicyCollapsed", "open_run", "train_policies"]


def __getattr__(name: str) -> Any:
    """Import the module of a name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List the names beside what is loaded."""
    return sorted({*globals(), *__all__})
