from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from napari_xanes_tomo import open_series
from napari_xanes_tomo.absorbance import normalise
from napari_xanes_tomo.agreement import (
    center_of_rotation,
    displacement_equations,
    recorded_rows,
    smooth,
    squared_gradient,
)
from napari_xanes_tomo.blurred import lost_to_blur
from napari_xanes_tomo.coupled import Coupled
from napari_xanes_tomo.io.store import read_shifts, rows_alignments
from napari_xanes_tomo.jitter import FEWEST_ANGLES, JitterResult, _in_runs, find_jitter
from napari_xanes_tomo.model import Alignment, Cancelled, XanesTomoError
from napari_xanes_tomo.qc import check_projections, check_scores
from napari_xanes_tomo.recipe import AbsorbanceParameters, JitterParameters, Recipe
from napari_xanes_tomo.reprojection import Scene
from napari_xanes_tomo.resample import place
from napari_xanes_tomo.steps import run_flats
from napari_xanes_tomo.straight import fit_straight, outer_rows, profile_noise

# (y, z, x), radius, attenuation per pixel: an object without symmetry, its parts well inside the field.
Balls = tuple[tuple[tuple[float, float, float], float, float], ...]
BALLS: Balls = (((-3.0, 4.0, -5.0), 9.0, 0.05), ((7.0, -6.0, 6.0), 5.0, 0.08), ((-8.0, -5.0, 8.0), 3.0, 0.1))


def balls(
    theta: npt.ArrayLike, shape: tuple[int, int], shift: npt.NDArray, fine: int = 3, parts: Balls = BALLS
) -> npt.NDArray[np.float32]:
    """Line integrals of `parts`, averaged over pixels, the content of every frame displaced by ``[dy, dx]``."""
    t = np.deg2rad(np.asarray(theta, float))
    sub = (np.arange(fine) - (fine - 1) / 2) / fine
    y = (np.arange(shape[0])[:, None] + sub - (shape[0] - 1) / 2).ravel()
    x = (np.arange(shape[1])[:, None] + sub - (shape[1] - 1) / 2).ravel()
    out = np.zeros((len(t), len(y), len(x)))
    for (cy, cz, cx), radius, level in parts:
        u = cx * np.cos(t) + cz * np.sin(t)
        qy = y[None, :] - shift[:, :1] - cy
        qx = x[None, :] - shift[:, 1:] - u[:, None]
        out += 2 * level * np.sqrt(np.maximum(radius**2 - qy[:, :, None] ** 2 - qx[:, None, :] ** 2, 0))
    return out.reshape(len(t), shape[0], fine, shape[1], fine).mean(axis=(2, 4)).astype(np.float32)


def motion(n: int, seed: int, rms: float = 1.5, jump: float = 2.0, centre: float = 1.2) -> npt.NDArray:
    """Random walk, white noise, a jump half-way, the rotation centre off."""
    rng = np.random.default_rng(seed)
    walk = np.cumsum(rng.normal(size=(n, 2)), axis=0)
    out = walk / walk.std(axis=0) + 0.5 * rng.normal(size=(n, 2))
    out *= rms / out.std(axis=0)
    out[n // 2 :] += jump
    return out - out.mean(axis=0) + [0.7, centre]


def errors(found: npt.NDArray, true: npt.NDArray, theta: npt.ArrayLike) -> tuple[float, float, float]:
    """Rms over angles in y and x after what cannot be determined, and the error of the rotation centre, px."""
    t = np.deg2rad(np.asarray(theta, float))
    d = found - true
    y = d[:, 0] - d[:, 0].mean()
    two = np.stack([np.cos(t), np.sin(t)], axis=1)
    x = d[:, 1] - two @ np.linalg.lstsq(two, d[:, 1], rcond=None)[0]
    three = np.column_stack([two, np.ones(len(t))])
    return float(np.sqrt(np.mean(y**2))), float(np.sqrt(np.mean(x**2))), float(
        np.linalg.lstsq(three, d[:, 1], rcond=None)[0][2]
    )  # fmt: skip


THETA = np.arange(-90.0, 90.0, 5.0)
UNEQUAL = np.sort(np.concatenate([np.arange(-90.0, 90.0, 6.0), [-71.0, -14.5, 1.0, 33.0, 64.25]]))
SHAPE = (48, 56)
PARAMETERS = JitterParameters(iterations=4)


def wall(
    theta: npt.ArrayLike, shape: tuple[int, int], shift: npt.NDArray, tilt: float = 0.04, fine: int = 3
) -> npt.NDArray[np.float32]:
    """Line integrals of a tube wider than the field around the object, that moves and turns with it."""
    t = np.deg2rad(np.asarray(theta, float))[:, None, None]
    h, w = shape
    y = np.arange(h)[None, :, None] - (h - 1) / 2 - shift[:, :1, None]
    x = np.arange(w * fine)[None, None, :] / fine - (w - 1 / fine) / 2 - shift[:, 1:, None]
    u = x - 0.85 * w * np.cos(t - 0.7) - tilt * y * np.cos(t)
    outer, inner = (np.sqrt(np.maximum((r * w) ** 2 - u**2, 0)) for r in (1.2, 1.12))
    return (2 * 0.6 / w * (outer - inner)).reshape(len(t), h, w, fine).mean(axis=3).astype(np.float32)


# ------------------------------------------------------------------------------------------------ known motion


# Tilt of the capillary, noise of a pixel; tolerance y, x, centre in px.
@pytest.mark.parametrize(
    ("tilt", "noise", "tolerances"),
    [(0.0, 0.0, (0.02, 0.02, 0.02)), (0.04, 0.02, (0.04, 0.04, 0.04)), (-0.1, 0.02, (0.04, 0.04, 0.05))],
    ids=["upright", "tilted", "steep"],
)
def test_the_wall_of_a_capillary_changes_nothing(
    tilt: float, noise: float, tolerances: tuple[float, float, float]
) -> None:
    theta, shape = np.arange(-90.0, 90.0, 4.0), (64, 72)
    true = motion(len(theta), 3)
    stack = balls(theta, shape, true) + wall(theta, shape, true, tilt)
    stack += noise * np.random.default_rng(1).standard_normal(stack.shape).astype(np.float32)
    found = find_jitter(stack, theta, variance=noise**2 or None, parameters=PARAMETERS)
    assert any("straight" in reason for reason in found.quality.notes)
    error = errors(found.shift, true, theta)
    assert np.all(np.abs(error) <= tolerances), error
    good = np.isfinite(found.sigma).all(axis=1)
    assert good.all()
    if noise:  # the error bars know what is left
        assert error[1] < 2.0 * np.sqrt(np.mean(found.sigma[:, 1] ** 2))


def test_straight_structures_are_told_from_air() -> None:
    theta, shape = np.arange(-90.0, 90.0, 4.0), (64, 72)
    still = np.zeros((len(theta), 2))
    noise = 0.01 * np.random.default_rng(2).standard_normal((len(theta), *shape)).astype(np.float32)
    alone = balls(theta, shape, still) + noise
    assert abs(fit_straight(alone, outer_rows(alone), theta).shared) < 0.3
    glass = wall(theta, shape, still)
    found = fit_straight(alone + glass, outer_rows(alone + glass), theta)
    assert found.shared > 0.5
    np.testing.assert_allclose(found.tilt, [0.04, 0.0], atol=0.01)
    rows = slice(8, -8)
    left = (found.frames(shape, theta) - glass)[:, rows, 4:-4]
    assert np.sqrt(np.mean(left**2)) < 0.01


# Angles, shape of a frame, noise of a pixel; tolerance y, x, centre in px.
@pytest.mark.parametrize(
    ("theta", "shape", "noise", "tolerances"),
    [
        (THETA, (48, 48), 0.0, (0.02, 0.02, 0.02)),
        (THETA, (48, 48), 0.02, (0.03, 0.03, 0.03)),
        (THETA, (40, 64), 0.02, (0.03, 0.03, 0.03)),
        (THETA, (64, 40), 0.02, (0.03, 0.04, 0.04)),
        (THETA, (47, 53), 0.02, (0.03, 0.03, 0.03)),
        (UNEQUAL, SHAPE, 0.02, (0.03, 0.03, 0.03)),
        (THETA[::-1].copy(), SHAPE, 0.02, (0.03, 0.03, 0.03)),
        (np.random.default_rng(5).permutation(THETA), SHAPE, 0.02, (0.03, 0.03, 0.03)),
        (np.delete(THETA, [3, 17, 18, 30]), SHAPE, 0.02, (0.03, 0.03, 0.03)),
        (THETA + 90.0, SHAPE, 0.02, (0.03, 0.03, 0.03)),
    ],
    ids=["clean", "noisy", "wide", "tall", "odd", "unequal", "reversed", "shuffled", "gaps", "from 0"],
)
def test_known_motion_is_found(
    theta: npt.NDArray, shape: tuple[int, int], noise: float, tolerances: tuple[float, float, float]
) -> None:
    true = motion(len(theta), 1)
    stack = balls(theta, shape, true) + noise * np.random.default_rng(0).standard_normal((len(theta), *shape))
    found = find_jitter(stack, theta, variance=noise**2 or None, parameters=PARAMETERS)
    y, x, centre = errors(found.shift, true, theta)
    assert y < tolerances[0]
    assert x < tolerances[1]
    assert abs(centre) < tolerances[2]
    # The axis is that of the true shifts, weighted as the found ones are.
    expected, _ = center_of_rotation(true[:, 1], theta, found.sigma[:, 1])
    assert found.center == pytest.approx(expected, abs=tolerances[2])
    assert found.magnification == 1.0
    assert found.roll_deg == 0.0


def test_content_that_lies_below_and_to_the_right_has_positive_shifts_and_place_brings_it_back() -> None:
    true = np.zeros((len(THETA), 2))
    true[10] = [3.0, 2.0]  # 3 down, 2 to the right
    stack = balls(THETA, SHAPE, true)
    still = balls(THETA, SHAPE, np.zeros_like(true))
    assert stack[10].sum(axis=1).argmax() - still[10].sum(axis=1).argmax() == 3
    found = find_jitter(stack, THETA, parameters=PARAMETERS)
    assert isinstance(found, Alignment)
    assert found.status == ("ok",) * len(THETA)
    step = found.shift[10] - 0.5 * (found.shift[9] + found.shift[11])
    np.testing.assert_allclose(step, [3.0, 2.0], atol=0.1)
    placed = place(stack, found)
    # The vertical profile of mass is the same at every angle again.
    profile = placed.sum(axis=2)
    assert np.abs(profile - profile.mean(axis=0)).max() < 0.02 * profile.max()


def test_the_object_stands_in_the_middle() -> None:
    # Where it stands cannot be known: the centre of mass is put on the axis, at the middle row.
    true = motion(len(THETA), 2)
    found = find_jitter(balls(THETA, SHAPE, true), THETA, parameters=PARAMETERS)
    placed = place(balls(THETA, SHAPE, true), found.alignment)
    mass = placed.sum(axis=(1, 2))
    y, x = (np.arange(n) - (n - 1) / 2 for n in SHAPE)
    np.testing.assert_allclose((placed.sum(axis=2) @ y) / mass, 0, atol=0.1)
    np.testing.assert_allclose((placed.sum(axis=1) @ x) / mass, 0, atol=0.1)


@pytest.mark.parametrize("start", [0.0, 4.0])
def test_no_motion_stays_within_its_error_bar(start: float) -> None:
    # The refinement must have no bias of its own.
    true = np.full((len(THETA), 2), start)
    noise = 0.02
    stack = balls(THETA, SHAPE, true) + noise * np.random.default_rng(3).standard_normal((len(THETA), *SHAPE))
    found = find_jitter(stack, THETA, variance=noise**2, parameters=PARAMETERS)
    y, x, centre = errors(found.shift, true, THETA)
    assert max(y, x) < 0.03
    assert abs(centre) < 0.03


def test_moved_frames_give_moved_shifts() -> None:
    # Rolling every frame by whole pixels adds them to the shifts, up to what cannot be determined.
    stack = balls(THETA, (56, 64), motion(len(THETA), 4, rms=0.8))
    move = np.random.default_rng(0).integers(-3, 4, (len(THETA), 2))
    rolled = np.stack([np.roll(f, m, (0, 1)) for f, m in zip(stack, move, strict=True)])
    one, other = (find_jitter(s, THETA, parameters=PARAMETERS).shift for s in (stack, rolled))
    assert max(np.abs(errors(other - one, move.astype(float), THETA))) < 0.02


def test_frames_upside_down_and_mirrored() -> None:
    stack = balls(THETA, SHAPE, motion(len(THETA), 6))
    shift = find_jitter(stack, THETA, parameters=PARAMETERS).shift
    down = find_jitter(stack[:, ::-1], THETA, parameters=PARAMETERS).shift
    left = find_jitter(stack[:, :, ::-1], THETA, parameters=PARAMETERS).shift
    assert max(np.abs(errors(down * [-1, 1], shift, THETA))) < 0.02
    assert max(np.abs(errors(left * [1, -1], shift, THETA))) < 0.02


def test_gain_of_a_frame_and_of_all_do_not_matter() -> None:
    true = motion(len(THETA), 7)
    stack = balls(THETA, SHAPE, true)
    gains = 1 + 0.02 * np.random.default_rng(0).standard_normal(len(THETA))
    for changed in (stack * gains[:, None, None].astype(np.float32), 30 * stack):
        assert max(np.abs(errors(find_jitter(changed, THETA).shift, true, THETA))) < 0.03


def test_sign_and_background_do_not_matter() -> None:
    # Dark on bright as well as bright on dark, on a level and slopes of each frame's own.
    rng = np.random.default_rng(0)
    true = motion(len(THETA), 7)
    stack = balls(THETA, SHAPE, true) + 0.01 * rng.standard_normal((len(THETA), *SHAPE))
    c = rng.normal(size=(3, len(THETA), 1, 1))
    y, x = np.linspace(-1, 1, SHAPE[0])[:, None], np.linspace(-1, 1, SHAPE[1])[None, :]
    for changed in (5 - 2 * stack, stack + 0.3 + 0.05 * (c[0] + c[1] * y + c[2] * x)):
        assert max(np.abs(errors(find_jitter(changed, THETA).shift, true, THETA))) < 0.05


@pytest.mark.parametrize("off", [1.0, 8.0])
def test_the_answer_does_not_depend_on_where_the_search_begins(off: float) -> None:
    true = motion(len(THETA), 7)
    rng = np.random.default_rng(1)
    stack = balls(THETA, SHAPE, true) + 0.02 * rng.standard_normal((len(THETA), *SHAPE))
    one = find_jitter(stack, THETA, initial=true)
    other = find_jitter(stack, THETA, initial=true + off * rng.choice([-1.0, 1.0], true.shape))
    difference = errors(other.shift, one.shift, THETA)
    assert difference[0] < np.median(one.sigma[:, 0])
    assert difference[1] < np.median(one.sigma[:, 1])
    assert abs(difference[2]) < max(one.center_sigma, 0.01)


def test_refine_off_gives_the_moments() -> None:
    true = motion(len(THETA), 1)
    stack = balls(THETA, SHAPE, true)
    for p in (JitterParameters(refine=False), JitterParameters(iterations=0)):
        found = find_jitter(stack, THETA, parameters=p)
        assert found.method == "moments"
        np.testing.assert_array_equal(found.shift, found.moments)
    assert max(np.abs(errors(found.moments, true, THETA))) < 0.05


def test_reprojection_saves_what_a_background_does_to_the_moments() -> None:
    rng = np.random.default_rng(0)
    true = motion(len(THETA), 8, rms=1.0)
    stack = balls(THETA, SHAPE, true) + 0.01 * rng.standard_normal((len(THETA), *SHAPE))
    y, x = np.linspace(-1, 1, SHAPE[0])[:, None], np.linspace(-1, 1, SHAPE[1])
    # A plane or what runs straight down would be found in the air and taken out; this is neither.
    stack += (0.1 * rng.standard_normal(len(THETA)))[:, None, None] * np.sin(3.5 * x + 2.5 * y)
    found = find_jitter(stack, THETA, variance=1e-4)
    assert found.method.startswith("reprojection")
    moments, refined = errors(found.moments, true, THETA)[1], errors(found.shift, true, THETA)[1]
    assert moments > 0.1
    assert refined < 0.5 * moments


def test_more_iterations_change_nothing_with_a_post_in_the_field() -> None:
    # The bounds of the object are narrow where there is only the post, and wide above it.
    theta, shape, noise = np.arange(-90.0, 90.0, 3.0), (64, 64), 0.03
    t = np.deg2rad(theta)[:, None, None]
    true = motion(len(theta), 4)
    y = np.arange(shape[0])[None, :, None] - (shape[0] - 1) / 2 - true[:, :1, None]
    x = np.arange(shape[1])[None, None, :] - (shape[1] - 1) / 2 - true[:, 1:, None] - 2 * np.cos(t)
    post = 1.4 * np.sqrt(np.maximum(1 - (x / 3.5) ** 2, 0)) / (1 + np.exp(-2 * (y - 20)))
    stack = 0.2 * balls(theta, shape, true) + post
    stack += noise * np.random.default_rng(1).standard_normal(stack.shape)
    few, many = (
        find_jitter(stack, theta, variance=noise**2, parameters=JitterParameters(iterations=k)) for k in (4, 14)
    )
    np.testing.assert_allclose(errors(few.shift, many.shift, theta), 0, atol=0.01)
    assert np.all(np.abs(errors(many.shift, true, theta)) < 0.07)


def test_sigma_is_the_size_of_the_error() -> None:
    # Over several noisy tomograms; error / sigma between 0.5 and 2 in either direction.
    noise = 0.06
    squares, expected = np.zeros(2), np.zeros(2)
    for seed in range(3):
        true = motion(len(THETA), seed, rms=1.0)
        stack = balls(THETA, SHAPE, true) + noise * np.random.default_rng(seed).standard_normal((len(THETA), *SHAPE))
        found = find_jitter(stack, THETA, variance=noise**2, parameters=PARAMETERS)
        y, x, _ = errors(found.shift, true, THETA)
        squares += [y**2, x**2]
        expected += np.mean(found.sigma**2, axis=0)
    ratio = np.sqrt(squares / expected)
    assert np.all((ratio > 0.5) & (ratio < 2.0)), ratio


def test_more_noise_means_larger_sigma() -> None:
    true = motion(len(THETA), 1)
    sigmas = []
    for noise in (0.02, 0.08):
        stack = balls(THETA, SHAPE, true) + noise * np.random.default_rng(0).standard_normal((len(THETA), *SHAPE))
        for variance in (noise**2, None):  # given, or estimated from the frames
            found = find_jitter(stack, THETA, variance=variance, parameters=PARAMETERS)
            sigmas.append(np.sqrt(np.mean(found.sigma**2)))
    given, estimated, more, more_estimated = sigmas
    assert more > 2 * given
    assert estimated == pytest.approx(given, rel=0.5)
    assert more_estimated == pytest.approx(more, rel=0.5)


def test_a_bad_projection_stands_out() -> None:
    true = motion(len(THETA), 1, rms=1.0)
    stack = balls(THETA, SHAPE, true) + 0.02 * np.random.default_rng(0).standard_normal((len(THETA), *SHAPE))
    stack[12] = balls([THETA[30]], SHAPE, true[12:13])[0]  # the stage turned elsewhere
    found = find_jitter(stack, THETA, variance=4e-4, parameters=PARAMETERS)
    assert int(np.argmax(found.residual)) == 12
    others = np.delete(np.arange(len(THETA)), 12)
    assert found.residual[12] > 2 * np.median(found.residual[others])
    assert max(errors(found.shift[others], true[others], THETA[others])[:2]) < 0.1


# -------------------------------------------------------------------------------------------------- the tiny twin


@pytest.fixture(scope="module")
def twin(tiny_twin: Path) -> dict[float, tuple[npt.NDArray, Alignment, JitterResult]]:
    """Energy to angles, true alignment, result."""
    truth = {e: (t, a) for e, t, a in rows_alignments(read_shifts(tiny_twin / "truth" / "tables" / "shifts.csv"))}
    out = {}
    for scan in open_series(tiny_twin).scans:
        if scan.energy_ev in (6534.0, 7728.0, 8570.0):
            data = normalise(scan, AbsorbanceParameters())
            theta, true = truth[scan.energy_ev]
            np.testing.assert_allclose(theta, scan.theta_deg)
            out[scan.energy_ev] = (theta, true, find_jitter(data.data, theta, variance=data.variance))
    return out


# Tolerances of 64 px frames: those of 256 px ones, 0.1 px and 0.2 px, hold here as well.
@pytest.mark.parametrize("energy", [6534.0, 7728.0, 8570.0])
def test_jitter_of_the_twin(twin: dict[float, tuple[npt.NDArray, Alignment, JitterResult]], energy: float) -> None:
    theta, true, found = twin[energy]
    assert true.shift.std() > 0.4  # there is something to be found
    y, x, centre = errors(found.shift, true.shift, theta)
    assert y < 0.05
    assert x < 0.05
    assert abs(centre) < 0.05
    expected, _ = center_of_rotation(true.shift[:, 1], theta, found.sigma[:, 1])
    assert found.center == pytest.approx(expected, abs=0.05)
    assert found.quality.verdict == "good"


def test_sigma_of_the_twin(twin: dict[float, tuple[npt.NDArray, Alignment, JitterResult]]) -> None:
    squares, expected, centres = np.zeros(2), np.zeros(2), []
    for theta, true, found in twin.values():
        d = found.shift - true.shift
        y, _, centre = errors(found.shift, true.shift, theta)
        t = np.deg2rad(theta)
        basis = np.stack([np.cos(t), np.sin(t), np.ones_like(t)], axis=1)
        x = d[:, 1] - basis @ np.linalg.lstsq(basis, d[:, 1], rcond=None)[0]
        squares += [y**2, np.mean(x**2)]
        expected += np.mean(found.sigma**2, axis=0)
        centres.append(centre / found.center_sigma)
    ratio = np.sqrt(squares / expected)
    assert np.all((ratio > 0.5) & (ratio < 2.0)), ratio
    assert np.max(np.abs(centres)) < 4


# -------------------------------------------------------------------------------------------------- bad input


def some(n: int = 12, shape: tuple[int, int] = (24, 24)) -> npt.NDArray[np.float32]:
    return balls(np.linspace(-90, 75, n), shape, np.zeros((n, 2)), fine=1)


@pytest.mark.parametrize(
    ("stack", "theta", "message"),
    [
        (some()[0], np.zeros(12), r"\(projection, y, x\)"),
        (some(), np.zeros(11), "one angle for each of 12"),
        (some(), np.zeros((12, 1)), "one angle for each of 12"),
        (some(FEWEST_ANGLES - 1), np.zeros(FEWEST_ANGLES - 1), "at least 8 usable projections, got 7"),
        (np.where(np.arange(12)[:, None, None] == 5, np.nan, some()), np.linspace(-90, 75, 12), "NaN"),
        (np.where(np.arange(12)[:, None, None] == 5, np.inf, some()), np.linspace(-90, 75, 12), "infinity"),
        (np.zeros((12, 24, 24)), np.linspace(-90, 75, 12), "contrast|absorbing"),
        (np.full((12, 24, 24), 0.25), np.linspace(-90, 75, 12), "contrast|absorbing"),
        (np.where(np.arange(12)[:, None, None] > 6, 0.3, some()), np.linspace(-90, 75, 12), "5 of 12 frames are const"),
        (np.where(np.arange(36)[:, None, None] > 6, 0.0, some(36)), np.linspace(-90, 85, 36), "29 of 36 frames"),
        (some(), np.zeros(12), "at least 8 different angles, got 1"),
        (some(), np.arange(12) % 7 * 20.0, "at least 8 different angles, got 7"),
        (some(), np.where(np.arange(12) < 6, 0, 180) + np.arange(12) % 6 * 20.0, "different angles, got 6"),
        (some()[:, :0], np.linspace(-90, 75, 12), "at least 8 x 8 pixels, got 0 x 24; is the box empty"),
        (some()[:, :3, :3], np.linspace(-90, 75, 12), "at least 8 x 8 pixels, got 3 x 3"),
        (1e30 * some(), np.linspace(-90, 75, 12), r"values as of absorbance or counts, got \S*e\+"),
    ],
    ids=[
        "2-D", "angles", "angles 2-D", "few", "NaN", "inf", "zero", "constant", "mostly constant", "7 left",
        "one angle", "7 angles", "half a turn apart", "empty box", "tiny box", "huge",
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error(stack: npt.NDArray, theta: npt.NDArray, message: str) -> None:
    with pytest.raises(XanesTomoError, match=message) as error:
        find_jitter(stack, theta)
    assert "\n" not in str(error.value)


def noisy(stack: npt.NDArray, noise: float = 0.02) -> npt.NDArray:
    return stack + noise * np.random.default_rng(0).standard_normal(stack.shape)


MOVED = motion(len(THETA), 1)


@pytest.mark.parametrize(
    ("stack", "theta", "why"),
    [
        (noisy(np.zeros((36, *SHAPE))), THETA, "part of the contrast not explained"),
        (noisy(np.linspace(0, 1, SHAPE[1]) * np.ones((36, *SHAPE))), THETA, "part of the contrast not explained"),
        (noisy(balls(THETA, (96, 112), 2 * MOVED)[:, 36:60, 44:68]), THETA, "sigma_x"),
        (noisy(balls(THETA, (96, 112), MOVED)[:, 24:72, 56:98]), THETA, "moved from the moments"),
        (np.repeat(noisy(balls(THETA, SHAPE, MOVED))[:1], 36, axis=0), THETA, "sigma_y"),
        (noisy(balls(THETA, SHAPE, MOVED)), np.random.default_rng(0).permutation(THETA), "held-out residual / noise"),
    ],
    ids=["nothing", "a slope", "beyond every side", "beyond one side", "one frame again and again", "wrong angles"],
)
def test_what_cannot_be_found_is_not_called_good(stack: npt.NDArray, theta: npt.NDArray, why: str) -> None:
    found = find_jitter(stack, theta, parameters=PARAMETERS)
    assert found.quality.verdict == "check"
    assert why in {s.name for s in found.quality.scores if not s.passed}
    assert np.isfinite(found.shift).all()


@pytest.mark.parametrize("level", [0.0, 0.5])
def test_a_few_constant_frames_are_left_out(level: float) -> None:
    stack = noisy(balls(THETA, SHAPE, MOVED))
    stack[[3, 10]] = level
    found = find_jitter(stack, THETA, variance=4e-4, parameters=PARAMETERS)
    assert np.flatnonzero(~found.used).tolist() == [3, 10]
    good = np.setdiff1d(np.arange(len(THETA)), [3, 10])
    assert max(errors(found.shift[good], MOVED[good], THETA[good])[:2]) < 0.04


def test_repeated_angles_are_measurements_of_their_own() -> None:
    theta = np.repeat(THETA[::2], 2)
    true = motion(len(theta), 3)
    found = find_jitter(noisy(balls(theta, SHAPE, true)), theta, variance=4e-4, parameters=PARAMETERS)
    assert max(errors(found.shift, true, theta)[:2]) < 0.04


@pytest.mark.parametrize("unknown", [np.nan, np.inf])
def test_a_variance_that_is_not_known_is_that_of_the_others_or_of_the_frames(unknown: float) -> None:
    stack = noisy(balls(THETA, SHAPE, MOVED))
    variance = np.full(len(THETA), 4e-4)
    known = find_jitter(stack, THETA, variance=variance, parameters=PARAMETERS)
    variance[4] = unknown
    np.testing.assert_array_equal(
        find_jitter(stack, THETA, variance=variance, parameters=PARAMETERS).sigma, known.sigma
    )
    found = find_jitter(stack, THETA, variance=unknown, parameters=PARAMETERS)
    assert np.median(found.sigma) == pytest.approx(np.median(known.sigma), rel=0.3)


def test_the_example_in_the_docstring() -> None:
    import doctest

    from napari_xanes_tomo import jitter

    found = doctest.testmod(jitter, raise_on_error=False)
    assert found.attempted >= 5
    assert not found.failed


def test_eight_angles_are_enough() -> None:
    theta = np.arange(-90.0, 90.0, 22.5)
    true = motion(8, 3, rms=1.0)
    found = find_jitter(balls(theta, SHAPE, true), theta, parameters=PARAMETERS)
    assert len(found.shift) == FEWEST_ANGLES
    assert errors(found.shift, true, theta)[0] < 0.1


def test_the_stack_is_not_changed() -> None:
    stack = balls(THETA, (40, 40), motion(len(THETA), 1, rms=0.5))
    before = stack.copy()
    find_jitter(stack, THETA, parameters=JitterParameters(iterations=1))
    np.testing.assert_array_equal(stack, before)


def test_the_same_twice() -> None:
    stack = balls(THETA, (40, 40), motion(len(THETA), 1, rms=0.5))
    one, other = (find_jitter(stack, THETA, parameters=JitterParameters(iterations=2)) for _ in range(2))
    np.testing.assert_array_equal(one.shift, other.shift)
    np.testing.assert_array_equal(one.sigma, other.sigma)
    np.testing.assert_array_equal(one.residual, other.residual)


def test_progress_and_cancel() -> None:
    stack = balls(THETA, (40, 40), motion(len(THETA), 1, rms=0.5))
    seen: list[tuple[int, int]] = []
    find_jitter(
        stack,
        THETA,
        parameters=JitterParameters(iterations=2),
        progress=lambda what, done, total: seen.append((done, total)),
    )
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1]
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)

    def stop_at(first: int):
        def stop(what: str, done: int, total: int) -> None:
            if done >= first:
                raise Cancelled

        return stop

    with pytest.raises(Cancelled):  # nothing was found yet
        find_jitter(stack, THETA, progress=stop_at(0))
    part = find_jitter(stack, THETA, progress=stop_at(2))
    assert part.partial
    assert any("partial" in note for note in part.quality.notes)
    assert max(errors(part.shift, motion(len(THETA), 1, rms=0.5), THETA)[:2]) < 0.3


# ------------------------------------------------------------------------------------- what real measurements do


def test_bad_projections_are_left_out_and_do_not_harm_the_others() -> None:
    rng = np.random.default_rng(2)
    true = motion(len(THETA), 1, rms=1.0)
    stack = balls(THETA, SHAPE, true) + 0.02 * rng.standard_normal((len(THETA), *SHAPE))
    bad = [5, 20]
    stack[5] = 0.02 * rng.standard_normal(SHAPE)  # beam lost
    stack[20] = stack[2]  # another angle
    found = find_jitter(stack, THETA, variance=4e-4)
    assert not found.used[bad].any()
    good = np.setdiff1d(np.arange(len(THETA)), bad)
    assert found.used[good].all()  # not those next to a bad one either
    assert max(errors(found.shift[good], true[good], THETA[good])[:2]) < 0.04


def test_a_slip_is_found_and_reported() -> None:
    theta = np.arange(-90.0, 90.0, 2.5)
    true = motion(len(theta), 3, rms=0.3, jump=0.0)
    true[50:] += [5.0, -4.0]
    stack = balls(theta, SHAPE, true) + 0.02 * np.random.default_rng(0).standard_normal((len(theta), *SHAPE))
    found = find_jitter(stack, theta, variance=4e-4)
    assert max(errors(found.shift, true, theta)[:2]) < 0.04
    assert [k for k, _, _ in found.slips] == [50]
    np.testing.assert_allclose(found.slips[0][1:], [5.0, -4.0], atol=1.0)


# Angular step, whether the search starts half a pixel off the truth instead of from the moments; tolerances.
@pytest.mark.parametrize(
    ("step", "given", "tolerance", "centre"),
    [(4.0, False, 0.05, 0.1), (2.0, False, 0.025, 0.02), (2.0, True, 0.025, 0.02)],
)
def test_a_wedge_of_angles(step: float, given: bool, tolerance: float, centre: float) -> None:
    theta = np.arange(-70.0, 70.1, step)
    rng = np.random.default_rng(0)
    true = rng.uniform(-6, 6, (len(theta), 2))
    stack = balls(theta, (64, 72), true) + 0.02 * rng.standard_normal((len(theta), 64, 72))
    start = true + rng.normal(0, 0.5, true.shape) if given else None
    found = find_jitter(stack, theta, variance=4e-4, initial=start)
    y, x, off = errors(found.shift, true, theta)
    assert max(y, x) < tolerance
    assert abs(off) < centre
    assert found.used.all()
    sigma = np.sqrt(np.mean(found.sigma**2, axis=0))
    assert np.all(np.array([y, x]) < 2.5 * sigma)
    assert np.all(sigma < 3 * np.array([y, x]))


# What is really left of the slowest drift, over what the coupling says: taken as they are asked the steps bring it in
# slowly, or it runs away.
@pytest.mark.parametrize("really", [0.3, -0.1])
def test_slow_drifts_come_in_where_the_coupling_is_not_what_it_was_computed_to_be(really: float) -> None:
    still = np.zeros((len(THETA), 2))
    scene = Scene(balls(THETA, SHAPE, still), THETA)
    _, model = scene.model(still)
    information = np.ones((len(THETA), 2))
    solver = Coupled(scene, model, information)
    truth = []
    for value, vector in solver.modes:
        apart = value.copy()
        apart[0] *= really  # the slowest drift
        truth.append((vector * apart) @ vector.T)
    start = np.stack([vector[:, 0] + 0.1 * vector[:, 5] for _, vector in solver.modes], axis=1)
    left = {}
    for secants in (1, 4):
        error, past = start.copy(), []
        for _ in range(6):
            past.append((error, -np.stack([a @ error[:, k] for k, a in enumerate(truth)], axis=1)))
            error = error + solver.together(past[-secants:], information, 0.02)
        left[secants] = float(np.abs(error).max() / np.abs(start).max())
    assert left[1] > 0.1
    assert left[4] < 0.01


def test_a_post_that_leaves_the_field_below() -> None:
    rng = np.random.default_rng(0)
    true = motion(len(THETA), 1, rms=1.5)
    stack = balls(THETA, (64, 64), true) + 0.02 * rng.standard_normal((len(THETA), 64, 64))
    y, x = np.mgrid[:64, :64] - 31.5
    for frame, (dy, dx), t in zip(stack, true, np.deg2rad(THETA), strict=True):
        across = (x - dx - 2 * np.cos(t)) / 4
        frame += np.where(y - dy > 15, 0.6 * np.sqrt(np.clip(1 - across**2, 0, None)), 0)
    found = find_jitter(stack, THETA, variance=4e-4)
    assert max(errors(found.shift, true, THETA)[:2]) < 0.1


def test_rows_that_the_field_cuts_at_the_sides_have_no_part() -> None:
    rng = np.random.default_rng(4)
    inner = rng.uniform(-1, 1, (24, 3)) * [28, 15, 15]
    parts = (((0.0, 0.0, 0.0), 31.0, 0.01), *(((y, z, x), 3.0, 0.04) for y, z, x in inner))
    theta, shape = np.arange(-90.0, 90.0, 4.0), (80, 56)
    true = motion(len(theta), 3, rms=1.0)
    stack = balls(theta, shape, true, fine=2, parts=parts) + 0.02 * rng.standard_normal((len(theta), *shape))
    found = find_jitter(stack, theta, variance=4e-4)
    error = errors(found.shift, true, theta)
    assert max(np.abs(error)) < 0.035
    sigma = np.sqrt(np.mean(found.sigma**2, axis=0))
    assert max(error[:2] / sigma) < 1.5
    assert any("beyond the sides" in note for note in found.quality.notes)


def test_the_answer_does_not_depend_on_the_number_of_threads(tiny_twin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the raw counts on: flats, absorbance and screening as well."""
    scan = open_series(tiny_twin).scans[0]

    def all_of_it(cores: int) -> dict[str, npt.NDArray]:
        monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)))
        flats, data = run_flats(scan, Recipe())
        found = find_jitter(data.data, scan.theta_deg[data.index], variance=data.variance)
        return flats.arrays | {"data": data.data, "shift": found.shift, "sigma": found.sigma, "left": found.residual}

    one = all_of_it(1)
    for cores in (2, 3):
        many = all_of_it(cores)
        assert many.keys() == one.keys()
        for name, values in one.items():
            np.testing.assert_array_equal(many[name], values, err_msg=f"{name}, {cores} threads")


def test_sigma_is_not_below_the_bound_and_the_search_reaches_it() -> None:
    noise = 0.05
    stack = balls(THETA, SHAPE, motion(len(THETA), 2)) + noise * np.random.default_rng(0).standard_normal(
        (len(THETA), *SHAPE)
    )
    found = find_jitter(stack, THETA, variance=noise**2)
    ratio = found.sigma / found.bound
    assert np.all(ratio > 0.6)
    assert np.median(ratio) < 3


# What is said of a result that is right, and of it with displacements that are not; whether it may be called good.
@pytest.mark.parametrize(
    ("wrong", "good"),
    [("", True), ("white", False), ("slip", False), ("drift", False)],
    ids=["right", "1 px white", "a slip of 1 px", "a drift of half a px"],
)
@pytest.mark.parametrize("glass", [False, True], ids=["free", "in a capillary"])
def test_a_good_result_is_called_good_and_a_wrong_one_is_not(wrong: str, good: bool, glass: bool) -> None:
    theta, shape = np.arange(-90.0, 90.0, 4.0), (64, 72)
    n = len(theta)
    true = motion(n, 3)
    rng = np.random.default_rng(1)
    stack = noisy(balls(theta, shape, true) + (wall(theta, shape, true) if glass else 0), 0.005)
    found = find_jitter(stack, theta, variance=0.005**2, parameters=PARAMETERS)
    assert (found.straight is not None) == glass
    assert max(errors(found.shift, true, theta)[:2]) < 0.04
    by = {
        "": np.zeros((n, 2)),
        "white": rng.normal(0, 1, (n, 2)),
        "slip": np.where(np.arange(n) >= n // 3, 1.0, 0.0)[:, None] * [1.0, 1.0],
        "drift": np.outer(np.sin(3 * np.deg2rad(theta)), [0.5, 0.5]),
    }[wrong]
    stated = replace(found.alignment, shift=found.shift + by)
    seen = stack if found.straight is None else stack - found.straight.frames(shape, theta)
    checks = check_projections(seen, theta, stated, variance=np.full(n, 0.005**2))
    scores = check_scores(checks, np.arange(n), seams=[n // 2], width=shape[1])
    failed = [s for s in scores if not s.passed]
    assert (not failed) == good, failed
    if good:
        assert found.quality.verdict == "good", found.quality.scores
    elif wrong != "white":  # what drifts with its neighbours only the moments see
        assert {s.name for s in failed} & {"moment consistency x", "moment consistency y"}


@pytest.mark.parametrize("glass", [False, True], ids=["free", "in a capillary"])
def test_rows_that_no_beam_reached_are_as_if_the_frame_ended_there(glass: bool) -> None:
    theta, shape, dark = np.arange(-90.0, 90.0, 4.0), (44, 72), 7
    n = len(theta)
    true = motion(n, 3) + np.array([3.0, 0.0])  # at some angles the object reaches into the dark
    stack = noisy(balls(theta, shape, true) + (wall(theta, shape, true) if glass else 0), 0.005).astype(np.float32)
    stack[:, -dark:] = 0
    found = find_jitter(stack, theta, variance=0.005**2, parameters=PARAMETERS)
    assert max(errors(found.shift, true, theta)[:2]) < 0.04
    cut = find_jitter(stack[:, :-dark], theta, variance=0.005**2, parameters=PARAMETERS)
    np.testing.assert_allclose(found.shift, cut.shift - [dark / 2, 0.0], atol=1e-9)
    assert (found.straight is not None) == glass
    seen, less = stack, stack[:, :-dark]
    if found.straight is not None and cut.straight is not None:
        seen = stack - found.straight.frames(shape, theta)
        less = less - cut.straight.frames((shape[0] - dark, shape[1]), theta)
        np.testing.assert_array_equal(seen[:, -dark:], 0)
        np.testing.assert_array_equal(seen[:, :-dark], less)
    checks = check_projections(seen, theta, found.alignment)
    for name, check in check_projections(less, theta, cut.alignment).items():
        np.testing.assert_allclose(checks[name].values, check.values, atol=1e-6, err_msg=name)


def test_level_air_without_noise_was_recorded() -> None:
    stack = balls(THETA, SHAPE, np.zeros((len(THETA), 2)))
    assert recorded_rows(stack) == (0, SHAPE[0])
    assert recorded_rows(noisy(stack)) == (0, SHAPE[0])
    blocked = noisy(stack)
    blocked[:, :3] = 0
    blocked[:, -5:] = 0.1
    assert recorded_rows(blocked) == (3, SHAPE[0] - 5)


def test_what_the_noise_of_a_wall_adds_to_the_variance_in_x() -> None:
    n, shape, rows = 1500, (32, 40), 12
    rng = np.random.default_rng(5)
    model = np.repeat(balls([30.0], shape, np.zeros((1, 2))), n, axis=0)
    weight = np.ones_like(model)
    pixels = 0.01 * rng.standard_normal(model.shape)
    profile = 0.01 * rng.standard_normal((n, 1, shape[1])) / np.sqrt(rows) * np.ones(model.shape)

    def variance(noise: npt.NDArray) -> npt.NDArray:
        data = (model + noise).astype(np.float32)
        return displacement_equations(data, model, weight, slopes=True).solve()[0][:, :2].var(axis=0)

    expected = profile_noise(model[:1], weight[:1], np.full((1, shape[1]), float(rows)))[0]
    added = variance(profile) / variance(pixels)
    assert added[1] == pytest.approx(expected, rel=0.15)
    assert added[0] < 0.3 * added[1]


def test_a_projection_that_is_slightly_blurred_stands_out() -> None:
    theta = np.arange(-90.0, 90.0, 3.0)
    rng = np.random.default_rng(5)
    true = motion(len(theta), 5)
    stack = balls(theta, SHAPE, true)
    soft = [17, 41]
    for i in soft:
        stack[i] = np.mean([np.roll(stack[i], s, axis=1) for s in (-2, -1, 0, 1, 2)], axis=0)
    noise = np.full(len(theta), 0.06)
    noise[30] = 0.09  # fewer counts are no fault
    stack += noise[:, None, None] * rng.standard_normal(stack.shape)
    found = find_jitter(stack, theta, variance=noise**2)
    assert np.flatnonzero(~found.used).tolist() == soft
    good = np.setdiff1d(np.arange(len(theta)), soft)
    assert max(errors(found.shift[good], true[good], theta[good])[:2]) < 0.06


# -------------------------------------------------------------------------------- the logarithm of what was blurred


def recorded_blurred(theta: npt.NDArray, shape: tuple[int, int], shift: npt.NDArray, blur_px: float) -> npt.NDArray:
    """Absorbance of `BALLS`, twice as dense, whose intensities were blurred before the logarithm."""
    from scipy.ndimage import gaussian_filter

    fine = 3
    large = (shape[0] * fine, shape[1] * fine)
    t = np.deg2rad(theta)
    y, x = (np.arange(n) / fine - (n / fine - 1 / fine) / 2 for n in large)
    out = np.zeros((len(t), *large))
    for (cy, cz, cx), radius, level in BALLS:
        u = cx * np.cos(t) + cz * np.sin(t)
        qy, qx = y[None, :] - shift[:, :1] - cy, x[None, :] - shift[:, 1:] - u[:, None]
        out += 4 * level * np.sqrt(np.maximum(radius**2 - qy[:, :, None] ** 2 - qx[:, None, :] ** 2, 0))
    seen = gaussian_filter(np.exp(-out), (0, blur_px * fine, blur_px * fine))
    return -np.log(seen.reshape(len(t), shape[0], fine, shape[1], fine).mean(axis=(2, 4))).astype(np.float32)


def test_the_logarithm_of_a_blurred_intensity_pulls_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    theta, blur_px = np.arange(-90.0, 90.0, 3.0), 0.8
    true = motion(len(theta), 5)
    stack = recorded_blurred(theta, SHAPE, true, blur_px)
    stack += 0.002 * np.random.default_rng(2).standard_normal(stack.shape).astype(np.float32)
    taken = []

    def watched(scene: Scene, placed: npt.NDArray, model: npt.NDArray, shift: npt.NDArray) -> npt.NDArray | None:
        taken.append((lost_to_blur(scene, placed, model, shift), squared_gradient(model, 1.0)))
        return taken[-1][0]

    monkeypatch.setattr("napari_xanes_tomo.jitter.lost_to_blur", watched)
    found = errors(find_jitter(stack, theta, variance=4e-6).shift, true, theta)
    lost, gradient = taken[-1]
    assert lost is not None
    half_variance = 0.5 * (blur_px**2 + 1 / 12)
    assert 0.8 < lost.sum() / gradient.sum() / half_variance < 1.1
    monkeypatch.setattr("napari_xanes_tomo.jitter.lost_to_blur", lambda *_: None)
    without = errors(find_jitter(stack, theta, variance=4e-6).shift, true, theta)
    assert np.all(np.array(found[:2]) < [0.004, 0.003])
    assert np.all(np.array(without[:2]) > 2 * np.array(found[:2]))


def test_where_intensities_add_up_nothing_is_lost_to_blur() -> None:
    theta = np.arange(-90.0, 90.0, 3.0)
    still = np.zeros((len(theta), 2))
    stack = balls(theta, SHAPE, still) + 0.02 * np.random.default_rng(3).standard_normal((len(theta), *SHAPE))
    scene = Scene(stack.astype(np.float32), theta)
    scene.look(still)
    placed, model = scene.model(still)
    assert lost_to_blur(scene, placed, model, still) is None


@pytest.mark.parametrize(("blur_px", "tolerance"), [(0.0, 0.01), (0.7, 0.05)])
def test_the_squared_gradient_of_what_was_blurred(blur_px: float, tolerance: float) -> None:
    y, x = np.mgrid[:40, :50].astype(float)
    a = 2 * np.pi / 16
    frame = smooth(np.sin(a * x + 0.5 * a * y)[None].astype(np.float32), blur_px)
    truth = smooth((1.25 * a**2 * np.cos(a * x + 0.5 * a * y) ** 2)[None].astype(np.float32), blur_px)
    inner = (slice(None), slice(8, -8), slice(8, -8))
    np.testing.assert_allclose(squared_gradient(frame, blur_px)[inner], truth[inner], atol=tolerance * 1.25 * a**2)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("..1111....", "..1111...."),
        ("..111....1", ".........."),
        ("11......11", "11......11"),  # a half turn is a circle
        ("1.11111..1", "..11111..."),
        ("1111111111", "1111111111"),
        ("..........", ".........."),
    ],
)
def test_rows_of_neighbours_in_angle(flags: str, expected: str) -> None:
    theta = np.random.default_rng(0).permutation(10) * 18.0
    order = np.argsort(theta)
    given = np.zeros(10, dtype=bool)
    given[order] = [c == "1" for c in flags]
    assert "".join("1" if v else "." for v in _in_runs(given, theta, 4)[order]) == expected


# Angular step, where the row of displaced projections begins (the second one goes on with the first projection), how
# many, by how much. Left out once and for all they stay 0.1 px (y) and 0.4 px (x) off.
@pytest.mark.parametrize(("step", "first", "many", "by"), [(3.0, 18, 12, (6.0, -4.0)), (4.0, 41, 13, (8.0, 5.0))])
def test_many_neighbours_that_begin_displaced_are_not_lost(
    step: float, first: int, many: int, by: tuple[float, float]
) -> None:
    theta = np.arange(-90.0, 90.0, step)
    true = motion(len(theta), 5)
    rng = np.random.default_rng(2)
    stack = balls(theta, SHAPE, true) + 0.02 * rng.standard_normal((len(theta), *SHAPE)).astype(np.float32)
    start = true.copy()
    start[np.arange(first, first + many) % len(theta)] += by
    found = find_jitter(stack, theta, variance=0.02**2, initial=start)
    assert found.used.all()
    assert max(errors(found.shift, true, theta)[:2]) < 0.06
