"""Checks a config: the range of every key, the rules among several, and what a table can't say."""

from __future__ import annotations

import os.path
from collections.abc import Collection, Mapping
from typing import Any

import torch
from yacs.config import CfgNode

from torchreid_snloss import device, distributed
from torchreid_snloss.config import (
    ConfigError,
    leaves,
    loss_names,
    metric_weights,
    softmax_weight,
    unknown_key,
    weight_key,
)
from torchreid_snloss.config.keys import OUR_KEYS, all_keys
from torchreid_snloss.config.rules import RULES
from torchreid_snloss.criteria import make_criterion
from torchreid_snloss.data import import_modules
from torchreid_snloss.engine import check_weights
from torchreid_snloss.engine.amp import check_amp
from torchreid_snloss.losses import LOSSES
from torchreid_snloss.register import register

__all__ = ["check_config"]


def check_config(cfg: CfgNode) -> None:
    """Checks a whole config.

    Raises:
        ConfigError: with the key, its value and the allowed values.
    """
    values = dict(leaves(cfg))
    _import_modules(values.get("data.modules"))
    _check_values(values)
    _check_names(loss_names(cfg), cfg.loss.name)
    for rule in RULES:
        rule.check(values)
    _check_batch(values, needs_pairs=any(metric_weights(cfg).values()))
    if cfg.use_gpu and not device.is_available():
        raise ConfigError("use_gpu is True, but torch finds no GPU")
    try:
        if not cfg.test.evaluate:
            check_amp(cfg.train.amp, device.type_of(cfg.use_gpu))
    except ValueError as error:
        raise ConfigError(f"train.{error}") from error
    for key, path in (("model.load_weights", cfg.model.load_weights), ("model.resume", cfg.model.resume)):
        if path and not os.path.isfile(path) and (key, path) != ("model.resume", "auto"):
            raise ConfigError(f"{key}: there is no file {path!r}")
    _check_loss(cfg)


def _import_modules(names: Any) -> None:
    """Imports the modules first, since they may add what other keys name, into a torchreid that is registered with."""
    if names and OUR_KEYS["data.modules"].range.holds(names):
        try:
            register()
            import_modules(names)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(str(error)) from error


def _check_values(values: Mapping[str, Any]) -> None:
    keys = all_keys()
    if missing := [key for key in keys if key not in values]:
        raise ConfigError(f"the config has no {', '.join(missing)}: make it with get_default_config or load_config")
    if others := [key for key in values if key not in keys]:
        raise ConfigError(unknown_key(others[0], keys))
    for key, known in keys.items():
        problem = known.range.problem(key, values[key])
        if problem and values[key] is None:
            raise ConfigError(f"{key} must have a value, as its default {known.default!r}, got None")
        if problem:
            raise ConfigError(problem)


def _check_choice(key: str, value: str, words: Collection[str]) -> None:
    if value not in words:
        raise ConfigError(f"{key} must be one of {', '.join(words)}, got {value!r}")


def _check_names(names: list[str], given: str) -> None:
    for name in names:
        words = ["triplet", *LOSSES, "custom"]
        _check_choice("loss.name", name, words if len(names) > 1 else ["softmax", *words])
    if len(set(names)) < len(names):
        raise ConfigError(f"loss.name must name each loss once, got {given!r}")


def _check_batch(values: Mapping[str, Any], needs_pairs: bool) -> None:
    """Batch norm, in training, must see two images or more each time: one has no variance."""
    if values["test.evaluate"]:
        return
    batch, micro_batch = values["train.batch_size"], values["train.micro_batch"]
    frames = values["video.seq_len"] if values["data.type"] == "video" else 1
    if values["data.type"] == "video" and values["video.sample_method"] == "all":
        frames = 3  # each tracklet has its own number, which may be odd
    most = fewest = batch * frames
    processes = distributed.world_size()
    if processes > 1:  # the images of an identity stay together
        of_identities = values["sampler.train_sampler"] in ("IdentitySampler", "RandomIdentitySampler") or needs_pairs
        instances = values["sampler.num_instances"] if of_identities else 1
        instances = instances if batch >= processes * instances else 1
        groups = -(-batch // instances)
        most, fewest = -(-groups // processes) * instances * frames, groups // processes * instances * frames
    parts = -(-most // micro_batch) if micro_batch else 1
    if fewest // parts < 2:
        of_each = f" on {processes} processes" if processes > 1 else ""
        raise ConfigError(
            f"train.batch_size {batch}{of_each} with train.micro_batch {micro_batch} would put one image alone through "
            "the model, whose batch norm needs at least 2 at a time"
        )


def _check_loss(cfg: CfgNode) -> None:
    weights = metric_weights(cfg)
    keys = {f"loss.{name}.{weight_key(name)}": weight for name, weight in weights.items()}
    try:
        if weights:
            check_weights(**keys, **{f"loss.{loss_names(cfg)[0]}.weight_x": softmax_weight(cfg)})
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error
    with torch.random.fork_rng(devices=[]):  # a loss with parameters draws random initial values
        for name in weights:
            make_criterion(name, cfg.loss[name])
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
