"""Where slabs are made: on the threads of this machine, or on the workers of a dask cluster.

The same dask graph - one task a slab - runs on both. A task opens what it needs itself and puts its result on disk, so
nothing large travels and a worker that dies costs the slab it was at.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TypeVar

from .model import XanesTomoError

__all__ = ["Cluster", "Execution", "Threads", "from_options"]

T = TypeVar("T")
Work = Callable[[Any, Any, int], Any]
"""``work(shared, job, threads)``: an importable function; `threads` is what one job may use."""

_RETRIES = 3  # a job lost with its worker is tried again


class Execution(Protocol):
    """Runs independent jobs and says when each one is finished."""

    def workers(self, jobs: int, bytes_per_job: int, memory_bytes: int) -> int:
        """Return how many jobs run at a time."""

    def run(self, work: Work, shared: Any, jobs: Sequence[Any], workers: int) -> Generator[Any, None, None]:
        """Do every job; yield each one's result as it is finished. Closing the iterator drops what has not begun."""


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Keep BLAS from starting threads of its own inside jobs that already run side by side."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        yield


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

    def run(self, work: Work, shared: Any, jobs: Sequence[Any], workers: int) -> Generator[Any, None, None]:
        """Do every job; see `Execution`."""
        try:
            distributed: Any = import_module("distributed")
        except ImportError:
            raise XanesTomoError(
                "a cluster needs the package distributed, which is not there; pip install napari-xanes-tomo[cluster]"
            ) from None
        with self._cluster() as where:
            try:
                client = distributed.Client(where, timeout="20s", set_as_default=False)
            except (OSError, TimeoutError, ValueError) as error:
                raise XanesTomoError(
                    f"scheduler: expected a dask scheduler at {self.address or 'the cluster'}, found none "
                    f"({type(error).__name__}); start one, or leave --scheduler out"
                ) from None
            with client:
                if not client.scheduler_info()["workers"] and not self.queue:
                    raise XanesTomoError(f"scheduler {self.address}: it has no workers; start some and try again")
                everywhere = client.scatter(shared, broadcast=False, hash=False)
                futures = [
                    client.submit(_on_worker, work, everywhere, job, pure=False, retries=_RETRIES) for job in jobs
                ]
                try:
                    for future in distributed.as_completed(futures):
                        yield _outcome(future, distributed.KilledWorker)
                finally:
                    client.cancel(futures)

    @contextmanager
    def _cluster(self) -> Iterator[Any]:
        if not self.queue:
            yield self.address
            return
        try:
            dask_jobqueue: Any = import_module("dask_jobqueue")
        except ImportError:
            raise XanesTomoError(
                "--cluster needs the package dask-jobqueue, which is not installed; "
                "pip install napari-xanes-tomo[cluster]"
            ) from None
        options = dict(self.queue)
        kind, jobs = str(options.pop("kind", "slurm")), int(options.pop("jobs", 1))
        known = {"slurm": "SLURMCluster", "pbs": "PBSCluster", "sge": "SGECluster", "lsf": "LSFCluster"}
        if kind not in known:
            raise XanesTomoError(f"cluster: kind: expected one of {', '.join(known)}, got {kind!r}")
        try:
            cluster = getattr(dask_jobqueue, known[kind])(**options)
        except (TypeError, ValueError, OSError) as error:
            raise XanesTomoError(f"cluster: {kind} does not take these options ({error})") from None
        with cluster:
            cluster.scale(jobs=jobs)
            yield cluster


def _on_worker(work: Work, shared: Any, job: Any) -> Any:
    """Run one job on a worker with the threads it has."""
    from distributed import get_worker

    with one_blas_thread():
        return work(shared, job, max(1, int(get_worker().state.nthreads)))


def _outcome(future: Any, killed: type[BaseException]) -> Any:
    try:
        return future.result()
    except killed:
        raise XanesTomoError(
            f"cluster: a slab was lost with its worker {_RETRIES + 1} times; the workers may be short of memory, "
            "see their logs; the same command goes on from here"
        ) from None


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
