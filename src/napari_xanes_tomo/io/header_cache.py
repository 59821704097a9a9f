"""Headers of the files of a folder, kept in the user's cache folder: a measurement opens at once the second time.

A header is taken from here only for a file of the same name, size and time of change. Pixels never are: where they lie
is read from the file itself. Nothing is written beside raw data, and a cache that cannot be read or written is none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from napari_xanes_tomo.model import XanesTomoError

from .atomic import atomic_write
from .xrm import XrmHeader

__all__ = ["cache_folder", "is_remembered", "load_headers", "save_headers"]

FORMAT = 1
MOST_FOLDERS = 40
LARGEST = 64 << 20  # bytes of one folder's headers
_FRESH_NS = 2_000_000_000  # a file changed that lately may change again without a new time

_SHARED = (
    "version", "exe_version", "n_planned", "n_images", "shape", "dtype", "pixel_size_um", "binning", "mosaic", "images",
    "references", "reference_dtype", "reference_exposure_s",
)  # fmt: skip
_OWN = (
    "angles_deg", "energies_ev", "exposures_s", "times_s", "x_um", "y_um", "z_um", "ion_chamber", "modified_s",
    "acq_file_name",
)  # fmt: skip
_shared_of, _own_of = attrgetter(*_SHARED), attrgetter(*_OWN)


def cache_folder() -> Path:
    """Return the folder for what may be lost: ``XANES_TOMO_CACHE``, else the platform's place for it."""
    named = os.environ.get("XANES_TOMO_CACHE")
    if named:
        return Path(named)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "napari-xanes-tomo"


def _place(folder: Path) -> Path:
    name = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:32]
    return cache_folder() / "headers" / f"{name}.json"


def is_remembered(folder: Path) -> bool:
    """Whether headers of this folder are kept."""
    try:
        return _place(folder).is_file()
    except OSError:
        return False


def load_headers(folder: Path, files: Mapping[str, str]) -> dict[str, XrmHeader]:
    """Return the known headers of `files` (name -> path) that did not change, by path; empty where none are known."""
    try:
        place = _place(folder)
        if place.stat().st_size > LARGEST:
            return {}
        kept = json.loads(place.read_bytes())
        if kept["format"] != FORMAT:
            return {}
        shared = [_shared_from(values) for values in kept["shared"]]
        found = {}
        for name, (size, changed, which, *own) in kept["files"].items():
            path = files.get(name)
            if path is None:
                continue
            state = os.stat(path)  # noqa: PTH116 - thousands of times
            if (state.st_size, state.st_mtime_ns) == (size, changed):
                found[path] = _header(path, size, shared[which], own)
        return found
    except (OSError, ValueError, TypeError, KeyError, IndexError, RecursionError):
        return {}


def save_headers(folder: Path, files: Mapping[str, str], headers: Mapping[str, object]) -> None:
    """Keep the headers (by path) of the whole files of a folder; does nothing where that cannot be done."""
    shared: dict[tuple[Any, ...], int] = {}
    entries: dict[str, list[Any]] = {}
    now = time.time_ns()
    for name, path in files.items():
        header = headers.get(path)
        if not isinstance(header, XrmHeader):
            continue
        try:
            state = os.stat(path)  # noqa: PTH116 - thousands of times
            name.encode()
        except (OSError, UnicodeEncodeError):
            continue
        if state.st_size != header.size or now - state.st_mtime_ns < _FRESH_NS:
            continue
        which = shared.setdefault(_shared_of(header), len(shared))
        entries[name] = [state.st_size, state.st_mtime_ns, which, *_own_of(header)]
    if not entries:
        return
    data = json.dumps({"format": FORMAT, "shared": [list(map(_plain, s)) for s in shared], "files": entries}).encode()
    if len(data) > LARGEST:
        return
    with contextlib.suppress(OSError, XanesTomoError):
        place = _place(folder)
        atomic_write(place, data)
        others = sorted(place.parent.glob("*.json"), key=lambda p: p.stat().st_mtime_ns)
        for old in others[:-MOST_FOLDERS]:
            old.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    return value.str if isinstance(value, np.dtype) else value


def _shared_from(values: list[Any]) -> dict[str, Any]:
    known = dict(zip(_SHARED, values, strict=True))
    for name in ("dtype", "reference_dtype"):
        if known[name] is not None:
            known[name] = np.dtype(str(known[name]))
            if known[name].kind not in "iuf":
                raise ValueError(name)
    for name in ("images", "references"):
        known[name] = tuple(tuple((int(a), int(b)) for a, b in runs) for runs in known[name])
    for name in ("shape", "mosaic"):
        a, b = known[name]
        known[name] = (int(a), int(b))
    return known


def _header(path: str, size: int, shared: Mapping[str, Any], own: list[Any]) -> XrmHeader:
    values = [tuple(map(float, v)) if isinstance(v, list) else v for v in own]
    each: dict[str, Any] = dict(zip(_OWN, values, strict=True))
    if not isinstance(each["acq_file_name"], str) or not isinstance(each["modified_s"], float):
        raise TypeError("own")
    return XrmHeader(path=path, size=size, **shared, **each)
