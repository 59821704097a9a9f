"""Time, error and noise of `fbp` against algotom's FBP and TomoPy's gridrec, in one run.

``python benchmarks/reconstruction.py [--size 1024] [--angles 180] [--rows 8] [--threads 2] [--repeat 5]``

All get the same projections and threads; calls take turns, times are the median per slice of `repeat` turns after a
warm-up. Error: relative L2 difference from the pixel-averaged ellipses within 0.95 of the inscribed circle, after the
best constant factor (algotom weighs n angles as n - 1). Noise: standard deviation there of a slice of white noise of
standard deviation 1 per projection pixel, times that factor. The second table has so many angles (pi / 2 times the
columns) that no streak is left, and no times. Peers that are not installed are named and left out.

algotom interpolates linearly between columns when it projects back, which multiplies the filter by about ``sinc(f)^2``;
`fbp` does not. `ours, smoothed` has that response too: the same filter in effect.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from napari_xanes_tomo.reconstruction import fbp
from projector import phantom, relative

Calls = dict[tuple[str, str], Callable[[np.ndarray], np.ndarray]]


def solvers(n: int, theta: np.ndarray, threads: int) -> tuple[Calls, list[str]]:
    """Return {(filter, who): what makes slices of projections (angle, y, column)}, and who is not there."""
    f, middle, radians = np.arange(n + 1) / (2 * n), (n - 1) / 2, np.deg2rad(theta)
    calls: Calls = {}
    absent = []

    def soft(stack: np.ndarray) -> np.ndarray:
        return np.fft.irfft(np.fft.rfft(stack, 2 * n, axis=2) * np.sinc(f) ** 2, axis=2)[:, :, :n].astype(np.float32)

    for name in ("ramp", "shepp-logan", "cosine", "hann"):
        calls[name, "ours"] = lambda stack, name=name: fbp(stack, theta, filter=name, threads=threads)
    for name in ("ramp", "hann"):
        calls[name, "ours, smoothed"] = lambda stack, name=name: fbp(soft(stack), theta, filter=name, threads=threads)
    try:
        import numba
        from algotom.rec.reconstruction import fbp_reconstruction

        numba.set_num_threads(threads)
        options = {"angles": radians, "ratio": None, "apply_log": False, "gpu": False, "ncore": threads}
        for name, window in (("ramp", None), ("hann", "hann")):
            calls[name, "algotom"] = lambda stack, window=window: fbp_reconstruction(
                stack, middle, filter_name=window, **options
            ).swapaxes(0, 1)
    except ImportError as error:
        absent.append(f"algotom: left out ({error})")
    try:
        import tomopy

        options_g = {"center": middle, "sinogram_order": False, "algorithm": "gridrec", "ncore": threads}
        for name, known in (("ramp", "ramlak"), ("shepp-logan", "shepp"), ("cosine", "cosine"), ("hann", "hann")):
            calls[name, "tomopy gridrec"] = lambda stack, known=known: tomopy.recon(
                stack, radians, filter_name=known, **options_g
            )
    except ImportError as error:
        absent.append(f"tomopy: left out ({error})")
    return dict(sorted(calls.items(), key=lambda item: list(calls).index((item[0][0], "ours")))), absent


def quality(solve: Callable[[np.ndarray], np.ndarray], image: np.ndarray, sino: np.ndarray) -> tuple[float, float]:
    """Return the error of a slice (however it is turned) and its noise."""
    n = len(image)
    c = np.arange(n) - (n - 1) / 2
    inside = np.hypot(c[:, None], c) < 0.95 * n / 2
    noise = np.random.default_rng(0).standard_normal(sino.shape).astype(np.float32)
    found = solve(sino[:, None])[0]
    ways = [np.rot90(g, k) for k in range(4) for g in (found, found[::-1])]
    turned = max(ways, key=lambda g: float(np.vdot(g, image)))
    got, true = turned[inside].astype(float), image[inside].astype(float)
    scale = np.vdot(got, true) / np.vdot(got, got)
    return relative(got * scale, true), float(np.std(solve(noise[:, None])[0][inside]) * scale)


def main() -> None:
    """Print one table for `angles`, and one for as many as the size asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("size", 1024), ("angles", 180), ("rows", 8), ("threads", 2), ("repeat", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    a = parser.parse_args()
    n = a.size
    theta = -90 + 180 * np.arange(a.angles) / a.angles
    image, sino = phantom(n, theta)
    stack = np.repeat(sino[:, None], a.rows, axis=1)
    calls, absent = solvers(n, theta, a.threads)
    print(
        "\n".join(
            [*absent, f"{a.rows} slices of {n} x {n}, {a.angles} angles, {a.threads} threads, median of {a.repeat}"]
        )
    )
    times = {key: [] for key in calls}
    for turn in range(a.repeat + 1):
        for key, call in calls.items():
            start = time.perf_counter()
            call(stack)
            if turn:  # the first one warms up
                times[key].append((time.perf_counter() - start) / a.rows)
    median = {key: float(np.median(t)) for key, t in times.items()}
    for (name, who), call in calls.items():
        error, noise = quality(call, image, sino)
        took = median[name, who]
        print(
            f"{name:12s}{who:16s}{took * 1e3:9.1f} ms/slice   ours / this {median[name, 'ours'] / took:6.3f}   ", end=""
        )
        print(f"error {error:.4f}   noise {noise:.4f}")
    many = round(np.pi / 2 * n)
    theta = -90 + 180 * np.arange(many) / many
    image, sino = phantom(n, theta)
    print(f"{many} angles")
    for (name, who), call in solvers(n, theta, a.threads)[0].items():
        error, noise = quality(call, image, sino)
        print(f"{name:12s}{who:16s}error {error:.4f}   noise {noise:.4f}")


if __name__ == "__main__":
    main()
