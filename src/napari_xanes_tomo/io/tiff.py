"""TIFF stacks written slab by slab: float32 pages, one a projection or one a row of a volume, in OME-TIFF."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .atomic import new_file, writing

__all__ = ["write_stack"]


def write_stack(
    path: str | os.PathLike[str],
    shape: tuple[int, int, int],
    slabs: Iterable[tuple[int, npt.NDArray[np.float32]]],
    *,
    axis: int = 0,
    pixel_nm: float = float("nan"),
    page_nm: float | None = None,
) -> None:
    """Write a stack ``(page, row, column)`` float32 to a new file, never more of it in memory than a slab.

    Parameters
    ----------
    path : path-like
        ``NAME.ome.tif``; it appears when it is whole.
    shape : (int, int, int)
        Of the whole stack.
    slabs : iterable of (int, array)
        Where a slab begins along `axis`, and its values.
    axis : {0, 1}
        The axis that slabs follow each other on.
    pixel_nm : float
        Edge of a pixel, nm; NaN where it is not known.
    page_nm : float, optional
        Distance of the pages, nm, where they are planes of a volume.

    Raises
    ------
    XanesTomoError
        The file is there already, or it could not be written.
    """
    import tifffile

    path = Path(path)
    metadata: dict[str, object] = {"axes": "ZYX"}
    if np.isfinite(pixel_nm):
        for name in "XY":
            metadata |= {f"PhysicalSize{name}": float(pixel_nm), f"PhysicalSize{name}Unit": "nm"}
    if page_nm is not None and np.isfinite(page_nm):
        metadata |= {"PhysicalSizeZ": float(page_nm), "PhysicalSizeZUnit": "nm"}
    with new_file(path) as temporary, writing(path):
        stack = tifffile.memmap(temporary, shape=shape, dtype="<f4", ome=True, metadata=metadata)
        try:
            for start, values in slabs:
                if axis == 0:
                    stack[start : start + len(values)] = values
                else:
                    stack[:, start : start + values.shape[1]] = values
            stack.flush()
        finally:
            del stack
