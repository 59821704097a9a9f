"""The dock of the jitter correction: shift curves of every projection, and the particle standing still."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import pyqtgraph as pg
from qtpy.QtWidgets import QCheckBox, QLabel, QVBoxLayout

from napari_xanes_tomo.model import Alignment, FloatArray
from napari_xanes_tomo.steps import StepResult, alignment_of
from napari_xanes_tomo.workflow import Candidate

from .layers import AlignedStack, geometry, lazy_frames, spread_limits
from .session import Session
from .step_dock import StepDock

__all__ = ["AlignedPreview", "JitterDock", "ShiftPlot"]

_COLOURS = ("#4fa3e0", "#e0904f")  # dy, dx: they differ in brightness too
_GREY = "#909090"


class ShiftPlot(pg.GraphicsLayoutWidget):
    """Displacement of every projection against its angle: dy above, dx below, with the band of one sigma."""

    def __init__(self) -> None:
        super().__init__()
        self.setBackground(None)
        self.setFixedHeight(260)
        self.on_click: Any = None
        self._theta: npt.NDArray[np.float64] = np.zeros(0)
        self._numbers: npt.NDArray[np.intp] = np.zeros(0, dtype=int)
        self._parts: list[tuple[Any, Any, Any, Any, Any, Any]] = []
        for row, (axis, colour) in enumerate(zip(("y", "x"), _COLOURS, strict=True)):
            plot = self.addPlot(row=row, col=0, enableMenu=False)
            plot.ctrlMenu.setParent(self, plot.ctrlMenu.windowFlags())  # pyqtgraph leaves it without an owner
            plot.setLabel("left", f"d{axis} (px)")
            plot.showGrid(x=True, y=True, alpha=0.15)
            for side in ("left", "bottom"):
                plot.getAxis(side).setPen(_GREY)
                plot.getAxis(side).setTextPen(_GREY)
            plot.getAxis("left").setWidth(52)
            faint = pg.mkColor(colour)
            faint.setAlpha(90)
            low, high = pg.PlotDataItem(pen=None), pg.PlotDataItem(pen=None)
            band = pg.FillBetweenItem(low, high, brush=faint)
            moments = pg.PlotDataItem(pen=pg.mkPen(_GREY, width=1))
            points = pg.ScatterPlotItem(size=5, pen=None, brush=colour, hoverable=True, hoverSize=9, tip=self._tip)
            points.sigClicked.connect(self._clicked)
            marker = pg.InfiniteLine(angle=90, pen=pg.mkPen("#d0d060", width=1))
            for item in (low, high, band, moments, points, marker):
                plot.addItem(item)
            self._parts.append((plot, low, high, moments, points, marker))
        self._parts[0][0].getAxis("bottom").setStyle(showValues=False)
        self._parts[1][0].setLabel("bottom", "angle (deg)")
        self._parts[0][0].setXLink(self._parts[1][0])

    @staticmethod
    def _tip(x: float, y: float, data: Any) -> str:
        return f"projection {data}: {x:.2f} deg, {y:.3f} px"

    def show_result(self, theta_deg: npt.ArrayLike, result: StepResult | None) -> None:
        """Show the curves of one energy.

        Parameters
        ----------
        theta_deg : (n,) array
            Degrees; numbers of the projections are shown where they are unknown.
        result : StepResult or None
            With ``shift``, ``sigma``, ``moments`` (n, 2), raw px.
        """
        theta = np.asarray(theta_deg, dtype=float)
        if not np.isfinite(theta).all():
            theta = np.arange(len(theta), dtype=float)
        self._theta = theta
        for k, (plot, low, high, moments, points, _) in enumerate(self._parts):
            if result is None:
                for item in (low, high, moments):
                    item.setData([], [])
                points.setData([], [])
                continue
            shift, sigma = result.arrays["shift"][:, k], result.arrays["sigma"][:, k]
            first = result.arrays["moments"][:, k]
            good = np.flatnonzero(np.isfinite(shift))
            order = good[np.argsort(theta[good], kind="stable")]
            low.setData(theta[order], (shift - sigma)[order])
            high.setData(theta[order], (shift + sigma)[order])
            moments.setData(theta[order], first[order])
            points.setData(theta[order], shift[order], data=order.tolist())
            plot.autoRange()

    def mark(self, angle: int) -> None:
        """Move the marker to a projection."""
        if 0 <= angle < len(self._theta):
            for *_, marker in self._parts:
                marker.setValue(self._theta[angle])

    def curves(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return the numbers of the projections plotted and their shifts (n, 2), as they stand in the plot."""
        points = [parts[4] for parts in self._parts]
        numbers = np.array(points[0].data["data"].tolist(), dtype=float)
        return numbers, np.stack([p.data["y"] for p in points], axis=1)

    def _clicked(self, _: Any, points: Any) -> None:
        if len(points) and self.on_click is not None:
            self.on_click(int(points[0].data()))


class AlignedPreview:
    """A layer with every projection as it lies after the jitter correction; follows the journal."""

    def __init__(self, session: Session, step: str) -> None:
        self._session = session
        self._step = step
        self._stack: AlignedStack | None = None
        self._layer: Any = lambda: None
        self._keys: tuple[Any, ...] = ()

    @property
    def layer(self) -> Any:
        """The layer; None while there is none."""
        layer, viewer = self._layer(), self._session.viewer
        if layer is None or viewer is None or not any(x is layer for x in viewer.layers):
            return None
        return layer

    def _found(self) -> tuple[tuple[Any, ...], dict[int, tuple[Alignment, FloatArray]]]:
        state, workflow = self._session.state, self._session.workflow
        if state is None or workflow is None:
            return (), {}
        units = {
            e: (state[(self._step, e)].candidate, state[("flats", e)].candidate)
            for e in range(len(workflow.series.scans))
            if state[(self._step, e)].status in ("candidate", "accepted")
        }
        ready = {e: (a, b) for e, (a, b) in units.items() if a is not None and b is not None}
        keys = (id(workflow), tuple((e, a.id, b.id) for e, (a, b) in ready.items()))
        if keys == self._keys and self.layer is not None:
            return keys, {}
        found = {}
        for e, (a, b) in ready.items():
            air = workflow.result(b).arrays["air"]
            found[e] = (alignment_of(workflow.result(a), workflow.scan(e)), air)
        return keys, found

    def show(self) -> bool:
        """Make or update the layer; return whether there is anything to show."""
        viewer, scan, source = self._session.viewer, self._session.scan, self._session.layer
        if viewer is None or scan is None or source is None:
            return False
        keys, found = self._found()
        layer = self.layer
        if keys == self._keys and layer is not None:
            return True
        if not found:
            self.hide()
            return False
        if self._stack is None or self._stack.series is not scan.series:
            self._stack = AlignedStack(scan.stack)
        read = self._stack.reader(found)
        data = lazy_frames(read, scan.stack.shape, np.float32)
        self._keys = keys
        if layer is not None:
            layer.data = data
            return True
        energy = self._session.frame[0] if self._session.frame[0] in found else next(iter(found))
        usable = np.flatnonzero(scan.series.scans[energy].usable)
        limits = spread_limits([read(energy, int(usable[len(usable) // 2]))], 0.5, 99.9)
        active = viewer.layers.selection.active
        layer = viewer.add_image(
            data, name="aligned, jitter corrected", contrast_limits=limits, colormap="gray", **geometry(scan.series)
        )
        viewer.layers.selection.active = active  # the scan stays the one that is worked on
        self._layer = weakref.ref(layer)
        return True

    def hide(self) -> None:
        """Remove the layer."""
        viewer, layer = self._session.viewer, self.layer
        if layer is not None:
            viewer.layers.remove(layer)
        self._keys = ()


class JitterDock(StepDock):
    """Jitter correction: parameters, run, shift curves, decision.

    Parameters
    ----------
    napari_viewer : napari.Viewer
    """

    def __init__(self, napari_viewer: Any) -> None:
        super().__init__(napari_viewer, "jitter")

    def _build_plots(self, box: QVBoxLayout) -> None:
        self.plot = ShiftPlot()
        self.plot.on_click = self._jump
        box.addWidget(self.plot)
        caption = QLabel("Grey: moments alone. Band: one sigma. Click a point to go there.")
        caption.setWordWrap(True)
        caption.setStyleSheet(f"color: {_GREY}; font-size: 11px;")
        box.addWidget(caption)
        self.readout = QLabel()
        self.readout.setWordWrap(True)
        self.readout.setToolTip("Displacement of the content of this projection, raw pixels, positive down / right.")
        box.addWidget(self.readout)
        self.preview = AlignedPreview(self.session, "jitter")
        self.aligned_box = QCheckBox("Show the aligned projections as a layer")
        self.aligned_box.setToolTip("Absorbance, the shifts undone: the particle stands still when the angle changes.")
        self.aligned_box.toggled.connect(self._toggle_aligned)
        box.addWidget(self.aligned_box)
        self._result: StepResult | None = None
        self._result_key: tuple[Any, ...] = ()

    def refresh(self) -> None:
        """Show what the journal says."""
        super().refresh()
        if self.aligned_box.isChecked() and not self.session.busy:
            self._toggle_aligned(True)

    def _toggle_aligned(self, on: bool) -> None:
        if not on:
            self.preview.hide()
        elif not self.preview.show():
            self._tell("There is no shift to apply yet: run the correction first.", False)
            self.aligned_box.setChecked(False)

    def _show_result(self, candidate: Candidate | None) -> None:
        workflow, scan = self.session.workflow, self.session.scan
        key = (id(scan), id(workflow), self.energy, None if candidate is None else candidate.id)
        if key != self._result_key:
            self._result_key = key
            self._result = None
            if candidate is not None and workflow is not None:
                self._result = workflow.result(candidate)
            theta = np.zeros(0) if scan is None or self.energy < 0 else scan.series.scans[self.energy].theta_deg
            self.plot.show_result(theta, self._result)
        self._mark(self.session.frame[1])

    def _mark(self, angle: int) -> None:
        self.plot.mark(angle)
        text = ""
        if self._result is not None and 0 <= angle < len(self._result.arrays["shift"]):
            (dy, dx), (sy, sx) = self._result.arrays["shift"][angle], self._result.arrays["sigma"][angle]
            text = (
                f"projection {angle}: y {dy:.3f} ± {sy:.3f} px, x {dx:.3f} ± {sx:.3f} px"
                if np.isfinite(dy)
                else f"projection {angle}: no shift was found"
            )
        self.readout.setText(text)

    def _jump(self, angle: int) -> None:
        self.session.go_to(self.energy, angle)
