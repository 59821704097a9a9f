"""Scan scripts and the names of frames: what they say, without looking at any file.

A script is read as a machine of states: SSRL's ``sete`` or APS's ``moveto energy``, the moves and exposures
between, and a frame at every ``collect``. The names of the frames hold what the script may lack.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from napari_xanes_tomo.model import XanesTomoError

__all__ = ["NameFacts", "ScriptBlock", "ScriptFrame", "facts_of", "is_scan_script", "parse_script"]

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
    energy, named_energy = NAN, NAN
    theta, exposure, binning = NAN, NAN, 0
    zone_plate = at_first = NAN

    def close(block_energy: float) -> None:
        if frames:
            blocks.append(ScriptBlock(block_energy, tuple(frames), at_first))
            frames.clear()

    for line in text.splitlines():
        verb, rest = _word(line)
        verb = verb.lower()
        if verb == "collect":
            name = rest.partition(";")[0].strip().strip("\"'")
            if not name:
                continue
            if "/" in name or "\\" in name or ":" in name or "\0" in name or name in (".", ".."):
                raise XanesTomoError(
                    f"the script collects {short(name)!r}: expected the plain name of a file beside the script, "
                    "got a path; nothing was read. Keep script and frames in one folder and names without folders"
                )
            if not name.lower().endswith(SUFFIXES):
                name += ".xrm"
            kind = kind_of(name)
            if energy != energy:  # not set by the script
                own = energy_in(name)
                if own == own and own != named_energy:
                    if named_energy == named_energy:
                        close(named_energy)
                    named_energy = own
            at_first = at_first if frames else zone_plate
            frames.append(ScriptFrame(name, kind, theta, exposure, binning))
        elif verb == "moveto":
            axis, value = _word(rest)
            axis = axis.lower()
            if axis in ("t", "theta"):
                theta = _number(value)
            elif axis == "zpz":
                zone_plate = _number(value)
            elif axis == "energy":
                close(energy if energy == energy else named_energy)
                energy = _number(value)
        elif verb == "setexp":
            exposure = _number(rest)
        elif verb == "setbinning":
            value_binning = _number(rest)
            binning = int(value_binning) if 0 < value_binning <= 64 else 0
        elif verb == "sete":
            close(energy if energy == energy else named_energy)
            energy = _number(rest)
    close(energy if energy == energy else named_energy)
    return blocks


def decode(raw: bytes) -> str:
    for bom, encoding in ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"), (b"\xef\xbb\xbf", "utf-8-sig")):
        if raw.startswith(bom):
            return raw.decode(encoding, errors="replace")
    return raw.decode("latin-1")


_VERBS = re.compile(r"^\s*(?:collect\s+\S|sete\s+\d|setexp\s+[\d.]|setbinning\s+\d|moveto\s+\w+\s+\S)", re.I | re.M)


def is_scan_script(path: str | os.PathLike[str]) -> bool:
    """Whether a file looks like a scan script, judged by its first 4 kB; never raises."""
    try:
        if not Path(path).is_file():  # a pipe would be waited for
            return False
        with Path(path).open("rb") as file:
            raw = file.read(_SNIFF)
    except (OSError, ValueError):
        return False
    if b"\0" in raw and not raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return False
    return len(_VERBS.findall(decode(raw))) >= 2


def is_text(name: str) -> bool:
    suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122 - called for thousands of names
    return suffix in ("", ".txt", ".scr", ".script")
