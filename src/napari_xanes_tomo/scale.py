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

__all__ = ["ScaleReport", "Trend", "magnification_laws", "scale_report", "trend"]

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
    mass_with_time : Trend
        Of ln(mass / width^2), for energies of equal contrast only: a particle that shrinks and keeps its mass grows
        denser; NaN without masses.
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
    mass_with_time: Trend
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
    alike: Sequence[int] = (),
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
        Size of the particle on the common grid from its second moment, px, and its mean absorbance over what the
        tabulated attenuation expects.
    alike : sequence of int
        Energies whose masses can be compared.

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
    mass_trend = Trend(float("nan"), float("nan"))
    if width is not None and mass is not None and len(alike) >= 4:
        chosen = np.isin(np.arange(n), alike) & calm
        with np.errstate(invalid="ignore", divide="ignore"):
            density = np.log(np.asarray(mass, dtype=float) / np.asarray(width, dtype=float) ** 2)
        mass_trend = trend(np.where(chosen, density, np.nan), when)
    notes = [
        f"{energies[i]:g} eV: the scale lies {z[i]:+.0f} standard errors ({1e3 * (m[i] / smooth[i] - 1):+.2f}e-3) from "
        "the law of the others: refocused, another sample, or a wrong label"
        for i in outliers
    ]
    if beyond.significant or against.significant:
        shown = beyond if beyond.significant else against
        how = "beyond a straight law" if beyond.significant else "against the calibration"
        notes.append(
            f"the particle's scale changes by {100 * shown.total:+.2f} +- {100 * shown.sigma:.2f} % with time {how}; "
            "energy and time run together, so that shrinkage and magnification cannot be told apart by it"
        )
    return ScaleReport(
        expected, residual, np.asarray(smooth), order, z, outliers, beyond, against, mass_trend, tuple(notes)
    )
