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
    """What the call is conditioned on that this thread is in; a copy or a pickle has none."""

    conditions: dict[str, Tensor] | None = (
        None  # by name (k,) or (B, k); empty for the reference, None outside of a call
    )
    rows: int | None = None  # B, where beams and samples do not make the batch larger
    sequence: Tensor | None = None  # (N,), in a packed row the number of each token's sequence

    def __reduce__(self) -> tuple[type[CallOfThread], tuple[()]]:
        return CallOfThread, ()

    def for_rows(self, hidden: Tensor) -> dict[str, Tensor] | None:
        """Return the conditions of what a module gets or gives, (B, T, d) or of all tokens of all rows (B T, d).

        Each is (k,), or (B, 1, k), or (1, N, k) of packed sequences; None where `hidden` is not to be conditioned.
        """
        if _measuring.on:
            return None
        if self.conditions is None:
            raise RuntimeError(
                "the modules inside have no coefficients or weights: call the model that takes weights and not the one "
                "inside it, and turn gradient checkpointing on through its own gradient_checkpointing_enable()"
            )
        return {name: self._spread(values.to(hidden.device), hidden) for name, values in self.conditions.items()}

    def _spread(self, values: Tensor, hidden: Tensor) -> Tensor:
        if values.ndim == 1:
            return values
        if self.sequence is not None and hidden.shape[:-1].numel() == len(self.sequence):
            return values[self.sequence.to(values.device)].view(*hidden.shape[:-1], -1)
        copies, rest = divmod(len(hidden), len(values))
        # Tokens of all rows one after another are fine; anything else in the first place is no row.
        if rest or self.sequence is not None or (hidden.ndim > 2 and len(hidden) != (self.rows or len(hidden))):
            raise ValueError(
                f"weights has {len(values)} rows but a layer sees {tuple(hidden.shape)}; pass one weight vector (m,)"
            )
        # Beams, and several samples of a row, follow one another.
        return values.repeat_interleave(copies, 0).view(-1, *[1] * (hidden.ndim - 2), values.shape[-1])


class _Measuring(threading.local):
    on = False


_measuring = _Measuring()


@contextlib.contextmanager
def measuring() -> Iterator[None]:
    """Run a model inside a `with` block to learn about the model: on rows that no condition is meant for."""
    before, _measuring.on = _measuring.on, True
    try:
        yield
    finally:
        _measuring.on = before
