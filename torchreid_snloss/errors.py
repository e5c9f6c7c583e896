"""An exception of more than one part of the package, and the words of any, for messages."""

from __future__ import annotations

import ast
import linecache
import os
import traceback
from types import FrameType

__all__ = ["ExportError", "printable", "text_of", "where_raised"]


class ExportError(RuntimeError):
    """A model can't be exported to ONNX, or does not compute there what it computes in torch."""


def text_of(error: BaseException, longest: int | None = None) -> str:
    """The text of an exception on one line.

    Args:
        error: The exception. One without a text gives the condition of its assertion, or the name of its class.
        longest: The most characters of its text. None for all of them.
    """
    text = " ".join(str(error).split())[:longest]
    if text:
        return text
    return (isinstance(error, AssertionError) and _failed_assertion(error)) or type(error).__name__


def printable(text: str, longest: int | None = None) -> str:
    """A text in which what a terminal does not print, such as a line break, is escaped.

    Args:
        text: The text.
        longest: How many characters of it are shown; None for all.
    """
    escaped = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    return escaped if longest is None or len(escaped) <= longest else f"{escaped[: longest - 3]}..."


def where_raised(error: BaseException) -> tuple[FrameType, int] | None:
    """The innermost frame of an exception's traceback and the line in its file; None if it was not raised.

    Frames of Python's import machinery don't count.
    """
    frames = [one for one in traceback.walk_tb(error.__traceback__) if not _is_frozen(one[0])]
    return frames[-1] if frames else None


def _is_frozen(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith("<frozen ")


def _failed_assertion(error: AssertionError) -> str:
    """The condition of an assertion without a message, and the values in it."""
    raised = where_raised(error)
    if raised is None:
        return ""
    frame, line = raised
    file = frame.f_code.co_filename
    try:
        (statement,) = ast.parse(linecache.getline(file, line).strip()).body
    except (SyntaxError, ValueError):  # no source, or an assertion over several lines
        statement = ast.Pass()
    if not isinstance(statement, ast.Assert):
        return f"AssertionError ({os.path.basename(file)}, line {line})"
    names = dict.fromkeys(node.id for node in ast.walk(statement.test) if isinstance(node, ast.Name))
    values = {name: frame.f_locals[name] for name in names if isinstance(frame.f_locals.get(name), (int, float, str))}
    got = ", ".join(f"{name} = {value!r}" for name, value in values.items())
    condition = ast.unparse(statement.test)
    return f"{condition} must hold, got {got}" if got else f"{condition} must hold"
