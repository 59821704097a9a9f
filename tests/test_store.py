"""The output folder: what is written reads back, and no interruption loses or bends it.

Tolerance everywhere: none. Tables, arrays and maps read back to the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from napari_xanes_tomo.io import lock as lock_module
from napari_xanes_tomo.io import store
from napari_xanes_tomo.model import Alignment, EnergyScan, Series, XanesTomoError

ONE_FOLDER = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
RECIPE = "version: 1\n"
finite = st.floats(allow_nan=False, allow_infinity=False)
cells = finite | st.just(math.nan)
words = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=20)


def same(a: object, b: object) -> bool:
    """Equal, NaN equal to NaN."""
    return all(
        x == y or (isinstance(x, float) and isinstance(y, float) and math.isnan(x) and math.isnan(y))
        for x, y in zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True)  # type: ignore[call-overload]
    )


def one_line(error: pytest.ExceptionInfo[XanesTomoError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


class NoFrames:
    frame_shape = (4, 4)
    dtype = np.dtype(np.uint16)

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def read(self, index: int) -> np.ndarray:
        raise AssertionError

    def read_rows(self, indices: object, y0: int, y1: int) -> np.ndarray:
        raise AssertionError

    def fingerprint(self) -> str:
        return ""


def scan(energy_ev: float, status: tuple[str, ...]) -> EnergyScan:
    n = len(status)
    return EnergyScan(
        energy_ev, np.linspace(-90, 89, n), NoFrames(n), np.ones(n), status, (), np.zeros(n, int), 1, 34.0, np.ones(n)
    )


# ---- tables -------------------------------------------------------------------------------------------------------


@ONE_FOLDER
@given(
    st.lists(
        st.builds(
            store.ShiftRow, finite, finite, st.integers(0, 10**6), cells, cells, cells, cells, cells, cells, words
        ),
        max_size=5,
    )
)
def test_shifts_read_back_to_the_same_bits(tmp_path: Path, rows: list[store.ShiftRow]) -> None:
    path = tmp_path / "shifts.csv"
    store.write_shifts(path, rows)
    back = store.read_shifts(path)
    assert len(back) == len(rows)
    assert all(same(a, b) for a, b in zip(rows, back, strict=True))


@ONE_FOLDER
@given(st.lists(st.builds(store.EnergyRow, finite, *[cells] * 9, st.booleans(), words), max_size=5))
def test_energies_read_back_to_the_same_bits(tmp_path: Path, rows: list[store.EnergyRow]) -> None:
    path = tmp_path / "energies.csv"
    store.write_energies(path, rows)
    assert all(same(a, b) for a, b in zip(rows, store.read_energies(path), strict=True))


def test_the_columns_are_those_of_the_contract(tmp_path: Path) -> None:
    store.write_shifts(tmp_path / "s.csv", [store.ShiftRow(8333.0, -90.0, 0, 0.1, status="unreadable:missing")])
    store.write_energies(tmp_path / "e.csv", [store.EnergyRow(8333.0, 1.0, reference=True)])
    assert (tmp_path / "s.csv").read_bytes() == (
        b"energy_ev,theta_deg,frame,shift_y_px,shift_x_px,sigma_y_px,sigma_x_px,magnification,roll_deg,status\n"
        b"8333.0,-90.0,0,0.1,,,,,,unreadable:missing\n"
    )
    assert (tmp_path / "e.csv").read_bytes() == (
        b"energy_ev,magnification,magnification_sigma,roll_deg,center_px,center_sigma_px,sigma_ty_px,sigma_tx_px,"
        b"sigma_tz_px,pixel_size_nm,reference,status\n8333.0,1.0,,,,,,,,,1,ok\n"
    )


def test_quality_reads_back_with_its_named_columns(tmp_path: Path) -> None:
    scores = {"residual_px": np.array([0.1, np.nan]), "frc": np.array([np.float32(0.7), 1.0], dtype=np.float32)}
    table = store.QualityTable(
        np.array([8333.0, 8333.0]), np.array([0.0, 1.0]), np.array([0, 1]), scores, ("ok", "a,b")
    )
    path = tmp_path / "tables" / "quality.csv"
    store.write_quality(path, table)
    assert path.read_text().splitlines()[0] == "energy_ev,theta_deg,frame,residual_px,frc,verdict"
    back = store.read_quality(path)
    assert back.verdict == table.verdict
    assert list(back.scores) == list(scores)
    for name, column in scores.items():
        np.testing.assert_array_equal(back.scores[name], column)
    np.testing.assert_array_equal(back.frame, table.frame)
    with pytest.raises(ValueError, match="frc"):
        store.write_quality(path, dataclasses.replace(table, scores={"frc": np.ones(3)}))


def test_every_planned_projection_has_a_row_and_no_value_is_invented() -> None:
    series = Series("s", (scan(8333.0, ("ok", "unreadable:missing", "excluded:user", "ok")), scan(8400.0, ("ok",))))
    shift = np.arange(8.0).reshape(4, 2)
    alignment = Alignment(shift, shift / 10, 0.97, 0.1, ("ok", "ok", "ok", "excluded:outlier"))
    rows = store.shifts_rows(series, [alignment, None])
    assert [r.status for r in rows] == [
        "ok", "unreadable:missing", "excluded:user", "excluded:outlier", "excluded:not aligned",
    ]  # fmt: skip
    assert [r.frame for r in rows] == [0, 1, 2, 3, 0]
    assert math.isnan(rows[1].shift_y_px)
    assert math.isnan(rows[1].sigma_x_px)
    assert (rows[2].shift_y_px, rows[2].shift_x_px, rows[2].sigma_x_px) == (4.0, 5.0, 0.5)
    assert math.isnan(rows[4].magnification)
    with pytest.raises(ValueError, match="alignments"):
        store.shifts_rows(series, [alignment])


def test_alignments_come_back_from_the_rows_also_where_an_energy_recurs() -> None:
    series = Series("s", tuple(scan(e, ("ok",) * 3) for e in (8333.0, 8333.0, 8400.0)))
    rng = np.random.default_rng(0)
    given_ = [Alignment(rng.normal(size=(3, 2)), rng.random((3, 2)), 1 + k / 100, k) for k in range(3)]
    back = store.rows_alignments(store.shifts_rows(series, given_))
    assert [energy for energy, _, _ in back] == [8333.0, 8333.0, 8400.0]
    for a, (_, theta, b) in zip(given_, back, strict=True):
        np.testing.assert_array_equal(theta, series.scans[0].theta_deg)
        np.testing.assert_array_equal(a.shift, b.shift)
        np.testing.assert_array_equal(a.sigma, b.sigma)
        assert (a.magnification, a.roll_deg, a.status) == (b.magnification, b.roll_deg, b.status)


@pytest.mark.parametrize("change", [{"theta_deg": math.nan}, {"status": ""}, {"energy_ev": math.inf}])
def test_the_keys_are_always_filled(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        store.write_shifts(tmp_path / "s.csv", [dataclasses.replace(store.ShiftRow(1.0, 2.0, 0), **change)])
    assert not (tmp_path / "s.csv").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a header"),
        ("a,b\n", "expected a header"),
        ("{h}\n8333.0,0.0,0\n", "line 2: expected 10 cells, got 3"),
        ("{h}\n8333.0,0.0,zero,,,,,,,ok\n", "line 2: frame: expected a whole number, got 'zero'"),
        ("{h}\n8333.0,,0,,,,,,,ok\n", "line 2: theta_deg: expected a number"),
        ('{h}\n"8333.0,0.0\n', "CSV"),
        ("\0\n", ""),
    ],
)
def test_a_damaged_table_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "shifts.csv"
    path.write_text(text.replace("{h}", ",".join(f.name for f in dataclasses.fields(store.ShiftRow))))
    with pytest.raises(XanesTomoError) as error:
        store.read_shifts(path)
    assert message in one_line(error)
    with pytest.raises(XanesTomoError, match="cannot be read"):
        store.read_energies(tmp_path / "none.csv")


def test_a_table_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "shifts.csv"
    store.write_shifts(path, [store.ShiftRow(1.0, 2.0, 0)])
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(XanesTomoError, match="disk is full") as error:
            store.write_shifts(path, [])
    one_line(error)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["shifts.csv"]


# ---- journal ------------------------------------------------------------------------------------------------------

json_data = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | finite | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@ONE_FOLDER
@given(
    st.lists(st.tuples(st.text(max_size=8), st.dictionaries(st.text(max_size=5), json_data, max_size=3)), max_size=4)
)
def test_events_read_back_as_appended(tmp_path: Path, events: list[tuple[str, dict[str, object]]]) -> None:
    (tmp_path / "journal.jsonl").unlink(missing_ok=True)
    journal = store.Journal(tmp_path)
    for kind, payload in events:
        journal.append(kind, payload)
    back = store.Journal(tmp_path)
    assert back.events == journal.events
    assert [(e.seq, e.kind, e.payload) for e in back.events] == [(i, k, p) for i, (k, p) in enumerate(events, 1)]
    lines = (tmp_path / "journal.jsonl").read_bytes().splitlines() if events else []
    assert [json.loads(line)["version"] for line in lines] == [1] * len(events)


def test_what_json_has_no_word_for(tmp_path: Path) -> None:
    journal = store.Journal(tmp_path)
    event = journal.append(
        "x", {"a": np.float64("nan"), "b": (np.int32(3), -math.inf), "c": np.bool_(True), "d": "é\ud800"}
    )
    assert event.payload == {"a": None, "b": [3, None], "c": True, "d": "é\ud800"}
    assert store.Journal(tmp_path).events == (event,)
    for wrong in ({"a": np.zeros(2)}, {"a": {1: 2}}, {"a": object()}):
        with pytest.raises(TypeError, match=r"payload\.a"):
            journal.append("x", wrong)
    assert len(store.Journal(tmp_path)) == 1


def test_a_last_line_cut_at_any_byte(tmp_path: Path) -> None:
    journal = store.Journal(tmp_path)
    for i in range(3):
        journal.append("step", {"i": i, "text": "µ"})
    whole = journal.path.read_bytes()
    start = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(start, len(whole)):
        journal.path.write_bytes(whole[:cut])
        opened = store.Journal(tmp_path)
        kept = 3 if cut == len(whole) - 1 else 2  # only the line's end is missing: the event is there
        assert len(opened) == kept
        assert opened.torn == (whole[start:cut] if kept == 2 else b"")
        assert journal.path.read_bytes() == whole[:cut]  # opening writes nothing
        for i in range(2):
            opened.append("later", {"i": i})
        data = journal.path.read_bytes()
        assert data.startswith(whole[:cut])  # nothing lost
        again = store.Journal(tmp_path)
        assert again.events == opened.events
        assert again.torn == b""
        assert [e.seq for e in again.events] == list(range(1, kept + 3))


def test_cut_again_while_going_on_after_a_cut(tmp_path: Path) -> None:
    journal = store.Journal(tmp_path)
    journal.append("a")
    journal.append("b")
    first = journal.path.read_bytes()[:-20]
    journal.path.write_bytes(first)
    store.Journal(tmp_path).append("c", {"long": "x" * 30})
    second = journal.path.read_bytes()
    for cut in range(len(first), len(second)):
        journal.path.write_bytes(second[:cut])
        opened = store.Journal(tmp_path)
        opened.append("d")
        again = store.Journal(tmp_path)
        assert again.events == opened.events
        assert [e.kind for e in again.events] == (["a", "c", "d"] if cut == len(second) - 1 else ["a", "d"])


def hand_edit(path: Path, number: int, line: bytes | None) -> None:
    lines = path.read_bytes().split(b"\n")
    lines[number - 1 : number] = [] if line is None else [line]
    path.write_bytes(b"\n".join(lines))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{'seq': 2}", "line 2: expected one event"),
        (b"[1, 2]", "line 2: expected one event"),
        (b'{"seq":2,"time":"","kind":"a","version":1}', "line 2: expected one event"),
        (b"\xff\xfe", "line 2: expected one event"),
        (b'{"seq":7,"time":"","kind":"a","version":1,"payload":{}}', "line 2: expected event 2, got 7"),
        (None, "line 2: expected event 2, got 3"),
        (b'{"seq":2,"kind":"of the future","version":2}', "line 2: written by a newer version"),
    ],
)
def test_a_journal_edited_by_hand_is_refused(tmp_path: Path, line: bytes | None, message: str) -> None:
    journal = store.Journal(tmp_path)
    for i in range(4):
        journal.append("step", {"i": i})
    hand_edit(journal.path, 2, line)
    before = journal.path.read_bytes()
    with pytest.raises(XanesTomoError) as error:
        store.Journal(tmp_path)
    assert message in one_line(error)
    assert journal.path.read_bytes() == before


def test_a_newer_version_is_told_from_damage_also_in_the_last_line(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text('{"seq":1,"version":2}\n')
    with pytest.raises(XanesTomoError, match="newer version"):
        store.Journal(tmp_path)


def test_a_journal_changed_by_another_program_is_not_written(tmp_path: Path) -> None:
    one, two = store.Journal(tmp_path), store.Journal(tmp_path)
    one.append("a")
    with pytest.raises(XanesTomoError, match="another program"):
        two.append("b")
    assert store.Journal(tmp_path).events == one.events


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = store.Journal(tmp_path)
    journal.append("a")
    before = journal.path.read_bytes()
    true_write = os.write

    def half(descriptor: int, data: memoryview) -> int:
        if len(data) < 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        return true_write(descriptor, bytes(data[: len(data) // 2]))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        with pytest.raises(XanesTomoError, match="disk is full"):
            journal.append("b", {"long": "x" * 100})
    assert journal.path.read_bytes() == before
    journal.append("c")
    assert [e.kind for e in store.Journal(tmp_path).events] == ["a", "c"]


def test_5000_events_load_in_time(tmp_path: Path) -> None:
    record = {
        "kind": "candidate", "version": 1, "time": "2026-01-01T00:00:00+00:00",
        "payload": {"step": "jitter", "scores": {f"s{i}": i / 7 for i in range(10)}, "array": "0" * 64},
    }  # fmt: skip
    lines = [json.dumps({"seq": i, **record}) for i in range(1, 5001)]
    (tmp_path / "journal.jsonl").write_text("\n".join(lines) + "\n")
    best = math.inf
    for _ in range(3):
        start = time.process_time()
        assert len(store.Journal(tmp_path)) == 5000
        best = min(best, time.process_time() - start)
    assert best < 0.3


@pytest.mark.parametrize("dtype", ["f4", "f8", ">f8", "i8", "u2", "?"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 4)])
def test_arrays_read_back_under_their_hash(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    journal = store.Journal(tmp_path)
    a = (np.random.default_rng(1).random(shape) * 9).astype(dtype)
    reference = journal.put_array(a)
    assert journal.put_array(np.array(a, order="F")) == reference
    back = store.Journal(tmp_path).get_array(json.loads(json.dumps(reference)))
    np.testing.assert_array_equal(back, a, strict=dtype != ">f8")
    assert (list(back.shape), back.dtype.name) == (reference["shape"], reference["dtype"])
    (path,) = (tmp_path / "arrays").iterdir()
    assert path.name == f"{hashlib.sha256(path.read_bytes()).hexdigest()}.npy"


def test_a_damaged_or_missing_array_is_named(tmp_path: Path) -> None:
    journal = store.Journal(tmp_path)
    reference = journal.put_array(np.arange(5.0))
    path = tmp_path / "arrays" / f"{reference['array']}.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(XanesTomoError, match="damaged") as error:
        journal.get_array(reference)
    one_line(error)
    journal.put_array(np.arange(5.0))  # heals it
    np.testing.assert_array_equal(journal.get_array(reference["array"]), np.arange(5.0))
    path.unlink()
    with pytest.raises(XanesTomoError, match="cannot be read"):
        journal.get_array(reference)
    for wrong in ("../../secret", {}, {"array": 3}):
        with pytest.raises(XanesTomoError, match="reference"):
            journal.get_array(wrong)
    for refused in (np.array([object()]), np.array(["a"]), np.zeros(2, complex), np.zeros(2, "M8[s]")):
        with pytest.raises(TypeError, match="floats of at most 8 bytes"):
            journal.put_array(refused)


KILLED_WHILE_APPENDING = """
import sys
import numpy as np
from napari_xanes_tomo.io.store import Journal
journal = Journal(sys.argv[1])
for i in range(len(journal), 10**6):
    event = journal.append("step", {"i": i, "array": journal.put_array(np.arange(i, i + 100.0)), "pad": "x" * 5000})
    print(event.seq, flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is a POSIX word")
def test_kill_9_while_appending_loses_nothing_that_was_reported(tmp_path: Path) -> None:
    reported = 0
    for delay in (0.0, 0.03):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED_WHILE_APPENDING, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        with child:
            assert child.stdout is not None
            reported = int(child.stdout.readline())
            time.sleep(delay)
            child.send_signal(signal.SIGKILL)
            for line in child.stdout.read().splitlines(keepends=True):
                reported = int(line) if line.endswith("\n") else reported
        journal = store.Journal(tmp_path)
        assert reported <= len(journal) <= reported + 1
        assert [e.payload["i"] for e in journal.events] == list(range(len(journal)))
        assert journal.get_array(journal.events[-1].payload["array"])[0] == len(journal) - 1


# ---- lock ---------------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_and_a_closed_folder_is_free(tmp_path: Path) -> None:
    with store.OutputLock(tmp_path) as held:
        with pytest.raises(XanesTomoError, match=f"process {os.getpid()} on ") as error:
            store.OutputLock(tmp_path).acquire()
        one_line(error)
        held.acquire()  # once more is no harm
        assert held.held
    assert not held.held
    assert list(tmp_path.iterdir()) == []
    with store.OutputLock(tmp_path) as again:
        assert again.message == ""


HOLDER = """
import os, sys, time
from napari_xanes_tomo.io.lock import OutputLock
lock = OutputLock(sys.argv[1])
lock.acquire()
if os.fork() == 0:  # a worker that outlives it must not keep the folder locked
    time.sleep(3)
    os._exit(0)
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is a POSIX word")
def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        with pytest.raises(XanesTomoError, match=f"process {child.pid} "):
            store.OutputLock(tmp_path).acquire()
        child.kill()
    caplog.set_level("INFO")
    with store.OutputLock(tmp_path) as lock:
        assert f"took over from process {child.pid}" in lock.message
        assert lock.message in caplog.text


def ended_pid() -> int:
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as child:
        pass
    return child.pid


@pytest.mark.parametrize(
    ("holder", "refused"),
    [
        ({}, "process {me} on"),
        ({"ticks": "1"}, ""),  # the number was given to another process since
        ({"pid": -1}, ""),
        ({"host": "elsewhere"}, "remove the file .lock"),
    ],
)
def test_without_file_locks_the_process_number_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder: dict[str, object], refused: str
) -> None:
    monkeypatch.setattr(lock_module, "_system_lock", lambda _: None)
    content = {**lock_module._self(), **holder}
    if content["pid"] == -1:
        content |= {"pid": ended_pid(), "ticks": ""}
    (tmp_path / ".lock").write_text(json.dumps(content))
    lock = store.OutputLock(tmp_path)
    if refused:
        with pytest.raises(XanesTomoError, match=refused.format(me=os.getpid())):
            lock.acquire()
        assert json.loads((tmp_path / ".lock").read_text()) == content
    else:
        with lock:
            assert "took over" in lock.message
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


# ---- output folder ------------------------------------------------------------------------------------------------


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_new_folder_then_the_same_run_again(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    with store.open_output(out, RECIPE, "f1", input_name="scan 1") as output:
        assert not output.resumed
        assert output.recipe.read_text() == RECIPE
        store.write_shifts(output.shifts, [])
    (out / "tables" / ".shifts.csv.1-1.tmp").write_text("left by a killed run")
    with store.open_output(out, "jitter: {iterations: 6}\nversion: 1\n", "f1") as output:  # the same parameters
        assert output.resumed
        assert [e.kind for e in output.journal.events] == ["run"]
        assert output.recipe.read_text() == RECIPE
    assert sorted(content(out)) == ["journal.jsonl", "recipe.yaml", "tables/shifts.csv"]
    with store.open_output(out, None, None) as output:
        output.change_recipe("jitter: {iterations: 3}\n")
    with store.open_output(out, "jitter: {iterations: 3}\n", "f1") as output:
        assert output.resumed
        assert output.messages == ()


def other_run(out: Path) -> None:
    store.open_output(out, RECIPE, "f1", input_name="scan 1").close()


def edited_recipe(out: Path) -> None:
    other_run(out)
    (out / "recipe.yaml").write_text("jitter: {iterations: 2}\n")


def notes(out: Path) -> None:
    out.mkdir()
    (out / "notes.txt").write_text("mine")


def recipe_only(out: Path) -> None:
    out.mkdir()
    (out / "recipe.yaml").write_text(RECIPE)


def foreign_journal(out: Path) -> None:
    out.mkdir()
    (out / "journal.jsonl").write_text("dear diary")


def other_events(out: Path) -> None:
    store.Journal(out).append("hello")


def a_file(out: Path) -> None:
    out.write_text("x")


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (other_run, (RECIPE, "f2", "scan 2"), "holds a run of scan 1, not of scan 2"),
        (other_run, (RECIPE, "f2", "scan 1"), "the files of scan 1 have changed"),
        (other_run, ("jitter: {iterations: 3}\n", "f1", "scan 1"), "another recipe"),
        (edited_recipe, (RECIPE, "f1", "scan 1"), "changed by hand"),
        (notes, (RECIPE, "f1", ""), "found notes.txt"),
        (recipe_only, (RECIPE, "f1", ""), "found recipe.yaml"),
        (foreign_journal, (RECIPE, "f1", ""), "found journal.jsonl"),
        (other_events, (RECIPE, "f1", ""), "found journal.jsonl"),
        (a_file, (RECIPE, "f1", ""), "found a file"),
        (lambda _: None, (None, "f1", ""), "expected a run to go on with"),
    ],
)
def test_a_folder_that_is_not_ours_stays_as_it_is(tmp_path: Path, prepare, arguments, message: str) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    prepare(out)
    before = content(tmp_path)
    recipe, fingerprint, name = arguments
    with pytest.raises(XanesTomoError) as error:
        store.open_output(out, recipe, fingerprint, input_name=name)
    assert message in one_line(error)
    assert content(tmp_path) == before


@pytest.mark.parametrize("size", [0, 1, 30, 100])
def test_killed_while_the_first_event_was_written(tmp_path: Path, size: int) -> None:
    other_run(tmp_path / "out")
    first = (tmp_path / "out" / "journal.jsonl").read_bytes()
    (tmp_path / "out" / "recipe.yaml").unlink()
    (tmp_path / "out" / "journal.jsonl").write_bytes(first[:size])
    with store.open_output(tmp_path / "out", RECIPE, "f1") as output:
        assert not output.resumed
        assert bool(output.messages) == bool(size)
        assert output.recipe.read_text() == RECIPE


def test_killed_between_the_event_and_the_recipe_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    other_run(out)
    (out / "recipe.yaml").unlink()
    with store.open_output(out, RECIPE, "f1") as output:
        assert output.resumed
        output.journal.append("recipe", {"recipe": "jitter: {iterations: 3}\n"})
    assert (out / "recipe.yaml").read_text() == RECIPE
    with store.open_output(out, None, "f1") as output:
        assert output.recipe.read_text() == "jitter: {iterations: 3}\n"


def test_two_processes_on_one_output(tmp_path: Path) -> None:
    with (
        store.open_output(tmp_path, RECIPE, "f1"),
        pytest.raises(XanesTomoError, match="has been writing into this folder since"),
    ):
        store.open_output(tmp_path, RECIPE, "f1")
    store.open_output(tmp_path, RECIPE, "f1").close()


def test_an_output_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(XanesTomoError, match="no permission to write there; choose another output folder") as error:
        store.open_output(tmp_path / "out", RECIPE, "f1")
    one_line(error)


# ---- maps ---------------------------------------------------------------------------------------------------------

SPECS = (
    store.MapSpec("Mn", "g/cm3", "density of Mn", 0.7, {"systematic": 0.02}),
    store.MapSpec("Mn_sigma", "g/cm3"),
)
SHAPE = (7, 9, 11)


def truth(shape: tuple[int, int, int] = SHAPE) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    maps = {spec.name: rng.normal(size=shape).astype(np.float32) for spec in SPECS}
    maps["Mn"][3:5] = 0.0
    maps["Mn_sigma"][:3] = np.nan
    return maps


def make(out: Path, **change: object) -> store.MapStore:
    options = {"shape": SHAPE, "voxel_nm": 34.0, "maps": SPECS, "slab_rows": 3, "key": "k1", **change}
    return store.MapStore(out / "maps.ome.zarr", **options)  # type: ignore[arg-type]


def fill(maps: store.MapStore, values: dict[str, np.ndarray]) -> list[int]:
    maps.create()
    made = []
    for y0, y1 in maps.pending():
        maps.write(y0, {name: a[y0:y1] for name, a in values.items()})
        made.append(y0)
    return made


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    maps = make(tmp_path)
    fill(maps, truth())
    maps.finish(absent={"valence": "no references"}, attributes={"Mn": {"n": np.int64(4)}}, metadata={"handed": "?"})
    return tmp_path / "maps.ome.zarr"


def test_maps_read_back_with_what_is_said_about_them(finished: Path) -> None:
    back = store.read_maps(finished)
    for name, values in truth().items():
        assert back.data[name].dtype == np.float32
        np.testing.assert_array_equal(np.asarray(back.data[name]), values)
    assert dict(back.units) == {"Mn": "g/cm3", "Mn_sigma": "g/cm3"}
    assert (back.voxel_nm, dict(back.absent)) == (34.0, {"valence": "no references"})
    whole, each = store.read_map_attributes(finished)
    assert (whole["handed"], whole["maps"]) == ("?", ["Mn", "Mn_sigma"])
    assert each["Mn"] == {
        "unit": "g/cm3", "description": "density of Mn", "smoothing_voxel": 0.7, "voxel_nm": 34.0,
        "systematic": 0.02, "n": 4,
    }  # fmt: skip
    assert [p.name for p in finished.parent.iterdir()] == ["maps.ome.zarr"]
    with pytest.raises(XanesTomoError, match="no map 'valence': no references"):
        store.read_map_levels(finished, "valence")
    pickle.loads(pickle.dumps(back.data["Mn"]))


def test_the_store_is_ngff_0_5(finished: Path) -> None:
    import zarr

    root = zarr.open_group(finished, mode="r")
    assert root.attrs["ome"] == {"version": "0.5"}
    assert sorted(root.group_keys()) == ["Mn", "Mn_sigma"]
    ome = json.loads((finished / "Mn" / "zarr.json").read_text())["attributes"]["ome"]
    assert ome["version"] == "0.5"
    (multiscale,) = ome["multiscales"]
    assert multiscale["axes"] == [{"name": n, "type": "space", "unit": "nanometer"} for n in "yzx"]
    assert multiscale["datasets"] == [
        {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [34.0, 34.0, 34.0]}]}
    ]
    array = json.loads((finished / "Mn" / "0" / "zarr.json").read_text())
    assert array["dimension_names"] == ["y", "z", "x"]
    assert array["chunk_grid"]["configuration"]["chunk_shape"] == [3, 9, 11]


def test_coarser_levels_are_the_means(tmp_path: Path) -> None:
    shape = (5, 515, 6)
    maps = make(tmp_path, shape=shape)
    values = truth(shape)
    fill(maps, values)
    maps.finish()
    levels = store.read_map_levels(maps.path, "Mn")
    assert [a.shape for a in levels] == [(5, 515, 6), (3, 258, 3), (2, 129, 2)]
    fine = values["Mn"].astype(np.float64)
    coarse = np.asarray(levels[1])
    np.testing.assert_allclose(coarse[:2, :257], fine[:4, :514].reshape(2, 2, 257, 2, 3, 2).mean((1, 3, 5)), rtol=1e-6)
    np.testing.assert_allclose(coarse[2, 257], fine[4, 514].reshape(3, 2).mean(1), rtol=1e-6)  # the odd ends
    sigma = np.asarray(store.read_map_levels(maps.path, "Mn_sigma")[1])
    assert np.isnan(sigma[0]).all()
    np.testing.assert_allclose(
        sigma[1, :257], values["Mn_sigma"][3].astype(float)[:514].reshape(257, 2, 3, 2).mean((1, 3)), rtol=1e-6
    )  # NaN left out
    ome = json.loads((maps.path / "Mn" / "zarr.json").read_text())["attributes"]["ome"]
    assert ome["multiscales"][0]["datasets"][2]["coordinateTransformations"] == [
        {"type": "scale", "scale": [136.0] * 3},
        {"type": "translation", "translation": [51.0] * 3},
    ]


def test_an_interrupted_run_makes_only_the_missing_slabs_and_the_same_bytes(tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    maps = make(straight)
    assert fill(maps, truth()) == [0, 3, 6]
    maps.finish()

    maps = make(broken)
    assert store.begun_slabs(maps.path, "these") == (0, 1)
    maps.create("these")
    assert store.begun_slabs(maps.path, "these") == (0, 3)
    maps.write(3, {name: a[3:6] for name, a in truth().items()})
    with pytest.raises(ValueError, match="2 of 3 slabs"):
        maps.finish()
    assert store.begun_slabs(maps.path, "these") == (1, 3)
    assert store.begun_slabs(maps.path, "others") == (0, 1)
    assert not maps.path.exists()
    maps = pickle.loads(pickle.dumps(make(broken)))
    assert fill(maps, truth()) == [0, 6]
    maps.finish()
    assert maps.complete
    assert fill(maps, truth()) == []
    assert store.begun_slabs(maps.path, "these") == (0, 1)
    maps.finish()
    assert content(straight) == content(broken)


def test_killed_while_being_laid_out_or_before_the_rename(tmp_path: Path) -> None:
    maps = make(tmp_path)
    maps.create()
    (maps.progress / "created").unlink()
    shutil.rmtree(maps.partial / "Mn")
    assert fill(maps, truth()) == [0, 3, 6]
    (maps.partial / "Mn" / "0" / "c" / "0" / ".0123.partial").write_text("half a chunk")
    maps._describe({}, {}, {})  # as far as it came
    maps = make(tmp_path)
    assert fill(maps, truth()) == []
    maps.finish()
    assert list(tmp_path.rglob("*.partial")) == []
    np.testing.assert_array_equal(np.asarray(store.read_maps(maps.path).data["Mn"]), truth()["Mn"])


def test_other_maps_never_replace_the_former_ones_silently(finished: Path) -> None:
    out = finished.parent
    before = content(finished)
    half = make(out, key="never finished")
    half.create()
    half.write(0, {name: a[:3] for name, a in truth().items()})
    other = make(out, key="k2")
    assert other.pending() == ((0, 3), (3, 6), (6, 7))
    fill(other, {name: -a for name, a in truth().items()})
    assert content(finished) == before
    kept = other.finish()
    assert kept == out / "maps-1.ome.zarr"
    assert content(kept) == before
    assert other.leftovers() == (kept, half.partial)
    # Going back to the first recipe takes up what is there.
    back = make(out)
    assert fill(back, truth()) == []
    assert back.finish() == out / "maps-2.ome.zarr"
    assert content(finished) == before
    assert make(out, key="never finished").pending() == ((3, 6), (6, 7))
    assert len({make(out, **c).key for c in ({}, {"voxel_nm": 35.0}, {"slab_rows": 2}, {"maps": SPECS[:1]})}) == 4


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    maps = make(tmp_path)
    maps.create()
    good = {name: a[:3] for name, a in truth().items()}
    for y0, data, message in (
        (1, good, "y0"),
        (0, {"Mn": good["Mn"]}, "expected the maps"),
        (0, {**good, "Mn": good["Mn"][:2]}, "Mn: expected shape"),
    ):
        with pytest.raises(ValueError, match=message):
            maps.write(y0, data)
    with pytest.raises(ValueError, match="name of a map"):
        store.MapSpec("../Mn")
    with pytest.raises(ValueError, match="distinct"):
        make(tmp_path, maps=(SPECS[0], SPECS[0]))
    for path in (maps.path, maps.partial, tmp_path):
        with pytest.raises(XanesTomoError, match="expected finished maps"):
            store.read_maps(path)


KILLED_WHILE_MAPPING = """
import sys, time
import numpy as np
from napari_xanes_tomo.io.store import MapSpec, MapStore
rng = np.random.default_rng(3)
values = rng.random((40, 64, 64), dtype=np.float32)
maps = MapStore(sys.argv[1], values.shape, 1.0, [MapSpec("Mn")], slab_rows=2, key="k")
maps.create()
pending = maps.pending()
print(len(pending), flush=True)
for y0, y1 in pending:
    maps.write(y0, {"Mn": values[y0:y1]})
    print(y0, flush=True)
maps.finish()
print("finished", flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is a POSIX word")
def test_kill_9_while_mapping_makes_no_flagged_slab_twice(tmp_path: Path) -> None:
    path = tmp_path / "maps.ome.zarr"
    made: list[str] = []
    for n_lines in (5, None):
        with subprocess.Popen(
            [sys.executable, "-c", KILLED_WHILE_MAPPING, str(path)], stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            assert int(child.stdout.readline()) <= 20 - len(made)
            if n_lines is None:
                made += child.stdout.read().splitlines()
            else:
                made += [child.stdout.readline().strip() for _ in range(n_lines)]
                child.kill()
                made += [line.strip() for line in child.stdout if line.endswith("\n")]
    assert made.pop() == "finished"
    assert len(set(made)) == len(made)
    assert len(made) >= 19  # a slab can be flagged and its word not out when the process dies
    values = np.random.default_rng(3).random((40, 64, 64), dtype=np.float32)
    np.testing.assert_array_equal(np.asarray(store.read_maps(path).data["Mn"]), values)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    done = mount is not None and hasattr(os, "geteuid") and os.geteuid() == 0 and subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)], capture_output=True, check=False
    ).returncode == 0  # fmt: skip
    if not done:
        pytest.skip("needs the right to mount a small tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_in_the_middle_of_a_slab(small_disk: Path) -> None:
    rng = np.random.default_rng(2)
    values = {"Mn": rng.random((6, 32, 32), dtype=np.float32)}
    ballast = small_disk / "ballast"
    with store.open_output(small_disk / "out", RECIPE, "f1") as output:
        maps = make(small_disk / "out", shape=(6, 32, 32), maps=SPECS[:1], slab_rows=2)
        maps.create()
        maps.write(0, {"Mn": values["Mn"][:2]})
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(1024)) == 1024:
                pass
        before = content(small_disk / "out")
        for attempt in (
            lambda: maps.write(2, {"Mn": values["Mn"][2:4]}),
            lambda: output.journal.append("note", {"text": "x" * 10_000}),
            lambda: output.journal.put_array(np.zeros(9000)),
            lambda: store.write_shifts(output.shifts, [store.ShiftRow(1.0, 2.0, i) for i in range(1000)]),
        ):
            with pytest.raises(XanesTomoError, match="the disk is full") as error:
                attempt()
            one_line(error)
        assert content(small_disk / "out") == before
        assert maps.pending() == ((2, 4), (4, 6))
        ballast.unlink()
        assert fill(maps, values) == [2, 4]
        maps.finish()
        output.journal.append("note")
    np.testing.assert_array_equal(np.asarray(store.read_maps(maps.path).data["Mn"]), values["Mn"])
    assert len(store.Journal(small_disk / "out")) == 2


def test_importing_the_store_loads_neither_zarr_nor_dask() -> None:
    code = "import sys, napari_xanes_tomo.io.store; print([m for m in ('zarr', 'dask', 'scipy') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"
