"""The cases that are compiled ahead of time are what the ops launch, recorded without a GPU.

Compared is one argument at a time: every type, None, 1, flag and softcap with which a kernel is launched is compiled in
some case, and no case says of an argument what no launch would. Sizes of tiles come from the same functions in both.
"""

import ast
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "aot"))
pytest.importorskip("triton")

from case import Case
from compile_kernels import load_cases

from bench.cards import CARDS
from bench.recording import DEVICE, Recorder, Recording, card
from mopl.ops import gathered_logprob, linear_kl, linear_logprob, listwise_cross_entropy, plackett_luce_nll

# Of Plackett-Luce the flags and dtypes are not yet all compiled; that each of its kernels has a case is tested.
NOT_COMPARED = ("plackett_luce", "list_order")
CASES = [case for _, case in load_cases(ROOT / "tests" / "aot", None)]
Kernel = tuple[str, str]  # module, function
NAMES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64", torch.bool: "i1",
    torch.int8: "i8", torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


def key(function: object) -> Kernel:
    return function.__module__.rsplit(".", 1)[-1], function.__name__


def test_every_kernel_has_a_case() -> None:
    jitted: dict[Kernel, ast.FunctionDef] = {}
    for file in (ROOT / "mopl" / "kernels").glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
                jitted[file.stem, node.name] = node
    # What another jitted function calls is a part of its kernel.
    parts = {n.id for node in jitted.values() for n in ast.walk(node) if isinstance(n, ast.Name)}
    launched = {kernel for kernel in jitted if kernel[1] not in parts}
    assert len(launched) > 10
    assert not launched - {key(case.kernel.fn) for case in CASES}, "kernels without a case in tests/aot"


def kind(value: object, constant: bool) -> str | None:
    """Return what of an argument changes the code that is compiled; None for the size of a tile."""
    if value is None or isinstance(value, bool):
        return str(value)
    if hasattr(value, "block_shape"):  # a descriptor
        return f"tensordesc<{NAMES[value.base.dtype]}[{','.join(map(str, value.block_shape))}]>"
    if constant:
        return {0.0: "0.0", 1: "1"}.get(value, "not 0") if isinstance(value, float) else None
    return f"*{NAMES[value.dtype]}" if isinstance(value, Tensor) else "i64" if abs(value) >= 2**31 else "i32"


def note(kinds: dict, divisible: set, function, args: tuple, options: dict) -> None:
    """Add what a launch tells the compiler."""
    given = dict(zip((p.name for p in function.params), args, strict=False)) | options
    for p in function.params:
        where, value = (*key(function.fn), p.name), given[p.name]
        one = not p.is_constexpr and type(value) is int and value == 1 and not p.do_not_specialize
        kinds.setdefault((*where, "1" if one else kind(value, p.is_constexpr)), options["num_warps"])
        if type(value) is int and value % 16 == 0 and not p.is_constexpr and not p.do_not_specialize:
            divisible.add(where)


def uses() -> Iterator[Callable[[], object]]:
    """Every option of every op, in a few combinations."""

    def draw(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
        return torch.empty(shape, device=DEVICE, dtype=dtype, requires_grad=grad)

    def back(out: Tensor | tuple[Tensor, ...]) -> None:
        outputs = [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])

    def exact(dtype: torch.dtype) -> torch.dtype:
        return torch.float64 if dtype == torch.float64 else torch.float32

    def head(dtype: torch.dtype, frozen: bool = False, scoring: bool = False, shared: bool = False, bias: bool = False,
             vocabulary: int = 4096, rows: int = 320, **options: object) -> None:  # fmt: skip
        hidden = draw(rows, 256, dtype=dtype, grad=not scoring)
        weight = draw(vocabulary, 256, dtype=dtype, grad=not (frozen or scoring))
        if bias:
            options["bias"] = draw(vocabulary, dtype=dtype, grad=not (frozen or scoring))
        if shared:
            options["row"] = torch.empty(4 * rows, dtype=torch.int64, device=DEVICE)
        target = torch.empty(4 * rows if shared else rows, dtype=torch.int64, device=DEVICE)
        out = linear_logprob(hidden, weight, target, **options)
        if not scoring:
            back(out)

    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        yield lambda dtype=dtype: head(dtype)
        yield lambda dtype=dtype: head(dtype, bias=True)
        yield lambda dtype=dtype: head(dtype, softcap=30.0, return_entropy=True, bias=True, workspace=0)
        yield lambda dtype=dtype: head(dtype, return_entropy=True, bias=True, logit_scale=0.5, vocabulary=50257)
        yield lambda dtype=dtype: head(dtype, softcap=30.0)
        yield lambda dtype=dtype: head(dtype, frozen=True, return_entropy=True, shared=True)
        yield lambda dtype=dtype: head(
            dtype, softcap=30.0, return_entropy=True, temperature=draw(320, dtype=exact(dtype), grad=True)
        )
        yield lambda dtype=dtype: head(dtype, frozen=True, softcap=30.0, logit_scale=0.5)
        yield lambda dtype=dtype: head(dtype, scoring=True, rows=16)
        yield lambda dtype=dtype: head(dtype, scoring=True, rows=64, bias=True, softcap=30.0)
        yield lambda dtype=dtype: head(dtype, scoring=True, mask=draw(320, dtype=torch.bool))

    def gathered(dtype: torch.dtype, targets: int, vocabulary: int, padding: int = 0, **options: object) -> None:
        logits = draw(64, vocabulary + padding, dtype=dtype, grad=True)[:, :vocabulary]
        target = torch.empty((64, targets) if targets > 1 else 64, dtype=torch.int64, device=DEVICE)
        back(gathered_logprob(logits, target, **options))

    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        yield lambda dtype=dtype: gathered(dtype, 1, 32000)
        yield lambda dtype=dtype: gathered(dtype, 1, 50257, padding=15)
        yield lambda dtype=dtype: gathered(
            dtype, 5, 50257, softcap=30.0, return_logsumexp=True, return_entropy=True,
            temperature=draw(64, dtype=exact(dtype), grad=True),
        )  # fmt: skip

    def kl(direction: str) -> None:
        hidden, weight = draw(64, 256, dtype=torch.bfloat16, grad=True), draw(4096, 256, dtype=torch.bfloat16)
        back(linear_kl(hidden, weight, draw(64, 256, dtype=torch.bfloat16), direction=direction))

    yield lambda: kl("reverse")
    yield lambda: kl("forward")

    def lists(loss: Callable, items: int, objectives: int, dtype: torch.dtype = torch.float32, grad: bool = True,
              labels: torch.dtype = torch.float32, common: bool = False, mask: bool = False, order: bool = False,
              **options: object) -> None:  # fmt: skip
        scores = draw(48, items, dtype=dtype, grad=grad)
        temperature = draw(48, 1 if common else objectives, dtype=exact(dtype), grad=grad)
        labels_grad = grad and loss is listwise_cross_entropy and labels.is_floating_point
        given = draw(48, objectives, items, dtype=labels, grad=labels_grad)
        if mask:
            options["mask"] = draw(48, items, dtype=torch.bool)
        if order:
            options["order"] = torch.empty(48, objectives, items, dtype=torch.int64, device=DEVICE)
        out = loss(scores, given, temperature, **options)
        if grad:
            back(out)

    for items in (2, 16, 120, 2048, 20000):
        yield lambda items=items: lists(listwise_cross_entropy, items, 2, mask=True, labels=torch.bfloat16)
        yield lambda items=items: lists(listwise_cross_entropy, items, 1, common=True, dtype=torch.bfloat16)
        yield lambda items=items: lists(
            listwise_cross_entropy, items, 5, dtype=torch.float64, labels=torch.float64, normalize=False
        )
        yield lambda items=items: lists(listwise_cross_entropy, items, 3, labels=torch.int64, dtype=torch.float16)
        for ties in ("breslow", "efron", "exact"):
            plain = {"loss": plackett_luce_nll, "items": items, "ties": ties}
            yield lambda plain=plain: lists(objectives=1, **plain)
            yield lambda plain=plain: lists(objectives=3, mask=True, dtype=torch.bfloat16, labels=torch.int64, **plain)
            yield lambda plain=plain: lists(
                objectives=2, order=True, last_group_free=True, dtype=torch.float64, common=True, **plain
            )
            if ties != "exact":
                yield lambda plain=plain: lists(
                    objectives=2, position_weights=draw(plain["items"]), top_k=2, dtype=torch.float16, grad=False,
                    labels=torch.bfloat16, **plain,
                )  # fmt: skip


@pytest.fixture(scope="module")
def launched() -> tuple[dict, set]:
    """Return the kinds of arguments that launches have, and which of them were multiples of 16."""
    from triton.runtime.jit import JITFunction

    kinds, divisible = {}, set()

    def run(self, *args, grid, warmup=False, **options):
        note(kinds, divisible, self, args, options)

    with FakeTensorMode(), contextlib.ExitStack() as stack:
        stack.enter_context(card(CARDS["H200"]))
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        with Recorder(Recording()):
            for use in uses():
                use()
    return kinds, divisible


def compiled(case: Case) -> set:
    found = set()
    for p in case.kernel.params:
        if p.name in case.constants:
            value = case.constants[p.name]
            what = "1" if value == 1 and not p.is_constexpr else kind(value, True)
        else:
            what = case.types[p.name]
        found.add((*key(case.kernel.fn), p.name, what))
    return found


def test_all_that_is_launched_is_compiled(launched: tuple[dict, set]) -> None:
    known = set().union(*map(compiled, CASES))
    missing = sorted(str(one) for one in launched[0].keys() - known if not one[0].startswith(NOT_COMPARED))
    assert not missing, "launched, but in no case of tests/aot:\n" + "\n".join(missing)


def test_no_case_says_more_than_a_launch(launched: tuple[dict, set]) -> None:
    said = {(*key(case.kernel.fn), name) for case in CASES for name in case.divisible}
    more = sorted(str(one) for one in said - launched[1] if not one[0].startswith(NOT_COMPARED))
    assert not more, "multiples of 16 in a case, but in no launch:\n" + "\n".join(more)
    unlike = set().union(*map(compiled, CASES)) - launched[0].keys()
    # The fused kernel of float32 is chosen by `tune` alone.
    unlike = {one for one in unlike if one[0] != "fused_logprob" or one[3] != "*fp32"}
    extra = sorted(str(one) for one in unlike if not one[0].startswith(NOT_COMPARED))
    assert not extra, "compiled, but never launched:\n" + "\n".join(extra)
