"""The fixture that watches memory must itself be able to fail."""

import pytest
import torch
import triton
import triton.language as tl
from list_problems import padded

pytestmark = pytest.mark.usefixtures("careful_memory")


@triton.jit
def copy_kernel(source, target, items, shift, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(target + i, tl.load(source + i + shift, mask=i < items), mask=i < items)


@triton.jit
def same_place_kernel(target):
    tl.store(target, tl.program_id(0))


@triton.jit
def twice_kernel(target, BARRIER: tl.constexpr, SAME: tl.constexpr):
    place = target + (0 if SAME else tl.program_id(0))
    tl.store(place, 1)
    if BARRIER:
        tl.debug_barrier()
    tl.store(place, 2)


def test_reads_within_bounds_pass() -> None:
    source, target = torch.rand(5), torch.empty(5)
    copy_kernel[(1,)](source, target, 5, 0, BLOCK=8)
    assert torch.equal(source, target)


@pytest.mark.parametrize(("items", "shift"), [(5, 1), (5, -1), (6, 0)])
def test_a_step_out_of_bounds_is_found(items: int, shift: int) -> None:
    with pytest.raises(Exception, match="out of bounds"):
        copy_kernel[(1,)](padded(torch.rand(1, 5))[0], padded(torch.rand(1, 5))[0], items, shift, BLOCK=8)


def test_a_race_between_programs_is_found() -> None:
    with pytest.raises(AssertionError, match="same address"):
        same_place_kernel[(2,)](torch.empty(1, dtype=torch.int32))


def test_a_program_may_write_again_behind_a_barrier_alone() -> None:
    target = torch.empty(2, dtype=torch.int32)
    twice_kernel[(2,)](target, BARRIER=True, SAME=False)
    assert target.tolist() == [2, 2]
    for barrier, same in ((False, False), (True, True)):
        with pytest.raises(AssertionError, match="same address"):
            twice_kernel[(2,)](target, BARRIER=barrier, SAME=same)


def test_reading_what_is_written_is_found() -> None:
    both = torch.rand(16)
    with pytest.raises(AssertionError, match="reads what it also writes"):
        copy_kernel[(1,)](both, both, 8, 4, BLOCK=8)


def test_new_tensors_hold_nan() -> None:
    assert torch.empty(3).isnan().all() and torch.rand(3).new_empty(2).isnan().all()
