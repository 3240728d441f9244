"""Run by test_vocab_parallel.py on two processes: every case equals one process with the whole head."""

import itertools

import torch
import torch.distributed as dist
from ending import leave
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from mopl.ops import _divergence_blocks as blocks
from mopl.ops import linear_jsd, linear_kl, linear_logprob, linear_topk_jsd

ROWS, WIDTH, VOCABULARY = 17, 8, 41


def close(actual: torch.Tensor, expected: torch.Tensor, what: str, loose: float = 1.0) -> None:
    tolerance = loose * (1e-12 if expected.dtype == torch.float64 else 1e-6)
    tolerance *= max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance, msg=lambda m: f"{what}: {m}")


def case(
    cut: list[int] | None,
    train: str,
    shared: bool,
    softcap: float | None,
    biased: bool,
    dtype: torch.dtype,
    scale: float,
) -> None:
    """Compare outputs and gradients of a sharded head with those of the whole; `cut` None: a DTensor."""
    what = f"cut={cut} train={train} shared={shared} softcap={softcap} bias={biased} {dtype} scale={scale}"
    rank, group = dist.get_rank(), dist.group.WORLD
    hidden, weight = torch.randn(ROWS, WIDTH, dtype=dtype), torch.randn(VOCABULARY, WIDTH, dtype=dtype) * scale
    bias = torch.randn(VOCABULARY, dtype=dtype) if biased else None
    row = torch.randint(ROWS, (25,)) if shared else None
    target = torch.randint(VOCABULARY, (25 if shared else ROWS,))
    mask = torch.rand(target.shape) > 0.3
    temperature = torch.rand(ROWS, dtype=dtype) + 0.5
    upstream = torch.randn(target.shape, dtype=dtype), *torch.randn(2, ROWS, dtype=dtype)
    options = dict(softcap=softcap, mask=mask, row=row, return_logsumexp=True, return_entropy=True, logit_scale=1.25)

    def leaf(value: torch.Tensor, letter: str) -> torch.Tensor:
        return value.detach().clone().requires_grad_(letter in train)

    whole = [leaf(hidden, "h"), leaf(weight, "w"), None if bias is None else leaf(bias, "b"), leaf(temperature, "t")]
    expected = linear_logprob(whole[0], whole[1], target, bias=whole[2], temperature=whole[3], **options)

    if cut is None:
        mesh = init_device_mesh("cpu", (2,))
        group = mesh.get_group()
        own = torch.arange(VOCABULARY).chunk(2)[rank]
        pieces = [distribute_tensor(weight, mesh, [Shard(0)]).detach().requires_grad_("w" in train)]
        pieces.append(
            None if bias is None else distribute_tensor(bias, mesh, [Shard(0)]).detach().requires_grad_("b" in train)
        )
    else:
        own = torch.arange(VOCABULARY).split(cut)[rank]
        pieces = [leaf(weight[own], "w"), None if bias is None else leaf(bias[own], "b")]
    mine = [leaf(hidden, "h"), *pieces, leaf(temperature, "t")]
    actual = linear_logprob(
        mine[0],
        mine[1],
        target,
        bias=mine[2],
        temperature=mine[3],
        group=group,
        workspace=VOCABULARY * 8 * 4,
        **options,
    )
    for a, e in zip(actual, expected, strict=True):
        close(a, e, what)

    # Twice: saved tensors are still what they were. Every output on its own, then all of them.
    for chosen in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (1, 1, 1)):
        gradients = []
        for outputs, inputs in ((expected, whole), (actual, mine)):
            loss = sum((o * u).sum() for o, u, use in zip(outputs, upstream, chosen, strict=True) if use)
            wanted = [t for t in inputs if t is not None and t.requires_grad]
            gradients.append(torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True))
        names = [n for n, t in zip("hwbt", whole, strict=True) if t is not None and t.requires_grad]
        for name, e, a in zip(names, *gradients, strict=True):
            a = a.to_local() if isinstance(a, DTensor) else a
            if e is None or a is None:
                assert (e is None or not e.any()) and (a is None or not a.any()), what
            else:
                # Gradients of an entropy are differences of sums: float32 keeps a few bits less of them.
                loose = 5 if chosen[2] else 1
                close(a, e[own] if name in "wb" else e, f"{what} chosen={chosen} gradient of {name}", loose)


def divergences(cut: list[int] | None, train: str, dtype: torch.dtype, scale: float) -> None:
    """Compare divergences of sharded heads, of two models or of one, with those of whole ones."""
    rank, group = dist.get_rank(), dist.group.WORLD
    hidden, other = torch.randn(2, ROWS, WIDTH, dtype=dtype)
    weight, other_weight = scale * torch.randn(2, VOCABULARY, WIDTH, dtype=dtype)
    bias = torch.randn(VOCABULARY, dtype=dtype)
    bias[:2] = -torch.inf
    temperature, mask = torch.rand(ROWS, dtype=dtype) + 0.5, torch.rand(ROWS) > 0.3
    known, ids = torch.randn(ROWS, VOCABULARY).log_softmax(-1).topk(6)
    ids[torch.rand(ids.shape) > 0.7] = -100
    options = dict(temperature=temperature, mask=mask, softcap=3.0 if scale == 1 else None, logit_scale=1.25)
    upstream = torch.randn(ROWS, dtype=dtype)
    if cut is None:
        mesh = init_device_mesh("cpu", (2,))
        group, own = mesh.get_group(), torch.arange(VOCABULARY).chunk(2)[rank]

        def part(whole: torch.Tensor) -> torch.Tensor:
            return distribute_tensor(whole, mesh, [Shard(0)]).detach()
    else:
        own = torch.arange(VOCABULARY).split(cut)[rank]

        def part(whole: torch.Tensor) -> torch.Tensor:
            return whole[own].clone()

    calls = {
        "jsd": lambda h, w, b, o, **more: linear_jsd(h, w, other, o, beta=0.3, bias=b, **options, **more),
        "jsd, shared head": lambda h, w, b, o, **more: linear_jsd(h, w, other, bias=b, **options, **more),
        "reverse": lambda h, w, b, o, **more: linear_kl(h, w, other, o, bias=b, **options, **more),
        "forward": lambda h, w, b, o, **more: linear_kl(
            h, w, other, bias=b, direction="forward", **options, **more
        ),
        "top k": lambda h, w, b, o, **more: linear_topk_jsd(h, w, ids, known, bias=b, **options, **more),
        "top k alone": lambda h, w, b, o, **more: linear_topk_jsd(
            h, w, ids, known, beta=0.0, tail=False, bias=b, **options, **more
        ),
    }  # fmt: skip
    for name, call in calls.items():
        if name == "forward":  # the teacher's bias is the student's: what is forbidden is so to both
            assert bias[:2].isinf().all()
        if name in ("top k", "top k alone"):
            bias = bias.clamp(min=-5)  # which an end of the KL would make inf
        found = []
        for cut_of, kept, more in ((lambda t: t, slice(None), {}), (part, own, {"group": group})):
            leaves = [
                t.detach().clone().requires_grad_(letter in train)
                for t, letter in ((hidden, "h"), (cut_of(weight), "w"), (cut_of(bias), "b"))
            ]
            value = call(*leaves, cut_of(other_weight), **more)
            wanted = [t for t in leaves if t.requires_grad]
            for _ in range(2):  # what is saved is not spent
                gradients = torch.autograd.grad(value, wanted, upstream, retain_graph=True)
            found.append((value.detach(), gradients, kept))
        (expected, whole, _), (actual, mine, _) = found
        what = f"{name} cut={cut} train={train} {dtype} scale={scale}"
        close(actual, expected, what)
        for letter, e, a in zip(train, whole, mine, strict=True):
            a = a.to_local() if isinstance(a, DTensor) else a
            close(a, e[own] if letter in "wb" else e, f"{what}, gradient of {letter}", 5)


def errors() -> None:
    """What is no vocabulary shard is refused."""
    mesh, hidden, target = init_device_mesh("cpu", (2,)), torch.randn(3, WIDTH), torch.zeros(3, dtype=torch.long)
    weight = distribute_tensor(torch.randn(VOCABULARY, WIDTH), mesh, [Shard(0)])
    wide = distribute_tensor(torch.randn(VOCABULARY, WIDTH), mesh, [Shard(1)])
    few = distribute_tensor(torch.randn(1, WIDTH), mesh, [Shard(0)])  # the last rank has none
    bias, alone = distribute_tensor(torch.randn(VOCABULARY), mesh, [Shard(0)]), [dist.new_group([r]) for r in range(2)]
    for arguments, options, part in (
        ((hidden, weight.full_tensor(), target), {"bias": bias}, "bias is a DTensor and group is None"),
        (
            (hidden, weight, target),
            {"bias": bias.full_tensor(), "group": mesh.get_group()},
            f"this rank's bias has shape ({VOCABULARY},) and its weight",
        ),
        ((hidden, weight, target), {"group": alone[dist.get_rank()]}, "group is not the group over which weight is"),
        ((hidden, weight, target), {}, "group=weight.device_mesh.get_group()"),
        ((hidden, wide, target), {"group": mesh.get_group()}, "Shard(dim=1)"),
        ((hidden, few, target), {"group": mesh.get_group()}, "1 row over 2 ranks, of which the last has none"),
        ((hidden, torch.randn(20, WIDTH), target + 40), {"group": mesh.get_group()}, "vocabulary size 40"),
    ):
        try:
            linear_logprob(*arguments, **options)
        except (TypeError, ValueError) as error:
            assert part in str(error), error
        else:
            raise AssertionError(f"nothing was raised for {part}")
    for call, part in (
        (lambda: linear_jsd(hidden, weight, hidden), "group=weight.device_mesh.get_group()"),
        (lambda: linear_topk_jsd(hidden, weight, target[:, None], hidden[:, :1]), "weight.full_tensor("),
        (lambda: linear_jsd(hidden, torch.randn(VOCABULARY, WIDTH), hidden, weight), "teacher_weight is a DTensor"),
        (lambda: linear_jsd(hidden, weight, hidden, wide, group=mesh.get_group()), "teacher_weight is a DTensor"),
        (lambda: linear_jsd(hidden, weight, hidden, weight, teacher_bias=bias.full_tensor(), group=mesh.get_group()),
         f"this rank's teacher_bias has shape ({VOCABULARY},) and its teacher_weight"),
        (lambda: linear_topk_jsd(hidden, weight, target[:, None] + VOCABULARY, hidden[:, :1] - 9,
                                 group=mesh.get_group()), f"vocabulary size {VOCABULARY}"),
    ):  # fmt: skip
        try:
            call()
        except (TypeError, ValueError) as error:
            assert part in str(error), error
        else:
            raise AssertionError(f"nothing was raised for {part}")
    for head in (False, True):  # frozen and trained
        hidden = torch.randn(3, WIDTH, requires_grad=True)
        part = torch.randn(20, WIDTH, requires_grad=head)
        value = linear_logprob(hidden, part, target, group=mesh.get_group()).square().sum()
        (gradient,) = torch.autograd.grad(value, hidden, create_graph=True)
        try:
            gradient.sum().backward()
        except NotImplementedError as error:
            assert "linear_logprob has no second derivative" in str(error), error
        else:
            raise AssertionError("a second derivative was not refused")


def main() -> None:
    dist.init_process_group("gloo")
    try:
        cuts = ([21, 20], [33, 8], [1, 40], None)
        for number, (cut, train, shared) in enumerate(itertools.product(cuts, ("h", "hwt", "w", "hwbt", ""), (0, 1))):
            for dtype, scale in ((torch.float64, 1.0), (torch.float32, 0.3), (torch.float64, 60.0)):
                if not train:
                    continue
                torch.manual_seed(number)
                # A scale of 60 makes tokens of probability e^-1000: shifts then differ from rank to rank.
                softcap = 3.0 if number % 3 == 1 and scale < 60 else None
                case(cut, train, bool(shared), softcap, "b" in train or number % 2 == 0, dtype, scale)
        # Blocks of a few rows: ranks with parts of different size must cut alike.
        blocks.HELD = {"cpu": 5 * VOCABULARY * 8, "else": 5 * VOCABULARY * 8}
        blocks.COLUMNS, blocks.ROWS = {"cpu": 7, "else": 7}, {"cpu": 4, "else": 4}
        for number, (cut, train) in enumerate(itertools.product(cuts, ("h", "hw", "hwb"))):
            torch.manual_seed(number)
            divergences(cut, train, torch.float64, 1.0 if number % 2 else 20.0)
        divergences([33, 8], "hw", torch.float32, 0.3)
        errors()
    finally:
        dist.destroy_process_group()
    print("all cases equal")


if __name__ == "__main__":
    main()
    leave()
