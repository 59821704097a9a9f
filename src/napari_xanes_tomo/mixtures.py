"""Linear combination of reference spectra: how much of each a spectrum holds, and the valence that follows.

The amounts are linear in the spectrum, so they can be taken from components that were reconstructed on their own.
That no amount is negative, and that the fractions add up to 1, is demanded of the amounts afterwards.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .edges import ReferenceSpectrum
from .model import FloatArray
from .spectra import POST_EV, PRE_EV, normalisation

__all__ = ["LEAST_LEVEL", "LinearCombination", "linear_combination", "non_negative"]

MOST_REFERENCES = 6
NEEDED_EV = (-20.0, 60.0)  # about the edge; here the references must have every energy of the scan
LEAST_LEVEL = 0.2  # edge jump relative to the mean spectrum's below which a ratio says nothing


@dataclass(frozen=True)
class LinearCombination:
    """A fit of reference spectra and a straight line, made by `linear_combination`.

    Attributes
    ----------
    names : tuple of str
    valences : tuple of float or None
        None unless every reference has a declared one.
    weights : (references, energies) array
        Amounts from a spectrum, relative to the edge jump of the mean spectrum.
    information : (references, references) array
        Inverse covariance of the amounts, up to a factor.
    misfit : float
        Sum of the squared residuals of the mean spectrum over that of its normalised values, where it is fitted.
    left_out_ev : tuple of float
        Energies of the edge's window that a reference does not reach.
    """

    names: tuple[str, ...]
    valences: tuple[float, ...] | None
    weights: FloatArray
    information: FloatArray
    misfit: float
    left_out_ev: tuple[float, ...]

    def constrained(self, amounts: npt.ArrayLike) -> FloatArray:
        """Return (references, n) amounts, none negative, that fit the spectra behind the `amounts` best.

        The same as least squares with that constraint on the spectra themselves: what is lost by moving the amounts
        from where they fit best is a quadratic form. With few references every choice of those that are 0 is tried.
        """
        return non_negative(amounts, self.information)

    def fractions(self, amounts: npt.ArrayLike) -> FloatArray:
        """Return (references, n) fractions: not negative, of sum 1; NaN where there is hardly an edge."""
        g = self.constrained(amounts)
        total = g.sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(np.where(total > LEAST_LEVEL, g / total, np.nan))

    def fit(
        self, spectra: npt.ArrayLike, *, variance: npt.ArrayLike | None = None
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Fit (energies, n) spectra: fractions and their standard errors, (references, n), and the level (n,).

        The errors are those of the fractions before the constraint, NaN without a `variance` ((energies,) or
        (energies, n), of every value); the level is the edge jump relative to the mean spectrum's.
        """
        y = np.asarray(spectra, dtype=float)
        with np.errstate(invalid="ignore"):
            amounts = self.weights @ y
        fractions = self.fractions(amounts)
        sigma = np.full(fractions.shape, np.nan)
        total = amounts.sum(axis=0)
        if variance is not None:
            square = np.asarray(variance, dtype=float)
            square = square[:, None] if square.ndim == 1 else square
            with np.errstate(invalid="ignore", divide="ignore"):
                for k in range(len(self.names)):
                    # d f_k = (d g_k - f_k d total) / total, as a weight on every energy
                    part = self.weights[k][:, None] - amounts[k] / total * self.weights.sum(axis=0)[:, None]
                    sigma[k] = np.sqrt(np.sum(part**2 * square, axis=0)) / total
        return fractions, np.where(np.isfinite(fractions), sigma, np.nan), total

    def valence(self, fractions: npt.ArrayLike) -> FloatArray:
        """Return the (n,) mean valence of (references, n) fractions."""
        if self.valences is None:
            raise ValueError("valence: expected a declared valence of every reference")
        return np.asarray(np.asarray(self.valences) @ np.asarray(fractions, dtype=float))


def non_negative(amounts: npt.ArrayLike, information: FloatArray) -> FloatArray:
    """Return the (m, n) amounts, none negative, that fit best where unconstrained least squares gave `amounts`.

    What is lost by moving the amounts from where they fit best is a quadratic form. With few of them every choice of
    those that are 0 is tried.

    Parameters
    ----------
    amounts : (m, n) array
    information : (m, m) array
        Inverse covariance of the amounts, up to a factor.
    """
    best = np.asarray(amounts, dtype=float)
    found = np.full_like(best, np.nan)
    cost = np.full(best.shape[1], np.inf)
    count = len(best)
    s = information
    for size in range(count, 0, -1):
        for free in map(list, itertools.combinations(range(count), size)):
            zero = [k for k in range(count) if k not in free]
            trial = np.zeros_like(best)
            trial[free] = best[free]
            if zero:
                trial[free] += np.linalg.solve(s[np.ix_(free, free)], s[np.ix_(free, zero)]) @ best[zero]
            off = trial - best
            lost = np.sum(off * (s @ off), axis=0)
            better = (trial >= 0).all(axis=0) & (lost < cost)
            found[:, better], cost[better] = trial[:, better], lost[better]
    return found


def linear_combination(
    energy_ev: npt.ArrayLike,
    mean: npt.ArrayLike,
    edge_ev: float,
    references: Sequence[ReferenceSpectrum],
    *,
    variance: npt.ArrayLike | None = None,
    offset_ev: float = 0.0,
    pre_ev: tuple[float, float] = PRE_EV,
    post_ev: tuple[float, float] = POST_EV,
) -> LinearCombination | str:
    """Set up the fit of normalised references, a constant and a slope to many spectra.

    Parameters
    ----------
    energy_ev, mean : (energies,) arrays
        Mean spectrum of the particle: how its jump continues above the edge is taken from it.
    edge_ev : float
        Tabulated edge.
    references : sequence of ReferenceSpectrum
        One to six. Each is normalised with straight lines in the same windows, as far as it reaches.
    variance : (energies,) array, optional
        Noise variance at every energy.
    offset_ev : float
        Added to the energies of the scan to be on the scale of the references.
    pre_ev, post_ev : (float, float)
        Windows of the straight lines, eV from the edge.

    Returns
    -------
    LinearCombination or str
        The reason why there is none.
    """
    e, m = np.asarray(energy_ev, dtype=float), np.asarray(mean, dtype=float)
    if not 1 <= len(references) <= MOST_REFERENCES:
        return f"1 to {MOST_REFERENCES} references can be fitted, {len(references)} are given"
    norm = normalisation(e, m, edge_ev, pre_ev=pre_ev, post_ev=post_ev)
    if norm is None:
        return "the mean spectrum has no levels below and above the edge to be normalised with"
    x = e - edge_ev
    window = (x >= pre_ev[0]) & (x <= post_ev[1])
    use = window.copy()
    columns = []
    for reference in references:
        r = reference.energy_ev
        low, high = float(r[0]) - offset_ev, float(r[-1]) - offset_ev
        beyond = e[(x >= NEEDED_EV[0]) & (x <= NEEDED_EV[1]) & ((e < low) | (e > high))]
        if len(beyond) or not np.any((e >= low) & (e <= high)):
            return (
                f"the reference {reference.name} reaches from {low:g} to {high:g} eV, the edge was scanned from "
                f"{e[window].min():g} to {e[window].max():g} eV"
            )
        own = normalisation(r - offset_ev, reference.absorption, edge_ev, pre_ev=pre_ev, post_ev=post_ev)
        if own is None:
            return (
                f"the reference {reference.name} cannot be normalised: it needs values from {edge_ev + pre_ev[0]:g} to "
                f"{edge_ev + pre_ev[1]:g} and from {edge_ev + post_ev[0]:g} to {edge_ev + post_ev[1]:g} eV, and a rise"
            )
        columns.append(np.interp(e, r - offset_ev, own(r - offset_ev, reference.absorption)))
        use &= (e >= low) & (e <= high)
    rise = norm.post[0] - norm.pre[0] + (norm.post[1] - norm.pre[1]) * x
    design = np.stack([*(c * rise for c in columns), np.ones_like(x), x / 100.0], axis=1)
    count = len(np.unique(e[use]))
    if count < design.shape[1] + 1:
        return f"{count} energies within reach of the references cannot tell {len(references)} of them and a line apart"
    weight = np.where(use, 1.0 if variance is None else 1.0 / np.asarray(variance, dtype=float), 0.0)
    normal = design.T @ (weight[:, None] * design)
    size = np.sqrt(np.diag(normal))
    if not np.all(size > 0) or np.linalg.cond(normal / size[:, None] / size) > 1e8:
        return f"the references {', '.join(r.name for r in references)} cannot be told apart at these energies"
    solve = np.linalg.solve(normal, design.T * weight)
    k = len(references)
    information = np.linalg.inv(np.linalg.inv(normal)[:k, :k])
    rest = (m - design @ (solve @ m))[use] / rise[use]
    valences = [r.valence for r in references]
    return LinearCombination(
        tuple(r.name for r in references),
        None if any(v is None for v in valences) else tuple(float(v) for v in valences if v is not None),
        solve[:k],
        0.5 * (information + information.T),
        float(np.sum(rest**2) / np.sum(norm(e, m)[use] ** 2)),
        tuple(float(v) for v in e[window & ~use]),
    )
