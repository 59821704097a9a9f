"""Registered volumes, aligned projections and registered images made elsewhere: TIFF, HDF5 and OME-Zarr.

They enter the chain at the maps. Nothing is read before it is asked for, and nothing stays open.
"""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from napari_xanes_tomo.model import XanesTomoError

from .exchange import SUFFIXES, energies_in, is_hdf5, pixel_in, theta_in
from .h5frames import opened

__all__ = [
    "AlignedProjections",
    "Block",
    "RegisteredVolumes",
    "image_stack_in",
    "named_images",
    "open_images",
    "open_projections",
    "open_volumes",
]

NAN = float("nan")
_TIFF = (".tif", ".tiff")
_NAMED = re.compile(r"(?<![0-9.])(\d{3,6}(?:\.\d+)?)_?eV(?![A-Za-z])", re.IGNORECASE)
_NUMBERS = re.compile(r"(\d+)")

# Where four-dimensional arrays (energy, y, z, x) are kept, each with the places of its energies (eV or keV).
_TXM_SANDBOX = "registration_results/reg_results/registered_xanes3D"
_FOUR: dict[str, tuple[str, ...]] = {
    _TXM_SANDBOX: (
        "registration_results/reg_results/eng_list",
        "processed_XANES3D/proc_parameters/eng_list",
        "trial_registration/trial_reg_parameters/eng_list",
    ),
    "exchange/data": ("exchange/energy", "measurement/instrument/monochromator/energy"),
    "data": ("energy", "energies", "eng_list"),
}
_THREE = ("exchange/data", "entry/data/data", "data", "volume", "reconstruction")


@dataclass(frozen=True)
class Block:
    """One array (a, y, x) somewhere in a file or a folder of pictures; read by its first axis."""

    kind: str  # h5, tiff, pages, zarr
    path: str
    shape: tuple[int, int, int]
    dataset: str = ""
    lead: int | None = None
    pictures: tuple[str, ...] = ()
    flat: bool = False  # a single image (y, x), read as (y, 1, x); `lead` is its place in the stack

    def read(self, a0: int, a1: int, b: slice = slice(None)) -> npt.NDArray[np.float32]:
        """Return ``[a0:a1, b, :]``."""
        name = Path(self.path).name
        try:
            data = self._read(a0, a1, b)
        except XanesTomoError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever the libraries of three formats raise on damaged files
            why = (str(error).splitlines() or [type(error).__name__])[0][:160]
            raise XanesTomoError(f"{name}: cannot be read ({why})") from None
        expected = (a1 - a0, len(range(*b.indices(self.shape[1]))), self.shape[2])
        if data.shape != expected:
            raise XanesTomoError(f"{name}: expected {expected} values, got {data.shape}; open it again")
        return np.ascontiguousarray(data, dtype=np.float32)

    def _read(self, a0: int, a1: int, b: slice) -> npt.NDArray[Any]:
        if a1 <= a0:
            return np.empty((0, len(range(*b.indices(self.shape[1]))), self.shape[2]), dtype=np.float32)
        head = () if self.lead is None else (self.lead,)
        if self.flat:
            return self._image()[a0:a1, None, :][:, b]
        if self.kind == "h5":
            with opened(self.path) as file:
                return np.asarray(file[self.dataset][(*head, slice(a0, a1), b)])
        if self.kind == "zarr":
            import zarr

            group: Any = zarr.open(self.path, mode="r")
            array = group[self.dataset] if self.dataset else group
            return np.asarray(array[(*head, slice(a0, a1), b)])
        import tifffile

        if self.kind == "pages":
            with tifffile.TiffFile(self.path) as file:
                return np.stack([file.pages[i].asarray()[b] for i in range(a0, a1)])
        return np.stack([tifffile.imread(p)[b] for p in self.pictures[a0:a1]])

    def _image(self) -> npt.NDArray[Any]:
        """Return the single image (y, x)."""
        if self.kind == "h5":
            with opened(self.path) as file:
                return np.asarray(file[self.dataset][self.lead])
        import tifffile

        with tifffile.TiffFile(self.path) as file:
            return np.asarray(file.pages[self.lead or 0].asarray())


@dataclass(frozen=True)
class RegisteredVolumes:
    """Volumes of several energies on one grid, picklable and lazy.

    Attributes
    ----------
    name : str
        Of the file or folder.
    energies_ev : (n,) array
        Photon energies, eV; NaN where nothing tells them.
    voxel_nm : float
        Edge of a voxel, nm; NaN where nothing tells it.
    shape : (int, int, int)
        (y, z, x) of every volume, axis 0 along the rotation axis.
    unit : str
        Of the values, as the files have it; empty where nothing tells it.
    """

    name: str
    energies_ev: npt.NDArray[np.float64]
    voxel_nm: float
    shape: tuple[int, int, int]
    blocks: tuple[Block, ...]
    unit: str = ""

    def __len__(self) -> int:
        return len(self.blocks)

    def read(self, energy: int, y0: int = 0, y1: int | None = None) -> npt.NDArray[np.float32]:
        """Return rows ``y0:y1`` of the volume of one energy, ``(y1 - y0, z, x)`` float32.

        Raises
        ------
        XanesTomoError
            Its file is gone, damaged, or not what it was.
        """
        y1 = self.shape[0] if y1 is None else y1
        if not 0 <= y0 <= y1 <= self.shape[0]:
            raise ValueError(f"expected rows within 0..{self.shape[0]}, got {y0}:{y1}")
        return self.blocks[energy].read(y0, y1)


@dataclass(frozen=True)
class AlignedProjections:
    """Projections of several energies that need no alignment any more, picklable and lazy.

    Attributes
    ----------
    name : str
        Of the file or folder.
    energies_ev : (n,) array
        Photon energies, eV; NaN where nothing tells them.
    theta_deg : tuple of (angles,) arrays
        Of every energy, degrees; empty where nothing tells them.
    pixel_nm : float
        nm; NaN where nothing tells it.
    shape : (int, int)
        (y, x) of a projection.
    """

    name: str
    energies_ev: npt.NDArray[np.float64]
    theta_deg: tuple[npt.NDArray[np.float64], ...]
    pixel_nm: float
    shape: tuple[int, int]
    blocks: tuple[Block, ...]

    def __len__(self) -> int:
        return len(self.blocks)

    def read_rows(self, energy: int, y0: int = 0, y1: int | None = None) -> npt.NDArray[np.float32]:
        """Return rows ``y0:y1`` of all projections of one energy, ``(angle, y1 - y0, x)`` float32.

        Raises
        ------
        XanesTomoError
            Its file is gone, damaged, or not what it was.
        """
        y1 = self.shape[0] if y1 is None else y1
        if not 0 <= y0 <= y1 <= self.shape[0]:
            raise ValueError(f"expected rows within 0..{self.shape[0]}, got {y0}:{y1}")
        return self.blocks[energy].read(0, self.blocks[energy].shape[0], slice(y0, y1))


@dataclass(frozen=True)
class _Found:
    """One array and what its file says about it."""

    block: Block
    energy: float = NAN
    voxel_nm: float = NAN
    unit: str = ""
    theta: npt.NDArray[np.float64] | None = None


def open_volumes(
    path: str | os.PathLike[str],
    *,
    energies_ev: Sequence[float] | npt.NDArray[Any] | None = None,
    voxel_nm: float | None = None,
) -> RegisteredVolumes:
    """Open volumes that were reconstructed and registered elsewhere. No voxel is read.

    Read are ``registered_xanes3D`` files of TXM_Sandbox, DataExchange and plain HDF5 files, OME-Zarr and
    TIFF stacks. Several energies are one 4-D array ``(energy, y, z, x)`` with its energies, or one file
    (TIFF stack, HDF5, OME-Zarr) or one folder of TIFF slices each, the energy in its name (``_8353.00_eV``).
    The first axis of a volume runs along the rotation axis: one TIFF page or slice is one y.

    Parameters
    ----------
    path : path-like
        A file, or a folder.
    energies_ev : sequence of float, optional
        Photon energies, eV, in the order of the file or of the names; instead of what is written there.
    voxel_nm : float, optional
        Edge of a voxel, nm; instead of what is written there.

    Returns
    -------
    RegisteredVolumes
        In the order of the energies.

    Raises
    ------
    XanesTomoError
        Nothing there can be understood as volumes of at least one energy on one grid.
    """
    path = Path(path)
    found = _find(path)
    shapes = {f.block.shape for f in found}
    if len(shapes) > 1:
        listed = ", ".join(sorted(map(str, shapes)))
        raise XanesTomoError(f"{path.name}: expected registered volumes of one shape (y, z, x), got {listed}")
    found, energies = _in_order(path, found, energies_ev)
    sizes = [f.voxel_nm for f in found if f.voxel_nm == f.voxel_nm]
    size = float(voxel_nm) if voxel_nm is not None else (sizes[0] if sizes else NAN)
    units = {f.unit for f in found}
    unit = units.pop() if len(units) == 1 else ""
    return RegisteredVolumes(path.name, energies, size, found[0].block.shape, tuple(f.block for f in found), unit)


def open_projections(
    path: str | os.PathLike[str],
    *,
    energies_ev: Sequence[float] | npt.NDArray[Any] | None = None,
    theta_deg: Sequence[float] | npt.NDArray[Any] | None = None,
    pixel_nm: float | None = None,
) -> AlignedProjections:
    """Open projections that were aligned elsewhere (absorbance). No pixel is read.

    The same formats as `open_volumes`; the first axis of an array runs over the angles. Angles come from the
    file (``exchange/theta``, ``sample/rotation_angle``), for TIFF stacks from ``projections.csv`` beside them (columns
    ``file, page, energy_ev, theta_deg``), or from `theta_deg`, which then holds for all energies.

    Raises
    ------
    XanesTomoError
        Nothing there can be understood as projections of one size, or angles do not fit their number.
    """
    path = Path(path)
    found = _find(path)
    shapes = {f.block.shape[1:] for f in found}
    if len(shapes) > 1:
        listed = ", ".join(sorted(map(str, shapes)))
        raise XanesTomoError(f"{path.name}: expected aligned projections of one size (y, x), got {listed}")
    found, energies = _in_order(path, found, energies_ev)
    angles = []
    for f in found:
        own = np.asarray(theta_deg, dtype=float) if theta_deg is not None else f.theta
        own = np.empty(0) if own is None else np.ravel(own)
        if own.size not in (0, f.block.shape[0]):
            name = Path(f.block.path).name
            raise XanesTomoError(f"{name}: expected {f.block.shape[0]} angles, one a projection, got {own.size}")
        angles.append(own)
    sizes = [f.voxel_nm for f in found if f.voxel_nm == f.voxel_nm]
    size = float(pixel_nm) if pixel_nm is not None else (sizes[0] if sizes else NAN)
    shape = found[0].block.shape[1:]
    return AlignedProjections(path.name, energies, tuple(angles), size, shape, tuple(f.block for f in found))


_IMAGES: dict[str, tuple[str, ...]] = {
    "registration_results/reg_results/registered_xanes2D": ("registration_results/reg_results/eng_list",),
    "exchange/data": ("exchange/energy", "measurement/instrument/monochromator/energy"),
    "data": ("energy", "energies", "eng_list"),
    "img_xanes": ("X_eng",),
}


def image_stack_in(file: Any) -> tuple[str, npt.NDArray[np.float64]] | None:
    """Return the dataset (energy, y, x) of a file and its energies, eV; None without an energy for each."""
    for name, places in _IMAGES.items():
        node = file.get(name)
        if node is not None and getattr(node, "ndim", 0) == 3 and node.dtype.kind in "iuf" and node.shape[0] > 1:
            for place in places:
                energies = energies_in(file, (place,))
                if energies.size == node.shape[0]:
                    return name, energies
    return None


def named_images(folder: Path) -> list[Path]:
    """Return the TIFF pictures of a folder when every one is named by an energy of its own, else none."""
    pictures = sorted((p for p in folder.iterdir() if p.suffix.lower() in _TIFF), key=_natural)
    energies = [_named(p) for p in pictures]
    distinct = len(set(energies)) == len(energies) > 1 and all(e == e for e in energies)
    if not distinct:
        return []
    import tifffile

    with tifffile.TiffFile(pictures[0]) as file:
        return pictures if len(file.pages) == 1 else []


def open_images(
    path: str | os.PathLike[str],
    *,
    energies_ev: Sequence[float] | npt.NDArray[Any] | None = None,
    pixel_nm: float | None = None,
) -> RegisteredVolumes:
    """Open images of 2-D XANES that were registered elsewhere (absorbance), as volumes ``(y, 1, x)``.

    Read are HDF5 arrays ``(energy, y, x)`` with an energy each (TXM_Sandbox ``registered_xanes2D``, DataExchange,
    ``data`` and ``energy``), a TIFF stack with a page an energy, and a folder of TIFF pictures named by their energies.
    Parameters and errors as in `open_volumes`.
    """
    path = Path(path)
    try:
        found = _images(path)
    except XanesTomoError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever the libraries raise on damaged files
        why = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise XanesTomoError(f"{path.name}: cannot be read ({why})") from None
    if not found:
        raise XanesTomoError(
            f"{path.name}: expected images as HDF5 (energy, y, x) with an energy each, a TIFF stack, or TIFF pictures "
            "named by their energies, got none of these"
        )
    shapes = {f.block.shape for f in found}
    if len(shapes) > 1:
        listed = ", ".join(sorted(f"{y} x {x}" for y, _, x in shapes))
        raise XanesTomoError(f"{path.name}: expected registered images of one size (y x x), got {listed}")
    found, energies = _in_order(path, found, energies_ev)
    sizes = [f.voxel_nm for f in found if f.voxel_nm == f.voxel_nm]
    size = float(pixel_nm) if pixel_nm is not None else (sizes[0] if sizes else NAN)
    return RegisteredVolumes(path.name, energies, size, found[0].block.shape, tuple(f.block for f in found))


def _images(path: Path) -> list[_Found]:
    import tifffile

    if path.is_dir():
        out = []
        for picture in named_images(path):
            with tifffile.TiffFile(picture) as file:
                y, x = file.pages[0].shape
                block = Block("pages", str(picture), (y, 1, x), lead=0, flat=True)
                out.append(_Found(block, _named(picture), _tiff_nm(file)))
        return out
    if path.suffix.lower() in _TIFF:
        with tifffile.TiffFile(path) as file:
            size = _tiff_nm(file)
            shapes = [page.shape for page in file.pages]
        return [
            _Found(Block("pages", str(path), (s[0], 1, s[1]), lead=k, flat=True), NAN, size)
            for k, s in enumerate(shapes)
        ]
    if not is_hdf5(path):
        return []
    with opened(path) as file:
        known = image_stack_in(file)
        names = [known[0]] if known else [n for n in _IMAGES if getattr(file.get(n), "ndim", 0) == 3]
        if not names:
            return []
        n, y, x = file[names[0]].shape
        energies = known[1] if known else np.full(n, NAN)
        size = pixel_in(file)
    return [
        _Found(Block("h5", str(path), (y, 1, x), names[0], k, flat=True), float(energies[k]), size) for k in range(n)
    ]


def _in_order(
    path: Path, found: list[_Found], energies_ev: Sequence[float] | npt.NDArray[Any] | None
) -> tuple[list[_Found], npt.NDArray[np.float64]]:
    if energies_ev is None:
        energies = np.array([f.energy for f in found], dtype=float)
    else:
        energies = np.ravel(np.asarray(energies_ev, dtype=float))
        if energies.size != len(found):
            raise XanesTomoError(f"{path.name}: expected {len(found)} energies, one a volume, got {energies.size}")
    order = np.argsort(energies, kind="stable")  # NaN last
    return [found[i] for i in order], energies[order]


# ---------------------------------------------------------------------------------------------- what is there


def _natural(path: Path) -> list[tuple[int, int | str]]:
    return [(0, int(s)) if s.isdigit() else (1, s.lower()) for s in _NUMBERS.split(path.name)]


def _named(path: Path) -> float:
    found = _NAMED.findall(path.name)
    return float(found[-1]) if found else NAN


def _find(path: Path) -> list[_Found]:
    """Every array (a, y, x) at a place, with its energy where something tells it."""
    try:
        if not path.exists():
            raise XanesTomoError(f"{path.name}: expected a file or folder of volumes, got no such path")
        found = _folder(path) if path.is_dir() else _file(path)
    except XanesTomoError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever the libraries of three formats raise on damaged files
        why = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise XanesTomoError(f"{path.name}: cannot be read ({why})") from None
    if not found:
        raise XanesTomoError(
            f"{path.name}: expected volumes as TIFF stacks, HDF5 (TXM_Sandbox registered_xanes3D, exchange/data) or "
            "OME-Zarr, got none of these"
        )
    return found


def _file(path: Path) -> list[_Found]:
    if path.suffix.lower() in _TIFF:
        return [_tiff(path)]
    return _hdf5(path) if is_hdf5(path) else []


def _folder(path: Path) -> list[_Found]:
    if (path / "zarr.json").is_file() or (path / ".zgroup").is_file() or (path / ".zarray").is_file():
        return _zarr(path)
    entries = sorted(path.iterdir(), key=_natural)
    pictures = [p for p in entries if p.suffix.lower() in _TIFF]
    volumes = [p for p in entries if p.suffix.lower() in SUFFIXES and is_hdf5(p)]
    if volumes:
        return [f for p in volumes for f in _hdf5(p)]
    if pictures:
        import tifffile

        with tifffile.TiffFile(pictures[0]) as file:
            single = len(file.pages) == 1
        if single:  # the slices of one volume
            return [_slices(path, pictures)]
        told = _sidecar(path)
        return [told[p.name](_tiff(p)) if p.name in told else _tiff(p) for p in pictures]
    found = []
    for p in entries:
        if p.is_dir():
            inside = sorted((q for q in p.iterdir() if q.suffix.lower() in _TIFF), key=_natural)
            if inside:
                found.append(_slices(p, inside))
            elif (p / "zarr.json").is_file() or (p / ".zgroup").is_file():
                found += [f if f.energy == f.energy else _with_energy(f, p) for f in _zarr(p)]
    return found


_SIDECARS = ("projections.csv", "volumes.csv")


def _sidecar(folder: Path) -> dict[str, Callable[[_Found], _Found]]:
    """Return what ``projections.csv`` says about the TIFF stacks beside it: energy, angles and pixel size, by name.

    ``projections.csv``: columns ``file, page, energy_ev, theta_deg``, one row a page. ``volumes.csv``: ``file,
    energy_ev, unit``, one row a file. Both with ``pixel_size_nm`` where it is known.
    """
    rows: dict[str, list[dict[str, str]]] = {}
    for name in _SIDECARS:
        if (folder / name).is_file():
            with (folder / name).open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    rows.setdefault(str(row.get("file")), []).append(row)
    return {name: partial(_told, name, listed) for name, listed in rows.items()}


def _told(name: str, rows: list[dict[str, str]], f: _Found) -> _Found:
    """Return `f` with what the rows of a table beside it say about the file `name`."""
    try:
        energy = float(rows[0]["energy_ev"])
        size = float(rows[0].get("pixel_size_nm") or NAN)
        theta = None
        if "theta_deg" in rows[0]:
            theta = np.array([float(r["theta_deg"]) for r in sorted(rows, key=lambda r: int(r["page"]))])
    except (KeyError, TypeError, ValueError):
        raise XanesTomoError(
            f"{name}: expected numbers for it in the columns page, energy_ev, theta_deg of {_SIDECARS[0]}, or "
            f"energy_ev, pixel_size_nm of {_SIDECARS[1]}, got {rows[0]}"
        ) from None
    return _Found(f.block, energy, size if size == size else f.voxel_nm, rows[0].get("unit") or f.unit, theta)


def _with_energy(f: _Found, path: Path) -> _Found:
    return _Found(f.block, _named(path), f.voxel_nm, f.unit, f.theta)


def _tiff(path: Path) -> _Found:
    import tifffile

    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        shape = (len(file.pages), *page.shape)
        voxel = _tiff_nm(file)
    if len(shape) != 3:
        raise XanesTomoError(f"{path.name}: expected grey pages, got pages of shape {shape[1:]}")
    return _Found(Block("pages", str(path), (shape[0], shape[1], shape[2])), _named(path), voxel)


def _tiff_nm(file: Any) -> float:
    """Pixel size from OME metadata, nm; NaN when there is none."""
    text = file.ome_metadata or ""
    size = re.search(r'PhysicalSizeX="([0-9.eE+-]+)"', text)
    unit = re.search(r'PhysicalSizeXUnit="([^"]+)"', text)
    if size is None:
        return NAN
    factor = {"nm": 1.0, "mm": 1e6, "m": 1e9}.get(unit.group(1) if unit else "", 1e3)  # the default is micrometres
    try:
        value = float(size.group(1)) * factor
    except ValueError:
        return NAN
    return value if math.isfinite(value) and value > 0 else NAN


def _slices(folder: Path, pictures: list[Path]) -> _Found:
    import tifffile

    with tifffile.TiffFile(pictures[0]) as file:
        shape = file.pages[0].shape
        voxel = _tiff_nm(file)
    if len(shape) != 2:
        raise XanesTomoError(f"{pictures[0].name}: expected a grey picture, got shape {shape}")
    block = Block("tiff", str(folder), (len(pictures), shape[0], shape[1]), pictures=tuple(map(str, pictures)))
    energy = _named(folder)
    return _Found(block, energy if energy == energy else _named(pictures[0]), voxel)


def _hdf5(path: Path) -> list[_Found]:
    with opened(path) as file:
        for name, places in _FOUR.items():
            node = file.get(name)
            if node is not None and getattr(node, "ndim", 0) == 4 and node.dtype.kind in "iuf":
                energies = next((e for e in (energies_in(file, (w,)) for w in places) if e.size == node.shape[0]), None)
                theta = theta_in(file, ("exchange/theta",))
                voxel = pixel_in(file)
                shape = node.shape[1:]
                return [
                    _Found(
                        Block("h5", str(path), shape, name, i),
                        NAN if energies is None else float(energies[i]),
                        voxel,
                        _unit_of(node),
                        None if theta is None else np.broadcast_to(theta, (node.shape[0], theta.shape[-1]))[i],
                    )
                    for i in range(node.shape[0])
                ]
        for name in _THREE:
            node = file.get(name)
            if node is not None and getattr(node, "ndim", 0) == 3 and node.dtype.kind in "iuf":
                energies = energies_in(
                    file, ("exchange/energy", "measurement/instrument/monochromator/energy", "energy")
                )
                energy = float(energies[0]) if energies.size == 1 else _named(path)
                theta = theta_in(file, ("exchange/theta", "entry/sample/rotation_angle"))
                return [_Found(Block("h5", str(path), node.shape, name), energy, pixel_in(file), _unit_of(node), theta)]
    return []


def _unit_of(node: Any) -> str:
    """Return the unit a dataset carries; empty without."""
    unit = node.attrs.get("units", node.attrs.get("unit", ""))
    return unit.decode("utf-8", "replace") if isinstance(unit, bytes) else str(unit)


def _zarr(path: Path) -> list[_Found]:
    """OME-Zarr: one 4-D image (energy or channel first), one 3-D image, or a group of 3-D images named by energy."""
    import zarr

    root: Any = zarr.open(path, mode="r")
    if not hasattr(root, "group_keys"):
        return _zarr_array(path, "", root, NAN, np.empty(0))
    found = _zarr_image(path, "", root)
    if found:
        return found
    for name in sorted(root.group_keys(), key=lambda n: _natural(Path(n))):
        found += [
            f if f.energy == f.energy else _with_energy(f, Path(name)) for f in _zarr_image(path, name, root[name])
        ]
    return found


_NM = {"nanometer": 1.0, "micrometer": 1e3, "millimeter": 1e6, "meter": 1e9, "nm": 1.0, "um": 1e3}


def _zarr_image(path: Path, name: str, group: Any) -> list[_Found]:
    attributes = dict(group.attrs)
    scales = attributes.get("ome", attributes).get("multiscales")
    if not scales:
        return []
    level = scales[0]["datasets"][0]
    axes = [a if isinstance(a, dict) else {"name": a} for a in scales[0].get("axes", ())]
    steps = [t["scale"] for t in level.get("coordinateTransformations", ()) if t.get("type") == "scale"]
    voxel = NAN
    if steps and len(axes) == len(steps[0]):
        voxel = float(steps[0][-1]) * _NM.get(str(axes[-1].get("unit", "micrometer")), NAN)
    energies = np.ravel(np.asarray(attributes.get("energies_ev", attributes.get("energy_ev", [])), dtype=float))
    array = group[level["path"]]
    unit = str(attributes.get("unit", ""))
    return _zarr_array(path, f"{name}/{level['path']}".lstrip("/"), array, voxel, energies, unit)


def _zarr_array(
    path: Path, name: str, array: Any, voxel: float, energies: npt.NDArray[np.float64], unit: str = ""
) -> list[_Found]:
    if array.dtype.kind not in "iuf" or array.ndim not in (3, 4):
        return []
    if array.ndim == 3:
        energy = float(energies[0]) if energies.size == 1 else _named(path)
        return [_Found(Block("zarr", str(path), tuple(array.shape), name), energy, voxel, unit)]
    n = array.shape[0]
    known = energies if energies.size == n else np.full(n, NAN)
    return [
        _Found(Block("zarr", str(path), tuple(array.shape[1:]), name, i), float(known[i]), voxel, unit)
        for i in range(n)
    ]
