"""Text over the frame: energy, angle, pixel size, file, status; kept right while the sliders move."""

from __future__ import annotations

import weakref
from typing import Any

from .layers import METADATA_KEY, ScanLayer, scan_of

__all__ = ["FrameOverlay", "attach_overlay", "frame_at", "go_to", "shown_scan", "unwrapped"]


def unwrapped(viewer: Any) -> Any:
    """Return the viewer behind the proxy that napari hands to plugins."""
    return getattr(viewer, "__wrapped__", viewer)


def shown_scan(viewer: Any) -> Any | None:
    """Return the scan layer that is selected, else the topmost visible one, else the topmost."""
    active = viewer.layers.selection.active
    if active is not None and scan_of(active) is not None:
        return active
    layers = [layer for layer in reversed(viewer.layers) if scan_of(layer) is not None]
    return next((layer for layer in layers if layer.visible), layers[0] if layers else None)


def frame_at(viewer: Any, layer: Any) -> tuple[int, int]:
    """Return the numbers of the energy and the projection of `layer` that the sliders stand at."""
    point = layer.world_to_data(viewer.dims.point)
    energy, angle = (min(max(round(float(point[i])), 0), layer.data.shape[i] - 1) for i in (0, 1))
    return energy, angle


def go_to(viewer: Any, layer: Any, energy: int, angle: int) -> None:
    """Move the sliders to one frame."""
    first = viewer.dims.ndim - layer.ndim
    world = layer.data_to_world((energy, angle, 0, 0))
    viewer.dims.set_point((first, first + 1), (float(world[0]), float(world[1])))


class FrameOverlay:
    """Writes the text overlay of one viewer; holds no reference that keeps the viewer alive."""

    def __init__(self, viewer: Any) -> None:
        self._viewer = weakref.ref(viewer)
        self._warned = False
        self._text = ""
        viewer.dims.events.current_step.connect(self.update)
        for event in (viewer.layers.events.inserted, viewer.layers.events.removed):
            event.connect(self._layers_changed)
        viewer.layers.selection.events.active.connect(self.update)
        for layer in viewer.layers:
            self._lock(layer)
        self._layers_changed()

    @staticmethod
    def _lock(layer: Any) -> None:
        if scan_of(layer) is not None:
            layer.locked = True  # raw data are not deleted by a slip of the hand

    def _layers_changed(self, event: Any = None) -> None:
        viewer = self._viewer()
        if viewer is None:
            return
        if event is not None and event.type == "inserted":
            self._lock(event.value)
        kinds = {type(layer.metadata[METADATA_KEY]) for layer in viewer.layers if METADATA_KEY in layer.metadata}
        if len(kinds) > 1 and not self._warned:
            from napari.utils.notifications import show_warning

            self._warned = True
            show_warning("Projections and maps do not share axes: open the maps in a viewer of their own.")
        self.update()

    def update(self, event: Any = None) -> None:
        """Write the text for where the sliders stand."""
        viewer = self._viewer()
        if viewer is None:
            return
        overlay = viewer.canvas.overlays.text
        layer = shown_scan(viewer)
        info = None if layer is None else scan_of(layer)
        if not isinstance(info, ScanLayer):
            if overlay.text and overlay.text == self._text:  # ours, and nothing it speaks of is left
                overlay.visible = False
            return
        self._text = overlay.text = info.text(*frame_at(viewer, layer))
        if not overlay.visible:
            overlay.position = "top_left"
            overlay.font_size = 9  # the names of files are long
            overlay.visible = True

    def detach(self) -> None:
        """Stop writing."""
        viewer = self._viewer()
        if viewer is None:
            return
        viewer.dims.events.current_step.disconnect(self.update)
        viewer.layers.events.inserted.disconnect(self._layers_changed)
        viewer.layers.events.removed.disconnect(self._layers_changed)
        viewer.layers.selection.events.active.disconnect(self.update)


_overlays: dict[int, FrameOverlay] = {}


def attach_overlay(viewer: Any) -> FrameOverlay:
    """Give a viewer its overlay (once)."""
    viewer = unwrapped(viewer)
    key = id(viewer)  # a viewer compares by value
    if key not in _overlays:
        _overlays[key] = FrameOverlay(viewer)
        weakref.finalize(viewer, _overlays.pop, key, None)
    return _overlays[key]
