"""Scan scripts, ScanInfo files and the names of frames: what they say, without looking at any frame.

A script is read as a machine of states: SSRL's ``sete`` or APS's ``moveto energy``, the moves and exposures
between, and a frame at every ``collect``. A ScanInfo file lists the frames in the order of acquisition and says in
which order the loops ran. The names of the frames hold what both may lack.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from napari_xanes_tomo.model import XanesTomoError

__all__ = [
    "NameFacts",
    "ScanInfo",
    "ScriptBlock",
    "ScriptFrame",
    "decode",
    "facts_of",
    "is_scan_script",
    "parse_scan_info",
    "parse_script",
    "text_kind",
]

NAN = float("nan")
SUFFIXES = (".xrm", ".txrm")
_SNIFF = 4096


class ScriptFrame(NamedTuple):
    """One ``collect``: the state of the machine at that line. Unknown values are NaN or 0."""

    name: str
    kind: str
    """``projection``, ``flat`` or ``dark``."""
    theta_deg: float
    exposure_s: float
    binning: int


@dataclass(frozen=True)
class ScriptBlock:
    """Everything collected between two settings of the energy.

    Attributes
    ----------
    energy_ev : float
        eV; NaN when neither the script nor the names tell.
    frames : tuple of ScriptFrame
        In the order of acquisition.
    zone_plate_um : float
        Position of the zone plate along the beam (``zpz``) when the first of them was collected; NaN where unknown.
    """

    energy_ev: float
    frames: tuple[ScriptFrame, ...]
    zone_plate_um: float = NAN


@dataclass(frozen=True)
class ScanInfo:
    """What a ScanInfo file of SSRL's scan generator says.

    Attributes
    ----------
    settings : dict of str to float
        ``NEXPOSURES``, ``NREPEATSCAN``, ``REFNEXPOSURES`` and the like.
    loops : tuple of str
        Which of energy, tomo, mosaic and multiexposure were scanned, the outermost loop first.
    blocks : tuple of ScriptBlock
        The files it lists, grouped by the energies in their names.
    """

    settings: dict[str, float]
    loops: tuple[str, ...]
    blocks: tuple[ScriptBlock, ...]


# ---------------------------------------------------------------------------------------------- names

_FLAT = re.compile(r"(?:^|_)ref(?:erence)?_|_ff(?:_?\d+)?(?:\.\w+)?$", re.IGNORECASE)
_DARK = re.compile(r"(?:^|_)dark_|_df(?:_?\d+)?(?:\.\w+)?$", re.IGNORECASE)
_ENERGY = re.compile(r"(?<![0-9.])(\d{3,6}(?:\.\d+|_\d(?=_?eV))?)_?eV(?![A-Za-z])", re.IGNORECASE)
_THETA = re.compile(r"_([+-]?\d{1,4}(?:\.\d+)?)_Degree", re.IGNORECASE)
_SHOT = re.compile(r"_(\d{3})of(\d{3})", re.IGNORECASE)
_REP = re.compile(r"^rep(\d+)_", re.IGNORECASE)
_COUNTER = re.compile(r"^(?:rep\d+_)?(?:ref_)?(\d{4,7})_(?!\d+of)", re.IGNORECASE)


class NameFacts(NamedTuple):
    """What a file name tells."""

    kind: str
    energy: float
    theta: float
    counter: int
    shot: int
    shots: int
    rep: int


def kind_of(name: str) -> str:
    return "flat" if _FLAT.search(name) else "dark" if _DARK.search(name) else "projection"


def _last(pattern: re.Pattern[str], name: str) -> re.Match[str] | None:
    found = None
    for found in pattern.finditer(name):  # noqa: B007 - sample names may hold anything: match from the right
        pass
    return found


def energy_in(name: str) -> float:
    found = _last(_ENERGY, name)
    return float(found.group(1).replace("_", ".")) if found else NAN


def facts_of(name: str) -> NameFacts:
    """Return what a file name tells; NaN, -1 or 0 where it does not."""
    theta, shot, counter, rep = _last(_THETA, name), _last(_SHOT, name), _COUNTER.match(name), _REP.match(name)
    return NameFacts(
        kind_of(name),
        energy_in(name),
        float(theta.group(1)) if theta else NAN,
        int(counter.group(1)) if counter else -1,
        int(shot.group(1)) if shot else 0,
        int(shot.group(2)) if shot else 0,
        int(rep.group(1)) if rep else 0,
    )


def short(name: str) -> str:
    return name if len(name) <= 80 else name[:77] + "..."


# ---------------------------------------------------------------------------------------------- the script


def _word(text: str) -> tuple[str, str]:
    """First word of a text, and what follows it."""
    first, *rest = text.split(None, 1) or [""]
    return first, rest[0].strip() if rest else ""


def _number(text: str) -> float:
    """First number of a text, a comment behind it left out; NaN where there is none."""
    try:
        value = float(_word(text.partition(";")[0])[0][:40])
    except ValueError:
        return NAN
    return value if np.isfinite(value) else NAN


def _plain_name(text: str, what: str) -> str:
    """Return the name of a frame with its suffix; refuse one that leads out of the folder."""
    name = text.strip().strip("\"'")
    if "/" in name or "\\" in name or ":" in name or "\0" in name or name in (".", ".."):
        raise XanesTomoError(
            f"{what} {short(name)!r}: expected the plain name of a file beside the script, "
            "got a path; nothing was read. Keep script and frames in one folder and names without folders"
        )
    return name if not name or name.lower().endswith(SUFFIXES) else name + ".xrm"


def parse_script(text: str) -> list[ScriptBlock]:
    """Read a scan script: SSRL's ``sete`` or APS's ``moveto energy``, ``collect`` and the state between.

    Case does not matter, unknown verbs are ignored. An energy that recurs gives a block of its own each
    time. Frames collected before any energy is set are grouped by the energy in their names.

    Raises
    ------
    XanesTomoError
        A name leads out of the script's folder.
    """
    blocks: list[ScriptBlock] = []
    frames: list[ScriptFrame] = []
    energy = NAN
    theta, exposure, binning = NAN, NAN, 0
    zone_plate = at_first = NAN

    def close() -> None:
        if frames:
            grouped = _by_names(frames) if energy != energy else [(energy, frames)]
            blocks.extend(ScriptBlock(e, tuple(own), at_first) for e, own in grouped)
            frames.clear()

    for line in text.splitlines():
        verb, rest = _word(line)
        verb = verb.lower()
        if verb == "collect":
            name = _plain_name(rest.partition(";")[0], "the script collects")
            if not name:
                continue
            at_first = at_first if frames else zone_plate
            frames.append(ScriptFrame(name, kind_of(name), theta, exposure, binning))
        elif verb == "moveto":
            axis, value = _word(rest)
            axis = axis.lower()
            if axis in ("t", "theta"):
                theta = _number(value)
            elif axis == "zpz":
                zone_plate = _number(value)
            elif axis == "energy":
                close()
                energy = _number(value)
        elif verb == "setexp":
            exposure = _number(rest)
        elif verb == "setbinning":
            value_binning = _number(rest)
            binning = int(value_binning) if 0 < value_binning <= 64 else 0
        elif verb == "sete":
            close()
            energy = _number(rest)
    close()
    return blocks


def _by_names(frames: Sequence[ScriptFrame]) -> list[tuple[float, list[ScriptFrame]]]:
    """Group frames in their order by the energies (and repeats) in their names.

    Flats whose names hold none, between two energies, belong to the one that follows when the scan began with flats,
    else to the one before. Other frames without one belong to the energy before them.
    """
    facts = [facts_of(f.name) for f in frames]
    keys = [(f.rep, f.energy) if f.energy == f.energy else None for f in facts]
    following: list[tuple[int, float] | None] = []
    for key in reversed(keys):
        following.append(key if key is not None or not following else following[-1])
    following.reverse()
    flats_first = frames[0].kind == "flat"
    grouped: list[tuple[float, list[ScriptFrame]]] = []
    last: tuple[int, float] | None = None
    for frame, key, after in zip(frames, keys, following, strict=True):
        own = key
        if own is None:
            ahead = last is None or (frame.kind == "flat" and flats_first)
            own = (after or last) if ahead else last
        if not grouped or own != last:
            grouped.append((NAN if own is None else own[1], []))
        grouped[-1][1].append(frame)
        last = own
    return grouped


_INFO = re.compile(r"^[ \t]*([A-Z][A-Z0-9]*)[ \t]+(-?[\d.]+)[ \t\r]*$", re.MULTILINE)
_LOOPS = ("ENERGY", "TOMO", "MOSAIC", "MULTIEXPOSURE")


def parse_scan_info(text: str) -> ScanInfo:
    """Read a ScanInfo file: settings, then ``FILES`` and one name a line, in the order of acquisition.

    Raises
    ------
    XanesTomoError
        A name leads out of the folder.
    """
    lines = text.splitlines()
    at = next((i for i, line in enumerate(lines) if line.strip().upper() == "FILES"), len(lines))
    settings = {}
    for found in _INFO.finditer("\n".join(lines[:at])):
        value = _number(found.group(2))
        if value == value:
            settings[found.group(1)] = value
    loops = sorted((settings.get(name, 0), name.lower()) for name in _LOOPS)
    names = [_plain_name(line.partition(";")[0], "the ScanInfo file lists") for line in lines[at + 1 :]]
    frames = [ScriptFrame(name, kind_of(name), NAN, NAN, 0) for name in names if name]
    blocks = tuple(ScriptBlock(e, tuple(own)) for e, own in _by_names(frames)) if frames else ()
    return ScanInfo(settings, tuple(name for order, name in loops if order > 0), blocks)


def decode(raw: bytes) -> str:
    """Return the text of a script: UTF-8 or UTF-16 where the bytes say so, cp1252 otherwise."""
    for bom, encoding in ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"), (b"\xef\xbb\xbf", "utf-8-sig")):
        if raw.startswith(bom):
            return raw.decode(encoding, errors="replace")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:  # as the instrument's Windows wrote it
        return raw.decode("cp1252", errors="replace")


_VERBS = re.compile(r"^\s*(?:collect\s+\S|sete\s+\d|setexp\s+[\d.]|setbinning\s+\d|moveto\s+\w+\s+\S)", re.I | re.M)


def text_kind(path: str | os.PathLike[str]) -> str:
    """Return ``script``, ``scaninfo`` or "" for any other file, judged by its first 4 kB; never raises."""
    try:
        if not Path(path).is_file():  # a pipe would be waited for
            return ""
        with Path(path).open("rb") as file:
            raw = file.read(_SNIFF)
    except (OSError, ValueError):
        return ""
    if b"\0" in raw and not raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return ""
    text = decode(raw)
    if len(_VERBS.findall(text)) >= 2:
        return "script"
    settings = {found.group(1) for found in _INFO.finditer(text)}
    return "scaninfo" if len(settings.intersection(("VERSION", *_LOOPS))) >= 3 else ""


def is_scan_script(path: str | os.PathLike[str]) -> bool:
    """Whether a file looks like a scan script or a ScanInfo file, judged by its first 4 kB; never raises."""
    return bool(text_kind(path))


def is_text(name: str) -> bool:
    suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122 - called for thousands of names
    return suffix in ("", ".txt", ".scr", ".script")
