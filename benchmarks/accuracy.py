"""Accuracy of a run on a digital twin against its truth: ``python benchmarks/accuracy.py TWIN OUT``.

Jitter error: rms over angles of found - true shift after the best undetermined shift of that energy (y: a constant;
x: cosine and sine, not the constant). Registration error: the same on the common grid, after one undetermined shift
for all energies. The rotation-centre error is the constant in x. Maps are compared where the true density is above
60 % of its typical value, two voxels away from any surface, without smoothing the truth.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from napari_xanes_tomo import XanesTomoError, read_maps
from napari_xanes_tomo.io.store import read_shifts, rows_alignments


def orbit(theta, values, constant):
    """Fit a cos + b sin (+ c) and return the residual and the constant."""
    t = np.deg2rad(theta)
    columns = [np.cos(t), np.sin(t)] + ([np.ones_like(t)] if constant else [])
    basis = np.stack(columns, axis=1)
    fit = np.linalg.lstsq(basis, values, rcond=None)[0]
    return values - basis @ fit, float(fit[2]) if constant else 0.0


def rms(values):
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(values))))


def alignment_errors(twin: Path, out: Path):
    """One row an energy: jitter y, x, centre, registration y, x (px of the raw frame), magnification error."""
    truth = {e: (theta, a) for e, theta, a in rows_alignments(read_shifts(twin / "truth" / "tables" / "shifts.csv"))}
    found = rows_alignments(read_shifts(out / "tables" / "shifts.csv"))
    rows, all_theta, all_y, all_x, parts = [], [], [], [], []
    for energy, theta, a in found:
        true = truth[energy][1]
        ok = np.isfinite(a.shift).all(axis=1)
        if ok.sum() < 8 or not np.isfinite(a.magnification):
            rows.append([energy] + [np.nan] * 8)
            parts.append(None)
            continue
        d = (a.shift - true.shift)[ok]
        t = theta[ok]
        x, _ = orbit(t, d[:, 1], False)
        _, centre = orbit(t, d[:, 1], True)
        jitter_y, jitter_x = rms(d[:, 0] - d[:, 0].mean()), rms(x)
        scale = a.magnification / true.magnification - 1
        z_y, z_x = jitter_y / rms(a.sigma[ok, 0]), rms(orbit(t, d[:, 1], True)[0]) / rms(a.sigma[ok, 1])
        rows.append([energy, jitter_y, jitter_x, centre, np.nan, np.nan, scale, z_y, z_x])
        parts.append((len(rows) - 1, len(t)))
        all_theta.append(t)
        all_y.append(d[:, 0] / true.magnification)
        all_x.append(d[:, 1] / true.magnification)
    if all_theta:
        y = np.concatenate(all_y)
        y -= y.mean()
        x, _ = orbit(np.concatenate(all_theta), np.concatenate(all_x), False)
        start = 0
        for part in filter(None, parts):
            row, n = part
            rows[row][4], rows[row][5] = rms(y[start : start + n]), rms(x[start : start + n])
            start += n
    return np.array(rows)


def global_shift(twin: Path, out: Path):
    """Displacement (y, z, x) of the found object against the true one, voxels: it cannot be known to a run."""
    truth = {e: (theta, a) for e, theta, a in rows_alignments(read_shifts(twin / "truth" / "tables" / "shifts.csv"))}
    y, x, thetas = [], [], []
    for energy, theta, a in rows_alignments(read_shifts(out / "tables" / "shifts.csv")):
        true = truth[energy][1]
        ok = np.isfinite(a.shift).all(axis=1) & np.isfinite(a.magnification)
        y.append((a.shift - true.shift)[ok, 0] / true.magnification)
        x.append((a.shift - true.shift)[ok, 1] / true.magnification)
        thetas.append(theta[ok])
    t = np.deg2rad(np.concatenate(thetas))
    fit = np.linalg.lstsq(np.stack([np.cos(t), np.sin(t)], axis=1), np.concatenate(x), rcond=None)[0]
    return -np.array([np.concatenate(y).mean(), fit[1], fit[0]])


def block_mean(volume, px: int):
    """Return the means over px x px x px voxels; ends that do not fill a block are left out."""
    n = [size // px for size in volume.shape]
    return volume[tuple(slice(k * px) for k in n)].reshape(n[0], px, n[1], px, n[2], px).mean(axis=(1, 3, 5))


def map_errors(twin: Path, out: Path):
    """{map: (correlation, slope, bias of the mean in %)} inside the particle."""
    from scipy.ndimage import binary_erosion, shift

    truth = read_maps(twin / "truth" / "maps.ome.zarr").data
    found = read_maps(out / "maps.ome.zarr").data
    density = np.asarray(truth["density"])
    typical = np.percentile(density[density > 0.2 * density.max()], 75)
    inside = binary_erosion(density > 0.6 * typical, iterations=2)
    offset = global_shift(twin, out)
    px = round(density.shape[1] / found["mask"].shape[1])  # raw pixels in a voxel of the maps

    def coarse(volume):
        return block_mean(np.asarray(volume, dtype=np.float64), px) if px > 1 else np.asarray(volume)

    inside, density = coarse(inside) == 1, coarse(density)
    result = {}
    for name in ("Mn", "Co", "Ni", "density", "edge_energy_relative"):
        if name not in found:
            continue
        there = np.asarray(found[name])
        moved = shift(np.nan_to_num(there), -offset / px, order=3)
        moved[shift(np.isnan(there).astype(np.float32), -offset / px, order=1) > 0.01] = np.nan
        true = coarse(truth[name])
        a, b = true[inside], moved[inside]
        body = {"inside": (a, b)}
        if name != "edge_energy_relative":
            # The correlation of a density also sees pores and surfaces: everything in the particle's hull.
            hull = binary_erosion(density > 0.02 * typical, iterations=1)
            body["hull"] = (true[hull], moved[hull])
        for where, (p, q) in body.items():
            good = np.isfinite(q)
            slope = np.cov(p[good], q[good])[0, 1] / np.var(p[good])
            bias = q[good].mean() / p[good].mean() - 1 if name != "edge_energy_relative" else np.nan
            result[name, where] = (np.corrcoef(p[good], q[good])[0, 1], slope, 100 * bias, good.mean())
    return result, offset


def main(twin: str, out: str, as_json: bool = False) -> int:
    """Print the errors; return the exit code."""
    try:
        rows = alignment_errors(Path(twin), Path(out))
        maps, offset = map_errors(Path(twin), Path(out)) if (Path(out) / "maps.ome.zarr").exists() else ({}, None)
    except (XanesTomoError, OSError) as error:
        print(f"accuracy: {error}", file=sys.stderr)
        return 1
    if as_json:
        print(json.dumps({"energies": rows.tolist(), "maps": {" ".join(k): v for k, v in maps.items()}}))
        return 0
    print("Accuracy against the truth of the twin (px of a raw frame, rms over angles)")
    print("  energy   jitter y      x   centre x   registration y      x   magnification   error/sigma y    x")
    for e, jy, jx, c, ry, rx, m, zy, zx in rows:
        print(f"{e:8.1f}   {jy:8.4f} {jx:6.4f}   {c:+8.4f}   {ry:14.4f} {rx:6.4f}   {m:+13.1e}", end="")
        print(f"   {zy:13.2f} {zx:4.2f}")
    jy, jx, c, ry, rx, m = np.nanmax(np.abs(rows[:, 1:7]), axis=0)
    print(f"   worst   {jy:8.4f} {jx:6.4f}   {c:8.4f}   {ry:14.4f} {rx:6.4f}   {m:13.1e}")
    if maps:
        print(f"Undetermined shift of the whole, taken out (y, z, x): {np.round(offset, 3)} voxels")
        print("Maps against the unsmoothed truth: density above 60 %, two pixels inside / the whole particle")
        for (name, where), (r, slope, bias, part) in maps.items():
            extra = "" if np.isnan(bias) else f"   mean {bias:+5.1f} %"
            print(f"  {name:22s} {where:7s} r {r:5.3f}   slope {slope:5.2f}{extra}   defined {100 * part:5.1f} %")
    return 0


if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if a != "--json"]
    if len(arguments) != 2:
        print("usage: python benchmarks/accuracy.py TWIN OUT [--json]", file=sys.stderr)
        sys.exit(2)
    sys.exit(main(*arguments, as_json="--json" in sys.argv))
