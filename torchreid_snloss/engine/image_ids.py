"""Ids of images, by which a memory of features recognises an image that it holds."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchreid_snloss.data.fingerprint import relative_names
from torchreid_snloss.data.items import training_items

__all__ = ["ImageIds"]


class ImageIds:
    """Ids of images, the same in every process and run, also on a copy of the data in another folder.

    Args:
        dataset: The training set. If it has no list `train` as torchreid's, an image is known by its folder's and its
            own name.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __call__(self, data: Mapping[str, Any], features: Any) -> Tensor:
        """The ids of a batch, (batch,) int64.

        Args:
            data: A batch of torchreid's with `impath`.
            features: The features of its images, (batch, D).

        Raises:
            TypeError: For a batch without paths, or several features for each image.
        """
        if not isinstance(features, Tensor):
            raise TypeError("a memory needs a model with one feature for each image, this one has several")
        if "impath" not in data:
            raise TypeError("a memory needs image batches with the images' paths, 'impath'")
        names = [f"{pid} {self._name(path)}" for pid, path in zip(data["pid"].tolist(), data["impath"])]
        digests = [hashlib.blake2b(os.fsencode(name), digest_size=8).digest() for name in names]
        return torch.tensor([int.from_bytes(digest, "big") >> 1 for digest in digests], device=features.device)

    def _name(self, path: str) -> str:
        return self._names.get(path) or "/".join(Path(path).parts[-2:])

    @functools.cached_property
    def _names(self) -> dict[str, str]:
        items = training_items(self._dataset) or ()
        return {item[0]: names[0] for item, names in zip(items, relative_names(items)) if isinstance(item[0], str)}
