import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_xanes_tomo.model import Alignment
from napari_xanes_tomo.resample import noise_power, place, rows_needed

SHIFT = np.array([[3.3, -2.6], [0.5, 1.25], [-4.0, 0.0]])


def alignment(shift=SHIFT, magnification: float = 1.0, roll_deg: float = 0.0) -> Alignment:
    shift = np.asarray(shift, float)
    return Alignment(shift, np.zeros_like(shift), magnification, roll_deg)


def pattern(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Band-limited: periods of 16 pixels and more."""
    return np.cos(0.35 * y + 0.2 * x + 0.3) + 0.5 * np.sin(0.25 * x - 0.3 * y)


def grid(ny: int, nx: int) -> np.ndarray:
    y, x = np.mgrid[:ny, :nx]
    return np.stack([y - (ny - 1) / 2, x - (nx - 1) / 2], axis=-1)


def recorded(a: Alignment, shape: tuple[int, int], function=pattern) -> np.ndarray:
    """Frames that show ``function(q)`` at ``p = M R q + shift``."""
    q = [(grid(*shape) - shift) @ np.linalg.inv(a.matrix).T for shift in a.shift]
    return np.stack([function(i[..., 0], i[..., 1]) for i in q]).astype(np.float32)


GEOMETRIES = [(1.0, 0.0), (1.33, 0.0), (0.8, 0.0), (1.0, 0.7), (1.33, -1.2), (1.1, 20.0)]


@pytest.mark.parametrize(("magnification", "roll"), GEOMETRIES)
@pytest.mark.parametrize(("order", "tolerance"), [(1, 2e-2), (2, 1.5e-3), (3, 1e-4)])
def test_truth_is_found_again(magnification: float, roll: float, order: int, tolerance: float) -> None:
    a = alignment(magnification=magnification, roll_deg=roll)
    out, coverage = place(recorded(a, (90, 101)), a, grid_shape=(70, 63), order=order, return_coverage=True)
    q = grid(70, 63)
    error = (out - pattern(q[..., 0], q[..., 1]))[coverage > 0.999]
    assert np.sqrt((error**2).mean()) < tolerance
    assert (coverage > 0.999).mean() > 0.85


@pytest.mark.parametrize("bin", [2, 3])
@pytest.mark.parametrize("roll", [0.0, 2.0])
def test_binned_grid(bin: int, roll: float) -> None:
    a = alignment(magnification=1.2, roll_deg=roll)

    def slow(y: np.ndarray, x: np.ndarray) -> np.ndarray:
        return pattern(y / 3, x / 3)

    out, coverage = place(recorded(a, (120, 130), slow), a, grid_shape=(24, 26), bin=bin, return_coverage=True)
    q = grid(24, 26) * bin
    whole = coverage > 0.999
    assert whole.mean() > 0.5
    assert np.abs(out - slow(q[..., 0], q[..., 1]))[whole].max() < 2e-3


@pytest.mark.parametrize("order", [1, 2, 3])
def test_identity_is_exact(order: int) -> None:
    frames = np.random.default_rng(0).normal(size=(3, 20, 33)).astype(np.float32)
    out, coverage = place(frames, Alignment.identity(3), order=order, return_coverage=True)
    assert np.array_equal(out, frames)
    assert (coverage == 1).all()


@pytest.mark.parametrize("roll", [0.0, 1e-9])
def test_whole_pixels_are_copied_and_positive_shift_is_undone(roll: float) -> None:
    frames = np.random.default_rng(0).normal(size=(1, 20, 33)).astype(np.float32)
    a = alignment([[3.0, -5.0]], roll_deg=roll)  # content has moved down by 3, left by 5
    out, coverage = place(frames, a, return_coverage=True)
    np.testing.assert_allclose(out[0, :17, 5:], frames[0, 3:, :28], atol=1e-5)
    assert (out[0, 17:] == 0).all()
    assert (out[0, :, :5] == 0).all()
    np.testing.assert_allclose(coverage[0, 17:], 0, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    magnification=st.floats(0.7, 2.2),
    roll=st.sampled_from([0.0, 0.4, -7.0]),
    dy=st.floats(-30, 30),
    dx=st.floats(-30, 30),
    c=st.tuples(st.floats(-2, 2), st.floats(-0.1, 0.1), st.floats(-0.1, 0.1)),
    order=st.sampled_from([1, 2, 3]),
    bin=st.sampled_from([1, 2]),
)
def test_ramps_are_exact_and_constants_everywhere(magnification, roll, dy, dx, c, order, bin) -> None:
    a = alignment([[dy, dx]], magnification, roll)

    def ramp(y: np.ndarray, x: np.ndarray) -> np.ndarray:
        return c[0] + c[1] * y + c[2] * x

    out, coverage = place(
        recorded(a, (64, 70), ramp), a, grid_shape=(24, 26), order=order, bin=bin, return_coverage=True
    )
    q = grid(24, 26) * bin
    np.testing.assert_allclose(
        out[0][coverage[0] > 0.99999], ramp(q[..., 0], q[..., 1])[coverage[0] > 0.99999], atol=1e-4
    )
    ones, coverage = place(np.ones((1, 64, 70)), a, grid_shape=(24, 26), order=order, bin=bin, return_coverage=True)
    np.testing.assert_allclose(ones, coverage > 0.5, atol=1e-5)
    assert coverage.min() >= 0
    assert coverage.max() <= 1 + 1e-6


@settings(max_examples=30, deadline=None)
@given(
    magnification=st.floats(0.7, 2.0),
    roll=st.sampled_from([0.0, 0.3, -6.0]),
    rows=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    spread=st.floats(0, 40),
    bin=st.sampled_from([1, 2]),
    square=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_a_slab_is_bit_for_bit_the_whole(magnification, roll, rows, spread, bin, square, seed) -> None:
    rng = np.random.default_rng(seed)
    a = alignment(rng.normal(0, spread, (4, 2)), magnification, roll)
    frames = rng.normal(size=(4, 60, 50)).astype(np.float32)
    options = {"grid_shape": (40, 44), "bin": bin, "square": square, "return_coverage": True}
    whole, covered = place(frames, a, **options)
    q0, q1 = sorted(rows)
    y0, y1 = rows_needed(a, rows=(q0, q1), grid_shape=(40, 44), frame_shape=(60, 50), bin=bin)
    slab, coverage = place(
        frames[:, y0:y1], a, rows=(q0, q1), row_offset=y0, frame_shape=(60, 50), threads=3, **options
    )
    assert np.array_equal(slab, whole[:, q0:q1])
    assert np.array_equal(coverage, covered[:, q0:q1])


def test_rows_needed_is_not_much_more_than_needed() -> None:
    a = alignment([[0.25, 0.0], [-3.5, 0.0]])
    assert rows_needed(a, rows=(20, 30), grid_shape=(60, 60), frame_shape=(60, 60)) == (14, 33)
    assert rows_needed(a, rows=(0, 60), grid_shape=(60, 60), frame_shape=(60, 60)) == (0, 60)
    assert rows_needed(a, rows=(20, 30), grid_shape=(60, 60), frame_shape=(60, 60), index=[0]) == (18, 33)
    y0, y1 = rows_needed(alignment([[500.0, 0.0]]), rows=(20, 30), grid_shape=(60, 60), frame_shape=(60, 60))
    assert y0 == y1


def test_a_slab_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="rows 18:34 of the detector are needed"):
        place(np.zeros((1, 10, 60)), alignment([[0.5, 0.0]]), rows=(20, 31), row_offset=20, frame_shape=(60, 60))


@pytest.mark.parametrize(("magnification", "roll"), GEOMETRIES)
def test_variance_travels_along(magnification: float, roll: float) -> None:
    """`square` predicts the variance of placed noise; a stretched kernel gains from every photon it sees."""
    rng = np.random.default_rng(2)
    a = alignment(np.tile([[0.37, -0.21]], (400, 1)), magnification, roll)
    sigma = 1 + 0.3 * pattern(*np.moveaxis(grid(40, 40), -1, 0))
    noise = rng.standard_normal((400, 40, 40)) * sigma
    observed = place(noise, a, grid_shape=(20, 20)).var(axis=0)
    one = alignment(a.shift[:1], magnification, roll)
    predicted = place(sigma[None] ** 2, one, grid_shape=(20, 20), square=True)[0]
    assert (observed / predicted).mean() == pytest.approx(1, abs=0.02)
    assert (observed / predicted).std() < 1.2 * np.sqrt(2 / 400)


def test_noise_goes_down_with_the_pixels_averaged() -> None:
    shift = np.random.default_rng(0).uniform(-3, 3, (20, 2))
    noise = np.random.default_rng(1).standard_normal((20, 96, 96))

    def deviation(magnification: float, bin: int = 1) -> float:
        out = place(noise, alignment(shift, magnification), grid_shape=(40 // bin, 40 // bin), bin=bin)
        return float(out.std())

    point = deviation(1.0)
    assert deviation(1.33) < 0.8 * point
    assert deviation(2.0) == pytest.approx(point / 2, rel=0.1)
    assert deviation(1.0, bin=2) == pytest.approx(deviation(2.0), rel=0.1)
    assert deviation(1.33, bin=2) < 0.8 * deviation(1.0, bin=2)


def test_linear_and_shift_equivariant() -> None:
    rng = np.random.default_rng(3)
    f, g = rng.normal(size=(2, 3, 40, 44)).astype(np.float32)
    a = alignment(magnification=1.2)
    np.testing.assert_allclose(place(2 * f - 3 * g, a), 2 * place(f, a) - 3 * place(g, a), atol=2e-5)
    # a frame rolled by whole pixels, its shift said: the same result in the middle
    rolled = np.roll(f, (2, -3), axis=(1, 2))
    moved = alignment(SHIFT + np.array([2, -3]), 1.2)
    np.testing.assert_allclose(place(rolled, moved, grid_shape=(16, 16)), place(f, a, grid_shape=(16, 16)), atol=2e-5)


def test_alignment_convention_is_the_models() -> None:
    """A single bright pixel at p = A(q) comes out at q, with roll and magnification."""
    a = alignment([[4.0, -7.0]], 1.25, 25.0)
    q = np.array([6.0, -11.0])
    p = a(q, 0)
    y, x = np.moveaxis(grid(80, 90), -1, 0)
    spot = np.exp(-((y - p[0]) ** 2 + (x - p[1]) ** 2) / 8)[None]
    out = place(spot, a)[0]
    qy, qx = np.moveaxis(grid(80, 90), -1, 0)
    np.testing.assert_allclose([(out * qy).sum() / out.sum(), (out * qx).sum() / out.sum()], q, atol=5e-3)


def test_threads_and_index() -> None:
    rng = np.random.default_rng(0)
    frames = rng.normal(size=(7, 30, 31)).astype(np.float32)
    for roll in (0.0, 3.0):
        a = alignment(rng.normal(0, 3, (7, 2)), 1.1, roll)
        one = place(frames, a, threads=1)
        assert np.array_equal(place(frames, a, threads=2), one)
        assert np.array_equal(place(frames, a, threads=4), one)
        assert np.array_equal(place(frames[[5, 2]], a, index=[5, 2]), one[[5, 2]])


def test_frames_without_a_place_are_empty() -> None:
    for roll in (0.0, 2.0):
        out, coverage = place(
            np.ones((2, 20, 20)), alignment([[np.nan, np.nan], [1e9, 0.0]], roll_deg=roll), return_coverage=True
        )
        assert (out == 0).all()
        assert (coverage == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 4}, "order"),
        ({"bin": 0}, "bin"),
        ({"rows": (5, 40)}, "rows"),
        ({"frame_shape": (20, 21)}, "frames"),
        ({"index": [0]}, "alignment"),
    ],
)
def test_errors_say_what_was_expected(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        place(np.zeros((3, 20, 20)), alignment(), **options)


# ------------------------------------------------------------------------------------------------- what noise becomes


@pytest.mark.parametrize(
    ("magnification", "roll", "bin", "shift"),
    [
        (1.0, 0.0, 1, (0.0, 0.0)),  # nothing is interpolated: the noise stays white
        (1.0, 0.0, 1, (0.5, 0.25)),
        (1.33, 0.0, 1, (0.3, 0.1)),
        (0.98, 0.0, 1, (0.3, 0.1)),
        (1.0, 3.0, 1, (0.0, 0.0)),
        (1.0, 0.0, 2, (0.5, 0.25)),
        (1.1, 1.0, 3, (0.2, 0.7)),
    ],
)
def test_the_noise_left_is_the_noise_predicted(
    magnification: float, roll: float, bin: int, shift: tuple[float, float]
) -> None:
    rng = np.random.default_rng(8)
    frames = rng.normal(size=(30, 160, 160)).astype(np.float32)
    moved = Alignment(np.tile(shift, (30, 1)), np.zeros((30, 2)), magnification, roll)
    grid = (108 // bin, 108 // bin)
    seen = place(frames, moved, grid_shape=grid, bin=bin)
    frequency = np.abs(np.fft.fftfreq(grid[0]))
    power = noise_power(moved, frequency, grid_shape=grid, frame_shape=(160, 160), bin=bin)
    # The power of the two axes is their product; compared in total and in a low and a high band along each axis.
    found = np.mean(np.abs(np.fft.fft2(seen)) ** 2, axis=0) / grid[0] ** 2
    expected = power[0, 0][:, None] * power[0, 1][None, :]
    assert found.mean() == pytest.approx(expected.mean(), rel=0.03)
    for axis in range(2):
        line, wanted = found.mean(axis=1 - axis), expected.mean(axis=1 - axis)
        for band in (frequency < 0.2, frequency > 0.3):
            assert line[band].mean() == pytest.approx(wanted[band].mean(), rel=0.06, abs=0.004)


def test_photons_of_a_magnified_energy_are_not_thrown_away() -> None:
    # One output pixel covers M x M recorded ones: where the signal is smooth, their noise averages out. Point
    # interpolation would leave the variance at its value for M = 1.
    rng = np.random.default_rng(4)
    frames = rng.normal(size=(40, 96, 96)).astype(np.float32)
    m = 1.33
    moved = Alignment(rng.uniform(-1, 1, (40, 2)), np.zeros((40, 2)), m)
    low = np.abs(np.fft.fftfreq(48)) < 0.1
    power = np.mean(np.abs(np.fft.fft2(place(frames, moved, grid_shape=(48, 48)))) ** 2, axis=0) / 48**2
    assert power[np.ix_(low, low)].mean() == pytest.approx(1 / m**2, rel=0.1)
