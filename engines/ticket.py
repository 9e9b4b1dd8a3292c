"""A request on its way through a batcher, and what the one who asked holds of it."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from threading import Event

from .errors import EngineError, RequestTimeout
from .request import Request
from .results import GenerationResult

__all__ = ["Job", "Outcome", "Ticket"]

Outcome = GenerationResult | EngineError


class Job:
    """The batcher's side. One worker at a time has it; ``stop`` may be set by anyone.

    Attributes:
        began: ``time.perf_counter()`` at submission; deadline: when its time is over, or None.
        slot: that it has been given.
        stop: the error that it is to end with at the next step.
    """

    def __init__(self, request: Request, *, began: float, timeout: float | None, on_event: Callable[[str | Outcome], None] | None) -> None:
        self.request = request
        self.began = began
        self.deadline = None if timeout is None else began + timeout
        self.slot: int | None = None
        self.stop: EngineError | None = None
        self.pieces: SimpleQueue[str | None] = SimpleQueue()  # None is the end
        self.ended = Event()
        self.outcome: Outcome | None = None
        self._timeout, self._on_event = timeout, on_event

    def over(self) -> EngineError | None:
        """Why the request is not to be worked on any further."""
        if self.stop is None and self.deadline is not None and time.perf_counter() >= self.deadline:
            self.stop = RequestTimeout(f"not answered within {self._timeout:g} s; ask for less, allow more time, or try when there is less to do")
        return self.stop

    def deliver(self, piece: str) -> None:
        """A piece of the answer."""
        if piece:
            self.pieces.put(piece)
            self._tell(piece)

    def end(self, outcome: Outcome) -> None:
        """The last event."""
        self.outcome = outcome
        self.ended.set()
        self.pieces.put(None)
        self._tell(outcome)

    def _tell(self, event: str | Outcome) -> None:
        if self._on_event is not None:
            try:
                self._on_event(event)
            except BaseException as error:  # somebody else's code, which may even call sys.exit; the worker has other requests
                self._on_event = None
                self.stop = self.stop or EngineError(f"on_event raised {type(error).__name__}: {error}")


class Ticket:
    """An answer to come. Iterating gives pieces of text as they appear, :meth:`result` the whole.

    A ticket that is dropped is cancelled, and so is one whose ``with`` block ends before the answer does.
    """

    def __init__(self, job: Job, cancel: Callable[[Job], None]) -> None:
        self._job = job
        self._cancel = weakref.finalize(self, cancel, job)
        self._cancel.atexit = False

    def __iter__(self) -> Iterator[str]:
        while (piece := self._job.pieces.get()) is not None:
            yield piece
        self._job.pieces.put(None)  # so that iterating once more ends as well
        self.result()

    def result(self, timeout: float | None = None) -> GenerationResult:
        """Wait for the whole answer.

        Raises:
            EngineError: the request failed; RequestTimeout, RequestCancelled, ShuttingDown where that is why.
            TimeoutError: not ended after ``timeout`` seconds of waiting here; the request goes on.
        """
        if not self._job.ended.wait(timeout):
            raise TimeoutError(f"no answer after {timeout} s")
        if isinstance(self._job.outcome, GenerationResult):
            return self._job.outcome
        assert self._job.outcome is not None
        raise self._job.outcome

    def cancel(self) -> None:
        """Stop answering; the slot is free at the next step. Does nothing where the answer has ended."""
        self._cancel()

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()
