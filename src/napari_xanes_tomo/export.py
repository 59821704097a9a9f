"""What a measurement or a run gives to other programs: raw data, shifts, aligned projections, volumes and maps.

Every file appears whole and none is written over. A folder knows what it holds (``export.json``): the same export into
it goes on with the files that are not there yet, another one is refused.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .io.atomic import atomic_write, new_file, writing
from .io.exchange_write import frames_to_write, write_aligned, write_data_exchange, write_nxtomo
from .io.store import Journal, read_map_attributes, read_map_levels
from .io.tables import read_shifts, rows_alignments
from .io.tiff import write_stack
from .maps import AlignedEnergy, placed_rows
from .model import EnergyScan, Progress, Series, XanesTomoError, no_progress
from .recipe import Recipe, parameter_key
from .reconstruction import angular_weights, fbp
from .workflow import Workflow

__all__ = ["FORMATS", "Exported", "Format", "export_maps", "export_scan", "export_shifts", "export_workflow"]

Format = Literal[
    "nxtomo", "data-exchange", "aligned-tiff", "aligned-data-exchange", "volumes-tiff", "maps-tiff", "shifts"
]
FORMATS: Mapping[str, str] = {
    "nxtomo": "raw counts, flats, angles and energy as NXtomo (.nx), for nabu",
    "data-exchange": "the same as DataExchange (.h5), for TomoPy and tomocupy",
    "aligned-tiff": "aligned projections, absorbance, one TIFF stack an energy",
    "aligned-data-exchange": "aligned projections, absorbance, one .h5 an energy",
    "volumes-tiff": "linear attenuation in 1/cm, one TIFF stack (y, z, x) an energy",
    "maps-tiff": "one TIFF stack (y, z, x) a map",
    "shifts": "tables of displacements for nabu and TomoPy",
}
RAW = ("nxtomo", "data-exchange")
SLAB_ROWS = 32
_MANIFEST = "export.json"


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes
    ----------
    files : tuple of Path
        Everything the export consists of.
    kept : int
        How many of them were there already, from an earlier start of the same export.
    notes : tuple of str
        What was left out, and why.
    """

    files: tuple[Path, ...]
    kept: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _File:
    """One file to write: its name, and what writes it to a place."""

    name: str
    write: Callable[[Path, Progress], None]


@dataclass
class _Plan:
    key: str
    files: list[_File] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _run(plan: _Plan, folder: Path, format: str, progress: Progress) -> Exported:
    """Write the files of a plan that are not there yet."""
    manifest = folder / _MANIFEST
    if folder.exists() and not folder.is_dir():
        raise XanesTomoError(f"{folder}: expected a folder to export to, it is a file")
    if manifest.exists():
        try:
            known = json.loads(manifest.read_text(encoding="utf-8")).get("key")
        except (OSError, ValueError, AttributeError):
            known = None
        if known != plan.key:
            raise XanesTomoError(f"{folder}: it holds another export, which is not written over; choose another folder")
    elif folder.exists() and any(folder.iterdir()):
        raise XanesTomoError(f"{folder}: expected a new or empty folder, it holds something else; choose another")
    told = {"format": format, "what": FORMATS[format], "key": plan.key, "files": [f.name for f in plan.files],
            "notes": plan.notes}  # fmt: skip
    if not manifest.exists():
        atomic_write(manifest, (json.dumps(told, indent=1) + "\n").encode("utf-8"))
    kept, n = 0, len(plan.files)
    for k, file in enumerate(plan.files):
        if (folder / file.name).exists():
            kept += 1
            continue

        def within(what: str, done: int, total: int, k: int = k) -> None:
            progress("export", round(1000 * (k + done / max(total, 1))), 1000 * n)

        within("export", 0, 1)
        file.write(folder / file.name, within)
    progress("export", 1000 * n, 1000 * n)
    return Exported(tuple(folder / f.name for f in plan.files), kept, tuple(plan.notes))


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._+-" else "_" for c in name).strip(".") or "scan"


def _stem(name: str, e: int, energy_ev: float) -> str:
    return f"{_safe(name)}_{e:03d}_{energy_ev:.2f}_eV"


def _wanted(energies_ev: npt.NDArray[Any], only: Sequence[float] | None) -> list[int]:
    """Return the numbers of the energies asked for; every one that recurs counts."""
    if not only:
        return list(range(len(energies_ev)))
    out: list[int] = []
    for value in only:
        near = np.flatnonzero(np.abs(energies_ev - value) <= 0.5)
        if not near.size:
            listed = ", ".join(f"{v:g}" for v in energies_ev[:8]) + (" ..." if len(energies_ev) > 8 else "")
            raise XanesTomoError(f"--energy {value:g}: expected one of the energies {listed} eV")
        out += near.tolist()
    return sorted(set(out))


# ------------------------------------------------------------------------------------------------------- raw data


def export_scan(
    series: Series,
    folder: str | Path,
    format: Format,
    *,
    only: Sequence[float] | None = None,
    one_file: bool = False,
    excluded: Mapping[int, str] | None = None,
    flats: Mapping[int, str] | None = None,
    progress: Progress = no_progress,
) -> Exported:
    """Write the raw counts of a measurement, one file an energy.

    Parameters
    ----------
    series : Series
    folder : path
        New or empty, or one of the same export that was stopped.
    format : {"nxtomo", "data-exchange"}
    only : sequence of float, optional
        Energies, eV; all by default.
    one_file : bool
        All energies as the entries of one NXtomo file.
    excluded : mapping of int to str, optional
        Energies to leave out, with the reason.
    flats : mapping of int to str, optional
        Flats chosen for an energy by hand; of ``half N`` (from 1) only those are written.
    progress : Progress

    Raises
    ------
    XanesTomoError
        The folder holds something else, a frame cannot be read, or the disk is full.
    """
    if format not in RAW:
        raise XanesTomoError(f"export: expected nxtomo or data-exchange for raw data, got {format}")
    if one_file and format != "nxtomo":
        raise XanesTomoError("export: one file for all energies goes with nxtomo only")
    stamps = [
        [float(s.energy_ev), s.frames.fingerprint(), list(s.status), [f.frames.fingerprint() for f in s.flats]]
        for s in series.scans
    ]
    chosen = _wanted(series.energies_ev, only)
    plan = _Plan(parameter_key(format, series.name, stamps, chosen, one_file, sorted((excluded or {}).items()),
                               sorted((flats or {}).items())))  # fmt: skip
    scans: list[tuple[int, EnergyScan, list[int] | None]] = []
    for e in chosen:
        scan, sets = series.scans[e], None
        where = f"{scan.energy_ev:g} eV: "
        use = (flats or {}).get(e, "")
        usable, left, lost = frames_to_write(scan)
        if excluded and e in excluded:
            plan.notes.append(f"{where}left out, {excluded[e]}")
            continue
        if not usable:
            plan.notes.append(f"{where}left out, no projection can be used")
            continue
        if left:
            how = "kept as invalid (image_key 3)" if format == "nxtomo" else "left out"
            plan.notes.append(f"{where}{left} excluded projections are {how}")
        if lost:
            plan.notes.append(f"{where}{lost} projections that cannot be read are left out")
        if use.startswith("half "):
            sets = [int(use.removeprefix("half ")) - 1]
            if sets[0] >= len(scan.flats):
                raise XanesTomoError(f"{where}expected one of {len(scan.flats)} halves, got flats of {use}")
            plan.notes.append(f"{where}only the flats of {use} are written, as chosen by hand")
        good = [any(s == "ok" for s in f.status) for f in scan.flats]
        if not any(good[k] for k in (range(len(good)) if sets is None else sets) if k < len(good)):
            plan.notes.append(f"{where}there is no flat that can be used: none is written")
        else:
            plan.notes += [
                f"{where}the flats of half {k + 1} cannot be used: it is tied to the nearest half"
                for k in np.unique(np.asarray(scan.half)).tolist()
                if sets is None and 0 <= k < len(good) and not good[k]
            ]
        scans.append((e, scan, sets))
    if not scans:
        raise XanesTomoError(f"{series.name}: expected an energy to export, got none ({'; '.join(plan.notes[:3])})")
    if one_file:

        def everything(path: Path, report: Progress) -> None:
            write_nxtomo(
                path, [s for _, s, _ in scans], name=series.name, sets=[u for _, _, u in scans], progress=report
            )

        plan.files.append(_File(f"{_safe(series.name)}.nx", everything))
    else:
        for e, scan, sets in scans:

            def one(path: Path, report: Progress, s: EnergyScan = scan, u: list[int] | None = sets) -> None:
                if format == "nxtomo":
                    write_nxtomo(path, [s], name=series.name, sets=[u], progress=report)
                else:
                    write_data_exchange(path, s, name=series.name, sets=u, progress=report)

            end = "nx" if format == "nxtomo" else "h5"
            plan.files.append(_File(f"{_stem(series.name, e, scan.energy_ev)}.{end}", one))
    return _run(plan, Path(folder), format, progress)


# --------------------------------------------------------------------------------------------------------- a run


def export_workflow(
    workflow: Workflow,
    folder: str | Path,
    format: Format,
    *,
    only: Sequence[float] | None = None,
    one_file: bool = False,
    threads: int | None = None,
    progress: Progress = no_progress,
) -> Exported:
    """Write what a run knows: its raw data without what was excluded, aligned projections, volumes, maps or shifts.

    Aligned projections are placed once, straight from the raw frames, as the maps are: absorbance on the common grid,
    the rotation axis in the middle column ``(n - 1) / 2``. Volumes are their filtered back-projections.

    Parameters
    ----------
    workflow : Workflow
    folder, format, only, one_file
        As in `export_scan`; every format.
    threads : int, optional
    progress : Progress

    Raises
    ------
    XanesTomoError
        The run has not come that far, or as in `export_scan`.
    """
    if format == "maps-tiff":
        return export_maps(workflow.output.folder, folder, progress=progress)
    if format == "shifts":
        workflow.write_tables()
        return export_shifts(workflow.output.folder, folder, only=only, progress=progress)
    state = workflow.state
    if format in RAW:
        if workflow.series.scans[0].given:
            raise XanesTomoError(
                f"export: expected raw frames for {format}, this run began with what was made elsewhere"
            )
        n = len(workflow.series.scans)
        scans = tuple(workflow.scan(e) for e in range(n))
        series = Series(workflow.series.name, scans, workflow.series.problems, workflow.series.n_expected)
        asked = {e: workflow.recipe.absorbance.flats_for(s.energy_ev) for e, s in enumerate(scans)}
        return export_scan(
            series, folder, format, only=only, one_file=one_file, excluded=state.manual.energies,
            flats={**asked, **state.manual.flats}, progress=progress,
        )  # fmt: skip
    given = workflow.series.scans[0].given
    if workflow.series.scans[0].gridded or (workflow.single and format == "volumes-tiff"):
        raise XanesTomoError(f"export: expected projections for {format}, got {given or 'images'} in this run")
    items, numbers = workflow.aligned()
    if not items:
        raise XanesTomoError("export: expected registered energies, got none; run the registration first")
    energies = workflow.series.energies_ev
    wanted = set(_wanted(energies, only))
    keys = [(e, state[("registration", e)].candidate) for e in numbers if e in wanted]
    plan = _Plan(parameter_key(format, [[e, "" if c is None else c.key] for e, c in keys]))
    plan.notes += [f"{energies[e]:g} eV: left out, it was not registered" for e in sorted(wanted - set(numbers))]
    if not keys:
        raise XanesTomoError(f"export: expected a registered energy, got none ({'; '.join(plan.notes[:3])})")
    assert state.reference is not None
    pixel_nm = workflow.series.scans[state.reference].pixel_size_nm
    name = workflow.series.name
    for e, item in zip(numbers, items, strict=True):
        if e not in wanted:
            continue
        left = len(item.scan) - len(item.used)
        if left:
            plan.notes.append(f"{energies[e]:g} eV: {left} projections that are excluded or missing are left out")

        def write(path: Path, report: Progress, item: AlignedEnergy = item) -> None:
            _write_placed(path, item, format, name, pixel_nm, threads, report)

        end = "h5" if format == "aligned-data-exchange" else "ome.tif"
        plan.files.append(_File(f"{_stem(name, e, energies[e])}.{end}", write))
    if format == "aligned-tiff":
        text = "file,page,energy_ev,theta_deg,frame,pixel_size_nm\n"
        for file, (e, item) in zip(
            plan.files, [(e, i) for e, i in zip(numbers, items, strict=True) if e in wanted], strict=True
        ):
            theta = np.asarray(item.scan.theta_deg, dtype=float)
            text += "".join(
                f"{file.name},{page},{float(energies[e])!r},{float(theta[i])!r},{i},{float(pixel_nm)!r}\n"
                for page, i in enumerate(item.used.tolist())
            )
        plan.files.append(_text_file("projections.csv", text))
    elif format == "volumes-tiff":
        text = "file,energy_ev,pixel_size_nm,unit\n"
        listed = zip(plan.files, [e for e in numbers if e in wanted], strict=True)
        text += "".join(f"{file.name},{float(energies[e])!r},{float(pixel_nm)!r},1/cm\n" for file, e in listed)
        plan.files.append(_text_file("volumes.csv", text))
    return _run(plan, Path(folder), format, progress)


def _write_placed(
    path: Path,
    item: AlignedEnergy,
    format: str,
    name: str,
    pixel_nm: float,
    threads: int | None,
    progress: Progress,
) -> None:
    """Write one energy, aligned, slab by slab."""
    grid = item.grid_shape
    theta = np.asarray(item.scan.theta_deg, dtype=float)[item.used]
    weights = angular_weights(theta)
    volume = format == "volumes-tiff"

    def slabs() -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        for y0 in range(0, grid[0], SLAB_ROWS):
            progress("export", y0, grid[0])
            rows = (y0, min(grid[0], y0 + SLAB_ROWS))
            gridded = item.scan.gridded
            placed = (
                item.scan.frames.read_rows([0], *rows) if gridded else placed_rows(item, rows, grid, threads=threads)
            )
            if volume:
                placed = fbp(placed, theta, weights=weights, threads=threads) * np.float32(1e7 / pixel_nm)
            yield y0, placed

    if format == "aligned-data-exchange":
        write_aligned(
            path, (len(theta), *grid), slabs(), name=name, energy_ev=item.scan.energy_ev, theta_deg=theta,
            pixel_nm=pixel_nm,
        )  # fmt: skip
    elif volume:
        write_stack(path, (grid[0], grid[1], grid[1]), slabs(), axis=0, pixel_nm=pixel_nm, page_nm=pixel_nm)
    else:
        write_stack(path, (len(theta), *grid), slabs(), axis=1, pixel_nm=pixel_nm)
    progress("export", grid[0], grid[0])


def _text_file(name: str, text: str) -> _File:
    def write(path: Path, _: Progress) -> None:
        with new_file(path) as temporary, writing(path):
            temporary.write_text(text, encoding="utf-8")

    return _File(name, write)


# ------------------------------------------------------------------------------------------- from the folder alone


def export_maps(out: str | Path, folder: str | Path, *, progress: Progress = no_progress) -> Exported:
    """Write every map of the run in `out` as a TIFF stack (y, z, x) float32, a slab in memory at a time."""
    store = Path(out) / "maps.ome.zarr"
    if not store.is_dir():
        raise XanesTomoError(f"{out}: expected finished maps, got none; run up to the maps first")
    whole, each = read_map_attributes(store)
    voxel = float(whole["voxel_nm"])
    plan = _Plan(parameter_key("maps-tiff", whole.get("key", ""), voxel, list(each)))
    plan.notes += [f"{name}: absent, {why}" for name, why in whole["absent"].items()]
    for name in each:

        def write(path: Path, report: Progress, name: str = name) -> None:
            array = read_map_levels(store, name)[0]
            step = max(1, int(array.chunks[0][0]))

            def slabs() -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
                for y0 in range(0, array.shape[0], step):
                    report("export", y0, array.shape[0])
                    yield y0, np.asarray(array[y0 : y0 + step].compute(scheduler="synchronous"))

            write_stack(path, array.shape, slabs(), pixel_nm=voxel, page_nm=voxel)

        plan.files.append(_File(f"{_safe(name)}.ome.tif", write))
    return _run(plan, Path(folder), "maps-tiff", progress)


_HEAD = """\
# Displacement of the content of every projection that is used, px of the frames of {energy:g} eV, in their order.
# magnification {magnification:.6f} and roll {roll:.5f} deg (+ from x to y) against the common grid are not in it.
"""
_NABU = """\
# Columns: horizontal (+ right), vertical (+ down). nabu: [reconstruction] translation_movements_file, and
# rotation_axis_position at the middle of the frame, (columns - 1) / 2: the horizontal column contains the axis.
"""
_TOMOPY = """\
# Columns: theta_deg, sx (rows, + down), sy (columns, + right). tomopy.prep.alignment.shift_images(prj, sx, sy) undoes
# it; the rotation axis is then at the middle of the frame, column (columns - 1) / 2.
"""


def export_shifts(
    out: str | Path,
    folder: str | Path,
    *,
    only: Sequence[float] | None = None,
    progress: Progress = no_progress,
) -> Exported:
    """Write the displacements of the run in `out` as tables for nabu and TomoPy, two text files an energy.

    A line for every projection that is used, in the order in which `export_scan` writes them. Both programs look for
    what they correct at ``p = q + s``: the columns are displacements of the content as this package has them, nabu's
    ``horizontal vertical``, TomoPy's ``sx sy`` being the vertical and the horizontal one.
    """
    output = Path(out)
    table = output / "tables" / "shifts.csv"
    if not table.is_file():
        raise XanesTomoError(f"{out}: expected tables/shifts.csv, got none; run the jitter correction first")
    groups = rows_alignments(read_shifts(table))
    events = Journal(output).events
    name = next((str(e.payload.get("input_name", "")) for e in events if e.kind == "run"), "")
    texts = [str(e.payload.get("recipe", "")) for e in events if e.kind in ("run", "recipe")]
    bin = Recipe.from_text(texts[-1], f"the recipe in {output.name}").scan.bin if texts else 1
    energies = np.array([energy for energy, _, _ in groups])
    wanted = _wanted(energies, only)
    plan = _Plan(parameter_key("shifts", bin, wanted, [a.shift[np.isfinite(a.shift)].tolist() for _, _, a in groups]))
    for e in wanted:
        energy, theta, alignment = groups[e]
        use = np.array([s == "ok" for s in alignment.status]) & np.isfinite(alignment.shift).all(axis=1)
        if not use.any():
            plan.notes.append(f"{energy:g} eV: left out, it has no displacements")
            continue
        if not np.isfinite(alignment.magnification):
            plan.notes.append(f"{energy:g} eV: not registered; its displacements hold within this energy alone")
        head = _HEAD.format(energy=energy, magnification=alignment.magnification, roll=alignment.roll_deg)
        stem, shift = _stem(name, e, energy), alignment.shift[use] / bin
        plan.files.append(_text_file(f"{stem}_nabu.txt", head + _NABU + _columns(shift[:, ::-1])))
        table_of = np.column_stack([theta[use], shift])
        plan.files.append(_text_file(f"{stem}_tomopy.txt", head + _TOMOPY + _columns(table_of)))
    if not plan.files:
        raise XanesTomoError(f"{out}: expected displacements, got none ({'; '.join(plan.notes[:3])})")
    return _run(plan, Path(folder), "shifts", progress)


def _columns(values: npt.NDArray[Any]) -> str:
    text = io.StringIO()
    np.savetxt(text, values, fmt="%.6f")
    return text.getvalue()
