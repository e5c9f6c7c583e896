"""The features of the images of a test set, extracted by all processes together."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchreid_snloss import device, distributed
from torchreid_snloss.data.items import files_of
from torchreid_snloss.data.shards import own_test_batches
from torchreid_snloss.data.workers import batches_of
from torchreid_snloss.engine.options import NonFiniteError
from torchreid_snloss.progress import progress

__all__ = [
    "SplitFeatures",
    "check_comparable",
    "extract",
    "extract_batch",
    "first_files",
    "lengths",
    "normalized",
]

_SMALLEST_NORM = 1e-12  # that of torch.nn.functional.normalize


@dataclass(frozen=True, eq=False)
class SplitFeatures:
    """The features of one split of a test set.

    Attributes:
        features: (images, dimension), on the CPU.
        pids: (images,), the identities.
        camids: (images,), the cameras.
        paths: the image files; for a tracklet its first frame.
    """

    features: Tensor
    pids: NDArray[np.int64]
    camids: NDArray[np.int64]
    paths: list[str]


def extract_batch(extract_features: Callable[[Tensor], Tensor], images: Tensor, flip: bool) -> Tensor:
    """The features that a test ranks by, not normalised.

    Args:
        extract_features: returns the features of a batch of images.
        images: (batch, ..., height, width).
        flip: whether features are the mean over an image and its mirror image.
    """
    features = extract_features(images)
    return (features + extract_features(images.flip(-1))) / 2 if flip else features


def lengths(features: Tensor) -> Tensor:
    """The lengths by which features are divided to normalise them, (images, 1), above zero."""
    norms: Tensor = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return norms.clamp_min(_SMALLEST_NORM)


def normalized(split: SplitFeatures) -> SplitFeatures:
    """Features of length 1, in place, since those of a gallery may take gigabytes."""
    return replace(split, features=split.features.div_(lengths(split.features)))


def first_files(loader: Any) -> list[str]:
    """The image file of each item of a test loader's data set; for a tracklet its first frame."""
    return [files_of(item)[0] for item in loader.dataset.data]


def extract(
    tested: Any,
    loader: Any,
    features_of: Callable[[Tensor], Tensor],
    name: str,
    check_stop: Callable[[], None],
    description: str,
) -> SplitFeatures:
    """Extracts features on all processes. Each process gets all of them.

    Batches are shared out and not split, so that the features are the same as with one process.

    Args:
        tested: the engine whose model is tested; its `parse_data_for_eval` and `use_gpu` are used.
        loader: the loader of the images.
        features_of: returns the features of a batch of images.
        name: what the images are called in messages.
        check_stop: called before each batch, on all processes together; raises an exception to end the run.
        description: the text before the progress bar.

    Raises:
        NonFiniteError: if features are not finite numbers, or too large to compare.
        ValueError: if there are no images.
    """
    sizes = [len(batch) for batch in loader.batch_sampler]
    if not sizes:
        raise ValueError(f"there are no {name}")
    processes, rank = distributed.world_size(), distributed.rank()
    paths = first_files(loader)
    ends = list(itertools.accumulate(sizes))
    rows: Tensor | None = None
    labels: list[tuple[list[int], list[int]]] = []
    seconds: list[float] = []
    own = batches_of(own_test_batches(loader))
    turns = -(-len(sizes) // processes)  # the same number on all processes
    for first in progress(description, range(0, len(sizes), processes), "batch", turns):
        check_stop()
        features: Tensor | None = None
        data = next(own, None)
        if data is not None:
            images, pids, camids = tested.parse_data_for_eval(data)
            images = device.to_device(images, tested.use_gpu)
            began = time.perf_counter()
            features = features_of(images).cpu()
            if features.dtype in (torch.float16, torch.bfloat16):  # lengths and distances need more digits
                features = features.float()
            seconds.append(time.perf_counter() - began)
            labels.append((pids.tolist(), camids.tolist()))
        if rows is None:  # rank 0 has a batch in the first turn
            kind = distributed.broadcast_object(None if features is None else (features.shape[1:], features.dtype))
            assert kind is not None
            rows = torch.empty(ends[-1], *kind[0], dtype=kind[1])
        batches = range(first, min(first + processes, len(sizes)))
        for batch in batches:  # straight to their places, since all features together may take gigabytes
            part = rows[ends[batch] - sizes[batch] : ends[batch]]
            if features is not None and batch % processes == rank:
                part.copy_(features)
            distributed.broadcast_tensor(part, batch % processes)
        start = ends[first] - sizes[first]
        check_comparable(rows[start : ends[batches[-1]]], paths[start:], name)
    assert rows is not None
    if seconds:
        print(f"Speed: {sum(seconds) / len(seconds):.4f} sec/batch")
    by_rank = distributed.broadcast_object(distributed.gather_objects(labels))
    in_order = [of_batch for turn in itertools.zip_longest(*by_rank) for of_batch in turn if of_batch is not None]
    all_pids, all_camids = (np.array([label for part in parts for label in part]) for parts in zip(*in_order))
    return SplitFeatures(rows, all_pids, all_camids, paths)


def check_comparable(features: Tensor, paths: list[str], name: str) -> None:
    """Checks that the squared distances between features are finite, as far as their lengths tell.

    Args:
        features: (images, dimension).
        paths: the image files, as many or more.
        name: what the images are called in messages.

    Raises:
        NonFiniteError: if they are not; it names the first image.
    """
    finite = torch.isfinite(8 * torch.linalg.vector_norm(features, dim=1).float().square())
    if not finite.all():
        first = int(torch.argmin(finite.int()))
        raise NonFiniteError(
            f"the model's features of {name} are NaN, infinite or too large to compare, those of {paths[first]!r} "
            "among them: its weights or the images hold numbers that are out of range"
        )
