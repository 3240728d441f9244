"""The options that choose a trade-off, `--weights` and `--beta`, and what is said of weights that are none."""

import argparse
import math
from collections.abc import Sequence

from mopl._counted import counted, there_are
from mopl.experiments.settings import OldOption

_SLACK = 1e-4  # how far from 1 the sum may be, as in `mopl.conditioning.check_weights`


def add_trade_off(
    parser: argparse.ArgumentParser, *, without_weights: str | None = None, without_beta: str = "the run's", old: str
) -> None:
    """Add `--weights` and `--beta` to a command.

    Args:
        parser: Its parser.
        without_weights: What holds without weights; None: `check_trade_off` says that they are missing.
        without_beta: What holds without β.
        old: The name of `--beta` in earlier versions.
    """
    needed = "required" if without_weights is None else f"default: {without_weights}"
    parser.add_argument("--weights", nargs="+", type=float, metavar="W",
                        help="weights, one for each objective in the run's order, with spaces or commas between them; "
                        f"they must sum to 1 ({needed})")  # fmt: skip
    parser.add_argument("--beta", nargs="+", type=float, metavar="BETA", help="β, one for each objective, for "
                        f"temperature-cos-dpo (default: {without_beta})")  # fmt: skip
    parser.add_argument(old, dest="beta", nargs="+", type=float, action=OldOption, help=argparse.SUPPRESS)


def check_trade_off(weights: Sequence[float] | None, objectives: Sequence[str]) -> None:
    """Raise unless weights are one for each of these objectives, none below 0, of the sum 1."""
    example, names = " ".join(example_weights(len(objectives))), ", ".join(objectives)
    if weights is None:
        raise ValueError(f"--weights is missing; pass one number for each objective: --weights {example} ({names})")
    given, total = " ".join(f"{w:g}" for w in weights), sum(weights)
    if len(weights) != len(objectives):
        raise ValueError(
            f"--weights has {counted(len(weights), 'number')} but {there_are(len(objectives), 'objective')}: {names}; "
            f"pass one for each, such as --weights {example}"
        )
    if not all(0 <= w < math.inf for w in weights) or total == 0:
        raise ValueError(
            f"--weights is {given} but must be shares of 1, none below 0; pass such as --weights {example} ({names})"
        )
    if abs(total - 1) > _SLACK:
        first = [round(w / total, 3) for w in weights[:-1]]
        found = [*first, abs(round(1 - math.fsum(first), 3))]
        if not all(found) or not math.isfinite(total):  # thousandths would drop an objective
            found = [w / total for w in weights] if math.isfinite(total) else [1 / len(weights)] * len(weights)
        shares = " ".join(f"{w:.6g}" for w in found)
        raise ValueError(f"--weights is {given}, of the sum {total:g}, but must sum to 1; pass --weights {shares}")


def example_weights(objectives: int) -> list[str]:
    """Return a half for the first objective, the rest shared."""
    if objectives == 1:
        return ["1"]
    rest = [math.floor(500 / (objectives - 1) + 0.5 * (objectives < 10)) / 1000] * (objectives - 2)
    return [f"{w:g}" for w in (0.5, *rest, round(0.5 - sum(rest), 3))]
