"""All shifts of a scan taken apart: what repeats at every energy, how the object moved, steps, and what is left.

The stage repeats part of its error at every turn; the sample is moved from energy to energy, and may slip where flats
were taken. What is left is the motion nobody can foretell. Displacements are ``[dy, dx]`` px of the common grid, of the
content, positive down / right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .model import FloatArray, XanesTomoError

__all__ = ["PARTS", "Decomposition", "decompose"]

PARTS = ("total", "synchronous", "rigid", "steps", "remainder")
_PASSES = 30


@dataclass(frozen=True)
class Decomposition:
    """What the shifts of all energies are made of; rows are energies, columns angles.

    ``shift = synchronous[angle] + rigid[energy, angle] + steps[energy, angle] + remainder[energy, angle]``.

    Attributes
    ----------
    energies_ev : (energies,) array
    theta_deg : (angles,) array
        Every angle that was measured.
    index : tuple of (n,) int arrays
        One an energy: the column of each of its projections.
    synchronous : (angles, 2) array
        Displacement common to all energies at an angle, without what a motion of the object would explain; zero with
        fewer than three energies, and at angles that fewer than three have.
    rigid, steps, remainder : (energies, angles, 2) arrays
        NaN where there is no projection. `rigid` is a translation of the object in three directions and of the centre
        of rotation: constant in y; constant, cosine and sine in x. `steps` are jumps where flats were taken.
    place : (energies, 4) array
        ``[y, center, cosine, sine]`` of `rigid`.
    jumps : (energies, segments - 1, 2) array
        Height of each step.
    rms : dict of str to (2,) arrays
        ``[y, x]`` of `PARTS`, over all projections. What the means of a few energies contain of the remainder is taken
        off the synchronous part and added to the remainder.
    """

    energies_ev: FloatArray
    theta_deg: FloatArray
    index: tuple[npt.NDArray[np.intp], ...]
    synchronous: FloatArray
    rigid: FloatArray
    steps: FloatArray
    remainder: FloatArray
    place: FloatArray
    jumps: FloatArray
    rms: dict[str, FloatArray]

    def part(self, name: str) -> FloatArray:
        """Return one of `PARTS` as an (energies, angles, 2) array, NaN where there is no projection."""
        known = np.where(np.isfinite(self.remainder), 1.0, np.nan)
        parts = {
            "synchronous": self.synchronous[None] * known,
            "rigid": self.rigid,
            "steps": self.steps,
            "remainder": self.remainder,
        }
        if name == "total":
            return np.asarray(sum(parts.values()))
        return np.asarray(parts[name])

    def gauge(self) -> FloatArray:
        """(angles, 2) Mean of `rigid`: where the object and the axis lie in the whole scan, which is no motion."""
        known = np.isfinite(self.place).all(axis=1)
        if not known.any():
            return np.zeros((len(self.theta_deg), 2))
        middle = self.place[known].mean(axis=0)
        t = np.deg2rad(self.theta_deg)
        x = middle[1] + middle[2] * np.cos(t) + middle[3] * np.sin(t)
        return np.stack([np.full(len(t), middle[0]), x], axis=1)

    def moved(self, name: str) -> FloatArray:
        """Return a part as `part` does; the rigid one and the total as motion, `gauge` taken out."""
        values = self.part(name)
        return values - self.gauge() if name in ("rigid", "total") else values

    def columns(self, lengths: Sequence[int]) -> dict[str, npt.NDArray[np.float64]]:
        """Return what ``quality.csv`` says of it; `lengths` is how many projections every energy has."""
        out: dict[str, npt.NDArray[np.float64]] = {}
        for name in PARTS[1:]:
            values = self._of_projections(self.moved(name), lengths)
            out |= {f"{name}_{axis}_px": values[:, k].astype(np.float64) for k, axis in enumerate("yx")}
        return out

    def text(self) -> str:
        """Return the rms of every part in one line."""
        words = {"synchronous": "repeated at every energy", "rigid": "motion of the object from energy to energy"}
        words |= {"steps": "steps where flats were taken", "remainder": "what is left"}
        parts = [
            f"{words[n]} {y:.2f} / {x:.2f}" if np.isfinite(y) else f"{words[n]} unknown (fewer than 3 energies)"
            for n, (y, x) in self.rms.items()
            if n in words
        ]
        y, x = self.rms["total"]
        return f"Shifts of {y:.2f} / {x:.2f} px (rms, y / x): {', '.join(parts)} px."

    def of_projections(self, name: str, lengths: Sequence[int]) -> FloatArray:
        """Return a part as (projections, 2), one energy after the other; `lengths` is how many each of them has."""
        return self._of_projections(self.part(name), lengths)

    def _of_projections(self, values: FloatArray, lengths: Sequence[int]) -> FloatArray:
        out = [np.full((n, 2), np.nan) for n in lengths]
        for e, at in enumerate(self.index):
            out[e][: len(at)] = values[e, at]
        return np.concatenate(out) if out else np.zeros((0, 2))


def decompose(
    energies_ev: npt.ArrayLike,
    theta_deg: Sequence[FloatArray],
    shift: Sequence[FloatArray | None],
    *,
    segment: Sequence[npt.NDArray[np.integer]] | None = None,
) -> Decomposition:
    """Take the shifts of all energies apart, by robust least squares.

    Parameters
    ----------
    energies_ev : (energies,) array
    theta_deg : sequence of (n,) arrays
        Angles of every energy; those within 0.3 of the step of each other are one.
    shift : sequence of (n, 2) arrays or None
        One an energy: ``[dy, dx]`` of its projections, registered, px of the common grid (raw px over its
        magnification); NaN where there is none, None for an energy that is not known.
    segment : sequence of (n,) int arrays, optional
        Which part of the scan, between flats, each projection belongs to; all the same unless given.

    Raises
    ------
    XanesTomoError
        The arrays do not belong together.
    """
    energies = np.asarray(energies_ev, dtype=float)
    if len(theta_deg) != len(energies) or len(shift) != len(energies):
        raise XanesTomoError(f"shifts: expected one array for each of {len(energies)} energies, got {len(shift)}")
    angles, index = _columns(theta_deg)
    count, width = len(energies), len(angles)
    data = np.full((count, width, 2), np.nan)
    part = np.zeros((count, width), dtype=int)
    for e, values in enumerate(shift):
        if values is not None and len(values):
            if np.shape(values) != (len(index[e]), 2):
                raise XanesTomoError(
                    f"{energies[e]:g} eV: expected ({len(index[e])}, 2) shifts, got {np.shape(values)}"
                )
            data[e, index[e]] = values
        if segment is not None and len(segment[e]):
            part[e, index[e]] = np.unique(segment[e], return_inverse=True)[1]
    known = np.isfinite(data).all(axis=2)
    segments = int(part[known].max()) + 1 if known.any() else 1
    t = np.deg2rad(angles)
    own = [np.ones((width, 1)), np.stack([np.ones(width), np.cos(t), np.sin(t)], axis=1)]
    synchronous = np.zeros((width, 2))
    coefficients = [np.zeros((count, b.shape[1] + segments - 1)) for b in own]
    # Enough energies at an angle to tell what they share from what is each one's own.
    shared = known.sum(axis=0) >= 3
    # Steps that all energies have at the same place are steps, not part of what repeats.
    usual = np.array([int(np.median(part[known[:, k], k])) if known[:, k].any() else 0 for k in range(width)])
    for axis, basis in enumerate(own):
        design = [_with_steps(basis, part[e], segments) for e in range(count)]
        weight = known.astype(float)
        model = np.zeros((count, width))
        for _ in range(_PASSES):
            for e in range(count):
                coefficients[axis][e] = _fit(
                    design[e][known[e]], (data[e, :, axis] - synchronous[:, axis])[known[e]], weight[e][known[e]]
                )
                model[e] = design[e] @ coefficients[axis][e]
            rest = np.where(known, data[..., axis] - model, 0.0)
            total = (weight * shared).sum(axis=0)
            mean = np.where(shared, (weight * rest).sum(axis=0) / np.maximum(total, 1e-12), 0.0)
            # What a motion of the object explains belongs to the energies.
            common = _with_steps(basis, usual, segments)[shared]
            mean[shared] -= common @ _fit(common, mean[shared], np.ones(shared.sum()))
            synchronous[:, axis] = mean
            rest = np.where(known, rest - mean, 0.0)
            scatter = 1.4826 * float(np.median(np.abs(rest[known]))) if known.any() else 0.0
            weight = np.where(known, np.minimum(1.0, 2.5 * scatter / np.maximum(np.abs(rest), 1e-12)), 0.0)
    rigid, steps = np.full_like(data, np.nan), np.full_like(data, np.nan)
    place, jumps = np.full((count, 4), np.nan), np.full((count, segments - 1, 2), np.nan)
    for axis, basis in enumerate(own):
        k = basis.shape[1]
        for e in np.flatnonzero(known.any(axis=1)).tolist():
            own_part, jump = coefficients[axis][e][:k], coefficients[axis][e][k:]
            rigid[e, known[e], axis] = (basis @ own_part)[known[e]]
            steps[e, known[e], axis] = (_with_steps(basis, part[e], segments)[:, k:] @ jump)[known[e]]
            place[e, (0,) if axis == 0 else (1, 2, 3)] = own_part
            jumps[e, :, axis] = jump
    remainder = data - synchronous[None] - rigid - steps
    remainder[~known] = np.nan
    found = Decomposition(energies, angles, index, synchronous, rigid, steps, remainder, place, jumps, {})
    return Decomposition(
        **{**found.__dict__, "rms": _rms(found, known, shared, [b.shape[1] + segments - 1 for b in own])}
    )


def _columns(theta_deg: Sequence[FloatArray]) -> tuple[FloatArray, tuple[npt.NDArray[np.intp], ...]]:
    """Return all angles, and which of them each projection of every energy has."""
    every = [np.asarray(t, dtype=float) for t in theta_deg]
    flat = np.sort(np.concatenate(every)) if every else np.zeros(0)
    if not len(flat):
        return flat, tuple(np.zeros(0, dtype=np.intp) for _ in every)
    steps = [float(np.median(np.diff(np.sort(t)))) for t in every if len(t) > 1]
    near = 0.3 * max(1e-9, float(np.median(steps))) if steps else 1e-9
    first = np.r_[True, np.diff(flat) > near]
    group = np.cumsum(first) - 1
    angles = np.bincount(group, weights=flat) / np.bincount(group)
    out = []
    for t in every:
        at = group[np.clip(np.searchsorted(flat, t), 0, len(flat) - 1)]
        # An angle measured twice at one energy has one place: the later exposure counts.
        out.append(np.asarray(at, dtype=np.intp))
    return angles, tuple(out)


def _with_steps(basis: FloatArray, part: npt.NDArray[np.intp], segments: int) -> FloatArray:
    """Add a column for every segment but the first: one from that segment on."""
    if segments == 1:
        return basis
    return np.concatenate([basis, (part[:, None] >= np.arange(1, segments)).astype(float)], axis=1)


def _fit(design: FloatArray, values: FloatArray, weight: FloatArray) -> FloatArray:
    """Weighted least squares; the shortest solution where the columns do not tell."""
    if not len(values):
        return np.zeros(design.shape[1])
    root = np.sqrt(weight)
    return np.asarray(np.linalg.lstsq(design * root[:, None], values * root, rcond=1e-9)[0])


def _rms(
    found: Decomposition, known: npt.NDArray[np.bool_], shared: npt.NDArray[np.bool_], own: Sequence[int]
) -> dict[str, FloatArray]:
    def rms(values: FloatArray) -> FloatArray:
        return np.asarray(np.sqrt(np.nanmean(values**2, axis=(0, 1)))) if known.any() else np.full(2, np.nan)

    out = {name: rms(found.moved(name)) for name in PARTS}
    if not shared.any():
        return {name: out[name] if name != "synchronous" else np.full(2, np.nan) for name in PARTS}
    # Of E energies the mean holds 1 / E of the remainder's variance, and the remainder lacks as much.
    energies, angles = float(np.median(known.sum(axis=0)[shared])), int(shared.sum())
    free = np.array([max(1, angles - k) / angles for k in own])
    left = out["remainder"] ** 2 * energies / (energies - 1) / free
    out["synchronous"] = np.sqrt(np.maximum(out["synchronous"] ** 2 - left * free / energies, 0.0))
    out["remainder"] = np.sqrt(left)
    return {name: out[name] for name in PARTS}
