"""The queue: rows that wait are answered together, each at a trade-off of its own, by one thread.

One thread calls the model, so nothing about it has to be safe for several. Rows are taken in the order in which they
came, as many as go together; a row that comes while others are answered waits until these have ended. Whoever asks is
in other threads, such as that of an event loop, and gets the pieces through the row's `send`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from mopl.serving.model import ServedModel
from mopl.serving.rows import Row
from mopl.serving.sampling import Chooser, Watcher

GATHER_SECONDS = 0.02  # that an idle engine waits for others to come along: little beside an answer


class QueueFull(Exception):
    """So many rows wait that no more are taken."""


class Stopping(Exception):
    """The server is being stopped."""


class Replaced(Exception):
    """Another model is served than the one that was asked."""


class Engine:
    """Answers rows, in a thread of its own from `start` to the end of what is there after `close`.

    Args:
        served: The model.
        max_batch: Most rows that are answered together.
        max_batch_tokens: Most tokens of them, with what their answers may have and the padding; a row alone may have
            more.
        max_queue: Most rows that wait.
    """

    def __init__(
        self, served: ServedModel, *, max_batch: int = 16, max_batch_tokens: int = 65_536, max_queue: int = 256
    ) -> None:
        self.served, self.max_queue, self.max_batch_tokens = served, max_queue, max_batch_tokens
        self._most, self.max_batch = max_batch, served.most_rows(max_batch)
        self._changes: list[tuple[Callable[[], ServedModel], Future[None]]] = []
        self._changed = threading.Condition()
        self._waiting: list[Row] = []
        self._running: list[Row] = []
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="mopl serve", daemon=True)

    @property
    def waiting(self) -> int:
        """How many rows wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many rows are being answered."""
        return len(self._running)

    @property
    def alive(self) -> bool:
        """Whether rows are answered: not before `start`, and not after the thread's end, whatever ended it."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def submit(self, rows: Sequence[Row], served: ServedModel | None = None) -> None:
        """Put the rows of a request into the queue: all or none.

        Args:
            rows: The rows, whose `send` gets the pieces.
            served: The model that they were made for; None for the present one.

        Raises:
            QueueFull: If they do not fit.
            Replaced: If another model is served by now.
            Stopping: If the engine was not started, was closed, or its thread has ended.
        """
        with self._changed:
            if self._closed:
                raise Stopping("the server is being stopped")
            if not self.alive:
                raise Stopping("the server cannot answer any more; start it again")
            if served is not None and served is not self.served:
                raise Replaced("another model was loaded meanwhile")
            if len(self._waiting) + len(rows) > self.max_queue:
                raise QueueFull(f"{len(self._waiting)} answers are waited for, of at most {self.max_queue}")
            self._waiting += rows
            self._changed.notify()

    def cancel(self, rows: Sequence[Row]) -> None:
        """Forget rows that nobody waits for; those that are being answered end with their next token.

        Args:
            rows: Rows that were submitted.
        """
        with self._changed:
            for row in rows:
                row.cancelled = True
            self._waiting = [row for row in self._waiting if not row.cancelled]

    def replace(self, make: Callable[[], ServedModel]) -> Future[None]:
        """Serve another model, once what is being answered has ended; rows that wait for the old one fail.

        Args:
            make: Makes it, in the thread that answers. Where that fails, the old one is served on.

        Returns:
            What is done when it is served, or has the error of `make`.

        Raises:
            Stopping: As of `submit`.
        """
        done: Future[None] = Future()
        with self._changed:
            if self._closed or not self.alive:
                raise Stopping("the server is being stopped")
            self._changes.append((make, done))
            self._changed.notify()
        return done

    def close(self) -> None:
        """Take no more rows; those that are here are answered, and then the thread ends."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def abort(self) -> None:
        """Take no more rows, and give up those that are here."""
        self.close()
        with self._changed:
            rows = [*self._waiting, *self._running]
        self.cancel(rows)
        for row in rows:
            row.fail(Stopping("the server was stopped before the answer had ended"))

    def join(self, timeout: float | None = None) -> bool:
        """Wait until a closed engine has ended; return whether it has.

        Args:
            timeout: Most seconds to wait; None for no bound.
        """
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # ---------------------------------------------------------------- the thread

    def _run(self) -> None:
        while self._wait():
            self._replace()
            with self._changed:
                self._running = self._take()
            try:
                if self._running:
                    self._answer(self._running)
            finally:
                self._running = []

    def _wait(self) -> bool:
        """Wait for rows; return False when there will be none."""
        with self._changed:
            idle = not self._waiting
            while not self._waiting and not self._changes:
                if self._closed:
                    return False
                self._changed.wait()
        if idle and self._waiting:
            time.sleep(GATHER_SECONDS)
        return True

    def _replace(self) -> None:
        """Make the changes that were asked for."""
        with self._changed:
            changes, self._changes = self._changes, []
        for make, done in changes:
            if not done.set_running_or_notify_cancel():
                continue
            try:
                served = make()
            except BaseException as failed:  # the thread goes on, as after an answer that failed
                done.set_exception(failed)
                continue
            with self._changed:
                self.served, self.max_batch = served, served.most_rows(self._most)
                late, self._waiting = self._waiting, []
            for row in late:
                row.fail(Replaced("another model was loaded before the answer began"))
            done.set_result(None)

    def _take(self) -> list[Row]:
        """Take the oldest row out of the queue, and those that can be answered with it."""
        taken: list[Row] = []
        for row in self._waiting:
            if len(taken) < self.max_batch and (not taken or self._goes_with(row, taken)):
                taken.append(row)
        self._waiting = [row for row in self._waiting if row not in taken]
        return taken

    def _goes_with(self, row: Row, others: Sequence[Row]) -> bool:
        if self.served.group(row) != self.served.group(others[0]):
            return False
        # All are padded to the longest prompt and may run as long as the one that may run longest.
        rows, most = [row, *others], self.served.positions
        length = max(r.positions for r in rows) + max(r.max_tokens for r in rows)
        return length * len(rows) <= self.max_batch_tokens and (most is None or length <= most)

    def _answer(self, rows: list[Row]) -> None:
        try:
            self.served.generate(rows, Chooser(rows), Watcher(rows))
        # Whatever it is (a panic of the tokenizers' Rust is no Exception), the thread goes on.
        except BaseException as error:
            left = [row for row in rows if not row.ended and not row.cancelled]
            if len(rows) > 1:  # one may be to blame, and its error is not for the others to read
                for row in left:
                    self._answer([row])
                return
            logging.getLogger("mopl").error("an answer failed: %s: %s", type(error).__name__, error)
            for row in left:
                row.fail(error)
        for row in rows:
            if not row.cancelled:
                row.fail(RuntimeError("the generation ended before the answer had"))
