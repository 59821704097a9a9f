"""The fit of the elements to the attenuation: its columns, and what the particle's mean spectrum says against them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .edges import ELEMENT_RANGE, TABLES, WHITE_LINE_EV, WIDEST_BRACKET, atomic_mass, edge_energy_ev, mass_attenuation
from .model import FloatArray
from .recipe import MapsParameters
from .spectra import POST_EV, PRE_EV

__all__ = [
    "ScannedEdgeFit",
    "UnknownStep",
    "fit_columns",
    "scanned_edge_fit",
    "systematic_terms",
    "unknown_steps",
    "white_lines_of",
]

# Relative error of the mean spectrum from energy to energy (masses, air), as registered twins show it.
MEAN_ERROR = 0.007
_LEAST_STEP = 0.05  # of the mean spectrum, to be an edge
# One standard deviation, relative: of tables where they agree; of a white-line factor that nobody knows, and of one
# that was declared or that the mean spectrum shows.
_TABLE_ERROR = 0.02
_FACTOR_ERROR = {False: 0.10, True: 0.03}


def fit_columns(
    energy_ev: FloatArray, factors: Mapping[str, float], steps_ev: Sequence[float], p: MapsParameters
) -> FloatArray:
    """Return (energies, columns): one of every element, in cm2/g, the smooth remainder, and what it gains at steps.

    Parameters
    ----------
    energy_ev : (energies,) array
    factors : dict of str to float
        White-line factors of the elements, in order.
    steps_ev : sequence of float
        Edges of what is no element of the fit: one more remainder above each.
    p : MapsParameters
    """
    elements = [mass_attenuation(e, energy_ev, table=p.attenuation, white_line=f) for e, f in factors.items()]
    smooth = (energy_ev / energy_ev.mean()) ** -3.0
    return np.stack([*elements, smooth, *(np.where(energy_ev > v, smooth, 0.0) for v in steps_ev)], axis=1)


@dataclass(frozen=True)
class UnknownStep:
    """An edge between two energies that do not bracket it, seen in the mean spectrum.

    Attributes
    ----------
    below_ev, above_ev : float
    part : float
        Its height over the mean spectrum above it.
    candidates : tuple of str
        Elements whose K edges lie there.
    """

    below_ev: float
    above_ev: float
    part: float
    candidates: tuple[str, ...]

    @property
    def edge_ev(self) -> float:
        """Somewhere between the two energies."""
        return (self.below_ev + self.above_ev) / 2

    @property
    def note(self) -> str:
        """One line for the user."""
        return (
            f"the mean spectrum rises by {100 * self.part:.0f} % between {self.below_ev:g} and {self.above_ev:g} eV, "
            f"too far apart to bracket an edge: an element that is there ({', '.join(self.candidates)}?) is not "
            "mapped, and the others are taken on either side of it, not across"
        )


def unknown_steps(
    energy_ev: FloatArray,
    mean: FloatArray,
    use: npt.NDArray[np.bool_],
    elements: Sequence[str],
    steps_ev: Sequence[float],
    p: MapsParameters,
) -> tuple[UnknownStep, ...]:
    """Find edges in the mean spectrum that the fit of the elements does not know.

    Between two energies that lie too far apart to bracket an edge there may be one. Without it, what it adds would be
    taken for the elements that are fitted: cobalt three times too high where nickel has no energy before its edge. An
    edge is one where a step improves the fit of the mean spectrum most, is positive, and has 5 % of the spectrum and
    three standard errors.

    Parameters
    ----------
    energy_ev, mean : (energies,) arrays
    use : (energies,) array
        Energies that count for the elements.
    elements : sequence of str
        All in the fit.
    steps_ev : sequence of float
        Edges that are known to be there without being bracketed.
    p : MapsParameters
    """
    e = np.unique(energy_ev[use])
    if not np.all(mean[use] > 0):
        return ()
    gaps = []
    for low, high in itertools.pairwise(e.tolist()):
        inside = tuple(n for n in ELEMENT_RANGE if low < edge_energy_ev(n) < high and n not in elements)
        wide = [n for n in inside if high - low > WIDEST_BRACKET * edge_energy_ev(n)]
        if wide and not any(low < v < high for v in steps_ev):
            gaps.append((low, high, inside))
    factors = {n: p.white_line(n) for n in elements}
    x, relative = energy_ev[use], 1 / mean[use]
    found: list[UnknownStep] = []
    while gaps:
        known = (*steps_ev, *(s.edge_ev for s in found))
        if len(e) < len(elements) + 1 + len(known) + 1:
            break
        best: tuple[float, UnknownStep] | None = None
        for low, high, inside in gaps:
            design = fit_columns(energy_ev, factors, (*known, (low + high) / 2), p)[use] * relative[:, None]
            size = np.sqrt(np.sum(design**2, axis=0))
            if not np.all(size > 0) or np.linalg.cond(design / size) > 1e4:
                continue
            row = np.linalg.pinv(design / size)[-1] / size[-1]
            height = float(row.sum())  # relative values of the mean are 1
            sigma = MEAN_ERROR * float(np.sqrt(np.sum(row**2)))
            part = height * float(design[x == high, -1].mean())
            if height > 3 * sigma and part > _LEAST_STEP and (best is None or height / sigma > best[0]):
                best = height / sigma, UnknownStep(low, high, part, inside)
        if best is None:
            break
        found.append(best[1])
        gaps = [g for g in gaps if g[0] != best[1].below_ev]
    return tuple(found)


@dataclass(frozen=True)
class ScannedEdgeFit:
    """Weights of the elements that use the energies in the scanned edge as well.

    An edge that is broader than the particle's by a variance of 2 c (eV2) adds c times the curvature of the mean
    spectrum. Fitting c in every voxel costs noise, taking it as 0 costs a bias. With c known to scatter by `spread`
    from voxel to voxel and measured with the standard error `noise`, the least error is in between: a part
    ``spread2 / (spread2 + noise2)`` of what is measured.

    Attributes
    ----------
    free : dict of str to (energies,) array
        Of the elements, with c fitted.
    width : (energies,) array
        Weights that give c, eV2, times the amount of the scanned element over its mean.
    per_ev2 : dict of str to float
        What the elements gain with c, per eV2, where it is taken as 0.
    """

    free: Mapping[str, FloatArray]
    width: FloatArray
    per_ev2: Mapping[str, float]

    def weights(self, kept: float = 1.0) -> dict[str, FloatArray]:
        """Return the weights of the elements where the part `kept` of the measured c counts."""
        return {e: w + (1 - kept) * self.per_ev2[e] * self.width for e, w in self.free.items()}

    def weighted(self, factor: FloatArray) -> ScannedEdgeFit:
        """Return the same for line integrals that still have to be multiplied by `factor` (energies,)."""
        return replace(self, free={e: w * factor for e, w in self.free.items()}, width=self.width * factor)

    def error(self, amounts: Mapping[str, float], kept: float, spread: float) -> dict[str, float]:
        """Return {map: relative error} that is left of a c of `spread`, of amounts, their sum and their fractions."""
        left = {e: (1 - kept) * spread * v for e, v in self.per_ev2.items()}
        moles, more = ({e: v[e] / atomic_mass(e) for e in left} for v in (amounts, left))
        change = sum(more.values()) / sum(moles.values())
        return {
            **{e: abs(v / amounts[e]) for e, v in left.items()},
            "density": abs(sum(left.values()) / sum(amounts[e] for e in left)),
            **{f"{e}_fraction": abs(more[e] / moles[e] - change) for e in left},
        }


def scanned_edge_fit(
    energy: FloatArray,
    mean: FloatArray,
    noise: FloatArray,
    use: npt.NDArray[np.bool_],
    table: FloatArray,
    elements: Sequence[str],
    scanned: str,
    amounts: FloatArray,
) -> ScannedEdgeFit | None:
    """Fit the elements to all energies; None where there are too few in the scanned edge.

    In it the column of the scanned element is what the mean spectrum has of it, and two more columns, the mean's slope
    and curvature over the energy, take up an edge that moves or broadens.

    Parameters
    ----------
    energy, mean, noise : (energies,) arrays
        `noise` is the relative variance.
    use : (energies,) array
        Energies that count for the elements by the table.
    table : (energies, columns) array
        See `fit_columns`; the first columns are those of `elements`.
    elements : sequence of str
    scanned : str
        One of them.
    amounts : (columns,) array
        Of the mean spectrum.
    """
    more = _with_scanned_edge(energy, mean, use, table, list(elements).index(scanned), amounts, edge_energy_ev(scanned))
    if more is None:
        return None

    def solved(columns: FloatArray) -> FloatArray:
        scaled = columns / (size := np.sqrt(np.sum(columns**2 / noise[:, None], axis=0)))
        found = np.linalg.solve(scaled.T @ (scaled / noise[:, None]), scaled.T / noise)
        return np.asarray(found / size[:, None])

    free, fixed = solved(more), solved(more[:, :-1]) @ more[:, -1]
    return ScannedEdgeFit(
        {e: free[i] for i, e in enumerate(elements)},
        free[-1],
        {e: float(fixed[i]) for i, e in enumerate(elements)},
    )


def _with_scanned_edge(
    energy: FloatArray,
    mean: FloatArray,
    use: npt.NDArray[np.bool_],
    table: FloatArray,
    k: int,
    amounts: FloatArray,
    edge_ev: float,
) -> FloatArray | None:
    """Complete the columns of the element fit at the energies of the scanned edge; `k` is the scanned element's."""
    from scipy.interpolate import CubicSpline

    near = (energy >= edge_ev + PRE_EV[0]) & (energy <= edge_ev + POST_EV[1])
    order = np.flatnonzero(near)[np.argsort(energy[near])]
    if amounts[k] <= 0 or np.sum(~use) < 4 or np.any(np.diff(energy[order]) <= 0):
        return None
    out = np.concatenate([table, np.zeros((len(energy), 2))], axis=1)
    others = [j for j in range(table.shape[1]) if j != k]
    out[~use, k] = ((mean - table[:, others] @ amounts[others]) / amounts[k])[~use]
    # Differences over 2 and 4 eV, on a spline: energies that lie further apart than that would flatten them (curvature
    # 1.8 times too low at 3 to 4 eV), closer ones would fill them with the errors of the mean spectrum.
    at, value = energy[order], mean[order]
    spline = CubicSpline(at, value, bc_type="natural")
    out[order, -2] = (spline(at + 1) - spline(at - 1)) / 2
    out[order, -1] = (spline(at + 2) + spline(at - 2) - 2 * value) / 4
    out[use, -2:] = 0
    return out


def white_lines_of(
    energy_ev: FloatArray,
    mean: FloatArray,
    use: npt.NDArray[np.bool_],
    elements: Sequence[str],
    steps_ev: Sequence[float],
    p: MapsParameters,
) -> dict[str, tuple[float, float]]:
    """Find the white-line factors that the mean spectrum demands: {element: (factor, standard error)}.

    Elements and remainder are fitted to the energies outside every white line, where the table holds; what the energies
    on the white line have beyond that is the factor. Only those that part from 1 by more than three standard errors
    and 5 % are returned: an error of the white line is one number for the whole particle, but in a fit of all energies
    it spreads over all elements.

    Parameters
    ----------
    energy_ev, mean : (energies,) arrays
    use : (energies,) array
        Energies that count for the elements.
    elements : sequence of str
        All in the fit; those with a declared factor keep it.
    steps_ev : sequence of float
        Edges in the remainder, see `fit_columns`.
    p : MapsParameters
    """
    x = {e: energy_ev - edge_energy_ev(e) for e in elements}
    on = {e: use & (x[e] > 0) & (x[e] <= WHITE_LINE_EV) for e in elements if p.declared_white_line(e) is None}
    on = {e: line for e, line in on.items() if line.any()}
    if not on:
        return {}
    outside = use & ~np.any(list(on.values()), axis=0)
    if len(np.unique(energy_ev[outside])) < len(elements) + len(steps_ev) + 1 or not np.all(mean[use] > 0):
        return {}
    design = fit_columns(energy_ev, {e: p.white_line(e) for e in elements}, steps_ev, p)
    weighted = np.where(outside[:, None], design / mean[:, None], 0)  # errors of the mean spectrum are relative
    size = np.sqrt(np.sum(weighted**2, axis=0))
    if not np.all(size > 0) or np.linalg.cond(weighted / size) > 1e4:
        return {}
    solve = np.linalg.pinv(weighted / size) / size[:, None] / mean
    amounts = solve @ mean
    found = {}
    for e, line in on.items():
        k = list(elements).index(e)
        higher = mass_attenuation(e, energy_ev, table=p.attenuation, white_line=2.0)
        step = amounts[k] * (higher - design[:, k])[line].mean()
        if amounts[k] <= 0 or step <= 0:
            continue
        weights = np.where(line, 1 / line.sum(), 0) - design[line].mean(axis=0) @ solve
        factor = float(1 + weights @ mean / step)
        # The amount in the denominator is uncertain as well; both are linear in the mean spectrum.
        part = (weights - (factor - 1) * step / amounts[k] * solve[k]) / step
        sigma = MEAN_ERROR * float(np.sqrt(np.sum((part * mean) ** 2)))
        if 0.5 <= factor <= 3 and abs(factor - 1) > max(3 * sigma, 0.05):
            found[e] = (factor, sigma)
    return found


def systematic_terms(
    energy_ev: FloatArray,
    mean: FloatArray,
    weight: FloatArray,
    factors: Mapping[str, float],
    seen: Mapping[str, tuple[float, float]],
    steps_ev: Sequence[float],
    mapped: Sequence[str],
    p: MapsParameters,
) -> dict[str, dict[str, float]]:
    """Return {map: {"attenuation", "white_line": relative error}} of amounts, their sum and their atomic fractions.

    Each is what the mean amounts change by when the fit is repeated with something else: with the other table (2 % at
    least, for tables may agree and be wrong), and with other white-line factors. A factor is known to 3 % where it was
    declared or the mean spectrum shows it, else to 10 %; those of different elements add in quadrature. Where the mean
    spectrum, by either table, shows another factor than the one used, what that changes is in it as a whole.

    Parameters
    ----------
    energy_ev, mean : (energies,) arrays
    weight : (energies,) array
        Of the fit; 0 where an energy does not count.
    factors : dict of str to float
        White-line factors used, of all elements of the fit.
    seen : dict of str to (float, float)
        Those that the mean spectrum shows, with standard errors; see `white_lines_of`.
    steps_ev : sequence of float
        See `fit_columns`.
    mapped : sequence of str
        Elements that are mapped, of those in the fit.
    p : MapsParameters
    """
    near = [
        e for e in factors
        if np.any((weight > 0) & (energy_ev > edge_energy_ev(e)) & (energy_ev <= edge_energy_ev(e) + WHITE_LINE_EV))
    ]  # fmt: skip
    numbers = [list(factors).index(e) for e in mapped]
    mass = np.array([atomic_mass(e) for e in mapped])

    def values(used: Mapping[str, float], table: MapsParameters = p) -> FloatArray:
        """Mean amounts, their sum, their fractions."""
        root = np.sqrt(weight)
        columns = fit_columns(energy_ev, used, steps_ev, table) * root[:, None]
        size = np.maximum(np.sqrt(np.sum(columns**2, axis=0)), 1e-300)
        amounts = (np.linalg.lstsq(columns / size, mean * root, rcond=None)[0] / size)[numbers]
        moles = amounts / mass
        return np.asarray(np.concatenate([amounts, [amounts.sum()], moles / moles.sum()]))

    used = values(factors)

    def change(other: FloatArray) -> FloatArray:
        """Relative to the smaller of the two, at most 1: an element that is not there has no relative error."""
        with np.errstate(divide="ignore", invalid="ignore"):
            least = np.minimum(np.abs(used), np.abs(other))
            return np.asarray(np.minimum(np.nan_to_num(np.abs(other - used) / least, nan=0.0, posinf=1.0), 1.0))

    others = [p.model_copy(update={"attenuation": t}) for t in TABLES if t != p.attenuation]
    table = np.max([np.full(len(used), _TABLE_ERROR), *(change(values(factors, t)) for t in others)], axis=0)
    square = np.zeros(len(used))
    shown = [(p, seen)] + [(t, white_lines_of(energy_ev, mean, weight > 0, list(factors), steps_ev, t)) for t in others]
    for t, found in shown:
        contradicted = {e: factor for e, (factor, _) in found.items() if factor != factors[e]}
        if contradicted:
            square = np.maximum(square, change(values({**factors, **contradicted}, t)) ** 2)
    for e in near:
        error = _FACTOR_ERROR[e in seen or p.declared_white_line(e) is not None]
        if e in seen:
            error = max(error, seen[e][1])
        square = square + change(values({**factors, e: factors[e] * (1 + error)})) ** 2
    names = [*mapped, "density", *(f"{e}_fraction" for e in mapped)]
    return {
        name: {"attenuation": round(float(a), 4), **({"white_line": round(float(w), 4)} if near else {})}
        for name, a, w in zip(names, table, np.sqrt(square), strict=True)
    }
