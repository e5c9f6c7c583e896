"""Cross-batch memory: features of earlier batches as further references."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchreid_snloss.arguments import check_integer

__all__ = ["Memory"]


class Memory:
    """The latest features, their identities and their images (Wang et al., CVPR 2020, arXiv:1912.06798).

    Args:
        size: the maximum number of features, >= 1; new features replace the oldest ones.

    Attributes:
        features: (n, D), n up to `size`, oldest first; None until features are added.
        pids: (n,) integers.
        images: int64 (n,).
        in_use: whether losses use and fill the memory; an engine sets it. Default is True.

    Raises:
        TypeError: for a size that is not an integer.
        ValueError: for a size below 1.
    """

    def __init__(self, size: int) -> None:
        self.size = check_integer("size", size, at_least=1)
        self.in_use = True
        self.features: Tensor | None = None
        self.pids: Tensor | None = None
        self.images: Tensor | None = None

    def add(self, features: Tensor, pids: Tensor, images: Tensor) -> None:
        """Adds a batch.

        Args:
            features: (N, D), kept without gradient.
            pids: (N,) integers.
            images: int64 (N,), ids of the images.

        Raises:
            ValueError: if the dimension of the features differs from that of the stored ones.
        """
        if self.features is not None and features.shape[1] != self.features.shape[1]:
            raise ValueError(
                f"the memory holds features of dimension {self.features.shape[1]}, got {features.shape[1]}; a model "
                "with several features per image can't use a memory"
            )
        self.features = self._newest(self.features, features.detach())
        self.pids = self._newest(self.pids, pids)
        self.images = self._newest(self.images, images)

    def clear(self) -> None:
        """Forgets all features."""
        self.features = self.pids = self.images = None

    def _newest(self, old: Tensor | None, new: Tensor) -> Tensor:
        kept = new if old is None else torch.cat([old.to(new.device, new.dtype), new])
        return kept[-self.size :].clone()

    def state_dict(self) -> dict[str, Any]:
        """The tensors that a checkpoint holds."""
        return {"features": self.features, "pids": self.pids, "images": self.images}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a checkpoint's features, the newest `size` of them."""
        parts = (state[name] for name in ("features", "pids", "images"))
        self.features, self.pids, self.images = (None if part is None else part[-self.size :] for part in parts)
