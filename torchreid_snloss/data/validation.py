"""Identities held out of training, to choose the best checkpoint by."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from torchreid_snloss.data.training_set import set_training_items

__all__ = ["VALIDATION", "hold_out"]

VALIDATION = "validation"
"""The name under which the held-out identities are evaluated."""


def hold_out(datamanager: Any, fraction: float, seed: int, **sampler_options: Any) -> None:
    """Moves a share of a data manager's training identities into a validation set that is evaluated like a test set.

    Of each held-out identity the first image under each camera is a query, and all of its images are gallery.

    Args:
        datamanager: torchreid's, with its loaders built.
        fraction: share of the identities, between 0 and 1.
        seed: of the choice.
        **sampler_options: ``train_sampler``, ``batch_size``, ``num_instances`` and so on, as the training loader has
            them: it is built anew.

    Raises:
        ValueError: if no identity would be left on either side.
    """
    dataset = datamanager.train_loader.dataset
    pids = sorted({item[1] for item in dataset.train})
    number = round(fraction * len(pids))
    if not 0 < number < len(pids) - 1:
        raise ValueError(f"data.val_fraction {fraction} of {len(pids)} training identities would be {number}")
    held_out = set(np.random.default_rng([seed, 1]).permutation(pids)[:number].tolist())
    set_training_items(datamanager, [item for item in dataset.train if item[1] not in held_out], **sampler_options)

    gallery = [item for item in dataset.train if item[1] in held_out]
    first_under_camera = {(item[1], item[2], item[3]): item for item in reversed(gallery)}
    splits = {"query": list(first_under_camera.values()), "gallery": gallery}
    any_test_loader = next(iter(datamanager.test_loader.values()))["query"]
    loaders = {}
    for mode, items in splits.items():
        split = copy.copy(any_test_loader.dataset)
        split.data = items
        loaders[mode] = DataLoader(
            split,
            batch_size=any_test_loader.batch_size,
            num_workers=any_test_loader.num_workers,
            pin_memory=any_test_loader.pin_memory,
        )
    # First, so that torchreid's test() still returns the rank-1 of the last real test set.
    datamanager.test_loader = {VALIDATION: loaders, **datamanager.test_loader}
    datamanager.test_dataset = {VALIDATION: splits, **datamanager.test_dataset}
    print(f"=> {number} of {len(pids)} training identities are held out to choose the best checkpoint")
