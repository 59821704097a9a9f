"""What the docks of all steps have in common: scan and output, form, run, scores, candidates, decisions."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from qtpy.QtCore import QEvent, QSize, Qt, QTimer
from qtpy.QtWidgets import (
    QAbstractItemView,
    QComboBox,
    QFileDialog,
    QFrame,
    QGroupBox,
    QHBoxLayout,
    QHeaderView,
    QLabel,
    QLineEdit,
    QProgressBar,
    QPushButton,
    QScrollArea,
    QSizePolicy,
    QTableWidget,
    QTableWidgetItem,
    QVBoxLayout,
    QWidget,
)

from napari_xanes_tomo.model import Quality, XanesTomoError
from napari_xanes_tomo.recipe import Recipe
from napari_xanes_tomo.steps import step
from napari_xanes_tomo.workflow import Candidate, UnitState

from .forms import ParameterForm, StillWheel
from .jobs import remaining
from .session import Session, session_of, suggest_output

__all__ = ["Buttons", "StepDock", "button_reasons"]

WIDTH = 420
_ROW = 20  # height of a table's row, px


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
    else:
        accept = ""
    if unit.candidate is None:
        redo = "There is no result to redo."
    elif same_parameters and unit.status != "stale":
        redo = "Change a parameter first, or the result is the same."
    else:
        redo = ""
    return Buttons(run, accept, redo, "" if accepted else "Nothing is accepted here.")


class StepDock(QWidget):
    """A dock for one step of the recipe; see `JitterDock` for how to make one.

    Parameters
    ----------
    viewer : napari.Viewer
    name : str
        The step; its parameters are the section of the recipe with the same name.
    """

    def __init__(self, viewer: Any, name: str) -> None:
        super().__init__()
        self.step = step(name)
        self.session: Session = session_of(viewer)
        self.session.join(id(self))
        self.destroyed.connect(partial(_release, self.session, id(self)))
        self.form = ParameterForm(type(getattr(Recipe(), name)))
        self._shown: int | None = None  # candidate selected in the table, by its id
        self._energy_shown: int | None = None
        self._docked = False
        self._pending = QTimer(self)  # many events, one redraw
        self._pending.setSingleShot(True)
        self._pending.setInterval(0)
        self._pending.timeout.connect(self.refresh)
        self._build()
        s = self.session
        s.scan_changed.connect(self._on_scan)
        s.workflow_changed.connect(self._on_workflow)
        s.state_changed.connect(self._pending.start)
        s.frame_changed.connect(self._on_frame)
        s.busy_changed.connect(self._on_busy)
        s.progressed.connect(self._on_progress)
        s.told.connect(self._tell)
        self.form.changed.connect(self._update_buttons)
        self._on_scan()
        self._on_workflow()

    # -------------------------------------------------------------------------------------------------- building

    def _build(self) -> None:
        self.setMinimumWidth(WIDTH)
        outer = QVBoxLayout(self)
        outer.setContentsMargins(0, 0, 0, 0)
        area = QScrollArea()
        area.setWidgetResizable(True)
        area.setFrameShape(QFrame.Shape.NoFrame)
        area.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        outer.addWidget(area)
        inside = QWidget()
        area.setWidget(inside)
        box = QVBoxLayout(inside)
        box.setSpacing(6)

        self.scan_label = _wrapped()
        box.addWidget(self.scan_label)
        row = QHBoxLayout()
        row.addWidget(QLabel("Output"))
        self.out_edit = QLineEdit()
        self.out_edit.setToolTip("Folder for everything this run leaves behind; one that holds a run goes on.")
        self.out_edit.textChanged.connect(self._update_buttons)
        row.addWidget(self.out_edit, 1)
        self.browse_button = QPushButton("Choose ...")
        self.browse_button.clicked.connect(self._browse)
        row.addWidget(self.browse_button)
        self.open_button = QPushButton("Open")
        self.open_button.setToolTip("Open this folder without running anything.")
        self.open_button.clicked.connect(self._open)
        row.addWidget(self.open_button)
        box.addLayout(row)

        group = QGroupBox("Parameters")
        inner = QVBoxLayout(group)
        inner.setContentsMargins(6, 4, 6, 4)
        inner.addWidget(self.form.container.native)
        box.addWidget(group)

        row = QHBoxLayout()
        self.energies_combo = QComboBox()
        self.energies_combo.addItems(["this energy", "all energies"])
        self.energies_combo.currentIndexChanged.connect(self._update_buttons)
        self.energies_combo.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self._still = StillWheel(self)
        self._still.watch(self.energies_combo)
        row.addWidget(self.energies_combo, 1)
        self.run_button = QPushButton("Run")
        self.run_button.clicked.connect(partial(self._run, again=False))
        row.addWidget(self.run_button)
        self.cancel_button = QPushButton("Cancel")
        self.cancel_button.clicked.connect(self._cancel)
        row.addWidget(self.cancel_button)
        box.addLayout(row)
        self.bar = QProgressBar()
        self.bar.setRange(0, 1000)
        self.bar.setTextVisible(True)
        self.bar.hide()
        box.addWidget(self.bar)
        self.progress_label = _wrapped()
        self.progress_label.hide()
        box.addWidget(self.progress_label)
        self.message = _wrapped()
        self.message.hide()
        self.message.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
        box.addWidget(self.message)

        self._build_plots(box)

        self.verdict_label = _wrapped()
        box.addWidget(self.verdict_label)
        self.scores = _table(["score", "value", "limit", ""])
        box.addWidget(self.scores)
        self.candidates = _table(["", "result", "verdict", "made with"])
        self.candidates.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
        self.candidates.setSelectionMode(QAbstractItemView.SelectionMode.SingleSelection)
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
        self.reason_label = _wrapped()
        self.reason_label.setObjectName("reasons")
        box.addWidget(self.reason_label)
        self._build_extra(box)
        box.addStretch(1)

    def _build_plots(self, box: QVBoxLayout) -> None:
        """Add the plots of this step."""

    def _build_extra(self, box: QVBoxLayout) -> None:
        """Add what this step has below the decisions."""

    def sizeHint(self) -> QSize:
        """Return a size at which nothing is cut off."""
        return QSize(WIDTH + 20, 860)

    # ------------------------------------------------------------------------------------------------ what is shown

    @property
    def energy(self) -> int:
        """Number of the energy shown; -1 without a scan."""
        return self.session.frame[0]

    @property
    def energies(self) -> list[int]:
        """Numbers of the energies that Run works on."""
        scan = self.session.scan
        if scan is None or self.energy < 0:
            return []
        return list(range(len(scan.series.scans))) if self.energies_combo.currentIndex() == 1 else [self.energy]

    @property
    def unit(self) -> UnitState | None:
        """Where this step stands at the energy shown."""
        state = self.session.state
        return None if state is None or self.energy < 0 else state[(self.step.name, self.energy)]

    def _units(self) -> dict[int, UnitState]:
        """Where this step stands at every energy chosen."""
        state = self.session.state
        return {} if state is None else {e: state[(self.step.name, e)] for e in self.energies}

    def found(self) -> list[Candidate]:
        """Return every result of the energy shown, oldest first."""
        workflow = self.session.workflow
        return [] if workflow is None or self.energy < 0 else workflow.candidates(self.step.name, self.energy)

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
        state = self.session.state
        if state is not None and not reason:
            failed = [state[(s, self.energy)] for s in self.step.upstream if self.energy >= 0]
            reason = next((u.reason for u in failed if u.status == "failed"), "")
            status = "failed" if reason else status
        verdict = "" if chosen is None else f"&nbsp;&nbsp;|&nbsp;&nbsp;verdict <b>{chosen.quality.verdict}</b>"
        notes = "" if chosen is None else "; ".join(chosen.quality.notes)
        stale = " (made with other parameters or inputs)" if status == "stale" else ""
        lines = [f"{self._energy_text()}: <b>{status}</b>{stale}{verdict}", notes, reason]
        self.verdict_label.setText("<br>".join(_escape(t) if "<b>" not in t else t for t in lines if t))
        self._show_result(chosen)
        self._update_buttons()

    def _show_result(self, candidate: Candidate | None) -> None:
        """Show a result in the plots of this step."""

    def _energy_text(self) -> str:
        scan = self.session.scan
        if scan is None or self.energy < 0:
            return "no energy"
        return f"{scan.series.scans[self.energy].energy_ev:.2f} eV"

    def _fill_scores(self, quality: Quality | None) -> None:
        scores = () if quality is None else quality.scores
        self.scores.setRowCount(len(scores))
        for row, score in enumerate(scores):
            limit = judged = ""
            if score.threshold is not None:
                limit = f"{'<=' if score.better == 'lower' else '>='} {score.threshold:.3g}"
                judged = "good" if score.passed else "check"
            for column, text in enumerate((score.name, f"{score.value:.4g} {score.unit}".strip(), limit, judged)):
                self.scores.setItem(row, column, _cell(text, bold=judged == "check"))
        _fit(self.scores)

    def _fill_candidates(self, chosen: Candidate | None) -> None:
        found, unit = self.found(), self.unit
        table = self.candidates
        table.blockSignals(True)
        table.setRowCount(len(found))
        for row, candidate in enumerate(reversed(found)):
            counts = unit is not None and unit.candidate is not None and unit.candidate.id == candidate.id
            accepted = counts and unit is not None and unit.status == "accepted"
            mark = "accepted" if accepted else ("counts" if counts else "")
            method = str(candidate.payload["numbers"].get("method", ""))
            made = _parameters_text(made_with(candidate, self.step.name))
            label = f"#{candidate.id} {method}".strip()
            for column, text in enumerate((mark, label, candidate.quality.verdict, made)):
                cell = _cell(text, bold=accepted)
                cell.setData(Qt.ItemDataRole.UserRole, candidate.id)
                table.setItem(row, column, cell)
            if chosen is not None and candidate.id == chosen.id:
                table.selectRow(row)
        table.blockSignals(False)
        _fit(table, most=4)

    # ------------------------------------------------------------------------------------------------------ events

    def _on_scan(self) -> None:
        scan = self.session.scan
        self._energy_shown = None
        if scan is None:
            self.scan_label.setText("No scan in this viewer: open a scan script, a folder, an .xrm or a .txrm.")
            self.out_edit.setText("")
        else:
            n = len(scan.series.scans)
            total = sum(len(s) for s in scan.series.scans)
            self.scan_label.setText(f"<b>{_escape(scan.series.name)}</b><br>{n} energies, {total} projections")
            if self.session.workflow is None:
                self._show_out(suggest_output(scan))
            self.energies_combo.setItemText(1, f"all {n} energies")
        self._on_frame(*self.session.frame)

    def _on_workflow(self) -> None:
        workflow = self.session.workflow
        if workflow is not None:
            self._show_out(workflow.output.folder)
            self.form.value = getattr(workflow.recipe, self.step.name)
        self.refresh()

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

    def _on_busy(self, busy: bool) -> None:
        self.bar.setVisible(busy)
        self.progress_label.setVisible(busy)
        if busy:
            self.bar.setValue(0)
            self.progress_label.setText("")
            self._tell("", False)
        self._update_buttons()

    def _on_progress(self, what: str, done: int, total: int, seconds: float) -> None:
        self.bar.setValue(round(1000 * done / max(total, 1)))
        self.progress_label.setText(", ".join(t for t in (what, remaining(done, total, seconds)) if t))

    def _tell(self, message: str, error: bool) -> None:
        self.message.setText(message)
        self.message.setVisible(bool(message))
        self.message.setStyleSheet("color: #e0654f;" if error else "")

    def _on_selected(self) -> None:
        items = self.candidates.selectedItems()
        if items:
            self._shown = int(items[0].data(Qt.ItemDataRole.UserRole))
            chosen = self.selected()
            self._fill_scores(None if chosen is None else chosen.quality)
            self._show_result(chosen)
            self._update_buttons()

    # ----------------------------------------------------------------------------------------------------- buttons

    def _update_buttons(self) -> None:
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
        made = None if unit is None or unit.candidate is None else made_with(unit.candidate, self.step.name)
        same = section is not None and made == wanted
        unchanged = recipe_same and section == getattr(session.recipe, self.step.name)
        done = False
        if state is not None and self.energies:
            done = all(
                state[(self.step.name, e)].status == "accepted"
                or (unchanged and state[(self.step.name, e)].status in ("candidate", "failed"))
                or (unchanged and any(state[(s, e)].status == "failed" for s in self.step.upstream))
                for e in self.energies
            )
        reasons = button_reasons(
            unit,
            has_scan=session.scan is not None,
            busy=busy,
            selected=self.selected(),
            same_parameters=same,
            all_done=done,
        )
        every = len(self.energies) > 1
        if every and state is not None and not busy:
            units = self._units().values()
            other = [u for u in units if u.candidate and made_with(u.candidate, self.step.name) != wanted]
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
        for button, reason, purpose in (
            (self.run_button, reasons.run, "Compute what is missing with these parameters."),
            (self.accept_button, reasons.accept, "Let the selected result count."),
            (self.redo_button, reasons.redo, "Take the acceptance back and compute again with these parameters."),
            (self.revert_button, reasons.revert, "Take the acceptance back; nothing is deleted."),
        ):
            button.setEnabled(not reason)
            button.setToolTip(reason or purpose)
        self.cancel_button.setEnabled(busy)
        self.cancel_button.setToolTip("Stop; what is finished stays." if busy else "Nothing is running.")
        fixed = session.workflow is not None or busy or session.scan is None
        for widget in (self.out_edit, self.browse_button, self.open_button):
            widget.setEnabled(not fixed)
        self.form.enabled = not busy
        self.energies_combo.setEnabled(not busy)
        told: dict[str, list[str]] = {}
        for title, reason in (
            ("Run", reasons.run), ("Accept", reasons.accept), ("Redo", reasons.redo), ("Revert", reasons.revert)
        ):  # fmt: skip
            if reason:
                told.setdefault(reason, []).append(title)
        self.reason_label.setText("\n".join(f"{', '.join(titles)}: {reason}" for reason, titles in told.items()))

    def _browse(self) -> None:
        start = Path(self.out_edit.text() or Path.home()).expanduser().parent
        while not start.is_dir() and start != start.parent:
            start = start.parent
        chosen = QFileDialog.getExistingDirectory(self, "Output folder (a new one, or an earlier run)", str(start))
        if chosen:
            self._show_out(Path(chosen))

    def _show_out(self, folder: Path) -> None:
        home = Path.home()
        inside = folder.is_relative_to(home) and folder != home
        self.out_edit.setText(str(Path("~") / folder.relative_to(home)) if inside else str(folder))
        self.out_edit.setCursorPosition(0)

    def _open(self) -> None:
        self.session.open(self.out_edit.text())

    def _run(self, _clicked: bool = False, *, again: bool) -> None:
        try:
            section = self.form.value
        except XanesTomoError as error:
            self._tell(str(error), True)
            return
        self._shown = None
        self.session.run(self.step.name, self.energies, section, self.out_edit.text(), again=again)

    def _cancel(self) -> None:
        self.progress_label.setText("stopping at the next safe point ...")
        self.session.cancel()

    def _accept(self) -> None:
        chosen = self.selected()
        if len(self.energies) > 1:
            units = self._units()
            open_ones = {e: u.candidate.id for e, u in units.items() if u.candidate and u.status == "candidate"}
            self.session.accept(self.step.name, open_ones)
        elif chosen is not None:
            self.session.accept(self.step.name, {self.energy: chosen.id})

    def _revert(self) -> None:
        self.session.revert(self.step.name, [e for e, u in self._units().items() if u.status == "accepted"])

    # ------------------------------------------------------------------------------------------------------- ending

    def event(self, event: QEvent | None) -> bool:
        """Notice when napari takes the dock away (it only unsets the parent), and end."""
        if event is not None and event.type() == QEvent.Type.ParentChange:
            if self.parent() is not None:
                self._docked = True
            elif self._docked:
                self.close()
        return bool(super().event(event))

    def closeEvent(self, event: Any) -> None:
        """Listen to nothing any more; the last dock ends the session and stops what runs."""
        s = self.session
        for signal, slot in (
            (s.scan_changed, self._on_scan), (s.workflow_changed, self._on_workflow),
            (s.state_changed, self._pending.start), (s.frame_changed, self._on_frame),
            (s.busy_changed, self._on_busy), (s.progressed, self._on_progress), (s.told, self._tell),
        ):  # fmt: skip
            _disconnect(signal, slot)
        self._pending.stop()
        s.release(id(self))
        super().closeEvent(event)
        self.deleteLater()


def made_with(candidate: Candidate, name: str) -> dict[str, Any]:
    """Return the parameters of section `name` that a candidate was made with."""
    return dict(candidate.payload.get("parameters", {}).get(name, {}))


def _release(session: Session, user: int, *_: object) -> None:
    session.release(user)


def _disconnect(signal: Any, slot: Any) -> None:
    with suppress(TypeError, RuntimeError):  # closed twice
        signal.disconnect(slot)


def _wrapped() -> QLabel:
    label = QLabel()
    label.setWordWrap(True)
    return label


def _table(titles: list[str]) -> QTableWidget:
    table = QTableWidget(0, len(titles))
    table.setHorizontalHeaderLabels(titles)
    table.setEditTriggers(QAbstractItemView.EditTrigger.NoEditTriggers)
    table.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
    header, rows = table.horizontalHeader(), table.verticalHeader()
    assert header is not None
    assert rows is not None
    rows.setVisible(False)
    rows.setDefaultSectionSize(_ROW)
    header.setSectionResizeMode(QHeaderView.ResizeMode.ResizeToContents)
    header.setStretchLastSection(True)
    return table


def _fit(table: QTableWidget, most: int = 8) -> None:
    """Make a table as high as its rows."""
    header = table.horizontalHeader()
    assert header is not None
    height = header.sizeHint().height() + _ROW * max(1, min(table.rowCount(), most)) + 4
    table.setFixedHeight(height)


def _cell(text: str, *, bold: bool = False) -> QTableWidgetItem:
    item = QTableWidgetItem(text)
    item.setToolTip(text)
    if bold:
        font = item.font()
        font.setBold(True)
        item.setFont(font)
    return item


def _parameters_text(parameters: Mapping[str, Any]) -> str:
    texts = {k.replace("_", " "): f"{v:g}" if isinstance(v, float) else str(v) for k, v in parameters.items()}
    return ", ".join(f"{k} {v}" for k, v in texts.items())


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
