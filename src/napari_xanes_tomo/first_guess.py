"""Where a search for jitter begins: moments of the frames, or correlation with each other and with reprojections.

Vertically the mass in every row must not depend on the angle, horizontally the centre of mass must move on a
sinusoid (Helgason-Ludwig conditions, doi 10.1002/cpa.3160190207).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .model import Alignment, FloatArray
from .reprojection import Scene, gauge_free, orbit

__all__ = ["FEWEST_ANGLES", "centred", "chain", "correlated", "horizontal", "slips", "vertical"]

F32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]
FEWEST_ANGLES = 8


def vertical(profiles: FloatArray, limit: float) -> tuple[FloatArray, int, int, Bool]:
    """Displacement in y of every mass profile (n, rows), the rows seen in all of them once aligned, and which agree.

    The centre of mass of the common profile is put at the middle row. Profiles unlike the others are left out of it;
    their displacement is the middle of the others'.
    """
    n, rows = profiles.shape
    window = np.hanning(rows + 2)[1:-1]
    size = 2 * rows
    mass = profiles.sum(axis=1)
    typical = float(np.median(mass))
    good: Bool = (mass > 0.5 * typical) & (mass < 2 * typical)
    if good.sum() < max(FEWEST_ANGLES, 0.5 * n):
        good = np.ones(n, dtype=bool)
    spectrum = np.fft.rfft((profiles - profiles.min(axis=1, keepdims=True)) * window, size, axis=1)
    frequency = np.fft.rfftfreq(size)
    spectrum[:, 0] = 0
    power = np.sqrt(np.sum(np.abs(spectrum) ** 2, axis=1))
    lag = np.fft.fftfreq(size, 1 / size)
    template = spectrum[np.flatnonzero(good)[good.sum() // 2]]
    shift = np.zeros(n)
    for _ in range(3):
        cross = np.fft.irfft(spectrum * np.conj(template)[None, :], size, axis=1)
        cross[:, np.abs(lag) > limit] = -np.inf
        shift = lag[np.argmax(cross, axis=1)]
        moved = spectrum * np.exp(2j * np.pi * frequency[None, :] * shift[:, None])
        template = np.mean(moved[good], axis=0)
    alike = np.real(moved @ np.conj(template)) / np.maximum(power * np.linalg.norm(template), 1e-30)
    rest = 1 - alike
    unlike = rest > np.maximum(8 * np.median(rest[good]), 0.02)
    if (good & ~unlike).sum() >= max(FEWEST_ANGLES, 0.5 * n):
        good &= ~unlike
    shift = np.where(good, shift - np.median(shift[good]), 0.0)
    top, bottom = common_rows(shift, rows)
    for _ in range(10):
        moved = _fourier_shift(profiles, shift)[:, top:bottom]
        if bottom - top < 8:
            break
        t = np.median(moved[good], axis=0)
        design = np.stack([-np.gradient(t), t, np.ones_like(t)], axis=1)
        step = np.linalg.lstsq(design, (moved - t[None, :]).T, rcond=None)[0][0]
        step = np.where(good, step - np.median(step[good]), 0.0)
        shift = shift + np.clip(step, -2, 2)
        top, bottom = common_rows(shift, rows)
        if np.abs(step).max() < 1e-3:
            break
    middle = np.arange(top, bottom) - (rows - 1) / 2
    profile = np.median(_fourier_shift(profiles, shift)[good, top:bottom], axis=0)
    offset = float(np.sum(profile * middle) / np.sum(profile)) if bottom > top else 0.0
    return np.asarray(shift + offset), top, bottom, good


def horizontal(
    frames: F32, dy: FloatArray, theta: FloatArray, top: int, bottom: int, good: Bool, whole: Bool
) -> tuple[FloatArray, float]:
    """Displacement in x from the centre of mass of every row, and its standard error from two sets of rows.

    Each row's centre moves on its own sinusoid; what all rows do besides is the displacement. The centre of mass of the
    whole is put on the axis. Frames that are not `good` get what their neighbours have; rows of the common grid that
    are not `whole` (y,) have no part.
    """
    if not good.all():
        part, spread = horizontal(frames[good], dy[good], theta[good], top, bottom, good[good], whole)
        order = np.argsort(theta[good], kind="stable")
        return np.interp(theta, theta[good][order], part[order]), spread
    n, _, w = frames.shape
    if bottom - top < 4:
        return np.full(n, np.nan), float("nan")
    x = (np.arange(w) - (w - 1) / 2).astype(np.float32)
    offset = dy - np.median(dy)
    m0 = _fourier_shift(frames.sum(axis=2, dtype=np.float64), offset)[:, top:bottom]
    m1 = _fourier_shift(np.asarray(frames @ x, dtype=np.float64), offset)[:, top:bottom]
    mass = np.median(m0, axis=0)
    at = np.rint(np.arange(top, bottom) - np.median(dy)).astype(int)
    rows = (mass > 0.05 * mass.max()) & whole[np.clip(at, 0, len(whole) - 1)]
    if mass.max() <= 0 or rows.sum() < 2:
        return np.full(n, np.nan), float("nan")
    m0, m1, mass = m0[:, rows], m1[:, rows], mass[rows]
    basis = np.stack([np.cos(theta), np.sin(theta)], axis=1)

    def estimate(use: slice) -> FloatArray:
        total = m0[:, use].sum(axis=1)
        dx: FloatArray = m1[:, use].sum(axis=1) / np.where(total > 0, total, np.nan)
        com = m1[:, use] / np.maximum(m0[:, use], 0.02 * mass.max())
        weight = mass[use] ** 2
        if not np.isfinite(dx).all():
            return dx
        for _ in range(4):
            orbit = np.linalg.lstsq(basis, com - dx[:, None], rcond=None)[0]
            orbit -= (orbit @ mass[use] / mass[use].sum())[:, None]
            rest = com - basis @ orbit
            off = np.abs(rest - np.average(rest, axis=1, weights=weight)[:, None])
            scale = 1.4826 * np.median(off) + 1e-9
            robust = weight * np.minimum(1, 1.5 * scale / np.maximum(off, 1e-12))
            dx = np.asarray(np.sum(robust * rest, axis=1) / np.sum(robust, axis=1))
        return dx

    dx = estimate(slice(None))
    even, odd = estimate(slice(0, None, 2)), estimate(slice(1, None, 2))
    difference = even - odd
    c, a, b = np.linalg.lstsq(np.column_stack([np.ones(n), basis]), difference, rcond=None)[0]
    difference = difference - c - basis @ np.array([a, b])
    return dx, float(np.std(difference) / 2)


def common_rows(shift: FloatArray, rows: int) -> tuple[int, int]:
    top = int(np.ceil(max(0.0, -shift.min()))) + 2
    bottom = rows - int(np.ceil(max(0.0, shift.max()))) - 2
    return (top, bottom) if bottom > top else (0, 0)


def _fourier_shift(profiles: FloatArray, shift: FloatArray) -> FloatArray:
    """Move the content of every row of (n, length) by -shift samples (band-limited, edge-padded)."""
    length = profiles.shape[1]
    pad = length // 2
    padded = np.pad(profiles, ((0, 0), (pad, pad)), mode="edge")
    k = np.fft.rfftfreq(padded.shape[1])
    spectrum = np.fft.rfft(padded, axis=1) * np.exp(2j * np.pi * k[None, :] * shift[:, None])
    return np.asarray(np.fft.irfft(spectrum, padded.shape[1], axis=1)[:, pad : pad + length])


def correlated(scene: Scene, start: FloatArray, limit: float, *, rounds: int) -> tuple[FloatArray, bool, float]:
    """Move every frame to where it correlates best with the reprojection of the others, again and again.

    Returns the displacements, whether the last round moved hardly any frame, and the part of the contrast that the
    reprojections do not explain.
    """
    shift = start
    agreed = False
    unexplained = float("inf")
    best = (float("inf"), start)
    for _ in range(rounds):
        model = scene.held_out_model(scene.placed(shift))
        found, score = scene.correlate(model, limit)
        trusted = score > 0.3 * np.median(score)
        unexplained = float(np.median(1 - np.clip(score, 0, 1) ** 2))
        new = np.where(trusted[:, None], found, shift)
        new = gauge_free(new - shift, scene.theta) + shift
        move = np.abs(new - shift).max(axis=1)
        shift = new
        if unexplained < best[0]:
            best = (unexplained, shift)
        agreed = bool(np.quantile(move, 0.8) < 1.0) and unexplained < 0.6
        if agreed and np.quantile(move, 0.9) < 0.5:
            break
    return (shift if rounds == 1 else best[1]), agreed, unexplained if rounds == 1 else best[0]


def chain(scene: Scene, limit: float) -> FloatArray:
    """Displacements from each frame's correlation with the mean of the ones before it, in the order of the angles."""
    from .resample import place

    order = np.argsort(scene.theta, kind="stable")
    out = np.zeros((len(order), 2))
    frames = scene.data
    template = frames[order[0]].copy()
    size = [2 * v for v in scene.shape]
    for k in order[1:]:
        cross = np.fft.irfft2(np.fft.rfft2(frames[k], size) * np.fft.rfft2(template, size).conj(), size)
        lag = [np.fft.fftfreq(s, 1 / s) for s in size]
        cross[np.abs(lag[0]) > 2 * limit] = -np.inf
        cross[:, np.abs(lag[1]) > 2 * limit] = -np.inf
        at = np.unravel_index(int(np.argmax(cross)), cross.shape)
        score = cross[at] / max(float(np.linalg.norm(frames[k]) * np.linalg.norm(template)), 1e-30)
        out[k] = [lag[0][at[0]], lag[1][at[1]]]
        if score > 0.3:
            moved = place(frames[k : k + 1], Alignment(out[k : k + 1], np.zeros((1, 2))))[0]
            template = 0.6 * template + 0.4 * moved
        # the centre of the first frame is as good as any
    basis = orbit(scene.theta, constant=True)
    out[:, 1] -= basis[:, :2] @ np.linalg.lstsq(basis, out[:, 1], rcond=None)[0][:2]
    out[:, 0] -= np.median(out[:, 0])
    return out


def slips(shift: FloatArray, theta: FloatArray, scale: float) -> tuple[tuple[int, float, float], ...]:
    """Projections with which a new segment begins: displacement jumps there and stays, far beyond its usual steps."""
    n = len(shift)
    rest = shift.copy()
    basis = orbit(theta, constant=True)
    rest[:, 1] -= basis[:, :2] @ np.linalg.lstsq(basis, shift[:, 1], rcond=None)[0][:2]
    if n < 24:
        return ()
    reach = 10
    jump = np.zeros((n, 2))
    for k in range(reach, n - reach + 1):
        jump[k] = np.median(rest[k : k + reach], axis=0) - np.median(rest[k - reach : k], axis=0)
    steps = np.diff(rest, axis=0, prepend=rest[:1])
    usual = 1.4826 * np.median(np.abs(steps), axis=0) + 1e-9
    size = np.max(np.minimum(np.abs(jump), np.abs(steps)) / np.maximum(4 * usual, 1.5 * scale), axis=1)
    out = []
    while size.max() > 1:
        k = int(np.argmax(size))
        at_once = np.median(rest[k : k + 3], axis=0) - np.median(rest[k - 3 : k], axis=0)
        out.append((k, float(at_once[0]), float(at_once[1])))
        size[max(0, k - reach) : k + reach] = 0
    return tuple(sorted(out))


def centred(scene: Scene, shift: FloatArray, theta: FloatArray) -> FloatArray:
    """Use what cannot be determined to put the object's centre of mass on the axis, at the middle row."""
    from .model import Alignment as Placed
    from .resample import place

    height, width = scene.shape
    placed = place(scene.plain, Placed(shift, np.zeros_like(shift)))
    profile = np.median(placed.sum(axis=2, dtype=np.float64), axis=0)
    inside = np.zeros(height)
    inside[scene.rows[0] : scene.rows[1]] = 1
    profile = np.maximum(profile * inside, 0)
    out = shift.copy()
    if profile.sum() <= 0:
        return out
    out[:, 0] += float(profile @ (np.arange(height) - (height - 1) / 2) / profile.sum())
    across = placed[:, scene.rows[0] : scene.rows[1]].sum(axis=1, dtype=np.float64)
    total = across.sum(axis=1)
    com = across @ (np.arange(width) - (width - 1) / 2) / np.where(total > 0, total, np.nan)
    good = np.isfinite(com) & (total > 0.5 * np.nanmedian(total)) & (np.abs(com) < width / 2)
    if good.sum() >= 8:
        basis = orbit(theta, constant=True)
        fit = np.linalg.lstsq(basis[good], com[good], rcond=None)[0]
        out[:, 1] += basis[:, :2] @ fit[:2]
    return out
