"""XRM and TXRM files: reading headers and pixels at the speed of the disk.

A file is an OLE2 (CFB) container of small metadata streams and one stream an image: `cfb` follows its chains,
`layout` knows where things lie, here they get their meaning. Pixels are read by position, straight into the
caller's array; no handle stays open. `xrm_write` writes such files.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
import struct
import time
from calendar import timegm
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from napari_xanes_tomo.model import XanesTomoError

from . import cfb
from . import layout as layouts
from .cfb import Damage, Runs
from .layout import CODES, Layout
from .xrm_write import EPOCH_1601, write_xrm

__all__ = ["XrmError", "XrmFrames", "XrmHeader", "read_header", "shown", "write_xrm"]

_LFS = b"version https://git-lfs"


class XrmError(XanesTomoError):
    """A file that cannot be read as XRM.

    Attributes
    ----------
    reason : str
        One word: ``missing``, ``unreadable``, ``empty``, ``lfs-pointer``, ``not-xrm``, ``corrupt``,
        ``truncated``, ``no-image``, ``mosaic``, ``other-size`` or ``link-out``.
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


class _Common(NamedTuple):
    """The part of a header that is the same in all frames of a scan; see `XrmHeader`."""

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
    references: tuple[Runs, ...]
    reference_dtype: np.dtype[Any] | None
    reference_exposure_s: float
    defect: tuple[str, str]  # (reason, what) of images that are not whole


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
    references : tuple of runs
        Where the embedded reference (flat) images lie, mostly none or one.
    reference_dtype, reference_exposure_s : their type and exposure, seconds.
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
    references: tuple[Runs, ...] = ()
    reference_dtype: np.dtype[Any] | None = None
    reference_exposure_s: float = float("nan")

    @property
    def has_reference(self) -> bool:
        """Whether the file carries its own reference (flat) image."""
        return bool(self.references)


# ---------------------------------------------------------------------------------------------- the header


def shown(name: str) -> str:
    """Return a file name that can be printed: bytes that are no UTF-8 are taken as cp1252, control characters out."""
    if name.isprintable():
        return name
    escaped = range(0xDC80, 0xDD00)  # how Python keeps such bytes
    out = (bytes([ord(c) - 0xDC00]).decode("cp1252", errors="replace") if ord(c) in escaped else c for c in name)
    return "".join(c if c.isprintable() else "?" for c in out)


def _text(raw: bytes) -> str:
    raw = raw.partition(b"\0")[0]
    return (raw.decode("ascii") if raw.isascii() else raw.decode("cp1252", errors="replace")).strip()


_DATE = re.compile(rb"(\d\d/\d\d/(?:\d{4}|\d\d)) (\d\d):(\d\d):(\d\d)(\.\d+)?")


def _seconds(raw: bytes) -> float:
    """``MM/DD/YY HH:MM:SS`` (local, no zone) as seconds since 1970; NaN when it is none."""
    found = _DATE.match(raw)
    if found is None:
        return math.nan
    day, hour, minute, second, rest = found.groups()
    h, m, s = int(hour), int(minute), int(second)
    if h > 23 or m > 59:
        return math.nan
    return _midnight(day) + 3600 * h + 60 * m + s + (float(rest) if rest else 0)


@lru_cache(maxsize=1024)
def _midnight(raw: bytes) -> float:
    month, day, year = map(int, raw.split(b"/"))
    try:
        return float(timegm(datetime(year + 2000 if year < 100 else year, month, day).timetuple()))
    except ValueError:
        return math.nan


def _integer(values: Mapping[str, bytes], name: str) -> int | None:
    raw = values.get(name, b"")
    return int.from_bytes(raw[:4], "little", signed=True) if len(raw) >= 4 else None


def _floats(raw: bytes, n: int, planned: int) -> tuple[float, ...]:
    m = len(raw) // 4
    if n == 1 and m >= 1:
        (value,) = struct.unpack_from("<f", raw)
        return (value if math.isfinite(value) else math.nan,)
    if m == 0:
        return (math.nan,) * n
    found = tuple(v if math.isfinite(v) else math.nan for v in struct.unpack_from(f"<{m}f", raw))
    if m > n and m != planned and (m - 1) % (n - 1) == 0:
        # Some version 3 stacks keep value i at place 10 i, zeros between.
        step = (m - 1) // (n - 1)
        if all(v == 0 for i, v in enumerate(found) if i % step):
            return found[::step]
    return (*found[:n], *(math.nan,) * (n - m))


def _same(layout: Layout, values: Mapping[str, bytes]) -> _Common:
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
    dtype = np.dtype(CODES.get(code or 0, "<u2"))
    shape = (height or 0, width or 0)
    n = min(max(wanted, 0), there)
    if width is None or height is None or width <= 0 or height <= 0:
        defect = ("corrupt", f"expected the size of its images, got {height} x {width}")
        shape = (0, 0)
    elif code not in CODES:
        defect = ("corrupt", f"expected a pixel type of {min(CODES)}..{max(CODES)}, got {code}")
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
    store = "referencedata" if "referencedata/datatype" in values else "multireferencedata"
    reference_dtype = np.dtype(CODES.get(_integer(values, f"{store}/datatype") or code or 0, "<u2"))
    own = [_integer(values, f"{store}/imageinfo/image{side}") for side in ("height", "width")]
    # A reference of another size (taken at another binning) is none for these images.
    fits = all(a is None or a == b for a, b in zip(own, shape, strict=True))
    pixels = shape[0] * shape[1] * reference_dtype.itemsize
    references = tuple(runs for runs, length in layout.references if fits and length == pixels)
    exposure = "exptime" if f"{store}/exptime" in values else "imageinfo/exptimes"
    binning = _integer(values, "imageinfo/horizontalbin") or _integer(values, "imageinfo/camerabinning")
    version = values.get("version", b"")
    return _Common(
        version=struct.unpack_from("<f", version)[0] if len(version) >= 4 else float("nan"),
        exe_version=_text(values.get("exeversion", b"")),
        n_planned=planned if planned is not None and planned > 0 else max(n, 1),
        n_images=n,
        shape=shape,
        dtype=dtype,
        pixel_size_um=_floats(values.get("imageinfo/pixelsize", b""), 1, 1)[0],
        binning=binning if binning is not None and 0 < binning <= 64 else None,
        mosaic=mosaic,
        images=layout.images[:n],
        references=references,
        reference_dtype=reference_dtype if references else None,
        reference_exposure_s=_floats(values.get(f"{store}/{exposure}", b""), 1, 1)[0],
        defect=defect,
    )


# One value an image, in the order of `XrmHeader`; the times are texts.
_EACH = ("angles", "energy", "exptimes", "date", "xposition", "yposition", "zposition", "ionchambercurrent")
_F4 = struct.Struct("<f")
_SHARED = 16  # kinds of files that one layout may have, remembered


def _common(layout: Layout, buffers: Sequence[bytearray]) -> _Common:
    """Return what a file has in common with others; understood once, then known by its bytes."""
    for checks, known in layout.same:
        for k, start, expected in checks:
            if not buffers[k].startswith(expected, start):
                break
        else:
            found: _Common = known
            return found
    shared = [name for name in layout.values if name not in layouts.EACH]
    same = _same(layout, {name: layout.raw(name, buffers) for name in shared})
    checks = tuple((k, i, bytes(buffers[k][i:j])) for name in shared for k, i, j in layout.values[name])
    layout.same[:] = [(checks, same), *layout.same[: _SHARED - 1]]
    return same


def _each(layout: Layout, buffers: Sequence[bytearray], m: int, planned: int) -> list[tuple[float, ...]]:
    """Return the values of all images, one tuple a field."""
    found: list[tuple[float, ...]] = []
    for field in _EACH:
        name = "imageinfo/exptime" if field == "exptimes" and not layout.values.get("imageinfo/exptimes") else ""
        pieces = layout.values.get(name or f"imageinfo/{field}", ())
        if field == "date":
            raw = layout.raw("imageinfo/date", buffers)
            stride = len(raw) // planned if m > 1 and raw and len(raw) % planned == 0 else 40
            found.append(tuple([_seconds(raw[i * stride : (i + 1) * stride].partition(b"\0")[0]) for i in range(m)]))
        elif m == 1 and len(pieces) == 1 and pieces[0][2] - pieces[0][1] >= 4:
            (value,) = _F4.unpack_from(buffers[pieces[0][0]], pieces[0][1])
            found.append((value if math.isfinite(value) else math.nan,))
        else:
            found.append(_floats(layout.raw(name or f"imageinfo/{field}", buffers), m, planned))
    return found


def _header(layout: Layout, buffers: Sequence[bytearray], path: str) -> XrmHeader:
    same = _common(layout, buffers)
    k, start = layout.modified
    filetime = int.from_bytes(buffers[k][start : start + 8], "little")
    m = max(same.n_images, 1)
    angles, energies, exposures, times, x, y, z, ion = _each(layout, buffers, m, same.n_planned)
    header = XrmHeader(
        path,
        layout.size,
        same.version,
        same.exe_version,
        same.n_planned,
        same.n_images,
        same.shape,
        same.dtype,
        angles,
        energies,
        exposures,
        times,
        x,
        y,
        z,
        ion,
        filetime / 1e7 - EPOCH_1601 if filetime else float("nan"),
        same.pixel_size_um,
        same.binning,
        _text(layout.raw("acquisitionsettings/acqfilename", buffers)),
        same.mosaic,
        same.images,
        same.references,
        same.reference_dtype,
        same.reference_exposure_s,
    )
    if same.defect[0]:
        name = shown(Path(path).name)
        raise XrmError(f"{name}: {same.defect[1]}", same.defect[0], name, header)
    return header


# Not blocking: a pipe or device that bears the name of a frame is refused, not waited for.
_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_BINARY", "O_CLOEXEC", "O_NONBLOCK"))


def _open(path: str) -> tuple[int, os.stat_result]:
    """Return the descriptor of an open file and its state."""
    try:
        fd = os.open(path, _FLAGS)
        state = os.fstat(fd)
        if stat.S_ISREG(state.st_mode):
            return fd, state
        os.close(fd)
        reason, text = "unreadable", "expected a file, got a folder, pipe or device"
    except FileNotFoundError:
        reason, text = "missing", "the file is not there"
    except (OSError, ValueError) as error:
        reason, text = "unreadable", f"cannot be opened ({getattr(error, 'strerror', None) or error})"
    name = shown(Path(path).name)[:120]
    raise XrmError(f"{name}: {text}", reason, name)


def _header_of(fd: int, path: str, size: int) -> XrmHeader:
    known = layouts.known(size)
    for layout in known:
        buffers = layouts.match(layout, fd)
        if buffers is not None:
            return _header(layout, buffers, path)
    name = shown(Path(path).name)
    first = cfb.pread(fd, 64, 0)
    if not first:
        raise XrmError(f"{name}: expected an XRM file, got an empty one; copy it again", "empty", name)
    if first.startswith(_LFS):
        text = f"{name}: expected an XRM file, got a Git LFS pointer; fetch the real file with `git lfs pull`"
        raise XrmError(text, "lfs-pointer", name)
    if first[:8] != cfb.MAGIC:
        raise XrmError(f"{name}: expected an XRM file (an OLE2 container), got something else", "not-xrm", name)
    if size < 1536:
        raise XrmError(f"{name}: {size} bytes are less than any XRM file has; copy it again", "truncated", name)
    with os.fdopen(os.dup(fd), "rb") as file:
        try:
            layout = layouts.parse(file, size)
        except Damage as bad:
            reason = bad.reason
            raise XrmError(f"{name}: {bad}", reason, name) from None
    if not layout.images and "imageinfo/imagewidth" not in layout.values:
        raise XrmError(f"{name}: an OLE2 container, but without the streams of an XRM file", "not-xrm", name)
    buffers = layouts.match(layout, fd)
    if buffers is None:
        raise XrmError(f"{name}: the file changed while it was read; open it again", "unreadable", name)
    layouts.remember(layout)
    return _header(layout, buffers, path)


def read_header(path: str | os.PathLike[str]) -> XrmHeader:
    """Read what an ``.xrm`` or ``.txrm`` file says about itself; no pixels.

    Raises
    ------
    XrmError
        Whenever not every image is whole; its `header` holds what could be read.
    """
    path = os.fspath(path)
    fd, state = _open(path)
    try:
        return _learn(fd, path, state)
    except OSError as error:
        name = shown(Path(path).name)
        raise XrmError(f"{name}: cannot be read ({error.strerror or error})", "unreadable", name) from None
    finally:
        os.close(fd)


# ---------------------------------------------------------------------------------------------- pixels

_Place = tuple[int, int, XrmHeader]
_places: dict[str, _Place] = {}  # path -> (bytes, mtime_ns, header) of the files that were read from


def _placed(fd: int, path: str, state: os.stat_result) -> XrmHeader:
    """Return the header of an open file, from memory while the file is the same."""
    known = _places.get(path)
    if known is not None and known[0] == state.st_size and known[1] == state.st_mtime_ns:
        return known[2]
    return _learn(fd, path, state)


def _learn(fd: int, path: str, state: os.stat_result) -> XrmHeader:
    header = _header_of(fd, path, state.st_size)
    # A file written a moment ago may change again without a new time: clocks of file systems are coarse.
    if time.time_ns() - state.st_mtime_ns > 1_000_000_000:
        if len(_places) > 50_000:
            _places.clear()
        _places[path] = (state.st_size, state.st_mtime_ns, header)
    return header


def _fill(fd: int, out: memoryview, runs: Runs, start: int, path: str) -> None:
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
            n = cfb.read_into(fd, out[done:end], offset)
            if n <= 0:
                raise _cut(path)
            done += n
            offset += n
        if done == len(out):
            return
    if done < len(out):
        raise _cut(path)


def _cut(path: str) -> XrmError:
    name = shown(Path(path).name)
    return XrmError(f"{name}: the file ends inside the image; copy it again", "truncated", name)


@dataclass(frozen=True)
class XrmFrames:
    """Frames in XRM files as a lazy, picklable `FrameSource`; no file stays open between two calls.

    Parameters
    ----------
    paths : tuple of str
        The file of every frame; it need not exist until the frame is read.
    numbers : tuple of int
        The image in that file, from 1; 0 is the file's embedded reference, -1, -2, ... its further ones.
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

    def read(self, index: int, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """Return frame `index`, shape (y, x).

        Parameters
        ----------
        index : int
            Number of the frame.
        out : (y, x) array, optional
            Where to put it; it has to have the type of these frames and to be contiguous.

        Raises
        ------
        XrmError
            The file is gone, short, or not what it was.
        """
        target = None if out is None else out[None]
        result: npt.NDArray[Any] = self.read_rows((index,), 0, self.frame_shape[0], target)[0]
        return result

    def read_rows(
        self, indices: Sequence[int], y0: int, y1: int, out: npt.NDArray[Any] | None = None
    ) -> npt.NDArray[Any]:
        """Return rows ``y0:y1`` of the frames `indices`, shape (frame, y1 - y0, x); only these rows are read.

        Parameters
        ----------
        indices, y0, y1
            Which frames and rows.
        out : (frame, y1 - y0, x) array, optional
            Where to put them; it has to have the type of these frames and to be contiguous. Stored rows
            are read straight into it.

        Raises
        ------
        XrmError
            A file is gone, short, or not what it was.
        """
        rows, columns = self.frame_shape
        if not 0 <= y0 <= y1 <= rows:
            raise ValueError(f"expected rows within 0..{rows}, got {y0}:{y1}")
        expected = (len(indices), y1 - y0, columns)
        if out is not None and (out.shape != expected or out.dtype != self.dtype or not out.flags.c_contiguous):
            raise ValueError(
                f"out: expected a contiguous {self.dtype} array of {expected}, got {out.dtype} {out.shape}"
            )
        a, b = (rows - y1, rows - y0) if self.flip_rows else (y0, y1)
        if out is not None and self.bin == 1:
            raw = out
        else:
            raw = np.empty((len(indices), (b - a) * self.bin, self.shape[1]), dtype=self.stored)
        if raw.size:
            start = a * self.bin * self.shape[1] * self.stored.itemsize
            for target, index in zip(raw, indices, strict=True):
                self._read_one(index, memoryview(target).cast("B"), start)
        if self.bin > 1:
            cut = raw[:, :, : columns * self.bin].reshape(len(indices), b - a, self.bin, columns, self.bin)
            raw = cut.sum(axis=(2, 4), dtype=self.dtype, out=out)
        if not self.flip_rows:
            return raw
        if out is None:
            return raw[:, ::-1]
        out[:] = out[:, ::-1].copy()
        return out

    def _read_one(self, index: int, out: memoryview, start: int) -> None:
        path, number = self.paths[index], self.numbers[index]
        fd, state = _open(path)
        try:
            header = _placed(fd, path, state)
            places, at = (header.images, number - 1) if number > 0 else (header.references, -number)
            dtype = header.dtype if number > 0 else header.reference_dtype
            runs = places[at] if at < len(places) else ()
            if not runs:
                name = shown(Path(path).name)
                raise XrmError(f"{name}: expected image {number}, got a file without it", "no-image", name)
            if header.shape != self.shape or dtype != self.stored:
                name = shown(Path(path).name)
                text = f"{name}: expected {self.shape} {self.stored}, got {header.shape} {dtype}"
                raise XrmError(text, "other-size", name)
            _fill(fd, out, runs, start, path)
        except OSError as error:
            name = shown(Path(path).name)
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
