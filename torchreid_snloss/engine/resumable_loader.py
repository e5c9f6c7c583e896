"""The training loader: batches that depend only on the run's seed, also when resuming in the middle of an epoch."""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torchreid_snloss import distributed
from torchreid_snloss.data.batches import BatchLoader
from torchreid_snloss.data.fingerprint import describe_batches
from torchreid_snloss.data.shards import Shards
from torchreid_snloss.data.workers import batches_of
from torchreid_snloss.engine.random_state import seed_generators

__all__ = ["ResumableLoader"]


class ResumableLoader:
    """A training loader that can skip the first batches of an epoch, and that calls a function after each step.

    All other attributes are those of the wrapped loader.

    Args:
        loader: the data manager's training loader, or a process's share of it.
        after_step: called with the number of a batch, counted from 1, after torchreid's loop has trained and logged it.

    Attributes:
        loader: the wrapped loader.
        skipped: how many batches are skipped in the current epoch.
    """

    def __init__(self, loader: Any, after_step: Callable[[int], None]) -> None:
        self.loader = loader
        self.skipped = 0
        self._after_step = after_step
        self._before_first: Callable[[], bool] | None = None
        self._seeds = (0, 0)

    @property
    def batch_size(self) -> int:
        """The number of images or tracklets in a global batch; 1 if the loader doesn't have it."""
        batches = self.loader.batch_sampler
        return getattr(batches.batches if isinstance(batches, Shards) else batches, "batch_size", 1)

    @property
    def sampler(self) -> Any:
        """The sampler of the batches of all processes."""
        batches = self.loader.batch_sampler
        return batches.sampler if isinstance(batches, Shards) else self.loader.sampler

    @functools.cached_property
    def description(self) -> dict[str, Any]:
        """What its batches follow from, next to the seed."""
        return describe_batches(self.loader, self.batch_size, self.sampler)

    def start_epoch(self, seed: int, epoch: int, skip: int, restore_random_states: Callable[[], bool]) -> None:
        """Seeds all generators for an epoch; with several processes, each then also uses its rank as part of the seed.

        Args:
            seed: the seed of the run.
            epoch: the number of the epoch.
            skip: how many batches to skip because an earlier run has trained them.
            restore_random_states: called after the skipped batches, just before the next batch is drawn. It restores
                the random states of the earlier run at that point, and returns whether there were any.
        """
        batches, sampler = self.loader.batch_sampler, self.sampler
        seed_generators(seed, epoch)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        if isinstance(self.loader, BatchLoader):
            self.loader.start_epoch(seed, epoch)
        if isinstance(batches, Shards):
            batches.draw()  # while all processes have the same random states
            seed_generators(seed, epoch, distributed.rank())
        self._seeds, self.skipped, self._before_first = (seed, epoch), skip, restore_random_states

    def end_epoch(self) -> None:
        """Stops skipping batches."""
        self.skipped, self._before_first = 0, None

    @contextlib.contextmanager
    def ending_workers(self) -> Iterator[None]:
        """Ends persistent workers on exit, also after an error."""
        try:
            yield
        finally:
            if isinstance(self.loader, BatchLoader):
                self.loader.end_workers()

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # of a copy that has no attributes yet
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        batches = batches_of(iter(self.loader))  # torch sets its handler of SIGCHLD here
        with _deaths_told_by_the_loader():
            yield from self._batches(batches)

    def _batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        for number, data in enumerate(batches, start=1):
            if number > self.skipped:
                yield data
                self._after_step(number)
            elif number == self.skipped and self._before_first is not None:
                restored = self._before_first()
                if restored and distributed.world_size() > 1:  # the restored states are those of one process
                    seed_generators(*self._seeds, distributed.rank(), number)


@contextlib.contextmanager
def _deaths_told_by_the_loader() -> Iterator[None]:
    """Within it a worker's death is told when the next batch is drawn.

    torch's handler of SIGCHLD raises wherever the process is, such as in the middle of a change of the weights.
    """
    number = getattr(signal, "SIGCHLD", None)  # not on Windows
    if number is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(number)
    signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(number, handler)
