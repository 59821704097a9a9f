"""Half sets that share nothing but the object, on a small twin with its real files."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, shift

from napari_xanes_tomo import Recipe, Workflow, open_series, read_maps, write_twin
from napari_xanes_tomo.edges import atomic_mass
from napari_xanes_tomo.fsc import common_place, soft_mask
from napari_xanes_tomo.half_sets import StepShells, jitter_half_sets, registration_half_sets
from napari_xanes_tomo.map_report import checks_section
from napari_xanes_tomo.model import Cancelled
from napari_xanes_tomo.phantom import TwinParameters
from napari_xanes_tomo.steps import alignment_of

ENERGIES = (7704.0, 7728.0, 8178.0, 8570.0)


@pytest.fixture(scope="module")
def workflow(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("halves")
    parameters = TwinParameters(n=64, n_angles=48, energies_ev=ENERGIES, flats_per_set=4, jitter_px=(2.0, 3.0))
    twin = write_twin(folder / "twin", parameters=parameters)
    with Workflow(open_series(twin), folder / "out", Recipe.from_text("maps: {voxel_px: 1}")) as made:
        made.run()
        yield made


def low(shells: StepShells, which: str) -> float:
    """Mean correlation from 0.1 to 0.35 cycles per voxel."""
    curve = getattr(shells, which).curve
    use = (curve.frequency > 0.1) & (curve.frequency < 0.35)
    return float(np.nanmean(curve.correlation[use]))


def test_halves_agree_better_after_the_jitter_correction(workflow: Workflow) -> None:
    _, items, nm = workflow.map_plan()
    made = jitter_half_sets(items[-1], workflow.recipe, nm, number=3)
    assert isinstance(made, StepShells)
    assert low(made, "after") > low(made, "before") + 0.05
    assert "every other shot" in made.what
    assert np.linalg.norm(made.after.apart_px) < 3
    single = tuple(replace(f, status=("ok", *("unreadable:gone",) * (len(f.status) - 1))) for f in items[-1].scan.flats)
    few = replace(items[-1], scan=replace(items[-1].scan, flats=single))
    shared = jitter_half_sets(few, workflow.recipe, nm, number=3)
    assert isinstance(shared, StepShells)
    assert "the same flats" in shared.what


def test_the_spectrum_of_a_voxel_holds_what_its_maps_say(workflow: Workflow) -> None:
    maps = read_maps(workflow.output.maps)
    at = tuple(np.unravel_index(int(np.argmax(maps.data["morphology"])), maps.data["mask"].shape))
    seen = []
    found = workflow.voxel_spectrum(at, progress=lambda what, done, total: seen.append(done))
    assert seen == [0, 1, 2, 3]
    assert np.all(found.value > 0)
    moles = {e: v / atomic_mass(e) for e, v in found.amounts.items()}
    for e in ("Co", "Ni"):
        share = moles[e] / sum(moles.values())
        assert share == pytest.approx(float(np.asarray(maps.data[f"{e}_fraction"])[at]), abs=2e-4)
    assert found.note == ""
    # The recipe may ask for something else by now, the alignment may be another: these maps are as they were made.
    before = workflow.recipe
    other = before.maps.model_copy(update={"smoothing_voxel": 2.0, "elements": ("Ni",), "common_blur": True})
    workflow.set_recipe(before.model_copy(update={"maps": other}))
    again = workflow.voxel_spectrum(at)
    np.testing.assert_array_equal(again.value, found.value)
    assert again.amounts == found.amounts
    assert again.note == ""
    workflow.set_recipe(before)
    workflow.exclude(1, 3, "a bad one")
    assert "no longer those of these maps" in workflow.voxel_spectrum(at).note
    workflow.restore(1, 3)
    assert workflow.voxel_spectrum(at).note == ""


def test_cancelling_ends_them_at_once(workflow: Workflow) -> None:
    plan, items, nm = workflow.map_plan()
    calls = []

    def give_up(what: str, done: int, total: int) -> None:
        calls.append(what)
        if len(calls) == last:
            raise Cancelled

    for last in (1, 3):
        calls.clear()
        with pytest.raises(Cancelled):
            jitter_half_sets(items[-1], workflow.recipe, nm, number=3, progress=give_up)
        assert len(calls) == last
        calls.clear()
        with pytest.raises(Cancelled):
            registration_half_sets(items, items, plan, nm, filter="ramp", progress=give_up)
        assert len(calls) == last


def test_halves_of_the_energies_agree_better_registered(workflow: Workflow) -> None:
    plan, items, nm = workflow.map_plan()
    state = workflow.state
    before = [replace(i, alignment=alignment_of(workflow._jitter(state, e), i.scan)) for e, i in enumerate(items)]
    made = registration_half_sets(before, items, plan, nm, filter="ramp")
    assert isinstance(made, StepShells)
    assert low(made, "after") > low(made, "before")
    assert "2 energies against the other 2" in made.what
    assert registration_half_sets(before[:3], items[:3], plan, nm, filter="ramp") == "3 energies make no two halves"


def test_the_run_keeps_both_and_the_report_shows_them(workflow: Workflow) -> None:
    numbers = workflow.candidates("maps")[-1].payload["numbers"]
    steps = numbers["half_sets_by_step"]
    assert [s["step"] for s in steps] == ["jitter correction", "energy registration"]
    html = checks_section({"half_sets_by_step": steps})
    assert html.count("<svg") == 2
    for s in steps:
        for which in ("before", "after"):
            none = s[which]["half_bit_nm"] is None
            assert ("does not cross 1/2-bit" in html) or not none
    assert "before and after each step" in html


def test_too_few_projections_are_said(workflow: Workflow) -> None:
    items = workflow.aligned()[0]
    few = replace(items[-1], scan=items[-1].scan.excluded(dict.fromkeys(range(36), "test")))
    assert "12 projections make no two halves" in str(jitter_half_sets(few, workflow.recipe, 100.0))


@pytest.mark.parametrize("by", [(0.0, 0.0, 0.0), (1.3, -2.4, 0.6), (0.0, 5.2, -7.0)])
def test_the_common_place_is_found(by: tuple[float, float, float]) -> None:
    rng = np.random.default_rng(3)
    c = np.arange(48) - 23.5
    body = (np.hypot(c[None, :, None], c[None, None, :]) < 15) * (np.ones(16) > 0)[:, None, None]
    volume = gaussian_filter(body + 0.5 * rng.normal(size=body.shape), 1.2).astype(np.float32)
    moved = shift(volume, by, order=3, mode="nearest")
    np.testing.assert_allclose(common_place(volume, moved, soft_mask(volume)[0]), by, atol=0.05)
