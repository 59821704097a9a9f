"""The data model: where a pixel belongs, and what a wrong shape is told."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from napari_xanes_tomo.model import (
    Alignment,
    ArrayFrames,
    EnergyScan,
    FlatSet,
    FrameSource,
    Quality,
    Score,
    Series,
    XanesTomoError,
    no_progress,
)

N = 5
ABS_TOL_PX = 1e-8  # points within 1000 px, so 1e-11 of the range: rounding only

px = st.floats(-1000, 1000, allow_nan=False)
sizes = st.floats(0.25, 4, allow_nan=False)
degrees = st.floats(-180, 180, allow_nan=False)
points = npst.arrays(float, (7, 2), elements=px)


@st.composite
def alignments(draw: st.DrawFn) -> Alignment:
    return Alignment(
        draw(npst.arrays(float, (N, 2), elements=px)),
        draw(npst.arrays(float, (N, 2), elements=st.floats(0, 10))),
        draw(sizes),
        draw(degrees),
        tuple(draw(st.lists(st.sampled_from(["ok", "excluded:user", "unreadable:missing"]), min_size=N, max_size=N))),
    )


def assert_same(a: Alignment, b: Alignment) -> None:
    np.testing.assert_allclose(a.shift, b.shift, rtol=1e-9, atol=ABS_TOL_PX)
    np.testing.assert_allclose(a.sigma, b.sigma, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(a.matrix, b.matrix, rtol=1e-9, atol=1e-9)
    assert a.status == b.status


# --- laws ---------------------------------------------------------------------------------------------------


@given(alignments(), alignments(), points, st.integers(0, N - 1))
def test_then_applies_the_first_one_first(a: Alignment, b: Alignment, q: np.ndarray, index: int) -> None:
    np.testing.assert_allclose(a.then(b)(q, index), b(a(q, index), index), rtol=1e-9, atol=1e-7)


@given(alignments(), alignments(), alignments())
def test_then_is_associative_in_place(a: Alignment, b: Alignment, c: Alignment) -> None:
    left, right = a.then(b).then(c), a.then(b.then(c))
    np.testing.assert_allclose(left.shift, right.shift, rtol=1e-9, atol=1e-7)
    np.testing.assert_allclose(left.matrix, right.matrix, rtol=1e-9, atol=1e-9)
    assert left.status == right.status


@given(alignments())
def test_identity_changes_nothing(a: Alignment) -> None:
    one = Alignment.identity(N)
    assert_same(one.then(a), a)
    assert_same(a.then(one), a)


@given(alignments(), points, st.integers(0, N - 1), degrees, px, px, px)
def test_gauge_is_a_move_of_the_object(
    a: Alignment, q: np.ndarray, index: int, first: float, ty: float, x: float, z: float
) -> None:
    theta = first + np.linspace(0, 175, N)
    t = np.deg2rad(theta[index])
    moved = q + np.array([ty, x * np.cos(t) + z * np.sin(t)])
    np.testing.assert_allclose(a.gauge(theta, ty, x, z)(q, index), a(moved, index), rtol=1e-9, atol=1e-7)


@given(alignments(), px, px, px)
def test_gauge_can_be_undone(a: Alignment, ty: float, x: float, z: float) -> None:
    theta = np.linspace(-90, 89, N)
    np.testing.assert_allclose(a.gauge(theta, ty, x, z).gauge(theta, -ty, -x, -z).shift, a.shift, atol=1e-7)


@given(alignments())
def test_alignment_survives_pickling(a: Alignment) -> None:
    assert_same(pickle.loads(pickle.dumps(a)), a)


# --- known truth --------------------------------------------------------------------------------------------


def test_positive_roll_turns_x_towards_y() -> None:
    quarter = Alignment(np.zeros((1, 2)), np.zeros((1, 2)), roll_deg=90.0)
    np.testing.assert_allclose(quarter(np.array([0.0, 1.0]), 0), [1.0, 0.0], atol=1e-12)  # +x -> +y
    np.testing.assert_allclose(quarter(np.array([1.0, 0.0]), 0), [0.0, -1.0], atol=1e-12)  # +y -> -x


def test_positive_shift_moves_down_and_right_after_magnification() -> None:
    a = Alignment(np.array([[3.0, 5.0]]), np.zeros((1, 2)), magnification=2.0)
    np.testing.assert_allclose(a(np.array([10.0, 20.0]), 0), [23.0, 45.0])


def test_gauge_at_0_and_90_degrees() -> None:
    moved = Alignment.identity(2).gauge(np.array([0.0, 90.0]), ty=1.0, a=2.0, b=3.0)
    np.testing.assert_allclose(moved.shift, [[1.0, 2.0], [1.0, 3.0]], atol=1e-12)


def test_then_adds_independent_errors_in_quadrature() -> None:
    a = Alignment(np.zeros((1, 2)), np.array([[0.3, 0.0]]))
    b = Alignment(np.zeros((1, 2)), np.array([[0.4, 0.0]]), magnification=1.0)
    np.testing.assert_allclose(a.then(b).sigma, [[0.5, 0.0]])
    doubled = Alignment(np.zeros((1, 2)), np.zeros((1, 2)), magnification=2.0)
    np.testing.assert_allclose(a.then(doubled).sigma, [[0.6, 0.0]])


def test_then_keeps_the_first_reason() -> None:
    zero = np.zeros((3, 2))
    a = Alignment(zero, zero, status=("ok", "excluded:user", "ok"))
    b = Alignment(zero, zero, status=("ok", "unreadable:missing", "excluded:blank"))
    assert a.then(b).status == ("ok", "excluded:user", "excluded:blank")


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shift", "sigma", "status", "says"),
    [
        (np.zeros(3), np.zeros(3), (), r"shift: expected \(n, 2\)"),
        (np.zeros((3, 3)), np.zeros((3, 3)), (), r"shift: expected \(n, 2\)"),
        (np.zeros((3, 2)), np.zeros((2, 2)), (), r"sigma: expected \(3, 2\), got \(2, 2\)"),
        (np.zeros((3, 2)), np.zeros((3, 2)), ("ok",), "status: expected 3 entries, got 1"),
    ],
)
def test_wrong_shapes_are_named(shift: np.ndarray, sigma: np.ndarray, status: tuple[str, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Alignment(shift, sigma, status=status)


def test_alignments_of_different_length_do_not_compose() -> None:
    with pytest.raises(ValueError, match=r"argument|broadcast"):
        Alignment.identity(3).then(Alignment.identity(4))


# --- scans, scores ------------------------------------------------------------------------------------------


class Frames:
    """Two-row frames that hold their own number."""

    frame_shape = (2, 3)
    dtype = np.dtype("uint16")

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def read(self, index: int) -> np.ndarray:
        return np.full(self.frame_shape, index, self.dtype)

    def read_rows(self, indices: list[int], y0: int, y1: int) -> np.ndarray:
        return np.stack([self.read(i)[y0:y1] for i in indices])

    def fingerprint(self) -> str:
        return str(self.n)


def test_an_array_is_a_source_of_frames() -> None:
    counts = np.arange(24, dtype=np.uint16).reshape(4, 2, 3)
    frames = ArrayFrames(counts)
    assert isinstance(frames, FrameSource)
    assert (len(frames), frames.frame_shape, frames.dtype) == (4, (2, 3), np.dtype("u2"))
    assert np.array_equal(frames.read(2), counts[2])
    assert np.array_equal(frames.read_rows((3, 0), 1, 2), counts[[3, 0], 1:2])
    assert frames.fingerprint() == ArrayFrames(counts.copy()).fingerprint()
    assert frames.fingerprint() != ArrayFrames(counts + 1).fingerprint()
    with pytest.raises(XanesTomoError, match=r"\(frame, y, x\), got 2 axes"):
        ArrayFrames(counts[0])


def scan(*status: str, energy_ev: float = 8570.0) -> EnergyScan:
    n = len(status)
    return EnergyScan(
        energy_ev=energy_ev,
        theta_deg=np.arange(n, dtype=float),
        frames=Frames(n),
        exposure_s=np.full(n, 0.5),
        status=status,
        flats=(FlatSet(Frames(1), np.array([0.5]), ("ok",)),),
        half=np.zeros(n, dtype=int),
        binning=2,
        pixel_size_nm=33.37,
        time_s=np.full(n, np.nan),
    )


def test_excluding_leaves_the_original_and_what_is_already_out() -> None:
    before = scan("ok", "unreadable:missing", "ok")
    after = before.excluded({0: "user", 1: "user"})
    assert after.status == ("excluded:user", "unreadable:missing", "ok")
    assert before.status == ("ok", "unreadable:missing", "ok")
    np.testing.assert_array_equal(after.usable, [False, False, True])
    assert len(after) == 3


def test_series_speaks_for_its_scans() -> None:
    series = Series("s", (scan("ok"), scan("ok", energy_ev=6534.0)))
    np.testing.assert_array_equal(series.energies_ev, [8570.0, 6534.0])
    assert series.frame_shape == (2, 3)


@pytest.mark.parametrize(
    ("value", "threshold", "better", "passed"),
    [
        (0.1, 0.1, "lower", True),
        (0.2, 0.1, "lower", False),
        (0.9, 0.9, "higher", True),
        (0.8, 0.9, "higher", False),
        (float("nan"), 0.1, "lower", False),
        (float("nan"), 0.1, "higher", False),
        (1e9, None, "lower", True),
    ],
)
def test_score_and_verdict(value: float, threshold: float | None, better: str, passed: bool) -> None:
    score = Score("s", value, "px", threshold, better)
    assert score.passed is passed
    assert Quality((Score("fine", 0.0), score)).verdict == ("good" if passed else "check")


# Amber beyond the threshold, red beyond its own limit; what is no number is never green.
@pytest.mark.parametrize(
    ("value", "better", "threshold", "red", "colour"),
    [
        (0.05, "lower", 0.1, 0.3, "green"),
        (0.2, "lower", 0.1, 0.3, "amber"),
        (0.4, "lower", 0.1, 0.3, "red"),
        (0.4, "lower", 0.1, None, "amber"),
        (0.6, "higher", 0.8, 0.5, "amber"),
        (0.4, "higher", 0.8, 0.5, "red"),
        (float("nan"), "lower", 0.1, 0.3, "amber"),
    ],
)
def test_colours(value: float, better: str, threshold: float, red: float | None, colour: str) -> None:
    score = Score("s", value, "px", threshold, better, red)
    assert score.colour == colour
    assert Quality((Score("fine", 0.0), score)).colour == colour


def test_no_progress_is_silent() -> None:
    assert no_progress("reading", 1, 2) is None
