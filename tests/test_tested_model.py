"""The model of a test: which checkpoint it comes from, and what is said where the config differs from that."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Done, Tiny, tiny_options
from torchreid import models

from torchreid_snloss.build import build_criteria, build_datamanager, build_engine, build_model, build_optimizer
from torchreid_snloss.checkpoint import load_checkpoint, save_checkpoint
from torchreid_snloss.config import get_default_config, load_config
from torchreid_snloss.engine.differences import feature_differences, plain, split_differences
from torchreid_snloss.inference import features
from torchreid_snloss.settings import resolve

SN = ("loss.name", "sn", "train.max_epoch", 1)
CHECKPOINT = "log/model/model.pth.tar-1"
BY = pytest.mark.parametrize("key", ["model.resume", "model.load_weights"])


def mean_ap(output: str) -> str:
    found = re.findall(r"mAP: ([\d.]+%)", output)
    assert found
    return str(found[-1])


@BY
def test_a_test_needs_nothing_of_the_training_but_the_weights(key: str, train: Callable[..., Done]) -> None:
    trained = train(*SN)
    assert trained.code == 0, trained.err
    others = ["train.optim", "sgd", "train.lr_scheduler", "cosine", "loss.name", "fidi", "train.batch_size", 16]
    done = train("test.evaluate", True, key, CHECKPOINT, *others, "data.val_fraction", 0.5, "data.save_dir", "tested")
    assert done.code == 0, done.err
    assert "when the checkpoint was trained" not in done.out
    assert mean_ap(done.out) == mean_ap(trained.out)


@BY
@pytest.mark.parametrize("command", ["test", "features"])
def test_a_setting_that_gives_other_features_is_told(
    command: str, key: str, train: Callable[..., Done], reid_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*SN).code == 0
    others = ["data.height", 96, "data.norm_mean", "[0.5, 0.5, 0.5]", "video.seq_len", 3, "loss.name", "softmax"]
    if command == "test":
        done = train("test.evaluate", True, key, CHECKPOINT, *others)
        code, out = done.code, done.out
    else:
        image = next(reid_data.rglob("query/*.jpg"))
        code = features.main(["--images", str(image), *tiny_options(key, CHECKPOINT, *others)])
        out = capsys.readouterr().out
    assert code == 0
    assert [line for line in out.splitlines() if "when the checkpoint was trained" in line] == [
        "=> data.height: 64 when the checkpoint was trained, 96 now",
        "=> data.norm_mean: [0.485, 0.456, 0.406] when the checkpoint was trained, [0.5, 0.5, 0.5] now",
        "=> test.normalize_feature: True when the checkpoint was trained, False now",
    ]
    assert f'from "{CHECKPOINT}", after 1 epochs' in out


def test_a_setting_is_named_before_weights_that_do_not_fit_because_of_it(train: Callable[..., Done]) -> None:
    assert train(*SN).code == 0
    done = train("test.evaluate", True, "model.resume", CHECKPOINT, "model.neck", "bnneck")
    assert done.code == 2
    assert "=> model.neck: 'none' when the checkpoint was trained, 'bnneck' now" in done.out
    assert "belongs to another model" in done.err


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ({}, 0),
        ({"video.pooling_method": "max"}, 1),
        ({"video.seq_len": 7}, 1),
        ({"video.seq_len": 7, "video.sample_method": "all"}, 1),  # of the method
        ({"data.type": "image"}, 1),
        ({"model.name": "timm/b.tag"}, 0),  # of other pretrained weights
        ({"train.lr": 1.0, "data.root": "elsewhere"}, 0),
    ],
)
def test_only_what_changes_features_is_a_difference(change: dict[str, Any], lines: int) -> None:
    settings = resolve(get_default_config()).values
    settings = {**settings, "data.type": "video", "model.name": "timm/b", "video.sample_method": "evenly"}
    assert len(feature_differences(plain(settings), {**settings, **change})) == lines
    of_all = {**settings, "video.sample_method": "all"}
    assert feature_differences(plain(of_all), {**of_all, "video.seq_len": 7}) == []


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        ({}, []),
        ({"data.split_id": 1}, ["data.split_id"]),
        (
            {"data.folder.test_fraction": 0.5, "data.folder.junk": ["-1", "7"]},
            ["data.folder.junk", "data.folder.test_fraction"],
        ),
        ({"data.split_id": 1, "data.targets": ["market1501"]}, []),  # which was not trained on
        ({"data.split_id": 1, "data.root": "elsewhere"}, []),
        ({"data.split_id": 1, "data.folder.path": "elsewhere"}, []),
        ({"cuhk03.classic_split": True}, []),
        ({"data.height": 96}, []),
        ({"data.combineall": True}, []),  # in a test, which trains nobody
    ],
)
def test_a_split_by_which_people_of_the_training_may_be_tested_on(change: dict[str, Any], keys: list[str]) -> None:
    settings = {**resolve(get_default_config()).values, "data.sources": ["folder"], "data.targets": ["folder"]}
    assert len(split_differences({**plain(settings), "data.combineall": True}, settings)) == 1
    of_market = {**settings, "data.sources": ["market1501"], "data.targets": ["market1501"]}
    assert split_differences(plain(of_market), {**of_market, "data.split_id": 1}) == []  # it has one split
    lines = split_differences(plain(settings), {**settings, **change})
    assert [line.split(":")[0] for line in lines] == sorted(keys)
    assert all("so people may be tested on who were trained on" in line for line in lines)


def test_a_test_needs_nothing_that_only_training_needs(train: Callable[..., Done]) -> None:
    assert train(*SN).code == 0
    done = train("test.evaluate", True, "model.resume", CHECKPOINT, "train.sync_batchnorm", True)
    assert done.code == 0, done.err


@BY
def test_settings_of_a_checkpoint_that_are_no_plain_data(key: str, train: Callable[..., Done], in_folder: Path) -> None:
    assert train(*SN).code == 0
    checkpoint = load_checkpoint(CHECKPOINT)
    endless: list[Any] = []
    endless.append(endless)
    save_checkpoint({**checkpoint, "settings": {**checkpoint["settings"], "data.height": endless}}, CHECKPOINT)
    done = train("test.evaluate", True, key, CHECKPOINT)
    assert done.code == 2
    assert "its settings.data.height must be plain data" in done.err
    save_checkpoint({**checkpoint, "settings": "of another program"}, CHECKPOINT)
    assert train("test.evaluate", True, key, CHECKPOINT).code == 0


def test_a_script_that_only_tests_resumes_on_other_training_images(
    train: Callable[..., Done], reid_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = train(*SN)
    options = tiny_options(*SN, "data.root", reid_data, "test.evaluate", True, "data.val_fraction", 0.25)
    settings = resolve(load_config(options=options))
    datamanager = build_datamanager(settings)
    model = build_model(settings, 16)
    criteria = build_criteria(settings)
    optimizer, scheduler = build_optimizer(settings, model, criteria)
    engine = build_engine(settings, datamanager, model, optimizer, scheduler, criteria)
    engine.resume(CHECKPOINT)
    capsys.readouterr()
    engine.run(test_only=True, normalize_feature=True)
    assert mean_ap(capsys.readouterr().out) == mean_ap(trained.out)


def test_which_checkpoint_is_tested_is_told(train: Callable[..., Done]) -> None:
    assert train(*SN, "data.save_dir", "other").code == 0
    weights = ("model.load_weights", "other/model/model.pth.tar-1")
    test = ("test.evaluate", True, "model.resume")
    done = train(*test, "auto", *weights)
    assert "=> model.resume auto: no checkpoint in log/model, so that of model.load_weights is used" in done.out
    assert 'from "other/model/model.pth.tar-1"' in done.out
    assert train(*SN).code == 0
    for resume in ("auto", CHECKPOINT):
        done = train(*test, resume, *weights)
        assert f"=> {' '.join(weights)} is not used, since model.resume is given" in done.out
        assert f'from "{CHECKPOINT}"' in done.out


def test_no_weights_are_downloaded_that_a_checkpoint_replaces(
    train: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(*SN).code == 0
    asked = []

    class Downloads(Tiny):
        def __init__(self, *args: Any, pretrained: bool, **kwargs: Any) -> None:
            asked.append(pretrained)
            super().__init__(*args, **kwargs)

    monkeypatch.setitem(vars(models)["__model_factory"], "tiny", Downloads)
    for options in (["model.load_weights", CHECKPOINT], ["model.resume", "auto"], []):
        done = train("test.evaluate", True, "model.pretrained", True, *options)
        assert done.code == 0, done.err
    assert asked == [False, False, True]
