"""Run by tests/experiments/test_killed_workers.py: a command of mopl in which a worker kills itself.

The worker of the rank in the environment's KILLED is gone in the middle of the third step, while the others wait for
its gradient. The clock that runs measure themselves with stands still.
"""

import os
import signal
import sys
import time

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
time.perf_counter = lambda: 0.0

from ending import leave

from mopl.cli import main
from mopl.experiments import run_directory
from mopl.training import loop

accumulate = loop.accumulate


def killed(accelerator, prepared, source, loss, config, step):
    def inner(model, batch, at):
        found = loss(model, batch, at)
        if at == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    return accumulate(accelerator, prepared, source, inner, config, step)


if __name__ == "__main__":
    run_directory._commit = lambda: None  # somebody may work in the checkout meanwhile
    if os.environ["RANK"] == os.environ.get("KILLED"):
        loop.accumulate = killed
    status = main(sys.argv[1:])
    if status:
        sys.exit(status)
    leave()
