"""Parallel-beam forward and back projection on a CPU, many detector rows at once, an exact adjoint pair.

A projection's one-dimensional spectrum is a radial line through the two-dimensional spectrum of the slice (Fourier
slice theorem), so projecting is one 2-D FFT, an interpolation onto radial lines and short 1-D FFTs. The interpolation
uses a Kaiser-Bessel kernel on a slightly oversampled grid (non-uniform FFT; Fessler & Sutton 2003, doi
10.1109/TSP.2002.807005; kernel shape: Beatty et al. 2005, doi 10.1109/TMI.2005.848376). Back projection is the same
chain transposed, hence exact.

Sixteen slices travel together: eight complex numbers a grid node, real part one slice and imaginary part another,
which is one cache line and two SIMD registers. FFTs, gridding and phases are therefore SIMD over slices with no
shuffles, and the interpolation weights are read once for sixteen slices. Kernels release the GIL and are run by plain
threads; who computes what does not depend on the number of threads, so neither does the result.

Volumes are ``(y, z, x)``, projections ``(angle, y, column)``; a point ``(x, z)``, measured from the middle ``(n - 1) /
2`` of the grid, is seen at ``u = x cos(theta) + z sin(theta)`` from the middle ``(n_detector - 1) / 2`` of the
detector.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from napari_xanes_tomo.parallel import cores, share

from .fft import fast_length, plan
from .kernels import (
    NODE,
    ROWS,
    adjoint_bands,
    adjoint_lines,
    adjoint_z,
    fill_phases,
    fill_taps,
    forward_lines,
    forward_x,
    forward_z,
)
from .simd import F32, F64

__all__ = ["FILTERS", "Projector", "filter_response"]

FILTERS = ("none", "ramp", "shepp-logan", "cosine", "hann")


def filter_response(name: str, n: int) -> F64:
    """Return the response of a reconstruction filter, (n // 2 + 1,) on the frequencies of a length-`n` real FFT.

    The ramp is the transform of its spatial definition (1/4 at 0, ``-1 / (pi j)^2`` at odd j), which keeps the mean
    right (Kak & Slaney, *Principles of Computerized Tomographic Imaging*, doi 10.1137/1.9780898719277, eq. 3.29); the
    other filters are the ramp times their window. Frequencies in cycles/pixel, so that the ramp is |f| away from 0.

    Parameters
    ----------
    name : {"none", "ramp", "shepp-logan", "cosine", "hann"}
    n : int
        Length of the (padded) transform.
    """
    if name not in FILTERS:
        raise ValueError(f"filter: expected one of {', '.join(FILTERS)}, got {name!r}")
    f = np.arange(n // 2 + 1) / n
    if name == "none":
        return np.ones(n // 2 + 1)
    j = np.minimum(np.arange(n), n - np.arange(n))
    taps = np.zeros(n)
    taps[0] = 0.25
    odd = j % 2 == 1
    taps[odd] = -1.0 / (np.pi * j[odd]) ** 2
    ramp: F64 = np.fft.rfft(taps).real
    window = {
        "ramp": np.ones_like(f),
        "shepp-logan": np.sinc(f),
        "cosine": np.cos(np.pi * f),
        "hann": 0.5 + 0.5 * np.cos(2 * np.pi * f),
    }[name]
    return cast(F64, ramp * window)


def _output(out: F32 | None, shape: tuple[int, int, int]) -> F32:
    if out is None:
        return np.empty(shape, np.float32)
    if out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ValueError(f"out: expected a C-ordered float32 array {shape}, got {out.dtype} {out.shape}")
    return out


class _Geometry:
    """Everything that depends on the angles and sizes only."""

    def __init__(
        self, n: int, theta: tuple[float, ...], n_detector: int, pad: float, oversampling: float, width: int
    ) -> None:
        self.m = m = fast_length(max(math.ceil(n * oversampling), n + width + 1))
        self.pad = p = fast_length(math.ceil(pad * max(n, n_detector)))
        self.k_max = (p - 1) // 2
        ratio = m / n
        beta = math.pi * math.sqrt(max((width / ratio) ** 2 * (ratio - 0.5) ** 2 - 0.8, 0.1))
        t = np.deg2rad(np.array(theta))
        # cos(90 deg) is not exactly 0 in floating point; keep the four axes exact
        self.cos = np.round(np.cos(t), 15)
        self.sin = np.round(np.sin(t), 15)
        count = 2 * self.k_max + 1
        self.first = np.empty((t.size, count, 2), np.int32)
        self.weight = np.empty((t.size, count, 2, width), np.float32)
        d = np.linspace(0.0, 1.0, 8193)
        table = np.append(np.i0(beta * np.sqrt(1 - d**2)) / np.i0(beta), 0.0)
        fill_taps(self.cos, self.sin, m / p, self.k_max, m // 2, width, beta, table, self.first, self.weight)
        self.slope = self.sin * (m / p)
        offset = (np.arange(n) - n // 2) / m
        z = np.sqrt((beta**2 - (np.pi * width * offset) ** 2).astype(complex))
        self.dc = np.ones(n + 8, np.float32)
        self.dc[:n] = 1 / ((np.sinh(z) / z).real * width / np.i0(beta))
        self.ones = np.ones(n_detector + 8, np.float32)
        half_pixel = 0.5 if n % 2 == 0 else 0.0
        self.alpha = -2 * np.pi / p * (half_pixel * (self.cos + self.sin) + (n_detector - 1) / 2)


@lru_cache(maxsize=4)
def _geometry(
    n: int, theta: tuple[float, ...], n_detector: int, pad: float, oversampling: float, width: int
) -> _Geometry:
    return _Geometry(n, theta, n_detector, pad, oversampling, width)


class Projector:
    """Line integrals of volumes ``(y, z, x)`` along parallel rays, and their exact transpose.

    Rows (y) are independent; sixteen travel together, so calling with many rows at once is what is fast. The slice is
    taken as band-limited between its pixels and a projection as point samples of it.

    Parameters
    ----------
    n : int
        Size of the grid in z and x, pixels; odd or even. The rotation axis is at ``(n - 1) / 2``.
    theta_deg : (angles,) array
        Any angles in any order, degrees.
    n_detector : int, optional
        Detector columns, centred at ``(n_detector - 1) / 2``; `n` unless given.
    pad : float
        Projections are computed on a line of ``pad * max(n, n_detector)`` columns. 1.5 holds the
        corners of the square grid, and makes the ramp filter exact for objects up to half as wide as this line; 2 makes
        it exact for the whole detector. What falls outside this line wraps around.
    oversampling, width : float, int
        Of the gridding: grid size over `n`, kernel width in nodes.
    threads : int, optional
        All cores unless given. The result does not depend on it.

    Notes
    -----
    Objects should lie inside the inscribed circle: what lies in the corners of the square is projected rightly but
    falls off a detector of `n` columns, and no reconstruction can recover it.
    """

    def __init__(
        self,
        n: int,
        theta_deg: npt.ArrayLike,
        *,
        n_detector: int | None = None,
        pad: float = 1.5,
        oversampling: float = 1.25,
        width: int = 5,
        threads: int | None = None,
    ) -> None:
        theta = np.atleast_1d(np.asarray(theta_deg, dtype=float))
        if theta.ndim != 1 or theta.size == 0 or not np.isfinite(theta).all():
            raise ValueError(f"theta_deg: expected a list of finite angles, got shape {theta.shape}")
        if n < 2:
            raise ValueError(f"n: expected a grid of at least 2 pixels, got {n}")
        self.n = int(n)
        self.theta_deg: F64 = theta
        self.n_detector = self.n if n_detector is None else int(n_detector)
        self.pad, self.oversampling, self.width = float(pad), float(oversampling), int(width)
        self.threads = cores() if threads is None else max(1, int(threads))
        self._free: list[dict[str, F32]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_free": []}

    @property
    def shape(self) -> tuple[int, int]:
        """(angles, detector columns)."""
        return self.theta_deg.size, self.n_detector

    def forward(self, volume: npt.ArrayLike, *, shift: npt.ArrayLike | None = None, out: F32 | None = None) -> F32:
        """Project slices ``(y, z, x)``; return ``(angle, y, column)`` float32, value x voxel.

        Parameters
        ----------
        volume : (rows, n, n) array
        shift : (angles,) array or float, optional
            Moves the content of each projection to the right, detector columns; costs nothing.
        out : (angles, rows, n_detector) float32 array, optional
            Written into; fresh memory unless given, which costs a noticeable part of the time in a loop.
        """
        data = np.ascontiguousarray(volume, dtype=np.float32)
        if data.ndim != 3 or data.shape[1:] != (self.n, self.n):
            raise ValueError(f"volume: expected (rows, {self.n}, {self.n}) [y, z, x], got {data.shape}")
        g = self._prepare()
        angles, columns = self.shape
        phase = self._phase(g, shift, None, None)
        out = _output(out, (angles, len(data), columns))
        m, p, n = g.m, g.pad, self.n
        rad_m, tw_m = plan(m)
        rad_p, tw_p = plan(p)

        def work(start: int, run: _Runner) -> None:
            rows = min(ROWS, len(data) - start)
            block = data[start : start + ROWS]
            if rows < ROWS:
                block = np.concatenate([block, np.zeros((ROWS - rows, n, n), np.float32)])
            flat = block.reshape(-1)
            space = self._take(g)
            grid = space["grid"]
            sino = np.empty((angles, ROWS, columns), np.float32)
            run(n, lambda a, b, x, y, t: forward_x(a, b, flat, n, m, g.dc, rad_m, tw_m, grid, x, y))
            run(m, lambda a, b, x, y, t: forward_z(a, b, n, m, rad_m, tw_m, grid, x, y))
            run(
                angles,
                lambda a, b, x, y, t: forward_lines(
                    a, b, grid, m, g.first, g.weight, phase, self.width, p, rad_p, tw_p, g.ones, columns,
                    sino.reshape(-1), x, y,
                ),
            )  # fmt: skip
            out[:, start : start + rows] = sino[:, :rows]
            self._free.append(space)

        self._schedule(len(data), g, work)
        return out

    def adjoint(
        self,
        projections: npt.ArrayLike,
        *,
        shift: npt.ArrayLike | None = None,
        weight: npt.ArrayLike | None = None,
        response: npt.ArrayLike | None = None,
        out: F32 | None = None,
    ) -> F32:
        """Back-project ``(angle, y, column)``; return slices ``(y, z, x)`` float32: the transpose of `forward`.

        Parameters
        ----------
        projections : (angles, rows, n_detector) array
        shift : (angles,) array or float, optional
            As in `forward`: where the content of each projection has been moved, detector columns.
        weight : (angles,) array, optional
            Multiplies each projection.
        response : (length // 2 + 1,) array, optional
            Response of a symmetric filter applied along the columns, on the frequencies of a real FFT of
            `filter_length` columns.
        out : (rows, n, n) float32 array, optional
            Written into; fresh memory unless given, which costs a noticeable part of the time in a loop.
        """
        data = np.ascontiguousarray(projections, dtype=np.float32)
        angles, columns = self.shape
        if data.ndim != 3 or (data.shape[0], data.shape[2]) != self.shape:
            raise ValueError(f"projections: expected ({angles}, rows, {columns}) [angle, y, column], got {data.shape}")
        g = self._prepare()
        phase = self._phase(g, shift, weight, response)
        n_rows = data.shape[1]
        m, p, n = g.m, g.pad, self.n
        out = _output(out, (n_rows, n, n))
        rad_m, tw_m = plan(m)
        rad_p, tw_p = plan(p)
        bands = -(-m // 16)

        def work(start: int, run: _Runner) -> None:
            rows = min(ROWS, n_rows - start)
            sino = np.zeros((angles, ROWS, columns), np.float32)
            sino[:, :rows] = data[:, start : start + rows]
            block = out[start : start + ROWS] if rows == ROWS else np.empty((ROWS, n, n), np.float32)
            space = self._take(g)
            grid, lines = space["grid"], space["lines"]
            flat = block.reshape(-1)
            run(
                angles,
                lambda a, b, x, y, t: adjoint_lines(
                    a, b, sino.reshape(-1), columns, phase, p, rad_p, tw_p, g.ones, lines, x, y
                ),
            )

            def band(a: int, b: int, x: F32, y: F32, t: F32) -> None:
                for i in range(a, b):
                    adjoint_bands(
                        16 * i, min(16 * i + 16, m), lines, n, m, g.slope, g.first, g.weight, self.width, p,
                        rad_m, tw_m, grid, x, y,
                    )  # fmt: skip

            run(bands, band)
            run(-(-n // 16), lambda a, b, x, y, t: adjoint_z(a, b, n, m, g.dc, rad_m, tw_m, grid, flat, x, y, t))
            if rows < ROWS:
                out[start : start + rows] = block[:rows]
            self._free.append(space)

        self._schedule(n_rows, g, work)
        return out

    def filtered(
        self,
        projections: npt.ArrayLike,
        filter_name: str = "ramp",
        angular_weight: npt.ArrayLike | None = None,
        *,
        shift: npt.ArrayLike | None = None,
    ) -> F32:
        """Filter and back-project ``(angle, y, column)``; return slices ``(y, z, x)``, value per pixel.

        With the ramp this is filtered back-projection; `angular_weight` is in radians, pi / angles unless given.
        """
        if angular_weight is None:
            angular_weight = np.full(self.theta_deg.size, np.pi / self.theta_deg.size)
        response = filter_response(filter_name, self.filter_length)
        return self.adjoint(projections, shift=shift, weight=angular_weight, response=response)

    @property
    def filter_length(self) -> int:
        """Columns of the padded line a filter response refers to."""
        return fast_length(math.ceil(self.pad * max(self.n, self.n_detector)))

    def _prepare(self) -> _Geometry:
        theta = tuple(self.theta_deg.tolist())
        return _geometry(self.n, theta, self.n_detector, self.pad, self.oversampling, self.width)

    def _phase(
        self,
        g: _Geometry,
        shift: npt.ArrayLike | None,
        weight: npt.ArrayLike | None,
        response: npt.ArrayLike | None,
    ) -> F32:
        angles = self.theta_deg.size
        alpha = g.alpha
        if shift is not None:
            moved = np.asarray(shift, dtype=float)
            if moved.shape not in ((), (angles,)):
                raise ValueError(f"shift: expected ({angles},) columns, got {moved.shape}")
            alpha = alpha - 2 * np.pi / g.pad * moved
        gain = np.full(angles, 1 / g.pad)
        if weight is not None:
            gain = gain * np.broadcast_to(np.asarray(weight, dtype=float), (angles,))
        r = np.ones(g.pad // 2 + 1) if response is None else np.asarray(response, dtype=float)
        if r.shape != (g.pad // 2 + 1,):
            raise ValueError(f"response: expected ({g.pad // 2 + 1},) values, got {r.shape}")
        phase = np.empty((angles, 2 * g.k_max + 1, 2), np.float32)
        fill_phases(alpha, gain, r, g.k_max, phase)
        return phase

    def _take(self, g: _Geometry) -> dict[str, F32]:
        """Return a workspace: memory is kept between calls, since touching fresh pages costs as much as the FFTs."""
        try:
            return self._free.pop()
        except IndexError:
            lines = np.empty(self.theta_deg.size * (2 * g.k_max + 1) * NODE, np.float32)
            return {"grid": np.empty(g.m * (g.m + 1) * NODE, np.float32), "lines": lines}

    def _schedule(self, rows: int, g: _Geometry, work: Callable[[int, _Runner], None]) -> None:
        """Run `work` on every group of rows: groups side by side when they are small, else one after the other."""
        starts = range(0, rows, ROWS)
        small = g.m * g.m * NODE * 4 * self.threads <= 2**28
        if self.threads > 1 and len(starts) >= self.threads and small:
            share(starts, lambda start: work(start, _Runner(1, g, self.n)), threads=self.threads)
            return
        runner = _Runner(self.threads, g, self.n)
        for start in starts:
            work(start, runner)


class _Runner:
    """Runs one phase over ``range(count)`` in pieces, each with scratch lines of its own."""

    def __init__(self, threads: int, g: _Geometry, n: int) -> None:
        self.threads = threads
        self.length, self.n = max(g.m, g.pad), n
        self.scratch: list[tuple[F32, F32, F32]] = []

    def __call__(self, count: int, function: Callable[[int, int, F32, F32, F32], None]) -> None:
        def piece(bounds: tuple[int, int]) -> None:
            try:
                x, y, t = self.scratch.pop()
            except IndexError:
                x, y = (np.empty(self.length * NODE, np.float32) for _ in range(2))
                t = np.empty(self.n * 16 * NODE, np.float32)
            function(bounds[0], bounds[1], x, y, t)
            self.scratch.append((x, y, t))

        step = max(1, count // (4 * self.threads)) if self.threads > 1 else max(1, count)
        share([(i, min(i + step, count)) for i in range(0, count, step)], piece, threads=self.threads)
