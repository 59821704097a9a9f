"""The workflow: what was asked for (a recipe), what happened (a journal), and the state that follows from the two.

Every result is a *candidate*: an event of the journal with its parameters, scores and arrays. Which candidate counts is
a *decision*, another event. Nothing is ever changed in place, so everything can be taken back, and a run that was
interrupted goes on where it stopped.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from psygnal import Signal

from .absorbance import Normalised
from .agreement import center_of_rotation
from .chemistry import ARTEFACT, FLAG
from .decomposition import Decomposition, decompose
from .differences import NullTest, Probe, make_probe, null_tests
from .edges import ReferenceSpectrum, bracketed_elements, edge_energy_ev
from .execution import WAITING, Execution, Threads
from .given import given_flats, given_jitter, given_registration, look_at
from .io.atomic import atomic_write
from .io.journal import plain_json
from .io.references import read_reference
from .io.store import (
    EnergyRow,
    Journal,
    MapSpec,
    MapStore,
    Output,
    QualityTable,
    bring_back,
    open_output,
    shifts_rows,
    write_energies,
    write_quality,
    write_shifts,
)
from .jitter_report import views_bytes, views_path, views_read
from .joint import Joint, join
from .map_checks import MapChecks, check_maps
from .maps import (
    AlignedEnergy,
    MapPlan,
    Slab,
    VoxelChoice,
    angular_limit_nm,
    choose_voxel,
    halo_rows,
    map_slab,
    plan_maps,
    require_energies,
    slab_bytes,
    voxel_choices,
)
from .model import Alignment, Cancelled, EnergyScan, Progress, Quality, Score, Series, XanesTomoError, no_progress
from .recipe import MapsParameters, Recipe, check_flats, parameter_key
from .reconstruction import Reconstructor, reconstructor
from .registration import Template, make_template, reference_energy
from .registration_qc import ErrorMap, error_map, odd_energies, surface_effect
from .scale import ScaleReport, magnification_laws, scale_report
from .single import is_single, mean_image, placed_item, single_jitter, single_registrations
from .spectra import MEASURES, NOISE_WARNING
from .state import (
    THRESHOLDS,
    Box,
    Candidate,
    State,
    Unit,
    UnitState,
    active_events,
    candidates_in,
    check_events,
    resolve,
    undoable,
)
from .steps import (
    CHECKED,
    SCREENED,
    STEPS,
    Confinement,
    StepResult,
    alignment_of,
    beam_of,
    measured_of,
    renormalise,
    run_flats,
    run_jitter,
    run_registration,
    settled,
    step,
)
from .survey import Survey

__all__ = [
    "Cancelled",
    "Candidate",
    "State",
    "StoppedByThreshold",
    "Unit",
    "UnitState",
    "Workflow",
    "resolve",
    "scan_source",
]

log = logging.getLogger(__name__)

SLAB_ROWS = 32

Acceptance = Literal["by hand", "thresholds"]


class StoppedByThreshold(XanesTomoError):
    """A run with ``on_fail: stop`` came to a result that does not pass; says what to look at."""


@dataclass(frozen=True)
class VoxelTable:
    """What maps with voxels of several sizes would be worth.

    Attributes
    ----------
    choices : tuple of VoxelChoice
        Empty where the middle rows hold no voxel of the particle.
    px : int
        The size that maps would have, reference pixels.
    mean_spectrum : tuple of (float, float, bool)
        Energy in eV, mean attenuation of the particle in 1/cm, and whether the elements are fitted to it.
    """

    choices: tuple[VoxelChoice, ...]
    px: int
    mean_spectrum: tuple[tuple[float, float, bool], ...]


class Workflow:
    """One run: a series, an output folder, a recipe. The GUI and the command line are two hands on it.

    Parameters
    ----------
    series : Series
    out : path
        Output folder; a new one, or one that holds the same run (it goes on).
    recipe : Recipe, optional
        By default the folder's own, or the standard one.
    memory_bytes : int
        What the maps step may take for its slabs.
    execution : Execution, optional
        Where slabs are made; the threads of this machine unless given.
    source : path, optional
        What the series was opened from; noted in the journal, so that the output can be opened together with it.

    Raises
    ------
    XanesTomoError
        The series has nothing to work on, or the folder is not for this run.
    """

    changed = Signal(str, object)

    def __init__(
        self,
        series: Series,
        out: str | Path,
        recipe: Recipe | None = None,
        *,
        memory_bytes: int = 4 * 2**30,
        execution: Execution | None = None,
        source: str | Path | None = None,
    ) -> None:
        if not series.scans:
            raise XanesTomoError(f"{series.name}: expected at least one energy, got none")
        if not any(s.usable.any() for s in series.scans):
            raise XanesTomoError(f"{series.name}: expected projections that can be read, got none; see `inspect`")
        _check_recipe(recipe, series)
        self.series = series
        self.single = is_single(series)
        self.memory_bytes = memory_bytes
        self.execution: Execution = Threads() if execution is None else execution
        self._source = None if source is None else str(Path(source).resolve())
        self.fingerprints = [_fingerprint(s) for s in series.scans]
        self._state: tuple[int, Recipe, State] | None = None
        self._made: tuple[int, list[Candidate]] | None = None
        # A crash may have cut the first event short: then there is a journal, but no recipe in it to go on with.
        begun = recipe is None and (Path(out) / "journal.jsonl").exists()
        begun = begun and any(e.kind == "run" for e in Journal(out).events)
        text = None if begun else (recipe or Recipe()).to_yaml()
        names, stamps = _files(series)
        self.output: Output = open_output(
            out,
            text,
            parameter_key(series.name, self.fingerprints),
            input_name=series.name,
            explain=lambda journal: _changed_files(journal, names, stamps),
        )
        try:
            self.recipe = Recipe.from_yaml(self.output.recipe)
            if recipe is not None and recipe != self.recipe:  # the same but for `on_fail`
                self.output.change_recipe(recipe.to_yaml())
                self.recipe = recipe
            check_events(self.journal)
            self._note_scan(names, stamps)
        except BaseException:
            self.output.close()
            raise
        self.messages = self.output.messages
        self._opened = len(self.journal)
        for message in self.messages:
            log.warning(message)
        self._data: tuple[str, Normalised] | None = None
        self._template: tuple[str, Template] | None = None
        self._probe: tuple[Template, Probe | None] | None = None
        self._hub: tuple[str, Template | None, list[float] | None] | None = None
        self._joint: tuple[tuple[int, Recipe], Joint] | None = None
        self._looked: tuple[str, Survey] | None = None
        self._images: tuple[str, dict[int, StepResult]] | None = None

    def _note_scan(self, names: Sequence[str], stamps: npt.NDArray[np.int64]) -> None:
        """Write down what was odd about the measurement and which files it had: for the report, and for later."""
        payload = {
            "name": self.series.name,
            "source": self._source,
            "n_expected": list(self.series.n_expected),
            "problems": [asdict(p) for p in self.series.problems],
            "names": self.journal.put_array(np.frombuffer("\n".join(names).encode("utf-8", "replace"), dtype=np.uint8)),
            "stamps": self.journal.put_array(stamps),
        }
        known = [e.payload for e in self.journal.events if e.kind == "scan"]
        if known and payload["source"] is None:
            payload["source"] = known[-1].get("source")
        if not known or known[-1] != plain_json(payload, "scan"):
            self.journal.append("scan", payload)

    # ------------------------------------------------------------------------------------------------ looking

    @property
    def journal(self) -> Journal:
        """What happened so far."""
        return self.output.journal

    @property
    def _scans(self) -> dict[int, EnergyScan]:
        return dict(enumerate(self.series.scans))

    @property
    def state(self) -> State:
        """The state of every step, from recipe and journal."""
        if self._state is None or self._state[:2] != (len(self.journal), self.recipe):
            found = resolve(self.recipe, self.journal.events, self.series.energies_ev.tolist(), self.fingerprints)
            self._state = (len(self.journal), self.recipe, found)
        return self._state[2]

    def candidates(self, name: str, energy: int | None = None) -> list[Candidate]:
        """Return every result of a step (of one energy), oldest first."""
        return [c for c in self._candidates() if c.unit == (name, energy)]

    def _candidates(self) -> list[Candidate]:
        if self._made is None or self._made[0] != len(self.journal):
            self._made = (len(self.journal), candidates_in(self.journal.events))
        return self._made[1]

    def result(self, candidate: Candidate) -> StepResult:
        """Load the arrays and numbers of a candidate; floats come in double precision, whatever they are kept in."""
        arrays = {k: self.journal.get_array(v) for k, v in candidate.payload["arrays"].items()}
        arrays = {k: a.astype(np.float64) if a.dtype.kind == "f" else a for k, a in arrays.items()}
        return StepResult(arrays, dict(candidate.payload["numbers"]), candidate.quality)

    def scan(self, energy: int) -> EnergyScan:
        """Return one energy with the user's exclusions applied."""
        return self.series.scans[energy].excluded(self.state.excluded.get(energy, {}))

    def alignment(self, energy: int) -> Alignment | None:
        """Return the best alignment of one energy so far: registered, else within its tomogram, else None."""
        state = self.state
        for name in ("registration", "jitter"):
            candidate = state[(name, energy)].candidate
            if candidate is not None and state[(name, energy)].status != "stale":
                found = self._jitter(state, energy) if name == "jitter" else self.registered(energy)
                return alignment_of(found, self.scan(energy))
        return None

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
            width = float(self.series.frame_shape[1])
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
        return (*solved.notes, *report.notes, *odd)

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
        n = len(scans)
        m, sigma, width, mass = (np.full(n, np.nan) for _ in range(4))
        for e in range(n):
            unit = state[("registration", e)]
            if unit.candidate is None or unit.status in ("stale", "failed"):
                continue
            numbers = self.registered(e).numbers
            m[e], sigma[e] = float(numbers["magnification"]), float(numbers["magnification_sigma"])
            width[e], mass[e] = float(numbers.get("width") or np.nan), float(numbers["mass"])
        if np.isfinite(m).sum() < 2:
            return None
        time = np.array([np.nanmin(s.time_s) if np.isfinite(s.time_s).any() else np.nan for s in scans])
        return scale_report(
            self.series.energies_ev,
            m,
            sigma,
            state.reference,
            laws=scale_laws(self.series, state.reference),
            time=time,
            width=width,
            mass=mass,
        )

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
        """Return the views kept of a result of the jitter correction (see `qc.tomogram_views`), if it is the newest."""
        energy = candidate.unit[1]
        return {} if energy is None else views_read(views_path(self.output.folder, energy), candidate.id)

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

    # --------------------------------------------------------------------------------------------- deciding

    def accept(self, name: str, energy: int | None = None, candidate: int | None = None) -> None:
        """Let a candidate (by its id; the newest unless given) count, whatever the recipe says by now."""
        found = self.candidates(name, energy)
        if not found:
            raise XanesTomoError(f"{step(name).title}: there is nothing to accept; run it first")
        ids = [c.id for c in found]
        chosen = ids[-1] if candidate is None else candidate
        if chosen not in ids:
            raise XanesTomoError(f"{step(name).title}: expected a candidate out of {ids}, got {chosen}")
        self._decide(name, energy, chosen)

    def revert(self, name: str, energy: int | None = None) -> None:
        """Take back the last acceptance of a step."""
        self._decide(name, energy, None)

    def _decide(self, name: str, energy: int | None, candidate: int | None, **by: str) -> None:
        self.journal.append("decision", {"step": name, "energy": energy, "candidate": candidate, **by})
        self.changed.emit(name, energy)

    def exclude(self, energy: int, frame: int | None = None, reason: str = "by hand") -> None:
        """Leave a projection (or, without `frame`, an energy) out from now on; what depends on it becomes stale."""
        self._check_frame(energy, frame)
        if frame is None:
            self._manual("exclude_energy", energy, reason=reason)
        else:
            self._manual("exclude", energy, frame=frame, reason=reason)

    def restore(self, energy: int, frame: int | None = None) -> None:
        """Take an exclusion back."""
        self._check_frame(energy, frame)
        if frame is None:
            self._manual("restore_energy", energy)
        else:
            self._manual("restore", energy, frame=frame)

    def nudge(self, energy: int, frame: int, dy: float, dx: float) -> None:
        """Add to the displacement found for a projection, raw px, positive down / right; nudges add up."""
        self._check_frame(energy, frame)
        if not (np.isfinite(dy) and np.isfinite(dx)):
            raise XanesTomoError(f"nudge: expected two numbers in px, got {dy} and {dx}")
        self._manual("nudge", energy, frame=frame, dy=float(dy), dx=float(dx))

    def set_center(self, energy: int, center_px: float | None) -> None:
        """Set the rotation axis of an energy, raw px from the middle column; None goes back to the one found."""
        self._check_frame(energy, None)
        if center_px is not None and not abs(center_px) <= self.series.frame_shape[1]:
            raise XanesTomoError(f"rotation centre: expected a place inside the frame, got {center_px} px")
        self._manual("center", energy, value=None if center_px is None else float(center_px))

    def fix_magnification(self, energy: int, magnification: float | None) -> None:
        """Set the magnification of an energy instead of measuring it; None measures it again."""
        self._check_frame(energy, None)
        if magnification is not None and not 0.2 < magnification < 5:
            raise XanesTomoError(f"magnification: expected a number near 1, got {magnification}")
        self._manual("magnification", energy, value=None if magnification is None else float(magnification))

    def name_change_point(self, energy: int, frame: int, present: bool = True) -> None:
        """Say that the sample was moved before projection `frame`, or (with `present` False) that it was not."""
        self._check_frame(energy, frame)
        self._manual("change_point", energy, frame=frame, present=bool(present))

    def set_boxes(self, boxes: Iterable[Box]) -> None:
        """Work inside these boxes, ``(y0, y1, x0, x1)`` of a frame at the reference energy; none is the whole frame."""
        height, width = self.series.frame_shape
        listed = [[int(v) for v in box] for box in boxes]
        for y0, y1, x0, x1 in listed:
            if not (0 <= y0 < y1 <= height and 0 <= x0 < x1 <= width) or min(y1 - y0, x1 - x0) < 8:
                raise XanesTomoError(
                    f"box: expected rows and columns inside {height} x {width}, at least 8 wide, got "
                    f"{y0}:{y1}, {x0}:{x1}"
                )
        self._manual("boxes", None, boxes=listed)

    def set_mask(self, mask: npt.ArrayLike | None) -> None:
        """Mark pixels of the camera that are not to be trusted: a (y, x) array, True there; None marks none."""
        reference = None
        if mask is not None:
            bad = np.asarray(mask, dtype=bool)
            if bad.shape != self.series.frame_shape:
                raise XanesTomoError(f"mask: expected the shape of a frame, {self.series.frame_shape}, got {bad.shape}")
            reference = self.journal.put_array(bad.astype(np.uint8))
        self._manual("mask", None, mask=reference)

    def choose_flats(self, energy: int, use: str | None) -> None:
        """Say which flats an energy is divided by: a policy, or ``half N``; None leaves it to the recipe."""
        if use is not None:
            try:
                check_flats(use)
            except ValueError as error:
                raise XanesTomoError(f"flats: {error}") from None
        self._manual("flats", energy, use=use)

    def note(self, text: str) -> None:
        """Write a remark into the journal."""
        self.journal.append("note", {"text": str(text)})

    def undo(self) -> str | None:
        """Take the last decision back; return what it was, None where there is none."""
        held = [e for e in active_events(self.journal.events) if undoable(e)]
        if not held:
            return None
        self.journal.append("undo", {"event": held[-1].seq})
        self._tell(held[-1].payload.get("energy"))
        return held[-1].kind

    def redo(self) -> str | None:
        """Let the decision taken back last hold again, unless another was made since; return what it was."""
        events = self.journal.events
        undone: list[int] = []
        for event in events:
            if event.kind == "undo":
                undone.append(int(event.payload["event"]))
            elif event.kind == "redo":
                undone.remove(int(event.payload["event"]))
            elif undoable(event):
                undone.clear()
        if not undone:
            return None
        self.journal.append("redo", {"event": undone[-1]})
        event = events[undone[-1] - 1]
        self._tell(event.payload.get("energy"))
        return event.kind

    def _manual(self, kind: str, energy: int | None, **payload: object) -> None:
        self.journal.append(kind, {"energy": energy, **payload})
        self._tell(energy)

    def _tell(self, energy: int | None) -> None:
        self.changed.emit("flats", energy)

    def _check_frame(self, energy: int, frame: int | None) -> None:
        if not 0 <= energy < len(self.series.scans):
            raise XanesTomoError(f"expected one of {len(self.series.scans)} energies, got number {energy}")
        if frame is not None and not 0 <= frame < len(self.series.scans[energy]):
            raise XanesTomoError(f"expected one of {len(self.series.scans[energy])} projections, got number {frame}")

    def set_recipe(self, recipe: Recipe) -> None:
        """Ask for other parameters; what was made with others becomes stale unless it was accepted."""
        if recipe != self.recipe:
            _check_recipe(recipe, self.series)
            self.output.change_recipe(recipe.to_yaml())
            self.recipe = recipe
            self.changed.emit("recipe", None)

    # ---------------------------------------------------------------------------------------------- running

    def run(self, *, until: str = "maps", progress: Progress = no_progress, accept: Acceptance = "by hand") -> State:
        """Do every step up to `until` that is not done yet.

        An energy that cannot be used is flagged and left out; the others go on.

        Parameters
        ----------
        until : {"flats", "jitter", "registration", "maps"}
        progress : callable
            See `Progress`. Raising `Cancelled` in it stops at the next safe point; what was finished stays.
        accept : {"by hand", "thresholds"}
            With ``thresholds`` a result whose scores all pass is accepted at once, marked as such; the others are
            used as well but stay flagged, or end the run after their step where the recipe has ``on_fail: stop``.

        Raises
        ------
        XanesTomoError
            No energy got through a step, or the output cannot be written.
        StoppedByThreshold
            See `accept`.
        Cancelled
            As raised by `progress`.
        """
        names = [s.name for s in STEPS]
        last = names.index(step(until).name)
        energies = range(len(self.series.scans))
        judged = accept == "thresholds"
        if last == len(names) - 1:
            self._reconstructor()  # one that is not installed is refused before hours of other work
        stopping = judged and self.recipe.on_fail == "stop"
        for e in energies:
            for name in names[: min(last, 1) + 1]:
                if name == "jitter" and stopping and self._flags("flats"):
                    continue  # the run ends after the flats
                self.run_unit(name, e, progress=_within(progress, name, e, len(energies)))
                self._judge(name, e, judged)
        for name in names[: min(last, 1) + 1]:
            self._stop_at(name, stopping)
        if last >= 2:
            state = self.state
            if state.reference is None:
                raise XanesTomoError(self._no_reference(state))
            # Energies that share their second template come one after the other: it is made once.
            hubs = state.hubs
            order = [
                state.reference,
                *sorted((e for e in energies if e != state.reference), key=lambda e: (hubs.get(e, -1), e)),
            ]
            for k, e in enumerate(order):
                self.run_unit("registration", e, progress=_within(progress, "registration", k, len(order)))
                self._judge("registration", e, judged)
            for note in self._registration_notes():
                log.warning(note)
            self._stop_at("registration", stopping)
        self.write_tables()
        if last >= 3:
            self.run_unit("maps", None, progress=progress)
            self._judge("maps", None, judged)
            self.write_tables()
            self._stop_at("maps", stopping)
        return self.state

    def _judge(self, name: str, energy: int | None, judged: bool) -> None:
        """Accept a result whose scores pass, unless the user has decided about it."""
        unit = self.state[(name, energy)]
        if not judged or unit.status != "candidate" or unit.candidate is None:
            return
        if unit.candidate.quality.verdict != "good":
            return
        said = [
            e.seq
            for e in active_events(self.journal.events[unit.candidate.id :])
            if e.kind == "decision" and (e.payload["step"], e.payload["energy"]) == (name, energy)
        ]
        if not said:
            self._decide(name, energy, unit.candidate.id, by=THRESHOLDS)

    def _flags(self, name: str) -> list[str]:
        """Return what is to be looked at in a step: scores that do not pass and were not accepted, and failures."""
        state, out = self.state, []
        for (s, e), unit in state.units.items():
            if s != name:
                continue
            where = f"{step(name).title}{'' if e is None else f', {self.series.scans[e].energy_ev:g} eV'}"
            if unit.status == "failed" and unit.input_key:
                out.append(f"{where}: {unit.reason}")
            elif unit.status == "candidate" and unit.candidate is not None:
                out += [
                    f"{where}: {x.name} {x.value:.3g} {x.unit}".rstrip()
                    + f", expected at {'most' if x.better == 'lower' else 'least'} {x.threshold:g}"
                    for x in unit.candidate.quality.scores
                    if not x.passed
                ]
        return out

    def _stop_at(self, name: str, stopping: bool) -> None:
        flags = self._flags(name) if stopping else []
        if flags:
            self.write_tables()
            more = f" (and {len(flags) - 1} more)" if len(flags) > 1 else ""
            raise StoppedByThreshold(
                f"{flags[0]}{more}; look at it and accept it or redo the step in napari, or set on_fail: continue"
            )

    def _reconstructor(self) -> Reconstructor:
        p = self.recipe.maps
        return reconstructor(p.reconstruction, filter=p.filter, iterations=p.iterations)

    def run_unit(
        self, name: str, energy: int | None = None, *, initial: int | None = None, progress: Progress = no_progress
    ) -> UnitState:
        """Do one step (of one energy) unless a result with these parameters and inputs exists; return its state.

        A step that cannot be done is recorded as failed, with its reason.

        Parameters
        ----------
        name : str
        energy : int or None
        initial : int, optional
            Jitter correction only: begin at the displacements of this candidate, such as a partial one; computed even
            where there is a result. The answer is that of any other beginning within its error, not to the last digit.
        progress : callable
            See `Progress`. A jitter correction that is cancelled leaves its best estimate as a candidate that is marked
            partial; `Cancelled` is passed on all the same.
        """
        state = self.state
        unit = state[(name, energy)]
        if not unit.input_key:
            return unit
        start = None if initial is None else self._beginning(name, energy, initial)
        if start is None and unit.status in ("candidate", "accepted"):
            assert unit.candidate is not None
            # Maps lie outside the journal: those that count may be the former ones, or have been removed by hand.
            if name != "maps" or bring_back(self.output.maps, str(unit.candidate.payload["numbers"]["store_key"])):
                return unit
        if start is None and unit.status == "failed" and self._failed_now(name, energy):
            return unit
        started = time.monotonic()
        try:
            result = self._compute(name, energy, state, progress, start)
        except XanesTomoError as error:
            key = parameter_key(name, unit.parameter_key, unit.input_key)
            payload = {"step": name, "energy": energy, "key": key, "reason": str(error)}
            if name == "maps":
                raise
            self.journal.append("failure", payload)
            log.warning(str(error))
            self.changed.emit(name, energy)
            return self.state[(name, energy)]
        self._record(name, energy, unit, result, time.monotonic() - started)
        if result.numbers.get("partial"):
            raise Cancelled
        return self.state[(name, energy)]

    def _beginning(self, name: str, energy: int | None, candidate: int) -> npt.NDArray[Any]:
        found = {c.id: c for c in self.candidates("jitter", energy)}
        if name != "jitter" or candidate not in found:
            raise XanesTomoError(f"initial: expected a result of the jitter correction out of {[*found]}")
        return self.result(found[candidate]).arrays["shift"]

    def _failed_now(self, name: str, energy: int | None) -> bool:
        """Whether a failure happened since this workflow was opened: one of an earlier session is worth another try."""
        later = self.journal.events[self._opened :]
        return any(e.kind == "failure" and e.payload["step"] == name and e.payload["energy"] == energy for e in later)

    def _record(self, name: str, energy: int | None, unit: UnitState, result: StepResult, seconds: float) -> None:
        from . import __version__

        versions = {"napari-xanes-tomo": __version__, "python": platform.python_version()}
        noted = [e for e in self.journal.events if e.kind == "parameters" and e.payload["key"] == unit.parameter_key]
        if not noted or noted[-1].payload["versions"] != versions:
            sections = {s: getattr(self.recipe, s).model_dump(mode="json") for s in step(name).parameters}
            self.journal.append("parameters", {"key": unit.parameter_key, "parameters": sections, "versions": versions})
        self.journal.append("candidate", candidate_payload(self.journal, name, energy, unit, result, seconds))
        if result.views and energy is not None:
            path = views_path(self.output.folder, energy)
            path.parent.mkdir(exist_ok=True)
            atomic_write(path, views_bytes(result.views, self.journal.events[-1].seq))
        self.changed.emit(name, energy)

    def _compute(
        self, name: str, energy: int | None, state: State, progress: Progress, start: npt.NDArray[Any] | None = None
    ) -> StepResult:
        if name == "maps":
            return self._make_maps(state, progress)
        assert energy is not None
        scan = self.scan(energy)
        if scan.given:
            return self._given(name, energy, state, progress)
        if self.single and name != "flats":
            return single_jitter(scan) if name == "jitter" else self._registered_image(energy, state, progress)
        if name == "flats":
            result, data = run_flats(
                scan,
                self.recipe,
                self._confinement(energy, state),
                number=energy,
                around=self._scans,
                use=state.manual.flats.get(energy),
                progress=progress,
            )
            unit = state[(name, energy)]
            self._data = (parameter_key(name, unit.parameter_key, unit.input_key), data)
            return result
        flats = self._chosen(state, "flats", energy)
        data = self._normalised(energy, state, flats)
        if name == "jitter":
            points = state.manual.change_points.get(energy, ())
            return run_jitter(
                scan, self.recipe, flats, data, change_points=points, initial=start, progress=progress
            )  # fmt: skip
        reference = state.reference
        assert reference is not None  # registration has an input key only with a reference
        template = self._reference_template(reference, state)
        jitter = self._jitter(state, energy)
        size = [self.series.scans[i].pixel_size_nm for i in (reference, energy)]
        guess = size[0] / size[1] if size[1] > 0 else 1.0
        fixed = state.manual.magnifications.get(energy)
        hub = state.hubs.get(energy) if energy != reference else None
        second, hub_place = (None, None) if hub is None else self._hub_template(hub, reference, state)
        data = self._normalised(energy, state, flats)  # the templates may have taken its place
        return run_registration(
            scan,
            self.recipe,
            jitter,
            data,
            template,
            magnification=guess if fixed is None else fixed,
            fixed=fixed is not None,
            reference=energy == reference,
            second=second,
            hub=hub,
            hub_place=hub_place,
            probe=self._probe_of(template),
            progress=progress,
        )

    def _probe_of(self, template: Template) -> Probe | None:
        """Return the voxels at which registered energies are compared; the last one is kept."""
        if self._probe is None or self._probe[0] is not template:
            try:
                self._probe = (template, make_probe(template))
            except XanesTomoError:
                self._probe = (template, None)
        return self._probe[1]

    def _registered_image(self, energy: int, state: State, progress: Progress) -> StepResult:
        """Register the images of all energies of 2-D XANES together, once, and return that of one."""
        ready = [e for e in range(len(self.series.scans)) if state[("jitter", e)].candidate is not None]
        assert state.reference is not None
        key = parameter_key([[e, self._data_key(e, state)] for e in ready], state.reference, self.recipe.registration)
        if self._images is None or self._images[0] != key:
            found = {e: mean_image(self._normalised(e, state, self._chosen(state, "flats", e))) for e in ready}
            made = single_registrations(found, self.series, state.reference, self.recipe, progress=progress)
            self._images = (key, made)
        result = self._images[1][energy]
        if "failed" in result.numbers:
            raise XanesTomoError(str(result.numbers["failed"]))
        return result

    def _look(
        self,
        state: State,
        progress: Progress,
        smoothings: tuple[float, ...] = (1.0,),
        placed: Mapping[int, EnergyScan] | None = None,
    ) -> Survey:
        """Return the look at all energies on the common grid, aligned elsewhere or `placed`; the last one is kept."""
        scans = [(placed or {}).get(e, self.scan(e)) for e in range(len(self.series.scans))]
        left = {*state.manual.energies, *(e for e in range(len(scans)) if placed is not None and e not in placed)}
        key = parameter_key(smoothings, [_fingerprint(s) for s in scans], sorted(left),
                            self.recipe.registration.reference_ev)  # fmt: skip
        if self._looked is None or self._looked[0] != key:
            wanted = self.recipe.registration.reference_ev
            found = look_at(scans, wanted, smoothings, leave_out=left, progress=progress)
            self._looked = (key, found)
        return self._looked[1]

    def _given(self, name: str, energy: int, state: State, progress: Progress) -> StepResult:
        """Do a step of what was aligned elsewhere: nothing but a look at it; see `given`."""
        scan = self.scan(energy)
        if name == "jitter":
            return given_jitter(scan)
        look = self._look(state, progress)
        if energy in look.lost:
            raise XanesTomoError(f"{scan.energy_ev:g} eV: {look.lost[energy]}")
        if name == "flats":
            result, data = given_flats(scan, self.recipe, look, energy)
            if data is not None:
                unit = state[(name, energy)]
                self._data = (parameter_key(name, unit.parameter_key, unit.input_key), data)
            return result
        reference = state.reference
        assert reference is not None
        template = None if scan.gridded else self._reference_template(reference, state)
        found = None if template is None else self._normalised(energy, state, self._chosen(state, "flats", energy))
        return given_registration(scan, energy, reference, look, self._jitter(state, energy), found, template)

    def _hub_template(self, hub: int, reference: int, state: State) -> tuple[Template | None, list[float] | None]:
        """Return another energy as a template on the common grid, and where it was taken to lie; the last is kept."""
        parts = [state[("jitter", i)].candidate for i in (hub, reference)]
        keys = [None if c is None else c.key for c in parts]
        by_hand = [state.manual.jitter_part(i) for i in (hub, reference)]
        key = parameter_key(keys, by_hand, self.recipe.registration, state.manual.magnifications.get(hub))
        if self._hub is None or self._hub[0] != key:
            jitter, scan = self._jitter(state, hub), self.scan(hub)
            data = self._normalised(hub, state, self._chosen(state, "flats", hub))
            size = [self.series.scans[i].pixel_size_nm for i in (reference, hub)]
            fixed = state.manual.magnifications.get(hub)
            guess = size[0] / size[1] if size[1] > 0 else 1.0
            template = self._reference_template(reference, state)
            try:
                found = run_registration(
                    scan, self.recipe, jitter, data, template, magnification=guess if fixed is None else fixed,
                    fixed=fixed is not None, reference=False,
                )  # fmt: skip
            except XanesTomoError:
                self._hub = (key, None, None)  # it says so itself when its turn comes
                return None, None
            self._hub = (key, self._template_of(hub, found, data), list(found.numbers["place"]))
        return self._hub[1], self._hub[2]

    def _template_of(self, energy: int, found: StepResult, data: Normalised) -> Template:
        whole = alignment_of(found, self.scan(energy))
        known = np.isfinite(whole.shift[data.index]).all(axis=1)
        index = data.index[known]
        theta = np.asarray(self.series.scans[energy].theta_deg, dtype=float)[index]
        part = replace(whole, shift=whole.shift[index], sigma=whole.sigma[index], status=())
        return make_template(data.data[known], theta, part, bin=data.bin, frame_shape=data.frame_shape)

    def _chosen(self, state: State, name: str, energy: int) -> StepResult:
        candidate = state[(name, energy)].candidate
        assert candidate is not None
        return self.result(candidate)

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

    def _confinement(self, energy: int, state: State) -> Confinement:
        """Return what the user drew: boxes (scaled to this energy by the calibration) and the mask."""
        manual = state.manual
        mask = None if manual.mask is None else self.journal.get_array(manual.mask).astype(bool)
        reference = reference_energy(self.series.energies_ev, self.recipe.registration.reference_ev)
        sizes = [self.series.scans[i].pixel_size_nm for i in (reference, energy)]
        scale = sizes[0] / sizes[1] if sizes[1] > 0 else 1.0
        return Confinement(manual.boxes, scale, mask)

    def _data_key(self, energy: int, state: State) -> str:
        candidate = state[("flats", energy)].candidate
        assert candidate is not None
        return candidate.key

    def _normalised(self, energy: int, state: State, flats: StepResult) -> Normalised:
        """One energy as absorbance; the last one asked for is kept."""
        key = self._data_key(energy, state)
        if self._data is None or self._data[0] != key:
            within = self._confinement(energy, state)
            again = renormalise(self.scan(energy), self.recipe, flats, within, number=energy, around=self._scans)
            self._data = (key, again)
        return self._data[1]

    def _reference_template(self, reference: int, state: State) -> Template:
        candidate = state[("jitter", reference)].candidate
        assert candidate is not None
        key = parameter_key(candidate.key, state.manual.jitter_part(reference))
        if self._template is None or self._template[0] != key:
            data = self._normalised(reference, state, self._chosen(state, "flats", reference))
            made = self._template_of(reference, self._jitter(state, reference), data)
            self._template = (key, made)
        return self._template[1]

    # ------------------------------------------------------------------------------------------------- maps

    def aligned(self, state: State | None = None) -> tuple[list[AlignedEnergy], list[int]]:
        """Return the registered energies, ready to be placed on the common grid, and their numbers."""
        state = self.state if state is None else state
        items, numbers = [], []
        mask = None if state.manual.mask is None else self.journal.get_array(state.manual.mask).astype(bool)
        for e in range(len(self.series.scans)):
            unit = state[("registration", e)]
            if unit.candidate is None or unit.status in ("stale", "failed"):
                continue
            found = self.registered(e)
            scan = self.scan(e)
            flats = self._chosen(state, "flats", e)
            air = np.nan_to_num(flats.arrays["air"])
            ty, tx, tz = (float(v) for v in found.numbers["translation_sigma"])
            items.append(
                AlignedEnergy(
                    scan, alignment_of(found, scan), air, mask, beam_of(flats, self._scans),
                    float(found.numbers["magnification_sigma"]), (ty, tx, tz),
                    fill_lost=self.recipe.maps.fill_lost and not (scan.gridded or self.single),
                )
            )  # fmt: skip
            numbers.append(e)
        if self.single and items and state.reference is not None:
            items = [placed_item(i, self.series.scans[state.reference].pixel_size_nm) for i in items]
        if items and items[0].scan.gridded:
            look = self._placed_look(state, items, numbers)
            items = [
                replace(i, variance=(float(look.variance[e, 0]), float(look.variance[e, 1])))
                for i, e in zip(items, numbers, strict=True)
            ]
        return items, numbers

    def _placed_look(self, state: State, items: Sequence[AlignedEnergy], numbers: Sequence[int]) -> Survey:
        """Return the look at energies on the common grid, with the smoothings of the maps."""
        s = self.recipe.maps.smoothing_voxel
        placed = {e: i.scan for e, i in zip(numbers, items, strict=True)} if self.single else None
        return self._look(state, no_progress, (s, s * self.recipe.maps.shape_smoothing), placed)

    def map_plan(
        self, state: State | None = None, parameters: MapsParameters | None = None
    ) -> tuple[MapPlan, list[AlignedEnergy], float]:
        """Return the plan of the maps, the energies that take part, and the size of a reference pixel in nm."""
        p = self.recipe.maps if parameters is None else parameters
        if self.recipe.absorbance.contrast == "phase":
            raise XanesTomoError(
                "maps: expected absorption contrast, got a recipe with `contrast: phase`; phase frames are aligned and "
                "reconstructed, but hold no densities and no spectra"
            )
        state = self.state if state is None else state
        items, numbers = self.aligned(state)
        mass, noise = [], []
        level = float("nan")
        for e in numbers:
            found = self.registered(e)
            mass.append(float(found.numbers["mass"]))
            noise.append(float(found.numbers["variance"]) / float(found.numbers["magnification"]) ** 2)
            if e == state.reference:
                level = float(found.numbers["template_level"])
        if self.single and items and state.reference in numbers:
            look = self._placed_look(state, items, numbers)
            mass, noise = look.mass[numbers].tolist(), look.variance[numbers, 0].tolist()
            assert state.reference is not None
            level = float(look.mass[state.reference]) * self.series.scans[state.reference].pixel_size_nm * 1e-7
        require_energies(items)
        if state.reference is None or state.reference not in numbers:
            raise XanesTomoError("maps: expected the reference energy to be registered; see its status")
        k = numbers.index(state.reference)
        voxel_nm = self.series.scans[state.reference].pixel_size_nm
        spectrum = np.array(mass) / mass[k] * level * 1e7 / voxel_nm
        energies = self.series.energies_ev[numbers]
        areal = items[k].scan.given == "images"
        references, unread = read_recipe_references(p)
        plan = plan_maps(energies, spectrum, np.array(noise) / noise[k], k, p, areal=areal, references=references)
        lost = [f"{v:g}" for e, v in enumerate(self.series.energies_ev) if e not in numbers]
        absent = dict(plan.absent) | unread
        for element in bracketed_elements(self.series.energies_ev) if lost else ():
            if p.elements is None and element not in (*plan.elements, *absent):
                absent[element] = f"without {', '.join(lost)} eV, which could not be used, nothing brackets its K edge"
        return replace(plan, absent=absent), items, voxel_nm

    def voxel_table(self, parameters: MapsParameters | None = None) -> VoxelTable:
        """Say what voxels of several sizes would be worth, from some rows in the middle; nothing is kept.

        Parameters
        ----------
        parameters : MapsParameters, optional
            The recipe's unless given.

        Raises
        ------
        XanesTomoError
            The energies are not registered, or cannot be mapped.
        """
        p = self.recipe.maps if parameters is None else parameters
        plan, items, pixel_nm = self.map_plan(parameters=p)
        choices = voxel_choices(items, plan.without_single(), pixel_nm, p, rows=_TABLE_ROWS)
        return VoxelTable(choices, _voxel_px(items, choices, p), _mean_spectrum(plan, items))

    def _make_maps(self, state: State, progress: Progress) -> StepResult:
        plan, items, pixel_nm = self.map_plan(state)
        p = self.recipe.maps
        checks: MapChecks | None = None
        if items[0].variance is None:
            plan, checks = check_maps(items, plan, pixel_nm, p, edge_ev=surface_effect(plan).edge_ev)
        choices = voxel_choices(items, plan.without_single(), pixel_nm, p, rows=_TABLE_ROWS)
        volumes = items[0].variance is not None
        px = _voxel_px(items, choices, p)
        voxel_nm = px * pixel_nm
        height, width = (max(1, n // px) for n in self.series.frame_shape)
        specs = [
            MapSpec(
                name,
                plan.unit(name),
                _describe(name, plan.areal),
                0.0 if name in ("mask", "coverage") else p.smoothing_voxel,
                plan.about(name, p, self.recipe.registration.blur_px, px),
            )
            for name in plan.names
        ]
        unit = state[("maps", None)]
        y0, y1, c0, c1 = _map_window(state.manual.boxes, *self.series.frame_shape)
        y0, y1, c0 = y0 // px, min(height, -(-y1 // px)), min(c0 // px, (width - 1) // 2)
        c1 = width - c0
        depth = len(items[0].scan) if volumes else c1 - c0
        c0, c1 = (0, width) if volumes else (c0, c1)
        store = MapStore(
            self.output.maps,
            (y1 - y0, depth, c1 - c0),
            voxel_nm,
            specs,
            slab_rows=SLAB_ROWS,
            key=parameter_key(unit.parameter_key, unit.input_key, *plan.reference_keys),
        )
        store.create()
        pending = store.pending()
        halo = halo_rows(p)
        done = len(store.slabs) - len(pending)
        progress("maps", done, len(store.slabs))
        per_slab = slab_bytes(plan, SLAB_ROWS + 2 * halo, width, len(items[0].scan), px)
        workers = self.execution.workers(len(pending), per_slab, self.memory_bytes)
        shared = SlabWork(tuple(items), plan, voxel_nm, p, store, halo, (y0, c0, c1), px)
        with closing(self.execution.run(make_slab, shared, pending, workers)) as finished:
            for made in finished:
                done += made is not WAITING
                progress("maps", done, len(store.slabs))
        metadata = {
            "reference_ev": plan.reference_ev,
            "energies_left_out_ev": list(plan.left_out_ev),
            "scanned_edge_in_elements": checks is not None
            and isinstance(checks.followed, dict)
            and bool(checks.followed),
            **({} if checks is None else checks.numbers),
            "reconstruction": self._reconstructor().name,
            "attenuation": _TABLES[p.attenuation],
            "white_line_factors": {e: plan.white_lines.get(e, (p.white_line(e),))[0] for e in plan.elements},
            "white_line_factors_from_spectrum": {e: sigma for e, (_, sigma) in plan.white_lines.items()},
            "voxel_px": px,
            "voxel_choices": [asdict(c) for c in choices],
            "angular_limit_nm": None
            if volumes
            else angular_limit_nm(pixel_nm, np.asarray(items[0].scan.theta_deg), _width_px(choices)),
            "edge_half_ev": plan.edge_half_ev,
            "edge_jump_per_cm": plan.edge_jump,
            "energy_calibrated": p.energy_offset_ev is not None,
            "edge_measures": list(plan.measured),
            "references": {} if plan.mixture is None else {r.name: r.source for r in plan.references},
            "handedness": "not verified",
            "origin_voxel": [y0, c0, c0],
        }
        kept = store.finish(absent=dict(plan.absent), metadata=metadata)
        notes = [f"{name}: {why}" for name, why in plan.absent.items()]
        notes += () if checks is None else checks.notes
        if kept is not None:
            notes.append(f"the former maps are kept in {kept.name}")
        if p.reconstruction != "fbp" and not volumes:
            notes.append(
                f"reconstructed by {self._reconstructor().name}: the maps of sigma and the point spread that is stated "
                "are those of filtered back-projection"
            )
        numbers = {"absent": dict(plan.absent), "elements": list(plan.elements), "store_key": store.key, **metadata}
        numbers["mean_spectrum_per_cm"] = _mean_spectrum(plan, items)
        effect = surface_effect(plan).edge_ev
        numbers["edge_ev_per_px"] = [
            [float(i.scan.energy_ev), float(v)] for i, v in zip(items, effect, strict=True) if np.isfinite(v)
        ]
        made_with = next((c for c in choices if c.px == px), None)
        noise = float("nan") if made_with is None else made_with.noise_over_jump
        one = noise * plan.noise_over_jump
        if plan.measured and not one <= NOISE_WARNING:
            notes.append(
                f"noise / edge jump of one energy is {one:.2g}, above {NOISE_WARNING:g}: {', '.join(plan.measured)} "
                "are biased and err more than their sigma; edge_energy_relative is not, or take larger voxels"
            )
        numbers["noise_over_jump_of_one_energy"] = one
        notes += [
            f"{e}: the mean spectrum shows a white-line factor of {factor:.2f} +- {sigma:.2f}, which was taken; "
            f"declare one (white_line_factors: [{e}=...]) if it is known"
            for e, (factor, sigma) in plan.white_lines.items()
        ]
        notes += [
            f"{e}: the mean spectrum shows a white-line factor of {factor:.2f} +- {sigma:.2f}, but 1 was used, "
            f"and all amounts suffer; declare it (white_line_factors: [{e}={factor:.2f}]) if you agree"
            for e, (factor, sigma) in plan.white_lines_seen.items()
            if e not in plan.white_lines
        ]
        scores: tuple[Score, ...] = (
            (Score("noise / edge jump", noise, "", p.noise_limit),) if made_with is not None else ()
        )
        scores += () if checks is None else checks.scores
        return StepResult({}, numbers, Quality(scores, tuple(notes)))

    # ----------------------------------------------------------------------------------------------- tables

    def write_tables(self) -> None:
        """Write ``shifts.csv``, ``energies.csv`` and ``quality.csv`` from what counts now."""
        state = self.state
        raw = self.recipe.scan.bin
        shape = tuple(n * raw for n in self.series.frame_shape)
        alignments: list[Alignment | None] = []
        rows: list[EnergyRow] = []
        residual, verdicts, keys = [], [], []
        refilled: list[npt.NDArray[Any]] = []  # 1 where the maps fill a lost projection
        screened: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in (*SCREENED, *CHECKED)}
        left = self.error_map()
        scans = [self.scan(e) for e in range(len(self.series.scans))]
        for e, scan in enumerate(scans):
            found, status = None, "ok"
            for name in ("flats", "jitter", "registration"):
                unit = state[(name, e)]
                if unit.status == "failed":
                    status = f"excluded:{unit.reason}"
                elif unit.candidate is not None and unit.status != "stale" and name != "flats":
                    found = self._jitter(state, e) if name == "jitter" else self.registered(e)
            if found is None and status == "ok":
                status = "excluded:not aligned"
            alignment = None if found is None else alignment_of(found, scan)
            refilled.append(np.zeros(len(scan)))
            if alignment is not None and self.recipe.maps.fill_lost and not (scan.gridded or self.single):
                item = AlignedEnergy(scan, alignment, np.zeros((len(scan), 3)), fill_lost=True)
                refilled[-1][np.setdiff1d(item.members, item.used)] = 1
            score = np.full(len(scan), np.nan) if found is None else found.arrays["residual"]
            jitter = state[("jitter", e)]
            if jitter.candidate is not None and jitter.status != "stale":
                score = self.result(jitter.candidate).arrays["residual"]
            registered = found is not None and "magnification" in found.numbers
            if alignment is not None and not registered:
                # Not on the common grid: the shifts hold within this energy alone, and no magnification is known.
                alignment = replace(alignment, magnification=float("nan"), roll_deg=float("nan"))
            if alignment is not None and raw > 1:
                alignment = alignment.unbinned(raw, (shape[0], shape[1]))
            if alignment is not None and status != "ok":
                why = status
                alignment = replace(alignment, status=tuple(why if s == "ok" else s for s in alignment.status))
            alignments.append(alignment)
            rows.append(_energy_row(scan, alignment, found if registered else None, e == state.reference, status, raw))
            residual.append(score)
            flats = state[("flats", e)]
            seen = {} if flats.candidate is None or flats.status == "stale" else self.result(flats.candidate).arrays
            if jitter.candidate is not None and jitter.status != "stale":
                arrays = self.result(jitter.candidate).arrays
                seen = {**seen, **{name: arrays[name] for name in CHECKED if name in arrays}}
            for name, column in screened.items():
                column.append(seen.get(name, np.full(len(scan), np.nan)))
            verdicts += _verdicts(score, alignment, scan)
            keys += [(scan.energy_ev, float(t), i) for i, t in enumerate(scan.theta_deg)]
        series = replace(self.series, scans=tuple(scans))
        write_energies(self.output.energies, rows)
        if scans[0].gridded:  # there are no projections to have a row
            write_shifts(self.output.shifts, [])
            return
        write_shifts(self.output.shifts, shifts_rows(series, alignments, [r.status for r in rows]))
        energy, theta, frame = (np.array(c) for c in zip(*keys, strict=True))
        write_quality(
            self.output.quality,
            QualityTable(
                energy,
                theta,
                frame,
                {
                    "held_out_residual": np.concatenate(residual),
                    **{name: np.concatenate(column) for name, column in screened.items()},
                    **left.columns([len(s) for s in scans]),
                    **self.decomposition().columns([len(s) for s in scans]),
                    "filled": np.concatenate(refilled),
                },
                tuple(verdicts),
            ),
        )

    def close(self) -> None:
        """Give the output folder free."""
        self.output.close()

    def __enter__(self) -> Workflow:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _no_reference(self, state: State) -> str:
        wanted = self.recipe.registration.reference_ev
        if wanted is None:
            return self._nothing("jitter")
        e = reference_energy(self.series.energies_ev, wanted)
        why = state[("flats", e)].reason or state[("jitter", e)].reason
        return f"registration.reference_ev: the energy wanted cannot be used ({why}); choose another reference"

    def _nothing(self, name: str) -> str:
        reasons = [u.reason for (s, _), u in self.state.units.items() if u.status == "failed" and s in ("flats", name)]
        first = reasons[0] if reasons else "see the table of energies"
        return f"{step(name).title}: no energy got through: {first}"


def scan_source(journal: Journal) -> str | None:
    """Return what the scan of a run was opened from, as the journal has it."""
    noted = [e.payload.get("source") for e in journal.events if e.kind == "scan"]
    return str(noted[-1]) if noted and noted[-1] else None


_KEPT_AS = {
    "shift": np.float32, "moments": np.float32, "variance": np.float32, "residual_shift": np.float32,
    "residual_sigma": np.float16, "block_shift": np.float32, "block_sigma": np.float16,
    "sigma": np.float16, "residual": np.float16, "air_residual": np.float16,
    **dict.fromkeys(CHECKED, np.float32),
}  # fmt: skip


def scale_laws(series: Series, reference: int) -> dict[str, npt.NDArray[Any]]:
    """Return the magnification (energies,) by every law a series holds the numbers of: `scale.magnification_laws`."""
    return dict(
        magnification_laws(
            series.energies_ev,
            reference,
            pixel_nm=[s.pixel_size_nm for s in series.scans],
            header_nm=[s.header_pixel_size_nm for s in series.scans],
            zone_plate_um=[s.zone_plate_um for s in series.scans],
        )
    )


def _kept(name: str, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return an array in the precision it is kept in: 24 bits for what is applied, 11 for what is only judged by."""
    wanted = _KEPT_AS.get(name)
    if wanted is None or values.dtype != np.float64:
        return values
    size = np.abs(values[np.isfinite(values) & (values != 0)])
    if wanted is np.float16 and size.size and not (size.min() > 1e-4 and size.max() < 6e4):
        wanted = np.float32
    return values.astype(wanted)


def candidate_payload(
    journal: Journal, name: str, energy: int | None, unit: UnitState, result: StepResult, seconds: float
) -> dict[str, Any]:
    """Return the event of a result, its arrays stored; short, because there are many: see `state.candidates_in`."""
    scores = []
    for s in result.quality.scores:
        value = float(f"{s.value:.6g}")
        row = [s.name, value, s.unit, s.threshold, *(["higher"] if s.better == "higher" else [])]
        scores.append(row[:-1] if row[-1] is None else row)
    return {
        "step": name,
        "energy": energy,
        "parameter_key": unit.parameter_key,
        "input_key": unit.input_key,
        "scores": scores,
        "notes": list(result.quality.notes),
        "numbers": dict(result.numbers),
        "arrays": {k: journal.put_array(_kept(k, np.asarray(v)))["array"] for k, v in result.arrays.items()},
        "seconds": round(seconds, 3),
    }


_DESCRIPTIONS = {
    "morphology": "weighted mean of all aligned energies: the shape, with the least noise",
    "density": "sum of the mapped elements",
    "fraction": "atomic fraction among the mapped elements",
    "edge_energy_relative": "shift of the spectrum against the particle's mean, linear regression",
    "edge_energy": "edge_energy_relative + E(0.5) of the mean spectrum",
    "edge_jump": "step of the scanned edge",
    **{name: text for name, (_, text) in MEASURES.items()},
    "valence": "mean valence of the references, by their fractions",
    ARTEFACT: "what energies found to lie beside the others make of edge_energy_relative; it is not taken out",
    FLAG: f"1 where {ARTEFACT} is more than a standard error: valence contrast that misregistration explains",
    "mask": "1 inside the particle where every energy saw the voxel",
    "coverage": "part of all (energy, angle) pairs that saw the voxel",
}


_TABLES = {"elam": "Elam, Ravel & Sieber 2002, by xraydb", "chantler": "Chantler 2000, by xraydb"}


def _mean_spectrum(plan: MapPlan, items: Sequence[AlignedEnergy]) -> tuple[tuple[float, float, bool], ...]:
    left_out, energies = set(plan.left_out_ev), [float(i.scan.energy_ev) for i in items]
    return tuple((e, float(mu), e not in left_out) for e, mu in zip(energies, plan.spectrum, strict=True))


def _voxel_px(items: Sequence[AlignedEnergy], choices: Sequence[VoxelChoice], p: MapsParameters) -> int:
    return 1 if items[0].variance is not None else choose_voxel(choices, p)


_TABLE_ROWS = 8  # in the middle, for the table of voxel sizes


def _width_px(choices: Sequence[VoxelChoice]) -> float:
    """Width of the object in its middle rows, px: of a disk as large."""
    return 2 * float(np.sqrt(choices[0].voxels / _TABLE_ROWS / np.pi)) if choices else 0.0


def _describe(name: str, areal: bool = False) -> str:
    """Return one line about a map, or about one per area."""
    for end, what in (("_sigma_alignment", "part of the standard error that comes from the alignment"),
                      ("_sigma", "standard error: noise of the counts and alignment")):  # fmt: skip
        if name.endswith(end):
            return f"{name.removesuffix(end)}: {what}"
    if name.startswith("lcf_"):
        return f"fraction of the reference {name.removeprefix('lcf_')}: linear combination, none negative, of sum 1"
    what = "amount per area" if areal else "density"
    return _DESCRIPTIONS.get(name.split("_")[-1] if "fraction" in name else name, f"{what} of {name}")


@dataclass(frozen=True)
class SlabWork:
    """What every slab needs: small, picklable, no pixels in it."""

    energies: tuple[AlignedEnergy, ...]
    plan: MapPlan
    voxel_nm: float
    parameters: MapsParameters
    store: MapStore
    halo: int
    window: tuple[int, int, int]
    bin: int = 1


def make_slab(work: SlabWork, rows: tuple[int, int], threads: int) -> int:
    """Make and store one slab; `rows` count from the top of the maps. Runs here or on a worker of a cluster."""
    top, c0, c1 = work.window
    slab = Slab(rows[0] + top, rows[1] + top, work.halo)
    maps = map_slab(work.energies, work.plan, slab, work.voxel_nm, work.parameters, bin=work.bin, threads=threads)
    z = slice(None) if work.energies[0].variance is not None else slice(c0, c1)  # volumes keep their own depth
    work.store.write(rows[0], {name: m[:, z, c0:c1] for name, m in maps.items()})
    return rows[0]


def _map_window(boxes: Sequence[Box], height: int, width: int) -> tuple[int, int, int, int]:
    """Rows, and columns about the axis, that the maps cover: all, unless the user drew boxes."""
    if not boxes:
        return 0, height, 0, width
    y0, y1 = min(b[0] for b in boxes), max(b[1] for b in boxes)
    half = max(abs(v - width / 2) for b in boxes for v in b[2:])
    # A particle beside the axis is seen at any column up to its distance from it.
    c0 = max(0, int(np.floor(width / 2 - half)))
    return y0, y1, c0, width - c0


def read_recipe_references(p: MapsParameters) -> tuple[tuple[ReferenceSpectrum, ...], dict[str, str]]:
    """Read the reference spectra of a recipe; where one cannot be read, none count: {map: reason}."""
    found = []
    for item in p.reference_files:
        try:
            spectrum = read_reference(item.file, item.group)
        except XanesTomoError as error:
            names = [f"lcf_{r.name}" for r in p.reference_files]
            valence = ["valence"] if all(r.valence is not None for r in p.reference_files) else []
            return (), dict.fromkeys((*names, *valence), str(error))
        found.append(replace(spectrum, name=item.name, valence=item.valence))
    return tuple(found), {}


def _check_recipe(recipe: Recipe | None, series: Series) -> None:
    """Refuse a recipe that cannot work for this measurement, before anything is computed or written."""
    if recipe is None:
        return
    reference_energy(series.energies_ev, recipe.registration.reference_ev)
    elements = recipe.maps.elements or ()
    for element in (*elements, *([] if recipe.maps.scanned_edge is None else [recipe.maps.scanned_edge])):
        edge_energy_ev(element)


def _files(series: Series) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Return the name of every file of the measurement, and (n, 2) its size in bytes and time in ns (-1: not there)."""
    sources = [s for scan in series.scans for s in (scan.frames, *(f.frames for f in scan.flats))]
    paths = list(dict.fromkeys(Path(p) for source in sources for p in getattr(source, "paths", ())))
    stamps = np.full((len(paths), 2), -1, dtype=np.int64)
    for i, path in enumerate(paths):
        try:
            stat = path.stat()
        except (OSError, ValueError):
            continue
        stamps[i] = stat.st_size, stat.st_mtime_ns
    return [p.name for p in paths], stamps


def _changed_files(journal: Journal, names: Sequence[str], stamps: npt.NDArray[np.int64]) -> str:
    """Say which files are not what they were when the run began."""
    noted = next((e.payload for e in journal.events if e.kind == "scan"), None)
    if noted is None:
        return ""
    try:
        text = journal.get_array(noted["names"]).tobytes().decode("utf-8", "replace")
        then = dict(zip(text.split("\n"), journal.get_array(noted["stamps"]).tolist(), strict=True))
    except (XanesTomoError, KeyError, ValueError):
        return ""
    now = dict(zip(names, stamps.tolist(), strict=True))
    gone = [n for n, s in then.items() if s[0] >= 0 and now.get(n, [-1])[0] < 0]
    new = [n for n, s in now.items() if s[0] >= 0 and then.get(n, [-1])[0] < 0]
    other = [n for n, s in now.items() if s[0] >= 0 and then.get(n, s)[0] >= 0 and then.get(n, s) != s]
    parts = []
    for what, found in (("not there any more", gone), ("new", new), ("changed", other)):
        if found:
            parts.append(f"{what}: {', '.join(found[:3])}{f' and {len(found) - 3} more' if len(found) > 3 else ''}")
    return "; ".join(parts)


def _fingerprint(scan: EnergyScan) -> str:
    flats = [[f.frames.fingerprint(), list(f.status)] for f in scan.flats]
    theta = np.round(np.asarray(scan.theta_deg, dtype=float), 6).tolist()
    return parameter_key(scan.energy_ev, scan.frames.fingerprint(), list(scan.status), theta, flats)


def _within(progress: Progress, name: str, part: int, parts: int) -> Progress:
    """Count the work inside one energy as a part of the whole step."""

    def report(what: str, done: int, total: int) -> None:
        progress(name, round(1000 * (part + done / max(total, 1))), 1000 * parts)

    return report


def _energy_row(
    scan: EnergyScan, alignment: Alignment | None, found: StepResult | None, reference: bool, status: str, raw: int
) -> EnergyRow:
    pixel = scan.pixel_size_nm / raw
    if alignment is None:
        return EnergyRow(scan.energy_ev, pixel_size_nm=pixel, reference=reference, status=status)
    ok = np.array([s == "ok" for s in alignment.status]) | (status != "ok")
    use = ok & np.isfinite(alignment.shift[:, 1])
    center, sigma = float("nan"), float("nan")
    angles = np.asarray(scan.theta_deg, dtype=float)[use]
    if not scan.gridded and use.any() and np.ptp(angles) > 0.05:  # one angle tells nothing about an axis
        center, sigma = center_of_rotation(alignment.shift[use, 1], angles, alignment.sigma[use, 1])
    if found is None:
        return EnergyRow(
            scan.energy_ev, center_px=center, center_sigma_px=sigma, pixel_size_nm=pixel, reference=reference,
            status=status,
        )  # fmt: skip
    scale = alignment.magnification * raw
    ty, tx, tz = (float(v) * scale for v in found.numbers["translation_sigma"])
    return EnergyRow(
        scan.energy_ev, alignment.magnification, float(found.numbers["magnification_sigma"]), alignment.roll_deg,
        center, sigma, ty, tx, tz, pixel, reference, status,
    )  # fmt: skip


def _verdicts(score: npt.NDArray[Any], alignment: Alignment | None, scan: EnergyScan) -> list[str]:
    """``good``, ``check`` for a projection that stands out, or why it has no part in it."""
    status = scan.status if alignment is None else alignment.status
    finite = score[np.isfinite(score)]
    centre = np.median(finite) if len(finite) else 0.0
    spread = 1.4826 * np.median(np.abs(finite - centre)) + 1e-12 if len(finite) else 1.0
    out = []
    for s, value in zip(status, score, strict=True):
        if s != "ok":
            out.append(s)
        elif not np.isfinite(value):
            out.append("not judged")
        else:
            out.append("check" if (value - centre) / spread > 5 else "good")
    return out
