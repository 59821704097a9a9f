import pickle

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_xanes_tomo.projector import FILTERS, Projector, filter_response
from napari_xanes_tomo.projector.fft import fast_length, fft, plan

F64 = npt.NDArray[np.float64]

BLOBS = [  # amplitude, z, x, sigma along and across, tilt in degrees; lengths over n
    (1.0, -0.10, 0.12, 0.060, 0.045, 20.0),
    (0.5, 0.16, -0.20, 0.050, 0.050, 0.0),
    (0.3, 0.20, 0.15, 0.040, 0.060, -50.0),
]


def blobs(n: int, theta: F64, columns: int, shift: F64 | float = 0.0) -> tuple[F64, F64]:
    """A slice (z, x) made of Gaussians and its exact sinogram (angle, column)."""
    c = np.arange(n) - (n - 1) / 2
    u = np.arange(columns) - (columns - 1) / 2
    t = np.deg2rad(theta)[:, None]
    image, sino = np.zeros((n, n)), np.zeros((theta.size, columns))
    moved = np.broadcast_to(shift, theta.shape)[:, None]
    for a, z, x, s1, s2, tilt in BLOBS:
        b = np.deg2rad(tilt)
        turn = np.array([[np.cos(b), -np.sin(b)], [np.sin(b), np.cos(b)]])
        cov = turn @ np.diag([(s1 * n) ** 2, (s2 * n) ** 2]) @ turn.T  # in (x, z)
        d = np.stack(np.broadcast_arrays(c[None, :] - x * n, c[:, None] - z * n), axis=-1)
        image += a * np.exp(-0.5 * np.einsum("zxi,ij,zxj->zx", d, np.linalg.inv(cov), d))
        e = np.concatenate([np.cos(t), np.sin(t)], axis=1)
        var = np.einsum("ai,ij,aj->a", e, cov, e)[:, None]
        mass = a * 2 * np.pi * np.sqrt(np.linalg.det(cov))
        at = u - moved - n * (x * np.cos(t) + z * np.sin(t))
        sino += mass * np.exp(-0.5 * at**2 / var) / np.sqrt(2 * np.pi * var)
    return image, sino


def ellipse(n: int, theta: F64, over: int = 8) -> tuple[F64, F64]:
    """An ellipse averaged over pixels (z, x), and its sinogram averaged over columns."""
    a, b, tilt, z0, x0 = 0.30 * n, 0.17 * n, np.deg2rad(35.0), 0.05 * n, -0.08 * n
    fine = (np.arange(n * over) + 0.5) / over - n / 2
    dx, dz = fine[None, :] - x0, fine[:, None] - z0
    p, q = dx * np.cos(tilt) + dz * np.sin(tilt), -dx * np.sin(tilt) + dz * np.cos(tilt)
    image = (((p / a) ** 2 + (q / b) ** 2) <= 1).astype(float).reshape(n, over, n, over).mean(axis=(1, 3))
    t = np.deg2rad(theta)[:, None]
    r2 = (a * np.cos(t - tilt)) ** 2 + (b * np.sin(t - tilt)) ** 2
    s = fine[None, :] - x0 * np.cos(t) - z0 * np.sin(t)
    line = 2 * a * b / r2 * np.sqrt(np.clip(r2 - s**2, 0, None))
    return image, line.reshape(theta.size, n, over).mean(axis=2)


def relative(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating]) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("n", [8, 10, 24, 30, 36, 50, 80, 96, 120, 128, 150])
def test_fft_matches_numpy(n: int) -> None:
    rng = np.random.default_rng(n)
    z = rng.standard_normal((n, 8)) + 1j * rng.standard_normal((n, 8))
    x = np.concatenate([z.real, z.imag], axis=1).astype(np.float32).ravel()
    y = np.empty_like(x)
    result = (y if fft(x, y, n, *plan(n)) else x).reshape(n, 16)
    expected = np.fft.fft(z, axis=0)
    assert np.abs(result[:, :8] + 1j * result[:, 8:] - expected).max() < 5e-7 * np.abs(expected).max()


@pytest.mark.parametrize(("n", "expected"), [(2, 8), (9, 10), (81, 90), (1025, 1080), (2048, 2048)])
def test_fast_length(n: int, expected: int) -> None:
    assert fast_length(n) == expected


@pytest.mark.parametrize(
    ("n", "columns", "width", "tolerance"),
    [(64, 64, 4, 3e-3), (64, 64, 5, 3e-4), (64, 64, 6, 6e-5), (65, 65, 5, 3e-4), (64, 81, 5, 3e-4), (101, 90, 5, 3e-4)],
)
def test_projects_gaussians_to_their_analytic_sinogram(n: int, columns: int, width: int, tolerance: float) -> None:
    theta = np.concatenate([np.linspace(-90, 89, 30), [0.0, 45.0, 90.0, 179.9, -213.7]])
    image, sino = blobs(n, theta, columns)
    gain = np.linspace(1.0, 3.0, 19)  # 19 rows: one full group of 16 and an incomplete one
    projected = Projector(n, theta, n_detector=columns, width=width).forward(gain[:, None, None] * image)
    assert projected.shape == (theta.size, 19, columns)
    assert projected.dtype == np.float32
    for row in (0, 8, 15, 16, 18):
        assert relative(projected[:, row] / gain[row], sino) < tolerance


def test_projects_an_antialiased_ellipse() -> None:
    theta = np.arange(-90.0, 90.0, 3.0)
    image, sino = ellipse(256, theta)
    projected = Projector(256, theta).forward(image[None])[:, 0]
    assert relative(projected, sino) < 2e-3  # what pixels and columns are apart; more oversampling changes nothing
    assert np.abs(projected.sum(axis=1) / image.sum() - 1).max() < 3e-4  # mass


def test_shift_moves_the_content_right() -> None:
    theta = np.linspace(-80, 80, 21)
    shift = np.linspace(-5.3, 4.1, 21)
    image, sino = blobs(72, theta, 72, shift)
    projector = Projector(72, theta)
    assert relative(projector.forward(image[None], shift=shift)[:, 0], sino) < 3e-4
    _, centre = blobs(72, theta, 72, 2.25)
    assert relative(projector.forward(image[None], shift=2.25)[:, 0], centre) < 3e-4


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(5, 40),
    columns=st.integers(4, 50),
    rows=st.integers(1, 20),
    angles=st.integers(1, 12),
    width=st.sampled_from([4, 5, 6]),
    seed=st.integers(0, 2**16),
)
def test_adjoint(n: int, columns: int, rows: int, angles: int, width: int, seed: int) -> None:
    """<A v, p> = <v, A* p> to float32, whatever the shapes, angles and shifts."""
    rng = np.random.default_rng(seed)
    theta = rng.choice([rng.uniform(-400, 400, angles), np.arange(angles) * 45.0])
    shift = rng.uniform(-4, 4, angles)
    projector = Projector(n, theta, n_detector=columns, width=width)
    volume = rng.standard_normal((rows, n, n)).astype(np.float32)
    projections = rng.standard_normal((angles, rows, columns)).astype(np.float32)
    forward = projector.forward(volume, shift=shift).astype(float)
    back = projector.adjoint(projections, shift=shift).astype(float)
    difference = abs(np.vdot(forward, projections) - np.vdot(volume, back))
    assert difference <= 1e-6 * np.linalg.norm(forward) * np.linalg.norm(projections)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16), a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_linear_and_rows_do_not_mix(seed: int, a: float, b: float) -> None:
    rng = np.random.default_rng(seed)
    projector = Projector(24, rng.uniform(-90, 90, 7))
    v, w = rng.standard_normal((2, 18, 24, 24)).astype(np.float32)
    pv, pw = projector.forward(v), projector.forward(w)
    scale = np.abs(pv).max() + np.abs(pw).max()
    np.testing.assert_allclose(projector.forward(a * v + b * w), a * pv + b * pw, atol=2e-5 * scale)
    only = np.zeros_like(v)
    only[5] = v[5]
    alone = projector.forward(only)
    np.testing.assert_allclose(alone[:, 5], pv[:, 5], atol=2e-6 * scale)
    assert np.abs(np.delete(alone, 5, axis=1)).max() < 2e-6 * scale


def test_adjoint_with_weights_and_response_is_that_of_the_weighted_filtered_projections() -> None:
    rng = np.random.default_rng(3)
    projector = Projector(40, np.linspace(-90, 80, 11), pad=2)
    p = rng.standard_normal((11, 3, 40)).astype(np.float32)
    weight = rng.uniform(0, 2, 11)
    response = filter_response("hann", projector.filter_length)
    padded = np.fft.rfft(p, projector.filter_length, axis=2) * response
    filtered = np.fft.irfft(padded, projector.filter_length, axis=2)  # wider than the detector: its ends matter
    wide = Projector(40, projector.theta_deg, n_detector=80, pad=1)
    expected = wide.adjoint(np.roll(filtered, 20, axis=2) * weight[:, None, None])
    assert relative(projector.adjoint(p, weight=weight, response=response), expected) < 2e-3


def test_same_result_whatever_the_threads() -> None:
    rng = np.random.default_rng(0)
    v = rng.standard_normal((37, 48, 48)).astype(np.float32)
    theta = np.arange(0.0, 180.0, 7.0)
    one = Projector(48, theta, threads=1)
    p = one.forward(v)
    back = one.adjoint(p)
    for threads in (2, 3, 5):
        many = Projector(48, theta, threads=threads)
        assert np.array_equal(many.forward(v), p)
        assert np.array_equal(many.adjoint(p), back)
        few = one.adjoint(p[:, :5])  # fewer groups than threads
        assert np.array_equal(many.adjoint(p[:, :5]), few)
        # rounding depends on the rows that travel along
        np.testing.assert_allclose(few, back[:5], atol=1e-5 * np.abs(few).max())


def test_out_is_written_into() -> None:
    v = np.random.default_rng(0).normal(size=(18, 16, 16)).astype(np.float32)
    projector = Projector(16, [0.0, 30.0, 60.0])
    p, back = np.empty((3, 18, 16), np.float32), np.empty_like(v)
    assert projector.forward(v, out=p) is p
    assert np.array_equal(p, projector.forward(v))
    assert projector.adjoint(p, out=back) is back
    assert np.array_equal(back, projector.adjoint(p))
    with pytest.raises(ValueError, match="out: expected"):
        projector.forward(v, out=np.empty((3, 18, 16)))  # type: ignore[arg-type]


def test_pickle() -> None:
    projector = Projector(16, [0.0, 30.0, 60.0])
    v = np.ones((2, 16, 16), np.float32)
    p = projector.forward(v)
    assert np.array_equal(pickle.loads(pickle.dumps(projector)).forward(v), p)


def test_no_rows() -> None:
    projector = Projector(16, [0.0, 30.0])
    assert projector.forward(np.empty((0, 16, 16))).shape == (2, 0, 16)
    assert projector.adjoint(np.empty((2, 0, 16))).shape == (0, 16, 16)


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("n", [64, 200, 255])
def test_filter_response(name: str, n: int) -> None:
    response = filter_response(name, n)
    f = np.arange(n // 2 + 1) / n
    window = {"none": 1.0, "shepp-logan": np.sinc(f), "cosine": np.cos(np.pi * f), "hann": np.cos(np.pi * f) ** 2}
    expected = window.get(name, np.ones_like(f)) * (1.0 if name == "none" else f)
    np.testing.assert_allclose(response, expected, atol=0.25 / n if name != "none" else 0)
    assert response.shape == (n // 2 + 1,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Projector(16, [np.nan]), "theta_deg"),
        (lambda: Projector(16, []), "theta_deg"),
        (lambda: Projector(1, [0.0]), "n:"),
        (lambda: Projector(16, [0.0]).forward(np.zeros((2, 16, 15))), "volume"),
        (lambda: Projector(16, [0.0]).adjoint(np.zeros((2, 1, 16))), "projections"),
        (lambda: Projector(16, [0.0]).forward(np.zeros((1, 16, 16)), shift=[1.0, 2.0]), "shift"),
        (lambda: Projector(16, [0.0]).adjoint(np.zeros((1, 1, 16)), response=[1.0]), "response"),
        (lambda: filter_response("butter", 64), "filter"),
    ],
)
def test_errors_say_what_was_expected(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("n", "angles"), [(5, 3), (12, 7), (33, 200), (128, 400)])
def test_adjoint_where_nothing_cancels(n: int, angles: int) -> None:
    """Positive slices and their own projections: rounding near frequency 0, where all lines cross, would add up."""
    theta = np.linspace(-90, 89, angles)
    volume = np.broadcast_to(blobs(n, theta, n)[0].astype(np.float32), (2, n, n))
    projector = Projector(n, theta)
    p = projector.forward(volume).astype(float)
    back = projector.adjoint(p).astype(float)
    assert np.vdot(p, p) == pytest.approx(np.vdot(volume, back), rel=2e-7)
