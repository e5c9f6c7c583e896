"""Distances between features, for a block of images at a time; the whole matrix is never in memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

__all__ = ["FeatureDistances", "Side", "rows_in"]

_METRICS = ("euclidean", "cosine")
_CHUNK_BYTES = 16 << 20  # of features that are converted, or whose lengths are computed, at a time
_BLOCK_BYTES = {"cpu": 192 << 20}  # of the distances of a block
_BLOCK_BYTES_ON_GPU = 1 << 30
_SMALLEST_LENGTH = 1e-12  # that of `torch.nn.functional.normalize`


def rows_in(row_bytes: int, device: torch.device) -> int:
    """How many rows of distances a block holds; at least 1.

    Args:
        row_bytes: the memory that a row takes.
        device: where the block is.
    """
    return max(1, _BLOCK_BYTES.get(device.type, _BLOCK_BYTES_ON_GPU) // row_bytes)


class Side:
    """The features of queries or gallery images.

    Attributes:
        features: (n, D), of any type and on any device.
        lengths: (n,), their squared lengths, or for the cosine distance the lengths, at least 1e-12.
    """

    def __init__(self, features: Tensor, what: str, metric: str, dtype: torch.dtype, device: torch.device) -> None:
        self.features, self._dtype, self._device = features, dtype, device
        self._is_ready = features.dtype == dtype and features.device == device
        squares, lengths = [], []
        for start in range(0, len(features), self._chunk_size):
            chunk = self.chunk(start, start + self._chunk_size)
            squares.append(chunk.pow(2).sum(dim=1))
            lengths.append(torch.linalg.vector_norm(chunk, dim=1).clamp(min=_SMALLEST_LENGTH))
        squared = torch.cat(squares)
        # A squared distance is at most 4 times the larger squared length; twice that leaves room for rounding.
        if not bool(torch.isfinite(8 * squared).all()):
            self._report(squared, what)
        self.lengths = torch.cat(lengths) if metric == "cosine" else squared

    def _report(self, squared: Tensor, what: str) -> None:
        image = int(torch.isfinite(8 * squared).int().argmin())
        values = self.chunk(image, image + 1)
        if bool(torch.isfinite(values).all()):
            name = str(values.dtype).removeprefix("torch.")
            raise ValueError(f"the features of {what} {image} are too large: squared distances overflow {name}")
        kind = "NaN" if bool(torch.isnan(values).any()) else "infinite values"
        raise ValueError(f"the features of {what} {image} (counted from 0) hold {kind}")

    def __len__(self) -> int:
        return len(self.features)

    @property
    def _chunk_size(self) -> int:
        width = self.features.shape[1] * torch.empty((), dtype=self._dtype).element_size()
        return max(1, _CHUNK_BYTES // width)

    def chunk(self, start: int, stop: int) -> Tensor:
        """Some of the features, as the type and on the device that distances are computed in."""
        return self.features[start:stop].to(self._device, self._dtype)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """All features: at once if nothing is to be converted, else a few megabytes at a time."""
        size = len(self) if self._is_ready else self._chunk_size
        for start in range(0, len(self), size):
            yield slice(start, start + size), self.chunk(start, start + size)


class FeatureDistances:
    """The distances between queries and gallery images, as in torchreid's `compute_distance_matrix`.

    Attributes:
        queries: the features of the queries.
        gallery: the features of the gallery images.
        metric: `"euclidean"`, which is squared, or `"cosine"`.
        dtype: float64 if features of this type are given, else float32.
        device: where the distances are computed.
    """

    def __init__(self, query_features: Any, gallery_features: Any, metric: str, device: Any = None) -> None:
        if metric not in _METRICS:
            raise ValueError(f"metric must be one of {', '.join(_METRICS)}, got {metric!r}")
        query = _matrix("query_features", query_features)
        gallery = _matrix("gallery_features", gallery_features)
        if query.shape[1] != gallery.shape[1]:
            raise ValueError(
                "the features of queries and gallery must have the same number of dimensions, got "
                f"{query.shape[1]} and {gallery.shape[1]}"
            )
        self.metric = metric
        self.dtype = torch.float64 if torch.float64 in (query.dtype, gallery.dtype) else torch.float32
        self.device = gallery.device if device is None else torch.device(device)
        self.queries = Side(query, "query", metric, self.dtype, self.device)
        self.gallery = Side(gallery, "gallery image", metric, self.dtype, self.device)
        self.shape = (len(self.queries), len(self.gallery))

    def block_size(self, bytes_per_distance: int = 0) -> int:
        """How many queries a block holds."""
        item = torch.empty((), dtype=self.dtype).element_size()
        return rows_in(len(self.gallery) * max(bytes_per_distance, item), self.device)

    def rows(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """The distances from some queries to the gallery: (stop - start, gallery)."""
        if out is None:
            out = torch.empty(stop - start, len(self.gallery), dtype=self.dtype, device=self.device)
        self.between(self.queries, start, stop, self.gallery, out)
        return out

    def between(self, side: Side, start: int, stop: int, other: Side, out: Tensor) -> None:
        """Writes the distances from some images of one side to all of the other into `out`."""
        features, lengths = side.chunk(start, stop), side.lengths[start:stop, None]
        if self.metric == "cosine":
            features = features / lengths
        for columns, others in other.chunks():
            part = out[:, columns]
            if self.metric == "euclidean":
                torch.add(lengths, other.lengths[columns], out=part)
                part.addmm_(features, others.T, beta=1, alpha=-2)
            else:
                torch.mm(features, others.T, out=part)
                part.div_(other.lengths[columns]).neg_().add_(1)


def _matrix(name: str, features: Any) -> Tensor:
    tensor = features.detach() if isinstance(features, Tensor) else _from_array(name, features)
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise ValueError(
            f"{name} must be of shape (images, dimensions), with at least one of each, got {tuple(tensor.shape)}"
        )
    if tensor.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {tensor.dtype}")
    return tensor


def _from_array(name: str, features: ArrayLike) -> Tensor:
    array = np.asarray(features)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must hold real numbers, got {array.dtype}")
    if array.dtype.itemsize > 8 or not array.dtype.isnative:
        array = array.astype(f"{array.dtype.kind}{min(8, array.dtype.itemsize)}")
    if min(array.strides, default=0) < 0:
        array = array.copy()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # it is only read
        return torch.from_numpy(array)
