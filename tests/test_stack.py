"""All projections as one lazy array."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from napari_xanes_tomo import open_series, open_stack
from napari_xanes_tomo.model import XanesTomoError


def test_a_chunk_is_a_frame_and_the_whole_is_the_measurement(tiny_twin: Path) -> None:
    series = open_series(tiny_twin)
    stack = open_stack(series)
    assert stack.shape == (8, 36, 64, 64)
    assert stack.chunksize == (1, 1, 64, 64)
    for e, a in ((0, 0), (3, 17), (7, 35)):
        np.testing.assert_array_equal(np.asarray(stack[e, a]), series.scans[e].frames.read(a))
    rows = np.asarray(stack[2, :, 20:24])
    np.testing.assert_array_equal(rows, series.scans[2].frames.read_rows(range(36), 20, 24))


def test_it_travels_to_a_worker(tiny_twin: Path) -> None:
    stack = open_stack(open_series(tiny_twin), bin=2)
    there = pickle.loads(pickle.dumps(stack))
    np.testing.assert_array_equal(np.asarray(there[1, 5]), np.asarray(stack[1, 5]))


@pytest.mark.parametrize("bin", [2, 4, 5])
def test_binned_frames_are_means_of_blocks(tiny_twin: Path, bin: int) -> None:
    series = open_series(tiny_twin)
    n = 64 // bin
    frame = np.asarray(series.scans[4].frames.read(9), dtype=float)[: n * bin, : n * bin]
    expected = frame.reshape(n, bin, n, bin).mean(axis=(1, 3))
    found = open_stack(series, bin=bin)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.asarray(found[4, 9]), expected, rtol=1e-6)


def test_missing_frames_are_zero_and_said(tiny_twin: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_twin, tmp_path / "twin"))
    sorted(folder.glob("rep01_*_06534.00_eV*.xrm"))[3].unlink()
    series = open_series(folder)
    stack = open_stack(series)
    assert series.scans[0].status[3] != "ok"
    assert not np.asarray(stack[0, 3]).any()
    assert np.asarray(stack[0, 4]).any()


@pytest.mark.parametrize("bin", [0, -2, 65])
def test_a_bin_that_leaves_nothing_is_refused(tiny_twin: Path, bin: int) -> None:
    with pytest.raises(XanesTomoError, match="expected a whole number from 1 to 64"):
        open_stack(open_series(tiny_twin), bin=bin)
