"""What is decided by hand, end to end: it does what it says, survives new runs, and can be taken back."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from napari_xanes_tomo import Recipe, Series, Workflow, open_series, read_maps, write_twin
from napari_xanes_tomo.io.store import read_energies, read_map_attributes, read_shifts, rows_alignments
from napari_xanes_tomo.mapping import _map_window
from napari_xanes_tomo.model import XanesTomoError
from napari_xanes_tomo.phantom import TwinParameters
from napari_xanes_tomo.recipe import JitterParameters, MapsParameters, RegistrationParameters

SMALL = TwinParameters(
    n=64, n_angles=20, energies_ev=(7704.0, 7728.0, 8178.0, 8570.0), flats_per_set=4, jitter_px=(2.0, 4.0)
)
FAST = Recipe(
    jitter=JitterParameters(iterations=2),
    registration=RegistrationParameters(iterations=5),
    maps=MapsParameters(half_sets=False),
)
REFERENCE = 3


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_twin(tmp_path_factory.mktemp("manual") / "twin", parameters=SMALL)


@pytest.fixture(scope="module")
def series(twin: Path) -> Series:
    return open_series(twin)


@pytest.fixture(scope="module")
def whole(series: Series, twin: Path) -> Path:
    """A finished run; to be copied."""
    out = twin.parent / "whole"
    with Workflow(series, out, FAST) as w:
        w.run()
    return out


@pytest.fixture
def w(series: Series, whole: Path, tmp_path: Path) -> Iterator[Workflow]:
    with Workflow(series, shutil.copytree(whole, tmp_path / "out")) as found:
        yield found


def shifts(out: Path) -> dict[float, npt.NDArray[np.float64]]:
    return {e: a.shift for e, _, a in rows_alignments(read_shifts(out / "tables" / "shifts.csv"))}


def tables(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((out / "tables").iterdir())}


def maps(out: Path) -> dict[str, Any]:
    return {name: np.asarray(a) for name, a in read_maps(out / "maps.ome.zarr").data.items()}


def assert_as_before(out: Path, whole: Path) -> None:
    assert tables(out) == tables(whole)
    one, other = maps(out), maps(whole)
    assert set(one) == set(other)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def done(w: Workflow) -> int:
    return sum(e.kind == "candidate" for e in w.journal.events)


# --- nudges -------------------------------------------------------------------------------------------------


def test_a_nudge_moves_its_projection_survives_another_run_and_is_taken_back(w: Workflow, whole: Path) -> None:
    before = shifts(whole)[7728.0]
    w.nudge(1, 5, 0.75, -1.25)
    w.run()
    moved = shifts(w.output.folder)[7728.0] - before
    # The registration follows one projection of twenty by a twentieth of its nudge at most.
    np.testing.assert_allclose(moved[5], [0.75, -1.25], atol=0.1)
    assert np.abs(np.delete(moved, 5, axis=0)).max() < 0.1
    for energy in (7704.0, 8178.0, 8570.0):
        np.testing.assert_array_equal(shifts(w.output.folder)[energy], shifts(whole)[energy])
    # Nudges add up, and hold when the displacements are found anew with other parameters.
    w.nudge(1, 5, 0.25, 0.25)
    assert w.state.manual.nudges == {1: {5: (1.0, -1.0)}}
    w.set_recipe(FAST.model_copy(update={"jitter": JitterParameters(refine=False)}))
    w.run()
    with_it = shifts(w.output.folder)[7728.0]
    assert w.undo() == "nudge"
    assert w.undo() == "nudge"
    w.run()
    without = shifts(w.output.folder)[7728.0]
    np.testing.assert_allclose(with_it[5] - without[5], [1.0, -1.0], atol=0.1)
    # Both taken back, with the first parameters: everything is as it was, and nothing is computed for it.
    made = done(w)
    w.set_recipe(FAST)
    w.run()
    assert done(w) == made
    assert_as_before(w.output.folder, whole)
    assert w.redo() == "nudge"
    assert w.state.manual.nudges == {1: {5: (0.75, -1.25)}}


def test_a_nudge_that_is_no_number_or_elsewhere_is_refused(w: Workflow) -> None:
    events = len(w.journal)
    for energy, frame, dy, dx in ((1, 5, np.nan, 0), (1, 5, 0, np.inf), (1, 20, 0, 0), (4, 0, 0, 0)):
        with pytest.raises(XanesTomoError, match="expected"):
            w.nudge(energy, frame, dy, dx)
    assert len(w.journal) == events


# --- centre, magnification, change points -------------------------------------------------------------------


def test_a_rotation_centre_set_by_hand(w: Workflow, whole: Path) -> None:
    found = {r.energy_ev: r.center_px for r in read_energies(whole / "tables" / "energies.csv")}
    for number, energy in ((0, 7704.0), (REFERENCE, 8570.0)):
        w.set_center(number, found[energy] + 0.5)
        w.run()
        now = {r.energy_ev: r.center_px for r in read_energies(w.output.energies)}
        # Every energy has an axis of its own: what is seen of it in the others' frames says nothing about it.
        assert now[energy] == pytest.approx(found[energy] + 0.5, abs=0.02)
        assert now[8178.0] == pytest.approx(found[8178.0], abs=0.02)
    w.set_center(0, None)
    w.set_center(REFERENCE, None)
    w.run()
    assert_as_before(w.output.folder, whole)
    with pytest.raises(XanesTomoError, match="inside the frame"):
        w.set_center(0, 1e4)


def test_a_magnification_fixed_by_hand(w: Workflow, whole: Path) -> None:
    w.fix_magnification(0, 1.0987654321)
    w.run()
    row = next(r for r in read_energies(w.output.energies) if r.energy_ev == 7704.0)
    assert row.magnification == 1.0987654321
    assert not row.magnification_sigma > 0  # nothing was measured
    assert {r.magnification for r in read_shifts(w.output.shifts) if r.energy_ev == 7704.0} == {1.0987654321}
    w.set_recipe(FAST.model_copy(update={"registration": RegistrationParameters(iterations=3)}))
    w.run()
    row = next(r for r in read_energies(w.output.energies) if r.energy_ev == 7704.0)
    assert row.magnification == 1.0987654321
    w.set_recipe(FAST)
    w.undo()
    w.run()
    assert_as_before(w.output.folder, whole)


def test_a_change_point_gets_its_jump(w: Workflow) -> None:
    def jumps() -> dict[int, list[float]]:
        candidate = w.state[("jitter", 2)].candidate
        assert candidate is not None
        return {int(p): [y, x] for p, y, x in candidate.payload["numbers"]["jumps"]}

    before = jumps()
    assert 7 not in before
    w.name_change_point(2, 7)
    w.run(until="jitter")
    assert set(jumps()) == {*before, 7}
    assert np.isfinite(jumps()[7]).all()
    w.name_change_point(2, 7, present=False)
    w.run(until="jitter")
    assert jumps() == before


# --- exclusions ---------------------------------------------------------------------------------------------


def test_an_energy_excluded_by_hand(w: Workflow, whole: Path) -> None:
    w.exclude(1, reason="blurred")
    w.run()
    rows = {r.energy_ev: r for r in read_energies(w.output.energies)}
    assert rows[7728.0].status == "excluded:blurred"
    assert rows[7704.0].status == "ok"
    assert {s.status for s in read_shifts(w.output.shifts) if s.energy_ev == 7728.0} == {"excluded:blurred"}
    attributes, each = read_map_attributes(w.output.maps)
    assert "Ni" in each
    assert "Co" not in each
    assert "7728 eV" in attributes["absent"]["Co"]
    w.set_recipe(FAST.model_copy(update={"registration": RegistrationParameters(iterations=4)}))
    w.run()
    assert {r.energy_ev: r.status for r in read_energies(w.output.energies)}[7728.0] == "excluded:blurred"
    w.set_recipe(FAST)
    w.restore(1)
    w.run()
    assert_as_before(w.output.folder, whole)


def test_the_reference_excluded_by_hand(w: Workflow) -> None:
    w.exclude(REFERENCE, reason="by hand")
    state = w.run()
    assert state.reference == 2
    rows = {r.energy_ev: r for r in read_energies(w.output.energies)}
    assert [e for e, r in rows.items() if r.reference] == [8178.0]
    assert "Co" in read_maps(w.output.maps).data


# --- boxes and mask -----------------------------------------------------------------------------------------


def test_a_box_confines_the_work_and_the_maps(w: Workflow, series: Series, whole: Path, tmp_path: Path) -> None:
    box = (12, 52, 8, 58)
    w.set_boxes([box])
    w.run()
    attributes, _ = read_map_attributes(w.output.maps)
    y0, z0, x0 = attributes["origin_voxel"]
    found, full = maps(w.output.folder), maps(whole)
    assert set(found) == set(full)
    ny, nz, nx = found["density"].shape
    assert (y0, ny) == (12, 40)
    assert (z0, nz) == (x0, nx)
    assert x0 <= 64 - 58  # the particle turns about the axis: as far as the box reaches, on both sides
    assert x0 + nx == 64 - x0
    part = full["density"][y0 : y0 + ny, z0 : z0 + nz, x0 : x0 + nx]
    inner = (slice(4, -4), slice(4, -4), slice(4, -4))
    # The jitter is found from what is in the box: slightly other displacements, the same particle.
    scale = np.abs(part).max()
    assert np.sqrt(np.mean((found["density"][inner] - part[inner]) ** 2)) < 0.02 * scale
    # The same again from scratch: what this session kept in memory is what another one reads.
    with Workflow(series, tmp_path / "again", FAST) as other:
        other.set_boxes([box])
        other.run(until="jitter")
    with Workflow(series, tmp_path / "again") as other:
        other.run()
    assert tables(tmp_path / "again") == tables(w.output.folder)
    # Several boxes: the maps cover all of them.
    assert _map_window([(12, 30, 8, 40), (34, 52, 20, 58)], 64, 64) == (12, 52, 6, 58)
    w.set_boxes([])
    w.run()
    assert_as_before(w.output.folder, whole)


def test_maps_of_a_box_with_the_same_displacements_are_those_of_the_whole(w: Workflow, whole: Path) -> None:
    plan, items, voxel_nm = w.map_plan()
    from napari_xanes_tomo.maps import Slab, map_slab

    rows = map_slab(items, plan, Slab(12, 28, 4), voxel_nm, w.recipe.maps, threads=1)
    full = maps(whole)["density"][12:28]
    scale = np.abs(full).max()
    np.testing.assert_allclose(rows["density"], full, atol=1e-3 * scale)


def test_boxes_that_cannot_be_are_refused(w: Workflow) -> None:
    for box in ((0, 65, 0, 64), (10, 10, 0, 64), (0, 4, 0, 64), (-1, 20, 0, 64)):
        with pytest.raises(XanesTomoError, match="box: expected rows and columns"):
            w.set_boxes([box])


def test_a_mask_covers_a_bad_pixel(series: Series, w: Workflow, whole: Path, tmp_path: Path) -> None:
    mask = np.zeros((64, 64), dtype=bool)
    mask[30:33, 20:23] = True
    w.set_mask(mask)
    assert {u.status for (s, _), u in w.state.units.items() if s != "maps"} == {"stale"}
    w.run()
    assert tables(w.output.folder) != tables(whole)
    change = [shifts(w.output.folder)[e] - shifts(whole)[e] for e in (7704.0, 7728.0, 8178.0, 8570.0)]
    assert np.abs(np.concatenate(change)).max() < 0.3
    with Workflow(series, tmp_path / "again", FAST) as other:
        other.set_mask(mask)
        other.run(until="flats")
    with Workflow(series, tmp_path / "again") as other:
        other.run(until="registration")
    assert tables(tmp_path / "again") == tables(w.output.folder)
    assert w.undo() == "mask"
    w.run()
    assert_as_before(w.output.folder, whole)
    with pytest.raises(XanesTomoError, match="the shape of a frame"):
        w.set_mask(np.zeros((3, 3)))


# --- what the change of scale is ----------------------------------------------------------------------------


def test_shrinkage_is_said_by_the_user_changes_the_maps_alone_and_is_taken_back(w: Workflow, whole: Path) -> None:
    before, made = shifts(w.output.folder), done(w)
    amounts = maps(whole)["Co"]
    np.testing.assert_array_equal(w.particle_size(), 1.0)
    assert w.state[("maps", None)].status == "candidate"
    w.say_scale_change("instrument x shrinkage")
    assert w.state[("registration", 0)].status == "candidate", "what was measured stays"
    assert w.state[("maps", None)].status == "stale"
    size = w.particle_size()
    law = np.array([w.series.scans[REFERENCE].pixel_size_nm / s.pixel_size_nm for s in w.series.scans])
    rows = read_energies(w.output.energies)
    np.testing.assert_allclose(size, np.array([r.magnification for r in rows]) / law)
    assert size[REFERENCE] == 1
    assert np.ptp(size) > 1e-5

    plain = w.map_plan(parameters=w.recipe.maps)[0]
    w.run()
    assert done(w) == made + 1, "the maps alone"
    after = shifts(w.output.folder)
    for energy in before:
        np.testing.assert_array_equal(after[energy], before[energy])
    about = read_map_attributes(w.output.maps)[0]
    assert about["scale_change"] == "instrument x shrinkage"
    np.testing.assert_allclose([s for _, s in about["particle_size_by_ev"]], size, atol=1e-6)
    assert not np.array_equal(maps(w.output.folder)["Co"], amounts)
    assert w.undo() == "scale_change"
    np.testing.assert_array_equal(w.particle_size(), 1.0)
    # Every energy as the particle would absorb at its size at the reference energy: by the square of its size.
    np.testing.assert_allclose(plain.spectrum / w.map_plan()[0].spectrum, size**2)
    w.run()
    assert_as_before(w.output.folder, whole)
    with pytest.raises(XanesTomoError, match="scale change: expected 'instrument'"):
        w.say_scale_change("the user")


def test_the_recipe_says_what_the_change_of_scale_is(w: Workflow) -> None:
    maps_ = w.recipe.maps.model_copy(update={"scale_change": "instrument x shrinkage"})
    w.set_recipe(w.recipe.model_copy(update={"maps": maps_}))
    assert w.state[("registration", 0)].status == "candidate"
    assert np.ptp(w.particle_size()) > 0
    w.say_scale_change("instrument")
    np.testing.assert_array_equal(w.particle_size(), 1.0)
