"""Composition against redox: components and clusters of spectra, means of regions, correlations with honest errors.

Voxels are not independent: smoothing, the angles and the alignment correlate neighbours, so that the scatter of single
voxels says little about how sure a mean is. Errors come from blocks of voxels that are drawn again, or from half sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .model import FloatArray, XanesTomoError

__all__ = [
    "Clusters",
    "Correlation",
    "PrincipalComponents",
    "RegionMeans",
    "block_voxels",
    "cluster",
    "correlation",
    "principal_components",
    "region_means",
]

BLOCK_VOXELS = 12  # edge of a block; ten times the blur of a map: with five times the error comes out 40 % too small
_DRAWS = 500
_STARTS = 8
_SAMPLE = 20_000  # spectra that centres of groups are found with
_FEWEST_BLOCKS = 5


@dataclass(frozen=True)
class PrincipalComponents:
    """What spectra differ by, strongest first.

    Attributes
    ----------
    mean : (energies,) array
    spectra : (components, energies) array
        In the unit of the spectra, for a score of 1.
    scores : (components, n) array
        Of every spectrum; NaN where it is not finite. The sign is such that the largest value of a component is
        positive.
    share : (components,) array
        Part of the variance (over the noise variance where that is given).
    significant : int
        How many stand above what noise alone makes; all where no noise was given.
    """

    mean: FloatArray
    spectra: FloatArray
    scores: FloatArray
    share: FloatArray
    significant: int

    def denoised(self, count: int | None = None) -> FloatArray:
        """Return (energies, n) spectra of the first `count` components, by default the significant ones."""
        k = self.significant if count is None else count
        return np.asarray(self.mean[:, None] + self.spectra[:k].T @ self.scores[:k])


def principal_components(
    spectra: npt.ArrayLike, *, variance: npt.ArrayLike | None = None, count: int = 6
) -> PrincipalComponents:
    """Find the principal components of spectra, each energy in units of its noise.

    Parameters
    ----------
    spectra : (energies, n) array
        Normalised or not; those with a value that is not finite are left out.
    variance : (energies,) array, optional
        Noise variance at every energy. With it, a component is significant when its variance is above
        ``(1 + sqrt(energies / n))**2``, the largest that white noise makes of itself (Marchenko & Pastur 1967,
        doi 10.1070/SM1967v001n04ABEH001994).
    count : int
        Components at most.

    Raises
    ------
    XanesTomoError
        Fewer than three spectra are finite.
    """
    y = np.asarray(spectra, dtype=float)
    good = np.isfinite(y).all(axis=0)
    if y.ndim != 2 or good.sum() < 3:
        raise XanesTomoError(
            f"components: expected (energies, n) with 3 spectra or more, got {int(good.sum())} of them"
        )
    sigma = np.ones(len(y)) if variance is None else np.sqrt(np.asarray(variance, dtype=float))
    if sigma.shape != (len(y),) or not np.all(sigma > 0):
        raise XanesTomoError("components: expected a positive noise variance of every energy")
    mean = y[:, good].mean(axis=1)
    centred = (y[:, good] - mean[:, None]) / sigma[:, None]
    values, vectors = np.linalg.eigh(centred @ centred.T / good.sum())
    order = np.argsort(values)[::-1][: max(1, count)]
    values, vectors = np.maximum(values, 0), vectors[:, order].T
    top = np.abs(vectors).argmax(axis=1)
    vectors = vectors * np.sign(vectors[np.arange(len(vectors)), top])[:, None]
    scores = np.full((len(vectors), y.shape[1]), np.nan)
    scores[:, good] = vectors @ centred
    total = values.sum()
    limit = 0.0 if variance is None else (1 + np.sqrt(len(y) / good.sum())) ** 2
    return PrincipalComponents(
        mean,
        vectors * sigma,
        scores,
        values[order] / total if total > 0 else np.zeros(len(order)),
        int(np.sum(values[order] > max(limit, 1e-12 * max(total, 1e-300)))),
    )


@dataclass(frozen=True)
class Clusters:
    """Groups of alike spectra.

    Attributes
    ----------
    labels : (n,) array of int
        1 for the largest group, 2 for the next, ...; 0 where a spectrum is not finite.
    centres : (groups, features) array
        Mean of every group.
    inertia : float
        Mean squared distance from the centres over that from the mean of all.
    """

    labels: npt.NDArray[np.intp]
    centres: FloatArray
    inertia: float


def cluster(features: npt.ArrayLike, groups: int, *, seed: int = 0) -> Clusters:
    """Group spectra, or their scores, by k-means (Lloyd 1982, doi 10.1109/TIT.1982.1056489), the best of eight starts.

    The starts are drawn by k-means++ with `seed`: the same input gives the same groups. Of many spectra a sample finds
    the centres; then every spectrum goes to the nearest one.

    Parameters
    ----------
    features : (features, n) array
        Scores of the significant components, or normalised spectra.
    groups : int
    seed : int
    """
    x = np.asarray(features, dtype=float)
    good = np.isfinite(x).all(axis=0)
    points = x[:, good].T
    if not 1 <= groups <= len(points):
        raise XanesTomoError(f"clusters: expected 1 to {len(points)} groups (finite spectra), got {groups}")
    every = points - points.mean(axis=0)
    rng = np.random.default_rng(seed)
    drawn = len(every) > _SAMPLE
    points = every[np.sort(rng.choice(len(every), _SAMPLE, replace=False))] if drawn else every
    best: tuple[float, FloatArray] | None = None
    for _ in range(_STARTS):
        centres = _spread(points, groups, rng)
        labels = np.zeros(len(points), dtype=np.intp)
        for _ in range(200):
            distance = _distances(points, centres)
            new = distance.argmin(axis=1)
            counts = np.bincount(new, minlength=groups)
            for empty in np.flatnonzero(counts == 0):  # takes the point that fits worst
                new[distance[np.arange(len(new)), new].argmax()] = empty
            if np.array_equal(new, labels):
                break
            labels = new
            counts = np.maximum(np.bincount(labels, minlength=groups), 1)
            centres = np.stack([np.bincount(labels, p, groups) for p in points.T], axis=1) / counts[:, None]
        cost = float(np.mean(np.sum((points - centres[labels]) ** 2, axis=1)))
        if best is None or cost < best[0] - 1e-12 * abs(best[0]):
            best = cost, centres
    assert best is not None
    parts = np.array_split(every, -(-len(every) // _SAMPLE))
    labels = np.concatenate([_distances(part, best[1]).argmin(axis=1) for part in parts])
    rank = np.argsort(np.argsort(-np.bincount(labels, minlength=groups), kind="stable"), kind="stable")
    out = np.zeros(x.shape[1], dtype=np.intp)
    out[good] = rank[labels] + 1
    means = np.stack(
        [x[:, out == k + 1].mean(axis=1) if np.any(out == k + 1) else x[:, 0] * np.nan for k in range(groups)]
    )
    whole, inside = (float(np.sum(d**2)) for d in (every, x[:, good] - means[out[good] - 1].T))
    return Clusters(out, means, inside / whole if whole > 0 else 0.0)


def _distances(points: FloatArray, centres: FloatArray) -> FloatArray:
    """(n, groups) squared distances."""
    square = np.sum(points**2, axis=1)[:, None] - 2 * points @ centres.T + np.sum(centres**2, axis=1)
    return np.asarray(np.maximum(square, 0))


def _spread(points: FloatArray, groups: int, rng: np.random.Generator) -> FloatArray:
    """Draw starts, each with a chance that grows with its squared distance from those before."""
    chosen = [int(rng.integers(len(points)))]
    for _ in range(groups - 1):
        far = _distances(points, points[chosen]).min(axis=1)
        total = far.sum()
        chosen.append(int(rng.choice(len(points), p=far / total if total > 0 else None)))
    return points[chosen]


# --------------------------------------------------------------------------------------------------- regions


@dataclass(frozen=True)
class RegionMeans:
    """Means of regions with their errors.

    Attributes
    ----------
    labels : (regions,) array of int
    voxels : (regions,) array of int
        That have a value.
    mean, sigma : (regions,) or (maps, regions) arrays
        NaN where nothing is known: no voxel with a value, or too few blocks (fewer than five) for an error.
    method : str
        Where `sigma` comes from.
    """

    labels: npt.NDArray[np.intp]
    voxels: npt.NDArray[np.intp]
    mean: FloatArray
    sigma: FloatArray
    method: str


def block_voxels(psf_sigma_voxel: float | None) -> int:
    """Return the edge of the blocks to draw from maps with this blur, voxels: ten times the blur, at least four."""
    return BLOCK_VOXELS if psf_sigma_voxel is None else max(4, int(np.ceil(10 * psf_sigma_voxel)))


def region_means(
    values: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    halves: tuple[npt.ArrayLike, npt.ArrayLike] | None = None,
    block: int = BLOCK_VOXELS,
    seed: int = 0,
) -> RegionMeans:
    """Average maps, or the energies of a volume, over regions.

    Parameters
    ----------
    values : (y, z, x) or (maps, y, z, x) array
        NaN is left out.
    labels : (y, z, x) array of int
        Regions; 0 belongs to none.
    halves : two arrays like `values`, optional
        The same from independent halves of the projections. The error of a mean is then half their difference: noise
        and alignment, whatever their correlation, but one difference knows a standard error only to a factor of two.
    block : int
        Otherwise: edge of the blocks that are drawn again, voxels. It has to be ten times as large as the blur that
        correlates neighbours (`psf_sigma_voxel` of a map); the error then holds noise and real heterogeneity
        (Kuensch 1989, doi 10.1214/aos/1176347265).
    seed : int
        Of the draws.
    """
    data = np.asarray(values, dtype=float)
    stack = data if data.ndim == 4 else data[None]
    regions = np.asarray(labels)
    if stack.shape[1:] != regions.shape:
        raise XanesTomoError(f"regions: expected labels of the shape {stack.shape[1:]}, got {regions.shape}")
    if halves is not None:
        first, second = (np.asarray(h, dtype=float).reshape(stack.shape) for h in halves)
    names = np.unique(regions[regions != 0]).astype(np.intp)
    mean = np.full((len(stack), len(names)), np.nan)
    sigma, voxels = mean.copy(), np.zeros(len(names), dtype=np.intp)
    blocks = _blocks(regions.shape, block)
    for r, name in enumerate(names):
        inside = (regions == name) & np.isfinite(stack).all(axis=0)
        voxels[r] = inside.sum()
        if not voxels[r]:
            continue
        picked = stack[:, inside]
        mean[:, r] = picked.mean(axis=1)
        if halves is not None:
            sigma[:, r] = 0.5 * np.abs(np.nanmean(first[:, inside] - second[:, inside], axis=1))
        else:
            sums = _block_sums(np.concatenate([np.ones((1, picked.shape[1])), picked]), blocks[inside])
            drawn = _drawn(sums, seed)
            if drawn is not None:
                sigma[:, r] = np.std(drawn[1:] / drawn[0], axis=1)
    single = data.ndim != 4
    method = "half sets" if halves is not None else f"blocks of {block} voxels, drawn {_DRAWS} times"
    return RegionMeans(names, voxels, mean[0] if single else mean, sigma[0] if single else sigma, method)


@dataclass(frozen=True)
class Correlation:
    """Correlation of two maps: `r`, its standard error `sigma`, and the number of voxels."""

    r: float
    sigma: float
    voxels: int


def correlation(
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    mask: npt.ArrayLike,
    *,
    block: int = BLOCK_VOXELS,
    seed: int = 0,
) -> Correlation:
    """Correlate two (y, z, x) maps inside a mask; the error comes from blocks of voxels that are drawn again.

    Noise that both maps share (a nickel map and an edge energy from the same voxels) correlates them as well; compare
    it with what `region_means` gives for larger regions.

    Parameters
    ----------
    first, second, mask : (y, z, x) arrays
        NaN is left out.
    block, seed : int
        As in `region_means`.
    """
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    inside = np.asarray(mask).astype(bool) & np.isfinite(a) & np.isfinite(b)
    if inside.sum() < 3:
        return Correlation(float("nan"), float("nan"), int(inside.sum()))
    x, y = a[inside] - a[inside].mean(), b[inside] - b[inside].mean()
    sums = _block_sums(np.stack([np.ones_like(x), x, y, x * x, y * y, x * y]), _blocks(a.shape, block)[inside])

    def r(s: FloatArray) -> FloatArray:
        n, sx, sy, xx, yy, xy = s
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray((xy - sx * sy / n) / np.sqrt((xx - sx * sx / n) * (yy - sy * sy / n)))

    drawn = _drawn(sums, seed)
    sigma = float("nan") if drawn is None else float(np.nanstd(r(drawn)))
    return Correlation(float(r(sums.sum(axis=1))), sigma, int(inside.sum()))


def _blocks(shape: Sequence[int], block: int) -> npt.NDArray[np.intp]:
    """Return the number of the block of every voxel."""
    if block < 1:
        raise XanesTomoError(f"blocks: expected an edge of at least 1 voxel, got {block}")
    out = np.zeros(tuple(shape), dtype=np.intp)
    for axis, n in enumerate(shape):
        at = np.arange(n) // block
        out = out * (n // block + 1) + at.reshape([-1 if k == axis else 1 for k in range(len(shape))])
    return out


def _block_sums(rows: FloatArray, block: npt.NDArray[np.intp]) -> FloatArray:
    """(rows, blocks) sums over the voxels of every block."""
    _, place = np.unique(block, return_inverse=True)
    return np.stack([np.bincount(place, row) for row in rows])


def _drawn(sums: FloatArray, seed: int) -> FloatArray | None:
    """(rows, draws) totals of as many blocks, drawn with replacement; None where there are too few."""
    count = sums.shape[1]
    if count < _FEWEST_BLOCKS:
        return None
    often = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=_DRAWS)
    return np.asarray(sums @ often.T)
