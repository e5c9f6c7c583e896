"""Whether a run can write what it will write, before it trains."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from torchreid_snloss.checkpoint.atomic import UNFINISHED
from torchreid_snloss.checkpoint.names import model_folder
from torchreid_snloss.config import ConfigError
from torchreid_snloss.settings import Settings

__all__ = ["check_replaceable", "check_run_writable", "checkpoint_size"]

_UNKNOWN = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)  # the file system can't reserve room


def check_run_writable(settings: Settings, size: int) -> None:
    """Tries to write to the folders of a run's checkpoints, record, ranked lists and features.

    Args:
        settings: The run's settings.
        size: How many bytes a checkpoint has at least; 0 for a run that writes none.

    Raises:
        ConfigError: If a file can't be written, that of `test.features` among them, or the disk or a limit has no
            room for a checkpoint.
    """
    folder = Path(settings.save_dir)
    try:
        if not settings.evaluate:
            _check_folder(model_folder(folder), size)
            _check_names(model_folder(folder).glob("model*.pth.tar*"))
            if settings.values["train.record"]:
                _check_folder(folder / "record")
                _check_names((folder / "record").glob("*"))
        if settings.visrank:
            for name in settings.targets:
                _check_folder(folder / f"visrank_{name}")
    except OSError as error:
        raise ConfigError(f"data.save_dir {settings.save_dir!r} can't be written to: {error}") from error
    if settings.features:
        path = Path(settings.features)
        try:
            if not path.is_file():
                check_replaceable(path.parent, [path.name])
        except OSError as error:
            raise ConfigError(f"test.features {settings.features!r} can't be written: {error}") from error


def check_replaceable(folder: str | Path, names: Sequence[str]) -> None:
    """Checks that files can be written to a folder, which is created if needed.

    Args:
        folder: The folder.
        names: The names of the files.

    Raises:
        OSError: If they can't.
    """
    _check_folder(Path(folder))
    _check_names(Path(folder) / name for name in names)


def checkpoint_size(model: nn.Module, optimizer: Any) -> int:
    """How many bytes a checkpoint has at least: the weights, and what the optimizer keeps for each of them."""
    weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    kept = 0
    for group in optimizer.param_groups:
        values = len(group.get("betas", ())) + bool(group.get("amsgrad")) + bool(group.get("momentum"))
        kept += values * sum(value.numel() * value.element_size() for value in group["params"])
    return int(weights + kept)


def _check_folder(folder: Path, size: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(prefix=f"{UNFINISHED}test-", dir=folder) as file:
        file.write(b"0")
        file.flush()
        if size and hasattr(os, "posix_fallocate"):  # not on Windows and macOS
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno not in _UNKNOWN:
                    raise OSError(
                        error.errno, f"{error.strerror}, for a checkpoint of {size / 2**20:.0f} MiB", str(folder)
                    ) from error


def _check_names(paths: Any) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(path)  # raises for a name that is too long
        if path.is_dir():
            raise IsADirectoryError(f"{str(path)!r} is a directory")
        if path.exists() and not path.is_file():  # such as a pipe, or a device that can be read without an end
            raise OSError(f"{str(path)!r} is not a regular file")
