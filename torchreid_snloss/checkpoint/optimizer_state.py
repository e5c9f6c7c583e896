"""Whether what a checkpoint holds fits an optimizer and a learning rate scheduler."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchreid_snloss.checkpoint.consistency import check_plain
from torchreid_snloss.checkpoint.schema import check_tensor

__all__ = ["class_names", "fit_optimizer", "fit_scheduler"]


def class_names(optimizer: Any) -> dict[str, str]:
    """The name of the class of an optimizer, as a checkpoint records it."""
    return {"optimizer": type(optimizer).__qualname__}


# Options that have been there as long as their optimizers, and that change what the optimizer's state means.
_SWITCHES = {"amsgrad", "centered", "nesterov"}
# What groups hold beside the options of an optimizer.
_NO_OPTIONS = {"params", "param_names", "initial_lr"}
# The shape of these is that of the parameter, in torch's and torchreid's optimizers.
_LIKE_PARAMETER = {
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "exp_inf", "sum",
    "acc_delta",
}  # fmt: skip
# These are sums or means of squares, or of magnitudes.
_NOT_NEGATIVE = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "exp_inf", "sum", "acc_delta"}
# Without these the optimizers that torchreid builds can't take a step, nor without those that an option needs.
_NEEDED = {
    "Adam": ("step", "exp_avg", "exp_avg_sq"),
    "RAdam": ("step", "exp_avg", "exp_avg_sq"),
    "RMSprop": ("step", "square_avg"),
    "SGD": (),
}
_NEEDED_BY_OPTION = {
    ("Adam", "amsgrad"): "max_exp_avg_sq",
    ("RMSprop", "centered"): "grad_avg",
    ("RMSprop", "momentum"): "momentum_buffer",
}


def fit_optimizer(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any], recorded: str | None, trained: bool = False
) -> dict[str, Any]:
    """Checks the state of an optimizer, and completes it with the options that an older torch did not have.

    Args:
        optimizer: The optimizer that is to load the state.
        state: The state.
        recorded: The name of the class of the optimizer that had the state; None if it is not known. The options in the
            state then show it.
        trained: Whether a step has been trained, so that an optimizer that keeps a state has one.

    Returns:
        The state to load.

    Raises:
        ValueError: If the state is that of another optimizer or can't be loaded.
    """
    name = type(optimizer).__qualname__
    if recorded not in (None, name):
        raise ValueError(f"its optimizer is of another type than {name}: {recorded}")
    groups, per_parameter = state.get("param_groups"), state.get("state")
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        raise ValueError("its optimizer has no param_groups")
    if not isinstance(per_parameter, Mapping):
        raise ValueError("its optimizer has no state")
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(f"its optimizer has {len(groups)} param_groups, not {len(optimizer.param_groups)}")
    completed: list[dict[str, Any]] = []
    parameters: dict[Any, tuple[Tensor, dict[str, Any]]] = {}
    for group, current in zip(groups, optimizer.param_groups):
        numbers = group.get("params")
        if not isinstance(numbers, list) or len(numbers) != len(current["params"]):
            raise ValueError(f"a group of its optimizer must have {len(current['params'])} parameters")
        if not all(type(number) is int for number in numbers):
            raise ValueError("its optimizer must number its parameters")
        options = _completed_options(name, group, current, recorded is not None)
        parameters |= {number: (parameter, options) for number, parameter in zip(numbers, current["params"])}
        completed.append(options)
    if len(parameters) < sum(len(group["params"]) for group in groups):
        raise ValueError("its optimizer numbers two parameters alike")
    keeps_state = bool(_NEEDED.get(name)) or (name == "SGD" and any(group.get("momentum") for group in completed))
    if trained and keeps_state and parameters and not per_parameter:
        raise ValueError(f"its optimizer has lost its state: {name} keeps one of each parameter that it trains")
    for number, values in per_parameter.items():
        if number not in parameters or not isinstance(values, Mapping):
            raise ValueError("its optimizer has a state that belongs to no parameter")
        _check_parameter_state(name, values, *parameters[number])
    return {**state, "param_groups": completed}


def _completed_options(
    name: str, group: Mapping[str, Any], current: Mapping[str, Any], same_class: bool
) -> dict[str, Any]:
    options = {key: value for key, value in current.items() if key not in _NO_OPTIONS}
    given = {key: value for key, value in group.items() if key not in _NO_OPTIONS}
    if not same_class:
        # A version that has an option which another lacks sets it to False or None, unless it is of another class.
        one_sided = {key: {**options, **given}[key] for key in set(options) ^ set(given)}
        telling = [key for key, value in one_sided.items() if key in _SWITCHES or not (value is None or value is False)]
        if telling:
            raise ValueError(f"its optimizer is of another type than {name}: only one of the two has {telling[0]}")
    for key, value in given.items():
        if key in options and not _is_like(value, options[key]):
            raise ValueError(f"its optimizer has {key} {str(value)[:60]!r}, not a value like {options[key]!r}")
    if "initial_lr" in group and not _is_like(group["initial_lr"], 0.0):
        raise ValueError(f"its optimizer has initial_lr {str(group['initial_lr'])[:60]!r}, not a learning rate")
    check_plain("a group of its optimizer", group, tensors=True)
    return {**current, **group}


def _check_parameter_state(name: str, values: Mapping[Any, Any], parameter: Tensor, options: Mapping[str, Any]) -> None:
    needed = [*_NEEDED.get(name, ())]
    needed += [key for (owner, option), key in _NEEDED_BY_OPTION.items() if owner == name and options.get(option)]
    missing = [key for key in needed if key not in values]
    if missing and not values:
        raise ValueError(f"its optimizer has lost the state of a parameter, which {name} keeps")
    if missing:
        raise ValueError(f"its optimizer is of another type than {name}: its state has no {missing[0]}")
    for key, value in values.items():
        if isinstance(value, Tensor):
            check_tensor(f"its optimizer's {key}", value)
            if key in _LIKE_PARAMETER and value.shape != parameter.shape:
                raise ValueError(f"its optimizer's {key} has shape {tuple(value.shape)}, not {tuple(parameter.shape)}")
            if key in _LIKE_PARAMETER and not value.is_floating_point():
                raise ValueError(f"its optimizer's {key} is {value.dtype}")
            if key in _NOT_NEGATIVE and (value < 0).any():
                raise ValueError(f"its optimizer's {key} must not be negative")
        elif key in _LIKE_PARAMETER and not (key == "momentum_buffer" and value is None):
            raise ValueError(f"its optimizer's {key} must be a tensor, got a {type(value).__name__}")
        if key == "step" and (isinstance(value, bool) or not _is_like(value, 0)):
            raise ValueError(f"its optimizer's step must be a number, got {str(value)[:60]}")


def _is_like(value: Any, current: Any) -> bool:
    """Whether an option can take the place of another: numbers are finite, and not negative unless the other one is."""
    if isinstance(current, bool) or current is None:
        return isinstance(value, bool) or value is None
    if isinstance(current, (int, float, Tensor)):
        if isinstance(value, Tensor):
            is_dense = value.layout == torch.strided and not value.is_meta and not value.is_complex()
            return is_dense and value.numel() == 1 and _is_like(value.item(), 0)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and -math.inf < value < math.inf and (value >= 0 or bool(current < 0))
    if isinstance(current, (tuple, list)):
        same_length = isinstance(value, (tuple, list)) and len(value) == len(current)
        return same_length and all(map(_is_like, value, current))
    return isinstance(value, type(current))


def fit_scheduler(scheduler: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """Checks the state of a learning rate scheduler.

    Args:
        scheduler: The scheduler that may load the state.
        state: The state, which may be that of another type of scheduler.

    Returns:
        The state. If it is of the scheduler's type, it is completed with the scheduler's own values for what an older
        torch did not have.

    Raises:
        ValueError: If the state can't be that of a scheduler.
    """
    if not isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
        return dict(state)
    current = scheduler.state_dict()
    parts = getattr(scheduler, "_schedulers", None) or ()
    if _scheduler_options(current) != _scheduler_options(state):
        for part in state.get("_schedulers", [state]):
            if "last_epoch" in part:
                _scheduler_value("last_epoch", part["last_epoch"], 0)
        return dict(state)
    fitted = dict(current)
    for key, value in state.items():
        if key == "_schedulers":
            if not isinstance(value, Sequence) or len(value) != len(parts):
                raise ValueError(f"its scheduler must have {len(parts)} parts")
            fitted[key] = [fit_scheduler(part, _part(item)) for part, item in zip(parts, value)]
        elif key in current:
            fitted[key] = _scheduler_value(key, value, current[key])
    return fitted


def _part(state: Any) -> Mapping[str, Any]:
    if not isinstance(state, Mapping):
        raise ValueError("a part of its scheduler is not a dictionary")
    return state


def _scheduler_options(state: Mapping[str, Any]) -> set[str]:
    """The names of the options; `verbose` is one that torch has dropped, and a chain of schedulers has its parts'."""
    parts = state.get("_schedulers")
    if parts is not None:
        return {f"{number}: {name}" for number, part in enumerate(parts) for name in _scheduler_options(_part(part))}
    return {str(name) for name in state if not str(name).startswith("_")} - {"verbose"}


def _scheduler_value(key: str, value: Any, current: Any) -> Any:
    if isinstance(current, Counter):  # MultiStepLR's milestones
        if not isinstance(value, Mapping) or not all(type(item) is int for pair in value.items() for item in pair):
            raise ValueError(f"its scheduler has {key} {str(value)[:60]!r}")
        return Counter(value)
    lowest = 1 if key in ("step_size", "T_max") else -1
    numbers = value if isinstance(current, (list, tuple)) and isinstance(value, (list, tuple)) else [value]
    expected = current if isinstance(current, (list, tuple)) else [current]
    fits = len(numbers) == len(expected) and isinstance(value, (list, tuple)) == isinstance(current, (list, tuple))
    for item, other in zip(numbers, expected):
        if isinstance(other, (int, float)) and not isinstance(other, bool):
            is_number = isinstance(item, (int, float)) and not isinstance(item, bool)
            fits &= is_number and lowest <= item  # which NaN is not
            fits &= key not in ("last_epoch", "_step_count", "step_size") or isinstance(item, int)
            fits &= not (is_number and key in ("_last_lr", "base_lrs") and not 0 <= item < math.inf)
        elif isinstance(other, bool):
            fits &= isinstance(item, bool)
    if not fits:
        raise ValueError(f"its scheduler has {key} {str(value)[:60]!r}, not a value like {current!r}")
    return value
