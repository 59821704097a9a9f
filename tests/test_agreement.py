import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from napari_xanes_tomo.agreement import (
    band_pass,
    center_of_rotation,
    displacement_equations,
    object_support,
    registration_equations,
    smooth,
    solve_normal,
)

THETA = np.arange(-90.0, 90.0, 10.0)


def blobs(shape: tuple[int, int], shift=(0.0, 0.0), scale: float = 1.0) -> np.ndarray:
    """An image drawn at p = scale * q + shift."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    y = (y - (shape[0] - 1) / 2 - shift[0]) / scale
    x = (x - (shape[1] - 1) / 2 - shift[1]) / scale
    places = [(-6.0, 3.0, 2.5, 1.0), (4.0, -7.0, 3.0, 0.7), (7.0, 6.0, 2.0, 0.5), (0.0, 0.0, 4.0, 0.4)]
    return sum(
        a * np.exp(-((y - py) ** 2 + (x - px) ** 2) / (2 * s * s)) for py, px, s, a in places
    ).astype(np.float32)  # fmt: skip


# ------------------------------------------------------------------------------------------------------ smooth


# A kernel narrower than a pixel is sampled where it is, so its variance is a little off.
@pytest.mark.parametrize(("sigma", "tolerance"), [(0.5, 1e-2), (0.7, 2e-3), (1.5, 1e-4), (3.0, 2e-4)])
def test_smoothing_a_gaussian_adds_the_variances(sigma: float, tolerance: float) -> None:
    y, x = np.mgrid[-24:25, -30:31]
    first = np.exp(-(y**2 + x**2) / (2 * 4.0)).astype(np.float32)
    expected = 4.0 / (4.0 + sigma**2) * np.exp(-(y**2 + x**2) / (2 * (4.0 + sigma**2)))
    np.testing.assert_allclose(smooth(first[None], sigma)[0], expected, atol=tolerance)


@given(st.floats(0.1, 6), st.floats(-10, 10, width=32, allow_subnormal=False))
def test_smoothing_keeps_a_constant(sigma: float, level: float) -> None:
    frames = np.full((2, 5, 8), level, np.float32)
    np.testing.assert_allclose(smooth(frames, sigma), frames, atol=2e-6 * abs(level))


def test_smoothing_is_the_same_upside_down_and_transposed() -> None:
    frames = np.random.default_rng(0).normal(size=(3, 17, 24)).astype(np.float32)
    out = smooth(frames, 1.3)
    np.testing.assert_allclose(smooth(frames[:, ::-1, ::-1], 1.3), out[:, ::-1, ::-1], atol=1e-6)
    np.testing.assert_allclose(smooth(frames.transpose(0, 2, 1), 1.3), out.transpose(0, 2, 1), atol=1e-6)
    np.testing.assert_array_equal(smooth(frames[1:2], 1.3), out[1:2])


def test_no_blur_and_band_pass_leave_their_input_alone() -> None:
    frames = np.random.default_rng(0).normal(size=(2, 12, 12)).astype(np.float32)
    before = frames.copy()
    np.testing.assert_array_equal(smooth(frames, 0.0), frames)
    narrow = band_pass(frames, 0.0, 2.0)
    np.testing.assert_array_equal(frames, before)
    np.testing.assert_allclose(narrow, frames - smooth(frames, 2.0), atol=1e-6)


def test_band_pass_removes_levels_and_slopes() -> None:
    y, x = np.mgrid[:40, :50]
    plane = (0.3 + 0.02 * y - 0.01 * x).astype(np.float32)[None]
    assert np.abs(band_pass(plane, 0.7, 2.0)[0, 9:-9, 9:-9]).max() < 1e-5
    assert np.abs(band_pass(blobs((40, 50))[None], 0.7, 2.0)).max() > 0.05


# ----------------------------------------------------------------------------------------------- displacements


@pytest.mark.parametrize(("dy", "dx"), [(0.2, 0.0), (0.0, -0.15), (-0.1, 0.25)])
@pytest.mark.parametrize(("gain", "level"), [(1.0, 0.0), (1.1, 0.0), (0.9, 0.05)])
def test_a_displacement_below_and_to_the_right_is_positive(dy: float, dx: float, gain: float, level: float) -> None:
    model = blobs((40, 47))
    data = gain * blobs((40, 47), (dy, dx)) + level
    fit = displacement_equations(data[None], model[None], np.ones((1, 40, 47), np.float32))
    solution, inverse = fit.solve()
    # One linear step: right to the second order of the displacement and to gain times displacement.
    np.testing.assert_allclose(solution[0, :2], [gain * dy, gain * dx], atol=0.012)
    np.testing.assert_allclose(solution[0, 2:], [gain - 1, level], atol=0.02)
    assert np.all(np.diagonal(inverse[0]) > 0)


def test_each_frame_is_a_problem_of_its_own() -> None:
    shifts = np.array([[0.1, 0.0], [0.0, 0.2], [-0.2, -0.1]])
    data = np.stack([blobs((36, 36), s) for s in shifts])
    model = np.stack([blobs((36, 36))] * 3)
    solution, _ = displacement_equations(data, model, np.ones_like(data)).solve()
    np.testing.assert_allclose(solution[:, :2], shifts, atol=0.012)


def test_pixels_without_weight_do_not_matter() -> None:
    model, data = blobs((40, 40))[None], blobs((40, 40), (0.1, -0.1))[None].copy()
    weight = np.ones_like(data)
    weight[:, :9] = 0
    clean = displacement_equations(data, model, weight).solve()[0]
    data[:, :9] = 1e6
    np.testing.assert_array_equal(displacement_equations(data, model, weight).solve()[0], clean)


def test_two_halves_make_the_whole() -> None:
    model, data = blobs((40, 40))[None], blobs((40, 40), (0.1, -0.1))[None]
    fit = displacement_equations(data, model, np.ones_like(data), second_rows=np.arange(len(data[0])) >= 22)
    upper = np.ones_like(data)
    upper[:, 22:] = 0
    alone = displacement_equations(data, model, upper)
    np.testing.assert_allclose(fit.normal[:, 0], alone.normal.sum(axis=1), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(fit.solve(0)[0], alone.solve()[0], rtol=1e-9)
    other = displacement_equations(data, model, 1 - upper)
    np.testing.assert_allclose(fit.cost.sum(axis=1), (alone.cost + other.cost).sum(axis=1), rtol=1e-12)
    np.testing.assert_allclose(fit.count.sum(), 38 * 38)


def test_the_inverse_is_the_covariance_of_unit_noise() -> None:
    rng = np.random.default_rng(1)
    model = np.stack([blobs((40, 40))] * 600)
    data = model + 0.05 * rng.standard_normal(model.shape).astype(np.float32)
    solution, inverse = displacement_equations(data, model, np.ones_like(data)).solve()
    spread = solution[:, :2].std(axis=0) / 0.05
    np.testing.assert_allclose(spread, np.sqrt(np.diagonal(inverse[0])[:2]), rtol=0.1)


def test_no_information_is_no_displacement() -> None:
    flat = np.ones((2, 20, 20), np.float32)
    solution, inverse = displacement_equations(flat, flat, np.ones_like(flat)).solve()
    np.testing.assert_array_equal(solution, 0)
    assert np.all(np.isinf(inverse[:, 0, 0]))
    nothing = displacement_equations(flat, flat, np.zeros_like(flat))
    np.testing.assert_array_equal(nothing.solve()[0], 0)
    assert np.all(nothing.count == 0)


@given(st.integers(0, 1000))
def test_solve_normal_solves(seed: int) -> None:
    rng = np.random.default_rng(seed)
    design = rng.normal(size=(3, 12, 4)) * np.array([1.0, 1e3, 1e-3, 10.0])
    true = rng.normal(size=(3, 4))
    normal = np.einsum("nki,nkj->nij", design, design)
    solution, inverse = solve_normal(normal, np.einsum("nij,nj->ni", normal, true))
    np.testing.assert_allclose(solution, true, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(inverse @ normal, np.broadcast_to(np.eye(4), (3, 4, 4)), atol=1e-4)


# ------------------------------------------------------------------------------------------------ registration


@pytest.mark.parametrize(
    ("scale", "translation"),
    [
        (0.004, (0.0, 0.0, 0.0)),
        (0.0, (0.15, 0.0, 0.0)),
        (0.0, (0.0, 0.2, 0.0)),
        (0.0, (0.0, 0.0, -0.2)),
        (-0.003, (-0.1, 0.1, 0.1)),
    ],
)
@pytest.mark.parametrize("pixel", [1.0, 4.0])
def test_scale_and_translation(scale: float, translation: tuple[float, float, float], pixel: float) -> None:
    ty, a, b = translation
    t = np.deg2rad(THETA)
    moves = np.stack([np.full(t.shape, ty), a * np.cos(t) + b * np.sin(t)], axis=1)
    data = np.stack([blobs((44, 50), m, 1 + scale) for m in moves])
    model = np.stack([blobs((44, 50))] * len(THETA))
    columns = ("scale", "dy", "dx", "gain", "level")
    fit = registration_equations(data, model, np.ones_like(data), pixel=pixel, columns=columns)
    solution, _ = fit.solve()  # one problem a projection
    assert solution[:, 0].mean() == pytest.approx(scale, abs=3e-4)  # shared; one projection alone: second-order terms
    np.testing.assert_allclose(solution[:, 1:3] / pixel, moves, atol=0.01)


# ------------------------------------------------------------------------------------------- centre and support


@given(st.floats(-50, 50), st.floats(-50, 50), st.floats(-50, 50))
def test_center_of_rotation_is_the_constant(c: float, a: float, b: float) -> None:
    t = np.deg2rad(THETA)
    found, sigma = center_of_rotation(c + a * np.cos(t) + b * np.sin(t), THETA)
    assert found == pytest.approx(c, abs=1e-8)
    assert np.isnan(sigma)


def test_center_of_rotation_weighs_and_passes_over() -> None:
    x = np.full(len(THETA), 2.0)
    x[3] = 100.0
    sigma = np.full(len(THETA), 0.1)
    sigma[3] = 1e4
    assert center_of_rotation(x, THETA, sigma)[0] == pytest.approx(2.0, abs=1e-6)
    x[3] = np.nan
    assert center_of_rotation(x, THETA, sigma)[0] == pytest.approx(2.0, abs=1e-9)
    assert np.isnan(center_of_rotation([1.0, np.nan, 2.0], [0.0, 1.0, 2.0])[0])


def test_standard_error_of_the_center() -> None:
    rng = np.random.default_rng(2)
    sigma = np.full(len(THETA), 0.2)
    found = [center_of_rotation(rng.normal(0, 0.2, len(THETA)), THETA, sigma) for _ in range(800)]
    spread = np.std([c for c, _ in found])
    assert found[0][1] == pytest.approx(spread, rel=0.1)


@pytest.mark.parametrize("shape", [(20, 20, 20), (41, 40, 40), (33, 48, 48)])
def test_support_holds_the_object_and_not_the_corners(shape: tuple[int, int, int]) -> None:
    z = np.ogrid[tuple(slice(0, n) for n in shape)]
    radius = sum((g - (n - 1) / 2) ** 2 for g, n in zip(z, shape, strict=True))
    volume = (radius < 5**2).astype(np.float32)
    support = object_support(volume)
    assert support.shape == shape
    assert support.dtype == np.float32
    assert set(np.unique(support)) == {0.0, 1.0}
    assert np.all(support[volume > 0] == 1)
    assert support[0, 0, 0] == 0
    assert support.mean() < 0.8


def test_support_of_nothing_is_everything() -> None:
    assert np.all(object_support(np.zeros((8, 8, 8), np.float32)) == 1)
