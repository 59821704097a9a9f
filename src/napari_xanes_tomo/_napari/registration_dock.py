"""The dock of the energy registration: magnification and translation of every energy, and the particle on one grid."""

from __future__ import annotations

from typing import Any

import numpy as np
from qtpy.QtCore import QTimer
from qtpy.QtWidgets import (
    QCheckBox,
    QComboBox,
    QDoubleSpinBox,
    QGridLayout,
    QGroupBox,
    QHBoxLayout,
    QLabel,
    QPushButton,
    QVBoxLayout,
)

from napari_xanes_tomo.decomposition import Decomposition
from napari_xanes_tomo.differences import NullTest
from napari_xanes_tomo.findings import scale_laws
from napari_xanes_tomo.graph import PARAMETERS
from napari_xanes_tomo.injection import RegistrationTest, recover_registration
from napari_xanes_tomo.pixels import pixel_widths
from napari_xanes_tomo.recipe import SCALE_CHANGES
from napari_xanes_tomo.registration_qc import ErrorMap
from napari_xanes_tomo.state import Candidate

from .dock import allow, cell, fit, table, wrapped
from .forms import StillWheel
from .plots import MatrixPlot, PointPlot
from .previews import AlignedPreview, BlockPreview
from .step_dock import StepDock

__all__ = ["RegistrationDock"]

LAWS = ("calibration", "proportional", "header", "thin lens")
_LEFT = "What each projection is displaced by beyond the alignment of its energy; click a cell to go there."
_CLOSED = (
    "How far comparisons around a triangle of energies miss zero, in standard errors: the worst triangle that holds "
    "both energies. More than 4 says that one of them is wrong, not which one."
)
MATRICES = {
    "displacement left (px)": ("px", _LEFT),
    "displacement left (nm)": ("nm", _LEFT),
    "displacement left (eV at a surface)": (
        "ev",
        _LEFT + " What it would do to the edge energy at a surface, were the whole energy displaced by it. "
        "Needs the maps; 0 for energies that have no part in the edge.",
    ),
    "displacement over the usual": ("z", _LEFT),
    "closure, y": ("ty", _CLOSED),
    "closure, x": ("tx", _CLOSED),
    "closure, scale": ("scale", _CLOSED),
}
"""What the matrix of the dock can show: what it is of, and its explanation."""

UNITS = {"px": "px", "nm": "nm", "ev": "eV", "z": "times the usual"}


class RegistrationDock(StepDock):
    """Energy registration: parameters, run, magnification against its laws, decision.

    Parameters
    ----------
    napari_viewer : napari.Viewer
    """

    def __init__(self, napari_viewer: Any) -> None:
        super().__init__(napari_viewer, "registration")
        self.energies_combo.setCurrentIndex(1)  # one energy alone is the exception here

    def _build_plots(self, box: QVBoxLayout) -> None:
        rows = (("M", 1), ("M / law - 1, %", 1), ("moved, px", 3), ("blur, px²", 1))
        self.plot = PointPlot(rows, "energy (eV)", 500)
        self.plot.on_click = self._jump
        box.addWidget(self.plot)
        box.addWidget(
            wrapped(
                "Magnification with one sigma; lines: calibration of the pixel size (solid), proportional to energy "
                "(dashed), headers (dotted), thin lens (dash-dotted). Second: against the calibration; laws far from "
                "it lie outside. Third: translation of the object, y blue, x orange, z green. Last: how much wider the "
                "point spread is than the reference's, as a variance on the common grid; an energy out of focus fakes "
                "a rim as a misplaced one does (maps.common_blur makes them alike). Click a point to go there.",
                faint=True,
            )
        )
        self.rows = table(["eV", "M", "moved y,x,z (px)", "verdict", "state"])
        self.rows.setToolTip("Click a row to go to its energy.")
        self.rows.cellClicked.connect(lambda row, _: self._jump(row))
        box.addWidget(self.rows)
        self.preview = AlignedPreview(self.session, "registration")
        self.difference = AlignedPreview(self.session, "registration", against="difference")
        self.chess = AlignedPreview(self.session, "registration", against="chess board")
        self.other = AlignedPreview(self.session, "registration", against="other")
        self.aligned_box = QCheckBox("Show the aligned stack as a layer")
        self.aligned_box.setToolTip(
            "Absorbance on the common grid, all energies equally dark: it stays still when the energy is stepped."
        )
        self.difference_box = QCheckBox("Show the difference to the reference as a layer")
        self.difference_box.setToolTip("The aligned frame minus that of the reference at the same angle.")
        self.chess_box = QCheckBox("Show a chess board with the reference as a layer")
        self.chess_box.setToolTip("Every other field is the reference's: edges go on across the fields where they fit.")
        self.blink_box = QCheckBox("Blink with the reference")
        self.blink_box.setToolTip("The reference at the same angle, twice a second over the aligned stack.")
        self._checked = (
            (self.aligned_box, self.preview),
            (self.difference_box, self.difference),
            (self.chess_box, self.chess),
            (self.blink_box, self.other),
        )
        for check, preview in self._checked:
            check.toggled.connect(lambda on, c=check, p=preview: self._toggle(on, c, p))
            box.addWidget(check)
        self._blinking = QTimer(self)
        self._blinking.setInterval(500)
        self._blinking.timeout.connect(self._blink)
        self.blocks = BlockPreview(self.session)
        self.blocks_box = QCheckBox("Show how parts of the object are displaced, in")
        self.blocks_box.setToolTip(
            "Arrows and a heat map; beyond the alignment, mean of all angles: a sample that changes shape shows here."
        )
        self.blocks_box.toggled.connect(self._show_blocks)
        self.blocks_combo = QComboBox()
        self.blocks_combo.addItems(BlockPreview.UNITS)
        self.blocks_combo.setToolTip(
            "Colours: px, nm, or what it does to the edge energy at a surface (after the maps)."
        )
        self.blocks_combo.currentIndexChanged.connect(lambda _: self._show_blocks(self.blocks_box.isChecked()))
        row = QHBoxLayout()
        row.addWidget(self.blocks_box)
        row.addWidget(self.blocks_combo)
        row.addStretch(1)
        box.addLayout(row)
        self.blocks_label = wrapped(faint=True)
        self.blocks_label.hide()
        box.addWidget(self.blocks_label)
        self._sizes: list[float] = []
        self.moments = PointPlot((("mass (m0), %", 1), ("width (m2), %", 1)), "M / calibration - 1, %", 240)
        self.moments.on_click = self._jump
        box.addWidget(self.moments)
        self.moments_label = wrapped(faint=True)
        box.addWidget(self.moments_label)
        self._build_errors(box)
        self._points_key: tuple[Any, ...] = ()

    def _build_errors(self, box: QVBoxLayout) -> None:
        group = QGroupBox("What is left")
        inner = QVBoxLayout(group)
        inner.setContentsMargins(6, 4, 6, 4)
        row = QHBoxLayout()
        self.matrix_combo = QComboBox()
        self.matrix_combo.addItems(list(MATRICES))
        self.matrix_combo.currentIndexChanged.connect(self._fill_matrix)
        self._wheels = StillWheel(self)
        self._wheels.watch(self.matrix_combo)
        self._wheels.watch(self.blocks_combo)
        row.addWidget(self.matrix_combo, 1)
        self.worst_button = QPushButton("Next worst")
        self.worst_button.setToolTip(
            "Go to the projection of all energies that is displaced most beyond what is usual."
        )
        self.worst_button.clicked.connect(self.next_worst)
        row.addWidget(self.worst_button)
        inner.addLayout(row)
        self.matrix = MatrixPlot(220)
        self.matrix.on_click = self._jump_in_matrix
        inner.addWidget(self.matrix)
        self.matrix_label = wrapped(faint=True)
        inner.addWidget(self.matrix_label)
        self.test_button = QPushButton("Test on my data")
        self.test_button.clicked.connect(self._test)
        inner.addWidget(self.test_button)
        self.test_label = wrapped()
        self.test_label.hide()
        inner.addWidget(self.test_label)
        self.parts = PointPlot((("y, px", 2), ("x, px", 2)), "angle (deg)", 240)
        inner.addWidget(self.parts)
        self.parts_label = wrapped(faint=True)
        inner.addWidget(self.parts_label)
        self.null_label = wrapped(faint=True)
        self.null_label.setToolTip(
            "Pairs of energies with no edge between them: after one factor nothing but noise should be left."
        )
        inner.addWidget(self.null_label)
        box.addWidget(group)
        self._decomposition: Decomposition | None = None
        self._nulls: tuple[NullTest, ...] = ()
        self._errors: ErrorMap | None = None
        self._visited = 0

    def _build_extra(self, box: QVBoxLayout) -> None:
        group = QGroupBox("By hand")
        grid = QGridLayout(group)
        grid.setContentsMargins(6, 4, 6, 4)
        self.exclude_button = QPushButton("Exclude this energy")
        self.exclude_button.clicked.connect(self._exclude)
        grid.addWidget(self.exclude_button, 0, 0, 1, 4)
        grid.addWidget(QLabel("Magnification"), 1, 0)
        self.magnification_spin = QDoubleSpinBox()
        self.magnification_spin.setRange(0.01, 99.0)
        self.magnification_spin.setDecimals(6)
        self.magnification_spin.setSingleStep(0.0005)
        self.magnification_spin.setToolTip("Pixels of this energy per pixel of the reference.")
        self._spins = StillWheel(self)
        self._spins.watch(self.magnification_spin)
        grid.addWidget(self.magnification_spin, 1, 1)
        self.fix_button = QPushButton("Fix")
        self.fix_button.clicked.connect(lambda: self._fix(True))
        self.measure_button = QPushButton("Measure")
        self.measure_button.clicked.connect(lambda: self._fix(False))
        grid.addWidget(self.fix_button, 1, 2)
        grid.addWidget(self.measure_button, 1, 3)
        grid.addWidget(QLabel("Change of scale is"), 2, 0)
        self.change_combo = QComboBox()
        self.change_combo.addItems(["as in the recipe", *SCALE_CHANGES])
        self.change_combo.activated.connect(self._say_change)
        self._spins.watch(self.change_combo)
        grid.addWidget(self.change_combo, 2, 1, 1, 3)
        self.hand_label = wrapped()
        grid.addWidget(self.hand_label, 3, 0, 1, 4)
        box.addWidget(group)

    # ------------------------------------------------------------------------------------------------ what is shown

    def refresh(self) -> None:
        """Show what the journal says."""
        self._fill_energies()
        super().refresh()
        if not self.session.busy:
            for check, preview in self._checked:
                if check.isChecked():
                    self._toggle(True, check, preview)

    def _toggle(self, on: bool, check: QCheckBox, preview: AlignedPreview) -> None:
        if not on:
            preview.hide()
        elif not preview.show():
            self._tell("Nothing is registered yet: run the registration first.", False)
            check.setChecked(False)
        if check is self.blink_box:
            if check.isChecked():
                if not self.aligned_box.isChecked():
                    self.aligned_box.setChecked(True)
                self._blinking.start()
            else:
                self._blinking.stop()

    def _blink(self) -> None:
        layer = self.other.layer
        if layer is None:  # removed by the user, or with its scan
            self.blink_box.setChecked(False)
        else:
            layer.visible = not layer.visible

    def _show_blocks(self, on: bool) -> None:
        workflow, candidate = self.session.workflow, self.selected()
        self.blocks_label.setVisible(on)
        if not on or workflow is None or candidate is None:
            self.blocks.hide()
            self.blocks_label.setText("This energy is not registered." if on else "")
        else:
            unit, effect = self.blocks_combo.currentText(), workflow.edge_effect_ev(self.energy)
            self.blocks_label.setText(self.blocks.put(self.energy, workflow.result(candidate), unit, effect))

    def _fill_matrix(self) -> None:
        """Show what is left of the error, by energy and projection, or the closures of triangles of energies."""
        workflow, scan, name = self.session.workflow, self.session.scan, self.matrix_combo.currentText()
        known = workflow is not None and scan is not None and not self.session.busy
        self._errors = workflow.error_map() if known and workflow is not None else None
        self._decomposition = workflow.decomposition() if known and workflow is not None else None
        self._nulls = workflow.null_tests() if known and workflow is not None else ()
        self._fill_parts()
        any_known = self._errors is not None and bool(np.isfinite(self._errors.z).any())
        allow(self.worst_button, "" if any_known else "No displacement of single projections is known here.", "")
        names = [] if scan is None else [f"{s.energy_ev:g}" for s in scan.series.scans]
        kind, text = MATRICES[name]
        self.matrix_label.setText(text)
        if workflow is None or self._errors is None or scan is None or not any_known:
            self.matrix.show_matrix(np.zeros((0, 0)), rows=(), left="", bottom="")
            return
        if kind in PARAMETERS:
            solved = workflow.joint()
            values = np.full((len(names),) * 2, np.nan) if solved is None else solved.closure_matrix(kind)
            self.matrix.show_matrix(
                values, rows=names, left="energy (eV)", bottom="energy (eV)", columns=names, unit="standard errors"
            )
        else:
            values = {
                "px": self._errors.length_px,
                "nm": self._errors.length_nm([s.pixel_size_nm for s in scan.series.scans]),
                "ev": self._errors.effect_ev([workflow.edge_effect_ev(e) for e in range(len(names))]),
                "z": self._errors.z,
            }[kind]
            self.matrix.show_matrix(values, rows=names, left="energy (eV)", bottom="projection", unit=UNITS[kind])
        self._mark(self.session.frame[1])

    def _fill_parts(self) -> None:
        """Show what of the shifts repeats at every energy, and what is left at this one."""
        found, energy = self._decomposition, self.energy
        if found is None or not 0 <= energy < len(found.energies_ev) or not np.isfinite(found.remainder).any():
            self.parts_label.setText("")
            self.null_label.setText("")
            for row in range(2):
                self.parts.show_points(row, [], [], [])
            return
        for row in range(2):
            parts = [(found.synchronous[:, row], None), (found.remainder[energy, :, row], None)]
            self.parts.show_points(row, found.theta_deg, parts, list(range(len(found.theta_deg))))
        self.null_label.setText("\n".join(t.text() for t in self._nulls))
        self.parts_label.setText(
            f"{found.text()} Blue: what repeats at every energy (the stage); orange: what is left at this energy."
        )

    def _jump_in_matrix(self, row: int, column: int) -> None:
        if MATRICES[self.matrix_combo.currentText()][0] in PARAMETERS:
            column = max(0, self.session.frame[1])
        self.session.go_to(row, column)

    def next_worst(self) -> None:
        """Go to the projection that is displaced most beyond what is usual, then to the next one."""
        worst = [] if self._errors is None else self._errors.worst(50)
        if not worst:
            return
        e, i, z = worst[self._visited % len(worst)]
        self._visited += 1
        self.session.go_to(e, i)
        dy, dx = self._errors.shift[e, i]  # type: ignore[union-attr]
        place = f"{self._energy_text()}, projection {i}"
        self._tell(f"{place}: displaced by {dy:+.2f}, {dx:+.2f} px (y, x), {z:.1f} times what is usual there.", False)

    def _test(self) -> None:
        scan, state, workflow, energy = self.session.scan, self.session.state, self.session.workflow, self.energy
        if scan is None or state is None or workflow is None or state.reference is None:
            return
        one, reference, recipe = workflow.scan(energy), workflow.scan(state.reference), workflow.recipe
        self.session.compute(
            lambda progress: recover_registration(one, reference, recipe, progress=progress), self._show_test
        )

    def _show_test(self, found: RegistrationTest) -> None:
        self.test_label.setText(f"Test on my data, {found.text()}")
        self.test_label.show()

    def _mark(self, angle: int) -> None:
        matrix_of_energies = MATRICES[self.matrix_combo.currentText()][0] in PARAMETERS
        self.matrix.mark(self.energy, self.energy if matrix_of_energies else angle)

    def _fill_energies(self) -> None:
        state, scan = self.session.state, self.session.scan
        units = {} if state is None else {e: u for (s, e), u in state.units.items() if s == self.step.name}
        reference = None if state is None else state.reference
        out = () if state is None else tuple(sorted(state.manual.energies))
        key = (
            id(scan),
            reference,
            self.session.busy,
            out,
            *((e, u.status, u.candidate.id if u.candidate else 0) for e, u in units.items()),
        )
        if key == self._points_key:
            return
        self._points_key = key
        self._visited = 0
        self._fill_matrix()
        scans = () if scan is None else scan.series.scans
        n = len(scans)
        energies = np.array([s.energy_ev for s in scans], dtype=float)
        measured, sigma = np.full(n, np.nan), np.full(n, np.nan)
        moved, moved_sigma = np.full((n, 3), np.nan), np.full((n, 3), np.nan)
        workflow = self.session.workflow
        nothing = np.full(n, np.nan)
        blur, blur_sigma = (nothing, nothing) if workflow is None or self.session.busy else workflow.point_spread()
        self.rows.setRowCount(n)
        width = np.ones(n) if scan is None or reference is None else pixel_widths(scan.series, reference)
        for e in range(n):
            unit = units.get(e)
            candidate = None if unit is None else unit.candidate
            texts = [f"{energies[e]:g}", "", "", "", ""]
            if candidate is not None:
                numbers = candidate.payload["numbers"]
                measured[e], sigma[e] = (width[e] * numbers[k] for k in ("magnification", "magnification_sigma"))
                moved[e], moved_sigma[e] = numbers["translation"], numbers["translation_sigma"]
                texts[1] = f"{measured[e]:.5f} ± {sigma[e]:.5f}"
                texts[2] = ", ".join(f"{v:.2f}" for v in moved[e])
                texts[3] = "reference" if e == reference else candidate.quality.verdict
            if unit is not None:
                texts[4] = "excluded" if e in out else unit.status if unit.status != "idle" else "not run"
            for column, text in enumerate(texts):
                made = cell(text, bold=text in ("check", "failed", "stale"))
                if column == 4 and unit is not None and unit.reason:
                    made.setToolTip(unit.reason)
                self.rows.setItem(e, column, made)
        fit(self.rows, most=9)
        laws = self._laws()
        law = laws.get("calibration", np.full(n, np.nan))
        line = np.argsort(energies)
        numbers_of = list(range(n))
        lines = [laws.get(name, nothing)[line] for name in LAWS] if laws else []
        self.plot.show_points(0, energies, [(measured, sigma)], numbers_of, [(energies[line], v) for v in lines])
        lines = [100 * (v / law[line] - 1) for v in lines]
        off = (100 * (measured / law - 1), 100 * sigma / law)
        self.plot.show_points(1, energies, [off], numbers_of, [(energies[line], v) for v in lines], by_points=True)
        self.plot.show_points(2, energies, [(moved[:, k], moved_sigma[:, k]) for k in range(3)], numbers_of)
        self.plot.show_points(3, energies, [(blur, blur_sigma)], numbers_of)
        self._fill_moments(numbers_of)

    def _fill_moments(self, numbers: list[int]) -> None:
        """Show how mass and width of the particle depart from the calibration."""
        workflow = self.session.workflow
        report = None if workflow is None or self.session.busy else workflow.scale_report()
        found = None if report is None else report.moments
        shown = found is not None and bool(np.isfinite(found.size).any())
        self.moments.setVisible(shown)
        self._sizes = [] if found is None else (100 * found.size).tolist()
        if found is None or not shown:
            self.moments_label.setText("")
            return
        ends = 100 * np.array([np.nanmin(found.size), np.nanmax(found.size)])
        flat = np.zeros(2)
        self.moments.show_points(
            0, 100 * found.size, [(100 * found.mass, None)], numbers, [(ends, flat), (ends, 2 * ends)]
        )
        known = np.isfinite(found.width) & np.isfinite(found.size)
        middle = 100 * float(np.median((found.width - found.size)[known])) if known.any() else 0.0
        self.moments.show_points(1, 100 * found.size, [(100 * found.width, None)], numbers, [(ends, ends + middle)])
        moved = None if workflow is None else workflow.deformation()
        self.moments_label.setText(
            "Mass and width of the particle with the pixel size of the calibration, beside the measured scale. Above, "
            "dashed: mass with the square of the scale, as another magnification makes it; solid: the mass stays, as "
            "where the particle changes its size. Below: width in proportion. Energies near edges have no mass. "
            f"{found.text()} {'' if moved is None else moved.text()}".strip()
        )

    def _laws(self) -> dict[str, Any]:
        """Magnification (energies,) by every law whose numbers are known."""
        state, scan = self.session.state, self.session.scan
        known = scan is not None and state is not None and state.reference is not None
        return scale_laws(scan.series, state.reference) if known else {}  # type: ignore[union-attr,arg-type]

    def _show_result(self, candidate: Candidate | None) -> None:
        scan, energy = self.session.scan, self.energy
        self.moments.mark(self._sizes[energy] if 0 <= energy < len(self._sizes) else float("nan"))
        self.plot.mark(float("nan") if scan is None or energy < 0 else scan.series.scans[energy].energy_ev)
        if scan is not None and 0 <= energy < self.rows.rowCount():
            self.rows.selectRow(energy)
        if candidate is not None:
            self.magnification_spin.setValue(float(candidate.payload["numbers"]["magnification"]))
        if self.blocks_box.isChecked():
            self._show_blocks(True)
        self._fill_parts()

    def _jump(self, energy: int) -> None:
        self.session.go_to(energy, max(0, self.session.frame[1]))

    # ----------------------------------------------------------------------------------------------------- by hand

    def _update_buttons(self) -> None:
        super()._update_buttons()
        if not hasattr(self, "hand_label"):
            return
        state, energy = self.session.state, self.energy
        why = self._why_not()
        out = state is not None and energy in state.manual.energies
        fixed = None if state is None else state.manual.magnifications.get(energy)
        self.exclude_button.setText(f"{'Restore' if out else 'Exclude'} {self._energy_text()}")
        allow(self.exclude_button, why, "It has no part in the maps then; nothing is deleted.")
        is_reference = state is not None and state.reference == energy
        mine = why or self._elsewhere() or ("The reference's magnification is 1 by definition." if is_reference else "")
        allow(self.fix_button, mine, "Use this magnification instead of measuring it.")
        allow(self.measure_button, mine or ("" if fixed is not None else "It is measured."), "Measure it again.")
        allow(
            self.test_button,
            mine,
            "Known displacements and a scale jump of 3e-3 are put into copies of this energy and found again.",
        )
        said = None if state is None else state.manual.scale_change
        self.change_combo.setCurrentIndex(0 if said is None else 1 + SCALE_CHANGES.index(said))
        allow(
            self.change_combo,
            why or self._elsewhere(),
            "What a scale that departs from the calibration is taken for; the plots of mass and width above help. "
            "Shrinkage: the maps show every energy as the particle would absorb at its size at the reference energy.",
        )
        lines = [f"All: {why}"] if why else [f"Magnification: {mine}"] if mine else []
        if out and state is not None:
            lines.append(f"{self._energy_text()} is excluded ({state.manual.energies[energy]}).")
        if fixed is not None:
            lines.append(f"Magnification of {self._energy_text()} set to {fixed:.6f}.")
        self.hand_label.setText("\n".join(lines))

    def _say_change(self, number: int) -> None:
        value = None if number == 0 else SCALE_CHANGES[number - 1]
        said = f"Change of the particle's scale: {value or 'as in the recipe'}. The maps follow it."
        self.session.decide(lambda w: w.say_scale_change(value), said)

    def _exclude(self) -> None:
        state, energy = self.session.state, self.energy
        if state is not None and energy in state.manual.energies:
            self.session.decide(lambda w: w.restore(energy), f"{self._energy_text()} restored.")
        else:
            self.session.decide(lambda w: w.exclude(energy), f"{self._energy_text()} excluded.")

    def _fix(self, there: bool) -> None:
        energy, value = self.energy, self.magnification_spin.value()
        self.session.decide(lambda w: w.fix_magnification(energy, value if there else None))
