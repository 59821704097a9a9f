"""Time and error of `fbp` against algotom's FBP and TomoPy's gridrec, in one run.

``python benchmarks/reconstruction.py [--size 1024] [--angles 180] [--rows 8] [--threads 2] [--repeat 5]``

All get the same projections, filter and threads; calls take turns, times are the median per slice of `repeat` turns
after a warm-up. Error: relative L2 difference from the pixel-averaged ellipses within 0.95 of the inscribed circle,
after the best constant factor (algotom weighs n angles as n - 1). Peers that are not installed are named and left out.

algotom interpolates linearly between columns when it projects back, which multiplies the filter by about ``sinc(f)^2``;
`fbp` does not. `ours, smoothed` has that response too: the same filter in effect.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from napari_xanes_tomo.reconstruction import fbp
from projector import phantom, relative


def main() -> None:
    """Print one table for each filter."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("size", 1024), ("angles", 180), ("rows", 8), ("threads", 2), ("repeat", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    a = parser.parse_args()
    n, theta = a.size, -90 + 180 * np.arange(a.angles) / a.angles
    radians, middle = np.deg2rad(theta), (n - 1) / 2
    image, sino = phantom(n, theta)
    stack = np.repeat(sino[:, None], a.rows, axis=1)
    f = np.arange(n + 1) / (2 * n)
    soft = np.fft.irfft(np.fft.rfft(stack, 2 * n, axis=2) * np.sinc(f) ** 2, axis=2)[:, :, :n].astype(np.float32)
    c = np.arange(n) - middle
    inside = np.hypot(c[:, None], c) < 0.95 * n / 2

    calls = {
        "ours": lambda name: fbp(stack, theta, filter=name, threads=a.threads)[0],
        "ours, smoothed": lambda name: fbp(soft, theta, filter=name, threads=a.threads)[0],
    }
    try:
        import numba
        from algotom.rec.reconstruction import fbp_reconstruction

        numba.set_num_threads(a.threads)
        window = {"ramp": None, "hann": "hann"}
        options = {"angles": radians, "ratio": None, "apply_log": False, "gpu": False, "ncore": a.threads}
        calls["algotom"] = lambda name: fbp_reconstruction(stack, middle, filter_name=window[name], **options)[:, 0]
    except ImportError as error:
        print(f"algotom: left out ({error})")
    try:
        import tomopy

        calls["tomopy gridrec"] = lambda name: tomopy.recon(
            stack, radians, center=middle, sinogram_order=False, algorithm="gridrec", filter_name=name, ncore=a.threads
        )[0]
    except ImportError as error:
        print(f"tomopy: left out ({error})")

    print(f"{a.rows} slices of {n} x {n}, {a.angles} angles, {a.threads} threads, median of {a.repeat}")
    for name in ("ramp", "hann"):
        slices = {who: call(name) for who, call in calls.items()}
        times = {who: [] for who in calls}
        for _ in range(a.repeat):
            for who, call in calls.items():
                start = time.perf_counter()
                call(name)
                times[who].append((time.perf_counter() - start) / a.rows)
        ours = np.median(times["ours"])
        for who, found in slices.items():
            ways = [np.rot90(g, k) for k in range(4) for g in (found, found[::-1])]
            turned = max(ways, key=lambda g: float(np.vdot(g, image)))
            got, true = turned[inside].astype(float), image[inside].astype(float)
            error = relative(got * np.vdot(got, true) / np.vdot(got, got), true)
            took = np.median(times[who])
            print(f"{name:6s}{who:18s}{took * 1e3:9.1f} ms/slice   ours / this {ours / took:6.3f}   error {error:.4f}")


if __name__ == "__main__":
    main()
