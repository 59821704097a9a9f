"""The part of the report about the checks of the maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from .drawing import Plot, mark, number_text, table

__all__ = ["checks_section"]


def checks_section(maps: Mapping[str, Any]) -> str:
    """Return what the metadata of the maps hold of edge dipoles, mass and Fourier shells, as HTML."""
    return (
        _dipoles(maps)
        + _mass(maps)
        + _by_step(maps.get("half_sets_by_step") or [])
        + _shells(maps.get("shell_correlation") or {})
    )


def _dipoles(maps: Mapping[str, Any]) -> str:
    rows = maps.get("edge_dipole_ev_yzxc_sigma_found") or []
    if not rows:
        return ""
    found = [r for r in rows if r[9]]
    largest = max(float(np.linalg.norm(r[1:5])) for r in rows)
    if not found:
        return (
            f"<h3>Edge dipoles</h3><p>{mark('passed', 'good')}: no energy lies beside the others, the largest "
            f"displacement of one is {largest:.3f} px.</p>"
        )
    header = [
        ("energy, eV", False),
        ("y, px", False),
        ("z, px", False),
        ("x, px", False),
        ("rotation centre, px", False),
    ]
    cells = [[number_text(r[0], 6), *(f"{v:+.2f} &plusmn; {s:.2f}" for v, s in zip(r[1:5], r[5:9], strict=True))]
             for r in found]  # fmt: skip
    return (
        f"<h3>Edge dipoles</h3><p>{mark('to be looked at', 'check')}: energies that lie beside the others. "
        "The map <i>artefact</i> marks where that explains the edge energy.</p>" + table(header, cells)
    )


def _mass(maps: Mapping[str, Any]) -> str:
    ratio = maps.get("mass_ratio")
    if ratio is None or not np.isfinite(ratio):
        return ""
    return (
        f"<p>Mass: the reconstructed rows hold {100 * ratio:.2f} % of their projections, which differ from angle "
        f"to angle by {100 * maps['mass_scatter']:.2g} % (standard deviation).</p>"
    )


def _said(curve: Mapping[str, Any]) -> str:
    """Return where a curve crosses, in words."""
    return "; ".join(
        f"{what} {curve[key]:.0f} nm" if curve[key] is not None else f"does not cross {what}: no resolution stated"
        for key, what in (("half_bit_nm", "1/2-bit"), ("one_seventh_nm", "0.143"))
    )


def _by_step(steps: Sequence[Mapping[str, Any]]) -> str:
    if not steps:
        return ""
    pictures, lines = [], []
    for step in steps:
        before, after = (
            np.array(step[k]["per_um_correlation_half_bit_chance"], dtype=float) for k in ("before", "after")
        )
        least = min(-0.1, float(before[:, 1].min()), float(after[:, 1].min()))
        plot = Plot((0.0, float(after[-1, 0])), (least, 1.0), 380, 220)
        plot.line(after[:, 0], after[:, 3], "#bbb")
        plot.line(after[:, 0], after[:, 2], "#c0392b")
        plot.line(np.array(plot.x), np.full(2, 0.143), "#e0a030")
        plot.line(before[:, 0], before[:, 1], "#7f8c8d")
        plot.line(after[:, 0], after[:, 1], "#1b5e9b")
        plot.axes(step["step"], "cycles per um", "correlation")
        pictures.append(f"<figure>{plot.svg()}</figure>")
        lines.append(
            f"<li>{escape(step['step'])} ({escape(step['what'])}): before {_said(step['before'])}; after "
            f"{_said(step['after'])}</li>"
        )
    first = steps[0]["after"]
    return (
        "<h3>Half sets before and after each step</h3><p>Halves that share neither flats nor alignment, brought to "
        f"one place of the whole object; middle rows, voxel {first['voxel_nm']:.1f} nm, no smoothing, inside a soft "
        f"mask of {100 * first['mask_part']:.0f} % of the volume. Grey: before the step; blue: after it; red: 1/2-bit; "
        "orange: 0.143; light grey: three standard deviations of chance. Detail is half the period at the crossing. "
        "Half of the angles, or of the energies, align and sample worse than all of them do.</p>"
        f'<div class="row">{"".join(pictures)}</div><ul>{"".join(lines)}</ul>'
    )


def _shells(curves: Mapping[str, Any]) -> str:
    if not curves:
        return ""
    pictures, lines = [], []
    for name, c in curves.items():
        values = np.array(c["per_um_correlation_half_bit_chance"], dtype=float)
        plot = Plot((0.0, float(values[-1, 0])), (min(-0.1, float(values[:, 1].min())), 1.0), 380, 220)
        plot.line(values[:, 0], values[:, 3], "#bbb")
        plot.line(values[:, 0], values[:, 2], "#c0392b")
        plot.line(np.array(plot.x), np.full(2, 0.143), "#e0a030")
        plot.line(values[:, 0], values[:, 1], "#1b5e9b")
        plot.axes(name, "cycles per um", "correlation")
        pictures.append(f"<figure>{plot.svg()}</figure>")
        lines.append(f"<li>{name}: {_said(c)} (half period)</li>")
    first = next(iter(curves.values()))
    return (
        "<h3>Fourier shell correlation</h3><p>Even against odd angles, middle rows, voxel "
        f"{first['voxel_nm']:.1f} nm, before any smoothing, inside a soft mask of {100 * first['mask_part']:.0f} % "
        "of the volume. The half sets share alignment and flats: the curve knows noise and the number of angles, not "
        "what both are wrong by. Blue: correlation; red: 1/2-bit; orange: 0.143; grey: three standard deviations "
        "of chance.</p>"
        f'<div class="row">{"".join(pictures)}</div><ul>{"".join(lines)}</ul>'
    )
