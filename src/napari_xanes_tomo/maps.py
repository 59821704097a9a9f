"""Maps: densities of the elements and the position of the scanned edge, from aligned projections.

Everything here that is asked of a voxel's spectrum is linear in absorbance up to the last step, so the energies are
combined projection pixel by projection pixel and only the few components are reconstructed. That is the same as
reconstructing every energy and fitting each voxel, for a fraction of the work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .absorbance import read_absorbance
from .edges import bracketed_elements, edge_energy_ev, mass_attenuation, scanned_element
from .flats import Beam
from .model import Alignment, EnergyScan, FloatArray, XanesTomoError
from .recipe import MapsParameters
from .reconstruction import angular_weights, fbp
from .resample import place, rows_needed
from .spectra import EdgeShift, edge_at_half, edge_shift, normalisation

__all__ = ["AlignedEnergy", "MapPlan", "Slab", "component_sinograms", "finish_slab", "map_slab", "plan_maps"]

F32 = npt.NDArray[np.float32]
_ANGLE_TOLERANCE_DEG = 0.05


@dataclass(frozen=True)
class AlignedEnergy:
    """One energy, ready to be placed on the common grid.

    Attributes
    ----------
    scan : EnergyScan
    alignment : Alignment
        Raw px; its status tells which projections are used.
    air : (n, 3) array
        Air plane of every projection; see `absorbance.plane`.
    mask : (y, x) bool array or None
        Pixels of the camera that are not to be trusted, besides those the flats showed.
    beam : Beam or None
        Flats, stray light and bad pixels as the estimation used them; the plain flats of every half unless given.
    """

    scan: EnergyScan
    alignment: Alignment
    air: FloatArray
    mask: npt.NDArray[np.bool_] | None = None
    beam: Beam | None = None

    @property
    def used(self) -> npt.NDArray[np.intp]:
        """Numbers of the projections that are used."""
        ok = np.array([s == "ok" for s in self.alignment.status]) & self.scan.usable
        return np.flatnonzero(ok & np.isfinite(self.alignment.shift).all(axis=1))


@dataclass(frozen=True)
class MapPlan:
    """Which components are reconstructed, how they combine, and why some maps are missing.

    Attributes
    ----------
    energies_ev : (energies,) array
    components : dict of str to (energies,) array
        Weights on the linear attenuation in 1/cm: ``Mn, Co, Ni`` give g/cm3, ``shape`` the mean of all
        energies that shows the particle with the least noise, ``shift`` and ``level`` the two parts of the edge shift.
    elements : tuple of str
    left_out_ev : tuple of float
        Energies with no part in the element fit.
    edge : EdgeShift or None
    edge_jump : float
        Of the mean spectrum, 1/cm.
    edge_half_ev : float
        E(0.5) of the normalised mean spectrum, eV; NaN where no energy lies on either side of it.
    shape_level : float
        Mean of the component ``shape`` in the particle, 1/cm.
    reference_ev : float
        Energy of the common grid.
    absent : dict of str to str
        Maps that cannot be made, with the reason.
    """

    energies_ev: FloatArray
    components: Mapping[str, FloatArray]
    elements: tuple[str, ...]
    left_out_ev: tuple[float, ...]
    edge: EdgeShift | None
    edge_jump: float
    edge_half_ev: float
    shape_level: float
    reference_ev: float
    absent: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the maps that `finish_slab` makes, in order."""
        out: list[str] = [*self.elements]
        if self.elements:
            out += [f"{e}_fraction" for e in self.elements] if len(self.elements) > 1 else []
            out.append("density")
        if self.edge is not None:
            half = ["edge_energy"] if np.isfinite(self.edge_half_ev) else []
            out += ["edge_energy_relative", *half, "edge_jump"]
        return (*out, "mask", "coverage")

    def unit(self, name: str) -> str:
        """Return the unit of the map `name`."""
        if name in self.elements or name == "density":
            return "g/cm3"
        return {"edge_energy_relative": "eV", "edge_energy": "eV", "edge_jump": "1/cm"}.get(name, "")


def plan_maps(
    energies_ev: npt.ArrayLike,
    spectrum: npt.ArrayLike,
    variance: npt.ArrayLike,
    reference: int,
    parameters: MapsParameters | None = None,
) -> MapPlan:
    """Decide what can be mapped, and the weights of every component.

    Parameters
    ----------
    energies_ev : (energies,) array
    spectrum : (energies,) array
        Mean linear attenuation of the particle, 1/cm.
    variance : (energies,) array
        Relative noise variance of a voxel at every energy.
    reference : int
        Number of the reference energy.
    parameters : MapsParameters, optional

    Notes
    -----
    The element fit is unconstrained least squares with one weight per energy, on tabulated mass attenuation and a
    remainder that falls with the third power of the energy. Energies from 15 eV below to 60 eV above the scanned
    edge are left out: there the attenuation follows the chemical state, not the table.
    """
    p = MapsParameters() if parameters is None else parameters
    energy = np.asarray(energies_ev, dtype=float)
    mean = np.asarray(spectrum, dtype=float)
    noise = np.asarray(variance, dtype=float)
    present = bracketed_elements(energy)
    elements = present if p.elements is None else tuple(dict.fromkeys(p.elements))
    if p.scanned_edge is not None:
        scanned: str | None = p.scanned_edge
        edge_energy_ev(p.scanned_edge)
    else:
        scanned = scanned_element(energy, present)
    absent: dict[str, str] = {}
    use = np.ones(len(energy), dtype=bool)
    if scanned is not None:
        e0 = edge_energy_ev(scanned)
        use = (energy < e0 - p.leave_out_below_ev) | (energy > e0 + p.leave_out_above_ev)
    kept = bracketed_elements(energy[use])
    good = tuple(e for e in elements if e in kept)
    for e in elements:
        if e not in good:
            absent[e] = f"the energies do not bracket the K edge of {e} at {edge_energy_ev(e):.0f} eV" + (
                " once the scanned edge is left out" if e == scanned and e in present else ""
            )
    if p.elements is None and not elements:
        absent["elements"] = "no two neighbouring energies bracket a K edge"
    components: dict[str, FloatArray] = {}
    # Every element whose edge is bracketed takes part in the fit, asked for or not: its edge is in the data.
    if good and use.sum() < len(kept) + 1:
        for e in good:
            absent[e] = f"{int(use.sum())} energies cannot tell {len(kept)} elements and a remainder apart"
        good = ()
    if good:
        table = np.stack([mass_attenuation(e, energy) for e in kept] + [(energy / energy.mean()) ** -3.0], axis=1)
        weight = np.where(use, 1.0 / noise, 0.0)
        size = np.sqrt(np.sum(weight[:, None] * table**2, axis=0))
        scaled = table / size
        solve = np.linalg.solve(scaled.T @ (weight[:, None] * scaled), scaled.T * weight) / size[:, None]
        components |= {e: solve[kept.index(e)] for e in good}
    edge, jump, half = None, float("nan"), float("nan")
    edge_names = ("edge_energy_relative", "edge_energy", "edge_jump")
    if scanned is None:
        absent |= dict.fromkeys(edge_names, "no edge was scanned (two energies from 15 below to 60 eV above it)")
    else:
        norm = normalisation(energy, mean, edge_energy_ev(scanned))
        edge = edge_shift(energy, mean, edge_energy_ev(scanned), variance=noise)
        if norm is None or edge is None:
            edge = None
            why = f"the energies do not determine the {scanned} edge: levels below and above it and its rise are needed"
            absent |= dict.fromkeys(edge_names, why)
        else:
            jump = norm.jump
            near = np.abs(energy - edge_energy_ev(scanned)) < 100
            half = edge_at_half(energy[near], norm(energy[near], mean[near]))
            if not np.isfinite(half):
                absent["edge_energy"] = "no two energies near the edge lie on either side of the mean spectrum's E(0.5)"
            components |= {"shift": edge.numerator, "level": edge.denominator}
    # All energies together show the particle's shape with the least noise.
    shape = np.maximum(mean, 0.0) / noise
    components["shape"] = shape / shape.sum()
    return MapPlan(
        energy,
        components,
        good,
        tuple(float(v) for v in energy[~use]),
        edge,
        jump,
        half,
        float(components["shape"] @ mean),
        float(energy[reference]),
        absent,
    )


@dataclass(frozen=True)
class Slab:
    """Rows of the common grid that are made together.

    Attributes
    ----------
    y0, y1 : int
        Rows wanted.
    halo : int
        Further rows on either side for the smoothing.
    """

    y0: int
    y1: int
    halo: int

    def padded(self, rows: int) -> tuple[int, int]:
        """Return the rows with halo that exist in a grid of `rows` rows."""
        return max(0, self.y0 - self.halo), min(rows, self.y1 + self.halo)


def common_angles(energies: Sequence[AlignedEnergy]) -> tuple[FloatArray, list[npt.NDArray[np.intp]]]:
    """Return the angles of all energies together, degrees, and where every energy's used projections stand in them.

    Angles within 0.05 degrees are one.
    """
    theta: FloatArray = np.array([], dtype=float)
    places: list[npt.NDArray[np.intp]] = []
    for item in energies:
        wanted = np.asarray(item.scan.theta_deg, dtype=float)[item.used]
        where = np.full(len(wanted), -1, dtype=np.intp)
        taken: set[int] = set()
        for i, angle in enumerate(wanted):
            if len(theta):
                k = int(np.argmin(np.abs(theta - angle)))
                if abs(theta[k] - angle) <= _ANGLE_TOLERANCE_DEG and k not in taken:
                    where[i] = k
                    taken.add(k)
        new = np.flatnonzero(where < 0)
        where[new] = len(theta) + np.arange(len(new))
        theta = np.concatenate([theta, wanted[new]])
        places.append(where)
    return theta, places


def component_sinograms(
    energies: Sequence[AlignedEnergy],
    plan: MapPlan,
    rows: tuple[int, int],
    *,
    threads: int | None = None,
) -> tuple[F32, FloatArray]:
    """Read, place and combine one slab: (component, angle, row, column) and the angles in degrees.

    Every projection is weighted by the share of the half turn it stands for at its own energy, so that a
    back-projection with weight 1 gives the linear attenuation per reference pixel.

    Parameters
    ----------
    energies : sequence of AlignedEnergy
        In the order of the plan.
    plan : MapPlan
    rows : (int, int)
        Rows of the common grid.
    threads : int, optional
        Used inside one slab.
    """
    shape = energies[0].scan.frames.frame_shape
    theta, places = common_angles(energies)
    weights = np.array(list(plan.components.values()))
    out = np.zeros((len(weights), len(theta), rows[1] - rows[0], shape[1]), dtype=np.float32)
    for e, item in enumerate(energies):
        if not np.any(weights[:, e]):
            continue
        index, scan = item.used, item.scan
        y0, y1 = rows_needed(item.alignment, rows=rows, grid_shape=shape, frame_shape=shape, index=index.tolist())
        if y1 <= y0:
            continue
        data = read_absorbance(scan, item.beam, index, (y0, y1), air=item.air, mask=item.mask, threads=threads)
        placed = place(
            data, item.alignment, grid_shape=shape, rows=rows, index=index.tolist(), row_offset=y0, frame_shape=shape,
            threads=threads,
        )  # fmt: skip
        placed *= angular_weights(np.asarray(scan.theta_deg, dtype=float)[index]).astype(np.float32)[:, None, None]
        for c, w in enumerate(weights[:, e]):
            if w:
                out[c, places[e]] += np.float32(w) * placed
    return out, theta


def coverage_slab(energies: Sequence[AlignedEnergy], plan: MapPlan, rows: tuple[int, int]) -> tuple[F32, F32]:
    """Return (rows, z, x) the part of all (energy, angle) pairs that saw a voxel, and the least of any one energy.

    A voxel counts as seen at an angle when its row and its distance from the axis lie inside the recorded frame.
    """
    height, width = energies[0].scan.frames.frame_shape
    q_y = np.arange(*rows) - (height - 1) / 2
    c = np.arange(width) - (width - 1) / 2
    radius = np.sqrt(c[:, None] ** 2 + c[None, :] ** 2)
    steps = np.arange(int(radius.max()) + 2)
    total = np.zeros((len(q_y), len(steps)))
    least = np.ones((len(q_y), len(steps)))
    used = np.any(np.array(list(plan.components.values())) != 0, axis=0)
    for e, item in enumerate(energies):
        a = item.alignment
        shift = a.shift[item.used]
        y = a.magnification * q_y[None, :] + shift[:, :1] + (height - 1) / 2
        inside_y = (y >= 0) & (y <= height - 1)
        reach = ((width - 1) / 2 - np.abs(shift[:, 1])) / a.magnification
        inside_x = steps[None, :] <= reach[:, None]
        seen = (inside_y.T.astype(float) @ inside_x.astype(float)) / max(1, len(shift))
        total += seen * len(shift)
        if used[e]:
            least = np.minimum(least, seen)
    total /= max(1, sum(len(i.used) for i in energies))
    low = np.floor(radius).astype(int)
    return total[:, low].astype(np.float32), least[:, low].astype(np.float32)


def finish_slab(
    plan: MapPlan,
    volumes: Mapping[str, F32],
    coverage: F32,
    least: F32,
    keep: slice,
    parameters: MapsParameters,
) -> dict[str, F32]:
    """Turn component volumes (rows with halo, z, x) into maps of the rows `keep`.

    `volumes` are in the units of the plan's components. Maps hold NaN where a ratio has no meaning (no nickel, no
    density); ``mask`` is 1 inside the particle where at least half of the angles of every energy needed saw the voxel.
    """
    from scipy.ndimage import gaussian_filter

    s = parameters.smoothing_voxel
    v = {n: (gaussian_filter(x, s)[keep] if s > 0 else x[keep]) for n, x in volumes.items()}
    maps: dict[str, F32] = {}
    body = v["shape"] > 0.5 * plan.shape_level
    if s > 0:
        # The blur mixes cracks and air into what lies beside them. The shape, known from all energies with little
        # noise, says how much: composition is taken from the smoothed components, the amount from the fine shape.
        fine = gaussian_filter(volumes["shape"], parameters.shape_smoothing * s)[keep]
        with np.errstate(divide="ignore", invalid="ignore"):
            sharper = np.where(v["shape"] > 0.2 * plan.shape_level, fine / v["shape"], 1.0).astype(np.float32)
        for e in plan.elements:
            v[e] *= sharper
    if plan.elements:
        for e in plan.elements:
            maps[e] = v[e]
        maps["density"] = np.sum([v[e] for e in plan.elements], axis=0, dtype=np.float32)
        if len(plan.elements) > 1:
            moles = {e: v[e] / np.float32(atomic_mass(e)) for e in plan.elements}
            total = np.sum(list(moles.values()), axis=0, dtype=np.float32)
            with np.errstate(divide="ignore", invalid="ignore"):
                for e in plan.elements:
                    maps[f"{e}_fraction"] = np.where(body & (total > 0), moles[e] / total, np.nan).astype(np.float32)
    if plan.edge is not None:
        shift = plan.edge.shift(v["shift"], v["level"])
        relative = np.where(v["level"] > 0.2, shift, np.nan).astype(np.float32)
        maps["edge_energy_relative"] = relative
        offset = parameters.energy_offset_ev or 0.0
        if np.isfinite(plan.edge_half_ev):
            maps["edge_energy"] = relative + np.float32(plan.edge_half_ev + offset)
        maps["edge_jump"] = (v["level"] * plan.edge_jump).astype(np.float32)
    maps["mask"] = (body & (least >= 0.5)).astype(np.float32)
    maps["coverage"] = coverage
    return {name: np.ascontiguousarray(maps[name]) for name in plan.names}


def map_slab(
    energies: Sequence[AlignedEnergy],
    plan: MapPlan,
    slab: Slab,
    voxel_nm: float,
    parameters: MapsParameters,
    *,
    threads: int | None = None,
) -> dict[str, F32]:
    """Make all maps of one slab, straight from the raw files: {name: (y1 - y0, z, x) float32}.

    Parameters
    ----------
    energies : sequence of AlignedEnergy
    plan : MapPlan
    slab : Slab
    voxel_nm : float
        Reference pixel, nm.
    parameters : MapsParameters
    threads : int, optional
        Used inside one slab.
    """
    height, _ = energies[0].scan.frames.frame_shape
    rows = slab.padded(height)
    sinograms, theta = component_sinograms(energies, plan, rows, threads=threads)
    per_cm = np.float32(1e7 / voxel_nm)
    ones = np.ones(len(theta))
    volumes = {
        name: fbp(sinograms[c], theta, weights=ones, filter=parameters.filter, threads=threads) * per_cm
        for c, name in enumerate(plan.components)
    }
    coverage, least = coverage_slab(energies, plan, (slab.y0, slab.y1))
    keep = slice(slab.y0 - rows[0], slab.y1 - rows[0])
    return finish_slab(plan, volumes, coverage, least, keep, parameters)


def atomic_mass(element: str) -> float:
    """Return the molar mass of an element, g/mol."""
    import xraydb

    return float(xraydb.atomic_mass(element))


def require_energies(energies: Sequence[Any]) -> None:
    """Raise where there is nothing to map."""
    if not energies:
        raise XanesTomoError("maps: expected at least one registered energy, got none; see the status of the energies")
