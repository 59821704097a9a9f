"""A large measurement is shown first, its headers read behind it."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("napari")

from napari.utils.notifications import notification_manager

from napari_xanes_tomo._napari import reader, refine
from napari_xanes_tomo._napari.docks import attach_docks
from napari_xanes_tomo._napari.layers import scan_of
from napari_xanes_tomo._napari.session import session_of

WAIT = 60_000


@pytest.fixture
def twin(tiny_twin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A twin that counts as large, with a cut file, and a cache of its own."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XANES_TOMO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(reader, "MANY", 100)
    folder = Path(shutil.copytree(tiny_twin, tmp_path / "twin"))
    cut = sorted(folder.glob("rep01_*_06534.00_eV*.xrm"))[3]
    cut.write_bytes(cut.read_bytes()[:3000])
    for path in folder.glob("*.xrm"):
        os.utime(path, (1.6e9, 1.6e9))
    return folder


def opened(make_napari_viewer: Callable[..., Any], folder: Path) -> Any:
    viewer = make_napari_viewer()
    viewer.open(str(folder), plugin="napari-xanes-tomo")
    return viewer


def test_headers_follow_and_problems_are_told(make_napari_viewer: Any, twin: Path, qtbot: Any) -> None:
    viewer = opened(make_napari_viewer, twin)
    (layer,) = viewer.layers
    first = scan_of(layer)
    assert not first.verified
    assert first.series.scans[0].status[3] == "ok", "nothing was read yet"
    frame = np.asarray(layer.data[2, 7])
    notification_manager.records.clear()
    qtbot.waitUntil(lambda: scan_of(layer).verified, timeout=WAIT)
    assert scan_of(layer).series.scans[0].status[3] == "unreadable:truncated"
    np.testing.assert_array_equal(np.asarray(layer.data[2, 7]), frame)
    (note,) = notification_manager.records
    assert "Scan and flats lists all problems" in note.message
    assert not refine._running

    viewer.layers.clear()
    viewer.open(str(twin), plugin="napari-xanes-tomo")
    assert scan_of(viewer.layers[0]).verified, "the headers are remembered"


def test_a_run_never_begins_with_headers_unread(
    make_napari_viewer: Any, twin: Path, tmp_path: Path, qtbot: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_attach_later", lambda: None)  # nothing reads the headers behind it
    viewer = opened(make_napari_viewer, twin)
    docks = attach_docks(viewer)
    session = session_of(viewer)
    assert not session.scan.verified
    dock = next(iter(docks.values()))
    dock.out_edit.setText(str(tmp_path / "out"))
    dock.open_button.click()
    qtbot.waitUntil(lambda: not session.busy and session.workflow is not None, timeout=WAIT)
    assert session.scan.verified
    assert session.workflow.series is session.scan.series
    assert session.workflow.series.scans[0].status[3] == "unreadable:truncated"


def test_docks_follow_and_a_layer_that_is_removed_stops_it(make_napari_viewer: Any, twin: Path, qtbot: Any) -> None:
    viewer = opened(make_napari_viewer, twin)
    session = session_of(viewer)
    with qtbot.waitSignal(session.scan_changed, timeout=WAIT):
        pass
    assert session.scan.verified
    session.close()

    shutil.rmtree(os.environ["XANES_TOMO_CACHE"])
    viewer.layers.clear()
    viewer.open(str(twin), plugin="napari-xanes-tomo")
    qtbot.waitUntil(lambda: bool(refine._running), timeout=WAIT)
    through = threading.Event()
    next(iter(refine._running)).jobs._running.afterwards(through.set)
    viewer.layers.clear()
    assert not refine._running
    qtbot.waitUntil(through.is_set, timeout=WAIT)  # the file that was being read is closed
