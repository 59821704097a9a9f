"""The reader: scan scripts, folders, ``.xrm``, ``.txrm`` and HDF5 files; and the maps of a finished run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from napari_xanes_tomo.io.exchange import holds_scan
from napari_xanes_tomo.io.given import given_kind, open_given
from napari_xanes_tomo.io.header_cache import is_remembered
from napari_xanes_tomo.io.scan import is_scan_folder, is_scan_script, open_series
from napari_xanes_tomo.model import XanesTomoError
from napari_xanes_tomo.recipe import GivenParameters, ScanParameters

from .layers import LayerData, is_maps, map_layers, scan_layer

__all__ = ["get_reader", "read_given", "read_maps", "read_scan"]


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
        if is_scan_folder(place):
            return read_scan
    elif place.suffix.lower() in (".xrm", ".txrm"):
        return read_scan
    if place.is_dir() or place.suffix.lower() in HDF5:
        elsewhere = _reader_of_given(place)
        if elsewhere is not None:
            return elsewhere
    return read_scan if holds_scan(place) or (place.is_file() and is_scan_script(place)) else None


HDF5 = (".h5", ".hdf", ".hdf5")


def told() -> GivenParameters:
    """Return what the recipe in the docks says of measurements that were aligned elsewhere."""
    from napari import current_viewer
    from qtpy.QtCore import QCoreApplication

    viewer = current_viewer() if QCoreApplication.instance() is not None else None
    if viewer is None:
        return GivenParameters()
    from .session import told_of_given

    return told_of_given(viewer)


def _reader_of_given(place: Path) -> Callable[[str | Sequence[str]], list[LayerData]] | None:
    """Return what opens projections, volumes or images that were aligned elsewhere, None where there are none."""
    if not place.exists() or given_kind(place, told()) == "raw":
        return None
    try:
        open_given(place, told())
    except XanesTomoError as error:
        # Any folder of pictures looks like volumes: it is ours where all is known but a number that a recipe can tell.
        ours = place.is_file() or any(w in str(error) for w in ("set given.unit", "set given.pixel_nm"))
        return refuse if ours else None
    return read_given


def registered_elsewhere(place: Path) -> str:
    """Say what keeps what was aligned elsewhere from being opened; empty where there is nothing of that at `place`."""
    kind = given_kind(place, told()) if place.exists() else "raw"
    if kind == "raw":
        return ""
    try:
        open_given(place, told())
    except XanesTomoError as error:
        what = str(error)
        if "two energies" in what:
            return f"{what}; open the folder that holds a file for every energy"
        if "set given." in what:
            return (
                f"{what}: load a recipe with it in the Workflow dock and open this again, or "
                f"`xanes-tomo run {place.name} --out OUT --recipe R.yaml`"
            )
        return what
    return f"{place.name}: holds {kind} that were aligned elsewhere"


def refuse(path: str | Sequence[str]) -> list[LayerData]:
    """Say what to do with a file of which something is not known."""
    raise XanesTomoError(registered_elsewhere(_one(path)))


def read_given(path: str | Sequence[str]) -> list[LayerData]:
    """Open what was aligned elsewhere as one lazy layer: absorbance of projections, planes of volumes, images."""
    place, given = _one(path), told()
    layer = scan_layer(open_given(place, given), place, given=given)
    _attach_later()
    return [layer]


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
