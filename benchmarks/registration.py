"""Registration across energies against simpler ways, by the truth of a twin.

    python benchmarks/registration.py TWIN OUT

OUT is a finished run of TWIN. Compared is, for every energy and angle, how far the particle lies from where it is at
the reference energy (px of the common grid), as the run found it and as two peers find it, each from the same pair of
projections: a correlation (scikit-image, not normalised, 1/50 px) and StackReg (pystackreg, where it can be imported;
Thevenaz 1998, doi 10.1109/83.650848). The peers are given what they cannot find: the true magnification, a start that
is right to half a pixel, absorbance with the air taken out, and a window that is 1 on the particle.

Two errors of the run stand beside theirs. That of the *pair* holds the jitter of both energies. The *registration
error* (`benchmarks/accuracy.py`: one undetermined shift for all energies taken out) is that of the energy alone. What
the peers find is one as well where the reference's projections are where they should be, and it is taken for that.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from skimage.registration import phase_cross_correlation

from accuracy import alignment_errors
from napari_xanes_tomo import Recipe, XanesTomoError, open_series
from napari_xanes_tomo.absorbance import normalise
from napari_xanes_tomo.edges import bracketed_elements, edge_energy_ev
from napari_xanes_tomo.graph import contrast_islands
from napari_xanes_tomo.io.store import read_shifts, rows_alignments
from napari_xanes_tomo.registration import reference_energy
from napari_xanes_tomo.resample import place


def relative(alignments: dict[float, Any], energy: float, reference: float) -> np.ndarray:
    """Displacement (n, 2) ``[dy, dx]`` of the content against the reference energy, px of the common grid."""
    a = alignments[energy]
    return a.shift / a.magnification - alignments[reference].shift


def correlation(fixed: np.ndarray, moving: np.ndarray) -> np.ndarray:
    """Displacement of the content of `moving` against `fixed`, px."""
    return -np.asarray(phase_cross_correlation(fixed, moving, upsample_factor=50, normalization=None)[0])


def stackreg() -> Any:
    """Return the same by StackReg, or None where it is not installed."""
    try:
        engine = import_module("pystackreg").StackReg
    except ImportError:
        return None
    reg = engine(engine.TRANSLATION)

    def find(fixed: np.ndarray, moving: np.ndarray) -> np.ndarray:
        matrix = reg.register(fixed, moving)
        return np.array([matrix[1, 2], matrix[0, 2]])

    return find


def rms(values: np.ndarray) -> np.ndarray:
    """Root mean square over the projections, (2,)."""
    return np.sqrt(np.mean(np.square(values), axis=0))


def main() -> int:
    """Print the table; exit code 1 where the registration is not 5 times as exact as the best peer across an edge."""
    if len(sys.argv) != 3:
        print(__doc__)
        return 2
    twin, out = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        series = open_series(twin)
        truth = {e: a for e, _, a in rows_alignments(read_shifts(twin / "truth" / "tables" / "shifts.csv"))}
        found = {e: a for e, _, a in rows_alignments(read_shifts(out / "tables" / "shifts.csv"))}
    except XanesTomoError as error:
        print(error)
        return 2
    recipe = Recipe()
    r = reference_energy(series.energies_ev)
    reference = float(series.energies_ev[r])
    peers = {"correlation": correlation}
    if (other := stackreg()) is not None:
        peers["StackReg"] = other
    rng = np.random.default_rng(0)

    def placed(number: int, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scan = series.scans[number]
        data = normalise(scan, recipe.absorbance)
        a = truth[scan.energy_ev]
        part = replace(a, shift=start[data.index], sigma=a.sigma[data.index], status=())
        return place(data.data, part), data.index

    # Every frame is brought to where it should be but for half a pixel or less, so that the window fits.
    start_of = truth[reference].shift + rng.uniform(-0.5, 0.5, truth[reference].shift.shape)
    fixed, index = placed(r, start_of)
    calm = np.median(fixed, axis=0)
    body = (calm > 0.1 * np.percentile(calm, 99)).astype(float)
    from scipy.ndimage import gaussian_filter, maximum_filter

    size = fixed.shape[2] / 256
    window = gaussian_filter(maximum_filter(body, int(9 * size)), 3 * size).astype(np.float32)
    own = {row[0]: row[4:6] for row in alignment_errors(twin, out)}
    print("rms error of the displacement against the reference energy, px of the common grid, y / x")
    names = ("run, the pair", "run, registr.", *peers)
    print(f"{'energy':>8}" + "".join(f"  {n:>15}" for n in names) + "   best peer / run: pair, registration (y, x)")
    ratios, seconds = [], dict.fromkeys(peers, 0.0)
    for number, scan in enumerate(series.scans):
        energy = float(scan.energy_ev)
        if number == r or energy not in found:
            continue
        a = truth[energy]
        start = a.shift + rng.uniform(-0.5, 0.5, a.shift.shape)
        moving, mine = placed(number, start)
        both, first, second = np.intersect1d(index, mine, return_indices=True)
        true = relative(truth, energy, reference)[both]
        known = relative(found, energy, reference)[both]
        good = np.isfinite(known).all(axis=1)
        # What the runs cannot know: one shift of the object for all energies drops out of a difference.
        rows = {"pair": rms((known - true)[good]), "registration": own[energy]}
        already = (start / a.magnification - start_of)[both]
        for name, find in peers.items():
            begun = time.perf_counter()
            shifts = np.array([find(fixed[i] * window, moving[j] * window) for i, j in zip(first, second, strict=True)])
            seconds[name] += time.perf_counter() - begun
            rows[name] = rms(shifts + already - true)
        least = np.min([rows[n] for n in peers], axis=0)
        best = np.concatenate([least / rows["pair"], least / rows["registration"]])
        text = "".join(f"  {v[0]:7.3f} {v[1]:7.3f}" for v in rows.values())
        print(f"{energy:8.1f}{text}  " + "".join(f" {b:5.1f}" for b in best), flush=True)
        ratios.append((energy, best))
    # Below the highest edge; but below all edges the elements absorb as they do above all of them: no other contrast.
    island = dict(zip(series.energies_ev, contrast_islands(series.energies_ev), strict=True))
    last = max((edge_energy_ev(x) for x in bracketed_elements(series.energies_ev)), default=0.0)
    other = [b for e, b in ratios if e < last and island[e] != island[reference]]
    across = np.median(other, axis=0) if other else np.full(4, np.nan)
    lowest = np.min(other, axis=0) if other else across
    for name, spent in seconds.items():
        print(f"{name}: {spent / max(1, len(ratios)):.1f} s an energy")
    print("across an edge, of another contrast: the best peer's error over that of the run, y / x (wanted: 5)")
    for k, what in enumerate(("the pair", "registration")):
        mid, low = across[2 * k : 2 * k + 2], lowest[2 * k : 2 * k + 2]
        print(f"  {what}: median {mid[0]:.1f} / {mid[1]:.1f}, least {low[0]:.1f} / {low[1]:.1f}")
    return int(not (across[2:] >= 5).all())


if __name__ == "__main__":
    sys.exit(main())
