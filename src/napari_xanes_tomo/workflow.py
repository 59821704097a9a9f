"""The workflow: all steps of a run, done in their order or one at a time.

The chain of classes is `run.Run` (recipe, journal, decisions), `findings.Findings` (what results say together),
`mapping.Mapper` (the step of the maps) and `Workflow`, which computes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .absorbance import Normalised
from .ahead import Ahead
from .differences import Probe, make_probe
from .given import given_flats, given_jitter, given_registration
from .io.store import (
    bring_back,
)
from .mapping import Mapper
from .model import Cancelled, Progress, XanesTomoError, no_progress
from .parallel import cores
from .pixels import pixel_width
from .recipe import parameter_key
from .registration import reference_energy
from .registration_step import run_registration
from .run_tables import write_tables
from .single import mean_image, single_jitter, single_registrations
from .state import (
    THRESHOLDS,
    State,
    UnitState,
    active_events,
)
from .steps import (
    STEPS,
    StepResult,
    alignment_of,
    angle_of,
    renormalise,
    run_flats,
    run_jitter,
    step,
)
from .template import Template, make_template, take

__all__ = ["StoppedByThreshold", "Workflow"]

log = logging.getLogger(__name__)

Acceptance = Literal["by hand", "thresholds"]
_Begun = tuple[StepResult | None, Normalised]  # what a unit begins with: the flats of its energy, or its absorbance


class StoppedByThreshold(XanesTomoError):
    """A run with ``on_fail: stop`` came to a result that does not pass; says what to look at."""


class Workflow(Mapper):
    """One run, computed. The GUI and the command line are two hands on it.

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

    _data: tuple[str, Normalised] | None = None
    _template: tuple[str, Template] | None = None
    _probe: tuple[Template, Probe | None] | None = None
    _hub: tuple[str, Template | None, list[float] | None] | None = None
    _images: tuple[str, dict[int, StepResult]] | None = None
    _ahead: tuple[tuple[str, Ahead[_Begun]], ...] = ()

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
        with closing(self.in_order([(name, e) for e in energies for name in names[: min(last, 1) + 1]])) as units:
            for name, e in units:
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
            others = (e for e in energies if e != state.reference)
            order = [state.reference, *sorted(others, key=lambda e: (hubs.get(e, -1), e))]
            with closing(self.in_order([("registration", e) for e in order])) as units:
                for k, (name, e) in enumerate(units):
                    self.run_unit(name, e, progress=_within(progress, name, k, len(order)))
                    self._judge(name, e, judged)
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

    def in_order(self, units: Sequence[tuple[str, int]]) -> Generator[tuple[str, int], None, None]:
        """Go through units of steps in their order, for `run_unit`; close it in the end.

        While one is computed, what the next one begins with - reading and normalising its energy - is done beside it.
        Nothing else is: results come, and are written down, in this order, and are those of one after the other.
        """
        try:
            for k, unit in enumerate(units):
                if cores() > 1:
                    self._look_ahead(units[k:])
                yield unit
        finally:
            for _, begun in self._ahead:
                begun.stop()
            self._ahead = ()

    def _look_ahead(self, units: Sequence[tuple[str, int]]) -> None:
        """Begin what the first of the units behind the present one begins with; only that, and the present's, go on."""
        state = self.state
        present = self._begins_with(*units[0], state)
        coming = ((energy, self._begins_with(name, energy, state)) for name, energy in units[1:])
        energy, following = next(((e, key) for e, key in coming if key not in (None, present)), (0, None))
        kept = {key: begun for key, begun in self._ahead if key in (present, following)}
        for key, begun in self._ahead:
            if key not in kept:
                begun.stop()
        if following is not None and following not in kept:
            make = self._flats_call if following.startswith("flats") else self._data_call
            with suppress(XanesTomoError):  # said when its turn comes
                kept[following] = Ahead(make(energy, state))
        self._ahead = tuple(kept.items())

    def _begins_with(self, name: str, energy: int, state: State) -> str | None:
        """Return the key of what a unit begins with; None where that is nothing, or at hand."""
        unit = state[(name, energy)]
        given = self.series.scans[energy].given or (self.single and name != "flats")
        failed = unit.status == "failed" and self._failed_now(name, energy)
        if given or not unit.input_key or failed or unit.status in ("candidate", "accepted"):
            return None
        if name == "flats":
            return f"flats {self._flats_key(energy, state)}"
        key = self._data_key(energy, state)
        return None if self._data is not None and self._data[0] == key else f"data {key}"

    def _begun(self, key: str, work: Callable[[Progress], _Begun], progress: Progress = no_progress) -> _Begun:
        """Return what `work` does, of the call that was begun ahead where there is one."""
        begun = dict(self._ahead).get(key)
        self._ahead = tuple((k, a) for k, a in self._ahead if k != key)
        return work(progress) if begun is None else begun.result(progress)

    def _beginning(self, name: str, energy: int | None, candidate: int) -> npt.NDArray[Any]:
        found = {c.id: c for c in self.candidates("jitter", energy)}
        if name != "jitter" or candidate not in found:
            raise XanesTomoError(f"initial: expected a result of the jitter correction out of {[*found]}")
        return self.result(found[candidate]).arrays["shift"]

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
            key = self._flats_key(energy, state)
            result, data = self._begun(f"flats {key}", self._flats_call(energy, state), progress)
            assert result is not None
            self._data = (key, data)
            return result
        if name == "jitter":
            flats, data = self._chosen(state, "flats", energy), self._normalised(energy, state)
            points = state.manual.change_points.get(energy, ())
            return run_jitter(
                scan, self.recipe, flats, data, change_points=points, initial=start, progress=progress
            )  # fmt: skip
        reference = state.reference
        assert reference is not None  # registration has an input key only with a reference
        template = self._reference_template(reference, state)
        hub = state.hubs.get(energy) if energy != reference else None
        second, hub_place = (None, None) if hub is None else self._hub_template(hub, reference, state)
        return self._registered(
            energy, reference, state, template, second=second, hub=hub, hub_place=hub_place,
            probe=self._probe_of(template), progress=progress,
        )  # fmt: skip

    def _registered(self, energy: int, reference: int, state: State, template: Template, **options: Any) -> StepResult:
        """Register one energy; options as in `run_registration`."""
        scan, first = self.scan(energy), self.series.scans[reference]
        fixed, size = state.manual.magnifications.get(energy), self.series.scans[energy].pixel_size_nm
        guess = first.pixel_size_nm / size if size > 0 else 1.0
        return run_registration(
            scan, self.recipe, self._jitter(state, energy), self._normalised(energy, state), template,
            magnification=guess if fixed is None else fixed, fixed=fixed is not None,
            pixel=pixel_width(scan, first), reference=energy == reference, **options,
        )  # fmt: skip

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
            found = {e: mean_image(self._normalised(e, state)) for e in ready}
            made = single_registrations(found, self.series, state.reference, self.recipe, progress=progress)
            self._images = (key, made)
        result = self._images[1][energy]
        if "failed" in result.numbers:
            raise XanesTomoError(str(result.numbers["failed"]))
        return result

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
        found = None if template is None else self._normalised(energy, state)
        return given_registration(scan, energy, reference, look, self._jitter(state, energy), found, template)

    def _hub_template(self, hub: int, reference: int, state: State) -> tuple[Template | None, list[float] | None]:
        """Return another energy as a template on the common grid, and where it was taken to lie; the last is kept."""
        parts = [state[("jitter", i)].candidate for i in (hub, reference)]
        keys = [None if c is None else c.key for c in parts]
        by_hand = [state.manual.jitter_part(i) for i in (hub, reference)]
        key = parameter_key(keys, by_hand, self.recipe.registration, state.manual.magnifications.get(hub))
        if self._hub is None or self._hub[0] != key:
            self._hub = None  # not beside the next one
            template = self._reference_template(reference, state)
            # Registered anew, the same way whichever energy comes first: its own result may know a second template.
            try:
                found = self._registered(hub, reference, state, template)
            except XanesTomoError:
                self._hub = (key, None, None)  # it says so itself when its turn comes
                return None, None
            data = self._normalised(hub, state)
            made = self._template_of(hub, found, data, like=template).second(*template.band(self.recipe.registration))
            self._hub = (key, made, list(found.numbers["place"]))
        return self._hub[1], self._hub[2]

    def _template_of(
        self, energy: int, found: StepResult, data: Normalised, *, like: Template | None = None
    ) -> Template:
        whole = alignment_of(found, self.scan(energy))
        known = np.isfinite(whole.shift[data.index]).all(axis=1)
        index = data.index[known]
        theta = np.asarray(self.series.scans[energy].theta_deg, dtype=float)[index] + angle_of(found)
        part = replace(whole, shift=whole.shift[index], sigma=whole.sigma[index], status=())
        return make_template(
            take(data.data, np.flatnonzero(known)), theta, part, bin=data.bin, frame_shape=data.frame_shape, like=like
        )  # fmt: skip

    def _normalised(self, energy: int, state: State) -> Normalised:
        """One energy as absorbance; the last one asked for is kept."""
        key = self._data_key(energy, state)
        if self._data is None or self._data[0] != key:
            self._data = None  # not beside the next one
            self._data = (key, self._begun(f"data {key}", self._data_call(energy, state))[1])
        return self._data[1]

    def _data_call(self, energy: int, state: State) -> Callable[[Progress], _Begun]:
        """Return what reads one energy again."""
        again = partial(
            renormalise, self.scan(energy), self.recipe, self._chosen(state, "flats", energy),
            self._confinement(energy, state), number=energy, around=self._scans,
        )  # fmt: skip
        return lambda progress: (None, again(progress=progress))

    def _flats_key(self, energy: int, state: State) -> str:
        unit = state[("flats", energy)]
        return parameter_key("flats", unit.parameter_key, unit.input_key)

    def _flats_call(self, energy: int, state: State) -> Callable[[Progress], _Begun]:
        """Return what does the step of the flats, with the absorbance it leaves."""
        call = partial(
            run_flats, self.scan(energy), self.recipe, self._confinement(energy, state), number=energy,
            around=self._scans, use=state.manual.flats.get(energy),
        )  # fmt: skip
        return lambda progress: call(progress=progress)

    def _reference_template(self, reference: int, state: State) -> Template:
        candidate = state[("jitter", reference)].candidate
        assert candidate is not None
        key = parameter_key(candidate.key, state.manual.jitter_part(reference))
        if self._template is None or self._template[0] != key:
            data = self._normalised(reference, state)
            made = self._template_of(reference, self._jitter(state, reference), data)
            self._template = (key, made)
        return self._template[1]

    def write_tables(self) -> None:
        """Write ``shifts.csv``, ``energies.csv`` and ``quality.csv`` from what counts now."""
        write_tables(self)

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


def _within(progress: Progress, name: str, part: int, parts: int) -> Progress:
    """Count the work inside one energy as a part of the whole step."""

    def report(what: str, done: int, total: int) -> None:
        progress(name, round(1000 * (part + done / max(total, 1))), 1000 * parts)

    return report
