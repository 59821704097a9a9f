"""The camera as its own flats show it: gain and read noise, pixels not to be trusted, stray light in blocked rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numba as nb
import numpy as np
import numpy.typing as npt

from .model import FloatArray
from .parallel import share

__all__ = [
    "Detector",
    "bad_pixels",
    "blocked_pixels",
    "estimate_detector",
    "mask_from_runs",
    "mask_runs",
    "stray_counts",
    "stray_law",
]

Mask = npt.NDArray[np.bool_]
_F = TypeVar("_F", bound=Callable[..., Any])

_LEVELS = 32  # steps of brightness on the photon transfer curve
_SMOOTH_PX = 5  # what moves between two shots over more than this is pattern, not noise
_BLOCKED_BELOW = 0.08  # rows darker than this part of the field may be blocked
_FEWEST_BLOCKED = 200  # pixels that make a level


@dataclass(frozen=True)
class Detector:
    """Noise of the camera: ``variance = read_variance + gain * counts`` (counts squared).

    Attributes
    ----------
    gain : float
        Counts per quantum.
    read_variance : float
        Counts squared.
    source : {"flats", "one shot", "none"}
        ``one shot``: from the fine structure of a single flat, an upper limit. ``none``: nothing to go by.
    """

    gain: float
    read_variance: float
    source: str = "flats"

    def variance(self, counts: npt.ArrayLike) -> npt.NDArray[Any]:
        """Return the variance of recorded `counts`, counts squared."""
        return np.asarray(self.read_variance + self.gain * np.maximum(np.asarray(counts, dtype=np.float32), 0))


def _jit(function: _F) -> _F:
    """Compile for the machine at first use, kept on disk, without the GIL."""
    return cast(_F, nb.njit(cache=True, nogil=True)(function))


@_jit
def _around(values: Any, ok: Any, half: int) -> Any:
    """Mean of the pixels `ok` in a square of ``2 half + 1`` px around every pixel; 0 where there is none."""
    height, width = values.shape
    out = np.zeros((height, width), dtype=np.float32)
    column = np.zeros(width)
    number = np.zeros(width)
    for y in range(-half, height):
        enter = y + half
        leave = y - half - 1
        for x in range(width):
            if 0 <= enter < height and ok[enter, x]:
                column[x] += values[enter, x]
                number[x] += 1
            if leave >= 0 and ok[leave, x]:
                column[x] -= values[leave, x]
                number[x] -= 1
        if y < 0:
            continue
        total = 0.0
        count = 0.0
        for x in range(-half, width):
            if x + half < width:
                total += column[x + half]
                count += number[x + half]
            if x - half - 1 >= 0:
                total -= column[x - half - 1]
                count -= number[x - half - 1]
            if x >= 0 and count > 0.5:
                out[y, x] = total / count
    return out


def _without_slow(d: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Take out of (y, x) noise what changes slowly across the frame, and keep its variance."""
    half = min(_SMOOTH_PX, *d.shape) // 2
    if half < 1:
        return np.asarray(d - d.mean())
    slow = _around(d, np.ones(d.shape, dtype=np.bool_), half)
    return np.asarray((d - slow) / np.sqrt(1 - 1 / (2 * half + 1) ** 2), dtype=np.float32)


def _strips(shape: tuple[int, int]) -> list[slice]:
    """Rows that stand for the frame: all of a small one, strips of a large one, the last one included."""
    if shape[0] <= 320:
        return [slice(0, shape[0])]
    return [slice(y, min(y + 24, shape[0])) for y in range((shape[0] % 128) + 104, shape[0], 128)]


def _transfer(flats: npt.NDArray[Any]) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return mean counts, variance and degrees of freedom at up to 32 levels, from (shots, y, x) of one set.

    Neighbouring shots are scaled to each other and subtracted, so that neither the beam's drift nor what it moves
    slowly counts as noise; differences beyond 4.5 standard deviations (cosmic rays, dust on the move) are left out.
    """
    level = np.array([float(np.mean(f[:: max(1, len(f) // 256)], dtype=np.float64)) for f in flats])
    ok = level > 0
    flats, level = flats[ok], level[ok]
    xs, ds = [], []
    if len(flats) < 2:
        return np.zeros(0), np.zeros(0), np.zeros(0)
    typical = float(level.mean())
    pairs = len(flats) // 2 if len(flats) >= 4 else len(flats) - 1
    for rows in _strips(flats.shape[1:]):
        part = np.asarray(flats[:, rows], dtype=np.float32) * (typical / level)[:, None, None].astype(np.float32)
        xs.append(part.mean(axis=0).ravel())
        first = range(0, 2 * pairs, 2) if len(part) >= 4 else range(pairs)
        ds.append(np.concatenate([_without_slow(part[k] - part[k + 1]).ravel() for k in first]))
    each = [np.tile(x, pairs) for x in xs]  # all differences of a strip belong to the same levels
    x, d = np.concatenate(each), np.concatenate(ds)
    edges = np.quantile(x[:: max(1, len(x) // 200_000)], np.linspace(0, 1, _LEVELS + 1)[1:-1])
    which = np.concatenate([np.tile(np.searchsorted(edges, v, side="right"), pairs) for v in xs])
    square = d.astype(np.float64) ** 2
    keep = np.isfinite(square)
    variance = np.zeros(_LEVELS)
    for _ in range(3):
        count = np.bincount(which[keep], minlength=_LEVELS)
        variance = np.bincount(which[keep], square[keep], _LEVELS) / np.maximum(count, 1)
        keep = square <= 4.5**2 * variance[which]
    count = np.bincount(which[keep], minlength=_LEVELS)
    mean = np.bincount(which[keep], x[keep], _LEVELS) / np.maximum(count, 1)
    good = count >= 16
    return mean[good], variance[good] / 2, count[good].astype(float)


def _line(x: FloatArray, v: FloatArray, n: FloatArray) -> tuple[float, float]:
    """Return read variance and gain: the line through the transfer curve, levels weighted by what they are known to."""
    design = np.stack([np.ones_like(x), x], axis=1)
    fitted = np.maximum(v, 1e-9)
    read, gain = 0.0, -1.0
    for _ in range(3):
        weight = n / fitted**2
        normal = design.T @ (weight[:, None] * design)
        if np.linalg.cond(normal) > 1e14:
            break
        read, gain = (float(c) for c in np.linalg.solve(normal, design.T @ (weight * v)))
        fitted = np.maximum(read + gain * x, 0.05 * np.maximum(v, 1e-9))
    if gain <= 0 or read < 0:  # a field too even to tell the two apart: all of it is photon noise
        weight = n / np.maximum(v, 1e-9) ** 2
        read, gain = 0.0, float(np.sum(weight * v * x) / max(float(np.sum(weight * x * x)), 1e-30))
    return read, gain


def estimate_detector(*sets: npt.NDArray[Any]) -> Detector:
    """Estimate gain and read noise from repeated flats by photon transfer (Janesick 2007, ISBN 9780819467225).

    Parameters
    ----------
    *sets : (shots, y, x) arrays
        Shots of the same field in the order they were taken, counts. Shots of different arrays are not compared
        with each other unless none has two.

    Returns
    -------
    Detector
        From a single shot the fine structure of the frame is all there is to go by: an upper limit of the noise.
    """
    stacks = [np.asarray(s) for s in sets if len(s)]
    several = [s for s in stacks if len(s) >= 2]
    found: dict[int, tuple[FloatArray, FloatArray, FloatArray]] = {}
    share(range(len(several)), lambda k: found.__setitem__(k, _transfer(several[k])))
    curves = [found[k] for k in range(len(several))]
    if not curves and len(stacks) >= 2:
        curves = [_transfer(np.concatenate(stacks))]
    curves = [c for c in curves if len(c[0])]
    source = "flats"
    if not curves:
        lit = [s[0] for s in stacks if s[0].size and float(np.mean(s[0], dtype=np.float64)) > 0]
        if not lit:
            return Detector(1.0, 0.0, "none")
        frame = np.asarray(lit[0], dtype=np.float64)
        h, w = (n // 2 * 2 for n in frame.shape)
        q = frame[:h, :w].reshape(h // 2, 2, w // 2, 2)
        d = (q[:, 0, :, 0] - q[:, 0, :, 1] - q[:, 1, :, 0] + q[:, 1, :, 1]) / 2
        mean = q.mean(axis=(1, 3))
        lit_up = mean > 0
        gain = float(np.median(np.abs(d[lit_up]) / np.sqrt(mean[lit_up])) / 0.6745) ** 2 if lit_up.any() else 0.0
        return Detector(gain, 0.0, "one shot") if gain > 1e-9 else Detector(1.0, 0.0, "none")
    x, v, n = (np.concatenate(c) for c in zip(*curves, strict=True))
    read, gain = _line(x, v, n)
    return Detector(max(gain, 1e-6), read, source)


# ------------------------------------------------------------------------------------------------ pixels in doubt


def _grown(mask: Mask, half: int) -> Mask:
    """Widen a mask by `half` px in every direction."""
    if half < 1 or not mask.any():
        return mask
    return np.asarray(_around(mask.astype(np.float32), np.ones(mask.shape, dtype=np.bool_), half) > 1e-6)


def bad_pixels(
    rates: Sequence[npt.NDArray[np.floating[Any]]],
    variances: Sequence[npt.NDArray[np.floating[Any]]],
    *,
    dark_below: float,
    dust_depth: float,
) -> Mask:
    """Find the pixels of the camera that are not to be trusted, from its flats.

    Parameters
    ----------
    rates : sequence of (y, x) arrays
        Mean of every flat set, counts per second.
    variances : sequence of (y, x) arrays
        Their variances.
    dark_below : float
        Pixels darker than this part of the field (its median) are masked, and their neighbours.
    dust_depth : float
        So are pixels that differ from their surroundings by more than this part, and by more than six times what is
        usual in this field: dust, dead and hot pixels; and pixels that changed from one set to the next by
        more than 3 % and six standard errors.

    Returns
    -------
    (y, x) bool array
        True where the camera is not to be trusted.
    """
    total = np.mean([np.asarray(r, dtype=np.float32) for r in rates], axis=0, dtype=np.float32)
    height, width = total.shape
    finite = np.isfinite(total)
    total = np.where(finite, total, np.float32(0))
    field = float(np.median(total))
    if not field > 0:
        return np.ones(total.shape, dtype=bool)
    everywhere = np.ones(total.shape, dtype=bool)
    # A shadow is dark over more than a few pixels; single dark ones are found as dust.
    shadow = _around(total, everywhere, 2 if min(height, width) >= 32 else 0) < dark_below * field
    shadow = _grown(shadow, max(1, width // 512))
    ok = finite & (total > 0) & ~shadow
    mask = ~ok
    half = max(2, width // 48)
    odd = np.zeros_like(mask)
    for _ in range(2):
        around = _around(total, ok & ~odd, half)
        rest = np.abs(np.where(ok, total / np.maximum(around, 1e-9) - 1, 0))
        # A field with a pattern of its own: what is no more than that is divided out by the flats.
        pattern = 1.4826 * float(np.median(rest[ok])) if ok.any() else 0.0
        odd = ok & (rest > max(dust_depth, 6 * pattern))
    # Where the field itself is steep, only what is odd against its nearest pixels counts.
    near = _around(total, ok, 2)
    mask |= _grown(odd & (np.abs(total - near) > 0.3 * dust_depth * near), 1)
    for a, b, va, vb in zip(rates[:-1], rates[1:], variances[:-1], variances[1:], strict=True):
        lit = ~mask & (np.asarray(a) > 0)
        base = np.where(lit, a, 1).astype(np.float32)
        ratio = np.where(lit, np.asarray(b) / base, 1).astype(np.float32)
        rest = ratio - _around(ratio, lit, half)
        error = np.sqrt(np.where(lit, (va + vb) / base**2, 0))
        mask |= lit & (np.abs(rest) > np.maximum(0.03, 6 * error))
    return np.asarray(mask)


def mask_runs(mask: Mask) -> npt.NDArray[np.int32]:
    """Return (m, 2) first pixel and length of every run of True, counting along the rows: a mask in few numbers."""
    flat = np.concatenate([[False], np.asarray(mask, dtype=bool).ravel(), [False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return np.stack([edges[0::2], edges[1::2] - edges[0::2]], axis=1).astype(np.int32)


def mask_from_runs(runs: npt.ArrayLike, shape: tuple[int, int]) -> Mask:
    """Return the (y, x) mask of `mask_runs`."""
    out = np.zeros(shape[0] * shape[1], dtype=bool)
    for first, length in np.asarray(runs, dtype=np.int64).reshape(-1, 2):
        out[first : first + length] = True
    return out.reshape(shape)


# ---------------------------------------------------------------------------------------------------- stray light


def blocked_pixels(flat: npt.NDArray[np.floating[Any]]) -> Mask | None:
    """Find the pixels behind the blocked rows at the upper or lower end of the frame.

    Parameters
    ----------
    flat : (y, x) array
        Mean flat, counts.

    Returns
    -------
    (y, x) bool array or None
        None where no rows are blocked: then nothing shows what stray light there is.
    """
    f = np.asarray(flat, dtype=float)
    height, width = f.shape
    profile = np.median(f, axis=1)
    field = float(np.median(f))
    if not field > 0:
        return None
    best: Mask | None = None
    for rows in (np.arange(height - 1, -1, -1), np.arange(height)):
        dark = profile[rows] < _BLOCKED_BELOW * field
        count = int(np.argmin(dark)) if not dark.all() else 0
        if count < 3 or count > height // 4:
            continue
        band = rows[:count]
        # The penumbra at its inner end is no plateau.
        floor = float(np.median(np.sort(profile[band])[: max(2, count // 2)]))
        plateau = band[profile[band] <= 1.25 * floor + 1e-9]
        inside = np.zeros(f.shape, dtype=bool)
        part = _row_means(f[plateau], 9 if width >= 64 else 1)
        inside[plateau] = part <= 1.4 * floor + 1e-9
        if inside.sum() >= min(_FEWEST_BLOCKED, 2 * width) and (best is None or inside.sum() > best.sum()):
            best = inside
    return best


def _row_means(values: FloatArray, size: int) -> FloatArray:
    from scipy.ndimage import uniform_filter1d

    return np.asarray(uniform_filter1d(values.mean(axis=0), size, mode="nearest"))[None, :].repeat(len(values), axis=0)


def stray_counts(frames: npt.NDArray[Any], blocked: Mask, y0: int = 0) -> FloatArray:
    """Return (n,) mean counts behind the blocked rows of (n, y, x) frames, the outermost 2 % on each side left out.

    Parameters
    ----------
    frames : (n, y, x) array
        Counts; may begin at row `y0` of the camera.
    blocked : (y, x) bool array
        Of the whole camera; see `blocked_pixels`.
    """
    values = np.sort(np.asarray(frames)[:, blocked[y0 : y0 + frames.shape[1]]].astype(np.float32), axis=1)
    cut = int(0.02 * values.shape[1])
    return np.asarray(values[:, cut : values.shape[1] - cut].mean(axis=1), dtype=float)


def stray_law(stray: npt.ArrayLike, field: npt.ArrayLike) -> tuple[float, float]:
    """Return ``(constant, fraction)`` of stray light = constant counts + fraction of the mean of the frame.

    Parameters
    ----------
    stray, field : (n,) arrays
        Counts behind the blocked rows, and mean counts, of flats and projections together.
    """
    s, f = np.asarray(stray, dtype=float), np.asarray(field, dtype=float)
    ok = np.isfinite(s) & np.isfinite(f)
    if ok.sum() < 2 or np.ptp(f[ok]) < 0.05 * max(float(np.mean(f[ok])), 1e-9):
        return (float(np.mean(s[ok])) if ok.any() else 0.0), 0.0
    fraction, constant = np.polyfit(f[ok], s[ok], 1)
    return float(constant), float(fraction)
