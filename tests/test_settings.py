"""Settings: what every entry point makes of a config."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, tiny_options
from yacs.config import CfgNode

import torchreid_snloss
from torchreid_snloss import ConfigError, distributed, get_default_config, load_config, resolve, train
from torchreid_snloss.build import build_criteria, engine_class
from torchreid_snloss.config.rules import RULES
from torchreid_snloss.engine import MetricEngine, VideoMetricEngine
from torchreid_snloss.settings import (
    engine_run_kwargs,
    imagedata_kwargs,
    lr_scheduler_kwargs,
    optimizer_kwargs,
    train_options,
    videodata_kwargs,
)


def config(*options: Any) -> CfgNode:
    return load_config(options=["use_gpu", False, *options])


def test_settings_are_what_the_config_says_and_can_not_be_changed() -> None:
    cfg = config("loss.name", "sn+triplet", "data.sources", ["a", "b"], "loss.sn.weight_m", 0.5, "train.keep", 7)
    before = copy.deepcopy(cfg)
    settings = resolve(cfg)
    assert cfg == before
    assert (settings.model_name, settings.height, settings.sources) == ("resnet50", 256, ("a", "b"))
    assert (settings.losses, settings.softmax_weight) == (("sn", "triplet"), 1.0)
    assert settings.metric_weights == {"sn": 0.5, "triplet": 1.0}
    assert resolve(settings) is settings

    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.height = 128  # type: ignore[misc]
    cfg.data.height = 128
    cfg.data.sources.append("c")
    settings.metric_weights["sn"] = 3.0
    imagedata_kwargs(settings)["sources"].append("d")
    train_options(settings).keep = 1
    assert settings.height == imagedata_kwargs(settings)["height"] == 256
    assert imagedata_kwargs(settings)["sources"] == ["a", "b"]
    assert settings.metric_weights == {"sn": 0.5, "triplet": 1.0}
    assert train_options(settings).keep == 7
    assert pickle.loads(pickle.dumps(settings)) == settings
    assert resolve(config("loss.sn.scale", 3)) != resolve(config("loss.sn.scale", 4)) != resolve(config())
    assert hash(settings) == hash(resolve(before))


def test_settings_as_text_are_a_config_that_gives_them_again(tmp_path: Path) -> None:
    settings = resolve(config("loss.name", "hap2s", "data.norm_mean", "None", "train.stepsize", [3, 5]))
    (tmp_path / "settings.yaml").write_text(settings.cfg_text)
    again = resolve(load_config(str(tmp_path / "settings.yaml")))
    assert again.values == settings.values
    assert (again.train_sampler, again.normalize_feature) == ("IdentitySampler", True)


@pytest.mark.parametrize(
    ("options", "sampler"),
    [
        (["loss.name", "softmax"], "RandomSampler"),
        (["loss.name", "sn"], "IdentitySampler"),
        (["loss.name", "triplet"], "IdentitySampler"),
        (["loss.name", "sn", "loss.sn.weight_m", 0.0], "RandomSampler"),
        (["loss.name", "sn", "test.evaluate", True], "RandomSampler"),
        (["loss.name", "sn", "sampler.train_sampler", "RandomIdentitySampler"], "RandomIdentitySampler"),
    ],
)
def test_the_sampler_follows_from_the_loss(options: list[Any], sampler: str) -> None:
    settings = resolve(config(*options))
    assert settings.train_sampler == imagedata_kwargs(settings)["train_sampler"] == sampler
    assert any("sampler.train_sampler" in note for note in settings.notes) == (sampler == "IdentitySampler")


@pytest.mark.parametrize(
    ("options", "is_said"),
    [
        (["model.pretrained", False], True),
        (["model.pretrained", True], False),
        (["model.pretrained", False, "model.load_weights", __file__], False),
        (["model.pretrained", False, "sampler.num_instances", 2], False),
        (["model.pretrained", False, "loss.name", "softmax"], False),
    ],
)
def test_a_run_without_pretrained_weights_is_told_of_two_images_an_identity(options: list[Any], is_said: bool) -> None:
    notes = resolve(config("loss.name", "sn", *options)).notes
    lines = [note for note in notes if note.startswith("=> the network has no pretrained weights")]
    assert len(lines) == is_said
    assert all("sampler.num_instances 2 may train better than 4" in line for line in lines)


def test_a_config_with_keys_of_yacs_own_merging(tmp_path: Path) -> None:
    """As in torchreid's main script, which merges files and options itself."""
    path = tmp_path / "my.yaml"
    path.write_text("loss: {name: sn}\ntest: {normalize_feature: False}\n")
    cfg = get_default_config()
    cfg.use_gpu = False
    cfg.merge_from_list(["loss.name", "hap2s"])
    assert resolve(cfg).normalize_feature is True
    cfg.merge_from_file(str(path))
    assert resolve(cfg).normalize_feature is False
    cfg.merge_from_list(["test.normalize_feature", "True"])
    assert resolve(cfg).normalize_feature is True
    cfg.merge_from_list(["test.normalize_feature", "None"])
    assert resolve(cfg).normalize_feature is True
    cfg.merge_from_list(["test.normalize_feature", "1"])
    with pytest.raises(
        ConfigError, match=r"normalize_feature must be True or False, or None; got test.normalize_feature 1"
    ):
        resolve(cfg)
    cfg.merge_from_list(["test.normalize_feature", "None", "train.lr", "None"])
    with pytest.raises(ConfigError, match=r"train\.lr must have a value, as its default 0\.0003, got None"):
        resolve(cfg)


def test_what_is_no_config_is_told() -> None:
    with pytest.raises(ConfigError, match="must be a CfgNode or Settings, got dict"):
        resolve({"loss": {"name": "sn"}})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="must be a CfgNode or Settings, got str"):
        train("configs/small.yaml")  # type: ignore[arg-type]
    theirs = config()  # torchreid's own tree has no such key
    del theirs.train["amp"]
    with pytest.raises(ConfigError, match=r"the config has no train\.amp: make it with get_default_config"):
        resolve(theirs)


BROKEN = {
    "data.folder.camera": ["data.folder.camera", "cam"],
    "data.k_tfm": ["data.k_tfm", 2],
    "data.cache ram needs data.batc": ["data.cache", "ram"],
    "loss.memory.size needs loss": ["loss.memory.size", 8, "loss.name", "triplet"],
    "loss.memory.start_epoch must": ["loss.memory.size", 8, "loss.memory.start_epoch", 60],
    "data.val_fold counts from 0": ["data.val_fraction", 0.25, "data.val_fold", 4],
    "train.amp bf16": ["train.amp", "bf16", "use_gpu", True],
    "train.compile": ["train.compile", True, "use_gpu", True],
    "train.lr_scheduler exponential": ["train.lr_scheduler", "exponential", "train.stepsize", [60]],
    "RandomDomainSampler": ["sampler.train_sampler", "RandomDomainSampler", "sampler.num_cams", 5],
    "RandomDatasetSampler": ["sampler.train_sampler", "RandomDatasetSampler", "sampler.num_datasets", 3],
    "train.sync_batchnorm": ["train.sync_batchnorm", True],
    "loss.memory.size above 0": ["loss.memory.size", 8, "data.type", "video"],
    "test.features": ["test.features", "features.npz"],
    "test.held_out_only": ["test.held_out_only", True],
    "train.start_epoch": ["train.start_epoch", 60],
    "train.warmup_epochs": ["train.warmup_epochs", 60],
    "train.open_layers": ["train.open_layers", [], "train.fixbase_epoch", 1],
}


@pytest.mark.parametrize(
    ("fraction", "fold", "is_possible"),
    [(0.0, 0, True), (0.9, 0, True), (0.0, 1, False), (0.25, 3, True), (1 / 3, 2, True), (0.3333334, 2, True),
     (0.34, 2, False), (0.5, 999, False)],
)  # fmt: skip
def test_which_folds_there_are(fraction: float, fold: int, is_possible: bool) -> None:
    cfg = config("data.val_fraction", fraction, "data.val_fold", fold)
    if is_possible:
        assert resolve(cfg).val_fold == fold
    else:
        with pytest.raises(ConfigError, match=rf"; got data\.val_fold {fold}, data\.val_fraction {fraction}$"):
            resolve(cfg)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.message[:30])
def test_each_rule_tells_what_it_expects_and_what_came(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (options,) = (options for start, options in BROKEN.items() if rule.message.startswith(start))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cfg = config("loss.name", "sn", *options)
    with pytest.raises(ConfigError, match=f"^{re.escape(rule.message)}; got ") as raised:
        resolve(cfg)
    for key, value in zip(options[::2], options[1::2]):
        if key in rule.keys:
            assert f"{key} {value}" in str(raised.value)
    assert re.findall(r"[a-z]+(?:\.[a-z0-9_]+)+ ", str(raised.value).split("; got ")[1]) or "use_gpu" in rule.keys


def test_a_loss_is_tried_without_drawing_random_numbers() -> None:
    options = ["loss.name", "custom", "loss.custom.target", "pytorch_metric_learning.losses.ProxyAnchorLoss"]
    cfg = config(*options, "loss.custom.kwargs", "{'num_classes': 5, 'embedding_size': 4}")
    torch.manual_seed(0)
    expected = build_criteria(resolve(cfg))["custom"]
    torch.manual_seed(0)
    resolve(cfg)
    assert torch.equal(build_criteria(cfg)["custom"].proxies, expected.proxies)  # type: ignore[attr-defined]


def test_engines_by_data_and_loss() -> None:
    names = {
        (kind, loss): engine_class(config("data.type", kind, "loss.name", loss)).__name__
        for kind in ("image", "video")
        for loss in ("softmax", "triplet")
    }
    assert names == {
        ("image", "softmax"): "ImageSoftmaxEngine",
        ("image", "triplet"): "ImageTripletEngine",
        ("video", "softmax"): "VideoSoftmaxEngine",
        ("video", "triplet"): "VideoTripletEngine",
    }
    own = {"train.own_step": True, "train.amp": "bf16", "train.micro_batch": 8, "train.nonfinite": "skip"}
    for option in own.items():
        assert engine_class(config("loss.name", "softmax", *option)) is MetricEngine
        assert engine_class(config("loss.name", "triplet", "data.type", "video", *option)) is VideoMetricEngine
    assert engine_class(config("loss.name", "sn")) is MetricEngine
    assert engine_class(config("loss.name", "sn+triplet", "data.type", "video")) is VideoMetricEngine


def test_settings_are_checked_again_once_processes_were_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = resolve(config("loss.name", "triplet", "train.batch_size", 8))
    for_a_test = resolve(config("loss.name", "triplet", "test.evaluate", True))
    assert engine_class(settings).__name__ == "ImageTripletEngine"
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert engine_class(settings) is MetricEngine
    assert engine_class(for_a_test).__name__ == "ImageTripletEngine"
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with pytest.raises(ConfigError, match="is 2 identities, too few for 3 processes"):
        resolve(settings)


@pytest.mark.usefixtures("tiny_model")
def test_train_from_a_script(reid_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = load_config(
        str(ROOT / "configs/small.yaml"),
        ["data.sources", ["market1501"], "data.targets", ["market1501"], "data.root", str(reid_data), "use_gpu", False,
         *tiny_options("train.max_epoch", 1), "test.visrank", False,
         "data.save_dir", str(tmp_path), "model.resume", "auto"],
    )  # fmt: skip
    before = copy.deepcopy(cfg)
    first = torchreid_snloss.train(cfg)
    assert cfg == before
    out = capsys.readouterr().out
    assert "=> model.resume auto: no checkpoint in" in out
    assert set(out.splitlines()) <= set(next(tmp_path.glob("train.log-*")).read_text().splitlines())
    weights = torch.load(tmp_path / "model/model.pth.tar-1", weights_only=True)["state_dict"]
    assert all(torch.equal(weights[name], value) for name, value in first.model.state_dict().items())

    cfg.train.max_epoch = 2
    torchreid_snloss.train(resolve(cfg))  # goes on where the first one ended
    out = capsys.readouterr().out
    assert "epoch: [2/2]" in out
    assert "epoch: [1/2]" not in out
    cfg.data.save_dir = str(tmp_path / "model/model.pth.tar-1")
    with pytest.raises(ConfigError, match=r"data\.save_dir .* can't be written to"):
        torchreid_snloss.train(cfg)


@pytest.mark.parametrize(
    "function", [engine_run_kwargs, imagedata_kwargs, videodata_kwargs, optimizer_kwargs, lr_scheduler_kwargs]
)
def test_names_of_0_2_keep_working(function: Any) -> None:
    module = importlib.import_module("torchreid_snloss.config")
    with pytest.warns(DeprecationWarning, match=f"is now torchreid_snloss.settings.{function.__name__}"):
        old = getattr(module, function.__name__)
    assert old(config()) == function(resolve(config()))


def test_check_config_of_0_2_keeps_working() -> None:
    checks = importlib.import_module("torchreid_snloss.checks")
    with pytest.warns(DeprecationWarning, match=r"is now torchreid_snloss\.settings\.resolve"):
        check_config = checks.check_config
    with pytest.raises(ConfigError, match=r"train\.seed must be at least 0"):
        check_config(config("train.seed", -1))
