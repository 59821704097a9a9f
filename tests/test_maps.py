import tracemalloc
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_erosion

from napari_xanes_tomo.chemistry import finish_slab
from napari_xanes_tomo.edges import ReferenceSpectrum, atomic_mass, mass_attenuation
from napari_xanes_tomo.map_checks import particle_middle
from napari_xanes_tomo.map_plan import MapPlan, plan_maps
from napari_xanes_tomo.maps import (
    AlignedEnergy,
    Slab,
    combine_slab,
    common_angles,
    component_sinograms,
    coverage_slab,
    halo_rows,
    map_slab,
    require_energies,
    slab_bytes,
)
from napari_xanes_tomo.model import Alignment, ArrayFrames, EnergyScan, FlatSet, XanesTomoError
from napari_xanes_tomo.phantom import PRESETS, ni_xanes
from napari_xanes_tomo.recipe import EDGE_MEASURES, MapsParameters
from napari_xanes_tomo.reconstruction import fbp
from napari_xanes_tomo.spectra import MEASURES
from napari_xanes_tomo.voxel_size import choose_voxel, voxel_choices

DEMO = np.array(PRESETS["demo"].energies_ev)
TINY = np.array(PRESETS["tiny"].energies_ev)
SIX = np.array([6534.0, 6558.0, 7704.0, 7728.0, 8178.0, 8570.0])
DENSITY = {"Mn": 0.8, "Co": 0.5, "Ni": 1.4}
EDGE_MAPS = ("edge_energy_relative", "edge_energy", "edge_jump")


def tabulated(energy: np.ndarray, density: dict[str, float], rest: float = 12.0) -> np.ndarray:
    """Linear attenuation, 1/cm: tabulated elements and a remainder that falls with the third power of the energy."""
    return sum(r * mass_attenuation(e, energy) for e, r in density.items()) + rest * (energy / 8000.0) ** -3


def plan(energy: np.ndarray, density: dict[str, float] = DENSITY, rest: float = 12.0, **parameters: object) -> MapPlan:
    mu = tabulated(energy, density, rest)
    return plan_maps(energy, mu, np.ones(len(energy)), int(np.argmax(energy)), MapsParameters(**parameters))


# ---------------------------------------------------------------------------------------------------- the plan


# Noise-free tabulated spectra: the weights give the densities back to rounding.
@pytest.mark.parametrize("energies", [SIX, TINY, DEMO])
@given(mn=st.floats(0, 3), co=st.floats(0, 3), ni=st.floats(0.1, 3), rest=st.floats(0, 100), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_known_densities(energies: np.ndarray, mn: float, co: float, ni: float, rest: float, seed: int) -> None:
    noise = np.random.default_rng(seed).uniform(0.3, 3, len(energies))
    found = plan_maps(energies, tabulated(energies, DENSITY), noise, len(energies) - 1)
    voxel = tabulated(energies, {"Mn": mn, "Co": co, "Ni": ni}, rest)
    for element, true in (("Mn", mn), ("Co", co), ("Ni", ni)):
        assert found.components[element] @ voxel == pytest.approx(true, abs=1e-6)


@pytest.mark.parametrize("elements", [("Mn",), ("Ni", "Mn"), ("Co", "Co"), ("Ni", "Fe", "Mn")])
def test_asking_for_some_elements_does_not_change_them(elements: tuple[str, ...]) -> None:
    # What is not asked for is still in the sample.
    found = plan(DEMO, elements=elements)
    asked = tuple(dict.fromkeys(e for e in elements if e != "Fe"))
    assert found.elements == asked
    for e in asked:
        assert found.components[e] @ tabulated(DEMO, DENSITY) == pytest.approx(DENSITY[e], abs=1e-6)
    assert ("Fe" in found.absent) == ("Fe" in elements)
    assert found.left_out_ev == plan(DEMO).left_out_ev


def test_the_scanned_edge_has_no_part_in_the_densities() -> None:
    found = plan(DEMO)
    left_out = (DEMO >= 8333 - 15) & (DEMO <= 8333 + 60)
    assert found.left_out_ev == tuple(DEMO[left_out])
    assert len(found.left_out_ev) == 8
    for e in found.elements:
        assert np.all(found.components[e][left_out] == 0)
        assert np.all(found.components[e][~left_out] != 0)
    # So an edge that moves, or a white line, leaves them alone.
    edge = np.where(left_out, 200 * ni_xanes(DEMO, 1.0), 0)
    for e in found.elements:
        assert found.components[e] @ (tabulated(DEMO, DENSITY) + edge) == pytest.approx(DENSITY[e], abs=1e-6)


def test_the_window_left_out_is_the_recipes() -> None:
    found = plan(DEMO, leave_out_below_ev=0, leave_out_above_ev=8)
    assert found.left_out_ev == (8336.0, 8340.0)


@pytest.mark.parametrize(
    ("energies", "elements", "absent"),
    [
        (SIX, ("Mn", "Co", "Ni"), set(EDGE_MAPS)),
        (DEMO, ("Mn", "Co", "Ni"), set()),
        (DEMO[2:], ("Co", "Ni"), set()),
        (DEMO[DEMO < 8350], ("Mn", "Co"), {"Ni", *EDGE_MAPS}),  # broken off in the edge: the table does not hold there
        (DEMO[4:], ("Ni",), set()),
        (SIX[:2], ("Mn",), set(EDGE_MAPS)),
        (SIX[4:5], (), {"elements", *EDGE_MAPS}),
        (np.array([6558.0, 7704.0, 8570.0]), (), {"elements", *EDGE_MAPS}),
    ],
)
def test_what_cannot_be_mapped_is_absent_with_a_reason(
    energies: np.ndarray, elements: tuple[str, ...], absent: set[str]
) -> None:
    found = plan(energies)
    assert found.elements == elements
    assert {k for k in found.absent if k in ("Mn", "Co", "Ni", "elements", *EDGE_MAPS)} == absent
    assert all(len(reason) > 20 for reason in found.absent.values())
    assert not set(found.absent) & set(found.names)
    for name in EDGE_MAPS:
        assert (name in found.names) == (name not in absent)
    assert found.names[-2:] == ("mask", "coverage")
    assert ("density" in found.names) == bool(elements)
    assert (f"{elements[0]}_fraction" in found.names if elements else True) == (len(elements) > 1 or not elements)


def test_too_few_energies_for_the_elements() -> None:
    # Two energies with the edges of both zirconium and niobium between them.
    found = plan(np.array([17990.0, 19000.0]))
    assert found.elements == ()
    assert all("2 energies cannot tell 2 elements" in found.absent[e] for e in ("Zr", "Nb"))


UNBRACKETED = {
    "no energy before the scanned edge": ((6534.0, 6558, 7704, 7728, 8325, 8333, 8341, 8349, 8357, 8570), ()),
    "two energies of an edge that is not bracketed": ((6534.0, 6558, 7704, 7728, 8344, 8351, 8570), ("Ni",)),
    "cobalt and nickel in one gap": ((6534.0, 6558, 8400, 8570), ("Fe", "Co", "Ni")),
    "as many energies as columns": ((6534.0, 6558, 8570), ("Fe", "Co", "Ni")),
}


@pytest.mark.parametrize("case", UNBRACKETED)
def test_an_edge_that_is_not_bracketed_is_no_part_of_the_other_elements(case: str) -> None:
    """Without a step of its own, nickel would count as cobalt (three times too much) or as manganese (twice)."""
    energies, named = np.array(UNBRACKETED[case][0]), UNBRACKETED[case][1]
    found = plan(energies)
    assert "Ni" not in found.elements
    for element in found.elements:
        amount = float(found.components[element] @ found.spectrum)
        assert amount == pytest.approx(DENSITY[element], rel=0.02), element
    assert len(found.notes) == bool(named)
    assert all(n in note for note in found.notes for n in named)


@pytest.mark.parametrize("energies", [SIX, TINY, DEMO])
@pytest.mark.parametrize("seed", range(10))
def test_an_imperfect_mean_spectrum_has_no_further_edge(energies: np.ndarray, seed: int) -> None:
    mean = tabulated(energies, DENSITY) * (1 + 0.01 * np.random.default_rng(seed).standard_normal(len(energies)))
    assert plan_maps(energies, mean, np.ones(len(energies)), len(energies) - 1).notes == ()


def test_an_element_that_was_asked_for_without_a_bracket_is_no_part_of_the_others() -> None:
    energies = SIX[[0, 1, 2, 3, 5]]  # nickel's pair is too wide without 8178 eV
    found = plan(energies, elements=("Mn", "Co", "Ni"))
    assert found.elements == ("Mn", "Co")
    assert "do not bracket the K edge of Ni" in found.absent["Ni"]
    np.testing.assert_allclose([found.components[e] @ found.spectrum for e in ("Mn", "Co")], [0.8, 0.5], rtol=0.02)


def test_unknown_elements_and_edges_are_refused() -> None:
    with pytest.raises(XanesTomoError, match="'Xx'"):
        plan(DEMO, elements=("Xx",))
    with pytest.raises(XanesTomoError, match="'Xx'"):
        plan(DEMO, scanned_edge="Xx")


def test_components_of_the_edge() -> None:
    found = plan(DEMO)
    mu = tabulated(DEMO, DENSITY)
    assert found.components["level"] @ mu == pytest.approx(1.0, abs=1e-9)
    assert found.components["shift"] @ mu == pytest.approx(0.0, abs=1e-8)


# ---------------------------------------------------------------------------------------------- finished maps


def finished(found: MapPlan, voxels: np.ndarray, least: float = 1.0, **parameters: object) -> dict[str, np.ndarray]:
    """Maps of a row of voxels with the spectra `voxels` (energy, x), without smoothing."""
    volumes = {k: (w @ voxels)[None, None, :].astype(np.float32) for k, w in found.components.items()}
    cover = np.full((1, 1, voxels.shape[1]), 0.9, np.float32)
    p = MapsParameters(smoothing_voxel=0, **parameters)
    return finish_slab(found, volumes, cover, np.full_like(cover, least), slice(0, 1), p)


def spectrum(shift: float, ni: float = 1.4) -> np.ndarray:
    """A voxel of nickel with an edge that moves, on the other metals."""
    x = DEMO - 8333.0
    return tabulated(DEMO, {"Mn": 0.8, "Co": 0.5}) + ni * (40 - 0.015 * x + 280 * ni_xanes(DEMO, shift))


def test_maps_of_known_voxels() -> None:
    truths = (-1.0, 0.0, 0.8)
    voxels = np.stack([spectrum(s) for s in truths] + [0.2 * spectrum(0.0), 0 * DEMO], axis=1)
    mean = spectrum(0.0)
    found = plan_maps(DEMO, mean, np.ones(len(DEMO)), len(DEMO) - 1)
    maps = finished(found, voxels)
    assert tuple(maps) == found.names
    assert all(m.dtype == np.float32 and m.shape == (1, 1, 5) for m in maps.values())
    flat = {k: v[0, 0] for k, v in maps.items()}
    np.testing.assert_allclose(flat["edge_energy_relative"][:3], truths, atol=0.06)
    assert np.isnan(flat["edge_energy_relative"][4])  # no nickel, no edge
    np.testing.assert_allclose(
        flat["edge_energy"][:3] - flat["edge_energy_relative"][:3], found.edge_half_ev, atol=2e-3
    )
    assert found.edge_half_ev == pytest.approx(8333 + 9.5, abs=0.6)
    np.testing.assert_allclose(flat["edge_jump"][[1, 3]], np.array([1, 0.2]) * found.edge_jump, rtol=1e-3)
    np.testing.assert_array_equal(flat["mask"], [1, 1, 1, 0, 0])
    np.testing.assert_allclose(flat["coverage"], 0.9)
    np.testing.assert_allclose(flat["density"], flat["Mn"] + flat["Co"] + flat["Ni"], rtol=1e-5, atol=1e-6)
    total = flat["Mn_fraction"] + flat["Co_fraction"] + flat["Ni_fraction"]
    np.testing.assert_allclose(total[:3], 1, rtol=1e-5)
    assert np.all(np.isnan(total[3:]))


def test_fractions_are_of_atoms_not_of_mass() -> None:
    found = plan(SIX)
    maps = finished(found, tabulated(SIX, DENSITY)[:, None])
    moles = {e: r / atomic_mass(e) for e, r in DENSITY.items()}
    for e, n in moles.items():
        assert maps[f"{e}_fraction"][0, 0, 0] == pytest.approx(n / sum(moles.values()), rel=1e-4)


def test_the_offset_moves_only_the_absolute_energy() -> None:
    found = plan_maps(DEMO, spectrum(0.0), np.ones(len(DEMO)), len(DEMO) - 1)
    voxels = spectrum(0.5)[:, None]
    one, other = finished(found, voxels), finished(found, voxels, energy_offset_ev=2.5)
    assert other["edge_energy"] - one["edge_energy"] == pytest.approx(2.5, abs=2e-3)
    np.testing.assert_array_equal(one["edge_energy_relative"], other["edge_energy_relative"])


def test_an_edge_energy_without_energies_on_either_side_of_a_half_is_absent_not_empty() -> None:
    x = TINY - 8333.0
    mean = tabulated(TINY, {"Mn": 0.8, "Co": 0.5}) + 1.4 * (40 - 0.015 * x + 280 * ni_xanes(TINY, -3.0))
    found = plan_maps(TINY, mean, np.ones(len(TINY)), len(TINY) - 1)
    assert np.isnan(found.edge_half_ev)
    assert "edge_energy" not in found.names
    assert "either side" in found.absent["edge_energy"]
    assert set(finished(found, mean[:, None])) == set(found.names) > {"edge_energy_relative", "edge_jump"}


def test_mask_needs_every_energy_to_have_seen_the_voxel() -> None:
    found = plan(SIX)
    voxels = tabulated(SIX, DENSITY)[:, None]
    assert finished(found, voxels, least=0.5)["mask"] == 1
    assert finished(found, voxels, least=0.49)["mask"] == 0


# ------------------------------------------------------------------------------------------ from frames to maps


VOXEL_NM = 200.0
THETA = np.arange(-90.0, 90.0, 5.0)
SHAPE = (26, 40)  # not square


def ball(theta: np.ndarray, alignment: Alignment, level: float, center=(1.0, 2.0, -3.0), radius: float = 8.0):
    """Exact line integrals of a ball (y, z, x) with attenuation `level` per voxel, recorded at p = M q + shift."""
    y, x = (np.arange(n) - (n - 1) / 2 for n in SHAPE)
    t = np.deg2rad(theta)
    u = center[2] * np.cos(t) + center[1] * np.sin(t)
    m = alignment.magnification
    qy = (y[None, :] - alignment.shift[:, :1]) / m - center[0]
    qx = (x[None, :] - alignment.shift[:, 1:]) / m - u[:, None]
    inside = radius**2 - qy[:, :, None] ** 2 - qx[:, None, :] ** 2
    return 2 * level * np.sqrt(np.maximum(inside, 0))


def measured(
    energies: np.ndarray,
    *,
    missing: dict[int, list[int]] | None = None,
    seed: int = 3,
    levels: np.ndarray | None = None,
):
    """Noise-free frames of one ball at several energies, each with its own motion; half the angles by each flat."""
    rng = np.random.default_rng(seed)
    items = []
    for e, energy in enumerate(energies):
        keep = np.array([i for i in range(len(THETA)) if i not in (missing or {}).get(e, [])])
        theta = THETA[keep]
        shift = rng.uniform(-1.5, 1.5, (len(theta), 2))
        alignment = Alignment(shift, np.zeros_like(shift), 1.0 + 0.02 * (len(energies) - 1 - e))
        mu = (tabulated(np.array([energy]), DENSITY)[0] if levels is None else levels[e]) * VOXEL_NM * 1e-7
        air = (-1) ** e * np.stack(
            [0.1 + 0.02 * np.sin(theta), np.full(len(theta), 0.01), 0.01 * np.cos(theta)], axis=1
        )
        y, x = ((np.arange(n) - (n - 1) / 2) / (SHAPE[1] / 2) for n in SHAPE)
        plane = air[:, 0, None, None] + air[:, 1, None, None] * y[:, None] + air[:, 2, None, None] * x
        half = (np.arange(len(theta)) >= len(theta) // 2).astype(int)
        beams = np.array([1000.0, 1700.0])
        counts = beams[half][:, None, None] * np.exp(-ball(theta, alignment, mu) - plane)
        flats = tuple(
            FlatSet(ArrayFrames(np.full((2, *SHAPE), b, np.float32)), np.full(2, 2.0), ("ok", "ok")) for b in beams * 2
        )
        scan = EnergyScan(
            float(energy), theta, ArrayFrames(counts.astype(np.float32)), np.ones(len(theta)),
            ("ok",) * len(theta), flats, half, 1, VOXEL_NM, np.zeros(len(theta)),
        )  # fmt: skip
        items.append(AlignedEnergy(scan, alignment, air))
    return items


@pytest.fixture(scope="module")
def six() -> list[AlignedEnergy]:
    return measured(SIX)


def whole(items: list[AlignedEnergy], found: MapPlan, **parameters: object) -> dict[str, np.ndarray]:
    return map_slab(items, found, Slab(0, SHAPE[0], 0), VOXEL_NM, MapsParameters(**parameters), threads=1)


@pytest.mark.parametrize(("algorithm", "iterations"), [("sirt", 100), ("cgls", 12)])
def test_iterative_algorithms_find_the_same_ball(six: list[AlignedEnergy], algorithm: str, iterations: int) -> None:
    found = plan(SIX)
    p = {"smoothing_voxel": 0, "reconstruction": algorithm, "iterations": iterations}
    maps = whole(six, found, **p)
    for element in ("Mn", "Co", "Ni"):
        assert maps[element][inside_ball()].mean() == pytest.approx(DENSITY[element], rel=0.02)
    # Energies that lack angles: the sum over the energies would make no sense there, those angles are left out.
    gaps = measured(SIX, missing={0: [3, 17], 4: [8]})
    shared = combine_slab(gaps, found, (6, 16), parameters=MapsParameters(**p)).shared
    assert np.count_nonzero(~shared) == 3
    apart = measured(SIX, missing={0: list(range(18)), 1: list(range(12, 36))})
    with pytest.raises(XanesTomoError, match=f"{algorithm} needs angles that every energy has"):
        whole(apart, found, **p)
    fewer = whole(gaps, found, **p)
    for element in ("Mn", "Co", "Ni"):
        assert fewer[element][inside_ball()].mean() == pytest.approx(DENSITY[element], rel=0.02)


def inside_ball(center=(1.0, 2.0, -3.0), radius: float = 6.0) -> np.ndarray:
    y, z, x = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in (SHAPE[0], SHAPE[1], SHAPE[1])), indexing="ij")
    return (y - center[0]) ** 2 + (z - center[1]) ** 2 + (x - center[2]) ** 2 < radius**2


# Mean over the inside of the ball, relative; voxel scatter comes from 36 angles.
@pytest.mark.parametrize(("element", "tolerance"), [("Mn", 0.02), ("Co", 0.02), ("Ni", 0.02), ("density", 0.02)])
def test_a_ball_of_known_density(six: list[AlignedEnergy], element: str, tolerance: float) -> None:
    maps = whole(six, plan(SIX), smoothing_voxel=0)
    true = sum(DENSITY.values()) if element == "density" else DENSITY[element]
    assert maps[element].shape == (SHAPE[0], SHAPE[1], SHAPE[1])
    assert maps[element][inside_ball()].mean() == pytest.approx(true, rel=tolerance)
    # ... and it is where it was put: the map's centre of mass is the ball's.
    mass = np.clip(maps[element], 0.3 * true, None) - 0.3 * true
    for axis, expected in enumerate((1.0, 2.0, -3.0)):
        at = np.arange(mass.shape[axis]) - (mass.shape[axis] - 1) / 2
        rest = tuple(k for k in range(3) if k != axis)
        assert float(np.sum(mass.sum(axis=rest) * at) / mass.sum()) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("smoothing", [0.0, 1.0, 1.6])
def test_slab_by_slab_is_the_whole(six: list[AlignedEnergy], smoothing: float) -> None:
    found, p = plan(SIX), MapsParameters(smoothing_voxel=smoothing)
    halo = halo_rows(p)
    together = map_slab(six, found, Slab(0, SHAPE[0], halo), VOXEL_NM, p, threads=1)
    for y0, y1 in ((0, 9), (9, 10), (10, SHAPE[0])):
        part = map_slab(six, found, Slab(y0, y1, halo), VOXEL_NM, p, threads=2)
        for name, rows in part.items():
            assert rows.shape[0] == y1 - y0
            # Standard errors are kept to a thousandth.
            tolerance = 5e-3 if "_sigma" in name else 1e-5
            whole = together[name][y0:y1]
            np.testing.assert_allclose(rows, whole, atol=tolerance * np.nanmax(np.abs(whole)), rtol=tolerance)


def test_components_equal_reconstructing_every_energy(six: list[AlignedEnergy]) -> None:
    found = plan(SIX)
    rows = (8, 16)
    together, theta = component_sinograms(six, found, rows, threads=1)
    volume = fbp(together[list(found.components).index("Mn")], theta, weights=np.ones(len(theta)))
    single = np.zeros_like(volume)
    for e in range(len(SIX)):
        one = np.zeros(len(SIX))
        one[e] = 1.0
        sino, angles = component_sinograms(six, replace(found, components={"one": one}), rows, threads=1)
        single += found.components["Mn"][e] * fbp(sino[0], angles, weights=np.ones(len(angles)))
    np.testing.assert_allclose(volume, single, atol=2e-5 * np.abs(volume).max())


def test_angles_missing_at_one_energy() -> None:
    lost = measured(SIX, missing={1: [4, 20, 21], 5: [0]})
    assert len(lost[1].used) == len(THETA) - 3
    maps = whole(lost, plan(SIX), smoothing_voxel=0)
    for e, true in DENSITY.items():
        assert maps[e][inside_ball()].mean() == pytest.approx(true, rel=0.06)


def test_excluded_projections_have_no_part(six: list[AlignedEnergy]) -> None:
    # Two frames full of nonsense, one excluded by its scan, one by its alignment, one without a shift.
    spoiled = six[0].scan.frames.data.copy()
    spoiled[[3, 7, 11]] = 1.0
    scan = replace(six[0].scan, frames=ArrayFrames(spoiled)).excluded({3: "test"})
    status = tuple("excluded:x" if i == 7 else "ok" for i in range(len(THETA)))
    shift = six[0].alignment.shift.copy()
    shift[11] = np.nan
    bad = AlignedEnergy(scan, replace(six[0].alignment, shift=shift, status=status), six[0].air)
    assert sorted(set(range(len(THETA))) - set(bad.used.tolist())) == [3, 7, 11]
    found = plan(SIX)
    maps = whole([bad, *six[1:]], found, smoothing_voxel=0)
    assert all(np.isfinite(maps[e]).all() for e in DENSITY)
    assert maps["Mn"][inside_ball()].mean() == pytest.approx(0.8, rel=0.06)


def test_lost_projections_are_filled_from_their_neighbours(six: list[AlignedEnergy]) -> None:
    # Every sixth frame is nonsense and excluded; two in a row, and the last, have no neighbours near enough.
    lost = [4, 10, 16, 22, 28, 29, len(THETA) - 1]
    filled_ones = [4, 10, 16, 22, 28, 29]
    status = tuple("excluded:x" if i in lost else "ok" for i in range(len(THETA)))
    frames = six[0].scan.frames.data.copy()
    frames[lost] = 1.0
    scan = replace(six[0].scan, frames=ArrayFrames(frames))
    left_out = replace(six[0], scan=scan, alignment=replace(six[0].alignment, status=status))
    refilled = replace(left_out, fill_lost=True)
    np.testing.assert_array_equal(left_out.members, left_out.used)
    assert np.setdiff1d(refilled.members, refilled.used).tolist() == filled_ones
    rows = (SHAPE[0] // 2 - 2, SHAPE[0] // 2 + 2)
    found = plan(SIX)
    true, without, with_ = (
        component_sinograms([first, *six[1:]], found, rows)[0] for first in (six[0], left_out, refilled)
    )
    at = common_angles([refilled, *six[1:]])[1][0]
    gaps = [at[np.searchsorted(refilled.members, i)] for i in filled_ones]
    error = [float(np.abs(s[:, gaps] - true[:, gaps]).max()) for s in (without, with_)]
    assert error[1] < 0.25 * error[0]
    volumes = [fbp(s[0], THETA, weights=np.ones(len(THETA))) for s in (true, without, with_)]
    rms = [float(np.sqrt(np.mean((v - volumes[0]) ** 2))) for v in volumes[1:]]
    assert rms[1] < 0.8 * rms[0]


def test_common_angles_are_those_of_all() -> None:
    items = measured(SIX[:3], missing={0: [0], 2: [5, 6]})
    theta, places = common_angles(items)
    assert len(theta) == len(THETA)
    np.testing.assert_allclose(np.sort(theta), THETA)
    for item, where in zip(items, places, strict=True):
        assert len(set(where.tolist())) == len(where)
        np.testing.assert_allclose(theta[where], item.scan.theta_deg[item.used], atol=0.05)


@pytest.mark.parametrize(("off", "together"), [(0.04, True), (0.2, False)])
def test_angles_nearly_alike_are_one(off: float, together: bool) -> None:
    a, b = measured(SIX[:2])
    b = replace(b, scan=replace(b.scan, theta_deg=b.scan.theta_deg + off))
    theta, _ = common_angles([a, b])
    assert len(theta) == (1 if together else 2) * len(THETA)


def test_an_angle_taken_twice_stays_two() -> None:
    (a,) = measured(SIX[:1])
    twice = a.scan.theta_deg.copy()
    twice[5] = twice[4]
    a = replace(a, scan=replace(a.scan, theta_deg=twice))
    theta, places = common_angles([a, a])
    for where in places:
        assert len(set(where.tolist())) == len(THETA)
        np.testing.assert_array_equal(theta[where], twice)


# -------------------------------------------------------------------------------------------------- coverage


def covered(shift: tuple[float, float], magnification: float = 1.0, share: float = 1.0):
    n = len(THETA)
    items = measured(SIX[:2])
    moved = np.zeros((n, 2))
    moved[: round(share * n)] = shift
    a = AlignedEnergy(items[0].scan, Alignment(moved, np.zeros((n, 2)), magnification), items[0].air)
    b = AlignedEnergy(items[1].scan, Alignment.identity(n), items[1].air)
    return coverage_slab([a, b], plan(SIX[:2]), (0, SHAPE[0]))[:2]


def test_rows_without_good_pixels_are_not_seen() -> None:
    """Wherever a projection lies, its own dark rows do not count; dust here and there does."""
    mask = np.zeros(SHAPE, dtype=bool)
    mask[-4:] = True
    mask[3, 5:8] = True
    items = [replace(i, alignment=Alignment.identity(len(THETA)), mask=mask) for i in measured(SIX[:2])]
    total, least, _ = coverage_slab(items, plan(SIX[:2]), (0, SHAPE[0]))
    middle = SHAPE[1] // 2
    assert (total[-4:] == 0).all()
    assert (least[-4:] == 0).all()
    assert (total[:-4, middle, middle] == 1).all()
    shift = np.zeros((len(THETA), 2))
    shift[::2, 0] = 2  # every other projection 2 px lower: it loses two more rows
    items[0] = replace(items[0], alignment=Alignment(shift, np.zeros_like(shift)))
    total, least, _ = coverage_slab(items, plan(SIX[:2]), (0, SHAPE[0]))
    np.testing.assert_allclose(least[-7:, middle, middle], [1, 0.5, 0.5, 0, 0, 0, 0], atol=0.5 / len(THETA))


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("blind", [(0,), (1, 3), (0, 1, 2, 3, 4, 5)])
def test_the_errors_know_what_was_not_seen(blind: tuple[int, ...], share: float) -> None:
    """Rows 14 on are dark at some energies and angles: what the maps lack there is in their standard errors."""
    found = plan(SIX)
    clear = measured(SIX)
    items = []
    for e, item in enumerate(clear):
        shift = item.alignment.shift.copy()
        if e in blind:
            away = np.arange(len(THETA)) % 10 < round(10 * share)
            shift[away, 0] += 100.0  # those angles show other rows
        items.append(replace(item, alignment=replace(item.alignment, shift=shift)))
    slab, p = Slab(14, 17, 1), MapsParameters()
    right = map_slab(clear, found, slab, VOXEL_NM, p, threads=1)
    maps = map_slab(items, found, slab, VOXEL_NM, p, threads=1)
    body = binary_erosion(right["mask"] > 0.5, np.ones((1, 3, 3)), iterations=2)
    assert body.sum() > 100
    for name in found.names:
        if name.endswith(("_sigma", "_sigma_alignment")) or name in ("mask", "coverage"):
            continue
        sigma = maps[f"{name}_sigma"]
        assert not np.any(sigma <= 0)
        at = body & np.isfinite(maps[name])
        if share < 1 or len(blind) < 6:
            assert np.isfinite(sigma[at]).all()
            off = np.abs(maps[name] - right[name])[at] / np.hypot(sigma[at], right[f"{name}_sigma"][at])
            assert np.median(off) < 1.5
            if name in DENSITY and share < 1:  # the mean spectrum stands in for what was not seen: here it is right
                assert maps[name][at].mean() == pytest.approx(right[name][at].mean(), rel=0.02)
        else:
            assert not np.isfinite(sigma[at]).any(), "nothing was seen, nothing is known"


@pytest.mark.parametrize("down", [-6, 0, 5])
def test_the_middle_is_that_of_the_particle(down: int) -> None:
    """The frames are cut so that the ball is elsewhere, with something brighter below it that shows no edge."""
    items = []
    for item in measured(SIX):
        frames = np.roll(item.scan.frames.data, down, axis=1)
        frames[:, -3:] *= np.float32(np.exp(-0.8 * (item.scan.energy_ev / SIX[-1]) ** -3.0))
        shift = item.alignment.shift * 0
        items.append(replace(
            item, scan=replace(item.scan, frames=ArrayFrames(frames)),
            alignment=replace(item.alignment, shift=shift, magnification=1.0),
        ))  # fmt: skip
    found = plan(SIX)
    assert particle_middle(items, found) == pytest.approx(SHAPE[0] / 2 + 1 + down, abs=1.5)
    nothing = replace(found, components={e: 0 * w for e, w in found.components.items()})
    assert particle_middle(items, nothing) == SHAPE[0] // 2


def test_coverage_of_the_whole_field() -> None:
    total, least = covered((0.0, 0.0))
    radius = np.hypot(*np.meshgrid(*[np.arange(SHAPE[1]) - (SHAPE[1] - 1) / 2] * 2))
    assert total.shape == least.shape == (SHAPE[0], SHAPE[1], SHAPE[1])
    np.testing.assert_array_equal(total[:, radius < 19], 1)
    np.testing.assert_array_equal(total[:, radius > 21], 0)


def test_coverage_of_rows_that_leave_the_field() -> None:
    # Content moved 5 down: the lowest 5 rows of the grid were never recorded at that energy.
    total, least = covered((5.0, 0.0))
    middle = SHAPE[1] // 2
    np.testing.assert_array_equal(least[:, middle, middle], [1] * (SHAPE[0] - 5) + [0] * 5)
    np.testing.assert_array_equal(total[:, middle, middle], [1] * (SHAPE[0] - 5) + [0.5] * 5)


def test_coverage_counts_projections() -> None:
    total, least = covered((5.0, 0.0), share=0.25)
    middle = SHAPE[1] // 2
    assert least[-1, middle, middle] == pytest.approx(0.75)
    assert total[-1, middle, middle] == pytest.approx(0.875)


def test_a_magnified_energy_sees_less() -> None:
    _, least = covered((0.0, 0.0), magnification=1.3)
    radius = np.hypot(*np.meshgrid(*[np.arange(SHAPE[1]) - (SHAPE[1] - 1) / 2] * 2))
    y = np.abs(np.arange(SHAPE[0]) - (SHAPE[0] - 1) / 2)
    reach = 19.5 / 1.3
    assert np.all(least[y < 12.5 / 1.3][:, radius < reach - 1] == 1)
    assert np.all(least[y > 12.5 / 1.3] == 0)
    assert np.all(least[:, radius > reach + 1] == 0)


def test_nothing_to_map_is_an_error() -> None:
    with pytest.raises(XanesTomoError, match="at least one registered energy"):
        require_energies([])
    require_energies([1])


# --------------------------------------------------------------------------------------- voxel size, declared factors


def test_declared_white_line_factors_give_the_density_back() -> None:
    factors = {"Mn": 1.2, "Co": 1.1}
    mu = sum(r * mass_attenuation(e, SIX, white_line=factors.get(e, 1.0)) for e, r in DENSITY.items())
    p = MapsParameters(white_line_factors=("Mn=1.2", "Co=1.1"))
    told = plan_maps(SIX, mu, np.ones(len(SIX)), 5, p)
    plain = plan_maps(SIX, mu, np.ones(len(SIX)), 5, MapsParameters())
    for e, true in DENSITY.items():
        assert told.components[e] @ mu == pytest.approx(true, abs=1e-6)
    assert plain.components["Mn"] @ mu > 1.1 * DENSITY["Mn"]
    assert told.about("Mn", p, 0.7)["systematic_relative"]["white_line"] < 0.05
    assert plain.about("Mn", MapsParameters(), 0.7)["systematic_relative"]["white_line"] >= 0.1
    assert not told.white_lines_seen, "what is declared is not asked about"
    # Nickel is seen 237 eV above its edge: it has what manganese and cobalt leave of their error.
    assert plain.about("Ni", MapsParameters(), 0.7)["systematic_relative"]["white_line"] < 0.06


def test_the_scanned_edge_can_help_without_following_its_shift() -> None:
    density = {"Mn": 0.8, "Co": 0.5}

    def voxel(shift: float, ni: float = 1.4) -> np.ndarray:
        x = DEMO - 8333.0
        step = mass_attenuation("Ni", np.maximum(DEMO, 8334.0)) - 42.0 + 0.015 * x
        return tabulated(DEMO, density) + ni * (42.0 - 0.015 * x + step * ni_xanes(DEMO, shift))

    mean = np.mean([voxel(s) for s in np.linspace(-1, 1, 21)], axis=0)
    noise = np.ones(len(DEMO))
    without = plan_maps(DEMO, mean, noise, len(DEMO) - 1)
    alone = plan_maps(DEMO, mean, noise, len(DEMO) - 1, MapsParameters(scanned_edge_in_elements=False))
    assert alone.helped is None
    helped = without.with_scanned_edge(dict.fromkeys(without.helped.free, 0.0))
    assert helped.left_out_ev == without.left_out_ev
    for e in DENSITY:
        np.testing.assert_array_equal(alone.components[e], without.components[e])
    # A quarter less noise in nickel; manganese, far from the edge, gains nothing.
    gain = {e: np.linalg.norm(helped.components[e]) / np.linalg.norm(without.components[e]) for e in DENSITY}
    assert gain["Ni"] < 0.8
    assert gain["Co"] < 1.0
    assert gain["Mn"] == pytest.approx(1.0, abs=0.02)
    for e in DENSITY:
        for shift in (-1.0, -0.5, 0.0, 0.5, 1.0):
            base = without.components[e] @ voxel(shift)
            assert helped.components[e] @ voxel(shift) == pytest.approx(base, rel=0.02)
        # Another amount is found as such.
        assert helped.components["Ni"] @ voxel(0.0, 2.0) == pytest.approx(
            without.components["Ni"] @ voxel(0.0, 2.0), rel=0.01
        )


def test_an_edge_that_may_be_broader_costs_the_least_in_between() -> None:
    """A voxel of two states 2 eV apart: what it errs by is stated; noise and that together are least in between."""
    found = plan_maps(DEMO, edge_spectrum(0.0), np.ones(len(DEMO)), len(DEMO) - 1)
    assert found.helped is not None
    none = dict.fromkeys(DENSITY, 0.0)
    mixed = (edge_spectrum(-1.0) + edge_spectrum(1.0)) / 2
    noise = 0.5 / np.linalg.norm(found.helped.width)  # of an energy: the width is known no better than it varies
    total = {}
    for kept in (0.0, 0.5, 1.0):
        helped = found.with_scanned_edge(none, kept=kept, spread=0.5)
        for e in ("Co", "Ni"):
            amount = found.components[e] @ found.spectrum
            bias = helped.components[e] @ (mixed - edge_spectrum(0.0)) / amount
            said = helped.about(e, MapsParameters(), 0.7)["systematic_relative"]["edge_width"]
            assert abs(bias) == pytest.approx(said, rel=0.15, abs=0.001)
            assert said == pytest.approx(0.0, abs=1e-4) if kept == 1 else said > 0.002
            total[e, kept] = np.hypot(said * amount, noise * np.linalg.norm(helped.components[e]))
        share = helped.about("Ni_fraction", MapsParameters(), 0.7)["systematic_relative"]
        assert share["edge_width"] < 0.02
        assert "pixel_size" not in share
    for e in ("Co", "Ni"):
        assert total[e, 0.5] < min(total[e, 0.0], total[e, 1.0])


def edge_spectrum(shift: float) -> np.ndarray:
    """1/cm: manganese and cobalt of the table, nickel with the edge of the twin, moved by `shift` eV."""
    x = DEMO - 8333.0
    step = mass_attenuation("Ni", np.maximum(DEMO, 8334.0)) - 42.0 + 0.015 * x
    return tabulated(DEMO, {"Mn": 0.8, "Co": 0.5}) + 1.4 * (42.0 - 0.015 * x + step * ni_xanes(DEMO, shift))


def share(amounts: dict[str, float], element: str) -> float:
    moles = {e: v / atomic_mass(e) for e, v in amounts.items()}
    return moles[element] / sum(moles.values())


def stated(plan: MapPlan, name: str, p: MapsParameters) -> float:
    return float(np.hypot.reduce(list(plan.about(name, p, 0.7)["systematic_relative"].values())))


# Relative errors of the densities: the tables differ by 2 % across the nickel edge, and 5 eV below the others.
@pytest.mark.parametrize(("table", "tolerance"), [("elam", 0.002), ("chantler", 0.035)])
@pytest.mark.parametrize("energies", [SIX, DEMO])
@pytest.mark.parametrize("factors", [{"Mn": 1.25, "Co": 1.2}, {"Mn": 1.5}, {"Co": 0.8}, {"Mn": 1.2, "Co": 1.7}])
def test_a_white_line_that_nobody_declared_is_found_in_the_mean(
    energies: np.ndarray, factors: dict[str, float], table: str, tolerance: float
) -> None:
    mu = sum(r * mass_attenuation(e, energies, white_line=factors.get(e, 1.0)) for e, r in DENSITY.items())
    mu = mu + 12.0 * (energies / 8000.0) ** -3
    p = MapsParameters(attenuation=table, white_line_from_spectrum=True)
    found = plan_maps(energies, mu, np.ones(len(energies)), len(energies) - 1, p)
    assert set(found.white_lines) == set(factors)
    unasked = plan_maps(energies, mu, np.ones(len(energies)), len(energies) - 1, MapsParameters(attenuation=table))
    assert unasked.white_lines == {}, "nothing is taken unless the user says so"
    assert unasked.white_lines_seen == found.white_lines, "but it is told"
    # ... and no less than what it does is stated as systematic, for amounts and for fractions.
    for plan, q in ((unasked, MapsParameters(attenuation=table)), (found, p)):
        got = {e: plan.components[e] @ mu for e in DENSITY}
        for e, true in DENSITY.items():
            assert abs(got[e] / true - 1) <= 1.1 * stated(plan, e, q)
            assert abs(share(got, e) / share(DENSITY, e) - 1) <= 1.1 * stated(plan, f"{e}_fraction", q)
    for e, factor in factors.items():
        assert found.white_lines[e][0] == pytest.approx(factor, abs=0.06)
    for e, true in DENSITY.items():
        assert found.components[e] @ mu == pytest.approx(true, rel=tolerance)
    told = MapsParameters(attenuation=table, white_line_factors=("Mn=1.0", "Co=1.0"))
    assert plan_maps(energies, mu, np.ones(len(energies)), len(energies) - 1, told).white_lines == {}


@pytest.mark.parametrize("energies", [SIX, DEMO])
@pytest.mark.parametrize("amounts", [DENSITY, {"Mn": 0.3, "Co": 0.3, "Ni": 2.2}])
@pytest.mark.parametrize("factors", [{}, {"Mn": 1.2, "Co": 1.15}])
@pytest.mark.parametrize("table", ["elam", "chantler"])
def test_declared_factors_leave_fractions_within_what_is_stated(
    energies: np.ndarray, amounts: dict[str, float], factors: dict[str, float], table: str
) -> None:
    other = "chantler" if table == "elam" else "elam"
    mu = sum(r * mass_attenuation(e, energies, table=other, white_line=factors.get(e, 1.0)) for e, r in amounts.items())
    mu = mu + 18.0 * (energies / 8000.0) ** -3
    p = MapsParameters(attenuation=table, white_line_factors=[f"{e}={factors.get(e, 1.0)}" for e in ("Mn", "Co")])
    plan = plan_maps(energies, mu, np.ones(len(energies)), len(energies) - 1, p)
    got = {e: plan.components[e] @ mu for e in amounts}
    for e in amounts:
        assert abs(share(got, e) / share(amounts, e) - 1) <= stated(plan, f"{e}_fraction", p) < 0.10


@given(st.integers(0, 10_000))
@settings(max_examples=30)
def test_an_imperfect_mean_spectrum_has_no_white_line(seed: int) -> None:
    mu = tabulated(DEMO, DENSITY) * (1 + 0.005 * np.random.default_rng(seed).normal(size=len(DEMO)))
    for table in ("elam", "chantler"):
        found = plan_maps(DEMO, mu, np.ones(len(DEMO)), len(DEMO) - 1, MapsParameters(attenuation=table))
        assert all(abs(f - 1) < 0.12 for f, _ in found.white_lines_seen.values())


@pytest.mark.parametrize("factors", [("Mn",), ("Mn=x",), ("Mn=9",), ("=1",)])
def test_wrong_factors_are_refused(factors: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected entries such as Mn=1\.15"):
        MapsParameters(white_line_factors=factors)


@pytest.mark.parametrize("bin", [2, 3])
def test_larger_voxels_hold_the_same_density(six: list[AlignedEnergy], bin: int) -> None:
    maps = map_slab(
        six, plan(SIX), Slab(0, SHAPE[0] // bin, 0), VOXEL_NM * bin, MapsParameters(smoothing_voxel=0), bin=bin
    )
    y, z, x = np.meshgrid(
        *(bin * (np.arange(n // bin) - (n // bin - 1) / 2) for n in (SHAPE[0], 40, 40)), indexing="ij"
    )
    body = (y - 1) ** 2 + (z - 2) ** 2 + (x + 3) ** 2 < 4.0**2
    for e, true in DENSITY.items():
        assert maps[e].shape == (SHAPE[0] // bin, SHAPE[1] // bin, SHAPE[1] // bin)
        assert maps[e][body].mean() == pytest.approx(true, rel=0.05)


def test_noise_falls_with_the_voxel_and_the_smallest_good_one_is_taken(six: list[AlignedEnergy]) -> None:
    p = MapsParameters(smoothing_voxel=0)
    found = plan(SIX)
    choices = voxel_choices(six, found, VOXEL_NM, p)
    assert [c.px for c in choices] == [1, 2, 3]  # larger ones leave fewer than eight rows
    noise = [c.noise_over_jump for c in choices]
    assert noise == sorted(noise, reverse=True)
    # The stated ratio is the one of maps made with that voxel.
    two = map_slab(six, found, Slab(4, 9, 1), 2 * VOXEL_NM, p, bin=2)
    inside = two["mask"] > 0.5
    made = float(np.median((two["density_sigma"] / two["density"])[inside]))
    assert noise[1] == pytest.approx(made, rel=0.25)
    assert choose_voxel(choices, replace_limit(p, noise[1] * 1.01)) == 2
    assert choose_voxel(choices, replace_limit(p, noise[2] / 2)) == 3
    assert choose_voxel(choices, MapsParameters(voxel_px=4)) == 4


def replace_limit(p: MapsParameters, limit: float) -> MapsParameters:
    return p.model_copy(update={"noise_limit": limit})


# ------------------------------------------------------------------------- measures that are not linear, references

EDGE_SCAN = np.array(
    [6534.0, 6558.0, 8178.0, 8298.0, 8328.0, 8334, 8338, 8341, 8344, 8347, 8350, 8356, 8366, 8400, 8570]
)


def reference(name: str, shift: float, valence: float | None = None, low: float = 8100.0, high: float = 8700.0):
    e = np.arange(low, high, 0.5)
    x = e - 8333.0
    return ReferenceSpectrum(name, e, 0.4 - 2e-4 * x + (1.3 - 1e-4 * x) * ni_xanes(e, shift), valence)


def nickel(energy: np.ndarray, shift: float, ni: float = 1.4) -> np.ndarray:
    x = energy - 8333.0
    return tabulated(energy, {"Mn": 0.8}) + ni * (40 - 0.015 * x + (280 - 0.03 * x) * ni_xanes(energy, shift))


@pytest.fixture(scope="module")
def scanned() -> list[AlignedEnergy]:
    return measured(EDGE_SCAN, levels=nickel(EDGE_SCAN, 0.4))


def test_measures_are_those_of_the_reconstructed_energies(scanned: list[AlignedEnergy]) -> None:
    from scipy.ndimage import gaussian_filter

    p = MapsParameters(edge_measures=EDGE_MEASURES, smoothing_voxel=1.0, energy_offset_ev=1.5)
    mean, noise = nickel(EDGE_SCAN, 0.0), np.ones(len(EDGE_SCAN))
    found = plan_maps(EDGE_SCAN, mean, noise, len(EDGE_SCAN) - 1, p)
    assert found.measured == EDGE_MEASURES
    assert found.single == tuple(range(2, len(EDGE_SCAN)))  # the energies of the other edge have no part in it
    rows = (8, 14)
    maps = map_slab(scanned, found, Slab(*rows, halo_rows(p)), VOXEL_NM, p, threads=1)
    everything = MapPlan(**{**vars(found), "components": {f"@{k}": w for k, w in enumerate(np.eye(len(EDGE_SCAN)))}})
    sinograms, theta = component_sinograms(scanned, everything, (0, SHAPE[0]))
    ones = np.ones(len(theta))
    volumes = [gaussian_filter(fbp(s, theta, weights=ones) * np.float32(1e7 / VOXEL_NM), 1.0) for s in sinograms]
    spectra = np.stack(volumes)[2:, rows[0] : rows[1]]
    assert found.measures is not None
    inside = np.isfinite(maps["edge_energy_half"])
    assert inside.sum() > 500
    assert not np.any(inside & ~np.isfinite(maps["edge_energy_relative"]))
    for name, (unit, _) in MEASURES.items():
        direct = found.measures.measure([name], spectra[:, inside])[name].value + (1.5 if unit == "eV" else 0.0)
        np.testing.assert_allclose(maps[name][inside], direct, atol=2e-3)  # what single precision holds of 8342 eV
    # All spectra in the ball are one; its truth is that of the curve.
    half = maps["edge_energy_half"][inside_ball()[rows[0] : rows[1]]]
    assert np.median(half) == pytest.approx(8333 + 9.3 + 0.4 + 1.5, abs=0.3)


def test_what_a_displaced_energy_makes_of_the_edge_is_what_it_changes(scanned: list[AlignedEnergy]) -> None:
    by, e = np.array([0.4, 0.6, -0.5, 0.3]), int(np.argmin(np.abs(EDGE_SCAN - 8342)))  # y, z, x, rotation centre, px
    found = plan_maps(EDGE_SCAN, nickel(EDGE_SCAN, 0.0), np.ones(len(EDGE_SCAN)), len(EDGE_SCAN) - 1)
    a, t = scanned[e].alignment, np.deg2rad(scanned[e].scan.theta_deg)
    across = by[2] * np.cos(t) + by[1] * np.sin(t) + by[3]
    shift = a.shift + a.magnification * np.stack([np.full_like(t, by[0]), across], axis=1)
    moved = [*scanned]
    moved[e] = replace(scanned[e], alignment=replace(a, shift=shift))
    displacement = np.where(np.arange(len(EDGE_SCAN)) == e, 1.0, 0.0)[:, None] * -by  # of the content, once placed
    p, slab = MapsParameters(), Slab(8, 14, halo_rows(MapsParameters()))
    before = map_slab(scanned, found, slab, VOXEL_NM, p, threads=1)
    after = map_slab(moved, replace(found, displacement=displacement), slab, VOXEL_NM, p, threads=1)
    inside = (before["mask"] > 0.5) & (after["mask"] > 0.5)
    change = (after["edge_energy_relative"] - before["edge_energy_relative"])[inside]
    assert np.std(change) > 0.1
    np.testing.assert_allclose(after["edge_energy_artefact"][inside], change, atol=0.05 * np.abs(change).max())


def test_errors_of_measures(scanned: list[AlignedEnergy]) -> None:
    p = MapsParameters(edge_measures=EDGE_MEASURES)
    moved = [replace(i, translation_sigma=(0.1, 0.1, 0.1), magnification_sigma=1e-3) for i in scanned]
    found = plan_maps(EDGE_SCAN, nickel(EDGE_SCAN, 0.0), np.ones(len(EDGE_SCAN)), len(EDGE_SCAN) - 1, p)
    maps = map_slab(moved, found, Slab(8, 14, halo_rows(p)), VOXEL_NM, p, threads=1)
    for name in EDGE_MEASURES:
        known = np.isfinite(maps[name])
        total, aligned = maps[f"{name}_sigma"], maps[f"{name}_sigma_alignment"]
        np.testing.assert_array_equal(np.isfinite(total), known)
        assert np.all(aligned[known] > 0)
        assert np.all(aligned[known] < total[known])
    # One and the same shift, measured twice: the regression on all energies is the surer one.
    known = np.isfinite(maps["edge_energy_half"])
    assert np.median(maps["edge_energy_relative_sigma"][known]) < np.median(maps["edge_energy_half_sigma"][known])


def test_the_variance_of_a_component_is_that_of_its_energies(scanned: list[AlignedEnergy]) -> None:
    p = MapsParameters(edge_measures=("edge_energy_half",))
    found = plan_maps(EDGE_SCAN, nickel(EDGE_SCAN, 0.0), np.ones(len(EDGE_SCAN)), len(EDGE_SCAN) - 1, p)
    made = combine_slab(scanned, found, (6, 16), keep=(8, 14), parameters=p)
    assert made.noise is not None
    pair = {q: k for k, q in enumerate(found.pairs)}
    total = sum(
        found.components["level"][k] ** 2 * made.noise[pair[f"@{k}", f"@{k}"]].astype(float) for k in found.single
    )
    np.testing.assert_allclose(made.noise[pair["level", "level"]], total, rtol=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 1.0])
def test_measures_do_not_depend_on_the_slabs(scanned: list[AlignedEnergy], smoothing: float) -> None:
    p = MapsParameters(
        edge_measures=("edge_energy_half", "white_line"), smoothing_voxel=smoothing, references=("a=x", "b=y")
    )
    mean = nickel(EDGE_SCAN, 0.0)
    refs = [reference("a", -2.0, 2.0), reference("b", 2.0, 4.0)]
    found = plan_maps(EDGE_SCAN, mean, np.ones(len(EDGE_SCAN)), len(EDGE_SCAN) - 1, p, references=refs)
    together = map_slab(scanned, found, Slab(8, 16, halo_rows(p)), VOXEL_NM, p, threads=1)
    for y0, y1 in ((8, 11), (11, 12), (12, 16)):
        piece = map_slab(scanned, found, Slab(y0, y1, halo_rows(p)), VOXEL_NM, p, threads=1)
        for name in found.names:
            tolerance = 2e-3 if name in EDGE_MEASURES else 1e-3
            np.testing.assert_allclose(piece[name], together[name][y0 - 8 : y1 - 8], rtol=2e-3, atol=tolerance)


def test_fractions_of_references() -> None:
    refs = [reference("low", -1.0, 2.0), reference("high", 2.0, 4.0)]
    shares = np.array([0.0, 0.25, 0.7, 1.0])
    x = EDGE_SCAN - 8333.0

    def voxel(share: float, amount: float = 1.0) -> np.ndarray:
        edge = (1 - share) * ni_xanes(EDGE_SCAN, -1.0) + share * ni_xanes(EDGE_SCAN, 2.0)
        return tabulated(EDGE_SCAN, {"Mn": 0.8}) + amount * (56 + (390 - 0.03 * x) * edge)

    found = plan_maps(
        EDGE_SCAN, voxel(0.5), np.ones(len(EDGE_SCAN)), len(EDGE_SCAN) - 1, MapsParameters(), references=refs
    )
    maps = finished(found, np.stack([voxel(s, 0.8) for s in shares] + [voxel(0, 0)], axis=1))
    # The shoulder behind the white line lies on the mean's post-edge line: within 0.02.
    np.testing.assert_allclose(maps["lcf_high"][0, 0, :4], shares, atol=0.02)
    np.testing.assert_allclose(maps["lcf_low"][0, 0, :4], 1 - shares, atol=0.02)
    np.testing.assert_allclose(maps["valence"][0, 0, :4], 2 + 2 * shares, atol=0.04)
    assert np.isnan(maps["valence"][0, 0, 4])  # no nickel
    assert found.about("valence", MapsParameters(), 0.7)["references"] == {"low": 2.0, "high": 4.0}


@pytest.mark.parametrize(
    ("refs", "why"),
    [
        ([reference("other", 0.0, 2.0, low=7000.0, high=7400.0)], "reaches from 7000 to 7399.5 eV"),
        ([reference("short", 0.0, 2.0, high=8360.0)], "reaches from 8100 to 8359.5 eV"),
        ([reference("bare", 0.0, 2.0, low=8315.0)], "cannot be normalised"),
        ([reference("a", 0.0, 2.0), reference("b", 0.0, 3.0)], "cannot be told apart"),
        ([reference(f"r{k}", k - 3.0, 2.0) for k in range(7)], "1 to 6 references"),
    ],
)
def test_references_that_cannot_be_used_leave_only_their_maps_out(refs: list[ReferenceSpectrum], why: str) -> None:
    one = np.ones(len(EDGE_SCAN))
    found = plan_maps(EDGE_SCAN, nickel(EDGE_SCAN, 0.0), one, len(EDGE_SCAN) - 1, MapsParameters(), references=refs)
    names = {*(f"lcf_{r.name}" for r in refs), "valence"}
    assert names <= set(found.absent)
    assert not names & set(found.names)
    assert all(why in found.absent[name] for name in names)
    plain = plan_maps(EDGE_SCAN, nickel(EDGE_SCAN, 0.0), one, len(EDGE_SCAN) - 1)
    assert found.names == plain.names


def test_no_valence_without_declared_ones() -> None:
    refs = [reference("a", -1.0, 2.0), reference("b", 2.0)]
    one = np.ones(len(EDGE_SCAN))
    found = plan_maps(EDGE_SCAN, nickel(EDGE_SCAN, 0.0), one, len(EDGE_SCAN) - 1, references=refs)
    assert "valence" not in found.names
    assert {"lcf_a", "lcf_b"} <= set(found.names)


@pytest.mark.parametrize(
    ("energies", "asked", "why"),
    [
        (SIX, "edge_energy_half", "no edge was scanned"),
        (DEMO[DEMO > 8320], "white_line", "there is none below it, -200 to -20 eV"),
        (np.array([6534.0, 6558, 8178, 8342, 8346, 8570]), "white_line", "no maximum"),
        (np.array([6534.0, 6558, 8178, 8342, 8346, 8570]), "edge_energy_derivative", "fewer than four"),
    ],
)
def test_measures_that_the_energies_cannot_give(energies: np.ndarray, asked: str, why: str) -> None:
    p = MapsParameters(edge_measures=(asked,))
    found = plan_maps(energies, nickel(energies, 0.0), np.ones(len(energies)), len(energies) - 1, p)
    assert why in found.absent[asked]
    assert asked not in found.names
    assert found.single == ()


def test_no_voxel_above_the_mask_and_nan_leave_nan_not_an_error() -> None:
    p = MapsParameters(edge_measures=EDGE_MEASURES, smoothing_voxel=0)
    found = plan_maps(EDGE_SCAN, nickel(EDGE_SCAN, 0.0), np.ones(len(EDGE_SCAN)), len(EDGE_SCAN) - 1, p)
    voxels = np.zeros((len(EDGE_SCAN), 3))
    voxels[:, 1] = np.nan
    volumes = {n: (found.components[n] @ voxels)[None, None].astype(np.float32) for n in found.linear}
    cover = np.ones((1, 1, 3), np.float32)
    maps = finish_slab(found, volumes, cover, cover, slice(0, 1), p, spectra=lambda k: voxels[2:, None, :])
    assert set(maps) == set(found.names)
    for name in (*EDGE_MEASURES, "edge_energy_relative"):
        assert np.isnan(maps[name]).all()
    assert not maps["mask"].any()


class _Made(ArrayFrames):
    """Frames that are made when they are read: nothing of a measurement stays in memory."""

    def __init__(self, count: int, shape: tuple[int, int]) -> None:
        super().__init__(np.broadcast_to(np.float32(0), (count, *shape)))

    def read_rows(self, indices: list[int], y0: int, y1: int) -> npt.NDArray[np.float32]:
        x = np.arange(self.frame_shape[1], dtype=np.float32) - (self.frame_shape[1] - 1) / 2
        line = (1000 * np.exp(-0.4 * np.exp(-((x / 12) ** 2)))).astype(np.float32)
        return np.broadcast_to(line, (len(indices), y1 - y0, len(line))).copy()


def test_memory_is_that_of_a_slab() -> None:
    width, angles, rows = 64, 60, 16
    theta, p = np.linspace(-90, 87, angles), MapsParameters()
    found = plan(SIX)
    peak = {}
    for height in (80, 320):
        items = []
        for energy in SIX:
            flat = FlatSet(ArrayFrames(np.full((2, height, width), 2000, np.float32)), np.full(2, 2.0), ("ok", "ok"))
            scan = EnergyScan(
                float(energy), theta, _Made(angles, (height, width)), np.ones(angles), ("ok",) * angles, (flat,),
                np.zeros(angles, int), 1, VOXEL_NM, np.zeros(angles),
            )  # fmt: skip
            aligned = Alignment(np.zeros((angles, 2)), np.full((angles, 2), 0.02), 1.0)
            items.append(AlignedEnergy(scan, aligned, np.zeros((angles, 3))))
        slab = Slab(height // 2, height // 2 + rows, halo_rows(p))
        map_slab(items, found, slab, VOXEL_NM, p, threads=1)  # what is compiled or cached once is there
        tracemalloc.start()
        maps = map_slab(items, found, slab, VOXEL_NM, p, threads=1)
        peak[height] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert maps["Ni"].shape == (rows, width, width)
    assert peak[320] == pytest.approx(peak[80], rel=0.1)
    promised = slab_bytes(found, rows + 2 * halo_rows(p), width, angles)
    assert 0.5 * promised < peak[320] < promised


def test_no_amount_is_negative_when_that_is_asked_for() -> None:
    """The constrained volumes are those of least squares with that constraint on every voxel's spectrum."""
    from scipy.optimize import nnls

    found = plan(SIX)
    rng = np.random.default_rng(4)
    spectra = tabulated(SIX, {"Mn": 0.05, "Co": 0.3, "Ni": 0.02})[:, None] + rng.normal(0, 30.0, (len(SIX), 200))
    volumes = {n: (found.components[n] @ spectra)[None, None].astype(np.float32) for n in found.linear}
    volumes["shape"] = np.full((1, 1, 200), found.shape_level, np.float32)
    cover = np.ones((1, 1, 200), np.float32)
    maps = {}
    for asked in (False, True):
        p = MapsParameters(smoothing_voxel=0, non_negative=asked)
        maps[asked] = finish_slab(found, volumes, cover, cover, slice(0, 1), p)
    table = np.stack([*(mass_attenuation(e, SIX) for e in found.elements), (SIX / SIX.mean()) ** -3.0], axis=1)
    # The remainder is free to be of either sign: it enters twice.
    right = np.stack([nnls(np.column_stack([table, -table[:, -1]]), s)[0][:3] for s in spectra.T], axis=1)
    for k, e in enumerate(found.elements):
        free, bound = maps[False][e].ravel(), maps[True][e].ravel()
        assert (free < 0).any() or e == "Co"
        np.testing.assert_allclose(bound, right[k], atol=1e-5)
        assert bound.min() >= 0
        share = maps[True][f"{e}_fraction"]
        assert np.nanmin(share) >= 0
        assert np.nanmax(share) <= 1
    np.testing.assert_allclose(maps[True]["density"], sum(maps[True][e] for e in found.elements), rtol=1e-5)
    untouched = np.all([maps[False][e].ravel() >= 0 for e in found.elements], axis=0)
    for e in found.elements:
        np.testing.assert_array_equal(maps[True][e].ravel()[untouched], maps[False][e].ravel()[untouched])
