"""The model of a test: which checkpoint it comes from, and what is said where the config differs from that."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Done, Tiny, tiny_options
from torchreid import models

from torchreid_snloss.inference import features

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
    assert "in the checkpoint" not in done.out
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
    assert [line for line in out.splitlines() if "in the checkpoint" in line] == [
        "** data.height: 64 in the checkpoint, 96 in the config, which is used",
        "** data.norm_mean: [0.485, 0.456, 0.406] in the checkpoint, [0.5, 0.5, 0.5] in the config, which is used",
        "** test.normalize_feature: True in the checkpoint, False in the config, which is used",
    ]


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
