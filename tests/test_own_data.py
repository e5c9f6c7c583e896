"""Data sets of a user's own: what is refused, by whose name, and what is accepted."""

from __future__ import annotations

import copy
import functools
import re
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Done, make_datamanager, make_engine, tiny_options
from PIL import Image
from torchreid import data

from torchreid_snloss import ConfigError, ImageSNEngine, build_datamanager, get_default_config
from torchreid_snloss.data import hold_out, use_batch_transforms
from torchreid_snloss.data.readable import NamingFailures, name_unreadable_images

Items = list[Any]
Splits = dict[str, Items]
Use = Callable[..., Done]


class OwnData(data.ImageDataset):
    def __init__(self, make: Callable[[], Splits], root: str = "", **kwargs: Any) -> None:
        options = ("transform", "k_tfm", "mode", "combineall", "verbose")
        super().__init__(**make(), **{key: kwargs[key] for key in options if key in kwargs})


class OwnTracklets(data.VideoDataset):
    def __init__(self, make: Callable[[], Splits], root: str = "", **kwargs: Any) -> None:
        options = ("transform", "mode", "combineall", "verbose", "seq_len", "sample_method")
        super().__init__(**make(), **{key: kwargs[key] for key in options if key in kwargs})


class BlackImages(OwnData):
    """Reads its images in a way of its own: all are black."""

    def __getitem__(self, index: int) -> Any:
        path, pid, camid, dsetid = self.data[index]
        image = Image.new("RGB", (32, 64))
        return {"img": self.transform(image), "pid": pid, "camid": camid, "impath": path, "dsetid": dsetid}


@pytest.fixture(scope="module")
def splits(reid_data: Path) -> Splits:
    """16 training identities, 0 to 15, and 8 others to test on."""
    folder = reid_data / "market1501/Market-1501-v15.09.15"
    names = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
    return {
        split: [
            (str(path), int(path.name[:4]) - 1, int(path.name[6])) for path in sorted((folder / name).glob("*.jpg"))
        ]
        for split, name in names.items()
    }


@pytest.fixture
def add_data(splits: Splits, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Registers a data set of one's own: `add_data(name, train=…)`."""

    def add(name: str, cls: Any = OwnData, **changes: Any) -> str:
        kind = "__video_datasets" if cls is OwnTracklets else "__image_datasets"
        made = functools.partial(cls, lambda: {**splits, **changes})
        monkeypatch.setitem(vars(data.datasets)[kind], name, made)
        return name

    return add


@pytest.fixture
def use(train: Callable[..., Done], add_data: Callable[..., str]) -> Use:
    """The command line on a data set of one's own: `use(*options, train=…)`."""

    def run(*options: object, cls: Any = OwnData, **changes: Any) -> Done:
        add_data("mine", cls, **changes)
        sources = ["data.sources", "['mine']", "data.targets", "['mine']"]
        return train(*sources, "loss.name", "sn", "train.max_epoch", 1, *options)

    return run


def change(items: Items, label: Callable[[int], Any]) -> Items:
    return [(path, label(pid), camera) for path, pid, camera in items]


def refused(done: Done, *words: str) -> None:
    assert done.code == 2, done.err
    assert len(done.err.splitlines()) == 1
    for word in words:
        assert word in done.err


@pytest.mark.parametrize("loss", ["sn", "softmax", "triplet"])
def test_labels_that_start_at_1(loss: str, use: Use, splits: Splits) -> None:
    done = use("loss.name", loss, train=change(splits["train"], lambda pid: pid + 1))
    refused(
        done,
        "data set 'mine' has 16 training identities, which must be numbered from 0 to 15, but they are "
        "1, 2, 3, 4, 5, …, 16; number them by {pid: label for label, pid in enumerate(sorted(pids))}",
    )


def test_labels_with_gaps_are_refused_before_they_are_numbered_again(use: Use, splits: Splits) -> None:
    gaps = change(splits["train"], lambda pid: pid * 2)
    refused(use("data.train_fraction", 0.5, train=gaps), "0, 2, 4, 6, 8, …, 30")


def test_numbers_of_a_test_alone_may_be_any(use: Use, splits: Splits) -> None:
    done = use("test.evaluate", True, train=change(splits["train"], lambda pid: pid * 2))
    assert done.code == 0, done.err


@pytest.mark.parametrize("order", [["first", "gaps"], ["gaps", "first"]])
def test_of_two_sources_the_wrong_one_is_named(
    order: list[str], train: Callable[..., Done], add_data: Callable[..., str], splits: Splits
) -> None:
    add_data("first")
    # Summed up as torchreid does, 16 people of "gaps" and 16 of "first" would share 12 labels.
    add_data("gaps", train=change(splits["train"], lambda pid: pid if pid < 4 else pid + 16))
    done = train("data.sources", str(order), "data.targets", "['first']", "loss.name", "sn", "train.max_epoch", 1)
    refused(done, "data set 'gaps' has 16 training identities", "they are 0, 1, 2, 3, 20, …, 31;")


def test_a_script_is_told_too(add_data: Callable[..., str], splits: Splits, in_folder: Path) -> None:
    name = add_data("mine", train=change(splits["train"], lambda pid: pid + 1))
    datamanager = make_datamanager(in_folder, sources=name)
    with pytest.raises(ValueError, match="data set 'mine' has 16 training identities"):
        make_engine(ImageSNEngine, datamanager).run(max_epoch=1)


def with_first(items: Items, *first: Any) -> Items:
    return [first, *items[1:]]


WRONG: dict[str, tuple[Callable[[Splits], dict[str, Any]], str]] = {
    "text": (
        lambda s: {"train": change(s["train"], str)},
        "data set 'mine', training item 0: the identity must be an integer, got '0' of ",
    ),
    "fraction": (lambda s: {"gallery": change(s["gallery"], lambda pid: pid + 0.5)}, "gallery item 0: the identity"),
    "tensor": (lambda s: {"train": change(s["train"], torch.tensor)}, "must be an integer, got tensor(0)"),
    "no identity": (lambda s: {"query": change(s["query"], lambda pid: None)}, "must be an integer, got None"),
    "huge": (lambda s: {"query": change(s["query"], lambda pid: pid + 2**64)}, "must fit in 64 bits"),
    "camera": (
        lambda s: {"gallery": [(path, pid, f"cam{camera}") for path, pid, camera in s["gallery"]]},
        "gallery item 0: the camera must be an integer, got 'cam",
    ),
    "junk in training": (
        lambda s: {"train": with_first(s["train"], s["train"][0][0], -1, 0)},
        "training item 0: only the gallery may have negative identities",
    ),
    "junk query": (
        lambda s: {"query": with_first(s["query"], s["query"][0][0], -1, 0)},
        "query item 0: only the gallery may have negative identities",
    ),
    "no images": (lambda s: {"train": []}, "data set 'mine' has no training images"),
    "no queries": (lambda s: {"query": []}, "data set 'mine' has no query images"),
    "no gallery": (lambda s: {"gallery": []}, "data set 'mine' has no gallery images"),
    "no list": (lambda s: {"train": iter(s["train"])}, "its training images must be a list, got list_iterator"),
    "nothing": (lambda s: {"query": None}, "its query images must be a list, got NoneType"),
    "short": (lambda s: {"train": [item[:2] for item in s["train"]]}, "an item must be (path, identity, camera), got"),
    "long": (lambda s: {"train": [(*item, 0, 0) for item in s["train"]]}, "an item must be (path, identity, camera)"),
    "mixed": (lambda s: {"train": [*s["train"], (*s["train"][0], 0)]}, "some of its training items have 3 parts"),
    "missing": (
        lambda s: {"train": with_first(s["train"], "nowhere/1.jpg", 0, 0)},
        "data set 'mine': 1 of its files do not exist, the first is 'nowhere/1.jpg'",
    ),
    "missing query": (lambda s: {"query": with_first(s["query"], "nowhere/1.jpg", 17, 0)}, "1 of its files do not"),
    "path object": (
        lambda s: {"train": with_first(s["train"], Path(s["train"][0][0]), 0, 0)},
        "the path must be a string, got PosixPath(",
    ),
    "tracklet": (lambda s: {"train": [((path,), *rest) for path, *rest in s["train"]]}, "the path must be a string"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_items(kind: str, use: Use, splits: Splits) -> None:
    make, words = WRONG[kind]
    refused(use(**make(splits)), "can't load the data (data.sources ['mine']", words)


def tracklets(items: Items) -> Items:
    return [((path,), pid, camera) for path, pid, camera in items]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ((), "training item 0: the tracklet has no frames"),
        ("image.jpg", "a tracklet must be a tuple of the paths of its frames, got 'image.jpg'"),
        ((Path("image.jpg"),), "a path must be a string"),
        (("image.jpg",), "1 of its files do not exist, the first is 'image.jpg'"),
    ],
)
def test_wrong_tracklets(wrong: Any, words: str, use: Use, splits: Splits) -> None:
    given = {split: tracklets(items) for split, items in splits.items()}
    given["train"] = with_first(given["train"], wrong, 0, 0)
    refused(use("data.type", "video", cls=OwnTracklets, **given), "data set 'mine'", words)


def test_odd_items_that_are_right(use: Use, splits: Splits) -> None:
    given = {
        "train": change(splits["train"], np.int32),  # which torch does not take for labels
        "query": [[*item, 0] for item in splits["query"]],
        "gallery": [*splits["gallery"], (splits["gallery"][0][0], -1, 0), (splits["gallery"][0][0], 2**40, 900)],
    }
    done = use(**given)
    assert done.code == 0, done.err
    assert "=> 1 of 50 gallery images of mine have a negative identity and count as images of other people" in done.out


def test_an_image_of_several_people_is_pointed_out(use: Use, splits: Splits) -> None:
    done = use(train=[*splits["train"], (splits["train"][0][0], 7, 0)])
    assert done.code == 0, done.err
    path = splits["train"][0][0]
    assert f"** 1 of 120 training images belong to several identities each, such as {path}: do the" in done.out


def test_frames_of_tracklets_keep_their_order(add_data: Callable[..., str], splits: Splits, in_folder: Path) -> None:
    given = {
        split: [((path, items[0][0], items[-1][0]), pid, camera) for path, pid, camera in items]
        for split, items in splits.items()
    }
    mine = add_data("mine", OwnTracklets, **given)
    made = load(in_folder, mine, mine, "data.type", "video", "video.seq_len", 2)
    assert {item[0] for item in made.train_loader.dataset.train} == {item[0] for item in given["train"]}


def test_one_person_alone_is_no_training_set(use: Use, splits: Splits) -> None:
    alone = [item for item in splits["train"] if item[1] == 0]
    options = ("loss.name", "softmax", "train.batch_size", 2)
    refused(
        use(*options, train=alone), "the training set needs at least 2 identities, since a loss tells them apart, got 1"
    )
    done = use(*options, "test.evaluate", True, train=alone)
    assert done.code == 0, done.err


def test_combining_test_people_who_are_not_in_the_gallery(use: Use, splits: Splits) -> None:
    path = splits["query"][0][0]
    refused(
        use("data.combineall", True, query=with_first(splits["query"], path, 99, 0)),
        f"needs each query's identity in the gallery too, but identity 99 of data set 'mine' is not there: {path}",
    )
    junk = [*splits["gallery"], (path, -1, 0)]
    refused(use("data.combineall", True, gallery=junk), "would train on all images of identity -1", "_junk_pids")
    assert use("data.combineall", True).code == 0


def load(root: Path, source: str, target: str, *options: object) -> Any:
    cfg = get_default_config()
    names = ("data.sources", f"['{source}']", "data.targets", f"['{target}']")
    cfg.merge_from_list(tiny_options("data.root", root, *names, "test.ranks", "[1]", *options))
    return build_datamanager(cfg)


@pytest.mark.parametrize("batch_transforms", [False, True])
def test_the_held_out_are_read_by_the_class_of_the_source(
    batch_transforms: bool, add_data: Callable[..., str], reid_data: Path
) -> None:
    mine = add_data("mine", BlackImages)
    held_out = ("data.val_fraction", 0.3, "data.transforms", "['random_erase']")
    made = load(reid_data, mine, "market1501", *held_out, "data.batch_transforms", batch_transforms)
    expected = next(iter(load(reid_data, mine, mine).test_loader["mine"]["query"]))["img"][0]
    for mode, loader in made.test_loader["validation"].items():
        assert loader.dataset.mode == mode
        assert all(torch.equal(image, expected) for batch in loader for image in batch["img"])
    (batch, *_) = made.test_loader["market1501"]["query"]
    assert batch["img"].flatten(1).std() > 0.1


def test_the_held_out_are_read_by_the_class_of_the_source_in_a_script(
    add_data: Callable[..., str], reid_data: Path
) -> None:
    made = make_datamanager(reid_data, sources=add_data("mine", BlackImages), targets="market1501")
    use_batch_transforms(made, 1, use_gpu=False)
    hold_out(made, 0.3, 1, train_sampler="RandomSampler", batch_size=8)
    query = made.test_loader["validation"]["query"]
    assert query.dataset.mode == "query"
    assert all(image.flatten(1).std(1).max() == 0 for batch in query for image in batch["img"])


def test_a_test_set_named_as_the_held_out_is_refused(add_data: Callable[..., str], reid_data: Path) -> None:
    name = add_data("validation")
    assert list(load(reid_data, "market1501", name).test_loader) == [name]
    with pytest.raises(ConfigError, match="held-out identities under the name 'validation', but a test set has that "):
        load(reid_data, "market1501", name, "data.val_fraction", 0.3)


@pytest.mark.parametrize("sources", [["mine", "other"], ["other", "mine"], ["other", "again", "mine"]])
def test_a_class_that_torchreid_does_not_call_with_several_sources_is_named(
    sources: list[str], add_data: Callable[..., str], reid_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_data("mine", BlackImages)
    add_data("other")
    add_data("again")
    make_datamanager(reid_data, sources="mine")
    assert "** data set" not in capsys.readouterr().out
    batch = next(iter(make_datamanager(reid_data, sources=sources, targets="mine").train_loader))
    assert batch["img"].flatten(1).std(1).min() > 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("**")] == [
        "** data set 'mine' has a __getitem__ of its own (BlackImages), which torchreid does not call with several "
        "sources: it reads the training files as they are"
    ]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyError(17), r"KeyError: 17 \(test_own_data\.py, line \d+\)"),
        (AttributeError("no x"), r"AttributeError: no x \(test_own_data\.py, line \d+\)"),
        (IndexError("pop from empty list"), r"IndexError: pop from empty list \(test_own_data\.py, line \d+\)"),
        (ZeroDivisionError(), r"ZeroDivisionError \(test_own_data\.py, line \d+\)"),
        (RuntimeError(), r"RuntimeError \(test_own_data\.py, line \d+\)"),
        (ValueError("two\nlines"), "two lines"),
        (OSError(), r"OSError \(test_own_data\.py, line \d+\)"),
    ],
    ids=repr,
)
def test_a_data_set_that_raises(error: Exception, words: str, use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(OwnData, "__init__", fail)
    done = use()
    refused(done)
    assert re.search(rf"data\.root '.*'\): {words}$", done.err.strip()), done.err


class WithLock(OwnData):
    """A data set that pickles itself without what can't be pickled."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lock: Any = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock="made again")


def test_a_data_set_that_pickles_itself_goes_to_a_worker(splits: Splits, in_folder: Path) -> None:
    dataset = WithLock(lambda: splits, mode="train")
    name_unreadable_images(SimpleNamespace(train_loader=SimpleNamespace(dataset=dataset), test_loader={}))
    again = copy.copy(dataset)  # by __reduce_ex__, as pickle does
    assert type(again).__mro__[1:] == type(dataset).__mro__[1:]
    assert isinstance(again, NamingFailures)
    assert again.lock == "made again"
    assert again.train == dataset.train


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("0001_c9s1_000000_00.jpg", "1 <= camid <= 6 must hold, got camid = 9 in "),
        ("1777_c1s1_000000_00.jpg", "0 <= pid <= 1501 must hold, got pid = 1777 in "),
        ("photo.jpg", "a file name that does not match the data set's pattern: "),
    ],
)
def test_a_file_that_market1501_does_not_know_is_named(
    name: str, words: str, train: Callable[..., Done], reid_data: Path
) -> None:
    file = reid_data / "market1501/Market-1501-v15.09.15/bounding_box_test" / name
    file.touch()
    try:
        refused(train("loss.name", "sn"), words + str(file))
    finally:
        file.unlink()
