"""Progress bars on standard error, by tqdm. Nothing is shown if that is not a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, cast

from tqdm import tqdm

from torchreid_snloss import distributed

__all__ = ["above_bars", "progress", "progress_bar"]


def progress_bar(description: str, total: int, unit: str, done: int = 0) -> tqdm[Any]:
    """A progress bar that disappears when it is closed, by `close()` or at the end of a `with` block.

    Only rank 0 shows it.

    Args:
        description: The text before the bar.
        total: The number of units.
        unit: The name of the unit that is counted.
        done: The number of units that are already done.
    """
    shown = distributed.rank() == 0 and _on_a_terminal()
    options: dict[str, Any] = {"leave": False, "dynamic_ncols": True, "file": sys.stderr, "disable": not shown}
    return tqdm(desc=description, total=total, unit=unit, initial=done, **options)


def progress(description: str, items: Iterable[Any], unit: str, total: int) -> Iterator[Any]:
    """Yields the items and shows the progress of the loop over them.

    Args:
        description: The text before the bar.
        items: The items of the loop.
        unit: What an item is called.
        total: The number of items.
    """
    with progress_bar(description, total, unit) as bar:
        for item in items:
            yield item
            bar.update()


def _on_a_terminal() -> bool:
    """Whether standard error is a terminal. It may be closed, None, or an object that a user has put there."""
    stream: Any = sys.stderr
    return hasattr(stream, "isatty") and not getattr(stream, "closed", False) and bool(stream.isatty())


@contextlib.contextmanager
def above_bars() -> Iterator[None]:
    """A context in which printed lines appear above the progress bars and do not mix with them."""
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
    """Standard output that is written in whole lines, with the bars cleared from the terminal meanwhile."""

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
        """Writes the last line if it has no line break."""
        self._stream.write(self._line)
        self._line = ""
