"""Other training sets made of a data manager's: fewer identities, wrong labels, outliers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader
from torchreid import data

from torchreid_snloss.data.readable import read_image
from torchreid_snloss.progress import progress

__all__ = ["add_label_noise", "add_outliers", "keep_fraction", "set_training_items"]

# (path or tracklet's paths, identity, camera, data set), as torchreid's data sets hold an image.
Item = tuple[Any, ...]

_PATCH = 0.25  # of the image's height and width


def set_training_items(datamanager: Any, items: Sequence[Item], **sampler_options: Any) -> None:
    """Trains on other items: identities are numbered anew, in their order, and the loader and its sampler built anew.

    Args:
        datamanager: torchreid's, with its loaders built.
        items: of its training set.
        **sampler_options: ``train_sampler``, ``batch_size``, ``num_instances`` and so on, as the loader has them.
    """
    loader = datamanager.train_loader
    labels = {pid: label for label, pid in enumerate(sorted({item[1] for item in items}))}
    training = copy.copy(loader.dataset)
    training.train = [(item[0], labels[item[1]], *item[2:]) for item in items]
    training.data = training.train
    training.num_train_pids = len(labels)
    datamanager._num_train_pids = len(labels)
    datamanager.train_loader = DataLoader(
        training,
        sampler=data.sampler.build_train_sampler(training.train, **sampler_options),
        batch_size=loader.batch_size,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        drop_last=True,
    )


def keep_fraction(items: Sequence[Item], fraction: float, seed: int) -> list[Item]:
    """All images of a share of the identities.

    Args:
        items: of a training set.
        fraction: share of the identities, above 0 and at most 1.
        seed: of the choice.

    Raises:
        ValueError: if fewer than 2 identities would be left.
    """
    pids = sorted({item[1] for item in items})
    number = round(fraction * len(pids))
    if number < 2:
        raise ValueError(f"data.train_fraction {fraction} of {len(pids)} training identities would be {number}")
    kept = set(np.random.default_rng([seed, 2]).permutation(pids)[:number].tolist())
    print(f"=> Training on {number} of {len(pids)} identities")
    return [item for item in items if item[1] in kept]


def add_label_noise(items: Sequence[Item], share: float, seed: int) -> list[Item]:
    """Gives a share of the images the label of another identity, any with the same probability.

    Each identity keeps one image of its own at least.

    Args:
        items: of a training set.
        share: of the images, in [0, 1).
        seed: of the choice.

    Raises:
        ValueError: if there are too few images, or a single identity.
    """
    rng = np.random.default_rng([seed, 3])
    noisy = list(items)
    pids = sorted({item[1] for item in items})
    number, order = round(share * len(items)), rng.permutation(len(items)).tolist()
    first = {items[index][1]: index for index in reversed(order)}
    free = [index for index in order if first[items[index][1]] != index]
    if number > len(free) or len(pids) < 2:
        raise ValueError(
            f"data.label_noise {share} would be {number} of {len(items)} images, where {len(pids)} identities keep one"
        )
    for index in free[:number]:
        path, pid, *rest = items[index]
        others = pids.index(pid) + 1 + int(rng.integers(len(pids) - 1))
        noisy[index] = (path, pids[others % len(pids)], *rest)
    print(f"=> {number} of {len(items)} training images have another identity's label")
    return noisy


def add_outliers(items: Sequence[Item], share: float, seed: int, folder: str | Path) -> list[Item]:
    """Replaces a share of the images by a patch of theirs, a quarter as high and wide, as a detector's failures are.

    Args:
        items: of a training set; of a tracklet every frame is replaced.
        share: of the images, in [0, 1].
        seed: of the choice.
        folder: where the patches are written, in the size of the images.

    Raises:
        UnreadableImageError: for an image that can't be read.
        OSError: if the folder can't be written to.
    """
    rng = np.random.default_rng([seed, 4])
    changed = list(items)
    number = round(share * len(items))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = rng.permutation(len(items))[:number].tolist()
    for index in progress("outliers", chosen, "image", number):
        frames, *rest = items[index]
        paths = [frames] if isinstance(frames, str) else list(frames)
        corner = rng.random(2)
        patches = []
        for frame, path in enumerate(paths):
            patches.append(str(folder / f"{index:06d}_{frame:02d}_{Path(path).stem}.png"))
            _patch(read_image(path), corner).save(patches[-1])
        changed[index] = (patches[0] if isinstance(frames, str) else tuple(patches), *rest)
    print(f"=> {number} of {len(items)} training images are outliers, in {folder}")
    return changed


def _patch(image: Image.Image, corner: Any) -> Image.Image:
    width, height = (max(1, round(side * _PATCH)) for side in image.size)
    left, top = int(corner[0] * (image.width - width)), int(corner[1] * (image.height - height))
    return image.crop((left, top, left + width, top + height)).resize(image.size, Image.Resampling.BICUBIC)
