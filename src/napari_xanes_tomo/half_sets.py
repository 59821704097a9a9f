"""Half sets that share nothing but the object: Fourier shells before and after each step of the alignment.

The projections of one energy are split into every other angle, its flats into every other shot, and either half is
normalised and aligned on its own: as recorded against corrected for jitter. The energies are split into two halves,
each with its own flats and its own jitter correction: as that left them against registered. What is undetermined, one
displacement of the whole object, is found between the two volumes of a pair and taken out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .artefact import displaced_lines
from .fsc import ShellCorrelation, common_place, shell_correlation, soft_mask
from .jitter import FEWEST_ANGLES, find_jitter
from .map_plan import MapPlan
from .maps import AlignedEnergy, component_sinograms, grid_of, placed_rows
from .model import Alignment, Cancelled, FlatSet, FloatArray, Progress, no_progress
from .recipe import Recipe
from .reconstruction import angular_weights, fbp
from .steps import Confinement, beam_of, run_flats

__all__ = ["HalfSets", "StepShells", "jitter_half_sets", "registration_half_sets"]

F32 = npt.NDArray[np.float32]
ROWS = 32  # in the middle
_WIDEST = 512  # columns; larger frames are looked at with larger voxels
_LEAST_VOXELS = 2000
_FEWEST = 2 * FEWEST_ANGLES


@dataclass(frozen=True)
class HalfSets:
    """Two volumes of the same rows, and how they agree.

    Attributes
    ----------
    curve : ShellCorrelation
    apart_px : (3,) array
        Displacement of the second against the first that was taken out: y, z, x, px of the reference.
    """

    curve: ShellCorrelation
    apart_px: FloatArray


@dataclass(frozen=True)
class StepShells:
    """Half sets before and after a step.

    Attributes
    ----------
    step : str
    what : str
        What the halves are, and what they share.
    before, after : HalfSets
    """

    step: str
    what: str
    before: HalfSets
    after: HalfSets

    @property
    def numbers(self) -> dict[str, Any]:
        """Return plain numbers for the journal and the report."""
        return {
            "step": self.step,
            "what": self.what,
            **{
                name: half.curve.numbers | {"apart_px_yzx": np.round(half.apart_px, 3).tolist()}
                for name, half in (("before", self.before), ("after", self.after))
            },
        }


def jitter_half_sets(
    item: AlignedEnergy,
    recipe: Recipe,
    pixel_nm: float,
    *,
    within: Confinement | None = None,
    number: int = 0,
    progress: Progress = no_progress,
) -> StepShells | str:
    """Split one energy into halves, align each on its own, and correlate; a sentence where that cannot be.

    Parameters
    ----------
    item : AlignedEnergy
        The energy, with the projections that the maps use.
    recipe : Recipe
    pixel_nm : float
        Of a recorded pixel of this energy.
    within : Confinement, optional
    number : int
        Of the energy.
    progress : Progress
        Called while it works; what it raises is passed on.
    """
    scan = item.scan
    used = item.used[np.argsort(np.asarray(scan.theta_deg, dtype=float)[item.used], kind="stable")]
    if len(used) < _FEWEST:
        return f"{len(used)} projections make no two halves of {FEWEST_ANGLES} that can be aligned"
    flats, own = _split_flats(scan.flats)
    before: list[AlignedEnergy] = []
    after: list[AlignedEnergy] = []
    for k in (0, 1):
        mine = set(used[k::2].tolist())
        part = replace(scan, flats=flats[k]).excluded({i: "the other half" for i in range(len(scan)) if i not in mine})
        found, data = run_flats(part, recipe, within, number=number, progress=progress)
        theta = np.asarray(scan.theta_deg, dtype=float)[data.index]
        jitter = find_jitter(
            data.data, theta, variance=found.arrays["variance"][data.index], parameters=recipe.jitter,
            progress=progress,
        )  # fmt: skip
        if jitter.partial:
            raise Cancelled
        raw = jitter.alignment.unbinned(data.bin, data.frame_shape)
        for out, shift in ((after, raw.shift), (before, _at_rest(raw.shift, theta))):
            whole = np.full((len(scan), 2), np.nan)
            whole[data.index] = shift
            alignment = Alignment(whole, np.where(np.isfinite(whole), 0.1, np.nan), 1.0, 0.0, part.status)
            out.append(
                AlignedEnergy(part, alignment, np.nan_to_num(found.arrays["air"]), item.mask,
                              beam_of(found, {number: part}))
            )  # fmt: skip
    bin = max(1, -(-scan.frames.frame_shape[1] // _WIDEST))
    pairs: list[list[Lines]] = [[], []]
    for pair, half in zip(pairs, (before, after), strict=True):
        for i in half:
            progress("half sets", 0, 1)
            pair.append(_lines(i, bin))
    made = _correlate(pairs[0], pairs[1], pixel_nm * bin, bin, recipe.maps.filter)
    if isinstance(made, str):
        return made
    shots = "every other shot of its flats" if own else "the same flats (a single shot)"
    what = f"{scan.energy_ev:g} eV: every other angle, {shots}, aligned on its own"
    return StepShells("jitter correction", what, *made)


def registration_half_sets(
    before: Sequence[AlignedEnergy],
    after: Sequence[AlignedEnergy],
    plan: MapPlan,
    pixel_nm: float,
    *,
    filter: str,
    progress: Progress = no_progress,
) -> StepShells | str:
    """Correlate the mean of half of the energies with that of the others, as they were and registered.

    Parameters
    ----------
    before, after : sequence of AlignedEnergy
        The same energies with the alignment of the jitter correction alone, and registered.
    plan : MapPlan
    pixel_nm : float
        Of the reference.
    filter : str
        Of the reconstruction.
    progress : Progress
        Called for every energy; what it raises is passed on.
    """
    n = len(after)
    if n < 4:
        return f"{n} energies make no two halves"
    weight = plan.components["shape"]
    order = np.argsort(plan.energies_ev, kind="stable")
    first = np.zeros(n, dtype=bool)
    first[order] = np.isin(np.arange(n) % 4, (0, 3))  # neighbours apart, the edges shared out
    sums = [float(weight[half] @ plan.spectrum[half]) for half in (first, ~first)]
    if not min(sums) > 0:
        return "the mean spectrum of a half of the energies is not positive"
    halves = {
        name: np.where(half, weight * plan.shape_level / total, 0.0)
        for name, half, total in (("first", first, sums[0]), ("second", ~first, sums[1]))
    }
    split = replace(plan, components=halves)
    bin = max(1, -(-after[0].grid_shape[1] // _WIDEST))
    height = grid_of(after, bin)[0]
    y0 = max(0, (height - ROWS) // 2)
    pairs = []
    for items in (before, after):
        lines, theta = component_sinograms(items, split, (y0, min(height, y0 + ROWS)), bin=bin, progress=progress)
        turn = np.argsort(theta, kind="stable")
        pairs.append([(np.ascontiguousarray(part[turn]), theta[turn], np.ones(len(theta))) for part in lines])
    made = _correlate(pairs[0], pairs[1], pixel_nm * bin, bin, filter)
    if isinstance(made, str):
        return made
    what = f"{first.sum()} energies against the other {n - int(first.sum())}, each with its own flats and jitter"
    return StepShells("energy registration", what, *made)


Lines = tuple[F32, FloatArray, FloatArray]  # (angle, row, column), angles in degrees, weight of each


def _lines(item: AlignedEnergy, bin: int) -> Lines:
    """Read rows in the middle of one half."""
    grid = grid_of([item], bin)
    y0 = max(0, (grid[0] - ROWS) // 2)
    theta = np.asarray(item.scan.theta_deg, dtype=float)[item.used]
    data = placed_rows(item, (y0, min(grid[0], y0 + ROWS)), grid, bin=bin)
    return data, theta, angular_weights(theta)


def _correlate(
    before: Sequence[Lines], after: Sequence[Lines], voxel_nm: float, bin: int, filter: str
) -> tuple[HalfSets, HalfSets] | str:
    """Reconstruct both pairs, bring each together, and correlate in one mask: where the pair after the step is."""
    from scipy.ndimage import shift

    mask: F32 | None = None
    whole: F32 | None = None
    out = []
    for pair in (after, before):
        a, b = (fbp(x, theta, weights=w, filter=filter) for x, theta, w in pair)
        if mask is None or whole is None:
            whole = np.asarray((a + b) / 2, dtype=np.float32)
            mask, voxels = soft_mask(whole)
            if voxels < _LEAST_VOXELS:
                return f"only {voxels} voxels of the particle in the middle rows"
        else:
            # Before the step the object may lie elsewhere as a whole; the rows stay.
            _, z, x = common_place(whole, a, mask)
            mask = np.asarray(shift(mask, (0, z, x), order=1), dtype=np.float32)
        apart = common_place(a, b, mask)
        lines, theta, w = pair[1]
        moved = displaced_lines(lines, theta, (*(-apart), 0.0))
        b = fbp(moved, theta, weights=w, filter=filter)
        rest = common_place(a, b, mask)
        if np.linalg.norm(rest) > 0.05:
            apart = apart + rest
            b = fbp(displaced_lines(lines, theta, (*(-apart), 0.0)), theta, weights=w, filter=filter)
        out.append(HalfSets(shell_correlation(a, b, mask=mask, voxel_nm=voxel_nm), apart * bin))
    return out[1], out[0]


def _at_rest(shift: FloatArray, theta_deg: FloatArray) -> FloatArray:
    """Return the part of displacements that a rigid object at rest has: its height, its place and the axis."""
    t = np.deg2rad(theta_deg)
    basis = np.stack([np.ones_like(t), np.cos(t), np.sin(t)], axis=1)
    across = basis @ np.linalg.lstsq(basis, shift[:, 1], rcond=None)[0]
    return np.stack([np.full(len(t), shift[:, 0].mean()), across], axis=1)


def _split_flats(groups: Sequence[FlatSet]) -> tuple[tuple[tuple[FlatSet, ...], tuple[FlatSet, ...]], bool]:
    """Give every other good shot of each group to either half; all to both where a group has a single one."""
    halves: tuple[list[FlatSet], list[FlatSet]] = ([], [])
    own = True
    for group in groups:
        good = [i for i, s in enumerate(group.status) if s == "ok"]
        for k in (0, 1):
            mine = good[k::2] if len(good) > 1 else good
            status = tuple(
                "unreadable:the other half" if s == "ok" and i not in mine else s for i, s in enumerate(group.status)
            )
            halves[k].append(replace(group, status=status))
        own = own and len(good) != 1
    return (tuple(halves[0]), tuple(halves[1])), own
