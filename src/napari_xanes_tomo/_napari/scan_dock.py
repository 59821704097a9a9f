"""The dock of scan and flats: what is odd about the measurement, the flats, and the air they leave."""

from __future__ import annotations

from typing import Any

import numpy as np
from qtpy.QtWidgets import QCheckBox, QGroupBox, QVBoxLayout

from napari_xanes_tomo.model import Problem, XanesTomoError
from napari_xanes_tomo.recipe import ScanParameters
from napari_xanes_tomo.workflow import Candidate

from .dock import cell, fit, table, wrapped
from .forms import ParameterForm
from .plots import PointPlot
from .previews import FlatPreview
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
        inner.addWidget(self.reading_form.container.native)
        self.reading_label = wrapped(faint=True)
        inner.addWidget(self.reading_label)
        box.addWidget(group)

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
        if hasattr(self, "reading_label"):
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
                self.problems.setItem(row, column, cell(text, bold=column == 0 and problem.severity == "error"))
        self.problems.setVisible(bool(problems))
        fit(self.problems, most=6)
        kinds = [sum(p.severity == s for p in problems) for s in ("error", "warning", "info")]
        text = "" if scan is None else "Nothing odd was found in the files."
        if problems:
            text = f"{kinds[0]} errors, {kinds[1]} warnings, {kinds[2]} remarks about the files:"
        self.problems_label.setText(text)
        if self.flats_box.isChecked():
            self.flats_box.setChecked(False)
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
            frame = problem.frame if problem.frame is not None else self.session.frame[1]
            self.session.go_to(int(np.nanargmin(gap)), max(0, frame))

    def _toggle_flats(self, on: bool) -> None:
        if not on:
            self.flats.hide()
        elif not self.flats.show():
            self._tell("This scan has no flats.", False)
            self.flats_box.setChecked(False)
        self.flat_label.setVisible(self.flats.layer is not None)
        self._mark(self.session.frame[1])

    def _show_result(self, candidate: Candidate | None) -> None:
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
                found, numbers = result.arrays["air_residual"], dict(result.numbers)
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
            text = ""
            if numbers:
                read = np.sqrt(numbers["read_variance"])
                text = (
                    f"Camera, from its flats: {numbers['gain']:.3g} counts per quantum, read noise {read:.3g} counts."
                )
            self.detector_label.setText(text)
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
