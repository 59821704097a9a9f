"""Compiling before anyone waits for it: ``python -m napari_xanes_tomo.compile_ahead``.

Kernels are compiled where they are first called and kept on disk: a minute, once for each version on a machine. The
plugin has it done by another process while the user still looks at the scan, on a small digital twin.
``XANES_TOMO_COMPILE_AHEAD=0`` in the environment keeps it from that.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["begin", "compile_kernels", "mark"]

_begun: list[subprocess.Popen[bytes]] = []  # kept until it ends; several viewers wait for the same one
_TWIN = {"n": 48, "n_angles": 24}


def mark() -> Path:
    """Return the file that says that these sources have been compiled on this machine."""
    from importlib.metadata import version

    from .io.header_cache import cache_folder

    package = Path(__file__).parent
    what = [platform.machine(), platform.python_version(), version("numba"), os.environ.get("NUMBA_CACHE_DIR", "")]
    for source in sorted(package.rglob("*.py")):
        state = source.stat()
        what.append(f"{source} {state.st_size} {state.st_mtime_ns}")
    name = hashlib.sha256("\n".join(what).encode()).hexdigest()[:32]
    return cache_folder() / "compiled" / name


def begin() -> subprocess.Popen[bytes] | None:
    """Start `compile_kernels` in a process of its own, low in priority; None where that is done, begun or unwanted."""
    if os.environ.get("XANES_TOMO_COMPILE_AHEAD", "1") == "0":
        return None
    try:
        if any(process.poll() is None for process in _begun) or mark().exists():
            return None
        command = [sys.executable, "-m", __name__]
        if sys.platform != "win32":
            command = ["nice", "-n", "10", *command]
        quiet = subprocess.DEVNULL
        _begun[:] = [subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet)]
        return _begun[0]
    except OSError:  # nothing is lost: it is compiled when it is used
        return None


def compile_kernels() -> None:
    """Take a small twin through the whole chain, and what only wider frames go through; leave `mark` behind."""
    import numpy as np

    from .agreement import halve
    from .composition import grain_contrast
    from .io.scan import open_series
    from .phantom import write_twin
    from .recipe import Recipe
    from .workflow import Workflow

    done = mark()
    solid = np.ones((4, 4, 4), np.float32)
    grain_contrast(solid, solid, 1.0, width=256)
    halve(solid)
    with tempfile.TemporaryDirectory() as scratch:
        twin = Path(scratch) / "twin"
        write_twin(twin, "tiny", options=_TWIN)
        with contextlib.closing(Workflow(open_series(twin), Path(scratch) / "out", Recipe())) as workflow:
            workflow.run()
    done.parent.mkdir(parents=True, exist_ok=True)
    done.touch()


if __name__ == "__main__":
    compile_kernels()
