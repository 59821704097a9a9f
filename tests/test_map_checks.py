"""Checks before the maps, on rows of line integrals made from known voxels."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from napari_xanes_tomo.artefact import displaced_lines
from napari_xanes_tomo.chemistry import finish_slab
from napari_xanes_tomo.edges import mass_attenuation
from napari_xanes_tomo.map_checks import (
    MASS_LIMIT,
    Displaced,
    MapChecks,
    MassBalance,
    Rows,
    displacements,
    edge_width,
    follow_edge,
    half_sets,
    mass_balance,
)
from napari_xanes_tomo.map_plan import MapPlan, plan_maps
from napari_xanes_tomo.map_report import checks_section
from napari_xanes_tomo.phantom import PRESETS, ni_xanes
from napari_xanes_tomo.projector import Projector
from napari_xanes_tomo.recipe import MapsParameters
from napari_xanes_tomo.reconstruction import fbp

DEMO = np.array(PRESETS["demo"].energies_ev)
THETA = np.arange(-90.0, 90.0, 3.0)
N, ROWS = 48, 8
VOXEL_NM = 200.0


def spectrum(shift: float, ni: float = 1.4, height: float = 0.0) -> np.ndarray:
    """Linear attenuation of a voxel, 1/cm: a nickel edge that moves, with a white line of its own height."""
    x = DEMO - 8333.0
    line = height * np.exp(-0.5 * ((x - 16 - shift) / 6) ** 2)
    others = sum(r * mass_attenuation(e, DEMO) for e, r in {"Mn": 0.8, "Co": 0.5}.items())
    return others + 12.0 * (DEMO / 8000.0) ** -3 + ni * (40 - 0.015 * x + 280 * (ni_xanes(DEMO, shift) + line))


def measured(grows: float, noise: float, valence: float = 1.0, seed: int = 0) -> tuple[MapPlan, Rows, np.ndarray]:
    """A cylinder whose edge moves by +-`valence` eV across it, its white line by `grows` an eV; rows and body."""
    c = np.arange(N) - (N - 1) / 2
    z, x = np.meshgrid(c, c, indexing="ij")
    body = np.hypot(z, x) < 17
    shift = valence * np.clip(x / 17, -1, 1)
    levels = np.linspace(-1, 1, 21) * valence
    mean = np.mean([spectrum(s, height=grows * s) for s in levels], axis=0)
    plan = plan_maps(DEMO, mean, np.ones(len(DEMO)), len(DEMO) - 1)
    grid = np.linspace(-1.2, 1.2, 25) * max(valence, 1e-3)
    table = np.stack([spectrum(s, height=grows * s) for s in grid])
    per_cm = 1e7 / VOXEL_NM
    voxels = np.stack([np.interp(shift, grid, table[:, e]) * body for e in range(len(DEMO))]) / per_cm
    lines = Projector(N, THETA).forward(voxels.astype(np.float32))  # (angle, energy, column)
    lines = np.repeat(lines.transpose(1, 0, 2)[:, :, None], ROWS, axis=2)
    rng = np.random.default_rng(seed)
    lines = lines + noise * rng.normal(size=lines.shape)
    share = np.full(lines.shape[:2], np.pi / len(THETA))
    rows = Rows((lines * np.pi / len(THETA)).astype(np.float32), THETA, share, per_cm, 1.0, "ramp")
    return plan, rows, body


def inner(volume: np.ndarray) -> np.ndarray:
    """The middle rows, away from the surface."""
    c = np.arange(N) - (N - 1) / 2
    return volume[2:-2, np.hypot(*np.meshgrid(c, c, indexing="ij")) < 13].ravel().astype(float)


# Slope of nickel over the edge energy, relative to nickel and per eV. Noise must not be taken for a slope.
@pytest.mark.parametrize(
    ("grows", "noise", "before", "after"),
    [(0.0, 0.0, 0.0, 0.001), (0.1, 0.0, 0.01, 0.002), (0.1, 0.02, 0.01, 0.004), (-0.1, 0.02, 0.01, 0.004)],
)
def test_what_follows_the_edge_is_taken_out(grows: float, noise: float, before: float, after: float) -> None:
    plan, quiet, _ = measured(grows, 0.0)
    slope = follow_edge(plan, measured(grows, noise)[1])
    assert isinstance(slope, dict)

    def follows(p: MapPlan) -> float:
        ni, shift, level = (inner(quiet.volume(p.components[n])) for n in ("Ni", "shift", "level"))
        return float(np.polyfit(shift / level, ni, 1)[0] / ni.mean())

    table = follows(plan)
    assert abs(follows(plan.with_scanned_edge(dict.fromkeys(slope, 0.0))) - table) >= before
    assert follows(plan.with_scanned_edge(slope)) == pytest.approx(table, abs=after)


def test_less_noise_with_the_edge() -> None:
    quiet, noisy = (measured(0.0, n) for n in (0.0, 0.02))
    plan = noisy[0]
    helped = plan.with_scanned_edge(follow_edge(plan, noisy[1]))  # type: ignore[arg-type]

    def scatter(p: MapPlan) -> float:
        return float(np.std(inner(noisy[1].volume(p.components["Ni"])) - inner(quiet[1].volume(p.components["Ni"]))))

    assert scatter(helped) < 0.85 * scatter(plan)


def test_an_edge_that_moves_nowhere_is_not_followed() -> None:
    plan, rows, _ = measured(0.0, 0.05, valence=0.0)
    assert follow_edge(plan, rows) == dict.fromkeys(("Mn", "Co", "Ni"), 0.0)


@pytest.mark.parametrize("noise", [0.0, 0.005, 0.02])
def test_the_width_of_the_edge_counts_as_far_as_it_is_seen(noise: float) -> None:
    plan, quiet, _ = measured(0.0, 0.0)
    rows = measured(0.0, noise)[1]
    found = edge_width(plan, rows)
    assert plan.helped is not None
    difference = inner(rows.volume(plan.helped.width)) - inner(quiet.volume(plan.helped.width))
    assert found.noise == pytest.approx(float(np.std(difference)), rel=0.25, abs=0.05)
    assert found.spread == pytest.approx(0.5, abs=0.1), "edges that move by 1 eV vary little in width"
    assert found.kept == pytest.approx(found.spread**2 / (found.spread**2 + found.noise**2))
    assert (found.kept > 0.95) == (noise == 0)


def test_an_edge_that_varies_in_width_is_known_to() -> None:
    """Half of the cylinder holds two states 4 eV apart: the width counts for more than is expected without looking."""
    plan, rows, _ = measured(0.0, 0.02)
    extra = (spectrum(-2.0) + spectrum(2.0)) / 2 - spectrum(0.0)
    level = np.tensordot(plan.components["shape"] / plan.shape_level, rows.lines, axes=(0, 0))
    level = level * np.where(np.arange(ROWS) % 8 < 4, 1, -1)[:, None]
    wide = replace(rows, lines=rows.lines + (extra[:, None, None, None] * level).astype(np.float32))
    assert edge_width(plan, wide).spread > 2 * edge_width(plan, rows).spread
    assert edge_width(plan, wide).kept > edge_width(plan, rows).kept


def test_no_half_sets_no_particle_no_energies_is_said() -> None:
    plan, rows, _ = measured(0.0, 0.0)
    few = Rows(rows.lines[:, :8], rows.theta_deg[:8], rows.share[:, :8], rows.per_cm, 1.0, "ramp")
    assert "8 angles" in follow_edge(plan, few)
    empty = Rows(0 * rows.lines, rows.theta_deg, rows.share, rows.per_cm, 1.0, "ramp")
    assert "0 voxels" in follow_edge(plan, empty)
    assert edge_width(plan, few).kept == edge_width(plan, empty).kept == 1
    six = np.array([6534.0, 6558.0, 7704.0, 7728.0, 8178.0, 8570.0])
    at = np.isin(DEMO, six)
    short = plan_maps(DEMO[at], spectrum(0.0)[at], np.ones(6), 5)
    assert "too few energies" in follow_edge(short, rows)


# --------------------------------------------------------------------------------- displacements, mass, half sets


def porous(shifts: dict[int, tuple[float, float, float, float]], rim: float = 0.0) -> tuple[MapPlan, Rows]:
    """A body with pores, three grains of their own composition and an edge that moves by `rim` eV in its outer shell.

    `shifts` displaces whole energies: y, z, x, rotation centre in px.
    """
    n, rows, theta = 64, 20, np.arange(-90.0, 90.0, 4.0)
    rng = np.random.default_rng(3)
    c = np.arange(n) - (n - 1) / 2
    y, z, x = np.meshgrid(np.arange(rows) - (rows - 1) / 2, c, c, indexing="ij")
    radius = np.sqrt(z**2 + x**2)
    body = (radius < 22).astype(float)
    for _ in range(40):
        p, size = rng.uniform([-9, -18, -18], [9, 18, 18]), rng.uniform(1.5, 4)
        body[(y - p[0]) ** 2 + (z - p[1]) ** 2 + (x - p[2]) ** 2 < size**2] = 0
    grain = (np.arctan2(z, x) // (2 * np.pi / 3)).astype(int) + 2
    shell = (radius > 19) & (body > 0)
    spectra = [spectrum(0.0, ni) for ni in (1.3, 1.4, 1.5)]
    rims = [spectrum(rim, ni) for ni in (1.3, 1.4, 1.5)]
    plan = plan_maps(DEMO, np.mean(spectra, axis=0), np.ones(len(DEMO)), len(DEMO) - 1)
    per_cm, projector = 1e7 / VOXEL_NM, Projector(n, theta)
    lines = np.empty((len(DEMO), len(theta), rows, n), np.float32)
    for e in range(len(DEMO)):
        levels = np.array([s[e] for s in spectra])[np.clip(grain, 0, 2)]
        levels = np.where(shell, np.array([s[e] for s in rims])[np.clip(grain, 0, 2)], levels)
        soft = gaussian_filter((body * levels / per_cm).astype(np.float32), 0.7)
        lines[e] = displaced_lines(projector.forward(soft), theta, shifts.get(e, (0, 0, 0, 0)))
    share = np.full(lines.shape[:2], np.pi / len(theta))
    return plan, Rows((lines * np.pi / len(theta)).astype(np.float32), theta, share, per_cm, 1.0, "ramp")


# Displacement put in (y, z, x, rotation centre), px, and how exactly it comes back.
@pytest.mark.parametrize(
    ("energy", "by"),
    [(9, (1.0, 0.0, 0.0, 0.0)), (4, (0.0, 0.0, 1.0, 0.0)), (1, (0.0, -0.5, 0.0, 0.0)), (12, (0.3, 0.0, 0.0, 1.0))],
)
def test_a_displaced_energy_is_found(energy: int, by: tuple[float, float, float, float]) -> None:
    found = displacements(*porous({energy: by}))
    assert np.flatnonzero(found.found).tolist() == [energy]
    np.testing.assert_allclose(found.shift[energy], by, atol=0.1)
    others = np.delete(found.length, energy)
    assert others.max() < 0.08


@pytest.mark.parametrize("rim", [0.0, 1.0])
def test_a_real_rim_is_no_displacement(rim: float) -> None:
    found = displacements(*porous({}, rim=rim))
    assert not found.found.any()
    assert found.length.max() < 0.08


def finished(plan: MapPlan, rows: Rows, found: Displaced) -> dict[str, np.ndarray]:
    """Maps of the rows with their artefact; the standard error of the edge energy is 0.1 eV everywhere."""
    plan = replace(plan, displacement=np.where(found.found[:, None], found.shift, 0.0))
    volumes = {n: rows.volume(plan.components[n], smoothing=0.0) for n in plan.linear}
    added = {n: np.zeros_like(rows.lines[0]) for n in ("shift", "level")}
    for e in np.flatnonzero(found.found):
        more = rows.lines[e] - displaced_lines(rows.lines[e], rows.theta_deg, -found.shift[e])
        for n, lines in added.items():
            lines += np.float32(plan.components[n][e]) * more
    unit = np.ones(len(rows.theta_deg))
    wrong = {n: fbp(v, rows.theta_deg, weights=unit) * np.float32(rows.per_cm) for n, v in added.items()}
    cover = np.ones_like(volumes["shape"][2:-2])
    return finish_slab(plan, volumes, cover, cover, slice(2, -2), MapsParameters(), wrong=wrong)


@pytest.mark.parametrize("energy", [9, 10, 4])
def test_the_artefact_map_marks_the_false_rim_and_nothing_else(energy: int) -> None:
    clean, false = porous({}), porous({energy: (0.0, 0.0, 1.0, 0.0)})
    before = finished(*clean, displacements(*clean))
    after = finished(*false, displacements(*false))
    body = (before["mask"] > 0.5) & np.isfinite(before["edge_energy_relative"] + after["edge_energy_relative"])
    error = np.abs(after["edge_energy_relative"] - before["edge_energy_relative"])
    flagged = np.abs(after["edge_energy_artefact"]) > 0.1
    assert (error[body] > 0.2).sum() > 200
    assert flagged[body & (error > 0.2)].mean() >= 0.9
    assert flagged[body & (error < 0.05)].mean() <= 0.1
    assert before["artefact"].sum() == 0
    assert np.all((after["artefact"] > 0.5) == (np.abs(np.nan_to_num(after["edge_energy_artefact"])) > 0))


def test_a_real_rim_is_not_flagged() -> None:
    rim = porous({}, rim=1.0)
    maps = finished(*rim, displacements(*rim))
    body = maps["mask"] > 0.5
    assert np.nanmax(maps["edge_energy_relative"][body]) > 0.5
    assert maps["artefact"][body].mean() <= 0.2


def test_mass_is_conserved_unless_something_leaves_the_field() -> None:
    plan, rows = porous({})
    good = mass_balance(plan, rows)
    assert good.ratio == pytest.approx(1.0, abs=0.005)
    assert good.scatter < 0.005
    turned = (rows.theta_deg > 45)[:, None, None] & (np.arange(64) >= 40)  # leaves the field at some angles
    assert mass_balance(plan, replace(rows, lines=np.where(turned, 0, rows.lines))).lost > MASS_LIMIT
    extra = replace(rows, lines=rows.lines * (1 + 0.05 * np.sin(np.deg2rad(4 * rows.theta_deg)))[:, None, None])
    assert mass_balance(plan, extra).lost == pytest.approx(0.05 / np.sqrt(2), rel=0.1)
    nothing = mass_balance(plan, replace(rows, share=0 * rows.share))
    assert np.isnan(nothing.ratio)


def test_half_sets_agree_less_with_noise() -> None:
    plan, rows = porous({})
    noisy = replace(rows, lines=rows.lines + np.random.default_rng(0).normal(0, 4e-4, rows.lines.shape).astype("f4"))
    quiet, loud = (half_sets(plan, r, "Ni", VOXEL_NM) for r in (rows, noisy))
    assert quiet is not None
    assert loud is not None
    low = (quiet.frequency > 0.03) & (quiet.frequency < 0.12)
    assert np.nanmean(quiet.correlation[low]) > 0.97
    high = quiet.frequency > 0.3
    assert np.nanmean(loud.correlation[high]) < np.nanmean(quiet.correlation[high]) - 0.1
    assert loud.detail_nm() is not None
    assert half_sets(plan, replace(rows, lines=0 * rows.lines), "Ni", VOXEL_NM) is None


def test_what_is_wrong_is_said_in_colours() -> None:
    plan, rows = porous({9: (1.0, 0.0, 0.0, 0.0)})
    found = displacements(plan, rows)
    effect = np.full(len(DEMO), 0.5)
    lost = MassBalance(0.96, 0.01)
    bad = MapChecks(plan.energies_ev, "too few energies", found, lost, {}, effect)
    assert any("edge dipole, red: 8343 eV" in n for n in bad.notes)
    assert any("mass, amber" in n for n in bad.notes), "4 % are no more than amber"
    assert any("without the scanned edge" in n for n in bad.notes)
    assert not any(s.passed for s in bad.scores)
    assert [s.colour for s in bad.scores] == ["red", "amber"]
    good = MapChecks(plan.energies_ev, {}, displacements(*porous({})), MassBalance(1.001, 0.001), {}, effect)
    assert good.notes == ()
    assert all(s.passed for s in good.scores)
    html = checks_section(bad.numbers | {"shell_correlation": {}})
    assert "to be looked at" in html
    assert "8343" in html
    assert "passed" in checks_section(good.numbers)
    curve = half_sets(plan, rows, "Ni", VOXEL_NM)
    assert curve is not None
    shown = checks_section(MapChecks(plan.energies_ev, {}, found, lost, {"Ni": curve}, effect).numbers)
    assert "Fourier shell correlation" in shown
    assert "no resolution stated" in shown or "nm" in shown
    assert checks_section({}) == ""


def test_rows_that_hold_nothing_and_an_energy_that_shows_nothing_are_said_not_raised() -> None:
    plan, rows = porous({})
    for lines in (0 * rows.lines, np.full_like(rows.lines, np.nan)):
        bad = replace(rows, lines=lines)
        assert isinstance(follow_edge(plan, bad), str), "no voxel of the particle"
        assert not displacements(plan, bad).found.any()
        assert np.isnan(mass_balance(plan, bad).lost)
        assert half_sets(plan, bad, "Ni", VOXEL_NM) is None
    dead = replace(rows, lines=np.where(np.arange(len(DEMO))[:, None, None, None] == 3, 0, rows.lines).astype("f4"))
    found = displacements(plan, dead)
    assert np.flatnonzero(~np.isfinite(found.length)).tolist() == [3]
    assert not found.found.any()
