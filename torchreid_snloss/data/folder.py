"""The data set `folder`: images in a folder of one's own."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Any

from torchreid import data

from torchreid_snloss.arguments import check_choice, check_number
from torchreid_snloss.data.folder_files import natural_order
from torchreid_snloss.data.folder_layouts import (
    LAYOUTS,
    FolderImage,
    FoundImages,
    finds_a_camera,
    left_out_words,
    read_folder,
)
from torchreid_snloss.data.testing import is_test_run

__all__ = ["FolderOptions", "ImageFolder", "folder_options"]

_Items = list[tuple[str, int, int]]


@dataclass(frozen=True, kw_only=True)
class FolderOptions:
    """How the data set `folder` is read; the keys `data.folder.*` of the config.

    Attributes:
        path: The folder or a CSV file, relative to the data root; the data root itself if empty.
        layout: `market`: names as in Market-1501, `<identity>_..._c<camera>_...`; `people`: a folder for each person;
            `csv`: a CSV file with columns path, identity and, if they are known, camera and split; `auto`: the one that
            the folder has.
        camera: How the camera is found in a file's name: `auto` (`c1`, `cam1`, `camera_1`), `none`, or a regular
            expression whose group is the camera.
        junk: Identities that are left out. For numbers leading zeros don't matter.
        test_fraction: The share of the people to test on, if the folder is not split, above 0 and below 1.

    Raises:
        TypeError, ValueError: If one of them is anything else.
    """

    path: str = ""
    layout: str = "auto"
    camera: str = "auto"
    junk: tuple[str, ...] = ("-1",)
    test_fraction: float = 0.3

    def __post_init__(self) -> None:
        check_choice("layout", self.layout, LAYOUTS)
        if not isinstance(self.junk, tuple):
            raise TypeError(f"junk must be a tuple of names, got {self.junk!r}")
        if not check_number("test_fraction", self.test_fraction, above=0) < 1:
            raise ValueError(f"test_fraction must be below 1, got {self.test_fraction!r}")
        if not finds_a_camera(self.camera):
            raise ValueError(
                f"camera must be auto, none, or a regular expression with one group, the camera, got {self.camera!r}"
            )

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> FolderOptions:
        """The options in the values of a config, by their keys."""
        options = {key.name: values[f"data.folder.{key.name}"] for key in fields(cls)}
        return cls(**{**options, "junk": tuple(options["junk"])})


@dataclass(frozen=True)
class _Splits:
    train: _Items
    query: _Items
    gallery: _Items
    train_labels: dict[int, int]
    """The training labels of the people in the training images, by their numbers as test people."""
    distractors: set[int]
    """The numbers of a person 0 without queries, as which Market-1501 has images that show nobody who is tested."""
    summary: str


class _Current:
    """The options within `folder_options`, and what was read with them."""

    def __init__(self, options: FolderOptions) -> None:
        self.options = options
        self.read: dict[tuple[str, int], _Splits] = {}


_current: ContextVar[_Current | None] = ContextVar("folder_options", default=None)


@contextlib.contextmanager
def folder_options(options: FolderOptions) -> Iterator[None]:
    """Within it the data set `folder` has these options. A folder is read, and what it holds is printed, once."""
    token = _current.set(_Current(options))
    try:
        yield
    finally:
        _current.reset(token)


class ImageFolder(data.ImageDataset):
    """Images in a folder of one's own, registered as `folder`.

    A folder that is not split into train, query and gallery is split by identity. The test people are drawn at random
    among those with a match: an image from another camera or, if no camera is known, another image. The first image of
    each test person from each camera is a query, and all test images are in the gallery.

    If no camera is known, or nobody who is tested is seen by two, each image counts as a camera of its own, because the
    evaluation leaves out gallery images of the query's identity from the query's camera. Each query is then compared
    with all images but itself, and every test image is a query.

    Args:
        root: The data root.
        options: How the folder is read; None: those of `folder_options`, or the defaults. To register a second folder,
            pass `functools.partial(ImageFolder, options=...)` to `torchreid.data.register_image_dataset`.
        split_id: The seed by which the test people are drawn.
        **kwargs: Those of torchreid's `ImageDataset`.

    Raises:
        ValueError: If the folder is missing, its layout is not clear, or it has nothing to train or to test on.
    """

    train: list[Any]  # set by torchreid

    def __init__(self, root: str = "", options: FolderOptions | None = None, split_id: int = 0, **kwargs: Any) -> None:
        current = _current.get()
        if options is not None or current is None:
            current = _Current(options or FolderOptions())
        path = os.path.join(os.path.abspath(os.path.expanduser(root)), os.path.expanduser(current.options.path))
        path = os.path.normpath(path)
        splits = current.read.get((path, split_id))
        if splits is None:
            splits = current.read[path, split_id] = _load(path, current.options, split_id)
            if kwargs.get("verbose", True):
                print(splits.summary)
        if not splits.train and kwargs.get("mode", "train") == "train" and not is_test_run():  # a target needs none
            raise ValueError(
                f"{path!r} has no training images: put them into a folder train or bounding_box_train (in a CSV file: "
                "the split train), or test alone with test.evaluate True"
            )
        self._train_labels, self._distractors = splits.train_labels, splits.distractors
        super().__init__(splits.train, splits.query, splits.gallery, **kwargs)

    def combine_all(self) -> None:
        """Adds the test images to the training images: each image once, and each person under one label.

        torchreid's would add an image that is a query and in the gallery twice. Both leave out distractors.
        """
        labels, known = dict(self._train_labels), {item[0] for item in self.train}
        test_images = [
            item
            for item in dict.fromkeys((*self.query, *self.gallery))
            if item[0] not in known and item[1] not in self._distractors
        ]
        added = [(path, labels.setdefault(pid, len(labels)), *rest) for path, pid, *rest in test_images]
        self.train = [*self.train, *added]
        self.num_train_pids = self.get_num_pids(self.train)


def _load(path: str, options: FolderOptions, seed: int) -> _Splits:
    found = read_folder(path, options.layout, options.camera, options.junk)
    splits = {image.split for image in found.images}
    testing = [image for image in found.images if image.split in ("", "query", "gallery")]
    cameras_known = all(image.camera is not None for image in found.images)
    by_camera = cameras_known and bool(_matched(testing, by_camera=True))
    matched = _matched(testing, by_camera)
    if splits == {""}:
        test_pids = _draw(path, found.layout, found.images, matched, options.test_fraction, seed)
        train = [image for image in found.images if image.identity not in test_pids]
        gallery = [image for image in found.images if image.identity in test_pids]
        query = _first_of_each_camera(gallery) if by_camera else gallery
    else:
        train, query, gallery = ([i for i in found.images if i.split == name] for name in ("train", "query", "gallery"))
        if not query:
            query = [image for image in gallery if image.identity in matched]
            query = _first_of_each_camera(query) if by_camera else query
    if not query or not gallery:
        missing = "query" if gallery else "gallery"
        left_out = left_out_words(found.left_out)
        if missing == "query" and "query" not in splits:
            raise ValueError(
                f"{path!r} has no query images, since nobody to test on has two images to compare{left_out}"
            )
        raise ValueError(
            f"{path!r} has no {missing} images: put them into a folder {missing} (in a CSV file: the split {missing}), "
            f"or don't split it at all{left_out}"
        )
    if by_camera:
        cameras = _numbers(str(image.camera) for image in found.images)
    else:
        cameras = {image.path: number for number, image in enumerate(found.images)}

    def items(images: Sequence[FolderImage], labels: Mapping[str, int]) -> _Items:
        return [(i.path, labels[i.identity], cameras[str(i.camera) if by_camera else i.path]) for i in images]

    labels = _numbers(image.identity for image in train)
    # Over all people, so that other splits of the same people number them alike.
    test_labels = _numbers(image.identity for image in found.images)
    return _Splits(
        items(train, labels),
        items(query, test_labels),
        items(gallery, test_labels),
        {test_labels[identity]: label for identity, label in labels.items()},
        {test_labels[image.identity] for image in gallery if image.identity.strip("0") == ""}
        - {test_labels[image.identity] for image in query},
        _summary(path, found, (train, query, gallery), cameras_known, by_camera),
    )


def _matched(images: Sequence[FolderImage], by_camera: bool) -> set[str]:
    """The identities of which a query has a match in the gallery."""
    views: dict[str, set[str]] = defaultdict(set)
    for image in images:
        views[image.identity].add(str(image.camera) if by_camera else image.path)
    return {identity for identity, different in views.items() if len(different) > 1}


def _draw(
    path: str, layout: str, images: Sequence[FolderImage], matched: Collection[str], fraction: float, seed: int
) -> set[str]:
    people = len({image.identity for image in images})
    number = min(max(1, round(fraction * people)), len(matched))
    if number < 1 or people - number < 2:
        raise ValueError(
            f"{path!r}, {layout}, can't be split: it has {people} people, of whom {len(matched)} have two images to "
            f"compare, and data.folder.test_fraction {fraction} leaves {people - number} to train on and {number} to "
            "test on; at least 2 and 1 are needed"
        )
    return set(sorted(matched, key=lambda name: _drawn(name, seed))[:number])


def _drawn(name: str, seed: int) -> bytes:
    """A random place in the order of the people, which stays when others are added to the folder."""
    return hashlib.blake2b(f"{seed} {name}".encode(errors="surrogateescape")).digest()


def _first_of_each_camera(images: Sequence[FolderImage]) -> list[FolderImage]:
    first: dict[tuple[str, str | None], FolderImage] = {}
    for image in images:
        first.setdefault((image.identity, image.camera), image)
    return list(first.values())


def _numbers(names: Iterable[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(sorted(set(names), key=natural_order))}


def _summary(
    path: str,
    found: FoundImages,
    splits: tuple[Sequence[FolderImage], ...],
    cameras_known: bool,
    by_camera: bool,
) -> str:
    """What was found, in one line."""
    images = Counter(image.identity for image in found.images)
    train, query, gallery = splits
    cameras = len({image.camera for image in found.images})
    if by_camera:
        seen = f"{cameras} cameras"
    elif cameras_known:
        seen = f"{cameras} camera{'s' * (cameras > 1)}, but nobody to test on is seen by two"
    else:
        seen = "no camera known"
    if not by_camera:
        seen += ": each image counts as a camera of its own, so that a query is compared with all other images"
    singles = sum(number == 1 for number in images.values())
    both = len({image.identity for image in train} & {image.identity for image in query})
    overlap = f"; {both} people to test on are in the training images too" if both else ""
    return (
        f"=> folder {path!r}, {found.layout}: {len(images)} people, {len(found.images)} images, {seen}; "
        f"{len({image.identity for image in train})} people to train on, "
        f"{len({image.identity for image in query})} to test on with {len(query)} queries and {len(gallery)} gallery "
        f"images; {singles} people with a single image{overlap}{left_out_words(found.left_out)}"
    )
