"""The dock beside the maps: means of regions with errors, correlations of two maps, groups of alike voxels."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from qtpy.QtWidgets import QComboBox, QFileDialog, QFormLayout, QHBoxLayout, QPushButton, QSpinBox, QVBoxLayout, QWidget

from napari_xanes_tomo.analysis import Correlation, RegionMeans, block_voxels, cluster, correlation, region_means
from napari_xanes_tomo.model import Progress, XanesTomoError

from .dock import allow, cell, fit, table, wrapped
from .jobs import Jobs
from .layers import METADATA_KEY
from .plots import PointPlot

__all__ = ["AnalysisDock"]

WHOLE, NO_MAP = "whole particle", "-"
_POINTS = 3000  # of a correlation, drawn


@dataclass(frozen=True)
class _Found:
    """What one press of the button gave."""

    map: str
    unit: str
    means: RegionMeans
    systematic: float
    other: str
    correlation: Correlation | None
    points: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None


class AnalysisDock(QWidget):
    """Regions, correlations and groups of the maps in a viewer.

    Parameters
    ----------
    napari_viewer : napari.Viewer
        Holds the maps of one run, see `view.open_maps`.
    """

    def __init__(self, napari_viewer: Any) -> None:
        super().__init__()
        self.viewer = napari_viewer
        self.found: _Found | None = None
        self._then: Any = None
        self.jobs = Jobs()
        self.jobs.ended.connect(self._on_ended)
        self._build()
        layers = self.viewer.layers.events
        for event in (layers.inserted, layers.removed):
            event.connect(self._fill_combos)
        self._fill_combos()

    def _build(self) -> None:
        box = QVBoxLayout(self)
        form = QFormLayout()
        self.map_combo, self.region_combo, self.other_combo = QComboBox(), QComboBox(), QComboBox()
        self.region_combo.setToolTip("Labels of the maps' shape: every number is a region, 0 is none.")
        for title, combo in (
            ("Map", self.map_combo),
            ("Regions", self.region_combo),
            ("Correlate with", self.other_combo),
        ):
            form.addRow(title, combo)
            combo.currentIndexChanged.connect(self._update_buttons)
        box.addLayout(form)
        row = QHBoxLayout()
        self.regions_button = QPushButton("Draw regions")
        self.regions_button.clicked.connect(self._draw)
        self.means_button = QPushButton("Means and errors")
        self.means_button.clicked.connect(self._measure)
        row.addWidget(self.regions_button)
        row.addWidget(self.means_button)
        box.addLayout(row)
        self.means = table(["region", "voxels", "mean", "sigma", "systematic"])
        self.means.hide()
        box.addWidget(self.means)
        self.correlation_label = wrapped()
        box.addWidget(self.correlation_label)
        self.scatter = PointPlot([("", 1)], "", 180)
        self.scatter.hide()
        box.addWidget(self.scatter)
        row = QHBoxLayout()
        self.groups = QSpinBox()
        self.groups.setRange(2, 12)
        self.groups.setValue(3)
        self.groups.setToolTip("Number of groups.")
        self.groups_button = QPushButton("Group voxels")
        self.groups_button.clicked.connect(self._group)
        self.save_button = QPushButton("Save the table ...")
        self.save_button.clicked.connect(lambda: self._save())
        for widget in (self.groups, self.groups_button, self.save_button):
            row.addWidget(widget)
        box.addLayout(row)
        self.message = wrapped()
        box.addWidget(self.message)
        box.addStretch(1)

    # ------------------------------------------------------------------------------------------------ what is there

    def _facts(self) -> dict[str, Mapping[str, Any]]:
        """Return what is known of every map that is open, by the name of its layer; errors are none."""
        found = {x.name: x.metadata.get(METADATA_KEY, {}) for x in self.viewer.layers}
        return {name: f for name, f in found.items() if f.get("map") and "_sigma" not in f["map"]}

    def _maps(self) -> list[str]:
        return [n for n, f in self._facts().items() if f["map"] not in ("mask", "coverage")]

    def _fill_combos(self, _event: Any = None) -> None:
        maps = self._maps()[::-1]
        labels = [x.name for x in self.viewer.layers if type(x).__name__ == "Labels"]
        for combo, names in (
            (self.map_combo, maps),
            (self.region_combo, [WHOLE, *labels]),
            (self.other_combo, [NO_MAP, *maps]),
        ):
            kept = combo.currentText()
            combo.blockSignals(True)
            combo.clear()
            combo.addItems(names)
            combo.setCurrentIndex(max(0, combo.findText(kept)))
            combo.blockSignals(False)
        self._update_buttons()

    def _update_buttons(self) -> None:
        busy = "Something is being computed." if self.jobs.busy else ""
        none = "" if self._maps() else "There is no map in this viewer."
        allow(self.means_button, busy or none, "Mean of the map in every region with its standard error.")
        allow(self.regions_button, none, "Add a layer to paint regions in; every number is one.")
        allow(self.groups_button, busy or none, "Group voxels of alike composition and edge energy (k-means).")
        allow(self.save_button, "" if self.found else "There is no table yet.", "The table as CSV.")

    def _layer(self, name: str) -> Any:
        layer = self.viewer.layers[name]
        return layer.data[0] if layer.multiscale else layer.data

    def _mask(self) -> Any:
        """Return the data of the mask, None where it is not open."""
        return next((self._layer(n) for n, f in self._facts().items() if f["map"] == "mask"), None)

    # ------------------------------------------------------------------------------------------------------ actions

    def _draw(self) -> None:
        like = self.viewer.layers[self.map_combo.currentText()]
        data = self._layer(like.name)
        layer = self.viewer.add_labels(
            np.zeros(data.shape, np.uint8), name="regions", scale=like.scale, units=like.units,
            axis_labels=like.axis_labels,
        )  # fmt: skip
        layer.mode = "paint"
        layer.brush_size = max(4, data.shape[-1] // 12)
        self.region_combo.setCurrentText(layer.name)
        self._tell("Paint in the picture; with n_edit_dimensions 3 the brush is a ball.")

    def _measure(self) -> None:
        name, region, other = (c.currentText() for c in (self.map_combo, self.region_combo, self.other_combo))
        facts = self._facts()[name]
        data, mask = self._layer(name), self._mask()
        labels = None if region == WHOLE else self._layer(region)
        second = None if other == NO_MAP else self._layer(other)
        block = block_voxels(facts.get("psf_sigma_voxel"))

        def work(progress: Progress) -> _Found:
            values = np.asarray(data, dtype=float)
            inside = np.isfinite(values) if mask is None else np.asarray(mask) > 0.5
            if labels is not None and labels.shape != values.shape:
                raise XanesTomoError(f"{region}: expected labels of the maps' shape {values.shape}, got {labels.shape}")
            regions = np.where(inside, 1 if labels is None else np.asarray(labels), 0)
            if not regions.any():
                raise XanesTomoError(f"{region}: expected regions inside the particle, found no voxel")
            means = region_means(values, regions, block=block)
            progress(name, 1, 2)
            if second is None:
                return _Found(name, str(facts.get("unit") or ""), means, _systematic(facts), "", None, None)
            theirs = np.asarray(second, dtype=float)
            both = (regions > 0) & np.isfinite(values) & np.isfinite(theirs)
            step = max(1, int(both.sum()) // _POINTS)
            return _Found(
                name, str(facts.get("unit") or ""), means, _systematic(facts), other,
                correlation(values, theirs, regions > 0, block=block), (values[both][::step], theirs[both][::step]),
            )  # fmt: skip

        self._start(work, self._show)

    def _group(self) -> None:
        facts = self._facts()
        chosen = {
            n: (self._layer(n), self._layer(n + "_sigma"))
            for n, f in facts.items()
            if (f["map"].endswith("_fraction") or f["map"] == "edge_energy_relative")
            and n + "_sigma" in self.viewer.layers
        }
        if not chosen:
            self._tell("Expected maps of fractions or of the edge energy with their errors, found none.")
            return
        mask, groups = self._mask(), self.groups.value()

        def work(progress: Progress) -> npt.NDArray[np.uint8]:
            maps = []
            for k, (value, sigma) in enumerate(chosen.values()):
                progress("maps", k, len(chosen))
                # In units of its own error, so that no map decides by its unit.
                maps.append(np.asarray(value, dtype=float) / float(np.nanmedian(np.asarray(sigma))))
            stack = np.stack(maps)
            inside = np.isfinite(stack).all(axis=0)
            if mask is not None:
                inside &= np.asarray(mask) > 0.5
            labels = np.zeros(inside.shape, np.uint8)
            labels[inside] = cluster(stack[:, inside], groups).labels
            return labels

        def show(labels: npt.NDArray[np.uint8]) -> None:
            like = self.viewer.layers[next(iter(chosen))]
            layer = self.viewer.add_labels(
                labels, name=f"{groups} groups", scale=like.scale, units=like.units, axis_labels=like.axis_labels,
                opacity=0.5,
            )  # fmt: skip
            self.region_combo.setCurrentText(layer.name)
            self._tell(f"Grouped by {', '.join(chosen)}, each in units of its error; 1 is the largest group.")

        self._start(work, show)

    def _show(self, found: _Found) -> None:
        self.found = found
        rows = self._rows()
        self.means.setVisible(True)
        self.means.setRowCount(len(rows))
        for r, row in enumerate(rows):
            for c, text in enumerate(row):
                self.means.setItem(r, c, cell(text))
        fit(self.means)
        how = found.correlation
        if how is None:
            text = ""
        else:
            text = f"{found.map} with {found.other}: r = {how.r:.3f} +- {how.sigma:.3f} over {how.voxels} voxels."
        self.correlation_label.setText(text)
        self.scatter.setVisible(found.points is not None)
        if found.points is not None:
            first, second = found.points
            self.scatter.name_axes(found.map, found.other)
            self.scatter.show_points(0, second, [(first, None)], range(len(first)))
            self.scatter.mark(float("nan"))
        self._tell(f"sigma: {found.means.method}; noise and real spread together.")

    def _rows(self) -> list[tuple[str, ...]]:
        f = self.found
        if f is None:
            return []
        unit = f" {f.unit}" if f.unit and f.unit != "1" else ""
        return [
            (
                str(label), str(count), f"{mean:.5g}{unit}", f"{sigma:.2g}" if np.isfinite(sigma) else "too few blocks",
                f"{abs(mean) * f.systematic:.2g}" if f.systematic else "",
            )
            for label, count, mean, sigma in zip(
                f.means.labels, f.means.voxels, f.means.mean, f.means.sigma, strict=True
            )
        ]  # fmt: skip

    def _save(self, path: str = "") -> None:
        """Write the table; a file dialog asks where unless `path` is given."""
        path = path or QFileDialog.getSaveFileName(self, "Save the table", "regions.csv", "CSV (*.csv)")[0]
        if not path or self.found is None:
            return
        f = self.found
        try:
            with Path(path).open("w", newline="", encoding="utf-8") as file:
                out = csv.writer(file)
                out.writerow(["map", "unit", "region", "voxels", "mean", "sigma", "systematic_relative", "method"])
                for label, count, mean, sigma in zip(
                    f.means.labels, f.means.voxels, f.means.mean, f.means.sigma, strict=True
                ):
                    out.writerow([f.map, f.unit, label, count, mean, sigma, f.systematic, f.means.method])
        except OSError as error:
            self._tell(f"{Path(path).name}: cannot be written ({error.strerror})")
            return
        self._tell(f"Saved to {Path(path).name}.")

    # ---------------------------------------------------------------------------------------------------- behind it

    def _start(self, work: Any, then: Any) -> None:
        self._then = then
        self._tell("Working ...")
        self.jobs.start(work)
        self._update_buttons()

    def _on_ended(self, how: str, value: object) -> None:
        then, self._then = self._then, None
        self._update_buttons()
        if how == "done":
            then(value)
            self._update_buttons()
        else:
            self._tell(str(value) if how == "failed" else "Cancelled.")

    def _tell(self, text: str) -> None:
        self.message.setText(text)

    def closeEvent(self, event: Any) -> None:
        """Stop what is computed and let the viewer go."""
        self.jobs.abandon()
        layers = self.viewer.layers.events
        for emitter in (layers.inserted, layers.removed):
            emitter.disconnect(self._fill_combos)
        super().closeEvent(event)


def _systematic(facts: Mapping[str, Any]) -> float:
    """Relative systematic error of a map, its terms in quadrature; 0 where none is stated."""
    return float(np.sqrt(sum(float(v) ** 2 for v in dict(facts.get("systematic_relative") or {}).values())))
