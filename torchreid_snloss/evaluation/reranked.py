"""k-reciprocal re-ranking from features: the neighbours from tiles of distances, the results a block at a time."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchreid_snloss import distributed
from torchreid_snloss.evaluation.distances import FeatureDistances, Side
from torchreid_snloss.progress import progress_bar
from torchreid_snloss.rerank import Encoding, smallest, squared
from torchreid_snloss.threads import map_in_threads

__all__ = ["ReRanked"]

_TILE_BYTES = 192 << 20  # of the distances of a tile
_PAIRS_BYTES = 16 << 20  # of features whose distances are computed pair by pair at a time
_COPIED_ROWS = 64  # rows of a transposed tile that a thread copies at a time


class ReRanked:
    """The distances from queries to the gallery after re-ranking."""

    def __init__(self, distances: FeatureDistances, block_size: int | None, check_stop: Callable[[], None]) -> None:
        """Finds the neighbours of all images, on all processes together.

        Args:
            distances: The distances before re-ranking.
            block_size: The number of images on each side of a tile; None: as many as fit.
            check_stop: Called before each tile, equally often on all processes.
        """
        self._distances = distances
        self._encoding = Encoding(_Neighbors(distances, block_size, check_stop))

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """The distances of some queries: (stop - start, gallery), until the next call."""
        rows = self._distances.rows(start, stop)

        def rerank(index: int) -> None:
            rows[index] = self._encoding.final_distances(start + index, rows[index])

        map_in_threads(rerank, stop - start)
        return rows


class _Tile:
    """Consecutive images of one side."""

    def __init__(self, side: Side, start: int, stop: int, before: int) -> None:
        self.side, self.images = side, slice(start, stop)
        self.first = before + start
        """the index of the first image among all images, queries first"""


class _Neighbors:
    """`torchreid_snloss.rerank.Distances` from features.

    A tile holds the distances between some images and others. The matrix is symmetric, so the tiles on one side of its
    diagonal suffice: each of them serves its rows and its columns, which halves the matrix products.
    """

    def __init__(self, distances: FeatureDistances, block_size: int | None, check_stop: Callable[[], None]) -> None:
        self._distances, self._check_stop = distances, check_stop
        self.num_queries, self.num_images = len(distances.queries), sum(distances.shape)
        self.largest = np.zeros(self.num_images, dtype=np.float32)
        size = block_size or math.isqrt(_TILE_BYTES // distances.item_bytes)
        self._tiles = [
            _Tile(side, start, min(start + size, len(side)), before)
            for side, before in ((distances.queries, 0), (distances.gallery, self.num_queries))
            for start in range(0, len(side), size)
        ]

    def nearest(self, count: int) -> NDArray[np.intp]:
        count = min(count, self.num_images)
        lists = _Lists(self.num_images, count)
        pairs = list(itertools.combinations_with_replacement(self._tiles, 2))
        processes = distributed.world_size()
        with progress_bar("neighbors", len(pairs), "tile") as bar:
            for first in range(0, len(pairs), processes):
                self._check_stop()
                own = first + distributed.rank()
                if own < len(pairs):
                    self._compare(*pairs[own], lists)
                bar.update(min(processes, len(pairs) - first))
        lists.gather()
        self.largest = lists.farthest
        self._check_range()
        self.largest[self.largest == 0] = 1
        self._known = lists
        return lists.images

    def _compare(self, rows: _Tile, columns: _Tile, lists: _Lists) -> None:
        distances = self._distances.between(rows.side, rows.images, columns.side, columns.images)
        tile = distances.square_().float().cpu().numpy()
        lists.add(rows.first, columns.first, tile)
        if rows is not columns:
            lists.add(columns.first, rows.first, tile.T)

    def _check_range(self) -> None:
        if not np.isfinite(self.largest).all():
            image = int(np.argmin(np.isfinite(self.largest)))
            in_gallery = image - self.num_queries
            name = f"query {image}" if in_gallery < 0 else f"gallery image {in_gallery}"
            raise ValueError(f"the features are too large to re-rank: squared distances of {name} overflow float32")

    def pairs(self, images: NDArray[Any], others: NDArray[Any]) -> NDArray[np.float32]:
        result = self._known.find(images, others)
        unknown = np.flatnonzero(np.isnan(result))
        size = max(1, _PAIRS_BYTES // (self._distances.item_bytes * self._distances.queries.features.shape[1]))
        for start in range(0, len(unknown), size):
            part = unknown[start : start + size]
            result[part] = squared(self._distances.of_pairs(images[part], others[part]).cpu().numpy())
        return result


class _Lists:
    """The nearest images found so far, for each image.

    Attributes:
        images: (images, count), their indices, nearest first.
        farthest: (images,), the largest squared distance.
    """

    def __init__(self, num_images: int, count: int) -> None:
        self.images = np.full((num_images, count), num_images, dtype=np.intp)
        self._squared = np.full((num_images, count), np.inf, dtype=np.float32)
        self.farthest = np.zeros(num_images, dtype=np.float32)

    def add(self, first: int, first_other: int, tile: NDArray[np.float32]) -> None:
        """Adds the squared distances from consecutive images to others.

        Args:
            first: The first of the images.
            first_other: The first of the others.
            tile: (images, others).
        """
        add = functools.partial(self._add_rows, first, first_other, tile)
        map_in_threads(add, -(-len(tile) // _COPIED_ROWS))

    def _add_rows(self, first: int, first_other: int, tile: NDArray[np.float32], chunk: int) -> None:
        start = chunk * _COPIED_ROWS
        rows = np.ascontiguousarray(tile[start : start + _COPIED_ROWS])
        images = slice(first + start, first + start + len(rows))
        np.maximum(self.farthest[images], rows.max(axis=1), out=self.farthest[images])
        count = self.images.shape[1]
        for image, row in enumerate(rows, images.start):
            kth = self._squared[image, -1]
            if kth == np.inf:
                found = smallest(row, min(count, len(row)))
            else:
                found = np.flatnonzero(row < kth)  # tiles come in order, so that equally far images rank behind
                if len(found) > 4 * count:
                    found = found[smallest(row[found], count)]
            self._merge(image, found + first_other, row[found])

    def _merge(self, image: int, others: NDArray[np.intp], distances: NDArray[np.float32]) -> None:
        if not len(others):
            return
        images = np.concatenate([self.images[image], others])
        values = np.concatenate([self._squared[image], distances])
        order = np.lexsort((images, values))[: self.images.shape[1]]
        self.images[image], self._squared[image] = images[order], values[order]

    def gather(self) -> None:
        """Merges the lists of all processes, on each of them."""
        if distributed.world_size() == 1:
            return
        parts = distributed.gather_objects((self.images, self._squared, self.farthest))
        if parts:
            for images, distances, farthest in parts[1:]:
                np.maximum(self.farthest, farthest, out=self.farthest)
                for image in range(len(images)):
                    self._merge(image, images[image], distances[image])
        self.images, self._squared, self.farthest = distributed.broadcast_object(
            (self.images, self._squared, self.farthest)
        )

    def find(self, images: NDArray[Any], others: NDArray[Any]) -> NDArray[np.float32]:
        """The squared distances of pairs of images; NaN if neither image is in the list of the other."""
        num_images, count = self.images.shape
        keys = (np.arange(num_images)[:, None] * num_images + self.images).ravel()
        order = np.argsort(keys)
        result = np.full(len(images), np.nan, dtype=np.float32)
        for one, other in ((images, others), (others, images)):
            wanted = one.astype(np.int64) * num_images + other
            places = order[np.searchsorted(keys, wanted, sorter=order).clip(max=len(keys) - 1)]
            is_found = keys[places] == wanted
            result[is_found] = self._squared[np.divmod(places[is_found], count)]
        return result
