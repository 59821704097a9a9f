import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from napari_xanes_tomo.graph import Pair, closures, contrast_islands, island_hubs, solve_network
from napari_xanes_tomo.model import XanesTomoError
from napari_xanes_tomo.phantom import PRESETS

SIX = (6534.0, 6558.0, 7704.0, 7728.0, 8178.0, 8570.0)
MEASURED = (*SIX[:4], *np.arange(8178.0, 8329.0, 15.0), *np.arange(8329.0, 8371.0), *np.arange(8390.0, 8571.0, 20.0))


@pytest.mark.parametrize(
    ("energies", "expected"),
    [
        (SIX, [{6534, 8570}, {6558, 7704}, {7728, 8178}]),
        (PRESETS["demo"].energies_ev, [{6534, 8400, 8570}, {6558, 7704}, {7728, 8178, 8298, 8328}]),
        (MEASURED, [{6534, *range(8390, 8571, 20)}, {6558, 7704}, {7728, *range(8178, 8329, 15)}]),
        ((8000.0, 8100.0, 8200.0), [{8000, 8100, 8200}]),  # no edge: all alike
        # Iron, an edge pair and nothing else: below and above differ by a factor only.
        ((7100.0, 7150.0), [{7100, 7150}]),
    ],
)
def test_islands(energies: tuple[float, ...], expected: list[set[int]]) -> None:
    number = contrast_islands(energies)
    found = [{int(e) for e, k in zip(energies, number, strict=True) if k == i} for i in sorted(set(number))]
    assert [f for f in found if len(f) > 1] == expected


def test_energies_on_a_scanned_edge_are_islands_of_their_own() -> None:
    number = np.array(contrast_islands(MEASURED))
    for energy in (8329.0, 8345.0, 8370.0):
        assert np.sum(number == number[MEASURED.index(energy)]) == 1


def test_hubs() -> None:
    energies = PRESETS["demo"].energies_ev
    hubs = island_hubs(contrast_islands(energies), energies, energies.index(8570.0))
    named = {energies[k]: energies[h] for k, h in hubs.items()}
    assert named[6558.0] == 7704.0  # of its own island
    assert named[6534.0] == 8400.0  # the reference's island has a second one
    assert named[8346.0] == 8328.0  # an island of its own: the largest below
    assert named[8328.0] != 8328.0
    assert 8570.0 not in named
    assert island_hubs((0, 0), (8000.0, 8100.0), 1) == {}  # nothing else to compare with


def _truth(n: int, rng: np.random.Generator) -> np.ndarray:
    x = rng.normal(size=(n, 6)) * [1e-3, 1e-3, 1, 1, 1, 1e-3]
    x[-1] = 0
    return x


SIGMA = np.array([1e-5, 1e-5, 0.003, 0.003, 0.003, 1e-5])


@given(st.integers(0, 10_000))
def test_exact_pairs_are_solved_exactly(seed: int) -> None:
    rng = np.random.default_rng(seed)
    energies = PRESETS["demo"].energies_ev
    n = len(energies)
    islands = contrast_islands(energies)
    x = _truth(n, rng)
    pairs = [Pair(k, n - 1, x[k] - x[n - 1], SIGMA) for k in range(n - 1)]
    pairs += [Pair(k, h, x[k] - x[h], SIGMA) for k, h in island_hubs(islands, energies, n - 1).items()]
    found = solve_network(pairs, islands, n - 1, cross_sigma=3 * SIGMA)
    np.testing.assert_allclose(found.value, x, atol=1e-9)
    assert np.all(found.weight == 1)
    for c in closures(pairs, islands):
        np.testing.assert_allclose(c.value, 0, atol=1e-12)


def test_errors_are_honest() -> None:
    rng = np.random.default_rng(0)
    energies = PRESETS["demo"].energies_ev
    n = len(energies)
    islands = np.array(contrast_islands(energies))
    cross = 2 * SIGMA
    z = []
    for _ in range(200):
        x = _truth(n, rng)
        bias: dict[tuple[int, int], np.ndarray] = {}

        def measured(k: int, h: int, x: np.ndarray = x, bias: dict = bias) -> np.ndarray:
            a, b = sorted((int(islands[k]), int(islands[h])))
            if a == b:
                off: np.ndarray | float = 0.0
            else:
                off = bias.setdefault((a, b), cross * rng.normal(size=6)) * (1 if islands[k] < islands[h] else -1)
            return np.asarray(x[k] - x[h] + off + SIGMA * rng.normal(size=6))

        pairs = [Pair(k, n - 1, measured(k, n - 1), SIGMA) for k in range(n - 1)]
        pairs += [Pair(k, h, measured(k, h), SIGMA) for k, h in island_hubs(islands, energies, n - 1).items()]
        found = solve_network(pairs, islands, n - 1, cross_sigma=cross)
        z.append((found.value - x)[:-1] / found.sigma[:-1])
    rms = np.sqrt(np.mean(np.square(z), axis=(0, 2)))
    assert np.all((rms > 0.8) & (rms < 1.25)), rms
    same = islands[:-1] == islands[-1]
    part = found.cross_sigma[:-1] / SIGMA
    assert part[same].max() < part[~same].min()


def test_a_wrong_pair_stands_out() -> None:
    rng = np.random.default_rng(1)
    n, islands = 6, (0,) * 6
    x = _truth(n, rng)
    pairs = [Pair(i, j, x[i] - x[j] + SIGMA * rng.normal(size=6), SIGMA) for i in range(n) for j in range(i + 1, n)]
    wrong = 7
    pairs[wrong] = Pair(pairs[wrong].first, pairs[wrong].second, pairs[wrong].value + 50 * SIGMA, SIGMA)
    found = solve_network(pairs, islands, n - 1, cross_sigma=SIGMA)
    assert np.argmax(found.misfit) == wrong
    assert found.weight[wrong] < 0.2
    np.testing.assert_allclose((found.value - x) / SIGMA, 0, atol=6)


def test_what_no_pair_leads_to_is_not_known() -> None:
    pairs = [Pair(0, 2, np.zeros(6), SIGMA)]
    found = solve_network(pairs, (0, 0, 0), 2, cross_sigma=SIGMA)
    assert np.isnan(found.value[1]).all()
    assert np.isfinite(found.value[0]).all()
    assert np.isnan(solve_network([], (0, 0), 1, cross_sigma=SIGMA).value[0]).all()


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (Pair(0, 5, np.zeros(6), SIGMA), "expected two of 3 energies"),
        (Pair(1, 1, np.zeros(6), SIGMA), "expected two of 3 energies"),
        (Pair(0, 1, np.full(6, np.nan), SIGMA), "expected finite values"),
        (Pair(0, 1, np.zeros(6), 0 * SIGMA), "positive errors"),
    ],
)
def test_senseless_pairs_are_refused(pair: Pair, message: str) -> None:
    with pytest.raises(XanesTomoError, match=message):
        solve_network([pair], (0, 0, 0), 2, cross_sigma=SIGMA)


def test_closure_counts_islands() -> None:
    pairs = [Pair(0, 1, np.ones(6), SIGMA), Pair(1, 2, np.ones(6), SIGMA), Pair(0, 2, np.full(6, 2.5), SIGMA)]
    (found,) = closures(pairs, (0, 1, 1))
    np.testing.assert_allclose(found.value, -0.5)
    np.testing.assert_allclose(found.sigma, SIGMA * np.sqrt(3))
    assert found.islands == 2
    assert closures(pairs[:2], (0, 1, 1)) == ()
