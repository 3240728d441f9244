"""The kernels of Plackett-Luce as `mopl/ops/plackett_luce/gpu.py` launches them."""

from case import NO_APPROXIMATE_LOG, Case, load_kernels

pairwise = load_kernels("plackett_luce")
scans = load_kernels("plackett_luce_sorted")
groups = load_kernels("plackett_luce_groups")
fused = load_kernels("plackett_luce_fused")
orders = load_kernels("list_order")
plans = load_kernels("plackett_luce_plan")


def _case(
    kernel: str,
    tile: dict[str, int],
    items: int,
    objectives: int,
    scores: str = "fp32",
    labels: str = "fp32",
    order: str = "i64",
    absent: tuple[str, ...] = (),
    targets: tuple[str, ...] | None = None,
    **flags: bool,
) -> Case:
    """Return the case with pointers for all arguments but those in `absent`."""
    module = next(m for m in (pairwise, fused, orders, scans, groups) if hasattr(m, kernel))
    function = getattr(module, kernel)
    dtype = "*fp64" if scores == "fp64" else "*fp32"
    unspecialised = [parameter.name for parameter in function.params if parameter.do_not_specialize]
    known = {"scores": f"*{scores}", "labels": f"*{labels}", "mask": "*i1", "order": f"*{order}", "end": "*i32"}
    tile = dict(tile)
    warps = tile.pop("num_warps")
    elements = tile["LISTS"] * tile["ROWS"] * tile["LANES"] if "LANES" in tile else None
    if "BLOCK" in tile:
        elements = tile.get("LISTS", 1) * tile.get("ROWS", tile["BLOCK"])
    constants = {"M": objectives, **tile, **flags, **{name: None for name in absent}}
    types, divisible = {}, []
    for name in function.arg_names:
        if name in ("batch", "lists", "programs", "items", "top_k") or name.endswith("_stride"):
            types[name] = "i32"
            if items % 16 == 0 and (name == "items" or name.endswith("stride")) and name not in unspecialised:
                divisible.append(name)
        elif name not in constants:
            types[name] = known.get(name, dtype)
    label = f"{kernel.removesuffix('_kernel')} K={items} m={objectives} {scores} labels {labels}"
    return Case(
        name=label + "".join(f" {flag.lower()}" for flag, on in flags.items() if on),
        kernel=function,
        types=types,
        constants=constants,
        divisible=divisible,
        num_warps=warps,
        absent=NO_APPROXIMATE_LOG,
        targets=targets,
        elements=elements,
    )


def _pairwise(items: int, objectives: int, *absent: str, efron: bool = False, free: bool = False, **types) -> Case:
    tile = plans.pairwise_tile(items, 8 if types.get("scores") == "fp64" else 4)
    return _case("pairwise_kernel", tile, items, objectives, absent=absent, EFRON=efron, LAST_GROUP_FREE=free, **types)


def _fused(items: int, objectives: int, *absent: str, free: bool = False, **types) -> Case:
    tile = plans.fused_tile(items, 8 if types.get("scores") == "fp64" else 4)
    fill = not {"order", "mask"} <= set(absent)
    return _case("fused_kernel", tile, items, objectives, absent=absent, LAST_GROUP_FREE=free, FILL=fill, **types)


def _order(items: int, *absent: str, **types) -> Case:
    return _case("order_kernel", plans.order_tile(items), items, 1, absent=absent, **types)


def _group(items: int, *absent: str, exact: bool, **types) -> Case:
    tile = plans.group_tile(items, exact)
    return _case("group_kernel", tile, items, 2, absent=absent, EFRON=not exact, EXACT=exact, **types)


def cases() -> list[Case]:
    few = ("sm_90", "gfx942")  # what takes seconds to compile: for sm_80 and sm_100 smaller lists show that it compiles
    gradients = ("gradient", "temperature_gradient")
    return [
        _pairwise(2, 1, "order", "weights"),
        _pairwise(8, 3, "order", "weights", scores="bf16", labels="i64", free=True, efron=True),
        _pairwise(16, 3, efron=True),
        _pairwise(6, 2, "order", efron=True, scores="fp64", targets=few),
        _case("backward_kernel", plans.backward_tile(8), 8, 3),
        _fused(2, 1, "order", "mask"),
        _fused(8, 5, "order", labels="i64", free=True, targets=few),
        _fused(3, 3, "order", scores="fp64", labels="fp64", targets=few),
        _fused(120, 1, "mask", order="u8", labels="bf16", scores="bf16", targets=few),
        _fused(1000, 1, labels="i64", targets=few),
        _fused(4096, 1, order="i16", free=True, targets=few),
        _fused(2048, 3, scores="fp64", labels="fp64", targets=few),
        _order(20, "mask", labels="i1", order="u8"),
        _order(4096, order="i16", targets=few),
        _case("suffix_kernel", plans.scan_tile(10000), 10000, 2),
        _group(300, "phi", exact=False),
        _group(300, "share", "weights", "mean_weight", exact=True, targets=few),
        _case("chain_kernel", plans.scan_tile(10000), 10000, 2, absent=("phi",), BOTTOM_FREE=False),
        _case(
            "chain_kernel", plans.scan_tile(20), 20, 2, BOTTOM_FREE=True, scores="bf16", targets=few,
            absent=("share", "weights", "mean_weight"),
        ),
        _case(
            "chain_kernel", plans.scan_tile(4096), 4096, 2, BOTTOM_FREE=False, targets=few,
            absent=("cost", "passed", "share", "mean_weight", "weights", "phi", *gradients),
        ),
    ]  # fmt: skip
