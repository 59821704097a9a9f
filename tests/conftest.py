"""Fixtures for every test: shared data, and two guards against what a test may leave behind."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ["NAPARI_ASYNC"] = "0"  # a layer shows its data when it is added, not some time later
os.environ["XANES_TOMO_COMPILE_AHEAD"] = "0"  # the tests have the cores to themselves

# No deadline: the machine may be shared. On CI the same examples every time.
settings.register_profile("here", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("here")

REPOSITORY = Path(__file__).resolve().parent.parent


def _open_files() -> set[str]:
    """Regular files this process holds open, except those of Python, its packages, the system and caches."""
    own = (sys.prefix, sys.base_prefix, "/usr", "/etc", "/var", "/dev", "/proc", "/sys", str(Path.home() / ".cache"))
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            target = descriptor.readlink()
            if not descriptor.is_file():  # pipes, sockets and devices are no files
                continue
        except OSError:  # the descriptor of this listing itself
            continue
        if not any(target.is_relative_to(folder) for folder in own):
            found.add(f"{target} (descriptor {descriptor.name})")
    return found


@pytest.fixture(autouse=True)
def _no_file_left_open() -> Iterator[None]:
    """Fail a test that leaves a file open (Linux only)."""
    if not sys.platform.startswith("linux"):
        yield
        return
    before = _open_files()
    yield
    left = _open_files() - before
    if left:
        gc.collect()  # a failed test's traceback may keep a cycle alive; what survives this is a leak
        left = _open_files() - before
    assert not left, f"the test left open: {', '.join(sorted(left))}"


def _top_level_widgets() -> list[Any]:
    """Qt's top-level widgets; none when no test has started Qt."""
    if "qtpy.QtWidgets" not in sys.modules:
        return []
    from qtpy.QtCore import QCoreApplication, QEvent
    from qtpy.QtWidgets import QApplication

    if QApplication.instance() is None:
        return []
    QCoreApplication.sendPostedEvents(None, QEvent.Type.DeferredDelete.value)
    QApplication.processEvents()
    return list(QApplication.topLevelWidgets())


@pytest.fixture(autouse=True)
def _no_widget_left_behind() -> Iterator[None]:
    """Fail a test that leaves a top-level Qt widget behind."""
    before = _top_level_widgets()
    known = {id(w) for w in before}  # `before` keeps the ids from being used again
    yield
    if any(id(w) not in known for w in _top_level_widgets()):
        gc.collect()  # the same: only what survives this is a leak
    left = [
        f"{type(w).__module__}.{type(w).__name__}({w.objectName() or w.windowTitle()!r})"
        for w in _top_level_widgets()
        if id(w) not in known
    ]
    assert not left, f"the test left widgets behind: {', '.join(left)}"
    del before


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the tests out of the user's cache folder."""
    before = os.environ.get("XANES_TOMO_CACHE")
    os.environ["XANES_TOMO_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XANES_TOMO_CACHE"]
    else:
        os.environ["XANES_TOMO_CACHE"] = before


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Leave `fsync` out: only a loss of power shows whether it was called, and thousands of calls take minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _descriptor: None)
        yield


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return REPOSITORY


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of measured frames: ``$XANES_TOMO_DATA``, else ``shared/data`` beside the repository."""
    named = os.environ.get("XANES_TOMO_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no measured frames here: set XANES_TOMO_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def tiny_twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the ``tiny`` digital twin: `.xrm` files, their script, the truth. Read only: copy it to change it."""
    from napari_xanes_tomo.phantom import write_twin

    folder = tmp_path_factory.mktemp("twin") / "tiny"
    write_twin(folder, preset="tiny", seed=0)
    return folder


# First the one that counts threads, since others may leave some behind that have not ended yet; then those that take a
# minute or more, the longest first: begun last, one of them would leave a core without work.
FIRST = (
    "parallel", "napari_chain", "execution", "workflow", "registration_bad_input", "scale", "manual", "cli",
    "workflow_bad_input", "common_blur", "napari_docks", "crash", "given",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by `FIRST`."""
    order = {f"test_{name}.py": k for k, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(FIRST)))
