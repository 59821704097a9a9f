"""`place`: the one interpolation between recorded pixels and the common grid.

Magnification, roll, shift and rotation centre are applied together, once, by gathering: the value at a point ``q`` of
the common grid is read from the recorded frame at ``p = M R(roll) q + shift``. Values are absorbance per pixel (or
counts, or flats); they are not scaled by M, a line integral being what it is whatever the pixel size.

The kernel is Keys' six-point cubic convolution (fourth order: exact for cubics; Keys 1981, doi
10.1109/TASSP.1981.1163711). Where an output pixel is wider than a recorded one (M > 1, or binned output) the kernel is
stretched to the output pixel, so that every recorded photon counts, and corrected so that it stays exact for cubics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal, TypeVar, cast, overload

import numba as nb
import numpy as np
import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from napari_xanes_tomo.model import Alignment, FloatArray
from napari_xanes_tomo.parallel import in_threads

__all__ = ["noise_power", "place", "rows_needed", "widened", "widening"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
_F = TypeVar("_F", bound=Callable[..., Any])

_PHASES = 1024  # sub-pixel positions in the table of the path with roll; between them weights are interpolated linearly
_FINE_PHASES = 2048  # the same for stretched kernels without roll: single precision holds no more
_SUPPORT = {1: 1.0, 2: 2.0, 3: 3.0}  # half width of the kernels, recorded pixels at M = 1


def _jit(function: _F) -> _F:
    """Compile for the machine at first use, kept on disk, without the GIL."""
    return cast(_F, nb.njit(cache=True, nogil=True, fastmath={"contract"})(function))


@_jit
def _kernel(order: int, s: float) -> float:
    """Value of the interpolation kernel at distance `s`; factored so that it is exactly 0 at the integers."""
    s = abs(s)
    if order == 1:
        return max(0.0, 1.0 - s)
    if order == 2:  # four-point cubic convolution, exact for quadratics
        if s < 1.0:
            return (1.0 - s) * (1.0 + s - 1.5 * s * s)
        if s < 2.0:
            return 0.5 * (1.0 - s) * (2.0 - s) * (2.0 - s)
        return 0.0
    if s < 1.0:
        return (1.0 - s) * (1.0 + s - (4.0 / 3.0) * s * s)
    if s < 2.0:
        return (s - 1.0) * (2.0 - s) * ((7.0 / 12.0) * s - 1.25)
    if s < 3.0:
        return (s - 2.0) * (s - 3.0) * (s - 3.0) / 12.0
    return 0.0


@_jit
def _weights(fraction: float, order: int, stretch: float, reach: int, out: F64) -> None:
    """Weights of the taps ``1 - reach .. reach`` (from the pixel below) for a point `fraction` above that pixel.

    A stretched kernel is sampled, not integrated; the polynomial times a window that is added to it makes its moments
    up to `order` exact again (sum 1, the others 0), so that polynomials up to that degree are reproduced.
    """
    for t in range(2 * reach):
        out[t] = _kernel(order, (t - reach + 1 - fraction) / stretch) / stretch
    if stretch == 1.0:
        return
    size = order + 1
    normal = np.zeros((size, size))
    missing = np.zeros(size)
    missing[0] = 1.0
    for t in range(2 * reach):
        d = (t - reach + 1 - fraction) / reach
        window = max(0.0, 1.0 - d * d)
        power = 1.0
        for i in range(2 * order + 1):
            for j in range(size):
                if 0 <= i - j < size:
                    normal[i - j, j] += window * power
            if i < size:
                missing[i] -= out[t] * power
            power *= d
    for i in range(size):  # positive definite: elimination needs no pivots
        for r in range(i + 1, size):
            factor = normal[r, i] / normal[i, i]
            for j in range(i, size):
                normal[r, j] -= factor * normal[i, j]
            missing[r] -= factor * missing[i]
    for i in range(size - 1, -1, -1):
        for j in range(i + 1, size):
            missing[i] -= normal[i, j] * missing[j]
        missing[i] /= normal[i, i]
    for t in range(2 * reach):
        d = (t - reach + 1 - fraction) / reach
        value = 0.0
        for i in range(order, -1, -1):
            value = value * d + missing[i]
        out[t] += value * max(0.0, 1.0 - d * d)


@_jit
def _axis(
    origin: float, pitch: float, first: int, count: int, size: int, order: int, stretch: float, reach: int,
    table: F64, square: bool, start: I64, weight: F32, cover: F64,
) -> None:  # fmt: skip
    """Find taps of `count` output pixels on an axis of `size` recorded ones; i is at ``origin + pitch (first + i)``.

    Taps outside have weight 0 and the rest is normalised; `cover` is the part of the kernel that lies inside. `table`
    holds the weights of a stretched kernel by the sub-pixel position.
    """
    taps = np.empty(2 * reach)
    phases = table.shape[0] - 1
    for i in range(count):
        p = origin + pitch * (first + i)
        below = math.floor(p)
        cover[i] = 0.0
        start[i] = 0
        weight[i] = 0.0
        if below < -reach or below > size + reach:
            continue
        at = int(below) - reach + 1
        if stretch == 1.0:
            _weights(p - below, order, stretch, reach, taps)
        else:
            at_phase = (p - below) * phases
            k = min(phases - 1, int(at_phase))
            u = at_phase - k
            for t in range(2 * reach):
                taps[t] = table[k, t] + u * (table[k + 1, t] - table[k, t])
        inside = 0.0
        part = 0.0
        total = 0.0
        for t in range(2 * reach):
            total += abs(taps[t])
            if 0 <= at + t < size:
                inside += taps[t]
                part += abs(taps[t])
        start[i] = at
        cover[i] = part / total
        if inside > 0.25:  # less would only amplify
            whole = at >= 0 and at + 2 * reach <= size
            for t in range(2 * reach):
                if 0 <= at + t < size:
                    w = taps[t] if whole else taps[t] / inside
                    weight[i, t] = w * w if square else w


@_jit
def _fill_table(order: int, stretch: float, reach: int, table: F64) -> None:
    """See `_table`."""
    phases = table.shape[0] - 1
    for k in range(phases + 1):
        _weights(k / phases, order, stretch, reach, table[k])


_octet = ir.VectorType(ir.FloatType(), 8)


def _emit_octet(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """Load ``array[index : index + 8]`` into a SIMD register."""
    data = context.make_array(array_type)(context, builder, array).data
    value = builder.load(builder.bitcast(builder.gep(data, [index]), _octet.as_pointer()))
    value.align = 4
    return value


def _emit_splat(builder: Any, value: Any) -> Any:
    undefined = ir.Constant(_octet, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(ir.IntType(32), 8), [0] * 8))


def _emit_sum(builder: Any, value: Any) -> Any:
    """Add the eight floats of a register, always in the same order."""
    size = 8
    while size > 1:
        size //= 2
        halves = []
        for start in (0, size):
            lanes = ir.Constant(ir.VectorType(ir.IntType(32), size), list(range(start, start + size)))
            halves.append(builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), lanes))
        value = builder.fadd(*halves)
    return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))


def _intrinsic(function: Any) -> Any:
    """Make a numba intrinsic; as `Any`, since its Python signature is not the one it is called with."""
    return intrinsic(function)


@_intrinsic
def _dot(typingctx: Any, a: Any, i: Any, b: Any, j: Any) -> Any:
    """Return the sum of ``a[i : i + 8] * b[j : j + 8]`` (1-D float32 arrays)."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        left = _emit_octet(context, builder, sig.args[0], args[0], args[1])
        right = _emit_octet(context, builder, sig.args[2], args[2], args[3])
        return _emit_sum(builder, builder.fmul(left, right))

    return signature(types.float32, a, types.int64, b, types.int64), codegen


@_intrinsic
def _stencil(
    typingctx: Any, frame: Any, start: Any, width: Any, wy: Any, taps: Any, table: Any, at: Any, hop: Any, v: Any,
    square: Any,
) -> Any:  # fmt: skip
    """Return the sum over a stencil of 8 columns and `taps` rows of a frame `width` wide, first pixel ``frame[start]``.

    Rows are weighted by `wy`, columns by ``table[at : at + 8]`` and ``table[at + hop : ...]``, mixed in the ratio `v`,
    squared if `square`.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = dict(zip(("frame", "start", "width", "wy", "taps", "table"), sig.args, strict=False))
        frame, start, width, wy, taps, table, at, hop, v, square = args
        total = cgutils.alloca_once_value(builder, ir.Constant(_octet, [0.0] * 8))
        weights = context.make_array(kind["wy"])(context, builder, wy).data
        with cgutils.for_range(builder, taps) as loop:
            index = builder.add(start, builder.mul(loop.index, width))
            row = _emit_octet(context, builder, kind["frame"], frame, index)
            weight = _emit_splat(builder, builder.load(builder.gep(weights, [loop.index])))
            product = builder.fmul(weight, row, flags=("contract",))
            builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
        here = _emit_octet(context, builder, kind["table"], table, at)
        there = _emit_octet(context, builder, kind["table"], table, builder.add(at, hop))
        columns = builder.fadd(here, builder.fmul(_emit_splat(builder, v), builder.fsub(there, here)))
        columns = builder.select(square, builder.fmul(columns, columns), columns)
        return _emit_sum(builder, builder.fmul(builder.load(total), columns))

    n = types.int64
    return signature(types.float32, frame, n, n, wy, n, table, n, n, types.float32, types.boolean), codegen


@_jit
def _place_straight(
    frames: F32, row_offset: int, height: int, shift: F64, pitch: float, ny: int, nx: int, q0: int, q1: int,
    order: int, stretch: float, reach: int, table: F64, square: bool, out: F32, coverage: F32, want: bool,
) -> None:  # fmt: skip
    """Frames without roll: first along y (whole rows), then along x."""
    rows = q1 - q0
    slab, width = frames.shape[1], frames.shape[2]
    taps = 2 * reach
    sy = np.empty(rows, np.int64)
    wy = np.empty((rows, taps), np.float32)
    cy = np.empty(rows)
    sx = np.empty(nx, np.int64)
    octets = (taps + 7) // 8
    wx = np.zeros((nx, 8 * octets), np.float32)
    flat = wx.reshape(-1)
    cx = np.empty(nx)
    line = np.zeros(width + 2 * taps + 8, np.float32)
    for f in range(frames.shape[0]):
        if not (math.isfinite(shift[f, 0]) and math.isfinite(shift[f, 1])):
            out[f] = 0.0
            if want:
                coverage[f] = 0.0
            continue
        oy = shift[f, 0] + (height - 1) / 2 - pitch * (ny - 1) / 2
        ox = shift[f, 1] + (width - 1) / 2 - pitch * (nx - 1) / 2
        _axis(oy, pitch, q0, rows, height, order, stretch, reach, table, square, sy, wy, cy)
        _axis(ox, pitch, 0, nx, width, order, stretch, reach, table, square, sx, wx, cx)
        if pitch == 1.0:  # the same weights everywhere: columns lo..hi have all their taps inside
            base = math.floor(ox) - reach + 1
            lo = min(nx, max(0, -base))
            hi = max(lo, min(nx, width - base - taps + 1))
        else:
            base = lo = hi = 0
        for i in range(rows):
            if cy[i] <= 0.5:
                out[f, i] = 0.0
                if want:
                    coverage[f, i] = 0.0
                continue
            body = line[taps : taps + width]
            body[:] = 0.0
            for t in range(taps):
                w = wy[i, t]
                r = sy[i] + t - row_offset
                if w != 0.0 and 0 <= r < slab:
                    source = frames[f, r]
                    for x in range(width):
                        body[x] += w * source[x]
            target = out[f, i]
            if hi > lo:
                for x in range(lo, hi):
                    target[x] = 0.0
                for t in range(taps):
                    w = wx[lo, t]
                    if w != 0.0:
                        shifted = body[lo + base + t : hi + base + t]
                        part = target[lo:hi]
                        for x in range(hi - lo):
                            part[x] += w * shifted[x]
            for x in range(nx):
                if lo <= x < hi:
                    continue
                value = np.float32(0.0)
                if cy[i] * cx[x] > 0.5:
                    at = sx[x] + taps
                    for o in range(octets):
                        value += _dot(flat, 8 * (x * octets + o), line, at + 8 * o)
                target[x] = value
            if want:
                for x in range(nx):
                    coverage[f, i, x] = cy[i] * cx[x]


@_jit
def _place_rolled(
    frames: F32, row_offset: int, height: int, shift: F64, matrix: F64, pitch: float, ny: int, nx: int, q0: int,
    q1: int, table: F32, reach: int, square: bool, out: F32, coverage: F32, want: bool,
) -> None:  # fmt: skip
    """Frames with roll: both axes at once, weights from a table of sub-pixel positions."""
    slab, width = frames.shape[1], frames.shape[2]
    taps = 2 * reach
    phases = table.shape[0] - 1
    hop = table.shape[1]
    table_flat = table.reshape(-1)
    wy = np.empty(taps, np.float32)
    wx = np.empty(taps, np.float32)
    for f in range(frames.shape[0]):
        finite = math.isfinite(shift[f, 0]) and math.isfinite(shift[f, 1])
        flat = frames[f].reshape(-1)
        for i in range(q1 - q0):
            qy = pitch * (q0 + i - (ny - 1) / 2)
            for x in range(nx):
                value = np.float32(0.0)
                cover = 0.0
                if finite:
                    qx = pitch * (x - (nx - 1) / 2)
                    py = matrix[0, 0] * qy + matrix[0, 1] * qx + shift[f, 0] + (height - 1) / 2
                    px = matrix[1, 0] * qy + matrix[1, 1] * qx + shift[f, 1] + (width - 1) / 2
                    by = math.floor(py)
                    bx = math.floor(px)
                    if -reach <= by <= height + reach and -reach <= bx <= width + reach:
                        ay = int(by) - reach + 1
                        ax = int(bx) - reach + 1
                        e = (py - by) * phases
                        k = min(phases - 1, int(e))
                        u = np.float32(e - k)
                        e = (px - bx) * phases
                        j = min(phases - 1, int(e))
                        v = np.float32(e - j)
                        if ay >= row_offset and ay + taps <= row_offset + slab and ax >= 0 and ax + hop <= width:
                            for t in range(taps):
                                w = table[k, t] + u * (table[k + 1, t] - table[k, t])
                                wy[t] = w * w if square else w
                            begin = (ay - row_offset) * width + ax
                            for o in range(0, hop, 8):
                                value += _stencil(
                                    flat, begin + o, width, wy, taps, table_flat, j * hop + o, hop, v, square
                                )
                            out[f, i, x] = value
                            if want:
                                coverage[f, i, x] = 1.0
                            continue
                        iy = np.float32(0.0)
                        ix = np.float32(0.0)
                        all_y = np.float32(0.0)
                        all_x = np.float32(0.0)
                        part_y = np.float32(0.0)
                        part_x = np.float32(0.0)
                        for t in range(taps):
                            wy[t] = table[k, t] + u * (table[k + 1, t] - table[k, t])
                            wx[t] = table[j, t] + v * (table[j + 1, t] - table[j, t])
                            all_y += abs(wy[t])
                            all_x += abs(wx[t])
                            if 0 <= ay + t < height:
                                iy += wy[t]
                                part_y += abs(wy[t])
                            else:
                                wy[t] = 0.0
                            if 0 <= ax + t < width:
                                ix += wx[t]
                                part_x += abs(wx[t])
                            else:
                                wx[t] = 0.0
                        cover = float((part_y / all_y) * (part_x / all_x))
                        if cover > 0.5:
                            if square:
                                for t in range(taps):
                                    wy[t] *= wy[t]
                                    wx[t] *= wx[t]
                            for t in range(taps):
                                r = ay + t - row_offset
                                if wy[t] != 0.0 and 0 <= r < slab:
                                    part = np.float32(0.0)
                                    if ax >= 0 and ax + taps <= width:
                                        for s in range(taps):
                                            part += wx[s] * frames[f, r, ax + s]
                                    else:
                                        for s in range(taps):
                                            if 0 <= ax + s < width:
                                                part += wx[s] * frames[f, r, ax + s]
                                    value += wy[t] * part
                            norm = iy * ix
                            value /= norm * norm if square else norm
                out[f, i, x] = value
                if want:
                    coverage[f, i, x] = cover


def _geometry(alignment: Alignment, bin: int, order: int) -> tuple[float, int]:
    """Return the stretch of the kernel and its reach in recorded pixels."""
    if order not in _SUPPORT:
        raise ValueError(f"order: expected one of {sorted(_SUPPORT)}, got {order}")
    if bin < 1 or bin != int(bin):
        raise ValueError(f"bin: expected a whole number >= 1, got {bin}")
    stretch = max(1.0, alignment.magnification * bin)
    return stretch, math.ceil(_SUPPORT[order] * stretch)


@lru_cache(maxsize=128)
def _table(phases: int, order: int, stretch: float, reach: int) -> F64:
    """Return the weights at sub-pixel positions 0, 1 / phases, .. 1: (phases + 1, taps in whole SIMD registers)."""
    table = np.zeros((phases + 1, 8 * -(-2 * reach // 8)))
    _fill_table(order, stretch, reach, table)
    return table


def _bounds(rows: tuple[int, int] | None, ny: int) -> tuple[int, int]:
    q0, q1 = (0, ny) if rows is None else rows
    if not 0 <= q0 <= q1 <= ny:
        raise ValueError(f"rows: expected 0 <= q0 <= q1 <= {ny}, got {(q0, q1)}")
    return int(q0), int(q1)


def rows_needed(
    alignment: Alignment,
    *,
    rows: tuple[int, int],
    grid_shape: tuple[int, int],
    frame_shape: tuple[int, int],
    bin: int = 1,
    order: int = 3,
    index: Sequence[int] | None = None,
) -> tuple[int, int]:
    """Return the detector rows ``(y0, y1)`` that `place` reads to make output rows `rows` of all projections.

    The support of the kernel is included; clipped to the frame (``y0 == y1`` when nothing is inside). Parameters as in
    `place`.
    """
    _, reach = _geometry(alignment, bin, order)
    q0, q1 = _bounds(rows, grid_shape[0])
    shift = alignment.shift if index is None else alignment.shift[np.asarray(index, dtype=int)]
    dy = shift[:, 0][np.isfinite(shift).all(axis=1)]
    if q0 == q1 or dy.size == 0:
        return 0, 0
    qy = bin * (np.array([q0, q1 - 1]) - (grid_shape[0] - 1) / 2)
    qx = bin * (grid_shape[1] - 1) / 2 * np.array([-1.0, 1.0])
    m = alignment.matrix
    p = (m[0, 0] * qy[:, None] + m[0, 1] * qx) + (frame_shape[0] - 1) / 2
    # one row more than needed on each side where p falls within rounding of a whole pixel
    y0 = math.floor(p.min() + dy.min() - 1e-6) - reach + 1
    y1 = math.floor(p.max() + dy.max() + 1e-6) + reach + 1
    y0, y1 = (min(max(y, 0), frame_shape[0]) for y in (y0, y1))
    return y0, max(y0, y1)


@overload
def place(
    frames: npt.ArrayLike,
    alignment: Alignment,
    *,
    grid_shape: tuple[int, int] | None = ...,
    rows: tuple[int, int] | None = ...,
    index: Sequence[int] | None = ...,
    bin: int = ...,
    order: int = ...,
    row_offset: int = ...,
    frame_shape: tuple[int, int] | None = ...,
    square: bool = ...,
    return_coverage: Literal[False] = ...,
    threads: int | None = ...,
) -> F32: ...


@overload
def place(
    frames: npt.ArrayLike,
    alignment: Alignment,
    *,
    grid_shape: tuple[int, int] | None = ...,
    rows: tuple[int, int] | None = ...,
    index: Sequence[int] | None = ...,
    bin: int = ...,
    order: int = ...,
    row_offset: int = ...,
    frame_shape: tuple[int, int] | None = ...,
    square: bool = ...,
    return_coverage: Literal[True],
    threads: int | None = ...,
) -> tuple[F32, F32]: ...


def place(
    frames: npt.ArrayLike,
    alignment: Alignment,
    *,
    grid_shape: tuple[int, int] | None = None,
    rows: tuple[int, int] | None = None,
    index: Sequence[int] | None = None,
    bin: int = 1,
    order: int = 3,
    row_offset: int = 0,
    frame_shape: tuple[int, int] | None = None,
    square: bool = False,
    return_coverage: bool = False,
    threads: int | None = None,
) -> F32 | tuple[F32, F32]:
    """Bring recorded frames ``(frame, y, x)`` to the common grid; return ``(frame, q1 - q0, nx)`` float32.

    Output pixel ``(i, j)`` is at ``q = bin * (i - (ny - 1) / 2, j - (nx - 1) / 2)`` reference pixels and takes the
    recorded value at ``p = M R(roll) q + shift``, measured from the detector centre. A positive shift is a
    displacement of the recorded content down / right, which is undone here.

    Parameters
    ----------
    frames : (n, h, w) array
        Detector rows ``row_offset : row_offset + h`` of the frames, all columns.
    alignment : Alignment
        Raw detector pixels. A frame whose shift is not finite comes out as zeros without coverage.
    grid_shape : (ny, nx), optional
        Output pixels of the whole common grid; the frame's own shape (divided by `bin`) unless given.
    rows : (q0, q1), optional
        The output rows wanted. A slab is bit for bit the same as those rows of the whole.
    index : sequence of int, optional
        The entry of `alignment` each frame belongs to; all of them in order unless given.
    bin : int
        Width of an output pixel, reference pixels.
    order : {1, 2, 3}
        Degree of the polynomials the kernel reproduces: linear, four-point cubic, six-point cubic.
    row_offset, frame_shape : int, (H, W)
        Where `frames` lie in the full frame, and its shape; see `rows_needed`.
    square : bool
        Square the kernel: `frames` is then a variance (of independent pixels) and so is the result.
    return_coverage : bool
        Also return the part of the kernel, 0..1, that lies inside the recorded frame, same shape as the result.
    threads : int, optional
        All cores unless given. The result does not depend on it.

    Returns
    -------
    (n, q1 - q0, nx) float32
        Where at most half of the kernel is inside the recorded frame the value is 0; elsewhere it is normalised by the
        part inside.
    """
    data = np.asarray(frames, dtype=np.float32)
    if data.ndim != 3:
        raise ValueError(f"frames: expected (frame, y, x), got shape {data.shape}")
    data = np.ascontiguousarray(data)
    height, width = (row_offset + data.shape[1], data.shape[2]) if frame_shape is None else frame_shape
    if width != data.shape[2] or row_offset < 0 or row_offset + data.shape[1] > height:
        raise ValueError(
            f"frames: expected rows within a frame of {(height, width)}, got {data.shape} from row {row_offset} on"
        )
    stretch, reach = _geometry(alignment, bin, order)
    ny, nx = (max(1, height // bin), max(1, width // bin)) if grid_shape is None else grid_shape
    q0, q1 = _bounds(rows, ny)
    shift = np.asarray(alignment.shift, dtype=np.float64)
    if index is not None:
        shift = shift[np.asarray(index, dtype=int)]
    if len(shift) != len(data):
        raise ValueError(f"alignment: expected {len(data)} entries, one a frame, got {len(shift)}; see `index`")
    shift = np.ascontiguousarray(shift)
    y0, y1 = rows_needed(
        alignment, rows=(q0, q1), grid_shape=(ny, nx), frame_shape=(height, width), bin=bin, order=order, index=index
    )
    if y1 > y0 and (y0 < row_offset or y1 > row_offset + data.shape[1]):
        raise ValueError(
            f"frames: rows {y0}:{y1} of the detector are needed for output rows {q0}:{q1}, "
            f"got {row_offset}:{row_offset + data.shape[1]}; see `rows_needed`"
        )
    out = np.empty((len(data), q1 - q0, nx), np.float32)
    coverage = np.empty(out.shape if return_coverage else (0, 0, 0), np.float32)
    straight = alignment.roll_deg == 0.0
    matrix = alignment.matrix.astype(np.float64)
    fine, table = np.empty((1, 1)), np.empty((1, 1), np.float32)
    if not straight:
        table = _table(_PHASES, order, stretch, reach).astype(np.float32)
    elif stretch != 1.0:
        fine = _table(_FINE_PHASES, order, stretch, reach)

    def work(a: int, b: int) -> None:
        part = coverage[a:b] if return_coverage else coverage
        if straight:
            _place_straight(
                data[a:b], row_offset, height, shift[a:b], alignment.magnification * bin, ny, nx, q0, q1, order,
                stretch, reach, fine, square, out[a:b], part, return_coverage,
            )  # fmt: skip
        else:
            _place_rolled(
                data[a:b], row_offset, height, shift[a:b], matrix, float(bin), ny, nx, q0, q1, table, reach,
                square, out[a:b], part, return_coverage,
            )  # fmt: skip

    in_threads(len(data), work, threads=threads)
    return (out, coverage) if return_coverage else out


def noise_power(
    alignment: Alignment,
    frequency: npt.ArrayLike,
    *,
    grid_shape: tuple[int, int],
    frame_shape: tuple[int, int],
    index: Sequence[int] | None = None,
    bin: int = 1,
    order: int = 3,
) -> F64:
    """Return ``(frame, 2, frequency)``: the noise power along y and x that `place` leaves of white noise of variance 1.

    The power of an output pixel at frequencies (fy, fx) is the product of the two. Where every output pixel stands at
    the same sub-pixel position (M = 1, no roll) it is the exact power for that position; elsewhere the positions drift
    across the frame and the power is the mean over them.

    Parameters
    ----------
    alignment, grid_shape, frame_shape, index, bin, order
        As in `place`; entries without a finite shift give the mean power.
    frequency : (m,) array
        Cycles per output pixel, 0 .. 0.5.
    """
    stretch, reach = _geometry(alignment, bin, order)
    f = np.asarray(frequency, dtype=float)
    pitch = alignment.magnification * bin
    shift = np.asarray(alignment.shift if index is None else alignment.shift[np.asarray(index, dtype=int)])
    # Averaged over the sub-pixel positions, the covariance of two output pixels is the kernel's autocorrelation.
    step = 1.0 / 64
    kernel = np.array([_kernel(order, s) for s in np.arange(-_SUPPORT[order], _SUPPORT[order] + step / 2, step)])
    correlation = np.convolve(kernel, kernel) * step
    lag = (np.arange(len(correlation)) - (len(correlation) - 1) / 2) * step
    lags = np.arange(math.ceil(2 * reach / pitch) + 1)
    covariance = np.interp(lags * pitch / stretch, lag, correlation, right=0.0) / stretch
    cosine = np.where(lags[:, None] > 0, 2.0, 1.0) * np.cos(2 * np.pi * lags[:, None] * f)
    out = np.empty((len(shift), 2, f.size))
    out[:] = np.maximum(covariance @ cosine, 0.0)
    drift = (abs(pitch - 1.0) + abs(np.deg2rad(alignment.roll_deg))) * max(grid_shape)
    if drift >= 1.0:
        return out
    taps = np.zeros(2 * reach)
    for axis in range(2):
        origin = shift[:, axis] + (frame_shape[axis] - 1) / 2 - pitch * (grid_shape[axis] - 1) / 2
        for i in np.flatnonzero(np.isfinite(shift).all(axis=1)):
            _weights(float(origin[i] % 1.0), order, 1.0, reach, taps)
            pairs = np.correlate(taps, taps, "full")[2 * reach - 1 :]
            use = min(len(pairs), len(lags))
            out[i, axis] = np.maximum(pairs[:use] @ cosine[:use], 0.0)
    return out


def widening(variance: float) -> FloatArray:
    """Return the weights of a blur of exactly this variance, px^2, however small: the discrete Gaussian.

    ``exp(-v) I_n(v)`` (Lindeberg 1990, doi 10.1109/34.49051); its response is ``exp(-v (1 - cos 2 pi f))``.
    """
    from scipy.special import ive

    reach = int(np.ceil(1 + 5 * np.sqrt(variance)))
    weight = ive(np.abs(np.arange(-reach, reach + 1)), variance)
    return np.asarray(weight / weight.sum())


def widened(frames: F32, variance: float) -> F32:
    """Return frames (n, y, x) blurred by `variance`, px^2, along y and x; a filter on the samples as they are."""
    from scipy.ndimage import convolve1d

    if not variance > 0:
        return frames
    weight = widening(variance)
    for axis in (1, 2):
        frames = convolve1d(frames, weight, axis=axis, mode="nearest")
    return frames
