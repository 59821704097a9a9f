from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from napari_xanes_tomo import open_series
from napari_xanes_tomo.absorbance import (
    Detector,
    absorbance,
    absorbance_variance,
    estimate_detector,
    fill_masked,
    fit_air,
    flat_for,
    mean_flat,
    normalise,
    plane,
    read_absorbance,
    scan_detector,
)
from napari_xanes_tomo.agreement import bin_frames
from napari_xanes_tomo.detector import mask_from_runs, mask_runs
from napari_xanes_tomo.model import ArrayFrames, EnergyScan, FlatSet, XanesTomoError
from napari_xanes_tomo.recipe import AbsorbanceParameters, Recipe
from napari_xanes_tomo.screening import screen
from napari_xanes_tomo.steps import run_flats
from napari_xanes_tomo.stray_light import stray_jump_effect

RAW = AbsorbanceParameters(remove_air=False, stray_light="off", mask_bad_pixels=False)
GAIN, READ_NOISE = 0.137, 3.7


def flat_set(level: float, shots: int = 3, exposure: float = 1.0, shape=(24, 32), bad: tuple[int, ...] = ()) -> FlatSet:
    status = tuple("unreadable:truncated" if i in bad else "ok" for i in range(shots))
    return FlatSet(ArrayFrames(np.full((shots, *shape), level, np.uint16)), np.full(shots, exposure), status)


def scan(counts: npt.NDArray, flats: tuple[FlatSet, ...], half=None, exposure=1.0, status=None) -> EnergyScan:
    n = len(counts)
    half = np.zeros(n, int) if half is None else np.asarray(half)
    return EnergyScan(
        8570.0, np.linspace(-90, 89, n), ArrayFrames(counts), np.broadcast_to(exposure, n).astype(float),
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
    flats = FlatSet(ArrayFrames(data), np.array([0.5, 1.0, 1.5]), ("ok", "unreadable:truncated", "ok"))
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
    flats = FlatSet(ArrayFrames(shots(field, 2)), np.ones(2), ("ok",) * 2)
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
    noisy = FlatSet(ArrayFrames(GAIN * rng.poisson(5000 * y, (8, 128, 128))), np.ones(8), ("ok",) * 8)
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


# ----------------------------------------------------------------------------------------------- flats by policy


def block_of(levels: list[float], n: int = 12, shape=(24, 32), **options) -> EnergyScan:
    """Projections of 400 counts between sets of flats of these levels, evenly in time."""
    flats = tuple(flat_set(v, shape=shape, **options) for v in levels)
    half = np.repeat(np.arange(len(levels)), n // len(levels))
    return scan(np.full((n, *shape), 400, np.uint16), flats, half=half)


def seen(one: EnergyScan, use: str, **options) -> npt.NDArray:
    """Bare beam, counts per second, behind every projection."""
    return 400 * np.exp(normalise(one, RAW, use=use, **options).data[:, 5, 5])


# Sets of 1000 and 2000 counts/s stand half a step before projections 0 and 6.
@pytest.mark.parametrize(
    ("use", "expected"),
    [
        ("own half", [1000] * 6 + [2000] * 6),
        ("half 1", [1000] * 12),
        ("half 2", [2000] * 12),
        ("nearest in time", [1000] * 3 + [2000] * 9),
        ("time-weighted", [1000 * (1 + (i + 0.5) / 6) for i in range(6)] + [2000] * 6),
    ],
)
def test_policies(use: str, expected: list[float]) -> None:
    np.testing.assert_allclose(seen(block_of([1000, 2000]), use), expected, rtol=1e-5)


def test_after_the_last_flats_of_an_energy_those_of_the_next_weigh_in_scaled() -> None:
    one, following = block_of([1000, 2000]), block_of([500])
    ramp = np.linspace(0.9, 1.1, 32)[None, :] * np.ones((24, 1))
    tilted = FlatSet(ArrayFrames(np.rint(5000 * ramp).astype(np.uint16)[None]), np.ones(1), ("ok",))
    following = replace(following, flats=(tilted,))
    out = normalise(one, RAW, use="time-weighted", number=0, around={0: one, 1: following})
    beam = 400 * np.exp(out.data)
    part = (np.arange(6) + 0.5) / 6
    for x in (0, 31):
        np.testing.assert_allclose(beam[6:, 5, x], 2000 * (1 - part + part * ramp[0, x]), rtol=1e-3)


def test_without_flats_the_nearest_are_offered_and_taken_when_asked_for() -> None:
    shape = (64, 64)
    true = particle(shape)
    counts = np.rint(30000 * np.exp(-np.broadcast_to(true, (12, *shape)))).astype(np.uint16)
    none = scan(counts, ())
    around = {0: block_of([50000], shape=shape), 1: none, 2: block_of([40000], shape=shape)}
    with pytest.raises(XanesTomoError, match=r"8570 eV.*nearest.*next energy") as error:
        normalise(none, AbsorbanceParameters(), number=1, around=around)
    assert "\n" not in str(error.value)
    out = normalise(none, AbsorbanceParameters(), number=1, around=around, use="next energy")
    np.testing.assert_allclose(out.data, np.broadcast_to(true, out.data.shape), atol=2e-3)
    assert any("no flats of its own" in note for note in out.notes)
    assert out.beam is not None
    assert out.beam.origins == ((2, 0),)
    # The scale is in the beam: 40000 are 30000 here.
    assert float(out.beam.basis((0, 64))[0].mean()) == pytest.approx(30000, rel=1e-3)


@pytest.mark.parametrize("use", ["half 3", "half 0", "my own", "", "half one"])
def test_flats_nobody_knows_are_refused(use: str) -> None:
    with pytest.raises((XanesTomoError, ValueError), match=r"half|expected"):
        normalise(block_of([1000, 2000]), RAW, use=use)


def test_exceptions_of_the_recipe() -> None:
    p = AbsorbanceParameters(flats="own half", flats_at=("8570: half 2", "8344.0 eV: next energy"))
    assert [p.flats_for(v) for v in (8570.0, 8344.02, 6534.0)] == ["half 2", "next energy", "own half"]
    for wrong in ("8570", "8570: best", "eV: half 1"):
        with pytest.raises(ValueError, match="expected"):
            AbsorbanceParameters(flats_at=(wrong,))
    parameters = RAW.model_copy(update={"flats_at": ("8570: half 2",)})
    out = normalise(block_of([1000, 2000]), parameters)
    np.testing.assert_allclose(out.data, np.log(5), atol=1e-5)


def changing_field(strength: float, *, shots: int = 10, n: int = 24, seed: int = 0, swapped: bool = False):
    """A particle in a beam whose pattern slides between the shots; (scan, true absorbance)."""
    rng = np.random.default_rng(seed)
    shape = (64, 64)
    y, x = np.mgrid[:64, :64] / 64
    base = 1 + 0.2 * np.cos(5 * x) * np.cos(4 * y)

    def field(phase: float) -> npt.NDArray:
        return 60000 * 0.7 * base * (1 + strength * np.sin(22 * x + 17 * y + phase))

    def expose(f: npt.NDArray) -> npt.NDArray:
        return np.clip(np.rint(rng.normal(f, np.sqrt(0.137 * f))), 0, 65535).astype(np.uint16)

    phases = rng.uniform(-0.8, 0.8, (2, shots))
    sets = [np.stack([expose(field(p)) for p in row]) for row in phases]
    true = particle(shape)
    moving = rng.uniform(-0.8, 0.8, n) if not swapped else np.zeros(n)
    counts = np.stack([expose(field(p) * np.exp(-true)) for p in moving])
    flats = tuple(FlatSet(ArrayFrames(s), np.ones(shots), ("ok",) * shots) for s in sets)
    return scan(counts, flats, half=np.arange(n) * 2 // n), true


def test_principal_components_follow_a_beam_that_changes_from_shot_to_shot() -> None:
    one, true = changing_field(0.02)
    own = normalise(one, AbsorbanceParameters(flats="own half"))
    pca = normalise(one, AbsorbanceParameters(flats="pca"))
    auto = normalise(one, AbsorbanceParameters())
    assert pca.use == auto.use == ("pca", "pca")
    worst = {name: float(np.std(d.data - true)) for name, d in (("own", own), ("pca", pca), ("auto", auto))}
    assert worst["own"] > 0.005
    assert worst["pca"] < 0.5 * worst["own"]
    np.testing.assert_array_equal(auto.data, pca.data)
    # What was compared is kept, for every half.
    assert set(auto.candidates) >= {"own half", "half 1", "half 2", "time-weighted", "pca"}
    assert all(len(v) == 2 for v in auto.candidates.values())
    assert all(p < 0.95 * o for p, o in zip(auto.candidates["pca"], auto.candidates["own half"], strict=True))


def test_a_steady_beam_keeps_its_own_flats() -> None:
    one, _ = changing_field(0.0)
    assert normalise(one, AbsorbanceParameters()).use == ("own half", "own half")


def test_flats_of_the_wrong_half_are_found_out() -> None:
    rng = np.random.default_rng(0)
    shape = (64, 64)
    bump = 1 + 0.05 * np.cos(np.arange(64) / 4)[None, :] * np.ones((64, 1))
    beams = [40000 * bump, np.full(shape, 40000.0)]
    true = particle(shape)
    sets = tuple(
        FlatSet(ArrayFrames(np.rint(np.stack([b] * 3)).astype(np.uint16)), np.ones(3), ("ok",) * 3) for b in beams
    )
    counts = np.stack([rng.normal(beams[1] * np.exp(-true), 50) for _ in range(12)]).astype(np.uint16)
    one = scan(counts, sets, half=[0] * 6 + [1] * 6)
    out = normalise(one, AbsorbanceParameters())
    assert out.use == ("half 2", "own half")
    np.testing.assert_allclose(out.data.mean(axis=0), true, atol=6e-3)


def test_the_rows_read_for_the_maps_are_those_that_were_estimated_from() -> None:
    one, _ = changing_field(0.02)
    for use in ("own half", "pca", "time-weighted", "half 2"):
        whole = normalise(one, AbsorbanceParameters(), use=use)
        air = np.zeros((len(one), whole.air.shape[1]))
        air[whole.index] = whole.air
        rows = read_absorbance(one, whole.beam, whole.index[3:15], (17, 41), air=air)
        np.testing.assert_allclose(rows, whole.data[3:15, 17:41], atol=3e-6)
        again = normalise(one, AbsorbanceParameters(), beam=whole.beam, air=air)
        np.testing.assert_allclose(again.data, whole.data, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", [(30, 30), (slice(30, 34),), (slice(None),)])
def test_a_frame_with_values_that_are_no_numbers_is_flagged(where: tuple, bad: float) -> None:
    """One pixel is enough; the others are as they would be without it."""
    rng = np.random.default_rng(0)
    true = particle((64, 64))
    sets = (FlatSet(ArrayFrames(rng.normal(40000, 50, (3, 64, 64)).astype("f4")), np.ones(3), ("ok",) * 3),)
    counts = np.stack([rng.normal(40000 * np.exp(-true), 50) for _ in range(12)]).astype("f4")
    sound = normalise(scan(counts, sets, half=[0] * 12), AbsorbanceParameters(), bin=2)
    assert screen(sound.data, counts=sound.seen).reasons == {}
    counts[(7, *where)] = bad
    found = normalise(scan(counts, sets, half=[0] * 12), AbsorbanceParameters(), bin=2)
    assert screen(found.data, counts=found.seen).reasons == {7: "values that are no numbers"}
    others = np.arange(12) != 7
    np.testing.assert_allclose(found.data[others], sound.data[others], atol=1e-5)
    assert np.isfinite(found.variance).all()


@pytest.mark.parametrize("slab", [(0, 64), (0, 3), (3, 9), (28, 31), (29, 30), (31, 50), (58, 64), (61, 64)])
def test_dark_rows_are_filled_from_the_nearest_good_ones(slab: tuple[int, int]) -> None:
    """A band at either end and one within; a slab is the same as these rows of the whole, and nothing is zero."""
    one, _ = changing_field(0.02)
    whole = normalise(one, AbsorbanceParameters(mask_bad_pixels=False))
    mask = np.zeros((64, 64), dtype=bool)
    mask[:5] = mask[28:31] = mask[60:] = True
    mask[40, 10:20] = True
    plain = read_absorbance(one, whole.beam, [2, 7], (0, 64))
    got = read_absorbance(one, whole.beam, [2, 7], slab, mask=mask)
    expected = plain.copy()
    expected[:, :5], expected[:, 60:] = plain[:, 5:6], plain[:, 59:60]
    for k, y in enumerate(range(28, 31), start=1):
        expected[:, y] = plain[:, 27] + (plain[:, 31] - plain[:, 27]) * k / 4
    if slab == (0, 64):
        across = np.linspace(plain[:, 40, 9], plain[:, 40, 20], 12)[1:-1]
        expected[:, 40, 10:20] = across.T
    ok = np.ones(64, dtype=bool)
    ok[40] = slab == (0, 64)
    np.testing.assert_allclose(got[:, ok[slice(*slab)]], expected[:, slice(*slab)][:, ok[slice(*slab)]], atol=1e-5)
    np.testing.assert_array_equal(got, read_absorbance(one, whole.beam, [2, 7], (0, 64), mask=mask)[:, slice(*slab)])


@pytest.mark.parametrize("bin", [1, 3, 4, 16])
def test_the_number_of_threads_does_not_matter(bin: int) -> None:
    one, _ = changing_field(0.02)
    a, b = (normalise(one, AbsorbanceParameters(), bin=bin, threads=t) for t in (1, 5))
    np.testing.assert_array_equal(a.data, b.data)
    np.testing.assert_array_equal(a.air, b.air)
    rows = [read_absorbance(one, a.beam, a.index, (3, 20), threads=t) for t in (1, 3)]
    np.testing.assert_array_equal(*rows)


# ----------------------------------------------------------------------------------------------------- bad flats


@pytest.mark.parametrize(
    ("frames", "what"),
    [
        (np.zeros((3, 24, 32), np.uint16), "no beam"),
        (np.full((3, 24, 32), -5.0, np.float32), "no beam"),
        (np.full((3, 24, 32), np.nan, np.float32), "no beam"),
        (np.full((3, 24, 32), 4095, np.uint16), "saturated"),
        (np.full((3, 24, 32), 65535, np.uint16), "saturated"),
        (np.full((3, 20, 32), 900, np.uint16), "20 x 32 px"),
    ],
    ids=["zero", "negative", "NaN", "12 bit full", "16 bit full", "other size"],
)
def test_flats_that_show_no_beam_are_refused_by_name(frames: npt.NDArray, what: str) -> None:
    bad = FlatSet(ArrayFrames(frames), np.ones(3), ("ok",) * 3)
    counts = np.full((12, 24, 32), 400, np.uint16)
    with pytest.raises(XanesTomoError, match=rf"8570 eV: expected at least one usable flat.*{what}"):
        normalise(scan(counts, (bad,)), RAW)
    # Beside a good set they are left out, and it is said.
    out = normalise(scan(counts, (bad, flat_set(1000))), RAW)
    np.testing.assert_allclose(out.data, np.log(2.5), atol=1e-5)
    assert any(what in note for note in out.notes)


def test_one_shot_much_darker_than_the_others_is_left_out() -> None:
    frames = np.full((6, 24, 32), 1000, np.uint16)
    frames[2] = 100
    out = normalise(
        scan(np.full((12, 24, 32), 400, np.uint16), (FlatSet(ArrayFrames(frames), np.ones(6), ("ok",) * 6),)), RAW
    )
    np.testing.assert_allclose(out.data, np.log(2.5), atol=1e-5)
    assert any("shot 3" in note and "0.10 times" in note for note in out.notes)


@pytest.mark.parametrize("unknown", [np.nan, 0.0, -1.0])
def test_unknown_exposures_are_those_of_the_others(unknown: float) -> None:
    flats = FlatSet(ArrayFrames(np.full((3, 24, 32), 500, np.uint16)), np.array([0.5, unknown, 0.5]), ("ok",) * 3)
    out = normalise(
        scan(np.full((12, 24, 32), 400, np.uint16), (flats,), exposure=np.array([1.0] * 11 + [unknown])), RAW
    )
    np.testing.assert_allclose(out.data, np.log(2.5), atol=1e-5)


# ------------------------------------------------------------------------------------- stray light and bad pixels


def measured(
    *,
    stray: float = 0.0,
    constant: float = 0.0,
    band: int = 0,
    dust: float = 0.0,
    n: int = 16,
    seed: int = 0,
    size: int = 128,
) -> tuple[EnergyScan, npt.NDArray]:
    """A camera with glare (a part of the mean of the frame) on a field with a blocked band; (scan, true absorbance)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    field = 900 * (1.1 - 0.3 * (x**2 + y**2))
    if dust:
        for cy, cx in ((0.5, -0.6), (-0.7, 0.3), (0.1, 0.8)):
            field = field * (1 - dust * (np.hypot(y - cy, x - cx) < 3.2 / size))
    if band:
        field[-band:] = 0
    true = particle((size, size))

    def expose(f: npt.NDArray) -> npt.NDArray:
        lit = f + constant + stray * f.mean()
        return np.clip(np.rint(GAIN * rng.poisson(lit / GAIN) + READ_NOISE * rng.standard_normal(f.shape)), 0, 65535)

    sets = tuple(
        FlatSet(ArrayFrames(np.stack([expose(field) for _ in range(10)]).astype(np.uint16)), np.ones(10), ("ok",) * 10)
        for _ in range(2)
    )
    counts = np.stack([expose(field * np.exp(-true)) for _ in range(n)]).astype(np.uint16)
    return scan(counts, sets, half=np.arange(n) * 2 // n), true


# part of the field, constant counts, rows blocked
@pytest.mark.parametrize(("part", "constant", "band"), [(0.018, 10.0, 6), (0.05, 0.0, 8), (0.0, 12.0, 6)])
def test_stray_light_behind_blocked_rows_is_measured_and_taken_out(part: float, constant: float, band: int) -> None:
    one, true = measured(stray=part, constant=constant, band=band)
    out = normalise(one, AbsorbanceParameters())
    assert out.beam is not None
    mean = one.frames.data.mean(axis=(1, 2)) / (1 + part)
    np.testing.assert_allclose(out.beam.stray, constant + part * (mean - constant / (1 + part)), rtol=0.06, atol=0.4)
    inside = true > 0.6
    left = float(normalise(one, AbsorbanceParameters(stray_light="off")).data[:, inside].mean())
    assert float(out.data[:, inside].mean()) == pytest.approx(float(true[inside].mean()), rel=0.01)
    assert left < 0.985 * float(true[inside].mean())
    result, _ = run_flats(one, Recipe())
    assert result.numbers["stray_constant"] == pytest.approx(constant, abs=1.5)
    assert result.numbers["stray_fraction"] == pytest.approx(part, abs=0.003)
    # The effect is given as numbers: absorbance behind the object without stray light and with it.
    without, with_stray = result.numbers["object_od"], result.numbers["object_od_with_stray"]
    assert with_stray / without == pytest.approx(left / float(out.data[:, inside].mean()), abs=0.02)
    half = stray_jump_effect([8300.0, 8400.0], [0.5, 1.5], [0.48, 1.38], 8333.0)
    assert half == pytest.approx(0.1)
    assert np.isnan(stray_jump_effect([8400.0, 8500.0], [1, 1], [1, 1], 8333.0))


def test_no_blocked_rows_nothing_is_subtracted() -> None:
    one, _ = measured(stray=0.03, constant=10.0)
    out = normalise(one, AbsorbanceParameters())
    assert out.beam is not None
    assert not out.beam.stray.any()
    result, _ = run_flats(one, Recipe())
    assert result.numbers["object_od"] == result.numbers["object_od_with_stray"]


@pytest.mark.parametrize("depth", [0.4, 0.8, 1.0])
def test_dust_and_the_dark_band_are_masked_and_nothing_else(depth: float) -> None:
    one, true = measured(band=6, dust=depth)
    out = normalise(one, AbsorbanceParameters())
    assert out.beam is not None
    mask = out.beam.mask((128, 128))
    assert mask[-6:].all()
    for cy, cx in ((0.5, -0.6), (-0.7, 0.3), (0.1, 0.8)):
        assert mask[round((cy + 1) / 2 * 127), round((cx + 1) / 2 * 127)]
    assert mask[:-9].mean() < 0.01
    assert np.isfinite(out.data).all()
    np.testing.assert_allclose(out.data[:, :-9].mean(axis=0)[~mask[:-9]], true[:-9][~mask[:-9]], atol=0.04)
    np.testing.assert_array_equal(mask_from_runs(mask_runs(mask), mask.shape), mask)


@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.integers(1, 9), st.integers(1, 9))
def test_a_mask_comes_back_from_its_runs(seed: int, share: float, h: int, w: int) -> None:
    mask = np.random.default_rng(seed).random((h, w)) < share
    np.testing.assert_array_equal(mask_from_runs(mask_runs(mask), (h, w)), mask)


def test_masked_pixels_are_filled_along_their_row() -> None:
    frames = np.arange(24, dtype=np.float32).reshape(1, 4, 6) ** 2
    mask = np.zeros((4, 6), bool)
    mask[0, 2:4] = mask[1, :2] = mask[2, 5] = mask[3] = True
    fill_masked(frames, mask)
    np.testing.assert_allclose(frames[0, 0], [0, 1, 6, 11, 16, 25])
    np.testing.assert_allclose(frames[0, 1], [64, 64, 64, 81, 100, 121])
    assert frames[0, 2, 5] == 16**2
    np.testing.assert_array_equal(frames[0, 3], 0)


def test_a_bad_pixel_does_not_spoil_its_bin() -> None:
    counts = np.full((12, 24, 32), 400, np.uint16)
    counts[:, 5, 7] = 60000
    mask = np.zeros((24, 32), bool)
    mask[5, 7] = True
    out = normalise(scan(counts, (flat_set(1000),)), RAW, bin=4, mask=mask)
    np.testing.assert_allclose(out.data, np.log(2.5), atol=1e-5)


@pytest.mark.parametrize("level", [0.9, 0.4, 0.15])
def test_variance_per_pixel_is_that_of_the_absorbance(level: float) -> None:
    rng = np.random.default_rng(0)
    beam, stray, shots = 600.0, 20.0, 3
    detector = Detector(GAIN, READ_NOISE**2)

    def expose(f: float, shape: tuple[int, ...]) -> npt.NDArray:
        return GAIN * rng.poisson((f + stray) / GAIN, shape) + READ_NOISE * rng.standard_normal(shape)

    counts = expose(beam * level, (40, 64, 64))
    rate = expose(beam, (shots, 64, 64)).mean(axis=0) - stray
    share = detector.variance(np.float32(beam + stray)) / shots
    out = absorbance(counts, np.ones(40), rate, stray)
    variance = absorbance_variance(counts, np.ones(40), rate, detector, stray=stray, rate_variance=float(share))
    assert variance.shape == out.shape
    assert float(variance.mean()) == pytest.approx(float(out.var()), rel=0.15)
    alone = absorbance_variance(counts, np.ones(40), rate, detector, stray=stray)
    # Of one pixel over the frames only the frames' own noise varies: the flat is the same.
    assert float(alone.mean()) == pytest.approx(float(out.var(axis=0, ddof=1).mean()), rel=0.15)


def test_the_noise_is_not_taken_for_the_drift_of_the_beam() -> None:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:256j, -1:1:256j]
    quanta = 5000 * (1.05 - 0.5 * (y**2 + x**2))
    shots = []
    for k in range(10):  # 5 % in level and a slowly sliding pattern
        moving = (1 + 0.05 * rng.normal()) * (1 + 0.03 * np.sin(6 * x + 0.4 * k))
        shots.append(GAIN * rng.poisson(quanta * moving) + READ_NOISE * rng.standard_normal(quanta.shape))
    found = estimate_detector(np.rint(np.stack(shots)).astype(np.uint16))
    assert found.gain == pytest.approx(GAIN, rel=0.05)
    assert np.sqrt(found.read_variance) == pytest.approx(READ_NOISE, rel=0.1)


def test_two_sets_of_one_shot_and_one_shot_alone_still_tell_something() -> None:
    rng = np.random.default_rng(0)
    level = np.linspace(500, 9000, 256)[:, None] * np.ones((1, 256))
    one, two = (GAIN * rng.poisson(level)[None] for _ in range(2))
    assert estimate_detector(one, two).gain == pytest.approx(GAIN, rel=0.05)
    alone = estimate_detector(one)
    assert alone.source == "one shot"
    assert alone.gain == pytest.approx(GAIN, rel=0.2)
    assert estimate_detector(np.zeros((1, 8, 8))).source == "none"


# --------------------------------------------------------------------------------------------- the air, harder


def scene(name: str, n: int = 12, size: int = 64) -> tuple[npt.NDArray, npt.NDArray]:
    """(n, y, x) objects without air, and (y, x) where the particle is."""
    y, x = np.mgrid[:size, :size]
    v, u = (y - (size - 1) / 2) / (size / 2), (x - (size - 1) / 2) / (size / 2)

    def ball(r: float, cy: float = 0.0, cx: float = 0.0, depth: float = 1.5) -> npt.NDArray:
        return depth * np.sqrt(np.maximum(0, 1 - ((v - cy) ** 2 + (u - cx) ** 2) / r**2))

    out = []
    for i in range(n):
        o = ball(0.55, 0.05 * np.sin(i), 0.05 * np.cos(1.3 * i))
        edge = -0.55 + 0.05 * np.sin(i / 3)
        if name == "capillary":
            o = o + np.where(u > edge, 0.08, 0) + 0.15 * np.exp(-(((u - edge) / 0.03) ** 2))
        elif name == "post":
            o = o + np.where((abs(u) < 0.15) & (v > 0.3), 1.0, 0.0)
        elif name == "at the border":
            o = ball(0.7, 0.35, 0.4)
        elif name == "fills the field":
            o = ball(0.95)
        elif name == "neighbours":
            o = o + ball(0.2, -0.8, 0.8, 0.3) + ball(0.15, 0.85, -0.7, 0.2)
        elif name == "faint rim":
            o = o + ball(0.9, depth=0.03)
        out.append(o)
    return np.stack(out), ball(0.55) > 0


# Scene, noise of a pixel, rms error of the air under the particle (absorbance).
@pytest.mark.parametrize(
    ("name", "noise", "tolerance"),
    [
        ("alone", 0.003, 0.0003),
        ("alone", 0.03, 0.0015),
        ("capillary", 0.004, 0.004),
        ("post", 0.01, 0.0008),
        ("at the border", 0.01, 0.0008),
        ("fills the field", 0.01, 0.001),
        ("neighbours", 0.01, 0.0008),
        ("faint rim", 0.003, 0.0005),
        ("faint rim", 0.01, 0.0012),
    ],
)
def test_the_air_is_found_whatever_stands_in_it(name: str, noise: float, tolerance: float) -> None:
    objects, where = scene(name)
    rng = np.random.default_rng(0)
    t = np.linspace(0, 1, len(objects))
    given_planes = np.stack([0.03 * np.sin(3 * t), 0.03 * np.cos(2 * t), 0.03 * t], axis=1)
    frames = (objects + plane(given_planes, (64, 64)) + noise * rng.standard_normal(objects.shape)).astype(np.float32)
    found, residual, masks = fit_air(frames, 1.5)
    error = plane(found - given_planes, (64, 64))[:, where]
    assert float(np.sqrt(np.mean(error**2))) < tolerance
    assert np.isfinite(residual).all()
    # No object in the air.
    assert not np.any(~masks & (objects > 4 * noise))


def test_the_level_around_the_particle_is_the_same_whether_the_outside_of_its_capillary_shows_or_not() -> None:
    # The particle stands in glass of 0.06; only every other projection shows what is outside of it.
    objects, where = scene("alone", n=24)
    glass = np.full(objects.shape, 0.06)
    glass[::2, :, :8] = 0
    rng = np.random.default_rng(0)
    frames = (objects + glass + 0.006 * rng.standard_normal(objects.shape)).astype(np.float32)
    found, residual, _ = fit_air(frames, 1.5)
    level = plane(found, (64, 64))[:, where].mean(axis=1)
    np.testing.assert_allclose(level, 0.06, atol=0.002)
    assert np.isfinite(residual).all()


def test_a_dark_band_has_no_say_in_the_air() -> None:
    objects, where = scene("alone")
    frames = (objects + plane(PLANES[[3] * 12], (64, 64))).astype(np.float32)
    frames += 0.01 * np.random.default_rng(0).standard_normal(frames.shape).astype(np.float32)
    frames[:, -6:] = np.nan
    found, _, masks = fit_air(frames, 1.5)
    error = plane(found - PLANES[[3] * 12], (64, 64))[:, where]
    assert float(np.sqrt(np.mean(error**2))) < 1e-3
    assert masks[:, -6:].all()


def test_air_is_looked_for_around_the_box_only() -> None:
    # Beside a wall two levels are air; the box says which one counts.
    objects, where = scene("alone")
    frames = objects.copy()
    frames[:, :, :14] -= 0.3  # another, lower level far away
    frames += 0.005 * np.random.default_rng(0).standard_normal(frames.shape)
    region = np.zeros((64, 64), bool)
    region[:, 15:] = True
    found, _, masks = fit_air(frames.astype(np.float32), 1.5, region=region)
    assert float(np.abs(plane(found, (64, 64))[:, where]).max()) < 3e-3
    assert masks[:, :, :15].all()


@pytest.mark.parametrize(("curved", "terms"), [(0.0, 3), (0.04, 6)])
def test_quadratic_terms_where_the_air_is_curved(curved: float, terms: int) -> None:
    objects, where = scene("alone")
    c = np.zeros((12, 6))
    c[:, 0], c[:, 2], c[:, 3], c[:, 5] = 0.01, 0.02, curved, -0.5 * curved
    frames = objects + plane(c, (64, 64)) + 0.006 * np.random.default_rng(0).standard_normal(objects.shape)
    found, _, _ = fit_air(frames.astype(np.float32), 1.5, order="auto")
    assert found.shape == (12, terms)
    full = np.zeros((12, 6))
    full[:, :terms] = found
    error = plane(full - c, (64, 64))[:, where]
    assert float(np.sqrt(np.mean(error**2))) < 2e-3


def test_contrast_of_phase_is_a_choice_of_the_recipe() -> None:
    assert AbsorbanceParameters(contrast="phase").contrast == "phase"
    with pytest.raises(ValueError, match="contrast"):
        AbsorbanceParameters(contrast="colour")  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_edge_of_a_capillary_does_not_twist_the_air(seed: int) -> None:
    # The edge of a leaning tube wider than the field crosses it: a surface through both sides of it would twist.
    objects, _ = scene("alone", n=60)
    rng = np.random.default_rng(seed)
    t = np.linspace(-np.pi / 2, np.pi / 2, len(objects), endpoint=False)
    move = np.cumsum(rng.normal(size=len(objects)))
    y, x = np.arange(64)[None, :, None] - 31.5, np.arange(64)[None, None, :] - 31.5 - move[:, None, None]
    u = x - 54 * np.cos(t - 0.7)[:, None, None] - 0.05 * y * np.cos(t)[:, None, None]
    outer, inner = (np.sqrt(np.maximum((r * 64) ** 2 - u**2, 0)) for r in (1.2, 1.12))
    frames = objects + 0.0066 * (outer - inner) + 0.004 * rng.standard_normal(objects.shape)
    found, _, _ = fit_air(frames.astype(np.float32), 1.5, order="quadratic")
    assert np.abs(found[:, 3:5]).max() < 0.007
