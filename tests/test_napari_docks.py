"""The jitter dock on the tiny twin: run, look, decide, cancel, fail; Qt widgets on a viewer model, no OpenGL needed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from napari_xanes_tomo.io.scan import open_series
from napari_xanes_tomo.io.store import Journal, read_shifts
from napari_xanes_tomo.model import Cancelled, XanesTomoError
from napari_xanes_tomo.recipe import JitterParameters, Recipe, ScanParameters
from napari_xanes_tomo.state import UnitState, quality_of
from napari_xanes_tomo.workflow import Workflow

pytest.importorskip("napari")
pytest.importorskip("qtpy.QtWidgets")

from napari.components import ViewerModel
from napari.utils.notifications import notification_manager
from qtpy.QtCore import QCoreApplication, QEvent, QThreadPool

from napari_xanes_tomo._napari import session as session_module
from napari_xanes_tomo._napari.jitter_checks import CHECKS
from napari_xanes_tomo._napari.jitter_dock import JitterDock
from napari_xanes_tomo._napari.jobs import Jobs, remaining
from napari_xanes_tomo._napari.layers import METADATA_KEY, scan_layer
from napari_xanes_tomo._napari.reader import read_scan
from napari_xanes_tomo._napari.session import Session, session_of, suggest_output
from napari_xanes_tomo._napari.step_dock import button_reasons

WAIT = 60_000


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def make_dock(qtbot: Any) -> Iterator[Callable[..., JitterDock]]:
    docks: list[JitterDock] = []
    viewers: list[Any] = []  # docks do not keep their viewer alive

    def make(path: Path | None, out: Path | None = None, viewer: Any = None) -> JitterDock:
        viewer = viewer or ViewerModel()
        viewers.append(viewer)
        if path is not None:
            ((data, options, _),) = read_scan(str(path))
            viewer.add_image(data, **options)
            viewer.dims.set_current_step((0, 1), (0, 0))
        dock = JitterDock(viewer)
        docks.append(dock)
        if out is not None:
            dock.out_edit.setText(str(out))
        return dock

    yield make
    while docks:  # the test's arguments outlive this: nothing may stay in the list
        with suppress(RuntimeError):  # closed by the test
            docks.pop().close()
    viewers.clear()
    pool = QThreadPool.globalInstance()
    assert pool is not None
    assert pool.waitForDone(WAIT)
    QCoreApplication.sendPostedEvents(None, QEvent.Type.DeferredDelete.value)
    assert not session_module._sessions, "a session outlived its docks"


def wait(qtbot: Any, dock: JitterDock) -> None:
    qtbot.waitUntil(lambda: not dock.session.busy, timeout=WAIT)
    qtbot.wait(10)  # the one redraw that many events share


def run(qtbot: Any, dock: JitterDock) -> None:
    assert dock.run_button.isEnabled(), dock.reason_label.text()
    dock.run_button.click()
    assert dock.session.busy
    wait(qtbot, dock)


def kinds(out: Path) -> list[str]:
    """Kinds of the events; a search that was cancelled is no candidate yet."""
    events = Journal(out).events
    return [e.kind for e in events if not (e.kind == "candidate" and e.payload["numbers"].get("partial"))]


def test_without_a_scan_every_button_says_so(make_dock: Any) -> None:
    dock = make_dock(None)
    for button in (dock.run_button, dock.accept_button, dock.redo_button, dock.revert_button):
        assert not button.isEnabled()
        assert button.toolTip() == "Open a scan first."
    assert dock.reason_label.text() == "Run, Accept, Redo, Revert: Open a scan first."
    assert "No scan" in dock.scan_label.text()
    assert dock.minimumWidth() >= 400


def test_run_look_accept_revert(make_dock: Any, qtbot: Any, tiny_twin: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    dock = make_dock(tiny_twin, out)
    assert "8 energies, 288 projections" in dock.scan_label.text()
    assert not dock.cancel_button.isEnabled()
    dock.session.go_to(2, 5)
    heard: list[tuple[str, int, int]] = []
    dock.session.progressed.connect(lambda what, done, total, s: heard.append((what, done, total)))
    run(qtbot, dock)
    assert "Jitter correction: 1 energy done" in dock.message.text()
    assert {w for w, _, _ in heard} == {"Scan and flats, 7704 eV", "Jitter correction, 7704 eV"}
    done = [d for _, d, _ in heard]
    assert done == sorted(done)
    assert {t for _, _, t in heard} == {2000}

    # What every projection was checked by is drawn as it was found, with its limits.
    checks, kept = dock.checks, dock.session.workflow.result(dock.selected())
    assert not checks.isHidden()
    for k, (_, _, names) in enumerate(CHECKS):
        checks.choice.setCurrentIndex(k)
        for series, name in enumerate(names):
            numbers, values = checks.plot.values(0, series)
            assert len(numbers) > 30
            np.testing.assert_allclose(values, kept.arrays[name][numbers])
        assert np.isfinite(checks.plot._lines[0][0].getData()[1]).all()
    assert "nm)" in dock.readout.text()

    # The curves are what the journal says.
    journal = Journal(out)
    (event,) = [e for e in journal.events if e.kind == "candidate" and e.payload["step"] == "jitter"]
    assert event.payload["energy"] == 2
    shift = journal.get_array(event.payload["arrays"]["shift"])
    numbers, plotted = dock.plot.curves()
    np.testing.assert_array_equal(plotted, shift[numbers.astype(int)])
    assert len(numbers) == 36
    marker = dock.plot._parts[0][5]
    assert marker.value() == pytest.approx(dock.session.scan.series.scans[2].theta_deg[5])
    assert f"{shift[5, 0]:.3f}" in dock.readout.text()
    dock.session.go_to(2, 30)
    assert marker.value() == pytest.approx(dock.session.scan.series.scans[2].theta_deg[30])
    points = dock.plot._parts[1][4]
    points.sigClicked.emit(points, [points.points()[11]], None)
    assert dock.session.frame == (2, int(numbers[11]))
    assert dock.session.viewer.dims.current_step[:2] == (2, int(numbers[11]))

    names = [dock.scores.item(r, 0).text() for r in range(dock.scores.rowCount())]
    scores = quality_of(event.payload).scores
    assert names == [s.name for s in (*(s for s in scores if not s.passed), *(s for s in scores if s.passed))]
    assert quality_of(event.payload).verdict in dock.verdict_label.text()
    assert dock.candidates.rowCount() == 1

    # Run has nothing to do, Redo needs another parameter, both say so.
    assert dock.run_button.toolTip() == "Done with these parameters."
    assert "Change a parameter first" in dock.redo_button.toolTip()
    assert "Redo: Change a parameter first" in dock.reason_label.text()
    assert dock.accept_button.isEnabled()
    dock.accept_button.click()
    wait(qtbot, dock)
    assert Journal(out).events[-1].kind == "decision"
    assert Journal(out).events[-1].payload == {"step": "jitter", "energy": 2, "candidate": event.seq}
    assert dock.accept_button.toolTip() == "This result is accepted."
    assert dock.candidates.item(0, 0).text() == "accepted"
    assert dock.revert_button.isEnabled()
    rows = [r for r in read_shifts(out / "tables" / "shifts.csv") if r.energy_ev == 7704.0]
    np.testing.assert_array_equal([(r.shift_y_px, r.shift_x_px) for r in rows], shift)
    dock.revert_button.click()
    wait(qtbot, dock)
    assert Journal(out).events[-1].payload["candidate"] is None
    assert dock.accept_button.isEnabled()
    assert dock.candidates.item(0, 0).text() == "counts"


def test_quick_look_next_worst_and_test_on_my_data(make_dock: Any, qtbot: Any, tiny_twin: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    dock = make_dock(tiny_twin, out)
    viewer = dock.session.viewer
    dock.session.go_to(2, 5)
    assert dock.worst_button.toolTip().startswith("Nothing was run yet")

    # A first guess: a layer of its own, nothing in the journal, nothing to accept.
    scan_layer_ = viewer.layers.selection.active
    dock.quick_button.click()
    wait(qtbot, dock)
    (preview,) = [x for x in viewer.layers if x.name.startswith("preview")]
    assert preview.name == "preview: quick look at 7704 eV"
    assert viewer.layers.selection.active is scan_layer_
    assert np.asarray(preview.data[2, 5]).max() > 0.1
    assert not np.asarray(preview.data[1, 5]).any()
    assert "36 projections" in dock.tried_label.text()
    assert not dock.accept_button.isEnabled()
    assert not (out / "journal.jsonl").exists()

    run(qtbot, dock)
    theta = dock.session.scan.series.scans[2].theta_deg
    assert dock.plot.steps() == [(theta[17] + theta[18]) / 2]  # where flats were taken
    order = dock.worst()
    assert sorted(order) == list(range(36))
    residual = dock._result.arrays["residual"]
    assert residual[order[0]] >= np.median(residual)
    dock.worst_button.click()
    assert dock.session.frame == (2, order[0])
    dock.next_worst()
    assert dock.session.frame == (2, order[1])
    dock.session.go_to(2, order[7])
    dock.next_worst()
    assert dock.session.frame == (2, order[0]), "begins anew where the user went elsewhere"

    dock.test_button.click()
    wait(qtbot, dock)
    assert "7704 eV: displacements of" in dock.tried_label.text()
    assert "bad frames:" in dock.tried_label.text()
    assert kinds(out).count("candidate") == 2  # flats and jitter, no more


def test_a_candidate_is_compared_with_the_one_in_use(
    make_dock: Any, qtbot: Any, tiny_twin: Path, tmp_path: Path
) -> None:
    dock = make_dock(tiny_twin, tmp_path / "out")
    dock.form.value = JitterParameters(refine=False)
    run(qtbot, dock)
    moments = dock._result.arrays["shift"]
    assert np.isnan(dock.plot.compared()).all()
    assert dock.compare_label.isHidden()
    dock.form.widgets["refine"].value = True
    dock.redo_button.click()
    wait(qtbot, dock)
    in_use = dock._result.arrays["shift"]
    dock.candidates.selectRow(1)  # the older one, below
    qtbot.wait(10)
    numbers, shown = dock.plot.curves()
    np.testing.assert_array_equal(shown, moments[numbers.astype(int)])
    np.testing.assert_array_equal(dock.plot.compared(), in_use[numbers.astype(int)])
    y, x = np.sqrt(np.mean((moments - in_use) ** 2, axis=0))
    assert f"y {y:.3f}, x {x:.3f} px (rms)" in dock.compare_label.text()
    dock.candidates.selectRow(0)
    qtbot.wait(10)
    assert np.isnan(dock.plot.compared()).all()
    assert dock.compare_label.isHidden()


def test_redo_with_other_parameters_then_back_to_the_first(
    make_dock: Any, qtbot: Any, tiny_twin: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    dock = make_dock(tiny_twin, out)
    dock.form.value = JitterParameters(refine=False)
    run(qtbot, dock)
    dock.accept_button.click()
    wait(qtbot, dock)
    first = dock.selected()
    assert first is not None
    assert first.payload["parameters"]["jitter"]["refine"] is False
    assert not dock.redo_button.isEnabled()
    dock.form.widgets["refine"].value = True
    assert dock.redo_button.isEnabled()
    dock.redo_button.click()
    wait(qtbot, dock)
    assert dock.candidates.rowCount() == 2
    assert dock.unit.status == "candidate"
    assert Recipe.from_yaml(out / "recipe.yaml").jitter.refine is True
    dock.candidates.selectRow(1)  # the older one, below
    chosen = dock.selected()
    assert chosen is not None
    assert chosen.id == first.id
    result = dock.session.workflow.result(first)
    np.testing.assert_array_equal(dock.plot.curves()[1], result.arrays["shift"])
    dock.accept_button.click()
    wait(qtbot, dock)
    assert dock.unit.status == "accepted"
    assert dock.unit.candidate.id == first.id


def test_all_energies_and_the_aligned_layer(make_dock: Any, qtbot: Any, tiny_twin: Path, tmp_path: Path) -> None:
    dock = make_dock(tiny_twin, tmp_path / "out")
    viewer = dock.session.viewer
    dock.aligned_box.setChecked(True)
    assert not dock.aligned_box.isChecked()
    assert "no shift to apply yet" in dock.message.text()
    dock.form.value = JitterParameters(refine=False)
    run(qtbot, dock)
    dock.aligned_box.setChecked(True)
    aligned, raw = viewer.layers["aligned, jitter corrected"], dock.session.layer
    assert aligned.data.shape == raw.data.shape
    np.testing.assert_array_equal(aligned.scale, raw.scale)
    np.testing.assert_array_equal(aligned.translate, raw.translate)

    def scatter(frames: Any) -> float:
        """How far the centre of mass moves up and down over the angles, px."""
        f = np.asarray(frames, dtype=float)
        y = np.arange(f.shape[1])[None, :, None]
        return float(np.std((f * y).sum(axis=(1, 2)) / f.sum(axis=(1, 2))))

    flats = dock.session.workflow.series.scans[0].flats[0].frames.read(0).astype(float)
    before = scatter(-np.log(np.maximum(np.asarray(raw.data[0]), 1) / flats))
    assert scatter(aligned.data[0]) < 0.2 * before
    assert not np.asarray(aligned.data[5, 0]).any(), "not done yet"
    assert viewer.layers.selection.active is raw
    dock.energies_combo.setCurrentIndex(1)
    run(qtbot, dock)
    assert "8 energies done" in dock.message.text()
    assert viewer.layers["aligned, jitter corrected"] is aligned, "the layer is updated, not added again"
    assert np.asarray(aligned.data[5, 0]).any()
    assert [dock.session.state[("jitter", e)].status for e in range(8)] == ["candidate"] * 8
    assert dock.accept_button.text() == "Accept all"
    assert dock.revert_button.toolTip() == "Nothing is accepted."
    dock.accept_button.click()
    wait(qtbot, dock)
    assert [dock.session.state[("jitter", e)].status for e in range(8)] == ["accepted"] * 8
    assert dock.accept_button.toolTip() == "No result is waiting to be accepted."
    dock.revert_button.click()
    wait(qtbot, dock)
    assert [dock.session.state[("jitter", e)].status for e in range(8)] == ["candidate"] * 8
    dock.energies_combo.setCurrentIndex(0)
    assert dock.accept_button.text() == "Accept"
    dock.aligned_box.setChecked(False)
    assert "aligned, jitter corrected" not in viewer.layers


def test_slices_before_and_after_blink(make_dock: Any, qtbot: Any, tiny_twin: Path, tmp_path: Path) -> None:
    dock = make_dock(tiny_twin, tmp_path / "out")
    assert not dock.slice_button.isEnabled()
    assert not dock.blink_box.isEnabled()
    run(qtbot, dock)
    viewer = dock.session.viewer
    assert dock.slice_button.isEnabled(), dock.slice_button.toolTip()
    dock.slice_button.click()
    before, after = (preview.layer for preview in (dock.before, dock.after))
    assert before.name.startswith("slice before the correction, row ")
    assert before.data.shape == after.data.shape == (64, 64)
    assert tuple(before.contrast_limits) == tuple(after.contrast_limits)
    # Standing still makes the slice sharper.
    assert np.std(np.diff(after.data, axis=1)) > np.std(np.diff(before.data, axis=1))
    assert viewer.layers.selection.active is dock.session.layer
    dock.blink_box.setChecked(True)
    qtbot.waitUntil(lambda: before.visible != after.visible, timeout=5000)
    shown = before.visible
    qtbot.waitUntil(lambda: before.visible != shown and after.visible == shown, timeout=5000)
    dock.blink_box.setChecked(False)
    assert before.visible
    assert after.visible
    dock.blink_box.setChecked(True)
    viewer.layers.remove(before)
    qtbot.waitUntil(lambda: not dock.blink_box.isChecked(), timeout=5000)
    texts = [dock.scores.item(row, 1).text() for row in range(dock.scores.rowCount())]
    assert sum(" px = " in t and t.endswith(" nm") for t in texts) >= 5


def test_a_cancelled_search_is_shown_as_partial_and_goes_on(
    make_dock: Any, qtbot: Any, tiny_twin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    dock = make_dock(tiny_twin, out)
    real, calls = Workflow.run_unit, []

    def stopped(self: Workflow, name: str, energy: int | None = None, **options: Any) -> Any:
        def stop(what: str, done: int, total: int) -> None:
            if done >= 0.5 * total:
                raise Cancelled

        if name == "jitter" and not calls:
            calls.append(name)
            options["progress"] = stop
        return real(self, name, energy, **options)

    monkeypatch.setattr(Workflow, "run_unit", stopped)
    run(qtbot, dock)
    assert "Cancelled" in dock.message.text()
    (part,) = dock.session.workflow.candidates("jitter", 0)
    assert part.partial
    assert dock.candidates.item(0, 0).text() == "partial"
    assert dock.unit.status == "idle"
    assert dock.go_on_button.isEnabled(), dock.go_on_button.toolTip()
    dock.go_on_button.click()
    wait(qtbot, dock)
    assert dock.unit.status == "candidate"
    assert dock.candidates.rowCount() == 2
    assert not dock.go_on_button.isEnabled()
    assert not dock.unit.candidate.partial


def test_cancel_leaves_what_is_finished_and_run_goes_on(
    make_dock: Any, qtbot: Any, tiny_twin: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    dock = make_dock(tiny_twin, out)
    dock.energies_combo.setCurrentIndex(1)
    finished = []

    def stop(*_: object) -> None:
        if "candidate" in kinds(out)[-1:] and not finished:
            finished.append(1)
            dock.cancel_button.click()

    dock.session.progressed.connect(stop)
    dock.run_button.click()
    assert dock.cancel_button.isEnabled() or dock.session.busy
    assert not dock.accept_button.isEnabled()
    assert dock.accept_button.toolTip() == "Something is running."
    wait(qtbot, dock)
    assert "Cancelled" in dock.message.text()
    made = kinds(out).count("candidate")
    assert 1 <= made < 16
    assert dock.run_button.isEnabled()
    run(qtbot, dock)
    assert kinds(out).count("candidate") == 16, "nothing was done twice"


def test_an_earlier_run_is_opened_first_and_goes_on(
    make_dock: Any, qtbot: Any, tiny_twin: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    recipe = Recipe(jitter=JitterParameters(refine=False))
    with Workflow(open_series(tiny_twin), out, recipe) as workflow:
        workflow.run_unit("flats", 0)
        workflow.run_unit("jitter", 0)
        workflow.accept("jitter", 0)
    before = kinds(out)
    dock = make_dock(tiny_twin, out)
    assert dock.form.value.refine is True
    dock.run_button.click()  # opens instead: its parameters are to be seen first
    wait(qtbot, dock)
    assert dock.form.value.refine is False
    assert "Earlier run opened" in dock.message.text()
    assert [k for k in kinds(out) if k != "scan"] == [k for k in before if k != "scan"]
    assert dock.unit.status == "accepted"
    assert len(dock.plot.curves()[0]) == 36
    assert not dock.out_edit.isEnabled()


def test_a_run_with_other_reading_parameters_reads_the_scan_again(
    make_dock: Any, qtbot: Any, tiny_twin: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    recipe = Recipe(scan=ScanParameters(bin=2))
    with Workflow(open_series(tiny_twin, recipe.scan), out, recipe):
        pass
    dock = make_dock(tiny_twin, out)
    dock.open_button.click()
    wait(qtbot, dock)
    layer = dock.session.layer
    assert layer.data.shape == (8, 36, 32, 32)
    assert layer.metadata[METADATA_KEY].parameters.bin == 2
    assert dock.session.workflow is not None
    assert dock.session.workflow.series is layer.metadata[METADATA_KEY].series


@pytest.mark.parametrize(
    ("where", "said"),
    [("inside", "inside the folder of the raw data"), ("foreign", "expected an empty folder or an earlier run")],
)
def test_an_output_folder_that_cannot_be_used(
    make_dock: Any, qtbot: Any, tiny_twin: Path, tmp_path: Path, where: str, said: str
) -> None:
    out = tiny_twin / "out" if where == "inside" else tmp_path / "foreign"
    if where == "foreign":
        out.mkdir()
        (out / "thesis.tex").write_text("")
    dock = make_dock(tiny_twin, out)
    dock.run_button.click()
    wait(qtbot, dock)
    assert said in dock.message.text()
    assert said in list(notification_manager.records)[-1].message
    assert "Traceback" not in dock.message.text()
    assert dock.session.workflow is None
    assert dock.run_button.isEnabled()
    assert dock.out_edit.isEnabled(), "another folder can be chosen"
    assert not (tiny_twin / "out").exists()


def test_too_few_angles_are_said_in_plain_words(make_dock: Any, qtbot: Any, tiny_twin: Path, tmp_path: Path) -> None:
    series = open_series(tiny_twin)
    few = series.scans[0].excluded(dict.fromkeys(range(5, 36), "test"))
    viewer = ViewerModel()
    data, options, _ = scan_layer(replace(series, scans=(few, series.scans[1])), tiny_twin)
    viewer.add_image(data, **options)
    viewer.dims.set_current_step((0, 1), (0, 0))
    dock = make_dock(None, tmp_path / "out", viewer)
    run(qtbot, dock)
    assert "6534 eV" in dock.message.text()
    assert "at least 8" in dock.message.text()
    assert "failed" in dock.verdict_label.text()
    assert "It failed with these parameters" in dock.run_button.toolTip()
    assert dock.accept_button.toolTip() == "There is no result to accept."
    assert not dock.redo_button.isEnabled()
    assert not dock.plot.curves()[0].size
    dock.session.go_to(1, 0)
    assert dock.run_button.isEnabled()
    run(qtbot, dock)
    assert dock.accept_button.isEnabled()


def test_an_unexpected_error_is_one_sentence(
    make_dock: Any, qtbot: Any, tiny_twin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the sky fell\nline two")

    monkeypatch.setattr(Workflow, "run_unit", broken)
    dock = make_dock(tiny_twin, tmp_path / "out")
    run(qtbot, dock)
    assert dock.message.text() == "unexpected error (RuntimeError: the sky fell); please report it"
    assert dock.run_button.isEnabled()


def test_nothing_of_an_abandoned_run_arrives(
    make_dock: Any, qtbot: Any, tiny_twin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scan is taken out of the viewer while a step runs that does not look up for a while."""
    out = tmp_path / "out"
    go_on, inside = threading.Event(), threading.Event()

    def slow(self: Workflow, name: str, energy: int, *, progress: Any) -> UnitState:
        inside.set()
        assert go_on.wait(30)
        return original(self, name, energy)

    original = Workflow.run_unit
    monkeypatch.setattr(Workflow, "run_unit", slow)
    dock = make_dock(tiny_twin, out)
    told: list[str] = []
    dock.run_button.click()
    qtbot.waitUntil(inside.is_set, timeout=WAIT)
    dock.session.told.connect(lambda text, error: told.append(text))
    dock.session.state_changed.connect(lambda: told.append("state"))
    dock.session.viewer.layers.clear()
    assert not dock.session.busy
    assert dock.session.workflow is None
    assert (out / ".lock").exists(), "the folder is not given free while something still writes"
    told.clear()
    go_on.set()
    qtbot.waitUntil(lambda: not (out / ".lock").exists(), timeout=WAIT)
    qtbot.wait(50)
    assert told == []
    assert dock.run_button.toolTip() == "Open a scan first."
    assert kinds(out).count("candidate") == 1, "what was finished stays"


def test_closing_the_dock_while_it_runs_stops_the_run(
    make_dock: Any, qtbot: Any, tiny_twin: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    dock = make_dock(tiny_twin, out)
    dock.energies_combo.setCurrentIndex(1)
    dock.run_button.click()
    qtbot.waitUntil(lambda: "candidate" in kinds(out), timeout=WAIT)
    dock.close()
    qtbot.waitUntil(lambda: not (out / ".lock").exists(), timeout=WAIT)
    assert kinds(out).count("candidate") < 16


def test_two_docks_share_one_run(make_dock: Any, qtbot: Any, tiny_twin: Path, tmp_path: Path) -> None:
    one = make_dock(tiny_twin, tmp_path / "out")
    two = make_dock(None, None, one.session.viewer)
    assert two.session is one.session
    run(qtbot, one)
    assert two.unit.status == "candidate"
    np.testing.assert_array_equal(two.plot.curves()[1], one.plot.curves()[1])
    one.close()
    assert session_of(two.session.viewer) is two.session
    two.accept_button.click()
    wait(qtbot, two)
    assert two.unit.status == "accepted"


def test_the_suggested_folder_is_at_home_and_a_plain_name(make_dock: Any, tiny_twin: Path, tmp_path: Path) -> None:
    dock = make_dock(tiny_twin)
    scan = dock.session.scan
    assert suggest_output(scan) == tmp_path / "home" / "xanes-tomo" / scan.series.name
    assert dock.out_edit.text() == str(Path("~") / "xanes-tomo" / scan.series.name)
    odd = replace(scan, series=replace(scan.series, name="../a b/c"))
    assert suggest_output(odd).name == "_a_b_c"


# ------------------------------------------------------------------------------------------------ jobs and buttons


def test_a_job_that_was_cancelled_abandoned_or_follows_another(qtbot: Any) -> None:
    jobs = Jobs()
    ended: list[tuple[str, object]] = []
    jobs.ended.connect(lambda how, value: ended.append((how, value)))
    hold = threading.Event()

    def patient(progress: Any) -> str:
        while not hold.wait(0.005):
            progress("waiting", 1, 10)
        return "late"

    jobs.start(patient)
    with pytest.raises(XanesTomoError, match="still running"):
        jobs.start(patient)
    jobs.cancel()
    qtbot.waitUntil(lambda: not jobs.busy, timeout=WAIT)
    assert ended == [("cancelled", None)]

    done = threading.Event()

    def deaf(progress: Any) -> str:
        hold.wait(30)
        return "late"

    jobs.start(deaf)
    jobs.abandon(done.set)
    assert not jobs.busy
    assert not done.is_set(), "only once nothing works any more"
    jobs.start(lambda progress: "next")
    qtbot.waitUntil(lambda: not jobs.busy, timeout=WAIT)
    hold.set()
    qtbot.waitUntil(done.is_set, timeout=WAIT)
    qtbot.wait(50)
    assert ended == [("cancelled", None), ("done", "next")]
    jobs.abandon(done.clear)
    assert not done.is_set(), "at once where nothing works"


def test_progress_raises_once_cancelled(qtbot: Any) -> None:
    jobs = Jobs()
    seen: list[type[BaseException]] = []

    def work(progress: Any) -> None:
        jobs.cancel()
        try:
            progress("x", 1, 2)
        except Cancelled as error:
            seen.append(type(error))
            raise

    jobs.start(work)
    qtbot.waitUntil(lambda: not jobs.busy, timeout=WAIT)
    assert seen == [Cancelled]


@pytest.mark.parametrize(
    ("done", "total", "seconds", "text"),
    [
        (0, 10, 60, ""),
        (5, 10, 1, ""),
        (5, 10, 30, "about 30 s left"),
        (1, 10, 60, "about 9 min left"),
        (1, 100, 360, "about 9.9 h left"),
        (10, 10, 60, "about 1 s left"),
    ],
)
def test_time_left(done: int, total: int, seconds: float, text: str) -> None:
    assert remaining(done, total, seconds) == text


def test_reasons_of_the_buttons() -> None:
    common: dict[str, Any] = {"has_scan": True, "busy": False, "selected": None, "same_parameters": False}
    fresh = button_reasons(None, **common)
    assert fresh.run == ""
    assert fresh.accept == fresh.redo == fresh.revert == "Nothing was run yet."
    failed = button_reasons(UnitState("failed", "p", "i", None, "why"), **common, all_done=True)
    assert "failed" in failed.run
    assert failed.accept == "There is no result to accept."
    assert button_reasons(None, **{**common, "busy": True}).run == "Something is running."


def test_a_session_without_docks_can_be_closed(qtbot: Any) -> None:
    viewer = ViewerModel()
    session = session_of(viewer)
    assert isinstance(session, Session)
    assert session_of(viewer) is session
    session.close()
    assert session_of(viewer) is not session
    session_of(viewer).close()
