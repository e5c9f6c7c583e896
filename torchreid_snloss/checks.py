"""What is looked at before training starts, so that a mistake costs seconds, and one line says what it is."""

from __future__ import annotations

import collections
import copy
import functools
import os.path
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchreid import data, optim
from torchreid import utils as reid_utils
from yacs.config import CfgNode

from torchreid_snloss import distributed
from torchreid_snloss.build import EXPONENTIAL, build_criteria, engine_class
from torchreid_snloss.config import ConfigError, loss_names, metric_weights, softmax_weight, weight_key
from torchreid_snloss.data import VALIDATION
from torchreid_snloss.engine import MetricEngine, check_weights
from torchreid_snloss.engine.amp import check_amp
from torchreid_snloss.engine.multi_query import find_more_queries
from torchreid_snloss.losses import LOSSES, Criterion

__all__ = ["check_config", "check_criteria", "check_datamanager", "check_model"]

# torchreid's build_transforms passes over a name it does not know.
_TRANSFORMS = ("random_flip", "random_crop", "random_patch", "color_jitter", "random_erase")


def check_config(cfg: CfgNode) -> None:
    """Checks what the config alone shows.

    Raises:
        ConfigError: says which key, what it holds and what it may hold.
    """
    names = loss_names(cfg)
    for name in names:
        choices = ["triplet", *LOSSES, "custom"]
        _check_choice("loss.name", name, choices if len(names) > 1 else ["softmax", *choices])
    if len(set(names)) < len(names):
        raise ConfigError(f"loss.name must name each loss once, got {cfg.loss.name!r}")
    _check_choice("data.type", cfg.data.type, ["image", "video"])
    _check_choice("train.optim", cfg.train.optim, optim.optimizer.AVAI_OPTIMS)
    _check_choice("train.lr_scheduler", cfg.train.lr_scheduler, [*optim.lr_scheduler.AVAI_SCH, EXPONENTIAL])
    _check_choice("model.neck", cfg.model.neck, ["none", "bnneck"])
    _check_choice("video.pooling_method", cfg.video.pooling_method, ["avg", "max"])
    _check_choice("sampler.train_sampler", cfg.sampler.train_sampler, data.sampler.AVAI_SAMPLERS)
    _check_choice("test.dist_metric", cfg.test.dist_metric, ["euclidean", "cosine"])
    _check_choice("train.nonfinite", cfg.train.nonfinite, ["stop", "skip"])
    for transform in cfg.data.transforms:
        _check_choice("data.transforms", transform, _TRANSFORMS)
    engine_class(cfg)
    _check_numbers(cfg)
    try:
        check_amp(cfg.train.amp, "cuda" if cfg.use_gpu else "cpu")
    except ValueError as error:
        raise ConfigError(f"train.{error}") from error
    for key, path in (("model.load_weights", cfg.model.load_weights), ("model.resume", cfg.model.resume)):
        if path and not os.path.isfile(path) and (key, path) != ("model.resume", "auto"):
            raise ConfigError(f"{key}: there is no file {path!r}")
    _check_loss(cfg)


def _check_choice(key: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{key} must be one of {', '.join(choices)}, got {value!r}")


def _check_numbers(cfg: CfgNode) -> None:
    train, test = cfg.train, cfg.test
    stepsize = train.stepsize if isinstance(train.stepsize, list) else [train.stepsize]
    norms = [list(cfg.data.norm_mean or ()), list(cfg.data.norm_std or ())]
    # Then there is an nn.DataParallel.
    several_gpus = cfg.use_gpu and torch.cuda.device_count() > 1 and distributed.world_size() == 1
    tests = {
        "data.sources and data.targets must name at least one data set each": cfg.data.sources and cfg.data.targets,
        "data.height and data.width must be at least 1": min(cfg.data.height, cfg.data.width) >= 1,
        "data.workers must be at least 0": cfg.data.workers >= 0,
        "data.k_tfm must be 1, torchreid's engines take no more": cfg.data.k_tfm == 1,
        "data.norm_mean and data.norm_std must be 3 numbers each, the latter above 0": all(
            len(norm) in (0, 3) for norm in norms
        )
        and all(isinstance(value, (int, float)) for norm in norms for value in norm)
        and min(cfg.data.norm_std or [1]) > 0,
        "data.val_fraction must be at least 0 and below 1": 0 <= cfg.data.val_fraction < 1,
        "data.train_fraction must be above 0 and at most 1": 0 < cfg.data.train_fraction <= 1,
        "data.label_noise must be at least 0 and below 1": 0 <= cfg.data.label_noise < 1,
        "data.outliers must be at least 0 and at most 1": 0 <= cfg.data.outliers <= 1,
        "train.save_freq must be at least 1 and train.keep at least 0": train.save_freq >= 1 and train.keep >= 0,
        "train.nonfinite skip needs loss sn, hap2s, fidi or custom": train.nonfinite == "stop"
        or issubclass(engine_class(cfg), MetricEngine),
        "train.amp bf16 trains on one GPU, hide the others with CUDA_VISIBLE_DEVICES": train.amp != "bf16"
        or not several_gpus,
        "train.compile trains on one GPU, hide the others with CUDA_VISIBLE_DEVICES": not train.compile
        or not several_gpus,
        "model.last_stride must be 0, 1 or 2": cfg.model.last_stride in (0, 1, 2),
        "model.embedding must be a list of widths": all(_is_count(width) for width in cfg.model.embedding),
        "train.warmup_factor must be above 0 and at most 1": 0 < train.warmup_factor <= 1,
        "train.lr_scheduler exponential needs a first train.stepsize below train.max_epoch and train.gamma above 0": (
            train.lr_scheduler != EXPONENTIAL
            or (all(map(_is_count, stepsize)) and min(stepsize[:1], default=0) < train.max_epoch and train.gamma > 0)
        ),
        "train.micro_batch must be at least 0": train.micro_batch >= 0,
        "train.sync_batchnorm True needs GPUs, use_gpu True": not train.sync_batchnorm or cfg.use_gpu,
        "loss.memory.size and loss.memory.start_epoch must be at least 0": min(cfg.loss.memory.values()) >= 0,
        "loss.memory.size above 0 needs data.type image": cfg.loss.memory.size == 0 or cfg.data.type == "image",
        "train.seed must be at least 0": train.seed >= 0,
        "train.lr must be above 0 and finite": 0 < train.lr < float("inf"),
        "train.print_freq must be at least 1": train.print_freq >= 1,
        "train.batch_size and test.batch_size must be at least 1": min(train.batch_size, test.batch_size) >= 1,
        "train.start_epoch must be at least 0 and below train.max_epoch": 0 <= train.start_epoch < train.max_epoch,
        "train.warmup_epochs must be at least 0 and below train.max_epoch": 0 <= train.warmup_epochs < train.max_epoch,
        "train.stepsize must be a list of epochs above 0": stepsize and all(_is_count(step) for step in stepsize),
        "train.open_layers must name a layer where train.fixbase_epoch is above 0": train.open_layers
        or train.fixbase_epoch <= 0,
        "test.ranks must be a list of whole numbers": all(_is_count(rank) for rank in test.ranks),
        "test.visrank_topk must be at least 1": test.visrank_topk >= 1,
        "use_gpu is True, but torch finds no GPU": torch.cuda.is_available() or not cfg.use_gpu,
    }
    for requirement, met in tests.items():
        if not met:
            keys = [word.rstrip(",") for word in requirement.split() if "." in word]
            given = ", ".join(f"{key} {_value(cfg, key)}" for key in keys)
            raise ConfigError(requirement + (f"; got {given}" if given else ""))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _value(cfg: CfgNode, key: str) -> Any:
    return functools.reduce(lambda node, name: node[name], key.split("."), cfg)


def _check_loss(cfg: CfgNode) -> None:
    weights = metric_weights(cfg)
    keys = {f"loss.{name}.{weight_key(name)}": weight for name, weight in weights.items()}
    try:
        if weights:
            check_weights(**keys, **{f"loss.{loss_names(cfg)[0]}.weight_x": softmax_weight(cfg)})
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error
    build_criteria(cfg)
    if any(weights.values()) and not cfg.test.evaluate:
        batch, instances = cfg.train.batch_size, cfg.sampler.num_instances
        if instances < 2 or batch < 2 * instances:
            raise ConfigError(
                f"a batch for loss {cfg.loss.name!r} must hold at least 2 identities with at least 2 images each: "
                "train.batch_size = identities x sampler.num_instances, "
                f"got train.batch_size {batch} and sampler.num_instances {instances}"
            )
        processes = distributed.world_size()
        if batch < processes * instances:
            raise ConfigError(
                f"train.batch_size {batch} with {instances} images an identity (sampler.num_instances) is "
                f"{batch // instances} identities, too few for {processes} processes"
            )


def check_datamanager(cfg: CfgNode, datamanager: Any) -> None:
    """Checks the config against the data: that an epoch trains, and that the ranks to report exist.

    Raises:
        ConfigError: says what the config asks for and what the data has.
    """
    loader = datamanager.train_loader
    if not cfg.test.evaluate and len(loader) == 0:
        raise ConfigError(
            f"train.batch_size {cfg.train.batch_size} is larger than the training set of {len(loader.dataset)} images: "
            "no epoch would train a step"
        )
    short = getattr(loader.sampler, "num_short_pids", 0)
    if short and not cfg.test.evaluate:
        print(
            f"=> {short} of {datamanager.num_train_pids} training identities have fewer than "
            f"{cfg.sampler.num_instances} images, some of which stand in a batch more than once"
        )
    if cfg.test.multi_query:
        for name, splits in datamanager.test_loader.items():
            if name != VALIDATION and not find_more_queries(splits["query"].dataset):
                raise ConfigError(f"test.multi_query needs a folder gt_bbox with images beside {name!r}'s query")
    for name, splits in datamanager.test_dataset.items():
        query, gallery = splits["query"], splits["gallery"]
        cameras = collections.defaultdict(set)
        for _, pid, camid, *_ in gallery:
            cameras[pid].add(camid)
        unmatched = sum(not cameras[pid] - {camid} for _, pid, camid, *_ in query)
        if unmatched == len(query):
            raise ConfigError(f"no query of {name!r} has an image of its identity under another camera in the gallery")
        if unmatched:
            print(
                f"=> {unmatched} of {len(query)} queries of {name} have no image of their identity under another "
                "camera in the gallery; the evaluation leaves them out"
            )
        # torchreid's evaluation stops at 50; CUHK03's metric ranks one image an identity.
        longest = min(50, len({item[1] for item in gallery} if cfg.cuhk03.use_metric_cuhk03 else gallery))
        bad = [rank for rank in cfg.test.ranks if not 1 <= rank <= longest]
        if bad:
            raise ConfigError(f"test.ranks must lie between 1 and {longest} for {name!r}, got {bad}")


def check_model(cfg: CfgNode, model: nn.Module) -> None:
    """Checks the config's layers against the model, and that it takes ``train.channels_last``.

    While ``train.fixbase_epoch`` freezes the base, the loss must reach one of ``train.open_layers``. With the softmax
    term at weight 0, for one, nothing reaches a classifier (upstream issue 373).

    Raises:
        ConfigError: if a layer doesn't exist, if nothing in the loss trains any open one, or if the model can't compute
            on images in channels-last order.
    """
    if cfg.train.channels_last:
        _check_channels_last(cfg, model)
    if cfg.test.evaluate:
        return
    children = [name for name, _ in model.named_children()]
    named = {"train.open_layers": cfg.train.fixbase_epoch > 0, "train.new_layers": cfg.train.staged_lr}
    for key, in_use in named.items():
        unknown = [layer for layer in cfg.train[key.removeprefix("train.")] if layer not in children]
        if in_use and unknown:
            raise ConfigError(f"{key}: {cfg.model.name} has no {unknown}, it has {children}")
    layers = cfg.train.open_layers
    if cfg.train.fixbase_epoch <= cfg.train.start_epoch or not layers:
        return

    # Asked of the model itself, on a copy: two blank images, and see which outputs carry a gradient.
    trial = copy.deepcopy(model).cpu().train()
    reid_utils.open_specified_layers(trial, layers)
    outputs = trial(torch.zeros(2, 3, cfg.data.height, cfg.data.width))
    logits, features = (outputs, ()) if cfg.loss.name == "softmax" else outputs
    used = ([features] if any(metric_weights(cfg).values()) else []) + ([logits] if softmax_weight(cfg) > 0 else [])
    if not any(tensor.requires_grad for output in used for tensor in _tensors(output)):
        raise ConfigError(
            f"train.fixbase_epoch {cfg.train.fixbase_epoch} trains {layers} alone at first, but nothing in loss "
            f"{cfg.loss.name!r} depends on them (is loss.{loss_names(cfg)[0]}.weight_x 0?); set train.fixbase_epoch "
            "0, give the softmax term a weight, or open other layers"
        )


def check_criteria(cfg: CfgNode, criteria: Mapping[str, Criterion], model: nn.Module, num_classes: int) -> None:
    """Tries a custom criterion on features such as the model's, since only a call shows what is wrong with it.

    Raises:
        ConfigError: if it raises, or gives no scalar.
    """
    if "custom" not in criteria or cfg.test.evaluate:
        return
    trial = copy.deepcopy(model).cpu().train()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        _, features = trial(torch.zeros(2, 3, cfg.data.height, cfg.data.width))
        pids = torch.tensor([0, 0, num_classes - 1, num_classes - 1])
        try:
            for feature in _tensors(features):
                criterion = copy.deepcopy(criteria["custom"])
                value = criterion(torch.randn(4, feature.shape[1]), pids)
                if not (isinstance(value, Tensor) and value.numel() == 1):
                    raise TypeError(f"it must give a scalar tensor, got {value!r}")
        except Exception as error:  # of a user's own code
            raise ConfigError(
                f"loss.custom: {cfg.loss.custom.target} with (4, {feature.shape[1]}) features and identities up to "
                f"{num_classes - 1}: {type(error).__name__}: {error}"
            ) from error


def _check_channels_last(cfg: CfgNode, model: nn.Module) -> None:
    trial = copy.deepcopy(model).cpu().train().to(memory_format=torch.channels_last)
    images = torch.zeros(2, 3, cfg.data.height, cfg.data.width).to(memory_format=torch.channels_last)
    try:
        with torch.no_grad():
            trial(images)
    except RuntimeError as error:  # of a view() in the model, as in PCB and MuDeep
        raise ConfigError(
            f"{cfg.model.name} does not take train.channels_last: {str(error).splitlines()[0]}"
        ) from error


def _tensors(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)
