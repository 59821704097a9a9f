"""Headers kept from one opening to the next: never wrong, never in the way."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from napari_xanes_tomo.io import planned
from napari_xanes_tomo.io.header_cache import cache_folder, load_headers
from napari_xanes_tomo.io.scan import open_series
from napari_xanes_tomo.io.xrm import read_header
from napari_xanes_tomo.model import Series


@pytest.fixture
def twin(tiny_twin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A twin of its own with a cache of its own; the files are not of this minute."""
    monkeypatch.setenv("XANES_TOMO_CACHE", str(tmp_path / "cache"))
    folder = Path(shutil.copytree(tiny_twin, tmp_path / "twin"))
    for path in folder.glob("*.xrm"):
        os.utime(path, (1.6e9, 1.6e9))
    return folder


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose headers are read."""
    seen: list[str] = []

    def counted(path: str) -> object:
        seen.append(Path(path).name)
        return read_header(path)

    monkeypatch.setattr(planned, "read_header", counted)
    return seen


def kept(folder: Path) -> Path:
    (found,) = (cache_folder() / "headers").glob("*.json")
    return found


def same(one: Series, two: Series) -> None:
    assert one.problems == two.problems
    for a, b in zip(one.scans, two.scans, strict=True):
        np.testing.assert_array_equal(a.theta_deg, b.theta_deg)
        np.testing.assert_array_equal(a.time_s, b.time_s)
        np.testing.assert_array_equal(a.exposure_s, b.exposure_s)
        assert a.status == b.status
        assert a.names == b.names


def test_the_second_time_nothing_is_read_and_all_is_the_same(twin: Path, reads: list[str]) -> None:
    first = open_series(twin)
    files = len(list(twin.glob("*.xrm")))
    assert len(reads) == files
    before = sorted(p.name for p in twin.iterdir())
    reads.clear()
    second = open_series(twin)
    assert reads == []
    same(first, second)
    assert sorted(p.name for p in twin.iterdir()) == before, "nothing is written beside raw data"
    path = str(next(twin.glob("rep01_*_06558.00_eV*.xrm")))
    assert repr(load_headers(twin, {Path(path).name: path})[path]) == repr(read_header(path))


def test_a_changed_file_is_read_again_and_a_damaged_one_found(twin: Path, reads: list[str]) -> None:
    open_series(twin)
    changed, cut, gone = sorted(twin.glob("rep01_*_06534.00_eV*.xrm"))[:3]
    os.utime(changed, (1.7e9, 1.7e9))
    cut.write_bytes(cut.read_bytes()[:3000])
    gone.unlink()
    reads.clear()
    series = open_series(twin)
    assert sorted(reads) == sorted([changed.name, cut.name])
    status = dict(zip(series.scans[0].names, series.scans[0].status, strict=True))
    assert status[changed.name] == "ok"
    assert status[cut.name] == "unreadable:truncated"
    assert status[gone.name] == "unreadable:missing"


def test_a_file_changed_a_moment_ago_is_not_remembered(twin: Path, reads: list[str]) -> None:
    fresh = next(twin.glob("rep01_*_06558.00_eV*.xrm"))
    fresh.touch()
    open_series(twin)
    reads.clear()
    open_series(twin)
    assert reads == [fresh.name]


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[: len(raw) // 2],
        lambda raw: b"[]",
        lambda raw: b"\xff\xfe\x00",
        lambda raw: b"[" * 100_000,
        lambda raw: raw.replace(b'"format": 1', b'"format": 2'),
        lambda raw: raw.replace(b"<u2", b"|O8"),
        lambda raw: json.dumps({**json.loads(raw), "shared": [[1]]}).encode(),
        lambda raw: json.dumps({**json.loads(raw), "files": {k: [1] for k in json.loads(raw)["files"]}}).encode(),
    ],
)
def test_a_damaged_cache_is_none_and_is_written_anew(twin: Path, reads: list[str], damage: object) -> None:
    first = open_series(twin)
    place = kept(twin)
    whole = place.read_bytes()
    place.write_bytes(damage(whole))  # type: ignore[operator]
    reads.clear()
    same(first, open_series(twin))
    assert len(reads) == len(list(twin.glob("*.xrm")))
    assert place.read_bytes() == whole


def test_without_a_place_to_write_it_opens_all_the_same(
    twin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XANES_TOMO_CACHE", str(tmp_path / "file" / "cache"))
    assert len(open_series(twin).scans) == 8


def test_folders_that_were_not_opened_lately_are_forgotten(twin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    headers = cache_folder() / "headers"
    headers.mkdir(parents=True)
    for i in range(60):
        (headers / f"{i:032x}.json").write_text("{}")
        os.utime(headers / f"{i:032x}.json", (1e9 + i, 1e9 + i))
    open_series(twin)
    left = {p.name for p in headers.glob("*.json")}
    assert len(left) == 40
    assert f"{59:032x}.json" in left
    assert f"{0:032x}.json" not in left
