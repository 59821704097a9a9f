"""Components, clusters, means of regions, correlations: known truth and laws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from napari_xanes_tomo.analysis import cluster, correlation, principal_components, region_means
from napari_xanes_tomo.model import XanesTomoError
from napari_xanes_tomo.phantom import ni_xanes

ENERGY = np.arange(8300.0, 8400.0, 2.0)


def spectra(n: int, noise: float, seed: int = 0):
    """Two phases and a shift: (energies, n), and the truth (phase, shift)."""
    rng = np.random.default_rng(seed)
    phase, shift = rng.integers(0, 2, n), 0.3 * rng.normal(size=n)
    clean = np.stack([ni_xanes(ENERGY, 3.0 * p + s) for p, s in zip(phase, shift, strict=True)], axis=1)
    return clean + noise * rng.normal(size=clean.shape), phase, clean


@pytest.mark.parametrize("noise", [0.02, 0.1])
def test_components_of_known_mixtures(noise: float) -> None:
    rng = np.random.default_rng(1)
    basis = np.stack([ni_xanes(ENERGY, -2.0), ni_xanes(ENERGY, 2.0), 0.3 * np.sin(ENERGY / 9.0)])
    y = basis.T @ rng.uniform(0, 1, (3, 3000))
    variance = noise**2 * np.linspace(0.5, 2, len(ENERGY))
    found = principal_components(y + np.sqrt(variance)[:, None] * rng.normal(size=y.shape), variance=variance)
    assert found.significant == 3
    assert np.all(np.diff(found.share) <= 0)
    # What is left out is noise, so that what stays is nearer to the truth: 3 of 50 energies' worth of it is left.
    left = np.sqrt(np.mean((found.denoised() - y) ** 2))
    assert left < 0.35 * noise


def test_pure_noise_has_no_component() -> None:
    for seed in range(5):
        y = np.random.default_rng(seed).normal(size=(40, 2000))
        assert principal_components(y, variance=np.ones(40)).significant <= 1


@given(st.floats(0.1, 10), st.floats(-5, 5))
@settings(max_examples=20)
def test_components_follow_unit_and_zero(scale: float, level: float) -> None:
    y = spectra(200, 0.05)[0]
    one, other = principal_components(y), principal_components(scale * y + level)
    np.testing.assert_allclose(other.share, one.share, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(other.denoised(2), scale * one.denoised(2) + level, rtol=1e-6, atol=1e-6)


def test_spectra_with_holes_are_left_out() -> None:
    y = spectra(100, 0.05)[0]
    holed = np.concatenate([y, np.full((len(y), 2), np.nan)], axis=1)
    one, other = principal_components(y), principal_components(holed)
    np.testing.assert_allclose(other.scores[:, :100], one.scores)
    assert np.isnan(other.scores[:, 100:]).all()
    groups = cluster(other.scores[:2], 2)
    assert np.all(groups.labels[100:] == 0)
    assert np.all(groups.labels[:100] > 0)


def test_phases_are_told_apart() -> None:
    y, phase, _ = spectra(2000, 0.1)
    found = cluster(principal_components(y).scores[:2], 2)
    agree = np.mean((found.labels - 1) == phase)
    assert max(agree, 1 - agree) > 0.98
    assert np.sum(found.labels == 1) >= np.sum(found.labels == 2)
    assert found.inertia < 0.4


@given(st.integers(1, 6), st.integers(0, 50))
@settings(max_examples=25)
def test_groups_are_those_of_the_nearest_centre_and_repeat(groups: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(3, 60))
    found = cluster(x, groups)
    again = cluster(x, groups)
    np.testing.assert_array_equal(found.labels, again.labels)
    assert set(found.labels) == set(range(1, groups + 1))
    distance = np.sum((x[:, None, :] - found.centres.T[:, :, None]) ** 2, axis=0)
    np.testing.assert_array_equal(distance.argmin(axis=0) + 1, found.labels)
    counts = np.bincount(found.labels)[1:]
    assert np.all(np.diff(counts) <= 0)


def correlated(shape: tuple[int, ...], seed: int, blur: float = 1.2) -> np.ndarray:
    field = gaussian_filter(np.random.default_rng(seed).normal(size=shape), blur, mode="wrap")
    return field / field.std()


def test_the_error_of_a_mean_knows_that_voxels_are_correlated() -> None:
    # Many maps of correlated noise: what is stated against the scatter of the means; plain sigma / sqrt(n) is far off.
    labels = np.zeros((36, 48, 48), int)
    labels[:, :24], labels[:, 24:] = 1, 2
    means, stated = [], []
    for seed in range(40):
        found = region_means(correlated(labels.shape, seed), labels)
        means.append(found.mean)
        stated.append(found.sigma)
    true = np.std(means)
    assert np.mean(stated) == pytest.approx(true, rel=0.3)
    assert 1 / np.sqrt(found.voxels[0]) < 0.2 * true


def test_half_sets() -> None:
    labels = np.ones((12, 24, 24), int)
    ratio = []
    for seed in range(60):
        a, b = (5.0 + correlated(labels.shape, 2 * seed + k) for k in range(2))
        found = region_means(0.5 * (a + b), labels, halves=(a, b))
        ratio.append((found.mean[0] - 5.0) / found.sigma[0])
    # Half the difference of two has the spread of their mean: the ratio of two equal normals, median of |.| is 1.
    assert 0.6 < np.median(np.abs(ratio)) < 1.6


def test_regions_of_many_maps_and_what_has_no_value() -> None:
    labels = np.zeros((12, 12, 12), int)
    labels[:6], labels[6:8] = 3, 7
    labels[11, 11, 11] = 9
    values = np.stack([np.full(labels.shape, 2.0), np.arange(12.0)[:, None, None] + np.zeros(labels.shape)])
    values[:, 11, 11, 11] = np.nan
    found = region_means(values, labels, block=2)
    np.testing.assert_array_equal(found.labels, [3, 7, 9])
    np.testing.assert_array_equal(found.voxels, [864, 288, 0])
    np.testing.assert_allclose(found.mean[:, :2], [[2, 2], [2.5, 6.5]])
    assert np.isnan(found.mean[:, 2]).all()
    np.testing.assert_allclose(found.sigma[0, :2], 0, atol=1e-12)
    single = region_means(values[1], labels, block=2)
    np.testing.assert_allclose(single.mean, found.mean[1])
    assert np.isnan(region_means(values[1], labels, block=12).sigma).all()  # one block says nothing


def test_correlation_and_its_error() -> None:
    mask = np.ones((16, 32, 32), bool)
    r, stated = [], []
    for seed in range(40):
        a, b = (correlated(mask.shape, 2 * seed + k) for k in range(2))
        found = correlation(a, b, mask)
        r.append(found.r)
        stated.append(found.sigma)
        assert correlation(a, 3 * a + 1, mask).r == pytest.approx(1.0)
    assert np.mean(stated) == pytest.approx(np.std(r), rel=0.35)
    assert np.std(r) > 3 / np.sqrt(mask.sum())


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda: principal_components(np.full((4, 9), np.nan)), "3 spectra or more"),
        (lambda: principal_components(np.ones((4, 9)), variance=np.zeros(4)), "positive noise variance"),
        (lambda: cluster(np.ones((2, 3)), 4), "expected 1 to 3 groups"),
        (lambda: region_means(np.ones((2, 2, 2)), np.ones((2, 2, 3))), "labels of the shape"),
        (lambda: correlation(np.ones((2, 2, 2)), np.ones((2, 2, 2)), np.ones((2, 2, 2)), block=0), "at least 1 voxel"),
    ],
)
def test_what_cannot_be_analysed_is_one_line(call, why: str) -> None:
    with pytest.raises(XanesTomoError, match=why):
        call()


def test_identical_points_and_empty_masks() -> None:
    assert set(cluster(np.ones((2, 5)), 2).labels) <= {1, 2}
    assert np.isnan(correlation(np.ones((3, 3, 3)), np.ones((3, 3, 3)), np.zeros((3, 3, 3))).r)
