"""Builds the data manager, model, criteria, optimizer and engine from the settings.

The functions can also be used in your own main script. Each takes a config or its `Settings` and performs the checks
for what it builds; `build_datamanager` and `build_model` call `register` first.
"""

from __future__ import annotations

import http.client
from collections.abc import Mapping
from typing import Any

import gdown.exceptions
import torch
from torch import nn
from torchreid import engine, models, optim

from torchreid_snloss.backbones import build_timm_model, is_timm
from torchreid_snloss.checkpoint import CheckpointError
from torchreid_snloss.checkpoint.pretrained import check_pretrained, checked_downloads
from torchreid_snloss.checks import check_criteria, check_datamanager, check_model
from torchreid_snloss.config import ConfigError
from torchreid_snloss.config.torchreid_keys import EXPONENTIAL
from torchreid_snloss.criteria import make_criterion
from torchreid_snloss.engine import MetricEngine, TrainingLoop, VideoMetricEngine, with_training_loop
from torchreid_snloss.errors import text_of
from torchreid_snloss.heads import ModelWithHead, set_last_stride
from torchreid_snloss.loading import load_data, register_for_run, share_decoded
from torchreid_snloss.losses import Criterion
from torchreid_snloss.settings import (
    Config,
    Settings,
    engine_kwargs,
    loss_kwargs,
    lr_scheduler_kwargs,
    optimizer_kwargs,
    resolve,
    train_options,
)

__all__ = ["build_criteria", "build_datamanager", "build_engine", "build_model", "build_optimizer", "engine_class"]

_TORCHREIDS_ENGINES: dict[tuple[str, str], type[engine.Engine]] = {
    ("image", "softmax"): engine.ImageSoftmaxEngine,
    ("image", "triplet"): engine.ImageTripletEngine,
    ("video", "softmax"): engine.VideoSoftmaxEngine,
    ("video", "triplet"): engine.VideoTripletEngine,
}


def build_datamanager(cfg: Config) -> Any:
    """Builds torchreid's `ImageDataManager` or `VideoDataManager`, depending on `data.type`.

    It prints a line for each setting that was chosen automatically, such as the `IdentitySampler` for a metric loss.

    Raises:
        ConfigError: for a dataset that is unknown, missing or empty, and for a batch size or ranks that don't fit it.
        UnreadableImageError: for an image that can't be read when it is to be turned into an outlier.
    """
    settings = resolve(cfg)
    datamanager = load_data(settings)
    check_datamanager(settings, datamanager)
    share_decoded(settings, datamanager)
    return datamanager


def build_model(cfg: Config, num_classes: int) -> nn.Module:
    """Builds the model `model.name` with the last stride, embedding and neck of the config, on the CPU.

    Args:
        cfg: the config or its settings.
        num_classes: number of training identities; 0 in a test run without any.

    Raises:
        ConfigError: for an unknown model, a model that does not support such a head or can't be trained as configured,
            or ImageNet weights that can't be downloaded.
    """
    settings = resolve(cfg)
    model = load_model(settings, num_classes)
    check_model(settings, model)
    return model


def load_model(settings: Settings, num_classes: int, pretrained: bool | None = None) -> nn.Module:
    """Builds the model without checking it; each process runs the check itself.

    Args:
        settings: the settings.
        num_classes: number of training identities; 0 in a test run without any.
        pretrained: whether it gets its pretrained weights; None: as the settings say.
    """
    register_for_run()
    name, logits_only, bnneck = settings.model_name, settings.logits_only, settings.neck == "bnneck"
    with_head, num_classes = bool(settings.embedding) or bnneck, max(1, num_classes)
    if not is_timm(name) and name not in (known := vars(models)["__model_factory"]):
        raise ConfigError(
            f"model.name: Unknown model: {name}. Must be one of {list(known)}, or timm/ and a name from "
            "timm.list_models()"
        )
    options: dict[str, Any] = {
        "name": name,
        "num_classes": num_classes,
        "loss": "softmax" if logits_only and not with_head else "triplet",  # "triplet" returns (logits, features)
        "pretrained": settings.pretrained if pretrained is None else pretrained,
        "use_gpu": settings.use_gpu,
    }
    model: nn.Module
    try:
        if is_timm(name):
            model = build_timm_model(**options, img_size=(settings.height, settings.width))
        else:
            with checked_downloads() as read_files:
                model = models.build_model(**options)
            check_pretrained(model, read_files)
        if settings.last_stride:
            set_last_stride(model, settings.last_stride)
        if with_head:
            model = ModelWithHead(model, num_classes, settings.embedding, bnneck, logits_only=logits_only)
    except CheckpointError as error:
        raise ConfigError(f"the ImageNet weights of {name}: {error}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model: {text_of(error)}") from error
    except (OSError, http.client.HTTPException, gdown.exceptions.FileURLRetrievalError) as error:
        if is_timm(name):
            raise ConfigError(f"{text_of(error)}. Without them: model.pretrained False") from error
        raise ConfigError(
            f"can't download the ImageNet weights of {name}: {text_of(error)}. Without them: model.pretrained False"
        ) from error
    return model


def build_criteria(cfg: Config) -> dict[str, Criterion]:
    """Builds the losses that `loss.name` names, except for softmax.

    Raises:
        ConfigError: for a loss that can't be imported or constructed.
    """
    return {name: make_criterion(name, section) for name, section in loss_kwargs(cfg).items()}


def build_optimizer(
    cfg: Config, model: nn.Module, criteria: Mapping[str, Criterion] | None = None
) -> tuple[torch.optim.Optimizer, Any]:
    """Builds torchreid's optimizer and learning rate scheduler.

    Args:
        cfg: the config or its settings.
        model: the model to train.
        criteria: the losses; any parameters of their own are trained too.

    Raises:
        ConfigError: for a value that torch or torchreid rejects.
    """
    settings = resolve(cfg)
    try:
        optimizer = optim.build_optimizer(model, **optimizer_kwargs(settings))
        for criterion in (criteria or {}).values():
            if isinstance(criterion, nn.Module) and (own := list(criterion.parameters())):
                optimizer.add_param_group({"params": own})
        return optimizer, _build_scheduler(settings, optimizer)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"can't build the optimizer {settings.optim} with {settings.lr_scheduler}: {text_of(error)}"
        ) from error


def _build_scheduler(settings: Settings, optimizer: torch.optim.Optimizer) -> Any:
    if settings.lr_scheduler == EXPONENTIAL:
        # Constant at first; then it decays to gamma times the learning rate at the end.
        first, factor = settings.stepsize[0], settings.gamma ** (1 / (settings.max_epoch - settings.stepsize[0]))
        scheduler: Any = torch.optim.lr_scheduler.MultiplicativeLR(
            optimizer, lambda epoch: factor if epoch > first else 1.0
        )
    else:
        scheduler = optim.build_lr_scheduler(optimizer, **lr_scheduler_kwargs(settings))
    if settings.warmup_epochs == 0:
        return scheduler
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, settings.warmup_factor, 1.0, settings.warmup_epochs)
    return torch.optim.lr_scheduler.ChainedScheduler([scheduler, warmup])


def engine_class(cfg: Config) -> type[TrainingLoop]:
    """The engine class of a run; for softmax or triplet alone it is torchreid's own, unless the run asks for more.

    `train.own_step`, mixed precision, micro-batches, skipped steps and several processes need a `MetricEngine`.
    """
    settings = resolve(cfg)
    if settings.torchreids_step:
        return with_training_loop(_TORCHREIDS_ENGINES[settings.data_type, settings.loss_name])
    return VideoMetricEngine if settings.data_type == "video" else MetricEngine


def build_engine(
    cfg: Config,
    datamanager: Any,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    criteria: Mapping[str, Criterion] | None = None,
) -> TrainingLoop:
    """Builds an engine of the class `engine_class(cfg)`, with the losses and weights of the config.

    Args:
        cfg: the config or its settings.
        datamanager: from `build_datamanager`.
        model: from `build_model`.
        optimizer: from `build_optimizer`.
        scheduler: from `build_optimizer`.
        criteria: from `build_criteria`. Pass the same ones as to `build_optimizer` if they have parameters; None
            builds them here.

    Raises:
        ConfigError: for a loss that does not work with the model, or a value out of range.
    """
    settings = resolve(cfg)
    cls, options = engine_class(settings), engine_kwargs(settings)
    if issubclass(cls, MetricEngine):
        criteria = build_criteria(settings) if criteria is None else criteria
        check_criteria(settings, criteria, model, datamanager.num_train_pids)
        weights, one = settings.metric_weights, len(criteria) == 1
        options["criterion"] = next(iter(criteria.values())) if one else criteria
        options["weight_m"] = next(iter(weights.values())) if one else weights
        options["weight_x"] = settings.softmax_weight
    try:
        built = cls(datamanager, model, optimizer, scheduler=scheduler, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"can't build the engine for loss {settings.loss_name}: {text_of(error)}") from error
    built.options = train_options(settings)
    built.checkpointer.settings = settings.values
    return built
