"""What stands in the beam besides the particle: a post, a capillary, neighbours. All of it turns with the particle.

Their line integrals are written down, not computed from voxels: lengths of chords through cylinders and spheres.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from napari_xanes_tomo.edges import mass_attenuation
from napari_xanes_tomo.model import FloatArray

from .parameters import TwinParameters
from .particle import ATOMIC_MASS, DENSITY, METALS, metal_attenuation

__all__ = ["Scene", "draw_scene"]

F32 = npt.NDArray[np.float32]

_POST_TIP = 0.26  # where the post begins, parts of the field below the middle
_POST_TAPER = 0.15
_CAPILLARY_TILT = 0.04  # tangent of the angle between its axis and the rotation axis


@dataclass(frozen=True)
class Scene:
    """Lengths in parts of the field at the reference energy, (y, z, x) from the particle's middle.

    Attributes
    ----------
    p : TwinParameters
    neighbours : (n, 4) array
        y, z, x and radius of every neighbour.
    azimuth : float
        Direction in which the capillary's axis lies, radians.
    """

    p: TwinParameters
    neighbours: FloatArray
    azimuth: float

    def chords(self, theta_deg: float, y: FloatArray, u: FloatArray) -> list[F32]:
        """Mass per area over density (length) along the rays of one angle, one (y, u) array a material."""
        t = math.radians(theta_deg)
        c, s = math.cos(t), math.sin(t)
        rows, columns = y[:, None], u[None, :]
        out: list[F32] = []

        def disk(radius: FloatArray | float, at: FloatArray | float) -> FloatArray:
            """Chord through circles of these radii about `at`, both may depend on the row."""
            return np.asarray(2 * np.sqrt(np.maximum(np.square(radius) - (columns - at) ** 2, 0)))

        if self.p.post > 0:
            below = np.maximum(rows - _POST_TIP, 0)
            tip = np.sqrt(np.minimum(below / 0.02, 1.0))
            post = disk((self.p.post / 2 + _POST_TAPER * below) * tip, -0.02 * c + 0.01 * s)
            out.append(np.where(below > 0, post, 0).astype(np.float32))
        if self.p.capillary_radius > 0:
            offset, phase = self.p.capillary_offset, self.azimuth
            at = offset * (math.cos(phase) * c + math.sin(phase) * s) + _CAPILLARY_TILT * rows * c
            inner = self.p.capillary_radius - self.p.capillary_wall
            out.append((disk(self.p.capillary_radius, at) - disk(inner, at)).astype(np.float32))
        if len(self.neighbours):
            total = np.zeros((len(y), len(u)))
            for ny, nz, nx, radius in self.neighbours:
                r2 = np.maximum(radius**2 - (rows - ny) ** 2, 0)
                total += np.where(r2 > 0, disk(np.sqrt(r2), nx * c + nz * s), 0)
            out.append(total.astype(np.float32))
        return out

    def attenuation(self) -> FloatArray:
        """(energy, material) 1/cm, in the order of `chords`."""
        energy = np.asarray(self.p.energies_ev)
        out = []
        if self.p.post > 0:
            out.append(4.5 * mass_attenuation("Ti", energy))
        if self.p.capillary_radius > 0:
            glass = (28.086 * mass_attenuation("Si", energy) + 2 * 15.999 * mass_attenuation("O", energy)) / 60.084
            out.append(2.2 * glass)
        if len(self.neighbours):
            shares = oxide(self.p)
            total = shares["O"] * mass_attenuation("O", energy)
            for metal in METALS:
                total = total + shares[metal] * metal_attenuation(self.p, metal, energy)
            out.append(total)
        return np.stack(out, axis=1) if out else np.zeros((len(energy), 0))

    def occupied(self) -> F32:
        """(n, n, n) part of every voxel (y, z, x) of the common grid that is inside a neighbour."""
        n = self.p.n
        at = (np.arange(n) - (n - 1) / 2) / n
        out = np.zeros((n, n, n), dtype=np.float32)
        for *centre, radius in self.neighbours:
            near = [np.flatnonzero(np.abs(at - v) < radius + 2 / n) for v in centre]
            if not all(len(k) for k in near):
                continue
            d = sum(np.square(g) for g in np.ix_(*(at[k] - v for k, v in zip(near, centre, strict=True))))
            out[np.ix_(*near)] += np.clip((radius - np.sqrt(d)) * n + 0.5, 0, 1)
        return out


def oxide(p: TwinParameters) -> dict[str, float]:
    """Densities of the metals and of oxygen in the oxide of the nominal composition, g/cm3."""
    molar = DENSITY / (6.94 + 32.0 + sum(c * ATOMIC_MASS[m] for c, m in zip(p.composition, METALS, strict=True)))
    out = {m: molar * ATOMIC_MASS[m] * c for c, m in zip(p.composition, METALS, strict=True)}
    return {**out, "O": molar * 32.0}


def draw_scene(p: TwinParameters, rng: np.random.Generator) -> Scene:
    """Place what was asked for. Every second neighbour stands so far out that it turns out of the field."""
    azimuth = float(rng.uniform(0, 2 * math.pi))
    neighbours = np.zeros((p.neighbours, 4))
    for k in range(p.neighbours):
        radius = float(rng.uniform(0.045, 0.085))
        least = p.width / 2 + radius + 0.02
        distance = least + float(rng.uniform(0, 0.03) if k % 2 == 0 else rng.uniform(0.12, 0.30))
        angle = float(rng.uniform(0, 2 * math.pi))
        y = float(rng.uniform(-0.25, 0.25))
        neighbours[k] = y, distance * math.sin(angle), distance * math.cos(angle), radius
    return Scene(p, neighbours, azimuth)
