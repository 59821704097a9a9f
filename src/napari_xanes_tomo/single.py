"""2-D XANES in a run: one angle an energy, so that there is no tomogram to align, and the maps are per area.

Every energy is the mean of its exposures. They are registered as images (`images.register_images`), placed once, and
combined pixel by pixel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .absorbance import Normalised
from .agreement import bin_frames
from .images import ImagesRegistered, register_images
from .io.given import FloatFrames
from .maps import AlignedEnergy, placed_rows
from .model import Alignment, EnergyScan, Progress, Quality, Score, Series, XanesTomoError, no_progress
from .recipe import Recipe, parameter_key
from .steps import StepResult

__all__ = ["MeanImage", "is_single", "mean_image", "placed_item", "single_jitter", "single_registrations"]

F32 = npt.NDArray[np.float32]
_SAME_ANGLE = 0.05


def is_single(series: Series) -> bool:
    """Whether every energy was recorded at one angle only (or none): 2-D XANES. Exposures may be repeated."""
    if any(s.given for s in series.scans) or sum(bool(s.usable.any()) for s in series.scans) < 2:
        return False
    # As planned, not as found: a tomogram of which one projection is there is no 2-D XANES.
    planned = np.concatenate([np.asarray(s.theta_deg, dtype=float) for s in series.scans])
    planned = planned[np.isfinite(planned)]
    return not planned.size or float(np.ptp(planned)) <= _SAME_ANGLE


@dataclass(frozen=True)
class MeanImage:
    """One energy as an image (y, x) of absorbance for the registration, binned.

    Attributes
    ----------
    data : (y, x) float32 array
        Mean of the exposures.
    usable : (y, x) bool array
        Pixels without a bad one of the camera in them.
    bin : int
    frame_shape : (int, int)
        Of a recorded frame.
    """

    data: F32
    usable: npt.NDArray[np.bool_]
    bin: int
    frame_shape: tuple[int, int]


def mean_image(data: Normalised) -> MeanImage:
    """Return the mean of the exposures of one energy."""
    h, w = data.frame_shape
    bad = np.zeros((h, w), dtype=np.float32) if data.beam is None else data.beam.mask((h, w)).astype(np.float32)
    # A dark band or a shadow belongs to the camera; single bad pixels are filled and do no harm.
    good = bin_frames(bad[None], data.bin)[0] < 0.5
    return MeanImage(data.data.mean(axis=0), good, data.bin, data.frame_shape)


def single_jitter(scan: EnergyScan) -> StepResult:
    """Return the displacements within an energy: none are looked for."""
    n = len(scan)
    zeros, unknown = np.zeros((n, 2)), np.full(n, np.nan)
    arrays = {"shift": zeros, "sigma": zeros, "moments": zeros, "residual": unknown, "bound": np.full((n, 2), np.nan)}
    numbers = {
        "single": True, "limits": {}, "left_out": [], "slips": [], "center": 0.0, "center_sigma": 0.0,
        "method": "not needed", "dropped": [], "jumps": [],
    }  # fmt: skip
    return StepResult(arrays, numbers, Quality((), ("not needed: one angle an energy, no tomogram to align",)))


def single_registrations(
    found: Mapping[int, MeanImage],
    series: Series,
    reference: int,
    recipe: Recipe,
    *,
    progress: Progress = no_progress,
) -> dict[int, StepResult]:
    """Register the images of all energies, and return the result of each by its number.

    Parameters
    ----------
    found : mapping of int to MeanImage
    series : Series
    reference : int
        Number of the reference energy.
    recipe : Recipe
    progress : callable

    Raises
    ------
    XanesTomoError
        The reference shows nothing.
    """
    numbers = sorted(found)
    bin, shape = found[reference].bin, found[reference].frame_shape
    energies = series.energies_ev[numbers]
    size = np.array([series.scans[e].pixel_size_nm for e in numbers])
    own = series.scans[reference].pixel_size_nm
    guess = own / size if np.isfinite(size).all() and (size > 0).all() else np.ones(len(numbers))
    made = register_images(
        np.stack([found[e].data for e in numbers]), energies, reference=numbers.index(reference), magnification=guess,
        usable=np.stack([found[e].usable for e in numbers]), parameters=recipe.registration, progress=progress,
    )  # fmt: skip
    return {
        e: _registration(made, k, series.scans[e], found[e], bin, shape, e == reference)
        for k, e in enumerate(numbers)
        if k not in made.failed
    } | {numbers[k]: StepResult({}, {"failed": why}) for k, why in made.failed.items()}


def _registration(
    made: ImagesRegistered,
    k: int,
    scan: EnergyScan,
    image: MeanImage,
    bin: int,
    shape: tuple[int, int],
    reference: bool,
) -> StepResult:
    """Return what `register_images` found of image `k` as the registration of its energy, raw px."""
    n, width = len(scan), shape[1]
    raw = made.alignments[k].unbinned(bin, shape)
    sigma = np.asarray(raw.sigma[0], dtype=float)
    bright = image.data > 0.5 * np.percentile(image.data, 98)
    numbers: dict[str, Any] = {
        "single": True,
        "magnification": float(raw.magnification),
        "magnification_sigma": float(made.magnification_sigma[k]),
        "roll_deg": float(raw.roll_deg),
        "dropped": [],
        "law": 1.0,
        "translation": [0.0, 0.0, 0.0],
        # What all exposures of an energy share; the beam's direction does not matter.
        "translation_sigma": [float(sigma[0]), float(sigma[1]), 0.0],
        "mass": float(image.data[bright].mean()) if bright.any() else float("nan"),
        "variance": 1.0,
        "template_level": 1.0,
        "correlation": float(made.correlation[k]),
    }
    arrays = {
        "shift": np.broadcast_to(raw.shift[0], (n, 2)).copy(),
        "sigma": np.zeros((n, 2)),
        "residual": np.full(n, np.nan),
    }
    if reference:
        return StepResult(arrays, numbers, Quality((), ("reference",)))
    misfit = float(made.misfit[k])
    scores = [
        Score("correlation with the reference", float(made.correlation[k]), "", 0.1, "higher"),
        Score("sigma of the shift", float(sigma.max()), "px", 0.1 * width / 256),
    ]
    if np.isfinite(misfit):
        scores.append(Score("disagreement of comparisons", misfit, "sigma", 6.0))
    return StepResult(arrays, numbers, Quality(tuple(scores)))


@dataclass(frozen=True)
class PlacedImage(FloatFrames):
    """The mean of an energy's exposures on the common grid, absorbance: one frame, placed when it is read."""

    item: AlignedEnergy
    grid: tuple[int, int]

    @property
    def frame_shape(self) -> tuple[int, int]:
        """(rows, columns) of the common grid."""
        return self.grid

    def __len__(self) -> int:
        return 1

    def read_rows(self, indices: Sequence[int], y0: int, y1: int) -> npt.NDArray[Any]:
        """Return rows ``y0:y1``, shape (frame, y1 - y0, x)."""
        mean = placed_rows(self.item, (y0, y1), self.grid).mean(axis=0, dtype=np.float32)
        return np.broadcast_to(mean, (len(indices), *mean.shape)).copy()

    def fingerprint(self) -> str:
        """Return a text that changes with the files and with where the image is placed."""
        a = self.item.alignment
        return parameter_key(self.item.scan.frames.fingerprint(), a.shift.tolist(), a.magnification, a.roll_deg)


def _placed_scan(item: AlignedEnergy, pixel_nm: float) -> EnergyScan:
    """Return an energy as one image on the common grid, for what works on images that were registered elsewhere."""
    if not len(item.used):
        raise XanesTomoError(f"{item.scan.energy_ev:g} eV: expected an exposure that can be used, got none")
    frames = PlacedImage(item, item.grid_shape)
    return replace(
        item.scan, frames=frames, theta_deg=np.zeros(1), exposure_s=np.ones(1), status=("ok",), flats=(),
        half=np.zeros(1, dtype=np.int64), time_s=np.full(1, np.nan), names=(), pixel_size_nm=pixel_nm, given="images",
    )  # fmt: skip


def placed_item(item: AlignedEnergy, pixel_nm: float) -> AlignedEnergy:
    """Return `item` as an image on the common grid."""
    none = np.zeros((1, 3))
    return replace(
        item, scan=_placed_scan(item, pixel_nm), alignment=Alignment.identity(1), air=none, mask=None, beam=None
    )
