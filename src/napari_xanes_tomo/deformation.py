"""Parts of the object that move: beyond a rigid motion and one scale, and with time.

The registration tells how parts of the object are displaced at every energy beyond what its alignment applies (block
shifts). Two things make such a field without anything that moves: noise, and another contrast - a grain that absorbs
more beside one that absorbs less. The second follows what the absorption is made of, not the time: 6534 eV looks like
8570 eV, however long ago it was measured. A sample that swells, cracks or creeps in the beam follows the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .model import FloatArray

__all__ = ["Deformation", "acquisition_order", "beyond_rigid", "deformation"]

_FEWEST = 5  # energies of which a trend is asked
# Standard deviation of what another contrast may do to a block, px of a 256 px frame: the whole absorption exchanged
# between two elements, and a particle that absorbs nothing. Several times what is usual.
_PRIOR_PX = (1.0, 0.3)
_TEMPLATE_PX = 0.05  # of a 256 px frame: what the template is itself deformed by, the same for all energies
_LEAST_PX = 0.004  # of a 256 px frame: no block is known better, at any energy
_STRANGE = 25.0  # energies whose field misses the others' by this many times the usual square are left out
_SIGNIFICANT = 4.0
_WORTH_PX = 0.02  # of a 256 px frame: trends below are not told


@dataclass(frozen=True)
class Deformation:
    """How parts of the object move with time, raw px.

    Attributes
    ----------
    place : (rows, columns, 2) array
        ``[y, x]`` of the middle of each block from the middle of the common grid, px; NaN where nothing is known.
    trend, sigma : (rows, columns, 2) arrays
        ``[dy, dx]`` from the first energy measured to the last, beyond rigid motion and scale, and standard errors.
    left : (energies, rows, columns, 2) array
        Field of every energy beyond rigid motion and scale.
    z : float
        How far the whole trend is from none, in standard errors; NaN with too few energies.
    worth_px : float
        Largest displacement that is not told, whatever its significance.
    """

    place: FloatArray
    trend: FloatArray
    sigma: FloatArray
    left: FloatArray
    z: float
    worth_px: float

    @property
    def size_px(self) -> float:
        """Rms length of the trend beyond its errors."""
        good = np.isfinite(self.trend) & np.isfinite(self.sigma)
        if not good.any():
            return float("nan")
        square = np.mean(self.trend[good] ** 2 - self.sigma[good] ** 2)
        return float(np.sqrt(2 * max(0.0, float(square))))

    @property
    def largest_px(self) -> float:
        """Length of the trend where it is largest."""
        length = np.hypot(self.trend[..., 0], self.trend[..., 1])
        return float(np.nanmax(length)) if np.isfinite(length).any() else float("nan")

    @property
    def significant(self) -> bool:
        """Whether the field follows the time."""
        return bool(self.z > _SIGNIFICANT and self.size_px > self.worth_px)

    def text(self) -> str:
        """Return the outcome in one line."""
        if not np.isfinite(self.z):
            return f"Deformation with time: not known (fewer than {_FEWEST} energies with several parts measured)."
        what = f"{self.size_px:.3f} px (rms of the parts, at most {self.largest_px:.3f} px; {self.z:.1f} sigma)"
        if self.significant:
            return (
                f"the particle changes its shape with time by {what} from the first energy to the last: look at the "
                "arrows, and do not trust differences between early and late energies below that"
            )
        return f"Deformation with time: none that is significant, {what}."


def acquisition_order(begun_s: npt.ArrayLike) -> FloatArray:
    """Return when every energy was begun, s, NaN where unknown; their order where nothing says or it tells nothing.

    Parameters
    ----------
    begun_s : (energies,) array
        Start of the first projection of every energy, seconds; NaN where unknown.
    """
    time = np.asarray(begun_s, dtype=float)
    known = np.isfinite(time)
    return time if known.all() and np.ptp(time) > 0 else np.arange(len(time), dtype=float)


def beyond_rigid(shift: npt.ArrayLike, sigma: npt.ArrayLike, place: npt.ArrayLike) -> FloatArray:
    """Return a field of displacements (rows, columns, 2) without its shift, its turn and its change of scale.

    Parameters
    ----------
    shift, sigma : (rows, columns, 2) arrays
        ``[dy, dx]`` and standard errors; NaN where nothing is known.
    place : (rows, columns, 2) array
        ``[y, x]`` of the blocks.
    """
    field, error, at = (np.asarray(a, dtype=float) for a in (shift, sigma, place))
    known = np.isfinite(field).all(axis=2) & np.isfinite(error).all(axis=2) & np.isfinite(at).all(axis=2)
    out = np.full(field.shape, np.nan)
    if known.sum() < 3:
        return out
    y, x = at[known].T
    one, none = np.ones_like(y), np.zeros_like(y)
    basis = np.stack([np.stack([one, none, y, x], 1), np.stack([none, one, x, -y], 1)], axis=1)
    size = np.array([1.0, 1.0, *2 * [max(1e-9, float(np.sqrt(np.mean(y**2 + x**2))))]])
    basis = basis / size
    weight = 1 / np.maximum(error[known], 0.3 * float(np.median(error[known])) + 1e-12)
    a = (basis * weight[:, :, None]).reshape(-1, 4)
    solution = np.linalg.lstsq(a, (field[known] * weight).ravel(), rcond=1e-9)[0]
    out[known] = field[known] - basis @ solution
    return out


def deformation(
    time: npt.ArrayLike,
    shift: Sequence[FloatArray | None],
    sigma: Sequence[FloatArray | None],
    place: Sequence[FloatArray | None],
    *,
    reference: int,
    share: npt.ArrayLike | None = None,
    strength: npt.ArrayLike | None = None,
    width_px: float = 256.0,
) -> Deformation:
    """Find what of the block shifts of all energies follows the time of acquisition.

    Of every block, ``shift = trend * time + template + sum over elements (change of the share) * bias + (change of the
    strength) * bias``, all changes against the reference. What the template's own errors and another contrast may do is
    bounded by priors; what the energies scatter by beyond their errors counts as error.

    Parameters
    ----------
    time : (energies,) array
        When each energy was measured, any unit.
    shift, sigma : sequences of (rows, columns, 2) arrays or None
        One an energy: ``[dy, dx]`` of blocks of the object, raw px; None for one that is not known, as the reference.
    place : sequence of (rows, columns, 2) arrays or None
        ``[y, x]`` of the blocks from the middle of the common grid, px.
    reference : int
        Number of the reference energy.
    share : (energies, elements) array, optional
        Part of each element in the absorption, see `contrast.take_apart`.
    strength : (energies,) array, optional
        Absorption of the particle over that of the reference.
    width_px : float
        Width of a raw frame, px.
    """
    when = np.asarray(time, dtype=float)
    n, unit = len(when), width_px / 256
    found = {
        e: (s, u, p)
        for e, (s, u, p) in enumerate(zip(shift, sigma, place, strict=True))
        if s is not None and u is not None and p is not None and np.isfinite(when[e])
    }
    shape = next((s.shape[:2] for s, _, _ in found.values()), (4, 4))
    left = np.full((n, *shape, 2), np.nan)
    error, at = left.copy(), left.copy()
    for e, (s, u, p) in found.items():
        left[e], error[e], at[e] = beyond_rigid(s, u, p), u, p
    nothing = np.full((*shape, 2), np.nan)
    measured: npt.NDArray[np.bool_] = np.asarray(np.isfinite(left).any(axis=(1, 2, 3)))
    middle = np.full((*shape, 2), np.nan)
    some = np.isfinite(at).any(axis=0)
    middle[some] = np.nanmean(at[:, some], axis=0)
    if measured.sum() < _FEWEST or not np.isfinite(when[reference]) or np.ptp(when[measured]) == 0:
        return Deformation(middle, nothing, nothing, left, float("nan"), _WORTH_PX * unit)
    span = float(np.ptp(when[[*np.flatnonzero(measured), reference]]))
    typical = float(np.nanmedian(error[np.isfinite(left)]))
    columns: list[FloatArray] = [(when - when[reference]) / span, np.ones(n)]
    prior = [np.inf, float(np.hypot(_TEMPLATE_PX * unit, 2 * typical))]
    for values, size in ((share, _PRIOR_PX[0]), (strength, _PRIOR_PX[1])):
        if values is not None:
            change = np.asarray(values, dtype=float).reshape(n, -1)
            change = np.nan_to_num(change - change[reference])
            columns += list(change.T)
            prior += [size * unit] * change.shape[1]
    design = np.stack(columns, axis=1)
    use = measured.copy()
    for _ in range(3):
        trend, spread, rest = _regress(left, error, design, np.array(prior), use, _LEAST_PX * unit)
        with np.errstate(invalid="ignore"):
            miss = np.array([_mean(rest[e] ** 2) for e in range(n)])
        usual = float(np.median(miss[use]))
        keep = measured & ~(miss > _STRANGE * usual)
        if keep.sum() < _FEWEST or np.array_equal(keep, use):
            break
        use = keep
    good = np.isfinite(trend) & np.isfinite(spread)
    free = int(good.sum()) - 4
    if free < 4:
        return Deformation(middle, nothing, nothing, left, float("nan"), _WORTH_PX * unit)
    square = float(np.sum((trend[good] / spread[good]) ** 2))
    # The cube root of chi squared over its degrees of freedom is nearly normal (Wilson & Hilferty 1931).
    z = ((square / free) ** (1 / 3) - 1 + 2 / (9 * free)) / np.sqrt(2 / (9 * free))
    return Deformation(middle, trend, spread, left, float(z), _WORTH_PX * unit)


def _mean(values: FloatArray) -> float:
    good = np.isfinite(values)
    return float(values[good].mean()) if good.any() else np.nan


def _regress(
    field: FloatArray,
    sigma: FloatArray,
    design: FloatArray,
    prior: FloatArray,
    use: npt.NDArray[np.bool_],
    least: float,
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the first coefficient of every value of the field, its error, and residuals over their errors."""
    shape = field.shape[1:]
    trend, spread, rest = np.full(shape, np.nan), np.full(shape, np.nan), np.full(field.shape, np.nan)
    bound = np.diag(1 / prior**2)
    variance = sigma**2 + least**2
    more = 1.0
    for _ in range(4):
        squares, free = 0.0, 0.0
        for index in np.ndindex(*shape):
            y, v = field[(slice(None), *index)], variance[(slice(None), *index)] * more
            good = use & np.isfinite(y) & np.isfinite(v)
            if good.sum() < _FEWEST:
                continue
            a, w = design[good], 1 / v[good]
            inverse = np.linalg.pinv(a.T @ (w[:, None] * a) + bound, hermitian=True)
            x = inverse @ (a.T @ (w * y[good]))
            here = np.isfinite(y)
            rest[(here, *index)] = (y[here] - design[here] @ x) / np.sqrt(v[here])
            trend[index], spread[index] = x[0], np.sqrt(inverse[0, 0])
            squares += float(np.sum(rest[(good, *index)] ** 2))
            free += good.sum() - float(np.trace(inverse @ (a.T @ (w[:, None] * a))))
        if free < 1:
            break
        more *= max(1e-3, squares / free)
        more = max(1.0, more)
    return trend, spread, rest
