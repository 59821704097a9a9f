import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from napari_xanes_tomo._napari.analysis_dock import NO_MAP, WHOLE, AnalysisDock
from napari_xanes_tomo._napari.layers import METADATA_KEY

SHAPE = (24, 40, 40)


@pytest.fixture
def viewer(make_napari_viewer: Any) -> Any:
    """A viewer with maps of two halves, nickel 1 and 2 with an edge 0.5 eV apart, and noise."""
    viewer = make_napari_viewer()
    rng = np.random.default_rng(0)
    right = np.broadcast_to(np.arange(SHAPE[2]) >= SHAPE[2] // 2, SHAPE)
    mask = np.zeros(SHAPE, np.float32)
    mask[:, 4:-4, 4:-4] = 1
    maps = {
        "Ni": (
            1.0 + right + rng.normal(0, 0.1, SHAPE),
            {"unit": "g/cm3", "systematic_relative": {"table": 0.03, "m": 0.04}},
        ),
        "Ni_fraction": (0.3 + 0.3 * right + rng.normal(0, 0.05, SHAPE), {"unit": "1"}),
        "edge_energy_relative": (0.5 * right + rng.normal(0, 0.1, SHAPE), {"unit": "eV"}),
        "Ni_fraction_sigma": (np.full(SHAPE, 0.05), {}),
        "edge_energy_relative_sigma": (np.full(SHAPE, 0.1), {}),
        "mask": (mask, {}),
    }  # fmt: skip
    for name, (data, facts) in maps.items():
        facts = {"map": name, "psf_sigma_voxel": 0.4, **facts}
        viewer.add_image(data.astype(np.float32), name=name, scale=(0.1,) * 3, metadata={METADATA_KEY: facts})
    return viewer


@pytest.fixture
def dock(viewer: Any) -> AnalysisDock:
    dock = AnalysisDock(viewer)
    viewer.window.add_dock_widget(dock, name="Analysis")
    return dock


def pressed(qtbot: Any, dock: AnalysisDock, button: Any) -> None:
    assert button.isEnabled(), button.toolTip()
    with qtbot.waitSignal(dock.jobs.ended, timeout=30_000):
        button.click()


def test_means_of_regions_and_a_correlation(qtbot: Any, viewer: Any, dock: AnalysisDock, tmp_path: Path) -> None:
    assert [dock.map_combo.itemText(i) for i in range(dock.map_combo.count())] == [
        "edge_energy_relative", "Ni_fraction", "Ni",
    ]  # fmt: skip
    assert not dock.save_button.isEnabled()
    dock.map_combo.setCurrentText("Ni")
    pressed(qtbot, dock, dock.means_button)
    assert dock.found.means.mean[0] == pytest.approx(1.5, abs=0.01)
    assert dock.means.item(0, 2).text().endswith(" g/cm3")
    assert dock.found.systematic == pytest.approx(0.05)
    assert dock.correlation_label.text() == ""

    dock.regions_button.click()
    regions = viewer.layers["regions"]
    np.testing.assert_allclose(regions.scale, viewer.layers["Ni"].scale)
    assert dock.region_combo.currentText() == "regions"
    pressed(qtbot, dock, dock.means_button)  # nothing is painted yet
    assert "found no voxel" in dock.message.text()
    regions.data[:, :, : SHAPE[2] // 2] = 1
    regions.data[:, :, SHAPE[2] // 2 :] = 2
    dock.other_combo.setCurrentText("edge_energy_relative")
    pressed(qtbot, dock, dock.means_button)
    np.testing.assert_allclose(dock.found.means.mean, [1, 2], atol=0.01)
    assert dock.found.means.voxels.tolist() == [SHAPE[0] * 32 * 16] * 2
    assert 0 < dock.found.means.sigma[0] < 0.01
    # r of the two: variance 0.25 of each half beside noise of 0.01, and 0.0625 beside 0.01.
    expected = np.sqrt(0.25 / 0.26 * 0.0625 / 0.0725)
    assert dock.found.correlation.r == pytest.approx(expected, abs=0.01)
    assert f"r = {dock.found.correlation.r:.3f}" in dock.correlation_label.text()
    assert not dock.scatter.isHidden()

    dock._save(str(tmp_path / "regions.csv"))
    rows = list(csv.DictReader((tmp_path / "regions.csv").read_text().splitlines()))
    assert [(r["map"], r["region"]) for r in rows] == [("Ni", "1"), ("Ni", "2")]
    assert float(rows[1]["mean"]) == dock.found.means.mean[1]
    dock._save(str(tmp_path / "no" / "such.csv"))
    assert "cannot be written" in dock.message.text()


def test_groups_become_regions(qtbot: Any, viewer: Any, dock: AnalysisDock) -> None:
    dock.groups.setValue(2)
    pressed(qtbot, dock, dock.groups_button)
    labels = viewer.layers["2 groups"].data
    inside = np.asarray(viewer.layers["mask"].data) > 0.5
    assert np.all(labels[~inside] == 0)
    right = np.broadcast_to(np.arange(SHAPE[2]) >= SHAPE[2] // 2, SHAPE)[inside]
    agreement = np.mean((labels[inside] == labels[inside][right.argmax()]) == right)
    assert agreement > 0.99
    dock.map_combo.setCurrentText("Ni")
    pressed(qtbot, dock, dock.means_button)
    np.testing.assert_allclose(np.sort(dock.found.means.mean), [1, 2], atol=0.02)


def test_what_does_not_fit_is_told(qtbot: Any, viewer: Any, dock: AnalysisDock) -> None:
    viewer.add_labels(np.ones((3, 4, 5), np.uint8), name="elsewhere")
    dock.region_combo.setCurrentText("elsewhere")
    pressed(qtbot, dock, dock.means_button)
    assert "expected labels of the maps' shape (24, 40, 40), got (3, 4, 5)" in dock.message.text()
    viewer.layers.remove("Ni_fraction_sigma")
    viewer.layers.remove("edge_energy_relative_sigma")
    dock.groups_button.click()
    assert "found none" in dock.message.text()
    assert dock.region_combo.findText(WHOLE) == 0
    assert dock.other_combo.findText(NO_MAP) == 0
    for layer in list(viewer.layers):
        viewer.layers.remove(layer)
    assert not dock.means_button.isEnabled()
    assert "no map" in dock.means_button.toolTip()
