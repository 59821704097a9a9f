"""Bad input for the registration: refused or flagged with the reason, the other energies unharmed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from napari_xanes_tomo import Recipe, open_series, workflow
from napari_xanes_tomo.model import Alignment, ArrayFrames, EnergyScan, Series
from napari_xanes_tomo.phantom import TwinParameters, write_twin
from napari_xanes_tomo.registration_qc import odd_energies
from napari_xanes_tomo.workflow import Workflow

ENERGIES = (6534.0, 6558.0, 7704.0, 7728.0, 8178.0, 8400.0, 8570.0)
SMALL = TwinParameters(
    n=64, n_angles=36, energies_ev=ENERGIES, flats_per_set=4, jitter_px=(2.0, 4.0), grains=80
)  # fmt: skip


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Series:
    return open_series(write_twin(tmp_path_factory.mktemp("bad") / "twin", parameters=SMALL))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> EnergyScan:
    p = replace(SMALL, energies_ev=(7704.0,), seed=9)
    return open_series(write_twin(tmp_path_factory.mktemp("other") / "twin", parameters=p)).scans[0]


@pytest.fixture(scope="module", autouse=True)
def _once() -> Iterator[None]:
    """Flats and jitter of the same scan are found once for all tests; they do not know of other energies."""
    flats, jitter, again = workflow.run_flats, workflow.run_jitter, workflow.renormalise
    made: dict[object, object] = {}

    def once(name: str, scan: EnergyScan, number: object, do: Callable[[], object]) -> object:
        # The frames themselves are kept with the answer: the number of an object that is gone may be given again.
        key = (name, number, scan.energy_ev, id(scan.frames), scan.status, scan.theta_deg.tobytes())
        if key not in made:
            made[key] = (do(), scan.frames)
        return made[key][0]  # type: ignore[index]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            workflow, "run_flats", lambda s, *a, **k: once("flats", s, k.get("number"), lambda: flats(s, *a, **k))
        )
        patch.setattr(
            workflow, "run_jitter", lambda s, *a, **k: once("jitter", s, k.get("number"), lambda: jitter(s, *a, **k))
        )
        patch.setattr(
            workflow, "renormalise", lambda s, *a, **k: once("again", s, k.get("number"), lambda: again(s, *a, **k))
        )
        yield


@pytest.fixture(scope="module")
def runs_without() -> dict[tuple[float, ...], Run]:
    """Runs without the energies that are bad, each made once."""
    return {}


@dataclass(frozen=True)
class Run:
    """Of every registered energy (by eV): where it is; what is wrong with the others."""

    alignments: dict[float, Alignment]
    failed: dict[float, str]
    flags: dict[float, str]
    reference: float


def run(series: Series, out: Path, without: Sequence[float] = ()) -> Run:
    with Workflow(series, out) as w:
        for e in without:
            w.exclude(ENERGIES.index(e))
        state = w.run(until="registration")
        alignments, failed = {}, {}
        for e, energy in enumerate(series.energies_ev.tolist()):
            reasons = [state[(name, e)].reason for name in ("flats", "jitter", "registration")]
            reason = "; ".join(r for r in reasons if r)
            if state[("registration", e)].candidate is not None:
                alignments[energy] = w.alignment(e)
            if reason:
                failed[energy] = reason
        flags = {float(series.energies_ev[e]): "; ".join(words) for e, words in w.registration_flags().items()}
        assert state.reference is not None
        return Run(alignments, failed, flags, float(series.energies_ev[state.reference]))


def with_scans(series: Series, **changed: EnergyScan) -> Series:
    scans = list(series.scans)
    for name, scan in changed.items():
        scans[ENERGIES.index(float(name[1:]))] = scan
    return replace(series, scans=tuple(scans))


def scan_of(series: Series, energy: float) -> EnergyScan:
    return series.scans[ENERGIES.index(energy)]


def lost(scan: EnergyScan, which: Sequence[int]) -> EnergyScan:
    return scan.excluded(dict.fromkeys(which, "lost"))


def flat_of(scan: EnergyScan) -> np.ndarray:
    shots = scan.flats[0].frames
    return np.mean([shots.read(i) for i in range(len(shots))], axis=0)


def empty(scan: EnergyScan) -> EnergyScan:
    """Nothing but beam."""
    rng, beam = np.random.default_rng(0), flat_of(scan)
    counts = beam + np.sqrt(14 + 0.137 * beam) * rng.standard_normal((len(scan), *beam.shape))
    return replace(scan, frames=ArrayFrames(np.rint(counts).astype(scan.frames.dtype)))


def moved_out(scan: EnergyScan, part: float) -> EnergyScan:
    """The particle moved to the right by a part of the field, what leaves it is lost."""
    beam, n = flat_of(scan), scan.frames.frame_shape[1]
    through = np.stack([scan.frames.read(i) for i in range(len(scan))]) / beam
    by = int(part * n)
    through[:, :, by:], through[:, :, :by] = through[:, :, : n - by].copy(), 1.0
    return replace(scan, frames=ArrayFrames(np.rint(through * beam).astype(scan.frames.dtype)))


def cut(scan: EnergyScan, rows: int, columns: int) -> EnergyScan:
    """The upper left part of every frame."""
    frames = np.stack([scan.frames.read(i) for i in range(len(scan))])
    return replace(scan, frames=ArrayFrames(frames[:, :rows, :columns]))


def labelled(scan: EnergyScan, as_: EnergyScan) -> EnergyScan:
    return replace(scan, energy_ev=as_.energy_ev, pixel_size_nm=as_.pixel_size_nm)


def swapped(series: Series, a: float, b: float) -> Series:
    one, two = scan_of(series, a), scan_of(series, b)
    return with_scans(series, **{f"e{a:g}": labelled(two, one), f"e{b:g}": labelled(one, two)})


HALF = range(18, 36)
OTHER_HALF = range(0, 36, 2)


@pytest.mark.parametrize(
    ("name", "bad", "reason"),
    [
        ("no common angle", (7704.0,), "angles in common with the reference, got 0"),
        ("half", (7704.0,), "part of the angles compared: 0.5"),
        ("every second", (7704.0,), "part of the angles compared: 0.5"),
        ("half of the reference", (8570.0,), "part of the angles compared: 0.5"),
        ("every second of the reference", (8570.0,), "part of the angles compared: 0.5"),
        ("no signal", (6534.0,), "nothing beyond their noise"),
        ("no signal in the reference", (8570.0,), "nothing beyond their noise"),
        ("swapped", (6534.0, 7704.0), "a wrong label"),
        ("swapped, near", (8178.0, 8400.0), "is the label right"),
        ("another sample", (7704.0,), "another sample"),
        ("cut", (7704.0,), "expected frames of 64 x 64 pixels as at the other energies, got 32 x 64"),
        ("partly out", (6534.0,), "part of the particle in the field"),
        ("quite out", (6534.0,), ""),
    ],
)
def test_bad_energy(
    series: Series,
    other: EnergyScan,
    runs_without: dict[tuple[float, ...], Run],
    tmp_path: Path,
    name: str,
    bad: tuple[float, ...],
    reason: str,
) -> None:
    one = scan_of(series, bad[0])
    made = {
        "no common angle": lambda: replace(one, theta_deg=one.theta_deg + 2.5),
        "half": lambda: lost(one, HALF),
        "every second": lambda: lost(one, OTHER_HALF),
        "half of the reference": lambda: lost(one, HALF),
        "every second of the reference": lambda: lost(one, OTHER_HALF),
        "no signal": lambda: empty(one),
        "no signal in the reference": lambda: empty(one),
        "another sample": lambda: other,
        "cut": lambda: cut(one, 32, 64),
        "partly out": lambda: moved_out(one, 0.3),
        "quite out": lambda: moved_out(one, 0.85),
    }
    changed = (
        swapped(series, *bad) if name.startswith("swapped") else with_scans(series, **{f"e{bad[0]:g}": made[name]()})
    )
    found = run(changed, tmp_path / "out")
    for energy in bad:
        said = f"{found.failed.get(energy, '')}; {found.flags.get(energy, '')}"
        assert energy in found.failed or energy in found.flags
        assert reason in said
    if bad not in runs_without:
        runs_without[bad] = run(series, tmp_path / "without", without=bad)
    without = runs_without[bad]
    assert found.reference == without.reference
    for energy, alignment in without.alignments.items():
        np.testing.assert_allclose(found.alignments[energy].shift, alignment.shift, atol=0.01)
        assert found.alignments[energy].magnification == pytest.approx(alignment.magnification, abs=1e-5)
        assert energy not in found.failed
        assert "label" not in found.flags.get(energy, "")
        assert "sample" not in found.flags.get(energy, "")


def test_nothing_is_flagged_where_nothing_is_wrong(series: Series, tmp_path: Path) -> None:
    found = run(series, tmp_path / "out")
    assert found.failed == {}
    for said in ("label", "sample", "part of"):
        assert not [words for words in found.flags.values() if said in words]
    assert found.reference == 8570.0


def test_a_reference_that_is_asked_for_is_taken(series: Series, tmp_path: Path) -> None:
    changed = with_scans(series, e8570=lost(scan_of(series, 8570.0), HALF))
    recipe = Recipe.model_validate({"registration": {"reference_ev": 8570.0}})
    with Workflow(changed, tmp_path / "out", recipe) as w:
        w.run(until="jitter")
        assert w.state.reference == ENERGIES.index(8570.0)


def test_one_energy_only(series: Series, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    only = replace(series, scans=series.scans[-1:])
    with Workflow(only, tmp_path / "out") as w, caplog.at_level("WARNING"):
        state = w.run(until="registration")
        assert state[("registration", 0)].status == "candidate"
        assert w.alignment(0).magnification == 1.0
        assert "one energy only" in caplog.text


@pytest.mark.parametrize("seed", range(4))
def test_scales_of_wrong_labels_stand_out_and_right_ones_do_not(seed: int) -> None:
    rng = np.random.default_rng(seed)
    energies = np.linspace(6534.0, 8570.0, 24)
    law = 8570 / energies
    # A calibration that is one percent off over the range, and a scale that scatters.
    m = law * (1 + 0.01 * (energies - 8570) / 2000 + 3e-4 * rng.standard_normal(24))
    alike = np.full(24, 0.6)
    assert odd_energies(energies, m, law, alike) == {}
    m[[3, 19]] = m[[19, 3]]
    alike[8] = 0.3
    found = odd_energies(energies, m, law, alike)
    assert set(found) == {3, 19, 8}
    assert f"that of {energies[19]:g} eV" in found[3][0]
    assert f"that of {energies[3]:g} eV" in found[19][0]
    assert "another sample" in found[8][0]
