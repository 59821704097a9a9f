"""The output folder of a run: who may write, which run it belongs to, and where everything lies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from napari_xanes_tomo.model import XanesTomoError
from napari_xanes_tomo.recipe import Recipe

from .atomic import atomic_write, remove_temporaries, writing
from .journal import Event, Journal
from .lock import OutputLock
from .tables import (
    EnergyRow,
    QualityTable,
    ShiftRow,
    read_energies,
    read_quality,
    read_shifts,
    rows_alignments,
    shifts_rows,
    write_energies,
    write_quality,
    write_shifts,
)
from .zarr_maps import MapSpec, MapStore, begun_slabs, bring_back, read_map_attributes, read_map_levels, read_maps

__all__ = [
    "EnergyRow",
    "Event",
    "Journal",
    "MapSpec",
    "MapStore",
    "Output",
    "OutputLock",
    "QualityTable",
    "ShiftRow",
    "begun_slabs",
    "bring_back",
    "open_output",
    "read_energies",
    "read_map_attributes",
    "read_map_levels",
    "read_maps",
    "read_quality",
    "read_shifts",
    "rows_alignments",
    "shifts_rows",
    "write_energies",
    "write_quality",
    "write_shifts",
]

# What file managers and file systems put into an empty folder by themselves.
_NO_CONTENT = {".DS_Store", "Thumbs.db", "desktop.ini", "lost+found", ".lock"}


@dataclass(frozen=True)
class Output:
    """An output folder that is open for writing; close it (or use ``with``) to give it free.

    Attributes
    ----------
    folder : Path
        The folder.
    journal : Journal
        What happened so far.
    lock : OutputLock
        The right to write.
    resumed : bool
        Whether the run was begun before.
    messages : tuple of str
        What the user should be told: a lock taken over, an unfinished last event.
    """

    folder: Path
    journal: Journal
    lock: OutputLock
    resumed: bool = False
    messages: tuple[str, ...] = ()

    @property
    def recipe(self) -> Path:
        """``recipe.yaml``."""
        return self.folder / "recipe.yaml"

    @property
    def shifts(self) -> Path:
        """``tables/shifts.csv``."""
        return self.folder / "tables" / "shifts.csv"

    @property
    def energies(self) -> Path:
        """``tables/energies.csv``."""
        return self.folder / "tables" / "energies.csv"

    @property
    def quality(self) -> Path:
        """``tables/quality.csv``."""
        return self.folder / "tables" / "quality.csv"

    @property
    def maps(self) -> Path:
        """``maps.ome.zarr``."""
        return self.folder / "maps.ome.zarr"

    @property
    def report(self) -> Path:
        """``report.html``."""
        return self.folder / "report.html"

    def change_recipe(self, recipe_text: str) -> None:
        """Make `recipe_text` the recipe of this run: a ``recipe`` event, then ``recipe.yaml``."""
        self.journal.append("recipe", {"recipe": recipe_text})
        atomic_write(self.recipe, recipe_text.encode("utf-8"))

    def close(self) -> None:
        """Give the folder free."""
        self.lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_output(
    out: str | Path,
    recipe_text: str | None,
    input_fingerprint: str | None,
    *,
    input_name: str = "",
    explain: Callable[[Journal], str] | None = None,
) -> Output:
    """Open the folder `out` for a run: a new one, or the same run again.

    Parameters
    ----------
    out : str or Path
        The folder; it is created with its parents.
    recipe_text : str or None
        The recipe as YAML; None goes on with the folder's own.
    input_fingerprint : str or None
        Changes when an input file changes; None goes on with a run whatever its input.
    input_name : str
        What a message calls the input.
    explain : callable, optional
        Asked, when the input has changed, which files of it have; it is given the journal.

    Returns
    -------
    Output
        With the lock held, the ``run`` event and ``recipe.yaml`` in place.

    Raises
    ------
    XanesTomoError
        The folder holds another run or anything else, is in use, or cannot be written. Nothing in it was changed.

    Notes
    -----
    The journal is written first: a folder with files and no journal is somebody else's. Two recipes are the same
    when they give the same parameters, whatever their text and whatever is done about a missed threshold.
    """
    folder = Path(out)
    _refuse_foreign(folder)
    if (recipe_text is None or input_fingerprint is None) and not (folder / "journal.jsonl").exists():
        raise XanesTomoError(f"{folder}: expected a run to go on with, found none; give its input and a recipe")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = OutputLock(folder)
    lock.acquire()
    try:
        _refuse_foreign(folder)
        return _open_locked(folder, lock, recipe_text, input_fingerprint, input_name, explain)
    except BaseException:
        lock.release()
        raise


def _open_locked(
    folder: Path,
    lock: OutputLock,
    recipe_text: str | None,
    input_fingerprint: str | None,
    input_name: str,
    explain: Callable[[Journal], str] | None,
) -> Output:
    journal = Journal(folder)
    messages = [lock.message] if lock.message else []
    if journal.torn:
        # The remnant of a first event begins like one; anything else is no journal of ours.
        if not journal.events and not _begins_event(journal.torn):
            raise XanesTomoError(_foreign(folder, "journal.jsonl"))
        messages.append(f"{journal.path}: the last event was cut short by a crash and is passed over")
    path = folder / "recipe.yaml"
    run = next((e for e in journal.events if e.kind == "run"), None)
    if run is None:
        if journal.events:
            raise XanesTomoError(_foreign(folder, "journal.jsonl"))
        if recipe_text is None or input_fingerprint is None:
            raise XanesTomoError(f"{folder}: expected a run to go on with, found none; give its input and a recipe")
        journal.append("run", {"recipe": recipe_text, "input": input_fingerprint, "input_name": input_name})
        atomic_write(path, recipe_text.encode("utf-8"))
        return Output(folder, journal, lock, False, tuple(messages))

    if input_fingerprint is not None and run.payload.get("input") != input_fingerprint:
        raise XanesTomoError(_other_input(folder, run, input_name, "" if explain is None else explain(journal)))
    current = next(e for e in reversed(journal.events) if e.kind in ("run", "recipe"))
    noted = str(current.payload.get("recipe", ""))
    if recipe_text is not None and not _same_recipe(recipe_text, noted):
        raise XanesTomoError(
            f"{folder}: holds a run with another recipe (see its recipe.yaml); choose another output folder"
        )
    stored = _read(path)
    if stored is not None and not _same_recipe(stored, noted):
        known = [str(e.payload.get("recipe", "")) for e in journal.events if e.kind in ("run", "recipe")]
        if stored not in known:  # else the crash came between a new recipe's event and its file
            raise XanesTomoError(
                f"{path}: was changed by hand since this run began; put it back, or copy it and start in another folder"
            )
        stored = None
    if stored is None:
        atomic_write(path, noted.encode("utf-8"))
    for part in (folder, folder / "tables", folder / "arrays"):
        remove_temporaries(part)
    return Output(folder, journal, lock, True, tuple(messages))


def _other_input(folder: Path, run: Event, name: str, which: str) -> str:
    former = run.payload.get("input_name") or "another input"
    if name and name == former:
        return (
            f"{folder}: the files of {name} have changed since this run began{f' ({which})' if which else ''}; restore "
            "them or choose another output folder"
        )
    return f"{folder}: holds a run of {former}{', not of ' + name if name else ''}; choose another output folder"


def _same_recipe(one: str, other: str) -> bool:
    if one == other:
        return True
    try:
        return Recipe.from_text(one).same_work(Recipe.from_text(other))
    except XanesTomoError:
        return False


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise XanesTomoError(f"{path}: the recipe of this run cannot be read ({error}); restore it") from error


def _begins_event(data: bytes) -> bool:
    start = b'{"seq":1,"time":'
    return data[: len(start)] == start[: len(data)]


def _refuse_foreign(folder: Path) -> None:
    try:
        names = sorted(p.name for p in folder.iterdir())
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise XanesTomoError(f"{folder}: expected an output folder, found a file; choose another name") from None
    except OSError as error:
        raise XanesTomoError(f"{folder}: the output folder cannot be read ({error.strerror})") from error
    if "journal.jsonl" in names:
        return
    others = [n for n in names if n not in _NO_CONTENT and not (n.startswith(".") and n.endswith(".tmp"))]
    if others:
        raise XanesTomoError(_foreign(folder, others[0]))


def _foreign(folder: Path, name: str) -> str:
    return f"{folder}: expected an empty folder or an earlier run, found {name}; choose another output folder"
