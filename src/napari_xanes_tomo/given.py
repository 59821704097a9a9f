"""The steps before the maps for what was aligned elsewhere: given, not done; checked, and said so.

A step that is not needed leaves a result like any other, with the reason in its notes, so that everything behind it
works as ever. The registration is not done again either; what is left of a displacement is measured, judged, and
counted in the errors of the maps.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from .absorbance import Normalised
from .io.given import BEAM
from .model import Alignment, EnergyScan, FloatArray, Progress, Quality, Score, XanesTomoError, no_progress
from .recipe import Recipe
from .registration import reference_energy
from .steps import StepResult, alignment_of, run_flats
from .survey import Survey, survey
from .template import Template, object_mass

__all__ = ["REASONS", "given_flats", "given_jitter", "given_registration", "look_at", "read_given"]

F32 = npt.NDArray[np.float32]
REASONS = {
    "flats": "given: {kind} made elsewhere hold no counts; there are no flats to divide by",
    "jitter": "given: {kind} made elsewhere are taken as aligned; not done again",
    "registration": "given: {kind} made elsewhere are taken as registered; checked, not done again",
}
LIMIT_PX = 0.5


def read_given(scan: EnergyScan, frames: npt.NDArray[np.intp], y0: int, y1: int) -> F32:
    """Read rows of what was aligned elsewhere: absorbance, or attenuation in 1/cm, (frame, row, column)."""
    values = np.asarray(scan.frames.read_rows(frames.tolist(), y0, y1), dtype=np.float32)
    return values if scan.gridded else np.asarray(-np.log(values / np.float32(BEAM)))


def look_at(
    scans: Sequence[EnergyScan],
    reference_ev: float | None,
    smoothings: Sequence[float],
    *,
    leave_out: Container[int] = (),
    progress: Progress = no_progress,
) -> Survey:
    """Look at all energies but those to leave out; see `survey`. Numbers stay those of `scans`, NaN where left out.

    Raises
    ------
    XanesTomoError
        None of them can be read.
    """
    energies = np.array([s.energy_ev for s in scans])
    lost: dict[int, str] = {e: "left out" for e in range(len(scans)) if e in leave_out}
    while True:
        there = [e for e in range(len(scans)) if e not in lost]
        if not there:
            raise XanesTomoError(next(iter(lost.values()), "expected energies, got none"))
        reference = reference_energy(energies[there], reference_ev)
        try:
            found = survey([scans[e] for e in there], reference, read_given, smoothings, progress=progress)
        except XanesTomoError as error:
            lost[there[reference]] = str(error)
            continue
        lost |= {there[k]: why for k, why in found.lost.items()}

        def spread(values: FloatArray, there: list[int] = there) -> FloatArray:
            out = np.full((len(scans), *values.shape[1:]), np.nan)
            out[there] = values
            return out

        return Survey(
            spread(found.mass), spread(found.shift), spread(found.shift_sigma), spread(found.scale),
            spread(found.scale_sigma), spread(found.variance), found.source, lost,
        )  # fmt: skip


def _note(step: str, scan: EnergyScan) -> str:
    return REASONS[step].format(kind=scan.given)


def given_flats(scan: EnergyScan, recipe: Recipe, look: Survey, number: int) -> tuple[StepResult, Normalised | None]:
    """Return what stands for the flats: an even beam with the noise found, nothing for volumes and images."""
    note = (_note("flats", scan), f"noise from {look.source}")
    if scan.gridded:
        empty = {"air": np.zeros((len(scan), 3)), "variance": np.zeros(len(scan))}
        return StepResult(empty, {"given": scan.given, "bin": 1, "bad": []}, Quality((), note)), None
    plain = recipe.absorbance.model_copy(
        update={
            "flats": "own half",
            "flats_at": (),
            "stray_light": "off",
            "mask_bad_pixels": False,
            "remove_air": False,
        }
    )
    found, data = run_flats(scan, recipe.model_copy(update={"absorbance": plain}), number=number)
    assert data.beam is not None
    behind = np.exp(np.clip(data.data, 0, 14)).mean(dtype=np.float64)
    # After the smoothing the samples are independent of the interpolation that was done elsewhere.
    white = float(look.variance[number, 0]) / _passed(1.0)
    gain = max(white, 0.0) * BEAM / float(behind) if np.isfinite(white) else 0.0
    detector = replace(data.beam.detector, gain=gain, read_variance=0.0, source="given")
    data = replace(
        data, beam=replace(data.beam, detector=detector), variance=np.full(len(data.index), white / data.bin**2)
    )
    numbers = {**found.numbers, "gain": gain, "read_variance": 0.0, "noise_source": look.source, "given": scan.given}
    variance = np.full(len(scan), np.nan)
    variance[data.index] = data.variance
    keep = [s for s in found.quality.scores if s.name == "scatter of the mass"]
    arrays = {**found.arrays, "variance": variance}
    return StepResult(arrays, {**numbers, "bad": []}, Quality(tuple(keep), note)), data


def _passed(sigma: float) -> float:
    """Part of white noise that a two-dimensional Gaussian smoothing lets through."""
    x = np.arange(-int(4 * sigma + 0.5), int(4 * sigma + 0.5) + 1)
    k = np.exp(-0.5 * (x / sigma) ** 2)
    return float(np.sum((k / k.sum()) ** 2) ** 2)


def given_jitter(scan: EnergyScan) -> StepResult:
    """Return the displacements of aligned projections: none."""
    n = len(scan)
    zeros, unknown = np.zeros((n, 2)), np.full(n, np.nan)
    arrays = {"shift": zeros, "sigma": zeros, "moments": zeros, "residual": unknown, "bound": np.full((n, 2), np.nan)}
    numbers = {
        "given": scan.given, "limits": {}, "left_out": [], "slips": [], "center": 0.0, "center_sigma": 0.0,
        "method": "given", "dropped": [], "jumps": [],
    }  # fmt: skip
    return StepResult(arrays, numbers, Quality((), (_note("jitter", scan),)))


def given_registration(
    scan: EnergyScan,
    number: int,
    reference: int,
    look: Survey,
    jitter: StepResult,
    data: Normalised | None,
    template: Template | None,
) -> StepResult:
    """Return the registration of one energy as given, with what the check found in its numbers and scores.

    Parameters
    ----------
    scan : EnergyScan
    number, reference : int
        Of this energy and of the reference.
    look : Survey
    jitter : StepResult
    data, template : Normalised and Template, or None
        This energy and the reference's template, of projections.
    """
    n, width = len(scan), scan.frames.frame_shape[1]
    shift, sigma = look.shift[number], look.shift_sigma[number]
    change, change_sigma = float(look.scale[number] - 1), float(look.scale_sigma[number])
    mass = float(look.mass[number])
    level = float(look.mass[reference]) * scan.pixel_size_nm * 1e-7
    variance = float(look.variance[number, 0])
    if data is not None and template is not None:
        mass = object_mass(data.data, np.asarray(scan.theta_deg, dtype=float)[data.index],
                           _part(jitter, scan, data), template)  # fmt: skip
        level = template.level / template.bin
        variance /= _passed(1.0)
    numbers = {
        "given": scan.given,
        "magnification": 1.0,
        "magnification_sigma": float(np.hypot(change, np.nan_to_num(change_sigma))),
        "dropped": [],
        "law": 1.0,
        "translation": [0.0, 0.0, 0.0],
        # What was measured is not undone: it is an error of the place.
        "translation_sigma": [float(v) for v in np.hypot(shift, np.nan_to_num(sigma))],
        "found_shift": [float(v) for v in shift],
        "found_shift_sigma": [float(v) for v in sigma],
        "found_magnification": 1 + change,
        "mass": mass,
        "variance": variance,
        "template_level": level,
    }
    arrays = {"shift": np.zeros((n, 2)), "sigma": np.zeros((n, 2)), "residual": np.full(n, np.nan)}
    notes = (_note("registration", scan),)
    if number == reference:
        return StepResult(arrays, numbers, Quality((), (*notes, "reference")))
    scores = (
        Score("residual shift", float(np.linalg.norm(shift)), "px", LIMIT_PX),
        Score("residual magnification at the rim", abs(change) * width / 2, "px", LIMIT_PX),
    )
    return StepResult(arrays, numbers, Quality(scores, notes))


def _part(jitter: StepResult, scan: EnergyScan, data: Normalised) -> Alignment:
    whole = alignment_of(jitter, scan)
    return replace(whole, shift=whole.shift[data.index], sigma=whole.sigma[data.index], status=())
