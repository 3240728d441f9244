"""The kernels of `gathered_logprob` as `mopl/ops/gathered_logprob_triton.py` launches them."""

from case import ITEMSIZE, NO_APPROXIMATE_LOG, WIDE_LOADS, WIDE_LOADS_AND_STORES, Case, load_kernels

kernels = load_kernels("gathered_logprob")


def _case(
    direction: str,
    logits: str,
    vocabulary: int = 128256,
    targets: int = 1,
    softcap: float = 0.0,
    logsumexp: bool = False,
    entropy: bool = False,
    variance: bool = False,
    padded: bool = False,
) -> Case:
    """Return a case; rows of a padded one begin at multiples of 16 elements, but do not end at one."""
    exact = "*fp64" if logits == "fp64" else "*fp32"
    types = {"logits": f"*{logits}", "target": "*i64", "vocabulary": "i32", "logits_stride": "i32"}
    types |= {name: exact for name in ("temperature", "logprob", "logsumexp")}
    constants: dict[str, object] = {
        "SOFTCAP": softcap,
        "PADDED": padded,
        "TARGETS": max(2, 1 << (targets - 1).bit_length()),
    }
    if targets == 1:
        constants["targets"] = 1
    else:
        types["targets"] = "i32"
    aligned = padded or vocabulary % 16 == 0
    divisible = ["vocabulary"] if vocabulary % 16 == 0 else []
    divisible += ["logits_stride"] if aligned else []
    if direction == "forward":
        kernel, tile = kernels.forward_kernel, kernels.forward_tile(vocabulary, ITEMSIZE[logits], softcap)
        optional = {"entropy": entropy or variance, "variance": variance}
    else:
        kernel, tile = kernels.backward_kernel, kernels.backward_tile(vocabulary, ITEMSIZE[logits])
        types |= {"grad": f"*{logits}", "grad_stride": "i32", "part": "i32", "entropy": exact}
        divisible += ["part"] + (["grad_stride"] if aligned else [])
        optional = {"grad_logprob": True, "grad_logsumexp": logsumexp, "grad_entropy": entropy}
    for name, wanted in optional.items():
        if wanted:
            types[name] = exact
        else:
            constants[name] = None
    warps = tile.pop("num_warps")
    more = " entropy" * (entropy or variance) + " softcap" * bool(softcap) + " padded" * padded
    return Case(
        name=f"{direction} {logits} V={vocabulary} J={targets}{more}",
        kernel=kernel,
        types=types,
        constants=constants | tile,
        divisible=divisible,
        num_warps=warps,
        instructions=(WIDE_LOADS if direction == "forward" else WIDE_LOADS_AND_STORES) if aligned else {},
        absent=NO_APPROXIMATE_LOG,
        barrier={"logits": "grad"} if direction == "backward" and vocabulary % 16 == 0 else {},
        wide=(("logits",) if direction == "forward" else ("logits", "grad")) if aligned else (),
        elements=tile["DEPTH"] * tile["WIDTH"],
    )


def cases() -> list[Case]:
    return [
        _case("forward", "bf16"),
        _case("forward", "fp16", vocabulary=50257, targets=5, softcap=30.0, entropy=True),
        _case("forward", "bf16", vocabulary=262147, padded=True),
        _case("forward", "fp32", vocabulary=32000, variance=True),
        _case("forward", "fp64", vocabulary=1000, targets=3, softcap=30.0, variance=True),
        _case("backward", "bf16"),
        _case("backward", "fp16", vocabulary=50257, targets=5, softcap=30.0, logsumexp=True, entropy=True),
        _case("backward", "bf16", vocabulary=50257, padded=True),
        _case("backward", "fp32", vocabulary=32000, entropy=True),
        _case("backward", "fp64", vocabulary=1000, targets=3, softcap=30.0, logsumexp=True, entropy=True),
    ]
