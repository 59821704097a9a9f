"""The version of this package, as installed."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("napari-xanes-tomo")
except PackageNotFoundError:  # running from a source tree that was never installed
    __version__ = "0.0.0"
