"""The Plackett-Luce likelihood: `function.py` has its mathematics and leads on to the kernels or to the CPU path."""

from mopl.ops.plackett_luce.function import check_ends, check_positions, nll, plackett_luce_nll
from mopl.ops.plackett_luce.rankings import Lists, Rule

__all__ = ["Lists", "Rule", "check_ends", "check_positions", "nll", "plackett_luce_nll"]
