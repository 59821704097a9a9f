"""Frames in HDF5 files as a lazy, picklable source; the file is opened for every read and closed again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from napari_xanes_tomo.model import XanesTomoError

__all__ = ["H5Frames", "opened", "read_frames"]

_H5_ERRORS = (OSError, KeyError, ValueError, RuntimeError, TypeError)  # what h5py raises on damaged files


@contextmanager
def opened(path: str | Path) -> Iterator[Any]:
    """Open an HDF5 file for reading.

    Raises
    ------
    XanesTomoError
        It cannot be read, or something in it is not what it was; one line with its name.
    """
    name = Path(path).name
    try:
        # A file that somebody still writes, or that lies on a disk without locks, can be read all the same.
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except XanesTomoError:
        raise
    except FileNotFoundError:
        raise XanesTomoError(f"{name}: the file is not there") from None
    except _H5_ERRORS as error:
        why = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise XanesTomoError(f"{name}: expected a whole HDF5 file, got one that cannot be read ({why})") from None


def read_frames(dataset: Any, indices: Sequence[int], y0: int, y1: int, lead: int | None = None) -> npt.NDArray[Any]:
    """Return rows ``y0:y1`` of the frames `indices` (any order) of a ``([lead,] frame, y, x)`` dataset."""
    order = np.asarray(indices, dtype=np.int64)
    head = () if lead is None else (lead,)
    shape = (len(order), y1 - y0, dataset.shape[-1])
    out = np.empty(shape, dtype=dataset.dtype.newbyteorder("="))
    if not out.size:
        return out
    breaks = np.flatnonzero(np.diff(order) != 1) + 1
    # A run of frames that follow each other is one read.
    for a, b in zip([0, *breaks], [*breaks, len(order)], strict=True):
        out[a:b] = dataset[(*head, slice(int(order[a]), int(order[b - 1]) + 1), slice(y0, y1))]
    return out


@lru_cache(maxsize=8)
def _mean_dark(
    path: str, stamp: tuple[int, int], dataset: str, indices: tuple[int, ...], lead: int | None
) -> npt.NDArray[np.float32]:
    """Mean of the dark frames; `stamp` only makes a changed file another one."""
    with opened(path) as file:
        data = file[dataset]
        total = np.zeros(data.shape[-2:], dtype=np.float64)
        for index in indices:
            total += read_frames(data, (index,), 0, data.shape[-2], lead)[0]
    mean = (total / len(indices)).astype(np.float32)
    mean.setflags(write=False)
    return mean


@dataclass(frozen=True)
class H5Frames:
    """Frames of one HDF5 dataset as a lazy, picklable `FrameSource`; nothing stays open between two calls.

    Parameters
    ----------
    path : str
        The file.
    dataset : str
        A dataset ``(frame, y, x)``, or ``(energy, frame, y, x)`` with `lead`.
    indices : tuple of int
        The place of every frame in it.
    shape : tuple of int
        (rows, columns) as stored.
    stored : numpy.dtype
        Type as stored.
    lead : int, optional
        The place along the first of four axes.
    dark, dark_indices : str, tuple of int
        Dataset and places of dark frames, whose mean is subtracted; frames are then float32.
    flip_rows : bool
        Turn every frame upside down.
    bin : int
        Sum ``bin x bin`` stored pixels into one; rows and columns left over at the end are dropped.
    """

    path: str
    dataset: str
    indices: tuple[int, ...]
    shape: tuple[int, int]
    stored: np.dtype[Any]
    lead: int | None = None
    dark: str = ""
    dark_indices: tuple[int, ...] = ()
    flip_rows: bool = False
    bin: int = 1

    @property
    def paths(self) -> tuple[str, ...]:
        """The files behind the frames."""
        return (self.path,)

    @property
    def frame_shape(self) -> tuple[int, int]:
        """(rows, columns) of every frame, after binning."""
        return self.shape[0] // self.bin, self.shape[1] // self.bin

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the counts: as stored, or wide enough for the sum of a bin; float32 where a dark is subtracted."""
        if self.dark_indices or (self.stored.kind == "f" and self.bin > 1):
            return np.dtype(np.float32)
        if self.bin == 1:
            return self.stored.newbyteorder("=")
        return np.dtype(np.uint32 if self.stored.kind == "u" else np.int32)

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> npt.NDArray[Any]:
        """Return frame `index`, shape (y, x)."""
        result: npt.NDArray[Any] = self.read_rows((index,), 0, self.frame_shape[0])[0]
        return result

    def read_rows(self, indices: Sequence[int], y0: int, y1: int) -> npt.NDArray[Any]:
        """Return rows ``y0:y1`` of the frames `indices`, shape (frame, y1 - y0, x).

        Raises
        ------
        XanesTomoError
            The file is gone, damaged, or not what it was.
        """
        rows, columns = self.frame_shape
        if not 0 <= y0 <= y1 <= rows:
            raise ValueError(f"expected rows within 0..{rows}, got {y0}:{y1}")
        a, b = (rows - y1, rows - y0) if self.flip_rows else (y0, y1)
        a, b = a * self.bin, b * self.bin
        wanted = [self.indices[i] for i in indices]
        with opened(self.path) as file:
            data = file[self.dataset]
            want = 3 if self.lead is None else 4
            if data.ndim != want or data.shape[-2:] != self.shape or data.dtype != self.stored:
                raise XanesTomoError(
                    f"{Path(self.path).name}: expected frames of {self.shape} {self.stored} in {self.dataset}, "
                    f"got {data.shape} {data.dtype}; open it again"
                )
            if wanted and max(wanted) >= data.shape[-3]:
                name, n = Path(self.path).name, data.shape[-3]
                raise XanesTomoError(f"{name}: expected frame {max(wanted)} in {self.dataset}, got {n} frames")
            out = read_frames(data, wanted, a, b, self.lead)
        if self.dark_indices:
            stat = Path(self.path).stat()
            dark = _mean_dark(self.path, (stat.st_size, stat.st_mtime_ns), self.dark, self.dark_indices, self.lead)
            out = out.astype(np.float32)
            out -= dark[a:b]
        if self.bin > 1:
            cut = out[:, :, : columns * self.bin].reshape(len(wanted), (b - a) // self.bin, self.bin, columns, self.bin)
            out = cut.sum(axis=(2, 4), dtype=self.dtype)
        return out[:, ::-1] if self.flip_rows else out

    def fingerprint(self) -> str:
        """Return 16 hex digits that change when the file behind the frames changes (name, size, time)."""
        try:
            stat = Path(self.path).stat()
            stamp = (stat.st_size, stat.st_mtime_ns)
        except (OSError, ValueError):
            stamp = (-1, -1)
        own = (Path(self.path).name, stamp, self.dataset, self.indices, self.shape, self.stored.str, self.lead)
        more = (self.dark, self.dark_indices, self.flip_rows, self.bin)
        return hashlib.sha256(repr((own, more)).encode()).hexdigest()[:16]
