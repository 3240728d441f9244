"""Log-probabilities of tokens as a pytest-benchmark suite: `pytest bench/bench_logprob.py`.

CPU sizes by default, those of a language model where there is a GPU. After pytest-benchmark's table of times comes
one with, and its files have as extra information: the limit of the mode's products (bytes, from logits) on this
machine over its time (`share`), its peak of extra memory in GB (`extra_gb`), and the largest error of its
log-probabilities against float64 in nats (`error`). `python -m bench.logprob` takes the variants in turn: on a shared
machine trust that one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch

from bench.limits import rates
from bench.logprob import PRODUCTS, run_head, run_logits
from bench.logprob_peers import Peer, peers
from bench.logprob_problems import exactly, problem
from bench.measuring import DEVICE, ON_GPU, extra_memory, synchronize

ROWS, WIDTH, VOCABULARY = (4096, 2048, 128256) if ON_GPU else (128, 128, 2048)
limits = cache(rates)


CASES = [
    pytest.param(mode, peer, id=f"{mode}-{peer.name}")
    for mode in ("gathered", "forward", "frozen", "trained")
    for peer in peers(mode)
]


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Lines to print when all is measured."""
    lines: list[str] = []
    yield lines
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n\n{'':45}{'median ms':>12}{'share':>9}{'extra GB':>10}{'log p':>9}", *lines, sep="\n")


@pytest.mark.parametrize(("mode", "peer"), CASES)
def test_logprob(benchmark, table: list[str], mode: str, peer: Peer) -> None:
    """Time one variant with its gradients (none for `forward`)."""
    try:
        run = peer.load()
    except ImportError as error:
        pytest.skip(str(error))
    hidden, weight, target, upstream = problem("peaked", ROWS, WIDTH, VOCABULARY)
    few = slice(0, 64)
    if mode == "gathered":
        logits = hidden @ weight.T
        exact = logits[few].double().log_softmax(-1).gather(1, target[few, None])[:, 0]
        floor = 6 * logits.numel() / limits()[0]

        def step() -> torch.Tensor:
            return run_logits(run, logits, target, upstream)[0]
    else:
        exact = exactly(hidden[few], weight, target[few], upstream[few])[0]
        floor = PRODUCTS[mode] * ROWS * WIDTH * VOCABULARY / limits()[1]

        def step() -> torch.Tensor:
            return run_head(run, peer.per_token, mode, hidden, weight, target, upstream)

    try:
        value = step()
    except Exception as error:  # other people's code that does not run on this machine
        if peer.name.startswith("mopl"):
            raise
        pytest.skip(f"{type(error).__name__}: {str(error).splitlines()[0][:100]}")
    benchmark.group = f"{mode} {ROWS} x {WIDTH} x {VOCABULARY} {DEVICE.type}"
    if peer.per_token:
        benchmark.extra_info["error"] = float((value[few].double() - exact).abs().max())
    benchmark.extra_info["extra_gb"] = extra_memory(step)

    def timed() -> None:
        step()
        synchronize()

    benchmark.pedantic(timed, rounds=20 if ON_GPU else 5, warmup_rounds=1)
    if benchmark.stats is not None:  # None under --benchmark-disable
        info, median = benchmark.extra_info, benchmark.stats.stats.median
        info["share"] = floor / median
        memory = "-" if info["extra_gb"] is None else f"{info['extra_gb']:.3f}"
        error = f"{info['error']:.1e}" if "error" in info else "-"
        table.append(f"{mode + ', ' + peer.name:45}{median * 1e3:12.3f}{info['share']:9.1%}{memory:>10}{error:>9}")
