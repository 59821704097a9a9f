"""From a scan script, a folder or a single file to a `Series`, with everything odd listed.

The script is the plan, the files are what happened. Energies come from the script, then the names, then the
headers; angles from the headers, then the script, then the names. Flats belong to the energy and to the
place in the script at which they were taken (without a script: by their counters), never by the angle in
their name, which is that of the projection before them.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from napari_xanes_tomo.io.exchange import is_exchange, open_exchange
from napari_xanes_tomo.io.xrm import XrmError, XrmFrames, XrmHeader, read_header
from napari_xanes_tomo.model import EnergyScan, FlatSet, Problem, Progress, Series, XanesTomoError, no_progress
from napari_xanes_tomo.recipe import ScanParameters

__all__ = ["ScriptBlock", "ScriptFrame", "is_scan_folder", "is_scan_script", "open_series", "parse_script"]

NAN = float("nan")
FEW_ANGLES = 8  # fewer usable angles make no tomogram
_ANGLE_TOLERANCE = 0.05  # degrees between the script and the stage that go unreported
_SNIFF = 4096
_LARGEST_SCRIPT = 64 << 20  # bytes; the real one of 13,400 frames has 1.8 MB
_NAMED_SINGLY = 5  # bad files of one energy that are named one by one; more are counted
_SUFFIXES = (".xrm", ".txrm")


class ScriptFrame(NamedTuple):
    """One ``collect``: the state of the machine at that line. Unknown values are NaN or 0."""

    name: str
    kind: str
    """``projection``, ``flat`` or ``dark``."""
    theta_deg: float
    exposure_s: float
    binning: int


@dataclass(frozen=True)
class ScriptBlock:
    """Everything collected between two settings of the energy.

    Attributes
    ----------
    energy_ev : float
        eV; NaN when neither the script nor the names tell.
    frames : tuple of ScriptFrame
        In the order of acquisition.
    zone_plate_um : float
        Position of the zone plate along the beam (``zpz``) when the first of them was collected; NaN where unknown.
    """

    energy_ev: float
    frames: tuple[ScriptFrame, ...]
    zone_plate_um: float = NAN


# ---------------------------------------------------------------------------------------------- names

_FLAT = re.compile(r"(?:^|_)ref(?:erence)?_|_ff(?:_?\d+)?(?:\.\w+)?$", re.IGNORECASE)
_DARK = re.compile(r"(?:^|_)dark_|_df(?:_?\d+)?(?:\.\w+)?$", re.IGNORECASE)
_ENERGY = re.compile(r"(?<![0-9.])(\d{3,6}(?:\.\d+|_\d(?=_?eV))?)_?eV(?![A-Za-z])", re.IGNORECASE)
_THETA = re.compile(r"_([+-]?\d{1,4}(?:\.\d+)?)_Degree", re.IGNORECASE)
_SHOT = re.compile(r"_(\d{3})of(\d{3})", re.IGNORECASE)
_REP = re.compile(r"^rep(\d+)_", re.IGNORECASE)
_COUNTER = re.compile(r"^(?:rep\d+_)?(?:ref_)?(\d{4,7})_(?!\d+of)", re.IGNORECASE)


class _Name(NamedTuple):
    """What a file name tells."""

    kind: str
    energy: float
    theta: float
    counter: int
    shot: int
    shots: int
    rep: int


def _kind(name: str) -> str:
    return "flat" if _FLAT.search(name) else "dark" if _DARK.search(name) else "projection"


def _last(pattern: re.Pattern[str], name: str) -> re.Match[str] | None:
    found = None
    for found in pattern.finditer(name):  # noqa: B007 - sample names may hold anything: match from the right
        pass
    return found


def _energy_in(name: str) -> float:
    found = _last(_ENERGY, name)
    return float(found.group(1).replace("_", ".")) if found else NAN


def _facts(name: str) -> _Name:
    theta, shot, counter, rep = _last(_THETA, name), _last(_SHOT, name), _COUNTER.match(name), _REP.match(name)
    return _Name(
        _kind(name),
        _energy_in(name),
        float(theta.group(1)) if theta else NAN,
        int(counter.group(1)) if counter else -1,
        int(shot.group(1)) if shot else 0,
        int(shot.group(2)) if shot else 0,
        int(rep.group(1)) if rep else 0,
    )


def _short(name: str) -> str:
    return name if len(name) <= 80 else name[:77] + "..."


# ---------------------------------------------------------------------------------------------- the script


def _word(text: str) -> tuple[str, str]:
    """First word of a text, and what follows it."""
    first, *rest = text.split(None, 1) or [""]
    return first, rest[0].strip() if rest else ""


def _number(text: str) -> float:
    """First number of a text, a comment behind it left out; NaN where there is none."""
    try:
        value = float(_word(text.partition(";")[0])[0][:40])
    except ValueError:
        return NAN
    return value if np.isfinite(value) else NAN


def parse_script(text: str) -> list[ScriptBlock]:
    """Read a scan script: SSRL's ``sete`` or APS's ``moveto energy``, ``collect`` and the state between.

    Case does not matter, unknown verbs are ignored. An energy that recurs gives a block of its own each
    time. Frames collected before any energy is set are grouped by the energy in their names.

    Raises
    ------
    XanesTomoError
        A name leads out of the script's folder.
    """
    blocks: list[ScriptBlock] = []
    frames: list[ScriptFrame] = []
    energy, named_energy = NAN, NAN
    theta, exposure, binning = NAN, NAN, 0
    zone_plate = at_first = NAN

    def close(block_energy: float) -> None:
        if frames:
            blocks.append(ScriptBlock(block_energy, tuple(frames), at_first))
            frames.clear()

    for line in text.splitlines():
        verb, rest = _word(line)
        verb = verb.lower()
        if verb == "collect":
            name = rest.partition(";")[0].strip().strip("\"'")
            if not name:
                continue
            if "/" in name or "\\" in name or ":" in name or "\0" in name or name in (".", ".."):
                raise XanesTomoError(
                    f"the script collects {_short(name)!r}: expected the plain name of a file beside the script, "
                    "got a path; nothing was read. Keep script and frames in one folder and names without folders"
                )
            if not name.lower().endswith(_SUFFIXES):
                name += ".xrm"
            kind = _kind(name)
            if energy != energy:  # not set by the script
                own = _energy_in(name)
                if own == own and own != named_energy:
                    if named_energy == named_energy:
                        close(named_energy)
                    named_energy = own
            at_first = at_first if frames else zone_plate
            frames.append(ScriptFrame(name, kind, theta, exposure, binning))
        elif verb == "moveto":
            axis, value = _word(rest)
            axis = axis.lower()
            if axis in ("t", "theta"):
                theta = _number(value)
            elif axis == "zpz":
                zone_plate = _number(value)
            elif axis == "energy":
                close(energy if energy == energy else named_energy)
                energy = _number(value)
        elif verb == "setexp":
            exposure = _number(rest)
        elif verb == "setbinning":
            value_binning = _number(rest)
            binning = int(value_binning) if 0 < value_binning <= 64 else 0
        elif verb == "sete":
            close(energy if energy == energy else named_energy)
            energy = _number(rest)
    close(energy if energy == energy else named_energy)
    return blocks


def _decode(raw: bytes) -> str:
    for bom, encoding in ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"), (b"\xef\xbb\xbf", "utf-8-sig")):
        if raw.startswith(bom):
            return raw.decode(encoding, errors="replace")
    return raw.decode("latin-1")


_VERBS = re.compile(r"^\s*(?:collect\s+\S|sete\s+\d|setexp\s+[\d.]|setbinning\s+\d|moveto\s+\w+\s+\S)", re.I | re.M)


def is_scan_script(path: str | os.PathLike[str]) -> bool:
    """Whether a file looks like a scan script, judged by its first 4 kB; never raises."""
    try:
        if not Path(path).is_file():  # a pipe would be waited for
            return False
        with Path(path).open("rb") as file:
            raw = file.read(_SNIFF)
    except (OSError, ValueError):
        return False
    if b"\0" in raw and not raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return False
    return len(_VERBS.findall(_decode(raw))) >= 2


def _is_text(name: str) -> bool:
    suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122 - called for thousands of names
    return suffix in ("", ".txt", ".scr", ".script")


def is_scan_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds XRM files or a scan script; never raises, stops at the first one found."""
    try:
        with os.scandir(path) as entries:
            texts: list[str] = []
            for entry in entries:
                if entry.name.lower().endswith(_SUFFIXES):
                    return True
                if _is_text(entry.name) and len(texts) < 50:
                    texts.append(entry.path)
    except (OSError, ValueError):
        return False
    return any(is_scan_script(text) for text in texts)


# ---------------------------------------------------------------------------------------------- planned and found


@dataclass(slots=True)
class _Frame:
    """One frame of the plan and what became of it."""

    name: str
    kind: str
    theta: float
    exposure: float
    binning: int
    path: str = ""  # "" when it is not on disk
    number: int = 1
    status: str = "unreadable:missing"
    shape: tuple[int, int] = (0, 0)
    dtype: np.dtype[Any] | None = None
    time: float = NAN
    header_theta: float = NAN
    header_energy: float = NAN
    header_pixel_um: float = NAN


@dataclass(slots=True)
class _Block:
    energy: float
    frames: list[_Frame]
    zone_plate: float = NAN


class _Folder:
    """The XRM files of one folder, listed once; every header read at most once."""

    def __init__(self, path: Path, progress: Progress) -> None:
        self.path = path
        self.progress = progress
        self.files: dict[str, str] = {}
        self.texts: list[str] = []
        self.headers: dict[str, XrmHeader | XrmError] = {}
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.lower().endswith(_SUFFIXES):
                        self.files[entry.name] = entry.path
                        if entry.is_symlink() and _leads_out(entry.path, path):
                            self.headers[entry.path] = XrmError(
                                f"{entry.name}: {_WHY['link-out']}", "link-out", entry.name
                            )
                    elif _is_text(entry.name):
                        self.texts.append(entry.path)
        except OSError as error:
            raise XanesTomoError(
                f"{path.name or path}: expected a folder that can be read, got {error.strerror}"
            ) from None
        self._folded: dict[str, str] | None = None

    def find(self, name: str) -> str:
        """Path of a file by its name, whatever its case; "" when it is not there."""
        if name in self.files:
            return self.files[name]
        if not self.files:
            return ""
        if self._folded is None:
            self._folded = {n.lower(): p for n, p in self.files.items()}
        return self._folded.get(name.lower(), "")

    def header(self, path: str) -> XrmHeader | XrmError:
        found = self.headers.get(path)
        if found is None:
            try:
                found = read_header(path)
            except XrmError as error:
                found = error.with_traceback(None)
            self.headers[path] = found
            if len(self.headers) % 500 == 0:
                self.progress("reading headers", len(self.headers), max(len(self.files), len(self.headers)))
        return found


def _leads_out(link: str, folder: Path) -> bool:
    """Whether a link leads to a place outside the folder."""
    target, root = os.path.realpath(link), os.path.realpath(folder)
    return not target.startswith(root.rstrip(os.sep) + os.sep)


def _acquired_as(header: XrmHeader | XrmError) -> str:
    """Name under which the instrument wrote a file, lower case; "" when the header does not tell."""
    known = header.header if isinstance(header, XrmError) else header
    return re.split(r"[\\/]", known.acq_file_name)[-1].lower() if known is not None else ""


def _take(frame: _Frame, found: XrmHeader | XrmError) -> None:
    """Write what the header says into the frame."""
    header = found.header if isinstance(found, XrmError) else found
    frame.status = f"unreadable:{found.reason}" if isinstance(found, XrmError) else "ok"
    if header is None:
        return
    frame.shape, frame.dtype = header.shape, header.dtype
    i = max(frame.number, 1) - 1
    if frame.number <= 0:
        frame.dtype = header.reference_dtype
        if header.reference_exposure_s > 0:
            frame.exposure = header.reference_exposure_s
    elif i >= len(header.angles_deg):
        frame.status = "unreadable:no-image"
        return
    elif header.exposures_s[i] > 0:
        frame.exposure = header.exposures_s[i]
    frame.header_theta, frame.time = header.angles_deg[i], header.times_s[i]
    frame.header_pixel_um = header.pixel_size_um if header.pixel_size_um > 0 else NAN
    frame.header_energy = header.energies_ev[i] if header.energies_ev[i] > 0 else NAN
    if header.binning is not None:
        frame.binning = header.binning


# ---------------------------------------------------------------------------------------------- opening


def open_series(
    path: str | os.PathLike[str],
    params: ScanParameters = ScanParameters(),  # noqa: B008 - frozen
    *,
    script: str | os.PathLike[str] | None = None,
    verify: bool = True,
    progress: Progress = no_progress,
) -> Series:
    """Open a measurement: a scan script, a folder, one ``.xrm`` or one ``.txrm``. No pixel is read.

    Parameters
    ----------
    path : path-like
        The script, the folder of the frames, or one file.
    params : ScanParameters
        Sense of rotation, row order, binning, pixel size law.
    script : path-like, optional
        A scan script that lies elsewhere; `path` is then the folder of the frames.
    verify : bool
        Read the header of every file: measured angles, exposures and times, and every file that is not
        whole is found. False takes the script's word and looks only at which files exist.
    progress : Progress
        Told about headers read.

    Returns
    -------
    Series
        Every energy with at least one readable projection; of a tomography script every energy, files or
        no files. What is missing or odd is in its `problems`, not raised.

    Raises
    ------
    XanesTomoError
        Nothing there can be understood as a measurement.
    """
    path = Path(path)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError):
        is_folder = exists = False
    if not exists:
        raise XanesTomoError(f"{_short(str(path))}: expected a scan script, a folder or an .xrm file, got no such path")
    if not is_folder and not path.is_file():
        raise XanesTomoError(f"{_short(path.name)}: expected a file or a folder, got a pipe or device")
    if script is not None:
        script = Path(script)
        return _open_script(script, _Folder(path if is_folder else path.parent, progress), params, verify)
    if is_exchange(path):
        return open_exchange(path, params, progress=progress)
    if not is_folder:
        if path.suffix.lower() in _SUFFIXES or _starts_like_xrm(path):
            return _open_file(path, params, progress)
        return _open_script(path, _Folder(path.parent, progress), params, verify)
    folder = _Folder(path, progress)
    scripts = sorted(text for text in folder.texts if is_scan_script(text))
    if len(scripts) > 1:
        listed = ", ".join(Path(s).name for s in scripts[:6]) + (" ..." if len(scripts) > 6 else "")
        raise XanesTomoError(
            f"{path.name}: expected one scan script, got {len(scripts)} ({listed}); open the one you mean"
        )
    if scripts:
        return _open_script(Path(scripts[0]), folder, params, verify, by_folder=True)
    if not folder.files:
        raise XanesTomoError(
            f"{path.resolve().name}: expected a scan script or .xrm files, got a folder with neither; "
            "open the folder of the frames"
        )
    return _open_names(folder, params, verify)


def _starts_like_xrm(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(8) == b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
    except OSError:
        return False


def _open_script(
    script: Path, folder: _Folder, params: ScanParameters, verify: bool, by_folder: bool = False
) -> Series:
    try:
        with script.open("rb") as file:
            raw = file.read(_LARGEST_SCRIPT + 1)
    except (OSError, ValueError) as error:
        text = getattr(error, "strerror", None) or str(error)
        raise XanesTomoError(
            f"{script.name}: expected a scan script, got a file that cannot be read ({text})"
        ) from None
    if len(raw) > _LARGEST_SCRIPT:
        raise XanesTomoError(f"{script.name}: expected a scan script, got more than {_LARGEST_SCRIPT >> 20} MB")
    try:
        planned = parse_script(_decode(raw))
    except XanesTomoError as error:
        raise XanesTomoError(f"{script.name}: {error}") from None
    if not planned:
        raise XanesTomoError(
            f"{script.name}: expected a scan script with `collect` lines, got none; open the script the instrument ran"
        )
    blocks = [_Block(b.energy_ev, [_Frame(*f) for f in b.frames], b.zone_plate_um) for b in planned]
    for block in blocks:
        for frame in block.frames:
            if frame.theta != frame.theta:
                frame.theta = _facts(frame.name).theta if frame.kind == "projection" else NAN
    blocks = _by_energy(blocks)
    problems = _Problems()
    _locate(blocks, folder, problems, script.name, verify)
    if by_folder and folder.files and not any(f.path for b in blocks for f in b.frames):
        try:
            series = _open_names(folder, params, verify)
        except XanesTomoError:
            pass  # then the script is all there is
        else:
            text = f"{script.name} names none of the {len(folder.files)} files here: they are opened by their own names"
            return replace(series, problems=(Problem("warning", "other-script", text), *series.problems))
    return _finish(script.stem, blocks, folder, params, verify, problems, script.name)


def _by_energy(blocks: list[_Block]) -> list[_Block]:
    """Join the blocks of an energy when only together they turn: a scan of all energies at every angle.

    Blocks that are tomograms, or repeats of one picture, stay apart.
    """
    members: dict[float, list[_Block]] = {}
    for block in blocks:
        members.setdefault(block.energy, []).append(block)
    joined: list[_Block] = []
    for energy, own in members.items():
        angles = [_distinct(f.theta for f in b.frames if f.kind == "projection") for b in own]
        together = _distinct(f.theta for b in own for f in b.frames if f.kind == "projection")
        if len(own) == 1 or max(angles) >= FEW_ANGLES or together < FEW_ANGLES:
            return blocks
        joined.append(_Block(energy, [f for b in own for f in b.frames], own[0].zone_plate))
    return joined


def _locate(blocks: Sequence[_Block], folder: _Folder, problems: _Problems, script: str, verify: bool) -> None:
    """Find the file of every planned frame: by name, then by the name it was acquired under."""
    frames = [frame for block in blocks for frame in block.frames]
    latest: dict[str, _Frame] = {}
    for frame in frames:
        if (before := latest.get(frame.name)) is not None:
            before.status = "unreadable:overwritten"
            problems.add("warning", "overwritten", "collected again later under the same name", before.name)
        latest[frame.name] = frame
    used = set()
    for frame in latest.values():
        frame.path = folder.find(frame.name)
        if frame.path:
            frame.status = "ok"
            used.add(frame.path)
    extra = [(name, p) for name, p in sorted(folder.files.items()) if p not in used]
    missing = {f.name.lower(): f for f in latest.values() if not f.path}
    if extra and missing:
        left = []
        for name, path in extra:
            renamed = missing.pop(_acquired_as(folder.header(path)), None)
            if renamed is not None:
                renamed.path, renamed.status = path, "ok"
            else:
                left.append((name, path))
        extra = left
    whole = []
    for name, path in extra:
        found = folder.header(path) if verify else None
        if isinstance(found, XrmError):
            problems.add(
                "error", found.reason, f"not in {script}, and unusable: {found}", name, _nan_none(_energy_in(name))
            )
        else:
            whole.append(name)
    if whole:
        listed = ", ".join(_short(n) for n in whole[:3]) + (" ..." if len(whole) > 3 else "")
        problems.add(
            "info", "not-in-script", f"{len(whole)} files are not named in {script} and are left out ({listed})"
        )


def _nan_none(value: float) -> float | None:
    return value if value == value else None


class _Problems:
    """Collects problems."""

    def __init__(self) -> None:
        self.all: list[Problem] = []

    def add(
        self,
        severity: str,
        code: str,
        message: str,
        file: str = "",
        energy: float | None = None,
        frame: int | None = None,
    ) -> None:
        self.all.append(Problem(severity, code, message, file, energy, frame))


_WHY = {
    "missing": "expected in the folder, not there; copy it, or go on without it",
    "empty": "has no bytes; copy it again",
    "truncated": "ends inside its image; copy it again",
    "not-xrm": "is no XRM file",
    "lfs-pointer": "is a Git LFS pointer, not the file; fetch it with `git lfs pull`",
    "no-image": "holds no image (an aborted acquisition)",
    "corrupt": "is damaged",
    "other-size": "has another frame size than the others",
    "unreadable": "cannot be opened",
    "mosaic": "holds unstitched mosaic tiles",
    "link-out": "is a link that leads out of the folder and is not followed; put the file itself there",
    "overwritten": "was overwritten by a later frame of the same name",
    "no-energy": "tells no energy",
}


def _finish(
    name: str,
    blocks: Sequence[_Block],
    folder: _Folder,
    params: ScanParameters,
    verify: bool,
    problems: _Problems,
    script: str,
) -> Series:
    """Read the headers, judge every frame and build the series."""
    expected = (
        len({b.energy for b in blocks}) if script == "" else len(blocks),
        sum(f.kind == "projection" for b in blocks for f in b.frames),
        sum(f.kind == "flat" for b in blocks for f in b.frames),
    )
    frames = [f for b in blocks for f in b.frames]
    present = [f for f in frames if f.path]
    if verify:
        for frame in present:
            if frame.status == "ok":
                _take(frame, folder.header(frame.path))
    else:
        _take_one(present, folder)
        for frame in present:
            known = folder.headers.get(frame.path)
            if isinstance(known, XrmError) and known.reason == "link-out" and frame.status == "ok":
                frame.status = "unreadable:link-out"
    _judge_sizes(present)

    for block in blocks:
        if block.energy != block.energy:
            measured = [f.header_energy for f in block.frames if f.header_energy == f.header_energy]
            block.energy = float(np.median(measured)) if measured else NAN
    darks = sum(f.kind == "dark" for f in frames)
    if darks:
        problems.add("info", "darks", f"{darks} dark frames are left out: dark fields are not used yet")

    planned = [_distinct(f.theta for f in b.frames if f.kind == "projection") for b in blocks]
    tomography = max(planned, default=0) >= FEW_ANGLES
    with_projections = [b for b in blocks if any(f.kind == "projection" for f in b.frames)]
    readable = [b for b in with_projections if any(f.status == "ok" and f.kind == "projection" for f in b.frames)]
    nothing = not any(f.status == "ok" for f in frames)
    kept = with_projections if (script and tomography) or not readable else readable

    if not present:
        where = folder.path.resolve().name
        problems.add(
            "error",
            "missing",
            f"no file is there: {script or name} names {len(frames)} frames "
            f"({expected[1]} projections, {expected[2]} flats), none of them is in {where}; "
            "put the .xrm files beside the script",
        )
    elif nothing:
        _report_bad(blocks, problems)
        problems.add("error", "nothing-usable", f"none of the {len(frames)} frames can be used")
    else:
        absent = [b for b in blocks if not any(f.path for f in b.frames)]
        if absent:
            listed = ", ".join(f"{b.energy:g}" for b in absent[:8]) + (" ..." if len(absent) > 8 else "")
            problems.add(
                "error",
                "energies-missing",
                f"{len(absent)} of {len(blocks)} energies have no file at all ({listed} eV); "
                "copy their files, or go on without them",
            )
        _report_bad([b for b in blocks if any(f.path for f in b.frames)], problems)

    like = next((f for f in present if f.status == "ok" and f.number > 0), None)
    scans = tuple(
        _scan(b, folder.path, params, tomography, problems, not any(f.path for f in b.frames), like) for b in kept
    )
    if not scans:
        problems.add("error", "no-projections", f"{name} has flats but no projection")
    return Series(name, scans, tuple(problems.all), expected)


def _distinct(values: Iterable[float]) -> int:
    return len({round(v, 2) for v in values if v == v})


def _take_one(present: Sequence[_Frame], folder: _Folder) -> None:
    """Without verification: the first readable header speaks for the size of all frames."""
    for frame in present[:20]:
        found = folder.header(frame.path)
        if isinstance(found, XrmHeader):
            for other in present:
                other.shape, other.dtype, other.header_pixel_um = found.shape, found.dtype, found.pixel_size_um
                if found.binning is not None:
                    other.binning = found.binning
            return


def _judge_sizes(present: Sequence[_Frame]) -> None:
    """Flag the frames whose size or type is not that of the majority."""
    counts = Counter((f.shape, f.dtype) for f in present if f.status == "ok" and f.number > 0)
    if not counts:
        return
    (shape, dtype), _ = counts.most_common(1)[0]
    for frame in present:
        if frame.status == "ok" and (frame.shape != shape or (frame.dtype != dtype and frame.number > 0)):
            frame.status = "unreadable:other-size"


def _report_bad(blocks: Sequence[_Block], problems: _Problems) -> None:
    """Name bad files one by one where they are few, else count them: one problem an energy and reason."""
    for block in blocks:
        energy = _nan_none(block.energy)
        bad: dict[tuple[str, str], list[tuple[int | None, _Frame]]] = {}
        number = 0
        for frame in block.frames:
            own = number if frame.kind == "projection" else None
            number += frame.kind == "projection"
            if frame.status != "ok" and frame.status != "unreadable:overwritten":
                bad.setdefault((frame.status.partition(":")[2], frame.kind), []).append((own, frame))
        for (reason, kind), members in bad.items():
            why = _WHY.get(reason, reason)
            if len(members) <= _NAMED_SINGLY:
                for own, frame in members:
                    shown = Path(frame.path).name if frame.path else frame.name
                    problems.add("error", reason, f"{kind} {why}", shown, energy, own)
            else:
                total = sum(f.kind == kind for f in block.frames)
                first, last = _short(members[0][1].name), _short(members[-1][1].name)
                text = f"{len(members)} of {total} {kind}s at {block.energy:g} eV: {why} ({first} .. {last})"
                problems.add("error", reason, text, "", energy)


def _source(frames: Sequence[_Frame], folder: Path, params: ScanParameters, like: _Frame | None) -> XrmFrames:
    """Make the frames' source; where none can be read they have the size of `like`, a good one of another energy."""
    good = next((f for f in frames if f.status == "ok"), None) or like
    good = good or next((f for f in frames if f.dtype is not None), None)
    dtype = good.dtype if good is not None and good.dtype is not None else np.dtype("<u2")
    shape = good.shape if good is not None else (0, 0)
    return XrmFrames(
        tuple(f.path or os.path.join(folder, f.name) for f in frames),  # noqa: PTH118 - thousands of them
        tuple(f.number for f in frames),
        shape,
        dtype,
        params.flip_rows,
        params.bin,
    )


def _angles(block: _Block, projections: Sequence[_Frame], problems: _Problems) -> npt.NDArray[np.float64]:
    """Measured angles where the headers tell, the script's or the name's elsewhere, degrees."""
    nominal = np.array([f.theta for f in projections])
    measured = np.array([f.header_theta for f in projections])
    known = np.isfinite(measured) & (np.abs(measured) <= 1e5)
    energy = _nan_none(block.energy)
    if known.sum() >= 3 and np.ptp(measured[known]) == 0 and _distinct(nominal[known]) >= 3:
        problems.add(
            "warning",
            "angle-stuck",
            f"the headers at {block.energy:g} eV all say {measured[known][0]:g} deg, the script turns: "
            "the script's angles are used",
            energy=energy,
        )
        return np.where(np.isfinite(nominal), nominal, measured)
    theta = np.where(known, measured, nominal)
    with np.errstate(invalid="ignore"):
        off = np.abs((theta - nominal + 180) % 360 - 180)
    wrong = np.flatnonzero(off > _ANGLE_TOLERANCE)
    if wrong.size <= _NAMED_SINGLY:
        for i in map(int, wrong):
            text = f"the stage says {theta[i]:.3f} deg, the script {nominal[i]:.3f}: the stage is used"
            problems.add("warning", "angle", text, projections[i].name, energy, i)
    else:
        text = (
            f"{wrong.size} of {len(theta)} angles at {block.energy:g} eV differ from the script by more than "
            f"{_ANGLE_TOLERANCE} deg (up to {off[wrong].max():.3f}): the stage's are used"
        )
        problems.add("warning", "angle", text, energy=energy)
    return theta


def _scan(
    block: _Block,
    folder: Path,
    params: ScanParameters,
    tomography: bool,
    problems: _Problems,
    quiet: bool,
    like: _Frame | None,
) -> EnergyScan:
    projections = [f for f in block.frames if f.kind == "projection"]
    groups: list[list[_Frame]] = []
    before: list[int] = []  # number of groups begun before every projection
    last = ""
    for frame in block.frames:
        if frame.kind == "flat":
            if last != "flat":
                groups.append([])
            groups[-1].append(frame)
        elif frame.kind == "projection":
            before.append(len(groups))
        last = frame.kind if frame.kind != "dark" else last
    usable_groups = [i for i, g in enumerate(groups) if any(f.status == "ok" for f in g)]
    half = np.full(len(projections), -1, dtype=np.int64)
    replaced = set()
    for i, count in enumerate(before):
        if not groups:
            break
        own = max(count - 1, 0)
        half[i] = own
        if usable_groups and own not in usable_groups:
            half[i] = min(usable_groups, key=lambda g: (abs(g - own), g))
            replaced.add(own)
    energy = _nan_none(block.energy)
    theta = _angles(block, projections, problems) * params.theta_sign
    status = [f.status for f in projections]
    if energy is None:
        problems.add("error", "no-energy", "expected an energy in the script, the names or the headers, got none")
    if not quiet:
        for own in sorted(replaced):
            text = (
                f"none of the flats of group {own + 1} at {block.energy:g} eV can be used; the nearest group's are used"
            )
            problems.add("warning", "flats-replaced", text, energy=energy)
        if not usable_groups:
            n = sum(len(g) for g in groups)
            text = f"no usable flat at {block.energy:g} eV (of {n} expected); its absorbance cannot be made"
            # one file opened by itself is a picture, not a measurement
            problems.add("error" if groups or len(block.frames) > 1 else "info", "no-flats", text, energy=energy)
        usable = _distinct(t for t, s in zip(theta.tolist(), status, strict=True) if s == "ok")
        if tomography and usable < FEW_ANGLES:
            text = f"expected at least {FEW_ANGLES} usable angles at {block.energy:g} eV, got {usable}"
            problems.add("error", "few-angles", text, energy=energy)
    counts = Counter(f.binning for f in block.frames if f.binning > 0 and f.status == "ok") or Counter(
        f.binning for f in block.frames if f.binning > 0
    )
    binning = counts.most_common(1)[0][0] if counts else 1
    law = params.pixel_law_slope_nm_per_ev * block.energy + params.pixel_law_offset_nm
    stored = [f.header_pixel_um for f in block.frames if f.header_pixel_um == f.header_pixel_um]
    flats = tuple(
        FlatSet(
            _source(group, folder, params, like),
            np.array([f.exposure for f in group]),
            tuple(f.status for f in group),
            tuple(f.name for f in group),
            np.array([f.time for f in group]),
        )
        for group in groups
    )
    return EnergyScan(
        block.energy,
        theta,
        _source(projections, folder, params, like),
        np.array([f.exposure for f in projections]),
        tuple(status),
        flats,
        half,
        binning,
        law * binning * params.bin,
        np.array([f.time for f in projections]),
        tuple(f.name for f in projections),
        1000 * float(np.median(stored)) * params.bin if stored else NAN,
        block.zone_plate,
    )


# ---------------------------------------------------------------------------------------------- without a script


def _open_file(path: Path, params: ScanParameters, progress: Progress) -> Series:
    """Open one ``.xrm`` or ``.txrm``; a stack is split where its energy changes."""
    header = read_header(path)
    folder = _Folder(path.parent, progress)
    folder.headers[str(path)] = header
    blocks: list[_Block] = []
    named = _energy_in(path.name)
    if named != named:
        named = _energy_in(_acquired_as(header))
    name_theta = _facts(path.name).theta
    for i in range(header.n_images):
        stored = header.energies_ev[i]
        # One energy in the name speaks for all images, unless the file itself scans the energy.
        scanned = np.ptp([e for e in header.energies_ev if e > 0] or [0.0]) > 0.5
        energy = stored if stored > 0 and (scanned or named != named) else named
        if not blocks or abs(blocks[-1].energy - energy) > 0.5:
            blocks.append(_Block(energy, []))
        blocks[-1].frames.append(
            _Frame(path.name, "projection", name_theta if header.n_images == 1 else NAN, NAN, 0, header.path, i + 1)
        )
    for block in blocks:
        own = [_Frame(path.name, "flat", NAN, NAN, 0, header.path, -k) for k in range(len(header.references))]
        block.frames[:0] = own
    for block in blocks:
        for frame in block.frames:
            frame.status = "ok"
    folder.headers[header.path] = header
    problems = _Problems()
    return _finish(path.stem, blocks, folder, params, True, problems, "")


def _open_names(folder: _Folder, params: ScanParameters, verify: bool) -> Series:
    """Open a folder without a script: group by what the names and then the headers say."""
    problems = _Problems()
    projections: dict[tuple[int, float], list[tuple[tuple[Any, ...], _Frame, _Name]]] = {}
    flats: dict[tuple[int, float], list[tuple[tuple[Any, ...], _Frame, _Name]]] = {}
    loose: list[tuple[tuple[Any, ...], _Frame, _Name]] = []  # flats whose names hold no energy
    for name, path in sorted(folder.files.items()):
        facts = _facts(name)
        stack = name.lower().endswith(".txrm")
        header: XrmHeader | None = None
        if verify or stack or facts.energy != facts.energy:
            found = folder.header(path)
            header = found.header if isinstance(found, XrmError) else found
            if isinstance(found, XrmError) and found.header is None and facts.energy != facts.energy:
                problems.add("error", found.reason, f"{_WHY.get(found.reason, found.reason)}: left out", name)
                continue
        if facts.energy != facts.energy and header is not None:
            acquired = _facts(re.split(r"[\\/]", header.acq_file_name)[-1])
            if header.energies_ev[0] > 0 and facts.kind == "projection":
                facts = facts._replace(energy=round(header.energies_ev[0], 2))
            elif acquired.energy == acquired.energy or (acquired.kind == "flat" and facts.kind == "projection"):
                facts = acquired
            elif header.energies_ev[0] > 0:
                facts = facts._replace(energy=round(header.energies_ev[0], 2))
        if facts.kind == "dark":
            problems.add("info", "darks", "dark frame left out: dark fields are not used yet", name)
            continue
        for number in range(1, (header.n_images if header is not None else 1) + 1) or (1,):
            theta = facts.theta if facts.kind == "projection" else NAN
            frame = _Frame(name, facts.kind, theta, NAN, 0, path, number, "ok")
            time = header.times_s[number - 1] if header is not None and facts.counter < 0 and stack else 0.0
            order = (facts.counter, time if time == time else 0.0, facts.theta, facts.shot, name, number)
            item = (order if facts.theta == facts.theta else (*order[:2], 0.0, *order[3:]), frame, facts)
            if facts.kind == "flat" and facts.energy != facts.energy:
                loose.append(item)
            else:
                into = flats if facts.kind == "flat" else projections
                into.setdefault((facts.rep, facts.energy), []).append(item)
    if not projections and not flats:
        raise XanesTomoError(
            f"{folder.path.resolve().name}: expected frames whose names or headers tell their energy, "
            f"got {len(folder.files)} files that do not; open the scan script instead"
        )
    for key in [k for k in projections if k[1] != k[1]]:
        for _, frame, _ in projections.pop(key):
            problems.add("error", "no-energy", "neither its name nor its header tells an energy: left out", frame.name)
    for members in (*projections.values(), *flats.values()):
        members.sort(key=lambda item: item[0])
    keys = sorted(projections, key=lambda k: (k[0], projections[k][0][0][0], k[1]))
    groups = _assign_loose(loose, [projections[k] for k in keys])
    blocks = []
    for index, key in enumerate(keys):
        frames: list[_Frame] = [frame for _, frame, _ in flats.pop(key, [])]
        rest = [(frame, facts) for _, frame, facts in projections[key]]
        own = groups.get(index, [])
        for position, (place, group) in enumerate(own):
            if place == 0 or position == 0:
                frames += group
                continue
            # The angle in the name of a flat is that of the projection before it.
            previous = _facts(group[0].name).theta
            cut = next((i + 1 for i, (_, f) in enumerate(rest) if abs(f.theta - previous) < 0.01), len(rest) // 2)
            frames += [f for f, _ in rest[:cut]]
            rest = rest[cut:]
            frames += group
        frames += [f for f, _ in rest]
        blocks.append(_Block(key[1], frames))
    for key, members in flats.items():
        energy = _nan_none(key[1])
        for _, frame, _ in members:
            _take(frame, folder.header(frame.path))
            if frame.status != "ok":
                reason = frame.status.partition(":")[2]
                problems.add("error", reason, f"flat {_WHY.get(reason, reason)}", frame.name, energy)
        text = f"{len(members)} flats at {key[1]:g} eV (rep {key[0]}) have no projection: this energy is left out"
        problems.add("warning", "no-projections", text, energy=energy)
    if not blocks:
        raise XanesTomoError(
            f"{folder.path.resolve().name}: expected projections, got only {len(folder.files)} flats; "
            "open the folder that holds both"
        )
    return _finish(folder.path.resolve().name, blocks, folder, params, verify, problems, "")


def _assign_loose(
    loose: Sequence[tuple[tuple[Any, ...], _Frame, _Name]],
    energies: Sequence[Sequence[tuple[tuple[Any, ...], _Frame, _Name]]],
) -> dict[int, list[tuple[int, list[_Frame]]]]:
    """Give flats without an energy in their names to the energies, by the counters.

    A projection's counter runs over the whole scan, so that ``counter // projections per energy`` is the
    number of the energy; a flat's does too, in groups of as many as its name says (``_001of010``), an
    equal number of groups an energy: ``counter // 20`` and ``counter % 20 // 10`` for two groups of ten.
    """
    found: dict[int, list[tuple[int, list[_Frame]]]] = {}
    if not loose or not energies:
        return found
    per_energy = max(max(f.counter for _, _, f in e) - min(f.counter for _, _, f in e) + 1 for e in energies)
    index_of = {}
    for i, members in enumerate(energies):
        index_of[members[0][2].counter // per_energy if members[0][2].counter >= 0 else i] = i
    shots = max((f.shots for _, _, f in loose), default=0) or 10
    by_group: dict[int, list[_Frame]] = {}
    for _, frame, facts in sorted(loose, key=lambda item: item[0]):
        by_group.setdefault(max(facts.counter, 0) // shots, []).append(frame)

    def covered(per: int) -> tuple[int, int, int]:
        hit = {g // per for g in by_group if g // per in index_of}
        stray = sum(g // per not in index_of for g in by_group)
        return -stray, len(hit), -abs(per - 2)

    per = max(range(1, 9), key=covered)
    for group, shot_frames in sorted(by_group.items()):
        if group // per in index_of:
            found.setdefault(index_of[group // per], []).append((group % per, shot_frames))
    return found
