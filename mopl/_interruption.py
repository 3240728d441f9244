"""Ctrl-C while a command loads its packages: some of them swallow it, or turn it into an error of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def stopped_while_importing() -> Iterator[None]:
    """End the process with a word and status 130 if Ctrl-C comes while a module is imported; else as Python does.

    Nothing is lost then: files appear whole or not at all, and the system lets go of locks. A training has a handler of
    its own. Where Ctrl-C is ignored, as in a background job of a shell, or handled otherwise, nothing changes.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop(number: int, frame: FrameType | None) -> None:
    place = frame
    while place is not None:
        if place.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"mopl: stopped\n")
            os._exit(130)
        place = place.f_back
    signal.default_int_handler(number, frame)
