"""ImageNet weights that torchreid downloads, and keeps in a folder that is not checked again."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from torchreid_snloss.checkpoint.fitting import is_of_classifier
from torchreid_snloss.checkpoint.schema import check_state_dict
from torchreid_snloss.checkpoint.torch_file import CheckpointError, check_torch_file
from torchreid_snloss.errors import text_of

__all__ = ["check_pretrained", "checked_downloads", "random_layers"]


@contextlib.contextmanager
def checked_downloads() -> Iterator[dict[str, Any]]:
    """Checks every file that `torch.load` reads in this context.

    torchreid's models pass the cached file to `torch.load` themselves, so this is the place where its name is known.

    Yields:
        The content of the files that were read, by their names.

    Raises:
        CheckpointError: If a file is damaged or does not hold weights. The message names it and says to delete it.
    """
    read_files: dict[str, Any] = {}
    load = torch.load

    def checked_load(file: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(file, (str, os.PathLike)) or not os.path.exists(file):
            return load(file, *args, **kwargs)
        try:
            check_torch_file(os.fspath(file))
            content = load(file, *args, **kwargs)
            check_state_dict(content)
        except CheckpointError as error:
            raise CheckpointError(f"{error}. {_delete(file)}") from error
        except Exception as error:  # unpickling raises nearly any class
            reason = text_of(error, longest=200)
            raise CheckpointError(f"can't use {str(file)!r}: {reason}. {_delete(file)}") from error
        read_files[os.fspath(file)] = content
        return content

    torch.load = checked_load  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The pretrained weights")  # check_pretrained raises an error instead
            yield read_files
    finally:
        torch.load = load


def check_pretrained(model: nn.Module, read_files: dict[str, Any]) -> None:
    """Checks that the files that a model was built with have layers of the model.

    Raises:
        CheckpointError: If one has none. torchreid goes on without these weights.
    """
    current = model.state_dict()
    for file, content in read_files.items():
        names = {name.removeprefix("module."): value.shape for name, value in content.items()}
        if not any(name in current and current[name].shape == shape for name, shape in names.items()):
            raise CheckpointError(f"{file!r} belongs to another model: none of its layers fits. {_delete(file)}")


def random_layers(model: nn.Module, read_files: dict[str, Any]) -> list[str]:
    """The layers of a new model that its features follow from and that are not from a file, by their values.

    torchreid has no weights for some of its models, and for others none of their last layers.

    Args:
        model: The model.
        read_files: The content of the files that it was built with.
    """
    read: dict[torch.Size, list[torch.Tensor]] = {}
    for content in read_files.values():
        for value in content.values():
            read.setdefault(value.shape, []).append(value)
    buffers = {name.removeprefix("base.") for name, _ in model.named_buffers()}
    constant = {name for name in buffers if not name.endswith(("running_mean", "running_var"))}
    return [
        name
        for name, value in model.state_dict().items()
        if not is_of_classifier(name) and not name.startswith("neck.") and name not in constant
        if not any(torch.equal(value.cpu(), of_file) for of_file in read.get(value.shape, ()))
    ]


def _delete(file: str | os.PathLike[str]) -> str:
    return f"Delete {os.fspath(file)!r}, and it is downloaded again"
