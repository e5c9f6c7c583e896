"""Image files that a data set passes over, since torchreid looks for one ending of the name only."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from torchreid_snloss.data.folder_files import is_image
from torchreid_snloss.data.items import files_of

__all__ = ["left_out_images"]


def left_out_images(datamanager: Any) -> list[str]:
    """Compares the files of a data manager with those beside them.

    torchreid's Market-1501, for example, reads `*.jpg`, and neither `*.JPG` nor `*.png`.

    Args:
        datamanager: A data manager of torchreid, before its training set is changed.

    Returns:
        A line about the folders with image files of another ending than those that are used; one for each pair of
        endings that are used and left out, since there may be thousands of folders.
    """
    # The data set folder reads any ending, and tells of what it leaves out.
    sources = dict(enumerate(datamanager.sources))
    items = [item for item in datamanager.train_loader.dataset.train if sources.get(item[3]) != "folder"]
    for name, splits in datamanager.test_dataset.items():
        if name != "folder":
            items += [*splits["query"], *splits["gallery"]]
    used: dict[str, set[str]] = {}
    for path in (path for item in items for path in files_of(item)):
        folder, name = os.path.split(path)
        used.setdefault(folder, set()).add(os.path.splitext(name)[1])
    folders: dict[tuple[str, str], list[str]] = defaultdict(list)
    left, of_all = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for folder, endings in used.items():
        found = Counter(_endings(folder))
        others = sorted(found.keys() - endings)
        if others:
            kind = ", ".join(sorted(endings)), ", ".join(others)
            folders[kind].append(folder)
            left[kind] += sum(found[ending] for ending in others)
            of_all[kind] += found.total()
    return [
        f"** {left[kind]} of {of_all[kind]} image files in {_named(found_in)} are left out: the data set reads "
        f"{kind[0]}, and these end in {kind[1]}"
        for kind, found_in in folders.items()
    ]


def _named(folders: list[str]) -> str:
    more = len(folders) - 1
    return folders[0] + (f" and {more} other folder{'s' * (more > 1)}" if more else "")


def _endings(folder: str) -> list[str]:
    try:
        entries = [entry for entry in os.scandir(folder or ".") if is_image(entry.name)]
        return [Path(entry.name).suffix for entry in entries if entry.is_file()]
    except OSError:  # a folder that is gone is told when its images are read
        return []
