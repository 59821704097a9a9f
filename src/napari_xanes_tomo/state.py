"""The state of a run, resolved from what was asked for (a recipe) and what happened (the events of a journal).

Nothing here is kept in step by hand: the same recipe and events give the same state, after a crash or elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from .edges import bracketed_elements, edge_energy_ev
from .graph import contrast_islands, island_hubs
from .io.store import Event, Journal
from .model import Quality, Score, XanesTomoError
from .recipe import Recipe, parameter_key
from .registration import reference_energy
from .steps import STEPS, Step, step

__all__ = [
    "THRESHOLDS",
    "UNDOABLE",
    "Box",
    "Candidate",
    "Manual",
    "State",
    "Unit",
    "UnitState",
    "active_events",
    "candidates_in",
    "check_events",
    "quality_of",
    "resolve",
    "undoable",
]

THRESHOLDS = "thresholds"
"""In a decision's ``by``: it was taken by the scores, in a run without a user."""

Unit = tuple[str, int | None]
"""A step, and the number of the energy it is done for (None for a step done once)."""


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
        return quality_of(self.payload)

    @property
    def partial(self) -> bool:
        """Whether the search was cancelled: the best estimate until then, which counts only once it is accepted."""
        return bool(self.payload.get("numbers", {}).get("partial", False))


def quality_of(payload: Mapping[str, Any]) -> Quality:
    """Return the scores and notes of a candidate's event."""
    return Quality(tuple(_score(s) for s in payload.get("scores", ())), tuple(payload.get("notes", ())))


def _score(s: Any) -> Score:
    if isinstance(s, Mapping):  # as the first versions wrote them
        s = [s["name"], s["value"], s["unit"], s["threshold"], s["better"]]
    row: list[Any] = [*s]
    row += ["", None, "lower", None][len(row) - 2 :]
    name, value, unit, threshold, better, red = row
    return Score(name, float("nan") if value is None else float(value), unit, threshold, better, red)


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


Box = tuple[int, int, int, int]
"""``(y0, y1, x0, x1)``: rows and columns of a frame at the reference energy, ends not included."""

UNDOABLE = (
    "decision",
    "exclude",
    "restore",
    "exclude_energy",
    "restore_energy",
    "nudge",
    "center",
    "magnification",
    "change_point",
    "boxes",
    "mask",
    "flats",
    "scale_change",
)
"""Kinds of events that are decisions of the user and can be taken back."""


def undoable(event: Event) -> bool:
    """Whether an event is a decision of the user, to be taken back by `undo`."""
    return event.kind in UNDOABLE and event.payload.get("by") != THRESHOLDS


@dataclass(frozen=True)
class Manual:
    """What the user decided by hand; it survives every new run of the automatic steps.

    Attributes
    ----------
    frames : dict of int to dict of int to str
        Excluded projections: energy number to projection number to reason.
    energies : dict of int to str
        Excluded energies, with the reason.
    nudges : dict of int to dict of int to (float, float)
        ``(dy, dx)`` added to the displacement found, raw px, positive down / right.
    centers : dict of int to float
        Rotation axes that were set, raw px from the middle column.
    magnifications : dict of int to float
        Magnifications that were set instead of measured.
    change_points : dict of int to tuple of int
        Projections at which the sample was moved, by energy number.
    boxes : tuple of Box
        Particle boxes; none means the whole frame.
    mask : mapping or None
        Reference to a (y, x) array in the journal, True where the camera is not to be trusted.
    flats : dict of int to str
        Flats chosen by hand for an energy: a policy, or ``half N``.
    scale_change : str or None
        What the user takes the change of the particle's scale for; None leaves it to the recipe.
    """

    frames: Mapping[int, Mapping[int, str]] = field(default_factory=dict)
    energies: Mapping[int, str] = field(default_factory=dict)
    nudges: Mapping[int, Mapping[int, tuple[float, float]]] = field(default_factory=dict)
    centers: Mapping[int, float] = field(default_factory=dict)
    magnifications: Mapping[int, float] = field(default_factory=dict)
    change_points: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    boxes: tuple[Box, ...] = ()
    mask: Mapping[str, Any] | None = None
    flats: Mapping[int, str] = field(default_factory=dict)
    scale_change: str | None = None

    def data_part(self, energy: int) -> list[Any]:
        """Return what changes the pixels an energy is estimated from; part of the keys of its results."""
        out: list[Any] = [sorted(self.frames.get(energy, {}))]
        if self.boxes:
            out.append(["boxes", [list(b) for b in self.boxes]])
        if self.mask is not None:
            out.append(["mask", str(self.mask["array"])])
        if energy in self.flats:
            out.append(["flats", self.flats[energy]])
        return out

    def jitter_part(self, energy: int) -> list[Any]:
        """Return what changes the displacements taken over from the jitter step."""
        nudges = [[f, *d] for f, d in sorted(self.nudges.get(energy, {}).items())]
        center = self.centers.get(energy)
        return [nudges, center] if nudges or center is not None else []


def active_events(events: Iterable[Event]) -> list[Event]:
    """Return the events that hold: those taken back are left out, those restored are in again."""
    listed = list(events)
    undone: set[int] = set()
    for event in listed:
        if event.kind == "undo":
            undone.add(int(event.payload["event"]))
        elif event.kind == "redo":
            undone.discard(int(event.payload["event"]))
    return [e for e in listed if e.seq not in undone] if undone else listed


_NEEDED: Mapping[str, Mapping[str, tuple[type, ...]]] = {
    "candidate": {
        "step": (str,), "energy": (int, type(None)), "parameter_key": (str,), "input_key": (str,), "scores": (list,),
        "notes": (list,), "numbers": (dict,), "arrays": (dict,),
    },
    "parameters": {"key": (str,), "parameters": (dict,), "versions": (dict,)},
    "decision": {"step": (str,), "energy": (int, type(None)), "candidate": (int, type(None))},
    "failure": {"step": (str,), "energy": (int, type(None)), "key": (str,), "reason": (str,)},
    "exclude": {"energy": (int,), "frame": (int,), "reason": (str,)},
    "restore": {"energy": (int,), "frame": (int,)},
    "exclude_energy": {"energy": (int,), "reason": (str,)},
    "restore_energy": {"energy": (int,)},
    "nudge": {"energy": (int,), "frame": (int,), "dy": (int, float), "dx": (int, float)},
    "center": {"energy": (int,), "value": (int, float, type(None))},
    "magnification": {"energy": (int,), "value": (int, float, type(None))},
    "change_point": {"energy": (int,), "frame": (int,), "present": (bool,)},
    "boxes": {"boxes": (list,)},
    "mask": {"mask": (dict, type(None))},
    "flats": {"energy": (int,), "use": (str, type(None))},
    "scale_change": {"value": (str, type(None))},
    "undo": {"event": (int,)},
    "redo": {"event": (int,)},
}  # fmt: skip


def check_events(journal: Journal) -> None:
    """Raise where an event lacks what its kind needs, as after an edit by hand."""
    for event in journal.events:
        for name, kinds in _NEEDED.get(event.kind, {}).items():
            if name not in event.payload or not isinstance(event.payload[name], kinds):
                raise XanesTomoError(
                    f"{journal.path}: event {event.seq} ({event.kind}) lacks its {name}, or it is no "
                    f"{kinds[0].__name__}; restore the journal from a copy"
                )


def _unit(payload: Mapping[str, Any]) -> Unit:
    return str(payload["step"]), None if payload["energy"] is None else int(payload["energy"])


def candidates_in(events: Iterable[Event]) -> list[Candidate]:
    """Return every candidate among the events, oldest first, its parameters (noted once) in its payload."""
    noted: dict[str, Any] = {}
    out = []
    for event in events:
        p = event.payload
        if event.kind == "parameters":
            noted[str(p["key"])] = {k: p[k] for k in ("parameters", "versions")}
        elif event.kind == "candidate":
            key = str(p["parameter_key"])
            out.append(Candidate(event.seq, _unit(p), key, str(p["input_key"]), {**noted.get(key, {}), **p}))
    return out


def _manual(events: Iterable[Event]) -> Manual:
    frames: dict[int, dict[int, str]] = {}
    energies: dict[int, str] = {}
    nudges: dict[int, dict[int, tuple[float, float]]] = {}
    values: dict[str, dict[int, float]] = {"center": {}, "magnification": {}}
    points: dict[int, set[int]] = {}
    boxes: tuple[Box, ...] = ()
    mask: Mapping[str, Any] | None = None
    flats: dict[int, str] = {}
    change: str | None = None
    for event in events:
        p = event.payload
        if event.kind == "exclude":
            frames.setdefault(int(p["energy"]), {})[int(p["frame"])] = str(p["reason"])
        elif event.kind == "restore":
            frames.get(int(p["energy"]), {}).pop(int(p["frame"]), None)
        elif event.kind == "exclude_energy":
            energies[int(p["energy"])] = str(p["reason"])
        elif event.kind == "restore_energy":
            energies.pop(int(p["energy"]), None)
        elif event.kind == "nudge":
            of = nudges.setdefault(int(p["energy"]), {})
            y, x = of.get(int(p["frame"]), (0.0, 0.0))
            moved = (y + float(p["dy"]), x + float(p["dx"]))
            of[int(p["frame"])] = moved
            if moved == (0.0, 0.0):
                del of[int(p["frame"])]
        elif event.kind in values:
            if p["value"] is None:
                values[event.kind].pop(int(p["energy"]), None)
            else:
                values[event.kind][int(p["energy"])] = float(p["value"])
        elif event.kind == "change_point":
            at = points.setdefault(int(p["energy"]), set())
            (at.add if p["present"] else at.discard)(int(p["frame"]))
        elif event.kind == "boxes":
            boxes = tuple((int(a), int(b), int(c), int(d)) for a, b, c, d in p["boxes"])
        elif event.kind == "mask":
            mask = p["mask"]
        elif event.kind == "flats":
            flats.pop(int(p["energy"]), None)
            if p["use"] is not None:
                flats[int(p["energy"])] = str(p["use"])
        elif event.kind == "scale_change":
            change = None if p["value"] is None else str(p["value"])
    return Manual(
        frames,
        energies,
        nudges,
        values["center"],
        values["magnification"],
        {e: tuple(sorted(s)) for e, s in points.items() if s},
        boxes,
        mask,
        flats,
        change,
    )


@dataclass(frozen=True)
class State:
    """The state of all steps, resolved from recipe and journal.

    Attributes
    ----------
    units : dict of Unit to UnitState
    reference : int or None
        Number of the reference energy.
    manual : Manual
        Decisions of the user.
    hubs : dict of int to int
        The second energy that an energy is compared with, see `graph.island_hubs`. It is evidence only: what was
        found of an energy does not become stale when its hub changes.
    """

    units: Mapping[Unit, UnitState]
    reference: int | None
    manual: Manual = field(default_factory=Manual)
    hubs: Mapping[int, int] = field(default_factory=dict)

    @property
    def excluded(self) -> Mapping[int, Mapping[int, str]]:
        """Excluded projections: energy number to projection number to reason."""
        return self.manual.frames

    def __getitem__(self, unit: Unit) -> UnitState:
        return self.units[unit]

    def summary(self, name: str) -> dict[str, int]:
        """Return how many units of step `name` have which status."""
        out: dict[str, int] = {}
        for (s, _), u in self.units.items():
            if s == name:
                out[u.status] = out.get(u.status, 0) + 1
        return out


@dataclass(frozen=True)
class _History:
    """What events that hold say of every unit.

    Attributes
    ----------
    manual : Manual
    made : dict of Unit to list of Candidate
        In the order in which they were made.
    chosen : dict of Unit to (int, bool)
        Candidate that was accepted, and whether by hand.
    failed : dict of Unit to (str, str)
        Key of the last attempt that failed, and why; no result has come since.
    """

    manual: Manual
    made: Mapping[Unit, Sequence[Candidate]]
    chosen: Mapping[Unit, tuple[int, bool]]
    failed: Mapping[Unit, tuple[str, str]]

    @classmethod
    def of(cls, holding: Sequence[Event]) -> _History:
        made: dict[Unit, list[Candidate]] = {}
        chosen: dict[Unit, tuple[int, bool]] = {}
        failed: dict[Unit, tuple[str, str]] = {}
        for candidate in candidates_in(holding):
            made.setdefault(candidate.unit, []).append(candidate)
        for event in holding:
            p = event.payload
            if event.kind == "candidate":
                failed.pop(_unit(p), None)
            elif event.kind == "decision":
                unit = _unit(p)
                if p["candidate"] is None:
                    chosen.pop(unit, None)
                else:
                    chosen[unit] = (int(p["candidate"]), p.get("by") != THRESHOLDS)
            elif event.kind == "failure":
                failed[_unit(p)] = (str(p["key"]), str(p["reason"]))
        return cls(_manual(holding), made, chosen, failed)

    def settled(self, unit: Unit, parameters: str, input_key: str) -> UnitState:
        """Return where a unit stands that the recipe wants with `parameters`, and that has these inputs now."""
        name, energy = unit
        if energy is not None and energy in self.manual.energies:
            return UnitState("failed", parameters, "", None, self.manual.energies[energy])
        candidates = self.made.get(unit, ())
        number, by_hand = self.chosen.get(unit, (0, True))
        accepted = next((c for c in candidates if c.id == number), None)
        if accepted is not None and not by_hand and accepted.parameter_key != parameters:
            accepted = None  # nobody wanted these parameters instead of the recipe's
        candidates = [c for c in candidates if not c.partial]
        best = accepted or (candidates[-1] if candidates else None)
        if best is not None and (accepted is None or best.input_key != input_key):
            # Of what was made from the present inputs the newest counts: a decision taken back brings it back.
            fitting = [c for c in candidates if c.input_key == input_key]
            exact = [c for c in fitting if c.parameter_key == parameters]
            if fitting:
                best, accepted = (exact or fitting)[-1], None
        key = parameter_key(name, parameters, input_key)
        attempt, reason = self.failed.get(unit, ("", ""))
        if attempt == key and (best is None or best.key != key):
            return UnitState("failed", parameters, input_key, None, reason)
        if best is None:
            status = "idle"
        elif not input_key or best.input_key != input_key or (accepted is None and best.parameter_key != parameters):
            status = "stale"
        else:
            status = "accepted" if accepted is not None else "candidate"
        return UnitState(status, parameters, input_key, best, "")


def resolve(
    recipe: Recipe,
    events: Iterable[Event],
    energies_ev: Sequence[float],
    fingerprints: Sequence[str],
    *,
    usual: Sequence[bool] | None = None,
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
    usual : sequence of bool, optional
        Whether the pixels of an energy are as wide as those of most; the others are no reference unless asked for.

    Notes
    -----
    A unit is *stale* when the candidate that counts was made from other inputs than it would be made from now. One that
    was merely computed (not accepted) is stale as well when the recipe has other parameters by now; one that was
    accepted by hand was accepted with its own parameters; what the thresholds accepted follows the recipe. Where what
    was accepted came from other inputs, the newest result from the present ones counts.
    """
    history = _History.of(active_events(events))
    manual = history.manual
    units: dict[Unit, UnitState] = {}
    n = len(energies_ev)
    parameters_of = {s.name: parameter_key(*(getattr(recipe, name) for name in s.parameters)) for s in STEPS}

    def settle(s: Step, e: int | None, input_key: str) -> None:
        units[(s.name, e)] = history.settled((s.name, e), parameters_of[s.name], input_key)

    # Boxes are drawn on the reference energy, whichever the recipe says that is.
    frame_of_boxes = [reference_energy(energies_ev, recipe.registration.reference_ev)] if manual.boxes else []

    def own(e: int) -> list[Any]:
        return [fingerprints[e], *manual.data_part(e), *frame_of_boxes]

    def upstream(s: Step, e: int) -> list[Any] | None:
        keys: list[Any] = []
        for name in s.upstream:
            state = units[(name, e)]
            if state.candidate is None or state.status == "stale":
                return None
            keys.append(state.candidate.key)
            if name == "jitter" and manual.jitter_part(e):
                keys.append(manual.jitter_part(e))
        return keys

    def hopeless(name: str, e: int) -> bool:
        """Whether energy `e` cannot get through this step, because it or one before it failed."""
        return units[(name, e)].status == "failed" or any(hopeless(u, e) for u in step(name).upstream)

    reference: int | None = None
    hubs: dict[int, int] = {}
    for s in STEPS:
        if s.needs_reference:
            ready = [e for e in range(n) if upstream(s, e) is not None]
            alike = [e for e in ready if usual is None or usual[e]]
            wanted = recipe.registration.reference_ev
            sound = _sound(units, (alike or ready) if wanted is None else ready, recipe)
            reference = _reference(recipe, energies_ev, sound)
            hubs = _hubs(energies_ev, ready, reference)
        if s.per_energy:
            for e in range(n):
                keys = upstream(s, e)
                ref = upstream(s, reference) if s.needs_reference and reference is not None else []
                if keys is None or ref is None or (s.needs_reference and reference is None):
                    settle(s, e, "")
                else:
                    by_hand = [manual.magnifications.get(e)] if s.name == "registration" else []
                    points = [list(manual.change_points.get(e, ()))] if s.name == "jitter" else []
                    extra = [v for v in (*by_hand, *points) if v]
                    settle(s, e, parameter_key(own(e), keys, ref, *extra))
        else:
            whole = [(e, upstream(s, e)) for e in range(n)]
            present = [[e, k] for e, k in whole if k is not None]
            open_ones = any(
                units[(name, e)].status in ("idle", "stale") and not hopeless(name, e)
                for e in range(n)
                for name in s.upstream
            )
            said = [v for v in ([list(b) for b in manual.boxes], manual.scale_change) if v]
            settle(s, None, parameter_key(present, *said) if present and not open_ones else "")
    return State(units, reference, manual, hubs)


def _hubs(energies_ev: Sequence[float], ready: Sequence[int], reference: int | None) -> dict[int, int]:
    """Choose the second energy each one is compared with, among those that got that far."""
    if reference is None:
        return {}
    islands = _islands(tuple(energies_ev))
    chosen = island_hubs([islands[e] for e in ready], [energies_ev[e] for e in ready], list(ready).index(reference))
    return {ready[k]: ready[h] for k, h in chosen.items()}


@lru_cache(maxsize=16)
def _islands(energies_ev: tuple[float, ...]) -> tuple[int, ...]:
    return contrast_islands(energies_ev)


def _sound(units: Mapping[Unit, UnitState], ready: Sequence[int], recipe: Recipe) -> list[int]:
    """Leave out energies that would be a poor reference for all others, unless one is asked for or there are no others.

    Those with much fewer projections, or a much weaker particle, than the others have.
    """
    if recipe.registration.reference_ev is not None:
        return list(ready)

    def number(step_name: str, name: str, e: int) -> float:
        candidate = units[(step_name, e)].candidate
        value = None if candidate is None else candidate.payload.get("numbers", {}).get(name)
        return float("nan") if value is None else float(value)

    left = list(ready)
    for step_name, name, share in (("jitter", "projections", 0.75), ("flats", "object_od", 0.2)):
        values = {e: number(step_name, name, e) for e in left}
        known = sorted(v for v in values.values() if v == v)
        usual = known[len(known) // 2] if known else 0.0
        left = [e for e in left if not values[e] < share * usual] or left
    return left


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
