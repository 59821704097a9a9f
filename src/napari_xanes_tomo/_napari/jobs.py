"""Long work beside the GUI: one job at a time, with progress, cancel, and nothing from a job that was given up."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from qtpy.QtCore import QObject, Signal

from napari_xanes_tomo.model import Cancelled, Progress, XanesTomoError

__all__ = ["Jobs", "remaining"]

log = logging.getLogger(__name__)

_REPORT_EVERY_S = 0.05


def remaining(done: int, total: int, seconds: float) -> str:
    """Return how long the rest will take, as text; empty while nothing can be said."""
    if done <= 0 or total <= 0 or seconds < 2:
        return ""
    left = seconds * (total - done) / done
    if left < 60:
        return f"about {max(1, round(left))} s left"
    return f"about {round(left / 60)} min left" if left < 5400 else f"about {left / 3600:.1f} h left"


class _Run:
    """One job: whether it should stop, and what is to be done once its thread is through."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._lock = threading.Lock()
        self._through = False
        self._last_acts: list[Callable[[], None]] = []

    def afterwards(self, act: Callable[[], None]) -> None:
        """Do `act` in the job's thread at its end, or at once when it is through."""
        with self._lock:
            if not self._through:
                self._last_acts.append(act)
                return
        act()

    def through(self) -> None:
        with self._lock:
            self._through = True
            acts, self._last_acts = self._last_acts, []
        for act in acts:
            act()


class Jobs(QObject):
    """Runs one function at a time in a thread of napari's pool.

    Signals arrive on the GUI thread. A job that was abandoned is cancelled, and nothing of it arrives any more.
    """

    started = Signal()
    progressed = Signal(str, int, int, float)  # what, done, total, seconds since the start
    ended = Signal(str, object)  # "done", "failed" or "cancelled"; the result or the message

    _reported = Signal(object, str, int, int)
    _returned = Signal(object, str, object)

    def __init__(self) -> None:
        super().__init__()
        self._running: _Run | None = None
        self._began = 0.0
        self._worker: Any = None  # kept alive while it works
        self._reported.connect(self._on_reported)
        self._returned.connect(self._on_returned)

    @property
    def busy(self) -> bool:
        """Whether a job is running that was not abandoned."""
        return self._running is not None

    def start(self, work: Callable[[Progress], Any]) -> None:
        """Run ``work(progress)``; `progress` raises `Cancelled` once the job is cancelled.

        Raises
        ------
        XanesTomoError
            Another job is running.
        """
        from napari.qt.threading import create_worker

        if self.busy:
            raise XanesTomoError("another step is still running; wait for it or cancel it")
        run = self._running = _Run()
        self._began = time.monotonic()
        reported = 0.0

        def progress(what: str, done: int, total: int) -> None:
            nonlocal reported
            if run.stop.is_set() or worker.abort_requested:
                raise Cancelled
            now = time.monotonic()
            if now - reported > _REPORT_EVERY_S or done >= total:
                reported = now
                with suppress(RuntimeError):  # Qt is gone
                    self._reported.emit(run, what, done, total)

        def work_through() -> None:
            how: str
            value: Any = None
            try:
                how, value = "done", work(progress)
            except Cancelled:
                how = "cancelled"
            except XanesTomoError as error:
                how, value = "failed", str(error)
            except Exception as error:  # the last place before the user, who must not see a traceback
                log.exception("unexpected error in a job")
                text = str(error).partition("\n")[0][:200]
                how, value = "failed", f"unexpected error ({type(error).__name__}: {text}); please report it"
            run.through()
            with suppress(RuntimeError):
                self._returned.emit(run, how, value)

        # napari's own worker: closing the window asks first, and its pool is waited for.
        worker = create_worker(work_through, _start_thread=False)
        self._worker = worker
        worker.start()
        self.started.emit()

    def cancel(self) -> None:
        """Ask the running job to stop at its next safe point; `ended` tells when it has."""
        if self._running is not None:
            self._running.stop.set()

    def abandon(self, afterwards: Callable[[], None] | None = None) -> None:
        """Cancel the running job and let nothing of it arrive; `afterwards` is done once it no longer works."""
        run, self._running, self._worker = self._running, None, None
        if run is not None:
            run.stop.set()
        if afterwards is not None:
            if run is None:
                afterwards()
            else:
                run.afterwards(afterwards)

    def _on_reported(self, run: object, what: str, done: int, total: int) -> None:
        if run is self._running:
            self.progressed.emit(what, done, total, time.monotonic() - self._began)

    def _on_returned(self, run: object, how: str, value: object) -> None:
        if run is self._running:
            self._running = self._worker = None
            self.ended.emit(how, value)
