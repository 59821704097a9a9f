"""Quality of the maps of a run on a digital twin: ``python benchmarks/chemistry.py TWIN OUT [--json]``.

``python benchmarks/chemistry.py --speed [--json]`` measures the edge measures instead: spectra of 63 energies per
second, against the usual way of one spectrum after the other (lines by `numpy.polyfit`, crossing of 0.5), and against
Larch's `preedge` and `find_e0` where it is installed, in one run, median of five.

Compared inside the particle (true density above 60 %, two voxels away from every surface, pores out) and found, not
given, alignment; the truth is moved by the undetermined shift of the whole, never the maps.

- correlation, slope and bias against the truth without any smoothing;
- error / sigma: rms, and the part beyond 4 sigma, against the truth blurred by the point spread that the map states;
- dipole: regression of (map - truth) on the gradient of the truth within two voxels of the surfaces, px (y, z, x);
- correlation of the nickel share with the edge energy, in the map and in the truth.

``python benchmarks/chemistry.py --shortcut [--columns 1024] [--rows 16] [--json]`` compares, for 67 energies in memory,
reconstructing only the components of the maps with reconstructing every energy and combining the volumes: largest
difference, time of either, median of three in one run; once for the reconstruction alone, once from the recorded counts
to the maps (flats, placing and the last step, the same for both, are in it; standard errors, which only the components
have, are not). By default 16 slices as wide as the frames of the instrument (8 GB): reconstruction grows with the
square of the width, placing with the width. For the reconstruction alone both sums are in double precision, so that
what is left is the single precision of either reconstruction; from the counts on, components are summed as the maps do
it, in single precision.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from accuracy import global_shift
from napari_xanes_tomo import XanesTomoError, read_maps
from napari_xanes_tomo.io.store import read_map_attributes

SHIFT = "edge_energy_relative"


def moved(volume, offset, order=3):
    """Move a volume by `offset` (y, z, x) voxels."""
    from scipy.ndimage import shift

    return shift(np.nan_to_num(volume).astype(np.float32), offset, order=order, mode="nearest")


def coarser(volume, step):
    """Average a volume over `step` voxels, centred as the maps are."""
    if step == 1:
        return volume
    for axis, n in enumerate(volume.shape):
        m = n // step
        start = (n - m * step) // 2
        volume = np.take(volume, range(start, start + m * step), axis=axis)
        shape = (*volume.shape[:axis], m, step, *volume.shape[axis + 1 :])
        volume = volume.reshape(shape).mean(axis=axis + 1)
    return volume


def judge(twin: Path, out: Path):
    """Return {map: {score: value}} and {what: value} of a run."""
    from scipy.ndimage import binary_dilation, binary_erosion, gaussian_filter

    truth = {k: np.asarray(v) for k, v in read_maps(twin / "truth" / "maps.ome.zarr").data.items()}
    maps = read_maps(out / "maps.ome.zarr")
    true_voxel = read_maps(twin / "truth" / "maps.ome.zarr").voxel_nm
    _, each = read_map_attributes(out / "maps.ome.zarr")
    step = max(1, round(maps.voxel_nm / true_voxel))
    offset = global_shift(twin, out)
    # Only where the particle is; as much is cut from either side, so that the middle stays where it is.
    there = np.argwhere(truth["density"] > 0.02 * truth["density"].max())
    gap = np.minimum(there.min(axis=0), np.array(truth["density"].shape) - 1 - there.max(axis=0)) - 12
    gap = np.maximum(gap, 0) // step
    fine, cut = (tuple(slice(k * g, n - k * g) for g, n in zip(gap, shape, strict=True)) for k, shape in (
        (step, truth["density"].shape), (1, maps.data["mask"].shape)
    ))  # fmt: skip
    truth = {k: v[fine] for k, v in truth.items()}
    density = coarser(truth["density"], step)
    typical = np.percentile(density[density > 0.2 * density.max()], 75)
    solid = density > 0.6 * typical
    inside = binary_erosion(solid, iterations=2)
    near = binary_dilation(solid, iterations=2) & ~inside
    nickel = truth["Ni"]
    metals = [n for n in ("Mn", "Co", "Ni") if n in truth]
    mass = {"Mn": 54.938, "Co": 58.933, "Ni": 58.693}

    def at(values, sigma=0.0):
        """Return the truth, moved to where the run has put it, blurred, on the grid of the maps."""
        soft = gaussian_filter(values, sigma) if sigma else values
        return coarser(moved(soft, offset), step)

    shifted = {k: at(truth[k]) for k in truth}
    inside_moved = moved(inside.astype(np.float32), offset / step, order=1) > 0.99
    near_moved = moved(near.astype(np.float32), offset / step, order=1) > 0.99
    scores = {}
    names = [*metals, "density", *(f"{m}_fraction" for m in metals), "edge_energy_relative"]
    for name in names:
        if name not in maps.data:
            continue
        found = np.asarray(maps.data[name][cut])
        blur = float(each[name].get("psf_sigma_voxel", np.hypot(0.75, each[name].get("smoothing_voxel", 0.0)))) * step

        def share(values, m):
            total = np.sum([values[k] / mass[k] for k in metals], axis=0)
            return values[m] / mass[m] / np.maximum(total, 1e-6)

        if name.endswith("_fraction"):
            m = name.split("_")[0]
            true, soft = share(shifted, m), share({k: at(truth[k], blur) for k in metals}, m)
        elif name.startswith("edge"):
            true = shifted[name]
            soft = at(nickel * truth[name], blur) / np.maximum(at(nickel, blur), 1e-3)
        else:
            true, soft = shifted[name], at(truth[name], blur)
        good = inside_moved & np.isfinite(found)
        a, b = true[good].astype(float), found[good].astype(float)
        row = {
            "r": np.corrcoef(a, b)[0, 1],
            "slope": np.cov(a, b)[0, 1] / np.var(a),
            "bias": b.mean() - a.mean() if name.startswith("edge") else 100 * (b.mean() / a.mean() - 1),
        }
        if f"{name}_sigma" in maps.data:
            sigma = np.asarray(maps.data[f"{name}_sigma"][cut])[good].astype(float)
            aligned = np.asarray(maps.data[f"{name}_sigma_alignment"][cut])[good].astype(float)
            known = np.isfinite(sigma)
            sigma, aligned = sigma[known], aligned[known]
            error = (b - soft[good])[known]
            if name.startswith("edge"):  # an energy scale of its own: the mean spectrum is the particle's
                error = error - np.average(error)
            z = error / sigma
            row |= {
                "rms": float(np.sqrt(np.mean(error**2))),
                "sigma": float(np.median(sigma)),
                "alignment": float(np.median(aligned)),
                "z": float(np.sqrt(np.mean(z**2))),
                "z_no_bias": float(np.sqrt(np.mean(((error - error.mean()) / sigma) ** 2))),
                "beyond4": 100 * float(np.mean(np.abs(z) > 4)),
            }
        if name in (*metals, "density"):
            g = np.stack([d[near_moved] for d in np.gradient(soft)], axis=1)
            rest = (found - soft)[near_moved]
            fit = np.linalg.lstsq(np.column_stack([g, np.ones(len(g))]), rest, rcond=None)[0]
            row["dipole"] = [float(-v) * step for v in fit[:3]]
            hard = np.stack([d[near_moved] for d in np.gradient(true)], axis=1)
            rest = (found - true)[near_moved]
            fit = np.linalg.lstsq(np.column_stack([hard, np.ones(len(hard))]), rest, rcond=None)[0]
            row["dipole_hard"] = [float(-v) * step for v in fit[:3]]
        scores[name] = row
    whole = {}
    if "Ni_fraction" in maps.data and "edge_energy_relative" in maps.data:
        f, e = (np.asarray(maps.data[n][cut]) for n in ("Ni_fraction", "edge_energy_relative"))
        good = inside_moved & np.isfinite(f) & np.isfinite(e)
        whole["r(Ni share, edge) found"] = float(np.corrcoef(f[good], e[good])[0, 1])
        true = (shifted["Ni"] / np.maximum(shifted["density"], 1e-6))[good]
        if np.std(true) > 1e-6:
            whole["r(Ni share, edge) true"] = float(np.corrcoef(true, shifted["edge_energy_relative"][good])[0, 1])
        ni = np.asarray(maps.data["Ni"][cut])
        whole["r(Ni, edge) found"] = float(np.corrcoef(ni[good], e[good])[0, 1])
        whole["r(Ni, edge) true"] = float(np.corrcoef(shifted["Ni"][good], shifted["edge_energy_relative"][good])[0, 1])
    return scores, whole


def speed(as_json: bool = False) -> int:
    """Print spectra per second of every edge measure."""
    import time

    from napari_xanes_tomo.phantom import ni_xanes
    from napari_xanes_tomo.spectra import MEASURES, edge_measures, edge_shift

    edge = 8333.0
    energy = np.concatenate([np.arange(8178.0, 8328, 15), np.arange(8328.0, 8371), np.arange(8390.0, 8571, 20)])
    mean = 300 - 0.05 * (energy - edge) + 250 * ni_xanes(energy)
    rng = np.random.default_rng(0)
    spectra = (mean[:, None] + 10 * rng.standard_normal((len(energy), 400_000), dtype=np.float32)).astype(np.float32)
    variance = np.full(len(energy), 100.0, np.float32)
    pre, post = energy <= edge - 20, energy >= edge + 60

    def loop(count):
        for y in spectra[:, :count].T:
            low, high = (
                np.polyval(np.polyfit(energy[pre], y[pre], 1), energy),
                np.polyval(np.polyfit(energy[post], y[post], 1), energy),
            )
            norm = (y - low) / (high - low)
            k = int(np.argmax(norm >= 0.5))
            energy[k - 1] + (0.5 - norm[k - 1]) / (norm[k] - norm[k - 1]) * (energy[k] - energy[k - 1])

    linear, others = edge_shift(energy, mean, edge), edge_measures(energy, mean, edge)
    jobs = {
        "default shift": (lambda n: linear.measure(spectra[:, :n]), 400_000),
        "default shift with sigma": (lambda n: linear.measure(spectra[:, :n], variance=variance), 400_000),
        **{m: (lambda n, m=m: others.measure([m], spectra[:, :n], variance=variance), 20_000) for m in MEASURES},
        "numpy loop": (loop, 1_000),
    }
    try:
        from larch.xafs.pre_edge import find_e0, preedge
    except ImportError:
        print("Larch is not installed: left out", file=sys.stderr)
    else:
        jobs["Larch loop"] = (
            lambda n: [(preedge(energy, y, e0=edge), find_e0(energy, y)) for y in spectra[:, :n].T.astype(float)],
            200,
        )
    rates = {name: [] for name in jobs}
    for turn in range(6):
        for name, (job, count) in jobs.items():
            start = time.perf_counter()
            job(count)
            if turn:  # the first one warms up
                rates[name].append(count / (time.perf_counter() - start))
    median = {name: float(np.median(v)) for name, v in rates.items()}
    if as_json:
        print(json.dumps(median))
        return 0
    print(f"spectra of {len(energy)} energies per second, {len(spectra[0]):,} of them")
    for name, rate in median.items():
        print(f"  {name:28s} {rate:14,.0f}   {rate / median['numpy loop']:10,.1f} x numpy loop")
    return 0


def recorded(energy, mean, theta, rows, columns):
    """Return the energies of a cylinder, as counts in memory, each with its own magnification and motion."""
    from napari_xanes_tomo.counts import own_beam
    from napari_xanes_tomo.maps import AlignedEnergy
    from napari_xanes_tomo.model import Alignment, ArrayFrames, EnergyScan, FlatSet

    rng = np.random.default_rng(0)
    x = np.arange(columns) - (columns - 1) / 2
    flats = FlatSet(ArrayFrames(np.full((4, rows, columns), 9000, np.uint16)), np.ones(4), ("ok",) * 4)
    items = []
    for e, mu in zip(energy, mean, strict=True):
        shift, m = rng.uniform(-3, 3, (len(theta), 2)), energy[-1] / e
        across = (x - shift[:, 1:]) / m
        chord = 2 * np.sqrt(np.maximum(0, (0.3 * columns) ** 2 - across**2))
        clean = np.repeat(9000 * np.exp(-chord * mu * 2e-6)[:, None], rows, axis=1)
        scan = EnergyScan(
            float(e), theta, ArrayFrames(rng.poisson(clean).astype(np.uint16)), np.ones(len(theta)),
            ("ok",) * len(theta), (flats,), np.zeros(len(theta), int), 1, 20.0, np.zeros(len(theta)),
        )  # fmt: skip
        still = Alignment(shift, np.zeros_like(shift), m)
        items.append(AlignedEnergy(scan, still, np.zeros((len(theta), 3)), beam=own_beam(scan)))
    return items


def in_turns(jobs, turns=4):
    """Return {name: what the job made} and {name: median of its seconds}; the first turn warms up."""
    import time

    seconds, made = {name: [] for name in jobs}, {}
    for turn in range(turns):
        for name, job in jobs.items():
            start = time.perf_counter()
            made[name] = job()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return made, {name: float(np.median(v)) for name, v in seconds.items()}


def shortcut(as_json: bool = False, *, columns: int = 1024, rows: int = 16) -> int:
    """Print how components compare with volumes of all energies."""
    from napari_xanes_tomo.chemistry import finish_slab
    from napari_xanes_tomo.edges import mass_attenuation
    from napari_xanes_tomo.map_plan import plan_maps
    from napari_xanes_tomo.maps import component_sinograms, placed_rows
    from napari_xanes_tomo.phantom import ni_xanes
    from napari_xanes_tomo.recipe import MapsParameters
    from napari_xanes_tomo.reconstruction import angular_weights, fbp

    if columns < 64 or rows < 8:
        print(f"chemistry: expected at least 64 columns and 8 rows, got {columns} and {rows}", file=sys.stderr)
        return 2
    edge = 8333.0
    pairs, low = [6534.0, 6558.0, 7704.0, 7728.0], np.arange(8178.0, 8328, 15)
    energy = np.concatenate([pairs, low, np.arange(8328.0, 8371), np.arange(8390.0, 8571, 20)])
    others = sum(r * mass_attenuation(e, energy) for e, r in {"Mn": 0.8, "Co": 0.5}.items())
    mean = others + 12 + 1.4 * (40 - 0.015 * (energy - edge) + 280 * ni_xanes(energy))
    p = MapsParameters()
    plan = plan_maps(energy, mean, np.ones(len(energy)), len(energy) - 1, p)
    theta = np.arange(-90.0, 90.0)
    items = recorded(energy, mean, theta, rows, columns)
    weights, unit = np.array(list(plan.components.values()), dtype=np.float32), np.ones(len(theta))
    share = angular_weights(theta).astype(np.float32)[:, None, None]

    def solve(lines):
        return fbp(lines, theta, weights=unit)

    lines = np.stack([placed_rows(i, (0, rows), (rows, columns)) * share for i in items])

    def combined():
        out = np.empty((len(weights), *lines.shape[1:]), np.float32)
        for y in range(rows):
            out[:, :, y] = np.tensordot(weights.astype(float), lines[:, :, y], axes=(1, 0))
        return out

    def sum_of(volumes):
        total = np.zeros((len(weights), rows, columns, columns))
        for w, volume in zip(weights.T, volumes, strict=True):
            for c in np.flatnonzero(w):
                total[c] += w[c] * volume
        return total.astype(np.float32)

    def maps(volumes):
        seen = np.ones(volumes.shape[1:], np.float32)
        scaled = dict(zip(plan.components, volumes * np.float32(1e7 / 20.0), strict=True))
        return finish_slab(plan, scaled, seen, seen, slice(0, rows), p)

    made, alone = in_turns({
        "components": lambda: np.stack([solve(c) for c in combined()]),
        "volumes": lambda: sum_of(solve(x) for x in lines),
    })  # fmt: skip
    c = np.arange(columns) - (columns - 1) / 2
    seen = np.hypot(c[:, None], c) < columns / 2  # by every angle
    size = np.abs(made["volumes"]).max(axis=(1, 2, 3))
    apart = np.abs(made["components"] - made["volumes"]) / size[:, None, None, None]
    off, corners = float(apart[..., seen].max()), float(apart.max())
    del made, apart
    whole, ends = in_turns({
        "components": lambda: maps(np.stack([
            solve(c) for c in component_sinograms(items, plan, (0, rows))[0]
        ])),
        "volumes": lambda: maps(sum_of(solve(placed_rows(i, (0, rows), (rows, columns)) * share) for i in items)),
    })  # fmt: skip
    body = whole["volumes"]["mask"] > 0.5
    found = {n: np.stack([whole[k][n][body] for k in ("components", "volumes")]) for n in (*plan.elements, SHIFT)}
    differ = max(float(np.abs(np.diff(found[n], axis=0)).max() / np.abs(found[n]).max()) for n in plan.elements)
    edge_ev = float(np.abs(np.diff(found[SHIFT], axis=0)).max())
    ratio, end_to_end = (t["volumes"] / t["components"] for t in (alone, ends))
    if as_json:
        print(json.dumps({
            "energies": len(energy), "components": len(weights), "columns": columns, "rows": rows, "difference": off,
            "difference_with_corners": corners, "ratio": ratio, "elements_difference": differ,
            "edge_difference_ev": edge_ev, "end_to_end": end_to_end,
        }))  # fmt: skip
        return 0
    print(f"{len(energy)} energies, {len(weights)} components, {rows} slices of {columns} x {columns}, 180 angles")
    print(f"  largest difference {off:.1e} of the largest value within the field of all angles, ", end="")
    print(f"{corners:.1e} with the corners;\n  reconstruction: {alone['components']:.2f} s and ", end="")
    print(f"{alone['volumes']:.2f} s, volumes take {ratio:.1f} x the time of components")
    print(f"  counts to maps: {ends['components']:.2f} s and {ends['volumes']:.2f} s, {end_to_end:.1f} x; ", end="")
    print(f"elements differ by up to {differ:.1e} of the largest, the edge energy by up to {edge_ev:.1e} eV")
    return 0


def main(twin: str, out: str, as_json: bool = False) -> int:
    """Print the scores; return the exit code."""
    try:
        scores, whole = judge(Path(twin), Path(out))
    except (XanesTomoError, OSError) as error:
        print(f"chemistry: {error}", file=sys.stderr)
        return 1
    facts, each = read_map_attributes(Path(out) / "maps.ome.zarr")
    stated = {
        "voxel_nm": facts["voxel_nm"], "voxel_px": facts["voxel_px"],
        "smoothing_voxel": max(float(a.get("smoothing_voxel") or 0) for a in each.values()),
        "psf_sigma_voxel": {n: each[n]["psf_sigma_voxel"] for n in scores if "psf_sigma_voxel" in each.get(n, {})},
    }  # fmt: skip
    if as_json:
        print(json.dumps({"maps": scores, "whole": whole, "stated": stated}))
        return 0
    print(f"voxel {stated['voxel_px']} px = {stated['voxel_nm']:.1f} nm, maps smoothed by a Gaussian of sigma ", end="")
    print(f"{stated['smoothing_voxel']:g} voxel, the truth not at all; stated blur, sigma in voxels: ", end="")
    print(", ".join(f"{n} {v:.2f}" for n, v in stated["psf_sigma_voxel"].items()))
    print("Maps against the truth: correlation, slope, bias (% of the mean, eV) without smoothing;")
    print("rms error, typical sigma and its alignment part, rms(error / sigma) against the truth blurred as stated;")
    print("dipole of the surfaces (y, z, x; px) against the blurred, and against the unsmoothed truth")
    for name, row in scores.items():
        line = f"  {name:21s} r {row['r']:6.3f} slope {row['slope']:5.2f} bias {row['bias']:+6.2f}"
        if "z" in row:
            line += f" | rms {row['rms']:7.4f} sigma {row['sigma']:7.4f} ({row['alignment']:7.4f})"
            line += f" error/sigma {row['z']:5.2f} ({row['z_no_bias']:4.2f} w/o bias) > 4: {row['beyond4']:5.2f} %"
        if "dipole" in row:
            line += " | " + " ".join(f"{v:+.3f}" for v in row["dipole"])
            line += " | " + " ".join(f"{v:+.3f}" for v in row["dipole_hard"])
        print(line)
    for what, value in whole.items():
        print(f"  {what:28s} {value:+.3f}")
    return 0


if __name__ == "__main__":
    if "--speed" in sys.argv:
        sys.exit(speed("--json" in sys.argv))
    if "--shortcut" in sys.argv:
        size = {o: int(sys.argv[sys.argv.index(f"--{o}") + 1]) for o in ("columns", "rows") if f"--{o}" in sys.argv}
        sys.exit(shortcut("--json" in sys.argv, **size))
    arguments = [a for a in sys.argv[1:] if not a.startswith("--")]
    if len(arguments) != 2:
        print(
            "usage: python benchmarks/chemistry.py TWIN OUT [--json] | --speed [--json] | "
            "--shortcut [--columns N] [--rows N] [--json]",
            file=sys.stderr,
        )
        sys.exit(2)
    sys.exit(main(*arguments, as_json="--json" in sys.argv))
