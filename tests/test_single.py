"""2-D XANES in a run: images of known amounts per area, moved and magnified, give the amounts back."""

from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from napari_xanes_tomo import Recipe, Workflow, read_maps
from napari_xanes_tomo.edges import mass_attenuation
from napari_xanes_tomo.export import export_workflow
from napari_xanes_tomo.io.store import read_energies
from napari_xanes_tomo.model import ArrayFrames, EnergyScan, FlatSet, Series, XanesTomoError
from napari_xanes_tomo.recipe import MapsParameters
from napari_xanes_tomo.single import is_single

ENERGIES = np.array([7704.0, 7728, 8178, 8250, 8325, 8345, 8350, 8356, 8365, 8380, 8450, 8570])
N = 128
BEAM = 20000.0


def amounts() -> dict[str, np.ndarray]:
    """Co and Ni of a grainy particle per area, mg/cm2, on the grid of the reference."""
    axis = np.arange(N) - (N - 1) / 2
    y, x = np.meshgrid(axis, axis, indexing="ij")
    rng = np.random.default_rng(7)
    grains = np.zeros((N, N))
    for _ in range(60):
        at, size = rng.uniform(-30, 30, 2), rng.uniform(2, 5)
        grains += 0.3 * np.exp(-((y - at[0]) ** 2 + (x - at[1]) ** 2) / (2 * size**2))
    body = (0.6 + grains) / (1 + np.exp(0.9 * (np.sqrt(y**2 + (1.2 * x) ** 2) - 40)))
    return {"Co": 0.4 * body * (1 + 0.002 * x), "Ni": body * (1 - 0.002 * x)}


def measured(seed: int = 0) -> tuple[Series, dict[str, np.ndarray], np.ndarray]:
    """A series of three exposures an energy at one angle, its amounts, and the true (magnification, dy, dx)."""
    rng = np.random.default_rng(seed)
    truth = amounts()
    axis = np.arange(N) - (N - 1) / 2
    table = {e: mass_attenuation(e, ENERGIES) * 1e-3 for e in truth}
    scans, place = [], []
    for k, energy in enumerate(ENERGIES):
        smooth = 0.12 * (energy / 8000) ** -3.0 * (truth["Co"] + truth["Ni"])
        od = sum(truth[e] * table[e][k] for e in truth) + smooth
        m = ENERGIES[-1] / energy  # more pixels on the object at lower energy
        dy, dx = (0.0, 0.0) if k == len(ENERGIES) - 1 else rng.uniform(-5, 5, 2)
        y, x = np.meshgrid((axis - dy) / m, (axis - dx) / m, indexing="ij")
        seen = map_coordinates(od, [y + (N - 1) / 2, x + (N - 1) / 2], order=3, mode="nearest")
        beam = BEAM * (1 + 0.1 * np.sin(np.arange(N) / 20))[None] * np.ones((N, N))
        counts = rng.poisson(beam * np.exp(-seen), (3, N, N)).astype("u2")
        flats = FlatSet(ArrayFrames(rng.poisson(beam, (8, N, N)).astype("u2")), np.ones(8), ("ok",) * 8)
        pixel = 40.0 / m
        scans.append(
            EnergyScan(
                float(energy), np.full(3, 6.97), ArrayFrames(counts), np.ones(3), ("ok",) * 3, (flats,),
                np.zeros(3, dtype=int), 1, pixel, np.full(3, np.nan),
            )
        )  # fmt: skip
        place.append((m, dy, dx))
    return Series("images", tuple(scans), (), (len(scans), 3 * len(scans), 8 * len(scans))), truth, np.array(place)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Series, dict[str, np.ndarray], np.ndarray]:
    series, truth, place = measured()
    out = tmp_path_factory.mktemp("single") / "out"
    with Workflow(series, out, Recipe(maps=MapsParameters(smoothing_voxel=1, shape_smoothing=1))) as workflow:
        workflow.run()
        assert all("not needed" in workflow.candidates("jitter", e)[0].quality.notes[0] for e in range(12))
    return out, series, truth, place


def test_images_are_registered(run):
    out, series, _, place = run
    with Workflow(series, out) as workflow:
        for e, (m, dy, dx) in enumerate(place):
            found = workflow.alignment(e)
            assert found.magnification == pytest.approx(m, abs=1e-3)
            np.testing.assert_allclose(found.shift, np.tile([dy, dx], (3, 1)), atol=0.12)
    rows = read_energies(out / "tables" / "energies.csv")
    assert [r.status for r in rows] == ["ok"] * 12
    assert all(np.isnan(r.center_px) for r in rows)  # there is no rotation axis


def test_amounts_per_area_come_back(run):
    from scipy.ndimage import gaussian_filter

    out, _, truth, _ = run
    maps = read_maps(out / "maps.ome.zarr")
    assert (maps.units["Ni"], maps.voxel_nm) == ("mg/cm2", 40.0)
    axis = np.arange(N) - (N - 1) / 2
    y, x = np.meshgrid(axis, axis, indexing="ij")
    core = np.sqrt(y**2 + (1.2 * x) ** 2) < 30
    for element, amount in truth.items():
        value = np.asarray(maps.data[element])[:, 0]
        expected = gaussian_filter(amount, 1)
        assert value[core].mean() == pytest.approx(expected[core].mean(), rel=0.02)
        assert np.corrcoef(value[core], expected[core])[0, 1] > 0.9
        ratio = (value - expected)[core] / np.asarray(maps.data[f"{element}_sigma"])[:, 0][core]
        assert 0.6 < np.sqrt(np.mean(ratio**2)) < 1.6
    assert abs(np.nanmean(np.asarray(maps.data["edge_energy_relative"])[:, 0][core])) < 0.2


def test_what_other_programs_get(run, tmp_path):
    out, series, _, _ = run
    with Workflow(series, out) as workflow:
        made = export_workflow(workflow, tmp_path / "aligned", "aligned-tiff", only=[8570])
        import tifffile

        # The reference is where it was: what is placed is its own absorbance.
        item = tifffile.imread(made.files[0])
        assert item.shape in ((N, N), (1, N, N))
        with pytest.raises(XanesTomoError, match="expected projections"):
            export_workflow(workflow, tmp_path / "volumes", "volumes-tiff")
        export_workflow(workflow, tmp_path / "shifts", "shifts")


def test_what_counts_as_2d_xanes(run):
    series = run[1]
    assert is_single(series)
    from dataclasses import replace

    turned = replace(series.scans[0], theta_deg=np.array([0.0, 1.0, 2.0]))
    assert not is_single(replace(series, scans=(turned, *series.scans[1:])))
    assert not is_single(replace(series, scans=series.scans[:1]))
    # A tomogram of which one projection is there.
    part = [
        replace(s, theta_deg=np.array([0.0, 45.0, 90.0]), status=("ok", *["unreadable:missing"] * 2))
        for s in series.scans
    ]
    assert not is_single(replace(series, scans=tuple(part)))


def test_a_real_pair_of_energies(data_dir, tmp_path):
    from napari_xanes_tomo import open_series

    series = open_series(data_dir / "ssrl_xanes")
    assert is_single(series)
    with Workflow(series, tmp_path / "out") as workflow:
        state = workflow.run(until="registration")
        done = [e for e in range(len(series.scans)) if state[("registration", e)].candidate is not None]
        assert series.energies_ev[done].tolist() == [8324, 8354]
