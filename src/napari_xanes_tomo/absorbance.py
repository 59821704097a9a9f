"""Counts to absorbance: flats, detector noise, the plane of air around the object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .model import EnergyScan, FlatSet, FloatArray, Progress, XanesTomoError, no_progress
from .recipe import AbsorbanceParameters

__all__ = [
    "Detector",
    "Flat",
    "Normalised",
    "absorbance",
    "bin_frames",
    "estimate_detector",
    "fill_masked",
    "fit_air",
    "flat_for",
    "mean_flat",
    "normalise",
    "plane",
]

_CHUNK = 16  # frames read and normalised at a time


@dataclass(frozen=True)
class Detector:
    """Noise of the camera: ``variance = read_variance + gain * counts`` (counts squared)."""

    gain: float
    read_variance: float


@dataclass(frozen=True)
class Flat:
    """The bare beam of one flat set.

    Attributes
    ----------
    rate : (y, x) array
        Counts per second.
    shots : int
        Number of shots averaged.
    exposure_s : float
        Mean exposure of a shot, seconds.
    """

    rate: npt.NDArray[np.float32]
    shots: int
    exposure_s: float


@dataclass(frozen=True)
class Normalised:
    """One tomogram as absorbance, binned for estimation.

    Attributes
    ----------
    data : (n, y, x) float32 array
        ``-ln(I / I0)`` of the usable projections, the air plane subtracted.
    variance : (n,) array
        Typical variance of a binned pixel behind the object.
    air : (n, 3) array
        Coefficients of the air plane subtracted; see `plane`.
    air_residual : (n,) array
        Standard deviation of what is left in the air.
    object_fraction : (n,) array
        Part of the frame that is not air.
    index : (n,) int array
        Number of every frame within its energy.
    bin : int
        Recorded pixels per binned pixel.
    frame_shape : (int, int)
        Shape of the recorded frame.
    """

    data: npt.NDArray[np.float32]
    variance: FloatArray
    air: FloatArray
    air_residual: FloatArray
    object_fraction: FloatArray
    index: npt.NDArray[np.intp]
    bin: int
    frame_shape: tuple[int, int]


def mean_flat(flats: FlatSet, rows: tuple[int, int] | None = None) -> Flat | None:
    """Average the readable shots of a flat set, each divided by its exposure.

    Parameters
    ----------
    flats : FlatSet
    rows : (int, int), optional
        First and last + 1 detector row; all by default.

    Returns
    -------
    Flat or None
        None when no shot can be read.
    """
    good = [i for i, s in enumerate(flats.status) if s == "ok"]
    if not good:
        return None
    y0, y1 = rows or (0, flats.frames.frame_shape[0])
    total = np.zeros((y1 - y0, flats.frames.frame_shape[1]), dtype=np.float64)
    for i in good:
        total += flats.frames.read_rows([i], y0, y1)[0] / float(flats.exposure_s[i])
    rate = (total / len(good)).astype(np.float32)
    return Flat(rate, len(good), float(np.mean(flats.exposure_s[good])))


def flat_for(scan: EnergyScan, half: int) -> int:
    """Return the flat set used for the projections of `half`: its own, else the nearest one with a shot."""
    usable = [k for k, f in enumerate(scan.flats) if any(s == "ok" for s in f.status)]
    if not usable:
        raise XanesTomoError(
            f"{scan.energy_ev:g} eV: expected at least one readable flat, got none; exclude this energy"
        )
    return min(usable, key=lambda k: (abs(k - half), k))


def absorbance(
    counts: npt.NDArray[Any], exposure_s: npt.ArrayLike, rate: npt.NDArray[np.floating[Any]]
) -> npt.NDArray[np.float32]:
    """Return ``-ln(I / I0)``, natural logarithm, exposure-scaled.

    Parameters
    ----------
    counts : (n, y, x) array
        Recorded counts. A pixel without counts is taken as half a count.
    exposure_s : (n,) array
        Exposure of every frame, seconds.
    rate : (y, x) array
        Bare beam in counts per second; pixels that are dark there give 0.
    """
    exposure = np.asarray(exposure_s, dtype=np.float32).reshape(-1, 1, 1)
    lit = np.asarray(rate) > 0
    expected = np.where(lit, rate, 1).astype(np.float32)[None] * exposure
    out: npt.NDArray[np.float32] = np.maximum(counts, np.float32(0.5), dtype=np.float32)
    np.divide(out, expected, out=out)
    np.log(out, out=out)
    np.negative(out, out=out)
    if not lit.all():
        out[:, ~lit] = 0
    return out


def fill_masked(frames: npt.NDArray[np.float32], mask: npt.NDArray[np.bool_]) -> None:
    """Replace masked pixels of (n, y, x) frames, in place, by the nearest good one of their row; 0 where there is none.

    Parameters
    ----------
    frames : (n, y, x) array
    mask : (y, x) bool array
        True where the camera is not to be trusted.
    """
    columns = np.arange(mask.shape[1])
    for y in np.flatnonzero(mask.any(axis=1)):
        good = np.flatnonzero(~mask[y])
        bad = np.flatnonzero(mask[y])
        if not len(good):
            frames[:, y] = 0
            continue
        at = np.clip(np.searchsorted(good, bad), 1, len(good) - 1) if len(good) > 1 else np.zeros(len(bad), dtype=int)
        left, right = good[np.maximum(at - 1, 0)], good[at]
        nearest = np.where(columns[bad] - left <= right - columns[bad], left, right)
        frames[:, y, bad] = frames[:, y, nearest]


def bin_frames(frames: npt.NDArray[Any], bin: int) -> npt.NDArray[np.float32]:
    """Average `bin` x `bin` pixels of (n, y, x) frames; rows and columns left over are cut off."""
    if bin == 1:
        return np.asarray(frames, dtype=np.float32)
    n, h, w = frames.shape
    cut = frames[:, : h // bin * bin, : w // bin * bin]
    return np.asarray(cut.reshape(n, h // bin, bin, w // bin, bin).mean(axis=(2, 4)), dtype=np.float32)


def estimate_detector(flats: npt.NDArray[Any]) -> Detector:
    """Estimate gain and read noise from repeated flats by photon transfer (Janesick 2007, ISBN 9780819467225).

    Parameters
    ----------
    flats : (shots, y, x) array
        At least two shots of the same field, counts. Changes of the beam between shots are scaled out.
    """
    f = np.asarray(flats, dtype=np.float64)
    if len(f) < 2:
        return Detector(1.0, 0.0)
    f = f * (f.mean() / np.maximum(f.mean(axis=(1, 2), keepdims=True), 1e-9))
    mean, variance = f.mean(axis=0).ravel(), f.var(axis=0, ddof=1).ravel()
    edges = np.quantile(mean, np.linspace(0, 1, 33))
    which = np.clip(np.searchsorted(edges, mean, side="right") - 1, 0, 31)
    count = np.maximum(np.bincount(which, minlength=32), 1)
    x = np.bincount(which, mean, 32) / count
    v = np.bincount(which, variance, 32) / count
    weight = count / np.maximum(v, 1e-9) ** 2
    design = np.stack([np.ones_like(x), x], axis=1)
    normal = design.T @ (weight[:, None] * design)
    try:
        read, gain = np.linalg.solve(normal, design.T @ (weight * v))
    except np.linalg.LinAlgError:
        read, gain = 0.0, -1.0
    if gain <= 0 or read < 0:  # a field too even to tell the two apart: all of it is photon noise
        read, gain = 0.0, float(np.sum(weight * v * x) / max(np.sum(weight * x * x), 1e-30))
    return Detector(max(float(gain), 1e-6), float(read))


def plane(coefficients: npt.ArrayLike, shape: tuple[int, int], rows: tuple[int, int] | None = None) -> FloatArray:
    """Evaluate air planes on a frame.

    Parameters
    ----------
    coefficients : (n, 3) array
        Level, slope in y, slope in x; y and x run from -1 to 1 over the width of the frame.
    shape : (int, int)
        Shape of the frame, of whatever binning.
    rows : (int, int), optional
        Only these rows of it.

    Returns
    -------
    (n, rows, columns) float32 array
    """
    c = np.asarray(coefficients, dtype=np.float32)
    h, w = shape
    y0, y1 = rows or (0, h)
    y = ((np.arange(y0, y1) - (h - 1) / 2) / (w / 2)).astype(np.float32)
    x = ((np.arange(w) - (w - 1) / 2) / (w / 2)).astype(np.float32)
    return np.asarray(c[:, 0, None, None] + c[:, 1, None, None] * y[:, None] + c[:, 2, None, None] * x[None, :])


def fit_air(frames: npt.NDArray[np.float32], margin_px: float) -> tuple[FloatArray, FloatArray, npt.NDArray[np.bool_]]:
    """Fit a plane to the air around the object in every projection.

    What counts as air is found from the frame itself: everything that does not rise above its noise, kept
    `margin_px` away from what does.

    Parameters
    ----------
    frames : (n, y, x) float32 array
        Absorbance.
    margin_px : float
        Distance kept from the object, pixels of these frames.

    Returns
    -------
    coefficients : (n, 3) array
        See `plane`.
    residual : (n,) array
        Standard deviation of the air about its plane; NaN where there is too little air for a fit (the plane is
        zero then).
    object_mask : (n, y, x) bool array
        What is not air.
    """
    from scipy.ndimage import binary_dilation, gaussian_filter

    n, h, w = frames.shape
    y = ((np.arange(h) - (h - 1) / 2) / (w / 2))[:, None] * np.ones((1, w))
    x = ((np.arange(w) - (w - 1) / 2) / (w / 2))[None, :] * np.ones((h, 1))
    design = np.stack([np.ones(h * w), y.ravel(), x.ravel()], axis=1)
    reach = max(1, int(np.ceil(margin_px)))
    grid = np.ogrid[tuple(slice(-reach, reach + 1) for _ in range(2))]
    disk = grid[0] ** 2 + grid[1] ** 2 <= max(margin_px, 1.0) ** 2
    border = np.zeros((h, w), dtype=bool)
    edge = max(1, round(0.04 * min(h, w)))
    border[:edge] = border[-edge:] = True
    border[:, :edge] = border[:, -edge:] = True
    coefficients = np.zeros((n, 3))
    residual = np.full(n, np.nan)
    masks = np.ones((n, h, w), dtype=bool)
    for i, frame in enumerate(frames):
        flat = frame.ravel().astype(np.float64)
        # The first plane: a robust fit to the border of the frame; part of the object may touch it.
        use = border.ravel() & np.isfinite(flat)
        c = _trimmed_plane(design[use], flat[use])
        smooth = gaussian_filter(frame, 1.0)
        air = np.zeros((h, w), dtype=bool)
        for _ in range(4):
            rest = smooth - (design @ c).reshape(h, w)
            quiet = rest[border] if not air.any() else rest[air]
            centre = np.median(quiet)
            spread = 1.4826 * np.median(np.abs(quiet - centre)) + 1e-9
            body = rest > centre + 4.0 * spread
            body = _without_specks(body)
            new = ~binary_dilation(body, disk) & np.isfinite(frame)
            if np.array_equal(new, air):
                break
            air = new
            if air.sum() < 0.02 * h * w:
                break
            use = air.ravel()
            c = _trimmed_plane(design[use], flat[use])
        if air.sum() >= 0.02 * h * w:
            coefficients[i] = c
            residual[i] = float(np.std((flat - design @ c)[air.ravel()]))
            masks[i] = ~air
    return coefficients, residual, masks


def _without_specks(body: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Drop single pixels: noise that crossed the threshold."""
    from scipy.ndimage import label

    labels, count = label(body)
    if count == 0:
        return body
    size = np.bincount(labels.ravel())
    size[0] = 0
    return np.asarray((size >= 4)[labels])


def _trimmed_plane(design: FloatArray, values: FloatArray) -> FloatArray:
    """Least squares, then twice more without what lies beyond 2.5 robust standard deviations."""
    keep = np.ones(len(values), dtype=bool)
    c: FloatArray = np.zeros(3)
    for _ in range(3):
        if keep.sum() < 8:
            break
        c = np.linalg.lstsq(design[keep], values[keep], rcond=None)[0]
        rest = values - design @ c
        centre = np.median(rest[keep])
        spread = 1.4826 * np.median(np.abs(rest[keep] - centre)) + 1e-12
        keep = np.abs(rest - centre) < 2.5 * spread
    return np.asarray(c)


def normalise(
    scan: EnergyScan,
    parameters: AbsorbanceParameters,
    *,
    bin: int = 1,
    air: FloatArray | None = None,
    mask: npt.NDArray[np.bool_] | None = None,
    progress: Progress = no_progress,
) -> Normalised:
    """Read one energy and turn it into binned absorbance.

    Each half of the scan is divided by its own flats, frames are scaled by their exposures, and the plane fitted
    to the air is subtracted.

    Parameters
    ----------
    scan : EnergyScan
    parameters : AbsorbanceParameters
    bin : int
        Recorded pixels per binned pixel, in both directions.
    air : (all projections, 3) array, optional
        Air planes found before; fitted unless given.
    mask : (y, x) bool array, optional
        True where the camera is not to be trusted; see `fill_masked`.
    progress : callable
        See `Progress`.

    Raises
    ------
    XanesTomoError
        The energy has no readable flat or no usable projection.
    """
    h, w = scan.frames.frame_shape
    index = np.flatnonzero(scan.usable)
    if len(index) == 0:
        raise XanesTomoError(f"{scan.energy_ev:g} eV: expected readable projections, got none")
    flats: dict[int, Flat] = {}
    for half in sorted({int(v) for v in scan.half[index]}):
        flat = mean_flat(scan.flats[flat_for(scan, half)])
        assert flat is not None  # flat_for only names sets with a readable shot
        flats[half] = flat
    detector = scan_detector(scan)
    hb, wb = h // bin, w // bin
    data = np.empty((len(index), hb, wb), dtype=np.float32)
    variance: FloatArray = np.empty(len(index))
    for start in range(0, len(index), _CHUNK):
        part = index[start : start + _CHUNK]
        for half in sorted({int(v) for v in scan.half[part]}):
            flat = flats[half]
            sel = np.flatnonzero(scan.half[part] == half)
            counts = scan.frames.read_rows([int(i) for i in part[sel]], 0, h)
            a = absorbance(counts, scan.exposure_s[part[sel]], flat.rate)
            if mask is not None:
                fill_masked(a, mask)
            data[start + sel] = bin_frames(a, bin)
            typical = np.maximum(np.mean(counts, axis=(1, 2)), 1.0)
            beam = max(float(flat.rate.mean()) * flat.exposure_s, 1.0)
            variance[start + sel] = (
                (detector.read_variance + detector.gain * typical) / typical**2
                + (detector.read_variance + detector.gain * beam) / beam**2 / flat.shots
            ) / bin**2
        progress("absorbance", min(start + _CHUNK, len(index)), len(index))
    planes: Any = np.zeros((len(index), 3))
    residual: FloatArray = np.full(len(index), np.nan)
    fraction: FloatArray = np.ones(len(index))
    if air is not None:
        planes = np.asarray(air, dtype=float)[index]
        data -= plane(planes, (hb, wb))
    elif parameters.remove_air:
        coarse = max(1, wb // 64)
        small = bin_frames(data, coarse)
        margin = parameters.air_margin_px * small.shape[2] / 256
        planes, residual, masks = fit_air(small, margin)
        fraction = masks.mean(axis=(1, 2))
        data -= plane(planes, (hb, wb))
    return Normalised(data, variance, planes, residual, fraction, index, bin, (h, w))


def scan_detector(scan: EnergyScan) -> Detector:
    """Estimate the camera's noise from the first flat set of an energy that has two readable shots."""
    for flats in scan.flats:
        good = [i for i, s in enumerate(flats.status) if s == "ok"]
        if len(good) >= 2:
            return estimate_detector(flats.frames.read_rows(good, 0, flats.frames.frame_shape[0]))
    return Detector(1.0, 0.0)
