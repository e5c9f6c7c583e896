"""The identity sampler: batches of exactly P identities with K images each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

__all__ = ["IdentitySampler", "check_torchreids_sampler"]


class IdentitySampler(Sampler[int]):
    """Samples batches of P = `batch_size // num_instances` distinct identities with K = `num_instances` images each.

    An epoch is made in three steps:

    1. The images of each identity are shuffled and cut into groups of K. Images that are left over are not used in
       this epoch; the next epoch leaves out others.
    2. The number of batches is the largest that the groups can fill with distinct identities, but at least the number
       that is needed to use every identity once. Surplus groups are dropped from identities that have several groups.
       Missing groups are drawn again, first from the images that are left over.
    3. The groups are distributed over the batches at random. A batch never has two groups of one identity.

    Corner cases: The images of an identity with fewer than K images are repeated as evenly as possible; their numbers
    of repeats differ by at most one. An identity with very many images has at most one group in each batch.

    `len(sampler)` is exactly the number of indices in an epoch, which is a multiple of the batch size and the same in
    each epoch. An epoch depends only on the data, the seed and the number of the epoch. This number is increased by one
    each time the sampler is iterated, and can be set with `set_epoch` when training is resumed.

    Args:
        data_source: The training items of torchreid, `(img_path(s), pid, camid, ...)`.
        batch_size: The number of images in a batch, P x K.
        num_instances: The number of images of each identity in a batch, K.
        seed: The seed of the sampling. None takes torch's initial seed, which torchreid's `set_random_seed` sets.

    Attributes:
        num_short_pids: The number of identities with fewer than K images.

    Raises:
        ValueError: If `batch_size` is not a multiple of `num_instances`, a batch holds fewer than two identities, or
            `data_source` has fewer identities than a batch.
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
        _check_identities(len(self._sizes), batch_size, num_instances)
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
        """Sets the number of the epoch that the next iteration yields.

        Args:
            epoch: The number, counted from 0.
        """
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        self.epoch += 1
        return iter(self._sample(rng).ravel().tolist())

    def _sample(self, rng: np.random.Generator) -> np.ndarray:
        """The indices of one epoch, (batches, P, K)."""
        # Lists all groups, those of an identity next to each other, with the identities in random order.
        order = rng.permutation(len(self._sizes))
        counts = self._group_counts(rng)[order]
        identity = np.repeat(order, counts)
        group = np.arange(len(identity)) - np.repeat(np.cumsum(counts) - counts, counts)

        # The images of each identity in random order. An identity with too few images starts from the first again.
        shuffled = np.argsort(self._identity + rng.random(len(self._identity)))  # ten times as fast as np.lexsort
        position = group[:, None] * self.num_instances + np.arange(self.num_instances)
        images = shuffled[self._starts[identity, None] + position % self._sizes[identity, None]]

        dealt = np.empty((self._num_batches, self.num_pids_per_batch, self.num_instances), dtype=images.dtype)
        columns = identity.reshape(self.num_pids_per_batch, self._num_batches)
        for column, batches in enumerate(_deal(columns, rng)):
            dealt[batches, column] = images[column * self._num_batches :][: self._num_batches]
        return dealt

    def _group_counts(self, rng: np.random.Generator) -> np.ndarray:
        """The number of groups of each identity: at least 1, at most one per batch; together they fill all."""
        counts = np.minimum(self._groups, self._num_batches)
        surplus = int(counts.sum()) - self._num_batches * self.num_pids_per_batch
        if surplus > 0:
            droppable = np.repeat(np.arange(len(counts)), counts - 1)
            dropped = rng.choice(droppable, surplus, replace=False)
            counts = counts - np.bincount(dropped, minlength=len(counts))
        elif surplus < 0:  # fewer than P groups are missing, and enough identities can have one more
            counts[rng.choice(np.flatnonzero(counts < self._num_batches), -surplus, replace=False)] += 1
        return counts


def _count_batches(groups: np.ndarray, num_pids_per_batch: int) -> int:
    """The largest number of batches that the groups can fill with distinct identities, but enough for all identities.

    Args:
        groups: (identities,), the number of groups of each identity.
        num_pids_per_batch: P.
    """
    fits, too_many = 1, int(groups.sum()) // num_pids_per_batch + 1
    while too_many - fits > 1:
        batches = (fits + too_many) // 2
        if np.minimum(groups, batches).sum() >= batches * num_pids_per_batch:
            fits = batches
        else:
            too_many = batches
    return max(fits, -(-len(groups) // num_pids_per_batch))


def _deal(columns: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Distributes groups over batches at random, with no identity twice in a batch.

    Args:
        columns: (P, batches), the identities of the groups. The groups of an identity follow one another, and there
            are at most as many as batches. So an identity is in one column, or at the end of one column and the start
            of the next.

    Yields:
        For each of the P columns the batches that its groups go to, (batches,).
    """
    num_batches = columns.shape[1]
    last, taken = -1, np.empty(0, dtype=np.intp)
    for identity in columns:
        batches = rng.permutation(num_batches)
        carried = np.count_nonzero(identity == last)
        if carried:  # the first identity of this column is already in some batches, which its groups must avoid
            free = batches[~np.isin(batches, taken)]
            rest = rng.permutation(np.concatenate([free[carried:], taken]))
            batches = np.concatenate([free[:carried], rest])
        last = identity[-1]
        taken = batches[identity == last]
        yield batches


def check_torchreids_sampler(
    data_source: Sequence[tuple[Any, ...]],
    train_sampler: str,
    batch_size: int,
    num_instances: int,
    num_cams: int | None,
    num_datasets: int | None,
) -> None:
    """Checks that the training set has what one of torchreid's samplers puts into a batch.

    Args:
        data_source: The training items of torchreid.
        train_sampler: The name of the sampler.
        batch_size: The number of images in a batch.
        num_instances: For `RandomIdentitySampler`, the number of images of an identity in a batch.
        num_cams: For `RandomDomainSampler`, the number of cameras in a batch; None or less than 1: all.
        num_datasets: For `RandomDatasetSampler`, the number of data sets in a batch; None or less than 1: all.

    Raises:
        ValueError: If it has less.
    """
    if train_sampler == "RandomIdentitySampler" and num_instances > 0:
        _check_identities(len({item[1] for item in data_source}), batch_size, num_instances)
    parts = {"RandomDomainSampler": (2, "camera", "num_cams"), "RandomDatasetSampler": (3, "data set", "num_datasets")}
    if train_sampler not in parts:
        return
    part, what, key = parts[train_sampler]
    given = num_cams if key == "num_cams" else num_datasets
    sizes = Counter(item[part] for item in data_source)
    number = given if given is not None and given > 0 else len(sizes)
    if number > len(sizes):
        raise ValueError(f"a batch of {key}={given} needs {given} {what}s, but the training set has only {len(sizes)}")
    if batch_size % number:
        raise ValueError(
            f"batch_size={batch_size} must be a multiple of {number}, the {what}s in a batch ({key}={given})"
        )
    if min(sizes.values()) < batch_size // number:
        raise ValueError(
            f"a batch of batch_size={batch_size} and {key}={given} holds {batch_size // number} images of a {what}, "
            f"but one {what} has only {min(sizes.values())} in the training set"
        )


def _check_identities(number: int, batch_size: int, num_instances: int) -> None:
    needed = batch_size // num_instances
    if number < needed:
        raise ValueError(
            f"a batch of batch_size={batch_size} and num_instances={num_instances} holds {needed} identities, but the "
            f"training set has only {number}"
        )
