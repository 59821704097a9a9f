"""Counts to absorbance: stray light, flats, bad pixels, noise, and the air around the object taken out.

The logarithm is taken of every recorded pixel and binned afterwards. The mean of transmissions within a bin, taken
first, would count less absorbance wherever it changes across a bin: at the edges of a thick particle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .air import fit_air, fit_surface, plane, terms
from .counts import (
    FLOOR,
    absorbance,
    absorbance_variance,
    fill_masked,
    log_beams,
    log_binned,
    mean_binned,
    mean_counts,
    read_absorbance,
)
from .detector import Detector, estimate_detector, mask_runs, stray_counts
from .flats import (
    Beam,
    Block,
    Flat,
    beam_by,
    exposures,
    flat_for,
    load_block,
    mean_flat,
    neighbour_with_flats,
    scan_detector,
)
from .model import EnergyScan, FlatSet, FloatArray, Progress, XanesTomoError, no_progress
from .parallel import in_threads
from .recipe import AbsorbanceParameters, check_flats
from .screening import CountsSeen

__all__ = [
    "Beam",
    "Detector",
    "Flat",
    "Normalised",
    "absorbance",
    "absorbance_variance",
    "estimate_detector",
    "fill_masked",
    "fit_air",
    "flat_for",
    "mean_flat",
    "normalise",
    "plane",
    "read_absorbance",
    "scan_detector",
]

F32 = npt.NDArray[np.float32]

_CHUNK = 16  # frames read and normalised at a time
_CLEARLY = 0.8  # other flats of the same energy are taken where they leave less than this part of the residual
_COMPONENTS = 3  # principal components of the flats at most


@dataclass(frozen=True)
class Normalised:
    """One tomogram as absorbance, binned for estimation.

    Attributes
    ----------
    data : (n, y, x) float32 array
        ``-ln(I / I0)`` of the usable projections, the air subtracted.
    variance : (n,) array
        Typical variance of a binned pixel behind the object.
    air : (n, 3) or (n, 6) array
        Coefficients of the air that was subtracted; see `plane`.
    air_residual : (n,) array
        Standard deviation of what is left in the air.
    object_fraction : (n,) array
        Part of the frame that is not air.
    index : (n,) int array
        Number of every frame within its energy.
    bin : int
        Recorded pixels per binned pixel.
    frame_shape : (int, int)
        Shape of the recorded frame.
    beam : Beam or None
        What the counts were divided by.
    use : tuple of str
        The flats chosen for every half.
    candidates : dict of str to tuple of float
        Median air residual of every half with the flats that were compared.
    field_counts : (n,) array
        Mean counts of every projection, bad pixels and all.
    notes : tuple of str
        What the user should know about the flats.
    seen : CountsSeen
        What bad projections are told by in their counts.
    """

    data: F32
    variance: FloatArray
    air: FloatArray
    air_residual: FloatArray
    object_fraction: FloatArray
    index: npt.NDArray[np.intp]
    bin: int
    frame_shape: tuple[int, int]
    beam: Beam | None = None
    use: tuple[str, ...] = ()
    candidates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    field_counts: FloatArray = field(default_factory=lambda: np.zeros(0))
    notes: tuple[str, ...] = ()
    seen: CountsSeen | None = None


# ------------------------------------------------------------------------------------------------- one whole energy


def normalise(
    scan: EnergyScan,
    parameters: AbsorbanceParameters,
    *,
    bin: int = 1,
    air: FloatArray | None = None,
    mask: npt.NDArray[np.bool_] | None = None,
    beam: Beam | None = None,
    number: int = 0,
    around: Mapping[int, EnergyScan] | None = None,
    use: str | None = None,
    boxes: Sequence[tuple[float, float, float, float]] = (),
    threads: int | None = None,
    progress: Progress = no_progress,
) -> Normalised:
    """Read one energy and turn it into binned absorbance.

    Stray light that blocked rows show is subtracted, frames are scaled by their exposures and divided by the flats that
    the policy names, bad pixels are left out, and the surface fitted to the air is subtracted.

    Parameters
    ----------
    scan : EnergyScan
    parameters : AbsorbanceParameters
    bin : int
        Recorded pixels per binned pixel, in both directions.
    air : (all projections, 3 or 6) array, optional
        Air found before; fitted unless given.
    mask : (y, x) bool array, optional
        True where the camera is not to be trusted, besides what the flats show; see `fill_masked`.
    beam : Beam, optional
        Found before; made by the policy unless given.
    number : int
        Number of this energy.
    around : mapping of int to EnergyScan, optional
        The other energies, for policies that use their flats.
    use : str, optional
        Policy by hand, instead of that of the parameters.
    boxes : sequence of (y0, y1, x0, x1)
        Parts of the recorded frame in which air is looked for; everywhere when empty.
    threads : int, optional
    progress : callable
        See `Progress`.

    Raises
    ------
    XanesTomoError
        The energy has no readable flat (and nobody said whose to use) or no usable projection.
    """
    h, w = scan.frames.frame_shape
    index = np.flatnonzero(scan.usable)
    if len(index) == 0:
        left_out = {s.partition(":")[2] for s in scan.status if s.startswith("excluded:")}
        why = f" ({left_out.pop()})" if len(left_out) == 1 else ""
        raise XanesTomoError(f"{scan.energy_ev:g} eV: expected readable projections, got none{why}")
    hb, wb = h // bin, w // bin
    halves = max(1, int(np.max(scan.half)) + 1)
    wanted = check_flats(use if use is not None else parameters.flats_for(scan.energy_ev))
    block: Block | None = None
    theirs: tuple[int, EnergyScan, Block] | None = None
    notes: list[str] = []
    if beam is None:
        block, theirs, notes = _blocks(scan, parameters, wanted, number, around or {})
        first = "own half" if wanted in ("auto", "pca") else wanted
        beam = beam_by(scan, block, [first] * halves, energy=number, following=theirs)
        beam = replace(beam, bad=mask_runs(block.mask))
    chosen = [wanted if wanted not in ("auto", "pca") else "own half"] * halves
    images = beam.basis((0, h))[0]
    bad = beam.mask((h, w))
    if mask is not None:
        bad = bad | mask
    ok = ~bad & (images[np.any(beam.weights != 0, axis=0)] > 0)[:1].all(axis=0)
    for k in np.flatnonzero(np.any(beam.weights == 1, axis=0)):
        ok &= images[k] > 0
    if not ok.any():
        raise XanesTomoError(
            f"{scan.energy_ev:g} eV: the flats show no beam; exclude this energy or choose other flats"
        )

    # Counts: read once; what follows works on means of their logarithm.
    logs = np.empty((len(index), hb, wb), dtype=np.float32)
    seen = CountsSeen.empty(len(index))
    counts_mean = seen.mean
    whole_mean: FloatArray = np.empty(len(index))
    stray: FloatArray = np.zeros(len(scan)) if block is not None else beam.stray
    blocked = None if block is None else block.blocked

    step = max(1, h // 256)
    some_ok = np.ascontiguousarray(ok[::step])

    def work(a: int, b: int) -> None:
        for j in range(a, b):
            frame = np.ascontiguousarray(scan.frames.read_rows([int(index[j])], 0, h)[0])
            if blocked is not None:
                stray[index[j]] = stray_counts(frame[None], blocked)[0]
            log_binned(frame, float(stray[index[j]]), FLOOR, ok, bin, logs[j])
            some = np.ascontiguousarray(frame[::step])
            counts_mean[j], whole_mean[j] = mean_counts(some, some_ok)
            seen.look(j, some)

    for start in range(0, len(index), _CHUNK):
        end = min(start + _CHUNK, len(index))
        in_threads(end - start, lambda a, b, s=start: work(s + a, s + b), threads=threads)  # type: ignore[misc]
        progress("absorbance", end, len(index))
    beam = replace(beam, stray=stray)
    seconds = exposures(scan.exposure_s)[index]

    def divided(by: Beam, read: F32) -> F32:
        rates, which = log_beams(read, by.weights[index], ok, bin, threads)
        out = np.empty_like(logs)
        shift = np.log(seconds).astype(np.float32)

        def part(a: int, b: int) -> None:
            for j in range(a, b):
                np.subtract(rates[which[j]], logs[j], out=out[j])
                out[j] += shift[j]

        in_threads(len(out), part, threads=threads)
        return out

    data = divided(beam, images)
    planes: Any = np.zeros((len(index), 3))
    residual: FloatArray = np.full(len(index), np.nan)
    fraction: FloatArray = np.ones(len(index))
    candidates: dict[str, tuple[float, ...]] = {}
    coarse = max(1, wb // 64)
    if air is not None:
        planes = np.asarray(air, dtype=float)[index]
    elif parameters.remove_air:
        region = _region(boxes, (hb // coarse, wb // coarse), bin * coarse)

        margin = parameters.air_margin_px * (wb // coarse) / 256

        def fitted(frames: F32) -> tuple[FloatArray, FloatArray, npt.NDArray[np.bool_]]:
            small = _coarse(frames, coarse)
            return fit_air(small, margin, region=region, order=parameters.air_order, threads=threads)

        planes, residual, masks = fitted(data)
        if block is not None and wanted in ("auto", "pca"):
            found = _choose(
                scan, block, beam, data, ok, bin, coarse, ~masks, index, chosen, wanted, number, margin, region, threads
            )  # fmt: skip
            candidates, chosen, better = found
            if better is not None:
                beam = replace(better, bad=beam.bad, stray=stray)
                data = divided(beam, beam.basis((0, h))[0])
                planes, residual, masks = fitted(data)
        else:
            candidates = {wanted: _by_half(residual, scan, index, halves)}
        if theirs is not None and block is not None and np.isfinite(residual).any():
            # Flats of another energy: their level is not this energy's; the air says by how much.
            beam = _scaled(beam, scan, index, planes, number)
            level = planes[:, 0].copy()
            data = divided(beam, beam.basis((0, h))[0])
            planes, residual, masks = fitted(data)
            notes.append(f"flats of another energy, scaled by {float(np.exp(-np.median(level))):.4g}")
        fraction = masks.mean(axis=(1, 2))

    def subtract(a: int, b: int) -> None:
        for j in range(a, b):
            data[j] -= plane(planes[j : j + 1], (hb, wb))[0]

    in_threads(len(data), subtract, threads=threads)
    fill_masked(data, np.asarray(np.isnan(data[:: max(1, len(data) // 4)]).all(axis=0)))
    variance = _typical_variance(scan, beam, counts_mean, seconds, index, ok, images) / bin**2
    return Normalised(
        data, variance, planes, residual, fraction, index, bin, (h, w), beam, tuple(chosen), candidates, whole_mean,
        tuple(notes) + (() if block is None else block.notes), seen,
    )  # fmt: skip


def _coarse(frames: F32, bin: int) -> F32:
    """Average the pixels that are numbers over ``bin x bin``; NaN where fewer than a third are."""
    if bin == 1:
        return frames
    n, h, w = frames.shape
    out = np.empty((n, h // bin, w // bin), dtype=np.float32)
    everywhere = np.ones((h, w), dtype=bool)
    in_threads(n, lambda a, b: mean_binned(frames[a:b], everywhere, bin, out[a:b]))
    return out


def _region(
    boxes: Sequence[tuple[float, float, float, float]], shape: tuple[int, int], bin: int
) -> npt.NDArray[np.bool_] | None:
    if not boxes:
        return None
    inside = np.zeros(shape, dtype=bool)
    for y0, y1, x0, x1 in boxes:
        inside[max(0, int(y0 / bin)) : math.ceil(y1 / bin), max(0, int(x0 / bin)) : math.ceil(x1 / bin)] = True
    return inside


def _blocks(
    scan: EnergyScan, parameters: AbsorbanceParameters, wanted: str, number: int, around: Mapping[int, EnergyScan]
) -> tuple[Block, tuple[int, EnergyScan, Block] | None, list[str]]:
    """Read the flats of this energy, and of another one where the policy asks for them."""
    theirs = None
    around = {e: s for e, s in around.items() if s.frames.frame_shape == scan.frames.frame_shape}
    try:
        block = load_block(scan, parameters)
    except XanesTomoError as error:
        nearest = neighbour_with_flats(number, around)
        if nearest is None:
            raise
        ev = around[nearest].energy_ev
        if wanted not in ("next energy", "time-weighted"):
            raise XanesTomoError(
                f"{error}: those of {ev:g} eV are the nearest; choose 'next energy' for {scan.energy_ev:g} eV to take "
                "them, scaled"
            ) from None
        other = load_block(around[nearest], parameters)
        clock = np.arange(len(scan), dtype=float)
        empty = replace(other, sets=(), clock=clock)
        return empty, (nearest, around[nearest], other), [f"no flats of its own: those of {ev:g} eV are used, scaled"]
    if wanted in ("next energy", "time-weighted"):
        following = number + 1 if number + 1 in around else number - 1 if wanted == "next energy" else None
        other_scan = around.get(following) if following is not None else None
        if other_scan is not None and any(s == "ok" for f in other_scan.flats for s in f.status):
            assert following is not None
            theirs = (following, other_scan, load_block(other_scan, parameters))
        elif wanted == "next energy":
            raise XanesTomoError(f"{scan.energy_ev:g} eV: the next energy has no readable flats; choose other flats")
    return block, theirs, []


def _scaled(beam: Beam, scan: EnergyScan, index: npt.NDArray[np.intp], planes: FloatArray, number: int) -> Beam:
    """Scale the flats of other energies so that the air of the projections they serve is clear in the middle."""
    mixing = beam.mixing.copy()
    for k in range(len(mixing)):
        sources = {int(beam.shots[s, 0]) for s in np.flatnonzero(mixing[k])}
        if all(beam.origins[o][0] == number for o in sources):
            continue
        mostly = beam.weights[index, k] > 0.5
        if mostly.any():
            mixing[k] *= math.exp(-float(np.median(planes[mostly, 0])))
    return replace(beam, mixing=mixing)


def _typical_variance(
    scan: EnergyScan,
    beam: Beam,
    counts_mean: FloatArray,
    seconds: FloatArray,
    index: npt.NDArray[np.intp],
    ok: npt.NDArray[np.bool_],
    images: F32,
) -> FloatArray:
    """(n,) variance of a recorded pixel of mean brightness, the flat's share included."""
    d = beam.detector
    # A frame with values that are no numbers is excluded by the screening; its variance is never used.
    counts_mean = np.where(np.isfinite(counts_mean), counts_mean, 1.0)
    signal = np.maximum(counts_mean - beam.stray[index], 1.0)
    level = max(float(images[0][ok].mean()), 1e-9)
    share = np.zeros(len(beam.mixing))
    for k in range(len(beam.mixing)):
        for s in np.flatnonzero(beam.mixing[k]):
            source, shot = beam.shots[s]
            t = float(exposures(beam.sources[int(source)].exposure_s)[shot])
            share[k] += (beam.mixing[k, s] / t) ** 2 * (d.read_variance + d.gain * level * t)
    flat = (beam.weights[index] ** 2) @ share / level**2
    return np.asarray((d.read_variance + d.gain * np.maximum(counts_mean, 1.0)) / signal**2 + flat)


def _by_half(residual: FloatArray, scan: EnergyScan, index: npt.NDArray[np.intp], halves: int) -> tuple[float, ...]:
    """Median air residual of every half; NaN where there is none."""
    out = []
    for k in range(halves):
        r = residual[np.asarray(scan.half)[index] == k]
        out.append(float(np.median(r[np.isfinite(r)])) if np.isfinite(r).any() else float("nan"))
    return tuple(out)


def _choose(
    scan: EnergyScan,
    block: Block,
    beam: Beam,
    data: F32,
    ok: npt.NDArray[np.bool_],
    bin: int,
    coarse: int,
    air: npt.NDArray[np.bool_],
    index: npt.NDArray[np.intp],
    chosen: list[str],
    wanted: str,
    number: int,
    margin_px: float,
    region: npt.NDArray[np.bool_] | None,
    threads: int | None,
) -> tuple[dict[str, tuple[float, ...]], list[str], Beam | None]:
    """Compare flats of the same energy by what they leave in the air, on coarse frames.

    Returns
    -------
    candidates : dict of str to tuple of float
        Median residual of every half.
    chosen : list of str
        For every half: its own unless others are clearly better.
    beam : Beam or None
        None where it is the one given.
    """
    halves = len(chosen)
    half = np.asarray(scan.half)[index]
    small = _coarse(data, coarse)
    n, shape = len(small), small.shape[1:]
    flat = np.nan_to_num(small).reshape(n, -1).astype(np.float64)
    known = np.isfinite(small).reshape(n, -1)
    keep = air.reshape(n, -1) & known
    design = terms(shape, 3).reshape(3, -1).T
    # Few projections are enough to judge by.
    pick = np.unique(np.concatenate([_spaced(np.flatnonzero(half == k), 12) for k in range(halves)]))
    tried = {"own half": flat[pick]}
    # Mean of ln(rate) of every set per coarse pixel; a mixture of them is close enough to judge by.
    logs = []
    for s in block.sets:
        out = np.empty(data.shape[1:], dtype=np.float32)
        log_binned(np.maximum(s.rate, 1e-3), 0.0, 1e-3, ok, bin, out)
        logs.append(np.nan_to_num(_coarse(out[None], coarse)[0]).ravel().astype(np.float64))
    options: dict[str, Beam] = {}
    if len(block.sets) > 1 and wanted == "auto":
        for name in (*(f"half {s.number + 1}" for s in block.sets), "time-weighted"):
            options[name] = beam_by(scan, block, [name] * halves, energy=number)
        numbers = [s.number for s in block.sets]

        def log_rate(by: Beam) -> FloatArray:
            table = np.stack([logs[numbers.index(origin[1])] for origin in by.origins])
            return np.asarray(by.weights[index] @ table)

        own = log_rate(beam)
        for name, option in options.items():
            tried[name] = (flat + log_rate(option) - own)[pick]
    parts = _components(block, small.shape[1:], ok, beam, number)
    if parts is not None:
        mixing, shots, images_small = parts
        mean = images_small[0]
        own_small = np.stack(logs)[[[s.number for s in block.sets].index(o[1]) for o in beam.origins]]
        base = flat + mean - beam.weights[index] @ own_small
        wide = np.concatenate([design, images_small[1:].T], axis=1)
        c = fit_surface(base, keep, wide, threads=threads)
        amount = -c[:, 3:]
        tried["pca"] = (base + amount @ images_small[1:])[pick]
        weights = np.zeros((len(scan), len(mixing)))
        weights[:, 0] = 1
        weights[index, 1:] = amount
        sources = tuple(scan.flats[s.number] for s in block.sets)
        origins = tuple((number, s.number) for s in block.sets)
        stray = np.concatenate([s.stray for s in block.sets])
        options["pca"] = replace(
            beam, sources=sources, origins=origins, shots=shots, mixing=mixing, weights=weights, shot_stray=stray
        )
    # Air is what is air with any of them: the pattern that wrong flats leave must not pass for object.
    seen = np.zeros((len(pick), flat.shape[1]), dtype=bool)
    for frames in tried.values():
        shown = np.where(known[pick], frames, np.nan).reshape(len(pick), *shape).astype(np.float32)
        seen |= ~fit_air(shown, margin_px, region=region, threads=threads)[2].reshape(len(pick), -1)
    seen &= known[pick]
    candidates = {}
    for name, frames in tried.items():
        rest = np.where(seen, frames - fit_surface(frames, seen, design, threads=threads) @ design.T, 0)
        count = seen.sum(axis=1)
        sd = np.where(count > 0, np.sqrt((rest**2).sum(axis=1) / np.maximum(count, 1)), np.nan)
        candidates[name] = _by_half(sd, scan, index[pick], halves)
    counts = max(float(np.mean([s.rate[ok].mean() * s.seconds.mean() for s in block.sets])), 1.0)
    noise = 0.8 * float(block.detector.variance(counts)) / counts**2 / (bin * coarse) ** 2
    names = []
    for k in range(halves):
        names.append("own half")
        if wanted == "pca" and "pca" in options:
            names[k] = "pca"
            continue
        for name, values in candidates.items():
            if not (half == k).any() or name == f"half {k + 1}":
                continue
            best, limit = candidates[names[k]][k], 1.0 if names[k] != "own half" else _CLEARLY
            # What photons and camera leave in the air no flat can take away.
            if values[k] < 0.98 * best and values[k] ** 2 - noise < limit**2 * (best**2 - noise):
                names[k] = name
    if all(name == "own half" for name in names):
        return candidates, names, None
    return candidates, names, _joined([beam if m == "own half" else options[m] for m in names], scan)


def _spaced(numbers: npt.NDArray[np.intp], most: int) -> npt.NDArray[np.intp]:
    """Return at most `most` of the numbers, evenly spaced."""
    return numbers[np.unique(np.linspace(0, len(numbers) - 1, most).astype(int))] if len(numbers) > most else numbers


def _joined(beams: Sequence[Beam], scan: EnergyScan) -> Beam:
    """Take beam k for the projections of half k."""
    if all(b is beams[0] for b in beams):
        return beams[0]
    sources: list[FlatSet] = []
    origins: list[tuple[int, int]] = []
    shots, stray, weights = [], [], []
    sizes = [b.mixing.shape for b in beams]
    mixing = np.zeros((sum(k for k, _ in sizes), sum(s for _, s in sizes)))
    at_k = at_s = 0
    half = np.clip(np.asarray(scan.half), 0, len(beams) - 1)
    for number, b in enumerate(beams):
        shots.append(b.shots + np.array([len(sources), 0]))
        sources += list(b.sources)
        origins += list(b.origins)
        stray.append(b.shot_stray)
        k, s = b.mixing.shape
        mixing[at_k : at_k + k, at_s : at_s + s] = b.mixing
        at_k, at_s = at_k + k, at_s + s
        weights.append(np.where((half == number)[:, None], b.weights, 0))
    return replace(
        beams[0], sources=tuple(sources), origins=tuple(origins), shots=np.concatenate(shots), mixing=mixing,
        weights=np.concatenate(weights, axis=1), shot_stray=np.concatenate(stray),
    )  # fmt: skip


def _components(
    block: Block, shape: tuple[int, int], ok: npt.NDArray[np.bool_], beam: Beam, number: int
) -> tuple[FloatArray, npt.NDArray[np.intp], FloatArray] | None:
    """Principal components of all shots of an energy (Van Nieuwenhove et al. 2015, doi 10.1364/OE.23.027975).

    Returns
    -------
    (mixing, shots, images) or None
        Mean and components as mixtures of the shots; `images` (k, p) their logarithms on the coarse grid: that of the
        mean, then the change per unit of each component. None where no component stands out of the noise.
    """
    shots = [(a, int(b)) for a, s in enumerate(block.sets) for b in s.shots]
    if len(shots) < 4:
        return None
    bin = ok.shape[1] // shape[1]
    rows = []
    for s in block.sets:
        for frame, t, stray in zip(s.counts, s.seconds, s.stray, strict=True):
            part = np.empty((1, ok.shape[0] // bin, ok.shape[1] // bin), dtype=np.float32)
            mean_binned(frame[None], ok, bin, part)
            rows.append((part[0, : shape[0], : shape[1]].ravel() - np.float32(stray)) / np.float32(t))
    rate = np.stack(rows).astype(np.float64)
    known = np.isfinite(rate).all(axis=0) & (rate > 0).all(axis=0)
    if known.sum() < 100:
        return None
    level = rate[:, known].mean(axis=1)
    logs = np.zeros_like(rate)
    logs[:, known] = np.log(rate[:, known] / level[:, None])
    mean = logs.mean(axis=0)
    change = logs - mean
    design = terms(shape, 3).reshape(3, -1).T
    keep = np.broadcast_to(known, change.shape)
    detail = np.where(known, change - fit_surface(change, keep, design) @ design.T, 0)
    u, size, _ = np.linalg.svd(detail - detail.mean(axis=0), full_matrices=False)
    d = block.detector
    t = float(np.mean(np.concatenate([s.seconds for s in block.sets])))
    counts = np.maximum(rate.mean(axis=0)[known] * t, 1.0)
    noise = math.sqrt(float(np.mean(d.variance(counts) / counts**2)) / bin**2)
    edge = noise * (math.sqrt(int(known.sum())) + math.sqrt(len(shots)))
    number_of = min(_COMPONENTS, int(np.sum(size > 1.15 * edge)))
    if number_of == 0:
        return None
    typical = float(level.mean())
    mixing = np.zeros((1 + number_of, len(shots)))
    mixing[0] = typical / level / len(shots)
    images = np.zeros((1 + number_of, rate.shape[1]))
    images[0] = mean + math.log(typical)
    for k in range(number_of):
        v = u[:, k] - u[:, k].mean()
        mixing[1 + k] = v * typical / level
        images[1 + k] = v @ change
    return mixing, np.array(shots, dtype=np.intp), images
