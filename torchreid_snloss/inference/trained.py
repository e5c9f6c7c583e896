"""The trained model that a config names, set up as a test sets it up."""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from torch import Tensor, nn
from torchreid import engine

from torchreid_snloss import device
from torchreid_snloss.checkpoint import atomic_write
from torchreid_snloss.cli import config_options
from torchreid_snloss.config import ConfigError, load_config
from torchreid_snloss.engine import WriteError
from torchreid_snloss.engine.extraction import extract_batch
from torchreid_snloss.run.writable import check_replaceable
from torchreid_snloss.settings import Settings, resolve
from torchreid_snloss.tested_model import checkpoint_to_test, load_tested_model

__all__ = ["TestModel", "check_output", "load_trained_model", "settings_for_test", "write_output"]


def settings_for_test(args: argparse.Namespace, **options: Any) -> Settings:
    """The settings of a test run with the config of a command line.

    Args:
        args: the arguments of `add_config_arguments`.
        **options: values of keys at the top of the config that replace the given ones.

    Raises:
        ConfigError: for an error in the config, and for a process that was started by torchrun.
    """
    if "RANK" in os.environ:
        raise ConfigError("this command runs in one process, which uses all GPUs: start it without torchrun")
    cfg = load_config(args.config_file, config_options(args))
    cfg.test.evaluate = True
    if cfg.data.cache != "off":
        cfg.data.cache = "off"
        print("=> data.cache: off, since this command reads each image once")
    if cfg.test.held_out_only:
        cfg.test.held_out_only = False
        print("=> test.held_out_only: False, since this command trains nothing and holds nobody out")
    if cfg.test.multi_query:
        cfg.test.multi_query = False
        print("=> test.multi_query: False, since this command gives the features of single images")
    cfg.update(options)
    return resolve(cfg)


def load_trained_model(settings: Settings) -> tuple[nn.Module, Path | str]:
    """Builds the model with the weights of `checkpoint_to_test`, or its pretrained ones, as `load_tested_model` does.

    Returns:
        the model and the checkpoint, empty for pretrained weights.

    Raises:
        ConfigError: if weights would be random, or the model can't be built.
        CheckpointError: if the checkpoint can't be read, or is that of another model.
    """
    checkpoint = checkpoint_to_test(settings)
    return load_tested_model(settings, checkpoint, may_be_random=False), checkpoint


def check_output(path: str, ending: str) -> None:
    """Checks that a file can be written. Its folder is created if needed.

    Raises:
        ConfigError: if it can't, or its name has another ending.
    """
    if not path.endswith(ending):
        raise ConfigError(f"--output must end in {ending}, got {path!r}")
    try:
        check_replaceable(Path(path).parent, [Path(path).name])
    except OSError as error:
        raise ConfigError(f"--output {path!r} can't be written: {error}") from error


def write_output(path: str, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes the file of `--output`, whole or not at all.

    Raises:
        WriteError: if it can't be written, as on a full disk.
    """
    try:
        atomic_write(Path(path), write)
    except OSError as error:
        raise WriteError(f"--output {path!r} can't be written: {error.strerror or error}") from error


class TestModel:
    """A model with what `engine.extraction.extract` needs of an engine.

    Args:
        settings: the settings; images go to the GPU, tracklets are pooled and mirror images count as they say.
        model: the model, in evaluation mode.
    """

    __test__ = False  # no class of tests for pytest
    parse_data_for_eval = engine.Engine.parse_data_for_eval
    extract_features: Callable[[Tensor], Tensor]

    def __init__(self, settings: Settings, model: nn.Module) -> None:
        self.use_gpu = settings.use_gpu
        self.model = device.to_device(model, settings.use_gpu)
        if settings.use_gpu and device.count() > 1:
            self.model = nn.DataParallel(self.model)
        self.pooling_method = settings.values["video.pooling_method"]
        self.extract_features = self.model
        if settings.data_type == "video":
            self.extract_features = functools.partial(engine.VideoSoftmaxEngine.extract_features, self)
        self._flip = settings.flip

    def features_of(self, images: Tensor) -> Tensor:
        """The features of a batch, not normalised."""
        return extract_batch(self.extract_features, images, self._flip)
