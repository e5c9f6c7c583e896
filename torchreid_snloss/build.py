"""From a config to what torchreid trains with: data manager, model, optimizer, engine.

For main scripts of one's own. :func:`build_datamanager` and :func:`build_model` call :func:`register` first.
"""

from __future__ import annotations

from typing import Any

import gdown.exceptions
import torch
from torch import nn
from torchreid import data, engine, models, optim
from yacs.config import CfgNode

from torchreid_snloss import distributed
from torchreid_snloss.config import (
    ConfigError,
    imagedata_kwargs,
    loss_weights,
    lr_scheduler_kwargs,
    optimizer_kwargs,
    videodata_kwargs,
)
from torchreid_snloss.data import IdentitySampler, hold_out, name_unreadable_images
from torchreid_snloss.engine import ENGINES, MetricEngine, Resumable, TrainOptions, resumable
from torchreid_snloss.losses import LOSSES
from torchreid_snloss.register import register

__all__ = ["build_datamanager", "build_engine", "build_model", "build_optimizer", "engine_class"]


def build_datamanager(cfg: CfgNode) -> Any:
    """torchreid's ``ImageDataManager`` or ``VideoDataManager``, as ``data.type`` says.

    A metric loss under the default ``RandomSampler`` gets the :class:`IdentitySampler`, and a line says so.

    Raises:
        ConfigError: for a dataset that is unknown, missing or empty, and for a batch size that doesn't fit it.
    """
    register()
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
        datamanager = manager(**kwargs)
        if cfg.data.val_fraction > 0 and not cfg.test.evaluate:
            options = ("train_sampler", "num_instances", "num_cams", "num_datasets")
            hold_out(
                datamanager,
                cfg.data.val_fraction,
                cfg.train.seed,
                batch_size=cfg.train.batch_size,
                **{key: kwargs[key] for key in options},
            )
        name_unreadable_images(datamanager)
        return datamanager
    except IndexError as error:  # how torchreid takes a folder without images
        raise ConfigError(f"no images in the training, query or gallery folder ({where})") from error
    except AttributeError as error:  # and a file whose name does not match its pattern
        raise ConfigError(f"a file in the data has a name that its data set does not know ({where})") from error
    except OSError as error:
        raise ConfigError(f"the data is not there, and can't be downloaded or made ({where}): {error}") from error
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(f"can't load the data ({where}): {error or type(error).__name__}") from error


def build_model(cfg: CfgNode, num_classes: int) -> nn.Module:
    """torchreid's model ``model.name``, on the CPU.

    Args:
        cfg: the config.
        num_classes: number of training identities.

    Raises:
        ConfigError: for an unknown model, or ImageNet weights that can't be downloaded.
    """
    register()
    try:
        model: nn.Module = models.build_model(
            name=cfg.model.name,
            num_classes=num_classes,
            loss=cfg.loss.name,
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


def build_optimizer(cfg: CfgNode, model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    """torchreid's optimizer and learning rate scheduler.

    Raises:
        ConfigError: for a value that torch or torchreid refuses.
    """
    try:
        optimizer = optim.build_optimizer(model, **optimizer_kwargs(cfg))
        return optimizer, optim.build_lr_scheduler(optimizer, **lr_scheduler_kwargs(cfg))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"can't build the optimizer {cfg.train.optim} with {cfg.train.lr_scheduler}: {error}"
        ) from error


def engine_class(cfg: CfgNode) -> type[engine.Engine]:
    """The engine for ``data.type`` and ``loss.name``, torchreid's own for softmax and triplet.

    Raises:
        ConfigError: if there is none, or none that trains as the config says, or on so many processes.
    """
    engines: dict[tuple[str, str], type[engine.Engine]] = {
        ("image", "softmax"): engine.ImageSoftmaxEngine,
        ("image", "triplet"): engine.ImageTripletEngine,
        ("video", "softmax"): engine.VideoSoftmaxEngine,
        ("video", "triplet"): engine.VideoTripletEngine,
        **ENGINES,
    }
    kind, name = cfg.data.type, cfg.loss.name
    if (kind, name) not in engines:
        kinds = [other for other, loss in engines if loss == name]
        raise ConfigError(f"loss {name!r} trains on data.type {' or '.join(map(repr, kinds))} only, got {kind!r}")
    cls = engines[kind, name]
    ours = {
        f"train.amp {cfg.train.amp}": cfg.train.amp != "off",
        f"train.micro_batch {cfg.train.micro_batch}": cfg.train.micro_batch != 0,
        "train.sync_batchnorm True": cfg.train.sync_batchnorm,
        f"loss.memory.size {cfg.loss.memory.size}": cfg.loss.memory.size != 0,
        f"training on {distributed.world_size()} processes": distributed.world_size() > 1 and not cfg.test.evaluate,
    }
    for what, wanted in ours.items():
        if wanted and not issubclass(cls, MetricEngine):
            raise ConfigError(f"{what} needs loss {', '.join(LOSSES)}, got {name!r}")
    return cls


def build_engine(
    cfg: CfgNode, datamanager: Any, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any
) -> Resumable:
    """An engine of :func:`engine_class`, with the loss and the weights of the config, and :class:`Resumable`.

    Raises:
        ConfigError: for a loss without an engine, or with a value out of range.
    """
    options = {"label_smooth": cfg.loss.softmax.label_smooth, **cfg.loss[cfg.loss.name]}
    if cfg.data.type == "video":
        options["pooling_method"] = cfg.video.pooling_method
    options |= {"channels_last": cfg.train.channels_last, "compile": cfg.train.compile}
    cls = resumable(engine_class(cfg))
    if issubclass(cls, MetricEngine):
        options |= {name: cfg.train[name] for name in ("amp", "micro_batch", "sync_batchnorm")}
        options |= {"memory_size": cfg.loss.memory.size, "memory_start_epoch": cfg.loss.memory.start_epoch}
    try:
        built: Resumable = cls(datamanager, model, optimizer, scheduler=scheduler, use_gpu=cfg.use_gpu, **options)
    except ValueError as error:
        raise ConfigError(f"can't build the engine for loss {cfg.loss.name}: {error}") from error
    built.options = TrainOptions(cfg.train.save_freq, cfg.train.keep, cfg.train.nonfinite)
    return built
