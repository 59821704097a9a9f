"""Fourier shell correlation against volumes whose signal and noise are known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from napari_xanes_tomo.fsc import half_bit, shell_correlation
from napari_xanes_tomo.model import XanesTomoError

BOX = (32, 40, 48)


def noise(seed: int, shape: tuple[int, ...] = BOX) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


# Two volumes with the same white signal and white noise of their own: SNR / (SNR + 1) at every frequency.
@pytest.mark.parametrize("snr", [0.25, 1.0, 4.0])
def test_correlation_of_known_signal_and_noise(snr: float) -> None:
    signal = np.sqrt(snr) * noise(0)
    found = shell_correlation(signal + noise(1), signal + noise(2))
    outer = found.count > 300
    assert np.mean(found.correlation[outer]) == pytest.approx(snr / (snr + 1), abs=0.03)


def test_the_crossing_is_where_signal_and_noise_say() -> None:
    # A signal that falls as a Gaussian: |S|^2 = A exp(-(2 pi s f)^2), noise 1.
    s, size = 1.5, (64, 64, 64)
    signal = gaussian_filter(noise(0, size), s, mode="wrap") * 30
    found = shell_correlation(signal + noise(1, size), signal + noise(2, size), voxel_nm=20.0)
    f = found.frequency
    power = 900 * np.exp(-((2 * np.pi * s * f) ** 2))
    wanted = np.interp(-0.143, -(power / (power + 1))[1:], f[1:])
    at = found.crossing(0.143)
    assert at == pytest.approx(wanted, abs=0.015)
    assert found.detail_nm(0.143) == pytest.approx(20.0 / (2 * at))
    half = found.crossing()
    assert half is not None
    assert half < at  # with many values the 1/2-bit criterion is the stricter one


def test_no_resolution_where_the_curve_does_not_cross() -> None:
    same = noise(0)
    agree = shell_correlation(same, same)
    assert agree.crossing() is None
    assert agree.detail_nm(0.143) is None
    apart = shell_correlation(noise(1), noise(2))
    assert apart.detail_nm(0.9) is None  # never above it


@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_noise_stays_within_chance(seed: int) -> None:
    c = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in BOX], indexing="ij"))
    mask = np.clip(4 * (0.9 - np.sqrt((c**2).sum(axis=0))), 0, 1)
    for m in (None, mask):
        found = shell_correlation(noise(seed), noise(seed + 1), mask=m)
        assert np.nanmean(np.abs(found.correlation) > found.chance) <= 0.1
        z = found.correlation * np.sqrt(2 * found.count)
        assert 0.3 < np.std(z[found.count > 20]) < 1.8  # chance is said rather too high than too low


@given(st.floats(0.1, 10), st.floats(-5, 5), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_scale_and_offset_do_not_matter(scale: float, offset: float, seed: int) -> None:
    a, b = noise(seed), noise(seed) + noise(seed + 1)
    one, other = shell_correlation(a, b), shell_correlation(scale * a + offset, b - offset)
    np.testing.assert_allclose(one.correlation, other.correlation, atol=2e-3)


def test_half_bit_has_its_limits() -> None:
    assert half_bit(1e12) == pytest.approx(0.1716, abs=1e-3)
    assert half_bit(1) == pytest.approx(1.0)
    assert np.all(np.diff(half_bit(np.array([1, 4, 10, 100, 1e4]))) < 0)


@pytest.mark.parametrize(
    ("first", "second", "mask", "why"),
    [
        (np.zeros((4, 4, 4)), np.zeros((4, 4, 5)), None, "one shape"),
        (np.full((4, 4, 4), np.nan), np.zeros((4, 4, 4)), None, "finite"),
        (np.zeros((4, 4, 4)), np.zeros((4, 4, 4)), np.zeros((4, 4, 4)), "empty"),
        (np.zeros((4, 4, 4)), np.zeros((4, 4, 4)), np.ones((4, 4)), "mask of shape"),
    ],
)
def test_what_cannot_be_correlated_is_said(first: np.ndarray, second: np.ndarray, mask: np.ndarray, why: str) -> None:
    with pytest.raises(XanesTomoError, match=why):
        shell_correlation(first, second, mask=mask)
