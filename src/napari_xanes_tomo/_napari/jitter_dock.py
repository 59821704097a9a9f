"""The dock of the jitter correction: shift curves of every projection, and the particle standing still."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyqtgraph as pg
from qtpy.QtCore import QTimer
from qtpy.QtWidgets import (
    QCheckBox,
    QDoubleSpinBox,
    QGridLayout,
    QGroupBox,
    QHBoxLayout,
    QLabel,
    QPushButton,
    QSpinBox,
    QVBoxLayout,
)

from napari_xanes_tomo.injection import JitterTest, recover_jitter
from napari_xanes_tomo.model import Alignment, Progress, XanesTomoError
from napari_xanes_tomo.recipe import Recipe
from napari_xanes_tomo.state import Candidate
from napari_xanes_tomo.steps import StepResult, alignment_of, beam_of, quick_look, renormalise
from napari_xanes_tomo.views import edge_traces, residual_stack, sinogram

from .dock import allow, wrapped
from .forms import StillWheel
from .jitter_checks import ChecksPlot
from .plots import BLUE, GREEN, GREY, ORANGE, SinogramPlot, dress
from .previews import AlignedPreview, QuickPreview, ResidualPreview, SlicePreview
from .step_dock import StepDock

__all__ = ["JitterDock", "ShiftPlot"]

_COLOURS = (BLUE, ORANGE)  # dy, dx: they differ in brightness too
_GREY = GREY


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
        self._others: list[Any] = []
        self._steps: list[Any] = []
        for row, (axis, colour) in enumerate(zip(("y", "x"), _COLOURS, strict=True)):
            plot = self.addPlot(row=row, col=0, enableMenu=False)
            dress(plot, self)
            plot.setLabel("left", f"d{axis} (px)")
            faint = pg.mkColor(colour)
            faint.setAlpha(90)
            low, high = pg.PlotDataItem(pen=None), pg.PlotDataItem(pen=None)
            band = pg.FillBetweenItem(low, high, brush=faint)
            moments = pg.PlotDataItem(pen=pg.mkPen(_GREY, width=1))
            points = pg.ScatterPlotItem(size=5, pen=None, brush=colour, hoverable=True, hoverSize=9, tip=self._tip)
            points.sigClicked.connect(self._clicked)
            marker = pg.InfiniteLine(angle=90, pen=pg.mkPen("#d0d060", width=1))
            other = pg.PlotDataItem(pen=pg.mkPen(GREEN, width=1, style=pg.QtCore.Qt.PenStyle.DashLine))
            for item in (low, high, band, moments, other, points, marker):
                plot.addItem(item)
            self._others.append(other)
            self._parts.append((plot, low, high, moments, points, marker))
        self._parts[0][0].getAxis("bottom").setStyle(showValues=False)
        self._parts[1][0].setLabel("bottom", "angle (deg)")
        self._parts[0][0].setXLink(self._parts[1][0])

    @staticmethod
    def _tip(x: float, y: float, data: Any) -> str:
        return f"projection {data}: {x:.2f} deg, {y:.3f} px"

    def show_result(self, theta_deg: npt.ArrayLike, result: StepResult | None, other: StepResult | None = None) -> None:
        """Show the curves of one energy.

        Parameters
        ----------
        theta_deg : (n,) array
            Degrees; numbers of the projections are shown where they are unknown.
        result : StepResult or None
            With ``shift``, ``sigma``, ``moments`` (n, 2), raw px, and its jumps, drawn as lines.
        other : StepResult, optional
            Another candidate to compare it with, drawn dashed.
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
                self._others[k].setData([], [])
                continue
            shift, sigma = result.arrays["shift"][:, k], result.arrays["sigma"][:, k]
            first = result.arrays["moments"][:, k]
            good = np.flatnonzero(np.isfinite(shift))
            order = good[np.argsort(theta[good], kind="stable")]
            low.setData(theta[order], (shift - sigma)[order])
            high.setData(theta[order], (shift + sigma)[order])
            moments.setData(theta[order], first[order])
            points.setData(theta[order], shift[order], data=order.tolist())
            compared = np.full(len(shift), np.nan) if other is None else other.arrays["shift"][:, k]
            self._others[k].setData(theta[order], compared[order], connect="finite")
            plot.autoRange()
        self._show_steps(() if result is None else [int(j[0]) for j in result.numbers.get("jumps", [])])

    def _show_steps(self, frames: Sequence[int]) -> None:
        """Draw a line before each of these projections: where flats were taken, and change points."""
        for plot, line in self._steps:
            plot.removeItem(line)
        self._steps = []
        pen = pg.mkPen(_GREY, width=1, style=pg.QtCore.Qt.PenStyle.DotLine)
        for frame in frames:
            if 0 < frame < len(self._theta):
                at = float(self._theta[frame - 1] + self._theta[frame]) / 2
                for plot, *_ in self._parts:
                    line = pg.InfiniteLine(at, angle=90, pen=pen)
                    plot.addItem(line, ignoreBounds=True)
                    self._steps.append((plot, line))

    def steps(self) -> list[float]:
        """Return the angles of the lines drawn, degrees."""
        return sorted({float(line.value()) for _, line in self._steps})

    def compared(self) -> npt.NDArray[np.float64]:
        """Return the shifts (n, 2) of the other candidate as drawn; none where there is none."""
        drawn = [item.getData() for item in self._others]
        return np.stack([np.zeros(0) if y is None else np.asarray(y, dtype=float) for _, y in drawn], axis=1)

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


class JitterDock(StepDock):
    """Jitter correction: parameters, run, shift curves, decision.

    Parameters
    ----------
    napari_viewer : napari.Viewer
    """

    def __init__(self, napari_viewer: Any) -> None:
        super().__init__(napari_viewer, "jitter")
        with suppress(ValueError):  # another dock has it, or the user
            self.session.viewer.bind_key("N", partial(_next_worst, weakref.ref(self)))

    def _build_plots(self, box: QVBoxLayout) -> None:
        first = QHBoxLayout()
        self.quick_button = QPushButton("Quick look")
        self.quick_button.clicked.connect(self._quick)
        self.test_button = QPushButton("Test on my data")
        self.test_button.clicked.connect(self._test)
        self.worst_button = QPushButton("Next worst (N)")
        self.worst_button.clicked.connect(self.next_worst)
        for button in (self.quick_button, self.worst_button, self.test_button):
            first.addWidget(button)
        box.addLayout(first)
        self.quick = QuickPreview(self.session)
        self.tried_label = wrapped()
        self.tried_label.hide()
        box.addWidget(self.tried_label)
        self.plot = ShiftPlot()
        self.plot.on_click = self._jump
        box.addWidget(self.plot)
        box.addWidget(
            wrapped(
                "Grey: moments alone. Band: one sigma. Dotted: flats taken or sample moved. Dashed: the candidate in "
                "use, where another is chosen in the table. Click a point to go there.",
                faint=True,
            )
        )
        self.compare_label = wrapped()
        self.compare_label.hide()
        box.addWidget(self.compare_label)
        self.checks = ChecksPlot()
        self.checks.listen(self._jump)
        self.checks.hide()
        box.addWidget(self.checks)
        self._looked_at = 0
        self.readout = wrapped()
        self.readout.setToolTip("Displacement of the content of this projection, raw pixels, positive down / right.")
        box.addWidget(self.readout)
        self.preview = AlignedPreview(self.session, "jitter")
        self.aligned_box = QCheckBox("Show the aligned projections as a layer")
        self.aligned_box.setToolTip("Absorbance, the shifts undone: the particle stands still when the angle changes.")
        self.aligned_box.toggled.connect(self._toggle_aligned)
        box.addWidget(self.aligned_box)
        row = QHBoxLayout()
        self.residual_button = QPushButton("Residual of this energy")
        self.residual_button.clicked.connect(self._residual)
        row.addWidget(self.residual_button)
        self.sinogram_button = QPushButton("Sinogram at row")
        self.sinogram_button.clicked.connect(self._sinogram)
        row.addWidget(self.sinogram_button)
        self.row_spin = QSpinBox()
        self.row_spin.setToolTip("Row of the aligned projections.")
        self._spins = StillWheel(self)
        self._spins.watch(self.row_spin)
        row.addWidget(self.row_spin)
        box.addLayout(row)
        self.residual = ResidualPreview(self.session)
        row = QHBoxLayout()
        self.slice_button = QPushButton("Slice before / after")
        self.slice_button.clicked.connect(self._slices)
        row.addWidget(self.slice_button)
        self.blink_box = QCheckBox("Blink")
        self.blink_box.setToolTip("The slice before and after the correction, in turn twice a second.")
        self.blink_box.toggled.connect(self._toggle_blink)
        row.addWidget(self.blink_box)
        self.go_on_button = QPushButton("Go on from it")
        self.go_on_button.clicked.connect(self._go_on)
        row.addWidget(self.go_on_button)
        box.addLayout(row)
        self.before, self.after = SlicePreview(self.session), SlicePreview(self.session)
        self._blinking = QTimer(self)
        self._blinking.setInterval(500)
        self._blinking.timeout.connect(self._blink)
        self.sinogram_plot = SinogramPlot()
        self.sinogram_plot.hide()
        box.addWidget(self.sinogram_plot)
        self.sinogram_label = wrapped(faint=True)
        self.sinogram_label.hide()
        box.addWidget(self.sinogram_label)
        self._kept_views: tuple[tuple[int, int], dict[str, npt.NDArray[np.float64]]] = ((-1, -1), {})
        self._result: StepResult | None = None
        self._result_key: tuple[Any, ...] = ()

    def _build_extra(self, box: QVBoxLayout) -> None:
        group = QGroupBox("By hand")
        grid = QGridLayout(group)
        grid.setContentsMargins(6, 4, 6, 4)
        self.exclude_button = QPushButton("Exclude this projection")
        self.exclude_button.clicked.connect(self._exclude)
        self.point_button = QPushButton("Sample moved before it")
        self.point_button.clicked.connect(self._change_point)
        grid.addWidget(self.exclude_button, 0, 0, 1, 2)
        grid.addWidget(self.point_button, 0, 2, 1, 2)
        self.nudge_spins = tuple(self._spin(f"d{axis} ", 500.0) for axis in "yx")
        for k, spin in enumerate(self.nudge_spins):
            spin.setToolTip("Added to the displacement of this projection, raw px, positive down / right.")
            grid.addWidget(spin, 1, k + 1)
        grid.addWidget(QLabel("Nudge (px)"), 1, 0)
        self.nudge_button = QPushButton("Apply")
        self.nudge_button.clicked.connect(self._nudge)
        grid.addWidget(self.nudge_button, 1, 3)
        grid.addWidget(QLabel("Centre (px)"), 2, 0)
        self.center_spin = self._spin("", 5000.0)
        self.center_spin.setToolTip(
            "Rotation axis of this energy, raw px from the middle column of the frame, positive right."
        )
        grid.addWidget(self.center_spin, 2, 1)
        self.center_button = QPushButton("Set")
        self.center_button.clicked.connect(lambda: self._set_center(True))
        self.found_button = QPushButton("As found")
        self.found_button.clicked.connect(lambda: self._set_center(False))
        grid.addWidget(self.center_button, 2, 2)
        grid.addWidget(self.found_button, 2, 3)
        self.hand_label = wrapped()
        grid.addWidget(self.hand_label, 3, 0, 1, 4)
        box.addWidget(group)

    def _spin(self, prefix: str, most: float) -> QDoubleSpinBox:
        spin = QDoubleSpinBox()
        spin.setRange(-most, most)
        spin.setDecimals(3)
        spin.setSingleStep(0.1)
        spin.setPrefix(prefix)
        spin.setMinimumWidth(96)
        spin.setKeyboardTracking(False)
        self._spins.watch(spin)
        return spin

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
        state, workflow, scan = self.session.state, self.session.workflow, self.session.scan
        unit = self.unit
        counts = (
            unit is not None
            and candidate is not None
            and unit.candidate is not None
            and unit.candidate.id == candidate.id
        )
        by_hand = [] if state is None or not counts else state.manual.jitter_part(self.energy)
        key = (id(scan), id(workflow), self.energy, None if candidate is None else candidate.id, str(by_hand))
        if key != self._result_key:
            self._result_key = key
            self._result = None
            if candidate is not None and workflow is not None:
                self._result = workflow.displacements(self.energy) if by_hand else workflow.result(candidate)
                center = state.manual.centers.get(self.energy) if state is not None else None
                self.center_spin.setValue(float(self._result.numbers["center"]) if center is None else center)
            theta = np.zeros(0) if scan is None or self.energy < 0 else scan.series.scans[self.energy].theta_deg
            in_use = None
            if not counts and unit is not None and unit.candidate is not None and workflow is not None:
                in_use = workflow.result(unit.candidate)
            self.plot.show_result(theta, self._result, in_use)
            self.checks.show_result(theta, self._result)
            self._compare(in_use)
            self.sinogram_plot.hide()
            self.sinogram_label.hide()
        if scan is not None:
            height = scan.series.scans[max(0, self.energy)].frames.frame_shape[0]
            fresh = self.row_spin.maximum() != height - 1
            self.row_spin.setRange(0, height - 1)
            if fresh:
                self.row_spin.setValue(height // 2)
        self._mark(self.session.frame[1])

    def _mark(self, angle: int) -> None:
        self.plot.mark(angle)
        self.checks.mark(angle)
        text = ""
        if self._result is not None and 0 <= angle < len(self._result.arrays["shift"]):
            (dy, dx), (sy, sx) = self._result.arrays["shift"][angle], self._result.arrays["sigma"][angle]
            scan = self.session.scan
            nm = np.nan if scan is None else scan.series.scans[self.energy].pixel_size_nm
            length = f" (± {sy * nm:.2g}, {sx * nm:.2g} nm)" if np.isfinite(nm) else ""
            text = (
                f"projection {angle}: y {dy:.3f} ± {sy:.3f} px, x {dx:.3f} ± {sx:.3f} px{length}"
                if np.isfinite(dy)
                else f"projection {angle}: no shift was found"
            )
            workflow = self.session.workflow
            effect = 0.0 if workflow is None else abs(workflow.edge_effect_ev(self.energy)) * float(sx)
            if effect and np.isfinite(effect):
                text += f"; this energy as a whole displaced by as much: {effect:.2g} eV of edge energy at a surface"
        self.readout.setText(text)
        self._update_by_hand()

    def _compare(self, in_use: StepResult | None) -> None:
        if in_use is None or self._result is None:
            self.compare_label.hide()
            return
        change = self._result.arrays["shift"] - in_use.arrays["shift"]
        good = np.isfinite(change).all(axis=1)
        if good.any():
            (y, x), worst = np.sqrt(np.mean(change[good] ** 2, axis=0)), int(np.nanargmax(np.abs(change).max(axis=1)))
            self.compare_label.setText(
                f"differs from the candidate in use by y {y:.3f}, x {x:.3f} px (rms), most at projection {worst}"
            )
            self.compare_label.show()

    # ------------------------------------------------------------------------------------- quick look, worst, test

    def worst(self) -> list[int]:
        """Return the projections of this energy that are used, the most doubtful first."""
        chosen = self._chosen()
        if chosen is None:
            return []
        _, _, flats, result = chosen
        residual = np.asarray(result.arrays["residual"], dtype=float)
        centre = np.nanmedian(residual)
        spread = 1.4826 * np.nanmedian(np.abs(residual - centre)) + 1e-12
        doubt = np.nan_to_num(flats.arrays.get("doubt", np.zeros(len(residual))))
        rank = np.fmax((residual - centre) / spread / 5, doubt)
        used = np.flatnonzero(np.isfinite(residual))
        return [int(i) for i in used[np.argsort(-rank[used], kind="stable")]]

    def next_worst(self) -> None:
        """Go to the most doubtful projection, from there to the next one."""
        order = self.worst()
        if order:
            energy, angle = self.session.frame
            here = energy == self.energy and angle in order and order.index(angle) == self._looked_at
            self._looked_at = (self._looked_at + 1) % len(order) if here else 0
            self.session.go_to(self.energy, order[self._looked_at])

    def _scan_and_recipe(self) -> tuple[Any, Any] | None:
        workflow, scan = self.session.workflow, self.session.scan
        if scan is None or self.energy < 0:
            return None
        if workflow is not None:
            return workflow.scan(self.energy), workflow.recipe
        return scan.series.scans[self.energy], Recipe()

    def _quick(self) -> None:
        chosen, energy = self._scan_and_recipe(), self.energy
        if chosen is not None:
            scan, recipe = chosen
            self.session.compute(
                lambda progress: quick_look(scan, recipe, progress=progress), partial(self._show_quick, energy)
            )

    def _show_quick(self, energy: int, found: Any) -> None:
        alignment, index, shown, bin = found
        self.quick.add(energy, shown, index, bin)
        (y, x), (sy, sx) = alignment.shift.std(axis=0), np.sqrt(np.mean(alignment.sigma**2, axis=0))
        self.tried_label.setText(
            f"Quick look at {self._energy_text()}: {len(index)} projections, binned {bin} x {bin}: they move by "
            f"y {y:.1f}, x {x:.1f} px (rms), known to {sy:.2f}, {sx:.2f} px. To look at only: Run makes the result."
        )
        self.tried_label.show()

    def _test(self) -> None:
        chosen = self._scan_and_recipe()
        if chosen is not None:
            scan, recipe = chosen
            self.session.compute(lambda progress: recover_jitter(scan, recipe, progress=progress), self._show_test)

    def _show_test(self, found: JitterTest) -> None:
        self.tried_label.setText(f"Test on my data, {found.text()}")
        self.tried_label.show()

    def _jump(self, angle: int) -> None:
        self.session.go_to(self.energy, angle)

    # ----------------------------------------------------------------------------------------------------- by hand

    def _update_buttons(self) -> None:
        super()._update_buttons()
        self._update_by_hand()

    def _update_by_hand(self) -> None:
        if not hasattr(self, "hand_label"):
            return
        state, scan, (energy, angle) = self.session.state, self.session.scan, self.session.frame
        why = self._why_not()
        status = "" if scan is None or energy < 0 else scan.stack.status(energy, angle)
        out = state is not None and angle in state.manual.frames.get(energy, {})
        moved = state is not None and angle in state.manual.change_points.get(energy, ())
        self.exclude_button.setText("Restore this projection" if out else "Exclude this projection")
        missing = "" if out or status == "ok" else f"This projection is {status.partition(':')[0]}."
        allow(self.exclude_button, why or missing, "What depends on it is to be run again; nothing is deleted.")
        self.point_button.setText("Sample did not move here" if moved else "Sample moved before it")
        allow(self.point_button, why, "Name a change point: the jump of the displacements there is reported.")
        none = (
            why
            or self._elsewhere()
            or ("" if self._result is not None else "There is no displacement yet: run the correction first.")
        )
        no_scan = "" if self._scan_and_recipe() is not None else "Open a scan first."
        wait = "Something is running." if self.session.busy else no_scan or self._elsewhere()
        allow(self.quick_button, wait, "A first guess in seconds: binned 4 x 4, every third angle. Never a result.")
        tested = "Known displacements and bad frames are put into copies of this energy and found again."
        allow(self.test_button, wait, tested)
        allow(self.worst_button, none, "Go to the most doubtful projection of this energy, then to the next one.")
        allow(self.nudge_button, none, "Move this projection by so much; it survives a new run of the correction.")
        allow(self.center_button, none, "Let the rotation axis of this energy lie there.")
        set_ = state is not None and energy in state.manual.centers
        allow(self.found_button, none or ("" if set_ else "It is as found."), "Go back to the axis that was found.")
        allow(self.residual_button, none, "Data minus reprojection of the other angles, as a layer; takes a moment.")
        allow(self.sinogram_button, none, "One row at every angle, with the edges and the axis as they were fitted.")
        chosen = self.selected()
        views = "" if chosen is not None and self._views(chosen) else "Views are kept of the newest result only."
        allow(self.slice_button, none or views, "One slice before and after the correction, as two layers.")
        there = "" if self.before.layer is not None and self.after.layer is not None else "Show the slices first."
        self.blink_box.setEnabled(not there)
        partial_one = "" if chosen is not None and chosen.partial else "The result selected is not a partial one."
        allow(self.go_on_button, why or partial_one, "Search on from where the cancelled search had got to.")
        lines = []
        if out and state is not None:
            lines.append(f"projection {angle}: excluded ({state.manual.frames[energy][angle]})")
        if state is not None and angle in state.manual.nudges.get(energy, {}):
            dy, dx = state.manual.nudges[energy][angle]
            lines.append(f"projection {angle}: nudged by y {dy:+g}, x {dx:+g} px")
        if set_ and state is not None:
            lines.append(f"rotation centre set to {state.manual.centers[energy]:g} px")
        if self._result is not None:
            for frame, dy, dx in self._result.numbers.get("jumps", []):
                lines.append(f"before projection {int(frame)} the sample jumped by y {dy:+.2f}, x {dx:+.2f} px")
        self.hand_label.setText("\n".join([f"All: {none}"] if none else lines))

    def _views(self, candidate: Candidate) -> dict[str, npt.NDArray[np.float64]]:
        workflow = self.session.workflow
        key = (id(workflow), candidate.id)
        if self._kept_views[0] != key:
            self._kept_views = (key, {} if workflow is None else workflow.views(candidate))
        return self._kept_views[1]

    def _slices(self) -> None:
        chosen = self.selected()
        views = {} if chosen is None else self._views(chosen)
        if views:
            self.before.put(views, "before", self._energy_text())
            self.after.put(views, "after", self._energy_text())
            self._update_by_hand()

    def _toggle_blink(self, on: bool) -> None:
        if on:
            self._blinking.start()
        else:
            self._blinking.stop()
            for layer in (self.before.layer, self.after.layer):
                if layer is not None:
                    layer.visible = True

    def _blink(self) -> None:
        before, after = self.before.layer, self.after.layer
        if before is None or after is None:  # removed by the user, or with its scan
            self.blink_box.setChecked(False)
            return
        before.visible = not before.visible
        after.visible = not before.visible

    def _go_on(self) -> None:
        chosen = self.selected()
        if chosen is not None:
            self._shown = None
            self.session.go_on(self.energy, chosen.id)

    def _exclude(self) -> None:
        state, (energy, angle) = self.session.state, self.session.frame
        if state is not None and angle in state.manual.frames.get(energy, {}):
            self.session.decide(lambda w: w.restore(energy, angle), f"Projection {angle} restored.")
        else:
            said = f"Projection {angle} excluded; what depends on it is stale, Run makes it again."
            self.session.decide(lambda w: w.exclude(energy, angle), said)

    def _change_point(self) -> None:
        state, (energy, angle) = self.session.state, self.session.frame
        there = state is not None and angle in state.manual.change_points.get(energy, ())
        self.session.decide(lambda w: w.name_change_point(energy, angle, not there))

    def _nudge(self) -> None:
        energy, angle = self.session.frame
        dy, dx = (spin.value() for spin in self.nudge_spins)
        for spin in self.nudge_spins:
            spin.setValue(0.0)
        if dy or dx:
            self.session.decide(lambda w: w.nudge(energy, angle, dy, dx), f"Projection {angle} nudged.")

    def _set_center(self, there: bool) -> None:
        energy, value = self.energy, self.center_spin.value()
        self.session.decide(lambda w: w.set_center(energy, value if there else None))

    # ---------------------------------------------------------------------------------------- residual and sinogram

    def _chosen(self) -> tuple[Any, int, StepResult, StepResult] | None:
        workflow, state, energy = self.session.workflow, self.session.state, self.energy
        flats = None if state is None or energy < 0 else state[("flats", energy)].candidate
        if workflow is None or flats is None or self._result is None:
            return None
        return workflow, energy, workflow.result(flats), self._result

    def _residual(self) -> None:
        chosen, key = self._chosen(), self._result_key
        if chosen is None:
            return
        workflow, energy, flats, result = chosen
        scan, recipe = workflow.scan(energy), workflow.recipe
        scans = dict(enumerate(workflow.series.scans))

        def work(progress: Progress) -> Any:
            progress("residual", 0, 10)
            data = renormalise(scan, recipe, flats, number=energy, around=scans)
            whole = alignment_of(result, scan)
            good = np.isfinite(whole.shift[data.index]).all(axis=1)
            index = data.index[good]
            part = Alignment(whole.shift[index], whole.sigma[index]).binned(data.bin, data.frame_shape)
            theta = np.asarray(scan.theta_deg, dtype=float)[index]
            rest = residual_stack(
                data.data[good], theta, part, progress=lambda what, done, total: progress(what, 3 * done + 1, 10)
            )
            return rest, index, data.bin

        self.session.compute(work, partial(self._show_residual, energy, key))

    def _show_residual(self, energy: int, key: Any, found: Any) -> None:
        rest, index, bin = found
        self.residual.add(energy, key, rest, index, bin)

    def _sinogram(self) -> None:
        chosen, row = self._chosen(), self.row_spin.value()
        if chosen is None:
            return
        workflow, energy, flats, result = chosen
        scan, scans = workflow.scan(energy), dict(enumerate(workflow.series.scans))

        def work(progress: Progress) -> Any:
            progress("sinogram", 0, 1)
            beam = beam_of(flats, scans)
            rows, index = sinogram(scan, flats.arrays["air"], result.arrays["shift"], row, beam)
            if len(index) < 2:
                raise XanesTomoError("sinogram: expected at least two projections with a displacement")
            theta = np.asarray(scan.theta_deg, dtype=float)[index]
            return rows, theta, edge_traces(rows, theta, result.arrays["shift"][index, 1])

        self.session.compute(work, partial(self._show_sinogram, row))

    def _show_sinogram(self, row: int, found: Any) -> None:
        self.sinogram_plot.show_sinogram(*found)
        self.sinogram_plot.show()
        text = f"{self._energy_text()}, row {row}, as recorded sideways. Lines: edges and rotation axis as fitted; "
        self.sinogram_label.setText(f"{text}where line and picture part, the displacement is wrong.")
        self.sinogram_label.show()


def _next_worst(dock: Any, _viewer: Any) -> None:
    found = dock()
    if found is not None:
        found.next_worst()
