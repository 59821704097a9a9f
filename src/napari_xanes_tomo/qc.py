"""Verdicts on the jitter correction: what every projection of one object should share, and scores with thresholds.

Pure functions; frames are ``[y, x]``, angles degrees, shifts ``[dy, dx]`` of the content, positive down / right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .agreement import displacement_equations, object_support, recorded_rows, smooth
from .fsc import half_bit
from .model import Alignment, FloatArray, Progress, Score, no_progress
from .projector import Projector
from .reconstruction import angular_weights
from .resample import place
from .views import held_out, ring_correlation

__all__ = [
    "Check",
    "check_projections",
    "check_scores",
]

F32 = npt.NDArray[np.float32]

_FINE_PX = 0.7  # blur before two frames are compared
_WEDGE_DEG = 18.0  # without angles, from which on the ends are predicted badly


@dataclass(frozen=True)
class Check:
    """One number per projection and the limit it is judged by.

    Attributes
    ----------
    values : (n,) array
    limit : float
        Follows the scatter of this scan: five robust standard deviations from the median, or what the noise allows
        where that is more.
    unit : str
    noise : float
        Standard deviation of a value that the noise of the pixels alone would give; NaN where it is not known.
    one_sided : bool
        Whether the limit is a largest value; else it is a distance from the median.
    """

    values: FloatArray
    limit: float
    unit: str
    noise: float = float("nan")
    one_sided: bool = False

    @property
    def beyond(self) -> npt.NDArray[np.intp]:
        """Numbers of the projections beyond the limit."""
        known = np.isfinite(self.values)
        middle = 0.0 if self.one_sided or not known.any() else float(np.median(self.values[known]))
        return np.flatnonzero(known & (np.abs(np.nan_to_num(self.values) - middle) > self.limit))


def check_projections(
    data: npt.ArrayLike,
    theta_deg: npt.ArrayLike,
    alignment: Alignment,
    *,
    variance: npt.ArrayLike | None = None,
    progress: Progress = no_progress,
) -> dict[str, Check]:
    """Judge every aligned projection by what all projections of one object share.

    Parameters
    ----------
    data : (n, y, x) array
        Absorbance, air at zero.
    theta_deg : (n,) array
        Degrees.
    alignment : Alignment
        Of these projections, in pixels of `data`.
    variance : (n,) array, optional
        Of a pixel.
    progress : callable
        See `Progress`.

    Returns
    -------
    dict of str to Check
        ``mass_deviation``: mass of the rows that every projection shows over its median, minus one (Helgason-Ludwig
        condition of order 0, doi 10.1002/cpa.3160190207). ``profile_shift_px``: displacement in y of the profile of
        mass against the median profile. ``moment_deviation_px``: centre of mass minus the best
        ``c + a cos(theta) + b sin(theta)`` (order 1). ``residual_shift_y_px``, ``residual_shift_x_px``,
        ``gain_deviation``: displacement and contrast against the held-out reprojection, whose volume lacks the block of
        angles the projection is in. ``background_od``: median next to the object. ``frc_px``: half the period at which
        the Fourier ring correlation with that reprojection falls below the 1/2-bit curve (doi
        10.1016/j.jsb.2005.05.009); no resolution of the maps. NaN where there is no crossing.

    Notes
    -----
    The first three see slow drifts, the reprojection does not: it drifts with its neighbours. They are taken of the
    object alone: of the pixels its reprojection covers (and three more), less the level and slopes of the air beside
    it in the same rows. What a wall leaves far from the object would move the centre of mass by its long lever.

    With a missing wedge its ends are predicted badly, however exact the displacements are. What projections of one
    object, the volume as it is, would show at the same angles is subtracted from displacement and contrast; the
    limits stay those of what was found, since it is not known exactly.
    """
    stack = np.ascontiguousarray(data, dtype=np.float32)
    theta = np.asarray(theta_deg, dtype=float)
    if stack.ndim != 3 or theta.shape != stack.shape[:1]:
        raise ValueError(f"data: expected (n, y, x) with one angle each, got {stack.shape} and {theta.shape} angles")
    n, height, width = stack.shape
    top, bottom = recorded_rows(stack)
    if bottom - top < height:
        stack = np.ascontiguousarray(stack[:, top:bottom])
        alignment = replace(alignment, shift=alignment.shift - [(top + bottom - height) / 2, 0.0])
    placed = place(stack, alignment)
    rows = _rows_of(placed, alignment)
    placed = placed[:, rows]
    noise = float("nan") if variance is None else float(np.median(np.asarray(variance, dtype=float)))
    clean, covered, sigma_mass, sigma_center = _without_air(placed, theta, noise)
    alone = np.where(covered, clean, np.float32(0))
    model = held_out(clean, theta, progress)
    profile = alone.sum(axis=1, dtype=np.float64)
    mass = profile.sum(axis=1)
    typical = float(np.median(mass))
    x = np.arange(width) - (width - 1) / 2
    center = (profile @ x) / np.where(mass > 0, mass, np.nan)
    t = np.deg2rad(theta)
    rest = _beside(center, np.stack([np.ones(n), np.cos(t), np.sin(t)], axis=1))
    deviation = mass / typical - 1 if typical > 0 else np.full(n, np.nan)
    down, sigma_down = _profile_shift(alone.sum(axis=2, dtype=np.float64), noise * covered.mean() * width)
    step, gain, sigma_step = _against(clean, model, noise)
    against = {
        "residual_shift_y_px": _check(step[:, 0], sigma_step[0], "px"),
        "residual_shift_x_px": _check(step[:, 1], sigma_step[1], "px"),
        "gain_deviation": _check(gain, float("nan"), ""),
    }
    if _largest_gap(theta) > _WEDGE_DEG:
        expected = _of_the_wedge(clean, theta)
        against = {k: replace(c, values=c.values - v) for (k, c), v in zip(against.items(), expected, strict=True)}
    return {
        "mass_deviation": _check(deviation, sigma_mass, ""),
        "profile_shift_px": _check(down, sigma_down, "px"),
        "moment_deviation_px": _check(rest, sigma_center, "px"),
        **against,
        "background_od": _check(_background(placed, model), float("nan"), "OD"),
        "frc_px": _rings(clean, model),
    }


def _without_air(placed: F32, theta: FloatArray, noise: float) -> tuple[F32, npt.NDArray[np.bool_], float, float]:
    """Take the level and slopes of the air beside the object out of every projection, in the rows of the object.

    Returns
    -------
    clean : (n, rows, x) array
        0 stays where nothing was recorded.
    covered : (n, rows, x) bool array
        Where the object is seen, and three pixels more.
    mass, center : float
        Standard deviation of the mass of what is covered, relative, and of its centre, px: noise of the pixels and of
        the air.
    """
    from .air import dilated

    n, _, width = placed.shape
    projector = Projector(width, theta)
    volume = projector.filtered(placed, angular_weight=angular_weights(theta, max_gap=8.0))
    model = projector.forward(volume * object_support(volume))
    covered = dilated(model > 0.03 * max(float(model.max()), 1e-30), 3.0)
    if not covered.any(axis=(1, 2)).all():
        covered[:] = True  # nothing is known of the object: all there is
    recorded = placed != 0
    air = ~covered & recorded
    rows = placed.shape[1]
    x, y = (np.arange(k) - (k - 1) / 2 for k in (width, rows))
    along = np.stack([np.ones(width), x / (width / 2), x * 0], axis=1)
    down = np.stack([np.zeros(rows), np.zeros(rows), y / (width / 2)], axis=1)
    design = along[None] + down[:, None]  # (rows, x, 3)
    products = np.einsum("yxi,yxj->yxij", design, design).reshape(-1, 9)

    def sums(region: npt.NDArray[np.bool_], of: FloatArray) -> FloatArray:
        flat = region.reshape(n, -1).astype(np.float32) @ of.reshape(rows * width, -1).astype(np.float32)
        return np.asarray(flat, dtype=float)

    normal = sums(air, products).reshape(n, 3, 3)
    rhs = np.asarray(np.where(air, placed, 0).reshape(n, -1) @ design.reshape(-1, 3).astype(np.float32), dtype=float)
    inverse, fitted = np.zeros((n, 3, 3)), np.zeros((n, 3))
    for i in range(n):
        count = normal[i, 0, 0]
        if count < 0.005 * rows * width:
            continue
        # A slope must be held on both sides; where one could be anything only the level is taken.
        mean = normal[i, 0, 1:] / count
        spread = np.linalg.eigvalsh(normal[i, 1:, 1:] / count - np.outer(mean, mean))
        terms = 3 if spread[0] > 1 / 60 else 1
        inverse[i, :terms, :terms] = np.linalg.inv(normal[i, :terms, :terms])
        fitted[i] = inverse[i] @ rhs[i]
    level = (fitted @ along.T)[:, None] + (fitted @ down.T)[:, :, None]
    clean = (placed - level.astype(np.float32)) * recorded
    size = covered.sum(axis=1).astype(float)  # (n, x)
    profile = np.where(covered, clean, 0).sum(axis=1, dtype=np.float64)
    mass = profile.sum(axis=1)
    center = np.nan_to_num(profile @ x / np.where(mass > 0, mass, np.nan))
    one = sums(covered, design)  # the same pulls at the level and the slopes of the air
    by_x = sums(covered, design * x[None, :, None]) - center[:, None] * one
    lever = np.sum((x[None] - center[:, None]) ** 2 * size, axis=1)
    spreads = [
        own + np.einsum("ni,nij,nj->n", pull, inverse, pull) for own, pull in ((size.sum(axis=1), one), (lever, by_x))
    ]
    typical = max(abs(float(np.median(mass))), 1e-12)
    sigma_mass, sigma_center = (float(np.sqrt(noise * np.median(v)) / typical) for v in spreads)
    return np.asarray(clean, dtype=np.float32), covered, sigma_mass, sigma_center


def _check(values: FloatArray, noise: float, unit: str) -> Check:
    """Judge values by their own scatter, or by what the noise allows where that is more."""
    return Check(values, max(_scatter(values), 5 * float(np.nan_to_num(noise))), unit, float(noise))


def _rows_of(placed: F32, alignment: Alignment) -> slice:
    """Rows of the object that every projection shows; all rows that are shown where that leaves too few."""
    height = placed.shape[1]
    low = max(0, int(np.ceil(-np.nanmin(alignment.shift[:, 0]))) + 2)
    high = min(height, height - int(np.ceil(np.nanmax(alignment.shift[:, 0]))) - 2)
    if high - low <= height // 4:
        low, high = 0, height
    mass = np.median(placed[:, low:high].sum(axis=2), axis=0)
    filled = np.flatnonzero(mass > 0.02 * max(float(mass.max()), 1e-30))
    margin = max(2, height // 64)
    if len(filled) >= 8:
        low, high = max(low, low + int(filled[0]) - margin), min(high, low + int(filled[-1]) + 1 + margin)
    return slice(low, high)


def _beside(values: FloatArray, basis: FloatArray) -> FloatArray:
    """Values (n,) minus their fit by `basis` (n, k), robust; NaN stays."""
    good = np.isfinite(values)
    rest = np.full(len(values), np.nan)
    for _ in range(3):  # twice more without what stands out
        if good.sum() <= basis.shape[1]:
            break
        rest = values - basis @ np.linalg.lstsq(basis[good], values[good], rcond=None)[0]
        spread = 1.4826 * float(np.nanmedian(np.abs(rest[good] - np.nanmedian(rest[good])))) + 1e-12
        good = np.abs(rest) < 5 * spread
    return rest


def _profile_shift(profile: FloatArray, variance: float) -> tuple[FloatArray, float]:
    """Displacement in y of every profile (n, rows) against the median one, px, and what the noise makes of it."""
    typical = np.median(profile, axis=0)
    design = np.stack([-np.gradient(typical), typical, np.ones_like(typical)], axis=1)
    if len(typical) < 4 or not np.abs(design[:, 0]).max() > 0:
        return np.full(len(profile), np.nan), float("nan")
    inverse = np.linalg.pinv(design.T @ design)
    shift = ((profile - typical) @ design @ inverse)[:, 0]
    return np.asarray(shift), float(np.sqrt(max(inverse[0, 0], 0) * variance))


def _against(placed: F32, model: F32, noise: float) -> tuple[FloatArray, FloatArray, tuple[float, float]]:
    """Displacement (n, 2) and gain - 1 (n,) of projections against what is expected; what the noise makes of y, x."""
    a, b = smooth(placed, _FINE_PX), smooth(model, _FINE_PX)
    fit = displacement_equations(a, b, _near_object(model)[None] * np.ones_like(a))
    solution, inverse = fit.solve()
    gain = np.clip(1 + solution[:, 2], 0.2, 5.0)
    # The blur of the fit lets less noise pass, and correlates it: for a blur of s px they make up for each other
    # where the gradient varies over much more than s.
    variance = np.median(inverse[:, (0, 1), (0, 1)], axis=0) * noise
    sigma = np.sqrt(np.where(np.isfinite(variance), variance, np.nan))
    step = np.asarray(solution[:, :2] / gain[:, None])
    return step, np.asarray(solution[:, 2]), (float(sigma[0]), float(sigma[1]))


def _largest_gap(theta_deg: FloatArray) -> float:
    """Largest distance of neighbouring angles, degrees; a half turn is a circle."""
    at = np.sort(theta_deg % 180.0)
    return float(np.diff(at, append=at[0] + 180.0).max())


def _of_the_wedge(placed: F32, theta: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return displacement y, x and contrast of projections that nothing is wrong with: the volume's at these angles."""
    projector = Projector(placed.shape[2], theta)
    volume = projector.filtered(placed, angular_weight=angular_weights(theta, max_gap=8.0))
    volume *= object_support(volume)
    alike = projector.forward(volume)
    step, gain, _ = _against(alike, held_out(alike, theta, no_progress), float("nan"))
    return step[:, 0], step[:, 1], gain


def _near_object(model: F32) -> F32:
    """(rows, x) 1 where the object is seen at any angle and a little beside it."""
    from scipy.ndimage import binary_dilation

    body = model.max(axis=0)
    return np.asarray(binary_dilation(body > 0.03 * max(float(body.max()), 1e-30), iterations=3), dtype=np.float32)


def _background(placed: F32, model: F32) -> FloatArray:
    """Median of every projection (n,) beside the object, away from where it is at any angle; NaN where that is none."""
    from scipy.ndimage import binary_dilation

    air = ~binary_dilation(_near_object(model) > 0, iterations=3)
    seen = placed[:, air]
    if seen.shape[1] < 100:
        return np.full(len(placed), np.nan)
    # What was not recorded is 0.
    return np.array([np.median(v[v != 0]) if np.count_nonzero(v) > 50 else np.nan for v in seen])


def _scatter(values: FloatArray) -> float:
    """Five robust standard deviations."""
    centre = np.nanmedian(values) if np.isfinite(values).any() else 0.0
    return 5 * 1.4826 * float(np.nanmedian(np.abs(values - centre))) if np.isfinite(values).any() else 0.0


def _rings(placed: F32, model: F32) -> Check:
    frequency, curve, count = ring_correlation(placed, model)
    below = curve < half_bit(count)[None, :]
    below[:, :2] = False
    below[:, :-1] &= below[:, 1:]  # one ring alone may be chance
    values = np.full(len(placed), np.nan)
    for i in np.flatnonzero(below.any(axis=1)):
        k = int(below[i].argmax())
        values[i] = 0.5 / frequency[k]
    typical = float(np.nanmedian(values)) if np.isfinite(values).any() else 0.0
    return Check(values, typical + max(_scatter(values), 0.25 * typical), "px", one_sided=True)


def check_scores(
    checks: Mapping[str, Check], order: npt.ArrayLike, *, seams: Sequence[int] = (), width: int = 256
) -> tuple[Score, ...]:
    """Turn the checks of one tomogram into scores with thresholds that follow its own noise.

    Parameters
    ----------
    checks : mapping
        Of `check_projections`.
    order : (n,) array of int
        Numbers of the projections in the order of acquisition, ascending.
    seams : sequence of int
        Numbers of the first projections after flats were taken.
    width : int
        Columns of the frames, for the least thresholds: they are those of 256 columns, scaled.

    Notes
    -----
    None of them is the error of the displacements, which nobody knows on measured data: they say what the projections
    contradict each other by, beyond what the noise explains. A step or trend is judged by the scatter of the same
    number where nothing happened.
    """
    scale = width / 256
    number = np.asarray(order)
    n = len(number)

    def spread(check: Check) -> float:
        known = check.values[np.isfinite(check.values)]
        return float(1.4826 * np.median(np.abs(known - np.median(known)))) if len(known) else float("nan")

    def allowed(check: Check, least: float) -> float:
        return float(np.hypot(3 * np.nan_to_num(check.noise), least))

    out = [
        Score("mass consistency", spread(checks["mass_deviation"]), "", allowed(checks["mass_deviation"], 0.01)),
        Score("moment consistency y", spread(checks["profile_shift_px"]), "px",
              allowed(checks["profile_shift_px"], 0.1 * scale)),
        Score("moment consistency x", spread(checks["moment_deviation_px"]), "px",
              allowed(checks["moment_deviation_px"], 0.1 * scale)),
        Score("residual shift y", spread(checks["residual_shift_y_px"]), "px",
              allowed(checks["residual_shift_y_px"], 0.05 * scale)),
        Score("residual shift x", spread(checks["residual_shift_x_px"]), "px",
              allowed(checks["residual_shift_x_px"], 0.05 * scale)),
    ]  # fmt: skip
    for name, what in (("profile_shift_px", "y"), ("moment_deviation_px", "x")):
        steps = [_step_at(checks[name].values, number, seam) for seam in seams]
        known = [s for s in steps if np.isfinite(s[0])]
        if known:
            size, usual = max(known, key=lambda s: s[0] / s[1])
            out.append(Score(f"seam step {what}", size, "px", float(np.hypot(4 * usual, 0.05 * scale))))
    for name, what, unit, least in (
        ("mass_deviation", "gain trend", "", 0.01),
        ("background_od", "background trend", "OD", 0.005),
    ):
        trend, usual = _trend(checks[name].values, number)
        if np.isfinite(trend):
            out.append(Score(what, trend, unit, float(np.hypot(4 * usual, least))))
    frc = checks["frc_px"]
    if np.isfinite(frc.values).any():
        out.append(Score("ring correlation ends at", float(np.nanmedian(frc.values)), "px"))
    # The level of the air is free in everything else: alone, it says nothing against a projection.
    odd = {k for name, c in checks.items() if name != "background_od" for k in c.beyond.tolist()}
    out.append(Score("projections beyond a limit", len(odd), "", max(2.0, 0.05 * n)))
    return tuple(out)


def _step_at(values: FloatArray, number: npt.NDArray[Any], seam: int) -> tuple[float, float]:
    """Size of the step of `values` before projection `seam`, medians of ten on either side; and what is usual."""
    known = np.isfinite(values)
    v, at = values[known], int(np.searchsorted(number[known], seam))
    reach = min(10, len(v) // 6)
    if reach < 3 or not reach <= at <= len(v) - reach:
        return float("nan"), float("nan")
    steps = {
        k: float(np.median(v[k : k + reach]) - np.median(v[k - reach : k])) for k in range(reach, len(v) - reach + 1)
    }
    elsewhere = [s for k, s in steps.items() if abs(k - at) >= reach]
    usual = 1.4826 * float(np.median(np.abs(elsewhere))) if elsewhere else abs(steps[at])
    return abs(steps[at]), max(usual, 1e-12)


def _trend(values: FloatArray, number: npt.NDArray[Any]) -> tuple[float, float]:
    """Change of `values` over the acquisition by a straight line, its size; and its standard error."""
    known = np.isfinite(values)
    if known.sum() < 8:
        return float("nan"), float("nan")
    at = number[known] / max(1.0, float(np.ptp(number[known])))
    design = np.stack([np.ones(len(at)), at - at.mean()], axis=1)
    slope = float(np.linalg.lstsq(design, values[known], rcond=None)[0][1])
    rest = _beside(values[known], design)
    # Neighbours are alike where something drifts: the error follows groups of ten, not single projections.
    groups = np.array_split(rest, max(4, len(rest) // 10))
    usual = float(np.std([g.mean() for g in groups]) / np.sqrt(len(groups)) / max(np.std(at), 1e-9))
    return abs(slope), usual
