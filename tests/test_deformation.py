"""Parts of an object that move beyond a rigid motion and one scale, and with time; what the contrast is made of."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from napari_xanes_tomo.contrast import near_edges, tabulated, take_apart
from napari_xanes_tomo.deformation import acquisition_order, beyond_rigid, deformation
from napari_xanes_tomo.model import Alignment
from napari_xanes_tomo.registration import register
from napari_xanes_tomo.registration_report import moments_section
from napari_xanes_tomo.template import make_template

ENERGIES = np.array([6534.0, 6558, 7704, 7728, 8178, 8298, 8328, 8340, 8343, 8346, 8354, 8365, 8400, 8450, 8570])
LAST = len(ENERGIES) - 1
ELEMENTS = ("Mn", "Co", "Ni")
Y, X = np.meshgrid(np.linspace(-60, 60, 4), np.linspace(-75, 75, 4), indexing="ij")
PLACE = np.stack([Y, X], axis=2)


def spectrum(amounts=(0.3, 0.2, 0.5)) -> np.ndarray:
    return tabulated(ENERGIES, ELEMENTS) @ np.array(amounts) + 40 * (ENERGIES / 8000) ** -2.8


def fields(seed: int, *, sigma: float = 0.01, stretch: float = 0.0, bias: float = 0.1):
    """Block shifts of every energy: noise, what its contrast does, and a stretch along y that grows with time."""
    rng = np.random.default_rng(seed)
    contrast = take_apart(ENERGIES, spectrum())
    change = contrast.share - contrast.share[LAST]
    pattern = bias * rng.normal(size=(3, 4, 4, 2))
    time = np.arange(len(ENERGIES)) / LAST
    shift: list[np.ndarray | None] = []
    for e in range(len(ENERGIES)):
        f = np.tensordot(change[e], pattern, axes=1) + sigma * rng.normal(size=(4, 4, 2))
        f += 1e-3 * rng.normal() * PLACE + 0.05 * rng.normal(size=2)
        f[..., 0] += stretch * (time[e] - 1) * Y
        shift.append(None if e == LAST else f)
    error = [None if e == LAST else np.full((4, 4, 2), sigma) for e in range(len(ENERGIES))]
    place = [None if e == LAST else PLACE for e in range(len(ENERGIES))]
    return time, shift, error, place, contrast


def found(*data, **more):
    time, shift, error, place, contrast = data
    strength = spectrum() / spectrum()[LAST]
    return deformation(
        time, shift, error, place, reference=LAST, share=contrast.share, strength=strength, **more
    )  # fmt: skip


def test_shares_and_masses_are_those_of_the_mixture() -> None:
    amounts = np.array([0.3, 0.2, 0.5])
    mass = spectrum(amounts)
    parts = tabulated(ENERGIES, ELEMENTS) * amounts
    contrast = take_apart(ENERGIES, 7 * mass)
    assert contrast.elements == ELEMENTS
    away = ~near_edges(ENERGIES, ELEMENTS)
    assert away.tolist() == [e < 8330 or e > 8390 for e in ENERGIES]
    np.testing.assert_allclose(contrast.expected[away], 7 * mass[away], rtol=1e-6)
    assert np.isnan(contrast.expected[~away]).all()
    np.testing.assert_allclose(contrast.share, parts / mass[:, None], atol=0.02)


def test_without_edges_or_energies_nothing_is_taken_apart() -> None:
    assert take_apart([8400.0, 8500.0], [1.0, 0.9]).elements == ()
    few = take_apart(ENERGIES, np.where(np.arange(len(ENERGIES)) == 3, 1.0, np.nan))
    assert np.isnan(few.share).all()
    assert np.isnan(few.expected).all()


@given(st.tuples(*[st.floats(-1, 1)] * 4), st.integers(0, 99))
def test_rigid_motion_and_scale_are_no_deformation(motion: tuple[float, ...], seed: int) -> None:
    dy, dx, scale, roll = motion
    field = np.stack([dy + 0.01 * (scale * Y + roll * X), dx + 0.01 * (scale * X - roll * Y)], axis=2)
    sigma = np.random.default_rng(seed).uniform(0.5, 2, (4, 4, 2))
    field[3, 3] = np.nan
    left = beyond_rigid(field, sigma, PLACE)
    np.testing.assert_allclose(left[np.isfinite(field)], 0, atol=1e-9)
    assert np.isnan(left[3, 3]).all()


def test_a_particle_that_keeps_its_shape_is_not_flagged() -> None:
    flagged = [found(*fields(seed)).significant for seed in range(40)]
    assert sum(flagged) <= 1


@pytest.mark.parametrize("seed", range(4))
def test_a_stretch_that_grows_with_time_is_found(seed: int) -> None:
    result = found(*fields(seed, stretch=2e-3))
    assert result.significant
    # Of a stretch along y alone a common scale takes what it can, block by block.
    expected = beyond_rigid(np.stack([2e-3 * Y, 0 * Y], axis=2), np.ones((4, 4, 2)), PLACE)
    off = (result.trend - expected) / result.sigma
    assert np.sqrt(np.mean(off**2)) < 1.6
    assert "changes its shape with time" in result.text()


def test_contrast_alone_looks_like_time_when_it_is_not_allowed_for() -> None:
    """Early energies have another contrast than late ones: only what the absorption is made of tells them apart."""
    time, shift, error, place, contrast = fields(3, bias=0.3)
    assert deformation(time, shift, error, place, reference=LAST).z > 5
    assert not found(time, shift, error, place, contrast).significant


def test_one_strange_energy_is_no_trend() -> None:
    time, shift, error, place, contrast = fields(5)
    shift[1] = 40 * shift[1]
    assert not found(time, shift, error, place, contrast).significant
    assert found(time, *fields(5, stretch=3e-3)[1:]).significant


@pytest.mark.parametrize("count", [0, 2, 4])
def test_few_energies_say_nothing(count: int) -> None:
    time, shift, error, place, _ = fields(0)
    shift = [s if e < count else None for e, s in enumerate(shift)]
    result = deformation(time, shift, error, place, reference=LAST)
    assert np.isnan(result.z)
    assert not result.significant
    assert "not known" in result.text()


@pytest.mark.parametrize(
    ("begun", "expected"),
    [
        ([5.0, 1.0, 9.0], [5.0, 1.0, 9.0]),  # not in the order of the energies
        ([5.0, np.nan, 9.0], [0.0, 1.0, 2.0]),
        ([7.0, 7.0, 7.0], [0.0, 1.0, 2.0]),
    ],
)
def test_energies_are_ordered_by_when_they_were_measured(begun: list[float], expected: list[float]) -> None:
    assert acquisition_order(begun).tolist() == expected


def test_the_report_asks_for_the_time_of_acquisition_not_for_the_order() -> None:
    time, shift, error, place, _ = fields(3, stretch=4e-3)
    names = ("block_shift", "block_sigma", "block_place")
    order = np.random.default_rng(1).permutation(LAST)  # measured criss-cross, and the reference last
    registered = {
        e: {"numbers": {"mass": spectrum()[e], "width": 30.0, "frame_width": 256}, "arrays": {}}
        for e in range(LAST + 1)
    }
    for e in range(LAST):
        registered[e]["arrays"] = dict(zip(names, (shift[order[e]], error[e], place[e]), strict=True))

    def section(begun: list[float]) -> str:
        return moments_section(
            ENERGIES.tolist(), registered, dict.fromkeys(range(LAST + 1), 1.0), LAST,
            lambda payload, name: payload["arrays"].get(name), "", begun_s=begun,
        )  # fmt: skip

    told = "changes its shape with time"
    sigma = [float(re.search(r"; (-?[\d.]+) sigma", section(t)).group(1)) for t in ([*time[order], 1.0], [])]
    assert told in section([*time[order], 1.0])
    assert sigma[0] > 2 * sigma[1], "their order tells little of it"


# ------------------------------------------------------------------------------------------- measured projections

THETA = np.arange(-90.0, 90.0, 3.0)
SHAPE = (48, 64)
rng_ = np.random.default_rng(8)
BALLS = [(tuple(c), r) for c, r in zip(rng_.uniform(-13, 13, (16, 3)), rng_.uniform(2.0, 5.0, 16), strict=True)]


def frames(shift: np.ndarray, stretch: float, contrast: float, seed: int) -> np.ndarray:
    """Projections of balls stretched along the axis: every line integral is that of a stretched volume."""
    t = np.deg2rad(THETA)
    sub = (np.arange(3) - 1) / 3
    y, x = ((np.arange(n)[:, None] + sub - (n - 1) / 2).ravel() for n in SHAPE)
    out = np.zeros((len(t), len(y), len(x)))
    for k, ((cy, cz, cx), radius) in enumerate(BALLS):
        u = cx * np.cos(t) + cz * np.sin(t)
        qy = (y[None] - shift[:, :1]) / (1 + stretch) - cy
        qx = x[None] - shift[:, 1:] - u[:, None]
        level = 0.06 * (contrast if k % 2 else 1.0)
        out += 2 * level * np.sqrt(np.maximum(radius**2 - qy[:, :, None] ** 2 - qx[:, None, :] ** 2, 0))
    out = out.reshape(len(t), SHAPE[0], 3, SHAPE[1], 3).mean(axis=(2, 4))
    return (out + 0.005 * np.random.default_rng(seed).standard_normal(out.shape)).astype(np.float32)


@pytest.mark.parametrize("stretch", [0.0, 0.02])
def test_registered_projections_tell_a_deformation_from_another_contrast(stretch: float) -> None:
    plain = Alignment(np.zeros((len(THETA), 2)), np.zeros((len(THETA), 2)))
    template = make_template(frames(plain.shift, 0.0, 1.0, 0), THETA, plain)
    share, shift, sigma, place = [], [], [], []
    time = np.arange(8) / 7
    for e in range(7):
        contrast = (0.8, 1.0)[e % 2]
        own = np.random.default_rng(e).normal(0, 1, (len(THETA), 2))
        stack = frames(own, stretch * (time[e] - 1), contrast, e + 1)
        result = register(stack, THETA, replace(plain, shift=own), template, magnification=1.0)
        share.append([contrast / (1 + contrast)])
        shift.append(result.block_shift)
        sigma.append(result.block_sigma)
        place.append(result.block_place)
    share.append([0.5])
    result = deformation(
        time, [*shift, None], [*sigma, None], [*place, None], reference=7, share=share, width_px=SHAPE[1]
    )
    assert result.significant == bool(stretch), result.text()
    if stretch:
        y = result.place[..., 0]
        good = np.isfinite(result.trend[..., 0])
        slope = np.polyfit(y[good], result.trend[..., 0][good], 1)[0]
        assert slope > 0, "stretched more and more: late energies lie farther out"
