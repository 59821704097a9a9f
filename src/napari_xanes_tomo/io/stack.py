"""All projections of a measurement as one lazy array ``(energy, angle, y, x)``, one chunk a frame."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from napari_xanes_tomo.agreement import bin_frames
from napari_xanes_tomo.model import Series, XanesTomoError
from napari_xanes_tomo.pixels import pixel_width, seen_as, usual_scan

__all__ = ["FrameStack", "lazy_frames", "open_stack"]


class FrameStack:
    """All planned projections of a series as frames ``[energy, angle]``; zeros where there is none.

    Parameters
    ----------
    series : Series

    Attributes
    ----------
    shape : (energies, angles, y, x)
        Energies with fewer planned angles than others are padded at the end; frames of another binning are shown in as
        many pixels as most energies have.
    failed : dict of (int, int) to str
        Frames that could not be read when they were asked for, with the reason.
    """

    def __init__(self, series: Series) -> None:
        self.series = series
        usable = [s for s in series.scans if s.usable.any()]
        if not usable:
            errors = [p.message for p in series.problems if p.severity == "error"]
            raise XanesTomoError(errors[0] if errors else f"{series.name}: expected frames that can be read, got none")
        self._usual = usual_scan(usable)
        height, width = series.frame_shape
        self.shape = (len(series.scans), max(len(s) for s in series.scans), height, width)
        self.dtype = np.result_type(*(s.frames.dtype for s in usable))
        self.failed: dict[tuple[int, int], str] = {}

    def read(self, energy: int, angle: int) -> npt.NDArray[Any]:
        """Return the frame ``[y, x]``; zeros where it is missing, damaged or not planned."""
        scan = self.series.scans[energy]
        if angle < len(scan) and not scan.status[angle].startswith("unreadable"):
            try:
                frame = np.asarray(scan.frames.read(angle))
                if frame.shape == scan.frames.frame_shape != self.shape[2:]:
                    frame = seen_as(frame, self.shape[2:], pixel_width(self._usual, scan))
                if frame.shape == self.shape[2:]:
                    self.failed.pop((energy, angle), None)
                    return frame.astype(self.dtype, copy=False)
                self.failed[energy, angle] = f"unreadable:frame of {frame.shape[0]} x {frame.shape[1]}"
            except (XanesTomoError, OSError) as error:
                self.failed[energy, angle] = f"unreadable:{error}"
        return np.zeros(self.shape[2:], self.dtype)

    def status(self, energy: int, angle: int) -> str:
        """Return ``ok``, ``excluded:<why>``, ``unreadable:<why>`` or ``not planned``."""
        scan = self.series.scans[energy]
        if angle >= len(scan):
            return "not planned"
        return self.failed.get((energy, angle), scan.status[angle])


def lazy_frames(
    read: Callable[[int, int], npt.NDArray[Any]], shape: tuple[int, int, int, int], dtype: npt.DTypeLike
) -> Any:
    """Return a dask array ``(energy, angle, y, x)`` whose chunks are single frames ``read(energy, angle)``."""
    import dask.array as da

    n_energies, n_angles, height, width = shape
    return da.map_blocks(
        partial(_block, read),
        chunks=((1,) * n_energies, (1,) * n_angles, (height,), (width,)),
        dtype=np.dtype(dtype),
        meta=np.empty((0, 0, 0, 0), dtype),
        name=f"xanes-frames-{uuid.uuid4().hex}",  # nothing is hashed: that would cost more than reading
    )


def _block(read: Callable[[int, int], npt.NDArray[Any]], block_id: tuple[int, ...] = (0, 0)) -> npt.NDArray[Any]:
    return read(block_id[0], block_id[1])[None, None]


def open_stack(series: Series, *, bin: int = 1) -> Any:
    """Return all planned projections of a series as a dask array ``(energy, angle, y, x)``, raw counts.

    Parameters
    ----------
    series : Series
        Of `open_series`.
    bin : int
        Means over ``bin x bin`` pixels of a frame, as float32, for a quick look; rows and columns left over at the end
        are dropped. 1 gives the frames as they were recorded.

    Returns
    -------
    dask.array.Array
        A chunk is a frame, read when it is computed, on whatever worker. Energies with fewer planned angles than others
        are padded at the end; a frame that is missing, damaged or padding holds zeros, and
        ``series.scans[energy].status[angle]`` says which.

    Raises
    ------
    XanesTomoError
        Not one frame can be read, or `bin` leaves no pixel.
    """
    stack = FrameStack(series)
    n_energies, n_angles, height, width = stack.shape
    if bin == 1:
        return lazy_frames(stack.read, stack.shape, stack.dtype)
    if not 1 <= bin <= min(height, width):
        raise XanesTomoError(f"bin: expected a whole number from 1 to {min(height, width)}, got {bin}")
    shape = (n_energies, n_angles, height // bin, width // bin)
    return lazy_frames(partial(_binned, stack.read, bin), shape, np.float32)


def _binned(read: Callable[[int, int], npt.NDArray[Any]], bin: int, energy: int, angle: int) -> npt.NDArray[np.float32]:
    return np.asarray(bin_frames(read(energy, angle)[None], bin)[0])
