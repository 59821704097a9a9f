"""Jitter: where every projection of one tomogram lies, found from the projections alone.

Vertically the mass in every row must not depend on the angle, horizontally the centre of mass must move on a
sinusoid (Helgason-Ludwig conditions, doi 10.1002/cpa.3160190207). With the air around the object at zero these
moments are close to what the photons allow. They are refined by reprojection (Dengler 1989, doi
10.1016/0304-3991(89)90065-9; Yu et al. 2018, doi 10.1107/S1600577518013929): the volume is reconstructed from the
projections as placed so far, projected again, and each projection is fitted to its own reprojection by Gauss-Newton
steps, with its gain and level as nuisances, always resampled from the recorded frame. Whether the refined shifts are
better is decided by projections that were held out of the reconstruction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .agreement import center_of_rotation, displacement_equations, object_support, smooth, solve_normal
from .model import Alignment, FloatArray, Progress, Quality, Score, XanesTomoError, no_progress
from .projector import Projector
from .recipe import JitterParameters
from .reconstruction import angular_weights
from .resample import place

__all__ = ["JitterResult", "find_jitter"]

F32 = npt.NDArray[np.float32]
FEWEST_ANGLES = 8
_BLUR_PX = 0.7  # applied to data and reprojection alike before they are compared


@dataclass(frozen=True, kw_only=True)
class JitterResult(Alignment):
    """What `find_jitter` found: an `Alignment` in pixels of the stack given, with what is known about it.

    ``shift`` is the displacement of the content of every projection, ``[dy, dx]``, positive down / right; x contains
    the centre of rotation; the centre of mass of the object lies on the axis, at the middle row.

    Attributes
    ----------
    center, center_sigma : float
        Rotation axis relative to the middle column, pixels, and its standard error.
    moments : (n, 2) array
        ``[dy, dx]`` as the moments alone give them.
    method : {"moments", "reprojection"}
        Which estimate was kept.
    residual : (n,) array
        Rms difference between each projection and the reprojection of the others.
    quality : Quality
    """

    center: float
    center_sigma: float
    moments: FloatArray
    method: str
    residual: FloatArray
    quality: Quality

    @property
    def alignment(self) -> Alignment:
        """The same as a plain `Alignment`, for what goes on to other pixels."""
        return Alignment(self.shift, self.sigma, self.magnification, self.roll_deg, self.status)


def find_jitter(
    stack: npt.ArrayLike,
    theta_deg: npt.ArrayLike,
    *,
    variance: npt.ArrayLike | float | None = None,
    parameters: JitterParameters | None = None,
    progress: Progress = no_progress,
) -> JitterResult:
    """Find the displacement of every projection of a tomogram.

    Parameters
    ----------
    stack : (n, y, x) array
        Absorbance, zero in the air around the object.
    theta_deg : (n,) array
        Angle of every projection, degrees.
    variance : (n,) array or float, optional
        Noise variance of a pixel; estimated from the residual unless given.
    parameters : JitterParameters, optional
    progress : callable
        See `Progress`; may raise `Cancelled`.

    Raises
    ------
    XanesTomoError
        Fewer than 8 projections, another number of angles, or nothing that absorbs.

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
    n, _, w = data.shape
    noise = _variance(variance, n, data)
    limit = p.max_shift_px * w / 1024
    progress("jitter", 0, p.iterations + 2)
    dy, top, bottom = _vertical(data.sum(axis=2, dtype=np.float64), limit)
    dx, spread = _horizontal(data, dy, np.deg2rad(theta), top, bottom)
    moments = np.stack([dy, dx], axis=1)
    if not np.isfinite(moments).all():
        raise XanesTomoError("jitter: expected an absorbing object in the field, found none; check flats and the box")
    progress("jitter", 1, p.iterations + 2)

    scene = _Scene(data, theta, moments)
    before = scene.held_out(moments)
    best, method, fit_sigma = moments, "moments", None
    last_step = float("nan")
    if p.refine and p.iterations:
        shift = moments.copy()
        sigma = None
        for k in range(p.iterations):
            step, sigma = scene.step(shift, noise)
            step = np.clip(step, -0.05 * w, 0.05 * w)
            shift = _fix_gauge(shift + step, shift, theta)
            last_step = float(np.sqrt(np.mean(step**2)))
            progress("jitter", k + 2, p.iterations + 2)
            if last_step < 0.3 * float(np.sqrt(np.mean(sigma**2))):
                break
        after = scene.held_out(shift)
        gain = before - after
        # Paired by projection: the refined shifts must predict held-out projections better, beyond chance.
        if gain.mean() > 2.0 * gain.std() / np.sqrt(n):
            best, method, fit_sigma = shift, "reprojection", sigma
            before = after
    if fit_sigma is None:
        _, fit_sigma = scene.step(best, noise)
        fit_sigma = np.maximum(fit_sigma, np.array([0.0, 1.0])[None, :] * spread)
    center, center_sigma = center_of_rotation(best[:, 1], theta, fit_sigma[:, 1])
    residual = np.sqrt(before)
    moved = np.sqrt(np.mean((best - moments) ** 2, axis=0))
    outliers = int(np.sum(_robust_z(residual) > 5))
    scores = (
        Score("sigma_y", float(np.sqrt(np.mean(fit_sigma[:, 0] ** 2))), "px", 0.1 * w / 256),
        Score("sigma_x", float(np.sqrt(np.mean(fit_sigma[:, 1] ** 2))), "px", 0.1 * w / 256),
        Score("held-out residual / noise", float(np.sqrt(np.median(before) / np.median(noise)) / _NOISE_LEFT), "", 3.0),
        Score("projections that stand out", outliers, "", max(1.0, 0.02 * n)),
        Score("moved from the moments", float(np.hypot(*moved)), "px"),
    )
    note = f"{method} kept" + ("" if method == "reprojection" or not p.refine else "; the refinement was no better")
    progress("jitter", p.iterations + 2, p.iterations + 2)
    return JitterResult(
        best, fit_sigma, center=center, center_sigma=center_sigma, moments=moments, method=method, residual=residual,
        quality=Quality(scores, (note,)),
    )  # fmt: skip


# White noise of standard deviation 1 keeps this much of it after the blur.
_NOISE_LEFT = 1 / (2 * np.sqrt(np.pi) * _BLUR_PX)


def _check(data: F32, theta: FloatArray) -> None:
    if data.ndim != 3:
        raise XanesTomoError(f"stack: expected (projection, y, x), got {data.ndim} dimensions")
    if theta.shape != data.shape[:1]:
        raise XanesTomoError(f"theta: expected one angle for each of {len(data)} projections, got {theta.size}")
    if len(data) < FEWEST_ANGLES:
        raise XanesTomoError(f"stack: expected at least {FEWEST_ANGLES} usable projections, got {len(data)}")
    if not np.isfinite(theta).all():
        raise XanesTomoError("theta: expected finite angles in degrees, got NaN or infinity")
    if not np.isfinite(data).all():
        raise XanesTomoError("stack: expected finite values, got NaN or infinity; exclude those projections")
    level = np.abs(data).max(axis=(1, 2))
    if not np.any(np.ptp(data, axis=(1, 2)) > 1e-5 * np.maximum(level, 1e-12)):
        raise XanesTomoError("stack: expected images with contrast, got constant frames")


def _variance(variance: npt.ArrayLike | float | None, n: int, data: F32) -> FloatArray:
    if variance is not None:
        given = np.asarray(variance, dtype=float)
        if given.shape not in ((), (n,)):
            raise XanesTomoError(f"variance: expected one number or one for each of {n} projections, got {given.shape}")
        return np.asarray(np.maximum(np.broadcast_to(given, (n,)), 1e-12))
    # The difference of diagonal neighbours (second differences) is noise for a smooth object.
    d = data[:, 1:-1:2, 1:-1:2] - 0.25 * (
        data[:, :-2:2, 1:-1:2] + data[:, 2::2, 1:-1:2] + data[:, 1:-1:2, :-2:2] + data[:, 1:-1:2, 2::2]
    )
    mad = 1.4826 * np.median(np.abs(d), axis=(1, 2))
    return np.asarray(np.maximum(mad**2 / 1.25, 1e-12), dtype=float)


def _robust_z(values: FloatArray) -> FloatArray:
    centre = np.median(values)
    spread = 1.4826 * np.median(np.abs(values - centre)) + 1e-12
    return np.asarray((values - centre) / spread)


# ------------------------------------------------------------------------------------------------- moments


def _fourier_shift(profiles: FloatArray, shift: FloatArray) -> FloatArray:
    """Move the content of every row of (n, length) by -shift samples (band-limited, edge-padded)."""
    length = profiles.shape[1]
    pad = length // 2
    padded = np.pad(profiles, ((0, 0), (pad, pad)), mode="edge")
    k = np.fft.rfftfreq(padded.shape[1])
    spectrum = np.fft.rfft(padded, axis=1) * np.exp(2j * np.pi * k[None, :] * shift[:, None])
    return np.asarray(np.fft.irfft(spectrum, padded.shape[1], axis=1)[:, pad : pad + length])


def _vertical(profiles: FloatArray, limit: float) -> tuple[FloatArray, int, int]:
    """Displacement in y of every mass profile (n, rows), and the rows seen in all of them once they are aligned.

    The centre of mass of the common profile is put at the middle row.
    """
    n, rows = profiles.shape
    window = np.hanning(rows + 2)[1:-1]
    size = 2 * rows
    spectrum = np.fft.rfft((profiles - profiles.min(axis=1, keepdims=True)) * window, size, axis=1)
    frequency = np.fft.rfftfreq(size)
    spectrum[:, 0] = 0
    lag = np.fft.fftfreq(size, 1 / size)
    template = spectrum[n // 2]
    shift = np.zeros(n)
    for _ in range(3):
        cross = np.fft.irfft(spectrum * np.conj(template)[None, :], size, axis=1)
        cross[:, np.abs(lag) > limit] = -np.inf
        shift = lag[np.argmax(cross, axis=1)]
        template = np.mean(spectrum * np.exp(2j * np.pi * frequency[None, :] * shift[:, None]), axis=0)
    shift = shift - np.median(shift)
    top, bottom = _common_rows(shift, rows)
    for _ in range(10):
        moved = _fourier_shift(profiles, shift)[:, top:bottom]
        if bottom - top < 8:
            break
        t = np.median(moved, axis=0)
        design = np.stack([-np.gradient(t), t, np.ones_like(t)], axis=1)
        step = np.linalg.lstsq(design, (moved - t[None, :]).T, rcond=None)[0][0]
        step -= np.median(step)
        shift = shift + np.clip(step, -2, 2)
        top, bottom = _common_rows(shift, rows)
        if np.abs(step).max() < 1e-3:
            break
    middle = np.arange(top, bottom) - (rows - 1) / 2
    profile = np.median(_fourier_shift(profiles, shift)[:, top:bottom], axis=0)
    offset = float(np.sum(profile * middle) / np.sum(profile)) if bottom > top else 0.0
    return np.asarray(shift + offset), top, bottom


def _common_rows(shift: FloatArray, rows: int) -> tuple[int, int]:
    top = int(np.ceil(max(0.0, -shift.min()))) + 2
    bottom = rows - int(np.ceil(max(0.0, shift.max()))) - 2
    return (top, bottom) if bottom > top else (0, 0)


def _horizontal(frames: F32, dy: FloatArray, theta: FloatArray, top: int, bottom: int) -> tuple[FloatArray, float]:
    """Displacement in x from the centre of mass of every row, and its standard error from two sets of rows.

    Each row's centre moves on its own sinusoid; what all rows do besides is the displacement. The centre of mass of the
    whole is put on the axis.
    """
    n, _, w = frames.shape
    if bottom - top < 4:
        return np.full(n, np.nan), float("nan")
    x = (np.arange(w) - (w - 1) / 2).astype(np.float32)
    offset = dy - np.median(dy)
    m0 = _fourier_shift(frames.sum(axis=2, dtype=np.float64), offset)[:, top:bottom]
    m1 = _fourier_shift(np.asarray(frames @ x, dtype=np.float64), offset)[:, top:bottom]
    mass = np.median(m0, axis=0)
    rows = mass > 0.05 * mass.max()
    if mass.max() <= 0 or rows.sum() < 2:
        return np.full(n, np.nan), float("nan")
    m0, m1, mass = m0[:, rows], m1[:, rows], mass[rows]
    basis = np.stack([np.cos(theta), np.sin(theta)], axis=1)

    def estimate(use: slice) -> FloatArray:
        total = m0[:, use].sum(axis=1)
        dx: FloatArray = m1[:, use].sum(axis=1) / np.where(total > 0, total, np.nan)
        com = m1[:, use] / np.maximum(m0[:, use], 0.02 * mass.max())
        weight = mass[use] ** 2
        if not np.isfinite(dx).all():
            return dx
        for _ in range(4):
            orbit = np.linalg.lstsq(basis, com - dx[:, None], rcond=None)[0]
            orbit -= (orbit @ mass[use] / mass[use].sum())[:, None]
            rest = com - basis @ orbit
            off = np.abs(rest - np.average(rest, axis=1, weights=weight)[:, None])
            scale = 1.4826 * np.median(off) + 1e-9
            robust = weight * np.minimum(1, 1.5 * scale / np.maximum(off, 1e-12))
            dx = np.asarray(np.sum(robust * rest, axis=1) / np.sum(robust, axis=1))
        return dx

    dx = estimate(slice(None))
    even, odd = estimate(slice(0, None, 2)), estimate(slice(1, None, 2))
    difference = even - odd
    c, a, b = np.linalg.lstsq(np.column_stack([np.ones(n), basis]), difference, rcond=None)[0]
    difference = difference - c - basis @ np.array([a, b])
    return dx, float(np.std(difference) / 2)


# -------------------------------------------------------------------------------------------- reprojection


class _Scene:
    """One tomogram's projections, compared with reprojections of volumes made from them.

    Work is confined to the rows the object covers. Where the object may be is settled once, from the first estimate.
    """

    def __init__(self, data: F32, theta: FloatArray, shift: FloatArray) -> None:
        _, h, w = data.shape
        self.data, self.theta = data, theta
        placed = place(data, Alignment(shift, np.zeros_like(shift)))
        mass = np.median(placed.sum(axis=2), axis=0)
        rows = np.flatnonzero(mass > 0.02 * mass.max())
        margin = max(4, round(0.04 * h))
        self.rows = (max(0, int(rows[0]) - margin), min(h, int(rows[-1]) + 1 + margin))
        self.projector = Projector(w, theta)
        self.halves = (np.argsort(theta)[0::2], np.argsort(theta)[1::2])
        self.half_projectors = tuple(Projector(w, theta[k]) for k in self.halves)
        self.weights = angular_weights(theta)
        self.half_weights = tuple(angular_weights(theta[k]) for k in self.halves)
        first = placed[:, self.rows[0] : self.rows[1]]
        volume = self.projector.filtered(first, angular_weight=self.weights)
        self.support = object_support(volume)
        model = self.projector.forward(volume * self.support)
        self.weight = self._compared(model, shift, h)

    def _compared(self, model: F32, shift: FloatArray, height: int) -> F32:
        """Where data and reprojection are compared: around the object, on what every frame recorded."""
        from scipy.ndimage import binary_dilation

        body = smooth(model.max(axis=0)[None], 2.0)[0]
        mask = binary_dilation(body > 0.03 * body.max(), iterations=3)
        weight = np.broadcast_to(mask.astype(np.float32), model.shape).copy()
        width = model.shape[2]
        y = np.arange(*self.rows)[None, :] + shift[:, :1]
        x = np.arange(width)[None, :] + shift[:, 1:]
        weight *= ((y >= 3) & (y <= height - 4))[:, :, None]
        weight *= ((x >= 3) & (x <= width - 4))[:, None, :]
        return weight

    def _placed(self, shift: FloatArray) -> F32:
        shape = (self.data.shape[1], self.data.shape[2])
        return place(self.data, Alignment(shift, np.zeros_like(shift)), rows=self.rows, grid_shape=shape)

    def step(self, shift: FloatArray, noise: FloatArray) -> tuple[FloatArray, FloatArray]:
        """One Gauss-Newton step (n, 2) and the standard errors (n, 2) that go with it."""
        placed = self._placed(shift)
        volume = self.projector.filtered(placed, angular_weight=self.weights)
        volume *= self.support
        model = smooth(self.projector.forward(volume), _BLUR_PX)
        fit = displacement_equations(smooth(placed, _BLUR_PX), model, self.weight)
        solution, inverse = fit.solve()
        formal = np.sqrt(np.maximum(inverse[:, (0, 1), (0, 1)], 0) * noise[:, None])
        # The upper and lower half of the rows answer independently; where they differ by more than their
        # formal errors allow, the errors are too small.
        (upper, upper_inverse), (lower, lower_inverse) = fit.solve(0), fit.solve(1)
        expected = np.sqrt((upper_inverse + lower_inverse)[:, (0, 1), (0, 1)] * noise[:, None])
        difference = (upper - lower)[:, :2] / np.where(np.isfinite(expected) & (expected > 0), expected, np.inf)
        scale = np.maximum(1.0, np.sqrt(np.mean(difference**2, axis=0)))
        finite = np.where(np.isfinite(formal), formal, 0)
        sigma = np.where(np.isfinite(formal), formal, finite.max(axis=0))
        contrast = np.clip(1 + solution[:, 2:3], 0.2, 5.0)
        return solution[:, :2] / contrast, np.asarray(sigma * scale)

    def held_out(self, shift: FloatArray) -> FloatArray:
        """Return the mean squared difference (n,) from the reprojection of the other half of the angles.

        Each projection's gain and level are fitted first: a projection is judged by a volume it had no part in.
        """
        placed = self._placed(shift)
        model = np.empty_like(placed)
        for k in (0, 1):
            known, asked = self.halves[k], self.halves[1 - k]
            volume = self.half_projectors[k].filtered(placed[known], angular_weight=self.half_weights[k])
            volume *= self.support
            model[asked] = self.half_projectors[1 - k].forward(volume)
        fit = displacement_equations(smooth(placed, _BLUR_PX), smooth(model, _BLUR_PX), self.weight)
        solution, _ = solve_normal(fit.normal.sum(axis=1)[:, 2:, 2:], fit.rhs.sum(axis=1)[:, 2:])
        cost = fit.cost.sum(axis=1) - np.einsum("ni,ni->n", solution, fit.rhs.sum(axis=1)[:, 2:])
        return np.asarray(np.maximum(cost, 0) / np.maximum(fit.count.sum(axis=1), 1e-9))


def _fix_gauge(shift: FloatArray, previous: FloatArray, theta: FloatArray) -> FloatArray:
    """Take out of the change what cannot be determined: a constant in y, cosine and sine in x."""
    change = shift - previous
    t = np.deg2rad(theta)
    basis = np.stack([np.cos(t), np.sin(t), np.ones_like(t)], axis=1)
    fit = np.linalg.lstsq(basis, change[:, 1], rcond=None)[0]
    change[:, 0] -= change[:, 0].mean()
    change[:, 1] -= basis[:, :2] @ fit[:2]
    return np.asarray(previous + change)
