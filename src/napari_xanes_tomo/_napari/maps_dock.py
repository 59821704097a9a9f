"""The dock of the elemental maps: parameters, run, what was made and what not; the maps in their own viewer."""

from __future__ import annotations

from typing import Any

from qtpy.QtWidgets import QPushButton, QVBoxLayout

from napari_xanes_tomo.io.store import read_map_attributes
from napari_xanes_tomo.model import XanesTomoError
from napari_xanes_tomo.workflow import Candidate

from .dock import allow, cell, fit, table, wrapped
from .layers import is_maps
from .step_dock import StepDock

__all__ = ["MapsDock"]


class MapsDock(StepDock):
    """Elemental maps: parameters, run, decision.

    Parameters
    ----------
    napari_viewer : napari.Viewer
    """

    def __init__(self, napari_viewer: Any) -> None:
        super().__init__(napari_viewer, "maps")

    def _build_plots(self, box: QVBoxLayout) -> None:
        self.before_label = wrapped()
        box.addWidget(self.before_label)
        self.made = table(["map", "unit", "what it is"])
        box.addWidget(self.made)
        self.absent = table(["not made", "reason"])
        box.addWidget(self.absent)
        self.facts = wrapped()
        box.addWidget(self.facts)
        self.open_maps_button = QPushButton("Open the maps in a viewer of their own")
        self.open_maps_button.clicked.connect(self._open_maps)
        box.addWidget(self.open_maps_button)

    def refresh(self) -> None:
        """Show what the journal says."""
        state = self.session.state
        text = ""
        if state is not None:
            counts = state.summary("registration")
            ready = counts.get("accepted", 0) + counts.get("candidate", 0)
            accepted = counts.get("accepted", 0)
            text = f"{ready} of {sum(counts.values())} energies are registered, {accepted} of them accepted."
            if counts.get("stale", 0) + counts.get("idle", 0):
                text += " Run does what is missing first."
        self.before_label.setText(text)
        super().refresh()

    def _show_result(self, candidate: Candidate | None) -> None:
        numbers: dict[str, Any] = {} if candidate is None else dict(candidate.payload["numbers"])
        made = self._made(str(numbers.get("store_key", "")))
        self.made.setVisible(bool(made))
        self.made.setRowCount(len(made))
        for row, (name, own) in enumerate(made.items()):
            what = " ".join(str(own[key]) for key in ("description", "normalisation") if own.get(key))
            for column, text in enumerate((name, str(own.get("unit") or ""), what)):
                self.made.setItem(row, column, cell(text))
        fit(self.made)
        absent = dict(numbers.get("absent", {}))
        self.absent.setVisible(bool(absent))
        self.absent.setRowCount(len(absent))
        for row, (name, why) in enumerate(absent.items()):
            self.absent.setItem(row, 0, cell(name))
            self.absent.setItem(row, 1, cell(str(why)))
        fit(self.absent)
        lines = []
        if numbers:
            lines.append(
                f"Elements: {', '.join(numbers['elements']) or 'none'}; reference {numbers['reference_ev']:g} eV."
            )
            half = numbers.get("edge_half_ev")
            if isinstance(half, (int, float)):
                scale = "calibrated" if numbers["energy_calibrated"] else "not calibrated"
                lines.append(f"E(0.5) of the mean spectrum: {half:.2f} eV ({scale}).")
            left = numbers.get("energies_left_out_ev") or []
            if left:
                lines.append(f"Left out of the element fit: {len(left)} energies, {min(left):g} to {max(left):g} eV.")
            lines.append("Handedness not verified.")
        stored = self._stored_key()
        if candidate is not None and stored and numbers.get("store_key") not in (None, stored):
            lines.append("The maps on disk are those of another result; Run makes these again.")
        self.facts.setText("\n".join(lines))

    def _made(self, key: str) -> dict[str, Any]:
        """Return what is known of every map of the result `key`, without its errors."""
        workflow = self.session.workflow
        if not key or workflow is None or self._stored_key() != key:
            return {}
        each = read_map_attributes(workflow.output.maps)[1]
        return {name: own for name, own in each.items() if "_sigma" not in name}

    def _stored_key(self) -> str:
        """Return the key of the maps on disk, empty where there are none."""
        workflow = self.session.workflow
        if workflow is None or not workflow.output.maps.exists():
            return ""
        try:
            return str(read_map_attributes(workflow.output.maps)[0].get("key", ""))
        except (XanesTomoError, OSError):
            return ""

    def _update_buttons(self) -> None:
        super()._update_buttons()
        workflow = self.session.workflow
        there = workflow is not None and is_maps(workflow.output.folder) is not None
        why = "" if there else "There are no finished maps yet."
        allow(self.open_maps_button, why, "In micrometres; projections and maps do not share axes.")
        self.open_maps_button.setText("Open the maps in a viewer of their own" + ("" if there else " (none yet)"))

    def _open_maps(self) -> None:
        from .view import open_maps

        workflow = self.session.workflow
        if workflow is not None:
            try:
                open_maps(workflow.output.folder)
            except XanesTomoError as error:
                self._tell(str(error), True)
