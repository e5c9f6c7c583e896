"""Checkpoint files. They are written atomically, and loading them runs no code that they contain."""

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

from torchreid_snloss.deprecation import renamed

__all__ = [
    "CheckpointError",
    "atomic_write",
    "find_newest",
    "load_checkpoint",
    "load_resumable",
    "load_weights",
    "remove_unfinished",
    "restore",
    "save_checkpoint",
]

__getattr__ = renamed(__name__, {"write_whole": "torchreid_snloss.checkpoint.atomic_write"})

# What torch.load raises for a file that is damaged or not a checkpoint.
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
    """A file is not a checkpoint, is damaged, or belongs to another model."""


def save_checkpoint(state: Mapping[str, Any], path: str | Path) -> None:
    """Writes a checkpoint with `atomic_write`.

    Args:
        state: The content of the checkpoint: tensors, plain numbers, strings, and containers of them.
        path: The file. Its folder is created if needed.
    """
    atomic_write(path, lambda stream: torch.save(dict(state), stream))


def atomic_write(path: str | Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes a file so that at any moment `path` is either the complete old file or the complete new one.

    The bytes are written to a temporary file in the same folder and flushed to disk. Then the file is renamed.

    Args:
        path: The file. Its folder is created if needed.
        write: A function that writes the bytes to a stream.
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
    with contextlib.suppress(OSError):  # not every system can flush a folder, and the file itself is on disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_unfinished(folder: str | Path) -> None:
    """Removes the temporary files of processes that were killed while they saved."""
    for path in Path(folder).glob(f"{_UNFINISHED}*"):
        path.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Loads a checkpoint of this package or of torchreid onto the CPU.

    Only tensors, plain data and NumPy scalars are unpickled. (torchreid's own engines store rank-1 as a NumPy scalar,
    which `torch.load` refuses by default since torch 2.6.) A file that needs anything else raises an error, and no code
    in it runs.

    Args:
        path: The file.

    Returns:
        The content of the checkpoint, with the weights under `"state_dict"`. A file that holds only a state dict counts
        as weights.

    Raises:
        CheckpointError: If the file is missing, damaged, or not a checkpoint.
    """
    try:
        with _numpy_scalars_allowed():
            checkpoint: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\w+(?:\.\w+)+)", str(error))
        reason = f"it needs {name[1]}, which could run code" if name else "it holds more than data"
        if name and "numpy" in name[1] and not hasattr(torch.serialization, "safe_globals"):
            reason = "it was saved by one of torchreid's own engines and needs torch 2.5 or newer to load safely"
        raise CheckpointError(f"{str(path)!r} is not a checkpoint that can be loaded safely: {reason}") from error
    except _DAMAGED as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"can't load {str(path)!r}, which is damaged or not a checkpoint: {reason}") from error
    if isinstance(checkpoint, dict) and "state_dict" not in checkpoint:
        checkpoint = {"state_dict": checkpoint}
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{str(path)!r} holds a {type(checkpoint).__name__}, not a checkpoint")
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
    """Loads the weights of a checkpoint into a model.

    Layers that differ in name or shape are not loaded, and a printed line names those of the checkpoint.

    Args:
        model: The model, which may be wrapped in `DataParallel`.
        path: A checkpoint of this package or of torchreid.

    Raises:
        CheckpointError: As `load_checkpoint` does, and if no layer fits.
    """
    unwrapped = getattr(model, "module", model)
    weights = _without_prefix(load_checkpoint(path)["state_dict"])
    current = unwrapped.state_dict()
    fitting = {name: value for name, value in weights.items() if name in current and current[name].shape == value.shape}
    if not fitting:
        raise CheckpointError(
            f"{str(path)!r} belongs to another model: none of its {len(weights)} layers matches in name and shape"
        )
    unwrapped.load_state_dict({**current, **fitting})
    print(f'=> Loaded {len(fitting)} of {len(current)} layers from "{path}"')
    not_loaded = sorted(set(weights) - set(fitting))
    if not_loaded:
        print(f"** Layers that differ in name or shape from the model's were not loaded: {not_loaded}")


def load_resumable(path: str | Path) -> dict[str, Any]:
    """Loads a checkpoint that a run can resume from, onto the CPU.

    Args:
        path: A checkpoint of this package or of torchreid.

    Returns:
        The content of the checkpoint.

    Raises:
        CheckpointError: As `load_checkpoint` does, and if the checkpoint holds only weights.
    """
    checkpoint = load_checkpoint(path)
    missing = [key for key in ("epoch", "optimizer", "scheduler") if key not in checkpoint]
    if missing:
        raise CheckpointError(
            f"{str(path)!r} has no {missing} to resume from; load its weights with model.load_weights"
        )
    try:
        checkpoint["epoch"] = int(checkpoint["epoch"])
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{str(path)!r} holds no number of epochs: {error}") from error
    return checkpoint


def restore(
    checkpoint: Mapping[str, Any], path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Puts a checkpoint's weights into the model, and its state into the optimizer.

    Args:
        checkpoint: The content of the checkpoint.
        path: The file, for messages.
        model: The model, which may be wrapped in `DataParallel`.
        optimizer: The optimizer.

    Raises:
        CheckpointError: If the checkpoint belongs to another model or optimizer.
    """
    try:
        if _option_names(checkpoint["optimizer"]) != _option_names(optimizer.state_dict()):
            raise ValueError(f"its optimizer is of another type than {type(optimizer).__name__}")
        getattr(model, "module", model).load_state_dict(_without_prefix(checkpoint["state_dict"]))
        optimizer.load_state_dict(checkpoint["optimizer"])
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{str(path)!r} belongs to another model or optimizer: {reason}") from error


def _option_names(state: Mapping[str, Any]) -> set[str]:
    """The names of the options in the state dict of an optimizer, which differ from type to type."""
    return set(state["param_groups"][0])


def _without_prefix(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The weights without the prefix that `DataParallel` puts before each name."""
    return {name.removeprefix("module."): value for name, value in weights.items()}


_NAME = re.compile(r"model\.pth\.tar-(\d+)(?:\.(\d+))?")


def find_newest(folder: str | Path, run: str | None = None) -> Path | None:
    """Finds the newest checkpoint in a folder that can be loaded. A printed line names each one that can't.

    What a checkpoint holds says how new it is, not the time of its file, which a copy does not keep: the run that
    started last counts first, then the epoch, then the batch.

    Args:
        folder: The folder with the checkpoints.
        run: The identifier of the run whose checkpoints count. None for all runs.

    Returns:
        The file, or None if there is none.
    """
    files = []
    for path in sorted(Path(folder).glob("model.pth.tar-*")):
        if name := _NAME.fullmatch(path.name):
            try:
                files.append((*_position(path, int(name[1]), int(name[2] or 0)), path))
            except CheckpointError as error:
                print(f"** Skipped a checkpoint: {error}")
    for whose, _, _, path in sorted(files, reverse=True):
        if run is not None and whose != run:
            continue
        try:
            load_checkpoint(path)
        except CheckpointError as error:
            print(f"** Skipped a checkpoint: {error}")
        else:
            return path
    return None


def _position(path: Path, epoch: int, batch: int) -> tuple[str, int, int]:
    """How far a checkpoint is: its run, which sorts by when it started, its epoch and batch; else those of its name."""
    try:
        with _numpy_scalars_allowed():
            content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # reads no tensors
    except (pickle.UnpicklingError, *_DAMAGED):
        content = load_checkpoint(path)  # files of old torch versions can't be mapped
    if not isinstance(content, dict):
        return "", epoch, batch
    run, state = content.get("run"), content.get("progress")
    inside: tuple[Any, Any] = content.get("epoch"), state.get("batch") if isinstance(state, dict) else 0
    if all(type(number) is int for number in inside):
        epoch, batch = inside
    return run if isinstance(run, str) else "", epoch, batch
