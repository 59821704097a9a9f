"""One writer per output folder."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import sys
import time
import weakref
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from napari_xanes_tomo.model import XanesTomoError

from .atomic import writing

__all__ = ["OutputLock"]

_log = logging.getLogger(__name__)
_BUSY = {errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, errno.EDEADLK}
_held: weakref.WeakSet[OutputLock] = weakref.WeakSet()


class OutputLock:
    """The right to write into an output folder, held by one process at a time.

    A file ``.lock`` in the folder names process, host and start. Where the system has file locks the file is locked
    as well, so that whatever ends the process, ``kill -9`` too, gives the folder free; elsewhere the process number
    decides. The lock of a dead process is taken over with a message. Of a process on another host nobody can tell
    whether it lives: unless the file system's own lock says no, the user is asked to remove the file.

    Parameters
    ----------
    out_dir : str or Path
        The output folder; it exists.

    Attributes
    ----------
    message : str
        What was taken over from whom; empty as a rule. Also logged.

    Raises
    ------
    XanesTomoError
        Another live process (or another window of this one) writes into the folder, or it cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as out, OutputLock(out) as lock:
    ...     lock.message
    ''
    """

    def __init__(self, out_dir: str | Path) -> None:
        self.folder = Path(out_dir)
        self.path = self.folder / ".lock"
        self.message = ""
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def acquire(self) -> None:
        """Take the lock, or raise at once; nothing happens if it is held already."""
        if self.held:
            return
        for _ in range(100):
            with writing(self.path):
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
            try:
                if self._settle(descriptor):
                    self._descriptor = descriptor
                    _held.add(self)
                    return
            finally:
                if self._descriptor is None:
                    os.close(descriptor)
            time.sleep(0.02)
        raise XanesTomoError(f"{self.path}: the lock file keeps changing; is another run starting in this folder?")

    def _settle(self, descriptor: int) -> bool:
        """Make the open lock file ours; False to try again with the file that took its place."""
        locked = _system_lock(descriptor)
        holder = _read(descriptor)
        if locked is False:
            if holder.get("host") == socket.gethostname() and not _alive(holder):
                # Its child of a moment ago has the file locked until it gets to its first line (see `_forget`).
                return False
            raise XanesTomoError(self._busy(holder))
        with contextlib.suppress(OSError):
            if not os.path.samestat(os.fstat(descriptor), self.path.stat()):
                return False
        if not self.path.exists():
            return False
        if holder:
            here = holder.get("host") == socket.gethostname()
            if not here:
                raise XanesTomoError(f"{self._busy(holder)}; if it is dead, remove the file {self.path.name} there")
            if locked is None and _alive(holder):
                raise XanesTomoError(self._busy(holder))
            self.message = (
                f"{self.folder}: took over from process {holder.get('pid')}, which began at "
                f"{holder.get('started')} and ended without closing the folder"
            )
            _log.info("%s", self.message)
        with writing(self.path):
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)
            os.write(descriptor, json.dumps(_self()).encode())
            os.fsync(descriptor)
        return True

    def _busy(self, holder: dict[str, Any]) -> str:
        if not holder:
            return f"{self.folder}: another process is writing into this folder; wait for it or choose another one"
        return (
            f"{self.folder}: process {holder.get('pid')} on {holder.get('host')} has been writing into this folder "
            f"since {holder.get('started')}; wait for it or choose another folder"
        )

    def release(self) -> None:
        """Give the folder free."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        _held.discard(self)
        if os.name == "posix":  # an open file cannot be removed elsewhere
            with contextlib.suppress(OSError):
                self.path.unlink()
            os.close(descriptor)
            return
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
        os.close(descriptor)
        with contextlib.suppress(OSError):
            self.path.unlink()


def _system_lock(descriptor: int) -> bool | None:
    """Lock the open file: True done, False another process has it, None the file system has no locks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # far behind the text, which others may read
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return None
    except OSError as error:
        return False if error.errno in _BUSY else None
    return True


def _self() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "ticks": _ticks(os.getpid()),
    }


def _read(descriptor: int) -> dict[str, Any]:
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        content = json.loads(os.read(descriptor, 4096))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _ticks(pid: int) -> str:
    """Return when the process began, in the kernel's own count; it tells two processes of one number apart."""
    return "".join(_stat(pid)[19:20])


def _stat(pid: int) -> list[str]:
    """Return what Linux says about a process: its state first; nothing elsewhere."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _alive(holder: dict[str, Any]) -> bool:
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    if os.name == "posix":
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            pass
    if _stat(pid)[:1] == ["Z"]:  # killed, and its parent has not looked yet
        return False
    began = holder.get("ticks")
    return not began or _ticks(pid) in ("", began)


def _forget() -> None:
    # A forked child must not keep the file locked after its parent died.
    for lock in list(_held):
        if lock._descriptor is not None:
            os.close(lock._descriptor)
            lock._descriptor = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
