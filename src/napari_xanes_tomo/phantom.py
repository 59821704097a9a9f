"""The digital twin: an NMC-like battery particle measured by a virtual transmission X-ray microscope.

The twin is written as real ``.xrm`` files with the script, names and order of acquisition of TomoBank
``tomo_00089`` (doi 10.1088/1361-6501/aa9c19), and its truth beside it in the format of a run's output. Nothing
here is shared with the solver: the particle is drawn on a grid 1.5 times finer, projected by Joseph's method
(doi 10.1109/TMI.1982.4307572) and sampled by the point spread of the virtual detector.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import numba as nb
import numpy as np
import numpy.typing as npt

from .agreement import center_of_rotation
from .edges import edge_energy_ev, mass_attenuation
from .io.store import EnergyRow, MapSpec, MapStore, ShiftRow, write_energies, write_shifts
from .io.xrm import write_xrm
from .model import Alignment, FloatArray, Progress, XanesTomoError, no_progress
from .recipe import ScanParameters

__all__ = ["PRESETS", "Truth", "TwinParameters", "ni_xanes", "simulate", "write_twin"]

SIX_EV = (6534.0, 6558.0, 7704.0, 7728.0, 8178.0, 8570.0)
_EDGE_SCAN_EV = (8336.0, 8340.0, 8343.0, 8346.0, 8349.0, 8354.0, 8365.0)
_FINE = 1.5  # grid points of the particle per reference pixel
_ATOMIC_MASS = {"Mn": 54.938, "Co": 58.933, "Ni": 58.693}
_F = TypeVar("_F", bound=Callable[..., Any])
_METALS = ("Mn", "Co", "Ni")
_EDGE_AT_HALF_EV = 9.5  # E(0.5) of the oxide above the tabulated edge of the metal


@dataclass(frozen=True)
class TwinParameters:
    """What a twin is made of. Lengths in parts of the field of view at the reference energy."""

    n: int = 256
    n_angles: int = 180
    energies_ev: tuple[float, ...] = tuple(sorted((*SIX_EV, 8298.0, 8328.0, *_EDGE_SCAN_EV, 8400.0)))
    seed: int = 0
    grains: int = 200
    width: float = 0.6
    composition: tuple[float, float, float] = (0.3, 0.2, 0.5)  # atomic fractions of Mn, Co, Ni
    gradient: float = 0.10  # relative change of an element's share from the middle to the surface
    grain_scatter: float = 0.15  # standard deviation of an element's share from grain to grain, relative
    valence_range_ev: float = 2.0
    valence_composition_coupling: float = 0.0
    quanta: float = 9000.0  # per pixel of a flat
    counts_per_quantum: float = 0.137  # measured on real frames: variance = 14 + 0.137 * counts
    read_noise_counts: float = 3.7
    psf_px: float = 0.6
    illumination_drift: float = 0.035
    magnification_scatter: float = 3e-4
    jitter_px: tuple[float, float] = (2.0, 6.0)  # range of the rms, px of a 256 px frame
    jitter_peak_px: float = 20.0
    flats_per_set: int = 10

    @property
    def binning(self) -> int:
        """Camera binning that shows the same field in n columns (2 for 1024)."""
        return 2048 // self.n


PRESETS: dict[str, TwinParameters] = {
    "demo": TwinParameters(),
    "tiny": TwinParameters(n=64, n_angles=36, energies_ev=tuple(sorted((*SIX_EV, 8344.0, 8351.0)))),
}


@dataclass(frozen=True)
class Truth:
    """What the twin really is.

    Attributes
    ----------
    alignments : tuple of Alignment
        One an energy; common grid = pixels at the reference energy, in raw px.
    maps : dict of str to (n, n, n) float32 arrays (y, z, x)
        ``Mn, Co, Ni, density`` in g/cm3 and ``edge_energy_relative`` in eV (0 outside the particle).
    reference_ev : float
        Energy of the common grid.
    theta_deg : (angles,) array
        The same angles at every energy.
    """

    alignments: tuple[Alignment, ...]
    maps: dict[str, npt.NDArray[np.float32]]
    reference_ev: float
    theta_deg: FloatArray


def _kernel(function: _F) -> _F:
    """Compile for the machine at first use, kept on disk, without the GIL."""
    return cast(_F, nb.njit(cache=True, nogil=True, fastmath={"contract", "reassoc"})(function))


def _in_threads(n: int, work: Callable[[int, int], None]) -> None:
    """Run ``work(first, end)`` over n jobs in plain threads."""
    threads = os.cpu_count() or 1
    piece = max(1, -(-n // (8 * threads)))
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda a: work(a, min(a + piece, n)), range(0, n, piece)):
            pass


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


# ---------------------------------------------------------------------------------------------- the particle


@dataclass(frozen=True)
class _Particle:
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


def _draw_particle(p: TwinParameters, seed: np.random.SeedSequence) -> _Particle:
    """Draw the particle with its centre of mass in the middle of the grid.

    Where an object stands cannot be told from its projections; this is the place a run puts it to as well.
    """
    fine = round(p.n * _FINE)
    rough_size = max(48, fine // 3)
    middle = np.zeros(3)
    for _ in range(2):
        rough = _draw(p, np.random.default_rng(seed), rough_size, middle)
        mass = np.sum(list(rough.metals.values()), axis=0)
        for i, n in enumerate(mass.shape):
            profile = mass.sum(axis=tuple(k for k in range(3) if k != i))
            middle[i] -= float(profile @ (np.arange(n) - (n - 1) / 2) / rough_size / profile.sum())
    return _draw(p, np.random.default_rng(seed), fine, middle)


def _draw(p: TwinParameters, rng: np.random.Generator, fine: int, middle: FloatArray) -> _Particle:
    """Draw the particle on `fine` points across the field, moved by `middle` (y, z, x), parts of the field."""
    crop = min(fine, 2 * math.ceil(0.37 * fine))
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
    _in_threads(len(inside), lambda a, b: _label(a, b, inside, seeds, first, second, gap))

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
    for metal, share, d in zip(_METALS, p.composition, directions, strict=False):
        scatter = 1 + p.grain_scatter * rng.normal(size=p.grains).astype(np.float32)
        fraction[metal] = share * (1 + p.gradient * trend(d)) * scatter[first]
    total = sum(fraction.values())
    nickel_trend = fraction["Ni"] / total - p.composition[2]
    molar = 4.7 / (6.94 + 32.0 + sum(p.composition[i] * _ATOMIC_MASS[m] for i, m in enumerate(_METALS)))  # mol/cm3
    solid = inside | satellites
    metals = {m: np.where(solid, molar * _ATOMIC_MASS[m] * fraction[m] / total, 0).astype(np.float32) for m in _METALS}
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
    return _Particle(metals, oxygen, np.where(solid, valence, 0).astype(np.float32))


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


def _project(volumes: list[npt.NDArray[np.float32]], theta_deg: FloatArray) -> npt.NDArray[np.float32]:
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

        _in_threads(blocks * len(t), work)
        out[n] = lines.transpose(1, 0, 3, 2).reshape(len(t), blocks * rows, nx)[:, :ny]
    return out


# ------------------------------------------------------------------------------------------- the measurement


def _attenuation(p: TwinParameters, particle: _Particle) -> tuple[list[npt.NDArray[np.float32]], FloatArray]:
    """Return component volumes and their coefficients (energy, component) in 1/cm per unit of component.

    The Ni edge moves from voxel to voxel. Its dependence on the shift is expanded, for the energies at hand, in
    the few orthogonal functions that a singular value decomposition finds (relative error below 1e-4).
    """
    energy = np.asarray(p.energies_ev)
    ni_edge = edge_energy_ev("Ni")
    volumes = [particle.metals["Mn"], particle.metals["Co"], particle.oxygen]
    columns = [mass_attenuation(e, energy) for e in ("Mn", "Co", "O")]

    # The atomic background below the edge, continued above it by its power law.
    below = np.array([ni_edge - 400.0, ni_edge - 5.0])
    slope, level = np.polyfit(np.log(below), np.log(mass_attenuation("Ni", below)), 1)
    background = np.exp(level + slope * np.log(energy))
    atomic_step = mass_attenuation("Ni", np.maximum(energy, ni_edge + 1.0)) - np.exp(
        level + slope * np.log(np.maximum(energy, ni_edge + 1.0))
    )
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


def _true_alignments(p: TwinParameters, theta_deg: FloatArray, rng: np.random.Generator) -> tuple[Alignment, ...]:
    """Draw the motion: random walk + run-out + white noise + a jump at the flats, a field shift per energy."""
    law = ScanParameters()
    size = law.pixel_law_slope_nm_per_ev * np.asarray(p.energies_ev) + law.pixel_law_offset_nm
    reference = int(np.argmax(p.energies_ev))
    magnification = size[reference] / size * (1 + p.magnification_scatter * rng.normal(size=len(size)))
    magnification[reference] = 1.0
    scale = p.n / 256
    n = len(theta_deg)
    t = np.deg2rad(theta_deg)
    second = np.arange(n) >= n // 2
    harmonics = rng.normal(size=(2, 3, 2)) / np.array([1.0, 2.0, 3.0])[None, :, None]
    run_out = np.stack(
        [sum(h[k, 0] * np.cos((k + 1) * t) + h[k, 1] * np.sin((k + 1) * t) for k in range(3)) for h in harmonics],
        axis=1,
    )
    alignments = []
    for m in magnification:
        walk = np.cumsum(rng.normal(size=(n, 2)), axis=0)
        walk -= walk.mean(axis=0)
        motion = 1.2 * run_out + 2.5 * walk / walk.std(axis=0) + 0.7 * rng.normal(size=(n, 2))
        motion += second[:, None] * rng.uniform(2.0, 6.0, 2) * rng.choice([-1.0, 1.0], 2)
        motion -= motion.mean(axis=0)
        motion *= rng.uniform(*p.jitter_px, 2) / motion.std(axis=0)
        motion *= np.minimum(1.0, p.jitter_peak_px / np.abs(motion).max(axis=0))
        field = rng.uniform(-4.0, 4.0, 2)  # contains the centre of rotation in x
        shift = (motion + field) * scale
        alignments.append(Alignment(shift, np.zeros_like(shift), float(m), 0.0))
    return tuple(alignments)


def _sampling(n: int, fine: int, crop: int, magnification: float, shift: float, psf_px: float) -> FloatArray:
    """(n, crop) weights that turn fine samples into detector pixels: a Gaussian and the pixel's own box."""
    from scipy.special import erf

    pixel = np.arange(n) - (n - 1) / 2
    q = (np.arange(crop) - (crop - 1) / 2) * (n / fine)
    d = pixel[:, None] - shift - magnification * q[None, :]
    a = math.sqrt(2.0) * psf_px
    box = 0.5 * (erf((d + 0.5) / a) - erf((d - 0.5) / a))
    return np.asarray(box * (magnification * n / fine), dtype=np.float32)


def _flat_field(p: TwinParameters, rng: np.random.Generator) -> FloatArray:
    """(n, n) quanta of the bare beam: vignette, a tilt, a fixed pattern and some dust; mean `quanta`."""
    from scipy.ndimage import gaussian_filter

    c = (np.arange(p.n) - (p.n - 1) / 2) / p.n
    y, x = c[:, None], c[None, :]
    field = 1 - 0.55 * (y**2 + x**2) - 0.10 * x + 0.06 * y
    field = field * (1 + 0.02 * gaussian_filter(rng.normal(size=(p.n, p.n)), 2.0 * p.n / 256) * 7.0)
    for _ in range(8):
        dy, dx = rng.uniform(-0.48, 0.48, 2)
        field = field * (1 - 0.15 * np.exp(-((y - dy) ** 2 + (x - dx) ** 2) / (2 * 0.006**2)))
    return np.asarray(p.quanta * field / field.mean())


def _expose(quanta: FloatArray, p: TwinParameters, rng: np.random.Generator) -> npt.NDArray[np.uint16]:
    counts = p.counts_per_quantum * rng.poisson(quanta) + p.read_noise_counts * rng.standard_normal(quanta.shape)
    return np.clip(np.rint(counts), 0, 65535).astype(np.uint16)


def _illumination(p: TwinParameters, rng: np.random.Generator) -> FloatArray:
    """(2, 91 or so, 3) level, slope in y, slope in x over each half of the scan: smooth, a few per cent."""
    n = p.n_angles // 2 + 1
    time = np.linspace(0, 1, n)
    out = np.empty((2, n, 3))
    for half in range(2):
        for k in range(3):
            a, b, c = rng.normal(size=3)
            curve = a * time + 0.5 * b * np.sin(math.pi * time) + 0.25 * c * np.sin(2 * math.pi * time)
            out[half, :, k] = p.illumination_drift * curve / max(1.0, float(np.abs(curve).max()))
    return out


@contextmanager
def _one_blas_thread() -> Iterator[None]:
    """Frames run side by side; a BLAS with threads of its own would only get in the way."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        yield
        return
    with threadpool_limits(1):
        yield


@dataclass(frozen=True)
class _Energy:
    """The frames of one energy: projections (angles, n, n) and flats (sets, shots, n, n), counts."""

    index: int
    projections: npt.NDArray[np.uint16]
    flats: npt.NDArray[np.uint16]


def simulate(parameters: TwinParameters, *, progress: Progress = no_progress) -> tuple[Truth, Iterator[_Energy]]:
    """Draw a particle and measure it.

    Returns
    -------
    truth : Truth
        Shifts, magnifications and maps.
    measurement : iterator
        One item an energy, in the order of `energies_ev`, with ``index``, ``projections`` (angle, y, x) and
        ``flats`` (set, shot, y, x) as uint16 counts. The same seed gives the same bytes on one machine.
    """
    p = parameters
    root = np.random.SeedSequence(p.seed)
    particle_seed, motion_seed, beam_seed, *noise_seeds = root.spawn(3 + len(p.energies_ev))
    theta = -90.0 + np.arange(p.n_angles) * (180.0 / p.n_angles)
    particle = _draw_particle(p, particle_seed)
    progress("particle", 1, 3)
    alignments = _true_alignments(p, theta, np.random.default_rng(motion_seed))
    volumes, coefficients = _attenuation(p, particle)
    maps = _truth_maps(p, particle)
    lines = _project(volumes, theta)
    del volumes
    progress("projecting", 2, 3)
    beam = np.random.default_rng(beam_seed)
    field = _flat_field(p, beam)
    drifts = [_illumination(p, beam) for _ in p.energies_ev]

    law = ScanParameters()
    reference_ev = max(p.energies_ev)
    pixel_nm = p.binning * (law.pixel_law_slope_nm_per_ev * reference_ev + law.pixel_law_offset_nm)
    fine = round(p.n * _FINE)
    to_cm = pixel_nm * 1e-7 * p.n / fine
    c = ((np.arange(p.n) - (p.n - 1) / 2) / p.n * 2).astype(float)
    _, n_angles, ny, nu = lines.shape

    def measure() -> Iterator[_Energy]:
        with _one_blas_thread(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for e, alignment in enumerate(alignments):
                seeds = noise_seeds[e].spawn(n_angles + 2)
                weights = (coefficients[e] * to_cm).astype(np.float32)
                level, drift = 1 + 0.01 * math.sin(e), drifts[e]

                def one(
                    i: int,
                    e: int = e,
                    a: Alignment = alignment,
                    w: Any = weights,
                    d: Any = drift,
                    g: float = level,
                    s: Any = seeds,
                ) -> npt.NDArray[np.uint16]:
                    line = np.tensordot(w, lines[:, i], 1)
                    absorbed = -np.expm1(-line)
                    rows = _sampling(p.n, fine, ny, a.magnification, float(a.shift[i, 0]), p.psf_px)
                    columns = _sampling(p.n, fine, nu, a.magnification, float(a.shift[i, 1]), p.psf_px)
                    transmitted = 1 - rows @ absorbed @ columns.T
                    half = int(i >= n_angles // 2)
                    now = d[half, 1 + i - half * (n_angles // 2)]
                    beam_now = field * g * (1 + now[0] + now[1] * c[:, None] + now[2] * c[None, :])
                    return _expose(beam_now * transmitted, p, np.random.default_rng(s[i]))

                projections = np.stack(list(pool.map(one, range(n_angles))))

                def flat_set(half: int, d: Any = drift, g: float = level, s: Any = seeds) -> npt.NDArray[np.uint16]:
                    rng = np.random.default_rng(s[n_angles + half])
                    now = d[half, 0]
                    bare = field * g * (1 + now[0] + now[1] * c[:, None] + now[2] * c[None, :])
                    shots = 1 + 0.003 * rng.normal(size=p.flats_per_set)
                    return np.stack([_expose(bare * shot, p, rng) for shot in shots])

                yield _Energy(e, projections, np.stack([flat_set(0), flat_set(1)]))

    return Truth(alignments, maps, reference_ev, theta), measure()


def _truth_maps(p: TwinParameters, particle: _Particle) -> dict[str, npt.NDArray[np.float32]]:
    """Average the fine grid over the voxels of the common grid: arrays (n, n, n)."""
    fine = round(p.n * _FINE)
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

    maps = {m: average(particle.metals[m]) for m in _METALS}
    nickel = maps["Ni"]
    moment = average(particle.metals["Ni"] * particle.edge_shift_ev)
    maps["density"] = maps["Mn"] + maps["Co"] + nickel
    edge = np.where(nickel > 1e-3, moment / np.maximum(nickel, 1e-3), 0)
    maps["edge_energy_relative"] = (edge - np.where(nickel > 1e-3, moment.sum() / nickel.sum(), 0)).astype(np.float32)
    return maps


# ------------------------------------------------------------------------------------------------- the files


def write_twin(
    path: str | os.PathLike[str],
    preset: str = "demo",
    *,
    seed: int | None = None,
    parameters: TwinParameters | None = None,
    progress: Progress = no_progress,
) -> Path:
    """Write a twin as a scan folder with its truth in ``truth/``; return the folder.

    Parameters
    ----------
    path : path
        A new or empty folder, or one that holds this very twin already (then nothing is done).
    preset : {"tiny", "demo"}
        64 px x 36 angles x 8 energies, or 256 px x 180 angles x 16 energies.
    seed : int, optional
        Another particle, motion and noise.
    parameters : TwinParameters, optional
        Used instead of the preset.
    progress : callable
        See `Progress`.

    Raises
    ------
    XanesTomoError
        The preset is unknown, or the folder holds something else or cannot be written.
    """
    folder = Path(path)
    if parameters is None:
        if preset not in PRESETS:
            raise XanesTomoError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
        parameters = PRESETS[preset]
    if seed is not None:
        parameters = replace(parameters, seed=seed)
    p = parameters
    wanted = json.loads(json.dumps(asdict(p)))
    mark = folder / "truth" / "twin.json"
    name = f"twin_s{p.seed:03d}"
    try:
        if mark.exists():
            state = _state(mark)
            if state.get("parameters") == wanted and state.get("complete"):
                return folder
            if state.get("parameters") != wanted:
                raise XanesTomoError(f"{folder.name}: holds another twin; give a new folder")
        elif folder.exists() and any(folder.iterdir()):
            raise XanesTomoError(f"{folder.name}: expected a new or empty folder, it holds other files")
        (folder / "truth" / "tables").mkdir(parents=True, exist_ok=True)
        mark.write_text(json.dumps({"parameters": wanted, "complete": False}))
        truth, measurement = simulate(p, progress=progress)
        (folder / f"{name}_3DXANES_TOMO-XANES.txt").write_bytes(_script(p, name, truth.theta_deg).encode("ascii"))
        for frames in measurement:
            _write_energy(folder, name, p, truth.theta_deg, frames)
            progress("twin", frames.index + 1, len(p.energies_ev))
        _write_truth(folder / "truth", p, truth)
        mark.write_text(json.dumps({"parameters": wanted, "complete": True}))
    except OSError as error:
        raise XanesTomoError(f"{folder.name}: cannot write the twin ({error.strerror or error})") from None
    return folder


def _state(mark: Path) -> dict[str, Any]:
    """Read what a twin was made with; a mark cut short by a crash or not of ours tells nothing."""
    try:
        found = json.loads(mark.read_text())
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


def _flat_name(name: str, counter: int, shot: int, shots: int, theta: float) -> str:
    return f"rep01_ref_{counter:05d}_{name}_{theta:07.2f}_Degree_{shot + 1:03d}of{shots:03d}.xrm"


def _projection_name(name: str, counter: int, theta: float, energy_ev: float) -> str:
    return f"rep01_{counter:05d}_{name}_{theta:07.2f}_Degree_{energy_ev:08.2f}_eV_001of001.xrm"


def _script(p: TwinParameters, name: str, theta_deg: FloatArray) -> str:
    lines = [";; TOMO XANES ;;", "setexp 0.50", f"setbinning {p.binning}"]
    counter = flat_counter = 0
    last_theta = 0.0
    half = p.n_angles // 2
    for energy in p.energies_ev:
        lines += [
            ";; set the MONO and the ZP ;;",
            f"sete {energy:.2f}",
            f"moveto zpx {7.19 * (8570 - energy) - 0.5:.2f}",
            f"moveto zpy {-0.78 * (8570 - energy) - 0.2:.2f}",
            f"moveto zpz {-226.76 + 5.02 * (energy - 8570):.2f}",
            ";;;;;;;;;; TOMO data collection at a certain energy ;;;;;;;;;;;;;;",
        ]
        for start in (0, half):
            lines += ["moveto x -405.65", "moveto y 2291.50", "setexp 0.50", f"setbinning {p.binning}"]
            for shot in range(p.flats_per_set):
                lines.append(f"collect {_flat_name(name, flat_counter, shot, p.flats_per_set, last_theta)}")
                flat_counter += 1
            lines += ["setexp 0.50", f"setbinning {p.binning}"]
            for theta in theta_deg[start : half if start == 0 else None]:
                lines += [f"moveto t {theta:.2f}", "moveto x -205.85", "moveto y 2291.50", "moveto z 264.25"]
                lines.append(f"collect {_projection_name(name, counter, float(theta), energy)}")
                counter += 1
                last_theta = float(theta)
    return "\r\n".join(lines) + "\r\n"


def _write_energy(folder: Path, name: str, p: TwinParameters, theta_deg: FloatArray, frames: _Energy) -> None:
    energy = p.energies_ev[frames.index]
    half = p.n_angles // 2
    per_energy = p.n_angles + 2 * p.flats_per_set
    start = 1_491_500_000.0 + frames.index * per_energy * 2.0
    common: dict[str, Any] = {"exposure_s": 0.5, "binning": p.binning, "pixel_size_um": 0.023}
    order: list[tuple[str, npt.NDArray[np.uint16], float, float]] = []
    last = 0.0 if frames.index == 0 else float(theta_deg[-1])
    for h in range(2):
        for shot in range(p.flats_per_set):
            counter = (2 * frames.index + h) * p.flats_per_set + shot
            order.append((_flat_name(name, counter, shot, p.flats_per_set, last), frames.flats[h, shot], last, -405.65))
        for i in range(h * half, half if h == 0 else p.n_angles):
            counter = frames.index * p.n_angles + i
            theta = float(theta_deg[i])
            order.append((_projection_name(name, counter, theta, energy), frames.projections[i], theta, -205.85))
            last = theta

    def write(k: int) -> None:
        file, frame, theta, x = order[k]
        write_xrm(
            folder / file,
            frame,
            theta_deg=theta,
            x_um=x,
            y_um=2291.50,
            z_um=264.25,
            date=start + 2.0 * k,
            **common,
        )

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, range(len(order))))


def _write_truth(folder: Path, p: TwinParameters, truth: Truth) -> None:
    law = ScanParameters()
    write_shifts(
        folder / "tables" / "shifts.csv",
        (
            ShiftRow(energy, float(theta), i, float(dy), float(dx), 0.0, 0.0, a.magnification, a.roll_deg)
            for energy, a in zip(p.energies_ev, truth.alignments, strict=True)
            for i, (theta, (dy, dx)) in enumerate(zip(truth.theta_deg, a.shift, strict=True))
        ),
    )
    rows = []
    pixel_nm = 0.0
    for energy, a in zip(p.energies_ev, truth.alignments, strict=True):
        size = p.binning * (law.pixel_law_slope_nm_per_ev * energy + law.pixel_law_offset_nm)
        pixel_nm = size if energy == truth.reference_ev else pixel_nm
        rows.append(
            EnergyRow(
                energy_ev=energy,
                magnification=a.magnification,
                magnification_sigma=0.0,
                roll_deg=a.roll_deg,
                center_px=center_of_rotation(a.shift[:, 1], truth.theta_deg)[0],
                pixel_size_nm=size,
                reference=energy == truth.reference_ev,
                status="ok",
            )
        )
    write_energies(folder / "tables" / "energies.csv", rows)
    specs = [MapSpec(name, "eV" if name.startswith("edge") else "g/cm3", "truth") for name in truth.maps]
    store = MapStore(folder / "maps.ome.zarr", (p.n, p.n, p.n), pixel_nm, specs, slab_rows=32)
    store.create()
    for y0, y1 in store.pending():
        store.write(y0, {name: data[y0:y1] for name, data in truth.maps.items()})
    store.finish(metadata={"truth": True})
