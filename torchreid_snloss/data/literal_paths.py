"""Paths that are taken as they are, whatever characters their folders have.

torchreid's data sets join a folder and a wildcard and pass both to `glob`, so `[v2]` in the folder's name matches one
character. Some also search the whole path of an image for its identity and camera, and find `0001_c3` in the name of a
folder. The functions here take their place in torchreid's modules.
"""

from __future__ import annotations

import glob
import os
import re
import types
from typing import Any

__all__ = ["glob_in_folder", "replace_functions", "search_in_file_name"]


def glob_in_folder(pattern: str, *args: Any, **kwargs: Any) -> list[str]:
    """`glob.glob`, but takes the folders at the start of the pattern literally as far as they exist, and sorts.

    The order of the file system differs between copies of data, and torchreid takes a tracklet's frames as they come.

    Args:
        pattern: The path to search, with wildcards in its last parts.
        *args: Passed on to `glob.glob`.
        **kwargs: Passed on to `glob.glob`.
    """
    folder, last = os.path.split(pattern)
    wildcards = [last]
    while folder and not os.path.isdir(folder):
        folder, last = os.path.split(folder)
        if not last:  # the root of a file system that does not exist
            break
        wildcards.insert(0, last)
    return sorted(glob.glob(os.path.join(glob.escape(folder), *wildcards), *args, **kwargs))


def search_in_file_name(pattern: str, *args: Any) -> Any:
    """`re.compile`, but the pattern's `search` takes a path and searches only the file's name.

    Args:
        pattern: The regular expression.
        *args: Passed on to `re.compile`.
    """
    compiled = re.compile(pattern, *args)
    return types.SimpleNamespace(search=lambda path: compiled.search(os.path.basename(path)))


def replace_functions(module: types.ModuleType, **functions: Any) -> types.ModuleType:
    """A copy of a module with some of its functions replaced."""
    copy = types.ModuleType(module.__name__, module.__doc__)
    vars(copy).update({**vars(module), **functions})
    return copy
