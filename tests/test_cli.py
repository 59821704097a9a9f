"""The command line: what it prints, its exit codes, and that it goes on after a kill."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from napari_xanes_tomo import Recipe, Workflow, __version__, cli, open_series, terminal
from napari_xanes_tomo.io.journal import Journal
from napari_xanes_tomo.io.store import read_maps
from napari_xanes_tomo.model import EnergyScan
from napari_xanes_tomo.phantom import TwinParameters, write_twin
from napari_xanes_tomo.recipe import JitterParameters
from napari_xanes_tomo.state import quality_of
from napari_xanes_tomo.steps import STEPS, StepResult

SMALL = TwinParameters(n=64, n_angles=18, energies_ev=(6534.0, 6558.0, 8178.0, 8344.0, 8351.0, 8570.0))
COMMAND = [sys.executable, "-m", "napari_xanes_tomo.cli"]


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def one_line(result: Result) -> str:
    """The single line an error may have."""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("xanes-tomo: ")
    assert "Traceback" not in result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A twin of six energies and 18 angles; read only."""
    return write_twin(tmp_path_factory.mktemp("cli") / "twin", parameters=SMALL)


@pytest.fixture(scope="module")
def finished(twin: Path) -> tuple[Path, Result]:
    """The output folder of a whole run, and what the command said."""
    out = twin.parent / "out"
    return out, call("run", twin, "--out", out)


# --- the frame ----------------------------------------------------------------------------------------------


def test_version() -> None:
    result = call("--version")
    assert result.exit_code == 0
    assert result.stdout == f"xanes-tomo {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["inspect"],
        ["run", "somewhere"],
        ["run", "somewhere", "--out", "x", "--memory", "lots"],
        ["run", "somewhere", "--out", "x", "--memory", "3"],
        ["run", "somewhere", "--out", "x", "--until", "never"],
        ["run", "somewhere", "--out", "x", "--bin", "0"],
        ["run", "one", "two", "--out", "x", "--script", "s.txt"],
        ["demo", "x", "--preset", "huge"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*arguments).exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_the_steps_to_stop_at_are_those_there_are() -> None:
    assert list(cli.StepName.__args__) == [s.name for s in STEPS]


@pytest.mark.parametrize(
    ("text", "size"),
    [("4G", 4 << 30), ("800M", 800 << 20), ("1.5GiB", 3 << 29), ("2 gb", 2 << 30), ("1048576", 1 << 20)],
)
def test_sizes(text: str, size: int) -> None:
    assert cli._bytes(text) == size


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s"), (7260, "2 h 01 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert terminal.duration(seconds) == text


def test_an_unexpected_error_is_one_line_and_v_shows_the_rest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr("napari_xanes_tomo.io.given.open_input", broken)
    result = call("inspect", tmp_path)
    assert result.exit_code == 1
    assert one_line(result) == "xanes-tomo: unexpected ZeroDivisionError: two lines; -v shows where"
    result = call("inspect", tmp_path, "-v")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1] == "xanes-tomo: unexpected ZeroDivisionError: two lines"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "/somewhere/a.xrm"), "a.xrm: No space left on device"),
        (MemoryError(), "not enough memory"),
    ],
)
def test_system_errors_are_one_line(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("napari_xanes_tomo.io.given.open_input", broken)
    result = call("run", tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert said in one_line(result)


# --- inspect ------------------------------------------------------------------------------------------------


def test_inspect_lists_the_energies(twin: Path) -> None:
    result = call("inspect", twin)
    assert result.exit_code == 0
    assert len(re.findall(r"18 / 18 +20 / 20 +-90 \.\. 80 +ok", result.stdout)) == 6
    assert "6 energies (6 usable), 108 projections (108 usable), 120 flats (120 usable)" in result.stdout
    assert "no problems found" in result.stdout


def test_inspect_as_json(twin: Path) -> None:
    result = call("inspect", twin, "--json")
    assert result.exit_code == 0
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert set(found) == {"name", "frame_shape", "totals", "energies", "problems"}
    assert found["frame_shape"] == [64, 64]
    assert found["totals"] == {
        "energies": {"usable": 6, "planned": 6},
        "projections": {"usable": 108, "planned": 108},
        "flats": {"usable": 120, "planned": 120},
    }
    first = found["energies"][0]
    assert set(first) == {
        "energy_ev", "pixel_size_nm", "header_pixel_size_nm", "binning", "projections", "flats",
        "angles_usable", "theta_deg", "status",
    }  # fmt: skip
    assert first["energy_ev"] == 6534.0
    assert first["theta_deg"] == [-90.0, 80.0]
    assert first["status"] == "ok"
    assert found["problems"] == []


def test_inspect_of_a_script_alone(tmp_path: Path, twin: Path) -> None:
    script = next(twin.glob("*.txt"))
    (tmp_path / script.name).write_bytes(script.read_bytes())
    result = call("inspect", tmp_path / script.name)
    assert result.exit_code == 1
    assert "6 energies (0 usable), 108 projections (0 usable), 120 flats (0 usable)" in result.stdout
    assert "no file is there" in result.stdout
    found = json.loads(call("inspect", tmp_path / script.name, "--json").stdout)
    assert [p["code"] for p in found["problems"]] == ["missing"]
    assert found["frame_shape"] is None
    result = call("inspect", twin, "--script", tmp_path / script.name, "--no-verify")
    assert result.exit_code == 0


def test_inspect_of_the_real_script(data_dir: Path) -> None:
    scripts = sorted((data_dir / "tomo_00089").glob("*.txt"))
    if not scripts:
        pytest.skip("the script of tomo_00089 is not here")
    result = subprocess.run([*COMMAND, "inspect", scripts[0]], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert len(re.findall("no files$", result.stdout, re.MULTILINE)) == 67
    assert "67 energies (0 usable), 12,060 projections (0 usable), 1,340 flats (0 usable)" in result.stdout
    assert "no file is there" in result.stdout
    assert result.stderr == ""


# --- demo ---------------------------------------------------------------------------------------------------


def test_demo_writes_a_twin_and_leaves_other_folders_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def fake(folder: Path, preset: str, *, seed: int, options: dict[str, object], progress: object) -> Path:
        called.append((preset, seed, options))
        folder.mkdir()
        (folder / "a.xrm").touch()
        return folder

    monkeypatch.setattr("napari_xanes_tomo.phantom.write_twin", fake)
    result = call("demo", tmp_path / "twin", "--preset", "tiny", "--seed", "3", "--option", "post=0.1",
                  "--option", "slip_energies_ev=[8570, 6534]")  # fmt: skip
    assert (result.exit_code, called) == (0, [("tiny", 3, {"post": 0.1, "slip_energies_ev": [8570, 6534]})])
    assert "1 .xrm files" in result.stdout
    monkeypatch.undo()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    result = call("demo", tmp_path / "mine")
    assert result.exit_code == 1
    assert "expected a new or empty folder" in one_line(result)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]


# --- run ----------------------------------------------------------------------------------------------------


def test_run_says_what_it_did_and_leaves_the_contract(finished: tuple[Path, Result]) -> None:
    out, result = finished
    assert result.exit_code == 0, result.output
    assert "flats 6/6, jitter 6/6, registration 6/6, maps done" in result.stdout
    assert "reference energy: 8570 eV" in result.stdout
    assert "maps:   Mn, Ni" in result.stdout
    assert "Traceback" not in result.stderr
    for name in ("recipe.yaml", "journal.jsonl", "report.html", "tables/shifts.csv", "tables/energies.csv"):
        assert (out / name).is_file(), name
    assert {"Mn", "Ni", "edge_energy_relative"} <= set(read_maps(out / "maps.ome.zarr").data)


def test_run_again_does_nothing_twice(finished: tuple[Path, Result], twin: Path) -> None:
    out, _ = finished
    before = (out / "journal.jsonl").read_bytes()
    result = call("run", twin, "--out", out)
    assert result.exit_code == 0
    assert (out / "journal.jsonl").read_bytes() == before
    result = call("run", twin, "--out", out, "--bin", "1")
    assert result.exit_code == 0


def test_run_refuses_another_recipe_on_the_same_output(finished: tuple[Path, Result], twin: Path) -> None:
    out, _ = finished
    before = (out / "journal.jsonl").read_bytes()
    result = call("run", twin, "--out", out, "--bin", "2")
    assert result.exit_code == 1
    assert result.stderr.strip().startswith("xanes-tomo: ")
    assert "another" in one_line(result) or "changed" in one_line(result)
    assert (out / "journal.jsonl").read_bytes() == before


def test_report_again(finished: tuple[Path, Result]) -> None:
    out, _ = finished
    result = call("report", out)
    assert result.exit_code == 0
    assert result.stdout == f"{out / 'report.html'}\n"


def test_recipe_and_bin(tmp_path: Path, twin: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("scan: {bin: 1}\njitter: {refine: false}\n")
    result = call("run", twin, "--out", tmp_path / "o", "--recipe", recipe, "--bin", "2", "--until", "flats")
    assert result.exit_code == 0, result.output
    kept = (tmp_path / "o" / "recipe.yaml").read_text()
    assert "bin: 2" in kept
    assert "refine: false" in kept
    assert "flats 6/6" in result.stdout
    assert "jitter" not in result.stdout
    # without recipe and bin the folder's own count
    again = call("run", twin, "--out", tmp_path / "o", "--until", "flats")
    assert again.exit_code == 0, again.output


def test_several_scans_one_failing(tmp_path: Path, twin: Path) -> None:
    (tmp_path / "empty").mkdir()
    root = tmp_path / "root"
    result = call("run", tmp_path / "empty", twin, twin, "--out", root, "--until", "flats")
    assert result.exit_code == 1
    assert [p.name for p in root.iterdir()] == ["twin_s000_3DXANES_TOMO-XANES"]
    assert (root / "twin_s000_3DXANES_TOMO-XANES" / "report.html").is_file()
    lines = [line for line in result.stderr.splitlines() if line.startswith("xanes-tomo: ")]
    assert len(lines) == 3
    assert "2 of 3 scans failed" in lines[-1]
    assert call("run", twin, tmp_path / "empty", "--out", next(root.iterdir())).exit_code == 1  # a run, no root


# --- thresholds ---------------------------------------------------------------------------------------------


def decisions(out: Path) -> list[tuple[str, int | None, str]]:
    return [
        (e.payload["step"], e.payload["energy"], e.payload.get("by", ""))
        for e in Journal(out).events
        if e.kind == "decision"
    ]


def test_good_results_are_accepted_by_thresholds(finished: tuple[Path, Result]) -> None:
    out, result = finished
    good = {
        (e.payload["step"], e.payload["energy"])
        for e in Journal(out).events
        if e.kind == "candidate" and quality_of(e.payload).verdict == "good"
    }
    assert ("maps", None) in good
    assert set(decisions(out)) == {(*unit, "thresholds") for unit in good}
    assert len(decisions(out)) == len(good)
    total = sum(e.kind == "candidate" for e in Journal(out).events)
    assert ("to be looked at" in result.stdout) == (len(good) < total)


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> float:
    """The jitter of one energy misses its threshold."""
    from dataclasses import replace

    from napari_xanes_tomo import workflow
    from napari_xanes_tomo.model import Quality, Score

    run_jitter = workflow.run_jitter

    def judged(scan: EnergyScan, *a: object, **k: object) -> StepResult:
        found = run_jitter(scan, *a, **k)  # type: ignore[arg-type]
        scores = (Score("sharpness", 0.4 if scan.energy_ev == 8178.0 else 0.9, "px", 0.5, "higher"),)
        return replace(found, quality=Quality(scores))

    monkeypatch.setattr(workflow, "run_jitter", judged)
    return 8178.0


def test_on_fail_stop_and_then_continue(tmp_path: Path, twin: Path, strict: float) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("on_fail: stop\n")
    out = tmp_path / "out"
    said = "Jitter correction, 8178 eV: sharpness 0.4 px, expected at least 0.5"
    for options in (["--recipe", recipe], []):  # asked again it stops at the same place
        result = call("run", twin, "--out", out, *options)
        assert result.exit_code == 3, result.output
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith(f"xanes-tomo: {said}")
        assert "accept it or redo the step" in last
    state = [e.payload["step"] for e in Journal(out).events if e.kind == "candidate"]
    assert state.count("jitter") == 6  # the step was finished
    assert "registration" not in state
    assert ("jitter", 2, "thresholds") not in decisions(out)
    assert (out / "report.html").is_file()
    assert (out / "tables" / "shifts.csv").is_file()
    # Flagged and used: the same folder goes on when that is asked for.
    result = call("run", twin, "--out", out, "--on-fail", "continue", "--until", "registration")
    assert result.exit_code == 0, result.output
    assert "sharpness 0.4 px, expected at least 0.5" in result.stdout
    assert "jitter 6/6, registration 6/6" in result.stdout
    assert ("jitter", 2, "thresholds") not in decisions(out)
    assert "on_fail: continue" in (out / "recipe.yaml").read_text()


def test_what_was_accepted_by_hand_is_no_reason_to_stop(tmp_path: Path, twin: Path, strict: float) -> None:
    out = tmp_path / "out"
    options = ["--on-fail", "stop", "--until", "jitter"]
    assert call("run", twin, "--out", out, *options).exit_code == 3
    with Workflow(open_series(twin), out) as w:
        w.accept("jitter", 2)
    assert call("run", twin, "--out", out, *options).exit_code == 0
    with Workflow(open_series(twin), out) as w:
        assert w.undo() == "decision"  # the user's own; what the thresholds accepted is not in the way
        assert w.undo() is None
        w.revert("jitter", 0)
    assert call("run", twin, "--out", out, "--on-fail", "continue", "--until", "jitter").exit_code == 0
    assert decisions(out)[-1] == ("jitter", 0, "")  # taken back by hand: not accepted again behind the user's back


def test_thresholds_follow_the_recipe(tmp_path: Path, twin: Path) -> None:
    out = tmp_path / "out"
    assert call("run", twin, "--out", out, "--until", "jitter").exit_code == 0
    with Workflow(open_series(twin), out) as w:
        assert {w.state[("jitter", e)].status for e in range(6)} <= {"accepted", "candidate"}
        w.set_recipe(w.recipe.model_copy(update={"jitter": JitterParameters(refine=False)}))
        assert {w.state[("jitter", e)].status for e in range(6)} == {"stale"}
        w.run(until="jitter")
        assert {w.state[("jitter", e)].status for e in range(6)} == {"candidate"}  # nobody asked to accept


def test_several_scans_one_stopped(tmp_path: Path, twin: Path, strict: float) -> None:
    other = tmp_path / "other"
    other.mkdir()
    result = call("run", twin, other, "--out", tmp_path / "root", "--on-fail", "stop", "--until", "jitter")
    assert result.exit_code == 1
    assert "1 of 2 scans failed, 1 of 2 scans stopped by a threshold" in result.stderr
    result = call("run", twin, "--out", tmp_path / "root" / "x", "--on-fail", "stop", "--until", "flats")
    assert result.exit_code == 0, result.output


def test_recipe_prints_the_defaults_and_the_schema(tmp_path: Path) -> None:
    result = call("recipe")
    assert result.exit_code == 0
    assert Recipe.from_text(result.stdout) == Recipe()
    schema = json.loads(call("recipe", "--schema").stdout)
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert schema["properties"]["on_fail"]["enum"] == ["continue", "stop"]
    assert schema["additionalProperties"] is False


# --- interrupted --------------------------------------------------------------------------------------------


def interrupted(command: list[str], out: Path, events: int, by: signal.Signals) -> tuple[int, str]:
    """Start a run, send it a signal once its journal has so many events; return its exit code and stderr."""
    journal = out / "journal.jsonl"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if journal.is_file() and journal.read_bytes().count(b"\n") >= events:
                break
            time.sleep(0.02)
        process.send_signal(by)
        _, err = process.communicate(timeout=60)
    return process.returncode, err


STOP_IN_THE_SEARCH = """
import os, signal
from napari_xanes_tomo import cli, terminal
shown = terminal.Show.__call__
def call(self, what, done, total):
    shown(self, what, done, total)
    if what == "jitter" and 0 < done % 1000 > 600:
        os.kill(os.getpid(), signal.SIGINT)
terminal.Show.__call__ = call
cli.main()
"""


def test_ctrl_c_during_a_search_keeps_its_best_estimate(tmp_path: Path, twin: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", STOP_IN_THE_SEARCH, "run", str(twin), "--out", str(out), "--until", "jitter"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 130, found.stderr
    assert found.stderr.strip().splitlines()[-1].startswith("xanes-tomo: stopped; what is finished is kept")
    made = [e.payload for e in Journal(out).events if e.kind == "candidate" and e.payload["step"] == "jitter"]
    assert [p["numbers"].get("partial", False) for p in made] == [True]
    assert not [e for e in Journal(out).events if e.kind == "decision" and e.payload["step"] == "jitter"]


def test_killed_stopped_and_the_same_command_again(tmp_path: Path, twin: Path, finished: tuple[Path, Result]) -> None:
    out = tmp_path / "out"
    command = [*COMMAND, "run", str(twin), "--out", str(out)]
    code, _ = interrupted(command, out, 4, signal.SIGKILL)
    assert code == -signal.SIGKILL
    code, err = interrupted(command, out, 9, signal.SIGINT)
    assert code == 130, err
    last = err.strip().splitlines()[-1]
    assert last == "xanes-tomo: stopped; what is finished is kept, the same command goes on from there"
    assert "Traceback" not in err
    assert not (out / "maps.ome.zarr").exists()
    done = (out / "journal.jsonl").read_bytes()
    result = call("run", twin, "--out", out)
    assert result.exit_code == 0, result.output
    assert (out / "journal.jsonl").read_bytes().startswith(done)  # nothing done twice
    whole, _ = finished
    for name in ("shifts", "energies", "quality"):
        path = Path("tables") / f"{name}.csv"
        assert (out / path).read_bytes() == (whole / path).read_bytes()
    one, other = (read_maps(o / "maps.ome.zarr").data for o in (out, whole))
    assert set(one) == set(other)
    for name in one:
        np.testing.assert_array_equal(np.asarray(one[name]), np.asarray(other[name]))


def test_progress_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.Show(interval=0.0) as show:
        show("jitter", 0, 100)
        time.sleep(0.05)
        show("jitter", 50, 100)
        show("jitter", 100, 100)
    with terminal.Show() as show:
        show("jitter", 50, 100)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "jitter correction: 0 %"
    assert re.fullmatch(r"jitter correction: 50 %, about \d+ s left", lines[1])
    assert lines[2:] == ["jitter correction: 100 %"]


# --- view ---------------------------------------------------------------------------------------------------


def test_view_without_napari_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setitem(sys.modules, "napari_xanes_tomo._napari.view", None)
    result = call("view", tmp_path)
    assert result.exit_code == 1
    assert "napari-xanes-tomo[all]" in one_line(result)
    result = call("view", tmp_path / "nothing")
    assert result.exit_code == 1
    assert "got no such path" in one_line(result)


def test_view_opens_what_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []

    monkeypatch.setenv("DISPLAY", ":0")
    module = types.ModuleType("view")
    module.main = lambda path, **k: shown.append((path, k))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "napari_xanes_tomo._napari.view", module)
    assert call("view", tmp_path).exit_code == 0
    assert call("view", tmp_path, "--out", tmp_path / "out").exit_code == 0
    assert shown == [(tmp_path, {}), (tmp_path, {"out": tmp_path / "out"})]


def test_view_of_a_run_opens_its_scan(
    finished: tuple[Path, Result], twin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = finished
    shown = []
    monkeypatch.setenv("DISPLAY", ":0")
    module = types.ModuleType("view")
    module.main = lambda path, **k: shown.append((path, k))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "napari_xanes_tomo._napari.view", module)
    assert call("view", out).exit_code == 0
    assert shown == [(twin.resolve(), {"out": out})]
    # The scan has gone: the maps are shown, and a line says how to see both.
    moved = twin.with_name("moved")
    twin.rename(moved)
    try:
        result = call("view", out)
    finally:
        moved.rename(twin)
    assert result.exit_code == 0
    assert shown[1:] == [(out, {})]
    assert "is not at" in result.stderr
    assert f"--out {out}" in result.stderr
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "QT_QPA_PLATFORM"):
        monkeypatch.delenv(name, raising=False)
    if sys.platform.startswith("linux"):
        assert "expected a display" in one_line(call("view", tmp_path))
