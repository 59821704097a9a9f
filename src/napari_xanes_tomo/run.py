"""A run: what was asked for (a recipe), what happened (a journal), and the state that follows from the two.

Every result is a *candidate*: an event of the journal with its parameters, scores and arrays. Which candidate counts is
a *decision*, another event. Nothing is ever changed in place, so everything can be taken back, and a run that was
interrupted goes on where it stopped.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from psygnal import Signal

from ._version import __version__
from .edges import edge_energy_ev
from .io.atomic import atomic_write
from .io.journal import plain_json
from .io.store import (
    Journal,
    Output,
    open_output,
)
from .jitter_report import views_bytes, views_path
from .model import EnergyScan, Series, XanesTomoError
from .pixels import pixel_width, seen_as, usual_scan, with_known_pixels
from .recipe import SCALE_CHANGES, Recipe, check_flats, parameter_key
from .registration import reference_energy
from .single import is_single
from .state import (
    Box,
    Candidate,
    State,
    UnitState,
    active_events,
    candidates_in,
    check_events,
    resolve,
    undoable,
)
from .steps import (
    CHECKED,
    StepResult,
    step,
)

__all__ = ["Run", "begun_s", "candidate_payload", "fingerprint", "scan_source"]

log = logging.getLogger(__name__)


class Run:
    """A series, an output folder, a recipe; what was decided about its results. Nothing is computed here.

    Parameters
    ----------
    series : Series
    out : path
        Output folder; a new one, or one that holds the same run (it goes on).
    recipe : Recipe, optional
        By default the folder's own, or the standard one.
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
        source: str | Path | None = None,
    ) -> None:
        if not series.scans:
            raise XanesTomoError(f"{series.name}: expected at least one energy, got none")
        if not any(s.usable.any() for s in series.scans):
            raise XanesTomoError(f"{series.name}: expected projections that can be read, got none; see `inspect`")
        _check_recipe(recipe, series)
        self.single = is_single(series)
        self.series = series = with_known_pixels(series, images=self.single)
        self._source = None if source is None else str(Path(source).resolve())
        self.fingerprints = [fingerprint(s) for s in series.scans]
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

    def _note_scan(self, names: Sequence[str], stamps: npt.NDArray[np.int64]) -> None:
        """Write down what was odd about the measurement and which files it had: for the report, and for later."""
        payload = {
            "name": self.series.name,
            "source": self._source,
            "n_expected": list(self.series.n_expected),
            "problems": [asdict(p) for p in self.series.problems],
            "names": self.journal.put_array(np.frombuffer("\n".join(names).encode("utf-8", "replace"), dtype=np.uint8)),
            "stamps": self.journal.put_array(stamps),
            "begun_s": [t if np.isfinite(t) else None for t in map(begun_s, self.series.scans)],
        }
        known = [e.payload for e in self.journal.events if e.kind == "scan"]
        if known and payload["source"] is None:
            payload["source"] = known[-1].get("source")
        if not known or known[-1] != plain_json(payload, "scan"):
            self.journal.append("scan", payload)

    # ------------------------------------------------------------------------------------------------------- looking

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
        # Another thread may add an event, or change the recipe, meanwhile: what is kept is the state of these.
        recipe, events, known = self.recipe, self.journal.events, self._state
        if known is None or known[:2] != (len(events), recipe):
            usual = usual_scan(self.series.scans)
            found = resolve(
                recipe, events, self.series.energies_ev.tolist(), self.fingerprints,
                usual=[pixel_width(s, usual) == 1.0 for s in self.series.scans],
            )  # fmt: skip
            known = self._state = (len(events), recipe, found)
        return known[2]

    def candidates(self, name: str, energy: int | None = None) -> list[Candidate]:
        """Return every result of a step (of one energy), oldest first."""
        return [c for c in self._candidates() if c.unit == (name, energy)]

    def _candidates(self) -> list[Candidate]:
        events, known = self.journal.events, self._made
        if known is None or known[0] != len(events):
            known = self._made = (len(events), candidates_in(events))
        return known[1]

    def result(self, candidate: Candidate) -> StepResult:
        """Return the numbers of a candidate, and its arrays, each of which is read when it is asked for."""
        arrays = _Arrays(self.journal, candidate.payload["arrays"])
        return StepResult(arrays, dict(candidate.payload["numbers"]), candidate.quality)

    def scan(self, energy: int) -> EnergyScan:
        """Return one energy with the user's exclusions applied."""
        return self.series.scans[energy].excluded(self.state.excluded.get(energy, {}))

    # ------------------------------------------------------------------------------------------------------ deciding

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
        if center_px is not None and not abs(center_px) <= self.series.scans[energy].frames.frame_shape[1]:
            raise XanesTomoError(f"rotation centre: expected a place inside the frame, got {center_px} px")
        self._manual("center", energy, value=None if center_px is None else float(center_px))

    def fix_magnification(self, energy: int, magnification: float | None) -> None:
        """Set the magnification of an energy instead of measuring it; None measures it again."""
        self._check_frame(energy, None)
        width = pixel_width(self.series.scans[energy], usual_scan(self.series.scans))
        if magnification is not None and not 0.2 < magnification * width < 5:
            raise XanesTomoError(f"magnification: expected a number near 1, got {magnification}")
        self._manual("magnification", energy, value=None if magnification is None else float(magnification))

    def name_change_point(self, energy: int, frame: int, present: bool = True) -> None:
        """Say that the sample was moved before projection `frame`, or (with `present` False) that it was not."""
        self._check_frame(energy, frame)
        self._manual("change_point", energy, frame=frame, present=bool(present))

    @property
    def boxes_scan(self) -> EnergyScan:
        """The energy that boxes are drawn on."""
        wanted = self.recipe.registration.reference_ev
        return self.series.scans[reference_energy(self.series.energies_ev, wanted)]

    def mask_of(self, energy: int, state: State | None = None) -> npt.NDArray[np.bool_] | None:
        """Return the pixels of an energy's frames that the user marked; None where none were."""
        marked = (self.state if state is None else state).manual.mask
        if marked is None:
            return None
        scan, usual = self.series.scans[energy], usual_scan(self.series.scans)
        mask = self.journal.get_array(marked).astype(bool)
        return seen_as(mask, scan.frames.frame_shape, pixel_width(scan, usual))

    def set_boxes(self, boxes: Iterable[Box]) -> None:
        """Work inside these boxes, ``(y0, y1, x0, x1)`` of a frame at the reference energy; none is the whole frame.

        In the pixels that most energies have, should the reference's be others.
        """
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

    def say_scale_change(self, value: str | None) -> None:
        """Say what the change of the particle's scale is: one of `SCALE_CHANGES`; None leaves it to the recipe."""
        if value is not None and value not in SCALE_CHANGES:
            raise XanesTomoError(f"scale change: expected {' or '.join(map(repr, SCALE_CHANGES))}, got {value!r}")
        self.journal.append("scale_change", {"energy": None, "value": value})
        self.changed.emit("registration", None)

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

    # ------------------------------------------------------------------------------------------------------- results

    def _chosen(self, state: State, name: str, energy: int) -> StepResult:
        candidate = state[(name, energy)].candidate
        assert candidate is not None
        return self.result(candidate)

    def _data_key(self, energy: int, state: State) -> str:
        candidate = state[("flats", energy)].candidate
        assert candidate is not None
        return candidate.key

    def _record(self, name: str, energy: int | None, unit: UnitState, result: StepResult, seconds: float) -> None:
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

    def _failed_now(self, name: str, energy: int | None) -> bool:
        """Whether a failure happened since this workflow was opened: one of an earlier session is worth another try."""
        later = self.journal.events[self._opened :]
        return any(e.kind == "failure" and e.payload["step"] == name and e.payload["energy"] == energy for e in later)

    def close(self) -> None:
        """Give the output folder free."""
        self.output.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Arrays(Mapping[str, npt.NDArray[Any]]):
    """Arrays of a candidate by their names, each read once, when it is first asked for.

    Floats come in double precision, whatever they are kept in.
    """

    def __init__(self, journal: Journal, stored: Mapping[str, Any]) -> None:
        self._journal, self._stored = journal, stored
        self._read: dict[str, npt.NDArray[Any]] = {}

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        if name not in self._read:
            a = self._journal.get_array(self._stored[name])
            self._read[name] = a.astype(np.float64) if a.dtype.kind == "f" else a
        return self._read[name]

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def begun_s(scan: EnergyScan) -> float:
    """Return when an energy was begun, s; NaN where nothing says."""
    known = scan.time_s[np.isfinite(scan.time_s)]
    return float(known.min()) if len(known) else float("nan")


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
        if s.red is not None:
            row = [s.name, value, s.unit, s.threshold, s.better, s.red]
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


def fingerprint(scan: EnergyScan) -> str:
    """Return what tells the frames, flats and angles of an energy from others."""
    flats = [[f.frames.fingerprint(), list(f.status)] for f in scan.flats]
    theta = np.round(np.asarray(scan.theta_deg, dtype=float), 6).tolist()
    return parameter_key(scan.energy_ev, scan.frames.fingerprint(), list(scan.status), theta, flats)
