"""What happened and where things stand, in words for people. No Qt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from napari_xanes_tomo.io.store import Event
from napari_xanes_tomo.state import Manual, State, Unit, quality_of, undoable
from napari_xanes_tomo.steps import STEPS, step
from napari_xanes_tomo.workflow import Workflow

__all__ = ["decision_name", "event_text", "manual_rows", "stale_reason"]

_NAMES = {
    "decision": "Acceptance",
    "exclude": "Exclusion of a projection",
    "restore": "Return of a projection",
    "exclude_energy": "Exclusion of an energy",
    "restore_energy": "Return of an energy",
    "nudge": "Nudge",
    "center": "Rotation centre",
    "magnification": "Magnification",
    "change_point": "Change point",
    "boxes": "Particle boxes",
    "mask": "Mask",
    "flats": "Flats",
    "scale_change": "Change of scale",
}


def decision_name(kind: str) -> str:
    """Return what a kind of decision is called."""
    return _NAMES.get(kind, kind)


def _energy(energies_ev: Sequence[float], energy: object) -> str:
    if isinstance(energy, int) and 0 <= energy < len(energies_ev):
        return f"{energies_ev[energy]:g} eV"
    return "all energies"


def event_text(event: Event, energies_ev: Sequence[float], number: int | None = None) -> str:
    """Return one event of the journal in a line; `number`, of the event it speaks of, stands for its own."""
    p: Any = event.payload
    where = _energy(energies_ev, p.get("energy"))
    kind = event.kind
    if kind == "candidate":
        text = f"{step(p['step']).title}, {where}: result #{event.seq}, {quality_of(p).verdict}"
    elif kind == "failure":
        text = f"{step(p['step']).title}, {where}: failed: {p['reason']}"
    elif kind == "decision":
        chosen = p["candidate"]
        by = f" by {p['by']}" if "by" in p else ""
        what = f"acceptance taken back{by}" if chosen is None else f"result #{chosen} accepted{by}"
        text = f"{step(p['step']).title}, {where}: {what}"
    elif kind == "exclude":
        text = f"{where}: projection {p['frame']} excluded ({p['reason']})"
    elif kind == "restore":
        text = f"{where}: projection {p['frame']} restored"
    elif kind == "exclude_energy":
        text = f"{where} excluded ({p['reason']})"
    elif kind == "restore_energy":
        text = f"{where} restored"
    elif kind == "nudge":
        text = f"{where}: projection {p['frame']} nudged by y {p['dy']:+g}, x {p['dx']:+g} px"
    elif kind == "center":
        value = p["value"]
        text = f"{where}: rotation centre {'as found' if value is None else f'set to {value:g} px'}"
    elif kind == "magnification":
        value = p["value"]
        text = f"{where}: magnification {'measured' if value is None else f'set to {value:.6g}'}"
    elif kind == "change_point":
        text = f"{where}: change point before projection {p['frame']} {'named' if p['present'] else 'removed'}"
    elif kind == "boxes":
        n = len(p["boxes"])
        text = "the whole frame is used" if not n else f"{n} particle box{'es' if n > 1 else ''} drawn"
    elif kind == "mask":
        text = "no mask" if p["mask"] is None else "a mask drawn"
    elif kind == "flats":
        text = f"{where}: flats {'as in the recipe' if p['use'] is None else p['use']}"
    elif kind == "scale_change":
        text = f"change of the particle's scale: {p['value'] or 'as in the recipe'}"
    elif kind == "note":
        text = f"note: {p['text']}"
    elif kind in ("undo", "redo"):
        text = f"{'taken back' if kind == 'undo' else 'holds again'}: event #{p['event']}"
    elif kind == "recipe":
        text = "other parameters asked for"
    elif kind == "parameters":
        text = "parameters noted"
    elif kind == "run":
        text = "run begun"
    elif kind == "scan":
        text = "measurement noted"
    else:
        text = kind
    return f"#{event.seq if number is None else number} {text}"


Take = Callable[[Workflow], None]


def manual_rows(manual: Manual, energies_ev: Sequence[float]) -> list[tuple[str, Take, tuple[int, int | None] | None]]:
    """Return the decisions by hand that hold: what they say, what takes each back, and where to look (or None)."""
    rows: list[tuple[str, Take, tuple[int, int | None] | None]] = []

    def add(text: str, take: Take, energy: int | None = None, frame: int | None = None) -> None:
        rows.append((text, take, None if energy is None else (energy, frame)))

    for e, why in sorted(manual.energies.items()):
        add(f"{_energy(energies_ev, e)} excluded ({why})", lambda w, e=e: w.restore(e), e)  # type: ignore[misc]
    for e, frames in sorted(manual.frames.items()):
        for f, why in sorted(frames.items()):
            text = f"{_energy(energies_ev, e)}: projection {f} excluded ({why})"
            add(text, lambda w, e=e, f=f: w.restore(e, f), e, f)  # type: ignore[misc]
    for e, nudges in sorted(manual.nudges.items()):
        for f, (dy, dx) in sorted(nudges.items()):
            text = f"{_energy(energies_ev, e)}: projection {f} nudged by y {dy:+g}, x {dx:+g} px"
            add(text, lambda w, e=e, f=f, y=dy, x=dx: w.nudge(e, f, -y, -x), e, f)  # type: ignore[misc]
    for e, value in sorted(manual.centers.items()):
        text = f"{_energy(energies_ev, e)}: rotation centre set to {value:g} px"
        add(text, lambda w, e=e: w.set_center(e, None), e)  # type: ignore[misc]
    for e, value in sorted(manual.magnifications.items()):
        text = f"{_energy(energies_ev, e)}: magnification set to {value:.6g}"
        add(text, lambda w, e=e: w.fix_magnification(e, None), e)  # type: ignore[misc]
    for e, points in sorted(manual.change_points.items()):
        for f in points:
            text = f"{_energy(energies_ev, e)}: change point before projection {f}"
            add(text, lambda w, e=e, f=f: w.name_change_point(e, f, False), e, f)  # type: ignore[misc]
    if manual.boxes:
        texts = ", ".join(f"rows {a}-{b - 1}, columns {c}-{d - 1}" for a, b, c, d in manual.boxes)
        add(f"particle box: {texts}", lambda w: w.set_boxes([]))
    if manual.mask is not None:
        add("a mask of pixels not to be trusted", lambda w: w.set_mask(None))
    for e, use in sorted(manual.flats.items()):
        add(f"{_energy(energies_ev, e)}: flats {use}", lambda w, e=e: w.choose_flats(e, None), e)  # type: ignore[misc]
    return rows


def stale_reason(state: State, unit: Unit, events: Sequence[Event], energies_ev: Sequence[float]) -> str:
    """Return why a unit is stale, in words; empty when it is not."""
    found = state[unit]
    candidate = found.candidate
    if found.status != "stale" or candidate is None:
        return ""
    name, energy = unit
    if candidate.parameter_key != found.parameter_key and candidate.input_key == found.input_key:
        return "other parameters are asked for"
    own: tuple[object, ...] = (energy, None, state.reference if step(name).needs_reference else None)
    if energy is None:
        own = (None, *range(len(energies_ev)))
    for event in reversed(events):
        if event.seq <= candidate.id:
            break
        kind = event.kind
        if kind in ("undo", "redo"):
            target = events[int(event.payload["event"]) - 1]
            if undoable(target) and target.payload.get("energy") in own:
                verb = "taken back" if kind == "undo" else "holds again"
                return f"since then: {event_text(target, energies_ev)} ({verb})"
        elif undoable(event) and kind != "decision" and event.payload.get("energy") in own:
            return f"since then: {event_text(event, energies_ev)}"
    before = [s for s in STEPS if s.name in step(name).upstream]
    listed = range(len(energies_ev)) if energy is None else [energy]
    for s in before:
        old = [e for e in listed if state[(s.name, e)].status in ("stale", "idle")]
        if old:
            return f"{s.title} comes first"
    return "what it was made from was made again or chosen anew"
