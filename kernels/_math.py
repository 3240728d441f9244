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


@triton.jit
def quotient(x, y):
    """Return x / y rounded to nearest: on NVIDIA GPUs `/` of float32 is an approximation within two units."""
    if y.dtype == tl.float32:
        return tl.div_rn(tl.zeros_like(y) + x, y)
    else:
        return x / y


@triton.jit
def bend(x):
    """Return tanh(x) and 1 - tanh(x)^2, both to their last digits, where tanh is flat as well as near 0."""
    t = tl.exp2(tl.abs(x) * -2.8853900817779268)  # exp(-2 |x|)
    # 1 / (1 + t) by the reciprocal square root and a step of Newton's: a third of the instructions of a division.
    w = 1.0 + t
    share = tl.rsqrt(w)
    share = share * share
    share = tl.fma(share, tl.fma(-w, share, tl.zeros_like(w) + 1.0), share)
    y = (1.0 - t) * share
    square = x * x
    # 1 - t has lost digits near 0, the series has not.
    y = tl.where(square < 1e-4, tl.abs(x) * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0))), y)
    return tl.where(x < 0, -y, y), 4.0 * t * share * share
