"""What runs straight through the field along the rotation axis, such as the wall of a capillary, taken out of frames.

A glass wall is straight over a few tens of micrometres. It adds the same profile to every row of a projection but for
its tilt, which turns with the sample: ``f_i(x - tau_i y)`` with ``tau_i = a cos(theta_i) + b sin(theta_i)``. The rows
above and below the object show it alone. A wall is wider than the field, so that a volume made of the field cannot
hold it: left in, it pulls the slow drifts of x. Subtracted, what remains is the object in air.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import numba as nb
import numpy as np
import numpy.typing as npt

from .model import FloatArray
from .parallel import in_threads

__all__ = ["Straight", "fit_straight", "outer_rows", "profile_noise"]

F32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]
_F = TypeVar("_F", bound=Callable[..., Any])

_BEYOND = 8  # pixels that a profile reaches beyond the frame on either side, for the tilt
_STIFF = 0.3  # weight of the second differences of a profile: it bridges what the object hides, and blurs 0.4 px
_CLIP = 4.0  # robust standard deviations beyond which a pixel is not air
_STEEPEST = 0.15  # tangent of the tilt
_ROUNDS = 16  # at most
_EDGE = 3  # rows at either end that are not used: where the beam does not reach they are made up
_ENDS = 3  # rows behind them that are taken for air


def _jit(function: _F) -> _F:
    """Compile for the machine at first use, kept on disk, without the GIL."""
    return cast(_F, nb.njit(cache=True, nogil=True)(function))


@dataclass(frozen=True)
class Straight:
    """Straight structures of n projections.

    Attributes
    ----------
    profiles : (n, w + 16) array
        What every row shows, in the middle row at ``x = -8 .. w + 7``.
    slope : (n,) array
        Besides, what the air rises downwards over half the width of the frame.
    tilt : (2,) array
        Tangent of the tilt of the structures in the projections at 0 and at 90 degrees.
    shared : float
        Correlation of what the upper and the lower half of the frames show in the outermost columns, a plane taken out:
        1 where something wider than the field runs straight through it, near 0 for air with noise. What lies inside the
        field, such as an object that leaves it above and below, does not count: a volume of the field can hold it.
    rows : (int, int) or None
        First and end of the rows of the frame this was found in, whose middle is meant above; all unless given.
    """

    profiles: FloatArray
    slope: FloatArray
    tilt: FloatArray
    shared: float
    rows: tuple[int, int] | None = None

    def unbinned(self, bin: int, sign: float = 1.0) -> Straight:
        """Return the same for frames of `bin` times as many pixels a side, multiplied by `sign`."""
        return replace(self, profiles=sign * _finer(self.profiles, bin), slope=sign * self.slope)

    def frames(self, shape: tuple[int, int], theta_deg: FloatArray) -> F32:
        """Return the structures as (n, y, x) frames, nothing beyond `rows`."""
        if self.rows is not None:
            top, bottom = self.rows
            whole = np.zeros((len(self.profiles), *shape), dtype=np.float32)
            whole[:, top:bottom] = replace(self, rows=None).frames((bottom - top, shape[1]), theta_deg)
            return whole
        out = np.empty((len(self.profiles), *shape), dtype=np.float32)
        shear = _shear(self.tilt, theta_deg)
        in_threads(len(out), lambda a, b: _draw(a, b, self.profiles, self.slope, shear, out))
        return out


def _finer(profiles: FloatArray, bin: int) -> FloatArray:
    width = profiles.shape[1] - 2 * _BEYOND
    at = (np.arange(-_BEYOND, width * bin + _BEYOND) + 0.5) / bin - 0.5
    x = np.arange(-_BEYOND, width + _BEYOND)
    return np.stack([np.interp(at, x, row) for row in profiles])


def _shear(tilt: FloatArray, theta_deg: FloatArray) -> FloatArray:
    t = np.deg2rad(theta_deg)
    return np.asarray(tilt[0] * np.cos(t) + tilt[1] * np.sin(t))


@_jit
def _equations(
    first: int, end: int, frames: F32, weight: F32, shear: FloatArray, band: FloatArray, cross: FloatArray,
    rhs: FloatArray, last: FloatArray,
) -> None:  # fmt: skip
    """Sum the normal equations of a profile, linear between its points, and a slope in y, frame by frame.

    band (n, 2, m): first superdiagonal and diagonal; cross (n, m): products with the slope; rhs (n, m); last (n, 2):
    square and right side of the slope.
    """
    _, h, w = frames.shape
    m = rhs.shape[1]
    for i in range(first, end):
        for y in range(h):
            rise = (y - (h - 1) / 2) / (w / 2)
            at = _BEYOND - shear[i] * (y - (h - 1) / 2)
            k0 = int(np.floor(at))
            g = at - k0
            for x in range(max(0, -k0), min(w, m - 1 - k0)):
                u = weight[i, y, x]
                if u == 0.0:
                    continue
                k = x + k0
                d = frames[i, y, x]
                left, right = u * (1 - g), u * g
                band[i, 1, k] += left * (1 - g)
                band[i, 1, k + 1] += right * g
                band[i, 0, k + 1] += left * g
                cross[i, k] += left * rise
                cross[i, k + 1] += right * rise
                rhs[i, k] += left * d
                rhs[i, k + 1] += right * d
                last[i, 0] += u * rise * rise
                last[i, 1] += u * rise * d


@_jit
def _draw(first: int, end: int, profiles: FloatArray, slope: FloatArray, shear: FloatArray, out: F32) -> None:
    """Draw the structures of every frame."""
    _, h, w = out.shape
    m = profiles.shape[1]
    for i in range(first, end):
        for y in range(h):
            height = y - (h - 1) / 2
            rise = slope[i] * height / (w / 2)
            at = _BEYOND - shear[i] * height
            k0 = int(np.floor(at))
            g = at - k0
            for x in range(w):
                k = min(max(x + k0, 0), m - 2)
                out[i, y, x] = profiles[i, k] + g * (profiles[i, k + 1] - profiles[i, k]) + rise


@_jit
def _settle(
    first: int, end: int, frames: F32, air: Bool, profiles: FloatArray, slope: FloatArray, shear: FloatArray,
    limit: float, weight: F32, push: FloatArray, hold: FloatArray, sizes: F32,
) -> None:  # fmt: skip
    """Weigh the air by whether it is off by more than `limit`, and say what another shear would do about it.

    weight (n, y, x); push, hold (n,): products of the derivative by the shear with what is left, and with itself; sizes
    (n, y / 2, x / 2): how far every fourth pixel is off, -1 where it is no air. At the edge of a wall a profile of
    straight pieces is off by about its second difference.
    """
    _, h, w = frames.shape
    m = profiles.shape[1]
    bend = np.zeros(m)
    play = np.zeros(m)
    for i in range(first, end):
        for k in range(1, m - 1):
            bend[k] = abs(profiles[i, k + 1] - 2 * profiles[i, k] + profiles[i, k - 1])
        for k in range(m - 1):
            play[k] = limit + max(bend[max(k - 1, 0)], bend[k], bend[k + 1], bend[min(k + 2, m - 1)])
        pushed, held = 0.0, 0.0
        for y in range(h):
            height = y - (h - 1) / 2
            rise = slope[i] * height / (w / 2)
            at = _BEYOND - shear[i] * height
            k0 = int(np.floor(at))
            g = at - k0
            along, square = 0.0, 0.0
            for x in range(w):
                size = -1.0
                used = 0.0
                if air[i, y, x]:
                    k = min(max(x + k0, 0), m - 2)
                    step = profiles[i, k + 1] - profiles[i, k]
                    rest = frames[i, y, x] - profiles[i, k] - g * step - rise
                    size = abs(rest)
                    if size <= play[k]:
                        used = 1.0
                        along += step * rest
                        square += step * step
                weight[i, y, x] = used
                if y % 2 == 0 and x % 2 == 0:
                    sizes[i, y // 2, x // 2] = size
            pushed -= height * along
            held += height * height * square
        push[i], hold[i] = pushed, held


def outer_rows(frames: F32) -> Bool:
    """(n, y, x) True in the rows above and below the object, whatever runs through all rows.

    From either end as far as the sum of the row stands less than 3 % of its range above the line through both ends.
    """
    n, h, w = frames.shape
    first, last = _EDGE + _ENDS, h - _EDGE - _ENDS
    mass = frames.sum(axis=2, dtype=np.float64)
    pad = np.pad(mass, ((0, 0), (1, 1)), mode="edge")
    mass = (pad[:, :-2] + pad[:, 1:-1] + pad[:, 2:]) / 3
    top = np.median(mass[:, _EDGE:first], axis=1, keepdims=True)
    bottom = np.median(mass[:, last : h - _EDGE], axis=1, keepdims=True)
    along = (np.arange(h) - _EDGE - _ENDS / 2) / max(1, h - 2 * _EDGE - _ENDS)
    above = mass - top * (1 - along) - bottom * along
    rows = above < 0.03 * above.max(axis=1, keepdims=True)
    rows[:, :first] = True
    rows[:, last:] = True
    rows = np.logical_and.accumulate(rows, axis=1) | np.logical_and.accumulate(rows[:, ::-1], axis=1)[:, ::-1]
    return np.asarray(np.broadcast_to(rows[:, :, None], (n, h, w)))


def fit_straight(frames: F32, air: Bool, theta_deg: FloatArray, *, tilt: FloatArray | None = None) -> Straight:
    """Fit the straight structures of every projection where it shows air.

    Parameters
    ----------
    frames : (n, y, x) float32 array
    air : (n, y, x) bool array
        Where there is nothing but air and what runs straight through; the outermost rows are not used.
    theta_deg : (n,) array
    tilt : (2,) array, optional
        Where to begin.

    Returns
    -------
    Straight
        With `shared` below 0 a first impression only: there is nothing straight.
    """
    n, h, w = frames.shape
    air = air.copy()
    air[:, :_EDGE] = False
    air[:, h - _EDGE :] = False
    angle = np.zeros(2) if tilt is None else np.array(tilt, dtype=float)
    t = np.deg2rad(theta_deg)
    turn = np.stack([np.cos(t), np.sin(t)], axis=1)
    weight = air.astype(np.float32)
    push, hold = np.zeros(n), np.zeros(n)
    sizes = np.empty((n, (h + 1) // 2, (w + 1) // 2), dtype=np.float32)
    spread = np.inf
    strict = 0  # rounds without pixels that are no air; before, the tilt would be wrong and what it misses left out
    for k in range(_ROUNDS):
        shear = turn @ angle
        profiles, slope = _solve(frames, weight, shear)
        shared = _shared(frames, weight, shear) if k == 0 or strict == 2 else 1.0
        if k == _ROUNDS - 1 or strict == 2 or shared < 0:
            break

        def settle(first: int, end: int, p: FloatArray, s: FloatArray, q: FloatArray, limit: float) -> None:
            _settle(first, end, frames, air, p, s, q, limit, weight, push, hold, sizes)

        limit = (_CLIP if strict else 5 * _CLIP) * spread + 1e-12
        in_threads(n, lambda a, b, p=profiles, s=slope, q=shear, v=limit: settle(a, b, p, s, q, v))  # type: ignore[misc]
        seen = sizes[::2][sizes[::2] >= 0]
        spread = 1.4826 * float(np.median(seen)) if seen.size else 0.0
        normal = turn.T @ (hold[:, None] * turn)
        step = np.linalg.solve(normal + (1e-6 * np.trace(normal) + 1e-30) * np.eye(2), turn.T @ push)
        angle = np.clip(angle + np.clip(step, -0.03, 0.03), -_STEEPEST, _STEEPEST)
        if k and (strict or float(np.abs(step).max()) < 5e-4 or k >= _ROUNDS - 4):
            strict += 1
    return Straight(profiles, slope, angle, shared)


def profile_noise(model: F32, weight: F32, air: FloatArray) -> FloatArray:
    """Return (n,) what the noise of the profiles adds to the variance of a displacement in x, over that of the pixels.

    A profile is known from the air of its column, and its noise is the same in all rows of the object: it does not
    average out over them, and halves of the rows share it. In y it does not matter: along a column the gradients of an
    object in air add up to nothing.

    Parameters
    ----------
    model, weight : (n, rows, x) arrays
        What the projections are fitted to, with gain, level and slopes as nuisances, and where.
    air : (n, x) array
        Rows of air that every column of the profile was found in.
    """
    n, rows, width = model.shape
    gradient = -np.gradient(model, axis=2)
    y = np.linspace(-1, 1, rows, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    flat = np.stack([np.ones_like(y * x), y + 0 * x, x + 0 * y]).reshape(3, -1)
    out = np.empty(n)
    for i in range(n):
        u = weight[i].ravel()
        terms = np.concatenate([model[i].reshape(1, -1), flat])
        normal = ((terms * u) @ terms.T).astype(float)
        rhs = ((terms * u) @ gradient[i].ravel()).astype(float)
        c = np.linalg.lstsq(normal, rhs, rcond=1e-6)[0]
        pull = u * (gradient[i].ravel() - c.astype(np.float32) @ terms)
        held = float(pull @ gradient[i].ravel())
        column = pull.reshape(rows, width).sum(axis=0, dtype=np.float64)
        out[i] = np.sum(column**2 / np.maximum(air[i], 1.0)) / held if held > 0 else 0.0
    return out


def _solve(frames: F32, weight: F32, shear: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Profiles (n, m) and slopes (n,) of least squares with a stiffness."""
    from scipy.linalg import solveh_banded

    n = len(frames)
    m = frames.shape[2] + 2 * _BEYOND
    band, cross, rhs, last = np.zeros((n, 2, m)), np.zeros((n, m)), np.zeros((n, m)), np.zeros((n, 2))
    in_threads(n, lambda a, b: _equations(a, b, frames, weight, shear, band, cross, rhs, last))
    stiff = np.zeros((3, m))
    for offset, value in ((0, (1, 4, 1)), (1, (-2, -2)), (2, (1,))):
        for j, v in enumerate(value):
            stiff[2 - offset, j + offset : j + offset + m - 2] += v
    profiles, slope = np.zeros((n, m)), np.zeros(n)
    for i in range(n):
        whole = _STIFF * stiff
        whole[1:] += band[i]
        whole[2] += 1e-6
        by = solveh_banded(whole, np.stack([rhs[i], cross[i]], axis=1), check_finite=False)
        square = last[i, 0] - cross[i] @ by[:, 1]
        slope[i] = (last[i, 1] - cross[i] @ by[:, 0]) / square if square > 1e-3 * last[i, 0] + 1e-9 else 0.0
        profiles[i] = by[:, 0] - slope[i] * by[:, 1]
    return profiles, slope


def _shared(frames: F32, weight: F32, shear: FloatArray) -> float:
    """Correlate the profiles above and below the middle row at both sides, a plane taken out; see `Straight.shared`."""
    from .agreement import solve_normal

    n, h, w = frames.shape
    strip = max(4, w // 12)
    columns = np.r_[0:strip, w - strip : w]
    # along the tilt, to whole pixels
    along = np.rint(shear[:, None] * (np.arange(h) - (h - 1) / 2)).astype(np.intp)
    at = np.clip(columns + along[:, :, None], 0, w - 1)
    part, use = np.take_along_axis(frames, at, axis=2), np.take_along_axis(weight, at, axis=2)
    y = np.repeat((np.arange(h) - (h - 1) / 2) / (w / 2), len(columns))
    x = np.tile((columns - (w - 1) / 2) / (w / 2), h)
    terms = np.stack([np.ones_like(y), y, x])
    products = (terms[:, None] * terms[None]).reshape(9, -1).astype(np.float32)
    flat = use.reshape(n, -1)
    normal = (flat @ products.T).reshape(n, 3, 3).astype(float)
    rhs = ((flat * part.reshape(n, -1)) @ terms.T.astype(np.float32)).astype(float)
    c, _ = solve_normal(normal, rhs)
    level = part - (c.astype(np.float32) @ terms.astype(np.float32)).reshape(part.shape)
    sums = [(use * level).reshape(n, h, 2, strip), use.reshape(n, h, 2, strip)]
    parts = [[v[:, k].sum(axis=1, dtype=np.float64) for k in (slice(h // 2), slice(h // 2, h))] for v in sums]
    # three columns at a time: the tilt may not be known yet
    of_three, counts = ([v[..., :-2] + v[..., 1:-1] + v[..., 2:] for v in part] for part in parts)
    above, below = (v / np.maximum(k, 1e-9) for v, k in zip(of_three, counts, strict=True))
    both = np.minimum(*counts)
    own = float(np.sum(both * (above**2 + below**2)))
    return float(2 * np.sum(both * above * below) / own) if own > 0 else 0.0
