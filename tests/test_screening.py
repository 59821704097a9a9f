from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_xanes_tomo.phantom import TwinParameters, simulate
from napari_xanes_tomo.phantom.parameters import BAD_KINDS
from napari_xanes_tomo.screening import CountsSeen, filled, screen

TWIN = TwinParameters(n=128, n_angles=70, energies_ev=(8570.0,), grains=60, flats_per_set=4, quanta=3000.0)
GONE = "the object is not in it"


def looked_at(
    frames: npt.NDArray[np.uint16], flats: npt.NDArray[np.uint16]
) -> tuple[npt.NDArray[np.float32], CountsSeen]:
    """Absorbance with the air at zero (the corners of the frame are air), and the counts."""
    seen = CountsSeen.empty(len(frames))
    for i, frame in enumerate(frames):
        seen.look(i, frame)
    seen.mean[:] = frames.mean(axis=(1, 2))
    data = -np.log(np.maximum(frames, 0.5) / flats.mean(axis=(0, 1)))
    air = np.median(data[:, :, [0, 1, 2, -3, -2, -1]], axis=(1, 2))
    return (data - air[:, None, None]).astype(np.float32), seen


@pytest.mark.parametrize("seed", [0, 1])
def test_every_bad_frame_is_found_and_no_good_one(seed: int) -> None:
    truth, measurement = simulate(replace(TWIN, seed=seed, bad_fraction=0.1, jitter_px=(6.0, 10.0)))
    for energy, frames in zip(TWIN.energies_ev, measurement, strict=True):
        data, seen = looked_at(frames.projections, frames.flats)
        found = screen(data, counts=seen)
        bad = {b.frame: b.kind for b in truth.bad if b.energy_ev == energy}
        assert set(bad.values()) == set(BAD_KINDS)
        assert set(found.reasons) == set(bad)
        for i, why in found.reasons.items():
            assert why == bad[i] or (why == GONE and bad[i] in ("flat", "displaced"))
        assert all((found.doubt[i] >= 1) == (i in bad) for i in range(len(data)))


def test_a_clean_tomogram_has_no_bad_frame_and_a_slip_is_none() -> None:
    _, measurement = simulate(replace(TWIN, slip_px=25.0, slip_from=50, seed=3))
    for frames in measurement:
        data, seen = looked_at(frames.projections, frames.flats)
        assert screen(data, counts=seen).reasons == {}
        assert screen(data).reasons == {}


def test_what_comes_and_goes_at_a_border_is_no_blur() -> None:
    _, measurement = simulate(replace(TWIN, seed=4))
    frames = next(iter(measurement))
    data, _ = looked_at(frames.projections, frames.flats)
    rng = np.random.default_rng(0)
    for axis in (1, 2):
        banded = data.copy()
        strip = banded[:, -10:] if axis == 1 else banded[:, :, :10].swapaxes(1, 2)
        # Dark rows, or the wall of a capillary: how steep their edge is differs from frame to frame.
        edge = rng.uniform(2, 9, len(data))
        depth = rng.uniform(0.5, 2.0, len(data))
        strip += (depth[:, None] * (np.arange(10) >= edge[:, None]))[:, :, None]
        found = screen(banded)
        assert found.reasons == {}
        blurred = banded.copy()
        for shift in range(1, 6):
            blurred[30] += np.roll(banded[30], shift, axis=1)
        blurred[30] /= 6
        assert screen(blurred).reasons == {30: "motion-blurred"}


def test_a_plateau_is_told_from_few_counts() -> None:
    rng = np.random.default_rng(0)
    frames = [
        (rng.poisson(800, (64, 64)), False),
        (np.minimum(rng.poisson(800, (64, 64)), 810), True),
        (rng.poisson(2, (64, 64)), False),
        (np.full((64, 64), 7), False),
    ]
    seen = CountsSeen.empty(len(frames))
    for i, (frame, _) in enumerate(frames):
        seen.look(i, frame.astype(np.uint16))
    assert [bool(p) for p in seen.plateau] == [saturated for _, saturated in frames]
    assert len(set(seen.digest.tolist())) == len(frames)


def test_frames_that_are_no_numbers_and_stacks_too_short() -> None:
    y, x = np.mgrid[-16:16, -16:16]
    stack = np.broadcast_to(np.exp(-(y**2 + x**2) / 60.0), (12, 32, 32)).copy()
    stack[4, 3, 3] = np.nan
    assert screen(stack).reasons == {4: "values that are no numbers"}
    assert screen(stack[:3]).reasons == {}
    assert screen(np.zeros((12, 32, 32))).doubt.shape == (12,)
    with pytest.raises(ValueError, match=r"\(n, y, x\)"):
        screen(stack[0])


@given(lost=st.sets(st.integers(1, 18), max_size=2), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_what_is_linear_in_the_angle_is_filled_exactly(lost: set[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    theta = np.arange(20) * 2.0 - 20
    slope, level = rng.normal(size=(2, 4, 5))
    stack = (level + theta[:, None, None] * slope).astype(np.float32)
    gone = np.isin(np.arange(20), list(lost))
    order = rng.permutation(20)
    out, done = filled(np.where(gone[:, None, None], np.nan, stack)[order], theta[order], gone[order])
    assert (done == gone[order]).all()
    np.testing.assert_allclose(out, stack[order], atol=1e-4)


def test_the_ends_are_not_filled() -> None:
    stack = np.ones((6, 2, 2))
    lost = np.array([True, False, False, False, False, True])
    out, done = filled(np.where(lost[:, None, None], 7, stack), np.arange(6.0), lost)
    assert not done.any()
    assert (out[lost] == 7).all()
