"""A large measurement is shown before its headers are read; they follow in the background.

Until then energies and angles are the script's. Nothing is computed from what was not read: opening an output folder
reads the headers first.
"""

from __future__ import annotations

import weakref
from typing import Any

from napari_xanes_tomo.io.given import open_given
from napari_xanes_tomo.io.scan import open_series
from napari_xanes_tomo.io.stack import FrameStack, lazy_frames
from napari_xanes_tomo.model import Problem, Progress
from napari_xanes_tomo.recipe import GivenParameters, ScanParameters

from .jobs import Jobs
from .layers import METADATA_KEY, ScanLayer, geometry, scan_of, shown_frames

__all__ = ["Refinement", "given_with", "opened_with", "refine", "replace_scan"]


def opened_with(info: ScanLayer, parameters: ScanParameters, progress: Progress) -> ScanLayer:
    """Open a scan again, every header read, with these parameters."""
    series = open_series(info.path, parameters, progress=progress)
    return ScanLayer(series, FrameStack(series), info.path, parameters)


def given_with(info: ScanLayer, given: GivenParameters) -> ScanLayer:
    """Open again what was aligned elsewhere, with what is told of it now."""
    series = open_given(info.path, given)
    return ScanLayer(series, FrameStack(series), info.path, given=given)


def replace_scan(layer: Any, info: ScanLayer) -> None:
    """Let a layer show a scan as it was opened again."""
    read, dtype = shown_frames(info.stack)
    layer.data = lazy_frames(read, info.stack.shape, dtype)
    layer.metadata = {**layer.metadata, METADATA_KEY: info}
    place = geometry(info.series)
    layer.scale, layer.translate = place["scale"], place["translate"]


class Refinement:
    """Reads the headers of one layer's scan; its result is dropped when the layer went, or was opened otherwise."""

    def __init__(self, viewer: Any, layer: Any, info: ScanLayer) -> None:
        self._viewer, self._layer, self._info = weakref.ref(viewer), weakref.ref(layer), info
        self.jobs = Jobs()
        self.jobs.ended.connect(self._ended)
        self.jobs.start(lambda progress: opened_with(info, info.parameters, progress))
        viewer.layers.events.removed.connect(self._gone)

    def _gone(self, event: Any = None) -> None:
        viewer, layer = self._viewer(), self._layer()
        if viewer is None or layer is None or not any(x is layer for x in viewer.layers):
            self.jobs.abandon()
            self._close()

    def _close(self) -> None:
        _running.discard(self)
        viewer = self._viewer()
        if viewer is not None:
            viewer.layers.events.removed.disconnect(self._gone)

    def _ended(self, how: str, value: Any) -> None:
        from napari.utils.notifications import show_warning

        self._close()
        layer = self._layer()
        if layer is None or scan_of(layer) is not self._info or how == "cancelled":
            return
        if how == "failed":
            show_warning(f"The headers could not be read: {value}")
            return
        replace_scan(layer, value)
        known = set(map(_said, self._info.series.problems))
        new = [p for p in value.series.problems if p.severity != "info" and _said(p) not in known]
        if new:
            more = "" if len(new) == 1 else f"; {len(new) - 1} more"
            show_warning(f"{new[0].message}{more}. The dock Scan and flats lists all problems.")


def _said(problem: Problem) -> tuple[str, str]:
    return problem.code, problem.message


_running: set[Refinement] = set()


def refine(viewer: Any) -> None:
    """Start reading the headers of every scan of a viewer that was opened without."""
    for layer in viewer.layers:
        info = scan_of(layer)
        if info is not None and not info.verified and not any(r._layer() is layer for r in _running):
            _running.add(Refinement(viewer, layer, info))
