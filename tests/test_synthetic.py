"""The synthetic data sets: the same seed gives the same bytes, in Market-1501 layout, written once."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchreid import data

from torchreid_snloss import SyntheticPedestrians
from torchreid_snloss.data import make_pedestrians, pedestrians


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*.jpg")}


def test_same_bytes_from_the_same_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        make_pedestrians(tmp_path / name, num_train_pids=3, num_test_pids=2, seed=seed)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a") != files(tmp_path / "c")


def test_dataset_is_made_once_and_laid_out_like_market1501(tmp_path: Path) -> None:
    dataset = SyntheticPedestrians(root=str(tmp_path))
    made = files(tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jpg")}
    again = SyntheticPedestrians(root=str(tmp_path), mode="query")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jpg")} == stamps
    assert again.query == dataset.query
    assert not list(tmp_path.glob(".*"))

    assert (dataset.num_train_pids, dataset.num_train_cams) == (120, 6)
    assert (len({item[1] for item in dataset.query}), len(dataset.query), len(dataset.gallery)) == (100, 200, 600)
    assert not {item[1] for item in dataset.query} & {int(Path(item[0]).name[:4]) for item in dataset.train}
    assert all(re.fullmatch(r"\d{4}_c[1-6]s1_\d{6}_00\.jpg", Path(name).name) for name in made)
    with Image.open(dataset.train[0][0]) as image:
        assert image.size == (64, 128)
    # Each query has a match from another camera.
    seen = defaultdict(set)
    for _, pid, camera, _ in dataset.gallery:
        seen[pid].add(camera)
    assert all(seen[pid] - {camera} for _, pid, camera, _ in dataset.query)


def test_torchreids_own_market1501_reads_it(reid_data: Path) -> None:
    manager = data.ImageDataManager(root=str(reid_data), sources="market1501", use_gpu=False, workers=0)
    assert manager.num_train_pids == 16


def test_a_twin_differs_in_one_thing() -> None:
    for seed in range(50):
        rng = np.random.default_rng(seed)
        person = pedestrians.make_person(rng)
        twin = pedestrians.make_twin(person, rng)
        different = {name for name in vars(person) if getattr(person, name) != getattr(twin, name)}
        assert different
        assert different in ({"shoes"}, {"head"}, {"bag"}, {"top_detail"}, {"top", "top_detail"})
        if "top_detail" in different:  # a logo, and nothing else of that colour
            assert (twin.top, person.top in ("plain", "logo"), "cap" in (person.head, twin.head)) == (
                "logo",
                True,
                False,
            )


def test_an_interrupted_start_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("torchreid_snloss.data.synthetic.draw", stop)
    with pytest.raises(KeyboardInterrupt):
        make_pedestrians(tmp_path / "people")
    assert not list(tmp_path.iterdir())


def test_refuses_to_overwrite(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="already exists"):
        make_pedestrians(tmp_path)
