"""How fast frames and whole scans are read: against plain positioned reads, olefile, and an array in memory.

    XANES_TOMO_DATA=folder python benchmarks/reading.py [--rounds 30] [--part frames|scan|viewer ...]

``frames``: single frames. ``scan``: 13,400 files of one measurement (67 energies, 180 projections and 20 flats each;
sparse, 3 GB are allocated): all headers verified, rows of the frames of an energy. ``viewer``: the same scan in napari
(a display is needed; ``xvfb-run`` is one): time to the first frame, and a step of the angle slider.

Everything is measured in one process, in turns, on files in the page cache; what is printed are medians of the
ratios of one round, and seconds where seconds are wanted. Real frames and the real script are used where
``XANES_TOMO_DATA`` names their folder, else files of the same layout that the package writes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import olefile

from napari_xanes_tomo.io import layout, xrm
from napari_xanes_tomo.io.scan import open_series
from napari_xanes_tomo.io.script import parse_script
from napari_xanes_tomo.io.xrm import XrmFrames, read_header, write_xrm

FRAME = (1024, 1024)
PARTS = ("frames", "scan", "viewer")


class Row(NamedTuple):
    """One line of the table at the end."""

    what: str
    ratio: float
    wanted: str
    met: bool
    note: str = ""


def seconds(work: Callable[[], Any]) -> float:
    """Time one call."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def ratios(rounds: int, first: Callable[[int], Any], second: Callable[[int], Any]) -> tuple[float, float, float]:
    """Time two pieces of work in turns; return the median of the ratios first / second, and both medians, s."""
    a, b = np.empty(rounds), np.empty(rounds)
    for i in range(rounds):
        for which in (0, 1) if i % 2 else (1, 0):
            if which:
                b[i] = seconds(lambda i=i: second(i))
            else:
                a[i] = seconds(lambda i=i: first(i))
    return float(np.median(a / b)), float(np.median(a)), float(np.median(b))


# ------------------------------------------------------------------------------------------------ single frames


def twins(folder: Path, n: int, version: float, measured: Path | None) -> list[Path]:
    """Frames of a version with the whole tree of streams that instruments write; real ones where there are any."""
    if version == 4 and measured is not None:
        real = sorted((measured / "ssrl_xanes").glob("rep01_*.xrm"))
        if real:
            return real
    rng = np.random.default_rng(int(version))
    template = None
    if version == 5 and measured is not None:
        cut = sorted((measured / "ssrl_xanes").glob("rep02_*.xrm"))
        template = cut[0].read_bytes()[:184_320] if cut else None
    paths = [folder / f"v{version:g}_{i:03d}.xrm" for i in range(n)]
    for i, path in enumerate(paths):
        image = rng.integers(0, 3000, FRAME).astype("<u2")
        if template is None:
            write_xrm(path, image, theta_deg=i, version=version, machine_streams=True)
        else:
            path.write_bytes(template + image.tobytes())
        read_header(path)
    return paths


def plain_read(path: Path, offset: int, out: np.ndarray) -> None:
    """One positioned read into an array that is there already."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if os.preadv(descriptor, [memoryview(out).cast("B")], offset) != out.nbytes:
            raise RuntimeError(f"{path.name} is short")
    finally:
        os.close(descriptor)


def with_olefile(path: Path, out: np.ndarray) -> None:
    """Read the same frame and its metadata with olefile, as a careful reader would."""
    ole = olefile.OleFileIO(path)
    try:
        for name in ("Angles", "Energy", "ExpTimes", "ImageWidth", "ImageHeight", "DataType"):
            ole.openstream(f"ImageInfo/{name}").read()
        out[:] = np.frombuffer(ole.openstream("ImageData1/Image1").read(), out.dtype).reshape(out.shape)
    finally:
        ole.close()


def frames_one_by_one(folder: Path, rounds: int, measured: Path | None) -> list[Row]:
    """One 2 MiB frame at a time, warm."""
    rows = []
    for version, wanted in ((4.0, 8.0), (5.0, 30.0)):
        paths = twins(folder, 12, version, measured)
        real = paths[0].parent != folder
        kind = f"v{version:g}, {'measured' if real else 'twins'}, {paths[0].stat().st_size:,} bytes"
        header = read_header(paths[0])
        frames = XrmFrames(tuple(map(str, paths)), (1,) * len(paths), header.shape, header.dtype)
        offsets = [read_header(p).images[0][0][0] for p in paths]
        out, other = np.empty(header.shape, header.dtype), np.empty(header.shape, header.dtype)
        n = len(paths)
        for i, path in enumerate(paths):  # all in the page cache, and the two agree
            plain_read(path, offsets[i], other)
            if not np.array_equal(frames.read(i, out), other):
                raise RuntimeError(f"{path.name}: other pixels than a plain read")
        each = rounds * 10

        def ours(i: int, frames: XrmFrames = frames, out: np.ndarray = out, n: int = n) -> None:
            frames.read(i % n, out)

        def plain(i: int, paths: list[Path] = paths, offsets: list[int] = offsets, out: np.ndarray = other) -> None:
            plain_read(paths[i % len(paths)], offsets[i % len(paths)], out)

        def fresh(i: int, frames: XrmFrames = frames, n: int = n) -> None:
            frames.read(i % n)

        def headed(i: int, paths: list[Path] = paths, out: np.ndarray = out) -> None:
            XrmFrames.of(paths[i % len(paths)]).read(0, out)

        def ole(i: int, paths: list[Path] = paths, out: np.ndarray = other) -> None:
            with_olefile(paths[i % len(paths)], out)

        ratio, a, b = ratios(each, ours, plain)
        note = f"{1e3 * a:.3f} ms against {1e3 * b:.3f} ms"
        rows.append(Row(f"frame into an array / plain read ({kind})", ratio, "<= 3", ratio <= 3, note))
        ratio, a, b = ratios(each, fresh, plain)
        note = f"{1e3 * a:.3f} ms against {1e3 * b:.3f} ms"
        rows.append(Row(f"frame into a new array / plain read ({kind})", ratio, "", True, note))
        ratio, a, b = ratios(rounds, ole, headed)
        note = f"{1e3 * a:.2f} ms against {1e3 * b:.3f} ms, header verified and frame read"
        rows.append(Row(f"olefile / header and frame ({kind})", ratio, f">= {wanted:g}", ratio >= wanted, note))
        ratio, a, b = ratios(rounds, ole, ours)
        note = f"{1e3 * a:.2f} ms against {1e3 * b:.3f} ms"
        rows.append(Row(f"olefile / frame known to be there ({kind})", ratio, f">= {wanted:g}", ratio >= wanted, note))
    return rows


# ------------------------------------------------------------------------------------------------ a whole scan


def script_like_the_real_one() -> str:
    """Return a script of 67 energies, flats and projections in two halves of 90 angles."""
    lines = ["setbinning 2", "setexp 0.5"]
    counter = flats = 0
    for k in range(67):
        energy = 8178 + 6 * k
        lines.append(f"sete {energy:.2f}")
        for half in (range(-90, 0), range(90)):
            for shot in range(10):
                lines.append(f"collect rep01_ref_{flats:05d}_scan_{half[0]:08.2f}_Degree_{shot + 1:03d}of010.xrm")
                flats += 1
            for theta in half:
                lines += [
                    f"moveto T {theta}",
                    f"collect rep01_{counter:05d}_scan_{theta:08.2f}_Degree_{energy:08.2f}_eV_001of001.xrm",
                ]
                counter += 1
    return "\r\n".join([*lines, ""])


def whole_scan(folder: Path, measured: Path | None) -> Path:
    """Write all files of a measurement with the whole tree of streams, pixels left out; return the script."""
    real = None if measured is None else next(measured.glob("tomo_00089/*.txt"), None)
    script = folder / (real.name if real is not None else "scan_3DXANES_TOMO-XANES.txt")
    script.write_bytes(script_like_the_real_one().encode() if real is None else real.read_bytes())
    one = folder / "one.tmp"
    command = [sys.executable, "-m", "napari_xanes_tomo.cli", "inspect", str(script)]
    alone = min(seconds(lambda: subprocess.run(command, capture_output=True, check=False)) for _ in range(3))
    print(f"xanes-tomo inspect of the script alone: {alone:.2f} s (wanted: 2)")
    dark = np.zeros(FRAME, "<u2")
    made = 0
    for block in parse_script(script.read_text()):
        for frame in block.frames:
            theta = frame.theta_deg if np.isfinite(frame.theta_deg) else 0.0
            write_xrm(one, dark, theta_deg=theta, exposure_s=0.5, date=1.49e9 + 2 * made, machine_streams=True,
                      acq_file_name=frame.name)  # fmt: skip
            size, pixels = one.stat().st_size, read_header(one).images[0][0][0]
            with one.open("rb") as source, (folder / frame.name).open("wb") as target:
                if pixels > size // 2:
                    raise RuntimeError("the pixels are expected behind the directory")
                target.write(source.read(pixels))
                target.truncate(size)
            made += 1
    one.unlink()
    print(f"{made:,} files written, {'the real script' if real is not None else 'a script of the same shape'}")
    return script


def scan_as_a_whole(script: Path, rounds: int) -> list[Row]:
    """All headers; rows of the frames of one energy."""
    times = []
    for _ in range(max(3, rounds // 6) + 1):
        layout._layouts.clear()
        xrm._places.clear()
        shutil.rmtree(os.environ["XANES_TOMO_CACHE"], ignore_errors=True)
        begun = time.perf_counter()
        series = open_series(script)
        times.append(time.perf_counter() - begun)
    if series.problems:
        raise RuntimeError(series.problems[0].message)
    best, middle = min(times[1:]), float(np.median(times[1:]))
    rows = [Row("headers of 13,400 files verified, s", best, "<= 2", best <= 2, f"best; median {middle:.2f} s")]
    again = min(seconds(lambda: open_series(script)) for _ in range(3))
    rows.append(Row("the same from the cache of headers, s", again, "", True, "best"))

    scan = series.scans[30]
    index = np.arange(180)
    y0, y1 = 500, 532
    out = np.empty((180, y1 - y0, FRAME[1]), np.uint16)
    paths = [Path(p) for p in scan.frames.paths]
    starts = [read_header(p).images[0][0][0] + y0 * FRAME[1] * 2 for p in paths]

    def ours(_: int) -> None:
        scan.frames.read_rows(index, y0, y1, out)

    def plain(_: int) -> None:
        for i, path in enumerate(paths):
            plain_read(path, starts[i], out[i])

    ratio, a, b = ratios(rounds, ours, plain)
    note = f"{1e3 * a:.1f} ms against {1e3 * b:.1f} ms"
    rows.append(Row("32 rows of 180 frames / the bare reads", ratio, "<= 3", ratio <= 3, note))
    return rows


def in_the_viewer(script: Path) -> list[Row]:
    """Time to the first frame, and a step of the slider against one frame broadcast over the scan."""
    import napari
    from qtpy.QtWidgets import QApplication

    viewer = napari.Viewer()
    try:
        viewer.window._qt_window.resize(1200, 900)
        for _ in range(20):
            QApplication.processEvents()

        def drawn() -> None:
            viewer.screenshot(canvas_only=True, flash=False)

        open_series(script)  # warm: what is measured is what the viewer adds
        verified = seconds(lambda: open_series(script))

        def opened() -> None:
            viewer.open(str(script), plugin="napari-xanes-tomo")
            drawn()

        first = seconds(opened) - verified
        rows = [Row("first frame in an open viewer, s", first, "<= 2.5", first <= 2.5, f"beyond {verified:.2f} s")]

        (layer,) = viewer.layers
        frame = np.asarray(layer.data[30, 90])

        def walk(start: int) -> float:
            def step(i: int) -> None:
                viewer.dims.set_current_step(1, i)
                drawn()

            step(start)
            return float(np.median([seconds(lambda i=i: step(i)) for i in range(start + 1, start + 21)]))

        still = viewer.add_image(np.broadcast_to(frame, layer.data.shape), contrast_limits=layer.contrast_limits)
        ratio = []
        for r in range(5):
            pair = {}
            for shown, hidden, name in ((layer, still, "scan"), (still, layer, "memory")):
                shown.visible, hidden.visible = True, False
                pair[name] = walk(25 * r)
            ratio.append(pair["scan"] / pair["memory"])
        value = float(np.median(ratio))
        note = f"last round {1e3 * pair['scan']:.1f} ms against {1e3 * pair['memory']:.1f} ms"
        rows.append(Row("step of the angle slider / array in memory", value, "<= 1.7", value <= 1.7, note))
    finally:
        viewer.close()
    return rows


# ------------------------------------------------------------------------------------------------ the table


def show(rows: list[Row]) -> int:
    """Print the table; return how many lines miss what is wanted."""
    wide = max(len(r.what) for r in rows)
    print(f"{'what':{wide}}  {'median ratio':>12}  {'wanted':>8}")
    for r in rows:
        verdict = "" if r.met else "  MISSED"
        print(f"{r.what:{wide}}  {r.ratio:12.2f}  {r.wanted:>8}  {r.note}{verdict}")
    return sum(not r.met for r in rows)


def main() -> int:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--part", choices=PARTS, nargs="*", default=list(PARTS), help="what is measured; all unless given"
    )
    asked = parser.parse_args()
    named = os.environ.get("XANES_TOMO_DATA")
    measured = Path(named) if named and Path(named).is_dir() else None
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        if "frames" in asked.part:
            rows += frames_one_by_one(Path(folder), asked.rounds, measured)
        os.environ["XANES_TOMO_CACHE"] = str(Path(folder) / "cache")  # the user's is left alone
        if {"scan", "viewer"} & set(asked.part):
            whole = Path(folder) / "scan"
            whole.mkdir()
            script = whole_scan(whole, measured)
            if "scan" in asked.part:
                rows += scan_as_a_whole(script, asked.rounds)
            if "viewer" in asked.part:
                if sys.platform == "linux" and not os.environ.get("DISPLAY"):
                    print("viewer: left out, there is no display (xvfb-run is one)")
                else:
                    rows += in_the_viewer(script)
    return 1 if show(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
