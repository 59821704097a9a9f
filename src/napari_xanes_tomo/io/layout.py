"""The layout of an XRM file: where its values and images lie, proven for every further file of the same layout.

olefile is the authority on what a container holds. Most files of a scan are laid out alike: where a file's
header, FAT, mini FAT and directory are byte for byte those of one already parsed, its values are taken from
the same places without it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from .cfb import ENTRY, OLE_ERRORS, Container, Damage, Runs, merge_runs, read_into

__all__ = ["CODES", "PER_GROUP", "Layout", "match", "parse"]

CODES = {2: "<i1", 3: "<u1", 4: "<i2", 5: "<u2", 6: "<i4", 7: "<u4", 8: "<i8", 9: "<u8", 10: "<f4", 11: "<f8"}
"""Type of the pixels by the number in ``DataType``."""

PER_GROUP = 100  # images in one ImageData storage

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
_WANTED = frozenset(
    (
        "version",
        "exeversion",
        "acquisitionsettings/acqfilename",
        *(
            f"{storage}/{name}"
            for storage in ("referencedata", "multireferencedata")
            for name in ("datatype", "exptime", "imageinfo/exptimes", "imageinfo/imageheight", "imageinfo/imagewidth")
        ),
        *(f"imageinfo/{name.lower()}" for name in _INFO),
    )
)
EACH = frozenset(
    f"imageinfo/{name}"
    for name in (
        *("angles", "date", "energy", "exptime", "exptimes", "ionchambercurrent"),
        *("xposition", "yposition", "zposition"),
    )
) | {"acquisitionsettings/acqfilename"}
"""The streams whose values differ from frame to frame."""

_LARGEST_VALUE = 4 << 20  # bytes; no metadata stream of a real file comes near


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies in files of one layout, and the bytes that prove a file has it."""

    size: int
    reads: Runs
    proof: tuple[tuple[int, int, bytes], ...]  # (number of the read, start in it, the bytes)
    values: dict[str, tuple[tuple[int, int, int], ...]]  # stream -> pieces (read, start, stop)
    image_bytes: tuple[int, ...]
    images: tuple[Runs, ...]
    defect: tuple[str, str]  # (reason, what) of the first image that is not whole
    references: tuple[tuple[Runs, int], ...]  # the embedded reference images and their bytes
    modified: tuple[int, int]  # where the root entry keeps its time: (read, start)
    same: list[tuple[tuple[tuple[int, int, bytes], ...], Any]] = field(default_factory=list)
    """What its files have in common once understood, behind the bytes that say so; the latest first."""

    def raw(self, path: str, buffers: Sequence[bytearray]) -> bytes:
        """Return the bytes of a stream, empty where there is none."""
        return b"".join([buffers[k][i:j] for k, i, j in self.values.get(path, ())])


def parse(file: BinaryIO, size: int) -> Layout:
    """Read the layout of a container with olefile.

    Raises
    ------
    Damage
        It cannot be trusted.
    """
    try:
        box = Container(file, size)
    except OLE_ERRORS as error:
        text = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise Damage("corrupt", f"the container is damaged ({text})") from None
    streams = box.streams()

    images: list[Runs] = []
    image_bytes: list[int] = []
    defect = ("", "")
    number = 1
    # Images before anything else: nothing may lie on their sectors.
    while (entry := streams.pop(f"imagedata{-(-number // PER_GROUP)}/image{number}", None)) is not None:
        try:
            images.append(box.place(*entry, f"image {number}", claim=True))
        except Damage as bad:
            defect = defect if defect[0] else (bad.reason, str(bad))
            images.append(())
        image_bytes.append(entry[1])
        number += 1
    references = _references(box, streams)

    where: dict[str, Runs] = {}
    for path in _WANTED.intersection(streams):
        entry = streams[path]
        try:
            if 0 < entry[1] <= _LARGEST_VALUE:
                where[path] = box.place(*entry, path)
        except Damage as bad:
            if not defect[0]:
                defect = (bad.reason, str(bad))  # its pixels may be whole, but not what they mean

    tables = sorted({*box.fat_sectors, *box.difat, *map(int, box.directory), *map(int, box.mini_fat_sectors)})
    structure = [(0, 512), *((box.offset(s), box.sector) for s in tables)]
    structure = [(o, min(n, size - o)) for o, n in merge_runs(structure)]
    reads = tuple(merge_runs(sorted([*structure, *(piece for runs in where.values() for piece in runs)]), gap=8192))
    starts = np.array([o for o, _ in reads])

    def place(offset: int) -> tuple[int, int]:
        k = int(np.searchsorted(starts, offset, side="right")) - 1
        return k, offset - reads[k][0]

    # The times (bytes 100..115 of a directory entry) are the only structure that may differ.
    times: list[int] = []
    for sector in map(int, box.directory):
        at = box.offset(sector)
        raw = box.read(at, box.sector)
        times += [at + i + 100 for i in range(0, box.sector, ENTRY) if raw[i + 66] in (1, 5)]
    times.sort()
    proof = []
    for offset, length in structure:
        at = offset
        for cut in [t for t in times if offset <= t < offset + length] + [offset + length]:
            if cut > at:
                proof.append((*place(at), box.read(at, cut - at)))
            at = cut + 16
    values = {
        path: tuple((k, i, i + n) for (k, i), n in ((place(o), n) for o, n in runs)) for path, runs in where.items()
    }
    modified = place(box.offset(int(box.directory[0])) + 108)
    return Layout(size, reads, tuple(proof), values, tuple(image_bytes), tuple(images), defect, references, modified)


def _references(box: Container, streams: dict[str, tuple[int, int]]) -> tuple[tuple[Runs, int], ...]:
    """Where the embedded reference images lie, those that are whole; one, or several in ``MultiReferenceData``."""
    found: list[tuple[Runs, int]] = []
    names = ["referencedata/image"]
    if names[0] not in streams:
        paths = (path.partition("multireferencedata/image")[2] for path in streams)
        numbers = sorted(int(n) for n in paths if n.isascii() and n.isdecimal() and len(n) < 7)
        names = [f"multireferencedata/image{n}" for n in numbers]
    for name in names:
        if (entry := streams.pop(name, None)) is None:
            continue
        try:
            runs = box.place(*entry, "the reference", claim=True)
        except Damage:  # a frame without its reference is still a frame
            continue
        if runs:
            found.append((runs, entry[1]))
    return tuple(found)


class _Scratch(threading.local):
    """Where a thread reads the structure of one file after the other, while their layout stays."""

    layout: Layout | None = None
    buffers: tuple[bytearray, ...] = ()


_scratch = _Scratch()
_LARGEST_SCRATCH = 1 << 20  # bytes that a thread keeps


def match(layout: Layout, fd: int) -> Sequence[bytearray] | None:
    """Return the bytes at the places of a layout when they prove that the file has it; good until the next call."""
    if _scratch.layout is layout:
        buffers = _scratch.buffers
    else:
        buffers = tuple([bytearray(length) for _, length in layout.reads])
        if sum(map(len, buffers)) <= _LARGEST_SCRATCH:
            _scratch.layout, _scratch.buffers = layout, buffers
    for (offset, length), buffer in zip(layout.reads, buffers, strict=True):
        if read_into(fd, memoryview(buffer), offset) != length:
            return None
    for k, start, expected in layout.proof:
        if not buffers[k].startswith(expected, start):
            return None
    return buffers


_layouts: dict[int, tuple[Layout, ...]] = {}  # by file size, the newest first; replaced, never changed in place
_MAX_LAYOUTS = (64, 4)


def known(size: int) -> tuple[Layout, ...]:
    """Return the layouts seen before in files of this size, the newest first."""
    return _layouts.get(size, ())


def remember(layout: Layout) -> None:
    """Keep a layout for the next file."""
    if len(_layouts) >= _MAX_LAYOUTS[0]:
        _layouts.clear()
    _layouts[layout.size] = (layout, *_layouts.get(layout.size, ())[: _MAX_LAYOUTS[1] - 1])
