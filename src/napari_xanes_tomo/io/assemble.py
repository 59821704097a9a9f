"""From planned frames and their headers to a `Series`: every frame judged, angles, energies and flats assigned."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from napari_xanes_tomo.model import EnergyScan, FlatSet, Series
from napari_xanes_tomo.pixels import with_known_pixels
from napari_xanes_tomo.recipe import ScanParameters

from .planned import WHY, Block, Folder, Frame, Problems, distinct, nan_none, take
from .repeats import flag_copies, flag_same_angle
from .script import NAN, energy_in, short
from .xrm import XrmError, XrmFrames, XrmHeader, shown

__all__ = ["FEW_ANGLES", "finish"]

FEW_ANGLES = 8  # fewer usable angles make no tomogram
_ANGLE_TOLERANCE = 0.05  # degrees between the script and the stage that go unreported
_MOST_CARRIERS = 8  # files of an energy whose own references are used, where they carry some
_NAMED_SINGLY = 5  # bad files of one energy that are named one by one; more are counted


def finish(
    name: str,
    blocks: Sequence[Block],
    folder: Folder,
    params: ScanParameters,
    verify: bool,
    problems: Problems,
    script: str,
) -> Series:
    """Read the headers, judge every frame and build the series."""
    frames = [f for b in blocks for f in b.frames]
    present = [f for f in frames if f.path]
    if verify:
        for frame in present:
            if frame.status == "ok":
                take(frame, folder.header(frame.path))
    else:
        for block in blocks:
            _take_one([f for f in block.frames if f.path], folder)
        for frame in present:
            known = folder.headers.get(frame.path)
            if isinstance(known, XrmError) and known.reason == "link-out" and frame.status == "ok":
                frame.status = "unreadable:link-out"
    _judge_sizes(blocks)
    if verify:
        flag_copies(present, folder)
        folder.remember()
    blocks = [part for block in blocks for part in _by_header_energy(block)]
    for block in blocks:
        flag_same_angle(block, FEW_ANGLES)
        _judge_energy(block, problems)
        _add_references(block, folder)
    frames = [f for b in blocks for f in b.frames]
    _tell_times(frames)
    expected = (
        len({b.energy for b in blocks}) if script == "" else len(blocks),
        sum(f.kind == "projection" for f in frames),
        sum(f.kind == "flat" for f in frames),
    )
    darks = sum(f.kind == "dark" for f in frames)
    if darks:
        problems.add("info", "darks", f"{darks} dark frames are left out: dark fields are not used yet")

    planned = [distinct(f.theta for f in b.frames if f.kind == "projection") for b in blocks]
    tomography = max(planned, default=0) >= FEW_ANGLES
    with_projections = [b for b in blocks if any(f.kind == "projection" for f in b.frames)]
    readable = [b for b in with_projections if any(f.status == "ok" and f.kind == "projection" for f in b.frames)]
    nothing = not any(f.status == "ok" for f in frames)
    kept = with_projections if (script and tomography) or not readable else readable

    if not present:
        where = shown(folder.path.resolve().name)
        problems.add(
            "error",
            "missing",
            f"no file is there: {script or name} names {len(frames)} frames "
            f"({expected[1]} projections, {expected[2]} flats), none of them is in {where}; "
            "put the .xrm files beside the script",
        )
    elif nothing:
        _report_bad(blocks, problems)
        problems.add("error", "nothing-usable", f"none of the {len(frames)} frames can be used")
    else:
        absent = [b for b in blocks if not any(f.path for f in b.frames)]
        if absent:
            listed = ", ".join(f"{b.energy:g}" for b in absent[:8]) + (" ..." if len(absent) > 8 else "")
            problems.add(
                "error",
                "energies-missing",
                f"{len(absent)} of {len(blocks)} energies have no file at all ({listed} eV); "
                "copy their files, or go on without them",
            )
        _report_bad([b for b in blocks if any(f.path for f in b.frames)], problems)

    like = next((f for f in present if f.status == "ok" and f.number > 0), None)
    scans = tuple(
        _scan(b, folder.path, params, tomography, problems, not any(f.path for f in b.frames), like) for b in kept
    )
    if not scans:
        problems.add("error", "no-projections", f"{name} has flats but no projection")
    return with_known_pixels(Series(shown(name), scans, tuple(problems.all), expected))


def _by_header_energy(block: Block) -> list[Block]:
    """Give a block without an energy those of its headers; apart where they differ by more than 0.5 eV."""
    if block.energy == block.energy:
        return [block]
    known = [f.header_energy for f in block.frames]
    # What has no energy belongs to what follows when the scan began with flats, else to what came before.
    ahead = block.frames[0].kind == "flat"
    for order in (reversed, iter) if ahead else (iter, reversed):
        last = NAN
        for i in order(range(len(known))):
            known[i] = last = known[i] if known[i] == known[i] else last
    parts: list[Block] = []
    begun = NAN
    for frame, energy in zip(block.frames, known, strict=True):
        if not parts or abs(energy - begun) > 0.5:
            parts.append(Block(NAN, [], block.zone_plate))
            begun = energy
        parts[-1].frames.append(frame)
    for part in parts:
        measured = [f.header_energy for f in part.frames if f.header_energy == f.header_energy]
        part.energy = float(np.median(measured)) if measured else NAN
    return parts


def _judge_energy(block: Block, problems: Problems) -> None:
    """Report names and headers that tell another energy than the one in use."""
    for whose, most, values in (
        ("names", 0.5, [energy_in(f.name) for f in block.frames]),
        ("headers", 2.0, [f.header_energy for f in block.frames]),
    ):
        other = [(f, v) for f, v in zip(block.frames, values, strict=True) if abs(v - block.energy) > most]
        if other:
            said = ", ".join(f"{v:g}" for v in sorted({round(v, 2) for _, v in other})[:3])
            text = f"the {whose} of {len(other)} frames say {said} eV, {block.energy:g} eV is used"
            file = other[0][0].name if len(other) == 1 else ""
            problems.add("warning", "energy", text, file, nan_none(block.energy))


def _add_references(block: Block, folder: Folder) -> None:
    """Where an energy has no usable flat, take the references that its projections carry in their files."""
    if any(f.kind == "flat" and f.status == "ok" for f in block.frames):
        return
    carriers: dict[str, int] = {}
    for place, frame in enumerate(block.frames):
        header = folder.headers.get(frame.path)
        if frame.status == "ok" and frame.kind == "projection" and isinstance(header, XrmHeader) and header.references:
            carriers.setdefault(frame.path, place)
    paths = list(carriers)
    few = sorted({int(i) for i in np.linspace(0, len(paths) - 1, _MOST_CARRIERS)}) if paths else []
    for path in reversed([paths[i] for i in few]):
        header, place = folder.headers[path], carriers[path]
        assert isinstance(header, XrmHeader)
        own = [Frame(block.frames[place].name, "flat", NAN, NAN, 0, path, -k) for k in range(len(header.references))]
        for frame in own:
            take(frame, header)
        block.frames[place:place] = own


def _tell_times(frames: Sequence[Frame]) -> None:
    """Where a header lacks the date, take the clock of its container, set to the others' local time."""
    lacking = [f for f in frames if f.time != f.time and f.written == f.written]
    if not lacking:
        return
    both = [f.time - f.written for f in frames if f.time == f.time and f.written == f.written]
    offset = 900 * round(float(np.median(both)) / 900) if both else 0  # zones differ by quarters of an hour
    for frame in lacking:
        frame.time = frame.written + offset


def _take_one(present: Sequence[Frame], folder: Folder) -> None:
    """Without verification: the first readable header speaks for the size of all frames."""
    for frame in present[:20]:
        found = folder.header(frame.path)
        if isinstance(found, XrmHeader):
            for other in present:
                other.shape, other.dtype, other.header_pixel_um = found.shape, found.dtype, found.pixel_size_um
                if found.binning is not None:
                    other.binning = found.binning
            return


def _judge_sizes(blocks: Sequence[Block]) -> None:
    """Flag the frames whose size or type is not that of most of their energy, that of most of all where they tie."""
    usual = Counter(
        (f.shape, f.dtype) for b in blocks for f in b.frames if f.path and f.status == "ok" and f.number > 0
    )
    for block in blocks:
        present = [f for f in block.frames if f.path and f.status == "ok"]
        counts = Counter((f.shape, f.dtype) for f in present if f.number > 0)
        if not counts:
            continue
        shape, dtype = max(counts, key=lambda kind: (counts[kind], usual[kind]))
        for frame in present:
            if frame.shape != shape or (frame.dtype != dtype and frame.number > 0):
                frame.status = "unreadable:other-size"


def _report_bad(blocks: Sequence[Block], problems: Problems) -> None:
    """Name bad files one by one where they are few, else count them: one problem an energy and reason."""
    for block in blocks:
        energy = nan_none(block.energy)
        bad: dict[tuple[str, str], list[tuple[int | None, Frame]]] = {}
        number = 0
        for frame in block.frames:
            own = number if frame.kind == "projection" else None
            number += frame.kind == "projection"
            if frame.status != "ok" and frame.status != "unreadable:overwritten":
                bad.setdefault((frame.status.partition(":")[2], frame.kind), []).append((own, frame))
        for (reason, kind), members in bad.items():
            why = WHY.get(reason, reason)
            severity = "warning" if reason in ("duplicate", "same-angle") else "error"
            if len(members) <= _NAMED_SINGLY:
                for own, frame in members:
                    file = shown(Path(frame.path).name) if frame.path else frame.name
                    problems.add(severity, reason, f"{kind} {frame.note or why}", file, energy, own)
            else:
                total = sum(f.kind == kind for f in block.frames)
                first, last = short(members[0][1].name), short(members[-1][1].name)
                text = f"{len(members)} of {total} {kind}s at {block.energy:g} eV: {why} ({first} .. {last})"
                problems.add(severity, reason, text, "", energy)


def _source(frames: Sequence[Frame], folder: Path, params: ScanParameters, like: Frame | None) -> XrmFrames:
    """Make the frames' source; where none can be read they have the size of `like`, a good one of another energy."""
    good = next((f for f in frames if f.status == "ok"), None) or like
    good = good or next((f for f in frames if f.dtype is not None), None)
    dtype = good.dtype if good is not None and good.dtype is not None else np.dtype("<u2")
    shape = good.shape if good is not None else (0, 0)
    return XrmFrames(
        tuple(f.path or os.path.join(folder, f.name) for f in frames),  # noqa: PTH118 - thousands of them
        tuple(f.number for f in frames),
        shape,
        dtype,
        params.flip_rows,
        params.bin,
    )


def _angles(block: Block, projections: Sequence[Frame], problems: Problems) -> npt.NDArray[np.float64]:
    """Measured angles where the headers tell, the script's or the name's elsewhere, degrees."""
    nominal = np.array([f.theta for f in projections])
    measured = np.array([f.header_theta for f in projections])
    known = np.isfinite(measured) & (np.abs(measured) <= 1e5)
    energy = nan_none(block.energy)
    if known.sum() >= 3 and np.ptp(measured[known]) == 0 and distinct(nominal[known]) >= 3:
        problems.add(
            "warning",
            "angle-stuck",
            f"the headers at {block.energy:g} eV all say {measured[known][0]:g} deg, the script turns: "
            "the script's angles are used",
            energy=energy,
        )
        return np.where(np.isfinite(nominal), nominal, measured)
    theta = np.where(known, measured, nominal)
    with np.errstate(invalid="ignore"):
        off = np.abs((theta - nominal + 180) % 360 - 180)
    wrong = np.flatnonzero(off > _ANGLE_TOLERANCE)
    if wrong.size <= _NAMED_SINGLY:
        for i in map(int, wrong):
            text = f"the stage says {theta[i]:.3f} deg, the script {nominal[i]:.3f}: the stage is used"
            problems.add("warning", "angle", text, projections[i].name, energy, i)
    else:
        text = (
            f"{wrong.size} of {len(theta)} angles at {block.energy:g} eV differ from the script by more than "
            f"{_ANGLE_TOLERANCE} deg (up to {off[wrong].max():.3f}): the stage's are used"
        )
        problems.add("warning", "angle", text, energy=energy)
    return theta


def _scan(
    block: Block,
    folder: Path,
    params: ScanParameters,
    tomography: bool,
    problems: Problems,
    quiet: bool,
    like: Frame | None,
) -> EnergyScan:
    projections = [f for f in block.frames if f.kind == "projection"]
    groups: list[list[Frame]] = []
    before: list[int] = []  # number of groups begun before every projection
    last = ""
    for frame in block.frames:
        if frame.kind == "flat":
            if last != "flat":
                groups.append([])
            groups[-1].append(frame)
        elif frame.kind == "projection":
            before.append(len(groups))
        last = frame.kind if frame.kind != "dark" else last
    usable_groups = [i for i, g in enumerate(groups) if any(f.status == "ok" for f in g)]
    half = np.full(len(projections), -1, dtype=np.int64)
    replaced = set()
    for i, count in enumerate(before):
        if not groups:
            break
        own = max(count - 1, 0)
        half[i] = own
        if usable_groups and own not in usable_groups:
            half[i] = min(usable_groups, key=lambda g: (abs(g - own), g))
            replaced.add(own)
    energy = nan_none(block.energy)
    theta = _angles(block, projections, problems) * params.theta_sign
    status = [f.status for f in projections]
    if energy is None:
        problems.add("error", "no-energy", "expected an energy in the script, the names or the headers, got none")
    if not quiet:
        for own in sorted(replaced):
            text = (
                f"none of the flats of group {own + 1} at {block.energy:g} eV can be used; the nearest group's are used"
            )
            problems.add("warning", "flats-replaced", text, energy=energy)
        if not usable_groups:
            n = sum(len(g) for g in groups)
            text = f"no usable flat at {block.energy:g} eV (of {n} expected); its absorbance cannot be made"
            # one file opened by itself is a picture, not a measurement
            problems.add("error" if groups or len(block.frames) > 1 else "info", "no-flats", text, energy=energy)
        usable = distinct(t for t, s in zip(theta.tolist(), status, strict=True) if s == "ok")
        if tomography and usable < FEW_ANGLES:
            text = f"expected at least {FEW_ANGLES} usable angles at {block.energy:g} eV, got {usable}"
            problems.add("error", "few-angles", text, energy=energy)
    counts = Counter(f.binning for f in block.frames if f.binning > 0 and f.status == "ok") or Counter(
        f.binning for f in block.frames if f.binning > 0
    )
    binning = counts.most_common(1)[0][0] if counts else 1
    law = params.pixel_law_slope_nm_per_ev * block.energy + params.pixel_law_offset_nm
    stored = [f.header_pixel_um for f in block.frames if f.header_pixel_um == f.header_pixel_um]
    flats = tuple(
        FlatSet(
            _source(group, folder, params, like),
            np.array([f.exposure for f in group]),
            tuple(f.status for f in group),
            tuple(f.name for f in group),
            np.array([f.time for f in group]),
            np.array([f.written for f in group]),
        )
        for group in groups
    )
    return EnergyScan(
        block.energy,
        theta,
        _source(projections, folder, params, like),
        np.array([f.exposure for f in projections]),
        tuple(status),
        flats,
        half,
        binning,
        law * binning * params.bin,
        np.array([f.time for f in projections]),
        tuple(f.name for f in projections),
        1000 * float(np.median(stored)) * params.bin if stored else NAN,
        block.zone_plate,
        written_s=np.array([f.written for f in projections]),
    )
