"""What stray light does to the absorbance and to an edge jump."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .absorbance import Normalised
from .agreement import bin_frames
from .detector import stray_law
from .flats import exposures
from .model import EnergyScan

__all__ = ["stray_effect", "stray_jump_effect"]


def stray_effect(data: Normalised, scan: EnergyScan) -> tuple[float, float, float, float]:
    """Return the law of the stray light that was subtracted, and what leaving it in would do.

    Parameters
    ----------
    data : Normalised
    scan : EnergyScan
        Whose projections `data` are.

    Returns
    -------
    constant, fraction : float
        Counts, and part of a frame's mean; see `detector.stray_law`.
    without, with_stray : float
        Mean absorbance behind the object as it is, and with the stray light left in. The same where there is none.
    """
    beam = data.beam
    assert beam is not None
    pick = np.unique(np.linspace(0, len(data.index) - 1, 12).astype(int))
    frames = data.data[pick]
    body = frames > 0.3 * max(float(np.percentile(frames, 98)), 1e-6)
    if not body.any():
        return 0.0, 0.0, 0.0, 0.0
    level = float(frames[body].mean())
    if not beam.stray.any():
        return 0.0, 0.0, level, level
    shape = data.frame_shape
    rows = (0, shape[0] // data.bin * data.bin)
    images = bin_frames(beam.basis(rows)[0], data.bin)
    seconds = exposures(scan.exposure_s)
    total, count = 0.0, 0
    flat_stray, flat_mean = [], []
    for s, (source, shot) in enumerate(beam.shots):
        t = float(exposures(beam.sources[int(source)].exposure_s)[shot])
        flat_stray.append(float(beam.shot_stray[s]))
        flat_mean.append(float(images[0].mean()) * t + float(beam.shot_stray[s]))
    shot_rate = float(np.mean(beam.shot_stray)) / float(
        np.mean([exposures(beam.sources[int(a)].exposure_s)[b] for a, b in beam.shots])
    )
    for frame, inside, j in zip(frames, body, data.index[pick], strict=True):
        rate = np.tensordot(beam.weights[j].astype(np.float32), images, 1)
        bare = np.maximum(rate * float(seconds[j]), 1e-3)
        through = bare * np.exp(-frame) + float(beam.stray[j])
        with_stray = -np.log(through / (bare + shot_rate * float(seconds[j])))
        use = inside & (rate > 0.05 * float(np.median(rate)))
        total += float(with_stray[use].sum())
        count += int(use.sum())
    constant, fraction = stray_law(
        np.concatenate([beam.stray[data.index], flat_stray]), np.concatenate([data.field_counts, flat_mean])
    )
    return constant, fraction, level, total / max(count, 1)


def stray_jump_effect(
    energies_ev: npt.ArrayLike, without: npt.ArrayLike, with_stray: npt.ArrayLike, edge_ev: float
) -> float:
    """Return by which part the edge jump is too small where stray light is left in; NaN where no jump is bracketed.

    Parameters
    ----------
    energies_ev : (energies,) array
    without, with_stray : (energies,) arrays
        Mean absorbance behind the object, ``object_od`` and ``object_od_with_stray`` of the flats step.
    edge_ev : float
        Energy of the edge.
    """
    energy, a, b = (np.asarray(v, dtype=float) for v in (energies_ev, without, with_stray))
    known = np.isfinite(a) & np.isfinite(b)
    below = known & (energy < edge_ev - 3) & (energy > edge_ev - 400)
    above = known & (energy > edge_ev + 15) & (energy < edge_ev + 400)
    if not below.any() or not above.any():
        return float("nan")
    low, high = below & (energy == energy[below].max()), above & (energy == energy[above].max())
    jump = float(a[high].mean() - a[low].mean())
    return 1 - float(b[high].mean() - b[low].mean()) / jump if jump > 0 else float("nan")
