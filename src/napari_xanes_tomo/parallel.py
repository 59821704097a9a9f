"""Work shared out over the cores of this machine, by one pool of plain threads for the whole process.

Numba kernels, FFTs and file reads release the GIL. Who does which piece never changes a result. The thread that asks
does pieces itself and takes back what no thread of the pool has begun, so work may be shared out from within shared-out
work, and starting threads costs nothing after the first time.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import Any, TypeVar

__all__ = ["cores", "in_threads", "one_blas_thread", "share"]

_T = TypeVar("_T")
_pool: ThreadPoolExecutor | None = None
_blas_lock = Lock()
_blas: list[Any] = []  # the limits in force
_limited = 0  # how many asked for them


def cores() -> int:
    """Return the number of cores this process may use."""
    try:
        return max(1, len(os.sched_getaffinity(0)))
    except AttributeError:  # not on macOS and Windows
        return max(1, os.cpu_count() or 1)


def _forget() -> None:
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):  # threads do not survive a fork
    os.register_at_fork(after_in_child=_forget)


def share(pieces: Iterable[_T], work: Callable[[_T], object], *, threads: int | None = None) -> None:
    """Call ``work(piece)`` for every piece, on as many cores as there are or on `threads` of them.

    When one call raises, no further piece is begun, and the exception is passed on.
    """
    global _pool
    todo = deque(pieces)
    helpers = min(max(1, threads or cores()), len(todo)) - 1
    if helpers < 1:
        for piece in todo:
            work(piece)
        return

    def run() -> None:
        try:
            while True:
                try:
                    piece = todo.popleft()
                except IndexError:
                    return
                work(piece)
        except BaseException:
            todo.clear()
            raise

    if _pool is None:
        _pool = ThreadPoolExecutor(max(8, cores()), thread_name_prefix="xanes-tomo")
    jobs = [_pool.submit(run) for _ in range(helpers)]
    try:
        run()
    finally:
        begun = [job for job in jobs if not job.cancel()]
        failed = [error for job in begun if (error := job.exception()) is not None]
    if failed:
        raise failed[0]


def in_threads(n: int, work: Callable[[int, int], object], *, threads: int | None = None) -> None:
    """Call ``work(first, end)`` for pieces that make up ``range(n)``, several pieces a core."""
    piece = max(1, -(-n // (4 * max(1, threads or cores()))))
    share([(a, min(a + piece, n)) for a in range(0, n, piece)], lambda bounds: work(*bounds), threads=threads)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Keep BLAS from starting threads of its own, until the last of those who asked for it is done.

    Beside threads that already share the work, and for matrices of a few hundred rows, they get in each other's way by
    far more than they help; and the last digits of a product depend on how many there are.
    """
    from threadpoolctl import threadpool_limits

    global _limited
    with _blas_lock:
        # Every time, since a library that was loaded since then brings a BLAS of its own.
        _blas.append(threadpool_limits(1, user_api="blas"))
        _limited += 1
    try:
        yield
    finally:
        with _blas_lock:
            _limited -= 1
            # Whoever is last lifts the limits, the first one last: it alone knows what there was before.
            while _blas and not _limited:
                _blas.pop().restore_original_limits()
