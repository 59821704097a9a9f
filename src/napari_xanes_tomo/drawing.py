"""Drawing for the report: pictures and tables as text that stands on its own (SVG, PNG as data URIs, HTML)."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
import numpy.typing as npt

__all__ = ["Plot", "data_uri", "mark", "number_text", "png", "slice_picture", "table", "ticks", "value_range"]

F64 = npt.NDArray[np.float64]

# Nine points of matplotlib's "viridis" (CC0), between which the palette is linear.
_VIRIDIS = (
    (68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141),
    (39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37),
)  # fmt: skip
_NOTHING = (215, 215, 215)  # where there is no value


def _palette() -> npt.NDArray[np.uint8]:
    """(256, 3): entry 0 for no value, 1 .. 255 from low to high."""
    points = np.array(_VIRIDIS, dtype=float)
    at = np.linspace(0, len(points) - 1, 255)
    colours = np.stack([np.interp(at, np.arange(len(points)), points[:, c]) for c in range(3)], axis=1)
    return np.concatenate([[_NOTHING], np.round(colours)]).astype(np.uint8)


def png(values: npt.ArrayLike, low: float, high: float) -> bytes:
    """Return `values` (rows, columns) as a PNG with 255 colours from `low` to `high`; NaN is light grey."""
    a = np.atleast_2d(np.asarray(values, dtype=float))
    with np.errstate(invalid="ignore", over="ignore"):
        part = np.clip((a - low) / (high - low if high > low else 1.0), 0, 1)
    index = np.where(np.isfinite(a), 1 + np.round(254 * np.nan_to_num(part)), 0).astype(np.uint8)
    rows, columns = index.shape
    lines = np.concatenate([np.zeros((rows, 1), dtype=np.uint8), index], axis=1)  # filter 0 before each row

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"PLTE", _palette().tobytes())
        + chunk(b"IDAT", zlib.compress(lines.tobytes(), 9))
        + chunk(b"IEND", b"")
    )


def data_uri(data: bytes) -> str:
    """Return a PNG as the address of an image."""
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between `low` and `high`."""
    span = high - low
    if not math.isfinite(span) or span <= 0:
        return [low]
    raw = span / about
    scale = 10.0 ** math.floor(math.log10(raw))
    step = min((scale * m for m in (1, 2, 5, 10)), key=lambda s: abs(math.log(s / raw)))
    first = math.ceil(low / step - 1e-9)
    return [(first + i) * step for i in range(int(math.floor(high / step + 1e-9)) - first + 1)]


def number_text(value: float | None, digits: int = 4) -> str:
    """Return a number as text, empty where there is none."""
    if value is None or not math.isfinite(value):
        return ""
    return "0" if abs(value) < 1e-12 else f"{value:.{digits}g}"


class Plot:
    """Axes of one plot in pixels; y grows upward."""

    def __init__(
        self, x: tuple[float, float], y: tuple[float, float], width: int, height: int, left: int = 46, below: int = 32
    ) -> None:
        self.x, self.y = _padded(*x, 0.02), _padded(*y, 0.06)
        self.width, self.height = width, height
        self.left, self.top, self.right, self.below = left, 20, 8, below
        self.parts: list[str] = []

    def px(self, x: float) -> float:
        """Return where `x` lies from the left."""
        return self.left + (x - self.x[0]) / (self.x[1] - self.x[0]) * (self.width - self.left - self.right)

    def py(self, y: float) -> float:
        """Return where `y` lies from the top."""
        return (
            self.height - self.below - (y - self.y[0]) / (self.y[1] - self.y[0]) * (self.height - self.below - self.top)
        )

    def axes(self, title: str, x_label: str = "", y_label: str = "", n_x: int = 5, n_y: int = 4) -> None:
        """Draw axes, ticks and labels below what is drawn."""
        base, right = self.height - self.below, self.width - self.right
        out = [f'<text class="title" x="{self.left}" y="13">{escape(title)}</text>']
        for t in ticks(*self.y, n_y):
            y = self.py(t)
            out.append(f'<path d="M{self.left} {y:.1f}H{right}" stroke="#e3e3e3"/>')
            out.append(f'<text x="{self.left - 5}" y="{y + 4:.1f}" text-anchor="end">{number_text(t)}</text>')
        for t in ticks(*self.x, n_x):
            x = self.px(t)
            out.append(f'<path d="M{x:.1f} {base}v4" stroke="#777"/>')
            out.append(f'<text x="{x:.1f}" y="{base + 15}" text-anchor="middle">{number_text(t, 5)}</text>')
        out.append(f'<path d="M{self.left} {self.top}V{base}H{right}" fill="none" stroke="#777"/>')
        if x_label:
            at = f'x="{(self.left + right) / 2:.0f}" y="{self.height - 2}"'
            out.append(f'<text {at} text-anchor="middle">{escape(x_label)}</text>')
        if y_label:
            at = f'transform="translate(11 {(self.top + base) / 2:.0f}) rotate(-90)"'
            out.append(f'<text {at} text-anchor="middle">{escape(y_label)}</text>')
        self.parts = out + self.parts

    def line(self, x: F64, y: F64, colour: str) -> None:
        """Draw a line that is broken where a value is missing."""
        path, pen = [], "M"
        for a, b in zip(x.tolist(), y.tolist(), strict=True):
            if math.isfinite(a) and math.isfinite(b):
                path.append(f"{pen}{self.px(a):.1f} {self.py(b):.1f}")
                pen = "L"
            else:
                pen = "M"
        if path:
            self.parts.append(f'<path d="{"".join(path)}" fill="none" stroke="{colour}" stroke-width="1.3"/>')

    def points(self, x: F64, y: F64, colour: str, error: F64 | None = None, radius: float = 2.6) -> None:
        """Draw points, with error bars where `error` is given."""
        for i, (a, b) in enumerate(zip(x.tolist(), y.tolist(), strict=True)):
            if not (math.isfinite(a) and math.isfinite(b)):
                continue
            if error is not None and math.isfinite(float(error[i])):
                e = float(error[i])
                self.parts.append(
                    f'<path d="M{self.px(a):.1f} {self.py(b - e):.1f}V{self.py(b + e):.1f}" stroke="{colour}"/>'
                )
            self.parts.append(f'<circle cx="{self.px(a):.1f}" cy="{self.py(b):.1f}" r="{radius}" fill="{colour}"/>')

    def svg(self) -> str:
        """Return the plot as SVG."""
        body = "".join(self.parts)
        return f'<svg width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}">{body}</svg>'


def _padded(low: float, high: float, part: float) -> tuple[float, float]:
    if not (math.isfinite(low) and math.isfinite(high)):
        return 0.0, 1.0
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-30):
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    room = part * (high - low)
    return low - room, high + room


def value_range(*arrays: npt.ArrayLike) -> tuple[float, float]:
    """Return the least and the largest finite value, (0, 1) where there is none."""
    values = np.concatenate([np.ravel(np.asarray(a, dtype=float)) for a in arrays])
    values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)


def slice_picture(values: F64, low: float, high: float, unit: str, voxel_nm: float) -> str:
    """Return a slice with scale bar and colour bar, as SVG."""
    rows, columns = values.shape
    size = 250
    height = round(size * rows / columns)
    field = voxel_nm * columns
    length = next(v for v in (m * 10.0**k for k in range(9, -3, -1) for m in (5, 2, 1)) if v <= 0.3 * field)
    bar = size * length / field
    name = f"{length / 1000:g} µm" if length >= 1000 else f"{length:g} nm"
    y = height - 12
    ramp = data_uri(png(np.arange(255.0)[None, :], 0, 254))
    return (
        f'<svg width="{size}" height="{height + 34}" viewBox="0 0 {size} {height + 34}">'
        f'<image href="{data_uri(png(values, low, high))}" width="{size}" height="{height}"/>'
        f'<path d="M10 {y}h{bar:.1f}" stroke="#000" stroke-width="7"/>'
        f'<path d="M11 {y}h{bar - 2:.1f}" stroke="#fff" stroke-width="5"/>'
        f'<text x="{10 + bar / 2:.1f}" y="{y - 8}" text-anchor="middle" style="fill:#fff;stroke:#000;stroke-width:2px;'
        f'paint-order:stroke">{name}</text>'
        f'<image href="{ramp}" y="{height + 6}" width="{size}" height="9" preserveAspectRatio="none"/>'
        f'<text x="0" y="{height + 29}">{number_text(low, 3)}</text>'
        f'<text x="{size / 2}" y="{height + 29}" text-anchor="middle">{escape(unit)}</text>'
        f'<text x="{size}" y="{height + 29}" text-anchor="end">{number_text(high, 3)}</text></svg>'
    )


def table(header: Sequence[tuple[str, bool]], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; `header` names each column and says whether it is text. Cells are HTML."""
    kinds = [' class="t"' if text else "" for _, text in header]
    head = "".join(f"<th{kind}>{name}</th>" for kind, (name, _) in zip(kinds, header, strict=True))
    lines = ("".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True)) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def mark(text: str, kind: str) -> str:
    """Return text in the colour of a class of the style sheet, escaped."""
    return f'<span class="{kind}">{escape(text)}</span>'
