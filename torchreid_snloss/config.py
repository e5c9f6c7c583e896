"""The config tree: torchreid's keys and defaults, and the nodes of this package's losses.

Keys and defaults of torchreid are those of its ``scripts/default_config.py`` (1.4.0), which no package installs. The
``*_kwargs`` functions below have that file's names too, so that a main script made from torchreid's imports them from
here instead.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from yacs.config import CfgNode

from torchreid_snloss.engine import MetricEngine
from torchreid_snloss.losses import LOSSES

__all__ = [
    "ConfigError",
    "engine_run_kwargs",
    "get_default_config",
    "imagedata_kwargs",
    "leaves",
    "load_config",
    "loss_names",
    "lr_scheduler_kwargs",
    "metric_weights",
    "optimizer_kwargs",
    "softmax_weight",
    "videodata_kwargs",
    "weight_key",
]


class ConfigError(ValueError):
    """Something in the config, or in what it names, that training can't start with."""


_TORCHREID: dict[str, dict[str, Any]] = {
    "model": {
        "name": "resnet50",  # one of torchreid.models'
        "pretrained": True,  # ImageNet weights
        "load_weights": "",  # a checkpoint to start from
        "resume": "",  # a checkpoint to continue, or auto: the newest in save_dir/model
    },
    "data": {
        "type": "image",  # or video
        "root": "reid-data",  # the folder that holds the data sets
        "sources": ["market1501"],  # data sets to train on
        "targets": ["market1501"],  # data sets to test on
        "workers": 4,  # processes that load images
        "split_id": 0,  # which split, of data sets with several
        "height": 256,  # of an image, in pixels
        "width": 128,  # of an image, in pixels
        "combineall": False,  # train on query and gallery too
        "transforms": ["random_flip"],  # of random_flip, random_crop, random_patch, color_jitter, random_erase
        "k_tfm": 1,  # augmented copies of an image
        "norm_mean": [0.485, 0.456, 0.406],  # taken off red, green and blue, in [0, 1]
        "norm_std": [0.229, 0.224, 0.225],  # which they are divided by
        "save_dir": "log",  # for logs, checkpoints and pictures
        "load_train_targets": False,  # load the training images of the targets too, without labels
    },
    "market1501": {"use_500k_distractors": False},  # in the gallery
    "cuhk03": {
        "labeled_images": False,  # boxes drawn by people, not detected
        "classic_split": False,  # the first protocol's 20 splits
        "use_metric_cuhk03": False,  # one gallery image an identity, drawn at random
    },
    "sampler": {
        "train_sampler": "RandomSampler",  # torchreid's, or IdentitySampler, which metric losses get by themselves
        "train_sampler_t": "RandomSampler",  # of the targets' training images
        "num_instances": 4,  # images of an identity in a batch
        "num_cams": 1,  # cameras in a batch, of RandomDomainSampler
        "num_datasets": 1,  # data sets in a batch, of RandomDatasetSampler
    },
    "video": {
        "seq_len": 15,  # frames of a tracklet
        "sample_method": "evenly",  # or random, all: which frames
        "pooling_method": "avg",  # or max: a tracklet's feature of its frames'
    },
    "train": {
        "optim": "adam",  # or amsgrad, sgd, rmsprop, radam
        "lr": 0.0003,  # learning rate
        "weight_decay": 5e-4,  # L2 penalty of the weights
        "max_epoch": 60,  # epochs to train
        "start_epoch": 0,  # which model.resume sets
        "batch_size": 32,  # images in a batch, of all processes
        "fixbase_epoch": 0,  # epochs that train open_layers alone
        "open_layers": ["classifier"],  # layers that are trained then
        "staged_lr": False,  # another learning rate for the layers that are not new
        "new_layers": ["classifier"],  # the new ones
        "base_lr_mult": 0.1,  # the share of lr that the others have then
        "lr_scheduler": "single_step",  # or multi_step, cosine, exponential (the SN paper's)
        "stepsize": [20],  # epochs after which the learning rate falls; of exponential, the first of the fall
        "gamma": 0.1,  # factor of a step; of exponential, of the whole fall
        "print_freq": 20,  # batches between two progress lines
        "seed": 1,  # of everything random
    },
    "sgd": {
        "momentum": 0.9,  # of train.optim sgd, and of rmsprop
        "dampening": 0.0,  # of the momentum
        "nesterov": False,  # Nesterov's momentum
    },
    "rmsprop": {"alpha": 0.99},  # smoothing constant
    "adam": {
        "beta1": 0.9,  # decay of the mean gradient
        "beta2": 0.999,  # decay of the mean squared gradient
    },
    "loss": {
        "name": "softmax",  # softmax, triplet, sn, hap2s, fidi, custom, or several of the last five, as sn+triplet
        "softmax": {
            "label_smooth": True,  # smooth labels by 0.1, of the softmax term of every loss
        },
        "triplet": {
            "margin": 0.3,  # in the unit of the distances
            "weight_t": 1.0,  # weight of the triplet term
            "weight_x": 0.0,  # weight of the softmax term
        },
    },
    "test": {
        "batch_size": 100,  # images at a time
        "dist_metric": "euclidean",  # or cosine
        "normalize_feature": False,  # L2-normalise features; True where a loss does, unless it is set
        "ranks": [1, 5, 10, 20],  # of the CMC curve, to print
        "evaluate": False,  # test only
        "eval_freq": -1,  # in epochs; -1: after training only
        "start_eval": 0,  # the first epoch that may be evaluated
        "rerank": False,  # k-reciprocal re-ranking, in a test run
        "visrank": False,  # pictures of ranked lists; after training the test is run once more for them
        "visrank_topk": 10,  # images in a list
    },
}

# Keys that torchreid has not.
_OURS: dict[str, dict[str, Any]] = {
    "model": {
        "last_stride": 0,  # of a ResNet's last stage, 1 or 2; 0: as it is
        "embedding": [],  # widths of layers after the pooled features, as [1024, 128]
        "neck": "none",  # or bnneck: a batch norm after the features of the metric loss
    },
    "test": {
        "flip": False,  # features are the mean of an image's and its mirror image's
        "multi_query": False,  # a query's feature is the mean over Market-1501's gt_bbox images of it
        "rerank_in_training": False,  # test.rerank is for test runs alone, as in torchreid
    },
    "data": {
        "val_fraction": 0.0,  # share of the training identities held out to choose the best checkpoint by
        "train_fraction": 1.0,  # share of the training identities to train on
        "label_noise": 0.0,  # share of the training images to give another identity's label, drawn at random
        "outliers": 0.0,  # share of the training images to replace by a small patch of theirs, as a failed detection
    },
    "train": {
        "save_freq": 1,  # epochs between checkpoints
        "keep": 3,  # newest checkpoints to keep; 0: all
        "nonfinite": "stop",  # or skip: what to do at a NaN or infinite loss or gradient
        "amp": "off",  # or bf16, fp16: mixed precision
        "channels_last": False,  # order of the images and weights in memory
        "compile": False,  # torch.compile the model
        "warmup_epochs": 0,  # in which the learning rate rises to what the schedule says
        "warmup_factor": 0.01,  # share of it in the first epoch
        "micro_batch": 0,  # images of a process in the model at a time, for batches beyond its memory; 0: all
        "sync_batchnorm": False,  # batch norm over all processes' images
        "record": False,  # leave what a report is drawn from in save_dir/record, and evaluate before training too
    },
    "loss": {
        "custom": {  # any criterion, by where it is imported from
            "target": "",  # as pytorch_metric_learning.losses.CircleLoss
            "kwargs": {},  # its keywords
            "miner": "",  # as pytorch_metric_learning.miners.MultiSimilarityMiner; empty: none
            "miner_kwargs": {},  # its keywords
            "weight_m": 1.0,  # weight of the criterion
            "weight_x": 1.0,  # weight of the softmax term
        },
        "memory": {  # features of earlier batches as further references
            "size": 0,  # how many; 0: none
            "start_epoch": 0,  # the epoch, from 0, in which they are first used
        },
    },
}
# Keys that older configs of torchreid's have: what they are called now, None: no more.
_OLD_KEYS = {"data.use_unlabeled_targets": "data.load_train_targets", "test.visactmap": None}
_KEYWORDS = ("loss.custom.kwargs", "loss.custom.miner_kwargs")  # nodes whose keys are anything
_MAY_BE_NONE = ("loss.hap2s.margin", "data.norm_mean", "data.norm_std")
_ENGINE_WEIGHTS = ("weight_m", "weight_x")


def get_default_config() -> CfgNode:
    """torchreid's config tree with ``loss.sn``, ``loss.hap2s``, ``loss.fidi`` and ``use_gpu`` added.

    The losses' keys and defaults are read off their constructors, those of the weights off the engines'.
    """
    cfg = CfgNode(_TORCHREID)
    cfg.use_gpu = torch.cuda.is_available()
    for section, keys in _OURS.items():
        cfg[section].update(CfgNode(keys))
    for key in ("kwargs", "miner_kwargs"):
        cfg.loss.custom[key] = CfgNode(new_allowed=True)
    weights = inspect.signature(MetricEngine).parameters
    for name, loss in LOSSES.items():
        defaults = {key: parameter.default for key, parameter in inspect.signature(loss).parameters.items()}
        del defaults["reduction"]  # training needs the mean
        cfg.loss[name] = CfgNode({**defaults, **{key: weights[key].default for key in _ENGINE_WEIGHTS}})
    return cfg


def load_config(config_file: str = "", options: Sequence[Any] = ()) -> CfgNode:
    """The default config with a YAML file and then ``KEY VALUE`` options merged in.

    Args:
        config_file: path of a YAML file in torchreid's format; empty: none. ``configs/...`` are also found where the
            package is installed.
        options: ``['loss.name', 'sn', 'train.lr', '0.001']`` and so on.

    Raises:
        ConfigError: for a missing or broken file, an unknown key, or a value of another type than the default's.
    """
    cfg = get_default_config()
    if config_file:
        try:
            with open(_found(config_file), encoding="utf-8") as stream:
                changes = yaml.safe_load(stream)
            changes = dict(leaves(changes))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"can't read the config file {config_file!r}: {' '.join(str(error).split())}") from error
        except (AttributeError, RecursionError) as error:
            raise ConfigError(f"config file {config_file!r} must hold sections of keys, and nothing else") from error
        for key, value in changes.items():
            _set(cfg, key, value)
    if len(options) % 2 != 0:
        raise ConfigError(f"options come in pairs, KEY VALUE, but the last one, {options[-1]!r}, has no value")
    for key, value in zip(options[::2], options[1::2]):
        _set(cfg, key, value)
    given = {*(changes if config_file else ()), *options[::2]}
    weights = metric_weights(cfg) if _known(cfg) else {}
    normalized = [name for name, weight in weights.items() if weight != 0 and cfg.loss[name].get("normalize")]
    if "test.normalize_feature" not in given and normalized and not cfg.test.normalize_feature:
        cfg.test.normalize_feature = True
        print(f"=> test.normalize_feature: True, as loss {cfg.loss.name!r} has it in training")
    return cfg


def _found(config_file: str) -> Path:
    path = Path(config_file)
    installed = Path(__file__).parent / path
    if not path.exists() and path.parts[:1] == ("configs",) and installed.is_file():
        print(f"=> {config_file} is the package's own, {installed}")
        return installed
    return path


def _known(cfg: CfgNode) -> bool:
    """Whether ``loss.name`` can be looked up; what is wrong with it is told when the config is checked."""
    return all(name == "softmax" or "weight_x" in cfg.loss.get(name, {}) for name in loss_names(cfg))


def leaves(tree: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Keys and values of a config, each key with its sections: ``loss.sn.scale``."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and f"{path}{key}" not in _KEYWORDS:
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _set(cfg: CfgNode, key: str, value: Any) -> None:
    known = dict(leaves(cfg))
    if key in _OLD_KEYS:
        print(f"=> config key {key} is {_OLD_KEYS[key] or 'no more, and is passed over'}")
        if _OLD_KEYS[key] is None:
            return
        key = str(_OLD_KEYS[key])
    swallowed = [item for item in value if item in known] if isinstance(value, list) else []
    if swallowed:
        raise ConfigError(f"{key} got {value}: put `--` between its values and the option {swallowed[0]}")
    if key not in known:
        guesses = difflib.get_close_matches(key, known, n=3)
        hint = f", did you mean {' or '.join(guesses)}?" if guesses else ""
        raise ConfigError(f"unknown config key {key!r}{hint}")
    if key == "train.amp" and value is False:
        value = "off"  # a bare off in YAML
    if value in (None, "None", "null") and key not in _MAY_BE_NONE:
        raise ConfigError(f"{key} must have a value, as its default {known[key]!r}, got {value!r}")
    if isinstance(known[key], float) and not isinstance(value, bool):
        # yacs takes no 1 where the default is 1.0.
        with contextlib.suppress(TypeError, ValueError):  # what is no number yacs finds out below
            value = float(value)
    if key in _KEYWORDS:
        value = _keywords(key, value)
    try:
        cfg.merge_from_list([key, value])
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{key} must be of type {type(known[key]).__name__}, as its default {known[key]!r}, got {value!r}"
        ) from error


def _keywords(key: str, value: Any) -> CfgNode:
    if isinstance(value, str):
        with contextlib.suppress(ValueError, SyntaxError):  # what is no literal is told below
            value = ast.literal_eval(value)
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"{key} must hold keywords, as \"{{'gamma': 80}}\", got {value!r}")
    # YAML takes 1e-1 for text.
    floats = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
    plain = {k: float(v) if isinstance(v, str) and floats.fullmatch(v) else v for k, v in value.items()}
    try:
        return CfgNode(plain, new_allowed=True)
    except AssertionError as error:
        raise ConfigError(f"{key} must hold numbers, text, lists and such: {error}") from error


def loss_names(cfg: CfgNode) -> list[str]:
    """The losses that ``loss.name`` names, one or several."""
    return str(cfg.loss.name).split("+")


def metric_weights(cfg: CfgNode) -> dict[str, float]:
    """The weight of each metric term, which compares images with each other; none for softmax alone."""
    names = [name for name in loss_names(cfg) if name != "softmax"]
    return {name: cfg.loss[name][weight_key(name)] for name in names}


def weight_key(name: str) -> str:
    """What the weight of a metric term is called in its node."""
    return "weight_t" if name == "triplet" else "weight_m"


def softmax_weight(cfg: CfgNode) -> float:
    """The weight of the softmax term; of several losses the first one's counts."""
    first = loss_names(cfg)[0]
    return 1.0 if first == "softmax" else float(cfg.loss[first].weight_x)


_DATA = {
    "root": "data.root",
    "sources": "data.sources",
    "targets": "data.targets",
    "height": "data.height",
    "width": "data.width",
    "transforms": "data.transforms",
    "norm_mean": "data.norm_mean",
    "norm_std": "data.norm_std",
    "use_gpu": "use_gpu",
    "split_id": "data.split_id",
    "combineall": "data.combineall",
    "batch_size_train": "train.batch_size",
    "batch_size_test": "test.batch_size",
    "workers": "data.workers",
    "num_instances": "sampler.num_instances",
    "num_cams": "sampler.num_cams",
    "num_datasets": "sampler.num_datasets",
    "train_sampler": "sampler.train_sampler",
}


def imagedata_kwargs(cfg: CfgNode) -> dict[str, Any]:
    """Keywords of torchreid's ``ImageDataManager``."""
    return _pick(
        cfg,
        **_DATA,
        k_tfm="data.k_tfm",
        load_train_targets="data.load_train_targets",
        train_sampler_t="sampler.train_sampler_t",
        cuhk03_labeled="cuhk03.labeled_images",
        cuhk03_classic_split="cuhk03.classic_split",
        market1501_500k="market1501.use_500k_distractors",
    )


def videodata_kwargs(cfg: CfgNode) -> dict[str, Any]:
    """Keywords of torchreid's ``VideoDataManager``."""
    return _pick(cfg, **_DATA, seq_len="video.seq_len", sample_method="video.sample_method")


def optimizer_kwargs(cfg: CfgNode) -> dict[str, Any]:
    """Keywords of torchreid's ``build_optimizer``."""
    return _pick(
        cfg,
        optim="train.optim",
        lr="train.lr",
        weight_decay="train.weight_decay",
        momentum="sgd.momentum",
        sgd_dampening="sgd.dampening",
        sgd_nesterov="sgd.nesterov",
        rmsprop_alpha="rmsprop.alpha",
        adam_beta1="adam.beta1",
        adam_beta2="adam.beta2",
        staged_lr="train.staged_lr",
        new_layers="train.new_layers",
        base_lr_mult="train.base_lr_mult",
    )


def lr_scheduler_kwargs(cfg: CfgNode) -> dict[str, Any]:
    """Keywords of torchreid's ``build_lr_scheduler``."""
    return _pick(
        cfg,
        lr_scheduler="train.lr_scheduler",
        stepsize="train.stepsize",
        gamma="train.gamma",
        max_epoch="train.max_epoch",
    )


def engine_run_kwargs(cfg: CfgNode) -> dict[str, Any]:
    """Keywords of torchreid's ``Engine.run``."""
    return _pick(
        cfg,
        save_dir="data.save_dir",
        max_epoch="train.max_epoch",
        start_epoch="train.start_epoch",
        fixbase_epoch="train.fixbase_epoch",
        open_layers="train.open_layers",
        start_eval="test.start_eval",
        eval_freq="test.eval_freq",
        test_only="test.evaluate",
        print_freq="train.print_freq",
        dist_metric="test.dist_metric",
        normalize_feature="test.normalize_feature",
        visrank="test.visrank",
        visrank_topk="test.visrank_topk",
        use_metric_cuhk03="cuhk03.use_metric_cuhk03",
        ranks="test.ranks",
        rerank="test.rerank",
    )


def _pick(cfg: CfgNode, **keys: str) -> dict[str, Any]:
    values = dict(leaves(cfg))
    return {keyword: values[key] for keyword, key in keys.items()}
