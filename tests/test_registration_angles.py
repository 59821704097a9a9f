"""Energies whose angles are not the recorded ones: found, corrected in what is reconstructed, and said so."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from napari_xanes_tomo import Recipe, Workflow, open_series, read_maps, write_twin
from napari_xanes_tomo.phantom import TwinParameters
from napari_xanes_tomo.recipe import MapsParameters, RegistrationParameters

TURNED = 2.0  # degrees: 0.8 px at the rim of this particle
PLAIN = TwinParameters(
    n=64,
    n_angles=48,
    energies_ev=(7704.0, 7728.0, 8178.0, 8570.0),
    grains=40,
    flats_per_set=3,
    quanta=40000.0,
    jitter_px=(1.0, 2.0),
    jitter_peak_px=4.0,
)


@pytest.fixture(scope="module")
def turned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("turned")
    for name, offset in (("plain", 0.0), ("turned", TURNED)):
        write_twin(folder / name, parameters=replace(PLAIN, angle_offset_deg=offset, angle_offset_ev=7728.0))
    return folder


@pytest.fixture(scope="module")
def maps(turned: Path) -> dict[str, np.ndarray]:
    """Cobalt without an offset, with it, and with it left as it is."""
    out = {}
    for name, correct in (("plain", True), ("turned", True), ("turned", False)):
        recipe = Recipe(
            registration=RegistrationParameters(correct_angles=correct),
            maps=MapsParameters(voxel_px=1, half_sets=False),
        )
        where = turned / f"out-{name}-{correct}"
        if not correct:  # its jitter is the same
            shutil.copytree(turned / f"out-{name}-True", where)
        with Workflow(open_series(turned / name), where, recipe if correct else None) as w:
            w.set_recipe(recipe)
            w.run()
            found = w.registered(1)
            assert found.numbers["angle_deg"] == pytest.approx(TURNED if name == "turned" else 0, abs=0.15)
            applied = name == "turned" and correct
            assert found.numbers["angle_applied_deg"] == (found.numbers["angle_deg"] if applied else 0)
            assert any("corrected" in note for note in found.quality.notes) == applied
            items, _ = w.aligned()
            recorded = np.asarray(w.series.scans[1].theta_deg)
            np.testing.assert_allclose(items[1].scan.theta_deg - recorded, found.numbers["angle_applied_deg"])
            assert [float(w.registered(e).numbers.get("angle_applied_deg", 0)) for e in (0, 2, 3)] == [0, 0, 0]
        out[name if correct else "left"] = np.asarray(read_maps(where / "maps.ome.zarr").data["Co"])
    return out


def test_the_map_of_a_turned_energy_is_as_if_it_were_not(maps: dict[str, np.ndarray]) -> None:
    known = np.all([np.isfinite(m) for m in maps.values()], axis=0)
    assert known.sum() > 1000

    def off(name: str) -> float:
        return float(np.sqrt(np.mean((maps[name][known] - maps["plain"][known]) ** 2)))

    assert off("turned") < 0.6 * off("left")
