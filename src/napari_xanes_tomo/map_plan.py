"""Which components the maps need: the plan of a run's maps, from its energies and the particle's mean spectrum.

Everything that is asked of a voxel's spectrum is linear in absorbance up to the last step, so that only a few weighted
sums over the energies - the components - have to be reconstructed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .edges import (
    ReferenceSpectrum,
    bracketed_elements,
    edge_energy_ev,
    scanned_element,
    why_not_scanned,
)
from .element_fit import (
    ScannedEdgeFit,
    fit_columns,
    scanned_edge_fit,
    systematic_terms,
    unknown_steps,
    white_lines_of,
)
from .mixtures import LinearCombination, linear_combination
from .model import FloatArray
from .recipe import MapsParameters
from .reconstruction import WINDOW_SIGMA
from .spectra import (
    MEASURES,
    POST_EV,
    PRE_EV,
    EdgeMeasures,
    EdgeShift,
    Normalisation,
    edge_at_half,
    edge_measures,
    edge_shift,
    normalisation,
)

__all__ = [
    "ARTEFACT",
    "ARTEFACT_SIGMA",
    "EDGE",
    "FLAG",
    "SIGMA",
    "SIGMA_ALIGNMENT",
    "SINGLE",
    "MapPlan",
    "plan_maps",
]

F32 = npt.NDArray[np.float32]
PIXEL_SIZE_ERROR = 0.012  # relative, one standard deviation
EDGE = ("shift", "level")  # the components of the edge energy
SINGLE = "@"  # begins the name of a component that is one energy
SIGMA = "_sigma"  # total standard error of a map
ARTEFACT = "edge_energy_artefact"  # what displaced energies make of the edge energy
FLAG = "artefact"  # 1 where that is more than ARTEFACT_SIGMA standard errors
# Voxels that displaced energies change by less than 1 sigma are to be left alone, those that they change by more than 2
# found.
ARTEFACT_SIGMA = 1.25
SIGMA_ALIGNMENT = "_sigma_alignment"  # the part of it that comes from jitter correction and registration


@dataclass(frozen=True)
class MapPlan:
    """Which components are reconstructed, how they combine, and why some maps are missing.

    Attributes
    ----------
    energies_ev : (energies,) array
    spectrum : (energies,) array
        Mean linear attenuation of the particle, 1/cm.
    components : dict of str to (energies,) array
        Weights on the linear attenuation in 1/cm: ``Mn, Co, Ni`` give g/cm3, ``shape`` the mean of all
        energies that shows the particle with the least noise, ``shift`` and ``level`` the two parts of the edge shift.
    elements : tuple of str
    left_out_ev : tuple of float
        Energies with no part in the element fit.
    edge : EdgeShift or None
    edge_jump : float
        Of the mean spectrum, 1/cm.
    edge_half_ev : float
        E(0.5) of the normalised mean spectrum, eV; NaN where no energy lies on either side of it.
    shape_level : float
        Mean of the component ``shape`` in the particle, 1/cm.
    reference_ev : float
        Energy of the common grid.
    absent : dict of str to str
        Maps that cannot be made, with the reason.
    areal : bool
        Of images: ``spectrum`` is absorbance, the elements are mg/cm2.
    measures : EdgeMeasures or None
        What the measures of `measured` are taken with.
    measured : tuple of str
        Measures that are not linear: the energies in `single` are reconstructed one by one for them, as the components
        ``@0, @1, ...`` (the numbers of the energies).
    noise : (energies,) array
        Relative noise variance of a voxel at every energy.
    normalisation, regression : str
        Windows of the lines of the mean spectrum, and of the edge shift, for metadata.
    references : tuple of ReferenceSpectrum
    white_lines : dict of str to (float, float)
        White-line factors that were taken from the mean spectrum, and their standard errors.
    white_lines_seen : dict of str to (float, float)
        Those that the mean spectrum shows, taken or not.
    helped : ScannedEdgeFit or None
        Weights of the elements that use the energies left out as well; None where those are too few, or not wanted.
    displacement : (energies, 4) array or None
        What energies were found to be displaced by after their registration, y, z, x and rotation centre, px of the
        reference; 0 for those that are not. None where that was not looked for. Nothing is corrected: see `ARTEFACT`.
    mixture : LinearCombination or None
        Its amounts are the components ``lcf_<name of the reference>``.
    systematic : dict of str to dict of str to float
        Relative systematic errors of amounts and fractions, see `element_fit.systematic_terms`.
    notes : tuple of str
        What the user has to know of the fit of the elements.
    """

    energies_ev: FloatArray
    spectrum: FloatArray
    components: Mapping[str, FloatArray]
    elements: tuple[str, ...]
    left_out_ev: tuple[float, ...]
    edge: EdgeShift | None
    edge_jump: float
    edge_half_ev: float
    shape_level: float
    reference_ev: float
    absent: Mapping[str, str] = field(default_factory=dict)
    areal: bool = False
    measures: EdgeMeasures | None = None
    measured: tuple[str, ...] = ()
    mixture: LinearCombination | None = None
    noise: FloatArray = field(default_factory=lambda: np.zeros(0))
    normalisation: str = ""
    regression: str = ""
    references: tuple[ReferenceSpectrum, ...] = ()
    white_lines: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    white_lines_seen: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    helped: ScannedEdgeFit | None = None
    displacement: FloatArray | None = None
    systematic: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def with_scanned_edge(self, slope: Mapping[str, float], *, kept: float = 1.0, spread: float = 0.0) -> MapPlan:
        """Return the same with the elements of `slope` from all energies: `helped`, less what follows the edge.

        Parameters
        ----------
        slope : dict of str to float
            What the amounts gain when the component ``shift`` grows by one; see `map_checks.follow_edge`.
        kept, spread : float
            Part of the measured width that counts, and how much the width varies, eV2; see `map_checks.edge_width`.
        """
        if self.helped is None:
            return self
        weights = self.helped.weights(kept)
        better = {e: weights[e] - v * self.components["shift"] for e, v in slope.items()}
        amounts = {e: float(self.components[e] @ self.spectrum) for e in better}
        terms = self.helped.error(amounts, kept, spread) if min(amounts.values(), default=0.0) > 0 else {}
        systematic = {
            name: {**old, **({"edge_width": round(terms[name], 4)} if name in terms else {})}
            for name, old in self.systematic.items()
        }
        return replace(self, components={**self.components, **better}, systematic=systematic)

    def weighted(self, factor: FloatArray) -> MapPlan:
        """Return the plan for line integrals that still have to be multiplied by `factor` (energies,)."""
        helped = None if self.helped is None else self.helped.weighted(factor)
        return replace(self, components={n: w * factor for n, w in self.components.items()}, helped=helped)

    def without_single(self) -> MapPlan:
        """Return the same without the measures that need single energies."""
        kept = {n: self.components[n] for n in self.linear}
        return replace(self, components=kept, measured=(), measures=None)

    @property
    def reference_keys(self) -> tuple[str, ...]:
        """Identify the reference spectra by what they hold, so that maps of others are not taken for these."""
        return tuple(
            hashlib.sha256(r.energy_ev.tobytes() + r.absorption.tobytes()).hexdigest()[:16] for r in self.references
        )

    @property
    def linear(self) -> tuple[str, ...]:
        """Names of the components that become volumes."""
        return tuple(n for n in self.components if not n.startswith(SINGLE))

    @property
    def single(self) -> tuple[int, ...]:
        """Numbers of the energies that are reconstructed one by one."""
        return tuple(int(n.removeprefix(SINGLE)) for n in self.components if n.startswith(SINGLE))

    @property
    def amounts(self) -> tuple[str, ...]:
        """Names of the components that hold the amounts of the references."""
        return () if self.mixture is None else tuple(f"lcf_{n}" for n in self.mixture.names)

    @property
    def noise_over_jump(self) -> float:
        """Noise of one energy over the edge jump, in units of the standard error of the edge jump over the jump."""
        if self.edge is None:
            return float("nan")
        used = self.edge.denominator != 0
        level = float(np.sum(self.edge.denominator[used] ** 2 * self.noise[used]))
        return float(np.sqrt(np.median(self.noise[used]) / level) / self.edge_jump)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the maps that `finish_slab` makes, in order."""
        out: list[str] = [*self.elements]
        if self.elements:
            out += [f"{e}_fraction" for e in self.elements] if len(self.elements) > 1 else []
            out.append("density")
        if self.edge is not None:
            half = ["edge_energy"] if np.isfinite(self.edge_half_ev) else []
            out += ["edge_energy_relative", *half, "edge_jump", *self.measured]
        if self.mixture is not None:
            out += [*self.amounts, *(["valence"] if self.mixture.valences is not None else [])]
        out.append("morphology")
        errors = [f"{n}{end}" for n in out for end in (SIGMA, SIGMA_ALIGNMENT)]
        artefact = (ARTEFACT, FLAG) if self.edge is not None and self.displacement is not None else ()
        return (*out, *errors, *artefact, "mask", "coverage")

    @property
    def inside(self) -> tuple[str, ...]:
        """Names of the maps that say something inside the mask alone."""
        everywhere = (*self.elements, "density", "morphology", "mask", "coverage")
        return tuple(n for n in self.names if n.removesuffix(SIGMA_ALIGNMENT).removesuffix(SIGMA) not in everywhere)

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Pairs of components whose covariance the errors of the maps need."""
        total = ("density",) if self.elements else ()
        edge = ("shift", "level") if self.edge is not None else ()
        single = [(f"{SINGLE}{e}",) for e in self.single]
        groups = [self.elements, total, edge, self.amounts, ("shape",), *single]
        return tuple((a, b) for group in groups for i, a in enumerate(group) for b in group[i:])

    def weights(self, name: str) -> FloatArray:
        """Weights of a component; ``density`` is the sum of the elements."""
        if name == "density":
            return np.asarray(np.sum([self.components[e] for e in self.elements], axis=0))
        return self.components[name]

    def about(self, name: str, parameters: MapsParameters, blur_px: float, bin: int = 1) -> dict[str, Any]:
        """Return what a reader of the map `name` must know: its point spread, and its systematic errors as numbers.

        `blur_px` is the blur of the recorded frames (point spread and pixel), px of the reference.
        """
        if name in ("mask", "coverage", ARTEFACT, FLAG) or name.endswith((SIGMA, SIGMA_ALIGNMENT)):
            return {}
        amount = name in self.elements or name in ("density", "morphology")
        smoothing = parameters.smoothing_voxel * (parameters.shape_smoothing if amount else 1.0)
        blur = np.linalg.norm([blur_px / bin, smoothing, WINDOW_SIGMA[parameters.filter]])
        out: dict[str, Any] = {"psf_sigma_voxel": round(float(blur), 4)}
        if name in self.systematic:
            # An amount per area or a fraction knows no pixel size.
            size = {"pixel_size": PIXEL_SIZE_ERROR} if amount and not self.areal else {}
            out["systematic_relative"] = {**self.systematic[name], **size}
        if name in self.measured and self.measures is not None:
            out["normalisation"] = self.measures.description
        elif name in ("edge_energy", "edge_jump") and self.edge is not None:
            out["normalisation"] = "the mean spectrum's: " + self.normalisation
        elif name == "edge_energy_relative":
            out["normalisation"] = (
                f"none: regression on the mean spectrum, its derivative, a constant and a slope, {self.regression}"
            )
        elif self.mixture is not None and name in (*self.amounts, "valence"):
            out["normalisation"] = "references: " + self.normalisation
            out["references"] = dict(zip(self.mixture.names, self.mixture.valences or self.mixture.names, strict=True))
            out["misfit_of_the_mean"] = self.mixture.misfit
        return out

    def unit(self, name: str) -> str:
        """Return the unit of the map `name`."""
        name = name.removesuffix(SIGMA_ALIGNMENT).removesuffix(SIGMA)
        if name in self.elements or name == "density":
            return "mg/cm2" if self.areal else "g/cm3"
        if name in MEASURES:
            return MEASURES[name][0]
        per = "" if self.areal else "1/cm"
        units = {"edge_energy_relative": "eV", ARTEFACT: "eV", "edge_energy": "eV", "edge_jump": per, "morphology": per}
        return units.get(name, "")


def plan_maps(
    energies_ev: npt.ArrayLike,
    spectrum: npt.ArrayLike,
    variance: npt.ArrayLike,
    reference: int,
    parameters: MapsParameters | None = None,
    *,
    areal: bool = False,
    references: Sequence[ReferenceSpectrum] = (),
) -> MapPlan:
    """Decide what can be mapped, and the weights of every component.

    Parameters
    ----------
    energies_ev : (energies,) array
    spectrum : (energies,) array
        Mean linear attenuation of the particle, 1/cm.
    variance : (energies,) array
        Relative noise variance of a voxel at every energy.
    reference : int
        Number of the reference energy.
    parameters : MapsParameters, optional
    areal : bool
        Of images: `spectrum` is absorbance, and the elements come as mg/cm2.
    references : sequence of ReferenceSpectrum
        What the scanned edge is taken apart into.

    Notes
    -----
    The element fit is unconstrained least squares with one weight per energy, on tabulated mass attenuation and a
    remainder that falls with the third power of the energy. Energies from 15 eV below to 60 eV above the scanned
    edge are left out: there the attenuation follows the chemical state, not the table. Where an edge lies between the
    energies that these do not bracket - one that was asked for, the scanned one without its pre-edge, or one that the
    mean spectrum shows (`element_fit.unknown_steps`) - the remainder has a step of its own.
    """
    p = MapsParameters() if parameters is None else parameters
    energy = np.asarray(energies_ev, dtype=float)
    mean = np.asarray(spectrum, dtype=float)
    noise = np.asarray(variance, dtype=float)
    if p.scanned_edge is not None:
        scanned: str | None = p.scanned_edge
        edge_energy_ev(p.scanned_edge)
    else:
        scanned = scanned_element(energy, bracketed_elements(energy))
    elements = _plan_elements(energy, mean, noise, scanned, p, areal)
    edge = _plan_edge(energy, mean, noise, scanned, references, p)
    # All energies together show the particle's shape with the least noise.
    shape = np.maximum(mean, 0.0) / noise
    shape /= shape.sum()
    single = edge.single if edge.measured else ()
    return MapPlan(
        energy,
        mean,
        {
            **elements.components,
            **edge.components,
            "shape": shape,
            **{f"{SINGLE}{k}": np.eye(len(energy))[k] for k in single},
        },
        elements.mapped,
        tuple(float(v) for v in energy[~elements.use]),
        edge.shift,
        edge.jump,
        edge.half_ev,
        float(shape @ mean),
        float(energy[reference]),
        {**elements.absent, **edge.absent},
        areal,
        edge.measures,
        edge.measured,
        edge.mixture,
        noise,
        edge.windows,
        edge.regression,
        tuple(references),
        elements.white_lines,
        elements.white_lines_seen,
        elements.helped if edge.shift is not None else None,
        systematic=elements.systematic,
        notes=elements.notes,
    )


@dataclass
class _Elements:
    """What of the elements can be mapped; see `MapPlan`. `use` are the energies that they are fitted to."""

    use: npt.NDArray[np.bool_]
    mapped: tuple[str, ...] = ()
    components: dict[str, FloatArray] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    white_lines: dict[str, tuple[float, float]] = field(default_factory=dict)
    white_lines_seen: dict[str, tuple[float, float]] = field(default_factory=dict)
    helped: ScannedEdgeFit | None = None
    systematic: dict[str, dict[str, float]] = field(default_factory=dict)


def _plan_elements(
    energy: FloatArray, mean: FloatArray, noise: FloatArray, scanned: str | None, p: MapsParameters, areal: bool
) -> _Elements:
    present = bracketed_elements(energy)
    wanted = present if p.elements is None else tuple(dict.fromkeys(p.elements))
    use = np.ones(len(energy), dtype=bool)
    if scanned is not None:
        e0 = edge_energy_ev(scanned)
        use = (energy < e0 - p.leave_out_below_ev) | (energy > e0 + p.leave_out_above_ev)
    out = _Elements(use)
    kept = bracketed_elements(energy[use])
    # An edge that is there but not bracketed is no map, and yet no part of the others.
    known = np.unique(energy[use])
    there = [edge_energy_ev(e) for e in dict.fromkeys((*present, *wanted)) if e not in kept]
    gaps = {int(np.searchsorted(known, v)): v for v in there}
    good = tuple(e for e in wanted if e in kept)
    for e in wanted:
        if e not in good:
            out.absent[e] = f"the energies do not bracket the K edge of {e} at {edge_energy_ev(e):.0f} eV" + (
                " once the scanned edge is left out" if e == scanned and e in present else ""
            )
    if p.elements is None and not wanted:
        out.absent["elements"] = "no two neighbouring energies bracket a K edge"
    if not good:
        return out
    # Every element whose edge is bracketed takes part in the fit, asked for or not: its edge is in the data.
    between = tuple(v for gap, v in gaps.items() if 0 < gap < len(known))
    unknown = unknown_steps(energy, mean, use, kept, between, p)
    between += tuple(step.edge_ev for step in unknown)
    out.notes = tuple(step.note for step in unknown)
    if use.sum() < len(kept) + len(between) + 1:
        what = f"{len(kept)} elements" + (f", {len(between)} other edges" if between else "") + " and a remainder"
        out.absent |= dict.fromkeys(good, f"{int(use.sum())} energies cannot tell {what} apart")
        return out
    out.white_lines_seen = white_lines_of(energy, mean, use, kept, between, p)
    if p.white_line_from_spectrum:
        out.white_lines = out.white_lines_seen
    factors = {e: out.white_lines.get(e, (p.white_line(e),))[0] for e in kept}
    table = fit_columns(energy, factors, between, p)
    weight = np.where(use, 1.0 / noise, 0.0)
    size = np.sqrt(np.sum(weight[:, None] * table**2, axis=0))
    scaled = table / size
    if not np.linalg.cond(np.sqrt(weight)[:, None] * scaled) < 1e6:
        out.absent |= dict.fromkeys(good, f"these energies do not tell {', '.join(kept)} and a remainder apart")
        return out
    solve = np.linalg.solve(scaled.T @ (weight[:, None] * scaled), scaled.T * weight) / size[:, None]
    if p.scanned_edge_in_elements and scanned in kept and not areal:
        fit = scanned_edge_fit(energy, mean, noise, use, table, kept, scanned, solve @ mean)
        if fit is not None:
            out.helped = replace(fit, free={e: fit.free[e] for e in good}, per_ev2={e: fit.per_ev2[e] for e in good})
    out.mapped = good
    out.components = {e: solve[kept.index(e)] * (1e3 if areal else 1.0) for e in good}
    out.systematic = systematic_terms(energy, mean, weight, factors, out.white_lines_seen, between, good, p)
    return out


@dataclass
class _Edge:
    """What of the scanned edge can be mapped; see `MapPlan`."""

    shift: EdgeShift | None = None
    jump: float = float("nan")
    half_ev: float = float("nan")
    measures: EdgeMeasures | None = None
    measured: tuple[str, ...] = ()
    single: tuple[int, ...] = ()  # energies that the measures need one by one
    mixture: LinearCombination | None = None
    windows: str = ""
    regression: str = ""
    components: dict[str, FloatArray] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def _plan_edge(
    energy: FloatArray,
    mean: FloatArray,
    noise: FloatArray,
    scanned: str | None,
    references: Sequence[ReferenceSpectrum],
    p: MapsParameters,
) -> _Edge:
    out = _Edge()
    mixture_names = [f"lcf_{r.name}" for r in references]
    if references and all(r.valence is not None for r in references):
        mixture_names.append("valence")
    names = ("edge_energy_relative", "edge_energy", "edge_jump", *p.edge_measures, *mixture_names)
    if scanned is None:
        out.absent = dict.fromkeys(names, why_not_scanned(energy))
        return out
    e0 = edge_energy_ev(scanned)
    lines: dict[str, Any] = {"pre_ev": p.pre_edge_ev, "post_ev": p.post_edge_ev}
    out.windows = "straight lines, " + ", ".join(
        f"{w}-edge {e0 + low:g}..{e0 + high:g} eV"
        for w, (low, high) in (("pre", p.pre_edge_ev), ("post", p.post_edge_ev))
    )
    out.regression = f"{e0 + PRE_EV[0]:g}..{e0 + POST_EV[1]:g} eV"
    norm = normalisation(energy, mean, e0, **lines)
    shift = edge_shift(energy, mean, e0, variance=noise)
    if norm is None or shift is None:
        why = f"the energies do not determine the {scanned} edge: " + _lacking(energy - e0, mean, norm, p)
        out.absent = dict.fromkeys(names, why)
        return out
    out.shift, out.jump = shift, norm.jump
    near = np.abs(energy - e0) < 100
    out.half_ev = edge_at_half(energy[near], norm(energy[near], mean[near]))
    if not np.isfinite(out.half_ev):
        out.absent["edge_energy"] = "no two energies near the edge lie on either side of the mean spectrum's E(0.5)"
    out.components = {"shift": shift.numerator, "level": shift.denominator}
    if p.edge_measures:
        x = energy - e0
        single = np.flatnonzero((x >= min(p.pre_edge_ev[0], -30)) & (x <= max(p.post_edge_ev[1], 70)))
        made = edge_measures(energy[single], mean[single], e0, free_slopes=p.free_slopes, **lines)
        out.single, out.measures = tuple(single.tolist()), None if isinstance(made, str) else made
        no = dict.fromkeys(p.edge_measures, made) if isinstance(made, str) else made.absent
        out.absent |= {name: no[name] for name in p.edge_measures if name in no}
        out.measured = tuple(name for name in p.edge_measures if name not in no)
    if references:
        mixed = linear_combination(
            energy, mean, e0, references, variance=noise, offset_ev=p.energy_offset_ev or 0.0, **lines
        )
        if isinstance(mixed, str):
            out.absent |= dict.fromkeys(mixture_names, mixed)
        else:
            out.mixture = mixed
            out.components |= dict(zip(mixture_names, mixed.weights, strict=False))
    return out


def _lacking(x: FloatArray, mean: FloatArray, norm: Normalisation | None, p: MapsParameters) -> str:
    """Say what keeps the energies, `x` eV from the edge, from determining it."""
    for name, (low, high) in (("below", p.pre_edge_ev), ("above", p.post_edge_ev)):
        if not np.any((x >= low) & (x <= high)):
            return f"there is none {name} it, {low:+g} to {high:+g} eV from it"
    if not np.isfinite(mean).all():
        return "the mean spectrum is no number at some"
    if norm is None:
        return "the mean spectrum does not rise there"
    count = len(np.unique(x[(x >= PRE_EV[0]) & (x <= POST_EV[1])]))
    return f"{count} from {PRE_EV[0]:+g} to {POST_EV[1]:+g} eV do not tell a shift from the slope and the level"
