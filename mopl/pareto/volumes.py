"""What an exact hypervolume costs, how a long one is waited for, and what stands in for it in a bootstrap.

The exact algorithm needs about n^(m - 3) operations for n points in m objectives, so ten points more can mean minutes.
The decisions here depend on n and m alone, never on a clock: a run that is done again decides the same.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

LONG, TOO_LONG = 10.0, 3600.0  # seconds: what is announced, what is refused
BOOTSTRAP = 20.0  # seconds that the exact volumes of a bootstrap may take
DIRECTIONS = 10_000  # of the approximation, which then errs by a few thousandths


def seconds(points: int, objectives: int) -> float:
    """Return about how long the exact hypervolume of points that do not dominate each other takes on one core.

    Fitted to moocore 0.3.2 for 5 to 10 objectives and 20 to 120 points, right within a factor of 3.
    """
    return 3e-9 * points**3 * (points / 6.3) ** (objectives - 6) if objectives > 4 else 1e-7 * points**2


def check_affordable(points: int, objectives: int) -> None:
    """Raise if an exact hypervolume would take more than an hour.

    Raises:
        ValueError: With the time and the remedy.
    """
    needed = seconds(points, objectives)
    if needed > TOO_LONG:
        raise ValueError(
            f"the exact hypervolume of {points} points in {objectives} objectives would take about "
            f"{_in_words(needed)}; take fewer points"
        )


def _in_words(time: float) -> str:
    for name, unit in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if time >= 2 * unit:
            return f"{time / unit:,.0f} {name}" if time < 1e4 * unit else f"more than 10,000 {name}"
    return f"{time:.0f} seconds"


def patiently(call: Callable[[], float], points: int, objectives: int) -> float:
    """Return what a computation of a hypervolume gives; a long one is announced and can be stopped by Ctrl-C.

    Raises:
        ValueError: As `check_affordable`.
    """
    check_affordable(points, objectives)
    needed = seconds(points, objectives)
    if needed < LONG:
        return call()
    warnings.warn(
        f"the exact hypervolume of {points} points in {objectives} objectives takes about {_in_words(needed)}",
        RuntimeWarning,
        stacklevel=4,
    )
    done: list[Any] = []

    def work() -> None:
        try:
            done.append(call())
        except BaseException as error:
            done.append(error)

    # C code does not see Ctrl-C; a thread that is waited for in pieces leaves the main one free to.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if isinstance(done[0], BaseException):
        raise done[0]
    return done[0]
