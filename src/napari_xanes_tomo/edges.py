"""Absorption edges and mass attenuation, from the tables that xraydb carries."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from .model import FloatArray, XanesTomoError

__all__ = [
    "ELEMENT_RANGE",
    "WIDEST_BRACKET",
    "ReferenceSpectrum",
    "atomic_mass",
    "bracketed_elements",
    "edge_energy_ev",
    "mass_attenuation",
    "scanned_element",
    "why_not_scanned",
]

# K edges from 4.0 to 20 keV.
ELEMENT_RANGE = (
    *("Ca", "Sc", "Ti", "V", "Cr", "Mn", "Fe", "Co", "Ni", "Cu", "Zn", "Ga"),
    *("Ge", "As", "Se", "Br", "Kr", "Rb", "Sr", "Y", "Zr", "Nb", "Mo"),
)
TABLES = ("elam", "chantler")
WHITE_LINE_EV = 60.0  # above an edge, where its declared white-line factor holds
# Two neighbouring energies bracket an edge when they are no further apart than this part of its energy: the
# wide Ni pair 8178/8570 does (4.7 %), the gap between two pairs, with Fe in it, does not (16 %).
WIDEST_BRACKET = 0.06


@dataclass(frozen=True)
class ReferenceSpectrum:
    """A spectrum of a known compound.

    Attributes
    ----------
    name : str
    energy_ev, absorption : (n,) arrays
        Increasing energies, eV; absorption in any unit.
    valence : float or None
        Declared valence of the scanned element in it.
    source : str
        Where it comes from.
    """

    name: str
    energy_ev: FloatArray
    absorption: FloatArray
    valence: float | None = None
    source: str = ""


@cache
def edge_energy_ev(element: str) -> float:
    """Return the tabulated K edge of `element` in eV (Elam et al. 2002, doi 10.1016/S0969-806X(01)00227-4)."""
    import xraydb  # slow to import, so only where it is needed

    edge = xraydb.xray_edge(element, "K") if element in _symbols() else None
    if edge is None:
        raise XanesTomoError(f"element: expected the symbol of an element with a K edge, got {element!r}")
    return float(edge.energy)


def atomic_mass(element: str) -> float:
    """Return the molar mass of an element, g/mol."""
    import xraydb

    return float(xraydb.atomic_mass(element))


@cache
def _symbols() -> frozenset[str]:
    import xraydb

    return frozenset(xraydb.atomic_symbol(z) for z in range(1, 93))


def mass_attenuation(
    element: str, energy_ev: npt.ArrayLike, *, table: str = "elam", white_line: float = 1.0
) -> FloatArray:
    """Return the total mass attenuation coefficient in cm2/g at every energy (eV), same shape.

    Parameters
    ----------
    element : str
    energy_ev : array
    table : {"elam", "chantler"}
        Elam, Ravel & Sieber 2002, doi 10.1016/S0969-806X(01)00227-4; Chantler 2000, doi 10.1063/1.1321055 (broadened:
        5 eV below an edge it is already up to a fifth higher).
    white_line : float
        Height of the K edge's step, relative to the table, from the edge to 60 eV above it, where the attenuation of a
        compound is not that of the free atom.
    """
    import xraydb

    if element not in _symbols():
        raise XanesTomoError(f"element: expected a chemical symbol, got {element!r}")
    if table not in TABLES:
        raise XanesTomoError(f"attenuation table: expected one of {', '.join(TABLES)}, got {table!r}")
    energy = np.asarray(energy_ev, dtype=float).ravel()

    def total(e: FloatArray) -> FloatArray:
        if table == "elam":
            return np.asarray(xraydb.mu_elam(element, e, kind="total"), dtype=float)
        return np.asarray(xraydb.mu_chantler(element, e), dtype=float)

    out = total(energy)
    if white_line != 1.0:
        e0 = edge_energy_ev(element)
        near = (energy > e0) & (energy <= e0 + WHITE_LINE_EV)
        if near.any():
            below = np.array([e0 - 400.0, e0 - 30.0])
            slope, level = np.polyfit(np.log(below), np.log(total(below)), 1)
            background = np.exp(level + slope * np.log(energy[near]))
            out[near] = background + white_line * (out[near] - background)
    return out.reshape(np.shape(energy_ev))


def bracketed_elements(energies_ev: npt.ArrayLike) -> tuple[str, ...]:
    """Return the elements whose K edge lies between two neighbouring energies that are close enough.

    Close enough means no further apart than 6 % of the edge energy.
    """
    energies = np.unique(np.asarray(energies_ev, dtype=float))
    found = []
    for element in ELEMENT_RANGE:
        edge = edge_energy_ev(element)
        above = int(np.searchsorted(energies, edge))
        if 0 < above < len(energies) and energies[above] - energies[above - 1] <= WIDEST_BRACKET * edge:
            found.append(element)
    return tuple(found)


def scanned_element(energies_ev: npt.ArrayLike, elements: tuple[str, ...]) -> str | None:
    """Return the one of `elements` whose K edge was scanned, None where there is none.

    Scanned means two or more energies from 15 eV below to 60 eV above the edge, and some before (-200..-20 eV) and
    behind it (+60..+300 eV) to measure the rise against; or four or more, a scan that is not complete.
    """
    energies = np.unique(np.asarray(energies_ev, dtype=float))
    counts = []
    for element in elements:
        x = energies - edge_energy_ev(element)
        before, behind = np.any((x >= -200) & (x <= -20)), np.any((x > 60) & (x <= 300))
        count = int(np.sum((x >= -15) & (x <= 60)))
        counts.append(count if (before and behind) or count >= 4 else 0)
    best = int(np.argmax(counts)) if counts else 0
    return elements[best] if counts and counts[best] >= 2 else None


def why_not_scanned(energies_ev: npt.ArrayLike) -> str:
    """Say what the energies lack for an edge to have been scanned, in one line; see `scanned_element`."""
    energies = np.unique(np.asarray(energies_ev, dtype=float))
    for element in ELEMENT_RANGE:
        e0 = edge_energy_ev(element)
        x = energies - e0
        count = int(np.sum((x >= -15) & (x <= 60)))
        if count < 2 or np.sum((x >= 0) & (x <= 60)) < 2:  # a pair on either side brackets, and is no scan
            continue
        for low, high in ((-200, -20), (60, 300)):
            if not np.any((x >= low) & (x <= high)):
                side = "below" if low < 0 else "above"
                return (
                    f"{count} energies lie on the {element} edge, but none {side} it, from {e0 + low:.0f} to "
                    f"{e0 + high:.0f} eV"
                )
    return "no edge was scanned (two energies from 15 below to 60 eV above it)"
