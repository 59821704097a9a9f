"""Damaged XRM files: structure-aware mutations of every kind of file, read as the program reads them.

    python benchmarks/fuzz.py [--mutations 20000] [--seed 0]

Headers, allocation tables, directory entries and the values that say what the pixels are get wrong numbers;
files are cut, extended, and their sectors exchanged. Each is read with `read_header`, `XrmFrames` and
`open_series`. Allowed is the documented error, or a frame that is flagged, or the pixels that a second,
plain reader (below) finds along a chain that is whole, inside the file, without repetition and used by nothing
else. Not allowed: any other exception, more than a second of processor time, more than 4x the file + 8 MiB of memory.
"""

from __future__ import annotations

import argparse
import struct
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from napari_xanes_tomo.io.scan import open_series
from napari_xanes_tomo.io.xrm import XrmError, XrmFrames, read_header, write_xrm
from napari_xanes_tomo.model import XanesTomoError

END, FREE = 0xFFFFFFFE, 0xFFFFFFFF
SECONDS, MEMORY_FACTOR, MEMORY_MORE = 1.0, 4, 8 << 20
VALUES = ("ImageWidth", "ImageHeight", "DataType", "ImagesTaken", "NoOfImages", "MosiacRows", "MosiacColumns", "Angles",
          "Energy", "ExpTimes", "Date", "HorizontalBin", "PixelSize", "Version", "AcqFileName")  # fmt: skip


# ------------------------------------------------------------------------------------------------ files to damage


def templates(folder: Path, *, large: bool = True) -> dict[str, bytes]:
    """Whole files of every kind, by name."""
    rng = np.random.default_rng(5)

    def counts(*shape: int, dtype: str = "u2") -> np.ndarray:
        return rng.integers(1, 250, shape).astype(dtype)

    bad = counts(61, 97, dtype="f4")
    bad[3, 4:7] = [np.nan, np.inf, -np.inf]
    made: dict[str, dict] = {
        "frame": {"frames": counts(61, 97)},
        "mini": {"frames": counts(20, 30), "version": 4.0},
        "stack": {"frames": counts(3, 61, 97), "version": 3.0, "layout": "first"},
        "groups": {"frames": counts(103, 5, 6, dtype="u1"), "n_planned": 110},
        "float": {"frames": bad, "layout": "scattered", "sector": 512},
        "reference": {"frames": counts(2, 61, 97), "reference": counts(61, 97, dtype="f4"), "layout": "scattered"},
        "references": {"frames": counts(40, 60), "reference": counts(3, 40, 60, dtype="f4"), "sector": 512},
        "machine": {"frames": counts(61, 97), "machine_streams": True},
    }
    if large:
        made["difat"] = {"frames": counts(2, 1400, 1400), "sector": 512}
    whole = {}
    for name, options in made.items():
        write_xrm(folder / "whole.xrm", theta_deg=12.5, energy_ev=8353.0, date=1.5e9, **options)
        whole[name] = (folder / "whole.xrm").read_bytes()
    return whole


# ------------------------------------------------------------------------------------------------ a second reader


@dataclass
class Parts:
    """Where the parts of a sound container lie: offsets in the file."""

    sector: int
    fat: list[int]  # offset of every FAT entry
    mini_fat: list[int]
    entries: list[int]  # of the directory
    names: dict[str, int]  # stream -> offset of its entry
    values: dict[str, int]  # stream -> offset of its first byte


def plain(raw: bytes, wanted: str) -> tuple[bytes | None, str]:
    """Return the bytes of the first stream of that name, or the reason why it has none; a plain, slow reader."""
    try:
        return _plain(raw, wanted), ""
    except (ValueError, IndexError, struct.error, RecursionError) as error:
        return None, str(error)


def _words(raw: bytes, offset: int, n: int) -> list[int]:
    return list(struct.unpack_from(f"<{n}I", raw, offset))


def _tables(raw: bytes) -> tuple[int, list[int], list[int], list[int]]:
    """(bytes of a sector, FAT, FAT and DIFAT sectors, directory sectors)."""
    sector = 1 << struct.unpack_from("<H", raw, 30)[0]
    own = [s for s in _words(raw, 76, 109) if s < 0xFFFFFFFC]
    at, n = _words(raw, 68, 2)
    tables = []
    for _ in range(n):
        if at >= 0xFFFFFFFC:
            break
        tables.append(at)
        *more, at = _words(raw, (at + 1) * sector, sector // 4)
        own += [s for s in more if s < 0xFFFFFFFC]
    fat = [word for s in own for word in _words(raw, (s + 1) * sector, sector // 4)]
    return sector, fat, own + tables, _walk(fat, _words(raw, 48, 1)[0], None)


def _walk(table: list[int], start: int, count: int | None) -> list[int]:
    out: list[int] = []
    seen = set()
    while start < 0xFFFFFFFC if count is None else len(out) < count:
        if start in seen:
            raise ValueError("circle")
        if start >= len(table):
            raise ValueError("out of bounds")
        seen.add(start)
        out.append(start)
        start = table[start]
    if count and start != END:
        raise ValueError("chain longer than its length")
    return out


def _entry(raw: bytes, offset: int) -> tuple[str, int, int, int, int, int, int]:
    """(name, type, left, right, child, first sector, bytes)."""
    name, length, kind, _, left, right, child = struct.unpack_from("<64sHBBIII", raw, offset)
    start, size = struct.unpack_from("<IQ", raw, offset + 116)
    return name[: max(length - 2, 0)].decode("utf-16-le", "replace").lower(), kind, left, right, child, start, size


def _plain(raw: bytes, wanted: str) -> bytes:
    sector, fat, tables, directory = _tables(raw)
    where = [(s + 1) * sector + i for s in directory for i in range(0, sector, 128)]
    *_, child, root_start, root_size = _entry(raw, where[0])
    if sector == 512:
        root_size &= 0xFFFFFFFF
    mini_stream = _walk(fat, root_start, -(-root_size // sector))
    first, n = _words(raw, 60, 2)
    mini_sectors = _walk(fat, first, n)
    mini_fat = [word for s in mini_sectors for word in _words(raw, (s + 1) * sector, sector // 4)]
    streams = {}
    todo, seen = [("", child)], set()
    while todo:
        path, at = todo.pop()
        if at == FREE or at in seen or at >= len(where):
            continue
        seen.add(at)
        name, kind, left, right, below, start, size = _entry(raw, where[at])
        todo += [(path, left), (path, right)]
        if kind == 2:
            streams[path + name] = (start, size & 0xFFFFFFFF if sector == 512 else size)
        else:
            todo.append((path + name + "/", below))
    start, size = streams[wanted.lower()]
    mini = size < 4096
    chain = _walk(mini_fat if mini else fat, start, -(-size // (64 if mini else sector)))
    used: Counter[int] = Counter() if mini else Counter([*tables, *directory, *mini_sectors, *mini_stream])
    for path, (other, length) in streams.items():
        if path != wanted.lower() and length and (length < 4096) == mini:
            try:
                used.update(_walk(mini_fat if mini else fat, other, -(-length // (64 if mini else sector))))
            except ValueError:
                continue
    if any(used[s] for s in chain):
        raise ValueError("overlap")
    data = b""
    for s in chain:
        if mini:
            offset = (mini_stream[s * 64 // sector] + 1) * sector + s * 64 % sector
            data += raw[offset : offset + 64]
        else:
            data += raw[(s + 1) * sector : (s + 2) * sector]
    if len(data) < size:
        raise ValueError("short")
    return data[:size]


def parts(raw: bytes) -> Parts:
    """Find the parts of a sound container."""
    sector, _, tables, directory = _tables(raw)
    n_difat = _words(raw, 72, 1)[0]
    fat_sectors = tables[: len(tables) - n_difat]
    words = range(0, sector, 4)
    where = [(s + 1) * sector + i for s in directory for i in range(0, sector, 128)]
    names = {}
    for offset in where:
        name, kind, *_ = _entry(raw, offset)
        if kind:
            names.setdefault(name, offset)
    fat = [word for s in fat_sectors for word in _words(raw, (s + 1) * sector, sector // 4)]
    first, n = _words(raw, 60, 2)
    mini = _walk(fat, first, n)
    mini_stream = _walk(fat, _entry(raw, where[0])[5], None)
    values = {}
    for name in VALUES:
        if name.lower() in names:
            start = _entry(raw, names[name.lower()])[5]
            values[name] = (mini_stream[start * 64 // sector] + 1) * sector + start * 64 % sector
    return Parts(
        sector,
        [(s + 1) * sector + i for s in fat_sectors for i in words],
        [(s + 1) * sector + i for s in mini for i in words],
        where,
        names,
        values,
    )


# ------------------------------------------------------------------------------------------------ damage


def mutate(raw: bytes, where: Parts, rng: np.random.Generator) -> bytes:
    """Return the file with one to three things wrong."""
    bad = bytearray(raw)
    for _ in range(rng.integers(1, 4)):
        kind = _KINDS[int(rng.integers(len(_KINDS)))]
        kind(bad, where, rng)
        if len(bad) < 600:
            break
    return bytes(bad)


def _number(bad: bytearray, where: Parts, rng: np.random.Generator) -> int:
    n = len(bad) // where.sector
    usual = [0, 1, 2, n - 2, n - 1, n, n + 1, END, FREE, FREE - 2, FREE - 3, 0x7FFFFFFF, 0x80000000, 4095, 4096, 65535]
    return int(rng.choice(usual)) if rng.random() < 0.6 else int(rng.integers(0, max(n, 1)))


def _put(bad: bytearray, offset: int, value: int, fmt: str = "<I") -> None:
    if offset + struct.calcsize(fmt) <= len(bad):
        struct.pack_into(fmt, bad, offset, value % (1 << 8 * struct.calcsize(fmt)))


def _header(bad: bytearray, where: Parts, rng: np.random.Generator) -> None:
    if rng.random() < 0.3:
        _put(bad, int(rng.choice([0, 8, 24, 26, 28, 30, 32])), int(rng.integers(0, 20)), "<H")
    else:
        _put(bad, int(rng.choice([40, 44, 48, 56, 60, 64, 68, 72, *range(76, 512, 4)])), _number(bad, where, rng))


def _fat(bad: bytearray, where: Parts, rng: np.random.Generator) -> None:
    used = where.fat[: max(len(bad) // where.sector, 1)]
    _put(bad, int(rng.choice(used)), _number(bad, where, rng))


def _mini_fat(bad: bytearray, where: Parts, rng: np.random.Generator) -> None:
    _put(bad, int(rng.choice(where.mini_fat)), _number(bad, where, rng))


def _directory(bad: bytearray, where: Parts, rng: np.random.Generator) -> None:
    named = [o for n, o in where.names.items() if n.startswith("image") or n.lower() in map(str.lower, VALUES)]
    offset = int(rng.choice(named if named and rng.random() < 0.5 else where.entries))
    field = int(rng.choice([0, 2, 64, 66, 67, 68, 72, 76, 116, 120, 124]))
    if field in (0, 2, 64):
        _put(bad, offset + field, int(rng.integers(0, 200)), "<H")
    elif field in (66, 67):
        _put(bad, offset + field, int(rng.integers(0, 8)), "<B")
    elif field in (68, 72, 76):
        value = int(rng.integers(0, len(where.entries) + 2)) if rng.random() < 0.8 else _number(bad, where, rng)
        _put(bad, offset + field, value)
    else:
        _put(bad, offset + field, _number(bad, where, rng))


def _value(bad: bytearray, where: Parts, rng: np.random.Generator) -> None:
    offset = where.values[str(rng.choice(list(where.values)))]
    usual = [0, 1, 2, 3, 5, 10, 11, 12, 100, 101, 0xFFFFFFFF, 0x7FFFFFFF, 0x7FC00000, 0x7F800000, 1 << 20, 0x80000000]
    _put(bad, offset, int(rng.choice(usual)) if rng.random() < 0.8 else int(rng.integers(0, 1 << 32)))


def _cut(bad: bytearray, where: Parts, rng: np.random.Generator) -> None:
    edges = [0, 8, 76, 512, where.sector, where.fat[0], where.entries[0], where.mini_fat[0], len(bad) - where.sector]
    at = int(rng.choice(edges)) + int(rng.integers(-3, 4)) if rng.random() < 0.5 else int(rng.integers(0, len(bad)))
    del bad[max(at, 0) :]


def _grow(bad: bytearray, where: Parts, rng: np.random.Generator) -> None:
    bad += bytes(int(rng.choice([1, where.sector - 1, where.sector, 3 * where.sector])))


def _swap(bad: bytearray, where: Parts, rng: np.random.Generator) -> None:
    n = max(len(bad) // where.sector, 1)
    a, b = (int(i) * where.sector for i in rng.integers(0, n, 2))
    if max(a, b) + where.sector <= len(bad):
        first, second = bad[a : a + where.sector], bad[b : b + where.sector]
        bad[b : b + where.sector] = first
        if rng.random() < 0.5:
            bad[a : a + where.sector] = second


def _bytes(bad: bytearray, where: Parts, rng: np.random.Generator) -> None:
    start = int(rng.choice([0, where.fat[0], where.mini_fat[0], where.entries[0]]))
    at = start + int(rng.integers(0, where.sector - 16))
    bad[at : at + 8] = rng.bytes(8)


_KINDS: tuple[Callable[[bytearray, Parts, np.random.Generator], None], ...] = (
    *(_header, _fat, _fat, _mini_fat, _directory, _directory, _value, _value),
    *(_cut, _grow, _swap, _bytes),
)


# ------------------------------------------------------------------------------------------------ judgement


def judge(path: Path, raw: bytes) -> str:
    """Read one damaged file in every way; return a word for what became of it, or raise what must not be."""
    try:
        header = read_header(path)
    except XrmError as error:
        if "\n" in str(error) or not str(error).startswith(path.name):
            raise AssertionError(f"not one line with the name of the file: {error}") from None
        outcome = error.reason
        try:
            XrmFrames.of(path)
        except XrmError:
            pass
        else:
            raise AssertionError("a refused header gave frames")
    else:
        outcome = "read"
        frames = XrmFrames.of(path)
        for k in {0, len(frames) // 2, len(frames) - 1}:
            pixels = frames.read(k)
            assert pixels.shape == header.shape
            stored, why = plain(raw, f"ImageData{k // 100 + 1}/Image{k + 1}")
            assert stored is not None, f"pixels of image {k + 1} although: {why}"
            assert pixels.tobytes() == stored, f"other pixels of image {k + 1}"
    try:
        series = open_series(path)
    except XanesTomoError as error:
        if "\n" in str(error):
            raise AssertionError("an error of several lines") from None
    else:
        for scan in series.scans:
            for k in np.flatnonzero(scan.usable)[:2]:
                scan.frames.read(int(k))
    return outcome


def main() -> int:
    """Damage files, read them, print what became of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mutations", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    warnings.simplefilter("error")
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    slowest, hungriest = 0.0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        whole = templates(Path(folder))
        known = {name: parts(raw) for name, raw in whole.items()}
        names = [name for name in whole if name != "difat"]
        path = Path(folder) / "bad.xrm"
        tracemalloc.start()
        for number in range(asked.mutations):
            rng = np.random.default_rng([asked.seed, number])
            name = "difat" if number % 200 == 0 else names[number % len(names)]
            raw = mutate(whole[name], known[name], rng)
            path.unlink(missing_ok=True)
            path.write_bytes(raw)
            tracemalloc.reset_peak()
            before, begun = tracemalloc.get_traced_memory()[0], time.process_time()
            try:
                header = read_header(path)
                XrmFrames.of(path).read(header.n_images - 1)
            except XrmError:
                pass
            except Exception as error:  # noqa: BLE001 - that is what is looked for
                failures.append(f"{name} {number}: {type(error).__name__}: {error}")
            seconds = time.process_time() - begun
            memory = tracemalloc.get_traced_memory()[1] - before
            slowest = max(slowest, seconds)
            hungriest = max(hungriest, memory / (MEMORY_FACTOR * len(raw) + MEMORY_MORE))
            if seconds > SECONDS:
                failures.append(f"{name} {number}: {seconds:.2f} s")
            if memory > MEMORY_FACTOR * len(raw) + MEMORY_MORE:
                failures.append(f"{name} {number}: {memory / 1e6:.1f} MB for {len(raw) / 1e6:.2f} MB")
            try:
                outcomes[judge(path, raw)] += 1
            except Exception as error:  # noqa: BLE001 - the same
                failures.append(f"{name} {number}: {type(error).__name__}: {error}")
            if number % 1000 == 999:
                print(f"{number + 1} of {asked.mutations}: {len(failures)} failures", file=sys.stderr, flush=True)
        tracemalloc.stop()
    for line in failures[:20]:
        print("FAILED", line)
    print(f"{asked.mutations} mutations of {len(whole)} kinds of file, seed {asked.seed}: {len(failures)} failures; "
          f"slowest {slowest:.2f} s, largest use of memory {100 * hungriest:.0f} % of what is allowed")  # fmt: skip
    print("  " + ", ".join(f"{reason} {n}" for reason, n in outcomes.most_common()))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
