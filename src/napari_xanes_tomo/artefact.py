"""Projections of an object that lies beside its place."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["displaced_lines"]

F32 = npt.NDArray[np.float32]


def displaced_lines(lines: F32, theta_deg: npt.ArrayLike, by: npt.ArrayLike) -> F32:
    """Return projections (angle, row, column) of the same object displaced, px.

    Parameters
    ----------
    lines : (angle, row, column) array
    theta_deg : (angles,) array
    by : (4,) array
        Along y, z, x: positive moves the content down and along the axes. Then the error of the rotation centre:
        positive moves every projection to the right.
    """
    from scipy.ndimage import shift

    dy, dz, dx, centre = (float(v) for v in np.asarray(by, dtype=float))
    if not any((dy, dz, dx, centre)):
        return lines
    t = np.deg2rad(np.asarray(theta_deg, dtype=float))
    across = dx * np.cos(t) + dz * np.sin(t) + centre
    moved = [shift(frame, (dy, c), order=3, mode="nearest") for frame, c in zip(lines, across, strict=True)]
    return np.asarray(moved, dtype=np.float32).reshape(lines.shape)
