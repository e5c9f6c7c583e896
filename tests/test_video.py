"""Video: the engines with torchreid's VideoDataManager on synthetic tracklets, and the standard evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Done, make_engine, tiny_options
from torchreid import data, engine, losses, utils

import torchreid_snloss
from torchreid_snloss import VideoFIDIEngine, VideoHAP2SEngine, VideoMetricEngine, VideoSNEngine
from torchreid_snloss.data import SyntheticTracklets, make_pedestrians


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torchreid_snloss.register()
    utils.set_random_seed(1)
    root = tmp_path_factory.mktemp("video")
    make_pedestrians(root / SyntheticTracklets.dataset_dir, num_train_pids=10, num_test_pids=5, frames=8)
    return data.VideoDataManager(
        root=str(root), sources="synthetic_video", height=64, width=32, batch_size_train=8, batch_size_test=5,
        seq_len=3, num_instances=2, train_sampler="IdentitySampler", use_gpu=False, workers=0,
    )  # fmt: skip


def test_tracklets_have_the_documented_shape(videos: Any) -> None:
    dataset = videos.train_loader.dataset
    assert {pid for _, pid, *_ in dataset.train} == set(range(10))
    assert all(len(paths) == 8 for paths, *_ in [*dataset.train, *dataset.query, *dataset.gallery])
    assert (len(dataset.query), len(dataset.gallery)) == (5, 15)
    for paths, pid, camid, *_ in dataset.gallery:
        assert {(int(Path(path).name[:4]), int(Path(path).name[6]) - 1) for path in paths} == {(pid, camid)}
    batch = next(iter(videos.train_loader))
    assert batch["img"].shape == (8, 3, 3, 64, 32)


@pytest.mark.parametrize("cls", [VideoSNEngine, VideoHAP2SEngine, VideoFIDIEngine])
def test_trains_and_evaluates(cls: type[Any], videos: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training = make_engine(cls, videos, lr=0.001, pooling_method="max", weight_x=0)
    batch = next(iter(videos.train_loader))
    shown = [training.forward_backward(batch)["loss_m"] for _ in range(8)]
    assert shown[-1] < shown[0]
    training.run(save_dir=str(tmp_path), max_epoch=1, print_freq=1, ranks=[1, 5])
    printed = capsys.readouterr().out
    assert "Done, obtained 5-by-256 matrix" in printed
    assert "mAP:" in printed


def test_ranked_lists_are_torchreids(videos: Any, tmp_path: Path) -> None:
    tested = make_engine(VideoSNEngine, videos)
    lists = {"visrank": True, "visrank_topk": 4, "ranks": [1]}
    tested.run(test_only=True, save_dir=str(tmp_path / "ours"), **lists)
    loaders = {f"{split}_loader": loader for split, loader in videos.test_loader["synthetic_video"].items()}
    engine.Engine._evaluate(tested, "synthetic_video", **loaders, **lists, save_dir=str(tmp_path / "theirs"))
    ours, theirs = (sorted(path.relative_to(folder) for path in folder.rglob("*")) for folder in tmp_path.iterdir())
    assert len([path for path in ours if path.suffix == ".jpg"]) == 5 * (1 + 4) * 8
    assert ours == theirs


def test_an_evaluation_draws_the_same_frames_again(videos: Any) -> None:
    tested = make_engine(VideoSNEngine, videos)
    tested.set_model_mode("eval")
    loaders = videos.test_loader["synthetic_video"]
    found = []
    for loader in loaders.values():
        loader.dataset.sample_method = "random"
    try:
        for seed in (1, 2):
            utils.set_random_seed(seed)
            state = torch.get_rng_state()
            found.append(tested._testing._features("synthetic_video", "gallery", loaders["gallery"]).features)
            assert torch.equal(torch.get_rng_state(), state)
    finally:
        for loader in loaders.values():
            loader.dataset.sample_method = "evenly"
    assert torch.equal(*found)


def test_a_step_with_the_triplet_loss_equals_torchreids(videos: Any) -> None:
    batch = next(iter(videos.train_loader))
    ours = make_engine(VideoMetricEngine, videos, criterion=losses.TripletLoss(margin=0.3), weight_x=0.5)
    theirs = make_engine(engine.VideoTripletEngine, videos, margin=0.3, weight_t=1, weight_x=0.5)
    shown, expected = ours.forward_backward(batch), theirs.forward_backward(batch)
    assert shown["loss_m"] == pytest.approx(expected["loss_t"], rel=1e-5)
    assert shown["loss_x"] == pytest.approx(expected["loss_x"], rel=1e-5)
    for a, b in zip(ours.model.parameters(), theirs.model.parameters()):
        assert (a.grad - b.grad).norm() <= 1e-3 * b.grad.norm() + 1e-5
    images = next(iter(videos.test_loader["synthetic_video"]["query"]))["img"]
    for pooling in ("avg", "max"):
        ours.pooling_method = theirs.pooling_method = pooling
        ours.set_model_mode("eval")
        theirs.model.load_state_dict(ours.model.state_dict())
        theirs.set_model_mode("eval")
        assert torch.equal(ours.extract_features(images), theirs.extract_features(images))


def test_a_wrong_pooling_method_and_a_memory_are_refused(videos: Any) -> None:
    with pytest.raises(ValueError, match="pooling_method must be one of 'avg', 'max', got 'mean'"):
        make_engine(VideoSNEngine, videos, pooling_method="mean")
    training = make_engine(VideoSNEngine, videos, memory_size=10)
    with pytest.raises(TypeError, match="a memory needs image batches"):
        training.forward_backward(next(iter(videos.train_loader)))


def test_small_video_config(command_line: Callable[..., Done]) -> None:
    make_pedestrians(Path("reid-data") / SyntheticTracklets.dataset_dir, 8, 5, frames=8)
    done = command_line(
        *["--config-file", ROOT / "configs/small_video.yaml", "train.max_epoch", 1, "train.print_freq", 1],
        *["data.workers", 0, "data.height", 64, "data.width", 32, "test.ranks", [1]],
    )
    assert done.code == 0, done.err
    assert "loss_m" in done.out
    assert "mAP:" in done.out


@pytest.mark.usefixtures("tiny_model")
def test_sample_method_all_takes_tracklets_of_one_length_or_one_at_a_time(
    tmp_path: Path, command_line: Callable[..., Done]
) -> None:
    folder = tmp_path / SyntheticTracklets.dataset_dir
    make_pedestrians(folder, num_train_pids=4, num_test_pids=4, frames=2)
    options = tiny_options(
        "data.type", "video", "data.sources", "['synthetic_video']", "data.targets", "['synthetic_video']",
        "data.root", tmp_path, "use_gpu", False, "train.max_epoch", 1, "test.ranks", [1], "video.sample_method", "all",
    )  # fmt: skip

    def run(*more: object) -> Done:
        return command_line(*options, *map(str, more))

    assert run("train.batch_size", 4).code == 0
    images = folder / "Market-1501-v15.09.15"
    for part, key in (("query", "test.batch_size"), ("bounding_box_train", "train.batch_size")):
        first = sorted((images / part).glob("*.jpg"))[0]
        first.unlink()
        done = run("train.batch_size", 4, "test.batch_size", 1 if key == "train.batch_size" else 8)
        assert done.code == 2
        assert f"video.sample_method all needs {key} 1, since the tracklets of " in done.err
        assert "have from 1 to 2 frames" in done.err
    done = run("train.batch_size", 1, "test.batch_size", 1)
    assert done.code == 2
    assert "a tracklet of one frame" in done.err
    assert (
        run("train.batch_size", 1, "test.batch_size", 1, "video.sample_method", "evenly", "video.seq_len", 2).code == 0
    )
