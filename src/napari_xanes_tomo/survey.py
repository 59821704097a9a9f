"""A look at what was aligned elsewhere: whether the energies lie on each other, and how noisy they are.

Some rows in the middle of the object are read at every energy. Against the reference energy, what is left of a
displacement and of a magnification is found by linear regression. The noise is what the spectra of the object's samples
do not share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .edges import bracketed_elements, scanned_element
from .model import EnergyScan, FloatArray, Progress, XanesTomoError, no_progress

__all__ = ["Survey", "survey"]

F32 = npt.NDArray[np.float32]
_MEMORY = 2**28  # bytes of all energies together
_ROWS = 8
_SAMPLES = 200_000  # spectra for the principal components
_GROUPS = 8  # of the jackknife
_CALM = 1.5  # px, smoothing before displacements are looked for
_SAME_ANGLE = 0.05


@dataclass(frozen=True)
class Survey:
    """What the middle of the object says, energy by energy.

    Attributes
    ----------
    mass : (energies,) array
        Mean absorbance behind the object (projections), or linear attenuation in it, 1/cm (volumes).
    shift, shift_sigma : (energies, 3) arrays
        Displacement of the content against the reference along y, x, z, px, and its standard error.
    scale, scale_sigma : (energies,) arrays
        Magnification against the reference.
    variance : (energies, smoothings) array
        Of a sample after each of the smoothings asked for.
    source : str
        How the variance was found.
    lost : dict of int to str
        Energies that cannot be read, with the reason; NaN in the arrays.
    """

    mass: FloatArray
    shift: FloatArray
    shift_sigma: FloatArray
    scale: FloatArray
    scale_sigma: FloatArray
    variance: FloatArray
    source: str
    lost: Mapping[int, str]


def survey(
    scans: Sequence[EnergyScan],
    reference: int,
    read: Callable[[EnergyScan, npt.NDArray[np.intp], int, int], F32],
    smoothings: Sequence[float],
    *,
    progress: Progress = no_progress,
) -> Survey:
    """Look at some rows of every energy.

    Parameters
    ----------
    scans : sequence of EnergyScan
        All of one kind of `given`.
    reference : int
        Number of the energy the others are compared with.
    read : callable
        ``read(scan, frames, y0, y1)`` gives (frame, row, column) absorbance, or attenuation in 1/cm.
    smoothings : sequence of float
        Sigma of Gaussian smoothings after which the variance is wanted, px.
    progress : callable

    Raises
    ------
    XanesTomoError
        No object is seen at the reference energy, or values are no numbers.

    Notes
    -----
    The spectra of the object's samples, ``(sample, energy)``, are linear in its elements, a smooth remainder and the
    position and height of the scanned edge. Their first principal components, as many, hold the object; the rest is
    noise, with ``1 - P_ee`` of its variance at energy e (P: projector on the components). What registration and
    reconstruction leave unlike between energies counts as noise. Where there are not enough energies for that, it is
    the scatter of the air.
    """
    volumes = scans[0].gridded
    height, width = scans[0].frames.frame_shape
    halo = int(np.ceil(4 * max(_CALM, *smoothings))) + 1
    frames = _common_frames(scans, volumes)
    reading = scans[reference]
    profile = np.zeros(height)
    places = np.unique(np.linspace(0, height - 1, min(height, 17)).round().astype(int))
    few = [f[:: max(1, len(f) // 32)] for f in frames]
    across = np.zeros(len(few[reference]))
    for y in places.tolist():
        line = np.maximum(read(reading, few[reference], y, y + 1)[:, 0], 0).sum(axis=1)
        profile[y] = line.sum()
        across += line
    if not profile.max() > 0:
        raise XanesTomoError(f"{reading.energy_ev:g} eV: expected an object that absorbs, got none")
    inside = places[profile[places] > 0.5 * profile.max()]
    middle = int(np.median(inside))
    y0 = max(0, min(middle - _ROWS // 2 - halo, height - _ROWS - 2 * halo))
    y1 = min(height, y0 + _ROWS + 2 * halo)
    if len(reading) == 1:  # an image: as many rows as there is room for
        most = max(y1 - y0, int(2 * _MEMORY // (4 * len(scans) * width)))
        y0 = max(0, min(middle - most // 2, height - most))
        y1 = min(height, y0 + most)
    most = max(8, int(_MEMORY // (4 * len(scans) * (y1 - y0) * width)))
    chosen = [_chosen(f, most, across, few[reference], volumes) for f in frames]
    stack, lost = [], {}
    for e, scan in enumerate(scans):
        progress("registration", e, len(scans))
        try:
            stack.append(read(scan, chosen[e], y0, y1))
        except XanesTomoError as error:
            if e == reference:
                raise
            lost[e] = str(error)
    there = [e for e in range(len(scans)) if e not in lost]
    data = np.stack(stack)
    keep = slice(halo if y0 > 0 else 0, data.shape[2] - (halo if y1 < height else 0))
    axes = (0, 1, 2) if volumes else (1, 2)
    theta = None if volumes else np.deg2rad(np.asarray(reading.theta_deg, dtype=float)[chosen[reference]])
    size = np.array([len(reading), height, width])
    origin = np.array([int(chosen[reference][0]), y0, 0]) - (size - 1) / 2
    body, air = _regions(data, axes)
    n = len(scans)
    mass, place, sigma = np.full(n, np.nan), np.full((n, 4), np.nan), np.full((n, 4), np.nan)
    place[reference] = sigma[reference] = 0.0
    against = data[there.index(reference)]
    for e, d in zip(there, data, strict=True):
        mass[e] = float(d[:, keep][body[:, keep]].mean(dtype=np.float64))
        if e != reference:
            place[e], sigma[e] = _displacement(d, against, body, axes, keep, theta, origin)
    energies = np.array([scans[e].energy_ev for e in there])
    variance, source = np.full((n, len(smoothings)), np.nan), ""
    for k, s in enumerate(smoothings):
        soft = np.stack([_soft(d, s, axes)[:, keep] for d in data])
        variance[there, k], source = _noise(soft, body[:, keep], air[:, keep], energies)
    return Survey(mass, place[:, :3], sigma[:, :3], 1 + place[:, 3], sigma[:, 3], variance, source, lost)


def _common_frames(scans: Sequence[EnergyScan], volumes: bool) -> list[npt.NDArray[np.intp]]:
    """Return for every energy the frames that all have: the planes, or the projections at the same angles."""
    if volumes:
        return [np.arange(len(s)) for s in scans]
    angles = np.asarray(scans[0].theta_deg, dtype=float)
    wanted = [t for t, ok in zip(angles, scans[0].usable, strict=True) if ok]
    where = []
    for scan in scans:
        theta = np.where(scan.usable, np.asarray(scan.theta_deg, dtype=float), np.inf)
        where.append([int(np.argmin(np.abs(theta - t))) for t in wanted])
        for i, (k, t) in enumerate(zip(where[-1], wanted, strict=True)):
            if not abs(theta[k] - t) <= _SAME_ANGLE:
                where[-1][i] = -1
    table = np.array(where)
    table = table[:, (table >= 0).all(axis=0)]
    if table.shape[1] < 1:
        raise XanesTomoError("expected aligned projections at the same angles at all energies, got none in common")
    return [row.astype(np.intp) for row in table]


def _chosen(
    frames: npt.NDArray[np.intp], most: int, across: FloatArray, few: npt.NDArray[np.intp], volumes: bool
) -> npt.NDArray[np.intp]:
    """Return at most so many frames: of projections spread over the angles, of planes those around the object."""
    if len(frames) <= most:
        return frames
    if not volumes:
        return np.asarray(frames[np.linspace(0, len(frames) - 1, most).round().astype(int)])
    middle = int(np.average(few, weights=across)) if across.sum() > 0 else len(frames) // 2
    start = max(0, min(middle - most // 2, len(frames) - most))
    return np.asarray(frames[start : start + most])


def _soft(data: F32, sigma: float, axes: tuple[int, ...]) -> F32:
    from scipy.ndimage import gaussian_filter

    if sigma <= 0:
        return data
    return np.asarray(gaussian_filter(data, [sigma if a in axes else 0.0 for a in range(3)]), dtype=np.float32)


def _regions(data: F32, axes: tuple[int, ...]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return where the object is, and where certainly nothing is."""
    from scipy.ndimage import binary_dilation

    calm = _soft(data.mean(axis=0), 1.0, axes)
    level = float(np.median(calm[calm > 0.2 * calm.max()]))
    body = calm > 0.5 * level
    near = np.zeros((3, 3, 3), dtype=bool)
    near[tuple(slice(None) if a in axes else slice(1, 2) for a in range(3))] = True
    air = ~binary_dilation(calm > 0.15 * level, near, iterations=4)
    return body, air


def _displacement(
    data: F32,
    against: F32,
    body: npt.NDArray[np.bool_],
    axes: tuple[int, ...],
    keep: slice,
    theta: FloatArray | None,
    origin: FloatArray,
) -> tuple[FloatArray, FloatArray]:
    """Return (4,) displacement along y, x, z and change of magnification, with their standard errors.

    ``data(q) = a against(q - t) + ...``, to first order in t, the contrast of the object free to change linearly
    across it; errors by jackknife over groups of frames.
    """
    from scipy.ndimage import binary_dilation

    mine, theirs = _soft(data, _CALM, axes), _soft(against, _CALM, axes)
    slope = {a: np.gradient(theirs, axis=a) for a in (1, 2)}
    place = [np.arange(n) + o for n, o in zip(data.shape, origin, strict=True)]
    grid = [p.reshape([-1 if a == b else 1 for b in range(3)]) for a, p in enumerate(place)]
    if theta is None:
        slope[0] = np.gradient(theirs, axis=0) if len(theirs) > 1 else np.zeros_like(theirs)
        moved = [slope[1], slope[2], slope[0]]
        stretched = grid[0] * slope[0] + grid[1] * slope[1] + grid[2] * slope[2]
        linear = [theirs * (grid[a] / max(1.0, float(np.abs(place[a]).max()))) for a in (0, 1, 2)]
    else:
        c, s = np.cos(theta)[:, None, None], np.sin(theta)[:, None, None]
        moved = [slope[1], slope[2] * c, slope[2] * s]
        stretched = grid[1] * slope[1] + grid[2] * slope[2]
        across = theirs * (grid[2] / max(1.0, float(np.abs(place[2]).max())))
        linear = [across * c, across * s, theirs * (grid[1] / max(1.0, float(np.abs(place[1]).max())))]
    rim = binary_dilation(body, iterations=4)
    columns = [theirs, *(-m for m in moved), -stretched, *linear, np.ones_like(theirs)]
    use = np.zeros_like(rim)
    use[:, keep] = rim[:, keep]
    by = 0 if len(data) > 1 else 1  # groups of frames, or of the rows of an image
    group = (np.arange(data.shape[by]) * _GROUPS // data.shape[by]).reshape([-1 if a == by else 1 for a in range(3)])
    normal, right = np.zeros((_GROUPS, len(columns), len(columns))), np.zeros((_GROUPS, len(columns)))
    for g in np.unique(group):
        part = use & (group == g)
        a = np.stack([c[part] for c in columns], axis=1).astype(np.float64)
        normal[g], right[g] = a.T @ a, a.T @ mine[part].astype(np.float64)

    there = np.diag(normal.sum(axis=0)) > 0  # an image has no extent along z

    def solve(n: FloatArray, r: FloatArray) -> FloatArray:
        x = np.zeros(len(r))
        size = np.sqrt(np.maximum(np.diag(n)[there], 1e-300))
        x[there] = (
            np.linalg.lstsq(n[np.ix_(there, there)] / np.outer(size, size), r[there] / size, rcond=1e-10)[0] / size
        )
        return np.asarray(x[1:5] / x[0]) if x[0] else np.full(4, np.nan)

    whole = solve(normal.sum(axis=0), right.sum(axis=0))
    groups = np.unique(group)
    without = np.array([solve(normal.sum(axis=0) - normal[g], right.sum(axis=0) - right[g]) for g in groups])
    n = len(groups)
    sigma = (
        np.sqrt((n - 1) / n * np.sum((without - without.mean(axis=0)) ** 2, axis=0)) if n > 1 else np.full(4, np.nan)
    )
    return whole, np.asarray(sigma)


def _noise(
    data: F32, body: npt.NDArray[np.bool_], air: npt.NDArray[np.bool_], energies_ev: FloatArray
) -> tuple[FloatArray, str]:
    """Return the variance of a sample at every energy, and how it was found."""
    scatter = np.full(len(data), np.nan)
    if np.count_nonzero(air) >= 100:
        scatter = np.array([(1.4826 * float(np.median(np.abs(d[air] - np.median(d[air]))))) ** 2 for d in data])
    elements = bracketed_elements(energies_ev)
    shared = len(elements) + 1 + (2 if scanned_element(energies_ev, elements) is not None else 0)
    n = len(data)
    if n - shared < 1 or np.count_nonzero(body) < 20 * n:
        return scatter, f"the scatter of the air: {n} energies, of which {shared} the object needs"
    x = data[:, body]
    x = x[:, :: max(1, x.shape[1] // _SAMPLES)].astype(np.float64)
    moments = x @ x.T / x.shape[1]
    _, vectors = np.linalg.eigh(moments)
    basis = vectors[:, -shared:]
    rest = np.eye(n) - basis @ basis.T
    free = np.diag(rest)
    variance = np.diag(rest @ moments @ rest) / np.maximum(free, 1e-12)
    known = free > 0.1
    typical = float(np.sum(variance[known] * free[known]) / np.sum(free[known])) if known.any() else float("nan")
    # An energy that is a component by itself leaves nothing to judge it by: the others speak for it.
    return np.where(known, variance, typical), f"what {n} energies do not share in {shared} principal components"
