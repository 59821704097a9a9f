"""The steps of a run: their order and their parameters; the functions of those of a single tomogram.

This is the only place where order is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .absorbance import Normalised, normalise
from .axis import FEWEST_FOR_AXIS, find_axis
from .detector import Detector
from .flats import Beam
from .jitter import FEWEST_ANGLES, find_jitter
from .model import Alignment, EnergyScan, FloatArray, Progress, Quality, Score, XanesTomoError, no_progress
from .parallel import one_blas_thread
from .qc import check_projections, check_scores
from .recipe import Recipe
from .resample import place
from .screening import screen, shows_something
from .stray_light import stray_effect
from .views import tomogram_views

__all__ = [
    "CHECKED",
    "SCREENED",
    "STEPS",
    "Confinement",
    "Step",
    "StepResult",
    "beam_of",
    "estimation_bin",
    "laid_out",
    "quick_look",
    "run_flats",
    "run_jitter",
    "step",
]


# Of aligned projections; see `qc.check_projections`.
CHECKED = (
    "mass_deviation", "profile_shift_px", "moment_deviation_px", "residual_shift_y_px", "residual_shift_x_px",
    "gain_deviation", "background_od", "frc_px",
)  # fmt: skip
# What the first look at every projection says; see `screening.Screening`.
SCREENED = ("doubt", "relative_counts", "relative_mass", "distance", "sharpness")


@dataclass(frozen=True)
class Step:
    """One step of a run.

    Attributes
    ----------
    name, title : str
        For programs and for people.
    per_energy : bool
        Whether every energy has a result of its own.
    upstream : tuple of str
        Steps whose results it uses, of the same energy.
    needs_reference : bool
        Whether it also uses the reference energy's results of those steps.
    parameters : tuple of str
        Sections of the recipe it depends on.
    """

    name: str
    title: str
    per_energy: bool
    upstream: tuple[str, ...]
    needs_reference: bool
    parameters: tuple[str, ...]


STEPS = (
    Step("flats", "Scan and flats", True, (), False, ("scan", "absorbance")),
    Step("jitter", "Jitter correction", True, ("flats",), False, ("jitter",)),
    Step("registration", "Energy registration", True, ("flats", "jitter"), True, ("registration",)),
    Step("maps", "Elemental maps", False, ("registration",), False, ("maps",)),
)


def step(name: str) -> Step:
    """Return the step called `name`."""
    for s in STEPS:
        if s.name == name:
            return s
    raise XanesTomoError(f"step: expected one of {', '.join(s.name for s in STEPS)}, got {name!r}")


@dataclass(frozen=True)
class StepResult:
    """What a step found: arrays over all planned projections (NaN where there is nothing), numbers and scores.

    `views` are pictures to look at, kept beside the journal for the last result of an energy only.
    """

    arrays: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    numbers: Mapping[str, Any] = field(default_factory=dict)
    quality: Quality = field(default_factory=Quality)
    views: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)


def estimation_bin(columns: int) -> int:
    """Return the binning at which displacements are estimated: a power of two that leaves at most 256 columns.

    A tomogram of 180 angles carries no horizontal information that its projections share at finer scales.
    """
    bin = 1
    while columns // bin > 256:
        bin *= 2
    return bin


def laid_out(values: FloatArray, index: npt.NDArray[np.intp], n: int) -> FloatArray:
    """Lay `values` of the used projections out over all n planned ones, NaN elsewhere."""
    out = np.full((n, *np.shape(values)[1:]), np.nan)
    out[index] = values
    return out


@dataclass(frozen=True)
class Confinement:
    """Where an energy is looked at.

    Attributes
    ----------
    boxes : tuple of (y0, y1, x0, x1)
        Of a frame at the reference energy; none is the whole frame.
    scale : float
        Magnification of this energy by the calibration, which scales the boxes about the middle of the frame.
    frame : (int, int) or None
        Shape of the frame they are drawn in; that of this energy's frames unless given.
    mask : (y, x) bool array or None
        Pixels of the camera that are not to be trusted.
    """

    boxes: tuple[tuple[int, int, int, int], ...] = ()
    scale: float = 1.0
    frame: tuple[int, int] | None = None
    mask: npt.NDArray[np.bool_] | None = None

    def reached(self, shape: tuple[int, int], by: float) -> list[tuple[float, float, float, float]]:
        """Return the boxes at this energy, widened by a part of the frame's width: (y0, y1, x0, x1), recorded px."""
        out = []
        for y0, y1, x0, x1 in self.boxes:
            ends: list[float] = []
            drawn = shape if self.frame is None else self.frame
            for low, high, n, own in ((y0, y1, shape[0], drawn[0]), (x0, x1, shape[1], drawn[1])):
                ends.append(max(0.0, n / 2 + self.scale * (low - own / 2) - by * shape[1]))
                ends.append(min(float(n), n / 2 + self.scale * (high - own / 2) + by * shape[1]))
            out.append((ends[0], ends[1], ends[2], ends[3]))
        return out

    def apply(self, data: Normalised) -> Normalised:
        """Return the absorbance with everything outside the boxes set to air."""
        if not self.boxes:
            return data
        b = data.bin
        inside = np.zeros(data.data.shape[1:], dtype=np.float32)
        # The particle moves by its jitter: the box is widened by a tenth of the frame.
        for y0, y1, x0, x1 in self.reached(data.frame_shape, 0.1):
            inside[int(y0 / b) : int(np.ceil(y1 / b)), int(x0 / b) : int(np.ceil(x1 / b))] = 1
        return replace(data, data=data.data * inside)


@one_blas_thread()
def run_flats(
    scan: EnergyScan,
    recipe: Recipe,
    within: Confinement | None = None,
    *,
    number: int = 0,
    around: Mapping[int, EnergyScan] | None = None,
    use: str | None = None,
    progress: Progress = no_progress,
) -> tuple[StepResult, Normalised]:
    """Normalise one energy by its flats and fit the air.

    Parameters
    ----------
    scan : EnergyScan
    recipe : Recipe
    within : Confinement, optional
    number : int
        Number of this energy.
    around : mapping of int to EnergyScan, optional
        The other energies, for policies that use their flats.
    use : str, optional
        Flats chosen by hand for this energy.
    progress : callable
        See `Progress`.

    Returns
    -------
    StepResult
        Arrays ``air`` (n, 3 or 6), ``air_residual``, ``variance`` (n,), and the beam as numbers: see `beam_of`.
    Normalised
    """
    bin = estimation_bin(scan.frames.frame_shape[1])
    within = within or Confinement()
    whole = normalise(
        scan, recipe.absorbance, bin=bin, mask=within.mask, number=number, around=around, use=use,
        boxes=within.reached(scan.frames.frame_shape, 0.1), progress=progress,
    )  # fmt: skip
    found = within.apply(whole)
    assert found.beam is not None
    n = len(scan)
    beam, detector = found.beam, found.beam.detector
    residual = float(np.nanmedian(found.air_residual)) if np.isfinite(found.air_residual).any() else float("nan")
    without = float(np.mean(~np.isfinite(found.air_residual))) if recipe.absorbance.remove_air else 0.0
    screened = screen(found.data, counts=found.seen)
    mass = found.data.sum(axis=(1, 2), dtype=np.float64)
    if len(screened.reasons) < len(mass):
        mass = np.delete(mass, list(screened.reasons))
    spread = float(np.std(mass) / np.mean(mass)) if np.mean(mass) > 0 else float("inf")
    height, width = scan.frames.frame_shape
    masked = float(beam.bad[:, 1].sum() / (height * width))
    scores = (
        Score("air residual", residual, "OD", 0.02),
        Score("projections without air to fit", without, "", 0.1),
        Score("scatter of the mass", spread, "", 0.05),
        Score("gain", detector.gain, "counts/quantum"),
        Score("read noise", float(np.sqrt(detector.read_variance)), "counts"),
        Score("masked pixels", masked, ""),
        Score("bad projections", len(screened.reasons), "", max(1.0, 0.05 * len(found.index))),
    )
    arrays = {
        "air": laid_out(found.air, found.index, n),
        "air_residual": laid_out(found.air_residual, found.index, n),
        "variance": laid_out(found.variance, found.index, n),
        "beam_shots": beam.shots,
        "beam_mixing": beam.mixing,
        "beam_weights": beam.weights,
        "stray": beam.stray,
        "shot_stray": beam.shot_stray,
        "bad_pixels": beam.bad,
        "doubt": laid_out(screened.doubt, found.index, n),
        **{f"relative_{name}": laid_out(screened.scores[name], found.index, n) for name in ("counts", "mass")},
        "distance": laid_out(screened.scores["distance"], found.index, n),
        "sharpness": laid_out(screened.scores["sharpness"], found.index, n),
    }
    constant, fraction, level, without_stray = stray_effect(found, scan)
    numbers = {
        "gain": detector.gain,
        "read_variance": detector.read_variance,
        "noise_source": detector.source,
        "bin": bin,
        "beam_origins": [list(o) for o in beam.origins],
        "flats": list(found.use),
        "bad": [[int(found.index[i]), why] for i, why in screened.reasons.items()],
        "flat_candidates": {k: list(v) for k, v in found.candidates.items()},
        "stray_constant": constant,
        "stray_fraction": fraction,
        "object_od": level,
        "object_od_with_stray": without_stray,
        "masked": masked,
    }
    return StepResult(arrays, numbers, Quality(scores, found.notes)), found


def beam_of(flats: StepResult, scans: Mapping[int, EnergyScan]) -> Beam | None:
    """Return the beam that a result of the flats step holds; None for one that was made before there was any."""
    if "beam_mixing" not in flats.arrays:
        return None
    origins = tuple((int(e), int(k)) for e, k in flats.numbers["beam_origins"])
    arrays = flats.arrays
    return Beam(
        tuple(scans[e].flats[k] for e, k in origins),
        origins,
        np.asarray(arrays["beam_shots"], dtype=np.intp),
        np.asarray(arrays["beam_mixing"], dtype=float),
        np.asarray(arrays["beam_weights"], dtype=float),
        np.asarray(arrays["stray"], dtype=float),
        np.asarray(arrays["shot_stray"], dtype=float),
        np.asarray(arrays["bad_pixels"], dtype=np.int32).reshape(-1, 2),
        Detector(float(flats.numbers["gain"]), float(flats.numbers["read_variance"])),
    )


@one_blas_thread()
def renormalise(
    scan: EnergyScan,
    recipe: Recipe,
    flats: StepResult,
    within: Confinement | None = None,
    *,
    number: int = 0,
    around: Mapping[int, EnergyScan] | None = None,
    progress: Progress = no_progress,
) -> Normalised:
    """Read one energy again with the flats and the air that were found."""
    within = within or Confinement()
    beam = beam_of(flats, {**(around or {}), number: scan})
    found = normalise(
        scan, recipe.absorbance, bin=int(flats.numbers["bin"]), air=np.nan_to_num(flats.arrays["air"]),
        mask=within.mask, beam=beam, number=number, around=around, progress=progress,
    )  # fmt: skip
    return within.apply(found)


@one_blas_thread()
def run_jitter(
    scan: EnergyScan,
    recipe: Recipe,
    flats: StepResult,
    data: Normalised,
    *,
    change_points: Sequence[int] = (),
    initial: npt.ArrayLike | None = None,
    progress: Progress = no_progress,
) -> StepResult:
    """Find the jitter of one energy: arrays ``shift, sigma, moments, bound`` (n, 2) raw px, ``residual`` (n,).

    Parameters
    ----------
    scan, recipe, flats, data
    change_points : sequence of int
        Projections before which the sample was moved.
    initial : (all projections, 2) array, optional
        Where to begin, raw px; NaN where it is not known.
    progress : callable
        See `Progress`. When it raises `Cancelled` the best estimate so far comes back, its number ``partial`` true;
        `Cancelled` is passed on when there is none yet.
    """
    n = len(scan)
    dropped = {int(i): str(why) for i, why in flats.numbers.get("bad", ())} if recipe.jitter.screen else {}
    if not shows_something(data.data, flats.arrays["variance"][data.index]):
        raise XanesTomoError(
            f"{scan.energy_ev:g} eV: expected a particle, but the mean of all projections holds nothing beyond their "
            "noise; exclude this energy"
        )
    present = set(data.index.tolist())
    dropped = {**_without_object(data), **{i: why for i, why in dropped.items() if i in present}}
    keep = np.array([i not in dropped for i in data.index.tolist()])
    if keep.sum() >= FEWEST_ANGLES:
        data = replace(data, data=data.data[keep], index=data.index[keep])
    else:
        dropped = {}  # too few are left: let the search say what is wrong
    index = data.index
    theta = np.asarray(scan.theta_deg, dtype=float)[index]
    try:
        found = find_jitter(
            data.data,
            theta,
            variance=flats.arrays["variance"][index],
            initial=_start(initial, index, data),
            parameters=recipe.jitter,
            progress=progress,
        )
    except XanesTomoError as error:
        raise XanesTomoError(f"{scan.energy_ev:g} eV: {error}") from None
    raw = found.alignment.unbinned(data.bin, data.frame_shape)
    moments = Alignment(found.moments, np.zeros_like(found.moments)).unbinned(data.bin, data.frame_shape)
    center = found.center * data.bin + (raw.shift[0, 1] - found.shift[0, 1] * data.bin)
    arrays = {
        "shift": laid_out(raw.shift, index, n),
        "sigma": laid_out(raw.sigma, index, n),
        "moments": laid_out(moments.shift, index, n),
        "residual": laid_out(found.residual, index, n),
        "bound": laid_out(found.bound * data.bin, index, n),
    }
    # The wall of a capillary is no part of the object that the projections share.
    seen = data.data if found.straight is None else data.data - found.straight.frames(data.data.shape[1:], theta)
    # Once it is cancelled nothing more is computed than what the best estimate needs.
    checks = (
        {}
        if found.partial
        else check_projections(seen, theta, found.alignment, variance=flats.arrays["variance"][index])
    )
    scale = {name: data.bin if check.unit == "px" else 1 for name, check in checks.items()}
    arrays.update({name: laid_out(check.values * scale[name], index, n) for name, check in checks.items()})
    numbers = {
        "projections": int(found.used.sum()),
        "limits": {name: float(check.limit) * scale[name] for name, check in checks.items()},
        "left_out": [int(i) for i in index[~found.used]],
        "slips": [[int(index[k]), dy * data.bin, dx * data.bin] for k, dy, dx in found.slips],
        "center": center,
        "center_sigma": found.center_sigma * data.bin,
        "method": found.method,
        "dropped": [[frame, why] for frame, why in sorted(dropped.items())],
        "jumps": _jumps(raw.shift, theta, index, scan, change_points),
    }
    scores = found.quality.scores
    views: dict[str, npt.NDArray[Any]] = {}
    notes = found.quality.notes
    if found.partial:
        numbers["partial"] = True
        scores = (*scores, Score("finished", 0.0, "", 1.0, "higher"))
    else:
        seams = [int(v) for v in np.flatnonzero(np.diff(scan.half) != 0) + 1]
        scores = (*scores, *check_scores(checks, index, seams=seams, width=data.data.shape[2]))
        views = {**tomogram_views(seen, theta, found.alignment), "bin": np.array([data.bin], dtype=np.float32)}
        if len(theta) >= FEWEST_FOR_AXIS:
            axis = find_axis(seen, theta, found.alignment, half=scan.half[index])
            known = [p for p in axis if np.isfinite(p.value)]
            numbers["axis"] = [[p.name, p.value, p.sigma, p.unit, p.significant] for p in known]
            notes = (*notes, *(f"{p.text()}: significant, reported and not applied" for p in known if p.significant))
    quality = Quality(tuple(_raw(s, data.bin) for s in scores), notes)
    return StepResult(arrays, numbers, quality, views)


def _start(initial: npt.ArrayLike | None, index: npt.NDArray[np.intp], data: Normalised) -> FloatArray | None:
    """Return where the search begins, binned px; what is not known lies where its neighbours do."""
    if initial is None:
        return None
    shift = np.asarray(initial, dtype=float)[index]
    known = np.isfinite(shift).all(axis=1)
    if known.sum() < FEWEST_ANGLES:
        return None
    at = np.arange(len(shift))
    shift = np.stack([np.interp(at, at[known], column[known]) for column in shift.T], axis=1)
    return Alignment(shift, np.zeros_like(shift)).binned(data.bin, data.frame_shape).shift


def _raw(score: Score, bin: int) -> Score:
    """Return a score in recorded pixels of one in binned pixels."""
    if score.unit != "px" or bin == 1:
        return score
    threshold = None if score.threshold is None else score.threshold * bin
    return replace(score, value=score.value * bin, threshold=threshold)


def quick_look(
    scan: EnergyScan, recipe: Recipe, *, bin: int = 4, every: int = 3, progress: Progress = no_progress
) -> tuple[Alignment, npt.NDArray[np.intp], npt.NDArray[np.float32], int]:
    """Have a first guess of the jitter of one energy in seconds: to look at, never a result.

    Parameters
    ----------
    scan : EnergyScan
    recipe : Recipe
    bin : int
        Binning; less where fewer than 64 columns would be left.
    every : int
        Only every so many of the usable projections; more where fewer than 24 would be left.
    progress : callable
        See `Progress`.

    Returns
    -------
    Alignment
        Of the projections used, raw px.
    (k,) int array
        Their numbers.
    (k, y, x) array
        Their absorbance, the shifts undone, binned.
    int
        The binning.
    """
    while bin > 1 and scan.frames.frame_shape[1] // bin < 64:
        bin //= 2
    usable = np.flatnonzero(scan.usable)
    every = max(1, min(every, len(usable) // 24))
    left = set(usable.tolist()) - set(usable[::every].tolist())
    part = scan.excluded(dict.fromkeys(left, "not looked at"))
    data = normalise(part, recipe.absorbance, bin=bin, progress=progress)
    bad = screen(data.data, counts=data.seen).reasons
    good = np.array([i not in bad for i in range(len(data.index))])
    theta = np.asarray(scan.theta_deg, dtype=float)[data.index[good]]
    found = find_jitter(
        data.data[good], theta, variance=data.variance[good], parameters=recipe.jitter, progress=progress
    )
    shown = place(data.data[good], found.alignment)
    return found.alignment.unbinned(bin, data.frame_shape), data.index[good], shown, bin


def _without_object(data: Normalised) -> dict[int, str]:
    """Return the projections that do not show the object, with the reason: {number: why}."""
    mass = data.data.sum(axis=(1, 2), dtype=np.float64)
    typical = float(np.nanmedian(mass[np.isfinite(mass)])) if np.isfinite(mass).any() else 0.0
    out = {}
    for frame, m in zip(data.index.tolist(), mass, strict=True):
        if not np.isfinite(m):
            out[frame] = "values that are no numbers"
        elif typical > 0 and not 0.3 * typical < m < 3 * typical:
            out[frame] = "the object is not in it"
    return out


def _jumps(
    shift: FloatArray, theta_deg: FloatArray, index: npt.NDArray[np.intp], scan: EnergyScan, points: Sequence[int]
) -> list[list[float]]:
    """``[frame, dy, dx]`` of the sample's jump where flats were taken and at the points named by hand, raw px.

    Medians of the ten displacements behind and before it, the object's own orbit taken out.
    """
    t = np.deg2rad(theta_deg)
    basis = np.stack([np.cos(t), np.sin(t)], axis=1)
    rest = shift.copy()
    rest[:, 1] -= basis @ np.linalg.lstsq(basis, shift[:, 1], rcond=None)[0]
    seams = np.flatnonzero(np.diff(scan.half) != 0) + 1
    out = []
    for point in sorted({*(int(v) for v in seams), *(int(v) for v in points)}):
        before, behind = index < point, index >= point
        if before.sum() >= 3 and behind.sum() >= 3:
            jump = np.median(rest[behind][:10], axis=0) - np.median(rest[before][-10:], axis=0)
            out.append([float(point), float(jump[0]), float(jump[1])])
    return out


def alignment_of(result: StepResult, scan: EnergyScan) -> Alignment:
    """Return the alignment a result holds, over all planned projections of its energy."""
    dropped = {int(frame): str(why) for frame, why in result.numbers.get("dropped", ())}
    status = tuple(
        s if s != "ok" or np.isfinite(row).all() else f"excluded:{dropped.get(i, 'no shift was found')}"
        for i, (s, row) in enumerate(zip(scan.status, result.arrays["shift"], strict=True))
    )
    return Alignment(
        result.arrays["shift"],
        result.arrays["sigma"],
        float(result.numbers.get("magnification", 1.0)),
        float(result.numbers.get("roll_deg", 0.0)),
        status,
    )


def angle_of(result: StepResult) -> float:
    """Return by how much the angles used for an energy exceed the recorded ones, degrees."""
    return float(result.numbers.get("angle_applied_deg", 0.0))
