"""What calls of one model in several threads share, and what each thread has of its own.

A model may be called from several threads at once, as servers do. What stays after a call or is in force for a `with`
block (`train()`, PEFT's `disable_adapter`, `at` and `reference` of mopl's models) is the model's and holds for all of
them; what belongs to one call does not.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

Method = TypeVar("Method", bound=Callable[..., Any])


class Turns:
    """A lock under which a call changes a model for its time, entered by `with`; a copy or a pickle has a new one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: Any) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Turns], tuple[()]]:
        return Turns, ()


def in_turn(method: Method) -> Method:
    """Make calls of a method wait for calls of others in the same object's `_turns`; a call in a call does not wait."""

    @functools.wraps(method)
    def taking_turns(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._turns:
            return method(self, *args, **kwargs)

    return taking_turns  # type: ignore[return-value]


class CallOfThread(threading.local):
    """The mixture of the call that this thread is in; a copy or a pickle has none.

    Attributes:
        coefficients: (sets,) or (B, sets), or None outside of a call.
        rows: B, where beams and samples do not make the batch larger.
    """

    coefficients: Tensor | None = None
    rows: int | None = None

    def __reduce__(self) -> tuple[type[CallOfThread], tuple[()]]:
        return CallOfThread, ()
