"""Checks of every aligned projection against its angle: moments, mass, gain, background, ring correlation."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from qtpy.QtWidgets import QComboBox, QVBoxLayout, QWidget

from napari_xanes_tomo.steps import StepResult

from .plots import PointPlot

__all__ = ["CHECKS", "ChecksPlot"]

CHECKS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Moments left: y, x", "px", ("profile_shift_px", "moment_deviation_px")),
    ("Residual shift: y, x", "px", ("residual_shift_y_px", "residual_shift_x_px")),
    ("Mass, gain: relative", "", ("mass_deviation", "gain_deviation")),
    ("Background beside the object", "OD", ("background_od",)),
    ("Ring correlation ends at", "px", ("frc_px",)),
)
"""Title, unit, and the arrays of the result (`steps.CHECKED`) that are drawn."""


class ChecksPlot(QWidget):
    """One of the checks of all projections of an energy, with its limits; a click on a point tells its number."""

    def __init__(self) -> None:
        super().__init__()
        box = QVBoxLayout(self)
        box.setContentsMargins(0, 0, 0, 0)
        self.choice = QComboBox()
        self.choice.addItems([title for title, _, _ in CHECKS])
        self.choice.setToolTip(
            "Numbers that all projections of one object share. Grey lines: limits, which follow the noise of this "
            "energy. First series blue, second orange. None of them is the error of the displacements."
        )
        self.choice.currentIndexChanged.connect(self._draw)
        self.plot = PointPlot([("", 2)], "angle (deg)", 150)
        box.addWidget(self.choice)
        box.addWidget(self.plot)
        self._theta: npt.NDArray[np.float64] = np.zeros(0)
        self._result: StepResult | None = None

    def listen(self, on_click: Any) -> None:
        """Call ``on_click(number of the projection)`` for every point clicked."""
        self.plot.on_click = on_click

    def show_result(self, theta_deg: npt.ArrayLike, result: StepResult | None) -> None:
        """Show the checks of one energy; hidden while there are none.

        Parameters
        ----------
        theta_deg : (n,) array
            Degrees; numbers of the projections are shown where they are unknown.
        result : StepResult or None
            With the arrays of `CHECKS`, and their limits as its number ``limits``.
        """
        theta = np.asarray(theta_deg, dtype=float)
        self._theta = theta if np.isfinite(theta).all() else np.arange(len(theta), dtype=float)
        known = result is not None and any(name in result.arrays for _, _, names in CHECKS for name in names)
        self._result = result if known else None
        self.setVisible(known)
        self._draw()

    def mark(self, angle: int) -> None:
        """Move the marker to a projection."""
        if 0 <= angle < len(self._theta):
            self.plot.mark(float(self._theta[angle]))

    def _draw(self) -> None:
        title, unit, names = CHECKS[self.choice.currentIndex()]
        self.plot.name_axes(f"{title.partition(':')[0]} ({unit})" if unit else title.partition(":")[0], "angle (deg)")
        result = self._result
        if result is None or not len(self._theta):
            self.plot.show_points(0, [], [], [])
            return
        found = [np.asarray(result.arrays[name], dtype=float) for name in names if name in result.arrays]
        limits = {float(result.numbers.get("limits", {}).get(name, np.nan)) for name in names}
        ends = [float(self._theta.min()), float(self._theta.max())]
        both = () if names == ("frc_px",) else (-1.0,)  # half a period has no sign
        lines = [(ends, [s * v, s * v]) for v in sorted(limits) if np.isfinite(v) for s in (1.0, *both)]
        self.plot.show_points(0, self._theta, [(v, None) for v in found], range(len(self._theta)), lines[:4])
