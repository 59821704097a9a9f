"""Measures of an edge in many spectra: known truth, laws, errors, and what cannot be measured."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_xanes_tomo.phantom import PRESETS, ni_xanes
from napari_xanes_tomo.spectra import MEASURES, EdgeMeasures, edge_measures, edge_shift

EDGE = 8333.0
DENSE = np.concatenate(
    [np.arange(8178.0, 8328.0, 15.0), np.arange(8328.0, 8371.0, 1.0), np.arange(8390.0, 8571.0, 20.0)]
)
SPARSE = np.array([e for e in PRESETS["demo"].energies_ev if e > 8100])
JUMP = 250.0
ALL = tuple(MEASURES)


def attenuation(energy: np.ndarray, shift: float, level: float = 300.0, slope: float = -0.05, jump: float = JUMP):
    return level + slope * (energy - EDGE) + jump * ni_xanes(energy, shift)


def setup(energy: np.ndarray, **options: object) -> EdgeMeasures:
    found = edge_measures(energy, attenuation(energy, 0.0), EDGE, **options)
    assert isinstance(found, EdgeMeasures)
    return found


def truth(shift: float) -> dict[str, float]:
    """The same of the curve itself, on a grid of 1 meV."""
    e = np.arange(8300.0, 8380.0, 0.001)
    y = ni_xanes(e, shift)
    window = (e >= EDGE - 15) & (e <= EDGE + 30)
    return {
        "edge_energy_half": e[np.argmax(y >= 0.5)],
        "edge_energy_50": e[np.argmax(y >= 0.5 * y.max())],
        "edge_energy_derivative": e[np.argmax(np.gradient(y))],
        "edge_energy_integral": EDGE + 30 - np.trapezoid(y[window], e[window]),
        "white_line": e[np.argmax(y)],
        "white_line_height": y.max(),
    }


# Largest error without noise for shifts of -1..1 eV, with energies 1 eV and 3 to 5 eV apart. The post-edge line
# includes the shoulder behind the white line (0.6 eV of the integral), and cubics are blunt at an asymmetric peak.
TOLERANCE = {
    "edge_energy_half": (0.03, 0.12),
    "edge_energy_50": (0.06, 0.12),
    "edge_energy_derivative": (0.35, 0.70),
    "edge_energy_integral": (0.70, 0.60),
    "white_line": (0.20, 1.05),
    "white_line_height": (0.03, 0.03),
}


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize(("which", "energies"), [(0, DENSE), (1, SPARSE)])
@pytest.mark.parametrize("name", ALL)
def test_known_edges(name: str, which: int, energies: np.ndarray, free: bool) -> None:
    shifts = (-1.0, -0.4, 0.0, 0.5, 1.0)
    y = np.stack([attenuation(energies, s, level=120.0, slope=-0.02, jump=90.0) for s in shifts], axis=1)
    found = setup(energies, free_slopes=free).measure([name], y)[name]
    for value, s in zip(found.value, shifts, strict=True):
        assert value == pytest.approx(truth(s)[name], abs=TOLERANCE[name][which])
    assert np.isnan(found.sigma).all()  # no variance was given


# Bias and scatter of 4000 noisy spectra, energies 1 eV apart: (largest bias beside that without noise, largest
# scatter) in eV at a noise / jump of 0.02, 0.06 (the warning) and 0.10.
NOISE = {
    "shift": ((0.01, 0.05), (0.02, 0.14), (0.03, 0.25)),
    "edge_energy_half": ((0.02, 0.07), (0.03, 0.21), (0.04, 0.36)),
    "edge_energy_50": ((0.02, 0.07), (0.03, 0.21), (0.04, 0.36)),
    "edge_energy_derivative": ((0.03, 0.11), (0.06, 0.35), (0.30, 1.20)),
    "edge_energy_integral": ((0.03, 0.33), (0.06, 1.00), (0.12, 1.65)),
    "white_line": ((0.03, 0.15), (0.06, 0.43), (0.12, 0.70)),
    "white_line_height": ((0.01, 0.02), (0.02, 0.05), (0.03, 0.08)),
}


@pytest.mark.parametrize("name", list(NOISE))
def test_bias_and_scatter_under_noise(name: str) -> None:
    rng = np.random.default_rng(5)
    clean = attenuation(DENSE, 0.0)
    for noise, (bias, scatter) in zip((0.02, 0.06, 0.10), NOISE[name], strict=True):
        y = clean[:, None] + noise * JUMP * rng.normal(size=(len(DENSE), 4000))
        variance = np.full(len(DENSE), (noise * JUMP) ** 2)
        if name == "shift":
            linear = edge_shift(DENSE, clean, EDGE)
            assert linear is not None
            found, zero = linear.measure(y, variance=variance)[0], 0.0
        else:
            found = setup(DENSE).measure([name], y, variance=variance)[name]
            zero = setup(DENSE).measure([name], clean[:, None])[name].value[0]
        good = np.isfinite(found.value)
        assert good.mean() > 0.95
        error = found.value[good] - zero
        assert abs(error.mean()) < bias
        assert error.std() < scatter
        if noise <= 0.06:  # first-order errors: beyond the warning they are too small for crossings and maxima
            assert 0.85 < np.sqrt(np.mean((error / found.sigma[good]) ** 2)) < 1.25


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("energies", [DENSE, SPARSE])
@pytest.mark.parametrize("free", [False, True])
def test_the_error_is_that_of_the_derivatives(name: str, energies: np.ndarray, free: bool) -> None:
    measures = setup(energies, free_slopes=free)
    y = attenuation(energies, 0.3, level=200.0)
    variance = np.random.default_rng(1).uniform(0.5, 2, len(energies))
    step = 1e-3
    moved = y[:, None] + step * np.concatenate([np.eye(len(y)), -np.eye(len(y))], axis=1)
    v = measures.measure([name], moved)[name].value
    slope = (v[: len(y)] - v[len(y) :]) / (2 * step)
    found = measures.measure([name], y[:, None], variance=variance)[name].sigma[0]
    assert found == pytest.approx(np.sqrt(np.sum(slope**2 * variance)), rel=1e-4)
    each = measures.measure([name], y[:, None], variance=variance[:, None])[name].sigma[0]
    assert each == pytest.approx(found, rel=1e-12)


GRIDS = st.sampled_from([DENSE, SPARSE])


@given(st.floats(1e-3, 1e3), st.floats(0, 1e3), st.floats(-1.2, 1.2), st.sampled_from(ALL), GRIDS)
@settings(max_examples=60)
def test_amount_and_other_matter_do_not_count(
    amount: float, level: float, shift: float, name: str, energies: np.ndarray
) -> None:
    measures = setup(energies)
    y = attenuation(energies, shift)
    # What else is in the voxel falls as the pre-edge line of the mean does.
    line = level * (1 + measures_slope(energies) * (energies - EDGE))
    one, other = measures.measure([name], np.stack([y, amount * (y + line)], axis=1))[name].value
    assert other == pytest.approx(one, abs=1e-6)


def measures_slope(energies: np.ndarray) -> float:
    use = energies - EDGE <= -20
    slope, level = np.polyfit(energies[use] - EDGE, attenuation(energies, 0.0)[use], 1)
    return float(slope / level)


@given(st.floats(-500, 500), st.floats(-1, 1), st.sampled_from(ALL))
@settings(max_examples=40)
def test_free_slopes_forget_any_line(level: float, slope: float, name: str) -> None:
    measures = setup(DENSE, free_slopes=True)
    y = attenuation(DENSE, 0.4)
    pair = np.stack([y, y + level + slope * (DENSE - EDGE)], axis=1)
    one, other = measures.measure([name], pair)[name].value
    assert other == pytest.approx(one, abs=1e-6)


@given(st.floats(-3000, 3000), st.sampled_from(ALL))
@settings(max_examples=40)
def test_another_zero_of_the_energies_moves_only_the_energies(offset: float, name: str) -> None:
    y = attenuation(DENSE, 0.4)[:, None]
    here = setup(DENSE).measure([name], y)[name].value[0]
    moved = edge_measures(DENSE + offset, attenuation(DENSE, 0.0), EDGE + offset)
    assert isinstance(moved, EdgeMeasures)
    there = moved.measure([name], y)[name].value[0]
    assert there == pytest.approx(here + (offset if MEASURES[name][0] == "eV" else 0), abs=1e-6)


@given(st.permutations(range(len(SPARSE))), st.sampled_from(ALL))
@settings(max_examples=20)
def test_order_and_repetition_of_energies_do_not_matter(order: list[int], name: str) -> None:
    y = attenuation(SPARSE, 0.4)
    twice = np.concatenate([SPARSE[list(order)], SPARSE])
    found = edge_measures(twice, attenuation(twice, 0.0), EDGE)
    assert isinstance(found, EdgeMeasures)
    again = found.measure([name], np.concatenate([y[list(order)], y])[:, None])[name].value[0]
    assert again == pytest.approx(setup(SPARSE).measure([name], y[:, None])[name].value[0], abs=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_what_is_not_a_spectrum_is_nan_and_harms_no_other(name: str) -> None:
    measures = setup(DENSE)
    good = attenuation(DENSE, 0.2)
    hole, infinite = good.copy(), good.copy()
    hole[20], infinite[3] = np.nan, np.inf
    bad = [hole, infinite, np.zeros_like(good), -good, good[::-1]]
    found = measures.measure([name], np.stack([good, *bad, good], axis=1), variance=np.ones(len(good)))[name]
    alone = measures.measure([name], good[:, None])[name].value[0]
    np.testing.assert_allclose(found.value[[0, -1]], alone, rtol=1e-12)
    assert np.isfinite(found.sigma[[0, -1]]).all()
    assert np.isnan(found.value[1:-1]).all()
    assert np.isnan(found.sigma[1:-1]).all()


def test_many_spectra_are_the_single_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    from napari_xanes_tomo import spectra

    rng = np.random.default_rng(2)
    y = np.stack([attenuation(DENSE, s) for s in rng.uniform(-1, 1, 23)], axis=1) + rng.normal(size=(len(DENSE), 23))
    variance = rng.uniform(1, 2, y.shape)
    whole = setup(DENSE).measure(ALL, y, variance=variance)
    monkeypatch.setattr(spectra, "_BLOCK", 5)
    for name, found in setup(DENSE).measure(ALL, y, variance=variance).items():
        np.testing.assert_allclose(found.value, whole[name].value, rtol=1e-12)
        np.testing.assert_allclose(found.sigma, whole[name].sigma, rtol=1e-9)


@pytest.mark.parametrize(
    ("energies", "absent"),
    [
        ([8178.0, 8344.0, 8570.0], set(ALL) - {"edge_energy_half"}),
        ([8178.0, 8336.0, 8340.0, 8343.0, 8346.0, 8570.0], {"white_line", "white_line_height", "edge_energy_50"}),
        ([8178.0, 8355.0, 8360.0, 8570.0], set(ALL) - {"edge_energy_half"}),
        (list(SPARSE), set()),
    ],
)
def test_what_the_energies_cannot_give_is_absent_with_a_reason(energies: list[float], absent: set[str]) -> None:
    found = setup(np.array(energies))
    assert set(found.absent) >= absent - {"edge_energy_integral"}
    assert all(len(why) > 20 for why in found.absent.values())
    if not absent:
        assert not found.absent


@pytest.mark.parametrize(
    ("energies", "mean", "why"),
    [
        (DENSE[DENSE > 8320], None, "below the edge"),
        (DENSE[DENSE < 8380], None, "above the edge"),
        (DENSE, -attenuation(DENSE, 0.0), "does not rise"),
        (DENSE, np.full(len(DENSE), np.nan), "not finite"),
    ],
)
def test_no_normalisation_no_measures(energies: np.ndarray, mean: np.ndarray | None, why: str) -> None:
    found = edge_measures(energies, attenuation(energies, 0.0) if mean is None else mean, EDGE)
    assert isinstance(found, str)
    assert why in found


def test_the_normalisation_is_named_with_its_windows() -> None:
    text = setup(DENSE, pre_ev=(-155.0, -20.0), post_ev=(67.0, 237.0)).description
    assert "8178..8313 eV" in text
    assert "8400..8570 eV" in text
    assert "particle's mean" in text
    assert "fitted to every voxel" in setup(DENSE, free_slopes=True).description


# ----------------------------------------------------------------------------------------- the default measure


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_many_shifts_at_once(dtype: type) -> None:
    linear = edge_shift(DENSE, attenuation(DENSE, 0.0), EDGE)
    assert linear is not None
    shifts = np.linspace(-1.5, 1.5, 31)
    y = np.stack([attenuation(DENSE, s, jump=100.0) for s in shifts], axis=1).astype(dtype)
    y[5, 3] = np.nan
    found, level = linear.measure(y, variance=np.ones(len(DENSE)))
    assert found.value.dtype == found.sigma.dtype == dtype
    good = np.arange(len(shifts)) != 3
    np.testing.assert_allclose(found.value[good], shifts[good], atol=0.01)
    np.testing.assert_allclose(level[good], 0.4, atol=0.01)
    assert np.isnan(found.value[3])
    assert np.isnan(found.sigma[3])
    # A voxel with 0.4 of the nickel has 2.5 times the error of the mean's.
    mean = linear.measure(attenuation(DENSE, 0.0)[:, None], variance=np.ones(len(DENSE)))[0].sigma[0]
    assert found.sigma[15] == pytest.approx(mean / 0.4, rel=1e-3)
    each = linear.measure(y, variance=np.ones(y.shape))[0].sigma
    np.testing.assert_allclose(each[good], found.sigma[good], rtol=1e-4)


@given(st.floats(-1.5, 1.5), st.floats(0.01, 100), st.floats(-1e3, 1e3), st.floats(-1, 1))
@settings(max_examples=50)
def test_the_shift_forgets_amounts_and_lines(shift: float, amount: float, level: float, slope: float) -> None:
    linear = edge_shift(DENSE, attenuation(DENSE, 0.0), EDGE)
    assert linear is not None
    y = attenuation(DENSE, shift)
    pair = np.stack([y, amount * y + level + slope * (DENSE - EDGE)], axis=1)
    one, other = linear.measure(pair)[0].value
    assert other == pytest.approx(one, abs=1e-6 * max(1, (abs(level) + 1e3) / amount))
