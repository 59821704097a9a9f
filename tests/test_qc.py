"""What is looked at: the suggested box, the residual and the sinogram's traces, on objects whose truth is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from napari_xanes_tomo.fsc import half_bit
from napari_xanes_tomo.io.scan import open_series
from napari_xanes_tomo.model import Alignment, XanesTomoError
from napari_xanes_tomo.projector import Projector
from napari_xanes_tomo.qc import Check, check_projections, check_scores
from napari_xanes_tomo.resample import place
from napari_xanes_tomo.views import edge_traces, residual_stack, ring_correlation, sinogram, suggest_box

THETA = np.arange(-90, 90, 4.0)


def ball(n: int = 48, rows: int = 12) -> np.ndarray:
    """An ellipse beside the axis with a hole, the same in every row but the outer ones."""
    z, x = np.mgrid[:n, :n] - (n - 1) / 2
    slice_ = ((x - 3) ** 2 / 12**2 + (z + 2) ** 2 / 9**2 < 1).astype(np.float32)
    slice_[(x - 6) ** 2 + z**2 < 4] = 0
    volume = np.zeros((rows + 8, n, n), np.float32)
    volume[4:-4] = 0.02 * slice_
    return volume


@pytest.mark.parametrize(("noise", "reach"), [(0.0, 1), (0.05, 3)])
def test_the_box_holds_the_object(noise: float, reach: int) -> None:
    frames = np.zeros((5, 60, 80), np.float32)
    for k in range(5):
        frames[k, 20:41, 30 + k : 50 + k] = 1.0
    frames[:, 3, 3] = 5.0  # a hot pixel
    frames += np.random.default_rng(0).normal(0, noise, frames.shape)
    box = suggest_box(frames, margin=0.0)
    assert box is not None
    np.testing.assert_allclose(box, (20, 41, 30, 54), atol=reach)
    wide = suggest_box(frames, margin=0.05)
    assert wide is not None
    np.testing.assert_array_equal(np.array(wide) - box, (-4, 4, -4, 4))


def test_no_box_where_there_is_nothing_or_no_air() -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, (3, 40, 40))
    assert suggest_box(noise) is None
    assert suggest_box(np.ones((3, 40, 40))) is None
    with pytest.raises(ValueError, match=r"expected \(n, y, x\)"):
        suggest_box(np.ones((4, 4)))


def test_the_residual_shows_the_projection_that_is_misplaced() -> None:
    volume = ball()
    clean = Projector(48, THETA).forward(volume)
    shift = np.random.default_rng(1).uniform(-1.5, 1.5, (len(THETA), 2))
    still = Alignment(-shift, np.zeros_like(shift))
    data = place(clean, still)  # the content moved by `shift`
    seen: list[int] = []
    good = residual_stack(data, THETA, Alignment(shift, np.zeros_like(shift)), progress=lambda w, d, t: seen.append(d))
    assert seen == [0, 1, 2, 3, 4, 5]
    assert good.shape == data.shape
    wrong = shift.copy()
    wrong[20] += (0.0, 2.0)
    bad = residual_stack(data, THETA, Alignment(wrong, np.zeros_like(shift)))
    size = np.sqrt(np.mean(bad**2, axis=(1, 2)))
    assert size.argmax() == 20
    assert size[20] > 3 * np.sqrt(np.mean(good[20] ** 2))
    with pytest.raises(XanesTomoError, match="at least 8"):
        residual_stack(data[:5], THETA[:5], Alignment.identity(5))
    with pytest.raises(ValueError, match="one angle each"):
        residual_stack(data, THETA[:5], Alignment.identity(5))


def test_the_traces_follow_the_edges_and_show_a_wrong_shift() -> None:
    rng = np.random.default_rng(2)
    theta = np.arange(-90, 90, 2.0)
    t = np.deg2rad(theta)
    jitter = rng.uniform(-3, 3, len(theta))
    # An ellipse at (x, z) = (3, -2): its support function is known.
    center = 3 * np.cos(t) - 2 * np.sin(t)
    half = np.hypot(12 * np.cos(t), 9 * np.sin(t))
    columns = np.arange(64) - 31.5
    edge = np.clip((half[:, None] - np.abs(columns[None] - (center + jitter)[:, None])) + 0.5, 0, 1)
    traces = edge_traces(edge, theta, jitter)
    np.testing.assert_allclose(traces[:, 1], 31.5 + jitter)
    np.testing.assert_allclose(traces[:, 2], 31.5 + center + half + jitter, atol=0.6)
    np.testing.assert_allclose(traces[:, 0], 31.5 + center - half + jitter, atol=0.6)
    wrong = jitter.copy()
    wrong[40] += 6
    moved = edge_traces(edge, theta, wrong)
    assert abs(moved[40, 2] - traces[40, 2]) > 5
    assert np.abs(np.delete(moved - traces, 40, axis=0)).max() < 0.3
    empty = edge_traces(np.zeros((90, 64)), theta, jitter)
    assert np.isnan(empty[:, [0, 2]]).all()


def test_a_sinogram_is_one_row_of_the_object(tiny_twin: Path) -> None:
    scan = open_series(tiny_twin).scans[-1]
    n = len(scan)
    shift = np.zeros((n, 2))
    shift[3] = np.nan
    rows, use = sinogram(scan, np.zeros((n, 3)), shift, 32)
    assert rows.shape == (n - 1, 64)
    assert 3 not in use
    flat = scan.flats[0].frames.read_rows(range(len(scan.flats[0].status)), 32, 33).mean(axis=0)[0]
    expected = -np.log(scan.frames.read(0)[32] / flat)
    np.testing.assert_allclose(rows[0], expected, atol=0.02)
    shift[0, 0] = 2.0  # the content lies two rows further down
    moved, _ = sinogram(scan, np.zeros((n, 3)), shift, 30)
    np.testing.assert_allclose(moved[0], rows[0], atol=1e-5)
    with pytest.raises(XanesTomoError, match="from 0 to 63"):
        sinogram(scan, np.zeros((n, 3)), shift, 64)


def test_the_checks_name_the_projection_that_is_not_like_the_others() -> None:
    rng = np.random.default_rng(4)
    clean = Projector(48, THETA).forward(ball(rows=24))
    data = clean + rng.normal(0, 0.004, clean.shape)
    shift = np.zeros((len(THETA), 2))
    variance = np.full(len(THETA), 0.004**2)
    for name, check in check_projections(data, THETA, Alignment(shift, shift), variance=variance).items():
        assert not len(check.beyond), name
    data[7] *= 1.1
    shift[20, 1] = 1.0  # stated, not so
    found = check_projections(data, THETA, Alignment(shift, np.zeros_like(shift)), variance=variance)
    stands_out = {name: set(c.beyond.tolist()) for name, c in found.items() if name != "frc_px"}
    for name, truth, neighbours in (
        ("mass_deviation", {7}, set()),
        ("profile_shift_px", set(), set()),
        ("moment_deviation_px", {20}, set()),
        ("residual_shift_y_px", set(), set()),
        ("residual_shift_x_px", {20}, {19, 21}),  # they were predicted with it
        ("gain_deviation", {7}, {6, 8, 20}),
        ("background_od", set(), set()),
    ):
        assert truth <= stands_out[name] <= truth | neighbours, name
        if truth:
            assert np.abs(found[name].values).argmax() in truth
    assert found["residual_shift_x_px"].values[20] == pytest.approx(-1.0, abs=0.3)
    assert found["gain_deviation"].values[7] == pytest.approx(0.1, abs=0.03)
    assert found["moment_deviation_px"].values[20] == pytest.approx(-1.0, abs=0.1)
    assert found["mass_deviation"].values[7] == pytest.approx(0.1, abs=0.02)


def test_the_ring_correlation_is_one_for_equal_frames_and_chance_for_noise() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 20, 64, 64))
    frequency, same, count = ring_correlation(a, a)
    np.testing.assert_allclose(same, 1, atol=1e-5)
    assert frequency[-1] == 0.5
    _, chance, _ = ring_correlation(a, b)
    assert np.abs(chance.mean(axis=0)[4:]).max() < 0.2
    assert (chance[:, 4:] < half_bit(count)[None, 4:]).mean() > 0.97
    assert np.all(np.diff(half_bit([1, 10, 100, 1000])) < 0)
    assert half_bit(1e12) == pytest.approx(0.2071 / 1.2071, abs=1e-4)


def quiet_checks(n: int = 120, seed: int = 0) -> dict[str, Check]:
    """Checks of a scan in which nothing happened: white noise of a known size."""
    rng = np.random.default_rng(seed)

    def check(size: float, unit: str) -> Check:
        return Check(size * rng.standard_normal(n), 5 * size, unit, size)

    return {
        "mass_deviation": check(1e-3, ""),
        "profile_shift_px": check(0.02, "px"),
        "moment_deviation_px": check(0.02, "px"),
        "residual_shift_y_px": check(0.01, "px"),
        "residual_shift_x_px": check(0.01, "px"),
        "gain_deviation": check(1e-3, ""),
        "background_od": check(1e-4, "OD"),
        "frc_px": Check(2.0 + 0.05 * rng.standard_normal(n), 2.5, "px", one_sided=True),
    }


def changed(checks: dict[str, Check], name: str, by: np.ndarray) -> dict[str, Check]:
    return {**checks, name: replace(checks[name], values=checks[name].values + by)}


def test_scores_pass_where_nothing_happened_and_name_what_did() -> None:
    n, seam = 120, 60
    number = np.arange(n)
    for seed in range(5):
        scores = check_scores(quiet_checks(n, seed), number, seams=[seam])
        assert all(s.passed for s in scores), [s for s in scores if not s.passed]
    calm = quiet_checks(n)
    late = (number >= seam).astype(float)
    for name, by, caught in (
        ("profile_shift_px", 0.2 * late, {"seam step y"}),
        ("moment_deviation_px", 0.2 * late, {"seam step x"}),
        ("mass_deviation", 0.05 * number / n, {"gain trend", "mass consistency"}),
        ("background_od", 0.02 * number / n, {"background trend"}),
        ("residual_shift_x_px", 0.2 * np.random.default_rng(1).standard_normal(n), {"residual shift x"}),
        ("gain_deviation", 0.1 * (number % 10 == 0), {"projections beyond a limit"}),
    ):
        failed = {s.name for s in check_scores(changed(calm, name, by), number, seams=[seam]) if not s.passed}
        assert caught <= failed | {"mass consistency"}, (name, failed)
        assert failed <= caught | {"projections beyond a limit", "moment consistency x", "moment consistency y"}, name


def test_the_thresholds_follow_the_noise_of_the_scan() -> None:
    number = np.arange(120)
    by_name = [
        {s.name: s for s in check_scores({k: replace(c, values=f * c.values, noise=f * c.noise)
                                          for k, c in quiet_checks().items()}, number, seams=[60])}
        for f in (1.0, 20.0)
    ]  # fmt: skip
    for name in ("residual shift x", "moment consistency y", "seam step x"):
        calm, noisy = (scores[name] for scores in by_name)
        assert noisy.value == pytest.approx(20 * calm.value)
        assert noisy.threshold > 5 * calm.threshold
        assert noisy.passed
    # Frames four times as wide are judged in their own pixels.
    wide = {s.name: s for s in check_scores(quiet_checks(), number, seams=[60], width=1024)}
    assert wide["residual shift x"].threshold > 3 * by_name[0]["residual shift x"].threshold


def test_the_ends_of_a_wedge_are_not_held_against_the_displacements() -> None:
    theta, rng = np.arange(-70.0, 71.0, 2.0), np.random.default_rng(5)
    y, z, x = np.ogrid[-9:9, -24:24, -24:24]
    parts = ((0, 5, -9, 9, 0.05), (3, -8, 6, 7, 0.07), (-3, 3, 9, 6, -0.03), (2, -3, -6, 4, 0.06))
    volume = sum(v * (((y - a) ** 2 + (z - b) ** 2 + (x - c) ** 2) < r**2) for a, b, c, r, v in parts)
    clean = Projector(48, theta).forward(np.asarray(volume, dtype=np.float32))
    data = clean + rng.normal(0, 0.004, clean.shape)
    shift = np.zeros((len(theta), 2))
    shift[3, 1] = 1.0  # stated, not so
    found = check_projections(data, theta, Alignment(shift, shift), variance=np.full(len(theta), 0.004**2))
    assert found["residual_shift_x_px"].beyond.tolist() == [3]
    assert not len(found["gain_deviation"].beyond)
    assert not len(found["residual_shift_y_px"].beyond)
