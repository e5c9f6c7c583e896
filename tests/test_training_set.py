"""Changes to the training set: fewer identities, wrong labels and outliers."""

from __future__ import annotations

import collections
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import torchreid_snloss
from torchreid_snloss import ConfigError, build_datamanager, load_config
from torchreid_snloss.data import add_label_noise, add_outliers
from torchreid_snloss.settings import resolve

ITEMS = [(f"{pid}_{image}.jpg", pid, image % 3, 0) for pid in range(12) for image in range(5)]


@pytest.mark.parametrize("share", [0.1, 0.25, 0.8])
def test_label_noise_changes_the_given_share(share: float) -> None:
    noisy = add_label_noise(ITEMS, share, seed=1)
    changed = [after[1] for before, after in zip(ITEMS, noisy) if before[1] != after[1]]
    assert len(changed) == round(share * len(ITEMS))
    assert [(item[0], *item[2:]) for item in noisy] == [(item[0], *item[2:]) for item in ITEMS]
    own = {after[1] for before, after in zip(ITEMS, noisy) if before[1] == after[1]}
    assert own == set(range(12))  # each identity keeps one of its images
    assert noisy == add_label_noise(ITEMS, share, seed=1)
    assert noisy != add_label_noise(ITEMS, share, seed=2)


def test_label_noise_draws_all_other_identities_equally_often() -> None:
    items = [(f"{pid}_{image}", pid, 0, 0) for pid in range(4) for image in range(5000)]
    given = collections.Counter((a[1], b[1]) for a, b in zip(items, add_label_noise(items, 0.5, seed=3)) if a != b)
    assert set(given) == {(a, b) for a in range(4) for b in range(4) if a != b}
    # 10,000 draws over 12 pairs give 833 each, with a standard deviation of 28.
    assert all(abs(number - 10000 / 12) < 150 for number in given.values())


def test_label_noise_must_leave_each_identity_an_image() -> None:
    with pytest.raises(
        ValueError, match=r"data.label_noise 0.9 would change the labels of 54 of 60 images, but at most 48 can change"
    ):
        add_label_noise(ITEMS, 0.9, seed=1)


def test_label_noise_needs_another_identity() -> None:
    with pytest.raises(ValueError, match=r"data.label_noise 0.2 needs at least 2 training identities, got 1"):
        add_label_noise(ITEMS[:5], 0.2, seed=1)


def _datamanager(reid_data: Path, folder: Path, *options: Any) -> Any:
    own = ["data.root", str(reid_data), "data.sources", ["market1501"], "data.targets", ["market1501"]]
    own += ["data.workers", 0, "train.batch_size", 8, "data.save_dir", str(folder), "use_gpu", False]
    cfg = load_config(str(ROOT / "configs/small.yaml"), [*own, *options])
    torchreid_snloss.register()
    resolve(cfg)
    return build_datamanager(cfg)


def test_train_fraction_keeps_identities_whole(reid_data: Path, tmp_path: Path) -> None:
    whole = _datamanager(reid_data, tmp_path)
    some = _datamanager(reid_data, tmp_path, "data.train_fraction", 0.25)
    assert (whole.num_train_pids, some.num_train_pids) == (16, 4)
    images = collections.defaultdict(set)
    for path, pid, *_ in whole.train_loader.dataset.train:
        images[pid].add(path)
    kept = collections.defaultdict(set)
    for path, pid, *_ in some.train_loader.dataset.train:
        kept[pid].add(path)
    assert sorted(kept) == [0, 1, 2, 3]
    assert all(paths in images.values() for paths in kept.values())
    assert {int(pid) for batch in some.train_loader for pid in batch["pid"]} == {0, 1, 2, 3}
    assert len(some.test_loader["market1501"]["query"].dataset) == len(whole.test_loader["market1501"]["query"].dataset)


def test_outliers_are_patches_of_their_images(reid_data: Path, tmp_path: Path) -> None:
    datamanager = _datamanager(reid_data, tmp_path, "data.outliers", 0.1, "data.val_fraction", 0.25)
    items = datamanager.train_loader.dataset.data
    patches = [item for item in items if item[0].startswith(str(tmp_path / "outliers"))]
    assert len(patches) == round(0.1 * len(items))
    folder = reid_data / "market1501/Market-1501-v15.09.15/bounding_box_train"
    for path, *_ in patches:
        source = folder / (os.path.basename(path).split("_", 2)[2].removesuffix(".png") + ".jpg")
        with Image.open(source) as before, Image.open(path) as after:
            assert before.size == after.size
            quarter = tuple(side // 4 for side in before.size)
            small = np.asarray(after.resize(quarter, Image.Resampling.BOX), dtype=float)
            image = np.asarray(before.convert("RGB"), dtype=float)
        # The patch is somewhere in the image, up to the error of resizing.
        height, width, _ = small.shape
        nearest = min(
            np.abs(image[top : top + height, left : left + width] - small).mean()
            for top in range(image.shape[0] - height + 1)
            for left in range(image.shape[1] - width + 1)
        )
        assert nearest < 8
    validation = datamanager.test_dataset["validation"]
    assert not any("outliers" in item[0] for split in validation.values() for item in split)


def test_outliers_of_images_with_long_names(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}{number}.png" for number in (1, 2) for name in ("x" * 248, "é" * 124)]
    for path in paths:
        Image.new("RGB", (8, 16)).save(path)
    changed = add_outliers([(str(path), 0, 0, 0) for path in paths], 1.0, 1, tmp_path / "outliers")
    assert len({path for path, *_ in changed}) == len(list((tmp_path / "outliers").iterdir())) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["data.train_fraction", 0], "data.train_fraction must be above 0 and at most 1; got data.train_fraction 0.0"),
        (
            ["data.train_fraction", 0.05],
            "data.train_fraction 0.05 would keep 1 of 16 training identities",
        ),
        (
            ["data.val_fraction", 0.95],
            "data.val_fraction 0.95 would hold out 15 of 16 training identities, but at least 1 must be held out",
        ),
        (["data.label_noise", 1], "data.label_noise must be at least 0 and below 1; got data.label_noise 1.0"),
        (["data.outliers", -0.1], "data.outliers must be at least 0 and at most 1; got data.outliers -0.1"),
    ],
)
def test_an_impossible_share_is_refused(options: list[Any], message: str, reid_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        _datamanager(reid_data, tmp_path, *options)
    assert message in str(raised.value)


@pytest.mark.parametrize("alone", [False, True])
def test_all_images_of_the_held_out_are_queries(reid_data: Path, tmp_path: Path, alone: bool) -> None:
    whole = _datamanager(reid_data, tmp_path).train_loader.dataset.train
    datamanager = _datamanager(reid_data, tmp_path, "data.val_fraction", 0.25, "test.held_out_only", alone)
    kept = {item[0] for item in datamanager.train_loader.dataset.train}
    held_out = sorted(item[0] for item in whole if item[0] not in kept)
    assert list(datamanager.test_loader) == ["validation"] + ["market1501"] * (not alone)
    for mode in ("query", "gallery"):
        images = [path for batch in datamanager.test_loader["validation"][mode] for path in batch["impath"]]
        assert sorted(images) == held_out


def _held_out(reid_data: Path, folder: Path, *options: Any) -> list[str]:
    """The numbers of the people that are held out, by the names of their images."""
    datamanager = _datamanager(reid_data, folder, "test.ranks", [1], *options)
    kept, held_out = (
        {os.path.basename(item[0])[:4] for item in items}
        for items in (datamanager.train_loader.dataset.train, datamanager.test_dataset["validation"]["query"])
    )
    assert not kept & held_out
    assert len(kept) == datamanager.num_train_pids == 16 - len(held_out)
    return sorted(held_out)


@pytest.mark.parametrize(("fraction", "folds"), [(0.25, 4), (0.3, 3)])
def test_the_folds_hold_out_disjoint_shares(fraction: float, folds: int, reid_data: Path, tmp_path: Path) -> None:
    first = _held_out(reid_data, tmp_path, "data.val_fraction", fraction)
    shares = [
        _held_out(reid_data, tmp_path, "data.val_fraction", fraction, "data.val_fold", fold) for fold in range(folds)
    ]
    assert shares[0] == first
    people = [person for share in shares for person in share]
    assert len(people) == len(set(people)) == round(folds * fraction * 16)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_first_fold_is_what_was_held_out_before_there_were_folds(reid_data: Path, tmp_path: Path) -> None:
    assert _held_out(reid_data, tmp_path, "data.val_fraction", 0.25) == ["0003", "0005", "0007", "0010"]


def test_a_fold_without_anybody_is_refused(reid_data: Path, tmp_path: Path) -> None:
    options = ("data.val_fraction", 0.05, "data.val_fold")  # 0.8 of a person
    assert [len(_held_out(reid_data, tmp_path, *options, fold)) for fold in (0, 1)] == [1, 1]
    with pytest.raises(ConfigError, match=r"val_fraction 0\.05 and data\.val_fold 2 would hold out 0 of 16 training"):
        _datamanager(reid_data, tmp_path, *options, 2)
