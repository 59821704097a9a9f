import csv
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from napari_xanes_tomo import open_series, read_maps
from napari_xanes_tomo.absorbance import normalise
from napari_xanes_tomo.edges import edge_energy_ev
from napari_xanes_tomo.io.scan import parse_script
from napari_xanes_tomo.io.store import read_energies, read_shifts, rows_alignments
from napari_xanes_tomo.io.xrm import read_header
from napari_xanes_tomo.model import Cancelled, XanesTomoError
from napari_xanes_tomo.phantom import (
    PRESETS,
    Truth,
    TwinParameters,
    draw_motion,
    ni_xanes,
    simulate,
    twin_parameters,
    write_twin,
)
from napari_xanes_tomo.phantom.particle import draw_particle, metal_attenuation, project
from napari_xanes_tomo.recipe import AbsorbanceParameters, ScanParameters
from napari_xanes_tomo.resample import place

SMALL = TwinParameters(
    n=32, n_angles=12, energies_ev=(7704.0, 7728.0, 8570.0), grains=30, flats_per_set=3, jitter_px=(2.0, 4.0)
)


def digest(folder: Path) -> dict[str, str]:
    """Every file below a folder, by its bytes."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_twin(tmp_path_factory.mktemp("small") / "twin", parameters=SMALL)


def test_an_odd_number_of_angles(tmp_path: Path) -> None:
    twin = write_twin(tmp_path / "odd", parameters=replace(SMALL, n_angles=13, energies_ev=(8570.0,)))
    (scan,) = open_series(twin).scans
    assert len(scan) == 13
    assert scan.status == ("ok",) * 13
    assert [int(np.sum(scan.half == h)) for h in (0, 1)] == [6, 7]


# ------------------------------------------------------------------------------------------------- what is written


def test_same_seed_same_bytes(small: Path, tmp_path: Path) -> None:
    again = write_twin(tmp_path / "again", parameters=SMALL)
    assert digest(again) == digest(small)


def test_other_seed_other_bytes(small: Path, tmp_path: Path) -> None:
    other = write_twin(tmp_path / "other", parameters=SMALL, seed=1)
    mine, theirs = digest(small), digest(other)
    frames = [h for n, h in mine.items() if n.endswith(".xrm")]
    assert not set(frames) & {h for n, h in theirs.items() if n.endswith(".xrm")}
    assert mine["truth/tables/shifts.csv"] != theirs["truth/tables/shifts.csv"]


def test_presets() -> None:
    tiny, demo = PRESETS["tiny"], PRESETS["demo"]
    assert (tiny.n, tiny.n_angles, len(tiny.energies_ev)) == (64, 36, 8)
    assert (demo.n, demo.n_angles, len(demo.energies_ev), demo.binning) == (256, 180, 16, 8)
    six = {6534.0, 6558.0, 7704.0, 7728.0, 8178.0, 8570.0}
    assert six < set(tiny.energies_ev)
    assert six | {8298.0, 8328.0, 8400.0} < set(demo.energies_ev)
    assert sum(8336 <= e <= 8365 for e in demo.energies_ev) == 7
    assert TwinParameters(n=1024).binning == 2


def test_script_is_that_of_the_real_measurement(tiny_twin: Path) -> None:
    (script,) = tiny_twin.glob("*.txt")
    raw = script.read_bytes()
    assert raw.count(b"\r\n") == raw.count(b"\n") > 1000
    raw.decode("ascii")
    p = PRESETS["tiny"]
    blocks = parse_script(raw.decode("ascii"))
    assert [b.energy_ev for b in blocks] == list(p.energies_ev)
    for block in blocks:
        # Flats, half the angles, flats, the other half: R10 P18 R10 P18.
        runs = re.findall(r"(flat)+|(projection)+", "".join(f.kind for f in block.frames))
        assert len(runs) == 4
        assert [f.kind for f in block.frames] == (["flat"] * 10 + ["projection"] * 18) * 2
        theta = [f.theta_deg for f in block.frames if f.kind == "projection"]
        np.testing.assert_allclose(theta, np.arange(-90, 90, 5))
        assert {f.exposure_s for f in block.frames} == {0.5}
        assert {f.binning for f in block.frames} == {p.binning}


def test_names_are_those_of_the_real_measurement(tiny_twin: Path, data_dir: Path) -> None:
    def shape(name: str) -> str:
        name = re.sub(r"(rep\d+_(?:ref_)?\d+)_.*?_(-?\d+\.\d\d_Degree)", r"\1_NAME_\2", name)
        return re.sub(r"\d", "9", name.replace("-", "9"))

    real = next((data_dir / "tomo_00089").glob("*.txt")).read_text()
    for kind in ("flat", "projection"):
        theirs = {shape(f.name) for b in parse_script(real)[:3] for f in b.frames if f.kind == kind}
        (script,) = tiny_twin.glob("*.txt")
        mine = {shape(f.name) for b in parse_script(script.read_text())[:3] for f in b.frames if f.kind == kind}
        assert mine == theirs


def test_lines_of_the_script_come_as_in_the_real_one(tiny_twin: Path, data_dir: Path) -> None:
    def shape(path: Path) -> list[str]:
        text = path.read_bytes().decode("ascii")
        text = re.sub(r"(rep\d+_(?:ref_)?\d+)_.*?_(-?\d+\.\d\d_Degree)", r"\1_NAME_\2", text)
        text = re.sub(r"(?<!zp)[-\d]+\.\d+|(?<=[_ ])\d+|(?<=of)\d+", "9", text)
        # What is collected again and again (a flat; a projection with its four motors) once.
        text = re.sub(r"((?:[^\r\n]+\r\n){1,5}?)\1+", r"\1", text)
        head, *blocks = re.split(r"(?=;; set the MONO)", text)
        return [head, *sorted(set(blocks))]

    mine, theirs = (shape(next(folder.glob("*.txt"))) for folder in (tiny_twin, data_dir / "tomo_00089"))
    assert len(mine) == 2
    assert mine == theirs


def test_every_file_of_the_script_is_there_and_none_besides(tiny_twin: Path) -> None:
    (script,) = tiny_twin.glob("*.txt")
    named = {f.name for b in parse_script(script.read_text()) for f in b.frames}
    assert named == {p.name for p in tiny_twin.glob("*.xrm")}
    assert len(named) == 8 * (36 + 20)
    assert not any("eV" in n for n in named if "_ref_" in n)
    assert all("eV" in n for n in named if "_ref_" not in n)


def test_headers(small: Path) -> None:
    for path in sorted(small.glob("*_0015.00_Degree_08570*.xrm")):
        header = read_header(path)
        assert header.shape == (32, 32)
        assert header.binning == SMALL.binning == 64
        assert header.dtype == np.uint16
        break
    else:
        pytest.fail("the twin has no frame at 15 degrees and 8570 eV")


def test_opens_without_a_problem(tiny_twin: Path) -> None:
    series = open_series(tiny_twin)
    assert series.problems == ()
    assert series.n_expected == (8, 288, 160)
    assert series.frame_shape == (64, 64)
    law = ScanParameters()
    for scan in series.scans:
        assert scan.usable.all()
        assert len(scan.flats) == 2
        np.testing.assert_array_equal(scan.half, [0] * 18 + [1] * 18)
        wanted = 32 * (law.pixel_law_slope_nm_per_ev * scan.energy_ev + law.pixel_law_offset_nm)
        assert scan.pixel_size_nm == pytest.approx(wanted)
        assert np.all(np.diff(scan.time_s) > 0)


# --------------------------------------------------------------------------------------------------- the truth


@pytest.fixture(scope="module")
def truth(tiny_twin: Path) -> dict[str, npt.NDArray[np.float32]]:
    found = read_maps(tiny_twin / "truth" / "maps.ome.zarr")
    return {name: np.asarray(found.data[name]) for name in found.data}


def test_truth_is_readable_and_complete(tiny_twin: Path, truth: dict[str, npt.NDArray[np.float32]]) -> None:
    p = PRESETS["tiny"]
    shifts = rows_alignments(read_shifts(tiny_twin / "truth" / "tables" / "shifts.csv"))
    assert [e for e, _, _ in shifts] == list(p.energies_ev)
    assert all(len(t) == 36 and set(a.status) == {"ok"} for _, t, a in shifts)
    energies = {r.energy_ev: r for r in read_energies(tiny_twin / "truth" / "tables" / "energies.csv")}
    assert [r.energy_ev for r in energies.values() if r.reference] == [8570.0]
    law = ScanParameters()
    for energy, _, a in shifts:
        size = law.pixel_law_slope_nm_per_ev * np.array([8570.0, energy]) + law.pixel_law_offset_nm
        assert a.magnification == pytest.approx(size[0] / size[1], abs=1.5e-3)  # the law, with 3e-4 scatter
        assert energies[energy].magnification == a.magnification
        # Motion as asked for: rms 2 to 6 px and at most 20 of 256, here a quarter; besides the shift of the field.
        rms = a.shift.std(axis=0) * 4
        assert np.all((rms > 1.5) & (rms < 6.5))
        assert np.abs(a.shift - a.shift.mean(axis=0)).max() * 4 < 20 + 1e-9
        assert np.abs(a.shift.mean(axis=0)).max() * 4 <= 4 + 1e-9
    assert set(truth) == {"Mn", "Co", "Ni", "density", "edge_energy_relative"}
    assert {m.shape for m in truth.values()} == {(64, 64, 64)}
    assert json.loads((tiny_twin / "truth" / "twin.json").read_text())["complete"] is True


def test_the_particle(truth: dict[str, npt.NDArray[np.float32]]) -> None:
    density = truth["density"]
    np.testing.assert_allclose(density, truth["Mn"] + truth["Co"] + truth["Ni"], atol=1e-5)
    middle = [np.flatnonzero(density.max(axis=tuple(k for k in range(3) if k != i)) > 0.1) for i in (1, 2)]
    assert all(0.5 * 64 < m[-1] - m[0] + 1 < 0.75 * 64 for m in middle)  # about 0.6 of the field wide
    solid = density > 0.6 * np.percentile(density[density > 0.2 * density.max()], 75)
    share = [float((truth[m][solid] / density[solid]).mean()) for m in ("Mn", "Co", "Ni")]
    np.testing.assert_allclose(share, np.array([0.3 * 54.9, 0.2 * 58.9, 0.5 * 58.7]) / 57.6, atol=0.03)
    scatter = [
        float((truth[m][solid] / density[solid]).std()) / s for m, s in zip(("Mn", "Co", "Ni"), share, strict=True)
    ]
    assert all(0.03 < s < 0.3 for s in scatter)  # gradients and grains
    edge = truth["edge_energy_relative"]
    assert 1.0 < np.ptp(edge[solid]) < 3.0
    weight = truth["Ni"]
    assert abs(float((edge * weight).sum() / weight.sum())) < 1e-3  # relative to the particle's mean
    # No coupling to composition unless asked for.
    assert abs(np.corrcoef(edge[solid], (truth["Ni"] / np.maximum(density, 1e-6))[solid])[0, 1]) < 0.35


def test_centre_of_mass_at_the_origin(truth: dict[str, npt.NDArray[np.float32]]) -> None:
    density = truth["density"].astype(float)
    for axis in range(3):
        rest = tuple(k for k in range(3) if k != axis)
        at = np.arange(64) - 31.5
        assert float((density.sum(axis=rest) * at).sum() / density.sum()) == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("energy", [7704.0, 8570.0])
def test_frames_are_the_truth_at_p_equals_M_R_q_plus_shift(
    tiny_twin: Path, truth: dict[str, npt.NDArray[np.float32]], energy: float
) -> None:
    # The centre of mass of every frame is where the truth puts that of the particle: down and right positive.
    alignment = {e: a for e, _, a in rows_alignments(read_shifts(tiny_twin / "truth" / "tables" / "shifts.csv"))}[
        energy
    ]
    (scan,) = [s for s in open_series(tiny_twin).scans if s.energy_ev == energy]
    data = normalise(scan, AbsorbanceParameters()).data
    at = np.arange(64) - 31.5
    mass = data.sum(axis=(1, 2))
    seen = np.stack([data.sum(axis=2) @ at / mass, data.sum(axis=1) @ at / mass], axis=1)
    np.testing.assert_allclose(seen, alignment.shift, atol=0.2)
    # place() undoes it: the particle stands still, and looks as the truth does along the beam.
    placed = place(data, alignment)
    mass = placed.sum(axis=(1, 2))
    np.testing.assert_allclose(placed.sum(axis=2) @ at / mass, 0, atol=0.2)
    np.testing.assert_allclose(placed.sum(axis=1) @ at / mass, 0, atol=0.2)
    for angle, sight in ((0.0, truth["density"].sum(axis=1)), (-90.0, truth["density"].sum(axis=2)[:, ::-1])):
        # At 0 deg columns are x; at -90 deg they are -z.
        frame = placed[int(np.flatnonzero(scan.theta_deg == angle)[0])]
        others = (sight[:, ::-1], sight[::-1])
        r = np.corrcoef(frame.ravel(), sight.ravel())[0, 1]
        assert r > 0.99
        assert all(np.corrcoef(frame.ravel(), o.ravel())[0, 1] < r - 0.003 for o in others)


def test_noise_is_that_of_the_camera(tiny_twin: Path) -> None:
    flats = open_series(tiny_twin).scans[0].flats[0].frames
    shots = flats.read_rows(list(range(10)), 0, 64).astype(float)
    shots *= shots.mean() / shots.mean(axis=(1, 2), keepdims=True)
    mean = shots.mean()
    assert mean == pytest.approx(9000 * 0.137, rel=0.05)
    assert shots.var(axis=0, ddof=1).mean() == pytest.approx(3.7**2 + 0.137 * mean, rel=0.05)


@pytest.mark.parametrize("width", [0.6, 0.8, 0.95])
def test_every_projection_shows_all_of_the_particle(width: float) -> None:
    particle = draw_particle(replace(SMALL, width=width), np.random.SeedSequence(0))
    lines = project([particle.oxygen], np.arange(0.0, 180.0, 15.0))[0]
    mass = lines.sum(axis=(1, 2), dtype=np.float64)
    assert np.abs(mass / particle.oxygen.sum(dtype=np.float64) - 1).max() < 3e-3
    assert not lines[:, :, [0, -1]].any()


def test_coupling_of_valence_and_composition() -> None:
    def correlation(coupling: float) -> float:
        p = TwinParameters(n=32, n_angles=12, energies_ev=(8570.0,), grains=60, valence_composition_coupling=coupling)
        maps = simulate(p)[0].maps
        solid = maps["density"] > 0.6 * np.percentile(maps["density"][maps["density"] > 0.5], 75)
        share = maps["Ni"][solid] / maps["density"][solid]
        return float(np.corrcoef(maps["edge_energy_relative"][solid], share)[0, 1])

    assert correlation(0.9) > 0.6
    assert correlation(-0.9) < -0.6
    assert abs(correlation(0.0)) < 0.4


def test_ni_xanes_is_a_step_that_follows_the_shift() -> None:
    edge = edge_energy_ev("Ni")
    assert ni_xanes(edge - 100) == pytest.approx(0, abs=1e-6)
    assert ni_xanes(edge + 300) == pytest.approx(1, abs=1e-3)
    energy = np.linspace(edge - 20, edge + 60, 500)
    np.testing.assert_allclose(ni_xanes(energy + 1.5, 1.5), ni_xanes(energy, 0.0), atol=1e-12)
    assert ni_xanes(energy).max() > 1.2  # a white line
    assert ni_xanes(energy[:, None], np.zeros((1, 3))).shape == (500, 3)


# ------------------------------------------------------------------------------------------------------- options

OPEN = TwinParameters(n=48, n_angles=24, energies_ev=(8178.0, 8570.0), grains=30, flats_per_set=4)


def measured(**options: object) -> tuple[Truth, list[npt.NDArray[np.float64]], list[npt.NDArray[np.float64]]]:
    """Truth, counts of the projections and mean flats of a small twin."""
    truth, measurement = simulate(replace(OPEN, **options))  # type: ignore[arg-type]
    frames = list(measurement)
    return truth, [f.projections.astype(float) for f in frames], [f.flats.mean(axis=(0, 1)) for f in frames]


def optical_density(counts: npt.NDArray[np.float64], flat: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(-np.log(np.maximum(counts, 0.5) / flat))


def test_the_motion_alone_is_that_of_the_measurement() -> None:
    p = replace(SMALL, refocus_jump=3e-3, shrinkage=1e-3, seed=5)
    truth, _ = simulate(p)
    alignments, instrument = draw_motion(p)
    assert instrument == truth.instrument
    for drawn, true in zip(alignments, truth.alignments, strict=True):
        assert drawn.magnification == true.magnification
        np.testing.assert_array_equal(drawn.shift, true.shift)


def test_options_change_nothing_else() -> None:
    _, plain, _ = measured()
    truth, same, _ = measured(bad_fraction=0.1, bad_kinds=("black",))
    bad = {(b.energy_ev, b.frame) for b in truth.bad}
    assert len(bad) == 4
    for energy, a, b, alignment in zip(OPEN.energies_ev, plain, same, truth.alignments, strict=True):
        for i in range(24):
            lost = (energy, i) in bad
            assert np.array_equal(a[i], b[i]) != lost
            assert alignment.status[i] == ("excluded:black" if lost else "ok")


@pytest.mark.parametrize(
    ("kind", "holds"),
    [
        ("black", lambda frame, good, flat: frame.mean() < 0.01 * flat.mean()),
        ("beam loss", lambda frame, good, flat: 0.02 < frame.mean() / good.mean() < 0.4),
        ("saturated", lambda frame, good, flat: np.mean(frame == frame.max()) > 0.2),
        ("flat", lambda frame, good, flat: optical_density(frame, flat).max() < 0.25),
        ("displaced", lambda frame, good, flat: np.corrcoef(frame.ravel(), good.ravel())[0, 1] < 0.6),
        ("motion-blurred", lambda frame, good, flat: np.abs(frame - good).mean() > 0.0003 * flat.mean()),
    ],
)
def test_bad_frames(kind: str, holds: Callable[..., bool]) -> None:
    _, plain, flats = measured()
    truth, frames, _ = measured(bad_fraction=0.1, bad_kinds=(kind,))
    for b in truth.bad:
        e = OPEN.energies_ev.index(b.energy_ev)
        assert b.kind == kind
        assert holds(frames[e][b.frame], plain[e][b.frame], flats[e])


def test_a_duplicate_is_another_frame_byte_for_byte() -> None:
    truth, frames, _ = measured(bad_fraction=0.1, bad_kinds=("duplicate",))
    for b in truth.bad:
        here = frames[OPEN.energies_ev.index(b.energy_ev)]
        source = int(b.detail.split()[-1])
        assert np.array_equal(here[b.frame], here[source])
        assert source != b.frame


def test_a_slip_is_in_the_shifts_from_its_projection_on() -> None:
    plain = measured()[0].alignments
    truth = measured(slip_px=25.0, slip_from=18, slip_energies_ev=(8178.0,))[0]
    moved = truth.alignments[0].shift - plain[0].shift
    np.testing.assert_allclose(np.hypot(*moved[18:].T), 25 * 48 / 256)
    np.testing.assert_array_equal(moved[:18], 0)
    np.testing.assert_array_equal(truth.alignments[1].shift, plain[1].shift)
    assert (truth.instrument[0].slip_y_px, truth.instrument[0].slip_x_px) == pytest.approx(tuple(moved[-1]))


def test_magnification_is_optics_times_object() -> None:
    plain = measured()[0].alignments[0].magnification
    truth = measured(shrinkage=0.01, magnification_linear=0.05, magnification_quadratic=0.02, refocus_jump=3e-3)[0]
    first, reference = truth.instrument
    assert (reference.instrument_magnification, reference.object_scale) == (1.0, 1.0)
    assert first.object_scale == pytest.approx(1 / 0.99)
    k = -0.392  # keV from the reference
    assert first.instrument_magnification == pytest.approx(plain * (1 + 0.05 * k + 0.02 * k**2) * 1.003)
    assert truth.alignments[0].magnification == pytest.approx(first.instrument_magnification * first.object_scale)


def test_a_shrinking_object_keeps_its_mass() -> None:
    def mass(**options: object) -> float:
        truth, frames, flats = measured(quanta=3e5, illumination_drift=0.0, **options)
        return float(optical_density(frames[0], flats[0]).sum() / truth.instrument[0].instrument_magnification ** 2)

    assert mass(shrinkage=0.05) == pytest.approx(mass(), rel=0.01)


def test_post_capillary_and_neighbours_absorb_where_they_stand() -> None:
    _, plain, flats = measured()
    for options, where in (
        ({"post": 0.12}, np.s_[:, -4:, 20:28]),
        ({"capillary_radius": 0.4, "capillary_wall": 0.05}, np.s_[:, :, :]),
    ):
        _, frames, _ = measured(**options)  # type: ignore[arg-type]
        more = optical_density(frames[1], flats[1]) - optical_density(plain[1], flats[1])
        assert more[where].mean() > 0.01
        assert more.min() > -0.6  # noise only
    truth, frames, _ = measured(neighbours=3)
    more = optical_density(frames[1], flats[1]) - optical_density(plain[1], flats[1])
    assert more.max() > 0.1
    assert truth.maps["Ni"].sum() > measured()[0].maps["Ni"].sum()


def test_stray_light_and_dark_band() -> None:
    _, frames, flats = measured(dark_band=4 / 48, stray_counts=10.0, stray_fraction=0.018)
    assert flats[0][-4:].mean() == pytest.approx(10 + 0.018 * flats[0].mean(), abs=1.0)
    assert frames[0][:, -4:].mean() == pytest.approx(10 + 0.018 * frames[0].mean(), abs=1.0)
    assert flats[0][:-4].min() > 500


def test_an_angle_offset_turns_one_energy() -> None:
    still = {"quanta": 3e5, "illumination_drift": 0.0, "jitter_px": (0.01, 0.01)}
    _, plain, _ = measured(**still)
    truth, turned, _ = measured(**still, angle_offset_deg=7.5, angle_offset_ev=8178.0)
    assert [i.angle_offset_deg for i in truth.instrument] == [7.5, 0.0]
    assert np.array_equal(plain[1], turned[1])
    unlike = [[np.abs(turned[0][i] - plain[0][i + k]).mean() for i in range(22)] for k in (0, 1)]
    assert np.mean(unlike[1]) < 0.85 * np.mean(unlike[0])  # one step on: 7.5 degrees; what is left is noise


def test_white_lines_and_uniform_composition() -> None:
    p = replace(OPEN, energies_ev=(7704.0, 7728.0, 8570.0), gradient=0.0, grain_scatter=0.0)
    energy = np.asarray(p.energies_ev)
    plain = metal_attenuation(p, "Co", energy)
    high = metal_attenuation(replace(p, white_line_co=1.2), "Co", energy)
    assert (high[[0, 2]] == plain[[0, 2]]).all()
    assert high[1] - plain[1] == pytest.approx(0.2 * (plain[1] - plain[0]), rel=0.03)
    maps = simulate(p)[0].maps
    solid = maps["density"] > 2.0
    assert (maps["Ni"][solid] / maps["density"][solid]).std() < 1e-5


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"postt": 1}, "did you mean post"),
        ({"post": "wide"}, "post: expected a number"),
        ({"n": 10.5}, "n: expected a whole number"),
        ({"energies_ev": [8570, 6534]}, "ascending"),
        ({"bad_kinds": ["upside down"]}, "bad_kinds"),
        ({"bad_fraction": 2}, "bad_fraction"),
        ({"jitter_px": [1, 2, 3]}, "jitter_px"),
        ({"refocus_ev": 7000.0}, "refocus_ev"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], match: str) -> None:
    with pytest.raises(XanesTomoError, match=match):
        twin_parameters("tiny", options)


def test_what_differs_is_written_beside_the_truth(small: Path, tmp_path: Path) -> None:
    assert not (small / "truth" / "tables" / "instrument.csv").exists()
    folder = write_twin(tmp_path / "twin", parameters=replace(SMALL, bad_fraction=0.1, shrinkage=1e-3))
    tables = folder / "truth" / "tables"
    with (tables / "bad_frames.csv").open() as file:
        bad = list(csv.DictReader(file))
    assert len(bad) == 3
    with (tables / "instrument.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3
    rows = read_shifts(tables / "shifts.csv")
    assert {(r.energy_ev, r.frame) for r in rows if r.status != "ok"} == {
        (float(b["energy_ev"]), int(b["frame"])) for b in bad
    }


# ---------------------------------------------------------------------------------------------- folders protected


def test_a_twin_that_is_there_already_is_left_alone(small: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in small.rglob("*")}
    assert write_twin(small, parameters=SMALL) == small
    assert {p: p.stat().st_mtime_ns for p in small.rglob("*")} == before


def test_another_twin_is_not_written_over(small: Path) -> None:
    before = digest(small)
    with pytest.raises(XanesTomoError, match="another twin"):
        write_twin(small, parameters=SMALL, seed=7)
    assert digest(small) == before


def test_a_folder_with_other_files_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(XanesTomoError, match="new or empty"):
        write_twin(tmp_path, parameters=SMALL)
    assert digest(tmp_path) == {"thesis.txt": hashlib.sha256(b"precious").hexdigest()}


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("precious")
    with pytest.raises(XanesTomoError, match="file"):
        write_twin(target, parameters=SMALL)
    assert target.read_text() == "precious"


def test_unknown_preset(tmp_path: Path) -> None:
    with pytest.raises(XanesTomoError, match="demo, tiny, demo-real"):
        write_twin(tmp_path / "twin", preset="huge")
    assert not (tmp_path / "twin").exists()


@pytest.mark.parametrize("stop_at", [("particle", 1), ("projecting", 2), ("twin", 2)])
def test_an_interrupted_twin_is_finished_by_the_same_call(
    small: Path, tmp_path: Path, stop_at: tuple[str, int]
) -> None:
    folder = tmp_path / "twin"

    def stop(what: str, done: int, total: int) -> None:
        if (what, done) == stop_at:
            raise Cancelled

    with pytest.raises(Cancelled):
        write_twin(folder, parameters=SMALL, progress=stop)
    with pytest.raises(XanesTomoError, match="another twin"):
        write_twin(folder, parameters=SMALL, seed=3)
    write_twin(folder, parameters=SMALL)
    assert digest(folder) == digest(small)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"complete": true}'])
def test_a_mark_that_tells_nothing_protects_the_folder(tmp_path: Path, text: str) -> None:
    (tmp_path / "truth").mkdir()
    (tmp_path / "truth" / "twin.json").write_text(text)
    with pytest.raises(XanesTomoError, match="another twin"):
        write_twin(tmp_path, parameters=SMALL)
    assert (tmp_path / "truth" / "twin.json").read_text() == text


@pytest.mark.parametrize("pixel", [2.0, 0.5])
def test_another_binning_shows_the_same_field_in_other_pixels(pixel: float) -> None:
    plain, counts, flats = measured()
    truth, other, beam = measured(other_binning=pixel, other_binning_ev=8178.0)
    one, same = truth.alignments[0], plain.alignments[0]
    assert one.magnification == pytest.approx(same.magnification / pixel)
    np.testing.assert_allclose(one.shift, same.shift / pixel)
    np.testing.assert_array_equal(other[1], counts[1])
    pair = [optical_density(a[0], b[0]) for a, b in ((counts, flats), (other, beam))]
    fine, coarse = sorted(pair, key=lambda a: -a.shape[1])
    n = coarse.shape[1]
    assert fine.shape == (24, 2 * n, 2 * n)
    binned = fine.reshape(24, n, 2, n, 2).mean(axis=(2, 4))
    assert np.sqrt(np.mean((binned - coarse) ** 2)) < 0.05
    assert np.corrcoef(binned.ravel(), coarse.ravel())[0, 1] > 0.99
