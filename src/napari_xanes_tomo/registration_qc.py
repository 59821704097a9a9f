"""Where the registration is still wrong, projection by projection, and what that does to the maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .joint import ranking
from .map_plan import MapPlan
from .model import Alignment, FloatArray
from .template import Template, match_angles

__all__ = ["ErrorMap", "error_map", "odd_energies", "part_in_field", "surface_effect"]

_LABEL_SCALE = 4e-3  # a scale further than this from its neighbours' is no zone plate that was refocused a little
_LABEL_NEAR = 2e-3
_LESS_ALIKE = 0.7


@dataclass(frozen=True)
class ErrorMap:
    """What every projection by itself is displaced by beyond its alignment; rows are energies, columns projections.

    Attributes
    ----------
    energies_ev : (energies,) array
    shift, sigma : (energies, projections, 2) arrays
        ``[dy, dx]``, raw px; NaN where nothing is known. What all projections of an energy share is not in it: that is
        the error of the energy's place.
    z : (energies, projections) array
        Length of the displacement over what is usual at that energy, see `joint.ranking`.
    """

    energies_ev: FloatArray
    shift: FloatArray
    sigma: FloatArray
    z: FloatArray

    @property
    def length_px(self) -> FloatArray:
        """(energies, projections) length of the displacement, raw px."""
        return np.asarray(np.hypot(self.shift[..., 0], self.shift[..., 1]))

    def length_nm(self, pixel_nm: npt.ArrayLike) -> FloatArray:
        """(energies, projections) length of the displacement, nm; `pixel_nm` (energies,) is the size of a raw pixel."""
        return np.asarray(self.length_px * np.asarray(pixel_nm, dtype=float)[:, None])

    def effect_ev(self, per_px: npt.ArrayLike) -> FloatArray:
        """(energies, projections) effect on the edge energy at a surface, eV.

        Of an energy of which every projection were displaced as much as this one; `per_px` (energies,) is
        ``surface_effect(plan).edge_ev``, by the energies of this map.
        """
        return np.asarray(self.length_px * np.abs(np.asarray(per_px, dtype=float))[:, None])

    def columns(self, lengths: Sequence[int]) -> dict[str, npt.NDArray[np.float64]]:
        """Return what ``quality.csv`` says of it; `lengths` is how many projections every energy has."""

        def column(values: FloatArray) -> npt.NDArray[np.float64]:
            wide = np.full((len(lengths), max([*lengths, values.shape[1]])), np.nan)
            wide[:, : values.shape[1]] = values
            return np.concatenate([row[:n] for row, n in zip(wide, lengths, strict=True)])

        return {
            "registration_dy_px": column(self.shift[..., 0]),
            "registration_dx_px": column(self.shift[..., 1]),
            "registration_z": column(self.z),
        }

    def worst(self, count: int) -> list[tuple[int, int, float]]:
        """Return ``(energy, projection, z)`` of the `count` projections that stand out most, the worst first."""
        rows = [(int(e), int(i), float(self.z[e, i])) for e, i in np.argwhere(np.isfinite(self.z))]
        return sorted(rows, key=lambda r: (-r[2], r[0], r[1]))[:count]


def error_map(
    energies_ev: npt.ArrayLike, residual: Sequence[FloatArray | None], sigma: Sequence[FloatArray | None]
) -> ErrorMap:
    """Lay the displacements of all energies side by side.

    Parameters
    ----------
    energies_ev : (energies,) array
    residual, sigma : sequences of (n, 2) arrays or None
        One an energy: displacement left over and its standard error, raw px; None for an energy of which nothing is
        known, as the reference.
    """
    energies = np.asarray(energies_ev, dtype=float)
    n = max((len(r) for r in residual if r is not None), default=0)
    shift, error = (np.full((len(energies), n, 2), np.nan) for _ in range(2))
    for e, (r, s) in enumerate(zip(residual, sigma, strict=True)):
        if r is not None and s is not None:
            shift[e, : len(r)], error[e, : len(s)] = r, s
    z = np.full(shift.shape[:2], np.nan)
    for e, i, value in ranking(list(shift), list(error)):
        z[e, i] = value
    return ErrorMap(energies, shift, error, z)


@dataclass(frozen=True)
class SurfaceEffect:
    """What one energy displaced by one pixel does to the maps at a surface of the particle.

    Attributes
    ----------
    edge_ev : (energies,) array
        eV of the edge energy for each px; 0 for energies that have no part in it, NaN where there is no such map.
    element : dict of str to (energies,) array
        The same for the density of each element, as a fraction of its mean.
    """

    edge_ev: FloatArray
    element: Mapping[str, FloatArray]


def surface_effect(plan: MapPlan) -> SurfaceEffect:
    """Return what a displacement of one energy alone does at a surface, for each px of the common grid.

    A surface that is one voxel wide is displaced by one voxel: the absorbance of that energy is there wrong by its
    whole step. Displaced by less than a voxel, it is wrong by that part of it. Whatever the map is made of is linear
    in the absorbance, so the effect is the energy's weight times the step.
    """
    steps = plan.spectrum
    edge = np.full(len(steps), np.nan)
    if plan.edge is not None:
        edge = plan.edge.numerator * steps * float(plan.edge.slope(np.zeros(1))[0])
    element = {}
    for name in plan.elements:
        weights = plan.components[name]
        mean = float(weights @ steps)
        element[name] = weights * steps / mean if mean > 0 else np.full(len(steps), np.nan)
    return SurfaceEffect(edge, element)


def part_in_field(
    template: Template, theta_deg: npt.ArrayLike, alignment: Alignment, frame_shape: tuple[int, int] | None = None
) -> float:
    """Return the part of the particle's absorbance that lies inside the recorded frames of an energy, mean of angles.

    Parameters
    ----------
    template : Template
        Of the reference, whose whole particle is in its field.
    theta_deg : (n,) array
    alignment : Alignment
        Of these projections, raw px.
    frame_shape : (int, int), optional
        Of their raw frames; that of the template unless given.
    """
    recorded = template.frame_shape if frame_shape is None else frame_shape
    mine, theirs = match_angles(np.asarray(theta_deg, dtype=float), template.theta_deg)
    _, rows, columns = template.frames.shape
    total = seen = 0.0
    y, x = (alignment.magnification * template.bin * (np.arange(n) - (n - 1) / 2) for n in (rows, columns))
    limits = [np.array([-(n - 1) / 2, (n - 1) / 2 + 1e-9]) for n in recorded]
    for i, k in zip(mine.tolist(), theirs.tolist(), strict=True):
        frame = template.frames[k]
        (y0, y1), (x0, x1) = (
            np.searchsorted(at, ends - shift)
            for at, ends, shift in zip((y, x), limits, alignment.shift[i], strict=True)
        )
        total += float(frame.sum())
        seen += float(frame[y0:y1, x0:x1].sum())
    return seen / total if total > 0 else float("nan")


def odd_energies(
    energies_ev: npt.ArrayLike, magnification: npt.ArrayLike, law: npt.ArrayLike, correlation: npt.ArrayLike
) -> dict[int, list[str]]:
    """Return energies that look like another sample or bear a wrong label, with the reason, by their number.

    The scale over the calibration is followed from energy to energy by the median of the slopes of all pairs (Theil
    1950, Sen 1968, doi 10.1080/01621459.1968.10480934), which a quarter of wrong energies does not disturb.

    Parameters
    ----------
    energies_ev, magnification, law, correlation : (energies,) arrays
        Measured scale, scale by the calibration, correlation with the reference; NaN where there is none.
    """
    energies, m, expected, alike = (np.asarray(a, dtype=float) for a in (energies_ev, magnification, law, correlation))
    out: dict[int, list[str]] = {}
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.log(m / expected)
    good = np.flatnonzero(np.isfinite(ratio) & np.isfinite(energies))
    if len(good) >= 4:
        i, j = np.triu_indices(len(good), 1)
        apart = energies[good][i] != energies[good][j]
        i, j = good[i[apart]], good[j[apart]]
        slope = float(np.median((ratio[i] - ratio[j]) / (energies[i] - energies[j]))) if len(i) else 0.0
        line = slope * energies
        line += float(np.median(ratio[good] - line[good]))
        off = ratio - line
        limit = max(_LABEL_SCALE, 8 * 1.4826 * float(np.median(np.abs(off[good]))))
        for e in good[np.abs(off[good]) > limit].tolist():
            others = np.abs(np.log(m[e]) - np.log(expected) - line)
            others[~np.isfinite(others)] = np.inf
            near = int(np.argmin(others))
            like = f", but that of {energies[near]:g} eV" if near != e and others[near] < _LABEL_NEAR else ""
            out.setdefault(e, []).append(
                f"its scale is {100 * off[e]:+.2f} % from that of its energy{like}: is the label right?"
            )
    known = np.flatnonzero(np.isfinite(alike))
    for e in known.tolist() if len(known) >= 4 else ():
        # Projections lose likeness with their contrast, so that only much less than the others' says something.
        usual = float(np.median(alike[known[known != e]]))
        if alike[e] < _LESS_ALIKE * usual:
            out.setdefault(e, []).append(
                f"it is less like the reference than the others are (correlation {alike[e]:.2f}, usually {usual:.2f}): "
                "another sample, or not all of it in the field?"
            )
    return out
