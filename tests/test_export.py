"""Export: what is written comes back through our own reader and is what other programs' definitions ask for."""

import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates
from typer.testing import CliRunner

from napari_xanes_tomo import Recipe, Series, Workflow, cli, open_series, read_maps, write_twin
from napari_xanes_tomo.export import FORMATS, export_scan, export_shifts, export_workflow
from napari_xanes_tomo.io.tables import ShiftRow, read_shifts, write_shifts
from napari_xanes_tomo.io.volumes import open_projections, open_volumes
from napari_xanes_tomo.maps import component_sinograms, placed_rows
from napari_xanes_tomo.model import Cancelled, XanesTomoError
from napari_xanes_tomo.phantom import TwinParameters
from napari_xanes_tomo.recipe import JitterParameters, MapsParameters, RegistrationParameters
from napari_xanes_tomo.reconstruction import angular_weights

SMALL = TwinParameters(
    n=32, n_angles=12, energies_ev=(7704.0, 7728.0, 8178.0, 8570.0), grains=40, flats_per_set=3, jitter_px=(2.0, 4.0)
)
# Lost projections are not filled: what is exported is what was measured.
FAST = Recipe(
    jitter=JitterParameters(iterations=2),
    registration=RegistrationParameters(iterations=4),
    maps=MapsParameters(fill_lost=False, half_sets=False),
)


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_twin(tmp_path_factory.mktemp("export") / "twin", parameters=SMALL)


@pytest.fixture(scope="module")
def series(twin: Path) -> Series:
    return open_series(twin)


@pytest.fixture(scope="module")
def run(twin: Path, series: Series) -> Path:
    """A finished run with two projections and an energy's flats chosen by hand."""
    out = twin.parent / "out"
    with Workflow(series, out, FAST, source=twin) as workflow:
        workflow.exclude(1, 3, "blurred")
        workflow.choose_flats(2, "half 2")
        workflow.run()
    return out


def counts(scan, index=None):
    rows = scan.frames.frame_shape[0]
    return scan.frames.read_rows(list(range(len(scan))) if index is None else index, 0, rows)


def assert_same_scan(one, other, index=None) -> None:
    """The same counts, angles, times and ties to the same flats (of the projections `index` of `one`)."""
    index = np.arange(len(one)) if index is None else index
    assert other.energy_ev == pytest.approx(one.energy_ev, rel=1e-12)
    assert other.pixel_size_nm == pytest.approx(one.pixel_size_nm, rel=1e-9)
    assert counts(one).dtype == counts(other).dtype
    np.testing.assert_array_equal(counts(other), counts(one, index.tolist()))
    np.testing.assert_array_equal(other.theta_deg, np.asarray(one.theta_deg)[index])
    np.testing.assert_array_equal(other.exposure_s, np.asarray(one.exposure_s)[index])
    np.testing.assert_array_equal(other.time_s, np.asarray(one.time_s)[index])
    for i, k in enumerate(index.tolist()):
        mine, theirs = one.flats[one.half[k]], other.flats[other.half[i]]
        good = [j for j, s in enumerate(mine.status) if s == "ok"]
        np.testing.assert_array_equal(theirs.exposure_s, np.asarray(mine.exposure_s)[good])
        for shot, j in enumerate(good):
            np.testing.assert_array_equal(theirs.frames.read(shot), mine.frames.read(j))


# ------------------------------------------------------------------------------------------------------- raw data


@pytest.mark.parametrize(("format", "one_file"), [("nxtomo", False), ("nxtomo", True), ("data-exchange", False)])
def test_raw_data_come_back(series, tmp_path, format, one_file):
    made = export_scan(series, tmp_path / "out", format, one_file=one_file)
    assert len(made.files) == (1 if one_file else 4)
    again = open_series(made.files[0] if one_file else tmp_path / "out")
    assert not [p for p in again.problems if p.severity != "info"]
    assert len(again.scans) == len(series.scans)
    for one, other in zip(series.scans, again.scans, strict=True):
        assert_same_scan(one, other)
        assert other.usable.all()


def test_excluded_frames_and_flats_without_use(series, tmp_path):
    scan = series.scans[0].excluded({2: "blurred"})
    scan = replace(scan, status=(*scan.status[:5], "unreadable:missing", *scan.status[6:]))
    bad = replace(scan.flats[0], status=("unreadable:truncated",) * len(scan.flats[0].status))
    scan = replace(scan, flats=(bad, *scan.flats[1:]))
    lame = replace(series, scans=(scan,))
    made = export_scan(lame, tmp_path / "nx", "nxtomo")
    assert [n.partition(": ")[2].split(" ")[0] for n in made.notes] == ["1", "1", "the"], made.notes
    again = open_series(tmp_path / "nx").scans[0]
    index = np.array([i for i in range(len(scan)) if i != 5])
    assert [s.partition(":")[0] for s in again.status] == ["excluded" if i == 2 else "ok" for i in index]
    np.testing.assert_array_equal(counts(again), counts(scan, index.tolist()))
    assert (again.half == 0).all()  # all are tied to the flats that are left
    np.testing.assert_array_equal(again.flats[0].frames.read(1), scan.flats[1].frames.read(1))
    made = export_scan(lame, tmp_path / "de", "data-exchange")
    assert "1 excluded projections are left out" in made.notes[0]
    assert_same_scan(replace(scan, half=np.ones(len(scan), int)), open_series(tmp_path / "de").scans[0],
                     np.array([i for i in index if i != 2]))  # fmt: skip
    with h5py.File(made.files[0]) as file:
        assert file["exchange/frame"][()].tolist() == [i for i in index if i != 2]
        assert not file["exchange/data_dark"][()].any()


@settings(max_examples=20)
@given(st.lists(st.integers(0, 2), min_size=12, max_size=12), st.lists(st.booleans(), min_size=3, max_size=3))
def test_ties_to_flats_survive_in_any_order(series, tmp_path_factory, half, good):
    from napari_xanes_tomo.flats import flat_for

    own = series.scans[0]
    sets = [own.flats[0], own.flats[1], series.scans[1].flats[0]]
    flats = tuple(f if ok else replace(f, status=("unreadable:missing",) * 3) for f, ok in zip(sets, good, strict=True))
    scan = replace(own, half=np.array(half), flats=flats)
    folder = tmp_path_factory.mktemp("ties")
    for format in ("nxtomo", "data-exchange"):
        export_scan(replace(series, scans=(scan,)), folder / format, format)
        again = open_series(folder / format).scans[0]
        if not any(good):
            assert not again.flats
            continue
        for i in range(12):
            expected = flats[flat_for(scan, half[i])].frames.read(0)
            np.testing.assert_array_equal(again.flats[again.half[i]].frames.read(0), expected)


def test_nxtomo_as_its_definition_asks(series, tmp_path):
    nx = pytest.importorskip("nexusformat.nexus", reason="nexusformat is not installed")
    from nexusformat.nexus.validate import validate_application

    made = export_scan(series, tmp_path / "nx", "nxtomo")
    n_flats = sum(len(f.frames) for f in series.scans[1].flats)
    with nx.nxopen(made.files[1]) as root:
        plot = root.plottable_data
        assert plot.nxsignal.shape == (12 + n_flats, 32, 32)
        assert plot.nxaxes[0].nxname == "rotation_angle"
        entry = root.entry
        assert (entry.nxclass, entry.definition.nxvalue) == ("NXentry", "NXtomo")
        assert entry.instrument.detector.image_key.nxvalue.tolist().count(1) == n_flats
        assert entry.instrument.beam.incident_energy.nxvalue == pytest.approx(7.728)
        assert entry.instrument.detector.x_pixel_size.nxvalue * 1e9 == pytest.approx(series.scans[1].pixel_size_nm)
        np.testing.assert_array_equal(
            plot.nxsignal[entry.instrument.detector.image_key.nxvalue == 0].nxvalue, counts(series.scans[1])
        )
    assert validate_application(str(made.files[1])) == (0, 0)  # warnings, errors


# -------------------------------------------------------------------------------------------------------- a run


def test_aligned_projections_are_those_the_maps_are_made_of(run, series, tmp_path):
    with Workflow(series, run) as workflow:
        plan, items, pixel = workflow.map_plan()
        for format in ("aligned-tiff", "aligned-data-exchange"):
            export_workflow(workflow, tmp_path / format, format)
    sinograms, theta = component_sinograms(items, plan, (3, 9))
    weights = np.array(list(plan.components.values()))
    for format in ("aligned-tiff", "aligned-data-exchange"):
        found = open_projections(tmp_path / format)
        assert found.energies_ev.tolist() == [7704, 7728, 8178, 8570]
        assert found.pixel_nm == pytest.approx(pixel)
        total = np.zeros_like(sinograms)
        for e, item in enumerate(items):
            np.testing.assert_array_equal(found.theta_deg[e], np.asarray(item.scan.theta_deg)[item.used])
            rows = found.read_rows(e, 3, 9)
            np.testing.assert_array_equal(rows, placed_rows(item, (3, 9), (32, 32)))
            at = [int(np.argmin(np.abs(theta - t))) for t in found.theta_deg[e]]
            share = angular_weights(found.theta_deg[e])
            total[:, at] += weights[:, e, None, None, None] * (rows * share[:, None, None])[None]
        np.testing.assert_allclose(total, sinograms, rtol=1e-4, atol=1e-4 * np.abs(sinograms).max())
    assert len(found.theta_deg[1]) == 11  # one was excluded by hand


def test_volumes_and_maps_come_back(run, series, tmp_path):
    with Workflow(series, run) as workflow:
        export_workflow(workflow, tmp_path / "volumes", "volumes-tiff")
        export_workflow(workflow, tmp_path / "maps", "maps-tiff")
        plan, _, _ = workflow.map_plan()
    volumes = open_volumes(tmp_path / "volumes")
    assert volumes.shape == (32, 32, 32)
    # Energies combined with the weights of a component are that component's volume.
    total = sum(w * volumes.read(e) for e, w in enumerate(plan.components["shape"]))
    maps = read_maps(run / "maps.ome.zarr")
    inside = np.asarray(maps.data["mask"]) > 0
    assert np.corrcoef(total[inside], np.asarray(maps.data["morphology"])[inside])[0, 1] > 0.9
    import tifffile

    for name in maps.data:
        np.testing.assert_array_equal(tifffile.imread(tmp_path / "maps" / f"{name}.ome.tif"), maps.data[name])


def test_exported_projections_and_volumes_give_the_maps_of_the_run_again(run, series, tmp_path):
    from napari_xanes_tomo.io.given import open_given

    one = read_maps(run / "maps.ome.zarr")
    assert one.voxel_nm == pytest.approx(series.scans[3].pixel_size_nm)
    with Workflow(series, run) as workflow:
        for format in ("aligned-data-exchange", "aligned-tiff", "volumes-tiff"):
            export_workflow(workflow, tmp_path / format, format)
    for format in ("aligned-data-exchange", "aligned-tiff", "volumes-tiff"):
        with Workflow(open_given(tmp_path / format), tmp_path / f"again-{format}", FAST) as again:
            again.run()
        other = read_maps(tmp_path / f"again-{format}" / "maps.ome.zarr")
        inside = (np.asarray(one.data["mask"]) > 0) & (np.asarray(other.data["mask"]) > 0)
        for name in ("Co", "Ni", "density"):
            if name not in one.data:
                continue
            a, b = np.asarray(one.data[name])[inside], np.asarray(other.data[name])[inside]
            assert np.corrcoef(a, b)[0, 1] > 0.98, (format, name)
            # The weights of the energies follow their noise, which is known differently; four energies for two
            # elements and a remainder let single elements follow the weights, their sum does not.
            if name == "density":
                assert b.mean() == pytest.approx(a.mean(), rel=0.02), (format, name)


def test_what_was_decided_by_hand_is_honoured(run, series, tmp_path):
    with Workflow(series, run) as workflow:
        workflow.exclude(0, reason="drift")
        made = export_workflow(workflow, tmp_path / "raw", "nxtomo")
        workflow.restore(0)
    assert "7704 eV: left out, drift" in made.notes
    assert any(n.startswith("8178 eV: only the flats of half 2") for n in made.notes)
    again = open_series(tmp_path / "raw")
    assert again.energies_ev.tolist() == pytest.approx([7728, 8178, 8570])
    assert again.scans[0].status[3].startswith("excluded")
    assert len(again.scans[1].flats) == 1
    np.testing.assert_array_equal(again.scans[1].flats[0].frames.read(0), series.scans[2].flats[1].frames.read(0))


# ------------------------------------------------------------------------------------------------------- shifts


def spot(n: int, y: float, x: float) -> np.ndarray:
    """A frame with a spot at (y, x) from its centre."""
    axis = np.arange(n) - (n - 1) / 2
    return np.exp(-((axis[:, None] - y) ** 2 + (axis[None, :] - x) ** 2) / 8).astype(np.float32)


def shift_table(folder: Path, shift: np.ndarray) -> None:
    """The tables of a run of one energy: a spot at (2, 0) is found at (2, 0) + shift."""
    rows = [
        ShiftRow(8353.0, float(i), i, float(dy), float(dx), 0.1, 0.1, 1.0, 0.0, "excluded:blurred" if i == 1 else "ok")
        for i, (dy, dx) in enumerate(shift)
    ]
    write_shifts(folder / "tables" / "shifts.csv", rows)
    (folder / "journal.jsonl").write_text("")


def test_signs_of_the_shift_tables(tmp_path):
    shift = np.array([[3.0, 1.5], [9.0, 9.0], [-2.25, -4.0], [0.5, 6.0]])
    shift_table(tmp_path / "run", shift)
    made = export_shifts(tmp_path / "run", tmp_path / "out")
    nabu, tomopy = (np.loadtxt(next(f for f in made.files if f.name.endswith(n))) for n in ("nabu.txt", "tomopy.txt"))
    used = shift[[0, 2, 3]]  # one line for every projection that is used
    assert nabu.shape == (3, 2)
    np.testing.assert_array_equal(tomopy[:, 0], [0, 2, 3])
    y, x = np.mgrid[:41, :41].astype(float)
    for i, (dy, dx) in enumerate(used):
        frame = spot(41, 2 + dy, dx)  # the content was displaced by + shift
        # nabu: a corrected pixel (y, x) is the recorded one at (y + vertical, x + horizontal) (preproc/shift.py, and
        # the axis correction that is added to the column in its back-projection).
        moved = map_coordinates(frame, [y + nabu[i, 1], x + nabu[i, 0]], order=3)
        np.testing.assert_allclose(moved, spot(41, 2, 0), atol=2e-3)
        # TomoPy: warp(prj, SimilarityTransform(translation=(sy, sx))), whose translation is (column, row).
        from skimage.transform import SimilarityTransform, warp

        warped = warp(frame, SimilarityTransform(translation=(tomopy[i, 2], tomopy[i, 1])), order=5, clip=False)
        np.testing.assert_allclose(warped, spot(41, 2, 0), atol=2e-3)


def test_shifts_undone_by_nabu_itself(tmp_path):
    VerticalShift = pytest.importorskip("nabu.preproc.shift", reason="nabu is not installed").VerticalShift
    shift = np.array([[3.0, 0.0], [9.0, 9.0], [-2.0, 0.0]])
    shift_table(tmp_path / "run", shift)
    made = export_shifts(tmp_path / "run", tmp_path / "out")
    table = np.loadtxt(next(f for f in made.files if f.name.endswith("nabu.txt")))
    radios = np.stack([spot(41, 2 + dy, 0) for dy in shift[[0, 2], 0]])
    VerticalShift(radios.shape, table[:, 1]).apply_vertical_shifts(radios, [0, 1])
    np.testing.assert_allclose(radios, np.stack([spot(41, 2, 0)] * 2), atol=1e-3)


def test_shifts_of_a_run(run, tmp_path):
    made = export_shifts(run, tmp_path / "out", only=[7728])
    rows = [r for r in read_shifts(run / "tables" / "shifts.csv") if r.energy_ev == 7728 and r.status == "ok"]
    table = np.loadtxt(next(f for f in made.files if f.name.endswith("nabu.txt")))
    np.testing.assert_allclose(table, [[r.shift_x_px, r.shift_y_px] for r in rows], atol=1e-6)
    assert len(table) == 11


# ---------------------------------------------------------------------------------------------- being interrupted


def test_stopped_and_gone_on_with(series, tmp_path):
    out = tmp_path / "out"
    whole = export_scan(series, tmp_path / "whole", "nxtomo")
    seen = []

    def stop(what, done, total):
        seen.append((done, total))
        if done > 0.6 * total:
            raise Cancelled

    with pytest.raises(Cancelled):
        export_scan(series, out, "nxtomo", progress=stop)
    assert all(0 <= a <= b for a, b in seen)
    assert sorted(p.name for p in out.iterdir() if not p.name.startswith("export")) == [
        f.name for f in whole.files[:2]
    ]  # whole files only, nothing half
    before = (out / whole.files[0].name).stat().st_mtime_ns
    made = export_scan(series, out, "nxtomo")
    assert made.kept == 2
    assert (out / whole.files[0].name).stat().st_mtime_ns == before
    for file in whole.files:
        assert (out / file.name).read_bytes() == file.read_bytes()


def test_nothing_is_written_over(series, tmp_path):
    made = export_scan(series, tmp_path / "out", "nxtomo")
    bytes_before = made.files[0].read_bytes()
    with pytest.raises(XanesTomoError, match="another export"):
        export_scan(series, tmp_path / "out", "data-exchange")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(XanesTomoError, match="new or empty"):
        export_scan(series, tmp_path / "full", "nxtomo")
    assert made.files[0].read_bytes() == bytes_before
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["notes.txt"]


class Frames:
    """Frames that are made when they are read, and counted."""

    def __init__(self, n: int, side: int) -> None:
        self.n, self.side = n, side
        self.frame_shape, self.dtype = (side, side), np.dtype("<u2")

    def __len__(self) -> int:
        return self.n

    def read(self, index: int) -> np.ndarray:
        return np.full((self.side, self.side), index, dtype="u2")

    def read_rows(self, indices, y0, y1):
        return np.stack([self.read(i)[y0:y1] for i in indices])

    def fingerprint(self) -> str:
        return f"{self.n} {self.side}"


@pytest.mark.parametrize("format", ["nxtomo", "data-exchange"])
def test_memory_is_that_of_a_frame(series, tmp_path, format):
    import tracemalloc

    def peak(n: int) -> int:
        scan = replace(
            series.scans[0], frames=Frames(n, 256), theta_deg=np.arange(n) * 1.0, exposure_s=np.ones(n),
            status=("ok",) * n, half=np.zeros(n, int), time_s=np.full(n, np.nan), names=(),
            flats=(replace(series.scans[0].flats[0], frames=Frames(3, 256)),),
        )  # fmt: skip
        tracemalloc.start()
        export_scan(replace(series, scans=(scan,)), tmp_path / f"{n}", format)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(2)  # what is imported and made once
    few, many = peak(4), peak(64)
    assert many < few + 2 * 256 * 256 * 2  # 62 frames more, and less than two more in memory


# --------------------------------------------------------------------------------------------------- command line


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.mark.parametrize("format", [f for f in FORMATS if f != "volumes-tiff"])
def test_the_command(run, tmp_path, format):
    result = call("export", run, "--format", format, "--to", tmp_path / "out", "--energy", 7728)
    assert result.exit_code == 0, result.stderr
    told = json.loads((tmp_path / "out" / "export.json").read_text())
    assert told["format"] == format
    assert all((tmp_path / "out" / f).is_file() for f in told["files"])


def test_the_command_says_what_is_wrong_in_one_line(twin, run, tmp_path):
    for arguments, words in [
        ((twin, "--format", "maps-tiff"), "output folder of a run"),
        ((run, "--format", "nxtomo", "--energy", "9999"), "--energy 9999"),
        ((tmp_path / "nowhere",), "no such path"),
        ((twin, "--format", "data-exchange", "--one-file"), "nxtomo only"),
    ]:
        result = call("export", *arguments, "--to", tmp_path / "out")
        assert result.exit_code == 1
        assert len(result.stderr.strip().splitlines()) == 1
        assert words in result.stderr
        assert not (tmp_path / "out").exists()
    assert call("export", twin, "--format", "word", "--to", tmp_path / "out").exit_code == 2
