"""What the maps are checked and sharpened by before they are made: some rows of all energies, held at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .agreement import band_pass
from .artefact import displaced_lines
from .fsc import ShellCorrelation, shell_correlation, soft_mask
from .map_plan import MapPlan
from .maps import AlignedEnergy, common_angles, component_sinograms, coverage_slab, grid_of
from .model import FloatArray, Score
from .recipe import MapsParameters
from .reconstruction import angular_weights, fbp

__all__ = [
    "DISPLACED_PX",
    "Displaced",
    "EdgeWidth",
    "MapChecks",
    "MassBalance",
    "Rows",
    "check_maps",
    "displacements",
    "edge_width",
    "follow_edge",
    "half_sets",
    "mass_balance",
    "particle_middle",
    "read_rows",
]

F32 = npt.NDArray[np.float32]
_STEEPEST = 0.2  # part of an amount that an eV of the edge may pretend
_LEAST_VOXELS = 2000  # for the slopes of the amounts over the edge energy
# Half of the variance (eV2) by which the edge of a voxel may well be broader than the particle's: that of two states
# 2 eV apart, half and half, or of an edge 10 % wider.
_WIDTH_SPREAD_EV2 = 0.5


@dataclass(frozen=True)
class Rows:
    """Some rows of all energies on the common grid.

    Attributes
    ----------
    lines : (energy, angle, row, column) array
        Line integrals times the share of the half turn that the angle stands for at its energy.
    theta_deg : (angles,) array
        Ascending.
    share : (energy, angle) array
        That part; 0 where an energy has no projection.
    per_cm : float
        1/cm of a reconstructed 1/voxel.
    smoothing : float
        Of the maps, voxels.
    filter : str
        Of the reconstruction.
    """

    lines: F32
    theta_deg: FloatArray
    share: FloatArray
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
    middle: int | None = None,
    smoothing: float = 1.0,
    filter: str = "ramp",
    threads: int | None = None,
) -> Rows:
    """Read and place `rows` rows of the common grid, of all energies.

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
    middle : int, optional
        Row about which they lie, px of the reference; the middle of the frame unless given.
    smoothing, filter
        As the maps are made with.
    threads : int, optional
    """
    n = len(energies)
    single = replace(plan, components={f"@{k}": np.eye(n)[k] for k in range(n)})
    height = grid_of(energies, bin)[0]
    first = _first_row(height // 2 if middle is None else middle // bin, rows, height)
    lines, theta = component_sinograms(energies, single, (first, min(height, first + rows)), bin=bin, threads=threads)
    order = np.argsort(theta, kind="stable")
    share = np.zeros((n, len(theta)))
    for e, (item, where) in enumerate(zip(energies, common_angles(energies)[1], strict=True)):
        share[e, where] = angular_weights(np.asarray(item.scan.theta_deg, dtype=float)[item.members])
    return Rows(np.ascontiguousarray(lines[:, order]), theta[order], share[:, order], 1e7 / voxel_nm, smoothing, filter)


_HALVES = (slice(0, None, 2), slice(1, None, 2))  # of the angles


@dataclass(frozen=True)
class EdgeWidth:
    """How well a voxel's edge shows that it is broader than the particle's, in half its variance, eV2.

    Attributes
    ----------
    spread : float
        How much it varies from voxel to voxel: as measured, but at least 0.5 eV2.
    noise : float
        Standard error in one voxel; NaN where it is not known.
    """

    spread: float = _WIDTH_SPREAD_EV2
    noise: float = float("nan")

    @property
    def kept(self) -> float:
        """Part of the measured width that leaves the least error; all of it where the noise is not known."""
        return self.spread**2 / (self.spread**2 + self.noise**2) if np.isfinite(self.noise) else 1.0


def edge_width(plan: MapPlan, rows: Rows) -> EdgeWidth:
    """Measure how much the width of the edge varies, and with what noise, from the two halves of the angles.

    Parameters
    ----------
    plan : MapPlan
    rows : Rows
    """
    if plan.helped is None or plan.edge is None or len(rows.theta_deg) < 16:
        return EdgeWidth()
    body = rows.volume(plan.components["shape"]) > 0.5 * plan.shape_level
    if body.sum() < _LEAST_VOXELS:
        return EdgeWidth()
    first, second = (rows.volume(plan.helped.width, part=part)[body].astype(float) for part in _HALVES)
    level = rows.volume(plan.components["level"])[body].astype(float)
    square = float(level @ level)
    if not square > 0:
        return EdgeWidth()
    real = max(0.0, float(first @ second) / square)
    noise = float((first - second) @ (first - second)) / 4 / square
    return EdgeWidth(max(_WIDTH_SPREAD_EV2, float(np.sqrt(real))), float(np.sqrt(noise)))


def follow_edge(plan: MapPlan, rows: Rows, kept: float = 1.0) -> dict[str, float] | str:
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
    kept : float
        Part of the measured width of the edge that counts.
    """
    if plan.helped is None or plan.edge is None:
        return "too few energies in the scanned edge"
    if len(rows.theta_deg) < 16:
        return f"{len(rows.theta_deg)} angles make no two halves"
    shape = rows.volume(plan.components["shape"])
    body = shape > 0.5 * plan.shape_level
    if body.sum() < _LEAST_VOXELS:
        return f"only {int(body.sum())} voxels of the particle in the middle rows"
    shift, level = (
        [rows.volume(plan.components[name], part=part)[body].astype(float) for part in _HALVES]
        for name in ("shift", "level")
    )
    cross = np.array([[shift[0] @ shift[1], shift[0] @ level[1]], [level[0] @ shift[1], level[0] @ level[1]]])
    cross = (cross + cross.T) / 2
    if not cross[0, 0] > 0.2 * np.sqrt((shift[0] @ shift[0]) * (shift[1] @ shift[1])):
        return dict.fromkeys(plan.helped.free, 0.0)
    out = {}
    for element, weights in plan.helped.weights(kept).items():
        more = [rows.volume(weights - plan.components[element], part=part)[body].astype(float) for part in _HALVES]
        right = [more[0] @ v[1] + more[1] @ v[0] for v in (shift, level)]
        out[element] = float(np.linalg.solve(cross, np.array(right) / 2)[0])
        amount = float(plan.components[element] @ plan.spectrum)
        if not abs(out[element]) < _STEEPEST * abs(amount):
            return (
                f"{element} would follow the edge by {out[element]:.2g} per eV of {amount:.2g}: an energy is not right"
            )
    return out


_BAND_PX = (0.7, 2.0)  # surfaces and cracks are common to all elements, gradients of the composition are not
DISPLACED_PX = 0.1  # of an energy as a whole: from here on it is told, and counted in the artefact map
_FLOOR_PX = 0.02  # what is left of the composition in that band, as displacement
_BLOCKS = 12  # of neighbouring angles, for the standard errors


@dataclass(frozen=True)
class Displaced:
    """How far every energy lies from the others, by the surfaces of the object: the edge-dipole test.

    An energy that lies beside the others adds to every map a dipole along its displacement: too much on one side of
    every surface, too little on the other. A rim that is really there has no direction.

    Attributes
    ----------
    shift : (energies, 4) array
        Content displaced by this, y, z, x in px of the reference, against the median energy; and the error of the
        rotation centre, which displaces all projections alike.
    sigma : (energies, 4) array
        From the scatter of blocks of angles, what is left of the composition, and the error that the registration
        stated.
    """

    shift: FloatArray
    sigma: FloatArray

    @property
    def length(self) -> FloatArray:
        """(energies,) px."""
        return np.asarray(np.linalg.norm(self.shift, axis=1))

    @property
    def found(self) -> npt.NDArray[np.bool_]:
        """(energies,) whether the displacement stands out: more than four standard errors and a tenth of a pixel."""
        z2 = np.sum((self.shift / self.sigma) ** 2, axis=1)
        return np.asarray(np.isfinite(z2) & (z2 > 16) & (self.length > DISPLACED_PX))


def displacements(plan: MapPlan, rows: Rows, *, stated: FloatArray | None = None, bin: int = 1) -> Displaced:
    """Measure how far every energy lies from the mean of all others in the rows, px of the reference.

    Every projection is compared with the weighted mean of the same angle's projections of all other energies, both
    band-passed (0.7..2 px), by least squares on gain, displacement, rotation centre (one for all angles) and
    magnification. Every energy but the displaced ones shares a part of their displacement through the mean; the joint
    solution takes that out.

    Parameters
    ----------
    plan : MapPlan
    rows : Rows
    stated : (energies, 3) array, optional
        Standard errors y, z, x that the registration stated, px of the reference.
    bin : int
        Reference pixels per voxel of the rows.
    """
    n, angles = rows.share.shape
    share = np.where(rows.share > 0, rows.share, np.nan)
    lines = rows.lines / share[:, :, None, None].astype(np.float32)
    there = rows.share > 0
    lines = np.nan_to_num(lines)
    weight = plan.components["shape"] / np.maximum(plan.spectrum, 1e-9)  # every energy brought to one contrast
    weight = np.where(plan.spectrum > 0, weight, 0.0)
    weight /= max(weight.sum(), 1e-12)
    total = np.tensordot(weight.astype(np.float32), lines, axes=(0, 0))
    seen = weight @ there
    t = np.deg2rad(rows.theta_deg)
    block = np.minimum(np.arange(angles) * _BLOCKS // max(1, angles), _BLOCKS - 1)
    measured, sigma = np.full((n, 4), np.nan), np.full((n, 4), np.nan)
    for e in range(n):
        rest = seen - weight[e] * there[e]
        use = np.flatnonzero(there[e] & (rest > 0.5 * (1 - weight[e])))
        if len(use) < 8 or weight[e] == 0:
            continue
        mean = (total[use] - np.float32(weight[e]) * lines[e, use]) / rest[use, None, None].astype(np.float32)
        own, found = lines[e, use], np.zeros(4)
        for _ in range(4):
            normal, right = _dipole_equations(
                own, displaced_lines(mean, rows.theta_deg[use], found), t[use], block[use]
            )
            step = np.linalg.lstsq(normal.sum(axis=0), right.sum(axis=0), rcond=1e-10)[0]
            gain = step[0] if abs(step[0]) > 1e-6 else np.nan
            if not np.isfinite(gain):
                break
            move = np.clip(step[1:5] / gain, -2, 2)
            found = found + move
            if np.linalg.norm(found) < DISPLACED_PX or np.linalg.norm(move) < 0.01:
                break
        if not np.isfinite(found).all() or not np.isfinite(gain):
            continue  # an energy that shows nothing
        parts = []
        for b in np.unique(block[use]):  # one block left out at a time
            s = np.linalg.lstsq(normal.sum(axis=0) - normal[b], right.sum(axis=0) - right[b], rcond=1e-10)[0]
            parts.append(s[1:5] / s[0])
        m = len(parts)
        measured[e] = found
        sigma[e] = np.sqrt((m - 1) / m * np.sum((np.array(parts) - np.mean(parts, axis=0)) ** 2, axis=0))
    good = np.isfinite(measured).all(axis=1)
    out = np.full((n, 4), np.nan)
    if good.sum() > 2:
        w = weight[good]
        share_of = w[None, :] / (1 - w)[:, None]
        np.fill_diagonal(share_of, 0.0)
        solved = np.linalg.pinv(np.eye(len(w)) - share_of) @ measured[good]
        out[good] = solved - np.median(solved, axis=0)
    told = np.zeros((n, 4))
    if stated is not None:
        told[:, :3] = stated
    return Displaced(out * bin, np.sqrt((sigma * bin) ** 2 + _FLOOR_PX**2 + told**2))


def _dipole_equations(
    own: F32, mean: F32, theta: FloatArray, block: npt.NDArray[np.intp]
) -> tuple[FloatArray, FloatArray]:
    """Return normal equations (block, 6, 6) and (block, 6): gain, y, z, x, centre and magnification."""
    a, b = (band_pass(np.ascontiguousarray(v), *_BAND_PX) for v in (own, mean))
    dy = -np.gradient(b, axis=1) if b.shape[1] > 1 else np.zeros_like(b)
    dc = -np.gradient(b, axis=2)
    y, c = ((np.arange(k) - (k - 1) / 2).astype(np.float32) for k in b.shape[1:])
    design = [
        b,
        dy,
        dc * np.sin(theta).astype(np.float32)[:, None, None],
        dc * np.cos(theta).astype(np.float32)[:, None, None],
        dc,
        dy * y[:, None] + dc * c,
    ]
    edge = 3 if b.shape[1] > 12 else 0  # the band-pass does not know what lies beyond the rows
    cut = slice(edge, b.shape[1] - edge)
    k = len(design)
    normal, right = np.zeros((_BLOCKS, k, k)), np.zeros((_BLOCKS, k))
    for i, first in enumerate(design):
        value = np.einsum("ayc,ayc->a", first[:, cut], a[:, cut], dtype=np.float64)
        right[:, i] = np.bincount(block, value, _BLOCKS)
        for j in range(i, k):
            value = np.einsum("ayc,ayc->a", first[:, cut], design[j][:, cut], dtype=np.float64)
            normal[:, i, j] = normal[:, j, i] = np.bincount(block, value, _BLOCKS)
    return normal, right


@dataclass(frozen=True)
class MassBalance:
    """The mass of the reconstructed rows against that of their projections.

    Attributes
    ----------
    ratio : float
        Sum over the volume / mean sum over the projections, of the mean of all energies.
    scatter : float
        Standard deviation of the projections' sums from angle to angle, relative.
    """

    ratio: float
    scatter: float

    @property
    def lost(self) -> float:
        """What is lost or gained, relative: root mean square over the projections against the volume."""
        return float(np.hypot(self.ratio - 1, self.scatter))


def mass_balance(plan: MapPlan, rows: Rows) -> MassBalance:
    """Compare the mass of the reconstruction with that of every projection: parallel beams conserve it.

    What stands in the field beside the object, leaves it, or was cut from it breaks the balance.
    """
    weights = plan.components["shape"]
    share = np.asarray(weights @ rows.share)
    use = share > 0.5 * share.max(initial=0)
    sums = np.tensordot(weights, rows.lines.sum(axis=(2, 3), dtype=np.float64), axes=(0, 0))
    each = sums[use] / share[use]
    mean = float(each.mean()) if use.any() else float("nan")
    volume = rows.volume(weights, smoothing=0.0) / np.float32(rows.per_cm)
    total = float(volume.sum(dtype=np.float64))
    good = mean > 0
    return MassBalance(total / mean if good else float("nan"), float(each.std() / mean) if good else float("nan"))


def half_sets(plan: MapPlan, rows: Rows, name: str, voxel_nm: float) -> ShellCorrelation | None:
    """Correlate a component made from even with the same made from odd angles, shell by shell, inside the particle.

    The two share the alignment and the flats, not the counts and not the angles: the curve sees noise and how finely
    the angles sample, and is blind to what both are wrong by. None where the rows hold no particle.

    Parameters
    ----------
    plan : MapPlan
    rows : Rows
    name : str
        Of the component.
    voxel_nm : float
        Of the rows.
    """
    if len(rows.theta_deg) < 16:
        return None
    mask, voxels = soft_mask(rows.volume(plan.components["shape"], smoothing=0.0), level=plan.shape_level)
    if voxels < _LEAST_VOXELS:
        return None
    weights = plan.weights(name)
    halves = [rows.volume(weights, part=slice(k, None, 2), smoothing=0.0) for k in (0, 1)]
    return shell_correlation(halves[0], halves[1], mask=mask, voxel_nm=voxel_nm)


MASS_LIMIT = 0.02  # relative
_RED = {"displacement": 0.3, "mass": 0.05}  # px, relative; amber from DISPLACED_PX and MASS_LIMIT on
_ROWS = 32  # in the middle of the particle
_WIDEST = 512  # columns; larger frames are looked at with larger voxels
_PROJECTIONS = 12  # of every energy, to find the particle: each of them holds the mass of every row
_COLUMNS = 128  # as coarse as that
_AS_GOOD = 0.95  # rows with nearly as much of the particle as the best


def particle_middle(energies: Sequence[AlignedEnergy], plan: MapPlan, *, threads: int | None = None) -> int:
    """Return the row of the common grid about which the rows hold the most of the particle, px of the reference.

    Its mass is told by the jump of the scanned edge, by the elements where none was scanned, and by the attenuation
    where there are none of these; rows that some energy did not see do not count. What stands beside the particle and
    shows no edge (a post, a capillary) has no part in it. The middle of the frame where that tells nothing.

    Parameters
    ----------
    energies : sequence of AlignedEnergy
        In the order of the plan.
    plan : MapPlan
    threads : int, optional
    """
    height, width = grid_of(energies, 1)
    rows = max(1, min(_ROWS * -(-width // _WIDEST), height // 4))
    profile = _mass_of_rows(energies, plan, threads)
    total = np.concatenate([[0.0], np.cumsum(profile)])
    held = total[rows:] - total[:-rows]
    if not (np.isfinite(held).all() and held.max() > 0):
        return height // 2
    good = np.flatnonzero(held >= _AS_GOOD * held.max())
    return int(good[np.argmin(np.abs(good - np.median(good)))]) + rows // 2


def _first_row(middle: int, rows: int, height: int) -> int:
    """Return the first of `rows` rows about row `middle` that all exist in a grid of `height` rows."""
    return max(0, min(middle - rows // 2, height - rows))


def _mass_of_rows(energies: Sequence[AlignedEnergy], plan: MapPlan, threads: int | None) -> FloatArray:
    """Return the mass of the particle in every row of the common grid, up to a factor."""
    weights = plan.weights("level" if plan.edge is not None else "density" if plan.elements else "shape")
    if energies[0].variance is not None:
        return np.maximum(_planes(energies, weights), 0)
    height, width = grid_of(energies, 1)
    coarse = -(-width // _COLUMNS)
    few = [_few(item) for item in energies]
    one = replace(plan, components={"mass": weights})
    rows = grid_of(few, coarse)[0]
    lines = component_sinograms(few, one, (0, rows), bin=coarse, threads=threads)[0][0]
    mass = np.maximum(np.median(lines.sum(axis=2, dtype=np.float64), axis=0), 0)
    least = coverage_slab(few, one, (0, rows), bin=coarse)[1]
    middle = least.shape[1] // 2
    mass[least[:, middle, middle] < 0.99] = 0.0
    at = (np.arange(height) - (height - 1) / 2) / coarse + (rows - 1) / 2
    return np.asarray(np.interp(at, np.arange(rows), mass))


def _few(item: AlignedEnergy) -> AlignedEnergy:
    """Return the same with some of its projections."""
    used = item.used
    kept = (
        used[np.unique(np.linspace(0, len(used) - 1, min(_PROJECTIONS, len(used))).astype(int))] if len(used) else used
    )
    status = tuple("ok" if i in set(kept.tolist()) else "excluded:not looked at" for i in range(len(item.scan)))
    return replace(item, alignment=replace(item.alignment, status=status), fill_lost=False)


def _planes(energies: Sequence[AlignedEnergy], weights: FloatArray) -> FloatArray:
    """Return the sum over some planes of registered volumes, row by row."""
    frames = energies[0].scan.frames
    some = np.unique(np.linspace(0, len(energies[0].scan) - 1, _PROJECTIONS).astype(int)).tolist()
    total: npt.NDArray[np.float64] = np.zeros(frames.frame_shape[0])
    for item, weight in zip(energies, weights, strict=True):
        if weight:
            data = item.scan.frames.read_rows(some, 0, frames.frame_shape[0])
            total += weight * np.nan_to_num(data).sum(axis=(0, 2), dtype=np.float64)
    return total


@dataclass(frozen=True)
class MapChecks:
    """What was found in the rows about the middle of the particle before the maps were made.

    Attributes
    ----------
    energies_ev : (energies,) array
    followed : dict or str
        See `follow_edge`.
    displaced : Displaced
    mass : MassBalance
    shells : dict of str to ShellCorrelation
        Even against odd angles, by the name of the component.
    edge_ev : (energies,) array
        eV of the edge energy for a px of displacement at a surface; NaN where there is no such map.
    width : EdgeWidth
    """

    energies_ev: FloatArray
    followed: dict[str, float] | str
    displaced: Displaced
    mass: MassBalance
    shells: dict[str, ShellCorrelation]
    edge_ev: FloatArray
    width: EdgeWidth = field(default_factory=EdgeWidth)

    @property
    def scores(self) -> tuple[Score, ...]:
        """The displacement that is found, else the largest there is, and the mass that is lost."""
        d = self.displaced
        most = d.length[d.found] if d.found.any() else np.minimum(d.length, DISPLACED_PX)
        worst = float(np.nanmax(most)) if np.isfinite(most).any() else float("nan")
        out = []
        if not np.isnan(worst):
            out.append(Score("edge dipole of an energy", worst, "px", DISPLACED_PX, red=_RED["displacement"]))
        if np.isfinite(self.mass.lost):
            what = "mass of the volume against the projections"
            out.append(Score(what, self.mass.lost, "", MASS_LIMIT, red=_RED["mass"]))
        return tuple(out)

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what is not as it should be: amber, or red."""
        out = []
        if isinstance(self.followed, str) and self.followed:
            out.append(f"the amounts are taken without the scanned edge: {self.followed}")
        d = self.displaced
        for e in np.flatnonzero(d.found).tolist():
            colour = "red" if d.length[e] > _RED["displacement"] else "amber"
            effect = d.length[e] * abs(self.edge_ev[e])
            does = f"; at surfaces that is up to {effect:.2g} eV of false edge energy" if effect > 0 else ""
            y, z, x, centre = d.shift[e]
            out.append(
                f"edge dipole, {colour}: {self.energies_ev[e]:g} eV lies {d.length[e]:.2f} px beside the other "
                f"energies (y {y:+.2f}, z {z:+.2f}, x {x:+.2f}, rotation centre {centre:+.2f}){does}; register it "
                "again, or exclude it"
            )
        if self.mass.lost > MASS_LIMIT:
            colour = "red" if self.mass.lost > _RED["mass"] else "amber"
            out.append(
                f"mass, {colour}: the projections differ from the mass of the volume by {100 * self.mass.lost:.1f} % "
                f"(mean {100 * (1 - self.mass.ratio):+.1f} %); something leaves the field, or the background is not out"
            )
        return tuple(out)

    @property
    def numbers(self) -> dict[str, Any]:
        """Return plain numbers for the journal and the report."""
        d = self.displaced
        rows = [
            [float(e), *(round(float(v), 4) for v in (*s, *u)), bool(f)]
            for e, s, u, f in zip(self.energies_ev, d.shift, d.sigma, d.found, strict=True)
            if np.isfinite(s).all()
        ]
        helped = isinstance(self.followed, dict) and bool(self.followed) and bool(np.isfinite(self.width.noise))
        width = {
            "spread_ev2": round(self.width.spread, 4),
            "sigma_ev2": round(self.width.noise, 4),
            "kept": round(self.width.kept, 4),
        }
        return {
            "amounts_followed_edge": self.followed if isinstance(self.followed, dict) else {},
            "edge_width": width if helped else {},
            "edge_dipole_ev_yzxc_sigma_found": rows,
            "mass_ratio": self.mass.ratio,
            "mass_scatter": self.mass.scatter,
            "shell_correlation": {name: c.numbers for name, c in self.shells.items()},
        }


def check_maps(
    energies: Sequence[AlignedEnergy],
    plan: MapPlan,
    pixel_nm: float,
    parameters: MapsParameters,
    *,
    edge_ev: FloatArray,
    middle: int | None = None,
    threads: int | None = None,
) -> tuple[MapPlan, MapChecks]:
    """Look at rows of the particle before the maps are made; return the plan with what was found, and what was found.

    Parameters
    ----------
    energies : sequence of AlignedEnergy
        Projections, in the order of the plan.
    plan : MapPlan
    pixel_nm : float
        Of the reference.
    parameters : MapsParameters
    edge_ev : (energies,) array
        What a px of displacement does at a surface, see `MapChecks`.
    middle : int, optional
        Row about which they lie, px of the reference; see `particle_middle`; found unless given.
    threads : int, optional
    """
    wide = max(1, -(-energies[0].grid_shape[1] // _WIDEST))
    middle = particle_middle(energies, plan, threads=threads) if middle is None else middle
    rows = read_rows(
        energies, plan, pixel_nm * wide, rows=_ROWS, bin=wide, middle=middle, smoothing=parameters.smoothing_voxel,
        filter=parameters.filter, threads=threads,
    )  # fmt: skip
    width = edge_width(plan, rows)
    followed: dict[str, float] | str = {} if plan.helped is None else follow_edge(plan, rows, width.kept)
    if isinstance(followed, dict) and followed:
        plan = plan.with_scanned_edge(followed, kept=width.kept, spread=width.spread)
    stated = np.array([[i.translation_sigma[0], i.translation_sigma[2], i.translation_sigma[1]] for i in energies])
    displaced = displacements(plan, rows, stated=stated, bin=wide)
    plan = replace(plan, displacement=np.where(displaced.found[:, None], np.nan_to_num(displaced.shift), 0.0))
    shells = {}
    for name, component in (("morphology", "shape"), *((e, e) for e in plan.elements), ("edge_jump", "level")):
        curve = half_sets(plan, rows, component, pixel_nm * wide) if component in plan.components else None
        if curve is not None:
            shells[name] = curve
    return plan, MapChecks(plan.energies_ev, followed, displaced, mass_balance(plan, rows), shells, edge_ev, width)
