"""Where frames come from besides a plain script, and frames that are there twice or under odd names."""

import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from napari_xanes_tomo.io.scan import open_series
from napari_xanes_tomo.io.script import decode, parse_scan_info, parse_script, text_kind
from napari_xanes_tomo.io.xrm import read_header, shown, write_xrm
from napari_xanes_tomo.model import XanesTomoError

SHAPE = (12, 16)
ANGLES = 20
RNG = np.random.default_rng(4)


def pixels(*shape):
    return RNG.integers(1, 3000, (*shape, *SHAPE)).astype("u2")


def tomography(folder, energies=(8178, 8570), flats=3, date=1e9, energy_in_flats=False):
    """Write flats, first half, flats, second half at every energy; return (name, theta, energy, kind) in that order."""
    frames, counter, reference, previous = [], 0, 0, 0.0
    for energy in energies:
        for half in range(2):
            for k in range(flats):
                ev = f"_{energy:08.2f}_eV" if energy_in_flats else ""
                name = f"rep01_ref_{reference:05d}_s_{previous:07.2f}_Degree{ev}_{k + 1:03d}of{flats:03d}.xrm"
                reference += 1
                frames.append((name, previous, energy, "flat"))
            for a in range(half * ANGLES // 2, (half + 1) * ANGLES // 2):
                theta = -90 + 9.0 * a
                name = f"rep01_{counter:05d}_s_{theta:07.2f}_Degree_{energy:08.2f}_eV_001of001.xrm"
                counter += 1
                frames.append((name, theta, energy, "projection"))
                previous = theta
    for i, (name, theta, _, _) in enumerate(frames):
        write_xrm(folder / name, pixels(), theta_deg=theta, date=date + i if date else 0.0, exposure_s=0.5)
    return frames


def script_of(frames):
    lines, energy = ["setexp 0.5", "setbinning 2"], None
    for name, theta, ev, kind in frames:
        lines += [f"sete {ev}"] if ev != energy else []
        lines += [f"moveto t {theta}"] if kind == "projection" else []
        lines.append(f"collect {name}")
        energy = ev
    return "\r\n".join(lines) + "\r\n"


def scan_info(names, **settings):
    head = {"VERSION": 1, "ENERGY": 1, "TOMO": 2, "MOSAIC": 0, "MULTIEXPOSURE": 4, "NREPEATSCAN": 1, "NEXPOSURES": 1}
    lines = [f"{key}   {value}" for key, value in (head | settings).items()]
    return ("\r\n".join([*lines, "FILES", *names]) + "\r\n").encode()


def halves(scan):
    return [int(np.sum(scan.half == k)) for k in range(len(scan.flats))]


# ---------------------------------------------------------------------------------------------- ScanInfo files


@pytest.mark.parametrize("by", ["file", "folder"])
def test_scan_info_instead_of_a_script(tmp_path, by):
    """Flats without an energy in their names belong to the energy that follows them."""
    frames = tomography(tmp_path, date=0)
    (tmp_path / "ScanInfo_s.txt").write_bytes(scan_info([f[0] for f in frames]))
    series = open_series(tmp_path / "ScanInfo_s.txt" if by == "file" else tmp_path)
    assert (tuple(series.energies_ev), series.n_expected, series.problems) == ((8178, 8570), (2, 40, 12), ())
    for scan in series.scans:
        own = [f for f in frames if f[2] == scan.energy_ev]
        assert scan.names == tuple(f[0] for f in own if f[3] == "projection")
        assert [n for s in scan.flats for n in s.names] == [f[0] for f in own if f[3] == "flat"]
        assert halves(scan) == [10, 10]


def test_scan_info_beside_a_script_is_left_alone(tmp_path):
    frames = tomography(tmp_path)
    (tmp_path / "ScanInfo_s.txt").write_bytes(scan_info([f[0] for f in frames[:5]]))
    (tmp_path / "s.txt").write_text(script_of(frames))
    series = open_series(tmp_path)
    assert (series.name, series.problems, series.n_expected) == ("s", (), (2, 40, 12))


def test_what_a_scan_info_says():
    names = ["a_08250.0_eV_001of002", "a_08250.0_eV_002of002.xrm", "ref_a_08250.0_eV_001of001.xrm", "a_08265.0_eV.xrm"]
    info = parse_scan_info(scan_info(names, MOSAICOVERLAP=0.2, TOMO=0, NEXPOSURES=2).decode())
    assert (info.settings["NEXPOSURES"], info.settings["MOSAICOVERLAP"]) == (2, 0.2)
    assert info.loops == ("energy", "multiexposure")
    assert [(b.energy_ev, [f.kind[0] for f in b.frames]) for b in info.blocks] == [
        (8250, ["p", "p", "f"]),
        (8265, ["p"]),
    ]
    assert info.blocks[0].frames[0].name == "a_08250.0_eV_001of002.xrm"
    assert parse_scan_info("VERSION 1\nENERGY 1\n").blocks == ()
    with pytest.raises(XanesTomoError, match="plain name"):
        parse_scan_info("VERSION 1\nFILES\n../a.xrm\n")


def test_scan_info_without_names(tmp_path):
    (tmp_path / "i.txt").write_bytes(scan_info([]))
    with pytest.raises(XanesTomoError, match="below its line FILES"):
        open_series(tmp_path / "i.txt")


def test_real_scan_info_agrees_with_the_script(data_dir):
    folder = data_dir / "ssrl_xanes"
    info = parse_scan_info(next(folder.glob("ScanInfo_*")).read_text())
    script = parse_script(next(folder.glob("*_XANES.txt")).read_text())
    assert [(b.energy_ev, [f.name for f in b.frames]) for b in info.blocks] == [
        (b.energy_ev, [f.name for f in b.frames]) for b in script
    ]
    assert info.loops == ("energy", "multiexposure")
    assert (info.settings["REFNEXPOSURES"], info.settings["REFABBA"], len(info.blocks)) == (10, 1, 62)


def test_real_aps_script(data_dir):
    """No `sete`: energies by ``moveto energy``, in a script that also moves the energy without collecting."""
    path = data_dir / "aps" / "aps_script.txt"
    assert text_kind(path) == "script"
    blocks = parse_script(path.read_text())
    energies = [b.energy_ev for b in blocks]
    assert (energies[0], energies[-1], len(blocks)) == (8250, 8640, len(set(energies)))
    for block in blocks:
        assert {f.kind for f in block.frames} == {"projection", "flat"}
        assert {(f.exposure_s, f.binning) for f in block.frames} == {(30, 1)}
        assert all(f"_{block.energy_ev:.0f}_0eV" in f.name for f in block.frames)


# ---------------------------------------------------------------------------------------------- the order of things


@pytest.mark.parametrize("first", ["flats", "projections"])
def test_energies_from_names_only(first):
    """A script that never sets the energy; a repeat of the same energy stays a block of its own."""
    lines = []
    for rep in (1, 2):
        for ev in (8250, 8270):
            flats = [f"collect rep{rep:02d}_ref_{k:05d}_s_001of002" for k in range(2)]
            shots = [f"collect rep{rep:02d}_s_{ev}_0eV_{k + 1:03d}of002" for k in range(2)]
            lines += flats + shots if first == "flats" else shots + flats
    blocks = parse_script("\n".join(lines))
    assert [b.energy_ev for b in blocks] == [8250, 8270, 8250, 8270]
    order = "ffpp" if first == "flats" else "ppff"
    assert ["".join(f.kind[0] for f in b.frames) for b in blocks] == [order] * 4


@pytest.mark.parametrize("known", ["times", "counters", "counters, flats with energies"])
def test_flats_without_a_script_do_not_go_by_the_angle_in_their_names(tmp_path, known):
    frames = tomography(tmp_path, date=1e9 if known == "times" else 0, energy_in_flats="with" in known)
    for name, _, _, kind in frames:
        if kind == "flat":
            left, _, right = name.partition("_Degree")
            (tmp_path / name).rename(tmp_path / f"{left[:-7]}0077.00_Degree{right}")
    scans = open_series(tmp_path).scans
    for scan in scans:
        assert [len(s.names) for s in scan.flats] == [3, 3]
        assert halves(scan) == [10, 10]
    assert [n[10:15] for s in scans for f in s.flats for n in f.names] == [f"{k:05d}" for k in range(12)]


def test_several_exposures_a_point_and_repeats(tmp_path):
    """Three exposures at every angle and two repeats: nothing of it is taken for a second file."""
    for rep in (1, 2):
        for a in range(12):
            for k in range(3):
                name = f"rep{rep:02d}_s_{a * 10:07.2f}_Degree_08353.00_eV_{k + 1:03d}of003.xrm"
                write_xrm(tmp_path / name, pixels(), theta_deg=a * 10, date=1e9 + 1000 * rep + 10 * a + k)
    series = open_series(tmp_path)
    assert tuple(series.energies_ev) == (8353, 8353)
    assert [p.code for p in series.problems] == ["no-flats"] * 2
    for scan in series.scans:
        assert scan.theta_deg.tolist() == np.repeat(np.arange(12) * 10.0, 3).tolist()
        assert set(scan.status) == {"ok"}


def test_two_dimensional_xanes_by_script_has_no_angles_to_miss(tmp_path):
    lines = []
    for energy in (8330, 8340, 8350):
        lines.append(f"sete {energy}")
        for k in range(3):
            for kind in ("ref_s", "s"):
                name = f"rep01_{kind}_{energy:07.1f}_eV_{k + 1:03d}of003.xrm"
                write_xrm(tmp_path / name, pixels(), theta_deg=6.97, date=1e9 + energy + k)
                lines.append(f"collect {name}")
    (tmp_path / "s.txt").write_text("\n".join(lines))
    series = open_series(tmp_path)
    assert (series.problems, series.n_expected) == ((), (3, 9, 9))


# ---------------------------------------------------------------------------------------------- stacks


@pytest.mark.parametrize("verify", [True, False])
def test_a_script_that_collects_one_stack_an_energy(tmp_path, verify):
    theta = np.linspace(-90, 80, 18)
    lines = []
    for energy in (8340, 8353):
        write_xrm(tmp_path / f"tomo_s_{energy}.txrm", pixels(18), theta_deg=theta, exposure_s=0.5)
        write_xrm(tmp_path / f"ref_s_{energy}.txrm", pixels(4), exposure_s=0.3)
        lines += [f"sete {energy}", f"collect ref_s_{energy}.txrm", "moveto t -90", f"collect tomo_s_{energy}.txrm"]
    (tmp_path / "s.txt").write_text("\n".join(lines))
    series = open_series(tmp_path, verify=verify)
    assert (series.n_expected, series.problems) == ((2, 36, 8), ())
    if verify:
        np.testing.assert_allclose(series.scans[1].theta_deg, theta, atol=1e-4)
        assert series.scans[1].flats[0].exposure_s == pytest.approx(0.3)
    np.testing.assert_array_equal(series.scans[1].frames.numbers, np.arange(1, 19))


def test_stacks_that_carry_their_reference(tmp_path):
    for energy in (8340, 8353):
        write_xrm(
            tmp_path / f"tomo_s_{energy:08.2f}_eV.txrm",
            pixels(12),
            theta_deg=np.arange(12.0) * 15,
            reference=np.full(SHAPE, energy, "u2"),
        )
    series = open_series(tmp_path)
    assert series.problems == ()
    assert [int(s.flats[0].frames.read(0).max()) for s in series.scans] == [8340, 8353]


def test_frames_that_carry_their_reference(tmp_path):
    for a in range(12):
        write_xrm(
            tmp_path / f"s_{a:05d}_{a * 15:07.2f}_Degree_08353.00_eV.xrm",
            pixels(),
            theta_deg=a * 15,
            date=1e9 + a,
            reference=np.full(SHAPE, 100 + a, "u2"),
        )
    (scan,) = open_series(tmp_path).scans
    own = [int(s.frames.read(0).max()) for s in scan.flats]
    assert len(own) == 8
    assert (own[0], own[-1]) == (100, 111)
    assert [own[h] <= 100 + a for a, h in enumerate(scan.half)] == [True] * 12


# ---------------------------------------------------------------------------------------------- energies


def test_measured_energies_of_one_point_scatter(tmp_path):
    """Without a script or energies in the names; the monochromator's reading scatters by hundredths of an eV."""
    rng = np.random.default_rng(0)
    for k in range(12):
        energy = (8340, 8340.5, 8353)[k % 3] + rng.uniform(-0.02, 0.02)
        write_xrm(tmp_path / f"image{k:03d}.xrm", pixels(), energy_ev=energy, theta_deg=7, date=1e9 + k)
    series = open_series(tmp_path)
    assert series.energies_ev == pytest.approx([8340, 8340.5, 8353], abs=0.03)
    assert [len(s) for s in series.scans] == [4, 4, 4]


def test_a_script_without_energies_takes_those_of_the_headers(tmp_path):
    lines = ["setexp 1"]
    for energy in (8340, 8353):
        for name in (f"ref_{energy % 7}.xrm", *(f"s{energy % 7}_{k}.xrm" for k in range(3))):
            write_xrm(tmp_path / name, pixels(), energy_ev=energy + 0.03, theta_deg=7)
            lines.append(f"collect {name}")
    (tmp_path / "s.txt").write_text("\n".join(lines))
    series = open_series(tmp_path)
    assert series.energies_ev == pytest.approx([8340.03, 8353.03], abs=0.01)
    assert [len(s) for s in series.scans] == [3, 3]
    assert [s.flats[0].names for s in series.scans] == [("ref_3.xrm",), ("ref_2.xrm",)]


def test_script_name_and_header_disagree_about_the_energy(tmp_path):
    write_xrm(tmp_path / "s_08360.0_eV.xrm", pixels(), energy_ev=8353.03)
    (tmp_path / "s.txt").write_text("setexp 1\nsete 8353\ncollect s_08360.0_eV.xrm\n")
    series = open_series(tmp_path)
    assert tuple(series.energies_ev) == (8353,)
    (problem,) = [p for p in series.problems if p.code == "energy"]
    assert (problem.severity, problem.file) == ("warning", "s_08360.0_eV.xrm")
    assert "8360" in problem.message
    write_xrm(tmp_path / "s_08360.0_eV.xrm", pixels(), energy_ev=8341.0)
    messages = [p.message for p in open_series(tmp_path).problems if p.code == "energy"]
    assert len(messages) == 2
    assert "headers" in messages[1]


# ---------------------------------------------------------------------------------------------- times


def test_both_clocks_are_kept(tmp_path):
    """The date (local, seconds) and the clock of the container (UTC, milliseconds); one stands in for the other."""
    lines = ["setexp 1", "sete 8353"]
    for k in range(9):
        options = {"omit": ("ImageInfo/Date",)} if k == 4 else {}
        name = f"s{k}.xrm"
        write_xrm(tmp_path / name, pixels(), theta_deg=k * 10, date=1.5e9 + 2 * k + 0.25, **options)
        raw = (tmp_path / name).read_bytes()
        if k != 4:  # as at SSRL: the date is local, whole seconds, seven hours behind
            at = raw.index(b"07/14/17 02:40")
            hours = raw[at : at + 17].replace(b" 02:", b" 19:").replace(b"/14/", b"/13/")
            (tmp_path / name).write_bytes(raw.replace(raw[at : at + 17], hours))
        lines += [f"moveto t {k * 10}", f"collect {name}"]
    (tmp_path / "s.txt").write_text("\n".join(lines))
    (scan,) = open_series(tmp_path).scans
    np.testing.assert_allclose(scan.written_s, 1.5e9 + 2 * np.arange(9) + 0.25, atol=1e-4)
    np.testing.assert_allclose(scan.time_s, 1.5e9 + 2 * np.arange(9) - 7 * 3600, atol=0.5)


def test_real_frames_have_both_clocks(data_dir):
    scan = open_series(data_dir / "ssrl_xanes").scans[0]
    seconds = scan.written_s - scan.time_s
    np.testing.assert_allclose(seconds, 7 * 3600, atol=1)
    assert scan.written_s[0] % 1 == pytest.approx(0.373, abs=1e-3)


# ---------------------------------------------------------------------------------------------- twice


def outcome(series):
    return {n: s for scan in series.scans for n, s in zip(scan.names, scan.status, strict=True) if s != "ok"}


@pytest.mark.parametrize("by", ["script", "names"])
def test_a_frame_copied_over_its_neighbour(tmp_path, by):
    frames = tomography(tmp_path)
    first, second = frames[5][0], frames[6][0]
    shutil.copy(tmp_path / first, tmp_path / second)
    if by == "script":
        (tmp_path / "s.txt").write_text(script_of(frames))
    series = open_series(tmp_path)
    assert outcome(series) == {second: "excluded:duplicate"}
    (problem,) = [p for p in series.problems if p.code == "duplicate"]
    assert (problem.file, problem.frame, problem.energy_ev, problem.severity) == (second, 3, 8178, "warning")
    assert first in problem.message


def test_a_flat_copied_over_another(tmp_path):
    frames = tomography(tmp_path)
    shutil.copy(tmp_path / frames[0][0], tmp_path / frames[1][0])
    scan = open_series(tmp_path).scans[0]
    assert scan.flats[0].status == ("ok", "excluded:duplicate", "ok")


def test_the_same_bytes_under_two_names(tmp_path):
    """In a folder without a script: the file that bears the name it was acquired under stays."""
    frames = tomography(tmp_path)
    own = frames[5][0]
    copied = own.replace("_001of001", "_001of001 (1)")
    shutil.copy(tmp_path / own, tmp_path / copied)
    series = open_series(tmp_path)
    assert outcome(series) == {copied: "excluded:duplicate"}
    assert len(series.scans[0]) == ANGLES + 1


def test_equal_headers_are_no_copies(tmp_path):
    """Files without any clock may agree in all they say; only equal pixels make a copy, and black ones do not."""
    frames = tomography(tmp_path, date=0)
    assert outcome(open_series(tmp_path)) == {}
    for name, *_ in frames[:3]:
        write_xrm(tmp_path / name, np.zeros(SHAPE, "u2"), theta_deg=3)
    assert outcome(open_series(tmp_path)) == {}


def test_two_files_for_one_angle(tmp_path):
    frames = tomography(tmp_path)
    name = frames[5][0]
    again = name.replace("rep01_00002_", "rep01_00002_again_")
    write_xrm(tmp_path / again, pixels(), theta_deg=frames[5][1], date=2e9)
    series = open_series(tmp_path)
    assert outcome(series) == {again: "excluded:same-angle"}
    (problem,) = [p for p in series.problems if p.code == "same-angle"]
    assert name in problem.message
    (tmp_path / name).write_bytes(b"")  # the first one is gone: the second is all there is
    assert outcome(open_series(tmp_path)) == {name: "unreadable:empty"}


# ---------------------------------------------------------------------------------------------- odd names


def test_text_of_a_script():
    assert decode("collect été".encode()) == decode("collect été".encode("cp1252")) == "collect été"
    assert decode("collect été".encode("utf-16")) == decode("collect été".encode("utf-8-sig")) == "collect été"
    decode(bytes(range(256)))


@pytest.mark.parametrize(("script", "disk"), [("cp1252", "utf-8"), ("utf-8", "cp1252"), ("utf-8", "NFD")])
def test_names_with_accents(tmp_path, script, disk):
    """The instrument's Windows writes cp1252; the copy may bear the same name in other bytes."""
    import unicodedata

    name = "é_µm_08353.00_eV.xrm"
    raw = unicodedata.normalize("NFD", name).encode() if disk == "NFD" else name.encode(disk)
    write_xrm(tmp_path / "plain.xrm", pixels(), theta_deg=3)
    try:
        os.rename(os.fsencode(tmp_path / "plain.xrm"), os.fsencode(tmp_path) + b"/" + raw)  # noqa: PTH104
    except OSError:
        pytest.skip("this file system has no such names")
    for with_script in (True, False):
        if with_script:
            (tmp_path / "s.txt").write_bytes(f"setexp 1\nsete 8353\ncollect {name}\n".encode(script))
        else:
            (tmp_path / "s.txt").unlink()
        series = open_series(tmp_path)
        assert [p.code for p in series.problems] == ["no-flats"]
        assert series.scans[0].frames.read(0).shape == SHAPE
        "".join((*series.scans[0].names, *(p.file + p.message for p in series.problems))).encode()


def test_what_is_shown_of_a_name():
    assert shown("a_8353_eV.xrm") == "a_8353_eV.xrm"
    assert shown(os.fsdecode(b"\xb5m.xrm")) == "µm.xrm"
    assert shown("a\nb\0c\ud800.xrm") == "a?b?c?.xrm"


def test_an_unreadable_name_is_one_line_of_plain_text(tmp_path):
    frames = tomography(tmp_path)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xe9\nname_08570.00_eV.xrm")).write_bytes(b"")
    series = open_series(tmp_path)
    (problem,) = [p for p in series.problems if p.code == "empty"]
    assert problem.file == "badé?name_08570.00_eV.xrm"
    assert "\n" not in problem.message
    assert len(series.scans[0]) == len([f for f in frames if f[2] == 8178 and f[3] == "projection"])


# ---------------------------------------------------------------------------------------------- laws

WORDS = st.sampled_from(
    ("collect", "sete", "moveto", "setexp", "energy", "t", "zpz", "8353.0", "a_08353.0_eV", "ref_a.xrm", ";", "nan")
)
TEXT = st.lists(st.lists(st.one_of(WORDS, st.text(max_size=12)), max_size=5).map(" ".join), max_size=30).map("\n".join)


@settings(max_examples=300, deadline=None)
@given(TEXT)
def test_no_text_is_too_strange(text):
    """Blocks, or the one refusal of a name that leads out of the folder."""
    for parse in (parse_script, lambda t: parse_scan_info(t).blocks):
        try:
            blocks = parse(text)
        except XanesTomoError:
            assert any(sign in text for sign in "/\\:.\0")
            continue
        for block in blocks:
            assert block.frames
            assert not any(sign in f.name for f in block.frames for sign in "/\\:")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_no_bytes_are_too_strange(tmp_path, raw):
    (tmp_path / "s.txt").write_bytes(raw)
    text_kind(tmp_path / "s.txt")
    try:
        parse_script(decode(raw))
    except XanesTomoError:
        assert any(sign in raw for sign in b"/\\:.")


NAMES = st.from_regex(r"[a-z][a-zA-Z0-9.()+-]{0,20}(_[a-zA-Z0-9]{1,6}){0,3}", fullmatch=True)
NUMBERS = st.integers(-36000, 36000).map(lambda v: v / 100)
SCRIPTS = st.lists(
    st.tuples(
        st.integers(400000, 1500000).map(lambda v: v / 100),
        st.lists(
            st.tuples(NAMES, st.booleans(), NUMBERS, st.integers(1, 999).map(lambda v: v / 100), st.integers(1, 16)),
            min_size=1,
            max_size=6,
        ),
    ),
    max_size=5,
)


@settings(max_examples=150, deadline=None)
@given(SCRIPTS, st.sampled_from(["ssrl", "aps"]), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_a_script_written_is_read_back(plan, dialect, end, upper):
    """Every block, frame, angle, exposure and binning, whatever the dialect and case, unknown verbs between them."""
    lines = [";; made by a test", "wait 3"]
    for energy, frames in plan:
        lines.append(f"sete {energy:.2f}" if dialect == "ssrl" else f"moveto energy {energy:.2f}")
        for name, flat, theta, exposure, binning in frames:
            lines += [f"setexp {exposure:.2f}", f"setbinning {binning}", f"moveto T {theta:.2f}", "moveto detx 3.5"]
            lines.append(f"collect {'ref_' if flat else ''}{name}")
    if upper:
        lines = [line if line.startswith("collect") else line.upper() for line in lines]
    blocks = parse_script(end.join(lines))
    assert [b.energy_ev for b in blocks] == [energy for energy, _ in plan]
    for block, (_, frames) in zip(blocks, plan, strict=True):
        for found, (name, flat, theta, exposure, binning) in zip(block.frames, frames, strict=True):
            wanted = ("ref_" if flat else "") + name
            assert found.name == (wanted if wanted.endswith(".xrm") else wanted + ".xrm")
            assert (found.kind == "flat") or not flat
            assert (found.theta_deg, found.exposure_s, found.binning) == (theta, exposure, binning)


def test_a_header_energy_of_uninitialised_memory_is_ignored(tmp_path):
    write_xrm(tmp_path / "s_08353.00_eV.xrm", pixels(), extra={"ImageInfo/Energy": struct.pack("<f", np.inf)})
    assert np.isnan(read_header(tmp_path / "s_08353.00_eV.xrm").energies_ev[0])
    assert tuple(open_series(tmp_path).energies_ev) == (8353,)
