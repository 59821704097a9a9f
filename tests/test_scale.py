import numpy as np
import pytest

from napari_xanes_tomo.contrast import tabulated, take_apart
from napari_xanes_tomo.model import XanesTomoError
from napari_xanes_tomo.phantom import PRESETS
from napari_xanes_tomo.scale import magnification_laws, mass_against_scale, scale_report, trend

DEMO = np.array(PRESETS["demo"].energies_ev)
MEASURED = np.array(
    [6534.0, 6558.0, 7704.0, 7728.0, *np.arange(8178, 8329, 15), *np.arange(8329, 8371), *np.arange(8390, 8571, 20)],
    dtype=float,
)


def pixel(energies: np.ndarray, bend: float = 0.0) -> np.ndarray:
    return (0.002039449 * energies - 0.792164997) * (1 + bend * ((energies - energies.max()) / 2000) ** 2)


# The tabulated ratios of pixel sizes 6534 : 8570.
@pytest.mark.parametrize(
    ("law", "ratio"), [("proportional", 0.76243), ("calibration", 0.7512), ("thin lens", 0.7602), ("header", 1.0)]
)
def test_laws(law: str, ratio: float) -> None:
    e = np.array([6534.0, 8178.0, 8570.0])
    found = magnification_laws(
        e, 2, pixel_nm=pixel(e), header_nm=np.full(3, 33.4), zone_plate_um=-226.76 + 5.02 * (e - 8570)
    )
    assert 1 / found[law][0] == pytest.approx(ratio, abs=2e-4)
    assert found[law][2] == 1


def test_laws_without_their_numbers_are_absent() -> None:
    e = np.array([6534.0, 8570.0])
    nothing = np.full(2, np.nan)
    assert set(magnification_laws(e, 1, pixel_nm=nothing, header_nm=nothing, zone_plate_um=nothing)) == {"proportional"}


@pytest.mark.parametrize("bend", [0.0, 0.02])
@pytest.mark.parametrize(("energies", "least"), [(DEMO, 0.9), (MEASURED, 0.97)])
def test_a_refocus_jump_is_flagged_and_nothing_else(energies: np.ndarray, least: float, bend: float) -> None:
    n, found, false, innocent = len(energies), 0, 0, 0
    seeds = 20 if energies is DEMO else 10
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        p = pixel(energies, bend)
        m = p[-1] / p * (1 + 3e-4 * rng.normal(size=n))
        m[-1] = 1
        innocent += len(scale_report(energies, m, np.full(n, 5e-5), n - 1).outliers)
        k = int(rng.integers(n - 1))
        m[k] *= 1 + 3e-3 * rng.choice([-1, 1])
        outliers = scale_report(energies, m, np.full(n, 5e-5), n - 1).outliers
        found += k in outliers
        false += len(set(outliers) - {k})
    assert found >= least * seeds
    assert false <= 2
    assert innocent <= 2


@pytest.mark.parametrize("energies", [DEMO, MEASURED])
@pytest.mark.parametrize("shrinkage", [0.0, 0.003])
def test_shrinkage_is_a_trend_with_time(energies: np.ndarray, shrinkage: float) -> None:
    n, seen = len(energies), 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        p = pixel(energies)
        m = p[-1] / p * (1 + 3e-4 * rng.normal(size=n)) * (1 - shrinkage * np.arange(n) / (n - 1))
        laws = magnification_laws(energies, n - 1, pixel_nm=p)
        report = scale_report(energies, m / m[-1], np.full(n, 5e-5), n - 1, laws=laws)
        seen += any("with time" in note for note in report.notes)
        assert report.against_calibration.total == pytest.approx(-shrinkage, abs=1.2e-3)
    assert seen >= 19 if shrinkage else seen <= 1


def test_trend_of_a_line_with_an_outlier() -> None:
    t = np.linspace(3, 7, 30)
    v = 2 + 0.5 * (t - 3) + 0.01 * np.random.default_rng(0).normal(size=30)
    v[4] += 3
    v[9] = np.nan
    found = trend(v, t)
    assert found.total == pytest.approx(2.0, abs=0.03)
    assert found.significant
    assert not trend(np.ones(5), np.zeros(5)).significant


def test_too_little_to_judge() -> None:
    report = scale_report([6534.0, 8570.0], [1.33, 1.0], [1e-4, 0.0], 1)
    assert report.outliers == ()
    assert np.isnan(report.z).all()
    with pytest.raises(XanesTomoError, match="one magnification and error for each of 2"):
        scale_report([6534.0, 8570.0], [1.33], [1e-4], 0)


@pytest.mark.parametrize(("cause", "power"), [("instrument", 2.0), ("particle", 0.0)])
def test_mass_against_width_tells_the_instrument_from_the_particle(cause: str, power: float) -> None:
    elements = ("Mn", "Co", "Ni")
    table = tabulated(MEASURED, elements) @ np.array([0.3, 0.2, 0.5]) + 40 * (MEASURED / 8000) ** -2.8
    rng = np.random.default_rng(4)
    law = pixel(MEASURED)[-1] / pixel(MEASURED)
    off = 3e-3 * rng.normal(size=len(MEASURED))
    off[-1] = 0
    m = law * (1 + off)
    # On the common grid the particle has one size; what a ray meets grows as that of a smaller particle, mass kept.
    mass = table * (1 if cause == "instrument" else (1 + off) ** -2.0) * (1 + 3e-4 * rng.normal(size=len(MEASURED)))
    found = mass_against_scale(
        m, law, mass, np.full(len(MEASURED), 33.0), take_apart(MEASURED, mass).parts, len(MEASURED) - 1
    )
    np.testing.assert_allclose(found.size, off, atol=1e-9)
    assert found.power == pytest.approx(power, abs=4 * found.sigma)
    assert found.sigma < 0.3
    assert ("instrument" in found.text().split("),")[1]) == (cause == "instrument")
    np.testing.assert_allclose(np.diff(found.width), np.diff(off), rtol=0.02, atol=1e-4)


def test_without_tables_mass_tells_nothing() -> None:
    n = len(MEASURED)
    found = mass_against_scale(np.ones(n), np.ones(n), np.ones(n), np.full(n, np.nan), np.full((n, 1), np.nan), n - 1)
    assert np.isnan(found.power)
    assert "too few energies" in found.text()
