"""Writers of HDF5: raw measurements as NXtomo and DataExchange, aligned projections as DataExchange.

Frames go from their source into the file one by one, so that memory is bounded by a frame, whatever the measurement.
A file appears under its name when it is whole; one that is there already is never written over.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from napari_xanes_tomo.model import EnergyScan, FloatArray, Progress, XanesTomoError, no_progress

from .atomic import new_file, writing

__all__ = ["frames_to_write", "write_aligned", "write_data_exchange", "write_nxtomo"]

NXTOMO_VERSION = 1.4  # of the paths that tomoscan and nabu look at; the pixel size is the detector's, at the sample
PROJECTION, FLAT, INVALID = 0, 1, 3


class _Frames:
    """The frames of one energy in the order they are written: flats before the first projection they belong to.

    Attributes
    ----------
    projections : (n,) int array
        Numbers of the projections that are written.
    flats : list of (set, shot)
        The shots that can be used.
    order : list of (kind, number)
        Kind 0 or 3 with a projection's number, 1 with a place in `flats`.
    """

    def __init__(self, scan: EnergyScan, *, invalid: bool, sets: Sequence[int] | None = None) -> None:
        readable = np.array([not s.startswith("unreadable") for s in scan.status], dtype=bool)
        self.projections = np.flatnonzero(readable if invalid else scan.usable)
        chosen = range(len(scan.flats)) if sets is None else sets
        self.flats = [(k, i) for k in chosen for i, s in enumerate(scan.flats[k].status) if s == "ok"]
        self.order: list[tuple[int, int]] = []
        usable, half, done = scan.usable, np.asarray(scan.half), 0

        def until(group: int) -> None:
            nonlocal done
            while done < len(self.flats) and self.flats[done][0] <= group:
                self.order.append((FLAT, done))
                done += 1

        for i in self.projections.tolist():
            until(int(half[i]))
            self.order.append((PROJECTION if usable[i] else INVALID, i))
        until(len(scan.flats))

    def read(self, scan: EnergyScan, kind: int, number: int) -> npt.NDArray[Any]:
        """Return one frame (y, x) as its source gives it."""
        if kind == FLAT:
            group, shot = self.flats[number]
            return scan.flats[group].frames.read(shot)
        return scan.frames.read(number)

    def dtype(self, scan: EnergyScan) -> np.dtype[Any]:
        """Return a type that holds every frame."""
        types = [scan.frames.dtype, *(scan.flats[k].frames.dtype for k, _ in self.flats)]
        return np.result_type(*types).newbyteorder("<")


def frames_to_write(scan: EnergyScan) -> tuple[int, int, int]:
    """Return how many projections can be used, are readable but excluded, and cannot be read."""
    usable = int(scan.usable.sum())
    lost = sum(s.startswith("unreadable") for s in scan.status)
    return usable, len(scan) - usable - lost, lost


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _put(group: Any, name: str, value: Any, **attributes: Any) -> Any:
    dataset = group.create_dataset(name, data=value)
    dataset.attrs.update(attributes)
    return dataset


def _group(parent: Any, name: str, kind: str) -> Any:
    made = parent.create_group(name)
    made.attrs["NX_class"] = kind
    return made


def write_nxtomo(
    path: str | os.PathLike[str],
    scans: Sequence[EnergyScan],
    *,
    name: str,
    sets: Sequence[Sequence[int] | None] | None = None,
    progress: Progress = no_progress,
) -> None:
    """Write raw counts as NXtomo, one entry an energy.

    Counts are those of the sources, unchanged. Projections that are excluded are kept with ``image_key`` 3 (invalid);
    unreadable ones are left out. Flats stand before the first projection they belong to; the angle written for them is
    that projection's.

    Parameters
    ----------
    path : path-like
        A new file.
    scans : sequence of EnergyScan
    name : str
        Of the sample or scan.
    sets : sequence, optional
        For every scan the numbers of the flat sets to write; None for all.
    progress : Progress
        Told about frames written.

    Raises
    ------
    XanesTomoError
        The file is there already, a frame cannot be read, or the disk is full.

    Notes
    -----
    NeXus application definition NXtomo (Könnecke et al. 2015, doi 10.1107/S1600576714027575). Beyond it are written
    ``instrument/detector/flat_group`` (the flat set of every frame) and the exposure and start time of every frame.
    """
    import h5py

    path = Path(path)
    parts = [_Frames(s, invalid=True, sets=None if sets is None else sets[e]) for e, s in enumerate(scans)]
    total, done = sum(len(p.order) for p in parts), 0
    with new_file(path) as temporary, writing(path), h5py.File(temporary, "w") as file:
        file.attrs.update({"NX_class": "NXroot", "default": "entry" if len(scans) == 1 else "entry_000"})
        for e, (scan, frames) in enumerate(zip(scans, parts, strict=True)):
            entry = _group(file, "entry" if len(scans) == 1 else f"entry_{e:03d}", "NXentry")
            data = _nxtomo_entry(entry, scan, frames, name)
            for k, (kind, number) in enumerate(frames.order):
                progress("export", done, total)
                data[k] = frames.read(scan, kind, number)
                done += 1
    progress("export", total, total)


def _nxtomo_entry(entry: Any, scan: EnergyScan, frames: _Frames, name: str) -> Any:
    """Write everything of an entry but its pixels, and return the dataset for them."""
    n = len(frames.order)
    key = np.array([kind for kind, _ in frames.order], dtype=np.int32)
    theta, seconds, start = np.empty(n), np.empty(n), np.full(n, np.nan)
    group = np.empty(n, dtype=np.int32)
    for k, (kind, number) in enumerate(frames.order):
        if kind == FLAT:
            which, shot = frames.flats[number]
            flats = scan.flats[which]
            group[k], seconds[k], theta[k] = which, flats.exposure_s[shot], np.nan
            start[k] = flats.time_s[shot] if len(flats.time_s) else np.nan
        else:
            group[k], seconds[k] = scan.half[number], scan.exposure_s[number]
            theta[k], start[k] = scan.theta_deg[number], scan.time_s[number]
    _fill_flat_angles(theta, key)
    entry.attrs.update({"default": "data", "version": NXTOMO_VERSION})
    entry["definition"] = "NXtomo"
    entry["title"] = f"{name}, {scan.energy_ev:g} eV"
    known = start[np.isfinite(start)]
    if known.size:
        entry["start_time"], entry["end_time"] = _iso(float(known.min())), _iso(float(known.max()))
    instrument = _group(entry, "instrument", "NXinstrument")
    source = _group(instrument, "source", "NXsource")
    source["probe"] = "x-ray"
    beam = _group(instrument, "beam", "NXbeam")
    _put(beam, "incident_energy", scan.energy_ev / 1e3, units="keV")
    entry["beam"] = _soft(f"{entry.name}/instrument/beam")
    detector = _group(instrument, "detector", "NXdetector")
    rows, columns = scan.frames.frame_shape
    data = detector.create_dataset("data", (n, rows, columns), frames.dtype(scan))
    data.attrs.update({"interpretation": "image", "target": data.name, "long_name": "counts"})
    _put(detector, "image_key", key).attrs["target"] = f"{detector.name}/image_key"
    _put(detector, "image_key_control", key)
    _put(detector, "count_time", seconds, units="s")
    _put(detector, "flat_group", group)
    if known.size:
        _put(detector, "start_time", start, units="s", start="1970-01-01T00:00:00")
    if np.isfinite(scan.pixel_size_nm):
        for axis in "xy":
            _put(detector, f"{axis}_pixel_size", scan.pixel_size_nm * 1e-9, units="m")
    detector["field_of_view"] = "Full"
    sample = _group(entry, "sample", "NXsample")
    sample["name"] = name
    _put(sample, "rotation_angle", theta, units="degree").attrs["target"] = f"{sample.name}/rotation_angle"
    plot = _group(entry, "data", "NXdata")
    plot.attrs.update({"signal": "data", "axes": ["rotation_angle", ".", "."], "rotation_angle_indices": 0})
    plot["data"] = _soft(data.name)
    plot["image_key"] = _soft(f"{detector.name}/image_key")
    plot["rotation_angle"] = _soft(f"{sample.name}/rotation_angle")
    return data


def _soft(path: str) -> Any:
    import h5py

    return h5py.SoftLink(path)


def _fill_flat_angles(theta: FloatArray, key: npt.NDArray[np.integer[Any]]) -> None:
    """Give flats the angle of the next projection (of the last one behind it): every frame needs one."""
    seen = np.flatnonzero(key != FLAT)
    for k in np.flatnonzero(key == FLAT):
        at = int(np.searchsorted(seen, k))
        theta[k] = theta[seen[min(at, len(seen) - 1)]] if len(seen) else 0.0


def _head(file: Any, energy_ev: float, pixel_nm: float) -> None:
    """Write what DataExchange says about the measurement."""
    file["implements"] = "exchange:measurement"
    instrument = file.create_group("measurement/instrument")
    _put(instrument, "monochromator/energy", energy_ev / 1e3, units="keV")
    if np.isfinite(pixel_nm):
        _put(instrument, "detection_system/objective/resolution", pixel_nm / 1e3, units="um")


def write_data_exchange(
    path: str | os.PathLike[str],
    scan: EnergyScan,
    *,
    name: str,
    sets: Sequence[int] | None = None,
    progress: Progress = no_progress,
) -> None:
    """Write the raw counts of one energy as DataExchange, for TomoPy and tomocupy.

    ``exchange/data`` (angle, y, x) holds the projections that can be used, ``data_white`` (shot, y, x) the flats,
    ``theta`` degrees. ``data_dark`` is one frame of zeros: the camera takes off its own dark before a count is stored,
    and readers of the format want one. Parameters and errors as in `write_nxtomo`.

    Notes
    -----
    De Carlo et al. 2014, doi 10.1107/S160057751401604X. Beyond the format: ``exchange/frame`` (number of every
    projection in the scan), exposures, start times, and which flats belong to which projection.
    """
    import h5py

    path = Path(path)
    frames = _Frames(scan, invalid=False, sets=sets)
    kept, flats = frames.projections, frames.flats
    shape, kind = scan.frames.frame_shape, frames.dtype(scan)
    total = len(kept) + len(flats)
    with new_file(path) as temporary, writing(path), h5py.File(temporary, "w") as file:
        _head(file, scan.energy_ev, scan.pixel_size_nm)
        file["measurement/sample/name"] = name
        exchange = file.create_group("exchange")
        data = exchange.create_dataset("data", (len(kept), *shape), kind)
        data.attrs.update({"axes": "theta:y:x", "units": "counts"})
        for k, i in enumerate(kept.tolist()):
            progress("export", k, total)
            data[k] = scan.frames.read(i)
        if flats:
            white = exchange.create_dataset("data_white", (len(flats), *shape), kind)
            white.attrs["units"] = "counts"
            for k, (group, shot) in enumerate(flats):
                progress("export", len(kept) + k, total)
                white[k] = scan.flats[group].frames.read(shot)
        dark = exchange.create_dataset("data_dark", (1, *shape), kind, fillvalue=0)
        dark.attrs.update({"units": "counts", "measured": 0, "description": "zeros: the camera subtracts its dark"})
        _put(exchange, "theta", np.asarray(scan.theta_deg, dtype=float)[kept], units="deg")
        exchange["frame"] = kept
        _put(exchange, "exposure_time", np.asarray(scan.exposure_s, dtype=float)[kept], units="s")
        exchange["projection_flat_group"] = np.asarray(scan.half)[kept]
        if flats:
            exchange["flat_group"] = np.array([k for k, _ in flats])
            seconds = np.array([scan.flats[k].exposure_s[i] for k, i in flats], dtype=float)
            _put(exchange, "exposure_time_white", seconds, units="s")
        if np.isfinite(scan.time_s).any():
            _put(exchange, "time", np.asarray(scan.time_s, dtype=float)[kept], units="s")
    progress("export", total, total)


def write_aligned(
    path: str | os.PathLike[str],
    shape: tuple[int, int, int],
    slabs: Any,
    *,
    name: str,
    energy_ev: float,
    theta_deg: FloatArray,
    pixel_nm: float,
) -> None:
    """Write aligned projections (angle, y, x) of one energy as DataExchange; absorbance, float32, no flats needed.

    Parameters
    ----------
    path : path-like
        A new file.
    shape : (int, int, int)
        (angle, y, x).
    slabs : iterable of (int, (angle, rows, x) array)
        First row and values, from top to bottom.
    name : str
    energy_ev : float
    theta_deg : (angles,) array
    pixel_nm : float
        Of the common grid.

    Raises
    ------
    XanesTomoError
        As `write_nxtomo`.
    """
    import h5py

    path = Path(path)
    if len(theta_deg) != shape[0]:
        raise XanesTomoError(f"{path.name}: expected an angle for each of {shape[0]} projections, got {len(theta_deg)}")
    with new_file(path) as temporary, writing(path), h5py.File(temporary, "w") as file:
        _head(file, energy_ev, pixel_nm)
        file["measurement/sample/name"] = name
        data = file.create_dataset("exchange/data", shape, np.dtype("<f4"))
        data.attrs.update({"axes": "theta:y:x", "units": "1", "description": "absorbance, -ln(I/I0), aligned"})
        _put(file["exchange"], "theta", np.asarray(theta_deg, dtype=float), units="deg")
        for y0, values in slabs:
            data[:, y0 : y0 + values.shape[1]] = values
