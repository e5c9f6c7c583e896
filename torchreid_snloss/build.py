"""From a config to what torchreid trains with: data manager, model, optimizer, engine.

For main scripts of one's own. :func:`build_datamanager` and :func:`build_model` call :func:`register` first.
"""

from __future__ import annotations

import os
import pkgutil
import sys
from collections.abc import Mapping
from typing import Any, cast

import gdown.exceptions
import torch
from torch import nn
from torchreid import data, engine, losses, models, optim
from yacs.config import CfgNode

from torchreid_snloss import distributed
from torchreid_snloss.config import (
    ConfigError,
    imagedata_kwargs,
    loss_names,
    lr_scheduler_kwargs,
    metric_weights,
    optimizer_kwargs,
    softmax_weight,
    videodata_kwargs,
)
from torchreid_snloss.data import (
    IdentitySampler,
    UnreadableImageError,
    add_label_noise,
    add_outliers,
    hold_out,
    keep_fraction,
    name_unreadable_images,
    set_training_items,
)
from torchreid_snloss.engine import (
    ENGINES,
    MetricEngine,
    TrainingLoop,
    TrainOptions,
    VideoMetricEngine,
    with_training_loop,
)
from torchreid_snloss.heads import ModelWithHead, set_last_stride
from torchreid_snloss.losses import LOSSES, Criterion, MinedLoss
from torchreid_snloss.register import register

__all__ = ["build_criteria", "build_datamanager", "build_engine", "build_model", "build_optimizer", "engine_class"]

EXPONENTIAL = "exponential"
"""The SN paper's schedule, a ``train.lr_scheduler`` beside torchreid's."""


def build_datamanager(cfg: CfgNode) -> Any:
    """torchreid's ``ImageDataManager`` or ``VideoDataManager``, as ``data.type`` says.

    A metric loss under the default ``RandomSampler`` gets the :class:`IdentitySampler`, and a line says so.

    Raises:
        ConfigError: for a dataset that is unknown, missing or empty, and for a batch size that doesn't fit it.
        UnreadableImageError: for one that is to become an outlier.
    """
    register()
    kwargs = imagedata_kwargs(cfg) if cfg.data.type == "image" else videodata_kwargs(cfg)
    if kwargs["train_sampler"] != train_sampler(cfg):
        kwargs["train_sampler"] = train_sampler(cfg)
        print(
            f"=> sampler.train_sampler: IdentitySampler in place of RandomSampler, since loss {cfg.loss.name!r} needs "
            f"{cfg.sampler.num_instances} images of an identity (sampler.num_instances) in a batch"
        )
    manager = data.ImageDataManager if cfg.data.type == "image" else data.VideoDataManager
    where = f"data.sources {cfg.data.sources}, data.targets {cfg.data.targets}, data.root {cfg.data.root!r}"
    try:
        datamanager = manager(**kwargs)
        if not cfg.test.evaluate:
            options = {key: kwargs[key] for key in ("train_sampler", "num_instances", "num_cams", "num_datasets")}
            _change_training_set(cfg, datamanager, batch_size=cfg.train.batch_size, **options)
        name_unreadable_images(datamanager)
        return datamanager
    except UnreadableImageError:
        raise
    except IndexError as error:  # how torchreid takes a folder without images
        raise ConfigError(f"no images in the training, query or gallery folder ({where})") from error
    except AttributeError as error:  # and a file whose name does not match its pattern
        raise ConfigError(f"a file in the data has a name that its data set does not know ({where})") from error
    except OSError as error:
        raise ConfigError(f"the data is not there, and can't be downloaded or made ({where}): {error}") from error
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(f"can't load the data ({where}): {error or type(error).__name__}") from error


def train_sampler(cfg: CfgNode) -> str:
    """``sampler.train_sampler``, or for a metric loss the :class:`IdentitySampler` in the default's place."""
    given: str = cfg.sampler.train_sampler
    needed = given == "RandomSampler" and any(metric_weights(cfg).values()) and not cfg.test.evaluate
    return IdentitySampler.__name__ if needed else given


def _change_training_set(cfg: CfgNode, datamanager: Any, **sampler_options: Any) -> None:
    """Fewer identities first, then those held out, so that what they choose by has right labels and whole images."""
    seed, keys = cfg.train.seed, cfg.data
    if keys.train_fraction < 1:
        kept = keep_fraction(datamanager.train_loader.dataset.train, keys.train_fraction, seed)
        set_training_items(datamanager, kept, **sampler_options)
    if keys.val_fraction > 0:
        hold_out(datamanager, keys.val_fraction, seed, **sampler_options)
    items = datamanager.train_loader.dataset.train
    if keys.label_noise > 0:
        items = add_label_noise(items, keys.label_noise, seed)
    if keys.outliers > 0:
        items = add_outliers(items, keys.outliers, seed, os.path.join(keys.save_dir, "outliers"))
    if keys.label_noise > 0 or keys.outliers > 0:
        set_training_items(datamanager, items, **sampler_options)


def build_model(cfg: CfgNode, num_classes: int) -> nn.Module:
    """torchreid's model ``model.name``, with the last stride, embedding and neck of the config, on the CPU.

    Args:
        cfg: the config.
        num_classes: number of training identities.

    Raises:
        ConfigError: for an unknown model, one that takes no such change, or ImageNet weights that can't be downloaded.
    """
    register()
    plain = cfg.model.neck == "none" and not cfg.model.embedding
    try:
        model: nn.Module = models.build_model(
            name=cfg.model.name,
            num_classes=num_classes,
            loss="softmax" if plain and cfg.loss.name == "softmax" else "triplet",  # which gives (logits, features)
            pretrained=cfg.model.pretrained,
            use_gpu=cfg.use_gpu,
        )
        if cfg.model.last_stride:
            set_last_stride(model, cfg.model.last_stride)
        if cfg.model.embedding or cfg.model.neck == "bnneck":
            bnneck, softmax = cfg.model.neck == "bnneck", cfg.loss.name == "softmax"
            model = ModelWithHead(model, num_classes, cfg.model.embedding, bnneck, logits_only=softmax)
    except KeyError as error:
        raise ConfigError(f"model.name: {error.args[0]}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model: {error}") from error
    except (OSError, gdown.exceptions.FileURLRetrievalError) as error:
        raise ConfigError(
            f"can't download the ImageNet weights of {cfg.model.name}: {error}. Without them: model.pretrained False"
        ) from error
    return model


def build_criteria(cfg: CfgNode) -> dict[str, Criterion]:
    """The losses that ``loss.name`` names.

    Raises:
        ConfigError: for one that can't be imported or made.
    """
    return {name: _build_criterion(cfg, name) for name in loss_names(cfg) if name != "softmax"}


def _build_criterion(cfg: CfgNode, name: str) -> Criterion:
    node = cfg.loss[name]
    try:
        if name == "triplet":
            return cast(Criterion, losses.TripletLoss(margin=node.margin))
        if name != "custom":
            return LOSSES[name](**{key: value for key, value in node.items() if not key.startswith("weight_")})
        criterion = _imported("loss.custom.target", node.target)(**_plain(node.kwargs))
        if not node.miner:
            return cast(Criterion, criterion)
        return MinedLoss(criterion, _imported("loss.custom.miner", node.miner)(**_plain(node.miner_kwargs)))
    except ConfigError:
        raise
    except Exception as error:  # of a user's own class
        raise ConfigError(f"loss.{name}: {error or type(error).__name__}") from error


def _imported(key: str, path: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where a module of one's own lies
    try:
        found = pkgutil.resolve_name(path)
    except Exception as error:  # of a user's own module
        raise ConfigError(f"{key}: can't import {path!r}: {error}") from error
    if not callable(found):
        raise ConfigError(f"{key} {path!r} must be a class or function, it is a {type(found).__name__}")
    return found


def _plain(node: Any) -> Any:
    return {key: _plain(value) for key, value in node.items()} if isinstance(node, dict) else node


def build_optimizer(
    cfg: CfgNode, model: nn.Module, criteria: Mapping[str, Criterion] | None = None
) -> tuple[torch.optim.Optimizer, Any]:
    """torchreid's optimizer and learning rate scheduler.

    Args:
        cfg: the config.
        model: what is trained.
        criteria: losses, whose own parameters are trained with it.

    Raises:
        ConfigError: for a value that torch or torchreid refuses.
    """
    try:
        optimizer = optim.build_optimizer(model, **optimizer_kwargs(cfg))
        for criterion in (criteria or {}).values():
            if isinstance(criterion, nn.Module) and (own := list(criterion.parameters())):
                optimizer.add_param_group({"params": own})
        return optimizer, _build_scheduler(cfg, optimizer)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"can't build the optimizer {cfg.train.optim} with {cfg.train.lr_scheduler}: {error}"
        ) from error


def _build_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
    train = cfg.train
    if train.lr_scheduler == EXPONENTIAL:
        # Constant at first, then down to gamma times the learning rate at the end.
        first, last = train.stepsize[0], train.max_epoch
        scheduler: Any = torch.optim.lr_scheduler.MultiplicativeLR(
            optimizer, lambda epoch: train.gamma ** (1 / (last - first)) if epoch > first else 1.0
        )
    else:
        scheduler = optim.build_lr_scheduler(optimizer, **lr_scheduler_kwargs(cfg))
    if train.warmup_epochs == 0:
        return scheduler
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, train.warmup_factor, 1.0, train.warmup_epochs)
    return torch.optim.lr_scheduler.ChainedScheduler([scheduler, warmup])


def engine_class(cfg: CfgNode) -> type[engine.Engine]:
    """The engine for ``data.type`` and ``loss.name``, torchreid's own for softmax and triplet.

    Raises:
        ConfigError: if it does not train as the config says, or on so many processes.
    """
    engines: dict[tuple[str, str], type[engine.Engine]] = {
        ("image", "softmax"): engine.ImageSoftmaxEngine,
        ("image", "triplet"): engine.ImageTripletEngine,
        ("video", "softmax"): engine.VideoSoftmaxEngine,
        ("video", "triplet"): engine.VideoTripletEngine,
        **ENGINES,
    }
    kind, name = cfg.data.type, "custom" if len(loss_names(cfg)) > 1 else cfg.loss.name
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
            raise ConfigError(f"{what} needs loss {', '.join(LOSSES)} or custom, got {name!r}")
    return cls


def build_engine(
    cfg: CfgNode,
    datamanager: Any,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    criteria: Mapping[str, Criterion] | None = None,
) -> TrainingLoop:
    """An engine of :func:`engine_class`, with the loss and the weights of the config, and :class:`TrainingLoop`.

    Args:
        cfg: the config.
        datamanager: of :func:`build_datamanager`.
        model: of :func:`build_model`.
        optimizer: of :func:`build_optimizer`.
        scheduler: likewise.
        criteria: what :func:`build_criteria` made, where the optimizer trains their parameters; None: it is called.

    Raises:
        ConfigError: for a loss without an engine, or with a value out of range.
    """
    options: dict[str, Any] = {"label_smooth": cfg.loss.softmax.label_smooth}
    if cfg.data.type == "video":
        options["pooling_method"] = cfg.video.pooling_method
    options |= {"channels_last": cfg.train.channels_last, "compile": cfg.train.compile}
    cls = with_training_loop(engine_class(cfg))
    if not issubclass(cls, MetricEngine):
        options |= cfg.loss[cfg.loss.name]
    else:
        criteria = build_criteria(cfg) if criteria is None else criteria
        weights = metric_weights(cfg)
        if len(criteria) == 1:
            options |= {"criterion": next(iter(criteria.values())), "weight_m": next(iter(weights.values()))}
        else:
            options |= {"criterion": criteria, "weight_m": weights}
        options |= {"weight_x": softmax_weight(cfg)}
        # An engine that is named after its loss only builds it.
        cls = VideoMetricEngine if cfg.data.type == "video" else MetricEngine
        options |= {name: cfg.train[name] for name in ("amp", "micro_batch", "sync_batchnorm")}
        options |= {"memory_size": cfg.loss.memory.size, "memory_start_epoch": cfg.loss.memory.start_epoch}
    try:
        built: TrainingLoop = cls(datamanager, model, optimizer, scheduler=scheduler, use_gpu=cfg.use_gpu, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"can't build the engine for loss {cfg.loss.name}: {error}") from error
    train, test = cfg.train, cfg.test
    built.options = TrainOptions(
        train.save_freq,
        train.keep,
        train.nonfinite,
        test.flip,
        test.rerank_in_training,
        test.multi_query,
        train.record,
    )
    return built
