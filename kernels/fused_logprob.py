"""The product of hidden states and head with its epilogue in one kernel: scoring without gradient, no [M, V] written.

It computes what `exp_kernel` of `linear_logprob` does after the library's product, the sums of exp(u - shift) with the
pivot left out. It serves short batches, where reading the head bounds the time, and is a candidate for long ones where
`linear_logprob_products` does not serve them.
"""

import triton
import triton.language as tl

from .linear_logprob import LOG2E, bent, exponent, scale_of

# Tiles by what they are for. 128 x 256 x 64 needs 8 warps and stays within 255 registers; 64 rows serve short batches,
# 16 those that are bound by reading the head alone.
TILES = {
    "wide": {"BM": 128, "BV": 256, "BH": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3},
    "square": {"BM": 128, "BV": 128, "BH": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3},
    "short": {"BM": 64, "BV": 128, "BH": 64, "GROUP": 4, "num_warps": 4, "num_stages": 3},
    "few": {"BM": 16, "BV": 128, "BH": 64, "GROUP": 16, "num_warps": 4, "num_stages": 4},
    "float32": {"BM": 32, "BV": 64, "BH": 32, "GROUP": 8, "num_warps": 4, "num_stages": 2},
}


def shared_bytes(tile: dict[str, int], itemsize: int, every_stage: bool) -> int:
    """Return the shared memory of a tile: both operands for each stage of the pipeline, and room for barriers.

    Products that read shared memory while the next loads run (`every_stage`: NVIDIA's from compute capability 9 on)
    keep a buffer for every stage; others copy a stage to registers first and need one less.
    """
    stages = tile["num_stages"] - (0 if every_stage else 1)
    return (tile["BM"] + tile["BV"]) * tile["BH"] * itemsize * stages + (256 if every_stage else 0)


def usable_tiles(itemsize: int, shared_limit: int, every_stage: bool, softcap: bool) -> list[str]:
    """Return the names of the tiles that fit a GPU with `shared_limit` bytes of shared memory for one block.

    With a softcap the epilogue of the widest tile needs more registers than there are.
    """
    names = ["float32"] if itemsize == 4 else [name for name in TILES if name != "float32"]
    names = [name for name in names if not (softcap and name == "wide")]
    return [name for name in names if shared_bytes(TILES[name], itemsize, every_stage) <= shared_limit]


@triton.jit
def tile_at(index, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Return the tile of rows and the tile of columns of a product's tile.

    Tiles of columns run slowly and tiles of rows fast within a group, so that a tile of the second operand is read from
    DRAM once for GROUP tiles of rows.
    """
    per_group = GROUP * column_tiles
    first = index // per_group * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    return first + (index % per_group) % height, (index % per_group) // height


@triton.jit
def exponentials(
    a,  # (BM, BV): <hidden, weight>
    n,  # (BM,): the rows of the tile
    first_column,
    bias,  # (V,) or None
    pivot,  # (M,) int64
    shift,  # (M,)
    temperature,  # (M,)
    counts,  # (M,) bool: whether a row counts; None: all do
    flag,  # (M,) int8 of this tile of the vocabulary: 1 where the shift is too small for the row
    others,  # (M,) of it: the sums
    rows,  # M
    vocabulary,  # V
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Write the sums of a tile and return exp(u - shift), 0 at pivots, off the matrix and in rows that do not count."""
    c = tl.arange(0, a.shape[1])
    v = first_column + c
    inside = n < rows
    live = inside
    if counts is not None:
        live = inside & tl.load(counts + n, mask=inside, other=0)
    if bias is not None:
        a += tl.load(bias + v, mask=v < vocabulary, other=0.0).to(a.dtype)[None, :]
    s = tl.load(shift + n, mask=live, other=0.0)
    k = scale_of(tl.load(temperature + n, mask=live, other=1.0), SOFTCAP, LOGIT_SCALE)
    q = tl.load(pivot + n, mask=live, other=-1) - first_column
    b, _f = bent(a, SOFTCAP, LOGIT_SCALE)
    special = ((q >= 0) & (q < a.shape[1])) | (live == 0)
    if (tl.max(special.to(tl.int32), axis=0) > 0) | (first_column + a.shape[1] > vocabulary):
        # A row that does not count may hold NaN.
        kept = live[:, None] & (v < vocabulary)[None, :] & (c[None, :] != q.to(tl.int32)[:, None])
        b = tl.where(kept, b, float("-inf"))
    e = tl.exp2(exponent(b, k[:, None], s[:, None]) * LOG2E)
    total = tl.sum(e, axis=1)
    tl.store(others + n, total, mask=inside)
    bad = (total > LIMIT) | (s == float("-inf"))
    tl.store(flag + n, (live & bad).to(tl.int8), mask=inside)
    return e


@triton.jit
def fused_sum_kernel(
    hidden,  # (M, H)
    weight,  # (V, H)
    bias,  # (V,) or None
    pivot,  # (M,) int64
    shift,  # (M,)
    temperature,  # (M,)
    counts,  # (M,) bool: whether a row counts; None: all do
    partial,  # (tiles, M) sums of a tile of the vocabulary
    flag,  # (tiles, M) int8: 1 where the shift is too small for the row
    rows,  # M
    size,  # H
    vocabulary,  # V
    hidden_stride,
    weight_stride,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    LIMIT: tl.constexpr,
    BM: tl.constexpr,
    BV: tl.constexpr,
    BH: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program for a tile of rows and a tile of the vocabulary; see `tile_at`."""
    row_tile, column_tile = tile_at(tl.program_id(0), tl.cdiv(rows, BM), tl.cdiv(vocabulary, BV), GROUP)
    n = row_tile * BM + tl.arange(0, BM)
    v = column_tile * BV + tl.arange(0, BV)
    # Rows and columns past the end read row 0: in range, and dropped below. Loads without a mask pipeline best.
    n_read = tl.where(n < rows, n, 0).to(tl.int64)
    v_read = tl.where(v < vocabulary, v, 0).to(tl.int64)
    a = tl.zeros([BM, BV], dtype=partial.dtype.element_ty)
    for start in range(0, size, BH):
        j = start + tl.arange(0, BH)
        h = tl.load(hidden + n_read[:, None] * hidden_stride + j[None, :], mask=(j < size)[None, :], other=0.0)
        w = tl.load(weight + v_read[None, :] * weight_stride + j[:, None], mask=(j < size)[:, None], other=0.0)
        if UPCAST:  # the interpreter multiplies the bit patterns of bf16
            h, w = h.to(partial.dtype.element_ty), w.to(partial.dtype.element_ty)
        a = tl.dot(h, w, acc=a, input_precision="ieee")
    place = column_tile.to(tl.int64) * rows
    exponentials(
        a, n, column_tile * BV, bias, pivot, shift, temperature, counts, flag + place, partial + place, rows,
        vocabulary, SOFTCAP, LOGIT_SCALE, LIMIT,
    )  # fmt: skip
