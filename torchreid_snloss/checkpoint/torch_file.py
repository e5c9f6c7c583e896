"""Reading a file that torch has written: only if it is whole, and only the data in it."""

from __future__ import annotations

import contextlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from torchreid_snloss.checkpoint.archive import archive_damage
from torchreid_snloss.errors import printable, text_of

__all__ = ["CheckpointError", "check_torch_file", "peek_torch_file", "read_torch_file"]


class CheckpointError(ValueError):
    """A file is not a checkpoint, is damaged, or belongs to another model."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))  # names in a file may be anything


def read_torch_file(path: str | Path) -> Any:
    """Reads a file of `torch.save` onto the CPU.

    torch does not check the checksums that it writes, so they are checked here. Files without checksums (those of torch
    before 1.6) are read, but a flipped bit in them goes unnoticed.

    Only tensors, plain data and NumPy scalars are unpickled, and files of Python 2 as well. A file that needs anything
    else raises an error, and no code in it runs.

    Args:
        path: The file.

    Raises:
        CheckpointError: If the file is missing, damaged, not written by torch, or needs more than data.
    """
    is_zip = check_torch_file(path)
    try:
        with _numpy_scalars_allowed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of the encoding, though it uses it
            # The encoding is that of Python 2's strings, which are ASCII or the bytes of a NumPy scalar.
            return torch.load(path, map_location="cpu", weights_only=True, encoding="latin1")
    except Exception as error:  # unpickling raises nearly any class
        name = re.search(r"(?:GLOBAL|Unsupported class) (\w+(?:\.\w+)+)", str(error))  # of torch 2.2: the latter
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"{str(path)!r} is a TorchScript model, which holds code; save the state_dict() of the model instead"
            ) from error
        if isinstance(error, pickle.UnpicklingError) and (name or is_zip):
            reason = f"it needs {name[1]}, which could run code" if name else "it holds more than data"
            if name and "numpy" in name[1] and not hasattr(torch.serialization, "safe_globals"):
                reason = "it was saved by one of torchreid's own engines and needs torch 2.5 or newer to load safely"
            raise CheckpointError(f"{str(path)!r} is not a checkpoint that can be loaded safely: {reason}") from error
        raise _damaged(path, text_of(error, longest=200)) from error


def peek_torch_file(path: str | Path) -> Any:
    """Reads a file of `torch.save` without its tensors, whose checksums are then not checked.

    Raises:
        CheckpointError: As `read_torch_file` does.
    """
    try:
        with _numpy_scalars_allowed():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # damaged, or of an old torch, whose files can't be mapped
        return read_torch_file(path)


def check_torch_file(path: str | Path) -> bool:
    """Checks that a file is whole, as far as its format shows it, without unpickling anything.

    Returns:
        Whether the file is a zip archive, as torch writes since 1.6.

    Raises:
        CheckpointError: If the file is missing, damaged, or not written by torch.
    """
    try:
        with open(path, "rb") as stream:
            is_zip, reason = _inspect(stream)
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        raise CheckpointError(f"can't read {str(path)!r}: {getattr(error, 'strerror', None) or error}") from error
    if reason:
        raise _damaged(path, reason)
    return is_zip


def _damaged(path: str | Path, reason: str) -> CheckpointError:
    return CheckpointError(f"can't load {str(path)!r}, which is damaged or not a checkpoint: {reason}")


def _inspect(stream: IO[bytes]) -> tuple[bool, str]:
    """Returns whether the file is a zip archive, and what is wrong with the file, if anything."""
    start = stream.read(64)
    if not start:
        return False, "it is empty"
    if start.startswith(b"PK") or zipfile.is_zipfile(stream):
        return True, archive_damage(stream)
    if start.lstrip().startswith(b"<"):
        return False, "it is a web page"
    if start.startswith(b"version https://git-lfs"):
        return False, "it is a Git LFS pointer instead of the file"
    if not start.startswith(b"\x80") and not stream.name.endswith(".safetensors"):  # no pickle
        return False, "torch did not write it"
    return False, ""


def _numpy_scalars_allowed() -> contextlib.AbstractContextManager[None]:
    """torchreid's own engines store rank-1 as a NumPy scalar, which `torch.load` refuses by default since torch 2.6."""
    if not hasattr(torch.serialization, "safe_globals"):  # torch < 2.5
        return contextlib.nullcontext()
    allowed: list[Any] = [np.dtype, *(type(np.dtype(kind)) for kind in (np.float32, np.float64))]
    allowed += [_scalar_of(core) for core in ("core", "_core")]  # NumPy 1 and 2
    return torch.serialization.safe_globals(allowed)


def _scalar_of(core: str) -> Callable[..., Any]:
    """NumPy's function that makes a scalar, under the name that a file has for it; torch 2.5 takes no pairs of both."""
    scalar = np.float64(0).__reduce__()[0]

    def make(*arguments: Any) -> Any:
        return scalar(*arguments)  # type: ignore[operator]

    make.__module__, make.__name__, make.__qualname__ = f"numpy.{core}.multiarray", "scalar", "scalar"
    return make
