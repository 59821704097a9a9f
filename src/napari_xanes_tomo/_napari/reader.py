"""The reader: scan scripts, folders, ``.xrm``, ``.txrm`` and HDF5 files; and the maps of a finished run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from napari_xanes_tomo.io.exchange import holds_scan
from napari_xanes_tomo.io.given import given_kind
from napari_xanes_tomo.io.header_cache import is_remembered
from napari_xanes_tomo.io.scan import is_scan_folder, is_scan_script, open_series
from napari_xanes_tomo.model import XanesTomoError
from napari_xanes_tomo.recipe import ScanParameters

from .layers import LayerData, is_maps, map_layers, scan_layer

__all__ = ["get_reader", "read_maps", "read_scan"]


def get_reader(path: str | Sequence[str]) -> Callable[[str | Sequence[str]], list[LayerData]] | None:
    """Return the function that opens `path`, or None where it is not ours.

    It looks at 4 kB of a text at most, and at names and angles of an HDF5 file.

    Parameters
    ----------
    path : str or sequence of str
        What the user opened. Several files at once are no measurement: None.
    """
    if not isinstance(path, str):
        if len(path) != 1:
            return None
        path = path[0]
    place = Path(path)
    if place.is_dir():
        if is_maps(place) is not None:
            return read_maps
        return read_scan if is_scan_folder(place) or holds_scan(place) else None
    if place.suffix.lower() in (".xrm", ".txrm") or holds_scan(place):
        return read_scan
    if place.suffix.lower() in HDF5 and registered_elsewhere(place):
        return refuse
    return read_scan if is_scan_script(place) else None


HDF5 = (".h5", ".hdf", ".hdf5")


def registered_elsewhere(place: Path) -> str:
    """Say how volumes or images that were registered elsewhere become maps; empty where there are none at `place`."""
    kind = given_kind(place) if place.exists() else "raw"
    if kind == "raw":
        return ""
    return (
        f"{place.name}: expected a measurement, got {kind} that were aligned elsewhere; "
        f"`xanes-tomo run {place.name} --out OUT` makes their maps (pixel size and unit: `given` in the recipe), "
        "then open OUT"
    )


def refuse(path: str | Sequence[str]) -> list[LayerData]:
    """Say what to do with a file whose units only a recipe can tell."""
    raise XanesTomoError(registered_elsewhere(_one(path)))


def _one(path: str | Sequence[str]) -> Path:
    return Path(path if isinstance(path, str) else path[0]).absolute()


def read_scan(path: str | Sequence[str]) -> list[LayerData]:
    """Open a measurement as one lazy layer ``(energy, angle, y, x)``."""
    place = _one(path)
    parameters = ScanParameters()
    at_once = not reads_long(place)
    layer = scan_layer(open_series(place, parameters, verify=at_once), place, parameters, verified=at_once)
    _attach_later()
    return [layer]


MANY = 3000
"""Files whose headers, where the disk is slow, take long enough to show the frames first."""


def reads_long(place: Path) -> bool:
    """Whether `place` is a script or a folder with so many files, not read before, that the headers can wait."""
    folder = place if place.is_dir() else place.parent
    if place.suffix.lower() in (".xrm", ".txrm") or is_remembered(folder):
        return False
    if place.is_dir() and not any(is_scan_script(p) for p in folder.glob("*.txt")):
        return False  # energies and angles are known from the headers alone
    with os.scandir(folder) as entries:
        return sum(1 for _ in islice((e for e in entries if e.name.lower().endswith(".xrm")), MANY)) >= MANY


def read_maps(path: str | Sequence[str]) -> list[LayerData]:
    """Open the maps of a finished run, ``(y, z, x)`` in micrometres."""
    place = _one(path)
    layers = map_layers(is_maps(place) or place)
    _attach_later()
    return layers


def _attach_later() -> None:
    """Attach the overlay to the viewer the layer is about to arrive in; a reader cannot see it."""
    from qtpy.QtCore import QCoreApplication, QTimer

    if QCoreApplication.instance() is not None:
        QTimer.singleShot(0, _attach_current)


def _attach_current() -> None:
    from napari import current_viewer

    from .layers import face_images
    from .overlay import attach_overlay, unwrapped
    from .refine import refine

    viewer = current_viewer()
    if viewer is not None:
        attach_overlay(viewer)
        face_images(viewer)
        refine(unwrapped(viewer))
