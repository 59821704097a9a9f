"""What a person looks at to judge a tomogram: residuals, slices, sinograms with what was fitted, a suggested box.

Pure functions; frames are ``[y, x]``, angles degrees, shifts ``[dy, dx]`` of the content, positive down / right.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .absorbance import read_absorbance
from .agreement import object_support
from .counts import own_beam
from .flats import Beam
from .model import Alignment, EnergyScan, FloatArray, Progress, XanesTomoError, no_progress
from .parallel import in_threads
from .projector import Projector
from .reconstruction import angular_weights
from .resample import place

__all__ = [
    "edge_traces",
    "held_out",
    "residual_stack",
    "ring_correlation",
    "sinogram",
    "suggest_box",
    "tomogram_views",
]

F32 = npt.NDArray[np.float32]

_HARMONICS = 6
_BLOCKS = 60  # of neighbouring angles, in half a turn
_FOLDS = 4


def suggest_box(frames: npt.ArrayLike, *, margin: float = 0.03) -> tuple[int, int, int, int] | None:
    """Suggest a box ``(y0, y1, x0, x1)``, ends not included, around the largest object of a few projections.

    Parameters
    ----------
    frames : (n, y, x) array
        Absorbance at a few angles spread over the scan, zero in the air.
    margin : float
        Space left around it, as a part of the width of the frame.

    Returns
    -------
    tuple of int or None
        None where nothing absorbs, or where the object fills the frame.
    """
    from scipy.ndimage import gaussian_filter, label

    data = np.nan_to_num(np.asarray(frames, dtype=np.float32))
    if data.ndim != 3 or not data.size:
        raise ValueError(f"frames: expected (n, y, x), got {data.shape}")
    _, height, width = data.shape
    mean = gaussian_filter(data.mean(axis=0), max(1.0, width / 128))
    top = float(np.percentile(mean, 99.5))
    noise = 1.4826 * float(np.median(np.abs(mean - np.median(mean))))
    if top <= max(4 * noise, 1e-6):
        noise = 0.0 if float(np.median(mean)) > 0.5 * top else noise  # it covers more than half of the frame
    if top <= max(4 * noise, 1e-6):
        return None
    # A tenth of the typical value: the mean fades at the ends, which not every angle reaches.
    labels, count = label(mean > max(0.1 * top, 3 * noise))
    if not count:
        return None
    size = np.bincount(labels.ravel())
    size[0] = 0
    ys, xs = np.nonzero(labels == size.argmax())
    space = round(margin * width)
    box = (
        max(0, int(ys.min()) - space),
        min(height, int(ys.max()) + 1 + space),
        max(0, int(xs.min()) - space),
        min(width, int(xs.max()) + 1 + space),
    )
    return None if box == (0, height, 0, width) else box


def residual_stack(
    data: npt.ArrayLike, theta_deg: npt.ArrayLike, alignment: Alignment, *, progress: Progress = no_progress
) -> F32:
    """Return ``(n, y, x)``: aligned projections minus their reprojection.

    Every projection is predicted by a volume in which its block of angles (about 3 degrees) has no part.

    Parameters
    ----------
    data : (n, y, x) array
        Absorbance.
    theta_deg : (n,) array
        Degrees.
    alignment : Alignment
        Of these projections, in pixels of `data`.
    progress : callable
        See `Progress`.
    """
    stack = np.ascontiguousarray(data, dtype=np.float32)
    theta = np.asarray(theta_deg, dtype=float)
    if stack.ndim != 3 or theta.shape != stack.shape[:1]:
        raise ValueError(f"data: expected (n, y, x) with one angle each, got {stack.shape} and {theta.shape} angles")
    if len(theta) < 8:
        raise XanesTomoError(f"residual: expected at least 8 projections, got {len(theta)}")
    progress("residual", 0, _FOLDS + 1)
    placed = place(stack, alignment)
    return np.asarray(placed - held_out(placed, theta, progress))


def held_out(placed: F32, theta: FloatArray, progress: Progress) -> F32:
    """Predict every aligned projection by a volume without its block of neighbouring angles.

    Blocks of about 3 degrees; the volumes lack every fourth block.
    """
    width, n = placed.shape[2], len(theta)
    order = np.argsort(theta, kind="stable")
    fold = np.empty(n, dtype=np.intp)
    fold[order] = (np.arange(n) // max(1, round(n / _BLOCKS))) % _FOLDS
    out = np.empty_like(placed)
    support: F32 | None = None
    for k in range(_FOLDS):
        asked = np.flatnonzero(fold == k)
        known = np.flatnonzero(fold != k)
        share = angular_weights(theta[known], max_gap=8.0)
        volume = Projector(width, theta[known]).filtered(placed[known], angular_weight=share)
        # Where the object may be, the projections left out do not tell: the first volume serves for all.
        support = object_support(volume) if support is None else support
        volume *= support
        out[asked] = Projector(width, theta[asked]).forward(volume)
        progress("residual", k + 1, _FOLDS + 1)
    progress("residual", _FOLDS + 1, _FOLDS + 1)
    return out


def tomogram_views(data: npt.ArrayLike, theta_deg: npt.ArrayLike, alignment: Alignment) -> dict[str, F32]:
    """Return what shows at a glance how a tomogram is aligned, all of the row of the object that has most mass.

    Parameters
    ----------
    data : (n, y, x) array
        Absorbance.
    theta_deg : (n,) array
    alignment : Alignment
        Of these projections, in pixels of `data`.

    Returns
    -------
    dict of str to array
        ``before``, ``after``: (z, x) the slice with the object standing still as a whole (its mean place and orbit
        alone taken out) and as aligned. ``sinogram``: (n, x) the row, sideways as it was recorded; ``traces``: (n, 3)
        see `edge_traces`. ``residual``: (n, x) aligned minus held-out reprojection. ``row``: (1,) its number.
    """
    stack = np.ascontiguousarray(data, dtype=np.float32)
    theta = np.asarray(theta_deg, dtype=float)
    grid = (stack.shape[1], stack.shape[2])
    shift = np.asarray(alignment.shift, dtype=float)
    middle = int(
        np.argmax(
            np.median(
                place(
                    stack[:: max(1, len(stack) // 12)],
                    Alignment(shift[:: max(1, len(stack) // 12)], alignment.sigma[:: max(1, len(stack) // 12)]),
                ).sum(axis=2),
                axis=0,
            )
        )
    )

    def row(by: FloatArray) -> F32:
        return place(stack, Alignment(by, np.zeros_like(by)), rows=(middle, middle + 1), grid_shape=grid)

    t = np.deg2rad(theta)
    basis = np.stack([np.ones_like(t), np.cos(t), np.sin(t)], axis=1)
    still = np.stack(
        [np.full(len(t), shift[:, 0].mean()), basis @ np.linalg.lstsq(basis, shift[:, 1], rcond=None)[0]], axis=1
    )
    sideways = row(shift * [1.0, 0.0])
    after = row(shift)
    weight = angular_weights(theta)
    projector = Projector(stack.shape[2], theta)
    sinogram = sideways[:, 0]
    return {
        "before": projector.filtered(row(still), angular_weight=weight)[0],
        "after": projector.filtered(after, angular_weight=weight)[0],
        "sinogram": sinogram,
        "traces": edge_traces(sinogram, theta, shift[:, 1]).astype(np.float32),
        "residual": (after - held_out(after, theta, no_progress))[:, 0],
        "row": np.array([middle], dtype=np.float32),
    }


def ring_correlation(first: npt.ArrayLike, second: npt.ArrayLike) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return frequency (cycles/px), Fourier ring correlation (n, rings) and independent coefficients per ring.

    Parameters
    ----------
    first, second : (n, y, x) arrays
        Compared frame by frame, under a Hann window.
    """
    from scipy.fft import fftfreq, rfft2, rfftfreq

    a, b = (np.asarray(v, dtype=np.float32) for v in (first, second))
    n, h, w = a.shape
    window = (np.hanning(h + 2)[1:-1, None] * np.hanning(w + 2)[None, 1:-1]).astype(np.float32)
    size = min(h, w)
    radius = np.hypot(fftfreq(h)[:, None], rfftfreq(w)[None, :])
    ring = np.minimum(np.rint(radius * size).astype(int), size // 2 + 1).ravel()
    # Half of the transform holds it all; what it leaves out is counted with what it mirrors.
    mirrored = np.full(radius.shape, 2.0, dtype=np.float32)
    mirrored[:, 0] = 1.0
    if w % 2 == 0:
        mirrored[:, -1] = 1.0
    # The window makes neighbouring coefficients depend on each other; a real image has every coefficient twice.
    share = float(np.mean(window**2) ** 2 / np.mean(window**4)) / 2
    count = np.bincount(ring, mirrored.ravel(), size // 2 + 2)[: size // 2 + 1] * share
    out = np.zeros((n, size // 2 + 1))

    def some(start: int, end: int) -> None:
        for i in range(start, end):
            fa, fb = (rfft2((f[i] - f[i].mean()) * window) for f in (a, b))
            sums = [
                np.bincount(ring, (v * mirrored).ravel(), size // 2 + 2)[: size // 2 + 1]
                for v in (
                    fa.real * fb.real + fa.imag * fb.imag,
                    fa.real**2 + fa.imag**2,
                    fb.real**2 + fb.imag**2,
                )
            ]
            out[i] = sums[0] / np.sqrt(np.maximum(sums[1] * sums[2], 1e-30))

    in_threads(n, some)
    return np.arange(size // 2 + 1) / size, out, count


def sinogram(
    scan: EnergyScan, air: npt.ArrayLike, shift: npt.ArrayLike, row: int, beam: Beam | None = None
) -> tuple[F32, npt.NDArray[np.intp]]:
    """Return one row of the object at every angle, ``(n, x)``, sideways as it was recorded, and the n projections.

    Parameters
    ----------
    scan : EnergyScan
    air : (all projections, 3 or 6) array
        Air; see `air.plane`.
    shift : (all projections, 2) array
        ``[dy, dx]`` found; only dy is undone, so that the row is the same part of the object everywhere.
    row : int
        Row of the common grid.
    beam : Beam, optional
        What the counts are divided by; the plain flats of every half unless given.
    """
    height, width = scan.frames.frame_shape
    moved = np.asarray(shift, dtype=float)
    planes = np.nan_to_num(np.asarray(air, dtype=float))
    if not 0 <= row < height:
        raise XanesTomoError(f"sinogram: expected a row from 0 to {height - 1}, got {row}")
    use = np.flatnonzero(scan.usable & np.isfinite(moved[:, 0]))
    out = np.zeros((len(use), width), dtype=np.float32)
    beam = own_beam(scan) if beam is None else beam
    images = beam.basis((0, height))[0]
    for i, number in enumerate(use):
        at = row + moved[number, 0]
        y0 = int(np.clip(np.floor(at), 0, height - 2))
        part = float(np.clip(at - y0, 0, 1))
        two = read_absorbance(
            scan, beam, [int(number)], (y0, y0 + 2), air=planes, basis=images[:, y0 : y0 + 2], threads=1
        )
        out[i] = (1 - part) * two[0, 0] + part * two[0, 1]
    return out, use


def edge_traces(sinogram: npt.ArrayLike, theta_deg: npt.ArrayLike, shift_x: npt.ArrayLike) -> FloatArray:
    """Return ``(n, 3)`` columns: left edge, rotation axis and right edge of a rigid object moved by `shift_x`.

    The edges of the sinogram, the shifts taken out, are fitted by a smooth curve in the angle (the support function of
    the slice, a few harmonics), and the shifts put back: where trace and picture part, the shift is wrong.

    Parameters
    ----------
    sinogram : (n, x) array
        Absorbance, zero in the air.
    theta_deg, shift_x : (n,) arrays
        Degrees; displacement of the content found, columns.

    Notes
    -----
    The right edge at theta is minus the left one half a turn on, so both are one function over the full turn.
    """
    from scipy.ndimage import gaussian_filter1d

    data = np.asarray(sinogram, dtype=float)
    t, moved = np.deg2rad(np.asarray(theta_deg, dtype=float)), np.asarray(shift_x, dtype=float)
    n, width = data.shape
    middle = (width - 1) / 2
    smooth = gaussian_filter1d(data, 1.0, axis=1)
    body = smooth > 0.25 * np.percentile(smooth, 95)
    out = np.full((n, 3), np.nan)
    out[:, 1] = middle + moved
    seen = body.any(axis=1) & np.isfinite(moved)
    if seen.sum() < 4 * _HARMONICS:
        return out
    left = body.argmax(axis=1) - middle - moved
    right = width - 1 - body[:, ::-1].argmax(axis=1) - middle - moved
    angle = np.concatenate([t[seen], t[seen] + np.pi])
    value = np.concatenate([right[seen], -left[seen]])

    def basis(a: FloatArray) -> FloatArray:
        columns = [np.ones_like(a)]
        for k in range(1, _HARMONICS + 1):
            columns += [np.cos(k * a), np.sin(k * a)]
        return np.stack(columns, axis=1)

    keep = np.ones(len(value), dtype=bool)
    fit: FloatArray = np.zeros(2 * _HARMONICS + 1)
    for _ in range(3):  # twice more without what stands out: specks beside the object
        fit = np.linalg.lstsq(basis(angle[keep]), value[keep], rcond=None)[0]
        rest = value - basis(angle) @ fit
        spread = 1.4826 * np.median(np.abs(rest)) + 1e-9
        keep = np.abs(rest) < 4 * spread
    out[:, 2] = middle + moved + basis(t) @ fit
    out[:, 0] = middle + moved - basis(t + np.pi) @ fit
    return out
