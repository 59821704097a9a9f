"""``maps.ome.zarr``: named volumes in one OME-Zarr (NGFF 0.5) store, written slab by slab.

The maps grow in a folder ``maps.ome.zarr.partial-<key>`` beside the final one. The key stands for everything the
maps depend on (recipe, inputs, shape, names, units). After the data of a slab are on disk, an empty file
``.progress/<key>/<slab>`` says so; a killed run goes on after the last of them. When every slab is there, the coarser
levels and the metadata are written and the folder is renamed in one step. Former maps of another key become
``maps-<n>.ome.zarr``, partial ones of another key stay: nothing computed is removed here, and both are taken up again
when their key comes back.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from napari_xanes_tomo.model import Maps, XanesTomoError
from napari_xanes_tomo.recipe import parameter_key

from .atomic import sync_folder, writing
from .journal import plain_json

if TYPE_CHECKING:
    import zarr

__all__ = ["MapSpec", "MapStore", "begun_slabs", "bring_back", "read_map_attributes", "read_map_levels", "read_maps"]

AXES = ("y", "z", "x")
COARSEST = 256  # no coarser level is made of a volume that is at most this long
FORMAT = 1
ATTRIBUTES = "xanes_tomo"


@dataclass(frozen=True)
class MapSpec:
    """A map to be written: its name and what a reader must know about it.

    Attributes
    ----------
    name : str
        Name of its group: letters, digits, underscores.
    unit : str
        Unit of the values, e.g. ``g/cm3``, ``eV``; empty for a plain number.
    description : str
        One line.
    smoothing_voxel : float
        Sigma of the Gaussian applied, voxels.
    attributes : mapping
        Further JSON data for the group, e.g. the systematic error terms as numbers.
    """

    name: str
    unit: str = ""
    description: str = ""
    smoothing_voxel: float = 0.0
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_]*", self.name):
            raise ValueError(f"name of a map: expected letters, digits and underscores, got {self.name!r}")


class MapStore:
    """The maps of one run while they are made: picklable, nothing stays open between two calls.

    Several processes may write different slabs; one creates and finishes.

    Parameters
    ----------
    path : str or Path
        The final folder, ``OUT/maps.ome.zarr``.
    shape : (int, int, int)
        (y, z, x) of every map, voxels.
    voxel_nm : float
        Edge of a voxel, nm.
    maps : sequence of MapSpec
        The maps to be written.
    slab_rows : int
        Rows (y) of a slab, which is also the chunk along y.
    key : str
        Identifies recipe and inputs: what is on disk under another key is not continued.
    """

    def __init__(
        self,
        path: str | Path,
        shape: tuple[int, int, int],
        voxel_nm: float,
        maps: Sequence[MapSpec],
        *,
        slab_rows: int = 16,
        key: str = "",
    ) -> None:
        if min(shape) < 1 or slab_rows < 1:
            raise ValueError(f"expected a shape (y, z, x) and slab rows of at least 1, got {shape} and {slab_rows}")
        if len({m.name for m in maps}) != len(maps) or not maps:
            raise ValueError(f"expected maps of distinct names, got {[m.name for m in maps]}")
        ny, nz, nx = (int(n) for n in shape)
        self.path = Path(path)
        self.shape = (ny, nz, nx)
        self.voxel_nm = float(voxel_nm)
        self.maps = tuple(maps)
        self.slab_rows = min(int(slab_rows), ny)
        self.chunks = (self.slab_rows, min(nz, 256), min(nx, 256))
        self.key = parameter_key(
            FORMAT, key, list(self.shape), self.voxel_nm, self.slab_rows, plain_json([asdict(m) for m in maps], "maps")
        )

    @property
    def partial(self) -> Path:
        """The folder the maps grow in."""
        return self.path.with_name(f"{self.path.name}.partial-{self.key}")

    @property
    def progress(self) -> Path:
        """The folder of the done flags."""
        return self.path.parent / ".progress" / self.key

    @property
    def slabs(self) -> tuple[tuple[int, int], ...]:
        """``(y0, y1)`` of every slab, rows."""
        ny = self.shape[0]
        return tuple((y, min(y + self.slab_rows, ny)) for y in range(0, ny, self.slab_rows))

    @property
    def complete(self) -> bool:
        """Whether the final folder holds these very maps."""
        return _key_of(self.path) == self.key

    def create(self, of: str = "") -> None:
        """Lay out the empty maps, or find them as an interrupted run left them; `of` is kept for `begun_slabs`."""
        if self.complete or ((self.progress / "created").exists() and self.partial.is_dir()):
            return
        if self._archived() is not None:
            return
        import zarr

        with writing(self.path):
            # Without the flag no slab can have been finished: what lies here was killed while being laid out.
            for rest in (self.progress, self.partial):
                if rest.exists():
                    shutil.rmtree(rest)
            self.progress.mkdir(parents=True)
            root = zarr.create_group(self.partial, zarr_format=3)
            for spec in self.maps:
                _create_level(root.create_group(spec.name), 0, self.shape, self.chunks)
            sync_folder(self.partial)
            self._flag("created", f"{len(self.slabs)} {of}")

    def pending(self) -> tuple[tuple[int, int], ...]:
        """``(y0, y1)`` of the slabs still to be made; none when the maps exist already."""
        if self.complete or self._archived() is not None:
            return ()
        try:
            done = {p.name for p in self.progress.iterdir()} if self.partial.is_dir() else set()
        except FileNotFoundError:
            done = set()
        return tuple((y0, y1) for y0, y1 in self.slabs if f"{y0}-{y1}" not in done)

    def write(self, y0: int, data: Mapping[str, npt.NDArray[Any]]) -> None:
        """Write rows ``y0 : y0 + slab_rows`` of every map; they are on disk and flagged when this returns.

        Parameters
        ----------
        y0 : int
            First row of one of `slabs`.
        data : mapping of str to (rows, z, x) array
            All the maps.

        Raises
        ------
        XanesTomoError
            The disk is full or cannot be written; the slab stays pending and nothing else changes.
        """
        rows = dict(self.slabs)
        if y0 not in rows:
            raise ValueError(f"y0: expected a multiple of {self.slab_rows} below {self.shape[0]}, got {y0}")
        y1 = rows[y0]
        expected = {m.name for m in self.maps}
        if set(data) != expected:
            raise ValueError(f"expected the maps {sorted(expected)}, got {sorted(data)}")
        for name, values in data.items():
            if values.shape != (y1 - y0, *self.shape[1:]):
                raise ValueError(f"{name}: expected shape {(y1 - y0, *self.shape[1:])}, got {values.shape}")
        import zarr

        with writing(self.path):
            for name, values in data.items():
                array = zarr.open_array(self.partial / name / "0", mode="r+")
                array[y0:y1] = np.asarray(values, dtype=np.float32)
            for name in data:  # after all are written: the disk is waited for once, not once a map
                _sync(self.partial / name / "0" / "c" / str(y0 // self.slab_rows))
            self._flag(f"{y0}-{y1}")

    def empty(self, name: str) -> bool:
        """Return whether the map `name`, every slab of which is written and which is not finished yet, is 0 or NaN."""
        import zarr

        if not self.partial.is_dir():
            return False
        array = zarr.open_array(self.partial / name / "0", mode="r")
        return not any(np.any(np.nan_to_num(np.asarray(array[y0:y1]))) for y0, y1 in self.slabs)

    def finish(
        self, *, absent: Mapping[str, str] | None = None, attributes: Mapping[str, Mapping[str, Any]] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Path | None:  # fmt: skip
        """Write coarser levels and metadata and put the maps in their final place.

        Called again after an interruption it goes on; called again after it succeeded it does nothing.

        Parameters
        ----------
        absent : mapping of str to str
            Maps that could not be made, with the reason; of those that were written nothing is kept.
        attributes : mapping of str to mapping
            Further JSON data for a map's group, known only now.
        metadata : mapping
            Further JSON data for the whole.

        Returns
        -------
        Path or None
            Where the former maps, of another recipe or input, are kept.
        """
        if self.complete:
            self._tidy()
            return None
        archived = self._archived()
        source = self.partial if archived is None else archived
        with writing(self.path):
            if archived is None:
                missing = self.pending()
                if missing:
                    raise ValueError(f"{len(missing)} of {len(self.slabs)} slabs are still to be written")
                self._describe(absent or {}, attributes or {}, metadata or {})
            kept = None
            if self.path.exists():
                kept = _free_name(self.path)
                self.path.rename(kept)
            source.rename(self.path)
            sync_folder(self.path.parent)
        self._tidy()
        return kept

    def leftovers(self) -> tuple[Path, ...]:
        """Folders with maps of other keys, finished or not: kept until the user removes them."""
        others = [*_archives(self.path), *sorted(self.path.parent.glob(f"{self.path.name}.partial-*"))]
        return tuple(p for p in others if p != self.partial)

    def _describe(
        self, absent: Mapping[str, str], attributes: Mapping[str, Mapping[str, Any]], metadata: Mapping[str, Any]
    ) -> None:
        import zarr

        for rest in self.partial.rglob("*.partial"):  # of a killed write
            rest.unlink()
        root = zarr.open_group(self.partial, mode="r+")
        for name in absent:
            shutil.rmtree(self.partial / name, ignore_errors=True)
        made = [m for m in self.maps if m.name not in absent]
        for spec in made:
            group = root.require_group(spec.name)
            n_levels = _write_levels(group, self.chunks)
            own = {
                "unit": spec.unit,
                "description": spec.description,
                "smoothing_voxel": spec.smoothing_voxel,
                "voxel_nm": self.voxel_nm,
                **spec.attributes,
                **attributes.get(spec.name, {}),
            }
            group.attrs.put(
                {"ome": _ngff(spec.name, self.shape, self.voxel_nm, n_levels), ATTRIBUTES: plain_json(own, spec.name)}
            )
        whole = {
            "format": FORMAT,
            "key": self.key,
            "maps": [m.name for m in made],
            "absent": dict(absent),
            "voxel_nm": self.voxel_nm,
            "axes": list(AXES),
            **metadata,
        }
        root.attrs.put({"ome": {"version": "0.5"}, ATTRIBUTES: plain_json(whole, "metadata")})
        _sync(self.partial)

    def _archived(self) -> Path | None:
        """Return the folder these very maps were moved to when others took their place."""
        return next((p for p in _archives(self.path) if _key_of(p) == self.key), None)

    def _flag(self, name: str, text: str = "") -> None:
        descriptor = os.open(self.progress / name, os.O_WRONLY | os.O_CREAT, 0o644)
        os.write(descriptor, text.encode())
        os.close(descriptor)
        sync_folder(self.progress)

    def _tidy(self) -> None:
        shutil.rmtree(self.progress, ignore_errors=True)
        if self.progress.parent.is_dir() and not any(self.progress.parent.iterdir()):
            self.progress.parent.rmdir()


def begun_slabs(path: Path, of: str) -> tuple[int, int]:
    """Return how many slabs of how many an interrupted run has made of the maps laid out for `of`; (0, 1) of none."""
    for created in path.parent.glob(".progress/*/created"):
        total, _, what = created.read_text(encoding="utf-8").partition(" ")
        if what == of and total.isdigit() and path.with_name(f"{path.name}.partial-{created.parent.name}").is_dir():
            return len(list(created.parent.glob("*-*"))), int(total)
    return 0, 1


def bring_back(path: Path, key: str) -> bool:
    """Make the finished maps of `key` the current ones, whatever took their place; False where they are gone."""
    if _key_of(path) == key:
        return True
    archived = next((p for p in _archives(path) if _key_of(p) == key), None)
    if archived is None:
        return False
    with writing(path):
        if path.exists():
            path.rename(_free_name(path))
        archived.rename(path)
        sync_folder(path.parent)
    return True


def read_maps(path: str | Path) -> Maps:
    """Open finished maps: lazy dask arrays (y, z, x), float32, one chunk a stored one.

    Raises
    ------
    XanesTomoError
        There are none, or the folder was written by something else.
    """
    import dask.array as da

    whole, each = read_map_attributes(path)
    root: Any = _open(Path(path))
    data = {name: da.from_zarr(root[f"{name}/0"]) for name in each}
    units = {name: str(own.get("unit", "")) for name, own in each.items()}
    return Maps(data, units, float(whole["voxel_nm"]), dict(whole["absent"]))


def read_map_levels(path: str | Path, name: str) -> list[Any]:
    """Return one map from fine to coarse, lazy dask arrays (y, z, x), each half as long as the one before."""
    import dask.array as da

    whole, each = read_map_attributes(path)
    if name not in each:
        reason = whole["absent"].get(name, f"the maps are {', '.join(each)}")
        raise XanesTomoError(f"{path}: there is no map {name!r}: {reason}")
    root: Any = _open(Path(path))
    datasets = root[name].attrs["ome"]["multiscales"][0]["datasets"]
    return [da.from_zarr(root[f"{name}/{level['path']}"]) for level in datasets]


def read_map_attributes(path: str | Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return what is said about the whole, and about every map (unit, description, smoothing_voxel, ...)."""
    root: Any = _open(Path(path))
    whole = dict(root.attrs[ATTRIBUTES])
    return whole, {name: dict(root[name].attrs[ATTRIBUTES]) for name in whole["maps"]}


def _open(path: Path) -> zarr.Group:
    import zarr

    try:
        root = zarr.open_group(path, mode="r")
        whole = root.attrs[ATTRIBUTES]
    except (OSError, ValueError, KeyError) as error:
        raise XanesTomoError(f"{path}: expected finished maps of this program, found none") from error
    if not isinstance(whole, dict) or whole.get("format") != FORMAT:
        raise XanesTomoError(f"{path}: the maps were written by a newer version of this program; update it")
    return root


def _key_of(path: Path) -> str:
    try:
        attributes = json.loads((path / "zarr.json").read_bytes())["attributes"]
        return str(attributes[ATTRIBUTES]["key"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _archive_name(path: Path, number: int) -> Path:
    stem, dot, suffix = path.name.partition(".")
    return path.with_name(f"{stem}-{number}{dot}{suffix}")


def _archives(path: Path) -> list[Path]:
    stem, dot, suffix = path.name.partition(".")
    pattern = re.compile(rf"{re.escape(stem)}-(\d+){re.escape(dot + suffix)}")
    if not path.parent.is_dir():
        return []
    found = [(int(m.group(1)), p) for p in path.parent.iterdir() if (m := pattern.fullmatch(p.name))]
    return [p for _, p in sorted(found)]


def _free_name(path: Path) -> Path:
    return next(p for n in itertools.count(1) if not (p := _archive_name(path, n)).exists())


def _create_level(group: zarr.Group, level: int, shape: Sequence[int], chunks: Sequence[int]) -> zarr.Array[Any]:
    from zarr.codecs import BloscCodec

    # NaN where nothing was written: a slab that is missing must not look like an empty sample.
    return group.create_array(
        str(level),
        shape=tuple(shape),
        chunks=tuple(min(c, n) for c, n in zip(chunks, shape, strict=True)),
        dtype="float32",
        fill_value=float("nan"),
        compressors=BloscCodec(cname="lz4", clevel=5, shuffle="shuffle", typesize=4),
        dimension_names=AXES,
        overwrite=True,
    )


def _write_levels(group: zarr.Group, chunks: tuple[int, int, int]) -> int:
    """Write the levels 1, 2, ... of a map by means over 2 x 2 x 2; return how many levels there are."""
    fine: Any = group["0"]
    level = 0
    while max(fine.shape) > COARSEST:
        level += 1
        shape = [(n + 1) // 2 for n in fine.shape]
        coarse: Any = _create_level(group, level, shape, chunks)
        for corner in itertools.product(*(range(0, n, c) for n, c in zip(shape, coarse.chunks, strict=True))):
            ends = [min(a + c, n) for a, c, n in zip(corner, coarse.chunks, shape, strict=True)]
            block = fine[tuple(slice(2 * a, 2 * b) for a, b in zip(corner, ends, strict=True))]
            coarse[tuple(slice(a, b) for a, b in zip(corner, ends, strict=True))] = halve(block)
        fine = coarse
    return level + 1


def halve(block: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return the means over 2 x 2 x 2 voxels of a (y, z, x) block, NaN left out; odd ends have smaller groups."""
    valid = np.isfinite(block)
    total = np.where(valid, block, 0).astype(np.float64)
    count = valid.astype(np.float64)
    for axis, n in enumerate(block.shape):
        starts = np.arange(0, n, 2)
        total = np.add.reduceat(total, starts, axis=axis)
        count = np.add.reduceat(count, starts, axis=axis)
    mean = np.full(total.shape, np.nan, dtype=np.float32)
    np.divide(total, count, out=mean, where=count > 0, casting="same_kind")
    return mean


def _ngff(name: str, shape: Sequence[int], voxel_nm: float, n_levels: int) -> dict[str, Any]:
    datasets = []
    for level in range(n_levels):
        factor = 2**level
        steps: list[dict[str, Any]] = [{"type": "scale", "scale": [voxel_nm * factor] * 3}]
        if level:  # the middle of the first coarse voxel, seen from the middle of the first fine one
            steps.append({"type": "translation", "translation": [voxel_nm * (factor - 1) / 2] * 3})
        datasets.append({"path": str(level), "coordinateTransformations": steps})
    multiscale: dict[str, Any] = {
        "name": name,
        "axes": [{"name": axis, "type": "space", "unit": "nanometer"} for axis in AXES],
        "datasets": datasets,
    }
    if n_levels > 1:
        multiscale["type"] = "mean"
    return {"version": "0.5", "multiscales": [multiscale]}


def _sync(folder: Path) -> None:
    """Bring the files under `folder` to the disk: a done flag must not survive a power failure alone."""
    if not folder.is_dir():  # a slab of nothing but fill values has no file
        return
    for current, _, files in os.walk(folder):
        for name in files:
            descriptor = os.open(Path(current) / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(current))
