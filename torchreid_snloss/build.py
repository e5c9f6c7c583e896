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
from torchreid_snloss.config import ConfigError, imagedata_kwargs, loss_kwargs, videodata_kwargs
from torchreid_snloss.data import IdentitySampler
from torchreid_snloss.engine import ENGINES

__all__ = ["build_datamanager", "build_engine", "build_model", "has_metric_term", "load_weights", "resume"]


def has_metric_term(cfg: CfgNode) -> bool:
    """Whether the loss compares images with each other, so that a batch needs several images an identity."""
    if cfg.loss.name == "softmax":
        return False
    return bool((cfg.loss.triplet.weight_t if cfg.loss.name == "triplet" else loss_kwargs(cfg)["weight_m"]) > 0)


def build_datamanager(cfg: CfgNode) -> Any:
    """torchreid's ``ImageDataManager`` or ``VideoDataManager``, as ``data.type`` says.

    A metric loss under the default ``RandomSampler`` gets the :class:`IdentitySampler`, and a line says so.

    Raises:
        ConfigError: for a dataset that is unknown, missing or empty, and for a batch size that doesn't fit it.
    """
    kwargs = imagedata_kwargs(cfg) if cfg.data.type == "image" else videodata_kwargs(cfg)
    if kwargs["train_sampler"] == "RandomSampler" and has_metric_term(cfg) and not cfg.test.evaluate:
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
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
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
    """Loads the weights of a checkpoint, also one that torchreid's own engines wrote; layers that differ stay as built."""
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
    kind, name = cfg.data.type, cfg.loss.name
    options: dict[str, Any] = {
        "scheduler": scheduler,
        "use_gpu": cfg.use_gpu,
        "label_smooth": cfg.loss.softmax.label_smooth,
    }
    if kind == "video" and name in ("softmax", "triplet"):
        options["pooling_method"] = cfg.video.pooling_method
    if name == "softmax":
        cls = engine.ImageSoftmaxEngine if kind == "image" else engine.VideoSoftmaxEngine
    elif name == "triplet":
        cls = engine.ImageTripletEngine if kind == "image" else engine.VideoTripletEngine
        options.update(cfg.loss.triplet)
    else:
        cls = ENGINES[kind, name]
        options.update(loss_kwargs(cfg))
    try:
        return cls(datamanager, model, optimizer, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"loss.{name}: {error}") from error
