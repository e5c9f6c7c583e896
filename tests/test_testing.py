"""The evaluation of a run: torchreid's results without its matrix, ranked lists, and features in a file."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Done, extracted_splits, make_datamanager, make_engine
from torchreid import data, engine, metrics, utils

from torchreid_snloss import ImageSNEngine, load_checkpoint, register
from torchreid_snloss.checkpoint import save_checkpoint
from torchreid_snloss.engine import NonFiniteError, TrainOptions, WriteError
from torchreid_snloss.engine.extraction import SplitFeatures
from torchreid_snloss.engine.features_file import FeaturesError, FeaturesFile, conditions


@pytest.fixture
def as_torchreid(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """torchreid's own `_evaluate`, with its own evaluator and re-ranking, on an engine's `market1501`."""
    register()
    module = sys.modules[engine.Engine.__module__]

    def evaluate_rank(*given: Any, use_metric_cuhk03: bool) -> Any:
        return metrics.rank.evaluate_py(*given, 50, use_metric_cuhk03)

    def evaluate(tested: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(metrics, "evaluate_rank", evaluate_rank)
            patch.setattr(module, "re_ranking", utils.rerank.re_ranking)
            name = next(iter(tested.test_loader))
            loaders = {f"{split}_loader": loader for split, loader in tested.test_loader[name].items()}
            return engine.Engine._evaluate(tested, name, **loaders, **options)

    return evaluate


def table(printed: str) -> list[str]:
    """The results that were printed, without mINP."""
    lines = printed[printed.index("** Results **") :].splitlines()
    return [line for line in lines if line.startswith(("mAP", "CMC", "Rank"))]


@pytest.mark.parametrize(
    ("field", "value"),
    [("flip", "False"), ("rerank", 1), ("multi_query", None), ("record", "no"), ("features", Path("f"))],
)
def test_options_of_another_type_are_refused(field: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{field} must be of type (bool|str), got {re.escape(repr(value))}"):
        TrainOptions(**{field: value})


def test_without_settings_the_features_of_tracklets_follow_from_their_frames() -> None:
    def found(pooling: str = "avg", **own: Any) -> dict[str, Any]:
        dataset = SimpleNamespace(**{"transform": None, "seq_len": 4, "sample_method": "evenly", **own})
        return conditions(None, SimpleNamespace(dataset=dataset), False, pooling)

    assert found() == found()
    assert all(other != found() for other in (found("max"), found(seq_len=2), found(sample_method="all")))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dist_metric": "cosine"},
        {"normalize_feature": True, "rerank": True},
        {"dist_metric": "cosine", "rerank": True},
        {"use_metric_cuhk03": True, "ranks": [1, 5]},
        {"use_metric_cuhk03": True, "rerank": True, "ranks": [2]},
    ],
    ids=str,
)
def test_results_are_those_of_torchreids_evaluation(
    options: dict[str, Any],
    datamanager: Any,
    as_torchreid: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    tested = make_engine(ImageSNEngine, datamanager)
    tested.set_model_mode("eval")
    np.random.seed(3)
    expected = as_torchreid(tested, **options)
    theirs = capsys.readouterr().out
    np.random.seed(3)
    rank1 = tested.test(**options)
    assert rank1 == pytest.approx(expected[0], abs=1e-6)
    assert tested.checkpointer.mean_aps["market1501"] == pytest.approx(expected[1], abs=1e-6)
    assert table(capsys.readouterr().out) == table(theirs)


def test_ranks_beyond_the_gallery_are_left_out(datamanager: Any, capsys: pytest.CaptureFixture[str]) -> None:
    make_engine(ImageSNEngine, datamanager).test(ranks=[1, 48, 49, 60])
    printed = capsys.readouterr().out
    assert [line.split(":")[0].strip() for line in table(printed)] == ["mAP", "CMC curve", "Rank-1", "Rank-48"]
    assert printed.count("Note: the gallery has 48 images, so the CMC curve ends at that rank") == 1


def test_a_gallery_without_images_and_one_without_matches(reid_data: Path) -> None:
    tested = make_engine(ImageSNEngine, make_datamanager(reid_data))
    gallery = tested.test_loader["market1501"]["gallery"].dataset
    gallery.data = [(path, pid + 100, camid, *rest) for path, pid, camid, *rest in gallery.data]
    with pytest.raises(ValueError, match="none of the 16 queries has a gallery image of its identity"):
        tested.test()
    gallery.data = []
    with pytest.raises(ValueError, match="there are no gallery images of market1501"):
        tested.test()


def test_ranked_lists_are_torchreids_and_those_of_the_only_last_evaluation(
    datamanager: Any, as_torchreid: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = make_engine(ImageSNEngine, datamanager)
    ours, theirs, tested, reranked = (tmp_path / name for name in ("ours", "theirs", "tested", "reranked"))
    training.run(save_dir=str(ours), max_epoch=2, eval_freq=1, visrank=True, visrank_topk=5)
    printed = capsys.readouterr().out
    assert printed.count("** Results **") == 2
    assert printed.index("Drawing ranked lists of 16 queries") > printed.rindex("Checkpoint saved")
    training.run(save_dir=str(tested), test_only=True, visrank=True, visrank_topk=5)
    training.run(save_dir=str(reranked), test_only=True, visrank=True, visrank_topk=5, rerank=True)
    assert "mINP" in capsys.readouterr().out
    as_torchreid(training, visrank=True, visrank_topk=5, save_dir=str(theirs))
    pictures = {path.name: path.read_bytes() for path in theirs.glob("visrank_market1501/*.jpg")}
    assert len(pictures) == 16
    for folder in (ours, tested):
        assert {path.name: path.read_bytes() for path in folder.glob("visrank_market1501/*.jpg")} == pictures
    as_torchreid(training, visrank=True, visrank_topk=5, save_dir=str(theirs), rerank=True)
    for path in theirs.glob("visrank_market1501/*.jpg"):
        assert (reranked / "visrank_market1501" / path.name).read_bytes() == path.read_bytes()
    assert len(list(ours.glob("events.out*"))) == 1
    assert not list(tested.glob("events.out*"))


def test_lists_that_can_not_be_drawn_lose_nothing(
    datamanager: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no room")

    monkeypatch.setattr(utils, "visualize_ranked_results", fail)
    training = make_engine(ImageSNEngine, datamanager)
    with pytest.raises(OSError, match="no room"):
        training.run(save_dir=str(tmp_path), max_epoch=1, visrank=True)
    assert (tmp_path / "model/model-best.pth.tar").is_file()
    assert load_checkpoint(tmp_path / "model/model.pth.tar-1")["progress"]["evaluated"]


# ---- the file of features ----


@pytest.fixture
def two_sets(
    reid_data: Path, tmp_path: Path, tiny_model: None, monkeypatch: pytest.MonkeyPatch, train: Callable[..., Done]
) -> Callable[..., Done]:
    """A test of two test sets, whose features are in `features.npz`: `two_sets(*options)`."""

    class Second(data.datasets.image.Market1501):  # type: ignore[misc]
        dataset_dir = "second"

    monkeypatch.setitem(vars(data.datasets)["__image_datasets"], "second", Second)
    for name in ("market1501", "second"):
        shutil.copytree(reid_data / "market1501", tmp_path / "root" / name)
    query = sorted((tmp_path / "root/second").rglob("query/*.jpg"))
    query[0].unlink()
    targets = "['market1501','second']"
    options = ["data.root", tmp_path / "root", "data.targets", targets, "loss.name", "sn", "test.evaluate", True]
    return lambda *more: train(*options, "test.features", "kept/features.npz", *more)


def spoil(root: Path) -> None:
    """Overwrites all images, so that they can be listed but not loaded."""
    for path in root.rglob("*.jpg"):
        path.write_bytes(b"no image")


def test_features_that_are_kept_give_the_same_results_without_images(
    two_sets: Callable[..., Done], in_folder: Path
) -> None:
    options = ["test.flip", True, "test.rerank", True, "test.dist_metric", "cosine", "test.visrank", True]
    expected = two_sets(*options, "test.features", "", "data.save_dir", "expected")
    assert expected.code == 0, expected.err
    first = two_sets("test.flip", True, "data.targets", "['market1501']")
    assert first.code == 0, first.err
    spoil(in_folder / "root/market1501")
    both = two_sets("test.flip", True)  # only those of the second test set are missing
    assert both.code == 0, both.err
    assert len(extracted_splits()) == 2
    spoil(in_folder / "root/second")
    again = two_sets("test.flip", True)
    assert again.code == 0, again.err
    assert not extracted_splits()
    assert table(again.out) == table(both.out)
    assert table(again.out)[: len(table(first.out))] == table(first.out)
    reranked = two_sets(*options[:-2])
    assert table(reranked.out) == table(expected.out) != table(again.out)

    with np.load("kept/features.npz") as arrays:
        assert arrays["second/query/features"].shape == (15, 256)
        paths, pids, camids = (arrays[f"market1501/gallery/{part}"] for part in ("paths", "pids", "camids"))
        assert [(int(Path(path).name[:4]), int(Path(path).name[6]) - 1) for path in paths] == list(zip(pids, camids))
        assert json.loads(arrays["about"].item())["options"]["test.flip"] is True
    assert [path.name for path in (in_folder / "kept").iterdir()] == ["features.npz"]


def test_a_file_of_features_of_something_else_is_refused(two_sets: Callable[..., Done], in_folder: Path) -> None:
    assert two_sets().code == 0
    file = Path("kept/features.npz")
    whole = file.read_bytes()

    def refused(*options: object, words: str) -> None:
        done = two_sets(*options)
        assert done.code == 2
        assert "** Results **" not in done.out
        (line,) = done.err.splitlines()
        assert words in line
        assert "name another file in test.features, or remove this one" in line
        assert file.read_bytes() == whole

    taller = ("test.flip", True, "data.norm_mean", "[0.5, 0.5, 0.5]")
    kept, now = "data.norm_mean [0.485, 0.456, 0.406]", "data.norm_mean [0.5, 0.5, 0.5]"
    refused(*taller, words=f"extracted with test.flip False, {kept}, and this run has test.flip True, {now}")
    refused("train.seed", 5, words="its features are those of other weights")
    query = sorted((in_folder / "root/second").rglob("query/*.jpg"))
    query[1].rename(query[1].with_name(query[1].name.replace("_c", "_c", 1).replace(".jpg", "9.jpg")))
    refused(words="its query images of second differ: 15 images of 8 identities in the file, 15 of 8 in this run")
    query[1].with_name(query[1].name.replace(".jpg", "9.jpg")).rename(query[1])

    for broken in (
        whole[: len(whole) // 2],
        b"",
        b"\x80\x04.",
        bytes([*whole[:5000], whole[5000] ^ 255, *whole[5001:]]),
    ):
        file.write_bytes(broken)
        whole = broken
        refused(words="is damaged, or not a file of features")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("about.npy", "no array")
    whole = file.read_bytes()
    refused(words="is damaged, or not a file of features")


def test_a_file_of_features_that_does_not_hold_them(tmp_path: Path) -> None:
    items = [("a/1.jpg", 1, 0), ("a/2.jpg", 2, 3)]
    about = {"format_version": 1, "weights": "w", "options": {}, "splits": {}}
    own = {("one", "query"): items}
    path = tmp_path / "features.npz"
    own_about = json.loads(json.dumps(FeaturesFile(path, "w", {}, own)._own))
    features = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    good = {"features": features, "pids": np.array([1, 2]), "camids": np.array([0, 3])}
    good["paths"] = np.array(["1.jpg", "2.jpg"])

    def save(arrays: dict[str, Any], **changed: Any) -> None:
        text = json.dumps({**about, **own_about, **changed})
        np.savez(path, about=text, **{f"one/query/{part}": array for part, array in arrays.items()})

    save(good)
    found = FeaturesFile(path, "w", {}, own).read("one", "query", ["b/1.jpg", "b/2.jpg"])
    assert found is not None
    assert found.paths == ["b/1.jpg", "b/2.jpg"]
    assert torch.equal(found.features, torch.from_numpy(features))
    for rows in ([0, 1], [1, 0]):  # file systems list files in any order
        listed = {("one", "query"): [items[row] for row in rows]}
        found = FeaturesFile(path, "w", {}, listed).read("one", "query", ["", ""])
        assert found is not None
        assert torch.equal(found.features, torch.from_numpy(features[rows]))
        assert (found.pids.tolist(), found.camids.tolist()) == ([1 + row for row in rows], [3 * row for row in rows])
    for part, array, words in (
        ("features", np.zeros(2, np.float32), "not a matrix of floats"),
        ("features", np.zeros((2, 3), np.int64), "not a matrix of floats"),
        ("features", np.array([[None] * 3] * 2), "allow_pickle=False"),
        ("features", np.zeros((3, 3), np.float32), "not those of 2 images"),
        ("pids", np.array([1.0, 2.0]), "not lists of integers"),
        ("camids", np.array([0]), "not those of 2 images"),
        ("paths", np.array(["1.jpg", "3.jpg"]), "others than its fingerprint says"),
    ):
        save({**good, part: array})
        file = FeaturesFile(path, "w", {}, own)
        with pytest.raises(FeaturesError, match=words):
            file.read("one", "query", ["b/1.jpg", "b/2.jpg"])
    save(good, format_version=2)
    with pytest.raises(
        FeaturesError, match="later version of torchreid-snloss, in format 2; this one reads formats up to"
    ):
        FeaturesFile(path, "w", {}, own)
    save(good, splits=[])
    with pytest.raises(FeaturesError, match="is damaged, or not a file of features"):
        FeaturesFile(path, "w", {}, own)


def test_training_keeps_no_features_and_a_folder_is_no_file(train: Callable[..., Done], in_folder: Path) -> None:
    done = train("loss.name", "sn", "test.features", "features.npz")
    assert done.code == 2
    assert "test.features needs a test run, test.evaluate True" in done.err
    (in_folder / "folder").mkdir()
    done = train("loss.name", "sn", "test.evaluate", True, "test.features", "folder")
    assert done.code == 2
    assert "test.features 'folder' can't be written: 'folder' is a directory" in done.err
    done = train("loss.name", "sn", "test.evaluate", True, "test.features", "x" * 300)
    assert done.code == 2
    assert f"test.features '{'x' * 300}' can't be written: [Errno {errno.ENAMETOOLONG}]" in done.err
    with pytest.raises(FeaturesError, match=f"can't read test.features 'x*': {os.strerror(errno.ENAMETOOLONG)}"):
        FeaturesFile("x" * 300, "w", {}, {})
    if hasattr(os, "mkfifo"):
        os.mkfifo("pipe")
        done = train("loss.name", "sn", "test.evaluate", True, "test.features", "pipe")
        assert done.code == 2
        assert "test.features 'pipe' can't be written: 'pipe' is not a regular file" in done.err
        with pytest.raises(FeaturesError, match=r"can't read test\.features 'pipe': it is not a regular file"):
            FeaturesFile("pipe", "w", {}, {})


def test_features_in_a_script_know_the_weights_and_the_transform(
    reid_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tested = make_engine(ImageSNEngine, make_datamanager(reid_data))
    tested.options.features = str(tmp_path / "features.npz")
    for extractions in (2, 0):
        tested.run(test_only=True)
        assert capsys.readouterr().out.count("Extracting") == extractions
    other = make_engine(ImageSNEngine, make_datamanager(reid_data, norm_mean=[0.5] * 3, norm_std=[0.2] * 3))
    other.options.features = tested.options.features
    with pytest.raises(FeaturesError, match=r"transform 'Compose.*0\.485.*this run has transform 'Compose.*0\.5"):
        other.run(test_only=True)
    tested.model.classifier.weight.data += 1  # no test uses it
    tested.run(test_only=True)
    tested.model.norm.running_mean += 1
    with pytest.raises(FeaturesError, match="those of other weights"):
        tested.run(test_only=True)


def test_a_test_after_a_failed_one_uses_no_file(reid_data: Path, tmp_path: Path) -> None:
    tested = make_engine(ImageSNEngine, make_datamanager(reid_data))
    tested.options.features = str(tmp_path / "features.npz")
    tested.extract_features = lambda images: torch.full((len(images), 2), torch.nan)
    with pytest.raises(NonFiniteError):
        tested.run(test_only=True)
    del tested.extract_features
    tested.test()
    assert not list(tmp_path.iterdir())


def test_features_are_not_added_to_a_damaged_file(tmp_path: Path) -> None:
    path, labels = tmp_path / "features.npz", np.array([1, 2])
    items = {(name, "query"): [(f"{name}/1.jpg", 1, 0), (f"{name}/2.jpg", 2, 3)] for name in ("one", "two")}
    found = SplitFeatures(torch.full((2, 8), 7.0), labels, labels, ["", ""])
    FeaturesFile(path, "w", {}, items).write("one", "query", found)
    damaged = path.read_bytes().replace(found.features.numpy().tobytes(), bytes(64))
    path.write_bytes(damaged)
    file = FeaturesFile(path, "w", {}, items)
    file.write("two", "query", found)
    with pytest.raises(
        WriteError, match=r"what it holds is damaged: Bad CRC-32 for file 'one/query/features\.npy'; the"
    ):
        file.close()
    assert path.read_bytes() == damaged


def test_features_of_the_same_weights_in_a_checkpoint_and_a_file_on_a_full_disk(
    train: Callable[..., Done], in_folder: Path
) -> None:
    pytest.importorskip("resource", reason="POSIX's limits")
    from test_failures import largest_file

    with largest_file(30_000):  # the features of the gallery have 48 kB
        done = train("loss.name", "sn", "test.evaluate", True, "test.features", "features.npz")
    assert done.code == 1
    assert "mINP: " in done.out
    (line,) = done.err.splitlines()
    assert (
        "error: test.features 'features.npz' can't be written: File too large; the results above are complete" in line
    )
    assert sorted(path.name for path in in_folder.glob("*eatures*")) == ["features.npz"]
    done = train("loss.name", "sn", "test.evaluate", True, "test.features", "features.npz")
    assert done.code == 0, done.err
    assert extracted_splits() == ["gallery"]  # those of the queries were written

    assert train("loss.name", "sn", "train.max_epoch", 1).code == 0
    checkpoint = load_checkpoint("log/model/model.pth.tar-1")
    save_checkpoint({"state_dict": checkpoint["state_dict"]}, "copy.pth")
    for options in (["model.resume", "auto"], ["model.load_weights", "copy.pth"]):
        done = train("loss.name", "sn", "test.evaluate", True, "test.features", "trained.npz", *options)
        assert done.code == 0, done.err
    assert not extracted_splits()
