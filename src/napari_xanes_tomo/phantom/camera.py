"""Beam and camera of the virtual microscope: what one energy records, and what goes wrong in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from napari_xanes_tomo.model import Alignment, FloatArray

from .parameters import TwinParameters
from .particle import FINE
from .scene import Scene

__all__ = ["Camera", "Fault", "Lines", "draw_beam", "draw_faults", "draw_illumination"]

F32 = npt.NDArray[np.float32]
_EXPOSURES = 9  # positions a motion-blurred frame is the mean of


@dataclass(frozen=True)
class Fault:
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
        """By how much, in words."""
        return {
            "beam loss": f"{self.beam:.3f} of the beam",
            "saturated": f"{self.beam:.2f} times the beam, cut at {self.plateau:.0f} counts",
            "duplicate": f"of projection {self.source}",
            "displaced": f"by ({self.move[0]:.1f}, {self.move[1]:.1f}) px",
            "motion-blurred": f"along ({self.blur[0]:.1f}, {self.blur[1]:.1f}) px",
        }.get(self.kind, "")


def draw_faults(p: TwinParameters, rng: np.random.Generator) -> dict[int, Fault]:
    """Draw which projections of one energy go wrong and how; every kind in turn."""
    n = round(p.bad_fraction * p.n_angles)
    which = rng.permutation(p.n_angles)[:n]
    first = int(rng.integers(len(p.bad_kinds)))
    out: dict[int, Fault] = {}
    for k, frame in enumerate(which.tolist()):
        kind = p.bad_kinds[(first + k) % len(p.bad_kinds)]
        angle, part = float(rng.uniform(0, 2 * math.pi)), float(rng.uniform())
        if kind == "beam loss":
            out[frame] = Fault(kind, beam=0.03 + 0.32 * part)
        elif kind == "black":
            out[frame] = Fault(kind, beam=0.0)
        elif kind == "saturated":
            beam = 2 + 4 * part
            plateau = round(float(rng.uniform(0.4, 0.8)) * beam * p.quanta * p.counts_per_quantum)
            out[frame] = Fault(kind, beam=beam, plateau=plateau)
        elif kind == "duplicate":
            good = sorted(set(range(p.n_angles)) - set(which.tolist()))
            before = frame - 1 if frame - 1 in good and part < 0.5 else int(rng.choice(good))
            out[frame] = Fault(kind, source=before)
        elif kind == "displaced":
            half = p.n / 2 * (1 if angle > math.pi else -1)
            out[frame] = Fault(kind, move=(half, 0.0) if part < 0.5 else (0.0, half))
        elif kind == "motion-blurred":
            length = (6 + 8 * part) * p.n / 256
            out[frame] = Fault(kind, blur=(length * math.sin(angle), length * math.cos(angle)))
        else:
            out[frame] = Fault(kind, empty=True)
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


def draw_beam(p: TwinParameters, rng: np.random.Generator) -> FloatArray:
    """(n, n) quanta of the bare beam: vignette, a tilt, a fixed pattern, some dust; 0 in the dark band."""
    from scipy.ndimage import gaussian_filter

    c = (np.arange(p.n) - (p.n - 1) / 2) / p.n
    y, x = c[:, None], c[None, :]
    field = 1 - 0.55 * (y**2 + x**2) - 0.10 * x + 0.06 * y
    field = field * (1 + 0.02 * gaussian_filter(rng.normal(size=(p.n, p.n)), 2.0 * p.n / 256) * 7.0)
    for _ in range(8):
        dy, dx = rng.uniform(-0.48, 0.48, 2)
        field = field * (1 - 0.15 * np.exp(-((y - dy) ** 2 + (x - dx) ** 2) / (2 * 0.006**2)))
    field = p.quanta * field / field.mean()
    reached = np.clip((1 - p.dark_band) * p.n - np.arange(p.n), 0, 1)  # part of every row
    return np.asarray(field * reached[:, None])


def recorded_beam(field: FloatArray, pixel: float) -> FloatArray:
    """Return the quanta of a bare beam (y, x) in pixels that are `pixel` times as wide."""
    if pixel < 1:
        k = round(1 / pixel)
        return np.asarray(np.repeat(np.repeat(field, k, axis=0), k, axis=1) / k**2)
    k = round(pixel)
    n = len(field) // k
    return np.asarray(field.reshape(n, k, n, k).sum(axis=(1, 3)))


def draw_illumination(p: TwinParameters, rng: np.random.Generator) -> FloatArray:
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


class Lines:
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
        """(y, u) optical density of projection `i`."""
        line = np.tensordot(self.weights, self.lines[:, i], 1)
        if self.scene is not None:
            line = np.pad(line, [(k, k) for k in self.pad])
            for weight, chord in zip(self.glass, self.scene.chords(theta_deg, self.y, self.u), strict=True):
                line += weight * chord
        return np.asarray(line * np.float32(self.scale)) if self.scale != 1.0 else line


@dataclass(frozen=True)
class Camera:
    """What is recorded at one energy.

    Attributes
    ----------
    parameters : TwinParameters
    alignment : Alignment
        Where the object is, recorded px.
    psf_px : float
        Standard deviation of the point spread, recorded pixels.
    pixel : float
        Width of a recorded pixel in those of the reference energy's size.
    beam : (n, n) array
        Quanta of the bare beam in a recorded pixel.
    drift : (2, shots of a half, 3) array
        Level and slopes of the beam; see `draw_illumination`.
    density : Lines
        Optical density along the rays.
    theta_deg : (angles,) array
        True angles.
    faults : mapping of int to Fault
        Projections that go wrong.
    seeds : sequence
        Of the noise: one a projection, then one for the flats of either half.
    """

    parameters: TwinParameters
    alignment: Alignment
    psf_px: float
    pixel: float
    beam: FloatArray
    drift: FloatArray
    density: Lines
    theta_deg: FloatArray
    faults: Mapping[int, Fault]
    seeds: Sequence[np.random.SeedSequence]

    def _illuminated(self, half: int, shot: int) -> FloatArray:
        """(n, n) quanta of the bare beam at one shot of a half of the scan; the first is that of its flats."""
        level, slope_y, slope_x = self.drift[half, shot]
        n = len(self.beam)
        c = (np.arange(n) - (n - 1) / 2) / n * 2
        return np.asarray(self.beam * (1 + level + slope_y * c[:, None] + slope_x * c[None, :]))

    def _absorbed(self, i: int, fault: Fault) -> F32:
        """(n, n) part of the beam that the object takes out of projection `i`."""
        through = -np.expm1(-self.density(i, float(self.theta_deg[i])))
        n, fine = len(self.beam), round(self.parameters.n * FINE)
        magnification = self.pixel * self.alignment.magnification
        y, x = (float(v) for v in self.alignment.shift[i] + np.asarray(fault.move) / self.pixel)

        def at(dy: float, dx: float) -> F32:
            rows = _sampling(n, fine, through.shape[0], magnification, y + dy, self.psf_px)
            columns = _sampling(n, fine, through.shape[1], magnification, x + dx, self.psf_px)
            return np.asarray(rows @ through @ columns.T)

        if fault.kind != "motion-blurred":
            return at(0.0, 0.0)
        path = np.linspace(-0.5, 0.5, _EXPOSURES) / self.pixel
        return np.asarray(np.mean([at(fault.blur[0] * k, fault.blur[1] * k) for k in path], axis=0))

    def projection(self, i: int) -> npt.NDArray[np.uint16]:
        """(n, n) counts of projection `i`."""
        fault = self.faults.get(i, Fault())
        if fault.source >= 0:
            return self.projection(fault.source)
        first_of_second = self.parameters.n_angles // 2
        half = int(i >= first_of_second)
        quanta = self._illuminated(half, 1 + i - half * first_of_second)
        if not fault.empty:
            quanta = quanta * (1 - self._absorbed(i, fault))
        rng = np.random.default_rng(self.seeds[i])
        return self._expose(fault.beam * quanta, rng, fault.plateau * self.pixel**2)

    def flats(self, half: int) -> npt.NDArray[np.uint16]:
        """(shots, n, n) counts of the flats of a half of the scan."""
        p = self.parameters
        rng = np.random.default_rng(self.seeds[p.n_angles + half])
        shots = 1 + 0.003 * rng.normal(size=p.flats_per_set)
        bare = self._illuminated(half, 0)
        return np.stack([self._expose(bare * shot, rng) for shot in shots])

    def _expose(
        self, quanta: FloatArray, rng: np.random.Generator, plateau: float = math.inf
    ) -> npt.NDArray[np.uint16]:
        """Return the counts of a frame that `quanta` reach, and stray light."""
        p = self.parameters
        if p.stray_counts or p.stray_fraction:
            quanta = quanta + p.stray_counts / p.counts_per_quantum + p.stray_fraction * quanta.mean()
        counts = p.counts_per_quantum * rng.poisson(quanta) + p.read_noise_counts * rng.standard_normal(quanta.shape)
        return np.clip(np.rint(counts), 0, min(plateau, 65535)).astype(np.uint16)
