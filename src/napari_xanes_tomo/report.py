"""The report of a run: one HTML file that can be read on its own, made from what lies in the output folder.

Pictures are part of the file (SVG, and PNG as data URIs); every text that comes from a file is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ._version import __version__
from .differences import Probe, null_tests
from .drawing import Plot, data_uri, mark, number_text, png, slice_picture, table, value_range
from .io.atomic import atomic_write
from .io.store import (
    EnergyRow,
    Event,
    Journal,
    QualityTable,
    ShiftRow,
    read_energies,
    read_map_attributes,
    read_maps,
    read_quality,
    read_shifts,
)
from .jitter_report import JitterRow, jitter_section, views_path, views_read
from .map_report import checks_section
from .model import XanesTomoError
from .recipe import EDGE_MEASURES, Recipe
from .registration_report import moments_section
from .state import active_events, candidates_in, quality_of
from .steps import STEPS

__all__ = ["write_report"]

F64 = npt.NDArray[np.float64]

_LARGEST_SLICE = 512  # pixels of a slice shown
_LISTED = 60  # projections listed by name before the rest is only counted
_SHOWN_MAPS = ("Mn", "Co", "Ni", "edge_energy_relative", *EDGE_MEASURES, "valence")

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 68rem; margin: 2rem auto;
       padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #ccc; }
h3 { font-size: 1rem; margin: 1.2rem 0 .2rem; }
p.sub { color: #555; margin: .2rem 0 1rem; } p.note { color: #555; font-size: .88rem; margin: .3rem 0 .8rem; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .18rem .65rem; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
th { border-bottom: 1px solid #888; font-weight: 600; vertical-align: bottom; }
th.t, td.t { text-align: left; white-space: normal; }
.wide { overflow-x: auto; } .bad { color: #a3200d; } .good { color: #1d6b2f; } .check { color: #8a5a00; }
.box { background: #f5f3ec; border-left: 4px solid #c9a227; padding: .5rem .9rem; margin: 1rem 0; }
.box ul { margin: .2rem 0; } .row { display: flex; flex-wrap: wrap; gap: 1.2rem; }
figure { margin: 0; } figcaption { font-size: .84rem; color: #333; max-width: 250px; }
svg text { font: 11px system-ui, sans-serif; fill: #333; } svg .title { font-weight: 600; }
svg image { image-rendering: pixelated; }
pre { background: #f6f6f6; padding: .7rem; font-size: .82rem; overflow-x: auto; }
@media print { body { max-width: none; margin: 0; } h2 { break-after: avoid; } figure, tr { break-inside: avoid; } }
"""

_METHODS = """
<p>Counts become absorbance, -ln(I/I<sub>0</sub>), by the flats taken with each projection, scaled by exposure; the
plane through the air around the object is subtracted. <b>Jitter</b>: the mass in every detector row does not depend on
the angle, the centre of mass moves on a sinusoid (Helgason-Ludwig conditions, {10.1002/cpa.3160190207}); these moments
are refined by reprojection (Dengler 1989, {10.1016/0304-3991(89)90065-9}; Yu et al. 2018,
{10.1107/S1600577518013929}), and projections held out of the reconstruction decide whether the refinement is kept.
<b>Registration</b>: magnification and translation of every energy against the reprojected reference volume, from all
angles at once (inverse compositional Gauss-Newton; Baker &amp; Matthews 2004,
{10.1023/B:VISI.0000011205.11775.fd}); the
approach it stands for angle by angle is TXM-Wizard's (Liu et al. 2012, {10.1107/S0909049511049144}). <b>One
interpolation</b> places the recorded pixels on the common grid (Keys' cubic convolution 1981,
{10.1109/TASSP.1981.1163711}). <b>Reconstruction</b>: filtered back-projection by gridding (Kak &amp; Slaney,
{10.1137/1.9780898719277}; Fessler &amp; Sutton 2003, {10.1109/TSP.2002.807005}). <b>Maps</b>: least squares on
tabulated mass attenuation (Elam et al. 2002, {10.1016/S0969-806X(01)00227-4}) and a remainder that falls with
the third power of the energy; energies around the scanned edge are left out of it. The relative edge energy is the
linear shift of a voxel's spectrum against the particle's mean.</p>
<p class="note">Sigma is the random part, from the noise of the detector. On measured data no truth is known: what is
left over is a residual, not an error.</p>
"""


# ------------------------------------------------------------------------------------------------- what there is


@dataclass
class _Run:
    """Everything read from an output folder."""

    out: Path
    events: tuple[Event, ...]
    name: str
    recipe: str
    candidates: dict[tuple[str, int | None], Mapping[str, Any]] = field(default_factory=dict)
    ids: dict[tuple[str, int | None], int] = field(default_factory=dict)
    failures: dict[tuple[str, int | None], str] = field(default_factory=dict)
    accepted: set[tuple[str, int | None]] = field(default_factory=set)
    problems: list[Mapping[str, Any]] = field(default_factory=list)
    begun_s: list[float | None] = field(default_factory=list)
    energies: list[EnergyRow] = field(default_factory=list)
    shifts: list[list[ShiftRow]] = field(default_factory=list)
    quality: QualityTable | None = None
    maps: dict[str, Any] = field(default_factory=dict)
    each: dict[str, dict[str, Any]] = field(default_factory=dict)


def _read_run(out: Path) -> _Run:
    if not (out / "journal.jsonl").is_file():
        raise XanesTomoError(f"{out}: expected the output folder of a run, found no journal.jsonl in it")
    events = Journal(out).events
    begun = next((e for e in events if e.kind == "run"), None)
    if begun is None:
        raise XanesTomoError(f"{out}: expected the output folder of a run, but its journal tells of none")
    latest = next(e for e in reversed(events) if e.kind in ("run", "recipe"))
    run = _Run(out, events, str(begun.payload.get("input_name") or "unnamed scan"), str(latest.payload["recipe"]))
    made: dict[int, tuple[tuple[str, int | None], Mapping[str, Any]]] = {}
    chosen: dict[tuple[str, int | None], int] = {}
    whole = {c.id: c.payload for c in candidates_in(events)}
    for event in active_events(events):
        p = event.payload
        if event.kind in ("candidate", "decision", "failure"):
            unit = (str(p["step"]), None if p["energy"] is None else int(p["energy"]))
            if event.kind == "candidate":
                p = whole[event.seq]
                made[event.seq] = (unit, p)
                if not p["numbers"].get("partial"):  # else it counts once it is accepted
                    run.candidates[unit] = p
                    run.ids[unit] = event.seq
                run.failures.pop(unit, None)
            elif event.kind == "failure":
                run.failures[unit] = str(p["reason"])
            elif p["candidate"] is None:
                chosen.pop(unit, None)
            else:
                chosen[unit] = int(p["candidate"])
        elif event.kind == "scan":
            run.problems = list(p.get("problems", ()))
            run.begun_s = list(p.get("begun_s") or ())
    for unit, number in chosen.items():
        if number in made:
            run.candidates[unit] = made[number][1]
            run.ids[unit] = number
            run.accepted.add(unit)
    tables = out / "tables"
    if (tables / "energies.csv").is_file():
        run.energies = read_energies(tables / "energies.csv")
    if (tables / "shifts.csv").is_file():
        for row in read_shifts(tables / "shifts.csv"):
            last = run.shifts[-1][-1] if run.shifts else None
            if last is None or row.energy_ev != last.energy_ev or row.frame <= last.frame:
                run.shifts.append([])
            run.shifts[-1].append(row)
    if (tables / "quality.csv").is_file():
        run.quality = read_quality(tables / "quality.csv")
    if (out / "maps.ome.zarr").is_dir():
        run.maps, run.each = read_map_attributes(out / "maps.ome.zarr")
    return run


# ----------------------------------------------------------------------------------------------------- sections


def _law(run: _Run) -> dict[int, tuple[float, float]]:
    """Return M * pixel(E) / pixel(reference) - 1 and its sigma for every registered energy."""
    reference = next((r for r in run.energies if r.reference), None)
    if reference is None or not reference.pixel_size_nm > 0:
        return {}
    found = {}
    for i, row in enumerate(run.energies):
        ratio = row.pixel_size_nm / reference.pixel_size_nm
        if math.isfinite(row.magnification * ratio):
            found[i] = (row.magnification * ratio - 1, row.magnification_sigma * ratio)
    return found


def _failed_scores(p: Mapping[str, Any]) -> list[str]:
    bad = []
    for s in quality_of(p).scores:
        if not s.passed:
            most = "most" if s.better == "lower" else "least"
            shown = "undefined" if math.isnan(s.value) else number_text(s.value, 3)
            bad.append(f"{s.name} {shown} {s.unit}".rstrip() + f" (expected at {most} {s.threshold:g})")
    return bad


def _caveats(run: _Run) -> str:
    items = ["Handedness not verified: the maps may be mirror images of the object (scan.flip_rows, scan.theta_sign)."]
    if "edge_energy_relative" in run.each:
        if not run.maps.get("energy_calibrated"):
            items.append(
                "Edge energies uncalibrated: the offset of the monochromator is not known (maps.energy_offset_ev). "
                "Relative edge energies do not need it."
            )
        half = run.maps.get("edge_half_ev")
        if half is not None:
            items.append(f"E(0.5) of the particle's mean spectrum: {half:.2f} eV.")
    if run.maps:
        left = run.maps.get("energies_left_out_ev") or []
        if left:
            items.append(
                "Left out of the element fit, around the scanned edge: " + ", ".join(f"{e:g}" for e in left) + " eV."
            )
    items.append("The position of the object as a whole is undetermined: one shift common to everything is free.")
    return '<div class="box"><ul>' + "".join(f"<li>{escape(i)}</li>" for i in items) + "</ul></div>"


def _steps(run: _Run) -> str:
    rows = []
    for s in STEPS:
        units = [u for u in run.candidates if u[0] == s.name and u not in run.failures]
        failed = [u for u in run.failures if u[0] == s.name]
        check = [u for u in units if quality_of(run.candidates[u]).verdict != "good"]
        seconds = sum(float(run.candidates[u].get("seconds") or 0) for u in units)
        accepted = sum(u in run.accepted for u in units)
        rows.append(
            (
                escape(s.title), str(len(units)), str(accepted), mark(str(len(check)), "check") if check else "0",
                mark(str(len(failed)), "bad") if failed else "0", f"{seconds:.1f}" if units else "",
            )
        )  # fmt: skip
    header = [
        ("step", True),
        ("done", False),
        ("accepted", False),
        ("to check", False),
        ("failed", False),
        ("seconds", False),
    ]
    return "<h2>Steps</h2>" + table(header, rows)


def _energies(run: _Run) -> str:
    if not run.energies:
        return "<h2>Energies</h2><p>No table of energies yet.</p>"
    law = _law(run)
    rows = []
    for i, r in enumerate(run.energies):
        bad = [x for s in STEPS for x in _failed_scores(run.candidates.get((s.name, i), {}))]
        if r.status != "ok":
            verdict = mark(r.status, "bad")
        elif bad:
            verdict = mark("check: " + "; ".join(bad), "check")
        else:
            verdict = mark("good", "good")
        rows_of = run.shifts[i] if i < len(run.shifts) else []
        used = [s for s in rows_of if s.status == "ok"]
        sigma = [_median([getattr(s, name) for s in used]) for name in ("sigma_y_px", "sigma_x_px")]
        deviation = law.get(i)
        rows.append(
            (
                f"{r.energy_ev:.2f}{' (ref)' if r.reference else ''}",
                f"{len(used)} / {len(rows_of)}",
                "" if not math.isfinite(r.magnification) else f"{r.magnification:.5f}",
                "" if r.reference or not math.isfinite(r.magnification_sigma) else f"{r.magnification_sigma:.5f}",
                "" if deviation is None else f"{1e4 * deviation[0]:+.1f}",
                "" if not math.isfinite(r.center_px) else f"{r.center_px:+.2f}",
                *("" if not math.isfinite(v) else f"{v:.4f}" for v in (r.center_sigma_px, *sigma)),
                "" if not math.isfinite(r.pixel_size_nm) else f"{r.pixel_size_nm:.2f}",
                verdict,
            )
        )
    header = [
        ("energy<br>eV", False), ("projections<br>used", False), ("M", False), ("sigma M", False),
        ("M / law - 1<br>10<sup>-4</sup>", False), ("centre<br>px", False), ("sigma<br>px", False),
        ("sigma y<br>px", False), ("sigma x<br>px", False), ("pixel<br>nm", False), ("verdict", True),
    ]  # fmt: skip
    note = (
        '<p class="note">M: measured magnification relative to the reference energy; the law is that of the calibrated '
        "pixel size, used only for comparison. Centre: the rotation axis from the middle of the detector. sigma y, x: "
        "median standard error of a projection's shift. px: recorded detector pixels of that energy; at another camera "
        "binning M contains the ratio of the pixels, M / law does not.</p>"
    )
    return "<h2>Energies</h2>" + table(header, rows) + note


def _median(values: Sequence[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return float(np.median(finite)) if finite else math.nan


def _law_plot(run: _Run) -> str:
    law = _law(run)
    if len(law) < 2:
        return ""
    at = list(law)
    energy = np.array([run.energies[i].energy_ev for i in at])
    value, sigma = (1e4 * np.array([law[i][k] for i in at]) for k in (0, 1))
    spread = np.nan_to_num(sigma)
    plot = Plot(value_range(energy), value_range(value - spread, value + spread, [0.0]), 760, 240)
    plot.line(np.array(plot.x), np.zeros(2), "#999")
    plot.points(energy, value, "#1b5e9b", sigma)
    plot.axes("Magnification against the pixel-size law", "energy / eV", "M / law - 1, 1e-4", n_x=8)
    return f"<figure>{plot.svg()}</figure>"


def _registered(run: _Run) -> dict[int, Mapping[str, Any]]:
    """Return the registrations that count, by the number of their energy."""
    found = {e: p for (name, e), p in run.candidates.items() if name == "registration" and e is not None}
    return {e: p for e, p in sorted(found.items()) if e < len(run.energies)}


def _moments(run: _Run) -> str:
    """Return mass and width of the particle beside its scale, and how its parts move with time."""
    law, journal = _law(run), Journal(run.out)
    reference = next((i for i, r in enumerate(run.energies) if r.reference), None)

    def array(payload: Mapping[str, Any], name: str) -> F64 | None:
        try:
            stored = payload["arrays"]
            return journal.get_array(stored[name]).astype(np.float64) if name in stored else None
        except XanesTomoError:
            return None

    if reference is None or len(law) < 2:
        return ""
    return moments_section(
        [r.energy_ev for r in run.energies], _registered(run), {e: 1 + v for e, (v, _) in law.items()}, reference,
        array, str(run.maps.get("scale_change") or ""), begun_s=run.begun_s,
    )  # fmt: skip


_SHIFT_PARTS = {
    "synchronous": "repeated at every energy (the stage)",
    "rigid": "motion of the object and the axis from energy to energy",
    "steps": "steps where flats were taken",
    "remainder": "what is left",
}


def _shift_parts(run: _Run) -> str:
    """Return what the shifts of all energies are made of."""
    q = run.quality
    if q is None or not all(f"{n}_{a}_px" in q.scores for n in _SHIFT_PARTS for a in "yx"):
        return ""
    rows = []
    for name, text in _SHIFT_PARTS.items():
        rms = [float(np.sqrt(np.mean(v[np.isfinite(v)] ** 2))) if np.isfinite(v).any() else math.nan
               for v in (q.scores[f"{name}_{a}_px"] for a in "yx")]  # fmt: skip
        rows.append((text, *(number_text(v, 2) for v in rms)))
    if not any(cell for row in rows for cell in row[1:]):
        return ""
    note = '<p class="note">Rms over all projections, px of the common grid.</p>'
    header = [("part of the shifts", True), ("y, px", False), ("x, px", False)]
    return "<h2>What the shifts are made of</h2>" + table(header, rows) + note


def _surfaces(run: _Run) -> str:
    """Return what is left of displacements at surfaces, energy by energy, and pairs that should not differ."""
    journal = Journal(run.out)
    found = _registered(run)
    rows = []
    for e, p in found.items():
        numbers = p["numbers"]
        if numbers.get("dipole_px") is None:
            continue
        pairs = zip(numbers["dipole_px"], numbers["dipole_sigma_px"], strict=True)
        cells = [_with_sigma(v, s) for v, s in (*pairs, (numbers["outward_px"], numbers["outward_sigma_px"]))]
        rows.append((f"{run.energies[e].energy_ev:g}", *cells))
    out = ""
    if rows:
        header = [("eV", False), *((f"{axis}, px", False) for axis in ("y", "z", "x", "outward"))]
        note = (
            '<p class="note">Slope of the difference to the reference on its gradient near surfaces: by how much the '
            "energy seems displaced there, px of the common grid. Outward: all surfaces together; another contrast, "
            "another point spread and a scale that is wrong look like it.</p>"
        )
        out = "<h2>Displacement left at surfaces</h2>" + table(header, rows) + note

    def arrays(e: int) -> dict[str, F64]:
        stored = found[e]["arrays"]
        names = ("samples", "probe_at", "probe_numbers", "probe_bin")
        try:
            return {n: journal.get_array(stored[n]).astype(np.float64) for n in names if n in stored}
        except XanesTomoError:
            return {}

    reference = next((i for i, r in enumerate(run.energies) if r.reference), None)
    probe = None if reference is None or reference not in found else Probe.of(arrays(reference))
    if probe is None or reference is None:
        return out
    samples = [arrays(e).get("samples") if e in found else None for e in range(len(run.energies))]
    samples = [s if s is not None and s.shape[1] == len(probe.value) else None for s in samples]
    tests = null_tests([r.energy_ev for r in run.energies], samples, probe, reference)
    items = "".join(f"<li>{escape(t.text())}</li>" for t in tests)
    return out + (f"<p>Energies with no edge between them, after one factor:</p><ul>{items}</ul>" if items else "")


def _with_sigma(value: float | None, sigma: float | None) -> str:
    if value is None or sigma is None or not (math.isfinite(value) and math.isfinite(sigma)):
        return ""
    return f"{value:+.3f} &plusmn; {sigma:.3f}"


def _jitter(run: _Run) -> str:
    """Return the section about the jitter correction."""
    maps = run.candidates.get(("maps", None), {})
    effect = {float(e): float(v) for e, v in maps.get("numbers", {}).get("edge_ev_per_px", ())}
    journal, bin = Journal(run.out), Recipe.from_text(run.recipe).scan.bin  # the pixels of the scores
    rows = []
    for (name, e), p in sorted(run.candidates.items(), key=lambda item: item[0][1] or 0):
        if name != "jitter" or e is None or e >= len(run.energies):
            continue

        def array(which: str, p: Mapping[str, Any] = p) -> F64 | None:
            try:
                return None if which not in p["arrays"] else journal.get_array(p["arrays"][which]).astype(np.float64)
            except XanesTomoError:
                return None

        energy = run.energies[e]
        theta = np.array([r.theta_deg for r in run.shifts[e]]) if e < len(run.shifts) else np.zeros(0)
        rows.append(
            JitterRow(
                energy.energy_ev, bin * energy.pixel_size_nm, p["numbers"], quality_of(p).scores,
                (name, e) in run.accepted, energy.reference, theta, array,
                views_read(views_path(run.out, e), run.ids.get((name, e), -1)),
                effect.get(energy.energy_ev, math.nan),
            )
        )  # fmt: skip
    return jitter_section(rows)


def _shift_plots(run: _Run) -> str:
    panels = [rows for rows in run.shifts if any(math.isfinite(r.shift_y_px) for r in rows)]
    if not panels:
        return ""
    out = []
    for rows in panels:
        theta = np.array([r.theta_deg for r in rows])
        usable = np.array([r.status == "ok" for r in rows])
        y, x = (np.array([getattr(r, n) for r in rows]) for n in ("shift_y_px", "shift_x_px"))
        plot = Plot(value_range(theta), value_range(y, x), 250, 150, left=34, below=20)
        for values, colour in ((y, "#b3541e"), (x, "#1b5e9b")):
            plot.line(theta, np.where(usable, values, np.nan), colour)
            plot.points(theta, np.where(usable, np.nan, values), "#a3200d", radius=2)
        left_out = int((~usable).sum())
        plot.axes(f"{rows[0].energy_ev:g} eV" + (f" ({left_out} left out)" if left_out else ""), n_x=4, n_y=3)
        out.append(plot.svg())
    note = (
        '<p class="note">Shift of every projection against its angle (deg), recorded px: '
        '<b style="color:#b3541e">y, down</b> and <b style="color:#1b5e9b">x, right</b>, which contains the rotation '
        "centre; dots are projections left out.</p>"
    )
    return f'<h2>Shifts</h2>{note}<div class="row">{"".join(out)}</div>'


def _heat_map(run: _Run) -> str:
    q = run.quality
    if q is None or not q.scores or not len(q.frame):
        return ""
    name, values = next(iter(q.scores.items()))
    starts = np.flatnonzero(np.r_[True, (np.diff(q.energy_ev) != 0) | (np.diff(q.frame) <= 0)])
    ends = np.r_[starts[1:], len(q.frame)]
    grid = np.full((len(starts), int((ends - starts).max())), np.nan)
    for row, (a, b) in enumerate(zip(starts, ends, strict=True)):
        part = values[a:b]
        typical = _median(part.tolist())
        grid[row, : b - a] = part / typical if typical > 0 else part
    if not np.isfinite(grid).any():
        return ""
    left, top, width = 62, 6, 680
    line = min(14.0, max(5.0, 420 / len(grid)))
    height = line * len(grid)
    labels, every = [], max(1, math.ceil(12 / line))
    for row in range(0, len(grid), every):
        text = f"{q.energy_ev[starts[row]]:g}"
        labels.append(f'<text x="{left - 5}" y="{top + line * (row + 0.5) + 4:.1f}" text-anchor="end">{text}</text>')
    first = slice(starts[0], ends[0])
    for k in np.unique(np.linspace(0, grid.shape[1] - 1, 7).astype(int)):
        x = left + (k + 0.5) * width / grid.shape[1]
        shown = f"{q.theta_deg[first][k]:.0f}" if k < len(q.theta_deg[first]) else ""
        labels.append(f'<text x="{x:.1f}" y="{top + height + 15:.0f}" text-anchor="middle">{shown}</text>')
    full = (left + width + 8, height + top + 34)
    svg = (
        f'<svg width="{full[0]}" height="{full[1]:.0f}" viewBox="0 0 {full[0]} {full[1]:.0f}">'
        f'<image href="{data_uri(png(grid, 0.5, 3.0))}" x="{left}" y="{top}" width="{width}" height="{height:.1f}" '
        f'preserveAspectRatio="none"/>{"".join(labels)}'
        f'<text x="{left + width / 2}" y="{full[1] - 3:.0f}" text-anchor="middle">angle / deg</text></svg>'
    )
    note = (
        f'<p class="note">{escape(name)} of every projection (rows: energies in eV), over the median of its energy; '
        "from dark, 0.5, to bright, 3 and more. Grey: no value.</p>"
    )
    return f"<h2>Residual of every projection</h2>{note}<figure>{svg}</figure>"


def _reduced(values: F64) -> tuple[F64, int]:
    """Mean over blocks, so that no side is longer than `_LARGEST_SLICE`; and the size of a block."""
    n = math.ceil(max(values.shape) / _LARGEST_SLICE)
    if n == 1:
        return values, 1
    rows, columns = (s // n * n for s in values.shape)
    blocks = values[:rows, :columns].reshape(rows // n, n, columns // n, n)
    return blocks.mean(axis=(1, 3)), n


def _maps(run: _Run) -> str:
    done = ("maps", None) in run.candidates
    if not run.maps:
        return "<h2>Maps</h2><p>" + ("Maps were made, but are no longer here." if done else "Not made yet.") + "</p>"
    maps = read_maps(run.out / "maps.ome.zarr")
    figures = []
    inside: npt.NDArray[np.bool_] | None = None
    if "mask" in maps.data:
        inside = np.asarray(maps.data["mask"][maps.data["mask"].shape[0] // 2]) > 0.5
    for name in _SHOWN_MAPS:
        if name not in maps.data:
            continue
        array = maps.data[name]
        middle = array.shape[0] // 2
        values = np.asarray(array[middle], dtype=float)
        signed = name.startswith("edge_energy") or name in (*EDGE_MEASURES, "valence")
        if signed and inside is not None:
            values = np.where(inside, values, np.nan)
        finite = values[np.isfinite(values)]
        low, high = (
            (float(v) for v in np.percentile(finite, [2, 98] if signed else [0.5, 99.5])) if len(finite) else (0, 1)
        )
        if not signed:
            low = min(0.0, low)
        shown, block = _reduced(values)
        picture = slice_picture(shown, low, high, maps.units[name], maps.voxel_nm * block)
        own = run.each[name]
        text = f"{name}, slice y = {middle} of {array.shape[0]} across the rotation axis (z down, x right)"
        if signed:
            text += ", inside the mask"
        about = str(own.get("description") or "")
        text += f": {about}" if about else ""
        figures.append(f"<figure>{picture}<figcaption>{escape(text)}.</figcaption></figure>")
    rows = [
        (
            escape(name), escape(str(own.get("unit") or "")), number_text(own.get("smoothing_voxel"), 3),
            escape(" ".join(str(own[key]) for key in ("description", "normalisation") if own.get(key))),
        )
        for name, own in run.each.items()
    ]  # fmt: skip
    header = [("map", True), ("unit", True), ("smoothing, voxel", False), ("what", True)]
    text = f"Voxel {run.maps['voxel_nm']:.2f} nm, axes (y, z, x), axis 0 along the rotation axis"
    if run.maps.get("reference_ev"):
        text += f"; reference energy {run.maps['reference_ev']:g} eV"
    return (
        f'<h2>Maps</h2>{_map_verdict(run)}<p>{escape(text)}.</p><div class="row">{"".join(figures)}</div>'
        f"<p></p>{table(header, rows)}{_absent(run)}{checks_section(run.maps)}"
    )


_CLASSES = {"green": "good", "amber": "check", "red": "bad"}


def _map_verdict(run: _Run) -> str:
    """Return the verdict on the maps, what it follows from, and what a user should know about them."""
    if ("maps", None) not in run.candidates:
        return ""
    quality = quality_of(run.candidates[("maps", None)])
    absent = {f"{name}: {why}" for name, why in (run.maps.get("absent") or {}).items()}
    told = [n for n in quality.notes if n not in absent]
    scores = "; ".join(
        mark(f"{s.name} {s.value:.3g} {s.unit}".rstrip(), _CLASSES[s.colour])
        + (f" (amber above {s.threshold:g}" + (f", red above {s.red:g})" if s.red is not None else ")"))
        for s in quality.scores
        if s.threshold is not None
    )
    items = "".join(f"<li>{escape(n)}</li>" for n in told)
    return f"<p>Verdict: {mark(quality.colour, _CLASSES[quality.colour])}. {scores}.</p>" + (
        f"<ul>{items}</ul>" if told else ""
    )


def _absent(run: _Run) -> str:
    absent = run.maps.get("absent") or {}
    if not absent:
        return ""
    items = "".join(f"<li><b>{escape(str(k))}</b>: {escape(str(v))}</li>" for k, v in absent.items())
    return f"<p>Maps that could not be made:</p><ul>{items}</ul>"


def _flags(run: _Run) -> str:
    out = []
    failed = [(s.title, unit, why) for s in STEPS for unit, why in run.failures.items() if unit[0] == s.name]
    if failed:
        items = "".join(f"<li>{mark(title, 'bad')}: {escape(why)}</li>" for title, _, why in failed)
        out.append(f"<p>Energies left out:</p><ul>{items}</ul>")
    if run.problems:
        rows = [
            (
                mark(str(p.get("severity")), "bad" if p.get("severity") == "error" else "check"),
                "" if p.get("energy_ev") is None else f"{p['energy_ev']:g}",
                escape(str(p.get("file") or "")),
                escape(str(p.get("message"))),
            )
            for p in run.problems[:_LISTED]
        ]
        out.append(table([("", True), ("eV", False), ("file", True), ("what", True)], rows))
        if len(run.problems) > _LISTED:
            out.append(f"<p>and {len(run.problems) - _LISTED} more (xanes-tomo inspect lists all).</p>")
    q = run.quality
    if q is not None:
        check = [i for i, v in enumerate(q.verdict) if v == "check"]
        unused = sum(1 for v in q.verdict if v.startswith(("excluded", "unreadable")))
        out.append(f"<p>{len(q.verdict):,} projections: {len(check)} stand out, {unused} left out.</p>")
        if check:
            name, score = next(iter(q.scores.items()))
            rows = [
                (f"{q.energy_ev[i]:g}", f"{q.theta_deg[i]:.2f}", str(int(q.frame[i])), number_text(float(score[i]), 3))
                for i in check[:_LISTED]
            ]
            out.append(table([("eV", False), ("theta / deg", False), ("frame", False), (escape(name), False)], rows))
            if len(check) > _LISTED:
                out.append(f"<p>and {len(check) - _LISTED} more in tables/quality.csv.</p>")
    return "<h2>Problems and flags</h2>" + ("".join(out) or "<p>None.</p>")


_FILES = (
    ("recipe.yaml", "what was asked for"),
    ("journal.jsonl", "what happened, one line an event"),
    ("arrays", "the arrays the journal refers to"),
    ("tables/shifts.csv", "one row a projection: shift, sigma, magnification, roll, status"),
    ("tables/energies.csv", "one row an energy"),
    ("tables/quality.csv", "one row a projection: scores and verdict"),
    ("qc", "views of every tomogram: slice before and after, sinogram, residual"),
    ("maps.ome.zarr", "the maps (y, z, x), OME-Zarr 0.5"),
)


def _files(run: _Run) -> str:
    rows = [(f"<code>{escape(n)}</code>", escape(what)) for n, what in _FILES if (run.out / n).exists()]
    return "<h2>Files</h2>" + table([("in the output folder", True), ("what", True)], rows)


def _methods() -> str:
    text = _METHODS
    while "{" in text:
        start = text.index("{")
        end = text.index("}", start)
        doi = text[start + 1 : end]
        text = f'{text[:start]}doi <a href="https://doi.org/{doi}">{doi}</a>{text[end + 1 :]}'
    return f"<h2>Methods</h2>{text}"


def _versions(run: _Run) -> str:
    seen: dict[str, set[str]] = {}
    for p in run.candidates.values():
        for name, version in p.get("versions", {}).items():
            seen.setdefault(str(name), set()).add(str(version))
    text = "; ".join(f"{name} {', '.join(sorted(v))}" for name, v in sorted(seen.items()))
    return text or f"napari-xanes-tomo {__version__}"


def write_report(out: str | Path) -> Path:
    """Write ``OUT/report.html`` from what lies in the output folder of a run, finished or not; return its path.

    Raises
    ------
    XanesTomoError
        `out` holds no run, or the report cannot be written.
    """
    out = Path(out)
    run = _read_run(out)
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    begun, last = run.events[0].time[:16].replace("T", " "), run.events[-1].time[:16].replace("T", " ")
    sub = f"Run begun {begun}, last step {last} UTC. Computed by {_versions(run)}. Report of {now}."
    law = _law_plot(run)
    body = "".join(
        (
            f"<h1>{escape(run.name)}</h1>",
            f'<p class="sub">Full-field XANES tomography. {escape(sub)}</p>',
            _caveats(run),
            _maps(run),
            _steps(run),
            _energies(run),
            law,
            _moments(run),
            _shift_parts(run),
            _surfaces(run),
            _jitter(run),
            _shift_plots(run),
            _heat_map(run),
            _flags(run),
            f"<h2>Recipe</h2><pre>{escape(run.recipe)}</pre>",
            _methods(),
            _files(run),
        )
    )
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(run.name)}: report</title><style>{_STYLE}</style></head><body>{body}</body></html>\n"
    )
    path = out / "report.html"
    atomic_write(path, page.encode("utf-8", "replace"))
    return path
