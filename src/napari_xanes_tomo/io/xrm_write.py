"""XRM and TXRM files: writing them, in every variant that instruments and programs make.

The digital twin is written with this, and every test of the reader.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .cfb import CUTOFF, MINI
from .cfb_write import Layout, write_container
from .layout import CODES, PER_GROUP

__all__ = ["EPOCH_1601", "write_xrm"]

EPOCH_1601 = 11644473600  # seconds from 1601 (FILETIME) to 1970

_AXES = (
    *(f"Sample {a}" for a in ("X", "Y", "Z", "Theta")),
    *(f"Condenser {a}" for a in ("X", "Y", "Z", "Tip", "Tilt")),
    *(f"{part} {a}" for part in ("Pinhole", "Zoneplate", "Phasering") for a in "XYZ"),
    "Phasering W",
    "Tubelens",
)
_AXIS_NAMES = b"".join(a.encode().ljust(25, b"\0") for a in _AXES)
_AXIS_UNITS = b"".join((b"deg" if "Theta" in a else b"um").ljust(15, b"\0") for a in _AXES)


def _per_image(value: float | Sequence[float] | npt.NDArray[Any], n: int, name: str) -> npt.NDArray[np.float64]:
    values = np.asarray(value, dtype=np.float64).ravel()
    if values.size == 1:
        return np.full(n, values[0])
    if values.size != n:
        raise ValueError(f"{name}: expected 1 or {n} values, got {values.size}")
    return values


# What real files hold by version: streams with the image, storages, mini sectors (64 bytes each).
_REAL = {3: (632, 36, 950), 4: (374, 26, 640), 5: (696, 41, 1073)}


def _machine(sizes: Mapping[str, int], n_images: int, version: float) -> dict[str, bytes]:
    """Streams of machine settings that make a directory as large as a real one."""
    n_streams, n_storages, n_mini = _REAL[min(max(int(version), 3), 5)]
    n = max(n_streams - len(sizes) - n_images, 0)
    there = len({path.rpartition("/")[0] for path in sizes if "/" in path}) + 1  # with that of the images
    groups = max(n_storages - there - 1, 1)  # and the one these are in
    used = sum(-(-size // MINI) for size in sizes.values() if size < CUTOFF)
    texts = max(-(-(n_mini - used - n) // 4), 0)  # of 260 bytes, 5 mini sectors; the others are numbers of 4 bytes
    return {f"ConfigureBackup/Machine{i % groups:02d}/Setting{i:03d}": bytes(260 if i < texts else 4) for i in range(n)}


_1970 = datetime(1970, 1, 1)


def _clock(date: float | datetime) -> datetime:
    return date.replace(tzinfo=None) if isinstance(date, datetime) else _1970 + timedelta(seconds=float(date))


def write_xrm(
    path: str | os.PathLike[str],
    frames: npt.ArrayLike,
    *,
    theta_deg: float | Sequence[float] | npt.NDArray[Any] = 0.0,
    exposure_s: float | Sequence[float] | npt.NDArray[Any] = 1.0,
    energy_ev: float | Sequence[float] | npt.NDArray[Any] = 0.0,
    x_um: float | Sequence[float] | npt.NDArray[Any] = 0.0,
    y_um: float | Sequence[float] | npt.NDArray[Any] = 0.0,
    z_um: float | Sequence[float] | npt.NDArray[Any] = 0.0,
    date: float | datetime | Sequence[float] | Sequence[datetime] = 0.0,
    ion_chamber: float | Sequence[float] | npt.NDArray[Any] = 0.12,
    pixel_size_um: float = 0.023,
    binning: int = 2,
    acq_file_name: str | None = None,
    version: float = 5.0,
    n_planned: int | None = None,
    reference: npt.ArrayLike | None = None,
    reference_exposure_s: float = 1.0,
    machine_streams: bool = False,
    extra: Mapping[str, bytes] | None = None,
    omit: Collection[str] = (),
    layout: Layout = "last",
    sector: Literal[4096, 512] = 4096,
) -> None:
    """Write frames as an ``.xrm`` (one) or ``.txrm`` (several) file.

    The same arguments give the same bytes. The defaults of `energy_ev` and `pixel_size_um` are what
    SSRL 6-2c stores: no energy, and a pixel size that is never updated.

    Parameters
    ----------
    path : path-like
        The file; overwritten.
    frames : (y, x) or (n, y, x) array
        Counts; u8, u16, f32 and the other integer and float types of the format.
    theta_deg, exposure_s, energy_ev, x_um, y_um, z_um, date, ion_chamber
        One value, or one an image. `date` is the instrument's local clock, a datetime or seconds since
        1970; the container's own time is taken from it too, as if it were UTC.
    binning : int
        Camera binning.
    acq_file_name : str, optional
        The path the instrument wrote to; by default one made from the name of `path`.
    version : float
        3, 4 or 5.
    n_planned : int, optional
        Number of images planned, when the acquisition was cut short.
    reference : (y, x) or (k, y, x) array, optional
        A reference image to embed, or several.
    machine_streams : bool
        Fill the directory with as many streams of machine settings as an instrument stores (696 at version
        5, 374 at 4, 632 at 3). A 1024 x 1024 u16 frame of version 5 then has 2,281,472 bytes, its image at 184,320.
    extra, omit
        Further streams (path in the container to bytes), and streams to leave out.
    layout, sector
        Images at the end of the file, at its beginning, or in scattered sectors of 4096 or 512 bytes:
        readers have to cope with all of them.
    """
    data = np.asarray(frames)
    data = data[None] if data.ndim == 2 else data
    if data.ndim != 3 or not data.size:
        raise ValueError(f"frames: expected (y, x) or (n, y, x), got {data.shape}")
    little = data.dtype.newbyteorder("<")
    code = {v: k for k, v in CODES.items()}.get(f"<{little.kind}{little.itemsize}")
    if code is None:
        raise ValueError(f"frames: expected an integer or float type, got {data.dtype}")
    n, height, width = data.shape
    planned = n if n_planned is None else n_planned
    angle = _per_image(theta_deg, n, "theta_deg")
    position = [_per_image(v, n, a) for v, a in ((x_um, "x_um"), (y_um, "y_um"), (z_um, "z_um"))]
    clocks = [_clock(d) for d in date] if isinstance(date, Sequence) else [_clock(date)] * n
    if len(clocks) != n:
        raise ValueError(f"date: expected 1 or {n} values, got {len(clocks)}")
    name = Path(path).name
    acquired = f"C:\\TXMDATA\\{name}" if acq_file_name is None else acq_file_name

    def floats(values: npt.NDArray[Any]) -> bytes:
        return values.astype("<f4").tobytes() + bytes(4 * (planned - n))

    def i4(value: int) -> bytes:
        return struct.pack("<i", value)

    def f4(value: float) -> bytes:
        return struct.pack("<f", value)

    def text(value: str, length: int) -> bytes:
        return value.encode("cp1252", errors="replace")[: length - 1].ljust(length, b"\0")

    motors = np.zeros((n, len(_AXES)), dtype="<f4")
    motors[:, 0], motors[:, 1], motors[:, 2], motors[:, 3] = *position, angle
    modern = version >= 4
    streams: dict[str, bytes] = {"Version": f4(version)}
    if modern:
        streams["exeVersion"] = text("12.1.5339.17569" if version >= 5 else "10.6.2605.12638", 260)
    info: dict[str, bytes] = {
        "AcquisitionMode": i4(2 if n == 1 else 0),
        "Angles": floats(angle),
        "CameraName": text("CCD", 80),
        "DataType": i4(code),
        "Date": b"".join(c.strftime("%m/%d/%y %H:%M:%S").encode().ljust(40, b"\0") for c in clocks)
        + bytes(40 * (planned - n)),
        "DtoRADistance": floats(np.ones(n)),
        "Energy": floats(_per_image(energy_ev, n, "energy_ev")),
        "ExpTimes": floats(_per_image(exposure_s, n, "exposure_s")),
        "HorizontalBin": i4(binning),
        "ImageHeight": i4(height),
        "ImageWidth": i4(width),
        "ImagesPerProjection": i4(1),
        "ImagesTaken": i4(n),
        "IonChamberCurrent": floats(_per_image(ion_chamber, n, "ion_chamber")),
        "MosiacColumns": i4(0),
        "MosiacRows": i4(0),
        "NoOfImages": i4(planned),
        "NoOfImagesAveraged": i4(1),
        "ObjectiveName": text("", 260),
        "OpticalMagnification": f4(10.0),
        "PixelSize": f4(pixel_size_um),
        "StoRADistance": floats(np.ones(n)),
        "Temperature": i4(-30),
        "VerticalalBin": i4(binning),
        "XPosition": floats(position[0]),
        "XrayMagnification": floats(np.ones(n)),
        "YPosition": floats(position[1]),
        "ZPosition": floats(position[2]),
    }
    if modern:
        info |= {"FileType": i4(0), "HasImage": i4(1)}
    if version >= 5:
        info |= {"CamFullWidth": i4(2048), "CamPixelSize": f4(13.5), "CameraBinning": i4(binning)}
    streams |= {f"ImageInfo/{key}": value for key, value in info.items()}
    streams |= {
        "PositionInfo/AxisNames": _AXIS_NAMES,
        "PositionInfo/AxisUnits": _AXIS_UNITS,
        "PositionInfo/MotorPositions": motors.tobytes(),
        "PositionInfo/NoOfImages": i4(n),
        "PositionInfo/TotalAxis": i4(len(_AXES)),
    }
    if modern:
        streams["AcquisitionSettings/AcqFileName"] = text(acquired, 260)
    images: dict[str, npt.NDArray[Any]] = {}
    if reference is not None:
        flats = np.asarray(reference)
        store = "ReferenceData" if flats.ndim == 2 else "MultiReferenceData"
        streams[f"{store}/DataType"] = i4({v: k for k, v in CODES.items()}[f"<{flats.dtype.kind}{flats.itemsize}"])
        streams[f"{store}/ExpTime"] = f4(reference_exposure_s)
        if version >= 5:
            streams[f"{store}/ImageInfo/ImageHeight"] = i4(flats.shape[-2])
            streams[f"{store}/ImageInfo/ImageWidth"] = i4(flats.shape[-1])
        if flats.ndim == 2:
            images[f"{store}/Image"] = flats
        else:
            images |= {f"{store}/Image{k + 1}": flat for k, flat in enumerate(flats)}
    for i in range(n):
        images[f"ImageData{i // PER_GROUP + 1}/Image{i + 1}"] = data[i]
    streams |= extra or {}
    for key in omit:
        streams.pop(key, None)
        images.pop(key, None)
    if machine_streams:
        streams |= _machine({key: len(value) for key, value in streams.items()}, len(images), version)

    # integer arithmetic: the time stamp has to be the same on every machine
    since = clocks[-1] - _1970
    filetime = (EPOCH_1601 + since.days * 86400 + since.seconds) * 10_000_000 + since.microseconds * 10
    write_container(path, streams, images, filetime=max(filetime, 0), layout=layout, sector=sector)
