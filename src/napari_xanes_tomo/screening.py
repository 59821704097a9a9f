"""Bad projections: found on binned frames before anything is aligned, with the reason.

A projection is compared with the nearest usable ones before and behind it, which show almost the same object. Beam
loss, black and saturated frames and copies show in the counts; a flat in place of a projection in the mass; a frame
displaced by half the field in how far it lies from its neighbours; motion during the exposure in the energy of the
gradient along one direction (structure tensor, doi 10.1007/BF00336961) within what both frames show.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from .agreement import bin_frames, smooth
from .model import FloatArray
from .parallel import share

__all__ = ["CountsSeen", "Screening", "filled", "screen", "shows_something"]

F32 = npt.NDArray[np.float32]
_T = TypeVar("_T")

_NEIGHBOURS = 2  # on either side
_WIDTH = 128  # columns frames are brought to
_BLACK = 0.02  # of the typical counts
_LOST = 0.6
_EMPTY = 0.3  # of the typical mass
_PLATEAU = 0.002  # part of the frame that is exactly at its maximum
_FAR = 0.2  # of the width
_SHARP = 0.05  # least loss of gradient energy along one direction that is called blur
_CHANCE = 5.0  # robust standard deviations it must stand out by


@dataclass(frozen=True)
class CountsSeen:
    """What is kept of the counts of n recorded frames.

    Attributes
    ----------
    mean : (n,) array
        Counts.
    plateau : (n,) array
        Part of the pixels that are exactly at the frame's maximum, where far fewer are just below it; else 0.
    digest : (n,) uint64 array
        Equal for equal frames.
    """

    mean: FloatArray
    plateau: FloatArray
    digest: npt.NDArray[np.uint64]

    @classmethod
    def empty(cls, n: int) -> CountsSeen:
        """Return room for n frames."""
        return cls(np.zeros(n), np.zeros(n), np.zeros(n, dtype=np.uint64))

    def look(self, i: int, frame: npt.NDArray[np.generic]) -> None:
        """Take down frame i, (y, x) counts; its mean is set by whoever knows which pixels count."""
        from zlib import adler32, crc32

        top = frame.max()
        at_top = int(np.count_nonzero(frame == top))
        if at_top > _PLATEAU * frame.size and top > frame.min():
            below = int(np.count_nonzero((frame >= top - 3) & (frame < top))) / 3
            if at_top > 5 * below:
                self.plateau[i] = at_top / frame.size
        raw = np.ascontiguousarray(frame).view(np.uint8).ravel()
        self.digest[i] = (np.uint64(crc32(raw)) << np.uint64(32)) | np.uint64(adler32(raw))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Screening:
    """What `screen` found.

    Attributes
    ----------
    reasons : dict of int to str
        ``{row of the stack: why}`` of every bad projection.
    doubt : (n,) array
        How near each projection is to being called bad; from 1 on it is.
    scores : dict of str to (n,) array
        ``counts`` and ``mass`` relative to the neighbours, ``distance`` from them (parts of the width), ``sharpness``
        (least ratio of the gradient energy in any direction to that of the neighbours); NaN where not measured.
    """

    reasons: dict[int, str]
    doubt: FloatArray
    scores: dict[str, FloatArray] = field(default_factory=dict)


def screen(data: npt.ArrayLike, *, counts: CountsSeen | None = None) -> Screening:
    """Find bad projections of one tomogram.

    Parameters
    ----------
    data : (n, y, x) array
        Absorbance in the order of acquisition, air at zero.
    counts : CountsSeen, optional
        Of the same frames as recorded; without them lost beam, saturation and copies are not looked for.
    """
    stack = np.asarray(data, dtype=np.float32)
    if stack.ndim != 3:
        raise ValueError(f"data: expected (n, y, x), got {stack.shape}")
    n = len(stack)
    reasons: dict[int, str] = {}
    nan = np.full(n, np.nan)
    scores = {"counts": nan.copy(), "mass": nan.copy(), "distance": nan.copy(), "sharpness": nan.copy()}
    doubt = np.zeros(n)
    if n < 2 * _NEIGHBOURS + 1:
        return Screening(reasons, doubt, scores)
    for i in np.flatnonzero(~np.isfinite(stack).all(axis=(1, 2))).tolist():
        reasons[i] = "values that are no numbers"
    if counts is not None:
        scores["counts"] = _relative(counts.mean, set(reasons))
        for i in range(n):
            if counts.mean[i] < _BLACK * np.median(counts.mean):
                reasons.setdefault(i, "black")
            elif counts.plateau[i] > 0:
                reasons.setdefault(i, "saturated")
            elif scores["counts"][i] < _LOST:
                reasons.setdefault(i, "beam loss")
        doubt = np.maximum(doubt, _LOST / np.maximum(scores["counts"], 1e-3) * (scores["counts"] < 0.9))
    step = max(1, stack.shape[2] // _WIDTH)
    small = np.nan_to_num(bin_frames(stack, step))
    mass = small.sum(axis=(1, 2), dtype=np.float64)
    scores["mass"] = _relative(mass, set(reasons))
    for i in range(n):
        if not _EMPTY < scores["mass"][i] < 1 / _EMPTY:
            reasons.setdefault(i, "the object is not in it")
    good = np.array([i for i in range(n) if i not in reasons], dtype=np.intp)
    if len(good) < 2 * _NEIGHBOURS + 1:
        return Screening(reasons, np.maximum(doubt, [float(i in reasons) for i in range(n)]), scores)

    scene = _Scene(small, good)
    if counts is not None:
        for i in _copies(counts.digest, scene):
            reasons[i] = "duplicate"
        good = np.array([i for i in good if i not in reasons], dtype=np.intp)
        if len(good) < 2 * _NEIGHBOURS + 1:
            return Screening(reasons, np.maximum(doubt, [float(i in reasons) for i in range(n)]), scores)
        scene.good = good
    scene.compare_all()
    far = np.full(n, np.nan)
    for i in good.tolist():
        far[i] = np.sort([np.abs(v).max() for v in scene.lags(i)])[1] / small.shape[2]
        if far[i] > _FAR:
            reasons[i] = "displaced"
    scores["distance"] = far
    doubt = np.fmax(doubt, far / _FAR)
    good = np.array([i for i in good if i not in reasons], dtype=np.intp)
    if len(good) >= 2 * _NEIGHBOURS + 1:
        scene.good = good
        sharp = np.full(n, np.nan)
        sharp[good] = _each(scene.sharpness, good)
        scores["sharpness"] = sharp
        # Judged by the scatter of the frames around it: where an edge crosses the field they differ more.
        loss = np.full(n, np.nan)
        for i in good.tolist():
            k = int(np.searchsorted(good, i))
            spread = max(
                1.4826 * float(np.median(np.abs(sharp[part] - np.median(sharp[part]))))
                for part in (good, good[max(0, k - 7) : k + 8])
            )
            loss[i] = (float(np.median(sharp[good])) - sharp[i]) / max(_SHARP, _CHANCE * spread)
        doubt = np.fmax(doubt, loss)
        for i in good[loss[good] >= 1].tolist():
            reasons[i] = "motion-blurred"
    for i in reasons:
        doubt[i] = max(1.0, doubt[i])
    return Screening(dict(sorted(reasons.items())), np.asarray(doubt), scores)


def filled(data: npt.ArrayLike, theta_deg: npt.ArrayLike, lost: npt.ArrayLike) -> tuple[F32, npt.NDArray[np.bool_]]:
    """Return aligned projections with the lost ones interpolated in the angle, and which of them were filled.

    For reconstruction only: a lost projection that is filled costs a quarter of one that is left out.

    Parameters
    ----------
    data : (n, y, x) array
        Projections on the common grid.
    theta_deg : (n,) array
        Degrees.
    lost : (n,) bool array
        True where a projection is to be filled. One whose nearest usable neighbours do not lie on either side, or are
        more than three typical steps apart, is left as it is.
    """
    out = np.array(data, dtype=np.float32)
    theta, gone = np.asarray(theta_deg, dtype=float), np.asarray(lost, dtype=bool)
    if out.ndim != 3 or theta.shape != (len(out),) or gone.shape != (len(out),):
        raise ValueError(f"data: expected (n, y, x) with n angles and flags, got {out.shape}, {theta.shape}")
    done = np.zeros(len(out), dtype=bool)
    known = np.flatnonzero(~gone)
    if len(known) < 2:
        return out, done
    known = known[np.argsort(theta[known], kind="stable")]
    angles = theta[known]
    step = float(np.median(np.diff(np.sort(theta))))
    for i in np.flatnonzero(gone):
        k = int(np.searchsorted(angles, theta[i]))
        if not 0 < k < len(known) or angles[k] - angles[k - 1] > 3.5 * max(step, 1e-9):
            continue
        width = angles[k] - angles[k - 1]
        part = np.float32((theta[i] - angles[k - 1]) / width if width > 0 else 0.5)
        out[i] = (1 - part) * out[known[k - 1]] + part * out[known[k]]
        done[i] = True
    return out, done


# ---------------------------------------------------------------------------------------------------- comparisons


def _each(work: Callable[[int], _T], numbers: npt.NDArray[np.intp]) -> list[_T]:
    """`work` of every number, in their order, in plain threads."""
    done: dict[int, _T] = {}
    share(numbers.tolist(), lambda k: done.__setitem__(k, work(k)))
    return [done[k] for k in numbers.tolist()]


def _relative(values: FloatArray, without: set[int]) -> FloatArray:
    """Every value over the median of the 15 around it."""
    v = np.asarray(values, dtype=float).copy()
    v[list(without)] = np.nan
    out = np.full(len(v), np.nan)
    for i in range(len(v)):
        around = v[max(0, i - 7) : i + 8]
        if np.isfinite(around).any():
            typical = float(np.nanmedian(around))
            out[i] = values[i] / typical if typical > 0 else np.nan
    return out


class _Scene:
    """Frames and, for each of them, its usable neighbours."""

    def __init__(self, frames: F32, good: npt.NDArray[np.intp]) -> None:
        from scipy.fft import next_fast_len, rfft2

        self.frames, self.good = frames, good
        self.shape = frames.shape[1:]
        self.size = tuple(next_fast_len(2 * s, real=True) for s in self.shape)

        # Frames are compared by their outline and inner structure, free of what varies slowly.
        blurred = smooth(frames[good], 1.0)
        bands = blurred - smooth(frames[good], 0.06 * frames.shape[2])

        def prepare(k: int) -> tuple[npt.NDArray[np.complexfloating[Any]], F32]:
            gy, gx = np.gradient(blurred[k])
            return rfft2(bands[k], self.size, workers=1), np.stack([gy * gy, gx * gx, gy * gx])

        ready = _each(prepare, np.arange(len(good)))
        self.spectra = {int(i): r[0] for i, r in zip(good, ready, strict=True)}
        self.gradient = {int(i): r[1] for i, r in zip(good, ready, strict=True)}
        self.cache: dict[tuple[int, int], tuple[tuple[int, int], float]] = {}

    def neighbours(self, i: int) -> list[int]:
        k = int(np.searchsorted(self.good, i))
        before = self.good[max(0, k - _NEIGHBOURS) : k]
        behind = self.good[k + (k < len(self.good) and self.good[k] == i) :][:_NEIGHBOURS]
        missing = 2 * _NEIGHBOURS - len(before) - len(behind)
        if missing and len(before) < _NEIGHBOURS:
            behind = self.good[k + (k < len(self.good) and self.good[k] == i) :][: _NEIGHBOURS + missing]
        elif missing:
            before = self.good[max(0, k - _NEIGHBOURS - missing) : k]
        return [int(v) for v in (*before, *behind)]

    def lag(self, i: int, j: int) -> tuple[tuple[int, int], float]:
        """Displacement (y, x) of frame i from frame j, whole pixels, and how well they agree there (-1..1)."""
        from scipy.fft import irfft2

        key = (min(i, j), max(i, j))
        if key not in self.cache:
            a, b = self.spectra[key[0]], self.spectra[key[1]]
            cross = irfft2(a * np.conj(b), self.size, workers=1)
            at = np.unravel_index(int(np.argmax(cross)), cross.shape)
            lag = tuple(int(v) if v < s // 2 else int(v) - s for v, s in zip(at, self.size, strict=True))
            self.cache[key] = (lag[0], lag[1]), float(cross[at])
        (dy, dx), peak = self.cache[key]
        return ((dy, dx) if i <= j else (-dy, -dx)), peak

    def lags(self, i: int) -> list[tuple[int, int]]:
        return [self.lag(i, j)[0] for j in self.neighbours(i)]

    def compare_all(self) -> None:
        """Find the displacements of all frames from their neighbours, every pair once."""
        pairs = {(min(i, j), max(i, j)) for i in self.good.tolist() for j in self.neighbours(i)}
        share(sorted(pairs), lambda pair: self.lag(*pair))

    def likeness(self, i: int, j: int) -> float:
        """Correlation of two frames laid over each other."""
        lag, _ = self.lag(i, j)
        a, b = (self.frames[k][_overlap(self.shape, lag, k == i)].ravel() for k in (i, j))
        return float(np.corrcoef(a, b)[0, 1]) if a.size > 16 else -1.0

    def sharpness(self, i: int) -> float:
        """Least ratio of the gradient energy to the neighbours', over all directions, within what both show.

        A blur is everywhere, so that the best of several comparisons counts: with and without the strip along each
        border, where dark rows and the edge of a capillary come and go, and of the two sides the better one.
        """
        sides: dict[bool, list[float]] = {}
        for j in self.neighbours(i):
            lag, _ = self.lag(i, j)
            both = [self.gradient[k][(slice(None), *_overlap(self.shape, lag, k == i))] for k in (i, j)]
            (a, b, c), (p, q, r) = (_without_strips(gradient) for gradient in both)
            # The least eigenvalue of inv(theirs) mine, 2 x 2.
            det = np.maximum(p * q - r * r, 1e-30)
            half, product = 0.5 * (q * a + p * b - 2 * r * c) / det, (a * b - c * c) / det
            least = half - np.sqrt(np.maximum(half * half - product, 0.0))
            sides.setdefault(j < i, []).append(float(least.max()))
        return max(float(np.median(values)) for values in sides.values())


def _without_strips(gradient: F32) -> FloatArray:
    """Return the sums (3, 5) of (3, y, x): of all, and of all but an eighth at the top, bottom, left, right."""
    _, rows, columns = (max(1, n // 8) for n in gradient.shape)
    strips = (gradient[:, :rows], gradient[:, -rows:], gradient[:, :, :columns], gradient[:, :, -columns:])
    whole = gradient.sum(axis=(1, 2), dtype=float)
    return np.stack([whole, *(whole - strip.sum(axis=(1, 2), dtype=float) for strip in strips)], axis=1)


def _overlap(shape: tuple[int, ...], lag: tuple[int, int], first: bool) -> tuple[slice, slice]:
    """Rows and columns of a frame that the other one shows as well, a few pixels from the borders."""
    out = []
    for n, d in zip(shape, lag, strict=True):
        low, high = max(0, d), min(n, n + d)
        low, high = low + 2, max(low + 3, high - 2)
        out.append(slice(low, high) if first else slice(low - d, high - d))
    return out[0], out[1]


def _copies(digest: npt.NDArray[np.uint64], scene: _Scene) -> list[int]:
    """Return which of the frames that are equal do not belong where they are.

    Of frames taken one right after the other the later is the copy: a camera gives the last one again. Otherwise it is
    the one that is less like its neighbours.
    """
    same: dict[int, list[int]] = {}
    for i in scene.good.tolist():
        same.setdefault(int(digest[i]), []).append(i)
    out: list[int] = []
    for group in (g for g in same.values() if len(g) > 1):
        fits: list[float] = []
        if len(group) == 2 and scene.good.tolist().index(group[1]) == scene.good.tolist().index(group[0]) + 1:
            out.append(group[1])
            continue
        for i in group:
            others = [j for j in scene.neighbours(i) if j not in group]
            fits.append(float(np.mean([scene.likeness(i, j) for j in others])) if others else -1.0)
        own = group[int(np.argmax(fits))]
        out += [i for i in group if i != own]
    return out


def shows_something(frames: npt.ArrayLike, variance: npt.ArrayLike) -> bool:
    """Whether the projections of an energy together hold more than their noise.

    Parameters
    ----------
    frames : (n, y, x) array
        Absorbance.
    variance : (n,) array
        Of a pixel's noise in each.
    """
    from scipy.ndimage import gaussian_filter

    data = np.asarray(frames, dtype=np.float32)
    pick = np.unique(np.linspace(0, len(data) - 1, min(len(data), 60)).astype(int))
    noise = np.asarray(variance, dtype=float)[pick]
    noise = noise[np.isfinite(noise)]
    if not len(noise):
        return True
    blur = max(1.0, data.shape[2] / 64)
    middle = gaussian_filter(np.nan_to_num(np.median(data[pick], axis=0)), blur)
    # The flats' noise is the same in all projections: at worst that of four of them.
    variance_left = float(np.median(noise)) * (0.5 * np.pi / len(pick) + 0.25) / (4 * np.pi * blur**2)
    return bool(float(np.percentile(np.abs(middle - np.median(middle)), 99.5)) > 6 * np.sqrt(variance_left))
