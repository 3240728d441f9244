"""Matrix products whose float32 sums are kept: on a GPU the operands stay 16 bit and the result is float32.

What torch offers for that depends on its version and on the device:

* `torch.mm(a, b, out_dtype=torch.float32)` came with 2.8;
* `torch.addmm` on top of a float32 matrix came later: 2.8 refuses it, 2.11 has it;
* builds for ROCm refuse bf16 operands up to 2.9, GPUs before compute capability 8.0 refuse them in any version, and
  `torch.backends.cuda.matmul.allow_fp16_accumulation` takes away what float16 operands have.

So a product of 16 x 16 finds out once for each device and dtype; a refusal is raised on the host, without a wait. Where
a form is missing, the next best has the same digits: a product and an addition, or operands upcast to float32.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from mopl._arguments import compute_dtype
from mopl._extras import version_of

SIXTEEN = (torch.bfloat16, torch.float16)
SCRATCH = 2**26  # entries of a scratch, 256 MiB: 16384 rows of a product 4096 wide, which still fill a GPU


def operand_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    """Return the dtype in which a GPU multiplies two tensors: theirs if it is one of 16 bit, else the compute dtype."""
    return a.dtype if a.dtype == b.dtype and a.dtype in SIXTEEN else compute_dtype(a, b)


def product(a: Tensor, b: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """Return a @ b in the compute dtype, into `out` if given and on top of what it holds if `add`.

    Operands are float64, float32 or 16 bit, `out` is in the compute dtype: float64 if an operand is, else float32. The
    result of 16-bit operands is never rounded to 16 bit. On a CPU (and Triton's interpreter) operands are upcast.
    """
    dtype = compute_dtype(a, b)
    if out is None:
        # Also because autocast, which leaves products into given memory alone, would round those of upcast operands.
        out = torch.empty(a.shape[0], b.shape[1], dtype=dtype, device=a.device)
    if a.is_cuda and a.dtype in SIXTEEN and a.dtype == b.dtype:
        restricted = a.dtype == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation
        form = _assumed_form() if is_fake(a) else _form(a.device, a.dtype, restricted)
        return multiply(form, a, b, out, add)
    return _float_product(a.to(dtype), b.to(dtype), out, add)


def multiply(form: str, a: Tensor, b: Tensor, out: Tensor, add: bool) -> Tensor:
    """Form a @ b for operands of one 16-bit dtype in float32 `out`, in one of the forms that `_form` finds."""
    if form != "upcast" and not add:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    if form == "addmm":
        return _add_product(a, b, out)
    # In parts, so that neither a second float32 result nor an upcast operand takes the memory of the whole.
    many = max(SCRATCH // max(b.shape[1], a.shape[1], 1), 128)
    right = b.to(out.dtype) if form == "upcast" else b
    for first in range(0, a.shape[0], many):
        rows = slice(first, first + many)
        if form == "upcast":
            _float_product(a[rows].to(out.dtype), right, out[rows], add)
        else:
            out[rows] += torch.mm(a[rows], b, out_dtype=out.dtype)
    return out


def _float_product(a: Tensor, b: Tensor, out: Tensor, add: bool) -> Tensor:
    return out.addmm_(a, b) if add else torch.mm(a, b, out=out)


def _add_product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    if is_fake(a):  # which computes shapes and has no such function for this one's result (torch 2.13)
        torch.mm(a, b, out_dtype=out.dtype)
        return out
    return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


def is_fake(x: Tensor) -> bool:
    """Say whether a tensor has a shape alone, as a compiler traces it."""
    return isinstance(x, torch._subclasses.FakeTensor)


def _assumed_form() -> str:
    """Return the form of a GPU that is not there: tensors that have shapes alone, as a compiler traces them."""
    return "addmm" if version_of(torch.__version__) >= (2, 10) else "upcast" if torch.version.hip else "mm"


@functools.cache
def _form(device: torch.device, dtype: torch.dtype, restricted: bool) -> str:
    """Return "addmm", "mm" or "upcast": the fastest form that the device takes; `restricted` only tells cases apart."""
    a = torch.zeros(16, 16, dtype=dtype, device=device)
    out = torch.zeros(16, 16, device=device)
    refusal = ""
    for form, add in (("addmm", True), ("mm", False)):
        try:
            multiply(form, a, a, out, add)
        except (RuntimeError, TypeError) as error:
            if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)):
                raise  # this says nothing about the form
            refusal = str(error).splitlines()[0]
        else:
            return form
    name = str(dtype).removeprefix("torch.")
    remedy = (
        "unset torch.backends.cuda.matmul.allow_fp16_accumulation"
        if restricted
        else "use torch 2.10 or later"
        if torch.version.hip
        else "use torch 2.8 or later and, for bfloat16, a GPU of compute capability 8.0 or later"
    )
    warnings.warn(
        f"torch {torch.__version__} has no product of {name} operands with a float32 result on {device} ({refusal}). "
        f"mopl multiplies operands upcast to float32 instead: as exact, but about ten times slower, and it takes more "
        f"memory. To cure this, {remedy}",
        stacklevel=3,
    )
    return "upcast"
