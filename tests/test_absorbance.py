from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from napari_xanes_tomo import open_series
from napari_xanes_tomo.absorbance import (
    absorbance,
    bin_frames,
    estimate_detector,
    fit_air,
    flat_for,
    mean_flat,
    normalise,
    plane,
    scan_detector,
)
from napari_xanes_tomo.model import EnergyScan, FlatSet, XanesTomoError
from napari_xanes_tomo.recipe import AbsorbanceParameters

RAW = AbsorbanceParameters(remove_air=False, stray_light="off", mask_bad_pixels=False)
GAIN, READ_NOISE = 0.137, 3.7


@dataclass(frozen=True)
class Frames:
    """Frames in memory that count as files."""

    data: npt.NDArray

    @property
    def frame_shape(self) -> tuple[int, int]:
        return self.data.shape[1], self.data.shape[2]

    @property
    def dtype(self) -> np.dtype:
        return self.data.dtype

    def __len__(self) -> int:
        return len(self.data)

    def read(self, index: int) -> npt.NDArray:
        return self.data[index]

    def read_rows(self, indices: list[int], y0: int, y1: int) -> npt.NDArray:
        return self.data[list(indices), y0:y1]

    def fingerprint(self) -> str:
        return "memory"


def flat_set(level: float, shots: int = 3, exposure: float = 1.0, shape=(24, 32), bad: tuple[int, ...] = ()) -> FlatSet:
    status = tuple("unreadable:truncated" if i in bad else "ok" for i in range(shots))
    return FlatSet(Frames(np.full((shots, *shape), level, np.uint16)), np.full(shots, exposure), status)


def scan(counts: npt.NDArray, flats: tuple[FlatSet, ...], half=None, exposure=1.0, status=None) -> EnergyScan:
    n = len(counts)
    half = np.zeros(n, int) if half is None else np.asarray(half)
    return EnergyScan(
        8570.0, np.linspace(-90, 89, n), Frames(counts), np.broadcast_to(exposure, n).astype(float),
        tuple(status or ("ok",) * n), flats, half, 1, 30.0, np.full(n, np.nan),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- counts to absorbance


@given(st.floats(0.05, 10), st.floats(0.01, 20), st.floats(50, 5000), st.integers(1, 60000))
def test_minus_the_natural_logarithm_scaled_by_exposure(one: float, other: float, rate: float, counts: int) -> None:
    out = absorbance(np.full((2, 2, 3), counts, np.uint16), [one, other], np.full((2, 3), rate))
    assert out.dtype == np.float32
    expected = -np.log(counts / rate / np.array([one, other]))
    np.testing.assert_allclose(out[:, 0, 0], expected, atol=1e-5)


def test_a_pixel_without_counts_is_half_a_count() -> None:
    out = absorbance(np.array([[[0, 1, 100]]], np.uint16), [1.0], np.full((1, 3), 100.0))
    np.testing.assert_allclose(out[0, 0], [-np.log(0.005), -np.log(0.01), 0], atol=1e-6)


def test_where_the_beam_is_dark_absorbance_is_0() -> None:
    rate = np.array([[100.0, 0.0, -1.0]])
    out = absorbance(np.full((2, 1, 3), 50, np.uint16), [1.0, 1.0], rate)
    np.testing.assert_allclose(out[:, 0], [[np.log(2), 0, 0]] * 2, atol=1e-6)


def test_counts_are_not_changed() -> None:
    counts = np.arange(12, dtype=np.float32).reshape(1, 3, 4)
    before = counts.copy()
    absorbance(counts, [1.0], np.ones((3, 4)))
    np.testing.assert_array_equal(counts, before)


def test_real_frames_have_the_absorbance_that_was_measured(data_dir: Path) -> None:
    # The whole frame at 8324 eV, exposures scaled, before any stray light is subtracted.
    series = open_series(data_dir / "ssrl_xanes")
    (one,) = [s for s in series.scans if s.energy_ev == 8324.0]
    flat = mean_flat(one.flats[flat_for(one, int(one.half[0]))])
    assert flat is not None
    good = np.flatnonzero(one.usable).tolist()
    counts = one.frames.read_rows(good, 0, one.frames.frame_shape[0])
    out = absorbance(counts, one.exposure_s[good], flat.rate)
    assert len(out) == 3
    for frame in out:
        assert float(np.median(frame)) == pytest.approx(1.08, abs=0.01)
    whole = normalise(one, RAW)
    np.testing.assert_allclose(whole.data, out, atol=2e-6)
    # Noise of this camera as measured on such frames: variance = 14 + 0.137 * counts.
    detector = scan_detector(one)
    assert detector.gain == pytest.approx(0.137, rel=0.05)
    assert detector.read_variance == pytest.approx(14, rel=0.15)


# ---------------------------------------------------------------------------------------------------------- flats


def test_mean_flat_is_a_rate_of_the_readable_shots() -> None:
    data = np.stack([np.full((4, 5), v, np.uint16) for v in (100, 65000, 300)])
    flats = FlatSet(Frames(data), np.array([0.5, 1.0, 1.5]), ("ok", "unreadable:truncated", "ok"))
    flat = mean_flat(flats)
    assert flat is not None
    np.testing.assert_allclose(flat.rate, 200)  # 100 / 0.5 and 300 / 1.5
    assert flat.shots == 2
    assert flat.exposure_s == pytest.approx(1.0)
    part = mean_flat(flats, (1, 3))
    assert part is not None
    assert part.rate.shape == (2, 5)


def test_no_readable_shot_no_flat() -> None:
    assert mean_flat(flat_set(100, shots=2, bad=(0, 1))) is None


@pytest.mark.parametrize(
    ("bad", "half", "expected"),
    [((), 0, 0), ((), 1, 1), ((1,), 1, 0), ((0,), 0, 1), ((0, 1), 0, 2), ((1,), 2, 2), ((0,), -1, 1), ((1, 2), 2, 0)],
)
def test_the_nearest_flats_stand_in(bad: tuple[int, ...], half: int, expected: int) -> None:
    flats = tuple(flat_set(100, shots=1, bad=(0,) if k in bad else ()) for k in range(3))
    assert flat_for(scan(np.ones((1, 24, 32), np.uint16), flats), half) == expected


def test_no_flats_at_all_is_an_error_that_names_the_energy() -> None:
    one = scan(np.ones((9, 24, 32), np.uint16), (flat_set(100, bad=(0, 1, 2)),))
    for function in (lambda: flat_for(one, 0), lambda: normalise(one, RAW)):
        with pytest.raises(XanesTomoError, match=r"8570 eV.*flat"):
            function()


def test_no_readable_projection_is_an_error_that_names_the_energy() -> None:
    one = scan(np.ones((2, 24, 32), np.uint16), (flat_set(100),), status=("unreadable:missing",) * 2)
    with pytest.raises(XanesTomoError, match=r"8570 eV.*projection"):
        normalise(one, RAW)


def test_each_half_is_divided_by_its_own_flats() -> None:
    counts = np.full((6, 24, 32), 400, np.uint16)
    out = normalise(scan(counts, (flat_set(1000), flat_set(2000)), half=[0, 0, 0, 1, 1, 1]), RAW)
    np.testing.assert_allclose(out.data[:3], np.log(1000 / 400), atol=1e-5)
    np.testing.assert_allclose(out.data[3:], np.log(2000 / 400), atol=1e-5)


def test_exposures_are_scaled() -> None:
    counts = np.stack([np.full((24, 32), 400 * k, np.uint16) for k in (1, 2, 4)])
    out = normalise(scan(counts, (flat_set(500, exposure=0.5),), exposure=np.array([1.0, 2.0, 4.0])), RAW)
    np.testing.assert_allclose(out.data, np.log(1000 / 400), atol=1e-5)


@pytest.mark.parametrize("bin", [1, 2, 4, 5])
def test_only_usable_frames_binned(bin: int) -> None:
    status = ("ok", "unreadable:missing", "ok", "excluded:by hand") + ("ok",) * 30
    counts = np.full((34, 24, 32), 400, np.uint16)
    counts[np.arange(34), 0, 0] = 50 + np.arange(34)
    out = normalise(scan(counts, (flat_set(1000),), status=status), RAW, bin=bin)
    index = [0, 2, *range(4, 34)]
    np.testing.assert_array_equal(out.index, index)
    assert out.data.shape == (32, 24 // bin, 32 // bin)
    corner = (np.log(1000 / (50 + np.array(index))) + (bin**2 - 1) * np.log(2.5)) / bin**2
    np.testing.assert_allclose(out.data[:, 0, 0], corner, rtol=1e-5)
    assert out.frame_shape == (24, 32)


@pytest.mark.parametrize(("shape", "bin"), [((6, 9), 3), ((7, 10), 3), ((5, 5), 2)])
def test_binning_averages_and_cuts_off_the_end(shape: tuple[int, int], bin: int) -> None:
    frames = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    out = bin_frames(frames, bin)
    h, w = shape[0] // bin, shape[1] // bin
    assert out.shape == (2, h, w)
    for y in range(h):
        for x in range(w):
            block = frames[:, y * bin : (y + 1) * bin, x * bin : (x + 1) * bin]
            np.testing.assert_allclose(out[:, y, x], block.mean(axis=(1, 2)), atol=1e-6)


def test_variance_is_that_of_the_absorbance() -> None:
    rng = np.random.default_rng(3)
    field = np.linspace(600, 1400, 64)[None, :] * np.ones((64, 1))

    def shots(level: np.ndarray, n: int) -> np.ndarray:
        quanta = rng.poisson(level / GAIN, (n, *level.shape))
        return np.rint(GAIN * quanta + READ_NOISE * rng.standard_normal(quanta.shape)).astype(np.uint16)

    # Two bright shots only, so that their noise is a third of the whole.
    flats = FlatSet(Frames(shots(field, 2)), np.ones(2), ("ok",) * 2)
    one = scan(shots(0.9 * field, 8), (flats,))
    for bin in (1, 2):
        out = normalise(one, RAW, bin=bin)
        rest = out.data + np.log(0.9)
        np.testing.assert_allclose(out.variance, rest.var(axis=(1, 2)), rtol=0.2)


# ------------------------------------------------------------------------------------------------ photon transfer


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_photon_transfer_finds_gain_and_read_noise(seed: int) -> None:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1:1:256j, -1:1:256j]
    quanta = 4500 * (1.05 - 0.5 * (y**2 + x**2))  # vignetted to almost nothing in the corners
    flats = np.stack(
        [
            GAIN * rng.poisson(quanta * beam) + READ_NOISE * rng.standard_normal(quanta.shape)
            for beam in 1 + 0.003 * rng.normal(size=10)
        ]
    )
    found = estimate_detector(np.clip(np.rint(flats), 0, 65535).astype(np.uint16))
    assert found.gain == pytest.approx(GAIN, rel=0.05)
    assert np.sqrt(found.read_variance - 1 / 12) == pytest.approx(READ_NOISE, rel=0.05)  # rounding adds 1/12


def test_an_even_field_is_all_photon_noise_or_nearly() -> None:
    rng = np.random.default_rng(0)
    flats = GAIN * rng.poisson(5000, (10, 100, 100))
    found = estimate_detector(flats)
    mean = GAIN * 5000
    # Gain and read noise cannot be told apart there; their sum at the level of the field can.
    assert found.read_variance + found.gain * mean == pytest.approx(GAIN * mean, rel=0.05)
    assert found.gain > 0
    assert found.read_variance >= 0


def test_one_shot_says_nothing() -> None:
    found = estimate_detector(np.ones((1, 8, 8)))
    assert (found.gain, found.read_variance) == (1.0, 0.0)
    assert scan_detector(scan(np.ones((1, 24, 32), np.uint16), (flat_set(100, shots=1),))) == found


def test_scan_detector_takes_the_first_set_that_can_tell() -> None:
    rng = np.random.default_rng(0)
    y = np.linspace(0.2, 1, 128)[:, None] * np.ones((1, 128))
    noisy = FlatSet(Frames(GAIN * rng.poisson(5000 * y, (8, 128, 128))), np.ones(8), ("ok",) * 8)
    one = scan(np.ones((1, 128, 128), np.uint16), (flat_set(100, bad=(0, 1), shape=(128, 128)), noisy))
    assert scan_detector(one).gain == pytest.approx(GAIN, rel=0.05)


# ------------------------------------------------------------------------------------------------------ air planes


def particle(shape: tuple[int, int], depth: float = 1.2) -> np.ndarray:
    """A ball in the middle, off centre, 0.6 of the field wide."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    r = ((y - shape[0] / 2 + 2) ** 2 + (x - shape[1] / 2 - 3) ** 2) / (0.3 * min(shape)) ** 2
    return (depth * np.sqrt(np.maximum(0, 1 - r))).astype(np.float32)


PLANES = np.array([[0.0, 0.0, 0.0], [0.03, 0.0, 0.0], [-0.02, 0.03, 0.0], [0.01, -0.02, 0.035]])


# Noise of a pixel, tolerance of every coefficient (absorbance at the edge of the field).
@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 1e-6), (0.01, 1.5e-3), (0.03, 4e-3)])
@pytest.mark.parametrize("shape", [(64, 64), (48, 64), (64, 50)])
def test_the_plane_around_an_object_is_found(shape: tuple[int, int], noise: float, tolerance: float) -> None:
    rng = np.random.default_rng(0)
    frames = plane(PLANES, shape) + particle(shape) + noise * rng.standard_normal((4, *shape))
    found, residual, masks = fit_air(frames.astype(np.float32), 1.5)
    np.testing.assert_allclose(found, PLANES, atol=tolerance)
    np.testing.assert_allclose(residual, noise, rtol=0.1, atol=1e-5)
    inner = particle(shape) > 0.5
    assert np.all(masks[:, inner])
    assert np.all(masks.mean(axis=(1, 2)) < 0.75)


def test_an_object_that_touches_the_border_does_not_pull() -> None:
    shape = (64, 64)
    frames = plane(PLANES, shape) + particle(shape)
    y, x = np.ogrid[:64, :64]
    frames += np.where((x > 24) & (x < 36) & (y > 40), 1.0, 0.0)  # a post that leaves the field at the bottom
    rng = np.random.default_rng(1)
    found, _, masks = fit_air((frames + 0.01 * rng.standard_normal(frames.shape)).astype(np.float32), 1.5)
    np.testing.assert_allclose(found, PLANES, atol=4e-3)
    assert np.all(masks[:, -1, 30])


def test_no_air_no_plane() -> None:
    # An object that fills the field to its border: no fit, and it says so.
    rng = np.random.default_rng(0)
    frame = np.full((32, 32), 1.0) + np.where(np.arange(32) % 2 == 0, 0.0, 5.0)[None, :]
    frame[8:24, 8:24] += rng.uniform(0, 3, (16, 16))
    found, residual, masks = fit_air(np.full((1, 32, 32), np.nan, np.float32), 2.0)
    np.testing.assert_array_equal(found, 0)
    assert np.isnan(residual[0])
    assert masks.all()


def test_planes_do_not_depend_on_binning_or_rows() -> None:
    shape = (48, 64)
    full = plane(PLANES, shape)
    np.testing.assert_allclose(bin_frames(full, 4), plane(PLANES, (12, 16)), atol=1e-6)
    np.testing.assert_array_equal(plane(PLANES, shape, (10, 20)), full[:, 10:20])
    # Level in the middle, slopes per half width, y down and x to the right.
    np.testing.assert_allclose(full.mean(axis=(1, 2)), PLANES[:, 0], atol=1e-6)
    np.testing.assert_allclose(full[:, 24:].mean(axis=(1, 2)) - PLANES[:, 0], PLANES[:, 1] * 12 / 32, atol=1e-6)
    np.testing.assert_allclose(full[:, :, 32:].mean(axis=(1, 2)) - PLANES[:, 0], PLANES[:, 2] / 2, atol=1e-6)


def test_normalise_takes_the_plane_out_and_can_be_given_it() -> None:
    shape = (64, 64)
    coefficients = np.tile(PLANES, (3, 1))
    true = particle(shape)
    counts = np.rint(50000 * np.exp(-(plane(coefficients, shape) + true))).astype(np.uint16)
    one = scan(counts, (flat_set(50000, shape=shape),), status=("ok",) * 5 + ("excluded:x",) + ("ok",) * 6)
    out = normalise(one, AbsorbanceParameters())
    np.testing.assert_allclose(out.air, coefficients[out.index], atol=1e-4)
    np.testing.assert_allclose(out.data, np.broadcast_to(true, out.data.shape), atol=5e-4)
    assert np.all(out.air_residual < 1e-3)
    assert 0.2 < out.object_fraction.mean() < 0.7
    planes = np.full((12, 3), np.nan)
    planes[out.index] = out.air
    again = normalise(one, AbsorbanceParameters(), air=planes)
    np.testing.assert_array_equal(again.data, out.data)
    np.testing.assert_array_equal(normalise(one, RAW).air, 0)


def test_progress_counts_the_frames() -> None:
    seen: list[tuple[int, int]] = []
    counts = np.full((40, 24, 32), 400, np.uint16)
    normalise(scan(counts, (flat_set(1000),)), RAW, progress=lambda what, done, total: seen.append((done, total)))
    assert seen[-1] == (40, 40)
    assert [d for d, _ in seen] == sorted({d for d, _ in seen})
