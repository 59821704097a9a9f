"""Frames that are there twice: copies of a file under another name, and second files for an angle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from napari_xanes_tomo.model import XanesTomoError

from .planned import Block, Folder, Frame, acquired_as
from .script import NAN
from .xrm import XrmFrames, XrmHeader, shown

__all__ = ["flag_copies", "flag_same_angle"]

_PROBE_ROWS = 4  # rows that tell most frames apart; only where they are equal is the whole frame read
_MOST_ALIKE = 16  # more files that say the same of when they were taken have a clock that stands still


def flag_copies(frames: Sequence[Frame], folder: Folder) -> None:
    """Flag frames that are copies of another one, all but the one that belongs where it is.

    Two exposures never begin and end at the same moment. Only files that say they did (or that say nothing of it and
    agree in all else) are looked into, and only frames of equal pixels are called copies.
    """
    alike: dict[tuple[object, ...], list[Frame]] = {}
    for frame in frames:
        header = folder.headers.get(frame.path)
        if frame.status == "ok" and isinstance(header, XrmHeader) and header.n_images == 1 and frame.number == 1:
            alike.setdefault(_moment(header), []).append(frame)
    for group in alike.values():
        if not 2 <= len(group) <= _MOST_ALIKE:
            continue
        for some in _equal(group, whole=False):
            for copies in _equal(some, whole=True):
                own = min(range(len(copies)), key=lambda k: (*_strange(copies[k], folder), k))
                for k, frame in enumerate(copies):
                    if k != own:
                        frame.status = "excluded:duplicate"
                        frame.header_theta = NAN  # that of the other
                        frame.note = f"is a copy of {copies[own].name} (same pixels, same time of exposure): left out"


def _moment(header: XrmHeader) -> tuple[object, ...]:
    """When and how a frame was taken, as its header tells it."""
    values = (
        header.modified_s, header.times_s[0], header.angles_deg[0], header.exposures_s[0], header.energies_ev[0],
        header.x_um[0], header.y_um[0], header.z_um[0], header.ion_chamber[0],
    )  # fmt: skip
    return (header.size, header.shape, header.dtype.str, *(v if v == v else None for v in values))


def _equal(frames: Sequence[Frame], *, whole: bool) -> list[list[Frame]]:
    """Return the groups of frames with equal pixels; a frame without any structure is equal to none."""
    found: dict[bytes, list[Frame]] = {}
    for frame in frames:
        assert frame.dtype is not None
        source = XrmFrames((frame.path,), (frame.number,), frame.shape, frame.dtype)
        height = frame.shape[0]
        first = 0 if whole else max(0, height // 2 - _PROBE_ROWS // 2)
        try:
            pixels = source.read_rows((0,), first, height if whole else min(height, first + _PROBE_ROWS))
        except XanesTomoError:
            continue  # whoever reads it next says so
        if pixels.size and not np.all(pixels == pixels.flat[0]):
            found.setdefault(blake2b(pixels.tobytes(), digest_size=16).digest(), []).append(frame)
    return [group for group in found.values() if len(group) > 1]


def _strange(frame: Frame, folder: Folder) -> tuple[bool, float]:
    """How little a frame looks as if it belonged where it is: by its name, then by its angle."""
    acquired = acquired_as(folder.headers[frame.path])
    off = abs((frame.header_theta - frame.theta + 180) % 360 - 180)
    return bool(acquired) and acquired != shown(frame.name).lower(), round(off, 2) if off == off else 0.0


def flag_same_angle(block: Block, few_angles: int) -> None:
    """Flag the further files of an angle that has more of them than the other angles of a tomogram have.

    Several exposures an angle, as planned for all of them, are no repeats. The first readable one stays.
    """
    projections = [f for f in block.frames if f.kind == "projection" and f.status == "ok"]
    theta = np.array([f.theta if f.theta == f.theta else f.header_theta for f in projections])
    known = np.flatnonzero(np.isfinite(theta))
    if len(known) < few_angles:
        return
    order = known[np.argsort(theta[known], kind="stable")]
    gaps = np.diff(theta[order])
    steps = gaps[gaps > 0.011]
    if len(steps) < few_angles - 1:
        return
    near = max(0.011, 0.2 * float(np.median(steps)))
    groups = np.split(order, np.flatnonzero(gaps > near) + 1)
    usual, angles = Counter(len(g) for g in groups).most_common(1)[0]
    if 2 * angles <= len(groups):
        return
    for group in groups:
        members = sorted(group.tolist())
        for k in members[usual:]:
            frame, first = projections[k], projections[members[0]]
            frame.status = "excluded:same-angle"
            frame.note = f"is a further file for {theta[k]:g} deg beside {first.name}: left out"
