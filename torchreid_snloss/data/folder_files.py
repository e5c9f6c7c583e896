"""Which files lie below a folder of images, without those that a run wrote there, and their order."""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from PIL import Image

__all__ = ["files_below", "is_image", "natural_order", "single_folders"]

_NO_IMAGES = ("MPEG", "HDF5", "GRIB", "BUFR", "WMF")  # Pillow opens them, but needs another program to read them
# Ranked lists, and the people that the data sets synthetic and synthetic_video draw.
_WRITTEN = re.compile(r"visrank_.+|synthetic(-video)?-v\d+")
# A file by which a folder is known, with the folder's name: a run's log, or what lies in the folders that a run makes.
_OF_A_RUN = re.compile(
    r".*/(train|test)\.log(-.*)?|outliers/\d{6,}_\d\d+_.*\.png|model/model.*\.pth\.tar.*|record/record\.json", re.DOTALL
)


@functools.cache
def _endings() -> frozenset[str]:
    formats = Image.registered_extensions().items()
    return frozenset(ending for ending, name in formats if name in Image.OPEN and name not in _NO_IMAGES)


def is_image(name: str) -> bool:
    """Whether a file has the ending of a format that Pillow reads."""
    return os.path.splitext(name)[1].lower() in _endings()


def single_folders(path: str, parts: Collection[str]) -> list[str]:
    """The folder itself and, one in the other, those that are alone in the one before, as in an unpacked archive.

    Folders without images don't count beside others, except for parts of a split.

    Args:
        path: The folder.
        parts: The names of parts of a split, in small letters.
    """
    found = [path]
    while True:
        with os.scandir(found[-1]) as listed:
            entries = [entry for entry in listed if not entry.name.startswith(".")]
        folders = [entry.path for entry in entries if entry.is_dir() and not _is_written(entry.path)]
        if len(folders) > 1 and not any(os.path.basename(folder).lower() in parts for folder in folders):
            folders = list(itertools.islice(filter(_has_images, folders), 2))  # more of them say no more
        if len(folders) != 1 or any(is_image(entry.name) for entry in entries):
            return found
        found.append(folders[0])


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


def natural_order(text: str) -> tuple[list[str | tuple[int, str]], str]:
    """A sort key by which numbers in a text are sorted by their value; different texts, such as 1 and 01, never tie."""
    parts = re.split(r"(\d+)", text)
    return [_digits(part) if index % 2 else part for index, part in enumerate(parts)], text


def _digits(number: str) -> tuple[int, str]:
    """A sort key for numbers of any length, which `int` does not take."""
    digits = number.lstrip("0")
    return len(digits), digits


def _has_images(folder: str) -> bool:
    """Whether there is an image in a folder or below it that is not hidden and that no run wrote."""
    return any(
        is_image(parts[-1]) and not any(part.startswith(".") for part in parts)
        for parts in files_below(folder, Counter())
    )


def _is_written(folder: str) -> bool:
    """Whether a run wrote a folder: it is of pictures that runs draw, or a `data.save_dir` or a folder of one."""
    name = os.path.basename(folder)
    if _WRITTEN.fullmatch(name):
        return True
    with os.scandir(folder) as listed:
        return any(_OF_A_RUN.fullmatch(f"{name}/{entry.name}") for entry in listed)


def _raise(error: OSError) -> None:
    raise error
