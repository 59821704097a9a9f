"""The tables of a run: plain CSV, header first, an empty cell where a value does not exist."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from napari_xanes_tomo.model import Alignment, Series, XanesTomoError

from .atomic import atomic_write

__all__ = [
    "EnergyRow",
    "QualityTable",
    "ShiftRow",
    "read_energies",
    "read_quality",
    "read_shifts",
    "rows_alignments",
    "shifts_rows",
    "write_energies",
    "write_quality",
    "write_shifts",
]

NAN = math.nan


@dataclass(frozen=True)
class ShiftRow:
    """One projection of ``tables/shifts.csv``; NaN is an empty cell.

    Attributes
    ----------
    energy_ev, theta_deg : float
        Energy (eV) and the angle used (degrees).
    frame : int
        0-based number of the projection within its energy.
    shift_y_px, shift_x_px : float
        Displacement of the content, raw detector pixels, positive down / right.
    sigma_y_px, sigma_x_px : float
        Its standard error: the random part of this projection, raw detector pixels.
    magnification, roll_deg : float
        Of the energy; 1 and 0 at the reference.
    status : str
        ``ok``, ``excluded:<why>`` or ``unreadable:<why>``.
    """

    energy_ev: float
    theta_deg: float
    frame: int
    shift_y_px: float = NAN
    shift_x_px: float = NAN
    sigma_y_px: float = NAN
    sigma_x_px: float = NAN
    magnification: float = NAN
    roll_deg: float = NAN
    status: str = "ok"


@dataclass(frozen=True)
class EnergyRow:
    """One energy of ``tables/energies.csv``; NaN is an empty cell.

    Attributes
    ----------
    energy_ev : float
        eV.
    magnification, magnification_sigma : float
        Measured, relative to the reference energy, with its standard error.
    roll_deg : float
        Degrees.
    center_px, center_sigma_px : float
        Position of the rotation axis relative to the detector centre, raw detector pixels, with its error.
    sigma_ty_px, sigma_tx_px, sigma_tz_px : float
        Errors of the shift common to all projections of the energy: along the axis, along x at theta = 0 and
        along x at theta = 90 degrees, raw detector pixels. They are those beside a given axis: most of an error of the
        axis looks like a shift of the object and is compensated by it. What is left of it in a projection is the error
        times ``1 - (a cos(theta) + b sin(theta))``, the best of these over its angles: 0.44 of it, rms of half a turn.
    pixel_size_nm : float
        nm.
    reference : bool
        Whether this is the reference energy (``1`` or ``0`` in the file).
    status : str
        ``ok``, ``excluded:<why>`` or ``unreadable:<why>``.
    """

    energy_ev: float
    magnification: float = NAN
    magnification_sigma: float = NAN
    roll_deg: float = NAN
    center_px: float = NAN
    center_sigma_px: float = NAN
    sigma_ty_px: float = NAN
    sigma_tx_px: float = NAN
    sigma_tz_px: float = NAN
    pixel_size_nm: float = NAN
    reference: bool = False
    status: str = "ok"


@dataclass(frozen=True)
class QualityTable:
    """Scores of n projections and what follows from them: ``tables/quality.csv``.

    Attributes
    ----------
    energy_ev, theta_deg : (n,) array
        eV and degrees.
    frame : (n,) int array
        0-based number of the projection within its energy.
    scores : mapping of str to (n,) array
        One column a score; NaN is an empty cell.
    verdict : tuple of str
        One a projection.
    """

    energy_ev: npt.NDArray[np.float64]
    theta_deg: npt.NDArray[np.float64]
    frame: npt.NDArray[np.int64]
    scores: Mapping[str, npt.NDArray[np.float64]]
    verdict: tuple[str, ...]


_Row = TypeVar("_Row", ShiftRow, EnergyRow)
_ALWAYS = ("energy_ev", "theta_deg", "frame", "status")
_KEYS = ("energy_ev", "theta_deg", "frame")


def shifts_rows(
    series: Series, alignments: Sequence[Alignment | None], reasons: Sequence[str] | None = None
) -> list[ShiftRow]:
    """Return one row per planned projection of `series`, in the order of acquisition.

    Parameters
    ----------
    series : Series
        The measurement.
    alignments : sequence of Alignment or None
        One per energy scan; None for an energy that was not aligned, whose usable projections become
        ``excluded:not aligned``, or what `reasons` says.
    reasons : sequence of str, optional
        One status per energy scan, for those that were not aligned.

    Notes
    -----
    The status of the scan goes before that of the alignment. An unreadable projection has no shift, whatever its
    alignment holds; an excluded one keeps the shift that was measured.
    """
    if len(alignments) != len(series.scans):
        raise ValueError(f"alignments: expected one for each of {len(series.scans)} energies, got {len(alignments)}")
    rows = []
    why = ["excluded:not aligned"] * len(alignments) if reasons is None else reasons
    for scan, alignment, reason in zip(series.scans, alignments, why, strict=True):
        if alignment is not None and len(alignment.shift) != len(scan):
            raise ValueError(f"alignment at {scan.energy_ev} eV: expected {len(scan)} shifts, got "
                             f"{len(alignment.shift)}")  # fmt: skip
        for frame, theta in enumerate(scan.theta_deg):
            status = scan.status[frame]
            shift = sigma = (NAN, NAN)
            magnification = roll = NAN
            if alignment is None:
                status = status if status != "ok" else reason
            else:
                status = status if status != "ok" else alignment.status[frame]
                magnification, roll = alignment.magnification, alignment.roll_deg
                if not status.startswith("unreadable"):
                    shift, sigma = tuple(alignment.shift[frame]), tuple(alignment.sigma[frame])
            rows.append(
                ShiftRow(
                    float(scan.energy_ev), float(theta), frame, float(shift[0]), float(shift[1]),
                    float(sigma[0]), float(sigma[1]), float(magnification), float(roll), status,
                )
            )  # fmt: skip
    return rows


def rows_alignments(rows: Iterable[ShiftRow]) -> list[tuple[float, npt.NDArray[np.float64], Alignment]]:
    """Return ``(energy in eV, theta (n,) in degrees, Alignment)`` of every energy scan in `rows`.

    A new scan begins where the energy changes or the frame number does not grow. Empty cells are NaN.
    """
    groups: list[list[ShiftRow]] = []
    for row in rows:
        last = groups[-1][-1] if groups else None
        if last is None or row.energy_ev != last.energy_ev or row.frame <= last.frame:
            groups.append([])
        groups[-1].append(row)
    return [
        (
            group[0].energy_ev,
            np.array([r.theta_deg for r in group]),
            Alignment(
                np.array([[r.shift_y_px, r.shift_x_px] for r in group]),
                np.array([[r.sigma_y_px, r.sigma_x_px] for r in group]),
                group[0].magnification,
                group[0].roll_deg,
                tuple(r.status for r in group),
            ),
        )
        for group in groups
    ]


def write_shifts(path: str | Path, rows: Iterable[ShiftRow]) -> None:
    """Write ``shifts.csv``, replacing it in one step; every number reads back to the same float64."""
    _write_rows(Path(path), ShiftRow, rows)


def read_shifts(path: str | Path) -> list[ShiftRow]:
    """Read ``shifts.csv``; an empty cell becomes NaN, columns it does not know are passed over."""
    return _read_rows(Path(path), ShiftRow)


def write_energies(path: str | Path, rows: Iterable[EnergyRow]) -> None:
    """Write ``energies.csv``, replacing it in one step; every number reads back to the same float64."""
    _write_rows(Path(path), EnergyRow, rows)


def read_energies(path: str | Path) -> list[EnergyRow]:
    """Read ``energies.csv``; an empty cell becomes NaN, columns it does not know are passed over."""
    return _read_rows(Path(path), EnergyRow)


def write_quality(path: str | Path, table: QualityTable) -> None:
    """Write ``quality.csv``, replacing it in one step: keys, one column per score, the verdict."""
    n = len(table.frame)
    columns: list[Sequence[Any] | npt.NDArray[Any]] = [
        table.energy_ev,
        table.theta_deg,
        table.frame,
        *table.scores.values(),
        table.verdict,
    ]
    header = [*_KEYS, *table.scores, "verdict"]
    for name, column in zip(header, columns, strict=True):
        if len(column) != n:
            raise ValueError(f"column {name}: expected {n} values, got {len(column)}")
    if len(set(header)) != len(header):
        raise ValueError(f"columns of quality.csv: expected distinct names, got {header}")
    _write(Path(path), header, zip(*columns, strict=True))


def read_quality(path: str | Path) -> QualityTable:
    """Read ``quality.csv``; every column but the keys and the verdict is a score, an empty cell NaN."""
    path = Path(path)
    header, lines = _read(path, (*_KEYS, "verdict"))
    cells: dict[str, list[Any]] = {name: [] for name in header}
    for number, line in lines:
        for name, cell in zip(header, line, strict=True):
            cells[name].append(_parse(path, number, name, cell, _kind(name)))
    scores = {n: np.array(c, dtype=np.float64) for n, c in cells.items() if n not in (*_KEYS, "verdict")}
    return QualityTable(
        np.array(cells["energy_ev"], dtype=np.float64),
        np.array(cells["theta_deg"], dtype=np.float64),
        np.array(cells["frame"], dtype=np.int64),
        scores,
        tuple(cells["verdict"]),
    )


def _kind(name: str) -> Callable[[str], Any]:
    if name in ("status", "verdict"):
        return str
    kinds: dict[str, Callable[[str], Any]] = {"frame": int, "reference": _flag}
    return kinds.get(name, float)


def _flag(cell: str) -> bool:
    return {"1": True, "0": False, "true": True, "false": False}[cell.strip().lower()]


def _text(value: Any) -> str:
    """One cell: the shortest digits that give the same float64 again, nothing for what does not exist."""
    if value is None:
        return ""
    if isinstance(value, str):
        return " ".join(value.splitlines())  # one row is one line, for programs that read it so
    if isinstance(value, (bool, np.bool_)):
        return str(int(value))
    if isinstance(value, (int, np.integer)):
        return str(int(value))
    number = float(value)
    return repr(number) if math.isfinite(number) else ""


def _write(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    filled = [(i, name) for i, name in enumerate(header) if name in _ALWAYS]
    for row in rows:
        cells = [_text(value) for value in row]
        for i, name in filled:
            if not cells[i]:
                raise ValueError(f"{path.name}: {name} is always filled, got {row[i]!r}")
        writer.writerow(cells)
    atomic_write(path, buffer.getvalue().encode("utf-8"))


def _write_rows(path: Path, kind: type[_Row], rows: Iterable[_Row]) -> None:
    names = [f.name for f in dataclasses.fields(kind)]
    _write(path, names, ([getattr(row, name) for name in names] for row in rows))


def _read(path: Path, expected: Sequence[str]) -> tuple[list[str], list[tuple[int, list[str]]]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise XanesTomoError(f"{path}: expected a CSV table, but it cannot be read ({error})") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    lines: list[tuple[int, list[str]]] = []
    try:
        lines.extend((reader.line_num, line) for line in reader if line)
    except csv.Error as error:
        raise XanesTomoError(f"{path}, line {reader.line_num}: not a line of CSV ({error})") from error
    header = lines[0][1] if lines else []
    missing = [name for name in expected if name not in header]
    if missing or len(set(header)) != len(header):
        raise XanesTomoError(
            f"{path}: expected a header with the columns {','.join(expected)}, got {','.join(header)[:200]!r}"
        )
    for number, line in lines[1:]:
        if len(line) != len(header):
            raise XanesTomoError(f"{path}, line {number}: expected {len(header)} cells, got {len(line)}")
    return header, lines[1:]


def _parse(path: Path, number: int, name: str, cell: str, kind: Callable[[str], Any]) -> Any:
    if cell == "" and kind is float and name not in _ALWAYS:
        return NAN
    if cell == "" and kind is _flag:
        return False
    try:
        if cell == "" and name in _ALWAYS:
            raise ValueError
        return kind(cell)
    except (ValueError, KeyError):
        what = {int: "a whole number", float: "a number", _flag: "1 or 0"}.get(kind, "a text")
        raise XanesTomoError(f"{path}, line {number}: {name}: expected {what}, got {cell[:40]!r}") from None


def _read_rows(path: Path, kind: type[_Row]) -> list[_Row]:
    names = [f.name for f in dataclasses.fields(kind)]
    header, lines = _read(path, names)
    order = [(name, header.index(name), _kind(name)) for name in names]
    return [kind(*(_parse(path, number, name, line[i], k) for name, i, k in order)) for number, line in lines]
