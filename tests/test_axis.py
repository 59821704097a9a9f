"""The rotation axis beyond its place: known roll, pitch and errors of the angles in objects of spheres."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from napari_xanes_tomo.axis import find_axis
from napari_xanes_tomo.jitter import find_jitter
from napari_xanes_tomo.model import Alignment, XanesTomoError

# (y, z, x), radius, attenuation per pixel.
BALLS = (
    ((-3.0, 4.0, -5.0), 10.0, 0.05), ((9.0, -8.0, 6.0), 6.0, 0.08), ((-10.0, -7.0, 9.0), 4.0, 0.1),
    ((8.0, 9.0, -9.0), 4.0, 0.1),
)  # fmt: skip
THETA = np.arange(-90.0, 90.0, 3.0)
HALF = (THETA >= 0).astype(int)
SHAPE = (56, 64)


def measured(
    *, roll: float = 0, pitch: float = 0, step: float = 0, offset: float = 0, seed: int = 0, jump: float = 0
) -> npt.NDArray:
    """Projections, the frames displaced at random, noise in every pixel."""
    rng = np.random.default_rng(seed)
    shift = rng.normal(0, 1.0, (len(THETA), 2))
    shift[:, 1] += jump * HALF
    t = np.deg2rad(THETA + step * (THETA - THETA.mean()) + offset * (HALF - 0.5))
    r, p = np.deg2rad(roll), np.deg2rad(pitch)
    fine = (np.arange(3) - 1) / 3
    y, x = ((np.arange(n)[:, None] + fine - (n - 1) / 2).ravel() for n in SHAPE)
    out = np.zeros((len(t), len(y), len(x)))
    for (cy, cz, cx), radius, level in BALLS:
        u, s = cx * np.cos(t) + cz * np.sin(t), cz * np.cos(t) - cx * np.sin(t)
        at_y, at_x = cy + r * u + p * s + shift[:, 0], u - r * cy + shift[:, 1]
        square = (y[None, :, None] - at_y[:, None, None]) ** 2 + (x[None, None, :] - at_x[:, None, None]) ** 2
        out += 2 * level * np.sqrt(np.maximum(radius**2 - square, 0))
    frames = out.reshape(len(t), SHAPE[0], 3, SHAPE[1], 3).mean(axis=(2, 4))
    return frames + 0.01 * rng.standard_normal(frames.shape)


def axis_of(stack: npt.NDArray) -> dict:
    found = find_jitter(stack, THETA, variance=1e-4)
    return {p.name: p for p in find_axis(stack, THETA, found.alignment, half=HALF)}


# What is wrong; its name, its value, the tolerance.
@pytest.mark.parametrize(
    ("wrong", "name", "value", "tolerance"),
    [
        ({"roll": 0.6}, "roll", 0.6, 0.12),
        ({"roll": -0.6}, "roll", -0.6, 0.12),
        ({"pitch": 1.0}, "pitch", 1.0, 0.2),
        ({"step": 0.02}, "angle step", 0.02, 0.005),
        ({"offset": 1.5}, "half offset", 1.5, 0.4),
    ],
)
def test_what_is_wrong_is_found_and_significant(wrong: dict, name: str, value: float, tolerance: float) -> None:
    found = axis_of(measured(**wrong))[name]
    assert found.value == pytest.approx(value, abs=tolerance)
    assert found.significant
    assert name in found.text()


@pytest.mark.parametrize("seed", [1, 2])
def test_what_is_right_is_not_called_wrong(seed: int) -> None:
    found = axis_of(measured(seed=seed))
    assert set(found) == {"roll", "pitch", "angle step", "half offset"}
    for name, p in found.items():
        assert not p.significant, p.text()
        assert p.sigma < {"roll": 0.1, "pitch": 0.2, "angle step": 0.005, "half offset": 0.4}[name]


def test_an_offset_of_place_is_part_of_the_displacements() -> None:
    still, moved = (find_jitter(measured(jump=j), THETA, variance=1e-4) for j in (0.0, 0.5))
    change = moved.shift - still.shift
    t = np.deg2rad(THETA)
    orbit = np.stack([np.cos(t), np.sin(t)], axis=1)
    rest = change[:, 1] - 0.5 * HALF
    rest -= orbit @ np.linalg.lstsq(orbit, rest, rcond=None)[0]
    assert np.abs(rest).max() < 0.02  # 1 px is one of 64
    assert np.ptp(change[:, 0]) < 0.02
    assert not any(p.significant for p in find_axis(measured(jump=0.5), THETA, moved.alignment, half=HALF))


def test_bad_input() -> None:
    with pytest.raises(XanesTomoError, match="at least 24 projections, got 10"):
        find_axis(np.zeros((10, 32, 32)), np.arange(10.0), Alignment.identity(10))
    with pytest.raises(ValueError, match="one angle each"):
        find_axis(np.zeros((30, 32, 32)), np.arange(10.0), Alignment.identity(30))
