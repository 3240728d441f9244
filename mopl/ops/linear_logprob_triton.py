"""The four stages of `linear_logprob` on a GPU: products by the vendor's library, everything around them in Triton.

The same functions as `_linear_logprob_cpu`, whose docstrings say what each argument and result is. Here:

* Products of 16-bit operands write float32 (`out_dtype`), so logits are never rounded to 16 bit. On tensors of a CPU
  (Triton's interpreter) operands are upcast instead.
* The exponentials kept for the second and third product are bf16: it has float32's range, and its rounding is that of
  any 16-bit gradient. float16 operands have no such range to offer: their rows are summed once first and then
  normalised, which costs one more product, but no digits; and upstream gradients are scaled by their largest.
* Rows are processed in chunks of `ROWS`, logits in tiles of `COLUMNS` that stay in the L2 cache.
* Nothing here waits for the GPU: rows that do not count are at the end, and kernels leave them out by `count`.
"""

# Pyright takes a kernel for the plain function below `@triton.jit`.
# pyright: reportIndexIssue=false

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from mopl._arguments import compute_dtype
from mopl.kernels import fused_logprob as fused_kernels
from mopl.kernels import linear_logprob as kernels
from mopl.ops import _linear_logprob_choice as choice
from mopl.ops._backend import INTERPRETED

ROWS = 4096  # rows of a chunk: above about 733 the float32 read-modify-write of dW costs less than its product
COLUMNS = 2048  # columns of a tile of logits: 4096 x 2048 in float32 are 32 MiB, which the L2 cache of an H200 holds
STORE_ROWS = 2048  # rows of a chunk whose exponentials are stored over the whole vocabulary
HEADROOM = 8.0  # nats: normalised exponentials, and their products with u - shift, stay below float16's 65504
SIXTEEN = (torch.bfloat16, torch.float16)


def on_its_device(stage: Callable) -> Callable:
    """Run a stage on the GPU of its first argument, which Triton would not look at."""

    @functools.wraps(stage)
    def run(first: Tensor, *rest: object):
        with torch.cuda.device_of(first):
            return stage(first, *rest)

    return run


def wide_rows(rows: int, columns: int, like: Tensor) -> Tensor:
    """Return an empty (rows, columns) whose rows begin at multiples of 128 bytes, whatever the number of columns.

    Products of 16-bit operands are slow where rows are not aligned to 16 bytes, as with a vocabulary of 50257.
    """
    step = 128 // like.element_size()
    return like.new_empty(rows, -(-columns // step) * step)[:, :columns]


def product(a: Tensor, b: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """Return a @ b in the compute dtype, into `out` if given and on top of what it holds if `add`."""
    dtype = compute_dtype(a)
    if a.is_cuda and a.dtype in SIXTEEN and a.dtype == b.dtype:
        if add and out is not None:
            return torch.addmm(out, a, b, out_dtype=dtype, out=out)
        return torch.mm(a, b, out_dtype=dtype) if out is None else torch.mm(a, b, out_dtype=dtype, out=out)
    a, b = a.to(dtype), b.to(dtype)
    if add and out is not None:
        return out.addmm_(a, b)
    return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)


def same_dtype(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as they are if they share a dtype, else upcast to the compute dtype."""
    if hidden.dtype == weight.dtype:
        return hidden, weight
    dtype = compute_dtype(hidden, weight)
    return hidden.to(dtype), weight.to(dtype)


@on_its_device
def target_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, column: Tensor, position: Tensor | None, temperature: Tensor,
    softcap: float, logit_scale: float,
) -> Tensor:  # fmt: skip
    """Return u at the targets (F,), 0 where column is -1."""
    out = torch.empty(column.shape, dtype=compute_dtype(hidden, weight), device=hidden.device)
    hidden, weight = _rows(hidden), _rows(weight)
    if column.numel():
        kernels.target_logit_kernel[(column.numel(),)](
            hidden, weight, bias, column, position, temperature, out, hidden.shape[1], hidden.stride(0),
            weight.stride(0), SOFTCAP=softcap, LOGIT_SCALE=logit_scale, **kernels.TARGET_TILE,
        )  # fmt: skip
    return out


def _rows(x: Tensor) -> Tensor:
    """Return a matrix whose rows are contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _Sums:
    """The vectors that a pass over the vocabulary fills."""

    def __init__(self, rows: int, moments: int, dtype: torch.dtype, device: torch.device) -> None:
        def zeros(wanted: bool) -> Tensor:
            return torch.zeros(rows if wanted else 0, dtype=dtype, device=device)

        self.others, self.moment1, self.moment2 = zeros(True), zeros(moments > 0), zeros(moments > 1)
        self.flag = torch.zeros(rows, dtype=torch.int8, device=device)
        self.moments = moments

    def normalise(self, rows: slice, shift: Tensor) -> None:
        """Move the shift of some rows so that their exponentials add up to exp(`HEADROOM`).

        A row whose target takes all but 1e-26 of the probability keeps a smaller sum: exp(u - shift) of the target has
        to stay finite.
        """
        others = self.others[rows]
        delta = others.log().clamp(min=-60.0) - HEADROOM
        factor = (-delta).exp()
        if self.moments > 1:
            moment2 = self.moment2[rows] - delta * (2 * self.moment1[rows] - delta * others)
            self.moment2[rows] = moment2 * factor
        if self.moments > 0:
            self.moment1[rows] = (self.moment1[rows] - delta * others) * factor
        self.others[rows] = others * factor
        shift[rows] += delta

    def optional(self) -> tuple[Tensor | None, Tensor | None]:
        return (self.moment1 if self.moments > 0 else None, self.moment2 if self.moments > 1 else None)


class _Head:
    """What every launch needs to know of the head and of the rows."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, pivot: Tensor, shift: Tensor, temperature: Tensor,
        softcap: float, logit_scale: float, count: Tensor | None,
    ) -> None:  # fmt: skip
        self.hidden, self.weight = (_rows(x) for x in same_dtype(hidden, weight))
        self.bias, self.pivot, self.shift, self.temperature = bias, pivot, shift, temperature
        self.softcap, self.logit_scale, self.count = softcap, logit_scale, count
        self.dtype = compute_dtype(hidden, weight)
        self.vocabulary, self.size = weight.shape
        self.narrow = self.hidden.dtype == torch.float16

    def scan(
        self,
        rows: slice,
        sums: _Sums,
        stored: Tensor | None = None,
        stored_moment: Tensor | None = None,
        bent: bool = False,
    ) -> None:
        """Pass once over the vocabulary for some rows: add up the sums and store exponentials (R, V) if asked."""
        first, many = rows.start, rows.stop - rows.start
        part = self.hidden[rows]
        moment1, moment2 = sums.optional()
        tile = torch.empty(many, min(COLUMNS, self.vocabulary), dtype=self.dtype, device=part.device)
        shape = kernels.exp_tile(self.dtype.itemsize)
        for column in range(0, self.vocabulary, COLUMNS):
            columns = min(COLUMNS, self.vocabulary - column)
            logits = product(part, self.weight[column : column + columns].T, tile[:, :columns])
            kernels.exp_kernel[(-(-many // shape["ROWS"]),)](
                logits, self.bias, self.pivot, self.shift, self.temperature, self.count,
                None if stored is None else stored[:, column:],
                None if stored_moment is None else stored_moment[:, column:],
                sums.others, moment1, moment2, sums.flag, first, many, column, columns, logits.stride(0),
                0 if stored is None else stored.stride(0),
                SOFTCAP=self.softcap, LOGIT_SCALE=self.logit_scale, BENT=bent, LIMIT=kernels.LIMIT, **shape,
            )  # fmt: skip

    def redo(
        self,
        rows: slice,
        sums: _Sums,
        stored: Tensor | None = None,
        stored_moment: Tensor | None = None,
        bent: bool = False,
    ) -> None:
        """Compute the flagged ones among some rows again, with their largest logit as shift."""
        many = rows.stop - rows.start
        moment1, moment2 = sums.optional()
        programs = min(many, 4 if INTERPRETED else 1024)
        kernels.redo_kernel[(programs,)](
            self.hidden, self.weight, self.bias, self.pivot, self.shift, self.temperature, self.count, stored,
            stored_moment, sums.others, moment1, moment2, sums.flag, rows.start, many, self.size, self.vocabulary,
            self.hidden.stride(0), self.weight.stride(0), 0 if stored is None else stored.stride(0),
            SOFTCAP=self.softcap, LOGIT_SCALE=self.logit_scale, BENT=bent, **kernels.redo_tile(self.dtype.itemsize),
        )  # fmt: skip

    def fused(self, sums: _Sums, tiles: dict[str, int]) -> None:
        """Sum over the vocabulary with the product and its epilogue in one kernel."""
        rows = self.hidden.shape[0]
        height, width = -(-rows // tiles["BM"]), -(-self.vocabulary // tiles["BV"])
        partial = torch.empty(width, rows, dtype=self.dtype, device=self.hidden.device)
        flag = torch.empty(width, rows, dtype=torch.int8, device=self.hidden.device)
        fused_kernels.fused_sum_kernel[(height * width,)](
            self.hidden, self.weight, self.bias, self.pivot, self.shift, self.temperature, self.count, partial, flag,
            rows, self.size, self.vocabulary, self.hidden.stride(0), self.weight.stride(0), SOFTCAP=self.softcap,
            LOGIT_SCALE=self.logit_scale, LIMIT=kernels.LIMIT, UPCAST=INTERPRETED, **tiles,
        )  # fmt: skip
        torch.sum(partial, 0, out=sums.others)
        torch.amax(flag, 0, out=sums.flag)

    def exponentials(self, rows: slice, sums: _Sums, stored: Tensor, stored_moment: Tensor | None, bent: bool) -> None:
        """Fill `stored` (R, V) and the sums; one more pass for float16, which has no range to spare."""
        if self.narrow:
            first = _Sums(len(self.shift), 0, self.dtype, stored.device)
            self.scan(rows, first)
            self.redo(rows, first)
            first.normalise(rows, self.shift)
        self.scan(rows, sums, stored, stored_moment, bent)
        self.redo(rows, sums, stored, stored_moment, bent)


@on_its_device
def accumulate(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, pivot: Tensor, shift: Tensor, temperature: Tensor,
    softcap: float, logit_scale: float, count: Tensor | None, moments: int, directions: int, cache: Tensor | None,
    keep_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Sum over the vocabulary; see the CPU twin for arguments and results."""
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    head = _Head(hidden, weight, bias, pivot, shift.clone(), temperature, softcap, logit_scale, count)
    sums = _Sums(rows, moments, head.dtype, hidden.device)
    weighted = torch.empty(rows if directions > 0 else 0, head.size, dtype=head.dtype, device=hidden.device)
    weighted_moment = torch.empty(rows if directions > 1 else 0, head.size, dtype=head.dtype, device=hidden.device)

    kept = None if cache is None or keep_rows == 0 else cache.view(keep_rows, vocabulary)
    first = 0
    if kept is not None:
        first = min(keep_rows, rows)
        # A trainable head needs e alone, and no directions: its backward pass multiplies by what it is given.
        for chunk in _chunks(0, first, STORE_ROWS):
            head.exponentials(chunk, sums, kept[chunk], None, bent=False)
    if directions == 0:
        tiles = None if moments or first else choice.fused_tiles(head.hidden, head.weight, softcap > 0)
        if tiles is not None:
            head.fused(sums, tiles)
            head.redo(slice(0, rows), sums)
        else:
            for chunk in _chunks(first, rows, ROWS):
                head.scan(chunk, sums)
                head.redo(chunk, sums)
        if head.narrow:  # the backward pass may store these rows' exponentials
            sums.normalise(slice(first, rows), head.shift)
        return _results(head, sums, weighted, weighted_moment)
    height = min(STORE_ROWS, rows - first)
    buffer = wide_rows(height, vocabulary, head.hidden)
    buffer_moment = wide_rows(height, vocabulary, head.hidden) if directions > 1 else None
    for chunk in _chunks(first, rows, STORE_ROWS):
        part = slice(0, chunk.stop - chunk.start)
        moment = None if buffer_moment is None else buffer_moment[part]
        head.exponentials(chunk, sums, buffer[part], moment, bent=True)
        product(buffer[part], head.weight, weighted[chunk])
        if moment is not None:
            product(moment, head.weight, weighted_moment[chunk])
    return _results(head, sums, weighted, weighted_moment)


def _results(
    head: _Head, sums: _Sums, weighted: Tensor, weighted_moment: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return head.shift, sums.others, sums.moment1, sums.moment2, weighted, weighted_moment


def _chunks(start: int, stop: int, size: int) -> list[slice]:
    """Cut [start, stop) into parts of at most `size`, as even as they can be: a small last product wastes the GPU."""
    parts = -(-(stop - start) // size) if stop > start else 0
    edges = [start + (stop - start) * i // parts for i in range(parts + 1)] if parts else []
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


@on_its_device
def combine(
    weight: Tensor, weighted: Tensor, weighted_moment: Tensor | None, pivot: Tensor, pivot_coefficient: Tensor,
    weighted_coefficient: Tensor, moment_coefficient: Tensor | None, column: Tensor | None, position: Tensor | None,
    own_coefficient: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return rows of directions; see the CPU twin."""
    many = len(pivot) if position is None else len(position)
    weight = _rows(weight)
    out = torch.empty(many, weight.shape[1], dtype=dtype, device=weight.device)
    if out.numel():
        size = weight.shape[1]
        tile = kernels.combine_tile(size)
        kernels.combine_kernel[(many, -(-size // tile["BLOCK"]))](
            weight, weighted, weighted_moment, pivot, pivot_coefficient, weighted_coefficient, moment_coefficient,
            column, position, own_coefficient, out, size, weight.stride(0), weighted.stride(0), **tile,
        )  # fmt: skip
    return out


@on_its_device
def backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, pivot: Tensor, shift: Tensor, temperature: Tensor,
    softcap: float, logit_scale: float, count: Tensor | None, alpha: Tensor, gamma: Tensor | None, column: Tensor,
    position: Tensor, coefficient: Tensor, cache: Tensor | None, keep_rows: int, need_hidden: bool, need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the products with the gradient of the logits; see the CPU twin."""
    rows, (vocabulary, size) = hidden.shape[0], weight.shape
    head = _Head(hidden, weight, bias, pivot, shift.clone(), temperature, softcap, logit_scale, count)

    def zeros(wanted: bool, *shape: int) -> Tensor:
        return torch.zeros(shape if wanted else (0,), dtype=head.dtype, device=hidden.device)

    grad_hidden, grad_weight = zeros(need_hidden, rows, size), zeros(need_weight, vocabulary, size)
    grad_bias = zeros(need_bias, vocabulary)

    plain = gamma is None and not softcap
    first = min(keep_rows, rows)
    chunks = [(c, True) for c in _chunks(0, first, first if plain else STORE_ROWS)]
    chunks += [(c, False) for c in _chunks(first, rows, STORE_ROWS)]
    height = max((c.stop - c.start for c, kept in chunks if not kept), default=0)
    buffer = wide_rows(height, vocabulary, head.hidden)
    peak = None
    if head.narrow and rows:
        # Upstream gradients of a mean are small: multiplied by them, float16 operands would flush to zero.
        peak = alpha.abs().amax() if gamma is None else torch.maximum(alpha.abs().amax(), gamma.abs().amax())
        peak = torch.where((peak > 0) & peak.isfinite(), peak, 1)
        alpha, gamma = alpha / peak, None if gamma is None else gamma / peak
    scratch = None
    if not plain:
        tallest = max((c.stop - c.start for c, _ in chunks), default=0)
        scratch = wide_rows(tallest, vocabulary, head.hidden)
    factor, ones = -alpha, None
    for chunk, kept in chunks:
        part = slice(0, chunk.stop - chunk.start)
        if kept:
            assert cache is not None
            stored = cache.view(keep_rows, vocabulary)[chunk]
        else:
            stored = buffer[part]
            head.scan(chunk, _Sums(rows, 0, head.dtype, hidden.device), stored)
        if plain:
            scale = factor
        else:
            assert scratch is not None
            columns = -(-vocabulary // kernels.GRADIENT_TILE["BLOCK"])
            kernels.logit_gradient_kernel[(part.stop, columns)](
                stored, alpha, gamma, head.shift, temperature, scratch[part], chunk.start, vocabulary,
                stored.stride(0), scratch.stride(0), SOFTCAP=softcap, **kernels.GRADIENT_TILE,
            )  # fmt: skip
            stored, scale = scratch[part], None
        if need_hidden:
            product(stored, head.weight.to(stored.dtype), grad_hidden[chunk])
            if scale is not None:
                grad_hidden[chunk] *= scale[chunk, None]
        if need_weight:
            inner = head.hidden[chunk]
            if scale is not None:
                inner = (inner.to(head.dtype) * scale[chunk, None]).to(stored.dtype)
            product(stored.T, inner.to(stored.dtype), grad_weight, add=True)
        if need_bias:
            if scale is None:
                ones = torch.ones(rows, dtype=head.dtype, device=hidden.device) if ones is None else ones
            kernels.column_sum_kernel[(-(-vocabulary // kernels.COLUMN_SUM_TILE["BLOCK"]),)](
                stored, scale if scale is not None else ones, grad_bias, chunk.start, part.stop, vocabulary,
                stored.stride(0), **kernels.COLUMN_SUM_TILE,
            )  # fmt: skip

    if peak is not None:
        for gradient in (grad_hidden, grad_weight, grad_bias):
            gradient *= peak
    _add_entries(grad_hidden, grad_weight, grad_bias, head, column, position, coefficient)
    return grad_hidden, grad_weight.to(weight.dtype), grad_bias if bias is None else grad_bias.to(bias.dtype)


def _add_entries(
    grad_hidden: Tensor, grad_weight: Tensor, grad_bias: Tensor, head: _Head, column: Tensor, position: Tensor,
    coefficient: Tensor,
) -> None:  # fmt: skip
    """Add the single entries of the logits' gradient, at targets; accumulating `index_put_` sorts, so it repeats."""
    live = column >= 0
    coefficient = coefficient.masked_fill(~live, 0)
    # Entries that are off go, with coefficient 0, to columns of their own: all in one place would be added one by one.
    spread = torch.arange(len(column), device=column.device) % head.vocabulary
    column = torch.where(live, column, spread)
    if grad_hidden.numel():
        rows = len(head.pivot)
        # The first M entries are the pivots, one a row in order; only shared rows have more.
        for begin, end in ((0, min(rows, len(column))), (rows, len(column))):
            if end <= begin:
                continue
            values = coefficient[begin:end, None] * head.weight[column[begin:end]].to(head.dtype)
            values = values.masked_fill((coefficient[begin:end] == 0)[:, None], 0)
            if begin == 0:
                grad_hidden[:end] += values
            else:
                grad_hidden.index_put_((position[begin:end],), values, accumulate=True)
    if grad_weight.numel():
        values = coefficient[:, None] * head.hidden[position].to(head.dtype)
        grad_weight.index_put_((column,), values, accumulate=True)
    if grad_bias.numel():
        grad_bias.index_put_((column,), coefficient, accumulate=True)
