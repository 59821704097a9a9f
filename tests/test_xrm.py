"""XRM and TXRM files: what is written is read back, by us and by olefile; what is not whole is refused."""

import itertools
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import olefile
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
    dtype=st.sampled_from(["i1", "u1", "i2", "u2", "i4", "u4", "f4", "f8", ">u2"]),
    layout=st.sampled_from(["last", "first", "scattered"]),
    sector=st.sampled_from([4096, 512]),
    version=st.sampled_from([3.0, 4.0, 5.0]),
    reference=st.booleans(),
    seed=st.integers(0, 99),
)
def test_round_trip(tmp_path, shape, dtype, layout, sector, version, reference, seed):
    frames = counts(shape, dtype, seed)
    flat = counts(shape[1:], "f4", seed + 1) if reference else None
    theta = np.arange(shape[0]) * 1.5 - 90
    path = tmp_path / "a.txrm"
    write_xrm(path, frames, theta_deg=theta, date=1.5e9, layout=layout, sector=sector, version=version, reference=flat)
    header = read_header(path)
    assert header.version == version
    assert (header.n_images, header.shape) == (shape[0], shape[1:])
    assert header.dtype == np.dtype(dtype).newbyteorder("<")
    assert header.angles_deg == tuple(theta)
    assert header.times_s == (1.5e9,) * shape[0]
    assert header.has_reference is reference
    np.testing.assert_array_equal(stack(path), frames)
    if reference:
        embedded = XrmFrames((str(path),), (0,), header.shape, header.reference_dtype)
        np.testing.assert_array_equal(embedded.read(0), flat)

    ole = olefile.OleFileIO(path, raise_defects=olefile.DEFECT_POTENTIAL)
    try:
        assert not ole.parsing_issues
        for k, frame in enumerate(frames, start=1):
            assert ole.openstream(f"ImageData1/Image{k}").read() == frame.astype(header.dtype).tobytes()
        assert struct.unpack("<f", ole.openstream("imageinfo/ANGLES").read()[:4])[0] == -90
    finally:
        ole.close()


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


# ------------------------------------------------------------------------------------------------ layouts


def test_layout_seen_before_is_verified(tmp_path, monkeypatch):
    """Files of one layout are parsed once; a file that differs in any table is parsed again."""
    from napari_xanes_tomo.io import xrm

    parsed = []
    original = xrm._parse
    monkeypatch.setattr(xrm, "_parse", lambda *a: parsed.append(1) or original(*a))
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


def test_reading_without_positioned_reads(tmp_path, monkeypatch):
    """Where the platform has no preadv."""
    from napari_xanes_tomo.io import xrm

    def read_into(fd, view, offset):
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, min(len(view), 1000))
        view[: len(data)] = data
        return len(data)

    monkeypatch.setattr(xrm, "_read_into", read_into)
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


def test_mutations(tmp_path):
    """Any bytes of the tables changed: the right pixels, XrmError, or (a changed size) a plain refusal."""
    rng = np.random.default_rng(1)
    data = counts((20, 120))
    write_xrm(tmp_path / "a.xrm", data)
    raw = (tmp_path / "a.xrm").read_bytes()
    tables = read_header(tmp_path / "a.xrm").images[0][0][0]
    path = tmp_path / "b.xrm"
    values = [0, 1, 2, 7, 0xFF, 0xFFFE, 0xFFFFFFFE, 0xFFFFFFFF, 0xFFFFFFFD, 0x7FFFFFFF, 4096, 512]
    reasons = set()
    for _ in range(300):
        bad = bytearray(raw)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(0, tables // 4)) * 4
            struct.pack_into("<I", bad, at, int(rng.choice(values)))
        path.write_bytes(bad)
        try:
            header = read_header(path)
            frames = XrmFrames.of(path)
            pixels = frames.read(0)
        except XrmError as error:
            reasons.add(error.reason)
        else:
            assert pixels.shape == header.shape
            assert pixels.tobytes() in bytes(bad)
    assert reasons <= REASONS


# ------------------------------------------------------------------------------------------------ real files

REAL = [
    # file, version, images, angle, energy, exposure, binning, first four pixels, pixel in the middle
    ("aps/fov03_xanessoc01_8353_0eV.xrm", 3, 1, -0.042, 8353.03, 35, 2, [1, 4, 3, 2], 688),
    ("other/mosaic_4x4_bin8.xrm", 3, 1, -0.006, 8412.98, 5, 8, [29, 27, 33, 26], 21),
    ("other/txrm_test_chip_tomo.txrm", 3, 7, -45.018, 9200.02, 5, 8, [10, 11, 16, 17], 10),
    (
        "ssrl_xanes/rep01_000051_ref_20161456_ssrl-test-data_08324.0_eV_001of010.xrm",
        *(4, 1, 6.97447, 0, 0.3, 2, [17, 33, 24, 21], 1426),
    ),
    (
        "ssrl_xanes/rep01_20161456_ssrl-test-data_08354.0_eV_003of003.xrm",
        *(4, 1, 6.97447, 0, 0.5, 2, [16, 11, 11, 16], 817),
    ),
]


@pytest.mark.parametrize(("name", "version", "n", "angle", "energy", "exposure", "binning", "first", "middle"), REAL)
def test_real_files(name, version, n, angle, energy, exposure, binning, first, middle):
    path = real(name)
    header = read_header(path)
    assert (header.version, header.n_images, header.binning) == (version, n, binning)
    assert header.angles_deg[0] == pytest.approx(angle, abs=1e-3)
    assert header.energies_ev[0] == pytest.approx(energy, abs=0.01)
    assert header.exposures_s[0] == pytest.approx(exposure)
    pixels = XrmFrames.of(path).read(0)
    assert pixels[0, :4].tolist() == first
    assert pixels[min(512, pixels.shape[0] - 1), min(512, pixels.shape[1] - 1)] == middle
    ole = olefile.OleFileIO(path)
    assert ole.openstream("ImageData1/Image1").read() == pixels.tobytes()
    ole.close()


def test_real_stack():
    header = read_header(real("other/txrm_test_chip_tomo.txrm"))
    assert header.energies_ev == pytest.approx((9200.02,) * 7, abs=0.01)
    assert header.angles_deg[-1] == pytest.approx(44.986, abs=1e-3)


def test_real_truncated_file():
    path = real("ssrl_xanes/rep02_000182_ref_20161456_ssrl-test-data_08400.0_eV_002of010.xrm")
    with pytest.raises(XrmError, match="12288 of 2097152") as error:
        read_header(path)
    assert error.value.reason == "truncated"
    assert error.value.header.version == 5
    assert error.value.header.angles_deg[0] == pytest.approx(-1.0045, abs=1e-4)
    assert error.value.header.acq_file_name.endswith("08400.0_eV_002of010.xrm")
