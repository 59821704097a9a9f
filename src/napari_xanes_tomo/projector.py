"""Parallel-beam forward and back projection on a CPU, many detector rows at once, an exact adjoint pair.

A projection's one-dimensional spectrum is a radial line through the two-dimensional spectrum of the slice (Fourier
slice theorem), so projecting is one 2-D FFT, an interpolation onto radial lines and short 1-D FFTs. The interpolation
uses a Kaiser-Bessel kernel on a slightly oversampled grid (non-uniform FFT; Fessler & Sutton 2003, doi
10.1109/TSP.2002.807005; kernel shape: Beatty et al. 2005, doi 10.1109/TMI.2005.848376). Back projection is the same
chain transposed, hence exact.

Sixteen slices travel together: eight complex numbers a grid node, real part one slice and imaginary part another,
which is one cache line and two SIMD registers. FFTs, gridding and phases are therefore SIMD over slices with no
shuffles, and the interpolation weights are read once for sixteen slices. Kernels release the GIL and are run by plain
threads; who computes what does not depend on the number of threads, so neither does the result.

Volumes are ``(y, z, x)``, projections ``(angle, y, column)``; a point ``(x, z)``, measured from the middle ``(n - 1) /
2`` of the grid, is seen at ``u = x cos(theta) + z sin(theta)`` from the middle ``(n_detector - 1) / 2`` of the
detector.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, ClassVar, TypeVar, cast

import numba as nb
import numpy as np
import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

__all__ = ["FILTERS", "Projector", "filter_response"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
_F = TypeVar("_F", bound=Callable[..., Any])

LANES = 8  # complex numbers a node
ROWS = 2 * LANES  # slices that travel together
NODE = 2 * LANES  # floats a node: 8 real parts, then 8 imaginary parts
_CENTRE = 6  # samples of a line on either side of frequency 0 that are added in double precision


def _kernel(function: _F) -> _F:
    """Compile for the machine at first use, kept on disk, without the GIL."""
    return cast(_F, nb.njit(cache=True, nogil=True, fastmath={"contract"}, boundscheck=False)(function))


def _intrinsic(function: Any) -> Any:
    """Make a numba intrinsic; as `Any`, since its Python signature is not the one it is called with."""
    return intrinsic(function)


# ---------------------------------------------------------------- eight floats as one numba value


class _Float8(types.Type):
    def __init__(self) -> None:
        super().__init__(name="float32x8")


_f8 = _Float8()
_vector = ir.VectorType(ir.FloatType(), LANES)
_contract = ("contract",)


@register_model(_Float8)
class _Float8Model(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, _vector)  # type: ignore[no-untyped-call]


def _define(op: Any, emit: str) -> None:
    class _Operator(ConcreteTemplate):
        cases: ClassVar[list[Any]] = [signature(_f8, _f8, _f8)]

    infer_global(op)(_Operator)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return getattr(builder, emit)(args[0], args[1], flags=_contract)

    lower_builtin(op, _f8, _f8)(lower)


_define(operator.add, "fadd")
_define(operator.sub, "fsub")
_define(operator.mul, "fmul")


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), _vector.as_pointer())


def _emit_load(builder: Any, pointer: Any) -> Any:
    value = builder.load(pointer)
    value.align = 4
    return value


def _emit_splat(builder: Any, value: Any) -> Any:
    first = builder.insert_element(ir.Constant(_vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(first, ir.Constant(_vector, ir.Undefined), zeros)


@_intrinsic
def _load(typingctx: Any, array: Any, index: Any) -> Any:
    """Return ``array[index : index + 8]`` of a 1-D float32 array."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _emit_load(builder, _pointer(context, builder, sig.args[0], args[0], args[1]))

    return signature(_f8, array, types.int64), codegen


@_intrinsic
def _store(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """Write `value` to ``array[index : index + 8]`` of a 1-D float32 array."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        store = builder.store(args[2], _pointer(context, builder, sig.args[0], args[0], args[1]))
        store.align = 4
        return context.get_dummy_value()

    return signature(types.void, array, types.int64, _f8), codegen


@_intrinsic
def _splat(typingctx: Any, value: Any) -> Any:
    """Return eight copies of a float32."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _emit_splat(builder, args[0])

    return signature(_f8, types.float32), codegen


def _transposer(scale_after: bool) -> Any:
    """Make ``f(src, at, step, dst, to, hop, scale, first, factor)``: transpose eight vectors of eight floats.

    Vector j is read at ``src[at + j step]`` and, transposed, written at ``dst[to + j hop]``; the vectors are
    multiplied by ``scale[first : first + 8] * factor`` after (or before) transposition.
    """

    @_intrinsic
    def transpose(
        typingctx: Any, src: Any, at: Any, step: Any, dst: Any, to: Any, hop: Any, scale: Any, first: Any, factor: Any
    ) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            i32 = ir.IntType(32)
            undefined = ir.Constant(_vector, ir.Undefined)
            weight = _emit_load(builder, _pointer(context, builder, sig.args[6], args[6], args[7]))
            weight = builder.fmul(weight, _emit_splat(builder, args[8]))
            rows = []
            index = args[1]
            for _ in range(LANES):
                rows.append(_emit_load(builder, _pointer(context, builder, sig.args[0], args[0], index)))
                index = builder.add(index, args[2])
            if not scale_after:
                rows = [builder.fmul(row, weight) for row in rows]
            for half in (1, 2, 4):  # three butterflies of pairwise exchanges, rows `half` apart
                lo = [j if not j & half else LANES + j - half for j in range(LANES)]
                hi = [j + half if not j & half else LANES + j for j in range(LANES)]
                out: list[Any] = [undefined] * LANES
                for j in range(LANES):
                    if not j & half:
                        a, b = rows[j], rows[j + half]
                        for target, mask in ((j, lo), (j + half, hi)):
                            vector = ir.Constant(ir.VectorType(i32, LANES), mask)
                            out[target] = builder.shuffle_vector(a, b, vector)
                rows = out
            if scale_after:
                rows = [builder.fmul(row, weight) for row in rows]
            index = args[4]
            for row in rows:
                store = builder.store(row, _pointer(context, builder, sig.args[3], args[3], index))
                store.align = 4
                index = builder.add(index, args[5])
            return context.get_dummy_value()

        n = types.int64
        return signature(types.void, src, n, n, dst, n, n, scale, n, types.float32), codegen

    return transpose


_transpose_scaled = _transposer(scale_after=False)
_transpose_then_scale = _transposer(scale_after=True)


# ---------------------------------------------------------------- FFT of many columns (Stockham, radices 4, 2, 3, 5)


def _fast_length(n: int) -> int:
    """Return the smallest even 5-smooth number >= n."""
    n = max(n + n % 2, 8)
    while True:
        rest = n
        for p in (2, 3, 5):
            while rest % p == 0:
                rest //= p
        if rest == 1:
            return n
        n += 2


@lru_cache(maxsize=32)
def _plan(n: int) -> tuple[I64, F32]:
    """Return the radices of a length-`n` transform and its twiddle factors (re, im in turn, pass after pass)."""
    radices = []
    rest = n
    for p in (4, 2, 3, 5):
        while rest % p == 0:
            radices.append(p)
            rest //= p
    # the pass with the smallest blocks first wastes least on twiddles: odd radices last
    twiddles: list[F64] = []
    length = n
    for r in radices:
        m = length // r
        angle = -2 * np.pi * np.outer(np.arange(m), np.arange(1, r)) / length
        twiddles.append(np.stack([np.cos(angle), np.sin(angle)], axis=-1).ravel())
        length = m
    return np.array(radices, dtype=np.int64), np.concatenate(twiddles).astype(np.float32)


@_kernel
def _fft(x: F32, y: F32, n: int, radices: I64, tw: F32) -> bool:
    """Transform ``x`` (n nodes, exponent -1, unnormalised) using ``y`` as scratch; True when the result is in ``y``.

    The inverse transform is the same with the index negated, which costs nothing where indices are permuted anyway.
    """
    in_y = False
    s = 1
    length = n
    t = 0
    c3 = _splat(np.float32(-0.5))
    s3 = _splat(np.float32(-0.8660254037844386))
    c51 = _splat(np.float32(0.30901699437494745))
    c52 = _splat(np.float32(-0.8090169943749475))
    s51 = _splat(np.float32(-0.9510565162951535))
    s52 = _splat(np.float32(-0.5877852522924731))
    for f in range(radices.size):
        r = radices[f]
        m = length // r
        src = y if in_y else x
        dst = x if in_y else y
        hop = 16 * s * m
        out = 16 * s
        if r == 4:
            for p in range(m):
                w1r, w1i = _splat(tw[t]), _splat(tw[t + 1])
                w2r, w2i = _splat(tw[t + 2]), _splat(tw[t + 3])
                w3r, w3i = _splat(tw[t + 4]), _splat(tw[t + 5])
                t += 6
                for q in range(s):
                    i = 16 * (q + s * p)
                    o = 16 * (q + s * 4 * p)
                    ar, ai = _load(src, i), _load(src, i + 8)
                    br, bi = _load(src, i + hop), _load(src, i + hop + 8)
                    cr, ci = _load(src, i + 2 * hop), _load(src, i + 2 * hop + 8)
                    dr, di = _load(src, i + 3 * hop), _load(src, i + 3 * hop + 8)
                    er, ei = ar + cr, ai + ci
                    fr, fi = ar - cr, ai - ci
                    gr, gi = br + dr, bi + di
                    hr, hi = br - dr, bi - di
                    _store(dst, o, er + gr)
                    _store(dst, o + 8, ei + gi)
                    ur, ui = fr + hi, fi - hr
                    _store(dst, o + out, ur * w1r - ui * w1i)
                    _store(dst, o + out + 8, ur * w1i + ui * w1r)
                    vr, vi = er - gr, ei - gi
                    _store(dst, o + 2 * out, vr * w2r - vi * w2i)
                    _store(dst, o + 2 * out + 8, vr * w2i + vi * w2r)
                    zr, zi = fr - hi, fi + hr
                    _store(dst, o + 3 * out, zr * w3r - zi * w3i)
                    _store(dst, o + 3 * out + 8, zr * w3i + zi * w3r)
        elif r == 2:
            for p in range(m):
                w1r, w1i = _splat(tw[t]), _splat(tw[t + 1])
                t += 2
                for q in range(s):
                    i = 16 * (q + s * p)
                    o = 16 * (q + s * 2 * p)
                    ar, ai = _load(src, i), _load(src, i + 8)
                    br, bi = _load(src, i + hop), _load(src, i + hop + 8)
                    _store(dst, o, ar + br)
                    _store(dst, o + 8, ai + bi)
                    ur, ui = ar - br, ai - bi
                    _store(dst, o + out, ur * w1r - ui * w1i)
                    _store(dst, o + out + 8, ur * w1i + ui * w1r)
        elif r == 3:
            for p in range(m):
                w1r, w1i = _splat(tw[t]), _splat(tw[t + 1])
                w2r, w2i = _splat(tw[t + 2]), _splat(tw[t + 3])
                t += 4
                for q in range(s):
                    i = 16 * (q + s * p)
                    o = 16 * (q + s * 3 * p)
                    ar, ai = _load(src, i), _load(src, i + 8)
                    br, bi = _load(src, i + hop), _load(src, i + hop + 8)
                    cr, ci = _load(src, i + 2 * hop), _load(src, i + 2 * hop + 8)
                    er, ei = br + cr, bi + ci
                    fr, fi = s3 * (br - cr), s3 * (bi - ci)
                    gr, gi = ar + c3 * er, ai + c3 * ei
                    _store(dst, o, ar + er)
                    _store(dst, o + 8, ai + ei)
                    ur, ui = gr - fi, gi + fr
                    _store(dst, o + out, ur * w1r - ui * w1i)
                    _store(dst, o + out + 8, ur * w1i + ui * w1r)
                    vr, vi = gr + fi, gi - fr
                    _store(dst, o + 2 * out, vr * w2r - vi * w2i)
                    _store(dst, o + 2 * out + 8, vr * w2i + vi * w2r)
        else:
            for p in range(m):
                w1r, w1i = _splat(tw[t]), _splat(tw[t + 1])
                w2r, w2i = _splat(tw[t + 2]), _splat(tw[t + 3])
                w3r, w3i = _splat(tw[t + 4]), _splat(tw[t + 5])
                w4r, w4i = _splat(tw[t + 6]), _splat(tw[t + 7])
                t += 8
                for q in range(s):
                    i = 16 * (q + s * p)
                    o = 16 * (q + s * 5 * p)
                    ar, ai = _load(src, i), _load(src, i + 8)
                    br, bi = _load(src, i + hop), _load(src, i + hop + 8)
                    cr, ci = _load(src, i + 2 * hop), _load(src, i + 2 * hop + 8)
                    dr, di = _load(src, i + 3 * hop), _load(src, i + 3 * hop + 8)
                    er, ei = _load(src, i + 4 * hop), _load(src, i + 4 * hop + 8)
                    p1r, p1i = br + er, bi + ei
                    m1r, m1i = br - er, bi - ei
                    p2r, p2i = cr + dr, ci + di
                    m2r, m2i = cr - dr, ci - di
                    _store(dst, o, ar + p1r + p2r)
                    _store(dst, o + 8, ai + p1i + p2i)
                    g1r, g1i = ar + c51 * p1r + c52 * p2r, ai + c51 * p1i + c52 * p2i
                    g2r, g2i = ar + c52 * p1r + c51 * p2r, ai + c52 * p1i + c51 * p2i
                    h1r, h1i = s51 * m1r + s52 * m2r, s51 * m1i + s52 * m2i
                    h2r, h2i = s52 * m1r - s51 * m2r, s52 * m1i - s51 * m2i
                    ur, ui = g1r - h1i, g1i + h1r
                    _store(dst, o + out, ur * w1r - ui * w1i)
                    _store(dst, o + out + 8, ur * w1i + ui * w1r)
                    ur, ui = g2r - h2i, g2i + h2r
                    _store(dst, o + 2 * out, ur * w2r - ui * w2i)
                    _store(dst, o + 2 * out + 8, ur * w2i + ui * w2r)
                    ur, ui = g2r + h2i, g2i - h2r
                    _store(dst, o + 3 * out, ur * w3r - ui * w3i)
                    _store(dst, o + 3 * out + 8, ur * w3i + ui * w3r)
                    ur, ui = g1r + h1i, g1i - h1r
                    _store(dst, o + 4 * out, ur * w4r - ui * w4i)
                    _store(dst, o + 4 * out + 8, ur * w4i + ui * w4r)
        in_y = not in_y
        length = m
        s *= r
    return in_y


# ---------------------------------------------------------------- moving rows in and out of nodes


@_kernel
def _pack(src: F32, at: int, step: int, n: int, dst: F32, to: int, scale: F32, first: int, factor: np.float32) -> None:
    """Interleave `n` samples of 16 rows (row j at ``src[at + j step]``) into nodes from ``dst[16 to]`` on.

    Eight rows at a time: sixteen, a power of two apart, would throw each other out of the cache.
    """
    i = 0
    for half in range(2):
        i = 0
        while i + 8 <= n:
            o = 16 * (to + i) + 8 * half
            _transpose_scaled(src, at + i + 8 * half * step, step, dst, o, 16, scale, first + i, factor)
            i += 8
    while i < n:
        w = scale[first + i] * factor
        for j in range(16):
            dst[16 * (to + i) + j] = src[at + i + j * step] * w
        i += 1


@_kernel
def _unpack(src: F32, n: int, dst: F32, to: int, step: int, scale: F32, first: int, factor: np.float32) -> None:
    """Write `n` nodes from ``src[0]`` on as 16 rows (row j at ``dst[to + j step]``)."""
    i = 0
    while i + 8 <= n:
        o = 16 * i
        _transpose_then_scale(src, o, 16, dst, to + i, step, scale, first + i, factor)
        _transpose_then_scale(src, o + 8, 16, dst, to + i + 8 * step, step, scale, first + i, factor)
        i += 8
    while i < n:
        w = scale[first + i] * factor
        for j in range(16):
            dst[to + i + j * step] = src[16 * i + j] * w
        i += 1


@_kernel
def _copy(src: F32, at: int, dst: F32, to: int) -> None:
    _store(dst, to, _load(src, at))
    _store(dst, to + 8, _load(src, at + 8))


# ---------------------------------------------------------------- the chain


@_kernel
def _forward_x(
    z0: int, z1: int, volume: F32, n: int, m: int, dc: F32, radices: I64, tw: F32, grid: F32, x: F32, y: F32
) -> None:
    """Slices -> spectra along x, for the lines ``z0:z1``; result in ``grid[z, kx + m // 2]``.

    Lines of the grid are one node longer than needed: with a power of two between them a column would fall into the
    same few sets of the cache.
    """
    h = n // 2
    half = m // 2
    wide = m + 1
    for z in range(z0, z1):
        for i in range(16 * (n - h), 16 * (m - h)):
            x[i] = 0.0
        _pack(volume, z * n, n * n, h, x, m - h, dc, 0, dc[z])
        _pack(volume, z * n + h, n * n, n - h, x, 0, dc, h, dc[z])
        res = y if _fft(x, y, m, radices, tw) else x
        base = 16 * z * wide
        for k in range(m):
            to = k + half
            if to >= m:
                to -= m
            _copy(res, 16 * k, grid, base + 16 * to)


@_kernel
def _forward_z(c0: int, c1: int, n: int, m: int, radices: I64, tw: F32, grid: F32, x: F32, y: F32) -> None:
    """Spectra along x -> 2-D spectra, for the columns ``c0:c1``; in place, ``grid[kz + m // 2, kx + m // 2]``."""
    h = n // 2
    half = m // 2
    wide = m + 1
    for c in range(c0, c1):
        for i in range(16 * (n - h), 16 * (m - h)):
            x[i] = 0.0
        for z in range(n):
            to = z - h
            if to < 0:
                to += m
            _copy(grid, 16 * (z * wide + c), x, 16 * to)
        res = y if _fft(x, y, m, radices, tw) else x
        for k in range(m):
            to = k + half
            if to >= m:
                to -= m
            _copy(res, 16 * k, grid, 16 * (to * wide + c))


@_kernel
def _forward_lines(
    a0: int,
    a1: int,
    grid: F32,
    m: int,
    first: npt.NDArray[np.int32],
    weight: F32,
    phase: F32,
    width: int,
    pad: int,
    radices: I64,
    tw: F32,
    ones: F32,
    n_det: int,
    out: F32,
    x: F32,
    y: F32,
) -> None:
    """2-D spectra -> projections, for the angles ``a0:a1``; `out` is (angle, 16 rows, n_det) flat."""
    k_max = (pad - 1) // 2
    wide = m + 1
    zero = _splat(np.float32(0.0))
    for a in range(a0, a1):
        for i in range(16 * (k_max + 1), 16 * (pad - k_max)):
            x[i] = 0.0
        for k in range(-k_max, k_max + 1):
            j = k + k_max
            gz = int(first[a, j, 0])
            gx = int(first[a, j, 1])
            re = zero
            im = zero
            inside = gx >= 0 and gx + width <= m
            for b in range(width):
                r = gz + b
                if r < 0:
                    r += m
                elif r >= m:
                    r -= m
                line_re = zero
                line_im = zero
                if inside:
                    at = 16 * (r * wide + gx)
                    for c in range(width):
                        w = _splat(weight[a, j, 1, c])
                        line_re = line_re + w * _load(grid, at)
                        line_im = line_im + w * _load(grid, at + 8)
                        at += 16
                else:
                    for c in range(width):
                        q = gx + c
                        if q < 0:
                            q += m
                        elif q >= m:
                            q -= m
                        at = 16 * (r * wide + q)
                        w = _splat(weight[a, j, 1, c])
                        line_re = line_re + w * _load(grid, at)
                        line_im = line_im + w * _load(grid, at + 8)
                w = _splat(weight[a, j, 0, b])
                re = re + w * line_re
                im = im + w * line_im
            pr = _splat(phase[a, j, 0])
            pi = _splat(phase[a, j, 1])
            to = -k if k <= 0 else pad - k  # negated index: inverse transform
            _store(x, 16 * to, re * pr - im * pi)
            _store(x, 16 * to + 8, re * pi + im * pr)
        res = y if _fft(x, y, pad, radices, tw) else x
        _unpack(res, n_det, out, a * 16 * n_det, n_det, ones, 0, np.float32(1.0))


@_kernel
def _adjoint_lines(
    a0: int,
    a1: int,
    sino: F32,
    n_det: int,
    phase: F32,
    pad: int,
    radices: I64,
    tw: F32,
    ones: F32,
    lines: F32,
    x: F32,
    y: F32,
) -> None:
    """Projections (angle, 16 rows, n_det) -> their filtered spectra ``lines[angle, k + k_max]``."""
    k_max = (pad - 1) // 2
    count = 2 * k_max + 1
    for a in range(a0, a1):
        _pack(sino, a * 16 * n_det, n_det, n_det, x, 0, ones, 0, np.float32(1.0))
        for i in range(16 * n_det, 16 * pad):
            x[i] = 0.0
        res = y if _fft(x, y, pad, radices, tw) else x
        for j in range(count):
            k = j - k_max
            at = 16 * (k if k >= 0 else k + pad)
            re = _load(res, at)
            im = _load(res, at + 8)
            pr = _splat(phase[a, j, 0])
            pi = _splat(phase[a, j, 1])
            to = 16 * (a * count + j)
            _store(lines, to, re * pr + im * pi)  # conjugate phase
            _store(lines, to + 8, im * pr - re * pi)


@_kernel
def _adjoint_bands(
    r0: int,
    r1: int,
    lines: F32,
    n: int,
    m: int,
    slope: F64,
    first: npt.NDArray[np.int32],
    weight: F32,
    width: int,
    pad: int,
    radices: I64,
    tw: F32,
    grid: F32,
    x: F32,
    y: F32,
) -> None:
    """Radial spectra -> grid rows ``r0:r1`` (kz), transformed along x; result in ``grid[kz + m // 2, x]``.

    Every node adds its samples in the order (angle, k) whatever the bands are. All lines cross near frequency 0, where
    thousands of samples meet in a few nodes: those are added in double precision.
    """
    k_max = (pad - 1) // 2
    count = 2 * k_max + 1
    half = m // 2
    h = n // 2
    wide = m + 1
    centre = min(_CENTRE, k_max)
    reach = int(centre * m / pad) + width + 1
    if reach > (m - 1) // 2:
        centre = -1  # a tiny grid, where the ends of the lines wrap around into the middle
    for i in range(16 * r0 * wide, 16 * r1 * wide):
        grid[i] = 0.0
    for a in range(slope.size):
        for wrap in range(-1, 2):
            off = wrap * m
            lo = r0 - off - half - 0.5 * width - 1.0
            hi = r1 - off - half + 0.5 * width + 1.0
            if abs(slope[a]) * k_max < 1e-3:
                if lo > 1.0 or hi < -1.0:
                    continue
                ka = -k_max
                kb = k_max
            else:
                ea = lo / slope[a]
                eb = hi / slope[a]
                if ea > eb:
                    ea, eb = eb, ea
                if ea > k_max or eb < -k_max:
                    continue
                ka = max(-k_max, math.floor(ea))
                kb = min(k_max, math.ceil(eb))
            for k in range(ka, kb + 1):
                j = k + k_max
                if abs(k) <= centre:
                    continue
                gz = int(first[a, j, 0]) + off
                if gz <= r0 - width or gz >= r1:
                    continue
                gx = int(first[a, j, 1])
                inside = gx >= 0 and gx + width <= m
                at = 16 * (a * count + j)
                re = _load(lines, at)
                im = _load(lines, at + 8)
                for b in range(width):
                    r = gz + b
                    if r < r0 or r >= r1:
                        continue
                    w = _splat(weight[a, j, 0, b])
                    line_re = re * w
                    line_im = im * w
                    if inside:
                        to = 16 * (r * wide + gx)
                        for c in range(width):
                            v = _splat(weight[a, j, 1, c])
                            _store(grid, to, _load(grid, to) + v * line_re)
                            _store(grid, to + 8, _load(grid, to + 8) + v * line_im)
                            to += 16
                    else:
                        for c in range(width):
                            q = gx + c
                            if q < 0:
                                q += m
                            elif q >= m:
                                q -= m
                            to = 16 * (r * wide + q)
                            v = _splat(weight[a, j, 1, c])
                            _store(grid, to, _load(grid, to) + v * line_re)
                            _store(grid, to + 8, _load(grid, to + 8) + v * line_im)
    if centre >= 0 and r0 <= half + reach and r1 > half - reach:
        side = 2 * reach + 1
        patch = np.zeros((side, side, 16))
        for a in range(slope.size):
            for k in range(-centre, centre + 1):
                j = k + k_max
                for b in range(width):
                    row = int(first[a, j, 0]) + b
                    if row < r0 or row >= r1:
                        continue
                    for c in range(width):
                        column = int(first[a, j, 1]) + c
                        both = np.float64(weight[a, j, 0, b]) * np.float64(weight[a, j, 1, c])
                        target = patch[row - half + reach, column - half + reach]
                        for e in range(16):
                            target[e] += both * lines[16 * (a * count + j) + e]
        for row in range(max(r0, half - reach), min(r1, half + reach + 1)):
            for column in range(half - reach, half + reach + 1):
                for e in range(16):
                    grid[16 * (row * wide + column) + e] += patch[row - half + reach, column - half + reach, e]
    for r in range(r0, r1):
        base = 16 * r * wide
        for c in range(m):
            node = c - half
            if node < 0:
                node += m
            _copy(grid, base + 16 * c, x, 16 * node)
        res = y if _fft(x, y, m, radices, tw) else x
        for i in range(n):
            node = h - i  # negated index: inverse transform
            if node < 0:
                node += m
            _copy(res, 16 * node, grid, base + 16 * i)


@_kernel
def _adjoint_z(
    b0: int,
    b1: int,
    n: int,
    m: int,
    dc: F32,
    radices: I64,
    tw: F32,
    grid: F32,
    volume: F32,
    x: F32,
    y: F32,
    block: F32,
) -> None:
    """``grid[kz, x]`` -> slices (16, n, n) flat, for the blocks ``b0:b1`` of sixteen columns."""
    half = m // 2
    h = n // 2
    wide = m + 1
    for b in range(b0, b1):
        x0 = 16 * b
        many = min(16, n - x0)
        for e in range(many):
            c = x0 + e
            for r in range(m):
                to = r - half
                if to < 0:
                    to += m
                _copy(grid, 16 * (r * wide + c), x, 16 * to)
            res = y if _fft(x, y, m, radices, tw) else x
            for z in range(n):
                at = h - z
                if at < 0:
                    at += m
                _copy(res, 16 * at, block, 16 * (16 * z + e))
        for z in range(n):
            to = z * n + x0
            if many == 16:
                for part in range(2):
                    at = 256 * z + 8 * part
                    j = to + 8 * part * n * n
                    _transpose_then_scale(block, at, 16, volume, j, n * n, dc, x0, dc[z])
                    _transpose_then_scale(block, at + 128, 16, volume, j + 8, n * n, dc, x0 + 8, dc[z])
            else:
                for e in range(many):
                    for j in range(16):
                        volume[to + e + j * n * n] = block[16 * (16 * z + e) + j] * (dc[z] * dc[x0 + e])


@_kernel
def _taps(
    cos: F64,
    sin: F64,
    ratio: float,
    k_max: int,
    half: int,
    width: int,
    beta: float,
    table: F64,
    first: npt.NDArray[np.int32],
    weight: F32,
) -> None:
    """Fill the first node and the kernel weights of every radial sample; those of -k mirror those of +k exactly."""
    size = table.size - 2
    for a in range(cos.size):
        for k in range(k_max + 1):
            for axis in range(2):
                v = k * ratio * (sin[a] if axis == 0 else cos[a])
                start = math.ceil(v - 0.5 * width)
                first[a, k_max + k, axis] = start + half
                if k > 0:
                    first[a, k_max - k, axis] = half - start - width + 1
                for t in range(width):
                    d = abs(2.0 * (v - start - t) / width)
                    w = 0.0
                    if d < 1.0:
                        e = d * size
                        i = int(e)
                        w = table[i] + (e - i) * (table[i + 1] - table[i])
                    weight[a, k_max + k, axis, t] = w
                    if k > 0:
                        weight[a, k_max - k, axis, width - 1 - t] = w


@_kernel
def _phases(alpha: F64, gain: F64, response: F64, k_max: int, phase: F32) -> None:
    """``phase[a, k + k_max] = gain[a] response[|k|] exp(i alpha[a] k)`` as (re, im)."""
    for a in range(alpha.size):
        c, s = math.cos(alpha[a]), math.sin(alpha[a])
        turn_re, turn_im = gain[a], 0.0  # turned step by step: the error after thousands of steps is about 1e-13
        for k in range(k_max + 1):
            re = response[k] * turn_re
            im = response[k] * turn_im
            turn_re, turn_im = turn_re * c - turn_im * s, turn_re * s + turn_im * c
            phase[a, k_max + k, 0] = re
            phase[a, k_max + k, 1] = im
            phase[a, k_max - k, 0] = re
            phase[a, k_max - k, 1] = -im


# ---------------------------------------------------------------- filters

FILTERS = ("none", "ramp", "shepp-logan", "cosine", "hann")


def filter_response(name: str, n: int) -> F64:
    """Return the response of a reconstruction filter, (n // 2 + 1,) on the frequencies of a length-`n` real FFT.

    The ramp is the transform of its spatial definition (1/4 at 0, ``-1 / (pi j)^2`` at odd j), which keeps the mean
    right (Kak & Slaney, *Principles of Computerized Tomographic Imaging*, doi 10.1137/1.9780898719277, eq. 3.29); the
    other filters are the ramp times their window. Frequencies in cycles/pixel, so that the ramp is |f| away from 0.

    Parameters
    ----------
    name : {"none", "ramp", "shepp-logan", "cosine", "hann"}
    n : int
        Length of the (padded) transform.
    """
    if name not in FILTERS:
        raise ValueError(f"filter: expected one of {', '.join(FILTERS)}, got {name!r}")
    f = np.arange(n // 2 + 1) / n
    if name == "none":
        return np.ones(n // 2 + 1)
    j = np.minimum(np.arange(n), n - np.arange(n))
    taps = np.zeros(n)
    taps[0] = 0.25
    odd = j % 2 == 1
    taps[odd] = -1.0 / (np.pi * j[odd]) ** 2
    ramp: F64 = np.fft.rfft(taps).real
    window = {
        "ramp": np.ones_like(f),
        "shepp-logan": np.sinc(f),
        "cosine": np.cos(np.pi * f),
        "hann": 0.5 + 0.5 * np.cos(2 * np.pi * f),
    }[name]
    return cast(F64, ramp * window)


# ---------------------------------------------------------------- the public class


def _default_threads() -> int:
    try:
        return max(1, len(os.sched_getaffinity(0)))
    except AttributeError:  # not on macOS and Windows
        return max(1, os.cpu_count() or 1)


def _output(out: F32 | None, shape: tuple[int, int, int]) -> F32:
    if out is None:
        return np.empty(shape, np.float32)
    if out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ValueError(f"out: expected a C-ordered float32 array {shape}, got {out.dtype} {out.shape}")
    return out


class _Geometry:
    """Everything that depends on the angles and sizes only."""

    def __init__(
        self, n: int, theta: tuple[float, ...], n_detector: int, pad: float, oversampling: float, width: int
    ) -> None:
        self.m = m = _fast_length(max(math.ceil(n * oversampling), n + width + 1))
        self.pad = p = _fast_length(math.ceil(pad * max(n, n_detector)))
        self.k_max = (p - 1) // 2
        ratio = m / n
        beta = math.pi * math.sqrt(max((width / ratio) ** 2 * (ratio - 0.5) ** 2 - 0.8, 0.1))
        t = np.deg2rad(np.array(theta))
        # cos(90 deg) is not exactly 0 in floating point; keep the four axes exact
        self.cos = np.round(np.cos(t), 15)
        self.sin = np.round(np.sin(t), 15)
        count = 2 * self.k_max + 1
        self.first = np.empty((t.size, count, 2), np.int32)
        self.weight = np.empty((t.size, count, 2, width), np.float32)
        d = np.linspace(0.0, 1.0, 8193)
        table = np.append(np.i0(beta * np.sqrt(1 - d**2)) / np.i0(beta), 0.0)
        _taps(self.cos, self.sin, m / p, self.k_max, m // 2, width, beta, table, self.first, self.weight)
        self.slope = self.sin * (m / p)
        offset = (np.arange(n) - n // 2) / m
        z = np.sqrt((beta**2 - (np.pi * width * offset) ** 2).astype(complex))
        self.dc = np.ones(n + 8, np.float32)
        self.dc[:n] = 1 / ((np.sinh(z) / z).real * width / np.i0(beta))
        self.ones = np.ones(n_detector + 8, np.float32)
        half_pixel = 0.5 if n % 2 == 0 else 0.0
        self.alpha = -2 * np.pi / p * (half_pixel * (self.cos + self.sin) + (n_detector - 1) / 2)


@lru_cache(maxsize=4)
def _geometry(
    n: int, theta: tuple[float, ...], n_detector: int, pad: float, oversampling: float, width: int
) -> _Geometry:
    return _Geometry(n, theta, n_detector, pad, oversampling, width)


class Projector:
    """Line integrals of volumes ``(y, z, x)`` along parallel rays, and their exact transpose.

    Rows (y) are independent; sixteen travel together, so calling with many rows at once is what is fast. The slice is
    taken as band-limited between its pixels and a projection as point samples of it.

    Parameters
    ----------
    n : int
        Size of the grid in z and x, pixels; odd or even. The rotation axis is at ``(n - 1) / 2``.
    theta_deg : (angles,) array
        Any angles in any order, degrees.
    n_detector : int, optional
        Detector columns, centred at ``(n_detector - 1) / 2``; `n` unless given.
    pad : float
        Projections are computed on a line of ``pad * max(n, n_detector)`` columns. 1.5 holds the
        corners of the square grid, and makes the ramp filter exact for objects up to half as wide as this line; 2 makes
        it exact for the whole detector. What falls outside this line wraps around.
    oversampling, width : float, int
        Of the gridding: grid size over `n`, kernel width in nodes.
    threads : int, optional
        All cores unless given. The result does not depend on it.

    Notes
    -----
    Objects should lie inside the inscribed circle: what lies in the corners of the square is projected rightly but
    falls off a detector of `n` columns, and no reconstruction can recover it.
    """

    def __init__(
        self,
        n: int,
        theta_deg: npt.ArrayLike,
        *,
        n_detector: int | None = None,
        pad: float = 1.5,
        oversampling: float = 1.25,
        width: int = 5,
        threads: int | None = None,
    ) -> None:
        theta = np.atleast_1d(np.asarray(theta_deg, dtype=float))
        if theta.ndim != 1 or theta.size == 0 or not np.isfinite(theta).all():
            raise ValueError(f"theta_deg: expected a list of finite angles, got shape {theta.shape}")
        if n < 2:
            raise ValueError(f"n: expected a grid of at least 2 pixels, got {n}")
        self.n = int(n)
        self.theta_deg: F64 = theta
        self.n_detector = self.n if n_detector is None else int(n_detector)
        self.pad, self.oversampling, self.width = float(pad), float(oversampling), int(width)
        self.threads = _default_threads() if threads is None else max(1, int(threads))
        self._free: list[dict[str, F32]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_free": []}

    @property
    def shape(self) -> tuple[int, int]:
        """(angles, detector columns)."""
        return self.theta_deg.size, self.n_detector

    def forward(self, volume: npt.ArrayLike, *, shift: npt.ArrayLike | None = None, out: F32 | None = None) -> F32:
        """Project slices ``(y, z, x)``; return ``(angle, y, column)`` float32, value x voxel.

        Parameters
        ----------
        volume : (rows, n, n) array
        shift : (angles,) array or float, optional
            Moves the content of each projection to the right, detector columns; costs nothing.
        out : (angles, rows, n_detector) float32 array, optional
            Written into; fresh memory unless given, which costs a noticeable part of the time in a loop.
        """
        data = np.ascontiguousarray(volume, dtype=np.float32)
        if data.ndim != 3 or data.shape[1:] != (self.n, self.n):
            raise ValueError(f"volume: expected (rows, {self.n}, {self.n}) [y, z, x], got {data.shape}")
        g = self._prepare()
        angles, columns = self.shape
        phase = self._phase(g, shift, None, None)
        out = _output(out, (angles, len(data), columns))
        m, p, n = g.m, g.pad, self.n
        rad_m, tw_m = _plan(m)
        rad_p, tw_p = _plan(p)

        def work(start: int, run: _Runner) -> None:
            rows = min(ROWS, len(data) - start)
            block = data[start : start + ROWS]
            if rows < ROWS:
                block = np.concatenate([block, np.zeros((ROWS - rows, n, n), np.float32)])
            flat = block.reshape(-1)
            space = self._take(g)
            grid = space["grid"]
            sino = np.empty((angles, ROWS, columns), np.float32)
            run(n, lambda a, b, x, y, t: _forward_x(a, b, flat, n, m, g.dc, rad_m, tw_m, grid, x, y))
            run(m, lambda a, b, x, y, t: _forward_z(a, b, n, m, rad_m, tw_m, grid, x, y))
            run(
                angles,
                lambda a, b, x, y, t: _forward_lines(
                    a, b, grid, m, g.first, g.weight, phase, self.width, p, rad_p, tw_p, g.ones, columns,
                    sino.reshape(-1), x, y,
                ),
            )  # fmt: skip
            out[:, start : start + rows] = sino[:, :rows]
            self._free.append(space)

        self._schedule(len(data), g, work)
        return out

    def adjoint(
        self,
        projections: npt.ArrayLike,
        *,
        shift: npt.ArrayLike | None = None,
        weight: npt.ArrayLike | None = None,
        response: npt.ArrayLike | None = None,
        out: F32 | None = None,
    ) -> F32:
        """Back-project ``(angle, y, column)``; return slices ``(y, z, x)`` float32: the transpose of `forward`.

        Parameters
        ----------
        projections : (angles, rows, n_detector) array
        shift : (angles,) array or float, optional
            As in `forward`: where the content of each projection has been moved, detector columns.
        weight : (angles,) array, optional
            Multiplies each projection.
        response : (length // 2 + 1,) array, optional
            Response of a symmetric filter applied along the columns, on the frequencies of a real FFT of
            `filter_length` columns.
        out : (rows, n, n) float32 array, optional
            Written into; fresh memory unless given, which costs a noticeable part of the time in a loop.
        """
        data = np.ascontiguousarray(projections, dtype=np.float32)
        angles, columns = self.shape
        if data.ndim != 3 or (data.shape[0], data.shape[2]) != self.shape:
            raise ValueError(f"projections: expected ({angles}, rows, {columns}) [angle, y, column], got {data.shape}")
        g = self._prepare()
        phase = self._phase(g, shift, weight, response)
        n_rows = data.shape[1]
        m, p, n = g.m, g.pad, self.n
        out = _output(out, (n_rows, n, n))
        rad_m, tw_m = _plan(m)
        rad_p, tw_p = _plan(p)
        bands = -(-m // 16)

        def work(start: int, run: _Runner) -> None:
            rows = min(ROWS, n_rows - start)
            sino = np.zeros((angles, ROWS, columns), np.float32)
            sino[:, :rows] = data[:, start : start + rows]
            block = out[start : start + ROWS] if rows == ROWS else np.empty((ROWS, n, n), np.float32)
            space = self._take(g)
            grid, lines = space["grid"], space["lines"]
            flat = block.reshape(-1)
            run(
                angles,
                lambda a, b, x, y, t: _adjoint_lines(
                    a, b, sino.reshape(-1), columns, phase, p, rad_p, tw_p, g.ones, lines, x, y
                ),
            )

            def band(a: int, b: int, x: F32, y: F32, t: F32) -> None:
                for i in range(a, b):
                    _adjoint_bands(
                        16 * i, min(16 * i + 16, m), lines, n, m, g.slope, g.first, g.weight, self.width, p,
                        rad_m, tw_m, grid, x, y,
                    )  # fmt: skip

            run(bands, band)
            run(-(-n // 16), lambda a, b, x, y, t: _adjoint_z(a, b, n, m, g.dc, rad_m, tw_m, grid, flat, x, y, t))
            if rows < ROWS:
                out[start : start + rows] = block[:rows]
            self._free.append(space)

        self._schedule(n_rows, g, work)
        return out

    def filtered(
        self,
        projections: npt.ArrayLike,
        filter_name: str = "ramp",
        angular_weight: npt.ArrayLike | None = None,
        *,
        shift: npt.ArrayLike | None = None,
    ) -> F32:
        """Filter and back-project ``(angle, y, column)``; return slices ``(y, z, x)``, value per pixel.

        With the ramp this is filtered back-projection; `angular_weight` is in radians, pi / angles unless given.
        """
        if angular_weight is None:
            angular_weight = np.full(self.theta_deg.size, np.pi / self.theta_deg.size)
        response = filter_response(filter_name, self.filter_length)
        return self.adjoint(projections, shift=shift, weight=angular_weight, response=response)

    @property
    def filter_length(self) -> int:
        """Columns of the padded line a filter response refers to."""
        return _fast_length(math.ceil(self.pad * max(self.n, self.n_detector)))

    def _prepare(self) -> _Geometry:
        theta = tuple(self.theta_deg.tolist())
        return _geometry(self.n, theta, self.n_detector, self.pad, self.oversampling, self.width)

    def _phase(
        self,
        g: _Geometry,
        shift: npt.ArrayLike | None,
        weight: npt.ArrayLike | None,
        response: npt.ArrayLike | None,
    ) -> F32:
        angles = self.theta_deg.size
        alpha = g.alpha
        if shift is not None:
            moved = np.asarray(shift, dtype=float)
            if moved.shape not in ((), (angles,)):
                raise ValueError(f"shift: expected ({angles},) columns, got {moved.shape}")
            alpha = alpha - 2 * np.pi / g.pad * moved
        gain = np.full(angles, 1 / g.pad)
        if weight is not None:
            gain = gain * np.broadcast_to(np.asarray(weight, dtype=float), (angles,))
        r = np.ones(g.pad // 2 + 1) if response is None else np.asarray(response, dtype=float)
        if r.shape != (g.pad // 2 + 1,):
            raise ValueError(f"response: expected ({g.pad // 2 + 1},) values, got {r.shape}")
        phase = np.empty((angles, 2 * g.k_max + 1, 2), np.float32)
        _phases(alpha, gain, r, g.k_max, phase)
        return phase

    def _take(self, g: _Geometry) -> dict[str, F32]:
        """Return a workspace: memory is kept between calls, since touching fresh pages costs as much as the FFTs."""
        try:
            return self._free.pop()
        except IndexError:
            lines = np.empty(self.theta_deg.size * (2 * g.k_max + 1) * NODE, np.float32)
            return {"grid": np.empty(g.m * (g.m + 1) * NODE, np.float32), "lines": lines}

    def _schedule(self, rows: int, g: _Geometry, work: Callable[[int, _Runner], None]) -> None:
        """Run `work` on every group of rows: groups side by side when they are small, else one after the other."""
        starts = range(0, rows, ROWS)
        if self.threads == 1 or not starts:
            runner = _Runner(1, None, g, self.n)
            for start in starts:
                work(start, runner)
            return
        with ThreadPoolExecutor(self.threads) as pool:
            side_by_side = len(starts) >= self.threads and g.m * g.m * NODE * 4 * self.threads <= 2**28
            if side_by_side:
                list(pool.map(lambda start: work(start, _Runner(1, None, g, self.n)), starts))
            else:
                runner = _Runner(self.threads, pool, g, self.n)
                for start in starts:
                    work(start, runner)


class _Runner:
    """Runs one phase over ``range(count)`` in pieces, each with scratch lines of its own."""

    def __init__(self, threads: int, pool: ThreadPoolExecutor | None, g: _Geometry, n: int) -> None:
        self.threads, self.pool = threads, pool
        self.length, self.n = max(g.m, g.pad), n
        self.scratch: list[tuple[F32, F32, F32]] = []

    def __call__(self, count: int, function: Callable[[int, int, F32, F32, F32], None]) -> None:
        def piece(bounds: tuple[int, int]) -> None:
            try:
                x, y, t = self.scratch.pop()
            except IndexError:
                x, y = (np.empty(self.length * NODE, np.float32) for _ in range(2))
                t = np.empty(self.n * 16 * NODE, np.float32)
            function(bounds[0], bounds[1], x, y, t)
            self.scratch.append((x, y, t))

        if self.pool is None:
            piece((0, count))
            return
        step = max(1, count // (4 * self.threads))
        list(self.pool.map(piece, [(i, min(i + step, count)) for i in range(0, count, step)]))
