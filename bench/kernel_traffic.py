"""The bytes that each Triton kernel moves, as functions of its arguments; tested in Triton's interpreter.

Counted is what a launch must move if nothing is read twice: every address once that is read, and once that is written.
An argument that a kernel takes whole needs no more than its name here; of others the number of elements is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Arguments:
    """Arguments of a launch by name, and its number of programs."""

    given: Mapping[str, Any]
    programs: int

    def __getattr__(self, name: str) -> Any:
        return self.given[name]


Count = Callable[[Arguments], int]


@dataclass(frozen=True)
class Kernel:
    """What one kernel moves and computes.

    Args:
        written: arguments that are written; every other tensor is read.
        changed: arguments that are read and written.
        elements: how many elements are moved of the arguments that are not taken whole.
        looked_up: how many elements are read of those that are written, where that depends on other arguments.
        product: (M, N, K) of the product that the kernel computes.
        tiles: how many tiles of it there are; by default one a program.
        turns: how often a program runs its inner loop, for its instructions; None where they depend on the data.
    """

    written: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    elements: Mapping[str, Count] = field(default_factory=dict)
    looked_up: Mapping[str, Count] = field(default_factory=dict)
    product: Callable[[Arguments], tuple[int, int, int]] | None = None
    tiles: Count = lambda a: a.programs
    turns: Count | None = lambda a: 1

    def traffic(self, a: Arguments) -> dict[str, tuple[int, int]]:
        """Return the bytes read and written of each tensor."""
        found = {}
        for name, given in a.given.items():
            tensor = tensor_of(given)
            if not isinstance(tensor, Tensor) or not tensor.numel():
                continue
            many = self.elements[name](a) if name in self.elements else _distinct(tensor)
            moved = many * tensor.element_size()
            again = self.looked_up[name](a) * tensor.element_size() if name in self.looked_up else 0
            found[name] = (
                again if name in self.written else moved,
                moved if name in self.written or name in self.changed else 0,
            )
        return found


def tensor_of(given: Any) -> Any:
    """Return the matrix that a descriptor holds; anything else as it is."""
    return getattr(given, "base", given) if type(given).__name__ == "TensorDescriptor" else given


def _distinct(x: Tensor) -> int:
    return math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride)


def _rows(*names: str) -> dict[str, Count]:
    return dict.fromkeys(names, lambda a: a.rows)


def _none(*names: str) -> dict[str, Count]:
    return dict.fromkeys(names, lambda a: 0)


def _area(a: Arguments) -> int:
    """Return rows of the width that kernels read and write: columns up to a multiple of 16."""
    return a.rows * -(-a.columns // 16) * 16


def _blocks(size: str, *block: str) -> Count:
    """Return how many blocks a size is cut into."""
    return lambda a: -(-getattr(a, size) // math.prod(getattr(a, b) for b in block))


def _objectives(a: Arguments) -> int:
    return a.M


LISTNET = ("loss", "peak", "rest", "mass", "others")
RANKING = ("loss", "gradient", "temperature_gradient")

FLAGS = Kernel(
    turns=None,
    elements={
        "flag": lambda a: a.rows,
        **_none(
            "hidden", "weight", "bias", "pivot", "shift", "temperature", "stored", "stored_moment", "partial",
            "partial_others", "partial_moment1", "partial_moment2", "others", "moment1", "moment2",
        ),
    },
)  # fmt: skip

KERNELS: dict[str, Kernel] = {
    # One pass over the logits; of the head itself nothing is read.
    "linear_logprob.exp_kernel": Kernel(
        turns=_blocks("columns", "BLOCK"),
        written=("stored", "stored_moment"),
        changed=("others", "moment1", "moment2"),
        elements={
            "tile": _area,
            "stored": _area,
            "stored_moment": _area,
            "bias": lambda a: a.columns,
            **_rows("pivot", "shift", "temperature", "counts", "others", "moment1", "moment2"),
            **_none("flag"),  # written for the rows that are computed again
        },
    ),
    # A row of hidden and one of the head for each target; as if all targets were different.
    "linear_logprob.target_logit_kernel": Kernel(
        turns=_blocks("size", "BLOCK"),
        written=("out",),
        elements={
            "hidden": lambda a: a.column.numel() * a.size,
            "weight": lambda a: a.column.numel() * a.size,
            "bias": lambda a: a.column.numel(),
            "temperature": lambda a: a.column.numel(),
        },
    ),
    # Without a flagged row, which is the rule, they read the flags.
    "linear_logprob_flagged.redo_top_kernel": FLAGS,
    "linear_logprob_flagged.redo_sum_kernel": FLAGS,
    "linear_logprob_flagged.redo_merge_kernel": FLAGS,
    "linear_logprob.combine_kernel": Kernel(
        written=("out",),
        elements={
            "weight": lambda a: (1 + (a.column is not None)) * a.out.numel(),
            "weighted_moment": lambda a: 0 if a.moment_coefficient is None else a.weighted_moment.numel(),
        },
    ),
    "linear_logprob_backward.logit_gradient_kernel": Kernel(
        written=("out",),
        elements={
            **dict.fromkeys(("stored", "out"), lambda a: a.out.shape[0] * -(-a.columns // 16) * 16),
            **dict.fromkeys(("alpha", "gamma"), lambda a: a.out.shape[0]),
            **dict.fromkeys(("shift", "temperature"), lambda a: a.out.shape[0] if a.SOFTCAP else 0),
        },
    ),
    "linear_logprob_backward.column_sum_kernel": Kernel(
        turns=_blocks("rows", "ROWS"),
        changed=("out",),
        elements={"stored": _area, "factor": lambda a: a.rows, "out": lambda a: a.columns},
    ),
    "linear_logprob_backward.scale_kernel": Kernel(written=("out",), elements={"factor": lambda a: a.out.shape[0]}),
    "fused_logprob.fused_sum_kernel": Kernel(
        turns=None, written=("partial", "flag"), product=lambda a: (a.rows, a.vocabulary, a.size)
    ),
    "linear_logprob_products.exponential_kernel": Kernel(
        turns=None,
        written=("stored", "partial", "flag"),
        product=lambda a: (a.rows, a.vocabulary, a.size),
        tiles=lambda a: -(-a.rows // a.BM) * -(-a.vocabulary // a.BV),
    ),
    # As if all entries had columns of their own, and counted.
    "linear_logprob_products.weight_gradient_kernel": Kernel(
        turns=None,
        written=("out",),
        product=lambda a: (a.vocabulary, a.size, a.rows),
        tiles=lambda a: -(-a.vocabulary // a.BV) * -(-a.size // a.BH),
    ),
    "linear_logprob_products.pivot_kernel": Kernel(
        turns=None,
        written=("out", "place"),
        elements={
            **dict.fromkeys(("hidden", "out"), lambda a: a.column.numel() * a.size),
            "place": lambda a: a.column.numel(),
        },
        looked_up={"out": lambda a: a.column.numel() * a.size if a.place is None else 0},
    ),
    "gathered_logprob.forward_kernel": Kernel(
        turns=_blocks("vocabulary", "DEPTH", "WIDTH"), written=("logprob", "logsumexp", "entropy", "variance")
    ),
    "gathered_logprob.backward_kernel": Kernel(
        turns=_blocks("part", "DEPTH", "WIDTH"),
        written=("grad",),
        elements={"entropy": lambda a: 0 if a.grad_entropy is None else a.entropy.numel()},
    ),
    "listnet.forward_kernel": Kernel(turns=_objectives, written=("loss",)),
    "listnet.forward_loop_kernel": Kernel(turns=_blocks("items", "BLOCK"), written=LISTNET),
    "listnet.backward_kernel": Kernel(
        turns=_objectives,
        written=("dscores", "dlabels", "dtemperature"),
        elements={"loss": lambda a: 0 if a.dlabels is None else a.loss.numel()},
    ),
    "plackett_luce.pairwise_kernel": Kernel(turns=lambda a: a.M * a.BLOCK // a.ROWS, written=RANKING),
    "plackett_luce.backward_kernel": Kernel(turns=_objectives, written=("dscores",)),
    "plackett_luce_fused.fused_kernel": Kernel(written=RANKING),
    "list_order.order_kernel": Kernel(written=("order",)),
    "plackett_luce_sorted.suffix_kernel": Kernel(turns=_blocks("items", "BLOCK"), written=("top", "mass", "end")),
    # As if no items were tied: what groups of several cost is not read, and every program of the other kernel only asks
    # whether such groups begin at its places.
    "plackett_luce_sorted.chain_kernel": Kernel(
        turns=_blocks("items", "BLOCK"),
        written=RANKING,
        elements=_none("cost", "passed", "share", "mean_weight", "phi"),
    ),
    "plackett_luce_groups.group_kernel": Kernel(
        turns=None,
        elements=_none(
            "scores", "weights", "temperature", "top", "mass", "cost", "passed", "share", "mean_weight", "phi"
        ),
    ),
}


def kernel(name: str) -> Kernel:
    """Return what a kernel moves.

    Raises:
        LookupError: for a kernel that nobody has described.
    """
    if name not in KERNELS:
        raise LookupError(
            f"{name} is launched but bench/kernel_traffic.py does not say how many bytes it moves; add it to KERNELS"
        )
    return KERNELS[name]
