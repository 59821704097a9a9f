"""The data model: what a measurement is, and where a pixel belongs.

Conventions (kept everywhere in the package)
--------------------------------------------
Frames are ``[row, column] = [y, x]`` in stored order, y pointing down. The rotation axis is
vertical. At angle theta a point ``(x, z)`` of the object is seen at ``x cos(theta) + z sin(theta)``.

``p = M * R(roll) * q + shift`` maps a point ``q`` of the common grid (pixels of the reference energy,
``q_x = 0`` on the rotation axis) to a recorded pixel ``p`` measured from the detector centre
``(n - 1) / 2``, in raw detector pixels whatever binning a step works at. Positive roll turns +x towards
+y; a positive shift moves the content down / right.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

__all__ = [
    "Alignment",
    "ArrayFrames",
    "Cancelled",
    "EnergyScan",
    "FlatSet",
    "FrameSource",
    "Maps",
    "Problem",
    "Progress",
    "Quality",
    "Score",
    "Series",
    "Volume",
    "XanesTomoError",
    "no_progress",
]

FloatArray = npt.NDArray[np.floating[Any]]


class XanesTomoError(Exception):
    """An error meant for the user: what was expected, what came, what to do. One line."""


@runtime_checkable
class FrameSource(Protocol):
    """A picklable, lazy sequence of frames; nothing stays open between two calls."""

    @property
    def frame_shape(self) -> tuple[int, int]:
        """(rows, columns) of every frame."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the stored counts."""

    def __len__(self) -> int:
        """Return the number of frames, unreadable ones included."""

    def read(self, index: int) -> npt.NDArray[Any]:
        """Return frame `index`, shape (y, x), in stored row order."""

    def read_rows(self, indices: Sequence[int], y0: int, y1: int) -> npt.NDArray[Any]:
        """Return rows ``y0:y1`` of the frames `indices`, shape (frame, y1 - y0, x)."""

    def fingerprint(self) -> str:
        """Return a short text that changes when a file behind a frame changes."""


@dataclass(frozen=True, eq=False)
class ArrayFrames:
    """Frames that are an array in memory, as a `FrameSource`: for counts that come from elsewhere than files.

    Attributes
    ----------
    data : (frame, y, x) array
        Counts; kept as they are, not copied.

    Raises
    ------
    XanesTomoError
        `data` has another number of axes.
    """

    data: npt.NDArray[Any]

    def __post_init__(self) -> None:
        if self.data.ndim != 3:
            raise XanesTomoError(f"frames: expected an array (frame, y, x), got {self.data.ndim} axes")

    @property
    def frame_shape(self) -> tuple[int, int]:
        """(rows, columns) of every frame."""
        return self.data.shape[1], self.data.shape[2]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the counts."""
        return self.data.dtype

    def __len__(self) -> int:
        """Return the number of frames."""
        return len(self.data)

    def read(self, index: int) -> npt.NDArray[Any]:
        """Return frame `index`, shape (y, x)."""
        return np.asarray(self.data[index])

    def read_rows(self, indices: Sequence[int], y0: int, y1: int) -> npt.NDArray[Any]:
        """Return rows ``y0:y1`` of the frames `indices`, shape (frame, y1 - y0, x)."""
        return np.asarray(self.data[list(indices), y0:y1])

    def fingerprint(self) -> str:
        """Return 16 hex digits that change with the counts."""
        digest = hashlib.blake2b(repr((self.data.shape, self.data.dtype.str)).encode(), digest_size=8)
        for frame in self.data:
            digest.update(np.ascontiguousarray(frame).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Problem:
    """Something about the measurement the user should know.

    Attributes
    ----------
    severity : {"error", "warning", "info"}
        ``error``: the frame or energy cannot be used.
    code : str
        Short kebab-case word, e.g. ``missing``, ``truncated``, ``no-flats``.
    message : str
        What was expected, what came, what to do.
    file : str
        File name (never a full path), or ``""``.
    energy_ev : float or None
        The energy concerned, in eV.
    frame : int or None
        0-based projection number within that energy.
    """

    severity: str
    code: str
    message: str
    file: str = ""
    energy_ev: float | None = None
    frame: int | None = None


@dataclass(frozen=True)
class FlatSet:
    """One group of flats (reference frames), taken in one go.

    Attributes
    ----------
    frames : FrameSource
        The shots.
    exposure_s : (n,) array
        Exposure of every shot, seconds.
    status : tuple of str
        ``ok`` or ``unreadable:<why>`` for every shot.
    names : tuple of str
        File names.
    time_s : (n,) array
        Start of every exposure, seconds since 1970 (local clock); NaN where unknown, empty when never asked for.
    written_s : (n,) array
        When every file was written, seconds since 1970 (UTC, to the millisecond); NaN where unknown.
    """

    frames: FrameSource
    exposure_s: FloatArray
    status: tuple[str, ...]
    names: tuple[str, ...] = ()
    time_s: FloatArray = field(default_factory=lambda: np.empty(0))
    written_s: FloatArray = field(default_factory=lambda: np.empty(0))


@dataclass(frozen=True)
class EnergyScan:
    """One tomogram: every projection planned at one energy, with its flats.

    Attributes
    ----------
    energy_ev : float
        Photon energy, eV.
    theta_deg : (n,) array
        Angle of every planned projection, degrees, in the order of acquisition.
    frames : FrameSource
        The n projections.
    exposure_s : (n,) array
        Seconds.
    status : tuple of str
        ``ok``, ``excluded:<why>`` or ``unreadable:<why>`` (``unreadable:missing``), one a projection.
    flats : tuple of FlatSet
        The groups of flats, in the order of acquisition.
    half : (n,) int array
        Index into `flats` of the group each projection belongs to (the last one before it);
        -1 where there is none.
    binning : int
        Camera binning (``HorizontalBin`` in the header, else ``setbinning`` in the script).
    pixel_size_nm : float
        Size of a recorded pixel at this energy by the calibration in use, nm.
    time_s : (n,) array
        Start of every exposure, seconds since 1970 (local clock); NaN where unknown.
    names : tuple of str
        File names of the projections.
    header_pixel_size_nm : float
        What the headers say instead, nm of a pixel as it is used; NaN where they say nothing. At some microscopes it
        does not follow the energy, so that it is shown and not used.
    zone_plate_um : float
        Position of the zone plate along the beam (``zpz`` of the script), micrometres; NaN where unknown.
    given : {"", "projections", "volumes", "images"}
        What was aligned elsewhere and needs no alignment. Projections are then carried as the counts of an even beam;
        of a volume ``(y, z, x)`` the frames are its planes ``(y, x)``, linear attenuation in 1/cm; an image of 2-D
        XANES is one plane, absorbance.
    written_s : (n,) array
        When every file was written, seconds since 1970 (UTC, to the millisecond): the finer clock of the two, where the
        files have it; NaN elsewhere, empty when never asked for.
    """

    energy_ev: float
    theta_deg: FloatArray
    frames: FrameSource
    exposure_s: FloatArray
    status: tuple[str, ...]
    flats: tuple[FlatSet, ...]
    half: npt.NDArray[np.integer[Any]]
    binning: int
    pixel_size_nm: float
    time_s: FloatArray
    names: tuple[str, ...] = ()
    header_pixel_size_nm: float = float("nan")
    zone_plate_um: float = float("nan")
    given: str = ""
    written_s: FloatArray = field(default_factory=lambda: np.empty(0))

    def __len__(self) -> int:
        return len(self.theta_deg)

    @property
    def gridded(self) -> bool:
        """Whether the frames are planes of something on the common grid, to which nothing is projected any more."""
        return self.given in ("volumes", "images")

    @property
    def usable(self) -> npt.NDArray[np.bool_]:
        """(n,) True where the projection can be used."""
        return np.array([s == "ok" for s in self.status], dtype=bool)

    def excluded(self, reasons: Mapping[int, str]) -> EnergyScan:
        """Return a copy in which the usable projections ``{number: why}`` are excluded."""
        status = list(self.status)
        for number, why in reasons.items():
            if status[number] == "ok":
                status[number] = f"excluded:{why}"
        return replace(self, status=tuple(status))


@dataclass(frozen=True)
class Series:
    """The whole measurement: a tuple of energy scans, in the order of acquisition.

    Attributes
    ----------
    name : str
        Name of the scan (of its script or folder).
    scans : tuple of EnergyScan
        In the order of acquisition; an energy may recur.
    problems : tuple of Problem
        Everything odd found while opening.
    n_expected : tuple of int
        (energies, projections, flats) the script names, whether on disk or not.
    """

    name: str
    scans: tuple[EnergyScan, ...]
    problems: tuple[Problem, ...] = ()
    n_expected: tuple[int, int, int] = (0, 0, 0)

    @property
    def energies_ev(self) -> FloatArray:
        """(energies,) photon energies, eV."""
        return np.array([s.energy_ev for s in self.scans], dtype=float)

    @property
    def frame_shape(self) -> tuple[int, int]:
        """(rows, columns) of a raw frame, as most energies have it; see `pixels` for the others."""
        known = [s for s in self.scans if s.usable.any()] or self.scans
        return Counter(s.frames.frame_shape for s in known).most_common(1)[0][0]


@dataclass(frozen=True)
class Alignment:
    """Where a pixel of the common grid is found on the detector, for n projections.

    ``p = M * R(roll) * q + shift``; see the module's first lines.

    Attributes
    ----------
    shift : (n, 2) array
        ``[dy, dx]``, displacement of the content, raw detector pixels, positive down / right.
        ``dx`` contains the centre of rotation.
    sigma : (n, 2) array
        Standard error of `shift`, the random part of each projection.
    magnification : float
        M, 1 at the reference energy.
    roll_deg : float
        Degrees, positive from +x to +y.
    status : tuple of str
        ``ok``, ``excluded:<why>``, ``unreadable:<why>``, one a projection.
    """

    shift: FloatArray
    sigma: FloatArray
    magnification: float = 1.0
    roll_deg: float = 0.0
    status: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.shift.ndim != 2 or self.shift.shape[1] != 2:
            raise ValueError(f"shift: expected (n, 2) [dy, dx], got {self.shift.shape}")
        if self.sigma.shape != self.shift.shape:
            raise ValueError(f"sigma: expected {self.shift.shape}, got {self.sigma.shape}")
        if not self.status:
            object.__setattr__(self, "status", ("ok",) * len(self.shift))
        elif len(self.status) != len(self.shift):
            raise ValueError(f"status: expected {len(self.shift)} entries, got {len(self.status)}")

    @classmethod
    def identity(cls, n: int) -> Alignment:
        """Return the alignment that leaves n projections where they are."""
        return cls(np.zeros((n, 2)), np.zeros((n, 2)))

    @property
    def matrix(self) -> FloatArray:
        """(2, 2) ``M * R(roll)`` acting on ``[y, x]``."""
        a = np.deg2rad(self.roll_deg)
        c, s = np.cos(a), np.sin(a)
        return self.magnification * np.array([[c, s], [-s, c]])

    def __call__(self, q: FloatArray, index: int) -> FloatArray:
        """Map points `q` (..., 2) ``[y, x]`` of the common grid to the detector for projection `index`."""
        return np.asarray(np.asarray(q) @ self.matrix.T + self.shift[index])

    def then(self, other: Alignment) -> Alignment:
        """Return the alignment that applies self first: ``(A.then(B))(q) = B(A(q))``."""
        turned = self.shift @ other.matrix.T
        variance = (self.sigma**2) @ (other.matrix.T**2) + other.sigma**2
        status = tuple(a if a != "ok" else b for a, b in zip(self.status, other.status, strict=True))
        return Alignment(
            turned + other.shift,
            np.sqrt(variance),
            self.magnification * other.magnification,
            self.roll_deg + other.roll_deg,
            status,
        )

    def binned(self, bin: int, frame_shape: tuple[int, int], grid_bin: int | None = None) -> Alignment:
        """Return the alignment in pixels of frames binned `bin` x `bin` from raw frames of `frame_shape`.

        The common grid has pixels `grid_bin` times as wide; as wide as those of the frames unless given.
        """
        offset = _bin_offset(bin, frame_shape)
        scale = 1.0 if grid_bin is None else grid_bin / bin
        return replace(
            self,
            shift=(self.shift - offset) / bin,
            sigma=self.sigma / bin,
            magnification=self.magnification * scale,
        )

    def unbinned(self, bin: int, frame_shape: tuple[int, int]) -> Alignment:
        """Return the alignment in raw pixels of one found on frames binned `bin` x `bin`: the inverse of `binned`."""
        offset = _bin_offset(bin, frame_shape)
        return replace(self, shift=self.shift * bin + offset, sigma=self.sigma * bin)

    def gauge(self, theta_deg: FloatArray, ty: float, a: float, b: float) -> Alignment:
        """Return the same alignment for an object moved by the undetermined global shift.

        ``shift + M R(roll) (ty, a cos(theta) + b sin(theta))``, `ty`, `a`, `b` in common-grid pixels.
        """
        t = np.deg2rad(np.asarray(theta_deg, dtype=float))
        move = np.stack([np.full(t.shape, ty), a * np.cos(t) + b * np.sin(t)], axis=1)
        return replace(self, shift=self.shift + move @ self.matrix.T)


def _bin_offset(bin: int, frame_shape: tuple[int, int]) -> FloatArray:
    """Where the centre of a binned frame lies in the raw one: rows and columns left over are cut off at the end."""
    return np.array([(n // bin * bin - n) / 2 for n in frame_shape])


@dataclass(frozen=True)
class Volume:
    """A reconstructed volume ``(y, z, x)``, axis 0 along the rotation axis, the axis in the middle."""

    data: npt.NDArray[Any]
    voxel_nm: float


@dataclass(frozen=True)
class Maps:
    """Named volumes ``(y, z, x)`` with units, their voxel size and the reasons of the absent ones."""

    data: Mapping[str, npt.NDArray[Any]]
    units: Mapping[str, str]
    voxel_nm: float
    absent: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """One number a step is judged by.

    Attributes
    ----------
    name, value, unit : what was measured.
    threshold : float or None
        The value it is judged by; None for a number that is only shown.
    better : {"lower", "higher"}
        Which side of the threshold is good.
    red : float or None
        The value beyond which it is wrong rather than doubtful, on the bad side of the threshold; None where there is
        no such value.
    """

    name: str
    value: float
    unit: str = ""
    threshold: float | None = None
    better: str = "lower"
    red: float | None = None

    @property
    def colour(self) -> str:
        """``green`` where it passed, ``amber`` where it has to be looked at, ``red`` beyond `red`."""
        if self.passed:
            return "green"
        if self.red is None or np.isnan(self.value):
            return "amber"
        return "red" if (self.value > self.red if self.better == "lower" else self.value < self.red) else "amber"

    @property
    def passed(self) -> bool:
        """Whether the value is on the good side of its threshold (NaN never is)."""
        if self.threshold is None:
            return True
        return self.value <= self.threshold if self.better == "lower" else self.value >= self.threshold


@dataclass(frozen=True)
class Quality:
    """The scores of one step, with the verdict that follows from them."""

    scores: tuple[Score, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """``good`` when every score passed, else ``check``."""
        return "good" if all(s.passed for s in self.scores) else "check"

    @property
    def colour(self) -> str:
        """The worst colour of the scores: ``green``, ``amber`` or ``red``."""
        return max((s.colour for s in self.scores), key=("green", "amber", "red").index, default="green")


class Cancelled(Exception):
    """Raised by a progress callback to stop the work at the next safe point."""


class Progress(Protocol):
    """The one callback for progress and cancel, in the GUI and on the command line."""

    def __call__(self, what: str, done: int, total: int) -> None:
        """Report that `done` of `total` parts of `what` are finished; raise `Cancelled` to stop."""


def no_progress(what: str, done: int, total: int) -> None:
    """Ignore progress."""
