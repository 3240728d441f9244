"""Every kernel at small sizes under compute-sanitizer: accesses out of bounds (memcheck), races in shared memory.

    python -m bench.sanitizer [--json FILE]

Where the tool is not found, the report says so and nothing has failed. Its racecheck knows shared memory alone: a race
between warps in global memory, such as one of `gathered_logprob` in place, only a comparison of results can show
(tests/gpu/test_gathered.py).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench.measuring import DEVICE, ON_GPU, Report
from mopl.ops import gathered_logprob, linear_kl, linear_logprob, listwise_cross_entropy, plackett_luce_nll

TOOLS = ("memcheck", "racecheck")
FOUND = 9  # exit status of the tool that has found something; it and the program have others for other failures
LIMIT_S = 100.0


def lists(op: Callable, items: int, **options: str) -> None:
    """Run a list loss of three lists and two objectives, forward and backward."""
    scores = torch.randn(3, items, device=DEVICE, requires_grad=True)
    labels = torch.randint(0, 5, (3, 2, items), device=DEVICE).float()
    mask = torch.rand(3, items, device=DEVICE) < 0.9
    op(scores, labels, torch.ones(3, 2, device=DEVICE), mask, **options).sum().backward()


def head(rows: int, needs: str, **options: float | bool | int) -> None:
    """Run `linear_logprob` with gradients of the hidden states ("h"), the head ("w"), both or none."""
    width, vocabulary = (72, 2305) if ON_GPU else (16, 40)
    hidden = torch.randn(rows, width, device=DEVICE, dtype=torch.bfloat16, requires_grad="h" in needs)
    weight = torch.randn(vocabulary, width, device=DEVICE, dtype=torch.bfloat16, requires_grad="w" in needs)
    target = torch.randint(vocabulary, (rows,), device=DEVICE)
    value = linear_logprob(hidden, weight, target, **options)
    if needs:
        sum(v.sum() for v in (value if isinstance(value, tuple) else (value,))).backward()


def logits(inplace: bool, vocabulary: int) -> None:
    """Run `gathered_logprob`, forward and backward."""
    leaf = torch.randn(5, vocabulary, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(vocabulary, (5,), device=DEVICE)
    gathered_logprob(leaf.view_as(leaf), target, inplace_backward=inplace).sum().backward()


def kl() -> None:
    """Run `linear_kl`."""
    shape = (9, 16)
    hidden, other = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    weight = torch.randn(75, 16, device=DEVICE, dtype=torch.bfloat16)
    linear_kl(hidden.requires_grad_(), weight, other, weight).sum().backward()


def run_kernels() -> None:
    """Run each kernel once or more, in every way that launches another one."""
    torch.manual_seed(0)
    long = (5, 100, 700, 3000) if ON_GPU else (5,)
    for items in long:
        lists(listwise_cross_entropy, items)
        for ties in ("breslow", "efron", "exact"):
            lists(plackett_luce_nll, items, ties=ties)
    lists(listwise_cross_entropy, 20_000 if ON_GPU else 9)
    for inplace in (False, True):
        for vocabulary in (40, 50257) if ON_GPU else (40,):
            logits(inplace, vocabulary)
    for rows in (7, 300) if ON_GPU else (7,):
        for needs in ("", "h", "hw"):
            head(rows, needs)
        head(rows, "hw", workspace=0)
        head(rows, "h", softcap=15.0, return_entropy=True)
    kl()
    if ON_GPU:
        torch.cuda.synchronize()


def main() -> int:
    """Run the tools, or be the program that they look at."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write")
    parser.add_argument("--run", action="store_true", help="run the kernels alone")
    arguments = parser.parse_args()
    if arguments.run:
        run_kernels()
        return 0
    report = Report(arguments.json, {})
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    program = [sys.executable, "-m", "bench.sanitizer", "--run"]
    # What the allocator keeps would hide an access past the end of a tensor.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for name in ("alone", *TOOLS):
        found = {}
        under = [] if name == "alone" else [tool or "", "--tool", name, "--error-exitcode", str(FOUND)]
        if report.find("every kernel", f"mopl, {name}") is not None:
            continue
        if name != "alone" and (tool is None or not ON_GPU):
            found = {"absent": "no compute-sanitizer here" if tool is None else "no GPU here"}
        else:
            try:
                status = subprocess.run([*under, *program], env=environment, timeout=LIMIT_S).returncode
                reason = "the tool found something" if status == FOUND else f"exit status {status}"
                found = {"failed": reason} if status else {}
            except subprocess.TimeoutExpired:
                found = {"absent": f"cut off after {LIMIT_S:.0f} s"}
        report.add("every kernel", f"mopl, {name}", **found)
    return 1 if report.failures() else 0


if __name__ == "__main__":
    sys.exit(main())
