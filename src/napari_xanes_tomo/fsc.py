"""Fourier shell correlation of two volumes of the same object: up to which detail they agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .model import FloatArray, XanesTomoError

__all__ = ["ShellCorrelation", "common_place", "half_bit", "shell_correlation", "soft_mask"]

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ShellCorrelation:
    """Correlation of two volumes in shells of the Fourier space.

    Attributes
    ----------
    frequency : (shells,) array
        Mean spatial frequency of a shell, cycles per voxel.
    correlation : (shells,) array
        NaN where a shell holds nothing, and at frequency 0, since the mean is taken out.
    count : (shells,) array
        Independent complex values in a shell: half of its Fourier coefficients (the volumes are real), times the part
        of them that the mask leaves independent.
    voxel_nm : float
    mask_part : float
        Part of the volume inside the mask.
    """

    frequency: FloatArray
    correlation: FloatArray
    count: FloatArray
    voxel_nm: float
    mask_part: float

    @property
    def half_bit(self) -> FloatArray:
        """(shells,) the 1/2-bit criterion."""
        return half_bit(self.count)

    @property
    def chance(self) -> FloatArray:
        """(shells,) three standard deviations of what two volumes show that have nothing in common, at most 1."""
        return np.asarray(np.minimum(1.0, 3 / np.sqrt(2 * np.maximum(self.count, 0.5))))

    def crossing(self, threshold: npt.ArrayLike | None = None) -> float | None:
        """Return the frequency at which the correlation first falls below `threshold`, cycles per voxel.

        None where it never does, and where it is not above the threshold to begin with: then there is no resolution to
        be stated. By default the threshold is the 1/2-bit criterion. Shells of fewer than five values say nothing.
        """
        level = self.half_bit if threshold is None else np.broadcast_to(np.asarray(threshold, float), self.count.shape)
        good = np.isfinite(self.correlation) & (self.frequency > 0) & (self.count >= 5)
        f, above = self.frequency[good], (self.correlation - level)[good]
        if len(f) < 2 or not above[0] > 0:
            return None
        below = np.flatnonzero(above <= 0)
        if not len(below):
            return None
        k = int(below[0])
        return float(f[k - 1] + (f[k] - f[k - 1]) * above[k - 1] / (above[k - 1] - above[k]))

    def detail_nm(self, threshold: npt.ArrayLike | None = None) -> float | None:
        """Return half the period at the crossing, nm; None where the curve does not cross."""
        at = self.crossing(threshold)
        return None if at is None else self.voxel_nm / (2 * at)

    @property
    def numbers(self) -> dict[str, Any]:
        """Return plain numbers for the journal and the report."""
        good = np.isfinite(self.correlation)
        columns = (self.frequency * 1e3 / self.voxel_nm, self.correlation, self.half_bit, self.chance)
        return {
            "per_um_correlation_half_bit_chance": np.round(np.stack(columns, axis=1)[good], 4).tolist(),
            "half_bit_nm": self.detail_nm(),
            "one_seventh_nm": self.detail_nm(0.143),
            "voxel_nm": self.voxel_nm,
            "mask_part": round(self.mask_part, 4),
        }


def half_bit(count: npt.ArrayLike) -> FloatArray:
    """Return the 1/2-bit threshold for shells or rings of `count` independent values.

    van Heel & Schatz 2005, doi 10.1016/j.jsb.2005.05.009.
    """
    root = np.sqrt(np.maximum(np.asarray(count, dtype=float), 1))
    return np.asarray((0.2071 + 1.9102 / root) / (1.2071 + 0.9102 / root))


def shell_correlation(
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    *,
    mask: npt.ArrayLike | None = None,
    voxel_nm: float = 1.0,
    shells: int | None = None,
) -> ShellCorrelation:
    """Correlate two volumes (y, z, x), any unit, cubic voxels, shell by shell up to half a cycle per voxel.

    The two must lie on each other, and must not share what is not the object: noise, flats, rings.

    Parameters
    ----------
    first, second : (y, z, x) arrays
        Of one shape; it need not be a cube.
    mask : (y, z, x) array, optional
        0..1, soft at its rim: a sharp one correlates by itself. Without one the faces of the box fall off smoothly.
    voxel_nm : float
    shells : int, optional
        By default half of the longest side.

    Notes
    -----
    Harauz & van Heel 1986, Optik 73, 146. The mean inside the mask is taken from both, so that the mask itself does not
    count as agreement.
    """
    a, b = (np.asarray(v, dtype=np.float32) for v in (first, second))
    if a.ndim != 3 or a.shape != b.shape:
        raise XanesTomoError(
            f"shell correlation: expected two volumes (y, z, x) of one shape, got {a.shape}, {b.shape}"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise XanesTomoError("shell correlation: expected finite volumes, got NaN or infinity; set such voxels to 0")
    if mask is None:
        faces = [_falls_off(n) for n in a.shape]
        m = faces[0][:, None, None] * faces[1][None, :, None] * faces[2][None, None, :]
    else:
        m = np.asarray(mask, dtype=np.float32)
        if m.shape != a.shape:
            raise XanesTomoError(f"shell correlation: expected a mask of shape {a.shape}, got {m.shape}")
    total = float(m.sum())
    if not total > 0:
        raise XanesTomoError("shell correlation: expected a mask that holds voxels, got an empty one")
    fa, fb = (np.fft.rfftn(m * (v - float((m * v).sum()) / total)) for v in (a, b))
    n = shells or max(a.shape) // 2
    axes = [np.fft.fftfreq(s) for s in a.shape[:2]] + [np.fft.rfftfreq(a.shape[2])]
    radius = np.sqrt(axes[0][:, None, None] ** 2 + axes[1][None, :, None] ** 2 + axes[2][None, None, :] ** 2)
    # Of a real volume half of the coefficients is stored; those of the planes x = 0 and x = Nyquist are there in full.
    twice = np.full(len(axes[2]), 2.0)
    twice[0] = 1.0
    if a.shape[2] % 2 == 0:
        twice[-1] = 1.0
    weight = np.broadcast_to(twice, radius.shape).ravel()
    index = np.rint(radius.ravel() * 2 * n).astype(int)
    inside = radius.ravel() <= 0.5 + 0.25 / n
    index, weight = np.minimum(index[inside], n), weight[inside]

    def per_shell(values: npt.NDArray[np.floating]) -> FloatArray:
        return np.asarray(np.bincount(index, weights=values.ravel()[inside] * weight, minlength=n + 1), dtype=float)

    cross, pa, pb = per_shell((fa * fb.conj()).real), per_shell(np.abs(fa) ** 2), per_shell(np.abs(fb) ** 2)
    number = np.bincount(index, weights=weight, minlength=n + 1)
    power = np.sqrt(pa * pb)
    correlation = np.divide(cross, power, out=np.full(n + 1, np.nan), where=power > 0)
    frequency = np.divide(per_shell(radius), number, out=np.full(n + 1, np.nan), where=number > 0)
    part = float((m**2).sum() ** 2 / (m.size * (m**4).sum()))
    correlation[0] = np.nan
    return ShellCorrelation(frequency, correlation, number / 2 * part, float(voxel_nm), float(total / m.size))


def _falls_off(n: int) -> npt.NDArray[np.float32]:
    """Return a window of length `n` that falls to 0 over an eighth at either end."""
    edge = max(1, n // 8)
    ramp = 0.5 - 0.5 * np.cos(np.pi * (np.arange(edge) + 0.5) / edge)
    out = np.ones(n)
    if n > 2 * edge:
        out[:edge], out[-edge:] = ramp, ramp[::-1]
    return out.astype(np.float32)


def soft_mask(volume: F32, *, level: float | None = None) -> tuple[F32, int]:
    """Return a mask (y, z, x), 0..1, soft at its rim, of where an object is in rows cut out of it, and its voxels.

    Parameters
    ----------
    volume : (y, z, x) array
    level : float, optional
        Value inside the object; found in the smoothed volume unless given.
    """
    from scipy.ndimage import gaussian_filter

    calm = gaussian_filter(volume, 1.0)
    top = float(calm.max())
    if level is None:
        level = float(np.median(calm[calm > 0.2 * top])) if top > 0 else np.inf
    body = calm > 0.5 * level
    mask = np.clip(2 * gaussian_filter(body.astype(np.float32), 2.0), 0, 1)
    y = np.arange(len(mask))
    ends = np.minimum(y + 0.5, len(y) - y - 0.5) / 4  # the rows are cut out of the object: no sharp end
    mask *= np.clip(ends, 0, 1)[:, None, None].astype(np.float32)
    return mask, int(body.sum())


def common_place(first: F32, second: F32, mask: F32) -> FloatArray:
    """Return by how much the content of `second` lies beside that of `first`: (3,) along y, z, x, voxels.

    Whole voxels from the cross-correlation, the rest by least squares on gain and displacement inside the mask.
    """
    from scipy.ndimage import gaussian_filter, shift

    a, b = (gaussian_filter(v, 1.0) for v in (first, second))
    fa, fb = (np.fft.rfftn(mask * (v - float(v.mean()))) for v in (a, b))
    cross = np.fft.irfftn(fb * fa.conj(), s=a.shape, axes=(0, 1, 2))
    at = np.unravel_index(int(np.argmax(cross)), cross.shape)
    found = np.array([k if k <= n // 2 else k - n for k, n in zip(at, cross.shape, strict=True)], dtype=float)
    use = mask > 0.5
    for _ in range(6):
        moved = shift(a, found, order=1, mode="nearest")
        slopes = [np.gradient(moved, axis=k)[use] if moved.shape[k] > 1 else np.zeros(int(use.sum())) for k in range(3)]
        design = np.stack([moved[use], *(-s for s in slopes), np.ones(int(use.sum()))], axis=1).astype(np.float64)
        solved = np.linalg.lstsq(design.T @ design, design.T @ b[use].astype(np.float64), rcond=1e-10)[0]
        if not solved[0] > 0:
            break
        step = np.clip(solved[1:4] / solved[0], -1, 1)
        found = found + step
        if np.linalg.norm(step) < 0.005:
            break
    return found
