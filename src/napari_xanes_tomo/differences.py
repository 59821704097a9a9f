"""Differences of registered energies: what is left of a displacement at surfaces, and pairs that should not differ.

A volume that lies ``d`` beside another shows a pair of bright and dark rims: to first order its difference is
``-d . grad(reference)``. Volumes are ``(y, z, x)``, sampled at a few thousand voxels of a few rows: enough for a
displacement of a hundredth of a pixel, cheap enough for every energy. Two volumes from every other angle each tell
noise, which they do not share, from what they do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .agreement import smooth
from .contrast import near_edges
from .edges import bracketed_elements, edge_energy_ev
from .model import Alignment, FloatArray, XanesTomoError
from .projector import Projector
from .reconstruction import angular_weights
from .resample import place
from .template import Template

__all__ = [
    "FEWEST_SAMPLED",
    "Dipole",
    "NullTest",
    "Probe",
    "against_reference",
    "edge_dipole",
    "make_probe",
    "null_pairs",
    "null_test",
    "null_tests",
    "sample",
]

F32 = npt.NDArray[np.float32]

FEWEST_SAMPLED = 16
"""Angles of which a volume is sampled."""

_ROWS = 32
_VOXELS = 20_000
_BLOCKS = 12  # groups of rows left out in turn for the standard errors
_APART_EV = 100.0


@dataclass(frozen=True)
class Probe:
    """The voxels at which volumes are compared, with the reference there.

    Attributes
    ----------
    rows : (r,) int array
        Rows of the common grid, binned.
    at : (3, n) int array
        ``[number in rows, z, x]`` of every voxel.
    value : (n,) array
        Attenuation of the reference, 1/px.
    gradient : (3, n) array
        Of the reference along y, z, x, 1/px per px of the binned grid.
    curvature : (n,) array
    surface : (n,) bool array
        Whether a surface runs through the voxel; the others lie inside the particle.
    bin : int
        Common-grid px per px of the grid.
    """

    rows: npt.NDArray[np.intp]
    at: npt.NDArray[np.intp]
    value: FloatArray
    gradient: FloatArray
    curvature: FloatArray
    surface: npt.NDArray[np.bool_]
    bin: int

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return it as arrays to be kept; see `of`."""
        numbers = np.concatenate([self.gradient, self.curvature[None], self.value[None]]).astype(np.float32)
        at = np.concatenate([self.rows[self.at[0]][None], self.at[1:], self.surface[None]]).astype(np.int16)
        return {"probe_at": at, "probe_numbers": numbers, "probe_bin": np.array([self.bin], dtype=np.int16)}

    @classmethod
    def of(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Probe | None:
        """Return the probe that arrays of a result hold, if there is one."""
        if "probe_at" not in arrays:
            return None
        row, z, x, surface = np.asarray(arrays["probe_at"], dtype=np.intp)
        rows, number = np.unique(row, return_inverse=True)
        numbers = np.asarray(arrays["probe_numbers"], dtype=float)
        bin = int(arrays["probe_bin"][0])
        return cls(rows, np.stack([number, z, x]), numbers[4], numbers[:3], numbers[3], surface.astype(bool), bin)


def make_probe(template: Template, *, rows: int = _ROWS, voxels: int = _VOXELS) -> Probe:
    """Choose where volumes are compared: half of the voxels at surfaces of the reference, half inside it.

    Parameters
    ----------
    template : Template
        Of the reference.
    rows : int
        Rows at most.
    voxels : int
        Voxels at most.

    Raises
    ------
    XanesTomoError
        The reference shows no object.
    """
    volume = template.volume
    per_row = volume.max(axis=(1, 2))
    tall = np.flatnonzero(per_row > 0.3 * float(per_row.max()))
    tall = tall[(tall > 0) & (tall < len(volume) - 1)]
    if not len(tall):
        raise XanesTomoError("differences: expected a particle in the reference, found none")
    chosen = np.unique(tall[np.linspace(0, len(tall) - 1, min(rows, len(tall))).astype(int)])
    near = np.stack([_blurred_rows(volume, chosen + k) for k in (-1, 0, 1)])
    slope = [(near[2] - near[0]) / 2, np.gradient(near[1], axis=1), np.gradient(near[1], axis=2)]
    steep = np.sqrt(sum(g.astype(np.float64) ** 2 for g in slope))
    body = near[1] > 0.3 * template.level
    # The circle every angle saw.
    c = np.arange(volume.shape[2]) - (volume.shape[2] - 1) / 2
    body &= (np.hypot(c[:, None], c[None, :]) < len(c) / 2 - 2)[None]
    typical = float(np.percentile(steep[body], 90)) if body.any() else 0.0
    parts = []
    for mask in (steep > 0.5 * typical, body & (steep < 0.2 * typical)):
        mask = mask & (near[1] > 0.05 * template.level)
        found = np.stack(np.nonzero(mask))
        step = max(1, -(-found.shape[1] // (voxels // 2)))
        parts.append(found[:, ::step])
    at = np.concatenate(parts, axis=1)
    pick = tuple(at)
    full = 6 * near[1]
    around = near[0] + near[2]
    for axis in (1, 2):
        around = around + np.roll(near[1], 1, axis) + np.roll(near[1], -1, axis)
    surface = np.arange(at.shape[1]) < parts[0].shape[1]
    return Probe(
        chosen, at, near[1][pick].astype(float), np.stack([g[pick] for g in slope]).astype(float),
        (around - full)[pick].astype(float), surface, template.bin,
    )  # fmt: skip


def _blurred_rows(volume: F32, rows: npt.NDArray[np.intp]) -> F32:
    """Rows of a volume (y, z, x), blurred by one pixel in all directions."""
    reach = np.arange(-4, 5)
    weight = np.exp(-0.5 * reach**2.0)
    weight /= weight.sum()
    out = np.zeros((len(rows), *volume.shape[1:]), dtype=np.float32)
    for k, w in zip(reach.tolist(), weight.tolist(), strict=True):
        out += np.float32(w) * volume[np.clip(rows + k, 0, len(volume) - 1)]
    return smooth(out, 1.0)


def sample(
    stack: F32,
    theta_deg: npt.ArrayLike,
    alignment: Alignment,
    probe: Probe,
    frame_shape: tuple[int, int],
    *,
    bin: int | None = None,
    grid_shape: tuple[int, int] | None = None,
) -> FloatArray:
    """Reconstruct the rows of a probe from every other angle, twice: (2, n) attenuation at its voxels, 1/px.

    Parameters
    ----------
    stack : (n, y, x) float32 array
        Absorbance, binned.
    theta_deg : (n,) array
    alignment : Alignment
        Of these projections, raw px, registered.
    probe : Probe
    frame_shape : (int, int)
        Of a raw frame.
    bin : int, optional
        Raw px per pixel of `stack`; that of the probe unless given.
    grid_shape : (int, int), optional
        Of the template; that of `stack` unless given.
    """
    theta = np.asarray(theta_deg, dtype=float)
    if len(theta) < FEWEST_SAMPLED:
        raise XanesTomoError(f"differences: expected at least {FEWEST_SAMPLED} angles, got {len(theta)}")
    first, last = int(probe.rows[0]) - 5, int(probe.rows[-1]) + 6
    grid = (stack.shape[1], stack.shape[2]) if grid_shape is None else grid_shape
    first, last = max(0, first), min(grid[0], last)
    at = alignment.binned(probe.bin if bin is None else bin, frame_shape, probe.bin)
    placed = place(stack, at, grid_shape=grid, rows=(first, last))
    order = np.argsort(theta, kind="stable")
    # The same blur as the reference has.
    placed = smooth(placed, 1.0)[:, probe.rows - first]
    out = []
    for half in (order[::2], order[1::2]):
        projector = Projector(grid[1], theta[half])
        volume = projector.filtered(np.ascontiguousarray(placed[half]), angular_weight=angular_weights(theta[half]))
        out.append(volume[tuple(probe.at)].astype(float))
    return np.stack(out)


@dataclass(frozen=True)
class Dipole:
    """By how much one volume seems displaced against another at surfaces, px of the common grid.

    Attributes
    ----------
    shift, sigma : (3,) arrays
        ``[y, z, x]`` of the content, and the standard errors.
    outward, outward_sigma : float
        Displacement of all surfaces along their own normal, away from the particle: a scale that is too large, or a
        rim that a change of contrast leaves.
    """

    shift: FloatArray
    sigma: FloatArray
    outward: float
    outward_sigma: float

    @property
    def length_px(self) -> float:
        """Length of the displacement."""
        return float(np.linalg.norm(self.shift))


def edge_dipole(difference: npt.ArrayLike, scale: float, probe: Probe) -> Dipole:
    """Return the slope of a difference map on the gradient of the reference near surfaces.

    ``difference = scale * (outward * |grad| - d . grad) + blur * curvature + contrast * value + level``, least squares;
    errors from leaving out groups of neighbouring rows.

    Parameters
    ----------
    difference : (n,) array
        At the voxels of the probe, a volume minus what it should be, 1/px.
    scale : float
        Attenuation of the volume over that of the reference.
    probe : Probe
    """
    use = probe.surface
    values = np.asarray(difference, dtype=float)[use]
    gradient = probe.gradient[:, use] * scale
    columns = np.stack(
        [*(-gradient), np.linalg.norm(gradient, axis=0), probe.curvature[use], probe.value[use], np.ones(use.sum())]
    )
    solution, sigma = _jackknife(columns, values, probe.at[0, use])
    shift = solution[:4] * probe.bin
    error = sigma[:4] * probe.bin
    return Dipole(shift[:3], error[:3], float(shift[3]), float(error[3]))


def against_reference(samples: FloatArray, probe: Probe) -> Dipole:
    """Return by how much an energy seems displaced against the reference at surfaces, after one factor.

    Parameters
    ----------
    samples : (2, n) array
        `sample` of the energy.
    probe : Probe
    """
    mean, inside = samples.mean(axis=0), ~probe.surface
    reference = probe.value
    scale = float(mean[inside] @ reference[inside]) / float(reference[inside] @ reference[inside])
    return edge_dipole(mean - scale * reference, scale, probe)


def _jackknife(columns: FloatArray, values: FloatArray, row: npt.NDArray[np.intp]) -> tuple[FloatArray, FloatArray]:
    """Least squares of `values` on `columns` (k, n), and standard errors from leaving out groups of rows."""
    present = np.unique(row)
    if len(values) <= len(columns) or len(present) < 3:
        return np.full(len(columns), np.nan), np.full(len(columns), np.nan)
    size = np.maximum(np.sqrt(np.mean(columns**2, axis=1)), 1e-30)
    a = columns / size[:, None]
    groups = [np.isin(row, g) for g in np.array_split(present, min(_BLOCKS, len(present)))]
    normal = np.stack([a[:, g] @ a[:, g].T for g in groups])
    right = np.stack([a[:, g] @ values[g] for g in groups])

    def solve(keep: Sequence[int]) -> FloatArray:
        return np.asarray(np.linalg.lstsq(normal[keep].sum(axis=0), right[keep].sum(axis=0), rcond=1e-10)[0])

    every = list(range(len(groups)))
    whole = solve(every)
    parts = np.stack([solve([k for k in every if k != g]) for g in every])
    spread = (len(every) - 1) / len(every) * np.sum((parts - parts.mean(axis=0)) ** 2, axis=0)
    return whole / size, np.sqrt(spread) / size


@dataclass(frozen=True)
class NullTest:
    """What two registered energies with no edge between them differ by.

    Attributes
    ----------
    energies_ev : (float, float)
    scale : float
        Attenuation of the second over that of the first, smooth.
    difference, difference_sigma : float
        Rms of the second minus the scaled first inside the particle, without noise, over the mean of the second.
    with_composition, with_composition_sigma : float
        The same once the reference's contrast may mix in: what a change of composition explains is no error. NaN where
        one of the two is the reference.
    dipole : Dipole
        Of the difference, at surfaces.
    """

    energies_ev: tuple[float, float]
    scale: float
    difference: float
    difference_sigma: float
    with_composition: float
    with_composition_sigma: float
    dipole: Dipole

    def text(self) -> str:
        """Return the outcome in one line."""
        y, z, x = self.dipole.shift
        sy, sz, sx = self.dipole.sigma
        more = (
            f", {100 * self.with_composition:.2f} +- {100 * self.with_composition_sigma:.2f} % beyond a change of "
            "composition"
            if np.isfinite(self.with_composition)
            else ""
        )
        inside = f"{100 * self.difference:.2f} +- {100 * self.difference_sigma:.2f} % inside{more}"
        return (
            f"{self.energies_ev[0]:g} against {self.energies_ev[1]:g} eV: they differ by {inside}; at surfaces by "
            f"{y:+.3f} +- {sy:.3f}, {z:+.3f} +- {sz:.3f}, {x:+.3f} +- {sx:.3f} px (y, z, x)"
        )


def null_pairs(energies_ev: npt.ArrayLike, among: Sequence[int] | None = None) -> tuple[tuple[int, int], ...]:
    """Return pairs of energies that should differ by a smooth factor alone: no measured edge between or near them.

    Of every interval between edges the lowest energy with the next one at least 100 eV above it, and with the highest.

    Parameters
    ----------
    energies_ev : (energies,) array
        The edges are those that they bracket.
    among : sequence of int, optional
        Energies to choose from; all unless given.
    """
    energies = np.asarray(energies_ev, dtype=float)
    elements = bracketed_elements(energies)
    edges = sorted(edge_energy_ev(e) for e in elements)
    near = near_edges(energies, elements)
    out: list[tuple[int, int]] = []
    for low, high in zip([-np.inf, *edges], [*edges, np.inf], strict=True):
        inside = [k for k in np.argsort(energies, kind="stable").tolist() if low < energies[k] < high and not near[k]]
        inside = [k for k in inside if among is None or k in among]
        if len(inside) < 2:
            continue
        first = inside[0]
        far = [k for k in inside[1:] if energies[k] - energies[first] >= _APART_EV]
        out += [(first, k) for k in dict.fromkeys((*far[:1], inside[-1])) if energies[k] > energies[first]]
    return tuple(out)


def null_test(
    energies_ev: tuple[float, float],
    first: FloatArray,
    second: FloatArray,
    probe: Probe,
    *,
    reference: FloatArray | None = None,
) -> NullTest:
    """Compare two registered energies that should differ by a factor alone.

    Parameters
    ----------
    energies_ev : (float, float)
    first, second : (2, n) arrays
        `sample` of either.
    probe : Probe
    reference : (2, n) array, optional
        `sample` of the reference, a third contrast: what it explains of the difference is called composition. Not where
        one of the two is the reference.
    """
    inside = ~probe.surface
    row = probe.at[0, inside]
    groups = [np.isin(row, g) for g in np.array_split(np.unique(row), _BLOCKS)]
    groups = [g for g in groups if g.any()]

    def left(columns: Sequence[FloatArray], use: npt.NDArray[np.bool_]) -> tuple[float, FloatArray]:
        """Rms of what the columns do not explain over the mean; the halves' noise is not in common."""
        a = np.stack([c[:, inside][:, use] for c in columns])
        b = second[:, inside][:, use]
        # One half is the instrument of the other: noise in a column does not make its factor small.
        normal = np.einsum("in,jn->ij", a[:, 0], a[:, 1])
        right = np.einsum("in,n->i", a[:, 0], b[1]) + np.einsum("in,n->i", a[:, 1], b[0])
        factors = np.linalg.lstsq(normal + normal.T, right, rcond=1e-12)[0]
        rest = b - np.einsum("i,ihn->hn", factors, a)
        common = float(np.mean(rest[0] * rest[1]))
        return float(np.sqrt(max(0.0, common))) / float(b.mean()), factors

    def with_sigma(columns: Sequence[FloatArray]) -> tuple[float, float, FloatArray]:
        value, factors = left(columns, np.ones(inside.sum(), dtype=bool))
        if len(groups) < 3:
            return value, float("nan"), factors
        parts = np.array([left(columns, ~g)[0] for g in groups])
        return value, float(np.sqrt((len(parts) - 1) * parts.var())), factors

    if inside.sum() < 50:
        raise XanesTomoError("differences: the particle holds too few voxels to compare")
    difference, sigma, factors = with_sigma([first])
    more, more_sigma = float("nan"), float("nan")
    if reference is not None:
        more, more_sigma, _ = with_sigma([first, reference])
    scale = float(factors[0])
    rest = (second - scale * first).mean(axis=0)
    contrast = float(np.sum(second.mean(axis=0)[inside]) / np.sum(probe.value[inside]))
    return NullTest(energies_ev, scale, difference, sigma, more, more_sigma, edge_dipole(rest, contrast, probe))


def null_tests(
    energies_ev: npt.ArrayLike, samples: Sequence[FloatArray | None], probe: Probe, reference: int
) -> tuple[NullTest, ...]:
    """Do the test for all of `null_pairs` that were sampled.

    Parameters
    ----------
    energies_ev : (energies,) array
    samples : sequence of (2, n) arrays or None
        One an energy; the reference's as well.
    probe : Probe
    reference : int
        Number of the reference energy.
    """
    energies = np.asarray(energies_ev, dtype=float)
    known = [k for k in range(len(energies)) if samples[k] is not None]
    out = []
    for i, j in null_pairs(energies, known):
        first, second = samples[i], samples[j]
        third = None if reference in (i, j) else samples[reference]
        assert first is not None
        assert second is not None
        pair = (float(energies[i]), float(energies[j]))
        out.append(null_test(pair, first, second, probe, reference=third))
    return tuple(out)
