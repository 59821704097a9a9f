"""Maps: densities of the elements and the position of the scanned edge, from aligned projections.

Everything here that is asked of a voxel's spectrum is linear in absorbance up to the last step, so the energies are
combined projection pixel by projection pixel and only the few components are reconstructed. That is the same as
reconstructing every energy and fitting each voxel, for a fraction of the work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .agreement import bin_frames
from .air import plane
from .artefact import displaced_lines
from .chemistry import finish_slab
from .counts import own_beam, read_absorbance
from .flats import Beam, exposures
from .map_plan import EDGE, MapPlan
from .model import Alignment, EnergyScan, FloatArray, Progress, XanesTomoError, no_progress
from .recipe import MapsParameters
from .reconstruction import Reconstructor, angular_weights, reconstructor
from .resample import place, rows_needed, widened, widening
from .screening import filled
from .uncertainty import (
    Covariance,
    EvenCovariance,
    Unseen,
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
    "Slab",
    "component_sinograms",
    "halo_rows",
    "map_slab",
    "placed_rows",
    "volume_slab",
]

F32 = npt.NDArray[np.float32]
_FEWEST_SHARED = 8  # angles of an iterative reconstruction
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
    magnification_sigma : float
    translation_sigma : (3,) tuple
        Standard errors, common to all angles, of the energy's place: y, x, z in px of the reference.
    variance : (2,) tuple or None
        Of a voxel of a volume that was registered elsewhere, see `volume_slab`; None for projections.
    fill_lost : bool
        Whether lost projections are filled from their neighbours in the angle; see `screening.filled`. Coverage and
        errors stay those of the projections that were used.
    widen_px2 : float
        Variance of the blur that brings the energy to the point spread of the widest one, px^2 of the reference.
    grid : (int, int) or None
        Rows and columns of a frame at the reference; as here unless given.
    """

    scan: EnergyScan
    alignment: Alignment
    air: FloatArray
    mask: npt.NDArray[np.bool_] | None = None
    beam: Beam | None = None
    magnification_sigma: float = 0.0
    translation_sigma: tuple[float, float, float] = (0.0, 0.0, 0.0)
    variance: tuple[float, float] | None = None
    fill_lost: bool = False
    widen_px2: float = 0.0
    grid: tuple[int, int] | None = None

    @property
    def grid_shape(self) -> tuple[int, int]:
        """(rows, columns) of the common grid, px of the reference."""
        return self.scan.frames.frame_shape if self.grid is None else self.grid

    @property
    def members(self) -> npt.NDArray[np.intp]:
        """Numbers of the projections the volume is made of: those used, and those filled from their neighbours."""
        used = self.used
        if not self.fill_lost or len(used) in (0, len(self.scan)):
            return used
        theta = np.asarray(self.scan.theta_deg, dtype=float)
        at = np.flatnonzero(np.isfinite(theta))
        lost = ~np.isin(at, used)
        done = filled(np.zeros((len(at), 0, 0)), theta[at], lost)[1]
        return np.sort(np.concatenate([used, at[done]]))

    @property
    def used(self) -> npt.NDArray[np.intp]:
        """Numbers of the projections that are used."""
        ok = np.array([s == "ok" for s in self.alignment.status]) & self.scan.usable
        return np.flatnonzero(ok & np.isfinite(self.alignment.shift).all(axis=1))


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
    """Return the angles of all energies together, degrees, and where every energy's `members` stand in them.

    Angles within 0.05 degrees are one.
    """
    theta: FloatArray = np.array([], dtype=float)
    places: list[npt.NDArray[np.intp]] = []
    for item in energies:
        wanted = np.asarray(item.scan.theta_deg, dtype=float)[item.members]
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
    shared : (angles,) bool array
        The angles that are reconstructed: all of them by `fbp`, else those that every energy of a component has.
    noise : (pair, angle, coarse row, coarse column) array or None
        Covariance of a filtered and smoothed sample of the sinograms, of the plan's pairs.
    first : int
        Number of the first coarse row.
    moved_y, moved_x : (pair, angle) arrays or None
        What the squared change per px of displacement is multiplied with.
    wrong : dict of str to (angle, row, column) array
        What energies that lie beside the others have added to the components of the edge energy; none, empty.
    """

    sinograms: F32
    theta_deg: FloatArray
    shared: npt.NDArray[np.bool_]
    noise: F32 | None = None
    first: int = 0
    moved_y: FloatArray | None = None
    moved_x: FloatArray | None = None
    wrong: Mapping[str, F32] = field(default_factory=dict)


def grid_of(energies: Sequence[AlignedEnergy], bin: int) -> tuple[int, int]:
    """Return (rows, columns) of the common grid with voxels of `bin` reference pixels."""
    height, width = energies[0].grid_shape
    return max(1, height // bin), max(1, width // bin)


def component_sinograms(
    energies: Sequence[AlignedEnergy],
    plan: MapPlan,
    rows: tuple[int, int],
    *,
    bin: int = 1,
    threads: int | None = None,
    progress: Progress = no_progress,
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
    progress : Progress
        Called for every energy; what it raises is passed on.
    """
    made = combine_slab(energies, plan, rows, bin=bin, threads=threads, progress=progress)
    return made.sinograms, made.theta_deg


def placed_rows(
    item: AlignedEnergy, rows: tuple[int, int], grid: tuple[int, int], *, bin: int = 1, threads: int | None = None
) -> F32:
    """Read and place rows of one energy: absorbance (used projection, row, column) on the common grid.

    Parameters
    ----------
    item : AlignedEnergy
    rows, grid : (int, int)
        Rows wanted; rows and columns of the common grid.
    bin : int
        Reference pixels per voxel.
    threads : int, optional
    """
    frame, index = item.scan.frames.frame_shape, item.used
    chosen = index.tolist()
    y0, y1 = rows_needed(item.alignment, rows=rows, grid_shape=grid, frame_shape=frame, bin=bin, index=chosen)
    if y1 <= y0:
        return np.zeros((len(index), rows[1] - rows[0], grid[1]), dtype=np.float32)
    data = read_absorbance(item.scan, item.beam, index, (y0, y1), air=item.air, mask=item.mask, threads=threads)
    return place(
        data, item.alignment, grid_shape=grid, rows=rows, index=chosen, row_offset=y0, frame_shape=frame, bin=bin,
        threads=threads,
    )  # fmt: skip


def combine_slab(
    energies: Sequence[AlignedEnergy],
    plan: MapPlan,
    rows: tuple[int, int],
    *,
    bin: int = 1,
    keep: tuple[int, int] | None = None,
    parameters: MapsParameters | None = None,
    threads: int | None = None,
    progress: Progress = no_progress,
) -> Combined:
    """Read, place and combine one slab, see `component_sinograms`; with `keep`, the errors of those rows as well."""
    p = MapsParameters() if parameters is None else parameters
    grid = grid_of(energies, bin)
    theta, places = common_angles(energies)
    weights = np.array(list(plan.components.values()))
    shared = np.ones(len(theta), dtype=bool)
    if p.reconstruction != "fbp":
        # Only a linear algorithm may be given a sum to which some energies do not add at some angles.
        for e in np.flatnonzero(weights.any(axis=0)).tolist():
            shared &= np.isin(np.arange(len(theta)), places[e])
        if np.count_nonzero(shared) < _FEWEST_SHARED:
            raise XanesTomoError(
                f"maps.reconstruction: {p.reconstruction} needs angles that every energy has, at least "
                f"{_FEWEST_SHARED}; there are {np.count_nonzero(shared)}; fbp takes angles of any energy"
            )
    out = np.zeros((len(weights), len(theta), rows[1] - rows[0], grid[1]), dtype=np.float32)
    products = [plan.weights(a) * plan.weights(b) for a, b in plan.pairs] if keep else []
    step = coarse_step(grid[1])
    coarse = (-(-grid[0] // step), -(-grid[1] // step))
    first, end = _coarse_rows(keep or rows, grid[0], coarse[0], step)
    noise = np.zeros((len(products), len(theta), end - first, coarse[1]), np.float32) if keep else None
    moved = np.zeros((2, len(products), len(theta)))
    beside = np.zeros((len(energies), 4)) if plan.displacement is None or plan.edge is None else plan.displacement
    wrong = {name: np.zeros_like(out[0]) for name in EDGE} if keep and beside.any() else {}
    for e, item in enumerate(energies):
        if not np.any(weights[:, e]):
            continue
        progress("energies", e, len(energies))
        index, scan, frame = item.used, item.scan, item.scan.frames.frame_shape
        chosen = index.tolist()
        widen = item.widen_px2 / bin**2
        reach = len(widening(widen)) // 2 if widen > 0 else 0
        around = (max(0, rows[0] - reach), min(grid[0], rows[1] + reach))
        y0, y1 = rows_needed(item.alignment, rows=around, grid_shape=grid, frame_shape=frame, bin=bin, index=chosen)
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
            data, item.alignment, grid_shape=grid, rows=around, index=chosen, row_offset=y0, frame_shape=frame, bin=bin,
            threads=threads,
        )  # fmt: skip
        placed = widened(placed, widen)[:, rows[0] - around[0] : rows[1] - around[0]]
        turns = np.asarray(scan.theta_deg, dtype=float)
        share = angular_weights(turns[index])
        members = item.members
        stands = np.searchsorted(members, index)  # of the projections that were used, among the members
        if len(members) > len(index):
            lost = np.ones(len(members), dtype=bool)
            lost[stands] = False
            stack = np.zeros((len(members), *placed.shape[1:]), dtype=np.float32)
            stack[stands] = placed
            placed = filled(stack, turns[members], lost)[0]
        if p.reconstruction == "fbp":
            placed *= angular_weights(turns[members]).astype(np.float32)[:, None, None]
        every = np.array_equal(places[e], np.arange(len(theta)))  # no copies where all angles are there, in order
        for c, w in enumerate(weights[:, e]):
            if w:
                out[c, slice(None) if every else places[e]] += np.float32(w) * placed
        if wrong and beside[e].any():
            more = placed - displaced_lines(placed, turns[members], -beside[e] / bin)
            for name, lines in wrong.items():
                lines[places[e]] += np.float32(plan.components[name][e]) * more
        at_angles = places[e][stands]
        if noise is None:
            continue
        strength = plan.spectrum[e] / plan.shape_level
        spread = (share[:, None] * strength * item.alignment.sigma[index] / item.alignment.magnification / bin) ** 2
        spread = np.nan_to_num(spread).T
        gains = {
            s: share**2
            * noise_gain(
                item.alignment,
                index=chosen,
                grid_shape=grid,
                frame_shape=frame,
                bin=bin,
                filter=p.filter,
                smoothing=s,
                widened=widen,
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
            moved[:, k, at_angles] += w * spread
            if seen is not None:
                gain = gains[p.smoothing_voxel * (p.shape_smoothing if plan.pairs[k][0] == "shape" else 1.0)]
                noise[k, at_angles] += (w * gain).astype(np.float32)[:, None, None] * seen
    moved_y, moved_x = moved if keep else (None, None)
    return Combined(out, theta, shared, noise, first, moved_y, moved_x, wrong)


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
    lines = _mean_lines(energies, plan, made, p)
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


def _mean_lines(energies: Sequence[AlignedEnergy], plan: MapPlan, made: Combined, p: MapsParameters) -> F32:
    """Return the object's line integrals (angle, row, column), mean of the energies."""
    share = np.zeros((len(energies), len(made.theta_deg)))
    for e, (item, where) in enumerate(zip(energies, common_angles(energies)[1], strict=True)):
        turns = np.asarray(item.scan.theta_deg, dtype=float)[item.members]
        share[e, where] = angular_weights(turns) if p.reconstruction == "fbp" else 1.0
    shape = made.sinograms[list(plan.components).index("shape")]
    total = np.maximum(plan.components["shape"] @ share, 1e-12)
    return np.asarray(shape / total.astype(np.float32)[:, None, None])


def coverage_slab(
    energies: Sequence[AlignedEnergy], plan: MapPlan, rows: tuple[int, int], *, bin: int = 1
) -> tuple[F32, F32, Unseen]:
    """Return (rows, z, x) the part of all (energy, angle) pairs that saw a voxel, and the least of any one energy.

    A voxel counts as seen at an angle when its row and its distance from the axis lie inside the recorded frame, and at
    least half of the pixels of that row are good. What the components lack where it is not comes third.
    """
    grid = grid_of(energies, bin)
    q_y = bin * (np.arange(*rows) - (grid[0] - 1) / 2)
    c = bin * (np.arange(grid[1]) - (grid[1] - 1) / 2)
    radius = np.sqrt(c[:, None] ** 2 + c[None, :] ** 2)
    steps = np.arange(int(radius.max()) + 2)
    total = np.zeros((len(q_y), len(steps)))
    least = np.ones((len(q_y), len(steps)))
    lost = {name: np.zeros((len(q_y), len(steps)), np.float32) for name in plan.components}
    used = np.any(np.array(list(plan.components.values())) != 0, axis=0)
    for e, item in enumerate(energies):
        a, (height, width) = item.alignment, item.scan.frames.frame_shape
        shift = a.shift[item.used]
        y = a.magnification * q_y[None, :] + shift[:, :1] + (height - 1) / 2
        inside_y = (y >= 0) & (y <= height - 1)
        bad = item.mask if item.beam is None else item.beam.mask((height, width))
        if bad is not None:
            bad = bad if item.mask is None else bad | item.mask
            row = np.clip(np.rint(np.nan_to_num(y)), 0, height - 1).astype(int)
            inside_y &= (bad.mean(axis=1) < 0.5)[row]
        reach = ((width - 1) / 2 - np.abs(shift[:, 1])) / a.magnification
        inside_x = steps[None, :] <= reach[:, None]
        seen = (inside_y.T.astype(float) @ inside_x.astype(float)) / max(1, len(shift))
        total += seen * len(shift)
        if used[e]:
            least = np.minimum(least, seen)
            for name, w in plan.components.items():
                if w[e]:
                    lost[name] += (w[e] * plan.spectrum[e] / plan.shape_level * (1 - seen)).astype(np.float32)
    total /= max(1, sum(len(i.used) for i in energies))
    low = np.floor(radius).astype(int)
    return total[:, low].astype(np.float32), least[:, low].astype(np.float32), Unseen(lost, low)


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
    if energies[0].variance is not None:
        return volume_slab(
            [e.scan for e in energies], plan, rows, wanted, parameters,
            variance=np.array([e.variance for e in energies], dtype=float),
            place_sigma=np.array([[*e.translation_sigma, e.magnification_sigma] for e in energies]),
        )  # fmt: skip
    made = combine_slab(energies, plan, rows, bin=bin, keep=wanted, parameters=parameters, threads=threads)
    per_cm = np.float32(1e7 / voxel_nm)
    theta = made.theta_deg
    solve, usable = _solver(parameters, made.sinograms.shape[3], threads), made.shared.astype(float)
    volumes = {
        name: solve(made.sinograms[c], theta, weights=usable) * per_cm
        for c, name in enumerate(plan.components)
        if name in plan.linear
    }
    errors = covariance(energies, plan, made, rows, wanted, bin=bin, parameters=parameters, threads=threads)
    errors = errors.scaled(per_cm)
    coverage, least, unseen = coverage_slab(energies, plan, wanted, bin=bin)
    keep = slice(slab.y0 - rows[0], slab.y1 - rows[0])
    wrong = {n: solve(x, theta, weights=usable) * per_cm for n, x in made.wrong.items()} or None
    spectra = single_rows(made, plan, keep, per_cm, parameters, threads=threads) if plan.single else None
    return finish_slab(
        plan, volumes, coverage, least, keep, parameters, errors, spectra=spectra, wrong=wrong, unseen=unseen
    )


def slab_bytes(plan: MapPlan, rows: int, columns: int, angles: int, bin: int = 1) -> int:
    """Return what `map_slab` takes at most, bytes; the height of the volume has no part in it.

    Volumes of all components at once with the maps and errors made of them, the sinograms they come from, the recorded
    rows of one energy, and the work space of the projector.

    Parameters
    ----------
    plan : MapPlan
    rows, columns : int
        Rows of the slab with its halo, columns of the common grid.
    angles : int
        Projections of an energy.
    bin : int
        Reference pixels per voxel.
    """
    volumes = len(plan.linear) + len(plan.names) + 4
    lines = len(plan.components) + 4 * bin**2 + 6
    single = 4 * len(plan.single) * columns**2 * (4 + rows // 8)
    return 4 * rows * columns * (columns * volumes + angles * lines) + single


def _solver(p: MapsParameters, columns: int, threads: int | None) -> Reconstructor:
    """Return what makes slices of combined lines; those of `fbp` hold the angular weights already."""
    extend = columns // 2 if p.local_tomography else 0
    return reconstructor(p.reconstruction, filter=p.filter, iterations=p.iterations, extend=extend, threads=threads)


def single_rows(
    made: Combined,
    plan: MapPlan,
    keep: slice,
    per_cm: np.float32,
    parameters: MapsParameters,
    *,
    threads: int | None = None,
) -> Callable[[int], F32]:
    """Return what makes the smoothed energies ``plan.single`` of a kept row, (energy, z, x), one row at a time.

    Smoothing along y commutes with the reconstruction: it is done on the lines, so that a row needs no others and no
    more than one row of all energies is ever held.
    """
    from scipy.ndimage import gaussian_filter, gaussian_filter1d

    s = parameters.smoothing_voxel
    lines = made.sinograms[[c for c, name in enumerate(plan.components) if name not in plan.linear]]
    soft = (gaussian_filter1d(lines, s, axis=2) if s > 0 else lines)[:, :, keep]
    solve, usable = _solver(parameters, lines.shape[3], threads), made.shared.astype(float)

    def row(k: int) -> F32:
        stacked = np.ascontiguousarray(soft[:, :, k].transpose(1, 0, 2))
        volume = solve(stacked, made.theta_deg, weights=usable) * per_cm
        return np.asarray(gaussian_filter(volume, (0, s, s)) if s > 0 else volume, dtype=np.float32)

    return row


def volume_slab(
    scans: Sequence[EnergyScan],
    plan: MapPlan,
    rows: tuple[int, int],
    keep: tuple[int, int],
    parameters: MapsParameters,
    *,
    variance: FloatArray,
    place_sigma: FloatArray,
) -> dict[str, F32]:
    """Make all maps of one slab of registered volumes, voxel by voxel: {name: (rows kept, z, x) float32}.

    Parameters
    ----------
    scans : sequence of EnergyScan
        In the order of the plan; their frames are planes of volumes, 1/cm.
    plan : MapPlan
    rows, keep : (int, int)
        Rows to read, with those the smoothing needs; rows wanted.
    parameters : MapsParameters
    variance : (energies, 2) array
        Of a voxel after the smoothing of the maps, and after that of the fine shape, (1/cm)^2.
    place_sigma : (energies, 4) array
        How far every energy may lie from its place: y, x, z in voxels, and magnification.
    """
    from scipy.ndimage import gaussian_filter

    planes = np.arange(len(scans[0])).tolist()
    width = scans[0].frames.frame_shape[1]
    volumes = {n: np.zeros((rows[1] - rows[0], len(planes), width), dtype=np.float32) for n in plan.linear}
    for e, scan in enumerate(scans):
        if not any(plan.components[n][e] for n in plan.linear):
            continue
        data = scan.frames.read_rows(planes, *rows).transpose(1, 0, 2)
        for name, volume in volumes.items():
            if plan.components[name][e]:
                volume += np.float32(plan.components[name][e]) * data
    strength = plan.spectrum / plan.shape_level
    noise, common = np.zeros(len(plan.pairs)), np.zeros((len(plan.pairs), 4))
    for k, (a, b) in enumerate(plan.pairs):
        product = plan.weights(a) * plan.weights(b)
        # The fine shape says the amount; a density takes its own noise after the full smoothing.
        noise[k] = product @ variance[:, 1 if a == "shape" else 0]
        ty, tx, tz, m = (product * strength**2) @ place_sigma**2
        common[k] = ty, tz, tx, m
    middle = (scans[0].frames.frame_shape[0] - 1) / 2
    none = np.zeros((0, 0), dtype=np.float32)
    errors = EvenCovariance(
        plan.pairs, noise.astype(np.float32), none, none, common, none, np.arange(*keep) - middle
    )  # fmt: skip
    # Every voxel of a registered volume is taken to be seen: what the reconstruction did not see is not told.
    seen = np.ones((keep[1] - keep[0], len(planes), width), dtype=np.float32)
    inside = slice(keep[0] - rows[0], keep[1] - rows[0])

    def spectra(k: int) -> F32:
        """Read the energies ``plan.single`` about a kept row and smooth them."""
        s = parameters.smoothing_voxel
        row, halo = keep[0] + k, halo_rows(parameters)
        first, end = max(rows[0], row - halo), min(rows[1], row + halo + 1)
        out = np.empty((len(plan.single), len(planes), width), dtype=np.float32)
        for i, e in enumerate(plan.single):
            data = scans[e].frames.read_rows(planes, first, end).transpose(1, 0, 2).astype(np.float32)
            out[i] = gaussian_filter(data, s)[row - first] if s > 0 else data[row - first]
        return out

    return finish_slab(plan, volumes, seen, seen, inside, parameters, errors, spectra=spectra)


def require_energies(energies: Sequence[Any]) -> None:
    """Raise where there is nothing to map."""
    if not energies:
        raise XanesTomoError("maps: expected at least one registered energy, got none; see the status of the energies")
