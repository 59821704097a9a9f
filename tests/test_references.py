"""Readers of reference spectra: what is in the file, whatever wrote it, and one line for everything else."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from napari_xanes_tomo.io import references
from napari_xanes_tomo.io.references import read_reference, read_references
from napari_xanes_tomo.mapping import read_recipe_references
from napari_xanes_tomo.model import XanesTomoError
from napari_xanes_tomo.phantom import ni_xanes
from napari_xanes_tomo.recipe import MapsParameters

ENERGY = np.arange(8200.0, 8500.0, 5.0)
MU = 0.2 + ni_xanes(ENERGY)

XDI = """# XDI/1.0 GSE/1.0
# Column.1: energy eV
# Column.2: i0
# Column.3: itrans
# Element.symbol: Ni
# Sample.name: NiO pellet
#///
# energy i0 itrans
"""


def rows(*columns: np.ndarray, separator: str = " ") -> str:
    return "\n".join(separator.join(f"{v:.9g}" for v in row) for row in zip(*columns, strict=True)) + "\n"


def project(*groups: tuple[str, np.ndarray, np.ndarray], **extra: str) -> str:
    """An Athena project as Demeter writes it."""
    text = "# Athena project file -- Demeter version 0.9.26\n# Please see the documentation.\n\n"
    for k, (label, x, y) in enumerate(groups):
        args = {"label": label.replace("'", "\\'"), "datatype": "xmu", "bkg_eshift": "0", "bkg_e0": "8345", **extra}
        pairs = ",".join(f"'{a}','{b}'" for a, b in args.items())
        text += f"$old_group = 'g{k}';\n@args = ({pairs});\n"
        for name, values in (("x", x), ("y", y)):
            numbers = ",".join(f"'{v!r}'" for v in values.tolist())
            text += f"@{name} = ({numbers});\n"
        text += "[record]   # create object and save to project\n\n"
    return text + "@journal = {};\n\n1;\n\n# Local Variables:\n# End:\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "energy;mu\n" + rows(ENERGY, MU, separator=";")),
        ("a.csv", "energy (eV);mu\n" + rows(ENERGY, MU, separator=";")),
        ("a.csv", "mu,energy\n" + rows(MU, ENERGY, separator=",")),
        ("a.txt", rows(ENERGY, MU)),
        ("a.dat", "# a comment\n% another\n" + rows(ENERGY, MU, separator="\t")),
        ("a.dat", rows(ENERGY / 1000, MU)),  # keV
        ("a.dat", rows(ENERGY[::-1], MU[::-1])),
        ("a.xdi", XDI + rows(ENERGY, np.full(len(MU), 1e5), 1e5 * np.exp(-MU))),
        ("a.xdi", XDI.replace("itrans", "ifluor") + rows(ENERGY, np.full(len(MU), 1e5), 1e5 * MU)),
        ("a.nor", "# e norm nbkg flat\n" + rows(ENERGY, MU, 0 * MU, MU)),
        ("a.csv", "\ufeffenergy,xmu\r\n" + rows(ENERGY, MU, separator=",").replace("\n", "\r\n")),
        ("a.csv", "energy,mu\n" + rows(ENERGY, MU, separator=",")),
        ("a.prj", project(("NiO", ENERGY, MU))),
    ],
)
def test_what_is_in_the_file(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    found = read_reference(tmp_path / name)
    np.testing.assert_allclose(found.energy_ev, ENERGY, rtol=1e-7)
    np.testing.assert_allclose(found.absorption, MU, rtol=1e-6)
    assert found.source == name
    assert found.valence is None


def test_an_xdi_file_names_its_sample(tmp_path: Path) -> None:
    (tmp_path / "a.xdi").write_text(XDI + rows(ENERGY, np.ones(len(MU)), np.exp(-MU)))
    assert read_reference(tmp_path / "a.xdi").name == "NiO pellet"


@pytest.mark.parametrize("packed", [False, True])
def test_an_athena_project(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / "set.prj"
    text = project(("NiO", ENERGY, MU), ("L'NO", ENERGY + 1, 2 * MU))
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    assert [r.name for r in read_references(path)] == ["NiO", "L'NO"]
    np.testing.assert_allclose(read_reference(path, "L'NO").absorption, 2 * MU)
    np.testing.assert_allclose(read_reference(path, "nio").energy_ev, ENERGY)
    with pytest.raises(XanesTomoError, match="expected one spectrum, got 2"):
        read_reference(path)
    with pytest.raises(XanesTomoError, match="expected a spectrum 'Fe', got NiO"):
        read_reference(path, "Fe")


def test_the_energy_shift_set_in_athena_is_applied(tmp_path: Path) -> None:
    (tmp_path / "a.prj").write_text(project(("NiO", ENERGY, MU), bkg_eshift="-1.5"))
    np.testing.assert_allclose(read_reference(tmp_path / "a.prj").energy_ev, ENERGY - 1.5)


def test_groups_that_are_no_spectra_are_left_out(tmp_path: Path) -> None:
    text = project(("k", ENERGY, MU), datatype="chi") + project(("good", ENERGY, MU)) + project(("n", ENERGY, MU[:-1]))
    (tmp_path / "a.prj").write_text(text)
    assert [r.name for r in read_references(tmp_path / "a.prj")] == ["good"]


def test_nothing_in_a_project_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "run"
    bad = [f"system('touch {mark}')", f"__import__('os').system('touch {mark}')", "`touch run`"]
    text = "# Athena project file\n" + "".join(f"@x = ({b});\n@y = ({b});\n@args = ({b});\n[record]\n" for b in bad)
    (tmp_path / "a.prj").write_text(text)
    with pytest.raises(XanesTomoError, match="got none"):
        read_references(tmp_path / "a.prj")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("a.csv", b"", "columns of energy and absorption"),
        ("a.csv", b"energy,mu\n1,2\n", "columns of energy and absorption"),
        ("a.csv", b"\x00\xff" * 2000, "columns of energy and absorption"),
        ("a.csv", rows(ENERGY).encode(), "columns of energy and absorption"),
        ("a.csv", rows(ENERGY, 0 * MU + 1).encode(), "no change"),
        ("a.csv", rows(ENERGY * 1e5, MU).encode(), "energies in eV"),
        ("a.csv", ("energy,foo,bar\n" + rows(ENERGY, MU, MU, separator=",")).encode(), "column of absorption"),
        ("a.csv", ("angle,mu\n" + rows(ENERGY, MU, separator=",")).encode(), "got angles"),
        (
            "a.csv",
            rows(ENERGY, MU * np.nan).encode(),
            "a.csv, line 1: expected an energy and its absorption, got no number",
        ),
        (
            "a.csv",
            b"energy,mu\n" + rows(ENERGY, MU, separator=",").encode() + b"8600,nan\n",
            f"a.csv, line {len(ENERGY) + 2}:",
        ),
        ("a.prj", b"# Athena project file\n", "got none"),
        ("a.prj", b"\x1f\x8b" + b"broken" * 20, "cannot be read"),
        ("a.prj", gzip.compress(b"x" * 1000, mtime=0)[:-20], "cannot be read"),
    ],
)
def test_what_is_no_spectrum_is_one_line(tmp_path: Path, name: str, data: bytes, why: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(XanesTomoError, match=why) as error:
        read_references(tmp_path / name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_not_a_file_is_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "none.csv", tmp_path, tmp_path / "pipe"):
        with pytest.raises(XanesTomoError, match="expected the file of a reference spectrum"):
            read_references(path)


@pytest.mark.parametrize("packed", [False, True])
def test_size_is_bounded(tmp_path: Path, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "MOST_BYTES", 100_000)
    data = b"0" * 20_000_000
    (tmp_path / "a.prj").write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(XanesTomoError, match="got more than"):
        read_references(tmp_path / "a.prj")


@given(st.binary(max_size=300) | st.text(alphabet="0123456789.,;# \n@xy=()'[]record", max_size=300).map(str.encode))
@example(b"@x = ('1');\n@y = ('1');\n[record]\n")
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_give_a_spectrum_or_one_line(tmp_path: Path, data: bytes) -> None:
    for name in ("a.csv", "a.prj"):
        (tmp_path / name).write_bytes(data)
        try:
            found = read_references(tmp_path / name)
        except XanesTomoError:
            continue
        for spectrum in found:
            assert np.all(np.diff(spectrum.energy_ev) > 0)
            assert np.isfinite(spectrum.absorption).all()


def test_a_reference_that_cannot_be_read_leaves_its_maps_out(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(rows(ENERGY, MU))
    good, missing = f"good={tmp_path / 'a.csv'} valence=2", f"bad={tmp_path / 'none.csv'} valence=3"
    found, absent = read_recipe_references(MapsParameters(references=(good,)))
    assert [(r.name, r.valence) for r in found] == [("good", 2.0)]
    assert absent == {}
    found, absent = read_recipe_references(MapsParameters(references=(good, missing)))
    assert found == ()
    assert set(absent) == {"lcf_good", "lcf_bad", "valence"}
    assert all("none.csv" in why for why in absent.values())
