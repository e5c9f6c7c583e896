"""Evaluation and ranked lists from features, for test sets whose distance matrix does not fit in memory."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from torchreid_snloss import distributed
from torchreid_snloss.evaluation.distances import FeatureDistances
from torchreid_snloss.evaluation.ranking import CurveSum, Metric, Ranking, SameIdentity, comparable_sides, metric_of
from torchreid_snloss.evaluation.reranked import ReRanked
from torchreid_snloss.progress import progress_bar
from torchreid_snloss.rerank import smallest
from torchreid_snloss.threads import map_in_threads

__all__ = ["FeatureRanker", "nearest_gallery", "rank_features"]

Features = Tensor | ArrayLike


def rank_features(
    query_features: Features,
    gallery_features: Features,
    q_pids: ArrayLike,
    g_pids: ArrayLike,
    q_camids: ArrayLike,
    g_camids: ArrayLike,
    metric: str = "euclidean",
    max_rank: int = 50,
    use_metric_cuhk03: bool = False,
    rerank: bool = False,
    block_size: int | None = None,
    *,
    device: str | torch.device | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> Ranking:
    """Ranks the gallery for each query by the distances of their features, and computes CMC, mAP and mINP.

    The result is that of `rank_gallery` for torchreid's `compute_distance_matrix`, and with `rerank` for its
    `re_ranking`, up to rounding. The distances are computed for a block of queries at a time, so that memory grows with
    the gallery and not with the product of queries and gallery.

    If a process group is up, each process ranks a share of the queries: all of them call this function with the same
    arguments, and all get the result. Random numbers for the metric of CUHK03 come from rank 0.

    Args:
        query_features: (Q, D), the features of the queries, a tensor on any device or an array. Features in half
            precision are compared in float32, those in float64 in float64.
        gallery_features: (G, D), the features of the gallery.
        q_pids: (Q,), the identities of the queries, integers of any size and type or strings.
        g_pids: (G,), the identities of the gallery.
        q_camids: (Q,), the cameras of the queries.
        g_camids: (G,), the cameras of the gallery.
        metric: `"euclidean"` or `"cosine"`.
        max_rank: The length of the CMC curve, >= 1. The curve is as long as the gallery if that is smaller.
        use_metric_cuhk03: Whether to use the metric of CUHK03 in place of that of Market-1501.
        rerank: Whether to rank by k-reciprocal re-ranking (Zhong et al., CVPR 2017) with its usual parameters.
        block_size: The number of images whose distances are computed at a time, >= 1; None: as many as fit in about
            400 MB.
        device: Where distances are computed; None: where the features of the gallery are.
        check_stop: Called before each block, equally often on all processes; raises an exception to end the work.

    Returns:
        CMC, mAP, mINP and the average precision of each query.

    Raises:
        ValueError: If shapes do not fit, there is no query or no gallery image, features are NaN, infinite or too large
            to compare (the message names the image), no query has a match, the metric is unknown, `max_rank` or
            `block_size` is below 1, or an identity or a camera is not a whole number.
        TypeError: If features are not real numbers, or identities or cameras neither integers nor strings.
    """
    ranker = FeatureRanker(
        query_features,
        gallery_features,
        q_pids,
        g_pids,
        q_camids,
        g_camids,
        metric,
        rerank,
        block_size,
        device=device,
        check_stop=check_stop,
    )
    return ranker.ranking(max_rank, use_metric_cuhk03)


def nearest_gallery(
    query_features: Features,
    gallery_features: Features,
    q_pids: ArrayLike,
    g_pids: ArrayLike,
    q_camids: ArrayLike,
    g_camids: ArrayLike,
    topk: int = 10,
    metric: str = "euclidean",
    rerank: bool = False,
    block_size: int | None = None,
    *,
    device: str | torch.device | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """The ranked list of each query: the nearest gallery images, without those of its identity from its own camera.

    Args:
        query_features: As in `rank_features`, like the arguments that are not listed here.
        gallery_features: (G, D).
        q_pids: (Q,).
        g_pids: (G,).
        q_camids: (Q,).
        g_camids: (G,).
        topk: The length of the lists, >= 1.
        metric: `"euclidean"` or `"cosine"`.
        rerank: Whether to rank by k-reciprocal re-ranking.
        block_size: As in `rank_features`.
        device: As in `rank_features`.
        check_stop: As in `rank_features`.

    Returns:
        (Q, topk), the indices of the gallery images, nearest first, ties in the order of the gallery; and (Q, topk),
        their distances (squared for `"euclidean"`), float32, or float64 for features of this type. If fewer images
        remain for a query, its list ends with index -1 at distance NaN.

    Raises:
        ValueError: As `rank_features` does, except that queries need no match; or if `topk` is below 1.
        TypeError: As `rank_features` does.
    """
    ranker = FeatureRanker(
        query_features,
        gallery_features,
        q_pids,
        g_pids,
        q_camids,
        g_camids,
        metric,
        rerank,
        block_size,
        device=device,
        check_stop=check_stop,
    )
    return ranker.nearest(topk)


class Rows(Protocol):
    """Distances from queries to the gallery, some rows at a time."""

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """The distances of some queries: (stop - start, gallery), until the next call."""


class FeatureRanker:
    """Ranks one gallery more than once, as for a result and the ranked lists, but prepares re-ranking only once."""

    def __init__(
        self,
        query_features: Features,
        gallery_features: Features,
        q_pids: ArrayLike,
        g_pids: ArrayLike,
        q_camids: ArrayLike,
        g_camids: ArrayLike,
        metric: str = "euclidean",
        rerank: bool = False,
        block_size: int | None = None,
        *,
        device: str | torch.device | None = None,
        check_stop: Callable[[], None] = lambda: None,
    ) -> None:
        """Checks features and labels, and with `rerank` finds the neighbours. The arguments are `rank_features`'s."""
        if block_size is not None and operator.index(block_size) < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        distances = FeatureDistances(query_features, gallery_features, metric, device)
        self._shape = distances.shape
        self._queries, self._gallery = comparable_sides(self._shape, q_pids, g_pids, q_camids, g_camids)
        self._block_size = block_size or distances.block_size()
        self._check_stop = check_stop
        self._rows: Rows = ReRanked(distances, block_size, check_stop) if rerank else distances

    def ranking(self, max_rank: int = 50, use_metric_cuhk03: bool = False) -> Ranking:
        """CMC, mAP and mINP, as `rank_features` returns them."""
        if operator.index(max_rank) < 1:
            raise ValueError(f"max_rank must be at least 1, got {max_rank}")
        num_queries, num_gallery = self._shape
        metric: Metric = metric_of(self._queries, self._gallery, use_metric_cuhk03)
        total = CurveSum(num_queries, min(max_rank, num_gallery))
        query = 0
        for block in self._blocks("ranking", metric.rank):
            for ranked in block:
                total.add(query, metric.ranks(ranked))
                query += 1
        return _from_rank_0(total.ranking)

    def nearest(self, topk: int = 10) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """The ranked list of each query, as `nearest_gallery` returns it."""
        if operator.index(topk) < 1:
            raise ValueError(f"topk must be at least 1, got {topk}")
        same = SameIdentity(self._queries, self._gallery)

        def nearest(row: NDArray[Any], query: int) -> tuple[NDArray[np.int64], NDArray[Any]]:
            _, excluded = same.of(query)
            row[excluded] = np.inf
            count = min(topk, len(row) - len(excluded))
            indices, distances = np.full(topk, -1, dtype=np.int64), np.full(topk, np.nan, dtype=row.dtype)
            if count:
                indices[:count] = smallest(row, count)
                distances[:count] = row[indices[:count]].clip(0)  # rounding makes those of equal features negative
            return indices, distances

        lists = [ranked for block in self._blocks("ranked lists", nearest) for ranked in block]
        indices, distances = distributed.broadcast_object([np.array(part) for part in zip(*lists)])
        return indices, distances

    def _blocks(self, description: str, function: Callable[[NDArray[Any], int], Any]) -> Iterator[list[Any]]:
        """On rank 0, yields the results of all queries, in their order, block by block; empty lists on the others.

        Args:
            description: The text before the progress bar.
            function: The function of the distances of a query, which it may modify, and of its index.
        """
        num_queries = self._shape[0]
        processes = distributed.world_size()
        size = min(self._block_size, -(-num_queries // processes))
        with progress_bar(description, num_queries, "query") as bar:
            for first in range(0, num_queries, size * processes):
                self._check_stop()
                start = min(first + size * distributed.rank(), num_queries)
                stop = min(start + size, num_queries)
                own = self._apply(function, start, stop)
                yield [result for part in distributed.gather_objects(own) for result in part]
                bar.update(min(size * processes, num_queries - first))

    def _apply(self, function: Callable[[NDArray[Any], int], Any], start: int, stop: int) -> list[Any]:
        rows = self._rows.rows(start, stop)
        return map_in_threads(lambda index: function(rows[index], start + index), stop - start)


def _from_rank_0(function: Callable[[], Ranking]) -> Ranking:
    """The result of a function on rank 0, or its `ValueError`, on all processes."""
    result: Ranking | ValueError | None = None
    if distributed.rank() == 0:
        try:
            result = function()
        except ValueError as error:  # raised below, on all processes
            result = error
    result = distributed.broadcast_object(result)
    if isinstance(result, ValueError):
        raise result
    assert result is not None
    return result
