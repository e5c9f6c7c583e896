"""An engine that builds its loss from the loss's own keywords."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import nn

from torchreid_snloss.engine.metric import MetricEngine
from torchreid_snloss.losses import MetricLoss

__all__ = ["LossEngine"]

_ENGINE_OPTIONS = {
    name: parameter
    for name, parameter in inspect.signature(MetricEngine).parameters.items()
    if name not in ("datamanager", "model", "optimizer", "criterion")
}


class LossEngine(MetricEngine):
    """A `MetricEngine` that builds its loss, `loss_class`, from the loss's own keywords.

    A subclass only sets `loss_class`, whose `default_weight` is the default of `weight_m`. Keywords that are not the
    engine's are passed to the loss, whose constructor defines their defaults and checks them; `help()` shows the
    keywords of both.
    """

    loss_class: ClassVar[type[MetricLoss]]

    def __init__(self, datamanager: Any, model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> None:
        own = {name: options.pop(name) for name in _ENGINE_OPTIONS if name in options}
        own.setdefault("weight_m", self.loss_class.default_weight)
        super().__init__(datamanager, model, optimizer, criterion=self.loss_class(**options), **own)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "loss_class"):  # an abstract base of other engines
            return
        places = [p for p in inspect.signature(LossEngine.__init__).parameters.values() if p.kind is not p.VAR_KEYWORD]
        own = {name: p for name, p in inspect.signature(cls.__init__).parameters.items() if p.kind is p.KEYWORD_ONLY}
        loss = {name: p for name, p in inspect.signature(cls.loss_class).parameters.items() if name != "reduction"}
        weight = {"weight_m": _ENGINE_OPTIONS["weight_m"].replace(default=cls.loss_class.default_weight)}
        options = [p.replace(kind=p.KEYWORD_ONLY) for p in {**_ENGINE_OPTIONS, **weight, **own, **loss}.values()]
        cls.__signature__ = inspect.Signature([*places[1:], *options])
