"""Checks of the data, the model and custom losses before training, so that mistakes show within seconds."""

from __future__ import annotations

import collections
import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchreid import utils as reid_utils

from torchreid_snloss.config import ConfigError, get_default_config
from torchreid_snloss.data import VALIDATION
from torchreid_snloss.deprecation import renamed
from torchreid_snloss.engine.multi_query import find_more_queries
from torchreid_snloss.errors import text_of
from torchreid_snloss.losses import Criterion
from torchreid_snloss.settings import Config, Settings, loss_kwargs, resolve

__all__ = ["check_criteria", "check_datamanager", "check_model"]

__getattr__ = renamed(__name__, {"check_config": "torchreid_snloss.settings.resolve"})


def check_datamanager(cfg: Config, datamanager: Any) -> None:
    """Checks the config against the data: there must be two identities and a step to train, and the ranks that are set.

    `build_datamanager` calls it.

    Raises:
        ConfigError: states what the config asks for and what the data has.
    """
    settings = resolve(cfg)
    loader = datamanager.train_loader
    if not settings.evaluate and datamanager.num_train_pids < 2:
        raise ConfigError(
            f"the training set needs at least 2 identities, since a loss tells them apart, got "
            f"{datamanager.num_train_pids}"
        )
    if not settings.evaluate and len(loader) == 0:
        raise ConfigError(
            f"train.batch_size {settings.batch_size} is larger than the training set of {len(loader.dataset)} images: "
            "no epoch would train a step"
        )
    short = getattr(loader.sampler, "num_short_pids", 0)
    if short and not settings.evaluate:
        print(
            f"=> {short} of {datamanager.num_train_pids} training identities have fewer than "
            f"{settings.num_instances} images, which are repeated within a batch"
        )
    if settings.data_type == "video" and settings.values["video.sample_method"] == "all":
        _check_lengths(settings, datamanager)
    if not settings.evaluate:
        _note_files_of_several_identities(loader.dataset.train)
    if settings.multi_query:
        for name, splits in datamanager.test_loader.items():
            if name != VALIDATION and not find_more_queries(splits["query"].dataset):
                raise ConfigError(
                    f"test.multi_query needs a folder gt_bbox beside {name!r}'s query, with images of a query's person "
                    "from its camera"
                )
    for name, splits in datamanager.test_dataset.items():
        query, gallery = splits["query"], splits["gallery"]
        cameras = collections.defaultdict(set)
        for _, pid, camid, *_ in gallery:
            cameras[pid].add(camid)
        unmatched = sum(not cameras[pid] - {camid} for _, pid, camid, *_ in query)
        if unmatched == len(query):
            raise ConfigError(f"no query of {name!r} has an image of its identity under another camera in the gallery")
        negative = sum(pid < 0 for _, pid, *_ in gallery)
        if negative:
            print(
                f"=> {negative} of {len(gallery)} gallery images of {name} have a negative identity and count as "
                "images of other people; leave junk images out of the gallery if they are to be ignored"
            )
        if unmatched:
            print(
                f"=> {unmatched} of {len(query)} queries of {name} have no image of their identity under another "
                "camera in the gallery; the evaluation leaves them out"
            )
        # torchreid's evaluation stops at rank 50; CUHK03's metric ranks one image per identity.
        longest = min(50, len({item[1] for item in gallery} if settings.use_metric_cuhk03 else gallery))
        bad = [rank for rank in settings.ranks if not 1 <= rank <= longest]
        # Of the default ranks, the test prints those that there are.
        if bad and (settings.use_metric_cuhk03 or list(settings.ranks) != get_default_config().test.ranks):
            raise ConfigError(f"test.ranks must lie between 1 and {longest} for {name!r}, got {bad}")


def _check_lengths(settings: Settings, datamanager: Any) -> None:
    """Tracklets in a batch must have the same number of frames, and batch norm needs two images."""
    parts = {f"{name}'s test set": splits for name, splits in datamanager.test_loader.items()}
    sets = [("test.batch_size", name, loader.dataset) for name, splits in parts.items() for loader in splits.values()]
    if not settings.evaluate:
        sets.append(("train.batch_size", "the training set", datamanager.train_loader.dataset))
    for key, name, dataset in sets:
        frames = [len(item[0]) for item in dataset.data]
        batch = settings.values[key]
        if batch > 1 and min(frames) < max(frames):
            raise ConfigError(
                f"video.sample_method all needs {key} 1, since the tracklets of {name} have from {min(frames)} to "
                f"{max(frames)} frames, got {key} {batch}"
            )
        if key == "train.batch_size" and batch * min(frames) < 2:
            raise ConfigError(
                "video.sample_method all would put one image alone through the model, whose batch norm needs at least "
                f"2 at a time: {name} has a tracklet of one frame"
            )


def _note_files_of_several_identities(items: Any) -> None:
    identities: dict[Any, set[int]] = collections.defaultdict(set)
    for path, pid, *_ in items:
        identities[path if isinstance(path, str) else tuple(path)].add(pid)
    several = [path for path, pids in identities.items() if len(pids) > 1]
    if several:
        first = several[0] if isinstance(several[0], str) else several[0][0]
        print(
            f"** {len(several)} of {len(identities)} training images belong to several identities each, such as "
            f"{first}: do the data sets overlap?"
        )


def check_model(cfg: Config, model: nn.Module) -> None:
    """Checks that the model supports the image size, `train.channels_last` and the layer names of the config.

    While `train.fixbase_epoch` freezes the backbone, the loss must depend on one of `train.open_layers`. With a softmax
    weight of 0, for example, the classifier gets no gradient (upstream issue 373). `build_model` calls this function.

    Raises:
        ConfigError: if a layer doesn't exist, if the loss depends on none of the open layers, or if the model does not
            support images of this size or the channels-last format.
    """
    settings = resolve(cfg)
    _check_size(settings, model)
    if settings.channels_last:
        _check_channels_last(settings, model)
    if settings.evaluate:
        return
    children = [name for name, _ in model.named_children()]
    for key, layers, in_use in (
        ("train.open_layers", settings.open_layers, settings.fixbase_epoch > 0),
        ("train.new_layers", settings.new_layers, settings.staged_lr),
    ):
        unknown = [layer for layer in layers if layer not in children]
        if in_use and unknown:
            raise ConfigError(f"{key}: {settings.model_name} has no {unknown}, it has {children}")
    opened = list(settings.open_layers)
    if settings.fixbase_epoch <= settings.start_epoch or not opened:
        return

    # Runs a copy of the model on two blank images to see which outputs require a gradient.
    trial = copy.deepcopy(model).cpu().train()
    reid_utils.open_specified_layers(trial, opened)
    outputs = trial(_blank_images(settings, 2))
    logits, features = (outputs, ()) if settings.logits_only else outputs
    metric, softmax = any(settings.metric_weights.values()), settings.softmax_weight > 0
    used = ([features] if metric else []) + ([logits] if softmax else [])
    if not any(tensor.requires_grad for output in used for tensor in _tensors(output)):
        raise ConfigError(
            f"train.fixbase_epoch {settings.fixbase_epoch} trains {opened} alone at first, but nothing in loss "
            f"{settings.loss_name!r} depends on them (is loss.{settings.losses[0]}.weight_x 0?); set "
            "train.fixbase_epoch 0, give the softmax term a weight, or open other layers"
        )


def check_criteria(cfg: Config, criteria: Mapping[str, Criterion], model: nn.Module, num_classes: int) -> None:
    """Tries a custom criterion on random features of the model's shape, since only a call can show that it works.

    `build_engine` calls this function.

    Raises:
        ConfigError: if the criterion raises an error or does not return a scalar.
    """
    settings = resolve(cfg)
    if "custom" not in criteria or settings.evaluate:
        return
    trial = copy.deepcopy(model.module if isinstance(model, nn.DataParallel) else model).cpu().train()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        _, features = trial(_blank_images(settings, 2))
        pids = torch.tensor([0, 0, num_classes - 1, num_classes - 1])
        try:
            for feature in _tensors(features):
                criterion = copy.deepcopy(criteria["custom"])
                value = criterion(torch.randn(4, feature.shape[1]), pids)
                if not (isinstance(value, Tensor) and value.numel() == 1):
                    raise TypeError(f"it must give a scalar tensor, got {value!r}")
        except (Exception, SystemExit) as error:  # raised by the user's own code
            target = loss_kwargs(settings)["custom"]["target"]
            raise ConfigError(
                f"loss.custom: {target} with (4, {feature.shape[1]}) features and identities up to "
                f"{num_classes - 1}: {type(error).__name__}: {error}"
            ) from error


def _check_size(settings: Settings, model: nn.Module) -> None:
    trial = copy.deepcopy(model).cpu().eval()
    try:
        with torch.no_grad():
            trial(_blank_images(settings, 1))
    except (AssertionError, RuntimeError, ValueError) as error:
        size = f"data.height {settings.height} and data.width {settings.width}"
        raise ConfigError(f"{settings.model_name} does not take images of {size}: {text_of(error)}") from error


def _check_channels_last(settings: Settings, model: nn.Module) -> None:
    trial = copy.deepcopy(model).cpu().train().to(memory_format=torch.channels_last)
    try:
        with torch.no_grad():
            trial(_blank_images(settings, 2).to(memory_format=torch.channels_last))
    except RuntimeError as error:  # from a view() in the model, as in PCB and MuDeep
        raise ConfigError(f"{settings.model_name} does not take train.channels_last: {text_of(error)[:300]}") from error


def _blank_images(settings: Settings, number: int) -> Tensor:
    return torch.zeros(number, 3, settings.height, settings.width)


def _tensors(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)
