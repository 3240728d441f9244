"""The default workspace of linear_logprob on a GPU: a share of its memory, and what is asked of a GPU without an index.

Without a GPU: what torch says of one is replaced, and tensors are fake.
"""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo  # before anything of torch.cuda is replaced: it collects those functions
from torch._subclasses.fake_tensor import FakeTensorMode

from mopl.ops.linear_logprob import device as _device
from mopl.ops.linear_logprob import linear_logprob
from mopl.ops.linear_logprob.keeping import kept_rows

GIB = 2**30
CUDA = torch.device("cuda")
H200_BYTES = 150_754_820_096  # what torch says of one


class Gpu:
    """What torch says of a GPU: memory in bytes, and the indices that it was asked about."""

    def __init__(self) -> None:
        self.free, self.reserved, self.allocated, self.current = 100 * GIB, 0, 0, 3
        self.asked: list[int] = []


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    gpu = Gpu()
    about = SimpleNamespace(
        name="NVIDIA H200", multi_processor_count=132, L2_cache_size=50 << 20, total_memory=H200_BYTES, major=9, minor=0
    )
    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: gpu.current,
        "get_device_properties": lambda index: gpu.asked.append(index) or about,
        "get_device_capability": lambda device: (9, 0),
        "mem_get_info": lambda device: (gpu.free, H200_BYTES),
        "memory_reserved": lambda device: gpu.reserved,
        "memory_allocated": lambda device: gpu.allocated,
        "is_current_stream_capturing": lambda: False,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    _device._read.cache_clear()
    yield gpu
    _device._read.cache_clear()


def kept(rows: int, workspace: int | None = None, vocabulary: int = 128256) -> int:
    with FakeTensorMode(), torch.device("cuda"):
        hidden, weight = (torch.empty(n, 64, dtype=torch.bfloat16) for n in (rows, vocabulary))
        return kept_rows(hidden, weight, rows, workspace)


def test_an_h200_keeps_all_rows_of_the_goal_size(gpu: Gpu) -> None:
    assert 4 * GIB < _device.default_workspace(CUDA) < 4.5 * GIB
    assert kept(16384) == 16384
    assert kept(16384, 2 * GIB) == 2 * GIB // (128256 * 2)
    assert kept(10**6) == H200_BYTES // 32 // (128256 * 2)
    assert gpu.asked == [3, 0]  # a device without an index is the current one; fake tensors are on the first


def test_less_is_kept_where_memory_is_short(gpu: Gpu) -> None:
    gpu.free = 2 * GIB
    assert kept(16384) == GIB // (128256 * 2)
    gpu.reserved, gpu.allocated = 60 * GIB, 10 * GIB  # what the allocator holds unused counts as free
    assert kept(16384) == 16384
    gpu.allocated = 60 * GIB
    assert kept(500) == 500  # a sixteenth of the share is not asked for
    gpu.free = 0
    assert kept(16384) == 0 and kept(16384, 8 * GIB) == 16384


@pytest.mark.parametrize("why", ["deterministic", "capture"])
def test_what_is_unused_is_not_asked_where_accidents_must_not_count(
    gpu: Gpu, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.free = 0
    if why == "capture":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert kept(16384) == 16384
        return
    torch.use_deterministic_algorithms(True)
    try:
        assert kept(16384) == 16384
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dynamic", [True, None])
def test_compiled_code_takes_the_share_as_a_constant(dynamic: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device) -> int:
        raise AssertionError("what is unused is no constant")

    monkeypatch.setattr(_device, "unused_bytes", refuse)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="eager")
    def rows_kept(hidden: torch.Tensor) -> torch.Tensor:
        return hidden.new_empty(min(hidden.shape[0], _device.default_workspace(CUDA, hidden.shape[0] << 28) >> 28))

    share = _device.properties_of(CUDA).memory // 32
    assert [len(rows_kept(torch.empty(rows, 2))) for rows in (4, 7, 30)] == [4, 7, share >> 28]


def test_fake_tensors_where_there_is_no_gpu_are_planned_for_an_h100() -> None:
    """Without gradients: autograd needs a GPU for its streams."""
    assert kept(16384) == _device.H100.memory // 32 // (128256 * 2)
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        logprob = linear_logprob(torch.empty(9, 64), torch.empty(99, 64), torch.zeros(9, dtype=torch.int64))
    assert logprob.shape == (9,) and logprob.device.type == "cuda"


def test_tiles_of_a_gpu_without_an_index_are_those_of_the_current_one(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = pytest.importorskip("mopl.ops.linear_logprob.choice")
    asked = []
    utils = SimpleNamespace(get_device_properties=lambda index: asked.append(index) or {"max_shared_mem": 232448})
    monkeypatch.setattr(choice, "driver", SimpleNamespace(active=SimpleNamespace(utils=utils)))
    choice._usable.cache_clear()
    assert choice.usable(CUDA, 2, False) == choice.usable(torch.device("cuda", 1), 2, False) != []
    gpu.current = 2
    choice.usable(CUDA, 2, False)
    choice._usable.cache_clear()
    assert asked == [3, 1, 2]


@pytest.mark.parametrize("name", ["workspace", "max_rows"])
def test_a_bound_that_is_no_whole_number_is_named(name: str) -> None:
    operands = torch.ones(2, 3, requires_grad=True), torch.ones(5, 3, requires_grad=True), torch.tensor([1, 2])
    for value in (1.5, 2e9, float("nan"), "2GB"):
        with pytest.raises(TypeError, match=f"{name} is .* but must be a whole number"):
            linear_logprob(*operands, **{name: value})
    with pytest.raises(ValueError, match=f"{name} is -1 but must not be negative"):
        linear_logprob(*operands, **{name: -1})
