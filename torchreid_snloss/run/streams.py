"""Text streams that outlive what they write to: a closed pipe, a full disk, letters that a terminal can't show."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import IO, Any, TextIO, cast

__all__ = ["SafeStream", "Tee", "safe_standard_streams"]


class SafeStream:
    """A text stream whose writing never raises. What it doesn't define is the stream's own.

    Args:
        stream: The stream; None for one that the process does not have.
        tell: Called once, with the error, when a write fails.
    """

    def __init__(self, stream: IO[str] | None, tell: Callable[[Exception], None] | None = None) -> None:
        self._stream = stream
        self._tell = tell

    def write(self, text: str) -> int:
        """Writes as much as the stream takes, and returns the length of the text."""
        if self._stream is not None:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                with self._told():
                    self._stream.write(text.encode("ascii", "backslashreplace").decode())
            except (OSError, ValueError) as error:  # ValueError: the stream is closed
                self._failed(error)
        return len(text)

    def flush(self) -> None:
        """Flushes the stream if it can be."""
        if self._stream is not None:
            with self._told():
                self._stream.flush()

    def isatty(self) -> bool:
        """Whether the stream is a terminal that can still be written to."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return self._stream is not None and self._stream.isatty()
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        tell, self._tell = self._tell, None
        if tell is not None:
            tell(error)


class Tee:
    """Writes to several streams, line by line, so that all of them show how far a run is."""

    def __init__(self, *streams: SafeStream) -> None:
        self._streams = streams

    def write(self, text: str) -> int:
        for stream in self._streams:
            stream.write(text)
        if "\n" in text:
            self.flush()
        return len(text)

    def flush(self) -> None:
        for stream in self._streams:
            stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._streams[0], name)


@contextlib.contextmanager
def safe_standard_streams() -> Iterator[None]:
    """Within it printing never raises, and the process can end without an error of its standard streams.

    A standard stream that was closed from the start is opened on the null device, so that no file takes its number.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    out, err = sys.stdout, sys.stderr
    with (
        contextlib.redirect_stdout(cast(TextIO, SafeStream(out))),
        contextlib.redirect_stderr(cast(TextIO, SafeStream(err))),
    ):
        try:
            yield
        finally:
            for stream in (out, err):
                _finish(stream)


def _finish(stream: TextIO | None) -> None:
    """Flushes a stream; what can't be written is dropped, or Python would fail at its exit."""
    if stream is None or stream.closed:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
            stream.flush()
