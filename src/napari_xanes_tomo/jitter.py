"""Jitter: where every projection of one tomogram lies, found from the projections alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .model import FloatArray

__all__ = ["find_jitter"]


def _fourier_shift(profiles: FloatArray, shift: FloatArray) -> FloatArray:
    """Move the content of every row of (n, length) by -shift samples (band-limited, edge-padded)."""
    n, length = profiles.shape
    pad = length // 2
    padded = np.pad(profiles, ((0, 0), (pad, pad)), mode="edge")
    k = np.fft.rfftfreq(padded.shape[1])
    spectrum = np.fft.rfft(padded, axis=1) * np.exp(2j * np.pi * k[None, :] * shift[:, None])
    return np.fft.irfft(spectrum, padded.shape[1], axis=1)[:, pad : pad + length]


def _vertical(profiles: FloatArray, limit: float) -> FloatArray:
    """Displacement of every vertical mass profile (n, rows) against their common template."""
    n, rows = profiles.shape
    smooth = profiles - profiles.mean(axis=1, keepdims=True)
    window = np.hanning(rows + 2)[1:-1]
    size = 2 * rows
    spectrum = np.fft.rfft(smooth * window, size, axis=1)
    shift = np.zeros(n)
    template = spectrum[n // 2]
    lag = np.fft.fftfreq(size, 1 / size)
    for _ in range(3):
        cross = np.fft.irfft(spectrum * np.conj(template)[None, :], size, axis=1)
        cross[:, np.abs(lag) > limit] = -np.inf
        best = np.argmax(cross, axis=1)
        shift = lag[best]
        turn = np.exp(2j * np.pi * np.fft.rfftfreq(size)[None, :] * shift[:, None])
        template = np.mean(spectrum * turn, axis=0)
    shift = shift - np.median(shift)
    for _ in range(8):
        moved = _fourier_shift(profiles, shift)
        lo = int(np.ceil(max(0.0, -shift.min()))) + 2
        hi = rows - int(np.ceil(max(0.0, shift.max()))) - 2
        if hi - lo < 8:
            break
        t = np.median(moved, axis=0)
        slope = np.gradient(t)
        use = slice(lo, hi)
        design = np.stack([slope[use], t[use], np.ones(hi - lo)], axis=1)
        fit = np.linalg.lstsq(design, (moved[:, use] - t[None, use]).T, rcond=None)[0]
        step = -fit[0]
        shift = shift + np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-3:
            break
    return np.asarray(shift - shift.mean())


def _horizontal(frames: npt.NDArray[np.float32], dy: FloatArray, theta: FloatArray) -> FloatArray:
    """Displacement in x from the centre of mass of every row; the object's own centre is put on the axis."""
    n, h, w = frames.shape
    x = np.arange(w) - (w - 1) / 2
    m0 = frames.sum(axis=2, dtype=np.float64)
    m1 = frames @ x
    m0, m1 = _fourier_shift(m0, dy), _fourier_shift(m1, dy)
    lo = int(np.ceil(max(0.0, -dy.min()))) + 2
    hi = h - int(np.ceil(max(0.0, dy.max()))) - 2
    m0, m1 = m0[:, lo:hi], m1[:, lo:hi]
    mass = np.median(m0, axis=0)
    rows = mass > 0.05 * mass.max()
    m0, m1, mass = m0[:, rows], m1[:, rows], mass[rows]
    dx = m1.sum(axis=1) / m0.sum(axis=1)
    com = m1 / np.maximum(m0, 0.02 * mass.max())
    basis = np.stack([np.cos(theta), np.sin(theta)], axis=1)
    weight = mass**2
    for _ in range(4):
        rest = com - dx[:, None]
        orbit = np.linalg.lstsq(basis, rest, rcond=None)[0]
        orbit -= (orbit @ mass / mass.sum())[:, None]
        rest = com - basis @ orbit
        centre = np.average(rest, axis=1, weights=weight)
        spread = 1.4826 * np.median(np.abs(rest - centre[:, None])) + 1e-9
        robust = weight * np.minimum(1, 1.5 * spread / np.maximum(np.abs(rest - centre[:, None]), 1e-12))
        dx = np.sum(robust * rest, axis=1) / np.sum(robust, axis=1)
    return dx
