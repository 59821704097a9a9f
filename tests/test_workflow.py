from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_xanes_tomo import Recipe, Series, Workflow, open_series, read_maps, write_twin
from napari_xanes_tomo.execution import Threads
from napari_xanes_tomo.io.journal import Event, Journal
from napari_xanes_tomo.io.store import read_energies, read_quality, read_shifts, rows_alignments
from napari_xanes_tomo.model import Alignment, Cancelled, XanesTomoError
from napari_xanes_tomo.phantom import TwinParameters
from napari_xanes_tomo.recipe import (
    AbsorbanceParameters,
    JitterParameters,
    MapsParameters,
    RegistrationParameters,
    ScanParameters,
    parameter_key,
)
from napari_xanes_tomo.state import Manual, State, resolve

SMALL = TwinParameters(
    n=32, n_angles=12, energies_ev=(7704.0, 7728.0, 8178.0, 8570.0), grains=40, flats_per_set=3, jitter_px=(2.0, 4.0)
)
STEPS = ("flats", "jitter", "registration", "maps")
FAST = Recipe(
    jitter=JitterParameters(iterations=2),
    registration=RegistrationParameters(iterations=4),
    maps=MapsParameters(half_sets=False),
)


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_twin(tmp_path_factory.mktemp("small") / "twin", parameters=SMALL)


@pytest.fixture(scope="module")
def series(twin: Path) -> Series:
    return open_series(twin)


def outputs(out: Path) -> dict[str, Any]:
    """Tables as bytes and maps as arrays."""
    found: dict[str, Any] = {p.name: p.read_bytes() for p in sorted((out / "tables").iterdir())}
    maps = read_maps(out / "maps.ome.zarr")
    return found | {name: np.asarray(maps.data[name]) for name in maps.data}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert sorted(one) == sorted(other)
    for name, value in one.items():
        if isinstance(value, bytes):
            assert value == other[name], name
        else:
            np.testing.assert_array_equal(value, other[name], err_msg=name)


@pytest.fixture(scope="module")
def direct(series: Series, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an undisturbed run leaves behind."""
    out = tmp_path_factory.mktemp("direct") / "out"
    with Workflow(series, out, FAST) as w:
        w.run()
    return outputs(out)


def status(state: State, name: str) -> list[str]:
    return [u.status for (s, _), u in state.units.items() if s == name]


def candidates(w: Workflow) -> int:
    return sum(e.kind == "candidate" and not e.payload["numbers"].get("partial") for e in w.journal.events)


# ------------------------------------------------------------------------------------------------ resolve: the laws


class Runs:
    """A run without any work: every unit that can be made is made at once."""

    def __init__(self, n: int = 3, recipe: Recipe | None = None) -> None:
        self.recipe = recipe or Recipe()
        self.energies = [7704.0, 7728.0, 8178.0, 8570.0][-n:]
        self.prints = [f"files {i}" for i in range(n)]
        self.events: list[Event] = []

    @property
    def state(self) -> State:
        return resolve(self.recipe, self.events, self.energies, self.prints)

    def add(self, kind: str, **payload: Any) -> int:
        self.events.append(Event(len(self.events) + 1, "2026-01-01T00:00:00+00:00", kind, payload))
        return len(self.events)

    def make(self, name: str, energy: int | None) -> int | None:
        """Make a candidate where one is wanted; return its id."""
        unit = self.state[(name, energy)]
        if unit.status in ("candidate", "accepted", "failed") or not unit.input_key:
            return None
        return self.add(
            "candidate", step=name, energy=energy, parameter_key=unit.parameter_key, input_key=unit.input_key,
            scores=[], notes=[],
        )  # fmt: skip

    def fail(self, name: str, energy: int) -> None:
        unit = self.state[(name, energy)]
        key = parameter_key(name, unit.parameter_key, unit.input_key)
        self.add("failure", step=name, energy=energy, key=key, reason="nothing there")

    def run(self) -> list[tuple[str, int | None]]:
        """Do what `Workflow.run` does; return what was made."""
        made = []
        for name in STEPS:
            for e in [None] if name == "maps" else range(len(self.energies)):
                made += [(name, e)] if self.make(name, e) is not None else []
        return made

    def accept(self, name: str, energy: int | None, candidate: int | None) -> None:
        self.add("decision", step=name, energy=energy, candidate=candidate)


def test_an_empty_journal_is_idle() -> None:
    state = Runs().state
    assert {u.status for u in state.units.values()} == {"idle"}
    assert [k for k, u in state.units.items() if u.input_key] == [("flats", 0), ("flats", 1), ("flats", 2)]
    assert state.reference is None
    assert all(u.candidate is None for u in state.units.values())


def test_a_whole_run_and_nothing_twice() -> None:
    r = Runs()
    assert len(r.run()) == 3 * 3 + 1
    assert {u.status for u in r.state.units.values()} == {"candidate"}
    assert r.energies[r.state.reference or 0] == 8570.0
    assert r.run() == []


def test_redoing_makes_stale_what_depends_on_it_of_that_energy_alone() -> None:
    r = Runs()
    r.run()
    r.accept("jitter", 0, None)
    old = r.state[("jitter", 0)].candidate
    r.recipe = Recipe(jitter=JitterParameters(iterations=2))
    # All jitter asks for other parameters; only energy 0 is redone.
    assert status(r.state, "jitter") == ["stale"] * 3
    assert status(r.state, "flats") == ["candidate"] * 3
    for e in (1, 2):
        unit = r.state[("jitter", e)].candidate
        assert unit is not None
        r.accept("jitter", e, unit.id)
    assert status(r.state, "jitter") == ["stale", "accepted", "accepted"]
    assert status(r.state, "registration") == ["stale", "candidate", "candidate"]
    assert status(r.state, "maps") == ["stale"]
    assert r.run() == [("jitter", 0), ("registration", 0), ("maps", None)]
    assert old is not None
    assert any(e.seq == old.id for e in r.events)  # nothing is deleted


def test_redoing_the_reference_makes_every_registration_stale() -> None:
    r = Runs()
    r.run()
    for e in (0, 1):
        unit = r.state[("jitter", e)].candidate
        assert unit is not None
        r.accept("jitter", e, unit.id)
    r.recipe = Recipe(jitter=JitterParameters(iterations=2))
    assert status(r.state, "registration") == ["stale"] * 3
    assert r.run() == [("jitter", 2), *(("registration", e) for e in range(3)), ("maps", None)]


@pytest.mark.parametrize("kind", ["accepted", "merely made"])
def test_an_excluded_projection_concerns_its_energy_and_the_maps(kind: str) -> None:
    r = Runs()
    r.run()
    if kind == "accepted":
        for name, e in list(r.state.units):
            unit = r.state[(name, e)].candidate
            assert unit is not None
            r.accept(name, e, unit.id)
    before = r.state
    r.add("exclude", energy=0, frame=3, reason="blurred")
    fine = "accepted" if kind == "accepted" else "candidate"
    for name in ("flats", "jitter", "registration"):
        assert status(r.state, name) == ["stale", fine, fine]
    assert status(r.state, "maps") == ["stale"]
    assert r.state.excluded == {0: {3: "blurred"}}
    assert r.run() == [("flats", 0), ("jitter", 0), ("registration", 0), ("maps", None)]
    assert "stale" not in {u.status for u in r.state.units.values()}
    assert r.run() == []
    # Restored, its keys are what they were.
    r.add("restore", energy=0, frame=3)
    r.run()
    for unit, was in before.units.items():
        now = r.state[unit]
        assert now.input_key == was.input_key
        assert now.candidate is not None
        assert was.candidate is not None
        assert now.candidate.key == was.candidate.key


def test_an_older_candidate_can_be_accepted_and_the_decision_taken_back() -> None:
    r = Runs()
    r.run()
    first = r.state[("jitter", 1)].candidate
    assert first is not None
    r.recipe = Recipe(jitter=JitterParameters(iterations=2))
    r.run()
    second = r.state[("jitter", 1)].candidate
    assert second is not None
    assert second.id > first.id
    r.accept("jitter", 1, first.id)
    state = r.state
    assert state[("jitter", 1)].status == "accepted"
    assert state[("jitter", 1)].candidate == first
    assert status(state, "registration") == ["candidate", "stale", "candidate"]
    assert status(state, "maps") == ["stale"]
    r.accept("jitter", 1, None)
    state = r.state
    assert state[("jitter", 1)].candidate == second
    assert {u.status for u in state.units.values()} == {"candidate"}  # what was made from it counts again


def test_files_that_changed_make_stale() -> None:
    r = Runs()
    r.run()
    r.prints[1] = "other files"
    assert status(r.state, "flats") == ["candidate", "stale", "candidate"]
    assert status(r.state, "registration") == ["candidate", "stale", "candidate"]


@pytest.mark.parametrize("name", ["flats", "jitter", "registration"])
def test_a_failure_concerns_its_energy_and_the_maps_are_made_without_it(name: str) -> None:
    r = Runs()
    for earlier in STEPS[: STEPS.index(name)]:
        for e in range(3):
            r.make(earlier, e)
    r.fail(name, 0)
    r.run()
    state = r.state
    assert state[(name, 0)].status == "failed"
    assert state[(name, 0)].reason == "nothing there"
    assert status(state, "registration")[1:] == ["candidate"] * 2
    assert status(state, "maps") == ["candidate"]
    assert r.run() == []
    # Other parameters, another try.
    r.recipe = Recipe(
        absorbance=AbsorbanceParameters(air_margin_px=3),
        jitter=JitterParameters(iterations=1),
        registration=RegistrationParameters(iterations=3),
    )
    assert r.state[(name, 0)].status in ("idle", "stale")
    r.run()
    assert r.state[(name, 0)].status == "candidate"


def test_the_reference_is_the_highest_that_got_there() -> None:
    r = Runs(4)
    for e in range(4):
        r.make("flats", e)
    r.fail("jitter", 3)
    r.run()
    assert r.state.reference == 2
    wanted = Runs(4, Recipe(registration=RegistrationParameters(reference_ev=7728.0)))
    wanted.run()
    assert wanted.state.reference == 1
    lost = Runs(4, Recipe(registration=RegistrationParameters(reference_ev=7728.0)))
    for e in range(4):
        lost.make("flats", e)
    lost.fail("jitter", 1)
    lost.run()
    assert lost.state.reference is None
    assert status(lost.state, "maps") == ["idle"]


ACTIONS = st.one_of(
    st.tuples(st.just("make"), st.sampled_from(STEPS), st.integers(0, 2)),
    st.tuples(st.just("accept"), st.sampled_from(STEPS), st.integers(0, 2)),
    st.tuples(st.just("revert"), st.sampled_from(STEPS), st.integers(0, 2)),
    st.tuples(st.just("exclude"), st.integers(0, 2), st.integers(0, 3)),
    st.tuples(st.just("restore"), st.integers(0, 2), st.integers(0, 3)),
    st.tuples(st.just("fail"), st.sampled_from(STEPS[:3]), st.integers(0, 2)),
    st.tuples(st.just("recipe"), st.integers(1, 3), st.just(0)),
    st.tuples(st.just("run"), st.just(0), st.just(0)),
)


@given(st.lists(ACTIONS, max_size=30))
@settings(max_examples=60)
def test_whatever_happens_a_run_gets_to_its_end(actions: list[tuple[Any, Any, Any]]) -> None:
    r = Runs()
    for kind, a, b in actions:
        energy = None if a == "maps" else b
        if kind == "make":
            r.make(a, energy)
        elif kind == "accept":
            ids = [
                e.seq
                for e in r.events
                if e.kind == "candidate" and (e.payload["step"], e.payload["energy"]) == (a, energy)
            ]
            if ids:
                r.accept(a, energy, ids[0])
        elif kind == "revert":
            r.accept(a, energy, None)
        elif kind in ("exclude", "restore"):
            r.add(kind, energy=a, frame=b, reason="x")
        elif kind == "fail":
            if r.state[(a, b)].status in ("idle", "stale") and r.state[(a, b)].input_key:
                r.fail(a, b)
        elif kind == "recipe":
            r.recipe = Recipe(jitter=JitterParameters(iterations=a))
        else:
            r.run()
    count = sum(e.kind == "candidate" for e in r.events)
    r.run()
    r.run()
    state = r.state
    if any(s in ("candidate", "accepted") for s in status(state, "jitter")):
        assert status(state, "maps")[0] in ("candidate", "accepted")
    assert r.run() == []  # nothing is ever made twice
    assert sum(e.kind == "candidate" for e in r.events) >= count
    # The state is a function of the journal: read again it is the same, and cut short it resolves as well.
    assert resolve(r.recipe, tuple(r.events), list(r.energies), tuple(r.prints)) == state
    for cut in range(0, len(r.events), 7):
        resolve(r.recipe, r.events[:cut], r.energies, r.prints)


def test_thousands_of_events_resolve() -> None:
    r = Runs(4)
    r.run()
    whole = r.state
    ids = [e.seq for e in r.events if e.payload["step"] == "jitter"]
    while len(r.events) < 5000:
        r.accept("jitter", len(r.events) % 4, ids[len(r.events) % 4] if len(r.events) % 3 else None)
        r.add("exclude", energy=1, frame=len(r.events) % 12, reason="x")
        r.add("restore", energy=1, frame=(len(r.events) - 1) % 12)
        r.add("note", text="kinds this version does not know are passed over")
    for e in range(4):
        r.accept("jitter", e, None)
    assert r.state == replace(whole, manual=Manual(frames={1: {}}))


# ---------------------------------------------------------------------------------------------------- a whole run


def test_a_run_leaves_what_it_promises(series: Series, direct: dict[str, Any], tmp_path: Path, twin: Path) -> None:
    assert {"shifts.csv", "energies.csv", "quality.csv"} <= set(direct)
    assert {"Co", "Ni", "Co_fraction", "Ni_fraction", "density", "mask", "coverage"} <= set(direct)
    assert all(direct[m].shape == (32, 32, 32) and direct[m].dtype == np.float32 for m in ("Co", "density", "mask"))
    tables = tmp_path
    for name in ("shifts.csv", "energies.csv", "quality.csv"):
        (tables / name).write_bytes(direct[name])
    shifts = read_shifts(tables / "shifts.csv")
    assert [(s.energy_ev, s.frame) for s in shifts] == [(e, i) for e in SMALL.energies_ev for i in range(12)]
    assert {s.status for s in shifts} == {"ok"}
    energies = read_energies(tables / "energies.csv")
    assert [r.energy_ev for r in energies if r.reference] == [8570.0]
    assert len(read_quality(tables / "quality.csv").verdict) == 48
    # Against the truth, after one undetermined shift for all energies: 32 px frames, a tenth of their pixel.
    truth = {e: a for e, _, a in rows_alignments(read_shifts(twin / "truth" / "tables" / "shifts.csv"))}
    y, x, angle = [], [], []
    for energy, theta, a in rows_alignments(shifts):
        assert a.magnification == pytest.approx(truth[energy].magnification, rel=0.02)
        d = (a.shift - truth[energy].shift) / truth[energy].magnification
        y.append(d[:, 0])
        x.append(d[:, 1])
        angle.append(np.deg2rad(theta))
    t = np.concatenate(angle)
    basis = np.stack([np.cos(t), np.sin(t)], axis=1)
    rest_y = np.concatenate(y) - np.concatenate(y).mean()
    rest_x = np.concatenate(x) - basis @ np.linalg.lstsq(basis, np.concatenate(x), rcond=None)[0]
    assert np.sqrt(np.mean(rest_y**2)) < 0.1
    assert np.sqrt(np.mean(rest_x**2)) < 0.1


def test_the_same_run_again_does_nothing(series: Series, direct: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Workflow(series, out, FAST) as w:
        w.run()
        events = len(w.journal)
        w.run()
        assert len(w.journal) == events
    with Workflow(series, out, FAST) as w:
        w.run()
        assert len(w.journal) == events
    assert_same(outputs(out), direct)


@pytest.mark.parametrize(
    ("name", "share"),
    [("flats", 0.6), ("jitter", 0.0), ("jitter", 0.6), ("registration", 0.6), ("maps", 0.0), ("maps", 1.0)],
)
def test_cancelled_and_resumed_gives_the_same(
    series: Series, direct: dict[str, Any], tmp_path: Path, name: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    reached = []

    def stop(what: str, done: int, total: int) -> None:
        if what == name and done >= share * total:
            reached.append(done)
            raise Cancelled

    with Workflow(series, out, FAST) as w:
        begun: set[Any] = set()
        look = w._look_ahead

        def looked(units: Any) -> None:
            look(units)
            begun.update(ahead for _, ahead in w._ahead)

        monkeypatch.setattr(w, "_look_ahead", looked)
        with pytest.raises(Cancelled):
            w.run(progress=stop)
        assert not any(ahead._thread.is_alive() for ahead in begun)  # no thread outlives the run
    assert reached
    finished = sum(e.kind == "candidate" for e in Journal(out).events)
    told: list[float] = []
    with Workflow(series, out) as w:  # goes on with the folder's own recipe
        w.run(progress=lambda what, done, total: told.append(done / total) if what == "maps" else None)
        assert candidates(w) == 13
    assert told[0] == (1 if (name, share) == ("maps", 1.0) else 0), "what is done is told before anything else"
    assert finished < 13
    assert_same(outputs(out), direct)


def test_beside_each_other_is_as_one_after_the_other(
    series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Journal and all: the same events in the same order, the same arrays, an energy that fails among them."""
    bad = replace(series.scans[1], flats=())
    broken = replace(series, scans=(series.scans[0], bad, *series.scans[2:]))
    made, take = {}, Workflow._begun
    for n in (1, 2):
        begun: list[str] = []

        def seen(w: Workflow, *args: Any, begun: list[str] = begun) -> Any:
            begun += [key for key, _ in w._ahead]
            return take(w, *args)

        monkeypatch.setattr("napari_xanes_tomo.workflow.cores", lambda n=n: n)
        monkeypatch.setattr(Workflow, "_begun", seen)
        with Workflow(broken, tmp_path / str(n), FAST) as w:
            w.run(until="registration", accept="thresholds")
            made[n] = [(e.kind, {k: v for k, v in e.payload.items() if k != "seconds"}) for e in w.journal.events]
        assert bool(begun) == (n == 2)
    assert any(kind == "failure" and p["energy"] == 1 for kind, p in made[1])
    assert made[2] == made[1]


def test_a_cancelled_search_leaves_its_best_estimate_marked_partial(series: Series, tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "jitter" and done >= 0.5 * total:
            raise Cancelled

    with Workflow(series, tmp_path / "out", FAST) as w:
        w.run_unit("flats", 0)
        with pytest.raises(Cancelled):
            w.run_unit("jitter", 0, progress=stop)
        (part,) = w.candidates("jitter", 0)
        assert part.partial
        assert part.quality.verdict == "check"
        assert np.isfinite(w.result(part).arrays["shift"]).all()
        # It counts for nothing until somebody says so.
        assert w.state[("jitter", 0)].status == "idle"
        assert w.alignment(0) is None
        w.accept("jitter", 0, part.id)
        assert w.state[("jitter", 0)].status == "accepted"
        w.undo()
        assert w.state[("jitter", 0)].status == "idle"

        unit = w.run_unit("jitter", 0, initial=part.id)
        assert unit.status == "candidate"
        assert unit.candidate is not None
        whole = w.result(unit.candidate).arrays
        w.run_unit("flats", 1)
        with pytest.raises(XanesTomoError, match="a result of the jitter correction"):
            w.run_unit("jitter", 1, initial=part.id)
        # From the beginning: the same within its error.
        fresh = Workflow(series, tmp_path / "fresh", FAST)
        fresh.run_unit("flats", 0)
        found = fresh.run_unit("jitter", 0).candidate
        assert found is not None
        other = fresh.result(found).arrays
        fresh.close()
    difference = whole["shift"] - other["shift"]
    difference -= difference.mean(axis=0)
    assert np.abs(difference).max() < 3 * np.median(other["sigma"])


def test_what_the_maps_fill_is_marked(series: Series, tmp_path: Path) -> None:
    with Workflow(series, tmp_path / "out", FAST) as w:
        w.exclude(0, 5, "test")
        w.exclude(0, 11, "the last: nothing lies beyond it")
        w.run(until="jitter")
        table = read_quality(tmp_path / "out" / "tables" / "quality.csv")
        marked = np.flatnonzero(table.scores["filled"] == 1)
        assert [(table.energy_ev[i], table.frame[i]) for i in marked] == [(7704.0, 5)]
        assert table.verdict[marked[0]] == "excluded:test"
        w.set_recipe(FAST.model_copy(update={"maps": FAST.maps.model_copy(update={"fill_lost": False})}))
        w.write_tables()
        assert not read_quality(tmp_path / "out" / "tables" / "quality.csv").scores["filled"].any()


def test_the_thresholds_do_not_accept_a_partial_result(series: Series, tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "jitter" and done % 1000 >= 400:  # within the first energy
            raise Cancelled

    with Workflow(series, tmp_path / "out", FAST) as w:
        with pytest.raises(Cancelled):
            w.run(until="jitter", progress=stop, accept="thresholds")
        assert any(c.partial for e in range(4) for c in w.candidates("jitter", e))
        assert not any(e.kind == "decision" and e.payload["step"] == "jitter" for e in w.journal.events)


@pytest.mark.parametrize("kind", ["candidate", "run", "scan"])
def test_a_crash_at_any_event_gives_the_same(
    series: Series, direct: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    # The process dies while an event of that kind is written: half a line is in the file.
    out = tmp_path / "out"
    append = Journal.append
    count = [0]

    class Killed(BaseException):
        pass

    def die(self: Journal, what: str, payload: Any = None) -> Event:
        event = append(self, what, payload)
        if what == kind:
            count[0] += 1
            if count[0] == (5 if kind == "candidate" else 1):
                raw = self.path.read_bytes()
                self.path.write_bytes(raw[:-40])
                raise Killed
        return event

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", die)
        try:
            with Workflow(series, out, FAST) as w:
                w.run()
        except Killed:
            pass
        else:
            pytest.skip(f"this version writes no event called {kind}")
    with Workflow(series, out, FAST) as w:
        w.run()
        assert candidates(w) == 13
        state = w.state
        assert Journal(out).events == w.journal.events  # what is on disk is what is in memory
        again = resolve(w.recipe, Journal(out).events, series.energies_ev.tolist(), w.fingerprints)
        assert again == state
    assert_same(outputs(out), direct)


def test_a_run_that_died_in_its_first_event_begins_anew(series: Series, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Workflow(series, out, FAST):
        pass
    journal = out / "journal.jsonl"
    first = journal.read_bytes().splitlines(keepends=True)[0]
    (out / "recipe.yaml").unlink()
    journal.write_bytes(first[:60])
    with Workflow(series, out) as w:
        assert w.recipe == Recipe()
        assert any("cut short" in m for m in w.messages)


def test_a_failing_energy_is_flagged_and_the_others_go_on(series: Series, tmp_path: Path, caplog: Any) -> None:
    few = series.scans[1].excluded(dict.fromkeys(range(10), "by the test"))
    spoiled = replace(series, scans=(series.scans[0], few, *series.scans[2:]))
    out = tmp_path / "out"
    with Workflow(spoiled, out, FAST) as w:
        state = w.run()
        assert state[("jitter", 1)].status == "failed"
        assert "at least 8" in state[("jitter", 1)].reason
        assert state[("maps", None)].status == "candidate"
    assert "7728 eV" in caplog.text
    rows = {r.energy_ev: r for r in read_energies(out / "tables" / "energies.csv")}
    assert rows[7728.0].status.startswith("excluded:")
    assert {rows[e].status for e in (7704.0, 8178.0, 8570.0)} == {"ok"}
    shifts = [s for s in read_shifts(out / "tables" / "shifts.csv") if s.energy_ev == 7728.0]
    assert len(shifts) == 12
    assert {s.status.split(":")[0] for s in shifts} == {"excluded"}
    maps = read_maps(out / "maps.ome.zarr")
    assert "Ni" in maps.data
    assert "Co" not in maps.data  # its bracket lost an energy ...
    assert "Co" in maps.absent  # ... which is said


def test_no_energy_at_all_is_an_error_with_the_reason(series: Series, tmp_path: Path) -> None:
    few = tuple(s.excluded(dict.fromkeys(range(10), "by the test")) for s in series.scans)
    with (
        Workflow(replace(series, scans=few), tmp_path / "out", FAST) as w,
        pytest.raises(XanesTomoError, match="at least 8 usable projections"),
    ):
        w.run()


def test_until(series: Series, tmp_path: Path) -> None:
    with Workflow(series, tmp_path / "out", FAST) as w:
        w.run(until="flats")
        assert status(w.state, "flats") == ["candidate"] * 4
        assert status(w.state, "jitter") == ["idle"] * 4
        with pytest.raises(XanesTomoError, match="flats, jitter, registration, maps"):
            w.run(until="lunch")


# ---------------------------------------------------------------------------------------------- decisions, for real


@pytest.fixture
def finished(series: Series, tmp_path: Path) -> Any:
    with Workflow(series, tmp_path / "out", FAST) as w:
        w.run()
        yield w


def test_excluded_after_the_maps_and_restored(finished: Workflow, direct: dict[str, Any]) -> None:
    w = finished
    for name in STEPS[:3]:
        for e in range(4):
            w.accept(name, e)
    before = candidates(w)
    w.exclude(1, 5, "looks odd")
    assert status(w.state, "registration").count("stale") == 1
    w.run()
    assert candidates(w) == before + 4  # flats, jitter, registration of that energy, and the maps
    rows = [s for s in read_shifts(w.output.shifts) if s.energy_ev == 7728.0]
    assert rows[5].status == "excluded:looks odd"
    assert {r.status for i, r in enumerate(rows) if i != 5} == {"ok"}
    other = [s for s in read_shifts(w.output.shifts) if s.energy_ev == 8178.0]
    assert {r.status for r in other} == {"ok"}
    assert outputs(w.output.folder)["shifts.csv"] != direct["shifts.csv"]
    w.restore(1, 5)
    w.run()
    assert_same(outputs(w.output.folder), direct)


def test_an_energy_excluded_after_the_maps_takes_only_its_own_maps_along(finished: Workflow) -> None:
    w = finished
    assert "Co" in read_maps(w.output.maps).data
    for frame in range(6):  # six of twelve are too few to align
        w.exclude(1, frame, "beam lost")
    w.run()
    maps = read_maps(w.output.maps)
    assert "Ni" in maps.data
    assert "Co" not in maps.data
    assert "7728 eV" in maps.absent["Co"]


def test_accept_redo_revert_ends_where_the_direct_way_does(finished: Workflow, direct: dict[str, Any]) -> None:
    w = finished
    own = w.recipe
    for iterations in (1,):
        w.set_recipe(own.model_copy(update={"jitter": JitterParameters(refine=False, iterations=iterations)}))
        w.run()
        assert outputs(w.output.folder)["shifts.csv"] != direct["shifts.csv"]
        first = w.candidates("jitter", 2)[0]
        w.accept("jitter", 2, first.id)
        w.run()
        w.revert("jitter", 2)
        w.set_recipe(own)
        w.run()
        assert_same(outputs(w.output.folder), direct)


def test_an_accepted_older_result_is_used_as_it_was_made(finished: Workflow, direct: dict[str, Any]) -> None:
    # Flats made with other parameters last; the older ones accepted must give the older jitter.
    w = finished
    own = w.recipe
    w.set_recipe(own.model_copy(update={"absorbance": AbsorbanceParameters(remove_air=False)}))
    for e in range(4):
        w.run_unit("flats", e)  # the absorbance of the last energy is kept in memory
    for e in range(4):
        w.accept("flats", e, w.candidates("flats", e)[0].id)
    w.set_recipe(
        own.model_copy(
            update={"absorbance": AbsorbanceParameters(remove_air=False), "jitter": JitterParameters(iterations=5)}
        )
    )
    w.run()
    w.set_recipe(own)
    for e in range(4):
        w.revert("flats", e)
    w.run()
    assert_same(outputs(w.output.folder), direct)


def test_jitter_comes_from_the_accepted_flats_within_a_session(series: Series, tmp_path: Path) -> None:
    def shift(restart: bool) -> npt.NDArray:
        out = tmp_path / f"restart {restart}"
        plain = Recipe(absorbance=AbsorbanceParameters(remove_air=False))
        w = Workflow(series, out, FAST)
        w.run_unit("flats", 0)
        first = w.candidates("flats", 0)[0].id
        w.set_recipe(plain)
        w.run_unit("flats", 0)
        w.accept("flats", 0, first)
        if restart:
            w.close()
            w = Workflow(series, out)
        with w:
            w.run_unit("jitter", 0)
            (made,) = w.candidates("jitter", 0)
            return w.result(made).arrays["shift"]

    np.testing.assert_array_equal(shift(False), shift(True))


def test_what_cannot_be_decided_is_refused(finished: Workflow) -> None:
    w = finished
    events = len(w.journal)
    with pytest.raises(XanesTomoError, match="candidate out of"):
        w.accept("jitter", 0, 10_000)
    with pytest.raises(XanesTomoError, match="candidate out of"):
        w.accept("jitter", 0, w.candidates("flats", 0)[0].id)
    for energy, frame in ((0, 12), (0, -1), (4, 0), (-1, 0)):
        with pytest.raises(XanesTomoError, match="expected one of"):
            w.exclude(energy, frame)
    with pytest.raises(XanesTomoError, match="expected one of"):
        w.accept("lunch", 0)
    assert len(w.journal) == events


def test_nothing_to_accept(series: Series, tmp_path: Path) -> None:
    with Workflow(series, tmp_path / "out", FAST) as w, pytest.raises(XanesTomoError, match="run it first"):
        w.accept("jitter", 0)


def test_events_tell_the_docks(series: Series, tmp_path: Path) -> None:
    with Workflow(series, tmp_path / "out", FAST) as w:
        seen: list[tuple[str, object]] = []

        def note(name: str, energy: object) -> None:
            seen.append((name, energy))

        w.changed.connect(note)
        w.run_unit("flats", 2)
        w.accept("flats", 2)
        w.set_recipe(Recipe(jitter=JitterParameters(iterations=1)))
        w.set_recipe(Recipe(jitter=JitterParameters(iterations=1)))
        assert seen == [("flats", 2), ("flats", 2), ("recipe", None)]


def test_progress_never_goes_back(series: Series, tmp_path: Path) -> None:
    seen: dict[str, list[float]] = {}
    with Workflow(series, tmp_path / "out", FAST) as w:
        w.run(progress=lambda what, done, total: seen.setdefault(what, []).append(done / total))
    assert set(seen) == set(STEPS)
    for what, values in seen.items():
        if what != "registration":  # counts its iterations anew at the finer scale
            assert values == sorted(values)
        assert 0 <= values[0] <= values[-1] <= 1


# ------------------------------------------------------------------------------------------------------- binning


def test_binned_runs_give_raw_pixels(tiny_twin: Path, tmp_path: Path) -> None:
    found: dict[int, dict[float, tuple[Alignment, float]]] = {}
    truth = {e: a for e, _, a in rows_alignments(read_shifts(tiny_twin / "truth" / "tables" / "shifts.csv"))}
    for bin in (1, 2):
        recipe = FAST.model_copy(update={"scan": ScanParameters(bin=bin)})
        series = open_series(tiny_twin, recipe.scan)
        assert series.frame_shape == (64 // bin, 64 // bin)
        keep = tuple(s for s in series.scans if s.energy_ev in (7728.0, 8178.0, 8570.0))
        with Workflow(replace(series, scans=keep), tmp_path / str(bin), recipe) as w:
            w.run(until="registration")
        sizes = {r.energy_ev: r.pixel_size_nm for r in read_energies(tmp_path / str(bin) / "tables" / "energies.csv")}
        rows = rows_alignments(read_shifts(tmp_path / str(bin) / "tables" / "shifts.csv"))
        found[bin] = {e: (a, sizes[e]) for e, _, a in rows}
    for energy, (one, size) in found[1].items():
        two, other_size = found[2][energy]
        assert size == pytest.approx(other_size)
        # The same displacement of the content, in recorded pixels; half of them are seen.
        for a in (one, two):
            d = a.shift - truth[energy].shift
            assert np.std(d[:, 0]) < 0.1
        d = two.shift - one.shift
        assert np.std(d[:, 0]) < 0.1
        assert np.abs(d.mean(axis=0)).max() < 0.3
        assert two.shift.std(axis=0) == pytest.approx(one.shift.std(axis=0), rel=0.1)
        assert two.magnification == pytest.approx(one.magnification, rel=0.02)
        assert np.median(two.sigma) > np.median(one.sigma) / 2


def test_a_decision_taken_while_the_state_is_looked_up_is_in_it(
    series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Workflow(series, tmp_path / "out") as w:
        decided: list[int] = []

        def while_another_decides(*a: Any, **k: Any) -> State:
            found = resolve(*a, **k)
            if not decided:
                decided.append(1)
                w.exclude(1, 0, "blurred")
            return found

        monkeypatch.setattr("napari_xanes_tomo.run.resolve", while_another_decides)
        assert not w.state.excluded.get(1)  # the decision came later
        assert 0 in w.state.excluded[1]


def test_callers_see_no_threads_left(series: Series, tmp_path: Path) -> None:
    import threading

    before = threading.active_count()
    with Workflow(series, tmp_path / "out", FAST, execution=Threads(2)) as w:
        w.run()
    assert threading.active_count() <= before + 1  # numba may keep one of its own
