"""What a checkpoint holds, and the checks of its content before anything uses it."""

from __future__ import annotations

import dataclasses
import math
import random
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchreid_snloss import device
from torchreid_snloss.errors import text_of

__all__ = [
    "FORMAT_VERSION",
    "TrainingState",
    "check_content",
    "check_mapping",
    "check_range",
    "check_state_dict",
    "check_tensor",
    "check_version",
    "kind_of",
    "read_progress",
]

FORMAT_VERSION = 1
"""The version of the content. Checkpoints of torchreid and of this package before 0.3 have none."""

_LARGEST = 10**9  # epochs and batches


@dataclasses.dataclass
class TrainingState:
    """The training progress that a checkpoint stores in addition to torchreid's keys.

    Attributes:
        seed: the seed of the run. The random states of an epoch depend only on it and on the number of the epoch.
        batch: how many batches of the current epoch have been trained.
        evaluated: whether the evaluation after the last epoch has been done.
        rank1: rank-1 of the last evaluation.
        best: the best mAP so far; -1 before the first evaluation.
        written: names of this run's checkpoints that are kept, oldest first.
    """

    seed: int
    batch: int = 0
    evaluated: bool = True
    rank1: float = 0.0
    best: float = -1.0
    written: list[str] = dataclasses.field(default_factory=list)


def check_state_dict(weights: Any, what: str = "layer") -> None:
    """Checks a state dict: names and dense, real, finite tensors.

    Args:
        weights: The state dict.
        what: What a message calls one of its tensors.

    Raises:
        ValueError: If it is anything else.
    """
    for name, value in check_mapping(f"the {what}s", weights).items():
        if not isinstance(name, str):
            raise ValueError(f"the names of its {what}s must be strings, got {reprlib.repr(name)}")
        check_tensor(f"its {what} {name}", value)
        if what == "layer" and name.startswith("module.") and name.removeprefix("module.") in weights:
            raise ValueError(f"it has a {what} {name.removeprefix('module.')} twice, once as {name}")
        if name.rpartition(".")[2] == "running_var" and (value < 0).any():
            raise ValueError(f"its {what} {name} must be variances, got negative ones")


def check_tensor(what: str, value: Any) -> None:
    """Checks that a value is a dense, real and finite tensor with data of its own.

    Raises:
        ValueError: If it is anything else.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{what} must be a tensor, got {kind_of(value)}")
    kind = "meta" if value.is_meta else "quantized" if value.is_quantized else str(value.layout).removeprefix("torch.")
    if kind != "strided":
        raise ValueError(f"{what} must be a dense tensor, got a {kind} one")
    if value.is_complex():
        raise ValueError(f"{what} must be real, got {value.dtype}")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"{what} has more elements than are stored")
    if value.is_floating_point():
        wide = value if value.element_size() > 1 else value.float()  # torch computes little in float8
        if not torch.isfinite(wide).all():
            raise ValueError(f"{what} holds NaN or infinity")


def check_version(checkpoint: Mapping[Any, Any]) -> None:
    """Checks the version of a checkpoint's format, where it has one.

    Raises:
        ValueError: If it is anything but a version that this package reads.
    """
    if "format_version" in checkpoint:
        check_range("its format version", checkpoint["format_version"], 0, FORMAT_VERSION)


def check_content(checkpoint: Mapping[str, Any]) -> None:
    """Checks the content of a checkpoint, except for its weights and for what only the model or the optimizer shows.

    Parts that are missing are not checked.

    Raises:
        ValueError: If a part is not what a checkpoint holds.
    """
    if "epoch" in checkpoint:
        check_range("its epoch", checkpoint["epoch"], 0, _LARGEST)
    for part in ("optimizer", "scheduler"):
        if part in checkpoint:
            check_mapping(f"its {part}", checkpoint[part])
    progress = read_progress(checkpoint["progress"]) if "progress" in checkpoint else TrainingState(0)
    _check_random_states(checkpoint.get("random_states"), needed=progress.batch > 0)
    if checkpoint.get("criterion") is not None:
        check_state_dict(checkpoint["criterion"], "criterion's parameter")
    _check_scaler(checkpoint.get("scaler"))
    _check_memory(checkpoint.get("memory"))
    classes = check_mapping("its classes", checkpoint.get("classes", {}))
    if not all(isinstance(text, str) for item in classes.items() for text in item):
        raise ValueError(f"its classes must be names, got {kind_of(classes)}")


def read_progress(progress: Any) -> TrainingState:
    """Makes the `TrainingState` that a checkpoint holds under `progress`.

    Raises:
        ValueError: If it holds anything else.
    """
    fields = {field.name: field for field in dataclasses.fields(TrainingState)}
    unknown = [name for name in check_mapping("its progress", progress) if name not in fields]
    if unknown:
        raise ValueError(f"its progress holds {reprlib.repr(unknown)}, which this version does not know")
    for name, hint in typing.get_type_hints(TrainingState).items():
        no_default = fields[name].default is fields[name].default_factory is dataclasses.MISSING
        if name not in progress and no_default:
            raise ValueError(f"its progress has no {name}")
        if name in progress and not _has_type(progress[name], hint):
            expected = getattr(hint, "__name__", hint) if not typing.get_args(hint) else hint
            raise ValueError(f"its progress.{name} must be of type {expected}, got {kind_of(progress[name])}")
    state = TrainingState(**progress)
    check_range("its progress.seed", state.seed, 0, 2**64 - 1)
    check_range("its progress.batch", state.batch, 0, _LARGEST)
    for name in ("rank1", "best"):
        if not -1 <= getattr(state, name) <= 1 + 1e-6:
            raise ValueError(f"its progress.{name} must be from -1 to 1, got {getattr(state, name)}")
    return state


def _check_random_states(states: Any, needed: bool) -> None:
    if states is None:
        if needed:
            raise ValueError("it was written in the middle of an epoch and has no random states")
        return
    check_mapping("its random states", states)
    try:  # on generators of their own
        random.Random().setstate(states["python"])
        kind, keys, position, has_gauss, cached = states["numpy"]
        check_range("position", position, 0, 624)
        state = (kind, keys.numpy().astype(np.uint32), position, int(has_gauss), float(cached))
        np.random.RandomState().set_state(state)
        torch.Generator().set_state(states["torch"])
        for state in states["cuda"]:
            if state.dtype != torch.uint8 or state.dim() != 1:
                raise ValueError("the state of a GPU is not made of bytes")
            device.check_random_state(state)
    except Exception as error:  # anything, for content of any type
        raise ValueError(
            f"its random states are not those of Python, NumPy and torch: {text_of(error, longest=200)}"
        ) from error


def _check_scaler(scaler: Any) -> None:
    if scaler is None or (isinstance(scaler, Mapping) and not scaler):  # of a run without one, or a disabled one
        return
    check_mapping("its scaler", scaler)
    for name in ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"):
        value = scaler.get(name)
        if not _has_type(value, float) or value < 0 or (value == 0 and name != "_growth_tracker"):
            raise ValueError(f"its scaler.{name} must be a positive number, got {kind_of(value)}")


def _check_memory(memory: Any) -> None:
    if memory is None:
        return
    parts: list[Any] = [check_mapping("its memory", memory).get(name) for name in ("features", "pids", "images")]
    if all(part is None for part in parts):
        if memory and not {"features", "pids", "images"} <= set(memory):
            raise ValueError("its memory must hold features, pids and images")
        return
    for name, part in zip(("features", "pids", "images"), parts):
        check_tensor(f"its memory.{name}", part)
    features, pids, images = parts
    if features.dim() != 2 or not features.is_floating_point():
        raise ValueError(f"its memory.features must be a matrix of floats, got {_described(features)}")
    for name, part in (("pids", pids), ("images", images)):
        if part.dtype != torch.int64 or part.shape != features.shape[:1]:
            raise ValueError(f"its memory.{name} must be {len(features)} integers, got {_described(part)}")


def check_mapping(what: str, value: Any) -> Mapping[Any, Any]:
    """Returns a value that is a dictionary, and raises `ValueError` for any other."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} must be a dictionary, got {kind_of(value)}")
    return value


def check_range(what: str, value: Any, lowest: int, highest: int) -> None:
    """Raises `ValueError` for what is not an integer from `lowest` to `highest`."""
    if not _has_type(value, int) or not lowest <= value <= highest:
        raise ValueError(f"{what} must be an integer from {lowest} to {highest}, got {kind_of(value)}")


def _has_type(value: Any, hint: Any) -> bool:
    """Whether a value is of the type of an annotation; an integer is a float too, and a bool is neither."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_has_type(value, argument) for argument in arguments)
    if origin is list:
        return isinstance(value, list) and all(_has_type(item, arguments[0]) for item in value)
    if hint is bool:
        return isinstance(value, bool)
    if isinstance(value, bool):
        return False
    if hint is float:
        return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    return isinstance(value, origin or hint)


def kind_of(value: Any) -> str:
    """A value as a message shows it; of one that is not plain, its type."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return reprlib.repr(value)
    return _described(value) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"
