import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from napari_xanes_tomo.edges import (
    ELEMENT_RANGE,
    bracketed_elements,
    edge_energy_ev,
    mass_attenuation,
    scanned_element,
    why_not_scanned,
)
from napari_xanes_tomo.model import XanesTomoError

SIX = (6534.0, 6558.0, 7704.0, 7728.0, 8178.0, 8570.0)


# Bearden & Burr 1967, doi 10.1103/RevModPhys.39.125, in every handbook.
@pytest.mark.parametrize(
    ("element", "energy", "tolerance"),
    [("Mn", 6539.0, 1.0), ("Fe", 7112.0, 1.0), ("Co", 7708.9, 1.0), ("Ni", 8332.8, 1.0), ("Cu", 8978.9, 1.0)],
)
def test_edges_of_the_handbook(element: str, energy: float, tolerance: float) -> None:
    assert edge_energy_ev(element) == pytest.approx(energy, abs=tolerance)


# NIST XCOM at 8 keV, cm2/g.
@pytest.mark.parametrize(
    ("element", "value", "tolerance"), [("Ni", 49.5, 0.05), ("Mn", 272.0, 0.05), ("O", 11.4, 0.05)]
)
def test_attenuation_of_the_handbook(element: str, value: float, tolerance: float) -> None:
    assert mass_attenuation(element, 8000.0) == pytest.approx(value, rel=tolerance)


@pytest.mark.parametrize("element", ["Mn", "Co", "Ni"])
def test_attenuation_jumps_at_the_edge_and_falls_elsewhere(element: str) -> None:
    edge = edge_energy_ev(element)
    below, above, far = mass_attenuation(element, [edge - 5, edge + 5, edge + 200])
    assert 6 < above / below < 10
    assert far < above


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3)])
def test_attenuation_keeps_the_shape(shape: tuple[int, ...]) -> None:
    energy = np.full(shape, 8000.0)
    assert mass_attenuation("Ni", energy).shape == shape
    np.testing.assert_array_equal(mass_attenuation("Ni", energy), np.full(shape, mass_attenuation("Ni", 8000.0)))


@pytest.mark.parametrize("element", ["Xx", "", "ni", "Nickel"])
def test_unknown_elements_are_named(element: str) -> None:
    for function in (edge_energy_ev, lambda e: mass_attenuation(e, 8000.0)):
        with pytest.raises(XanesTomoError, match=f"{element!r}"):
            function(element)


@pytest.mark.parametrize(
    ("energies", "elements"),
    [
        (SIX, ("Mn", "Co", "Ni")),
        (SIX[:4], ("Mn", "Co")),
        ((6534.0, 7728.0), ()),  # 17 % apart: Mn, Fe and Co all lie between
        ((6558.0, 7704.0), ()),  # Fe lies between, but nobody measured it
        ((8178.0, 8570.0), ("Ni",)),
        ((8570.0, 8178.0, 8178.0), ("Ni",)),  # any order, repeated
        ((8570.0,), ()),
        ((), ()),
        ((7000.0, 7200.0), ("Fe",)),
    ],
)
def test_bracketed(energies: tuple[float, ...], elements: tuple[str, ...]) -> None:
    assert bracketed_elements(energies) == elements


@given(st.lists(st.floats(4000, 20000), max_size=12))
def test_bracketed_means_a_neighbour_on_either_side(energies: list[float]) -> None:
    found = bracketed_elements(energies)
    assert found == bracketed_elements(sorted(energies, reverse=True))
    for element in ELEMENT_RANGE:
        edge = edge_energy_ev(element)
        below = [e for e in energies if e < edge]
        above = [e for e in energies if e >= edge]
        close = bool(below and above) and min(above) - max(below) <= 0.06 * edge
        assert (element in found) == close


@pytest.mark.parametrize(
    ("energies", "element"),
    [
        (SIX, None),  # one pair about each edge is no scan
        ((*SIX, 8344.0, 8351.0), "Ni"),
        ((8344.0, 8351.0, 8570.0), None),  # nothing before the edge
        ((8178.0, 8344.0, 8351.0), None),  # nothing behind it
        ((8178.0, 8336.0, 8340.0, 8344.0, 8351.0), "Ni"),  # a scan that was broken off
        ((*SIX, 6420.0, 6536.0, 6541.0, 6545.0, 6650.0), "Mn"),
        ((*SIX, 6420.0, 6536.0, 6541.0, 6650.0, *range(8320, 8360, 2)), "Ni"),  # the one with more energies
    ],
)
def test_scanned_edge(energies: tuple[float, ...], element: str | None) -> None:
    assert scanned_element(energies, ("Mn", "Co", "Ni")) == element


def test_no_elements_no_scanned_edge() -> None:
    assert scanned_element((*SIX, 8344.0, 8351.0), ()) is None


@pytest.mark.parametrize(
    ("energies", "said"),
    [
        (SIX, "no edge was scanned"),  # pairs on either side of an edge are no scan
        ((8344.0, 8351.0, 8570.0), "2 energies lie on the Ni edge, but none below it, from 8133 to 8313 eV"),
        ((8178.0, 8330.0, 8344.0, 8351.0), "3 energies lie on the Ni edge, but none above it, from 8393 to 8633 eV"),
    ],
)
def test_what_a_scan_lacks(energies: tuple[float, ...], said: str) -> None:
    assert why_not_scanned(energies).startswith(said)


# Energy, factor: the step of the table, times the factor, on what the table continues from below the edge.
@pytest.mark.parametrize(("energy", "changes"), [(6534.0, False), (6558.0, True), (6700.0, False)])
def test_white_line_factor(energy: float, changes: bool) -> None:
    plain, raised = (float(mass_attenuation("Mn", energy, white_line=f)) for f in (1.0, 1.2))
    assert (raised > plain) == changes
    if changes:
        assert raised / plain == pytest.approx(1 + 0.2 * 390.6 / 448.8, rel=0.01)  # step and level by hand


def test_tables_agree_away_from_edges() -> None:
    for element, energy in (("Mn", 8570.0), ("Ni", 8570.0), ("Ni", 8178.0)):
        elam, chantler = (float(mass_attenuation(element, energy, table=t)) for t in ("elam", "chantler"))
        assert elam == pytest.approx(chantler, rel=0.05)
        assert elam != chantler
    with pytest.raises(XanesTomoError, match="expected one of elam, chantler"):
        mass_attenuation("Ni", 8570.0, table="other")
