"""Two workers against one on the maps: slabs per minute of a ``distributed`` cluster with one thread each.

    python benchmarks/cluster.py TWIN OUT [--rows 16] [--slabs N] [--repeat 3]

OUT is a finished run of TWIN (or one up to the registration); it is only read. The same slabs are made by one worker
and by two (processes with one thread, BLAS held to one), after each has made one to compile; the maps go to a
temporary folder. One and two take turns and the best time of each counts, for the machine may be shared; processor
seconds tell how much of a difference is work and how much is waiting for others. Wanted: at least 1.7 times as fast.
Exit code 1 where that is not reached.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.update(dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"))

from distributed import Client, LocalCluster

from napari_xanes_tomo import Workflow, mapping, open_series
from napari_xanes_tomo.execution import WAITING, Cluster


class _Caught(Exception):
    """The work was handed over."""


class _Catch:
    """An execution that only keeps what it was asked to do."""

    def workers(self, jobs: int, bytes_per_job: int, memory_bytes: int) -> int:
        return 1

    def run(self, work: Any, shared: Any, jobs: Any, workers: int) -> Any:
        self.asked = (work, shared, list(jobs))
        raise _Caught
        yield


def slabs_of(twin: Path, out: Path, rows: int) -> tuple[Any, Any, list[Any]]:
    """Return the function, what every slab needs, and the slabs of the maps of a run."""
    mapping.SLAB_ROWS = rows
    catch = _Catch()
    with Workflow(open_series(twin), out, execution=catch) as w:
        try:
            w.run()
        except _Caught:
            return catch.asked
    raise SystemExit("the maps are finished in this very way; choose other --rows")


class Measured:
    """A cluster of `count` workers with one thread each, ready to be timed."""

    def __init__(self, stack: ExitStack, count: int, work: Any, shared: Any, slabs: list[Any]) -> None:
        local = LocalCluster(n_workers=count, threads_per_worker=1, processes=True, dashboard_address=":0")
        self.cluster = stack.enter_context(local)
        self.client = stack.enter_context(Client(self.cluster, set_as_default=False))
        self.asked = (work, shared, slabs, count)
        self.wall, self.cpu = float("inf"), float("nan")
        # Every worker has its imports, and has compiled what is compiled on first use.
        workers = list(self.client.nthreads())
        futures = [self.client.submit(work, shared, slabs[0], 1, workers=[w], pure=False) for w in workers]
        self.client.gather(futures)

    def _cpu(self) -> float:
        return sum(self.client.run(lambda: sum(os.times()[:2])).values())

    def measure(self) -> None:
        """Make the slabs; the best of all calls is kept."""
        work, shared, slabs, count = self.asked
        cpu, begun = self._cpu(), time.perf_counter()
        run = Cluster(self.cluster.scheduler_address).run(work, shared, slabs, count)
        done = [v for v in run if v is not WAITING]
        wall = time.perf_counter() - begun
        assert sorted(done) == sorted(s[0] for s in slabs)
        if wall < self.wall:
            self.wall, self.cpu = wall, self._cpu() - cpu


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("twin", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=16, help="of a slab")
    parser.add_argument("--slabs", type=int, help="all of the map step unless given, else the middle ones")
    parser.add_argument("--repeat", type=int, default=3, help="the best counts")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        shutil.copytree(options.out, out, ignore=shutil.ignore_patterns("*.zarr*", ".progress", ".lock"))
        work, shared, slabs = slabs_of(options.twin, out, options.rows)
        if options.slabs:
            first = max(0, (len(slabs) - options.slabs) // 2)
            slabs = slabs[first : first + options.slabs]
        with ExitStack() as stack:
            clusters = {n: Measured(stack, n, work, shared, slabs) for n in (1, 2)}
            for _ in range(options.repeat):
                for measured in clusters.values():
                    measured.measure()
    for n, m in clusters.items():
        print(f"{n} worker{'s' if n > 1 else ' '}: {m.wall:6.1f} s for {len(slabs)} slabs of {options.rows} rows, "
              f"{m.cpu:.1f} s of processors")  # fmt: skip
    ratio = clusters[1].wall / clusters[2].wall
    print(f"two workers are {ratio:.2f} times as fast as one (wanted: 1.7; load of the machine "
          f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores)")  # fmt: skip
    return 0 if ratio >= 1.7 else 1


if __name__ == "__main__":
    sys.exit(main())
