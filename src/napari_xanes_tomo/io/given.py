"""Projections and volumes that were aligned elsewhere, as a `Series` that enters at the registration check.

Aligned projections are carried as the counts behind them in an even beam, ``N exp(-absorbance)``, so that they take the
way of every other measurement. Of a volume ``(y, z, x)`` the frames are its planes ``(y, x)``, in 1/cm; an image of 2-D
XANES is one such plane, absorbance.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from napari_xanes_tomo.model import EnergyScan, FlatSet, Problem, Progress, Series, XanesTomoError, no_progress
from napari_xanes_tomo.recipe import GivenParameters, Recipe

from .exchange import SUFFIXES, is_hdf5
from .h5frames import opened
from .scan import is_scan_folder, open_series
from .volumes import (
    AlignedProjections,
    Block,
    RegisteredVolumes,
    image_stack_in,
    named_images,
    open_images,
    open_projections,
    open_volumes,
)

__all__ = ["BEAM", "FloatFrames", "given_kind", "open_given", "open_input"]

BEAM = 1e6  # counts of the even beam: exp(-absorbance) keeps 7 digits, up to an absorbance of 14
_PER_CM = {"1/cm": 1.0, "cm-1": 1.0, "cm^-1": 1.0, "1/mm": 10.0, "1/um": 1e4, "1/µm": 1e4, "1/nm": 1e7}
_PICTURES = (".tif", ".tiff")


def _runs(indices: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return (place, first, last + 1) of every run of numbers that follow each other."""
    order = np.asarray(indices, dtype=np.int64)
    breaks = np.flatnonzero(np.diff(order) != 1) + 1
    pairs = zip([0, *breaks.tolist()], [*breaks.tolist(), len(order)], strict=True)
    return [(a, int(order[a]), int(order[b - 1]) + 1) for a, b in pairs] if len(order) else []


def _stamp(block: Block, *more: Any) -> str:
    """Return 16 hex digits that change when the files of a block change."""
    stamps = []
    for place in block.pictures or (block.path,):
        path = Path(place)
        try:
            stat = path.stat()
            newest = max((f.stat().st_mtime_ns for f in path.rglob("*")), default=0) if path.is_dir() else 0
            stamps.append((path.name, 0 if path.is_dir() else stat.st_size, newest or stat.st_mtime_ns))
        except (OSError, ValueError):
            stamps.append((path.name, -1, -1))
    own = (stamps, block.kind, block.dataset, block.lead, block.shape, more)
    return hashlib.sha256(repr(own).encode()).hexdigest()[:16]


def _finite(values: npt.NDArray[np.float32], what: str) -> npt.NDArray[np.float32]:
    bad = int(values.size - np.count_nonzero(np.isfinite(values)))
    if bad:
        raise XanesTomoError(f"{what}: expected numbers everywhere, got {bad} values that are none (NaN or infinite)")
    return values


class FloatFrames:
    """What frames of numbers, read by rows, have in common; a subclass has `frame_shape` and `read_rows`."""

    @property
    def frame_shape(self) -> tuple[int, int]:
        """(rows, columns) of every frame."""
        raise NotImplementedError

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values."""
        return np.dtype(np.float32)

    def read(self, index: int) -> npt.NDArray[Any]:
        """Return frame `index`, shape (y, x)."""
        frame: npt.NDArray[Any] = self.read_rows((index,), 0, self.frame_shape[0])[0]
        return frame

    def read_rows(self, indices: Sequence[int], y0: int, y1: int) -> npt.NDArray[Any]:
        """Return rows ``y0:y1`` of the frames `indices`, shape (frame, y1 - y0, x)."""
        raise NotImplementedError


@dataclass(frozen=True)
class AbsorbanceFrames(FloatFrames):
    """Aligned projections (angle, y, x) as counts in an even beam; picklable, nothing stays open."""

    block: Block

    @property
    def paths(self) -> tuple[str, ...]:
        """The files behind the frames."""
        return self.block.pictures or (self.block.path,)

    @property
    def frame_shape(self) -> tuple[int, int]:
        """(rows, columns) of every frame."""
        return self.block.shape[1], self.block.shape[2]

    def __len__(self) -> int:
        return self.block.shape[0]

    def read_rows(self, indices: Sequence[int], y0: int, y1: int) -> npt.NDArray[Any]:
        """Return rows ``y0:y1`` of the frames `indices`, shape (frame, y1 - y0, x)."""
        out = np.empty((len(indices), y1 - y0, self.frame_shape[1]), dtype=np.float32)
        for at, first, end in _runs(indices):
            values = _finite(self.block.read(first, end, slice(y0, y1)), Path(self.block.path).name)
            np.multiply(np.exp(-values), np.float32(BEAM), out=out[at : at + end - first])
        return out

    def fingerprint(self) -> str:
        """Return 16 hex digits that change when the files behind the frames change."""
        return _stamp(self.block, "projections")


@dataclass(frozen=True)
class EvenBeam(FloatFrames):
    """One flat frame of the even beam that aligned projections are carried in."""

    shape: tuple[int, int]

    @property
    def frame_shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.shape

    def __len__(self) -> int:
        return 1

    def read_rows(self, indices: Sequence[int], y0: int, y1: int) -> npt.NDArray[Any]:
        """Return rows ``y0:y1``, shape (frame, y1 - y0, x)."""
        return np.full((len(indices), y1 - y0, self.shape[1]), BEAM, dtype=np.float32)

    def fingerprint(self) -> str:
        """Return a text that is always the same."""
        return "even beam"


@dataclass(frozen=True)
class PlaneFrames(FloatFrames):
    """The planes (y, x) of a volume (y, z, x), numbered by z, in 1/cm; picklable, nothing stays open."""

    block: Block
    factor: float

    @property
    def paths(self) -> tuple[str, ...]:
        """The files behind the volume."""
        return self.block.pictures or (self.block.path,)

    @property
    def frame_shape(self) -> tuple[int, int]:
        """(rows, columns) of every plane."""
        return self.block.shape[0], self.block.shape[2]

    def __len__(self) -> int:
        return self.block.shape[1]

    def read_rows(self, indices: Sequence[int], y0: int, y1: int) -> npt.NDArray[Any]:
        """Return rows ``y0:y1`` of the planes `indices`, shape (plane, y1 - y0, x)."""
        out = np.empty((len(indices), y1 - y0, self.frame_shape[1]), dtype=np.float32)
        for at, first, end in _runs(indices):
            values = self.block.read(y0, y1, slice(first, end)).transpose(1, 0, 2)
            out[at : at + end - first] = values * np.float32(self.factor)
        return _finite(out, f"{Path(self.block.path).name}, rows {y0} to {y1 - 1}")

    def fingerprint(self) -> str:
        """Return 16 hex digits that change when the files behind the volume change."""
        return _stamp(self.block, "volumes", self.factor)


# ------------------------------------------------------------------------------------------------------- opening


def given_kind(path: str | os.PathLike[str], parameters: GivenParameters = GivenParameters()) -> str:  # noqa: B008
    """Return what lies at `path`: ``raw``, ``projections``, ``volumes`` or ``images``; no array is read.

    TXM_Sandbox files, arrays ``(energy, y, z, x)``, OME-Zarr and TIFF stacks are volumes, unless angles are told.
    ``exchange/data`` of floats with angles and without flats are aligned projections. Arrays ``(energy, y, x)`` with an
    energy each, and pictures named each by an energy, are images.
    """
    path = Path(path)
    if parameters.kind != "auto":
        return parameters.kind
    try:
        if path.is_dir():
            if any((path / n).is_file() for n in ("zarr.json", ".zgroup", ".zarray")):
                return "volumes"
            if is_scan_folder(path):
                return "raw"
            names = [p for p in sorted(path.iterdir()) if not p.name.startswith(".")]
            first = next((p for p in names if p.suffix.lower() in SUFFIXES and is_hdf5(p)), None)
            if first is not None:
                return _kind_of_hdf5(first)
            inside = [q for p in names if p.is_dir() for q in p.iterdir()]
            if named_images(path):
                return "images"
            if any(p.suffix.lower() in _PICTURES for p in (*names, *inside)):
                told = parameters.theta_deg or (path / "projections.csv").is_file()
                return "projections" if told else "volumes"
            if any(p.is_dir() and (p / "zarr.json").is_file() for p in names):
                return "volumes"
            return "raw"
        if path.suffix.lower() in _PICTURES:
            return "projections" if parameters.theta_deg else "volumes"
        return _kind_of_hdf5(path) if is_hdf5(path) else "raw"
    except (OSError, XanesTomoError):
        return "raw"


def _kind_of_hdf5(path: Path) -> str:
    with opened(path) as file:
        if "exchange/theta" not in file and image_stack_in(file) is not None:
            return "images"
        data = file.get("exchange/data")
        if data is not None and getattr(data, "ndim", 0) in (3, 4):
            if "exchange/theta" in file:
                aligned = data.dtype.kind == "f" and "exchange/data_white" not in file
                return "projections" if aligned else "raw"
            return "volumes"
        places = ("registration_results/reg_results/registered_xanes3D", "data", "volume", "reconstruction")
        if any(getattr(file.get(name), "ndim", 0) in (3, 4) for name in places):
            return "volumes"
    return "raw"


def open_given(
    path: str | os.PathLike[str],
    parameters: GivenParameters = GivenParameters(),  # noqa: B008 - frozen
) -> Series:
    """Open aligned projections or registered volumes that were made elsewhere, for `Workflow`. No array is read.

    Parameters
    ----------
    path : path-like
        A file or folder; see `open_volumes` and `open_projections`.
    parameters : GivenParameters
        What the files do not tell.

    Raises
    ------
    XanesTomoError
        The energies, the size of a pixel, the angles or the unit are not known, or the arrays do not fit together.
    """
    kind = given_kind(path, parameters)
    energies = list(parameters.energies_ev) or None
    opened_as: RegisteredVolumes | AlignedProjections
    if kind == "volumes":
        opened_as = open_volumes(path, energies_ev=energies, voxel_nm=parameters.pixel_nm)
    elif kind == "projections":
        theta = list(parameters.theta_deg) or None
        opened_as = open_projections(path, energies_ev=energies, theta_deg=theta, pixel_nm=parameters.pixel_nm)
    elif kind == "images":
        opened_as = open_images(path, energies_ev=energies, pixel_nm=parameters.pixel_nm)
    else:
        raise XanesTomoError(
            f"{Path(path).name}: expected projections, volumes or images made elsewhere, got raw frames"
        )
    name = opened_as.name
    if not np.isfinite(opened_as.energies_ev).all():
        raise XanesTomoError(
            f"{name}: expected the energy of every array, in its file or its name (..._8353.00_eV), got "
            f"{np.count_nonzero(np.isfinite(opened_as.energies_ev))} of {len(opened_as)}; set given.energies_ev in the "
            "recipe"
        )
    if len(opened_as) < 2:
        raise XanesTomoError(f"{name}: expected at least two energies, got {len(opened_as)}")
    pixel = opened_as.voxel_nm if isinstance(opened_as, RegisteredVolumes) else opened_as.pixel_nm
    if not np.isfinite(pixel):
        raise XanesTomoError(f"{name}: expected the size of a pixel, the files do not tell it; set given.pixel_nm")
    if isinstance(opened_as, RegisteredVolumes):
        scans = _volumes(opened_as, parameters, pixel) if kind == "volumes" else _images(opened_as, pixel)
    else:
        scans = _projections(opened_as, pixel)
    text = f"{kind} made elsewhere: flats, jitter correction and energy registration are not done again"
    counted = (len(scans), sum(len(s) for s in scans), sum(len(f.frames) for s in scans for f in s.flats))
    return Series(Path(path).stem, scans, (Problem("info", "given", text),), counted)


def _volumes(found: RegisteredVolumes, parameters: GivenParameters, voxel_nm: float) -> tuple[EnergyScan, ...]:
    unit = found.unit.strip().replace("μ", "µ") if parameters.unit == "auto" else parameters.unit
    factor = 1e7 / voxel_nm if unit in ("1/voxel", "1/pixel") else _PER_CM.get(unit)
    if factor is None:
        raise XanesTomoError(
            f"{found.name}: expected the unit of the volumes (1/cm, 1/mm, 1/um, or 1/voxel as TomoPy gives), the files "
            f"tell {found.unit or 'none'}; set given.unit in the recipe"
        )
    n = found.shape[1]
    return tuple(
        _scan(float(energy), np.zeros(n), PlaneFrames(block, factor), (), voxel_nm, "volumes")
        for energy, block in zip(found.energies_ev, found.blocks, strict=True)
    )


def _images(found: RegisteredVolumes, pixel_nm: float) -> tuple[EnergyScan, ...]:
    return tuple(
        _scan(float(energy), np.zeros(1), PlaneFrames(block, 1.0), (), pixel_nm, "images")
        for energy, block in zip(found.energies_ev, found.blocks, strict=True)
    )


def _projections(found: AlignedProjections, pixel_nm: float) -> tuple[EnergyScan, ...]:
    scans = []
    flat = FlatSet(EvenBeam(found.shape), np.ones(1), ("ok",), ("even beam",))
    for energy, theta, block in zip(found.energies_ev, found.theta_deg, found.blocks, strict=True):
        if theta.size != block.shape[0] or not np.isfinite(theta).all():
            raise XanesTomoError(
                f"{Path(block.path).name}: expected an angle for each of {block.shape[0]} projections, got "
                f"{np.count_nonzero(np.isfinite(theta))}; set given.theta_deg in the recipe"
            )
        scans.append(_scan(float(energy), theta, AbsorbanceFrames(block), (flat,), pixel_nm, "projections"))
    return tuple(scans)


def _scan(
    energy: float,
    theta: npt.NDArray[np.float64],
    frames: AbsorbanceFrames | PlaneFrames,
    flats: tuple[FlatSet, ...],
    pixel_nm: float,
    kind: str,
) -> EnergyScan:
    n = len(theta)
    return EnergyScan(
        energy, np.asarray(theta, dtype=float), frames, np.ones(n), ("ok",) * n, flats, np.zeros(n, dtype=np.int64), 1,
        pixel_nm, np.full(n, np.nan), header_pixel_size_nm=pixel_nm, given=kind,
    )  # fmt: skip


def open_input(
    path: str | os.PathLike[str],
    recipe: Recipe = Recipe(),  # noqa: B008 - frozen
    *,
    script: str | os.PathLike[str] | None = None,
    verify: bool = True,
    progress: Progress = no_progress,
) -> Series:
    """Open whatever a run can begin with: a raw measurement, or what was aligned elsewhere; see `open_given`."""
    if script is None and given_kind(path, recipe.given) != "raw":
        if recipe.scan.bin > 1:
            raise XanesTomoError(
                f"{Path(path).name}: binning (scan.bin) is for raw frames; maps.voxel_px makes larger voxels"
            )
        return open_given(path, recipe.given)
    return open_series(path, recipe.scan, script=script, verify=verify, progress=progress)
