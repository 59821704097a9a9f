"""Registration of single images across energies: 2-D XANES, one angle or none.

Every image is compared with the reference, with another image of its own contrast, and with its neighbour in energy;
all comparisons together give one place for each (`graph.solve_network`). Two noisy images are compared symmetrically:
the derivatives are those of their mean, so that the noise of neither pulls the scale (one image as the template of the
other makes every image seem larger). The numbers are alignments, as those of tomograms; no image is resampled for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from .agreement import band_pass, bin_frames, registration_equations, solve_normal
from .graph import PARAMETERS, Closure, Pair, closures, contrast_islands, island_hubs, solve_network
from .model import Alignment, FloatArray, Progress, Quality, Score, XanesTomoError, no_progress
from .recipe import RegistrationParameters
from .registration import reference_energy
from .resample import place

__all__ = ["ImageMatch", "ImagesRegistered", "match_images", "register_images"]

F32 = npt.NDArray[np.float32]
_COLUMNS = ("scale", "roll", "dy", "dx", "gain", "level")
_BLOCKS = 6  # x 6 blocks of the image, left out in turn for the standard errors
_FEWEST = 16  # pixels of the smallest image side


@dataclass(frozen=True)
class ImageMatch:
    """Where the content of one image lies with respect to another.

    Attributes
    ----------
    alignment : Alignment
        Of the first image (n = 1) on the grid of the second, raw px.
    sigma : (4,) array
        Standard errors of ``[ln M, roll (rad), dy, dx]``, the shifts in px of the second image; 0 where not fitted.
    correlation : float
        Of the two images in the band of the comparison, noise included.
    gain : float
        Contrast of the first over that of the second.
    """

    alignment: Alignment
    sigma: FloatArray
    correlation: float
    gain: float


@dataclass(frozen=True)
class ImagesRegistered:
    """The place of every image on the grid of the reference.

    Attributes
    ----------
    alignments : tuple of Alignment
        One an image, n = 1, raw px; `sigma` is its standard error with all parts. NaN shifts where an image failed.
    reference : int
        Number of the reference image.
    magnification_sigma, roll_sigma_deg : (n,) arrays
        Standard errors.
    failed : dict of int to str
        Images that could not be registered, with the reason.
    correlation : (n,) array
        With the reference, in the band of the comparison.
    misfit : (n,) array
        Worst disagreement of an image's comparisons with the joint solution, standard errors.
    closures : tuple of Closure
        Of every three images compared pair by pair, each pair on its own; see `graph.PARAMETERS`.
    quality : Quality
    """

    alignments: tuple[Alignment, ...]
    reference: int
    magnification_sigma: FloatArray
    roll_sigma_deg: FloatArray
    failed: dict[int, str]
    correlation: FloatArray
    misfit: FloatArray
    closures: tuple[Closure, ...]
    quality: Quality


def match_images(
    image: npt.ArrayLike,
    template: npt.ArrayLike,
    *,
    start: Alignment | None = None,
    usable: npt.NDArray[np.bool_] | None = None,
    template_usable: npt.NDArray[np.bool_] | None = None,
    scale: bool = True,
    roll: bool = False,
    parameters: RegistrationParameters | None = None,
    what: str = "image",
) -> ImageMatch:
    """Find where the content of `image` lies with respect to `template`.

    Parameters
    ----------
    image, template : (y, x) arrays
        Absorbance.
    start : Alignment, optional
        First guess, n = 1: how the magnification and the roll start; a cross-correlation finds the shift when it is
        left out or not finite.
    usable, template_usable : (y, x) bool arrays, optional
        Pixels that count; false where the beam does not reach or the camera is not to be trusted. What is fixed to the
        camera and not to the sample must be left out, or it pulls the shift to zero.
    scale, roll : bool
        Whether they are fitted.
    parameters : RegistrationParameters, optional
    what : str
        Name of the image in messages.

    Raises
    ------
    XanesTomoError
        The images are of different or too small a shape, hold nothing, or do not show the same.
    """
    p = RegistrationParameters() if parameters is None else parameters
    a, b = (np.asarray(v, dtype=np.float32) for v in (image, template))
    if a.ndim != 2 or a.shape != b.shape or min(a.shape) < _FEWEST:
        raise XanesTomoError(
            f"{what}: expected two images of one shape, at least {_FEWEST} px wide, got {a.shape} and {b.shape}"
        )
    first = _Side(a, usable, p, what)
    second = _Side(b, template_usable, p, "the image it is compared with")
    now = Alignment(np.full((1, 2), np.nan), np.zeros((1, 2))) if start is None else replace(start, status=())
    if not np.isfinite(now.shift).all():
        now = _correlated(first, second, now)
    wide = (3 * p.fine_px, 4 * p.coarse_px, 2 if min(a.shape) >= 128 else 1)
    for fine, coarse, extra in (wide, (p.fine_px, p.coarse_px, 1)):
        for _ in range(p.iterations):
            fit = _compare(first, second, now, fine, coarse, extra, scale=scale, roll=roll)
            now = _moved(now, fit.value)
            if np.hypot(*fit.value[2:4]) + abs(fit.value[0]) * a.shape[1] / 2 < 0.003 * extra:
                break
    fit = _compare(first, second, now, p.fine_px, p.coarse_px, 1, scale=scale, roll=roll)
    now = _moved(now, fit.value)
    shift = float(np.abs(now.shift).max())
    if not np.isfinite(now.shift).all() or shift > 0.6 * max(a.shape) or fit.shared < 64:
        raise XanesTomoError(f"{what}: expected what the other image shows, but nothing of it was found; leave it out")
    sigma = np.where(np.isfinite(fit.sigma), fit.sigma, 0.0)
    error = np.abs(now.matrix) @ sigma[2:4]
    return ImageMatch(replace(now, sigma=error[None]), sigma, fit.correlation, fit.gain)


def register_images(
    images: npt.ArrayLike,
    energies_ev: npt.ArrayLike,
    *,
    reference: int | None = None,
    magnification: npt.ArrayLike | None = None,
    usable: npt.NDArray[np.bool_] | None = None,
    scale: bool = True,
    roll: bool = False,
    parameters: RegistrationParameters | None = None,
    progress: Progress = no_progress,
) -> ImagesRegistered:
    """Register a stack of images, one an energy, onto the grid of one of them.

    Parameters
    ----------
    images : (n, y, x) array
        Absorbance. An energy may recur.
    energies_ev : (n,) array
        eV, in any order.
    reference : int, optional
        Number of the reference image; by the rule of `reference_energy` unless given.
    magnification : (n,) array, optional
        First guess, or what is taken as it is when `scale` is false; 1 unless given.
    usable : (y, x) or (n, y, x) bool array, optional
        Pixels of the camera that count, see `match_images`; all that are finite unless given.
    scale, roll : bool
        Whether they are measured.
    parameters : RegistrationParameters, optional
    progress : callable
        See `Progress`.

    Raises
    ------
    XanesTomoError
        Fewer than two images, shapes that do not fit together, or a reference without a signal.
    """
    p = RegistrationParameters() if parameters is None else parameters
    stack = np.asarray(images, dtype=np.float32)
    energies = np.asarray(energies_ev, dtype=float)
    n = len(energies)
    if stack.ndim != 3 or energies.ndim != 1 or len(stack) != n or n < 2:
        raise XanesTomoError(
            f"images: expected at least two, (energy, y, x), and an energy for each; got {stack.shape} and {n} energies"
        )
    guess = np.ones(n) if magnification is None else np.asarray(magnification, dtype=float)
    if guess.shape != (n,) or not np.all(guess > 0):
        raise XanesTomoError(f"magnification: expected {n} positive numbers")
    if usable is not None and np.shape(usable) not in (stack.shape, stack.shape[1:]):
        raise XanesTomoError(f"usable: expected {stack.shape[1:]} or {stack.shape}, got {np.shape(usable)}")
    good = np.broadcast_to(np.ones(stack.shape[1:], bool) if usable is None else np.asarray(usable, bool), stack.shape)
    r = reference_energy(energies, p.reference_ev) if reference is None else int(reference)
    if not 0 <= r < n:
        raise XanesTomoError(f"reference: expected the number of one of {n} images, got {r}")
    _Side(stack[r], good[r], p, f"{energies[r]:g} eV, the reference")

    def match(first: int, second: int, start: Alignment) -> ImageMatch:
        return match_images(
            stack[first], stack[second], start=start, usable=good[first], template_usable=good[second], scale=scale,
            roll=roll, parameters=p, what=f"{energies[first]:g} eV, image {first}",
        )  # fmt: skip

    failed: dict[int, str] = {}
    places: dict[int, Alignment] = {r: Alignment.identity(1)}
    correlation = np.full(n, np.nan)
    correlation[r] = 1.0
    pairs: list[Pair] = []
    islands = contrast_islands(energies)
    width = float(stack.shape[2])
    for k in range(n):
        progress("images", k, 2 * n)
        if k == r:
            continue
        try:
            nothing = np.full((1, 2), np.nan)
            found = match(k, r, Alignment(nothing, np.zeros((1, 2)), float(guess[k] / guess[r])))
        except XanesTomoError as error:
            failed[k] = str(error)
            continue
        places[k], correlation[k] = found.alignment, found.correlation
        pairs.append(Pair(k, r, _place(found.alignment), _floored(found.sigma, width)))
    others = _second_comparisons(energies, islands, r, places)
    for done, (k, other) in enumerate(others):
        progress("images", n + done * n // max(1, len(others)), 2 * n)
        # Where k lies on the grid of the other: what both are on that of the reference.
        start = _on_other(places[k], places[other])
        try:
            found = match(k, other, start)
        except XanesTomoError:
            continue
        there = _composed(found.alignment, places[other])
        pairs.append(Pair(k, other, _place(there) - _place(places[other]), _floored(found.sigma, width)))
    progress("images", 2 * n, 2 * n)
    solved = solve_network(pairs, islands, r, cross_sigma=_cross_sigma(width))
    misfit = np.full(n, np.nan)
    for pair, off in zip(pairs, solved.misfit, strict=True):
        misfit[pair.first] = np.fmax(misfit[pair.first], off)
    alignments = []
    for k in range(n):
        if k in failed:
            alignments.append(
                Alignment(np.full((1, 2), np.nan), np.full((1, 2), np.nan), status=("excluded:" + failed[k],))
            )
            continue
        value, sigma = solved.value[k], solved.sigma[k]
        at = Alignment(np.zeros((1, 2)), np.zeros((1, 2)), float(np.exp(value[0])), float(np.rad2deg(value[1])))
        shift = at.matrix @ value[2:4]
        alignments.append(replace(at, shift=shift[None], sigma=(np.abs(at.matrix) @ sigma[2:4])[None]))
    m = np.array([a.magnification for a in alignments])
    worst = float(np.nanmax(solved.sigma[:, 2:4])) if n > 1 else 0.0
    scores = (
        Score("correlation with the reference", float(np.nanmin(correlation)), "", 0.1, "higher"),
        Score("sigma of the shifts", worst, "px", 0.1 * width / 256),
        Score("disagreement of comparisons", float(np.nanmax(misfit)) if pairs else np.nan, "sigma", 6.0),
        Score("images that failed", float(len(failed)), "", 0.5),
    )
    return ImagesRegistered(
        tuple(alignments),
        r,
        solved.sigma[:, 0] * m if scale else np.zeros(n),
        np.rad2deg(solved.sigma[:, 1]) if roll else np.zeros(n),
        failed,
        correlation,
        misfit,
        closures(pairs, islands),
        Quality(scores, tuple(failed.values())),
    )


def _second_comparisons(
    energies: FloatArray, islands: Sequence[int], reference: int, places: dict[int, Alignment]
) -> list[tuple[int, int]]:
    """Pairs besides those with the reference: with an image of the same contrast, and with the next one in energy."""
    out = [(k, hub) for k, hub in sorted(island_hubs(islands, energies, reference).items())]
    order = [int(k) for k in np.argsort(energies, kind="stable")]
    out += list(pairwise(order))
    chosen: dict[frozenset[int], tuple[int, int]] = {}
    for a, b in out:
        if a in places and b in places and reference not in (a, b):
            chosen.setdefault(frozenset((a, b)), (a, b))
    return list(chosen.values())


class _Side:
    """One image of a pair: its pixels, and where they count."""

    def __init__(self, image: F32, usable: npt.NDArray[np.bool_] | None, p: RegistrationParameters, what: str) -> None:
        good = np.isfinite(image)
        if usable is not None:
            good &= np.asarray(usable, dtype=bool)
        if good.mean() < 0.05:
            raise XanesTomoError(f"{what}: expected an image, but hardly any of its pixels can be used")
        level = float(np.median(image[good]))
        # What lies outside must not be seen through the band-pass: it is filled, and a margin besides is left out.
        self.image = np.where(good, image, level).astype(np.float32)[None]
        if float(np.std(image[good])) <= 1e-6 * max(1.0, abs(level)):
            raise XanesTomoError(f"{what}: expected an image with something in it, but all its pixels are the same")
        margin = round(2 * p.coarse_px * image.shape[1] / 256) + 1
        self.good = _eroded(good, margin).astype(np.float32)[None]


def _eroded(good: npt.NDArray[np.bool_], margin: int) -> npt.NDArray[np.bool_]:
    from scipy.ndimage import minimum_filter

    if good.all():
        return good
    return np.asarray(minimum_filter(good, size=2 * margin + 1, mode="nearest"), dtype=bool)


@dataclass(frozen=True)
class _Compared:
    value: FloatArray
    sigma: FloatArray
    correlation: float
    gain: float
    shared: float


def _compare(
    first: _Side, second: _Side, now: Alignment, fine: float, coarse: float, extra: int, *, scale: bool, roll: bool
) -> _Compared:
    """One comparison: what is left of ``[ln M, roll, dy, dx]``, common-grid px, with jackknife errors."""
    height, width = first.image.shape[1:]
    unit = width / 256 / extra
    grid = (height // extra, width // extra)
    seen = place(first.image, now, grid_shape=grid, bin=extra)
    inside, covered = place(first.good, now, grid_shape=grid, bin=extra, order=1, return_coverage=True)
    # Less than this, and what is aliased - it does not move with the object - is compared.
    fine, coarse = max(fine * unit, 0.7), max(coarse * unit, 2.0)
    a, b = (band_pass(v, fine, coarse) for v in (seen, bin_frames(second.image, extra)))
    weight = (inside > 0.99) & (covered > 0.99) & (bin_frames(second.good, extra) > 0.99)
    edge = int(np.ceil(2 * coarse)) + 1
    border = _eroded(np.pad(covered[0, 1:-1, 1:-1] > 0.99, 1), edge)[None]
    u = (weight & border).astype(np.float32)
    shared = float(u.sum())
    nothing = np.zeros(4)
    if shared < 64:
        return _Compared(nothing, np.full(4, np.inf), 0.0, 1.0, shared)
    a, b = a - (a * u).sum() / shared, b - (b * u).sum() / shared
    aa, bb, ab = (float((v * w * u).sum(dtype=np.float64)) for v, w in ((a, a), (b, b), (a, b)))
    correlation = ab / np.sqrt(max(aa * bb, 1e-30))
    gain = float(np.clip(np.sqrt(aa / max(bb, 1e-30)), 0.05, 20.0))
    a = a / np.float32(gain)
    # The derivatives of the mean, for the whole difference: noise of the two alike cancels in the scale.
    mean = 0.5 * (a + b)
    fit = registration_equations(
        (mean + (a - b)).astype(np.float32), mean.astype(np.float32), u, pixel=extra, blocks=(_BLOCKS, _BLOCKS),
        columns=_COLUMNS,
    )  # fmt: skip
    free = np.array([i for i in range(6) if (i != 0 or scale) and (i != 1 or roll)])
    normal, rhs = fit.normal[0][:, free[:, None], free], fit.rhs[0][:, free]
    whole, vector = normal.sum(axis=0), rhs.sum(axis=0)
    solution = solve_normal(whole[None], vector[None])[0][0]
    filled = np.flatnonzero(fit.count[0] > 0)
    left = solve_normal(whole - normal[filled], vector - rhs[filled])[0]
    spread = np.sqrt((len(filled) - 1) * left.var(axis=0)) if len(filled) > 3 else np.full(len(free), np.inf)
    value, sigma = np.zeros(6), np.zeros(6)
    value[free], sigma[free] = solution, spread
    limit = 8 * unit * extra
    value[0], value[1] = np.clip(value[:2], -0.02, 0.02)
    value[2:4] = np.clip(value[2:4], -limit, limit)
    return _Compared(value[:4], sigma[:4], correlation, gain, shared)


def _moved(now: Alignment, value: FloatArray) -> Alignment:
    """Return the alignment after ``[ln M, roll, dy, dx]``: what should be at q is found at q + d(q)."""
    shift = now.shift[0] + now.matrix @ value[2:4]
    return replace(
        now,
        shift=shift[None],
        magnification=now.magnification * (1 + float(value[0])),
        roll_deg=now.roll_deg + float(np.rad2deg(value[1])),
    )


def _correlated(first: _Side, second: _Side, now: Alignment) -> Alignment:
    """Return the alignment with a shift from the cross-correlation of the two, to a pixel or so."""
    from scipy.fft import irfft2, rfft2

    height, width = first.image.shape[1:]
    step = max(1, width // 256)
    start = replace(now, shift=np.zeros((1, 2)), sigma=np.zeros((1, 2)))
    grid = (height // step, width // step)
    a, good_a = (place(v, start, grid_shape=grid, bin=step) for v in (first.image, first.good))
    b, good_b = bin_frames(second.image, step), bin_frames(second.good, step)

    def ready(image: F32, good: F32) -> F32:
        window = np.hanning(grid[0] + 2)[1:-1, None] * np.hanning(grid[1] + 2)[None, 1:-1]
        return np.asarray(band_pass(image, 1.0, 6.0)[0] * (good[0] > 0.99) * window.astype(np.float32))

    shape = (2 * grid[0], 2 * grid[1])
    cross = irfft2(rfft2(ready(a, good_a), shape) * np.conj(rfft2(ready(b, good_b), shape)), shape)
    dy, dx = np.unravel_index(int(np.argmax(cross)), shape)
    move = np.array([dy - shape[0] * (dy > grid[0]), dx - shape[1] * (dx > grid[1])], dtype=float) * step
    return replace(start, shift=(start.matrix @ move)[None])


def _place(alignment: Alignment) -> FloatArray:
    """Return an alignment in the terms of `graph.PARAMETERS`; the shift in px of the common grid."""
    out = np.zeros(len(PARAMETERS))
    out[0], out[1] = np.log(alignment.magnification), np.deg2rad(alignment.roll_deg)
    out[2:4] = np.linalg.solve(alignment.matrix, alignment.shift[0])
    return out


def _composed(on_other: Alignment, other: Alignment) -> Alignment:
    """Return the alignment on the reference's grid of an image whose alignment on another's grid is `on_other`."""
    return replace(other, status=()).then(replace(on_other, status=()))


def _on_other(place_: Alignment, other: Alignment) -> Alignment:
    """Return the alignment on the grid of `other` of an image at `place_`: the inverse of `_composed`."""
    m = place_.magnification / other.magnification
    roll = place_.roll_deg - other.roll_deg
    only = Alignment(np.zeros((1, 2)), np.zeros((1, 2)), m, roll)
    return replace(only, shift=place_.shift - other.shift @ only.matrix.T)


def _floored(sigma: FloatArray, width: float) -> FloatArray:
    """(6,) standard errors of a comparison, not taken for better than blocks of one image can tell."""
    unit = width / 256
    out = np.full(len(PARAMETERS), 1e-6)
    out[:4] = np.maximum(sigma, [2e-5, 2e-5, 2e-3 * unit, 2e-3 * unit])
    return out


def _cross_sigma(width: float) -> FloatArray:
    """(6,) standard deviations of what a difference of contrast does to one image; 0 for what is not measured."""
    unit = width / 256
    return np.array([2e-4, 2e-4, 0.02 * unit, 0.02 * unit, 1e-6, 1e-6])
