"""Slabs on threads and on a real dask cluster: the same maps, whatever happens to the workers; errors in one line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from napari_xanes_tomo import Series, Workflow, mapping, open_series, read_maps, write_twin
from napari_xanes_tomo.cli import app
from napari_xanes_tomo.execution import WAITING, Cluster, Threads, from_options
from napari_xanes_tomo.model import Cancelled, XanesTomoError
from napari_xanes_tomo.phantom import TwinParameters

SMALL = TwinParameters(n=64, n_angles=18, energies_ev=(7704.0, 7728.0, 8178.0, 8570.0), flats_per_set=3)
ROWS = 8  # of a slab: eight slabs


def run(path: Path, out: Path, *more: str | Path) -> Result:
    return CliRunner().invoke(app, ["run", str(path), "--out", str(out), *map(str, more)])


def error(result: Result, code: int = 1) -> str:
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    lines = [x for x in result.stderr.splitlines() if x.startswith("xanes-tomo: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def outputs(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {p.name: p.read_bytes() for p in sorted((out / "tables").iterdir())}
    return found | {name: np.asarray(a) for name, a in read_maps(out / "maps.ome.zarr").data.items()}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert sorted(one) == sorted(other)
    for name, value in one.items():
        if isinstance(value, bytes):
            assert value == other[name], name
        else:
            np.testing.assert_array_equal(value, other[name], err_msg=name)


@pytest.fixture(scope="module", autouse=True)
def small_slabs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapping, "SLAB_ROWS", ROWS)
        yield


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_twin(tmp_path_factory.mktemp("execution") / "twin", parameters=SMALL)


@pytest.fixture(scope="module")
def series(twin: Path) -> Series:
    return open_series(twin)


@pytest.fixture(scope="module")
def aligned(twin: Path) -> Path:
    """A run up to the maps, made by two threads; to be copied."""
    out = twin.parent / "aligned"
    assert run(twin, out, "--threads", "2", "--until", "registration").exit_code == 0
    return out


@pytest.fixture(scope="module")
def by_threads(twin: Path, aligned: Path) -> dict[str, Any]:
    out = twin.parent / "threads"
    copy(aligned, out)
    assert run(twin, out, "--threads", "2").exit_code == 0
    return outputs(out)


def copy(run_folder: Path, out: Path) -> None:
    import shutil

    shutil.copytree(run_folder, out)


@pytest.fixture
def out(aligned: Path, tmp_path: Path) -> Path:
    copy(aligned, tmp_path / "out")
    return tmp_path / "out"


START = """
import os, sys, time
os.environ["OPENBLAS_NUM_THREADS"] = "1"
if __name__ == "__main__":
    from distributed import LocalCluster
    with LocalCluster(n_workers=int(sys.argv[1]), threads_per_worker=1, processes=True, dashboard_address=':0') as c:
        print(c.scheduler_address, flush=True)
        sys.stdin.read()
"""


@contextlib.contextmanager
def local_cluster(folder: Path, workers: int) -> Iterator[str]:
    """A cluster in processes of its own, as on another machine; yields the scheduler's address."""
    script = folder / "cluster.py"
    script.write_text(START)
    with subprocess.Popen(
        [sys.executable, str(script), str(workers)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()
            process.wait(30)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with local_cluster(tmp_path_factory.mktemp("cluster"), 2) as address:
        yield address


def pids(address: str) -> list[int]:
    import distributed

    with distributed.Client(address, set_as_default=False) as client:
        return list(client.run(os.getpid).values())


def when_slabs(out: Path, count: int, act: Any) -> threading.Thread:
    """Do something as soon as so many slabs are flagged."""

    def watch() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if len([p for p in out.glob(".progress/*/*") if p.name != "created"]) >= count:
                act()
                return
            time.sleep(0.005)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


# --- on a cluster -------------------------------------------------------------------------------------------


def test_a_cluster_with_a_worker_killed_half_way_gives_the_same(
    twin: Path, out: Path, cluster: str, by_threads: dict[str, Any]
) -> None:
    killed = []

    def kill() -> None:
        killed.append(pids(cluster)[0])
        os.kill(killed[0], signal.SIGKILL)

    watch = when_slabs(out, 2, kill)
    result = run(twin, out, "--scheduler", cluster)
    watch.join(30)
    assert result.exit_code == 0, result.output
    assert killed
    assert_same(outputs(out), by_threads)
    assert "Traceback" not in result.output


def test_stopped_on_a_cluster_and_resumed_on_threads(
    series: Series, out: Path, cluster: str, by_threads: dict[str, Any]
) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "maps" and done >= 2:
            raise Cancelled

    with Workflow(series, out, execution=Cluster(cluster)) as w, pytest.raises(Cancelled):
        w.run(progress=stop)
    assert not (out / "maps.ome.zarr").exists()
    flags = [p for p in out.glob(".progress/*/*") if p.name != "created"]
    assert 2 <= len(flags) < 64 // ROWS
    before = {p.name: p.stat().st_mtime_ns for p in flags}
    with Workflow(series, out, execution=Threads(2)) as w:
        made = []
        # Of one part: the checks before the first slab.
        w.run(progress=lambda what, done, total: made.append(done) if what == "maps" and total > 1 else None)
    assert made[0] >= len(before)  # what was flagged is not made again
    assert_same(outputs(out), by_threads)


def test_ctrl_c_on_a_cluster(twin: Path, out: Path, cluster: str, by_threads: dict[str, Any]) -> None:
    code = "import sys\nfrom napari_xanes_tomo import cli, mapping\nmapping.SLAB_ROWS = 2\ncli.main()\n"
    command = [sys.executable, "-c", code, "run", str(twin), "--out", str(out), "--scheduler", cluster]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        when_slabs(out, 1, lambda: process.send_signal(signal.SIGINT)).join(60)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.strip().splitlines() == [
        "xanes-tomo: stopped; what is finished is kept, the same command goes on from there"
    ]
    assert run(twin, out, "--threads", "2").exit_code == 0
    assert_same(outputs(out), by_threads)


def test_workers_without_the_data_name_the_file(twin: Path, series: Series, out: Path, cluster: str) -> None:
    moved = twin.with_name("moved")

    def hide(what: str, done: int, total: int) -> None:
        if what == "maps" and total > 1 and twin.exists():  # of one part: the checks before the first slab
            twin.rename(moved)

    try:
        with Workflow(series, out, execution=Cluster(cluster)) as w:
            with pytest.raises(XanesTomoError) as found:
                w.run(progress=hide)
            journal = len(w.journal)
    finally:
        moved.rename(twin)
    text = str(found.value)
    assert "\n" not in text
    assert ".xrm" in text
    assert "tcp://" in text
    assert "under the same path" in text
    with Workflow(series, out) as w:
        assert len(w.journal) == journal
        assert w.run()[("maps", None)].status == "candidate"


def test_a_failure_inside_a_worker_is_one_line(cluster: str) -> None:
    with pytest.raises(XanesTomoError, match=r"worker tcp.*ZeroDivisionError: "):
        list(Cluster(cluster).run(lambda shared, job, threads: divmod(1, job), None, [0], 1))


# Functions of this module cannot be imported by a worker; lambdas travel by value.
slow = lambda shared, job, threads: (time.sleep(job), threads)[1]  # noqa: E731
die = lambda shared, job, threads: os.kill(os.getpid(), 9)  # noqa: E731


def test_a_caller_hears_of_slow_jobs(cluster: str) -> None:
    found = list(Cluster(cluster).run(slow, None, [0.0, 2.5], 2))
    assert [v for v in found if v is not WAITING] == [1, 1]
    assert WAITING in found


def test_a_job_that_kills_every_worker_ends(cluster: str) -> None:
    with pytest.raises(XanesTomoError, match="lost with its worker again and again"):
        list(Cluster(cluster).run(die, None, [0], 1))


def test_the_scheduler_dies(tmp_path: Path) -> None:
    with local_cluster(tmp_path, 1) as address:
        iterator = Cluster(address).run(slow, None, [0.0, 12.0], 2)
        assert next(v for v in iterator if v is not WAITING) == 1
    with pytest.raises(XanesTomoError, match="the scheduler is gone"):
        list(iterator)


# --- options ------------------------------------------------------------------------------------------------


def test_no_scheduler_there(twin: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("napari_xanes_tomo.execution._CONNECT", "1s")
    before = (out / "journal.jsonl").read_bytes()
    text = error(run(twin, out, "--scheduler", "tcp://127.0.0.1:9"))
    assert "expected a dask scheduler at tcp://127.0.0.1:9, found none" in text
    assert "a dask scheduler at nonsense" in error(run(twin, out, "--scheduler", "nonsense"))
    assert (out / "journal.jsonl").read_bytes() == before
    # It is said at once, not after the alignments.
    assert "found none" in error(run(twin, out.parent / "new", "--scheduler", "tcp://127.0.0.1:9"))
    assert not (out.parent / "new").exists()


def test_a_scheduler_without_workers(twin: Path, out: Path, tmp_path: Path) -> None:
    with local_cluster(tmp_path, 0) as address:
        assert "it has no workers" in error(run(twin, out, "--scheduler", address))


def test_without_distributed(twin: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert "pip install napari-xanes-tomo[cluster]" in error(run(twin, out, "--scheduler", "tcp://127.0.0.1:9"))
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    options = out.parent / "slurm.yaml"
    options.write_text("kind: slurm\njobs: 2\n")
    assert "pip install napari-xanes-tomo[cluster]" in error(run(twin, out, "--cluster", options))


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "expected a YAML file"), ("kind: [", "expected a YAML file"), ("- a", "`key: value`")],
)
def test_cluster_options_that_cannot_be_read(twin: Path, tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    assert said in error(run(twin, tmp_path / "new", "--cluster", path))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--scheduler", "tcp://a:1", "--cluster", "c.yaml"],
        ["--scheduler", "tcp://a:1", "--threads", "2"],
        ["--threads", "0"],
    ],
)
def test_options_that_exclude_each_other(tmp_path: Path, options: list[str]) -> None:
    result = run(tmp_path, tmp_path / "out", *options)
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_the_execution_asked_for() -> None:
    assert from_options(None, None, 3) == Threads(3)
    assert from_options("tcp://a:1", None) == Cluster("tcp://a:1")
    with pytest.raises(XanesTomoError, match="one of the two"):
        from_options("tcp://a:1", "c.yaml")


def test_an_unknown_batch_system(tmp_path: Path) -> None:
    pytest.importorskip("dask_jobqueue")
    path = tmp_path / "c.yaml"
    path.write_text("kind: abacus\n")
    with pytest.raises(XanesTomoError, match="expected one of slurm"):
        list(from_options(None, path).run(slow, None, [0.0], 1))


# --- threads ------------------------------------------------------------------------------------------------


def test_threads_by_memory() -> None:
    assert Threads(8).workers(20, 1 << 30, 4 << 30) == 4
    assert Threads(8).workers(3, 1, 4 << 30) == 3
    assert Threads(8).workers(3, 1 << 40, 1 << 30) == 1


def test_a_slab_needs_no_qt(series: Series, out: Path, tmp_path: Path) -> None:
    """What a worker does, in a process where Qt and napari cannot be imported."""
    import pickle

    taken: dict[str, Any] = {}

    class Caught(Exception):
        pass

    class Catch:
        def workers(self, jobs: int, bytes_per_job: int, memory_bytes: int) -> int:
            return 1

        def run(self, work: Any, shared: Any, jobs: Any, workers: int) -> Any:
            taken.update(work=work, shared=shared, jobs=list(jobs))
            raise Caught
            yield

    with Workflow(series, out, execution=Catch()) as w, pytest.raises(Caught):  # type: ignore[arg-type]
        w.run()
    job = pickle.dumps((taken["work"], taken["shared"], taken["jobs"][0]))
    assert len(job) < 1_000_000  # no pixels travel
    (tmp_path / "job").write_bytes(job)
    code = (
        "import sys, pickle, pathlib, json\n"
        "for name in ('qtpy', 'napari', 'PyQt6', 'magicgui', 'pyqtgraph', 'superqt'): sys.modules[name] = None\n"
        "work, shared, rows = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "print(json.dumps(work(shared, rows, 1)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "job")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == 0
    assert list(out.glob(".progress/*/0-8"))
