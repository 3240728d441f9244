"""Learning to rank with one model for every trade-off.

Names are imported on first use, so that the command line can list its options without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mopl.ranking.batch import Batch
    from mopl.ranking.config import RankConfig
    from mopl.ranking.data import RankingData
    from mopl.ranking.loading import load
    from mopl.ranking.model import ListTransformer, RankingModel, RankingModelConfig
    from mopl.ranking.objectives import Objective
    from mopl.ranking.recipe import rank
    from mopl.ranking.runs import open_run

_HOMES = {
    "Batch": "batch",
    "ListTransformer": "model",
    "Objective": "objectives",
    "RankConfig": "config",
    "RankingData": "data",
    "RankingModel": "model",
    "RankingModelConfig": "model",
    "load": "loading",
    "open_run": "runs",
    "rank": "recipe",
}

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


def __getattr__(name: str) -> Any:
    """Import the module of a name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List the names beside what is loaded."""
    return sorted({*globals(), *__all__})
