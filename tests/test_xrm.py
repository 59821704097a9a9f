"""XRM and TXRM files: what is written is read back, by us and by olefile; what is not whole is refused."""

import importlib.util
import itertools
import os
import pickle
import re
import struct
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import olefile
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from napari_xanes_tomo.io import cfb, layout
from napari_xanes_tomo.io.xrm import XrmError, XrmFrames, read_header, write_xrm
from napari_xanes_tomo.model import FrameSource, XanesTomoError

REASONS = {
    "missing",
    "unreadable",
    "empty",
    "lfs-pointer",
    "not-xrm",
    "corrupt",
    "truncated",
    "no-image",
    "mosaic",
    "other-size",
}


def counts(shape, dtype="u2", seed=0):
    return np.random.default_rng(seed).integers(0, 250, shape).astype(dtype)


def real(name):
    folder = Path(os.environ.get("XANES_TOMO_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not (folder / name).exists():
        pytest.skip(f"real file {name} not found in {folder}; set XANES_TOMO_DATA to the folder that holds it")
    return folder / name


def stack(path):
    frames = XrmFrames.of(path)
    return np.stack([frames.read(i) for i in range(len(frames))])


# ------------------------------------------------------------------------------------------------ round trip


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 70), st.integers(1, 70)),
    dtype=st.sampled_from(["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8", ">u2"]),
    layout=st.sampled_from(["last", "first", "scattered"]),
    sector=st.sampled_from([4096, 512]),
    version=st.sampled_from([3.0, 4.0, 5.0]),
    references=st.sampled_from([None, 0, 1, 3]),
    more=st.integers(0, 3),
    machine=st.booleans(),
    seed=st.integers(0, 99),
)
def test_round_trip(tmp_path, shape, dtype, layout, sector, version, references, more, machine, seed):
    """Written, read by us, read by olefile; `references` 0 is one in ReferenceData, k are k in MultiReferenceData."""
    frames = counts(shape, dtype, seed)
    frames = frames if dtype in ("i1", "f4", "f8") else frames * 3 + 60000 if dtype in ("u2", ">u2") else frames
    flats = None if references is None else counts((references, *shape[1:])[references == 0 :], "f4", seed + 1)
    theta = np.arange(shape[0]) * 1.5 - 90
    path = tmp_path / "a.txrm"
    write_xrm(
        path,
        frames,
        theta_deg=theta,
        date=1.5e9,
        layout=layout,
        sector=sector,
        version=version,
        reference=flats,
        n_planned=shape[0] + more,
        machine_streams=machine,
    )
    header = read_header(path)
    assert header.n_planned == shape[0] + more
    assert header.version == version
    assert (header.n_images, header.shape) == (shape[0], shape[1:])
    assert header.dtype == np.dtype(dtype).newbyteorder("<")
    assert header.angles_deg == tuple(theta)
    assert header.times_s == (1.5e9,) * shape[0]
    assert header.has_reference is (references is not None)
    np.testing.assert_array_equal(stack(path), frames)
    if flats is not None:
        flats = flats.reshape(-1, *shape[1:])
        numbers = tuple(-k for k in range(len(flats)))
        embedded = XrmFrames((str(path),) * len(flats), numbers, header.shape, header.reference_dtype)
        np.testing.assert_array_equal([embedded.read(k) for k in range(len(flats))], flats)
        with pytest.raises(XrmError, match="without it"):
            XrmFrames((str(path),), (-len(flats),), header.shape, header.reference_dtype).read(0)

    ole = olefile.OleFileIO(path, raise_defects=olefile.DEFECT_POTENTIAL)
    try:
        assert not ole.parsing_issues
        for k, frame in enumerate(frames, start=1):
            assert ole.openstream(f"ImageData1/Image{k}").read() == frame.astype(header.dtype).tobytes()
        assert struct.unpack("<f", ole.openstream("imageinfo/ANGLES").read()[:4])[0] == -90
    finally:
        ole.close()


OPTIONAL = (
    "Version", "ImageInfo/NoOfImages", "ImageInfo/ImagesTaken", "ImageInfo/PixelSize", "ImageInfo/Angles",
    "ImageInfo/XPosition", "ImageInfo/YPosition", "ImageInfo/ZPosition", "ImageInfo/Energy", "ImageInfo/ExpTimes",
    "ImageInfo/Date", "AcquisitionSettings/AcqFileName",
)  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.sampled_from([1, 2, 99, 100, 101, 205]),
    mosaic=st.booleans(),
    omit=st.sets(st.sampled_from(OPTIONAL)),
    name=st.text("abcXYZ019_ .\u00b5\u00e9\u20ac", min_size=1, max_size=40).map(str.strip),
    garbage=st.binary(max_size=60),
    layout=st.sampled_from(["last", "first", "scattered"]),
    sector=st.sampled_from([4096, 512]),
    version=st.sampled_from([3.0, 4.0, 5.0]),
    seed=st.integers(0, 99),
)
def test_round_trip_of_odd_files(tmp_path, n, mosaic, omit, name, garbage, layout, sector, version, seed):
    """Groups of a hundred, stitched mosaics, missing streams, strings with what memory held behind them."""
    frames = counts((n, 7, 5), "u2", seed) * 200
    extra = {"AcquisitionSettings/AcqFileName": (name.encode("cp1252") + b"\0" + garbage).ljust(260, b"\0")}
    if mosaic:
        side = struct.pack("<i", n) if n > 1 else struct.pack("<i", 4)
        extra |= {"ImageInfo/MosiacRows": side, "ImageInfo/MosiacColumns": struct.pack("<i", 1)}
    path = tmp_path / "a.txrm"
    write_xrm(path, frames, theta_deg=np.arange(n), layout=layout, sector=sector, version=version, extra=extra,
              omit=tuple(omit - set(extra)))  # fmt: skip
    ole = olefile.OleFileIO(path, raise_defects=olefile.DEFECT_POTENTIAL)
    try:
        for k, frame in enumerate(frames):
            assert ole.openstream(f"ImageData{k // 100 + 1}/Image{k + 1}").read() == frame.tobytes()
        assert not any(ole.exists(gone) for gone in omit - set(extra))
    finally:
        ole.close()
    if mosaic and n > 1:
        with pytest.raises(XrmError, match="unstitched") as refused:
            read_header(path)
        assert refused.value.reason == "mosaic"
        return
    header = read_header(path)
    assert (header.n_images, header.acq_file_name) == (n, name)
    assert header.mosaic == ((4, 1) if mosaic else (0, 0))
    assert np.isnan(header.version) if "Version" in omit else header.version == version
    if "ImageInfo/Angles" in omit:
        assert np.isnan(header.angles_deg).all()
    else:
        assert header.angles_deg == tuple(range(n))
    np.testing.assert_array_equal(stack(path), frames)


def test_directory_is_a_red_black_tree(tmp_path):
    """In CFB order (length, upper case); no red child of a red node; as many black nodes on every path."""
    write_xrm(tmp_path / "a.xrm", counts((8, 8)))
    raw = (tmp_path / "a.xrm").read_bytes()
    start = (struct.unpack_from("<I", raw, 48)[0] + 1) * 4096

    def entry(i):
        name, length, kind, colour, left, right, child = struct.unpack_from("<64sHBBIII", raw, start + 128 * i)
        return name[: length - 2].decode("utf-16-le"), kind, colour, left, right, child

    def walk(i, red_parent):
        if i == 0xFFFFFFFF:
            return [], 1
        name, kind, colour, left, right, child = entry(i)
        assert not (red_parent and colour == 0), name
        before, black = walk(left, colour == 0)
        after, other = walk(right, colour == 0)
        assert black == other, name
        if kind == 1:
            check(child)
        return [*before, name, *after], black + colour

    def check(root):
        names, _ = walk(root, red_parent=True)
        assert names == sorted(names, key=lambda n: (len(n), n.upper()))
        assert names

    check(entry(0)[5])


def test_same_arguments_same_bytes(tmp_path):
    for name in "ab":
        write_xrm(
            tmp_path / f"{name}.xrm", counts((20, 30)), theta_deg=3, date=1e9 + 0.25, acq_file_name="C:\\x\\y.xrm"
        )
    assert (tmp_path / "a.xrm").read_bytes() == (tmp_path / "b.xrm").read_bytes()
    header = read_header(tmp_path / "a.xrm")
    assert header.modified_s == 1e9 + 0.25
    assert header.acq_file_name == "C:\\x\\y.xrm"


def test_values(tmp_path):
    write_xrm(
        tmp_path / "a.xrm",
        counts((20, 30)),
        theta_deg=-89.5,
        exposure_s=0.5,
        energy_ev=8353.03,
        x_um=1,
        y_um=2,
        z_um=3,
        date=1.5e9,
        pixel_size_um=0.0312,
        binning=8,
    )
    header = read_header(tmp_path / "a.xrm")
    assert header.angles_deg == (-89.5,)
    assert header.exposures_s == (0.5,)
    assert header.energies_ev == pytest.approx((8353.03,), abs=1e-3)
    assert (header.x_um, header.y_um, header.z_um) == ((1,), (2,), (3,))
    assert header.pixel_size_um == pytest.approx(0.0312)
    assert header.binning == 8
    assert (header.n_planned, header.mosaic) == (1, (0, 0))


def test_more_than_a_hundred_images_have_two_groups(tmp_path):
    frames = counts((205, 6, 5))
    write_xrm(tmp_path / "a.txrm", frames)
    np.testing.assert_array_equal(stack(tmp_path / "a.txrm"), frames)
    ole = olefile.OleFileIO(tmp_path / "a.txrm")
    assert ole.exists("ImageData3/Image201")
    ole.close()


def test_many_sectors_need_a_difat(tmp_path):
    """109 FAT sectors of 512 bytes describe 7 MB; beyond that the header needs help."""
    frames = counts((2, 1500, 1500), "u4")
    write_xrm(tmp_path / "a.txrm", frames, sector=512)
    np.testing.assert_array_equal(stack(tmp_path / "a.txrm"), frames)
    ole = olefile.OleFileIO(tmp_path / "a.txrm", raise_defects=olefile.DEFECT_POTENTIAL)
    assert ole.openstream("ImageData1/Image2").read() == frames[1].tobytes()
    ole.close()


def test_images_taken_count_not_those_planned(tmp_path):
    write_xrm(tmp_path / "a.txrm", counts((7, 6, 5)), n_planned=13, theta_deg=np.arange(1, 8))
    header = read_header(tmp_path / "a.txrm")
    assert (header.n_images, header.n_planned) == (7, 13)
    assert header.angles_deg == tuple(range(1, 8))


def test_sparse_energies_of_version_3(tmp_path):
    energies = np.zeros(61, dtype="<f4")
    energies[::10] = 9200 + np.arange(7)
    write_xrm(tmp_path / "a.txrm", counts((7, 6, 5)), version=3, extra={"ImageInfo/Energy": energies.tobytes()})
    assert read_header(tmp_path / "a.txrm").energies_ev == tuple(range(9200, 9207))


def test_every_optional_stream_may_be_missing(tmp_path):
    needed = {"ImageWidth", "ImageHeight", "DataType"}
    write_xrm(tmp_path / "a.xrm", counts((20, 30)))
    ole = olefile.OleFileIO(tmp_path / "a.xrm")
    names = ["/".join(s) for s in ole.listdir() if s[-1] not in needed and not s[0].startswith("ImageData")]
    ole.close()
    write_xrm(tmp_path / "b.xrm", counts((20, 30)), omit=names)
    header = read_header(tmp_path / "b.xrm")
    assert np.isnan([header.angles_deg[0], header.exposures_s[0], header.times_s[0], header.version]).all()
    assert (header.binning, header.acq_file_name) == (None, "")
    np.testing.assert_array_equal(stack(tmp_path / "b.xrm")[0], counts((20, 30)))


def test_strings_end_at_the_first_nul_and_are_cp1252(tmp_path):
    raw = b"D:\\\xb5m\\a.xrm\0garbage\xff".ljust(260, b"\0")
    write_xrm(tmp_path / "a.xrm", counts((8, 8)), extra={"AcquisitionSettings/AcqFileName": raw})
    assert read_header(tmp_path / "a.xrm").acq_file_name == "D:\\µm\\a.xrm"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("05/29/16 15:03:16", 1464534196.0),
        ("05/29/2016 15:03:16.25", 1464534196.25),
        ("99/99/16 15:03:16", np.nan),
        ("", np.nan),
    ],
)
def test_dates(tmp_path, text, expected):
    raw = text.encode().ljust(40, b"\0")
    write_xrm(tmp_path / "a.xrm", counts((8, 8)), extra={"ImageInfo/Date": raw})
    np.testing.assert_equal(read_header(tmp_path / "a.xrm").times_s[0], expected)


def test_mosaic(tmp_path):
    tiles = {"ImageInfo/MosiacRows": struct.pack("<i", 2), "ImageInfo/MosiacColumns": struct.pack("<i", 2)}
    stitched = counts((40, 40))
    write_xrm(tmp_path / "a.xrm", stitched, extra=tiles | {"ImageInfo/ImagesTaken": struct.pack("<i", 4)})
    header = read_header(tmp_path / "a.xrm")
    assert (header.n_images, header.mosaic) == (1, (2, 2))
    write_xrm(tmp_path / "b.xrm", counts((4, 40, 40)), extra=tiles)
    with pytest.raises(XrmError, match="unstitched") as error:
        read_header(tmp_path / "b.xrm")
    assert error.value.reason == "mosaic"


def test_directory_as_large_as_a_real_one(tmp_path):
    """A frame of version 5 then has the size and the layout of the real ones."""
    data = counts((1024, 1024))
    write_xrm(tmp_path / "a.xrm", data, machine_streams=True)
    assert (tmp_path / "a.xrm").stat().st_size == 2_281_472
    assert read_header(tmp_path / "a.xrm").images == (((184_320, 2_097_152),),)
    ole = olefile.OleFileIO(tmp_path / "a.xrm", raise_defects=olefile.DEFECT_POTENTIAL)
    assert len(ole.listdir()) == 696
    ole.close()
    np.testing.assert_array_equal(stack(tmp_path / "a.xrm")[0], data)


def test_reference_of_another_size_is_left_out(tmp_path):
    write_xrm(tmp_path / "a.xrm", counts((20, 30)), reference=counts((30, 20), "f4"))
    assert not read_header(tmp_path / "a.xrm").has_reference
    write_xrm(tmp_path / "a.xrm", counts((20, 30)), reference=counts((10, 15), "f4"), version=3)
    assert not read_header(tmp_path / "a.xrm").has_reference


# ------------------------------------------------------------------------------------------------ layouts


def test_layout_seen_before_is_verified(tmp_path, monkeypatch):
    """Files of one layout are parsed once; a file that differs in any table is parsed again."""
    parsed = []
    original = layout.parse
    monkeypatch.setattr(layout, "parse", lambda *a: parsed.append(1) or original(*a))
    for i in range(5):
        write_xrm(tmp_path / f"{i}.xrm", counts((97, 61), seed=i), theta_deg=i, date=1e9 + i)
        assert read_header(tmp_path / f"{i}.xrm").angles_deg == (i,)
    assert len(parsed) == 1
    # the same size and the same streams, elsewhere in the file
    write_xrm(tmp_path / "x.xrm", counts((97, 61), seed=9), theta_deg=9, layout="scattered")
    assert read_header(tmp_path / "x.xrm").angles_deg == (9,)
    assert len(parsed) == 2
    np.testing.assert_array_equal(stack(tmp_path / "x.xrm")[0], counts((97, 61), seed=9))


def test_file_rewritten_between_two_reads(tmp_path):
    path = tmp_path / "a.xrm"
    write_xrm(path, counts((60, 50), seed=1))
    os.utime(path, (1e9, 1e9))
    frames = XrmFrames.of(path)
    before = frames.fingerprint()
    np.testing.assert_array_equal(frames.read(0), counts((60, 50), seed=1))
    write_xrm(path, counts((60, 50), seed=2), layout="first")
    np.testing.assert_array_equal(frames.read(0), counts((60, 50), seed=2))
    assert frames.fingerprint() != before
    write_xrm(path, counts((50, 60), seed=2))
    with pytest.raises(XrmError, match="expected"):
        frames.read(0)


# ------------------------------------------------------------------------------------------------ frames


@pytest.mark.parametrize(
    ("flip", "bin_", "layout"), list(itertools.product([False, True], [1, 3], ["last", "scattered"]))
)
def test_read_rows(tmp_path, flip, bin_, layout):
    data = counts((5, 47, 101), seed=3)
    write_xrm(tmp_path / "a.txrm", data, layout=layout)
    frames = XrmFrames.of(tmp_path / "a.txrm", flip_rows=flip, bin=bin_)
    rows, columns = 47 // bin_, 101 // bin_
    expected = data[:, : rows * bin_, : columns * bin_].astype("u4")
    expected = expected.reshape(5, rows, bin_, columns, bin_).sum((2, 4))
    expected = expected[:, ::-1] if flip else expected
    assert frames.frame_shape == (rows, columns)
    assert frames.dtype == (np.uint16 if bin_ == 1 else np.uint32)
    np.testing.assert_array_equal(frames.read(3), expected[3])
    got = frames.read_rows([4, 0, 2], 2, 9)
    assert got.dtype == frames.dtype
    np.testing.assert_array_equal(got, expected[[4, 0, 2], 2:9])
    out = np.full((2, 4, columns), 7, dtype=frames.dtype)
    assert np.shares_memory(frames.read_rows([1, 4], 3, 7, out), out)
    np.testing.assert_array_equal(out, expected[[1, 4], 3:7])
    for bad in (out[:1], out.astype("f8"), np.empty((2, 4, 2 * columns), frames.dtype)[..., ::2]):
        with pytest.raises(ValueError, match="out: expected"):
            frames.read_rows([1, 4], 3, 7, bad)
    assert frames.read_rows([], 0, 3).shape == (0, 3, columns)
    assert frames.read_rows([1], 5, 5).shape == (1, 0, columns)
    with pytest.raises(ValueError, match="rows"):
        frames.read_rows([1], 0, rows + 1)


def test_frames_are_a_lazy_picklable_source(tmp_path):
    paths = [str(tmp_path / f"{i}.xrm") for i in range(3)]
    frames = XrmFrames(tuple(paths), (1, 1, 1), (12, 16), np.dtype("<u2"))  # before any file is there
    assert isinstance(frames, FrameSource)
    for i, path in enumerate(paths):
        write_xrm(path, counts((12, 16), seed=i))
    again = pickle.loads(pickle.dumps(frames))
    assert again == frames
    assert again.fingerprint() == frames.fingerprint()
    np.testing.assert_array_equal(again.read(2), counts((12, 16), seed=2))
    (tmp_path / "2.xrm").unlink()
    with pytest.raises(XrmError, match=r"2\.xrm") as error:
        again.read(2)
    assert error.value.reason == "missing"


def test_reading_without_preadv(tmp_path, monkeypatch):
    """macOS before 11, Windows: what is read is copied into the caller's array."""
    monkeypatch.setattr(cfb, "read_into", cfb._copied_into)
    for where in ("last", "first", "scattered"):
        write_xrm(tmp_path / "a.xrm", counts((60, 50)), layout=where)
        np.testing.assert_array_equal(stack(tmp_path / "a.xrm")[0], counts((60, 50)))


def test_platform_without_preadv(monkeypatch):
    """The module finds its way without `preadv` and `pread`."""
    monkeypatch.delattr(os, "preadv", raising=False)
    monkeypatch.delattr(os, "pread", raising=False)
    spec = importlib.util.spec_from_file_location("cfb_elsewhere", cfb.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fd = os.open(__file__, os.O_RDONLY)
    try:
        target = bytearray(20)
        assert module.read_into(fd, memoryview(target), 5) == 20
    finally:
        os.close(fd)
    assert bytes(target) == Path(__file__).read_bytes()[5:25]


def test_reads_that_come_up_short(tmp_path, monkeypatch):
    """A read may return less than asked for; the rest is read again."""

    def read_into(fd, view, offset):
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, min(len(view), 1000))
        view[: len(data)] = data
        return len(data)

    monkeypatch.setattr(cfb, "read_into", read_into)
    write_xrm(tmp_path / "a.xrm", counts((60, 50)))
    np.testing.assert_array_equal(stack(tmp_path / "a.xrm")[0], counts((60, 50)))


def test_error_survives_pickling(tmp_path):
    with pytest.raises(XrmError) as error:
        read_header(tmp_path / "gone.xrm")
    again = pickle.loads(pickle.dumps(error.value))
    assert (str(again), again.reason, again.file) == (str(error.value), "missing", "gone.xrm")


# ------------------------------------------------------------------------------------------------ bad files


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2281472\n", "lfs-pointer"),
        (b"hello " * 1000, "not-xrm"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "truncated"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(9000), "corrupt"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\xff" * 9000, "corrupt"),
    ],
)
def test_not_an_xrm_file(tmp_path, content, reason):
    (tmp_path / "a.xrm").write_bytes(content)
    with pytest.raises(XrmError, match=r"a\.xrm") as error:
        read_header(tmp_path / "a.xrm")
    assert error.value.reason == reason
    assert isinstance(error.value, XanesTomoError)
    assert "\n" not in str(error.value)


def test_a_folder_and_an_impossible_name(tmp_path):
    for path in (tmp_path, tmp_path / ("x" * 5000), "a\0b"):
        with pytest.raises(XrmError) as error:
            read_header(path)
        assert error.value.reason == "unreadable"


@pytest.mark.parametrize(("layout", "sector"), list(itertools.product(["last", "first", "scattered"], [4096, 512])))
def test_cut_anywhere(tmp_path, layout, sector):
    """Nothing but XrmError, or the whole image where only padding is lost."""
    data = counts((61, 97))
    write_xrm(tmp_path / "a.xrm", data, layout=layout, sector=sector)
    raw = (tmp_path / "a.xrm").read_bytes()
    path = tmp_path / "b.xrm"
    refused = tried = 0
    for cut in {*range(0, len(raw), 509), *range(len(raw) - 600, len(raw), 37)}:
        path.write_bytes(raw[:cut])
        tried += 1
        try:
            np.testing.assert_array_equal(stack(path)[0], data)
        except XrmError as error:
            refused += error.reason in REASONS
        else:
            tried -= 1
            assert len(raw) - cut <= sector
    assert refused == tried > 20


def test_cut_inside_the_image_keeps_the_header(tmp_path):
    write_xrm(tmp_path / "a.xrm", counts((61, 97)), theta_deg=12)
    raw = (tmp_path / "a.xrm").read_bytes()
    (tmp_path / "a.xrm").write_bytes(raw[:-6000])
    with pytest.raises(XrmError, match="of 11834 bytes") as error:
        read_header(tmp_path / "a.xrm")
    assert error.value.reason == "truncated"
    assert error.value.header.angles_deg == (12,)


def test_shortened_after_it_was_opened(tmp_path):
    path = tmp_path / "a.xrm"
    write_xrm(path, counts((61, 97)))
    frames = XrmFrames.of(path)
    frames.read(0)
    os.truncate(path, path.stat().st_size - 6000)
    with pytest.raises(XrmError) as error:
        frames.read(0)
    assert error.value.reason == "truncated"


@pytest.mark.parametrize(
    ("extra", "omit", "reason"),
    [
        ({"ImageInfo/ImagesTaken": struct.pack("<i", 0)}, (), "no-image"),
        ({"ImageInfo/ImagesTaken": struct.pack("<i", 2)}, (), "no-image"),
        ({"ImageInfo/ImageWidth": struct.pack("<i", 96)}, (), "corrupt"),
        ({"ImageInfo/ImageWidth": struct.pack("<i", -1)}, (), "corrupt"),
        ({"ImageInfo/ImageHeight": struct.pack("<i", 2**31 - 1)}, (), "corrupt"),
        ({"ImageInfo/DataType": struct.pack("<i", 12)}, (), "corrupt"),
        ({}, ("ImageInfo/ImageWidth",), "not-xrm"),
        ({}, ("ImageInfo/DataType",), "corrupt"),
        ({}, ("ImageData1/Image1",), "no-image"),
    ],
)
def test_nonsense_in_the_header(tmp_path, extra, omit, reason):
    if omit == ("ImageInfo/ImageWidth",):
        omit = (*omit, "ImageData1/Image1")
    write_xrm(tmp_path / "a.xrm", counts((61, 97)), extra=extra, omit=omit)
    with pytest.raises(XrmError) as error:
        read_header(tmp_path / "a.xrm")
    assert error.value.reason == reason


def patched_fat(path, link):
    """Rewrite FAT entries of the image's chain: `link` maps (sectors of the image) -> {sector: next}."""
    raw = bytearray(path.read_bytes())
    fat = (struct.unpack_from("<I", raw, 76)[0] + 1) * 4096
    image = read_header(path).images[0]
    sectors = [o // 4096 - 1 for start, n in image for o in range(start, start + n, 4096)]
    for sector, following in link(sectors).items():
        struct.pack_into("<I", raw, fat + 4 * sector, following)
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "link",
    [
        lambda s: {s[1]: s[0]},  # a circle
        lambda s: {s[1]: s[1]},
        lambda s: {s[-1]: s[0]},
        lambda s: {s[0]: 0xFFFFFFFE},  # ends early
        lambda s: {s[0]: 0},  # runs into the FAT itself
        lambda s: {s[0]: 5000},  # out of bounds
        lambda s: {s[0]: s[-1] + 1000},
    ],
)
def test_broken_chains(tmp_path, link):
    path = tmp_path / "a.xrm"
    write_xrm(path, counts((61, 297)))
    patched_fat(path, link)
    with pytest.raises(XrmError) as error:
        read_header(path)
    assert error.value.reason in {"corrupt", "truncated"}


def test_two_images_on_the_same_sectors(tmp_path):
    write_xrm(tmp_path / "a.txrm", counts((2, 61, 97)))
    raw = bytearray((tmp_path / "a.txrm").read_bytes())
    first, second = (runs[0][0] // 4096 - 1 for runs in read_header(tmp_path / "a.txrm").images)
    at = raw.index("Image2".encode("utf-16-le"))
    assert struct.unpack_from("<I", raw, at + 116)[0] == second
    struct.pack_into("<I", raw, at + 116, first)
    (tmp_path / "a.txrm").write_bytes(raw)
    with pytest.raises(XrmError, match="shares"):
        read_header(tmp_path / "a.txrm")


def test_metadata_on_the_sectors_of_an_image(tmp_path):
    """Whatever points into an image, whole or not, makes it unusable: nothing says which of the two is right."""
    write_xrm(tmp_path / "a.xrm", counts((61, 97)), extra={"Other/Large": bytes(5000)})
    sound = (tmp_path / "a.xrm").read_bytes()
    image = read_header(tmp_path / "a.xrm").images[0][0][0] // 4096 - 1
    at = sound.index("Large".encode("utf-16-le"))
    for offset, value in ((116, image), (116, image + 1)):
        raw = bytearray(sound)
        struct.pack_into("<I", raw, at + offset, value)
        (tmp_path / "a.xrm").write_bytes(raw)
        with pytest.raises(XrmError, match="shares") as error:
            read_header(tmp_path / "a.xrm")
        assert error.value.reason == "corrupt"


def test_being_written_now(tmp_path):
    """A file that still grows is refused, and whole once it is."""
    data = counts((61, 297))
    write_xrm(tmp_path / "a.xrm", data)
    raw = (tmp_path / "a.xrm").read_bytes()
    (tmp_path / "b.xrm").write_bytes(raw[:-9000])
    with pytest.raises(XrmError, match="being written") as error:
        read_header(tmp_path / "b.xrm")
    assert error.value.reason == "truncated"
    with (tmp_path / "b.xrm").open("ab") as file:
        file.write(raw[-9000:])
    np.testing.assert_array_equal(stack(tmp_path / "b.xrm")[0], data)


def test_storage_inside_itself(tmp_path):
    """A directory that runs in a circle is refused, not followed."""
    write_xrm(tmp_path / "a.xrm", counts((61, 97)))
    raw = bytearray((tmp_path / "a.xrm").read_bytes())
    start = (struct.unpack_from("<I", raw, 48)[0] + 1) * 4096
    storage = (raw.index("ImageInfo".encode("utf-16-le")) - start) // 128
    struct.pack_into("<I", raw, start + 128 * storage + 76, storage)
    (tmp_path / "a.xrm").write_bytes(raw)
    with pytest.raises(XrmError) as error:
        read_header(tmp_path / "a.xrm")
    assert error.value.reason == "corrupt"


def test_mutations(tmp_path, repository):
    """500 of the damaged files of `benchmarks/fuzz.py`: XrmError, a flagged frame, or the right pixels."""
    spec = importlib.util.spec_from_file_location("fuzz", repository / "benchmarks" / "fuzz.py")
    fuzz = sys.modules["fuzz"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(fuzz)
        whole = fuzz.templates(tmp_path, large=False)
        known = {name: fuzz.parts(raw) for name, raw in whole.items()}
        outcomes = set()
        for number in range(500):
            name = list(whole)[number % len(whole)]
            raw = fuzz.mutate(whole[name], known[name], np.random.default_rng(number))
            (tmp_path / "bad.xrm").write_bytes(raw)
            outcomes.add(fuzz.judge(tmp_path / "bad.xrm", raw))
    finally:
        del sys.modules["fuzz"]
    assert outcomes >= {"read", "corrupt", "truncated", "not-xrm", "no-image"}
    assert outcomes <= REASONS | {"read"}


def test_nan_counts(tmp_path):
    """A float image may hold NaN; it is read as it is."""
    data = counts((20, 30), "f4")
    data[3, 4:6] = [np.nan, np.inf]
    write_xrm(tmp_path / "a.xrm", data)
    np.testing.assert_array_equal(stack(tmp_path / "a.xrm")[0], data)


def test_parity_with_txrm2tiff(tmp_path, data_dir):
    """The same pixels, exposures and times as an independent reader, of the versions it reads: 3 and 5."""
    txrm2tiff = pytest.importorskip("txrm2tiff", reason="txrm2tiff is not installed")
    paths = [data_dir / name for name in ("aps/fov03_xanessoc01_8353_0eV.xrm", "other/txrm_test_chip_tomo.txrm")]
    for version in (3, 5):
        paths.append(tmp_path / f"v{version}.txrm")
        write_xrm(
            paths[-1],
            counts((4, 41, 67)),
            version=version,
            theta_deg=[-1, 0.5, 2, 3],
            reference=counts((41, 67), "f4", 3),
            date=1.5e9,
        )
    for path in paths:
        header = read_header(path)
        with txrm2tiff.open_txrm(path) as other:
            np.testing.assert_array_equal(stack(path), other.get_images())
            assert header.exposures_s == tuple(other.exposures[: header.n_images])
            assert (
                header.times_s == tuple(t.replace(tzinfo=UTC).timestamp() for t in other.datetimes)[: header.n_images]
            )
            if header.has_reference:
                flat = XrmFrames((str(path),), (0,), header.shape, header.reference_dtype).read(0)
                np.testing.assert_array_equal(flat, other.get_reference())


# ------------------------------------------------------------------------------------------------ real files

FACTS = re.compile(
    r"\| `(?P<file>[^`]+rm)` \| (?P<bytes>\d+) \| \w+ \| v(?P<version>\d) (?P<rows>\d+)x(?P<columns>\d+) "
    r"angle (?P<angle>\S+) E (?P<energy>\S+) exp (?P<exposure>\S+) (?P<date>\S+ \S+) "
    r"(?:-|(?P<low>\d+)/(?P<mean>[\d.]+)/(?P<high>\d+); px\[0,:4\]=\[(?P<first>[^]]+)\]; "
    r"px\[min\(512,h-1\),min\(512,w-1\)\]=(?P<middle>\d+)) \|"
)


def test_every_measured_file(data_dir):
    """Each file in the table of the folder's README has the values listed there, and olefile's bytes."""
    if not (data_dir / "README.md").is_file():
        pytest.skip("the folder of measured frames has no README.md with the known values")
    rows = [found.groupdict() for found in FACTS.finditer((data_dir / "README.md").read_text("utf-8"))]
    assert len(rows) >= 16
    for fact in rows:
        path = data_dir / fact["file"]
        assert path.stat().st_size == int(fact["bytes"])
        if fact["middle"] is None:  # cut inside its image: what it says about itself can be read all the same
            with pytest.raises(XrmError, match="12288 of 2097152") as error:
                read_header(path)
            assert error.value.reason == "truncated"
            header = error.value.header
            assert header.acq_file_name.endswith(path.name.partition("_eV_")[2])
        else:
            header = read_header(path)
        assert (header.version, header.shape) == (int(fact["version"]), (int(fact["rows"]), int(fact["columns"])))
        assert header.dtype == np.dtype("<u2")
        assert header.angles_deg[0] == pytest.approx(float(fact["angle"].split(",")[0]), abs=1e-3)
        assert header.energies_ev[0] == pytest.approx(float(fact["energy"].split(",")[0]), abs=0.01)
        assert header.exposures_s[0] == pytest.approx(float(fact["exposure"].split(",")[0]))
        taken = datetime.strptime(fact["date"], "%m/%d/%y %H:%M:%S").replace(tzinfo=UTC)
        assert header.times_s[0] == taken.timestamp()
        if fact["middle"] is None:
            continue
        frames = XrmFrames.of(path)
        pixels = frames.read(0)
        assert pixels[0, :4].tolist() == [int(v) for v in fact["first"].split(",")]
        assert pixels[min(512, pixels.shape[0] - 1), min(512, pixels.shape[1] - 1)] == int(fact["middle"])
        assert (pixels.min(), pixels.max()) == (int(fact["low"]), int(fact["high"]))
        assert pixels.mean() == pytest.approx(float(fact["mean"]), abs=1e-3)
        ole = olefile.OleFileIO(path)
        for k in range(len(frames)):
            assert ole.openstream(f"ImageData1/Image{k + 1}").read() == frames.read(k).tobytes()
        ole.close()


def test_real_stack():
    header = read_header(real("other/txrm_test_chip_tomo.txrm"))
    assert header.energies_ev == pytest.approx((9200.02,) * 7, abs=0.01)
    assert header.angles_deg[-1] == pytest.approx(44.986, abs=1e-3)


def test_real_mosaic():
    header = read_header(real("other/mosaic_4x4_bin8.xrm"))
    assert (header.mosaic, header.n_images, header.n_planned, header.binning) == ((4, 4), 1, 16, 8)
