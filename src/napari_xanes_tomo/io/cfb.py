"""OLE2 (CFB) containers: which sectors belong to a stream, and whether they can be trusted.

The header, the FAT and the chains of the directory and of the mini FAT are checked here before olefile
sees the file, so that a damaged file costs neither time nor memory; olefile then reads the directory.
A stream is followed only where its chain ends with its length, stays inside the file's table, visits no
sector twice, and where nothing else points into it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import olefile

__all__ = ["CUTOFF", "Container", "Damage", "Runs", "merge_runs", "pread", "read_into"]

Runs = tuple[tuple[int, int], ...]
"""Where a stream lies in its file: (offset, length) pieces, bytes, in order."""

MAGIC = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
END, FREE, FATSECT, DIFSECT = 0xFFFFFFFE, 0xFFFFFFFF, 0xFFFFFFFD, 0xFFFFFFFC
ENTRY, MINI, CUTOFF = 128, 64, 4096  # bytes of a directory entry and of a mini sector; smaller streams are mini

# What olefile may raise on a damaged container besides its own OSError.
OLE_ERRORS = (
    OSError,
    ValueError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    struct.error,
    RecursionError,
    MemoryError,
)


class Damage(Exception):
    """Something in a container that cannot be followed; `reason` as in `napari_xanes_tomo.io.xrm.XrmError`."""

    def __init__(self, reason: str, what: str) -> None:
        super().__init__(what)
        self.reason = reason


# ---------------------------------------------------------------------------------------------- positioned reads

if hasattr(os, "pread"):
    pread = os.pread
else:  # Windows; every read here has its own descriptor

    def pread(fd: int, length: int, offset: int, /) -> bytes:
        """Return up to `length` bytes from `offset` on."""
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, length)


def _copied_into(fd: int, view: memoryview, offset: int) -> int:
    """Read into `view` where the platform has no ``preadv``; return the number of bytes, as that does."""
    data = pread(fd, len(view), offset)
    view[: len(data)] = data
    return len(data)


def _read_into(fd: int, view: memoryview, offset: int) -> int:
    return os.preadv(fd, [view], offset)


read_into = _read_into if hasattr(os, "preadv") else _copied_into


# ---------------------------------------------------------------------------------------------- chains


def merge_runs(pieces: Iterable[tuple[int, int]], gap: int = 0) -> list[tuple[int, int]]:
    """Join pieces (offset, length), sorted, that lie at most `gap` bytes apart."""
    merged: list[tuple[int, int]] = []
    for start, length in pieces:
        if merged and 0 <= start - sum(merged[-1]) <= gap:
            merged[-1] = (merged[-1][0], start + length - merged[-1][0])
        else:
            merged.append((start, length))
    return merged


def follow(table: npt.NDArray[np.uint32], start: int, count: int, what: str) -> npt.NDArray[np.int64]:
    """Follow `count` links of a FAT from `start`; the chain has to end there, without a repetition."""
    if count == 0:
        return np.empty(0, dtype=np.int64)
    end = start + count
    if (
        end <= len(table)
        and table[end - 1] == END
        and np.array_equal(table[start : end - 1], np.arange(start + 1, end))
    ):
        return np.arange(start, end)
    if count > len(table):
        raise Damage("corrupt", f"{what} is longer than the file's own table of sectors")
    out = np.empty(count, dtype=np.int64)
    sector = start
    for i in range(count):
        if sector >= len(table):
            raise Damage("corrupt", f"{what} leaves the file's table of sectors")
        out[i] = sector
        sector = int(table[sector])
    if sector != END:
        raise Damage("corrupt", f"the chain of {what} does not end with its length")
    if len(np.unique(out)) != count:
        raise Damage("corrupt", f"the chain of {what} runs in a circle")
    return out


class Container:
    """The sectors of one open container: who owns which, and where a stream lies.

    Parameters
    ----------
    file : binary file
        Open for reading, and open as long as this is used.
    size : int
        Bytes of the file.

    Raises
    ------
    Damage
        Its tables cannot be trusted. olefile may raise any of `OLE_ERRORS` on others.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        head = self.read(0, 512)
        shift, mini_shift = struct.unpack_from("<2H", head, 30)
        (cutoff,) = struct.unpack_from("<I", head, 56)
        if shift not in (9, 12) or mini_shift != 6 or cutoff != CUTOFF:
            raise Damage("corrupt", "its sector sizes are none of the format's")
        self.sector: int = 1 << shift
        self._load_fat(head)
        self.owner = np.zeros(len(self.fat), dtype=np.int8)
        first_dir = struct.unpack_from("<I", head, 48)[0]
        first_mini_fat, n_mini_fat = struct.unpack_from("<2I", head, 60)
        self.directory = self._to_end(first_dir, "the directory")
        if not self.directory.size:
            raise Damage("corrupt", "it has no directory")
        root = self.read(self.offset(int(self.directory[0])), ENTRY)
        root_start, root_size = struct.unpack_from("<IQ", root, 116)
        if self.sector == 512:  # the upper half of the size means nothing there
            root_size &= 0xFFFFFFFF
        self.mini_fat_sectors = follow(self.fat, first_mini_fat, n_mini_fat, "the mini FAT")
        self.mini_bytes = root_size
        self.mini_stream = follow(self.fat, root_start, -(-root_size // self.sector), "the mini stream")
        for sectors in (self.fat_sectors, self.difat, self.directory, self.mini_fat_sectors, self.mini_stream):
            self.claim(np.asarray(sectors, dtype=np.int64), 1, "a table of the container")
        mini = b"".join(self.read(self.offset(int(s)), self.sector) for s in self.mini_fat_sectors)
        self.mini_fat = np.frombuffer(mini, "<u4")[: -(-root_size // MINI)]
        self.mini_owner = np.zeros(len(self.mini_fat), dtype=np.int8)
        for s in self.directory:
            self.read(self.offset(int(s)) + self.sector - 1, 1)  # all of it is there: olefile fills up with zeros
        self._streams = self._list()
        self._pointed = self._pointers(self.fat, (first_dir, first_mini_fat, root_start), mini=False)
        self._mini_pointed = self._pointers(self.mini_fat, (), mini=True)
        for sectors in (self.directory, self.mini_fat_sectors, self.mini_stream):
            if (self._pointed[sectors] != 1).any():
                raise Damage("corrupt", "a table of the container shares sectors with something else")

    def offset(self, sector: int) -> int:
        """Where a sector begins in the file."""
        return (int(sector) + 1) * self.sector

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly these bytes."""
        self.file.seek(offset)
        data = self.file.read(length)
        if len(data) < length:
            raise Damage("truncated", f"its {self.size} bytes end inside its own tables; copy it again")
        return data

    def _load_fat(self, head: bytes) -> None:
        listed = struct.unpack_from("<109I", head, 76)
        first, n_difat = struct.unpack_from("<2I", head, 68)
        sectors = [s for s in listed if s < DIFSECT]
        self.difat: list[int] = []
        while n_difat and first < DIFSECT and len(self.difat) < n_difat:
            if first in self.difat or len(self.difat) * self.sector > self.size:
                raise Damage("corrupt", "its DIFAT runs in a circle")
            self.difat.append(first)
            *more, first = struct.unpack(f"<{self.sector // 4}I", self.read(self.offset(first), self.sector))
            sectors += [s for s in more if s < DIFSECT]
        if len(set(sectors)) != len(sectors):
            raise Damage("corrupt", "its FAT has a sector twice")
        self.fat_sectors = sectors
        self.fat = np.frombuffer(b"".join(self.read(self.offset(s), self.sector) for s in sectors), "<u4")

    def _to_end(self, start: int, what: str) -> npt.NDArray[np.int64]:
        out: list[int] = []
        while start < DIFSECT:
            if start >= len(self.fat) or len(out) > len(self.fat):
                raise Damage("corrupt", f"the chain of {what} leaves the file's table of sectors or runs in a circle")
            out.append(start)
            start = int(self.fat[start])
        return np.array(out, dtype=np.int64)

    def claim(self, sectors: npt.NDArray[np.int64], who: int, what: str, mini: bool = False) -> None:
        """Note who owns sectors that nobody owned before."""
        owner = self.mini_owner if mini else self.owner
        if sectors.size and (int(sectors.max()) >= len(owner) or owner[sectors].any()):
            raise Damage("corrupt", f"{what} shares sectors with something else")
        owner[sectors] = who

    def streams(self) -> dict[str, tuple[int, int]]:
        """Path in lower case -> (first sector, bytes) of every stream."""
        return dict(self._streams)

    def _list(self) -> dict[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = {}
        todo = [("", kid) for kid in olefile.OleFileIO(self.file).root.kids]
        seen: set[int] = set()
        while todo:
            prefix, entry = todo.pop()
            path = prefix + entry.name.lower()
            # olefile lets an entry stand in two places: a storage inside itself would never end
            if entry.sid in seen or path in found or len(path) > 2000:
                raise Damage("corrupt", "an entry of its directory stands in two places")
            seen.add(entry.sid)
            if entry.entry_type == olefile.STGTY_STREAM:
                found[path] = (int(entry.isectStart), int(entry.size))
            else:
                todo += [(path + "/", kid) for kid in entry.kids]
        return found

    def _pointers(self, table: npt.NDArray[np.uint32], starts: tuple[int, ...], *, mini: bool) -> npt.NDArray[np.int64]:
        """How many links and directory entries point to each sector: one, if the file is sound."""
        own = [start for start, size in self._streams.values() if size and (size < CUTOFF) == mini]
        links = np.concatenate((table.astype(np.int64), np.array([*own, *starts], dtype=np.int64)))
        return np.bincount(links[links < len(table)], minlength=len(table)).astype(np.int64)

    def place(self, start: int, length: int, what: str, *, claim: bool = False) -> Runs:
        """Return where the bytes of a stream lie, its neighbouring sectors joined.

        Raises
        ------
        Damage
            The chain is short, long, circular, out of bounds, or something else points into it.
        """
        mini = length < CUTOFF
        sectors = follow(
            self.mini_fat if mini else self.fat, start, -(-length // (MINI if mini else self.sector)), what
        )
        if not sectors.size:
            return ()
        if ((self._mini_pointed if mini else self._pointed)[sectors] != 1).any():
            raise Damage("corrupt", f"{what} shares sectors with something else")
        if claim:
            self.claim(sectors, 2, what, mini)
        elif (self.mini_owner if mini else self.owner)[sectors].any():
            raise Damage("corrupt", f"{what} shares sectors with something else")
        return self._runs(sectors, mini, length, what)

    def _runs(self, sectors: npt.NDArray[np.int64], mini: bool, length: int, what: str) -> Runs:
        step = MINI if mini else self.sector
        if mini:
            at = sectors * MINI
            if int(at[-1]) >= self.mini_bytes:
                raise Damage("corrupt", f"{what} leaves the mini stream")
            offsets = (self.mini_stream[at // self.sector] + 1) * self.sector + at % self.sector
        else:
            offsets = (sectors + 1) * self.sector
        breaks = np.flatnonzero(np.diff(offsets) != step) + 1
        first = np.concatenate(([0], breaks))
        counts = np.diff(np.concatenate((first, [len(offsets)])))
        pieces = [(int(offsets[i]), int(n) * step) for i, n in zip(first, counts, strict=True)]
        over = sum(n for _, n in pieces) - length
        pieces[-1] = (pieces[-1][0], pieces[-1][1] - over)
        there = sum(max(0, min(n, self.size - o)) for o, n in pieces)
        if there < length:
            text = f"{what} has {there} of {length} bytes; copy the file again, or wait if it is being written"
            raise Damage("truncated", text)
        return tuple(pieces)
