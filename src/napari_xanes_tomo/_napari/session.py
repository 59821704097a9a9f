"""The one run of a viewer: the scan it shows, the output folder, the `Workflow`; shared by all docks.

Docks call its methods and listen to its signals; they never see a thread. All subscriptions to the viewer are here, so
that a dock that disappears leaves nothing behind.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from qtpy.QtCore import QObject, Signal

from napari_xanes_tomo import compile_ahead
from napari_xanes_tomo.model import Progress, XanesTomoError
from napari_xanes_tomo.recipe import GivenParameters, Recipe
from napari_xanes_tomo.registration import reference_energy
from napari_xanes_tomo.state import State
from napari_xanes_tomo.steps import STEPS, step
from napari_xanes_tomo.workflow import Workflow

from .jobs import Jobs
from .layers import ScanLayer, scan_of
from .overlay import attach_overlay, frame_at, go_to, shown_scan, unwrapped
from .refine import given_with, opened_with, replace_scan
from .words import decision_name

__all__ = [
    "Session",
    "run_steps",
    "section_of",
    "session_of",
    "short_path",
    "suggest_output",
    "told_of_given",
    "units_of",
]

log = logging.getLogger(__name__)


def suggest_output(scan: ScanLayer) -> Path:
    """Return where the output of a scan goes unless the user says otherwise: ``~/xanes-tomo/<scan>``."""
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in scan.series.name).strip(".") or "scan"
    return Path.home() / "xanes-tomo" / name


def short_path(folder: Path) -> str:
    """Return a path as it is shown: ``~`` for the home folder."""
    home = Path.home()
    inside = folder.is_relative_to(home) and folder != home
    return str(Path("~") / folder.relative_to(home)) if inside else str(folder)


def run_steps(workflow: Workflow, name: str, energies: Sequence[int], progress: Progress) -> None:
    """Run step `name`, with the steps of the same energy it needs, for some energies; then write the tables.

    A step that needs the reference gets it first; one that is done once for all energies gets everything before it.
    """
    this = step(name)
    if not this.per_energy:
        workflow.run(until=name, progress=_overall(progress, name))
        return
    if this.needs_reference:
        energies = _reference_first(workflow, name, energies, progress)
    chain = [s.name for s in STEPS if s.name in this.upstream] + [name]
    parts = len(energies) * len(chain)

    def within(part: int, title: str) -> Progress:
        def report(what: str, done: int, total: int) -> None:
            progress(title, 1000 * part + round(1000 * done / max(total, 1)), 1000 * parts)

        return report

    with closing(workflow.in_order([(part, energy) for energy in energies for part in chain])) as units:
        for k, (part, energy) in enumerate(units):
            report = within(k, f"{step(part).title}, {workflow.series.scans[energy].energy_ev:g} eV")
            report(part, 0, 1)
            workflow.run_unit(part, energy, progress=report)
    workflow.write_tables()


def _reference_first(workflow: Workflow, name: str, energies: Sequence[int], progress: Progress) -> list[int]:
    """Do what the reference energy needs before step `name`; return the energies with the reference in front."""
    wanted = workflow.recipe.registration.reference_ev
    found = reference_energy(workflow.series.energies_ev, wanted)
    before = [s.name for s in STEPS if s.name in step(name).upstream]
    for part in before:
        progress(f"{step(part).title}, reference", 0, 1)
        workflow.run_unit(part, found)
    if any(workflow.state[(part, found)].status == "failed" for part in before) and wanted is None:
        workflow.run(until=before[-1], progress=_overall(progress, before[-1]))  # then another one is chosen
    reference = workflow.state.reference
    if reference is None:
        raise XanesTomoError(
            f"{step(name).title}: the reference energy, {workflow.series.energies_ev[found]:g} eV, cannot be used "
            f"({next((workflow.state[(p, found)].reason for p in before if workflow.state[(p, found)].reason), '?')})"
        )
    return [reference, *(e for e in energies if e != reference)]


def _overall(progress: Progress, until: str) -> Progress:
    """Count the stages of a whole run as one; what is reported never goes back."""
    stages = [("flats", "jitter"), ("registration",), ("maps",)]
    last = next(i for i, names in enumerate(stages) if until in names)
    reached = 0.0

    def report(what: str, done: int, total: int) -> None:
        nonlocal reached
        stage = next((i for i, names in enumerate(stages) if what in names), last)
        reached = max(reached, (stage + min(1.0, done / max(total, 1))) / (last + 1))
        progress(step(what).title if what in {s.name for s in STEPS} else what, round(10000 * reached), 10000)

    return report


class Session(QObject):
    """See the module's first lines. Made by `session_of`."""

    scan_changed = Signal()  # another scan, or none, is the viewer's
    workflow_changed = Signal()  # an output folder was opened or closed
    state_changed = Signal()  # something was computed or decided
    frame_changed = Signal(int, int)  # energy and projection the sliders stand at
    busy_changed = Signal(bool)
    progressed = Signal(str, int, int, float)
    told = Signal(str, bool)  # message for the user, whether it is an error
    out_changed = Signal(str)  # the output folder asked for
    asked_changed = Signal()  # the parameters asked for were replaced (a recipe was loaded, a run opened)

    drawn = Signal()  # a box or mask was drawn, or its layer came or went

    _relayed = Signal()

    def __init__(self, viewer: Any) -> None:
        super().__init__()
        self._viewer = weakref.ref(viewer)
        self._users: set[int] = set()
        self._layer: Callable[[], Any] = lambda: None
        self._frame = (-1, -1)
        self._state: State | None = None
        self._then: Callable[[Any], None] | None = None
        self._made: list[Workflow] = []  # being opened by a job
        self.box_layer: Callable[[], Any] = lambda: None
        self.mask_layer: Callable[[], Any] = lambda: None
        self._asked = Recipe()
        self._out = ""
        self.workflow: Workflow | None = None
        self.jobs = Jobs()
        self.jobs.progressed.connect(self.progressed)
        self.jobs.ended.connect(self._on_ended)
        self._relayed.connect(self._on_relayed)
        attach_overlay(viewer)
        compile_ahead.begin()
        viewer.dims.events.current_step.connect(self._on_dims)
        viewer.layers.events.inserted.connect(self._on_layers)
        viewer.layers.events.removed.connect(self._on_layers)
        viewer.layers.selection.events.active.connect(self._on_layers)
        self._on_layers()

    # ------------------------------------------------------------------------------------------------ the viewer

    @property
    def viewer(self) -> Any:
        """The viewer; None when it is gone."""
        return self._viewer()

    @property
    def layer(self) -> Any:
        """The scan layer this session works on, None without one."""
        return self._layer()

    @property
    def scan(self) -> ScanLayer | None:
        """The scan this session works on."""
        layer = self.layer
        return None if layer is None else scan_of(layer)

    @property
    def frame(self) -> tuple[int, int]:
        """Energy and projection the sliders stand at; (-1, -1) without a scan."""
        return self._frame

    def go_to(self, energy: int, angle: int) -> None:
        """Move the sliders to a projection."""
        if self.viewer is not None and self.layer is not None:
            go_to(self.viewer, self.layer, energy, angle)

    def on_drawn(self, event: Any = None) -> None:
        """Tell the docks that a box or mask was drawn."""
        self.drawn.emit()

    def _on_layers(self, event: Any = None) -> None:
        viewer, layer = self.viewer, self.layer
        if viewer is None:
            return
        self.on_drawn()
        here = layer is not None and any(x is layer for x in viewer.layers)
        if here and (self.workflow is not None or self.busy):
            return  # a run stays with its scan
        found = shown_scan(viewer)
        if found is not layer:
            if layer is not None and not here:
                self._leave()
            if layer is not None:
                layer.events.metadata.disconnect(self._on_refined)
            if found is not None:
                found.events.metadata.connect(self._on_refined)
            self._layer = (lambda: None) if found is None else weakref.ref(found)
            self._frame = (-1, -1)
            scan = self.scan
            self.set_out("" if scan is None else short_path(suggest_output(scan)))
            self.scan_changed.emit()
        self._on_dims()

    def _on_refined(self, event: Any = None) -> None:
        """Tell the docks that the headers of the scan were read."""
        if self.workflow is None and not self.busy:
            self.scan_changed.emit()

    def _on_dims(self, event: Any = None) -> None:
        viewer, layer = self.viewer, self.layer
        if viewer is None or layer is None:
            return
        frame = frame_at(viewer, layer)
        if frame != self._frame:
            self._frame = frame
            self.frame_changed.emit(*frame)

    # -------------------------------------------------------------------------------------------------- the run

    @property
    def busy(self) -> bool:
        """Whether something is running."""
        return self.jobs.busy

    @property
    def state(self) -> State | None:
        """The state of the run, from its recipe and journal; None without an output folder."""
        if self.workflow is None:
            return None
        if self._state is None:
            self._state = self.workflow.state
        return self._state

    @property
    def recipe(self) -> Recipe:
        """The recipe of the run, the standard one without an output folder."""
        return Recipe() if self.workflow is None else self.workflow.recipe

    @property
    def asked(self) -> Recipe:
        """The recipe as the forms show it; it becomes the run's with the next Run."""
        return self._asked

    def ask(self, section: str, parameters: BaseModel) -> None:
        """Note what the form of a section of the recipe shows."""
        self._asked = self._asked.model_copy(update={section: parameters})

    @property
    def out(self) -> str:
        """The output folder asked for; that of the run where one is open."""
        return str(self.workflow.output.folder) if self.workflow is not None else self._out

    def set_out(self, out: str) -> None:
        """Ask for an output folder."""
        if out != self._out:
            self._out = out
            self.out_changed.emit(out)

    def load_recipe(self, path: str | Path) -> None:
        """Replace the parameters in all forms by those of a file."""
        try:
            recipe = Recipe.from_yaml(path)
            if self.workflow is not None and recipe.scan != self.workflow.recipe.scan:
                raise XanesTomoError(
                    f"recipe {Path(path).name}: its section `scan` reads the files differently than this run; "
                    "begin a new output folder for it"
                )
        except XanesTomoError as error:
            self._fail(str(error))
            return
        self._asked = recipe
        self.asked_changed.emit()
        self.told.emit(f"{Path(path).name} loaded; the forms show it, and the next Run works with it.", False)

    def save_recipe(self, path: str | Path) -> None:
        """Write the parameters that the forms show to a file."""
        try:
            Path(path).write_text(self._asked.to_yaml(), encoding="utf-8")
        except OSError as error:
            self._fail(f"recipe {Path(path).name}: cannot be written ({error.strerror}); choose another place")
            return
        self.told.emit(f"{Path(path).name} saved.", False)

    def open(self, out: str | Path) -> None:
        """Open an output folder: a new one, or one that holds a run of this scan, which goes on."""
        self._open(out, None, lambda: self.told.emit(self._opened_text(), False))

    def run(
        self, name: str, energies: Sequence[int], section: BaseModel | None, out: str | Path, *, again: bool = False
    ) -> None:
        """Run one step for some energies with the parameters that the forms show.

        Where the output folder holds a run that is not open yet, that run is opened instead, so that its parameters can
        be looked at first.

        Parameters
        ----------
        name : str
            The step.
        energies : sequence of int
            Not used by a step that is done once.
        section : BaseModel or None
            Parameters of the step; those asked for unless given.
        out : path
            Used when no folder is open.
        again : bool
            Take acceptances back first.
        """
        if section is not None:
            self.ask(section_of(name), section)
        workflow, asked = self.workflow, self._asked
        if workflow is None:
            if (Path(out).expanduser() / "journal.jsonl").exists():
                self.open(out)
                return
            self._open(out, asked, lambda: self.run(name, energies, section, out, again=again))
            return

        def work(progress: Progress) -> str:
            workflow.set_recipe(asked)
            if again:
                state = workflow.state
                for e in units_of(name, energies):
                    if state[(name, e)].status == "accepted":
                        workflow.revert(name, e)
            run_steps(workflow, name, energies, progress)
            return _outcome(workflow, name, energies)

        self._start(work, lambda text: self.told.emit(str(text), False))

    def go_on(self, energy: int, candidate: int) -> None:
        """Run the jitter correction of an energy again, beginning at a result such as a partial one."""
        workflow = self.workflow
        if workflow is None:
            return

        def work(progress: Progress) -> str:
            workflow.run_unit("jitter", energy, initial=candidate, progress=progress)
            workflow.write_tables()
            return _outcome(workflow, "jitter", [energy])

        self._start(work, lambda text: self.told.emit(str(text), False))

    def run_until(self, name: str, out: str | Path) -> None:
        """Run every step up to `name` for all energies with the parameters that the forms show."""
        scan = self.scan
        self.run(name, [] if scan is None else range(len(scan.series.scans)), None, out)

    def compute(self, work: Callable[[Progress], Any], then: Callable[[Any], None]) -> None:
        """Compute something to look at; `then` gets it on the GUI thread, unless it was cancelled or given up."""
        self._start(work, then)

    def cancel(self) -> None:
        """Stop what runs at its next safe point; what is finished stays."""
        self.jobs.cancel()

    def accept(self, name: str, chosen: Mapping[int | None, int]) -> None:
        """Let candidates count from now on: ``{energy: id of the candidate}``; the energy is None for the maps."""

        def decide(workflow: Workflow) -> None:
            for energy, candidate in chosen.items():
                workflow.accept(name, energy, candidate)

        self.decide(decide)

    def revert(self, name: str, energies: Sequence[int | None]) -> None:
        """Take the acceptance of a step back at some energies."""

        def decide(workflow: Workflow) -> None:
            for energy in energies:
                workflow.revert(name, energy)

        self.decide(decide)

    def decide(self, decision: Callable[[Workflow], Any], said: str = "") -> None:
        """Let the user decide something by hand: ``decision(workflow)``; then the tables are written anew."""
        workflow = self.workflow
        if workflow is None:
            self._fail("expected an output folder for decisions to be kept in; open one or run a step first")
            return
        if self.busy:
            self._fail("something is running; cancel it or wait for it, then decide")
            return
        try:
            decision(workflow)
        except (XanesTomoError, OSError) as error:
            self._fail(str(error))
            return
        self._start(lambda progress: workflow.write_tables(), lambda _: self.told.emit(said, False) if said else None)

    def undo(self) -> None:
        """Take the last decision back."""
        self._step_back(Workflow.undo, "taken back", "There is no decision to take back.")

    def redo(self) -> None:
        """Let the decision taken back last hold again."""
        self._step_back(Workflow.redo, "holds again", "There is nothing to bring back.")

    def _step_back(self, what: Callable[[Workflow], str | None], done: str, nothing: str) -> None:
        workflow = self.workflow
        if workflow is None or self.busy:
            self.told.emit("Something is running." if self.busy else nothing, False)
            return
        said: list[str | None] = []
        self.decide(lambda w: said.append(what(w)))
        kind = said[0] if said else None
        self._then = lambda _: self.told.emit(nothing if kind is None else f"{decision_name(kind)}: {done}.", False)

    # ----------------------------------------------------------------------------------------------- behind it

    def _start(self, work: Callable[[Progress], Any], then: Callable[[Any], None]) -> None:
        try:
            self.jobs.start(work)
        except XanesTomoError as error:
            self._fail(str(error))
            return
        self._then = then
        self.busy_changed.emit(True)

    def _on_ended(self, how: str, value: object) -> None:
        then, self._then = self._then, None
        self._state = None
        self.busy_changed.emit(False)
        self.state_changed.emit()
        if how == "done" and then is not None:
            then(value)
        elif how == "failed":
            self._fail(str(value))
        elif how == "cancelled":
            self.told.emit("Cancelled. What was finished is kept; Run goes on from there.", False)

    def _fail(self, message: str) -> None:
        from napari.utils.notifications import show_error

        self.told.emit(message, True)
        show_error(message)

    def _open(self, out: str | Path, recipe: Recipe | None, then: Callable[[], None]) -> None:
        scan = self.scan
        if scan is None:
            self._fail("expected a scan in this viewer, found none; open a scan script or a folder first")
            return
        folder = Path(out).expanduser().absolute()
        # One file made elsewhere may well lie in the folder its maps go to.
        raw = (scan.path if scan.series.scans[0].given else scan.folder).resolve()
        if folder.resolve().is_relative_to(raw):
            self._fail(f"{folder.name}: lies inside the folder of the raw data; choose another output folder")
            return

        made, asked = self._made, recipe or self._asked

        def work(progress: Progress) -> tuple[Workflow, ScanLayer]:
            info, wanted = scan, recipe
            if (folder / "journal.jsonl").exists() and (folder / "recipe.yaml").exists():
                wanted = None
                read_as = Recipe.from_yaml(folder / "recipe.yaml")
            else:
                read_as = asked
            parameters = read_as.scan
            if scan.series.scans[0].given:
                if read_as.given != scan.given:
                    info = given_with(scan, read_as.given)
            elif parameters != scan.parameters or not scan.verified:
                info = opened_with(scan, parameters, progress)
            workflow = Workflow(info.series, folder, wanted, source=info.path)
            made.append(workflow)
            return workflow, info

        def opened(found: tuple[Workflow, ScanLayer]) -> None:
            workflow, info = found
            made.clear()
            if info is not scan:
                self._replace(info)
            self.workflow = workflow
            workflow.changed.connect(self._relay)
            self._state = None
            self._asked = workflow.recipe
            self.workflow_changed.emit()
            self.asked_changed.emit()
            self.state_changed.emit()
            then()

        self._start(work, opened)

    def _opened_text(self) -> str:
        assert self.workflow is not None
        begun = "Earlier run opened; its parameters are shown." if self.workflow.output.resumed else "New run begun."
        return " ".join([begun, *self.workflow.messages])

    def _replace(self, info: ScanLayer) -> None:
        """Show the scan as the run's recipe wants it read (binning, flips)."""
        layer = self.layer
        if layer is not None:
            with layer.events.metadata.blocker(self._on_refined):  # it is told with the run
                replace_scan(layer, info)
            layer.reset_contrast_limits()

    def _relay(self, name: str, energy: object) -> None:
        """Bring an event of the workflow, which may come from the job's thread, to the GUI thread."""
        self._relayed.emit()

    def _on_relayed(self) -> None:
        self._state = None
        self.state_changed.emit()

    def _leave(self) -> None:
        """Give the run up: cancel what works on it, close its folder once nothing does."""
        workflow, self.workflow, self._state, self._then = self.workflow, None, None, None
        if workflow is not None:
            workflow.changed.disconnect(self._relay)
        made = self._made
        self._made = []
        was_busy = self.busy

        def close() -> None:
            for one in ([] if workflow is None else [workflow]) + made:
                one.close()

        self.jobs.abandon(close)
        if was_busy:
            self.busy_changed.emit(False)
        if workflow is not None:
            self.workflow_changed.emit()
            self.state_changed.emit()

    # ------------------------------------------------------------------------------------------------- its users

    def join(self, user: int) -> None:
        """Count a dock in."""
        self._users.add(user)

    def release(self, user: int) -> None:
        """Count a dock out; with the last one the session ends."""
        self._users.discard(user)
        if not self._users:
            self.close()

    def close(self) -> None:
        """End the session: nothing runs, nothing is subscribed, the output folder is free."""
        self._leave()
        viewer = self.viewer
        if viewer is not None:
            viewer.dims.events.current_step.disconnect(self._on_dims)
            viewer.layers.events.inserted.disconnect(self._on_layers)
            viewer.layers.events.removed.disconnect(self._on_layers)
            viewer.layers.selection.events.active.disconnect(self._on_layers)
        layer = self.layer
        if layer is not None:
            layer.events.metadata.disconnect(self._on_refined)
        for key in [k for k, s in _sessions.items() if s is self]:
            del _sessions[key]


def section_of(name: str) -> str:
    """Return the section of the recipe that the dock of step `name` shows."""
    return "absorbance" if name == "flats" else name


def units_of(name: str, energies: Sequence[int]) -> list[int | None]:
    """Return the energies of the units of step `name`: None for a step that is done once."""
    return list(energies) if step(name).per_energy else [None]


def _outcome(workflow: Workflow, name: str, energies: Sequence[int]) -> str:
    """Return what to say after a run.

    Raises
    ------
    XanesTomoError
        Some energies failed; the first reason is told.
    """
    state = workflow.state
    this = step(name)
    chain = (*this.upstream, name) if this.per_energy else tuple(s.name for s in STEPS if s.per_energy)
    failed = [
        state[(s, e)].reason
        for e in energies
        for s in chain
        if state[(s, e)].status == "failed" and e not in state.manual.energies
    ]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        gone_on = "" if this.per_energy else "; the maps were made without it" if len(failed) == 1 else ""
        raise XanesTomoError(f"{failed[0]}{more}{gone_on}")
    if not this.per_energy:
        return f"{this.title}: done"
    left_out = sum(e in state.manual.energies for e in energies)
    done = len(energies) - left_out
    also = f", {left_out} excluded by hand" if left_out else ""
    return f"{this.title}: {done} energ{'y' if done == 1 else 'ies'} done{also}"


_sessions: dict[int, Session] = {}


def told_of_given(viewer: Any) -> GivenParameters:
    """Return what the recipe shown in the docks of a viewer says of what was aligned elsewhere."""
    viewer = unwrapped(viewer)
    session = _sessions.get(id(viewer))
    return session.asked.given if session is not None and session.viewer is viewer else GivenParameters()


def session_of(viewer: Any) -> Session:
    """Return the session of a viewer; made on first use."""
    viewer = unwrapped(viewer)
    key = id(viewer)  # a viewer compares by value
    if key not in _sessions or _sessions[key].viewer is not viewer:
        _sessions[key] = Session(viewer)
    return _sessions[key]
