"""The workflow: what was asked for (a recipe), what happened (a journal), and the state that follows from the two.

Every result is a *candidate*: an event of the journal with its parameters, scores and arrays. Which candidate counts is
a *decision*, another event. Nothing is ever changed in place, so everything can be taken back, and a run that was
interrupted goes on where it stopped.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from psygnal import Signal

from .absorbance import Normalised
from .agreement import center_of_rotation
from .edges import bracketed_elements, edge_energy_ev
from .io.journal import plain_json
from .io.store import (
    EnergyRow,
    Event,
    Journal,
    MapSpec,
    MapStore,
    Output,
    QualityTable,
    open_output,
    shifts_rows,
    write_energies,
    write_quality,
    write_shifts,
)
from .maps import AlignedEnergy, MapPlan, Slab, map_slab, plan_maps, require_energies
from .model import Alignment, Cancelled, EnergyScan, Progress, Quality, Score, Series, XanesTomoError, no_progress
from .recipe import Recipe, parameter_key
from .registration import Template, make_template, reference_energy
from .steps import (
    STEPS,
    Step,
    StepResult,
    alignment_of,
    renormalise,
    run_flats,
    run_jitter,
    run_registration,
    step,
)

__all__ = ["Candidate", "State", "Unit", "UnitState", "Workflow", "resolve"]

log = logging.getLogger(__name__)

Unit = tuple[str, int | None]
"""A step, and the number of the energy it is done for (None for a step done once)."""

SLAB_ROWS = 32


@dataclass(frozen=True)
class Candidate:
    """One result of one step, as the journal has it.

    Attributes
    ----------
    id : int
        Number of its event.
    unit : Unit
    parameter_key, input_key : str
        What it was made with and from.
    payload : mapping
        Scores, numbers, references to arrays.
    """

    id: int
    unit: Unit
    parameter_key: str
    input_key: str
    payload: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Identifies the result: the same parameters and inputs give the same result."""
        return parameter_key(self.unit[0], self.parameter_key, self.input_key)

    @property
    def quality(self) -> Quality:
        """The scores, with the verdict that follows from them."""
        scores = tuple(
            Score(
                s["name"],
                float("nan") if s["value"] is None else float(s["value"]),
                s["unit"],
                s["threshold"],
                s["better"],
            )
            for s in self.payload["scores"]
        )
        return Quality(scores, tuple(self.payload["notes"]))


@dataclass(frozen=True)
class UnitState:
    """Where one step of one energy stands.

    Attributes
    ----------
    status : {"idle", "candidate", "accepted", "stale", "failed"}
    parameter_key, input_key : str
        What a result made now would be made with and from; `input_key` is empty while something upstream is missing.
    candidate : Candidate or None
        The one that counts: the one accepted last, else the newest.
    reason : str
        Of a failure.
    """

    status: str
    parameter_key: str
    input_key: str
    candidate: Candidate | None = None
    reason: str = ""


@dataclass(frozen=True)
class State:
    """The state of all steps, resolved from recipe and journal.

    Attributes
    ----------
    units : dict of Unit to UnitState
    reference : int or None
        Number of the reference energy.
    excluded : dict of int to dict of int to str
        Energy number to projection number to reason, by decision of the user.
    """

    units: Mapping[Unit, UnitState]
    reference: int | None
    excluded: Mapping[int, Mapping[int, str]] = field(default_factory=dict)

    def __getitem__(self, unit: Unit) -> UnitState:
        return self.units[unit]

    def summary(self, name: str) -> dict[str, int]:
        """Return how many units of step `name` have which status."""
        out: dict[str, int] = {}
        for (s, _), u in self.units.items():
            if s == name:
                out[u.status] = out.get(u.status, 0) + 1
        return out


def resolve(
    recipe: Recipe, events: Iterable[Event], energies_ev: Sequence[float], fingerprints: Sequence[str]
) -> State:
    """Return the state that follows from a recipe and what happened.

    Parameters
    ----------
    recipe : Recipe
    events : iterable of Event
        The journal.
    energies_ev : sequence of float
    fingerprints : sequence of str
        One an energy, changing when its files change.

    Notes
    -----
    A unit is *stale* when the candidate that counts was made from other inputs than it would be made from now. One that
    was merely computed (not accepted) is stale as well when the recipe has other parameters by now; one that was
    accepted was accepted with its own parameters. Once it was made again from the present inputs, the newest counts.
    """
    made: dict[Unit, list[Candidate]] = {}
    chosen: dict[Unit, int] = {}
    failed: dict[Unit, tuple[str, str]] = {}
    excluded: dict[int, dict[int, str]] = {}
    for event in events:
        p = event.payload
        if event.kind == "candidate":
            unit = (str(p["step"]), None if p["energy"] is None else int(p["energy"]))
            made.setdefault(unit, []).append(
                Candidate(event.seq, unit, str(p["parameter_key"]), str(p["input_key"]), p)
            )
            failed.pop(unit, None)
        elif event.kind == "decision":
            unit = (str(p["step"]), None if p["energy"] is None else int(p["energy"]))
            if p["candidate"] is None:
                chosen.pop(unit, None)
            else:
                chosen[unit] = int(p["candidate"])
        elif event.kind == "failure":
            unit = (str(p["step"]), None if p["energy"] is None else int(p["energy"]))
            failed[unit] = (str(p["key"]), str(p["reason"]))
        elif event.kind == "exclude":
            excluded.setdefault(int(p["energy"]), {})[int(p["frame"])] = str(p["reason"])
        elif event.kind == "restore":
            excluded.get(int(p["energy"]), {}).pop(int(p["frame"]), None)

    units: dict[Unit, UnitState] = {}
    n = len(energies_ev)

    def settle(s: Step, e: int | None, input_key: str) -> None:
        unit: Unit = (s.name, e)
        parameters = parameter_key(*(getattr(recipe, name) for name in s.parameters))
        candidates = made.get(unit, [])
        accepted = next((c for c in candidates if c.id == chosen.get(unit)), None)
        best = accepted or (candidates[-1] if candidates else None)
        reason = ""
        key = parameter_key(s.name, parameters, input_key)
        if best is not None and best.input_key != input_key and candidates[-1].input_key == input_key:
            # What was accepted came from other inputs; it has been made again since.
            best, accepted = candidates[-1], None
        if unit in failed and failed[unit][0] == key and (best is None or best.key != key):
            status, reason, best = "failed", failed[unit][1], None
        elif best is None:
            status = "idle"
        elif not input_key or best.input_key != input_key or (accepted is None and best.parameter_key != parameters):
            status = "stale"
        else:
            status = "accepted" if accepted is not None else "candidate"
        units[unit] = UnitState(status, parameters, input_key, best, reason)

    def own(e: int) -> list[Any]:
        return [fingerprints[e], sorted(excluded.get(e, {}))]

    def upstream(s: Step, e: int) -> list[str] | None:
        keys = []
        for name in s.upstream:
            state = units[(name, e)]
            if state.candidate is None or state.status == "stale":
                return None
            keys.append(state.candidate.key)
        return keys

    def hopeless(name: str, e: int) -> bool:
        """Whether energy `e` cannot get through this step, because it or one before it failed."""
        return units[(name, e)].status == "failed" or any(hopeless(u, e) for u in step(name).upstream)

    reference: int | None = None
    for s in STEPS:
        if s.needs_reference:
            ready = [e for e in range(n) if upstream(s, e) is not None]
            reference = _reference(recipe, energies_ev, ready)
        if s.per_energy:
            for e in range(n):
                keys = upstream(s, e)
                ref = upstream(s, reference) if s.needs_reference and reference is not None else []
                if keys is None or ref is None or (s.needs_reference and reference is None):
                    settle(s, e, "")
                else:
                    settle(s, e, parameter_key(own(e), keys, ref))
        else:
            whole = [(e, upstream(s, e)) for e in range(n)]
            present = [[e, k] for e, k in whole if k is not None]
            open_ones = any(
                units[(name, e)].status in ("idle", "stale") and not hopeless(name, e)
                for e in range(n)
                for name in s.upstream
            )
            settle(s, None, parameter_key(present) if present and not open_ones else "")
    return State(units, reference, excluded)


def _reference(recipe: Recipe, energies_ev: Sequence[float], ready: Sequence[int]) -> int | None:
    """Choose the reference among the energies that got that far; the whole list says where the edges are."""
    if not ready:
        return None
    wanted = recipe.registration.reference_ev
    if wanted is not None:
        best = reference_energy(energies_ev, wanted)
        return best if best in ready else None
    order = list(ready)
    elements = bracketed_elements(energies_ev)
    if elements:
        last = max(edge_energy_ev(x) for x in elements)
        high = [e for e in order if energies_ev[e] >= last + 150.0]
        order = high or order
    return max(order, key=lambda e: (energies_ev[e], -e))


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
        threads: int | None = None,
    ) -> None:
        if not series.scans:
            raise XanesTomoError(f"{series.name}: expected at least one energy, got none")
        if not any(s.usable.any() for s in series.scans):
            raise XanesTomoError(f"{series.name}: expected projections that can be read, got none; see `inspect`")
        _check_recipe(recipe, series)
        self.series = series
        self.memory_bytes = memory_bytes
        self.threads = threads or os.cpu_count() or 1
        self.fingerprints = [_fingerprint(s) for s in series.scans]
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
            self.recipe = recipe or Recipe.from_yaml(self.output.recipe)
            self._note_scan(names, stamps)
        except BaseException:
            self.output.close()
            raise
        self.messages = self.output.messages
        self._data: tuple[str, Normalised] | None = None
        self._template: tuple[str, Template] | None = None
        for message in self.messages:
            log.warning(message)

    def _note_scan(self, names: Sequence[str], stamps: npt.NDArray[np.int64]) -> None:
        """Write down what was odd about the measurement and which files it had: for the report, and for later."""
        payload = {
            "name": self.series.name,
            "n_expected": list(self.series.n_expected),
            "problems": [asdict(p) for p in self.series.problems],
            "names": self.journal.put_array(np.frombuffer("\n".join(names).encode("utf-8", "replace"), dtype=np.uint8)),
            "stamps": self.journal.put_array(stamps),
        }
        known = [e.payload for e in self.journal.events if e.kind == "scan"]
        if not known or known[-1] != plain_json(payload, "scan"):
            self.journal.append("scan", payload)

    # ------------------------------------------------------------------------------------------------ looking

    @property
    def journal(self) -> Journal:
        """What happened so far."""
        return self.output.journal

    @property
    def state(self) -> State:
        """The state of every step, from recipe and journal."""
        return resolve(self.recipe, self.journal.events, self.series.energies_ev.tolist(), self.fingerprints)

    def candidates(self, name: str, energy: int | None = None) -> list[Candidate]:
        """Return every result of a step (of one energy), oldest first."""
        return [
            Candidate(e.seq, (name, energy), str(e.payload["parameter_key"]), str(e.payload["input_key"]), e.payload)
            for e in self.journal.events
            if e.kind == "candidate" and e.payload["step"] == name and e.payload["energy"] == energy
        ]

    def result(self, candidate: Candidate) -> StepResult:
        """Load the arrays and numbers of a candidate."""
        arrays = {k: self.journal.get_array(v) for k, v in candidate.payload["arrays"].items()}
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
                return alignment_of(self.result(candidate), self.scan(energy))
        return None

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

    def _decide(self, name: str, energy: int | None, candidate: int | None) -> None:
        self.journal.append("decision", {"step": name, "energy": energy, "candidate": candidate})
        self.changed.emit(name, energy)

    def exclude(self, energy: int, frame: int, reason: str = "by hand") -> None:
        """Leave a projection out from now on; what depends on it becomes stale."""
        self._check_frame(energy, frame)
        self.journal.append("exclude", {"energy": energy, "frame": frame, "reason": reason})
        self.changed.emit("flats", energy)

    def restore(self, energy: int, frame: int) -> None:
        """Take an exclusion back."""
        self._check_frame(energy, frame)
        self.journal.append("restore", {"energy": energy, "frame": frame})
        self.changed.emit("flats", energy)

    def _check_frame(self, energy: int, frame: int) -> None:
        if not 0 <= energy < len(self.series.scans) or not 0 <= frame < len(self.series.scans[energy]):
            raise XanesTomoError(f"expected a projection of this scan, got energy {energy}, frame {frame}")

    def set_recipe(self, recipe: Recipe) -> None:
        """Ask for other parameters; what was made with others becomes stale unless it was accepted."""
        if recipe != self.recipe:
            _check_recipe(recipe, self.series)
            self.output.change_recipe(recipe.to_yaml())
            self.recipe = recipe
            self.changed.emit("recipe", None)

    # ---------------------------------------------------------------------------------------------- running

    def run(self, *, until: str = "maps", progress: Progress = no_progress) -> State:
        """Do every step up to `until` that is not done yet.

        An energy that cannot be used is flagged and left out; the others go on.

        Parameters
        ----------
        until : {"flats", "jitter", "registration", "maps"}
        progress : callable
            See `Progress`. Raising `Cancelled` in it stops at the next safe point; what was finished stays.

        Raises
        ------
        XanesTomoError
            No energy got through a step, or the output cannot be written.
        Cancelled
            As raised by `progress`.
        """
        names = [s.name for s in STEPS]
        last = names.index(step(until).name)
        energies = range(len(self.series.scans))
        for e in energies:
            for name in names[: min(last, 1) + 1]:
                self.run_unit(name, e, progress=_within(progress, name, e, len(energies)))
        if last >= 2:
            state = self.state
            if state.reference is None:
                raise XanesTomoError(self._no_reference(state))
            order = [state.reference, *(e for e in energies if e != state.reference)]
            for k, e in enumerate(order):
                self.run_unit("registration", e, progress=_within(progress, "registration", k, len(order)))
        self.write_tables()
        if last >= 3:
            self.run_unit("maps", None, progress=progress)
        self.write_tables()
        return self.state

    def run_unit(self, name: str, energy: int | None = None, *, progress: Progress = no_progress) -> UnitState:
        """Do one step (of one energy) unless a result with these parameters and inputs exists; return its state.

        A step that cannot be done is recorded as failed, with its reason.
        """
        state = self.state
        unit = state[(name, energy)]
        if unit.status in ("candidate", "accepted", "failed") or not unit.input_key:
            return unit
        started = time.monotonic()
        try:
            result = self._compute(name, energy, state, progress)
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
        return self.state[(name, energy)]

    def _record(self, name: str, energy: int | None, unit: UnitState, result: StepResult, seconds: float) -> None:
        from . import __version__

        self.journal.append(
            "candidate",
            {
                "step": name,
                "energy": energy,
                "energy_ev": None if energy is None else self.series.scans[energy].energy_ev,
                "parameter_key": unit.parameter_key,
                "input_key": unit.input_key,
                "parameters": {s: getattr(self.recipe, s).model_dump(mode="json") for s in step(name).parameters},
                "scores": [
                    {"name": s.name, "value": s.value, "unit": s.unit, "threshold": s.threshold, "better": s.better}
                    for s in result.quality.scores
                ],
                "notes": list(result.quality.notes),
                "verdict": result.quality.verdict,
                "numbers": dict(result.numbers),
                "arrays": {k: self.journal.put_array(np.asarray(v)) for k, v in result.arrays.items()},
                "seconds": seconds,
                "versions": {"napari-xanes-tomo": __version__, "python": platform.python_version()},
            },
        )
        self.changed.emit(name, energy)

    def _compute(self, name: str, energy: int | None, state: State, progress: Progress) -> StepResult:
        if name == "maps":
            return self._make_maps(state, progress)
        assert energy is not None
        scan = self.scan(energy)
        if name == "flats":
            result, data = run_flats(scan, self.recipe, progress=progress)
            unit = state[(name, energy)]
            self._data = (parameter_key(name, unit.parameter_key, unit.input_key), data)
            return result
        flats = self._chosen(state, "flats", energy)
        data = self._normalised(energy, state, flats)
        if name == "jitter":
            return run_jitter(scan, self.recipe, flats, data, progress=progress)
        reference = state.reference
        assert reference is not None  # registration has an input key only with a reference
        template = self._reference_template(reference, state)
        jitter = self._chosen(state, "jitter", energy)
        size = [self.series.scans[i].pixel_size_nm for i in (reference, energy)]
        guess = size[0] / size[1] if size[1] > 0 else 1.0
        if energy == reference:
            data = self._normalised(energy, state, flats)
        return run_registration(
            scan,
            self.recipe,
            jitter,
            data,
            template,
            magnification=guess,
            reference=energy == reference,
            progress=progress,
        )

    def _chosen(self, state: State, name: str, energy: int) -> StepResult:
        candidate = state[(name, energy)].candidate
        assert candidate is not None
        return self.result(candidate)

    def _data_key(self, energy: int, state: State) -> str:
        candidate = state[("flats", energy)].candidate
        assert candidate is not None
        return candidate.key

    def _normalised(self, energy: int, state: State, flats: StepResult) -> Normalised:
        """One energy as absorbance; the last one asked for is kept."""
        key = self._data_key(energy, state)
        if self._data is None or self._data[0] != key:
            self._data = (key, renormalise(self.scan(energy), self.recipe, flats))
        return self._data[1]

    def _reference_template(self, reference: int, state: State) -> Template:
        candidate = state[("jitter", reference)].candidate
        assert candidate is not None
        if self._template is None or self._template[0] != candidate.key:
            data = self._normalised(reference, state, self._chosen(state, "flats", reference))
            whole = alignment_of(self.result(candidate), self.scan(reference))
            theta = np.asarray(self.series.scans[reference].theta_deg, dtype=float)[data.index]
            part = replace(whole, shift=whole.shift[data.index], sigma=whole.sigma[data.index], status=())
            made = make_template(data.data, theta, part, bin=data.bin, frame_shape=data.frame_shape)
            self._template = (candidate.key, made)
        return self._template[1]

    # ------------------------------------------------------------------------------------------------- maps

    def map_plan(self, state: State | None = None) -> tuple[MapPlan, list[AlignedEnergy], float]:
        """Return the plan of the maps, the energies that take part, and the voxel size in nm."""
        state = self.state if state is None else state
        items, mass, noise, numbers = [], [], [], []
        level = float("nan")
        for e in range(len(self.series.scans)):
            unit = state[("registration", e)]
            if unit.candidate is None or unit.status in ("stale", "failed"):
                continue
            found = self.result(unit.candidate)
            scan = self.scan(e)
            air = np.nan_to_num(self._chosen(state, "flats", e).arrays["air"])
            items.append(AlignedEnergy(scan, alignment_of(found, scan), air))
            mass.append(float(found.numbers["mass"]))
            noise.append(float(found.numbers["variance"]) / float(found.numbers["magnification"]) ** 2)
            numbers.append(e)
            if e == state.reference:
                level = float(found.numbers["template_level"])
        require_energies(items)
        if state.reference is None or state.reference not in numbers:
            raise XanesTomoError("maps: expected the reference energy to be registered; see its status")
        k = numbers.index(state.reference)
        voxel_nm = self.series.scans[state.reference].pixel_size_nm
        spectrum = np.array(mass) / mass[k] * level * 1e7 / voxel_nm
        energies = self.series.energies_ev[numbers]
        plan = plan_maps(energies, spectrum, np.array(noise) / noise[k], k, self.recipe.maps)
        lost = [f"{v:g}" for e, v in enumerate(self.series.energies_ev) if e not in numbers]
        absent = dict(plan.absent)
        for element in bracketed_elements(self.series.energies_ev) if lost else ():
            if self.recipe.maps.elements is None and element not in (*plan.elements, *absent):
                absent[element] = f"without {', '.join(lost)} eV, which could not be used, nothing brackets its K edge"
        return replace(plan, absent=absent), items, voxel_nm

    def _make_maps(self, state: State, progress: Progress) -> StepResult:
        plan, items, voxel_nm = self.map_plan(state)
        height, width = self.series.frame_shape
        p = self.recipe.maps
        specs = [
            MapSpec(
                name,
                plan.unit(name),
                _DESCRIPTIONS.get(name.split("_")[-1] if "fraction" in name else name, ""),
                0.0 if name in ("mask", "coverage") else p.smoothing_voxel,
            )
            for name in plan.names
        ]
        unit = state[("maps", None)]
        store = MapStore(
            self.output.maps,
            (height, width, width),
            voxel_nm,
            specs,
            slab_rows=SLAB_ROWS,
            key=parameter_key(unit.parameter_key, unit.input_key),
        )
        store.create()
        pending = store.pending()
        halo = int(np.ceil(4 * p.smoothing_voxel))
        done = len(store.slabs) - len(pending)
        progress("maps", done, len(store.slabs))
        per_slab = (SLAB_ROWS + 2 * halo) * width * (width * 3 * len(plan.components) + 180 * (len(specs) + 6)) * 4
        workers = max(1, min(self.threads, len(pending) or 1, int(self.memory_bytes // max(per_slab, 1))))
        inner = max(1, self.threads // workers)

        def make(rows: tuple[int, int]) -> None:
            maps = map_slab(items, plan, Slab(*rows, halo), voxel_nm, p, threads=inner)
            store.write(rows[0], maps)

        with ThreadPoolExecutor(workers) as pool:
            todo = list(pending)
            running: set[Future[None]] = set()
            try:
                while todo or running:
                    while todo and len(running) < workers:
                        running.add(pool.submit(make, todo.pop(0)))
                    finished, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in finished:
                        future.result()
                        done += 1
                        progress("maps", done, len(store.slabs))
            except BaseException:
                for future in running:
                    future.cancel()
                raise
        metadata = {
            "reference_ev": plan.reference_ev,
            "energies_left_out_ev": list(plan.left_out_ev),
            "attenuation": "Elam, Ravel & Sieber 2002, by xraydb",
            "edge_half_ev": plan.edge_half_ev,
            "edge_jump_per_cm": plan.edge_jump,
            "energy_calibrated": p.energy_offset_ev is not None,
            "handedness": "not verified",
        }
        kept = store.finish(absent=dict(plan.absent), metadata=metadata)
        notes = [f"{name}: {why}" for name, why in plan.absent.items()]
        if kept is not None:
            notes.append(f"the former maps are kept in {kept.name}")
        numbers = {"absent": dict(plan.absent), "elements": list(plan.elements), "store_key": store.key, **metadata}
        return StepResult({}, numbers, Quality((), tuple(notes)))

    # ----------------------------------------------------------------------------------------------- tables

    def write_tables(self) -> None:
        """Write ``shifts.csv``, ``energies.csv`` and ``quality.csv`` from what counts now."""
        state = self.state
        raw = self.recipe.scan.bin
        shape = tuple(n * raw for n in self.series.frame_shape)
        alignments: list[Alignment | None] = []
        rows: list[EnergyRow] = []
        residual, verdicts, keys = [], [], []
        scans = [self.scan(e) for e in range(len(self.series.scans))]
        for e, scan in enumerate(scans):
            found, status = None, "ok"
            for name in ("flats", "jitter", "registration"):
                unit = state[(name, e)]
                if unit.status == "failed":
                    status = f"excluded:{unit.reason}"
                elif unit.candidate is not None and unit.status != "stale" and name != "flats":
                    found = self.result(unit.candidate)
            if found is None and status == "ok":
                status = "excluded:not aligned"
            alignment = None if found is None else alignment_of(found, scan)
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
            verdicts += _verdicts(score, alignment, scan)
            keys += [(scan.energy_ev, float(t), i) for i, t in enumerate(scan.theta_deg)]
        write_shifts(self.output.shifts, shifts_rows(replace(self.series, scans=tuple(scans)), alignments))
        write_energies(self.output.energies, rows)
        energy, theta, frame = (np.array(c) for c in zip(*keys, strict=True))
        write_quality(
            self.output.quality,
            QualityTable(energy, theta, frame, {"held_out_residual": np.concatenate(residual)}, tuple(verdicts)),
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


_DESCRIPTIONS = {
    "density": "sum of the mapped elements",
    "fraction": "atomic fraction among the mapped elements",
    "edge_energy_relative": "shift of the spectrum against the particle's mean, linear regression",
    "edge_energy": "edge_energy_relative + E(0.5) of the mean spectrum",
    "edge_jump": "step of the scanned edge",
    "mask": "1 inside the particle where every energy saw the voxel",
    "coverage": "part of all (energy, angle) pairs that saw the voxel",
}


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
    center, sigma = center_of_rotation(alignment.shift[use, 1], scan.theta_deg[use], alignment.sigma[use, 1])
    if found is None:
        return EnergyRow(
            scan.energy_ev, center_px=center, center_sigma_px=sigma, pixel_size_nm=pixel, reference=reference,
            status=status,
        )  # fmt: skip
    ty, tx, tz = (float(v) * raw for v in found.numbers["translation_sigma"])
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


__all__ += ["Cancelled"]
