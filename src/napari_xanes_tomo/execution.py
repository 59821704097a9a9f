"""Where slabs are made: on the threads of this machine, or on the workers of a dask cluster.

The same dask graph - one task a slab - runs on both. A task opens what it needs itself and puts its result on disk, so
nothing large travels and a worker that dies costs the slab it was at.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import pickle
import queue
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Protocol

from .model import XanesTomoError
from .parallel import one_blas_thread

__all__ = ["WAITING", "Cluster", "Execution", "Threads", "from_options"]

Work = Callable[[Any, Any, int], Any]
"""``work(shared, job, threads)``: an importable function; `threads` is what one job may use."""

WAITING: Final = object()
"""Yielded from time to time while nothing is finished, so that a caller can show that and stop."""

_RETRIES = 3  # a job lost with its worker is tried again
_PATIENCE = 1.0  # s between two looks at the cluster
_CONNECT = "10s"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_MMAP_BYTES = 32 << 20  # what the allocator of glibc comes to by itself; twice that is its threshold to trim


class Execution(Protocol):
    """Runs independent jobs and says when each one is finished."""

    def workers(self, jobs: int, bytes_per_job: int, memory_bytes: int) -> int:
        """Return how many jobs run at a time."""

    def run(self, work: Work, shared: Any, jobs: Sequence[Any], workers: int) -> Generator[Any, None, None]:
        """Do every job; yield each one's result as it is finished, or `WAITING` meanwhile.

        Closing the iterator drops what has not begun.
        """


@contextmanager
def _memory_kept() -> Iterator[None]:
    """Let this process keep what a job frees until the job ends, where its allocator is that of glibc.

    The nanny of a dask worker sets ``MALLOC_TRIM_THRESHOLD_`` so low that every array of a slab is fresh from the
    system, zeroed page by page: the same slab then takes twice the time. Afterwards everything is given back.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt, trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
    mallopt(_M_TRIM_THRESHOLD, 2 * _MMAP_BYTES)
    try:
        yield
    finally:
        trim(0)


@dataclass(frozen=True)
class Threads:
    """The threads of this machine, by dask's threaded scheduler.

    Attributes
    ----------
    count : int
        All cores unless given.
    """

    count: int = field(default_factory=lambda: os.cpu_count() or 1)

    def workers(self, jobs: int, bytes_per_job: int, memory_bytes: int) -> int:
        """As many as there are threads, jobs and memory."""
        return max(1, min(self.count, jobs, memory_bytes // max(bytes_per_job, 1)))

    def run(self, work: Work, shared: Any, jobs: Sequence[Any], workers: int) -> Generator[Any, None, None]:
        """Do every job; see `Execution`."""
        from concurrent.futures import ThreadPoolExecutor

        base, delayed = import_module("dask.base"), import_module("dask.delayed")

        inner = max(1, self.count // workers)
        waiting = list(jobs)
        with ThreadPoolExecutor(workers) as pool, one_blas_thread():
            while waiting:
                # A batch at a time, so that a caller who stops is heard between two batches.
                batch, waiting = waiting[:workers], waiting[workers:]
                tasks = [delayed.delayed(work, pure=False)(shared, job, inner) for job in batch]
                yield from base.compute(*tasks, scheduler="threads", pool=pool, traverse=False)


@dataclass(frozen=True)
class Cluster:
    """The workers of a ``dask.distributed`` scheduler, which may come and go.

    Attributes
    ----------
    address : str
        Of the scheduler, e.g. ``tcp://host:8786``.
    queue : mapping, optional
        Instead of an address: what to ask a batch system for, see `from_options`.
    """

    address: str = ""
    queue: Mapping[str, Any] = field(default_factory=dict)

    def workers(self, jobs: int, bytes_per_job: int, memory_bytes: int) -> int:
        """Leave it to the scheduler."""
        return jobs

    def check(self) -> None:
        """Refuse a cluster that cannot be had, before hours of other work; workers may still come later.

        Raises
        ------
        XanesTomoError
            A package is missing, there is no scheduler at the address, or the batch system is not known.
        """
        if self.queue:
            self._batch_system()
            _distributed()
            return
        with _quiet(), self._client(_distributed(), self.address):
            pass

    def run(self, work: Work, shared: Any, jobs: Sequence[Any], workers: int) -> Generator[Any, None, None]:
        """Do every job; see `Execution`."""
        distributed = _distributed()
        with self._cluster() as where, _quiet(), self._client(distributed, where) as client:
            if not client.nthreads() and not self.queue:
                raise XanesTomoError(
                    f"scheduler {self.address}: it has no workers; start some (dask worker {self.address}) and "
                    "give the same command again"
                )
            yield from _spread(client, distributed, work, shared, jobs)

    def _client(self, distributed: Any, where: Any) -> Any:
        try:
            return distributed.Client(where, timeout=_CONNECT, set_as_default=False)
        except (OSError, TimeoutError, ValueError) as error:
            raise XanesTomoError(
                f"scheduler: expected a dask scheduler at {self.address or 'the cluster'}, found none "
                f"({type(error).__name__}); start one, or leave --scheduler out"
            ) from None

    def _batch_system(self) -> Any:
        """Return the class of dask-jobqueue that is asked for."""
        try:
            dask_jobqueue: Any = import_module("dask_jobqueue")
        except ImportError:
            raise XanesTomoError(
                "--cluster needs the package dask-jobqueue, which is not installed; "
                "pip install napari-xanes-tomo[cluster]"
            ) from None
        kind = str(self.queue.get("kind", "slurm"))
        known = {"slurm": "SLURMCluster", "pbs": "PBSCluster", "sge": "SGECluster", "lsf": "LSFCluster"}
        if kind not in known:
            raise XanesTomoError(f"cluster: kind: expected one of {', '.join(known)}, got {kind!r}")
        return getattr(dask_jobqueue, known[kind])

    @contextmanager
    def _cluster(self) -> Iterator[Any]:
        if not self.queue:
            yield self.address
            return
        batch_system = self._batch_system()
        options = dict(self.queue)
        kind, jobs = options.pop("kind", "slurm"), int(options.pop("jobs", 1))
        try:
            cluster = batch_system(**options)
        except (TypeError, ValueError, OSError) as error:
            raise XanesTomoError(f"cluster: {kind} does not take these options ({error})") from None
        with cluster:
            cluster.scale(jobs=jobs)
            yield cluster


def _distributed() -> Any:
    try:
        return import_module("distributed")
    except ImportError:
        raise XanesTomoError(
            "a cluster needs the package distributed, which is not there; pip install napari-xanes-tomo[cluster]"
        ) from None


def _spread(client: Any, distributed: Any, work: Work, shared: Any, jobs: Sequence[Any]) -> Generator[Any, None, None]:
    """Give the jobs to the workers and yield what comes back."""
    # A task, not scattered data: what was scattered is lost with the worker that has it, a task is done again.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sending large graph", UserWarning)
        everywhere = client.submit(pickle.loads, pickle.dumps(shared), pure=False, retries=_RETRIES)
        futures = [client.submit(_on_worker, work, everywhere, job, pure=False, retries=_RETRIES) for job in jobs]
    finished: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for future in futures:
        future.add_done_callback(finished.put)
    try:
        for _ in jobs:
            while True:
                try:
                    future = finished.get(timeout=_PATIENCE)
                    break
                except queue.Empty:
                    if client.status not in ("running", "connecting"):
                        raise _lost() from None
                    yield WAITING
            yield _outcome(future, distributed)
    finally:
        with contextlib.suppress(OSError, TimeoutError, distributed.CancelledError):
            client.cancel([*futures, everywhere])


def _on_worker(work: Work, shared: Any, job: Any) -> Any:
    """Run one job on a worker; it has as many jobs at a time as threads, so that each may use one."""
    from distributed import get_worker

    try:
        with one_blas_thread(), _memory_kept():
            return work(shared, job, 1)
    except Exception as error:  # told where the work was asked for, with the worker's name
        what = str(error) if isinstance(error, XanesTomoError) else f"{type(error).__name__}: {error}"
        raise XanesTomoError(f"worker {get_worker().address}: {' '.join(what.split())}") from error


def _outcome(future: Any, distributed: Any) -> Any:
    try:
        return future.result()
    except XanesTomoError as error:
        raise XanesTomoError(
            f"{error}; every worker needs the input and the output under the same path; the same command goes on "
            "from here"
        ) from None
    except distributed.KilledWorker:
        raise XanesTomoError(
            "cluster: a slab was lost with its worker again and again; the workers may be short of memory, "
            "see their logs; the same command goes on from here"
        ) from None
    except (distributed.CancelledError, OSError):
        raise _lost() from None
    except Exception as error:  # noqa: BLE001 - whatever a worker could not even begin with, such as a package it lacks
        raise XanesTomoError(
            f"cluster: a worker could not do its part ({type(error).__name__}: {error}); it needs the same version of "
            "napari-xanes-tomo as this machine"
        ) from None


def _lost() -> XanesTomoError:
    return XanesTomoError("cluster: the scheduler is gone; start it again, the same command goes on from here")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep distributed from writing tracebacks to the terminal; what matters comes as an error of ours."""
    logger = logging.getLogger("distributed")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def from_options(scheduler: str | None, cluster: str | Path | None, threads: int | None = None) -> Execution:
    """Return the execution that the command line asks for.

    Parameters
    ----------
    scheduler : str, optional
        Address of a running dask scheduler.
    cluster : path, optional
        YAML file with options of a dask-jobqueue cluster: ``kind`` (slurm, pbs, sge, lsf), ``jobs``, and what the
        cluster class takes (``queue``, ``cores``, ``memory``, ``walltime``, ...).
    threads : int, optional
        Of this machine, where neither is given.
    """
    if scheduler and cluster:
        raise XanesTomoError("--scheduler and --cluster: expected one of the two, got both")
    if scheduler:
        return Cluster(address=scheduler)
    if cluster:
        import yaml

        path = Path(cluster)
        try:
            options = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            line = " ".join(str(error).split())
            raise XanesTomoError(f"cluster {path.name}: expected a YAML file, but {line[:200]}") from None
        if not isinstance(options, dict) or not all(isinstance(k, str) for k in options):
            raise XanesTomoError(f"cluster {path.name}: expected `key: value` lines such as `kind: slurm`")
        return Cluster(queue=options)
    return Threads(threads or os.cpu_count() or 1)
