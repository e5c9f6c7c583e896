"""Splits batches between processes: each loads a part of every training batch, and some of the test batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import Sampler

from torchreid_snloss import distributed
from torchreid_snloss.data.batches import loader_like

__all__ = ["Shards", "own_test_batches", "shard_training"]


class Shards(Sampler[list[int]]):
    """A batch sampler that yields this process's part of every batch. All processes draw the same batches.

    The parts are as even as possible without splitting a group, which is the `num_instances` images of an identity. A
    last batch with fewer groups than processes is left out.

    Args:
        batches: A batch sampler with the attributes `sampler`, `batch_size` and `drop_last`.

    Raises:
        ValueError: If a batch has fewer groups than there are processes.
    """

    def __init__(self, batches: Any) -> None:
        self.batches = batches
        self.sampler = batches.sampler
        self._group_size = getattr(batches.sampler, "num_instances", 1)
        self._drawn: list[list[int]] | None = None
        processes = distributed.world_size()
        groups = self._num_groups(batches.batch_size)
        if groups < processes:
            raise ValueError(
                f"a batch of {batches.batch_size} images has {groups} groups of {self._group_size} images, "
                f"too few for {processes} processes"
            )

    def _num_groups(self, num_images: int) -> int:
        return -(-num_images // self._group_size)

    def draw(self) -> None:
        """Draws the batches of the next epoch. Call it while all processes have the same random states."""
        self._drawn = list(self.batches)

    def __len__(self) -> int:
        last = len(self.sampler) % self.batches.batch_size
        left_out = not self.batches.drop_last and 0 < self._num_groups(last) < distributed.world_size()
        return len(self.batches) - left_out

    def __iter__(self) -> Iterator[list[int]]:
        drawn = list(self.batches) if self._drawn is None else self._drawn
        self._drawn = None
        processes, rank = distributed.world_size(), distributed.rank()
        for batch in drawn:
            groups = self._num_groups(len(batch))
            if groups >= processes:
                start, end = (groups * part // processes * self._group_size for part in (rank, rank + 1))
                yield batch[start:end]


def shard_training(loader: Any) -> Any:
    """A copy of the training loader that loads only this process's part of each batch."""
    return loader_like(loader, loader.dataset, batch_sampler=Shards(loader.batch_sampler))


def own_test_batches(loader: Any) -> Any:
    """A copy of a test loader that loads every `world_size`-th batch, starting at the rank of the process."""
    own = list(loader.batch_sampler)[distributed.rank() :: distributed.world_size()]
    return loader_like(loader, loader.dataset, batch_sampler=own)
