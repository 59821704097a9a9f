"""Full-field XANES tomography: from raw ``.xrm`` files to elemental and edge-energy maps.

The names exported here are the public interface; see ``docs/`` for the conventions.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("napari-xanes-tomo")
except PackageNotFoundError:  # running from a source tree that was never installed
    __version__ = "0.0.0"

__all__ = ["__version__"]
