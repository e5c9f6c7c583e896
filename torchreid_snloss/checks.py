"""What is looked at before training starts, so that a mistake costs seconds, and one line says what it is."""

from __future__ import annotations

import copy
import os.path
from typing import Any

import torch
from torch import Tensor, nn
from torchreid import data, optim
from torchreid import utils as reid_utils
from yacs.config import CfgNode

from torchreid_snloss.config import ConfigError, loss_weights
from torchreid_snloss.engine import ENGINES
from torchreid_snloss.losses import LOSSES

__all__ = ["check_config", "check_datamanager", "check_open_layers"]


def check_config(cfg: CfgNode) -> None:
    """Checks what the config alone shows.

    Raises:
        ConfigError: says which key, what it holds and what it may hold.
    """
    _check_choice(cfg, "loss.name", ["softmax", "triplet", *LOSSES])
    _check_choice(cfg, "data.type", ["image", "video"])
    _check_choice(cfg, "train.optim", optim.optimizer.AVAI_OPTIMS)
    _check_choice(cfg, "train.lr_scheduler", optim.lr_scheduler.AVAI_SCH)
    _check_choice(cfg, "sampler.train_sampler", data.sampler.AVAI_SAMPLERS)
    _check_choice(cfg, "test.dist_metric", ["euclidean", "cosine"])
    name = cfg.loss.name
    if name in LOSSES and (cfg.data.type, name) not in ENGINES:
        raise ConfigError(f"loss.name {name!r} trains on data.type 'image' only, got {cfg.data.type!r}")
    for key, path in (("model.load_weights", cfg.model.load_weights), ("model.resume", cfg.model.resume)):
        if path and not os.path.isfile(path):
            raise ConfigError(f"{key}: there is no file {path!r}")
    metric_weight, softmax_weight = loss_weights(cfg)
    if min(metric_weight, softmax_weight) < 0 or metric_weight + softmax_weight == 0:
        raise ConfigError(
            f"loss.{name}: the weights of the metric and the softmax term must be at least 0 and not both 0, "
            f"got {metric_weight} and {softmax_weight}"
        )
    if metric_weight > 0 and not cfg.test.evaluate:
        batch, instances = cfg.train.batch_size, cfg.sampler.num_instances
        if instances < 2 or batch < 2 * instances or batch % instances != 0:
            raise ConfigError(
                f"a batch for loss {name!r} must hold at least 2 identities with at least 2 images each: "
                "train.batch_size = identities x sampler.num_instances, "
                f"got train.batch_size {batch} and sampler.num_instances {instances}"
            )


def _check_choice(cfg: CfgNode, key: str, choices: list[str]) -> None:
    section, name = key.split(".")
    if cfg[section][name] not in choices:
        raise ConfigError(f"{key} must be one of {', '.join(choices)}, got {cfg[section][name]!r}")


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
    for name, splits in datamanager.test_dataset.items():
        longest = min(50, len(splits["gallery"]))  # torchreid's evaluation stops at 50
        bad = [rank for rank in cfg.test.ranks if not 1 <= rank <= longest]
        if bad:
            raise ConfigError(f"test.ranks must lie between 1 and {longest} for {name!r}, got {bad}")


def check_open_layers(cfg: CfgNode, model: nn.Module) -> None:
    """Checks that, while ``train.fixbase_epoch`` freezes the base, the loss reaches one of ``train.open_layers``.

    With the softmax term at weight 0, for one, nothing reaches a classifier (upstream issue 373).

    Raises:
        ConfigError: if a layer doesn't exist, or if nothing in the loss trains any.
    """
    layers = cfg.train.open_layers
    if cfg.test.evaluate or cfg.train.fixbase_epoch <= cfg.train.start_epoch or not layers:
        return
    children = [name for name, _ in model.named_children()]
    unknown = [layer for layer in layers if layer not in children]
    if unknown:
        raise ConfigError(f"train.open_layers: {cfg.model.name} has no {unknown}, it has {children}")

    # Asked of the model itself, on a copy: two blank images, and see which outputs carry a gradient.
    trial = copy.deepcopy(model).cpu().train()
    reid_utils.open_specified_layers(trial, layers)
    outputs = trial(torch.zeros(2, 3, cfg.data.height, cfg.data.width))
    logits, features = (outputs, ()) if cfg.loss.name == "softmax" else outputs
    metric_weight, softmax_weight = loss_weights(cfg)
    used = ([features] if metric_weight > 0 else []) + ([logits] if softmax_weight > 0 else [])
    if not any(tensor.requires_grad for output in used for tensor in _tensors(output)):
        raise ConfigError(
            f"train.fixbase_epoch {cfg.train.fixbase_epoch} trains {layers} alone at first, but nothing in loss "
            f"{cfg.loss.name!r} depends on them (is loss.{cfg.loss.name}.weight_x 0?); set train.fixbase_epoch 0, give "
            "the softmax term a weight, or open other layers"
        )


def _tensors(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)
