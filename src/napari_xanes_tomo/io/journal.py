"""What happened: an append-only journal of JSON lines, with content-addressed arrays beside it."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from napari_xanes_tomo.model import XanesTomoError

from .atomic import atomic_write, sync_folder, writing

__all__ = ["JOURNAL_VERSION", "Event", "Journal", "plain_json"]

JOURNAL_VERSION = 1


@dataclass(frozen=True)
class Event:
    """One line of the journal.

    Attributes
    ----------
    seq : int
        1 for the first event, without gaps.
    time : str
        UTC, ISO 8601.
    kind : str
        What happened, e.g. ``candidate``.
    payload : mapping
        Plain JSON data, exactly as it reads back; NaN and infinities are None.
    version : int
        Version of the journal's format.
    """

    seq: int
    time: str
    kind: str
    payload: Mapping[str, Any]
    version: int = JOURNAL_VERSION


class Journal:
    """The journal of one output folder: ``journal.jsonl`` and ``arrays/``.

    Opening reads it and writes nothing; the folder need not exist. Threads may share one journal, but only one
    process may append (see `OutputLock`).

    A line cut short by a crash stays in the file as it is. The next event starts on a new line and carries
    ``torn``, the SHA-256 of the bytes before it that are no event, which tells such a remnant from a line
    damaged by hand.

    Parameters
    ----------
    out_dir : str or Path
        The output folder.

    Raises
    ------
    XanesTomoError
        A line in the middle is no event (its number is named), or a newer version wrote the journal.
    """

    def __init__(self, out_dir: str | Path) -> None:
        self.folder = Path(out_dir)
        self.path = self.folder / "journal.jsonl"
        self._lock = threading.Lock()
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            data = b""
        except OSError as error:
            raise XanesTomoError(f"{self.path}: the journal cannot be read ({error.strerror})") from error
        self._size = len(data)
        self._new_line = not data or data.endswith(b"\n")
        self._events, self._torn = _parse(self.path, data)

    @property
    def events(self) -> tuple[Event, ...]:
        """All events, oldest first."""
        return tuple(self._events)

    @property
    def torn(self) -> bytes:
        """The remnant of an event at the end of the file that was never finished; empty as a rule."""
        return self._torn

    def __len__(self) -> int:
        return len(self._events)

    def append(self, kind: str, payload: Mapping[str, Any] | None = None) -> Event:
        """Add one event; it is on disk when this returns.

        Parameters
        ----------
        kind : str
            What happened.
        payload : mapping, optional
            JSON data; tuples become lists, numpy numbers plain ones, NaN and infinities null. Arrays belong into
            `put_array`.

        Raises
        ------
        XanesTomoError
            The event could not be written, or another program changed the file; the journal is as before.
        """
        plain = {} if payload is None else plain_json(payload, "payload")
        with self._lock:
            event = Event(len(self._events) + 1, datetime.now(UTC).isoformat(), kind, plain)
            record: dict[str, Any] = {"seq": event.seq, "time": event.time, "kind": kind, "version": event.version}
            if self._torn:
                record["torn"] = _digest(self._torn)
            record["payload"] = plain
            line = _encode(record)
            self._write(line if self._new_line else b"\n" + line)
            self._events.append(event)
            self._torn = b""
            self._new_line = True
        return event

    def _write(self, data: bytes) -> None:
        new = self._size == 0
        with writing(self.path):
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o644)
            try:
                size = os.fstat(descriptor).st_size
                if size != self._size:
                    raise XanesTomoError(
                        f"{self.path}: expected {self._size} bytes, found {size}: another program changed the "
                        "journal; close it there and open this folder again"
                    )
                try:
                    rest = memoryview(data)
                    while rest:
                        rest = rest[os.write(descriptor, rest) :]
                    os.fsync(descriptor)
                except BaseException:
                    os.ftruncate(descriptor, self._size)  # the disk filled up half-way through the line, or Ctrl-C
                    raise
            finally:
                os.close(descriptor)
            self._size += len(data)
            if new:
                sync_folder(self.folder)

    def put_array(self, array: npt.ArrayLike) -> dict[str, Any]:
        """Store an array of any shape under its own hash and return the reference for a payload.

        Parameters
        ----------
        array : array_like
            Booleans, integers or floats of 2, 4 or 8 bytes, any shape; anything else is refused.

        Returns
        -------
        dict
            ``{"array": sha256 of the .npy file, "shape": [...], "dtype": "..."}``.
        """
        a = np.asarray(array)
        if a.dtype.kind not in "biu" and not (a.dtype.kind == "f" and a.dtype.itemsize in (2, 4, 8)):
            raise TypeError(f"array: expected booleans, integers or floats of at most 8 bytes, got {a.dtype}")
        a = np.asarray(a, dtype=a.dtype.newbyteorder("<"), order="C")
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, a, version=(1, 0), allow_pickle=False)
        data = buffer.getvalue()
        name = hashlib.sha256(data).hexdigest()
        path = self._array_path(name)
        if not _holds(path, data):
            atomic_write(path, data)
        return {"array": name, "shape": list(a.shape), "dtype": a.dtype.name}

    def get_array(self, reference: Mapping[str, Any] | str) -> npt.NDArray[Any]:
        """Return the array stored under a reference of `put_array`, or under its hash alone.

        Raises
        ------
        XanesTomoError
            The file is missing or its content is not what was stored.
        """
        name = reference if isinstance(reference, str) else reference.get("array")
        if not isinstance(name, str) or not re.fullmatch("[0-9a-f]{64}", name):
            raise XanesTomoError(f"{self.path}: expected a reference to a stored array, got {str(reference)[:80]!r}")
        path = self._array_path(name)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise XanesTomoError(
                f"{path}: an array the journal refers to cannot be read ({error.strerror}); restore it or redo the step"
            ) from error
        if hashlib.sha256(data).hexdigest() != name:
            raise XanesTomoError(f"{path}: the array is damaged (its hash is another); restore it or redo the step")
        return np.load(io.BytesIO(data), allow_pickle=False)  # type: ignore[no-any-return]

    def _array_path(self, name: str) -> Path:
        return self.folder / "arrays" / f"{name}.npy"


def _holds(path: Path, data: bytes) -> bool:
    try:
        return path.read_bytes() == data
    except OSError:
        return False


def _encode(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    try:
        return text.encode("utf-8") + b"\n"
    except UnicodeEncodeError:  # a file name that is no Unicode
        return json.dumps(record, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def plain_json(value: Any, where: str) -> Any:
    """Return `value` as JSON data that reads back equal: numpy numbers plain, tuples lists, NaN and infinities None."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where}: expected texts as keys, got {key!r}")
        return {key: plain_json(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise TypeError(f"{where}: expected JSON data, got a {type(value).__name__} (store arrays with put_array)")


def _parse(path: Path, data: bytes) -> tuple[list[Event], bytes]:
    """Return the events in `data` and the unfinished bytes after the last one."""
    events: list[Event] = []
    torn: list[bytes] = []
    first_torn = 0
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        event, vouched = _event(path, number, line)
        if event is None:
            if not torn:
                first_torn = number
            torn.append(line)
            continue
        if torn and vouched != _digest(b"\n".join(torn)):
            raise XanesTomoError(_damaged(path, first_torn, torn[0]))
        if event.seq != len(events) + 1:
            raise XanesTomoError(
                f"{path}, line {number}: expected event {len(events) + 1}, got {event.seq}: lines were added, removed "
                "or moved; restore the journal from a copy"
            )
        torn = []
        events.append(event)
    # Only one unfinished line, or a second one torn in the act of vouching for the first, is a crash.
    if torn and (len(torn) > 1 and data.endswith(b"\n")):
        raise XanesTomoError(_damaged(path, first_torn, torn[0]))
    return events, b"\n".join(torn)


def _damaged(path: Path, number: int, line: bytes) -> str:
    start = line[:40].decode("utf-8", "replace")
    return f"{path}, line {number}: expected one event in JSON, got {start!r}; restore the journal from a copy"


def _event(path: Path, number: int, line: bytes) -> tuple[Event | None, str | None]:
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None, None
    if not isinstance(record, dict):
        return None, None
    version = record.get("version")
    if isinstance(version, int) and version > JOURNAL_VERSION:
        raise XanesTomoError(
            f"{path}, line {number}: written by a newer version of this program (journal format {version}, this one "
            f"reads up to {JOURNAL_VERSION}); update the program"
        )
    seq, time, kind, payload = (record.get(k) for k in ("seq", "time", "kind", "payload"))
    if type(version) is not int or type(seq) is not int or version < 1:
        return None, None
    if not isinstance(time, str) or not isinstance(kind, str) or not isinstance(payload, dict):
        return None, None
    return Event(seq, time, kind, payload, version), record.get("torn")
