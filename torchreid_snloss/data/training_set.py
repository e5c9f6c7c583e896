"""Changes to the training set of a data manager: a stable order, fewer identities, wrong labels, outliers."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchreid import data

from torchreid_snloss.data.batches import loader_like
from torchreid_snloss.data.fingerprint import relative_names
from torchreid_snloss.data.items import files_of
from torchreid_snloss.data.readable import read_image
from torchreid_snloss.progress import progress

__all__ = ["add_label_noise", "add_outliers", "keep_fraction", "set_training_items", "stable_order"]

# An item of a torchreid data set: (path of the image or paths of the tracklet, identity, camera, data set).
Item = tuple[Any, ...]

_LONGEST_NAME = 200  # bytes; file systems allow 255, with the numbers and the ending
_PATCH_SIZE = 0.25  # as a share of the height and the width of the image


def set_training_items(datamanager: Any, items: Sequence[Item], **sampler_options: Any) -> None:
    """Replaces the training set of a data manager, and builds its training loader and sampler again.

    The identities are relabelled from 0 in their order.

    Args:
        datamanager: A data manager of torchreid.
        items: The new items, which are items of the old training set, or changed ones.
        **sampler_options: The options of the training sampler, such as `train_sampler`, `batch_size` and
            `num_instances`.
    """
    loader = datamanager.train_loader
    labels = {pid: label for label, pid in enumerate(sorted({item[1] for item in items}))}
    training = copy.copy(loader.dataset)
    training.train = [(item[0], labels[item[1]], *item[2:]) for item in items]
    training.data = training.train
    training.num_train_pids = len(labels)
    datamanager._num_train_pids = len(labels)
    sampler = data.sampler.build_train_sampler(training.train, **sampler_options)
    datamanager.train_loader = loader_like(
        loader, training, sampler=sampler, batch_size=loader.batch_size, drop_last=True
    )


def stable_order(items: Sequence[Item]) -> list[Item]:
    """Sorts training items by data set and file name, and numbers the identities in that order.

    torchreid's data sets list files in the order of the file system, which differs from one copy of the data to the
    next, and some number the identities by it. The frames of a tracklet stay in their order.

    Args:
        items: The items of a training set.
    """
    names = relative_names(items)
    labels: dict[Any, int] = {}
    ordered = []
    for index in sorted(range(len(items)), key=lambda index: (items[index][3], sorted(names[index]), items[index][2])):
        frames, pid, *rest = items[index]
        ordered.append((frames, labels.setdefault(pid, len(labels)), *rest))
    return ordered


def keep_fraction(items: Sequence[Item], fraction: float, seed: int) -> list[Item]:
    """Keeps all images of some of the identities, drawn at random.

    Args:
        items: The items of a training set.
        fraction: The share of the identities to keep, above 0 and at most 1.
        seed: The seed of the random choice.

    Raises:
        ValueError: If fewer than 2 identities would be kept.
    """
    pids = sorted({item[1] for item in items})
    number = round(fraction * len(pids))
    if number < 2:
        raise ValueError(
            f"data.train_fraction {fraction} would keep {number} of {len(pids)} training identities, "
            "but at least 2 are needed"
        )
    kept = set(np.random.default_rng([seed, 2]).permutation(pids)[:number].tolist())
    print(f"=> Training on {number} of {len(pids)} identities")
    return [item for item in items if item[1] in kept]


def add_label_noise(items: Sequence[Item], share: float, seed: int) -> list[Item]:
    """Gives some of the images the label of another identity. All other identities are equally probable.

    Each identity keeps at least one of its images.

    Args:
        items: The items of a training set.
        share: The share of the images to give another label, in [0, 1).
        seed: The seed of the random choice.

    Raises:
        ValueError: If there are too few images or only one identity.
    """
    rng = np.random.default_rng([seed, 3])
    noisy = list(items)
    pids = sorted({item[1] for item in items})
    number, order = round(share * len(items)), rng.permutation(len(items)).tolist()
    kept = {items[index][1]: index for index in reversed(order)}  # one image of each identity
    changeable = [index for index in order if kept[items[index][1]] != index]
    if len(pids) < 2:
        raise ValueError(f"data.label_noise {share} needs at least 2 training identities, got {len(pids)}")
    if number > len(changeable):
        raise ValueError(
            f"data.label_noise {share} would change the labels of {number} of {len(items)} images, "
            f"but at most {len(changeable)} can change: each of the {len(pids)} identities keeps one image"
        )
    for index in changeable[:number]:
        path, pid, *rest = items[index]
        other = pids.index(pid) + 1 + int(rng.integers(len(pids) - 1))
        noisy[index] = (path, pids[other % len(pids)], *rest)
    print(f"=> {number} of {len(items)} training images have the label of another identity")
    return noisy


def add_outliers(items: Sequence[Item], share: float, seed: int, folder: str | Path) -> list[Item]:
    """Replaces some of the images by a small patch of the same image, as from a detector that failed.

    The patch has a quarter of the height and the width of the image, and is resized to the size of the image.

    Args:
        items: The items of a training set. All frames of a chosen tracklet are replaced.
        share: The share of the items to replace, in [0, 1].
        seed: The seed of the random choice.
        folder: The folder to write the patches to.

    Raises:
        UnreadableImageError: If an image can't be read.
        OSError: If the folder can't be written to.
    """
    rng = np.random.default_rng([seed, 4])
    replaced = list(items)
    number = round(share * len(items))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = rng.permutation(len(items))[:number].tolist()
    for index in progress("outliers", chosen, "image", number):
        frames, *rest = items[index]
        paths = files_of(items[index])
        corner = rng.random(2)
        patches = []
        for frame, path in enumerate(paths):
            name = Path(path).stem
            while len(os.fsencode(name)) > _LONGEST_NAME:  # the numbers in front tell it from others
                name = name[:-1]
            patches.append(str(folder / f"{index:06d}_{frame:02d}_{name}.png"))
            _patch(read_image(path), corner).save(patches[-1])
        replaced[index] = (patches[0] if isinstance(frames, str) else tuple(patches), *rest)
    print(f"=> {number} of {len(items)} training images are outliers, in {folder}")
    return replaced


def _patch(image: Image.Image, corner: Any) -> Image.Image:
    width, height = (max(1, round(side * _PATCH_SIZE)) for side in image.size)
    left, top = int(corner[0] * (image.width - width)), int(corner[1] * (image.height - height))
    return image.crop((left, top, left + width, top + height)).resize(image.size, Image.Resampling.BICUBIC)
