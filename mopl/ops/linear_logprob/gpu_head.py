"""What the stages of `linear_logprob` on a GPU share: one pass over the vocabulary, cut as its plan says."""

# Pyright takes a kernel for the plain function below `@triton.jit`.
# pyright: reportIndexIssue=false

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mopl._arguments import compute_dtype
from mopl.kernels import fused_logprob as fused_kernels
from mopl.kernels import linear_logprob as kernels
from mopl.kernels import linear_logprob_flagged as flagged_kernels
from mopl.ops._backend import INTERPRETED
from mopl.ops._products import product
from mopl.ops._rows import rows_contiguous
from mopl.ops.linear_logprob.plan import Plan
from mopl.ops.linear_logprob.rows import Batch, Coefficients, Head, padded_columns

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


def same_dtype(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as they are if they share a dtype, else upcast to the compute dtype."""
    if hidden.dtype == weight.dtype:
        return hidden, weight
    dtype = compute_dtype(hidden, weight)
    return hidden.to(dtype), weight.to(dtype)


class Sums:
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

    e: Tensor | None
    moment: Tensor | None  # times u - shift
    bent: bool  # whether both are times f = 1 - tanh^2

    @property
    def stride(self) -> int:
        """Elements between rows."""
        return 0 if self.e is None else self.e.stride(0)


NOTHING = Kept(None, None, False)


class Scan:
    """Passes over the vocabulary, and what every launch needs to know of the head and of the rows."""

    def __init__(self, head: Head, batch: Batch, pivot: Tensor, shift: Tensor, plan: Plan) -> None:
        self.hidden, self.weight = (rows_contiguous(x) for x in same_dtype(batch.hidden, head.weight))
        self.bias, self.pivot, self.temperature, self.count = head.bias, pivot, batch.temperature, batch.count
        self.shift, self.plan = shift.clone(), plan
        self.scales = {"SOFTCAP": head.softcap, "LOGIT_SCALE": head.logit_scale}
        self.dtype = compute_dtype(batch.hidden, head.weight)
        self.vocabulary, self.size = head.weight.shape
        self.narrow = self.hidden.dtype == torch.float16

    def once(self, rows: slice, sums: Sums, kept: Kept = NOTHING) -> None:
        """Pass once over the vocabulary for some rows: add up the sums and store exponentials (R, V) if asked."""
        first, many = rows.start, rows.stop - rows.start
        part = self.hidden[rows]
        moment1, moment2 = sums.optional()
        wide = self.plan.columns(many, self.vocabulary)
        tile = wide_rows(many, wide, part, self.dtype)
        shape = kernels.exp_tile(self.dtype.itemsize)
        for column in range(0, self.vocabulary, wide):
            columns = min(wide, self.vocabulary - column)
            logits = product(part, self.weight[column : column + columns].T, tile[:, :columns])
            kernels.exp_kernel[(-(-many // shape["ROWS"]),)](
                logits, self.bias, self.pivot, self.shift, self.temperature, self.count,
                *(None if x is None else x[:, column:] for x in kept[:2]),
                sums.others, moment1, moment2, sums.flag, first, many, column, columns, logits.stride(0),
                kept.stride, **self.scales, BENT=kept.bent, LIMIT=kernels.LIMIT, **shape,
            )  # fmt: skip

    def redo(self, rows: slice, sums: Sums, kept: Kept = NOTHING) -> None:
        """Compute the flagged ones among some rows again, with their largest logit as shift."""
        many, first = rows.stop - rows.start, rows.start
        size, vocabulary, itemsize = self.size, self.vocabulary, self.dtype.itemsize
        part = flagged_kernels.part_of(vocabulary, itemsize)
        parts, slots = -(-vocabulary // part), -(-many // flagged_kernels.ROWS)
        tile, merge = flagged_kernels.redo_tile(itemsize), flagged_kernels.merge_tile(parts)
        partial = self.shift.new_empty(2 + sums.moments, parts, many).unbind()
        top, sums_of_parts = partial[0], (*partial[1:], None, None)[:3]
        operands = (self.hidden, self.weight, self.bias, self.pivot)
        strides = (self.hidden.stride(0), self.weight.stride(0))
        flagged_kernels.redo_top_kernel[(slots, parts)](
            *operands, sums.flag, top, first, many, size, vocabulary, part, *strides, **self.scales, **tile
        )
        flagged_kernels.redo_sum_kernel[(slots, parts)](
            *operands, self.temperature, sums.flag, top, *kept[:2], *sums_of_parts, first, many, size,
            vocabulary, part, parts, *strides, kept.stride, **self.scales, BENT=kept.bent,
            PARTS=merge["PARTS"], **tile,
        )  # fmt: skip
        flagged_kernels.redo_merge_kernel[(slots,)](
            self.temperature, sums.flag, top, *sums_of_parts, self.shift, sums.others, *sums.optional(), first, many,
            parts, **self.scales, **merge,
        )  # fmt: skip

    def fused(self, sums: Sums, tiles: dict[str, int]) -> None:
        """Sum over the vocabulary with the product and its epilogue in one kernel."""
        rows = self.hidden.shape[0]
        height, width = -(-rows // tiles["BM"]), -(-self.vocabulary // tiles["BV"])
        partial = torch.empty(width, rows, dtype=self.dtype, device=self.hidden.device)
        flag = torch.empty(width, rows, dtype=torch.int8, device=self.hidden.device)
        fused_kernels.fused_sum_kernel[(height * width,)](
            self.hidden, self.weight, self.bias, self.pivot, self.shift, self.temperature, self.count, partial, flag,
            rows, self.size, self.vocabulary, self.hidden.stride(0), self.weight.stride(0), **self.scales,
            LIMIT=kernels.LIMIT, UPCAST=INTERPRETED, **tiles,
        )  # fmt: skip
        torch.sum(partial, 0, out=sums.others)
        torch.amax(flag, 0, out=sums.flag)

    def exponentials(self, rows: slice, sums: Sums, kept: Kept) -> None:
        """Fill the sums and what is kept; one more pass for float16, which has no range to spare."""
        if self.narrow:
            first = Sums(len(self.shift), 0, self.dtype, self.shift.device)
            self.once(rows, first)
            self.redo(rows, first)
            first.normalise(rows, self.shift)
        self.once(rows, sums, kept)
        self.redo(rows, sums, kept)


@on_its_device
def combine(
    head: Head, weighted: Tensor, weighted_moment: Tensor | None, pivot: Tensor, part: Coefficients,
    column: Tensor | None, position: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return rows of directions; see the CPU twin."""
    weight, many = rows_contiguous(head.weight), len(pivot) if position is None else len(position)
    size = weight.shape[1]
    out = torch.empty(many, size, dtype=dtype, device=weight.device)
    if out.numel():
        tile = kernels.combine_tile(size)
        kernels.combine_kernel[(many, -(-size // tile["BLOCK"]))](
            weight, weighted, weighted_moment, pivot, *part[:3], column, position, part.own, out, size,
            weight.stride(0), weighted.stride(0), **tile,
        )  # fmt: skip
    return out
