"""The dock of the elemental maps: parameters, run, what was made and what not; the maps in their own viewer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from typing import Any

import numpy as np
from qtpy.QtWidgets import QPushButton, QVBoxLayout

from napari_xanes_tomo.io.store import read_map_attributes
from napari_xanes_tomo.mapping import VoxelTable
from napari_xanes_tomo.model import Progress, XanesTomoError
from napari_xanes_tomo.state import Candidate

from .dock import allow, cell, fit, table, wrapped
from .layers import is_maps, stored_key
from .plots import PointPlot
from .step_dock import StepDock

__all__ = ["MapsDock"]

# What few users change; on top stay elements, table, voxel, smoothing, offset and references.
FOLDED = {
    "Fit of the elements": (
        "scanned_edge",
        "leave_out_below_ev",
        "leave_out_above_ev",
        "scanned_edge_in_elements",
        "white_line_factors",
        "white_line_from_spectrum",
        "non_negative",
    ),
    "Measures of the edge": (
        "edge_measures",
        "pre_edge_from_ev",
        "pre_edge_to_ev",
        "post_edge_from_ev",
        "post_edge_to_ev",
        "free_slopes",
    ),
    "Reconstruction": (
        "reconstruction",
        "iterations",
        "filter",
        "local_tomography",
        "fill_lost",
        "common_blur",
        "shape_smoothing",
        "scale_change",
    ),
}


class MapsDock(StepDock):
    """Elemental maps: parameters, run, decision.

    Parameters
    ----------
    napari_viewer : napari.Viewer
    """

    folded = FOLDED

    def __init__(self, napari_viewer: Any) -> None:
        super().__init__(napari_viewer, "maps")

    def _build_plots(self, box: QVBoxLayout) -> None:
        self.before_label = wrapped()
        box.addWidget(self.before_label)
        self.voxels_button = QPushButton("What voxel size?")
        self.voxels_button.clicked.connect(self._try_voxels)
        box.addWidget(self.voxels_button)
        self.voxels = table([""])
        self._tried: tuple[int | None, VoxelTable] | None = None  # and the candidate it was tried beside
        self.voxels.hide()
        box.addWidget(self.voxels)
        self.spectrum = PointPlot([("1/cm", 2)], "mean of the particle (orange: not in the element fit), eV", 150)
        self.spectrum.hide()
        box.addWidget(self.spectrum)
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

    def _notes(self, candidate: Candidate) -> str:
        """Return one line a note, what is red in colour; maps that are not made have their table."""
        absent = {f"{name}: {why}" for name, why in candidate.payload["numbers"].get("absent", {}).items()}
        lines = [n for n in candidate.quality.notes if n not in absent]
        return "<br>".join(
            f'<span style="color:#d9534f">{escape(n)}</span>' if ", red: " in n else escape(n) for n in lines
        )

    def _show_result(self, candidate: Candidate | None) -> None:
        numbers: dict[str, Any] = {} if candidate is None else dict(candidate.payload["numbers"])
        if self._tried is not None and self._tried[0] == _id(candidate):
            tried = self._tried[1]
            self._show_voxels([asdict(c) for c in tried.choices], tried.px)
            self._show_spectrum(tried.mean_spectrum)
        else:
            self._tried = None
            self._show_voxels(numbers.get("voxel_choices", []), int(numbers.get("voxel_px", 0)))
            self._show_spectrum(numbers.get("mean_spectrum_per_cm", []))
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

    def _try_voxels(self) -> None:
        """Map some rows with the parameters of the form, to say what voxels of several sizes would be worth."""
        workflow = self.session.workflow
        if workflow is None:
            return
        try:
            asked = self.form.value
        except XanesTomoError as error:
            self._tell(str(error), True)
            return

        def work(progress: Progress) -> VoxelTable:
            progress("rows in the middle", 0, 1)
            return workflow.voxel_table(asked)

        def show(found: VoxelTable) -> None:
            self._tried = (_id(self.selected()), found)
            self.refresh()
            none = not found.choices
            self._tell("There is no voxel of the particle in the middle rows." if none else "", none)

        self.session.compute(work, show)

    def _show_voxels(self, choices: Sequence[Mapping[str, Any]], px: int) -> None:
        rows = [_column(c) for c in choices]
        titles = list(dict.fromkeys(title for row in rows for title in row))
        self.voxels.setVisible(bool(choices))
        self.voxels.setColumnCount(1 + len(choices))
        self.voxels.setHorizontalHeaderLabels(["", *(f"{c['px']} px" for c in choices)])
        self.voxels.setRowCount(len(titles))
        for row, title in enumerate(titles):
            self.voxels.setItem(row, 0, cell(title))
            for column, (c, values) in enumerate(zip(choices, rows, strict=True), 1):
                self.voxels.setItem(row, column, cell(values.get(title, ""), bold=c["px"] == px))
        fit(self.voxels, len(titles))

    def _show_spectrum(self, points: Sequence[Sequence[Any]]) -> None:
        self.spectrum.setVisible(bool(points))
        if not points:
            return
        energy, mu, fitted = (np.array(column) for column in zip(*points, strict=True))
        series = [(np.where(chosen, mu, np.nan), None) for chosen in (fitted, ~fitted)]
        self.spectrum.show_points(0, energy, series, range(len(energy)), [(energy, mu)])
        self.spectrum.mark(float("nan"))

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
        return "" if workflow is None else stored_key(workflow.output.maps)

    def _update_buttons(self) -> None:
        super()._update_buttons()
        workflow, state = self.session.workflow, self.session.state
        ready = state is not None and any(state.summary("registration").get(k) for k in ("accepted", "candidate"))
        why = "Something is running." if self.session.busy else "" if ready else "No energy is registered yet."
        allow(
            self.voxels_button, why, "Noise, errors and real spread for voxels of 1 to 6 px, from rows in the middle."
        )
        there = workflow is not None and is_maps(workflow.output.folder) is not None
        why = "" if there else "There are no finished maps yet."
        allow(self.open_maps_button, why, "In micrometres; projections and maps do not share axes.")
        self.open_maps_button.setText("Open the maps in a viewer of their own" + ("" if there else " (none yet)"))

    def _open_maps(self) -> None:
        from .view import open_maps

        workflow = self.session.workflow
        if workflow is not None:
            try:
                open_maps(workflow.output.folder, self.session)
            except XanesTomoError as error:
                self._tell(str(error), True)


def _id(candidate: Candidate | None) -> int | None:
    return None if candidate is None else candidate.id


def _column(choice: Mapping[str, Any]) -> dict[str, str]:
    """Return what is said of one voxel size, by its title."""
    out = {"nm": f"{choice['nm']:.0f}", "noise / jump": f"{choice['noise_over_jump']:.3f}"}
    for name, sigma in choice["sigma"].items():
        edge = name == "edge_energy_relative"
        title, digits = ("edge, eV", 2) if edge else (name.replace("_", " "), 3)
        out[f"{title}: sigma"] = f"{sigma:.{digits}f}"
        out[f"{title}: real spread"] = f"{choice['real'].get(name, float('nan')):.{digits}f}"
    return out | {"voxels, some rows": str(choice["voxels"])}
