"""What went wrong where a data set was loaded, in words, from an exception that says little."""

from __future__ import annotations

import os
from types import FrameType

from torchreid import data

from torchreid_snloss.errors import text_of, where_raised

__all__ = ["explain"]

# What torchreid's data sets, and most others, call the file that they are looking at.
_FILES = ("img_path", "impath", "img_paths", "img_name", "fpath", "path", "file", "filename")


def explain(error: BaseException) -> str:
    """The reason of an error from a data set, on one line.

    Args:
        error: What torchreid, or a data set of a user's own, raised.
    """
    text, raised = text_of(error), where_raised(error)
    if raised is None:
        return text
    frame, line = raised
    file = _file(frame)
    if isinstance(error, AssertionError) and not str(error):
        return text + (f" in {file}" if file else "")
    if _is_torchreids(frame):
        if isinstance(error, IndexError):  # how torchreid takes a folder without images
            return "no images in the training, query or gallery folder"
        if isinstance(error, AttributeError):  # and a file whose name does not match its pattern
            return "a file name that does not match the data set's pattern" + (f": {file}" if file else "")
    if isinstance(error, (OSError, RuntimeError, ValueError, AssertionError)) and str(error):
        return text
    name = type(error).__name__
    place = f"{os.path.basename(frame.f_code.co_filename)}, line {line}" + (f", at {file}" if file else "")
    return (name if text == name else f"{name}: {text}") + f" ({place})"


def _is_torchreids(frame: FrameType) -> bool:
    package = data.datasets.__name__
    return f"{frame.f_globals.get('__name__', '')}.".startswith(f"{package}.")


def _file(frame: FrameType) -> str:
    for name in _FILES:
        value = frame.f_locals.get(name)
        if isinstance(value, (list, tuple)) and value:
            value = value[0]
        if isinstance(value, (str, os.PathLike)):
            return os.fspath(value)
    return ""
