"""The particle: its grains, cracks, composition and valence; its attenuation, its projections, its true maps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numba as nb
import numpy as np
import numpy.typing as npt

from napari_xanes_tomo.edges import edge_energy_ev, mass_attenuation
from napari_xanes_tomo.model import FloatArray
from napari_xanes_tomo.parallel import in_threads

from .parameters import TwinParameters

__all__ = ["Particle", "attenuation", "draw_particle", "metal_attenuation", "ni_xanes", "project", "truth_maps"]

FINE = 1.5  # grid points of the particle per reference pixel
METALS = ("Mn", "Co", "Ni")
DENSITY = 4.7  # of the oxide, g/cm3
ATOMIC_MASS = {"Mn": 54.938, "Co": 58.933, "Ni": 58.693}
_EDGE_AT_HALF_EV = 9.5  # E(0.5) of the oxide above the tabulated edge of the metal
_WHITE_LINE_EV = 60.0  # above an edge, where `white_line_..` holds
_F = TypeVar("_F", bound=Callable[..., Any])


def _kernel(function: _F) -> _F:
    """Compile for the machine at first use, kept on disk, without the GIL."""
    return cast(_F, nb.njit(cache=True, nogil=True, fastmath={"contract", "reassoc"})(function))


def ni_xanes(energy_ev: npt.ArrayLike, edge_shift_ev: npt.ArrayLike = 0.0) -> FloatArray:
    """Return the normalised Ni K edge of a layered oxide: an error-function step and a white line.

    `energy_ev` and `edge_shift_ev` broadcast. The step is 0 far below and 1 far above the edge.
    """
    from scipy.special import erf

    at = np.asarray(energy_ev, dtype=float) - edge_energy_ev("Ni") - _EDGE_AT_HALF_EV - np.asarray(edge_shift_ev)
    step = 0.5 * (1.0 + erf(at / (2.2 * math.sqrt(2.0))))
    white_line = 0.45 * np.exp(-0.5 * ((at - 6.5) / 3.2) ** 2)
    shoulder = 0.06 * np.exp(-0.5 * ((at - 22.0) / 7.0) ** 2)
    return np.asarray(step + white_line + shoulder)


@dataclass(frozen=True)
class Particle:
    """Densities on the fine grid, cropped in z and x: arrays (y, z, x), g/cm3 and eV."""

    metals: dict[str, npt.NDArray[np.float32]]
    oxygen: npt.NDArray[np.float32]
    edge_shift_ev: npt.NDArray[np.float32]


@_kernel
def _label(first_row: int, end: int, inside: Any, seeds: Any, first: Any, second: Any, gap: Any) -> None:
    """Nearest and second nearest seed of every voxel inside, and how much further the second is."""
    _, nz, nx = inside.shape
    for i in range(first_row, end):
        for j in range(nz):
            for k in range(nx):
                if not inside[i, j, k]:
                    continue
                best = 1e30
                runner_up = 1e30
                b = 0
                r = 0
                for s in range(seeds.shape[0]):
                    d = (seeds[s, 0] - i) ** 2 + (seeds[s, 1] - j) ** 2 + (seeds[s, 2] - k) ** 2
                    if d < best:
                        runner_up = best
                        r = b
                        best = d
                        b = s
                    elif d < runner_up:
                        runner_up = d
                        r = s
                first[i, j, k] = b
                second[i, j, k] = r
                gap[i, j, k] = math.sqrt(runner_up) - math.sqrt(best)


def draw_particle(p: TwinParameters, seed: np.random.SeedSequence) -> Particle:
    """Draw the particle with its centre of mass in the middle of the grid.

    Where an object stands cannot be told from its projections; this is the place a run puts it to as well.
    """
    fine = round(p.n * FINE)
    rough_size = max(48, fine // 3)
    middle = np.zeros(3)
    for _ in range(2):
        rough = _draw(p, np.random.default_rng(seed), rough_size, middle)
        mass = np.sum(list(rough.metals.values()), axis=0)
        for i, n in enumerate(mass.shape):
            profile = mass.sum(axis=tuple(k for k in range(3) if k != i))
            middle[i] -= float(profile @ (np.arange(n) - (n - 1) / 2) / rough_size / profile.sum())
    return _draw(p, np.random.default_rng(seed), fine, middle)


def _draw(p: TwinParameters, rng: np.random.Generator, fine: int, middle: FloatArray) -> Particle:
    """Draw the particle on `fine` points across the field, moved by `middle` (y, z, x), parts of the field."""
    # Room for all of it at every angle, wherever its centre of mass lies.
    crop = 2 * math.ceil(max(0.37, p.width / 2 + 0.04) * fine)
    y = ((np.arange(fine) - (fine - 1) / 2) / fine - middle[0]).astype(np.float32)[:, None, None]
    w = (np.arange(crop) - (crop - 1) / 2) / fine
    z, x = (w - middle[1]).astype(np.float32)[None, :, None], (w - middle[2]).astype(np.float32)[None, None, :]
    radius = p.width / 2

    # A sphere with a bumpy surface: a few smooth waves on the direction cosines.
    waves = [(rng.normal(size=3) * 3.0, float(rng.uniform(0, 2 * math.pi))) for _ in range(6)]

    def surface(uy: Any, uz: Any, ux: Any) -> Any:
        bumps = sum(np.sin(k[0] * uy + k[1] * uz + k[2] * ux + phase) for k, phase in waves)
        return np.minimum(np.float32(radius * 0.93) + np.float32(radius * 0.02) * bumps, radius)

    r = np.sqrt(y**2 + z**2 + x**2) + np.float32(1e-6)
    inside = r < surface(y / r, z / r, x / r)

    points = rng.uniform(-radius, radius, (20 * p.grains, 3))
    length = np.linalg.norm(points, axis=1)
    points = points[length < surface(*(points / length[:, None]).T)][: p.grains]
    grid_middle = np.array([(fine - 1) / 2, (crop - 1) / 2, (crop - 1) / 2])
    seeds = (points + middle) * fine + grid_middle
    first = np.zeros(inside.shape, dtype=np.int16)
    second = np.zeros(inside.shape, dtype=np.int16)
    gap = np.zeros(inside.shape, dtype=np.float32)
    in_threads(len(inside), lambda a, b: _label(a, b, inside, seeds, first, second, gap))

    # Cracks follow some of the grain boundaries, wider towards the core; pores are small spheres.
    cracked = rng.random((p.grains, p.grains)) < 0.18
    cracked |= cracked.T
    opening = (0.010 * fine) * (1.3 - r / radius)
    inside &= ~(cracked[first, second] & (gap < opening))
    for _ in range(70):
        at = seeds[rng.integers(p.grains)] + rng.normal(0, 0.03 * fine, 3)
        size = float(rng.uniform(0.005, 0.018)) * fine
        lo = np.maximum(np.floor(at - size).astype(int), 0)
        hi = np.minimum(np.ceil(at + size).astype(int) + 1, inside.shape)
        if np.any(lo >= hi):
            continue
        box = np.ogrid[tuple(slice(a, b) for a, b in zip(lo, hi, strict=True))]
        ball = sum((g - c) ** 2 for g, c in zip(box, at, strict=True)) < size**2
        inside[tuple(slice(a, b) for a, b in zip(lo, hi, strict=True))] &= ~ball

    # Two satellites; the lower one leaves the field at the Mn energies, where it is 0.75 times as wide.
    satellites = np.zeros_like(inside)
    for sy, sz, sx, size in ((0.400, -0.05, 0.09, 0.022), (-0.345, 0.08, -0.07, 0.017)):
        satellites |= (y - sy) ** 2 + (z - sz) ** 2 + (x - sx) ** 2 < size**2

    # Composition: a linear trend along its own direction for each metal, and a scatter from grain to grain.
    position = {"y": y / radius, "z": z / radius, "x": x / radius}

    def trend(d: FloatArray) -> npt.NDArray[np.float32]:
        return np.asarray((d[0] * position["y"] + d[1] * position["z"] + d[2] * position["x"]), np.float32)

    directions = rng.normal(size=(4, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    # The valence changes across the direction in which the nickel share does: no correlation by construction.
    nickel = directions[2] - np.asarray(p.composition) @ directions[:3]
    nickel /= np.linalg.norm(nickel)
    directions[3] -= nickel * (nickel @ directions[3])
    directions[3] /= np.linalg.norm(directions[3])

    fraction = {}
    for metal, share, d in zip(METALS, p.composition, directions, strict=False):
        scatter = 1 + p.grain_scatter * rng.normal(size=p.grains).astype(np.float32)
        fraction[metal] = share * (1 + p.gradient * trend(d)) * scatter[first]
    total = sum(fraction.values())
    nickel_trend = fraction["Ni"] / total - p.composition[2]
    molar = DENSITY / (6.94 + 32.0 + sum(p.composition[i] * ATOMIC_MASS[m] for i, m in enumerate(METALS)))  # mol/cm3
    solid = inside | satellites
    metals = {m: np.where(solid, molar * ATOMIC_MASS[m] * fraction[m] / total, 0).astype(np.float32) for m in METALS}
    oxygen = np.where(solid, molar * 32.0, 0).astype(np.float32)
    valence = 0.5 * p.valence_range_ev * trend(directions[3]) * (1 - abs(p.valence_composition_coupling))
    valence += (
        0.5
        * p.valence_range_ev
        * p.valence_composition_coupling
        * nickel_trend
        / (max(p.gradient, 1e-3) * p.composition[2])
    )
    valence = np.clip(valence, -0.75 * p.valence_range_ev, 0.75 * p.valence_range_ev)
    return Particle(metals, oxygen, np.where(solid, valence, 0).astype(np.float32))


@_kernel
def _joseph(first: int, end: int, volume: Any, support: Any, cos: Any, sin: Any, out: Any) -> None:
    """Joseph's projector: volume (blocks, z, x, rows), out (blocks, angles, u, rows), one u per voxel."""
    _, nz, nx, rows = volume.shape
    nu = out.shape[2]
    cz, cx, cu = (nz - 1) / 2, (nx - 1) / 2, (nu - 1) / 2
    for job in range(first, end):
        b = job // cos.size
        a = job % cos.size
        c, s = cos[a], sin[a]
        along_z = abs(c) >= abs(s)  # step along z, interpolate in x, where the ray is steeper that way
        step = 1.0 / max(abs(c), abs(s))
        for u in range(nu):
            line = out[b, a, u]
            if along_z:
                for j in range(nz):
                    at = ((u - cu) - (j - cz) * s) / c + cx
                    k = int(math.floor(at))
                    if k < 0 or k + 1 >= nx or not (support[j, k] or support[j, k + 1]):
                        continue
                    f1 = np.float32((at - k) * step)
                    f0 = np.float32((1.0 - at + k) * step)
                    v0 = volume[b, j, k]
                    v1 = volume[b, j, k + 1]
                    for r in range(rows):
                        line[r] += f0 * v0[r] + f1 * v1[r]
            else:
                for k in range(nx):
                    at = ((u - cu) - (k - cx) * c) / s + cz
                    j = int(math.floor(at))
                    if j < 0 or j + 1 >= nz or not (support[j, k] or support[j + 1, k]):
                        continue
                    f1 = np.float32((at - j) * step)
                    f0 = np.float32((1.0 - at + j) * step)
                    v0 = volume[b, j, k]
                    v1 = volume[b, j + 1, k]
                    for r in range(rows):
                        line[r] += f0 * v0[r] + f1 * v1[r]


def project(volumes: list[npt.NDArray[np.float32]], theta_deg: FloatArray) -> npt.NDArray[np.float32]:
    """Project (y, z, x) volumes: (component, angle, y, u) line integrals in fine voxels."""
    ny, nz, nx = volumes[0].shape
    rows = 32
    blocks = math.ceil(ny / rows)
    t = np.deg2rad(theta_deg)
    cos, sin = np.cos(t), np.sin(t)
    out = np.empty((len(volumes), len(t), ny, nx), dtype=np.float32)
    for n, volume in enumerate(volumes):
        padded = np.zeros((blocks * rows, nz, nx), dtype=np.float32)
        padded[:ny] = volume
        blocked = np.ascontiguousarray(padded.reshape(blocks, rows, nz, nx).transpose(0, 2, 3, 1))
        lines = np.zeros((blocks, len(t), nx, rows), dtype=np.float32)
        support = np.any(volume != 0, axis=0)

        def work(a: int, b: int, v: Any = blocked, s: Any = support, o: Any = lines) -> None:
            _joseph(a, b, v, s, cos, sin, o)

        in_threads(blocks * len(t), work)
        out[n] = lines.transpose(1, 0, 3, 2).reshape(len(t), blocks * rows, nx)[:, :ny]
    return out


def metal_attenuation(p: TwinParameters, metal: str, energy_ev: FloatArray) -> FloatArray:
    """(energies,) cm2/g of a metal in the oxide, its nickel at no edge shift."""
    if metal == "Ni":
        background, step = _nickel(energy_ev)
        return background + step * ni_xanes(energy_ev)
    tabulated = mass_attenuation(metal, energy_ev)
    factor = p.white_line_mn if metal == "Mn" else p.white_line_co
    if factor == 1.0:
        return tabulated
    edge = edge_energy_ev(metal)
    near = (energy_ev >= edge) & (energy_ev <= edge + _WHITE_LINE_EV)
    background = _continued(metal, energy_ev)
    return np.asarray(np.where(near, background + factor * (tabulated - background), tabulated))


def _continued(metal: str, energy_ev: FloatArray) -> FloatArray:
    """Return the attenuation below the K edge, continued above it by its power law."""
    edge = edge_energy_ev(metal)
    below = np.array([edge - 400.0, edge - 5.0])
    slope, level = np.polyfit(np.log(below), np.log(mass_attenuation(metal, below)), 1)
    return np.asarray(np.exp(level + slope * np.log(energy_ev)))


def _nickel(energy: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Background and atomic step of nickel: the step is that of an energy just above the edge or higher."""
    ni_edge = edge_energy_ev("Ni")
    above = np.maximum(energy, ni_edge + 1.0)
    return _continued("Ni", energy), np.asarray(mass_attenuation("Ni", above) - _continued("Ni", above))


def attenuation(p: TwinParameters, particle: Particle) -> tuple[list[npt.NDArray[np.float32]], FloatArray]:
    """Return component volumes and their coefficients (energy, component) in 1/cm per unit of component.

    The Ni edge moves from voxel to voxel. Its dependence on the shift is expanded, for the energies at hand, in
    the few orthogonal functions that a singular value decomposition finds (relative error below 1e-4).
    """
    energy = np.asarray(p.energies_ev)
    volumes = [particle.metals["Mn"], particle.metals["Co"], particle.oxygen]
    columns = [*(metal_attenuation(p, m, energy) for m in ("Mn", "Co")), mass_attenuation("O", energy)]
    background, atomic_step = _nickel(energy)
    volumes.append(particle.metals["Ni"])
    columns.append(background)

    shifts = np.linspace(-0.8, 0.8, 65) * p.valence_range_ev
    table = atomic_step[:, None] * ni_xanes(energy[:, None], shifts[None, :])
    u, s, vt = np.linalg.svd(table, full_matrices=False)
    rank = max(1, int(np.sum(s > 1e-5 * s[0])))
    for k in range(rank):
        volumes.append(
            particle.metals["Ni"]
            * np.interp(particle.edge_shift_ev.ravel(), shifts, vt[k])
            .reshape(particle.edge_shift_ev.shape)
            .astype(np.float32)
        )
        columns.append(u[:, k] * s[k])
    return volumes, np.stack(columns, axis=1)


def truth_maps(
    p: TwinParameters, particle: Particle, others: dict[str, npt.NDArray[np.float32]]
) -> dict[str, npt.NDArray[np.float32]]:
    """Average the fine grid over the voxels of the common grid: arrays (n, n, n); `others` are added to the metals."""
    fine = round(p.n * FINE)
    crop = particle.oxygen.shape[1]

    def weights(length: int) -> npt.NDArray[np.float32]:
        edges_fine = (np.arange(length + 1) - length / 2) * (p.n / fine) + p.n / 2
        w = np.zeros((p.n, length), dtype=np.float32)
        for k in range(length):
            a, b = edges_fine[k], edges_fine[k + 1]
            for i in range(max(0, math.floor(a)), min(p.n, math.ceil(b))):
                w[i, k] = max(0.0, min(b, i + 1) - max(a, i))
        return w

    across, up = weights(crop), weights(fine)

    def average(v: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        half = np.matmul(np.matmul(across, v), across.T)
        return np.tensordot(up, half, axes=(1, 0)).astype(np.float32)

    maps = {m: average(particle.metals[m]) for m in METALS}
    for m, density in others.items():
        maps[m] += density
    nickel = maps["Ni"]
    moment = average(particle.metals["Ni"] * particle.edge_shift_ev)
    maps["density"] = maps["Mn"] + maps["Co"] + nickel
    edge = np.where(nickel > 1e-3, moment / np.maximum(nickel, 1e-3), 0)
    maps["edge_energy_relative"] = (edge - np.where(nickel > 1e-3, moment.sum() / nickel.sum(), 0)).astype(np.float32)
    return maps
