"""The kernels of `linear_logprob` as `mopl/ops/linear_logprob/gpu.py` launches them."""

from case import ITEMSIZE, SHARED_KIB, TENSOR_CORES, WIDE_LOADS, Case, load_kernels

kernels = load_kernels("linear_logprob")
backward = load_kernels("linear_logprob_backward")
flagged = load_kernels("linear_logprob_flagged")
fused = load_kernels("fused_logprob")
products = load_kernels("linear_logprob_products")

# Products of a warp group whose operands the copy engine brings.
COPY_ENGINE = {"sm_90": ("wgmma", "cp.async.bulk.tensor")}
HOPPER_OR_LATER = ("sm_90", "sm_100")  # whose products read shared memory while the next loads run: `shared_bytes`


def _case(name: str, kernel, types: dict[str, str], constants: dict[str, object], tile: dict[str, int], **more) -> Case:
    """Build a case: pointers that are None, and tiles with num_warps among their entries."""
    tile = dict(tile)
    given = {key: kind for key, kind in types.items() if kind is not None}
    nothing = {key: None for key, kind in types.items() if kind is None}
    return Case(
        name=name,
        kernel=kernel,
        types=given,
        num_warps=tile.pop("num_warps"),
        num_stages=tile.pop("num_stages", None),
        constants=nothing | constants | tile,
        **more,
    )


def _arithmetic(operand: str) -> str:
    return "*fp64" if operand == "fp64" else "*fp32"


def _target(operand: str, softcap: float = 0.0, shared: bool = False, bias: bool = False) -> Case:
    exact = _arithmetic(operand)
    types = {"hidden": f"*{operand}", "weight": f"*{operand}", "bias": f"*{operand}" if bias else None}
    types |= {"column": "*i64", "position": "*i64" if shared else None, "temperature": exact, "out": exact}
    types |= dict.fromkeys(("size", "hidden_stride", "weight_stride"), "i32")
    return _case(
        f"target {operand}{' shared' * shared}{' softcap' * bool(softcap)}{' bias' * bias}",
        kernels.target_logit_kernel,
        types,
        {"SOFTCAP": softcap, "LOGIT_SCALE": 0.5 if bias else 1.0},
        kernels.TARGET_TILE,
        divisible=("size", "hidden_stride", "weight_stride"),
        wide=("hidden", "weight"),
        elements=kernels.TARGET_TILE["BLOCK"],
    )


def _sums(operand: str, stored: str | None, moments: int, bent: bool, bias: bool) -> dict[str, str | None]:
    """Types of what `exp_kernel` and `redo_kernel` share."""
    exact = _arithmetic(operand)
    return {
        "bias": f"*{operand}" if bias else None,
        "pivot": "*i64",
        "shift": exact,
        "temperature": exact,
        "counts": "*i1",
        "stored": None if stored is None else f"*{stored}",
        "stored_moment": f"*{stored}" if stored is not None and bent and moments else None,
        "others": exact,
        "moment1": exact if moments > 0 else None,
        "moment2": exact if moments > 1 else None,
        "flag": "*i8",
        "first_row": "i32",
        "rows": "i32",
        "stored_stride": "i32",
    }


def _exp(
    operand: str, stored: str | None = None, moments: int = 0, softcap: float = 0.0, bent: bool = False,
    bias: bool = False,
) -> Case:  # fmt: skip
    itemsize = 8 if operand == "fp64" else 4
    shape = kernels.exp_tile(itemsize)
    types = {"tile": _arithmetic(operand)} | _sums(operand, stored, moments, bent, bias)
    types |= dict.fromkeys(("first_column", "columns", "tile_stride"), "i32")
    kept = f" keep {stored}" if stored else ""
    return _case(
        f"exp {operand}{kept} moments={moments}{' softcap' * bool(softcap)}",
        kernels.exp_kernel,
        types,
        {"SOFTCAP": softcap, "LOGIT_SCALE": 0.5 if bias else 1.0, "BENT": bent, "LIMIT": kernels.LIMIT},
        shape,
        divisible=("first_column", "tile_stride", "stored_stride"),  # whatever the vocabulary: `columns` is not asked
        instructions=WIDE_LOADS if itemsize == 4 else {},
        wide=["tile", *(name for name in ("stored", "stored_moment") if types[name])],
        elements=shape["ROWS"] * shape["BLOCK"],
    )


def _redo(
    operand: str, stored: str | None, moments: int = 0, softcap: float = 0.0, bent: bool = False, bias: bool = False,
    **more,
) -> list[Case]:  # fmt: skip
    exact, tile = _arithmetic(operand), flagged.redo_tile(8 if operand == "fp64" else 4)
    merge = flagged.merge_tile(flagged.PARTS)
    name = (
        f"{operand}{f' keep {stored}' if stored else ''} moments={moments}{' softcap' * bool(softcap)}{' bias' * bias}"
    )
    constants = {"SOFTCAP": softcap, "LOGIT_SCALE": 0.5 if bias else 1.0}
    known = _sums(operand, stored, moments, bent, bias)
    rows = {"temperature": exact, "flag": "*i8", "partial": exact}
    partial = {f"partial_{sums}": known[sums] for sums in ("others", "moment1", "moment2")}
    heads = {"hidden": f"*{operand}", "weight": f"*{operand}", "bias": f"*{operand}" if bias else None, "pivot": "*i64"}
    sizes = ("first_row", "rows", "size", "vocabulary", "part", "hidden_stride", "weight_stride")
    divisible = ("size", "vocabulary", "part", "hidden_stride", "weight_stride")
    top = {**heads, "flag": "*i8", "partial": exact, **dict.fromkeys(sizes, "i32")}
    sums = {**heads, **rows, **{part: known[part] for part in ("stored", "stored_moment")}, **partial}
    sums |= dict.fromkeys((*sizes, "parts", "stored_stride"), "i32")
    merged = {**rows, **partial, **{part: known[part] for part in ("shift", "others", "moment1", "moment2")}}
    merged |= dict.fromkeys(("first_row", "rows", "parts"), "i32")
    products = {"wide": ("weight",), "elements": tile["BV"] * tile["BH"], **more}
    cases = [
        _case(
            f"redo {name}",
            flagged.redo_sum_kernel,
            sums,
            constants | {"BENT": bent, "PARTS": merge["PARTS"]},
            tile,
            divisible=(*divisible, "stored_stride"),
            **products,
        )
    ]
    if stored != operand or moments or bias:
        cases += [
            _case(f"redo top {name}", flagged.redo_top_kernel, top, constants, tile, divisible=divisible, **products),
            _case(f"redo merge {name}", flagged.redo_merge_kernel, merged, constants, merge),
        ]
    return cases


def _combine(operand: str, out: str, size: int, moment: bool = False, shared: bool = False) -> Case:
    exact = _arithmetic(operand)
    types = {"weight": f"*{operand}", "weighted": exact, "weighted_moment": exact if moment else None}
    types |= {"pivot": "*i64", "pivot_coefficient": exact, "weighted_coefficient": exact, "out": f"*{out}"}
    types |= {"moment_coefficient": exact if moment else None, "own_coefficient": exact if shared else None}
    types |= {"column": "*i64" if shared else None, "position": "*i64" if shared else None}
    types |= dict.fromkeys(("size", "weight_stride", "weighted_stride"), "i32")
    tile = kernels.combine_tile(size)
    return _case(
        f"combine {operand} to {out} H={size}{' shared' * shared}{' moment' * moment}",
        kernels.combine_kernel,
        types,
        {},
        tile,
        divisible=("size", "weight_stride", "weighted_stride") if size % 16 == 0 else (),
        wide=("weight", "weighted", "out") if size % 16 == 0 else (),
        elements=tile["BLOCK"],
    )


def _gradient(stored: str, softcap: float = 0.0, gamma: bool = True) -> Case:
    exact = _arithmetic(stored)
    types = {"stored": f"*{stored}", "alpha": exact, "gamma": exact if gamma else None, "shift": exact}
    types |= {"temperature": exact, "out": f"*{stored}"}
    types |= dict.fromkeys(("first_row", "columns", "stored_stride", "out_stride"), "i32")
    return _case(
        f"gradient {stored}{' softcap' * bool(softcap)}{' entropy' * gamma}",
        backward.logit_gradient_kernel,
        types,
        {"SOFTCAP": softcap},
        backward.GRADIENT_TILE,
        divisible=("stored_stride", "out_stride"),  # whatever the vocabulary
        instructions=WIDE_LOADS if stored != "fp64" else {},
        wide=("stored", "out"),
        elements=backward.GRADIENT_TILE["BLOCK"],
    )


def _column_sum(stored: str) -> Case:
    types = {"stored": f"*{stored}", "factor": _arithmetic(stored), "out": _arithmetic(stored)}
    types |= dict.fromkeys(("first_row", "rows", "columns", "stored_stride"), "i32")
    return _case(
        f"column sum {stored}",
        backward.column_sum_kernel,
        types,
        {},
        backward.COLUMN_SUM_TILE,
        divisible=("stored_stride",),
        wide=("stored",),
        elements=backward.COLUMN_SUM_TILE["ROWS"] * backward.COLUMN_SUM_TILE["BLOCK"],
    )


def _scale(operand: str, size: int) -> Case:
    types = {"x": f"*{operand}", "factor": _arithmetic(operand), "out": f"*{operand}"}
    types |= dict.fromkeys(("first_row", "size", "x_stride"), "i32")
    return _case(
        f"scale {operand} H={size}",
        backward.scale_kernel,
        types,
        {},
        backward.scale_tile(size),
        divisible=("size", "x_stride"),
        wide=("x", "out"),
        elements=backward.scale_tile(size)["BLOCK"],
    )


def _fused(operand: str, name: str, softcap: float = 0.0, bias: bool = False) -> Case | None:
    """Return the case of a tile for the targets that use it."""
    tile = fused.TILES[name]
    targets = [
        target
        for target, kib in SHARED_KIB.items()
        if name in fused.usable_tiles(ITEMSIZE[operand], kib * 1024, target in HOPPER_OR_LATER, softcap > 0)
    ]
    types = {"hidden": f"*{operand}", "weight": f"*{operand}", "bias": f"*{operand}" if bias else None}
    types |= {"pivot": "*i64", "shift": "*fp32", "temperature": "*fp32", "counts": "*i1"}
    types |= {"partial": "*fp32", "flag": "*i8"}
    types |= dict.fromkeys(("rows", "size", "vocabulary", "hidden_stride", "weight_stride"), "i32")
    # Float32 is exact arithmetic without tensor cores; 16 rows are below the 64 of Hopper's and Blackwell's products,
    # and reading the head bounds their time.
    cores = {} if operand == "fp32" else dict(TENSOR_CORES)
    absent = {}
    if name == "few":
        cores["sm_90"] = cores["sm_100"] = ("mma.sync",)
    elif operand != "fp32":
        absent = {"sm_90": ("mma.sync",), "sm_100": ("mma.sync",)}
    return _case(
        f"fused {name} {operand}{' softcap' * bool(softcap)}{' bias' * bias}",
        fused.fused_sum_kernel,
        types,
        {"SOFTCAP": softcap, "LOGIT_SCALE": 1.0, "LIMIT": kernels.LIMIT, "UPCAST": False},
        tile,
        divisible=("rows", "size", "vocabulary", "hidden_stride", "weight_stride"),
        instructions=cores,
        absent=absent,
        targets=targets,
        wide=("hidden", "weight"),
        elements=(tile["BM"] + tile["BV"]) * tile["BH"],
    )


def _exponential(operand: str, stored: bool, bias: bool = False) -> Case:
    tile = products.TILE
    blocks = {"hidden": ("BM", "BH"), "weight": ("BV", "BH")} | ({"stored": ("BM", "BV")} if stored else {})
    types: dict[str, str | None] = {
        name: f"tensordesc<{operand}[{','.join(str(tile[size]) for size in block)}]>" for name, block in blocks.items()
    }
    types |= {} if stored else {"stored": None}
    types |= {"bias": f"*{operand}" if bias else None, "pivot": "*i64", "shift": "*fp32", "temperature": "*fp32"}
    types |= {"counts": "*i1", "partial": "*fp32", "flag": "*i8"} | dict.fromkeys(("rows", "size", "vocabulary"), "i32")
    return _case(
        f"exponential {operand}{' stored' * stored}{' bias' * bias}",
        products.exponential_kernel,
        types,
        {"LOGIT_SCALE": 1.0, "LIMIT": kernels.LIMIT, "UPCAST": False},
        tile,
        divisible=("size", "vocabulary"),
        instructions=COPY_ENGINE,
        absent={"sm_90": ("mma.sync",)},
        targets=("sm_90",),
        elements=(tile["BM"] + tile["BV"]) * tile["BH"],
    )


def _weight_gradient(operand: str) -> Case:
    tile = products.GRADIENT_TILE
    blocks = {"stored": ("BM", "BV"), "inner": ("BM", "BH"), "out": ("BV", "BH")}
    types: dict[str, str | None] = {
        name: f"tensordesc<{operand}[{','.join(str(tile[size]) for size in block)}]>" for name, block in blocks.items()
    }
    types |= {"added": "*fp32", "place": "*i32", "unit": "*fp32" if operand == "fp16" else None}
    types |= dict.fromkeys(("rows", "size", "vocabulary"), "i32")
    return _case(
        f"weight gradient {operand}",
        products.weight_gradient_kernel,
        types,
        {"UPCAST": False},
        tile,
        divisible=("size", "vocabulary"),
        instructions=COPY_ENGINE,
        absent={"sm_90": ("mma.sync",)},
        targets=("sm_90",),
        elements=(tile["BV"] + tile["BH"]) * tile["BM"],
    )


def _pivot(operand: str, added: bool, size: int = 4096) -> Case:
    tile, exact = products.pivot_tile(size), _arithmetic(operand)
    types: dict[str, str | None] = {"hidden": f"*{operand}", "coefficient": exact, "out": exact}
    types |= dict.fromkeys(("column", "position", "stop"), "*i64") | {"place": None if added else "*i32"}
    types |= dict.fromkeys(("size", "vocabulary", "hidden_stride"), "i32")
    return _case(
        f"pivot {operand}{' added' * added}",
        products.pivot_kernel,
        types,
        {},
        tile,
        divisible=("size", "vocabulary", "hidden_stride"),
        wide=("hidden",),
        elements=tile["ENTRIES"] * tile["BLOCK"],
    )


def cases() -> list[Case]:
    return [
        _target("bf16"),
        _target("fp16", softcap=30.0, shared=True, bias=True),
        _target("bf16", bias=True),
        _target("fp32", bias=True),
        _target("fp64", shared=True, bias=True),
        _exp("bf16"),
        _exp("bf16", stored="bf16"),
        _exp("fp16", stored="fp16", moments=1, bent=True, bias=True),
        _exp("bf16", stored="bf16", moments=2, softcap=30.0, bent=True, bias=True),
        _exp("fp32", stored="fp32", moments=1, bent=True, bias=True),
        _exp("fp64", stored="fp64", moments=2, softcap=30.0, bent=True, bias=True),
        *_redo("bf16", None),
        *_redo("bf16", "bf16"),
        *_redo("fp16", "fp16", moments=1, bent=True, bias=True),
        *_redo("fp32", "fp32", moments=1, bent=True, bias=True),
        *_redo("bf16", "bf16", moments=2, softcap=30.0, bent=True),
        *_redo("bf16", "bf16", bias=True),
        *_redo("fp64", "fp64", moments=2, softcap=30.0, bent=True, bias=True),
        _combine("bf16", "bf16", 4096),
        _combine("fp16", "fp32", 4096),
        _combine("fp16", "fp16", 4096),
        _combine("bf16", "bf16", 2048, moment=True, shared=True),
        _combine("fp32", "fp32", 1000),
        _combine("fp64", "fp64", 100, moment=True, shared=True),
        _gradient("bf16"),
        _gradient("fp16"),
        _gradient("fp32", softcap=30.0),
        _gradient("bf16", softcap=30.0, gamma=False),
        _gradient("fp64"),
        _column_sum("bf16"),
        _column_sum("fp32"),
        _column_sum("fp16"),
        _column_sum("fp64"),
        _scale("bf16", 4096),
        _scale("fp32", 2048),
        _scale("fp16", 2048),
        _scale("fp64", 2048),
        _exponential("bf16", stored=False),
        _exponential("bf16", stored=True),
        _exponential("bf16", stored=True, bias=True),
        _exponential("fp16", stored=False, bias=True),
        _exponential("fp16", stored=True, bias=True),
        _weight_gradient("bf16"),
        _weight_gradient("fp16"),
        _pivot("bf16", added=False),
        _pivot("fp16", added=False),
        _pivot("bf16", added=True),
        _pivot("fp16", added=True),
        _pivot("fp32", added=True),
        _pivot("fp64", added=True),
        _fused("bf16", "wide"),
        _fused("bf16", "square", softcap=30.0, bias=True),
        _fused("fp16", "square", bias=True),
        _fused("bf16", "short"),
        _fused("bf16", "short", softcap=30.0),
        _fused("bf16", "few", bias=True),
        _fused("fp32", "float32", softcap=30.0, bias=True),
    ]
