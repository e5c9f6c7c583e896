"""Builds a criterion from its name and keywords in the config."""

from __future__ import annotations

import os
import pkgutil
import sys
from collections.abc import Mapping
from typing import Any, cast

from torchreid import losses

from torchreid_snloss.config import ConfigError
from torchreid_snloss.errors import text_of
from torchreid_snloss.losses import LOSSES, Criterion, MetricLoss, MinedLoss

__all__ = ["make_criterion"]


def make_criterion(name: str, section: Mapping[str, Any]) -> Criterion:
    """Builds the criterion for one of the names in `loss.name`, except softmax.

    Args:
        name: `"triplet"`, `"custom"`, or one of `LOSSES`.
        section: the keys of `loss.{name}` with their values; the weights among them are not used.

    Raises:
        ConfigError: for a criterion that can't be imported or constructed.
    """
    try:
        if name == "triplet":
            return cast(Criterion, losses.TripletLoss(margin=section["margin"]))
        if name != "custom":
            return LOSSES[name](**{key: value for key, value in section.items() if not key.startswith("weight_")})
        if not section["target"]:
            raise ConfigError(
                "loss.name custom needs a criterion: set loss.custom.target, such as "
                "pytorch_metric_learning.losses.CircleLoss"
            )
        criterion = _imported("loss.custom.target", section["target"])(**_plain(section["kwargs"]))
        if not section["miner"]:
            if section["miner_kwargs"]:
                raise ConfigError("loss.custom.miner_kwargs are set, but loss.custom.miner names no miner")
            return cast(Criterion, criterion)
        if isinstance(criterion, MetricLoss):
            from torchreid_snloss.pml import PairwiseLoss  # which takes what a miner selects

            criterion = PairwiseLoss(criterion)
        miner = _imported("loss.custom.miner", section["miner"])(**_plain(section["miner_kwargs"]))
        return MinedLoss(criterion, miner)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # raised by the user's own class
        raise ConfigError(f"loss.{name}: {text_of(error)}") from error


def _imported(key: str, path: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where a user's own modules are
    try:
        found = pkgutil.resolve_name(path)
    except (Exception, SystemExit) as error:  # raised by the user's own module
        raise ConfigError(f"{key}: can't import {path!r}: {text_of(error)}") from error
    if not callable(found):
        raise ConfigError(f"{key} {path!r} must be a class or function, it is a {type(found).__name__}")
    return found


def _plain(node: Any) -> Any:
    """Copies a config node to plain dictionaries and lists, so that a criterion may keep or change them."""
    if isinstance(node, Mapping):
        return {key: _plain(value) for key, value in node.items()}
    return list(node) if isinstance(node, list) else node
