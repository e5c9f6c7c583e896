"""The model that a test uses: which checkpoint it comes from, and where the config differs from that checkpoint's."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import nn

from torchreid_snloss import distributed
from torchreid_snloss.build import load_model
from torchreid_snloss.checkpoint import (
    CheckpointError,
    find_newest,
    load_checkpoint,
    load_weights,
    model_folder,
    num_classes,
)
from torchreid_snloss.config import ConfigError
from torchreid_snloss.engine.differences import feature_differences
from torchreid_snloss.settings import Settings

__all__ = ["checkpoint_to_test", "load_tested_model", "newest_checkpoint"]


def newest_checkpoint(folder: Path, run: str | None = None) -> Path | None:
    """What `find_newest` finds on rank 0, or the error that it raises there, on all processes, which must call it."""
    found: Path | CheckpointError | None = None
    if distributed.rank() == 0:
        try:
            found = find_newest(folder, run)
        except CheckpointError as error:
            found = error
    found = distributed.broadcast_object(found)
    if isinstance(found, CheckpointError):
        raise found
    return found


def checkpoint_to_test(settings: Settings) -> Path | str:
    """The checkpoint of `model.resume`, or else of `model.load_weights`; empty if the config names none.

    It prints a line if `auto` finds no checkpoint, or `model.load_weights` is not used. All processes must call it.

    Raises:
        ConfigError: if `model.resume` is `auto`, there is no checkpoint, and `model.load_weights` is empty.
        CheckpointError: as of `find_newest`.
    """
    resume, weights = settings.resume, settings.load_weights
    path: Path | str = resume
    if resume == "auto":
        folder = model_folder(settings.save_dir)
        path = newest_checkpoint(folder) or ""
        if not path and not weights:
            raise ConfigError(f"model.resume auto: no checkpoint in {folder}")
        if not path:
            print(f"=> model.resume auto: no checkpoint in {folder}, so that of model.load_weights is used")
    if path and weights:
        print(f"=> model.load_weights {weights} is not used, since model.resume is given")
    return path or weights


def load_tested_model(settings: Settings, checkpoint: Path | str) -> nn.Module:
    """Builds the model of a test, on the CPU, in evaluation mode. A line names its weights if no checkpoint is given.

    Another line is printed for each value of the config that changes the features and is not the checkpoint's.

    Args:
        settings: the settings of the test.
        checkpoint: what `checkpoint_to_test` returned.

    Raises:
        ConfigError: if the model can't be built.
        CheckpointError: if the checkpoint can't be read, or is that of another model.
    """
    if not checkpoint:
        weights = "its pretrained" if settings.pretrained and not settings.embedding else "random"
        print(f"** The config names no checkpoint: {settings.model_name} has {weights} weights")
        return load_model(settings, num_classes=1).eval()
    content = load_checkpoint(checkpoint)
    without_download = dataclasses.replace(settings, pretrained=False)
    model = load_model(without_download, num_classes(content["state_dict"]))
    load_weights(model, checkpoint, complete=True)
    for line in feature_differences(content, settings.values):
        print(f"** {line}")
    return model.eval()
