"""Average precisions and distances of recorded features, computed for a block of queries at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torchreid import metrics

from torchreid_snloss.deprecation import renamed
from torchreid_snloss.evaluation import rank_features
from torchreid_snloss.record import Features

__all__ = ["DistanceHistograms", "average_precisions", "choose_queries", "unsquared"]

__getattr__ = renamed(
    __name__,
    {
        "Distances": "torchreid_snloss.compare.ranked.DistanceHistograms",
        "shown": "torchreid_snloss.compare.ranked.unsquared",
    },
)

_BLOCK_SIZE = 1 << 23  # distances that are computed at a time
_NUM_BINS = 50


def average_precisions(query: Features, gallery: Features, metric: str, rerank: bool = False) -> NDArray[np.float64]:
    """Average precision of each query: (queries,), in [0, 1]; NaN for a query without a match.

    Args:
        query: The features of the queries.
        gallery: The features of the gallery.
        metric: The distance, `"euclidean"` or `"cosine"`.
        rerank: Whether to re-rank.
    """
    labels = (query.pids, gallery.pids, query.camids, gallery.camids)
    return rank_features(query.features, gallery.features, *labels, metric=metric, rerank=rerank).average_precisions


def _distances(
    query: Features, gallery: Features, metric: str
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """The distances to images of the query's person and to those of others, for a block of queries at a time.

    Images of the query's identity from its own camera are left out.
    """
    size = max(1, _BLOCK_SIZE // len(gallery.pids))
    for start in range(0, len(query.pids), size):
        rows = slice(start, start + size)
        sides = torch.from_numpy(query.features[rows]), torch.from_numpy(gallery.features)
        distances = unsquared(metrics.compute_distance_matrix(*sides, metric).numpy(), metric)
        same = query.pids[rows, None] == gallery.pids
        matches = same & (query.camids[rows, None] != gallery.camids)
        yield distances[matches], distances[~same]


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
            for block in _distances(query, gallery, metric)
            for distances in block
            if len(distances)
        ]
        lowest, highest = float(min(low for low, _ in ranges)), float(max(high for _, high in ranges))
        edges = np.histogram_bin_edges([], bins=_NUM_BINS, range=(lowest, highest))
        same, different = np.zeros(_NUM_BINS), np.zeros(_NUM_BINS)
        for block in _distances(query, gallery, metric):
            for counts, distances in zip((same, different), block):
                counts += np.histogram(distances, bins=edges)[0]
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
