"""One call beside the rest: what comes next is begun while the present is computed, and stopped when nobody wants it.

The cores have little to do while a step reads files or does what only one core can do; another call fills these gaps.
Whatever is called twice at a time must not depend on it: work is shared out by `parallel`, kernels keep nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Event, Thread
from typing import Generic, TypeVar

from .model import Cancelled, Progress, no_progress

__all__ = ["Ahead"]

_T = TypeVar("_T")
_WAKE_S = 0.05  # how often a waiting run is told the progress, and asked whether it is cancelled


class Ahead(Generic[_T]):
    """A call in a thread of its own, begun at once.

    Parameters
    ----------
    work : callable
        Is given a `Progress`, which raises `Cancelled` once the call is to stop.
    """

    def __init__(self, work: Callable[[Progress], _T]) -> None:
        self._stop, self._done = Event(), Event()
        self._reported: tuple[str, int, int] | None = None
        self._answer: list[_T] = []
        self._error: BaseException | None = None

        def report(what: str, done: int, total: int) -> None:
            if self._stop.is_set():
                raise Cancelled
            self._reported = (what, done, total)

        def run() -> None:
            try:
                self._answer.append(work(report))
            except BaseException as error:  # noqa: BLE001  (whoever asks for the result gets it)
                self._error = error
            finally:
                self._done.set()

        self._thread = Thread(target=run, name="xanes-tomo-ahead", daemon=True)
        self._thread.start()

    def result(self, progress: Progress = no_progress) -> _T:
        """Wait for the answer, or raise what the call raised.

        `progress` is told how far it is; what it raises stops the call, and is passed on once it has stopped.
        """
        try:
            while not self._done.wait(_WAKE_S):
                if self._reported is not None:
                    progress(*self._reported)
        except BaseException:
            self.stop()
            raise
        self._thread.join()
        if self._error is not None:
            raise self._error
        if self._reported is not None:
            progress(*self._reported)
        return self._answer[0]

    def stop(self) -> None:
        """Stop the call at its next safe point, wait until it has, and forget what it found."""
        self._stop.set()
        self._thread.join()
