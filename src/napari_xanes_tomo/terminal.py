"""What a command shows on a terminal: an error in one line, progress with the time left, warnings between them."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .model import Cancelled, XanesTomoError

if TYPE_CHECKING:
    from types import FrameType, TracebackType

    from rich.progress import TaskID

__all__ = [
    "FAILED",
    "STOPPED_BY_USER",
    "Show",
    "complain",
    "duration",
    "explain",
    "keeping_partial",
    "one_line",
    "showing",
]

FAILED, STOPPED_BY_USER = 1, 130
_PLAIN_SECONDS = 10.0  # between two lines of progress where there is no terminal


# ------------------------------------------------------------------------------------------------------- errors


def complain(message: str) -> None:
    """Write one line on stderr."""
    typer.echo(f"xanes-tomo: {' '.join(message.split())}", err=True)


def explain(error: BaseException, verbose: bool) -> str:
    """Return the one line that says what went wrong; with `verbose` the traceback goes before it."""
    if verbose:
        typer.echo("".join(traceback.format_exception(error)), err=True, nl=False)
    if isinstance(error, XanesTomoError):
        return str(error)
    if isinstance(error, MemoryError):
        return "not enough memory; try a smaller --memory, or --bin 2"
    if isinstance(error, OSError):
        name = Path(os.fsdecode(error.filename)).name + ": " if isinstance(error.filename, (str, bytes)) else ""
        return f"{name}{error.strerror or error}"
    hint = "" if verbose else "; -v shows where"
    return f"unexpected {type(error).__name__}: {error}{hint}"


@contextlib.contextmanager
def one_line(verbose: bool = False, interrupted: str = "stopped") -> Iterator[None]:
    """Turn whatever ends a command early into one line on stderr and an exit code."""
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except (KeyboardInterrupt, Cancelled):
        complain(interrupted)
        raise typer.Exit(STOPPED_BY_USER) from None
    except BrokenPipeError:  # `... | head`: nobody listens any more
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(FAILED) from None
    except Exception as error:  # noqa: BLE001 - the last one on the way out; nothing is hidden, -v shows all of it
        complain(explain(error, verbose))
        raise typer.Exit(FAILED) from None


# ----------------------------------------------------------------------------------------------------- progress


def duration(seconds: float) -> str:
    """Return a time in words: seconds, minutes, hours."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    return f"{s // 60} min {s % 60:02d} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60:02d} min"


_DOING = {
    "reading headers": "reading headers",
    "flats": "scan and flats",
    "jitter": "jitter correction",
    "registration": "energy registration",
    "maps": "elemental maps",
    "twin": "digital twin",
    "export": "export",
}


class Show:
    """Progress with the time left: bars on a terminal, else one plain line every ten seconds. Safe for threads."""

    def __init__(self, interval: float = _PLAIN_SECONDS) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)
        self.interval = interval
        self._lock = threading.Lock()
        self._tasks: dict[str, TaskID] = {}
        self._bars: Any = None
        self._begun: dict[str, tuple[float, float]] = {}
        self._last = time.monotonic()
        self._at = ""
        self._stopping = False

    def stop(self) -> bool:
        """Ask what runs to stop at its next safe point; False where it has none soon, or was asked before."""
        soon = self._at == "jitter" and not self._stopping
        self._stopping = self._stopping or soon
        return soon

    def __enter__(self) -> Show:
        if self.console.is_terminal:
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            self._bars = Progress(
                TextColumn("{task.description:20s}", markup=False),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=self.console,
            )
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            for task in self._bars.tasks if kind is None else ():
                self._bars.update(task.id, completed=task.total)  # a step need not report its very end
            self._bars.stop()

    def line(self, text: str) -> None:
        """Write one line above the bars."""
        with self._lock:
            if self._bars is not None:
                self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                typer.echo(text, err=True)

    def __call__(self, what: str, done: int, total: int) -> None:
        """See `model.Progress`."""
        self._at = what
        if self._stopping:
            raise Cancelled
        name = _DOING.get(what, what)
        with self._lock:
            if self._bars is not None:
                if what not in self._tasks:
                    self._tasks[what] = self._bars.add_task(name, total=total)
                self._bars.update(self._tasks[what], completed=done, total=total)
                return
            now = time.monotonic()
            since, first = self._begun.setdefault(what, (now, done / max(total, 1)))
            if now - self._last < self.interval:
                return
            self._last = now
            part = done / max(total, 1)
            text = f"{name}: {100 * part:.0f} %"
            # Not from the first moments: they are spent on compiling.
            if first < part < 1 and (part - first >= 0.05 or now - since > 120):
                text += f", about {duration((now - since) * (1 - part) / (part - first))} left"
            typer.echo(text, err=True)


@contextlib.contextmanager
def keeping_partial(show: Show) -> Iterator[None]:
    """Let Ctrl-C during a search keep its best estimate so far; a second one, or at other times, stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if not show.stop():
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Notes(logging.Handler):
    """The package's own warnings as lines between the progress."""

    def __init__(self, show: Show) -> None:
        super().__init__()
        self.show = show

    def emit(self, record: logging.LogRecord) -> None:
        self.show.line(f"{record.levelname.lower()}: {record.getMessage()}")


@contextlib.contextmanager
def showing(verbose: bool) -> Iterator[Show]:
    """Show progress, and what the package logs from warnings on (from debugging on with `verbose`)."""
    logger = logging.getLogger(__package__)
    level, propagate = logger.level, logger.propagate
    with Show() as show:
        handler = _Notes(show)
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG if verbose else logging.WARNING)
        logger.propagate = False
        try:
            yield show
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate
