"""The report: self-contained, escaped, readable for partial runs."""

from __future__ import annotations

import base64
import re
import shutil
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from napari_xanes_tomo.drawing import png, ticks
from napari_xanes_tomo.io.journal import Journal
from napari_xanes_tomo.io.scan import open_series
from napari_xanes_tomo.io.store import read_energies
from napari_xanes_tomo.model import Problem, XanesTomoError
from napari_xanes_tomo.phantom import TwinParameters, write_twin
from napari_xanes_tomo.report import write_report
from napari_xanes_tomo.state import candidates_in
from napari_xanes_tomo.workflow import Workflow

SMALL = TwinParameters(n=64, n_angles=18, energies_ev=(6534.0, 6558.0, 8178.0, 8344.0, 8351.0, 8570.0))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a run on a twin of six energies; read only."""
    folder = tmp_path_factory.mktemp("report")
    write_twin(folder / "twin", parameters=SMALL)
    with Workflow(open_series(folder / "twin"), folder / "out") as workflow:
        workflow.run()
    return folder / "out"


def test_the_error_of_the_axis_is_that_of_the_whole_solution(finished: Path) -> None:
    found = {c.unit: c.payload["numbers"] for c in candidates_in(Journal(finished).events)}
    for e, row in enumerate(read_energies(finished / "tables" / "energies.csv")):
        assert row.center_sigma_px >= found["jitter", e]["center_sigma"] > 0


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


class Page(HTMLParser):
    """Collects the tags that would load something, and checks that tags are closed."""

    VOID = frozenset({"meta", "br", "image", "path", "circle"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [v or "" for k, v in attrs if k in ("src", "href") and tag != "a"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read_png(data: bytes) -> np.ndarray:
    """Decode what `png` wrote: 8 bit palette, no filter."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, at = {}, 8
    while at < len(data):
        (n,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + n]
        assert struct.unpack(">I", data[at + 8 + n : at + 12 + n])[0] == zlib.crc32(kind + body)
        chunks[kind] = body
        at += 12 + n
    columns, rows, depth, colour, *_ = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (depth, colour) == (8, 3)
    assert len(chunks[b"PLTE"]) == 768
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), dtype=np.uint8).reshape(rows, columns + 1)
    assert not lines[:, 0].any()
    return lines[:, 1:]


def test_png_keeps_order_range_and_missing_values() -> None:
    index = read_png(png([[0.0, 1.0, np.nan], [-5.0, 0.5, 7.0]], 0.0, 1.0))
    np.testing.assert_array_equal(index, [[1, 255, 0], [1, 128, 255]])


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (np.nan, np.nan), (2.0, 1.0)])
def test_png_of_an_empty_range_is_still_a_picture(low: float, high: float) -> None:
    assert read_png(png(np.full((2, 3), 1.5), low, high)).shape == (2, 3)


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(-90, 85) == pytest.approx([-50, 0, 50])
    assert ticks(3.0, 3.0) == [3.0]


def test_report_of_a_finished_run_says_what_a_reader_needs(finished: Path) -> None:
    text = (write_report(finished)).read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert "script" not in page.tags
    assert all(link.startswith("data:image/png;base64,") for link in page.loads)
    assert not re.search(r"url\(|@import|\bsrc=", text)
    for said in ("Handedness not verified", "uncalibrated", "twin_s000", "10.1107/S1600577518013929", "8570.00 (ref)"):
        assert said in page.text
    for name in ("Mn", "Ni", "edge_energy_relative"):
        assert re.search(rf"{name}, slice y = 32 of 64", page.text)
    assert "µm" in page.text
    for row in read_energies(finished / "tables" / "energies.csv"):
        assert f"{row.energy_ev:.2f}" in page.text
        assert f"{row.magnification:.5f}" in page.text
    assert "energy_offset_ev: null" in page.text  # the recipe
    pictures = [read_png(base64.b64decode(link.partition(",")[2])) for link in page.loads]
    assert (6, 18) in {p.shape for p in pictures}  # energies x angles
    assert (64, 64) in {p.shape for p in pictures}


def test_texts_from_files_are_escaped(tmp_path: Path, finished: Path) -> None:
    evil = "<script>alert(1)</script>"
    twin = finished.parent / "twin"
    series = open_series(twin)
    series = type(series)(
        f"scan {evil}",
        series.scans,
        (Problem("error", "x", f"problem {evil}", f"{evil}.xrm", 6534.0),),
        series.n_expected,
    )
    with Workflow(series, tmp_path / "out") as workflow:
        workflow.journal.append(
            "failure", {"step": "flats", "energy": 0, "key": "none", "reason": f"broken {evil} & more"}
        )
    page = Page(write_report(tmp_path / "out").read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert page.text.count(evil) >= 5


@pytest.mark.parametrize("until", ["flats", "jitter", "registration"])
def test_report_of_a_partial_run(finished: Path, tmp_path: Path, until: str) -> None:
    series = open_series(finished.parent / "twin")
    series = type(series)(series.name, series.scans[-2:], series.problems, series.n_expected)
    with Workflow(series, tmp_path / "out") as workflow:
        workflow.run(until=until)
    page = Page(write_report(tmp_path / "out").read_text(encoding="utf-8"))
    assert "Not made yet" in page.text
    assert ("sigma M" in page.text) is True
    assert ("Shift of every projection" in page.text) == (until != "flats")


def test_report_before_anything_was_done(finished: Path, tmp_path: Path) -> None:
    Workflow(open_series(finished.parent / "twin"), tmp_path / "out").close()
    assert "No table of energies yet" in write_report(tmp_path / "out").read_text(encoding="utf-8")


def test_missing_maps_and_damaged_tables(out: Path) -> None:
    shutil.rmtree(out / "maps.ome.zarr")
    assert "no longer here" in write_report(out).read_text(encoding="utf-8")
    (out / "tables" / "shifts.csv").write_text("nonsense\n", encoding="utf-8")
    before = (out / "report.html").read_bytes()
    with pytest.raises(XanesTomoError, match=r"shifts\.csv"):
        write_report(out)
    assert (out / "report.html").read_bytes() == before


def test_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(XanesTomoError, match="expected the output folder of a run"):
        write_report(tmp_path)
    with pytest.raises(XanesTomoError, match="expected the output folder of a run"):
        write_report(tmp_path / "nothing")


def test_the_jitter_section_shows_verdicts_curves_and_views(out: Path) -> None:
    text = write_report(out).read_text(encoding="utf-8")
    section = text[text.index("<h2>Jitter correction</h2>") : text.index("<h2>Shifts</h2>")]
    rows = re.findall(r"<tr>(.*?)</tr>", section)[1:]
    assert len(rows) == len(SMALL.energies_ev)
    for row, energy in zip(rows, SMALL.energies_ev, strict=True):
        assert f"{energy:.2f}" in row
        assert re.search(r'class="(good|check)"', row)
        assert re.search(r"<td>[^<]*\d \(\d", row)  # px (nm)
    assert section.count("<h3>") == 3
    assert section.count("Slice before the correction") == 3
    assert section.count("stroke-dasharray") >= 3  # the limits, beside the curves
    # Views that are missing, damaged or of another result are left out.
    kept = sorted((out / "qc").iterdir())
    assert len(kept) == len(SMALL.energies_ev)
    kept[0].write_bytes(b"PK damaged")
    kept[-1].write_bytes(kept[1].read_bytes())
    again = write_report(out).read_text(encoding="utf-8")
    assert again.count("Slice before the correction") < 3


def test_text_from_the_journal_is_escaped_in_the_jitter_section(out: Path) -> None:
    journal = (out / "journal.jsonl").read_text(encoding="utf-8")
    evil = journal.replace('"method":"', '"method":"<script>x</script>')
    assert evil != journal
    (out / "journal.jsonl").write_text(evil, encoding="utf-8")
    text = write_report(out).read_text(encoding="utf-8")
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
