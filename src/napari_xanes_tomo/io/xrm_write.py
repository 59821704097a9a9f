"""XRM and TXRM files: writing them, in every variant that instruments and programs make.

The digital twin is written with this, and every test of the reader.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .cfb import CUTOFF, DIFSECT, END, ENTRY, FATSECT, FREE, MAGIC, MINI, merge_runs
from .layout import CODES, PER_GROUP

__all__ = ["EPOCH_1601", "write_xrm"]

EPOCH_1601 = 11644473600  # seconds from 1601 (FILETIME) to 1970

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
            return FREE
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
    links = np.full((n, 3), FREE, dtype=np.uint32)
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

    mini = [(p, s) for p, s in sizes if 0 < s < CUTOFF]
    large = sorted(((p, s) for p, s in sizes if s >= CUTOFF), key=lambda ps: ps[0] in pixels)
    n_mini = sum(-(-s // MINI) for _, s in mini)
    per = sector // 4
    n_dir = -(-n * ENTRY // sector)
    n_mini_fat = -(-n_mini // per)
    n_ms = -(-n_mini * MINI // sector)
    n_large = sum(-(-s // sector) for _, s in large)
    n_fat, n_difat = _fix_point(n_dir + n_mini_fat + n_ms + n_large, per)
    total = n_fat + n_difat + n_dir + n_mini_fat + n_ms + n_large

    fat = np.full(n_fat * per, FREE, dtype="<u4")
    at = n_large if layout == "first" else 0

    def take(count: int) -> npt.NDArray[np.int64]:
        nonlocal at
        at += count
        return np.arange(at - count, at)

    def link(sectors: npt.NDArray[np.int64]) -> int:
        if not sectors.size:
            return END
        fat[sectors[:-1]] = sectors[1:]
        fat[sectors[-1]] = END
        return int(sectors[0])

    fat_sectors, difat = take(n_fat), take(n_difat)
    directory, mini_fat_sectors, ms = take(n_dir), take(n_mini_fat), take(n_ms)
    fat[fat_sectors], fat[difat] = FATSECT, DIFSECT
    first_dir, first_mini_fat, first_ms = link(directory), link(mini_fat_sectors), link(ms)
    pool = np.arange(n_large) if layout == "first" else take(n_large)
    if layout == "scattered":  # every second sector, backwards: no two neighbours follow each other
        pool = np.concatenate((pool[::2], pool[1::2]))[::-1]

    starts = dict.fromkeys(entry_of, END)
    places: dict[str, tuple[tuple[int, int, int], ...]] = dict.fromkeys(entry_of, ())
    used = 0
    for path, size in large:
        count = -(-size // sector)
        own = pool[used : used + count]
        used += count
        starts[path] = link(own)
        pieces = merge_runs([(int(s + 1) * sector, sector) for s in own])
        done, out = 0, []
        for offset, length in pieces:
            length = min(length, size - done)
            out.append((offset, done, done + length))
            done += length
        places[path] = tuple(out)
    mini_fat = np.full(n_mini_fat * per, FREE, dtype="<u4")
    ms_start = (int(ms[0]) + 1) * sector if n_ms else 0
    used = 0
    for path, size in mini:
        count = -(-size // MINI)
        mini_fat[used : used + count - 1] = np.arange(used + 1, used + count)
        mini_fat[used + count - 1] = END
        starts[path] = used
        places[path] = ((ms_start + used * MINI, 0, size),)
        used += count

    trailing = [p for p, _ in large if p in pixels] if layout == "last" else []
    length = places[trailing[0]][0][0] if trailing else (total + 1) * sector
    buffer = bytearray(length)
    header = struct.pack(
        "<8s16xHHHHH6xIIIIIIIIII",
        MAGIC,
        0x3E,
        4 if sector == 4096 else 3,
        0xFFFE,
        sector.bit_length() - 1,
        6,
        n_dir if sector == 4096 else 0,
        n_fat,
        first_dir,
        0,
        CUTOFF,
        first_mini_fat,
        n_mini_fat,
        int(difat[0]) if n_difat else END,
        n_difat,
        FREE,
    )[:76]
    buffer[:76] = header
    listed = np.full(109, FREE, dtype="<u4")
    listed[: min(109, n_fat)] = fat_sectors[:109]
    buffer[76:512] = listed.tobytes()

    def put(sectors: npt.NDArray[np.int64], data: bytes) -> None:
        if sectors.size:
            offset = (int(sectors[0]) + 1) * sector
            buffer[offset : offset + len(data)] = data

    put(fat_sectors, fat.tobytes())
    rest = fat_sectors[109:]
    for i, s in enumerate(difat):
        block = np.full(per, FREE, dtype="<u4")
        part = rest[i * (per - 1) : (i + 1) * (per - 1)]
        block[: len(part)] = part
        block[-1] = difat[i + 1] if i + 1 < n_difat else END
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
            first, size = (first_ms, n_mini * MINI) if i == 0 else (0, 0)
            times.append(base + i * ENTRY + 108)
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
        entries += struct.pack("<64sHBBIII16xIQQIQ", b"", 0, 0, 0, FREE, FREE, FREE, 0, 0, 0, 0, 0)
    put(directory, bytes(entries))
    return _Plan(bytes(buffer), places, tuple(times), (total + 1) * sector)


def _per_image(value: float | Sequence[float] | npt.NDArray[Any], n: int, name: str) -> npt.NDArray[np.float64]:
    values = np.asarray(value, dtype=np.float64).ravel()
    if values.size == 1:
        return np.full(n, values[0])
    if values.size != n:
        raise ValueError(f"{name}: expected 1 or {n} values, got {values.size}")
    return values


# What real files hold by version: streams with the image, storages, mini sectors (64 bytes each).
_REAL = {3: (632, 36, 950), 4: (374, 26, 640), 5: (696, 41, 1073)}


def _machine(sizes: Mapping[str, int], n_images: int, version: float) -> dict[str, bytes]:
    """Streams of machine settings that make a directory as large as a real one."""
    n_streams, n_storages, n_mini = _REAL[min(max(int(version), 3), 5)]
    n = max(n_streams - len(sizes) - n_images, 0)
    there = len({path.rpartition("/")[0] for path in sizes if "/" in path}) + 1  # with that of the images
    groups = max(n_storages - there - 1, 1)  # and the one these are in
    used = sum(-(-size // MINI) for size in sizes.values() if size < CUTOFF)
    texts = max(-(-(n_mini - used - n) // 4), 0)  # of 260 bytes, 5 mini sectors; the others are numbers of 4 bytes
    return {f"ConfigureBackup/Machine{i % groups:02d}/Setting{i:03d}": bytes(260 if i < texts else 4) for i in range(n)}


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
    machine_streams: bool = False,
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
    reference : (y, x) or (k, y, x) array, optional
        A reference image to embed, or several.
    machine_streams : bool
        Fill the directory with as many streams of machine settings as an instrument stores (696 at version
        5, 374 at 4, 632 at 3). A 1024 x 1024 u16 frame of version 5 then has 2,281,472 bytes, its image at 184,320.
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
    code = {v: k for k, v in CODES.items()}.get(f"<{little.kind}{little.itemsize}")
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
        flats = np.asarray(reference)
        store = "ReferenceData" if flats.ndim == 2 else "MultiReferenceData"
        streams[f"{store}/DataType"] = i4({v: k for k, v in CODES.items()}[f"<{flats.dtype.kind}{flats.itemsize}"])
        streams[f"{store}/ExpTime"] = f4(reference_exposure_s)
        if version >= 5:
            streams[f"{store}/ImageInfo/ImageHeight"] = i4(flats.shape[-2])
            streams[f"{store}/ImageInfo/ImageWidth"] = i4(flats.shape[-1])
        if flats.ndim == 2:
            images[f"{store}/Image"] = flats
        else:
            images |= {f"{store}/Image{k + 1}": flat for k, flat in enumerate(flats)}
    for i in range(n):
        images[f"ImageData{i // PER_GROUP + 1}/Image{i + 1}"] = data[i]
    streams |= extra or {}
    for key in omit:
        streams.pop(key, None)
        images.pop(key, None)
    if machine_streams:
        streams |= _machine({key: len(value) for key, value in streams.items()}, len(images), version)

    sizes = tuple((p, len(v)) for p, v in streams.items()) + tuple((p, v.nbytes) for p, v in images.items())
    plan = _plan(sizes, frozenset(images), sector, layout)
    buffer = bytearray(plan.template)
    # integer arithmetic: the time stamp has to be the same on every machine
    since = clocks[-1] - _1970
    filetime = (EPOCH_1601 + since.days * 86400 + since.seconds) * 10_000_000 + since.microseconds * 10
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
