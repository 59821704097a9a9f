"""Plots of the docks (pyqtgraph: no OpenGL, clickable)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyqtgraph as pg

__all__ = ["BLUE", "GREY", "ORANGE", "MatrixPlot", "PointPlot", "SinogramPlot", "dress"]

BLUE, ORANGE, GREY, YELLOW, GREEN = "#4fa3e0", "#e0904f", "#909090", "#d0d060", "#6fbf73"

LINES = (
    pg.QtCore.Qt.PenStyle.SolidLine,
    pg.QtCore.Qt.PenStyle.DashLine,
    pg.QtCore.Qt.PenStyle.DotLine,
    pg.QtCore.Qt.PenStyle.DashDotLine,
)


def dress(plot: Any, owner: Any) -> None:
    """Give a plot the look of the docks."""
    plot.ctrlMenu.setParent(owner, plot.ctrlMenu.windowFlags())  # pyqtgraph leaves it without an owner
    plot.showGrid(x=True, y=True, alpha=0.15)
    for side in ("left", "bottom"):
        plot.getAxis(side).setPen(GREY)
        plot.getAxis(side).setTextPen(GREY)
        plot.getAxis(side).enableAutoSIPrefix(False)  # "x 0.001" behind a unit is misread
    plot.getAxis("left").setWidth(56)


class PointPlot(pg.GraphicsLayoutWidget):
    """Rows of points with error bars over one axis; a click on a point tells its number.

    Parameters
    ----------
    rows : sequence of (str, int)
        Label of the vertical axis and number of series of points, one per plot, from the top.
    x_label : str
    height : int
    """

    COLOURS = (BLUE, ORANGE, GREEN)

    def __init__(self, rows: Sequence[tuple[str, int]], x_label: str, height: int) -> None:
        super().__init__()
        self.setBackground(None)
        self.setFixedHeight(height)
        self.on_click: Any = None
        self._plots: list[Any] = []
        self._points: list[list[tuple[Any, Any]]] = []
        self._lines: list[list[Any]] = []
        self._markers: list[Any] = []
        self._x: npt.NDArray[np.float64] = np.zeros(0)
        for row, (label, count) in enumerate(rows):
            plot = self.addPlot(row=row, col=0, enableMenu=False)
            dress(plot, self)
            plot.setLabel("left", label)
            lines = [
                pg.PlotDataItem(pen=pg.mkPen(c, width=1, style=s))
                for c, s in zip((GREY, GREY, YELLOW, GREEN), LINES, strict=True)
            ]
            pairs = []
            for k in range(count):
                colour = self.COLOURS[k]
                bars = pg.ErrorBarItem(x=np.zeros(0), y=np.zeros(0), height=np.zeros(0), pen=pg.mkPen(colour))
                points = pg.ScatterPlotItem(size=6, pen=None, brush=colour, hoverable=True, hoverSize=10, tip=None)
                points.sigClicked.connect(self._clicked)
                pairs.append((points, bars))
            marker = pg.InfiniteLine(angle=90, pen=pg.mkPen(YELLOW, width=1))
            for item in (*lines, *(i for pair in pairs for i in reversed(pair)), marker):
                plot.addItem(item)
            self._plots.append(plot)
            self._points.append(pairs)
            self._lines.append(lines)
            self._markers.append(marker)
            if row < len(rows) - 1:
                plot.getAxis("bottom").setStyle(showValues=False)
            if row:
                plot.setXLink(self._plots[0])
        self._plots[-1].setLabel("bottom", x_label)

    def name_axes(self, y: str, x: str) -> None:
        """Name the vertical axis of the first plot and the common horizontal one."""
        self._plots[0].setLabel("left", y)
        self._plots[-1].setLabel("bottom", x)

    def show_points(
        self,
        row: int,
        x: npt.ArrayLike,
        series: Sequence[tuple[npt.ArrayLike, npt.ArrayLike | None]],
        numbers: Sequence[int],
        lines: Sequence[tuple[npt.ArrayLike, npt.ArrayLike]] = (),
        *,
        by_points: bool = False,
    ) -> None:
        """Show points of one plot: ``(values, sigma or None)`` a series; at most four lines ``(x, y)`` behind them.

        With `by_points` the points say what of the vertical axis is seen, whatever lines run there.
        """
        low, high = np.inf, -np.inf
        at = np.asarray(x, dtype=float)
        number = np.asarray(numbers)
        for k, (points, bars) in enumerate(self._points[row]):
            values, sigma = series[k] if k < len(series) else (np.zeros(0), None)
            y = np.asarray(values, dtype=float)
            here = at[: len(y)]
            good = np.isfinite(y) & np.isfinite(here)
            points.setData(here[good], y[good], data=number[: len(y)][good].tolist())
            height = (
                2 * np.nan_to_num(np.asarray(sigma, dtype=float)[good]) if sigma is not None else np.zeros(good.sum())
            )
            bars.setData(x=here[good], y=y[good], height=height)
            if good.any():
                low = min(low, float(np.min(y[good] - height / 2)))
                high = max(high, float(np.max(y[good] + height / 2)))
        for k, line in enumerate(self._lines[row]):
            line.setData(*lines[k]) if k < len(lines) else line.setData([], [])
        self._plots[row].autoRange()
        if by_points and high > low:
            margin = 0.2 * (high - low)
            self._plots[row].setYRange(min(low, 0) - margin, max(high, 0) + margin, padding=0)

    def values(self, row: int, series: int = 0) -> tuple[list[int], npt.NDArray[np.float64]]:
        """Return the numbers of the points of a series as plotted, and their values."""
        data = self._points[row][series][0].data
        return data["data"].tolist(), np.asarray(data["y"], dtype=float)

    def mark(self, x: float) -> None:
        """Move the marker."""
        for marker in self._markers:
            marker.setVisible(bool(np.isfinite(x)))
            if np.isfinite(x):
                marker.setValue(x)

    def _clicked(self, _: Any, points: Any) -> None:
        if len(points) and self.on_click is not None:
            self.on_click(int(points[0].data()))


class MatrixPlot(pg.GraphicsLayoutWidget):
    """A matrix as a picture with a scale of its values; a click on a cell tells its row and column.

    Parameters
    ----------
    height : int
    """

    def __init__(self, height: int) -> None:
        super().__init__()
        self.setBackground(None)
        self.setFixedHeight(height)
        self.on_click: Any = None
        plot = self._plot = self.addPlot(row=0, col=0, enableMenu=False)
        dress(plot, self)
        self._image = pg.ImageItem(axisOrder="row-major")
        plot.addItem(self._image)
        self._bar = pg.ColorBarItem(interactive=False, colorMap="viridis", width=12)
        self._bar.setImageItem(self._image, insert_in=plot)
        self._bar.getAxis("right").enableAutoSIPrefix(False)  # "x 0.001" behind a unit is misread
        self._bar.ctrlMenu.setParent(self, self._bar.ctrlMenu.windowFlags())
        self._marker = pg.ScatterPlotItem(size=9, symbol="s", pen=pg.mkPen(YELLOW, width=1), brush=None)
        plot.addItem(self._marker)
        self.values: npt.NDArray[np.float64] = np.zeros((0, 0))
        self.scene().sigMouseClicked.connect(self._clicked)

    def show_matrix(
        self,
        values: npt.ArrayLike,
        *,
        rows: Sequence[str],
        left: str,
        bottom: str,
        columns: Sequence[str] = (),
        unit: str = "",
    ) -> None:
        """Show ``(rows, columns)`` values from 0 upward, NaN blank, the first row on top; names of rows and columns."""
        self._bar.getAxis("right").setLabel(unit)
        self.values = np.asarray(values, dtype=float)
        self._marker.setData([], [])
        if not self.values.size:
            self._image.clear()
            return
        known = np.isfinite(self.values)
        top = float(np.percentile(self.values[known], 99)) if known.any() else 1.0
        self._image.setImage(self.values, levels=(0.0, max(top, 1e-9)))
        self._image.setRect(pg.QtCore.QRectF(-0.5, -0.5, *reversed(self.values.shape)))
        self._bar.setLevels((0.0, max(top, 1e-9)))
        self._plot.setLabel("left", left)
        self._plot.setLabel("bottom", bottom)
        self._plot.getViewBox().invertY(True)
        self._plot.getAxis("left").setTicks([_few(rows, 12)])
        self._plot.getAxis("bottom").setTicks([_few(columns, 6)] if columns else None)
        self._plot.autoRange(padding=0.01)

    def mark(self, row: int, column: int) -> None:
        """Move the marker; no marker beyond the matrix."""
        inside = 0 <= row < self.values.shape[0] and 0 <= column < self.values.shape[1]
        self._marker.setData([column] if inside else [], [row] if inside else [])

    def _clicked(self, event: Any) -> None:
        point = self._plot.getViewBox().mapSceneToView(event.scenePos())
        self.press(round(point.y()), round(point.x()))

    def press(self, row: int, column: int) -> None:
        """Do what a click on a cell does."""
        if 0 <= row < self.values.shape[0] and 0 <= column < self.values.shape[1] and self.on_click is not None:
            self.on_click(row, column)


def _few(names: Sequence[str], most: int) -> list[tuple[int, str]]:
    """Return positions and names of at most `most` evenly spread ones."""
    step = max(1, -(-len(names) // most))
    return [(i, names[i]) for i in range(0, len(names), step)]


class SinogramPlot(pg.GraphicsLayoutWidget):
    """A sinogram, angles upward, with the traces of both edges and of the rotation axis."""

    def __init__(self) -> None:
        super().__init__()
        self.setBackground(None)
        self.setFixedHeight(240)
        plot = self._plot = self.addPlot(row=0, col=0, enableMenu=False)
        dress(plot, self)
        plot.setLabel("left", "angle (deg)")
        plot.setLabel("bottom", "column (px)")
        self._image = pg.ImageItem(axisOrder="row-major")
        plot.addItem(self._image)
        self.traces = [pg.PlotDataItem(pen=pg.mkPen(c, width=1)) for c in (BLUE, YELLOW, ORANGE)]
        for trace in self.traces:
            plot.addItem(trace)

    def show_sinogram(self, rows: npt.ArrayLike, theta_deg: npt.ArrayLike, traces: npt.ArrayLike) -> None:
        """Show ``(n, x)`` absorbance and ``(n, 3)`` columns of left edge, axis and right edge."""
        data, theta = np.asarray(rows, dtype=float), np.asarray(theta_deg, dtype=float)
        order = np.argsort(theta)
        first, last = float(theta[order[0]]), float(theta[order[-1]])
        half = (last - first) / max(1, len(theta) - 1) / 2
        low, high = np.percentile(data, (1, 99.8))
        self._image.setImage(data[order], levels=(low, max(high, low + 1e-6)))
        self._image.setRect(pg.QtCore.QRectF(-0.5, first - half, data.shape[1], last - first + 2 * half))
        lines = np.asarray(traces, dtype=float)[order]
        for k, trace in enumerate(self.traces):
            trace.setData(lines[:, k], theta[order], connect="finite")
        self._plot.autoRange()
