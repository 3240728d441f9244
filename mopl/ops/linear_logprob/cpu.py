"""The stages of `linear_logprob` in chunked PyTorch; `gpu` has the same functions.

M rows in play, F targets in play. Rows of a batch that do not count (`counts`) may hold anything: their columns are -1,
and their sums and directions 0. All arithmetic, the products included, and every (M,)-vector is in the compute dtype:
float32, float64 for float64.

The vocabulary is cut into tiles of `COLUMNS`, the rows into chunks of `ROWS`. A tile of the weight is brought to the
compute dtype once for all rows: products of 16-bit operands are exact in float32, and on processors without 16-bit
matrix instructions they are faster there as well.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mopl.ops._rows import slices
from mopl.ops.linear_logprob.records import Batch, Coefficients, Head, LogitGradient, Need, Sums, Want

# A float32 tile of logits is 16 MiB, small beside the weight and wide enough for the matrix product.
COLUMNS = 2048
ROWS = 2048
GATHER = 256  # rows of the weight that are gathered at a time
# exp(u - shift) may be summed without a larger shift up to here: exp(40) times any vocabulary is far below 2^128.
HEADROOM = 40.0
# Moments about a shift far below the likely logits would be differences of large numbers.
HEADROOM_MOMENTS = 4.0
# Below this exp is 0 in either precision; a finite floor keeps 0 * (u - shift) from being NaN where u = -inf.
FLOOR = -1e4


class _Logits(NamedTuple):
    """Everything that turns rows and a tile of the vocabulary into logits u."""

    rows: Tensor  # (M, H) in the compute dtype, factors that commute with the product included
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    inner: Tensor | None  # (M, 1) or (): multiplies the product after the bias
    outer: Tensor | None  # (M, 1): softcap / temperature, multiplies tanh
    bend: Tensor | None  # (M, 1): temperature / softcap, so that tanh = u * bend

    @staticmethod
    def of(head: Head, batch: Batch) -> _Logits:
        """Prepare a head; a factor is folded into the rows unless a bias stands between."""
        temperature, softcap = batch.temperature[:, None], head.softcap
        factor = head.logit_scale / (softcap * torch.ones_like(temperature) if softcap else temperature)
        rows, bias, inner = _that_count(batch).to(temperature.dtype), None, None
        if head.bias is not None:
            bias, inner = head.bias.to(temperature.dtype), factor
        elif not bool((factor == 1).all()):
            rows = rows * factor
        outer, bend = (softcap / temperature, temperature / softcap) if softcap else (None, None)
        return _Logits(rows, head.weight, bias, inner, outer, bend)

    def tile(self, start: int) -> Tensor:
        """Return the rows of the weight (C, H) from `start` on, in the compute dtype."""
        return self.weight[start : start + COLUMNS].to(self.rows.dtype)

    def at(self, rows: slice | Tensor, start: int, tile: Tensor, out: Tensor) -> Tensor:
        """Write u of some rows and a tile into `out` and return it."""
        torch.mm(self.rows[rows], tile.t(), out=out)
        if self.bias is not None and self.inner is not None:
            out.add_(self.bias[start : start + COLUMNS]).mul_(self.inner[rows])
        return out if self.outer is None else out.tanh_().mul_(self.outer[rows])

    def bent(self, u: Tensor, rows: slice | Tensor) -> Tensor:
        """Return f = 1 - tanh^2 at logits u."""
        assert self.bend is not None
        tanh = u * self.bend[rows]
        return (1 - tanh).mul_(1 + tanh)


def _that_count(batch: Batch) -> Tensor:
    """Return the hidden states (M, H), 0 in rows that do not count."""
    return batch.hidden if batch.counts is None else batch.hidden.masked_fill(~batch.counts[:, None], 0)


def _clear_pivot(e: Tensor, pivot: Tensor, start: int) -> None:
    """Set the pivot's column to 0 in the rows whose pivot lies in this tile."""
    column = pivot - start
    hit = ((column >= 0) & (column < e.shape[1])).nonzero()[:, 0]
    e[hit, column[hit]] = 0


def target_logits(
    head: Head,
    batch: Batch,
    column: Tensor,  # (F,) int64: vocabulary index, or -1
    position: Tensor | None,  # (F,) int64: row of each target; None means F = M, target i belongs to row i
) -> Tensor:
    """Return u at the targets (F,), 0 where column is -1."""
    weight, bias, softcap, temperature = head.weight, head.bias, head.softcap, batch.temperature
    result = temperature.new_zeros(len(column))
    for part in torch.arange(len(column)).split(GATHER):
        rows = part if position is None else position[part]
        found = column[part].clamp(min=0)
        product = (batch.hidden[rows].to(result.dtype) * weight[found].to(result.dtype)).sum(-1)
        product = product if bias is None else product + bias[found].to(result.dtype)
        product = product * head.logit_scale
        product = softcap * torch.tanh(product / softcap) if softcap else product
        result[part] = (product / temperature[rows]).masked_fill(column[part] < 0, 0)
    return result


def _no_sums(shift: Tensor, width: int, want: Want) -> Sums:
    """Return sums to add to in place."""
    rows = len(shift)
    # A variance is a difference of these sums: they keep their digits in float64.
    wide = torch.float64 if want.moments > 1 else shift.dtype
    return Sums(
        shift.clone(),
        shift.new_zeros(rows, dtype=wide),
        shift.new_zeros(rows if want.moments > 0 else 0, dtype=wide),
        shift.new_zeros(rows if want.moments > 1 else 0, dtype=wide),
        shift.new_zeros((rows, width) if want.directions > 0 else 0),
        shift.new_zeros((rows, width) if want.directions > 1 else 0),
    )


def _cached(cache: Tensor, kept: int, start: int, width: int) -> Tensor:
    """Return the kept exponentials (kept, width) of a tile; tiles lie one after another."""
    return cache[start * kept : (start + width) * kept].view(kept, width)


def _make_room(top: Tensor, rows: slice, sums: Sums, cache: Tensor, kept: int, start: int) -> None:
    """Raise the shift of rows whose largest logit in this tile would overflow, and rescale what was summed so far."""
    headroom = HEADROOM_MOMENTS if len(sums.moment1) else HEADROOM
    high = (top > sums.shift[rows] + headroom).nonzero()[:, 0]
    if not len(high):
        return
    index = high + rows.start
    old, new = sums.shift[index], top[high]
    factor = (old - new).exp()  # 0 for a target whose logit is -inf
    step = torch.where(factor == 0, 0, old - new)
    if len(sums.moment2):
        sums.moment2[index] += 2 * step * sums.moment1[index] + step.square() * sums.others[index]
    if len(sums.moment1):
        sums.moment1[index] += step * sums.others[index]
    if len(sums.weighted_moment):
        sums.weighted_moment[index] += step[:, None] * sums.weighted[index]
    for part in sums[1:]:
        if len(part):
            part[index] *= factor.view(-1, *[1] * (part.ndim - 1))
    sums.shift[index] = new
    if rows.start < kept:
        for done in range(0, start, COLUMNS):
            _cached(cache, kept, done, COLUMNS)[index] *= factor[:, None]


def _add_tile(logits: _Logits, u: Tensor, rows: slice, start: int, tile: Tensor, pivot: Tensor, sums: Sums) -> None:
    """Add a tile of logits to the sums; `u` becomes exp(u - shift), 0 at the pivots."""
    bent = logits.bent(u, rows) if logits.bend is not None and len(sums.weighted) else None
    shift = sums.shift[rows, None]
    shifted = u.sub_(shift.masked_fill(shift == -torch.inf, 0))  # all logits so far -inf: nothing to shift
    shifted = shifted.clamp(min=FLOOR) if len(sums.moment1) else None
    e = u.exp_()
    _clear_pivot(e, pivot[rows], start)
    sums.others[rows] += e.sum(1, dtype=sums.others.dtype)
    if shifted is not None:
        times = e * shifted
        if len(sums.moment2):
            wide = shifted.double()
            square = wide * e
            sums.moment1[rows] += square.sum(1)
            sums.moment2[rows] += square.mul_(wide).sum(1)
        else:
            sums.moment1[rows] += times.sum(1)
        if len(sums.weighted_moment):
            sums.weighted_moment[rows].addmm_(times if bent is None else times.mul_(bent), tile)
    if len(sums.weighted):
        sums.weighted[rows].addmm_(e if bent is None else e.mul_(bent), tile)


def accumulate(
    head: Head,
    batch: Batch,
    pivot: Tensor,  # (M,) int64: the column that every sum leaves out, or -1
    shift: Tensor,  # (M,): u at the pivot
    want: Want,  # its moments, its directions, and keep_rows, which may exceed M
    cache: Tensor,  # (keep_rows * columns,): e_v of the first keep_rows rows; the layout is the backend's
) -> Sums:
    """Sum over the vocabulary, the pivot left out, with e_v = exp(u_v - shift).

    Returns:
        shift (M,): the shift that was really used: the given one, or a larger one for rows where exp would overflow
            (some u_v far above the pivot's) or where the given one is not finite. Moments gain from a larger one, too.
        others (M,) = sum e_v;  moment1 (M,) = sum e_v (u_v - shift);  moment2 (M,) = sum e_v (u_v - shift)^2
        weighted (M, H) = sum e_v f_v W_v;  weighted_moment (M, H) = sum e_v (u_v - shift) f_v W_v
            with f_v = 1 - tanh^2 under a softcap, else 1.
        Those not asked for are empty (0,). others, moment1 and moment2 may be wider than the compute dtype.
    """
    logits, (size, width), vocabulary = _Logits.of(head, batch), batch.hidden.shape, len(head.weight)
    kept = min(want.keep_rows, size)
    sums = _no_sums(shift, width, want)
    tile_buffer = logits.rows.new_empty(min(size, ROWS) * min(vocabulary, COLUMNS))
    for start in range(0, vocabulary, COLUMNS):
        tile = logits.tile(start)
        for rows in (*slices(0, kept, ROWS), *slices(kept, size, ROWS)):
            shape = (rows.stop - rows.start, len(tile))
            if rows.start < kept:
                out = _cached(cache, kept, start, len(tile))[rows]
            else:
                out = tile_buffer[: shape[0] * shape[1]].view(shape)
            u = logits.at(rows, start, tile, out)
            _make_room(u.amax(1), rows, sums, cache, kept, start)
            _add_tile(logits, u, rows, start, tile, pivot, sums)
    return sums


def combine(
    head: Head,
    weighted: Tensor,  # (M, H)
    weighted_moment: Tensor | None,  # (M, H)
    pivot: Tensor,  # (M,) int64, or -1: that term is left out
    part: Coefficients,
    dtype: torch.dtype,  # of the result
) -> Tensor:
    """Return directions (M, H), row i being, with the coefficients of `part`,

        pivot_i W[pivot_i] + weighted_i weighted_i + moment_i weighted_moment_i

    With the columns of targets, return (F, H), row k being, with i = position_k,

        own_k W[column_k] + pivot_k W[pivot_i] + weighted_i weighted_i + ...
    """
    weight, position, count = head.weight, part.position, len(part.pivot)
    result = weighted.new_empty((count, weight.shape[1]), dtype=dtype)
    for some in torch.arange(count).split(GATHER):
        rows = some if position is None else position[some]
        terms = weighted[rows].mul_(part.weighted[rows, None])
        if weighted_moment is not None and part.moment is not None:
            terms.addcmul_(weighted_moment[rows], part.moment[rows, None])
        _add_rows(terms, weight, pivot[rows], part.pivot[some])
        if part.column is not None and part.own is not None:
            _add_rows(terms, weight, part.column[some], part.own[some])
        result[some] = terms.to(dtype)
    return result


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """Return rows (R, H) times their factors."""
    return torch.mul(x, factor[:, None])


def _add_rows(terms: Tensor, weight: Tensor, column: Tensor, coefficient: Tensor) -> None:
    """Add coefficient_i W[column_i] to row i where the column is there."""
    coefficient = coefficient.masked_fill(column < 0, 0)
    terms.addcmul_(weight[column.clamp(min=0)].to(terms.dtype), coefficient[:, None])


def backward(
    head: Head,
    batch: Batch,
    pivot: Tensor,  # (M,) int64, or -1
    shift: Tensor,  # (M,): as `accumulate` returned it
    gradient: LogitGradient,
    cache: Tensor,  # as `accumulate` left it; never changed here
    keep_rows: int,
    need: Need,
    dtype: torch.dtype,  # of the gradient of hidden
) -> tuple[Tensor, Tensor, Tensor]:
    """Products with the gradient of the logits a, which is never held whole:

        G_nv = -e_nv f_nv (alpha_n + gamma_n (u_nv - shift_n))   for v != pivot_n, 0 at the pivot
        G_{position_k, column_k} += coefficient_k                for every k with column_k >= 0

    Returns:
        G W (M, H) in `dtype` and G^T hidden (V, H) in the weight's, accumulated in the compute dtype and rounded once;
        column sums of G (V,) in the bias's dtype. Empty (0,) where not needed.
    """
    weight, bias = head.weight, head.bias
    alpha, gamma, (column, position, coefficient) = gradient
    # Rows without upstream gradient take no part in the products.
    live = alpha != 0 if gamma is None else (alpha != 0) | (gamma != 0)
    index = None if bool(live.all()) else live.nonzero()[:, 0]
    every, everywhere = len(batch.hidden), _that_count(batch).to(shift.dtype)
    kept = min(keep_rows, every)
    reused = kept if index is None else int((index < kept).sum())
    if index is not None:
        batch = Batch(everywhere[index], batch.temperature[index], None)
        pivot, shift, alpha = (t[index] for t in (pivot, shift, alpha))
        gamma = None if gamma is None else gamma[index]
    logits, hidden = _Logits.of(head, batch), batch.hidden
    # Without softcap and entropy the gradient is a factor a row times e: the factor scales (M, H) matrices instead.
    elementwise = gamma is not None or logits.bend is not None
    right = hidden.to(shift.dtype)
    right = right if elementwise or not need.weight else right * -alpha[:, None]

    grad_hidden = shift.new_zeros(hidden.shape if need.hidden else 0)
    grad_weight = weight.new_empty(weight.shape) if need.weight else shift.new_empty(0)
    grad_bias = bias.new_empty(bias.shape) if need.bias and bias is not None else shift.new_empty(0)
    width = min(len(weight), COLUMNS)
    buffer = shift.new_empty(min(len(hidden), ROWS) * width)
    rounded = shift.new_empty((width, weight.shape[1]) if need.weight and weight.dtype != shift.dtype else 0)
    order = column.argsort(stable=True)
    bounds = torch.searchsorted(column[order], torch.arange(0, len(weight) + COLUMNS, COLUMNS)).tolist()

    for number, start in enumerate(range(0, len(weight), COLUMNS)):
        tile = logits.tile(start)
        shape = slice(start, start + len(tile))
        columns = shift.new_zeros(len(tile))
        products = rounded[: len(tile)] if len(rounded) else grad_weight[shape]
        products.zero_()
        for rows in (*slices(0, reused, ROWS), *slices(reused, len(hidden), ROWS)):
            if rows.start < reused:
                e = _cached(cache, kept, start, len(tile))[rows if index is None else index[rows]]
                shifted = e.log() if elementwise else None
            else:
                out = buffer[: (rows.stop - rows.start) * len(tile)].view(-1, len(tile))
                lift = shift[rows, None]
                u = logits.at(rows, start, tile, out).sub_(lift.masked_fill(lift == -torch.inf, 0))
                shifted = u.clone() if elementwise else None
                e = u.exp_()
                _clear_pivot(e, pivot[rows], start)
            g = e if shifted is None else _gradient_tile(logits, e, shifted, shift, alpha, gamma, rows)
            if need.hidden:
                grad_hidden[rows].addmm_(g, tile)
            if need.weight:
                products.addmm_(g.t(), right[rows])
            if need.bias:
                columns += g.sum(0) if elementwise else -alpha[rows] @ g
        single = order[bounds[number] : bounds[number + 1]]
        if need.weight:
            terms = everywhere[position[single]] * coefficient[single, None]
            products.index_add_(0, column[single] - start, terms)
            if len(rounded):
                grad_weight[shape] = products.to(weight.dtype)
        if need.bias:
            grad_bias[shape] = columns.index_add_(0, column[single] - start, coefficient[single]).to(grad_bias.dtype)

    if need.hidden:
        if not elementwise:
            grad_hidden.mul_(-alpha[:, None])
        if index is not None:
            grad_hidden = shift.new_zeros((every, hidden.shape[1])).index_copy_(0, index, grad_hidden)
        for part in order[bounds[0] :].split(GATHER):
            terms = weight[column[part]].to(shift.dtype).mul_(coefficient[part, None])
            grad_hidden.index_add_(0, position[part], terms)
    return grad_hidden.to(dtype), grad_weight, grad_bias


def _gradient_tile(
    logits: _Logits, e: Tensor, shifted: Tensor, shift: Tensor, alpha: Tensor, gamma: Tensor | None, rows: slice
) -> Tensor:
    """Return -e f (alpha + gamma (u - shift)); `shifted` = u - shift is overwritten, `e` is not."""
    shifted.clamp_(min=FLOOR)
    bent = None if logits.bend is None else logits.bent(shifted + shift[rows, None], rows)
    if gamma is None:
        factor = shifted.copy_(alpha[rows, None].expand_as(shifted))
    else:
        factor = shifted.mul_(gamma[rows, None]).add_(alpha[rows, None])
    factor = factor if bent is None else factor.mul_(bent)
    return factor.mul_(e).neg_()
