"""Checkpoint files. They are written atomically, and loading them runs no code that they contain."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchreid_snloss.checkpoint.atomic import atomic_write
from torchreid_snloss.checkpoint.consistency import check_consistency, check_plain
from torchreid_snloss.checkpoint.fitting import fit_weights, is_of_classifier
from torchreid_snloss.checkpoint.optimizer_state import fit_optimizer, fit_scheduler
from torchreid_snloss.checkpoint.schema import FORMAT_VERSION, check_content, check_state_dict, check_version
from torchreid_snloss.checkpoint.torch_file import CheckpointError, read_torch_file
from torchreid_snloss.errors import text_of

__all__ = [
    "load_checked",
    "load_checkpoint",
    "load_resumable",
    "load_weights",
    "put_weights",
    "restore",
    "save_checkpoint",
    "settings_of",
]

_NUM_NAMES = 3  # of layers, in a message


def save_checkpoint(state: Mapping[str, Any], path: str | Path) -> None:
    """Writes a checkpoint with `atomic_write`.

    Args:
        state: The content of the checkpoint: tensors, plain numbers, strings, and containers of them.
        path: The file. Its folder is created if needed.
    """
    atomic_write(path, lambda stream: torch.save(dict(state), stream))


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Loads a checkpoint of this package or of torchreid onto the CPU, and checks the file and its weights.

    Only tensors, plain data and NumPy scalars are unpickled. (torchreid's own engines store rank-1 as a NumPy scalar,
    which `torch.load` refuses by default since torch 2.6.) A file that needs anything else raises an error, and no code
    in it runs.

    Args:
        path: The file.

    Returns:
        The content of the checkpoint, with the weights under `"state_dict"`. A file that holds only a state dict counts
        as weights.

    Raises:
        CheckpointError: If the file is missing, damaged, not a checkpoint or one of a later version, or if a weight is
            not a finite real number.
    """
    checkpoint = read_torch_file(path)
    if isinstance(checkpoint, dict) and "state_dict" not in checkpoint:
        checkpoint = {"state_dict": checkpoint}
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{str(path)!r} holds a {type(checkpoint).__name__}, not a checkpoint")
    version = checkpoint.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{str(path)!r} was written by a later version of torchreid-snloss, in format {version}; this one reads "
            f"formats up to {FORMAT_VERSION}"
        )
    weights = checkpoint["state_dict"]
    if not isinstance(weights, dict) or not any(isinstance(value, torch.Tensor) for value in weights.values()):
        raise CheckpointError(f"{str(path)!r} holds no model weights (a state_dict)")
    try:
        check_version(checkpoint)
        check_state_dict(weights)
    except ValueError as error:
        raise _invalid(path, error) from error
    return checkpoint


def load_checked(path: str | Path) -> dict[str, Any]:
    """Does what `load_checkpoint` does, and checks everything that training resumes from too."""
    checkpoint = load_checkpoint(path)
    try:
        check_content(checkpoint)
        check_consistency(checkpoint)
    except ValueError as error:
        raise _invalid(path, error) from error
    return checkpoint


def _invalid(path: str | Path, error: ValueError) -> CheckpointError:
    return CheckpointError(f"{str(path)!r} is not a valid checkpoint: {error}")


def settings_of(checkpoint: Mapping[str, Any], path: str | Path) -> Mapping[str, Any]:
    """The settings of the run that wrote a checkpoint, by their keys; empty for one without any, as of torchreid.

    Args:
        checkpoint: The content of the checkpoint.
        path: The file, for messages.

    Raises:
        CheckpointError: If they are no plain data.
    """
    settings = checkpoint.get("settings")
    if not isinstance(settings, Mapping):
        return {}
    try:
        check_plain("its settings", settings)
    except ValueError as error:
        raise _invalid(path, error) from error
    return settings


def load_weights(model: nn.Module, path: str | Path, complete: bool = False) -> None:
    """Loads the weights of a checkpoint into a model, and prints how many of its layers the checkpoint has.

    Layers that differ in name or shape are not loaded.

    Args:
        model: The model, which may be wrapped in `DataParallel`.
        path: A checkpoint of this package or of torchreid.
        complete: Whether all layers must fit, apart from the classifier, which a test does not use.

    Raises:
        CheckpointError: As `load_checkpoint` does, and if no layer but the classifier fits, a layer is of another type
            of numbers, or a layer other than the classifier does not fit and `complete` is set.
    """
    put_weights(model, load_checkpoint(path), path, complete)


def put_weights(model: nn.Module, checkpoint: Mapping[str, Any], path: str | Path, complete: bool = False) -> None:
    """Does what `load_weights` does, with the content of a checkpoint that is loaded already."""
    unwrapped = getattr(model, "module", model)
    weights, epoch = checkpoint["state_dict"], checkpoint.get("epoch")
    current = unwrapped.state_dict()
    try:
        fit = fit_weights(current, weights)
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r} does not fit the model: {error}") from error
    if all(is_of_classifier(name) for name in fit.fitting):
        raise CheckpointError(
            f"{str(path)!r} belongs to another model: none of its {len(weights)} layers matches in name and shape, "
            "except perhaps a classifier"
        )
    if complete and fit.misfits:
        raise CheckpointError(
            f"{str(path)!r} belongs to another model, which can't be tested as this one: {fit.describe(_NUM_NAMES)}"
        )
    unwrapped.load_state_dict({**current, **fit.fitting})
    trained = f", after {epoch} epochs" if type(epoch) is int else ""
    layers = f"{len(fit.fitting)} of {len(current)} layers, {fit.share:.1%} of the weights"
    print(f'=> Loaded {layers}, from "{path}"{trained}')
    if fit.misfits or fit.classifier:
        print(f"** Layers that differ in name or shape were not loaded: {fit.describe(_NUM_NAMES)}")


def load_resumable(path: str | Path) -> dict[str, Any]:
    """Loads a checkpoint that a run can resume from, onto the CPU, and checks its content.

    Args:
        path: A checkpoint of this package or of torchreid.

    Returns:
        The content of the checkpoint.

    Raises:
        CheckpointError: As `load_checkpoint` does, and if the checkpoint holds only weights or malformed parts.
    """
    checkpoint = load_checked(path)
    missing = [key for key in ("epoch", "optimizer", "scheduler") if key not in checkpoint]
    if missing:
        raise CheckpointError(
            f"{str(path)!r} has no {missing} to resume from; load its weights with model.load_weights"
        )
    return checkpoint


def restore(
    checkpoint: Mapping[str, Any], path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any
) -> dict[str, Any]:
    """Puts a checkpoint's weights into the model, and its state into the optimizer. Both are checked before.

    Args:
        checkpoint: The content of the checkpoint.
        path: The file, for messages.
        model: The model, which may be wrapped in `DataParallel`.
        optimizer: The optimizer.
        scheduler: The learning rate scheduler, which is not changed.

    Returns:
        The state of the scheduler in the checkpoint, which the scheduler can load if it is of the same type.

    Raises:
        CheckpointError: If the checkpoint belongs to another model or optimizer.
    """
    unwrapped, classes = getattr(model, "module", model), checkpoint.get("classes", {})
    try:
        fit = fit_weights(unwrapped.state_dict(), checkpoint["state_dict"])
        if fit.misfits or fit.classifier:
            raise ValueError(f"it belongs to another model: {fit.describe(_NUM_NAMES)}")
        optimizer_state = fit_optimizer(
            optimizer, checkpoint["optimizer"], classes.get("optimizer"), trained=_surely_trained(checkpoint)
        )
        scheduler_state = fit_scheduler(scheduler, checkpoint["scheduler"])
        unwrapped.load_state_dict({**unwrapped.state_dict(), **fit.fitting})
        optimizer.load_state_dict(optimizer_state)
    except Exception as error:  # a part of the user's own may raise any class for a state that is not its own
        reason = text_of(error, longest=300)
        raise CheckpointError(f"can't resume from {str(path)!r}: {reason}") from error
    return scheduler_state


def _surely_trained(checkpoint: Mapping[str, Any]) -> bool:
    """Whether the optimizer of a checkpoint that does not count its states must have some."""
    skips = checkpoint.get("scaler") or (checkpoint.get("settings") or {}).get("train.nonfinite") == "skip"
    return checkpoint.get("counts") is None and checkpoint["epoch"] > 0 and not skips
