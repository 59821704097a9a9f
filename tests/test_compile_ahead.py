"""Compiling before it is needed: when it is begun, and that it is not begun twice."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from napari_xanes_tomo import compile_ahead


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """Processes that would have been started; the marks go to a folder of their own."""
    begun = []
    monkeypatch.setenv("XANES_TOMO_CACHE", str(tmp_path))
    monkeypatch.setenv("XANES_TOMO_COMPILE_AHEAD", "1")
    monkeypatch.setattr(compile_ahead, "_begun", [])

    class Begun:
        """A process that goes on until it is told to end."""

        ended = None

        def __init__(self, command, **_):
            begun.append((command, self))

        def poll(self):
            return self.ended

    # In this module alone: others start processes as well.
    monkeypatch.setattr(compile_ahead, "subprocess", SimpleNamespace(Popen=Begun, DEVNULL=subprocess.DEVNULL))
    return begun


def test_it_is_begun_once(commands):
    compile_ahead.begin()
    command, process = commands[0]
    assert command[-3:] == [sys.executable, "-m", "napari_xanes_tomo.compile_ahead"]
    compile_ahead.begin()  # another viewer, while it goes on
    assert len(commands) == 1
    process.ended = 1  # it failed: again
    compile_ahead.begin()
    assert len(commands) == 2
    commands[1][1].ended = 0
    compile_ahead.mark().parent.mkdir(parents=True)
    compile_ahead.mark().touch()
    compile_ahead.begin()
    assert len(commands) == 2


def test_not_where_the_user_does_not_want_it(commands, monkeypatch):
    monkeypatch.setenv("XANES_TOMO_COMPILE_AHEAD", "0")
    assert compile_ahead.begin() is None
    assert not commands


def test_another_cache_of_kernels_is_another_mark(commands, monkeypatch, tmp_path):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    one = compile_ahead.mark()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "other"))
    assert compile_ahead.mark() != one


def test_what_cannot_be_started_is_no_error(commands, monkeypatch):
    def fail(command, **_):
        raise PermissionError("no processes here")

    monkeypatch.setattr(compile_ahead.subprocess, "Popen", fail)
    assert compile_ahead.begin() is None


def test_the_twin_goes_through_the_whole_chain(commands, monkeypatch):
    """With the steps themselves left out: they are compiled and tested elsewhere."""
    from napari_xanes_tomo.workflow import Workflow

    made = []
    monkeypatch.setattr(Workflow, "run", lambda self, **_: made.append(len(self.series.scans)))
    compile_ahead.compile_kernels()
    assert made == [8]
    assert compile_ahead.mark().exists()
