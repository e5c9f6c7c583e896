"""Which files lie below a folder of images, without those that a run wrote there."""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

__all__ = ["files_below", "is_image", "only_folder"]

# Ranked lists, and the people that the data sets synthetic and synthetic_video draw.
_WRITTEN = re.compile(r"visrank_.+|synthetic(-video)?-v\d+")
_LOG = re.compile(r"(train|test)\.log(-.*)?")


@functools.cache
def _endings() -> frozenset[str]:
    formats = Image.registered_extensions().items()
    return frozenset(ending for ending, name in formats if name in Image.OPEN and name != "MPEG")


def is_image(name: str) -> bool:
    """Whether a file has the ending of a format that Pillow reads."""
    return os.path.splitext(name)[1].lower() in _endings()


def only_folder(path: str) -> str:
    """The folder itself, or the one that is alone in it, as in an unpacked archive."""
    while True:
        with os.scandir(path) as listed:
            entries = [entry for entry in listed if not entry.name.startswith(".")]
        folders = [entry.path for entry in entries if entry.is_dir() and not _is_written(entry.path)]
        if len(folders) != 1 or any(is_image(entry.name) for entry in entries):
            return path
        path = folders[0]


def files_below(folder: str, left_out: Counter[str] | None = None) -> Iterator[tuple[str, ...]]:
    """The parts of the path of each file below a folder; links are followed, but each folder is read once.

    Args:
        folder: The folder.
        left_out: Gets the number of files in folders that a run wrote, which are left out; None: they are not.

    Raises:
        OSError: If a folder can't be read.
    """
    seen = set()
    for path, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        if left_out is not None:
            for name in [name for name in folders if _is_written(os.path.join(path, name))]:
                folders.remove(name)
                left_out["that a run wrote"] += sum(len(found) for *_, found in os.walk(os.path.join(path, name)))
        parts = Path(path).relative_to(folder).parts
        for name in files:
            yield (*parts, name)


def _is_written(folder: str) -> bool:
    """Whether a run wrote a folder: it is of pictures that runs draw, or a `data.save_dir`, with a run's log."""
    if _WRITTEN.fullmatch(os.path.basename(folder)):
        return True
    with os.scandir(folder) as listed:
        return any(_LOG.fullmatch(entry.name) for entry in listed)


def _raise(error: OSError) -> None:
    raise error
