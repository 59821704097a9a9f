"""How fast frames are read: against a plain positioned read, and against olefile.

    XANES_TOMO_DATA=folder python benchmarks/reading.py [--rounds 30]

Everything is measured in one process, in turns, on files in the page cache; what is printed are medians of the
ratios of one round. Real frames are used where ``XANES_TOMO_DATA`` names their folder, else files of the same
layout that the package writes.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import olefile

from napari_xanes_tomo.io.xrm import XrmFrames, read_header, write_xrm

FRAME = (1024, 1024)


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
    asked = parser.parse_args()
    named = os.environ.get("XANES_TOMO_DATA")
    measured = Path(named) if named and Path(named).is_dir() else None
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        rows += frames_one_by_one(Path(folder), asked.rounds, measured)
    return 1 if show(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
