"""The virtual microscope: motion, optics, and the measurement."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from napari_xanes_tomo.model import Alignment, FloatArray, Progress, no_progress
from napari_xanes_tomo.parallel import one_blas_thread
from napari_xanes_tomo.recipe import ScanParameters

from .camera import Camera, Lines, draw_beam, draw_faults, draw_illumination, recorded_beam
from .parameters import TwinParameters
from .particle import FINE, METALS, attenuation, draw_particle, project, truth_maps
from .scene import draw_scene, oxide

__all__ = ["BadFrame", "Energy", "Instrument", "Truth", "draw_motion", "simulate"]

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Instrument:
    """One energy as the microscope was.

    Attributes
    ----------
    energy_ev : float
    instrument_magnification : float
        Of the optics, relative to the reference energy.
    object_scale : float
        Size of the object relative to its size at the reference energy. The magnification of the truth tables is the
        product of the two: no projection tells them apart.
    psf_px : float
        Standard deviation of the point spread, recorded pixels.
    angle_offset_deg : float
        True minus recorded angle, besides what all energies share.
    slip_from, slip_y_px, slip_x_px
        First projection (or -1) and displacement of a slip; contained in the shifts.
    """

    energy_ev: float
    instrument_magnification: float
    object_scale: float
    psf_px: float
    angle_offset_deg: float = 0.0
    slip_from: int = -1
    slip_y_px: float = 0.0
    slip_x_px: float = 0.0


@dataclass(frozen=True)
class BadFrame:
    """A projection that went wrong: its number within its energy, how, and by how much."""

    energy_ev: float
    frame: int
    kind: str
    detail: str


@dataclass(frozen=True)
class Truth:
    """What the twin really is.

    Attributes
    ----------
    alignments : tuple of Alignment
        One an energy; common grid = pixels at the reference energy, in raw px of that energy. The magnification is that
        of the object: optics, shrinkage and another binning together.
    maps : dict of str to (n, n, n) float32 arrays (y, z, x)
        ``Mn, Co, Ni, density`` in g/cm3 and ``edge_energy_relative`` in eV (0 outside the particle).
    reference_ev : float
        Energy of the common grid.
    theta_deg : (angles,) array
        The angles as recorded, the same at every energy.
    instrument : tuple of Instrument
        One an energy.
    bad : tuple of BadFrame
        Every projection that went wrong.
    """

    alignments: tuple[Alignment, ...]
    maps: dict[str, npt.NDArray[np.float32]]
    reference_ev: float
    theta_deg: FloatArray
    instrument: tuple[Instrument, ...] = ()
    bad: tuple[BadFrame, ...] = ()


@dataclass(frozen=True)
class Energy:
    """The frames of one energy: projections (angles, n, n) and flats (sets, shots, n, n), counts."""

    index: int
    projections: npt.NDArray[np.uint16]
    flats: npt.NDArray[np.uint16]


def _recorded_angles(p: TwinParameters) -> FloatArray:
    return np.asarray(-90.0 + np.arange(p.n_angles) * (180.0 / p.n_angles))


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


def _disturbed(
    p: TwinParameters, alignments: tuple[Alignment, ...], rng: np.random.Generator
) -> tuple[tuple[Alignment, ...], tuple[Instrument, ...]]:
    """Add slips, other optics and shrinkage to the motion; what every energy was like."""
    energy = np.asarray(p.energies_ev)
    count, reference = len(energy), int(np.argmax(energy))
    above = (energy - energy[reference]) / 1000
    optics = np.array([a.magnification for a in alignments])
    optics = optics * (1 + p.magnification_linear * above + p.magnification_quadratic * above**2)
    others = [e for e in range(count) if e != reference] or [reference]

    def one(named: float) -> int:
        drawn = int(rng.choice(others))
        return int(np.flatnonzero(energy == named)[0]) if named else drawn

    refocused, turned = one(p.refocus_ev), one(p.angle_offset_ev)
    optics[refocused] *= 1 + p.refocus_jump
    optics /= optics[reference]
    size = 1 - p.shrinkage * np.arange(count) / max(1, count - 1)
    size /= size[reference]
    psf = np.hypot(p.psf_px, p.focus_blur_px * rng.uniform(size=count))
    slip_angle = rng.uniform(0, 2 * math.pi, count)
    out, instrument = [], []
    for e, a in enumerate(alignments):
        slips = p.slip_px != 0 and (not p.slip_energies_ev or p.energies_ev[e] in p.slip_energies_ev)
        slip = p.slip_px * p.n / 256 * slips * np.array([math.sin(slip_angle[e]), math.cos(slip_angle[e])])
        shift = a.shift + (np.arange(len(a.shift)) >= p.slip_from)[:, None] * slip
        magnification = float(optics[e] * size[e])
        out.append(replace(a, shift=shift, magnification=magnification))
        offset = p.angle_offset_deg if e == turned else 0.0
        at = p.slip_from if slips else -1
        instrument.append(
            Instrument(p.energies_ev[e], float(optics[e]), float(size[e]), float(psf[e]), offset, at, *map(float, slip))
        )
    return tuple(out), tuple(instrument)


def draw_motion(parameters: TwinParameters) -> tuple[tuple[Alignment, ...], tuple[Instrument, ...]]:
    """Draw only what moves: the true alignment and the optics of every energy, as `simulate` has them."""
    p = parameters
    root = np.random.SeedSequence(p.seed)
    _, motion_seed, *_ = root.spawn(3 + len(p.energies_ev))
    _, optics_seed, *_ = root.spawn(2 + len(p.energies_ev))
    motion = _true_alignments(p, _recorded_angles(p), np.random.default_rng(motion_seed))
    moved, instrument = _disturbed(p, motion, np.random.default_rng(optics_seed))
    own = tuple(
        replace(a, shift=a.shift / p.pixel(e), magnification=a.magnification / p.pixel(e)) for e, a in enumerate(moved)
    )
    return own, instrument


def simulate(parameters: TwinParameters, *, progress: Progress = no_progress) -> tuple[Truth, Iterator[Energy]]:
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
    particle_seed, _, beam_seed, *noise_seeds = root.spawn(3 + len(p.energies_ev))
    scene_seed, _, *fault_seeds = root.spawn(2 + len(p.energies_ev))
    theta = _recorded_angles(p)
    second_half = np.arange(p.n_angles) >= p.n_angles // 2
    true_theta = theta[0] + (theta - theta[0]) * (1 + p.angle_step_error) + p.half_angle_offset_deg * second_half
    particle = draw_particle(p, particle_seed)
    progress("particle", 1, 3)
    alignments, instrument = draw_motion(p)
    faults = [draw_faults(p, np.random.default_rng(s)) for s in fault_seeds]
    bad = tuple(
        BadFrame(energy, frame, found.kind, found.detail)
        for energy, of_energy in zip(p.energies_ev, faults, strict=True)
        for frame, found in sorted(of_energy.items())
    )
    alignments = tuple(
        replace(a, status=tuple(f"excluded:{f[i].kind}" if i in f else "ok" for i in range(len(theta))))
        for a, f in zip(alignments, faults, strict=True)
    )
    drawn = draw_scene(p, np.random.default_rng(scene_seed))
    scene = drawn if p.post > 0 or p.capillary_radius > 0 or p.neighbours else None
    volumes, coefficients = attenuation(p, particle)
    others = {m: drawn.occupied() * np.float32(oxide(p)[m]) for m in METALS} if p.neighbours else {}
    maps = truth_maps(p, particle, others)
    lines = project(volumes, true_theta)
    turned = {
        e: project([np.asarray(sum(np.float32(c) * v for c, v in zip(coefficients[e], volumes, strict=True)))], t)
        for e, t in ((e, true_theta + k.angle_offset_deg) for e, k in enumerate(instrument) if k.angle_offset_deg)
    }
    del volumes
    progress("projecting", 2, 3)
    rng = np.random.default_rng(beam_seed)
    beam = draw_beam(p, rng)
    drifts = [draw_illumination(p, rng) for _ in p.energies_ev]

    law = ScanParameters()
    reference_ev = max(p.energies_ev)
    pixel_nm = p.binning * (law.pixel_law_slope_nm_per_ev * reference_ev + law.pixel_law_offset_nm)
    field_cm = pixel_nm * 1e-7 * p.n
    to_cm = field_cm / round(p.n * FINE)
    glass = drawn.attenuation() * field_cm
    width = [p.pixel(e) for e in range(len(p.energies_ev))]
    furthest = max(w * float(np.abs(a.shift).max()) for w, a in zip(width, alignments, strict=True))
    furthest += p.n / 2 if bad else 0
    least = min(1.0, *(w * a.magnification for w, a in zip(width, alignments, strict=True)))
    reach = (1 + 2 * (furthest + 8) / p.n) / least

    def camera(e: int) -> Camera:
        if e in turned:
            table, weights = turned[e], np.array([to_cm], dtype=np.float32)
        else:
            table, weights = lines, (coefficients[e] * to_cm).astype(np.float32)
        # The mass stays where the object shrinks: what a ray passes through grows as 1 / scale^2.
        density = Lines(
            p, table, weights, scene, glass[e].astype(np.float32), reach, 1 / instrument[e].object_scale ** 2
        )
        return Camera(
            p,
            alignments[e],
            instrument[e].psf_px / width[e],
            width[e],
            recorded_beam(beam, width[e]) * (1 + 0.01 * math.sin(e)),
            drifts[e],
            density,
            true_theta + instrument[e].angle_offset_deg,
            faults[e],
            noise_seeds[e].spawn(p.n_angles + 2),
        )

    def measure() -> Iterator[Energy]:
        with one_blas_thread(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for e in range(len(p.energies_ev)):
                seen = camera(e)
                projections = np.stack(list(pool.map(seen.projection, range(p.n_angles))))
                yield Energy(e, projections, np.stack([seen.flats(0), seen.flats(1)]))

    return Truth(alignments, maps, reference_ev, theta, instrument, bad), measure()
