"""Data of one's own: folders of images, modules that register data sets, tests without training images."""

from __future__ import annotations

import csv
import functools
import io
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Done, process_options, run
from PIL import Image
from torchreid import data

from torchreid_snloss import ConfigError, build_datamanager, load_config
from torchreid_snloss.compare import main as compare
from torchreid_snloss.data import FolderOptions, ImageFolder, folder_files, folder_layouts

_STREAM = io.BytesIO()
Image.new("RGB", (8, 16)).save(_STREAM, "JPEG")
JPEG = _STREAM.getvalue()


def write(root: Path, *names: str) -> Path:
    """Writes a small image, or a line of text, under each name."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"text" if path.suffix in (".txt", "") else JPEG)
    return root


def load(root: Path, *options: Any) -> Any:
    """A data manager as the command line builds it."""
    given = ["data.root", root, "data.sources", "['folder']", "data.targets", "['folder']"]
    given += ["data.workers", 0, "train.batch_size", 2, "use_gpu", False, *options]
    return build_datamanager(load_config(options=list(map(str, given))))


def names(items: Any, root: Path) -> list[tuple[str, int, int]]:
    return [(Path(path).relative_to(root).as_posix(), pid, camera) for path, pid, camera, *_ in items]


def splits(datamanager: Any, root: Path) -> list[list[tuple[str, int, int]]]:
    test = datamanager.test_dataset["folder"]
    return [names(items, root) for items in (datamanager.train_loader.dataset.train, test["query"], test["gallery"])]


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """The line about the folder, which is there once."""
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("=> folder ")]
    return line


def table(path: Path, *rows: tuple[str, ...], delimiter: str = ",") -> None:
    with open(path, "w", newline="", encoding="utf-8-sig") as stream:
        csv.writer(stream, delimiter=delimiter).writerows(rows)


MARKET = (
    *(
        "bounding_box_train/0002_c1s1_01.jpg",
        "bounding_box_train/0002_c2s1_01.PNG",
        "bounding_box_train/0007_c1s1_1.jpg",
    ),
    *("query/0003_c1s1_01.jpg", "bounding_box_test/0003_c3s1_01.jpg", "bounding_box_test/-1_c3s1_02.jpg"),
    *("bounding_box_test/0000_c1s1_01.webp", "gt_bbox/0003_c1s1_05.jpg", "bounding_box_test/Thumbs.db.txt"),
)


def test_names_as_in_market1501(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, query, gallery = splits(load(write(tmp_path / "a", *MARKET)), tmp_path / "a")
    assert train == [
        ("bounding_box_train/0002_c1s1_01.jpg", 0, 0),
        ("bounding_box_train/0002_c2s1_01.PNG", 0, 1),
        ("bounding_box_train/0007_c1s1_1.jpg", 1, 0),
    ]
    assert query == [("query/0003_c1s1_01.jpg", 2, 0)]
    assert gallery == [("bounding_box_test/0000_c1s1_01.webp", 0, 0), ("bounding_box_test/0003_c3s1_01.jpg", 2, 2)]
    line = told(capsys)
    assert "names as in Market-1501 in bounding_box_train, query, bounding_box_test: 4 people, 6 images, 3 cam" in line
    assert (
        "2 people to train on, 1 to test on with 1 queries and 2 gallery images; 2 people with a single image" in line
    )
    assert "1 that are no images (.txt)" in line
    assert "1 outside bounding_box_train, query, bounding_box_test" in line
    assert "1 of junk identities" in line
    # Zeros in front don't matter, and an archive's one folder is looked into.
    gallery = splits(load(tmp_path, "data.folder.junk", "['-1', '0']"), tmp_path)[2]
    assert gallery == [("a/bounding_box_test/0003_c3s1_01.jpg", 1, 2)]


PEOPLE = tuple(
    f"{person}/{camera}_{n}.bmp" for person in ("ann", "bob", "cy", "di") for camera in "AB" for n in (9, 10)
)


def test_people_are_split_by_identity(tmp_path: Path) -> None:
    root = write(tmp_path, *PEOPLE)
    options = ("data.folder.camera", "^([AB])_", "data.folder.test_fraction", 0.5)
    train, query, gallery = splits(load(root, *options), root)
    people = {name.split("/")[0] for name, *_ in train}, {name.split("/")[0] for name, *_ in gallery}
    assert (len(people[0]), len(people[1]), len(people[0] & people[1])) == (2, 2, 0)
    assert (len(train), len(gallery)) == (8, 8)
    # The first image of each camera is a query: 9 comes before 10.
    assert {name.split("/")[1] for name, *_ in query} == {"A_9.bmp", "B_9.bmp"}
    assert len(query) == 4
    assert {(Path(name).name[0], camera) for name, _, camera in train + query + gallery} == {("A", 0), ("B", 1)}
    assert splits(load(root, *options), root) == [train, query, gallery]
    others = [splits(load(root, *options, "data.split_id", seed), root) for seed in range(1, 6)]
    assert any(other != train for other, _, _ in others)
    # A comparison over several splits takes the same number for the same person.
    numbers = {(name.split("/")[0], pid) for _, query, gallery in others for name, pid, _ in query + gallery}
    assert len(numbers) == len({person for person, _ in numbers}) == 4


def test_without_cameras_a_query_is_compared_with_all_other_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write(tmp_path, *PEOPLE, "eve/1.jpg", ".hidden/1.jpg", "cover.png")
    datamanager = load(root, "data.val_fraction", 0.3, "train.seed", 2)
    line = told(capsys)
    assert "a folder for each person: 5 people, 17 images, no camera known: each image counts as a camera" in line
    assert "1 people with a single image" in line
    assert "1 hidden" in line
    assert "1 in no person's folder" in line
    query, gallery = (datamanager.test_dataset["folder"][name] for name in ("query", "gallery"))
    assert len(query) == len(gallery) == 8
    for path, pid, camera, *_ in query:
        valid = [other for other, p, c, *_ in gallery if p == pid and c != camera]
        assert len(valid) == 3
        assert path not in valid
    # So are held-out people, of whom one is tested on.
    held_out = datamanager.test_dataset["validation"]["query"]
    assert len({camera for _, _, camera, *_ in held_out}) == len(held_out)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layout": "persons"}, "layout must be one of 'auto', 'market', 'people', 'csv', got 'persons'"),
        ({"junk": "-1"}, "junk must be a tuple of names, got '-1'"),
        ({"test_fraction": 1.0}, "test_fraction must be below 1, got 1.0"),
        ({"test_fraction": "0.3"}, "test_fraction must be a number, got '0.3'"),
        ({"camera": "c("}, "a regular expression with one group, the camera, got 'c('"),
        ({"camera": r"c\d"}, "a regular expression with one group, the camera, got "),
    ],
)
def test_wrong_options_are_told(options: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(words)):
        FolderOptions(**options)


def test_one_camera_for_all_is_as_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = ("train/1", "train/2", "query/3", "gallery/3")
    root = write(tmp_path, *(f"{folder}/cam1_{n}.jpg" for folder in folders for n in range(2)))
    _, query, gallery = splits(load(root), root)
    assert "1 camera, but nobody to test on is seen by two: each image counts as a camera of its own" in told(capsys)
    assert not {camera for *_, camera in query} & {camera for *_, camera in gallery}


@pytest.mark.parametrize("delimiter", [",", ";"])
def test_a_csv_file(tmp_path: Path, delimiter: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "x/1.jpg", "x/2.jpg", "x/3.jpg", "x/4.jpg", "x/5.tif")
    rows = [("x/1.jpg", "a", "left", "train"), ("x/2.jpg", "b", "left", "train"), ("x/3.jpg", "c", "left", "query")]
    rows += [("x/4.jpg", "c", "right", "test"), ("x/5.tif", "c", "left", "gallery"), ("", "c", "left", "train")]
    table(tmp_path / "labels.csv", ("Image", "PID", "camera", "split"), *rows, delimiter=delimiter)
    table(tmp_path / "other.csv", ("time", "place"), ("1", "2"))
    train, query, gallery = splits(load(tmp_path), tmp_path)
    assert train == [("x/1.jpg", 0, 0), ("x/2.jpg", 1, 0)]
    assert query == [("x/3.jpg", 2, 0)]
    assert gallery == [("x/4.jpg", 2, 1), ("x/5.tif", 2, 0)]
    line = told(capsys)
    assert "the CSV file labels.csv (path in Image, identity in PID): 3 people, 5 images, 2 cameras" in line
    assert line.endswith("files left out: 1 in rows without path or identity")


@pytest.mark.parametrize("file", ["in/labels.csv", "labels.csv", "in/labels.CSV"])
def test_a_csv_file_is_found(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write(tmp_path, *(f"in/x/day{n % 2}/{n}.jpg" for n in range(12)))
    folder = "in/" * (file == "labels.csv")
    rows = [(f"{folder}x/day{n % 2}/{n}.jpg", str(n // 3)) for n in range(12)]
    table(root / file, ("path", "id"), *rows)
    (root / file).with_name("old.csv").mkdir()
    load(root)
    assert f"the CSV file {Path(file).name} (identity in id): 4 people, 12 images" in told(capsys)


def test_a_csv_file_without_the_columns_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write(tmp_path, *PEOPLE)
    for name in ("a.csv", "b.csv"):
        table(root / name, ("path", "name"))
    load(root)
    assert "a folder for each person (no columns for path and identity in a.csv and 1 more): 4 people" in told(capsys)


def test_a_person_may_have_the_name_of_a_split(tmp_path: Path) -> None:
    root = write(tmp_path, *PEOPLE, "Val/A_1.bmp")
    with pytest.raises(ConfigError, match=r"with Val has no gallery images.* set data\.folder\.layout people"):
        load(root)
    assert len(load(root, "data.folder.layout", "people").train_loader.dataset.train)


def test_numbers_of_the_same_value_have_one_order(tmp_path: Path) -> None:
    identities = ["1", "01", "001", "10" * 3000, "9", "09"]
    rows = [(f"{n}.jpg", name, split) for name in identities for n, split in enumerate(["train", "query", "test"])]
    write(tmp_path, *(name for name, *_ in rows))
    for given in (rows, rows[::-1]):
        table(tmp_path / "a.csv", ("path", "id", "split"), *given)
        found = folder_layouts.read_folder(str(tmp_path), "auto", "none", ["-1"]).images
        order = sorted({image.identity for image in found}, key=folder_files.natural_order)
        assert order == ["001", "01", "1", "09", "9", identities[3]]
    assert folder_files.natural_order("a01b") < folder_files.natural_order("a1b")
    assert folder_files.natural_order("a1b") < folder_files.natural_order("a02b")


def test_what_a_run_wrote_is_no_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write(tmp_path, *PEOPLE)
    before = splits(load(root), root)
    told(capsys)
    write(root, "log/mine/train.log-2026", "log/mine/visrank_folder/1.jpg", "log/test/test.log", "log/test/a/2.jpg")
    write(root, "visrank_folder/3.jpg", "synthetic-v1/x/0002_c1s1_000001_01.jpg", "log/a.txt")
    assert splits(load(root), root) == before
    assert "6 that a run wrote, 1 that are no images (.txt)" in told(capsys)
    alone = write(tmp_path / "b", *(f"images/{name}" for name in PEOPLE), "log/train.log")
    capsys.readouterr()
    assert [len(items) for items in splits(load(alone), alone)] == [len(items) for items in before]
    told(capsys)
    # A data.save_dir that is the data root itself.
    write(alone, "train.log", "model/model.pth.tar-1", "record/record.json")
    for _ in range(2):
        load(alone, "data.outliers", 0.5, "data.save_dir", alone)
        assert ": 4 people, 16 images" in told(capsys)


@pytest.mark.parametrize("more", ["__MACOSX/ann/._1.jpg", "annotations/a.txt", "log/mine/train.log", "empty/in/"])
def test_an_archive_with_a_folder_without_images(more: str, tmp_path: Path) -> None:
    root = write(tmp_path / "plain", *PEOPLE)
    other = write(tmp_path / "other", *(f"images/{name}" for name in PEOPLE))
    if more.endswith("/"):
        (other / more).mkdir(parents=True)
    else:
        write(other, more)
    assert splits(load(other), other / "images") == splits(load(root), root)


def test_training_images_beside_an_empty_test_set_are_not_split(tmp_path: Path) -> None:
    root = write(tmp_path, *(f"train/p{n}/c{camera}_1.jpg" for n in range(10) for camera in (1, 2)), "test/readme.txt")
    with pytest.raises(ConfigError, match="has no gallery images"):
        load(root)


def test_a_table_in_a_folder_without_images(tmp_path: Path) -> None:
    root = write(tmp_path, *(f"x/{n}.jpg" for n in range(12)))
    (root / "b/lists").mkdir(parents=True)
    table(root / "b/lists/l.csv", ("path", "pid"), *((f"../../x/{n}.jpg", f"{n % 4}") for n in range(12)))
    assert len(splits(load(root, "data.folder.path", "b"), root / "b")[0]) == 9


def test_more_people_leave_those_to_test_on_as_they_are(tmp_path: Path) -> None:
    files = [f"p{n}/{camera}_{k}.jpg" for n in range(40) for camera in ("c1", "c2") for k in range(2)]
    root = write(tmp_path, *files)

    def tested() -> set[str]:
        return {name.split("/")[0] for name, *_ in splits(load(root), root)[2]}

    before = tested()
    assert len(before) == 12
    for n in (100, 101, 102):
        write(root, f"p{n}/c1_1.jpg", f"p{n}/c2_1.jpg")
    after = tested()
    assert len(after) == 13
    assert len(before - after) <= 3  # each new one may take a place
    assert splits(load(root, "data.split_id", 1), root)[2] != splits(load(root), root)[2]


def test_endings_of_what_pillow_can_not_read_are_no_images() -> None:
    assert all(map(folder_files.is_image, ("a.JPG", "a.png", "a.webp", "a.tif", "a.bmp")))
    assert not any(map(folder_files.is_image, ("a.h5", "a.hdf", "a.grib", "a.bufr", "a.wmf", "a.mpg", "a.txt", "jpg")))


def test_the_column_of_people_comes_before_one_of_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write(tmp_path, *(f"x/{n}.jpg" for n in range(12)), *(f"x/{n}_mask.png" for n in range(12)))
    rows = [(str(n), f"x/{n}.jpg", f"p{n % 4}", f"{n % 3}") for n in range(12)]
    table(root / "export.csv", ("id", "image_path", "person_id", "camera_id"), *rows)
    load(root)
    out = capsys.readouterr().out
    assert (
        "the CSV file export.csv (path in image_path, identity in person_id, camera in camera_id): "
        "4 people, 12 images, 3 cameras" in out
    )
    assert "are left out: the data set reads" not in out  # it reads what the file names


def test_a_split_without_queries_draws_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    people = {"train": "ab", "val": "a", "test": "bcd"}
    root = write(
        tmp_path, *(f"{split}/{p}/{n}_c{n}.jpg" for split, of in people.items() for p in of for n in (1, 2, 2.5))
    )
    train, query, gallery = splits(load(root), root)
    assert (len(train), len(query), len(gallery)) == (6, 6, 9)
    line = told(capsys)
    assert (
        "3 to test on with 6 queries and 9 gallery images; 0 people with a single image; 1 people to test on are"
        in line
    )
    assert "3 outside train, test" in line


def test_combining_all_images_takes_each_image_and_person_once(tmp_path: Path) -> None:
    root = write(tmp_path / "people", *PEOPLE)
    train = load(root, "data.combineall", True).train_loader.dataset.train
    assert sorted(name for name, *_ in names(train, root)) == sorted(PEOPLE)
    assert len({pid for _, pid, *_ in train}) == 4
    # A person in both parts has one label, and one who is in no gallery is trained on, too.
    files = ("train/a/1.jpg", "train/b/1.jpg", "query/b/2.jpg", "query/c/1.jpg", "gallery/b/3.jpg", "gallery/d/1.jpg")
    root = write(tmp_path / "parts", *files)
    train = names(load(root, "data.combineall", True).train_loader.dataset.train, root)
    assert sorted(name for name, *_ in train) == sorted(files)
    assert len({(name.split("/")[1], pid) for name, pid, _ in train}) == len({pid for _, pid, _ in train}) == 4


def test_combining_all_images_leaves_out_distractors_and_numbers_each_image(tmp_path: Path) -> None:
    root = write(tmp_path / "market", *MARKET)
    train = names(load(root, "data.combineall", True).train_loader.dataset.train, root)
    assert not [name for name, *_ in train if Path(name).name.startswith(("0000", "-1"))]
    assert {Path(name).name[:4] for name, *_ in train} == {"0002", "0003", "0007"}
    # A person who is called 0 and has queries is a person.
    root = write(tmp_path / "people", *(name.replace("ann", "0") for name in PEOPLE))
    train = names(load(root, "data.combineall", True).train_loader.dataset.train, root)
    assert len({pid for _, pid, _ in train}) == 4
    # Without cameras, none of an identity's images share a number, by which a validation would leave them out.
    files = [f"{split}/{p}/{n}.jpg" for split, n in (("train", 1), ("test", 2), ("test", 3)) for p in "abc"]
    root = write(tmp_path / "parts", *files)
    train = names(load(root, "data.combineall", True).train_loader.dataset.train, root)
    assert len(train) == len({camera for *_, camera in train}) == 9


def test_a_target_needs_no_training_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write(tmp_path / "source", *PEOPLE)
    other = write(tmp_path / "target", "query/a/1.jpg", "gallery/a/2.jpg", "gallery/b/1.jpg")
    dataset = functools.partial(ImageFolder, options=FolderOptions(path=str(other)))
    monkeypatch.setitem(vars(data.datasets)["__image_datasets"], "target", dataset)
    datamanager = load(root, "data.targets", "['target']")
    assert [name for name, *_ in names(datamanager.test_dataset["target"]["query"], other)] == ["query/a/1.jpg"]
    assert len(datamanager.test_loader["target"]["gallery"].dataset) == 2
    assert "0 people to train on, 1 to test on" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="target' has no training images"):
        load(root, "data.sources", "['folder', 'target']", "data.targets", "['folder']")


def mixed(root: Path) -> None:
    write(root, "1.jpg", "2.jpg", "ann/1.jpg")


def bad_split(root: Path) -> None:
    table(root / "a.csv", ("path", "id", "split"), ("x/1.jpg", "a", "train"), ("x/2.jpg", "a", "valid"))


def some_cells(root: Path) -> None:
    rows = [(f"{name}/cam1_1.jpg", name, camera) for name, camera in (("a", "cam1"), ("b", ""), ("c", "cam2"))]
    table(root / "a.csv", ("path", "id", "camera"), *rows)


def one_quote(root: Path) -> None:
    (root / "a.csv").write_text('path,id\n1.jpg,a\n"2.jpg,a\n3.jpg,b\n4.jpg,b\n')


def broken_link(root: Path) -> None:
    write(root, *PEOPLE)
    (root / "ann/A_11.bmp").symlink_to("nowhere.bmp")


WRONG: Mapping[str, tuple[Callable[[Path], Any], list[Any], str]] = {
    "missing": (lambda root: None, ["data.folder.path", "nowhere"], "there is no folder '"),
    "empty": (lambda root: write(root, "a.txt"), [], r"no images found in .*: 1 that are no images \(\.txt\)"),
    "mixed": (mixed, [], "has 2 images directly in it, such as '.*, of which 0 have names as .*, and 1 in sub-folders"),
    "some cameras": (
        lambda root: write(root, "a/cam1_1.jpg", "b/2.jpg"), [], "1 of 2 images have no camera in their name, such as "
    ),
    "two people": (lambda root: write(root, "a/1.jpg", "a/2.jpg", "b/1.jpg"), [], "has 2 people, of whom 1 have two"),
    "fraction": (
        lambda root: write(root, *PEOPLE), ["data.folder.test_fraction", 0.8],
        r"data\.folder\.test_fraction 0\.8 leaves 1 to train on and 3 to test on; at least 2 and 1 are needed",
    ),
    "no pairs": (lambda root: write(root, "a/1.jpg", "b/2.jpg", "c/3.jpg"), [], "it has 3 people, of whom 0 have two"),
    "no training": (
        lambda root: write(root, "query/a_c1.jpg", "gallery/a_c2.jpg"), [], "has no training images: put them into"
    ),
    "no pair to test on": (
        lambda root: write(root, "train/a/1.jpg", "train/b/1.jpg", "test/c/1.jpg", "test/d/1.jpg"), [],
        "has no query images, since nobody to test on has two images to compare",
    ),
    "no gallery": (
        lambda root: table(root / "a.csv", ("path", "id", "split"), ("x/1.jpg", "a", "train"), ("2.jpg", "b", "query")),
        [], r"has no gallery images: put them into a folder gallery \(in a CSV file: the split gallery\)",
    ),
    "broken link": (broken_link, [], "1 of its files do not exist, the first is '.*/ann/A_11.bmp'"),
    "two csv": (
        lambda root: [table(root / f"{name}.csv", ("path", "id")) for name in "ab"], [],
        r"has 2 CSV files with columns for path and identity, a\.csv, b\.csv: name one with data\.folder\.path",
    ),
    "csv with another layout": (
        lambda root: table(root / "a.csv", ("path", "id")),
        ["data.folder.path", "a.csv", "data.folder.layout", "market"],
        r"a\.csv' is a file, but data\.folder\.layout market needs a folder",
    ),
    "csv of other columns": (
        lambda root: [write(root, "x/1.jpg", "y/1.jpg"), table(root / "a.csv", ("path", "name"))], [],
        r"a folder for each person \(no columns for path and identity in a\.csv\), can't be split",
    ),
    "train and val": (
        lambda root: write(root, "train/a/1.jpg", "val/b/1.jpg", "more/c/1.jpg"), [],
        "with train, val has no gallery images: put them into a folder gallery, or don't split it at all",
    ),
    "train and query": (
        lambda root: write(root, "train/a/1.jpg", "Query/b/1.jpg"), ["data.folder.layout", "people"],
        "with Query, train has no gallery images",
    ),
    "test and val": (lambda root: write(root, "test/a/1.jpg", "val/b/1.jpg"), [], "with test, val has no query images"),
    "query within test": (
        lambda root: write(root, "train/a/1.jpg", "train/b/1.jpg", "test/query/c/1.jpg", "test/gallery/c/2.jpg"), [],
        "has gallery, query within train, test: put the folders train, query and gallery beside each other",
    ),
    "cameras": (
        lambda root: write(root, *(f"cam{n % 3}/000{n}_c{n % 3}s1_0{n}.jpg" for n in range(9))), [],
        "has the folders cam0, cam1, cam2, which are named as cameras are: set data.folder.layout to people",
    ),
    "flat tests": (
        lambda root: write(root, *(f"train/{n % 3}/{n}.jpg" for n in range(60)), "query/1_c1.jpg", "gallery/1_c2.jpg"),
        [], "has no gallery images: .*; files left out: 2 in no person's folder",
    ),
    "no csv": (mixed, ["data.folder.layout", "csv"], r"has no CSV file with a column for path \(path, image"),
    "csv column": (
        lambda root: table(root / "a.csv", ("path", "name")), ["data.folder.path", "a.csv"], "no column for identity"
    ),
    "some cells": (some_cells, [], "1 of 3 images have no camera in the CSV file, such as '.*b/cam1_1.jpg'"),
    "one quote": (one_quote, [], r"a.csv' can't be read after row \d: unexpected end of data"),
    "csv split": (bad_split, [], "row 3: a split must be train, query or gallery, got 'valid'"),
    "no such file": (
        lambda root: table(root / "a.csv", ("path", "id"), *((f"{n}.jpg", str(n // 2)) for n in range(6))), [],
        "4 of its files do not exist",
    ),
    "unmatched": (
        lambda root: write(root, *PEOPLE), ["data.folder.camera", "lens(.)"],
        "no images found in .*; files left out: 16 that data.folder.camera does not match",
    ),
    "video": (mixed, ["data.type", "video"], "data.sources: there is no video data set 'folder', only mars"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_what_can_not_be_read_is_one_error(kind: str, tmp_path: Path) -> None:
    make, options, words = WRONG[kind]
    make(tmp_path)
    with pytest.raises(ConfigError, match=words) as raised:
        load(tmp_path, *options)
    assert "\n" not in str(raised.value)


def results(done: Done) -> list[str]:
    """The last results table."""
    assert done.code == 0, done.err
    return re.findall(r"^(?:mAP|Rank-).*$", done.out[done.out.rindex("** Results **") :], re.MULTILINE)


def test_a_test_needs_no_training_images(
    train: Callable[..., Done], reid_data: Path, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    market = reid_data / "market1501"
    folder = ["data.sources", "['folder']", "data.targets", "['folder']", "data.root"]
    trained = train("loss.name", "sn", "train.max_epoch", 1, *folder, market)
    only_test = shutil.copytree(market, in_folder / "root/market1501")
    (training,) = only_test.rglob("bounding_box_train")
    shutil.rmtree(training)
    test = ["loss.name", "sn", "test.evaluate", True]
    weights = ["model.load_weights", "log/model/model.pth.tar-1"]
    for done, missing in (
        (train(*test, *weights, *folder, only_test), "folder"),
        (train(*test, "model.resume", "auto", *folder, only_test), "folder"),
        (train(*test, *weights, "data.root", only_test.parent), "market1501"),
        (train(*test, *weights, *folder, only_test, "data.sources", "['viper']"), "folder"),
    ):
        assert results(done) == results(trained)
        assert f"=> the training images of {missing} are not loaded: a test does not need them" in done.out
        assert "Layers that differ" not in done.out  # the classifier has the checkpoint's size
    # Training does need them.
    done = train("loss.name", "sn", "data.root", only_test.parent)
    assert done.code == 2
    assert 'bounding_box_train" is not found' in done.err


MODULE = """
import os
from torchreid import data

class Own(data.ImageDataset):
    def __init__(self, root="", **kwargs):
        images = sorted(os.listdir(os.path.join(root, "images")))
        items = [(os.path.join(root, "images", name), int(name[0]), int(name[2])) for name in images]
        super().__init__(items, items, items, **kwargs)

data.register_image_dataset({name!r}, Own)
"""


@pytest.fixture
def own(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], list[str]]:
    """Writes a module that registers a data set, and returns the options that use it: `own(module, data set)`."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    rng = np.random.default_rng(0)
    (in_folder / "images").mkdir()
    for number in range(32):
        image = Image.fromarray(rng.integers(256, size=(16, 8, 3), dtype=np.uint8))
        image.save(in_folder / f"images/{number % 4}_{number // 4 % 2}_{number}.png")

    def make(module: str, name: str) -> list[str]:
        path = in_folder / module
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(MODULE.format(name=name))
        return ["data.root", ".", "data.sources", f"['{name}']", "data.targets", f"['{name}']", "loss.name", "sn"]

    return make


def test_modules_register_data_sets(
    own: Callable[[str, str], list[str]], command_line: Callable[..., Done], tiny_model: None
) -> None:
    from conftest import tiny_options

    small = tiny_options("train.max_epoch", 1, "train.batch_size", 8)
    options = own("elsewhere/own_set_a.py", "own_a")
    done = command_line(*small, *options)
    assert done.code == 2
    assert "data.sources: there is no image data set 'own_a', only market1501, cuhk03," in done.err
    assert "register_image_dataset('own_a', ...) in a Python file and name it: data.modules my_data.py" in done.err
    for _ in range(2):
        done = command_line(*small, *options, "data.modules", "elsewhere/own_set_a.py")
        assert done.code == 0, done.err
        assert re.search(r"^  train .* own_a$", done.out, re.MULTILINE)
    own("own_set_b.py", "own_b")
    options = own("own_set_c.py", "own_c")
    assert command_line(*small, *options, "data.modules", "['own_set_b', 'own_set_c']").code == 0


@pytest.mark.parametrize("command", [["torchreid_snloss"], ["torchreid_snloss.inference.features", "--images", "."]])
def test_a_module_that_takes_a_name_of_this_package_is_an_error(
    command: list[str], own: Callable[[str, str], list[str]], in_folder: Path
) -> None:
    options = (*own("own_folder.py", "folder"), "data.modules", "own_folder.py", "model.pretrained", "True")
    done = run("-m", *command, *process_options(*options), cwd=in_folder)
    assert done.returncode == 2
    assert "can't import 'own_folder.py': ValueError: The given name already exists" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_damaged_image_of_an_own_data_set_ends_the_run(own: Callable[[str, str], list[str]], in_folder: Path) -> None:
    options = [*own("own_reader.py", "own_reader"), "data.modules", "own_reader.py"]
    module = in_folder / "own_reader.py"
    # As torchreid's documentation has it, the name is imported from torchreid.
    reader = "from torchreid.reid.utils import read_image\nfrom torchreid.reid.utils.tools import read_image as same\n"
    reader += "assert read_image is same\nread_image('damaged.jpg')\n"
    module.write_text(reader + module.read_text())
    (in_folder / "damaged.jpg").write_bytes(JPEG[:-200])
    done = run("-m", "torchreid_snloss", *process_options(*options), cwd=in_folder)
    assert done.returncode == 2
    assert "can't read the image 'damaged.jpg'" in done.stderr
    assert "Will redo" not in done.stdout


@pytest.mark.parametrize(
    ("module", "text", "words"),
    [
        ("none.py", None, "data.modules: there is no file 'none.py'"),
        ("no_such_module", None, "data.modules: can't import 'no_such_module': ModuleNotFoundError: No module named"),
        ("own_broken.py", "x = 1\ny = unknown\n", "NameError: name 'unknown' is not defined (own_broken.py, line 2)"),
        ("own_syntax.py", "x = (\n", "can't import 'own_syntax.py': SyntaxError: '(' was never closed"),
        ("own_import.py", "x = 1\nimport no_such\n", "No module named 'no_such' (own_import.py, line 2)"),
        ("own_exit.py", "import sys\nsys.exit()\n", "can't import 'own_exit.py': SystemExit (own_exit.py, line 2)"),
        ("json.py", "", "'json.py' has the name of another module, "),
        ("my.data.py", "", "a module's file must have no dots in its name but in .py, got 'my.data.py'"),
    ],
)
def test_a_module_that_can_not_be_imported(
    module: str, text: str | None, words: str, own: Any, command_line: Callable[..., Done], in_folder: Path
) -> None:
    if text is not None:
        (in_folder / module).write_text(text)
    done = command_line("data.modules", module)
    assert done.code == 2
    assert len(done.err.splitlines()) == 1
    assert words in done.err


def test_a_data_set_that_ends_the_process_is_an_error(
    own: Callable[[str, str], list[str]], command_line: Callable[..., Done], in_folder: Path
) -> None:
    options = own("own_ending.py", "own_ending")
    text = Path("own_ending.py").read_text()
    Path("own_ending.py").write_text(text.replace("        super()", "        raise SystemExit(0)\n        super()"))
    done = command_line(*options, "data.modules", "own_ending.py")
    assert done.code == 2
    assert "error: can't load the data (data.sources ['own_ending']" in done.err


@pytest.mark.slow
def test_workers_that_are_spawned_find_the_modules_classes(
    own: Callable[[str, str], list[str]], in_folder: Path
) -> None:
    (in_folder / "sitecustomize.py").write_text("import multiprocessing\nmultiprocessing.set_start_method('spawn')\n")
    options = own("elsewhere/own_spawned.py", "own_spawned")
    small = process_options("train.max_epoch", 1, "train.batch_size", 8, "data.workers", 1, "test.ranks", "[1]")
    command = ["-m", "torchreid_snloss", *small, *options, "data.modules", "elsewhere/own_spawned.py"]
    done = run(*command, cwd=in_folder, path=in_folder)
    assert done.returncode == 0, done.stderr
    assert "mAP:" in done.stdout


@pytest.mark.compare
def test_the_runs_of_a_comparison_import_the_modules(
    own: Callable[[str, str], list[str]], in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    options = own("own_compared.py", "own_compared")
    small = process_options("train.max_epoch", 1, "train.batch_size", 8, "test.ranks", "[1]", "use_gpu", "False")
    rows = ["--losses", "sn", "--baselines", "none", "--seeds", "1"]
    assert compare([*rows, *small, *options[:-2], "data.modules", "own_compared.py"]) == 0
    assert (in_folder / "log/compare/plain/results.csv").is_file()
