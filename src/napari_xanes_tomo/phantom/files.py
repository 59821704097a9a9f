"""Twins on disk: ``.xrm`` files, their script, and the truth beside them."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from napari_xanes_tomo.agreement import center_of_rotation
from napari_xanes_tomo.io.store import EnergyRow, MapSpec, MapStore, ShiftRow, write_energies, write_shifts
from napari_xanes_tomo.io.xrm import write_xrm
from napari_xanes_tomo.model import FloatArray, Progress, XanesTomoError, no_progress
from napari_xanes_tomo.recipe import ScanParameters

from .microscope import BadFrame, Energy, Instrument, Truth, simulate
from .parameters import TwinParameters, recorded, twin_parameters

__all__ = ["write_twin"]


def write_twin(
    path: str | os.PathLike[str],
    preset: str = "demo",
    *,
    seed: int | None = None,
    parameters: TwinParameters | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Progress = no_progress,
) -> Path:
    """Write a twin as a scan folder with its truth in ``truth/``; return the folder.

    Parameters
    ----------
    path : path
        A new or empty folder, or one that holds this very twin already (then nothing is done).
    preset : {"tiny", "demo", "demo-real", "hard"}
        64 px x 36 angles x 8 energies; 256 px x 180 angles x 16 energies; the same with glass in the field, a dark
        band, stray light, changing focus and a particle that shrinks; few energies with large jitter, few quanta, a
        post, a slip and bad frames.
    seed : int, optional
        Another particle, motion and noise.
    parameters : TwinParameters, optional
        Used instead of the preset.
    options : mapping, optional
        ``{name: value}`` of parameters that differ from the preset; see `TwinParameters`.
    progress : callable
        See `Progress`.

    Raises
    ------
    XanesTomoError
        The preset or an option is unknown, or the folder holds something else or cannot be written.
    """
    folder = Path(path)
    if parameters is None:
        parameters = twin_parameters(preset, options)
    if seed is not None:
        parameters = replace(parameters, seed=seed)
    p = parameters
    wanted = json.loads(json.dumps(recorded(p)))
    mark = folder / "truth" / "twin.json"
    name = f"twin_s{p.seed:03d}"
    try:
        if mark.exists():
            state = _state(mark)
            if state.get("parameters") == wanted and state.get("complete"):
                return folder
            if state.get("parameters") != wanted:
                raise XanesTomoError(f"{folder.name}: holds another twin; give a new folder")
        elif folder.exists() and any(folder.iterdir()):
            raise XanesTomoError(f"{folder.name}: expected a new or empty folder, it holds other files")
        (folder / "truth" / "tables").mkdir(parents=True, exist_ok=True)
        mark.write_text(json.dumps({"parameters": wanted, "complete": False}))
        truth, measurement = simulate(p, progress=progress)
        (folder / f"{name}_3DXANES_TOMO-XANES.txt").write_bytes(_script(p, name, truth.theta_deg).encode("ascii"))
        for frames in measurement:
            _write_energy(folder, name, p, truth.theta_deg, frames)
            progress("twin", frames.index + 1, len(p.energies_ev))
        _write_truth(folder / "truth", p, truth)
        mark.write_text(json.dumps({"parameters": wanted, "complete": True}))
    except OSError as error:
        raise XanesTomoError(f"{folder.name}: cannot write the twin ({error.strerror or error})") from None
    return folder


def _state(mark: Path) -> dict[str, Any]:
    """Read what a twin was made with; a mark cut short by a crash or not of ours tells nothing."""
    try:
        found = json.loads(mark.read_text())
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


def _flat_name(name: str, counter: int, shot: int, shots: int, theta: float) -> str:
    return f"rep01_ref_{counter:05d}_{name}_{theta:07.2f}_Degree_{shot + 1:03d}of{shots:03d}.xrm"


def _projection_name(name: str, counter: int, theta: float, energy_ev: float) -> str:
    return f"rep01_{counter:05d}_{name}_{theta:07.2f}_Degree_{energy_ev:08.2f}_eV_001of001.xrm"


def _script(p: TwinParameters, name: str, theta_deg: FloatArray) -> str:
    lines = [";; TOMO XANES ;;", "setexp 0.50", f"setbinning {p.binning}"]
    counter = flat_counter = 0
    last_theta = 0.0
    half = p.n_angles // 2
    for e, energy in enumerate(p.energies_ev):
        lines += [
            ";; set the MONO and the ZP ;;",
            f"sete {energy:.2f}",
            f"moveto zpx {7.19 * (8570 - energy) - 0.5:.2f}",
            f"moveto zpy {-0.78 * (8570 - energy) - 0.2:.2f}",
            f"moveto zpz {-226.76 + 5.02 * (energy - 8570):.2f}",
            ";;;;;;;;;; TOMO data collection at a certain energy ;;;;;;;;;;;;;;",
        ]
        for start in (0, half):
            lines += ["moveto x -405.65", "moveto y 2291.50", "setexp 0.50", f"setbinning {p.binning_of(e)}"]
            for shot in range(p.flats_per_set):
                lines.append(f"collect {_flat_name(name, flat_counter, shot, p.flats_per_set, last_theta)}")
                flat_counter += 1
            lines += ["setexp 0.50", f"setbinning {p.binning_of(e)}"]
            for theta in theta_deg[start : half if start == 0 else None]:
                lines += [f"moveto t {theta:.2f}", "moveto x -205.85", "moveto y 2291.50", "moveto z 264.25"]
                lines.append(f"collect {_projection_name(name, counter, float(theta), energy)}")
                counter += 1
                last_theta = float(theta)
    return "\r\n".join(lines) + "\r\n"


def _write_energy(folder: Path, name: str, p: TwinParameters, theta_deg: FloatArray, frames: Energy) -> None:
    energy = p.energies_ev[frames.index]
    half = p.n_angles // 2
    per_energy = p.n_angles + 2 * p.flats_per_set
    start = 1_491_500_000.0 + frames.index * per_energy * 2.0
    common: dict[str, Any] = {"exposure_s": 0.5, "binning": p.binning_of(frames.index), "pixel_size_um": 0.023}
    order: list[tuple[str, npt.NDArray[np.uint16], float, float]] = []
    last = 0.0 if frames.index == 0 else float(theta_deg[-1])
    for h in range(2):
        for shot in range(p.flats_per_set):
            counter = (2 * frames.index + h) * p.flats_per_set + shot
            order.append((_flat_name(name, counter, shot, p.flats_per_set, last), frames.flats[h, shot], last, -405.65))
        for i in range(h * half, half if h == 0 else p.n_angles):
            counter = frames.index * p.n_angles + i
            theta = float(theta_deg[i])
            order.append((_projection_name(name, counter, theta, energy), frames.projections[i], theta, -205.85))
            last = theta

    def write(k: int) -> None:
        file, frame, theta, x = order[k]
        write_xrm(
            folder / file,
            frame,
            theta_deg=theta,
            x_um=x,
            y_um=2291.50,
            z_um=264.25,
            date=start + 2.0 * k,
            **common,
        )

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, range(len(order))))


def _write_rows(path: Path, kind: type[Any], rows: tuple[Any, ...]) -> None:
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow([f.name for f in fields(kind)])
        out.writerows(asdict(row).values() for row in rows)


def _write_truth(folder: Path, p: TwinParameters, truth: Truth) -> None:
    law = ScanParameters()
    write_shifts(
        folder / "tables" / "shifts.csv",
        (
            ShiftRow(energy, float(theta), i, float(dy), float(dx), 0.0, 0.0, a.magnification, a.roll_deg, a.status[i])
            for energy, a in zip(p.energies_ev, truth.alignments, strict=True)
            for i, (theta, (dy, dx)) in enumerate(zip(truth.theta_deg, a.shift, strict=True))
        ),
    )
    rows = []
    pixel_nm = 0.0
    for e, (energy, a) in enumerate(zip(p.energies_ev, truth.alignments, strict=True)):
        size = p.binning_of(e) * (law.pixel_law_slope_nm_per_ev * energy + law.pixel_law_offset_nm)
        pixel_nm = size if energy == truth.reference_ev else pixel_nm
        rows.append(
            EnergyRow(
                energy_ev=energy,
                magnification=a.magnification,
                magnification_sigma=0.0,
                roll_deg=a.roll_deg,
                center_px=center_of_rotation(a.shift[:, 1], truth.theta_deg)[0],
                pixel_size_nm=size,
                reference=energy == truth.reference_ev,
                status="ok",
            )
        )
    write_energies(folder / "tables" / "energies.csv", rows)
    if len(recorded(p)) > len(recorded(TwinParameters())):
        _write_rows(folder / "tables" / "instrument.csv", Instrument, truth.instrument)
    if truth.bad:
        _write_rows(folder / "tables" / "bad_frames.csv", BadFrame, truth.bad)
    specs = [MapSpec(name, "eV" if name.startswith("edge") else "g/cm3", "truth") for name in truth.maps]
    store = MapStore(folder / "maps.ome.zarr", (p.n, p.n, p.n), pixel_nm, specs, slab_rows=32)
    store.create()
    for y0, y1 in store.pending():
        store.write(y0, {name: data[y0:y1] for name, data in truth.maps.items()})
    store.finish(metadata={"truth": True})
