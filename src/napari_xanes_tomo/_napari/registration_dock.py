"""The dock of the energy registration: magnification and translation of every energy, and the particle on one grid."""

from __future__ import annotations

from typing import Any

import numpy as np
from qtpy.QtWidgets import QCheckBox, QDoubleSpinBox, QGridLayout, QGroupBox, QLabel, QPushButton, QVBoxLayout

from napari_xanes_tomo.workflow import Candidate

from .dock import allow, cell, fit, table, wrapped
from .forms import StillWheel
from .plots import PointPlot
from .previews import AlignedPreview
from .step_dock import StepDock

__all__ = ["RegistrationDock"]


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
        self.plot = PointPlot((("M", 1), ("M / law - 1, %", 1), ("moved, px", 3)), "energy (eV)", 400)
        self.plot.on_click = self._jump
        box.addWidget(self.plot)
        box.addWidget(
            wrapped(
                "Magnification with one sigma; lines: calibration of the pixel size (solid), proportional to energy "
                "(dashed). Middle: against the calibration. Below: translation of the object, y blue, x orange, z "
                "green. Click a point to go there.",
                faint=True,
            )
        )
        self.rows = table(["eV", "M", "moved y,x,z (px)", "verdict", "state"])
        self.rows.setToolTip("Click a row to go to its energy.")
        self.rows.cellClicked.connect(lambda row, _: self._jump(row))
        box.addWidget(self.rows)
        self.preview = AlignedPreview(self.session, "registration")
        self.difference = AlignedPreview(self.session, "registration", difference=True)
        self.aligned_box = QCheckBox("Show the aligned stack as a layer")
        self.aligned_box.setToolTip(
            "Absorbance on the common grid, all energies equally dark: it stays still when the energy is stepped."
        )
        self.difference_box = QCheckBox("Show the difference to the reference as a layer")
        self.difference_box.setToolTip("The aligned frame minus that of the reference at the same angle.")
        for check, preview in ((self.aligned_box, self.preview), (self.difference_box, self.difference)):
            check.toggled.connect(lambda on, c=check, p=preview: self._toggle(on, c, p))
            box.addWidget(check)
        self._points_key: tuple[Any, ...] = ()

    def _build_extra(self, box: QVBoxLayout) -> None:
        group = QGroupBox("By hand")
        grid = QGridLayout(group)
        grid.setContentsMargins(6, 4, 6, 4)
        self.exclude_button = QPushButton("Exclude this energy")
        self.exclude_button.clicked.connect(self._exclude)
        grid.addWidget(self.exclude_button, 0, 0, 1, 4)
        grid.addWidget(QLabel("Magnification"), 1, 0)
        self.magnification_spin = QDoubleSpinBox()
        self.magnification_spin.setRange(0.21, 4.99)
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
        self.hand_label = wrapped()
        grid.addWidget(self.hand_label, 2, 0, 1, 4)
        box.addWidget(group)

    # ------------------------------------------------------------------------------------------------ what is shown

    def refresh(self) -> None:
        """Show what the journal says."""
        self._fill_energies()
        super().refresh()
        if not self.session.busy:
            for check, preview in ((self.aligned_box, self.preview), (self.difference_box, self.difference)):
                if check.isChecked():
                    self._toggle(True, check, preview)

    def _toggle(self, on: bool, check: QCheckBox, preview: AlignedPreview) -> None:
        if not on:
            preview.hide()
        elif not preview.show():
            self._tell("Nothing is registered yet: run the registration first.", False)
            check.setChecked(False)

    def _fill_energies(self) -> None:
        state, scan = self.session.state, self.session.scan
        units = {} if state is None else {e: u for (s, e), u in state.units.items() if s == self.step.name}
        reference = None if state is None else state.reference
        out = () if state is None else tuple(sorted(state.manual.energies))
        key = (
            id(scan),
            reference,
            out,
            *((e, u.status, u.candidate.id if u.candidate else 0) for e, u in units.items()),
        )
        if key == self._points_key:
            return
        self._points_key = key
        scans = () if scan is None else scan.series.scans
        n = len(scans)
        energies = np.array([s.energy_ev for s in scans], dtype=float)
        measured, sigma = np.full(n, np.nan), np.full(n, np.nan)
        moved, moved_sigma = np.full((n, 3), np.nan), np.full((n, 3), np.nan)
        self.rows.setRowCount(n)
        for e in range(n):
            unit = units.get(e)
            candidate = None if unit is None else unit.candidate
            texts = [f"{energies[e]:g}", "", "", "", ""]
            if candidate is not None:
                numbers = candidate.payload["numbers"]
                measured[e], sigma[e] = numbers["magnification"], numbers["magnification_sigma"]
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
        law = self._law()
        line = np.argsort(energies)
        numbers_of = list(range(n))
        known = reference is not None and n > 0
        proportional = energies[reference] / energies if known else np.full(n, np.nan)
        lines = [(energies[line], law[line]), (energies[line], proportional[line])] if known else []
        self.plot.show_points(0, energies, [(measured, sigma)], numbers_of, lines)
        lines = (
            [(energies[line], 0 * law[line]), (energies[line], 100 * (proportional / law - 1)[line])] if known else []
        )
        self.plot.show_points(1, energies, [(100 * (measured / law - 1), 100 * sigma / law)], numbers_of, lines)
        self.plot.show_points(2, energies, [(moved[:, k], moved_sigma[:, k]) for k in range(3)], numbers_of)

    def _law(self) -> Any:
        """Magnification (energies,) by the calibration of the pixel size."""
        state, scan = self.session.state, self.session.scan
        if scan is None or state is None or state.reference is None:
            return np.full(0 if scan is None else len(scan.series.scans), np.nan)
        sizes = np.array([s.pixel_size_nm for s in scan.series.scans], dtype=float)
        return sizes[state.reference] / np.where(sizes > 0, sizes, np.nan)

    def _show_result(self, candidate: Candidate | None) -> None:
        scan, energy = self.session.scan, self.energy
        self.plot.mark(float("nan") if scan is None or energy < 0 else scan.series.scans[energy].energy_ev)
        if scan is not None and 0 <= energy < self.rows.rowCount():
            self.rows.selectRow(energy)
        if candidate is not None:
            self.magnification_spin.setValue(float(candidate.payload["numbers"]["magnification"]))

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
        mine = why or ("The reference's magnification is 1 by definition." if is_reference else "")
        allow(self.fix_button, mine, "Use this magnification instead of measuring it.")
        allow(self.measure_button, mine or ("" if fixed is not None else "It is measured."), "Measure it again.")
        lines = [f"All: {why}"] if why else [f"Magnification: {mine}"] if mine else []
        if out and state is not None:
            lines.append(f"{self._energy_text()} is excluded ({state.manual.energies[energy]}).")
        if fixed is not None:
            lines.append(f"Magnification of {self._energy_text()} set to {fixed:.6f}.")
        self.hand_label.setText("\n".join(lines))

    def _exclude(self) -> None:
        state, energy = self.session.state, self.energy
        if state is not None and energy in state.manual.energies:
            self.session.decide(lambda w: w.restore(energy), f"{self._energy_text()} restored.")
        else:
            self.session.decide(lambda w: w.exclude(energy), f"{self._energy_text()} excluded.")

    def _fix(self, there: bool) -> None:
        energy, value = self.energy, self.magnification_spin.value()
        self.session.decide(lambda w: w.fix_magnification(energy, value if there else None))
