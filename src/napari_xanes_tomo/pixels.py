"""Energies whose frames have other pixels than those of the others: another camera binning.

Where a pixel lies is said in an energy's own recorded pixels; what its magnification says of the optics is told apart
from what it says of the binning by `pixel_width`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .model import EnergyScan, Problem, Series

__all__ = ["pixel_width", "pixel_widths", "seen_as", "usual_scan", "with_known_pixels"]


def pixel_width(scan: EnergyScan, reference: EnergyScan) -> float:
    """Return how wide a recorded pixel is on the camera, in recorded pixels of `reference`: 2 at twice its binning."""
    return scan.binning / reference.binning if scan.binning > 0 and reference.binning > 0 else 1.0


def pixel_widths(series: Series, reference: int) -> npt.NDArray[np.float64]:
    """(energies,) `pixel_width` of every energy."""
    return np.array([pixel_width(s, series.scans[reference]) for s in series.scans])


def usual_scan(scans: Sequence[EnergyScan]) -> EnergyScan:
    """Return the first of the energies whose frames have the size that most have."""
    known = [s for s in scans if s.usable.any()] or list(scans)
    (shape, _), _ = Counter((s.frames.frame_shape, s.binning) for s in known).most_common(1)[0]
    return next(s for s in known if s.frames.frame_shape == shape)


def seen_as(frame: npt.NDArray[Any], shape: tuple[int, int], width: float) -> npt.NDArray[Any]:
    """Return a frame (y, x) of the same field in `shape` pixels that are `width` times as wide, a whole factor.

    The mean of the pixels that fall into one; of a mask, whether one of them is marked. A pixel fills all those that
    are finer. What lies outside the frame is 0.
    """
    if frame.shape == shape:
        return frame
    if width < 1:
        k = max(1, round(1 / width))
        return _about_middle(np.repeat(np.repeat(frame, k, axis=0), k, axis=1), shape)
    k = max(1, round(width))
    whole = _about_middle(frame, (shape[0] * k, shape[1] * k)).reshape(shape[0], k, shape[1], k)
    if frame.dtype == bool:
        return np.asarray(whole.any(axis=(1, 3)))
    mean = whole.mean(axis=(1, 3), dtype=np.float32)
    return np.asarray((np.rint(mean) if frame.dtype.kind in "ui" else mean).astype(frame.dtype))


def _about_middle(frame: npt.NDArray[Any], shape: tuple[int, int]) -> npt.NDArray[Any]:
    """Cut or fill a frame about its middle."""
    out = np.zeros(shape, dtype=frame.dtype)
    into, of = [], []
    for have, want in zip(frame.shape, shape, strict=True):
        size, cut, pad = min(have, want), max(0, (have - want) // 2), max(0, (want - have) // 2)
        into.append(slice(pad, pad + size))
        of.append(slice(cut, cut + size))
    out[tuple(into)] = frame[tuple(of)]
    return out


def with_known_pixels(series: Series, *, images: bool = False) -> Series:
    """Return a series in which the binning says how wide the pixels of every energy that can be used are.

    An energy with frames of another size than most can be used when they show the same field with a whole number of
    times as few or as many pixels, and the binning says so; else its own pixel size may. Any other is left out, with
    the reason among the problems.

    Parameters
    ----------
    series : Series
    images : bool
        Nothing but single images: those of another size are left out.
    """
    usable = [s for s in series.scans if s.usable.any() and not s.gridded]
    if len({s.frames.frame_shape for s in usable}) < 2:
        return series
    usual = usual_scan(usable)
    scans, problems = list(series.scans), list(series.problems)
    for e, scan in enumerate(series.scans):
        if scan.gridded or not scan.usable.any() or scan.frames.frame_shape == usual.frames.frame_shape:
            continue
        width = _width(scan, usual, images)
        if isinstance(width, str):
            scans[e] = replace(scan, status=tuple(f"excluded:{width}" if s == "ok" else s for s in scan.status))
            problems.append(Problem("error", "other-size", f"{scan.energy_ev:g} eV: {width}", "", scan.energy_ev))
            continue
        if scan.binning != width * usual.binning:  # what the files do not tell their frames do
            by_law = scan.pixel_size_nm != scan.header_pixel_size_nm
            times = round(1 / width) if width < 1 and usual.binning % round(1 / width) else 1
            if times > 1:
                scans = [replace(s, binning=s.binning * times) for s in scans]
            size = scan.pixel_size_nm * (width if by_law else 1.0)
            scans[e] = replace(scan, binning=round(width * times * usual.binning), pixel_size_nm=size)
            usual = usual_scan([s for s in scans if s.frames.frame_shape == usual.frames.frame_shape])
        if not any(p.code == "other-binning" and p.energy_ev == scan.energy_ev for p in problems):
            what = (
                f"the frames at {scan.energy_ev:g} eV have {_size(scan)} pixels, {width:g} times as wide as those "
                f"of the other energies ({_size(usual)}): registered and mapped with them"
            )
            problems.append(Problem("info", "other-binning", what, "", scan.energy_ev))
    return replace(series, scans=tuple(scans), problems=tuple(problems))


def _size(scan: EnergyScan) -> str:
    rows, columns = scan.frames.frame_shape
    return f"{rows} x {columns}"


def _width(scan: EnergyScan, usual: EnergyScan, images: bool) -> float | str:
    """Return how wide the pixels of an energy with frames of another size are, or why that is not known."""
    what = f"expected frames of {_size(usual)} pixels as at the other energies, got {_size(scan)}"
    if scan.given or images:
        return f"{what}; bring them to one pixel size"
    width = None
    for k in range(2, 17):
        for many, few, w in ((usual, scan, float(k)), (scan, usual, 1.0 / k)):
            if all(abs(a - k * b) < k for a, b in zip(many.frames.frame_shape, few.frames.frame_shape, strict=True)):
                width = w
    if width is None:
        return f"{what}, not the same field in pixels a whole number of times as wide; bring them to one binning"
    if pixel_width(scan, usual) == width:
        return width
    told = scan.header_pixel_size_nm / usual.header_pixel_size_nm
    if pixel_width(scan, usual) == 1 and told > 0 and abs(math.log(told / width)) < abs(math.log(width)) / 2:
        return width
    return f"{what} at a binning of {scan.binning} (theirs {usual.binning}): how large a pixel is cannot be told"
