"""``xanes-tomo view``: a measurement or the output of a run in napari, with the docks open."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import napari
from qtpy.QtWidgets import QAbstractItemView, QTableWidget, QTableWidgetItem

from napari_xanes_tomo.model import XanesTomoError

from .analysis_dock import AnalysisDock
from .docks import attach_docks
from .layers import METADATA_KEY, face_images, is_maps, map_layers
from .overlay import attach_overlay
from .reader import get_reader, refuse, registered_elsewhere
from .session import session_of
from .voxel_dock import VoxelDock

__all__ = ["main", "open_maps", "open_scan"]

PLUGIN = "napari-xanes-tomo"


def open_scan(path: str | Path, out: str | Path | None = None) -> Any:
    """Open a measurement in a new viewer with the docks; go on with the run in `out` where that is given."""
    viewer = napari.Viewer(title=f"{Path(path).name} - XANES tomography")
    try:
        viewer.open(str(path), plugin=PLUGIN)
        attach_overlay(viewer)
        docks = attach_docks(viewer)
        if out is not None:
            for dock in docks.values():
                dock.out_edit.setText(str(Path(out).absolute()))
            if (Path(out) / "journal.jsonl").exists():
                session_of(viewer).open(out)
    except BaseException:
        viewer.close()
        raise
    return viewer


def open_maps(out: str | Path, session: Any = None) -> Any:
    """Open the maps of a run in a new viewer of their own (in micrometres), with the table of its energies.

    With the `session` that holds the run, a click on a voxel shows its spectrum.

    Raises
    ------
    XanesTomoError
        The folder holds no finished maps.
    """
    out = Path(out)
    found = is_maps(out)
    if found is None:
        raise XanesTomoError(f"{out.name}: expected the maps of a finished run, found none; run it to its end first")
    layers = map_layers(found)
    viewer = napari.Viewer(title=f"{out.name} - maps - XANES tomography")
    for data, options, kind in layers:
        getattr(viewer, f"add_{kind}")(data, **options)
        viewer.layers[-1].colorbar.visible = True
    viewer.layers.selection.active = viewer.layers[-1]
    viewer.canvas.overlays.scale_bar.visible = True
    _caption(viewer)
    viewer.dims.set_point(0, sum(viewer.dims.range[0][:2]) / 2)
    face_images(viewer)
    viewer.window.add_dock_widget(AnalysisDock(viewer), name="Analysis", area="right")
    if session is not None and session.workflow is not None:
        viewer.window.add_dock_widget(VoxelDock(viewer, session), name="Spectrum", area="right", tabify=True)
    table = found.parent / "tables" / "energies.csv"
    if table.is_file():
        viewer.window.add_dock_widget(_table(table), name="Energies", area="bottom")
    return viewer


def _caption(viewer: Any) -> None:
    """Say over the picture which map is seen and in which unit; kept right while maps are switched on and off."""
    overlay = viewer.canvas.overlays.text
    overlay.position = "top_left"
    overlay.visible = True

    def write(event: Any = None) -> None:
        shown = next((layer for layer in reversed(viewer.layers) if layer.visible), None)
        facts = {} if shown is None else shown.metadata.get(METADATA_KEY, {})
        parts = [facts.get("map"), facts.get("unit"), facts.get("description")]
        overlay.text = "  |  ".join(str(p) for p in parts if p)

    for layer in viewer.layers:
        layer.events.visible.connect(write)
    write()


def main(path: str | Path, *, out: str | Path | None = None, block: bool = True) -> None:
    """Open a scan (script, folder, file) or the output folder of a run, and wait until the window is closed.

    Parameters
    ----------
    path : path
    out : path, optional
        Output folder of the scan: an earlier run goes on in the docks, its maps open in a second viewer.
    block : bool
        False returns at once (the caller runs the event loop).

    Raises
    ------
    XanesTomoError
        There is neither a scan nor a run with maps.
    """
    path = Path(path).absolute()
    if is_maps(path) is not None:
        open_maps(path)
    elif (path / "journal.jsonl").is_file():
        raise XanesTomoError(f"{path.name}: this run has no maps yet; open its scan, and this folder as its output")
    else:
        if get_reader(str(path)) in (None, refuse):
            if told := registered_elsewhere(path):
                raise XanesTomoError(told)
            raise XanesTomoError(
                f"{path.name}: expected a scan script, a folder of frames, an .xrm, a .txrm or the output of a run, "
                f"got {'something else' if path.exists() else 'no such path'}"
            )
        viewer = open_scan(path, out)
        if out is not None and is_maps(Path(out)) is not None:
            open_maps(out, session_of(viewer))
    if block:
        napari.run()


def _table(path: Path) -> Any:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    table = QTableWidget(max(0, len(rows) - 1), len(rows[0]) if rows else 0)
    table.setEditTriggers(QAbstractItemView.EditTrigger.NoEditTriggers)
    table.setHorizontalHeaderLabels(rows[0] if rows else [])
    for r, row in enumerate(rows[1:]):
        for c, cell in enumerate(row):
            item = QTableWidgetItem(_short(cell))
            item.setToolTip(cell)
            table.setItem(r, c, item)
    table.resizeColumnsToContents()
    return table


def _short(cell: str) -> str:
    try:
        return f"{float(cell):.6g}"
    except ValueError:
        return cell
