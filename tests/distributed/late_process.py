"""A command of mopl in which one process comes late wherever it asks whether a file is there.

That is `exists` and `is_file` of JSON and tensors: `late_process.py RANK COMMAND ...`.

What the other has written meanwhile must not change what this one does: a process that takes another way than the
others waits for them for ever.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")

from mopl.cli import main

LATE, *COMMAND = sys.argv[1:]
SECONDS = 0.5


def late(ask: Callable[[Path], bool]) -> Callable[[Path], bool]:
    """Return a question about a file that is asked later than it should be, where mopl asks it."""

    def ask_late(path: Path) -> bool:
        of_mopl = sys._getframe(1).f_globals["__name__"].startswith("mopl")
        if of_mopl and path.suffix in (".json", ".safetensors"):
            time.sleep(SECONDS)
        return ask(path)

    return ask_late


if __name__ == "__main__":
    if os.environ["RANK"] == LATE:
        Path.exists, Path.is_file = late(Path.exists), late(Path.is_file)  # type: ignore[method-assign]
    sys.exit(main(COMMAND))
