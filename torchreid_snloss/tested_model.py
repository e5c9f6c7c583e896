"""The model of a test: which checkpoint it comes from, and what is said where the config differs from it."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from torchreid_snloss.build import load_model
from torchreid_snloss.checkpoint import (
    load_checkpoint,
    model_folder,
    newest_checkpoint,
    num_classes,
    put_weights,
    settings_of,
)
from torchreid_snloss.checkpoint.pretrained import checked_downloads, random_layers
from torchreid_snloss.config import ConfigError
from torchreid_snloss.engine.differences import feature_differences, split_differences
from torchreid_snloss.settings import Settings

__all__ = ["checkpoint_to_test", "load_tested_model"]


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


def load_tested_model(settings: Settings, checkpoint: Path | str, may_be_random: bool = True) -> nn.Module:
    """Builds the model of a test, on the CPU, in evaluation mode. A line names its weights if no checkpoint is given.

    Another line is printed for each setting by which the features differ from those that the training tested, or by
    which people may be tested on who were trained on.

    Args:
        settings: the settings of the test.
        checkpoint: what `checkpoint_to_test` returned.
        may_be_random: whether a model without a checkpoint may have layers with random weights.

    Raises:
        ConfigError: if the model can't be built, or has random weights that it may not have.
        CheckpointError: if the checkpoint can't be read, or is that of another model.
    """
    if not checkpoint:
        with checked_downloads() as read_files:
            model = load_model(settings, num_classes=1).eval()
        random = random_layers(model, read_files)
        is_torchreids = type(getattr(model, "base", model)).__module__.startswith("torchreid.")
        if settings.pretrained and not is_torchreids and not read_files:  # its weights are read in a way of its own
            random = [name for name in random if name.startswith("embedding.")]
        if random and not may_be_random:
            raise ConfigError(
                f"the model has no trained weights, but random ones in {len(random)} layers, {random[0]} among them: "
                "name a checkpoint in model.load_weights or model.resume"
            )
        weights = "random weights" if random else "its pretrained weights"
        if random and settings.pretrained:
            weights += f" in {len(random)} layers, {random[0]} among them"
        print(f"** The config names no checkpoint: {settings.model_name} has {weights}")
        return model
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
