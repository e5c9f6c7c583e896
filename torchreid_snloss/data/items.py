"""What torchreid assumes about the items of a data set and does not check, so that it fails later or trains silently.

An item is (path of an image or paths of a tracklet's frames, identity, camera), and may have the number of its data set
as a fourth part.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any

from torchreid import data

from torchreid_snloss.data.testing import is_test_run

__all__ = ["check_labels", "files_of", "telling_of_own_reading", "training_items", "with_checked_items"]

_SPLITS = {"train": "training", "query": "query", "gallery": "gallery"}
_LARGEST = 2**63 - 1  # a batch holds identities and cameras as int64


def files_of(item: Any) -> list[str]:
    """The image file of an item, or all files of a tracklet."""
    files = [item[0]] if isinstance(item[0], (str, os.PathLike)) else item[0]
    return [os.fspath(file) for file in files]


def training_items(dataset: Any) -> Sequence[Any] | None:
    """The training items of a data set; None if it has no list `train` as torchreid's."""
    items = getattr(dataset, "train", None)  # in data sets of torchvision a bool
    return items if isinstance(items, Sequence) else None


def with_checked_items(init: Callable[..., None]) -> Callable[..., None]:
    """Makes torchreid's `Dataset.__init__` check the items that it is given.

    Args:
        init: torchreid's `Dataset.__init__`.

    Returns:
        A function that raises a `ValueError`, with the name of the data set, for items that can't be trained or
        tested with, and does the same as torchreid's for all others. Where only the test items are used, in a test run
        or for a target, there may be no training items.
    """

    @functools.wraps(init)
    def checked(self: Any, train: Any, query: Any, gallery: Any, *args: Any, **kwargs: Any) -> None:
        name = _name(self)
        splits = {"train": train, "query": query, "gallery": gallery}
        mode = kwargs.get("mode", "train")
        without_training = isinstance(train, (list, tuple)) and not train and (is_test_run(name) or mode != "train")
        for split, items in splits.items():
            if split == "train" and without_training:
                continue
            _check_items(f"data set {name!r}", _SPLITS[split], items, isinstance(self, data.VideoDataset))
            splits[split] = _with_pythons_integers(items)
        used = splits.get(mode, [])
        _check_paths(f"data set {name!r}", used)
        if kwargs.get("combineall") and type(self).combine_all is data.datasets.dataset.Dataset.combine_all:
            junk, train_only = set(self._junk_pids), self._train_only
            _check_combining(f"data set {name!r}", splits["query"], splits["gallery"], junk, train_only)
        if not without_training:
            init(self, *splits.values(), *args, **kwargs)
            return
        # torchreid reads the first training item, and makes a training loader, which a test does not use.
        verbose = kwargs.pop("verbose", True)
        unused = [(splits["query"][0][0], 0, 0)]
        init(self, unused, splits["query"], splits["gallery"], *args, verbose=False, **kwargs)
        if verbose:
            self.train, filled = [], self.train
            self.show_summary()
            self.train = filled

    return checked


def telling_of_own_reading(add: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Makes torchreid's `Dataset.__add__`, by which it joins several sources, print which class it will not read by.

    Args:
        add: torchreid's `Dataset.__add__`. What it returns reads each file as a torchreid data set does.
    """
    torchreids = (data.ImageDataset.__getitem__, data.VideoDataset.__getitem__)

    @functools.wraps(add)
    def joined(self: Any, other: Any) -> Any:
        for dataset in (self, other):
            if type(dataset).__getitem__ not in torchreids:
                print(
                    f"** data set {_name(dataset)!r} has a __getitem__ of its own ({type(dataset).__name__}), which "
                    "torchreid does not call with several sources: it reads the training files as they are"
                )
        return add(self, other)

    return joined


def _name(dataset: Any) -> str:
    """The name under which a data set is registered, or that of its class."""
    kind = "__video_datasets" if isinstance(dataset, data.VideoDataset) else "__image_datasets"
    registered = vars(data.datasets)[kind].items()
    names = [name for name, maker in registered if getattr(maker, "func", maker) is type(dataset)]
    return names[0] if len(names) == 1 else type(dataset).__name__


def _check_items(who: str, split: str, items: Any, video: bool) -> None:
    if isinstance(items, (str, bytes, dict)) or not (hasattr(items, "__len__") and hasattr(items, "__getitem__")):
        raise ValueError(f"{who}: its {split} images must be a list, got {type(items).__name__}")
    if len(items) == 0:
        raise ValueError(f"no images in the training, query or gallery folder: {who} has no {split} images")
    what = "(frames, identity, camera)" if video else "(path, identity, camera)"
    for index, item in enumerate(items):
        problem = _problem(item, what, video, split)
        if problem:
            raise ValueError(f"{who}, {split} item {index}: {problem}")
    if len({len(item) for item in items}) > 1:
        raise ValueError(f"{who}: some of its {split} items have 3 parts, {what}, and some have 4")


def _problem(item: Any, what: str, video: bool, split: str) -> str:
    """What is wrong with an item, or nothing."""
    if isinstance(item, (str, bytes, dict)) or not hasattr(item, "__len__") or len(item) not in (3, 4):
        return f"an item must be {what}, got {_short(item)}"
    path, *labels = item
    problem = _problem_of_path(path, video)
    if problem:
        return problem
    for kind, label in zip(("identity", "camera", "data set's number"), labels):
        if type(label) is not int and (not isinstance(label, Integral) or isinstance(label, bool)):
            return f"the {kind} must be an integer, got {_short(label)} of {_first(path)}"
        if not -_LARGEST <= int(label) <= _LARGEST:
            return f"the {kind} must fit in 64 bits, got {label} of {_first(path)}"
    if labels[0] < 0 and split != "gallery":
        return (
            "only the gallery may have negative identities, those of junk images and distractors, "
            f"got {labels[0]} of {_first(path)}"
        )
    return ""


def _problem_of_path(path: Any, video: bool) -> str:
    if not video:
        right = isinstance(path, str)
        return "" if right else f"the path must be a string, got {_short(path)} of type {type(path).__name__}"
    if not isinstance(path, (tuple, list)):
        return f"a tracklet must be a tuple of the paths of its frames, got {_short(path)}"
    if not path:
        return "the tracklet has no frames"
    for frame in path:
        if not isinstance(frame, str):
            return f"a path must be a string, got {_short(frame)} of type {type(frame).__name__}"
    return ""


def _with_pythons_integers(items: Any) -> Any:
    """The items with Python's integers for NumPy's, which may overflow in torchreid's sums or be no labels to torch."""
    if all(type(label) is int for item in items for label in item[1:]):
        return items
    return [(item[0], *map(int, item[1:])) for item in items]


def _check_paths(who: str, items: Iterable[Any]) -> None:
    """Checks that files exist, by listing each folder once: a call for each file takes minutes on a network drive."""
    listed: dict[str, set[str]] = {}
    missing = []
    for path in (file for item in items for file in files_of(item)):
        folder, name = os.path.split(path)
        if folder not in listed:
            try:
                with os.scandir(folder or ".") as entries:
                    listed[folder] = {e.name for e in entries if not e.is_symlink() or os.path.exists(e.path)}
            except (OSError, ValueError):  # no such folder; no permission to list it; a character 0
                listed[folder] = set()
        if name not in listed[folder] and not _exists(path):
            missing.append(path)
    if missing:
        raise ValueError(f"{who}: {len(missing)} of its files do not exist, the first is {missing[0]!r}")


def _exists(path: str) -> bool:
    try:
        return os.path.isfile(path)
    except ValueError:
        return False


def _check_combining(who: str, query: Sequence[Any], gallery: Sequence[Any], junk: set[int], train_only: bool) -> None:
    """Checks what `combineall` assumes about the test images that it trains on."""
    if train_only:
        return
    known = {item[1] for item in gallery}
    for path, pid, *_ in query:
        if pid not in known and pid not in junk:
            raise ValueError(
                f"data.combineall needs each query's identity in the gallery too, but identity {pid} of {who} "
                f"is not there: {_first(path)}"
            )
    for path, pid, *_ in gallery:
        if pid < 0 and pid not in junk:
            raise ValueError(
                f"data.combineall would train on all images of identity {pid} of {who} as one person: list it in "
                f"_junk_pids of {who}, or leave the images out, such as {_first(path)}"
            )


def check_labels(datamanager: Any) -> None:
    """Checks that the training identities are numbered from 0 without gaps, since the number is a classifier's output.

    Args:
        datamanager: A data manager of torchreid. If its training set has no list `train` as torchreid's, there is
            nothing to check.

    Raises:
        ValueError: Names the data set and its identities.
    """
    items = training_items(datamanager.train_loader.dataset)
    if items is None:
        return
    pids = {int(item[1]) for item in items}
    if pids == set(range(len(pids))):
        return
    # torchreid adds up several sources: it adds the number of identities before a source to its identities.
    sources, before = list(datamanager.sources), 0
    for order, dataset in enumerate(sorted({item[3] for item in items})):
        own = {int(item[1]) - before for item in items if item[3] == dataset}
        if own != set(range(len(own))):
            name = sources[order] if order < len(sources) else dataset
            example = "{pid: label for label, pid in enumerate(sorted(pids))}"
            raise ValueError(
                f"data set {name!r} has {len(own)} training identities, which must be numbered from 0 to "
                f"{len(own) - 1}, but they are {_few(own)}; number them by {example}"
            )
        before = len({item[1] for item in items if item[3] <= dataset})
    raise ValueError(f"{len(pids)} training identities must be numbered from 0 to {len(pids) - 1}, got {_few(pids)}")


def _few(pids: Iterable[int]) -> str:
    ordered = list(map(str, sorted(pids)))
    return ", ".join(ordered if len(ordered) <= 6 else [*ordered[:5], "…", ordered[-1]])


def _first(path: Any) -> str:
    return path if isinstance(path, str) else f"{path[0]} and so on"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
