"""Make the pictures of the documentation: `python docs/make_screenshots.py SCAN [FOLDER]` (with a display or Xvfb).

SCAN is the `demo` twin (`xanes-tomo demo DIR`); the pictures go to FOLDER, `docs/images` unless given.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

WIDTH, HEIGHT = 1500, 960


def spin(until: Callable[[], bool], seconds: float = 300.0) -> None:
    """Let Qt work until something is true."""
    from qtpy.QtWidgets import QApplication

    end = time.monotonic() + seconds
    while not until():
        if time.monotonic() > end:
            raise SystemExit("waited in vain")
        QApplication.processEvents()
        time.sleep(0.01)


def pause(seconds: float = 0.5) -> None:
    """Let Qt draw."""
    end = time.monotonic() + seconds
    spin(lambda: time.monotonic() > end)


def grab(viewer: object, path: Path) -> None:
    """Save the window, with few enough colours to stay small."""
    from PIL import Image

    picture = viewer.screenshot(canvas_only=False, flash=False)  # type: ignore[attr-defined]
    image = Image.fromarray(picture[..., :3])
    image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    sys.stdout.write(f"{path.name} {image.size} {path.stat().st_size / 1000:.0f} kB\n")


def jitter_dock(scan: Path, images: Path) -> None:
    """Use the jitter dock on one energy, with the aligned projections shown."""
    from napari_xanes_tomo._napari.jitter_dock import JitterDock
    from napari_xanes_tomo._napari.view import open_scan

    viewer = open_scan(scan)
    viewer.window._qt_window.resize(WIDTH, HEIGHT)
    dock = viewer.window._qt_window.findChild(JitterDock)
    pause()
    energies = dock.session.scan.series.scans
    dock.session.go_to(len(energies) - 1, 0)
    dock.out_edit.setText("~/xanes-tomo/particle-1")
    pause()
    dock.run_button.click()
    spin(lambda: not dock.session.busy)
    pause()
    dock.aligned_box.setChecked(True)
    dock.session.go_to(len(energies) - 1, 2 * len(energies[-1]) // 3)
    viewer.reset_view()
    viewer.scene.camera.zoom *= 1.15
    pause(1.0)
    grab(viewer, images / "jitter-dock.png")
    viewer.close()
    pause(0.2)


def main() -> None:
    """Make every picture."""
    scan = Path(sys.argv[1]).absolute()
    images = Path(sys.argv[2] if len(sys.argv) > 2 else Path(__file__).parent / "images")
    images.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HOME"] = folder  # no settings, no folder of the one who runs this
        os.environ["NAPARI_CONFIG"] = ""
        jitter_dock(scan, images)


if __name__ == "__main__":
    main()
