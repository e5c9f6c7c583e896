"""Multi-query evaluation in Market-1501 layout, with its folder `gt_bbox` of hand-drawn boxes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Done, Tiny, extracted_splits, make_datamanager, make_engine
from PIL import Image

from torchreid_snloss import ImageSNEngine
from torchreid_snloss.checks import check_datamanager
from torchreid_snloss.config import ConfigError, load_config
from torchreid_snloss.evaluation import rank_gallery


@pytest.fixture
def with_boxes(reid_data: Path, tmp_path: Path) -> Path:
    """Adds two images of the identity and the camera of each of the first 11 of 16 queries, and some of no query."""
    shutil.copytree(reid_data / "market1501", tmp_path / "market1501")
    folder = tmp_path / "market1501/Market-1501-v15.09.15"
    (folder / "gt_bbox").mkdir()
    queries = sorted((folder / "query").glob("*.jpg"))
    for path in queries[:11]:
        for number in (7, 8):
            name = "_".join(path.name.split("_")[:2])
            shutil.copy(
                queries[(queries.index(path) + number) % 16], folder / "gt_bbox" / f"{name}_00000{number}_00.jpg"
            )
    for path in sorted((folder / "bounding_box_train").glob("*.jpg"))[:5]:
        shutil.copy(path, folder / "gt_bbox" / path.name)
    return tmp_path


def test_by_hand(with_boxes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    datamanager, model = make_datamanager(with_boxes, batch_size_test=10), Tiny()
    engine = make_engine(ImageSNEngine, datamanager, model)
    engine.options.multi_query = True
    engine.test(ranks=[1])
    printed = capsys.readouterr().out
    transform = datamanager.test_loader["market1501"]["query"].dataset.transform

    def features(name: str) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        paths = sorted((with_boxes / "market1501/Market-1501-v15.09.15" / name).glob("*.jpg"))
        keys = [(int(path.name[:4]), int(path.name[6]) - 1) for path in paths]
        with torch.no_grad():
            return model(torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])), keys

    (queries, keys), (boxes, box_keys), (gallery, gallery_keys) = map(
        features, ("query", "gt_bbox", "bounding_box_test")
    )
    pooled = [
        boxes[[other == key for other in box_keys]].mean(dim=0) if key in box_keys else feature
        for feature, key in zip(queries, keys)
    ]
    assert sum(key in box_keys for key in keys) == 11
    distances = torch.cdist(torch.stack(pooled), gallery).square().numpy()
    (pids, camids), (gallery_pids, gallery_camids) = np.array(keys).T, np.array(gallery_keys).T
    expected = rank_gallery(distances, pids, gallery_pids, camids, gallery_camids)
    assert f"mAP: {expected.mean_ap:.1%}" in printed
    assert f"Rank-1  : {expected.cmc[0]:.1%}" in printed


def test_from_the_command_line_and_without_the_folder(
    with_boxes: Path, reid_data: Path, train: Callable[..., Done]
) -> None:
    options = ["loss.name", "hap2s", "test.evaluate", True, "test.flip", True, "test.multi_query", True]
    options += ["data.root", with_boxes, "test.features", "features.npz"]
    single = train(*options, "test.multi_query", False)
    results = [single.out[single.out.index("** Results **") :]]
    for extracted in (["further query"], []):  # what the file does not have
        done = train(*options)
        assert done.code == 0, done.err
        assert extracted_splits() == extracted
        results.append(done.out[done.out.index("** Results **") :].splitlines()[:7])
    assert results[0].splitlines()[:7] != results[1] == results[2]
    cfg = load_config(options=["test.multi_query", True])
    with pytest.raises(ConfigError, match=r"test\.multi_query needs a folder gt_bbox"):
        check_datamanager(cfg, make_datamanager(reid_data))
    for path in with_boxes.rglob("gt_bbox/*.jpg"):  # of people who are in no query
        path.rename(path.with_name("9" + path.name))
    with pytest.raises(ConfigError, match=r"with images of a query's person from its camera"):
        check_datamanager(cfg, make_datamanager(with_boxes))
