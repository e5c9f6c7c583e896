"""What went wrong where a data set was loaded, in words, from an exception that says little."""

from __future__ import annotations

import ast
import linecache
import os
import traceback
from types import FrameType

from torchreid import data

__all__ = ["explain"]

# What torchreid's data sets, and most others, call the file that they are looking at.
_FILES = ("img_path", "impath", "img_paths", "img_name", "fpath", "path", "file", "filename")


def explain(error: Exception) -> str:
    """The reason of an error from a data set, as one line.

    Args:
        error: What torchreid, or a data set of a user's own, raised.
    """
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    where = _file(frame)
    if isinstance(error, AssertionError) and not str(error):
        return _failed_assertion(frame, line) + (f" in {where}" if where else "")
    if _is_torchreids(frame):
        if isinstance(error, IndexError):  # how torchreid takes a folder without images
            return "no images in the training, query or gallery folder"
        if isinstance(error, AttributeError):  # and a file whose name does not match its pattern
            return "a file name that does not match the data set's pattern" + (f": {where}" if where else "")
    text = " ".join(str(error).split())
    if isinstance(error, (OSError, RuntimeError, ValueError, AssertionError)) and text:
        return text
    place = f"{os.path.basename(frame.f_code.co_filename)}, line {line}"
    return f"{type(error).__name__}{': ' if text else ''}{text} ({place}{', at ' + where if where else ''})"


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


def _failed_assertion(frame: FrameType, line: int) -> str:
    """The condition of an assertion without a message, and the values in it."""
    try:
        (statement,) = ast.parse(linecache.getline(frame.f_code.co_filename, line).strip()).body
    except (SyntaxError, ValueError):
        statement = ast.Pass()
    if not isinstance(statement, ast.Assert):
        return f"AssertionError ({os.path.basename(frame.f_code.co_filename)}, line {line})"
    names = [node.id for node in ast.walk(statement.test) if isinstance(node, ast.Name)]
    values = {name: frame.f_locals[name] for name in names if isinstance(frame.f_locals.get(name), (int, float, str))}
    got = ", ".join(f"{name} = {value!r}" for name, value in values.items())
    return f"{ast.unparse(statement.test)} must hold" + (f", got {got}" if got else "")
