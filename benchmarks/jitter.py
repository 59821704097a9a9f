"""Accuracy, honesty and speed of `find_jitter` on digital twins: ``python benchmarks/jitter.py``.

The frames are normalised, screened and judged as a run does it. ``--preset demo --seeds 3 --energies 6534 8570``
chooses the twins; ``--repeats 10`` measures each particle ten times at every energy, with other motion, illumination
and noise; ``--quanta 1500`` their noise. ``--hard`` gives them white jitter of +-30 px (256 px frames), a post below
the particle, 4 % bad frames and a 25 px slip from three quarters of the scan on, and shows the search all (``--preset
hard`` is a twin with all that, screened first). ``--wedge`` keeps +-70 deg in steps of 2 deg with 12 px rms jitter.
``--starts`` begins at the truth, 1 px and 20 px off. ``--peer`` runs the reprojection loop with ASTRA (SIRT steps) and
scikit-image correlation (a stand-in for TomoPy's `align_joint`) on the same tomogram, and TomoPy itself where it is
installed: minutes a tomogram, so choose one. ``--full-size FOLDER`` measures 180 x 1024 x 1024 from raw files, which it
writes there (0.4 GB) unless they are there.

Error: rms over angles of found - true displacement after the best undetermined shift (y: a constant; x: cosine and
sine), px of the frame. Bound: Cramer-Rao bound of a displacement from the noise-free projections of the twin and the
variance of its counts, were the object known; rms over angles. error/sigma: the constant in x taken out; all
projections, then the quartiles of sigma. Verdict: with the checks of a run.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from full_size import full_size_twin
from napari_xanes_tomo import JitterResult, find_jitter
from napari_xanes_tomo.agreement import smooth
from napari_xanes_tomo.io.scan import open_series
from napari_xanes_tomo.io.store import read_shifts, rows_alignments
from napari_xanes_tomo.model import Alignment, ArrayFrames, EnergyScan, FlatSet
from napari_xanes_tomo.phantom import PRESETS, simulate
from napari_xanes_tomo.qc import check_projections, check_scores
from napari_xanes_tomo.recipe import Recipe
from napari_xanes_tomo.resample import place
from napari_xanes_tomo.steps import run_flats, run_jitter


@dataclass(frozen=True)
class Tomogram:
    """What the search is given of one energy, and the truth.

    Attributes
    ----------
    stack, variance, theta
        Absorbance (n, y, x) as a run normalises it, variance (n,), angles (n,).
    true, bound : (n, 2) arrays
    spoilt, given : (n,) bool arrays
        Which projections are useless, and which the search is given.
    half : (n,) int array
    """

    stack: np.ndarray
    variance: np.ndarray
    theta: np.ndarray
    true: np.ndarray
    bound: np.ndarray
    spoilt: np.ndarray
    given: np.ndarray
    half: np.ndarray

    def kept(self, index):
        """Only some projections."""
        return replace(self, **{k: v[index] for k, v in vars(self).items()})


def orbit(theta, constant):
    """Columns cos, sin (, 1)."""
    t = np.deg2rad(theta)
    return np.stack([np.cos(t), np.sin(t)] + ([np.ones_like(t)] if constant else []), axis=1)


def errors(shift, true, theta):
    """Errors in y and x per projection, without what cannot be determined; rms y, rms x, centre."""
    d = shift - true
    y = d[:, 0] - d[:, 0].mean()
    basis = orbit(theta, constant=True)
    fit = np.linalg.lstsq(basis, d[:, 1], rcond=None)[0]
    two = basis[:, :2]
    x = d[:, 1] - two @ np.linalg.lstsq(two, d[:, 1], rcond=None)[0]
    return y, d[:, 1] - basis @ fit, rms(y), rms(x), float(fit[2])


def rms(values):
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(values))))


def quartiles(error, sigma):
    """rms(error / sigma): of all, and of the quartiles of sigma."""
    z = error / sigma
    parts = np.array_split(np.argsort(sigma), 4)
    return [rms(z)] + [rms(z[p]) for p in parts]


def scan_of(frames, theta, energy, p):
    """One simulated energy as a scan in memory."""
    n = len(theta)
    sets = tuple(FlatSet(ArrayFrames(f), np.full(len(f), 0.5), ("ok",) * len(f)) for f in frames.flats)
    half = (np.arange(n) >= n // 2).astype(int)
    return EnergyScan(
        energy, theta, ArrayFrames(frames.projections), np.full(n, 0.5), ("ok",) * n, sets, half, p.binning, 20.0,
        np.full(n, np.nan),
    )  # fmt: skip


def twins(preset, seed, energies, quanta, *, repeats=1, hard=False):
    """Yield ``energy, number of the measurement, Tomogram`` of simulated particles.

    Measurements of one particle at one energy lie 1 meV apart: every energy has its own motion, beam and noise.
    """
    p = replace(PRESETS[preset], seed=seed)
    named = [e for e in energies or p.energies_ev for _ in range(repeats)]
    numbers = list(range(repeats)) * (len(named) // repeats)
    p = replace(p, energies_ev=tuple(e + 0.001 * k for e, k in zip(named, numbers, strict=True)))
    if quanta:
        p = replace(p, quanta=quanta)
    truth, measured = simulate(p)
    rng = np.random.default_rng(1000 + seed)
    theta = truth.theta_deg
    n = len(theta)
    for frames, alignment, energy, number in zip(measured, truth.alignments, named, numbers, strict=True):
        scan = scan_of(frames, theta, p.energies_ev[frames.index], p)
        flats, data = run_flats(scan, Recipe())
        stack, true = data.data, alignment.shift
        counts = frames.projections.astype(np.float32)
        signal = np.maximum(counts - flats.arrays["stray"].astype(np.float32)[:, None, None], 1.0)
        bound = cramer_rao(stack, (p.read_noise_counts**2 + p.counts_per_quantum * counts) / signal**2)
        given = np.ones(n, dtype=bool)
        given[[int(i) for i, _ in flats.numbers["bad"]]] = False
        spoilt = np.array([status != "ok" for status in alignment.status])
        if hard:
            stack, true = harden(stack, true, theta, rng)
            spoilt[rng.choice(n, max(1, round(0.04 * n)), replace=False)] = True
            spoil(stack, np.flatnonzero(spoilt), rng)
            given[:] = True
        yield energy, number, Tomogram(
            stack, flats.arrays["variance"], theta, true, bound, spoilt, given, np.asarray(scan.half)
        )  # fmt: skip


def cramer_rao(stack, variance):
    """Bound (n, 2): the object is taken from the frames, blurred so that their noise adds little gradient."""
    clean = smooth(stack, 1.5)
    weight = 1 / np.maximum(smooth(variance.astype(np.float32), 2.0), 1e-12)
    out = []
    for axis in (1, 2):
        gradient = np.gradient(clean, axis=axis)
        out.append(1 / np.sqrt(np.sum(weight * gradient**2, axis=(1, 2), dtype=np.float64)))
    return np.stack(out, axis=1)


def harden(stack, true, theta, rng):
    """Move every frame anywhere within 30 px of 256, let it slip once, and put the particle on a post."""
    n, height, width = stack.shape
    scale = width / 256
    move = rng.uniform(-30, 30, (n, 2)) * scale
    move[round(0.75 * n) :] += np.array([15.0, 20.0]) * scale
    move -= np.median(move + true, axis=0)
    whole = np.pad(stack, ((0, 0), (width // 4, width // 4), (width // 4, width // 4)), mode="edge")
    air = np.random.default_rng(0).standard_normal(whole.shape).astype(np.float32)
    edge = np.ones(whole.shape[1:], dtype=bool)
    edge[width // 4 : -(width // 4), width // 4 : -(width // 4)] = False
    border = np.concatenate([stack[:, :4].reshape(n, -1), stack[:, -4:].reshape(n, -1)], axis=1)
    noise = border.std(axis=1).astype(np.float32)
    whole[:, edge] = np.median(border, axis=1)[:, None] + noise[:, None] * air[:, edge]
    moved = np.empty_like(stack)
    integer = np.rint(move).astype(int)  # whole pixels: the noise stays what it was
    for i in range(n):
        y0, x0 = width // 4 - integer[i, 0], width // 4 - integer[i, 1]
        moved[i] = whole[i, y0 : y0 + height, x0 : x0 + width]
    out = true + integer
    y = np.arange(height)[:, None] - (height - 1) / 2
    x = np.arange(width)[None, :] - (width - 1) / 2
    for frame, (dy, dx), t in zip(moved, out, np.deg2rad(theta), strict=True):
        across = (x - dx - 6 * scale * np.cos(t)) / (14 * scale)
        below = 1 / (1 + np.exp(-(y - dy - 80 * scale) / scale))
        frame += (below * 0.8 * np.sqrt(np.clip(1 - across**2, 0, None))).astype(np.float32)
    return moved, out


def spoil(stack, index, rng):
    """Make the frames of `index` useless, each in one of six ways."""
    n, height, width = stack.shape
    for k, i in enumerate(index):
        kind = k % 6
        if kind == 0:  # no beam
            stack[i] = 5 + 0.5 * rng.standard_normal((height, width))
        elif kind == 1:  # another angle
            stack[i] = stack[(i + n // 3) % n]
        elif kind == 2:  # half the field away
            stack[i] = np.roll(stack[i], width // 2, axis=1)
        elif kind == 3:  # a flat
            stack[i] = 0.02 * rng.standard_normal((height, width))
        elif kind == 4:  # saturated
            stack[i] = np.clip(stack[i], np.quantile(stack[i], 0.9), None)
        else:  # moved while exposed
            stack[i] = np.mean([np.roll(stack[i], s, axis=1) for s in range(-12, 13)], axis=0)


def failed(found: JitterResult, t: Tomogram):
    """Names of the scores that a run would fail, with value and threshold."""
    seen = t.stack if found.straight is None else t.stack - found.straight.frames(t.stack.shape[1:], t.theta)
    checks = check_projections(seen, t.theta, found.alignment, variance=t.variance)
    seams = (np.flatnonzero(np.diff(t.half) != 0) + 1).tolist()
    scores = (*found.quality.scores, *check_scores(checks, np.arange(len(t.theta)), seams=seams, width=seen.shape[2]))
    return [f"{s.name} {s.value:.3g} > {s.threshold:.3g}" for s in scores if not s.passed]


def row(label, found: JitterResult, t: Tomogram, seconds, screened=0, missed=0, judged=True):
    """Print one line; return rms y, x, centre, its z, the ratios and error/sigma.

    `screened` good projections were left out and `missed` useless ones given before the search.
    """
    good = ~t.spoilt & found.used
    y, x, ey, ex, centre = errors(found.shift[good], t.true[good], t.theta[good])
    zy, zx = (quartiles(e, found.sigma[good][:, a]) for a, e in ((0, y), (1, x)))
    ratio = np.array([ey, ex]) / np.sqrt(np.mean(t.bound[good] ** 2, axis=0))
    lost = screened + int((~found.used & ~t.spoilt).sum())
    flags = f"   bad ones kept {int((found.used & t.spoilt).sum())}" if t.spoilt.any() or missed else ""
    flags += f"   good ones left out {lost}" if lost else ""
    why = failed(found, t) if judged else []
    verdict = "" if not judged else ", good" if not why else f", check ({'; '.join(why)})"
    print(
        f"{label:24s} {ey:7.4f} {ex:7.4f}  {centre:+8.4f} ({centre / found.center_sigma:+5.1f} sigma)  "
        f"{ratio[0]:5.1f} {ratio[1]:5.1f}   {zy[0]:4.2f} [{' '.join(f'{v:4.2f}' for v in zy[1:])}]  "
        f"{zx[0]:4.2f} [{' '.join(f'{v:4.2f}' for v in zx[1:])}]  {seconds:5.2f} s  {found.method}{verdict}{flags}",
        flush=True,
    )
    return [ey, ex, abs(centre), centre / found.center_sigma, *ratio, *zy, *zx, seconds]


def timed(t: Tomogram, **options):
    """Run once; return the result and the seconds."""
    start = time.perf_counter()
    found = find_jitter(t.stack, t.theta, variance=t.variance, **options)
    return found, time.perf_counter() - start


def peer(t: Tomogram, *, outer=10, threads=2):
    """Align with ASTRA reprojections and scikit-image correlation; return the displacements.

    What TomoPy's `align_joint` does in `outer` iterations: shift the recorded frames by cubic splines, one SIRT step a
    slice from the volume so far, reproject it, register every frame to its reprojection (upsampling 50, no
    normalisation). It is given the frames that `find_jitter` is given, all rows at the full size, begins at zero
    displacement, and shares slices and frames out over `threads`, each with an ASTRA projector of its own ("linear", on
    the CPU). The last reprojection serves the next SIRT step, which saves one of two forward projections.
    """
    import astra
    from scipy.ndimage import shift as spline
    from skimage.registration import phase_cross_correlation

    n, height, width = t.stack.shape
    geometry = astra.create_proj_geom("parallel", 1.0, width, np.deg2rad(t.theta))
    space = astra.create_vol_geom(width, width)
    operators = [astra.OpTomo(astra.create_projector("linear", geometry, space)) for _ in range(threads)]
    row_sum = np.maximum(operators[0].FP(np.ones((width, width), np.float32)), 1e-3)
    column_sum = np.maximum(operators[0].BP(np.ones((n, width), np.float32)), 1e-3)
    volume = np.zeros((height, width, width), np.float32)
    placed, model = np.zeros((2, n, height, width), np.float32)
    found = np.zeros((n, 2))

    def move(part):
        for i in range(part, n, threads):
            placed[i] = spline(t.stack[i], -found[i], order=3)

    def reproject(part):
        operator = operators[part]
        for y in range(part, height, threads):
            lacking = (placed[:, y] - model[:, y]) / row_sum
            volume[y] = np.maximum(volume[y] + operator.BP(lacking.astype(np.float32)) / column_sum, 0)
            model[:, y] = operator.FP(volume[y])

    def register(part):
        for i in range(part, n, threads):
            found[i] -= phase_cross_correlation(model[i], placed[i], upsample_factor=50, normalization=None)[0]

    with ThreadPoolExecutor(threads) as pool:
        for _ in range(outer):
            for stage in (move, reproject, register):
                list(pool.map(stage, range(threads)))
    return found


def tomopy_itself(t: Tomogram):
    """Return the same by TomoPy's own `align_joint`, 10 iterations of SIRT, upsampling 50."""
    from tomopy.prep.alignment import align_joint

    found = align_joint(
        t.stack.copy(), np.deg2rad(t.theta), iters=10, algorithm="sirt", center=(t.stack.shape[2] - 1) / 2,
        upsample_factor=50, debug=False,
    )  # fmt: skip
    return np.stack(found[1:3], axis=1)


def against_peers(t: Tomogram):
    """Print what `find_jitter` and its peers make of one tomogram: rms y, rms x, seconds, those of all processors."""

    def measured(align):
        wall, processors = time.perf_counter(), time.process_time()
        shift = align(t)
        return shift, np.array([time.perf_counter() - wall, time.process_time() - processors])

    runs = [measured(lambda t: timed(t)[0].shift) for _ in range(5)]
    own = np.median([seconds for _, seconds in runs], axis=0)
    y, x = errors(runs[0][0], t.true, t.theta)[2:4]
    print(
        f"{'  find_jitter':24s} {y:7.4f} {x:7.4f}   {own[0]:.2f} s, processors {own[1]:.2f} s; median of 5", flush=True
    )
    peers = {"  ASTRA + scikit-image": peer}
    if importlib.util.find_spec("tomopy") is not None:
        peers["  TomoPy align_joint"] = tomopy_itself
    for name, align in peers.items():
        shift, seconds = measured(align)
        py, px = errors(shift, t.true, t.theta)[2:4]
        ratio = seconds / own
        print(f"{name:24s} {py:7.4f} {px:7.4f}   {seconds[0]:.0f} s, processors {seconds[1]:.0f} s: {ratio[0]:.0f} x "
              f"({ratio[1]:.0f} x) slower, {py / y:.0f} x and {px / x:.0f} x less exact", flush=True)  # fmt: skip


def full_size(folder: Path, repeat=3):
    """Print time and growth of the peak memory from raw files of 180 x 1024 x 1024 to displacements in their pixels."""
    import multiprocessing
    import resource

    if not (folder / "truth").exists():
        child = multiprocessing.get_context("spawn").Process(target=full_size_twin, args=(folder, (8570.0,)))
        child.start()
        child.join()
    _, _, known = next(iter(rows_alignments(read_shifts(folder / "truth" / "tables" / "shifts.csv"))))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = []
    for k in range(repeat + 1):  # the first one warms up and says how much memory it takes
        marks, processors = [time.perf_counter()], time.process_time()
        scan = open_series(folder).scans[0]
        marks.append(time.perf_counter())
        flats, data = run_flats(scan, Recipe())
        bad = {int(i) for i, _ in flats.numbers["bad"]}
        good = np.array([i not in bad for i in data.index.tolist()])
        marks.append(time.perf_counter())
        index = data.index[good]
        found = find_jitter(data.data[good], scan.theta_deg[index], variance=data.variance[good])
        shift = found.alignment.unbinned(data.bin, data.frame_shape).shift
        marks.append(time.perf_counter())
        if k:
            rows.append([*np.diff(marks), marks[-1] - marks[0], time.process_time() - processors])
        else:
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    opened, normalised, searched, whole, processors = np.median(rows, axis=0)
    y, x = errors(shift, known.shift[index], scan.theta_deg[index])[2:4]
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        run_jitter(scan, Recipe(), flats, data)
        checked = time.perf_counter() - start - searched
    print(
        f"180 x 1024 x 1024 from raw files: {whole:.2f} s (headers {opened:.2f}, absorbance and screening "
        f"{normalised:.2f}, search {searched:.2f}), processors {processors:.2f} s, median of {repeat}; memory grows by "
        f"{grown:.0f} MB; error {y:.3f} {x:.3f} px of 1024. The checks of a run: {checked:.1f} s more."
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=101)
    parser.add_argument("--energies", type=float, nargs="*", default=None)
    parser.add_argument("--quanta", type=float, default=None)
    parser.add_argument("--repeats", type=int, default=1)
    for name in ("hard", "wedge", "starts", "peer"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--full-size", type=Path, metavar="FOLDER")
    a = parser.parse_args()
    find_jitter(np.random.default_rng(0).random((16, 32, 32)) + 1, np.arange(-90.0, 90.0, 11.25))  # compile
    if a.full_size is not None:
        full_size(a.full_size)
        return
    print(
        "energy, seed              y px    x px    centre px              error/bound   error/sigma y all [quartiles]"
    )
    table = []
    for seed in range(a.first_seed, a.first_seed + a.seeds):
        for energy, number, whole in twins(a.preset, seed, a.energies, a.quanta, repeats=a.repeats, hard=a.hard):
            label = f"{energy:g} eV, seed {seed}" + (f".{number}" if a.repeats > 1 else "")
            screened = int((~whole.given & ~whole.spoilt).sum())
            t = whole.kept(np.flatnonzero(whole.given))
            if a.wedge:
                t = t.kept(np.flatnonzero(np.abs(t.theta) <= 70)[::2])
                rng = np.random.default_rng(seed)
                move = rng.normal(0, 12 * t.stack.shape[2] / 256, t.true.shape)
                t = replace(t, stack=place(t.stack, Alignment(-move, np.zeros_like(move))), true=t.true + move)
            found, seconds = timed(t)
            table.append(row(label, found, t, seconds, screened, int(whole.spoilt.sum())))
            if a.starts:
                rng = np.random.default_rng(seed)
                for name, start in (
                    ("  from the truth", t.true),
                    ("  from 1 px off", t.true + rng.normal(0, 1, t.true.shape)),
                    ("  from 20 px off", t.true + 20 * rng.choice([-1.0, 1.0], t.true.shape)),
                ):
                    other, seconds = timed(t, initial=start)
                    row(name, other, t, seconds, judged=False)
                    dy, dx = errors(other.shift, found.shift, t.theta)[2:4]
                    print(f"{'':24s} differs by {dy:.4f} {dx:.4f} px, {dy / rms(found.sigma[:, 0]):.2f} "
                          f"{dx / rms(found.sigma[:, 1]):.2f} sigma")  # fmt: skip
            if a.peer:
                against_peers(t)
    table = np.array(table)
    worst = np.max(np.abs(table), axis=0)
    print(
        f"{'worst':24s} {worst[0]:7.4f} {worst[1]:7.4f}  {worst[2]:8.4f} ({worst[3]:5.1f} sigma)  {worst[4]:5.1f} "
        f"{worst[5]:5.1f}   error/sigma {table[:, [6, 11]].min():.2f} .. {table[:, [6, 11]].max():.2f}, in quartiles "
        f"{table[:, 6:16].min():.2f} .. {table[:, 6:16].max():.2f}   {np.median(table[:, 16]):.2f} s (median)"
    )
    print(f"centre: rms(error/sigma) {rms(table[:, 3]):.2f}")


if __name__ == "__main__":
    main()
