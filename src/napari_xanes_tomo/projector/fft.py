"""FFT of many columns at once: Stockham, radices 4, 2, 3, 5, in nodes of eight complex numbers."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .simd import F32, F64, I64, kernel, load, splat, store

__all__ = ["fast_length", "fft", "plan"]


def fast_length(n: int) -> int:
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
def plan(n: int) -> tuple[I64, F32]:
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


@kernel
def fft(x: F32, y: F32, n: int, radices: I64, tw: F32) -> bool:
    """Transform ``x`` (n nodes, exponent -1, unnormalised) using ``y`` as scratch; True when the result is in ``y``.

    The inverse transform is the same with the index negated, which costs nothing where indices are permuted anyway.
    """
    in_y = False
    s = 1
    length = n
    t = 0
    c3 = splat(np.float32(-0.5))
    s3 = splat(np.float32(-0.8660254037844386))
    c51 = splat(np.float32(0.30901699437494745))
    c52 = splat(np.float32(-0.8090169943749475))
    s51 = splat(np.float32(-0.9510565162951535))
    s52 = splat(np.float32(-0.5877852522924731))
    for f in range(radices.size):
        r = radices[f]
        m = length // r
        src = y if in_y else x
        dst = x if in_y else y
        hop = 16 * s * m
        out = 16 * s
        if r == 4:
            for p in range(m):
                w1r, w1i = splat(tw[t]), splat(tw[t + 1])
                w2r, w2i = splat(tw[t + 2]), splat(tw[t + 3])
                w3r, w3i = splat(tw[t + 4]), splat(tw[t + 5])
                t += 6
                for q in range(s):
                    i = 16 * (q + s * p)
                    o = 16 * (q + s * 4 * p)
                    ar, ai = load(src, i), load(src, i + 8)
                    br, bi = load(src, i + hop), load(src, i + hop + 8)
                    cr, ci = load(src, i + 2 * hop), load(src, i + 2 * hop + 8)
                    dr, di = load(src, i + 3 * hop), load(src, i + 3 * hop + 8)
                    er, ei = ar + cr, ai + ci
                    fr, fi = ar - cr, ai - ci
                    gr, gi = br + dr, bi + di
                    hr, hi = br - dr, bi - di
                    store(dst, o, er + gr)
                    store(dst, o + 8, ei + gi)
                    ur, ui = fr + hi, fi - hr
                    store(dst, o + out, ur * w1r - ui * w1i)
                    store(dst, o + out + 8, ur * w1i + ui * w1r)
                    vr, vi = er - gr, ei - gi
                    store(dst, o + 2 * out, vr * w2r - vi * w2i)
                    store(dst, o + 2 * out + 8, vr * w2i + vi * w2r)
                    zr, zi = fr - hi, fi + hr
                    store(dst, o + 3 * out, zr * w3r - zi * w3i)
                    store(dst, o + 3 * out + 8, zr * w3i + zi * w3r)
        elif r == 2:
            for p in range(m):
                w1r, w1i = splat(tw[t]), splat(tw[t + 1])
                t += 2
                for q in range(s):
                    i = 16 * (q + s * p)
                    o = 16 * (q + s * 2 * p)
                    ar, ai = load(src, i), load(src, i + 8)
                    br, bi = load(src, i + hop), load(src, i + hop + 8)
                    store(dst, o, ar + br)
                    store(dst, o + 8, ai + bi)
                    ur, ui = ar - br, ai - bi
                    store(dst, o + out, ur * w1r - ui * w1i)
                    store(dst, o + out + 8, ur * w1i + ui * w1r)
        elif r == 3:
            for p in range(m):
                w1r, w1i = splat(tw[t]), splat(tw[t + 1])
                w2r, w2i = splat(tw[t + 2]), splat(tw[t + 3])
                t += 4
                for q in range(s):
                    i = 16 * (q + s * p)
                    o = 16 * (q + s * 3 * p)
                    ar, ai = load(src, i), load(src, i + 8)
                    br, bi = load(src, i + hop), load(src, i + hop + 8)
                    cr, ci = load(src, i + 2 * hop), load(src, i + 2 * hop + 8)
                    er, ei = br + cr, bi + ci
                    fr, fi = s3 * (br - cr), s3 * (bi - ci)
                    gr, gi = ar + c3 * er, ai + c3 * ei
                    store(dst, o, ar + er)
                    store(dst, o + 8, ai + ei)
                    ur, ui = gr - fi, gi + fr
                    store(dst, o + out, ur * w1r - ui * w1i)
                    store(dst, o + out + 8, ur * w1i + ui * w1r)
                    vr, vi = gr + fi, gi - fr
                    store(dst, o + 2 * out, vr * w2r - vi * w2i)
                    store(dst, o + 2 * out + 8, vr * w2i + vi * w2r)
        else:
            for p in range(m):
                w1r, w1i = splat(tw[t]), splat(tw[t + 1])
                w2r, w2i = splat(tw[t + 2]), splat(tw[t + 3])
                w3r, w3i = splat(tw[t + 4]), splat(tw[t + 5])
                w4r, w4i = splat(tw[t + 6]), splat(tw[t + 7])
                t += 8
                for q in range(s):
                    i = 16 * (q + s * p)
                    o = 16 * (q + s * 5 * p)
                    ar, ai = load(src, i), load(src, i + 8)
                    br, bi = load(src, i + hop), load(src, i + hop + 8)
                    cr, ci = load(src, i + 2 * hop), load(src, i + 2 * hop + 8)
                    dr, di = load(src, i + 3 * hop), load(src, i + 3 * hop + 8)
                    er, ei = load(src, i + 4 * hop), load(src, i + 4 * hop + 8)
                    p1r, p1i = br + er, bi + ei
                    m1r, m1i = br - er, bi - ei
                    p2r, p2i = cr + dr, ci + di
                    m2r, m2i = cr - dr, ci - di
                    store(dst, o, ar + p1r + p2r)
                    store(dst, o + 8, ai + p1i + p2i)
                    g1r, g1i = ar + c51 * p1r + c52 * p2r, ai + c51 * p1i + c52 * p2i
                    g2r, g2i = ar + c52 * p1r + c51 * p2r, ai + c52 * p1i + c51 * p2i
                    h1r, h1i = s51 * m1r + s52 * m2r, s51 * m1i + s52 * m2i
                    h2r, h2i = s52 * m1r - s51 * m2r, s52 * m1i - s51 * m2i
                    ur, ui = g1r - h1i, g1i + h1r
                    store(dst, o + out, ur * w1r - ui * w1i)
                    store(dst, o + out + 8, ur * w1i + ui * w1r)
                    ur, ui = g2r - h2i, g2i + h2r
                    store(dst, o + 2 * out, ur * w2r - ui * w2i)
                    store(dst, o + 2 * out + 8, ur * w2i + ui * w2r)
                    ur, ui = g2r + h2i, g2i - h2r
                    store(dst, o + 3 * out, ur * w3r - ui * w3i)
                    store(dst, o + 3 * out + 8, ur * w3i + ui * w3r)
                    ur, ui = g1r + h1i, g1i - h1r
                    store(dst, o + 4 * out, ur * w4r - ui * w4i)
                    store(dst, o + 4 * out + 8, ur * w4i + ui * w4r)
        in_y = not in_y
        length = m
        s *= r
    return in_y
