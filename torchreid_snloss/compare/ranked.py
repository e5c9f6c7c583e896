"""Ranked lists, average precisions and distances of recorded features, computed for a block of queries at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torchreid import metrics

from torchreid_snloss.deprecation import renamed
from torchreid_snloss.record import Features

__all__ = ["DistanceHistograms", "Ranked", "average_precisions", "choose_queries", "unsquared"]

__getattr__ = renamed(
    __name__,
    {
        "Distances": "torchreid_snloss.compare.ranked.DistanceHistograms",
        "shown": "torchreid_snloss.compare.ranked.unsquared",
    },
)

_BLOCK_SIZE = 256  # queries; the whole distance matrix of a large test set takes gigabytes
_NUM_BINS = 50


@dataclass(frozen=True, eq=False)
class Ranked:
    """Some queries compared with a gallery.

    Attributes:
        distances: (queries, gallery), the distances that torchreid ranks by: Euclidean ones are squared.
        same: (queries, gallery), whether query and gallery image show the same identity.
        valid: (queries, gallery), whether the gallery image is ranked for the query. Images that show the query's
            identity from the query's camera are not.
    """

    distances: NDArray[np.float32]
    same: NDArray[np.bool_]
    valid: NDArray[np.bool_]

    @classmethod
    def of(cls, query: Features, gallery: Features, metric: str, rows: slice | Sequence[int]) -> Ranked:
        """Compares the queries with the indices `rows` with the whole gallery.

        Args:
            query: The features of all queries.
            gallery: The features of the gallery.
            metric: The distance, `"euclidean"` or `"cosine"`.
            rows: The indices of the queries to compare.
        """
        query = Features(*(getattr(query, field.name)[rows] for field in fields(query)))
        sides = (torch.from_numpy(side.features) for side in (query, gallery))
        distances = metrics.compute_distance_matrix(*sides, metric).numpy()
        same = query.pids[:, None] == gallery.pids
        return cls(distances, same, ~(same & (query.camids[:, None] == gallery.camids)))

    def ranking(self, row: int) -> NDArray[np.intp]:
        """Indices of the valid gallery images of a query, nearest first."""
        order = np.argsort(self.distances[row], kind="stable")
        ranked: NDArray[np.intp] = order[self.valid[row, order]]
        return ranked

    def average_precision(self, row: int) -> float:
        """Average precision of a query, in [0, 1]; NaN for a query without a match."""
        ranks = np.flatnonzero(self.same[row, self.ranking(row)]) + 1
        return float(np.mean(np.arange(1, len(ranks) + 1) / ranks)) if len(ranks) else np.nan


def _blocks(query: Features, gallery: Features, metric: str) -> Iterator[Ranked]:
    for start in range(0, len(query.pids), _BLOCK_SIZE):
        yield Ranked.of(query, gallery, metric, slice(start, start + _BLOCK_SIZE))


def average_precisions(query: Features, gallery: Features, metric: str) -> NDArray[np.float64]:
    """Average precision of each query: (queries,), in [0, 1]; NaN for a query without a match."""
    blocks = _blocks(query, gallery, metric)
    return np.array([block.average_precision(row) for block in blocks for row in range(len(block.same))])


def unsquared(distances: NDArray[np.float32], metric: str) -> NDArray[np.float32]:
    """Undoes the squaring of torchreid's Euclidean distances; cosine distances stay as they are."""
    return np.sqrt(distances.clip(min=0)) if metric == "euclidean" else distances


@dataclass(frozen=True, eq=False)
class DistanceHistograms:
    """Histograms of the distances between queries and their valid gallery images.

    Attributes:
        edges: (bins + 1,), the edges of the bins.
        same: (bins,), the shares of the distances between images of the same person, which sum to 1.
        different: (bins,), the shares of the distances between images of different people, which sum to 1.
    """

    edges: NDArray[np.float64]
    same: NDArray[np.float64]
    different: NDArray[np.float64]

    @classmethod
    def of(cls, query: Features, gallery: Features, metric: str) -> DistanceHistograms:
        """Computes the histograms over all queries.

        Args:
            query: The features of the queries.
            gallery: The features of the gallery.
            metric: The distance, `"euclidean"` or `"cosine"`.
        """
        ranges = [
            (distances.min(), distances.max())
            for block in _blocks(query, gallery, metric)
            if len(distances := unsquared(block.distances[block.valid], metric))
        ]
        lowest, highest = float(min(low for low, _ in ranges)), float(max(high for _, high in ranges))
        edges = np.histogram_bin_edges([], bins=_NUM_BINS, range=(lowest, highest))
        same, different = np.zeros(_NUM_BINS), np.zeros(_NUM_BINS)
        for block in _blocks(query, gallery, metric):
            for counts, selected in ((same, block.same), (different, ~block.same)):
                counts += np.histogram(unsquared(block.distances[block.valid & selected], metric), bins=edges)[0]
        return cls(edges, same / max(1, same.sum()), different / max(1, different.sum()))

    @property
    def overlap(self) -> float:
        """The share of either histogram that lies in the other, in [0, 1]."""
        return float(np.minimum(self.same, self.different).sum())


def choose_queries(precisions: NDArray[np.float64], number: int) -> list[int]:
    """Chooses queries to show: half those on which the losses differ most, half at random.

    Args:
        precisions: (losses, queries), the average precisions; queries with a NaN are not chosen.
        number: How many queries to choose. With a single loss all of them are drawn at random.

    Returns:
        The indices of the queries: first those on which the losses differ, in descending order of the difference, then
        the others.
    """
    candidates = np.flatnonzero(~np.isnan(precisions).any(axis=0))
    ranges = np.ptp(precisions[:, candidates], axis=0)
    differing = candidates[np.argsort(-ranges, kind="stable")][: number // 2 if len(precisions) > 1 else 0]
    rest = np.setdiff1d(candidates, differing)
    drawn = np.random.default_rng(0).permutation(rest)[: number - len(differing)]
    return [*differing.tolist(), *sorted(drawn.tolist())]
