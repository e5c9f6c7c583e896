"""What each of several processes loads: its part of a training batch, its share of the batches of a test."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Sampler

from torchreid_snloss import distributed

__all__ = ["Shards", "own_test_batches", "shard_training"]


class Shards(Sampler[list[int]]):
    """This process's part of every batch of a sampler that all processes have alike.

    The parts are as even as whole identities allow: the ``num_instances`` images of one stay together. A last batch
    with fewer identities than there are processes is left out.

    Args:
        batches: a batch sampler, with ``sampler``, ``batch_size`` and ``drop_last``.

    Raises:
        ValueError: if a batch has fewer identities than there are processes.
    """

    def __init__(self, batches: Any) -> None:
        self.batches = batches
        self.sampler = batches.sampler
        self._together = getattr(batches.sampler, "num_instances", 1)
        self._drawn: list[list[int]] | None = None
        processes = distributed.world_size()
        if self._groups(batches.batch_size) < processes:
            raise ValueError(
                f"a batch of {batches.batch_size} images has {self._groups(batches.batch_size)} groups of "
                f"{self._together} that stay together, too few for {processes} processes"
            )

    def _groups(self, images: int) -> int:
        return -(-images // self._together)

    def draw(self) -> None:
        """Draws the next epoch, while the random states of all processes are the same."""
        self._drawn = list(self.batches)

    def __len__(self) -> int:
        last = len(self.sampler) % self.batches.batch_size
        left_out = not self.batches.drop_last and 0 < self._groups(last) < distributed.world_size()
        return len(self.batches) - left_out

    def __iter__(self) -> Iterator[list[int]]:
        drawn = list(self.batches) if self._drawn is None else self._drawn
        self._drawn = None
        processes, rank = distributed.world_size(), distributed.rank()
        for batch in drawn:
            groups = self._groups(len(batch))
            if groups >= processes:
                first, end = (groups * part // processes * self._together for part in (rank, rank + 1))
                yield batch[first:end]


def shard_training(loader: Any) -> Any:
    """A loader of this process's part of each training batch."""
    return _with_batches(loader, Shards(loader.batch_sampler))


def own_test_batches(loader: Any) -> Any:
    """A loader of every ``world_size``-th batch of a test, from the process's rank on; batches stay as they are."""
    return _with_batches(loader, list(loader.batch_sampler)[distributed.rank() :: distributed.world_size()])


def _with_batches(loader: Any, batches: Iterable[list[int]]) -> Any:
    kept = ("num_workers", "collate_fn", "pin_memory", "worker_init_fn", "timeout", "persistent_workers")
    options = {name: getattr(loader, name) for name in (*kept, "prefetch_factor", "multiprocessing_context")}
    return DataLoader(loader.dataset, batch_sampler=batches, **options)
