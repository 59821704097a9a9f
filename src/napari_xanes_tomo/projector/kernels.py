"""The chain of kernels between slices and projections: packing, FFTs along x and z, radial lines, and back.

A node is eight complex numbers, real parts first: sixteen slices, two by two as real and imaginary part. Each kernel
does a range of lines, columns, angles or bands; ranges share nothing they write.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from .fft import fft
from .simd import F32, F64, I64, LANES, kernel, load, splat, store, transpose_scaled, transpose_then_scale

__all__ = [
    "NODE",
    "ROWS",
    "adjoint_bands",
    "adjoint_lines",
    "adjoint_z",
    "fill_phases",
    "fill_taps",
    "forward_lines",
    "forward_x",
    "forward_z",
]

ROWS = 2 * LANES  # slices that travel together
NODE = 2 * LANES  # floats a node: 8 real parts, then 8 imaginary parts
_CENTRE = 6  # samples of a line on either side of frequency 0 that are added in double precision


@kernel
def _pack(src: F32, at: int, step: int, n: int, dst: F32, to: int, scale: F32, first: int, factor: np.float32) -> None:
    """Interleave `n` samples of 16 rows (row j at ``src[at + j step]``) into nodes from ``dst[16 to]`` on.

    Eight rows at a time: sixteen, a power of two apart, would throw each other out of the cache.
    """
    i = 0
    for half in range(2):
        i = 0
        while i + 8 <= n:
            o = 16 * (to + i) + 8 * half
            transpose_scaled(src, at + i + 8 * half * step, step, dst, o, 16, scale, first + i, factor)
            i += 8
    while i < n:
        w = scale[first + i] * factor
        for j in range(16):
            dst[16 * (to + i) + j] = src[at + i + j * step] * w
        i += 1


@kernel
def _unpack(src: F32, n: int, dst: F32, to: int, step: int, scale: F32, first: int, factor: np.float32) -> None:
    """Write `n` nodes from ``src[0]`` on as 16 rows (row j at ``dst[to + j step]``)."""
    i = 0
    while i + 8 <= n:
        o = 16 * i
        transpose_then_scale(src, o, 16, dst, to + i, step, scale, first + i, factor)
        transpose_then_scale(src, o + 8, 16, dst, to + i + 8 * step, step, scale, first + i, factor)
        i += 8
    while i < n:
        w = scale[first + i] * factor
        for j in range(16):
            dst[to + i + j * step] = src[16 * i + j] * w
        i += 1


@kernel
def _copy(src: F32, at: int, dst: F32, to: int) -> None:
    store(dst, to, load(src, at))
    store(dst, to + 8, load(src, at + 8))


@kernel
def forward_x(
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
        res = y if fft(x, y, m, radices, tw) else x
        base = 16 * z * wide
        for k in range(m):
            to = k + half
            if to >= m:
                to -= m
            _copy(res, 16 * k, grid, base + 16 * to)


@kernel
def forward_z(c0: int, c1: int, n: int, m: int, radices: I64, tw: F32, grid: F32, x: F32, y: F32) -> None:
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
        res = y if fft(x, y, m, radices, tw) else x
        for k in range(m):
            to = k + half
            if to >= m:
                to -= m
            _copy(res, 16 * k, grid, 16 * (to * wide + c))


@kernel
def forward_lines(
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
    zero = splat(np.float32(0.0))
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
                        w = splat(weight[a, j, 1, c])
                        line_re = line_re + w * load(grid, at)
                        line_im = line_im + w * load(grid, at + 8)
                        at += 16
                else:
                    for c in range(width):
                        q = gx + c
                        if q < 0:
                            q += m
                        elif q >= m:
                            q -= m
                        at = 16 * (r * wide + q)
                        w = splat(weight[a, j, 1, c])
                        line_re = line_re + w * load(grid, at)
                        line_im = line_im + w * load(grid, at + 8)
                w = splat(weight[a, j, 0, b])
                re = re + w * line_re
                im = im + w * line_im
            pr = splat(phase[a, j, 0])
            pi = splat(phase[a, j, 1])
            to = -k if k <= 0 else pad - k  # negated index: inverse transform
            store(x, 16 * to, re * pr - im * pi)
            store(x, 16 * to + 8, re * pi + im * pr)
        res = y if fft(x, y, pad, radices, tw) else x
        _unpack(res, n_det, out, a * 16 * n_det, n_det, ones, 0, np.float32(1.0))


@kernel
def adjoint_lines(
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
        res = y if fft(x, y, pad, radices, tw) else x
        for j in range(count):
            k = j - k_max
            at = 16 * (k if k >= 0 else k + pad)
            re = load(res, at)
            im = load(res, at + 8)
            pr = splat(phase[a, j, 0])
            pi = splat(phase[a, j, 1])
            to = 16 * (a * count + j)
            store(lines, to, re * pr + im * pi)  # conjugate phase
            store(lines, to + 8, im * pr - re * pi)


@kernel
def adjoint_bands(
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
                re = load(lines, at)
                im = load(lines, at + 8)
                for b in range(width):
                    r = gz + b
                    if r < r0 or r >= r1:
                        continue
                    w = splat(weight[a, j, 0, b])
                    line_re = re * w
                    line_im = im * w
                    if inside:
                        to = 16 * (r * wide + gx)
                        for c in range(width):
                            v = splat(weight[a, j, 1, c])
                            store(grid, to, load(grid, to) + v * line_re)
                            store(grid, to + 8, load(grid, to + 8) + v * line_im)
                            to += 16
                    else:
                        for c in range(width):
                            q = gx + c
                            if q < 0:
                                q += m
                            elif q >= m:
                                q -= m
                            to = 16 * (r * wide + q)
                            v = splat(weight[a, j, 1, c])
                            store(grid, to, load(grid, to) + v * line_re)
                            store(grid, to + 8, load(grid, to + 8) + v * line_im)
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
        res = y if fft(x, y, m, radices, tw) else x
        for i in range(n):
            node = h - i  # negated index: inverse transform
            if node < 0:
                node += m
            _copy(res, 16 * node, grid, base + 16 * i)


@kernel
def adjoint_z(
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
            res = y if fft(x, y, m, radices, tw) else x
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
                    transpose_then_scale(block, at, 16, volume, j, n * n, dc, x0, dc[z])
                    transpose_then_scale(block, at + 128, 16, volume, j + 8, n * n, dc, x0 + 8, dc[z])
            else:
                for e in range(many):
                    for j in range(16):
                        volume[to + e + j * n * n] = block[16 * (16 * z + e) + j] * (dc[z] * dc[x0 + e])


@kernel
def fill_taps(
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


@kernel
def fill_phases(alpha: F64, gain: F64, response: F64, k_max: int, phase: F32) -> None:
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
