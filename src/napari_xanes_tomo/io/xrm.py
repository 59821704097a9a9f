"""XRM and TXRM files: reading headers and pixels at the speed of the disk, and writing them.

A file is an OLE2 (CFB) container of small metadata streams and one stream an image. olefile is the
authority on what a container holds; where a file is laid out like one already parsed (which is compared
byte by byte: header, FAT, mini FAT, directory), its values are taken from the same places without it.
Pixels are read by position, straight into the caller's array; no handle stays open.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import time
from calendar import timegm
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import olefile

from napari_xanes_tomo.model import XanesTomoError

__all__ = ["XrmError", "XrmFrames", "XrmHeader", "read_header", "write_xrm"]

Runs = tuple[tuple[int, int], ...]
"""Where a stream lies in its file: (offset, length) pieces, bytes, in order."""

_MAGIC = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_LFS = b"version https://git-lfs"
_END, _FREE, _FATSECT, _DIFSECT = 0xFFFFFFFE, 0xFFFFFFFF, 0xFFFFFFFD, 0xFFFFFFFC
_ENTRY, _MINI, _CUTOFF = 128, 64, 4096
_CODES = {2: "<i1", 3: "<u1", 4: "<i2", 5: "<u2", 6: "<i4", 7: "<u4", 8: "<i8", 9: "<u8", 10: "<f4", 11: "<f8"}
_PER_GROUP = 100  # images in one ImageData storage

# The streams read from every file; all may be absent except width, height, type and the image.
_INFO = (
    "Angles",
    "CameraBinning",
    "DataType",
    "Date",
    "Energy",
    "ExpTime",
    "ExpTimes",
    "HorizontalBin",
    "ImageHeight",
    "ImageWidth",
    "ImagesTaken",
    "IonChamberCurrent",
    "MosiacColumns",
    "MosiacRows",
    "NoOfImages",
    "PixelSize",
    "XPosition",
    "YPosition",
    "ZPosition",
)
_WANTED = (
    "version",
    "exeversion",
    "acquisitionsettings/acqfilename",
    "referencedata/datatype",
    "referencedata/exptime",
    "referencedata/imageinfo/imageheight",
    "referencedata/imageinfo/imagewidth",
    *(f"imageinfo/{name.lower()}" for name in _INFO),
)
# Those whose values differ from frame to frame.
_EACH = frozenset(
    f"imageinfo/{name}"
    for name in (
        *("angles", "date", "energy", "exptime", "exptimes", "ionchambercurrent"),
        *("xposition", "yposition", "zposition"),
    )
) | {"acquisitionsettings/acqfilename"}
_LARGEST_VALUE = 4 << 20  # bytes; no metadata stream of a real file comes near

# What olefile may raise on a damaged container besides its own OSError.
_OLE_ERRORS = (
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


class XrmError(XanesTomoError):
    """A file that cannot be read as XRM.

    Attributes
    ----------
    reason : str
        One word: ``missing``, ``unreadable``, ``empty``, ``lfs-pointer``, ``not-xrm``, ``corrupt``,
        ``truncated``, ``no-image``, ``mosaic`` or ``other-size``.
    file : str
        Name of the file.
    header : XrmHeader or None
        What could be read although the image is not whole.
    """

    def __init__(self, message: str, reason: str, file: str = "", header: XrmHeader | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.file = file
        self.header = header

    def __reduce__(self) -> tuple[Any, ...]:
        return XrmError, (str(self), self.reason, self.file, self.header)


@dataclass(frozen=True, slots=True)
class XrmHeader:
    """What one file says about itself. Values that the file lacks are NaN, None or empty.

    Attributes
    ----------
    path : str
        The file.
    size : int
        Bytes.
    version : float
        Version of the format, 3 to 5.
    n_planned, n_images : int
        Images planned, and images really there.
    shape : tuple of int
        (rows, columns) of an image.
    dtype : numpy.dtype
        Type of the stored counts.
    angles_deg, energies_ev, exposures_s, x_um, y_um, z_um, ion_chamber : tuple of float
        One value an image; degrees, eV, seconds, micrometres.
    times_s : tuple of float
        Start of every exposure, seconds since 1970 by the local clock of the instrument.
    modified_s : float
        When the container was last written, UTC, seconds since 1970.
    pixel_size_um : float
        As stored, which at some beamlines is stale; see `napari_xanes_tomo.io.scan`.
    binning : int or None
        Camera binning.
    acq_file_name : str
        Path the instrument wrote to; survives a renaming.
    mosaic : tuple of int
        (rows, columns) of tiles; (0, 0) for a plain image.
    images : tuple of runs
        Where every image lies.
    reference : runs
        Where the embedded reference image lies; empty without one.
    """

    path: str
    size: int
    version: float
    exe_version: str
    n_planned: int
    n_images: int
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    angles_deg: tuple[float, ...]
    energies_ev: tuple[float, ...]
    exposures_s: tuple[float, ...]
    times_s: tuple[float, ...]
    x_um: tuple[float, ...]
    y_um: tuple[float, ...]
    z_um: tuple[float, ...]
    ion_chamber: tuple[float, ...]
    modified_s: float
    pixel_size_um: float
    binning: int | None
    acq_file_name: str
    mosaic: tuple[int, int]
    images: tuple[Runs, ...]
    reference: Runs = ()
    reference_dtype: np.dtype[Any] | None = None
    reference_exposure_s: float = float("nan")

    @property
    def has_reference(self) -> bool:
        """Whether the file carries its own reference (flat) image."""
        return bool(self.reference)


# ---------------------------------------------------------------------------------------------- the container


class _Bad(Exception):
    """A chain that cannot be followed; `reason` as in `XrmError`."""

    def __init__(self, reason: str, what: str) -> None:
        super().__init__(what)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where everything lies in files of one layout, and the bytes that prove a file has it."""

    size: int
    reads: Runs
    proof: tuple[tuple[int, int, bytes], ...]  # (number of the read, start in it, the bytes)
    values: dict[str, tuple[tuple[int, int, int], ...]]  # stream -> pieces (read, start, stop)
    image_bytes: tuple[int, ...]
    images: tuple[Runs, ...]
    defect: tuple[str, str]  # (reason, what) of the first image that is not whole
    reference: Runs
    reference_bytes: int
    modified: tuple[int, int]  # where the root entry keeps its time: (read, start)
    same: dict[tuple[bytes, ...], _Same] = field(default_factory=dict)  # remembered between files


def _merge(pieces: Iterable[tuple[int, int]], gap: int = 0) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, length in pieces:
        if merged and 0 <= start - sum(merged[-1]) <= gap:
            merged[-1] = (merged[-1][0], start + length - merged[-1][0])
        else:
            merged.append((start, length))
    return merged


def _chain(table: npt.NDArray[np.uint32], start: int, count: int, what: str) -> npt.NDArray[np.int64]:
    """Follow `count` links of a FAT from `start`; the chain has to end there, without a repetition."""
    if count == 0:
        return np.empty(0, dtype=np.int64)
    end = start + count
    if (
        end <= len(table)
        and table[end - 1] == _END
        and np.array_equal(table[start : end - 1], np.arange(start + 1, end))
    ):
        return np.arange(start, end)
    if count > len(table):
        raise _Bad("corrupt", f"{what} is longer than the file's own table of sectors")
    out = np.empty(count, dtype=np.int64)
    sector = start
    for i in range(count):
        if sector >= len(table):
            raise _Bad("corrupt", f"{what} leaves the file's table of sectors")
        out[i] = sector
        sector = int(table[sector])
    if sector != _END:
        raise _Bad("corrupt", f"the chain of {what} does not end with its length")
    if len(np.unique(out)) != count:
        raise _Bad("corrupt", f"the chain of {what} runs in a circle")
    return out


class _Container:
    """The sectors of one open container: who owns which, and where a stream lies."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        self.ole = ole = olefile.OleFileIO(file)
        self.sector = int(ole.sector_size)
        if self.sector not in (512, 4096) or ole.mini_sector_size != _MINI or ole.mini_stream_cutoff_size != _CUTOFF:
            raise _Bad("corrupt", "its sector sizes are none of the format's")
        head = self._bytes(0, 512)
        listed = struct.unpack_from("<109I", head, 76)
        first, n_difat = struct.unpack_from("<2I", head, 68)
        fat_sectors = [s for s in listed if s < _DIFSECT]
        self.difat: list[int] = []
        while n_difat and first < _DIFSECT and len(self.difat) < n_difat:
            if first in self.difat:
                raise _Bad("corrupt", "its DIFAT runs in a circle")
            self.difat.append(first)
            *more, first = struct.unpack(f"<{self.sector // 4}I", self._bytes((first + 1) * self.sector, self.sector))
            fat_sectors += [s for s in more if s < _DIFSECT]
        if len(fat_sectors) * self.sector > size:
            raise _Bad("corrupt", "its FAT is larger than the file")
        self.fat_sectors = fat_sectors
        self.fat = np.frombuffer(b"".join(self._bytes((s + 1) * self.sector, self.sector) for s in fat_sectors), "<u4")
        self.owner = np.zeros(len(self.fat), dtype=np.int8)
        self.directory = self._to_end(int(ole.first_dir_sector), "the directory")
        n_mini_fat = int(ole.num_mini_fat_sectors)
        self.mini_fat_sectors = _chain(self.fat, int(ole.first_mini_fat_sector), n_mini_fat, "the mini FAT")
        mini_count = -(-int(ole.root.size) // self.sector)
        self.mini_stream = _chain(self.fat, int(ole.root.isectStart), mini_count, "the mini stream")
        for sectors in (fat_sectors, self.difat, self.directory, self.mini_fat_sectors, self.mini_stream):
            self.claim(np.asarray(sectors, dtype=np.int64), 1, "its own tables")
        mini = b"".join(self._bytes((int(s) + 1) * self.sector, self.sector) for s in self.mini_fat_sectors)
        self.mini_fat = np.frombuffer(mini, "<u4")[: -(-int(ole.root.size) // _MINI)]
        self.mini_owner = np.zeros(len(self.mini_fat), dtype=np.int8)

    def _bytes(self, offset: int, length: int) -> bytes:
        self.file.seek(offset)
        data = self.file.read(length)
        if len(data) < length:
            raise _Bad("truncated", f"{self.size} bytes end inside its tables")
        return data

    def _to_end(self, start: int, what: str) -> npt.NDArray[np.int64]:
        out: list[int] = []
        while start < _DIFSECT:
            if start >= len(self.fat) or len(out) > len(self.fat):
                raise _Bad("corrupt", f"the chain of {what} leaves the file's table of sectors or runs in a circle")
            out.append(start)
            start = int(self.fat[start])
        return np.array(out, dtype=np.int64)

    def claim(self, sectors: npt.NDArray[np.int64], who: int, what: str, mini: bool = False) -> None:
        owner = self.mini_owner if mini else self.owner
        if sectors.size and (int(sectors.max()) >= len(owner) or owner[sectors].any()):
            raise _Bad("corrupt", f"{what} shares sectors with something else")
        owner[sectors] = who

    def streams(self) -> dict[str, tuple[int, int]]:
        """Path in lower case -> (first sector, bytes) of every stream."""
        found: dict[str, tuple[int, int]] = {}
        todo = [("", kid) for kid in self.ole.root.kids]
        seen: set[int] = set()
        while todo:
            prefix, entry = todo.pop()
            path = prefix + entry.name.lower()
            # olefile lets an entry stand in two places: a storage inside itself would never end
            if entry.sid in seen or path in found or len(path) > 2000:
                raise _Bad("corrupt", "an entry of its directory stands in two places")
            seen.add(entry.sid)
            if entry.entry_type == olefile.STGTY_STREAM:
                found[path] = (int(entry.isectStart), int(entry.size))
            else:
                todo += [(path + "/", kid) for kid in entry.kids]
        return found

    def sectors(self, start: int, length: int, what: str) -> tuple[npt.NDArray[np.int64], bool]:
        """Return the sectors of a stream and whether they are mini sectors."""
        if length < _CUTOFF:
            return _chain(self.mini_fat, start, -(-length // _MINI), what), True
        return _chain(self.fat, start, -(-length // self.sector), what), False

    def runs(self, sectors: npt.NDArray[np.int64], mini: bool, length: int, what: str) -> Runs:
        """Return where the bytes of the sectors lie in the file, neighbours joined."""
        if not length:
            return ()
        step = _MINI if mini else self.sector
        if mini:
            at = sectors * _MINI
            if int(at[-1]) >= self.ole.root.size:
                raise _Bad("corrupt", f"{what} leaves the mini stream")
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
            raise _Bad("truncated", f"{what} has {there} of {length} bytes")
        return tuple(pieces)


def _parse(file: BinaryIO, size: int) -> _Layout:
    """Read the layout of a container with olefile; raise `_Bad` where it cannot be trusted."""
    try:
        box = _Container(file, size)
        streams = box.streams()
    except _OLE_ERRORS as error:
        text = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise _Bad("corrupt", f"the container is damaged ({text})") from None

    images: list[Runs] = []
    image_bytes: list[int] = []
    defect = ("", "")
    number = 1
    # Images before anything else: nothing may lie on their sectors.
    while (entry := streams.pop(f"imagedata{-(-number // _PER_GROUP)}/image{number}", None)) is not None:
        what = f"image {number}"
        try:
            sectors, mini = box.sectors(*entry, what)
            box.claim(sectors, 2, what, mini)
            images.append(box.runs(sectors, mini, entry[1], what))
        except _Bad as bad:
            defect = defect if defect[0] else (bad.reason, str(bad))
            images.append(())
        image_bytes.append(entry[1])
        number += 1
    reference: Runs = ()
    reference_bytes = 0
    if (entry := streams.pop("referencedata/image", None)) is not None:
        try:
            sectors, mini = box.sectors(*entry, "the reference")
            box.claim(sectors, 2, "the reference", mini)
            reference, reference_bytes = box.runs(sectors, mini, entry[1], "the reference"), entry[1]
        except _Bad:
            reference = ()

    where: dict[str, Runs] = {}
    for path, entry in streams.items():
        try:
            sectors, mini = box.sectors(*entry, path)
            if sectors.size and ((box.mini_owner if mini else box.owner)[sectors] == 2).any():
                raise _Bad("overlap", path)
            if path in _WANTED and 0 < entry[1] <= _LARGEST_VALUE:
                where[path] = box.runs(sectors, mini, entry[1], path)
        except _Bad as bad:
            if bad.reason == "overlap":  # one of the two is wrong, and nothing says which
                raise _Bad("corrupt", f"stream {path[:60]!r} lies on the sectors of an image") from None
            if path in _WANTED and not defect[0]:
                defect = (bad.reason, str(bad))  # its pixels may be whole, but not what they mean

    tables = sorted({*box.fat_sectors, *box.difat, *map(int, box.directory), *map(int, box.mini_fat_sectors)})
    structure = [(0, 512), *(((s + 1) * box.sector, box.sector) for s in tables)]
    structure = [(o, min(n, size - o)) for o, n in _merge(structure)]
    reads = tuple(_merge(sorted([*structure, *(piece for runs in where.values() for piece in runs)]), gap=8192))
    starts = np.array([o for o, _ in reads])

    def place(offset: int) -> tuple[int, int]:
        k = int(np.searchsorted(starts, offset, side="right")) - 1
        return k, offset - reads[k][0]

    # The times (bytes 100..115 of a directory entry) are the only structure that may differ.
    per_sector = box.sector // _ENTRY
    times: list[int] = []
    for sector in map(int, box.directory):
        raw = box._bytes((sector + 1) * box.sector, box.sector)
        times += [
            (sector + 1) * box.sector + i * _ENTRY + 100 for i in range(per_sector) if raw[i * _ENTRY + 66] in (1, 5)
        ]
    times.sort()
    proof = []
    for offset, length in structure:
        at = offset
        for cut in [t for t in times if offset <= t < offset + length] + [offset + length]:
            if cut > at:
                proof.append((*place(at), box._bytes(at, cut - at)))
            at = cut + 16
    root = (int(box.directory[0]) + 1) * box.sector
    values = {
        path: tuple((k, i, i + n) for (k, i), n in ((place(o), n) for o, n in runs)) for path, runs in where.items()
    }
    return _Layout(
        size,
        reads,
        tuple(proof),
        values,
        tuple(image_bytes),
        tuple(images),
        defect,
        reference,
        reference_bytes,
        place(root + 108),
    )


_layouts: dict[int, tuple[_Layout, ...]] = {}  # by file size, the newest first; replaced, never changed in place
_MAX_LAYOUTS = (64, 4)


def _remember(layout: _Layout) -> None:
    if len(_layouts) >= _MAX_LAYOUTS[0]:
        _layouts.clear()
    _layouts[layout.size] = (layout, *_layouts.get(layout.size, ())[: _MAX_LAYOUTS[1] - 1])


if hasattr(os, "pread"):
    _pread = os.pread
else:  # Windows; every read here has its own descriptor

    def _pread(fd: int, length: int, offset: int, /) -> bytes:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, length)


def _match(layout: _Layout, fd: int) -> list[bytes] | None:
    """Return the bytes at the places of a layout when they prove that the file has it."""
    buffers = []
    for offset, length in layout.reads:
        data = _pread(fd, length, offset)
        if len(data) != length:
            return None
        buffers.append(data)
    for k, start, expected in layout.proof:
        if buffers[k][start : start + len(expected)] != expected:
            return None
    return buffers


# ---------------------------------------------------------------------------------------------- the header


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("cp1252", errors="replace").strip()


_DATE = re.compile(rb"(\d\d)/(\d\d)/(\d{4}|\d\d) (\d\d):(\d\d):(\d\d)(\.\d+)?")


@lru_cache(maxsize=1024)
def _seconds(raw: bytes) -> float:
    """``MM/DD/YY HH:MM:SS`` (local, no zone) as seconds since 1970; NaN when it is none."""
    found = _DATE.match(raw)
    if found is None:
        return float("nan")
    month, day, year, hour, minute, second = (int(g) for g in found.groups()[:6])
    year += 2000 if year < 100 else 0
    try:
        datetime(year, month, day, hour, minute, min(second, 59))
    except ValueError:
        return float("nan")
    return timegm((year, month, day, hour, minute, second)) + float(found.group(7) or 0)


def _integer(values: Mapping[str, bytes], name: str) -> int | None:
    raw = values.get(name, b"")
    return int.from_bytes(raw[:4], "little", signed=True) if len(raw) >= 4 else None


def _floats(values: Mapping[str, bytes], name: str, n: int, planned: int) -> tuple[float, ...]:
    raw = values.get(name, b"")
    m = len(raw) // 4
    if n == 1 and m >= 1:
        return struct.unpack_from("<f", raw)
    if m == 0:
        return (float("nan"),) * n
    found = struct.unpack_from(f"<{m}f", raw)
    if m > n and m != planned and (m - 1) % (n - 1) == 0:
        # Some version 3 stacks keep value i at place 10 i, zeros between.
        step = (m - 1) // (n - 1)
        if all(v == 0 for i, v in enumerate(found) if i % step):
            return found[::step]
    return (*found[:n], *(float("nan"),) * (n - m))


class _Same(NamedTuple):
    """The part of a header that is the same in all frames of a scan."""

    version: float
    exe_version: str
    n_planned: int
    n_images: int
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    pixel_size_um: float
    binning: int | None
    mosaic: tuple[int, int]
    images: tuple[Runs, ...]
    reference: Runs
    reference_dtype: np.dtype[Any] | None
    reference_exposure_s: float
    defect: tuple[str, str]


def _same(layout: _Layout, values: Mapping[str, bytes]) -> _Same:
    planned = _integer(values, "imageinfo/noofimages")
    taken = _integer(values, "imageinfo/imagestaken")
    there = len(layout.images)
    rows, columns = _integer(values, "imageinfo/mosiacrows") or 0, _integer(values, "imageinfo/mosiaccolumns") or 0
    mosaic = (rows, columns) if rows > 0 and columns > 0 and rows * columns > 1 else (0, 0)
    wanted = there if taken is None else taken
    defect = layout.defect
    if mosaic[0] and there == 1:
        wanted = min(wanted, 1)  # all tiles stitched into one picture
    elif mosaic[0] and there > 1:
        defect = ("mosaic", f"holds {there} unstitched tiles of a {rows} x {columns} mosaic; stitch them first")
    width, height = _integer(values, "imageinfo/imagewidth"), _integer(values, "imageinfo/imageheight")
    code = _integer(values, "imageinfo/datatype")
    dtype = np.dtype(_CODES.get(code or 0, "<u2"))
    shape = (height or 0, width or 0)
    n = min(max(wanted, 0), there)
    if width is None or height is None or width <= 0 or height <= 0:
        defect = ("corrupt", f"expected the size of its images, got {height} x {width}")
        shape = (0, 0)
    elif code not in _CODES:
        defect = ("corrupt", f"expected a pixel type of {min(_CODES)}..{max(_CODES)}, got {code}")
    elif there == 0 or wanted <= 0:
        defect = (
            "no-image",
            f"expected an image, got none ({max(wanted, 0)} of {planned} taken; an aborted acquisition)",
        )
    elif wanted > there and not defect[0]:
        defect = ("no-image", f"expected {wanted} images, got {there}")
    elif not defect[0]:
        expected = height * width * dtype.itemsize
        wrong = [b for b in layout.image_bytes[:n] if b != expected]
        if wrong:
            defect = ("corrupt", f"expected images of {height} x {width} {dtype} = {expected} bytes, got {wrong[0]}")
    reference: Runs = ()
    reference_dtype: np.dtype[Any] | None = None
    if layout.reference:
        reference_dtype = np.dtype(_CODES.get(_integer(values, "referencedata/datatype") or code or 0, "<u2"))
        if shape[0] * shape[1] * reference_dtype.itemsize == layout.reference_bytes:
            reference = layout.reference
    binning = _integer(values, "imageinfo/horizontalbin") or _integer(values, "imageinfo/camerabinning")
    version = values.get("version", b"")
    return _Same(
        version=struct.unpack_from("<f", version)[0] if len(version) >= 4 else float("nan"),
        exe_version=_text(values.get("exeversion", b"")),
        n_planned=planned if planned is not None and planned > 0 else max(n, 1),
        n_images=n,
        shape=shape,
        dtype=dtype,
        pixel_size_um=_floats(values, "imageinfo/pixelsize", 1, 1)[0],
        binning=binning if binning is not None and 0 < binning <= 64 else None,
        mosaic=mosaic,
        images=layout.images[:n],
        reference=reference,
        reference_dtype=reference_dtype if reference else None,
        reference_exposure_s=_floats(values, "referencedata/exptime", 1, 1)[0],
        defect=defect,
    )


def _header(layout: _Layout, buffers: Sequence[bytes], path: str) -> XrmHeader:
    values: dict[str, bytes] = {}
    for name, pieces in layout.values.items():
        if len(pieces) == 1:
            k, i, j = pieces[0]
            values[name] = buffers[k][i:j]
        else:
            values[name] = b"".join(buffers[k][i:j] for k, i, j in pieces)
    key = tuple([raw for name, raw in values.items() if name not in _EACH])
    same = layout.same.get(key)
    if same is None:
        same = _same(layout, values)
        if len(layout.same) >= 16:
            layout.same.clear()
        layout.same[key] = same
    m, total = max(same.n_images, 1), same.n_planned
    dates = values.get("imageinfo/date", b"")
    if m == 1:
        starts: tuple[float, ...] = (_seconds(dates[:40].partition(b"\0")[0]),)
    else:
        stride = len(dates) // total if dates and len(dates) % total == 0 else 40
        starts = tuple(_seconds(dates[i * stride : (i + 1) * stride].partition(b"\0")[0]) for i in range(m))
    exposure = "imageinfo/exptimes" if values.get("imageinfo/exptimes") else "imageinfo/exptime"
    k, start = layout.modified
    filetime = int.from_bytes(buffers[k][start : start + 8], "little")
    header = XrmHeader(
        path,
        layout.size,
        same.version,
        same.exe_version,
        total,
        same.n_images,
        same.shape,
        same.dtype,
        _floats(values, "imageinfo/angles", m, total),
        _floats(values, "imageinfo/energy", m, total),
        _floats(values, exposure, m, total),
        starts,
        _floats(values, "imageinfo/xposition", m, total),
        _floats(values, "imageinfo/yposition", m, total),
        _floats(values, "imageinfo/zposition", m, total),
        _floats(values, "imageinfo/ionchambercurrent", m, total),
        filetime / 1e7 - _EPOCH_1601 if filetime else float("nan"),
        same.pixel_size_um,
        same.binning,
        _text(values.get("acquisitionsettings/acqfilename", b"")),
        same.mosaic,
        same.images,
        same.reference,
        same.reference_dtype,
        same.reference_exposure_s,
    )
    if same.defect[0]:
        name = Path(path).name
        raise XrmError(f"{name}: {same.defect[1]}", same.defect[0], name, header)
    return header


_EPOCH_1601 = 11644473600  # seconds from 1601 (FILETIME) to 1970


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        reason, text = "missing", "the file is not there"
    except (OSError, ValueError) as error:
        reason, text = "unreadable", f"cannot be opened ({getattr(error, 'strerror', None) or error})"
    name = Path(path).name[:120]
    raise XrmError(f"{name}: {text}", reason, name)


def _header_of(fd: int, path: str, size: int) -> XrmHeader:
    known = _layouts.get(size, ())
    for layout in known:
        buffers = _match(layout, fd)
        if buffers is not None:
            return _header(layout, buffers, path)
    name = Path(path).name
    first = _pread(fd, 64, 0)
    if not first:
        raise XrmError(f"{name}: expected an XRM file, got an empty one; copy it again", "empty", name)
    if first.startswith(_LFS):
        text = f"{name}: expected an XRM file, got a Git LFS pointer; fetch the real file with `git lfs pull`"
        raise XrmError(text, "lfs-pointer", name)
    if first[:8] != _MAGIC:
        raise XrmError(f"{name}: expected an XRM file (an OLE2 container), got something else", "not-xrm", name)
    if size < 1536:
        raise XrmError(f"{name}: {size} bytes are less than any XRM file has; copy it again", "truncated", name)
    with os.fdopen(os.dup(fd), "rb") as file:
        try:
            layout = _parse(file, size)
        except _Bad as bad:
            reason = bad.reason
            raise XrmError(f"{name}: {bad}", reason, name) from None
    if not layout.images and "imageinfo/imagewidth" not in layout.values:
        raise XrmError(f"{name}: an OLE2 container, but without the streams of an XRM file", "not-xrm", name)
    buffers = _match(layout, fd)
    if buffers is None:
        raise XrmError(f"{name}: the file changed while it was read; open it again", "unreadable", name)
    _remember(layout)
    return _header(layout, buffers, path)


def read_header(path: str | os.PathLike[str]) -> XrmHeader:
    """Read what an ``.xrm`` or ``.txrm`` file says about itself; no pixels.

    Raises
    ------
    XrmError
        Whenever not every image is whole; its `header` holds what could be read.
    """
    path = os.fspath(path)
    fd = _open(path)
    try:
        return _learn(fd, path, os.fstat(fd))
    except OSError as error:
        name = Path(path).name
        raise XrmError(f"{name}: cannot be read ({error.strerror or error})", "unreadable", name) from None
    finally:
        os.close(fd)


# ---------------------------------------------------------------------------------------------- pixels

_Place = tuple[tuple[int, int], XrmHeader]
_places: dict[str, _Place] = {}  # path -> ((bytes, mtime_ns), header) of the files pixels were read from


def _placed(fd: int, path: str) -> XrmHeader:
    """Return the header of an open file, from memory while the file is the same."""
    stat = os.fstat(fd)
    known = _places.get(path)
    if known is not None and known[0] == (stat.st_size, stat.st_mtime_ns):
        return known[1]
    return _learn(fd, path, stat)


def _learn(fd: int, path: str, stat: os.stat_result) -> XrmHeader:
    header = _header_of(fd, path, stat.st_size)
    # A file written a moment ago may change again without a new time: clocks of file systems are coarse.
    if time.time_ns() - stat.st_mtime_ns > 1_000_000_000:
        if len(_places) > 50_000:
            _places.clear()
        _places[path] = ((stat.st_size, stat.st_mtime_ns), header)
    return header


if hasattr(os, "preadv"):

    def _read_into(fd: int, view: memoryview, offset: int) -> int:
        return os.preadv(fd, [view], offset)

else:

    def _read_into(fd: int, view: memoryview, offset: int) -> int:
        data = _pread(fd, len(view), offset)
        view[: len(data)] = data
        return len(data)


def _fill(fd: int, out: memoryview, runs: Runs, start: int, name: str) -> None:
    """Read ``len(out)`` bytes of a stream from its byte `start` on; short is an error."""
    done = 0
    for offset, length in runs:
        if start >= length:
            start -= length
            continue
        end = min(len(out), done + length - start)
        offset += start
        start = 0
        while done < end:
            n = _read_into(fd, out[done:end], offset)
            if n <= 0:
                raise XrmError(f"{name}: the file ends inside the image; copy it again", "truncated", name)
            done += n
            offset += n
        if done == len(out):
            return
    if done < len(out):
        raise XrmError(f"{name}: the file ends inside the image; copy it again", "truncated", name)


@dataclass(frozen=True)
class XrmFrames:
    """Frames in XRM files as a lazy, picklable `FrameSource`; no file stays open between two calls.

    Parameters
    ----------
    paths : tuple of str
        The file of every frame; it need not exist until the frame is read.
    numbers : tuple of int
        The image in that file, from 1; 0 is the file's embedded reference.
    shape : tuple of int
        (rows, columns) as stored.
    stored : numpy.dtype
        Type as stored.
    flip_rows : bool
        Turn every frame upside down.
    bin : int
        Sum ``bin x bin`` stored pixels into one; rows and columns left over at the end are dropped.
    """

    paths: tuple[str, ...]
    numbers: tuple[int, ...]
    shape: tuple[int, int]
    stored: np.dtype[Any]
    flip_rows: bool = False
    bin: int = 1

    def __post_init__(self) -> None:
        if len(self.paths) != len(self.numbers):
            raise ValueError(f"expected one number a path, got {len(self.paths)} and {len(self.numbers)}")

    @classmethod
    def of(cls, path: str | os.PathLike[str], *, flip_rows: bool = False, bin: int = 1) -> XrmFrames:
        """Return the images of one file.

        Raises
        ------
        XrmError
            The file is none, or not whole.
        """
        header = read_header(path)
        n = header.n_images
        return cls((header.path,) * n, tuple(range(1, n + 1)), header.shape, header.dtype, flip_rows, bin)

    @property
    def frame_shape(self) -> tuple[int, int]:
        """(rows, columns) of every frame, after binning."""
        return self.shape[0] // self.bin, self.shape[1] // self.bin

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the counts: as stored, or wide enough for the sum of a bin."""
        if self.bin == 1:
            return self.stored
        return np.dtype(np.float32 if self.stored.kind == "f" else np.uint32 if self.stored.kind == "u" else np.int32)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> npt.NDArray[Any]:
        """Return frame `index`, shape (y, x).

        Raises
        ------
        XrmError
            The file is gone, short, or not what it was.
        """
        result: npt.NDArray[Any] = self.read_rows((index,), 0, self.frame_shape[0])[0]
        return result

    def read_rows(self, indices: Sequence[int], y0: int, y1: int) -> npt.NDArray[Any]:
        """Return rows ``y0:y1`` of the frames `indices`, shape (frame, y1 - y0, x); only these rows are read.

        Raises
        ------
        XrmError
            A file is gone, short, or not what it was.
        """
        rows, columns = self.frame_shape
        if not 0 <= y0 <= y1 <= rows:
            raise ValueError(f"expected rows within 0..{rows}, got {y0}:{y1}")
        a, b = (rows - y1, rows - y0) if self.flip_rows else (y0, y1)
        out = np.empty((len(indices), (b - a) * self.bin, self.shape[1]), dtype=self.stored)
        if out.size:
            start = a * self.bin * self.shape[1] * self.stored.itemsize
            for target, index in zip(out, indices, strict=True):
                self._read_one(index, memoryview(target).cast("B"), start)
        if self.bin > 1:
            cut = out[:, :, : columns * self.bin].reshape(len(indices), b - a, self.bin, columns, self.bin)
            out = cut.sum(axis=(2, 4), dtype=self.dtype)
        return out[:, ::-1] if self.flip_rows else out

    def _read_one(self, index: int, out: memoryview, start: int) -> None:
        path, number = self.paths[index], self.numbers[index]
        fd = _open(path)
        try:
            header = _placed(fd, path)
            name = Path(path).name
            if number == 0:
                runs, dtype = header.reference, header.reference_dtype
            else:
                runs = header.images[number - 1] if number <= len(header.images) else ()
                dtype = header.dtype
            if not runs:
                raise XrmError(f"{name}: expected image {number}, got a file without it", "no-image", name)
            if header.shape != self.shape or dtype != self.stored:
                text = f"{name}: expected {self.shape} {self.stored}, got {header.shape} {dtype}"
                raise XrmError(text, "other-size", name)
            _fill(fd, out, runs, start, name)
        except OSError as error:
            name = Path(path).name
            raise XrmError(f"{name}: cannot be read ({error.strerror or error})", "unreadable", name) from None
        finally:
            os.close(fd)

    def fingerprint(self) -> str:
        """Return 16 hex digits that change when a file behind a frame changes (name, size, time)."""
        digest = hashlib.sha256(repr((self.shape, self.stored.str, self.flip_rows, self.bin)).encode())
        for path, number in zip(self.paths, self.numbers, strict=True):
            try:
                stat = Path(path).stat()
                stamp = (stat.st_size, stat.st_mtime_ns)
            except (OSError, ValueError):
                stamp = (-1, -1)
            digest.update(repr((Path(path).name, number, stamp)).encode())
        return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------- writing

_AXES = (
    *(f"Sample {a}" for a in ("X", "Y", "Z", "Theta")),
    *(f"Condenser {a}" for a in ("X", "Y", "Z", "Tip", "Tilt")),
    *(f"{part} {a}" for part in ("Pinhole", "Zoneplate", "Phasering") for a in "XYZ"),
    "Phasering W",
    "Tubelens",
)
_AXIS_NAMES = b"".join(a.encode().ljust(25, b"\0") for a in _AXES)
_AXIS_UNITS = b"".join((b"deg" if "Theta" in a else b"um").ljust(15, b"\0") for a in _AXES)


@dataclass(frozen=True, slots=True)
class _Plan:
    """A container without its values: the same for all files whose streams have the same sizes."""

    template: bytes  # the file up to its first trailing image
    places: dict[str, tuple[tuple[int, int, int], ...]]  # stream -> (offset in the file, start, stop in the stream)
    times: tuple[int, ...]  # offsets of the storages' modification times
    total: int


def _fix_point(n_other: int, per_sector: int) -> tuple[int, int]:
    """Return the numbers of FAT and DIFAT sectors that also describe themselves."""
    n_fat = n_difat = 0
    while True:
        total = n_other + n_fat + n_difat
        fat = -(-total // per_sector)
        difat = max(0, -(-(fat - 109) // (per_sector - 1)))
        if (fat, difat) == (n_fat, n_difat):
            return fat, difat
        n_fat, n_difat = fat, difat


def _tree(names: Sequence[tuple[bytes, int]], links: npt.NDArray[np.uint32], colour: npt.NDArray[np.uint8]) -> int:
    """Link the entries of one storage, sorted, as a balanced tree; return its root.

    All levels but the last are full, so the last one red and all others black is a red-black tree.
    """
    depth_full = (len(names) + 1).bit_length() - 1  # levels that are full

    def build(lo: int, hi: int, level: int) -> int:
        if lo >= hi:
            return _FREE
        mid = (lo + hi) // 2
        node = names[mid][1]
        colour[node] = 1 if level < depth_full else 0
        links[node, 0] = build(lo, mid, level + 1)
        links[node, 1] = build(mid + 1, hi, level + 1)
        return node

    return build(0, len(names), 0)


@lru_cache(maxsize=16)
def _plan(sizes: tuple[tuple[str, int], ...], pixels: frozenset[str], sector: int, layout: str) -> _Plan:
    # Directory: entry 0 is the root; storages as they first appear.
    names, kinds, parents = ["Root Entry"], [5], [-1]
    number = {"": 0}
    entry_of: dict[str, int] = {}
    for path, _ in sizes:
        parts = path.split("/")
        for depth in range(1, len(parts) + 1):
            key = "/".join(parts[:depth])
            if key not in number:
                number[key] = len(names)
                names.append(parts[depth - 1])
                kinds.append(2 if depth == len(parts) else 1)
                parents.append(number["/".join(parts[: depth - 1])])
        entry_of[path] = number[path]
    n = len(names)
    links = np.full((n, 3), _FREE, dtype=np.uint32)
    colour = np.ones(n, dtype=np.uint8)
    kids: dict[int, list[int]] = {}
    for i, parent in enumerate(parents):
        kids.setdefault(parent, []).append(i)
    for storage, members in kids.items():
        if storage >= 0:
            order = sorted(
                (len(names[i].encode("utf-16-le")), names[i].upper().encode("utf-16-be"), i) for i in members
            )
            links[storage, 2] = _tree([(name, i) for _, name, i in order], links, colour)

    mini = [(p, s) for p, s in sizes if 0 < s < _CUTOFF]
    large = sorted(((p, s) for p, s in sizes if s >= _CUTOFF), key=lambda ps: ps[0] in pixels)
    n_mini = sum(-(-s // _MINI) for _, s in mini)
    per = sector // 4
    n_dir = -(-n * _ENTRY // sector)
    n_mini_fat = -(-n_mini // per)
    n_ms = -(-n_mini * _MINI // sector)
    n_large = sum(-(-s // sector) for _, s in large)
    n_fat, n_difat = _fix_point(n_dir + n_mini_fat + n_ms + n_large, per)
    total = n_fat + n_difat + n_dir + n_mini_fat + n_ms + n_large

    fat = np.full(n_fat * per, _FREE, dtype="<u4")
    at = n_large if layout == "first" else 0

    def take(count: int) -> npt.NDArray[np.int64]:
        nonlocal at
        at += count
        return np.arange(at - count, at)

    def link(sectors: npt.NDArray[np.int64]) -> int:
        if not sectors.size:
            return _END
        fat[sectors[:-1]] = sectors[1:]
        fat[sectors[-1]] = _END
        return int(sectors[0])

    fat_sectors, difat = take(n_fat), take(n_difat)
    directory, mini_fat_sectors, ms = take(n_dir), take(n_mini_fat), take(n_ms)
    fat[fat_sectors], fat[difat] = _FATSECT, _DIFSECT
    first_dir, first_mini_fat, first_ms = link(directory), link(mini_fat_sectors), link(ms)
    pool = np.arange(n_large) if layout == "first" else take(n_large)
    if layout == "scattered":  # every second sector, backwards: no two neighbours follow each other
        pool = np.concatenate((pool[::2], pool[1::2]))[::-1]

    starts = dict.fromkeys(entry_of, _END)
    places: dict[str, tuple[tuple[int, int, int], ...]] = dict.fromkeys(entry_of, ())
    used = 0
    for path, size in large:
        count = -(-size // sector)
        own = pool[used : used + count]
        used += count
        starts[path] = link(own)
        pieces = _merge([(int(s + 1) * sector, sector) for s in own])
        done, out = 0, []
        for offset, length in pieces:
            length = min(length, size - done)
            out.append((offset, done, done + length))
            done += length
        places[path] = tuple(out)
    mini_fat = np.full(n_mini_fat * per, _FREE, dtype="<u4")
    ms_start = (int(ms[0]) + 1) * sector if n_ms else 0
    used = 0
    for path, size in mini:
        count = -(-size // _MINI)
        mini_fat[used : used + count - 1] = np.arange(used + 1, used + count)
        mini_fat[used + count - 1] = _END
        starts[path] = used
        places[path] = ((ms_start + used * _MINI, 0, size),)
        used += count

    trailing = [p for p, _ in large if p in pixels] if layout == "last" else []
    length = places[trailing[0]][0][0] if trailing else (total + 1) * sector
    buffer = bytearray(length)
    header = struct.pack(
        "<8s16xHHHHH6xIIIIIIIIII",
        _MAGIC,
        0x3E,
        4 if sector == 4096 else 3,
        0xFFFE,
        sector.bit_length() - 1,
        6,
        n_dir if sector == 4096 else 0,
        n_fat,
        first_dir,
        0,
        _CUTOFF,
        first_mini_fat,
        n_mini_fat,
        int(difat[0]) if n_difat else _END,
        n_difat,
        _FREE,
    )[:76]
    buffer[:76] = header
    listed = np.full(109, _FREE, dtype="<u4")
    listed[: min(109, n_fat)] = fat_sectors[:109]
    buffer[76:512] = listed.tobytes()

    def put(sectors: npt.NDArray[np.int64], data: bytes) -> None:
        if sectors.size:
            offset = (int(sectors[0]) + 1) * sector
            buffer[offset : offset + len(data)] = data

    put(fat_sectors, fat.tobytes())
    rest = fat_sectors[109:]
    for i, s in enumerate(difat):
        block = np.full(per, _FREE, dtype="<u4")
        part = rest[i * (per - 1) : (i + 1) * (per - 1)]
        block[: len(part)] = part
        block[-1] = difat[i + 1] if i + 1 < n_difat else _END
        put(np.array([s]), block.tobytes())
    put(mini_fat_sectors, mini_fat.tobytes())

    sizes_of = dict(sizes)
    path_of = {i: p for p, i in entry_of.items()}
    entries = bytearray()
    times = []
    base = (int(directory[0]) + 1) * sector
    for i in range(n):
        name = names[i].encode("utf-16-le")
        if kinds[i] == 2:
            first, size = starts[path_of[i]], sizes_of[path_of[i]]
        else:
            first, size = (first_ms, n_mini * _MINI) if i == 0 else (0, 0)
            times.append(base + i * _ENTRY + 108)
        entries += struct.pack(
            "<64sHBBIII16xIQQIQ",
            name,
            len(name) + 2,
            kinds[i],
            int(colour[i]),
            *(int(v) for v in links[i]),
            0,
            0,
            0,
            first,
            size,
        )
    while len(entries) < n_dir * sector:
        entries += struct.pack("<64sHBBIII16xIQQIQ", b"", 0, 0, 0, _FREE, _FREE, _FREE, 0, 0, 0, 0, 0)
    put(directory, bytes(entries))
    return _Plan(bytes(buffer), places, tuple(times), (total + 1) * sector)


def _per_image(value: float | Sequence[float] | npt.NDArray[Any], n: int, name: str) -> npt.NDArray[np.float64]:
    values = np.asarray(value, dtype=np.float64).ravel()
    if values.size == 1:
        return np.full(n, values[0])
    if values.size != n:
        raise ValueError(f"{name}: expected 1 or {n} values, got {values.size}")
    return values


_1970 = datetime(1970, 1, 1)


def _clock(date: float | datetime) -> datetime:
    return date.replace(tzinfo=None) if isinstance(date, datetime) else _1970 + timedelta(seconds=float(date))


def write_xrm(
    path: str | os.PathLike[str],
    frames: npt.ArrayLike,
    *,
    theta_deg: float | Sequence[float] | npt.NDArray[Any] = 0.0,
    exposure_s: float | Sequence[float] | npt.NDArray[Any] = 1.0,
    energy_ev: float | Sequence[float] | npt.NDArray[Any] = 0.0,
    x_um: float | Sequence[float] | npt.NDArray[Any] = 0.0,
    y_um: float | Sequence[float] | npt.NDArray[Any] = 0.0,
    z_um: float | Sequence[float] | npt.NDArray[Any] = 0.0,
    date: float | datetime | Sequence[float] | Sequence[datetime] = 0.0,
    ion_chamber: float | Sequence[float] | npt.NDArray[Any] = 0.12,
    pixel_size_um: float = 0.023,
    binning: int = 2,
    acq_file_name: str | None = None,
    version: float = 5.0,
    n_planned: int | None = None,
    reference: npt.ArrayLike | None = None,
    reference_exposure_s: float = 1.0,
    extra: Mapping[str, bytes] | None = None,
    omit: Collection[str] = (),
    layout: Literal["last", "first", "scattered"] = "last",
    sector: Literal[4096, 512] = 4096,
) -> None:
    """Write frames as an ``.xrm`` (one) or ``.txrm`` (several) file.

    The same arguments give the same bytes. The defaults of `energy_ev` and `pixel_size_um` are what
    SSRL 6-2c stores: no energy, and a pixel size that is never updated.

    Parameters
    ----------
    path : path-like
        The file; overwritten.
    frames : (y, x) or (n, y, x) array
        Counts; u8, u16, f32 and the other integer and float types of the format.
    theta_deg, exposure_s, energy_ev, x_um, y_um, z_um, date, ion_chamber
        One value, or one an image. `date` is the instrument's local clock, a datetime or seconds since
        1970; the container's own time is taken from it too, as if it were UTC.
    binning : int
        Camera binning.
    acq_file_name : str, optional
        The path the instrument wrote to; by default one made from the name of `path`.
    version : float
        3, 4 or 5.
    n_planned : int, optional
        Number of images planned, when the acquisition was cut short.
    reference : (y, x) array, optional
        A reference image to embed.
    extra, omit
        Further streams (path in the container to bytes), and streams to leave out.
    layout, sector
        Images at the end of the file, at its beginning, or in scattered sectors of 4096 or 512 bytes:
        readers have to cope with all of them.
    """
    data = np.asarray(frames)
    data = data[None] if data.ndim == 2 else data
    if data.ndim != 3 or not data.size:
        raise ValueError(f"frames: expected (y, x) or (n, y, x), got {data.shape}")
    little = data.dtype.newbyteorder("<")
    code = {v: k for k, v in _CODES.items()}.get(f"<{little.kind}{little.itemsize}")
    if code is None:
        raise ValueError(f"frames: expected an integer or float type, got {data.dtype}")
    n, height, width = data.shape
    planned = n if n_planned is None else n_planned
    angle = _per_image(theta_deg, n, "theta_deg")
    position = [_per_image(v, n, a) for v, a in ((x_um, "x_um"), (y_um, "y_um"), (z_um, "z_um"))]
    clocks = [_clock(d) for d in date] if isinstance(date, Sequence) else [_clock(date)] * n
    if len(clocks) != n:
        raise ValueError(f"date: expected 1 or {n} values, got {len(clocks)}")
    name = Path(path).name
    acquired = f"C:\\TXMDATA\\{name}" if acq_file_name is None else acq_file_name

    def floats(values: npt.NDArray[Any]) -> bytes:
        return values.astype("<f4").tobytes() + bytes(4 * (planned - n))

    def i4(value: int) -> bytes:
        return struct.pack("<i", value)

    def f4(value: float) -> bytes:
        return struct.pack("<f", value)

    def text(value: str, length: int) -> bytes:
        return value.encode("cp1252", errors="replace")[: length - 1].ljust(length, b"\0")

    motors = np.zeros((n, len(_AXES)), dtype="<f4")
    motors[:, 0], motors[:, 1], motors[:, 2], motors[:, 3] = *position, angle
    modern = version >= 4
    streams: dict[str, bytes] = {"Version": f4(version)}
    if modern:
        streams["exeVersion"] = text("12.1.5339.17569" if version >= 5 else "10.6.2605.12638", 260)
    info: dict[str, bytes] = {
        "AcquisitionMode": i4(2 if n == 1 else 0),
        "Angles": floats(angle),
        "CameraName": text("CCD", 80),
        "DataType": i4(code),
        "Date": b"".join(c.strftime("%m/%d/%y %H:%M:%S").encode().ljust(40, b"\0") for c in clocks)
        + bytes(40 * (planned - n)),
        "DtoRADistance": floats(np.ones(n)),
        "Energy": floats(_per_image(energy_ev, n, "energy_ev")),
        "ExpTimes": floats(_per_image(exposure_s, n, "exposure_s")),
        "HorizontalBin": i4(binning),
        "ImageHeight": i4(height),
        "ImageWidth": i4(width),
        "ImagesPerProjection": i4(1),
        "ImagesTaken": i4(n),
        "IonChamberCurrent": floats(_per_image(ion_chamber, n, "ion_chamber")),
        "MosiacColumns": i4(0),
        "MosiacRows": i4(0),
        "NoOfImages": i4(planned),
        "NoOfImagesAveraged": i4(1),
        "ObjectiveName": text("", 260),
        "OpticalMagnification": f4(10.0),
        "PixelSize": f4(pixel_size_um),
        "StoRADistance": floats(np.ones(n)),
        "Temperature": i4(-30),
        "VerticalalBin": i4(binning),
        "XPosition": floats(position[0]),
        "XrayMagnification": floats(np.ones(n)),
        "YPosition": floats(position[1]),
        "ZPosition": floats(position[2]),
    }
    if modern:
        info |= {"FileType": i4(0), "HasImage": i4(1)}
    if version >= 5:
        info |= {"CamFullWidth": i4(2048), "CamPixelSize": f4(13.5), "CameraBinning": i4(binning)}
    streams |= {f"ImageInfo/{key}": value for key, value in info.items()}
    streams |= {
        "PositionInfo/AxisNames": _AXIS_NAMES,
        "PositionInfo/AxisUnits": _AXIS_UNITS,
        "PositionInfo/MotorPositions": motors.tobytes(),
        "PositionInfo/NoOfImages": i4(n),
        "PositionInfo/TotalAxis": i4(len(_AXES)),
    }
    if modern:
        streams["AcquisitionSettings/AcqFileName"] = text(acquired, 260)
    images: dict[str, npt.NDArray[Any]] = {}
    if reference is not None:
        flat = np.ascontiguousarray(np.asarray(reference), dtype=np.asarray(reference).dtype.newbyteorder("<"))
        streams["ReferenceData/DataType"] = i4({v: k for k, v in _CODES.items()}[f"<{flat.dtype.kind}{flat.itemsize}"])
        streams["ReferenceData/ExpTime"] = f4(reference_exposure_s)
        if version >= 5:
            streams["ReferenceData/ImageInfo/ImageHeight"] = i4(flat.shape[0])
            streams["ReferenceData/ImageInfo/ImageWidth"] = i4(flat.shape[1])
        images["ReferenceData/Image"] = flat
    for i in range(n):
        images[f"ImageData{i // _PER_GROUP + 1}/Image{i + 1}"] = data[i]
    streams |= extra or {}
    for key in omit:
        streams.pop(key, None)
        images.pop(key, None)

    sizes = tuple((p, len(v)) for p, v in streams.items()) + tuple((p, v.nbytes) for p, v in images.items())
    plan = _plan(sizes, frozenset(images), sector, layout)
    buffer = bytearray(plan.template)
    # integer arithmetic: the time stamp has to be the same on every machine
    since = clocks[-1] - _1970
    filetime = (_EPOCH_1601 + since.days * 86400 + since.seconds) * 10_000_000 + since.microseconds * 10
    stamp = struct.pack("<Q", max(filetime, 0))
    for offset in plan.times:
        buffer[offset : offset + 8] = stamp
    for key, value in streams.items():
        for offset, start, stop in plan.places[key]:
            buffer[offset : offset + stop - start] = value[start:stop]
    trailing: list[npt.NDArray[Any]] = []
    for key, image in images.items():
        flat = np.ascontiguousarray(image, dtype=image.dtype.newbyteorder("<"))
        if plan.places[key][0][0] >= len(buffer):
            trailing.append(flat)
            continue
        view = flat.data.cast("B")
        for offset, start, stop in plan.places[key]:
            buffer[offset : offset + stop - start] = view[start:stop]
    with Path(path).open("wb", buffering=0) as file:
        _write_all(file, buffer)
        for flat in trailing:
            _write_all(file, flat.data.cast("B"))
            if flat.nbytes % sector:
                _write_all(file, bytes(-flat.nbytes % sector))


def _write_all(file: Any, data: bytes | bytearray | memoryview) -> None:
    view = memoryview(data)
    while len(view):  # an unbuffered write may be short
        view = view[file.write(view) :]
