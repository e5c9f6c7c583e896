"""Computes CMC, mAP and mINP from the distances between queries and gallery.

torchreid's Python evaluator calls argsort on the whole distance matrix and then loops over every rank of every query.
This module only sorts the values of each row, which is several times faster in NumPy, and looks up the ranks of the few
matches in the sorted values.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from torchreid_snloss.deprecation import renamed
from torchreid_snloss.labels import comparable_labels
from torchreid_snloss.threads import in_threads

__all__ = ["Ranking", "capture_rankings", "capturing", "evaluate_rank", "rank_gallery"]

__getattr__ = renamed(
    __name__,
    {
        "noted_rankings": "torchreid_snloss.evaluation.capture_rankings",
        "noting": "torchreid_snloss.evaluation.capturing",
    },
)

_CUHK03_DRAWS = 10


@dataclass(frozen=True, eq=False)
class Ranking:
    """How well a gallery was ranked. Queries without a match do not count.

    Attributes:
        cmc: (max_rank,), float32 in [0, 1]. The value at index k - 1 is the share of queries with a match among the
            first k images.
        mean_ap: mAP in [0, 1], the mean over queries of the average precision.
        mean_inp: mINP in [0, 1], the mean over queries of the number of matches divided by the rank of the last match
            (Ye et al., "Deep Learning for Person Re-identification: A Survey and Outlook", TPAMI 2021).
        average_precisions: (queries,), float64 in [0, 1], the average precision of each query; NaN for a query without
            a match.
    """

    cmc: NDArray[np.float32]
    mean_ap: float
    mean_inp: float
    average_precisions: NDArray[np.float64]


def evaluate_rank(
    distmat: ArrayLike,
    q_pids: ArrayLike,
    g_pids: ArrayLike,
    q_camids: ArrayLike,
    g_camids: ArrayLike,
    max_rank: int = 50,
    use_metric_cuhk03: bool = False,
    use_cython: bool = True,
) -> tuple[NDArray[np.float32], float]:
    """Evaluates with `rank_gallery`, but has the signature of `torchreid.metrics.evaluate_rank`, which it replaces.

    Args:
        distmat: (queries, gallery), the distances.
        q_pids: (queries,), the identities of the queries, integers of any size and type or strings.
        g_pids: (gallery,), the identities of the gallery.
        q_camids: (queries,), the cameras of the queries.
        g_camids: (gallery,), the cameras of the gallery.
        max_rank: The length of the CMC curve. A smaller gallery shortens the curve, and a printed line says so, as in
            torchreid.
        use_metric_cuhk03: Whether to use the metric of CUHK03 in place of that of Market-1501.
        use_cython: Ignored.

    Returns:
        The CMC curve and mAP, which equal torchreid's up to rounding. If fewer than `max_rank` images remain for a
        query, torchreid's curve is too short or its evaluator fails; here the curve continues with 1.

    Raises:
        ValueError: As `rank_gallery` does.
        TypeError: As `rank_gallery` does.
    """
    ranking = rank_gallery(distmat, q_pids, g_pids, q_camids, g_camids, max_rank, use_metric_cuhk03)
    if len(ranking.cmc) < max_rank:
        print(f"Note: the gallery has {len(ranking.cmc)} images, so the CMC curve ends there, not at {max_rank}")
    captured = _CAPTURED.get()
    if captured is not None:
        captured.append(ranking)
    return ranking.cmc, ranking.mean_ap


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
    num_queries, num_gallery = rows.shape
    own_pids, other_pids = comparable_labels(rows.shape, q_pids=q_pids, g_pids=g_pids)
    own_camids, other_camids = comparable_labels(rows.shape, q_camids=q_camids, g_camids=g_camids)
    queries, gallery = _Labels(own_pids, own_camids), _Labels(other_pids, other_camids)
    max_rank = min(max_rank, num_gallery)

    rank = _ranks_of_drawn_and_all_matches if use_metric_cuhk03 else _ranks_of_first_and_all_matches
    # Summed in float32, query by query, as torchreid does: its rounding can exceed 1e-6 in the metric of CUHK03.
    curves = np.zeros(max_rank, dtype=np.float32)
    average_precisions, inverse_penalties = np.full(num_queries, np.nan), []
    for query, ranks in enumerate(rank(rows, queries, gallery)):
        if ranks is None:
            continue
        first, matches = ranks
        curve = np.bincount(first[first < max_rank], minlength=max_rank).cumsum() / len(first)
        curves += curve.astype(np.float32)
        average_precisions[query] = np.mean(np.arange(1, len(matches) + 1) / (matches + 1))
        inverse_penalties.append(len(matches) / (matches[-1] + 1))
    matched = average_precisions[~np.isnan(average_precisions)]
    if not len(matched):
        raise ValueError(f"none of the {num_queries} queries has a gallery image of its identity under another camera")
    cmc = curves / np.float32(len(matched))
    return Ranking(cmc, float(np.mean(matched)), float(np.mean(inverse_penalties)), average_precisions)


@dataclass(frozen=True, eq=False)
class _Labels:
    pids: NDArray[Any]
    camids: NDArray[Any]


# For one query: the ranks of the first match in each draw (a single one in the metric of Market-1501), and the ranks of
# all matches in ascending order. Ranks are counted from 0. None for a query without a match.
_Ranks = tuple[NDArray[np.intp], NDArray[np.intp]] | None


def _ranks_of_first_and_all_matches(rows: NDArray[Any], queries: _Labels, gallery: _Labels) -> Iterator[_Ranks]:
    by_pid = np.argsort(gallery.pids, kind="stable")  # groups the images of an identity, in the order of the gallery
    starts = np.searchsorted(gallery.pids, queries.pids, side="left", sorter=by_pid)
    ends = np.searchsorted(gallery.pids, queries.pids, side="right", sorter=by_pid)
    dtype = np.result_type(rows.dtype, np.float32)  # floats that hold the distances and are fast to sort

    def ranks_of_matches(query: int) -> NDArray[np.intp]:
        _check_numbers(rows, query)
        # A float64 can't hold every 64-bit integer; the order of the values is all that counts.
        given = np.unique(rows[query], return_inverse=True)[1] if rows.dtype.kind in "iu" else rows[query]
        row = given.astype(dtype)  # a copy
        same_pid = by_pid[starts[query] : ends[query]]
        same_camid = gallery.camids[same_pid] == queries.camids[query]
        row[same_pid[same_camid]] = np.nan  # NaN is sorted to the end and is equal to no distance
        matches: NDArray[np.intp] = same_pid[~same_camid]
        if not len(matches):
            return matches
        distances, in_order = row[matches], np.sort(row)
        ranks = np.searchsorted(in_order, distances, side="left")
        tied = np.searchsorted(in_order, distances, side="right") - ranks > 1
        for match in np.flatnonzero(tied):  # images at the same distance that come earlier in the gallery rank first
            ranks[match] += np.count_nonzero(row[: matches[match]] == distances[match])
        return np.sort(ranks)

    for matches in in_threads(ranks_of_matches, len(rows), "ranking"):
        yield (matches[:1], matches) if len(matches) else None


def _ranks_of_drawn_and_all_matches(rows: NDArray[Any], queries: _Labels, gallery: _Labels) -> Iterator[_Ranks]:
    pids, codes = np.unique(gallery.pids, return_inverse=True)
    if len(pids) < 1 << 15:
        codes = codes.astype(np.int16)  # the type that NumPy sorts fastest

    def ranks_by_identity(query: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp], int] | None:
        """The ranks of the images grouped by identity, or None if the query has no match.

        Returns:
            The ranks; the start and the size of each identity's group, in the order in which the identities first
            appear in the ranking; and the position of the query's identity in this order.
        """
        _check_numbers(rows, query)
        same_pid = gallery.pids == queries.pids[query]
        excluded = same_pid & (gallery.camids == queries.camids[query])
        if np.array_equal(excluded, same_pid):
            return None
        order = np.argsort(rows[query])
        order = order[~excluded[order]]
        ranks = np.argsort(codes[order], kind="stable")
        sizes = np.bincount(codes[order])
        starts = np.cumsum(sizes) - sizes
        by_appearance = np.argsort(ranks[starts])
        own_code = codes[np.argmax(same_pid)]
        return ranks, starts[by_appearance], sizes[by_appearance], int(np.argmax(by_appearance == own_code))

    for ranked in in_threads(ranks_by_identity, len(rows), "ranking"):
        if ranked is None:
            yield None
            continue
        ranks, starts, sizes, own = ranked
        # The same random numbers as np.random.choice for each identity in each draw, as torchreid calls it.
        drawn = ranks[starts + np.random.randint(0, sizes, size=(_CUHK03_DRAWS, len(sizes)))]
        yield np.sum(drawn < drawn[:, [own]], axis=1), ranks[starts[own] :][: sizes[own]]


def _check_numbers(rows: NDArray[Any], query: int) -> None:
    if np.isnan(rows[query].min()):
        raise ValueError(f"{np.isnan(rows[query]).sum()} of the distances of query {query} are NaN")


_CAPTURED: ContextVar[list[Ranking] | None] = ContextVar("capture_rankings", default=None)


@contextlib.contextmanager
def capture_rankings() -> Iterator[list[Ranking]]:
    """A context that yields a list, to which `evaluate_rank` appends each ranking.

    With nested contexts, rankings are only appended to the innermost list.
    """
    rankings: list[Ranking] = []
    token = _CAPTURED.set(rankings)
    try:
        yield rankings
    finally:
        _CAPTURED.reset(token)


def capturing(evaluate_rank: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """Makes another `evaluate_rank`, such as torchreid's compiled one, work with `capture_rankings`.

    Args:
        evaluate_rank: A function with the signature of torchreid's.

    Returns:
        A function with the same results. In a `capture_rankings` block it also appends a `Ranking` with its CMC and
        mAP, and the mINP and average precisions of `rank_gallery`.
    """

    @functools.wraps(evaluate_rank)
    def evaluate(
        distmat: Any, q_pids: Any, g_pids: Any, q_camids: Any, g_camids: Any, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        # A compiled one takes any number for an integer.
        comparable_labels(np.shape(distmat), q_pids=q_pids, g_pids=g_pids)
        comparable_labels(np.shape(distmat), q_camids=q_camids, g_camids=g_camids)
        cmc, mean_ap = evaluate_rank(distmat, q_pids, g_pids, q_camids, g_camids, *args, **kwargs)
        captured = _CAPTURED.get()
        if captured is not None:
            # What is kept of it is the same in both metrics, and the metric of Market-1501 takes no random numbers.
            ranking = rank_gallery(distmat, q_pids, g_pids, q_camids, g_camids)
            captured.append(replace(ranking, cmc=np.asarray(cmc), mean_ap=float(mean_ap)))
        return cmc, mean_ap

    return evaluate
