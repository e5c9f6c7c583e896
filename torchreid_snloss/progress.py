"""Progress bars on standard error, where that is a terminal; elsewhere nothing is shown."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, cast

from tqdm import tqdm

from torchreid_snloss import distributed

__all__ = ["above_bars", "progress", "progress_bar"]


def progress_bar(description: str, total: int, unit: str, done: int = 0) -> tqdm[Any]:
    """A bar that is gone when it is done; to be closed, or used in a ``with``.

    Args:
        description: what stands before it.
        total: how many units there are.
        unit: what is counted.
        done: how many are done already.
    """
    shown = distributed.rank() == 0 and _on_a_terminal()
    options: dict[str, Any] = {"leave": False, "dynamic_ncols": True, "file": sys.stderr, "disable": not shown}
    return tqdm(desc=description, total=total, unit=unit, initial=done, **options)


def progress(description: str, items: Iterable[Any], unit: str, total: int) -> Iterator[Any]:
    """Yields the items and shows how far a loop over them is."""
    with progress_bar(description, total, unit) as bar:
        for item in items:
            yield item
            bar.update()


def _on_a_terminal() -> bool:
    """Whether standard error is one; it may be closed, missing, or something of a user's own."""
    stream: Any = sys.stderr
    return hasattr(stream, "isatty") and not getattr(stream, "closed", False) and bool(stream.isatty())


@contextlib.contextmanager
def above_bars() -> Iterator[None]:
    """Within it what is printed stands above the bars, and does not run into them."""
    if not _on_a_terminal():
        yield
        return
    above = _AboveBars(sys.stdout)
    with contextlib.redirect_stdout(cast(TextIO, above)):
        try:
            yield
        finally:
            above.end()


class _AboveBars:
    """Standard output, of which whole lines are written, while the bars are taken off the terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._line = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        lines, newline, self._line = (self._line + text).rpartition("\n")
        if newline:
            with tqdm.external_write_mode(file=sys.stderr):
                self._stream.write(lines + newline)
                self._stream.flush()
        return len(text)

    def end(self) -> None:
        """Writes what no line break has followed yet."""
        self._stream.write(self._line)
        self._line = ""
