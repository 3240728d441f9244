"""What an op launches on a GPU, recorded without one: every kernel with its bytes, every product with its sizes.

The op's own Python code runs from its public function on, backward pass included, on fake CUDA tensors of full size
(`FakeTensorMode`), which have shapes and strides but no memory. Three things are watched:

* calls of PyTorch below autograd (`TorchDispatchMode`): products, other kernels, and views, which cost the host alone;
* mopl's custom ops, whose real bodies run in place of their fake implementations;
* launches of Triton kernels, which are noted with their arguments instead of being compiled. What each of them moves
  is declared in `kernel_traffic.py` and tested in Triton's interpreter.

C++ is told that the tensors are on the CPU, so that autograd works in a build of PyTorch without CUDA; Python sees
`cuda:0`. Everything that asks a real GPU something is answered in `card`.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.cards import Card
from bench.instructions import specialisation
from bench.kernel_traffic import Arguments, kernel, tensor_of

aten = torch.ops.aten
DEVICE = torch.device("cuda:0")


@dataclass(frozen=True)
class Touch:
    """Memory that a launch reads and writes, by where it begins."""

    where: tuple[int, int]  # storage, offset in it
    read: int  # bytes
    written: int


@dataclass(frozen=True)
class Launch:
    """Kernels that the GPU runs for one call."""

    name: str
    kind: str  # "product", "torch" or "triton"
    touched: tuple[Touch, ...]
    kernels: int = 1
    passes: int = 1  # times that the bytes are moved
    product: tuple[int, int, int] | None = None  # M, N, K
    batch: int = 1
    dtype: torch.dtype = torch.float32  # of the operands of a product
    tiles: int | None = None  # of a product that is a Triton kernel
    code: str = ""  # which machine code a Triton kernel runs; "" where its instructions depend on the data
    warps: int = 0
    turns: int = 0  # of its inner loop

    @property
    def bytes(self) -> int:
        return self.passes * sum(t.read + t.written for t in self.touched)

    @property
    def flop(self) -> int:
        return 0 if self.product is None else 2 * self.batch * math.prod(self.product)


@dataclass
class Recording:
    """Everything that one run did."""

    launches: list[Launch] = field(default_factory=list)
    host: Counter[str] = field(default_factory=Counter)  # "torch", "view", "triton", "custom op": calls of each

    def counts(self) -> dict[str, Any]:
        """Return what a test compares: numbers of kernels by name, products, FLOP and bytes."""
        kernels: Counter[str] = Counter()
        products: Counter[str] = Counter()
        for one in self.launches:
            kernels[one.name] += one.kernels
            if one.product is not None:
                m, n, k = one.product
                products[f"{f'{one.batch} x ' * (one.batch > 1)}{m} x {n} x {k} {str(one.dtype)[6:]}"] += 1
        return {
            "launches": kernels.total(),
            "products": products.total(),
            "flop": sum(one.flop for one in self.launches),
            "bytes": sum(one.bytes for one in self.launches),
            "by name": dict(sorted(kernels.items())),
            "by size": dict(sorted(products.items())),
        }


def size_of(x: Tensor) -> int:
    """Return the bytes of a tensor's elements, those that share memory by a stride of 0 counted once."""
    if x.numel() == 0:
        return 0
    return x.element_size() * math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride)


def where(x: Tensor) -> tuple[int, int]:
    return x.untyped_storage()._cdata, x.storage_offset()


# Calls that launch nothing; views are recognised by their schema.
FREE = {
    "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh", "_unsafe_view", "detach",
    "_reshape_alias", "alias", "view", "set_", "resize_", "sym_size", "sym_stride", "sym_numel", "is_same_size",
    "_has_compatible_shallow_copy_type",
}  # fmt: skip
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"}
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "bincount", "equal", "item"}
OVERWRITES = {"copy_", "zero_", "fill_", "normal_", "uniform_", "random_"}  # their first argument is not read
# Read by index: as many bytes of the first argument as come out.
GATHERS = {"index", "index_select", "gather", "embedding", "take"}
# Written by index: as many bytes of the first argument as go in.
SCATTERS = {"scatter_", "index_copy_", "index_add_", "index_put_", "scatter_add_", "_index_put_impl_", "index_fill_"}
# Out-of-place forms that first copy what they change.
COPY_FIRST = {"masked_fill", "scatter", "index_copy", "index_add", "index_put", "scatter_add", "index_fill"}
COPIED = (0, -1)  # the place of such a copy
SORTS = {"sort", "topk"}
# A list of up to 4096 items is sorted by one block in shared memory, after a copy and the numbering of the items
# (`should_use_small_sort` of ATen/native/cuda/Sort.cpp); longer ones take a radix pass for every eight bits of the key.
SMALL_SORT = 4096


class Waits(RuntimeError):
    """The host would wait for the GPU."""


class Recorder(TorchDispatchMode):
    """Notes every call of PyTorch, and runs the bodies of custom ops."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:  # C++ asks
            return torch.device("cpu")
        if "device" in kwargs:
            kwargs["device"] = DEVICE
        name = func._schema.name.split("::")[1]
        if func.namespace == "mopl":
            self.recording.host["custom op"] += 1
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        if name in WAITS:
            raise Waits(f"{func} makes the host wait for the GPU")
        with self:  # what is made of other calls is seen as those calls
            parts = func.decompose(*args, **kwargs) if name not in PRODUCTS else NotImplemented
        if parts is not NotImplemented:
            return parts
        free = func.is_view or name in FREE or func.namespace != "aten"
        self.recording.host["view" if free else "torch"] += 1
        if name in PRODUCTS:
            return self._product(func, name, args, kwargs)
        out = func(*args, **kwargs)
        if not free:
            launch = _torch_launch(func, name, args, kwargs, out)
            if launch is not None:
                self.recording.launches.append(launch)
        return out

    def _product(self, func, name: str, args: tuple, kwargs: dict) -> Tensor:
        added = name.startswith(("add", "badd"))
        a, b = args[1:3] if added else args[:2]
        batch, (m, k), n = (a.shape[0] if a.ndim == 3 else 1), a.shape[-2:], b.shape[-1]
        into = args[0] if name.endswith("_") else kwargs.get("out")
        dtype = next((d for d in (*args, kwargs.get("out_dtype")) if isinstance(d, torch.dtype)), a.dtype)
        out = a.new_empty((*a.shape[:-1], n), dtype=dtype, device=DEVICE) if into is None else into
        if out.shape != (*a.shape[:-1], n) or a.shape[-1] != b.shape[-2] or out.dtype != dtype or a.dtype != b.dtype:
            raise ValueError(f"{func} of {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)} into {out.dtype}")
        touched = [Touch(where(x), size_of(x), 0) for x in (a, b)]
        if added and kwargs.get("beta", 1) != 0:
            touched.append(Touch(where(args[0]), size_of(args[0]), 0))
        touched.append(Touch(where(out), 0, size_of(out)))
        if out.numel():
            self.recording.launches.append(
                Launch(f"torch.{name}", "product", tuple(touched), product=(m, n, k), batch=batch, dtype=a.dtype)
            )
        return out


def _tensors(values: object) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _torch_launch(func, name: str, args: tuple, kwargs: dict, out: object) -> Launch | None:
    """Return what a call of PyTorch launches; its bytes are those of its arguments and results, once each."""
    results = _tensors(out)
    if not any(x.numel() for x in results):
        return None
    inputs = _tensors((args, {key: value for key, value in kwargs.items() if key != "out"}))
    read = {where(x): size_of(x) for x in (inputs[1:] if name in OVERWRITES else inputs)}
    written = {where(x): size_of(x) for x in results}
    kernels = passes = 1
    if name in GATHERS:
        read[where(inputs[0])] = sum(written.values())
    elif name in SCATTERS:
        added = name in ("index_add_", "scatter_add_") or (name.endswith("index_put_") and True in args[3:])
        entries = max((x for x in inputs[1:]), key=size_of, default=inputs[0])
        moved = min(entries.numel() * inputs[0].element_size(), size_of(inputs[0]))
        read[where(inputs[0])], written = moved if added else 0, {where(inputs[0]): moved}
        if name.endswith("index_put_") and added:
            kernels = 10  # it sorts the indices: numbering, a pass for each of eight bytes, the values
    elif name in COPY_FIRST:
        kernels = 2
        read[COPIED] = written[COPIED] = size_of(inputs[0])
    elif name in SORTS:
        small = inputs[0].shape[-1] <= SMALL_SORT
        digits = inputs[0].element_size()
        kernels, passes = (3, 1) if small else (2 + digits, digits)
        for x in results:  # written before the sort and again by it
            read[where(x)] = size_of(x)
            written[where(x)] = size_of(x) * (2 if small else 1)
    places = dict.fromkeys((*read, *written))
    touched = tuple(Touch(place, read.get(place, 0), written.get(place, 0)) for place in places)
    return Launch(f"torch.{name}", "torch", touched, kernels=kernels, passes=passes)


def record_triton(recording: Recording) -> Callable:
    """Return what stands for the launch of a Triton kernel."""

    def run(self, *args, grid, warmup=False, **options):
        names = list(inspect.signature(self.fn).parameters)
        given = dict(zip(names, args, strict=False)) | {k: v for k, v in options.items() if k in names}
        name = f"{self.fn.__module__.rsplit('.', 1)[-1]}.{self.fn.__name__}"
        programs, warps = math.prod(grid(given) if callable(grid) else grid), options.get("num_warps", 4)
        arguments, described = Arguments(given, programs), kernel(name)
        touched = tuple(Touch(where(tensor_of(given[n])), r, w) for n, (r, w) in described.traffic(arguments).items())
        product = None if described.product is None else described.product(arguments)
        constant = {one.name for one in self.params if one.is_constexpr}
        recording.host["triton"] += 1
        recording.launches.append(
            Launch(
                name, "triton", touched, product=product,
                dtype=next(x.dtype for x in map(tensor_of, given.values()) if isinstance(x, Tensor)),
                tiles=None if product is None else described.tiles(arguments),
                code="" if described.turns is None else specialisation(name, given, constant, warps),
                warps=programs * warps, turns=0 if described.turns is None else described.turns(arguments),
            )
        )  # fmt: skip

    return run


def _forget(prefix: str = "mopl.ops") -> None:
    """Empty the caches of what a GPU answered."""
    for name, module in list(sys.modules.items()):
        if name.startswith(prefix):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


@contextlib.contextmanager
def card(card: Card, held: int = 0) -> Iterator[None]:
    """Answer what is asked of a GPU as `card` would, `held` bytes of its memory being taken."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from mopl.ops.linear_logprob import device as _device

    plan = card.plan
    utils = types.SimpleNamespace(
        get_device_properties=lambda device: {
            "max_shared_mem": card.shared, "multiprocessor_count": plan.processors, "warpSize": 64 if card.hip else 32,
        }
    )  # fmt: skip
    target = GPUTarget("hip", "gfx942", 64) if card.hip else GPUTarget("cuda", 10 * plan.capability[0], 32)
    active = types.SimpleNamespace(
        utils=utils, get_current_device=lambda: 0, get_current_stream=lambda device=0: 0,
        get_current_target=lambda: target, get_active_torch_device=lambda: DEVICE,
    )  # fmt: skip
    properties = types.SimpleNamespace(
        name=card.name, major=plan.capability[0], minor=plan.capability[1], multi_processor_count=plan.processors,
        total_memory=plan.memory, L2_cache_size=card.l2, warp_size=target.warp_size,
        shared_memory_per_block_optin=card.shared,
    )  # fmt: skip

    def no_copy(self, *args, **kwargs):
        raise Waits("a copy to the CPU makes the host wait for the GPU")

    answers = {
        torch.cuda.device: {"__enter__": lambda self: None, "__exit__": lambda self, *a: False},
        torch.cuda: {
            "get_device_properties": lambda device=None: properties,
            "get_device_capability": lambda device=None: plan.capability,
            "get_device_name": lambda device=None: card.name,
            "mem_get_info": lambda device=None: (plan.memory - held, plan.memory),
            "memory_reserved": lambda device=None: held, "memory_allocated": lambda device=None: held,
            "current_device": lambda: 0, "is_current_stream_capturing": lambda: False,
        },
        FakeTensor: {
            "is_cuda": property(lambda self: self.fake_device.type == "cuda"),
            "get_device": lambda self: 0 if self.fake_device.type == "cuda" else -1,
            "data_ptr": lambda self: 256 * where(self)[0] + where(self)[1] * self.element_size(),
            "cpu": no_copy, "tolist": no_copy, "numpy": no_copy,
        },
        torch.version: {"hip": "6.4" if card.hip else None},
        _device: {"properties_of": lambda device: plan},
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for owner, replaced in answers.items():
            for name, value in replaced.items():
                stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(mock.patch.dict("os.environ", {"MOPL_CACHE": "/nonexistent"}))  # nothing was tuned
        # Triton 3.4 has no property here.
        stack.enter_context(mock.patch.object(driver, "_active" if hasattr(driver, "_active") else "active", active))
        _forget()
        try:
            yield
        finally:
            _forget()


def record(on: Card, make: Callable[[], Callable[[], object]]) -> Recording:
    """Run what `make` returns on fake tensors of a card and return what it launched; `make` itself is not recorded."""
    from triton.runtime.jit import JITFunction

    recording, setup = Recording(), Recording()
    with FakeTensorMode(), contextlib.ExitStack() as stack:
        stack.enter_context(card(on))
        with Recorder(setup):
            step = make()
        stack.enter_context(mock.patch.object(JITFunction, "run", record_triton(recording)))
        with Recorder(recording):
            step()
    return recording
