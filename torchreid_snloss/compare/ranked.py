"""Queries ranked, a few at a time: ranked lists, average precisions, distances."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torchreid import metrics

from torchreid_snloss.record import Features

__all__ = ["Distances", "Ranked", "average_precisions", "choose_queries", "shown"]

_BLOCK = 256  # queries at a time, since all distances of a large test set are gigabytes
_BINS = 50


@dataclass(frozen=True, eq=False)
class Ranked:
    """Queries against a gallery.

    Attributes:
        distances: (queries, gallery), as torchreid ranks by: ``test.dist_metric``, Euclidean ones squared.
        same: (queries, gallery), whether both are of one identity.
        counted: likewise, whether a gallery image counts for a query: not where both identity and camera are the same.
    """

    distances: NDArray[np.float32]
    same: NDArray[np.bool_]
    counted: NDArray[np.bool_]

    @classmethod
    def of(cls, query: Features, gallery: Features, metric: str, rows: slice | Sequence[int]) -> Ranked:
        """Of some of the queries.

        Args:
            query: the queries' features.
            gallery: the gallery's.
            metric: ``"euclidean"`` or ``"cosine"``.
            rows: which queries.
        """
        query = Features(*(getattr(query, field.name)[rows] for field in fields(query)))
        sides = (torch.from_numpy(side.features) for side in (query, gallery))
        distances = metrics.compute_distance_matrix(*sides, metric).numpy()
        same = query.pids[:, None] == gallery.pids
        return cls(distances, same, ~(same & (query.camids[:, None] == gallery.camids)))

    def ranking(self, row: int) -> NDArray[np.intp]:
        """Gallery images of a query, nearest first."""
        order = np.argsort(self.distances[row], kind="stable")
        ranked: NDArray[np.intp] = order[self.counted[row, order]]
        return ranked

    def average_precision(self, row: int) -> float:
        """Of a query, in [0, 1]; NaN where it has no match."""
        ranks = np.flatnonzero(self.same[row, self.ranking(row)]) + 1
        return float(np.mean(np.arange(1, len(ranks) + 1) / ranks)) if len(ranks) else np.nan


def _blocks(query: Features, gallery: Features, metric: str) -> Iterator[Ranked]:
    for start in range(0, len(query.pids), _BLOCK):
        yield Ranked.of(query, gallery, metric, slice(start, start + _BLOCK))


def average_precisions(query: Features, gallery: Features, metric: str) -> NDArray[np.float64]:
    """(queries,) in [0, 1]; NaN for a query without a match."""
    blocks = _blocks(query, gallery, metric)
    return np.array([ranked.average_precision(row) for ranked in blocks for row in range(len(ranked.same))])


def shown(distances: NDArray[np.float32], metric: str) -> NDArray[np.float32]:
    """Distances as people know them: Euclidean ones not squared."""
    return np.sqrt(distances.clip(min=0)) if metric == "euclidean" else distances


@dataclass(frozen=True, eq=False)
class Distances:
    """How far queries are from gallery images.

    Attributes:
        edges: (bins + 1,) of the histograms.
        same: (bins,) shares of the distances between images of one person, of sum 1.
        different: likewise of different people.
    """

    edges: NDArray[np.float64]
    same: NDArray[np.float64]
    different: NDArray[np.float64]

    @classmethod
    def of(cls, query: Features, gallery: Features, metric: str) -> Distances:
        """Of all queries and the gallery images that count for them."""
        ranges = [
            (float(found.min()), float(found.max()))
            for ranked in _blocks(query, gallery, metric)
            if len(found := shown(ranked.distances[ranked.counted], metric))
        ]
        edges = np.histogram_bin_edges([], bins=_BINS, range=(min(low for low, _ in ranges), max(x for _, x in ranges)))
        same, different = np.zeros(_BINS), np.zeros(_BINS)
        for ranked in _blocks(query, gallery, metric):
            for counts, chosen in ((same, ranked.same), (different, ~ranked.same)):
                counts += np.histogram(shown(ranked.distances[ranked.counted & chosen], metric), bins=edges)[0]
        return cls(edges, same / max(1, same.sum()), different / max(1, different.sum()))

    @property
    def overlap(self) -> float:
        """The share of either histogram that lies in the other, in [0, 1]."""
        return float(np.minimum(self.same, self.different).sum())


def choose_queries(precisions: NDArray[np.float64], number: int) -> list[int]:
    """Half of them those whose average precision differs most between the losses, half drawn at random.

    Args:
        precisions: (losses, queries).
        number: how many; of one loss all are drawn at random.
    """
    valid = np.flatnonzero(~np.isnan(precisions).any(axis=0))
    spread = np.ptp(precisions[:, valid], axis=0)
    differing = valid[np.argsort(-spread, kind="stable")][: number // 2 if len(precisions) > 1 else 0]
    rest = np.setdiff1d(valid, differing)
    drawn = np.random.default_rng(0).permutation(rest)[: number - len(differing)]
    return [*differing.tolist(), *sorted(drawn.tolist())]
