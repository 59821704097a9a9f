"""From scripts, folders and files to a Series: every frame finds its energy, angle and flats, or is named."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from napari_xanes_tomo.io.scan import is_scan_folder, is_scan_script, open_series, parse_script
from napari_xanes_tomo.io.xrm import XrmError, read_header, write_xrm
from napari_xanes_tomo.model import XanesTomoError
from napari_xanes_tomo.recipe import ScanParameters

SHAPE = (12, 16)
ENERGIES = (6534, 8178, 8570)
ANGLES = 24


def real(name):
    folder = Path(os.environ.get("XANES_TOMO_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not (folder / name).exists():
        pytest.skip(f"real file {name} not found in {folder}; set XANES_TOMO_DATA to the folder that holds it")
    return folder / name


def plan(energies=ENERGIES, angles=ANGLES, flats=10):
    """Lines and frames (name, angle, energy, is a flat) of a scan like tomo_00089: R P R P at every energy."""
    lines, frames = [";; TOMO XANES ;;", "setexp 0.50", "setbinning 8"], []
    counter = reference = 0
    previous = 0.0
    for energy in energies:
        lines += [";; set the MONO and the ZP ;;", f"sete {energy:.2f}", "moveto zpx 14647.92"]
        for half in range(2):
            for k in range(flats):
                name = f"rep01_ref_{reference:05d}_AC3_C4p6_{previous:07.2f}_Degree_{k + 1:03d}of{flats:03d}.xrm"
                reference += 1
                lines.append(f"collect {name}")
                frames.append((name, previous, energy, True))
            for a in range(angles // 2):
                theta = -90 + 180 / angles * (a + half * (angles // 2))
                name = f"rep01_{counter:05d}_AC3_C4p6_{theta:07.2f}_Degree_{energy:08.2f}_eV_001of001.xrm"
                counter += 1
                lines += [f"moveto t {theta:.2f}", "moveto x -205.85", f"collect {name}"]
                frames.append((name, theta, energy, False))
                previous = theta
    return lines, frames


def write_scan(folder, script=True, **options):
    lines, frames = plan(**options)
    pixels = np.random.default_rng(0).integers(0, 3000, SHAPE).astype("u2")
    for i, (name, theta, _, flat) in enumerate(frames):
        write_xrm(
            folder / name,
            pixels + flat,
            theta_deg=theta + 0.01,
            exposure_s=0.3 if flat else 0.5,
            binning=8,
            date=1e9 + i,
        )
    if script:
        (folder / "scan.txt").write_bytes(("\r\n".join(lines) + "\r\n").encode())
    return frames


@pytest.fixture
def scan(tmp_path):
    return tmp_path, write_scan(tmp_path)


def codes(series):
    return [p.code for p in series.problems]


# ------------------------------------------------------------------------------------------------ scripts


def test_parse_script_keeps_the_state():
    text = (
        ";; comment\r\nsetexp 0.5\r\nSETBINNING 2\r\nsete 8250.00\r\nMoveTo T 6.97\r\nwait 3\r\nnonsense 1 2\r\n"
        "setexp 0.3\r\ncollect a_ref_08250.0_eV_001of010.xrm\r\nsetexp 0.50\r\nCollect  b.xrm ; why\r\n"
        "sete 8250.00\r\ncollect c.xrm\r\n"
    )
    first, second = parse_script(text)
    assert (first.energy_ev, second.energy_ev) == (8250, 8250)  # an energy that recurs is a block of its own
    assert [f.name for f in first.frames] == ["a_ref_08250.0_eV_001of010.xrm", "b.xrm"]
    assert [f.kind for f in first.frames] == ["flat", "projection"]
    assert [f.exposure_s for f in first.frames] == [0.3, 0.5]
    assert [f.binning for f in first.frames] == [2, 2]
    assert [f.theta_deg for f in (*first.frames, *second.frames)] == [6.97] * 3


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("rep01_ref_00000_AC3_C4p6_0000.00_Degree_001of010.xrm", "flat"),
        ("ref_sample_08250.0_eV_000of015.xrm", "flat"),
        ("test_reference_xanes0_8250_0eV.xrm", "flat"),
        ("sample_FF.xrm", "flat"),
        ("sample_DF.xrm", "dark"),
        ("rep01_00000_AC3_C4p6_-090.00_Degree_06534.00_eV_001of001.xrm", "projection"),
        ("prefab_08250.0_eV.xrm", "projection"),
    ],
)
def test_kinds_of_frames(name, kind):
    assert parse_script(f"sete 1000\ncollect {name}")[0].frames[0].kind == kind


def test_aps_dialect_and_energy_from_names():
    blocks = parse_script(
        "moveto energy 8150.00\nmoveto energy 8250.0\ncollect s_8250_0eV.xrm\nmoveto ENERGY 8270\ncollect t"
    )
    assert [b.energy_ev for b in blocks] == [8250, 8270]
    assert blocks[1].frames[0].name == "t.xrm"
    text = "collect a_8250_0eV.xrm\ncollect ref_a_8250_0eV.xrm\ncollect a_08270.5_eV_001of003.xrm\ncollect plain.xrm"
    blocks = parse_script(text)
    assert [(b.energy_ev, len(b.frames)) for b in blocks] == [(8250, 2), (8270.5, 2)]
    assert np.isnan(parse_script("collect x.xrm")[0].energy_ev)


def test_nothing_in_a_line_is_too_strange():
    text = "sete\nsete x\nsetexp nan\nsetbinning 1e9\nmoveto\nmoveto t\ncollect\n" + "x" * 10_000 + "\n"
    assert parse_script(text) == []
    text += "collect " + "y" * 10_000 + ".xrm\nsete " + "9" * 10_000 + "\n\0\xff\ncollect z.xrm"
    blocks = parse_script(text)
    assert len(blocks) == 2
    assert np.isnan(blocks[1].frames[0].exposure_s)


@pytest.mark.parametrize(
    "name", ["../x.xrm", "/etc/passwd", "..\\x.xrm", "C:x.xrm", "sub/x.xrm", "\\\\server\\x.xrm", "..", "a/../../x.xrm"]
)
def test_a_script_may_not_leave_its_folder(tmp_path, name):
    (tmp_path / "s.txt").write_text(f"sete 8250\nmoveto t 0\ncollect ok.xrm\ncollect {name}\n")
    with pytest.raises(XanesTomoError, match="plain name") as error:
        open_series(tmp_path)
    assert "\n" not in str(error.value)


def test_sniffing(tmp_path):
    (tmp_path / "s.txt").write_text("setexp 0.5\nsete 8250\n")
    (tmp_path / "scaninfo.txt").write_text("VERSION 1\nENERGY 1\nTOMO 0\nFILES\na.xrm\n")
    (tmp_path / "prose.txt").write_text("collect the samples\nsetting up\n")
    (tmp_path / "binary.txt").write_bytes(b"sete 1\ncollect a\n\0")
    (tmp_path / "u16.txt").write_text("setexp 0.5\nsete 8250\n", encoding="utf-16")
    assert [is_scan_script(tmp_path / f"{n}.txt") for n in ("s", "scaninfo", "prose", "binary", "u16", "gone")] == [
        *(True, True, False, False, True, False)
    ]
    assert not is_scan_script(tmp_path)
    assert is_scan_folder(tmp_path)
    (tmp_path / "sub").mkdir()
    assert not is_scan_folder(tmp_path / "sub")
    (tmp_path / "sub" / "a.XRM").touch()
    assert is_scan_folder(tmp_path / "sub")
    assert not is_scan_folder(tmp_path / "s.txt")


# ------------------------------------------------------------------------------------------------ a whole scan


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("by", ["script", "folder", "names"])
def test_whole_scan(tmp_path, by, verify):
    frames = write_scan(tmp_path, script=by != "names")
    series = open_series(tmp_path / "scan.txt" if by == "script" else tmp_path, verify=verify)
    assert series.problems == ()
    assert series.n_expected == (3, 72, 60)
    assert tuple(series.energies_ev) == ENERGIES
    assert series.frame_shape == SHAPE
    for scan in series.scans:
        own = [f for f in frames if f[2] == scan.energy_ev]
        projections = [f for f in own if not f[3]]
        assert scan.names == tuple(f[0] for f in projections)
        expected = np.array([f[1] for f in projections]) + (0.01 if verify else 0)
        np.testing.assert_allclose(scan.theta_deg, expected, atol=1e-4)
        assert scan.half.tolist() == [0] * 12 + [1] * 12
        assert [len(f.frames) for f in scan.flats] == [10, 10]
        assert scan.flats[0].names + scan.flats[1].names == tuple(f[0] for f in own if f[3])
        assert set(scan.status) == {"ok"}
        assert scan.binning == 8
        assert scan.pixel_size_nm == pytest.approx(8 * (0.002039449 * scan.energy_ev - 0.792164997))
        if verify:
            assert set(scan.exposure_s) == {0.5}
            assert scan.flats[1].exposure_s == pytest.approx(0.3)
            assert (np.diff(scan.time_s) >= 1).all()
            times = np.concatenate((scan.flats[0].time_s, scan.time_s[:12], scan.flats[1].time_s, scan.time_s[12:]))
            np.testing.assert_allclose(np.diff(times), 1, atol=1e-6)
            assert scan.header_pixel_size_nm == pytest.approx(23, abs=1e-4)
        assert scan.flats[0].frames.read(0).sum() == scan.frames.read(0).sum() + np.prod(SHAPE)
    assert pickle.loads(pickle.dumps(series)).scans[1].frames.fingerprint() == series.scans[1].frames.fingerprint()


def test_parameters(scan):
    folder, _ = scan
    plain = open_series(folder).scans[0]
    other = open_series(folder, ScanParameters(theta_sign=-1, flip_rows=True, bin=2)).scans[0]
    np.testing.assert_array_equal(other.theta_deg, -plain.theta_deg)
    assert other.frames.frame_shape == (6, 8)
    assert other.pixel_size_nm == 2 * plain.pixel_size_nm
    raw = plain.frames.read(3).astype("u4")
    np.testing.assert_array_equal(other.frames.read(3), raw.reshape(6, 2, 8, 2).sum((1, 3))[::-1])


def test_script_elsewhere(scan, tmp_path_factory):
    folder, _ = scan
    other = tmp_path_factory.mktemp("other") / "plan.scr"
    shutil.move(folder / "scan.txt", other)
    series = open_series(folder, script=other)
    assert (series.name, len(series.scans), series.problems) == ("plan", 3, ())


def test_names_in_another_case(scan):
    folder, frames = scan
    (folder / frames[11][0]).rename(folder / frames[11][0].upper())
    assert open_series(folder).problems == ()


def test_renamed_files_are_found_by_the_name_they_were_acquired_under(scan):
    folder, frames = scan
    for i, (name, *_) in enumerate(frames):
        (folder / name).rename(folder / f"image{i:04d}.xrm")
    series = open_series(folder)
    assert series.problems == ()
    assert series.scans[0].names[0] == frames[10][0]
    assert series.scans[0].frames.paths[0].endswith("image0010.xrm")
    (folder / "scan.txt").unlink()
    series = open_series(folder)  # and without the script
    assert tuple(series.energies_ev) == ENERGIES
    assert [len(f.frames) for f in series.scans[2].flats] == [10, 10]


def test_every_bad_frame_is_named_and_flagged(scan):
    folder, frames = scan
    names = [f[0] for f in frames if not f[3]]
    whole = (folder / names[0]).read_bytes()
    (folder / names[1]).unlink()
    (folder / names[2]).write_bytes(b"")
    (folder / names[3]).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (folder / names[4]).write_bytes(whole[:9000])
    write_xrm(folder / names[5], np.zeros((5, 6), "u2"), theta_deg=-52.5)
    (folder / names[6]).write_bytes(b"not an XRM file" * 200)
    (folder / names[7]).unlink()
    (folder / names[7]).mkdir()
    write_xrm(folder / names[8], np.zeros(SHAPE, "f4"), theta_deg=-30)
    series = open_series(folder)
    expected = ["missing", "empty", "lfs-pointer", "truncated", "other-size", "not-xrm", "unreadable", "other-size"]
    assert list(series.scans[0].status) == ["ok", *(f"unreadable:{w}" for w in expected), *["ok"] * 15]
    found = {p.frame: p for p in series.problems}
    assert sorted(found) == list(range(1, 9))
    for i, code in enumerate(expected, start=1):
        assert (found[i].code, found[i].file, found[i].energy_ev) == (code, names[i], 6534)
        assert "\n" not in found[i].message
    assert np.isfinite(series.scans[0].theta_deg).all()
    with pytest.raises(XrmError, match=names[1]):
        series.scans[0].frames.read(1)


def test_a_whole_energy_is_one_problem(scan):
    folder, frames = scan
    for name, _, energy, _ in frames:
        if energy == 8178:
            (folder / name).unlink()
    series = open_series(folder)
    assert codes(series) == ["energies-missing"]
    assert "8178" in series.problems[0].message
    assert len(series.scans) == 3  # a row for every projection of the script
    assert set(series.scans[1].status) == {"unreadable:missing"}
    assert len(series.scans[1].theta_deg) == ANGLES
    (folder / "scan.txt").unlink()
    assert tuple(open_series(folder).energies_ev) == (6534, 8570)


def test_no_file_at_all_is_one_problem(scan):
    folder, frames = scan
    for name, *_ in frames:
        (folder / name).unlink()
    series = open_series(folder)
    assert codes(series) == ["missing"]
    assert "no file is there" in series.problems[0].message
    assert len(series.scans) == 3
    assert series.scans[0].frames.paths[0] == str(folder / frames[10][0])  # it may still come


def test_flats(scan):
    folder, frames = scan
    flats = [f[0] for f in frames if f[3]]
    for name in flats[:10]:  # the first half of 6534
        (folder / name).unlink()
    for name in flats[20:40]:  # 8178
        (folder / name).write_bytes(b"")
    for name in flats[43:46]:  # three of 8570
        (folder / name).unlink()
    series = open_series(folder)
    assert series.scans[0].half.tolist() == [1] * ANGLES
    assert series.scans[2].flats[0].status.count("ok") == 7
    assert codes(series) == ["missing", "empty", *["missing"] * 3, "flats-replaced", "no-flats"]
    assert series.problems[-1].energy_ev == 8178


def test_flats_only_after_the_projections(tmp_path):
    for name in ("a.xrm", "b_ref_1.xrm"):
        write_xrm(tmp_path / name, np.ones(SHAPE, "u2"))
    (tmp_path / "s.txt").write_text("sete 8250\nmoveto t 0\ncollect a.xrm\ncollect b_ref_1.xrm\n")
    assert open_series(tmp_path).scans[0].half.tolist() == [0]


def test_few_angles(scan):
    folder, frames = scan
    for name in [f[0] for f in frames if not f[3] and f[2] == 8570][5:]:
        (folder / name).unlink()
    series = open_series(folder)
    assert codes(series) == ["missing", "few-angles"]
    assert series.problems[1].energy_ev == 8570


def test_angles_that_differ(scan):
    folder, frames = scan
    pixels = np.ones(SHAPE, "u2")
    first, *_ = names = [f[0] for f in frames if not f[3]]
    write_xrm(folder / first, pixels, theta_deg=-88.0)
    for name in names[ANGLES : 2 * ANGLES]:
        write_xrm(folder / name, pixels, theta_deg=0.0)
    series = open_series(folder)
    assert codes(series) == ["angle", "angle-stuck"]
    assert series.scans[0].theta_deg[0] == -88
    assert series.scans[1].theta_deg[0] == -90  # a stage that says the same at every angle is not believed
    wrapped = open_series(folder).scans[0].theta_deg
    assert wrapped[1] == pytest.approx(-82.49, abs=1e-4)


def test_missing_angle_comes_from_the_script(scan):
    folder, frames = scan
    name = next(f[0] for f in frames if not f[3])
    write_xrm(folder / name, np.ones(SHAPE, "u2"), omit=("ImageInfo/Angles", "ImageInfo/ExpTimes", "ImageInfo/Date"))
    first = open_series(folder).scans[0]
    assert (first.theta_deg[0], first.exposure_s[0]) == (-90, 0.5)
    assert np.isnan(first.time_s[0])


def test_a_name_collected_twice(tmp_path):
    write_xrm(tmp_path / "a.xrm", np.ones(SHAPE, "u2"))
    (tmp_path / "s.txt").write_text("sete 8250\nmoveto t 0\ncollect a.xrm\nmoveto t 1\ncollect a.xrm\n")
    series = open_series(tmp_path)
    assert series.scans[0].status == ("unreadable:overwritten", "ok")
    assert "overwritten" in codes(series)


def test_files_not_in_the_script(scan):
    folder, _ = scan
    write_xrm(folder / "other_08250.0_eV.xrm", np.ones(SHAPE, "u2"))
    (folder / "broken.xrm").write_bytes(b"x")
    series = open_series(folder)
    assert codes(series) == ["not-xrm", "not-in-script"]
    assert series.problems[1].severity == "info"


def test_all_energies_at_every_angle(tmp_path):
    """Angle outermost: the energies recur, and only together their blocks are tomograms."""
    lines = []
    for theta in range(12):
        lines.append(f"moveto t {theta}")
        for energy in (8178, 8570):
            lines += [f"sete {energy}", f"collect ref_{theta:05d}_{energy}.xrm", f"collect s_{theta:05d}_{energy}.xrm"]
            write_xrm(tmp_path / f"s_{theta:05d}_{energy}.xrm", np.ones(SHAPE, "u2"), theta_deg=theta)
            write_xrm(tmp_path / f"ref_{theta:05d}_{energy}.xrm", np.ones(SHAPE, "u2"), theta_deg=theta)
    (tmp_path / "s.txt").write_text("\n".join(lines))
    series = open_series(tmp_path)
    assert (series.n_expected, series.problems) == ((2, 24, 24), ())
    assert series.scans[1].theta_deg.tolist() == list(range(12))
    assert series.scans[1].half.tolist() == list(range(12))


def test_an_energy_measured_twice_stays_two(tmp_path):
    lines, _ = plan(energies=(8178,))
    (tmp_path / "s.txt").write_text("\n".join([*lines, *lines]).replace("collect rep01", "collect rep02", 44))
    series = open_series(tmp_path)
    assert tuple(series.energies_ev) == (8178, 8178)
    assert series.n_expected == (2, 48, 40)


# ------------------------------------------------------------------------------------------------ without a script


def test_two_dimensional_xanes_by_names(tmp_path):
    pixels = np.ones(SHAPE, "u2")
    for i, energy in enumerate((8330.0, 8250.0)):
        for k in range(3):
            write_xrm(tmp_path / f"rep01_s_{energy:07.1f}_eV_{k + 1:03d}of003.xrm", pixels, theta_deg=7)
            write_xrm(tmp_path / f"rep01_{10 * i + k + 1:06d}_ref_s_{energy:07.1f}_eV_{k + 1:03d}of003.xrm", pixels)
    series = open_series(tmp_path)
    assert tuple(series.energies_ev) == (8250, 8330)
    assert [len(s) for s in series.scans] == [3, 3]
    assert [len(s.flats[0].frames) for s in series.scans] == [3, 3]
    assert series.problems == ()  # no angles to miss


def test_energies_in_the_middle_of_a_scan_by_counters(tmp_path):
    """Only the last energy and half of the one before were copied."""
    frames = write_scan(tmp_path, script=False)
    for name, *_ in frames[: 44 + 22]:
        (tmp_path / name).unlink()
    series = open_series(tmp_path)
    assert tuple(series.energies_ev) == (8178, 8570)
    assert [len(s) for s in series.scans] == [12, 24]
    assert series.scans[0].flats[0].names == tuple(f[0] for f in frames[66:76])
    assert [len(f.frames) for f in series.scans[1].flats] == [10, 10]
    assert series.scans[1].half.tolist() == [0] * 12 + [1] * 12


def test_energies_from_headers(tmp_path):
    for k, energy in enumerate((8353.0, 8340.0)):
        write_xrm(tmp_path / f"image{k}.xrm", np.ones(SHAPE, "u2"), energy_ev=energy, theta_deg=3)
    assert tuple(open_series(tmp_path).energies_ev) == (8340, 8353)


def test_one_stack_per_energy(tmp_path):
    theta = np.arange(9.0)
    for energy in (8340, 8353):
        write_xrm(tmp_path / f"tomo_s_{energy:08.2f}_eV.txrm", np.ones((9, *SHAPE), "u2"), theta_deg=theta)
        write_xrm(tmp_path / f"ref_s_{energy:08.2f}_eV.txrm", np.full((3, *SHAPE), 2, "u2"))
    series = open_series(tmp_path)
    assert series.n_expected == (2, 18, 6)
    np.testing.assert_array_equal(series.scans[1].theta_deg, theta)
    assert series.scans[1].flats[0].frames.read(2).max() == 2


def test_single_files(tmp_path):
    one = tmp_path / "s_08353.0_eV.xrm"
    write_xrm(one, np.ones(SHAPE, "u2"), theta_deg=3, reference=np.full(SHAPE, 7, "u2"))
    series = open_series(one)
    assert (tuple(series.energies_ev), series.n_expected) == ((8353,), (1, 1, 1))
    assert series.scans[0].flats[0].frames.read(0).max() == 7
    write_xrm(tmp_path / "a.txrm", np.ones((4, *SHAPE), "u2"), energy_ev=[8340, 8340, 8341, 8342])
    series = open_series(tmp_path / "a.txrm")
    assert tuple(series.energies_ev) == (8340, 8341, 8342)
    assert [p.severity for p in series.problems if p.code == "no-flats"] == ["error", "info", "info"]
    one.write_bytes(one.read_bytes()[:-3000])
    with pytest.raises(XrmError):
        open_series(one)


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({}, "neither"),
        ({"readme.md": "hello"}, "neither"),
        ({"a.txt": "sete 8250\nmoveto t 0\n"}, "`collect` lines, got none"),
        ({"a.txt": "sete 1\ncollect a\n", "b.txt": "sete 1\ncollect a\n"}, r"one scan script, got 2 \(a.txt, b.txt\)"),
        ({"a.xrm": "x"}, "do not"),
    ],
)
def test_folders_that_are_no_scan(tmp_path, files, match):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(XanesTomoError, match=match) as error:
        open_series(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["gone", "a\0b", "x" * 5000, "prose.txt", "broken.xrm"])
def test_paths_that_are_no_scan(tmp_path, name):
    (tmp_path / "prose.txt").write_text("Dear all,\n")
    (tmp_path / "broken.xrm").write_text("Dear all,\n")
    with pytest.raises(XanesTomoError) as error:
        open_series(f"{tmp_path}/{name}")
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ real files


@pytest.mark.parametrize("by", ["folder", "script", "names"])
def test_real_ssrl_frames(tmp_path, by):
    """Files renamed after the scan: 12 of 806 and one cut short."""
    folder = real("ssrl_xanes")
    path = folder
    if by == "script":
        path = next(folder.glob("*_XANES.txt"))
    elif by == "names":
        for file in folder.glob("*.xrm"):
            shutil.copy(file, tmp_path / file.name)
        path = tmp_path
    series = open_series(path)
    assert tuple(series.energies_ev) == (8324, 8354)
    assert series.frame_shape == (1024, 1024)
    for scan in series.scans:
        assert scan.status == ("ok",) * 3
        assert scan.theta_deg == pytest.approx([6.97447] * 3, abs=1e-4)
        assert scan.exposure_s == pytest.approx([0.5] * 3)
        (flats,) = scan.flats
        good = [i for i, s in enumerate(flats.status) if s == "ok"]
        assert len(good) == 3
        assert flats.exposure_s[good] == pytest.approx([0.3] * 3)
        assert scan.half.tolist() == [0, 0, 0]
        assert scan.binning == 2
    truncated = [p for p in series.problems if p.code == "truncated"]
    assert [p.file[:12] for p in truncated] == ["rep02_000182"]
    if by != "names":
        assert series.n_expected == (62, 186, 620)
        assert codes(series).count("energies-missing") == 1
    assert len(series.problems) < 6
    # exposure-scaled absorbance: the scale of the exposures matters (0.3 and 0.5 s)
    first = series.scans[0]
    flat = np.mean([first.flats[0].frames.read(i) for i in range(3)], axis=0) / 0.3
    sample = np.mean([first.frames.read(i) for i in range(3)], axis=0) / 0.5
    assert np.median(-np.log(sample / flat)) == pytest.approx(1.08, abs=0.01)


def test_real_script_alone():
    series = open_series(real("tomo_00089/AC3_C4p6_3DXANES_TOMO-XANES.txt"))
    assert series.n_expected == (67, 12060, 1340)
    assert len(series.scans) == 67
    assert sum(len(x) for x in series.scans) == 12060
    assert [p.code for p in series.problems] == ["missing"]


def test_real_script_in_detail():
    blocks = parse_script(real("tomo_00089/AC3_C4p6_3DXANES_TOMO-XANES.txt").read_text())
    assert len(blocks) == 67
    for block in blocks:
        assert "".join(f.kind[0] for f in block.frames) == "f" * 10 + "p" * 90 + "f" * 10 + "p" * 90
        assert [f.theta_deg for f in block.frames if f.kind == "projection"] == list(range(-90, 90))
        assert {(f.exposure_s, f.binning) for f in block.frames} == {(0.5, 2)}


def test_real_header_speaks_for_aps_and_stack():
    series = open_series(real("aps/fov03_xanessoc01_8353_0eV.xrm"))
    assert tuple(series.energies_ev) == (8353,)
    series = open_series(real("other/txrm_test_chip_tomo.txrm"))
    assert len(series.scans[0]) == 7
    assert series.scans[0].theta_deg[-1] == pytest.approx(44.986, abs=1e-3)
    assert read_header(real("other/txrm_test_chip_tomo.txrm")).n_images == 7


@pytest.mark.parametrize(
    ("line", "theta"),
    [
        ("moveto t -90.00", -90.0),
        ("moveto t -90.00 ; first angle", -90.0),
        ("moveto t -90.00;first angle", -90.0),
        ("MOVETO\tT\t-90.00", -90.0),
        ("  moveto   t   -90.00  ", -90.0),
        ("moveto t", np.nan),
    ],
)
def test_white_space_and_comments_in_a_script(line, theta):
    text = f"sete\t8570.00 ;; eV\nsetexp 0.5;s\nsetbinning\t2\n{line}\ncollect\ta.xrm ; the frame\n"
    (block,) = parse_script(text)
    (frame,) = block.frames
    assert block.energy_ev == 8570
    assert frame.name == "a.xrm"
    assert (frame.exposure_s, frame.binning) == (0.5, 2)
    np.testing.assert_equal(frame.theta_deg, theta)


@pytest.mark.parametrize("verify", [True, False])
def test_a_link_out_of_the_folder_is_not_followed(tmp_path, verify):
    inside, outside = tmp_path / "scan", tmp_path / "elsewhere"
    inside.mkdir()
    outside.mkdir()
    write_scan(inside)
    series = open_series(inside)
    moved, kept = series.scans[1].names[3], series.scans[1].names[4]
    (inside / moved).rename(outside / moved)
    (inside / moved).symlink_to(outside / moved)
    (inside / kept).rename(inside / "frame.bin")
    (inside / kept).symlink_to("frame.bin")  # a link that stays inside is as good as the file
    series = open_series(inside, verify=verify)
    assert series.scans[1].status[3] == "unreadable:link-out"
    assert series.scans[1].status[4] == "ok"
    assert sum(s == "ok" for s in series.scans[1].status) == ANGLES - 1
    (problem,) = [p for p in series.problems if p.code == "link-out"]
    assert problem.file == moved
    assert "not followed" in problem.message


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names on this platform")
def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "notes.txt")
    assert not is_scan_folder(tmp_path)
    assert not is_scan_script(tmp_path / "notes.txt")
    with pytest.raises(XanesTomoError, match="pipe"):
        open_series(tmp_path / "notes.txt")
    os.mkfifo(tmp_path / "rep01_00000_a_0000.00_Degree_08570.00_eV_001of001.xrm")
    with pytest.raises(XrmError, match="pipe") as found:
        read_header(tmp_path / "rep01_00000_a_0000.00_Degree_08570.00_eV_001of001.xrm")
    assert found.value.reason == "unreadable"
