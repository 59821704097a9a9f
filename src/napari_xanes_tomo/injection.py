"""Test on my data: known displacements and bad frames put into copies of the user's own projections, and found again.

The absorbance of every projection is moved once by the package's own interpolation, laid on the unmoved beam, and the
noise that the interpolation took away is put back. The copies, in memory, go through the same steps as the recorded
frames. What is compared is the change of the displacements found: the noise of the recorded frames is in both, so the
errors show what the method adds, and are no larger than those of a new measurement.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .counts import read_absorbance
from .flats import Beam, exposures
from .model import Alignment, ArrayFrames, EnergyScan, FloatArray, FrameSource, Progress, XanesTomoError, no_progress
from .pixels import pixel_width
from .recipe import Recipe
from .registration_step import run_registration
from .resample import place
from .steps import StepResult, alignment_of, run_flats, run_jitter
from .template import make_template

__all__ = ["KINDS", "JitterTest", "RegistrationTest", "moved_copies", "recover_jitter", "recover_registration"]

KINDS = ("beam loss", "black", "saturated", "duplicate", "displaced", "motion-blurred", "flat")


@dataclass(frozen=True)
class JitterTest:
    """What was put in and what was found, raw px.

    Attributes
    ----------
    energy_ev : float
    injected, found : (n, 2) arrays
        ``[dy, dx]`` put in and found again, the undetermined shift taken out of both; NaN for bad projections.
    sigma : (n, 2) array
        Standard errors that were stated.
    bad : dict of int to str
        Bad frames put in.
    flagged : dict of int to str
        Projections excluded then that were not excluded before, with the reason.
    """

    energy_ev: float
    injected: FloatArray
    found: FloatArray
    sigma: FloatArray
    bad: dict[int, str]
    flagged: dict[int, str]

    @property
    def error_px(self) -> FloatArray:
        """(2,) rms of found minus injected, y and x."""
        return np.asarray(np.sqrt(np.nanmean((self.found - self.injected) ** 2, axis=0)))

    @property
    def sigma_px(self) -> FloatArray:
        """(2,) rms of the stated standard errors."""
        return np.asarray(np.sqrt(np.nanmean(self.sigma**2, axis=0)))

    @property
    def missed(self) -> dict[int, str]:
        """Bad frames that were put in and not found."""
        return {i: kind for i, kind in self.bad.items() if i not in self.flagged}

    @property
    def wrongly_flagged(self) -> dict[int, str]:
        """Projections called bad that were not."""
        return {i: why for i, why in self.flagged.items() if i not in self.bad}

    def text(self) -> str:
        """Return the outcome in a few lines."""
        (ey, ex), (sy, sx) = self.error_px, self.sigma_px
        put, seen = np.sqrt(np.nanmean(self.injected**2, axis=0)), len(self.bad) - len(self.missed)
        lines = [
            (
                f"{self.energy_ev:g} eV: displacements of {put[0]:.2f} / {put[1]:.2f} px (rms, y / x) put in, "
                f"found within {ey:.3f} / {ex:.3f} px; stated error {sy:.3f} / {sx:.3f} px"
            ),
            (
                f"bad frames: {seen} of {len(self.bad)} found, {len(self.wrongly_flagged)} of "
                f"{len(self.injected) - len(self.bad)} others called bad"
            ),
        ]
        lines += [f"  missed: projection {i}, {kind}" for i, kind in self.missed.items()]
        lines += [f"  called bad: projection {i}, {why}" for i, why in self.wrongly_flagged.items()]
        return "\n".join(lines)


def recover_jitter(
    scan: EnergyScan,
    recipe: Recipe | None = None,
    *,
    shift_px: float = 4.0,
    bad_frames: int = len(KINDS),
    seed: int = 0,
    progress: Progress = no_progress,
) -> JitterTest:
    """Put known displacements and bad frames into copies of the projections of one energy and find them again.

    Parameters
    ----------
    scan : EnergyScan
    recipe : Recipe, optional
        The parameters of the steps.
    shift_px : float
        Standard deviation of the displacements put in, for 1024 columns; at least half a pixel.
    bad_frames : int
        Number of bad frames put in, of every kind in turn.
    seed : int
        Other displacements and bad frames.
    progress : callable
        See `Progress`.
    """
    use = Recipe() if recipe is None else recipe
    flats, data = run_flats(scan, use)
    before = run_jitter(scan, use, flats, data)
    usable = np.flatnonzero(np.isfinite(before.arrays["shift"]).all(axis=1))
    if bad_frames > len(usable) // 4:
        raise XanesTomoError(f"bad frames: expected at most a quarter of {len(usable)} projections, got {bad_frames}")
    assert data.beam is not None
    rng = np.random.default_rng(seed)
    width = scan.frames.frame_shape[1]
    shift = np.zeros((len(scan), 2))
    shift[usable] = rng.normal(size=(len(usable), 2)) * max(0.5, shift_px * width / 1024)
    # The first is left out: a copy needs one before it.
    which = rng.permutation(usable[1:])[:bad_frames]
    bad = {int(i): KINDS[(k + seed) % len(KINDS)] for k, i in enumerate(which)}
    copies = moved_copies(scan, data.beam, shift, bad=bad, rng=rng, progress=progress)
    moved = replace(scan, frames=copies)
    flats, data = run_flats(moved, use)
    after = run_jitter(moved, use, flats, data)
    progress("test", len(scan), len(scan))

    change = after.arrays["shift"] - before.arrays["shift"]
    good = np.isfinite(change).all(axis=1)
    good[list(bad)] = False
    t = np.deg2rad(np.asarray(scan.theta_deg, dtype=float))
    free = (np.ones((len(t), 1)), np.stack([np.cos(t), np.sin(t)], axis=1))
    injected, found = np.full_like(shift, np.nan), np.full_like(shift, np.nan)
    for axis, basis in enumerate(free):
        for values, out in ((shift, injected), (change, found)):
            fit = np.linalg.lstsq(basis[good], values[good, axis], rcond=None)[0]
            out[good, axis] = values[good, axis] - basis[good] @ fit
    sigma = np.where(good[:, None], after.arrays["sigma"], np.nan)
    old = {int(i) for i, _ in before.numbers["dropped"]}
    flagged = {int(i): str(why) for i, why in after.numbers["dropped"] if int(i) not in old}
    return JitterTest(scan.energy_ev, injected, found, sigma, dict(sorted(bad.items())), flagged)


@dataclass(frozen=True)
class RegistrationTest:
    """What was put in and what was found against the reference.

    Attributes
    ----------
    energy_ev, reference_ev : float
    scale, scale_found, scale_sigma : float
        By which the copies were enlarged; by how much more the registration found them to be than the recorded frames.
    injected, found : (n, 2) arrays
        ``[dy, dx]`` put in, and the change of the registered displacements beyond that of the scale, raw px; NaN where
        there is none. Nothing is undetermined here.
    common_sigma : (2,) array
        Stated standard errors of what all projections share, y and x, raw px.
    """

    energy_ev: float
    reference_ev: float
    scale: float
    scale_found: float
    scale_sigma: float
    injected: FloatArray
    found: FloatArray
    common_sigma: FloatArray

    @property
    def error_px(self) -> FloatArray:
        """(2,) rms of found minus injected, y and x."""
        return np.asarray(np.sqrt(np.nanmean((self.found - self.injected) ** 2, axis=0)))

    @property
    def common_px(self) -> FloatArray:
        """(2,) mean of found minus injected: the error of the energy as a whole."""
        return np.asarray(np.nanmean(self.found - self.injected, axis=0))

    def text(self) -> str:
        """Return the outcome in a few lines."""
        (ey, ex), (cy, cx), (sy, sx) = self.error_px, self.common_px, self.common_sigma
        py, px = np.sqrt(np.nanmean(self.injected**2, axis=0))
        return (
            f"{self.energy_ev:g} eV against {self.reference_ev:g} eV: displacements of {py:.2f} / {px:.2f} px (rms, "
            f"y / x) put in, found within {ey:.3f} / {ex:.3f} px; the energy as a whole {cy:+.3f} / {cx:+.3f} px off, "
            f"stated error {sy:.3f} / {sx:.3f} px\n"
            f"scale: {self.scale:.5f} put in, {self.scale_found:.5f} found, stated error {self.scale_sigma:.5f}"
        )


def recover_registration(
    scan: EnergyScan,
    reference: EnergyScan,
    recipe: Recipe | None = None,
    *,
    shift_px: float = 4.0,
    scale: float = 1.003,
    seed: int = 0,
    progress: Progress = no_progress,
) -> RegistrationTest:
    """Put known displacements and a jump of the scale into copies of one energy and register both to the reference.

    What is compared is the change between the recorded frames and the copies.

    Parameters
    ----------
    scan, reference : EnergyScan
        Two energies of a measurement.
    recipe : Recipe, optional
        The parameters of the steps.
    shift_px : float
        Standard deviation of the displacements put in, for 1024 columns; at least half a pixel.
    scale : float
        By which the copies are enlarged.
    seed : int
        Other displacements.
    progress : callable
        See `Progress`.

    Raises
    ------
    XanesTomoError
        The two are one energy, or a step cannot be done.
    """
    use = Recipe() if recipe is None else recipe
    if scan.energy_ev == reference.energy_ev:
        raise XanesTomoError(
            f"test: expected an energy to register to the reference, got the reference ({scan.energy_ev:g} eV) itself; "
            "choose another energy"
        )
    if len(np.unique(np.asarray(scan.theta_deg)[scan.usable])) < 8:
        raise XanesTomoError("test: expected a tomogram, got fewer than 8 angles")
    flats, data = run_flats(reference, use)
    known = alignment_of(run_jitter(reference, use, flats, data), reference)
    good = np.isfinite(known.shift[data.index]).all(axis=1)
    index = data.index[good]
    template = make_template(
        data.data[good], np.asarray(reference.theta_deg, dtype=float)[index],
        Alignment(known.shift[index], known.sigma[index]), bin=data.bin, frame_shape=data.frame_shape,
    )  # fmt: skip
    guess = reference.pixel_size_nm / scan.pixel_size_nm if scan.pixel_size_nm > 0 else 1.0

    def registered(of: EnergyScan) -> tuple[Alignment, StepResult, Beam | None]:
        flats, data = run_flats(of, use)
        jitter = run_jitter(of, use, flats, data)
        result = run_registration(
            of, use, jitter, data, template, magnification=guess, pixel=pixel_width(of, reference), reference=False
        )  # fmt: skip
        return alignment_of(result, of), result, data.beam

    before, _, beam = registered(scan)
    assert beam is not None
    rng = np.random.default_rng(seed)
    usable = np.isfinite(before.shift).all(axis=1)
    shift = np.zeros((len(scan), 2))
    shift[usable] = rng.normal(size=(int(usable.sum()), 2)) * max(0.5, shift_px * scan.frames.frame_shape[1] / 1024)
    copies = moved_copies(scan, beam, shift, scale=scale, rng=rng, progress=progress)
    after, result, _ = registered(replace(scan, frames=copies))
    progress("test", len(scan), len(scan))
    # p' = scale * p + shift: what was found before is enlarged as well.
    change = after.shift - scale * before.shift
    m = after.magnification
    ty, a, b = (float(v) * m for v in result.numbers["translation_sigma"])
    return RegistrationTest(
        scan.energy_ev, reference.energy_ev, scale, m / before.magnification,
        float(result.numbers["magnification_sigma"]) / before.magnification,
        np.where(np.isfinite(change), shift, np.nan), change, np.array([ty, np.hypot(a, b) / np.sqrt(2)]),
    )  # fmt: skip


def moved_copies(
    scan: EnergyScan,
    beam: Beam,
    shift: FloatArray,
    *,
    scale: float = 1.0,
    bad: dict[int, str] | None = None,
    rng: np.random.Generator,
    progress: Progress = no_progress,
) -> FrameSource:
    """Return copies of the projections of one energy, in memory, with the object displaced and the beam where it was.

    Parameters
    ----------
    scan : EnergyScan
    beam : Beam
        Of this energy; see `normalise`.
    shift : (n, 2) array
        ``[dy, dx]`` by which the content of every projection is moved, down / right, raw px.
    scale : float
        By which the content is enlarged about the middle of the frame first.
    bad : dict of int to str, optional
        Projections that go wrong, and how; see `KINDS`.
    rng : Generator
        Of the noise that is put back where the interpolation took some away.
    progress : callable
        See `Progress`.
    """
    bad = {} if bad is None else bad
    height, width = scan.frames.frame_shape
    images = beam.basis((0, height))[0]
    seconds = exposures(scan.exposure_s)
    dtype = scan.frames.dtype
    out = np.zeros((len(scan), height, width), dtype=dtype)
    top = float(np.iinfo(dtype).max) if np.issubdtype(dtype, np.integer) else np.inf
    impulse = np.zeros((1, 31, 31), dtype=np.float32)
    impulse[0, 15, 15] = 1

    def noisy(counts: FloatArray, share: float | FloatArray) -> FloatArray:
        """Add `share` of the variance that these counts have."""
        spread = np.sqrt(share * np.maximum(beam.detector.variance(np.maximum(counts, 0)), 0))
        return np.asarray(counts + spread * rng.standard_normal(counts.shape))

    for i in np.flatnonzero(scan.usable).tolist():
        kind = bad.get(i, "")
        open_beam = np.tensordot(beam.weights[i], images, 1) * seconds[i]
        absorbed = read_absorbance(scan, beam, [i], (0, height), basis=images)

        def moved(dy: float, dx: float, absorbed: Any = absorbed) -> tuple[FloatArray, float]:
            by = Alignment(np.array([[-dy, -dx]]) / scale, np.zeros((1, 2)), 1 / scale)
            # The share of the variance of white noise that the interpolation leaves.
            kept = float(np.square(place(impulse, _fraction(by))).sum())
            return place(absorbed, by)[0], min(1.0, kept)

        dy, dx = (float(v) for v in shift[i])
        if kind == "displaced":
            dx += width / 2
        if kind == "motion-blurred":
            path = np.linspace(-0.5, 0.5, 9) * 10 * width / 256
            parts = [moved(dy + 0.6 * k, dx + 0.8 * k) for k in path]
            seen = -np.log(np.mean([np.exp(-a) for a, _ in parts], axis=0))
            kept = parts[0][1] / len(parts)
        else:
            seen, kept = moved(dy, dx)
        counts = open_beam * np.exp(-np.clip(seen, -5, 20))
        if kind == "flat":
            counts, kept = open_beam, 0.0
        factor = {"beam loss": 0.15, "black": 0.0, "saturated": 3.0}.get(kind, 1.0)
        if factor < 1:
            counts, kept = factor * counts, factor * kept
        counts = noisy(counts, 1 - kept)
        if factor > 1:
            counts = np.minimum(factor * counts, round(0.6 * factor * float(np.median(open_beam))))
        counts = counts + beam.stray[i]
        if np.issubdtype(dtype, np.integer):
            counts = np.rint(counts)
        out[i] = np.clip(counts, 0, top).astype(dtype)
        progress("test", i, len(scan))
    for i in sorted(i for i, kind in bad.items() if kind == "duplicate"):
        out[i] = out[i - 1]
    return ArrayFrames(out)


def _fraction(alignment: Alignment) -> Alignment:
    """Return the part of a shift below one pixel: what an interpolation does to the noise depends on no more."""
    return replace(alignment, shift=alignment.shift - np.rint(alignment.shift))
