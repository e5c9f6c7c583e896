"""Distances between features, for a block of images at a time; the whole matrix is never in memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

__all__ = ["FeatureDistances", "Side"]

_METRICS = ("euclidean", "cosine")
_CHUNK_BYTES = 16 << 20  # of features that are converted, or whose lengths are computed, at a time
_BLOCK_BYTES = 416 << 20  # of the distances of a block; smaller blocks slow down the products with a large gallery
_SMALLEST_LENGTH = 1e-12  # that of `torch.nn.functional.normalize`


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
            chunk = self.chunk(slice(start, start + self._chunk_size))
            squares.append(chunk.pow(2).sum(dim=1))
            lengths.append(torch.linalg.vector_norm(chunk, dim=1).clamp(min=_SMALLEST_LENGTH))
        squared = torch.cat(squares)
        # A squared distance is at most 4 times the larger squared length; twice that leaves room for rounding.
        if not bool(torch.isfinite(8 * squared).all()):
            self._report(squared, what)
        self.lengths = torch.cat(lengths) if metric == "cosine" else squared

    def _report(self, squared: Tensor, what: str) -> None:
        image = int(torch.isfinite(8 * squared).int().argmin())
        values = self.chunk(slice(image, image + 1))
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

    def chunk(self, images: slice) -> Tensor:
        """Some of the features, as the type and on the device that distances are computed in."""
        return self.features[images].to(self._device, self._dtype)

    def chunks(self, images: slice) -> Iterator[Tensor]:
        """Some of the features: at once if nothing is to be converted, else a few megabytes at a time."""
        start, stop, _ = images.indices(len(self))
        size = stop - start if self._is_ready else self._chunk_size
        for first in range(start, stop, size):
            yield self.chunk(slice(first, min(first + size, stop)))

    def select(self, images: NDArray[np.intp]) -> Tensor:
        """The features of the images with these indices, like `chunk`."""
        return self.features[torch.from_numpy(images).to(self.features.device)].to(self._device, self._dtype)


class FeatureDistances:
    """The distances between queries and gallery images, as in torchreid's `compute_distance_matrix`.

    Attributes:
        queries: the features of the queries.
        gallery: the features of the gallery images.
        metric: `"euclidean"`, which is squared, or `"cosine"`.
        shape: the numbers of queries and gallery images.
        dtype: float64 if features of this type are given, else float32.
        device: where the distances are computed.
        item_bytes: the memory of a distance.
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
        self._block: Tensor | None = None  # one for all blocks, as freed memory is not always used again
        self.item_bytes = torch.empty((), dtype=self.dtype).element_size()

    def block_size(self) -> int:
        """How many queries fit in a block."""
        return max(1, _BLOCK_BYTES // (len(self.gallery) * self.item_bytes))

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """The distances from some queries to the gallery: (stop - start, gallery), until the next call."""
        if self._block is None or len(self._block) < stop - start:
            self._block = None  # frees it first
            self._block = torch.empty(stop - start, len(self.gallery), dtype=self.dtype, device=self.device)
        block = self._block[: stop - start]
        return self.between(self.queries, slice(start, stop), self.gallery, slice(0, None), block).cpu().numpy()

    def between(self, side: Side, rows: slice, other: Side, columns: slice, out: Tensor | None = None) -> Tensor:
        """The distances from some images of one side to some of the same or the other side."""
        features, lengths, other_lengths = side.chunk(rows), side.lengths[rows, None], other.lengths[columns]
        distances = torch.add(lengths, other_lengths, out=out)
        if self.metric == "cosine":
            features = features / lengths
        done = 0
        for chunk in other.chunks(columns):
            part = distances[:, done : done + len(chunk)]
            if self.metric == "cosine":
                torch.mm(features, chunk.T, out=part)
            else:
                part.addmm_(features, chunk.T, beta=1, alpha=-2)
            done += len(chunk)
        return distances.div_(other_lengths).neg_().add_(1) if self.metric == "cosine" else distances

    def of_pairs(self, images: NDArray[np.intp], others: NDArray[np.intp]) -> Tensor:
        """The distance from each of `images` to the image in the same place of `others`.

        Args:
            images: (n,), indices among all images, queries first.
            others: (n,).
        """
        (features, lengths), (other_features, other_lengths) = (self._select(one) for one in (images, others))
        products = (features * other_features).sum(dim=1)
        if self.metric == "cosine":
            return 1 - products / (lengths * other_lengths)
        return lengths + other_lengths - 2 * products

    def _select(self, images: NDArray[np.intp]) -> tuple[Tensor, Tensor]:
        """The features and lengths of images."""
        size = (len(images), self.queries.features.shape[1])
        features = torch.empty(size, dtype=self.dtype, device=self.device)
        in_gallery = images >= len(self.queries)
        for side, where, before in ((self.queries, ~in_gallery, 0), (self.gallery, in_gallery, len(self.queries))):
            features[torch.from_numpy(where).to(self.device)] = side.select(images[where] - before)
        lengths = torch.cat([self.queries.lengths, self.gallery.lengths])
        return features, lengths[torch.from_numpy(images).to(self.device)]


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
