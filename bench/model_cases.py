"""What the performance model runs: ops, peers, sizes, what of each is unavoidable, and the goals.

A case makes its tensors and returns a step, forward and backward, on any device: fake tensors of full size for the
model, real ones on a GPU for its measured column, tiny ones where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import goals
from mopl.ops import gathered_logprob, linear_kl, linear_logprob, listwise_cross_entropy, plackett_luce_nll

Step = Callable[[], object]
GIB = 2**30


@dataclass(frozen=True)
class Sizes:
    """Sizes of the goals."""

    rows: int = 16384
    hidden: int = 4096
    vocabulary: int = 128256
    logits_vocabulary: int = 151936
    items: int = 100_000_000
    lengths: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 120, 256, 512, 1000, 2048, 4096)


TOY = Sizes(rows=6, hidden=32, vocabulary=300, logits_vocabulary=300, items=24, lengths=(2, 4))


@dataclass(frozen=True)
class Case:
    """One op with one set of options at one size.

    Args:
        op: its group, as for `--op`.
        name: what is special about it, unique within the op.
        make: draws the tensors on a device and returns the step.
        flop: FLOP that cannot be avoided, of products of bf16.
        bytes: bytes that cannot be avoided.
        ms: the goal in milliseconds on an H200, or None.
        share: the goal as a share of the limit, or None.
        peer_of: name of the case that must not be slower than this one.
        traffic: bytes of a peer that cannot be recorded; one launch each way.
    """

    op: str
    name: str
    make: Callable[[torch.device], Step] | None
    flop: int = 0
    bytes: int = 0
    ms: float | None = None
    share: float | None = None
    peer_of: str | None = None
    traffic: int = 0

    @property
    def key(self) -> str:
        return f"{self.op} {self.name}"


def _backward(output: Tensor, upstream: Tensor, *inputs: Tensor) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(output, inputs, upstream, retain_graph=False)


def _head_step(s: Sizes, mode: str, device: torch.device, extra: str = "", **options: object) -> Step:
    hidden = torch.randn(s.rows, s.hidden, device=device, dtype=torch.bfloat16)
    weight = torch.randn(s.vocabulary, s.hidden, device=device, dtype=torch.bfloat16) * s.hidden**-0.5
    target = torch.randint(s.vocabulary, (s.rows,), device=device)
    if extra == "mask":
        options["mask"] = torch.rand(s.rows, device=device) < 0.9
    if extra == "4 targets a row":
        row = torch.arange(s.rows, device=device).repeat_interleave(4)
        options["row"], target = row, torch.randint(s.vocabulary, (4 * s.rows,), device=device)
    if extra == "bias":
        options["bias"] = torch.zeros(s.vocabulary, device=device, dtype=torch.bfloat16)
    if extra == "softcap":
        options["softcap"] = 30.0
    if extra == "entropy":
        options["return_entropy"] = True
    inputs = {"scoring": (), "frozen": (hidden,), "trained": (hidden, weight)}[mode]
    for one in inputs:
        one.requires_grad_()
    upstream = torch.randn(target.shape, device=device)

    def step() -> object:
        out = linear_logprob(hidden, weight, target, **options)  # pyright: ignore[reportArgumentType]
        if not inputs:
            return out
        outputs = out if isinstance(out, tuple) else (out,)
        grads = (upstream, *(upstream[: s.rows] for _ in outputs[1:]))
        return torch.autograd.grad(outputs, inputs, grads)

    return step


def _head_cases(s: Sizes) -> Iterator[Case]:
    product = 2 * s.rows * s.vocabulary * s.hidden
    base = {
        "scoring": (1, dict(share=goals.SHARE["forward"])),
        "frozen": (2, dict(ms=goals.H200_MS["frozen"])),
        "trained": (3, {}),
    }
    for mode, (products, goal) in base.items():
        for extra in ("", "mask", "entropy", "softcap", "bias", "4 targets a row"):
            name = f"{mode}{', ' * bool(extra)}{extra}"

            def make(device: torch.device, mode: str = mode, extra: str = extra) -> Step:
                return _head_step(s, mode, device, extra)

            yield Case("linear_logprob", name, make, products * product, **(goal if not extra else {}))
    all_rows = 2 * s.rows * s.vocabulary
    for name, workspace, goal in (
        ("all rows kept", all_rows, goals.H200_MS["trained"]), ("2 GiB", 2 * GIB, None),
    ):  # fmt: skip

        def kept(device: torch.device, workspace: int = workspace) -> Step:
            return _head_step(s, "trained", device, workspace=workspace)

        yield Case("linear_logprob", f"trained, {name}", kept, 3 * product, ms=goal)


def _gathered_step(s: Sizes, device: torch.device, backward: bool, extra: str) -> Step:
    rows, vocabulary = s.rows, s.logits_vocabulary
    logits = torch.randn(rows, vocabulary, device=device, dtype=torch.bfloat16).requires_grad_(backward)
    shape = (rows, 4) if extra == "4 targets a row" else (rows,)
    target = torch.randint(vocabulary, shape, device=device)
    options = {
        "mask": {"mask": torch.rand(rows, device=device) < 0.9}, "entropy": {"return_entropy": True},
        "softcap": {"softcap": 30.0}, "in place": {"inplace_backward": True},
    }.get(extra, {})  # fmt: skip
    upstream = torch.randn(shape, device=device)

    def step() -> object:
        x = logits
        if extra == "in place":  # the same memory at every step, without its history
            x = logits.detach().requires_grad_()
        out = gathered_logprob(x, target, **options)
        if not backward:
            return out
        outputs = out if isinstance(out, tuple) else (out,)
        return torch.autograd.grad(outputs, (x,), (upstream, *(upstream for _ in outputs[1:])))

    return step


def _gathered_cases(s: Sizes) -> Iterator[Case]:
    once = 2 * s.rows * s.logits_vocabulary
    for backward in (False, True):
        for extra in ("", "mask", "entropy", "softcap", "4 targets a row", *(["in place"] if backward else [])):
            name = f"{'forward + backward' if backward else 'forward'}{', ' * bool(extra)}{extra}"

            def make(device: torch.device, backward: bool = backward, extra: str = extra) -> Step:
                return _gathered_step(s, device, backward, extra)

            goal = {"ms": goals.H200_MS["gathered"]} if backward and not extra else {}
            yield Case("gathered_logprob", name, make, bytes=once * (3 if backward else 1), **goal)


def _kl_cases(s: Sizes) -> Iterator[Case]:
    product = 2 * s.rows * s.vocabulary * s.hidden

    def make(device: torch.device, mode: str) -> Step:
        hidden, reference = (torch.randn(s.rows, s.hidden, device=device, dtype=torch.bfloat16) for _ in range(2))
        weight = torch.randn(s.vocabulary, s.hidden, device=device, dtype=torch.bfloat16) * s.hidden**-0.5
        inputs = {"scoring": (), "frozen": (hidden,), "trained": (hidden, weight)}[mode]
        for one in inputs:
            one.requires_grad_()
        upstream = torch.randn(s.rows, device=device)

        def step() -> object:
            kl = linear_kl(hidden, weight, reference)
            return _backward(kl, upstream, *inputs) if inputs else kl

        return step

    for mode, products in (("scoring", 2), ("frozen", 3), ("trained", 6)):
        yield Case("linear_kl", mode, lambda device, mode=mode: make(device, mode), products * product)


# ---------------------------------------------------------------- lists


def logcumsumexp_nll(scores: Tensor, order: Tensor) -> Tensor:
    """Plackett–Luce in plain PyTorch along a given order: the usual lines."""
    ranked = scores[:, None].expand(order.shape).gather(-1, order)
    return (ranked.flip(-1).logcumsumexp(-1).flip(-1) - ranked).sum(-1)


def log_softmax_cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """ListNet in plain PyTorch, one softmax for all objectives; labels already sum to 1."""
    return -(labels * scores.log_softmax(-1)[:, None]).sum(-1)


def _list_step(s: Sizes, items: int, device: torch.device, which: str, objectives: int, extra: str) -> Step:
    lists = s.items // items
    scores = torch.randn(lists, items, device=device).requires_grad_()
    labels = torch.rand(lists, objectives, items, device=device)
    beta = torch.ones(lists, objectives, device=device)
    mask = torch.rand(lists, items, device=device) < 0.9 if extra == "mask" else None
    order = labels.argsort(-1, descending=True) if which in ("order given", "logcumsumexp") else None
    upstream = torch.randn(lists, objectives, device=device)

    def loss() -> Tensor:
        if which == "logcumsumexp":
            assert order is not None
            return logcumsumexp_nll(scores, order)
        if which == "log_softmax":
            return log_softmax_cross_entropy(scores, labels)
        if which == "listnet":
            return listwise_cross_entropy(scores, labels, beta[:, :1], mask)
        return plackett_luce_nll(scores, labels, beta, mask, order)

    return lambda: _backward(loss(), upstream, scores)


def _list_cases(s: Sizes) -> Iterator[Case]:
    four = 4 * s.items
    for items in s.lengths:

        def case(op: str, name: str, which: str, bytes: int, objectives: int = 1, extra: str = "", peer: str = "",
                 items: int = items) -> Case:  # fmt: skip
            return Case(
                op, f"K {items}, {name}",
                lambda device: _list_step(s, items, device, which, objectives, extra), bytes=bytes,
                peer_of=f"K {items}, {peer}" if peer else None,
            )  # fmt: skip

        # Scores, labels and order (int64, as argsort gives it) are read once and the gradient is written.
        yield case("plackett_luce", "order given", "order given", 5 * four)
        yield case("plackett_luce", "sorted here", "sorted here", 3 * four)
        yield case("plackett_luce", "eager torch", "logcumsumexp", 5 * four, peer="order given")
        lists = s.items // items
        yield Case(
            # Forward reads scores and order and writes the ranked scores and the scan; backward reads both, the order
            # and scatters: zeros written, then each added to. A list has its loss and upstream gradient.
            "plackett_luce", f"K {items}, torch.compile", None, bytes=5 * four, peer_of=f"K {items}, order given",
            traffic=(3 + 2 + 2 + 2 + 1 + 2) * four + 8 * lists,
        )  # fmt: skip
        yield case("listnet", "mopl", "listnet", 3 * four)
        yield case("listnet", "eager torch", "log_softmax", 3 * four, peer="mopl")
        yield Case(
            # Forward reads both, backward reads both and writes: nothing else an item has to reach memory. A list has
            # its loss and upstream gradient, and its maximum and sum written and read.
            "listnet", f"K {items}, torch.compile", None, bytes=3 * four, peer_of=f"K {items}, mopl",
            traffic=5 * four + 24 * lists,
        )  # fmt: skip
        if items in (8, 120, 1000):
            yield case("plackett_luce", "order given, mask", "order given", 5 * four, extra="mask")
            yield case("plackett_luce", "order given, 3 objectives", "order given", 11 * four, objectives=3)
            yield case("listnet", "mopl, mask", "listnet", 3 * four, extra="mask")
            yield case("listnet", "mopl, 3 objectives", "listnet", 5 * four, objectives=3)


def cases(sizes: Sizes | None = None) -> list[Case]:
    """Return every case, goal sizes by default."""
    s = sizes or Sizes()
    return [*_head_cases(s), *_gathered_cases(s), *_kl_cases(s), *_list_cases(s)]
