"""Tests that run kernels on CPU tensors, in Triton's interpreter: collected only in a process that was started for it.

`tests/ops/test_interpreter_leg.py` starts such processes; by hand: `TRITON_INTERPRET=1 pytest tests/interpreter`.
"""

import functools
import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from interpreting import BROKEN, REASON

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["*.py"]


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to run where no loop does, and silence what lanes that a kernel discards make numpy say on a CPU alone."""
    if BROKEN and os.environ.get("TRITON_INTERPRET") == "1":
        pytest.exit(REASON, returncode=1)
    config.addinivalue_line("filterwarnings", "ignore:.* encountered in .*:RuntimeWarning")
    if os.environ.get("TRITON_INTERPRET") == "1":
        _repeat_less()
        _say_types_once()
        _compute_at_once()
        _combine_by_pairs()


def _repeat_less() -> None:
    """Keep what the interpreter makes anew all the time, which is a third of its time.

    It replaces the functions of `triton.language` for a launch, and all of them again in every call of a device
    function; and it writes the table of NumPy's types down for every look into it.
    """
    from triton import language
    from triton.runtime import interpreter

    of_scalar = functools.cache(interpreter._get_np_dtype)  # the types of blocks and pointers have no hash
    pointer = np.dtype(np.uint64)

    def numpy_type(kind):
        kind = kind.element_ty if isinstance(kind, language.block_type) else kind
        return pointer if isinstance(kind, language.pointer_type) else of_scalar(kind)

    interpreter._get_np_dtype = numpy_type
    if not hasattr(interpreter, "_LangPatchScope"):  # an early Triton, which does not say when a launch ends
        return
    patch, replaced, kept = interpreter._patch_lang, set(), interpreter._LangPatchScope()
    of_builtins, semantic = language.core.builtin(lambda: None).__code__, interpreter.interpreter_semantic

    @functools.cache
    def modules_of(function):
        return {value for value in function.__globals__.values() if value is language or value is language.core}

    def once(function):
        modules = modules_of(function)
        if not modules or not modules <= replaced:
            patch(function)
            replaced.update(modules)
        return kept  # as replaced as it is: nothing but kernels in the interpreter calls them in this process

    def given(of, name, member, builder, scope):
        inner = member.__wrapped__ if member.__code__ is of_builtins else member

        def call(*arguments, **options):
            options["_semantic"] = semantic
            return inner(*arguments, **options)

        scope.set_attr(of, name, call)

    interpreter._patch_lang, interpreter._patch_attr = once, given


def _say_types_once() -> None:
    """Leave out what Triton's front end does again for every operation of two small blocks, and what takes most of it.

    It spells the shapes of operands and result out in objects of their own and compares them item by item: here the
    types of blocks share what they hold, tensors of a type what follows from it, and operands of one type are taken as
    they are. And it looks for overflows of integers, to assert where it debugs that there are none: here it does so
    only where it debugs.
    """
    from triton.language import core, semantic
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return
    front_end = semantic.TritonSemantic
    block_init, pointer_init = core.block_type.__init__, core.pointer_type.__init__
    with_element_ty = core.block_type.with_element_ty
    tensor_init, equal = core.tensor.__init__, core.dtype.__eq__
    broadcast, checked = front_end.broadcast_impl_value, front_end.binary_op_type_checking_impl
    sanitize = front_end.binary_op_sanitize_overflow_impl
    # Two operands of one of these are computed in it, quotients too.
    plain = {"fp32", "fp64", *core.dtype.SINT_TYPES, *core.dtype.UINT_TYPES}

    def block(cls, element_ty, shape):
        lengths = tuple([getattr(n, "value", n) for n in shape])
        known = element_ty.__dict__.setdefault("blocks", {})
        if lengths not in known:
            known[lengths] = object.__new__(cls)
            block_init(known[lengths], element_ty, shape)
            known[lengths].lengths = lengths
        return known[lengths]

    def block_of(self, element_ty):
        return element_ty.__dict__.get("blocks", {}).get(self.lengths) or with_element_ty(self, element_ty)

    def tensor(self, handle, type):
        if "of_tensor" not in type.__dict__:
            tensor_init(self, handle, type)
            type.of_tensor = {name: value for name, value in vars(self).items() if name not in ("handle", "type")}
        self.__dict__.update(type.of_tensor, handle=handle, type=type)

    def alike(self, lhs, rhs):
        a, b = lhs.type, rhs.type
        same = a.lengths == b.lengths if a.is_block() and b.is_block() else not a.is_block() and not b.is_block()
        return (lhs, rhs) if same else broadcast(self, lhs, rhs)

    def operands(self, lhs, rhs, *rest, **options):
        if type(lhs) is type(rhs) is core.tensor and lhs.dtype is rhs.dtype and lhs.dtype.name in plain:
            return self.broadcast_impl_value(lhs, rhs)
        return checked(self, lhs, rhs, *rest, **options)

    def overflow(self, *rest):
        if self.builder.options.debug:
            sanitize(self, *rest)

    def pointer(cls, element_ty, *rest, **options):
        known, key = element_ty.__dict__.setdefault("pointers", {}), (rest, *options.items())
        if key not in known:
            known[key] = object.__new__(cls)
            pointer_init(known[key], element_ty, *rest, **options)
        return known[key]

    def same_dtype(self, other):
        return self is other or (self.name == other.name if other.__class__ is core.dtype else equal(self, other))

    for kind, once in ((core.block_type, block), (core.pointer_type, pointer)):
        kind.__new__, kind.__init__, kind.to_ir = once, lambda *given, **named: None, lambda self, builder: self
    core.block_type.with_element_ty, core.tensor.__init__, core.dtype.__eq__ = block_of, tensor, same_dtype
    front_end.broadcast_impl_value, front_end.binary_op_type_checking_impl = alike, operands
    front_end.binary_op_sanitize_overflow_impl = overflow


def _compute_at_once() -> None:
    """Hand operands to NumPy at once where it computes what Triton's front end does with them: two numbers of a kind, a
    number beside Python's, a pointer and an offset. The front end says what comes out when types meet for the first
    time; where NumPy finds something else, it goes on to compute.
    """
    from triton import language
    from triton.language import core
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return
    tensor, handle, semantic = core.tensor, interpreter.TensorHandle, interpreter.interpreter_semantic
    whole, broken = {"int32", "int64"}, {"fp32", "fp64"}
    numbers, bits = (whole, broken), (whole, {"int1"})
    arithmetic = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "truediv": np.divide}
    arithmetic |= {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
    arithmetic |= {"eq": np.equal, "ne": np.not_equal}
    of_bits = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}

    def as_tensor(beside, number):
        """Return the number as a scalar of the type beside it, or as it is where one of the two is to be cast."""
        known = beside.type.__dict__.setdefault("numbers", {})
        key = repr(number)  # which tells 1 from 1.0 and 0.0 from -0.0
        if key not in known:
            known[key] = number
            if beside.dtype.name in whole | broken:
                same, full = semantic.binary_op_type_checking_impl(beside, number)
                if same is beside:
                    entry = handle(full.handle.data.reshape(-1)[:1].copy(), full.handle.dtype)
                    known[key] = tensor(entry, beside.dtype)
        return known[key]

    def moved(pointers, offsets, size):
        return pointers + size * offsets.astype(np.uint64)

    def learning(plain, function, kinds):
        """Return the function of Triton's front end that asks it once for all operands of the same types."""
        results = {}

        def first(operands):
            """Return what call() keeps of these types: third what computes the result, or none."""
            found, compute = plain(*operands, _semantic=semantic), None
            a, b = (each.dtype for each in operands[-2:])
            if any(a.name in kind and b.name in kind for kind in kinds):
                compute = function
            elif function is np.add and a.is_ptr() and b.name in whole:
                compute = functools.partial(moved, size=max(1, a.element_ty.primitive_bitwidth // 8))
            if compute:
                mine, theirs = compute(*[each.handle.data for each in operands]), found.handle.data
                compute = compute if (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape) else None
            types = [each.type for each in operands]  # kept, or their ids would become those of others
            return found.type, found.handle.dtype, compute, types

        def call(*operands):
            key = tuple([id(each.type) for each in operands])
            if key not in results:
                results[key] = first(operands)
            kind, of_entries, compute, _ = results[key]
            if compute is None:
                return plain(*operands, _semantic=semantic)
            return tensor(handle(compute(*[each.handle.data for each in operands]), of_entries), kind)

        return call

    def method(name, function, kinds):
        plain = getattr(tensor, name)
        quick = learning(plain, function, kinds)

        def call(one, other):
            if other.__class__ is core.constexpr:
                other = other.value
            if other.__class__ is not tensor and kinds is numbers:
                other = as_tensor(one, other)
            return quick(one, other) if other.__class__ is tensor else plain(one, other, _semantic=semantic)

        setattr(tensor, name, call)

    def where(condition, x, y):
        x, y = (each.value if each.__class__ is core.constexpr else each for each in (x, y))
        if x.__class__ is tensor and y.__class__ is not tensor:
            y = as_tensor(x, y)
        elif y.__class__ is tensor and x.__class__ is not tensor:
            x = as_tensor(y, x)
        if x.__class__ is y.__class__ is condition.__class__ is tensor and condition.dtype is core.int1:
            return choose(condition, x, y)
        return plain_where(condition, x, y, _semantic=semantic)

    plain_where = core.where
    choose = learning(plain_where, np.where, numbers)
    language.where = core.where = where
    for table, kinds in ((arithmetic, numbers), (of_bits, bits)):
        for name, function in table.items():
            method(f"__{name}__", function, kinds)
            method(f"__r{name}__", lambda a, b, function=function: function(b, a), kinds)


def _combine_by_pairs() -> None:
    """Reduce and scan with a function of the kernel's own as a GPU does, by pairs; the interpreter takes one item after
    the other, which rounds sums of thousands as no GPU does, takes a thousand times as long, and hides that a function
    is not associative.
    """
    from triton.runtime import interpreter

    one_by_one = interpreter.ReduceOps.generic_reduce

    def combined(self, kinds, *sides):
        """Return the parts that the kernel's function makes of (parts of the left, parts of the right)."""
        given = [self.to_tensor(part, kind) for side in sides for part, kind in zip(side, kinds, strict=True)]
        found = self.combine_fn.fn(*given)
        return [each.handle.data for each in (found if isinstance(found, tuple) else (found,))]

    def generic_reduce(self, given):
        if self.axis is None:
            return one_by_one(self, given)
        kinds = [each.dtype for each in given]
        parts = [np.moveaxis(each.handle.data, self.axis, 0) for each in given]
        while len(parts[0]) > 1:
            parts = combined(self, kinds, [part[::2] for part in parts], [part[1::2] for part in parts])
        whole = [np.expand_dims(part[0], self.axis) if self.keep_dims else part[0] for part in parts]
        return [self.to_tensor(part, kind) for part, kind in zip(whole, kinds, strict=True)]

    def generic_scan(self, given):
        kinds = [each.dtype for each in given]
        parts = [np.moveaxis(each.handle.data, self.axis, 0).copy() for each in given]
        size, width = len(parts[0]), 1
        while width < size:  # the last of every left half is before all of the right one
            index = np.arange(size).reshape(-1, 2, width)
            right = index[:, 1].ravel()
            left = np.repeat(index[:, 0, -1], width)
            found = combined(self, kinds, [part[left] for part in parts], [part[right] for part in parts])
            for part, new in zip(parts, found, strict=True):
                part[right] = new
            width *= 2
        parts = [np.ascontiguousarray(np.moveaxis(part, 0, self.axis)) for part in parts]
        return [self.to_tensor(part, kind) for part, kind in zip(parts, kinds, strict=True)]

    interpreter.ReduceOps.generic_reduce = generic_reduce
    interpreter.ScanOps.generic_scan = generic_scan


class _Launch:
    """The addresses that one launch may touch, and those that it did."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        spans = []
        for tensor in tensors:
            if tensor.numel():
                reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
                spans.append((tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()))
        self.starts, self.stops = np.array(spans, dtype=np.uint64).reshape(-1, 2).T
        self.read: list[np.ndarray] = []
        self.written: list[np.ndarray] = []
        self.periods: list[tuple[int, ...]] = []  # of each store: its program, and how many barriers came before

    def touch(self, pointers, mask, record: list[np.ndarray], what: str) -> None:
        addresses = np.asarray(pointers.data).astype(np.uint64).ravel()
        addresses = addresses[np.broadcast_to(np.asarray(mask.data), np.shape(pointers.data)).ravel().astype(bool)]
        inside = (addresses[:, None] >= self.starts) & (addresses[:, None] < self.stops)
        if not inside.any(1).all():
            raise AssertionError(f"{int((~inside.any(1)).sum())} of {addresses.size} addresses {what} out of bounds")
        record.append(addresses)

    def finish(self) -> None:
        written = np.concatenate(self.written) if self.written else np.empty(0, np.uint64)
        sizes = [len(addresses) for addresses in self.written]
        twice = "two stores of one launch write the same address"
        for ends in (-1, None):  # a program may write again behind a barrier, where no other one writes
            owners = list(dict.fromkeys(period[:ends] for period in self.periods))
            owner = np.repeat([owners.index(period[:ends]) for period in self.periods], sizes).astype(np.uint64)
            places = np.unique(np.stack([owner, written]), axis=1)[1]
            assert places.size == (np.unique(written).size if ends else written.size), twice
        read = np.concatenate(self.read) if self.read else np.empty(0, np.uint64)
        assert not np.intersect1d(read, written).size, "a launch reads what it also writes"


@pytest.fixture
def careful_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail on what the interpreter would let pass: reads and writes out of bounds, races, outputs never written.

    Every address that a kernel touches must lie in one of the tensors it was given. No address may be written twice in
    one launch but by one program with a barrier between, nor be read in a launch that writes it: programs have no order
    on a GPU, here they do. New tensors are filled with NaN.
    """
    from triton.runtime import interpreter

    current: list[_Launch] = []
    barriers: dict[tuple[int, ...], int] = {}  # that each program of a launch has passed
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__
    barrier = builder.create_barrier

    def checked_load(self, pointers, mask, *rest, **named):
        if current:
            current[-1].touch(pointers, mask, current[-1].read, "read")
        return load(self, pointers, mask, *rest, **named)

    def checked_store(self, pointers, value, mask, *rest, **named):
        if current:
            current[-1].periods.append((*self.grid_idx, barriers.get(self.grid_idx, 0)))
            current[-1].touch(pointers, mask, current[-1].written, "written")
        return store(self, pointers, value, mask, *rest, **named)

    def counted_barrier(self, *rest):
        barriers[self.grid_idx] = barriers.get(self.grid_idx, 0) + 1
        return barrier(self, *rest)

    def checked_call(self, *arguments, **options):
        launch = _Launch([a for a in (*arguments, *options.values()) if isinstance(a, torch.Tensor)])
        current.append(launch)
        barriers.clear()
        try:
            result = call(self, *arguments, **options)
        finally:
            current.pop()
        launch.finish()
        return result

    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)
    monkeypatch.setattr(builder, "create_barrier", counted_barrier)
    monkeypatch.setattr(executor, "__call__", checked_call)
    torch.use_deterministic_algorithms(True)  # which fills new tensors with NaN
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def own_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan what a GPU of compute capability 9 would, with tiles for sizes of tests."""
    from mopl.kernels import linear_logprob_products as kernels
    from mopl.ops.linear_logprob import choice
    from mopl.ops.linear_logprob import device as gpus
    from mopl.ops.linear_logprob.plan import DESCRIPTORS

    def tile(**sizes: int) -> dict[str, int]:
        return {**sizes, "GROUP": 2, "num_warps": 4, "num_stages": 2}

    monkeypatch.setattr(kernels, "TILE", tile(BM=16, BV=32, BH=16))
    monkeypatch.setattr(kernels, "GRADIENT_TILE", tile(BV=16, BH=32, BM=16))
    plan_for, hopper = choice.plan_for, gpus.TOY._replace(capability=(9, 0))

    def planned(hidden, weight, wanted, softcap, moments=0, buffers=1):
        with monkeypatch.context() as patch:
            patch.setattr(gpus, "properties_of", lambda device: hopper)
            fits = choice.algorithms(hidden, weight, wanted, softcap, moments)
        plan = plan_for(hidden, weight, wanted, softcap, moments, buffers)
        return plan._replace(algorithm=DESCRIPTORS) if DESCRIPTORS in fits else plan

    monkeypatch.setattr(choice, "plan_for", planned)
