"""Sample data: the tiny digital twin, written once into the user's cache folder."""

from __future__ import annotations

from pathlib import Path

from napari_xanes_tomo.phantom import PRESETS, write_twin
from napari_xanes_tomo.recipe import parameter_key

from .layers import LayerData
from .reader import read_scan

__all__ = ["tiny_twin"]


def _cache() -> Path:
    from qtpy.QtCore import QStandardPaths

    place = QStandardPaths.writableLocation(QStandardPaths.StandardLocation.GenericCacheLocation)
    return (Path(place) if place else Path.home() / ".cache") / "napari-xanes-tomo"


def tiny_twin() -> list[LayerData]:
    """Return the tiny twin (64 px, 36 angles, 8 energies) as a scan layer; its truth lies beside its files."""
    folder = _cache() / f"twin-tiny-{parameter_key(repr(PRESETS['tiny']))}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    return read_scan(str(write_twin(folder, preset="tiny", seed=0)))
