"""Which docks there are, and how they come into a viewer."""

from __future__ import annotations

from typing import Any

from .jitter_dock import JitterDock

__all__ = ["DOCKS", "attach_docks"]

DOCKS = {"Jitter correction": JitterDock}


def attach_docks(viewer: Any) -> dict[str, Any]:
    """Add every dock to a viewer, one behind the other on the right; return them by title."""
    made: dict[str, Any] = {}
    for title, kind in DOCKS.items():
        dock = kind(viewer)
        viewer.window.add_dock_widget(dock, name=title, area="right", tabify=bool(made))
        made[title] = dock
    return made
