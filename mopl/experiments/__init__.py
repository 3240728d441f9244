"""What every experiment is made of, whatever it trains: settings, run directories, stages, the methods of COS-DPO."""

from typing import TYPE_CHECKING

from mopl._lazy import names_of

if TYPE_CHECKING:
    from mopl.experiments.comparison import compare
    from mopl.experiments.run import FinishedRun, open_run, run_fronts

__all__ = ["FinishedRun", "compare", "open_run", "run_fronts"]

__getattr__, __dir__ = names_of(
    __name__,
    {
        ".comparison": ("compare",),
        ".run": ("FinishedRun", "open_run", "run_fronts"),
    },
)
