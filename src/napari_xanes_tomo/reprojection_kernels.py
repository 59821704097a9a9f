"""Loops over the pixels of all projections, for `reprojection`: compiled, for the frames ``first`` to ``end`` - 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba as nb
import numpy as np
import numpy.typing as npt

from .model import FloatArray

__all__ = ["air_sums", "frame_products", "gradient_power", "left_over", "lines_to_images", "pixel_weights", "row_power"]

F32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]
_F = TypeVar("_F", bound=Callable[..., Any])


def _kernel(function: _F) -> _F:
    """Compile for the machine at first use, kept on disk, without the GIL."""
    return cast(_F, nb.njit(cache=True, nogil=True, fastmath={"contract", "reassoc"})(function))


@_kernel
def lines_to_images(
    first: int, end: int, lines: F32, cos: FloatArray, sin: FloatArray, z: F32, x: F32, out: F32
) -> None:
    """Smear the rows (n, rows, w) of every projection back over the points (z, x): (n, rows, points)."""
    _, rows, w = lines.shape
    for a in range(first, end):
        for p in range(z.size):
            at = x[p] * cos[a] + z[p] * sin[a] + (w - 1) / 2
            k = int(np.floor(at))
            if k < 0 or k >= w - 1:
                for r in range(rows):
                    out[a, r * z.size + p] = 0.0
                continue
            f = np.float32(at - k)
            for r in range(rows):
                out[a, r * z.size + p] = lines[a, r, k] + f * (lines[a, r, k + 1] - lines[a, r, k])


@_kernel
def frame_products(first: int, end: int, images: F32, out: FloatArray) -> None:
    """Inner products of all pairs of images (n, points), for the blocks ``first:end`` of four images."""
    n, size = images.shape
    for block in range(first, end):
        for j in range(0, 4 * block + 4, 2):
            if j >= n:
                break
            j1 = min(j + 1, n - 1)
            i0 = 4 * block
            i1, i2, i3 = min(i0 + 1, n - 1), min(i0 + 2, n - 1), min(i0 + 3, n - 1)
            total = np.zeros((4, 2))
            for start in range(0, size, 4096):
                stop = min(start + 4096, size)
                a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0.0)
                for p in range(start, stop):
                    u, v = images[j, p], images[j1, p]
                    c0, c1, c2, c3 = images[i0, p], images[i1, p], images[i2, p], images[i3, p]
                    a0 += c0 * u
                    a1 += c1 * u
                    a2 += c2 * u
                    a3 += c3 * u
                    b0 += c0 * v
                    b1 += c1 * v
                    b2 += c2 * v
                    b3 += c3 * v
                total[0, 0] += a0
                total[1, 0] += a1
                total[2, 0] += a2
                total[3, 0] += a3
                total[0, 1] += b0
                total[1, 1] += b1
                total[2, 1] += b2
                total[3, 1] += b3
            for i in range(min(4, n - i0)):
                for k in range(min(2, n - j)):
                    out[i0 + i, j + k] = total[i, k]
                    out[j + k, i0 + i] = total[i, k]


@_kernel
def pixel_weights(first: int, end: int, body: F32, rows: Bool, columns: Bool, out: F32) -> None:
    """Write ``body`` where a frame has recorded both the row and the column, else 0."""
    for f in range(first, end):
        for y in range(body.shape[0]):
            for x in range(body.shape[1]):
                out[f, y, x] = body[y, x] if rows[f, y] and columns[f, x] else np.float32(0.0)


@_kernel
def left_over(
    first: int, end: int, data: F32, model: F32, weight: F32, rows: Bool, columns: Bool, solution: FloatArray,
    sums: FloatArray,
) -> None:  # fmt: skip
    """Sum over every frame, where it was recorded: weight, squares of the data, squares of what a fit leaves of them.

    `solution` (n, 6) is that of `displacement_equations` with slopes.
    """
    _, h, w = data.shape
    for f in range(first, end):
        sums[f] = 0.0
        dy, dx, gain, level, down, across = solution[f].astype(np.float32)
        dy, dx, across = dy * np.float32(0.5), dx * np.float32(0.5), across / np.float32(w / 2)
        for y in range(1, h - 1):
            if not rows[f, y]:
                continue
            base = level + down * np.float32((y - (h - 1) / 2) / (w / 2)) - across * np.float32((w - 1) / 2)
            total = np.float32(0.0)
            power = np.float32(0.0)
            cost = np.float32(0.0)
            for x in range(1, w - 1):
                u = weight[y, x] if columns[f, x] else np.float32(0.0)
                m = model[f, y, x]
                r = data[f, y, x] - m - gain * m - base - across * np.float32(x)
                r += dy * (model[f, y + 1, x] - model[f, y - 1, x]) + dx * (model[f, y, x + 1] - model[f, y, x - 1])
                total += u
                power += u * data[f, y, x] * data[f, y, x]
                cost += u * r * r
            sums[f, 0] += total
            sums[f, 1] += power
            sums[f, 2] += cost


@_kernel
def row_power(first: int, end: int, data: F32, out: FloatArray) -> None:
    """Sum the squares of every row (frames, rows)."""
    for f in range(first, end):
        for y in range(data.shape[1]):
            line = np.float32(0.0)
            for x in range(data.shape[2]):
                line += data[f, y, x] * data[f, y, x]
            out[f, y] = line


@_kernel
def gradient_power(first: int, end: int, weight: F32, data: F32, out: FloatArray) -> None:
    """Sum ``weight * gradient**2`` over every row: (frames, 2 [y, x], rows); differences one-sided at the border."""
    _, h, w = data.shape
    for f in range(first, end):
        for y in range(h):
            above, below = max(y - 1, 0), min(y + 1, h - 1)
            part = np.float32(1 / (below - above))
            down = np.float32(0.0)
            across = np.float32(0.0)
            for x in range(1, w - 1):
                dy = part * (data[f, below, x] - data[f, above, x])
                dx = np.float32(0.5) * (data[f, y, x + 1] - data[f, y, x - 1])
                down += weight[f, y, x] * dy * dy
                across += weight[f, y, x] * dx * dx
            for x in (0, w - 1):
                dy = part * (data[f, below, x] - data[f, above, x])
                dx = data[f, y, min(x + 1, w - 1)] - data[f, y, max(x - 1, 0)]
                down += weight[f, y, x] * dy * dy
                across += weight[f, y, x] * dx * dx
            out[f, 0, y] = down
            out[f, 1, y] = across


@_kernel
def air_sums(
    first: int, end: int, data: F32, ring: Bool, rows: Bool, columns: Bool, planes: FloatArray, limit: FloatArray,
    sums: FloatArray,
) -> None:  # fmt: skip
    """Sum over the air of every frame: ``1, y, x, y^2, x y, x^2``, their first three times data, squared misfits.

    Air is where `ring` is, what the frame has recorded, within `limit` of its plane. Lengths in half widths from the
    middle.
    """
    _, height, width = data.shape
    for f in range(first, end):
        for row in range(height):
            if not rows[f, row]:
                continue
            y = np.float32((row - (height - 1) / 2) / (width / 2))
            level = np.float32(planes[f, 0] + planes[f, 1] * y)
            slope = np.float32(planes[f, 2])
            n = np.float32(0.0)
            sx = np.float32(0.0)
            sxx = np.float32(0.0)
            d = np.float32(0.0)
            dx = np.float32(0.0)
            rest = np.float32(0.0)
            for column in range(width):
                x = np.float32((column - (width - 1) / 2) / (width / 2))
                value = data[f, row, column]
                off = value - (level + slope * x)
                inside = ring[row, column] and columns[f, column] and abs(off) < limit[f]
                use = np.float32(1.0) if inside else np.float32(0.0)
                n += use
                sx += use * x
                sxx += use * x * x
                d += use * value
                dx += use * x * value
                rest += use * off * off
            sums[f, 0] += n
            sums[f, 1] += y * n
            sums[f, 2] += sx
            sums[f, 3] += y * y * n
            sums[f, 4] += y * sx
            sums[f, 5] += sxx
            sums[f, 6] += d
            sums[f, 7] += y * d
            sums[f, 8] += dx
            sums[f, 9] += rest
