"""Differences of registered energies: apparent displacement at surfaces, pairs that should not differ."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from napari_xanes_tomo.differences import (
    Probe,
    against_reference,
    make_probe,
    null_pairs,
    null_test,
    null_tests,
    sample,
)
from napari_xanes_tomo.model import Alignment
from napari_xanes_tomo.template import Template, make_template

THETA = np.arange(-90.0, 90.0, 3.0)
SHAPE = (48, 64)
STILL = Alignment.identity(len(THETA))
# Middle (y, z, x), radius, attenuation of two contrasts.
BALLS = (((0, 0, 0), 17.0, 0.05, 0.05), ((5, -6, 4), 6.0, 0.02, 0.035), ((-6, 5, -5), 5.0, -0.03, -0.03))


def frames(move=(0.0, 0.0, 0.0), *, contrast=0, factor=1.0, noise=0.0, seed=0):
    """Line integrals of the balls, moved by [y, z, x] px, averaged over pixels."""
    t = np.deg2rad(THETA)
    fine = 3
    sub = (np.arange(fine) - 1) / fine
    y, x = ((np.arange(n)[:, None] + sub - (n - 1) / 2).ravel() for n in SHAPE)
    out = np.zeros((len(t), len(y), len(x)))
    for (cy, cz, cx), radius, *level in BALLS:
        u = (cx + move[2]) * np.cos(t) + (cz + move[1]) * np.sin(t)
        square = radius**2 - (y - cy - move[0])[None, :, None] ** 2 - (x[None, :] - u[:, None])[:, None, :] ** 2
        out += 2 * level[contrast] * np.sqrt(np.maximum(square, 0))
    out = factor * out.reshape(len(t), SHAPE[0], fine, SHAPE[1], fine).mean(axis=(2, 4))
    out += noise * np.random.default_rng(seed).standard_normal(out.shape)
    return out.astype(np.float32)


@pytest.fixture(scope="module")
def template() -> Template:
    return make_template(frames(noise=0.01), THETA, STILL)


@pytest.fixture(scope="module")
def probe(template: Template) -> Probe:
    return make_probe(template)


def samples(probe: Probe, *args: object, **more: object) -> np.ndarray:
    return sample(frames(*args, **more), THETA, STILL, probe, SHAPE)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "move", [(0.0, 0.0, 0.0), (0.2, 0.0, 0.0), (0.0, -0.15, 0.0), (0.0, 0.0, 0.25), (-0.1, 0.1, 0.05)]
)
@pytest.mark.parametrize("factor", [1.0, 0.4])
def test_a_displacement_is_read_off_the_surfaces(probe: Probe, move: tuple[float, ...], factor: float) -> None:
    found = against_reference(samples(probe, move, factor=factor, noise=0.01, seed=3), probe)
    np.testing.assert_allclose(found.shift, move, atol=0.03)
    assert (found.sigma < 0.03).all()
    assert abs(found.outward) < 0.05


def test_a_particle_too_large_is_seen_outward(probe: Probe) -> None:
    larger = replace(STILL, magnification=1 / 1.01)  # placed a hundredth too large: 0.17 px at its rim
    found = against_reference(sample(frames(noise=0.01), THETA, larger, probe, SHAPE), probe)
    np.testing.assert_allclose(found.shift, 0, atol=0.03)
    assert found.outward == pytest.approx(0.17, abs=0.06)


def test_errors_are_of_the_right_size(probe: Probe) -> None:
    found = [against_reference(samples(probe, (0.1, 0.0, 0.0), noise=0.03, seed=s), probe) for s in range(1, 9)]
    off = np.array([f.shift - np.mean([g.shift for g in found], axis=0) for f in found])
    stated = np.sqrt(np.mean([f.sigma**2 for f in found], axis=0))
    ratio = np.sqrt(np.mean(off**2) * 8 / 7) / np.sqrt(np.mean(stated**2))
    assert 0.4 < ratio < 2.5


@pytest.mark.parametrize(
    ("energies", "expected"),
    [
        (
            (6534.0, 6558.0, 7704.0, 7728.0, 8178.0, 8298.0, 8328.0, 8344.0, 8400.0, 8570.0),
            ((6558, 7704), (7728, 8178), (7728, 8328), (8400, 8570)),
        ),
        ((6534.0, 6558.0), ()),
        ((8178.0, 8344.0, 8570.0), ()),
        ((8000.0, 8050.0, 8120.0), ((8000, 8120),)),
        ((8178.0, 7704.0, 6558.0, 6534.0, 7728.0), ((6558, 7704), (7728, 8178))),
        ((8000.0, 8000.0), ()),
    ],
)
def test_pairs_without_an_edge_between(energies: tuple[float, ...], expected: tuple[tuple[int, int], ...]) -> None:
    assert tuple((energies[a], energies[b]) for a, b in null_pairs(energies)) == expected


def test_equal_energies_do_not_differ_and_others_do(probe: Probe) -> None:
    a, b = samples(probe, factor=0.7, noise=0.02, seed=1), samples(probe, factor=0.6, noise=0.02, seed=2)
    same = null_test((7728.0, 8178.0), a, b, probe)
    assert same.scale == pytest.approx(0.6 / 0.7, rel=0.01)
    assert same.difference < 0.01 + 3 * same.difference_sigma
    np.testing.assert_allclose(same.dipole.shift, 0, atol=0.05)
    other = samples(probe, contrast=1, factor=0.6, noise=0.02, seed=2)
    found = null_test((7728.0, 8178.0), a, other, probe)
    assert found.difference > 0.03
    assert found.difference > 4 * found.difference_sigma
    mixed = samples(probe, contrast=1, noise=0.02, seed=5)
    explained = null_test((7728.0, 8178.0), a, other, probe, reference=mixed)
    assert explained.with_composition < 0.3 * found.difference


def test_a_displaced_pair_shows_at_its_surfaces(probe: Probe) -> None:
    a = samples(probe, factor=0.7, noise=0.02, seed=1)
    b = samples(probe, (0.2, 0.0, -0.1), factor=0.6, noise=0.02, seed=2)
    found = null_test((7728.0, 8178.0), a, b, probe)
    np.testing.assert_allclose(found.dipole.shift, (0.2, 0.0, -0.1), atol=0.05)
    assert "7728 against 8178 eV" in found.text()


def test_a_probe_is_kept_as_arrays(probe: Probe) -> None:
    again = Probe.of(probe.arrays())
    assert again is not None
    for name in ("rows", "at", "value", "gradient", "curvature", "surface"):
        np.testing.assert_allclose(getattr(again, name), getattr(probe, name), rtol=1e-6)
    assert Probe.of({}) is None
    values = samples(probe, noise=0.01, seed=4)
    energies = (6534.0, 6558.0, 7704.0, 7728.0, 8570.0)
    found = null_tests(energies, [None, values, values, None, values], again, 4)
    assert [f.energies_ev for f in found] == [(6558.0, 7704.0)]
    assert found[0].difference < 1e-6
