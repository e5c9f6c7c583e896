"""The model of a test: which checkpoint it comes from, and what is said where the config differs from it."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from torchreid_snloss.build import load_model
from torchreid_snloss.checkpoint import (
    find_newest,
    load_checkpoint,
    model_folder,
    num_classes,
    put_weights,
    settings_of,
)
from torchreid_snloss.config import ConfigError
from torchreid_snloss.engine.differences import feature_differences, split_differences
from torchreid_snloss.settings import Settings

__all__ = ["checkpoint_to_test", "has_pretrained_weights", "load_tested_model"]


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
        path = find_newest(folder) or ""
        if not path and not weights:
            raise ConfigError(f"model.resume auto: no checkpoint in {folder}")
        if not path:
            print(f"=> model.resume auto: no checkpoint in {folder}, so that of model.load_weights is used")
    if path and weights:
        print(f"=> model.load_weights {weights} is not used, since model.resume is given")
    return path or weights


def has_pretrained_weights(settings: Settings) -> bool:
    """Whether a model without a checkpoint has weights that are not random, which no `model.embedding` has."""
    return settings.pretrained and not settings.embedding


def load_tested_model(settings: Settings, checkpoint: Path | str) -> nn.Module:
    """Builds the model of a test, on the CPU, in evaluation mode. A line names its weights if no checkpoint is given.

    Another line is printed for each setting by which the features differ from those that the training tested, or by
    which people may be tested on who were trained on.

    Args:
        settings: the settings of the test.
        checkpoint: what `checkpoint_to_test` returned.

    Raises:
        ConfigError: if the model can't be built.
        CheckpointError: if the checkpoint can't be read, or is that of another model.
    """
    if not checkpoint:
        weights = "its pretrained" if has_pretrained_weights(settings) else "random"
        print(f"** The config names no checkpoint: {settings.model_name} has {weights} weights")
        return load_model(settings, num_classes=1).eval()
    content = load_checkpoint(checkpoint)
    before = settings_of(content, checkpoint)
    lines = feature_differences(before, settings.values)
    if settings.evaluate:
        lines += split_differences(before, settings.values)
    for line in lines:
        print(f"=> {line}")
    # All weights are the checkpoint's, so none need be downloaded.
    model = load_model(settings, num_classes(content["state_dict"]), pretrained=False)
    put_weights(model, content, checkpoint, complete=True)
    return model.eval()
