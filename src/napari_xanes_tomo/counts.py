"""From counts to absorbance, pixel by pixel: compiled, threaded over frames, one rounding whatever the threads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numba as nb
import numpy as np
import numpy.typing as npt

from .detector import Detector
from .flats import Beam, exposures, flat_for
from .model import EnergyScan, FloatArray
from .parallel import in_threads

__all__ = [
    "FLOOR",
    "absorbance",
    "absorbance_variance",
    "fill_masked",
    "log_beams",
    "log_binned",
    "mean_binned",
    "mean_counts",
    "own_beam",
    "read_absorbance",
]

F32 = npt.NDArray[np.float32]
_F = TypeVar("_F", bound=Callable[..., Any])

FLOOR = 0.5  # a pixel without counts is taken as half a count


def _jit(function: _F) -> _F:
    """Compile for the machine at first use, kept on disk, without the GIL."""
    return cast(_F, nb.njit(cache=True, nogil=True, fastmath={"contract", "reassoc"})(function))


# ------------------------------------------------------------------------------------------------------- kernels


@_jit
def _minus_log(ratio: Any, bits: Any, mantissa: Any, mantissa_bits: Any, out: Any) -> None:
    """``-ln`` of a row of positive float32 numbers (their bits as int32 beside them), within 1.2e-7 of the exact one.

    The polynomial of Cephes (S. Moshier), which vectorises; NaN and infinity stay what they are.
    """
    for j in range(ratio.size):
        e = (bits[j] - np.int32(0x3F3504F3)) >> np.int32(23)
        mantissa_bits[j] = bits[j] - (e << np.int32(23))
        f = mantissa[j] - np.float32(1.0)
        k = np.float32(e)
        z = f * f
        y = np.float32(7.0376836292e-2) * f - np.float32(1.1514610310e-1)
        y = y * f + np.float32(1.1676998740e-1)
        y = y * f - np.float32(1.2420140846e-1)
        y = y * f + np.float32(1.4249322787e-1)
        y = y * f - np.float32(1.6668057665e-1)
        y = y * f + np.float32(2.0000714765e-1)
        y = y * f - np.float32(2.4999993993e-1)
        y = y * f + np.float32(3.3333331174e-1)
        y = y * f * z
        y = y - np.float32(2.12194440e-4) * k
        y = y - np.float32(0.5) * z
        value = f + y + np.float32(0.693359375) * k
        out[j] = -value if ratio[j] < np.float32(3.0e38) else -ratio[j]


@_jit
def _absorb(
    first: int, end: int, counts: Any, seconds: Any, stray: Any, basis: Any, weights: Any, air: Any, y0: int,
    height: int, out: Any,
) -> None:  # fmt: skip
    """Absorbance of frames ``first .. end`` of (n, rows, x) counts, the air subtracted; 0 where the beam is dark."""
    _, rows, width = counts.shape
    ratio = np.empty(width, dtype=np.float32)
    bits = ratio.view(np.int32)
    mantissa = np.empty(width, dtype=np.float32)
    mantissa_bits = mantissa.view(np.int32)
    beam = np.empty(width, dtype=np.float32)
    floor = np.float32(0.5)
    half = np.float32(width / 2)
    curved = air.shape[1] == 6
    for i in range(first, end):
        t = np.float32(seconds[i])
        s = np.float32(stray[i])
        for y in range(rows):
            beam[:] = np.float32(0.0)
            for k in range(weights.shape[1]):
                w = np.float32(weights[i, k])
                if w != np.float32(0.0):
                    for x in range(width):
                        beam[x] += w * basis[k, y, x]
            for x in range(width):
                c = max(np.float32(counts[i, y, x]) - s, floor)
                b = beam[x] * t
                ratio[x] = c / b if b > np.float32(0.0) else np.float32(1.0)
            _minus_log(ratio, bits, mantissa, mantissa_bits, out[i, y])
            if air.shape[1] == 0:
                continue
            v = np.float32(np.float32(y + y0 - (height - 1) / 2) / half)
            c0 = np.float32(air[i, 0]) + np.float32(air[i, 1]) * v
            c1 = np.float32(air[i, 2])
            c2 = np.float32(0.0)
            if curved:
                c0 += np.float32(air[i, 3]) * v * v
                c1 += np.float32(air[i, 4]) * v
                c2 = np.float32(air[i, 5])
            for x in range(width):
                u = np.float32(np.float32(x - (width - 1) / 2) / half)
                out[i, y, x] -= c0 + (c1 + c2 * u) * u


@_jit
def log_binned(counts: Any, stray: float, floor: float, ok: Any, bin: int, out: Any) -> None:
    """Mean of ``ln(max(counts - stray, floor))`` over the pixels `ok` of every bin; NaN where there is none.

    The logarithm of a product of up to 40 pixels stands for the sum of theirs.
    """
    rows, columns = out.shape
    width = columns * bin
    product = np.empty(width)
    number = np.empty(width)
    for v in range(rows):
        product[:] = 1.0
        number[:] = 0.0
        for y in range(v * bin, (v + 1) * bin):
            for x in range(width):
                value = max(float(counts[y, x]) - stray, floor)
                use = ok[y, x]
                product[x] *= value if use else 1.0
                number[x] += 1.0 if use else 0.0
        for u in range(columns):
            total = 0.0
            count = 0.0
            p = 1.0
            factors = 0
            for x in range(u * bin, (u + 1) * bin):
                p *= product[x]
                count += number[x]
                factors += bin
                if factors + bin > 40:
                    total += math.log(p)
                    p = 1.0
                    factors = 0
            if factors:
                total += math.log(p)
            out[v, u] = total / count if count > 0.5 else np.nan


@_jit
def mean_binned(frames: Any, ok: Any, bin: int, out: Any) -> None:
    """Mean of the pixels `ok` that are numbers over ``bin x bin`` of (n, y, x); NaN where fewer than a third are."""
    n, rows, columns = out.shape
    for i in range(n):
        for v in range(rows):
            for u in range(columns):
                total = 0.0
                count = 0
                for y in range(v * bin, (v + 1) * bin):
                    for x in range(u * bin, (u + 1) * bin):
                        value = float(frames[i, y, x])
                        if ok[y, x] and value - value == 0.0:
                            total += value
                            count += 1
                out[i, v, u] = total / count if 3 * count >= bin * bin else np.nan


@_jit
def mean_counts(counts: Any, ok: Any) -> tuple[float, float]:
    """Mean of the pixels `ok` of a frame, and of all of them."""
    total = 0.0
    whole = 0.0
    number = 0
    for y in range(counts.shape[0]):
        line = 0.0
        every = 0.0
        use = 0
        for x in range(counts.shape[1]):
            value = float(counts[y, x])
            every += value
            line += value if ok[y, x] else 0.0
            use += 1 if ok[y, x] else 0
        total += line
        whole += every
        number += use
    return total / max(number, 1), whole / max(counts.size, 1)


@_jit
def _fill(frames: Any, mask: Any) -> None:
    """See `fill_masked`."""
    n, height, width = frames.shape
    for y in range(height):
        x = 0
        while x < width:
            if not mask[y, x]:
                x += 1
                continue
            left = x - 1
            while x < width and mask[y, x]:
                x += 1
            right = x
            for i in range(n):
                if left < 0 and right >= width:
                    for c in range(width):
                        frames[i, y, c] = 0
                else:
                    a = frames[i, y, left] if left >= 0 else frames[i, y, right]
                    b = frames[i, y, right] if right < width else frames[i, y, left]
                    for c in range(left + 1, right):
                        part = (c - left) / (right - left)
                        frames[i, y, c] = a + (b - a) * part


@_jit
def _fill_rows(frames: Any, dark: Any) -> None:
    """Fill whole rows of (n, y, x) between the nearest good ones above and below, like the nearest at the ends."""
    n, height, width = frames.shape
    y = 0
    while y < height:
        if not dark[y]:
            y += 1
            continue
        above = y - 1
        while y < height and dark[y]:
            y += 1
        if above < 0 and y >= height:
            return
        for r in range(above + 1, y):
            part = np.float32((r - above) / (y - above))
            for i in range(n):
                for x in range(width):
                    a = frames[i, above, x] if above >= 0 else frames[i, y, x]
                    b = frames[i, y, x] if y < height else frames[i, above, x]
                    frames[i, r, x] = a + (b - a) * part


def _with_good_rows(dark: npt.NDArray[np.bool_], y0: int, y1: int) -> tuple[int, int]:
    """Widen rows ``y0 .. y1`` so that they begin and end at rows that are not dark, where there are such."""
    good = np.flatnonzero(~dark)
    before, behind = good[good < y0], good[good >= y1]
    first = int(before[-1]) if dark[y0] and len(before) else y0
    return first, int(behind[0]) + 1 if dark[y1 - 1] and len(behind) else y1


# -------------------------------------------------------------------------------------------- counts to absorbance


def absorbance(
    counts: npt.NDArray[Any],
    exposure_s: npt.ArrayLike,
    rate: npt.NDArray[np.floating[Any]],
    stray: npt.ArrayLike = 0.0,
) -> F32:
    """Return ``-ln(I / I0)``, natural logarithm, exposure-scaled.

    Parameters
    ----------
    counts : (n, y, x) array
        Recorded counts. A pixel without counts is taken as half a count.
    exposure_s : (n,) array
        Exposure of every frame, seconds.
    rate : (y, x) array
        Bare beam in counts per second; pixels that are dark there give 0.
    stray : (n,) array or float
        Stray light, counts, taken from every pixel first; `rate` is without it.
    """
    c = np.ascontiguousarray(counts)
    seconds = np.broadcast_to(np.asarray(exposure_s, dtype=float), len(c))
    taken = np.broadcast_to(np.asarray(stray, dtype=float), len(c))
    basis = np.ascontiguousarray(rate, dtype=np.float32)[None]
    out = np.empty(c.shape, dtype=np.float32)
    ones, none = np.ones((len(c), 1)), np.zeros((len(c), 0))
    _absorb(0, len(c), c, seconds.copy(), taken.copy(), basis, ones, none, 0, c.shape[1], out)
    return out


def absorbance_variance(
    counts: npt.NDArray[Any],
    exposure_s: npt.ArrayLike,
    rate: npt.NDArray[np.floating[Any]],
    detector: Detector,
    *,
    stray: npt.ArrayLike = 0.0,
    rate_variance: npt.NDArray[np.floating[Any]] | float = 0.0,
) -> F32:
    """Return the variance of `absorbance` of the same arguments, (n, y, x): photons, camera, and the flat's share.

    Parameters
    ----------
    counts, exposure_s, rate, stray
        See `absorbance`.
    detector : Detector
        Noise of the camera.
    rate_variance : (y, x) array or float
        Variance of `rate`, (counts per second) squared. All projections divided by one flat share its error.

    Notes
    -----
    ``(read + gain I) / (I - stray)^2 + var(rate) / rate^2``: counts carry the noise of the stray light among them.
    Taken from the counts of the pixel itself it is noisy; averages of it are not.
    """
    c = np.asarray(counts, dtype=np.float32)
    taken = np.broadcast_to(np.asarray(stray, dtype=np.float32), len(c))[:, None, None]
    signal = np.maximum(c - taken, np.float32(FLOOR))
    lit = np.asarray(rate) > 0
    share = np.where(lit, np.asarray(rate_variance) / np.where(lit, rate, 1) ** 2, 0).astype(np.float32)
    out = detector.variance(c).astype(np.float32) / signal**2 + share
    return np.asarray(np.where(lit, out, 0), dtype=np.float32)


def fill_masked(frames: F32, mask: npt.NDArray[np.bool_]) -> None:
    """Replace masked pixels of (n, y, x) frames, in place, along their row: between the nearest good ones, else 0.

    Parameters
    ----------
    frames : (n, y, x) array
    mask : (y, x) bool array
        True where the camera is not to be trusted.
    """
    if mask.any():
        _fill(frames, np.ascontiguousarray(mask))


def own_beam(scan: EnergyScan) -> Beam:
    """Return the plain beam: every half divided by its own flats, no stray light, no mask."""
    used = sorted({flat_for(scan, int(h)) for h in np.unique(scan.half)})
    shots = [(k, i) for k, u in enumerate(used) for i, s in enumerate(scan.flats[u].status) if s == "ok"]
    mixing = np.array([[1.0 if k == j else 0.0 for k, _ in shots] for j in range(len(used))])
    mixing /= mixing.sum(axis=1, keepdims=True)
    weights = np.zeros((len(scan), len(used)))
    weights[np.arange(len(scan)), [used.index(flat_for(scan, int(h))) for h in scan.half]] = 1
    sources = tuple(scan.flats[u] for u in used)
    origins = tuple((0, u) for u in used)
    zeros = np.zeros(len(shots))
    return Beam(sources, origins, np.array(shots, dtype=np.intp), mixing, weights, np.zeros(len(scan)), zeros)


def read_absorbance(
    scan: EnergyScan,
    beam: Beam | None,
    index: Sequence[int] | npt.NDArray[np.intp],
    rows: tuple[int, int],
    *,
    air: FloatArray | None = None,
    mask: npt.NDArray[np.bool_] | None = None,
    basis: F32 | None = None,
    threads: int | None = None,
) -> F32:
    """Read rows of projections as absorbance, (n, rows, x): the one way from files to what is reconstructed.

    Bad pixels are filled along their row, rows without a good pixel from the nearest rows that have some.

    Parameters
    ----------
    scan : EnergyScan
    beam : Beam or None
        What to divide by, with stray light and bad pixels; the plain flats of every half unless given.
    index : (n,) numbers of projections
    rows : (int, int)
        First and last + 1 row of the camera.
    air : (all projections, 3 or 6) array, optional
        Air to subtract; see `plane`.
    mask : (y, x) bool array, optional
        Further pixels not to be trusted.
    basis : (k, rows, x) array, optional
        The basis images of the beam in these rows, where they were read before.
    threads : int, optional
    """
    use = own_beam(scan) if beam is None else beam
    numbers = np.asarray(index, dtype=np.intp)
    height, width = scan.frames.frame_shape
    y0, y1 = rows
    bad = use.mask((height, width)) if len(use.bad) else None
    if mask is not None:
        bad = mask if bad is None else bad | mask
    dark = None if bad is None else np.asarray(bad.all(axis=1))
    if dark is not None and y1 > y0 and dark[y0:y1].any():
        wide = _with_good_rows(dark, y0, y1)
        if wide != (y0, y1):
            whole = read_absorbance(scan, use, numbers, wide, air=air, mask=mask, threads=threads)
            return np.ascontiguousarray(whole[:, y0 - wide[0] : y1 - wide[0]])
    images = use.basis(rows)[0] if basis is None else basis
    seconds = exposures(scan.exposure_s)[numbers]
    stray, weights = use.stray[numbers], np.ascontiguousarray(use.weights[numbers])
    surface = np.zeros((len(numbers), 0)) if air is None else np.nan_to_num(np.asarray(air, dtype=float)[numbers])
    out = np.empty((len(numbers), y1 - y0, width), dtype=np.float32)
    cut = None if bad is None else np.ascontiguousarray(bad[y0:y1])

    def work(a: int, b: int) -> None:
        counts = np.ascontiguousarray(scan.frames.read_rows(numbers[a:b].tolist(), y0, y1))
        part = out[a:b]
        _absorb(
            0, b - a, counts, seconds[a:b], stray[a:b], images, weights[a:b], surface[a:b], y0, height, part
        )  # fmt: skip
        if cut is not None and cut.any():
            _fill(part, cut)
            if dark is not None and dark[y0:y1].any():
                _fill_rows(part, np.ascontiguousarray(dark[y0:y1]))

    in_threads(len(numbers), work, threads=threads)
    return out


def log_beams(
    images: F32, weights: FloatArray, ok: npt.NDArray[np.bool_], bin: int, threads: int | None
) -> tuple[F32, npt.NDArray[np.intp]]:
    """Return (u, y, x) means of ``ln(rate)`` per bin for every distinct row of weights, and which one a row has."""
    distinct, which = np.unique(weights, axis=0, return_inverse=True)
    _, h, w = images.shape
    out = np.empty((len(distinct), h // bin, w // bin), dtype=np.float32)

    def work(a: int, b: int) -> None:
        for i in range(a, b):
            rate = np.zeros((h, w), dtype=np.float32)
            for k in np.flatnonzero(distinct[i]):
                rate += np.float32(distinct[i, k]) * images[k]
            log_binned(rate, 0.0, 1e-3, ok, bin, out[i])

    in_threads(len(distinct), work, threads=threads)
    return out, which.reshape(-1)
