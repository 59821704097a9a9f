"""The scale of the particle from energy to energy: what was measured, beside what the instrument should give.

What registration measures is the size of the particle's image. It changes with the magnification of the microscope
and, should the particle shrink in the beam, with the particle; a script whose energies only ascend cannot tell the
two apart by itself. The laws are for plots and flags: the measured scale is what is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .model import FloatArray, XanesTomoError

__all__ = ["MassScale", "ScaleReport", "Trend", "magnification_laws", "mass_against_scale", "scale_report", "trend"]

_XRAY_MAGNIFICATION = 81.0  # of the reference energy: a camera pixel of 1.35 um over one of 16.7 nm in the object
_OUTLIER = 5.0  # studentised residuals beyond it are flagged
_SCATTER = 1e-4  # scatter of the scale that is always allowed for


def magnification_laws(
    energies_ev: npt.ArrayLike,
    reference: int,
    *,
    pixel_nm: npt.ArrayLike | None = None,
    header_nm: npt.ArrayLike | None = None,
    zone_plate_um: npt.ArrayLike | None = None,
) -> dict[str, FloatArray]:
    """Return the magnification (n,) that each law expects, 1 at the reference; laws without their numbers are absent.

    Parameters
    ----------
    energies_ev : (n,) array
        eV.
    reference : int
        Number of the reference energy.
    pixel_nm : (n,) array, optional
        Pixel size by the calibration (affine in the energy at SSRL 6-2c), nm; gives ``calibration``.
    header_nm : (n,) array, optional
        Pixel size the headers say, nm; gives ``header``.
    zone_plate_um : (n,) array, optional
        Position of the zone plate along the beam, um; gives ``thin lens``. The focal length, proportional to the
        energy, follows from how far the zone plate is moved for it; sample and detector stay where they are.

    Notes
    -----
    ``proportional``: the pixel size is proportional to the energy, as for a zone plate far from the detector.
    """
    energies = np.asarray(energies_ev, dtype=float)
    out: dict[str, FloatArray] = {"proportional": energies[reference] / energies}
    for name, sizes in (("calibration", pixel_nm), ("header", header_nm)):
        if sizes is not None:
            p = np.asarray(sizes, dtype=float)
            if np.isfinite(p).all() and np.all(p > 0):
                out[name] = p[reference] / p
    if zone_plate_um is not None:
        z = np.asarray(zone_plate_um, dtype=float)
        if np.isfinite(z).all() and np.ptp(z) > 0 and np.ptp(energies) > 0:
            away = abs(float(np.polyfit(energies, z, 1)[0])) * energies[reference]  # from the sample, um
            u = away + (z - z[reference]) * np.sign(np.polyfit(energies, z, 1)[0])
            total = away * (1 + _XRAY_MAGNIFICATION)
            if np.all(u > 0) and np.all(u < total):
                out["thin lens"] = away * (total - u) / (u * (total - away))
    return out


@dataclass(frozen=True)
class Trend:
    """A straight line through something measured against time.

    Attributes
    ----------
    total : float
        Change from the first to the last time.
    sigma : float
        Its standard error.
    """

    total: float
    sigma: float

    @property
    def significant(self) -> bool:
        """Whether it is more than four standard errors."""
        return bool(abs(self.total) > 4 * self.sigma)


def trend(
    values: npt.ArrayLike,
    time: npt.ArrayLike,
    *,
    others: Sequence[npt.ArrayLike] = (),
    sigma: npt.ArrayLike | None = None,
) -> Trend:
    """Fit ``values = level + total * time`` (and `others`), time running from 0 to 1; robust against outliers.

    Parameters
    ----------
    values, time : (n,) arrays
        NaN where there is nothing.
    others : sequence of (n,) arrays
        What else `values` may depend on.
    sigma : (n,) array, optional
        Standard errors of the values; what they scatter by is counted besides.
    """
    v, t = np.asarray(values, dtype=float), np.asarray(time, dtype=float)
    error = np.zeros_like(v) if sigma is None else np.asarray(sigma, dtype=float)
    good = np.isfinite(v) & np.isfinite(t) & np.isfinite(error)
    columns = [np.ones(good.sum()), t[good], *(np.asarray(o, dtype=float)[good] for o in others)]
    if good.sum() <= len(columns) or np.ptp(t[good]) == 0:
        return Trend(float("nan"), float("nan"))
    columns[1] = (columns[1] - t[good].min()) / np.ptp(t[good])
    columns[2:] = [c - c.mean() for c in columns[2:]]
    fit, covariance, _ = _robust_fit(np.stack(columns, axis=1), v[good], error[good])
    return Trend(float(fit[1]), float(np.sqrt(covariance[1, 1])))


def _robust_fit(design: FloatArray, values: FloatArray, sigma: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Least squares without outliers: the fit, its covariance, and the studentised residual of every value.

    The residual of a value is judged by a fit that it has no part in, and by the scatter of the others: a far point
    that pulls the fit towards itself does not hide that way. The worst is taken out until none stands out.
    """
    n, k = design.shape
    size = np.maximum(np.abs(design).max(axis=0), 1e-30)
    a = design / size
    keep = np.ones(n, dtype=bool)
    z = np.zeros(n)
    base = np.maximum(sigma, 0)

    def fitted(use: npt.NDArray[np.bool_]) -> tuple[FloatArray, FloatArray, float]:
        scatter = _SCATTER * 0.1
        for _ in range(6):
            w = 1 / (base[use] ** 2 + scatter**2)
            inverse = np.linalg.pinv(a[use].T @ (w[:, None] * a[use]))
            x = inverse @ (a[use].T @ (w * values[use]))
            dof = max(1, int(use.sum()) - k)
            rest = values[use] - a[use] @ x
            excess = float(np.sum(rest**2)) / dof - float(np.mean(base[use] ** 2))
            scatter = float(np.sqrt(max(excess, (_SCATTER * 0.1) ** 2)))
        return x, inverse, scatter

    while True:
        for i in range(n):
            use = keep.copy()
            use[i] = False
            if use.sum() < k + 1:
                z[i] = 0.0
                continue
            x, inverse, scatter = fitted(use)
            floor = max(scatter, _SCATTER) if values.std() < 1 else scatter
            variance = base[i] ** 2 + floor**2 + float(a[i] @ inverse @ a[i]) * (floor / scatter) ** 2
            z[i] = (values[i] - a[i] @ x) / np.sqrt(variance)
        if keep.sum() <= max(k + 2, 0.7 * n):
            break
        worst = int(np.argmax(np.where(keep, np.abs(z), 0)))
        if abs(z[worst]) <= _OUTLIER:
            break
        keep[worst] = False
    x, inverse, _ = fitted(keep)
    return x / size, inverse / size[:, None] / size, z


@dataclass(frozen=True)
class MassScale:
    """Mass (m0) and width (m2) of the particle, as they are with the pixel size of the calibration.

    A magnification that the calibration does not know changes the width in proportion, and the mass with its square: it
    makes the same absorbance cover another area. A particle that changes its size and keeps its mass changes the width
    alone.

    Attributes
    ----------
    size, width, mass : (n,) arrays
        Relative to the reference: the registered scale over the calibration, - 1; the standard deviation of the
        absorbance along the axis, against the median energy; the absorbance summed over the particle over what the
        tables expect. NaN where unknown.
    power, sigma : float
        ``mass ~ size^power``, what the elements' amounts explain taken out: 2 is the instrument, 0 the particle. NaN
        with too few energies away from edges.
    """

    size: FloatArray
    width: FloatArray
    mass: FloatArray
    power: float
    sigma: float

    def text(self) -> str:
        """Return the outcome in one line."""
        if not np.isfinite(self.power):
            return "Mass against width: too few energies away from the edges to tell."
        said = f"Mass changes with the scale to the power of {self.power:.1f} +- {self.sigma:.1f}"
        near = [abs(self.power - p) <= 2 * self.sigma for p in (0.0, 2.0)]
        means = {
            (True, True): "which tells neither",
            (False, True): "as for the instrument",
            (True, False): "as for a particle that changes its size and keeps its mass",
            (False, False): "which is neither: mass is gained or lost, or a white line is not in the table",
        }[near[0], near[1]]
        return f"{said} (2: the instrument, 0: the particle), {means}."


def mass_against_scale(
    magnification: npt.ArrayLike,
    law: npt.ArrayLike,
    mass: npt.ArrayLike,
    width: npt.ArrayLike,
    parts: npt.ArrayLike,
    reference: int,
) -> MassScale:
    """Compare how mass and width of the particle depart from the calibration.

    Parameters
    ----------
    magnification, law : (n,) arrays
        Measured, and by the calibration.
    mass, width : (n,) arrays
        Mean absorbance over the same area of the common grid, and standard deviation along the axis, common-grid px.
    parts : (n, k) array
        Absorbance by the tables, in parts whose amounts are free, see `contrast.take_apart`; NaN near edges.
    reference : int
    """
    m, calibrated, seen, wide, table = (np.asarray(a, dtype=float) for a in (magnification, law, mass, width, parts))
    ratio = m / calibrated
    known = np.isfinite(wide)
    width_change = wide * ratio / np.median(wide[known] * ratio[known]) - 1 if known.any() else np.full(len(m), np.nan)
    whole = seen * ratio**2
    use = np.isfinite(whole) & np.isfinite(table).all(axis=1) & (seen > 0)
    mass_change = np.full(len(m), np.nan)
    power, sigma = float("nan"), float("nan")
    used = table[:, (np.nan_to_num(table) > 0).any(axis=0)] if table.size else table.reshape(len(m), 0)
    free = int(use.sum()) - used.shape[1] - 1
    if used.shape[1] and free >= 1:
        expected = used.sum(axis=1)
        with np.errstate(invalid="ignore"):
            mass_change = whole / expected
        middle = mass_change[reference] if use[reference] else np.median(mass_change[use])
        mass_change = mass_change / middle - 1
    if used.shape[1] and free >= 2 and np.ptp(ratio[use]) > 0:
        size = np.abs(used[use] / whole[use, None]).max(axis=0)
        step = float(np.ptp(ratio[use]))
        design = np.column_stack([used[use] / whole[use, None] / size, (ratio[use] - 1) / step])
        solution = np.linalg.lstsq(design, np.ones(use.sum()), rcond=1e-10)[0]
        rest = 1 - design @ solution
        inverse = np.linalg.pinv(design.T @ design, rcond=1e-12, hermitian=True)
        power = float(solution[-1]) / step
        sigma = float(np.sqrt(max(np.sum(rest**2) / free, 1e-12) * inverse[-1, -1])) / step
    return MassScale(ratio - 1, width_change, mass_change, power, sigma)


@dataclass(frozen=True)
class ScaleReport:
    """The measured scale beside the laws.

    Attributes
    ----------
    laws : dict of str to (n,) array
        Magnification by each law, see `magnification_laws`.
    residual : dict of str to (n,) array
        ``measured / law - 1``.
    smooth : (n,) array
        The smooth law that fits the measured scales best: the pixel size affine in the energy, or quadratic where the
        scales demand it.
    order : int
        1 or 2: of that law.
    z : (n,) array
        How far every energy lies from the smooth law through the others, in standard errors.
    outliers : tuple of int
        Energies whose scale does not follow: a refocused zone plate, another sample, labels exchanged.
    with_time : Trend
        Of the scale, beyond an affine law, over the time of acquisition: what shrinkage would look like.
    against_calibration : Trend
        Of ``measured / calibration - 1`` over the time of acquisition.
    moments : MassScale or None
        Mass against width; None without masses or without a calibration.
    notes : tuple of str
        What the user should know, in words.
    """

    laws: Mapping[str, FloatArray]
    residual: Mapping[str, FloatArray]
    smooth: FloatArray
    order: int
    z: FloatArray
    outliers: tuple[int, ...]
    with_time: Trend
    against_calibration: Trend
    moments: MassScale | None
    notes: tuple[str, ...]


def scale_report(
    energies_ev: npt.ArrayLike,
    magnification: npt.ArrayLike,
    sigma: npt.ArrayLike,
    reference: int,
    *,
    laws: Mapping[str, FloatArray] | None = None,
    time: npt.ArrayLike | None = None,
    width: npt.ArrayLike | None = None,
    mass: npt.ArrayLike | None = None,
    parts: npt.ArrayLike | None = None,
) -> ScaleReport:
    """Compare the measured scales with the laws, with each other and with time.

    Parameters
    ----------
    energies_ev, magnification, sigma : (n,) arrays
        eV; measured scale, 1 at the reference, and its standard error; NaN where there is none.
    reference : int
        Number of the reference energy.
    laws : dict, optional
        Of `magnification_laws`.
    time : (n,) array, optional
        When each energy was measured, any unit; their order unless given.
    width, mass : (n,) arrays, optional
        Size of the particle on the common grid from its second moment, px, and its mean absorbance.
    parts : (n, k) array, optional
        Of `mass_against_scale`.

    Raises
    ------
    XanesTomoError
        The arrays do not belong together.
    """
    energies, m, error = (np.asarray(a, dtype=float) for a in (energies_ev, magnification, sigma))
    n = len(energies)
    if m.shape != (n,) or error.shape != (n,) or not 0 <= reference < n:
        raise XanesTomoError(f"scale: expected one magnification and error for each of {n} energies")
    when = np.arange(n, dtype=float) if time is None else np.asarray(time, dtype=float)
    when = np.where(np.isfinite(when), when, np.arange(n)) if np.isfinite(when).any() else np.arange(n, dtype=float)
    expected = dict(laws or magnification_laws(energies, reference))
    residual = {name: m / law - 1 for name, law in expected.items()}
    good = np.isfinite(m) & np.isfinite(error) & (m > 0)
    smooth, z, order = np.full(n, np.nan), np.full(n, np.nan), 1
    outliers: tuple[int, ...] = ()
    if good.sum() >= 4:
        # 1 / M is the pixel size over that of the reference: affine in the energy at a zone-plate microscope.
        x = (energies - energies[reference]) / 1000
        y, s = 1 / m[good], error[good] / m[good] ** 2
        fits = []
        for degree in (1, 2):
            design = np.stack([x[good] ** d for d in range(degree + 1)], axis=1)
            if degree == 2 and good.sum() < 8:
                break
            fit, _, score = _robust_fit(design, y, s)
            rest = y - design @ fit
            calm = np.abs(score) <= _OUTLIER
            spread = float(np.sqrt(np.sum(rest[calm] ** 2) / max(1, calm.sum() - degree - 1)))
            fits.append((spread, fit, score, degree, int(calm.sum())))
        best = fits[0]
        # A bend has to pay for itself, in the scatter it removes or in the energies it brings back.
        allowed = max(1, n // 10)
        if len(fits) > 1 and (
            (fits[1][0] < 0.7 * fits[0][0] and fits[1][4] >= fits[0][4] - allowed) or fits[1][4] > fits[0][4] + allowed
        ):
            best = fits[1]
        _, fit, score, order, _ = best
        smooth = 1 / sum(c * x**d for d, c in enumerate(fit))
        z[good] = -score
        outliers = tuple(int(i) for i in np.flatnonzero(np.abs(z) > _OUTLIER))
    calm = good & ~np.isin(np.arange(n), outliers)
    beyond = trend(np.where(calm, 1 / m, np.nan), when, others=[energies], sigma=np.where(calm, error / m**2, np.nan))
    # A larger pixel ratio 1 / M is a smaller image: a particle that shrinks has a negative trend of M.
    beyond = Trend(-beyond.total, beyond.sigma)
    calibration = residual.get("calibration")
    against = (
        trend(np.where(calm, calibration, np.nan), when, sigma=np.where(calm, error / m, np.nan))
        if calibration is not None
        else Trend(float("nan"), float("nan"))
    )
    moments = None
    if width is not None and mass is not None and parts is not None and "calibration" in expected:
        moments = mass_against_scale(m, expected["calibration"], mass, width, parts, reference)
    notes = [
        f"{energies[i]:g} eV: the scale lies {z[i]:+.0f} standard errors ({1e3 * (m[i] / smooth[i] - 1):+.2f}e-3) from "
        "the law of the others: refocused, another sample, or a wrong label"
        for i in outliers
    ]
    if beyond.significant or against.significant:
        told = "" if moments is None else f". {moments.text()[:-1]}"
        shown = beyond if beyond.significant else against
        how = "beyond a straight law" if beyond.significant else "against the calibration"
        notes.append(
            f"the particle's scale changes by {100 * shown.total:+.2f} +- {100 * shown.sigma:.2f} % with time {how}; "
            f"energy and time run together, so that shrinkage and magnification cannot be told apart by it{told}"
        )
    return ScaleReport(
        expected, residual, np.asarray(smooth), order, z, outliers, beyond, against, moments, tuple(notes)
    )
