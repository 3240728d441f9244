"""The kernels of Plackett-Luce as `mopl/ops/plackett_luce_triton.py` launches them."""

from case import NO_APPROXIMATE_LOG, Case, load_kernels

pairwise = load_kernels("plackett_luce")
scans = load_kernels("plackett_luce_sorted")
groups = load_kernels("plackett_luce_groups")


def _case(
    kernel: str,
    tile: dict[str, int],
    items: int,
    objectives: int,
    scores: str = "fp32",
    labels: str = "fp32",
    absent: tuple[str, ...] = (),
    targets: tuple[str, ...] | None = None,
    **flags: bool,
) -> Case:
    """Return the case with pointers for all arguments but those in `absent`."""
    module = next(m for m in (pairwise, scans, groups) if hasattr(m, kernel))
    function = getattr(module, kernel)
    dtype = "*fp64" if scores == "fp64" else "*fp32"
    known = {"scores": f"*{scores}", "labels": f"*{labels}", "mask": "*i1", "order": "*i64", "end": "*i32"}
    tile = dict(tile)
    warps = tile.pop("num_warps")
    elements = tile.get("LISTS", 1) * tile.get("ROWS", tile["BLOCK"]) if "BLOCK" in tile else None
    constants = {"M": objectives, **tile, **flags, **{name: None for name in absent}}
    types, divisible = {}, []
    for name in function.arg_names:
        if name in ("batch", "items", "top_k") or name.endswith("_stride"):
            types[name] = "i32"
            if items % 16 == 0 and (name == "items" or name.endswith("stride")) and "temperature" not in name:
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
    tile = pairwise.pairwise_tile(items, 8 if types.get("scores") == "fp64" else 4)
    return _case("pairwise_kernel", tile, items, objectives, absent=absent, EFRON=efron, LAST_GROUP_FREE=free, **types)


def _group(items: int, *absent: str, exact: bool, **types) -> Case:
    tile = groups.group_tile(items, exact)
    return _case("group_kernel", tile, items, 2, absent=absent, EFRON=not exact, EXACT=exact, **types)


def cases() -> list[Case]:
    few = ("sm_90", "gfx942")
    gradients = ("gradient", "temperature_gradient")
    return [
        _pairwise(2, 1, "order", "weights"),
        _pairwise(8, 3, "order", "weights", scores="bf16", labels="i64", free=True),
        _pairwise(32, 3, efron=True),
        _pairwise(120, 5, "order", "weights"),
        _pairwise(128, 2, "mask", efron=True, labels="bf16", scores="fp16"),
        _pairwise(6, 2, "order", efron=True, scores="fp64", targets=few),
        _case("backward_kernel", pairwise.backward_tile(8), 8, 3),
        _case("fused_kernel", scans.fused_tile(200), 200, 1, LAST_GROUP_FREE=True, absent=("mask",), labels="i32"),
        _case("fused_kernel", scans.fused_tile(2048), 2048, 3, LAST_GROUP_FREE=False, scores="bf16"),
        _case("fused_kernel", scans.fused_tile(2048), 2048, 3, LAST_GROUP_FREE=False, scores="fp64", targets=few),
        _case("suffix_kernel", scans.scan_tile(10000), 10000, 2),
        _group(300, "phi", exact=False),
        _group(300, "share", "weights", "mean_weight", exact=True),
        _case("chain_kernel", scans.scan_tile(10000), 10000, 2, absent=("phi",), BOTTOM_FREE=False),
        _case(
            "chain_kernel", scans.scan_tile(20), 20, 2, BOTTOM_FREE=True, scores="bf16", targets=few,
            absent=("share", "weights", "mean_weight"),
        ),
        _case(
            "chain_kernel", scans.scan_tile(4096), 4096, 2, BOTTOM_FREE=False, targets=few,
            absent=("cost", "passed", "share", "mean_weight", "weights", "phi", *gradients),
        ),
    ]  # fmt: skip
