"""Offsets past 2^31 elements of the kernels of log-probabilities."""

import math

import torch
from interpreting import far_apart

from mopl.kernels import fused_logprob
from mopl.kernels import linear_logprob as kernels
from mopl.kernels import linear_logprob_backward as backward_kernels
from mopl.ops import gathered_logprob_triton
from mopl.ops.linear_logprob import choice, gpu
from mopl.ops.linear_logprob.records import Batch, Coefficients, Head

ROWS = 4


def test_gathered_logprob_forward_and_backward() -> None:
    logits, target, ones = torch.randn(ROWS, 40).bfloat16(), torch.randint(0, 40, (ROWS, 1)), torch.ones(ROWS)
    far = far_apart(logits)
    logprob, lse, entropy, _ = gathered_logprob_triton.launch_forward(far, target, ones, 0.0, True, False)
    exact = logits.double().log_softmax(-1)
    torch.testing.assert_close(logprob.double(), exact.gather(1, target), rtol=1e-6, atol=1e-6)
    upstream, grad = torch.randn(ROWS, 1), far_apart(torch.full_like(logits, math.nan))
    gathered_logprob_triton.launch_backward(upstream, None, None, far, target, ones, logprob, lse, entropy, 0.0, grad)
    expected = upstream * (torch.zeros(ROWS, 40).scatter_(1, target, 1.0) - exact.exp())
    torch.testing.assert_close(grad.double(), expected.double(), rtol=2**-7, atol=1e-6)


def test_stored_exponentials_and_everything_that_reads_them() -> None:
    vocabulary, size = 48, 16  # rows have no padding here
    hidden, weight = torch.randn(ROWS, size), torch.randn(vocabulary, size)
    pivot, ones = torch.randint(0, vocabulary, (ROWS,)), torch.ones(ROWS)
    plan = choice.plan_for(hidden, weight, "trained", softcap=False)
    head, batch = Head(weight, None, 0.0, 1.0), Batch(hidden, ones, None)
    scan = gpu.Scan(head, batch, pivot, torch.zeros(ROWS), plan)
    stored = far_apart(torch.full((ROWS, vocabulary), math.nan).bfloat16())
    sums = gpu.Running(ROWS, 0, torch.float32, hidden.device)
    kept = gpu.Kept(stored)
    scan.once(slice(0, ROWS), sums, kept)
    exact = (hidden.double() @ weight.double().T).exp()
    exact[torch.arange(ROWS), pivot] = 0
    torch.testing.assert_close(stored.double(), exact, rtol=2**-7, atol=1e-6)
    torch.testing.assert_close(sums.others.double(), exact.sum(1), rtol=1e-5, atol=0)
    total = torch.zeros(vocabulary)
    backward_kernels.column_sum_kernel[(1,)](
        stored, ones, total, 0, ROWS, vocabulary, stored.stride(0), **backward_kernels.COLUMN_SUM_TILE
    )
    torch.testing.assert_close(total.double(), stored.double().sum(0), rtol=1e-5, atol=0)
    out = far_apart(torch.full((ROWS, vocabulary), math.nan).bfloat16())
    backward_kernels.logit_gradient_kernel[(ROWS, 1)](
        stored, ones, None, ones, ones, out, 0, vocabulary, stored.stride(0), out.stride(0), SOFTCAP=0.0,
        **backward_kernels.GRADIENT_TILE,
    )  # fmt: skip
    torch.testing.assert_close(out.double(), -stored.double(), rtol=2**-7, atol=0)
    # A shift of -inf flags every row, which are then computed again in place.
    scan.shift.fill_(-math.inf)
    stored.fill_(math.nan)
    sums.flag.fill_(1)
    scan.redo(slice(0, ROWS), sums, kept)
    exact = (hidden.double() @ weight.double().T - scan.shift.double()[:, None]).exp()
    exact[torch.arange(ROWS), pivot] = 0
    torch.testing.assert_close(stored.double(), exact, rtol=2**-7, atol=1e-6)


def test_hidden_states_and_heads_with_rows_far_apart() -> None:
    vocabulary, size = 4, 16
    hidden, weight = far_apart(torch.randn(ROWS, size).bfloat16()), far_apart(torch.randn(vocabulary, size).bfloat16())
    pivot, ones = torch.arange(ROWS), torch.ones(ROWS)
    exact = hidden.double() @ weight.double().T
    head = Head(weight, None, 0.0, 1.0)
    logits = gpu.target_logits(head, Batch(hidden, ones, None), pivot, None)
    torch.testing.assert_close(logits.double(), exact.diagonal(), rtol=1e-5, atol=1e-5)
    partial, flag = torch.empty(1, ROWS), torch.empty(1, ROWS, dtype=torch.int8)
    tile = {"BM": 16, "BV": 16, "BH": 16, "GROUP": 1, "num_warps": 4, "num_stages": 2}
    fused_logprob.fused_sum_kernel[(1,)](
        hidden, weight, None, pivot, logits, ones, None, partial, flag, ROWS, size, vocabulary, hidden.stride(0),
        weight.stride(0), SOFTCAP=0.0, LOGIT_SCALE=1.0, LIMIT=kernels.LIMIT, UPCAST=True, **tile,
    )  # fmt: skip
    others = (exact - exact.diagonal()[:, None]).exp().fill_diagonal_(0).sum(1)
    torch.testing.assert_close(partial[0].double(), others, rtol=1e-5, atol=0)
    sums = far_apart(torch.randn(ROWS, size).bfloat16())
    direction = gpu.combine(head, sums, None, pivot, Coefficients(ones, ones), torch.float32)
    torch.testing.assert_close(direction, weight.float() + sums.float(), rtol=0, atol=0)
