from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_xanes_tomo import open_series
from napari_xanes_tomo.absorbance import normalise
from napari_xanes_tomo.images import match_images, register_images
from napari_xanes_tomo.injection import moved_copies
from napari_xanes_tomo.model import Alignment, XanesTomoError
from napari_xanes_tomo.recipe import AbsorbanceParameters

SHAPE = (84, 96)  # not square
ENERGIES = (8300.0, 8328.0, 8345.0, 8350.0, 8400.0, 8570.0)
RNG = np.random.default_rng(3)
BALLS = [(*RNG.uniform(-26, 26, 2), r, k % 3) for k, r in enumerate(RNG.uniform(3, 9, 22))]
CONTRAST = {  # of three sorts of grains: they change places across the edge
    8300.0: (1.0, 0.6, 0.8), 8328.0: (1.0, 0.6, 0.8), 8345.0: (0.9, 1.0, 0.7), 8350.0: (0.8, 1.3, 1.0),
    8400.0: (0.8, 1.1, 0.6), 8570.0: (0.76, 1.05, 0.57),
}  # fmt: skip


def picture(at: Alignment, contrast=(1.0, 0.8, 0.6), *, noise: float = 0.0, seed: int = 0) -> npt.NDArray[np.float32]:
    """Balls recorded at p = M R q + shift, averaged over pixels."""
    fine = 3
    sub = (np.arange(fine) - (fine - 1) / 2) / fine
    y, x = ((np.arange(n)[:, None] + sub - (n - 1) / 2).ravel() for n in SHAPE)
    p = np.stack(np.meshgrid(y, x, indexing="ij"), axis=-1) - at.shift[0]
    q = p @ np.linalg.inv(at.matrix).T
    out = np.zeros(q.shape[:2])
    for cy, cx, r, sort in BALLS:
        out += 0.1 * contrast[sort] * np.sqrt(np.maximum(r**2 - (q[..., 0] - cy) ** 2 - (q[..., 1] - cx) ** 2, 0))
    out = out.reshape(SHAPE[0], fine, SHAPE[1], fine).mean(axis=(1, 3))
    return (out + noise * np.random.default_rng(seed).standard_normal(out.shape)).astype(np.float32)


def at(dy: float, dx: float, m: float = 1.0, roll: float = 0.0) -> Alignment:
    return Alignment(np.array([[dy, dx]]), np.zeros((1, 2)), m, roll)


# Shift px, magnification, roll; noise; tolerance of the shift px and of ln M.
@pytest.mark.parametrize(
    ("true", "noise", "tolerance_px", "tolerance_m"),
    [
        (at(0, 0), 0.0, 1e-3, 1e-5),
        (at(0.3, -0.4), 0.0, 0.01, 2e-4),
        (at(7.2, -11.6), 0.0, 0.01, 2e-4),
        (at(2.5, 1.5, 1.03), 0.0, 0.01, 5e-4),
        (at(-2.5, 1.5, 0.96, 0.4), 0.0, 0.02, 1e-3),
        (at(0.3, -0.4), 0.05, 0.05, 2e-3),
        (at(7.2, -11.6, 0.99), 0.05, 0.05, 2e-3),
    ],
)
def test_a_known_place_is_found(true: Alignment, noise: float, tolerance_px: float, tolerance_m: float) -> None:
    start = at(np.nan, np.nan, round(true.magnification, 2) if abs(true.magnification - 1) > 0.02 else 1.0)
    found = match_images(
        picture(true, noise=noise, seed=1),
        picture(at(0, 0), noise=noise, seed=2),
        start=start,
        roll=bool(true.roll_deg),
    )
    np.testing.assert_allclose(found.alignment.shift, true.shift, atol=tolerance_px)
    assert np.log(found.alignment.magnification / true.magnification) == pytest.approx(0, abs=tolerance_m)
    assert found.alignment.roll_deg == pytest.approx(true.roll_deg, abs=0.05)
    assert found.correlation > 0.6
    if noise:
        assert np.all(np.abs(found.alignment.shift - true.shift) < 4 * found.sigma[2:])


@settings(max_examples=10, deadline=None)
@given(st.floats(-6, 6), st.floats(-6, 6))
def test_forth_and_back_is_nowhere(dy: float, dx: float) -> None:
    one, two = picture(at(dy, dx), noise=0.03, seed=1), picture(at(0, 0), noise=0.03, seed=2)
    there = match_images(one, two, scale=False).alignment.shift
    back = match_images(two, one, scale=False).alignment.shift
    np.testing.assert_allclose(there, -back, atol=0.01)


def test_noise_does_not_pull_the_scale() -> None:
    # As the template of the other, a noisy image makes every image seem larger or smaller; here the noise cancels.
    scales = []
    for seed in range(12):
        one, two = (picture(at(0.37 * k, 0.21 * k), noise=0.12, seed=2 * seed + k) for k in (0, 1))
        scales.append(np.log(match_images(two, one).alignment.magnification))
    assert abs(np.mean(scales)) < 3 * np.std(scales) / np.sqrt(len(scales))


def test_stated_errors_are_true() -> None:
    z = []
    for seed in range(20):
        one, two = (picture(at(1.3 * k, -0.6 * k), noise=0.08, seed=100 + 2 * seed + k) for k in (0, 1))
        found = match_images(two, one, scale=False)
        z.append((found.alignment.shift[0] - (1.3, -0.6)) / found.sigma[2:])
    assert 0.6 < np.sqrt(np.mean(np.square(z))) < 1.6


def test_what_is_fixed_to_the_camera_is_left_out() -> None:
    usable = np.ones(SHAPE, bool)
    usable[-9:] = False
    true = at(4.3, -2.6)
    one, two = picture(true, noise=0.02, seed=1), picture(at(0, 0), noise=0.02, seed=2)
    for image in (one, two):
        image[-9:] = 3 + np.sin(np.arange(SHAPE[1]))
    found = match_images(one, two, usable=usable, template_usable=usable, scale=False)
    np.testing.assert_allclose(found.alignment.shift, true.shift, atol=0.05)


@pytest.fixture(scope="module")
def stack() -> tuple[npt.NDArray, list[Alignment]]:
    rng = np.random.default_rng(5)
    true = [at(*rng.normal(0, 3, 2), 1 - 2e-3 * (e - 8570.0) / 20) for e in ENERGIES]
    true[-1] = at(0, 0)
    images = [picture(a, CONTRAST[e], noise=0.02, seed=k) for k, (e, a) in enumerate(zip(ENERGIES, true, strict=True))]
    return np.stack(images), true


def test_images_across_an_edge(stack: tuple[npt.NDArray, list[Alignment]]) -> None:
    images, true = stack
    guess = [a.magnification * 1.001 for a in true]
    found = register_images(images, ENERGIES, magnification=guess)
    assert found.reference == 5
    assert not found.failed
    for a, b, sigma in zip(found.alignments, true, found.magnification_sigma, strict=True):
        np.testing.assert_allclose(a.shift, b.shift, atol=0.06)
        assert abs(np.log(a.magnification / b.magnification)) < 2e-3
        assert sigma < 2e-3
    np.testing.assert_array_equal(found.alignments[5].shift, 0)
    assert found.closures
    assert found.quality.verdict == "good"
    # The same two times.
    again = register_images(images, ENERGIES, magnification=guess)
    for a, b in zip(found.alignments, again.alignments, strict=True):
        np.testing.assert_array_equal(a.shift, b.shift)


def test_a_scale_that_is_given_is_kept(stack: tuple[npt.NDArray, list[Alignment]]) -> None:
    images, true = stack
    given_ = [a.magnification for a in true]
    found = register_images(images, ENERGIES, magnification=given_, scale=False)
    np.testing.assert_allclose([a.magnification for a in found.alignments], given_, rtol=1e-9)
    np.testing.assert_array_equal(found.magnification_sigma, 0)


def test_an_image_without_signal_harms_no_other(stack: tuple[npt.NDArray, list[Alignment]]) -> None:
    images, true = stack
    good = register_images(images, ENERGIES, magnification=[a.magnification for a in true])
    for nothing in (np.zeros(SHAPE), np.full(SHAPE, np.nan)):
        bad = images.copy()
        bad[1] = nothing
        found = register_images(bad, ENERGIES, magnification=[a.magnification for a in true])
        assert list(found.failed) == [1]
        assert "8328 eV" in found.failed[1]
        assert found.alignments[1].status[0].startswith("excluded:")
        assert np.isnan(found.alignments[1].shift).all()
        assert found.quality.verdict == "check"
        for k in (0, 2, 3, 4):
            np.testing.assert_allclose(found.alignments[k].shift, good.alignments[k].shift, atol=0.03)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: register_images(np.zeros((1, 64, 64)), [8570.0]), "at least two"),
        (lambda: register_images(np.zeros((2, 64)), [8570.0, 8000.0]), "at least two"),
        (lambda: register_images(np.zeros((3, 64, 64)), [8570.0, 8000.0]), "an energy for each"),
        (
            lambda: register_images(np.zeros((2, 64, 64)), [8570.0, 8000.0]),
            "the reference.*pixels are the same",
        ),
        (lambda: register_images(np.ones((2, 64, 64)), [1.0, 2.0], magnification=[1.0, -1.0]), "2 positive numbers"),
        (lambda: register_images(np.ones((2, 64, 64)), [1.0, 2.0], reference=2), "number of one of 2"),
        (lambda: register_images(np.ones((2, 64, 64)), [1.0, 2.0], usable=np.ones((3, 3), bool)), "usable: expected"),
        (lambda: match_images(np.zeros((64, 64)), np.zeros((64, 60))), "one shape"),
        (lambda: match_images(np.zeros((8, 8)), np.zeros((8, 8))), "at least 16 px"),
    ],
)
def test_what_cannot_be_registered_is_refused(call, message: str) -> None:
    with pytest.raises(XanesTomoError, match=message):
        call()


# ------------------------------------------------------------------------------------------------- measured frames


def test_frames_of_a_microscope(data_dir: Path) -> None:
    """Three repeats at two energies of one field of particles, across the nickel edge."""
    if not (data_dir / "ssrl_xanes").is_dir():
        pytest.skip("no measured frames of this scan here")
    scans = {s.energy_ev: s for s in open_series(data_dir / "ssrl_xanes").scans if s.usable.any()}
    low, high = (normalise(scans[e], AbsorbanceParameters()) for e in (8324.0, 8354.0))
    assert low.beam is not None
    bare = low.beam.basis((0, 1024))[0][0]
    usable = bare > 0.3 * np.median(bare)  # the beam does not reach the lowest rows
    assert usable.mean() < 0.95

    def shift(image, template) -> npt.NDArray:
        found = match_images(image, template, usable=usable, template_usable=usable, scale=False)
        return found.alignment.shift[0]

    # The repeats drift, and close.
    drift = {(i, j): shift(low.data[i], low.data[j]) for i, j in ((1, 0), (2, 1), (2, 0))}
    assert 0.3 < np.hypot(*drift[1, 0]) < 0.7
    assert np.abs(drift[2, 0] - drift[1, 0] - drift[2, 1]).max() < 0.05
    # The sample's own absorbance moved on the unmoved flats, with fresh noise: found in addition to the drift.
    put = np.zeros((3, 2))
    put[1] = (3.3, -5.7)
    copies = moved_copies(scans[8324.0], low.beam, put, rng=np.random.default_rng(0))
    moved = normalise(replace(scans[8324.0], frames=copies), AbsorbanceParameters())
    np.testing.assert_allclose(shift(moved.data[1], low.data[0]) - drift[1, 0], put[1], atol=0.1)
    # Across the edge the field moves by 23 px. The dark band and the vignette, which do not move, do not hold it, and
    # the other repeats say the same.
    across = [match_images(high.data[k], low.data[0], usable=usable, template_usable=usable) for k in (0, 2)]
    assert 20 < np.hypot(*across[0].alignment.shift[0]) < 25
    ratio = scans[8324.0].pixel_size_nm / scans[8354.0].pixel_size_nm
    assert across[0].alignment.magnification == pytest.approx(ratio, abs=3e-4)
    own = shift(high.data[2], high.data[0])
    assert np.abs(across[1].alignment.shift[0] - across[0].alignment.shift[0] - own).max() < 0.05
