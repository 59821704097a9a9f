"""Kills, full disks, two writers, journals edited by hand: one clear line, nothing lost, the same command goes on."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from napari_xanes_tomo import Recipe, Workflow, open_series, write_twin
from napari_xanes_tomo.cli import app
from napari_xanes_tomo.io.journal import Journal
from napari_xanes_tomo.io.store import OutputLock, read_map_attributes
from napari_xanes_tomo.model import XanesTomoError
from napari_xanes_tomo.phantom import TwinParameters

SMALL = TwinParameters(n=64, n_angles=18, energies_ev=(7704.0, 7728.0, 8178.0, 8570.0), flats_per_set=3)


def run(path: Path, out: Path, *more: str | Path) -> Result:
    return CliRunner().invoke(app, ["run", str(path), "--out", str(out), *map(str, more)])


def error(result: Result, code: int = 1) -> str:
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    lines = [x for x in result.stderr.splitlines() if x.startswith("xanes-tomo: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_twin(tmp_path_factory.mktemp("crash") / "twin", parameters=SMALL)


@pytest.fixture(scope="module")
def whole(twin: Path) -> Path:
    """An undisturbed run."""
    out = twin.parent / "whole"
    assert run(twin, out).exit_code == 0
    return out


@pytest.fixture(scope="module")
def crash(repository: Path) -> types.ModuleType:
    """``benchmarks/crash.py``, which does the same 25 times on the demo twin."""
    spec = importlib.util.spec_from_file_location("crash", repository / "benchmarks" / "crash.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_three_kills(twin: Path, whole: Path, crash: types.ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kept = {}
    for moment in ("journal", "journal", "after a slab"):
        process = crash.start(twin, out, "--threads", "1")
        assert crash.wait_for(moment, process, out, 60, 60), f"the run ended before the moment: {moment}"
        process.kill()
        process.wait()
        kept |= crash.flagged(out)
    assert kept
    result = run(twin, out)
    assert result.exit_code == 0, result.output
    assert f"took over from process {process.pid}" in " ".join(result.stderr.split())
    assert crash.differences(out, whole, kept) == []


def test_random_kills_of_the_benchmark(twin: Path, whole: Path, crash: types.ModuleType, tmp_path: Path) -> None:
    _, kept = crash.disturbed(twin, tmp_path / "out", 1, crash.ALIGNING, random.Random(3), 3.0, say=False)
    assert run(twin, tmp_path / "out").exit_code == 0
    assert crash.differences(tmp_path / "out", whole, kept) == []


def test_a_disk_that_fills_up_in_a_slab(twin: Path, whole: Path, crash: types.ModuleType, tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()

    def do(*command: str | Path) -> bool:
        try:
            return subprocess.run(command, capture_output=True, timeout=20).returncode == 0
        except OSError:
            return False

    # Room for everything but the second half of the maps.
    size = sum(p.stat().st_size for p in whole.rglob("*") if p.is_file() and p.name != "report.html")
    size -= sum(p.stat().st_size for p in (whole / "maps.ome.zarr").rglob("*") if p.is_file()) // 3
    if not do("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", mount):
        pytest.skip("mounting needs rights that are not here")
    try:
        out = mount / "out"
        text = error(run(twin, out))
        assert "the disk is full; free some space and start again, what was finished is kept" in text
        assert list(out.glob("maps.ome.zarr.partial-*")), "it was to fill up in the maps"
        events = Journal(out).events
        kept = crash.flagged(out)
        assert do("mount", "-o", "remount,size=200m", mount)
        result = run(twin, out)
        assert result.exit_code == 0, result.output
        assert Journal(out).events[: len(events)] == events
        assert crash.differences(out, whole, kept) == []
        # No room for an event: the journal is as before.
        journal = Journal(out)
        assert do("mount", "-o", f"remount,size={shutil.disk_usage(mount).used}", mount)
        with pytest.raises(XanesTomoError, match="disk is full"):
            journal.append("note", {"text": "x" * 10_000})
        assert Journal(out).events == journal.events
    finally:
        do("umount", mount)


def test_two_processes_on_one_output(twin: Path, whole: Path) -> None:
    code = (
        "import sys, time\n"
        "from napari_xanes_tomo.io.lock import OutputLock\n"
        "lock = OutputLock(sys.argv[1]); lock.acquire(); print('held', flush=True); time.sleep(60)\n"
    )
    before = (whole / "journal.jsonl").read_bytes()
    with subprocess.Popen([sys.executable, "-c", code, str(whole)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        text = error(run(twin, whole))
        assert f"process {child.pid} on " in text
        assert "wait for it or choose another folder" in text
        child.kill()
    with OutputLock(whole) as lock:
        assert f"took over from process {child.pid}" in lock.message
    assert (whole / "journal.jsonl").read_bytes() == before
    assert run(twin, whole).exit_code == 0
    assert (whole / "journal.jsonl").read_bytes() == before


def spoil(lines: list[str], how: str) -> list[str]:
    if how == "a line removed":
        return lines[:4] + lines[5:]
    if how == "a line that is no event":
        return [*lines[:4], "# accepted by me\n", *lines[4:]]
    if how == "a comma removed":
        return [*lines[:4], lines[4].replace(",", "", 1), *lines[5:]]
    if how == "a newer version":
        return [*lines[:4], lines[4].replace('"version":1', '"version":2'), *lines[5:]]
    record = json.loads(lines[4])
    record["payload"] = {"step": "jitter"}  # an event without what it needs
    record["kind"] = "candidate"
    return [*lines[:4], json.dumps(record) + "\n", *lines[5:]]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("a line removed", "line 5: expected event 5, got 6"),
        ("a line that is no event", "line 5: expected one event in JSON"),
        ("a comma removed", "line 5: expected one event in JSON"),
        ("a newer version", "written by a newer version of this program"),
        ("a payload changed", "event 5 .candidate. lacks"),
    ],
)
def test_a_journal_edited_by_hand(twin: Path, whole: Path, tmp_path: Path, how: str, said: str) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns("*.zarr"))
    lines = (out / "journal.jsonl").read_text().splitlines(keepends=True)
    (out / "journal.jsonl").write_text("".join(spoil(lines, how)))
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert re.search(said, error(run(twin, out)))
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_an_array_that_was_removed_is_named(twin: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    event = next(e for e in Journal(out).events if e.kind == "candidate" and e.payload["step"] == "registration")
    path = out / "arrays" / f"{event.payload['arrays']['shift']}.npy"
    path.unlink()
    text = error(run(twin, out))
    assert path.name in text
    assert "restore it or redo the step" in text


def test_maps_that_were_removed_are_made_again(
    twin: Path, whole: Path, crash: types.ModuleType, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "maps.ome.zarr")
    assert run(twin, out).exit_code == 0
    assert [d for d in crash.differences(out, whole, {}) if "times" not in d] == []


@pytest.mark.parametrize(
    ("recipe", "absent"),
    [("maps: {elements: [Ti]}", {"Ti"}), ("maps: {scanned_edge: Ti}", {"edge_energy", "edge_jump"})],
)
def test_a_recipe_for_another_element(twin: Path, whole: Path, tmp_path: Path, recipe: str, absent: set[str]) -> None:
    out = tmp_path / "out"
    with Workflow(open_series(twin), shutil.copytree(whole, out)) as w:
        w.set_recipe(Recipe.from_text(recipe))
        w.run()
    attributes, each = read_map_attributes(out / "maps.ome.zarr")
    assert absent <= set(attributes["absent"])
    assert not absent & set(each)
    assert all(attributes["absent"].values())
    result = run(twin, out)
    assert result.exit_code == 0
    assert "maps that could not be made" in result.stdout
