from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from napari_xanes_tomo.io.scan import parse_script
from napari_xanes_tomo.phantom import PRESETS, ni_xanes
from napari_xanes_tomo.spectra import edge_at_half, edge_shift, normalisation

EDGE = 8333.0
DENSE = np.concatenate(
    [np.arange(8178.0, 8328.0, 15.0), np.arange(8328.0, 8371.0, 1.0), np.arange(8390.0, 8571.0, 20.0)]
)
DEMO = np.array(PRESETS["demo"].energies_ev)
NEAR = DEMO[(DEMO > 8100) & (DEMO < 8600)]


def attenuation(energy: np.ndarray, shift: float, level: float = 300.0, slope: float = -0.05, jump: float = 250.0):
    """What a voxel with nickel shows: a falling line and the edge."""
    return level + slope * (energy - EDGE) + jump * ni_xanes(energy, shift)


def test_the_dense_grid_is_that_of_the_measurement(data_dir: Path) -> None:
    script = next((data_dir / "tomo_00089").glob("*.txt")).read_text()
    real = np.array([block.energy_ev for block in parse_script(script)])
    np.testing.assert_array_equal(DENSE, real[real >= 8178])


# Grid, tolerance in eV for |s| <= 1.5 eV: the dense one knows its derivative, the demo twin's has steps of 3 to 5 eV.
@pytest.mark.parametrize(("energies", "tolerance"), [(DENSE, 0.003), (DEMO, 0.05), (NEAR, 0.05)])
@pytest.mark.parametrize("shift", [-1.5, -1.0, -0.5, -0.1, 0.0, 0.1, 0.5, 1.0, 1.5])
def test_a_known_shift_is_found(energies: np.ndarray, tolerance: float, shift: float) -> None:
    setup = edge_shift(energies, attenuation(energies, 0.0), EDGE)
    assert setup is not None
    # Another amount of nickel on another background: neither may move the edge.
    y = attenuation(energies, shift, level=120.0, slope=-0.02, jump=90.0)
    found = setup.shift(np.array(setup.numerator @ y), np.array(setup.denominator @ y))
    assert float(found) == pytest.approx(shift, abs=tolerance)


def test_a_shift_of_the_monochromator_is_the_same_shift() -> None:
    # s > 0 means an edge at higher energy.
    setup = edge_shift(DENSE, attenuation(DENSE, 0.0), EDGE)
    assert setup is not None
    later = attenuation(DENSE - 1.0, 0.0)
    assert float(setup.shift(setup.numerator @ later, setup.denominator @ later)) == pytest.approx(1.0, abs=0.01)


def test_the_mean_itself_is_level_one_and_shift_zero() -> None:
    mean = attenuation(DENSE, 0.3)
    setup = edge_shift(DENSE, mean, EDGE, variance=1 + DENSE / 8000)
    assert setup is not None
    assert setup.denominator @ mean == pytest.approx(1.0, abs=1e-9)
    assert setup.numerator @ mean == pytest.approx(0.0, abs=1e-9)
    assert setup.denominator @ (3.5 * mean) == pytest.approx(3.5, abs=1e-9)


@given(st.floats(-1e3, 1e3), st.floats(-1, 1), st.floats(0.01, 100))
def test_lines_and_amounts_do_not_move_the_edge(level: float, slope: float, amount: float) -> None:
    setup = edge_shift(DENSE, attenuation(DENSE, 0.0), EDGE)
    assert setup is not None
    y = attenuation(DENSE, 0.7)
    other = amount * y + level + slope * (DENSE - EDGE)
    size = np.abs(other).max()
    assert setup.numerator @ other == pytest.approx(amount * (setup.numerator @ y), abs=1e-10 * size * len(DENSE))
    assert setup.denominator @ other == pytest.approx(amount * (setup.denominator @ y), abs=1e-10 * size * len(DENSE))


def test_both_weights_are_linear() -> None:
    # The shift of a mixture is the mean shift, weighted by nickel: first order, so within the curvature.
    setup = edge_shift(DENSE, attenuation(DENSE, 0.0), EDGE)
    assert setup is not None
    one, other = attenuation(DENSE, 0.2, jump=300.0), attenuation(DENSE, -0.4, jump=100.0)
    mixed = float(setup.shift(setup.numerator @ (one + other), setup.denominator @ (one + other)))
    assert mixed == pytest.approx((300 * 0.2 - 100 * 0.4) / 400, abs=0.01)


def test_energies_outside_the_window_have_no_weight() -> None:
    setup = edge_shift(DEMO, attenuation(DEMO, 0.0), EDGE)
    assert setup is not None
    outside = (DEMO < EDGE - 200) | (DEMO > EDGE + 300)
    assert outside.sum() == 4
    assert np.all(setup.numerator[outside] == 0)
    assert np.all(setup.denominator[outside] == 0)


@pytest.mark.parametrize("denominator", [0.0, -1.0, np.nan])
def test_no_nickel_no_shift(denominator: float) -> None:
    setup = edge_shift(DENSE, attenuation(DENSE, 0.0), EDGE)
    assert setup is not None
    out = setup.shift(np.array([0.1, 0.1], np.float32), np.array([1.0, denominator], np.float32))
    assert out.dtype == np.float32
    assert np.isfinite(out[0])
    assert np.isnan(out[1])


@pytest.mark.parametrize(
    ("energies", "spectrum"),
    [
        ([8178.0, 8344.0, 8570.0], None),  # three energies
        ([6534.0, 6558.0, 7704.0, 7728.0, 8178.0, 8344.0, 8570.0], None),  # three within reach
        (DENSE, np.ones(len(DENSE))),  # no edge
        (DENSE, 300 - 0.1 * (DENSE - EDGE)),  # a line
    ],
)
def test_what_cannot_be_determined_is_none(energies: list[float], spectrum: np.ndarray | None) -> None:
    e = np.asarray(energies, float)
    assert edge_shift(e, attenuation(e, 0.0) if spectrum is None else spectrum, EDGE) is None


def test_repeated_energies_count_once_in_the_mean() -> None:
    twice = np.concatenate([DENSE, DENSE])
    setup = edge_shift(twice, attenuation(twice, 0.0), EDGE)
    assert setup is not None
    y = attenuation(twice, 0.5)
    assert float(setup.shift(setup.numerator @ y, setup.denominator @ y)) == pytest.approx(0.5, abs=0.003)


@given(st.floats(100, 500), st.floats(-0.2, 0.0), st.floats(50, 500), st.floats(-0.1, 0.1))
def test_lines_below_and_above_are_normalised_to_0_and_1(level: float, slope: float, jump: float, bend: float) -> None:
    x = DENSE - EDGE
    y = level + slope * x + np.where(x > 0, jump + bend * x, 0.0)
    norm = normalisation(DENSE, y, EDGE)
    assert norm is not None
    assert norm.jump == pytest.approx(jump, rel=1e-6)
    out = norm(DENSE, y)
    np.testing.assert_allclose(out[x <= -20], 0, atol=1e-6)
    np.testing.assert_allclose(out[x > 0], 1, atol=1e-6)


def test_one_energy_on_a_side_gives_a_level() -> None:
    norm = normalisation([8178.0, 8344.0, 8570.0], [100.0, 180.0, 300.0], EDGE)
    assert norm is not None
    assert norm.jump == pytest.approx(200.0)
    np.testing.assert_allclose(norm([8178.0, 8344.0, 8570.0], [100.0, 180.0, 300.0]), [0.0, 0.4, 1.0])


@pytest.mark.parametrize(
    ("energies", "spectrum"),
    [
        ([8340.0, 8570.0], [1.0, 2.0]),  # nothing below
        ([8178.0, 8340.0], [1.0, 2.0]),  # nothing above
        ([8178.0, 8570.0], [2.0, 1.0]),  # falls
        ([8178.0, 8570.0], [1.0, 1.0]),
    ],
)
def test_no_normalisation_without_a_jump(energies: list[float], spectrum: list[float]) -> None:
    assert normalisation(energies, spectrum, EDGE) is None


@pytest.mark.parametrize("shift", [-1.0, 0.0, 1.3])
def test_edge_at_half_follows_the_shift(shift: float) -> None:
    y = attenuation(DENSE, shift)
    norm = normalisation(DENSE, y, EDGE)
    assert norm is not None
    fine = np.arange(8320.0, 8350.0, 0.001)
    true = fine[np.flatnonzero(ni_xanes(fine, shift) >= 0.5)[0]]
    assert edge_at_half(DENSE, norm(DENSE, y)) == pytest.approx(true, abs=0.02)


@given(st.lists(st.floats(-1, 2, width=32), min_size=2, max_size=20), st.randoms())
def test_edge_at_half_lies_at_a_rise_through_a_half(values: list[float], random: object) -> None:
    e, y = 8300.0 + np.arange(len(values)), np.array(values, float)
    found = edge_at_half(e, y)
    rises = [k for k in range(len(y) - 1) if y[k] < 0.5 <= y[k + 1]]
    if not rises:
        assert np.isnan(found)
    else:
        assert e[rises[0]] <= found <= e[rises[0] + 1]
    order = np.arange(len(y))
    random.shuffle(order)  # type: ignore[attr-defined]
    np.testing.assert_equal(edge_at_half(e[order], y[order]), found)


def test_edge_at_half_of_a_straight_rise() -> None:
    assert edge_at_half([0.0, 10.0], [0.0, 1.0]) == pytest.approx(5.0)
    assert np.isnan(edge_at_half([0.0, 10.0], [1.0, 0.0]))
    assert np.isnan(edge_at_half([0.0, 10.0], [0.1, 0.4]))
