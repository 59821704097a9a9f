"""Measurements in HDF5, and volumes made elsewhere: what is in the file is what comes out; nothing stays open."""

import pickle

import h5py
import numpy as np
import pytest

from napari_xanes_tomo.io.exchange import is_exchange, open_exchange
from napari_xanes_tomo.io.scan import open_series
from napari_xanes_tomo.io.volumes import open_projections, open_volumes
from napari_xanes_tomo.model import FrameSource, XanesTomoError

THETA = np.arange(10) * 18.0 - 90


def counts(*shape, seed=0):
    return np.random.default_rng(seed).integers(100, 900, shape).astype("u2")


def test_data_exchange_with_an_energy_axis(tmp_path):
    data, white, dark = counts(2, 10, 12, 14), counts(2, 3, 12, 14, seed=1), counts(2, 2, 12, 14, seed=2) // 50
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["exchange/data"], file["exchange/data_white"], file["exchange/data_dark"] = data, white, dark
        file["exchange/theta"], file["exchange/energy"] = THETA, [8.333, 8.353]
    assert is_exchange(tmp_path / "a.h5")
    series = open_exchange(tmp_path / "a.h5")
    np.testing.assert_allclose(series.energies_ev, [8333, 8353])
    for e, scan in enumerate(series.scans):
        frames = pickle.loads(pickle.dumps(scan.frames))
        assert isinstance(frames, FrameSource)
        np.testing.assert_array_equal(scan.theta_deg, THETA)
        expected = data[e] - dark[e].mean(axis=0)
        np.testing.assert_allclose(frames.read_rows([7, 0, 1], 3, 9), expected[[7, 0, 1], 3:9], rtol=1e-6)
        np.testing.assert_allclose(scan.flats[0].frames.read(2), white[e, 2] - dark[e].mean(axis=0), rtol=1e-6)


def test_nxtomo_in_a_folder(tmp_path):
    data = counts(14, 12, 14)
    key = [1, 1, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 3, 0]
    for energy in (8.333, 8.353):
        with h5py.File(tmp_path / f"{energy}.nx", "w") as file:
            file["entry/definition"] = "NXtomo"
            file["entry/instrument/detector/data"], file["entry/instrument/detector/image_key"] = data, key
            file["entry/instrument/detector/x_pixel_size"] = 3e-8
            file["entry/sample/rotation_angle"] = np.arange(14) * 10.0
            file["entry/beam/incident_energy"] = energy
    (tmp_path / "cut.nx").write_bytes((tmp_path / "8.333.nx").read_bytes()[:900])
    series = open_series(tmp_path)
    np.testing.assert_allclose(series.energies_ev, [8333, 8353])
    scan = series.scans[0]
    assert scan.half.tolist() == [0] * 5 + [1] * 5
    assert [s == "ok" for s in scan.status] == [True] * 8 + [False, True]
    assert scan.pixel_size_nm == pytest.approx(30)
    np.testing.assert_array_equal(scan.frames.read(5), data[9])
    np.testing.assert_array_equal(scan.flats[1].frames.read(1), data[8])
    assert any(p.code == "corrupt" and p.file == "cut.nx" for p in series.problems)


def test_registered_volumes_of_txm_sandbox(tmp_path):
    volumes = counts(2, 5, 6, 7).astype("f4")
    with h5py.File(tmp_path / "reg.h5", "w") as file:
        file["registration_results/reg_results/registered_xanes3D"] = volumes
        file["registration_results/reg_results/eng_list"] = [8.353, 8.333]
    found = open_volumes(tmp_path / "reg.h5", voxel_nm=30)
    assert (found.shape, found.voxel_nm) == ((5, 6, 7), 30)
    np.testing.assert_allclose(found.energies_ev, [8333, 8353])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(found)).read(0, 1, 3), volumes[1, 1:3])


def test_tiff_stacks(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    stacks = counts(2, 5, 6, 7).astype("f4")
    for energy, stack in zip((8353, 8333), stacks, strict=True):
        tifffile.imwrite(tmp_path / f"vol_{energy}.00_eV.tif", stack)
    found = open_volumes(tmp_path)
    assert found.energies_ev.tolist() == [8333, 8353]
    np.testing.assert_array_equal(found.read(1, 2, 4), stacks[0, 2:4])
    aligned = open_projections(tmp_path, theta_deg=np.arange(5.0))
    np.testing.assert_array_equal(aligned.read_rows(1, 2, 4), stacks[0, :, 2:4])


def test_nothing_of_the_kind(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = 1
    for opener in (open_exchange, open_volumes):
        with pytest.raises(XanesTomoError, match=r"a\.h5"):
            opener(tmp_path / "a.h5")
