"""The kernels of listwise cross-entropy as `mopl/ops/listnet/gpu.py` launches them."""

import math

from case import NO_APPROXIMATE_LOG, Case, load_kernels

kernels = load_kernels("listnet")
STRIDES = ("scores_stride", "labels_stride", "labels_objective_stride", "mask_stride")
SMALL_STRIDES = ("temperature_stride", "temperature_objective_stride")


def _case(
    direction: str,
    items: int,
    objectives: int,
    scores: str = "fp32",
    labels: str = "fp32",
    common: bool = True,
    masked: bool = True,
    normalize: bool = True,
    targets: tuple[str, ...] | None = None,
) -> Case:
    dtype, itemsize = ("fp64", 8) if scores == "fp64" else ("fp32", 4)
    types = {name: "i32" for name in ("batch", "items", *STRIDES, *SMALL_STRIDES)}
    types |= {"scores": f"*{scores}", "labels": f"*{labels}", "mask": "*i1"}
    types |= {name: f"*{dtype}" for name in ("temperature", "loss")}
    saved = {"peak": "*i64"} | {name: f"*{dtype}" for name in ("rest", "mass", "others")}
    constants = {"M": objectives, "COMMON": common, "NORMALIZE": normalize}
    if direction == "forward":
        kernel = kernels.forward_kernel
        if items > kernels.registers_limit(itemsize):
            kernel, types = kernels.forward_loop_kernel, types | saved
        tile = kernels.forward_tile(items, itemsize)
    else:
        kernel, tile = kernels.backward_kernel, kernels.backward_tile(items, itemsize)
        types |= {"grad_loss": f"*{dtype}", "dscores": f"*{scores}", "dtemperature": f"*{dtype}"}
        if items > kernels.registers_limit(itemsize):
            types |= saved
        else:
            constants |= dict.fromkeys(saved)
        types |= {"grad_stride": "i32", "grad_objective_stride": "i32"}
        if labels == "i64":
            constants["dlabels"] = None
        else:
            types["dlabels"] = f"*{labels}"
    if not masked:
        del types["mask"]
        constants["mask"] = None
    constants["ALIGN"] = math.gcd(16, items)
    warps = tile.pop("num_warps")
    # Of shorter lists a lane holds fewer than 16 bytes, or a program several lists.
    long = items >= 1000 and not masked
    return Case(
        name=f"{direction} K={items} m={objectives} {scores} labels {labels}{' common' if common else ''}",
        kernel=kernel,
        types=types,
        constants=constants | tile,
        divisible=("items",) if items % 16 == 0 else (),
        num_warps=warps,
        absent=NO_APPROXIMATE_LOG,
        targets=targets,
        wide=("scores", "labels", *(["dscores"] if direction == "backward" else [])) if long else (),
        elements=tile["LISTS"] * tile["BLOCK"],
    )


def cases() -> list[Case]:
    both = [
        {"items": 2, "objectives": 2},
        {"items": 8, "objectives": 5, "scores": "bf16", "common": False},
        {"items": 120, "objectives": 5, "labels": "i64", "masked": False},
    ]
    unequal = {"objectives": 2, "common": False}
    few = ("sm_90", "gfx942")
    double = {"scores": "fp64", "labels": "fp64", "targets": few, **unequal}
    return [
        *(_case("forward", **shape) for shape in both),
        *(_case("backward", **shape) for shape in both),
        _case("backward", 2048, scores="fp16", labels="bf16", normalize=False, **unequal),
        _case("forward", 2048, 1, scores="fp16", labels="bf16", normalize=False, masked=False),
        _case("backward", 2048, 1, masked=False),
        _case("forward", 1000, 1, masked=False),  # a multiple of 8 alone
        _case("forward", 4096, **unequal),
        _case("backward", 4096, **unequal),
        _case("forward", 2048, **double),
        _case("forward", 20000, **unequal),
        _case("forward", 20000, 1, scores="bf16", labels="bf16", normalize=False, masked=False),
        _case("forward", 20000, 3, scores="fp16", labels="i64", targets=few),
        _case("forward", 20000, **double),
        _case("backward", 1000, **double),
        _case("backward", 2048, **double),
        _case("backward", 20000, **double),
        _case("backward", 20000, 1, scores="bf16", labels="bf16", normalize=False, masked=False),
    ]
