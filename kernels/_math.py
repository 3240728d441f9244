"""Elementary functions that Triton's language lacks, shared by the kernels."""

import triton
import triton.language as tl


@triton.jit
def log1p(x):
    """Return log(1 + x) for finite x > -1 to the last digits, also where x is tiny.

    With w the rounded 1 + x, log(w) / (w - 1) is smooth, so that the rounding of w hardly matters, and w - 1 is exact
    (Higham, Accuracy and Stability of Numerical Algorithms, section 1.14.1). It needs a log whose *relative* error is
    small near 1: tl.log compiles to a library function, not to the approximate lg2 instruction.
    """
    w = 1 + x
    return tl.where(w == 1, x, x * (tl.log(w) / (w - 1)))
