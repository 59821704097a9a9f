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

from .air import plane
from .counts import bin_frames, own_beam, read_absorbance
from .edges import bracketed_elements, edge_energy_ev, mass_attenuation, scanned_element
from .flats import Beam, exposures
from .model import Alignment, EnergyScan, FloatArray, XanesTomoError
from .recipe import MapsParameters
from .reconstruction import angular_weights, fbp
from .resample import place, rows_needed
from .spectra import EdgeShift, edge_at_half, edge_shift, normalisation
from .uncertainty import (
    Covariance,
    coarse_step,
    decimate,
    expected_variance,
    moved_variance,
    noise_gain,
    reconstruct_rows,
    upsampler,
)

__all__ = [
    "AlignedEnergy",
    "MapPlan",
    "Slab",
    "component_sinograms",
    "finish_slab",
    "halo_rows",
    "map_slab",
    "plan_maps",
]

F32 = npt.NDArray[np.float32]
_ANGLE_TOLERANCE_DEG = 0.05
# Relative, one standard deviation: what tables of mass attenuation differ by across an edge, and the pixel size.
SYSTEMATIC = {"attenuation": 0.02, "pixel_size": 0.012}
SIGMA = "_sigma"  # total standard error of a map
SIGMA_ALIGNMENT = "_sigma_alignment"  # the part of it that comes from jitter correction and registration


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
    magnification_sigma : float
    translation_sigma : (3,) tuple
        Standard errors, common to all angles, of the energy's place: y, x, z in px of the reference.
    """

    scan: EnergyScan
    alignment: Alignment
    air: FloatArray
    mask: npt.NDArray[np.bool_] | None = None
    beam: Beam | None = None
    magnification_sigma: float = 0.0
    translation_sigma: tuple[float, float, float] = (0.0, 0.0, 0.0)

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
    spectrum : (energies,) array
        Mean linear attenuation of the particle, 1/cm.
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
    spectrum: FloatArray
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
        errors = [f"{n}{end}" for n in out for end in (SIGMA, SIGMA_ALIGNMENT)]
        return (*out, *errors, "mask", "coverage")

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Pairs of components whose covariance the errors of the maps need."""
        total = ("density",) if self.elements else ()
        groups = [self.elements, total, ("shift", "level") if self.edge is not None else (), ("shape",)]
        return tuple((a, b) for group in groups for i, a in enumerate(group) for b in group[i:])

    def weights(self, name: str) -> FloatArray:
        """Weights of a component; ``density`` is the sum of the elements."""
        if name == "density":
            return np.asarray(np.sum([self.components[e] for e in self.elements], axis=0))
        return self.components[name]

    def about(self, name: str, parameters: MapsParameters, blur_px: float, bin: int = 1) -> dict[str, Any]:
        """Return what a reader of the map `name` must know: its point spread, and its systematic errors as numbers.

        `blur_px` is the blur of the recorded frames (point spread and pixel), px of the reference.
        """
        if name in ("mask", "coverage") or name.endswith((SIGMA, SIGMA_ALIGNMENT)):
            return {}
        amount = name in self.elements or name == "density"
        smoothing = parameters.smoothing_voxel * (parameters.shape_smoothing if amount else 1.0)
        out: dict[str, Any] = {"psf_sigma_voxel": round(float(np.hypot(blur_px / bin, smoothing)), 4)}
        if amount or name.endswith("_fraction"):
            out["systematic_relative"] = dict(SYSTEMATIC if amount else {"attenuation": SYSTEMATIC["attenuation"]})
        return out

    def unit(self, name: str) -> str:
        """Return the unit of the map `name`."""
        name = name.removesuffix(SIGMA_ALIGNMENT).removesuffix(SIGMA)
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
        mean,
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


def halo_rows(parameters: MapsParameters) -> int:
    """Return how many rows a slab needs on either side: the reach of the smoothing, and one for derivatives."""
    return int(np.ceil(4 * parameters.smoothing_voxel)) + 1


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


@dataclass(frozen=True)
class Combined:
    """One slab, read, placed and combined.

    Attributes
    ----------
    sinograms : (component, angle, row, column) array
    theta_deg : (angles,) array
    noise : (pair, angle, coarse row, coarse column) array or None
        Covariance of a filtered and smoothed sample of the sinograms, of the plan's pairs.
    first : int
        Number of the first coarse row.
    moved_y, moved_x : (pair, angle) arrays or None
        What the squared change per px of displacement is multiplied with.
    """

    sinograms: F32
    theta_deg: FloatArray
    noise: F32 | None = None
    first: int = 0
    moved_y: FloatArray | None = None
    moved_x: FloatArray | None = None


def grid_of(energies: Sequence[AlignedEnergy], bin: int) -> tuple[int, int]:
    """Return (rows, columns) of the common grid with voxels of `bin` reference pixels."""
    height, width = energies[0].scan.frames.frame_shape
    return max(1, height // bin), max(1, width // bin)


def component_sinograms(
    energies: Sequence[AlignedEnergy],
    plan: MapPlan,
    rows: tuple[int, int],
    *,
    bin: int = 1,
    threads: int | None = None,
) -> tuple[F32, FloatArray]:
    """Read, place and combine one slab: (component, angle, row, column) and the angles in degrees.

    Every projection is weighted by the share of the half turn it stands for at its own energy, so that a
    back-projection with weight 1 gives the linear attenuation per voxel.

    Parameters
    ----------
    energies : sequence of AlignedEnergy
        In the order of the plan.
    plan : MapPlan
    rows : (int, int)
        Rows of the common grid.
    bin : int
        Reference pixels per voxel.
    threads : int, optional
        Used inside one slab.
    """
    made = combine_slab(energies, plan, rows, bin=bin, threads=threads)
    return made.sinograms, made.theta_deg


def combine_slab(
    energies: Sequence[AlignedEnergy],
    plan: MapPlan,
    rows: tuple[int, int],
    *,
    bin: int = 1,
    keep: tuple[int, int] | None = None,
    parameters: MapsParameters | None = None,
    threads: int | None = None,
) -> Combined:
    """Read, place and combine one slab, see `component_sinograms`; with `keep`, the errors of those rows as well."""
    p = MapsParameters() if parameters is None else parameters
    frame = energies[0].scan.frames.frame_shape
    grid = grid_of(energies, bin)
    theta, places = common_angles(energies)
    weights = np.array(list(plan.components.values()))
    out = np.zeros((len(weights), len(theta), rows[1] - rows[0], grid[1]), dtype=np.float32)
    products = [plan.weights(a) * plan.weights(b) for a, b in plan.pairs] if keep else []
    step = coarse_step(grid[1])
    coarse = (-(-grid[0] // step), -(-grid[1] // step))
    first, end = _coarse_rows(keep or rows, grid[0], coarse[0], step)
    noise = np.zeros((len(products), len(theta), end - first, coarse[1]), np.float32) if keep else None
    moved = np.zeros((2, len(products), len(theta)))
    for e, item in enumerate(energies):
        if not np.any(weights[:, e]):
            continue
        index, scan = item.used, item.scan
        chosen = index.tolist()
        y0, y1 = rows_needed(item.alignment, rows=rows, grid_shape=grid, frame_shape=frame, bin=bin, index=chosen)
        wide = bin * step
        blocks = item.alignment.binned(wide, frame)
        small = (max(1, frame[0] // wide), max(1, frame[1] // wide))
        b0 = b1 = 0
        if noise is not None:
            b0, b1 = rows_needed(blocks, rows=(first, end), grid_shape=coarse, frame_shape=small, order=1, index=chosen)
            if b1 > b0:
                y0, y1 = (min(y0, b0 * wide), max(y1, b1 * wide)) if y1 > y0 else (b0 * wide, b1 * wide)
                y1 = min(y1, frame[0])
        if y1 <= y0:
            continue
        beam = own_beam(scan) if item.beam is None else item.beam
        basis, doubt = beam.basis((y0, y1), variance=noise is not None)
        data = read_absorbance(
            scan, beam, index, (y0, y1), air=item.air, mask=item.mask, basis=basis, threads=threads
        )  # fmt: skip
        variance = np.empty((len(index), b1 - b0, small[1]), dtype=np.float32)
        if b1 > b0 and doubt is not None:

            def blocked(frames: F32, at: int = b0 * wide - y0, wide: int = wide, like: F32 = variance) -> F32:
                rows, columns = like.shape[1:]
                return bin_frames(frames[:, at : at + rows * wide], wide)[:, :, :columns]

            variance = expected_variance(
                blocked(data) + plane(np.nan_to_num(item.air[index]), small, (b0, b1)).astype(np.float32),
                exposures(scan.exposure_s)[index],
                np.tensordot(beam.weights[index], blocked(basis), axes=(1, 0)).astype(np.float32),
                np.tensordot(beam.weights[index] ** 2, blocked(doubt), axes=(1, 0)).astype(np.float32),
                beam.stray[index],
                beam.detector,
            )
        placed = place(
            data, item.alignment, grid_shape=grid, rows=rows, index=chosen, row_offset=y0, frame_shape=frame, bin=bin,
            threads=threads,
        )  # fmt: skip
        share = angular_weights(np.asarray(scan.theta_deg, dtype=float)[index])
        placed *= share.astype(np.float32)[:, None, None]
        for c, w in enumerate(weights[:, e]):
            if w:
                out[c, places[e]] += np.float32(w) * placed
        if noise is None:
            continue
        strength = plan.spectrum[e] / plan.shape_level
        spread = (share[:, None] * strength * item.alignment.sigma[index] / item.alignment.magnification / bin) ** 2
        spread = np.nan_to_num(spread).T
        gains = {
            s: share**2
            * noise_gain(
                item.alignment, index=chosen, grid_shape=grid, frame_shape=frame, bin=bin, filter=p.filter, smoothing=s
            )
            for s in {p.smoothing_voxel, p.shape_smoothing * p.smoothing_voxel}
        }
        seen = None
        if b1 > b0:
            seen = place(
                variance, blocks, grid_shape=coarse, rows=(first, end), index=chosen, row_offset=b0, frame_shape=small,
                order=1, threads=threads,
            )  # fmt: skip
        for k, product in enumerate(products):
            w = float(product[e])
            if not w:
                continue
            moved[:, k, places[e]] += w * spread
            if seen is not None:
                gain = gains[p.smoothing_voxel * (p.shape_smoothing if plan.pairs[k][0] == "shape" else 1.0)]
                noise[k, places[e]] += (w * gain).astype(np.float32)[:, None, None] * seen
    return Combined(out, theta, noise, first, moved[0] if keep else None, moved[1] if keep else None)


def _coarse_rows(rows: tuple[int, int], fine: int, coarse: int, step: int) -> tuple[int, int]:
    """First and last + 1 coarse row between which the fine rows lie; the same for a row whatever its slab."""
    at = (np.array([rows[0], max(rows[0], rows[1] - 1)]) - (fine - 1) / 2) / step + (coarse - 1) / 2
    first = int(np.clip(np.floor(at[0]), 0, coarse - 1))
    return first, int(np.clip(np.floor(at[1]) + 2, first + 1, coarse))


def covariance(
    energies: Sequence[AlignedEnergy],
    plan: MapPlan,
    made: Combined,
    rows: tuple[int, int],
    keep: tuple[int, int],
    *,
    bin: int,
    parameters: MapsParameters,
    threads: int | None = None,
) -> Covariance:
    """Reconstruct the covariances of a slab that was combined with its errors, unit 1/voxel squared.

    Parameters
    ----------
    energies, plan
    made : Combined
    rows, keep : (int, int)
        Rows of `made`, and those wanted.
    bin, parameters, threads
        As in `combine_slab`.
    """
    assert made.noise is not None
    assert made.moved_y is not None
    assert made.moved_x is not None
    p = parameters
    grid = grid_of(energies, bin)
    step = coarse_step(grid[1])
    coarse_rows, columns = -(-grid[0] // step), made.noise.shape[3]
    theta = made.theta_deg
    total = np.zeros(len(theta))
    for e, (item, where) in enumerate(zip(energies, common_angles(energies)[1], strict=True)):
        total[where] += plan.components["shape"][e] * angular_weights(
            np.asarray(item.scan.theta_deg, dtype=float)[item.used]
        )
    shape = made.sinograms[list(plan.components).index("shape")]
    lines = shape / np.maximum(total, 1e-12).astype(np.float32)[:, None, None]
    inside = slice(keep[0] - rows[0], keep[1] - rows[0])
    up, across = moved_variance(lines, filter=p.filter, smoothing=p.smoothing_voxel, keep=inside)
    up, across = decimate(up, step, columns), decimate(across, step, columns)
    jitter = made.moved_y.astype(np.float32)[:, :, None, None] * up
    jitter += made.moved_x.astype(np.float32)[:, :, None, None] * across
    strength = plan.spectrum / plan.shape_level
    place_error = np.array([[*(t / bin for t in i.translation_sigma), i.magnification_sigma] for i in energies])
    common = np.zeros((len(plan.pairs), 4))
    for k, (a, b) in enumerate(plan.pairs):
        w = plan.weights(a) * plan.weights(b) * strength**2
        ty, tx, tz, m = w @ place_error**2
        common[k] = ty, tz, tx, m
    weights = upsampler(grid[0], coarse_rows, step)[keep[0] : keep[1], made.first : made.first + made.noise.shape[2]]
    return Covariance(
        plan.pairs,
        reconstruct_rows(made.noise, theta, threads=threads),
        weights,
        reconstruct_rows(jitter, theta, threads=threads),
        common,
        upsampler(grid[1], columns, step),
        np.arange(*keep) - (grid[0] - 1) / 2,
    )


def coverage_slab(
    energies: Sequence[AlignedEnergy], plan: MapPlan, rows: tuple[int, int], *, bin: int = 1
) -> tuple[F32, F32]:
    """Return (rows, z, x) the part of all (energy, angle) pairs that saw a voxel, and the least of any one energy.

    A voxel counts as seen at an angle when its row and its distance from the axis lie inside the recorded frame.
    """
    height, width = energies[0].scan.frames.frame_shape
    grid = grid_of(energies, bin)
    q_y = bin * (np.arange(*rows) - (grid[0] - 1) / 2)
    c = bin * (np.arange(grid[1]) - (grid[1] - 1) / 2)
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
    errors: Covariance | None = None,
) -> dict[str, F32]:
    """Turn component volumes (rows with halo, z, x) into maps of the rows `keep`.

    `volumes` are in the units of the plan's components, and `errors` in those squared. Maps hold NaN where a ratio has
    no meaning (no nickel, no density); ``mask`` is 1 inside the particle where at least half of the angles of every
    energy needed saw the voxel. Without `errors` the standard errors are NaN.
    """
    from scipy.ndimage import gaussian_filter

    s = parameters.smoothing_voxel
    soft = {n: gaussian_filter(x, s) if s > 0 else x for n, x in volumes.items()}
    v = {n: x[keep] for n, x in soft.items()}
    maps: dict[str, F32] = {}
    body = v["shape"] > 0.5 * plan.shape_level
    sharper: F32 = np.ones_like(v["shape"])
    if s > 0:
        # The blur mixes cracks and air into what lies beside them. The shape, known from all energies with little
        # noise, says how much: composition is taken from the smoothed components, the amount from the fine shape.
        fine = gaussian_filter(volumes["shape"], parameters.shape_smoothing * s)[keep]
        with np.errstate(divide="ignore", invalid="ignore"):
            sharper = np.where(v["shape"] > 0.2 * plan.shape_level, fine / v["shape"], 1.0).astype(np.float32)
    if plan.elements:
        for e in plan.elements:
            maps[e] = v[e] * sharper
        maps["density"] = np.sum([maps[e] for e in plan.elements], axis=0, dtype=np.float32)
        if len(plan.elements) > 1:
            moles = {e: maps[e] / np.float32(atomic_mass(e)) for e in plan.elements}
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
    for name in plan.names:
        if name not in maps:
            maps[name] = np.full(body.shape, np.nan, np.float32)
    if errors is not None:
        whole = soft["shape"]
        for k in range(len(body)):
            gradient = _gradient(whole, (keep.start or 0) + k, errors.y[k])
            _row_errors(plan, {n: x[k] for n, x in v.items()}, sharper[k], errors.row(k, gradient), maps, k)
    return {name: np.ascontiguousarray(maps[name]) for name in plan.names}


def _gradient(volume: F32, k: int, y: float) -> tuple[F32, F32, F32, F32]:
    """Return the derivatives of row `k` (at `y` from the middle) along y, z, x and with its magnification.

    A magnified projection keeps its line integrals, so that the slices also gain in value: the last is r . grad + 1.
    """
    below, above = max(0, k - 1), min(len(volume) - 1, k + 1)
    g = (volume[above] - volume[below]) / np.float32(max(1, above - below))
    z, x = np.gradient(volume[k]) if min(volume.shape[1:]) > 1 else (np.zeros_like(g), np.zeros_like(g))
    c = (np.arange(volume.shape[1]) - (volume.shape[1] - 1) / 2).astype(np.float32)
    return g, z, x, np.asarray(volume[k] + np.float32(y) * g + c[:, None] * z + c[None, :] * x, np.float32)


def _row_errors(
    plan: MapPlan,
    v: Mapping[str, F32],
    sharper: F32,
    parts: Mapping[tuple[str, str], tuple[F32, F32]],
    maps: Mapping[str, F32],
    k: int,
) -> None:
    """Fill row `k` of the maps' standard errors; `v` are the smoothed components, `parts` their covariances."""

    def put(name: str, noise: F32, alignment: F32) -> None:
        value = maps[name][k]
        for end, square in ((SIGMA, noise + alignment), (SIGMA_ALIGNMENT, alignment)):
            sigma = np.sqrt(np.maximum(square, 0))
            maps[name + end][k] = _rounded(np.where(np.isfinite(value), sigma, np.nan))

    def combined(weights: Mapping[str, F32]) -> list[F32]:
        """Variance of the sum of weights times components, noise and alignment."""
        return [
            np.sum([weights[a] * weights[b] * parts[a, b][i] for a in weights for b in weights], axis=0)
            for i in range(2)
        ]

    if plan.elements:
        # The amount comes from the fine shape, whose own noise counts as well.
        shape = np.maximum(v["shape"], np.float32(0.2 * plan.shape_level))
        amount = parts["shape", "shape"][0] / shape**2 if not np.all(sharper == 1) else np.zeros_like(shape)
        for e in plan.elements:
            noise, alignment = combined({e: sharper})
            put(e, noise + amount * v[e] ** 2, alignment)
        noise, alignment = combined({"density": sharper})
        put("density", noise + amount * np.sum([v[e] for e in plan.elements], axis=0) ** 2, alignment)
        if len(plan.elements) > 1:
            mass = {e: np.float32(atomic_mass(e)) for e in plan.elements}
            total = np.sum([v[e] / mass[e] for e in plan.elements], axis=0)
            with np.errstate(divide="ignore", invalid="ignore"):
                for e in plan.elements:
                    share = v[e] / mass[e] / total
                    unit = {a: np.float32(a == e) for a in plan.elements}
                    put(f"{e}_fraction", *combined({a: (unit[a] - share) / mass[a] / total for a in plan.elements}))
    if plan.edge is not None:
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = v["shift"] / v["level"]
            slope = np.asarray(plan.edge.slope(ratio) / v["level"], dtype=np.float32)
            noise, alignment = combined({"shift": slope, "level": np.asarray(-slope * ratio, np.float32)})
        for name in ("edge_energy_relative", "edge_energy"):
            if name in maps:
                put(name, noise, alignment)
        put("edge_jump", *combined({"level": np.full(ratio.shape, plan.edge_jump, np.float32)}))


def _rounded(values: npt.NDArray[np.floating]) -> F32:
    """Keep 10 bits of the mantissa: a standard error known to a thousandth, which takes a third of the disk."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def map_slab(
    energies: Sequence[AlignedEnergy],
    plan: MapPlan,
    slab: Slab,
    voxel_nm: float,
    parameters: MapsParameters,
    *,
    bin: int = 1,
    threads: int | None = None,
) -> dict[str, F32]:
    """Make all maps of one slab, straight from the raw files: {name: (y1 - y0, z, x) float32}.

    Parameters
    ----------
    energies : sequence of AlignedEnergy
    plan : MapPlan
    slab : Slab
    voxel_nm : float
        Edge of a voxel, nm.
    parameters : MapsParameters
    bin : int
        Reference pixels per voxel.
    threads : int, optional
        Used inside one slab.
    """
    rows = slab.padded(grid_of(energies, bin)[0])
    wanted = (slab.y0, slab.y1)
    made = combine_slab(energies, plan, rows, bin=bin, keep=wanted, parameters=parameters, threads=threads)
    per_cm = np.float32(1e7 / voxel_nm)
    theta = made.theta_deg
    ones = np.ones(len(theta))
    volumes = {
        name: fbp(made.sinograms[c], theta, weights=ones, filter=parameters.filter, threads=threads) * per_cm
        for c, name in enumerate(plan.components)
    }
    errors = covariance(energies, plan, made, rows, wanted, bin=bin, parameters=parameters, threads=threads)
    errors = errors.scaled(per_cm)
    coverage, least = coverage_slab(energies, plan, wanted, bin=bin)
    keep = slice(slab.y0 - rows[0], slab.y1 - rows[0])
    return finish_slab(plan, volumes, coverage, least, keep, parameters, errors)


def atomic_mass(element: str) -> float:
    """Return the molar mass of an element, g/mol."""
    import xraydb

    return float(xraydb.atomic_mass(element))


def require_energies(energies: Sequence[Any]) -> None:
    """Raise where there is nothing to map."""
    if not energies:
        raise XanesTomoError("maps: expected at least one registered energy, got none; see the status of the energies")
