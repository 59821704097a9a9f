"""Which energies can be compared with which, and the one solution that follows from all comparisons.

Away from a scanned edge the particle looks the same, up to a factor, at energies where the same elements absorb
strongly: for a manganese-cobalt-nickel oxide below all three edges and above all three, between manganese and cobalt,
and between cobalt and nickel. Inside such a *contrast island* two energies are compared without bias. Between islands
the contrast of neighbouring grains changes, and what is compared is only nearly the same: a pair across islands has an
error of its own, common to all pairs between the same two islands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .contrast import tabulated
from .edges import bracketed_elements, edge_energy_ev, scanned_element
from .model import FloatArray, XanesTomoError

__all__ = ["PARAMETERS", "Closure", "Network", "Pair", "closures", "contrast_islands", "island_hubs", "solve_network"]

PARAMETERS = ("scale", "roll", "ty", "tx", "tz", "angle")
"""What is measured between two energies: relative scale, roll (rad), translation (common-grid px), angle (rad)."""

_ALIKE = (
    0.02  # relative difference of contrast, for a tenth of one metal exchanged for another, that is called the same
)
_NEAR_EDGE_EV = (-4.5, 55.0)  # about a scanned edge the contrast depends on the valence as well


def contrast_islands(energies_ev: npt.ArrayLike) -> tuple[int, ...]:
    """Return the number of the contrast island of every energy; islands are numbered by their lowest energy.

    Two energies belong together when exchanging a tenth of one of the elements whose edges were measured for another
    changes their absorption ratio by less than 2 %, by the tabulated mass attenuation. Energies on a scanned edge,
    where the valence shows, are islands of their own.
    """
    energies = np.asarray(energies_ev, dtype=float)
    elements = bracketed_elements(energies)
    if not elements:
        return (0,) * len(energies)
    scanned = scanned_element(energies, elements)
    table = tabulated(energies, elements)
    near = np.zeros(len(energies), dtype=bool)
    if scanned is not None:
        at = energies - edge_energy_ev(scanned)
        near = (at > _NEAR_EDGE_EV[0]) & (at < _NEAR_EDGE_EV[1])
        if near.sum() < 2:  # a pair about an edge is no scan of it
            near[:] = False
    islands: list[list[int]] = []
    for k in np.argsort(energies, kind="stable").tolist():
        home = None
        if not near[k]:
            for island in islands:
                if not near[island[0]] and all(_difference(table[k], table[m]) < _ALIKE for m in island):
                    home = island
                    break
        if home is None:
            islands.append([k])
        else:
            home.append(k)
    out = np.zeros(len(energies), dtype=int)
    for number, island in enumerate(islands):
        out[island] = number
    return tuple(int(v) for v in out)


def _difference(one: FloatArray, other: FloatArray) -> float:
    """Relative change of the ratio of two absorptions when a tenth of one element is exchanged for another."""
    ratio = one / other
    return 0.1 * float((ratio.max() - ratio.min()) / ratio.mean())


def island_hubs(islands: Sequence[int], energies_ev: npt.ArrayLike, reference: int) -> dict[int, int]:
    """Return for every energy the second energy it is compared with, beside the reference.

    That is the highest energy of its own island; in the island of the reference, the highest but the reference. An
    energy that is an island of its own is compared with the highest energy of the largest island below it. Energies
    that would be their own hub, or have none, are left out.
    """
    energies = np.asarray(energies_ev, dtype=float)
    members: dict[int, list[int]] = {}
    for k, island in enumerate(islands):
        if k != reference:
            members.setdefault(int(island), []).append(k)
    hub_of = {i: max(m, key=lambda k: energies[k]) for i, m in members.items()}
    large = {i: m for i, m in members.items() if len(m) > 1 or i == islands[reference]}
    out = {}
    for k in range(len(energies)):
        if k == reference:
            continue
        island = int(islands[k])
        hub = hub_of[island]
        if hub == k:
            below = [i for i in large if i != islands[reference] and i != island and energies[hub_of[i]] < energies[k]]
            if not below:
                below = [i for i in large if i != island and hub_of[i] != k]
            if not below:
                continue
            hub = hub_of[max(below, key=lambda i: (len(large[i]), energies[hub_of[i]]))]
        if hub != k:
            out[k] = hub
    return out


@dataclass(frozen=True)
class Pair:
    """One measured difference: the place of energy `first` minus that of energy `second`.

    Attributes
    ----------
    first, second : int
        Numbers of the energies; the projections of the first were compared with the tomogram of the second.
    value : (6,) array
        See `PARAMETERS`.
    sigma : (6,) array
        Standard errors, the random part.
    """

    first: int
    second: int
    value: FloatArray
    sigma: FloatArray


@dataclass(frozen=True)
class Network:
    """The joint solution of all pairs.

    Attributes
    ----------
    value : (n, 6) array
        Place of every energy with respect to the reference, see `PARAMETERS`; NaN where no pair leads to it.
    sigma : (n, 6) array
        Standard errors, all parts.
    cross_sigma : (n, 6) array
        The part of it that stems from comparing different contrasts.
    weight : (pairs,) array
        1 for a pair that agrees with the others, less for one that does not.
    misfit : (pairs,) array
        Root mean square of what is left of a pair over its standard errors.
    """

    value: FloatArray
    sigma: FloatArray
    cross_sigma: FloatArray
    weight: FloatArray
    misfit: FloatArray


def solve_network(
    pairs: Sequence[Pair], islands: Sequence[int], reference: int, *, cross_sigma: npt.ArrayLike
) -> Network:
    """Solve for the places of all energies from the pairs measured between them.

    Weighted least squares with Huber's weights; the difference of contrast between two islands adds an unknown to all
    pairs between them, expected to be zero within `cross_sigma`.

    Parameters
    ----------
    pairs : sequence of Pair
    islands : sequence of int
        Contrast island of every energy.
    reference : int
        Number of the energy whose place is zero.
    cross_sigma : (6,) array
        What a difference of contrast may do, standard deviation; see `PARAMETERS`.

    Raises
    ------
    XanesTomoError
        A pair names an energy that does not exist, or its errors are not positive numbers.
    """
    n, k = len(islands), len(PARAMETERS)
    for p in pairs:
        if not (0 <= p.first < n and 0 <= p.second < n) or p.first == p.second:
            raise XanesTomoError(f"pair: expected two of {n} energies, got {p.first} and {p.second}")
        if not (np.isfinite(p.value).all() and np.isfinite(p.sigma).all() and np.all(p.sigma > 0)):
            raise XanesTomoError(f"pair {p.first}-{p.second}: expected finite values with positive errors")
    cross = np.broadcast_to(np.asarray(cross_sigma, dtype=float), (k,))
    reached = _reached(pairs, n, reference)
    unknown = [e for e in range(n) if e in reached and e != reference]
    column = {e: i for i, e in enumerate(unknown)}
    used = [i for i, p in enumerate(pairs) if p.first in reached and p.second in reached]
    bridges: dict[tuple[int, int], int] = {}
    for i in used:
        a, b = islands[pairs[i].first], islands[pairs[i].second]
        if a != b:
            bridges.setdefault((min(a, b), max(a, b)), len(bridges))
    size = len(unknown) + len(bridges)
    value, sigma, part = np.full((n, k), np.nan), np.full((n, k), np.nan), np.full((n, k), np.nan)
    value[reference], sigma[reference], part[reference] = 0, 0, 0
    weight, misfit = np.ones(len(pairs)), np.full(len(pairs), np.nan)
    if not used:
        return Network(value, sigma, part, weight, misfit)
    design = np.zeros((len(used), size))
    for row, i in enumerate(used):
        p = pairs[i]
        if p.first != reference:
            design[row, column[p.first]] += 1
        if p.second != reference:
            design[row, column[p.second]] -= 1
        a, b = islands[p.first], islands[p.second]
        if a != b:
            design[row, len(unknown) + bridges[min(a, b), max(a, b)]] = 1 if a < b else -1
    measured = np.stack([pairs[i].value for i in used])
    error = np.stack([pairs[i].sigma for i in used])
    solution = np.zeros((size, k))
    rest = np.zeros_like(measured)
    for _ in range(8):
        for q in range(k):
            w = weight[used] / error[:, q] ** 2
            normal = design.T @ (w[:, None] * design)
            normal[range(len(unknown), size), range(len(unknown), size)] += 1 / max(cross[q], 1e-12) ** 2
            solution[:, q] = np.linalg.solve(normal, design.T @ (w * measured[:, q]))
            rest[:, q] = measured[:, q] - design @ solution[:, q]
        rms = np.sqrt(np.mean((rest / error) ** 2, axis=1))
        # Errors may all be too small by a factor; what counts is whether a pair stands out from the others.
        limit = 2.5 * max(1.0, float(np.median(rms)))
        weight[used] = np.minimum(1.0, limit / np.maximum(rms, 1e-12))
    misfit[used] = rms
    for q in range(k):
        w = weight[used] / error[:, q] ** 2
        normal = design.T @ (w[:, None] * design)
        loose = normal.copy()
        loose[range(len(unknown), size), range(len(unknown), size)] += 1 / max(cross[q], 1e-12) ** 2
        whole = np.diag(np.linalg.inv(loose))[: len(unknown)]
        tight = normal[: len(unknown), : len(unknown)]
        random = np.diag(np.linalg.inv(tight))
        value[unknown, q] = solution[: len(unknown), q]
        sigma[unknown, q] = np.sqrt(whole)
        part[unknown, q] = np.sqrt(np.maximum(whole - random, 0))
    return Network(value, sigma, part, weight, misfit)


def _reached(pairs: Sequence[Pair], n: int, reference: int) -> set[int]:
    reached, grown = {reference}, True
    while grown:
        grown = False
        for p in pairs:
            ends = {p.first, p.second}
            if ends & reached and not ends <= reached:
                reached |= ends
                grown = True
    return reached


@dataclass(frozen=True)
class Closure:
    """How far three independently measured pairs fail to close.

    Attributes
    ----------
    energies : (int, int, int)
        Numbers of the energies.
    value, sigma : (6,) arrays
        Sum around the triangle, and the standard error that the three pairs give it; see `PARAMETERS`.
    islands : int
        How many contrast islands the three belong to. Only 3 of them say something about the contrast.
    """

    energies: tuple[int, int, int]
    value: FloatArray
    sigma: FloatArray
    islands: int


def closures(pairs: Sequence[Pair], islands: Sequence[int]) -> tuple[Closure, ...]:
    """Return the closure of every triangle whose three sides were measured, each by a comparison of its own."""
    side: dict[tuple[int, int], tuple[FloatArray, FloatArray]] = {}
    for p in pairs:
        side.setdefault((p.first, p.second), (p.value, p.sigma))
        side.setdefault((p.second, p.first), (-p.value, p.sigma))
    nodes = sorted({k for pair in side for k in pair})
    out = []
    for i, a in enumerate(nodes):
        for j, b in enumerate(nodes[i + 1 :], i + 1):
            if (a, b) not in side:
                continue
            for c in nodes[j + 1 :]:
                if (b, c) in side and (c, a) in side:
                    sides = [side[a, b], side[b, c], side[c, a]]
                    total = np.sum([s[0] for s in sides], axis=0)
                    error = np.sqrt(np.sum([s[1] ** 2 for s in sides], axis=0))
                    out.append(Closure((a, b, c), total, error, len({islands[a], islands[b], islands[c]})))
    return tuple(out)
