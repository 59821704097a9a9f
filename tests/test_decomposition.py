"""Shifts taken apart into what repeats, how the object moved, steps, and what is left."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from napari_xanes_tomo.decomposition import PARTS, decompose
from napari_xanes_tomo.model import XanesTomoError

THETA = np.arange(-90.0, 90.0)
T = np.deg2rad(THETA)
BASIS = np.stack([np.ones(180), np.cos(T), np.sin(T)], axis=1)


def scan(energies: int, *, run_out=0.5, motion=2.0, step=1.0, left=0.3, seed=0):
    """Shifts (energies, 180, 2), and their parts."""
    rng = np.random.default_rng(seed)
    common = np.cumsum(rng.normal(size=(180, 2)), axis=0)
    seam = (THETA >= 0).astype(float)
    for axis, basis in enumerate((BASIS[:, :1], BASIS)):
        basis = np.column_stack([basis, seam])
        common[:, axis] -= basis @ np.linalg.lstsq(basis, common[:, axis], rcond=None)[0]
    common *= run_out / np.sqrt(np.mean(common**2, axis=0))
    place = motion * rng.normal(size=(energies, 4))
    rigid = np.stack([np.repeat(place[:, :1], 180, axis=1), place[:, 1:] @ BASIS.T], axis=2)
    jump = step * rng.normal(size=(energies, 2))
    steps = jump[:, None, :] * seam[None, :, None]
    remainder = left * rng.normal(size=(energies, 180, 2))
    return common, rigid, steps, remainder, place, jump


def parts_of(shift, **more):
    n = len(shift)
    segment = [(THETA >= 0).astype(int)] * n
    return decompose(8000.0 + np.arange(n), [THETA] * n, list(shift), segment=segment, **more)


@pytest.mark.parametrize(("energies", "tolerance"), [(6, 0.15), (16, 0.09), (67, 0.05)])
def test_every_part_is_found(energies: int, tolerance: float) -> None:
    common, rigid, steps, remainder, place, jump = scan(energies)
    found = parts_of(common[None] + rigid + steps + remainder)
    np.testing.assert_allclose(found.place, place, atol=0.4)
    np.testing.assert_allclose(found.jumps[:, 0], jump, atol=0.4)
    assert np.sqrt(np.mean((found.synchronous - common) ** 2)) < 1.3 * 0.3 / np.sqrt(energies)
    assert found.rms["synchronous"] == pytest.approx([0.5, 0.5], rel=tolerance)
    assert found.rms["remainder"] == pytest.approx([0.3, 0.3], rel=tolerance)
    assert list(found.rms) == list(PARTS)
    columns = found.columns([180] * energies)
    rigid_y = columns["rigid_y_px"].reshape(energies, 180)
    np.testing.assert_allclose(rigid_y[:, 0], found.place[:, 0] - found.place[:, 0].mean(), atol=1e-9)
    total = sum(columns[f"{name}_x_px"] for name in PARTS[1:])
    expected = (common[None] + rigid + steps + remainder)[..., 1] - found.gauge()[None, :, 1]
    np.testing.assert_allclose(total, expected.ravel(), atol=1e-9)
    assert "repeated at every energy 0.5" in found.text() or "repeated at every energy 0.4" in found.text()


def test_nothing_repeats_where_nothing_does() -> None:
    _, rigid, steps, remainder, *_ = scan(16, run_out=0.0)
    found = parts_of(rigid + steps + remainder)
    assert (found.rms["synchronous"] < 0.05).all()
    assert found.rms["remainder"] == pytest.approx([0.3, 0.3], rel=0.05)


def test_slipped_projections_stay_in_the_remainder() -> None:
    common, rigid, steps, remainder, *_ = scan(8, left=0.02)
    shift = common[None] + rigid + steps + remainder
    shift[3, 50:56] += 9.0
    found = parts_of(shift)
    np.testing.assert_allclose(found.remainder[3, 50:56], 9.0, atol=0.3)
    np.testing.assert_allclose(found.synchronous[50:56], common[50:56], atol=0.1)


@given(
    st.integers(1, 5),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 179)), max_size=300),
    st.integers(0, 99),
)
def test_the_parts_add_up(energies: int, lost: list[tuple[int, int]], seed: int) -> None:
    common, rigid, steps, remainder, *_ = scan(energies, seed=seed)
    shift = common[None] + rigid + steps + remainder
    for e, i in lost:
        shift[e % energies, i] = np.nan
    found = parts_of(shift)
    known = np.isfinite(shift)
    np.testing.assert_allclose(found.part("total")[known], shift[known], atol=1e-9)
    assert np.isnan(found.part("total")[~known]).all()
    rows = found.of_projections("total", [180] * energies)
    np.testing.assert_allclose(rows, shift.reshape(-1, 2), atol=1e-9)


def test_energies_of_other_angles_and_unknown_ones() -> None:
    common, rigid, steps, remainder, *_ = scan(5, left=0.01)
    shift = common[None] + rigid + steps + remainder
    theta = [THETA, THETA[::2], THETA[30:], THETA[::-1], THETA]
    pick = [np.arange(180), np.arange(0, 180, 2), np.arange(30, 180), np.arange(180)[::-1], np.arange(180)]
    values = [shift[e, p] for e, p in enumerate(pick)]
    values[4] = None
    found = decompose(8000.0 + np.arange(5), theta, values, segment=[(THETA[p] >= 0).astype(int) for p in pick])
    np.testing.assert_allclose(found.theta_deg, THETA, atol=1e-9)
    assert np.isnan(found.place[4]).all()
    rows = found.of_projections("total", [len(p) for p in pick])
    np.testing.assert_allclose(rows[:180], shift[0], atol=1e-9)
    np.testing.assert_allclose(rows[420:600], shift[3, ::-1], atol=1e-9)
    assert np.isnan(rows[600:]).all()


def test_one_energy_has_no_repetition() -> None:
    common, rigid, steps, remainder, *_ = scan(1)
    found = parts_of(common[None] + rigid + steps + remainder)
    assert np.isnan(found.rms["synchronous"]).all()
    assert (found.synchronous == 0).all()


def test_arrays_that_do_not_belong_together() -> None:
    with pytest.raises(XanesTomoError, match="8001 eV"):
        decompose([8000.0, 8001.0], [THETA, THETA], [np.zeros((180, 2)), np.zeros((9, 2))])
    with pytest.raises(XanesTomoError, match="each of 2"):
        decompose([8000.0, 8001.0], [THETA], [np.zeros((180, 2))])
