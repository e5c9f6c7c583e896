"""What a tuning of a variant tries: the search space of its losses, its weights and its learning rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torchreid_snloss.compare.variants import Variant
from torchreid_snloss.config import ConfigError, unknown_key, weight_key
from torchreid_snloss.losses import LOSSES, Interval
from torchreid_snloss.losses.search import Choices, OnlyWith, SearchSpace, tried
from torchreid_snloss.settings import Settings

__all__ = ["check_values", "rounded", "search_space"]

_FACTOR = 5.0  # by which a tuning changes the learning rate at most
_WEIGHTS = (0.1, 5.0)  # of a metric term, relative to the config's
_DIGITS = 4  # of a number that is tried, so that a config can be read
_JUDGES = ("loss.name", "train.max_epoch", "test.", "data.", "cuhk03.", "market1501.")
_TRAINING = {f"data.{key}" for key in ("height", "width", "k_tfm", "batch_transforms")}  # they change no images


def search_space(variant: Variant, settings: Settings) -> SearchSpace:
    """The values that a tuning tries, by key.

    These are the learning rate, the weight of each metric term beside another term, and what the losses declare, except
    for the keys that the variant sets itself; or what the variant's `search` states. All contain the config's own
    value: an interval is extended to it, and what a loss declares is left out where no interval can hold it, such as 0
    on a logarithmic scale.

    Raises:
        ConfigError: If the variant's `search` has a key that is unknown, that its losses don't use or by which trials
            could not be compared, or an interval that can't hold the config's own value.
    """
    space: dict[str, Interval | Choices]
    known = settings.values
    if variant.search is not None:
        space = dict(variant.search)
        for key, values in space.items():
            if problem := _problem(key, space, settings):
                raise ConfigError(f"{variant.name}: search: {problem}")
            if not _can_hold(values, known[key]):
                raise ConfigError(
                    f"{variant.name}: search: {key} is {known[key]!r} in the config, which the first trial has and no "
                    "interval can hold: give a list of choices, or set another value"
                )
    else:
        rate = known["train.lr"]
        space = {"train.lr": Interval(rounded(rate / _FACTOR), rounded(rate * _FACTOR), log=True)}
        weights = {name: weight for name, weight in settings.metric_weights.items() if weight > 0}
        several = len(weights) + (settings.softmax_weight > 0) > 1
        for name, weight in weights.items():
            if several:
                low, high = (rounded(factor * weight) for factor in _WEIGHTS)
                space[f"loss.{name}.{weight_key(name)}"] = Interval(low, high, log=True)
            if name in LOSSES:
                section = f"loss.{name}."
                arguments = {key.removeprefix(section): own for key, own in known.items() if key.startswith(section)}
                declared = tried(LOSSES[name].search_space, arguments)
                space |= {f"{section}{key}": values for key, values in declared.items()}
        space = {
            key: values for key, values in space.items() if key not in variant.options and _can_hold(values, known[key])
        }
    return {key: _extended(values, known[key]) for key, values in space.items()}


def check_values(
    variant: Variant, space: SearchSpace, settings: Settings, resolve: Callable[[Mapping[str, Any]], object]
) -> None:
    """Checks that a run accepts each choice and both ends of each interval.

    Args:
        variant: The variant.
        space: What is tried.
        settings: Those of the first trial.
        resolve: Makes a trial with the values by key; raises ConfigError for one that no run can have.

    Raises:
        ConfigError: If one is not accepted.
    """
    for key, values in space.items():
        ends: tuple[Any, ...] = values if isinstance(values, tuple) else (values.low, values.high)
        whole = type(settings.values[key]) is int and isinstance(values, Interval)
        for value in ends:
            if whole and not float(value).is_integer():
                raise ConfigError(f"{variant.name}: search: {key} needs whole numbers as ends, got {value}")
            try:
                resolve({key: int(value) if whole else value})
            except ConfigError as error:
                raise ConfigError(f"{variant.name}: search: {error}") from error


def _problem(key: str, space: Mapping[str, Any], settings: Settings) -> str:
    """What is wrong with a key of a `search`; empty if nothing is."""
    if key.startswith(_JUDGES) and key not in _TRAINING:
        return f"{key} is the same for all trials, leave it out"
    if key not in settings.values:
        return unknown_key(key, settings.values)
    if not key.startswith("loss."):
        return ""
    if key in settings.unused_keys:
        return f"{key} is not used by the loss of this row, {settings.loss_name}: leave it out"
    _, name, argument = key.split(".", 2)
    values = LOSSES[name].search_space.get(argument) if name in LOSSES else None
    if isinstance(values, OnlyWith):
        other = f"loss.{name}.{values.argument}"
        if other not in space and settings.values[other] != values.value:
            return f"{key} is not used with {other} {settings.values[other]}: leave it out"
    return ""


def _can_hold(values: Interval | Choices, own: Any) -> bool:
    if isinstance(values, tuple):
        return True
    return isinstance(own, (int, float)) and not isinstance(own, bool) and (own > 0 or not values.log)


def _extended(values: Interval | Choices, own: Any) -> Interval | Choices:
    if isinstance(values, tuple):
        return values if own in values else (*values, own)
    return Interval(min(values.low, own), max(values.high, own), values.log)


def rounded(value: float) -> float:
    """The number with as many digits as a trial uses."""
    return float(f"{value:.{_DIGITS}g}")
