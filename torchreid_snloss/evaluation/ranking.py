"""Computes CMC, mAP and mINP from the distances between queries and gallery.

torchreid's Python evaluator calls argsort on the whole distance matrix and then loops over every rank of every query.
This module only sorts the values of each row, which is several times faster in NumPy, and looks up the ranks of the few
matches in the sorted values.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from torchreid_snloss.labels import comparable_labels
from torchreid_snloss.threads import in_threads

__all__ = ["CurveSum", "Labels", "Metric", "Ranking", "comparable_sides", "metric_of", "rank_gallery"]

_CUHK03_DRAWS = 10


@dataclass(frozen=True, eq=False)
class Ranking:
    """How well a gallery was ranked. Queries without a match do not count.

    Attributes:
        cmc: (max_rank,), float32 in [0, 1]. The value at index k - 1 is the share of queries with a match among the
            first k images.
        mean_ap: mAP in [0, 1], the mean over queries of the average precision.
        mean_inp: mINP in [0, 1], the mean over queries of the number of matches divided by the rank of the last match
            (Ye et al., "Deep Learning for Person Re-identification: A Survey and Outlook", TPAMI 2022).
        average_precisions: (queries,), float64 in [0, 1], the average precision of each query; NaN for a query without
            a match.
    """

    cmc: NDArray[np.float32]
    mean_ap: float
    mean_inp: float
    average_precisions: NDArray[np.float64]


def rank_gallery(
    distmat: ArrayLike,
    q_pids: ArrayLike,
    g_pids: ArrayLike,
    q_camids: ArrayLike,
    g_camids: ArrayLike,
    max_rank: int = 50,
    use_metric_cuhk03: bool = False,
) -> Ranking:
    """Ranks the gallery for each query, nearest first, and computes CMC, mAP and mINP.

    A match is a gallery image of the query's identity from another camera. Images of the query's identity from its own
    camera are left out of its ranking, and queries without a match are left out of the means (Zheng et al., "Scalable
    Person Re-identification: A Benchmark", ICCV 2015). Images at equal distances are ranked in the order of the
    gallery.

    In the metric of CUHK03 the CMC curve is computed on one image of each identity, drawn at random, and averaged over
    10 draws (Li et al., "DeepReID", CVPR 2014). The random numbers come from NumPy's global generator, in the same
    order as in torchreid. Which image is drawn also depends on the order of equal distances, which is that of
    `np.argsort` here as in torchreid. So the same seed gives the same curve.

    The work is done in as many threads as torch uses (`torch.get_num_threads()`), on a few rows at a time.

    Args:
        distmat: (queries, gallery), distances of any real type. Smaller is nearer, infinity is allowed. The array is
            not modified.
        q_pids: (queries,), the identities of the queries, integers of any size and type or strings.
        g_pids: (gallery,), the identities of the gallery.
        q_camids: (queries,), the cameras of the queries.
        g_camids: (gallery,), the cameras of the gallery.
        max_rank: The length of the CMC curve, >= 1. The curve is as long as the gallery if that is smaller.
        use_metric_cuhk03: Whether to use the metric of CUHK03 in place of that of Market-1501.

    Returns:
        CMC, mAP, mINP and the average precision of each query.

    Raises:
        ValueError: If shapes do not fit, there is no query or no gallery image, `max_rank` is below 1, a distance is
            NaN, no query has a match, or an identity or a camera is not a whole number.
        TypeError: If the distances are not real numbers, or identities or cameras neither integers nor strings.
    """
    rows = np.asarray(distmat)
    if rows.ndim != 2 or 0 in rows.shape:
        raise ValueError(f"distmat must be a matrix (queries, gallery) with at least one of each, got {rows.shape}")
    if rows.dtype.kind not in "biuf":
        raise TypeError(f"distmat must hold real numbers, got {rows.dtype}")
    if operator.index(max_rank) < 1:
        raise ValueError(f"max_rank must be at least 1, got {max_rank}")
    queries, gallery = comparable_sides(rows.shape, q_pids, g_pids, q_camids, g_camids)
    metric = metric_of(queries, gallery, use_metric_cuhk03)
    prepared = _as_given if use_metric_cuhk03 else _as_floats

    def rank(query: int) -> Any:
        row = rows[query]
        if np.isnan(row.min()):
            raise ValueError(f"{np.isnan(row).sum()} of the distances of query {query} are NaN")
        return metric.rank(prepared(row), query)

    total = CurveSum(len(rows), min(max_rank, rows.shape[1]))
    for query, ranked in enumerate(in_threads(rank, len(rows), "ranking")):
        total.add(query, metric.ranks(ranked))
    return total.ranking()


def _as_given(row: NDArray[Any]) -> NDArray[Any]:
    return row


def _as_floats(row: NDArray[Any]) -> NDArray[Any]:
    """A copy as floats that are fast to sort and keep the order of the distances."""
    # A float64 can't hold every 64-bit integer; the order of the values is all that counts.
    ordered = np.unique(row, return_inverse=True)[1] if row.dtype.kind in "iu" else row
    return ordered.astype(np.result_type(row.dtype, np.float32))


@dataclass(frozen=True, eq=False)
class Labels:
    """The identities and cameras of queries or gallery images, as integers."""

    pids: NDArray[np.int64]
    camids: NDArray[np.int64]


def comparable_sides(
    shape: tuple[int, ...], q_pids: ArrayLike, g_pids: ArrayLike, q_camids: ArrayLike, g_camids: ArrayLike
) -> tuple[Labels, Labels]:
    """The labels of `shape[0]` queries and of `shape[1]` gallery images; raises errors as `comparable_labels` does."""
    own_pids, other_pids = comparable_labels(shape, q_pids=q_pids, g_pids=g_pids)
    own_camids, other_camids = comparable_labels(shape, q_camids=q_camids, g_camids=g_camids)
    return Labels(own_pids, own_camids), Labels(other_pids, other_camids)


class CurveSum:
    """Adds up the CMC curves and average precisions of queries."""

    def __init__(self, num_queries: int, max_rank: int) -> None:
        # Summed in float32, query by query, as torchreid does: its rounding can exceed 1e-6 in the metric of CUHK03.
        self._curves = np.zeros(max_rank, dtype=np.float32)
        self._average_precisions = np.full(num_queries, np.nan)
        self._inverse_penalties: list[float] = []

    def add(self, query: int, ranks: Ranks) -> None:
        """Adds a query, in the order of the queries."""
        if ranks is None:
            return
        first, matches = ranks
        max_rank = len(self._curves)
        curve = np.bincount(first[first < max_rank], minlength=max_rank).cumsum() / len(first)
        self._curves += curve.astype(np.float32)
        self._average_precisions[query] = np.mean(np.arange(1, len(matches) + 1) / (matches + 1))
        self._inverse_penalties.append(len(matches) / (matches[-1] + 1))

    def ranking(self) -> Ranking:
        """The means over the queries with a match.

        Raises:
            ValueError: If there is none.
        """
        precisions = self._average_precisions
        matched = precisions[~np.isnan(precisions)]
        if not len(matched):
            raise ValueError(
                f"none of the {len(precisions)} queries has a gallery image of its identity under another camera"
            )
        cmc = self._curves / np.float32(len(matched))
        return Ranking(cmc, float(np.mean(matched)), float(np.mean(self._inverse_penalties)), precisions)


# For one query: the ranks of the first match in each draw (a single one in the metric of Market-1501), and the ranks of
# all matches in ascending order. Ranks are counted from 0. None for a query without a match.
Ranks = tuple[NDArray[np.intp], NDArray[np.intp]] | None


class Metric(Protocol):
    """How the ranks of a query's matches are found: `rank` in any thread or process, then `ranks` in order."""

    def rank(self, row: NDArray[Any], query: int) -> Any:
        """What `ranks` needs to know of the distances of a query to the gallery."""

    def ranks(self, ranked: Any) -> Ranks:
        """The ranks that count for a query, from the result of `rank`. It may draw random numbers."""


def metric_of(queries: Labels, gallery: Labels, use_metric_cuhk03: bool) -> Metric:
    """The metric of CUHK03 or of Market-1501."""
    return _CUHK03(queries, gallery) if use_metric_cuhk03 else _Market1501(queries, gallery)


class SameIdentity:
    """Finds the gallery images of a query's identity."""

    def __init__(self, queries: Labels, gallery: Labels) -> None:
        self._queries, self._gallery = queries, gallery
        self._by_pid = np.argsort(gallery.pids, kind="stable")  # groups an identity's images, in the gallery's order
        self._starts = np.searchsorted(gallery.pids, queries.pids, side="left", sorter=self._by_pid)
        self._ends = np.searchsorted(gallery.pids, queries.pids, side="right", sorter=self._by_pid)

    def of(self, query: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """The matches of a query, and the images from its own camera, which are left out; in the gallery's order."""
        same_pid = self._by_pid[self._starts[query] : self._ends[query]]
        same_camid = self._gallery.camids[same_pid] == self._queries.camids[query]
        return same_pid[~same_camid], same_pid[same_camid]


class _Market1501:
    def __init__(self, queries: Labels, gallery: Labels) -> None:
        self._same = SameIdentity(queries, gallery)

    def rank(self, row: NDArray[Any], query: int) -> NDArray[np.intp]:
        """The ranks of all matches. The row holds floats, and is modified."""
        matches, excluded = self._same.of(query)
        row[excluded] = np.nan  # NaN is sorted to the end and is equal to no distance
        if not len(matches):
            return matches
        distances, in_order = row[matches], np.sort(row)
        ranks = np.searchsorted(in_order, distances, side="left")
        tied = np.searchsorted(in_order, distances, side="right") - ranks > 1
        for match in np.flatnonzero(tied):  # images at the same distance that come earlier in the gallery rank first
            ranks[match] += np.count_nonzero(row[: matches[match]] == distances[match])
        return np.sort(ranks)

    def ranks(self, ranked: NDArray[np.intp]) -> Ranks:
        return (ranked[:1], ranked) if len(ranked) else None


class _CUHK03:
    def __init__(self, queries: Labels, gallery: Labels) -> None:
        self._queries, self._gallery = queries, gallery
        pids, codes = np.unique(gallery.pids, return_inverse=True)
        # NumPy sorts int16 fastest
        self._codes = codes.astype(np.int16) if len(pids) < 1 << 15 else codes

    def rank(
        self, row: NDArray[Any], query: int
    ) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp], int] | None:
        """The ranks of the images grouped by identity, or None if the query has no match.

        Returns:
            The ranks; the start and the size of each identity's group, in the order in which the identities first
            appear in the ranking; and the position of the query's identity in this order.
        """
        codes = self._codes
        same_pid = self._gallery.pids == self._queries.pids[query]
        excluded = same_pid & (self._gallery.camids == self._queries.camids[query])
        if np.array_equal(excluded, same_pid):
            return None
        order = np.argsort(row)
        order = order[~excluded[order]]
        ranks = np.argsort(codes[order], kind="stable")
        sizes = np.bincount(codes[order])
        starts = np.cumsum(sizes) - sizes
        by_appearance = np.argsort(ranks[starts])
        own_code = codes[np.argmax(same_pid)]
        return ranks, starts[by_appearance], sizes[by_appearance], int(np.argmax(by_appearance == own_code))

    def ranks(self, ranked: Any) -> Ranks:
        if ranked is None:
            return None
        ranks, starts, sizes, own = ranked
        # The same random numbers as np.random.choice for each identity in each draw, as torchreid calls it.
        drawn = ranks[starts + np.random.randint(0, sizes, size=(_CUHK03_DRAWS, len(sizes)))]
        return np.sum(drawn < drawn[:, [own]], axis=1), ranks[starts[own] :][: sizes[own]]
