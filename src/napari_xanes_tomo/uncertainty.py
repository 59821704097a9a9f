"""What the maps are uncertain by: noise of the counts and errors of the alignment, carried to every voxel.

Both are covariances of the components that are reconstructed, since the maps combine them. They vary slowly from voxel
to voxel (every voxel sees the variance of whole rays), so they are carried on a grid a few times coarser than the maps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .detector import Detector
from .model import Alignment, FloatArray
from .projector import Projector, filter_response
from .resample import noise_power

__all__ = [
    "Covariance",
    "EvenCovariance",
    "Unseen",
    "coarse_step",
    "decimate",
    "expected_variance",
    "moved_variance",
    "noise_gain",
    "reconstruct_rows",
    "upsampler",
]

F32 = npt.NDArray[np.float32]
_LEAST_SEEN = 0.1  # part of the shape; of less, no more is made
_MOSTLY_SEEN = 0.5  # part of the shape that tells how much there is of what was not seen
_FREQUENCY = (np.arange(128) + 0.5) / 256  # middles of 128 bands, cycles per voxel


def coarse_step(columns: int) -> int:
    """Return how many voxels apart the variance is carried."""
    return 4 if columns >= 128 else 2 if columns >= 32 else 1


def expected_variance(
    absorbance: F32,
    exposure_s: FloatArray,
    rate: F32,
    rate_variance: F32,
    stray: FloatArray,
    detector: Detector,
) -> F32:
    """Return the variance of a pixel's absorbance, (n, y, x), from its mean: the counts it stands for, and the flat.

    Parameters
    ----------
    absorbance : (n, y, x) array
        ``-ln(I / I0)``, the air still in it; a mean over a few pixels, since its own noise would bias it.
    exposure_s, stray : (n,) arrays
        Seconds, and counts of stray light in every pixel.
    rate, rate_variance : (n, y, x) arrays
        Bare beam behind every projection, counts per second, and the variance of a pixel of it.
    detector : Detector
    """
    seconds = np.asarray(exposure_s, dtype=np.float32)[:, None, None]
    lit = rate > 0
    signal = np.maximum(seconds * rate * np.exp(-np.clip(absorbance, -5, 20)), np.float32(0.5))
    counts = signal + np.asarray(stray, dtype=np.float32)[:, None, None]
    flat = np.divide(rate_variance, rate * rate, out=np.zeros_like(rate), where=lit)
    return np.asarray(np.where(lit, detector.variance(counts) / signal**2 + flat, 0), dtype=np.float32)


def _smoothed(frequency: FloatArray, sigma: float) -> FloatArray:
    """Response of the Gaussian that smooths the maps, as it is sampled on the voxels."""
    if sigma <= 0:
        return np.ones_like(frequency)
    j = np.arange(-int(4 * sigma + 0.5), int(4 * sigma + 0.5) + 1)
    weight = np.exp(-0.5 * (j / sigma) ** 2)
    return np.asarray(np.cos(2 * np.pi * frequency[..., None] * j) @ (weight / weight.sum()))


def noise_gain(
    alignment: Alignment,
    *,
    index: Sequence[int],
    grid_shape: tuple[int, int],
    frame_shape: tuple[int, int],
    bin: int,
    filter: str,
    smoothing: float,
    widened: float = 0.0,
) -> FloatArray:
    """Return (frame,) variance of a filtered, smoothed sample of a projection per variance of a recorded pixel.

    The interpolation, the filter of the back-projection and the Gaussian smoothing (sigma in voxels) are one linear
    filter on white noise; what it lets through is the integral of its squared response. So is a blur of the placed
    projections by `widened`, voxels^2, see `resample.widened`.
    """
    soft = np.exp(-2 * widened * (1 - np.cos(2 * np.pi * _FREQUENCY)))
    power = soft * noise_power(
        alignment, _FREQUENCY, grid_shape=grid_shape, frame_shape=frame_shape, index=index, bin=bin
    )
    response = np.interp(_FREQUENCY, np.linspace(0, 0.5, 513), filter_response(filter, 1024))
    turn = (np.arange(8) + 0.5) * np.pi / 32  # a line is smoothed along z and x: mean over its directions
    across = _smoothed(np.outer(np.cos(turn), _FREQUENCY), smoothing) * _smoothed(
        np.outer(np.sin(turn), _FREQUENCY), smoothing
    )
    along_y = np.mean(power[:, 0] * _smoothed(_FREQUENCY, smoothing) ** 2, axis=1)
    along_x = np.mean(power[:, 1] * np.mean(across**2, axis=0) * response**2, axis=1)
    return np.asarray(along_y * along_x)


def moved_variance(shape_lines: F32, *, filter: str, smoothing: float, keep: slice) -> tuple[F32, F32]:
    """Return (angle, kept rows, column): squared change of a filtered line per squared px of displacement in y and x.

    Parameters
    ----------
    shape_lines : (angle, row, column) array
        Line integrals, with the rows that the smoothing needs.
    filter, smoothing
        As in `noise_gain`.
    keep : slice
        Rows wanted.
    """
    from scipy.ndimage import gaussian_filter1d

    lines = np.asarray(shape_lines, dtype=np.float32)
    soft = gaussian_filter1d(lines, smoothing, axis=1, mode="nearest") if smoothing > 0 else lines
    along_y = np.gradient(soft, axis=1)[:, keep] if soft.shape[1] > 1 else np.zeros_like(soft)[:, keep]
    soft = soft[:, keep]
    columns = soft.shape[2]
    length = 1 << int(np.ceil(np.log2(2 * columns)))
    f = np.arange(length // 2 + 1) / length
    response = filter_response(filter, length) * np.exp(-2 * (np.pi * smoothing * f) ** 2)

    def filtered(data: F32, factor: npt.NDArray[np.complexfloating]) -> F32:
        spectrum = np.fft.rfft(data, length, axis=2) * factor.astype(np.complex64)
        return np.asarray(np.fft.irfft(spectrum, length, axis=2)[:, :, :columns].astype(np.float32) ** 2)

    return filtered(along_y, response + 0j), filtered(soft, 2j * np.pi * f * response)


def decimate(data: F32, step: int, count: int) -> F32:
    """Average the last axis over `step` columns: `count` of them, centred as the fine ones are."""
    if step == 1:
        return data
    n = data.shape[-1]
    at = (np.arange(count) - (count - 1) / 2) * step + (n - 1) / 2
    total = np.concatenate([np.zeros((*data.shape[:-1], 1)), np.cumsum(data, axis=-1, dtype=np.float64)], axis=-1)
    first = np.clip(np.floor(at - step / 2 + 0.5).astype(int), 0, n)
    end = np.clip(first + step, 0, n)
    out: F32 = ((total[..., end] - total[..., first]) / np.maximum(end - first, 1)).astype(np.float32)
    return out


def reconstruct_rows(lines: F32, theta_deg: FloatArray, *, threads: int | None) -> F32:
    """Back-project (pair, angle, row, column) without a filter, each angle once: (pair, row, z, x)."""
    pairs, angles, rows, columns = lines.shape
    if columns < 2:
        return np.zeros((pairs, rows, columns, columns), np.float32)
    # Rows travel together in single precision: brought to one size, so that large ones leave no trace in small ones.
    size = np.abs(lines).max(axis=(1, 2, 3), keepdims=True)
    size = np.where(size > 0, size, np.float32(1))
    flat = np.ascontiguousarray((lines / size).transpose(1, 0, 2, 3)).reshape(angles, pairs * rows, columns)
    projector = Projector(columns, theta_deg, threads=threads)
    out = projector.adjoint(flat, weight=np.ones(angles)).reshape(pairs, rows, columns, columns)
    out *= size
    return out


def upsampler(fine: int, coarse: int, step: int) -> F32:
    """(fine, coarse) weights that interpolate linearly from a grid of pitch `step` with the same middle."""
    at = (np.arange(fine) - (fine - 1) / 2) / step + (coarse - 1) / 2
    at = np.clip(at, 0, coarse - 1)
    low = np.minimum(np.floor(at).astype(int), max(0, coarse - 2))
    out = np.zeros((fine, coarse), np.float32)
    rows = np.arange(fine)
    out[rows, low] += (1 - (at - low)).astype(np.float32)
    if coarse > 1:
        out[rows, low + 1] += (at - low).astype(np.float32)
    return out


@dataclass(frozen=True)
class Unseen:
    """What the components of a slab lack where energies did not see a voxel at all of their angles.

    Attributes
    ----------
    lost : dict of str to (kept row, step) array
        Of every component, for an attenuation of 1 of the component ``shape``, by the distance from the axis.
    radius : (z, x) int array
        That distance, voxels.
    """

    lost: Mapping[str, F32]
    radius: npt.NDArray[np.intp]

    def told(self, k: int) -> npt.NDArray[np.bool_]:
        """Return (z, x) where what was seen of kept row `k` tells how much there is of what was not."""
        return np.asarray(1 - self.lost["shape"][k] >= _MOSTLY_SEEN)[self.radius]

    def row(self, k: int, shape: F32) -> dict[str, F32] | None:
        """Return {component: (z, x)} of kept row `k`, None where every energy saw all of it.

        `shape` is the component of that name as it was found.
        """
        if not any(x[k].any() for x in self.lost.values()):
            return None
        kept = 1 - self.lost["shape"][k]
        amount = shape / np.maximum(kept, _LEAST_SEEN).astype(np.float32)[self.radius]
        return {name: np.asarray(x[k][self.radius] * amount, np.float32) for name, x in self.lost.items()}


@dataclass(frozen=True)
class Covariance:
    """Covariances of the components of one slab, unit of the components squared.

    Attributes
    ----------
    pairs : tuple of (str, str)
        Names of components.
    noise : (pair, coarse row, z, x) array
        From the counts, on the coarse grid.
    rows : (kept row, coarse row) array
        Weights that interpolate `noise` to the rows of the slab.
    jitter : (pair, kept row, z, x) array
        From the displacement of single projections; coarse in z and x only.
    common : (pair, 4) array
        From the displacement of whole energies: multiplies the squares of the shape's derivative along y, z, x (per
        voxel) and with the magnification.
    across : (z, coarse z) array
        Weights that interpolate z and x.
    y : (kept rows,) array
        Their place, voxels from the middle of the grid.
    """

    pairs: tuple[tuple[str, str], ...]
    noise: F32
    rows: F32
    jitter: F32
    common: FloatArray
    across: F32
    y: FloatArray

    def scaled(self, unit: float | np.floating) -> Covariance:
        """Return the covariances of components that are `unit` times as large; the shape's derivatives are as well."""
        square = np.float32(unit**2)
        return replace(self, noise=self.noise * square, jitter=self.jitter * square)

    def row(
        self, k: int, gradient: tuple[F32, F32, F32, F32], pairs: Sequence[tuple[str, str]] | None = None
    ) -> dict[tuple[str, str], tuple[F32, F32]]:
        """Return {pair: (noise part, alignment part)} of kept row `k`, each (z, x); of some `pairs` only if given.

        `gradient` holds the shape's derivatives along y, z, x and with the magnification, each (z, x).
        """
        out = {}
        square = [g * g for g in gradient]
        for p, pair in enumerate(self.pairs):
            if pairs is not None and pair not in pairs:
                continue
            noise = self.across @ np.tensordot(self.rows[k], self.noise[p], axes=(0, 0)) @ self.across.T
            moved = self.across @ self.jitter[p, k] @ self.across.T
            for weight, g in zip(self.common[p], square, strict=True):
                if weight:
                    moved = moved + np.float32(weight) * g
            out[pair] = (noise.astype(np.float32), moved.astype(np.float32))
            out[pair[::-1]] = out[pair]
        return out


@dataclass(frozen=True)
class EvenCovariance(Covariance):
    """Covariances whose noise is the same everywhere: `noise` is (pair,), in the units of the components squared."""

    def row(
        self, k: int, gradient: tuple[F32, F32, F32, F32], pairs: Sequence[tuple[str, str]] | None = None
    ) -> dict[tuple[str, str], tuple[F32, F32]]:
        """Return {pair: (noise part, alignment part)} of kept row `k`, each (z, x); of some `pairs` only if given."""
        out = {}
        for p, pair in enumerate(self.pairs):
            if pairs is not None and pair not in pairs:
                continue
            noise = np.full(gradient[0].shape, self.noise[p], dtype=np.float32)
            moved = np.zeros_like(noise)
            for weight, g in zip(self.common[p], gradient, strict=True):
                moved += np.float32(weight) * g * g
            out[pair] = out[pair[::-1]] = (noise, moved)
        return out
