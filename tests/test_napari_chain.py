"""The whole chain through the real docks (a viewer under Xvfb), against the same recipe run directly."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from napari_xanes_tomo.edges import mass_attenuation
from napari_xanes_tomo.io.scan import open_series
from napari_xanes_tomo.io.store import Journal, read_map_attributes, read_map_levels
from napari_xanes_tomo.model import Problem, XanesTomoError
from napari_xanes_tomo.recipe import JitterParameters, MapsParameters, Recipe
from napari_xanes_tomo.workflow import Workflow

pytest.importorskip("napari")
pytest.importorskip("qtpy.QtWidgets")

from napari.components import ViewerModel
from qtpy.QtWidgets import QDockWidget

from napari_xanes_tomo._napari import session as session_module
from napari_xanes_tomo._napari.docks import DOCKS, attach_docks
from napari_xanes_tomo._napari.layers import map_layers
from napari_xanes_tomo._napari.session import session_of
from napari_xanes_tomo._napari.voxel_dock import VoxelDock
from napari_xanes_tomo._napari.words import event_text, manual_rows, stale_reason

PLUGIN = "napari-xanes-tomo"
WAIT = 120_000
TABLES = ("shifts.csv", "energies.csv", "quality.csv")
LAST = 7  # the reference of the tiny twin


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def direct(tiny_twin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of the standard recipe without docks. Copy it to change it."""
    out = tmp_path_factory.mktemp("direct") / "out"
    with Workflow(open_series(tiny_twin), out) as workflow:
        workflow.run()
    return out


@pytest.fixture
def copied(direct: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(direct, tmp_path / "out"))


class Docks:
    """The docks of one viewer, as a user has them."""

    def __init__(self, viewer: Any, qtbot: Any) -> None:
        self.viewer, self.qtbot = viewer, qtbot
        made = attach_docks(viewer)
        self.all = made
        self.workflow, self.scan, self.jitter, self.registration, self.maps = made.values()
        self.session = session_of(viewer)

    def wait(self) -> None:
        self.qtbot.waitUntil(lambda: not self.session.busy, timeout=WAIT)
        self.qtbot.wait(5)

    def click(self, button: Any) -> None:
        said = [d.message.text() for d in self.all.values()]
        assert button.isEnabled(), f"{button.text()}: {button.toolTip()} {said}"
        button.click()
        self.wait()

    def close(self) -> None:
        viewer, self.viewer = self.viewer, None
        self.all = {}
        self.workflow = self.scan = self.jitter = self.registration = self.maps = self.session = None
        viewer.close()


@pytest.fixture
def open_docks(make_napari_viewer: Callable[..., Any], qtbot: Any, tiny_twin: Path) -> Iterator[Callable[..., Docks]]:
    made: list[Docks] = []

    def open_(out: Path | None = None, *, begin: bool = False) -> Docks:
        viewer = make_napari_viewer()
        viewer.open(str(tiny_twin), plugin=PLUGIN)
        docks = Docks(viewer, qtbot)
        made.append(docks)
        if out is not None:
            docks.workflow.out_edit.setText(str(out))
            if begin:
                docks.click(docks.workflow.open_button)
        return docks

    yield open_
    for docks in made:
        if docks.viewer is not None:
            docks.close()
    made.clear()
    qtbot.waitUntil(lambda: not session_module._sessions, timeout=5000)


def test_volumes_registered_elsewhere_go_to_their_maps(
    make_napari_viewer: Callable[..., Any], qtbot: Any, tmp_path: Path
) -> None:
    import h5py

    energies, shape = np.array([6534.0, 6558, 7704, 7728, 8178, 8250, 8570]), (12, 16, 18)
    away = sum((np.arange(n) - (n - 1) / 2).reshape([-1 if k == i else 1 for k in range(3)]) ** 2
               for i, n in enumerate(shape))  # fmt: skip
    mu = sum(rho * mass_attenuation(e, energies) for e, rho in {"Mn": 0.8, "Co": 0.5, "Ni": 1.4}.items())
    volumes = mu[:, None, None, None] * (away < 5**2) + np.random.default_rng(0).normal(0, 5, (len(energies), *shape))
    with h5py.File(tmp_path / "reg.h5", "w") as file:
        file["registration_results/reg_results/registered_xanes3D"] = (volumes * 40e-7).astype("f4")
        file["registration_results/reg_results/eng_list"] = energies / 1e3
    (tmp_path / "told.yaml").write_text("given: {unit: 1/voxel, pixel_nm: 40}\n")
    viewer = make_napari_viewer()
    docks = Docks(viewer, qtbot)
    docks.session.load_recipe(tmp_path / "told.yaml")
    viewer.open(str(tmp_path / "reg.h5"), plugin=PLUGIN)
    assert viewer.layers[0].data.shape == (len(energies), shape[1], shape[0], shape[2])
    assert "aligned elsewhere" in docks.workflow.scan_label.text()
    docks.session.run_until("maps", tmp_path / "out")
    docks.wait()
    assert read_map_attributes(tmp_path / "out" / "maps.ome.zarr")[0]["maps"][:3] == ["Mn", "Co", "Ni"]
    assert "hold no counts" in docks.scan.detector_label.text()
    for button in (docks.jitter.quick_button, docks.jitter.residual_button, docks.registration.test_button):
        assert not button.isEnabled()
        assert "not done again" in button.toolTip()
    docks.close()
    qtbot.waitUntil(lambda: not session_module._sessions, timeout=5000)


def same_output(one: Path, two: Path) -> None:
    for name in TABLES:
        assert (one / "tables" / name).read_bytes() == (two / "tables" / name).read_bytes(), name
    a, b = one / "maps.ome.zarr", two / "maps.ome.zarr"
    _, names = read_map_attributes(a)
    assert list(names) == list(read_map_attributes(b)[1])
    for name in names:
        np.testing.assert_array_equal(np.asarray(read_map_levels(a, name)[0]), np.asarray(read_map_levels(b, name)[0]))


def count(out: Path, step: str) -> dict[int | None, int]:
    """How many results of a step there are, by energy."""
    found: dict[int | None, int] = {}
    for event in Journal(out).events:
        if event.kind == "candidate" and event.payload["step"] == step:
            found[event.payload["energy"]] = found.get(event.payload["energy"], 0) + 1
    return found


def shown(docks: Docks) -> list[str]:
    """What the docks say about where the run stands."""
    texts = [d.verdict_label.text() for d in (docks.scan, docks.jitter, docks.registration, docks.maps)]
    table = docks.workflow.overview
    cells = [table.item(r, c).text() for r in range(table.rowCount()) for c in range(table.columnCount())]
    rows = docks.registration.rows
    return texts + cells + [rows.item(r, c).text() for r in range(rows.rowCount()) for c in range(5)]


def test_every_dock_runs_and_accepts_and_all_is_there_after_a_restart(
    open_docks: Any, tmp_path: Path, direct: Path
) -> None:
    out = tmp_path / "out"
    docks = open_docks(out)
    titles = {d.windowTitle() for d in docks.viewer.window._qt_window.findChildren(QDockWidget)}
    assert set(DOCKS) <= titles
    for dock in docks.all.values():
        assert dock.out_edit.text() == str(out), "the folder chosen in one dock is that of all"
        assert dock.minimumWidth() >= 400
    for dock in (docks.scan, docks.jitter, docks.registration, docks.maps):
        assert dock.accept_button.toolTip() == "Nothing was run yet."
        assert "Nothing was run yet" in dock.reason_label.text()
    assert "Nothing was run yet" in docks.workflow.undo_button.toolTip()

    docks.session.go_to(2, 5)
    docks.scan.energies_combo.setCurrentIndex(1)
    docks.jitter.energies_combo.setCurrentIndex(1)
    for dock in (docks.scan, docks.jitter, docks.registration, docks.maps):
        docks.click(dock.run_button)
        assert "done" in dock.message.text(), dock.message.text()
        docks.click(dock.accept_button)
        assert "Accept" in dock.reason_label.text()
    state = docks.session.state
    assert {u.status for u in state.units.values()} == {"accepted"}
    same_output(out, direct)

    numbers, measured = docks.registration.plot.values(0)
    units = [state[("registration", e)].candidate.payload["numbers"]["magnification"] for e in numbers]
    np.testing.assert_array_equal(measured, units)
    assert docks.registration.rows.item(LAST, 3).text() == "reference"
    index, residual = docks.scan.plot.values(0)
    flats = docks.session.workflow.result(state[("flats", 2)].candidate)
    np.testing.assert_array_equal(residual, flats.arrays["air_residual"][index])
    assert docks.workflow.overview.item(0, 1).text() == "8 of 8"
    assert not docks.workflow.run_button.isEnabled()
    assert docks.workflow.run_button.toolTip() == "Everything is done with these parameters."
    before, units_before = shown(docks), state.units
    docks.close()

    again = open_docks(out, begin=True)
    again.session.go_to(2, 5)
    assert again.session.state.units == units_before
    assert shown(again) == before
    assert "Earlier run opened" in again.maps.message.text()


def test_ten_rounds_of_accept_redo_revert_end_where_the_direct_way_ends(
    open_docks: Any, tmp_path: Path, direct: Path
) -> None:
    out = tmp_path / "out"
    docks = open_docks(out)
    standard = Recipe()
    docks.click(docks.workflow.run_button)
    other = {
        "jitter": JitterParameters(refine=False),
        "registration": standard.registration.model_copy(update={"iterations": 3}),
        "flats": standard.absorbance.model_copy(update={"air_margin_px": 8.0}),
        "maps": MapsParameters(smoothing_voxel=0.5),
    }
    order = (
        "jitter",
        "registration",
        "maps",
        "flats",
        "jitter",
        "registration",
        "jitter",
        "flats",
        "registration",
        "jitter",
    )
    for k, name in enumerate(order):
        dock = {"jitter": docks.jitter, "registration": docks.registration, "flats": docks.scan}.get(name, docks.maps)
        docks.session.go_to(k % 7, 0)
        dock.energies_combo.setCurrentIndex(0)
        if not dock.accept_button.isEnabled():
            docks.click(dock.run_button)
        docks.click(dock.accept_button)
        dock.form.value = other[name]
        dock.form.changed.emit()
        if name == "maps":
            assert dock.redo_button.isEnabled()  # once is enough: it takes the longest
        else:
            docks.click(dock.redo_button)
            assert dock.unit.status == "candidate"
            docks.click(dock.accept_button)
        docks.click(dock.revert_button)
        dock.form.value = getattr(standard, dock.section)
        dock.form.changed.emit()
    assert docks.session.asked == standard
    docks.click(docks.workflow.run_button)
    state = docks.session.state
    assert not {u.status for u in state.units.values()} & {"stale", "idle", "failed"}
    assert sum(count(out, "jitter").values()) > 8
    same_output(out, direct)


def test_one_projection_excluded_after_the_maps(open_docks: Any, copied: Path, direct: Path) -> None:
    docks = open_docks(copied, begin=True)
    for dock in (docks.scan, docks.jitter, docks.registration, docks.maps):
        dock.energies_combo.setCurrentIndex(1)
        docks.click(dock.accept_button)
    before = {s: count(copied, s) for s in ("flats", "jitter", "registration", "maps")}
    assert before["maps"] == {None: 1}
    docks.session.go_to(3, 11)
    docks.click(docks.jitter.exclude_button)
    assert docks.session.state.excluded == {3: {11: "by hand"}}
    assert docks.jitter.exclude_button.text() == "Restore this projection"
    assert docks.jitter.unit.status == "stale"
    assert "projection 11 excluded" in docks.scan.verdict_label.text()
    assert "projection 11 excluded" in docks.workflow.stale_label.text()
    assert docks.workflow.by_hand.item(0, 0).text().endswith("projection 11 excluded (by hand)")
    docks.click(docks.workflow.run_button)
    assert docks.workflow.overview.item(3, 1).text() == "1 of 1"
    for step in ("flats", "jitter", "registration"):
        made = count(copied, step)
        assert {e for e in made if made[e] > before[step][e]} == {3}, step
    assert count(copied, "maps") == {None: 2}
    assert "excluded:by hand" in (copied / "tables" / "shifts.csv").read_text()

    docks.click(docks.workflow.undo_button)
    assert "Exclusion of a projection: taken back" in docks.workflow.message.text()
    assert {u.status for u in docks.session.state.units.values()} == {"accepted"}
    done = Journal(copied).events
    if docks.workflow.run_button.isEnabled():
        docks.click(docks.workflow.run_button)
    assert [e for e in Journal(copied).events[len(done) :] if e.kind == "candidate"] == [], "nothing was computed again"
    for name in TABLES:
        assert (copied / "tables" / name).read_bytes() == (direct / "tables" / name).read_bytes(), name
    docks.click(docks.workflow.redo_button)
    assert docks.session.state.excluded == {3: {11: "by hand"}}
    docks.workflow.by_hand.selectRow(0)
    docks.click(docks.workflow.take_back_button)
    assert docks.session.state.excluded.get(3, {}) == {}


def test_what_is_decided_by_hand(open_docks: Any, copied: Path) -> None:
    docks = open_docks(copied, begin=True)
    docks.session.go_to(1, 4)
    found = docks.session.workflow.displacements(1).arrays["shift"].copy()
    jitter, registration = docks.jitter, docks.registration
    jitter.nudge_spins[0].setValue(0.5)
    jitter.nudge_spins[1].setValue(-0.25)
    docks.click(jitter.nudge_button)
    moved = docks.session.workflow.displacements(1).arrays["shift"]
    np.testing.assert_allclose(moved[4] - found[4], (0.5, -0.25))
    numbers, plotted = jitter.plot.curves()
    np.testing.assert_array_equal(plotted[numbers == 4][0], moved[4])
    assert "nudged by y +0.5, x -0.25 px" in jitter.hand_label.text()
    assert registration.unit.status == "stale"
    jitter.center_spin.setValue(3.0)
    docks.click(jitter.center_button)
    assert docks.session.state.manual.centers == {1: 3.0}
    docks.click(jitter.found_button)
    assert docks.session.state.manual.centers == {}
    docks.session.go_to(1, 20)
    docks.click(jitter.point_button)
    assert docks.session.state.manual.change_points == {1: (20,)}
    assert jitter.point_button.text() == "Sample did not move here"

    assert registration.exclude_button.text() == "Exclude 6558.00 eV"
    registration.magnification_spin.setValue(1.3)
    docks.click(registration.fix_button)
    assert docks.session.state.manual.magnifications == {1: 1.3}
    docks.click(registration.exclude_button)
    assert registration.rows.item(1, 4).text() == "excluded"
    assert registration.exclude_button.text() == "Restore 6558.00 eV"
    docks.session.go_to(LAST, 0)
    assert "1 by definition" in registration.fix_button.toolTip()
    texts = [docks.workflow.by_hand.item(r, 0).text() for r in range(docks.workflow.by_hand.rowCount())]
    assert len(texts) == 4
    assert texts[0] == "6558 eV excluded (by hand)"
    docks.workflow.by_hand.cellClicked.emit(1, 0)
    assert docks.session.frame == (1, 4)
    keys = {str(k): act for k, act in docks.viewer.keymap.items()}
    keys["Alt+Z"](docks.viewer)
    docks.wait()
    assert docks.session.state.manual.energies == {}
    keys["Alt+Shift+Z" if "Alt+Shift+Z" in keys else "Shift+Alt+Z"](docks.viewer)
    docks.wait()
    assert docks.session.state.manual.energies == {1: "by hand"}
    for _ in texts:
        docks.workflow.by_hand.selectRow(0)
        docks.click(docks.workflow.take_back_button)
    manual = docks.session.state.manual
    assert manual_rows(manual, [0.0] * 8) == []
    docks.workflow.note_edit.setText("the beam was lost")
    docks.click(docks.workflow.note_button)
    assert "note: the beam was lost" in docks.workflow.events.item(0, 0).text()
    assert Journal(copied).events[-1].payload == {"text": "the beam was lost"}


@pytest.mark.parametrize("where", ["workflow", "scan"])
def test_box_and_mask_are_suggested_drawn_used_and_cleared(open_docks: Any, tmp_path: Path, where: str) -> None:
    docks = open_docks(tmp_path / "out", begin=True)
    dock = getattr(docks, where).confinement
    other = {"workflow": docks.scan, "scan": docks.workflow}[where].confinement
    assert dock.use_box_button.toolTip() == "Draw a box, or let one be suggested."
    docks.click(dock.suggest_button)
    layer = docks.viewer.layers["particle box"]
    assert len(layer.data) == 1
    assert docks.session.layer is not None, "the scan stays the one worked on"
    assert other.use_box_button.isEnabled(), "what is drawn in one dock can be used in the other"
    docks.click(dock.use_box_button)
    assert other.box_label.text() == dock.box_label.text()
    ((y0, y1, x0, x1),) = docks.session.state.manual.boxes
    assert 0 <= y0 < 20 < 44 < y1 <= 64
    assert 0 <= x0 < 20 < 44 < x1 <= 64
    assert f"{y1 - y0} x {x1 - x0} px" in dock.box_label.text()
    layer.data = []
    layer.add_rectangles(np.array([[9.5, 11.5], [49.5, 53.5]]))
    layer.add_rectangles(np.array([[-9.0, 20.0], [29.5, 80.0]]))  # beyond the frame: cut
    docks.click(dock.use_box_button)
    assert docks.session.state.manual.boxes == ((10, 50, 12, 54), (0, 30, 20, 64))
    docks.click(dock.clear_box_button)
    assert docks.session.state.manual.boxes == ()
    docks.click(docks.workflow.undo_button)
    assert len(docks.session.state.manual.boxes) == 2

    dock.draw_mask_button.click()
    painted = docks.viewer.layers["mask"]
    painted.data[5:8, 9] = 1
    docks.click(dock.use_mask_button)
    assert "Mask of 3 pixels" in getattr(docks, where).message.text()
    kept = docks.session.workflow.journal.get_array(docks.session.state.manual.mask)
    np.testing.assert_array_equal(np.argwhere(kept), [[5, 9], [6, 9], [7, 9]])
    docks.click(dock.clear_mask_button)
    assert docks.session.state.manual.mask is None


def test_what_is_left_of_the_registration_is_seen_and_led_to(open_docks: Any, copied: Path) -> None:
    docks = open_docks(copied, begin=True)
    dock, workflow = docks.registration, docks.session.workflow
    errors = workflow.error_map()
    known = np.isfinite(errors.z)
    assert known[:LAST].any(axis=1).all()
    assert not known[LAST].any(), "the reference is compared with nothing"

    pixel = np.array([s.pixel_size_nm for s in docks.session.scan.series.scans])
    for name, expected in (
        ("displacement left (px)", errors.length_px),
        ("displacement left (nm)", errors.length_px * pixel[:, None]),
        (
            "displacement left (eV at a surface)",
            errors.effect_ev([workflow.edge_effect_ev(e) for e in range(LAST + 1)]),
        ),
        ("displacement over the usual", errors.z),
    ):
        dock.matrix_combo.setCurrentText(name)
        np.testing.assert_allclose(dock.matrix.values, expected)
    dock.matrix.press(3, 11)
    assert docks.session.frame == (3, 11)
    dock.matrix.press(3, 400)
    assert docks.session.frame == (3, 11), "beyond the matrix"

    docks.click(dock.worst_button)
    (e, i, z), (e2, i2, _) = errors.worst(2)
    assert docks.session.frame == (e, i)
    assert f"projection {i}" in dock.message.text()
    assert f"{z:.1f} times" in dock.message.text()
    docks.click(dock.worst_button)
    assert docks.session.frame == (e2, i2)

    docks.session.go_to(2, 4)
    parts = workflow.decomposition()
    np.testing.assert_allclose(dock.parts.values(0, 1)[1], parts.remainder[2, :, 0])
    np.testing.assert_allclose(dock.parts.values(1, 0)[1], parts.synchronous[:, 1])
    assert parts.text() in dock.parts_label.text()
    tests = workflow.null_tests()
    assert tests, "two energies with no edge between them"
    assert dock.null_label.text().splitlines() == [t.text() for t in tests]
    docks.session.go_to(e2, i2)

    dock.matrix_combo.setCurrentText("closure, y")
    np.testing.assert_array_equal(dock.matrix.values, workflow.joint().closure_matrix("ty"))
    dock.matrix.press(1, 2)
    assert docks.session.frame == (1, i2), "energies on both axes: the projection stays"

    dock.blocks_box.setChecked(True)
    arrows = docks.viewer.layers["parts of the object at 6558 eV"]
    found = workflow.result(dock.selected()).arrays
    measured = np.isfinite(found["block_shift"]).all(axis=2)
    assert len(arrows.data) == measured.sum() > 0
    along = arrows.data[:, 1, -2:] / found["block_shift"][measured]
    np.testing.assert_allclose(along, along.flat[0])
    assert "times as long" in dock.blocks_label.text()
    length = np.where(measured, np.hypot(*np.moveaxis(found["block_shift"], 2, 0)), np.nan)
    effect = abs(workflow.edge_effect_ev(1))
    for unit, size in (("px", 1.0), ("nm", pixel[1]), ("eV", effect)):
        dock.blocks_combo.setCurrentText(unit)
        heat = docks.viewer.layers[f"parts of the object at 6558 eV, {unit}"]
        np.testing.assert_allclose(heat.data, size * length, rtol=1e-5)
        at = heat.data_to_world((1, 2))
        np.testing.assert_allclose(at, found["block_place"][1, 2] + 31.5, rtol=1e-6)
    assert f"({np.nanmax(length) * pixel[1]:.2g} nm" in dock.blocks_label.text()
    assert [x.name for x in docks.viewer.layers].count("parts of the object at 6558 eV") == 1
    docks.session.go_to(LAST, 3)
    assert not [x for x in docks.viewer.layers if x.name.startswith("parts of the object")]
    assert "The reference has none" in dock.blocks_label.text()
    dock.blocks_box.setChecked(False)
    assert dock.blocks_label.isHidden()


def test_what_the_change_of_scale_is_and_a_test_on_the_users_own_data(open_docks: Any, copied: Path) -> None:
    docks = open_docks(copied, begin=True)
    dock, session = docks.registration, docks.session
    workflow = session.workflow
    moments = workflow.scale_report().moments
    numbers, mass = dock.moments.values(0)
    assert numbers == np.flatnonzero(np.isfinite(moments.mass) & np.isfinite(moments.size)).tolist()
    np.testing.assert_allclose(mass, 100 * moments.mass[numbers])
    numbers, width = dock.moments.values(1)
    np.testing.assert_allclose(width, 100 * moments.width[numbers])
    assert moments.text() in dock.moments_label.text()
    assert workflow.deformation().text() in dock.moments_label.text()

    session.go_to(1, 2)
    dock.change_combo.setCurrentIndex(2)
    dock.change_combo.activated.emit(2)
    docks.wait()
    assert session.state.manual.scale_change == "instrument x shrinkage"
    assert session.state[("maps", None)].status == "stale"
    assert session.state[("registration", 1)].status != "stale"
    assert "instrument x shrinkage" in dock.message.text()
    session.decide(lambda w: w.undo())
    docks.wait()
    assert session.state.manual.scale_change is None
    assert dock.change_combo.currentText() == "as in the recipe"
    assert session.state[("maps", None)].status != "stale"

    docks.click(dock.test_button)
    assert not dock.test_label.isHidden()
    assert "Test on my data" in dock.test_label.text()
    assert "scale" in dock.test_label.text()
    session.go_to(LAST, 2)
    assert not dock.test_button.isEnabled(), "the reference is compared with nothing"
    assert "1 by definition" in dock.test_button.toolTip()


def test_layers_to_look_at(open_docks: Any, copied: Path, qtbot: Any) -> None:
    docks = open_docks(copied, begin=True)
    viewer = docks.viewer
    docks.session.go_to(0, 9)
    docks.registration.aligned_box.setChecked(True)
    docks.registration.difference_box.setChecked(True)
    aligned = viewer.layers["aligned, common grid of 8570 eV"]
    difference = viewer.layers["difference to 8570 eV"]
    raw = docks.session.layer
    reference = np.asarray(aligned.data[LAST, 9])
    for e in range(7):  # stepping the energy keeps the particle still, equally dark
        frame = np.asarray(aligned.data[e, 9])
        seen = (np.abs(frame) > 0) & (np.abs(reference) > 0)
        still = np.corrcoef(frame[seen], reference[seen])[0, 1]
        unmoved = np.corrcoef(-np.asarray(raw.data[e, 9], float).ravel(), -np.asarray(raw.data[LAST, 9], float).ravel())
        assert still > 0.97, (e, still)
        assert still > unmoved[0, 1]
        body = reference > 0.3 * reference.max()
        assert frame[body].mean() == pytest.approx(reference[body].mean(), rel=0.05)
        np.testing.assert_allclose(np.asarray(difference.data[e, 9]), frame - reference, atol=1e-6)
    assert not np.asarray(difference.data[LAST, 9]).any()

    docks.registration.chess_box.setChecked(True)
    chess = np.asarray(viewer.layers["chess board with 8570 eV"].data[2, 9])
    frame = np.asarray(aligned.data[2, 9])
    fields = (np.arange(64)[:, None] // 5 + np.arange(64) // 5) % 2
    np.testing.assert_array_equal(chess, np.where(fields == 0, frame, reference))

    docks.registration.blink_box.setChecked(True)
    other = viewer.layers["reference 8570 eV"]
    np.testing.assert_array_equal(np.asarray(other.data[2, 9]), reference)
    qtbot.waitUntil(lambda: not other.visible, timeout=5000)
    qtbot.waitUntil(lambda: other.visible, timeout=5000)
    docks.registration.blink_box.setChecked(False)
    assert "reference 8570 eV" not in viewer.layers

    docks.click(docks.jitter.residual_button)
    (residual,) = [x for x in viewer.layers if x.name.startswith("residual")]
    assert residual.name == "residual (data - reprojection) at 6534 eV"
    rest = np.asarray(residual.data[0])
    assert rest.any()
    assert np.abs(rest).mean() < 0.2 * reference.max()
    assert not np.asarray(residual.data[1]).any(), "not asked for"
    docks.session.go_to(1, 9)
    docks.click(docks.jitter.residual_button)
    assert residual.name.endswith("at 6534, 6558 eV")
    assert np.asarray(residual.data[1]).any()

    assert docks.jitter.sinogram_plot.isHidden()
    docks.click(docks.jitter.sinogram_button)
    assert not docks.jitter.sinogram_plot.isHidden()
    left, axis, right = (t.getData()[0] for t in docks.jitter.sinogram_plot.traces)
    assert len(axis) == 36
    assert np.nanmean(right - left) > 20
    docks.session.go_to(2, 9)
    assert docks.jitter.sinogram_plot.isHidden(), "that of another energy is not shown as this one's"

    docks.scan.flats_box.setChecked(True)
    flats = viewer.layers["flats (reference frames)"]
    scan = docks.session.scan.series.scans[2]
    shots = [(k, i) for k, f in enumerate(scan.flats) for i in range(len(f.status))]
    assert flats.data.shape[1] == len(shots)
    np.testing.assert_array_equal(np.asarray(flats.data[2, 1]), scan.flats[0].frames.read(1))
    docks.session.go_to(2, 35)
    k, i = shots[-1]
    assert docks.scan.flat_label.text().startswith(f"flat set {k + 1}, shot {i + 1}:")
    assert viewer.dims.range[1].start <= raw.extent.world[0][1]
    docks.scan.flats_box.setChecked(False)
    assert flats not in viewer.layers


def test_problems_are_listed_and_lead_there(
    make_napari_viewer: Any, qtbot: Any, tiny_twin: Path, tmp_path: Path
) -> None:
    bad = Path(shutil.copytree(tiny_twin, tmp_path / "bad"))
    series = open_series(bad)
    (bad / series.scans[4].names[6]).unlink()
    viewer = make_napari_viewer()
    viewer.open(str(bad), plugin=PLUGIN)
    docks = Docks(viewer, qtbot)
    table = docks.scan.problems
    (row,) = [r for r in range(table.rowCount()) if "projection 6" in table.item(r, 1).text()]
    assert table.item(row, 1).text() == f"{series.scans[4].energy_ev:g} eV, projection 6"
    table.cellClicked.emit(row, 1)
    assert docks.session.frame == (4, 6)
    assert "This projection is unreadable" in docks.jitter.exclude_button.toolTip() or not docks.session.workflow
    table.cellClicked.emit(table.rowCount() + 3, 0)
    docks.close()
    assert Problem("info", "x", "m").energy_ev is None


def test_a_failing_run_is_one_sentence_in_every_dock(
    open_docks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    docks = open_docks(out, begin=True)

    def full(*_: object, **__: object) -> None:
        raise XanesTomoError("journal.jsonl: cannot be written (No space left on device); make room and go on")

    with monkeypatch.context() as patch:
        patch.setattr(Workflow, "run_unit", full)
        docks.click(docks.workflow.run_button)
    for dock in docks.all.values():
        assert dock.message.text().startswith("journal.jsonl: cannot be written (No space left")
        assert "Traceback" not in dock.message.text()
    assert {u.status for u in docks.session.state.units.values()} == {"idle"}
    docks.workflow.until_combo.setCurrentIndex(0)
    docks.click(docks.workflow.run_button)
    assert docks.workflow.overview.item(0, 1).text() == "8 of 8"


def test_recipes_are_saved_and_loaded(open_docks: Any, tmp_path: Path) -> None:
    docks = open_docks(tmp_path / "out")
    docks.jitter.form.widgets["iterations"].value = 3
    assert "iterations: 3" in docks.session.asked.to_yaml()
    docks.session.save_recipe(tmp_path / "mine.yaml")
    assert Recipe.from_yaml(tmp_path / "mine.yaml") == Recipe(jitter=JitterParameters(iterations=3))
    (tmp_path / "other.yaml").write_text("maps: {smoothing_voxel: 0.5}\n")
    docks.session.load_recipe(tmp_path / "other.yaml")
    assert docks.maps.form.value.smoothing_voxel == 0.5
    assert docks.jitter.form.value.iterations == Recipe().jitter.iterations
    assert "smoothing_voxel: 0.5" in docks.workflow.recipe_text.toPlainText()
    (tmp_path / "wrong.yaml").write_text("jiter: {}\n")
    docks.session.load_recipe(tmp_path / "wrong.yaml")
    assert "nearest known key is 'jitter'" in docks.workflow.message.text()
    docks.workflow.until_combo.setCurrentIndex(0)
    docks.click(docks.workflow.run_button)
    assert docks.session.recipe.maps.smoothing_voxel == 0.5
    (tmp_path / "binned.yaml").write_text("scan: {bin: 2}\n")
    docks.session.load_recipe(tmp_path / "binned.yaml")
    assert "begin a new output folder" in docks.workflow.message.text()
    docks.session.save_recipe(tmp_path / "none" / "r.yaml")
    assert "cannot be written" in docks.workflow.message.text()


def test_the_files_are_read_as_the_form_says_when_the_run_begins(open_docks: Any, tmp_path: Path) -> None:
    docks = open_docks(tmp_path / "out")
    assert docks.session.layer.data.shape == (8, 36, 64, 64)
    docks.scan.reading_form.widgets["bin"].value = 2
    docks.click(docks.scan.run_button)
    assert docks.session.layer.data.shape == (8, 36, 32, 32)
    assert docks.session.recipe.scan.bin == 2
    assert docks.session.state[("flats", docks.session.frame[0])].status == "candidate"
    assert not docks.scan.reading_form.enabled
    assert "Settled when the run began" in docks.scan.reading_label.text()


def test_events_and_reasons_in_words(copied: Path, tiny_twin: Path) -> None:
    with Workflow(open_series(tiny_twin), copied) as workflow:
        energies = workflow.series.energies_ev.tolist()
        workflow.exclude(2, 3)
        workflow.set_recipe(workflow.recipe.model_copy(update={"maps": MapsParameters(smoothing_voxel=2.0)}))
        reason = stale_reason(workflow.state, ("flats", 2), workflow.journal.events, energies)
        assert reason.startswith("since then: #")
        assert "7704 eV: projection 3 excluded" in reason
        assert stale_reason(workflow.state, ("flats", 1), workflow.journal.events, energies) == ""
        workflow.undo()
        assert stale_reason(workflow.state, ("maps", None), workflow.journal.events, energies) == (
            "other parameters are asked for"
        )
        workflow.nudge(1, 2, 0.5, 0.0)
        assert "nudged" in stale_reason(workflow.state, ("registration", 1), workflow.journal.events, energies)
        for event in workflow.journal.events:
            text = event_text(event, energies)
            assert text.startswith(f"#{event.seq} ")
            assert "\n" not in text


def test_voxel_sizes_are_weighed_before_mapping(open_docks: Any, copied: Path) -> None:
    docks = open_docks(copied, begin=True)
    maps, before = docks.maps, docks.session.workflow.journal.events
    chosen = docks.session.workflow.candidates("maps", None)[-1].payload["numbers"]
    titles = {maps.voxels.item(r, 0).text(): r for r in range(maps.voxels.rowCount())}
    assert maps.voxels.item(titles["noise / jump"], 1).text() == f"{chosen['voxel_choices'][0]['noise_over_jump']:.3f}"
    assert len(maps.spectrum.values(0)[0]) + len(maps.spectrum.values(0, 1)[0]) == len(chosen["mean_spectrum_per_cm"])

    # Twice the smoothing: less noise, told without a run, a decision, or another recipe.
    maps.form.value = MapsParameters(smoothing_voxel=2.0)
    maps.form.changed.emit()
    docks.click(maps.voxels_button)
    maps.refresh()
    noise = float(maps.voxels.item(titles["noise / jump"], 1).text())
    assert noise < 0.6 * chosen["voxel_choices"][0]["noise_over_jump"]
    assert docks.session.workflow.journal.events == before
    assert docks.session.workflow.recipe == Recipe()


def test_a_voxel_of_the_maps_shows_its_spectrum(open_docks: Any, copied: Path, qtbot: Any) -> None:
    docks = open_docks(copied, begin=True)
    maps = ViewerModel()
    for data, options, _ in map_layers(copied / "maps.ome.zarr"):
        maps.add_image(data, **options)
    dock = VoxelDock(maps, docks.session)
    qtbot.addWidget(dock)
    dock.show()
    mn = maps.layers["Mn"]
    at = tuple(n // 2 for n in mn.data.shape)

    def press(place: tuple[int, ...], *, drag: bool = False) -> None:
        event = SimpleNamespace(
            button=1, modifiers=(), type="mouse_press", position=tuple(float(v) for v in mn.data_to_world(place))
        )
        steps = dock._pressed(maps, event)
        next(steps, None)
        if drag:
            event.type = "mouse_move"
            next(steps, None)
        event.type = "mouse_release"
        next(steps, None)
        docks.wait()

    press(at, drag=True)
    press((0, -3, 0))
    assert dock.found is None
    press(at)
    energies = [s.energy_ev for s in docks.session.scan.series.scans]
    assert len(dock.plots[0].values(0)[0]) == len(energies)
    assert dock.text.text().startswith(f"Voxel {at[0]}, {at[1]}, {at[2]} (y, z, x)")
    assert "Mn" in dock.text.text()
    mn.metadata = {key: {**value, "key": "of other maps"} for key, value in mn.metadata.items()}
    dock.look(mn.data_to_world(at))
    assert "has made other maps since" in dock.text.text()
    docks.close()
    dock.look(mn.data_to_world(at))
    assert "no longer open" in dock.text.text()
