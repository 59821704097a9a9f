"""The part of the report about the change of scale: mass against width, and parts that move with time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from .contrast import take_apart
from .deformation import acquisition_order, deformation
from .drawing import Plot, table, value_range
from .model import FloatArray
from .scale import MassScale, mass_against_scale

__all__ = ["moments_section"]


def moments_section(
    energies_ev: Sequence[float],
    registered: Mapping[int, Mapping[str, Any]],
    ratio: Mapping[int, float],
    reference: int,
    array: Callable[[Mapping[str, Any], str], FloatArray | None],
    scale_change: str,
    *,
    begun_s: Sequence[float | None] = (),
) -> str:
    """Return the HTML of the section, empty where there is nothing to compare.

    Parameters
    ----------
    energies_ev : sequence of float
        In the order of the script.
    registered : dict of int to mapping
        Payload of the registration that counts, by the number of the energy.
    ratio : dict of int to float
        Measured magnification over that of the calibration.
    reference : int
    array : callable
        Reads an array of a payload; None where it is not there.
    scale_change : str
        What the maps took it for; empty without maps.
    begun_s : sequence of float or None
        When every energy was begun, s; their order counts where it is not known.
    """
    if reference not in registered:
        return ""
    n = len(energies_ev)
    scale, mass, width = (np.full(n, np.nan) for _ in range(3))
    frame = float("nan")
    for e, payload in registered.items():
        numbers = payload["numbers"]
        scale[e], mass[e] = ratio.get(e, math.nan), float(numbers["mass"])
        width[e] = float(numbers.get("width") or math.nan)
        frame = float(numbers.get("frame_width") or frame) if e == reference or np.isnan(frame) else frame
    contrast = take_apart(energies_ev, mass)
    found = mass_against_scale(scale, np.ones(n), mass, width, contrast.parts, reference)
    rows = [
        (f"{energies_ev[e]:g}", *(f"{100 * v[e]:+.2f}" if np.isfinite(v[e]) else "" for v in
                                  (found.size, found.width, found.mass)))
        for e in np.flatnonzero(np.isfinite(found.size)).tolist()
    ]  # fmt: skip
    header = [("eV", False), ("M / law - 1<br>%", False), ("width (m2)<br>%", False), ("mass (m0)<br>%", False)]
    note = (
        '<p class="note">With the pixel size of the calibration, against the reference. Width: standard deviation of '
        "the absorbance along the axis, against the median; mass: absorbance summed over the particle, over what the "
        "tables expect, away from edges. Line: the square of the scale, as another magnification makes it; grey: the "
        "mass stays, as where the particle changes its size.</p>"
    )
    words = found.text()
    if scale_change:
        words += f" The maps take the change of scale for: {scale_change}."
    if np.isfinite(frame):
        begun = [math.nan if t is None else t for t in begun_s] if len(begun_s) == n else [math.nan] * n
        columns = ([_block(registered[e], name, array) if e in registered else None for e in range(n)]
                   for name in ("block_shift", "block_sigma", "block_place"))  # fmt: skip
        moved = deformation(
            acquisition_order(begun), *columns, reference=reference, share=contrast.share,
            strength=mass / mass[reference], width_px=frame,
        ).text()  # fmt: skip
        words += f" {moved[:1].upper()}{moved[1:]}"
    return f"<h2>Mass against width</h2>{_plot(found)}{table(header, rows)}{note}<p>{escape(words)}</p>"


def _block(
    payload: Mapping[str, Any], name: str, array: Callable[[Mapping[str, Any], str], FloatArray | None]
) -> FloatArray | None:
    """Return an array about blocks, displacements in pixels as wide as the reference's."""
    found = array(payload, name)
    width = float(payload["numbers"].get("pixel") or 1.0)
    return found if found is None or name == "block_place" else np.asarray(found * width)


def _plot(found: MassScale) -> str:
    x, y = (100 * np.asarray(v, dtype=np.float64) for v in (found.size, found.mass))
    good = np.isfinite(x) & np.isfinite(y)
    if good.sum() < 3:
        return ""
    plot = Plot(value_range(x[good], [0.0]), value_range(y[good], 2 * x[good], [0.0]), 420, 240)
    ends = np.array([x[good].min(), x[good].max()])
    plot.line(ends, np.zeros(2), "#999")
    plot.line(ends, 2 * ends, "#b3541e")
    plot.points(x[good], y[good], "#1b5e9b", np.zeros(good.sum()))
    plot.axes("Mass against scale", "M / law - 1, %", "mass (m0), %", n_x=5)
    return f"<figure>{plot.svg()}</figure>"
