"""Reference spectra that users bring: XDI, Athena projects, CSV, two columns.

The files come from anywhere: they are parsed as text, never run, and bounded in size.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from napari_xanes_tomo.edges import ReferenceSpectrum
from napari_xanes_tomo.model import FloatArray, XanesTomoError

__all__ = ["read_reference", "read_references"]

MOST_BYTES = 64 * 2**20  # of a file, and of what a compressed one holds
_FEWEST = 5
_ENERGY = re.compile(r"^(energy|e|en|ev|kev|photon.?energy|mono.*energy|energy.*)$", re.IGNORECASE)
_ABSORPTION = (
    re.compile(r"^(mu|xmu|mutrans|mu_?trans|absorption|absorbance|abs|mu\(e\)|xanes|intensity)$", re.IGNORECASE),
    re.compile(
        r"^(norm|normalized|normalised|flat|nor|normmutrans|norm_?mu.*|normalized.*|normalised.*)$", re.IGNORECASE
    ),
    re.compile(r"^(mufluor|mu_?fluor|fluorescence|mu.*)$", re.IGNORECASE),
)
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


def read_references(path: str | Path) -> tuple[ReferenceSpectrum, ...]:
    """Read all the spectra of a file.

    Parameters
    ----------
    path : str or Path
        XDI (``.xdi``, doi 10.1088/1742-6596/712/1/012108), an Athena project (``.prj``, compressed or not), or text
        in columns (``.csv``, ``.dat``, ``.txt``, ...): energy in eV (keV where no energy is above 200) first or in the
        column so named, then absorption, or columns named ``itrans`` (``i1``) and ``i0`` or ``ifluor`` and ``i0``.

    Raises
    ------
    XanesTomoError
        The file cannot be read, is larger than 64 MB, or holds no spectrum.
    """
    path = Path(path)
    text = _text(path)
    if path.suffix.lower() == ".prj" or "@args" in text[:20000] or text.startswith("# Athena project"):
        return _athena(text, path)
    return (_columns(text, path),)


def read_reference(path: str | Path, group: str | None = None) -> ReferenceSpectrum:
    """Read one spectrum of a file: `group` where it holds several; see `read_references`."""
    found = read_references(path)
    names = [r.name for r in found]
    if group is None:
        if len(found) == 1:
            return found[0]
        raise XanesTomoError(
            f"{Path(path).name}: expected one spectrum, got {len(found)} ({', '.join(names[:8])}); name one after #"
        )
    same = [r for r in found if r.name == group] or [r for r in found if r.name.lower() == group.lower()]
    if len(same) != 1:
        raise XanesTomoError(
            f"{Path(path).name}: expected a spectrum {group!r}, got {', '.join(names[:8]) or 'none'}"
            + ("; the name is there more than once" if same else "")
        )
    return same[0]


def _text(path: Path) -> str:
    if not path.is_file():
        raise XanesTomoError(f"{path}: expected the file of a reference spectrum, there is none")
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if data[:2] == b"\x1f\x8b" and len(data) <= MOST_BYTES:
            with gzip.open(path, "rb") as packed:
                data = packed.read(MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise XanesTomoError(f"{path.name}: the reference spectrum cannot be read ({error})") from None
    if len(data) > MOST_BYTES:
        raise XanesTomoError(f"{path.name}: expected a spectrum, got more than {MOST_BYTES // 2**20} MB")
    return data.decode("utf-8", errors="replace")


def _spectrum(name: str, energy: FloatArray, absorption: FloatArray, path: Path) -> ReferenceSpectrum:
    """Sort, average repeated energies, check."""
    good = np.isfinite(energy) & np.isfinite(absorption)
    if good.sum() < _FEWEST:
        raise XanesTomoError(f"{path.name}: expected a spectrum of at least {_FEWEST} points, got {int(good.sum())}")
    e, y = energy[good], absorption[good]
    if e.max() <= 200:
        e = e * 1000.0  # keV
    if e.min() < 100 or e.max() > 200_000:
        raise XanesTomoError(f"{path.name}: expected energies in eV, got {e.min():g} to {e.max():g}")
    unique, place = np.unique(e, return_inverse=True)
    mean = np.bincount(place, weights=y) / np.bincount(place)
    if len(unique) < _FEWEST or not np.ptp(mean) > 0:
        raise XanesTomoError(f"{path.name}: expected a spectrum, got {len(unique)} different energies and no change")
    return ReferenceSpectrum(name, unique, mean, None, path.name)


# ---------------------------------------------------------------------------------------------------- columns


def _columns(text: str, path: Path) -> ReferenceSpectrum:
    """XDI, CSV or columns."""
    names: dict[int, str] = {}
    units: dict[int, str] = {}
    title = ""
    header: list[str] = []
    rows: list[list[float]] = []
    numbers: list[int] = []  # of the lines that `rows` stand in
    for number, line in enumerate(text.splitlines(), 1):
        bare = line.strip().lstrip("\ufeff")
        if not bare:
            continue
        if bare[0] in "#;%!":
            comment = bare.lstrip("#;%! ").strip()
            column = re.match(r"Column\.(\d+)\s*:\s*(\S+)\s*(\S*)", comment, re.IGNORECASE)
            named = re.match(r"(?:Sample|Scan)\.name\s*:\s*(.+)", comment, re.IGNORECASE)
            if column:
                names[int(column[1]) - 1] = column[2]
                units[int(column[1]) - 1] = column[3]
            elif named and not title:
                title = named[1].strip()
            elif comment and not rows:
                header = _split(comment)
            continue
        fields = _split(bare)
        values = [_float(f) for f in fields]
        if all(v is not None for v in values):
            rows.append([v for v in values if v is not None])
            numbers.append(number)
        elif not rows:
            header = fields
        elif len(rows) < 2:
            rows.clear()
            numbers.clear()
    width = max(set(map(len, rows)), key=[len(r) for r in rows].count) if rows else 0
    table = np.array([r for r in rows if len(r) == width], dtype=float)
    if width < 2 or len(table) < _FEWEST:
        raise XanesTomoError(
            f"{path.name}: expected columns of energy and absorption, got {len(table)} rows of {width}"
        )
    if not names and len(header) == width:
        names = dict(enumerate(header))
    labels = [re.sub(r"[\s\[(].*$", "", names.get(i, "").strip().strip('"')) for i in range(width)]
    energy = next((i for i, label in enumerate(labels) if _ENERGY.match(label)), 0)
    if labels[energy].lower() in ("angle", "theta") or units.get(energy, "").lower() in ("deg", "degree", "radian"):
        raise XanesTomoError(f"{path.name}: expected energies in its first column, got angles")
    absorption = _absorption(table, labels, energy, path)
    lost = ~(np.isfinite(table[:, energy]) & np.isfinite(absorption))
    if lost.any():
        kept = [n for n, r in zip(numbers, rows, strict=True) if len(r) == width]
        more = f" (and {int(lost.sum()) - 1} lines more)" if lost.sum() > 1 else ""
        raise XanesTomoError(
            f"{path.name}, line {kept[int(np.argmax(lost))]}: expected an energy and its absorption, got no number"
            f"{more}; correct the line or delete it"
        )
    return _spectrum(title or path.stem, table[:, energy], absorption, path)


def _absorption(table: FloatArray, labels: list[str], energy: int, path: Path) -> FloatArray:
    low = [label.lower() for label in labels]
    for pattern in _ABSORPTION:
        for i, label in enumerate(labels):
            if i != energy and pattern.match(label):
                return table[:, i]

    def find(*wanted: str) -> FloatArray | None:
        return next((table[:, low.index(w)] for w in wanted if w in low), None)

    i0 = find("i0", "io", "mon", "monitor")
    through, fluorescence = find("itrans", "i1", "it"), find("ifluor", "if", "iff", "fluor")
    with np.errstate(divide="ignore", invalid="ignore"):
        if i0 is not None and through is not None:
            return np.asarray(-np.log(through / i0))
        if i0 is not None and fluorescence is not None:
            return np.asarray(fluorescence / i0)
    rest = [i for i in range(table.shape[1]) if i != energy]
    if len(rest) > 1 and any(low[i] for i in rest):
        raise XanesTomoError(
            f"{path.name}: expected a column of absorption (mu, xmu, norm, or i0 and itrans), got {', '.join(labels)}"
        )
    return table[:, rest[0]]


def _split(line: str) -> list[str]:
    separator = next((s for s in (",", ";", "\t") if s in line), None)
    return [f.strip() for f in (line.split(separator) if separator else line.split())]


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


# ---------------------------------------------------------------------------------------------- Athena projects


def _athena(text: str, path: Path) -> tuple[ReferenceSpectrum, ...]:
    """Read the records of an Athena project: Perl assignments of lists, taken as text.

    ``@args`` holds keys and values of a group, ``@x`` its energies, ``@y`` its absorption. The energy shift that was
    set in Athena (``bkg_eshift``) is applied.
    """
    found: list[ReferenceSpectrum] = []
    args: dict[str, str] = {}
    x: FloatArray | None = None
    y: FloatArray | None = None
    for line in text.splitlines():
        match = re.match(r"^[@$](args|x|y)\s*=\s*\((.*)\)\s*;\s*$", line)
        if match and match[1] == "args":
            args, x, y = _pairs(match[2]), None, None
        elif match and match[1] == "x":
            x = _numbers(match[2])
        elif match and match[1] == "y":
            y = _numbers(match[2])
        elif line.startswith("[record]") and x is not None and y is not None:
            _keep(found, args, x, y, path)
            args, x, y = {}, None, None
    if x is not None and y is not None:
        _keep(found, args, x, y, path)
    if not found:
        raise XanesTomoError(f"{path.name}: expected an Athena project with spectra, got none")
    return tuple(found)


def _keep(found: list[ReferenceSpectrum], args: dict[str, str], x: FloatArray, y: FloatArray, path: Path) -> None:
    """Add a record that is a spectrum over energies; others (chi(k), detectors) are left out."""
    if len(x) != len(y) or args.get("datatype", "xmu") not in ("xmu", "norm", "xanes"):
        return
    shift = _float(args.get("bkg_eshift", "0")) or 0.0
    name = args.get("label") or f"group {len(found) + 1}"
    try:
        found.append(_spectrum(name, x + (shift if math.isfinite(shift) else 0.0), y, path))
    except XanesTomoError:
        return


_ITEM = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"|([^\s,()'\"]+)")


def _items(text: str) -> Iterable[str]:
    for match in _ITEM.finditer(text):
        quoted = match[1] if match[1] is not None else match[2]
        yield match[3] if quoted is None else re.sub(r"\\(.)", r"\1", quoted)


def _pairs(text: str) -> dict[str, str]:
    items = list(_items(text.replace("=>", ",")))
    return dict(zip(items[::2], items[1::2], strict=False))


def _numbers(text: str) -> FloatArray:
    values = (item if re.fullmatch(_NUMBER, item) else "nan" for item in _items(text))
    return np.array([float(v) for v in values])
