"""Registration: the scale and the place of every energy's tomogram on the grid of the reference energy.

Each tomogram is aligned in itself first (`jitter`), so that few numbers are left for each energy: a magnification and
a 3-D translation, found from all angles at once. The projections of the energy, placed on the common grid, are
compared with the reprojected reference volume. The template and its derivatives stay fixed while the data are warped
back (inverse compositional Gauss-Newton; Baker & Matthews 2004, doi 10.1023/B:VISI.0000011205.11775.fd), in a band
of fine structures - surfaces, cracks, grain boundaries - that all elements share, so that contrast which changes
across an absorption edge does not pull.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .absorbance import bin_frames
from .agreement import band_pass, object_support, registration_equations, smooth, solve_normal
from .edges import bracketed_elements, edge_energy_ev
from .model import Alignment, FloatArray, Progress, Quality, Score, XanesTomoError, no_progress
from .projector import Projector
from .recipe import RegistrationParameters
from .reconstruction import angular_weights, fbp
from .resample import place

__all__ = [
    "RegistrationResult",
    "Template",
    "make_template",
    "match_angles",
    "object_mass",
    "reference_energy",
    "register",
]

F32 = npt.NDArray[np.float32]
_BLOCKS = 12  # contiguous blocks of angles left out in turn for the standard errors


@dataclass(frozen=True)
class Template:
    """The reference tomogram, seen again at its own angles.

    Attributes
    ----------
    frames : (n, y, x) float32 array
        Reprojection of the reference volume on the common grid, binned by `bin`.
    theta_deg : (n,) array
        Degrees.
    bin : int
        Reference pixels per pixel.
    frame_shape : (int, int)
        Shape of a raw frame.
    level : float
        Mean attenuation inside the particle, 1/pixel of `frames`.
    """

    frames: F32
    theta_deg: FloatArray
    bin: int
    frame_shape: tuple[int, int]
    level: float


@dataclass(frozen=True)
class RegistrationResult:
    """Where one energy lies with respect to the reference.

    Attributes
    ----------
    alignment : Alignment
        Of all its projections, raw px: jitter, magnification and translation in one.
    magnification_sigma : float
    translation : (3,) array
        ``[ty, a, b]`` by which the object was moved, common-grid px, and
    translation_sigma : (3,) array
        its standard errors.
    residual : (n,) array
        Rms difference of every matched projection from the template, after gain and level.
    mass : float
        Mean absorbance over the object's shadow; see `object_mass`.
    correlation : float
        Median correlation with the template in the band used.
    quality : Quality
    """

    alignment: Alignment
    magnification_sigma: float
    translation: FloatArray
    translation_sigma: FloatArray
    residual: FloatArray
    mass: float
    correlation: float
    quality: Quality


def reference_energy(energies_ev: npt.ArrayLike, wanted_ev: float | None = None) -> int:
    """Return the number of the reference energy.

    The wanted one (the nearest within 1 eV), else the highest that lies at least 150 eV above the last edge
    bracketed by the energies, else the highest.
    """
    energies = np.asarray(energies_ev, dtype=float)
    if wanted_ev is not None:
        best = int(np.argmin(np.abs(energies - wanted_ev)))
        if abs(energies[best] - wanted_ev) > 1.0:
            raise XanesTomoError(
                f"registration.reference_ev: expected one of the {len(energies)} energies, the nearest to "
                f"{wanted_ev:g} eV is {energies[best]:g} eV"
            )
        return best
    elements = bracketed_elements(energies)
    last = max((edge_energy_ev(e) for e in elements), default=-np.inf)
    high = np.flatnonzero(energies >= last + 150.0)
    candidates = high if len(high) else np.arange(len(energies))
    return int(candidates[np.argmax(energies[candidates])])


def make_template(
    stack: F32,
    theta_deg: FloatArray,
    alignment: Alignment,
    *,
    bin: int = 1,
    frame_shape: tuple[int, int] | None = None,
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
    """
    shape = (stack.shape[1] * bin, stack.shape[2] * bin) if frame_shape is None else frame_shape
    placed = place(stack, alignment.binned(bin, shape))
    volume = fbp(placed, theta_deg, weights=angular_weights(theta_deg))
    volume *= object_support(volume)
    frames = Projector(stack.shape[2], theta_deg).forward(volume)
    calm = smooth(volume, 1.0)
    body = calm > 0.5 * np.percentile(calm[calm > 0.2 * calm.max()], 50)
    return Template(frames, np.asarray(theta_deg, dtype=float), bin, shape, float(volume[body].mean()))


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
    placed, coverage = place(stack[mine], part.binned(template.bin, template.frame_shape), return_coverage=True)
    weight = _object_weight(template.frames[theirs]) * (coverage > 0.99)
    return float((placed * weight).sum(dtype=np.float64) / max(1.0, float(weight.sum(dtype=np.float64))))


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


def register(
    stack: F32,
    theta_deg: FloatArray,
    jitter: Alignment,
    template: Template,
    *,
    magnification: float,
    fixed: bool = False,
    parameters: RegistrationParameters | None = None,
    progress: Progress = no_progress,
    what: str = "registration",
) -> RegistrationResult:
    """Bring one tomogram, aligned in itself, onto the grid of the reference.

    Parameters
    ----------
    stack : (n, y, x) float32 array
        Absorbance, binned like the template.
    theta_deg : (n,) array
        Degrees.
    jitter : Alignment
        Of these projections within their tomogram, raw px.
    template : Template
    magnification : float
        First guess, from a calibration; what comes out is measured.
    fixed : bool
        Take `magnification` as it is.
    parameters : RegistrationParameters, optional
    progress : callable
        See `Progress`.
    what : str
        Name of the energy in messages.

    Raises
    ------
    XanesTomoError
        Fewer than 8 angles in common, or nothing in the image that the two share.
    """
    p = RegistrationParameters() if parameters is None else parameters
    mine, theirs = match_angles(theta_deg, template.theta_deg)
    if len(mine) < 8:
        raise XanesTomoError(f"{what}: expected at least 8 angles in common with the reference, got {len(mine)}")
    data = np.ascontiguousarray(stack[mine], dtype=np.float32)
    model = template.frames[theirs]
    theta = template.theta_deg[theirs]
    w = data.shape[2]
    scale = template.bin
    base = replace(jitter, shift=jitter.shift[mine], sigma=jitter.sigma[mine], status=())
    unit = w / 256

    def at(m: float, t: FloatArray) -> Alignment:
        return at_alignment(base, m, theta, t).binned(scale, template.frame_shape)

    translation = _coarse_translation(data, model, theta, at, magnification, scale)
    m = float(magnification)
    covariance = np.full((4, 4), np.inf)
    contrast = 1.0
    height = data.shape[1]
    # Coarse to fine: a wide band takes in large errors, the fine band is least fooled by contrast.
    scales = ((3.0 * p.fine_px, 4.0 * p.coarse_px, 2 if w >= 128 else 1), (p.fine_px, p.coarse_px, 1))
    for stage, (fine, coarse, extra) in enumerate(scales):
        small = bin_frames(model, extra)
        weight = _object_weight(small, 1.0 / extra)
        rows = np.flatnonzero(weight.any(axis=(0, 2)))
        reach = int(np.ceil(4 * coarse * unit / extra)) + 2
        top, bottom = max(0, int(rows[0]) - reach), min(small.shape[1], int(rows[-1]) + 1 + reach)
        plain = band_pass(small[:, top:bottom], fine * unit / extra, coarse * unit / extra)
        steep = band_pass(_steepness(small[:, top:bottom]), fine * unit / extra, coarse * unit / extra)
        blur = 0.5 * (p.blur_px / (scale * extra)) ** 2
        weight = weight[:, top:bottom]
        middle = (small.shape[1] - 1) / 2 - top
        for k in range(p.iterations):
            now = at(m, translation)
            placed = place(data, now, grid_shape=(height // extra, w // extra), rows=(top, bottom), bin=extra)
            seen = band_pass(placed, fine * unit / extra, coarse * unit / extra)
            inside = weight * _recorded(now, placed.shape, middle, extra, (height, w), 2.0 * coarse * unit)
            reference = plain - np.float32(blur * (contrast - 1)) * steep
            fit = registration_equations(seen, reference, inside, theta, pixel=scale * extra, middle_row=middle)
            if fixed:  # a column without information is not moved
                fit.normal[:, :, 0], fit.normal[:, :, :, 0], fit.rhs[:, :, 0] = 0, 0, 0
            change, covariance, angle_fit, contrast = _joint(
                fit.normal[:, 0], fit.rhs[:, 0], fit.cost[:, 0], fit.count[:, 0]
            )
            change[0] = np.clip(change[0], -0.02, 0.02)
            change[1:] = np.clip(change[1:], -4 * scale * unit, 4 * scale * unit)
            # data(q) = model(q - scale q - t): the point that should be at q is found at q + scale q + t.
            translation = translation + change[1:4] + change[0] * translation
            m *= 1 + change[0]
            progress(what, stage * p.iterations + k + 1, len(scales) * p.iterations)
            if max(abs(change[0]) * w * scale / 2, np.abs(change[1:]).max()) < 2e-3 * scale * extra:
                break
    sigma = np.sqrt(np.maximum(np.diag(covariance), 0))
    if not fixed:
        # The blur is known to perhaps a third: as much of what its correction did to the scale is uncertain.
        without = registration_equations(seen, plain, inside, theta, pixel=scale, middle_row=middle)
        other = _joint(without.normal[:, 0], without.rhs[:, 0], without.cost[:, 0], without.count[:, 0])[0]
        sigma[0] = np.hypot(sigma[0], 0.35 * abs(other[0]))
    moved = replace(jitter, magnification=m).gauge(np.asarray(theta_deg, dtype=float), *translation)
    residual, correlation = angle_fit
    residual_all = np.full(len(theta_deg), np.nan)
    residual_all[mine] = residual
    mass = object_mass(data, theta, at_alignment(base, m, theta, translation), template)
    law_error = m / magnification - 1
    scores = (
        Score("correlation with the reference", correlation, "", 0.3, "higher"),
        # A quarter of the frame from the axis is where a typical particle ends.
        Score("sigma magnification at the rim", float(sigma[0]) * w * scale / 4, "px", 0.1 * scale),
        Score("sigma translation", float(np.max(sigma[1:])), "px", 0.1 * scale),
        Score("magnification / law - 1", float(law_error), "", None),
    )
    if not np.isfinite(m) or abs(law_error) > 0.08 or not np.isfinite(translation).all():
        raise XanesTomoError(
            f"{what}: expected the particle of the reference energy, but nothing fits (correlation {correlation:.2f}); "
            "exclude this energy"
        )
    return RegistrationResult(
        moved, float(sigma[0]) * m, translation, sigma[1:], residual_all, mass, correlation, Quality(scores)
    )


def at_alignment(base: Alignment, magnification: float, theta_deg: FloatArray, translation: FloatArray) -> Alignment:
    """Return `base` seen at a magnification, for an object moved by ``[ty, a, b]``, common-grid px."""
    return replace(base, magnification=magnification).gauge(theta_deg, *translation)


def _steepness(model: F32) -> F32:
    """Return the squared gradient (n, y, x): how a blur of the intensities shows in absorbance.

    To first order in the blur's variance v, ``-ln(h * exp(-c A)) = c (h * A) - v/2 c^2 |grad A|^2``. That does not grow
    in proportion to the contrast c, and would make a weakly absorbing particle look larger than the reference.
    """
    gy, gx = np.gradient(model, axis=1), np.gradient(model, axis=2)
    return np.asarray(gy * gy + gx * gx, dtype=np.float32)


def _recorded(
    alignment: Alignment, shape: tuple[int, ...], middle: float, bin: int, frame_shape: tuple[int, int], margin: float
) -> F32:
    """(n, y, x) 1 where a placed pixel lies inside the recorded frame, `margin` recorded px from its border."""
    _, rows, columns = shape
    height, width = frame_shape
    y = alignment.magnification * bin * (np.arange(rows) - middle)[None, :] + alignment.shift[:, :1]
    x = alignment.magnification * bin * (np.arange(columns) - (columns - 1) / 2)[None, :] + alignment.shift[:, 1:]
    inside_y = np.abs(y) <= (height - 1) / 2 - margin
    inside_x = np.abs(x) <= (width - 1) / 2 - margin
    return (inside_y[:, :, None] & inside_x[:, None, :]).astype(np.float32)


def _object_weight(model: F32, per_pixel: float = 1.0) -> F32:
    """(n, y, x) 1 on and around the object in the template; `per_pixel` scales the width of the margin."""
    body = smooth(model, 2.0 * per_pixel)
    return (smooth((body > 0.05 * float(body.max())).astype(np.float32), 2.0 * per_pixel) > 0.02).astype(np.float32)


def _joint(
    normal: FloatArray, rhs: FloatArray, cost: FloatArray, count: FloatArray
) -> tuple[FloatArray, FloatArray, tuple[FloatArray, float], float]:
    """Solve for what all angles share, each with a gain and level of its own, with jackknife covariances.

    Angles that agree with the rest less well than chance allows are given less weight (Huber).
    """
    # Eliminate gain and level of every angle (Schur complement).
    inner, _ = solve_normal(normal[:, 4:, 4:], rhs[:, 4:])
    cross = normal[:, :4, 4:]
    scaled = np.linalg.pinv(normal[:, 4:, 4:])
    reduced = normal[:, :4, :4] - cross @ scaled @ normal[:, 4:, :4]
    right = rhs[:, :4] - np.einsum("nij,nj->ni", cross @ scaled, rhs[:, 4:])
    left_over = cost - np.einsum("ni,ni->n", inner, rhs[:, 4:])
    robust = np.ones(len(cost))
    solution = np.zeros(4)
    for _ in range(4):
        total, vector = np.einsum("n,nij->ij", robust, reduced), robust @ right
        solution = np.linalg.lstsq(total, vector, rcond=None)[0]
        rest = left_over - 2 * right @ solution + np.einsum("i,nij,j->n", solution, reduced, solution)
        rms = np.sqrt(np.maximum(rest, 0) / np.maximum(count, 1e-9))
        middle = np.median(rms)
        spread = 1.4826 * np.median(np.abs(rms - middle)) + 0.05 * middle + 1e-12
        robust = np.minimum(1.0, 2.5 * spread / np.maximum(np.abs(rms - middle), 1e-12))
    blocks = np.array_split(np.arange(len(cost)), min(_BLOCKS, len(cost)))
    estimates = []
    for block in blocks:
        keep = np.ones(len(cost), dtype=bool)
        keep[block] = False
        part, vector = np.einsum("n,nij->ij", robust[keep], reduced[keep]), robust[keep] @ right[keep]
        estimates.append(np.linalg.lstsq(part, vector, rcond=None)[0])
    spread_of = np.array(estimates) - np.mean(estimates, axis=0)
    covariance = (len(blocks) - 1) / len(blocks) * spread_of.T @ spread_of
    # Correlation with the template: explained by the model over what there is.
    gain = 1 + inner[:, 0]
    # The derivatives are those of the template; where the data have another contrast, theirs are larger or smaller.
    contrast = float(np.clip(np.median(gain), 0.2, 5.0))
    solution, covariance = solution / contrast, covariance / contrast**2
    signal = gain**2 * normal[:, 4, 4]
    correlation = float(
        np.median(np.sqrt(signal / np.maximum(signal + np.maximum(left_over, 0), 1e-30)) * np.sign(gain))
    )
    return solution, covariance, (rms, correlation), contrast


def _coarse_translation(
    data: F32,
    model: F32,
    theta_deg: FloatArray,
    at: Callable[[float, FloatArray], Alignment],
    magnification: float,
    scale: int,
) -> FloatArray:
    """First guess of ``[ty, a, b]`` from a cross-correlation at every angle, common-grid px."""
    from scipy.fft import irfft2, rfft2

    step = max(1, data.shape[2] // 64)
    placed = place(data, at(magnification, np.zeros(3)))
    n, h, w = placed.shape
    hb, wb = h // step * step, w // step * step

    def small(frames: F32) -> F32:
        cut = frames[:, :hb, :wb].reshape(n, hb // step, step, wb // step, step).mean(axis=(2, 4))
        band = band_pass(np.ascontiguousarray(cut, dtype=np.float32), 0.7, 6.0)
        window = np.hanning(band.shape[1] + 2)[1:-1, None] * np.hanning(band.shape[2] + 2)[None, 1:-1]
        return np.asarray(band * window.astype(np.float32))

    a, b = small(placed), small(model)
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
