"""What all docks have in common: the run they show, its output folder, progress, messages, and a clean end."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from qtpy.QtCore import QEvent, QSize, Qt, QTimer
from qtpy.QtWidgets import (
    QAbstractItemView,
    QFileDialog,
    QFrame,
    QHBoxLayout,
    QHeaderView,
    QLabel,
    QLineEdit,
    QProgressBar,
    QPushButton,
    QScrollArea,
    QTableWidget,
    QTableWidgetItem,
    QVBoxLayout,
    QWidget,
)

from .jobs import remaining
from .session import Session, session_of, short_path

__all__ = ["Dock", "allow", "cell", "escape", "fit", "table", "wrapped"]

WIDTH = 420
_ROW = 20  # height of a table's row, px


class Dock(QWidget):
    """A dock bound to the session of its viewer. Subclasses fill `_fill` and `refresh`.

    Parameters
    ----------
    viewer : napari.Viewer
    """

    def __init__(self, viewer: Any) -> None:
        super().__init__()
        self.session: Session = session_of(viewer)
        self.session.join(id(self))
        self.destroyed.connect(partial(_release, self.session, id(self)))
        self._docked = False
        self._pending = QTimer(self)  # many events, one redraw
        self._pending.setSingleShot(True)
        self._pending.timeout.connect(self.refresh)
        self._build()
        s = self.session
        self._connected: list[tuple[Any, Any]] = [
            (s.scan_changed, self._on_scan),
            (s.workflow_changed, self._on_workflow),
            (s.asked_changed, self._on_asked),
            (s.out_changed, self._on_out),
            (s.state_changed, self._refresh_soon),
            (s.frame_changed, self._on_frame),
            (s.busy_changed, self._on_busy),
            (s.progressed, self._on_progress),
            (s.told, self._tell),
        ]
        for signal, slot in self._connected:
            signal.connect(slot)
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
        self.scan_label = wrapped()
        box.addWidget(self.scan_label)
        row = QHBoxLayout()
        row.addWidget(QLabel("Output"))
        self.out_edit = QLineEdit()
        self.out_edit.setToolTip("Folder for everything this run leaves behind; one that holds a run goes on.")
        self.out_edit.textChanged.connect(self._out_edited)
        row.addWidget(self.out_edit, 1)
        self.browse_button = QPushButton("Choose ...")
        self.browse_button.clicked.connect(self._browse)
        row.addWidget(self.browse_button)
        self.open_button = QPushButton("Open")
        self.open_button.setToolTip("Open this folder without running anything.")
        self.open_button.clicked.connect(self._open)
        row.addWidget(self.open_button)
        box.addLayout(row)
        self._fill(box)
        box.addStretch(1)

    def _fill(self, box: QVBoxLayout) -> None:
        """Add what this dock has below scan and output; `_add_progress` is to be called once."""
        self._add_progress(box)

    def _add_progress(self, box: QVBoxLayout) -> None:
        self.bar = QProgressBar()
        self.bar.setRange(0, 1000)
        self.bar.setTextVisible(True)
        self.bar.hide()
        box.addWidget(self.bar)
        self.progress_label = wrapped()
        self.progress_label.hide()
        box.addWidget(self.progress_label)
        self.message = wrapped()
        self.message.hide()
        self.message.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
        box.addWidget(self.message)

    def _cancel_button(self) -> QPushButton:
        self.cancel_button = QPushButton("Cancel")
        self.cancel_button.clicked.connect(self._cancel)
        return self.cancel_button

    def sizeHint(self) -> QSize:
        """Return a size at which nothing is cut off."""
        return QSize(WIDTH + 20, 860)

    def refresh(self) -> None:
        """Show what the journal says."""
        self._update_buttons()

    def _refresh_soon(self) -> None:
        """Redraw once for many events: soon, or a few times a second while something runs."""
        if not self.session.busy:
            self._pending.start(0)
        elif not self._pending.isActive():
            self._pending.start(300)

    @property
    def energy(self) -> int:
        """Number of the energy shown; -1 without a scan."""
        return self.session.frame[0]

    def _energy_text(self) -> str:
        scan = self.session.scan
        if scan is None or self.energy < 0:
            return "no energy"
        return f"{scan.series.scans[self.energy].energy_ev:.2f} eV"

    def _why_not(self) -> str:
        """Return why nothing can be decided by hand now; empty where it can."""
        if self.session.scan is None:
            return "Open a scan first."
        if self.session.busy:
            return "Something is running."
        return "" if self.session.workflow is not None else "Nothing was run yet: run a step, or open an output folder."

    def _elsewhere(self) -> str:
        """Return why a step cannot be tried on what was aligned elsewhere; empty for a measurement."""
        scan = self.session.scan
        given = "" if scan is None else scan.series.scans[0].given
        return f"Not for {given} that were aligned elsewhere: this step is not done again." if given else ""

    # ------------------------------------------------------------------------------------------------------ events

    def _on_scan(self) -> None:
        scan = self.session.scan
        if scan is None:
            self.scan_label.setText("No scan in this viewer: open a scan script, a folder, an .xrm or a .txrm.")
        else:
            n = len(scan.series.scans)
            total = sum(len(s) for s in scan.series.scans)
            given = scan.series.scans[0].given
            held = {"volumes": f"{n} volumes", "images": f"{n} images"}.get(given, f"{total} projections")
            aligned = "; aligned elsewhere: the registration is checked, then come the maps" if given else ""
            self.scan_label.setText(f"<b>{escape(scan.series.name)}</b><br>{n} energies, {held}{aligned}")
        self._on_out(self.session.out)
        self._on_frame(*self.session.frame)

    def _on_workflow(self) -> None:
        workflow = self.session.workflow
        if workflow is not None:
            self._on_out(short_path(workflow.output.folder))
        self._on_asked()
        self.refresh()

    def _on_asked(self) -> None:
        """Show the parameters asked for."""

    def _on_out(self, out: str) -> None:
        if self.out_edit.text() != out:
            self.out_edit.blockSignals(True)
            self.out_edit.setText(out)
            self.out_edit.setCursorPosition(0)
            self.out_edit.blockSignals(False)

    def _out_edited(self, out: str) -> None:
        self.session.set_out(out)
        self._update_buttons()

    def _on_frame(self, energy: int, angle: int) -> None:
        """Show which frame the sliders stand at."""

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

    def _update_buttons(self) -> None:
        busy = self.session.busy
        self.cancel_button.setEnabled(busy)
        self.cancel_button.setToolTip("Stop; what is finished stays." if busy else "Nothing is running.")
        fixed = self.session.workflow is not None or busy or self.session.scan is None
        for widget in (self.out_edit, self.browse_button, self.open_button):
            widget.setEnabled(not fixed)

    def _browse(self) -> None:
        start = Path(self.out_edit.text() or Path.home()).expanduser().parent
        while not start.is_dir() and start != start.parent:
            start = start.parent
        chosen = QFileDialog.getExistingDirectory(self, "Output folder (a new one, or an earlier run)", str(start))
        if chosen:
            self.out_edit.setText(short_path(Path(chosen)))

    def _open(self) -> None:
        self.session.open(self.out_edit.text())

    def _cancel(self) -> None:
        self.progress_label.setText("stopping at the next safe point ...")
        self.session.cancel()

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
        for signal, slot in self._connected:
            with suppress(TypeError, RuntimeError):  # closed twice
                signal.disconnect(slot)
        self._pending.stop()
        self.session.release(id(self))
        super().closeEvent(event)
        self.deleteLater()


def allow(button: Any, reason: str, purpose: str) -> None:
    """Enable a button unless there is a reason not to; the tooltip says what it does, or the reason."""
    button.setEnabled(not reason)
    button.setToolTip(reason or purpose)


def _release(session: Session, user: int, *_: object) -> None:
    with suppress(RuntimeError):  # at the end of the program Qt may delete the session before its docks
        session.release(user)


def wrapped(text: str = "", *, faint: bool = False) -> QLabel:
    """Return a label that breaks its lines; small and grey for what only explains."""
    label = QLabel(text)
    label.setWordWrap(True)
    if faint:
        label.setStyleSheet("color: #909090; font-size: 11px;")
    return label


def table(titles: list[str]) -> QTableWidget:
    """Return an empty table that cannot be edited."""
    made = QTableWidget(0, len(titles))
    made.setHorizontalHeaderLabels(titles)
    made.setEditTriggers(QAbstractItemView.EditTrigger.NoEditTriggers)
    made.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
    made.setSelectionMode(QAbstractItemView.SelectionMode.SingleSelection)
    made.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
    header, rows = made.horizontalHeader(), made.verticalHeader()
    assert header is not None
    assert rows is not None
    rows.setVisible(False)
    rows.setDefaultSectionSize(_ROW)
    header.setSectionResizeMode(QHeaderView.ResizeMode.ResizeToContents)
    header.setStretchLastSection(True)
    fit(made)
    return made


def fit(table: QTableWidget, most: int = 8) -> None:
    """Make a table as high as its rows."""
    header = table.horizontalHeader()
    assert header is not None
    height = header.sizeHint().height() + _ROW * max(1, min(table.rowCount(), most)) + 4
    table.setFixedHeight(height)


def cell(text: str, *, bold: bool = False, data: Any = None) -> QTableWidgetItem:
    """Return a cell; `data` is kept in it for the program."""
    item = QTableWidgetItem(text)
    item.setToolTip(text)
    if data is not None:
        item.setData(Qt.ItemDataRole.UserRole, data)
    if bold:
        font = item.font()
        font.setBold(True)
        item.setFont(font)
    return item


def escape(text: str) -> str:
    """Return text that Qt shows as it is."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
