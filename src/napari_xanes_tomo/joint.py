"""All energies together: one place for each, from every comparison that was made, with an honest error.

Every energy was compared with the reference and, independently, with a second energy, as a rule one of its own contrast
(`graph`). The places that fit all comparisons best differ a little from those the reference alone gave: a check of both
and a part of the error. `adjusted` applies the difference to the numbers of an alignment, never to pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from .graph import PARAMETERS, Closure, Pair, closures, contrast_islands, solve_network
from .model import Alignment, FloatArray

__all__ = ["Joint", "Measured", "adjusted", "common_sigma", "cross_contrast_sigma", "join", "ranking"]

_STANDS_OUT = 6.0  # a pair that misses the joint solution by more than this many standard errors is named


@dataclass(frozen=True)
class Measured:
    """What was measured of one energy; places as in `graph.PARAMETERS`, the scale as ln(M / calibration).

    Attributes
    ----------
    place, place_sigma : (6,) arrays
        Against the reference.
    second, second_sigma : (6,) arrays or None
        Against the template of another energy.
    hub : int or None
        Number of that energy, and
    hub_place : (6,) array or None
        where it was taken to be.
    pull : (6,) array
        What grains of another composition would have added to `place`, see `composition`.
    """

    place: FloatArray
    place_sigma: FloatArray
    second: FloatArray | None = None
    second_sigma: FloatArray | None = None
    hub: int | None = None
    hub_place: FloatArray | None = None
    pull: FloatArray = field(default_factory=lambda: np.zeros(len(PARAMETERS)))


@dataclass(frozen=True)
class Joint:
    """The joint solution.

    Attributes
    ----------
    energies : (n,) array
        eV.
    islands : tuple of int
        Contrast island of every energy.
    change : (n, 6) array
        What is to be added to the place that was applied; 0 where nothing is known.
    sigma, cross_sigma : (n, 6) arrays
        Standard errors of the places; the part that stems from comparing different contrasts. NaN where unknown.
    misfit : (n,) array
        Worst disagreement of an energy's comparisons with the joint solution, in standard errors.
    pairs : tuple of Pair
    closures : tuple of Closure
    notes : tuple of str
        Comparisons that do not agree, in words.
    """

    energies: FloatArray
    islands: tuple[int, ...]
    change: FloatArray
    sigma: FloatArray
    cross_sigma: FloatArray
    misfit: FloatArray
    pairs: tuple[Pair, ...]
    closures: tuple[Closure, ...]
    notes: tuple[str, ...]

    def closure_matrix(self, parameter: str = "ty") -> FloatArray:
        """Return (n, n) closures over their standard errors, by the first and last energy of the triangle; else NaN."""
        k = PARAMETERS.index(parameter)
        out = np.full((len(self.energies),) * 2, np.nan)
        for c in self.closures:
            for a, b in ((0, 1), (1, 2), (0, 2)):
                i, j = c.energies[a], c.energies[b]
                z = abs(float(c.value[k] / c.sigma[k]))
                out[i, j] = out[j, i] = np.fmax(out[i, j], z)
        return out


def cross_contrast_sigma(width_px: float, pulls: Sequence[FloatArray] = ()) -> FloatArray:
    """Return (6,) standard deviations of what a difference of contrast does to a comparison, see `PARAMETERS`.

    As found on digital twins in the band of fine structures; the translation is as uncertain in all three directions.

    Parameters
    ----------
    width_px : float
        Raw columns of a frame: errors grow with the pixels.
    pulls : sequence of (6,) arrays
        What was taken out of the comparisons, see `composition`: a quarter of it is left. Without any the errors are
        those of a particle with 15 % of scatter in its grains and a tenth of a gradient.
    """
    unit = width_px / 256
    if not len(pulls):
        return np.array([4e-5, 5e-5, 0.006 * unit, 0.006 * unit, 0.006 * unit, 1.5e-4])
    left = 0.25 * np.sqrt(np.mean(np.square(pulls), axis=0))
    left[2:5] = np.sqrt(np.mean(left[2:5] ** 2))
    return np.asarray(np.hypot([1.5e-5, 5e-5, 0.001 * unit, 0.001 * unit, 0.001 * unit, 1.5e-4], left))


def join(
    measured: Mapping[int, Measured], energies_ev: npt.ArrayLike, reference: int, *, width_px: float = 256.0
) -> Joint:
    """Solve for the places of all energies.

    Parameters
    ----------
    measured : dict of int to Measured
        By the number of the energy; the reference, and what failed, are not in it.
    energies_ev : (n,) array
        eV.
    reference : int
        Number of the reference energy.
    width_px : float
        Width of a raw frame, px.
    """
    energies = np.asarray(energies_ev, dtype=float)
    n = len(energies)
    islands = contrast_islands(energies)
    pairs: list[Pair] = []
    applied = np.zeros((n, len(PARAMETERS)))
    for e, m in measured.items():
        applied[e] = m.place
        if _usable(m.place, m.place_sigma):
            pairs.append(Pair(e, reference, m.place, _floored(m.place_sigma, width_px)))
        if m.second is None or m.second_sigma is None or m.hub_place is None or m.hub not in measured:
            continue
        if m.hub is not None and _usable(m.second, m.second_sigma):
            # Two energies of one contrast do not pull; of two others each pulls as it does at the reference.
            pull = m.pull - measured[m.hub].pull if islands[e] != islands[m.hub] else 0.0
            pairs.append(Pair(e, m.hub, m.second - m.hub_place - pull, _floored(m.second_sigma, width_px)))
    pulls = [m.pull for e, m in measured.items() if islands[e] != islands[reference] and m.pull.any()]
    solved = solve_network(pairs, islands, reference, cross_sigma=cross_contrast_sigma(width_px, pulls))
    change = np.where(np.isfinite(solved.value), solved.value - applied, 0.0)
    misfit = np.full(n, np.nan)
    notes = []
    for pair, off in zip(pairs, solved.misfit, strict=True):
        misfit[pair.first] = np.fmax(misfit[pair.first], off)
        if off > _STANDS_OUT:
            notes.append(
                f"{energies[pair.first]:g} eV: its comparison with {energies[pair.second]:g} eV misses what all "
                f"comparisons say by {off:.0f} standard errors; is it the same sample, and the right label?"
            )
    return Joint(
        energies,
        islands,
        change,
        solved.sigma,
        solved.cross_sigma,
        misfit,
        tuple(pairs),
        closures(pairs, islands),
        tuple(notes),
    )


def _usable(place: FloatArray, sigma: FloatArray) -> bool:
    return bool(np.isfinite(place).all() and np.isfinite(sigma).all())


def _floored(sigma: FloatArray, width_px: float) -> FloatArray:
    """Return standard errors that are not taken for better than twelve blocks of angles can tell."""
    unit = width_px / 256
    least = np.array([2e-5, 3e-5, 0.0015 * unit, 0.002 * unit, 0.002 * unit, 3e-5])
    return np.asarray(np.maximum(sigma, least))


def adjusted(alignment: Alignment, theta_deg: FloatArray, translation: FloatArray, change: FloatArray) -> Alignment:
    """Return an alignment with its place changed by the (6,) array `change`, see `graph.PARAMETERS`.

    Parameters
    ----------
    alignment : Alignment
    theta_deg : (n,) array
    translation : (3,) array
        ``[ty, a, b]`` that is in it, common-grid px.
    change : (6,) array
        The roll is changed only where the alignment has one; an angle is no displacement.
    """
    t = np.asarray(theta_deg, dtype=float)
    still = alignment.gauge(t, *(-np.asarray(translation, dtype=float)))
    roll = alignment.roll_deg + (float(np.rad2deg(change[1])) if alignment.roll_deg else 0.0)
    scaled = replace(still, magnification=alignment.magnification * float(np.exp(change[0])), roll_deg=roll)
    return scaled.gauge(t, *(np.asarray(translation, dtype=float) + change[2:5]))


def common_sigma(
    theta_deg: FloatArray, sigma: FloatArray, magnification: float, *, radius_px: float = 0.0
) -> FloatArray:
    """Return (n, 2) standard errors ``[dy, dx]`` of what all projections of an energy share, raw px.

    Parameters
    ----------
    theta_deg : (n,) array
    sigma : (6,) array
        Of the place, see `graph.PARAMETERS`.
    magnification : float
    radius_px : float
        Distance from the axis and the middle row at which the scale and the roll are counted as well, common-grid px.
    """
    t = np.deg2rad(np.asarray(theta_deg, dtype=float))
    rim = radius_px * np.hypot(sigma[0], sigma[1])
    y = np.full(t.shape, float(np.hypot(sigma[2], rim)))
    x = np.sqrt((sigma[3] * np.cos(t)) ** 2 + (sigma[4] * np.sin(t)) ** 2 + rim**2)
    return np.asarray(magnification * np.stack([y, x], axis=1))


def ranking(
    residual: Sequence[FloatArray], sigma: Sequence[FloatArray], *, floor_px: float = 0.0
) -> list[tuple[int, int, float]]:
    """Return every (energy, projection) with how far it is displaced beyond its alignment, the worst first.

    Parameters
    ----------
    residual, sigma : sequences of (n, 2) arrays
        One an energy: displacement left over and its standard error, raw px; NaN where nothing is known.
    floor_px : float
        Displacement that is never called an outlier.

    Returns
    -------
    list of (energy, projection, z)
        `z` is the length of the displacement over what is usual at that energy, counted from its middle.
    """
    rows = []
    for e, (shift, error) in enumerate(zip(residual, sigma, strict=True)):
        good = np.isfinite(shift).all(axis=1) & np.isfinite(error).all(axis=1)
        if not good.any():
            continue
        off = shift - np.median(shift[good], axis=0)
        scatter = 1.4826 * np.median(np.abs(off[good]), axis=0)
        # What is usual at this energy, or what this projection's own noise allows, whichever is more.
        size = np.maximum(np.maximum(error, scatter), max(floor_px / 5, 1e-12))
        z = np.sqrt(np.sum((off / size) ** 2, axis=1))
        rows += [(e, int(i), float(z[i])) for i in np.flatnonzero(good)]
    return sorted(rows, key=lambda r: (-r[2], r[0], r[1]))
