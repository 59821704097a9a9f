"""The bare beam behind every projection: flats of a block, and the policies by which they are used.

Whatever the policy, the beam of a projection is a mixture of flat shots. A `Beam` holds the few numbers that say which:
estimation and maps divide by the same thing, a slab reads only its own rows of the flats, and nothing is kept on disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from .detector import (
    Detector,
    bad_pixels,
    blocked_pixels,
    estimate_detector,
    mask_from_runs,
    stray_counts,
)
from .model import EnergyScan, FlatSet, FloatArray, XanesTomoError
from .parallel import in_threads, share
from .recipe import AbsorbanceParameters

__all__ = [
    "Beam",
    "Block",
    "Flat",
    "beam_by",
    "exposures",
    "flat_for",
    "load_block",
    "mean_flat",
    "neighbour_with_flats",
    "scan_detector",
]

F32 = npt.NDArray[np.float32]
_STRIP = 256  # rows of the flats that are read together


@dataclass(frozen=True)
class Flat:
    """The bare beam of one flat set.

    Attributes
    ----------
    rate : (y, x) array
        Counts per second.
    shots : int
        Number of shots averaged.
    exposure_s : float
        Mean exposure of a shot, seconds.
    """

    rate: F32
    shots: int
    exposure_s: float


def exposures(values: npt.ArrayLike) -> FloatArray:
    """Return exposures in seconds; unknown ones (NaN, zero, negative) are the median of the others, or 1."""
    t = np.array(values, dtype=float)
    known = np.isfinite(t) & (t > 0)
    t[~known] = float(np.median(t[known])) if known.any() else 1.0
    return t


def mean_flat(flats: FlatSet, rows: tuple[int, int] | None = None) -> Flat | None:
    """Average the readable shots of a flat set, each divided by its exposure.

    Parameters
    ----------
    flats : FlatSet
    rows : (int, int), optional
        First and last + 1 detector row; all by default.

    Returns
    -------
    Flat or None
        None when no shot can be read.
    """
    good = [i for i, s in enumerate(flats.status) if s == "ok"]
    if not good:
        return None
    y0, y1 = rows or (0, flats.frames.frame_shape[0])
    seconds = exposures(flats.exposure_s)
    total = np.zeros((y1 - y0, flats.frames.frame_shape[1]), dtype=np.float64)
    for i in good:
        total += flats.frames.read_rows([i], y0, y1)[0] / seconds[i]
    rate = (total / len(good)).astype(np.float32)
    return Flat(rate, len(good), float(np.mean(seconds[good])))


def flat_for(scan: EnergyScan, half: int) -> int:
    """Return the flat set used for the projections of `half`: its own, else the nearest one with a shot."""
    usable = [k for k, f in enumerate(scan.flats) if any(s == "ok" for s in f.status)]
    if not usable:
        raise XanesTomoError(
            f"{scan.energy_ev:g} eV: expected at least one readable flat, got none; exclude this energy or choose the "
            "flats of another one for it"
        )
    return min(usable, key=lambda k: (abs(k - half), k))


def neighbour_with_flats(energy: int, around: Mapping[int, EnergyScan]) -> int | None:
    """Return the number of the energy nearest to `energy` (in the order of acquisition) that has a readable flat."""
    usable = [e for e, s in around.items() if e != energy and any(t == "ok" for f in s.flats for t in f.status)]
    return min(usable, key=lambda e: (abs(e - energy), -e)) if usable else None


# ------------------------------------------------------------------------------------------- the flats of one block


@dataclass(frozen=True)
class FlatShots:
    """The shots of one flat set that can be used, in memory.

    Attributes
    ----------
    number : int
        Of the set within its energy.
    shots : (s,) int array
        Numbers within the set.
    counts : (s, y, x) array
        As recorded.
    seconds : (s,) array
        Exposures.
    stray : (s,) array
        Counts behind blocked rows; 0 where nothing shows them.
    clock : float
        When the set was taken, on the clock of `Block.clock`.
    """

    number: int
    shots: npt.NDArray[np.intp]
    counts: npt.NDArray[Any]
    seconds: FloatArray
    stray: FloatArray
    clock: float

    @cached_property
    def rate(self) -> F32:
        """(y, x) mean of the shots, counts per second, stray light taken out."""
        out: F32 = np.empty(self.counts.shape[1:], dtype=np.float32)

        def rows(a: int, b: int) -> None:
            total = np.zeros((b - a, self.counts.shape[2]), dtype=np.float64)
            for frame, t, s in zip(self.counts[:, a:b], self.seconds, self.stray, strict=True):
                total += (frame.astype(np.float32) - np.float32(s)) / t
            out[a:b] = total / len(self.counts)

        in_threads(len(out), rows)
        return out


@dataclass(frozen=True)
class Block:
    """What the flats of one energy say about beam and camera.

    Attributes
    ----------
    sets : tuple of FlatShots
        Sets with at least one usable shot.
    detector : Detector
    mask : (y, x) bool array
        Pixels found to be bad.
    blocked : (y, x) bool array or None
        Pixels behind blocked rows, where stray light shows.
    clock : (n,) array
        When every projection was taken: seconds, or its number where no times are known.
    notes : tuple of str
        Shots that were left out, and why.
    """

    sets: tuple[FlatShots, ...]
    detector: Detector
    mask: npt.NDArray[np.bool_]
    blocked: npt.NDArray[np.bool_] | None
    clock: FloatArray
    notes: tuple[str, ...] = ()


def _step(frame: npt.NDArray[Any]) -> int:
    """Every how many rows are enough for the mean of a frame."""
    return max(1, len(frame) // 256)


def _usable_shots(scan: EnergyScan, k: int, flats: FlatSet) -> tuple[list[int], list[npt.NDArray[Any]], list[str]]:
    """Read a set; return the numbers and counts of shots that show a beam, and why the others do not."""
    good: list[int] = []
    counts: list[npt.NDArray[Any]] = []
    notes = []
    rows, columns = scan.frames.frame_shape
    if flats.frames.frame_shape != (rows, columns):
        shape = flats.frames.frame_shape
        return [], [], [f"flats {k + 1}: {shape[0]} x {shape[1]} px, projections {rows} x {columns}: not used"]
    there = [i for i, status in enumerate(flats.status) if status == "ok"]
    seen: dict[int, tuple[npt.NDArray[Any], float, float]] = {}

    def look(i: int) -> None:
        frame = flats.frames.read_rows([i], 0, rows)[0]
        seen[i] = frame, float(frame.max()), float(np.mean(frame[:: _step(frame)], dtype=np.float64))

    share(there, look)
    for i in there:
        frame, top, mean = seen[i]
        full = frame.dtype.kind in "ui" and (int(top) + 1) & int(top) == 0 and top >= 255
        if not np.isfinite(mean) or not mean > 0 or not top > 0:
            notes.append(f"flats {k + 1}, shot {i + 1}: no beam in it")
        elif full and float(np.mean(frame == frame.max())) > 0.005:
            notes.append(f"flats {k + 1}, shot {i + 1}: saturated at {top:g} counts")
        else:
            good.append(i)
            counts.append(frame)
    if len(good) >= 3:
        seconds = exposures(flats.exposure_s)
        level = np.array(
            [float(np.mean(c[:: _step(c)], dtype=np.float64)) / seconds[i] for i, c in zip(good, counts, strict=True)]
        )
        odd = np.abs(level / np.median(level) - 1) > 0.3
        notes += [
            f"flats {k + 1}, shot {i + 1}: {r:.2f} times as bright as the others"
            for i, r, bad in zip(good, level / np.median(level), odd, strict=True)
            if bad
        ]
        counts = [c for c, bad in zip(counts, odd, strict=True) if not bad]
        good = [i for i, bad in zip(good, odd, strict=True) if not bad]
    return good, counts, notes


def _clock(scan: EnergyScan) -> FloatArray:
    """(n,) times of the projections where most are known, else their numbers."""
    t = np.asarray(scan.time_s, dtype=float)
    number = np.arange(len(scan), dtype=float)
    known = np.isfinite(t)
    if known.sum() < max(2, 0.5 * len(t)) or np.any(np.diff(t[known]) < 0):
        return number
    return np.asarray(np.interp(number, number[known], t[known]))


def _set_clock(scan: EnergyScan, k: int, clock: FloatArray) -> float:
    """When set `k` was taken: by its own times, else just before the first projection that follows it."""
    times = np.asarray(scan.flats[k].time_s, dtype=float)
    if clock[-1] > len(clock) and np.isfinite(times).any():
        return float(np.nanmean(times))
    later = np.flatnonzero(np.asarray(scan.half) >= k)
    step = float(np.median(np.diff(clock))) if len(clock) > 1 else 1.0
    return float(clock[later[0]] - step / 2) if len(later) else float(clock[-1] + step / 2)


def _mean_frame(stacks: Sequence[npt.NDArray[Any]]) -> FloatArray:
    """(y, x) mean of the means of stacks."""
    out: FloatArray = np.empty(stacks[0].shape[1:])

    def rows(a: int, b: int) -> None:
        out[a:b] = np.mean([s[:, a:b].mean(axis=0) for s in stacks], axis=0)

    in_threads(len(out), rows)
    return out


def load_block(scan: EnergyScan, parameters: AbsorbanceParameters) -> Block:
    """Read the flats of one energy and find out what they say about the camera.

    Raises
    ------
    XanesTomoError
        No flat can be used.
    """
    notes: list[str] = []
    found: list[tuple[int, list[int], list[npt.NDArray[Any]]]] = []
    for k, flats in enumerate(scan.flats):
        good, counts, why = _usable_shots(scan, k, flats)
        notes += why
        if good:
            found.append((k, good, counts))
    if not found:
        readable = sum(s == "ok" for f in scan.flats for s in f.status)
        why_not = f" ({notes[0]})" if notes else ""
        raise XanesTomoError(
            f"{scan.energy_ev:g} eV: expected at least one usable flat, got none of {readable} readable ones{why_not}; "
            "exclude this energy or choose the flats of another one for it"
        )
    stacks = [np.stack(c) for _, _, c in found]
    detector = estimate_detector(*stacks)
    blocked = None
    if parameters.stray_light == "blocked rows":
        blocked = blocked_pixels(_mean_frame(stacks))
    clock = _clock(scan)
    sets = []
    for (k, good, _), stack in zip(found, stacks, strict=True):
        stray: FloatArray = np.zeros(len(good))
        if blocked is not None:
            stray = stray_counts(stack, blocked)
        seconds = exposures(scan.flats[k].exposure_s)[good]
        sets.append(FlatShots(k, np.array(good), stack, seconds, stray, _set_clock(scan, k, clock)))
    mask = np.zeros(scan.frames.frame_shape, dtype=bool)
    if parameters.mask_bad_pixels:
        rates = [s.rate for s in sets]
        variances = [
            np.asarray(detector.variance(np.maximum(r, 0) * float(s.seconds.mean())), np.float32)
            / np.float32(s.seconds.mean() ** 2 * len(s.shots))
            for r, s in zip(rates, sets, strict=True)
        ]
        mask = bad_pixels(rates, variances, dark_below=parameters.dark_below, dust_depth=parameters.dust_depth)
        if mask.mean() > 0.5:
            notes.append("more than half of the camera seemed bad; nothing was masked")
            mask[:] = False
    return Block(tuple(sets), detector, mask, blocked, clock, tuple(notes))


def scan_detector(scan: EnergyScan) -> Detector:
    """Estimate the camera's noise from all flats of an energy."""
    stacks = [c for k, f in enumerate(scan.flats) if (c := _usable_shots(scan, k, f)[1])]
    return estimate_detector(*(np.stack(c) for c in stacks))


# ------------------------------------------------------------------------------------------------------- the beam


@dataclass(frozen=True)
class Beam:
    """The bare beam behind every projection of one energy: ``rate[i] = sum_k weights[i, k] * basis[k]``.

    Attributes
    ----------
    sources : tuple of FlatSet
        The flat sets that take part.
    origins : tuple of (int, int)
        Energy number and number within that energy of every source.
    shots : (s, 2) int array
        Source and shot of every column of `mixing`.
    mixing : (k, s) array
        ``basis[k] = sum_s mixing[k, s] * (counts[s] - shot_stray[s]) / exposure[s]``, counts per second.
    weights : (n, k) array
        Of every planned projection.
    stray : (n,) array
        Counts taken from every pixel of a projection before anything else.
    shot_stray : (s,) array
        The same for the flat shots.
    bad : (m, 2) int array
        Pixels of the camera not to be trusted; see `detector.mask_runs`.
    detector : Detector
    """

    sources: tuple[FlatSet, ...]
    origins: tuple[tuple[int, int], ...]
    shots: npt.NDArray[np.intp]
    mixing: FloatArray
    weights: FloatArray
    stray: FloatArray
    shot_stray: FloatArray
    bad: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int32))
    detector: Detector = field(default_factory=lambda: Detector(1.0, 0.0, "none"))

    def mask(self, shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
        """Return the (y, x) bool mask of bad pixels."""
        return mask_from_runs(self.bad, shape)

    def basis(self, rows: tuple[int, int], *, variance: bool = False) -> tuple[F32, F32 | None]:
        """Read the basis images, (k, rows, x) counts per second, and if wanted their variance."""
        columns = self.sources[0].frames.frame_shape[1]
        out = np.zeros((len(self.mixing), rows[1] - rows[0], columns), dtype=np.float32)
        noise = np.zeros_like(out) if variance else None

        def add(first: int, end: int) -> None:
            a, b = rows[0] + first, rows[0] + end
            for s, (source, shot) in enumerate(self.shots):
                flats = self.sources[int(source)]
                t = float(exposures(flats.exposure_s)[shot])
                frame = flats.frames.read_rows([int(shot)], a, b)[0].astype(np.float32)
                for k in np.flatnonzero(self.mixing[:, s]):
                    factor = np.float32(self.mixing[k, s] / t)
                    out[k, first:end] += factor * (frame - np.float32(self.shot_stray[s]))
                    if noise is not None:
                        noise[k, first:end] += factor**2 * self.detector.variance(frame).astype(np.float32)

        # Strips of rows: a whole frame would not stay in the cache, and files are opened once a strip.
        strips = range(0, rows[1] - rows[0], _STRIP)
        share(strips, lambda first: add(first, min(first + _STRIP, rows[1] - rows[0])))
        return out, noise


def beam_by(
    scan: EnergyScan,
    block: Block,
    use: Sequence[str],
    *,
    energy: int = 0,
    following: tuple[int, EnergyScan, Block] | None = None,
) -> Beam:
    """Return the beam by a policy for every half; stray light of the projections is left at zero.

    Parameters
    ----------
    scan : EnergyScan
    block : Block
        Flats of this energy; of `following` where it has none.
    use : sequence of str
        Policy of every half: ``own half``, ``nearest in time``, ``time-weighted``, ``next energy`` or ``half N``.
    energy : int
        Number of this energy.
    following : (int, EnergyScan, Block), optional
        The energy whose flats come next (or nearest), with its number.
    """
    own = list(block.sets)
    level = {s.number: _level(s) for s in own}
    # energy, set, source, shots, clock, scale
    rates = [(energy, s.number, scan.flats[s.number], s, s.clock, 1.0) for s in own]
    first_of_next = len(rates)
    if following is not None:
        number, other, theirs = following
        for s in theirs.sets:
            clock = (
                s.clock if _same_clock(block.clock, theirs.clock) else s.clock + len(scan) * np.sign(number - energy)
            )
            scale = level[own[-1].number] / _level(s) if own else 1.0
            rates.append((number, s.number, other.flats[s.number], s, float(clock), scale))
    clocks = np.array([r[4] for r in rates])
    weights = np.zeros((len(scan), len(rates)))
    half = np.asarray(scan.half)
    for i in range(len(scan)):
        h = int(half[i])
        policy = use[min(max(h, 0), len(use) - 1)]
        weights[i] = _weights(policy, h, float(block.clock[i]), own, clocks, first_of_next, scan)
    needed = np.flatnonzero(np.any(weights != 0, axis=0))
    columns: list[tuple[int, int]] = []
    mixing_rows: list[tuple[int, int, float]] = []
    stray: list[float] = []
    for source, r in enumerate(needed):
        shots = rates[r][3]
        start = len(columns)
        columns += [(source, int(shot)) for shot in shots.shots]
        stray += shots.stray.tolist()
        mixing_rows.append((start, len(columns), rates[r][5] / len(shots.shots)))
    mixing = np.zeros((len(needed), len(columns)))
    for k, (a, b, value) in enumerate(mixing_rows):
        mixing[k, a:b] = value
    return Beam(
        tuple(rates[r][2] for r in needed),
        tuple((rates[r][0], rates[r][1]) for r in needed),
        np.array(columns, dtype=np.intp).reshape(-1, 2),
        mixing,
        weights[:, needed],
        np.zeros(len(scan)),
        np.array(stray),
        detector=block.detector,
    )


def _level(s: FlatShots) -> float:
    """Mean rate of a set, counts per second."""
    means = [float(np.mean(c[:: _step(c)], dtype=np.float64)) for c in s.counts]
    return float(np.mean((np.array(means) - s.stray) / s.seconds))


def _same_clock(a: FloatArray, b: FloatArray) -> bool:
    return bool(len(a) and len(b) and a[-1] > len(a) and b[-1] > len(b))


def _weights(
    policy: str, half: int, now: float, own: list[FlatShots], clocks: FloatArray, first_of_next: int, scan: EnergyScan
) -> FloatArray:
    """Weights of all sets for one projection."""
    out = np.zeros(len(clocks))
    numbers = np.array([s.number for s in own])
    if policy == "next energy" or not own:
        if first_of_next >= len(clocks):
            raise XanesTomoError(f"{scan.energy_ev:g} eV: no other energy has flats; choose other flats for it")
        out[first_of_next + int(np.argmin(np.abs(clocks[first_of_next:] - now)))] = 1
    elif policy == "nearest in time":
        out[int(np.argmin(np.abs(clocks[: len(own)] - now)))] = 1
    elif policy == "time-weighted":
        before = np.flatnonzero(clocks <= now)
        after = np.flatnonzero(clocks > now)
        if len(before) and len(after):
            a, b = before[np.argmax(clocks[before])], after[np.argmin(clocks[after])]
            part = (now - clocks[a]) / (clocks[b] - clocks[a])
            out[a], out[b] = 1 - part, part
        else:
            out[int(np.argmin(np.abs(clocks - now)))] = 1
    else:
        wanted = int(policy.removeprefix("half ")) - 1 if policy.startswith("half ") else half
        at = int(np.argmin(np.abs(numbers - wanted)))
        if policy.startswith("half ") and numbers[at] != wanted:
            raise XanesTomoError(f"{scan.energy_ev:g} eV: asked for the flats of {policy}, which cannot be used")
        out[at] = 1
    return out
