"""What calls of one model in several threads share, and what each of them has of its own.

A model may be called from several threads at once, as servers do. A switch of the model (`train()`, PEFT's
`disable_adapter`, `at` and `reference` of mopl's models) holds for all of them until it is switched back; what a call
changes for its own time must not be seen by another one.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

Method = TypeVar("Method", bound=Callable[..., Any])


class Turns:
    """Holds the lock under which calls change a model; a copy or a pickle has a lock of its own.

    Attributes:
        lock: Entered by `with` itself: a method around it could be interrupted between the lock and the block.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def __reduce__(self) -> tuple[type[Turns], tuple[()]]:
        return Turns, ()

    @contextlib.contextmanager
    def switched(self, *switches: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
        """Enter contexts, and leave them after the `with` block, while no call is under way."""
        with contextlib.ExitStack() as held:
            with self.lock:
                for switch in switches:
                    held.enter_context(switch)
            try:
                yield
            finally:
                with self.lock:
                    held.close()


def in_turn(method: Method) -> Method:
    """Make calls of a method wait for other calls in the same object's `_turns`; a call in a call does not wait."""

    @functools.wraps(method)
    def taking_turns(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a compiler cannot trace a lock
            return method(self, *args, **kwargs)
        with self._turns.lock:
            return method(self, *args, **kwargs)

    return taking_turns  # type: ignore[return-value]


class CallOfThread(threading.local):
    """The mixture of the call that this thread is in; a copy or a pickle has none."""

    coefficients: Tensor | None = None  # (sets,) or (B, sets), or None outside of a call
    rows: int | None = None  # B, where beams and samples do not make the batch larger

    def __reduce__(self) -> tuple[type[CallOfThread], tuple[()]]:
        return CallOfThread, ()
