"""What absorbs at every energy: the particle's mean spectrum taken apart by the tabulated attenuation.

The tables are good to a percent or two, away from the edges. That is enough to tell which element the contrast of an
energy is made of, and to see a mass that departs from a smooth law by more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .edges import bracketed_elements, edge_energy_ev, mass_attenuation, scanned_element
from .model import FloatArray

__all__ = ["Contrast", "near_edges", "tabulated", "take_apart"]

# Here the absorption changes within few eV, whatever the table says; farther above an edge that was scanned.
_NEAR_EDGE_EV = (-4.5, 15.0)
_NEAR_SCANNED_EV = 55.0
_REST_POWER = -2.8  # of whatever has no edge among the energies


@dataclass(frozen=True)
class Contrast:
    """The absorption of the particle as a sum of elements.

    Attributes
    ----------
    elements : tuple of str
        Those whose edges the energies bracket.
    share : (energies, elements) array
        Part that each has in the absorption; NaN where the mass is not known.
    expected : (energies,) array
        The absorption by the tables, in the unit of the masses; NaN near edges, and everywhere where there are too few
        energies to contradict the tables.
    parts : (energies, elements + 1) array
        What it is the sum of, the remainder last; NaN near edges.
    """

    elements: tuple[str, ...]
    share: FloatArray
    expected: FloatArray
    parts: FloatArray

    @property
    def away(self) -> npt.NDArray[np.bool_]:
        """(energies,) whether the tables hold there."""
        return np.asarray(np.isfinite(self.parts).all(axis=1))


def tabulated(energies_ev: npt.ArrayLike, elements: tuple[str, ...]) -> FloatArray:
    """Return (energies, elements) mass attenuation, cm2/g; just below an edge without what tables smear over it."""
    energies = np.asarray(energies_ev, dtype=float)
    table = np.zeros((len(energies), len(elements)))
    for k, element in enumerate(elements):
        table[:, k] = mass_attenuation(element, energies)
        edge = edge_energy_ev(element)
        close = (energies < edge) & (energies > edge - 30)
        if close.any():
            table[close, k] = mass_attenuation(element, edge - 30) * (energies[close] / (edge - 30)) ** -2.75
    return table


def near_edges(energies_ev: npt.ArrayLike, elements: tuple[str, ...]) -> npt.NDArray[np.bool_]:
    """Return (energies,) True where an edge, or the structure above one that was scanned, is too near for tables."""
    energies = np.asarray(energies_ev, dtype=float)
    scanned = scanned_element(energies, elements) if elements else None
    near = np.zeros(len(energies), dtype=bool)
    for element in elements:
        above = energies - edge_energy_ev(element)
        near |= (above > _NEAR_EDGE_EV[0]) & (above < _NEAR_EDGE_EV[1])
        about = (above > _NEAR_EDGE_EV[0]) & (above < _NEAR_SCANNED_EV)
        if element == scanned and about.sum() > 2:  # a pair about an edge is no scan of it
            near |= about
    return near


def take_apart(energies_ev: npt.ArrayLike, mass: npt.ArrayLike) -> Contrast:
    """Fit amounts of the bracketed elements, and a remainder, none negative, to the absorption away from the edges.

    Parameters
    ----------
    energies_ev : (energies,) array
    mass : (energies,) array
        Mean absorbance of the particle, any unit; NaN where it is not known.
    """
    from scipy.optimize import nnls

    energies, seen = np.asarray(energies_ev, dtype=float), np.asarray(mass, dtype=float)
    elements = bracketed_elements(energies)
    known = np.isfinite(seen) & (seen > 0)
    near = near_edges(energies, elements)
    scanned = scanned_element(energies, elements) if elements else None
    use = known & ~near
    share = np.full((len(energies), len(elements)), np.nan)
    expected = np.full(len(energies), np.nan)
    away = np.full((len(energies), len(elements) + 1), np.nan)
    if not elements or use.sum() < 2:
        return Contrast(elements, share, expected, away)
    table = tabulated(energies, elements)
    design = np.column_stack([table, (energies / energies.mean()) ** _REST_POWER])
    size = design[use].max(axis=0)
    amounts = nnls(design[use] / size / seen[use, None], np.ones(use.sum()))[0] / size
    parts = design * amounts
    if use.sum() > design.shape[1]:
        expected[use] = parts[use].sum(axis=1)
    share[known] = parts[known, :-1] / parts[known].sum(axis=1, keepdims=True)
    if scanned is not None:
        # On the edge itself the table knows everything but the element whose edge it is.
        k = elements.index(scanned)
        on = known & near & (np.abs(energies - edge_energy_ev(scanned)) < 2 * _NEAR_SCANNED_EV)
        others = np.delete(parts, k, axis=1).sum(axis=1)
        share[on] = parts[on, :-1] / seen[on, None]
        share[on, k] = np.maximum(0.0, 1 - others[on] / seen[on])
    away[use] = parts[use]
    return Contrast(elements, share, expected, away)
