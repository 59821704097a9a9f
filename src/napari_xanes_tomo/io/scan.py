"""From a scan script, a folder or a single file to a `Series`, with everything odd listed.

The script is the plan, the files are what happened. Energies come from the script, then the names, then the
headers; angles from the headers, then the script, then the names. Flats belong to the energy and to the
place in the script at which they were taken (without a script: by their counters), never by the angle in
their name, which is that of the projection before them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from napari_xanes_tomo.model import Problem, Progress, Series, XanesTomoError, no_progress
from napari_xanes_tomo.recipe import ScanParameters

from .assemble import FEW_ANGLES, finish
from .exchange import is_exchange, open_exchange
from .planned import Block, Folder, Frame, Problems, acquired_as, distinct, nan_none
from .script import (
    NAN,
    SUFFIXES,
    ScriptBlock,
    ScriptFrame,
    decode,
    energy_in,
    facts_of,
    is_scan_script,
    is_text,
    parse_scan_info,
    parse_script,
    short,
    text_kind,
)
from .unscripted import open_names
from .xrm import XrmError, read_header, shown

__all__ = ["ScriptBlock", "ScriptFrame", "is_scan_folder", "is_scan_script", "open_series", "parse_script"]

_LARGEST_SCRIPT = 64 << 20  # bytes; the real one of 13,400 frames has 1.8 MB


def is_scan_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds XRM files or a scan script; never raises, stops at the first one found."""
    try:
        with os.scandir(path) as entries:
            texts: list[str] = []
            for entry in entries:
                if entry.name.lower().endswith(SUFFIXES):
                    return True
                if is_text(entry.name) and len(texts) < 50:
                    texts.append(entry.path)
    except (OSError, ValueError):
        return False
    return any(is_scan_script(text) for text in texts)


def open_series(
    path: str | os.PathLike[str],
    params: ScanParameters = ScanParameters(),  # noqa: B008 - frozen
    *,
    script: str | os.PathLike[str] | None = None,
    verify: bool = True,
    progress: Progress = no_progress,
) -> Series:
    """Open a measurement: a scan script, a folder, one ``.xrm`` or one ``.txrm``. No pixel is read.

    Parameters
    ----------
    path : path-like
        The script, the folder of the frames, or one file.
    params : ScanParameters
        Sense of rotation, row order, binning, pixel size law.
    script : path-like, optional
        A scan script that lies elsewhere; `path` is then the folder of the frames.
    verify : bool
        Read the header of every file: measured angles, exposures and times, and every file that is not
        whole is found. False takes the script's word and looks only at which files exist.
    progress : Progress
        Told about headers read.

    Returns
    -------
    Series
        Every energy with at least one readable projection; of a tomography script every energy, files or
        no files. What is missing or odd is in its `problems`, not raised.

    Raises
    ------
    XanesTomoError
        Nothing there can be understood as a measurement.
    """
    path = Path(path)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError):
        is_folder = exists = False
    if not exists:
        raise XanesTomoError(f"{short(str(path))}: expected a scan script, a folder or an .xrm file, got no such path")
    if not is_folder and not path.is_file():
        raise XanesTomoError(f"{short(path.name)}: expected a file or a folder, got a pipe or device")
    if script is not None:
        script = Path(script)
        return _open_script(script, Folder(path if is_folder else path.parent, progress), params, verify)
    if is_exchange(path):
        return open_exchange(path, params, progress=progress)
    if not is_folder:
        if path.suffix.lower() in SUFFIXES or _starts_like_xrm(path):
            return _open_file(path, params, progress)
        return _open_script(path, Folder(path.parent, progress), params, verify)
    folder = Folder(path, progress)
    kinds = {text: text_kind(text) for text in folder.texts}
    # A script says more than the ScanInfo file beside it.
    scripts = sorted(t for t, kind in kinds.items() if kind == "script") or sorted(t for t in kinds if kinds[t])
    if len(scripts) > 1:
        listed = ", ".join(Path(s).name for s in scripts[:6]) + (" ..." if len(scripts) > 6 else "")
        raise XanesTomoError(
            f"{path.name}: expected one scan script, got {len(scripts)} ({listed}); open the one you mean"
        )
    if scripts:
        return _open_script(Path(scripts[0]), folder, params, verify, by_folder=True)
    if not folder.files:
        raise XanesTomoError(
            f"{path.resolve().name}: expected a scan script or .xrm files, got a folder with neither; "
            "open the folder of the frames"
        )
    return open_names(folder, params, verify)


def _starts_like_xrm(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(8) == b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
    except OSError:
        return False


def _open_script(script: Path, folder: Folder, params: ScanParameters, verify: bool, by_folder: bool = False) -> Series:
    label = shown(script.name)
    try:
        with script.open("rb") as file:
            raw = file.read(_LARGEST_SCRIPT + 1)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise XanesTomoError(f"{label}: expected a scan script, got a file that cannot be read ({why})") from None
    if len(raw) > _LARGEST_SCRIPT:
        raise XanesTomoError(f"{label}: expected a scan script, got more than {_LARGEST_SCRIPT >> 20} MB")
    text = decode(raw)
    listed = text_kind(script) == "scaninfo"
    planned: Sequence[ScriptBlock]
    try:
        planned = parse_scan_info(text).blocks if listed else parse_script(text)
    except XanesTomoError as error:
        raise XanesTomoError(f"{label}: {error}") from None
    if not planned and listed:
        raise XanesTomoError(
            f"{label}: expected a ScanInfo file with names below its line FILES, got none; open the folder or "
            "the scan script"
        )
    if not planned:
        raise XanesTomoError(
            f"{label}: expected a scan script with `collect` lines, got none; open the script the instrument ran"
        )
    blocks = [Block(b.energy_ev, [Frame(*f) for f in b.frames], b.zone_plate_um) for b in planned]
    for block in blocks:
        for frame in block.frames:
            if frame.theta != frame.theta:
                frame.theta = facts_of(frame.name).theta if frame.kind == "projection" else NAN
    blocks = _by_energy(blocks)
    problems = Problems()
    _locate(blocks, folder, problems, label, verify)
    _open_stacks(blocks, folder, verify)
    if by_folder and folder.files and not any(f.path for b in blocks for f in b.frames):
        try:
            series = open_names(folder, params, verify)
        except XanesTomoError:
            pass  # then the script is all there is
        else:
            said = f"{label} names none of the {len(folder.files)} files here: they are opened by their own names"
            return replace(series, problems=(Problem("warning", "other-script", said), *series.problems))
    return finish(script.stem, blocks, folder, params, verify, problems, label)


def _by_energy(blocks: list[Block]) -> list[Block]:
    """Join the blocks of an energy when only together they turn: a scan of all energies at every angle.

    Blocks that are tomograms, or repeats of one picture, stay apart.
    """
    members: dict[float, list[Block]] = {}
    for block in blocks:
        members.setdefault(block.energy, []).append(block)
    joined: list[Block] = []
    for energy, own in members.items():
        angles = [distinct(f.theta for f in b.frames if f.kind == "projection") for b in own]
        together = distinct(f.theta for b in own for f in b.frames if f.kind == "projection")
        if len(own) == 1 or max(angles) >= FEW_ANGLES or together < FEW_ANGLES:
            return blocks
        joined.append(Block(energy, [f for b in own for f in b.frames], own[0].zone_plate))
    return joined


def _open_stacks(blocks: Sequence[Block], folder: Folder, verify: bool) -> None:
    """Put every image of a file that holds several in the place of the one planned frame."""
    for block in blocks:
        frames: list[Frame] = []
        for frame in block.frames:
            stack = frame.path.lower().endswith(".txrm") or (verify and frame.status == "ok")
            found = folder.header(frame.path) if frame.path and stack else None
            header = found.header if isinstance(found, XrmError) else found
            n = 1 if header is None else header.n_images
            frames.append(frame)
            if n > 1:
                frame.theta = NAN  # the script's is that of the first at most
                frames += [replace(frame, number=k) for k in range(2, n + 1)]
        block.frames = frames


def _locate(blocks: Sequence[Block], folder: Folder, problems: Problems, script: str, verify: bool) -> None:
    """Find the file of every planned frame: by name, then by the name it was acquired under."""
    frames = [frame for block in blocks for frame in block.frames]
    latest: dict[str, Frame] = {}
    for frame in frames:
        if (before := latest.get(frame.name)) is not None:
            before.status = "unreadable:overwritten"
            problems.add("warning", "overwritten", "collected again later under the same name", before.name)
        latest[frame.name] = frame
    used = set()
    for frame in latest.values():
        frame.path = folder.find(frame.name)
        if frame.path:
            frame.status = "ok"
            used.add(frame.path)
    extra = [(name, p) for name, p in sorted(folder.files.items()) if p not in used]
    missing = {f.name.lower(): f for f in latest.values() if not f.path}
    if extra and missing:
        left = []
        for name, path in extra:
            renamed = missing.pop(acquired_as(folder.header(path)), None)
            if renamed is not None:
                renamed.path, renamed.status = path, "ok"
            else:
                left.append((name, path))
        extra = left
    whole = []
    for name, path in extra:
        found = folder.header(path) if verify else None
        if isinstance(found, XrmError):
            problems.add(
                "error", found.reason, f"not in {script}, and unusable: {found}", name, nan_none(energy_in(name))
            )
        else:
            whole.append(name)
    if whole:
        listed = ", ".join(short(n) for n in whole[:3]) + (" ..." if len(whole) > 3 else "")
        problems.add(
            "info", "not-in-script", f"{len(whole)} files are not named in {script} and are left out ({listed})"
        )


def _open_file(path: Path, params: ScanParameters, progress: Progress) -> Series:
    """Open one ``.xrm`` or ``.txrm``; a stack is split where its energy changes."""
    header = read_header(path)
    folder = Folder(path.parent, progress)
    folder.headers[str(path)] = header
    blocks: list[Block] = []
    name = shown(path.name)
    named = energy_in(name)
    if named != named:
        named = energy_in(acquired_as(header))
    name_theta = facts_of(name).theta
    for i in range(header.n_images):
        stored = header.energies_ev[i]
        # One energy in the name speaks for all images, unless the file itself scans the energy.
        scanned = np.ptp([e for e in header.energies_ev if e > 0] or [0.0]) > 0.5
        energy = stored if stored > 0 and (scanned or named != named) else named
        if not blocks or abs(blocks[-1].energy - energy) > 0.5:
            blocks.append(Block(energy, []))
        blocks[-1].frames.append(
            Frame(name, "projection", name_theta if header.n_images == 1 else NAN, NAN, 0, header.path, i + 1)
        )
    for block in blocks:
        for frame in block.frames:
            frame.status = "ok"
    folder.headers[header.path] = header
    problems = Problems()
    return finish(path.stem, blocks, folder, params, True, problems, "")
