"""What napari shows: a measurement as one lazy 4-D layer, aligned projections, maps in micrometres.

Nothing here needs Qt or a viewer. A scan layer is ``(energy, angle, y, x)``, one chunk a frame; its metadata holds a
`ScanLayer` under `METADATA_KEY`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from napari_xanes_tomo.counts import own_beam, read_absorbance
from napari_xanes_tomo.flats import Beam
from napari_xanes_tomo.io.given import BEAM
from napari_xanes_tomo.io.stack import FrameStack, lazy_frames
from napari_xanes_tomo.io.store import read_map_attributes, read_map_levels
from napari_xanes_tomo.model import Alignment, FloatArray, Series, XanesTomoError
from napari_xanes_tomo.pixels import pixel_width, seen_as, usual_scan
from napari_xanes_tomo.recipe import GivenParameters, ScanParameters
from napari_xanes_tomo.resample import place

__all__ = [
    "METADATA_KEY",
    "AlignedStack",
    "FlatStack",
    "LayerData",
    "ScanLayer",
    "face_images",
    "geometry",
    "is_maps",
    "map_layers",
    "scan_layer",
    "scan_of",
    "shown_frames",
    "spread_limits",
    "stored_key",
]

METADATA_KEY = "napari_xanes_tomo"
"""Key of ``layer.metadata`` under which everything of this package lies: a `ScanLayer`, or a map's attributes."""

LayerData = tuple[Any, dict[str, Any], str]
AXES = ("energy", "angle", "y", "x")
FIELDS = 12
"""Fields of the chess board in a row."""


@dataclass(frozen=True)
class ScanLayer:
    """What a scan layer knows about itself.

    Attributes
    ----------
    series : Series
    stack : FrameStack
    path : Path
        What was opened.
    parameters : ScanParameters
        How it was opened.
    verified : bool
        Whether every header was read.
    given : GivenParameters
        What was told of a measurement that was aligned elsewhere.
    """

    series: Series
    stack: FrameStack
    path: Path
    parameters: ScanParameters = field(default_factory=ScanParameters)
    verified: bool = True
    given: GivenParameters = field(default_factory=GivenParameters)

    @property
    def folder(self) -> Path:
        """The folder of the raw files."""
        return self.path if self.path.is_dir() else self.path.parent

    def text(self, energy: int, angle: int) -> str:
        """Return what the overlay says about one frame, in two lines."""
        scan = self.series.scans[energy]
        ev = f"{scan.energy_ev:.2f} eV" if np.isfinite(scan.energy_ev) else "energy unknown"
        known = angle < len(scan) and np.isfinite(scan.theta_deg[angle])
        theta = f"{scan.theta_deg[angle]:.2f} deg" if known else "no angle"
        theta = f"plane z = {angle}, 1/cm" if scan.given == "volumes" else "absorbance" if scan.gridded else theta
        size = f"{scan.pixel_size_nm:.1f} nm/px" if np.isfinite(scan.pixel_size_nm) else "pixel size unknown"
        name = scan.names[angle] if angle < len(scan.names) else ""
        status = self.stack.status(energy, angle)
        return f"{ev}  |  {theta}  |  {size}\n{status}  |  {name}" if name else f"{ev}  |  {theta}  |  {size}\n{status}"


def scan_of(layer: Any) -> ScanLayer | None:
    """Return what a layer of the reader knows about its measurement, None for any other layer."""
    found = getattr(layer, "metadata", {}).get(METADATA_KEY)
    return found if isinstance(found, ScanLayer) else None


def shown_frames(stack: FrameStack) -> tuple[Callable[[int, int], npt.NDArray[Any]], np.dtype[Any]]:
    """Return what reads a frame to be shown, and its type: absorbance of projections aligned elsewhere, else counts."""
    if stack.series.scans[0].given != "projections":
        return stack.read, stack.dtype
    return partial(_absorbance, stack), np.dtype(np.float32)


def _absorbance(stack: FrameStack, energy: int, angle: int) -> npt.NDArray[Any]:
    counts = stack.read(energy, angle)
    return np.where(counts > 0, -np.log(np.maximum(counts, 1e-6) / BEAM), 0).astype(np.float32)


def geometry(series: Series) -> dict[str, Any]:
    """Return axis labels, units, scale and translation of a layer over all frames of `series`.

    The energies are not evenly spaced, so that axis counts them. The angle is in degrees where it is even and the same
    at all energies, and counts projections elsewhere. There is no length unit: the pixel size depends on the energy.
    What is counted has napari's unit for none, "pixel"; beside degrees, "dimensionless" would be read as radians.
    """
    scale, translate, unit = 1.0, 0.0, "pixel"
    theta = [np.asarray(s.theta_deg, dtype=float) for s in series.scans]
    first = theta[0]
    if len(first) > 1 and all(t.shape == first.shape for t in theta) and np.isfinite(theta).all():
        step = float((first[-1] - first[0]) / (len(first) - 1))
        even = first[0] + step * np.arange(len(first))
        if step > 0 and np.abs(np.array(theta) - even).max() < 0.1 * step:
            # Measured angles scatter by hundredths of a degree; the overlay has the true ones.
            scale, translate, unit = round(step, 4), round(float(first[0]), 3), "deg"
    return {
        "axis_labels": ("energy", "z", "y", "x") if series.scans[0].gridded else AXES,
        "units": ("pixel", unit, "pixel", "pixel"),
        "scale": (1.0, scale, 1.0, 1.0),
        "translate": (0.0, translate, 0.0, 0.0),
    }


def spread_limits(frames: list[npt.NDArray[Any]], low: float = 0.5, high: float = 99.8) -> tuple[float, float]:
    """Return contrast limits from the percentiles of a few arrays of any shape; some 65,000 values of each will do."""
    values = np.concatenate([f.ravel()[:: (f.size // 65536) | 1] for f in frames])
    values = values[np.isfinite(values)]
    a, b = np.percentile(values, (low, high)) if values.size else (0.0, 1.0)
    return (float(a), float(b)) if b > a else (float(a), float(a) + 1.0)


def scan_layer(
    series: Series,
    path: Path,
    parameters: ScanParameters | None = None,
    *,
    verified: bool = True,
    given: GivenParameters | None = None,
) -> LayerData:
    """Return the layer of a whole measurement.

    Raises
    ------
    XanesTomoError
        Not one frame can be read.
    """
    stack = FrameStack(series)
    info = ScanLayer(series, stack, path, parameters or ScanParameters(), verified, given or GivenParameters())
    read, dtype = shown_frames(stack)
    # Three frames of the first, middle and last energy that have any: the counts change by a factor over the energies.
    usable = [(e, np.flatnonzero(s.usable)) for e, s in enumerate(series.scans) if s.usable.any()]
    chosen = {usable[0][0]: usable[0], usable[len(usable) // 2][0]: usable[len(usable) // 2], usable[-1][0]: usable[-1]}
    frames = [read(e, int(index[len(index) // 2])) for e, index in chosen.values()]
    if stack.failed and len(stack.failed) == len(frames) == sum(len(index) for _, index in usable):
        raise XanesTomoError(next(iter(stack.failed.values())).partition(":")[2])
    options = {
        "name": series.name,
        "contrast_limits": spread_limits(frames),
        "metadata": {METADATA_KEY: info},
        "colormap": "gray",
        **geometry(series),
    }
    return lazy_frames(read, stack.shape, dtype), options, "image"


_Reader = Callable[[int, int], npt.NDArray[np.float32]]


def _difference(read: _Reader, against: int, energy: int, angle: int) -> npt.NDArray[np.float32]:
    one, other = read(energy, angle), read(against, angle)
    return one - other if one.any() and other.any() else np.zeros_like(one)


def _chess_board(read: _Reader, against: int, energy: int, angle: int) -> npt.NDArray[np.float32]:
    one, other = read(energy, angle), read(against, angle)
    y, x = (np.arange(n) // max(1, one.shape[1] // FIELDS) for n in one.shape)
    return np.where((y[:, None] + x) % 2 == 0, one, other)


def _other(read: _Reader, against: int, energy: int, angle: int) -> npt.NDArray[np.float32]:
    return read(against, angle)


Against = Literal["difference", "chess board", "other"]
_COMPARED: Mapping[str, Callable[[_Reader, int, int, int], npt.NDArray[np.float32]]] = {
    "difference": _difference,
    "chess board": _chess_board,
    "other": _other,
}


class AlignedStack:
    """Absorbance of every projection as it lies after alignment: the particle stands still when the angle changes.

    Parameters
    ----------
    stack : FrameStack
    """

    def __init__(self, stack: FrameStack) -> None:
        self.series, self._usual = stack.series, usual_scan(stack.series.scans)
        self.shape = stack.shape
        self._images: dict[int, tuple[Beam, npt.NDArray[np.float32]]] = {}
        self._lock = threading.Lock()

    def _basis(self, energy: int, beam: Beam) -> npt.NDArray[np.float32]:
        with self._lock:
            known = self._images.get(energy)
            if known is None or known[0] is not beam:
                self._images.pop(energy, None)
                if len(self._images) >= 4:  # flats of a few energies, not of all 67
                    self._images.pop(next(iter(self._images)))
                rows = self.series.scans[energy].frames.frame_shape[0]
                known = self._images[energy] = (beam, beam.basis((0, rows))[0])
            return known[1]

    def reader(
        self,
        found: Mapping[int, tuple[Alignment, FloatArray]],
        *,
        beams: Mapping[int, Beam | None] | None = None,
        masks: Mapping[int, npt.NDArray[np.bool_] | None] | None = None,
        gain: Mapping[int, float] | None = None,
        grid: int | None = None,
        against: int | None = None,
        how: Against = "difference",
    ) -> Callable[[int, int], npt.NDArray[np.float32]]:
        """Return ``read(energy, angle)`` for the energies in `found`; zeros for others.

        Parameters
        ----------
        found : mapping of int to (Alignment, (n, 3) array)
            Alignment and air planes of an energy.
        beams : mapping of int to Beam, optional
            Flats, stray light and bad pixels of an energy as the estimation used them; the plain flats of every half
            unless given.
        masks : mapping of int to (y, x) bool array, optional
            Further pixels of an energy not to be trusted.
        gain : mapping of int to float, optional
            What every frame of an energy is multiplied by.
        grid : int, optional
            The energy on whose grid all are placed; each on its own unless given.
        against : int, optional
            Energy whose frame of the same number every frame is compared with.
        how : {"difference", "chess board", "other"}
            Subtract that frame, let it fill every other field of a chess board, or show it alone.
        """
        plain = partial(self._read, dict(found), dict(beams or {}), dict(masks or {}), dict(gain or {}), grid)
        return plain if against is None else partial(_COMPARED[how], plain, against)

    def _read(
        self,
        found: Mapping[int, tuple[Alignment, FloatArray]],
        beams: dict[int, Beam | None],
        masks: Mapping[int, npt.NDArray[np.bool_] | None],
        gain: Mapping[int, float],
        grid: int | None,
        energy: int,
        angle: int,
    ) -> npt.NDArray[np.float32]:
        nothing = np.zeros(self.shape[2:], np.float32)
        scan = self.series.scans[energy]
        if energy not in found or angle >= len(scan) or scan.status[angle] != "ok":
            return nothing
        alignment, air = found[energy]
        if alignment.status[angle] != "ok" or not np.isfinite(alignment.shift[angle]).all():
            return nothing
        try:
            beam = beams.get(energy)
            if beam is None:
                beam = beams[energy] = own_beam(scan)
            data = read_absorbance(
                scan, beam, [angle], (0, scan.frames.frame_shape[0]), air=air, mask=masks.get(energy),
                basis=self._basis(energy, beam), threads=1,
            )  # fmt: skip
        except (XanesTomoError, OSError):
            return nothing
        # Whatever the pixels of the grid, the layer has those of most energies.
        width = pixel_width(self._usual, scan if grid is None else self.series.scans[grid])
        alignment = replace(alignment, magnification=alignment.magnification * width)
        placed = np.asarray(place(data, alignment, index=[angle], grid_shape=self.shape[2:], threads=1)[0])
        return placed * np.float32(gain[energy]) if energy in gain else placed


class FlatStack:
    """Every shot of every flat set as ``(energy, shot, y, x)``, in the order of acquisition; zeros where there is none.

    Parameters
    ----------
    series : Series
    """

    def __init__(self, series: Series) -> None:
        self.series = series
        self.shots = [[(k, i) for k, f in enumerate(s.flats) for i in range(len(f.status))] for s in series.scans]
        height, width = series.frame_shape
        self.shape = (len(series.scans), max((len(s) for s in self.shots), default=0), height, width)

    def read(self, energy: int, shot: int) -> npt.NDArray[np.float32]:
        """Return a shot ``[y, x]``, counts; zeros where it is missing or damaged."""
        out = np.zeros(self.shape[2:], np.float32)
        if shot < len(self.shots[energy]):
            group, number = self.shots[energy][shot]
            flats = self.series.scans[energy].flats[group]
            if flats.status[number] == "ok":
                try:
                    scan = self.series.scans[energy]
                    width = pixel_width(usual_scan(self.series.scans), scan)
                    out[:] = seen_as(flats.frames.read(number), self.shape[2:], width)
                except (XanesTomoError, OSError):
                    out[:] = 0
        return out

    def text(self, energy: int, shot: int) -> str:
        """Return which shot this is."""
        if not 0 <= energy < len(self.shots) or not 0 <= shot < len(self.shots[energy]):
            return "no shot here"
        group, number = self.shots[energy][shot]
        flats = self.series.scans[energy].flats[group]
        name = flats.names[number] if number < len(flats.names) else ""
        return f"flat set {group + 1}, shot {number + 1}: {name} {flats.status[number]}"

    def geometry(self) -> dict[str, Any]:
        """Return where the layer lies: the shots are spread over the range of the angles, so one slider serves both."""
        place = geometry(self.series)
        step, first = place["scale"][1], place["translate"][1]
        planned = max(len(s) for s in self.series.scans)
        each = step * planned / max(1, self.shape[1])
        return {
            **place,
            "scale": (1.0, each, 1.0, 1.0),
            "translate": (0.0, first - step / 2 + each / 2, 0.0, 0.0),
        }


# ------------------------------------------------------------------------------------------------------- maps

_COLORMAPS = {"Mn": "magma", "Co": "cividis", "Ni": "viridis", "edge_energy": "turbo", "edge_energy_relative": "turbo"}


def is_maps(path: Path) -> Path | None:
    """Return the folder of finished maps, when `path` is one or is a run's output with one; never raises."""
    for folder in (path, path / "maps.ome.zarr"):
        try:
            if folder.name.endswith(".ome.zarr"):
                read_map_attributes(folder)
                return folder
        except (XanesTomoError, OSError):
            continue
    return None


def stored_key(path: Path) -> str:
    """Return the key of the maps in a folder, empty where there are none."""
    try:
        return str(read_map_attributes(path)[0].get("key", ""))
    except (XanesTomoError, OSError):
        return ""


def map_layers(path: Path) -> list[LayerData]:
    """Return every map as a layer ``(y, z, x)``, scale in micrometres; only the last, the first element's, is visible.

    Raises
    ------
    XanesTomoError
        There are no finished maps.
    """
    whole, each = read_map_attributes(path)
    um = float(whole["voxel_nm"]) / 1000
    mask = None
    if "mask" in each:
        mask = np.asarray(read_map_levels(path, "mask")[-1]) > 0.5
    out: list[LayerData] = []
    names = sorted(each, key=lambda n: (n.endswith("_sigma"), n in ("mask", "coverage")))
    for name in reversed(names):  # napari puts the last on top
        levels = read_map_levels(path, name)
        coarse = np.asarray(levels[-1])
        inside = coarse[mask] if mask is not None and mask.any() and mask.shape == coarse.shape else coarse
        limits = (0.0, 1.0) if name in ("mask", "coverage") else spread_limits([inside], 1.0, 99.0)
        if name in ("Mn", "Co", "Ni", "density"):
            limits = (0.0, max(limits[1], 1e-6))
        options = {
            "name": name,
            "scale": (um,) * 3,
            "units": ("um",) * 3,
            "axis_labels": ("y", "z", "x"),
            "contrast_limits": limits,
            "colormap": _COLORMAPS.get(name, "gray"),
            "visible": name == names[0],
            "metadata": {METADATA_KEY: {"map": name, "key": str(whole.get("key", "")), **each[name]}},
        }
        big = levels[0].shape[2] > 512 and len(levels) > 1
        out.append((levels if big else levels[0], {**options, "multiscale": big}, "image"))
    return out


def face_images(viewer: Any) -> None:
    """Turn a viewer that holds maps of images, ``(y, 1, x)``, so that y and x are on the screen."""
    maps = [layer for layer in viewer.layers if METADATA_KEY in layer.metadata and layer.ndim == 3]
    shapes = [layer.data[0].shape if layer.multiscale else layer.data.shape for layer in maps]
    if maps and viewer.dims.ndim == 3 and all(shape[1] == 1 for shape in shapes):
        viewer.dims.order = (1, 0, 2)
        viewer.reset_view()
