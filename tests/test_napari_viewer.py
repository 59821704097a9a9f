"""In a real viewer (OpenGL under Xvfb): opening, sliders, docks from the menu, what is left after closing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from napari_xanes_tomo.io.scan import open_series
from napari_xanes_tomo.io.store import EnergyRow, Journal, MapSpec, MapStore, write_energies
from napari_xanes_tomo.io.xrm import write_xrm
from napari_xanes_tomo.model import XanesTomoError

pytest.importorskip("napari")
pytest.importorskip("qtpy.QtWidgets")

from qtpy.QtWidgets import QDockWidget

from napari_xanes_tomo._napari import session as session_module
from napari_xanes_tomo._napari import view
from napari_xanes_tomo._napari.docks import attach_docks
from napari_xanes_tomo._napari.layers import face_images, map_layers, scan_of

PLUGIN = "napari-xanes-tomo"


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def txrm(tiny_twin: Path, tmp_path: Path) -> Path:
    """One energy of the twin as a stack."""
    scan = open_series(tiny_twin).scans[-1]
    path = tmp_path / "stack_08570.00_eV.txrm"
    frames = np.stack([scan.frames.read(i) for i in range(12)])
    write_xrm(path, frames, energy_ev=scan.energy_ev, theta_deg=scan.theta_deg[:12], exposure_s=1.0)
    return path


def test_every_kind_of_path_opens_and_the_slider_shows_the_frame(
    make_napari_viewer: Callable[..., Any], qtbot: Any, tiny_twin: Path, txrm: Path
) -> None:
    series = open_series(tiny_twin)
    script = next(tiny_twin.glob("*.txt"))
    frame = tiny_twin / series.scans[-1].names[4]
    viewer = make_napari_viewer()
    for path, shape in ((script, (8, 36)), (tiny_twin, (8, 36)), (frame, (1, 1)), (txrm, (1, 12))):
        viewer.layers.clear()
        (layer,) = viewer.open(str(path), plugin=PLUGIN)
        qtbot.waitUntil(lambda: viewer.canvas.overlays.text.visible, timeout=5000)  # attached after the reader ran
        assert layer.data.shape == (*shape, 64, 64)
        assert layer.locked
        assert viewer.dims.axis_labels[:2] == ("energy", "angle")
        scans = series.scans if shape[0] == 8 else series.scans[-1:]
        first = 4 if path == frame else 0
        for step in ((0, 0), (shape[0] - 1, shape[1] - 1), (shape[0] // 2, shape[1] // 3)):
            viewer.dims.set_current_step((0, 1), step)
            shown = np.asarray(layer._slice.image.view)
            np.testing.assert_array_equal(shown, scans[step[0]].frames.read(first + step[1]))
            assert f"{scans[step[0]].energy_ev:.2f} eV" in viewer.canvas.overlays.text.text


def test_a_text_that_is_no_script_is_refused(make_napari_viewer: Callable[..., Any], tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("nothing to collect\n")
    viewer = make_napari_viewer()
    with pytest.raises(Exception, match="refused"):
        viewer.open(str(notes), plugin=PLUGIN)
    assert not viewer.layers


def test_the_sample_opens_from_the_menu(make_napari_viewer: Callable[..., Any], tmp_path: Path) -> None:
    viewer = make_napari_viewer()
    (layer,) = viewer.open_sample(PLUGIN, "tiny-twin")
    assert layer.data.shape == (8, 36, 64, 64)
    assert scan_of(layer) is not None
    assert list((tmp_path / "cache").rglob("*.xrm"))


def test_the_dock_comes_from_the_menu_works_and_goes(
    make_napari_viewer: Callable[..., Any], qtbot: Any, tiny_twin: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    viewer = make_napari_viewer()
    viewer.open(str(tiny_twin), plugin=PLUGIN)
    outer, dock = viewer.window.add_plugin_dock_widget(PLUGIN, "Jitter correction")
    assert dock.minimumWidth() >= 400
    dock.out_edit.setText(str(out))
    dock.session.go_to(1, 3)
    dock.run_button.click()
    qtbot.waitUntil(lambda: not dock.session.busy, timeout=60_000)
    qtbot.waitUntil(dock.accept_button.isEnabled, timeout=5000)
    dock.aligned_box.setChecked(True)
    viewer.dims.set_current_step(1, 20)
    aligned = viewer.layers["aligned, jitter corrected"]
    assert np.asarray(aligned._slice.image.view).any()
    assert "6558.00 eV" in viewer.canvas.overlays.text.text
    outer.setFloating(True)
    outer.setFloating(False)
    dock.accept_button.click()
    qtbot.waitUntil(lambda: not dock.session.busy, timeout=60_000)
    assert Journal(out).events[-1].kind == "decision"
    session = dock.session
    viewer.window.remove_dock_widget(outer)  # what its x does
    qtbot.waitUntil(lambda: not session_module._sessions, timeout=5000)
    assert session.workflow is None
    assert not (out / ".lock").exists(), "the output folder is free again"
    viewer.dims.set_current_step(1, 10)  # nobody listens any more


def test_closing_the_window_while_it_runs(
    make_napari_viewer: Callable[..., Any], qtbot: Any, tiny_twin: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    viewer = make_napari_viewer()
    viewer.open(str(tiny_twin), plugin=PLUGIN)
    dock = attach_docks(viewer)["Jitter correction"]
    assert {"Jitter correction"} <= {d.windowTitle() for d in viewer.window._qt_window.findChildren(QDockWidget)}
    dock.out_edit.setText(str(out))
    dock.energies_combo.setCurrentIndex(1)
    dock.run_button.click()
    qtbot.waitUntil(lambda: any(e.kind == "candidate" for e in Journal(out).events), timeout=60_000)
    del dock
    viewer.close()
    qtbot.waitUntil(lambda: not session_module._sessions, timeout=5000)
    qtbot.waitUntil(lambda: not (out / ".lock").exists(), timeout=60_000)


# --------------------------------------------------------------------------------------------------- xanes-tomo view


def test_view_opens_a_scan_with_its_docks(make_napari_viewer: Any, monkeypatch: Any, tiny_twin: Path) -> None:
    viewer = make_napari_viewer()
    monkeypatch.setattr(view.napari, "Viewer", lambda **_: viewer)
    view.main(tiny_twin, block=False)
    assert scan_of(viewer.layers[0]) is not None
    assert session_module.session_of(viewer).scan is scan_of(viewer.layers[0])


def test_view_opens_the_maps_of_a_run(make_napari_viewer: Any, monkeypatch: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "tables").mkdir(parents=True)
    write_energies(out / "tables" / "energies.csv", [EnergyRow(8570.0, 1.0), EnergyRow(6534.0, 1.3381234567)])
    store = MapStore(out / "maps.ome.zarr", (8, 12, 12), 100.0, [MapSpec("Ni", "g/cm3", "", 0.0)], slab_rows=8, key="k")
    store.create()
    store.write(0, {"Ni": np.full((8, 12, 12), 2.5, np.float32)})
    store.finish(absent={}, metadata={})
    viewer = make_napari_viewer()
    monkeypatch.setattr(view.napari, "Viewer", lambda **_: viewer)
    view.main(out, block=False)
    assert viewer.dims.axis_labels == ("y", "z", "x")
    np.testing.assert_allclose(viewer.layers["Ni"].scale, 0.1)
    assert viewer.canvas.overlays.scale_bar.visible
    assert viewer.layers["Ni"].colorbar.visible
    assert viewer.canvas.overlays.text.text == "Ni  |  g/cm3"
    assert viewer.dims.displayed == (1, 2)
    viewer.layers["Ni"].visible = False
    assert viewer.canvas.overlays.text.text == ""
    table = next(
        d for d in viewer.window._qt_window.findChildren(QDockWidget) if d.windowTitle() == "Energies"
    ).widget()
    assert table.rowCount() == 2
    assert table.item(1, 1).text() == "1.33812"
    assert table.item(1, 2).text() == "", "what was not measured is empty"


def test_areal_maps_lie_flat_on_the_screen(make_napari_viewer: Any, tmp_path: Path) -> None:
    store = MapStore(
        tmp_path / "m.ome.zarr", (9, 1, 12), 100.0, [MapSpec("Ni", "mg/cm2", "", 0.0)], slab_rows=9, key="k"
    )
    store.create()
    store.write(0, {"Ni": np.ones((9, 1, 12), np.float32)})
    store.finish(absent={}, metadata={})
    viewer = make_napari_viewer()
    for data, options, _ in map_layers(tmp_path / "m.ome.zarr"):
        viewer.add_image(data, **options)
    face_images(viewer)
    assert viewer.dims.displayed == (0, 2)


def test_view_says_what_it_expected(tmp_path: Path) -> None:
    with pytest.raises(XanesTomoError, match="got no such path"):
        view.main(tmp_path / "gone", block=False)
    (tmp_path / "picture.png").write_bytes(b"x")
    with pytest.raises(XanesTomoError, match="got something else"):
        view.main(tmp_path / "picture.png", block=False)
    with h5py.File(tmp_path / "reg.h5", "w") as file:
        file["registration_results/reg_results/registered_xanes3D"] = np.zeros((2, 3, 4, 5), np.float32)
        file["registration_results/reg_results/eng_list"] = [8.3, 8.4]
    with pytest.raises(XanesTomoError, match=r"size of a pixel.*load a recipe with it.*`xanes-tomo run reg.h5 --out"):
        view.main(tmp_path / "reg.h5", block=False)
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "journal.jsonl").write_text("")
    with pytest.raises(XanesTomoError, match="no maps yet"):
        view.main(begun, block=False)
    shutil.rmtree(begun)
    begun.mkdir()
    with pytest.raises(XanesTomoError, match="found none; run it"):
        view.open_maps(begun)


def test_the_manifest_is_valid() -> None:
    from npe2 import PluginManifest

    manifest = PluginManifest.from_distribution(PLUGIN)
    assert manifest.display_name == "XANES tomography"
    assert manifest.contributions.commands
    for command in manifest.contributions.commands:
        module, _, name = str(command.python_name).partition(":")
        assert callable(getattr(import_module(module), name))
