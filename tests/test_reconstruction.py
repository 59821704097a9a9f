import importlib.util

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_xanes_tomo.model import XanesTomoError
from napari_xanes_tomo.projector import Projector
from napari_xanes_tomo.reconstruction import (
    FILTERS,
    WINDOW_SIGMA,
    FilteredBackProjection,
    Reconstructor,
    TomoPy,
    angular_weights,
    available_backends,
    cgls,
    fbp,
    fbp_variance,
    filter_response,
    reconstructor,
    sirt,
)


def smooth_disk(n: int, z: float, x: float, radius: float) -> np.ndarray:
    c = np.arange(n) - (n - 1) / 2
    return 0.5 - 0.5 * np.tanh((np.hypot(c[:, None] - z, c - x) - radius) / 1.2)


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    n = 80
    a = smooth_disk(n, 4, -6, 22) - 0.5 * smooth_disk(n, 8, -2, 6) + 0.7 * smooth_disk(n, -20, 12, 5)
    return np.stack([a, 0.5 * a, a[::-1]]).astype(np.float32)


def circle(n: int, radius: float) -> np.ndarray:
    c = np.arange(n) - (n - 1) / 2
    return np.hypot(c[:, None], c) < radius


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("theta", "expected_deg"),
    [
        (np.arange(-90, 90.0), np.ones(180)),
        (np.arange(0, 360.0, 2.0), np.ones(180)),  # a full turn: opposite views share
        ([0.0, 90.0], [90.0, 90.0]),
        ([0.0], [180.0]),
        ([0.0, 60.0, 60.0, 120.0], [60.0, 30.0, 30.0, 60.0]),
        ([0.0, 60.0, 120.0, 180.0], [30.0, 60.0, 60.0, 30.0]),  # 180 is 0 again
        (np.arange(-70, 71.0, 2.0), np.full(71, 2.0)),  # a wedge is not closed
        ([0, 10, 20, 40, 50, 60, 70, 80, 90, 100, 110, 120, 130, 140, 150, 160, 170], [10, 10, 15, 15] + [10] * 13),
    ],
)
def test_angular_weights(theta, expected_deg) -> None:
    np.testing.assert_allclose(np.rad2deg(angular_weights(theta)), expected_deg, rtol=1e-6)


def test_angular_weights_of_the_usable() -> None:
    usable = np.ones(18, bool)
    usable[[4, 17]] = False
    w = np.rad2deg(angular_weights(np.arange(0, 180, 10.0), usable=usable))
    assert w[4] == w[17] == 0
    np.testing.assert_allclose(w[[3, 5, 0, 16]], 15)
    assert w.sum() == pytest.approx(180)


@given(st.lists(st.integers(-400, 400), min_size=1, max_size=40), st.integers(-90, 90))
def test_angular_weights_do_not_care_for_order_origin_or_half_turns(angles: list[int], origin: int) -> None:
    theta = np.array(angles, float)
    w = angular_weights(theta)
    assert (w > 0).all()
    assert w.sum() <= np.pi * (1 + 1e-9)
    np.testing.assert_allclose(angular_weights(theta[::-1])[::-1], w)
    np.testing.assert_allclose(angular_weights(theta + origin), w)
    np.testing.assert_allclose(angular_weights(theta + 180), w)


# ---------------------------------------------------------------- FBP


@pytest.mark.parametrize(
    ("name", "tolerance"), [("ramp", 0.012), ("shepp-logan", 0.03), ("cosine", 0.05), ("hann", 0.07)]
)
def test_fbp_gives_back_the_volume(truth: np.ndarray, name: str, tolerance: float) -> None:
    theta = np.arange(-90.0, 90.0, 1.0)
    out = fbp(Projector(80, theta).forward(truth), theta, filter=name)
    assert out.shape == truth.shape
    assert out.dtype == np.float32
    inside = circle(80, 38)
    assert relative(out[:, inside], truth[:, inside]) < tolerance
    # the value of a uniform piece, 1/pixel
    assert out[0, 30:34, 30:34].mean() == pytest.approx(truth[0, 30:34, 30:34].mean(), rel=3e-3)


def test_fbp_with_shifts_equals_fbp_without(truth: np.ndarray) -> None:
    theta = np.arange(-90.0, 90.0, 2.0)
    shift = np.random.default_rng(0).normal(1.0, 2.0, theta.size)
    projector = Projector(80, theta)
    plain = fbp(projector.forward(truth), theta)
    moved = fbp(projector.forward(truth, shift=shift), theta, shift=shift)
    assert relative(moved, plain) < 3e-3


def test_unequal_angles_need_their_weights(truth: np.ndarray) -> None:
    theta = np.concatenate([np.arange(-90, 0, 1.0), np.arange(0, 90, 3.0)])
    p = Projector(80, theta).forward(truth)
    inside = circle(80, 38)
    right = relative(fbp(p, theta)[:, inside], truth[:, inside])
    wrong = relative(fbp(p, theta, weights=np.full(theta.size, np.pi / theta.size))[:, inside], truth[:, inside])
    assert right < 0.06
    assert wrong > 3 * right


def test_excluded_projections_do_not_matter(truth: np.ndarray) -> None:
    theta = np.arange(-90.0, 90.0, 2.0)
    p = Projector(80, theta).forward(truth)
    usable = np.ones(90, bool)
    usable[[10, 55]] = False
    spoilt = p.copy()
    spoilt[~usable] = 1e3
    out = fbp(spoilt, theta, weights=angular_weights(theta, usable=usable))
    expected = fbp(p[usable], theta[usable])
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_another_grid_size_and_extension(truth: np.ndarray) -> None:
    theta = np.arange(-90.0, 90.0, 2.0)
    p = Projector(80, theta).forward(truth)
    small = fbp(p, theta, n=40)
    assert small.shape == (3, 40, 40)
    np.testing.assert_allclose(small, fbp(p, theta)[:, 20:60, 20:60], atol=2e-3)
    # the middle of a truncated field: continued lines leave a flatter interior than lines cut to zero
    cut = p[:, :, 24:56]
    middle = truth[:, 24:56, 24:56][:, circle(32, 14)]

    def unevenness(out: np.ndarray) -> float:
        error = out[:, circle(32, 14)] - middle
        return float(error.std())

    assert unevenness(fbp(cut, theta, extend=32)) < 0.6 * unevenness(fbp(cut, theta))


# ---------------------------------------------------------------- variance


@pytest.mark.parametrize("name", ["ramp", "shepp-logan", "hann"])
@pytest.mark.parametrize("uniform", [True, False])
def test_variance_against_monte_carlo(name: str, uniform: bool) -> None:
    n, draws = 48, 600
    rng = np.random.default_rng(5)
    theta = np.concatenate([np.arange(-90, 0, 2.0), np.arange(0, 90, 3.0)])
    column = np.arange(n)
    variance = 1.0 + (0 if uniform else 0.8) * np.sin(column / 6.0) * np.cos(np.deg2rad(theta))[:, None]
    noise = rng.standard_normal((theta.size, draws, n)) * np.sqrt(variance)[:, None]
    shift = rng.uniform(-1, 1, theta.size)
    observed = fbp(noise, theta, filter=name, shift=shift).var(axis=0)
    predicted = fbp_variance(variance[:, None], theta, filter=name, shift=shift)[0]
    inside = circle(n, n / 2 - 4)
    ratio = observed[inside] / predicted[inside]
    assert ratio.mean() == pytest.approx(1, abs=0.02)
    assert ratio.std() < 1.15 * np.sqrt(2 / draws)  # nothing but the scatter of the draws: no voxel is off by more
    assert predicted.min() >= 0


def test_variance_of_smoothed_noise() -> None:
    n, draws = 48, 600
    theta = np.arange(-90, 90, 3.0)
    noise = np.random.default_rng(1).standard_normal((theta.size, draws, n + 2))
    smooth = 0.25 * noise[..., :-2] + 0.5 * noise[..., 1:-1] + 0.25 * noise[..., 2:]
    observed = fbp(smooth, theta).var(axis=0)
    response = 0.5 + 0.5 * np.cos(2 * np.pi * np.linspace(0, 0.5, 65))
    predicted = fbp_variance(np.ones((theta.size, 1, n)), theta, noise_response=response)[0]
    inside = circle(n, n / 2 - 5)
    assert (observed[inside] / predicted[inside]).mean() == pytest.approx(1, abs=0.03)


# ---------------------------------------------------------------- iterative


def test_iterative_solvers(truth: np.ndarray) -> None:
    theta = np.arange(-90.0, 90.0, 4.0)
    p = Projector(80, theta).forward(truth)
    inside = circle(80, 38)

    def error(out: np.ndarray) -> float:
        return relative(out[:, inside], truth[:, inside])

    assert error(sirt(p, theta, iterations=60)) < 0.12
    assert error(cgls(p, theta, iterations=15)) < 0.03
    clipped = sirt(p, theta, iterations=60, positivity=True)
    assert clipped.min() >= 0
    support = truth[0] > 0.01
    assert (sirt(p[:, :1], theta, iterations=5, support=support)[0][~support] == 0).all()
    assert (cgls(p[:, :1], theta, iterations=5, support=support)[0][~support] == 0).all()


def test_iterative_solvers_stay_at_the_solution(truth: np.ndarray) -> None:
    theta = np.arange(-90.0, 90.0, 4.0)
    shift = np.linspace(-2, 2, theta.size)
    p = Projector(80, theta, pad=1.5).forward(truth, shift=shift)
    for solver in (sirt, cgls):
        assert relative(solver(p, theta, iterations=3, start=truth, shift=shift), truth) < 1e-3


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1000))
def test_iterative_solvers_lower_the_residual_of_any_data(seed: int) -> None:
    rng = np.random.default_rng(seed)
    theta = np.sort(rng.uniform(-90, 90, 15))
    p = rng.standard_normal((15, 2, 24)).astype(np.float32)
    projector = Projector(24, theta, pad=1.5)
    for solver in (sirt, cgls):
        residual = [np.linalg.norm(p - projector.forward(solver(p, theta, iterations=k))) for k in (0, 1, 4, 12)]
        assert residual[0] > residual[1] > residual[2] > residual[3]


# ---------------------------------------------------------------- back ends


def test_backends(truth: np.ndarray) -> None:
    theta = np.arange(-90.0, 90.0, 2.0)
    p = Projector(80, theta).forward(truth)
    own: Reconstructor = FilteredBackProjection("hann")
    assert isinstance(own, Reconstructor)
    assert isinstance(TomoPy(), Reconstructor)
    assert own.name == "fbp (hann)"
    np.testing.assert_array_equal(own(p, theta), fbp(p, theta, filter="hann"))
    assert available_backends()[0] == "fbp"


@pytest.mark.parametrize(
    ("algorithm", "tolerance"),
    [("fbp", 1e-6), ("sirt", 0.12), ("cgls", 0.12)],  # relative L2, of fbp
)
def test_what_a_recipe_names(truth: np.ndarray, algorithm: str, tolerance: float) -> None:
    theta = np.arange(-90.0, 90.0, 2.0)
    p = Projector(80, theta).forward(truth, shift=1.5)
    p[7] = 50.0  # left out by its weight
    weights = angular_weights(theta, usable=np.arange(len(theta)) != 7)
    solve = reconstructor(algorithm)
    assert isinstance(solve, Reconstructor)
    expected = fbp(p, theta, weights=weights, shift=1.5)
    inside = circle(80, 36)
    assert relative(solve(p, theta, weights=weights, shift=1.5)[:, inside], expected[:, inside]) < tolerance


def test_reconstructors_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="expected fbp, sirt, cgls"):
        reconstructor("art")
    if "tomopy" not in available_backends():
        with pytest.raises(XanesTomoError, match="needs TomoPy, which is not installed"):
            reconstructor("tomopy-gridrec")


@pytest.mark.skipif(importlib.util.find_spec("tomopy") is None, reason="TomoPy is not installed")
def test_tomopy_agrees(truth: np.ndarray) -> None:
    theta = np.arange(-90.0, 90.0, 1.0)
    p = Projector(80, theta).forward(truth, shift=1.5)
    inside = circle(80, 36)
    out = TomoPy("gridrec")(p, theta, shift=1.5)
    assert relative(out[:, inside], fbp(p, theta, shift=1.5)[:, inside]) < 0.15


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fbp(np.zeros((3, 2, 8)), [0, 1]), "projections"),
        (lambda: fbp(np.zeros((3, 8)), [0, 1, 2]), "projections"),
        (lambda: fbp(np.zeros((3, 2, 8)), [0, 1, np.nan]), "theta_deg"),
        (lambda: fbp(np.zeros((3, 2, 8)), [0, 1, 2], filter="best"), "filter"),
        (lambda: angular_weights([0, 1], usable=[True]), "usable"),
    ],
)
def test_errors_say_what_was_expected(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", [n for n in FILTERS if n != "none"])
def test_the_blur_of_a_window_is_that_of_its_gaussian(name: str) -> None:
    response = filter_response(name, 4096)[1:200] / filter_response("ramp", 4096)[1:200]
    f = np.arange(1, 200) / 4096
    np.testing.assert_allclose(response, np.exp(-2 * (np.pi * WINDOW_SIGMA[name] * f) ** 2), atol=1e-4)
