"""Size and speed of the journal: 200 candidates of 67 energies x 180 shifts, and a journal of 5,000 events.

    python benchmarks/journal.py [--candidates 200]

Every candidate has shifts, sigmas and residuals of its own (random numbers, which cannot be made smaller), as after 200
rounds of other parameters on the whole of tomo_00089; the moments do not depend on the parameters and are kept once an
energy. Wanted: at most 60 MB in all, and 5,000 events read and resolved in at most 0.3 s.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import napari_xanes_tomo.io.journal as journal_module
from napari_xanes_tomo.io.journal import Event, Journal
from napari_xanes_tomo.model import Quality, Score
from napari_xanes_tomo.recipe import JitterParameters, Recipe
from napari_xanes_tomo.run import candidate_payload
from napari_xanes_tomo.state import UnitState, resolve
from napari_xanes_tomo.steps import StepResult

ENERGIES, ANGLES = 67, 180


def jitter_result(rng: np.random.Generator, moments: np.ndarray) -> StepResult:
    """Return a result of the jitter step as large as real ones are."""
    scores = tuple(
        Score(name, float(rng.uniform(0, 1)), unit, threshold)
        for name, unit, threshold in (
            ("sigma_y", "px", 0.1), ("sigma_x", "px", 0.1), ("held-out residual / noise", "", 3.0),
            ("projections that stand out", "", 3.6), ("moved from the moments", "px", None),
        )
    )  # fmt: skip
    arrays = {
        "shift": moments + rng.normal(0, 0.1, (ANGLES, 2)),
        "sigma": rng.uniform(0.005, 0.02, (ANGLES, 2)),
        "moments": moments,
        "residual": rng.uniform(0.9, 1.6, ANGLES),
    }
    numbers = {
        "center": float(rng.normal()), "center_sigma": float(rng.uniform()), "method": "reprojection", "dropped": [],
        "jumps": [[90.0, float(rng.normal()), float(rng.normal())]],
    }  # fmt: skip
    return StepResult(arrays, numbers, Quality(scores, ("reprojection kept",)))


def size(candidates: int) -> float:
    """Return the apparent size of a journal with so many candidates of every energy, MB."""
    rng = np.random.default_rng(0)
    moments = [rng.normal(0, 20, (ANGLES, 2)) for _ in range(ENERGIES)]
    key = "0123456789abcdef"
    # Half a million calls of fsync take long and say nothing about the size.
    journal_module.os.fsync = lambda _: None  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(folder)
        for _ in range(candidates):
            for e in range(ENERGIES):
                unit = UnitState("idle", key, key)
                payload = candidate_payload(journal, "jitter", e, unit, jitter_result(rng, moments[e]), 3.612)
                journal.append("candidate", payload)
        files = [p for p in Path(folder).rglob("*") if p.is_file()]
        total = sum(p.stat().st_size for p in files)
        events = journal.path.stat().st_size
        begun = time.perf_counter()
        Journal(folder)
        print(f"{candidates} candidates x {ENERGIES} energies x {ANGLES} shifts: {total / 1e6:.1f} MB "
              f"({events / 1e6:.1f} MB of it events), {len(files)} files, "
              f"opens in {time.perf_counter() - begun:.2f} s")  # fmt: skip
    return total / 1e6


def resolved() -> float:
    """Return how long it takes to read and resolve 5,000 events, s."""
    energies = np.linspace(8178, 8778, ENERGIES).tolist()
    prints = [f"{e:016d}" for e in range(ENERGIES)]
    events: list[Event] = []
    rng = np.random.default_rng(0)
    moments = rng.normal(0, 20, (ANGLES, 2))
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(folder)
        iterations = 0
        while len(events) < 5000:
            iterations += 1
            recipe = Recipe(jitter=JitterParameters(iterations=iterations))
            for name in ("flats", "jitter", "registration", "maps"):
                state = resolve(recipe, events, energies, prints)
                for e in [None] if name == "maps" else range(ENERGIES):
                    unit = state.units[(name, e)]
                    if unit.status in ("candidate", "accepted") or not unit.input_key:
                        continue
                    payload = candidate_payload(journal, name, e, unit, jitter_result(rng, moments), 3.612)
                    events.append(journal.append("candidate", payload))
                    decision = {"step": name, "energy": e, "candidate": events[-1].seq, "by": "thresholds"}
                    events.append(journal.append("decision", decision))
        best = [np.inf, np.inf]
        for _ in range(3):
            begun = time.perf_counter()
            read = Journal(folder).events
            middle = time.perf_counter()
            resolve(recipe, read, energies, prints)
            best = [min(best[0], middle - begun), min(best[1], time.perf_counter() - middle)]
    print(f"{len(events)} events: read in {best[0]:.3f} s, resolved in {best[1]:.3f} s")
    return best[0] + best[1]


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=200)
    options = parser.parse_args()
    fsync = journal_module.os.fsync
    megabytes = size(options.candidates) * 200 / options.candidates
    seconds = resolved()
    journal_module.os.fsync = fsync
    good = megabytes <= 60 and seconds <= 0.3
    print(f"200 candidates: {megabytes:.1f} MB (wanted: 60); 5,000 events: {seconds:.3f} s (wanted: 0.3)")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
