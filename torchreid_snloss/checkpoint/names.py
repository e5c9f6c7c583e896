"""What checkpoints are called: how a name is made, and how it is read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

__all__ = ["BEST", "checkpoint_name", "model_folder", "named_checkpoints", "own_names"]

BEST = "model-best.pth.tar"
"""The checkpoint of the best evaluation."""

_PREFIX = "model.pth.tar-"
_NAME = re.compile(re.escape(_PREFIX) + r"([0-9]{1,10})(?:\.([0-9]{1,10}))?")


def model_folder(save_dir: str | Path) -> Path:
    """The folder of a run's checkpoints, which torchreid's engines write to as well."""
    return Path(save_dir) / "model"


def checkpoint_name(epoch: int, batch: int = 0) -> str:
    """The name of the checkpoint after `epoch` epochs and, if any, `batch` batches of the next one."""
    return f"{_PREFIX}{epoch}" + (f".{batch}" if batch else "")


def named_checkpoints(folder: str | Path) -> list[tuple[int, int, Path]]:
    """The files in a folder that have a checkpoint's name: epoch, batch and path of each."""
    found = [(_NAME.fullmatch(path.name), path) for path in sorted(Path(folder).glob(f"{_PREFIX}*"))]
    return [(int(name[1]), int(name[2] or 0), path) for name, path in found if name and path.is_file()]


def own_names(names: Sequence[str], epoch: int, batch: int) -> list[str]:
    """Those of the names in a checkpoint that a run can have given to the files it wrote until then.

    Files with these names may be deleted later, so a name that leads to another folder or to another file is not one.

    Args:
        names: the names.
        epoch: the number of epochs that the checkpoint was trained.
        batch: the number of batches of the next epoch.
    """
    found = ((name, _NAME.fullmatch(name)) for name in names)
    return [name for name, match in found if match and (int(match[1]), int(match[2] or 0)) <= (epoch, batch)]
