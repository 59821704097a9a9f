"""The dock of scan and flats on the tiny twin, on a viewer model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from napari_xanes_tomo.model import XanesTomoError
from napari_xanes_tomo.recipe import AbsorbanceParameters, Recipe

pytest.importorskip("napari")
pytest.importorskip("qtpy.QtWidgets")

from napari.components import ViewerModel
from qtpy.QtCore import QCoreApplication, QEvent, QThreadPool

from napari_xanes_tomo import open_series
from napari_xanes_tomo._napari.reader import read_scan
from napari_xanes_tomo._napari.scan_dock import ScanDock
from napari_xanes_tomo._napari.words import manual_rows
from napari_xanes_tomo.workflow import Workflow

WAIT = 60_000


@pytest.fixture
def dock(qtbot: Any, tiny_twin: Path, tmp_path: Path) -> Iterator[ScanDock]:
    viewer = ViewerModel()
    ((data, options, _),) = read_scan(str(tiny_twin))
    viewer.add_image(data, **options)
    viewer.dims.set_current_step((0, 1), (2, 0))
    made = ScanDock(viewer)
    made.out_edit.setText(str(tmp_path / "out"))
    yield made
    made.close()
    pool = QThreadPool.globalInstance()
    assert pool is not None
    assert pool.waitForDone(WAIT)
    QCoreApplication.sendPostedEvents(None, QEvent.Type.DeferredDelete.value)


def wait(qtbot: Any, dock: ScanDock) -> None:
    qtbot.waitUntil(lambda: not dock.session.busy, timeout=WAIT)
    qtbot.wait(20)


def names(dock: ScanDock) -> list[str]:
    return [layer.name for layer in dock.session.viewer.layers]


def test_flats_are_compared_chosen_and_shown(dock: ScanDock, qtbot: Any) -> None:
    assert not dock.use_combo.isEnabled()
    assert "Nothing was run" in dock.use_combo.toolTip()
    dock.run_button.click()
    wait(qtbot, dock)
    workflow = dock.session.workflow
    first = workflow.result(dock.unit.candidate)
    rows = [dock.compared.item(r, 0).text() for r in range(dock.compared.rowCount())]
    assert rows == list(first.numbers["flat_candidates"])
    at = rows.index("own half")
    assert dock.compared.item(at, 1).text() == f"{first.numbers['flat_candidates']['own half'][0]:.5f}"
    assert dock.compared.item(at, 1).font().bold()
    assert "counts per quantum" in dock.detector_label.text()
    assert "none is subtracted" in dock.detector_label.text()

    dock.use_combo.setCurrentIndex(dock.use_combo.findText("half 1"))
    dock.use_combo.activated.emit(dock.use_combo.currentIndex())
    wait(qtbot, dock)
    assert dock.session.state.manual.flats == {2: "half 1"}
    assert dock.unit.status == "stale"
    assert dock.use_combo.currentText() == "half 1"
    rows_by_hand = manual_rows(dock.session.state.manual, dock.session.scan.series.energies_ev.tolist())
    assert [text for text, _, _ in rows_by_hand] == ["7704 eV: flats half 1"]
    dock.run_button.click()
    wait(qtbot, dock)
    second = workflow.result(dock.unit.candidate)
    assert second.numbers["flats"] == ["half 1", "half 1"]
    assert second.numbers["beam_origins"] == [[2, 0]]
    assert first.numbers["beam_origins"] == [[2, 0], [2, 1]]
    # Another energy is not concerned, and undo brings the first result back.
    dock.session.go_to(0, 0)
    wait(qtbot, dock)
    assert dock.use_combo.currentText() == "as in the recipe"
    dock.session.go_to(2, 0)
    dock.session.undo()
    wait(qtbot, dock)
    assert dock.unit.status == "candidate"
    assert workflow.result(dock.unit.candidate).numbers["flats"] == first.numbers["flats"]


def test_air_and_mask_as_layers(dock: ScanDock, qtbot: Any) -> None:
    for check in (dock.air_box, dock.mask_box):
        check.click()
        wait(qtbot, dock)
        assert not check.isChecked()  # nothing was run yet, and it is said
    assert "Nothing was run" in dock.message.text()
    dock.run_button.click()
    wait(qtbot, dock)
    dock.air_box.click()
    wait(qtbot, dock)
    assert "air residual at 7704 eV" in names(dock)
    layer = next(x for x in dock.session.viewer.layers if x.name.startswith("air residual"))
    frame = np.asarray(layer.data[2, 5])
    result = dock.session.workflow.result(dock.unit.candidate)
    assert frame.shape == (64, 64)
    assert np.std(frame[frame != 0]) == pytest.approx(result.arrays["air_residual"][5], rel=0.2)
    assert not np.asarray(layer.data[0, 5]).any()
    painted = np.zeros((64, 64), bool)
    painted[3:6, 7] = True
    dock.session.decide(lambda w: w.set_mask(painted))
    dock.mask_box.click()
    wait(qtbot, dock)
    left_out = next(x for x in dock.session.viewer.layers if x.name == "pixels left out")
    assert np.asarray(left_out.data)[3:6, 7].all()
    for check in (dock.air_box, dock.mask_box):
        if check.isChecked():
            check.click()
    wait(qtbot, dock)
    assert len(names(dock)) == 1


def test_a_click_on_a_problem_shows_its_frame(qtbot: Any, tiny_twin: Path, tmp_path: Path) -> None:
    """A projection at its angle, a flat at its shot in the layer of the flats."""
    folder = tmp_path / "scan"
    shutil.copytree(tiny_twin, folder)
    whole = open_series(folder)
    projection, flat = whole.scans[3].names[7], whole.scans[5].flats[1].names[2]
    (folder / projection).unlink()
    (folder / flat).write_bytes((folder / flat).read_bytes()[:6000])
    viewer = ViewerModel()
    ((data, options, _),) = read_scan(str(folder))
    viewer.add_image(data, **options)
    dock = ScanDock(viewer)
    rows = {dock.session.scan.series.problems[r].file: r for r in range(dock.problems.rowCount())}
    assert set(rows) == {projection, flat}
    dock.problems.cellClicked.emit(rows[projection], 0)
    assert dock.session.frame == (3, 7)
    assert not dock.flats_box.isChecked()
    dock.problems.cellClicked.emit(rows[flat], 2)
    assert dock.session.frame[0] == 5
    assert dock.flats_box.isChecked()
    assert flat in dock.flat_label.text()
    assert "truncated" in dock.flat_label.text()
    assert f"{whole.scans[5].pixel_size_nm:.2f} nm by the law" in dock.size_label.text()
    assert f"headers say {whole.scans[5].header_pixel_size_nm:.2f} nm" in dock.size_label.text()
    dock.close()
    QCoreApplication.sendPostedEvents(None, QEvent.Type.DeferredDelete.value)


def test_flats_by_hand_are_a_decision_of_the_run(tiny_twin: Path, tmp_path: Path) -> None:
    with Workflow(open_series(tiny_twin), tmp_path / "out") as run:
        with pytest.raises(XanesTomoError, match=r"flats: expected .*half N"):
            run.choose_flats(0, "the best")
        run.choose_flats(0, "next energy")
        run.run_unit("flats", 0)
        result = run.result(run.state[("flats", 0)].candidate)
        assert {e for e, _ in result.numbers["beam_origins"]} == {1}
        assert "another energy" in result.quality.notes[0]
        run.choose_flats(0, None)
        assert run.state.manual.flats == {}
    with Workflow(open_series(tiny_twin), tmp_path / "out") as again:
        assert again.state[("flats", 0)].status == "stale"


def test_phase_contrast_is_aligned_and_not_mapped(tiny_twin: Path, tmp_path: Path) -> None:
    recipe = Recipe(absorbance=AbsorbanceParameters(contrast="phase"))
    with Workflow(open_series(tiny_twin), tmp_path / "out", recipe) as run:
        run.run(until="flats")
        assert {u.status for (s, _), u in run.state.units.items() if s == "flats"} == {"candidate"}
        with pytest.raises(XanesTomoError, match=r"^maps: expected absorption contrast.*phase") as error:
            run.map_plan()
        assert "\n" not in str(error.value)
