"""Time and accuracy of the projector and of `fbp` against named peers, in one run.

``python benchmarks/projector.py [--size 1024] [--angles 180] [--rows 16] [--threads 1] [--repeat 5]``

Times are per slice, the best of `repeat` calls. Peers that are not installed are named and left out. Errors:
projections against the analytic, column-averaged sinogram of an ellipse phantom; slices against the pixel-averaged
phantom within 0.95 of the inscribed circle (the number of angles limits this one).
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from napari_xanes_tomo.projector import Projector
from napari_xanes_tomo.reconstruction import fbp

ELLIPSES = [  # value, half axes, centre z, x, tilt; lengths over n
    (1.0, 0.34, 0.27, 0.00, 0.02, 15.0),
    (-0.5, 0.10, 0.07, -0.12, 0.08, 40.0),
    (0.4, 0.05, 0.12, 0.10, -0.10, -20.0),
    (0.8, 0.02, 0.02, 0.15, 0.10, 0.0),
]


def phantom(n: int, theta_deg: np.ndarray, over: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Return ellipses averaged over pixels (z, x) and their sinogram averaged over columns (angle, column)."""
    fine = (np.arange(n * over) + 0.5) / over - n / 2
    image, sino = np.zeros((n, n)), np.zeros((len(theta_deg), n))
    t = np.deg2rad(theta_deg)[:, None]
    for value, a, b, z, x, tilt in ELLIPSES:
        a, b, z, x, tilt = a * n, b * n, z * n, x * n, np.deg2rad(tilt)
        dx, dz = fine[None, :] - x, fine[:, None] - z
        p, q = dx * np.cos(tilt) + dz * np.sin(tilt), -dx * np.sin(tilt) + dz * np.cos(tilt)
        inside = (p / a) ** 2 + (q / b) ** 2 <= 1
        image += value * inside.reshape(n, over, n, over).mean(axis=(1, 3))
        r2 = (a * np.cos(t - tilt)) ** 2 + (b * np.sin(t - tilt)) ** 2
        s = fine[None, :] - x * np.cos(t) - z * np.sin(t)
        line = 2 * a * b / r2 * np.sqrt(np.clip(r2 - s**2, 0, None))
        sino += value * line.reshape(len(theta_deg), n, over).mean(axis=2)
    return image.astype(np.float32), sino.astype(np.float32)


def best(call: Callable[[], Any], repeat: int) -> tuple[float, Any]:
    """Return the shortest time in seconds, and the result; one call before to warm up."""
    result = call()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
    return min(times), result


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """Return the relative L2 difference."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--angles", type=int, default=180)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    a = parser.parse_args()
    n, theta = a.size, -90 + 180 * np.arange(a.angles) / a.angles
    image, sino = phantom(n, theta)
    c = np.arange(n) - (n - 1) / 2
    inside = np.hypot(c[:, None], c) < 0.95 * n / 2
    volume = np.broadcast_to(image, (a.rows, n, n)).copy()
    sinos = np.broadcast_to(sino[:, None], (a.angles, a.rows, n)).copy()
    projector = Projector(n, theta, threads=a.threads)

    def line(name: str, seconds: float, ours: float | None, error: float | None) -> None:
        ratio = "" if ours is None else f"{seconds / ours:8.1f} x ours"
        shown = "" if error is None else f"   error {error:.2e}"
        print(f"{name:<44}{seconds * 1e3:10.2f} ms/slice {ratio}{shown}")

    print(f"{a.rows} slices of {n} x {n}, {a.angles} angles, threads {a.threads}, best of {a.repeat}")
    fp, projected = best(lambda: projector.forward(volume), a.repeat)
    bp, back = best(lambda: projector.adjoint(sinos), a.repeat)
    rec, slices = best(lambda: fbp(sinos, theta, threads=a.threads), a.repeat)
    fp, bp, rec = fp / a.rows, bp / a.rows, rec / a.rows
    mismatch = abs(np.vdot(projected.astype(float), sinos) - np.vdot(volume, back.astype(float)))
    mismatch /= np.linalg.norm(projected.astype(float)) * np.linalg.norm(sinos.astype(float))
    line("ours: forward", fp, None, relative(projected[:, 0], sino))
    line("ours: adjoint", bp, None, None)
    line("ours: forward + adjoint", fp + bp, None, None)
    line("ours: fbp (pad 2)", rec, None, relative(slices[0][inside], image[inside]))
    print(f"{'ours: adjoint mismatch':<44}{mismatch:10.1e}")

    radians = np.deg2rad(theta)

    def peer(name: str, module: str, run: Callable[[Any], None]) -> None:
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            print(f"{name}: left out ({error})")
            return
        run(found)

    def astra(m: Any) -> None:
        geometry = m.create_proj_geom("parallel", 1.0, n, radians)
        ident = m.create_projector("linear", geometry, m.create_vol_geom(n, n))
        operator = m.OpTomo(ident)
        f, p = best(lambda: operator.FP(image), 1)
        b, _ = best(lambda: operator.BP(sino), 1)
        line("astra linear: FP + BP", f + b, fp + bp, relative(np.asarray(p), sino))

    def algotom(m: Any) -> None:
        def run() -> Any:
            return m.fbp_reconstruction(
                sino,
                (n - 1) / 2,
                angles=radians,
                ratio=None,
                ramp_win=None,
                filter_name=None,
                apply_log=False,
                gpu=False,
            )

        t, out = best(run, 1)
        choices = [np.rot90(f, k) for k in range(4) for f in (out, out[::-1])]
        turned = max(choices, key=lambda o: float((o * image).sum()))
        line("algotom: fbp", t, rec, relative(turned[inside], image[inside]))

    def tomopy(m: Any) -> None:
        options = {"center": (n - 1) / 2, "algorithm": "gridrec", "filter_name": "ramp", "ncore": a.threads}
        t, _ = best(lambda: m.recon(sinos, radians, **options), 1)
        line("tomopy: gridrec (no padding)", t / a.rows, rec, None)

    def skimage(m: Any) -> None:
        t, _ = best(lambda: m.radon(image, theta, circle=True), 1)
        line("scikit-image: radon", t, fp, None)
        t, _ = best(lambda: m.iradon(sino.T, theta, circle=True, filter_name="ramp"), 1)
        line("scikit-image: iradon", t, rec, None)

    peer("astra", "astra", astra)
    peer("algotom", "algotom.rec.reconstruction", algotom)
    peer("tomopy", "tomopy", tomopy)
    peer("scikit-image", "skimage.transform", skimage)


if __name__ == "__main__":
    main()
