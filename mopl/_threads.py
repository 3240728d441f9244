"""What calls of one model in several threads share, and what each of them has of its own.

A model may be called from several threads at once, as servers do. A switch of the model (`train()`, PEFT's
`disable_adapter`, `at` and `reference` of mopl's models) holds for all of them until it is switched back; what a call
changes for its own time must not be seen by another one. Such blocks nest in one thread. Those of several threads may
overlap, in any order, but only if they want the same: the last one to end switches back.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Method = TypeVar("Method", bound=Callable[..., Any])


class _Block(NamedTuple):
    thread: int
    wanted: Any  # what the model is inside of it
    switches: Callable[[], Iterable[contextlib.AbstractContextManager[Any]]]


class Turns:
    """Holds the lock under which calls change a model, and the blocks that switch it; a copy or a pickle has its own.

    Attributes:
        lock: Entered by `with` itself: a method around it could be interrupted between the lock and the block.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._blocks: list[_Block] = []  # those that have not ended
        self._on = contextlib.ExitStack()  # what the last of them switched

    def __reduce__(self) -> tuple[type[Turns], tuple[()]]:
        return Turns, ()

    @contextlib.contextmanager
    def switched(
        self, wanted: Any, switches: Callable[[], Iterable[contextlib.AbstractContextManager[Any]]]
    ) -> Iterator[None]:
        """Switch a model inside a `with` block, to and fro while no call is under way.

        A block around it is switched off meanwhile, and the last one that is left is on when this one ends.

        Args:
            wanted: What the model is to be, compared by `==`: nothing is switched where it is that already.
            switches: Returns the contexts that make it so; called with no other block's switched on.

        Raises:
            RuntimeError: If a block of another thread wants something else.
        """
        block = _Block(threading.get_ident(), wanted, switches)
        try:
            with self.lock:
                if any(other.thread != block.thread and other.wanted != wanted for other in self._blocks):
                    raise RuntimeError(
                        "another thread is inside `at` or `reference` of this model, which hold for all threads, and "
                        "wants something else; wait until it has left, or give each thread a copy of the model"
                    )
                self._change([*self._blocks, block])
            yield
        finally:
            with self.lock:
                self._change([other for other in self._blocks if other is not block])

    def _change(self, blocks: list[_Block]) -> None:
        before, self._blocks = self._blocks, blocks
        if [block.wanted for block in before[-1:]] == [block.wanted for block in blocks[-1:]]:
            return
        self._on.close()
        with contextlib.ExitStack() as entered:
            for switch in blocks[-1].switches() if blocks else ():
                entered.enter_context(switch)
            self._on = entered.pop_all()


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
    rows: int | None = None  # B of the forward pass under way, beams and samples counted
    tokens: int | None = None  # B T of it
    sequence: Tensor | None = None  # (N,), in a packed row the number of each token's sequence
    _made: dict[Any, Any] | None = None  # what `once` has made of them

    def __reduce__(self) -> tuple[type[CallOfThread], tuple[()]]:
        return CallOfThread, ()

    @property
    def held(self) -> tuple[Any, ...]:
        """All that it is conditioned on, and the size of the forward pass."""
        return self.conditions, self.rows, self.tokens, self.sequence

    @held.setter
    def held(self, held: tuple[Any, ...]) -> None:
        self.conditions, self.rows, self.tokens, self.sequence = held
        self._made = {}

    def once(self, of: Any, hidden: Tensor, make: Callable[[], T]) -> T:
        """Return what `make` makes of the conditions for hidden states of a shape, made once for all layers of a call.

        A model with adapters has hundreds of layers, and each would move the same numbers to the GPU. Those that a
        gradient is asked for are made each time: a layer that is computed again must record what it recorded first.
        """
        given = (self.conditions or {}).values()
        alone = torch.is_grad_enabled() and any(values.requires_grad for values in given)
        if self._made is None or alone or _measuring.on or torch.compiler.is_compiling():
            return make()
        key = (of, self.rows, self.tokens, hidden.shape[:-1], hidden.device, hidden.dtype)
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

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
        # All tokens of all rows one after another are fine; some of them could be any row's.
        wanted = self.rows if hidden.ndim > 2 else self.tokens
        if rest or self.sequence is not None or len(hidden) != (wanted or len(hidden)):
            raise ValueError(
                f"weights has {len(values)} rows but a layer sees ({', '.join(map(str, hidden.shape[:-1]))}, ...); "
                "pass one weight vector (m,)"
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
