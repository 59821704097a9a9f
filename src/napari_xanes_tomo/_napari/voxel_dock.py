"""Beside the maps: a click on a voxel shows its spectrum, and what the maps fit to it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
from qtpy.QtWidgets import QVBoxLayout, QWidget

from napari_xanes_tomo.model import Progress
from napari_xanes_tomo.voxel import VoxelSpectrum

from .dock import wrapped
from .layers import METADATA_KEY, stored_key
from .plots import PointPlot

__all__ = ["VoxelDock"]

ASK = "Click a voxel of a map to see its spectrum: every energy is read and reconstructed there."


class VoxelDock(QWidget):
    """The spectrum of the voxel that was clicked.

    Parameters
    ----------
    viewer : napari.Viewer
        Of the maps.
    session : Session
        The one whose run they come from.
    """

    def __init__(self, viewer: Any, session: Any) -> None:
        super().__init__()
        self.viewer = viewer
        self._session = weakref.ref(session)  # goes with its own viewer
        self.found: VoxelSpectrum | None = None
        self._alive = {"here": True}
        alive = self._alive
        self.destroyed.connect(lambda *_: alive.update(here=False))
        box = QVBoxLayout(self)
        self.text = wrapped()
        self.text.setText(ASK)
        box.addWidget(self.text)
        self.plots = [PointPlot([("1/cm", 1)], title, 220) for title in ("energy (eV)", "energy (eV), about the edge")]
        for plot in self.plots:
            plot.mark(float("nan"))
            plot.hide()
            box.addWidget(plot)
        box.addStretch(1)
        viewer.mouse_drag_callbacks.append(self._pressed)

    def _pressed(self, viewer: Any, event: Any) -> Iterator[None]:
        """Tell a click from a drag."""
        if event.button != 1 or event.modifiers or viewer.dims.ndisplay != 2 or not self.isVisible():
            return
        active = viewer.layers.selection.active
        if active is not None and str(active.mode) != "pan_zoom":  # the user paints a region
            return
        moved = False
        yield
        while event.type == "mouse_move":
            moved = True
            yield
        if not moved:
            self.look(event.position)

    def look(self, position: Any) -> None:
        """Show the spectrum of the voxel at a position of the viewer, micrometres."""
        maps = [layer for layer in self.viewer.layers if METADATA_KEY in layer.metadata]
        session = self._session()
        workflow = None if session is None else session.workflow
        if not maps:
            return
        if session is None or workflow is None:
            self.text.setText("The run is no longer open: open these maps from its dock again.")
            return
        layer = next((m for m in reversed(maps) if m.visible), maps[-1])
        if stored_key(workflow.output.maps) != layer.metadata[METADATA_KEY].get("key"):
            self.text.setText("The run has made other maps since: open them from its dock.")
            return
        shape = layer.data[0].shape if layer.multiscale else layer.data.shape
        at = tuple(round(float(v)) for v in layer.world_to_data(position))
        if len(at) != 3 or not all(0 <= v < n for v, n in zip(at, shape, strict=True)):
            return
        if session.busy:
            self.text.setText("Something is running; click again when it has ended.")
            return
        self.text.setText(f"Voxel {', '.join(map(str, at))} (y, z, x): reading every energy ...")
        alive = self._alive

        def work(progress: Progress) -> VoxelSpectrum:
            found: VoxelSpectrum = workflow.voxel_spectrum((at[0], at[1], at[2]), progress=progress)
            return found

        def show(found: VoxelSpectrum) -> None:
            if alive["here"]:
                self._show(at, found)

        session.compute(work, show)

    def _show(self, at: tuple[int, ...], found: VoxelSpectrum) -> None:
        self.found = found
        unit = "mg/cm2" if found.areal else "g/cm3"
        parts = [f"{e} {v:.3g}" for e, v in found.amounts.items()]
        lines = [f"Voxel {', '.join(map(str, at))} (y, z, x), smoothed as the maps are."]
        if parts:
            lines.append(f"{', '.join(parts)} {unit}, by the table alone (grey: their fit).")
        if np.isfinite(found.shift_ev):
            lines.append(
                f"Edge {found.shift_ev:+.2f} eV against the mean (yellow: the mean spectrum, scaled and shifted)."
            )
        if found.note:
            lines.append(found.note)
        self.text.setText("\n".join(lines))
        self._draw(self.plots[0], found, np.ones(len(found.energies_ev), dtype=bool))
        # The scan of the edge: what the elements are not fitted to, or wherever energies lie close together.
        left = found.energies_ev[~np.isfinite(found.elements)]
        near = np.zeros(len(found.energies_ev), dtype=bool)
        if len(left) > 3 and np.isfinite(found.shift_ev):
            near = (found.energies_ev >= left.min() - 20) & (found.energies_ev <= left.max() + 20)
        self._draw(self.plots[1], found, near)

    def _draw(self, plot: PointPlot, found: VoxelSpectrum, chosen: Any) -> None:
        plot.setVisible(bool(chosen.any()))
        order = np.flatnonzero(chosen)[np.argsort(found.energies_ev[chosen], kind="stable")]
        energy, fits = found.energies_ev[order], []
        for values in (found.elements[order], np.full(len(order), np.nan), found.edge[order]):
            known = np.isfinite(values)
            fits.append((energy[known], values[known]))
        plot.name_axes("absorbance" if found.areal else "1/cm", "energy (eV)")
        plot.show_points(0, energy, [(found.value[order], None)], order.tolist(), fits)
