"""Measurements and outputs that are not as they should be: one clear line or a flagged energy, nothing written over."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from napari_xanes_tomo.cli import app
from napari_xanes_tomo.io.scan import open_series
from napari_xanes_tomo.io.store import read_energies, read_map_attributes, read_shifts
from napari_xanes_tomo.phantom import TwinParameters, write_twin

SMALL = TwinParameters(n=64, n_angles=18, energies_ev=(6534.0, 6558.0, 7704.0, 7728.0, 8178.0, 8344.0, 8351.0, 8570.0))


def run(path: Path, out: Path, *more: str | Path) -> Result:
    return CliRunner().invoke(app, ["run", str(path), "--out", str(out), *map(str, more)])


def error(result: Result) -> str:
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    lines = [x for x in result.stderr.splitlines() if x.startswith("xanes-tomo: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_twin(tmp_path_factory.mktemp("bad") / "twin", parameters=SMALL)


@pytest.fixture
def twin(original: Path, tmp_path: Path) -> Path:
    """A twin that may be damaged: hard links, to be removed or replaced, never written into."""
    return Path(shutil.copytree(original, tmp_path / "twin", copy_function=os.link))


def remove(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        (folder / name).unlink()


def energy(folder: Path, energy_ev: float):
    return next(s for s in open_series(folder).scans if s.energy_ev == energy_ev)


def flats(folder: Path, energy_ev: float) -> list[str]:
    return [name for group in energy(folder, energy_ev).flats for name in group.names]


# --- nothing to work on -------------------------------------------------------------------------------------


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "scan").mkdir()
    assert "expected a scan script or .xrm files" in error(run(tmp_path / "scan", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("s.txt", "sete 8000\nmoveto T 5\n", "`collect` lines, got none"),
        ("s.txt", "sete 8000\nmoveto T 5\ncollect ../x.xrm\n", "expected the plain name of a file"),
        ("s.txt", "sete 8000\nmoveto T 5\ncollect /etc/x.xrm\n", "expected the plain name of a file"),
        ("a.xrm", "this is no XRM file", "expected an XRM file"),
        ("a.xrm", "", "a.xrm"),
    ],
)
def test_no_measurement(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    assert said in error(run(tmp_path / name, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_script_without_its_files(tmp_path: Path, original: Path) -> None:
    script = next(original.glob("*.txt"))
    shutil.copy(script, tmp_path)
    assert "no file is there" in error(run(tmp_path / script.name, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_every_energy_unusable(twin: Path, tmp_path: Path) -> None:
    remove(twin, [p.name for p in twin.glob("*_ref_*.xrm")])
    text = error(run(twin, tmp_path / "out"))
    assert "no energy got through" in text
    assert "expected at least one usable flat" in text
    assert "flat" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


# --- recipes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("jitter: {iteration: 3}", "nearest known key is 'iterations'"),
        ("registration: {reference_ev: 9000}", "the nearest to 9000 eV is 8570 eV"),
        ("maps: {elements: [Mn, Xx]}", "'Xx'"),
        ("maps: {scanned_edge: Qq}", "'Qq'"),
        ("scan: {bin: 99}", "scan.bin"),
        ("- a list", "expected `key: value` lines"),
        (None, "cannot be read"),
    ],
)
def test_a_recipe_that_cannot_work_writes_nothing(
    original: Path, tmp_path: Path, recipe: str | None, said: str
) -> None:
    path = tmp_path / "r.yaml"
    if recipe is not None:
        path.write_text(recipe)
    assert said in error(run(original, tmp_path / "out", "--recipe", path))
    assert not (tmp_path / "out").exists()


# --- outputs ------------------------------------------------------------------------------------------------


def test_foreign_files_in_the_output(original: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert "found thesis.tex" in error(run(original, tmp_path / "out"))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    assert "found" in error(run(original, original))  # into the folder of the frames


def test_the_output_of_another_run(original: Path, tmp_path: Path) -> None:
    other = write_twin(tmp_path / "other", parameters=TwinParameters(n=64, n_angles=8, energies_ev=(8570.0,), seed=5))
    assert run(other, tmp_path / "out", "--until", "flats").exit_code == 0
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file() and p.name != ".lock"}
    text = error(run(original, tmp_path / "out"))
    assert "holds a run of twin_s005" in text
    assert {p: p.read_bytes() for p in before} == before


def test_an_output_that_cannot_be_written(original: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    assert "expected an output folder, found a file" in error(run(original, tmp_path / "file"))
    assert "expected an output folder, found a file" in error(run(original, tmp_path / "file" / "out"))
    assert (tmp_path / "file").read_text() == "a file"


def test_a_read_only_mount(original: Path, tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()
    try:
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m,ro", "tmpfs", mount], capture_output=True, timeout=20
        ).returncode
    except OSError:
        made = 1
    if made != 0:
        pytest.skip("mounting needs rights that are not here")
    try:
        assert "no permission to write there" in error(run(original, mount / "out", "--until", "flats"))
    finally:
        subprocess.run(["umount", mount], check=True, timeout=20)


def test_a_file_removed_or_changed_between_two_runs_is_named(twin: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(twin, out, "--until", "flats").exit_code == 0
    journal = (out / "journal.jsonl").read_bytes()
    names = energy(twin, 7704.0).names
    kept = twin / names[3]
    kept.rename(tmp_path / "kept")
    text = error(run(twin, out))
    assert f"not there any more: {names[3]})" in text
    (tmp_path / "kept").rename(kept)
    other = twin / names[5]
    content = other.read_bytes()
    other.unlink()
    other.write_bytes(content)
    assert f"changed: {names[5]})" in error(run(twin, out))
    assert (out / "journal.jsonl").read_bytes() == journal


# --- energies that cannot be used ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_energies_that_cannot_be_used_are_flagged_and_the_others_go_on(
    twin: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The first energy has no file, one five angles, one no flats; Mn and Co lose their edges with them."""
    caplog.set_level(logging.ERROR)
    out = tmp_path / "out"
    without_flats = flats(twin, 7704.0)
    remove(twin, [*energy(twin, 6534.0).names, *flats(twin, 6534.0)])
    remove(twin, energy(twin, 6558.0).names[5:])
    remove(twin, without_flats)
    result = run(twin, out)
    assert result.exit_code == 0, result.output
    assert "flats 6/8, jitter 5/8, registration 5/8, maps done" in result.stdout
    for said in (
        "6534 eV: expected readable projections, got none",
        "6558 eV: stack: expected at least 8 usable projections, got 5",
        "7704 eV: expected at least one usable flat, got none",
    ):
        assert said in result.stdout
    assert len(read_shifts(out / "tables" / "shifts.csv")) == 8 * 18
    rows = {r.energy_ev: r for r in read_energies(out / "tables" / "energies.csv")}
    assert [e for e, r in rows.items() if r.status != "ok"] == [6534.0, 6558.0, 7704.0]
    assert all(r.status.startswith("excluded:") for r in rows.values() if r.status != "ok")
    assert rows[8570.0].reference
    whole, each = read_map_attributes(out / "maps.ome.zarr")
    assert "Ni" in each
    assert set(whole["absent"]) == {"Mn", "Co", "edge_energy"}
    assert "6534, 6558, 7704 eV" in whole["absent"]["Mn"]
    assert "Mn, Co: without 6534, 6558, 7704 eV" in result.stdout, result.stdout
    report = (out / "report.html").read_text(encoding="utf-8")
    assert "Maps that could not be made" in report
    assert "excluded:" in report


def test_another_reference_is_chosen_unless_one_was_asked_for(twin: Path, tmp_path: Path) -> None:
    remove(twin, energy(twin, 8570.0).names[5:])
    recipe = tmp_path / "r.yaml"
    recipe.write_text("registration: {reference_ev: 8570}\n")
    text = error(run(twin, tmp_path / "asked", "--recipe", recipe))
    assert "registration.reference_ev" in text
    assert "8570 eV" in text
    result = run(twin, tmp_path / "out", "--until", "registration")
    assert result.exit_code == 0, result.output
    assert "reference energy: 8351 eV" in result.stdout


def test_copied_frames_and_second_files_are_left_out_and_the_chain_goes_on(twin: Path, tmp_path: Path) -> None:
    """A frame copied over its neighbour, a flat copied over another, one cut short: named, and maps all the same."""
    names, bare = energy(twin, 8351.0).names, flats(twin, 8351.0)
    for over, source in ((names[6], names[5]), (bare[1], bare[0])):
        raw = (twin / source).read_bytes()
        (twin / over).unlink()
        (twin / over).write_bytes(raw)
    cut = (twin / names[9]).read_bytes()[:6000]
    (twin / names[9]).unlink()
    (twin / names[9]).write_bytes(cut)
    told = [(p.code, p.file) for p in open_series(twin).problems]
    assert sorted(told) == sorted([("duplicate", names[6]), ("duplicate", bare[1]), ("truncated", names[9])])
    result = run(twin, tmp_path / "out")
    assert result.exit_code == 0, result.output
    rows = [r for r in read_shifts(tmp_path / "out" / "tables" / "shifts.csv") if r.energy_ev == 8351.0]
    status = {r.frame: r.status for r in rows if r.status != "ok"}
    assert status[6] == "excluded:duplicate"
    assert status[9] == "unreadable:truncated"
    assert len(rows) == 18
    assert read_map_attributes(tmp_path / "out" / "maps.ome.zarr")
