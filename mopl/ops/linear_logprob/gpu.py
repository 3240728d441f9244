"""The stages of `linear_logprob` on a GPU: products by the vendor's library or our own, all around them in Triton.

The same functions as in `cpu`, whose docstrings say what each argument and result is. Here:

* Products of 16-bit operands write float32 (`_products`), so logits are never rounded to 16 bit.
* The exponentials kept for the second and third product are bf16: it has float32's range, and its rounding is that of
  any 16-bit gradient. float16 operands have no such range to offer: their rows are summed once first and then
  normalised, which costs one more product, but no digits; and upstream gradients are scaled by their largest.
* Rows are processed in chunks, logits in tiles of constant area: see `plan`.
* Nothing here waits for the GPU: kernels leave out rows that do not count, by `counts`, whatever these hold.
* In the backward pass each chunk of rows gives two products with what is stored of it: the gradient of the hidden
  states, whose rows are then finished by one pass (factor, pivot's row of the head, rounding), and that of the head,
  summed over chunks in float32. The entries at the pivots are added to that sum, which is then rounded once: among the
  stored exponentials they would be rounded first (1.7 times the error of a float32 reference).
* Where the plan's algorithm is `DESCRIPTORS`, kernels of our own form the exponentials without logits in memory, and,
  where one chunk is all, the gradient of the head without a float32 copy: see `own_products`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mopl._arguments import compute_dtype
from mopl.kernels import fused_logprob as fused_kernels
from mopl.kernels import linear_logprob as kernels
from mopl.kernels import linear_logprob_backward as backward_kernels
from mopl.kernels import linear_logprob_flagged as flagged_kernels
from mopl.ops._backend import INTERPRETED
from mopl.ops._products import operand_dtype, product
from mopl.ops._rows import rows_contiguous, slices
from mopl.ops.linear_logprob import choice, own_products
from mopl.ops.linear_logprob.keeping import padded_columns
from mopl.ops.linear_logprob.plan import DESCRIPTORS, Plan
from mopl.ops.linear_logprob.records import Batch, Coefficients, Entries, Head, LogitGradient, Need, Sums, Want

# Rows of a product with the head: from 16384 on the library chooses one that takes 7 % longer (H200, 2026-11-27).
MOST_ROWS = 8192
HEADROOM = 8.0  # nats: normalised exponentials, and their products with u - shift, stay below float16's 65504


def on_its_device(stage: Callable) -> Callable:
    """Run a stage on the GPU of its head, which Triton would not look at."""

    @functools.wraps(stage)
    def run(head: Head, *rest: object):
        with torch.cuda.device_of(head.weight):
            return stage(head, *rest)

    return run


def wide_rows(rows: int, columns: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return an empty (rows, columns) whose rows begin at multiples of 128 bytes, whatever the number of columns.

    Products of 16-bit operands are slow where rows are not aligned to 16 bytes, as with a vocabulary of 50257; and
    kernels read and write the padding, so as to need no other accesses than of 16 bytes.
    """
    dtype = like.dtype if dtype is None else dtype
    return like.new_empty(rows, padded_columns(columns, dtype.itemsize), dtype=dtype)[:, :columns]


def kept_exponentials(cache: Tensor, keep_rows: int, vocabulary: int) -> Tensor:
    """Return the kept exponentials as rows (keep_rows, V) of padded memory."""
    return cache.view(keep_rows, padded_columns(vocabulary, cache.element_size()))[:, :vocabulary]


class Running:
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
        """Return both moments, None for what is not asked for."""
        return (self.moment1 if self.moments > 0 else None, self.moment2 if self.moments > 1 else None)


class Kept(NamedTuple):
    """Where a pass over the vocabulary leaves the exponentials (R, V) of some rows."""

    e: Tensor | None = None
    moment: Tensor | None = None  # times u - shift
    bent: bool = False  # whether both are times f = 1 - tanh^2

    @property
    def stride(self) -> int:
        """Elements between rows."""
        return 0 if self.e is None else self.e.stride(0)


NOTHING = Kept()


class Scan:
    """Passes over the vocabulary, and what every launch needs to know of the head and of the rows."""

    def __init__(self, head: Head, batch: Batch, pivot: Tensor, shift: Tensor, plan: Plan) -> None:
        dtype = operand_dtype(batch.hidden, head.weight)
        self.hidden, self.weight = (rows_contiguous(x.to(dtype)) for x in (batch.hidden, head.weight))
        self.bias, self.pivot = rows_contiguous(head.bias), pivot
        self.temperature, self.counts = batch.temperature, batch.counts
        self.shift, self.plan = shift.clone(), plan
        self.scales = {"SOFTCAP": head.softcap, "LOGIT_SCALE": head.logit_scale}
        self.dtype = compute_dtype(batch.hidden, head.weight)
        self.vocabulary, self.size = head.weight.shape
        self.narrow = self.hidden.dtype == torch.float16

    def once(self, rows: slice, sums: Running, kept: Kept = NOTHING) -> None:
        """Pass once over the vocabulary for some rows: sum up and store exponentials (R, V) if asked."""
        first, many = rows.start, rows.stop - rows.start
        if self.plan.algorithm == DESCRIPTORS:
            vectors = (None if x is None else x[rows] for x in (self.pivot, self.shift, self.temperature, self.counts))
            own_products.exponentials(
                self.hidden[rows], self.weight, kept.e, (self.bias, *vectors), sums.others[rows], sums.flag[rows],
                self.scales["LOGIT_SCALE"], self.plan.processors,
            )  # fmt: skip
            return
        part = self.hidden[rows]
        moment1, moment2 = sums.optional()
        wide = self.plan.columns(many, self.vocabulary)
        tile = wide_rows(many, wide, part, self.dtype)
        shape = kernels.exp_tile(self.dtype.itemsize)
        for column in range(0, self.vocabulary, wide):
            columns = min(wide, self.vocabulary - column)
            logits = product(part, self.weight[column : column + columns].T, tile[:, :columns])
            kernels.exp_kernel[(-(-many // shape["ROWS"]),)](
                logits, self.bias, self.pivot, self.shift, self.temperature, self.counts,
                *(None if x is None else x[:, column:] for x in (kept.e, kept.moment)),
                sums.others, moment1, moment2, sums.flag, first, many, column, columns, logits.stride(0),
                kept.stride, **self.scales, BENT=kept.bent, LIMIT=kernels.LIMIT, **shape,
            )  # fmt: skip

    def redo(self, rows: slice, sums: Running, kept: Kept = NOTHING) -> None:
        """Compute the flagged ones among some rows again, with their largest logit as shift."""
        many, first = rows.stop - rows.start, rows.start
        size, vocabulary, itemsize = self.size, self.vocabulary, self.dtype.itemsize
        part = flagged_kernels.part_of(vocabulary, itemsize)
        parts, slots = -(-vocabulary // part), -(-many // flagged_kernels.ROWS)
        tile, merge = flagged_kernels.redo_tile(itemsize), flagged_kernels.merge_tile(parts)
        top, *partial = self.shift.new_empty(2 + sums.moments, parts, many).unbind()
        sums_of_parts = (*partial, None, None)[:3]
        operands = (self.hidden, self.weight, self.bias, self.pivot)
        strides = (self.hidden.stride(0), self.weight.stride(0))
        flagged_kernels.redo_top_kernel[(slots, parts)](
            *operands, sums.flag, top, first, many, size, vocabulary, part, *strides, **self.scales, **tile
        )
        flagged_kernels.redo_sum_kernel[(slots, parts)](
            *operands, self.temperature, sums.flag, top, kept.e, kept.moment, *sums_of_parts, first, many, size,
            vocabulary, part, parts, *strides, kept.stride, **self.scales, BENT=kept.bent,
            PARTS=merge["PARTS"], **tile,
        )  # fmt: skip
        flagged_kernels.redo_merge_kernel[(slots,)](
            self.temperature, sums.flag, top, *sums_of_parts, self.shift, sums.others, *sums.optional(), first, many,
            parts, **self.scales, **merge,
        )  # fmt: skip

    def fused(self, sums: Running, tiles: dict[str, int]) -> None:
        """Sum over the vocabulary with the product and its epilogue in one kernel."""
        rows = self.hidden.shape[0]
        height, width = -(-rows // tiles["BM"]), -(-self.vocabulary // tiles["BV"])
        partial = torch.empty(width, rows, dtype=self.dtype, device=self.hidden.device)
        flag = torch.empty(width, rows, dtype=torch.int8, device=self.hidden.device)
        fused_kernels.fused_sum_kernel[(height * width,)](
            self.hidden, self.weight, self.bias, self.pivot, self.shift, self.temperature, self.counts, partial, flag,
            rows, self.size, self.vocabulary, self.hidden.stride(0), self.weight.stride(0), **self.scales,
            LIMIT=kernels.LIMIT, UPCAST=INTERPRETED, **tiles,
        )  # fmt: skip
        torch.sum(partial, 0, out=sums.others)
        torch.amax(flag, 0, out=sums.flag)

    def exponentials(self, rows: slice, sums: Running, kept: Kept) -> None:
        """Fill the sums and what is kept; one more pass for float16, which has no range to spare."""
        if self.narrow:
            first = Running(len(self.shift), 0, self.dtype, self.shift.device)
            self.once(rows, first)
            self.redo(rows, first)
            first.normalise(rows, self.shift)
        self.once(rows, sums, kept)
        self.redo(rows, sums, kept)


@on_its_device
def target_logits(head: Head, batch: Batch, column: Tensor, position: Tensor | None) -> Tensor:
    """Return u at the targets (F,), 0 where column is -1."""
    hidden, weight, bias = (rows_contiguous(x) for x in (batch.hidden, head.weight, head.bias))
    out = torch.empty(column.shape, dtype=compute_dtype(hidden, weight), device=hidden.device)
    if column.numel():
        kernels.target_logit_kernel[(column.numel(),)](
            hidden, weight, bias, column, position, batch.temperature, out, hidden.shape[1], hidden.stride(0),
            weight.stride(0), SOFTCAP=head.softcap, LOGIT_SCALE=head.logit_scale, **kernels.TARGET_TILE,
        )  # fmt: skip
    return out


@on_its_device
def accumulate(
    head: Head, batch: Batch, pivot: Tensor, shift: Tensor, want: Want, cache: Tensor, plan: Plan | None = None
) -> Sums:
    """Sum over the vocabulary; see the CPU twin for arguments and results. `plan` replaces the chosen one."""
    rows, (vocabulary, size), directions = len(batch.hidden), head.weight.shape, want.directions
    wanted = "frozen" if directions else "trained" if want.keep_rows else "scoring"
    plan = plan or choice.plan_for(
        batch.hidden, head.weight, wanted, head.softcap > 0, want.moments, buffers=max(directions, 1)
    )
    scan = Scan(head, batch, pivot, shift, plan)
    sums = Running(rows, want.moments, scan.dtype, shift.device)
    weighted = shift.new_empty(rows if directions > 0 else 0, size, dtype=scan.dtype)
    weighted_moment = shift.new_empty(rows if directions > 1 else 0, size, dtype=scan.dtype)

    first = min(want.keep_rows, rows)
    if want.keep_rows:
        kept = kept_exponentials(cache, want.keep_rows, vocabulary)
        # A trainable head needs e alone, and no directions: its backward pass multiplies by what it is given.
        for chunk in plan.chunks(0, first):
            scan.exponentials(chunk, sums, Kept(kept[chunk]))
    if directions == 0:
        tiles = None if want.moments or first else choice.fused_tiles(plan)
        if tiles is not None:
            scan.fused(sums, tiles)
            scan.redo(slice(0, rows), sums)
        else:
            for chunk in plan.chunks(first, rows):
                scan.once(chunk, sums)
                scan.redo(chunk, sums)
        if scan.narrow:  # the backward pass may store these rows' exponentials
            sums.normalise(slice(first, rows), scan.shift)
    else:
        height = min(plan.buffer_rows, rows - first)
        buffer = wide_rows(height, vocabulary, scan.hidden)
        buffer_moment = wide_rows(height, vocabulary, scan.hidden) if directions > 1 else None
        for chunk in plan.chunks(first, rows, buffered=True):
            part = slice(0, chunk.stop - chunk.start)
            moment = None if buffer_moment is None else buffer_moment[part]
            scan.exponentials(chunk, sums, Kept(buffer[part], moment, bent=True))
            _times_head(buffer[part], scan.weight, weighted[chunk])
            if moment is not None:
                _times_head(moment, scan.weight, weighted_moment[chunk])
    return Sums(scan.shift, sums.others, sums.moment1, sums.moment2, weighted, weighted_moment)


@on_its_device
def combine(
    head: Head, weighted: Tensor, weighted_moment: Tensor | None, pivot: Tensor, part: Coefficients, dtype: torch.dtype
) -> Tensor:
    """Return rows of directions; see the CPU twin."""
    weight, many, size = rows_contiguous(head.weight), len(part.pivot), head.weight.shape[1]
    out = torch.empty(many, size, dtype=dtype, device=weight.device)
    if out.numel():
        tile = kernels.combine_tile(size)
        kernels.combine_kernel[(many, -(-size // tile["BLOCK"]))](
            weight, weighted, weighted_moment, pivot, part.pivot, part.weighted, part.moment, part.column,
            part.position, part.own, out, size, weight.stride(0), weighted.stride(0), **tile,
        )  # fmt: skip
    return out


@on_its_device
def backward(
    head: Head, batch: Batch, pivot: Tensor, shift: Tensor, gradient: LogitGradient, cache: Tensor, keep_rows: int,
    need: Need, dtype: torch.dtype, plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the products with the gradient of the logits; see the CPU twin. `plan` replaces the chosen one."""
    alpha, gamma, (column, position, coefficient) = gradient
    rows, (vocabulary, size) = len(batch.hidden), head.weight.shape
    plain = gamma is None and not head.softcap
    plan = plan or choice.plan_for(batch.hidden, head.weight, "trained", head.softcap > 0, buffers=1 if plain else 2)
    scan = Scan(head, batch, pivot, shift, plan)
    live = column >= 0
    coefficient = coefficient.masked_fill(~live, 0)

    first = min(keep_rows, rows)
    # What is kept is one product, unless something has to be made of it row by row first.
    whole = [slice(0, first)] if first else []
    chunks = [(c, True) for c in (whole if plain else plan.chunks(0, first, buffered=True))]
    chunks += [(c, False) for c in plan.chunks(first, rows, buffered=True)]
    height = max((c.stop - c.start for c, kept in chunks if not kept), default=0)
    buffer, sums = wide_rows(height, vocabulary, scan.hidden), Running(rows, 0, scan.dtype, shift.device)
    scratch = None
    if not plain:
        tallest = max((c.stop - c.start for c, _ in chunks), default=0)
        scratch = wide_rows(tallest, vocabulary, scan.hidden)

    def new(wanted: bool, *shape: int) -> Tensor:
        return torch.empty(shape if wanted else (0,), dtype=scan.dtype, device=shift.device)

    own = plan.algorithm == DESCRIPTORS and len(chunks) == 1 and head.weight.dtype == scan.hidden.dtype
    grad_hidden = new(need.hidden, rows, size)
    grad_weight = new(need.weight and not own, vocabulary, size)
    grad_bias = new(need.bias, vocabulary).zero_()

    unit = alpha.new_ones(())
    if scan.narrow and rows:
        # Upstream gradients of a mean are small: multiplied by them, float16 operands would flush to zero.
        unit = alpha.abs().amax() if gamma is None else torch.maximum(alpha.abs().amax(), gamma.abs().amax())
        unit = torch.where((unit > 0) & unit.isfinite(), unit, 1)
        alpha, gamma = alpha / unit, None if gamma is None else gamma / unit
        coefficient = coefficient / unit
    entries = Entries(torch.where(live, column, vocabulary), position, coefficient)
    # What multiplies the rows of `stored`; 0 where they do not count and may hold anything.
    factor = -alpha if plain else alpha.new_ones(rows) if batch.counts is None else batch.counts.to(alpha.dtype)
    for number, (chunk, kept) in enumerate(chunks):
        part = slice(0, chunk.stop - chunk.start)
        if kept:
            stored = kept_exponentials(cache, keep_rows, vocabulary)[chunk]
        else:
            stored = buffer[part]
            scan.once(chunk, sums, Kept(stored))
        if scratch is not None:
            columns = -(-vocabulary // backward_kernels.GRADIENT_TILE["BLOCK"])
            backward_kernels.logit_gradient_kernel[(part.stop, columns)](
                stored, alpha, gamma, scan.shift, scan.temperature, scratch[part], chunk.start, vocabulary,
                stored.stride(0), scratch.stride(0), SOFTCAP=head.softcap, **backward_kernels.GRADIENT_TILE,
            )  # fmt: skip
            stored = scratch[part]
        if need.hidden:
            _times_head(stored, scan.weight, grad_hidden[chunk])
        if need.weight:
            inner = scaled(scan.hidden[chunk], factor, chunk.start)
            if own:
                scale, processors = unit if scan.narrow else None, plan.processors
                grad_weight = own_products.weight_gradient(stored, inner, scan.hidden, entries, scale, processors)
            else:
                product(stored.T, inner, grad_weight, add=number > 0)
        if need.bias:
            backward_kernels.column_sum_kernel[(-(-vocabulary // backward_kernels.COLUMN_SUM_TILE["BLOCK"]),)](
                stored, factor, grad_bias, chunk.start, part.stop, vocabulary, stored.stride(0),
                **backward_kernels.COLUMN_SUM_TILE,
            )  # fmt: skip
    if not chunks:
        grad_weight.zero_()

    if need.hidden and rows:
        # The first M entries are the pivots, one a row in order; only shared rows have more.
        apart, beside = coefficient[rows:], column[rows:].clamp(min=0)
        grad_hidden = combine(
            head._replace(weight=scan.weight), grad_hidden, None, torch.where(live[:rows], column[:rows], -1),
            Coefficients(coefficient[:rows] * unit, factor * unit), scan.dtype if len(apart) else dtype,
        )  # fmt: skip
        if len(apart):
            values = (apart * unit)[:, None] * scan.weight[beside].to(scan.dtype)
            values = values.masked_fill((apart == 0)[:, None], 0)
            # Accumulating, it sorts first: the same bits at every call.
            grad_hidden.index_put_((position[rows:],), values, accumulate=True)
    if need.weight and not own:
        own_products.add_entries(scan.hidden, entries, grad_weight, None, vocabulary)
    if need.bias:
        # Entries that are off go, with coefficient 0, to columns of their own: in one place they would wait in line.
        away = torch.arange(len(column), device=column.device) % vocabulary
        grad_bias.index_put_((torch.where(live, column, away),), coefficient, accumulate=True)
    of_weight, of_bias = head.weight.dtype, scan.dtype if head.bias is None else head.bias.dtype
    if scan.narrow:
        if not own:
            grad_weight = torch.mul(grad_weight, unit, out=torch.empty_like(grad_weight, dtype=of_weight))
        grad_bias = grad_bias * unit
    return grad_hidden.to(dtype), grad_weight.to(of_weight), grad_bias.to(of_bias)


def _times_head(stored: Tensor, weight: Tensor, out: Tensor) -> None:
    """Write the product of rows (R, V) with the head (V, H), some rows at a time."""
    for rows in slices(0, len(stored), MOST_ROWS):
        product(stored[rows], weight, out[rows])


def scaled(x: Tensor, factor: Tensor, first: int = 0) -> Tensor:
    """Return rows (R, H) times their factors, which begin at `first`, rounded once."""
    rows, size = x.shape
    out, tile = torch.empty_like(x, memory_format=torch.contiguous_format), backward_kernels.scale_tile(size)
    with torch.cuda.device_of(x):  # a stage of its own, too
        blocks = -(-size // tile["BLOCK"])
        backward_kernels.scale_kernel[(rows, blocks)](x, factor, out, first, size, x.stride(0), **tile)
    return out
