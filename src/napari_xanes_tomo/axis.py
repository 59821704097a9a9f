"""The rotation axis of one tomogram beyond its place: roll, pitch, and errors of the angles, from held-out evidence.

Each parameter is tried on either side of zero: the projections are placed, or reconstructed, as if it were so, and each
is compared with the reprojection of a volume it had no part in. The misfit is a parabola near its minimum; groups of
projections give the standard error. What is not clearly better than zero is reported as not significant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .agreement import displacement_equations, halve, object_support, smooth
from .model import Alignment, FloatArray, XanesTomoError
from .projector import Projector
from .reconstruction import angular_weights
from .resample import place

__all__ = ["FEWEST_FOR_AXIS", "AxisParameter", "find_axis"]

F32 = npt.NDArray[np.float32]

_COLUMNS = 64
_GROUPS = 12
FEWEST_FOR_AXIS = 2 * _GROUPS
"""Projections that are needed."""
_SIGMAS = 5.0
_LEFT = 0.05  # of the step: what small frames and a finite number of angles leave without any noise
# Name, unit, step it is tried at: a tenth of a pixel or so at the surface of the object.
_TRIED = (("roll", "deg", 0.2), ("pitch", "deg", 0.4), ("angle step", "", 0.003), ("half offset", "deg", 0.3))


@dataclass(frozen=True)
class AxisParameter:
    """One number about the rotation axis.

    Attributes
    ----------
    name : {"roll", "pitch", "angle step", "half offset"}
        Turn of the axis in the image, positive from +x to +y, and along the beam (what lies at depth s is seen s times
        this further down), degrees; true over stated angular step, minus 1; what is added to the angles of the second
        half, degrees.
    value, sigma : float
        NaN where the projections do not tell.
    unit : str
    significant : bool
        Five standard errors from zero, and projections held out are predicted better with it.
    """

    name: str
    value: float
    sigma: float
    unit: str
    significant: bool

    def text(self) -> str:
        """Return it in words."""
        return f"{self.name} of {self.value:.3g} +- {self.sigma:.2g} {self.unit}".rstrip()


def find_axis(
    data: npt.ArrayLike, theta_deg: npt.ArrayLike, alignment: Alignment, *, half: npt.ArrayLike | None = None
) -> tuple[AxisParameter, ...]:
    """Find roll and pitch of the rotation axis, the error of the angular step and an offset between the halves.

    Parameters
    ----------
    data : (n, y, x) array
        Absorbance, air at zero.
    theta_deg : (n,) array
        Degrees.
    alignment : Alignment
        Of these projections, pixels of `data`, the object standing on the axis (as `find_jitter` puts it).
    half : (n,) array of int, optional
        Which part of the acquisition a projection belongs to; without two parts no offset is looked for.
    """
    stack = np.ascontiguousarray(data, dtype=np.float32)
    theta = np.asarray(theta_deg, dtype=float)
    if stack.ndim != 3 or theta.shape != stack.shape[:1]:
        raise ValueError(f"data: expected (n, y, x) with one angle each, got {stack.shape} and {theta.shape} angles")
    if len(theta) < FEWEST_FOR_AXIS:
        raise XanesTomoError(f"axis: expected at least {FEWEST_FOR_AXIS} projections, got {len(theta)}")
    frame, bin = (stack.shape[1], stack.shape[2]), 1
    while stack.shape[2] > _COLUMNS and min(stack.shape[1:]) >= 32:
        stack, bin = halve(stack), 2 * bin
    scene = _Scene(stack, theta, alignment.binned(bin, frame), None if half is None else np.asarray(half))
    tried = [t for t in _TRIED if t[0] != "half offset" or (half is not None and len(np.unique(np.asarray(half))) > 1)]
    found: dict[str, AxisParameter] = {}
    kept: dict[str, float] = {}
    while tried:
        gains = {}
        as_it_is = scene.misfit(**{k.replace(" ", "_"): v for k, v in kept.items()})
        for name, unit, step in tried:
            value, sigma, gain = _minimum(scene, kept, name, step, as_it_is)
            significant = bool(np.isfinite(value) and abs(value) > _SIGMAS * sigma and _better(gain))
            found[name] = AxisParameter(name, value, sigma, unit, significant)
            gains[name] = float(gain.sum()) if significant else 0.0
        # What explains most is taken in; the others are asked again beside it.
        best = max(gains, key=lambda n: gains[n])
        if gains[best] <= 0:
            break
        kept[best] = found[best].value
        tried = [t for t in tried if t[0] != best]
    return tuple(found[name] for name, _, _ in _TRIED if name in found)


class _Scene:
    def __init__(
        self, frames: F32, theta: FloatArray, alignment: Alignment, half: npt.NDArray[np.integer] | None
    ) -> None:
        self.frames, self.theta, self.alignment = frames, theta, alignment
        order = np.argsort(theta, kind="stable")
        self.folds = (np.sort(order[0::2]), np.sort(order[1::2]))
        self.later = np.zeros(len(theta)) if half is None else (half > half.min()).astype(float)
        placed = place(frames, alignment)
        volume = Projector(frames.shape[2], theta).filtered(placed, angular_weight=angular_weights(theta))
        self.support = object_support(volume)
        volume *= self.support
        projector = Projector(frames.shape[2], theta)
        t, c = np.deg2rad(theta), (np.arange(frames.shape[2]) - (frames.shape[2] - 1) / 2).astype(np.float32)
        depth = projector.forward(volume * c[None, :, None]) * np.cos(t).astype(np.float32)[:, None, None]
        depth -= projector.forward(volume * c[None, None, :]) * np.sin(t).astype(np.float32)[:, None, None]
        self.tilted = np.gradient(depth, axis=1).astype(np.float32)
        body = projector.forward(volume).max(axis=0)
        self.body = (body > 0.03 * max(float(body.max()), 1e-30)).astype(np.float32)

    def misfit(
        self, *, roll: float = 0.0, pitch: float = 0.0, angle_step: float = 0.0, half_offset: float = 0.0
    ) -> FloatArray:
        """Return the misfit (n,) of every projection and its held-out reprojection, displacement and contrast free."""
        placed = place(self.frames, replace(self.alignment, roll_deg=roll) if roll else self.alignment)
        if pitch:
            placed = placed + np.float32(np.deg2rad(pitch)) * self.tilted
        middle = 0.5 * (self.theta.min() + self.theta.max())
        theta = self.theta + angle_step * (self.theta - middle) + half_offset * (self.later - 0.5)
        width = placed.shape[2]
        model = np.empty_like(placed)
        for known, asked in (self.folds, self.folds[::-1]):
            volume = Projector(width, theta[known]).filtered(
                placed[known], angular_weight=angular_weights(theta[known], max_gap=8.0)
            )
            model[asked] = Projector(width, theta[asked]).forward(volume * self.support)
        a, b = smooth(placed, 0.7), smooth(model, 0.7)
        fit = displacement_equations(a, b, self.body[None] * np.ones_like(a))
        solution, _ = fit.solve()
        return np.asarray(fit.cost.sum(axis=1) - np.einsum("ni,ni->n", solution, fit.rhs.sum(axis=1)))


def _minimum(
    scene: _Scene, kept: Mapping[str, float], name: str, step: float, at_zero: FloatArray
) -> tuple[float, float, FloatArray]:
    """Return where the summed misfit is least, its standard error, and what each projection gains there (log)."""

    def misfit(value: float) -> FloatArray:
        return scene.misfit(**{k.replace(" ", "_"): v for k, v in {**kept, name: value}.items()})

    center = 0.0
    value = sigma = float("nan")
    for _ in range(4):
        low, middle, high = misfit(center - step), at_zero if center == 0 else misfit(center), misfit(center + step)
        slope, bend = (high - low) / (2 * step), (high + low - 2 * middle) / step**2
        if bend.sum() <= 0:
            return float("nan"), float("nan"), np.zeros(len(at_zero))
        rest = [
            -(slope.sum() - slope[g].sum()) / max(bend.sum() - bend[g].sum(), 1e-3 * bend.sum())
            for g in np.array_split(np.arange(len(slope)), _GROUPS)
        ]
        move = float(-slope.sum() / bend.sum())
        sigma = float(np.hypot(np.sqrt((_GROUPS - 1) * np.var(rest)), _LEFT * step))
        value = center + move
        if abs(move) < 0.5 * step:
            break
        center += float(np.clip(move, -5 * step, 5 * step))
    if abs(value) <= _SIGMAS * sigma:
        return value, sigma, np.zeros(len(at_zero))
    return value, sigma, np.log(np.maximum(at_zero, 1e-30) / np.maximum(misfit(value), 1e-30))


def _better(gain: FloatArray) -> bool:
    """Whether projections that were held out are predicted better, beyond chance."""
    return bool(gain.mean() > 2 * gain.std() / np.sqrt(len(gain)))
