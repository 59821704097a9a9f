"""The virtual microscope: motion, beam, camera, and what goes wrong in them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from napari_xanes_tomo.model import Alignment, FloatArray, Progress, no_progress
from napari_xanes_tomo.parallel import one_blas_thread
from napari_xanes_tomo.recipe import ScanParameters

from .parameters import TwinParameters
from .particle import FINE, METALS, attenuation, draw_particle, project, truth_maps
from .scene import Scene, draw_scene, oxide

__all__ = ["BadFrame", "Energy", "Instrument", "Truth", "draw_motion", "simulate"]

F32 = npt.NDArray[np.float32]
_EXPOSURES = 9  # positions a motion-blurred frame is the mean of


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


# ------------------------------------------------------------------------------------------------- motion, optics


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
    theta = -90.0 + np.arange(p.n_angles) * (180.0 / p.n_angles)
    motion = _true_alignments(p, theta, np.random.default_rng(motion_seed))
    moved, instrument = _disturbed(p, motion, np.random.default_rng(optics_seed))
    own = tuple(
        replace(a, shift=a.shift / p.pixel(e), magnification=a.magnification / p.pixel(e)) for e, a in enumerate(moved)
    )
    return own, instrument


@dataclass(frozen=True)
class _Fault:
    """How one projection goes wrong; the neutral values change nothing."""

    kind: str = ""
    beam: float = 1.0
    plateau: float = math.inf  # counts
    source: int = -1  # the projection it is a copy of
    move: tuple[float, float] = (0.0, 0.0)  # px
    blur: tuple[float, float] = (0.0, 0.0)  # px, from the first to the last position
    empty: bool = False

    @property
    def detail(self) -> str:
        return {
            "beam loss": f"{self.beam:.3f} of the beam",
            "saturated": f"{self.beam:.2f} times the beam, cut at {self.plateau:.0f} counts",
            "duplicate": f"of projection {self.source}",
            "displaced": f"by ({self.move[0]:.1f}, {self.move[1]:.1f}) px",
            "motion-blurred": f"along ({self.blur[0]:.1f}, {self.blur[1]:.1f}) px",
        }.get(self.kind, "")


def _faults(p: TwinParameters, rng: np.random.Generator) -> dict[int, _Fault]:
    """Draw which projections of one energy go wrong and how; every kind in turn."""
    n = round(p.bad_fraction * p.n_angles)
    which = rng.permutation(p.n_angles)[:n]
    first = int(rng.integers(len(p.bad_kinds)))
    out: dict[int, _Fault] = {}
    for k, frame in enumerate(which.tolist()):
        kind = p.bad_kinds[(first + k) % len(p.bad_kinds)]
        angle, part = float(rng.uniform(0, 2 * math.pi)), float(rng.uniform())
        if kind == "beam loss":
            out[frame] = _Fault(kind, beam=0.03 + 0.32 * part)
        elif kind == "black":
            out[frame] = _Fault(kind, beam=0.0)
        elif kind == "saturated":
            beam = 2 + 4 * part
            plateau = round(float(rng.uniform(0.4, 0.8)) * beam * p.quanta * p.counts_per_quantum)
            out[frame] = _Fault(kind, beam=beam, plateau=plateau)
        elif kind == "duplicate":
            good = sorted(set(range(p.n_angles)) - set(which.tolist()))
            before = frame - 1 if frame - 1 in good and part < 0.5 else int(rng.choice(good))
            out[frame] = _Fault(kind, source=before)
        elif kind == "displaced":
            half = p.n / 2 * (1 if angle > math.pi else -1)
            out[frame] = _Fault(kind, move=(half, 0.0) if part < 0.5 else (0.0, half))
        elif kind == "motion-blurred":
            length = (6 + 8 * part) * p.n / 256
            out[frame] = _Fault(kind, blur=(length * math.sin(angle), length * math.cos(angle)))
        else:
            out[frame] = _Fault(kind, empty=True)
    return out


def _sampling(n: int, fine: int, crop: int, magnification: float, shift: float, psf_px: float) -> F32:
    """(n, crop) weights that turn samples, `fine` of them to the field, into pixels: a Gaussian and the pixel's box."""
    from scipy.special import erf

    pixel = np.arange(n) - (n - 1) / 2
    q = (np.arange(crop) - (crop - 1) / 2) * (n / fine)
    d = pixel[:, None] - shift - magnification * q[None, :]
    a = math.sqrt(2.0) * psf_px
    near = np.abs(d) < 0.5 + 6 * a  # beyond it both error functions are 1 in double precision
    d = d[near]
    box = np.zeros((n, crop), dtype=np.float32)
    box[near] = 0.5 * (erf((d + 0.5) / a) - erf((d - 0.5) / a)) * (magnification * n / fine)
    return box


# ---------------------------------------------------------------------------------------------------- beam, camera


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


def _expose(
    quanta: FloatArray, p: TwinParameters, rng: np.random.Generator, plateau: float = math.inf
) -> npt.NDArray[np.uint16]:
    counts = p.counts_per_quantum * rng.poisson(quanta) + p.read_noise_counts * rng.standard_normal(quanta.shape)
    return np.clip(np.rint(counts), 0, min(plateau, 65535)).astype(np.uint16)


def _with_stray(quanta: FloatArray, p: TwinParameters) -> FloatArray:
    if not p.stray_counts and not p.stray_fraction:
        return quanta
    return np.asarray(quanta + p.stray_counts / p.counts_per_quantum + p.stray_fraction * quanta.mean())


def _recorded(field: FloatArray, pixel: float) -> FloatArray:
    """Return the quanta of a bare beam (y, x) in pixels that are `pixel` times as wide."""
    if pixel < 1:
        k = round(1 / pixel)
        return np.asarray(np.repeat(np.repeat(field, k, axis=0), k, axis=1) / k**2)
    k = round(pixel)
    n = len(field) // k
    return np.asarray(field.reshape(n, k, n, k).sum(axis=(1, 3)))


def _reached(p: TwinParameters) -> FloatArray:
    """(n, 1) part of every row that the beam reaches."""
    return np.asarray(np.clip((1 - p.dark_band) * p.n - np.arange(p.n), 0, 1)[:, None])


def _illumination(p: TwinParameters, rng: np.random.Generator) -> FloatArray:
    """(2, 91 or so, 3) level, slope in y, slope in x over each half of the scan: smooth, a few per cent."""
    n = (p.n_angles + 1) // 2 + 1  # an odd number of projections: the second half has one more
    time = np.linspace(0, 1, n)
    out = np.empty((2, n, 3))
    for half in range(2):
        for k in range(3):
            a, b, c = rng.normal(size=3)
            curve = a * time + 0.5 * b * np.sin(math.pi * time) + 0.25 * c * np.sin(2 * math.pi * time)
            out[half, :, k] = p.illumination_drift * curve / max(1.0, float(np.abs(curve).max()))
    return out


class _Lines:
    """Optical density on the fine grid along every ray of a projection, at one energy."""

    def __init__(
        self, p: TwinParameters, lines: F32, weights: F32, scene: Scene | None, glass: F32, reach: float, scale: float
    ) -> None:
        self.lines, self.weights, self.glass, self.scale = lines, weights, glass, scale
        ny, nu = lines.shape[2:]
        fine = round(p.n * FINE)
        self.scene = scene
        if scene is not None:  # what is not confined to the particle's own grid must cover the detector
            more = [max(0, math.ceil((reach * fine - size) / 2)) for size in (ny, nu)]
            self.pad = more
            ny, nu = ny + 2 * more[0], nu + 2 * more[1]
            self.y, self.u = ((np.arange(size) - (size - 1) / 2) / fine for size in (ny, nu))
        self.shape = (ny, nu)

    def __call__(self, i: int, theta_deg: float) -> F32:
        line = np.tensordot(self.weights, self.lines[:, i], 1)
        if self.scene is not None:
            line = np.pad(line, [(k, k) for k in self.pad])
            for weight, chord in zip(self.glass, self.scene.chords(theta_deg, self.y, self.u), strict=True):
                line += weight * chord
        return np.asarray(line * np.float32(self.scale)) if self.scale != 1.0 else line


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
    theta = -90.0 + np.arange(p.n_angles) * (180.0 / p.n_angles)
    second_half = np.arange(p.n_angles) >= p.n_angles // 2
    true_theta = theta[0] + (theta - theta[0]) * (1 + p.angle_step_error) + p.half_angle_offset_deg * second_half
    particle = draw_particle(p, particle_seed)
    progress("particle", 1, 3)
    alignments, instrument = draw_motion(p)
    faults = [_faults(p, np.random.default_rng(s)) for s in fault_seeds]
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
    beam = np.random.default_rng(beam_seed)
    field = _flat_field(p, beam)
    if p.dark_band:
        field = field * _reached(p)
    drifts = [_illumination(p, beam) for _ in p.energies_ev]

    law = ScanParameters()
    reference_ev = max(p.energies_ev)
    pixel_nm = p.binning * (law.pixel_law_slope_nm_per_ev * reference_ev + law.pixel_law_offset_nm)
    fine = round(p.n * FINE)
    to_cm = pixel_nm * 1e-7 * p.n / fine
    glass = drawn.attenuation() * pixel_nm * 1e-7 * p.n
    n_angles = p.n_angles
    width = [p.pixel(e) for e in range(len(p.energies_ev))]
    furthest = max(w * float(np.abs(a.shift).max()) for w, a in zip(width, alignments, strict=True))
    furthest += p.n / 2 if bad else 0
    reach = (1 + 2 * (furthest + 8) / p.n) / min(
        1.0, *(w * a.magnification for w, a in zip(width, alignments, strict=True))
    )  # fmt: skip

    def measure() -> Iterator[Energy]:
        with one_blas_thread(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for e, alignment in enumerate(alignments):
                seeds = noise_seeds[e].spawn(n_angles + 2)
                if e in turned:
                    table, weights = turned[e], np.array([to_cm], dtype=np.float32)
                else:
                    table, weights = lines, (coefficients[e] * to_cm).astype(np.float32)
                # The mass stays where the object shrinks: what a ray passes through grows as 1 / scale^2.
                density = 1 / instrument[e].object_scale ** 2
                density_of = _Lines(p, table, weights, scene, glass[e].astype(np.float32), reach, density)
                angles = true_theta + instrument[e].angle_offset_deg
                level, drift = 1 + 0.01 * math.sin(e), drifts[e]
                size, beam_field = round(p.n / width[e]), _recorded(field, width[e])
                c = ((np.arange(size) - (size - 1) / 2) / size * 2).astype(float)

                def one(
                    i: int,
                    e: int = e,
                    a: Alignment = alignment,
                    density_of: _Lines = density_of,
                    angles: FloatArray = angles,
                    d: Any = drift,
                    g: float = level,
                    s: Any = seeds,
                    w: float = width[e],
                    n: int = size,
                    field: FloatArray = beam_field,
                    c: FloatArray = c,
                ) -> npt.NDArray[np.uint16]:
                    fault = faults[e].get(i, _Fault())
                    if fault.source >= 0:
                        return one(fault.source, e, a, density_of, angles, d, g, s, w, n, field, c)
                    absorbed = -np.expm1(-density_of(i, float(angles[i])))
                    (ny, nu), psf = density_of.shape, instrument[e].psf_px / w
                    y, x = (float(v) for v in a.shift[i] + np.asarray(fault.move) / w)

                    def at(dy: float, dx: float) -> F32:
                        rows = _sampling(n, fine, ny, w * a.magnification, y + dy, psf)
                        columns = _sampling(n, fine, nu, w * a.magnification, x + dx, psf)
                        return np.asarray(rows @ absorbed @ columns.T)

                    if fault.kind == "motion-blurred":
                        path = np.linspace(-0.5, 0.5, _EXPOSURES) / w
                        seen = np.mean([at(fault.blur[0] * k, fault.blur[1] * k) for k in path], axis=0)
                    else:
                        seen = at(0.0, 0.0)
                    transmitted = 1 - seen if not fault.empty else np.ones_like(seen)
                    half = int(i >= n_angles // 2)
                    now = d[half, 1 + i - half * (n_angles // 2)]
                    beam_now = field * g * (1 + now[0] + now[1] * c[:, None] + now[2] * c[None, :])
                    quanta = beam_now * transmitted
                    if fault.beam != 1.0:
                        quanta = fault.beam * quanta
                    return _expose(_with_stray(quanta, p), p, np.random.default_rng(s[i]), fault.plateau * w**2)

                projections = np.stack(list(pool.map(one, range(n_angles))))

                def flat_set(
                    half: int,
                    d: Any = drift,
                    g: float = level,
                    s: Any = seeds,
                    field: FloatArray = beam_field,
                    c: FloatArray = c,
                ) -> npt.NDArray[np.uint16]:
                    rng = np.random.default_rng(s[n_angles + half])
                    now = d[half, 0]
                    bare = field * g * (1 + now[0] + now[1] * c[:, None] + now[2] * c[None, :])
                    shots = 1 + 0.003 * rng.normal(size=p.flats_per_set)
                    return np.stack([_expose(_with_stray(bare * shot, p), p, rng) for shot in shots])

                yield Energy(e, projections, np.stack([flat_set(0), flat_set(1)]))

    return Truth(alignments, maps, reference_ev, theta, instrument, bad), measure()
