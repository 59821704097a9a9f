"""Measurements in HDF5: NXtomo, DataExchange (APS) and the files of NSLS-II FXI as a `Series`.

One file an energy in a folder, several entries in a file, or an energy axis in one file. Pixels stay in the
file and are read when they are asked for. Volumes and projections that were aligned elsewhere are read by
`open_volumes` and `open_projections`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from napari_xanes_tomo.model import EnergyScan, FlatSet, Problem, Progress, Series, XanesTomoError, no_progress
from napari_xanes_tomo.pixels import with_known_pixels
from napari_xanes_tomo.recipe import ScanParameters

from .h5frames import H5Frames, opened

__all__ = ["holds_scan", "is_exchange", "open_exchange"]

SUFFIXES = (".h5", ".hdf5", ".hdf", ".nx", ".nxs", ".nexus")
NAN = float("nan")
_FEW_ANGLES = 8
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_ENERGY = re.compile(r"(?<![0-9.])(\d{3,6}(?:\.\d+)?)_?eV(?![A-Za-z])", re.IGNORECASE)


# ---------------------------------------------------------------------------------------------- values and units

_LENGTH = {"m": 1e9, "mm": 1e6, "um": 1e3, "µm": 1e3, "μm": 1e3, "micron": 1e3, "microns": 1e3, "nm": 1.0}
_ENERGY_UNIT = {"ev": 1.0, "kev": 1e3, "j": 1 / 1.602176634e-19, "joule": 1 / 1.602176634e-19}
_ANGLE = {"rad": 180 / math.pi, "radian": 180 / math.pi, "radians": 180 / math.pi}
_TIME = {"ms": 1e-3, "us": 1e-6, "µs": 1e-6}


def _text(value: Any) -> str:
    value = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    if isinstance(value, np.ndarray):
        return _text(value.ravel()[0]) if value.size else ""
    return str(value).strip()


def _values(file: Any, paths: Sequence[str]) -> tuple[npt.NDArray[np.float64], str] | None:
    """Return the numbers of the first dataset that is there, and its unit in lower case."""
    for path in paths:
        node = file.get(path)
        if node is None or not hasattr(node, "shape"):
            continue
        if node.dtype.kind not in "iuf":
            found = re.match(r"\s*([0-9.eE+-]+)\s*([A-Za-zµμ]*)", _text(node[()]))
            if found is None:
                continue
            try:
                return np.array([float(found.group(1))]), found.group(2).lower()
            except ValueError:
                continue
        if node.size > 50_000_000:
            continue
        unit = _text(node.attrs.get("units", node.attrs.get("unit", ""))).lower()
        return np.asarray(node[()], dtype=np.float64), unit
    return None


def energies_in(file: Any, paths: Sequence[str]) -> npt.NDArray[np.float64]:
    """Photon energies in eV, however many; a number below 200 without a unit is keV. Empty when there is none."""
    found = _values(file, paths)
    if found is None:
        return np.empty(0)
    values, unit = np.atleast_1d(found[0]), found[1]
    usual = np.where(np.abs(values) < 200, 1e3, 1.0)
    energies: npt.NDArray[np.float64] = np.round(values * _ENERGY_UNIT.get(unit, usual), 6)  # keV: not exact
    energies[~(np.isfinite(energies) & (energies > 0))] = NAN
    return energies


def _pixel_nm(file: Any, paths: Sequence[str], unit: str) -> float:
    found = _values(file, paths)
    if found is None or not found[0].size:
        return NAN
    value = float(np.ravel(found[0])[0]) * _LENGTH.get(found[1] or unit, _LENGTH[unit])
    return value if math.isfinite(value) and value > 0 else NAN


def pixel_in(file: Any) -> float:
    """Size of a pixel or voxel of a DataExchange file, nm; NaN when it is not there."""
    return _pixel_nm(file, _APS_PIXEL, "um")


def theta_in(file: Any, paths: Sequence[str]) -> npt.NDArray[np.float64] | None:
    """Return angles in degrees; None when they are not there."""
    found = _values(file, paths)
    return None if found is None else found[0] * _ANGLE.get(found[1], 1.0)


def _seconds(file: Any, paths: Sequence[str], n: int) -> npt.NDArray[np.float64]:
    found = _values(file, paths)
    if found is None or found[0].size not in (1, n):
        return np.full(n, NAN)
    return np.broadcast_to(np.ravel(found[0]) * _TIME.get(found[1], 1.0), (n,)).copy()


# ---------------------------------------------------------------------------------------------- what a file holds


@dataclass
class _Stack:
    """One energy in one file."""

    energy: float
    data: str
    frames: npt.NDArray[np.int64]
    theta: npt.NDArray[np.float64]
    lead: int | None = None
    flats: list[tuple[str, npt.NDArray[np.int64]]] = field(default_factory=list)
    half: npt.NDArray[np.int64] | None = None
    dark: str = ""
    darks: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    exposure: npt.NDArray[np.float64] | None = None  # of the projections
    flat_exposure: list[npt.NDArray[np.float64]] = field(default_factory=list)
    time: npt.NDArray[np.float64] | None = None
    invalid: frozenset[int] = frozenset()  # places in `frames`
    pixel_nm: float = NAN


def _frames_in(file: Any, path: str, dims: Sequence[int]) -> Any | None:
    """Return a dataset of frames: so many axes, numbers."""
    node = file.get(path)
    if node is None or not hasattr(node, "shape") or node.ndim not in dims or node.dtype.kind not in "iuf":
        return None
    return node if 0 not in node.shape else None


def _nxtomo(file: Any) -> list[_Stack]:
    """Every NXtomo entry: projections, flats and darks in one stack, told apart by ``image_key``."""
    stacks = []
    for name in file:
        entry = file.get(name)
        if not hasattr(entry, "get"):
            continue
        data = _frames_in(entry, "instrument/detector/data", (3,))
        if data is None:
            continue
        if _text(entry["definition"][()]) != "NXtomo" if "definition" in entry else "image_key" not in data.parent:
            continue
        n = data.shape[0]
        keys = _values(entry, ("instrument/detector/image_key_control", "instrument/detector/image_key"))
        key = np.zeros(n, dtype=int) if keys is None else np.ravel(keys[0]).astype(int)
        theta = theta_in(entry, ("sample/rotation_angle", "data/rotation_angle"))
        if len(key) != n or theta is None or theta.size != n:
            text = f"expected an image_key and a rotation_angle for each of {n} frames in {name}"
            raise XanesTomoError(f"{text}, got {len(key)} and {0 if theta is None else theta.size}")
        theta = np.ravel(theta)
        where = ("beam/incident_energy", "instrument/beam/incident_energy", "instrument/monochromator/energy")
        energy = energies_in(entry, where)
        if energy.size != n:
            energy = np.full(n, energy[0] if energy.size else NAN)
        exposure = _seconds(entry, ("instrument/detector/count_time",), n)
        time = _seconds(entry, ("instrument/detector/start_time",), n)
        sizes = ("sample/x_pixel_size", "instrument/detector/x_pixel_size")
        pixel = _pixel_nm(entry, sizes, "m")
        told = _values(entry, ("instrument/detector/flat_group",))
        group = None if told is None or told[0].size != n else np.ravel(told[0]).astype(int)
        for value in dict.fromkeys(energy.tolist()) if not np.isnan(energy).any() else [NAN]:
            own = np.flatnonzero(energy == value) if value == value else np.arange(n)
            stacks.append(_by_key(data.name, own, key, theta, exposure, time, value, pixel, group))
    return stacks


def _by_key(
    data: str,
    own: npt.NDArray[np.int64],
    key: npt.NDArray[np.integer[Any]],
    theta: npt.NDArray[np.float64],
    exposure: npt.NDArray[np.float64],
    time: npt.NDArray[np.float64],
    energy: float,
    pixel: float,
    group: npt.NDArray[np.integer[Any]] | None = None,
) -> _Stack:
    """Sort frames by their key: 0 projection, 1 flat, 2 dark, 3 invalid, others are left out.

    Flats belong together, and to projections, as `group` tells; without it by the order of the frames.
    """
    frames = own[(key[own] == 0) | (key[own] == 3)]
    stack = _Stack(energy, data, frames, theta[frames], dark=data, darks=own[key[own] == 2], pixel_nm=pixel)
    flats = own[key[own] == 1]
    if group is not None and flats.size:
        names = np.unique(group[flats])
        for name in names:
            stack.flats.append((data, flats[group[flats] == name]))
            stack.flat_exposure.append(exposure[stack.flats[-1][1]])
        stack.half = _nearest(names, group[frames])
        flats = flats[:0]
    between = [np.count_nonzero(frames < f) for f in flats]  # flats with the same projections before are one group
    for count in dict.fromkeys(between):
        members = flats[np.array(between) == count]
        stack.flats.append((data, members))
        stack.flat_exposure.append(exposure[members])
    if flats.size:
        begins = np.array(list(dict.fromkeys(between)))
        stack.half = np.maximum(np.searchsorted(begins, np.arange(len(frames)), side="right") - 1, 0)
    stack.exposure, stack.time = exposure[frames], time[frames]
    stack.invalid = frozenset(np.flatnonzero(key[frames] == 3).tolist())
    return stack


_APS_ENERGY = ("measurement/instrument/monochromator/energy", "measurement/instrument/beam/energy")
_APS_PIXEL = (
    "measurement/instrument/detector/pixel_size_x",
    "measurement/instrument/detector/pixel_size",
    "measurement/instrument/detection_system/objective/resolution",
    "measurement/instrument/detector/actual_pixel_size_x",
)


def _data_exchange(file: Any) -> list[_Stack]:
    """DataExchange: ``data``, ``data_white``, ``data_dark``, ``theta`` in ``exchange``, or ``exchange_N`` an energy."""
    stacks = []
    for name in sorted((n for n in file if re.fullmatch(r"exchange(_\d+)?", n)), key=lambda n: int(n[9:] or -1)):
        group = file[name]
        data = _frames_in(group, "data", (3, 4))
        theta = None if data is None else theta_in(group, ("theta",))
        if data is None or theta is None:
            continue
        n = data.shape[-3]
        leads = [None] if data.ndim == 3 else list(range(data.shape[0]))
        theta = np.broadcast_to(theta, (len(leads), n)) if theta.shape[-1:] == (n,) and theta.ndim < 3 else None
        if theta is None:
            raise XanesTomoError(f"expected one theta for each of {n} projections in {name}")
        energies = energies_in(group, ("energy",))
        energies = energies if energies.size else energies_in(file, _APS_ENERGY)
        if energies.size != len(leads):
            energies = np.full(len(leads), energies[0] if energies.size == 1 and len(leads) == 1 else NAN)
        exposure = _seconds(group, ("exposure_time",), n)
        if not np.isfinite(exposure).all():
            exposure = _seconds(file, ("measurement/instrument/detector/exposure_time",), n)
        pixel = _pixel_nm(file, _APS_PIXEL, "um")
        for i, lead in enumerate(leads):
            stack = _Stack(float(energies[i]), data.name, np.arange(n), theta[i].astype(float), lead, pixel_nm=pixel)
            _add_white_dark(stack, group, data, exposure, i)
            stack.exposure, stack.time = exposure, _seconds(group, ("time",), n)
            stacks.append(stack)
    return stacks


def _add_white_dark(stack: _Stack, group: Any, data: Any, exposure: npt.NDArray[np.float64], place: int) -> None:
    n = data.shape[-3]
    white, dark = _frames_in(group, "data_white", (data.ndim,)), _frames_in(group, "data_dark", (data.ndim,))
    measured = dark is not None and bool(dark.attrs.get("measured", 1))  # readers elsewhere want one in any case
    if measured and dark is not None and dark.shape[-2:] == data.shape[-2:]:
        stack.dark, stack.darks = dark.name, np.arange(dark.shape[-3])
    if white is None or white.shape[-2:] != data.shape[-2:]:
        return
    m = white.shape[-3]
    # Which flats belong together, and to which projections; without a word all to all.
    kept = [_values(group, (name,)) for name in ("flat_group", "projection_flat_group", "exposure_time_white")]
    of_flat, of_frame, flat_exposure = (None if k is None else k[0].reshape(-1, k[0].shape[-1]) for k in kept)
    groups = np.zeros(m, dtype=int)
    stack.half = np.zeros(n, dtype=np.int64)
    if of_flat is not None and of_frame is not None and (of_flat.shape[1], of_frame.shape[1]) == (m, n):
        groups = of_flat[place % len(of_flat)].astype(int)
        stack.half = of_frame[place % len(of_frame)].astype(np.int64)
    if flat_exposure is None or flat_exposure.shape[1] != m:
        flat_exposure = np.full((1, m), np.median(exposure))
    names = np.unique(groups[groups >= 0])  # -1: filled up to the number of flats of another energy
    for value in names:
        members = np.flatnonzero(groups == value)
        stack.flats.append((white.name, members))
        stack.flat_exposure.append(flat_exposure[place % len(flat_exposure)][members])
    stack.half = _nearest(names, stack.half) if len(names) else None


def _nearest(names: npt.NDArray[np.integer[Any]], wanted: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
    """Return the place in `names` (ascending) of the group nearest to every one wanted, the former of two."""
    return np.asarray(np.abs(wanted[:, None] - names[None, :]).argmin(axis=1), dtype=np.int64)


def _fxi(file: Any) -> list[_Stack]:
    """NSLS-II FXI: ``img_tomo``, ``img_bkg``, ``img_dark``, ``angle``, ``X_eng``."""
    data = _frames_in(file, "img_tomo", (3,))
    theta = theta_in(file, ("angle",))
    if data is None or theta is None or theta.size != data.shape[0]:
        return []
    n = data.shape[0]
    energy = energies_in(file, ("X_eng",))
    pixel = _pixel_nm(file, ("Pixel Size", "pixel_size", "pxl_sz"), "nm")
    stack = _Stack(float(energy[0]) if energy.size else NAN, data.name, np.arange(n), np.ravel(theta), pixel_nm=pixel)
    for name in ("img_bkg", "img_bkg_avg"):
        flats = _frames_in(file, name, (3,))
        if flats is not None and flats.shape[1:] == data.shape[1:]:
            stack.flats = [(flats.name, np.arange(flats.shape[0]))]
            stack.half = np.zeros(n, dtype=np.int64)
            break
    for name in ("img_dark", "img_dark_avg"):
        darks = _frames_in(file, name, (3,))
        if darks is not None and darks.shape[1:] == data.shape[1:]:
            stack.dark, stack.darks = darks.name, np.arange(darks.shape[0])
            break
    return [stack]


_READERS: dict[str, Callable[[Any], list[_Stack]]] = {
    "NXtomo": _nxtomo,
    "DataExchange": _data_exchange,
    "NSLS-II FXI": _fxi,
}


# ---------------------------------------------------------------------------------------------- the series


def is_hdf5(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins like HDF5; never raises."""
    try:
        with Path(path).open("rb") as file:
            return file.read(8) == _SIGNATURE
    except (OSError, ValueError):
        return False


def _candidates(folder: Path) -> list[Path]:
    try:
        names = [p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES]
    except OSError:
        return []
    return sorted(names, key=lambda p: [int(s) if s.isdigit() else s.lower() for s in re.split(r"(\d+)", p.name)])


def is_exchange(path: str | os.PathLike[str]) -> bool:
    """Whether a file is HDF5, or a folder holds such files and neither ``.xrm`` files nor a run; never raises."""
    path = Path(path)
    try:
        if path.is_dir():
            if any(p.suffix.lower() in (".xrm", ".txrm") or p.name == "journal.jsonl" for p in path.iterdir()):
                return False
            return any(is_hdf5(p) for p in _candidates(path))
        return path.is_file() and is_hdf5(path)
    except (OSError, ValueError):
        return False


def holds_scan(path: str | os.PathLike[str]) -> bool:
    """Whether an HDF5 file, or the first one of a folder, holds projections of a known format; never raises.

    Only its names and angles are read. A file of a known format with something wrong in it is one as well.
    """
    path = Path(path)
    try:
        if not is_exchange(path):
            return False
        first = next(p for p in _candidates(path) if is_hdf5(p)) if path.is_dir() else path
        with opened(first) as file:
            for reader in _READERS.values():
                try:
                    if reader(file):
                        return True
                except XanesTomoError:
                    return True
    except (XanesTomoError, OSError, ValueError, StopIteration):
        return False
    return False


def open_exchange(
    path: str | os.PathLike[str],
    params: ScanParameters = ScanParameters(),  # noqa: B008 - frozen
    *,
    progress: Progress = no_progress,
) -> Series:
    """Open a measurement in HDF5: NXtomo, DataExchange, NSLS-II FXI. No pixel is read.

    Parameters
    ----------
    path : path-like
        One file, or a folder with one file an energy.
    params : ScanParameters
        Sense of rotation, row order, binning; the pixel size law where a file does not tell its own.
    progress : Progress
        Told about files read.

    Returns
    -------
    Series
        In the order of the file names, and within a file of its entries. Dark frames are averaged and
        subtracted. What is odd is in its `problems`.

    Raises
    ------
    XanesTomoError
        Nothing there can be understood as a measurement.
    """
    path = Path(path)
    files = [p for p in _candidates(path) if is_hdf5(p)] if path.is_dir() else [path]
    problems: list[Problem] = []
    found: list[tuple[Path, _Stack, tuple[int, int], np.dtype[Any]]] = []
    kinds = set()
    for number, file_path in enumerate(files):
        progress("reading headers", number, len(files))
        try:
            kind, stacks = _stacks_in(file_path)
        except XanesTomoError as error:
            text = str(error).removeprefix(f"{file_path.name}: ")
            problems.append(Problem("error", "corrupt", text, file_path.name))
            continue
        if not stacks:
            text = "expected NXtomo, DataExchange or NSLS-II FXI data in it, got none: left out"
            problems.append(Problem("warning", "other-format", text, file_path.name))
            continue
        kinds.add(kind)
        found += [(file_path, *stack) for stack in stacks]
    progress("reading headers", len(files), len(files))
    if not found:
        why = f"{problems[0].file}: {problems[0].message}" if problems else "no HDF5 file is there"
        raise XanesTomoError(
            f"{path.name}: expected projections as NXtomo (instrument/detector/data), DataExchange (exchange/data and "
            f"theta) or NSLS-II FXI (img_tomo): {why.removeprefix(path.name + ': ')}"
        )
    scans = [_scan(file_path, stack, shape, dtype, params, problems) for file_path, stack, shape, dtype in found]
    expected = (len(scans), sum(len(s) for s in scans), sum(len(f.frames) for s in scans for f in s.flats))
    name = path.stem if path.is_file() else path.resolve().name
    return with_known_pixels(Series(name, tuple(scans), tuple(problems), expected))


def _stacks_in(path: Path) -> tuple[str, list[tuple[_Stack, tuple[int, int], np.dtype[Any]]]]:
    """Return the format of a file, and its stacks with the shape and type of their frames."""
    with opened(path) as file:
        for kind, reader in _READERS.items():
            try:
                stacks = reader(file)
            except XanesTomoError as error:
                raise XanesTomoError(f"{path.name}: {error}") from None
            if stacks:
                named = _ENERGY.findall(path.name)
                if len(stacks) == 1 and stacks[0].energy != stacks[0].energy and named:
                    stacks = [replace(stacks[0], energy=float(named[-1]))]
                return kind, [(s, tuple(file[s.data].shape[-2:]), file[s.data].dtype) for s in stacks]
    return "", []


def _scan(
    path: Path,
    stack: _Stack,
    shape: tuple[int, int],
    dtype: np.dtype[Any],
    params: ScanParameters,
    problems: list[Problem],
) -> EnergyScan:
    n, name = len(stack.frames), path.name
    energy = stack.energy if stack.energy == stack.energy else None

    def say(severity: str, code: str, text: str) -> None:
        problems.append(Problem(severity, code, text, name, energy))

    def source(dataset: str, indices: npt.NDArray[np.int64], stored: np.dtype[Any]) -> H5Frames:
        return H5Frames(
            str(path), dataset, tuple(indices.tolist()), shape, stored, stack.lead,
            stack.dark if stack.darks.size else "", tuple(stack.darks.tolist()), params.flip_rows, params.bin,
        )  # fmt: skip

    status = ["excluded:marked invalid in the file" if i in stack.invalid else "ok" for i in range(n)]
    if stack.invalid:
        say("info", "invalid", f"{len(stack.invalid)} frames are marked invalid in the file and left out")
    theta = stack.theta * params.theta_sign
    for i in np.flatnonzero(~np.isfinite(theta)):
        status[i] = "unreadable:no-angle"
    if not np.isfinite(theta).all():
        say("error", "no-angle", f"{np.count_nonzero(~np.isfinite(theta))} projections have no angle: left out")
    if energy is None:
        say("error", "no-energy", "expected an energy in the file or in its name (..._8353.00_eV...), got none")
    if stack.darks.size:
        say("info", "darks", f"the mean of {stack.darks.size} dark frames is subtracted")
    if not stack.flats:
        say("error", "no-flats", "no flat in the file; its absorbance cannot be made")
    angles = len({round(float(t), 2) for t, s in zip(theta, status, strict=True) if s == "ok"})
    if angles < _FEW_ANGLES:
        say("error" if n > 1 else "info", "few-angles", f"expected at least {_FEW_ANGLES} usable angles, got {angles}")
    exposure = np.ones(n) if stack.exposure is None else stack.exposure
    flat_exposure = stack.flat_exposure or [np.full(len(f), NAN) for _, f in stack.flats]
    known = np.isfinite(exposure).all() and all(np.isfinite(e).all() for e in flat_exposure)
    if not known or min([exposure.min(initial=1), *(e.min(initial=1) for e in flat_exposure)]) <= 0:
        exposure, flat_exposure = np.ones(n), [np.ones(len(f)) for _, f in stack.flats]
        say("warning", "no-exposure", "tells no exposure times: flats are taken to be exposed like projections")
    if stack.pixel_nm == stack.pixel_nm:
        pixel = stack.pixel_nm * params.bin
    else:
        law = params.pixel_law_slope_nm_per_ev * stack.energy + params.pixel_law_offset_nm
        pixel = law * params.bin
        say("warning", "no-pixel-size", "tells no pixel size: that of the recipe's law is used; correct it there")
    with opened(path) as file:
        flats = tuple(
            FlatSet(
                source(dataset, members, file[dataset].dtype),
                flat_exposure[k],
                ("ok",) * len(members),
                tuple(f"{name}#{i}" for i in members),
            )
            for k, (dataset, members) in enumerate(stack.flats)
        )
    return EnergyScan(
        stack.energy,
        theta,
        source(stack.data, stack.frames, dtype),
        exposure,
        tuple(status),
        flats,
        np.full(n, -1, dtype=np.int64) if stack.half is None else stack.half,
        1,
        pixel,
        np.full(n, NAN) if stack.time is None else stack.time,
        tuple(f"{name}#{i}" for i in stack.frames),
        stack.pixel_nm * params.bin,
    )
