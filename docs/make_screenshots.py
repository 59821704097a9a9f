"""Make the pictures of the documentation: `python docs/make_screenshots.py SCAN [FOLDER [OUT]]` (a display or Xvfb).

SCAN is the `demo` twin (`xanes-tomo demo DIR`); the pictures go to FOLDER, `docs/images` unless given. OUT is a
finished run of it with the standard recipe; without it the run is made first, which takes some minutes.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 1500, 960
NAME = "particle-1"


def spin(until: Callable[[], bool], seconds: float = 900.0) -> None:
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


def grab(viewer: Any, path: Path) -> None:
    """Save the window, with few enough colours to stay small."""
    from PIL import Image

    picture = viewer.screenshot(canvas_only=False, flash=False)
    image = Image.fromarray(picture[..., :3])
    for colours in (256, 128, 64, 32):
        image.quantize(colours, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size <= 250_000:
            break
    sys.stdout.write(f"{path.name} {image.size} {path.stat().st_size / 1000:.0f} kB\n")


class Scene:
    """One viewer with the docks and a finished run."""

    def __init__(self, scan: Path) -> None:
        from napari_xanes_tomo._napari.docks import DOCKS
        from napari_xanes_tomo._napari.session import session_of
        from napari_xanes_tomo._napari.view import open_scan

        self.viewer = open_scan(scan)
        self.window = self.viewer.window._qt_window
        self.window.resize(WIDTH, HEIGHT)
        self.docks: dict[str, Any] = {title: self.window.findChild(kind) for title, kind in DOCKS.items()}
        self.session = session_of(self.viewer)
        self.docks["Workflow"].out_edit.setText(f"~/xanes-tomo/{NAME}")
        self.click(self.docks["Workflow"].open_button)

    def click(self, button: Any) -> None:
        """Press a button and wait for what it starts."""
        if not button.isEnabled():
            raise SystemExit(f"{button.text()}: {button.toolTip()}")
        button.click()
        spin(lambda: not self.session.busy)
        pause(0.3)

    def show(self, title: str, *, top: str | None = None, zoom: float = 1.15) -> Any:
        """Bring a dock to the front; scroll to its widget `top`."""
        from qtpy.QtCore import Qt
        from qtpy.QtWidgets import QDockWidget, QScrollArea

        dock = self.docks[title]
        for outer in self.window.findChildren(QDockWidget):
            if outer.windowTitle() == title:
                outer.raise_()
                self.window.resizeDocks([outer], [470], Qt.Orientation.Horizontal)
        pause(0.5)
        bar = dock.findChild(QScrollArea).verticalScrollBar()
        if top is not None:
            widget = getattr(dock, top)
            bar.setValue(widget.mapTo(dock.findChild(QScrollArea).widget(), widget.rect().topLeft()).y() - 8)
        else:
            bar.setValue(0)
        self.viewer.reset_view()
        self.viewer.scene.camera.zoom *= zoom
        pause(0.8)
        return dock

    def only(self, *names: str) -> None:
        """Show only these layers."""
        for layer in self.viewer.layers:
            layer.visible = any(layer.name.startswith(n) for n in names)


def take(scan: Path, images: Path) -> None:
    """Go through the docks as a user does."""
    scene = Scene(scan)
    session, viewer = scene.session, scene.viewer
    raw = session.layer.name
    energies = len(session.scan.series.scans)

    session.go_to(energies - 1, 30)
    dock = scene.show("Scan and flats", top="problems_label")
    dock.energies_combo.setCurrentIndex(1)
    if dock.accept_button.isEnabled():  # a run from the command line has accepted what is good
        scene.click(dock.accept_button)
    dock.energies_combo.setCurrentIndex(0)
    scene.click(dock.mask_box)
    scene.show("Scan and flats", top="problems_label")
    grab(viewer, images / "scan-dock.png")
    scene.click(dock.mask_box)

    dock = scene.show("Jitter correction")
    dock.aligned_box.setChecked(True)
    session.go_to(energies - 1, 120)
    scene.only("aligned")
    scene.show("Jitter correction")
    grab(viewer, images / "jitter-dock.png")
    scene.click(dock.residual_button)
    scene.click(dock.sinogram_button)
    scene.only("residual")
    scene.show("Jitter correction", top="aligned_box")
    grab(viewer, images / "jitter-by-hand.png")
    dock.aligned_box.setChecked(False)

    session.go_to(2, 120)
    dock = scene.docks["Energy registration"]
    dock.aligned_box.setChecked(True)
    dock.difference_box.setChecked(True)
    scene.only("aligned")
    scene.show("Energy registration", top="plot")
    grab(viewer, images / "registration-dock.png")
    scene.only("difference")
    scene.show("Energy registration", top="rows")
    grab(viewer, images / "registration-difference.png")
    dock.difference_box.setChecked(False)
    scene.only("aligned")
    dock.blocks_box.setChecked(True)
    scene.show("Energy registration", top="aligned_box")
    grab(viewer, images / "registration-left.png")
    dock.blocks_box.setChecked(False)
    dock.aligned_box.setChecked(False)

    scene.only(raw)
    scene.show("Elemental maps")
    grab(viewer, images / "maps-dock.png")

    session.go_to(4, 70)
    session.decide(lambda w: w.exclude(4, 70, "beam lost"))
    spin(lambda: not session.busy)
    session.decide(lambda w: w.exclude(0, reason="flats of another day"))
    spin(lambda: not session.busy)
    session.go_to(energies - 1, 60)
    dock = scene.docks["Workflow"]
    scene.click(dock.confinement.suggest_button)
    viewer.layers.selection.active = viewer.layers[raw]
    scene.show("Workflow")
    grab(viewer, images / "workflow-dock.png")
    viewer.close()
    pause(0.2)


def take_maps(out: Path, images: Path) -> None:
    """Show the maps in their own viewer."""
    from napari_xanes_tomo._napari.view import open_maps

    viewer = open_maps(out)
    viewer.window._qt_window.resize(WIDTH, HEIGHT)
    pause(1.0)
    viewer.reset_view()
    pause(1.0)
    grab(viewer, images / "maps.png")
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
        out = Path(folder) / "xanes-tomo" / NAME
        if len(sys.argv) > 3:
            shutil.copytree(sys.argv[3], out)
        else:
            from napari_xanes_tomo.io.scan import open_series
            from napari_xanes_tomo.workflow import Workflow

            with Workflow(open_series(scan), out, source=scan) as workflow:
                workflow.run()
        take_maps(out, images)
        take(scan, images)


if __name__ == "__main__":
    main()
