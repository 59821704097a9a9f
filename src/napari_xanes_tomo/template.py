"""The reference tomogram as a template: what every other energy is compared with.

Its volume is projected again at its own angles, without the noise of single projections; what noise is left in it is
known, and goes along.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .agreement import band_pass, bin_frames, bin_volume, object_support, registration_equations, smooth
from .model import Alignment, FloatArray
from .parallel import in_threads
from .projector import Projector
from .recipe import RegistrationParameters
from .reconstruction import angular_weights, fbp
from .resample import place

__all__ = [
    "NOISY",
    "BandLimited",
    "Template",
    "coarse_translation",
    "make_template",
    "match_angles",
    "noise_equations",
    "object_mass",
    "object_weight",
    "over_shadow",
    "take",
]

F32 = npt.NDArray[np.float32]
NOISY = ("scale", "roll", "dy", "dx", "blur", "gain")
"""What the noise of a template passes itself off as, columns of `registration_equations`."""
_WIDER = (1.0, 1.5, 2.0, 3.0)  # times as wide as asked for, tried in turn, where noise is more than a quarter


@dataclass(frozen=True)
class BandLimited:
    """The template at one binning, band-passed: arrays (n, y, x) of the part of the grid that shows the object.

    Attributes
    ----------
    plain, steep, depth : (n, y, x) float32 arrays
        Its projections, their squared gradient before the band, and `Template.depth`.
    noise : (n, y, x) float32 array or None
        One draw of the noise of `plain`, once asked for.
    weight : (n, y, x) float32 array
        1 on and around the object.
    part : (int, int, int)
        First row of the grid, end of the rows, and how many columns are left out on either side.
    bounds : (slice, slice)
        Rows and columns, of these, in which the object is seen at some angle.
    middle : float
        Row, of these, that lies in the middle of the grid.
    added : (n, 1, k, k) array or None
        `noise_equations` where all of the object is compared, once asked for.
    """

    plain: F32
    steep: F32
    depth: F32
    noise: F32 | None
    weight: F32
    part: tuple[int, int, int]
    bounds: tuple[slice, slice]
    middle: float
    added: FloatArray | None = None


@dataclass(frozen=True)
class Template:
    """A tomogram on the common grid, seen again at its own angles.

    Attributes
    ----------
    frames : (n, y, x) float32 array
        Reprojection of the volume, binned by `bin`.
    depth : (n, y, x) float32 array
        Reprojection of the volume times the distance from the axis along the beam, in common-grid px: what a turn or a
        tilt of the object changes.
    volume : (y, z, x) float32 array
    theta_deg : (n,) array
        Degrees.
    bin : int
        Common-grid pixels per pixel.
    frame_shape : (int, int)
        Shape of a raw frame at the reference energy.
    level : float
        Mean attenuation inside the particle, 1/pixel of `frames`.
    base : Alignment
        Of the projections it was made of, binned.
    made_of : (int, int)
        Shape of these.
    noise, noise_growth : float
        Standard deviation of the noise of one of their pixels where nothing absorbs, and how fast its logarithm grows
        with the absorbance: fewer photons come through.
    """

    frames: F32
    depth: F32
    volume: F32
    theta_deg: FloatArray
    bin: int
    frame_shape: tuple[int, int]
    level: float
    base: Alignment
    made_of: tuple[int, int]
    noise: float
    noise_growth: float
    _levels: dict[tuple[float, float, int], BandLimited] = field(default_factory=dict, compare=False, repr=False)
    _bands: dict[tuple[float, float], tuple[float, float]] = field(default_factory=dict, compare=False, repr=False)
    _like: Template | None = field(default=None, compare=False, repr=False)  # whose part of the grid is compared
    _noises: list[F32] = field(default_factory=list, compare=False, repr=False)

    @property
    def grid_shape(self) -> tuple[int, int]:
        """(rows, columns) of `frames`."""
        return self.frames.shape[1], self.frames.shape[2]

    def turned(self, angle_deg: float) -> Template:
        """Return the template as it is seen with the object turned by `angle_deg` against the stage."""
        frames, depth = _reproject(self.volume, self.theta_deg + angle_deg, self.bin)
        return replace(self, frames=frames, depth=depth, _levels={}, _bands={}, _like=self._like or self)

    def binned(self, k: int) -> Template:
        """Return the template in pixels `k` times as wide; the shape of `frames` is a multiple of that."""
        volume = bin_volume(self.volume, k)
        return replace(
            self, frames=bin_frames(self.frames, k), depth=bin_frames(self.depth, k), volume=volume * np.float32(k),
            bin=k * self.bin, level=k * self.level, _levels={}, _bands={}, _like=None,
            _noises=[bin_frames(self.noise_frames(), k)],
        )  # fmt: skip

    def second(self, fine: float, coarse: float) -> Template:
        """Return what of it `register` compares with as a second template: `fine` to `coarse`, the `band` of the first.

        It has no frames, no depth and no volume, which saves their memory.
        """
        band = (fine, coarse, 1)
        self.noise_added(*band)
        nothing = np.zeros((0, 0, 0), dtype=np.float32)
        levels = {band: self.in_band(*band)}
        return replace(self, frames=nothing, depth=nothing, volume=nothing, _levels=levels, _noises=[])

    def noise_frames(self) -> F32:
        """Return one draw (n, y, x) of the noise of `frames`: random pixels that go through all that made them."""
        if not self._noises:
            rng = np.random.default_rng(0)
            drawn = rng.standard_normal((len(self.frames), *self.made_of), dtype=np.float32)
            rows = _filled(self.volume)
            placed = place(drawn, self.base, grid_shape=self.grid_shape, rows=(rows.start, rows.stop))

            def grow(a: int, b: int) -> None:
                absorbance = np.maximum(self.frames[a:b, rows], 0)
                placed[a:b] *= np.float32(self.noise) * np.exp(np.float32(self.noise_growth) * absorbance)

            in_threads(len(placed), grow)
            volume = fbp(placed, self.theta_deg, weights=angular_weights(self.theta_deg))
            volume *= self.volume[rows] != 0
            noise = np.zeros_like(self.frames)
            noise[:, rows] = Projector(volume.shape[2], self.theta_deg).forward(volume)
            self._noises.append(noise)
        return self._noises[0]

    def noise_in_band(self, fine: float, coarse: float, extra: int) -> F32:
        """Return one draw (n, y, x) of the noise of what `in_band` returns, made once."""
        level = self.in_band(fine, coarse, extra)
        if level.noise is None:
            noise = band_pass(_cut(bin_frames(self.noise_frames(), extra), level.part), fine, coarse)
            self._levels[fine, coarse, extra] = level = replace(level, noise=noise)
        assert level.noise is not None
        return level.noise

    def noise_added(self, fine: float, coarse: float, extra: int) -> FloatArray:
        """Return `noise_equations` where all of the object is compared, made once."""
        level = self.in_band(fine, coarse, extra)
        if level.added is None:
            noise = self.noise_in_band(fine, coarse, extra)
            added = noise_equations(noise, level.weight, self.bin * extra, level.middle)
            self._levels[fine, coarse, extra] = level = replace(self._levels[fine, coarse, extra], added=added)
        assert level.added is not None
        return level.added

    def band(self, parameters: RegistrationParameters) -> tuple[float, float]:
        """Return the finest band that is compared, px of `frames`.

        The one of the parameters, or the first wider one in which noise is no more than a quarter of the power.
        """
        asked = (parameters.fine_px, parameters.coarse_px)
        if asked not in self._bands:
            unit = self.frames.shape[2] / 256
            for factor in _WIDER:
                fine, coarse = (factor * unit * width for width in asked)
                level, noise = self.in_band(fine, coarse, 1), self.noise_in_band(fine, coarse, 1)
                if _sum(level.weight, noise, noise) <= 0.25 * _sum(level.weight, level.plain, level.plain):
                    break
            self._bands[asked] = (fine, coarse)
        return self._bands[asked]

    def in_band(self, fine: float, coarse: float, extra: int) -> BandLimited:
        """Return the template binned once more by `extra`, limited to a band; made once."""
        key = (fine, coarse, extra)
        if key not in self._levels:
            small = bin_frames(self.frames, extra)
            weight = object_weight(small, 1.0 / extra)
            if self._like is None:
                rows, columns = _bounds(weight)
                reach = int(np.ceil(4 * coarse)) + 2
                top, bottom = max(0, rows.start - reach), min(small.shape[1], rows.stop + reach)
                part = top, bottom, max(0, min(columns.start, small.shape[2] - columns.stop) - reach)
            else:
                part = self._like.in_band(*key).part
            middle = (small.shape[1] - 1) / 2 - part[0]
            small, weight = _cut(small, part), _cut(weight, part)
            self._levels[key] = BandLimited(
                band_pass(small, fine, coarse),
                band_pass(_steepness(small), fine, coarse),
                band_pass(_cut(bin_frames(self.depth, extra), part), fine, coarse),
                None,
                weight,
                part,
                _bounds(weight),
                middle,
            )
        return self._levels[key]


def _bounds(weight: F32) -> tuple[slice, slice]:
    """Return the rows and columns in which weights (n, y, x) are not all 0."""
    seen = np.asarray(weight.any(axis=0))
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _cut(frames: F32, part: tuple[int, int, int]) -> F32:
    """Return a part of frames (n, y, x), see `BandLimited`, contiguous."""
    top, bottom, aside = part
    return np.ascontiguousarray(frames[:, top:bottom, aside : frames.shape[2] - aside])


def noise_equations(noise: F32, weight: F32, pixel: float, middle: float) -> FloatArray:
    """Return what the noise (n, y, x) of a template adds to its normal equations, (n, 1, k, k) of `NOISY`."""
    return registration_equations(
        np.zeros_like(noise), noise, weight, pixel=pixel, middle_row=middle, columns=NOISY
    ).normal


def take(frames: npt.NDArray[Any], index: npt.NDArray[np.intp]) -> npt.NDArray[Any]:
    """Return ``frames[index]``, without a copy where that is all of them in their order."""
    whole = len(index) == len(frames) and bool(np.all(index == np.arange(len(frames))))
    return frames if whole else frames[index]


def make_template(
    stack: F32,
    theta_deg: FloatArray,
    alignment: Alignment,
    *,
    bin: int = 1,
    frame_shape: tuple[int, int] | None = None,
    like: Template | None = None,
) -> Template:
    """Reconstruct the reference and project it again: its projections without their noise.

    Parameters
    ----------
    stack : (n, y, x) float32 array
        Absorbance at the reference energy, binned by `bin`.
    theta_deg : (n,) array
    alignment : Alignment
        Of these projections, raw px, magnification 1.
    bin : int
        Recorded pixels per pixel of `stack`.
    frame_shape : (int, int), optional
        Shape of a raw frame; `bin` times that of `stack` unless given.
    like : Template, optional
        One on whose grid it is made; that of the stack unless given.
    """
    shape = (stack.shape[1] * bin, stack.shape[2] * bin) if frame_shape is None else frame_shape
    base = alignment.binned(bin, shape, None if like is None else like.bin)
    placed = place(stack, base, grid_shape=None if like is None else like.grid_shape)
    bin, shape = (bin, shape) if like is None else (like.bin, like.frame_shape)
    volume = fbp(placed, theta_deg, weights=angular_weights(theta_deg))
    volume *= object_support(volume)
    theta = np.asarray(theta_deg, dtype=float)
    frames, depth = _reproject(volume, theta, bin)
    calm = smooth(volume, 1.0)
    body = calm > 0.5 * np.percentile(calm[calm > 0.2 * calm.max()], 50)
    level = float(volume[body].mean())
    made_of = (stack.shape[1], stack.shape[2])
    noise, growth = _pixel_noise(stack)
    return Template(frames, depth, volume, theta, bin, shape, level, base, made_of, noise, growth, _like=like)


def _pixel_noise(stack: F32) -> tuple[float, float]:
    """Return the standard deviation of the noise of a pixel at no absorbance, and how its logarithm grows with it.

    From second differences along both axes, to which smooth images add nothing (Immerkaer 1996, doi
    10.1006/cviu.1996.0060), in five classes of absorbance. A half is the noise of the photons alone, one that of a
    camera: beyond that of a camera, seen beside the object, it is structure.
    """
    few = stack[:: max(1, len(stack) // 20)]
    top = float(np.nanpercentile(few, 99))
    rows = few[:, :-2] - 2 * few[:, 1:-1] + few[:, 2:]
    both = rows[:, :, :-2] - 2 * rows[:, :, 1:-1] + rows[:, :, 2:]
    middle = smooth(np.nan_to_num(few), 1.5)[:, 1:-1, 1:-1]
    change = 1.4826 / 6 * np.abs(both)
    inside, air = (np.isfinite(both) & part for part in (middle > 0.1 * top, np.abs(middle) < 0.05 * top))
    size, absorbance = change[inside], middle[inside]
    if len(size) < 100:
        return 0.0, 0.0
    classes = np.array_split(np.argsort(absorbance), 5)
    at = np.array([np.mean(absorbance[c]) for c in classes], dtype=float)
    noise = np.array([np.median(size[c]) for c in classes], dtype=float)
    if air.sum() > 1000:
        noise = np.minimum(noise, np.median(change[air]) * np.exp(at))
    if not noise.min() > 0:
        return float(np.median(noise)), 0.0
    growth = float(np.clip(np.polyfit(at, np.log(noise), 1)[0], 0.0, 1.0))
    return float(np.exp(np.mean(np.log(noise) - growth * at))), growth


def _reproject(volume: F32, theta_deg: FloatArray, bin: int) -> tuple[F32, F32]:
    """Project a volume, and the volume times the distance from the axis along the beam (common-grid px)."""
    rows, n, _ = volume.shape
    projector = Projector(n, theta_deg)
    seen = _filled(volume)
    c = ((np.arange(n) - (n - 1) / 2) * bin).astype(np.float32)
    frames, depth = np.zeros((2, len(theta_deg), rows, n), dtype=np.float32)
    t, part = np.deg2rad(theta_deg), volume[seen]
    along, across = projector.forward(part * c[:, None]), projector.forward(part * c)
    frames[:, seen] = projector.forward(part)

    def turned(a: int, b: int) -> None:
        cos, sin = (f(t[a:b]).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
        depth[a:b, seen] = along[a:b] * cos - across[a:b] * sin

    in_threads(len(t), turned)
    return frames, depth


def _filled(volume: F32) -> slice:
    """Return the rows of a volume (y, z, x) in which there is something."""
    filled = np.flatnonzero(volume.any(axis=(1, 2)))
    return slice(int(filled[0]), int(filled[-1]) + 1) if len(filled) else slice(0, 1)


def object_mass(stack: F32, theta_deg: FloatArray, alignment: Alignment, template: Template) -> float:
    """Return the mean absorbance over the object's shadow in the template: the particle's spectrum, up to a factor.

    Parameters
    ----------
    stack : (n, y, x) float32 array
        Absorbance, binned like the template.
    theta_deg : (n,) array
    alignment : Alignment
        Of these projections, raw px.
    template : Template
    """
    mine, theirs = match_angles(theta_deg, template.theta_deg)
    part = replace(alignment, shift=alignment.shift[mine], sigma=alignment.sigma[mine], status=())
    placed, coverage = place(take(stack, mine), part.binned(template.bin, template.frame_shape), return_coverage=True)
    shadow = take(template.frames, theirs)
    weight = object_weight(shadow)
    return over_shadow(placed, weight * (coverage > 0.99), shadow, weight)


def over_shadow(placed: F32, seen: F32, shadow: F32, weight: F32) -> float:
    """Return the mean of `placed` over the object's shadow in the template, `weight`, of which only `seen` is known.

    Thick and thin parts are not seen alike at all energies: what is missing is as in the template.
    """
    whole, there = _sum(shadow, weight) / max(1.0, _sum(weight)), _sum(shadow, seen)
    return _sum(placed, seen) / there * whole if there > 0 else 0.0


def _sum(*frames: F32) -> float:
    """Sum of the products of (n, y, x) frames, every frame in single precision, all of them in double."""
    out = np.zeros(len(frames[0]))

    def part(a: int, b: int) -> None:
        for f in range(a, b):
            first, *more = (stack[f] for stack in frames)
            for other in more:
                first = first * other
            out[f] = first.sum()

    in_threads(len(out), part)
    return float(out.sum())


def match_angles(theta_deg: FloatArray, template_deg: FloatArray) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Return the numbers of the projections of either list that show the same angle, within 0.3 of the step."""
    theta, other = np.asarray(theta_deg, dtype=float), np.asarray(template_deg, dtype=float)
    order = np.argsort(other)
    at = np.clip(np.searchsorted(other[order], theta), 1, len(other) - 1)
    left, right = order[at - 1], order[at]
    nearest = np.where(np.abs(other[left] - theta) <= np.abs(other[right] - theta), left, right)
    step = np.median(np.diff(other[order])) if len(other) > 1 else 1.0
    mine = np.flatnonzero(np.abs(other[nearest] - theta) <= 0.3 * max(step, 1e-6))
    return mine, nearest[mine]


def coarse_translation(
    data: F32,
    model: F32,
    theta_deg: FloatArray,
    at: Callable[[float, FloatArray], Alignment],
    magnification: float,
    scale: int,
) -> FloatArray:
    """First guess of ``[ty, a, b]`` from a cross-correlation at every angle, common-grid px."""
    from scipy.fft import irfft2, rfft2

    n, h, w = model.shape
    step = max(1, w // 64)
    placed = place(data, at(magnification, np.zeros(3)), grid_shape=(h // step, w // step), bin=step)

    def small(frames: F32) -> F32:
        band = band_pass(frames, 0.7, 6.0)
        window = np.hanning(band.shape[1] + 2)[1:-1, None] * np.hanning(band.shape[2] + 2)[None, 1:-1]
        return np.asarray(band * window.astype(np.float32))

    a, b = small(placed), small(bin_frames(model, step))
    shape = (2 * a.shape[1], 2 * a.shape[2])
    cross = irfft2(rfft2(a, shape) * np.conj(rfft2(b, shape)), shape, workers=-1)
    peak = cross.reshape(n, -1).argmax(axis=1)
    dy, dx = peak // shape[1], peak % shape[1]
    dy = np.where(dy > shape[0] // 2, dy - shape[0], dy) * step * scale
    dx = np.where(dx > shape[1] // 2, dx - shape[1], dx) * step * scale
    t = np.deg2rad(theta_deg)
    basis = np.stack([np.cos(t), np.sin(t)], axis=1)
    weight = np.ones(n)
    orbit = np.zeros(2)
    for _ in range(8):
        orbit = np.linalg.lstsq(basis * weight[:, None], dx * weight, rcond=None)[0]
        rest = np.abs(dx - basis @ orbit)
        weight = np.sqrt(np.minimum(1.0, step * scale / np.maximum(rest, 1e-9)))
    return np.array([float(np.median(dy)), *orbit])


def _steepness(model: F32) -> F32:
    """Return the squared gradient (n, y, x): how a blur of the intensities shows in absorbance.

    To first order in the blur's variance v, ``-ln(h * exp(-c A)) = c (h * A) - v/2 c^2 |grad A|^2``. That does not grow
    in proportion to the contrast c, and would make a weakly absorbing particle look larger than the reference.
    """
    out = np.empty_like(model)

    def part(a: int, b: int) -> None:
        gy, gx = np.gradient(model[a:b], axis=(1, 2))
        np.add(gy * gy, gx * gx, out=out[a:b])

    in_threads(len(model), part)
    return out


def object_weight(model: F32, per_pixel: float = 1.0) -> F32:
    """(n, y, x) 1 on and around the object in the template; `per_pixel` scales the width of the margin."""
    body = smooth(model, 2.0 * per_pixel)
    return (smooth((body > 0.05 * float(body.max())).astype(np.float32), 2.0 * per_pixel) > 0.02).astype(np.float32)
