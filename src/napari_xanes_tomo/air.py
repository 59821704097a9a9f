"""The air around the object: a smooth surface fitted to every projection, and what of a frame is air.

The object only ever adds absorbance, so the air is the lowest level of a frame that is smooth over a good part of it.
A surface is accepted by how many pixels lie *on* it, and rejected by how many lie *below* it: a capillary wall, a
support post or a particle at the border then stand above the air instead of bending the fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast

import numba as nb
import numpy as np
import numpy.typing as npt

from .model import FloatArray
from .parallel import in_threads, share

__all__ = ["dilated", "fit_air", "fit_surface", "plane", "terms"]

F32 = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Order = Literal["auto", "plane", "quadratic"]
_F = TypeVar("_F", bound=Callable[..., Any])

_TRIALS = 400  # planes through three places that are tried per frame
_LEAST_AIR = 0.02  # part of the frame
_FRAMES = 12  # that are looked at together
_AROUND = 12  # frames on either side of one, whose surfaces bend and twist as its own
_TWISTED = 6.0  # robust standard deviations from theirs
_LEAST_TWIST = 1e-3  # optical density, at half the width
_BELOW = 4.0  # what a pixel below the surface costs, in pixels on it


def _jit(function: _F) -> _F:
    """Compile for the machine at first use, kept on disk, without the GIL."""
    return cast(_F, nb.njit(cache=True, nogil=True)(function))


def terms(shape: tuple[int, int], count: int, rows: tuple[int, int] | None = None) -> FloatArray:
    """Return (count, rows, columns) terms of the surface: 1, y, x, and for 6 of them y^2, x y, x^2.

    y and x run from -1 to 1 over the width of the frame, 0 in its middle, whatever its binning.
    """
    h, w = shape
    y0, y1 = rows or (0, h)
    y = ((np.arange(y0, y1) - (h - 1) / 2) / (w / 2))[:, None]
    x = ((np.arange(w) - (w - 1) / 2) / (w / 2))[None, :]
    one = np.ones((y1 - y0, w))
    return np.stack([one, y * one, x * one, y * y * one, y * x, x * x * one][:count])


def plane(coefficients: npt.ArrayLike, shape: tuple[int, int], rows: tuple[int, int] | None = None) -> FloatArray:
    """Evaluate air surfaces on a frame.

    Parameters
    ----------
    coefficients : (n, 3) or (n, 6) array
        Level, slope in y, slope in x, and where the air is curved the factors of y^2, x y and x^2; y and x run from
        -1 to 1 over the width of the frame.
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
    y = ((np.arange(y0, y1) - (h - 1) / 2) / (w / 2)).astype(np.float32)[:, None]
    x = ((np.arange(w) - (w - 1) / 2) / (w / 2)).astype(np.float32)[None, :]
    out = c[:, 0, None, None] + c[:, 1, None, None] * y + c[:, 2, None, None] * x
    if c.shape[1] == 6:
        out = out + c[:, 3, None, None] * (y * y) + c[:, 4, None, None] * (y * x) + c[:, 5, None, None] * (x * x)
    return np.asarray(out)


@_jit
def _seek(
    first: int, end: int, values: Any, noise: Any, order: Any, places: Any, starts: Any, ys: Any, xs: Any, best: Any
) -> None:
    """Find for frames ``first .. end`` the plane with most pixels on it and fewest below.

    values (n, p) with NaN where there is nothing to go by; order (n, p) the pixels by their value; places (trials, 3)
    places in that order to lay a plane through; starts (n, s, 3) planes to try as well; best (n, 3) the answer.
    """
    pixels = values.shape[1]
    for i in range(first, end):
        v = values[i]
        s = noise[i]
        top = -1e30
        for t in range(places.shape[0] + starts.shape[1]):
            if t < starts.shape[1]:
                c0, c1, c2 = starts[i, t, 0], starts[i, t, 1], starts[i, t, 2]
            else:
                a = order[i, places[t - starts.shape[1], 0]]
                b = order[i, places[t - starts.shape[1], 1]]
                c = order[i, places[t - starts.shape[1], 2]]
                ya, yb, yc = ys[a], ys[b], ys[c]
                xa, xb, xc = xs[a], xs[b], xs[c]
                det = (yb - ya) * (xc - xa) - (yc - ya) * (xb - xa)
                if abs(det) < 0.05:
                    continue
                c1 = ((v[b] - v[a]) * (xc - xa) - (v[c] - v[a]) * (xb - xa)) / det
                c2 = ((yb - ya) * (v[c] - v[a]) - (yc - ya) * (v[b] - v[a])) / det
                c0 = v[a] - c1 * ya - c2 * xa
            if not (abs(c1) < 0.5 and abs(c2) < 0.5 and abs(c0) < 1e6):  # NaN as well
                continue
            score = -0.5 * pixels * math.sqrt(c1 * c1 + c2 * c2)  # of two explanations the one with less tilt
            for p0 in range(0, pixels, 64):
                if score + (pixels - p0) < top - 1e-6:  # not even if all the others lay on it
                    break
                for p in range(p0, min(p0 + 64, pixels)):
                    r = v[p] - c0 - c1 * ys[p] - c2 * xs[p]
                    if r < -4.0 * s:
                        score -= _BELOW
                    elif r < 2.5 * s:
                        score += 1.0 - 0.16 * (r / s) ** 2
            if score > top:
                top = score
                best[i, 0], best[i, 1], best[i, 2] = c0, c1, c2


@_jit
def _fit_frames(first: int, end: int, values: Any, keep: Any, design: Any, trim: float, out: Any) -> None:
    """Fit frames ``first .. end``; see `fit_surface`."""
    pixels, k = design.shape
    rest = np.empty(pixels)
    for i in range(first, end):
        limit = np.inf
        c = np.zeros(k)
        for again in range(3 if trim > 0 else 1):
            normal = np.zeros((k, k))
            right = np.zeros(k)
            for p in range(pixels):
                if not keep[i, p]:
                    continue
                v = values[i, p]
                if again:
                    r = v
                    for j in range(k):
                        r -= c[j] * design[p, j]
                    if abs(r) > limit:
                        continue
                for j in range(k):
                    right[j] += design[p, j] * v
                    for m in range(j + 1):
                        normal[j, m] += design[p, j] * design[p, m]
            for j in range(k):
                for m in range(j):
                    normal[m, j] = normal[j, m]
                normal[j, j] += 1e-9 * (1.0 + normal[0, 0])
            c = np.linalg.solve(normal, right)
            if trim > 0 and again < 2:
                count = 0
                for p in range(pixels):
                    if keep[i, p]:
                        r = values[i, p]
                        for j in range(k):
                            r -= c[j] * design[p, j]
                        rest[count] = abs(r)
                        count += 1
                if count == 0:
                    break
                limit = trim * (1.4826 * np.median(rest[:count]) + 1e-9)
        out[i] = c


@_jit
def _median_frames(first: int, end: int, values: Any, keep: Any, out: Any) -> None:
    """Median of the pixels kept of frames ``first .. end``; 0 where there is none."""
    held = np.empty(values.shape[1])
    for i in range(first, end):
        count = 0
        for p in range(values.shape[1]):
            if keep[i, p]:
                held[count] = values[i, p]
                count += 1
        out[i] = np.median(held[:count]) if count else 0.0


def fit_surface(
    values: FloatArray, keep: npt.NDArray[Any], design: FloatArray, *, trim: float = 0.0, threads: int | None = None
) -> FloatArray:
    """Fit every frame by least squares: (n, p) values and pixels kept, (p, k) terms give (n, k) coefficients.

    With `trim`, twice more without what lies beyond that many robust standard deviations.
    """
    v = np.ascontiguousarray(values, dtype=np.float64)
    use = np.ascontiguousarray(keep, dtype=np.bool_) & np.isfinite(v)
    d = np.ascontiguousarray(design, dtype=np.float64)
    out = np.zeros((len(v), d.shape[1]))
    in_threads(len(v), lambda a, b: _fit_frames(a, b, v, use, d, trim, out), threads=threads)
    return out


def _medians(values: FloatArray, keep: Mask) -> FloatArray:
    """Return (n,) medians of the pixels kept of (n, p) values."""
    v, k = np.ascontiguousarray(values, dtype=np.float64), np.ascontiguousarray(keep)
    out = np.zeros(len(v))
    in_threads(len(v), lambda a, b: _median_frames(a, b, v, k, out))
    return out


def _spread(rest: FloatArray, keep: Mask) -> FloatArray:
    """Return (n,) robust standard deviations of the pixels kept about 0."""
    return np.asarray(1.4826 * _medians(np.abs(rest), keep) + 1e-9)


@_jit
def _quiet_frames(first: int, end: int, smooth: Any, block: int, out: Any) -> None:
    """Find the standard deviation about a plane in the quietest tenth of the squares of `block` px of every frame."""
    _, h, w = smooth.shape
    step = max(1, block // 2)
    found = np.empty((h // step + 1) * (w // step + 1))
    middle = (block - 1) / 2
    lever = block * block * (block * block - 1) / 12.0
    for i in range(first, end):
        count = 0
        for y0 in range(0, h - block + 1, step):
            for x0 in range(0, w - block + 1, step):
                s = 0.0
                sy = 0.0
                sx = 0.0
                ss = 0.0
                for y in range(block):
                    for x in range(block):
                        v = smooth[i, y0 + y, x0 + x]
                        s += v
                        sy += v * (y - middle)
                        sx += v * (x - middle)
                        ss += v * v
                rest = ss - s * s / (block * block) - (sy * sy + sx * sx) / lever
                if rest - rest == 0.0:  # no NaN in it
                    found[count] = max(rest, 0.0) / (block * block - 3)
                    count += 1
        out[i] = math.sqrt(np.sort(found[:count])[count // 10]) if count else 0.0


def _level(smooth: FloatArray) -> FloatArray:
    """(n,) how far the quiet parts of smoothed frames are from smooth: noise, and what flats leave of their pattern."""
    out = np.zeros(len(smooth))
    values = np.ascontiguousarray(smooth, dtype=np.float64)
    block = max(5, min(smooth.shape[1:]) // 6)
    in_threads(len(values), lambda a, b: _quiet_frames(a, b, values, block, out))
    return np.maximum(out, 1e-4)


@_jit
def _drop_specks(masks: Any, fewest: int, out: Any) -> None:
    """See `_without_specks`; a group is followed until it is large enough or ends."""
    n, h, w = masks.shape
    todo = np.empty((h * w, 2), dtype=np.int32)
    seen = np.empty((h, w), dtype=np.bool_)
    for i in range(n):
        seen[:] = False
        for y0 in range(h):
            for x0 in range(w):
                if seen[y0, x0] or not masks[i, y0, x0]:
                    continue
                todo[0, 0], todo[0, 1] = y0, x0
                seen[y0, x0] = True
                count, at = 1, 0
                while at < count:
                    y, x = todo[at, 0], todo[at, 1]
                    at += 1
                    for v in range(max(0, y - 1), min(h, y + 2)):
                        for u in range(max(0, x - 1), min(w, x + 2)):
                            if masks[i, v, u] and not seen[v, u]:
                                seen[v, u] = True
                                todo[count, 0], todo[count, 1] = v, u
                                count += 1
                if count >= fewest:
                    for k in range(count):
                        out[i, todo[k, 0], todo[k, 1]] = True


def _without_specks(body: Mask, fewest: int) -> Mask:
    """Drop groups of fewer than `fewest` pixels from (n, y, x) masks: noise that crossed the threshold."""
    out = np.zeros(body.shape, dtype=bool)
    _drop_specks(np.ascontiguousarray(body), fewest, out)
    return out


@_jit
def _dilate_frames(first: int, end: int, masks: Any, radius: float, out: Any) -> None:
    """Widen the masks of frames ``first .. end`` by `radius` px."""
    _, h, w = masks.shape
    reach = int(math.ceil(radius))
    span = np.empty(2 * reach + 1, dtype=np.int64)
    for d in range(-reach, reach + 1):
        rest = radius * radius - d * d
        span[d + reach] = int(math.sqrt(rest)) if rest >= 0.0 else -1
    for i in range(first, end):
        for y in range(h):
            for x in range(w):
                if not masks[i, y, x]:
                    continue
                inside = 0 < x < w - 1 and 0 < y < h - 1
                if inside and masks[i, y, x - 1] and masks[i, y, x + 1] and masks[i, y - 1, x] and masks[i, y + 1, x]:
                    out[i, y, x] = True  # its neighbours do the widening
                    continue
                for d in range(-reach, reach + 1):
                    s = span[d + reach]
                    if s < 0 or y + d < 0 or y + d >= h:
                        continue
                    for c in range(max(0, x - s), min(w, x + s + 1)):
                        out[i, y + d, c] = True


def dilated(masks: Mask, radius: float) -> Mask:
    """Widen (n, y, x) masks by `radius` px, 1 at least."""
    out = np.zeros(masks.shape, dtype=bool)
    m = np.ascontiguousarray(masks)
    in_threads(len(m), lambda a, b: _dilate_frames(a, b, m, max(radius, 1.0), out))
    return out


def fit_air(
    frames: F32,
    margin_px: float,
    *,
    region: npt.NDArray[np.bool_] | None = None,
    order: Order = "plane",
    threads: int | None = None,
) -> tuple[FloatArray, FloatArray, npt.NDArray[np.bool_]]:
    """Fit a smooth surface to the air around the object in every projection.

    What counts as air is found from the frame itself: the lowest level that is smooth over a good part of the frame,
    kept `margin_px` away from everything that rises above it, and further away while the air beside the object is
    higher than it should be.

    Parameters
    ----------
    frames : (n, y, x) float32 array
        Absorbance; NaN where the camera is not to be trusted.
    margin_px : float
        Distance kept from the object, pixels of these frames.
    region : (y, x) bool array, optional
        Only there air is looked for; everywhere by default.
    order : {"plane", "quadratic", "auto"}
        Terms of the surface. ``auto``: quadratic terms where they predict air that had no part in the fit better.
    threads : int, optional

    Returns
    -------
    coefficients : (n, 3) or (n, 6) array
        See `plane`.
    residual : (n,) array
        Standard deviation of the air about its surface; NaN where there is too little air for a fit (the surface is
        zero then).
    object_mask : (n, y, x) bool array
        What is not air.

    Notes
    -----
    The first surface is found by random sample consensus (Fischler & Bolles 1981, doi 10.1145/358669.358692) with a
    fixed seed, with a price on pixels below the surface.
    """
    from scipy.ndimage import uniform_filter

    n, h, w = frames.shape
    valid = np.isfinite(frames)
    if region is not None:
        valid &= region
    enough = valid.mean(axis=(1, 2)) >= _LEAST_AIR
    coefficients: FloatArray = np.zeros((n, 3))
    residual: FloatArray = np.full(n, np.nan)
    masks = np.ones((n, h, w), dtype=bool)
    if min(h, w) < 12:  # too few pixels to tell air from object
        enough[:] = False
    if not enough.any():
        return coefficients, residual, masks
    frames, valid = frames[enough], valid[enough]
    filled = np.where(valid, frames, 0).astype(np.float32)
    size = (1, 3, 3)
    part = uniform_filter(valid.astype(np.float32), size, mode="constant")
    smooth = uniform_filter(filled, size, mode="constant") / np.maximum(part, 1e-6)
    smooth = np.where(valid & (part > 0.3), smooth, np.nan)
    level = _level(smooth)

    design = terms((h, w), 3).reshape(3, -1).T
    # Wider means for the first planes: a step as high as the noise must not be bridged by a tilt.
    part = uniform_filter(valid.astype(np.float32), (1, 5, 5), mode="constant")
    wide = uniform_filter(filled, (1, 5, 5), mode="constant") / np.maximum(part, 1e-6)
    guess = _first_planes(np.where(valid & (part > 0.3), wide, np.nan), 0.6 * level, threads)
    flat = filled.reshape(len(filled), -1).astype(np.float64)
    air, c = _grow_air(smooth, valid, guess, design, level, margin_px, flat)
    for wider in (2.0, 4.0):  # flats that do not fit leave a pattern that is no object
        few = (air.mean(axis=(1, 2)) < 2 * _LEAST_AIR) & (wider * level < 0.01)
        if few.any():
            more, d = _grow_air(smooth[few], valid[few], guess[few], design, wider * level[few], margin_px, flat[few])
            air[few], c[few] = more, d
            level[few] = wider * level[few]
    if order != "plane":
        curved = terms((h, w), 6).reshape(6, -1).T
        weight = air.reshape(len(air), -1)
        if order == "quadratic" or _predicts_better(flat, weight, design, curved, (h, w)):
            # What lies off a plane may be air on a curved surface: it is looked for again.
            first = fit_surface(flat, weight, curved, trim=3.0, threads=threads)
            air, c = _grow_air(smooth, valid, first, curved, level, margin_px, flat, loose=4.0)
            design = curved
            coefficients = np.zeros((n, 6))

    near = _surroundings(smooth - (c @ design.T).reshape(smooth.shape), valid, level, margin_px)
    if near is not None:
        # Part of the frames show the air outside of what the particle stands in, and part do not: one level for all
        # is the one around the particle.
        frames_there, ring = near
        first = _first_planes(np.where(ring, smooth[frames_there], np.nan), level[frames_there], threads)
        start = np.zeros((len(first), design.shape[1]))
        start[:, :3] = first
        some_air, some = _grow_air(
            smooth[frames_there], ring, start, design, level[frames_there], margin_px, flat[frames_there]
        )
        fine = some_air.mean(axis=(1, 2)) >= _LEAST_AIR
        air[frames_there[fine]], c[frames_there[fine]] = some_air[fine], some[fine]

    # The object must not leak: while the air next to it is higher than the rest, the margin grows.
    for _ in range(4):
        rest = (flat - c @ design.T).reshape(air.shape)
        ring = dilated(~air & valid, 1.0) & air
        inner = air & ~ring
        count = np.maximum(ring.sum(axis=(1, 2)), 1)
        beside = np.where(ring, rest, 0).sum(axis=(1, 2)) / count
        far = np.where(inner, rest, 0).sum(axis=(1, 2)) / np.maximum(inner.sum(axis=(1, 2)), 1)
        sigma = _spread(rest.reshape(len(rest), -1), air.reshape(len(air), -1))
        leaking = beside - far > np.maximum(4 * sigma / np.sqrt(count), 0.1 * sigma)
        leaking &= inner.mean(axis=(1, 2)) > 2 * _LEAST_AIR
        if not leaking.any():
            break
        air[leaking] &= ~ring[leaking]
        kept = air[leaking].reshape(int(leaking.sum()), -1)
        c[leaking] = fit_surface(flat[leaking], kept, design, trim=3.0, threads=threads)

    weight = air.reshape(len(air), -1)
    c = _untwisted(flat, weight, c, design, threads)
    good = air.mean(axis=(1, 2)) >= _LEAST_AIR
    rest = np.where(weight, flat - c @ design.T, 0)
    count = np.maximum(weight.sum(axis=1), 1)
    sd = np.sqrt(np.maximum((rest**2).sum(axis=1) / count - (rest.sum(axis=1) / count) ** 2, 0))
    where = np.flatnonzero(enough)
    coefficients[where[good]] = c[good]
    residual[where[good]] = sd[good]
    masks[where[good]] = ~air[good]
    return coefficients, residual, masks


def _untwisted(flat: FloatArray, weight: Mask, c: FloatArray, design: FloatArray, threads: int | None) -> FloatArray:
    """Fit frames again whose surface bends in y or twists unlike those of the frames around them, with theirs.

    Both change slowly. A surface that is laid through both sides of an edge, where the absorbance steps, twists; what
    is left of the edge then runs straight through the field, as it does in the other frames.
    """
    n = len(c)
    if c.shape[1] < 6 or n < 2 * _AROUND + 1:
        return c
    slow = c[:, 3:5]
    around = np.pad(slow, ((_AROUND, _AROUND), (0, 0)), mode="reflect")
    typical = np.median(np.lib.stride_tricks.sliding_window_view(around, 2 * _AROUND + 1, axis=0), axis=2)
    off = np.abs(slow - typical)
    odd = (off > _TWISTED * 1.4826 * np.median(off, axis=0) + _LEAST_TWIST).any(axis=1)
    if not odd.any():
        return c
    rest = flat[odd] - typical[odd] @ design[:, 3:5].T
    others = fit_surface(rest, weight[odd], design[:, [0, 1, 2, 5]], trim=3.0, threads=threads)
    out = c.copy()
    out[odd] = np.concatenate([others[:, :3], typical[odd], others[:, 3:]], axis=1)
    return out


def _surroundings(
    rest: FloatArray, valid: Mask, level: FloatArray, margin_px: float
) -> tuple[npt.NDArray[np.intp], Mask] | None:
    """Find frames in which the particle stands higher above the air than in others, and (m, y, x) what is around it.

    A capillary that is wider than the frame shows its outside at some angles only. None where all frames agree.
    """
    from scipy.ndimage import label

    n, h, w = rest.shape
    if n < 8:
        return None
    known = np.nan_to_num(rest)
    top = float(np.percentile(known, 98))
    structure = np.zeros((3, 3, 3), dtype=bool)
    structure[1] = True
    labels, count = label(known > max(0.3 * top, 10 * float(np.median(level))), structure)
    if not count:
        return None
    size = np.bincount(labels.ravel())
    size[0] = 0
    size[np.intersect1d(labels[:, 0], labels[:, -1])] = 0  # from edge to edge: a wall, no particle
    body = np.zeros(rest.shape, dtype=bool)
    for i in range(n):
        inside = np.unique(labels[i])
        largest = inside[np.argmax(size[inside])]
        body[i] = (labels[i] == largest) & (size[largest] > 0.01 * h * w)
    inner = dilated(body, margin_px + 1)
    ring = dilated(inner, 0.12 * w) & ~inner & valid & np.isfinite(rest)
    height = _medians(rest.reshape(n, -1), ring.reshape(n, -1))
    seen = ring.mean(axis=(1, 2)) > 2 * _LEAST_AIR
    if seen.sum() < 8:
        return None
    low, high = np.percentile(height[seen], [10, 95])
    if high - low < max(0.006, 8 * float(np.median(level))):
        return None
    where = np.flatnonzero(seen & (height > low + max(0.002, 3 * float(np.median(level)))))
    return where, ring[where]


def _first_planes(smooth: FloatArray, noise: FloatArray, threads: int | None) -> FloatArray:
    """(n, 3) planes by consensus; those of the neighbours and of the typical frame are tried on every frame."""
    n, h, w = smooth.shape
    step = max(1, min(h, w) // 32)
    grid = smooth[:, step // 2 :: step, step // 2 :: step]
    y = ((np.arange(h)[step // 2 :: step] - (h - 1) / 2) / (w / 2))[:, None] * np.ones((1, grid.shape[2]))
    x = ((np.arange(w)[step // 2 :: step] - (w - 1) / 2) / (w / 2))[None, :] * np.ones((grid.shape[1], 1))
    values = np.ascontiguousarray(grid.reshape(n, -1), dtype=np.float64)
    ys, xs = y.ravel().copy(), x.ravel().copy()
    order = np.argsort(values, axis=1).astype(np.int32)  # NaN last
    fewest = max(1, int(np.isfinite(values).sum(axis=1).min()))
    rng = np.random.default_rng(20)
    places = rng.integers(fewest, size=(_TRIALS, 3))
    places[_TRIALS // 3 :] //= 3  # air is low: most of the trials among the lowest third
    low = np.zeros((n, 1, 3))
    low[:, 0, 0] = np.nanpercentile(values, 20, axis=1)
    best = low[:, 0].copy()
    for again in range(2):
        if again:
            around = [np.roll(best, k, axis=0) for k in (-2, -1, 0, 1, 2)]
            starts = np.stack([*around, np.broadcast_to(np.median(best, axis=0), best.shape)], axis=1)
            places = places[:0]
        else:
            starts = low
        starts = np.ascontiguousarray(starts)
        found = best.copy()
        _seek_all(values, noise, order, places, starts, ys, xs, found, threads)
        best = found
    return best


def _seek_all(
    values: Any, noise: Any, order: Any, places: Any, starts: Any, ys: Any, xs: Any, found: Any, threads: int | None
) -> None:
    """Run `_seek` over all frames."""
    in_threads(
        len(values), lambda a, b: _seek(a, b, values, noise, order, places, starts, ys, xs, found), threads=threads
    )


def _grow_air(
    smooth: FloatArray,
    valid: Mask,
    guess: FloatArray,
    design: FloatArray,
    noise: FloatArray,
    margin_px: float,
    flat: FloatArray,
    *,
    loose: float = 1.0,
) -> tuple[Mask, FloatArray]:
    """Turn first planes into the air of every frame and the planes through all of it."""
    air, c = np.zeros(smooth.shape, dtype=bool), guess.copy()

    def some(first: int) -> None:
        part = slice(first, first + _FRAMES)
        air[part], c[part] = _grow_some(
            smooth[part], valid[part], guess[part], design, noise[part], margin_px, flat[part], loose
        )

    # Pieces of one size, whatever the threads: products of matrices may round differently by their size.
    share(range(0, len(smooth), _FRAMES), some)
    return air, c


def _grow_some(
    smooth: FloatArray,
    valid: Mask,
    guess: FloatArray,
    design: FloatArray,
    noise: FloatArray,
    margin_px: float,
    flat: FloatArray,
    loose: float,
) -> tuple[Mask, FloatArray]:
    """`_grow_air` of a few frames; no frame depends on another."""
    n, h, w = smooth.shape
    c = guess.copy()
    air = np.zeros((n, h, w), dtype=bool)
    spread = loose * noise
    for turn in range(5):
        rest = smooth - (c @ design.T).reshape(n, h, w)
        if turn:
            # Only what lies below says how wide the air is: what lies above may be object.
            inside, one = rest.reshape(n, -1), air.reshape(n, -1)
            centre = _medians(inside, one)
            below = centre[:, None] - inside
            spread = np.clip(1.4826 * _medians(below, one & (below >= 0)), 0.7 * noise, 30 * noise) + 1e-9
        else:
            centre = np.zeros(n)
        rest = np.nan_to_num(rest - centre[:, None, None], nan=-np.inf)
        width = spread[:, None, None]
        body = _without_specks(rest > 3.5 * width, 4)
        # What touches the object and is more likely object than air belongs to it.
        body |= dilated(body, 1.5) & (rest > 1.5 * width)
        body |= _without_specks(rest > 2.5 * width, 12)
        new = ~dilated(body, margin_px) & valid & np.isfinite(smooth)
        same = np.array_equal(new, air)
        air = new
        if turn and same:
            break
        usable = air.mean(axis=(1, 2)) >= _LEAST_AIR
        if usable.any():
            c[usable] = fit_surface(flat[usable], air[usable].reshape(int(usable.sum()), -1), design, trim=3.0)
    return air, c


def _predicts_better(
    flat: FloatArray, weight: npt.NDArray[np.bool_], low: FloatArray, high: FloatArray, shape: tuple[int, int]
) -> bool:
    """Whether the terms `high` predict squares of air left out of the fit better than `low`, by 5 % or more."""
    h, w = shape
    some = slice(None, None, max(1, len(flat) // 24))
    flat, weight = flat[some], weight[some]
    block = max(2, w // 8)
    number = (np.arange(h)[:, None] // block * 3 + np.arange(w)[None, :] // block * 5).ravel() % 4
    errors: list[list[FloatArray]] = [[], []]
    for part in range(4):
        asked = weight & (number == part)
        for k, design in enumerate((low, high)):
            c = fit_surface(flat, weight & (number != part), design)
            rest = np.where(asked, flat - c @ design.T, 0)
            errors[k].append((rest**2).sum(axis=1))
    plain, curved = (np.sum(e, axis=0) for e in errors)
    ok = plain > 0
    return bool(ok.any() and np.median(curved[ok] / plain[ok]) < 0.95)
