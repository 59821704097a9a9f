"""Comparing stacks of images: band limits, and the displacement of one stack against another by least squares.

All functions take and return arrays; none knows where they come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numba as nb
import numpy as np
import numpy.typing as npt

from .model import FloatArray
from .parallel import in_threads

__all__ = [
    "REGISTRATION_COLUMNS",
    "LinearFit",
    "band_pass",
    "bin_frames",
    "bin_volume",
    "block_shifts",
    "center_of_rotation",
    "displacement_equations",
    "halve",
    "object_support",
    "recorded_rows",
    "registration_equations",
    "smooth",
    "solve_normal",
    "squared_gradient",
]

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
_F = TypeVar("_F", bound=Callable[..., Any])


def _kernel(function: _F) -> _F:
    """Compile for the machine at first use, kept on disk, without the GIL."""
    return cast(_F, nb.njit(cache=True, nogil=True, fastmath={"contract"})(function))


def _summing_kernel(function: _F) -> _F:
    """Compile like `_kernel`, with sums that may be reordered: the same order whenever it runs on one machine."""
    return cast(_F, nb.njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz"})(function))


@_kernel
def _blur(first: int, end: int, frames: F32, taps: F32, less: bool, out: F32) -> None:
    """Convolve along both axes; `taps` are the middle one, then those beside it: an odd number of all.

    With `less` the result is taken off what is in `out`.
    """
    _, h, w = frames.shape
    reach = taps.size - 1
    padded = np.empty(w + 2 * reach, np.float32)
    line = padded[reach : reach + w]
    for f in range(first, end):
        frame = frames[f]
        for y in range(h):
            here = frame[y]
            for x in range(w):
                line[x] = taps[0] * here[x]
            for t in range(1, reach, 2):  # two pairs at a time
                p, q = taps[t], taps[t + 1]
                a, b = frame[max(y - t, 0)], frame[min(y + t, h - 1)]
                c, d = frame[max(y - t - 1, 0)], frame[min(y + t + 1, h - 1)]
                for x in range(w):
                    line[x] += p * (a[x] + b[x]) + q * (c[x] + d[x])
            padded[:reach] = line[0]
            padded[reach + w :] = line[w - 1]
            blurred = out[f, y]
            sign = np.float32(-1.0) if less else np.float32(1.0)
            if less:
                for x in range(w):
                    blurred[x] -= taps[0] * line[x]
            else:
                for x in range(w):
                    blurred[x] = taps[0] * line[x]
            for t in range(1, reach, 2):
                p, q = sign * taps[t], sign * taps[t + 1]
                a, b, c, d = padded[reach - t :], padded[reach + t :], padded[reach - t - 1 :], padded[reach + t + 1 :]
                for x in range(w):
                    blurred[x] += p * (a[x] + b[x]) + q * (c[x] + d[x])


def smooth(frames: F32, sigma_px: float) -> F32:
    """Blur every frame of (n, y, x) with a Gaussian of `sigma_px` pixels; the border is continued."""
    data = np.ascontiguousarray(frames, dtype=np.float32)
    if sigma_px <= 0:
        return data
    out, taps = np.empty_like(data), _taps(sigma_px)
    in_threads(len(data), lambda a, b: _blur(a, b, data, taps, False, out))
    return out


def _taps(sigma_px: float) -> F32:
    """Return the weights of a Gaussian at 0, 1, .. pixels; of none for no width."""
    reach = math.ceil(4 * max(sigma_px, 0.0))
    reach += reach % 2  # the kernel takes two pairs at a time
    taps = np.exp(-0.5 * (np.arange(reach + 1) / max(sigma_px, 1e-9)) ** 2)
    return np.asarray(taps / (taps[0] + 2 * taps[1:].sum()), dtype=np.float32)


@_kernel
def _squared_gradient(first: int, end: int, frames: F32, sharpen: float, out: F32) -> None:
    """Differences of fourth order; `sharpen` times the Laplacian is subtracted first; the border is continued."""
    _, h, w = frames.shape
    s, near, far = np.float32(sharpen), np.float32(2 / 3), np.float32(1 / 12)
    keep = np.float32(1 + 4 * sharpen)
    sharp = np.empty((h, w + 4), np.float32)
    for f in range(first, end):
        frame = frames[f]
        for y in range(h):
            up, here, down = frame[max(y - 1, 0)], frame[y], frame[min(y + 1, h - 1)]
            line = sharp[y, 2 : w + 2]
            for x in range(w):
                line[x] = keep * here[x] - s * (up[x] + down[x])
            left, right, inner = here[: w - 2], here[2:], line[1 : w - 1]
            for x in range(w - 2):
                inner[x] -= s * (left[x] + right[x])
            line[0] -= s * (here[0] + here[1])
            line[w - 1] -= s * (here[w - 1] + here[w - 2])
            sharp[y, :2] = line[0]
            sharp[y, w + 2 :] = line[w - 1]
        for y in range(h):
            found = out[f, y]
            a, b = sharp[max(y - 2, 0), 2:], sharp[max(y - 1, 0), 2:]
            c, d = sharp[min(y + 1, h - 1), 2:], sharp[min(y + 2, h - 1), 2:]
            for x in range(w):
                g = near * (c[x] - b[x]) - far * (d[x] - a[x])
                found[x] = g * g
            a, b, c, d = sharp[y], sharp[y, 1:], sharp[y, 3:], sharp[y, 4:]
            for x in range(w):
                g = near * (c[x] - b[x]) - far * (d[x] - a[x])
                found[x] += g * g


def squared_gradient(frames: F32, blur_px: float) -> F32:
    """Squared gradient (n, y, x) of what `frames` were before a Gaussian blur of `blur_px` pixels, blurred the same.

    The blur is undone to first order, ``1 - v/2 laplacian``: less fine detail than there was, without its noise.
    """
    data = np.ascontiguousarray(frames, dtype=np.float32)
    out = np.empty_like(data)
    in_threads(len(data), lambda a, b: _squared_gradient(a, b, data, blur_px**2 / 2, out))
    return smooth(out, blur_px)


@_kernel
def _halve(first: int, end: int, frames: F32, out: F32) -> None:
    _, h, w = frames.shape
    _, h2, w2 = out.shape
    line = np.empty(w + 2, np.float32)
    for f in range(first, end):
        for y in range(h2):
            a, b, c, d = (
                frames[f, max(2 * y - 1, 0)],
                frames[f, 2 * y],
                frames[f, 2 * y + 1],
                frames[f, min(2 * y + 2, h - 1)],
            )
            for x in range(w):
                line[x + 1] = np.float32(0.125) * (a[x] + d[x]) + np.float32(0.375) * (b[x] + c[x])
            line[0] = line[1]
            line[w + 1] = line[w]
            for x in range(w2):
                i = 2 * x
                out[f, y, x] = np.float32(0.125) * (line[i] + line[i + 3]) + np.float32(0.375) * (
                    line[i + 1] + line[i + 2]
                )


def halve(frames: F32) -> F32:
    """Halve (n, y, x): pixel j lies where pixels 2 j and 2 j + 1 meet; an odd last row or column is cut off.

    The weights 1 3 3 1 keep out most of what would be aliased by a mean of two: aliased detail does not move with the
    object and pulls displacements to whole pixels.
    """
    data = np.ascontiguousarray(frames, dtype=np.float32)
    n, h, w = data.shape
    out = np.empty((n, h // 2, w // 2), np.float32)
    in_threads(n, lambda a, b: _halve(a, b, data, out))
    return out


def bin_frames(frames: npt.NDArray[Any], bin: int) -> F32:
    """Average `bin` x `bin` pixels of (n, y, x) frames; rows and columns left over are cut off."""
    if bin == 1:
        return np.asarray(frames, dtype=np.float32)
    n, h, w = frames.shape
    out = np.empty((n, h // bin, w // bin), np.float32)
    exact = np.result_type(frames.dtype, np.float32)

    def part(a: int, b: int) -> None:
        cut = frames[a:b, : h // bin * bin, : w // bin * bin]
        rows = cut[:, ::bin].astype(exact)
        for k in range(1, bin):
            rows += cut[:, k::bin]
        total = rows[:, :, ::bin].copy()
        for k in range(1, bin):
            total += rows[:, :, k::bin]
        np.divide(total, bin * bin, out=out[a:b], casting="same_kind")

    in_threads(n, part)
    return out


def bin_volume(volume: F32, k: int) -> F32:
    """Return the mean over blocks of k x k x k voxels of (y, z, x); what is left over is cut off."""
    small = bin_frames(volume, k)
    rows = len(small) // k * k
    return np.asarray(small[:rows].reshape(rows // k, k, *small.shape[1:]).mean(axis=1))


def band_pass(frames: F32, fine_px: float, coarse_px: float) -> F32:
    """Difference of two Gaussian blurs of (n, y, x): structures between `fine_px` and `coarse_px` pixels."""
    data = np.ascontiguousarray(frames, dtype=np.float32)
    out, fine, coarse = np.empty_like(data), _taps(fine_px), _taps(coarse_px)

    def part(a: int, b: int) -> None:
        for f in range(a, b):  # a frame stays in the cache
            _blur(f, f + 1, data, fine, False, out)
            _blur(f, f + 1, data, coarse, True, out)

    in_threads(len(data), part)
    return out


@dataclass(frozen=True)
class LinearFit:
    """Normal equations of n independent least-squares problems, kept in parts so that they can be split.

    Attributes
    ----------
    normal : (n, parts, k, k) array
        Sums of products of the columns.
    rhs : (n, parts, k) array
        Sums of columns times residual.
    cost : (n, parts) array
        Sums of squared residuals before the fit.
    count : (n, parts) array
        Sum of the weights.
    """

    normal: FloatArray
    rhs: FloatArray
    cost: FloatArray
    count: FloatArray

    def solve(self, part: int | None = None) -> tuple[FloatArray, FloatArray]:
        """Return the solutions (n, k) and the inverse normal matrices (n, k, k), of all parts together or of one.

        A problem without information has the solution 0 and infinite variances.
        """
        normal = self.normal.sum(axis=1) if part is None else self.normal[:, part]
        rhs = self.rhs.sum(axis=1) if part is None else self.rhs[:, part]
        return solve_normal(normal, rhs)


def solve_normal(normal: FloatArray, rhs: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Solve stacked normal equations (n, k, k), (n, k), scaled to unit diagonal; see `LinearFit.solve`."""
    k = normal.shape[-1]
    scale = np.sqrt(np.maximum(np.einsum("nii->ni", normal), 1e-300))
    scaled = normal / scale[:, :, None] / scale[:, None, :]
    good = np.linalg.eigvalsh(scaled)[:, 0] > 1e-9
    inverse = np.full(normal.shape, 0.0)
    inverse[:] = np.diag(np.full(k, np.inf))
    inverse[good] = np.linalg.inv(scaled[good]) / scale[good][:, :, None] / scale[good][:, None, :]
    solution = np.zeros(rhs.shape)
    solution[good] = np.einsum("nij,nj->ni", inverse[good], rhs[good])
    return solution, inverse


@_summing_kernel
def _accumulate_shift(
    first: int, end: int, data: F32, model: F32, weight: F32, second: I64, slopes: int, normal: FloatArray,
    rhs: FloatArray, cost: FloatArray, count: FloatArray,
) -> None:  # fmt: skip
    _, h, w = data.shape
    k = 4 + 2 * slopes
    c = np.zeros((6, w), np.float32)
    uc = np.zeros(w, np.float32)
    ur = np.zeros(w, np.float32)
    for x in range(w):
        c[3, x] = 1.0
        c[5, x] = (x - (w - 1) / 2) / (w / 2)
    for f in range(first, end):
        for y in range(1, h - 1):
            part = second[y]
            total = np.float32(0.0)
            square = np.float32(0.0)
            height = np.float32((y - (h - 1) / 2) / (w / 2))
            for x in range(1, w - 1):
                u = weight[f, y, x]
                m = model[f, y, x]
                r = data[f, y, x] - m if u != 0.0 else np.float32(0.0)
                c[0, x] = np.float32(-0.5) * (model[f, y + 1, x] - model[f, y - 1, x])
                c[1, x] = np.float32(-0.5) * (model[f, y, x + 1] - model[f, y, x - 1])
                c[2, x] = m
                c[4, x] = height
                ur[x] = u * r
                square += u * r * r
                total += u
            if total == 0.0:
                continue
            cost[f, part] += square
            count[f, part] += total
            for i in range(k):
                dot = np.float32(0.0)
                for x in range(1, w - 1):
                    dot += c[i, x] * ur[x]
                rhs[f, part, i] += dot
                for x in range(1, w - 1):
                    uc[x] = weight[f, y, x] * c[i, x]
                for j in range(i + 1):
                    dot = np.float32(0.0)
                    for x in range(1, w - 1):
                        dot += uc[x] * c[j, x]
                    normal[f, part, i, j] += dot
        for part in range(2):
            for i in range(k):
                for j in range(i):
                    normal[f, part, j, i] = normal[f, part, i, j]


def displacement_equations(
    data: F32, model: F32, weight: F32, *, second_rows: npt.ArrayLike | None = None, slopes: bool = False
) -> LinearFit:
    """Set up ``data = model(q - d) (1 + gain) + level`` for small displacements d, one problem a frame.

    The columns are ``[dy, dx, gain, level]``; a positive displacement means that the content of `data` lies below /
    to the right of that of `model`, pixels.

    Parameters
    ----------
    data, model, weight : (n, y, x) float32 arrays
    second_rows : (y,) bool array, optional
        Two parts are kept apart: the second one is these rows; the lower half unless given.
    slopes : bool
        Whether the level may slope: two more columns, its slopes in y and x over half the width.
    """
    n, h, _ = data.shape
    k = 6 if slopes else 4
    out = (np.zeros((n, 2, k, k)), np.zeros((n, 2, k)), np.zeros((n, 2)), np.zeros((n, 2)))
    d, m, u = (np.ascontiguousarray(a, dtype=np.float32) for a in (data, model, weight))
    second = np.asarray(np.arange(h) >= h // 2 if second_rows is None else second_rows, dtype=np.int64)
    in_threads(n, lambda a, b: _accumulate_shift(a, b, d, m, u, second, int(slopes), *out))
    return LinearFit(*out)


REGISTRATION_COLUMNS = ("scale", "roll", "dy", "dx", "angle", "pitch", "blur", "steep", "gain", "level")
"""What `registration_equations` fits to every projection."""
_COLUMNS = len(REGISTRATION_COLUMNS)


@_summing_kernel
def _accumulate_registration(
    first: int, end: int, data: F32, model: F32, depth: F32, steep: F32, weight: F32, pixel: float, cy: float,
    edges: I64, edges_x: I64, columns: I64, normal: FloatArray, rhs: FloatArray, cost: FloatArray, count: FloatArray,
) -> None:  # fmt: skip
    _, h, w = data.shape
    k = columns.size
    parts_x = edges_x.size - 1
    cx = np.float32((w - 1) / 2)
    size = np.float32(pixel)
    half = np.float32(0.5 / pixel)
    curve = np.float32(0.5 / (pixel * pixel))
    # The residual, then the columns that are fitted, side by side; `row` says where each of all columns is, the rest
    # goes to a row that nobody reads. Loops run over slices from 0 on: those are done with vectors.
    row = np.full(_COLUMNS, k + 1, np.int64)
    for i in range(k):
        row[columns[i]] = i + 1
    c = np.zeros((k + 2, w), np.float32)
    weighted = np.empty(w, np.float32)
    for f in range(first, end):
        for band in range(edges.shape[0] - 1):
            for y in range(max(1, edges[band]), min(h - 1, edges[band + 1])):
                lit, unlit = max(1, edges_x[0]), min(w - 1, edges_x[parts_x])
                while lit < unlit and weight[f, y, lit] == 0.0:
                    lit += 1
                while unlit > lit and weight[f, y, unlit - 1] == 0.0:
                    unlit -= 1
                if lit == unlit:
                    continue
                n = unlit - lit
                m, left, right = model[f, y, lit:unlit], model[f, y, lit - 1 : unlit - 1], model[f, y, lit + 1 :]
                up, down = model[f, y - 1, lit:unlit], model[f, y + 1, lit:unlit]
                qy = np.float32((y - cy) * pixel)
                a, b, d = c[0, lit:unlit], data[f, y, lit:unlit], c[row[8], lit:unlit]
                for x in range(n):
                    a[x] = b[x] - m[x]
                for x in range(n):
                    d[x] = m[x]
                a, b = c[row[2], lit:unlit], c[row[3], lit:unlit]
                for x in range(n):
                    a[x] = half * (up[x] - down[x])
                for x in range(n):
                    b[x] = half * (left[x] - right[x])
                d = c[row[0], lit:unlit]
                for x in range(n):
                    gx, gy = half * (left[x] - right[x]), half * (up[x] - down[x])
                    d[x] = qy * gy + (np.float32(x + lit) - cx) * size * gx
                d = c[row[1], lit:unlit]
                for x in range(n):
                    gx, gy = half * (left[x] - right[x]), half * (up[x] - down[x])
                    d[x] = (np.float32(x + lit) - cx) * size * gy - qy * gx
                if depth.shape[0] > 0:
                    a, b, d = c[row[4], lit:unlit], depth[f, y, lit - 1 : unlit - 1], depth[f, y, lit + 1 :]
                    for x in range(n):
                        a[x] = half * (b[x] - d[x])
                    a, b, d = c[row[5], lit:unlit], depth[f, y - 1, lit:unlit], depth[f, y + 1, lit:unlit]
                    for x in range(n):
                        a[x] = half * (b[x] - d[x])
                a = c[row[6], lit:unlit]
                for x in range(n):
                    a[x] = curve * (up[x] + down[x] + left[x] + right[x] - 4 * m[x])
                if steep.shape[0] > 0:
                    c[row[7], lit:unlit] = steep[f, y, lit:unlit]
                c[row[9], lit:unlit] = 1.0
                for part in range(parts_x):
                    x0 = max(lit, edges_x[part])
                    x1 = min(unlit, edges_x[part + 1])
                    if x0 >= x1:
                        continue
                    u, r, v, p = weight[f, y, x0:x1], c[0, x0:x1], weighted[x0:x1], band * parts_x + part
                    total = square = np.float32(0.0)
                    for x in range(u.size):
                        total += u[x]
                        square += u[x] * r[x] * r[x]
                    if total == 0.0:
                        continue
                    cost[f, p] += square
                    count[f, p] += total
                    for i in range(k):
                        a = c[i + 1, x0:x1]
                        value = np.float32(0.0)
                        for x in range(u.size):
                            v[x] = u[x] * a[x]
                            value += v[x] * r[x]
                        rhs[f, p, i] += value
                        j = 0
                        while j + 2 < i:  # four at a time: the weighted column is loaded once for them
                            c0, c1, c2, c3 = c[j + 1, x0:x1], c[j + 2, x0:x1], c[j + 3, x0:x1], c[j + 4, x0:x1]
                            s0 = s1 = s2 = s3 = np.float32(0.0)
                            for x in range(u.size):
                                s0 += v[x] * c0[x]
                                s1 += v[x] * c1[x]
                                s2 += v[x] * c2[x]
                                s3 += v[x] * c3[x]
                            normal[f, p, i, j] += s0
                            normal[f, p, i, j + 1] += s1
                            normal[f, p, i, j + 2] += s2
                            normal[f, p, i, j + 3] += s3
                            j += 4
                        while j <= i:
                            a = c[j + 1, x0:x1]
                            value = np.float32(0.0)
                            for x in range(u.size):
                                value += v[x] * a[x]
                            normal[f, p, i, j] += value
                            j += 1
        for p in range(normal.shape[1]):
            for i in range(k):
                for j in range(i):
                    normal[f, p, j, i] = normal[f, p, i, j]


def registration_equations(
    data: F32,
    model: F32,
    weight: F32,
    *,
    depth: F32 | None = None,
    steep: F32 | None = None,
    pixel: float = 1.0,
    middle_row: float | None = None,
    blocks: tuple[int, int] = (1, 1),
    bounds: tuple[slice, slice] | None = None,
    columns: Sequence[str] = REGISTRATION_COLUMNS,
) -> LinearFit:
    """Set up the fit of projections to those of a tomogram, one problem a projection (and block).

    ``data(q) = model(q - d) (1 + gain) + level + angle * turned + pitch * tilted + blur / 2 * curvature + steep * s``
    with ``d = scale q + roll J q + (dy, dx)``, `J` turning +x towards +y, in units of the common grid and radians.

    Parameters
    ----------
    data, model, weight : (n, y, x) float32 arrays
        On the common grid, the rotation axis in the middle column.
    depth : (n, y, x) float32 array, optional
        Projection of the object times the distance along the beam from the axis, pixels of the common grid: its
        horizontal slope is what a turn of the object changes, its vertical slope what a tilt along the beam does.
    steep : (n, y, x) float32 array, optional
        Another image whose share is fitted, such as the squared slope.
    pixel : float
        Width of a pixel of these arrays, pixels of the common grid.
    middle_row : float, optional
        Row of these arrays that is the middle of the common grid; their own middle unless given.
    blocks : (int, int)
        Blocks in y and x that are kept apart: the parts of the result, row by row.
    bounds : (slice, slice), optional
        Rows and columns that are used, and divided into blocks; all unless given.
    columns : sequence of str
        Which of `REGISTRATION_COLUMNS` are fitted, in this order. Those without their image have no information.
    """
    n, h, w = data.shape
    middle = (h - 1) / 2 if middle_row is None else float(middle_row)
    by, bx = blocks
    rows, across = (slice(0, h), slice(0, w)) if bounds is None else bounds
    k = len(columns)
    which = np.array([REGISTRATION_COLUMNS.index(c) for c in columns], dtype=np.int64)
    out = (np.zeros((n, by * bx, k, k)), np.zeros((n, by * bx, k)), np.zeros((n, by * bx)), np.zeros((n, by * bx)))
    nothing = np.zeros((0, 0, 0), dtype=np.float32)
    d, m, e, s, u = (
        np.ascontiguousarray(nothing if a is None else a, dtype=np.float32) for a in (data, model, depth, steep, weight)
    )
    ends = np.round(np.linspace(rows.start, rows.stop, by + 1)).astype(np.int64)
    ends_x = across.start + (np.arange(bx + 1) * (across.stop - across.start)) // bx

    def part(a: int, b: int) -> None:
        _accumulate_registration(a, b, d, m, e, s, u, float(pixel), middle, ends, ends_x, which, *out)

    in_threads(n, part)
    return LinearFit(*out)


def block_shifts(fit: LinearFit) -> tuple[FloatArray, FloatArray]:
    """Return the displacement of every block, common to all projections, and its standard error.

    Parameters
    ----------
    fit : LinearFit
        Of `registration_equations` with the columns ``dy, dx, gain, level`` and blocks.

    Returns
    -------
    shift, sigma : (blocks, 2) arrays
        ``[dy, dx]``; the errors from the scatter of twelve groups of neighbouring projections. NaN where a block holds
        less than a fiftieth of the information of the best one.
    """
    n, parts = fit.count.shape
    _, inverse = solve_normal(
        fit.normal[:, :, 2:, 2:].reshape(n * parts, 2, 2), fit.rhs[:, :, 2:].reshape(n * parts, 2)
    )
    inverse = np.where(np.isfinite(inverse), inverse, 0.0).reshape(n, parts, 2, 2)
    cross = fit.normal[:, :, :2, 2:]
    normal = fit.normal[:, :, :2, :2] - cross @ inverse @ cross.swapaxes(2, 3)
    rhs = fit.rhs[:, :, :2] - (cross @ inverse @ fit.rhs[:, :, 2:, None])[..., 0]
    whole, whole_rhs = normal.sum(axis=0), rhs.sum(axis=0)
    shift, _ = solve_normal(whole, whole_rhs)
    groups = np.array_split(np.arange(n), min(12, n))
    left_out = np.stack(
        [solve_normal(whole - normal[g].sum(axis=0), whole_rhs - rhs[g].sum(axis=0))[0] for g in groups]
    )
    sigma = np.sqrt((len(groups) - 1) * left_out.var(axis=0))
    strength = np.einsum("pii->p", whole)
    weak = strength < 0.02 * strength.max()
    shift[weak], sigma[weak] = np.nan, np.nan
    return shift, sigma


def center_of_rotation(
    shift_x: npt.ArrayLike, theta_deg: npt.ArrayLike, sigma_x: npt.ArrayLike | None = None
) -> tuple[float, float]:
    """Return the position of the rotation axis in horizontal shifts, and its standard error.

    The constant of the fit ``c + a cos(theta) + b sin(theta)``: `a` and `b` only say where the object stands.

    Parameters
    ----------
    shift_x, theta_deg, sigma_x : (n,) arrays
        Pixels, degrees, pixels.
    """
    x, t = np.asarray(shift_x, dtype=float), np.deg2rad(np.asarray(theta_deg, dtype=float))
    basis = np.stack([np.ones_like(t), np.cos(t), np.sin(t)], axis=1)
    weight = np.ones_like(x) if sigma_x is None else 1 / np.maximum(np.asarray(sigma_x, dtype=float), 1e-9) ** 2
    good = np.isfinite(x) & np.isfinite(weight)
    if good.sum() < 3:
        return float("nan"), float("nan")
    b, w = basis[good], weight[good]
    inverse = np.linalg.pinv(b.T @ (w[:, None] * b))
    constant = float((inverse @ (b.T @ (w * x[good])))[0])
    return constant, float(np.sqrt(inverse[0, 0])) if sigma_x is not None else float("nan")


def object_support(volume: F32) -> F32:
    """(y, z, x) 1 where the object may be, 0 in the air: what rises above a fifth of its typical value, widened."""
    from scipy.ndimage import binary_dilation, gaussian_filter

    step = max(1, min(4, min(volume.shape) // 24))
    nz, ny, nx = (n // step for n in volume.shape)
    cut = volume[: nz * step, : ny * step, : nx * step]
    layers = cut.reshape(nz, step, *cut.shape[1:]).mean(axis=1)
    coarse = gaussian_filter(bin_frames(layers, step), 2.0 / step)
    threshold = 0.15 * float(np.percentile(coarse, 99.5))
    if threshold <= 0:
        return np.ones_like(volume)
    mask = np.pad(binary_dilation(coarse > threshold, iterations=max(1, round(6 / step))), ((0, 1),) * 3, mode="edge")
    for axis in range(3):
        mask = np.repeat(mask, step, axis=axis)
    out = np.zeros_like(volume)
    out[:] = mask[: volume.shape[0], : volume.shape[1], : volume.shape[2]]
    return out


def recorded_rows(frames: F32) -> tuple[int, int]:
    """Return the first and the end of the rows of (n, y, x) frames that were recorded.

    Rows at either end that are level in every frame, as those that no beam reaches once they are filled, are not; where
    air without any noise is level as well, all rows are.
    """
    n, height, width = frames.shape
    if not n or width < 2 or height < 16:
        return 0, height

    def level(row: int) -> bool:
        return bool((frames[:, row] == frames[:, row, :1]).all())

    top, bottom = 0, height
    while top < height // 4 and level(top):
        top += 1
    while bottom > height - height // 4 and level(bottom - 1):
        bottom -= 1
    side = frames[:, top:bottom]
    # A twin without noise: level air at the sides as well.
    quiet = np.mean(side[:, :, 0] == side[:, :, 1]) > 0.1 or np.mean(side[:, :, -1] == side[:, :, -2]) > 0.1
    return (0, height) if quiet else (top, bottom)
