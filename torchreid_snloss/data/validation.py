"""Identities that are held out of training, by which a checkpoint or the values of a tuning are chosen."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from torchreid_snloss.data.batches import loader_like
from torchreid_snloss.data.decoded import DecodedDataset
from torchreid_snloss.data.training_set import set_training_items

__all__ = ["VALIDATION", "hold_out"]

VALIDATION = "validation"
"""The name under which the held-out identities are evaluated."""


def hold_out(
    datamanager: Any, fraction: float, seed: int, alone: bool = False, fold: int = 0, **sampler_options: Any
) -> None:
    """Moves some training identities of a data manager to a validation set, which is evaluated like a test set.

    All images of the held-out identities are queries, and all are in the gallery: a choice by few queries would be left
    to chance.

    Args:
        datamanager: A data manager of torchreid.
        fraction: The share of the identities to hold out, between 0 and 1.
        seed: The seed of the random choice.
        alone: Whether the validation set replaces the test sets, so that nothing is evaluated on them.
        fold: Which share of the identities, in their random order, is held out. The shares are disjoint, and for a
            fraction of 1 / n the first n of them hold all identities.
        **sampler_options: The options of the training sampler, such as `train_sampler`, `batch_size` and
            `num_instances`, because the training loader is built again.

    Raises:
        ValueError: If no identity would be held out, fewer than two would be kept for training, or a test set has the
            name of the validation set.
    """
    if VALIDATION in datamanager.test_loader:
        raise ValueError(
            f"data.val_fraction {fraction} evaluates held-out identities under the name {VALIDATION!r}, but a test set "
            "has that name: register it under another name"
        )
    dataset = datamanager.train_loader.dataset
    pids = sorted({item[1] for item in dataset.train})
    first, end = (round(shares * fraction * len(pids)) for shares in (fold, fold + 1))
    held_out = set(np.random.default_rng([seed, 1]).permutation(pids)[first:end].tolist())
    number = len(held_out)
    if not 0 < number < len(pids) - 1:
        raise ValueError(
            f"data.val_fraction {fraction}{f' and data.val_fold {fold}' if fold else ''} would hold out {number} of "
            f"{len(pids)} training identities, but at least 1 must be held out and 2 kept"
        )
    set_training_items(datamanager, [item for item in dataset.train if item[1] not in held_out], **sampler_options)

    images = [item for item in dataset.train if item[1] in held_out]
    splits = {"query": images, "gallery": images}
    any_test_loader = next(iter(datamanager.test_loader.values()))["query"]
    loaders = {}
    for mode, items in splits.items():
        split = _split_of(dataset, mode, items, any_test_loader.dataset)
        loaders[mode] = loader_like(any_test_loader, split, batch_size=any_test_loader.batch_size)
    # The validation set comes first, because torchreid's test() returns the rank-1 of the last test set.
    datamanager.test_loader = {VALIDATION: loaders, **({} if alone else datamanager.test_loader)}
    datamanager.test_dataset = {VALIDATION: splits, **({} if alone else datamanager.test_dataset)}
    purpose = "be tested on" if alone else "choose the best checkpoint"
    print(f"=> {number} of {len(pids)} training identities are held out to {purpose}{f', fold {fold}' if fold else ''}")


def _split_of(dataset: Any, mode: str, items: list[Any], tested: Any) -> Any:
    """Training items, read as by their own class, which may prepare its images, and transformed as test images are."""
    split = copy.copy(dataset.dataset if isinstance(dataset, DecodedDataset) else dataset)
    split.mode, split.data, split.k_tfm = mode, items, 1
    if isinstance(tested, DecodedDataset):
        return tested.of(split)
    split.transform = tested.transform
    return split
