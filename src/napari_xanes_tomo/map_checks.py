"""What the maps are checked and sharpened by before they are made: some rows of all energies, held at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .chemistry import MapPlan
from .maps import AlignedEnergy, component_sinograms, grid_of
from .model import FloatArray
from .reconstruction import fbp

__all__ = ["Rows", "follow_edge", "read_rows"]

F32 = npt.NDArray[np.float32]
_LEAST_VOXELS = 2000  # for the slopes of the amounts over the edge energy


@dataclass(frozen=True)
class Rows:
    """Some rows of all energies on the common grid.

    Attributes
    ----------
    lines : (energy, angle, row, column) array
        Line integrals times the share of the half turn that the angle stands for at its energy.
    theta_deg : (angles,) array
    per_cm : float
        1/cm of a reconstructed 1/voxel.
    smoothing : float
        Of the maps, voxels.
    filter : str
        Of the reconstruction.
    """

    lines: F32
    theta_deg: FloatArray
    per_cm: float
    smoothing: float
    filter: str

    def volume(self, weights: FloatArray, *, part: slice = slice(None), smoothing: float | None = None) -> F32:
        """Reconstruct the sum of the energies with `weights`, (row, z, x), from every angle or those of `part`.

        A part counts for all: its angles stand for those left out.
        """
        from scipy.ndimage import gaussian_filter

        used = np.flatnonzero(weights)
        lines = np.tensordot(np.asarray(weights, np.float32)[used], self.lines[used], axes=(0, 0))
        times = len(self.theta_deg) / len(self.theta_deg[part])
        lines = np.ascontiguousarray(lines[part]) * np.float32(self.per_cm * times)
        theta = self.theta_deg[part]
        volume = fbp(lines, theta, weights=np.ones(len(theta)), filter=self.filter)
        s = self.smoothing if smoothing is None else smoothing
        return gaussian_filter(volume, s) if s > 0 else volume


def read_rows(
    energies: Sequence[AlignedEnergy],
    plan: MapPlan,
    voxel_nm: float,
    *,
    rows: int,
    bin: int = 1,
    smoothing: float = 1.0,
    filter: str = "ramp",
    threads: int | None = None,
) -> Rows:
    """Read and place `rows` rows in the middle of the common grid, of all energies.

    Parameters
    ----------
    energies : sequence of AlignedEnergy
        In the order of the plan.
    plan : MapPlan
    voxel_nm : float
        Of one voxel.
    rows : int
    bin : int
        Reference pixels per voxel.
    smoothing, filter
        As the maps are made with.
    threads : int, optional
    """
    n = len(energies)
    single = replace(plan, components={f"@{k}": np.eye(n)[k] for k in range(n)})
    height = grid_of(energies, bin)[0]
    first = max(0, (height - rows) // 2)
    lines, theta = component_sinograms(energies, single, (first, min(height, first + rows)), bin=bin, threads=threads)
    order = np.argsort(theta, kind="stable")
    return Rows(np.ascontiguousarray(lines[:, order]), theta[order], 1e7 / voxel_nm, smoothing, filter)


def follow_edge(plan: MapPlan, rows: Rows) -> dict[str, float] | str:
    """Measure how the amounts of `plan.helped` follow the position of the edge: {element: slope}, or why it cannot be.

    The amounts that use the scanned edge part from those of the table alone by noise and by whatever in the edge moves
    with its position: a curve between energies that lie too far apart, a white line that grows as the edge moves. The
    second is the slope of the difference over the component ``shift``. The noise of the two is the same counts', so
    that each is taken from its own half of the angles (instrumental variables). Where no voxel's edge stands out of
    the noise there is nothing to follow and the slope is 0.

    Parameters
    ----------
    plan : MapPlan
    rows : Rows
    """
    if not plan.helped or plan.edge is None:
        return "too few energies in the scanned edge"
    halves = (slice(0, None, 2), slice(1, None, 2))
    if len(rows.theta_deg) < 16:
        return f"{len(rows.theta_deg)} angles make no two halves"
    shape = rows.volume(plan.components["shape"])
    body = shape > 0.5 * plan.shape_level
    if body.sum() < _LEAST_VOXELS:
        return f"only {int(body.sum())} voxels of the particle in the middle rows"
    shift, level = (
        [rows.volume(plan.components[name], part=part)[body].astype(float) for part in halves]
        for name in ("shift", "level")
    )
    cross = np.array([[shift[0] @ shift[1], shift[0] @ level[1]], [level[0] @ shift[1], level[0] @ level[1]]])
    cross = (cross + cross.T) / 2
    if not cross[0, 0] > 0.2 * np.sqrt((shift[0] @ shift[0]) * (shift[1] @ shift[1])):
        return dict.fromkeys(plan.helped, 0.0)
    out = {}
    for element, weights in plan.helped.items():
        more = [rows.volume(weights - plan.components[element], part=part)[body].astype(float) for part in halves]
        right = [more[0] @ v[1] + more[1] @ v[0] for v in (shift, level)]
        out[element] = float(np.linalg.solve(cross, np.array(right) / 2)[0])
    return out
