"""Files that are either the old one or the new one, whatever interrupts the writing."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from napari_xanes_tomo.model import XanesTomoError

__all__ = ["atomic_write", "remove_temporaries", "sync_folder", "writing"]

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
