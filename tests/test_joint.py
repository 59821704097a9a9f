from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from napari_xanes_tomo.joint import Measured, adjusted, common_sigma, join, ranking
from napari_xanes_tomo.model import Alignment

ENERGIES = (6534.0, 6558.0, 7704.0, 7728.0, 8178.0, 8570.0)
SIGMA = np.array([5e-5, 5e-5, 0.003, 0.003, 0.003, 5e-5])
THETA = np.arange(-90.0, 90.0, 5.0)


def places(seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(6, 6)) * [1e-3, 1e-3, 2, 2, 2, 1e-3]
    x[5] = 0
    return x


def test_comparisons_that_agree_change_nothing() -> None:
    x = places(0)
    hubs = {0: 4, 1: 2, 2: 4, 3: 4, 4: 2}
    measured = {k: Measured(x[k], SIGMA, x[k], SIGMA, h, x[h]) for k, h in hubs.items()}
    found = join(measured, ENERGIES, 5)
    np.testing.assert_allclose(found.change, 0, atol=1e-9)
    assert found.notes == ()
    assert np.all(found.sigma[:5] > 0)
    assert len(found.closures) >= 4
    assert np.nanmax(found.closure_matrix("scale")) < 1e-6


def test_a_comparison_that_does_not_agree_is_named() -> None:
    x = places(1)
    measured = {k: Measured(x[k], SIGMA, x[k], SIGMA, 4, x[4]) for k in (1, 2, 3)}
    measured[4] = Measured(x[4], SIGMA)
    measured[3] = Measured(x[3], SIGMA, x[3] + 60 * SIGMA, SIGMA, 4, x[4])
    found = join(measured, ENERGIES, 5)
    assert len(found.notes) >= 1
    assert found.notes[0].startswith("7728 eV: its comparison with")
    assert np.nanargmax(found.misfit) == 3
    assert np.isnan(found.sigma[0]).all()  # never measured
    np.testing.assert_array_equal(found.change[0], 0)


@given(st.integers(0, 1000))
def test_adjusted_moves_the_object(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = len(THETA)
    jitter = rng.normal(size=(n, 2))
    t, change = rng.normal(size=3), rng.normal(size=6) * [1e-3, 1e-3, 1, 1, 1, 1e-3]
    first = Alignment(jitter, np.zeros((n, 2)), 1.2, 0.3).gauge(THETA, *t)
    found = adjusted(first, THETA, t, change)
    m, roll = 1.2 * np.exp(change[0]), 0.3 + np.rad2deg(change[1])
    expected = Alignment(jitter, np.zeros((n, 2)), m, roll).gauge(THETA, *(t + change[2:5]))
    np.testing.assert_allclose(found.shift, expected.shift, atol=1e-9)
    assert found.magnification == pytest.approx(m)
    assert found.roll_deg == pytest.approx(roll)
    back = adjusted(found, THETA, t + change[2:5], -change)
    np.testing.assert_allclose(back.shift, first.shift, atol=1e-9)


def test_common_errors_of_x_turn_with_the_angle() -> None:
    sigma = np.array([0, 0, 0.01, 0.02, 0.03, 0])
    found = common_sigma(np.array([0.0, 90.0]), sigma, 2.0)
    np.testing.assert_allclose(found, [[0.02, 0.04], [0.02, 0.06]])
    rim = common_sigma(np.array([0.0]), np.array([1e-4, 0, 0, 0, 0, 0]), 1.0, radius_px=100.0)
    np.testing.assert_allclose(rim, [[0.01, 0.01]])


def test_displaced_projections_come_first() -> None:
    # Ten cells of 67 x 180 displaced by 1 px; energies of different noise, one frame without a value.
    rng = np.random.default_rng(0)
    noise = rng.uniform(0.01, 0.06, 67)
    residual = [s * rng.standard_t(5, (180, 2)) + 0.1 * rng.normal(size=2) for s in noise]
    sigma = [np.full((180, 2), 0.7 * s) for s in noise]
    cells = [(int(e), int(i)) for e, i in zip(rng.permutation(67)[:10], rng.integers(0, 180, 10), strict=True)]
    for e, i in cells:
        angle = rng.uniform(0, 2 * np.pi)
        residual[e][i] += [np.sin(angle), np.cos(angle)]
    residual[5][7] = np.nan
    order = ranking(residual, sigma)
    assert {(e, i) for e, i, _ in order[:15]} >= set(cells)
    assert len(order) == 67 * 180 - 1
    assert all(a[2] >= b[2] for a, b in pairwise(order))
    assert ranking([np.full((3, 2), np.nan)], [np.ones((3, 2))]) == []


def test_what_grains_pulled_is_a_part_of_the_error_and_leaves_the_second_comparison() -> None:
    energies = (6534.0, 6558.0, 7704.0, 7728.0, 8178.0, 8346.0, 8570.0)
    sigma = np.full(6, 1e-4)
    pull = {1: 0.01, 2: 0.01, 3: -0.004, 4: -0.004, 5: 0.006}
    nothing = np.zeros(6)

    def measured(e: int, pulled: float) -> Measured:
        hub = {1: 2, 3: 4, 5: 4}.get(e)
        # The second template is another energy of the same contrast, or one that its own grains pull another way.
        second = np.array([0, 0, pulled - pull[hub], 0, 0, 0]) if hub else None
        where = (None, None, None, None) if second is None else (second, sigma, hub, nothing)
        return Measured(nothing, sigma, *where, np.array([0, 0, pulled, 0, 0, 0]))

    joint = join({e: measured(e, pull.get(e, 0.0)) for e in range(6)}, energies, 6)
    np.testing.assert_allclose(joint.change, 0, atol=1e-12)
    assert np.nanmax(joint.misfit) < 1e-6
    calm = join({e: Measured(nothing, sigma, pull=1e-3 * np.ones(6)) for e in range(6)}, energies, 6)
    assert joint.cross_sigma[1, 2] > 1.2 * calm.cross_sigma[1, 2] > 0
