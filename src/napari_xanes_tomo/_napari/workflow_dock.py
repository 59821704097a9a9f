"""The dock of the whole run: where every step stands, run all, what was decided, undo, recipe, boxes and mask."""

from __future__ import annotations

import weakref
from contextlib import suppress
from functools import partial
from typing import Any

from qtpy.QtWidgets import (
    QComboBox,
    QFileDialog,
    QGroupBox,
    QHBoxLayout,
    QLineEdit,
    QPlainTextEdit,
    QPushButton,
    QVBoxLayout,
)

from napari_xanes_tomo.state import State
from napari_xanes_tomo.steps import STEPS

from .confinement import Confinement
from .dock import Dock, allow, cell, fit, table, wrapped
from .forms import StillWheel
from .words import event_text, manual_rows, stale_reason

__all__ = ["WorkflowDock"]

_KEYS = {"Alt-Z": "undo", "Shift-Alt-Z": "redo"}  # napari uses neither
_SHOWN = 40  # events


class WorkflowDock(Dock):
    """The whole run at a glance.

    Parameters
    ----------
    napari_viewer : napari.Viewer
    """

    def __init__(self, napari_viewer: Any) -> None:
        super().__init__(napari_viewer)
        self._bound: list[Any] = []
        viewer = self.session.viewer
        for key, name in _KEYS.items():
            with suppress(ValueError):  # another dock has it, or the user
                viewer.bind_key(key, partial(_on_key, weakref.ref(self), name))
                self._bound.append(key)

    # -------------------------------------------------------------------------------------------------- building

    def _fill(self, box: QVBoxLayout) -> None:
        self.overview = table(["step", "done", "accepted", "stale", "to do", "failed"])
        box.addWidget(self.overview)
        self.stale_label = wrapped()
        box.addWidget(self.stale_label)
        row = QHBoxLayout()
        self.until_combo = QComboBox()
        for s in STEPS:
            self.until_combo.addItem(f"everything up to: {s.title}", s.name)
        self.until_combo.setCurrentIndex(len(STEPS) - 1)
        self.until_combo.currentIndexChanged.connect(self._update_buttons)
        self._still = StillWheel(self)
        self._still.watch(self.until_combo)
        row.addWidget(self.until_combo, 1)
        self.run_button = QPushButton("Run")
        self.run_button.clicked.connect(self._run)
        row.addWidget(self.run_button)
        row.addWidget(self._cancel_button())
        box.addLayout(row)
        self._add_progress(box)

        box.addWidget(self._decisions())
        self.confinement = Confinement(self.session, self._why_not)
        box.addWidget(self.confinement)
        box.addWidget(self._recipe())
        self.reason_label = wrapped()
        self.reason_label.setObjectName("reasons")
        box.addWidget(self.reason_label)

    def _decisions(self) -> QGroupBox:
        group = QGroupBox("Decisions")
        inner = QVBoxLayout(group)
        inner.setContentsMargins(6, 4, 6, 4)
        row = QHBoxLayout()
        self.undo_button = QPushButton("Undo")
        self.undo_button.clicked.connect(self.session.undo)
        self.redo_button = QPushButton("Redo")
        self.redo_button.clicked.connect(self.session.redo)
        row.addWidget(self.undo_button)
        row.addWidget(self.redo_button)
        inner.addLayout(row)
        self.by_hand = table(["by hand, holding now"])
        self.by_hand.setToolTip("Click a row to go there.")
        self.by_hand.cellClicked.connect(lambda row, _: self._go_to(row))
        self.by_hand.itemSelectionChanged.connect(self._update_buttons)
        inner.addWidget(self.by_hand)
        self.take_back_button = QPushButton("Take the selected one back")
        self.take_back_button.clicked.connect(self._take_back)
        inner.addWidget(self.take_back_button)
        self.events = table(["journal, newest first"])
        inner.addWidget(self.events)
        row = QHBoxLayout()
        self.note_edit = QLineEdit()
        self.note_edit.setPlaceholderText("a note for the journal")
        self.note_edit.textChanged.connect(self._update_buttons)
        self.note_edit.returnPressed.connect(self._note)
        self.note_button = QPushButton("Add note")
        self.note_button.clicked.connect(self._note)
        row.addWidget(self.note_edit, 1)
        row.addWidget(self.note_button)
        inner.addLayout(row)
        return group

    def _recipe(self) -> QGroupBox:
        group = QGroupBox("Recipe")
        inner = QVBoxLayout(group)
        inner.setContentsMargins(6, 4, 6, 4)
        self.recipe_text = QPlainTextEdit()
        self.recipe_text.setReadOnly(True)
        self.recipe_text.setFixedHeight(90)
        self.recipe_text.setToolTip("What the forms ask for, the same file that the command line takes.")
        inner.addWidget(self.recipe_text)
        row = QHBoxLayout()
        self.load_button = QPushButton("Load ...")
        self.load_button.clicked.connect(self._load)
        self.save_button = QPushButton("Save as ...")
        self.save_button.clicked.connect(self._save)
        row.addWidget(self.load_button)
        row.addWidget(self.save_button)
        inner.addLayout(row)
        return group

    # ------------------------------------------------------------------------------------------------ what is shown

    def refresh(self) -> None:
        """Show what the journal says."""
        state, workflow = self.session.state, self.session.workflow
        energies = [] if workflow is None else workflow.series.energies_ev.tolist()
        events = [] if workflow is None else workflow.journal.events
        self.overview.setRowCount(len(STEPS))
        for row, s in enumerate(STEPS):
            counts = {} if state is None else state.summary(s.name)
            out = 0 if state is None or not s.per_energy else len(state.manual.energies)
            done = counts.get("accepted", 0) + counts.get("candidate", 0)
            total = sum(counts.values())
            failed = counts.get("failed", 0) - out
            texts = (
                s.title,
                f"{done} of {total}" if total else "-",
                *(str(counts.get(k, 0) or "") for k in ("accepted", "stale", "idle")),
                str(failed or ""),
            )
            for column, text in enumerate(texts):
                self.overview.setItem(row, column, cell(text, bold=column in (3, 5) and bool(text)))
        fit(self.overview)
        self.stale_label.setText("" if state is None else "\n".join(_unfinished(state, events, energies)))
        rows = [] if state is None else manual_rows(state.manual, energies)
        self._rows = rows
        self.by_hand.setRowCount(len(rows))
        for row, (text, _, _) in enumerate(rows):
            self.by_hand.setItem(row, 0, cell(text))
        if not rows:
            self.by_hand.clearSelection()
        fit(self.by_hand, most=5)
        newest = events[: -_SHOWN - 1 : -1]
        self.events.setRowCount(len(newest))
        for row, event in enumerate(newest):
            made = cell(event_text(event, energies))
            made.setToolTip(f"{event.time}\n{made.text()}")
            self.events.setItem(row, 0, made)
        fit(self.events, most=6)
        self.confinement.refresh()
        self._show_recipe()
        self._update_buttons()

    def _show_recipe(self) -> None:
        text = self.session.asked.to_yaml()
        if self.recipe_text.toPlainText() != text:
            self.recipe_text.setPlainText(text)

    def _on_asked(self) -> None:
        self._show_recipe()

    def _update_buttons(self) -> None:
        super()._update_buttons()
        session = self.session
        state, busy = session.state, session.busy
        why = self._why_not()
        scan = "Open a scan first." if session.scan is None else "Something is running." if busy else ""
        name = str(self.until_combo.currentData())
        names = [s.name for s in STEPS]
        until = names[: names.index(name) + 1]
        done = False
        if state is not None and session.asked == session.recipe:
            hopeless = {e for (_, e), u in state.units.items() if u.status == "failed" and e is not None}
            done = not any(
                s in until and e not in hopeless and u.status in ("idle", "stale") for (s, e), u in state.units.items()
            )
        reasons: dict[str, list[str]] = {}
        rows = getattr(self, "_rows", [])
        selected = bool(rows) and bool(self.by_hand.selectedItems())
        for button, reason, purpose in (
            (self.run_button, scan or ("Everything is done with these parameters." if done else ""),
             "Do what is missing, step by step, for all energies."),
            (self.undo_button, why, "Take the last decision back (Alt+Z in the viewer)."),
            (self.redo_button, why, "Let it hold again (Shift+Alt+Z in the viewer)."),
            (self.take_back_button, why or ("" if selected else "Select a decision first."),
             "Another decision, which can be undone as well."),
            (self.note_button, why or ("" if self.note_edit.text().strip() else "Write a note first."),
             "Keep it in the journal."),
            (self.load_button, "Something is running." if busy else "", "Show the parameters of a file in all forms."),
        ):  # fmt: skip
            allow(button, reason, purpose)
            if reason:
                reasons.setdefault(reason, []).append(button.text())
        self.confinement.update_buttons()
        self.reason_label.setText("\n".join(f"{', '.join(which)}: {reason}" for reason, which in reasons.items()))

    # ----------------------------------------------------------------------------------------------------- actions

    def _run(self) -> None:
        self.session.run_until(str(self.until_combo.currentData()), self.out_edit.text())

    def _go_to(self, row: int) -> None:
        place = self._rows[row][2]
        if place is not None:
            energy, frame = place
            self.session.go_to(energy, max(0, self.session.frame[1]) if frame is None else frame)

    def _take_back(self) -> None:
        items = self.by_hand.selectedItems()
        if items:
            text, take, _ = self._rows[items[0].row()]
            self.session.decide(take, f"Taken back: {text}.")

    def _note(self) -> None:
        text, workflow = self.note_edit.text().strip(), self.session.workflow
        if text and workflow is not None and not self.session.busy:
            self.note_edit.clear()
            self.session.decide(lambda w: w.note(text))

    def _load(self) -> None:
        chosen, _ = QFileDialog.getOpenFileName(self, "Load a recipe", "", "Recipe (*.yaml *.yml)")
        if chosen:
            self.session.load_recipe(chosen)

    def _save(self) -> None:
        chosen, _ = QFileDialog.getSaveFileName(self, "Save the recipe as", "recipe.yaml", "Recipe (*.yaml *.yml)")
        if chosen:
            self.session.save_recipe(chosen)

    def closeEvent(self, event: Any) -> None:
        """Give the keys back."""
        viewer = self.session.viewer
        if viewer is not None:
            for key in self._bound:
                viewer.bind_key(key, None)
        self._bound = []
        super().closeEvent(event)


def _unfinished(state: State, events: Any, energies_ev: list[float]) -> list[str]:
    """Say what is stale or failed, and why: a line for each reason."""
    lines: dict[tuple[str, str], tuple[dict[str, None], dict[str, None]]] = {}
    for s in STEPS:
        for (name, energy), unit in state.units.items():
            if name != s.name or unit.status not in ("stale", "failed") or energy in state.manual.energies:
                continue
            why = stale_reason(state, (name, energy), events, energies_ev) if unit.status == "stale" else unit.reason
            titles, where = lines.setdefault((unit.status, why), ({}, {}))
            titles[s.title] = None
            if energy is not None:
                where[f"{energies_ev[energy]:g} eV"] = None
    out = []
    for (status, why), (titles, where) in lines.items():
        few = ", ".join(list(where)[:3]) + (f" and {len(where) - 3} more" if len(where) > 3 else "")
        out.append(f"{', '.join(titles)}{f' ({few})' if few else ''}: {status}: {why}")
    return out[:8]


def _on_key(dock: Any, name: str, _viewer: Any) -> None:
    found = dock()
    if found is not None:
        getattr(found.session, name)()
