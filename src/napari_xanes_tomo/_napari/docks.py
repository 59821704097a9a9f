"""Which docks there are, and how they come into a viewer."""

from __future__ import annotations

from typing import Any

from .jitter_dock import JitterDock
from .maps_dock import MapsDock
from .registration_dock import RegistrationDock
from .scan_dock import ScanDock
from .workflow_dock import WorkflowDock

__all__ = ["DOCKS", "attach_docks"]

DOCKS = {
    "Workflow": WorkflowDock,
    "Scan and flats": ScanDock,
    "Jitter correction": JitterDock,
    "Energy registration": RegistrationDock,
    "Elemental maps": MapsDock,
}


def attach_docks(viewer: Any) -> dict[str, Any]:
    """Add every dock to a viewer, one behind the other on the right; return them by title."""
    made: dict[str, Any] = {}
    first: Any = None
    for title, kind in DOCKS.items():
        dock = kind(viewer)
        outer = viewer.window.add_dock_widget(dock, name=title, area="right", tabify=bool(made))
        first = first or outer
        made[title] = dock
    first.raise_()
    return made
