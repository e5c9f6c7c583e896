"""Whether what a checkpoint says of the run that wrote it is plain data, and whether its parts agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from torchreid_snloss.checkpoint.schema import check_mapping, check_range, check_tensor, kind_of

__all__ = ["check_consistency", "check_plain"]

_DEEPEST = 20  # of dictionaries and lists in each other
_MOST_VALUES = 100_000
_LARGEST = 10**9


def check_consistency(checkpoint: Mapping[str, Any]) -> None:
    """Checks the settings and the description of the batches, and how far the optimizer and the schedule are.

    Parts that are missing are not checked.

    Raises:
        ValueError: If a part is of another kind, or belongs to another point of the training than the epoch.
    """
    settings = checkpoint.get("settings")
    if settings is not None:
        check_plain("its settings", check_mapping("its settings", settings))
    if checkpoint.get("batches") is not None:
        _check_batches(check_mapping("its batches", checkpoint["batches"]))
    if "scheduler" in checkpoint:
        check_plain("its scheduler", checkpoint["scheduler"], tensors=True)
    counts = checkpoint.get("counts")
    if counts is not None:
        for name, lowest in (("optimizer_states", 0), ("schedule_start", -_LARGEST)):
            check_range(f"its counts.{name}", check_mapping("its counts", counts).get(name), lowest, _LARGEST)
        optimizer = checkpoint.get("optimizer", {})
        states = optimizer.get("state")
        if "param_groups" in optimizer and isinstance(states, Mapping) and len(states) != counts["optimizer_states"]:
            raise ValueError(f"its optimizer has the state of {len(states)} of {counts['optimizer_states']} parameters")
    if "epoch" in checkpoint and "scheduler" in checkpoint:
        first = settings.get("train.start_epoch") if settings else 0
        starts = {0, first if type(first) is int else 0} if counts is None else {counts["schedule_start"]}
        for steps in _last_epochs(checkpoint["scheduler"]):
            if type(steps) is int and checkpoint["epoch"] - steps not in starts:
                raise ValueError(
                    f"its scheduler has last_epoch {steps}, which is not where epoch {checkpoint['epoch']} is"
                )


def _last_epochs(scheduler: Mapping[str, Any]) -> Iterator[Any]:
    """How far a scheduler is, and if it is a chain, how far each of its parts is."""
    parts = scheduler.get("_schedulers", [])
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, Mapping) for part in parts):
        raise ValueError("its scheduler's parts must be dictionaries")
    if "last_epoch" in scheduler:  # the parts of a sequence count from where each begins
        yield scheduler["last_epoch"]
    else:
        for part in parts:
            yield from _last_epochs(part)


def _check_batches(batches: Mapping[Any, Any]) -> None:
    check_plain("its batches", {key: value for key, value in batches.items() if key != "images"})
    if batches.get("batch_size") is not None:
        check_range("its batches.batch_size", batches["batch_size"], 0, _LARGEST)
    images = batches.get("images")
    if images is None:
        return
    check_range("its batches.images.images", check_mapping("its batches.images", images).get("images"), 0, _LARGEST)
    labels = check_mapping("its batches.images.labels", images.get("labels"))
    if not all(type(label) is int and isinstance(digest, str) for label, digest in labels.items()):
        raise ValueError("its batches.images.labels must be integers with digests of their images")
    if not isinstance(images.get("order"), str):
        raise ValueError(f"its batches.images.order must be a digest, got {kind_of(images.get('order'))}")


def check_plain(what: str, value: Any, tensors: bool = False) -> None:
    """Checks that a value is made of text, numbers, truth values, None, and lists and dictionaries of them.

    Args:
        what: What a message calls the value.
        value: The value.
        tensors: Whether dense tensors may be among them.

    Raises:
        ValueError: If it is anything else.
    """
    rest: list[tuple[str, Any, int]] = [(what, value, 0)]
    for _ in range(_MOST_VALUES):
        if not rest:
            return
        name, item, depth = rest.pop()
        if item is None or isinstance(item, (str, bool, int, float)):
            continue
        if tensors and isinstance(item, Tensor):
            check_tensor(name, item)
        elif isinstance(item, (list, tuple)) and depth < _DEEPEST:
            rest += [(name, part, depth + 1) for part in item]
        elif isinstance(item, Mapping) and depth < _DEEPEST:
            if not all(isinstance(key, str if depth == 0 else (str, int)) for key in item):
                raise ValueError(f"{name} must have names as keys")
            rest += [
                (f"{name}.{str(key)[:100]}" if depth == 0 else name, part, depth + 1) for key, part in item.items()
            ]
        else:
            raise ValueError(f"{name} must be plain data, got {kind_of(item)}")
    raise ValueError(f"{what} must be plain data, got too many values")
