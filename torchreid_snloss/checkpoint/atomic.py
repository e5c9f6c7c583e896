"""Files that are complete at any moment."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

__all__ = ["UNFINISHED", "atomic_write", "remove_unfinished"]

UNFINISHED = ".unfinished-"


def atomic_write(path: str | Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes a file so that at any moment `path` is either the complete old file or the complete new one.

    The bytes are written to a temporary file in the same folder and flushed to disk. Then the file is renamed.

    Args:
        path: The file. Its folder is created if needed.
        write: A function that writes the bytes to a stream.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, unfinished = tempfile.mkstemp(prefix=UNFINISHED, dir=path.parent)  # a name that is never too long
    try:
        with os.fdopen(descriptor, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(descriptor)
        os.chmod(unfinished, 0o666 & ~_umask())
        os.replace(unfinished, path)  # once it is closed, as Windows needs it
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # not every system can flush a folder, and the file itself is on disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_unfinished(folder: str | Path) -> None:
    """Removes the temporary files of processes that were killed while they saved."""
    for path in Path(folder).glob(f"{UNFINISHED}*"):
        if path.is_file():
            path.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
