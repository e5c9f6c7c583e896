"""The optimizer's options and the schedule of a resumed run: the run's own, continued from where the checkpoint is."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from torchreid_snloss.checkpoint import CheckpointError
from torchreid_snloss.values import shown

__all__ = ["Schedule", "steps_of"]

_MOST_STEPS = 10_000_000
# Options that decide what an optimizer keeps of a parameter, so that the state of one setting is useless for the other.
_KINDS = ("amsgrad", "centered")


class Schedule:
    """The options of an optimizer and its scheduler, as the program sets them.

    Args:
        optimizer: The optimizer.
        scheduler: Its learning rate scheduler.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        self._optimizer, self._scheduler = optimizer, scheduler
        self._note_start()

    def _note_start(self) -> None:
        self._groups = _options(self._optimizer)
        self._state = copy.deepcopy(self._scheduler.state_dict())

    def before_loading(self) -> None:
        """Notes what the program has changed since, if it has not trained."""
        if steps_of(self._scheduler.state_dict()) == steps_of(self._state):
            self._note_start()

    def resume(self, state: Mapping[str, Any], epoch: int, path: Any) -> list[str]:
        """Sets the options and the schedule after the optimizer was loaded from a checkpoint.

        If the program sets the same options and schedule as the checkpoint has, both go on as they were, to the bit.
        Otherwise the program's are used, and its schedule is advanced to where the checkpoint is.

        Args:
            state: The state of the scheduler in the checkpoint.
            epoch: How many epochs the checkpoint was trained.
            path: The checkpoint, for messages.

        Returns:
            A line about each option that differs.

        Raises:
            CheckpointError: If an option differs without which the optimizer's state is useless.
        """
        loaded, before, now = _options(self._optimizer), dict(_named_values(state)), dict(_named_values(self._state))
        for was, own in zip(loaded, self._groups):
            _check_kind(type(self._optimizer).__name__, was, own, path)
        advanced = self._advance(steps_of(state, epoch), path)
        expected = _options(self._optimizer)
        same = _equal(before, now)
        if same and any("lr_lambdas" in name for name in now):  # no state has functions, but the learning rate tells
            same = all(_equal(was.get("lr"), own.get("lr")) for was, own in zip(loaded, expected))

        lines = {} if same else _differences(before, now)
        for group, was, own in zip(self._optimizer.param_groups, loaded, expected):
            keep_lr = same or not advanced
            differs = {
                key: value
                for key, value in own.items()
                if key in was and not _equal(was[key], value) and not (key == "lr" and keep_lr)
            }
            group.update({**own, **{key: value for key, value in was.items() if key in own and key not in differs}})
            if lines or same:  # the schedule's say it of the learning rate
                differs = {key: value for key, value in differs.items() if key not in ("lr", "initial_lr")}
            lines |= _differences({key: was[key] for key in differs}, differs)
        if same or not advanced:
            self._scheduler.load_state_dict(copy.deepcopy(dict(state)))
        return list(lines.values())

    def _advance(self, steps: int, path: Any) -> bool:
        """Whether the program's schedule could be advanced from its start to a number of steps."""
        if not 0 <= steps <= _MOST_STEPS:
            raise CheckpointError(f"{str(path)!r} holds a schedule of {steps} steps, which can't be")
        for group, own in zip(self._optimizer.param_groups, self._groups):
            group.update(own)
        self._scheduler.load_state_dict(copy.deepcopy(self._state))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no optimizer's step came before
            try:
                for _ in range(steps - steps_of(self._state)):
                    self._scheduler.step()
            except TypeError:
                return False
        return True


def _options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [
        {key: copy.deepcopy(value) for key, value in group.items() if key not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]


def steps_of(state: Mapping[str, Any], default: int = 0) -> int:
    """How many steps a scheduler has made."""
    parts = state.get("_schedulers")
    if "last_epoch" not in state and isinstance(parts, (list, tuple)) and parts and isinstance(parts[0], Mapping):
        return steps_of(parts[0], default)
    steps = state.get("last_epoch")
    return steps if type(steps) is int else default


def _named_values(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What sets a scheduler, without how far it is."""
    for key, value in state.items():
        if key == "_schedulers":
            for number, part in enumerate(value):
                yield from _named_values(part, f"{prefix}{number}.")
        elif key == "base_lrs":
            yield f"{prefix}lr", value
        elif key == "_milestones" or not (key.startswith("_") or key in ("last_epoch", "verbose")):
            yield f"{prefix}{key}", value


def _equal(a: Any, b: Any) -> bool:
    """Whether two options are the same but for the last bits."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        a, b = (value.tolist() if isinstance(value, torch.Tensor) else value for value in (a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-9)
    return bool(a == b)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """A line about each value that differs, by its name."""
    lines = {}
    for key in {**now, **before}:
        if key not in before or key not in now or not _equal(before[key], now[key]):
            name = key.rpartition(".")[2]
            name = name if name.isidentifier() else shown(name)
            was, own = (_shown(values[key]) if key in values else "nothing" for values in (before, now))
            lines[name] = f"{name}: {was} in the checkpoint, {own} in this run, which is used"
    return lines


def _shown(value: Any) -> str:
    return shown(value[0] if isinstance(value, list) and len(value) == 1 else value)


def _check_kind(name: str, was: Mapping[str, Any], own: Mapping[str, Any], path: Any) -> None:
    changed = [key for key in _KINDS if key in own and bool(was.get(key)) != bool(own[key])]
    if name != "SGD" and "momentum" in own and bool(was.get("momentum")) != bool(own["momentum"]):
        changed.append("momentum")
    for key in changed:
        raise CheckpointError(
            f"{str(path)!r} belongs to another optimizer: its {name} has {key}={shown(was.get(key))}, this run's "
            f"{shown(own[key])}; start from its weights with model.load_weights"
        )
