"""What napari is given: lazy frames, their place and text, alignment applied; no OpenGL needed."""

from __future__ import annotations

import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from napari_xanes_tomo.absorbance import normalise
from napari_xanes_tomo.io.given import given_kind, open_given
from napari_xanes_tomo.io.scan import open_series
from napari_xanes_tomo.io.stack import FrameStack, lazy_frames
from napari_xanes_tomo.io.store import MapSpec, MapStore
from napari_xanes_tomo.model import Alignment, Series, XanesTomoError
from napari_xanes_tomo.recipe import AbsorbanceParameters, GivenParameters

pytest.importorskip("napari")

from napari.components import ViewerModel
from napari.utils.notifications import notification_manager

from napari_xanes_tomo._napari.layers import (
    METADATA_KEY,
    AlignedStack,
    ScanLayer,
    geometry,
    map_layers,
    scan_layer,
    scan_of,
    spread_limits,
)
from napari_xanes_tomo._napari.overlay import attach_overlay, frame_at, go_to
from napari_xanes_tomo._napari.reader import get_reader, read_scan


def script_of(folder: Path) -> Path:
    return next(p for p in folder.glob("*.txt"))


@pytest.fixture(scope="module")
def series(tiny_twin: Path) -> Series:
    return open_series(tiny_twin)


@pytest.fixture
def broken(tiny_twin: Path, tmp_path: Path) -> Path:
    """The twin with one frame missing, one cut and one energy gone."""
    folder = tmp_path / "broken"
    shutil.copytree(tiny_twin, folder)
    first = sorted(folder.glob("rep01_*_06534.00_eV*.xrm"))
    first[3].unlink()
    first[5].write_bytes(first[5].read_bytes()[:3000])
    for path in folder.glob("*_06558.00_eV*.xrm"):
        path.unlink()
    return folder


# --------------------------------------------------------------------------------------------------- the reader


def test_reader_of_hdf5(tiny_twin: Path, tmp_path: Path) -> None:
    import h5py

    from napari_xanes_tomo.export import export_scan

    made = export_scan(open_series(tiny_twin), tmp_path / "nx", "nxtomo", only=[8344, 8570])
    for path in (made.files[0], tmp_path / "nx"):
        reader = get_reader(str(path))
        assert reader is read_scan
    data = read_scan(str(tmp_path / "nx"))[0][0]
    scan = open_series(tiny_twin).scans[5]
    np.testing.assert_array_equal(np.asarray(data[0, 3]), scan.frames.read(3))
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["entry/spectrum"] = [1, 2, 3]
    (tmp_path / "cut.nx").write_bytes(made.files[0].read_bytes()[:500])
    (tmp_path / "text.h5").write_text("no HDF5 at all")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "other.h5").write_bytes((tmp_path / "other.h5").read_bytes())
    for name in ("other.h5", "cut.nx", "text.h5", "folder", "missing.h5"):
        assert get_reader(str(tmp_path / name)) is None, name


def test_what_was_aligned_elsewhere_opens_as_what_it_is(tmp_path: Path) -> None:
    import h5py

    absorbance = np.random.default_rng(0).uniform(0, 1, (2, 5, 6, 7)).astype(np.float32)
    folder = tmp_path / "aligned"
    folder.mkdir()
    for energy, stack in zip((8300.0, 8400.0), absorbance, strict=True):
        with h5py.File(folder / f"a_{energy:.2f}_eV.h5", "w") as file:
            file["exchange/data"], file["exchange/theta"] = stack, np.linspace(0, 144, 5)
            file["measurement/instrument/monochromator/energy"] = energy / 1e3
            file["measurement/instrument/detection_system/pixel_size_nm"] = 40.0
    assert given_kind(folder) == "projections"
    one = next(folder.iterdir())
    with pytest.raises(XanesTomoError, match="two energies, got 1; open the folder"):
        get_reader(str(one))(str(one))  # type: ignore[misc]

    volumes = tmp_path / "volumes.h5"
    with h5py.File(volumes, "w") as file:
        data = file.create_dataset("registration_results/reg_results/registered_xanes3D", data=absorbance)
        file["registration_results/reg_results/eng_list"] = [8.3, 8.4]
        data.attrs["units"] = "1/cm"
    reader = get_reader(str(volumes))
    assert reader is not None
    with pytest.raises(XanesTomoError, match=r"given.pixel_nm: load a recipe"):
        reader(str(volumes))
    told = GivenParameters(pixel_nm=40.0)
    layer, options, _ = scan_layer(open_given(volumes, told), volumes, given=told)
    np.testing.assert_array_equal(np.asarray(layer), absorbance.transpose(0, 2, 1, 3))
    assert options["axis_labels"] == ("energy", "z", "y", "x")
    assert "plane z = 2" in options["metadata"][METADATA_KEY].text(1, 2)
    told = GivenParameters(pixel_nm=40.0, energies_ev=(8300.0, 8400.0))
    layer, options, _ = scan_layer(open_given(folder, told), folder, given=told)
    np.testing.assert_allclose(np.asarray(layer), absorbance, atol=2e-6)
    assert options["axis_labels"] == ("energy", "angle", "y", "x")
    # Pictures without energies are somebody else's.
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    import tifffile

    tifffile.imwrite(pictures / "a.tif", absorbance[0])
    assert get_reader(str(pictures)) is None


def test_reader_takes_what_is_ours_and_declines_the_rest(tiny_twin: Path, tmp_path: Path) -> None:
    frame = next(tiny_twin.glob("*.xrm"))
    for path in (tiny_twin, script_of(tiny_twin), frame):
        assert get_reader(str(path)) is not None
    assert get_reader([str(frame)]) is not None
    assert get_reader([str(frame), str(frame)]) is None, "several files are no measurement"
    notes = tmp_path / "notes.txt"
    notes.write_text("collect stamps\nbuy milk\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    for path in (notes, empty, tmp_path / "gone.txt", tmp_path / "gone"):
        assert get_reader(str(path)) is None


def test_one_layer_over_the_whole_measurement(tiny_twin: Path, series: Series) -> None:
    ((data, options, kind),) = read_scan(str(script_of(tiny_twin)))
    assert kind == "image"
    assert data.shape == (8, 36, 64, 64)
    assert data.chunksize == (1, 1, 64, 64)
    assert data.dtype == np.uint16
    assert options["axis_labels"] == ("energy", "angle", "y", "x")
    assert options["units"] == ("pixel", "deg", "pixel", "pixel"), "no length: nm/px depends on the energy"
    assert options["scale"] == (1.0, 5.0, 1.0, 1.0)
    assert options["translate"] == (0.0, -90.0, 0.0, 0.0)
    info = options["metadata"][METADATA_KEY]
    assert isinstance(info, ScanLayer)
    assert info.folder == tiny_twin
    assert isinstance(info.series, Series)
    low, high = options["contrast_limits"]
    some = np.asarray(data[::3, ::7])
    assert np.mean((some >= low) & (some <= high)) > 0.9
    for e, a in ((0, 0), (3, 17), (7, 35)):
        np.testing.assert_array_equal(np.asarray(data[e, a]), series.scans[e].frames.read(a))


def test_only_the_frame_asked_for_is_read(series: Series) -> None:
    asked = []

    def read(e: int, a: int) -> Any:
        asked.append((e, a))
        return np.zeros((4, 5), np.uint16)

    data = lazy_frames(read, (3, 2, 4, 5), np.uint16)
    assert not asked
    np.asarray(data[2, 1])
    assert asked == [(2, 1)]


def test_the_last_of_12060_lazy_frames() -> None:
    data = lazy_frames(lambda e, a: np.full((2, 2), e + a), (67, 180, 2, 2), np.int64)
    assert np.asarray(data[66, 179])[0, 0] == 66 + 179


def test_frame_stack_can_be_sent_elsewhere(series: Series) -> None:
    stack = pickle.loads(pickle.dumps(FrameStack(series)))
    np.testing.assert_array_equal(stack.read(1, 2), series.scans[1].frames.read(2))


def test_what_cannot_be_read_is_black_and_named(broken: Path) -> None:
    ((data, options, _),) = read_scan(str(script_of(broken)))
    info = options["metadata"][METADATA_KEY]
    assert data.shape == (8, 36, 64, 64)
    for e, a in ((0, 3), (0, 5), (1, 0)):
        assert not np.asarray(data[e, a]).any()
    assert np.asarray(data[0, 4]).any()
    assert "\nunreadable:missing  |  " in info.text(0, 3)
    assert "unreadable:" in info.text(0, 5)
    assert "\nok  |  " in info.text(0, 4)


def test_a_frame_that_goes_bad_later_is_black_and_named(tiny_twin: Path, tmp_path: Path) -> None:
    folder = tmp_path / "twin"
    shutil.copytree(tiny_twin, folder)
    ((data, options, _),) = read_scan(str(folder))
    info = options["metadata"][METADATA_KEY]
    path = folder / info.series.scans[2].names[7]
    path.unlink()
    assert not np.asarray(data[2, 7]).any()
    assert "unreadable:" in info.text(2, 7)
    shutil.copy(tiny_twin / path.name, path)
    assert info.stack.read(2, 7).any()
    assert "\nok  |  " in info.text(2, 7)


def test_energies_with_fewer_angles_are_padded(series: Series) -> None:
    short = series.scans[1]
    cut = replace(
        short, theta_deg=short.theta_deg[:10], status=short.status[:10], half=short.half[:10], names=short.names[:10]
    )
    other = replace(series, scans=(series.scans[0], cut))
    stack = FrameStack(other)
    assert stack.shape == (2, 36, 64, 64)
    assert not stack.read(1, 12).any()
    assert stack.read(1, 9).any()
    assert ScanLayer(other, stack, Path("x")).text(1, 12).endswith("not planned")
    assert geometry(other)["scale"] == (1.0, 1.0, 1.0, 1.0), "angles that differ are counted"
    assert geometry(other)["units"] == ("pixel",) * 4


def test_angles_that_are_not_even_are_counted(series: Series) -> None:
    scans = tuple(replace(s, theta_deg=np.sort(np.asarray(s.theta_deg) ** 3)) for s in series.scans)
    assert geometry(replace(series, scans=scans))["scale"] == (1.0, 1.0, 1.0, 1.0)
    backwards = tuple(replace(s, theta_deg=-np.asarray(s.theta_deg)) for s in series.scans)
    assert geometry(replace(series, scans=backwards))["translate"] == (0.0, 0.0, 0.0, 0.0)
    noisy = tuple(replace(s, theta_deg=np.asarray(s.theta_deg) + 0.01 * (-1) ** np.arange(36)) for s in series.scans)
    assert geometry(replace(series, scans=noisy))["units"][1] == "deg"


def test_nothing_to_show_is_an_error_and_no_black_layer(tiny_twin: Path, tmp_path: Path) -> None:
    script = shutil.copy(script_of(tiny_twin), tmp_path)
    with pytest.raises(XanesTomoError, match="no file is there"):
        read_scan(str(script))
    bad = tmp_path / "bad.xrm"
    bad.write_bytes(b"not a frame")
    with pytest.raises(XanesTomoError):
        read_scan(str(bad))


def test_a_measured_scan_opens(data_dir: Path) -> None:
    folder = data_dir / "ssrl_xanes"
    if not folder.is_dir():
        pytest.skip("no measured scan here")
    ((data, options, _),) = read_scan(str(folder))
    assert data.shape[0] == 2
    frame = np.asarray(data[0, 0])
    assert frame.shape == data.shape[2:]
    assert frame.any()
    assert "eV" in options["metadata"][METADATA_KEY].text(0, 0)


# ------------------------------------------------------------------------------------------------ overlay, sliders


def test_overlay_says_where_the_sliders_stand(tiny_twin: Path, series: Series) -> None:
    viewer = ViewerModel()
    ((data, options, _),) = read_scan(str(tiny_twin))
    overlay = attach_overlay(viewer)
    assert attach_overlay(viewer) is overlay
    layer = viewer.add_image(data, **options)
    assert layer.locked, "raw data are not deleted by a slip of the hand"
    assert layer.ndim == 4
    for e, a in ((0, 0), (5, 20), (7, 35)):
        go_to(viewer, layer, e, a)
        assert frame_at(viewer, layer) == (e, a)
        assert viewer.dims.current_step[:2] == (e, a)
        scan = series.scans[e]
        text = viewer.canvas.overlays.text.text
        assert text == (
            f"{scan.energy_ev:.2f} eV  |  {scan.theta_deg[a]:.2f} deg  |  {scan.pixel_size_nm:.1f} nm/px\n"
            f"ok  |  {scan.names[a]}"
        )
    assert viewer.canvas.overlays.text.visible
    viewer.layers.remove(layer)
    assert not viewer.canvas.overlays.text.visible
    overlay.detach()


@pytest.mark.parametrize("shape", [(300_001,), (1024, 1024), (40, 40, 40), (0,)])
def test_contrast_limits_of_any_shape(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).uniform(0, 1, shape)
    low, high = spread_limits([values, np.full(3, np.nan)], 10, 90)
    assert (low, high) == (pytest.approx((0.1, 0.9), abs=0.02) if values.size else (0.0, 1.0))
    assert spread_limits([np.full(shape or (1,), 7.0)])[1] > spread_limits([np.full(shape or (1,), 7.0)])[0]


def test_a_single_frame_and_a_spectrum_without_angles(tiny_twin: Path, series: Series) -> None:
    viewer = ViewerModel()
    attach_overlay(viewer)
    frame = sorted(tiny_twin.glob("rep01_*_08570.00_eV*.xrm"))[7]
    ((data, options, _),) = read_scan(str(frame))
    assert data.shape == (1, 1, 64, 64)
    layer = viewer.add_image(data, **options)
    np.testing.assert_array_equal(np.asarray(layer.data[0, 0]), series.scans[-1].frames.read(7))
    assert frame.name in viewer.canvas.overlays.text.text
    one = replace(series.scans[0], theta_deg=np.full(36, np.nan))
    flat = replace(series, scans=(one,))
    assert "no angle" in ScanLayer(flat, FrameStack(flat), frame).text(0, 3)


def test_layers_of_others_are_left_alone() -> None:
    viewer = ViewerModel()
    attach_overlay(viewer)
    viewer.canvas.overlays.text.text = "mine"
    viewer.canvas.overlays.text.visible = True
    layer = viewer.add_image(np.zeros((3, 4, 5)))
    assert scan_of(layer) is None
    assert viewer.canvas.overlays.text.text == "mine"
    assert viewer.canvas.overlays.text.visible


# ---------------------------------------------------------------------------------------------------- alignment


def test_aligned_frames_are_the_absorbance_moved_back(series: Series) -> None:
    scan = series.scans[7]
    whole = normalise(scan, AbsorbanceParameters())
    shift = np.zeros((36, 2))
    shift[:, 0], shift[:, 1] = 3.0, -2.0
    found = Alignment(shift, np.zeros_like(shift))
    read = AlignedStack(FrameStack(series)).reader({7: (found, whole.air)})
    frame = read(7, 10)
    expected = whole.data[10]
    # content 3 px too low and 2 px too far left on the detector: whole pixels need no interpolation
    np.testing.assert_allclose(frame[5:-5, 5:-5], np.roll(expected, (-3, 2), (0, 1))[5:-5, 5:-5], atol=1e-5)
    assert not read(0, 10).any(), "an energy without a result"


def test_aligned_frames_are_divided_by_the_flats_that_were_chosen(series: Series) -> None:
    """Not by those of their half; what the flats mask is filled as it is for the maps."""
    scan = series.scans[7]
    whole = normalise(scan, AbsorbanceParameters(), use="half 2")
    still = Alignment(np.zeros((36, 2)), np.zeros((36, 2)))
    stack = AlignedStack(FrameStack(series))
    read = stack.reader({7: (still, whole.air)}, beams={7: whole.beam})
    np.testing.assert_allclose(read(7, 3), whole.data[3], atol=1e-5)
    own = stack.reader({7: (still, whole.air)})(7, 3)
    assert np.abs(own - whole.data[3]).max() > 1e-3


def test_aligned_frames_without_a_shift_or_a_file_are_black(series: Series) -> None:
    shift = np.zeros((36, 2))
    shift[4] = np.nan
    air = np.zeros((36, 3))
    bad = replace(series, scans=(series.scans[0].excluded({6: "blur"}), *series.scans[1:]))
    read = AlignedStack(FrameStack(bad)).reader({0: (Alignment(shift, np.zeros_like(shift)), air)})
    assert not read(0, 4).any()
    assert not read(0, 6).any()
    assert read(0, 5).any()


# --------------------------------------------------------------------------------------------------------- maps


@pytest.fixture
def maps_folder(tmp_path: Path) -> Path:
    """A small output folder with maps."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "journal.jsonl").write_text("")
    names = [("Ni", "g/cm3"), ("edge_energy", "eV"), ("mask", ""), ("Ni_sigma", "g/cm3")]
    store = MapStore(
        out / "maps.ome.zarr", (8, 12, 12), 100.0, [MapSpec(n, u, "", 0.0) for n, u in names], slab_rows=4, key="k"
    )
    store.create()
    for y0, _ in store.pending():
        block = np.full((4, 12, 12), 2.5, np.float32)
        store.write(y0, {n: np.ones_like(block) if n == "mask" else block for n, _ in names})
    store.finish(absent={}, metadata={})
    return out


def test_maps_are_in_micrometres(maps_folder: Path) -> None:
    reader = get_reader(str(maps_folder))
    assert reader is not None
    for path in (maps_folder, maps_folder / "maps.ome.zarr"):
        layers = reader(str(path))
        assert {o["name"] for _, o, _ in layers} == {"Ni", "edge_energy", "mask", "Ni_sigma"}
        for data, options, kind in layers:
            assert kind == "image"
            assert data.shape == (8, 12, 12)
            assert options["scale"] == (0.1, 0.1, 0.1)
            assert options["units"] == ("um", "um", "um")
            assert options["axis_labels"] == ("y", "z", "x")
        assert [o["visible"] for _, o, _ in layers] == [False, False, False, True]
    viewer = ViewerModel()
    for data, options, _ in map_layers(maps_folder / "maps.ome.zarr"):
        viewer.add_image(data, **options)
    assert float(np.asarray(viewer.layers["Ni"].data)[4, 6, 6]) == 2.5


def test_maps_beside_projections_are_warned_of(maps_folder: Path, tiny_twin: Path) -> None:
    viewer = ViewerModel()
    attach_overlay(viewer)
    data, options, _ = map_layers(maps_folder / "maps.ome.zarr")[0]
    viewer.add_image(data, **options)
    ((data, options, _),) = read_scan(str(tiny_twin))
    before = len(notification_manager.records)
    viewer.add_image(data, **options)
    (told,) = list(notification_manager.records)[before:]
    assert "viewer of their own" in told.message


def test_a_folder_that_only_looks_like_maps(tmp_path: Path) -> None:
    other = tmp_path / "cells.ome.zarr"
    other.mkdir()
    (other / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    reader = get_reader(str(other))
    assert reader is None
