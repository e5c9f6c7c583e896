"""TensorBoard's writer, which must not end a run that can't write its events."""

from __future__ import annotations

import functools
from typing import Any

from torch.utils.tensorboard import SummaryWriter

__all__ = ["EventWriter", "NoWriter"]


class NoWriter:
    """Replaces TensorBoard's writer on processes that write nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


class EventWriter:
    """torch's `SummaryWriter`, whose first error is printed in one line and whose later ones are ignored.

    Args:
        folder: The folder of the event file.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._writer: Any = NoWriter()
        self._writer = self._tried(SummaryWriter, log_dir=folder) or self._writer

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._writer, name)
        return functools.partial(self._tried, value) if callable(value) else value

    def _tried(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:  # a full disk, a quota, a file system that is gone: any of TensorBoard's back ends
            print(f"** TensorBoard can't write to {self._folder!r}: {error}; the run goes on without its events")
            self._writer = NoWriter()
            return None
