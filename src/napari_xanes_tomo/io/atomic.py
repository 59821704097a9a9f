"""Files that are either the old one or the new one, whatever interrupts the writing."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from napari_xanes_tomo.model import XanesTomoError

__all__ = ["atomic_write", "new_file", "remove_temporaries", "sync_folder", "writing"]

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an `OSError` of the enclosed writes to `path` into the one line a user can act on."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            why = "the disk is full; free some space and start again, what was finished is kept"
        elif error.errno in _FORBIDDEN:
            why = "no permission to write there; choose another output folder"
        else:
            why = f"it cannot be written ({error.strerror or error})"
        raise XanesTomoError(f"{path}: {why}") from error


def atomic_write(path: Path, data: bytes) -> None:
    """Replace the file `path` by `data` in one step, on disk when this returns.

    Raises
    ------
    XanesTomoError
        It could not be written; the former file is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give the place to write a new file to; it becomes `path` when all went well, and is gone when not.

    Raises
    ------
    XanesTomoError
        There is such a file already (it stays as it is), or it could not be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with writing(path):
            if path.exists():
                raise XanesTomoError(f"{path}: it is there already and is not written over; choose another folder")
            path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with writing(path):
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            if path.exists():
                raise XanesTomoError(f"{path}: somebody else has written it meanwhile; choose another folder")
            temporary.replace(path)
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make new names in `folder` survive a power failure, where the system knows how."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:  # some network file systems have no such call
            raise
    finally:
        os.close(descriptor)


def remove_temporaries(folder: Path) -> None:
    """Remove what a killed `atomic_write` left in `folder`; only the one writer of an output may do so."""
    for leftover in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            leftover.unlink()
