"""XANES spectra: normalisation, edge position, and the shift of a spectrum as two linear measurements.

Energies are in eV; spectra are attenuation in any unit, energy along the first axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .model import FloatArray

__all__ = ["EdgeShift", "Normalisation", "edge_at_half", "edge_shift", "normalisation"]

# Windows about the tabulated edge; for nickel 8178..8313 and 8400..8570 eV.
PRE_EV = (-200.0, -20.0)
POST_EV = (60.0, 300.0)


@dataclass(frozen=True)
class Normalisation:
    """Straight lines below and above an edge: ``(spectrum - pre) / (post - pre)``.

    Attributes
    ----------
    pre, post : (2,) array
        Level at the edge and slope per eV.
    jump : float
        ``post - pre`` at the edge, unit of the spectrum.
    """

    pre: FloatArray
    post: FloatArray
    edge_ev: float

    @property
    def jump(self) -> float:
        """Edge jump at the tabulated edge, unit of the spectrum."""
        return float(self.post[0] - self.pre[0])

    def __call__(self, energy_ev: npt.ArrayLike, spectrum: npt.ArrayLike) -> FloatArray:
        """Return the normalised spectrum: 0 below, 1 above the edge."""
        x = np.asarray(energy_ev, dtype=float) - self.edge_ev
        low = self.pre[0] + self.pre[1] * x
        high = self.post[0] + self.post[1] * x
        return np.asarray((np.asarray(spectrum) - low) / (high - low))


def normalisation(energy_ev: npt.ArrayLike, spectrum: npt.ArrayLike, edge_ev: float) -> Normalisation | None:
    """Fit the lines below (-200..-20 eV) and above (+60..+300 eV) the edge; a level where there is one energy.

    None where one of the windows holds no energy or there is no jump upwards.
    """
    x = np.asarray(energy_ev, dtype=float) - edge_ev
    y = np.asarray(spectrum, dtype=float)
    lines = []
    for low, high in (PRE_EV, POST_EV):
        use = (x >= low) & (x <= high)
        if not use.any():
            return None
        if np.unique(x[use]).size > 1:
            slope, level = np.polyfit(x[use], y[use], 1)
        else:
            slope, level = 0.0, float(y[use].mean())
        lines.append(np.array([level, slope]))
    result = Normalisation(lines[0], lines[1], edge_ev)
    return result if result.jump > 0 else None


def edge_at_half(energy_ev: npt.ArrayLike, normalised: npt.ArrayLike) -> float:
    """Return the energy at which a normalised spectrum first rises through 0.5, eV; NaN where it does not."""
    e, y = np.asarray(energy_ev, dtype=float), np.asarray(normalised, dtype=float)
    order = np.argsort(e)
    e, y = e[order], y[order]
    above = np.flatnonzero((y[:-1] < 0.5) & (y[1:] >= 0.5))
    if not len(above):
        return float("nan")
    from scipy.interpolate import PchipInterpolator
    from scipy.optimize import brentq

    unique = np.concatenate([[True], np.diff(e) > 0])
    curve = PchipInterpolator(e[unique], y[unique])
    k = int(above[0])
    if curve(e[k]) >= 0.5 or curve(e[k + 1]) < 0.5:
        return float(e[k])
    return float(brentq(lambda v: float(curve(v)) - 0.5, e[k], e[k + 1]))


@dataclass(frozen=True)
class EdgeShift:
    """The shift of a spectrum against a mean spectrum, as the ratio of two numbers linear in the spectrum.

    Attributes
    ----------
    numerator, denominator : (energies,) arrays
        Weights; the denominator of the mean spectrum itself is 1.
    ratio_at, shift_at : (m,) arrays
        What the ratio is for shifts of the mean spectrum by `shift_at` eV, increasing.
    """

    numerator: FloatArray
    denominator: FloatArray
    ratio_at: FloatArray
    shift_at: FloatArray

    def shift(self, numerator: npt.NDArray[Any], denominator: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the shift in eV; NaN where the denominator is not positive."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(denominator > 0, numerator / denominator, np.nan)
        return np.interp(ratio, self.ratio_at, self.shift_at).astype(np.asarray(ratio).dtype)

    def slope(self, ratio: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return d shift / d ratio at `ratio`, to carry errors with; beyond the calibrated reach, that at its end."""
        middle = 0.5 * (self.ratio_at[1:] + self.ratio_at[:-1])
        each = np.diff(self.shift_at) / np.diff(self.ratio_at)
        found = np.interp(ratio, middle, each)
        return np.asarray(found, dtype=np.asarray(ratio).dtype)


def edge_shift(
    energy_ev: npt.ArrayLike,
    mean: npt.ArrayLike,
    edge_ev: float,
    *,
    variance: npt.ArrayLike | None = None,
    reach_ev: float = 4.0,
) -> EdgeShift | None:
    """Set up the shift of a spectrum by linear regression on 1, energy, the mean spectrum and its derivative.

    ``y(E) = c0 + c1 E + g (m(E) - s m'(E))``, so that the shift is ``s = (g s) / g``: both are linear in `y`, so they
    can be reconstructed as two components. Since m is not a straight line, shifts beyond a fraction of an eV come out
    too small or too large; the relation is computed for the mean spectrum itself and inverted.

    Parameters
    ----------
    energy_ev : (energies,) array
    mean : (energies,) array
        Mean spectrum of the particle.
    edge_ev : float
        Tabulated edge. Energies from -200 to +300 eV of it are used.
    variance : (energies,) array, optional
        Noise variance at every energy.
    reach_ev : float
        Shifts up to this much are calibrated.

    Returns
    -------
    EdgeShift or None
        None where the energies do not determine it: fewer than four, or no rise in the mean spectrum. With four, the
        slope c1 is left out.
    """
    from scipy.interpolate import CubicHermiteSpline

    e, m = np.asarray(energy_ev, dtype=float), np.asarray(mean, dtype=float)
    use = (e >= edge_ev + PRE_EV[0]) & (e <= edge_ev + POST_EV[1])
    unique = np.unique(e[use])
    if len(unique) < 4:
        return None
    level = np.array([m[use & (e == u)].mean() for u in unique])
    # Slopes of the parabola through three points: a monotone interpolation flattens the rise between energies a few
    # eV apart, which makes shifts come out up to 17 % too large.
    curve = CubicHermiteSpline(unique, level, np.gradient(level, unique))
    slope = curve.derivative()
    x = (e - edge_ev) / 100.0
    design = np.stack([m, -slope(e), np.ones_like(e), x], axis=1)[:, : 4 if len(unique) > 4 else 3]
    weight = np.where(use, 1.0 if variance is None else 1.0 / np.asarray(variance, dtype=float), 0.0)
    normal = design.T @ (weight[:, None] * design)
    size = np.sqrt(np.diag(normal))
    if not np.all(size > 0) or np.linalg.cond(normal / size[:, None] / size) > 1e8:
        return None
    solve = np.linalg.solve(normal, design.T * weight)
    shift = np.linspace(-reach_ev, reach_ev, 161)
    inside = np.clip(e[:, None] - shift[None, :], unique[0], unique[-1])
    seen = curve(inside) + np.where(
        e[:, None] - shift < unique[0],
        slope(unique[0]) * (e[:, None] - shift - unique[0]),
        np.where(e[:, None] - shift > unique[-1], slope(unique[-1]) * (e[:, None] - shift - unique[-1]), 0.0),
    )
    ratio = (solve[1] @ seen) / (solve[0] @ seen)
    middle = len(shift) // 2
    low = high = middle
    while high + 1 < len(shift) and ratio[high + 1] > ratio[high]:
        high += 1
    while low > 0 and ratio[low - 1] < ratio[low]:
        low -= 1
    if high - low < 4:
        return None
    return EdgeShift(solve[1], solve[0], ratio[low : high + 1], shift[low : high + 1])
