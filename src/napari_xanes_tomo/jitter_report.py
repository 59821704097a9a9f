"""The part of the report about the jitter correction: a table of all energies, pictures of the most telling ones."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .drawing import F64, Plot, data_uri, mark, number_text, png, slice_picture, table, value_range
from .model import Score

__all__ = ["JitterRow", "jitter_section", "views_bytes", "views_path", "views_read"]

_SHOWN = 3  # energies with pictures
_COLOURS = ("#b3541e", "#1b5e9b")


def views_path(out: Path, energy: int) -> Path:
    """Return where the views of an energy (see `views.tomogram_views`) lie in an output folder."""
    return out / "qc" / f"jitter-{energy:03d}.npz"


def views_bytes(views: Mapping[str, npt.NDArray[Any]], candidate: int) -> bytes:
    """Return the views of a candidate as they are kept: half precision, compressed."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {name: np.asarray(v, dtype=np.float16) for name, v in views.items()}
    np.savez_compressed(buffer, candidate=np.array(candidate), **arrays)
    return buffer.getvalue()


def views_read(path: Path, candidate: int) -> dict[str, F64]:
    """Return the views kept in a file; none where they are missing, damaged or of another candidate."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            if int(kept["candidate"]) != candidate:
                return {}
            return {name: kept[name].astype(np.float64) for name in kept.files if name != "candidate"}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}


@dataclass(frozen=True)
class JitterRow:
    """What the report knows about the jitter of one energy.

    Attributes
    ----------
    energy_ev, pixel_nm : float
        Pixel as recorded; NaN where it is not known.
    numbers : mapping
        Of the candidate that counts.
    scores : tuple of Score
    accepted, reference : bool
    theta_deg : (n,) array
        Empty where there is no table.
    arrays : callable
        Returns an array of the candidate by its name, None where it is missing.
    views : dict of str to array
        See `views.tomogram_views`.
    ev_per_px : float
        What one px of this energy as a whole does to the edge energy at a surface, eV; NaN before there are maps.
    """

    energy_ev: float
    pixel_nm: float
    numbers: Mapping[str, Any]
    scores: tuple[Score, ...]
    accepted: bool
    reference: bool
    theta_deg: F64
    arrays: Callable[[str], F64 | None]
    views: Mapping[str, F64]
    ev_per_px: float = float("nan")

    def score(self, name: str) -> Score | None:
        """Return a score by its name."""
        return next((s for s in self.scores if s.name == name), None)

    @property
    def failed(self) -> list[Score]:
        """The scores that do not pass."""
        return [s for s in self.scores if not s.passed]


def jitter_section(rows: Sequence[JitterRow]) -> str:
    """Return the section as HTML; nothing without a row."""
    if not rows:
        return ""
    body = _table(rows) + _NOTE
    for row in _telling(rows):
        body += _one(row)
    return f"<h2>Jitter correction</h2>{body}"


_NOTE = (
    '<p class="note">A value beyond its limit is red; limits follow the noise of each energy. sigma: stated '
    "standard error of a projection. Residual shift: displacement of a projection against the reprojection of a "
    "volume without its block of angles (scatter). Moments: scatter of the mass profile (y) and of the centre of "
    "mass (x), which see slow drifts as well. Seam: step of the moments where flats were taken. Trends: from the "
    "first to the last projection. FRC: half the period at which the ring correlation with the reprojection ends;"
    " no resolution of the maps. eV: what sigma x would do to the edge energy at a surface if all projections "
    "were displaced by it alike. None of these is the error of the shifts, which nobody knows on measured "
    "data.</p>"
)
_COLUMNS = (
    ("sigma_y", "sigma y"), ("sigma_x", "sigma x"), ("residual shift y", "residual<br>shift y"),
    ("residual shift x", "residual<br>shift x"), ("moment consistency y", "moments y"),
    ("moment consistency x", "moments x"), ("seam step y", "seam y"), ("seam step x", "seam x"),
    ("ring correlation ends at", "FRC"),
)  # fmt: skip


def _cell(score: Score | None, nm: float = float("nan"), digits: int = 2) -> str:
    if score is None or not math.isfinite(score.value):
        return ""
    text = number_text(score.value, digits)
    if math.isfinite(nm):
        text += f" ({number_text(score.value * nm, 3)})"
    return escape(text) if score.passed else mark(text, "bad")


def _table(rows: Sequence[JitterRow]) -> str:
    header = [("energy<br>eV", False)]
    header += [(f"{title}<br>px (nm)", False) for _, title in _COLUMNS]
    header += [("gain<br>trend", False), ("background<br>trend, OD", False), ("beyond<br>a limit", False)]
    with_ev = any(math.isfinite(r.ev_per_px) for r in rows)
    header += [("eV", False)] if with_ev else []
    header += [("verdict", True)]
    lines = []
    for r in rows:
        cells = [f"{r.energy_ev:.2f}{' (ref)' if r.reference else ''}"]
        cells += [_cell(r.score(name), r.pixel_nm) for name, _ in _COLUMNS]
        cells += [_cell(r.score(name)) for name in ("gain trend", "background trend", "projections beyond a limit")]
        if with_ev:
            sigma = r.score("sigma_x")
            cells.append("" if sigma is None or not r.ev_per_px else number_text(abs(r.ev_per_px) * sigma.value, 2))
        failed = [f"{s.name} {number_text(s.value, 3)} {s.unit}".rstrip() for s in r.failed]
        text = ("check: " + "; ".join(failed) if failed else "good") + (", accepted" if r.accepted else "")
        text = "partial, " + text if r.numbers.get("partial") else text
        lines.append([*cells, mark(text, "check" if failed else "good")])
    return table(header, lines)


def _telling(rows: Sequence[JitterRow]) -> list[JitterRow]:
    """Return the reference and the energies that are most in doubt, in the order of the table."""

    def doubt(row: JitterRow) -> float:
        ratios = [
            (s.value / s.threshold if s.better == "lower" else s.threshold / max(s.value, 1e-9))
            for s in row.scores
            if s.threshold and math.isfinite(s.value)
        ]
        return max(ratios, default=0.0)

    ranked = sorted(range(len(rows)), key=lambda i: (not rows[i].reference, -doubt(rows[i])))
    return [rows[i] for i in sorted(ranked[:_SHOWN])]


def _trace(row: JitterRow, names: tuple[str, str], title: str, unit: str, width: int = 380) -> str:
    found = [(name, row.arrays(name)) for name in names]
    curves = [(name, values) for name, values in found if values is not None and len(values) == len(row.theta_deg)]
    curves = [(name, values) for name, values in curves if np.isfinite(values).any()]
    if not curves:
        return ""
    limits = [float(row.numbers.get("limits", {}).get(name, np.nan)) for name, _ in curves]
    edge = [v for limit in limits if math.isfinite(limit) for v in (-limit, limit)]
    plot = Plot(value_range(row.theta_deg), value_range(*(v for _, v in curves), edge or [0.0]), width, 150)
    for (_, values), limit, colour in zip(curves, limits, _COLOURS, strict=False):
        order = np.argsort(row.theta_deg, kind="stable")
        plot.line(row.theta_deg[order], values[order], colour)
        for level in (-limit, limit) if math.isfinite(limit) else ():
            plot.parts.append(
                f'<path d="M{plot.px(plot.x[0]):.1f} {plot.py(level):.1f}H{plot.px(plot.x[1]):.1f}" '
                f'stroke="{colour}" stroke-dasharray="4 3" fill="none"/>'
            )
    plot.axes(title, "angle / deg", unit, n_y=3)
    return f"<figure>{plot.svg()}</figure>"


def _sinogram(row: JitterRow, name: str, traces: F64 | None, width: int = 380, height: int = 200) -> str:
    values = row.views.get(name)
    if values is None or not np.isfinite(values).any():
        return ""
    n, columns = values.shape
    if name == "residual":
        top = float(np.nanpercentile(np.abs(values), 99.5)) or 1.0
        low, high = -top, top
    else:
        low, high = (float(v) for v in np.nanpercentile(values, [1, 99.8]))
    lines = []
    for k, colour in enumerate(("#ff8c1a", "#ffffff", "#ff8c1a") if traces is not None and len(traces) == n else ()):
        assert traces is not None
        points = [
            f"{(traces[i, k] + 0.5) * width / columns:.1f} {(i + 0.5) * height / n:.1f}"
            for i in range(n)
            if math.isfinite(traces[i, k])
        ]
        if points:
            lines.append(f'<path d="M{"L".join(points)}" fill="none" stroke="{colour}" stroke-width="0.8"/>')
    return (
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
        f'<image href="{data_uri(png(values, low, high))}" width="{width}" height="{height}" '
        f'preserveAspectRatio="none"/>{"".join(lines)}</svg>'
    )


def _one(row: JitterRow) -> str:
    method = escape(str(row.numbers.get("method", "")))
    parts = [f"<h3>{row.energy_ev:g} eV</h3>", f'<p class="note">Estimate kept: {method}.</p>' if method else ""]
    axis = [
        f"{name} {number_text(float(v), 3)} ± {number_text(float(s), 2)} {unit}".rstrip()
        + (" (significant)" if sure else "")
        for name, v, s, unit, sure in row.numbers.get("axis", ())
    ]
    if axis:
        parts.append(f'<p class="note">Axis and angles, reported and not applied: {escape("; ".join(axis))}.</p>')
    plots = [
        _trace(row, ("profile_shift_px", "moment_deviation_px"), "Moments left: y and x (blue)", "px"),
        _trace(row, ("residual_shift_y_px", "residual_shift_x_px"), "Residual shift: y and x (blue)", "px"),
        _trace(row, ("mass_deviation", "gain_deviation"), "Mass and gain (blue), relative", ""),
        _trace(row, ("background_od", ""), "Background beside the object", "OD"),
    ]
    parts.append(f'<div class="row">{"".join(plots)}</div>')
    views = row.views
    if views:
        width = views["sinogram"].shape[1]
        at = int(views["row"][0]) if "row" in views else 0
        bin = float(views["bin"][0]) if "bin" in views else 1.0
        figures = [
            (_sinogram(row, "sinogram", views.get("traces")),
             "Sinogram as recorded sideways, first projection on top; lines: edges and rotation axis as fitted"),
            (_sinogram(row, "residual", None),
             "Residual: aligned minus reprojection of a volume without that block of angles"),
        ]  # fmt: skip
        both = np.stack([views[k] for k in ("before", "after")])
        low, high = (float(v) for v in np.nanpercentile(both, [0.5, 99.8]))
        nm = row.pixel_nm * bin
        for name, text in (("before", "Slice before the correction"), ("after", "The same slice after it")):
            picture = slice_picture(views[name], low, high, "OD per px", nm if math.isfinite(nm) else 1.0)
            figures.append((picture, text + (f", row {at}" if width else "")))
        parts.append(
            '<div class="row">'
            + "".join(f"<figure>{p}<figcaption>{escape(t)}.</figcaption></figure>" for p, t in figures if p)
            + "</div>"
        )
    return "".join(parts)
