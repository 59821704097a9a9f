"""What a person looks at to judge a step: residuals, sinograms with what was fitted, a suggested particle box.

Pure functions; frames are ``[y, x]``, angles degrees, shifts ``[dy, dx]`` of the content, positive down / right.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .absorbance import read_absorbance
from .agreement import object_support
from .counts import own_beam
from .flats import Beam
from .model import Alignment, EnergyScan, FloatArray, Progress, XanesTomoError, no_progress
from .projector import Projector
from .reconstruction import angular_weights
from .resample import place

__all__ = [
    "Check",
    "check_projections",
    "edge_traces",
    "half_bit",
    "residual_stack",
    "ring_correlation",
    "sinogram",
    "suggest_box",
]

F32 = npt.NDArray[np.float32]

_HARMONICS = 6


def suggest_box(frames: npt.ArrayLike, *, margin: float = 0.03) -> tuple[int, int, int, int] | None:
    """Suggest a box ``(y0, y1, x0, x1)``, ends not included, around the largest object of a few projections.

    Parameters
    ----------
    frames : (n, y, x) array
        Absorbance at a few angles spread over the scan, zero in the air.
    margin : float
        Space left around it, as a part of the width of the frame.

    Returns
    -------
    tuple of int or None
        None where nothing absorbs, or where the object fills the frame.
    """
    from scipy.ndimage import gaussian_filter, label

    data = np.nan_to_num(np.asarray(frames, dtype=np.float32))
    if data.ndim != 3 or not data.size:
        raise ValueError(f"frames: expected (n, y, x), got {data.shape}")
    _, height, width = data.shape
    mean = gaussian_filter(data.mean(axis=0), max(1.0, width / 128))
    top = float(np.percentile(mean, 99.5))
    noise = 1.4826 * float(np.median(np.abs(mean - np.median(mean))))
    if top <= max(4 * noise, 1e-6):
        noise = 0.0 if float(np.median(mean)) > 0.5 * top else noise  # it covers more than half of the frame
    if top <= max(4 * noise, 1e-6):
        return None
    # A tenth of the typical value: the mean fades at the ends, which not every angle reaches.
    labels, count = label(mean > max(0.1 * top, 3 * noise))
    if not count:
        return None
    size = np.bincount(labels.ravel())
    size[0] = 0
    ys, xs = np.nonzero(labels == size.argmax())
    space = round(margin * width)
    box = (
        max(0, int(ys.min()) - space),
        min(height, int(ys.max()) + 1 + space),
        max(0, int(xs.min()) - space),
        min(width, int(xs.max()) + 1 + space),
    )
    return None if box == (0, height, 0, width) else box


def residual_stack(
    data: npt.ArrayLike, theta_deg: npt.ArrayLike, alignment: Alignment, *, progress: Progress = no_progress
) -> F32:
    """Return ``(n, y, x)``: aligned projections minus their reprojection.

    Every projection is predicted by the volume of every other angle, in which it has no part.

    Parameters
    ----------
    data : (n, y, x) array
        Absorbance.
    theta_deg : (n,) array
        Degrees.
    alignment : Alignment
        Of these projections, in pixels of `data`.
    progress : callable
        See `Progress`.
    """
    stack = np.ascontiguousarray(data, dtype=np.float32)
    theta = np.asarray(theta_deg, dtype=float)
    if stack.ndim != 3 or theta.shape != stack.shape[:1]:
        raise ValueError(f"data: expected (n, y, x) with one angle each, got {stack.shape} and {theta.shape} angles")
    if len(theta) < 8:
        raise XanesTomoError(f"residual: expected at least 8 projections, got {len(theta)}")
    progress("residual", 0, 3)
    placed = place(stack, alignment)
    return np.asarray(placed - _held_out(placed, theta, progress))


def _held_out(placed: F32, theta: FloatArray, progress: Progress) -> F32:
    """Predict every aligned projection by the volume of every other angle."""
    width = placed.shape[2]
    order = np.argsort(theta)
    progress("residual", 1, 3)
    out = np.empty_like(placed)
    for k, (known, asked) in enumerate(((order[0::2], order[1::2]), (order[1::2], order[0::2]))):
        volume = Projector(width, theta[known]).filtered(placed[known], angular_weight=angular_weights(theta[known]))
        volume *= object_support(volume)
        out[asked] = Projector(width, theta[asked]).forward(volume)
        progress("residual", k + 2, 3)
    return out


@dataclass(frozen=True)
class Check:
    """One number per projection and the limit it is judged by.

    Attributes
    ----------
    values : (n,) array
    limit : float
        Follows the scatter of this scan: five robust standard deviations from the median, or what the noise allows
        where that is more.
    unit : str
    """

    values: FloatArray
    limit: float
    unit: str


def check_projections(
    data: npt.ArrayLike,
    theta_deg: npt.ArrayLike,
    alignment: Alignment,
    *,
    variance: npt.ArrayLike | None = None,
    progress: Progress = no_progress,
) -> dict[str, Check]:
    """Judge every aligned projection by what all projections of one object share.

    Parameters
    ----------
    data : (n, y, x) array
        Absorbance, air at zero.
    theta_deg : (n,) array
        Degrees.
    alignment : Alignment
        Of these projections, in pixels of `data`.
    variance : (n,) array, optional
        Of a pixel.
    progress : callable
        See `Progress`.

    Returns
    -------
    dict of str to Check
        ``mass_deviation``: mass of the rows that every projection shows over its median, minus one (Helgason-Ludwig
        condition of order 0, doi 10.1002/cpa.3160190207). ``moment_deviation_px``: centre of mass minus the best
        ``c + a cos(theta) + b sin(theta)`` (order 1). ``frc_px``: half the period at which the Fourier ring
        correlation with the held-out reprojection falls below the 1/2-bit curve (doi 10.1016/j.jsb.2005.05.009); no
        resolution of the maps: the reprojection has half of the angles. NaN where there is no crossing.
    """
    stack = np.ascontiguousarray(data, dtype=np.float32)
    theta = np.asarray(theta_deg, dtype=float)
    if stack.ndim != 3 or theta.shape != stack.shape[:1]:
        raise ValueError(f"data: expected (n, y, x) with one angle each, got {stack.shape} and {theta.shape} angles")
    n, height, width = stack.shape
    placed = place(stack, alignment)
    low = max(0, int(np.ceil(-np.nanmin(alignment.shift[:, 0]))) + 2)
    high = min(height, height - int(np.ceil(np.nanmax(alignment.shift[:, 0]))) - 2)
    rows = slice(low, high) if high - low > height // 4 else slice(0, height)
    profile = placed[:, rows].sum(axis=1, dtype=np.float64)
    mass = profile.sum(axis=1)
    typical = float(np.median(mass))
    x = np.arange(width) - (width - 1) / 2
    center = (profile @ x) / np.where(mass > 0, mass, np.nan)
    t = np.deg2rad(theta)
    basis = np.stack([np.ones(n), np.cos(t), np.sin(t)], axis=1)
    good = np.isfinite(center)
    rest = np.full(n, np.nan)
    for _ in range(3):  # twice more without what stands out
        if good.sum() < 4:
            break
        fit = np.linalg.lstsq(basis[good], center[good], rcond=None)[0]
        rest = center - basis @ fit
        spread = 1.4826 * float(np.nanmedian(np.abs(rest[good] - np.nanmedian(rest[good])))) + 1e-12
        good = np.abs(rest) < 5 * spread
    noise = 0.0 if variance is None else float(np.median(np.asarray(variance, dtype=float)))
    pixels = (rows.stop - rows.start) * width
    sigma_mass = np.sqrt(noise * pixels) / max(abs(typical), 1e-12)
    sigma_center = np.sqrt(noise * pixels * float(np.mean(x**2))) / max(abs(typical), 1e-12)
    deviation = mass / typical - 1 if typical > 0 else np.full(n, np.nan)
    return {
        "mass_deviation": Check(deviation, max(_scatter(deviation), 5 * sigma_mass), ""),
        "moment_deviation_px": Check(rest, max(_scatter(rest), 5 * sigma_center), "px"),
        "frc_px": _rings(placed[:, rows], _held_out(placed, theta, progress)[:, rows]),
    }


def _scatter(values: FloatArray) -> float:
    """Five robust standard deviations."""
    centre = np.nanmedian(values) if np.isfinite(values).any() else 0.0
    return 5 * 1.4826 * float(np.nanmedian(np.abs(values - centre))) if np.isfinite(values).any() else 0.0


def half_bit(count: npt.ArrayLike) -> FloatArray:
    """Return the 1/2-bit threshold of rings of `count` independent Fourier coefficients."""
    root = np.sqrt(np.maximum(np.asarray(count, dtype=float), 1.0))
    return np.asarray((0.2071 + 1.9102 / root) / (1.2071 + 0.9102 / root))


def ring_correlation(first: npt.ArrayLike, second: npt.ArrayLike) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return frequency (cycles/px), Fourier ring correlation (n, rings) and independent coefficients per ring.

    Parameters
    ----------
    first, second : (n, y, x) arrays
        Compared frame by frame, under a Hann window.
    """
    from scipy.fft import fft2, fftfreq

    a, b = (np.asarray(v, dtype=np.float32) for v in (first, second))
    n, h, w = a.shape
    window = (np.hanning(h + 2)[1:-1, None] * np.hanning(w + 2)[None, 1:-1]).astype(np.float32)
    size = min(h, w)
    radius = np.hypot(fftfreq(h)[:, None], fftfreq(w)[None, :])
    ring = np.minimum(np.rint(radius * size).astype(int), size // 2 + 1).ravel()
    # The window makes neighbouring coefficients depend on each other; a real image has every coefficient twice.
    share = float(np.mean(window**2) ** 2 / np.mean(window**4)) / 2
    count = np.bincount(ring, minlength=size // 2 + 2)[: size // 2 + 1] * share
    out = np.zeros((n, size // 2 + 1))
    for i in range(n):
        fa, fb = (fft2((f[i] - f[i].mean()) * window).ravel() for f in (a, b))
        sums = [
            np.bincount(ring, v, size // 2 + 2)[: size // 2 + 1]
            for v in ((fa * fb.conj()).real, np.abs(fa) ** 2, np.abs(fb) ** 2)
        ]
        out[i] = sums[0] / np.sqrt(np.maximum(sums[1] * sums[2], 1e-30))
    return np.arange(size // 2 + 1) / size, out, count


def _rings(placed: F32, model: F32) -> Check:
    frequency, curve, count = ring_correlation(placed, model)
    below = curve < half_bit(count)[None, :]
    below[:, :2] = False
    values = np.full(len(placed), np.nan)
    for i in np.flatnonzero(below.any(axis=1)):
        k = int(below[i].argmax())
        values[i] = 0.5 / frequency[k]
    typical = float(np.nanmedian(values)) if np.isfinite(values).any() else 0.0
    return Check(values, typical + max(_scatter(values), 0.25 * typical), "px")


def sinogram(
    scan: EnergyScan, air: npt.ArrayLike, shift: npt.ArrayLike, row: int, beam: Beam | None = None
) -> tuple[F32, npt.NDArray[np.intp]]:
    """Return one row of the object at every angle, ``(n, x)``, sideways as it was recorded, and the n projections.

    Parameters
    ----------
    scan : EnergyScan
    air : (all projections, 3 or 6) array
        Air; see `air.plane`.
    shift : (all projections, 2) array
        ``[dy, dx]`` found; only dy is undone, so that the row is the same part of the object everywhere.
    row : int
        Row of the common grid.
    beam : Beam, optional
        What the counts are divided by; the plain flats of every half unless given.
    """
    height, width = scan.frames.frame_shape
    moved = np.asarray(shift, dtype=float)
    planes = np.nan_to_num(np.asarray(air, dtype=float))
    if not 0 <= row < height:
        raise XanesTomoError(f"sinogram: expected a row from 0 to {height - 1}, got {row}")
    use = np.flatnonzero(scan.usable & np.isfinite(moved[:, 0]))
    out = np.zeros((len(use), width), dtype=np.float32)
    beam = own_beam(scan) if beam is None else beam
    images = beam.basis((0, height))[0]
    for i, number in enumerate(use):
        at = row + moved[number, 0]
        y0 = int(np.clip(np.floor(at), 0, height - 2))
        part = float(np.clip(at - y0, 0, 1))
        two = read_absorbance(
            scan, beam, [int(number)], (y0, y0 + 2), air=planes, basis=images[:, y0 : y0 + 2], threads=1
        )
        out[i] = (1 - part) * two[0, 0] + part * two[0, 1]
    return out, use


def edge_traces(sinogram: npt.ArrayLike, theta_deg: npt.ArrayLike, shift_x: npt.ArrayLike) -> FloatArray:
    """Return ``(n, 3)`` columns: left edge, rotation axis and right edge of a rigid object moved by `shift_x`.

    The edges of the sinogram, the shifts taken out, are fitted by a smooth curve in the angle (the support function of
    the slice, a few harmonics), and the shifts put back: where trace and picture part, the shift is wrong.

    Parameters
    ----------
    sinogram : (n, x) array
        Absorbance, zero in the air.
    theta_deg, shift_x : (n,) arrays
        Degrees; displacement of the content found, columns.

    Notes
    -----
    The right edge at theta is minus the left one half a turn on, so both are one function over the full turn.
    """
    from scipy.ndimage import gaussian_filter1d

    data = np.asarray(sinogram, dtype=float)
    t, moved = np.deg2rad(np.asarray(theta_deg, dtype=float)), np.asarray(shift_x, dtype=float)
    n, width = data.shape
    middle = (width - 1) / 2
    smooth = gaussian_filter1d(data, 1.0, axis=1)
    body = smooth > 0.25 * np.percentile(smooth, 95)
    out = np.full((n, 3), np.nan)
    out[:, 1] = middle + moved
    seen = body.any(axis=1) & np.isfinite(moved)
    if seen.sum() < 4 * _HARMONICS:
        return out
    left = body.argmax(axis=1) - middle - moved
    right = width - 1 - body[:, ::-1].argmax(axis=1) - middle - moved
    angle = np.concatenate([t[seen], t[seen] + np.pi])
    value = np.concatenate([right[seen], -left[seen]])

    def basis(a: FloatArray) -> FloatArray:
        columns = [np.ones_like(a)]
        for k in range(1, _HARMONICS + 1):
            columns += [np.cos(k * a), np.sin(k * a)]
        return np.stack(columns, axis=1)

    keep = np.ones(len(value), dtype=bool)
    fit: FloatArray = np.zeros(2 * _HARMONICS + 1)
    for _ in range(3):  # twice more without what stands out: specks beside the object
        fit = np.linalg.lstsq(basis(angle[keep]), value[keep], rcond=None)[0]
        rest = value - basis(angle) @ fit
        spread = 1.4826 * np.median(np.abs(rest)) + 1e-9
        keep = np.abs(rest) < 4 * spread
    out[:, 2] = middle + moved + basis(t) @ fit
    out[:, 0] = middle + moved - basis(t + np.pi) @ fit
    return out
