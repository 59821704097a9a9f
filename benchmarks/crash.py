"""Kill -9 a run again and again, then let it finish: everything must be as if nothing had happened.

    python benchmarks/crash.py [--preset demo] [--kills 25] [--seed 0] [--twin DIR] [--work DIR]

A run of the digital twin is started and killed at random moments - at a random time, while the journal grows, while a
slab or a table is being written - and started again with the same command. After two fifths of the kills it may come
to the maps, where it is killed for the rest of them, a slab at a time; then it may finish. Its tables must be byte for
byte those of an undisturbed run, the arrays of its maps equal, and the files of every slab that was flagged as done at
a kill must be the very same files (inode and time) at the end.
Exit code 1 where that is not so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from napari_xanes_tomo.io.journal import Journal
from napari_xanes_tomo.io.store import read_maps

COMMAND = [sys.executable, "-m", "napari_xanes_tomo.cli"]
ALIGNING = ("time", "journal", "table")
MAPPING = ("time", "slab", "slab", "after a slab")
Files = dict[tuple[str, str], tuple[int, int]]


def start(twin: Path, out: Path, *options: str) -> subprocess.Popen[bytes]:
    """Start the command."""
    command = [*COMMAND, "run", str(twin), "--out", str(out), *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def flagged(out: Path) -> Files:
    """Return the files of the slabs that are flagged as done: {(map, chunk): (inode, time)}."""
    try:
        return _flagged(out)
    except FileNotFoundError:  # the maps were put in their final place meanwhile
        return {}


def _writing(out: Path) -> bool:
    try:
        return any(True for _ in out.glob("maps.ome.zarr.partial-*/*/0/c/**/*.partial"))
    except FileNotFoundError:
        return False


def _flagged(out: Path) -> Files:
    found: Files = {}
    for folder in out.glob("maps.ome.zarr.partial-*"):
        progress = out / ".progress" / folder.name.rpartition("-")[2]
        flags = [p.name for p in progress.glob("*-*")] if progress.is_dir() else []
        starts = sorted(int(f.split("-")[0]) for f in flags)
        rows = max((int(b) - int(a) for a, b in (f.split("-") for f in flags)), default=1)
        for y0 in starts:
            for path in folder.glob(f"*/0/c/{y0 // rows}/*/*"):
                if path.name.endswith(".partial"):  # of a write that was killed before
                    continue
                stat = path.stat()
                found[(path.relative_to(folder).parts[0], str(path.relative_to(folder)))] = (
                    stat.st_ino,
                    stat.st_mtime_ns,
                )
    return found


def at_work(process: subprocess.Popen[bytes], out: Path) -> bool:
    """Whether the process has taken the output folder: the seconds it needs to start touch nothing."""
    try:
        return bool(json.loads((out / ".lock").read_text())["pid"] == process.pid)
    except (OSError, ValueError, KeyError):
        return False


def wait_for(
    moment: str, process: subprocess.Popen[bytes], out: Path, seconds: float, patience: float, *, events: int = 1
) -> bool:
    """Wait until the moment has come; False where the run ended, or it did not come within `patience`.

    Time counts from when the process has the folder; `events` is how often the journal is to grow.
    """
    journal = out / "journal.jsonl"
    size = journal.stat().st_size if journal.exists() else 0
    done = len(flagged(out))
    begun: float | None = None
    while process.poll() is None:
        if begun is None and at_work(process, out):
            begun = time.monotonic()
        past = 0.0 if begun is None else time.monotonic() - begun
        if moment == "time" or past > patience:
            if past > min(seconds, patience):
                return True
        elif moment == "journal":
            now = journal.stat().st_size if journal.exists() else 0
            if now > size:
                size, events = now, events - 1
                if events <= 0:
                    return True
        elif moment == "slab":
            if _writing(out):
                return True
        elif moment == "after a slab":
            if len(flagged(out)) > done:
                return True
        elif any(True for _ in (out / "tables").glob(".*.tmp")):
            return True
        time.sleep(0.0005 if moment != "time" else 0.01)
    return False


def disturbed(
    twin: Path,
    out: Path,
    kills: int,
    moments: Sequence[str],
    rng: random.Random,
    typical: float,
    *options: str,
    say: bool = True,
) -> tuple[int, Files]:
    """Run with kills; return how many there were and the files of every slab that was flagged at one of them."""
    kept: Files = {}
    for done in range(kills):
        moment = rng.choice(moments)
        process = start(twin, out, *options)
        came = wait_for(moment, process, out, rng.uniform(0.2, typical), 2 * typical, events=rng.randint(1, 6))
        if moment == "journal" and came:
            time.sleep(rng.uniform(0, 0.004))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not came:
            return done, kept  # it got to its end
        for key, value in flagged(out).items():
            kept.setdefault(key, value)
        if say:
            events = len(Journal(out)) if (out / "journal.jsonl").exists() else 0
            slabs = len({chunk.split("/")[3] for _, chunk in kept})
            print(f"  kill {done + 1:2d} at {moment:12s} {events:3d} events, {slabs} slabs flagged", flush=True)
    return kills, kept


def finish(twin: Path, out: Path, *options: str) -> None:
    """Give the command and wait for its end."""
    process = start(twin, out, *options)
    if process.wait() != 0:
        raise SystemExit(f"the run in {out} failed with exit code {process.returncode}")


def differences(out: Path, whole: Path, kept: Files) -> list[str]:
    """Return what is not as it should be."""
    bad = []
    for table in ("shifts", "energies", "quality"):
        name = f"tables/{table}.csv"
        if (out / name).read_bytes() != (whole / name).read_bytes():
            bad.append(f"{name} differs")
    one, other = (read_maps(o / "maps.ome.zarr").data for o in (out, whole))
    if set(one) != set(other):
        bad.append(f"maps differ: {sorted(set(one) ^ set(other))}")
    bad += [
        f"map {name} differs"
        for name in sorted(set(one) & set(other))
        if np.asarray(one[name]).tobytes() != np.asarray(other[name]).tobytes()
    ]
    for (_, chunk), was in kept.items():
        stat = (out / "maps.ome.zarr" / chunk).stat()
        if (stat.st_ino, stat.st_mtime_ns) != was:
            bad.append(f"{chunk} of a flagged slab was written again")
    keys = Counter(
        (e.payload["step"], e.payload["energy"], e.payload["parameter_key"], e.payload["input_key"])
        for e in Journal(out).events
        if e.kind == "candidate"
    )
    bad += [f"{k[:2]} was done {n} times" for k, n in keys.items() if n > 1]
    return bad


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo", choices=("tiny", "demo"))
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--twin", type=Path, help="a twin that is there already")
    parser.add_argument("--work", type=Path, help="folder for the outputs")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        twin = options.twin or work / "twin"
        if options.twin is None:
            subprocess.run([*COMMAND, "demo", str(twin), "--preset", options.preset], check=True)
        begun = time.monotonic()
        finish(twin, work / "whole")
        seconds = time.monotonic() - begun
        print(f"undisturbed run: {seconds:.0f} s", flush=True)
        bad: list[str] = []
        left, number, chunks = options.kills, 0, 0
        while left > 0:
            number += 1
            out = work / f"run-{number}"
            print(f"run {number}:", flush=True)
            first = (2 * left) // 5
            done, _ = disturbed(twin, out, first, ALIGNING, rng, max(2.0, 0.6 * seconds / max(first, 1)))
            finish(twin, out, "--until", "registration")
            # One thread, so that slabs are finished one after the other.
            more, kept = disturbed(twin, out, left - done, MAPPING, rng, max(3.0, 0.1 * seconds), "--threads", "1")
            finish(twin, out)
            found = differences(out, work / "whole", kept)
            print(
                f"  finished; {len(kept)} chunks of flagged slabs looked at; {'; '.join(found) or 'the same'}",
                flush=True,
            )
            bad += found
            chunks += len(kept)
            left -= done + more
        print(f"{options.kills} kills, {chunks} chunks of flagged slabs: {len(bad)} differences")
    return 1 if bad else 0


if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    sys.exit(main())
