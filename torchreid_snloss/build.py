"""From a config to what torchreid trains with: data manager, model, engine."""

from __future__ import annotations

from typing import Any

import gdown.exceptions
import torch
from torch import nn
from torchreid import data, engine, models
from torchreid import utils as reid_utils
from yacs.config import CfgNode

from torchreid_snloss.checkpoint import numpy_scalars_allowed
from torchreid_snloss.config import ConfigError, imagedata_kwargs, loss_weights, videodata_kwargs
from torchreid_snloss.data import IdentitySampler
from torchreid_snloss.engine import ENGINES

__all__ = ["build_datamanager", "build_engine", "build_model", "load_weights", "resume"]


def build_datamanager(cfg: CfgNode) -> Any:
    """torchreid's ``ImageDataManager`` or ``VideoDataManager``, as ``data.type`` says.

    A metric loss under the default ``RandomSampler`` gets the :class:`IdentitySampler`, and a line says so.

    Raises:
        ConfigError: for a dataset that is unknown, missing or empty, and for a batch size that doesn't fit it.
    """
    kwargs = imagedata_kwargs(cfg) if cfg.data.type == "image" else videodata_kwargs(cfg)
    metric_weight, _ = loss_weights(cfg)
    if kwargs["train_sampler"] == "RandomSampler" and metric_weight > 0 and not cfg.test.evaluate:
        kwargs["train_sampler"] = IdentitySampler.__name__
        print(
            f"=> sampler.train_sampler: IdentitySampler in place of RandomSampler, since loss {cfg.loss.name!r} needs "
            f"{cfg.sampler.num_instances} images of an identity (sampler.num_instances) in a batch"
        )
    manager = data.ImageDataManager if cfg.data.type == "image" else data.VideoDataManager
    where = f"data.sources {cfg.data.sources}, data.targets {cfg.data.targets}, data.root {cfg.data.root!r}"
    try:
        return manager(**kwargs)
    except IndexError as error:  # how torchreid takes a folder without images
        raise ConfigError(f"no images in the training, query or gallery folder ({where})") from error
    except OSError as error:
        raise ConfigError(f"the data is not there, and can't be downloaded or made ({where}): {error}") from error
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(f"can't load the data ({where}): {error}") from error


def build_model(cfg: CfgNode, num_classes: int) -> nn.Module:
    """torchreid's model ``model.name``.

    Args:
        cfg: the config.
        num_classes: number of training identities.

    Raises:
        ConfigError: for an unknown model, or ImageNet weights that can't be downloaded.
    """
    try:
        model: nn.Module = models.build_model(
            name=cfg.model.name,
            num_classes=num_classes,
            loss="softmax" if cfg.loss.name == "softmax" else "triplet",
            pretrained=cfg.model.pretrained,
            use_gpu=cfg.use_gpu,
        )
    except KeyError as error:
        raise ConfigError(f"model.name: {error.args[0]}") from error
    except (OSError, gdown.exceptions.FileURLRetrievalError) as error:
        raise ConfigError(
            f"can't download the ImageNet weights of {cfg.model.name}: {error}. Without them: model.pretrained False"
        ) from error
    return model


def load_weights(model: nn.Module, path: str) -> None:
    """Loads a checkpoint's weights, also one of torchreid's own engines; layers that differ stay as they are."""
    with numpy_scalars_allowed():
        reid_utils.load_pretrained_weights(model, path)


def resume(path: str, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> int:
    """Loads model, optimizer and scheduler from a checkpoint; returns the epoch to go on from."""
    with numpy_scalars_allowed():
        start_epoch: int = reid_utils.resume_from_checkpoint(path, model, optimizer=optimizer, scheduler=scheduler)
    return start_epoch


def build_engine(
    cfg: CfgNode, datamanager: Any, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any
) -> engine.Engine:
    """The engine for ``data.type`` and ``loss.name``, torchreid's own for softmax and triplet.

    Raises:
        ConfigError: for a loss whose parameters are out of range, or that has no engine for this type of data.
    """
    engines = {
        ("image", "softmax"): engine.ImageSoftmaxEngine,
        ("image", "triplet"): engine.ImageTripletEngine,
        ("video", "softmax"): engine.VideoSoftmaxEngine,
        ("video", "triplet"): engine.VideoTripletEngine,
        **ENGINES,
    }
    kind, name = cfg.data.type, cfg.loss.name
    if (kind, name) not in engines:
        raise ConfigError(f"loss.name {name!r} does not train on data.type {kind!r}")
    options = {"label_smooth": cfg.loss.softmax.label_smooth, **cfg.loss[name]}
    if kind == "video":
        options["pooling_method"] = cfg.video.pooling_method
    try:
        return engines[kind, name](datamanager, model, optimizer, scheduler=scheduler, use_gpu=cfg.use_gpu, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"loss.{name}: {error}") from error
