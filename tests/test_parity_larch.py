"""The same spectrum normalised by Larch (Newville 2013, doi 10.1088/1742-6596/430/1/012007), where it is installed."""

import warnings

import numpy as np
import pytest

from napari_xanes_tomo.phantom import ni_xanes
from napari_xanes_tomo.spectra import EdgeMeasures, edge_at_half, edge_measures, normalisation

EDGE = 8333.0
WINDOWS = {"pre_ev": (-155.0, -20.0), "post_ev": (67.0, 237.0)}
SCAN = np.concatenate(
    [np.arange(8178.0, 8328.0, 15.0), np.arange(8328.0, 8371.0, 1.0), np.arange(8390.0, 8571.0, 20.0)]
)
FINE = np.arange(8170.0, 8580.0, 0.5)


def larch(energy: np.ndarray, mu: np.ndarray) -> dict:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        xafs = pytest.importorskip("larch.xafs.pre_edge", reason="xraylarch is not installed", exc_type=ImportError)
        names = {"pre1": -155.0, "pre2": -20.0, "norm1": 67.0, "norm2": 237.0}
        return dict(xafs.preedge(energy, mu, e0=EDGE, nvict=0, nnorm=1, **names)) | {"found": xafs.find_e0(energy, mu)}


def spectrum(energy: np.ndarray, shift: float, noise: float = 0.0) -> np.ndarray:
    x = energy - EDGE
    clean = 0.4 - 3e-4 * x + (1.2 - 4e-4 * x) * ni_xanes(energy, shift)
    return clean + noise * np.random.default_rng(0).normal(size=len(energy))


# Grid, relative tolerance of the jump, of the normalised spectrum, and of energies in eV. Larch leaves the last energy
# of a window out, and takes the steepest energy of the grid where we fit a cubic.
@pytest.mark.parametrize(("energies", "jump", "norm", "ev"), [(FINE, 2e-3, 3e-3, 0.6), (SCAN, 5e-3, 6e-3, 1.1)])
@pytest.mark.parametrize("shift", [-1.0, 0.0, 1.5])
@pytest.mark.parametrize("noise", [0.0, 0.005])
def test_normalised_as_by_larch(
    energies: np.ndarray, jump: float, norm: float, ev: float, shift: float, noise: float
) -> None:
    mu = spectrum(energies, shift, noise)
    other = larch(energies, mu)
    own = normalisation(energies, mu, EDGE, **WINDOWS)
    assert own is not None
    assert own.jump == pytest.approx(other["edge_step"], rel=jump + noise)
    flat = (mu - other["pre_edge"]) / (other["post_edge"] - other["pre_edge"])
    np.testing.assert_allclose(own(energies, mu), flat, atol=norm + 2 * noise)
    near = np.abs(energies - EDGE) < 100
    half = edge_at_half(energies[near], flat[near])
    assert edge_at_half(energies[near], own(energies[near], mu[near])) == pytest.approx(half, abs=0.03)
    measures = edge_measures(energies, mu, EDGE, free_slopes=True, **WINDOWS)
    assert isinstance(measures, EdgeMeasures)
    found = measures.measure(["edge_energy_derivative", "edge_energy_half"], mu[:, None])
    assert found["edge_energy_derivative"].value[0] == pytest.approx(other["found"], abs=ev + 100 * noise)
    assert found["edge_energy_half"].value[0] == pytest.approx(half, abs=0.05 + 20 * noise)
