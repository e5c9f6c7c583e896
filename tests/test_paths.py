"""Paths are not patterns, and files of the same name in different folders are different files."""

from __future__ import annotations

import glob
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import Done
from torchreid import data, utils

import torchreid_snloss
from torchreid_snloss.data.picture_names import distinct_names

FOLDERS = ["data [v2]", "[!a]*", "what?", "x_0001_c3", "-1_c1", "{0} %s", "[a-z]/_2_c2"]


@pytest.fixture
def same_data(reid_data: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Data of the session under a root of another name, by a link."""

    def link(name: str) -> Path:
        root = tmp_path / name
        root.parent.mkdir(parents=True, exist_ok=True)
        root.symlink_to(reid_data, target_is_directory=True)
        return root

    return link


@pytest.mark.parametrize("name", FOLDERS)
def test_market1501_is_the_same_in_any_folder(name: str, same_data: Callable[[str], Path], reid_data: Path) -> None:
    torchreid_snloss.register()
    expected, found = (data.datasets.Market1501(root=str(root), verbose=False) for root in (reid_data, same_data(name)))
    for split in ("train", "query", "gallery"):
        items = [
            [(os.path.relpath(path, dataset.root), *labels) for path, *labels in sorted(getattr(dataset, split))]
            for dataset in (expected, found)
        ]
        assert items[0] == items[1]
        assert all(path.startswith(f"{found.root}{os.sep}") for path, *_ in getattr(found, split))  # as the user has it


def test_a_run_in_such_a_folder(train: Callable[..., Done], same_data: Callable[[str], Path]) -> None:
    done = train("data.root", same_data("data [v2]_0001_c3"), "loss.name", "sn", "train.max_epoch", 1)
    assert done.code == 0, done.err
    assert "mAP:" in done.out


def test_every_module_of_torchreids_data_sets_that_searches_files() -> None:
    torchreid_snloss.register()
    classes = [*vars(data.datasets)["__image_datasets"].values(), *vars(data.datasets)["__video_datasets"].values()]
    modules = {sys.modules[cls.__module__] for cls in classes if cls.__module__.startswith(data.datasets.__name__)}
    assert len(modules) >= 17
    searching = [module for module in modules if hasattr(module, "glob")]
    assert len(searching) >= 10
    assert not [module for module in searching if module.glob is glob]


def test_folders_inside_a_data_set_are_still_found_by_wildcards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchreid_snloss.register()
    module = sys.modules[data.datasets.University1652.__module__]
    folder = tmp_path / "[x]_?"
    for name in ("a/0001/1.jpg", "b/0001/2.jpg", "b/0002/3.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    listed = glob.glob
    for backwards in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(glob, "glob", lambda pattern, back=backwards: sorted(listed(pattern), reverse=back))
            found = module.glob.glob(os.path.join(str(folder), "*/*/*"))
        assert found == [str(folder / name) for name in ("a/0001/1.jpg", "b/0001/2.jpg", "b/0002/3.jpg")]
    assert module.glob.glob(os.path.join(str(tmp_path / "[none]"), "*.jpg")) == []
    assert module.glob.glob(str(folder / "b/0001/*.jpg")) == [str(folder / "b/0001/2.jpg")]


def test_one_picture_for_each_query(
    train: Callable[..., Done], reid_data: Path, in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder for each person, and names that only say the camera, as in `examples/own_images.py`."""

    class Folders(data.datasets.Market1501):
        def __init__(self, **kwargs: object) -> None:
            super().__init__(**kwargs)
            for mode in ("query", "data"):
                setattr(self, mode, [(self.copied(item[0]), *item[1:]) for item in getattr(self, mode)])

        def copied(self, path: str) -> str:
            if self.mode != "query":
                return path
            name = Path(path).name
            copy = in_folder / "images" / f"person {name[:4]}" / f"cam{name[6]}.jpg"
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
            return str(copy)

    monkeypatch.setitem(vars(data.datasets)["__image_datasets"], "folders", Folders)
    sources = ["data.sources", "['folders']", "data.targets", "['folders']"]
    done = train(*sources, "loss.name", "sn", "test.evaluate", True, "test.visrank", True)
    assert done.code == 0, done.err
    pictures = sorted(Path("log").glob("visrank_folders/*.jpg"))
    images = sorted(Path("images").glob("*/*.jpg"))
    assert len(images) == 16
    assert len({image.name for image in images}) < 16
    assert [picture.stem for picture in pictures] == [f"{image.parent.name}_{image.stem}" for image in images]
    for picture, image in zip(pictures, images):  # a picture begins with its query, in a border
        query = cv2.copyMakeBorder(
            cv2.resize(cv2.imread(str(image)), (32, 64)), 5, 5, 5, 5, cv2.BORDER_CONSTANT, value=(0, 0, 0)
        )
        difference = np.abs(cv2.imread(str(picture))[:, :32].astype(float) - cv2.resize(query, (32, 64)))
        assert difference.mean() < 6  # of JPEG's rounding; other people are more than 15 away


def test_tracklets_whose_frames_have_the_same_names(tmp_path: Path) -> None:
    torchreid_snloss.register()
    items = []
    for person, camera in ((1, 0), (2, 0), (1, 1), (2, 1)):
        frames = tuple(str(tmp_path / f"{camera}/{person}/{frame:04d}.jpg") for frame in range(2))
        for frame in frames:
            Path(frame).parent.mkdir(parents=True, exist_ok=True)
            Path(frame).write_text(f"{frame}")
        items.append((frames, person, camera, 0))
    log = tmp_path / "log"
    utils.visualize_ranked_results(np.eye(2), (items[:2], items[2:]), "video", save_dir=str(log), topk=1)
    assert sorted(path.name for path in log.iterdir()) == ["1_0000", "2_0000"]
    for person in (1, 2):
        shown = [path.read_text() for path in sorted((log / f"{person}_0000/query_top000").iterdir())]
        assert sorted(shown) == list(items[person - 1][0])


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/x.jpg", "b/y.jpg"], ["x", "y"]),
        (["a/x.jpg", "b/x.jpg", "c/y.jpg"], ["a_x", "b_x", "y"]),
        (["1/a/x.jpg", "2/a/x.jpg"], ["1_a_x", "2_a_x"]),
        (["x.jpg", "x.png", "x.jpg"], ["x", "x_2", "x_3"]),
        (["x.jpg", "x.png", "x_2.jpg"], ["x", "x_3", "x_2"]),
        (["a_b.jpg", "a/b.jpg", "c/b.jpg"], ["a_b", "a_b_2", "c_b"]),
        (["a/x.jpg", "A/X.jpg"], ["a_x", "A_X_2"]),
        ([f"{'d' * 150}{n}/{'e' * 150}.jpg" for n in range(2)], ["e" * 150, "e" * 150 + "_2"]),
        ([], []),
    ],
)
def test_distinct_names(paths: list[str], names: list[str]) -> None:
    assert distinct_names(paths) == names
    assert len({name.casefold() for name in names}) == len(names)


def test_ranked_lists_of_paths_whose_bytes_are_no_text(
    train: Callable[..., Done], reid_data: Path, in_folder: Path
) -> None:
    root = os.fsdecode(b"root-\xff")
    shutil.copytree(reid_data, root)
    query = sorted((Path(root) / "market1501/Market-1501-v15.09.15/query").glob("*.jpg"))[0]
    query.rename(query.with_name(os.fsdecode(b"0" + os.fsencode(query.name)[1:-4] + b"\xfe.jpg")))
    save_dir = os.fsdecode(b"log-\xff")
    done = train("test.evaluate", True, "test.visrank", True, "data.root", root, "data.save_dir", save_dir)
    assert done.code == 0, done.err
    pictures = [path.name for path in Path(save_dir, "visrank_market1501").glob("*.jpg")]
    assert len(pictures) == 16
    assert sum("%FE" in name for name in pictures) == 1
