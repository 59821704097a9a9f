"""The spectrum of one voxel, with what the maps make of it: only the rows that its smoothing reaches are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .edges import edge_energy_ev, scanned_element
from .element_fit import fit_columns
from .map_plan import MapPlan
from .maps import AlignedEnergy, combine_slab, grid_of, halo_rows
from .model import FloatArray, Progress, XanesTomoError, no_progress
from .recipe import MapsParameters
from .reconstruction import reconstructor
from .spectra import POST_EV, PRE_EV

__all__ = ["VoxelSpectrum", "voxel_spectrum"]

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class VoxelSpectrum:
    """Attenuation of one voxel over the energies, smoothed as the maps are, and the curves fitted to it.

    Attributes
    ----------
    at : (int, int, int)
        y, z, x of the grid of the maps.
    energies_ev : (energies,) array
    value : (energies,) array
        Linear attenuation, 1/cm; absorbance of images.
    elements : (energies,) array
        Fit of the elements and the remainder; NaN at energies that are left out of it.
    edge : (energies,) array
        The particle's mean spectrum, scaled and shifted to the voxel, with a straight line; NaN beyond the edge's
        windows, and everywhere where no edge was scanned.
    amounts : dict of str to float
        g/cm3 (mg/cm2 of images), by the table alone.
    shift_ev : float
        Edge energy against the mean spectrum; NaN where there is none.
    areal : bool
        Of images.
    note : str
        What the user has to know of it, in words.
    """

    at: tuple[int, int, int]
    energies_ev: FloatArray
    value: FloatArray
    elements: FloatArray
    edge: FloatArray
    amounts: Mapping[str, float]
    shift_ev: float
    areal: bool = False
    note: str = ""


def voxel_spectrum(
    energies: Sequence[AlignedEnergy],
    plan: MapPlan,
    at: tuple[int, int, int],
    voxel_nm: float,
    parameters: MapsParameters,
    *,
    bin: int = 1,
    factor: npt.ArrayLike = 1.0,
    threads: int | None = None,
    progress: Progress = no_progress,
) -> VoxelSpectrum:
    """Read and reconstruct one voxel at every energy.

    Parameters
    ----------
    energies : sequence of AlignedEnergy
        In the order of the plan.
    plan : MapPlan
    at : (int, int, int)
        y, z, x of the whole common grid, voxels.
    voxel_nm : float
    parameters : MapsParameters
    bin : int
        Reference pixels per voxel.
    factor : (energies,) array or float
        What the plan was weighted with, see `MapPlan.weighted`.
    threads : int, optional
    progress : Progress
        Called for every energy; what it raises is passed on.

    Raises
    ------
    XanesTomoError
        There is no such voxel.
    """
    volumes = energies[0].variance is not None
    if volumes:
        height, width = energies[0].scan.frames.frame_shape
        shape = (height, len(energies[0].scan), width)
    else:
        rows, width = grid_of(energies, bin)
        shape = (rows, width, width)
    if not all(0 <= v < n for v, n in zip(at, shape, strict=True)):
        raise XanesTomoError(f"voxel: expected y, z, x within {shape}, got {tuple(at)}")
    s, halo = parameters.smoothing_voxel, halo_rows(parameters)
    y, z, x = at
    reach = [(max(0, v - halo), min(n, v + halo + 1)) for v, n in zip(at, shape, strict=True)]
    value = np.zeros(len(energies))
    for e, item in enumerate(energies):
        progress("spectrum of a voxel", e, len(energies))
        if volumes:
            planes = list(range(*reach[1]))
            block = item.scan.frames.read_rows(planes, *reach[0]).transpose(1, 0, 2)[:, :, slice(*reach[2])]
            value[e] = _at(block, s, y - reach[0][0], z - reach[1][0], x - reach[2][0])
            continue
        alone = replace(plan, components={"energy": np.ones(1)}, energies_ev=plan.energies_ev[e : e + 1])
        made = combine_slab([item], alone, reach[0], bin=bin, parameters=parameters, threads=threads)
        lines = _along(made.sinograms[0], s, y - reach[0][0], axis=1)
        extend = shape[2] // 2 if parameters.local_tomography else 0
        solve = reconstructor(
            parameters.reconstruction, filter=parameters.filter, iterations=parameters.iterations, extend=extend,
            threads=threads,
        )  # fmt: skip
        row = solve(lines[:, None], made.theta_deg, weights=made.shared.astype(float))[0] * 1e7 / voxel_nm
        block = row[slice(*reach[1]), slice(*reach[2])]
        value[e] = _at(block[None], s, 0, z - reach[1][0], x - reach[2][0])
    return _fitted(plan, at, value, np.broadcast_to(np.asarray(factor, dtype=float), value.shape), parameters)


def _along(values: F32, s: float, k: int, axis: int) -> F32:
    """Smooth along one axis and take place `k` of it."""
    from scipy.ndimage import gaussian_filter1d

    soft = gaussian_filter1d(values, s, axis=axis) if s > 0 else values
    return np.asarray(np.take(soft, k, axis=axis), dtype=np.float32)


def _at(block: npt.NDArray[np.floating], s: float, y: int, z: int, x: int) -> float:
    from scipy.ndimage import gaussian_filter

    data = np.asarray(block, dtype=np.float32)
    sigma = [s if n > 1 else 0.0 for n in data.shape]
    return float((gaussian_filter(data, sigma) if s > 0 else data)[y, z, x])


def _fitted(
    plan: MapPlan, at: tuple[int, int, int], raw: FloatArray, factor: FloatArray, p: MapsParameters
) -> VoxelSpectrum:
    """Fit what the maps fit; `raw` is what the components of `plan` are weights of."""
    from scipy.interpolate import CubicHermiteSpline

    energy, value = np.asarray(plan.energies_ev, dtype=float), raw * factor
    elements, edge, shift = np.full(len(value), np.nan), np.full(len(value), np.nan), float("nan")
    use = ~np.isin(energy, plan.left_out_ev)
    if plan.elements:
        factors = {e: plan.white_lines.get(e, (p.white_line(e),))[0] for e in plan.elements}
        columns, noise = fit_columns(energy, factors, (), p)[use], np.sqrt(plan.noise[use])
        size = np.sqrt(np.sum((columns / noise[:, None]) ** 2, axis=0))
        found = np.linalg.lstsq(columns / noise[:, None] / size, value[use] / noise, rcond=None)[0] / size
        elements[use] = columns @ found
    if plan.edge is not None:
        shift = float(
            plan.edge.shift(np.array(plan.components["shift"] @ raw), np.array(plan.components["level"] @ raw))
        )
    scanned = p.scanned_edge or scanned_element(energy, plan.elements)
    if np.isfinite(shift) and scanned is not None:
        e0 = edge_energy_ev(scanned)
        near = (energy >= e0 + PRE_EV[0]) & (energy <= e0 + POST_EV[1])
        nodes, where = np.unique(energy[near], return_inverse=True)
        mean = np.bincount(where, weights=plan.spectrum[near]) / np.bincount(where)
        curve = CubicHermiteSpline(nodes, mean, np.gradient(mean, nodes))
        inside = np.clip(energy[near] - shift, nodes[0], nodes[-1])
        design = np.stack([curve(inside), np.ones(len(where)), (energy[near] - e0) / 100], axis=1)
        edge[near] = design @ np.linalg.lstsq(design, value[near], rcond=None)[0]
    amounts = {e: float(plan.components[e] @ raw) for e in plan.elements}
    return VoxelSpectrum(at, energy, value, elements, edge, amounts, shift, plan.areal)
