"""XANES spectra: normalisation, edge position, and the shift of a spectrum as two linear measurements.

Energies are in eV; spectra are attenuation in any unit, energy along the first axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .model import FloatArray

__all__ = [
    "MEASURES",
    "NOISE_WARNING",
    "EdgeMeasures",
    "EdgeShift",
    "Measured",
    "Normalisation",
    "edge_at_half",
    "edge_measures",
    "edge_shift",
    "normalisation",
]

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


def normalisation(
    energy_ev: npt.ArrayLike,
    spectrum: npt.ArrayLike,
    edge_ev: float,
    *,
    pre_ev: tuple[float, float] = PRE_EV,
    post_ev: tuple[float, float] = POST_EV,
) -> Normalisation | None:
    """Fit the lines below and above the edge, in windows of eV from it; a level where there is one energy.

    None where one of the windows holds no energy or there is no jump upwards.
    """
    x = np.asarray(energy_ev, dtype=float) - edge_ev
    y = np.asarray(spectrum, dtype=float)
    lines = []
    for low, high in (pre_ev, post_ev):
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

    def shift(
        self, numerator: npt.NDArray[Any], denominator: npt.NDArray[Any], *, above: float = 0.0
    ) -> npt.NDArray[Any]:
        """Return the shift in eV; NaN where the denominator is not larger than `above`."""
        there = denominator > above
        out = np.full(there.shape, np.nan, dtype=np.result_type(numerator, denominator))
        out[there] = np.interp(numerator[there] / denominator[there], self.ratio_at, self.shift_at)
        return out

    def measure(
        self, spectra: npt.ArrayLike, *, variance: npt.ArrayLike | None = None
    ) -> tuple[Measured, npt.NDArray[Any]]:
        """Measure many spectra: their shift in eV with its standard error, and their level (the mean spectrum's is 1).

        Parameters
        ----------
        spectra : (energies, spectra) array
            float32 stays float32.
        variance : (energies,) or (energies, spectra) array, optional
            Noise variance of every value.
        """
        y = np.asarray(spectra)
        y = y if y.dtype == np.float32 else y.astype(float)
        weights = np.stack([self.numerator, self.denominator]).astype(y.dtype)
        with np.errstate(divide="ignore", invalid="ignore"):
            top, level = weights @ y
            ratio = np.where(level > 0, top / level, np.nan)
            value = np.interp(ratio, self.ratio_at, self.shift_at).astype(y.dtype)
            if variance is None:
                return Measured(value, np.full_like(value, np.nan)), level
            # d ratio = (d top - ratio d level) / level, and the three sums over the energies are shared.
            square = np.asarray(variance).astype(y.dtype)
            a, b = weights
            aa, ab, bb = (np.stack([a * a, a * b, b * b]) @ (square[:, None] if square.ndim == 1 else square))[:, :]
            sigma = np.sqrt(aa - 2 * ratio * ab + ratio * ratio * bb) * self.slope(ratio) / level
        return Measured(value, np.asarray(sigma, dtype=y.dtype)), level

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


# --------------------------------------------------------------------------------------- measures of many spectra

NOISE_WARNING = 0.06  # noise of one energy over the edge jump, beyond which crossings and maxima are biased
INTEGRAL_EV = (-15.0, 30.0)
WHITE_LINE_HALF_EV = 6.0  # half widths of the cubics through the white line and the rise
STEEPEST_HALF_EV = 5.0
_REACH_EV = 15.0  # how far from the mean spectrum's a feature is followed
_BLOCK = 1 << 13  # spectra at once, so that the derivatives by every energy stay small
SMOOTH_EV = 3.0  # half width of the parabolas that a densely measured edge is smoothed with
MEASURES: Mapping[str, tuple[str, str]] = {
    "edge_energy_half": ("eV", "E(0.5): energy at which the normalised edge rises through 0.5"),
    "edge_energy_50": ("eV", "E50: energy at which the edge rises through half the height of the fitted white line"),
    "edge_energy_derivative": (
        "eV",
        "derivative maximum: energy at which the edge rises most steeply, inflection of a cubic through it",
    ),
    "edge_energy_integral": ("eV", "edge as the integral of what the normalised spectrum lacks to 1"),
    "white_line": ("eV", "energy of the white line: maximum of a cubic through it"),
    "white_line_height": ("", "normalised height of the white line: maximum of a cubic through it"),
}


@dataclass(frozen=True)
class Measured:
    """One number of every spectrum and its standard errors, (spectra,) arrays, NaN where there is none.

    `sigma` carries the `variance` of every energy to first order, `sigma_aligned` the variance given as `aligned`; NaN
    where none was given.
    """

    value: FloatArray
    sigma: FloatArray
    sigma_aligned: FloatArray | None = None


@dataclass(frozen=True)
class EdgeMeasures:
    """Measures of an edge that are not linear in the spectrum; made by `edge_measures`.

    Every one is taken from the spectrum normalised as ``(y - pre) / (post - pre)``. The lines are linear in the
    spectrum: ``pre = pre_shape @ pre_weights @ y`` and ``post - pre = step_shape @ step_weights @ y``.

    Attributes
    ----------
    energy_ev : (distinct,) array
        Increasing; spectra are averaged onto it with `average`, (distinct, energies).
    edge_ev : float
        Tabulated edge.
    mean : (distinct,) array
        Normalised mean spectrum.
    half_ev, white_line_ev, steepest_ev : float
        Where the mean spectrum has them; a voxel's are looked for around there. NaN where it has none.
    absent : dict of str to str
        Measures that these energies cannot give, with the reason.
    description : str
        The normalisation with its windows, for metadata.
    """

    energy_ev: FloatArray
    edge_ev: float
    average: FloatArray
    pre_shape: FloatArray
    pre_weights: FloatArray
    step_shape: FloatArray
    step_weights: FloatArray
    mean: FloatArray
    half_ev: float
    white_line_ev: float
    steepest_ev: float
    absent: Mapping[str, str]
    description: str

    def normalised(self, spectra: npt.ArrayLike) -> FloatArray:
        """Return (distinct, spectra) normalised spectra of (energies, spectra); NaN where there is no step upwards."""
        return self._normalised(self.average @ np.asarray(spectra, dtype=float))[0]

    def _normalised(self, y: FloatArray) -> tuple[FloatArray, FloatArray]:
        step = self.step_shape @ (self.step_weights @ y)
        step = np.where(step > 0, step, np.nan)
        return (y - self.pre_shape @ (self.pre_weights @ y)) / step, step

    def measure(
        self,
        names: Sequence[str],
        spectra: npt.ArrayLike,
        *,
        variance: npt.ArrayLike | None = None,
        aligned: npt.ArrayLike | None = None,
    ) -> dict[str, Measured]:
        """Measure many spectra.

        Parameters
        ----------
        names : sequence of str
            Keys of `MEASURES` that are not `absent`.
        spectra : (energies, spectra) array
            Attenuation in any unit, in the order of the energies given to `edge_measures`.
        variance : (energies,) or (energies, spectra) array, optional
            Noise variance of every value.
        aligned : (energies,) or (energies, spectra) array, optional
            Another variance, carried apart: what the alignment is uncertain by.

        Returns
        -------
        dict of str to Measured
            NaN where a spectrum has no such thing: a value that is not finite, no step upwards, no crossing.
        """
        data = np.asarray(spectra)
        given = [None if v is None else np.asarray(v) for v in (variance, aligned)]
        noises = [v[:, None] if v is not None and v.ndim == 1 else v for v in given]
        count = data.shape[1]
        out = {name: Measured(*np.full((3, count), np.nan)) for name in names}
        for first in range(0, count, _BLOCK):
            some = slice(first, first + _BLOCK)
            squares = [
                None if v is None else self.average**2 @ (v if v.shape[1] == 1 else v[:, some]).astype(float)
                for v in noises
            ]
            for name, found in self._measure(names, data[:, some].astype(float), squares).items():
                for into, values in zip(
                    (out[name].value, out[name].sigma, out[name].sigma_aligned), found, strict=True
                ):
                    assert into is not None
                    into[some] = values
        return out

    def _measure(
        self, names: Sequence[str], spectra: FloatArray, squares: Sequence[FloatArray | None]
    ) -> dict[str, tuple[FloatArray, FloatArray, FloatArray]]:
        y = np.where(np.isfinite(spectra).all(axis=0), spectra, np.nan)
        out = {}
        peaks: tuple[FloatArray, FloatArray, FloatArray, FloatArray] | None = None
        with np.errstate(invalid="ignore", divide="ignore"):
            n, step = self._normalised(self.average @ y)
            for name in names:
                if name in ("white_line", "white_line_height", "edge_energy_50"):
                    peaks = self._white_line(n) if peaks is None else peaks
                    at, height, q_at, q_height = peaks
                    value, q = (at, q_at) if name == "white_line" else (height, q_height)
                    if name == "edge_energy_50":
                        value, q = self._crossing(n, 0.5 * height, 0.5 * q_height)
                elif name == "edge_energy_half":
                    value, q = self._crossing(n, np.full(n.shape[1], 0.5), None)
                elif name == "edge_energy_derivative":
                    value, q = self._steepest(n)
                else:
                    weights = _trapezoid(self.energy_ev, *(self.edge_ev + v for v in INTEGRAL_EV))
                    value = self.edge_ev + INTEGRAL_EV[1] - weights @ n
                    q = np.broadcast_to(-weights[:, None], n.shape)
                sigmas = np.full((2, len(value)), np.nan)
                if any(v is not None for v in squares):
                    # d n_i = (d y_i - d pre_i - n_i d step_i) / step_i, summed with the weights q_i of the measure.
                    each = q / step
                    part = each - self.pre_weights.T @ (self.pre_shape.T @ each)
                    part -= self.step_weights.T @ (self.step_shape.T @ (each * n))
                    for k, square in enumerate(squares):
                        if square is not None:
                            sigmas[k] = np.where(np.isfinite(value), np.sqrt(np.sum(part**2 * square, axis=0)), np.nan)
                out[name] = (value, sigmas[0], sigmas[1])
        return out

    def _crossing(self, n: FloatArray, level: FloatArray, q_level: FloatArray | None) -> tuple[FloatArray, FloatArray]:
        """Rise through `level` that lies next to that of the mean spectrum: energy, and its derivatives by `n`."""
        e = self.energy_ev
        near = np.flatnonzero((e[:-1] >= self.edge_ev - 20) & (e[:-1] <= self.edge_ev + 60))
        curve = _smooth_matrix(e)
        slopes = _slope_matrix(e) @ curve
        y = curve @ n
        rises = (y[near] < level) & (y[near + 1] >= level)
        # Between energies several eV apart the straight line says which rise is meant well enough.
        share = np.clip((level - y[near]) / (y[near + 1] - y[near]), 0, 1)
        distance = np.where(rises, np.abs(e[near, None] + share * np.diff(e)[near, None] - self.half_ev), np.inf)
        k = near[np.argmin(distance, axis=0)]
        found = rises.any(axis=0)
        column = np.arange(n.shape[1])
        d = slopes @ n
        h = e[k + 1] - e[k]
        a, b, da, db = y[k, column], y[k + 1, column], h * d[k, column], h * d[k + 1, column]
        low, high = np.zeros(len(k)), np.ones(len(k))
        for _ in range(30):
            t = 0.5 * (low + high)
            below = _hermite(t, a, b, da, db) < level
            low, high = np.where(below, t, low), np.where(below, high, t)
        t = 0.5 * (low + high)
        slope = (
            6 * t * (t - 1) * (a - b) + (3 * t * t - 4 * t + 1) * da + (3 * t * t - 2 * t) * db
        ) / h  # of the curve, per eV
        slope = np.where(slope > 0, slope, np.nan)
        q = h * t * (1 - t) ** 2 * slopes[k].T + h * t * t * (t - 1) * slopes[k + 1].T
        q += (1 + 2 * t) * (1 - t) ** 2 * curve[k].T + t * t * (3 - 2 * t) * curve[k + 1].T
        if q_level is not None:
            q = q - q_level
        return np.where(found, e[k] + t * h, np.nan), -q / slope

    def _cubic(
        self, n: FloatArray, start: float, half_width: float, least: int, place: Callable[[FloatArray], FloatArray]
    ) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        """Fit a cubic about the place it says itself, begun at `start`.

        Returns the place, its offset from the energy that the cubic is about, the coefficients (4, spectra) and
        their weights (4, energies, spectra).
        """
        e = self.energy_ev
        at = np.full(n.shape[1], start)
        c = np.zeros((4, n.shape[1]))
        fit = np.zeros((4, *n.shape))
        for _ in range(3):
            middle = np.argmin(np.abs(e[:, None] - np.where(np.isfinite(at), at, start)), axis=0)
            for k in np.unique(middle):
                mine = middle == k
                weights = _local_cubic(e, float(e[k]), half_width, least)
                c[:, mine] = weights @ n[:, mine]
                fit[:, :, mine] = weights[:, :, None]
            v = place(c)
            at = np.where(np.abs(e[middle] + v - start) <= _REACH_EV, e[middle] + v, np.nan)
        return at, np.where(np.isfinite(at), v, np.nan), c, fit

    def _white_line(self, n: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        """Maximum of a cubic: energy, height, derivatives of both by `n`."""

        def maximum(c: FloatArray) -> FloatArray:
            root = c[2] ** 2 - 3 * c[1] * c[3]  # the solution in the form that stays exact for a parabola
            v = np.where(root > 0, -c[1] / (c[2] - np.sqrt(root)), np.nan)
            return np.asarray(np.where(2 * c[2] + 6 * c[3] * v < 0, v, np.nan))

        at, v, c, fit = self._cubic(n, self.white_line_ev, WHITE_LINE_HALF_EV, 4, maximum)
        height = c[0] + v * (c[1] + v * (c[2] + v * c[3]))
        q_height = fit[0] + v * (fit[1] + v * (fit[2] + v * fit[3]))
        return at, height, -(fit[1] + v * (2 * fit[2] + 3 * v * fit[3])) / (2 * c[2] + 6 * c[3] * v), q_height

    def _steepest(self, n: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Inflection of a cubic: energy, derivatives by `n`."""

        def inflection(c: FloatArray) -> FloatArray:
            v = -c[2] / (3 * c[3])
            return np.asarray(np.where((c[3] < 0) & (c[1] + v * (2 * c[2] + 3 * v * c[3]) > 0), v, np.nan))

        at, v, c, fit = self._cubic(n, self.steepest_ev, STEEPEST_HALF_EV, 6, inflection)
        return at, -(fit[2] + 3 * v * fit[3]) / (3 * c[3])


def edge_measures(
    energy_ev: npt.ArrayLike,
    mean: npt.ArrayLike,
    edge_ev: float,
    *,
    pre_ev: tuple[float, float] = PRE_EV,
    post_ev: tuple[float, float] = POST_EV,
    free_slopes: bool = False,
) -> EdgeMeasures | str:
    """Set up E(0.5), E50, the steepest rise, the white line and the edge integral of many spectra.

    Parameters
    ----------
    energy_ev : (energies,) array
    mean : (energies,) array
        Mean spectrum of the particle: its lines give the slopes, its features say where those of a voxel are.
    edge_ev : float
        Tabulated edge.
    pre_ev, post_ev : (float, float)
        Windows of the straight lines below and above the edge, eV from it.
    free_slopes : bool
        Fit both slopes to every spectrum. By default only the levels are: the pre-edge line has the slope of the
        mean's relative to its level, the jump above it the mean's relative to its jump.

    Returns
    -------
    EdgeMeasures or str
        The reason why there are none: a window without energies, no jump upwards in the mean.
    """
    given, y = np.asarray(energy_ev, dtype=float), np.asarray(mean, dtype=float)
    e, place = np.unique(given, return_inverse=True)
    average = np.zeros((len(e), len(given)))
    average[place, np.arange(len(given))] = 1
    average /= average.sum(axis=1, keepdims=True)
    m = average @ y
    x = e - edge_ev
    windows = [(x >= low) & (x <= high) for low, high in (pre_ev, post_ev)]
    for which, use, span in zip(("below", "above"), windows, (pre_ev, post_ev), strict=True):
        if not use.any():
            return f"no energy {which} the edge, from {edge_ev + span[0]:g} to {edge_ev + span[1]:g} eV"
    if not np.isfinite(m).all():
        return "the mean spectrum is not finite at every energy"
    ones = np.stack([np.ones_like(x), x], axis=1)
    pre, post = (_line_weights(x, use) for use in windows)
    (level, slope), (top, top_slope) = pre @ m, post @ m
    jump = top - level
    if not jump > 0:
        return "the mean spectrum does not rise across the edge"
    if free_slopes:
        shapes = ones, pre, ones, post - pre
    else:
        low = 1 + (slope / level if level > 0.02 * jump else 0.0) * x
        rise = 1 + (top_slope - slope) / jump * x
        by_low = np.where(windows[0], low, 0)
        by_low /= by_low @ low
        by_rise = np.where(windows[1], rise, 0)
        by_rise /= by_rise @ rise
        shapes = low[:, None], by_low[None], rise[:, None], (by_rise - (by_rise @ low) * by_low)[None]
    text = (
        f"straight lines, pre-edge {edge_ev + pre_ev[0]:g}..{edge_ev + pre_ev[1]:g} eV, "
        f"post-edge {edge_ev + post_ev[0]:g}..{edge_ev + post_ev[1]:g} eV, "
        + ("slopes fitted to every voxel" if free_slopes else "slopes of the particle's mean spectrum")
    )
    setup = EdgeMeasures(e, edge_ev, average, *shapes, m, np.nan, np.nan, np.nan, {}, text)
    n = setup._normalised(m[:, None])[0][:, 0]
    absent: dict[str, str] = {}
    half = edge_at_half(e[np.abs(x) < 100], n[np.abs(x) < 100])
    rise_count = int(np.sum((x >= -20) & (x <= 60)))
    if not np.isfinite(half):
        absent |= dict.fromkeys(
            ("edge_energy_half", "edge_energy_50"),
            "no two energies near the edge lie on either side of the mean spectrum's E(0.5)",
        )
    # The white line: highest energy of the mean within 40 eV of the edge, with others on either side.
    near = np.flatnonzero((x >= 0) & (x <= 40))
    peak = int(near[np.argmax(n[near])]) if len(near) else -1
    if len(near) < 3 or peak in (near[0], near[-1]) or n[peak] <= 1:
        why = "the mean spectrum has no maximum above the edge between two energies within 40 eV of it"
        absent |= {name: why for name in ("white_line", "white_line_height", "edge_energy_50") if name not in absent}
        white = np.nan
    else:
        white = float(e[peak])
    d = _slope_matrix(e) @ _smooth_matrix(e) @ n if len(e) >= 3 else np.zeros_like(n)
    inner = np.flatnonzero((x >= -20) & (x <= 60))
    steep = int(inner[np.argmax(d[inner])]) if len(inner) else -1
    if rise_count < 4 or not 0 < steep < len(e) - 1:
        absent["edge_energy_derivative"] = "fewer than four energies from 20 eV below to 60 eV above the edge"
    if rise_count < 3 or e[0] > edge_ev + INTEGRAL_EV[0] or e[-1] < edge_ev + INTEGRAL_EV[1]:
        absent["edge_energy_integral"] = (
            f"the energies do not reach from {edge_ev + INTEGRAL_EV[0]:g} to {edge_ev + INTEGRAL_EV[1]:g} eV"
        )
    setup = replace(setup, mean=n, half_ev=half, steepest_ev=float(e[steep]), white_line_ev=white, absent=absent)
    if np.isfinite(white):
        with np.errstate(invalid="ignore", divide="ignore"):
            found = setup._white_line(n[:, None])[0][0]
        setup = replace(setup, white_line_ev=float(found) if np.isfinite(found) else white)
    if "edge_energy_derivative" not in absent:
        with np.errstate(invalid="ignore", divide="ignore"):
            found = setup._steepest(n[:, None])[0][0]
        setup = replace(setup, steepest_ev=float(found) if np.isfinite(found) else setup.steepest_ev)
    return setup


def _line_weights(x: FloatArray, use: npt.NDArray[np.bool_]) -> FloatArray:
    """(2, energies) weights of a line's level at x = 0 and slope; slope 0 where there is one energy."""
    out = np.zeros((2, len(x)))
    if np.unique(x[use]).size > 1:
        out[:, use] = np.linalg.pinv(np.stack([np.ones(use.sum()), x[use]], axis=1))
    else:
        out[0, use] = 1 / use.sum()
    return out


def _slope_matrix(e: FloatArray) -> FloatArray:
    """(energies, energies) weights of the slope of the parabola through an energy and its neighbours."""
    return np.asarray(np.gradient(np.eye(len(e)), e, axis=0))


def _local_cubic(e: FloatArray, at: float, half_width: float, least: int) -> FloatArray:
    """(4, energies) weights of a cubic about `at` through what lies within `half_width`, at least `least` energies.

    A parabola where these are fewer than six.
    """
    order = np.argsort(np.abs(e - at), kind="stable")
    count = max(min(least, len(e)), int(np.sum(np.abs(e - at) <= half_width)))
    use = order[:count]
    out = np.zeros((4, len(e)))
    terms = 4 if count >= 6 else 3
    out[:terms, use] = np.linalg.pinv(np.stack([(e[use] - at) ** k for k in range(terms)], axis=1))
    return out


def _smooth_matrix(e: FloatArray) -> FloatArray:
    """(energies, energies) weights that replace a value by that of the parabola through all within 3 eV of it.

    Where these are three energies or fewer, and at the ends, a value stays what it is.
    """
    out = np.eye(len(e))
    for k in range(1, len(e) - 1):
        use = np.flatnonzero(np.abs(e - e[k]) <= SMOOTH_EV)
        if len(use) > 3:
            x = e[use] - e[k]
            out[k] = 0
            out[k, use] = np.linalg.pinv(np.stack([np.ones_like(x), x, x**2], axis=1))[0]
    return out


def _trapezoid(e: FloatArray, low: float, high: float) -> FloatArray:
    """(energies,) weights of the integral from `low` to `high` of what is straight between the energies."""
    grid = np.unique(np.concatenate([[low, high], e[(e > low) & (e < high)]]))
    weight = np.zeros(len(grid))
    weight[1:] += 0.5 * np.diff(grid)
    weight[:-1] += 0.5 * np.diff(grid)
    k = np.clip(np.searchsorted(e, grid, side="right") - 1, 0, len(e) - 2)
    share = (grid - e[k]) / (e[k + 1] - e[k])
    out = np.zeros(len(e))
    np.add.at(out, k, weight * (1 - share))
    np.add.at(out, k + 1, weight * share)
    return out


def _hermite(t: FloatArray, a: FloatArray, b: FloatArray, da: FloatArray, db: FloatArray) -> FloatArray:
    """Cubic on 0..1 with the values a, b and the slopes da, db at its ends."""
    return (1 + 2 * t) * (1 - t) ** 2 * a + t * t * (3 - 2 * t) * b + t * (1 - t) ** 2 * da + t * t * (t - 1) * db
