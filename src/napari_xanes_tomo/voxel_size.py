"""The size of the voxels: what maps of each size would be worth, before they are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .map_plan import SIGMA, SIGMA_ALIGNMENT, MapPlan
from .maps import AlignedEnergy, Slab, grid_of, halo_rows, map_slab
from .model import FloatArray
from .recipe import MapsParameters
from .uncertainty import noise_gain

__all__ = ["VOXELS_PX", "VoxelChoice", "angular_limit_nm", "choose_voxel", "voxel_choices"]

F32 = npt.NDArray[np.float32]
VOXELS_PX = (1, 2, 3, 4, 6)


@dataclass(frozen=True)
class VoxelChoice:
    """What maps with voxels of `px` reference pixels would be worth: medians inside the particle, some middle rows.

    Attributes
    ----------
    px : int
    nm : float
    noise_over_jump : float
        Standard error of the edge jump over the jump (of the density over the density where no edge was scanned).
    sigma : dict of str to float
        Standard error of the edge energy (eV) and of the fractions.
    real : dict of str to float
        Real heterogeneity: square root of the observed variance minus the mean squared standard error; 0 where the
        noise explains all.
    voxels : int
        Inside the mask, in the middle rows.
    """

    px: int
    nm: float
    noise_over_jump: float
    sigma: Mapping[str, float]
    real: Mapping[str, float]
    voxels: int


def voxel_choices(
    energies: Sequence[AlignedEnergy],
    plan: MapPlan,
    voxel_nm: float,
    parameters: MapsParameters,
    *,
    rows: int = 8,
    middle: int | None = None,
    threads: int | None = None,
) -> tuple[VoxelChoice, ...]:
    """Say what voxels of 1, 2, 3, 4 and 6 px would be worth, from `rows` rows made at 1 px.

    They lie about row `middle`, by default that of the frame. The noise of larger voxels is that of 1 px times the
    ratio of what interpolation, filter and smoothing let through; the part of the alignment is taken as the same.
    """
    frame = energies[0].grid_shape
    middle = frame[0] // 2 if middle is None else middle
    top = max(0, min(middle - rows // 2, frame[0] - rows))
    slab = Slab(top, min(frame[0], top + rows), halo_rows(parameters))
    maps = map_slab(energies, plan, slab, voxel_nm, parameters, threads=threads)
    names = [n for n in plan.names if n.endswith("_fraction") or n == "edge_energy_relative"]
    level = "edge_jump" if plan.edge is not None else "density" if plan.elements else "morphology"
    inside = maps["mask"] > 0.5

    def passed(bin: int) -> float:
        """Return the noise variance of an attenuation in 1/cm, up to a factor that all sizes share."""
        grid = grid_of(energies, bin)
        gains = [
            np.mean(noise_gain(
                e.alignment, index=e.used[:: max(1, len(e.used) // 16)].tolist(), grid_shape=grid,
                frame_shape=e.scan.frames.frame_shape, bin=bin, filter=parameters.filter,
                smoothing=parameters.smoothing_voxel,
                widened=e.widen_px2 / bin**2,
            ))
            for e in energies
        ]  # fmt: skip
        return float(np.mean(gains)) / bin**2

    volumes = energies[0].variance is not None  # those have the voxels they have
    first = 1.0 if volumes else passed(1)
    out = []
    for px in (1,) if volumes else VOXELS_PX:
        if min(frame) // px < 8 or not inside.any():
            continue
        ratio = 1.0 if volumes else passed(px) / first

        def error(name: str, ratio: float = ratio) -> F32:
            aligned = maps[name + SIGMA_ALIGNMENT] ** 2
            return np.asarray(np.sqrt((maps[name + SIGMA] ** 2 - aligned) * ratio + aligned))

        use = inside & (maps[level] > 0)
        noise = float(np.median(error(level)[use] / maps[level][use])) if use.any() else float("nan")
        body = _blocks(inside.astype(np.float32), px) > 0.99
        sigma, real = {}, {}
        for name in names:
            value, own = maps[name], error(name)
            good = np.isfinite(value) & np.isfinite(own) & inside
            if not good.any():
                continue
            sigma[name] = float(np.median(own[good]))
            large = _blocks(np.where(good, value, 0), px)[body & (_blocks(good.astype(np.float32), px) > 0.99)]
            observed = float(np.var(large)) if len(large) > 1 else 0.0
            real[name] = float(np.sqrt(max(0.0, observed - float(np.mean(own[good] ** 2)))))
        out.append(VoxelChoice(px, voxel_nm * px, noise, sigma, real, round(float(inside.sum()) / px**3)))
    return tuple(out)


def _blocks(values: F32, px: int) -> F32:
    """Average (y, z, x) over blocks of `px`; fewer rows than that are one block."""
    for axis, n in enumerate(values.shape):
        size = min(px, n)
        cut = np.take(values, range(n // size * size), axis=axis)
        values = cut.reshape(*cut.shape[:axis], n // size, size, *cut.shape[axis + 1 :]).mean(axis=axis + 1)
    return values


def choose_voxel(choices: Sequence[VoxelChoice], parameters: MapsParameters) -> int:
    """Return the voxel asked for, else the smallest one with little enough noise, else the largest, px."""
    if parameters.voxel_px:
        return parameters.voxel_px
    good = [c.px for c in choices if c.noise_over_jump <= parameters.noise_limit]
    return min(good) if good else max((c.px for c in choices), default=1)


def angular_limit_nm(voxel_nm: float, theta_deg: FloatArray, diameter_px: float) -> float:
    """Return the finest detail that the angles sample at the rim of an object, nm: half its circumference per angle."""
    distinct = np.unique(np.round(np.mod(np.asarray(theta_deg, dtype=float), 180.0), 2))
    return float(np.pi * diameter_px * voxel_nm / (2 * max(1, len(distinct))))
