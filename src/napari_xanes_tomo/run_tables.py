"""The tables of a run: ``shifts.csv``, ``energies.csv`` and ``quality.csv``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .agreement import center_of_rotation
from .findings import Findings
from .io.store import (
    EnergyRow,
    QualityTable,
    shifts_rows,
    write_energies,
    write_quality,
    write_shifts,
)
from .maps import (
    AlignedEnergy,
)
from .model import Alignment, EnergyScan
from .steps import (
    CHECKED,
    SCREENED,
    StepResult,
    alignment_of,
)

__all__ = ["write_tables"]


def write_tables(run: Findings) -> None:
    """Write ``shifts.csv``, ``energies.csv`` and ``quality.csv`` from what counts now."""
    state = run.state
    raw = run.recipe.scan.bin
    alignments: list[Alignment | None] = []
    rows: list[EnergyRow] = []
    residual, verdicts, keys = [], [], []
    refilled: list[npt.NDArray[Any]] = []  # 1 where the maps fill a lost projection
    screened: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in (*SCREENED, *CHECKED)}
    left = run.error_map()
    scans = [run.scan(e) for e in range(len(run.series.scans))]
    for e, scan in enumerate(scans):
        found, status = None, "ok"
        for name in ("flats", "jitter", "registration"):
            unit = state[(name, e)]
            if unit.status == "failed":
                status = f"excluded:{unit.reason}"
            elif unit.candidate is not None and unit.status != "stale" and name != "flats":
                found = run.displacements(e) if name == "jitter" else run.registered(e)
        if found is None and status == "ok":
            status = "excluded:not aligned"
        alignment = None if found is None else alignment_of(found, scan)
        refilled.append(np.zeros(len(scan)))
        if alignment is not None and run.recipe.maps.fill_lost and not (scan.gridded or run.single):
            item = AlignedEnergy(scan, alignment, np.zeros((len(scan), 3)), fill_lost=True)
            refilled[-1][np.setdiff1d(item.members, item.used)] = 1
        score = np.full(len(scan), np.nan) if found is None else found.arrays["residual"]
        jitter = state[("jitter", e)]
        if jitter.candidate is not None and jitter.status != "stale":
            score = run.result(jitter.candidate).arrays["residual"]
        registered = found is not None and "magnification" in found.numbers
        if alignment is not None and not registered:
            # Not on the common grid: the shifts hold within this energy alone, and no magnification is known.
            alignment = replace(alignment, magnification=float("nan"), roll_deg=float("nan"))
        if alignment is not None and raw > 1:
            rows_, columns = scan.frames.frame_shape
            alignment = alignment.unbinned(raw, (rows_ * raw, columns * raw))
        if alignment is not None and status != "ok":
            why = status
            alignment = replace(alignment, status=tuple(why if s == "ok" else s for s in alignment.status))
        alignments.append(alignment)
        # The projections' errors are not independent: what they do to the axis together the jitter step knows.
        least = 0.0
        if jitter.candidate is not None and jitter.status != "stale":
            least = raw * float(jitter.candidate.payload["numbers"].get("center_sigma") or 0.0)
        rows.append(
            _energy_row(scan, alignment, found if registered else None, e == state.reference, status, raw, least)
        )
        residual.append(score)
        flats = state[("flats", e)]
        seen = {} if flats.candidate is None or flats.status == "stale" else run.result(flats.candidate).arrays
        if jitter.candidate is not None and jitter.status != "stale":
            arrays = run.result(jitter.candidate).arrays
            seen = {**seen, **{name: arrays[name] for name in CHECKED if name in arrays}}
        for name, column in screened.items():
            column.append(seen.get(name, np.full(len(scan), np.nan)))
        verdicts += _verdicts(score, alignment, scan)
        keys += [(scan.energy_ev, float(t), i) for i, t in enumerate(scan.theta_deg)]
    series = replace(run.series, scans=tuple(scans))
    write_energies(run.output.energies, rows)
    if scans[0].gridded:  # there are no projections to have a row
        write_shifts(run.output.shifts, [])
        return
    write_shifts(run.output.shifts, shifts_rows(series, alignments, [r.status for r in rows]))
    energy, theta, frame = (np.array(c) for c in zip(*keys, strict=True))
    write_quality(
        run.output.quality,
        QualityTable(
            energy,
            theta,
            frame,
            {
                "held_out_residual": np.concatenate(residual),
                **{name: np.concatenate(column) for name, column in screened.items()},
                **left.columns([len(s) for s in scans]),
                **run.decomposition().columns([len(s) for s in scans]),
                "filled": np.concatenate(refilled),
            },
            tuple(verdicts),
        ),
    )


def _energy_row(
    scan: EnergyScan,
    alignment: Alignment | None,
    found: StepResult | None,
    reference: bool,
    status: str,
    raw: int,
    least_sigma: float,
) -> EnergyRow:
    pixel = scan.pixel_size_nm / raw
    if alignment is None:
        return EnergyRow(scan.energy_ev, pixel_size_nm=pixel, reference=reference, status=status)
    ok = np.array([s == "ok" for s in alignment.status]) | (status != "ok")
    use = ok & np.isfinite(alignment.shift[:, 1])
    center, sigma = float("nan"), float("nan")
    angles = np.asarray(scan.theta_deg, dtype=float)[use]
    if not scan.gridded and use.any() and np.ptp(angles) > 0.05:  # one angle tells nothing about an axis
        center, sigma = center_of_rotation(alignment.shift[use, 1], angles, alignment.sigma[use, 1])
        sigma = max(sigma, least_sigma)
    if found is None:
        return EnergyRow(
            scan.energy_ev, center_px=center, center_sigma_px=sigma, pixel_size_nm=pixel, reference=reference,
            status=status,
        )  # fmt: skip
    scale = alignment.magnification * raw
    ty, tx, tz = (float(v) * scale for v in found.numbers["translation_sigma"])
    return EnergyRow(
        scan.energy_ev, alignment.magnification, float(found.numbers["magnification_sigma"]), alignment.roll_deg,
        center, sigma, ty, tx, tz, pixel, reference, status,
    )  # fmt: skip


def _verdicts(score: npt.NDArray[Any], alignment: Alignment | None, scan: EnergyScan) -> list[str]:
    """``good``, ``check`` for a projection that stands out, or why it has no part in it."""
    status = scan.status if alignment is None else alignment.status
    finite = score[np.isfinite(score)]
    centre = np.median(finite) if len(finite) else 0.0
    spread = 1.4826 * np.median(np.abs(finite - centre)) + 1e-12 if len(finite) else 1.0
    out = []
    for s, value in zip(status, score, strict=True):
        if s != "ok":
            out.append(s)
        elif not np.isfinite(value):
            out.append("not judged")
        else:
            out.append("check" if (value - centre) / spread > 5 else "good")
    return out
