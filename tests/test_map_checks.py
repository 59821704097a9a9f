"""Checks before the maps, on rows of line integrals made from known voxels."""

import numpy as np
import pytest

from napari_xanes_tomo.chemistry import MapPlan, plan_maps
from napari_xanes_tomo.edges import mass_attenuation
from napari_xanes_tomo.map_checks import Rows, follow_edge
from napari_xanes_tomo.phantom import PRESETS, ni_xanes
from napari_xanes_tomo.projector import Projector

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
    return plan, Rows((lines * np.pi / len(THETA)).astype(np.float32), THETA, per_cm, 1.0, "ramp"), body


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


def test_no_half_sets_no_particle_no_energies_is_said() -> None:
    plan, rows, _ = measured(0.0, 0.0)
    few = Rows(rows.lines[:, :8], rows.theta_deg[:8], rows.per_cm, 1.0, "ramp")
    assert "8 angles" in follow_edge(plan, few)
    empty = Rows(0 * rows.lines, rows.theta_deg, rows.per_cm, 1.0, "ramp")
    assert "0 voxels" in follow_edge(plan, empty)
    six = np.array([6534.0, 6558.0, 7704.0, 7728.0, 8178.0, 8570.0])
    at = np.isin(DEMO, six)
    short = plan_maps(DEMO[at], spectrum(0.0)[at], np.ones(6), 5)
    assert "too few energies" in follow_edge(short, rows)
