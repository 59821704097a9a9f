"""What the docks of all steps have in common: form, run, scores, candidates, decisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from pydantic import BaseModel
from qtpy.QtCore import Qt
from qtpy.QtWidgets import QComboBox, QGroupBox, QHBoxLayout, QHeaderView, QPushButton, QSizePolicy, QVBoxLayout

from napari_xanes_tomo.model import Quality, Score, XanesTomoError
from napari_xanes_tomo.recipe import Recipe
from napari_xanes_tomo.state import Candidate, UnitState
from napari_xanes_tomo.steps import step

from .dock import Dock, allow, cell, escape, fit, table, wrapped
from .forms import ParameterForm, StillWheel
from .session import section_of, units_of
from .words import stale_reason

__all__ = ["Buttons", "StepDock", "button_reasons", "made_with"]


@dataclass(frozen=True)
class Buttons:
    """Why a button cannot be used; empty where it can."""

    run: str = ""
    accept: str = ""
    redo: str = ""
    revert: str = ""


def button_reasons(
    unit: UnitState | None,
    *,
    has_scan: bool,
    busy: bool,
    selected: Candidate | None,
    same_parameters: bool,
    all_done: bool = False,
) -> Buttons:
    """Say which buttons of a step make sense now, and why the others do not.

    Parameters
    ----------
    unit : UnitState or None
        The step at the energy shown; None without a run.
    has_scan, busy : bool
        Whether there is a scan, and a job.
    selected : Candidate or None
        The candidate selected in the table.
    same_parameters : bool
        Whether the form shows what the candidate that counts was made with.
    all_done : bool
        Whether every energy chosen has a result with the parameters of the form.
    """
    if not has_scan:
        return Buttons(*["Open a scan first."] * 4)
    if busy:
        return Buttons(*["Something is running."] * 4)
    if unit is None:
        later = "Nothing was run yet."
        return Buttons("", later, later, later)
    accepted = unit.status == "accepted"
    run = ""
    if all_done:
        run = (
            "It failed with these parameters; change one, or exclude what is wrong."
            if unit.status == "failed"
            else "Done with these parameters."
        )
    if selected is None:
        accept = "There is no result to accept."
    elif accepted and unit.candidate is not None and unit.candidate.id == selected.id:
        accept = "This result is accepted."
    elif selected.input_key != unit.input_key:
        accept = "It was made from other inputs than there are now; Run makes it anew."
    else:
        accept = ""
    if unit.candidate is None:
        redo = "There is no result to redo."
    elif same_parameters and unit.status != "stale":
        redo = "Change a parameter first, or the result is the same."
    else:
        redo = ""
    return Buttons(run, accept, redo, "" if accepted else "Nothing is accepted here.")


class StepDock(Dock):
    """A dock for one step of the recipe; see `JitterDock` for how to make one.

    Parameters
    ----------
    viewer : napari.Viewer
    name : str
        The step.
    """

    folded: Mapping[str, Sequence[str]] = {}  # parts of the form that are folded away, and their fields

    def __init__(self, viewer: Any, name: str) -> None:
        self.step = step(name)
        self.section = section_of(name)
        self.form = ParameterForm(type(getattr(Recipe(), self.section)), self.folded)
        self._shown: int | None = None  # candidate selected in the table, by its id
        self._energy_shown: int | None = None
        super().__init__(viewer)
        self.form.changed.connect(self._on_form)

    # -------------------------------------------------------------------------------------------------- building

    def _fill(self, box: QVBoxLayout) -> None:
        group = QGroupBox("Parameters")
        inner = QVBoxLayout(group)
        inner.setContentsMargins(6, 4, 6, 4)
        inner.addWidget(self.form.native)
        box.addWidget(group)

        row = QHBoxLayout()
        self.energies_combo = QComboBox()
        self.energies_combo.addItems(["this energy", "all energies"])
        self.energies_combo.currentIndexChanged.connect(self.refresh)
        self.energies_combo.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.energies_combo.setVisible(self.step.per_energy)
        self._still = StillWheel(self)
        self._still.watch(self.energies_combo)
        row.addWidget(self.energies_combo, 1)
        self.run_button = QPushButton("Run" if self.step.per_energy else "Run everything up to the maps")
        self.run_button.clicked.connect(partial(self._run, again=False))
        row.addWidget(self.run_button)
        row.addWidget(self._cancel_button())
        box.addLayout(row)
        self._add_progress(box)

        self._build_plots(box)

        self.verdict_label = wrapped()
        box.addWidget(self.verdict_label)
        self.scores = table(["score", "value", "limit", ""])
        header = self.scores.horizontalHeader()
        assert header is not None
        header.setStretchLastSection(False)
        header.setSectionResizeMode(0, QHeaderView.ResizeMode.Stretch)  # a long name gives way, numbers do not
        box.addWidget(self.scores)
        self.candidates = table(["", "result", "verdict", "made with"])
        self.candidates.itemSelectionChanged.connect(self._on_selected)
        box.addWidget(self.candidates)
        row = QHBoxLayout()
        self.accept_button = QPushButton("Accept")
        self.accept_button.clicked.connect(self._accept)
        self.redo_button = QPushButton("Redo")
        self.redo_button.clicked.connect(partial(self._run, again=True))
        self.revert_button = QPushButton("Revert")
        self.revert_button.clicked.connect(self._revert)
        for button in (self.accept_button, self.redo_button, self.revert_button):
            row.addWidget(button)
        box.addLayout(row)
        self.reason_label = wrapped()
        self.reason_label.setObjectName("reasons")
        box.addWidget(self.reason_label)
        self._build_extra(box)

    def _build_plots(self, box: QVBoxLayout) -> None:
        """Add the plots of this step."""

    def _build_extra(self, box: QVBoxLayout) -> None:
        """Add what this step has below the decisions."""

    # ------------------------------------------------------------------------------------------------ what is shown

    @property
    def target(self) -> int | None:
        """Energy of the unit shown: None for a step that is done once."""
        return self.energy if self.step.per_energy else None

    @property
    def energies(self) -> list[int]:
        """Numbers of the energies that Run works on."""
        scan = self.session.scan
        if scan is None or self.energy < 0:
            return []
        every = self.energies_combo.currentIndex() == 1 or not self.step.per_energy
        return list(range(len(scan.series.scans))) if every else [self.energy]

    @property
    def unit(self) -> UnitState | None:
        """Where this step stands at the energy shown."""
        state = self.session.state
        return None if state is None or self.energy < 0 else state[(self.step.name, self.target)]

    def _units(self) -> dict[int | None, UnitState]:
        """Where this step stands at every energy chosen."""
        state = self.session.state
        if state is None:
            return {}
        return {e: state[(self.step.name, e)] for e in units_of(self.step.name, self.energies)}

    def found(self) -> list[Candidate]:
        """Return every result of the energy shown, oldest first."""
        workflow = self.session.workflow
        return [] if workflow is None or self.energy < 0 else workflow.candidates(self.step.name, self.target)

    def selected(self) -> Candidate | None:
        """Return the candidate selected in the table, else the one that counts."""
        found = self.found()
        chosen = next((c for c in found if c.id == self._shown), None)
        unit = self.unit
        return chosen or (unit.candidate if unit is not None else None) or (found[-1] if found else None)

    def refresh(self) -> None:
        """Show what the journal says."""
        chosen, unit = self.selected(), self.unit
        self._fill_candidates(chosen)
        self._fill_scores(None if chosen is None else chosen.quality)
        status, reason = ("not run", "") if unit is None or unit.status == "idle" else (unit.status, unit.reason)
        state, workflow = self.session.state, self.session.workflow
        if state is not None and not reason and self.energy >= 0 and self.step.per_energy:
            failed = [state[(s, self.energy)] for s in self.step.upstream]
            reason = next((u.reason for u in failed if u.status == "failed"), "")
            status = "failed" if reason else status
        if state is not None and self.energy in state.manual.energies and self.step.per_energy:
            status = "excluded"
        if status == "stale" and state is not None and workflow is not None:
            energies = workflow.series.energies_ev.tolist()
            reason = stale_reason(state, (self.step.name, self.target), workflow.journal.events, energies)
        verdict = "" if chosen is None else f"&nbsp;&nbsp;|&nbsp;&nbsp;verdict <b>{chosen.quality.verdict}</b>"
        if chosen is not None and chosen.quality.colour == "red":
            verdict += ' (<b style="color:#d9534f">red</b>)'
        notes = "" if chosen is None else self._notes(chosen)
        stale = " (made with other parameters or inputs)" if status == "stale" else ""
        where = self._energy_text() if self.step.per_energy else self.step.title
        lines = [f"{where}: <b>{status}</b>{stale}{verdict}", notes, escape(reason)]
        self.verdict_label.setText("<br>".join(t for t in lines if t))
        self._show_result(chosen)
        self._update_buttons()

    def _notes(self, candidate: Candidate) -> str:
        """Return what the step says about its result, as HTML."""
        return escape("; ".join(candidate.quality.notes))

    def _show_result(self, candidate: Candidate | None) -> None:
        """Show a result in the plots of this step."""

    def _fill_scores(self, quality: Quality | None) -> None:
        scores = (
            () if quality is None else tuple(sorted(quality.scores, key=lambda s: s.passed))
        )  # the missed ones first
        self.scores.setVisible(bool(scores) or self.step.per_energy)
        self.scores.setRowCount(len(scores))
        for row, score in enumerate(scores):
            limit = judged = ""
            if score.threshold is not None:
                limit = f"{'<=' if score.better == 'lower' else '>='} {score.threshold:.3g}"
                judged = "good" if score.passed else "red" if score.colour == "red" else "check"
            value = f"{score.value:.3g} {score.unit}".strip() + self._also(score)
            for column, text in enumerate((score.name, value, limit, judged)):
                self.scores.setItem(row, column, cell(text, bold=judged in ("check", "red")))
        fit(self.scores, most=10)

    def _also(self, score: Score) -> str:
        """Return a length in nm as well; those of a registration are in pixels of the reference."""
        scan, state = self.session.scan, self.session.state
        if score.unit != "px" or scan is None or not 0 <= self.energy < len(scan.series.scans):
            return ""
        reference = state.reference if state is not None and self.step.name == "registration" else None
        nm = score.value * scan.series.scans[self.energy if reference is None else reference].pixel_size_nm
        return f" = {nm:.2g} nm" if np.isfinite(nm) and nm < 99.5 else f" = {nm:.0f} nm" if np.isfinite(nm) else ""

    def _fill_candidates(self, chosen: Candidate | None) -> None:
        found, unit = self.found(), self.unit
        rows = self.candidates
        rows.blockSignals(True)
        rows.setRowCount(len(found))
        for row, candidate in enumerate(reversed(found)):
            counts = unit is not None and unit.candidate is not None and unit.candidate.id == candidate.id
            accepted = counts and unit is not None and unit.status == "accepted"
            mark = "accepted" if accepted else ("counts" if counts else "partial" if candidate.partial else "")
            method = str(candidate.payload["numbers"].get("method", ""))
            made = _parameters_text(made_with(candidate, self.section))
            label = f"#{candidate.id} {method}".strip()
            for column, text in enumerate((mark, label, candidate.quality.verdict, made)):
                rows.setItem(row, column, cell(text, bold=accepted, data=candidate.id))
            if chosen is not None and candidate.id == chosen.id:
                rows.selectRow(row)
        rows.blockSignals(False)
        fit(rows, most=4)

    # ------------------------------------------------------------------------------------------------------ events

    def _on_scan(self) -> None:
        self._energy_shown = None
        scan = self.session.scan
        if scan is not None:
            self.energies_combo.setItemText(1, f"all {len(scan.series.scans)} energies")
        super()._on_scan()

    def _on_asked(self) -> None:
        self.form.value = getattr(self.session.asked, self.section)

    def _on_form(self) -> None:
        try:
            self.session.ask(self.section, self.form.value)
        except XanesTomoError as error:
            self._tell(str(error), True)
        self._update_buttons()

    def _on_frame(self, energy: int, angle: int) -> None:
        if energy == self._energy_shown:
            self._mark(angle)  # the angle moves often: nothing else changes with it
            return
        self._energy_shown = energy
        known = self.session.scan is not None and energy >= 0
        self.energies_combo.setItemText(0, f"this energy ({self._energy_text()})" if known else "this energy")
        self._shown = None
        self.refresh()
        self._mark(angle)

    def _mark(self, angle: int) -> None:
        """Show in the plots which projection the sliders stand at."""

    def _on_selected(self) -> None:
        items = self.candidates.selectedItems()
        if items:
            self._shown = int(items[0].data(Qt.ItemDataRole.UserRole))
            chosen = self.selected()
            self._fill_scores(None if chosen is None else chosen.quality)
            self._show_result(chosen)
            self._update_buttons()

    # ----------------------------------------------------------------------------------------------------- buttons

    def _all_done(self, unchanged: bool) -> bool:
        """Whether nothing is left for Run, all parameters being those of the run."""
        state = self.session.state
        if state is None or not self.energies:
            return False
        if not self.step.per_energy:
            return unchanged and state[(self.step.name, None)].status in ("accepted", "candidate")
        return all(
            state[(self.step.name, e)].status == "accepted"
            or (unchanged and state[(self.step.name, e)].status in ("candidate", "failed"))
            or (unchanged and any(state[(s, e)].status == "failed" for s in self.step.upstream))
            for e in self.energies
        )

    def _update_buttons(self) -> None:
        super()._update_buttons()
        session, unit = self.session, self.unit
        try:
            section: BaseModel | None = self.form.value
        except XanesTomoError as error:
            section = None
            self._tell(str(error), True)
        busy = session.busy
        state = session.state
        recipe_same = section is not None and session.workflow is not None
        wanted = None if section is None else section.model_dump(mode="json")
        made = None if unit is None or unit.candidate is None else made_with(unit.candidate, self.section)
        same = section is not None and made == wanted
        reasons = button_reasons(
            unit,
            has_scan=session.scan is not None,
            busy=busy,
            selected=self.selected(),
            same_parameters=same,
            all_done=self._all_done(recipe_same and section == getattr(session.recipe, self.section)),
        )
        every = self.step.per_energy and len(self.energies) > 1
        if every and state is not None and not busy:
            units = self._units().values()
            other = [u for u in units if u.candidate and made_with(u.candidate, self.section) != wanted]
            reasons = Buttons(
                reasons.run,
                "" if any(u.status == "candidate" for u in units) else "No result is waiting to be accepted.",
                "" if other else reasons.redo,
                "" if any(u.status == "accepted" for u in units) else "Nothing is accepted.",
            )
        for button, title in (
            (self.accept_button, "Accept"),
            (self.redo_button, "Redo"),
            (self.revert_button, "Revert"),
        ):
            button.setText(f"{title} all" if every else title)
        if section is None and not busy:
            reasons = Buttons("A parameter is not valid.", reasons.accept, "A parameter is not valid.", reasons.revert)
        told: dict[str, list[str]] = {}
        for button, title, reason, purpose in (
            (self.run_button, "Run", reasons.run, "Compute what is missing with these parameters."),
            (self.accept_button, "Accept", reasons.accept, "Let the selected result count."),
            (self.redo_button, "Redo", reasons.redo, "Take the acceptance back, compute again with these parameters."),
            (self.revert_button, "Revert", reasons.revert, "Take the acceptance back; nothing is deleted."),
        ):  # fmt: skip
            allow(button, reason, purpose)
            if reason:
                told.setdefault(reason, []).append(title)
        self.reason_label.setText("\n".join(f"{', '.join(titles)}: {reason}" for reason, titles in told.items()))
        self.form.enabled = not busy
        self.energies_combo.setEnabled(not busy)

    def _run(self, _clicked: bool = False, *, again: bool) -> None:
        try:
            section = self.form.value
        except XanesTomoError as error:
            self._tell(str(error), True)
            return
        self._shown = None
        self.session.run(self.step.name, self.energies, section, self.out_edit.text(), again=again)

    def _accept(self) -> None:
        chosen = self.selected()
        if self.step.per_energy and len(self.energies) > 1:
            units = self._units()
            open_ones = {e: u.candidate.id for e, u in units.items() if u.candidate and u.status == "candidate"}
            self.session.accept(self.step.name, open_ones)
        elif chosen is not None:
            self.session.accept(self.step.name, {self.target: chosen.id})

    def _revert(self) -> None:
        self.session.revert(self.step.name, [e for e, u in self._units().items() if u.status == "accepted"])


def made_with(candidate: Candidate, section: str) -> dict[str, Any]:
    """Return the parameters of a section of the recipe that a candidate was made with."""
    return dict(candidate.payload.get("parameters", {}).get(section, {}))


def _parameters_text(parameters: Mapping[str, Any]) -> str:
    def text(value: Any) -> str:
        if value is None:
            return "automatic"
        if isinstance(value, bool):
            return "yes" if value else "no"
        return f"{value:g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{k.replace('_', ' ')} {text(v)}" for k, v in parameters.items())
