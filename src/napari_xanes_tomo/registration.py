"""Registration: the scale and the place of every energy's tomogram on the grid of the reference energy.

Each tomogram is aligned in itself first (`jitter`), so that few numbers are left for each energy: a magnification and
a 3-D translation, found from all angles at once. The projections of the energy, placed on the common grid, are
compared with the reprojected reference volume. The template and its derivatives stay fixed while the data are warped
back (inverse compositional Gauss-Newton; Baker & Matthews 2004, doi 10.1023/B:VISI.0000011205.11775.fd), in a band
of fine structures - surfaces, cracks, grain boundaries - that all elements share, so that contrast which changes
across an absorption edge does not pull.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .agreement import (
    REGISTRATION_COLUMNS,
    LinearFit,
    band_pass,
    bin_frames,
    bin_volume,
    block_shifts,
    registration_equations,
)
from .composition import grain_contrast, grown
from .edges import bracketed_elements, edge_energy_ev
from .model import Alignment, FloatArray, Progress, Quality, Score, XanesTomoError, no_progress
from .projector import Projector
from .recipe import RegistrationParameters
from .reconstruction import angular_weights, fbp
from .resample import place
from .shared_fit import NUMBERS, Solved, solve_shared
from .template import (
    NOISY,
    BandLimited,
    Template,
    coarse_translation,
    match_angles,
    noise_equations,
    over_shadow,
    take,
)

__all__ = ["RegistrationResult", "reference_energy", "register"]

F32 = npt.NDArray[np.float32]
_ROLL_DEG = 0.01  # smaller rolls (0.02 px at the rim of a 256 px frame) are reported but not applied
_ANGLE_DEG = 0.02
_ENOUGH = 60  # angles for the first steps, and for what the composition of grains pulls
_GRAINS = 96  # columns: in narrower frames the grains are too few pixels wide
_FINE_GRAINS = 192  # columns from which on a grain is wide enough in pixels twice as wide
_FINEST = 0.5  # px: with coarser pixels the interpolations decide what is sharp, not the focus


@dataclass(frozen=True)
class RegistrationResult:
    """Where one energy lies with respect to a template.

    Attributes
    ----------
    alignment : Alignment
        Of all its projections, raw px: jitter, magnification, roll and translation in one.
    place, place_sigma : (6,) arrays
        ``[ln M / guess, roll, ty, tx, tz, angle]``, see `graph.PARAMETERS`, and the standard errors.
    pull : (6,) array
        What grains of another composition passed themselves off as (`composition`): taken out of the place, not of
        `second`.
    second, second_sigma : (6,) arrays or None
        The same against the second template, measured by a comparison of its own.
    magnification_sigma : float
    translation, translation_sigma : (3,) arrays
        ``[ty, a, b]`` by which the object was moved, common-grid px, and its standard errors.
    roll_deg, roll_sigma_deg, angle_deg, angle_sigma_deg, pitch_deg, pitch_sigma_deg : float
        Of the object against the reference. The roll is part of the alignment where it matters; the angle is the amount
        by which the true angles of this energy exceed the nominal ones.
    blur_px2, blur_sigma_px2 : float
        Variance of the point spread beyond that of the reference, square raw px. The error is 0 where it was not
        measured (frames too narrow): the value is then that of one blur of all recorded pixels.
    residual_shift, residual_sigma : (n, 2) arrays
        What each projection by itself is displaced by, beyond the alignment, raw px; NaN where nothing was compared.
    residual : (n,) array
        Rms difference of every matched projection from the template, after gain and level.
    mass : float
        Mean absorbance over the object's shadow; see `object_mass`.
    width : float
        Standard deviation of the absorbance along the rotation axis, common-grid px.
    correlation : float
        Median correlation with the template in the band used.
    block_shift, block_sigma : (rows, columns, 2) arrays
        ``[dy, dx]`` of blocks of the object beyond the alignment, mean over all angles, raw px; NaN outside the object.
    block_place : (rows, columns, 2) array
        ``[y, x]`` of the middle of each block from the middle of the common grid, px.
    quality : Quality
    """

    alignment: Alignment
    place: FloatArray
    place_sigma: FloatArray
    pull: FloatArray
    second: FloatArray | None
    second_sigma: FloatArray | None
    magnification_sigma: float
    translation: FloatArray
    translation_sigma: FloatArray
    roll_deg: float
    roll_sigma_deg: float
    angle_deg: float
    angle_sigma_deg: float
    pitch_deg: float
    pitch_sigma_deg: float
    blur_px2: float
    blur_sigma_px2: float
    residual_shift: FloatArray
    residual_sigma: FloatArray
    residual: FloatArray
    mass: float
    width: float
    correlation: float
    block_shift: FloatArray
    block_sigma: FloatArray
    block_place: FloatArray
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


def register(
    stack: F32,
    theta_deg: FloatArray,
    jitter: Alignment,
    template: Template,
    *,
    magnification: float,
    bin: int | None = None,
    frame_shape: tuple[int, int] | None = None,
    pixel: float = 1.0,
    second: Template | None = None,
    fixed: bool = False,
    grains: bool = True,
    parameters: RegistrationParameters | None = None,
    progress: Progress = no_progress,
    what: str = "registration",
) -> RegistrationResult:
    """Bring one tomogram, aligned in itself, onto the grid of the reference.

    Parameters
    ----------
    stack : (n, y, x) float32 array
        Absorbance, binned.
    theta_deg : (n,) array
        Degrees.
    jitter : Alignment
        Of these projections within their tomogram, raw px.
    template : Template
        Of the reference.
    magnification : float
        First guess, from a calibration, raw px per px of the reference; what comes out is measured.
    bin, frame_shape : int, (int, int), optional
        Raw px per pixel of `stack`, and the shape of a raw frame; those of the template unless given.
    pixel : float
        How wide a raw pixel is on the camera, in those of the reference.
    second : Template, optional
        Another energy, made `like` the first, that this one is compared with as well.
    fixed : bool
        Take `magnification` as it is.
    grains : bool
        Take out what grains of another composition pass themselves off as, see `composition`.
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
    theta = np.asarray(theta_deg, dtype=float)
    mine, theirs = match_angles(theta, template.theta_deg)
    if len(mine) < 8:
        raise XanesTomoError(f"{what}: expected at least 8 angles in common with the reference, got {len(mine)}")
    data = np.ascontiguousarray(take(stack, mine), dtype=np.float32)
    base = replace(jitter, shift=jitter.shift[mine], sigma=jitter.sigma[mine], status=())
    recorded = _Recorded(
        template.bin if bin is None else bin, template.frame_shape if frame_shape is None else frame_shape, pixel,
        template.bin,
    )  # fmt: skip
    wider = round(recorded.bin * pixel / template.bin)
    if wider > 1 and not any(n % wider for n in template.grid_shape):
        # What wide pixels cannot show is not compared. The second template is only there in its own pixels.
        template, second = template.binned(wider), None
    fit = _Fit(data, base, template, theirs, float(magnification), fixed, p, recorded)
    rough = max(1, len(mine) // _ENOUGH)
    fit.use(rough)
    fit.translation = coarse_translation(
        fit.data, take(template.frames, fit.theirs), fit.theta, fit.binned, magnification, template.bin
    )
    # Coarse to fine: a wide band takes in large errors, the fine band is least fooled by contrast. A part of the
    # angles takes the first steps, the last are those of all of them.
    unit, wide = template.grid_shape[1] / 256, 2 if template.grid_shape[1] >= 128 else 1
    scales = ((3.0 * p.fine_px * unit, 4.0 * p.coarse_px * unit, wide), (fit.fine, fit.coarse, 1))
    for stage, (fine, coarse, extra) in enumerate(scales):
        for k in range(p.iterations):
            solved, moved = fit.step(fine, coarse, extra, whole=stage == 0, first=stage == 0)
            progress(what, stage * p.iterations + k + 1, len(scales) * p.iterations)
            if moved < (0.05, 0.02)[stage] * template.bin * extra:
                break
        if stage == 0:
            fit.turn(solved)
            if rough > 1:
                fit.step(fit.fine, fit.coarse, 1, whole=False)
                fit.use(1)
    solved, _ = fit.step(fit.fine, fit.coarse, 1, focus=True)
    if grains and fit.width >= _GRAINS:
        fit.release()
    m, translation = fit.magnification, fit.translation
    if not np.isfinite(m) or abs(m / magnification - 1) > 0.08 or not np.isfinite(translation).all():
        raise XanesTomoError(
            f"{what}: expected the particle of the reference energy at a scale near {magnification:.4f}, but nothing "
            f"fits there (best {m:.4f}, correlation {solved.correlation:.2f}): another sample, a wrong label, or a "
            "particle outside the field; correct it or exclude this energy"
        )
    return fit.result(solved, jitter, mine, theta, second)


@dataclass(frozen=True)
class _Recorded:
    """How a stack was recorded: its binning, the shape of a raw frame, the width of a raw px in the reference's.

    And the binning of the reference's stack.
    """

    bin: int
    frame_shape: tuple[int, int]
    pixel: float
    reference_bin: int


class _Fit:
    """The search for the place of one energy: where it is by now, and steps that improve it."""

    def __init__(
        self,
        data: F32,
        base: Alignment,
        template: Template,
        theirs: npt.NDArray[np.intp],
        magnification: float,
        fixed: bool,
        parameters: RegistrationParameters,
        recorded: _Recorded,
    ) -> None:
        self.recorded, self.width = recorded, template.grid_shape[1]
        self.covered = False  # whether all of the object is compared at every angle
        self.coarser = recorded.bin * recorded.pixel / template.bin  # width of a pixel of the data in the template's
        self.template, self.everything = template, (data, base, theirs)
        self.use(1)
        self.magnification, self.guess, self.fixed, self.parameters = magnification, magnification, fixed, parameters
        self.roll = self.angle = 0.0  # radians
        self.translation: FloatArray = np.zeros(3)
        self.contrast = 1.0
        # Variance of the point spread beyond the reference's, and its error, common-grid px^2: that of the same
        # recorded pixels until it is measured. Pixels of another size have another box, a twelfth of its square; the
        # camera took the mean before the logarithm, whatever is done to the template after it.
        optical = magnification * recorded.pixel
        box = ((recorded.bin * recorded.pixel) ** 2 - recorded.reference_bin**2) / 12
        self.excess = parameters.blur_px**2 * (1 / optical**2 - 1) + box / optical**2
        self.excess_sigma = 0.0
        self.last: FloatArray = np.zeros(NUMBERS)
        self.placed_at: FloatArray = np.zeros(6)  # where the data were when they were placed
        self.pull: FloatArray = np.zeros(6)
        self.placed = self.seen = self.inside = data
        self.fit = LinearFit(np.zeros((0, 1, 1, 1)), np.zeros((0, 1, 1)), np.zeros((0, 1)), np.zeros((0, 1)))
        self.fine, self.coarse = template.band(parameters)

    def use(self, every: int) -> None:
        """Go on with one in so many angles."""
        data, base, theirs = self.everything
        some = np.arange(0, len(theirs), every)
        self.data, self.theirs, self.theta = take(data, some), theirs[some], self.template.theta_deg[theirs[some]]
        self.base = replace(base, shift=base.shift[some], sigma=base.sigma[some], status=())
        self.added: FloatArray | None = None

    def alignment(self, base: Alignment, theta: FloatArray) -> Alignment:
        """Where the projections with the jitter `base` are now."""
        roll = np.rad2deg(self.roll)
        return replace(base, magnification=self.magnification, roll_deg=roll).gauge(theta, *self.translation)

    def binned(self, magnification: float, translation: FloatArray) -> Alignment:
        """Return an alignment of the stack as it is, with other numbers."""
        base = replace(self.base, magnification=magnification).gauge(self.theta, *translation)
        return base.binned(self.recorded.bin, self.recorded.frame_shape, self.template.bin)

    def _compare(self, fine: float, coarse: float, extra: int) -> tuple[F32, BandLimited, F32]:
        """Place and band-pass the data; return them with the level of the template and the weights."""
        template = self.template
        (height, width), recorded = template.grid_shape, self.recorded
        fine, coarse = fine / extra, coarse / extra
        level = template.in_band(fine, coarse, extra)
        self.against = level, extra
        self.placed_at = self._now()
        now = self.alignment(self.base, self.theta).binned(recorded.bin, recorded.frame_shape, template.bin)
        top, bottom, aside = level.part
        grid = (height // extra, width // extra - 2 * aside)
        self.placed = place(self.data, now, grid_shape=grid, rows=(top, bottom), bin=extra)
        seen = band_pass(self.placed, fine, coarse)
        margin = 2.0 * coarse * extra / self.coarser
        rows, columns = _recorded(now, seen.shape, level.middle, extra, self.data.shape[1:], margin)
        inside = self._of(level.weight)
        self.covered = bool(rows[:, level.bounds[0]].all() and columns[:, level.bounds[1]].all())
        if not self.covered:
            inside = inside * (rows[:, :, None] & columns[:, None, :])
        return seen, level, inside

    def _of(self, frames: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return take(frames, self.theirs)

    def _equations(self, seen: F32, level: BandLimited, inside: F32, extra: int, whole: bool) -> LinearFit:
        few = (0, 1, 2, 3, 7, 8, 9)
        columns = range(len(REGISTRATION_COLUMNS)) if whole else few
        fit = registration_equations(
            seen,
            self._of(level.plain),
            inside,
            depth=self._of(level.depth) if whole else None,
            steep=self._of(level.steep),
            pixel=self.template.bin * extra,
            middle_row=level.middle,
            columns=[REGISTRATION_COLUMNS[c] for c in columns],
        )
        if whole:
            return fit
        n, k = len(seen), len(REGISTRATION_COLUMNS)
        normal, rhs = np.zeros((n, 1, k, k)), np.zeros((n, 1, k))
        normal[:, :, np.array(few)[:, None], few], rhs[:, :, few] = fit.normal, fit.rhs
        return LinearFit(normal, rhs, fit.cost, fit.count)

    def _held(self, extra: int, *, blur: bool = False) -> dict[int, tuple[float, float]]:
        """Numbers that are not fitted: ``{number: (value, standard deviation)}``."""
        pixel = self.template.bin * extra
        variance = (self.parameters.blur_px / pixel) ** 2
        # To first order in the variance v of the blur, -ln(h * exp(-c A)) = c (h * A) - v/2 c^2 |grad A|^2. On the
        # common grid the variance is v at the reference and v + excess here.
        c = self.contrast
        steep = -0.5 * (c**2 * (variance + self.excess / pixel**2) - c * variance)
        # The parameter is a typical value; the excess is as good as the contrast is the same.
        doubt = np.hypot(self.excess_sigma, 0.15 * self.excess) / pixel**2
        spread = 0.5 * float(np.hypot(0.35 * (c**2 - c) * variance, c**2 * doubt))
        held = {8: (steep, spread) if variance > 0 else (0.0, 0.0)}
        if not blur:
            held[7] = (0.0, 0.0)
        if self.fixed:
            held[0] = (0.0, 0.0)
        return held

    def _without_noise(self, fit: LinearFit, added: FloatArray) -> LinearFit:
        """Take what the noise of the template has `added` to the normal equations out of them.

        The noise has more of the fine structures than the object, so that the data would seem blurred and of less
        contrast, and as there is more of it where the object is thick, another magnification would seem to fit better
        (errors in variables; Fuller 1987, doi 10.1002/9780470316665). At most half of a projection's own gain is taken.
        """
        at = np.array([REGISTRATION_COLUMNS.index(c) for c in NOISY])
        gain = added[:, :, -1, -1]
        most = 0.5 * fit.normal[:, :, at[-1], at[-1]] / np.maximum(gain, 1e-30)
        added = added * np.minimum(1.0, most)[:, :, None, None]
        normal, rhs = fit.normal.copy(), fit.rhs.copy()
        normal[:, :, at[:, None], at] -= added
        rhs[:, :, at] += added[:, :, :, -1]
        return replace(fit, normal=normal, rhs=rhs)

    def _added(self, template: Template, theirs: npt.NDArray[np.intp], weight: F32) -> FloatArray:
        """Return what the noise of a template adds to its normal equations in the finest band."""
        band = (self.fine, self.coarse, 1)
        if self.covered:
            return take(template.noise_added(*band), theirs)
        noise = take(template.noise_in_band(*band), theirs)
        return noise_equations(noise, weight, template.bin, template.in_band(*band).middle)

    def _focus(self) -> None:
        """Measure the point spread beyond the reference's."""
        least = -0.75 * self.parameters.blur_px**2
        for _ in range(2):  # the blur and what it does before the logarithm
            solved = solve_shared(self.fit, self.theta, self._held(1, blur=True))
            error = float(np.sqrt(max(0.0, solved.covariance[7, 7])))
            if not np.isfinite([solved.value[7], error]).all():
                return
            self.excess = float(np.clip(solved.value[7], least, 4.0 * self.template.bin**2))
            self.excess_sigma = error

    def step(
        self, fine: float, coarse: float, extra: int, *, whole: bool = True, first: bool = False, focus: bool = False
    ) -> tuple[Solved, float]:
        """Solve once in a band (px of the data); move; return the solution and the largest change at the rim.

        Turn and tilt are solved for in the `whole` only; the `focus` is measured first where that is asked for. In the
        wide band of the `first` steps noise is too little to count.
        """
        seen, level, inside = self._compare(fine, coarse, extra)
        fit = self._equations(seen, level, inside, extra, whole)
        power: FloatArray | float = 0.0
        if not first:
            if self.added is None:
                self.added = self._added(self.template, self.theirs, inside)
            fit = self._without_noise(fit, self.added)
            power = self.added[:, 0, -1, -1]
        self.seen, self.inside, self.fit = seen, inside, fit
        if focus and fine / extra >= _FINEST:
            self._focus()
        solved = solve_shared(fit, self.theta, self._held(extra), power)
        if whole:  # a turn or tilt that is not certain only adds its error to the rest
            error = np.sqrt(np.maximum(np.diag(solved.covariance), 0))
            free, nil = solved, [i for i in (1, 5, 6) if not abs(solved.value[i]) > 4 * error[i]]
            solved = solve_shared(fit, self.theta, self._held(extra) | dict.fromkeys(nil, (0.0, 0.0)), power)
            solved.value[nil] = free.value[nil]
            solved.covariance[nil, nil] = free.covariance[nil, nil]
        self.contrast = solved.contrast
        self.last = solved.value
        width = self.width * self.template.bin
        limit = 4 * self.template.bin * self.width / 256
        scale = float(np.clip(solved.value[0], -0.02, 0.02))
        change = np.clip(solved.value[2:5], -limit, limit)
        # data(q) = model(q - d(q)): the point that should be at q is found at q + d(q).
        self.translation = (self.translation + change) / (1 + scale)
        self.magnification *= 1 + scale
        moved = max(abs(scale) * width / 2, float(np.abs(change).max()))
        roll, sigma = float(solved.value[1]), float(np.sqrt(solved.covariance[1, 1]))
        # The wide band is fooled by contrast: it decides about large rolls only. A roll once applied is followed.
        least = max(4 * sigma, np.deg2rad(_ROLL_DEG if whole and extra == 1 else 20 * _ROLL_DEG))
        if self.roll or abs(roll) > least:
            self.roll += float(np.clip(roll, -0.02, 0.02))
            moved = max(moved, abs(roll) * width / 4)
        return solved, moved

    def turn(self, solved: Solved) -> None:
        """Look at the reference from the angles this energy was really seen at, where they differ for certain."""
        angle, sigma = float(solved.value[5]), float(np.sqrt(solved.covariance[5, 5]))
        if abs(angle) > max(4 * sigma, np.deg2rad(_ANGLE_DEG)):
            self.angle += angle
            self.template = self.template.turned(float(np.rad2deg(angle)))

    def release(self) -> None:
        """Take out what grains of another composition pass themselves off as, see `composition`."""
        template, (level, _) = self.template, self.against
        theta = self.theta + float(np.rad2deg(self.angle))
        top, bottom, aside = level.part
        across = slice(aside, self.width - aside)
        volume = template.volume[top:bottom, across, across]
        k = 2 if self.width >= _FINE_GRAINS and volume.shape[2] % 2 == 0 else 1
        other = fbp(bin_frames(self.placed, k), theta, weights=angular_weights(theta))
        contrast = grain_contrast(bin_volume(volume, k), other, template.level, width=self.width // k)
        some = np.arange(0, len(theta), max(1, len(theta) // _ENOUGH))
        grains = Projector(volume.shape[2], theta[some]).forward(volume * grown(contrast, k, len(volume)))
        fit = registration_equations(
            band_pass(grains, self.fine, self.coarse),
            take(level.plain, self.theirs[some]),
            take(self.inside, some),
            pixel=template.bin,
            middle_row=level.middle,
        )
        held = {7: (0.0, 0.0)} | ({0: (0.0, 0.0)} if self.fixed else {})
        self.pull[:5] = solve_shared(fit, theta[some], held).value[:5]
        self.magnification *= float(np.exp(-self.pull[0]))
        self.translation = self.translation - self.pull[2:5]
        if self.roll:
            self.roll -= float(self.pull[1])

    def _now(self) -> FloatArray:
        """``[ln M / guess, roll, ty, tx, tz, angle]`` as they are applied."""
        return np.array([np.log(self.magnification / self.guess), self.roll, *self.translation, self.angle])

    def place(self, solved: Solved) -> FloatArray:
        """``[ln M / guess, roll, ty, tx, tz, angle]`` with what was found but not applied."""
        now = self._now()
        if not self.roll:
            now[1] = solved.value[1] - self.pull[1]
        now[5] += solved.value[5]
        return now

    def result(
        self,
        solved: Solved,
        jitter: Alignment,
        mine: npt.NDArray[np.intp],
        theta: FloatArray,
        second: Template | None,
    ) -> RegistrationResult:
        """Put everything together, from what the last step left behind."""
        scale = self.template.bin
        n, w = len(theta), self.width
        sigma = np.sqrt(np.maximum(np.diag(solved.covariance), 0))
        other = other_sigma = None
        if second is not None:
            other, other_sigma = self._against(second)

        def spread(values: FloatArray) -> FloatArray:
            out = np.full((n, *values.shape[1:]), np.nan)
            out[mine] = values
            return out

        m = self.magnification
        where = self.place(solved)
        block, block_sigma, block_place = self._blocks()
        excess = _field_excess(block, block_sigma)
        level, extra = self.against
        top, bottom, aside = level.part
        shadow = bin_frames(self.template.frames, extra)[:, top:bottom, aside : self.width // extra - aside]
        mass = over_shadow(self.placed, self.inside, self._of(shadow), self._of(level.weight))
        angle, angle_sigma = (float(np.rad2deg(v)) for v in (where[5], sigma[5]))
        scores = (
            Score("correlation with the reference", solved.correlation, "", 0.3, "higher"),
            # A quarter of the frame from the axis is where a typical particle ends.
            Score("sigma magnification at the rim", float(sigma[0]) * w * scale / 4, "px", 0.1 * scale),
            Score("sigma translation", float(np.max(sigma[2:5])), "px", 0.1 * scale),
            Score("angle offset", abs(angle), "deg", max(0.05, 4 * angle_sigma)),
            Score("deformation beyond its error", excess, "px", 0.1 * scale),
            Score("magnification / law - 1", m / self.guess - 1, "", None),
            Score("taken out for the composition of grains", float(np.linalg.norm(self.pull[2:5])), "px", None),
        )
        return RegistrationResult(
            alignment=self.alignment(jitter, theta),
            place=where,
            place_sigma=sigma[:6],
            pull=self.pull,
            second=other,
            second_sigma=other_sigma,
            magnification_sigma=float(sigma[0]) * m,
            translation=self.translation.copy(),
            translation_sigma=sigma[2:5],
            roll_deg=float(np.rad2deg(where[1])),
            roll_sigma_deg=float(np.rad2deg(sigma[1])),
            angle_deg=angle,
            angle_sigma_deg=angle_sigma,
            pitch_deg=float(np.rad2deg(solved.value[6])),
            pitch_sigma_deg=float(np.rad2deg(sigma[6])),
            blur_px2=self.excess * m**2,
            blur_sigma_px2=self.excess_sigma * m**2,
            residual_shift=spread(solved.shift * m),
            residual_sigma=spread(solved.shift_sigma * m),
            residual=spread(solved.rms),
            mass=mass,
            width=_width(self.placed, self.inside, self.template.bin),
            correlation=solved.correlation,
            block_shift=block * m,
            block_sigma=block_sigma * m,
            block_place=block_place,
            quality=Quality(scores),
        )

    def _against(self, second: Template) -> tuple[FloatArray, FloatArray]:
        """Return the place of the data against another template on the same grid, from the placed data as they are."""
        mine, theirs = match_angles(self.theta, second.theta_deg)
        level = second.in_band(self.fine, self.coarse, 1)
        if level.part != self.against[0].part:
            raise XanesTomoError("second template: expected one that was made like the first, got another grid")
        if len(mine) < 8:
            return np.zeros(6), np.full(6, np.inf)
        weight = take(self.inside, mine) * take(level.weight, theirs)
        fit = registration_equations(
            take(self.seen, mine),
            take(level.plain, theirs),
            weight,
            depth=take(level.depth, theirs),
            steep=take(level.steep, theirs),
            pixel=self.template.bin,
            middle_row=level.middle,
        )
        fit = self._without_noise(fit, self._added(second, theirs, weight))
        # How strong the contrast is against this template has to be known before it can be allowed for.
        kept, held = self.contrast, self._held(1)
        self.contrast = solve_shared(fit, self.theta[mine], held).contrast
        solved = solve_shared(fit, self.theta[mine], self._held(1))
        self.contrast = kept
        return self.placed_at + solved.value[:6], np.sqrt(np.maximum(np.diag(solved.covariance)[:6], 0))

    def _blocks(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Displacement of 4 x 4 blocks of the object's field beyond what all share, mean of all angles."""
        level = self.template.in_band(self.fine, self.coarse, 1)
        fit = registration_equations(
            self.seen,
            self._of(level.plain),
            self.inside,
            pixel=self.template.bin,
            blocks=(4, 4),
            bounds=level.bounds,
            columns=("dy", "dx", "gain", "level"),
        )
        shift, sigma = (a.reshape(4, 4, 2) / self.contrast for a in block_shifts(fit))
        # The last change of what all share is applied, but the data were placed before it.
        value = self.last
        y, x = (
            (side.start + (np.arange(4) + 0.5) * (side.stop - side.start) / 4 - 0.5 - middle) * self.template.bin
            for side, middle in zip(level.bounds, (level.middle, (self.seen.shape[2] - 1) / 2), strict=True)
        )
        shift[:, :, 0] -= value[0] * y[:, None] + value[1] * x[None, :] + value[2]
        shift[:, :, 1] -= value[0] * x[None, :] - value[1] * y[:, None]
        return shift, sigma, np.stack(np.meshgrid(y, x, indexing="ij"), axis=2)


def _field_excess(shift: FloatArray, sigma: FloatArray) -> float:
    """Rms of block shifts beyond their standard errors, px."""
    good = np.isfinite(shift) & np.isfinite(sigma)
    if not good.any():
        return float("nan")
    return float(np.sqrt(max(0.0, float(np.mean(shift[good] ** 2 - sigma[good] ** 2)))))


def _width(placed: F32, inside: F32, pixel: float) -> float:
    """Return the standard deviation of the absorbance along the rotation axis, common-grid px."""
    profile = (placed * inside).sum(axis=(0, 2), dtype=np.float64)
    total = profile.sum()
    if total <= 0:
        return float("nan")
    y = np.arange(len(profile)) * pixel
    middle = float(profile @ y / total)
    return float(np.sqrt(max(0.0, float(profile @ (y - middle) ** 2 / total))))


def _recorded(
    alignment: Alignment, shape: tuple[int, ...], middle: float, bin: int, frame_shape: tuple[int, ...], margin: float
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return the rows (n, y) and columns (n, x) recorded, `margin` px of the frame and more from its border."""
    _, rows, columns = shape
    height, width = frame_shape
    y = alignment.magnification * bin * (np.arange(rows) - middle)[None, :] + alignment.shift[:, :1]
    x = alignment.magnification * bin * (np.arange(columns) - (columns - 1) / 2)[None, :] + alignment.shift[:, 1:]
    return np.abs(y) <= (height - 1) / 2 - margin, np.abs(x) <= (width - 1) / 2 - margin
