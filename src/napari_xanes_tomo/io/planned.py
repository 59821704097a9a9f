"""Frames of a measurement as they were planned, and what became of them: the files of one folder and their headers."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from napari_xanes_tomo.model import Problem, Progress, XanesTomoError

from .header_cache import load_headers, save_headers
from .script import NAN, SUFFIXES, is_text
from .xrm import XrmError, XrmHeader, read_header, shown

__all__ = ["WHY", "Block", "Folder", "Frame", "Problems", "acquired_as", "distinct", "nan_none", "take"]

WHY = {
    "missing": "expected in the folder, not there; copy it, or go on without it",
    "empty": "has no bytes; copy it again",
    "truncated": "ends inside its image; copy it again",
    "not-xrm": "is no XRM file",
    "lfs-pointer": "is a Git LFS pointer, not the file; fetch it with `git lfs pull`",
    "no-image": "holds no image (an aborted acquisition)",
    "corrupt": "is damaged",
    "other-size": "has another frame size than the others",
    "unreadable": "cannot be opened",
    "mosaic": "holds unstitched mosaic tiles",
    "link-out": "is a link that leads out of the folder and is not followed; put the file itself there",
    "overwritten": "was overwritten by a later frame of the same name",
    "duplicate": "is a copy of another frame",
    "same-angle": "is a second file for an angle that has one",
    "no-energy": "tells no energy",
}

_FEW = 100  # files whose headers are not worth a place in the cache
_YEAR_1990 = 631_152_000.0


@dataclass(slots=True)
class Frame:
    """One frame of the plan and what became of it."""

    name: str
    kind: str
    theta: float
    exposure: float
    binning: int
    path: str = ""  # "" when it is not on disk
    number: int = 1
    status: str = "unreadable:missing"
    shape: tuple[int, int] = (0, 0)
    dtype: np.dtype[Any] | None = None
    time: float = NAN
    written: float = NAN
    header_theta: float = NAN
    header_energy: float = NAN
    header_pixel_um: float = NAN
    note: str = ""  # why it is left out, where that needs more than one word


@dataclass(slots=True)
class Block:
    """Frames between two settings of the energy (eV), in the order of acquisition."""

    energy: float
    frames: list[Frame]
    zone_plate: float = NAN


class Folder:
    """The XRM files of one folder, listed once; every header read at most once."""

    def __init__(self, path: Path, progress: Progress) -> None:
        self.path = path
        self.progress = progress
        self.files: dict[str, str] = {}
        self.texts: list[str] = []
        self.headers: dict[str, XrmHeader | XrmError] = {}
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.lower().endswith(SUFFIXES):
                        self.files[entry.name] = entry.path
                        if entry.is_symlink() and _leads_out(entry.path, path):
                            self.headers[entry.path] = XrmError(
                                f"{shown(entry.name)}: {WHY['link-out']}", "link-out", shown(entry.name)
                            )
                    elif is_text(entry.name):
                        self.texts.append(entry.path)
        except OSError as error:
            raise XanesTomoError(
                f"{shown(path.name or str(path))}: expected a folder that can be read, got {error.strerror}"
            ) from None
        self._folded: dict[str, str] | None = None
        self._remembered = len(self.files) < _FEW  # a few are read as fast as remembered
        self._new = 0

    def find(self, name: str) -> str:
        """Path of a file by its name, whatever its case and spelling of accents; "" when it is not there."""
        if name in self.files:
            return self.files[name]
        if not self.files:
            return ""
        if self._folded is None:
            self._folded = {_folded(n): p for n, p in self.files.items()}
        return self._folded.get(_folded(name), "")

    def header(self, path: str) -> XrmHeader | XrmError:
        """Return the header of a file, or why it has none; read once."""
        if not self._remembered:
            self._remembered = True
            self.headers = {**load_headers(self.path, self.files), **self.headers}
        found = self.headers.get(path)
        if found is None:
            self._new += 1
            try:
                found = read_header(path)
            except XrmError as error:
                found = error.with_traceback(None)
            self.headers[path] = found
            if len(self.headers) % 500 == 0:
                self.progress("reading headers", len(self.headers), max(len(self.files), len(self.headers)))
        return found

    def remember(self) -> None:
        """Keep the headers that were read for the next time."""
        if self._new >= _FEW:
            save_headers(self.path, self.files, self.headers)
            self._new = 0


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", shown(name)).lower()


def _leads_out(link: str, folder: Path) -> bool:
    """Whether a link leads to a place outside the folder."""
    target, root = os.path.realpath(link), os.path.realpath(folder)
    return not target.startswith(root.rstrip(os.sep) + os.sep)


def acquired_as(header: XrmHeader | XrmError) -> str:
    """Name under which the instrument wrote a file, lower case; "" when the header does not tell."""
    known = header.header if isinstance(header, XrmError) else header
    return re.split(r"[\\/]", known.acq_file_name)[-1].lower() if known is not None else ""


def take(frame: Frame, found: XrmHeader | XrmError) -> None:
    """Write what the header says into the frame."""
    header = found.header if isinstance(found, XrmError) else found
    frame.status = f"unreadable:{found.reason}" if isinstance(found, XrmError) else "ok"
    if header is None:
        return
    frame.shape, frame.dtype = header.shape, header.dtype
    i = max(frame.number, 1) - 1
    if frame.number <= 0:
        frame.dtype = header.reference_dtype
        if header.reference_exposure_s > 0:
            frame.exposure = header.reference_exposure_s
    elif i >= len(header.angles_deg):
        frame.status = "unreadable:no-image"
        return
    elif header.exposures_s[i] > 0:
        frame.exposure = header.exposures_s[i]
    frame.header_theta, frame.time = header.angles_deg[i], header.times_s[i]
    if header.n_images == 1 and frame.number == 1:  # of a stack it is the end of the last image
        frame.written = header.modified_s if header.modified_s > _YEAR_1990 else NAN  # earlier: a clock never set
    frame.header_pixel_um = header.pixel_size_um if header.pixel_size_um > 0 else NAN
    frame.header_energy = header.energies_ev[i] if header.energies_ev[i] > 0 else NAN
    if header.binning is not None:
        frame.binning = header.binning


def nan_none(value: float) -> float | None:
    """Return the value, None for NaN."""
    return value if value == value else None


class Problems:
    """Collects problems."""

    def __init__(self) -> None:
        self.all: list[Problem] = []

    def add(
        self,
        severity: str,
        code: str,
        message: str,
        file: str = "",
        energy: float | None = None,
        frame: int | None = None,
    ) -> None:
        """Add one: what, how bad, and to which file, energy (eV) and projection it belongs."""
        self.all.append(Problem(severity, code, message, file, energy, frame))


def distinct(values: Iterable[float]) -> int:
    """Return how many different numbers there are, to 0.01; NaN is none."""
    return len({round(v, 2) for v in values if v == v})
