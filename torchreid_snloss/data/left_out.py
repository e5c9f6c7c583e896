"""Image files that a data set passes over, since torchreid looks for one ending of the name only."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

__all__ = ["left_out_images"]


def left_out_images(datamanager: Any) -> list[str]:
    """Compares the files of a data manager with those beside them.

    torchreid's Market-1501, for example, reads `*.jpg`, and neither `*.JPG` nor `*.png`.

    Args:
        datamanager: A data manager of torchreid, before its training set is changed.

    Returns:
        A line for each folder with image files of another ending than those that are used.
    """
    items = [*datamanager.train_loader.dataset.train]
    for splits in datamanager.test_dataset.values():
        items += [*splits["query"], *splits["gallery"]]
    used: dict[str, set[str]] = {}
    for path in _paths(items):
        folder, name = os.path.split(path)
        used.setdefault(folder, set()).add(os.path.splitext(name)[1])
    known = {ending.lower() for ending in Image.registered_extensions()}
    lines = []
    for folder, endings in used.items():
        found = Counter(ending for ending in _endings(folder) if ending.lower() in known)
        others = sorted(found.keys() - endings)
        if others:
            number = sum(found[ending] for ending in others)
            lines.append(
                f"** {number} of {found.total()} image files in {folder} are left out: the data set reads "
                f"{', '.join(sorted(endings))}, and these end in {', '.join(others)}"
            )
    return lines


def _paths(items: Iterable[Any]) -> Iterable[str]:
    for item in items:
        if isinstance(item[0], (tuple, list)):
            yield from map(os.fspath, item[0])
        else:
            yield os.fspath(item[0])


def _endings(folder: str) -> list[str]:
    try:
        return [Path(entry.name).suffix for entry in os.scandir(folder or ".") if entry.is_file()]
    except OSError:  # a folder that is gone is told when its images are read
        return []
