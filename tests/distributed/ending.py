"""How processes of a group end here: `leave()`, or `ending.py SCRIPT ARGUMENTS ...`, which runs a script and leaves."""

import os
import runpy
import sys


def leave() -> None:
    """End this process, whose work is done and right, without the interpreter's own ending.

    A thread of gloo lets go of the tensors of a reduction some time after the reduction is done, and needs the
    interpreter for that where Python has let go of them first; once the interpreter is ending, it aborts the process
    instead ("terminate called without an active exception"). Neither `destroy_process_group` nor the garbage collector
    ends these threads where there was DDP, or a DTensor.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        if ended.code not in (None, 0):
            raise
    leave()
