"""Energies blurred to one point spread before they are combined: the filter, its noise, what it does to a rim."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from napari_xanes_tomo import Recipe, Workflow, open_series, write_twin
from napari_xanes_tomo.model import Alignment
from napari_xanes_tomo.phantom import TwinParameters
from napari_xanes_tomo.recipe import JitterParameters, RegistrationParameters
from napari_xanes_tomo.resample import widened, widening
from napari_xanes_tomo.uncertainty import noise_gain


@given(st.floats(0.001, 4.0))
def test_the_blur_has_the_variance_it_is_asked_for(variance: float) -> None:
    weight = widening(variance)
    at = np.arange(len(weight)) - len(weight) // 2
    assert weight.sum() == pytest.approx(1)
    assert weight @ at**2 == pytest.approx(variance, rel=1e-3)
    f = np.linspace(0, 0.5, 9)
    response = np.cos(2 * np.pi * f[:, None] * at) @ weight
    np.testing.assert_allclose(response, np.exp(-variance * (1 - np.cos(2 * np.pi * f))), atol=1e-4)


@pytest.mark.parametrize("variance", [0.1, 0.5, 2.0])
def test_a_known_width_becomes_the_wanted_one(variance: float) -> None:
    y, x = np.mgrid[-20:21, -20:21]
    spot = np.exp(-(y**2 + x**2) / (2 * 1.5**2)).astype(np.float32)[None]
    wide = widened(spot, variance)[0]
    assert wide.sum() == pytest.approx(spot.sum(), rel=1e-5)
    for axis in (y, x):
        assert (wide * axis**2).sum() / wide.sum() == pytest.approx(1.5**2 + variance, rel=1e-3)
    assert widened(spot, 0.0) is spot


@pytest.mark.parametrize("variance", [0.2, 0.6])
def test_the_standard_errors_know_the_blur(variance: float) -> None:
    """What white noise keeps after interpolation by half a pixel and the blur, without filter and smoothing."""
    from napari_xanes_tomo.resample import place

    rng = np.random.default_rng(1)
    a = Alignment(np.full((4, 2), 0.3), np.zeros((4, 2)))
    shape = (96, 96)
    noise = widened(place(rng.normal(size=(4, *shape)).astype(np.float32), a), variance)[:, 8:-8, 8:-8]
    plain = noise_gain(a, index=[0], grid_shape=shape, frame_shape=shape, bin=1, filter="ramp", smoothing=0.0)
    soft = noise_gain(
        a, index=[0], grid_shape=shape, frame_shape=shape, bin=1, filter="ramp", smoothing=0.0, widened=variance
    )
    # The same through the ramp filter, row by row.
    ramp = np.abs(np.fft.rfftfreq(noise.shape[2]))
    alone = place(rng.normal(size=(4, *shape)).astype(np.float32), a)[:, 8:-8, 8:-8]
    kept = [np.var(np.fft.irfft(np.fft.rfft(v, axis=2) * ramp, noise.shape[2], axis=2)) for v in (alone, noise)]
    assert float(soft[0] / plain[0]) == pytest.approx(kept[1] / kept[0], rel=0.06)


ENERGIES = (7704.0, 7728.0, 8178.0, 8328.0, 8338.0, 8344.0, 8350.0, 8365.0, 8400.0, 8570.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A twin whose focus changes from energy to energy, and its run up to the maps."""
    folder = tmp_path_factory.mktemp("focus")
    parameters = TwinParameters(
        n=96, n_angles=60, energies_ev=ENERGIES, flats_per_set=4, jitter_px=(0.5, 1.0), focus_blur_px=1.2, seed=5,
        valence_range_ev=0.0, quanta=60000.0,
    )  # fmt: skip
    twin = write_twin(folder / "twin", parameters=parameters)
    # The focus is measured where the band has half a pixel and more: 1.4 px of 256 px frames are that of 96 px.
    recipe = Recipe(jitter=JitterParameters(iterations=4), registration=RegistrationParameters(fine_px=1.4))
    with Workflow(open_series(twin), folder / "out", recipe) as w:
        w.run(until="registration")
    return twin, folder / "out"


def _psf(twin: Path) -> np.ndarray:
    table = np.genfromtxt(twin / "truth" / "tables" / "instrument.csv", delimiter=",", names=True)
    return np.asarray((table["psf_px"] / table["instrument_magnification"]) ** 2)


def test_widths_are_brought_to_the_widest(run: tuple[Path, Path], tmp_path: Path) -> None:
    twin, out = run
    true = _psf(twin)
    with Workflow(open_series(twin), shutil.copytree(out, tmp_path / "out")) as w:
        value, sigma = w.point_spread()
        assert np.isfinite(value).all()
        assert (sigma >= 0).all()
        assert not any(i.widen_px2 for i in w.aligned()[0]), "off unless it is asked for"
        off = (value - true) - np.median(value - true)
        assert np.std(off) < 0.35 * np.std(true)
        plain = w.state[("registration", 0)].status
        maps = w.recipe.maps.model_copy(update={"common_blur": True})
        w.set_recipe(w.recipe.model_copy(update={"maps": maps}))
        assert w.state[("registration", 0)].status == plain, "what was measured stays"
        widths = true + np.array([i.widen_px2 for i in w.aligned()[0]])
        assert np.std(widths) < 0.35 * np.std(true)
        assert min(i.widen_px2 for i in w.aligned()[0]) == 0


def test_a_fake_shell_of_valence_shrinks(run: tuple[Path, Path], tmp_path: Path) -> None:
    """Every voxel has the same edge; what the surface shows is the change of focus."""
    twin, out = run
    rim = []
    for blur in (False, True):
        with Workflow(open_series(twin), shutil.copytree(out, tmp_path / str(blur))) as w:
            maps = w.recipe.maps.model_copy(update={"common_blur": blur, "voxel_px": 1, "half_sets": False})
            w.set_recipe(w.recipe.model_copy(update={"maps": maps}))
            w.run()
        from scipy.ndimage import binary_erosion

        from napari_xanes_tomo import read_maps

        found = read_maps(w.output.maps).data
        value, mask = np.asarray(found["edge_energy_relative"]), np.asarray(found["mask"]) > 0.5
        inner = binary_erosion(mask, iterations=6)
        shell = mask & ~binary_erosion(mask, iterations=3)
        good = np.isfinite(value)
        rim.append(abs(float(np.median(value[shell & good])) - float(np.median(value[inner & good]))))
    assert rim[1] < 0.6 * rim[0], rim


def test_an_energy_of_unknown_width_is_said(
    run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin, out = run
    with Workflow(open_series(twin), shutil.copytree(out, tmp_path / "out")) as w:
        maps = w.recipe.maps.model_copy(update={"common_blur": True})
        w.set_recipe(w.recipe.model_copy(update={"maps": maps}))
        value, sigma = w.point_spread()
        items, _ = w.aligned()
        assert not w._not_blurred(items)
        value[2] = np.nan
        monkeypatch.setattr(w, "point_spread", lambda: (value, sigma))
        (said,) = w._not_blurred(items)
        assert f"{ENERGIES[2]:g} eV" in said
