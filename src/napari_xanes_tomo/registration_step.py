"""The registration of one energy as a step of a run, and what the comparisons of all energies make of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .absorbance import Normalised
from .differences import FEWEST_SAMPLED, Probe, against_reference, sample
from .joint import Joint, Measured
from .model import Alignment, EnergyScan, FloatArray, Progress, Quality, Score, no_progress
from .parallel import one_blas_thread
from .recipe import Recipe
from .registration import register
from .registration_qc import part_in_field
from .steps import StepResult, alignment_of, laid_out
from .template import Template, match_angles, object_mass, take

__all__ = ["measured_of", "run_registration", "settled"]

_TURNED_DEG = 0.05  # smaller offsets of the angles of an energy are reported but not corrected


def measured_of(result: StepResult) -> Measured | None:
    """Return what a registration measured, None for the reference's."""
    numbers = result.numbers
    if numbers.get("place") is None:
        return None

    def array(name: str) -> FloatArray | None:
        return None if numbers.get(name) is None else np.array([np.nan if v is None else v for v in numbers[name]])

    place, sigma = array("place"), array("place_sigma")
    assert place is not None
    assert sigma is not None
    hub, pull = numbers.get("hub"), array("pull")
    return Measured(
        place, sigma, array("second"), array("second_sigma"), None if hub is None else int(hub), array("hub_place"),
        np.zeros(len(place)) if pull is None else pull,
    )  # fmt: skip


def settled(result: StepResult, joint: Joint, energy: int, *, fixed: bool = False) -> StepResult:
    """Return a registration with the errors that the comparisons of all energies give it.

    The place stays where the reference put it: another energy's trouble moves nothing here. A scale that was set by
    hand (`fixed`) has no error.
    """
    if result.numbers.get("place") is None or not np.isfinite(joint.sigma[energy]).all():
        return result
    own = np.array([0.0 if v is None else v for v in result.numbers["place_sigma"]], dtype=float)
    # Where the place lies away from the joint solution, that is an error as well.
    sigma = np.sqrt(np.maximum(joint.sigma[energy], own) ** 2 + joint.change[energy] ** 2)
    m = float(result.numbers["magnification"])
    numbers = {
        **result.numbers,
        "magnification_sigma": 0.0 if fixed else float(sigma[0]) * m,
        "translation_sigma": [float(v) for v in sigma[2:5]],
        "cross_sigma": [float(v) for v in joint.cross_sigma[energy]],
        "misfit": float(joint.misfit[energy]),
    }
    return replace(result, numbers=numbers)


@one_blas_thread()
def run_registration(
    scan: EnergyScan,
    recipe: Recipe,
    jitter: StepResult,
    data: Normalised,
    template: Template,
    *,
    magnification: float,
    reference: bool,
    pixel: float = 1.0,
    fixed: bool = False,
    second: Template | None = None,
    hub: int | None = None,
    hub_place: Sequence[float] | None = None,
    probe: Probe | None = None,
    progress: Progress = no_progress,
) -> StepResult:
    """Register one energy: ``shift``, ``sigma`` (n, 2) raw px and ``residual`` (n,), with M and the translation.

    ``residual_shift``, ``residual_sigma`` (n, 2) raw px are what each projection by itself is displaced by beyond that;
    ``block_shift``, ``block_sigma`` (4, 4, 2) what parts of the object are, ``block_place`` where they are. The numbers
    ``second`` are the place against the template of another energy, number `hub`, see `joint.Measured`. With a `probe`,
    ``samples`` (2, voxels) are the volume over the reference's mean attenuation there, see `differences`. The reference
    itself is not moved. `pixel` is how wide a raw pixel is on the camera, in those of the reference.
    """
    n = len(scan)
    whole = alignment_of(jitter, scan)
    known = np.isfinite(whole.shift[data.index]).all(axis=1)
    data = replace(data, data=take(data.data, np.flatnonzero(known)), index=data.index[known])
    index = data.index
    theta = np.asarray(scan.theta_deg, dtype=float)[index]
    part = Alignment(whole.shift[index], whole.sigma[index])
    if reference:
        numbers = {
            "magnification": 1.0,
            "magnification_sigma": 0.0,
            "dropped": list(jitter.numbers.get("dropped", ())),
            "law": 1.0,
            "translation": [0.0, 0.0, 0.0],
            "translation_sigma": [0.0, 0.0, 0.0],
            "mass": object_mass(data.data, theta, part, template),
            "template_level": template.level / template.bin,
            "frame_width": data.frame_shape[1],
            "variance": float(np.median(data.variance) * data.bin**2),
        }
        arrays = {"shift": whole.shift, "sigma": whole.sigma, "residual": np.full(n, np.nan)}
        if probe is not None and len(theta) >= FEWEST_SAMPLED:
            arrays["samples"] = _samples(data, theta, part, probe, template)
            arrays |= probe.arrays()
        return StepResult(arrays, numbers, Quality((), ("reference",)))
    found = register(
        data.data,
        theta,
        part,
        template,
        magnification=magnification,
        bin=data.bin,
        frame_shape=data.frame_shape,
        pixel=pixel,
        second=second,
        fixed=fixed,
        parameters=recipe.registration,
        progress=progress,
        what=f"{scan.energy_ev:g} eV",
    )
    arrays = {
        "shift": laid_out(found.alignment.shift, index, n),
        "sigma": laid_out(found.alignment.sigma, index, n),
        "residual": laid_out(found.residual, index, n),
        "residual_shift": laid_out(found.residual_shift, index, n),
        "residual_sigma": laid_out(found.residual_sigma, index, n),
        "block_shift": found.block_shift,
        "block_sigma": found.block_sigma,
        "block_place": found.block_place,
    }
    turned = 0.0
    if recipe.registration.correct_angles and abs(found.angle_deg) > max(_TURNED_DEG, 5 * found.angle_sigma_deg):
        turned = found.angle_deg
    surface: dict[str, Any] = {}
    if probe is not None and len(theta) >= FEWEST_SAMPLED:
        arrays["samples"] = _samples(data, theta + turned, found.alignment, probe, template)
        dipole = against_reference(arrays["samples"].astype(float) * template.level, probe)
        surface = {
            "dipole_px": [float(v) for v in dipole.shift],
            "dipole_sigma_px": [float(v) for v in dipole.sigma],
            "outward_px": dipole.outward,
            "outward_sigma_px": dipole.outward_sigma,
        }
    numbers = {
        **surface,
        "magnification": found.alignment.magnification,
        "magnification_sigma": found.magnification_sigma,
        "roll_deg": found.alignment.roll_deg,
        "dropped": list(jitter.numbers.get("dropped", ())),
        "law": magnification,
        "pixel": pixel,
        "translation": [float(v) for v in found.translation],
        "translation_sigma": [float(v) for v in found.translation_sigma],
        "place": [float(v) for v in found.place],
        "place_sigma": [float(v) for v in found.place_sigma],
        "pull": [float(v) for v in found.pull],
        "second": None if found.second is None else [float(v) for v in found.second],
        "second_sigma": None if found.second_sigma is None else [float(v) for v in found.second_sigma],
        "hub": None if found.second is None else hub,
        "hub_place": None if found.second is None or hub_place is None else [float(v) for v in hub_place],
        "roll_measured_deg": found.roll_deg,
        "roll_sigma_deg": found.roll_sigma_deg,
        "angle_deg": found.angle_deg,
        "angle_sigma_deg": found.angle_sigma_deg,
        "angle_applied_deg": turned,
        "pitch_deg": found.pitch_deg,
        "pitch_sigma_deg": found.pitch_sigma_deg,
        "blur_px2": found.blur_px2,
        "blur_sigma_px2": found.blur_sigma_px2,
        "width": found.width,
        "frame_width": data.frame_shape[1],
        "mass": found.mass,
        "variance": float(np.median(data.variance) * data.bin**2),
        "correlation": found.correlation,
    }
    in_field = part_in_field(template, theta, found.alignment, data.frame_shape)
    matched = len(match_angles(theta, template.theta_deg)[0])
    scores = (
        *found.quality.scores,
        Score("part of the angles compared", matched / max(n, len(template.theta_deg)), "", 0.75, "higher"),
        Score("part of the particle in the field", in_field, "", 0.98, "higher"),
    )
    notes = found.quality.notes
    if turned:
        notes += (f"its angles exceed the reference's by {turned:+.3f} +- {found.angle_sigma_deg:.3f} deg: corrected",)
    return StepResult(arrays, numbers, replace(found.quality, scores=scores, notes=notes))


def _samples(
    data: Normalised, theta: FloatArray, alignment: Alignment, probe: Probe, template: Template
) -> npt.NDArray[np.float16]:
    """Return `differences.sample` over the reference's mean attenuation, as it is kept."""
    found = sample(
        data.data, theta, alignment, probe, data.frame_shape, bin=data.bin, grid_shape=template.grid_shape
    )  # fmt: skip
    found /= template.level
    return np.asarray(np.clip(found, -1e4, 1e4), dtype=np.float16)
