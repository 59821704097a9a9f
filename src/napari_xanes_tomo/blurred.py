"""What the absorbance of a projection lacks because intensities were blurred before their logarithm was taken.

To first order in the variance v of the point spread (with that of a pixel's own area) the logarithm of a blurred
intensity is the blurred absorbance less ``v/2 |grad A|^2``. No volume has such projections, so it pulls displacements,
slowly with the angle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba as nb
import numpy as np
import numpy.typing as npt

from .agreement import solve_normal, squared_gradient
from .model import FloatArray
from .parallel import in_threads
from .reprojection import Scene

__all__ = ["lost_to_blur"]

F32 = npt.NDArray[np.float32]
_BLUR_PX = 1.0  # of the projections compared: that of the band, of the weights of `halve`, of interpolating a volume
_EVERY = 4  # rows that are asked
_SIGNIFICANT = 4.0  # standard errors
_LARGEST_PX = 1.5  # standard deviation of a point spread, pixels of the scene
_F = TypeVar("_F", bound=Callable[..., Any])


def _kernel(function: _F) -> _F:
    """Compile for the machine at first use, kept on disk, without the GIL."""
    return cast(_F, nb.njit(cache=True, nogil=True, fastmath={"contract", "reassoc"})(function))


def lost_to_blur(scene: Scene, placed: F32, model: F32, shift: FloatArray) -> F32 | None:
    """Return what the projections lack, (n, rows, x); None where that is not significant.

    ``v/2 |grad A|^2`` with A taken from the reprojections and v from the residual, one number for all: what a volume
    made of the squared gradients does not explain of them is looked for there, beside displacement, gain and plane of
    each projection. v is at most that of a point spread of 1.5 px.

    Parameters
    ----------
    scene : Scene
        Without a band.
    placed, model : (n, rows, x) arrays
        Projections and their reprojections.
    shift : (n, 2) array
        Displacements that `placed` was made with.
    """
    rows = np.arange(_EVERY // 2, placed.shape[1], _EVERY)
    if not len(rows):
        return None
    gradient = squared_gradient(model, _BLUR_PX)
    asked = np.ascontiguousarray(gradient[:, rows])
    lacking = asked - scene.explained(asked, rows)
    residual, weight = placed - model, scene.weight(shift)
    products: FloatArray = np.empty((len(shift), 8, 8))
    in_threads(len(shift), lambda a, b: _products_of_rows(a, b, lacking, residual, model, weight, rows, products))
    products = products[scene.usable]
    share, _ = solve_normal(products[:, :6, :6], products[:, :6, 6])
    wanted, seen = (products[:, 6, k] - np.einsum("ni,ni->n", share, products[:, :6, k]) for k in (6, 7))
    total = max(float(wanted.sum()), 1e-30)
    half_variance = -float(seen.sum()) / total
    sigma = float(np.sqrt(np.sum((seen + half_variance * wanted) ** 2))) / total
    if not half_variance > _SIGNIFICANT * sigma:
        return None
    return np.asarray(np.float32(min(half_variance, _LARGEST_PX**2 / 2)) * gradient)


@_kernel
def _products_of_rows(
    first: int, end: int, lines: F32, residual: F32, model: F32, weight: F32, rows: npt.NDArray[np.int64],
    out: FloatArray,
) -> None:  # fmt: skip
    """Sum products of the columns of a fit, of `lines` and of `residual` over some rows: (frames, 8, 8).

    The columns are the gradient in y and x of `model`, itself, 1, and the place in y and x. `lines` (n, some, x) are
    the rows `rows` of the frames.
    """
    _, h, w = model.shape
    c = np.zeros((8, w - 2), np.float32)
    weighted = np.empty(w - 2, np.float32)
    for x in range(w - 2):
        c[3, x] = 1.0
        c[5, x] = np.float32((x + 1) / w)
    for f in range(first, end):
        out[f] = 0.0
        for k in range(rows.size):
            y = rows[k]
            if y < 1 or y > h - 2:
                continue
            up, down = model[f, y - 1, 1 : w - 1], model[f, y + 1, 1 : w - 1]
            left, here, right = model[f, y, : w - 2], model[f, y, 1 : w - 1], model[f, y, 2:]
            u, q, r = weight[f, y, 1 : w - 1], lines[f, k, 1 : w - 1], residual[f, y, 1 : w - 1]
            for x in range(w - 2):
                c[0, x] = down[x] - up[x]
            for x in range(w - 2):
                c[1, x] = right[x] - left[x]
            c[2] = here
            c[4] = np.float32(y / w)
            c[6] = q
            c[7] = r
            for i in range(8):
                for x in range(w - 2):
                    weighted[x] = u[x] * c[i, x]
                for j in range(i + 1):
                    total = np.float32(0.0)
                    for x in range(w - 2):
                        total += weighted[x] * c[j, x]
                    out[f, i, j] += total
        for i in range(8):
            for j in range(i):
                out[f, j, i] = out[f, i, j]
