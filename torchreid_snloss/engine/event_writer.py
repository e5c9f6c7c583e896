"""TensorBoard's writer, which must not end a run that can't write its events."""

from __future__ import annotations

import functools
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from torchreid_snloss import distributed

__all__ = ["EventWriter", "NoWriter", "writer_of_run"]


class NoWriter:
    """Replaces TensorBoard's writer on processes that write nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


class EventWriter:
    """torch's `SummaryWriter`, whose first error is printed in one line and whose later ones are ignored.

    torchreid counts training in batches and tests in epochs; here both count batches, so that their curves have the
    same axis.

    Args:
        folder: The folder of the event file.
        batches: How many batches an epoch has.
    """

    def __init__(self, folder: str, batches: int) -> None:
        self._folder, self._batches = folder, batches
        self._writer: Any = NoWriter()
        self._writer = self._tried(SummaryWriter, log_dir=folder) or self._writer

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._writer, name)
        return functools.partial(self._tried, value) if callable(value) else value

    def add_scalar(
        self, tag: str, scalar_value: Any, global_step: int | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """Adds a value.

        Args:
            tag: Its name, which begins with `Test/` for an evaluation.
            scalar_value: The value.
            global_step: Of an evaluation the number of the epoch, from 0, or -1 before training; otherwise that of the
                batch.
            *args: Further arguments of `SummaryWriter.add_scalar`.
            **kwargs: Its keywords.
        """
        if tag.startswith("Test/") and global_step is not None:
            global_step = (global_step + 1) * self._batches
        self._tried(self._writer.add_scalar, tag, scalar_value, global_step, *args, **kwargs)

    def _tried(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:  # a full disk, a quota, a file system that is gone: any of TensorBoard's back ends
            print(f"** TensorBoard can't write to {self._folder!r}: {error}; the run goes on without its events")
            self._writer = NoWriter()
            return None


def writer_of_run(writer: Any, folder: str, batches: int, testing_only: bool) -> Any:
    """The writer of a run: on rank 0 the engine's own or, for training, a new one; on other ranks one of nothing."""
    if distributed.rank() > 0:
        return NoWriter()
    return EventWriter(folder, batches) if writer is None and not testing_only else writer
