"""What a measurement holds, and what is missing or damaged: as data, and as a table."""

from __future__ import annotations

import math
from typing import Any

import typer

from .model import EnergyScan, Problem, Series

__all__ = ["inspection", "print_inspection", "problem_line"]

_FEW_ANGLES = 8


def _facts(scan: EnergyScan) -> dict[str, Any]:
    """Return what `inspect` says about one energy, as JSON data."""
    usable = scan.usable
    theta = [round(float(t), 6) for t in scan.theta_deg if math.isfinite(t)]
    flats = [s for group in scan.flats for s in group.status]
    angles = len({round(float(t), 2) for t, ok in zip(scan.theta_deg, usable, strict=True) if ok})
    n_flats = sum(s == "ok" for s in flats)
    if not usable.any():
        status = "no files" if all(s == "unreadable:missing" for s in scan.status) else "no usable projection"
    elif scan.given:
        status = scan.given
    elif not n_flats:
        status = "no usable flat"
    elif angles < _FEW_ANGLES:
        status = "few angles"
    else:
        status = "ok" if usable.all() and n_flats == len(flats) else "incomplete"
    return {
        "energy_ev": _finite(scan.energy_ev),
        "pixel_size_nm": _finite(scan.pixel_size_nm),
        "header_pixel_size_nm": _finite(scan.header_pixel_size_nm),
        "binning": int(scan.binning),
        "projections": {"usable": int(usable.sum()), "planned": len(scan)},
        "flats": {"usable": n_flats, "planned": len(flats)},
        "angles_usable": angles,
        "theta_deg": [min(theta), max(theta)] if theta else None,
        "status": status,
    }


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def inspection(series: Series) -> dict[str, Any]:
    """Return what `xanes-tomo inspect` says about a measurement, as JSON data."""
    energies = [_facts(s) for s in series.scans]
    rows, columns = series.frame_shape if series.scans else (0, 0)
    totals = {
        "energies": {"usable": sum(e["projections"]["usable"] > 0 for e in energies), "planned": series.n_expected[0]},
        "projections": {
            "usable": sum(e["projections"]["usable"] for e in energies),
            "planned": series.n_expected[1],
        },
        "flats": {"usable": sum(e["flats"]["usable"] for e in energies), "planned": series.n_expected[2]},
    }
    return {
        "name": series.name,
        "frame_shape": [rows, columns] if rows and columns else None,
        "totals": totals,
        "energies": energies,
        "problems": [
            {
                "severity": p.severity,
                "code": p.code,
                "message": p.message,
                "file": p.file,
                "energy_ev": p.energy_ev,
                "frame": p.frame,
            }
            for p in series.problems
        ],
    }


def problem_line(p: Problem) -> str:
    """Return a problem in one line."""
    # A file's name tells its energy; a message about a whole energy names it.
    where = f"{p.file}: " if p.file else ""
    return f"{p.severity}: {where}{p.message}"


def print_inspection(series: Series, facts: dict[str, Any]) -> None:
    """Write the facts about a measurement to stdout: a table of its energies, its problems."""
    from rich.console import Console
    from rich.table import Table

    shape = facts["frame_shape"]
    typer.echo(f"{series.name}{f', frames of {shape[0]} x {shape[1]}' if shape else ''}")
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    for name in ("energy / eV", "nm / px", "header", "projections", "flats", "angles / deg"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for e in facts["energies"]:
        theta = e["theta_deg"]
        table.add_row(
            "?" if e["energy_ev"] is None else f"{e['energy_ev']:.2f}",
            "?" if e["pixel_size_nm"] is None else f"{e['pixel_size_nm']:.2f}",
            "?" if e["header_pixel_size_nm"] is None else f"{e['header_pixel_size_nm']:.2f}",
            f"{e['projections']['usable']} / {e['projections']['planned']}",
            f"{e['flats']['usable']} / {e['flats']['planned']}",
            "?" if theta is None else f"{theta[0]:g} .. {theta[1]:g}",
            e["status"],
        )
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=120)
    console.print(table)
    t = facts["totals"]
    typer.echo(
        "in all: "
        + ", ".join(
            f"{t[k]['planned']:,} {k} ({t[k]['usable']:,} usable)" for k in ("energies", "projections", "flats")
        )
    )
    for p in series.problems:
        typer.echo(problem_line(p))
    if not series.problems:
        typer.echo("no problems found")
