"""Particle box and mask: drawn as layers, used as decisions; the same in every dock that shows them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from qtpy.QtWidgets import QGroupBox, QHBoxLayout, QPushButton, QVBoxLayout

from napari_xanes_tomo.absorbance import normalise
from napari_xanes_tomo.model import Progress
from napari_xanes_tomo.pixels import pixel_width, usual_scan
from napari_xanes_tomo.registration import reference_energy
from napari_xanes_tomo.steps import estimation_bin
from napari_xanes_tomo.views import suggest_box

from .dock import allow, wrapped
from .session import Session

__all__ = ["BOX_LAYER", "MASK_LAYER", "Confinement"]

BOX_LAYER = "particle box"
MASK_LAYER = "mask"
_FRAMES = 6  # projections the suggested box is made from


class Confinement(QGroupBox):
    """Buttons for the particle box and the mask of a session.

    Parameters
    ----------
    session : Session
    why_not : callable
        Returns why nothing can be decided by hand now; "" where it can.
    """

    def __init__(self, session: Session, why_not: Callable[[], str]) -> None:
        super().__init__("Particle box and mask")
        self.session = session
        self._why_not = why_not
        inner = QVBoxLayout(self)
        inner.setContentsMargins(6, 4, 6, 4)
        self.box_label = wrapped()
        inner.addWidget(self.box_label)
        row = QHBoxLayout()
        self.suggest_button = QPushButton("Suggest")
        self.suggest_button.clicked.connect(self._suggest)
        self.draw_button = QPushButton("Draw")
        self.draw_button.clicked.connect(lambda: self._draw_boxes())
        self.use_box_button = QPushButton("Use the boxes")
        self.use_box_button.clicked.connect(self._use_boxes)
        self.clear_box_button = QPushButton("Whole frame")
        self.clear_box_button.clicked.connect(lambda: self.session.decide(lambda w: w.set_boxes([])))
        for button in (self.suggest_button, self.draw_button, self.use_box_button, self.clear_box_button):
            row.addWidget(button)
        inner.addLayout(row)
        row = QHBoxLayout()
        self.draw_mask_button = QPushButton("Draw a mask")
        self.draw_mask_button.clicked.connect(self._draw_mask)
        self.use_mask_button = QPushButton("Use the mask")
        self.use_mask_button.clicked.connect(self._use_mask)
        self.clear_mask_button = QPushButton("No mask")
        self.clear_mask_button.clicked.connect(lambda: self.session.decide(lambda w: w.set_mask(None)))
        for button in (self.draw_mask_button, self.use_mask_button, self.clear_mask_button):
            row.addWidget(button)
        inner.addLayout(row)

        self.reason_label = wrapped()
        inner.addWidget(self.reason_label)
        session.drawn.connect(self.update_buttons)

    def refresh(self) -> None:
        """Show what the journal says."""
        state = self.session.state
        boxes = () if state is None else state.manual.boxes
        sizes = ", ".join(f"{b - a} x {d - c} px" for a, b, c, d in boxes)
        mask = state is not None and state.manual.mask is not None
        where = f"{len(boxes)} box{'es' if len(boxes) > 1 else ''}: {sizes}" if boxes else "the whole frame"
        self.box_label.setText(
            f"Used now: {where}{'; a mask' if mask else ''}. Boxes hold at the reference energy; the others follow."
        )
        self.update_buttons()

    def update_buttons(self) -> None:
        """Allow what makes sense now, and say why the rest does not."""
        state, why = self.session.state, self._why_not()
        scan = (
            "Open a scan first." if self.session.scan is None else "Something is running." if self.session.busy else ""
        )
        drawn, masked = self._boxes_drawn(), self._in_viewer(self.session.mask_layer())
        boxes = state is not None and bool(state.manual.boxes)
        mask = state is not None and state.manual.mask is not None
        reasons: dict[str, list[str]] = {}
        for button, reason, purpose in (
            (self.suggest_button, scan, "A box around the particle, from a few projections of the reference energy."),
            (self.draw_button, scan, "A layer for rectangles; several boxes are several particles."),
            (self.use_box_button, why or ("" if drawn else "Draw a box, or let one be suggested."),
             "Everything after this works inside; drawn boxes also cut the maps."),
            (self.clear_box_button, why or ("" if boxes else "It is the whole frame."), "Work on the whole frame."),
            (self.draw_mask_button, scan, "A layer to paint on what the camera is not to be trusted with."),
            (self.use_mask_button, why or ("" if masked else "Draw a mask first."), "These pixels are filled."),
            (self.clear_mask_button, why or ("" if mask else "There is no mask."), "Trust every pixel."),
        ):  # fmt: skip
            allow(button, reason, purpose)
            if reason:
                reasons.setdefault(reason, []).append(button.text())
        self.reason_label.setText("\n".join(f"{', '.join(which)}: {reason}" for reason, which in reasons.items()))

    # ----------------------------------------------------------------------------------------------------- actions

    def _in_viewer(self, layer: Any) -> bool:
        viewer = self.session.viewer
        return layer is not None and viewer is not None and any(x is layer for x in viewer.layers)

    def _boxes_drawn(self) -> list[tuple[int, int, int, int]]:
        """Return the rectangles of the layer, cut at the frame."""
        layer, scan = self.session.box_layer(), self.session.scan
        if not self._in_viewer(layer) or scan is None:
            return []
        height, width = scan.stack.shape[2:]
        out = []
        for corners in layer.data:
            points = np.asarray(corners, dtype=float)[:, -2:]
            (y0, x0), (y1, x1) = np.floor(points.min(axis=0) + 0.5), np.ceil(points.max(axis=0) + 0.5)
            out.append((max(0, int(y0)), min(height, int(y1)), max(0, int(x0)), min(width, int(x1))))
        return out

    def _draw_boxes(self, boxes: list[tuple[int, int, int, int]] | None = None) -> None:
        viewer, state = self.session.viewer, self.session.state
        if boxes is None:
            boxes = list(state.manual.boxes) if state is not None and not self._boxes_drawn() else []
        layer = self.session.box_layer()
        if not self._in_viewer(layer):
            layer = viewer.add_shapes(
                ndim=2, name=BOX_LAYER, edge_color="#d0d060", edge_width=1, face_color="transparent", opacity=0.9
            )
            layer.events.data.connect(self.session.on_drawn)
            self.session.box_layer = weakref.ref(layer)
        for y0, y1, x0, x1 in boxes:
            layer.add_rectangles(np.array([[y0 - 0.5, x0 - 0.5], [y1 - 0.5, x1 - 0.5]]))
        viewer.layers.selection.active = layer
        layer.mode = "select" if len(layer.data) else "add_rectangle"
        self.session.on_drawn()

    def _suggest(self) -> None:
        scan, asked = self.session.scan, self.session.asked
        if scan is None:
            return

        def work(progress: Progress) -> tuple[int, int, int, int] | None:
            series = scan.series
            energy = series.scans[reference_energy(series.energies_ev, asked.registration.reference_ev)]
            usable = np.flatnonzero(energy.usable)
            few = set(usable[np.linspace(0, len(usable) - 1, _FRAMES).astype(int)].tolist()) if len(usable) else set()
            part = energy.excluded({i: "not looked at" for i in range(len(energy)) if i not in few})
            bin = estimation_bin(energy.frames.frame_shape[1])
            wide = bin * pixel_width(energy, usual_scan(series.scans))
            data = normalise(part, asked.absorbance, bin=bin, progress=progress)
            found = suggest_box(data.data)
            if found is None:
                return None
            y0, y1, x0, x1 = (round(v * wide) for v in found)
            return y0, y1, x0, x1

        def show(found: tuple[int, int, int, int] | None) -> None:
            if found is None:
                self.session.told.emit(
                    "No box is needed or found: the particle does not stand apart from the frame.", False
                )
                return
            layer = self.session.box_layer()
            if self._in_viewer(layer):
                layer.data = []
            self._draw_boxes([found])
            self.session.told.emit("Suggested; change it as you like, then use it.", False)

        self.session.compute(work, show)

    def _use_boxes(self) -> None:
        boxes = self._boxes_drawn()
        self.session.decide(lambda w: w.set_boxes(boxes), f"{len(boxes)} box{'es' if len(boxes) > 1 else ''} used.")

    def _draw_mask(self) -> None:
        viewer, scan = self.session.viewer, self.session.scan
        workflow, state = self.session.workflow, self.session.state
        if viewer is None or scan is None:
            return
        layer = self.session.mask_layer()
        if not self._in_viewer(layer):
            start = np.zeros(scan.stack.shape[2:], dtype=np.uint8)
            if workflow is not None and state is not None and state.manual.mask is not None:
                start |= workflow.journal.get_array(state.manual.mask).astype(np.uint8)
            layer = viewer.add_labels(start, name=MASK_LAYER, opacity=0.5)
            self.session.mask_layer = weakref.ref(layer)
        viewer.layers.selection.active = layer
        layer.mode = "paint"
        self.session.on_drawn()

    def _use_mask(self) -> None:
        layer = self.session.mask_layer()
        if not self._in_viewer(layer):
            self.session.told.emit("The mask's layer is gone; draw one.", True)
            return
        painted = np.asarray(layer.data) > 0
        self.session.decide(lambda w: w.set_mask(painted), f"Mask of {int(painted.sum())} pixels used.")
