"""The dock of scan and flats: what is odd about the measurement, the flats, and the air they leave."""

from __future__ import annotations

from typing import Any

import numpy as np
from qtpy.QtWidgets import QCheckBox, QComboBox, QGroupBox, QHBoxLayout, QLabel, QVBoxLayout

from napari_xanes_tomo.edges import bracketed_elements, edge_energy_ev, scanned_element
from napari_xanes_tomo.model import Problem, XanesTomoError
from napari_xanes_tomo.recipe import FLAT_CHOICES, ScanParameters
from napari_xanes_tomo.state import Candidate
from napari_xanes_tomo.stray_light import stray_jump_effect

from .confinement import Confinement
from .dock import cell, fit, table, wrapped
from .forms import ParameterForm
from .plots import PointPlot
from .previews import AirPreview, FlatPreview, MaskPreview
from .step_dock import StepDock

__all__ = ["ScanDock"]


class ScanDock(StepDock):
    """Scan and flats: problems, flats, air residual, decision.

    Parameters
    ----------
    napari_viewer : napari.Viewer
    """

    def __init__(self, napari_viewer: Any) -> None:
        super().__init__(napari_viewer, "flats")

    def _build_plots(self, box: QVBoxLayout) -> None:
        self.problems_label = wrapped()
        box.addWidget(self.problems_label)
        self.problems = table(["", "where", "what"])
        self.problems.setToolTip("Click a row to go there.")
        self.problems.cellClicked.connect(lambda row, _: self._go_to_problem(row))
        box.addWidget(self.problems)
        self.flats = FlatPreview(self.session)
        self.flats_box = QCheckBox("Show the flats (reference frames) as a layer")
        self.flats_box.setToolTip("Every shot of every set; the angle slider goes through them in their order.")
        self.flats_box.toggled.connect(self._toggle_flats)
        box.addWidget(self.flats_box)
        self.flat_label = wrapped()
        self.flat_label.hide()
        box.addWidget(self.flat_label)
        row = QHBoxLayout()
        row.addWidget(QLabel("Flats of this energy"))
        self.use_combo = QComboBox()
        self.use_combo.setToolTip(
            "Which flats this energy is divided by; a decision of this energy alone, to be undone like every other."
        )
        self.use_combo.activated.connect(self._choose_flats)
        self._still.watch(self.use_combo)
        row.addWidget(self.use_combo, 1)
        box.addLayout(row)
        self.compared = table(["flats", "air (OD), first half", "second half"])
        self.compared.setToolTip("Median residual of the air (OD) with the flats that were compared; bold: chosen.")
        box.addWidget(self.compared)
        self.air = AirPreview(self.session)
        self.air_box = QCheckBox("Show what is left of the air as a layer")
        self.air_box.setToolTip("Absorbance of this energy outside the object, its smooth surface taken out.")
        self.air_box.toggled.connect(self._toggle_air)
        box.addWidget(self.air_box)
        self.left_out = MaskPreview(self.session)
        self.mask_box = QCheckBox("Show the pixels left out as a layer")
        self.mask_box.setToolTip(
            "Shadows, dust and bad pixels in the flats of this energy, and what was painted below."
        )
        self.mask_box.toggled.connect(self._toggle_mask)
        box.addWidget(self.mask_box)
        self.plot = PointPlot((("air (OD)", 1),), "projection", 150)
        self.plot.on_click = lambda angle: self.session.go_to(self.energy, angle)
        box.addWidget(self.plot)
        self.energy_plot = PointPlot((("air (OD)", 1),), "energy (eV)", 150)
        self.energy_plot.on_click = lambda energy: self.session.go_to(energy, max(0, self.session.frame[1]))
        box.addWidget(self.energy_plot)
        box.addWidget(
            wrapped(
                "Rms of the air about its plane: of every projection of this energy, and the median of every energy; "
                "dashed: the limit. Click a point to go there.",
                faint=True,
            )
        )
        self.detector_label = wrapped()
        box.addWidget(self.detector_label)
        self._plots_key: tuple[Any, ...] = ()

    def _build_extra(self, box: QVBoxLayout) -> None:
        self.reading_form = ParameterForm(ScanParameters)
        self.reading_form.changed.connect(self._on_reading)
        group = QGroupBox("How the files are read")
        inner = QVBoxLayout(group)
        inner.setContentsMargins(6, 4, 6, 4)
        inner.addWidget(self.reading_form.native)
        self.reading_label = wrapped(faint=True)
        inner.addWidget(self.reading_label)
        self.size_label = wrapped(faint=True)
        inner.addWidget(self.size_label)
        box.addWidget(group)
        self.confinement = Confinement(self.session, self._why_not)
        box.addWidget(self.confinement)

    def _on_asked(self) -> None:
        super()._on_asked()
        self.reading_form.value = self.session.asked.scan

    def _on_reading(self) -> None:
        try:
            self.session.ask("scan", self.reading_form.value)
        except XanesTomoError as error:
            self._tell(str(error), True)

    def _update_buttons(self) -> None:
        super()._update_buttons()
        if hasattr(self, "confinement"):
            self.confinement.update_buttons()
            begun = self.session.workflow is not None
            self.reading_form.enabled = not begun and not self.session.busy
            self.reading_label.setText(
                "Settled when the run began; a new output folder can read the files differently."
                if begun
                else "The files are read anew when the run begins."
            )

    def _on_scan(self) -> None:
        scan = self.session.scan
        problems = () if scan is None else scan.series.problems
        self.problems.setRowCount(len(problems))
        for row, problem in enumerate(problems):
            for column, text in enumerate((problem.severity, _where(problem), problem.message)):
                item = cell(text, bold=column == 0 and problem.severity == "error")
                item.setToolTip(f"{problem.file}: {problem.message}" if problem.file else problem.message)
                self.problems.setItem(row, column, item)
        self.problems.setVisible(bool(problems))
        fit(self.problems, most=6)
        kinds = [sum(p.severity == s for p in problems) for s in ("error", "warning", "info")]
        text = "" if scan is None else "Nothing odd was found in the files."
        if problems:
            text = f"{kinds[0]} errors, {kinds[1]} warnings, {kinds[2]} remarks about the files:"
        self.problems_label.setText(text)
        for check in (self.flats_box, self.air_box, self.mask_box):
            if check.isChecked():
                check.setChecked(False)
        super()._on_scan()

    def _go_to_problem(self, row: int) -> None:
        scan = self.session.scan
        if scan is None or not 0 <= row < len(scan.series.problems):
            return
        problem = scan.series.problems[row]
        if problem.energy_ev is None:
            return
        gap = np.abs(scan.series.energies_ev - problem.energy_ev)
        if np.isfinite(gap).any():
            energy = int(np.nanargmin(gap))
            frame = problem.frame if problem.frame is not None else self.session.frame[1]
            self.session.go_to(energy, max(0, frame))
            if problem.frame is None and problem.file:
                self._go_to_flat(energy, problem.file)

    def _go_to_flat(self, energy: int, name: str) -> None:
        """Show the flats, at the shot of that name."""
        scan, viewer = self.session.scan, self.session.viewer
        shots = [] if scan is None else [n for f in scan.series.scans[energy].flats for n in f.names]
        if name not in shots or viewer is None:
            return
        self.flats_box.setChecked(True)
        layer = self.flats.layer
        if layer is not None:
            viewer.dims.set_point(1, float(layer.data_to_world((energy, shots.index(name), 0, 0))[1]))

    def _toggle_flats(self, on: bool) -> None:
        if not on:
            self.flats.hide()
        elif not self.flats.show():
            self._tell("This scan has no flats.", False)
            self.flats_box.setChecked(False)
        self.flat_label.setVisible(self.flats.layer is not None)
        self._mark(self.session.frame[1])

    def _toggle_air(self, on: bool) -> None:
        if not on:
            self.air.hide()
            return
        result = self._result_shown()
        workflow, energy = self.session.workflow, self.energy
        if result is None or workflow is None:
            self._tell("Nothing was run yet at this energy.", False)
            self.air_box.setChecked(False)
            return

        def show(found: Any) -> None:
            if self.air_box.isChecked() and self.energy == energy:
                self.air.put(found)

        self.session.compute(lambda progress: self.air.make(workflow, energy, result), show)

    def _toggle_mask(self, on: bool) -> None:
        result = self._result_shown() if on else None
        if result is None or not self.left_out.put(self.energy, result):
            self.left_out.hide()
            if on:
                self._tell("Nothing was run yet at this energy.", False)
                self.mask_box.setChecked(False)

    def _result_shown(self) -> Any:
        unit, workflow = self.unit, self.session.workflow
        if unit is None or workflow is None or unit.candidate is None:
            return None
        return workflow.result(unit.candidate)

    def _choose_flats(self, number: int) -> None:
        use, energy = self.use_combo.itemData(number), self.energy
        said = f"{self._energy_text()}: {self.use_combo.itemText(number)}; Run makes it anew."
        self.session.decide(lambda w: w.choose_flats(energy, use), said)

    def _show_choices(self) -> None:
        """Offer the policies and the sets of the energy shown; stand at what was decided."""
        scan, state = self.session.scan, self.session.state
        sets = 0 if scan is None or self.energy < 0 else len(scan.series.scans[self.energy].flats)
        choices: list[tuple[str, str | None]] = [("as in the recipe", None)]
        choices += [(f"half {k + 1}", f"half {k + 1}") for k in range(sets)]
        choices += [(name, name) for name in FLAT_CHOICES]
        if [self.use_combo.itemText(i) for i in range(self.use_combo.count())] != [text for text, _ in choices]:
            self.use_combo.clear()
            for text, use in choices:
                self.use_combo.addItem(text, use)
        use = None if state is None else state.manual.flats.get(self.energy)
        self.use_combo.setCurrentIndex(max(0, self.use_combo.findData(use)))
        why = self._why_not()
        self.use_combo.setEnabled(not why)
        self.use_combo.setToolTip(why or "Which flats this energy is divided by; can be undone.")

    def _show_size(self) -> None:
        """Show the size of a pixel by the law in use beside what the headers say."""
        scan = self.session.scan
        if scan is None or self.energy < 0:
            self.size_label.setText("")
            return
        energy = scan.series.scans[self.energy]
        stored = energy.header_pixel_size_nm
        header = f"the headers say {stored:.2f} nm" if np.isfinite(stored) else "the headers say nothing"
        self.size_label.setText(
            f"Pixel at {energy.energy_ev:g} eV: {energy.pixel_size_nm:.2f} nm by the law above "
            f"(slope and offset times binning {energy.binning}); {header}."
        )

    def _show_numbers(self, numbers: dict[str, Any]) -> None:
        """Show what the flats say about camera, stray light, and each other."""
        compared = dict(numbers.get("flat_candidates", {}))
        chosen = list(numbers.get("flats", ()))
        self.compared.setRowCount(len(compared))
        for row, (name, values) in enumerate(compared.items()):
            self.compared.setItem(row, 0, cell(name, bold=name in chosen))
            for half in range(2):
                text = f"{values[half]:.5f}" if half < len(values) and np.isfinite(values[half]) else ""
                picked = half < len(chosen) and chosen[half] == name
                self.compared.setItem(row, 1 + half, cell(text, bold=picked))
        self.compared.setVisible(bool(compared))
        fit(self.compared, most=6)
        lines = []
        if numbers.get("given"):
            lines.append(
                f"{str(numbers['given']).capitalize()} made elsewhere hold no counts: there are no flats to judge."
            )
        elif numbers:
            read = np.sqrt(numbers["read_variance"])
            source = {"one shot": " (from one shot: an upper limit)", "none": " (assumed: the flats say nothing)"}
            lines.append(
                f"Camera, from its flats: {numbers['gain']:.3g} counts per quantum, read noise {read:.3g} counts"
                f"{source.get(str(numbers.get('noise_source')), '')}; {100 * numbers.get('masked', 0):.2g} % left out."
            )
            without, with_stray = numbers.get("object_od", 0.0), numbers.get("object_od_with_stray", 0.0)
            if without and without != with_stray:
                lines.append(
                    f"Stray light, from blocked rows: {numbers['stray_constant']:.3g} counts + "
                    f"{100 * numbers['stray_fraction']:.2g} % of the frame's mean. Left in, the object would show "
                    f"{with_stray:.3f} instead of {without:.3f} OD{self._jump_text()}."
                )
            else:
                lines.append("Stray light: no blocked rows show any; none is subtracted.")
        self.detector_label.setText("<br>".join(lines))

    def _jump_text(self) -> str:
        """Say what stray light does to the edge jump, where energies on both sides of an edge are done."""
        scan, state, workflow = self.session.scan, self.session.state, self.session.workflow
        if scan is None or state is None or workflow is None:
            return ""
        energies = scan.series.energies_ev
        levels = np.full((2, len(energies)), np.nan)
        for e in range(len(energies)):
            candidate = state[("flats", e)].candidate
            if candidate is not None:
                n = candidate.payload["numbers"]
                levels[:, e] = n.get("object_od", np.nan), n.get("object_od_with_stray", np.nan)
        edge = scanned_element(energies, bracketed_elements(energies))
        if edge is None:
            return ""
        effect = stray_jump_effect(energies, levels[0], levels[1], edge_energy_ev(edge))
        return f", and the {edge} edge jump would be {100 * effect:.1f} % too small" if np.isfinite(effect) else ""

    def _show_result(self, candidate: Candidate | None) -> None:
        self._show_choices()
        self._show_size()
        self.confinement.refresh()
        workflow, scan, state = self.session.workflow, self.session.scan, self.session.state
        units = {} if state is None else {e: u for (s, e), u in state.units.items() if s == self.step.name}
        chosen = None if candidate is None else candidate.id
        key = (
            id(scan),
            id(workflow),
            self.energy,
            chosen,
            *(u.candidate.id if u.candidate else 0 for u in units.values()),
        )
        if key != self._plots_key:
            self._plots_key = key
            found: Any = np.zeros(0)
            numbers: dict[str, Any] = {}
            if candidate is not None and workflow is not None:
                result = workflow.result(candidate)
                found, numbers = result.arrays.get("air_residual", found), dict(result.numbers)
            limit = next((s.threshold for s in candidate.quality.scores if s.threshold), None) if candidate else None
            n = len(found)
            line = [([], []), ([0, n - 1], [limit, limit])] if limit is not None and n else []
            self.plot.show_points(0, np.arange(n), [(found, None)], list(range(n)), line)
            energies = np.zeros(0) if scan is None else scan.series.energies_ev
            medians = np.full(len(energies), np.nan)
            for e, unit in units.items():
                if unit.candidate is not None and unit.candidate.quality.scores and e is not None:
                    medians[e] = unit.candidate.quality.scores[0].value
            ends = [float(np.nanmin(energies)), float(np.nanmax(energies))] if len(energies) else []
            over = [([], []), (ends, [limit, limit])] if limit is not None and len(ends) else []
            self.energy_plot.show_points(0, energies, [(medians, None)], list(range(len(energies))), over)
            self._show_numbers(numbers)
            if self.air_box.isChecked():
                self.air_box.setChecked(False)
            if self.mask_box.isChecked():
                self._toggle_mask(True)
        self.energy_plot.mark(float("nan") if scan is None or self.energy < 0 else scan.series.energies_ev[self.energy])
        self._mark(self.session.frame[1])

    def _mark(self, angle: int) -> None:
        self.plot.mark(float(angle) if angle >= 0 else float("nan"))
        if self.flats.layer is not None:
            self.flat_label.setText(self.flats.text())


def _where(problem: Problem) -> str:
    parts = [
        "" if problem.energy_ev is None else f"{problem.energy_ev:g} eV",
        "" if problem.frame is None else f"projection {problem.frame}",
    ]
    return ", ".join(p for p in parts if p) or problem.file
