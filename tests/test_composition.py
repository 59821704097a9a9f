import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, shift

from napari_xanes_tomo.agreement import bin_volume
from napari_xanes_tomo.composition import grain_contrast, grown
from napari_xanes_tomo.model import Alignment
from napari_xanes_tomo.projector import Projector
from napari_xanes_tomo.registration import register
from napari_xanes_tomo.template import make_template

SHAPE = (21, 40, 44)  # odd, and not a cube


def halves(crack: float) -> tuple[npt.NDArray, npt.NDArray]:
    """A body with air around it and a crack at x = 22 between two halves, and 1.2 and 0.8 in them."""
    body = np.zeros(SHAPE, np.float32)
    body[3:-3, 4:-4, 4:-4] = 0.5
    body[:, :, 21:23] *= 1 - crack
    contrast = np.where(np.arange(SHAPE[2]) < 22, 1.2, 0.8).astype(np.float32)
    return body, np.broadcast_to(contrast, SHAPE)


@pytest.mark.parametrize("width", [128, 160])
def test_contrast_is_smooth_inside_grains_and_never_across_a_crack(width: int) -> None:
    body, contrast = halves(1.0)
    noise = np.random.default_rng(0).normal(0, 0.02, SHAPE)
    found = grain_contrast(body, (3 * body * contrast + noise).astype(np.float32), 0.5, width=width)
    assert found.shape == SHAPE
    found *= contrast[body > 0].mean() / found[body > 0].mean()  # a common factor is no contrast
    np.testing.assert_allclose(found[body > 0], contrast[body > 0], atol=0.02)
    whole, _ = halves(0.0)
    blended = grain_contrast(whole, whole * contrast, 0.5, width=width)
    assert abs(blended[10, 20, 20] - blended[10, 20, 23]) < 0.25  # 0.4 without a way through


@given(st.floats(-0.3, 0.3), st.floats(-0.3, 0.3))
@settings(max_examples=10, deadline=None)
def test_a_displacement_is_not_taken_for_a_contrast(dy: float, dx: float) -> None:
    body = gaussian_filter(halves(1.0)[0], 0.6)
    moved = shift(body, (dy, 0, dx), order=3)
    found = grain_contrast(body, moved, 0.5, width=128)
    assert np.abs(found[body > 0.45] - 1).max() < 0.2 * max(abs(dy), abs(dx)) + 1e-3


@given(st.integers(1, 3), st.integers(5, 9))
def test_binned_and_grown_again(k: int, rows: int) -> None:
    volume = np.random.default_rng(rows).normal(size=(rows // k, 4, 5)).astype(np.float32)
    large = grown(volume, k, rows)
    assert large.shape == (rows, 4 * k, 5 * k)
    np.testing.assert_allclose(bin_volume(large, k), volume, rtol=1e-5)
    assert np.all(large[rows // k * k :] == 1)


def test_without_anything_solid_there_is_no_contrast() -> None:
    nothing = np.zeros(SHAPE, np.float32)
    for reference, other in ((nothing, nothing), (halves(1.0)[0], nothing), (halves(1.0)[0], -halves(1.0)[0])):
        np.testing.assert_array_equal(grain_contrast(reference, other, 0.5, width=128), np.ones(SHAPE))


def test_grains_of_another_composition_do_not_move_the_object() -> None:
    # A ball in frames of 128 columns, cracked in two; its halves differ at the other energy.
    n, theta = 128, np.arange(-90.0, 90.0, 3.0)
    y, z, x = np.meshgrid(*(np.arange(m) - (m - 1) / 2 for m in (72, n, n)), indexing="ij")
    ball = (y**2 + z**2 + x**2 < 31**2) & (np.abs(y + 6) > 1)
    contrast = np.where(y > -6, 1.2, 0.8)
    volume = gaussian_filter(0.02 * ball, 0.6).astype(np.float32)
    other = gaussian_filter(0.02 * ball * contrast, 0.6).astype(np.float32)
    here, there = (Projector(n, theta).forward(v) for v in (volume, other))
    rng = np.random.default_rng(1)
    here, there = (a + rng.normal(0, 0.003, a.shape).astype(np.float32) for a in (here, there))
    still = Alignment(np.zeros((len(theta), 2)), np.full((len(theta), 2), 0.01))
    template = make_template(here, theta, still)
    plain = register(there, theta, still, template, magnification=1.0, grains=False)
    found = register(there, theta, still, template, magnification=1.0)
    assert not plain.pull.any()
    assert abs(plain.translation[0]) > 0.015
    assert abs(found.translation[0]) < 0.45 * abs(plain.translation[0])
    np.testing.assert_allclose(found.translation[1:], plain.translation[1:], atol=1e-3)
    np.testing.assert_allclose(found.translation + found.pull[2:5], plain.translation, atol=1e-9)
    np.testing.assert_allclose(found.place[2:5], found.translation, atol=1e-9)
    # Nothing is taken out where the composition is the same.
    assert np.abs(register(here, theta, still, template, magnification=1.0).pull[2:5]).max() < 1e-3
