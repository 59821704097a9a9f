"""What the results of a run say together: alignments that count, scales against laws, what stands out.

Nothing is measured here: what single energies gave is read from the journal and joined.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .contrast import take_apart
from .decomposition import Decomposition, decompose
from .deformation import Deformation, acquisition_order, deformation
from .differences import NullTest, Probe, null_tests
from .jitter_report import views_path, views_read
from .joint import Joint, join
from .model import Alignment, Series, XanesTomoError
from .pixels import pixel_widths
from .recipe import Recipe
from .registration_qc import ErrorMap, error_map, odd_energies
from .registration_step import measured_of, settled
from .run import Run, begun_s
from .scale import ScaleReport, magnification_laws, scale_report
from .state import (
    Candidate,
    State,
)
from .steps import (
    StepResult,
    alignment_of,
)

__all__ = ["Findings", "scale_laws"]


class Findings(Run):
    """A run whose results are looked at together; see `Run`."""

    _joint: tuple[tuple[int, Recipe], Joint] | None = None

    def alignment(self, energy: int) -> Alignment | None:
        """Return the best alignment of one energy so far: registered, else within its tomogram, else None."""
        state = self.state
        for name in ("registration", "jitter"):
            candidate = state[(name, energy)].candidate
            if candidate is not None and state[(name, energy)].status != "stale":
                found = self._jitter(state, energy) if name == "jitter" else self.registered(energy)
                return alignment_of(found, self.scan(energy))
        return None

    def displacements(self, energy: int) -> StepResult:
        """Return the jitter that counts for an energy, with what was nudged and set by hand.

        Raises
        ------
        XanesTomoError
            There is none yet.
        """
        state = self.state
        if state[("jitter", energy)].candidate is None:
            raise XanesTomoError(f"{self.series.scans[energy].energy_ev:g} eV: the jitter correction was not run yet")
        return self._jitter(state, energy)

    def joint(self) -> Joint | None:
        """Return the joint solution of everything registered so far, None before the reference is known."""
        state = self.state
        if state.reference is None:
            return None
        key = (len(self.journal), self.recipe)
        if self._joint is None or self._joint[0] != key:
            measured = {}
            for e in range(len(self.series.scans)):
                unit = state[("registration", e)]
                if unit.candidate is not None and unit.status not in ("stale", "failed"):
                    found = measured_of(self.result(unit.candidate))
                    if found is not None:
                        measured[e] = found
            width = float(self.series.scans[state.reference].frames.frame_shape[1])
            solved = join(measured, self.series.energies_ev, state.reference, width_px=width)
            self._joint = (key, solved)
        return self._joint[1]

    def registered(self, energy: int) -> StepResult:
        """Return the registration that counts for an energy, with the errors that all comparisons together give it.

        Raises
        ------
        XanesTomoError
            There is none yet.
        """
        state = self.state
        candidate = state[("registration", energy)].candidate
        if candidate is None:
            raise XanesTomoError(f"{self.series.scans[energy].energy_ev:g} eV: it was not registered yet")
        found, solved = self.result(candidate), self.joint()
        if solved is None or state[("registration", energy)].status == "stale":
            return found
        fixed = state.manual.magnifications.get(energy) is not None
        return settled(found, solved, energy, fixed=fixed)

    def registration_flags(self) -> dict[int, list[str]]:
        """Return what stands out about the registered energies, in words, by the number of the energy."""
        out: dict[int, list[str]] = {}
        energies, notes = self.series.energies_ev, self._registration_notes()
        for e in range(len(energies)):
            words = [n.partition(" eV: ")[2] for n in notes if n.startswith(f"{energies[e]:g} eV: ")]
            candidate = self.state[("registration", e)].candidate
            if candidate is not None and self.state[("registration", e)].status not in ("stale", "failed"):
                words += [f"{s.name}: {s.value:.3g} {s.unit}".strip() for s in candidate.quality.scores if not s.passed]
            if words:
                out[e] = words
        return out

    def _registration_notes(self) -> tuple[str, ...]:
        """Return what all energies together say about single ones and about the scan, in words."""
        if len(self.series.scans) == 1:
            return ("one energy only: there is nothing to register it to",)
        solved, report = self.joint(), self.scale_report()
        if solved is None or report is None:
            return ()
        odd = [f"{self.series.energies_ev[e]:g} eV: {why}" for e, all_ in self._odd_energies().items() for why in all_]
        moved = self.deformation()
        bent = (moved.text(),) if moved is not None and moved.significant else ()
        return (*solved.notes, *report.notes, *odd, *bent)

    def _odd_energies(self) -> dict[int, list[str]]:
        """Return energies that look like another sample or bear a wrong label, with the reason."""
        state = self.state
        m, law, alike = (np.full(len(self.series.scans), np.nan) for _ in range(3))
        for e in range(len(m)):
            unit = state[("registration", e)]
            if unit.candidate is not None and unit.status not in ("stale", "failed"):
                numbers = unit.candidate.payload["numbers"]
                m[e], law[e] = float(numbers["magnification"]), float(numbers.get("law") or np.nan)
                if e != state.reference and numbers.get("correlation") is not None:
                    alike[e] = float(numbers["correlation"])
        return odd_energies(self.series.energies_ev, m, law, alike)

    def scale_report(self) -> ScaleReport | None:
        """Return the measured scales beside the laws, None before anything is registered."""
        state, scans = self.state, self.series.scans
        if state.reference is None:
            return None
        n, pixel = len(scans), pixel_widths(self.series, state.reference)
        m, sigma, width, mass = (np.full(n, np.nan) for _ in range(4))
        for e in range(n):
            unit = state[("registration", e)]
            if unit.candidate is None or unit.status in ("stale", "failed"):
                continue
            numbers = self.registered(e).numbers
            m[e], sigma[e] = (float(numbers[k]) * pixel[e] for k in ("magnification", "magnification_sigma"))
            width[e], mass[e] = float(numbers.get("width") or np.nan), float(numbers["mass"])
        if np.isfinite(m).sum() < 2:
            return None
        return scale_report(
            self.series.energies_ev,
            m,
            sigma,
            state.reference,
            laws=scale_laws(self.series, state.reference),
            time=self._times(),
            width=width,
            mass=mass,
            parts=take_apart(self.series.energies_ev, mass).parts,
        )

    def _times(self) -> npt.NDArray[Any]:
        """(energies,) when each was begun, s; their order where nothing says."""
        return acquisition_order([begun_s(s) for s in self.series.scans])

    def deformation(self) -> Deformation | None:
        """Return how parts of the object move with time, None before the reference is known."""
        state, n = self.state, len(self.series.scans)
        if state.reference is None:
            return None
        pixel = pixel_widths(self.series, state.reference)
        fields: list[list[npt.NDArray[Any] | None]] = [[], [], []]
        mass = np.full(n, np.nan)
        for e in range(n):
            candidate = state[("registration", e)].candidate
            known = candidate is not None and state[("registration", e)].status not in ("stale", "failed")
            arrays = self.result(candidate).arrays if known and candidate is not None else {}
            if known and candidate is not None:
                mass[e] = float(candidate.payload["numbers"]["mass"])
            for column, name in zip(fields, ("block_shift", "block_sigma", "block_place"), strict=True):
                found = arrays.get(name)
                column.append(found if found is None or name == "block_place" else found * pixel[e])
        return deformation(
            self._times(), *fields, reference=state.reference,
            share=take_apart(self.series.energies_ev, mass).share, strength=mass / mass[state.reference],
            width_px=float(self.series.scans[state.reference].frames.frame_shape[1]),
        )  # fmt: skip

    def particle_size(self) -> npt.NDArray[Any]:
        """(energies,) size of the particle against the reference's, if its scale departs from the calibration for that.

        1 where the user takes the whole change of scale for the magnification, and where nothing is known.
        """
        state = self.state
        size = np.ones(len(self.series.scans))
        said = state.manual.scale_change or self.recipe.maps.scale_change
        if said == "instrument" or state.reference is None:
            return size
        law = scale_laws(self.series, state.reference).get("calibration")
        pixel = pixel_widths(self.series, state.reference)
        for e in range(len(size)):
            candidate = state[("registration", e)].candidate
            known = candidate is not None and state[("registration", e)].status not in ("stale", "failed")
            if law is not None and known and candidate is not None and not self.series.scans[e].given:
                size[e] = pixel[e] * float(candidate.payload["numbers"]["magnification"]) / law[e]
        return size

    def point_spread(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """(energies,) variance of the point spread beyond the reference's, px^2 of the common grid, and its error.

        NaN where it was not measured.
        """
        state, n = self.state, len(self.series.scans)
        value, sigma = np.full(n, np.nan), np.full(n, np.nan)
        for e in range(n):
            candidate = state[("registration", e)].candidate
            if candidate is None or state[("registration", e)].status in ("stale", "failed"):
                continue
            numbers = candidate.payload["numbers"]
            if e == state.reference:
                value[e] = sigma[e] = 0.0
            elif numbers.get("blur_sigma_px2"):
                square = float(numbers["magnification"]) ** 2
                value[e], sigma[e] = numbers["blur_px2"] / square, numbers["blur_sigma_px2"] / square
        return value, sigma

    def error_map(self) -> ErrorMap:
        """Return what every registered projection by itself is displaced by beyond its alignment."""
        shifts: list[npt.NDArray[Any] | None] = []
        sigmas: list[npt.NDArray[Any] | None] = []
        for e in range(len(self.series.scans)):
            unit = self.state[("registration", e)]
            known = unit.candidate is not None and unit.status not in ("stale", "failed")
            arrays = self.result(unit.candidate).arrays if known and unit.candidate is not None else {}
            shifts.append(arrays.get("residual_shift"))
            sigmas.append(arrays.get("residual_sigma"))
        return error_map(self.series.energies_ev, shifts, sigmas)

    def decomposition(self) -> Decomposition:
        """Return the shifts of all registered energies taken apart, px of the common grid."""
        scans = [self.scan(e) for e in range(len(self.series.scans))]
        shifts: list[npt.NDArray[Any] | None] = []
        for e, scan in enumerate(scans):
            unit = self.state[("registration", e)]
            if scan.gridded or unit.candidate is None or unit.status in ("stale", "failed"):
                shifts.append(None)
                continue
            found = alignment_of(self.result(unit.candidate), scan)
            ok = np.array([s == "ok" for s in found.status])
            shifts.append(np.where(ok[:, None], found.shift, np.nan) / found.magnification)
        theta = [np.asarray(s.theta_deg, dtype=float) for s in scans]
        return decompose(self.series.energies_ev, theta, shifts, segment=[s.half for s in scans])

    def null_tests(self) -> tuple[NullTest, ...]:
        """Return by how much pairs of registered energies differ that should differ by a factor alone."""
        state, probe = self.state, None
        samples: list[npt.NDArray[Any] | None] = []
        for e in range(len(self.series.scans)):
            unit = state[("registration", e)]
            known = unit.candidate is not None and unit.status not in ("stale", "failed")
            arrays = self.result(unit.candidate).arrays if known and unit.candidate is not None else {}
            samples.append(arrays.get("samples"))
            if e == state.reference:
                probe = Probe.of(arrays)
        if probe is None or state.reference is None:
            return ()
        samples = [s if s is not None and s.shape[1] == len(probe.value) else None for s in samples]
        return null_tests(self.series.energies_ev, samples, probe, state.reference)

    def edge_effect_ev(self, energy: int) -> float:
        """Return what one px of an energy as a whole does to the edge energy at a surface, eV; 0 before the maps."""
        candidate = self.state[("maps", None)].candidate
        known = [] if candidate is None else candidate.payload["numbers"].get("edge_ev_per_px", [])
        return next((float(v) for ev, v in known if ev == float(self.series.scans[energy].energy_ev)), 0.0)

    def views(self, candidate: Candidate) -> dict[str, npt.NDArray[np.float64]]:
        """Return the views kept of a result of the jitter correction (`views.tomogram_views`), if it is the newest."""
        energy = candidate.unit[1]
        return {} if energy is None else views_read(views_path(self.output.folder, energy), candidate.id)

    def _jitter(self, state: State, energy: int) -> StepResult:
        """Return the displacements within a tomogram, with what was nudged and set by hand."""
        found = self._chosen(state, "jitter", energy)
        if not state.manual.jitter_part(energy):
            return found
        shift = np.array(found.arrays["shift"], dtype=np.float64)
        bin = self.recipe.scan.bin
        for frame, nudge in state.manual.nudges.get(energy, {}).items():
            shift[frame] += np.array(nudge) / bin
        center = state.manual.centers.get(energy)
        if center is not None:
            shift[:, 1] += center / bin - float(found.numbers["center"])
        return replace(found, arrays={**found.arrays, "shift": shift})


def scale_laws(series: Series, reference: int) -> dict[str, npt.NDArray[Any]]:
    """Return the magnification (energies,) by every law a series holds the numbers of: `scale.magnification_laws`.

    That of the optics: what another binning makes of the pixels is taken out.
    """
    width = pixel_widths(series, reference)
    header = np.array([s.header_pixel_size_nm for s in series.scans])
    # Some headers tell the size of the pixels as they are, some always the same.
    follows = (width != 1) & (np.abs(np.log(header / header[reference] / width)) < np.abs(np.log(width)) / 2)
    return dict(
        magnification_laws(
            series.energies_ev,
            reference,
            pixel_nm=np.array([s.pixel_size_nm for s in series.scans]) / width,
            header_nm=header / np.where(follows, width, 1.0),
            zone_plate_um=[s.zone_plate_um for s in series.scans],
        )
    )
