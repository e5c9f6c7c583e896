"""The identity sampler: P identities x K images a batch, exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

__all__ = ["IdentitySampler"]


class IdentitySampler(Sampler[int]):
    """Batches of P = ``batch_size // num_instances`` distinct identities with K = ``num_instances`` images each.

    How an epoch is made:

    1. Each identity's images are shuffled and cut into groups of K. Images left over sit this epoch out; others are
       left over in the next.
    2. There are as many batches as these groups fill with distinct identities, and never fewer than it takes to show
       every identity once. Groups too many are left out, of identities that have several; groups too few are drawn
       again, from the images left over first.
    3. The groups are dealt to the batches at random, no identity twice into one batch.

    Corner cases: an identity with fewer than K images repeats each of them as often, give or take one, so as few
    repeats as possible; an identity with very many images has at most one group a batch.

    ``len(sampler)`` is exactly the number of indices an epoch gives, a multiple of the batch size, and the same for
    each epoch. An epoch depends on the data, ``seed`` and the epoch's number only. The number goes up by one each time
    the sampler is iterated; :meth:`set_epoch` sets it, as when training is resumed.

    Args:
        data_source: torchreid's training tuples ``(img_path(s), pid, camid, ...)``.
        batch_size: P x K images.
        num_instances: K, images of an identity in a batch.
        seed: of the sampling; None: torch's initial seed, so that torchreid's ``set_random_seed`` sets it.

    Attributes:
        num_short_pids: identities with fewer than K images.

    Raises:
        ValueError: for a ``batch_size`` that is no multiple of ``num_instances`` or holds fewer than two identities,
            or a ``data_source`` with fewer identities than a batch.
    """

    def __init__(
        self,
        data_source: Sequence[tuple[Any, ...]],
        batch_size: int,
        num_instances: int,
        seed: int | None = None,
    ) -> None:
        if num_instances < 1 or batch_size % num_instances != 0:
            raise ValueError(
                f"batch_size must be a multiple of num_instances, got batch_size={batch_size} and "
                f"num_instances={num_instances}"
            )
        self.num_pids_per_batch = batch_size // num_instances
        if self.num_pids_per_batch < 2:
            raise ValueError(
                f"a batch must hold at least two identities, got batch_size={batch_size} and "
                f"num_instances={num_instances}"
            )
        pids = np.asarray([item[1] for item in data_source])
        _, self._identity, self._sizes = np.unique(pids, return_inverse=True, return_counts=True)
        if len(self._sizes) < self.num_pids_per_batch:
            raise ValueError(
                f"a batch of batch_size={batch_size} and num_instances={num_instances} holds "
                f"{self.num_pids_per_batch} identities, but the training set has only {len(self._sizes)}"
            )
        self.num_instances = num_instances
        self.num_short_pids = int((self._sizes < num_instances).sum())
        self.seed = int(torch.initial_seed() if seed is None else seed) % (1 << 64)
        self.epoch = 0
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._groups = np.maximum(self._sizes // num_instances, 1)
        self._num_batches = _count_batches(self._groups, self.num_pids_per_batch)

    def __len__(self) -> int:
        return self._num_batches * self.num_pids_per_batch * self.num_instances

    def set_epoch(self, epoch: int) -> None:
        """Sets the number of the epoch that the next iteration gives, counted from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        self.epoch += 1
        return iter(self._sample(rng).ravel().tolist())

    def _sample(self, rng: np.random.Generator) -> np.ndarray:
        """One epoch: (batches, P, K) indices into the data."""
        # All groups, one identity after the other, the identities in random order.
        order = rng.permutation(len(self._sizes))
        counts = self._group_counts(rng)[order]
        identity = np.repeat(order, counts)
        group = np.arange(len(identity)) - np.repeat(np.cumsum(counts) - counts, counts)

        # Identities' images in random order; an identity with too few goes round again.
        shuffled = np.argsort(self._identity + rng.random(len(self._identity)))  # a tenth of lexsort's time
        position = group[:, None] * self.num_instances + np.arange(self.num_instances)
        images = shuffled[self._starts[identity, None] + position % self._sizes[identity, None]]

        dealt = np.empty((self._num_batches, self.num_pids_per_batch, self.num_instances), dtype=images.dtype)
        columns = identity.reshape(self.num_pids_per_batch, self._num_batches)
        for column, batches in enumerate(_deal(columns, rng)):
            dealt[batches, column] = images[column * self._num_batches :][: self._num_batches]
        return dealt

    def _group_counts(self, rng: np.random.Generator) -> np.ndarray:
        """How many groups each identity gives in an epoch: at least 1, at most one a batch, and all batches full."""
        counts = np.minimum(self._groups, self._num_batches)
        surplus = int(counts.sum()) - self._num_batches * self.num_pids_per_batch
        if surplus > 0:
            spare = np.repeat(np.arange(len(counts)), counts - 1)
            left_out = rng.choice(spare, surplus, replace=False)
            counts = counts - np.bincount(left_out, minlength=len(counts))
        elif surplus < 0:  # fewer than P, and always as many identities that have room for one more
            counts[rng.choice(np.flatnonzero(counts < self._num_batches), -surplus, replace=False)] += 1
        return counts


def _count_batches(groups: np.ndarray, num_pids_per_batch: int) -> int:
    """The most batches that the groups fill with distinct identities, but enough to show every identity."""
    fits, too_many = 1, int(groups.sum()) // num_pids_per_batch + 1
    while too_many - fits > 1:
        batches = (fits + too_many) // 2
        if np.minimum(groups, batches).sum() >= batches * num_pids_per_batch:
            fits = batches
        else:
            too_many = batches
    return max(fits, -(-len(groups) // num_pids_per_batch))


def _deal(columns: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Deals groups to batches at random, no identity twice into one.

    Args:
        columns: (P, batches) identities; those of one identity follow one another, at most ``batches`` of them. So an
            identity stands in one column, or at the end of one and the head of the next.

    Yields:
        for each of the P columns the batches that its groups go to.
    """
    num_batches = columns.shape[1]
    last, taken = -1, np.empty(0, dtype=np.intp)
    for identity in columns:
        batches = rng.permutation(num_batches)
        carried = np.count_nonzero(identity == last)
        if carried:  # the head of this column keeps clear of the batches its identity is in already
            free = batches[~np.isin(batches, taken)]
            rest = rng.permutation(np.concatenate([free[carried:], taken]))
            batches = np.concatenate([free[:carried], rest])
        last = identity[-1]
        taken = batches[identity == last]
        yield batches
