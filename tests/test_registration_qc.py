"""What is left of the registration's error, and what it does to the maps."""

from __future__ import annotations

import numpy as np
import pytest

from napari_xanes_tomo.map_plan import plan_maps
from napari_xanes_tomo.recipe import MapsParameters
from napari_xanes_tomo.registration_qc import error_map, surface_effect


def test_displaced_projections_stand_out_and_keep_their_place() -> None:
    rng = np.random.default_rng(5)
    energies = np.array([8300.0, 8340.0, 8360.0, 8400.0])
    sigma = np.full((40, 2), 0.03)
    shifts = [None, *(rng.normal(0, 0.03, (n, 2)) for n in (40, 40, 36))]
    injected = [(1, 7), (1, 39), (2, 0), (3, 12), (3, 35)]
    for e, i in injected:
        shifts[e][i] += (0.6, -0.8)
    found = error_map(energies, shifts, [None, sigma, sigma, sigma[:36]])
    assert found.z.shape == (4, 40)
    assert np.isnan(found.z[0]).all()
    assert np.isnan(found.z[3, 36:]).all()
    assert {(e, i) for e, i, _ in found.worst(5)} == set(injected)
    assert found.length_px[1, 7] == pytest.approx(1.0, abs=0.15)
    assert found.length_nm([25.0, 26.0, 27.0, 28.0])[1, 7] == pytest.approx(26 * found.length_px[1, 7])
    columns = found.columns([40, 40, 40, 36])
    assert len(columns["registration_z"]) == 156
    assert columns["registration_dx_px"][40 + 7] == shifts[1][7, 1]


def test_without_any_registration_it_is_empty() -> None:
    found = error_map([8300.0, 8400.0], [None, None], [None, None])
    assert found.z.shape == (2, 0)
    assert found.worst(3) == []
    assert np.isnan(found.columns([4, 5])["registration_z"]).all()


def test_effect_at_a_surface_is_that_of_a_spectrum_with_one_energy_wrong() -> None:
    """A tenth of a pixel at a surface is a tenth of the step of that energy: the edge moves by what the fit says."""
    energies = np.array([7700.0, 7740.0, 8180.0, 8250.0, 8300.0, *np.arange(8336.0, 8366.0, 4), 8400.0, 8450.0, 8570.0])
    spectrum = 400 + 900 / (1 + np.exp(-(energies - 8346) / 3)) - 0.3 * (energies - 8300)
    reference = len(energies) - 1
    plan = plan_maps(energies, spectrum, np.ones(len(energies)), reference, MapsParameters())
    assert plan.edge is not None
    effect = surface_effect(plan)
    for e in (6, 8, 12):
        wrong = spectrum.copy()
        wrong[e] *= 1.001
        shift = plan.edge.shift(
            np.array([plan.edge.numerator @ wrong]), np.array([plan.edge.denominator @ wrong])
        ) - plan.edge.shift(np.array([plan.edge.numerator @ spectrum]), np.array([plan.edge.denominator @ spectrum]))
        numerator_only = effect.edge_ev[e] * 0.001
        assert float(shift[0]) == pytest.approx(numerator_only, rel=0.25, abs=2e-4), energies[e]
    assert effect.edge_ev[0] == pytest.approx(0.0, abs=1e-9)
    positive = [name for name in plan.elements if plan.components[name] @ spectrum > 0]
    assert "Ni" in positive
    for name in positive:
        wrong = spectrum.copy()
        wrong[reference] *= 1.01
        weights = plan.components[name]
        expected = (weights @ wrong) / (weights @ spectrum) - 1
        assert 0.01 * effect.element[name][reference] == pytest.approx(expected, rel=1e-6)
