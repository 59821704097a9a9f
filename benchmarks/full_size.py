"""Time and memory of jitter correction and energy registration at full size: ``python benchmarks/full_size.py FOLDER``.

Four energies of 180 x 1024 x 1024 raw files are written to FOLDER (1.6 GB) unless they are there, and a run until the
registration, with all its checks, is timed: once to warm up, then once more. Flats count as what the run waits for
them: those of the next energy are done beside the jitter correction of the present one. The time of 67 energies is 67
times the median time of an energy in every step, three times that of a second template (as for the energies of `many`
in `registration_claims.py`; here there is one), and once what is left.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from accuracy import alignment_errors
from napari_xanes_tomo.io.store import ShiftRow, write_shifts
from napari_xanes_tomo.model import Alignment
from napari_xanes_tomo.phantom import PRESETS, simulate
from napari_xanes_tomo.resample import place

ENERGIES = (7728.0, 8178.0, 8354.0, 8570.0)


def full_size_twin(folder: Path, energies=ENERGIES):
    """Write 180 x 1024 x 1024 frames of `demo` as raw files: those of 256 px made finer, with noise of their own.

    There is no detail in it that 256 px do not hold, and it is four times as blurred as frames of that size are: it is
    for time and memory.
    """
    from napari_xanes_tomo.phantom.files import _script, _write_energy
    from napari_xanes_tomo.phantom.microscope import Energy

    size, wide = 256, 1024
    p = replace(PRESETS["demo"], seed=301, energies_ev=tuple(energies))
    few = replace(p, quanta=1e7, counts_per_quantum=0.003, read_noise_counts=0.0, flats_per_set=2)
    truth, measured = simulate(replace(few, illumination_drift=0.0))
    p = replace(p, n=wide)
    n = len(truth.theta_deg)
    rng = np.random.default_rng(1)
    c = (np.arange(wide) - (wide - 1) / 2) / (wide / 2)
    beam = 9000 * (1 - 0.14 * (c[:, None] ** 2 + c**2) - 0.1 * c + 0.06 * c[:, None])

    def exposed(quanta):
        noise = p.read_noise_counts * rng.standard_normal(quanta.shape)
        return np.clip(np.rint(p.counts_per_quantum * rng.poisson(quanta) + noise), 0, 65535).astype(np.uint16)

    finer = Alignment(np.zeros((1, 2)), np.zeros((1, 2)), magnification=size / wide)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "twin_3DXANES_TOMO-XANES.txt").write_bytes(_script(p, "twin", truth.theta_deg).encode())
    for frames in measured:
        beams = np.maximum(frames.flats.mean(axis=1), 1)
        seen = (frames.projections / beams[(np.arange(n) >= n // 2).astype(int)]).astype(np.float32)
        projections = np.empty((n, wide, wide), np.uint16)
        for i in range(n):
            drift = 1 + 0.03 * np.sin(i / 40) + 0.02 * c * np.cos(i / 30)
            big = place(seen[i : i + 1], finer, grid_shape=(wide, wide))[0]
            projections[i] = exposed(beam * drift * np.clip(np.where(big == 0, 1, big), 0.01, 1.2))
        flats = np.stack([[exposed(beam * s) for s in 1 + 0.003 * rng.normal(size=10)] for _ in range(2)])
        _write_energy(folder, "twin", p, truth.theta_deg, Energy(frames.index, projections, flats))
    write_shifts(
        folder / "truth" / "tables" / "shifts.csv",
        (
            ShiftRow(e, float(t), i, float(dy), float(dx), 0.0, 0.0, a.magnification, a.roll_deg, a.status[i])
            for e, a in zip(p.energies_ev, truth.alignments, strict=True)
            for i, (t, (dy, dx)) in enumerate(zip(truth.theta_deg, a.shift * (wide / size), strict=True))
        ),
    )


def measured(folder: Path, out: Path):
    """Run until the registration; seconds of all, of every unit by step, of the processors; peak memory, GiB.

    Templates are counted apart, those of the reference and of the second energy.
    """
    import resource

    from napari_xanes_tomo import Recipe, Workflow, open_series

    units = {"flats": [], "jitter": [], "registration": []}
    templates = {"reference": 0.0, "second": 0.0}

    class Timed(Workflow):
        def run_unit(self, name, *args, **options):
            begun, before = time.perf_counter(), sum(templates.values())
            try:
                return super().run_unit(name, *args, **options)
            finally:
                units[name].append(time.perf_counter() - begun - sum(templates.values()) + before)

        def _reference_template(self, *args):
            return self._counted("reference", super()._reference_template, *args)

        def _hub_template(self, *args):
            return self._counted("second", super()._hub_template, *args)

        def _counted(self, name, make, *args):
            begun, before = time.perf_counter(), sum(templates.values())
            try:
                return make(*args)
            finally:
                templates[name] += time.perf_counter() - begun - sum(templates.values()) + before

    start = time.perf_counter()
    with Timed(open_series(folder), out, Recipe()) as workflow:
        workflow.run(until="registration", accept="thresholds")
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": time.perf_counter() - start, "units": units, "processors": used.ru_utime + used.ru_stime,
        "templates": templates, "memory_gib": used.ru_maxrss / 2**20, "errors": alignment_errors(folder, out).tolist(),
    }  # fmt: skip


def main() -> None:
    """Print the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    if not (a.folder / "truth").exists():
        # In a process of its own: the memory of this one is counted as that of those it starts.
        child = spawn.Process(target=full_size_twin, args=(a.folder,))
        child.start()
        child.join()
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
        for k in range(2):  # the first one warms up
            found = pool.submit(measured, a.folder, Path(scratch) / str(k)).result()
    if a.json:
        print(json.dumps(found))
        return
    each = {name: float(np.median(times)) for name, times in found["units"].items()}
    second = found["templates"]["second"]
    once = found["seconds"] - len(ENERGIES) * sum(each.values()) - second
    worst = np.nanmax(np.abs(found["errors"]), axis=0)
    print(
        f"{len(ENERGIES)} energies of 180 x 1024 x 1024, from raw files to registered: {found['seconds']:.1f} s, "
        f"processors {found['processors']:.1f} s, peak memory {found['memory_gib']:.2f} GiB"
    )
    steps = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in each.items())
    minutes = (67 * sum(each.values()) + 3 * second + once) / 60
    print(f"  an energy: {steps}; a second template {second:.1f} s; once {once:.1f} s; 67 energies: {minutes:.1f} min")
    print(
        f"  worst jitter {worst[1]:.3f} {worst[2]:.3f} px of 1024, registration {worst[4]:.3f} {worst[5]:.3f} px, "
        f"magnification {worst[6]:.1e}"
    )


if __name__ == "__main__":
    main()
