"""Jitter: where every projection of one tomogram lies, found from the projections alone.

Vertically the mass in every row must not depend on the angle, horizontally the centre of mass must move on a
sinusoid (Helgason-Ludwig conditions, doi 10.1002/cpa.3160190207). These moments, or where they mislead a search by
correlation with reprojections, are refined by reprojection (Dengler 1989, doi 10.1016/0304-3991(89)90065-9; Yu et al.
2018, doi 10.1107/S1600577518013929): the volume is reconstructed from the projections as placed so far, projected
again, and each projection is fitted to its own reprojection, with its gain and background as nuisances, always
resampled from the recorded frame. All projections move together, by a Newton step with the matrix that couples them
(`reprojection.Scene.coupling`); its inverse is the covariance. Which estimate is kept is decided by projections held
out of the reconstruction. See ``docs/jitter.md``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .agreement import center_of_rotation, halve, recorded_rows
from .air import fit_air, plane
from .blurred import lost_to_blur
from .coupled import Coupled, noise_left
from .first_guess import FEWEST_ANGLES, centred, chain, correlated, horizontal, slips, vertical
from .model import Alignment, Cancelled, FloatArray, Progress, Quality, Score, XanesTomoError, no_progress
from .parallel import one_blas_thread
from .recipe import JitterParameters
from .reprojection import Fit, Scene, gauge_free
from .straight import Straight, fit_straight, outer_rows, profile_noise

__all__ = ["FEWEST_ANGLES", "JitterResult", "find_jitter"]

F32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]
FEWEST_PIXELS = 8  # rows and columns of a frame
_COLUMNS = 128  # at most, of the frames the fit works on
_STRAIGHT = 0.4  # correlation of both halves of the frames at the sides from which on something runs straight through
_FEWEST_ROWS = 32  # and columns, for that to be asked
_NEAR = 0.3  # pixels of those frames: after a first step below this the coupling is what it was
_SHARP = 0.1  # pixels of those frames: displaced by less, the volume shows the gradients of the object
_FILLS = 3  # reprojections that fill what frames did not record, before the first step
_ODD = 4.5  # robust standard deviations from which on more is left of a projection than of those around it
_FEWEST_TO_STAND_OUT = 40  # projections, for that to be asked
_MOSTLY_NOISE = 2.5  # times its variance, at most, of a projection and what predicts it: 1.7 of it is theirs
_RUN = 4  # neighbours that were left out: what they show cannot be told from the others
_MORE, _AFTER = 12, 8  # further steps in all, and after the last change of what is used
_FAR_WORSE = 0.1  # of what is left of a projection: less may come from that one being in the volume
_CLOSE = 0.25  # of the formal error: after a step below this that the last ones told about, less is left
_SECANTS = 4  # steps that tell about the next one
_BAND_PX = 8.0  # outer width of the band-pass where the background asks for one, of those


@dataclass(frozen=True, kw_only=True)
class JitterResult(Alignment):
    """What `find_jitter` found: an `Alignment` in pixels of the stack given, with what is known about it.

    ``shift`` is the displacement of the content of every projection, ``[dy, dx]``, positive down / right; x contains
    the centre of rotation; the centre of mass of the object lies on the axis, at the middle row. ``sigma`` is the
    random part of each projection: the larger of what the noise allows and what independent parts of the data differ
    by.

    Attributes
    ----------
    center, center_sigma : float
        Rotation axis relative to the middle column, pixels, and its standard error.
    moments : (n, 2) array
        ``[dy, dx]`` as the moments alone give them (NaN where they give none).
    method : {"moments", "reprojection", "reprojection, band-passed"}
        Which estimate was kept.
    residual : (n,) array
        Rms difference between each projection and the reprojection of the others.
    quality : Quality
    bound : (n, 2) array
        Cramer-Rao bound of a projection's displacement, were the object known: what the noise allows at best, pixels.
    used : (n,) bool array
        False where a projection did not fit the others and was left out of the volume.
    slips : tuple of (int, float, float)
        Number of the projection a new segment begins with, and the jump ``dy, dx`` there, pixels.
    partial : bool
        Whether the search was cancelled: the best estimate until then.
    straight : Straight or None
        What runs straight through the field, as the wall of a capillary, in the stack as it was given: it had no part
        in the search. None where there is no such thing.
    """

    center: float
    center_sigma: float
    moments: FloatArray
    method: str
    residual: FloatArray
    quality: Quality
    bound: FloatArray
    used: Bool
    slips: tuple[tuple[int, float, float], ...] = ()
    partial: bool = False
    straight: Straight | None = None

    @property
    def alignment(self) -> Alignment:
        """The same as a plain `Alignment`, for what goes on to other pixels."""
        return Alignment(self.shift, self.sigma, self.magnification, self.roll_deg, self.status)


def find_jitter(
    stack: npt.ArrayLike,
    theta_deg: npt.ArrayLike,
    *,
    variance: npt.ArrayLike | float | None = None,
    initial: npt.ArrayLike | None = None,
    parameters: JitterParameters | None = None,
    progress: Progress = no_progress,
) -> JitterResult:
    """Find the displacement of every projection of a tomogram.

    Parameters
    ----------
    stack : (n, y, x) array
        Absorbance, or any other intensity that adds up along the ray. A background that is level or slopes, and its
        sign, do not matter.
    theta_deg : (n,) array
        Angle of every projection, degrees; any angles in any order.
    variance : (n,) array or float, optional
        Noise variance of a pixel; estimated from the frames unless given.
    initial : (n, 2) array, optional
        Where to begin, ``[dy, dx]`` in pixels of the stack; the moments unless given.
    parameters : JitterParameters, optional
    progress : callable
        See `Progress`. When it raises `Cancelled` the best estimate so far comes back, marked `partial`; `Cancelled`
        is passed on when there is none yet.

    Raises
    ------
    XanesTomoError
        Fewer than 8 projections, another number of angles, or nothing to be seen.

    Examples
    --------
    >>> import numpy as np
    >>> theta = np.arange(-90, 90, 6.0)
    >>> y, x = np.mgrid[-16:16, -16:16]
    >>> dx = np.where(theta < 0, 1.5, -1.0)
    >>> stack = np.stack([np.exp(-(y**2 + (x - d) ** 2) / 20) for d in dx])
    >>> found = find_jitter(stack, theta)
    >>> bool(abs(np.diff(found.shift[[0, -1], 1])[0] + 2.5) < 0.1)
    True
    """
    p = JitterParameters() if parameters is None else parameters
    data = np.ascontiguousarray(stack, dtype=np.float32)
    theta = np.asarray(theta_deg, dtype=float)
    _check(data, theta)
    noise = _variance(variance, len(data), data)
    start = None if initial is None else np.asarray(initial, dtype=float)
    if start is not None and (start.shape != (len(data), 2) or not np.isfinite(start).all()):
        raise XanesTomoError(f"initial: expected ({len(data)}, 2) finite [dy, dx], got {start.shape}")
    # Rows that no beam reached say nothing: they are as if the frame ended there.
    top, bottom = recorded_rows(data)
    middle = np.array([(top + bottom - len(data[0])) / 2, 0.0])
    with one_blas_thread():
        search = _Search(np.ascontiguousarray(data[:, top:bottom]), theta, noise, p, progress)
        try:
            search.begin(None if start is None else start - middle)
            search.refine()
        except Cancelled:
            if search.best is None:
                raise
            search.partial = True
        found = search.result()
    if (top, bottom) == (0, len(data[0])):
        return found
    straight = None if found.straight is None else replace(found.straight, rows=(top, bottom))
    return replace(found, shift=found.shift + middle, moments=found.moments + middle, straight=straight)


class _Search:
    """The stages of one search, from coarse to fine. `best` always holds the best displacements so far."""

    def __init__(
        self, data: F32, theta: FloatArray, noise: FloatArray, parameters: JitterParameters, progress: Progress
    ) -> None:
        self.frame = data.shape[1:]
        self.theta, self.p = theta, parameters
        self.total = parameters.iterations + 4
        self.progress = progress
        self.done = 0
        self.limit = parameters.max_shift_px * data.shape[2] / 1024
        self.bin = 1
        work = data
        while work.shape[2] > _COLUMNS and min(work.shape[1:]) >= 32:
            work = halve(work)
            self.bin *= 2
        self.noise = noise / self.bin**2  # of a pixel of `work`, for what is smooth
        level = _border_plane(work)
        work = work - level
        # Signal may be dark on bright (transmission) or bright on dark (fluorescence): the object is what sticks out.
        self.sign = 1.0 if float(np.median(work.sum(axis=(1, 2), dtype=np.float64))) >= 0 else -1.0
        self.recorded = np.ascontiguousarray(self.sign * work)
        # A wall that runs straight through the field is taken out before anything else is asked.
        self.straight: Straight | None = None
        self.work = self.recorded
        if min(work.shape[1:]) >= _FEWEST_ROWS:
            self._straighten(outer_rows(self.recorded))
        self.partial = False
        self.best: FloatArray | None = None  # in pixels of `work`
        self.moments = np.full((len(theta), 2), np.nan)
        self.moment_spread = float("nan")
        self.good: Bool = np.ones(len(theta), dtype=bool)
        self.odd: Bool = np.zeros(len(theta), dtype=bool)
        self.asked_again: Bool = np.zeros(len(theta), dtype=bool)
        self.method = "moments"
        self.sigma: FloatArray | None = None
        self.fit: Fit | None = None
        self.notes: list[str] = []

    def _report(self, done: int) -> None:
        self.done = max(self.done, min(done, self.total))
        self.progress("jitter", self.done, self.total)

    # ------------------------------------------------------------------------------------------- beginning

    def begin(self, initial: FloatArray | None) -> None:
        """Find displacements that are right within a pixel or two."""
        self._report(0)
        self.scene = Scene(self.work, self.theta)
        with np.errstate(invalid="ignore", divide="ignore"):
            moments = self._moments(self.work)
        if initial is not None:
            known = Alignment(initial, np.zeros_like(initial)).binned(self.bin, self.frame).shift
            self.moments = moments
            start = known
        else:
            start = moments
        if self.p.refine and self.p.iterations:
            start = self._search(start, moments)
        elif not np.isfinite(start).all():
            raise XanesTomoError(
                "jitter: expected an absorbing object in the field, found none; check flats and the box"
            )
        self.best = start
        self._report(1)
        self.scene.usable = self.good.copy()
        # The air next to the object, now that it is known where the object is.
        self._look(self.scene, start)
        if not self.scene.whole.all() and self.straight is None:
            # The border of the frames is no air where the object reaches it.
            self.work = self.work - plane(fit_air(self.work, 3.0)[0], self.work.shape[1:])
            self.scene.set_data(self.work)
            self._look(self.scene, start)
        if self.scene.mask is not None and self.scene.ring.any():
            self.scene.set_data(self.scene.background(start))
        with np.errstate(invalid="ignore", divide="ignore"):
            again = self._moments(self.scene.plain)
        if np.isfinite(again).all():
            self.moments = again
            if initial is None and self.method == "moments":
                # where the reprojections said otherwise than the first moments, they still do
                self.best = np.where(np.abs(start - moments).max(axis=1, keepdims=True) > 0.5, start, again)
        elif np.isfinite(moments).all():
            self.moments = moments
        self._report(2)

    def _straighten(self, air: Bool) -> bool:
        """Take what runs straight through the field out of the frames, where the air shows that there is something."""
        before = None if self.straight is None else self.straight.tilt
        found = fit_straight(self.recorded, air, self.theta, tilt=before)
        self.straight = found if found.shared > _STRAIGHT else None
        self.work = self.recorded
        if self.straight is not None:
            self.work = self.recorded - self.straight.frames(self.recorded.shape[1:], self.theta)
        return self.straight is not None

    def _look(self, scene: Scene, shift: FloatArray) -> None:
        """Settle where the object is, and with it what is air."""
        scene.look(shift)
        if self.straight is not None and scene.mask is not None:
            # The walls are seen better without the object, and then the object without the walls.
            self._straighten(scene.air(shift))
            scene.set_data(self.work)
            scene.look(shift)

    def _moments(self, frames: F32) -> FloatArray:
        dy, top, bottom, self.good = vertical(frames.sum(axis=2, dtype=np.float64), self.limit / self.bin)
        dx, self.moment_spread = horizontal(
            frames, dy, np.deg2rad(self.theta), top, bottom, self.good, self.scene.whole
        )
        return np.stack([dy, dx], axis=1)

    def _search(self, start: FloatArray, moments: FloatArray) -> FloatArray:
        """Check displacements against coarse reprojections; look for better ones when they do not agree."""
        if not self.scene.shared() and np.isfinite(start).all():
            return start
        coarse = halve(self.work) if min(self.work.shape[1:]) >= 64 else self.work
        factor = self.work.shape[2] // coarse.shape[2]
        scene = Scene(coarse, self.theta, coarse_px=max(3.0, coarse.shape[2] / 16))
        shape = self.work.shape[1:]

        def down(shift: FloatArray) -> FloatArray:
            return Alignment(shift, np.zeros_like(shift)).binned(factor, shape).shift

        def up(shift: FloatArray) -> FloatArray:
            return Alignment(shift, np.zeros_like(shift)).unbinned(factor, shape).shift

        limit = self.limit / self.bin / factor
        if np.isfinite(start).all():
            moved, agreed, _ = correlated(scene, down(start), limit, rounds=1)
            far = np.abs(moved - down(start)).max(axis=1) > 1.0
            if agreed and far.mean() < 0.2:
                out = start.copy()
                out[far] = up(moved)[far]
                return out
        self.method = "search"
        firsts = [down(v) for v in (moments, start)[: 1 + (moments is not start)] if np.isfinite(v).all()]
        firsts += [chain(scene, limit), np.zeros((len(self.theta), 2))]
        candidates = []
        for first in firsts:
            moved, _, misfit = correlated(scene, first, limit, rounds=12)
            candidates.append((misfit, moved))
            if misfit < 0.15:
                break
        misfit, moved = min(candidates, key=lambda c: c[0])
        self.notes.append("the first guess disagrees with the reprojections; found by correlation")
        return up(moved)

    # --------------------------------------------------------------------------------------------- refining

    def refine(self) -> None:
        """Newton steps on the whole field, in the band and with the bounds for the object that the data speak for."""
        assert self.best is not None
        scene, start = self.scene, self.best
        if not (self.p.refine and self.p.iterations):
            self.method = "moments"
            self._judge(scene, start)
            return
        if scene.mask is not None:
            mask, footprint = scene.mask, scene.footprint
            placed = scene.placed(start)
            bounded_misfit = scene.misfit(start, placed)
            scene.mask, scene.footprint = None, scene._circle()
            if scene.misfit(start, placed) < 0.9 * bounded_misfit:
                self.notes.append("something besides the object turns with it: the volume is not bounded")
                scene.unbind()
            else:
                scene.mask, scene.footprint = mask, footprint
        shift, known = self._newton(scene, start, self.p.iterations)
        if np.quantile(np.abs(shift - start), 0.5) > 0.2:
            # Where the object is was settled from displacements that were off: look again.
            bounded = scene.mask is not None
            self._look(scene, shift)
            if scene.ring.any():
                scene.set_data(scene.background(shift))
            if not bounded:
                scene.unbind()
            shift, known = self._newton(scene, shift, self.p.iterations)
        moments_kept = self.method == "moments" and np.isfinite(self.moments).all()
        refined = scene.held_out(shift, scene.placed(shift, known))
        self.odd = self._odd(scene, refined)
        if self.odd.any():
            shift, known = self._newton(scene, shift, self.p.iterations)
            refined = scene.held_out(shift, scene.placed(shift, known))
        noise = np.median(self.noise) * noise_left()
        if np.median(refined.residual) > 4 * noise:
            # The misfit is more than noise: is it slow enough for a band-pass to help?
            band = scene.banded(_BAND_PX * scene.shape[1] / _COLUMNS)
            other, _ = self._newton(band, shift, self.p.iterations, floor=0.2)
            before, after = band.held_out(shift), band.held_out(other)
            if _better(before, after, band.usable, by=0.05):
                self.method, self.best, self.scene = "reprojection, band-passed", other, band
                self._judge(band, other)
                return
        # Where the projections hardly overlap in Fourier space a reprojection says little: it must show its worth.
        plain = scene.held_out(self.moments, scene.placed(self.moments, known)) if moments_kept else None
        if plain is not None and (
            _better(refined, plain, scene.usable) if scene.shared() else not _better(plain, refined, scene.usable)
        ):
            self.method, self.best = "moments", self.moments
            self.notes.append("the refinement was no better")
            self._judge(scene, self.best)
        else:
            self.method, self.best = "reprojection", shift
            self._judge(scene, shift, known, refined)

    def _newton(
        self, scene: Scene, start: FloatArray, iterations: int, floor: float = 0.1
    ) -> tuple[FloatArray, F32 | None]:
        """Return the displacements where the steps end, and the reprojections of the last volume."""
        shift = start
        known: F32 | None = None
        solver: Coupled | None = None
        moved = np.inf
        past: list[tuple[FloatArray, FloatArray]] = []  # displacements, and the steps each projection asked for there
        blur_known = scene.coarse_px > 0 or scene.steep is not None
        self.asked_again[:] = False
        last = iterations
        for k in range(iterations + _MORE):
            if k == last:
                break
            # What frames did not record has to settle before they are judged by it.
            for _ in range(_FILLS if k == 0 and known is None and scene.cut(shift) else 0):
                _, known = scene.model(shift, known)
            placed, model = scene.model(shift, known)
            known = model
            fit = scene.compare(placed, model, shift)
            was = scene.usable
            self._leave_out(scene, fit)
            if moved > _NEAR or (was != scene.usable).any():
                past.clear()
            past.append((shift, fit.step))
            size = float(np.quantile(np.abs(fit.step[scene.usable]), 0.8))
            settled = not blur_known and size <= _SHARP
            if settled:
                scene.steep = lost_to_blur(scene, placed, model, shift)
                blur_known = True
            if solver is None or (k < 2 and moved > _NEAR):
                solver = Coupled(scene, model, fit.information[0])
            step = solver.together(past[-_SECANTS:], fit.information[0], 0.5 if size > 0.3 else floor)
            step = gauge_free(step, self.theta, scene.usable + 1e-6)
            step = np.clip(step, -0.05 * scene.shape[1], 0.05 * scene.shape[1])
            shift = shift + step
            moved = float(np.quantile(np.abs(step[scene.usable]), 0.8))
            self.best = shift
            self.method = "reprojection"
            self._report(3 + k)
            formal = np.sqrt(np.median(self.noise) / np.maximum(np.median(fit.information[0], axis=0), 1e-30))
            enough = _CLOSE if len(past) > 2 else 0.1
            same = (was == scene.usable).all()
            if k and not same:
                last = max(last, min(k + _AFTER, iterations + _MORE))
            if settled:  # the frames are others now: what was asked of them tells nothing about the next step
                past.clear()
            elif k and same and np.all(np.sqrt(np.mean(step[scene.usable] ** 2, axis=0)) < enough * formal + 1e-4):
                break
        return shift, known

    def _leave_out(self, scene: Scene, fit: Fit) -> None:
        """Projections that do not fit the others have no part in the volume; at most a third of them.

        Those next to one that is far worse are asked again when that has no part in the volume any more.
        """
        z = _robust_z(np.log(np.maximum(fit.residual, 1e-30)))
        bad = (z > 6) & (fit.residual > 3 * np.median(fit.residual))
        order = np.argsort(self.theta, kind="stable")
        within = np.pad((fit.residual * scene.usable)[order], 2)
        bad[order] &= fit.residual[order] > _FAR_WORSE * np.lib.stride_tricks.sliding_window_view(within, 5).max(axis=1)
        bad |= (fit.gain < 0.5) | (fit.gain > 2.0)
        bad |= self.odd
        if bad.mean() < 0.34:
            # Nothing is known where many neighbours are left out: they are judged again with a part in the volume.
            again = _in_runs(~scene.usable, self.theta, _RUN) & ~self.asked_again & ~self.odd
            self.asked_again |= again
            scene.usable = ~bad | again

    def _odd(self, scene: Scene, held_out: Fit) -> Bool:
        """(n,) which projections show less than the others around them of what the others predict.

        Such as a slight blur: more is left of them than of their neighbours, beyond the scatter there, and not because
        they have more noise. At most one in twenty; asked where what is left is noise, since what few angles leave is
        more in some projections than in others.
        """
        odd = np.zeros(len(self.theta), dtype=bool)
        order = np.argsort(self.theta, kind="stable")
        if scene.usable.sum() < _FEWEST_TO_STAND_OUT or not scene.shared():
            return odd
        left = held_out.residual[order]
        if np.median(left) > _MOSTLY_NOISE * np.median(self.noise) * noise_left():
            return odd
        z = np.minimum(_stands_out(left), _stands_out(left / self.noise[order]))
        # The neighbours of such a projection are predicted from it: only the worst of five.
        worst = np.lib.stride_tricks.sliding_window_view(np.pad(z, 2, mode="reflect"), 5).max(axis=1)
        odd[order[(z > _ODD) & (z == worst)]] = True
        odd &= scene.usable
        return odd if odd.mean() <= 0.05 else np.zeros_like(odd)

    # ---------------------------------------------------------------------------------------------- judging

    def _judge(self, scene: Scene, shift: FloatArray, known: F32 | None = None, held_out: Fit | None = None) -> None:
        """Find the standard errors of `shift`, and how well it predicts projections that were held out.

        `known` are reprojections that are about right, `held_out` the fit to those that were held out, if it is there.
        """
        placed, model = scene.model(shift, known)
        fit = scene.compare(placed, model, shift)
        self.fit = scene.held_out(shift, placed) if held_out is None else held_out
        solver = Coupled(scene, model, fit.information[0])
        # What is left beyond the noise counts as noise; the model's own adds up to 0.7 of it.
        left = self.fit.residual / (1.7 * noise_left())
        if not scene.shared():  # what half of the angles cannot predict is no noise: what their own volume leaves
            left = fit.residual / scene.noise_unexplained(shift)
        noise = np.maximum(self.noise, left)
        shared: FloatArray | float = 0.0
        if self.straight is not None:
            air = scene.air(shift).sum(axis=1).astype(float)
            at = np.arange(air.shape[1])
            air = np.stack([np.interp(at + dx, at, row) for dx, row in zip(shift[:, 1], air, strict=True)])
            shared = profile_noise(model, scene.weight(shift), air)
        self.sigma, self.center_sigma, self.bound = solver.errors(fit, noise, self.theta, self.fit, shared)
        if self.method == "moments" and np.isfinite(self.moment_spread):
            self.sigma[:, 1] = np.maximum(self.sigma[:, 1], self.moment_spread)
        self.scene = scene

    def result(self) -> JitterResult:
        """Return what was found, in pixels of the stack."""
        assert self.best is not None
        n = len(self.theta)
        if self.fit is None or self.sigma is None:  # cancelled
            self.notes.append("partial: cancelled before the errors were known")
            self._judge(self.scene, self.best)
        assert self.fit is not None
        assert self.sigma is not None
        best = self.best if self.method == "moments" else centred(self.scene, self.best, self.theta)
        found = Alignment(best, self.sigma).unbinned(self.bin, self.frame)
        moments = Alignment(self.moments, np.zeros((n, 2))).unbinned(self.bin, self.frame).shift
        center, _ = center_of_rotation(found.shift[:, 1], self.theta, found.sigma[:, 1])
        center_sigma = self.center_sigma * self.bin
        if not self.partial:
            self._report(self.total)
        scale = self.frame[1] / 256
        unexplained = float(np.median(self.fit.unexplained))
        left_out = int(np.sum(~self.scene.usable))
        within = float(np.median(self.fit.residual) / (np.median(self.noise) * noise_left()))
        moved = _moved(found.shift, moments, self.theta)
        sigma_y, sigma_x = (float(np.sqrt(np.median(found.sigma[:, k] ** 2))) for k in (0, 1))
        filled = self.scene.object_rows
        cut = int((filled & ~self.scene.whole).sum())
        if cut:
            part = f"{100 * cut / filled.sum():.0f} % of its rows"
            self.notes.append(f"the object goes beyond the sides of the frames in {part}: they have no part")
        if self.straight is not None:
            tilt = float(np.rad2deg(np.arctan(np.hypot(*self.straight.tilt))))
            self.notes.append(f"something runs straight through the field, tilted by {tilt:.1f} deg: taken out")
        scores = (
            Score("sigma_y", sigma_y, "px", 0.1 * scale),
            Score("sigma_x", sigma_x, "px", 0.1 * scale),
            Score("held-out residual / noise", float(np.sqrt(within)), "", 3.0),
            Score("part of the contrast not explained", unexplained, "", 0.25),
            Score("projections that stand out", left_out, "", max(1.0, 0.02 * n)),
            # Two estimates with other weaknesses: where they part, at least one of them is wrong.
            Score("moved from the moments", moved, "px", max(0.25 * scale, 5 * float(np.hypot(sigma_y, sigma_x)))),
        )
        walls = None if self.straight is None else self.straight.unbinned(self.bin, self.sign)
        return JitterResult(
            found.shift, found.sigma, center=center, center_sigma=center_sigma, moments=moments, method=self.method,
            residual=np.sqrt(self.fit.residual), quality=Quality(scores, (f"{self.method} kept", *self.notes)),
            bound=self.bound * self.bin, used=self.scene.usable.copy(), slips=slips(found.shift, self.theta, scale),
            partial=self.partial, straight=walls,
        )  # fmt: skip


def _in_runs(flags: Bool, theta: FloatArray, least: int) -> Bool:
    """Return which of `flags` (n,) stand in a row of `least` neighbours in angle or more; a half turn is a circle."""
    order = np.argsort(theta, kind="stable")
    round_about = np.concatenate([flags[order]] * 3)
    ends = np.flatnonzero(np.diff(np.concatenate([[False], round_about, [False]]).astype(int))).reshape(-1, 2)
    inside = np.zeros(len(round_about), dtype=bool)
    for a, b in ends:
        inside[a:b] = b - a >= least
    out = np.zeros(len(flags), dtype=bool)
    out[order] = inside[len(flags) : 2 * len(flags)]
    return out


def _better(before: Fit, after: Fit, usable: Bool, by: float = 0.0) -> bool:
    """Whether `after` predicts held-out projections better than `before`, beyond chance; paired by projection.

    `by` is the least part of the residual that must be gained.
    """
    gain = np.log(np.maximum(before.residual, 1e-30) / np.maximum(after.residual, 1e-30))[usable]
    return bool(gain.mean() > max(by, 2.0 * gain.std() / np.sqrt(len(gain))))


def _moved(shift: FloatArray, moments: FloatArray, theta_deg: FloatArray) -> float:
    """Rms distance between two estimates (n, 2), px, without what cannot be determined; 0 where one is not there."""
    difference = shift - moments
    good = np.isfinite(difference).all(axis=1)
    if not good.any():
        return 0.0
    t = np.deg2rad(theta_deg[good])
    basis = np.stack([np.cos(t), np.sin(t), np.ones_like(t)], axis=1)
    rest = difference[good]
    rest[:, 0] -= rest[:, 0].mean()
    rest[:, 1] -= basis[:, :2] @ np.linalg.lstsq(basis, rest[:, 1], rcond=None)[0][:2]
    return float(np.sqrt(np.mean(np.sum(rest**2, axis=1))))


def _border_plane(frames: F32) -> F32:
    """(n, y, x) the plane through the border of every frame; the object may touch it in places."""
    from .agreement import solve_normal

    n, h, w = frames.shape
    edge = max(1, round(0.05 * min(h, w)))
    border = np.ones((h, w), dtype=bool)
    border[edge:-edge, edge:-edge] = False
    at = np.flatnonzero(border)
    y = ((at // w) - (h - 1) / 2) / (w / 2)
    x = ((at % w) - (w - 1) / 2) / (w / 2)
    design = np.stack([np.ones_like(y), y, x], axis=1)
    products = (design[:, :, None] * design[:, None, :]).reshape(-1, 9)
    values = frames.reshape(n, -1)[:, at].astype(np.float64)
    centre = np.median(values, axis=1, keepdims=True)
    keep = np.abs(values - centre) <= 3.0 * 1.4826 * np.median(np.abs(values - centre), axis=1, keepdims=True) + 1e-12
    c: FloatArray = np.zeros((n, 3))
    for _ in range(4):
        normal = (keep @ products).reshape(n, 3, 3)
        rhs = (keep * values) @ design
        c, _ = solve_normal(normal, rhs)
        rest = values - c @ design.T
        spread = 1.4826 * np.median(np.abs(rest), axis=1, keepdims=True)
        keep = np.abs(rest) <= 2.5 * spread + 1e-12
    return np.asarray(plane(c, (h, w)), dtype=np.float32)


def _check(data: F32, theta: FloatArray) -> None:
    if data.ndim != 3:
        raise XanesTomoError(f"stack: expected (projection, y, x), got {data.ndim} dimensions")
    if theta.shape != data.shape[:1]:
        raise XanesTomoError(f"theta: expected one angle for each of {len(data)} projections, got {theta.size}")
    if len(data) < FEWEST_ANGLES:
        raise XanesTomoError(f"stack: expected at least {FEWEST_ANGLES} usable projections, got {len(data)}")
    if not np.isfinite(theta).all():
        raise XanesTomoError("theta: expected finite angles in degrees, got NaN or infinity")
    if min(data.shape[1:]) < FEWEST_PIXELS:
        raise XanesTomoError(
            f"stack: expected frames of at least {FEWEST_PIXELS} x {FEWEST_PIXELS} pixels, got {data.shape[1]} x "
            f"{data.shape[2]}; is the box empty?"
        )
    low, high = data.min(axis=(1, 2)), data.max(axis=(1, 2))
    if not (np.isfinite(low) & np.isfinite(high)).all():
        raise XanesTomoError("stack: expected finite values, got NaN or infinity; exclude those projections")
    different = len(np.unique(np.round(np.mod(theta, 180.0), 3) % 180.0))
    if different < FEWEST_ANGLES:
        raise XanesTomoError(f"theta: expected at least {FEWEST_ANGLES} different angles, got {different}")
    level = np.maximum(-low, high)
    if level.max() > 1e15:
        raise XanesTomoError(f"stack: expected values as of absorbance or counts, got {level.max():.3g}")
    flat = ~(high - low > 1e-5 * np.maximum(level, 1e-12))
    if flat.all():
        raise XanesTomoError("stack: expected images with contrast, got constant frames")
    # Some are left out as projections that stand out; many would be taken for what is usual.
    if flat.mean() > 1 / 3 or len(data) - flat.sum() < FEWEST_ANGLES:
        raise XanesTomoError(
            f"stack: expected images with contrast, but {flat.sum()} of {len(data)} frames are constant; exclude those"
        )


def _variance(variance: npt.ArrayLike | float | None, n: int, data: F32) -> FloatArray:
    if variance is not None:
        given = np.asarray(variance, dtype=float)
        if given.shape not in ((), (n,)):
            raise XanesTomoError(f"variance: expected one number or one for each of {n} projections, got {given.shape}")
        known = np.broadcast_to(given, (n,))[np.isfinite(np.broadcast_to(given, (n,)))]
        if len(known):
            return np.asarray(np.maximum(np.where(np.isfinite(given), given, np.median(known)) * np.ones(n), 1e-12))
    # The difference of diagonal neighbours (second differences) is noise for a smooth object.
    d = data[:, 1:-1:2, 1:-1:2] - 0.25 * (
        data[:, :-2:2, 1:-1:2] + data[:, 2::2, 1:-1:2] + data[:, 1:-1:2, :-2:2] + data[:, 1:-1:2, 2::2]
    )
    mad = 1.4826 * np.median(np.abs(d), axis=(1, 2))
    return np.asarray(np.maximum(mad**2 / 1.25, 1e-12), dtype=float)


def _stands_out(values: FloatArray) -> FloatArray:
    """By how many robust standard deviations the logarithm of each value exceeds the median of the 16 around it.

    Parameters
    ----------
    values : (n,) array
        In the order of the angles; the scatter is that of all or of the 25 around it, whichever is more.
    """
    level = np.log(np.maximum(values, 1e-30))
    around = np.pad(level, 8, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(around, 17)
    above = level - np.median(np.delete(windows, 8, axis=1), axis=1)
    scatter = np.lib.stride_tricks.sliding_window_view(np.pad(np.abs(above), 12, mode="reflect"), 25)
    spread = 1.4826 * np.maximum(np.median(scatter, axis=1), np.median(np.abs(above)))
    return np.asarray(above / (spread + 1e-12))


def _robust_z(values: FloatArray) -> FloatArray:
    centre = np.median(values)
    spread = 1.4826 * np.median(np.abs(values - centre)) + 1e-12
    return np.asarray((values - centre) / spread)
