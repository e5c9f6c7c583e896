"""A picture for each ranked list: torchreid names it after the query's file, which may share its name with others."""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import shutil
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torchreid_snloss.data.items import files_of

__all__ = ["distinct_names", "drawable", "with_distinct_names"]

_LONGEST_NAME = 200  # bytes; file systems allow 255 with the ending


def distinct_names(paths: Sequence[str]) -> list[str]:
    """A name for each path, without the ending: that of the file if no other path has it.

    Files of the same name in different folders get as many of the folders' names in front as it takes to tell them
    apart. Paths that can't be told apart in this way are numbered. Names that differ only in case count as the same,
    since they are the same file on some systems.

    Args:
        paths: The paths of files.
    """
    names = [Path(path).stem for path in paths]
    folders = _folders(paths)
    for depth in range(1, 1 + max(map(len, folders), default=0)):
        for index in _repeated(names):
            name = "_".join([*folders[index][-depth:], Path(paths[index]).stem])
            if len(os.fsencode(name)) <= _LONGEST_NAME:
                names[index] = name
    repeated = set(_repeated(names))
    taken = {name.casefold() for index, name in enumerate(names) if index not in repeated}
    for index in sorted(repeated):
        name, number = names[index], 1
        while names[index].casefold() in taken:
            number += 1
            names[index] = f"{name}_{number}"
        taken.add(names[index].casefold())
    return names


def _folders(paths: Sequence[str]) -> list[tuple[str, ...]]:
    """The folders of each path below the one that all have in common."""
    parents = [Path(os.path.abspath(path)).parent for path in paths]
    try:
        common = os.path.commonpath(parents)
        return [parent.relative_to(common).parts for parent in parents]
    except ValueError:  # no paths, or several drives
        return [parent.parts[1:] for parent in parents]


def _repeated(names: Sequence[str]) -> list[int]:
    counts = collections.Counter(name.casefold() for name in names)
    return [index for index, name in enumerate(names) if counts[name.casefold()] > 1]


def with_distinct_names(visualize: Callable[..., None]) -> Callable[..., None]:
    """Makes torchreid's `visualize_ranked_results` write a picture, or a folder, for each query.

    Args:
        visualize: torchreid's function.

    Returns:
        A function that does the same with what `drawable` makes of the data set and of the folder.
    """

    @functools.wraps(visualize)
    def visualize_all(distmat: Any, dataset: Any, *args: Any, **kwargs: Any) -> None:
        query, gallery = dataset
        with drawable(query, gallery, str(kwargs.get("save_dir", ""))) as (queries, others, save_dir):
            visualize(distmat, (queries, others), *args, **({**kwargs, "save_dir": save_dir} if save_dir else kwargs))

    return visualize_all


@contextlib.contextmanager
def drawable(query: Sequence[Any], gallery: Sequence[Any], save_dir: str) -> Iterator[tuple[list[Any], list[Any], str]]:
    """Within it ranked lists can be drawn of the items that it gives, into the folder that it gives.

    Where the queries' files have different names, these are the items. A query whose file shares its name with another
    one gets a name of its own. Bytes in a path that are no text, which end OpenCV's process, are replaced by another
    path, and stand as `%ff` in the picture's name.

    Args:
        query: The items of the queries.
        gallery: The items of gallery images.
        save_dir: The folder of the pictures.
    """
    names = [_as_text(name) for name in distinct_names([files_of(item)[0] for item in query])]
    with tempfile.TemporaryDirectory() as folder, _folder_with_text(save_dir, os.path.join(folder, "pictures")) as made:
        queries = [
            _renamed(item, os.path.join(folder, f"query-{index}"), name)
            for index, (item, name) in enumerate(zip(query, names))
        ]
        others = [
            _renamed(item, os.path.join(folder, f"gallery-{index}"), _as_text(Path(files_of(item)[0]).stem))
            for index, item in enumerate(gallery)
        ]
        yield queries, others, made


@contextlib.contextmanager
def _folder_with_text(save_dir: str, instead: str) -> Iterator[str]:
    """Gives another folder if the bytes of `save_dir` are no text, and moves what is written there."""
    if _is_text(save_dir):
        yield save_dir
        return
    yield instead
    os.makedirs(save_dir, exist_ok=True)
    for path in Path(instead).iterdir():
        target = os.path.join(save_dir, path.name)
        if path.is_dir():
            shutil.copytree(path, target, dirs_exist_ok=True)
        else:
            shutil.copy(path, target)


def _is_text(path: str) -> bool:
    """Whether a path can be encoded as UTF-8: Python stands in for other bytes with lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in path)


def _as_text(name: str) -> str:
    """A name in which each byte that is no text stands as `%ff`."""
    return name if _is_text(name) else urllib.parse.quote_from_bytes(os.fsencode(name))


def _renamed(item: Any, folder: str, name: str) -> Any:
    """The item with links in a folder for its files, if the first one is not of this name or names are repeated."""
    files = files_of(item)
    own_names = [Path(file).stem for file in files]
    if own_names[0] == name and not _repeated(own_names) and all(map(_is_text, files)):
        return item
    own_names = list(map(_as_text, own_names))
    os.mkdir(folder)
    others = [
        f"{name}_{own_name}" if own_name == name else own_name for own_name in map(_as_text, distinct_names(files)[1:])
    ]
    links = [os.path.join(folder, new + _as_text(Path(file).suffix)) for file, new in zip(files, [name, *others])]
    for file, link in zip(files, links):
        _link(file, link)
    return (links[0] if isinstance(item[0], str) else tuple(links), *item[1:])


def _link(path: str, link: str) -> None:
    try:
        os.symlink(os.path.abspath(path), link)
    except OSError:  # on Windows, where links are for administrators
        shutil.copy(path, link)
