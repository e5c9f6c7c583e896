"""Checkpoint files: written whole or not at all, and loaded without running code that is in them."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import struct
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import nn

__all__ = [
    "CheckpointError",
    "atomic_write",
    "find_newest",
    "load_checkpoint",
    "load_weights",
    "remove_unfinished",
    "restore",
    "save_checkpoint",
]


# What torch.load raises for bytes that are no checkpoint, or not a whole one.
_DAMAGED = (
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    struct.error,
)
_UNFINISHED = ".unfinished-"


class CheckpointError(ValueError):
    """A file that is no checkpoint, is damaged, or belongs to another model."""


def save_checkpoint(state: Mapping[str, Any], path: str | Path) -> None:
    """Writes a checkpoint, whole or not at all (:func:`atomic_write`).

    Args:
        state: tensors, plain numbers, strings, and containers of them.
        path: the file. Its folder is made.
    """
    atomic_write(path, lambda stream: torch.save(dict(state), stream))


def atomic_write(path: str | Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes a file so that at any moment ``path`` is the old file or the new one, whole.

    The bytes go to a temporary file beside it, are flushed to the disk, and take the name in one step.

    Args:
        path: the file. Its folder is made.
        write: writes the bytes into a stream.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(prefix=f"{_UNFINISHED}{path.name}-", dir=path.parent, delete=False) as stream:
        try:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
            os.chmod(stream.name, 0o666 & ~_umask())
            os.replace(stream.name, path)
        except BaseException:
            Path(stream.name).unlink(missing_ok=True)
            raise
    with contextlib.suppress(OSError):  # a folder can't be flushed everywhere, and the file is safe by now
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_unfinished(folder: str | Path) -> None:
    """Removes what a process that was killed while it saved has left behind."""
    for path in Path(folder).glob(f"{_UNFINISHED}*"):
        path.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Loads a checkpoint of this package or of torchreid onto the CPU.

    Only tensors, plain data and NumPy scalars are unpickled (torchreid's own engines store rank-1 as one, which
    ``torch.load`` refuses by default since torch 2.6); a file that asks for anything else is refused, and none of its
    code runs.

    Args:
        path: the file.

    Returns:
        its dictionary, with the weights under ``"state_dict"``. A file that is a bare state dict is taken as weights.

    Raises:
        CheckpointError: if the file is missing, damaged, or no checkpoint.
    """
    try:
        with _numpy_scalars_allowed():
            checkpoint: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\w+(?:\.\w+)+)", str(error))
        reason = f"it asks for {asked[1]}, which could run code" if asked else "it holds other things than data"
        if asked and "numpy" in asked[1] and not hasattr(torch.serialization, "safe_globals"):
            reason = "it is one of torchreid's own engines, which takes torch 2.5 or newer to load safely"
        raise CheckpointError(f"{str(path)!r} is no checkpoint, or not one to load safely: {reason}") from error
    except _DAMAGED as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"can't load {str(path)!r}, is it a whole checkpoint? {reason}") from error
    if isinstance(checkpoint, dict) and "state_dict" not in checkpoint:
        checkpoint = {"state_dict": checkpoint}
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{str(path)!r} holds no checkpoint but a {type(checkpoint).__name__}")
    weights = checkpoint["state_dict"]
    if not isinstance(weights, dict) or not weights or not all(isinstance(w, torch.Tensor) for w in weights.values()):
        raise CheckpointError(f"{str(path)!r} holds no model weights (a state_dict)")
    return checkpoint


def _numpy_scalars_allowed() -> contextlib.AbstractContextManager[None]:
    if not hasattr(torch.serialization, "safe_globals"):  # torch < 2.5
        return contextlib.nullcontext()
    scalar = np.float64(0).__reduce__()[0]
    allowed: list[Any] = [np.dtype, *(type(np.dtype(kind)) for kind in (np.float32, np.float64))]
    allowed += [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]  # NumPy 1 and 2
    return torch.serialization.safe_globals(allowed)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads a checkpoint's weights into a model; layers of another name or shape are named and stay as they are.

    Args:
        model: the model, also within ``DataParallel``.
        path: a checkpoint of this package or of torchreid.

    Raises:
        CheckpointError: as :func:`load_checkpoint` does, and if no layer fits.
    """
    own = getattr(model, "module", model)
    weights = _without_prefix(load_checkpoint(path)["state_dict"])
    current = own.state_dict()
    fitting = {name: value for name, value in weights.items() if name in current and current[name].shape == value.shape}
    if not fitting:
        raise CheckpointError(f"{str(path)!r} belongs to another model: none of its {len(weights)} layers fit")
    own.load_state_dict({**current, **fitting})
    print(f'=> Loaded {len(fitting)} of {len(current)} layers from "{path}"')
    left_out = sorted(set(weights) - set(fitting))
    if left_out:
        print(f"** These of its layers differ in name or shape from the model's and were left out: {left_out}")


def restore(path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> dict[str, Any]:
    """Loads a checkpoint into model, optimizer and scheduler, and returns it.

    Raises:
        CheckpointError: as :func:`load_checkpoint` does, and if the checkpoint is of another model or optimizer.
    """
    checkpoint = load_checkpoint(path)
    missing = [key for key in ("epoch", "optimizer", "scheduler") if key not in checkpoint]
    if missing:
        raise CheckpointError(f"{str(path)!r} has no {missing} to go on from; load it with model.load_weights")
    try:
        for part, current in (("optimizer", optimizer), ("scheduler", scheduler)):
            if _kind(checkpoint[part]) != _kind(current.state_dict()):
                raise ValueError(f"its {part} is of another kind than {type(current).__name__}")
        getattr(model, "module", model).load_state_dict(_without_prefix(checkpoint["state_dict"]))
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
        checkpoint["epoch"] = int(checkpoint["epoch"])
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{str(path)!r} is of another model or optimizer: {reason}") from error
    return checkpoint


def _kind(state: Mapping[str, Any]) -> set[str]:
    """What tells optimizers and schedulers from each other in their states: the names of their settings."""
    if "_schedulers" in state:  # of a chain, with warm-up
        return {f"{number}: {key}" for number, part in enumerate(state["_schedulers"]) for key in _kind(part)}
    return set(state["param_groups"][0]) if "param_groups" in state else set(state)


def _without_prefix(weights: Mapping[str, Any]) -> dict[str, Any]:
    """``DataParallel`` puts a prefix before each name."""
    return {name.removeprefix("module."): value for name, value in weights.items()}


_NAME = re.compile(r"model\.pth\.tar-(\d+)(?:\.(\d+))?")


def find_newest(folder: str | Path, since: int = 0) -> Path | None:
    """The checkpoint in ``folder`` written last that loads whole, or None; damaged ones are named and passed over.

    Args:
        folder: where.
        since: only those written since, in nanoseconds.
    """
    files = [
        (path.stat().st_mtime_ns, int(name[1]), int(name[2] or 0), path)
        for path in Path(folder).glob("model.pth.tar-*")
        if (name := _NAME.fullmatch(path.name))
    ]
    for written, *_, path in sorted(files, reverse=True):
        if written < since:
            break
        try:
            load_checkpoint(path)
        except CheckpointError as error:
            print(f"** Passed over: {error}")
        else:
            return path
    return None
