"""Ctrl-C while packages are imported ends a command, whatever they make of a KeyboardInterrupt."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from mopl._interruption import stopped_while_importing

# Two ways in which packages lose it: one goes on, one makes an error of it.
SLOW = """
import pathlib, time
pathlib.Path("importing").touch()
try:
    time.sleep(30)
except KeyboardInterrupt as error:
    {then}
"""


@pytest.mark.parametrize("then", ["pass", "raise ImportError('cannot load module more than once')"])
def test_a_package_cannot_swallow_it(tmp_path, then):
    (tmp_path / "slow.py").write_text(SLOW.format(then=then))
    code = "from mopl._interruption import stopped_while_importing as s\nwith s():\n    import slow\nprint('went on')"
    environment = {**os.environ, "PYTHONPATH": f"{os.getcwd()}{os.pathsep}{tmp_path}"}
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    deadline = time.monotonic() + 20
    while not (tmp_path / "importing").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=20)
    assert (child.returncode, out, err) == (130, b"", b"mopl: stopped\n")


def test_elsewhere_it_is_a_keyboard_interrupt_and_other_handlers_stay(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises(KeyboardInterrupt), stopped_while_importing():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with stopped_while_importing():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    done = []
    thread = threading.Thread(target=lambda: done.append(list(map(type, [stopped_while_importing().__enter__()]))))
    thread.start()
    thread.join()
    assert done  # in a thread, which may set no handler
