"""Full-field XANES tomography: from raw ``.xrm`` files to elemental and edge-energy maps.

The names exported here are the public interface; they are imported on first use, so that the command line starts
quickly. See ``docs/`` for the conventions.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .images import register_images
    from .io.scan import open_series
    from .io.stack import open_stack
    from .io.store import read_maps
    from .jitter import JitterResult, find_jitter
    from .model import Alignment, ArrayFrames, EnergyScan, FlatSet, Series, XanesTomoError
    from .phantom import write_twin
    from .recipe import Recipe
    from .workflow import Workflow

__all__ = [
    "Alignment",
    "ArrayFrames",
    "EnergyScan",
    "FlatSet",
    "JitterResult",
    "Recipe",
    "Series",
    "Workflow",
    "XanesTomoError",
    "__version__",
    "find_jitter",
    "open_series",
    "open_stack",
    "read_maps",
    "register_images",
    "write_twin",
]

_HOME = {
    "Alignment": "model",
    "ArrayFrames": "model",
    "EnergyScan": "model",
    "FlatSet": "model",
    "Series": "model",
    "XanesTomoError": "model",
    "Recipe": "recipe",
    "register_images": "images",
    "JitterResult": "jitter",
    "find_jitter": "jitter",
    "open_series": "io.scan",
    "open_stack": "io.stack",
    "read_maps": "io.store",
    "write_twin": "phantom",
    "Workflow": "workflow",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
