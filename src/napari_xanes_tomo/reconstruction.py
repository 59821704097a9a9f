"""Slices from aligned projections: filtered back-projection, its variance, and iterative solvers.

Projections are ``(angle, y, column)`` of absorbance (line integrals, voxel size 1), the rotation axis in the middle of
the columns; volumes are ``(y, z, x)`` in 1/pixel. Everything runs on `projector.Projector`; TomoPy can be put behind
the same `Reconstructor` protocol where it is importable.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from napari_xanes_tomo.projector import FILTERS, Projector, filter_response

from .model import XanesTomoError

__all__ = [
    "FILTERS",
    "WINDOW_SIGMA",
    "FilteredBackProjection",
    "Iterative",
    "Reconstructor",
    "TomoPy",
    "angular_weights",
    "available_backends",
    "cgls",
    "fbp",
    "fbp_variance",
    "filter_response",
    "reconstructor",
    "sirt",
]

ITERATIONS = {"sirt": 100, "cgls": 10}
"""How often each iterative algorithm goes through the data unless told."""
WINDOW_SIGMA = {"ramp": 0.0, "shepp-logan": 12**-0.5, "cosine": 0.5, "hann": 0.5**0.5}
"""Blur of the slices by the window of each filter, sigma of a Gaussian, px: both begin as 1 - 2 (pi sigma f)^2."""


F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


def angular_weights(theta_deg: npt.ArrayLike, *, usable: npt.ArrayLike | None = None, max_gap: float = 4.0) -> F64:
    """Return the share of the half turn each projection stands for, (n,) radians.

    Half the gap to the neighbour on either side, modulo 180 degrees; projections at the same angle share. A gap wider
    than `max_gap` times the median gap is a missing wedge, not coarse sampling: it counts as one median gap, since no
    projection can stand for what was never measured. Uniform angles over a half turn get pi / n each.

    Parameters
    ----------
    theta_deg : (n,) array
        Any order, degrees.
    usable : (n,) bool array, optional
        False gives weight 0 and the neighbours take over.
    max_gap : float
        In median gaps.
    """
    theta = np.asarray(theta_deg, dtype=float)
    if theta.ndim != 1 or not np.isfinite(theta).all():
        raise ValueError(f"theta_deg: expected a list of finite angles, got shape {theta.shape}")
    keep = np.ones(theta.size, dtype=bool) if usable is None else np.asarray(usable, dtype=bool)
    if keep.shape != theta.shape:
        raise ValueError(f"usable: expected {theta.shape}, got {keep.shape}")
    weights = np.zeros(theta.size)
    turned = np.round(np.mod(theta[keep], 180.0), 6) % 180.0
    distinct, which, count = np.unique(turned, return_inverse=True, return_counts=True)
    if distinct.size == 0:
        return weights
    if distinct.size == 1:
        weights[keep] = np.pi / count[0]
        return weights
    gaps = np.diff(np.append(distinct, distinct[0] + 180.0))  # gap after each angle
    median = float(np.median(gaps))
    gaps = np.where(gaps > max_gap * median, median, gaps)
    share = 0.5 * (gaps + np.roll(gaps, 1))
    weights[keep] = np.deg2rad(share[which] / count[which])
    return weights


def _projector(
    projections: npt.ArrayLike, theta_deg: npt.ArrayLike, n: int | None, pad: float, threads: int | None
) -> tuple[F32, Projector]:
    data = np.ascontiguousarray(projections, dtype=np.float32)
    theta = np.asarray(theta_deg, dtype=float)
    if data.ndim != 3 or theta.shape != data.shape[:1]:
        raise ValueError(
            f"projections: expected (angle, y, column) with one theta each, got {data.shape} and {theta.shape} angles"
        )
    columns = data.shape[2]
    return data, Projector(columns if n is None else n, theta, n_detector=columns, pad=pad, threads=threads)


def fbp(
    projections: npt.ArrayLike,
    theta_deg: npt.ArrayLike,
    *,
    weights: npt.ArrayLike | None = None,
    filter: str = "ramp",
    shift: npt.ArrayLike | None = None,
    n: int | None = None,
    pad: float = 2.0,
    extend: int = 0,
    threads: int | None = None,
) -> F32:
    """Filter and back-project ``(angle, y, column)``; return ``(y, z, x)`` float32, 1/pixel.

    Kak & Slaney, *Principles of Computerized Tomographic Imaging*, doi 10.1137/1.9780898719277, chapter 3.

    Parameters
    ----------
    projections : (angles, rows, columns) array
        Absorbance, rotation axis at ``(columns - 1) / 2``.
    theta_deg : (angles,) array
        Any angles, degrees.
    weights : (angles,) array, optional
        Radians; `angular_weights` unless given. 0 leaves a projection out.
    filter : {"ramp", "shepp-logan", "cosine", "hann", "none"}
    shift : (angles,) array or float, optional
        Displacement of the content of each projection (or of the rotation axis) to the right, columns.
    n : int, optional
        Size of the slices; as many as columns unless given.
    pad : float
        Length of the filtered line over the number of columns; below 2 the mean is slightly off.
    extend : int
        Columns by which both ends are continued with their last value before filtering, for objects that leave the
        field.
    threads : int, optional
        All cores unless given.
    """
    data = np.asarray(projections, dtype=np.float32)
    size = data.shape[-1] if n is None else n
    if extend > 0 and data.ndim == 3:
        data = np.pad(data, ((0, 0), (0, 0), (extend, extend)), mode="edge")
    data, projector = _projector(data, theta_deg, size, pad, threads)
    if weights is None:
        weights = angular_weights(theta_deg)
    return projector.filtered(data, filter, weights, shift=shift)


def fbp_variance(
    variance: npt.ArrayLike,
    theta_deg: npt.ArrayLike,
    *,
    weights: npt.ArrayLike | None = None,
    filter: str = "ramp",
    shift: npt.ArrayLike | None = None,
    n: int | None = None,
    pad: float = 2.0,
    noise_response: npt.ArrayLike | None = None,
    threads: int | None = None,
) -> F32:
    """Return the variance of every voxel of `fbp`, ``(y, z, x)`` float32, from that of every projection pixel.

    A voxel is ``sum_theta w sum_j s_j h(u - j)`` with h the filter interpolated without loss between columns, so its
    variance for independent pixels is ``sum_theta w^2 sum_j var_j h^2(u - j)``. The part of ``h^2`` beyond the Nyquist
    frequency only describes how the variance depends on the sub-pixel position where `variance` jumps from column to
    column; it is left out, and the rest is a back-projection with a filter of its own: ``integral H(g) H(f - g) dg``.

    Parameters
    ----------
    variance : (angles, rows, columns) array
        Variance of the absorbance, independent between pixels.
    noise_response : (length // 2 + 1,) array, optional
        Amplitude response along the columns that the noise has been through before (an interpolation, a smoothing), on
        frequencies 0 .. 0.5 cycles/pixel, any length. Then `variance` is that of the noise before it.
    theta_deg, weights, filter, shift, n, pad, threads
        As in `fbp`.
    """
    data, projector = _projector(variance, theta_deg, n, pad, threads)
    length = projector.filter_length
    response = filter_response(filter, length)
    if noise_response is not None:
        given = np.asarray(noise_response, dtype=float)
        f = np.arange(response.size) / length
        response = response * np.interp(f, np.linspace(0.0, 0.5, given.size), given)
    half = response[: (length - 1) // 2 + 1]
    both = np.concatenate([half[:0:-1], half])
    padded = np.fft.rfft(both, 2 * both.size)
    square = np.fft.irfft(padded**2, 2 * both.size)[both.size - 1 :][: length // 2 + 1] / length
    w = angular_weights(theta_deg) if weights is None else np.asarray(weights, dtype=float)
    out = projector.adjoint(data, shift=shift, weight=w**2, response=square)
    return np.maximum(out, 0.0, out=out)


def _mask(support: npt.ArrayLike | None, n: int) -> npt.NDArray[np.float32]:
    """(n, n) or (rows, n, n): the given support, else the inscribed circle."""
    if support is not None:
        return np.asarray(support, dtype=np.float32)
    c = np.arange(n) - (n - 1) / 2
    return (c[:, None] ** 2 + c**2 <= (n / 2) ** 2).astype(np.float32)


def sirt(
    projections: npt.ArrayLike,
    theta_deg: npt.ArrayLike,
    *,
    iterations: int = 20,
    start: npt.ArrayLike | None = None,
    support: npt.ArrayLike | None = None,
    positivity: bool = False,
    weights: npt.ArrayLike | None = None,
    shift: npt.ArrayLike | None = None,
    n: int | None = None,
    threads: int | None = None,
) -> F32:
    """Reconstruct by SIRT from ``(angle, y, column)``; return ``(y, z, x)`` float32, 1/pixel.

    Gilbert 1972, doi 10.1016/0022-5193(72)90180-4: the residual of each ray over its length in the field is
    back-projected and averaged over the angles.

    Parameters
    ----------
    iterations : int
    start : (rows, n, n) array, optional
        Zero unless given.
    support : (n, n) or (rows, n, n) array, optional
        The slice is kept zero where this is 0; the inscribed circle unless given.
    positivity : bool
        Clip negative values after every iteration.
    weights : (angles,) array, optional
        Relative weight of each projection, e.g. `angular_weights` or 0 for one left out.
    projections, theta_deg, shift, n, threads
        As in `fbp`.
    """
    data, projector = _projector(projections, theta_deg, n, 1.5, threads)
    mask = _mask(support, projector.n)
    w = np.ones(len(data)) if weights is None else np.asarray(weights, dtype=float)
    u = np.arange(data.shape[2]) - (data.shape[2] - 1) / 2
    radius = projector.n / 2
    # rays that graze the circle are short; dividing by less than sqrt(n) would only amplify their noise
    chord = 2 * np.sqrt(np.maximum(radius**2 - u**2, projector.n / 4))
    x = np.zeros((data.shape[1], projector.n, projector.n), np.float32)
    if start is not None:
        x += np.asarray(start, dtype=np.float32) * mask
    inverse = (1 / chord).astype(np.float32)
    residual, step = np.empty_like(data), np.empty_like(x)
    for _ in range(iterations):
        projector.forward(x, shift=shift, out=residual)
        np.subtract(data, residual, out=residual)
        residual *= inverse
        x += projector.adjoint(residual, shift=shift, weight=w / w.sum(), out=step)
        x *= mask
        if positivity:
            np.maximum(x, 0.0, out=x)
    return x


def cgls(
    projections: npt.ArrayLike,
    theta_deg: npt.ArrayLike,
    *,
    iterations: int = 10,
    start: npt.ArrayLike | None = None,
    support: npt.ArrayLike | None = None,
    weights: npt.ArrayLike | None = None,
    shift: npt.ArrayLike | None = None,
    n: int | None = None,
    threads: int | None = None,
) -> F32:
    """Solve least squares by conjugate gradients, each row on its own; return ``(y, z, x)`` float32, 1/pixel.

    Hestenes & Stiefel 1952, doi 10.6028/jres.049.044. Few iterations regularise. Parameters as in `sirt`.
    """
    data, projector = _projector(projections, theta_deg, n, 1.5, threads)
    mask = _mask(support, projector.n)
    w = np.ones(len(data)) if weights is None else np.asarray(weights, dtype=float)
    root = np.sqrt(w).astype(np.float32)[:, None, None]

    def norm(a: F32, what: str) -> F64:
        return np.asarray(np.einsum(f"{what},{what}->y", a, a, dtype=np.float64))

    x = np.zeros((data.shape[1], projector.n, projector.n), np.float32)
    r = data * root
    if start is not None:
        x += np.asarray(start, dtype=np.float32) * mask
        r = r - root * projector.forward(x, shift=shift)
    s = projector.adjoint(r * root, shift=shift) * mask
    p = s
    gamma = norm(s, "yzx")
    for _ in range(iterations):
        q = root * projector.forward(p, shift=shift)
        below = norm(q, "ayx")
        alpha = np.divide(gamma, below, out=np.zeros_like(gamma), where=below > 0).astype(np.float32)
        x = x + alpha[:, None, None] * p
        r = r - alpha[None, :, None] * q
        s = projector.adjoint(r * root, shift=shift) * mask
        new = norm(s, "yzx")
        beta = np.divide(new, gamma, out=np.zeros_like(gamma), where=gamma > 0).astype(np.float32)
        p = s + beta[:, None, None] * p
        gamma = new
    return x


# ---------------------------------------------------------------- back ends


@runtime_checkable
class Reconstructor(Protocol):
    """Anything that turns aligned projections ``(angle, y, column)`` into slices ``(y, z, x)``, 1/pixel."""

    @property
    def name(self) -> str:
        """Short name, for recipes and reports."""

    def __call__(
        self,
        projections: npt.ArrayLike,
        theta_deg: npt.ArrayLike,
        *,
        weights: npt.ArrayLike | None = None,
        shift: float = 0.0,
    ) -> F32:
        """Reconstruct; `weights` in radians (0 leaves a projection out), `shift` of the rotation axis in columns."""


class FilteredBackProjection:
    """The package's own `fbp` as a `Reconstructor`."""

    def __init__(self, filter: str = "ramp", *, extend: int = 0, threads: int | None = None) -> None:
        self.filter, self.extend, self.threads = filter, extend, threads

    @property
    def name(self) -> str:
        """Short name, for recipes and reports."""
        return f"fbp ({self.filter})"

    def __call__(
        self,
        projections: npt.ArrayLike,
        theta_deg: npt.ArrayLike,
        *,
        weights: npt.ArrayLike | None = None,
        shift: float = 0.0,
    ) -> F32:
        """Reconstruct; see `Reconstructor`."""
        return fbp(
            projections,
            theta_deg,
            weights=weights,
            filter=self.filter,
            shift=shift,
            extend=self.extend,
            threads=self.threads,
        )


class Iterative:
    """The package's own `sirt` or `cgls` as a `Reconstructor`; weights only choose the projections that are used.

    Parameters
    ----------
    algorithm : {"sirt", "cgls"}
    iterations : int
        0 takes those of `ITERATIONS`.
    """

    def __init__(self, algorithm: str = "sirt", *, iterations: int = 0, threads: int | None = None) -> None:
        if algorithm not in ITERATIONS:
            raise ValueError(f"algorithm: expected one of {', '.join(ITERATIONS)}, got {algorithm!r}")
        self.algorithm, self.iterations, self.threads = algorithm, iterations or ITERATIONS[algorithm], threads

    @property
    def name(self) -> str:
        """Short name, for recipes and reports."""
        return f"{self.algorithm} ({self.iterations} iterations)"

    def __call__(
        self,
        projections: npt.ArrayLike,
        theta_deg: npt.ArrayLike,
        *,
        weights: npt.ArrayLike | None = None,
        shift: float = 0.0,
    ) -> F32:
        """Reconstruct; see `Reconstructor`."""
        data, theta = _used(projections, theta_deg, weights)
        solve = sirt if self.algorithm == "sirt" else cgls
        return solve(data, theta, iterations=self.iterations, shift=shift, threads=self.threads)


class TomoPy:
    """TomoPy's algorithms as a `Reconstructor`; TomoPy is imported at the first call.

    Weights only choose the projections that are used (0 leaves one out): TomoPy has no angular weights. Which way
    round its slices come out is measured once on a small off-centre spot, so that no assumption about its conventions
    is made.

    Parameters
    ----------
    algorithm : str
        ``gridrec``, ``sirt``, ...
    pad : float
        Lines are padded to this times the number of columns (gridrec does not pad).
    options : mapping
        Passed on, e.g. ``{"num_iter": 50}``, ``{"filter_name": "parzen"}``.
    """

    def __init__(self, algorithm: str = "gridrec", *, pad: float = 2.0, options: dict[str, Any] | None = None) -> None:
        self.algorithm, self.pad, self.options = algorithm, pad, dict(options or {})

    @property
    def name(self) -> str:
        """Short name, for recipes and reports."""
        return f"tomopy {self.algorithm}"

    def _recon(self, data: F32, theta_deg: F64, shift: float) -> F32:
        tomopy = importlib.import_module("tomopy")
        columns = data.shape[2]
        extra = int(np.ceil((self.pad - 1) * columns / 2))
        padded = np.pad(data, ((0, 0), (0, 0), (extra, extra)))
        out = tomopy.recon(
            padded,
            np.deg2rad(theta_deg),
            center=(columns - 1) / 2 + extra + shift,
            sinogram_order=False,
            algorithm=self.algorithm,
            **self.options,
        )
        return np.asarray(out[:, extra : extra + columns, extra : extra + columns], dtype=np.float32)

    def __call__(
        self,
        projections: npt.ArrayLike,
        theta_deg: npt.ArrayLike,
        *,
        weights: npt.ArrayLike | None = None,
        shift: float = 0.0,
    ) -> F32:
        """Reconstruct; see `Reconstructor`."""
        data, theta = _used(projections, theta_deg, weights)
        turns, flip = _tomopy_orientation()
        return np.ascontiguousarray(_orient(self._recon(data, theta, float(shift)), turns, flip))


def _used(projections: npt.ArrayLike, theta_deg: npt.ArrayLike, weights: npt.ArrayLike | None) -> tuple[F32, F64]:
    """Projections and angles whose weight is not 0."""
    data, theta = np.asarray(projections, dtype=np.float32), np.asarray(theta_deg, dtype=float)
    if weights is None:
        return data, theta
    keep = np.asarray(weights, dtype=float) > 0
    return data[keep], theta[keep]


def _orient(volume: F32, turns: int, flip: bool) -> F32:
    return np.rot90(volume[:, :, ::-1] if flip else volume, turns, axes=(1, 2))


@lru_cache(maxsize=1)
def _tomopy_orientation() -> tuple[int, bool]:
    """Find the quarter turns and flip that bring TomoPy's slices to ``(z, x)``."""
    n, theta = 32, np.arange(0.0, 180.0, 4.0)
    c = np.arange(n) - (n - 1) / 2
    spot = np.exp(-((c[:, None] - 3.0) ** 2 + (c - 7.0) ** 2) / 4.0)[None].astype(np.float32)
    found = TomoPy()._recon(Projector(n, theta).forward(spot), theta, 0.0)
    choices = [(turns, flip) for turns in range(4) for flip in (False, True)]
    return max(choices, key=lambda choice: float((_orient(found, *choice) * spot).sum()))


def available_backends() -> tuple[str, ...]:
    """Return the names of the back ends that can be used here: ``fbp`` always, ``tomopy`` where it is importable."""
    return ("fbp", "tomopy") if importlib.util.find_spec("tomopy") is not None else ("fbp",)


def reconstructor(
    algorithm: str = "fbp",
    *,
    filter: str = "ramp",
    iterations: int = 0,
    extend: int = 0,
    threads: int | None = None,
) -> Reconstructor:
    """Return what reconstructs in the way a recipe names.

    Parameters
    ----------
    algorithm : {"fbp", "sirt", "cgls"} or str
        ``tomopy-gridrec``, ``tomopy-sirt``, ... are TomoPy's.
    filter : str
        Window of `fbp` and of gridrec.
    iterations : int
        Of an iterative algorithm; 0 takes those of `ITERATIONS` (TomoPy's: SIRT's).
    extend : int
        As in `fbp`.
    threads : int, optional

    Raises
    ------
    XanesTomoError
        TomoPy is asked for and cannot be imported.
    """
    if algorithm == "fbp":
        return FilteredBackProjection(filter, extend=extend, threads=threads)
    if algorithm in ITERATIONS:
        return Iterative(algorithm, iterations=iterations, threads=threads)
    own, _, theirs = algorithm.partition("tomopy-")
    if own or not theirs:
        raise ValueError(f"algorithm: expected fbp, sirt, cgls or tomopy-..., got {algorithm!r}")
    if "tomopy" not in available_backends():
        raise XanesTomoError(
            f"maps.reconstruction: {algorithm} needs TomoPy, which is not installed here (conda install -c conda-forge "
            "tomopy); fbp, sirt and cgls need nothing"
        )
    window = {"ramp": "ramlak", "shepp-logan": "shepp", "cosine": "cosine", "hann": "hann"}
    options: dict[str, Any] = {"ncore": threads}
    options |= (
        {"filter_name": window[filter]} if theirs == "gridrec" else {"num_iter": iterations or ITERATIONS["sirt"]}
    )
    return TomoPy(theirs, options=options)
