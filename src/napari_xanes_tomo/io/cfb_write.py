"""Compound files (MS-CFB): writing them, with the sectors laid out in every way that programs do.

The directory and the allocation tables depend on the sizes of the streams alone: they are planned once for all files
whose streams have the same sizes.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .cfb import CUTOFF, DIFSECT, END, ENTRY, FATSECT, FREE, MAGIC, MINI, merge_runs

__all__ = ["Layout", "write_container"]

I64 = npt.NDArray[np.int64]
Layout = Literal["last", "first", "scattered"]
_ENTRY = "<64sHBBIII16xIQQIQ"
_LISTED = 109  # sectors of the allocation table that the header itself names
_ROOT, _STORAGE, _STREAM = 5, 1, 2


@dataclass(frozen=True, slots=True)
class _Plan:
    """A container without its values."""

    template: bytes  # the file up to its first trailing image
    places: dict[str, tuple[tuple[int, int, int], ...]]  # stream -> (offset in the file, start, stop in the stream)
    times: tuple[int, ...]  # offsets of the storages' modification times


@dataclass(frozen=True, slots=True)
class _Directory:
    """Entries of a container, the root first, and how they hang together."""

    names: list[str]
    kinds: list[int]
    links: npt.NDArray[np.uint32]  # (entries, 3) left, right, child
    colour: npt.NDArray[np.uint8]
    entry_of: dict[str, int]  # stream -> its entry


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
            return FREE
        mid = (lo + hi) // 2
        node = names[mid][1]
        colour[node] = 1 if level < depth_full else 0
        links[node, 0] = build(lo, mid, level + 1)
        links[node, 1] = build(mid + 1, hi, level + 1)
        return node

    return build(0, len(names), 0)


def _directory(paths: Sequence[str]) -> _Directory:
    """Make the entries of all streams and of the storages they lie in, as these first appear."""
    names, kinds, parents = ["Root Entry"], [_ROOT], [-1]
    number = {"": 0}
    for path in paths:
        parts = path.split("/")
        for depth in range(1, len(parts) + 1):
            key = "/".join(parts[:depth])
            if key not in number:
                number[key] = len(names)
                names.append(parts[depth - 1])
                kinds.append(_STREAM if depth == len(parts) else _STORAGE)
                parents.append(number["/".join(parts[: depth - 1])])
    links = np.full((len(names), 3), FREE, dtype=np.uint32)
    colour = np.ones(len(names), dtype=np.uint8)
    kids: dict[int, list[int]] = {}
    for i, parent in enumerate(parents[1:], 1):
        kids.setdefault(parent, []).append(i)
    for storage, members in kids.items():
        order = sorted((len(names[i].encode("utf-16-le")), names[i].upper().encode("utf-16-be"), i) for i in members)
        links[storage, 2] = _tree([(name, i) for _, name, i in order], links, colour)
    return _Directory(names, kinds, links, colour, {path: number[path] for path in paths})


class _Sectors:
    """Sectors of a container, given out one after the other and chained in the allocation table."""

    def __init__(self, size: int, n_other: int, first_free: int) -> None:
        self.size, self.per = size, size // 4
        self.n_fat, self.n_difat = _fix_point(n_other, self.per)
        self.total = n_other + self.n_fat + self.n_difat
        self.fat = np.full(self.n_fat * self.per, FREE, dtype="<u4")
        self.at = first_free

    def take(self, count: int) -> I64:
        self.at += count
        return np.arange(self.at - count, self.at)

    def link(self, sectors: I64) -> int:
        """Chain them; return the first."""
        if not sectors.size:
            return END
        self.fat[sectors[:-1]] = sectors[1:]
        self.fat[sectors[-1]] = END
        return int(sectors[0])

    def offset(self, sector: Any) -> int:
        return (int(sector) + 1) * self.size


def _pieces(sectors: Sequence[tuple[int, int]], size: int) -> tuple[tuple[int, int, int], ...]:
    """Where the bytes of a stream lie: (offset in the file, start, stop in the stream), neighbours together."""
    done, out = 0, []
    for offset, length in merge_runs(sectors):
        length = min(length, size - done)
        out.append((offset, done, done + length))
        done += length
    return tuple(out)


@lru_cache(maxsize=16)
def _plan(sizes: tuple[tuple[str, int], ...], images: frozenset[str], sector: int, layout: Layout) -> _Plan:
    directory = _directory([path for path, _ in sizes])
    mini = [(p, s) for p, s in sizes if 0 < s < CUTOFF]
    large = sorted(((p, s) for p, s in sizes if s >= CUTOFF), key=lambda ps: ps[0] in images)
    n_mini = sum(-(-s // MINI) for _, s in mini)
    per = sector // 4
    n_dir = -(-len(directory.names) * ENTRY // sector)
    n_mini_fat = -(-n_mini // per)
    n_ms = -(-n_mini * MINI // sector)
    n_large = sum(-(-s // sector) for _, s in large)
    sectors = _Sectors(sector, n_dir + n_mini_fat + n_ms + n_large, n_large if layout == "first" else 0)
    fat_sectors, difat = sectors.take(sectors.n_fat), sectors.take(sectors.n_difat)
    own, mini_fat_sectors, ms = sectors.take(n_dir), sectors.take(n_mini_fat), sectors.take(n_ms)
    sectors.fat[fat_sectors], sectors.fat[difat] = FATSECT, DIFSECT
    first_dir, first_mini_fat, first_ms = sectors.link(own), sectors.link(mini_fat_sectors), sectors.link(ms)
    pool = np.arange(n_large) if layout == "first" else sectors.take(n_large)
    if layout == "scattered":  # every second sector, backwards: no two neighbours follow each other
        pool = np.concatenate((pool[::2], pool[1::2]))[::-1]

    starts = dict.fromkeys(directory.entry_of, END)
    places: dict[str, tuple[tuple[int, int, int], ...]] = dict.fromkeys(directory.entry_of, ())
    used = 0
    for path, size in large:
        count = -(-size // sector)
        chain = pool[used : used + count]
        used += count
        starts[path] = sectors.link(chain)
        places[path] = _pieces([(sectors.offset(k), sector) for k in chain], size)
    mini_fat = np.full(n_mini_fat * per, FREE, dtype="<u4")
    used = 0
    for path, size in mini:
        count = -(-size // MINI)
        mini_fat[used : used + count - 1] = np.arange(used + 1, used + count)
        mini_fat[used + count - 1] = END
        starts[path] = used
        places[path] = ((sectors.offset(ms[0]) + used * MINI, 0, size),)
        used += count

    trailing = [p for p, _ in large if p in images] if layout == "last" else []
    buffer = bytearray(places[trailing[0]][0][0] if trailing else sectors.offset(sectors.total))

    def put(at: I64, data: bytes) -> None:
        if at.size:
            offset = sectors.offset(at[0])
            buffer[offset : offset + len(data)] = data

    buffer[:512] = _header(sectors, fat_sectors, difat, n_dir, first_dir, n_mini_fat, first_mini_fat)
    put(fat_sectors, sectors.fat.tobytes())
    put(difat, _rest_of_table(sectors, fat_sectors, difat))
    put(mini_fat_sectors, mini_fat.tobytes())
    put(own, _entries(directory, dict(sizes), starts, (first_ms, n_mini * MINI), n_dir * sector))
    times = (sectors.offset(own[0]) + i * ENTRY + 108 for i, kind in enumerate(directory.kinds) if kind != _STREAM)
    return _Plan(bytes(buffer), places, tuple(times))


def _header(
    sectors: _Sectors, fat_sectors: I64, difat: I64, n_dir: int, first_dir: int, n_mini_fat: int, first_mini_fat: int
) -> bytes:
    big = sectors.size == 4096
    fixed = struct.pack(
        "<8s16xHHHHH6xIIIIIIIIII", MAGIC, 0x3E, 4 if big else 3, 0xFFFE, sectors.size.bit_length() - 1, 6,
        n_dir if big else 0, sectors.n_fat, first_dir, 0, CUTOFF, first_mini_fat, n_mini_fat,
        int(difat[0]) if difat.size else END, sectors.n_difat, FREE,
    )[:76]  # fmt: skip
    listed = np.full(_LISTED, FREE, dtype="<u4")
    listed[: min(_LISTED, sectors.n_fat)] = fat_sectors[:_LISTED]
    return fixed + listed.tobytes()


def _rest_of_table(sectors: _Sectors, fat_sectors: I64, difat: I64) -> bytes:
    """Name the sectors of the allocation table that the header has no room for."""
    rest, room = fat_sectors[_LISTED:], sectors.per - 1
    blocks = np.full((len(difat), sectors.per), FREE, dtype="<u4")
    for i, block in enumerate(blocks):
        part = rest[i * room : (i + 1) * room]
        block[: len(part)] = part
        block[-1] = difat[i + 1] if i + 1 < len(difat) else END
    return blocks.tobytes()


def _entries(
    directory: _Directory, sizes: Mapping[str, int], starts: Mapping[str, int], root: tuple[int, int], length: int
) -> bytes:
    path_of = {i: p for p, i in directory.entry_of.items()}
    out = bytearray()
    for i, (text, kind) in enumerate(zip(directory.names, directory.kinds, strict=True)):
        name = text.encode("utf-16-le")
        if kind == _STREAM:
            first, size = starts[path_of[i]], sizes[path_of[i]]
        else:
            first, size = root if kind == _ROOT else (0, 0)
        left, right, child = (int(v) for v in directory.links[i])
        colour = int(directory.colour[i])
        out += struct.pack(_ENTRY, name, len(name) + 2, kind, colour, left, right, child, 0, 0, 0, first, size)
    while len(out) < length:
        out += struct.pack(_ENTRY, b"", 0, 0, 0, FREE, FREE, FREE, 0, 0, 0, 0, 0)
    return bytes(out)


def write_container(
    path: str | os.PathLike[str],
    streams: Mapping[str, bytes],
    images: Mapping[str, npt.NDArray[Any]],
    *,
    filetime: int,
    layout: Layout = "last",
    sector: Literal[4096, 512] = 4096,
) -> None:
    """Write a compound file.

    Parameters
    ----------
    path : path-like
        The file; overwritten.
    streams : mapping of str to bytes
        Path in the container to content.
    images : mapping of str to array
        Further streams, large ones, that hold an array in little-endian order.
    filetime : int
        When it was modified, 100 ns since 1601.
    layout : {"last", "first", "scattered"}
        Where the images lie: at the end of the file, at its beginning, or in sectors that do not follow each other.
    sector : {4096, 512}
        Bytes.
    """
    sizes = tuple((p, len(v)) for p, v in streams.items()) + tuple((p, v.nbytes) for p, v in images.items())
    plan = _plan(sizes, frozenset(images), sector, layout)
    buffer = bytearray(plan.template)
    stamp = struct.pack("<Q", filetime)
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
