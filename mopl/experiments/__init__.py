"""What every experiment is made of, whatever it trains: settings, run directories, stages, the methods of COS-DPO.

Names are imported on first use, so that the command line can list its options without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mopl.experiments.run import FinishedRun, compare, open_run, run_fronts

__all__ = ["FinishedRun", "compare", "open_run", "run_fronts"]


def __getattr__(name: str) -> Any:
    """Import the module of a name when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("mopl.experiments.run"), name)


def __dir__() -> list[str]:
    """List the names beside what is loaded."""
    return sorted({*globals(), *__all__})
