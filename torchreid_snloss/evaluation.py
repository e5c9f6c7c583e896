"""CMC, mAP and mINP of a gallery ranked for each query.

torchreid's evaluator in Python argsorts the whole matrix and then walks through every rank of every query. Here the
values of a row are sorted alone, which numpy does several times faster, and the few matches are looked up in them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from torchreid_snloss.progress import progress_bar

__all__ = ["Ranking", "capture_rankings", "capturing", "evaluate_rank", "in_threads", "rank_gallery"]

_T = TypeVar("_T")
_CUHK03_DRAWS = 10
_PER_TURN = 256  # bounds what is computed ahead of its use


@dataclass(frozen=True, eq=False)
class Ranking:
    """How well galleries were ranked, over the queries that have a match.

    Attributes:
        cmc: float32 (max_rank,), in [0, 1]; at k - 1 the share of queries with a match among the first k images.
        mean_ap: mAP in [0, 1], the mean over queries of the average precision.
        mean_inp: mINP in [0, 1], the mean over queries of matches / rank of the last match (Ye et al., "Deep Learning
            for Person Re-identification: A Survey and Outlook", TPAMI 2021).
    """

    cmc: NDArray[np.float32]
    mean_ap: float
    mean_inp: float


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
    """:func:`rank_gallery` with the signature of ``torchreid.metrics.evaluate_rank``, whose place it takes.

    Args:
        distmat: as in :func:`rank_gallery`, and so are the five arguments after it.
        q_pids: identities of the queries.
        g_pids: identities of the gallery.
        q_camids: cameras of the queries.
        g_camids: cameras of the gallery.
        max_rank: length of the CMC curve; a smaller gallery shortens it, and a line printed says so, as in torchreid.
        use_metric_cuhk03: CUHK03's metric in place of Market-1501's.
        use_cython: ignored; there is one evaluator for both.

    Returns:
        the CMC curve and mAP, as torchreid's evaluators give them, but for rounding. Where few images are left to a
        query, torchreid's curve is shorter than ``max_rank`` or fails; this one goes on with 1.

    Raises:
        ValueError: as :func:`rank_gallery`.
        TypeError: as :func:`rank_gallery`.
    """
    ranking = rank_gallery(distmat, q_pids, g_pids, q_camids, g_camids, max_rank, use_metric_cuhk03)
    if len(ranking.cmc) < max_rank:
        print(f"Note: the gallery has {len(ranking.cmc)} images, so the CMC curve ends there, not at {max_rank}")
    noted = _NOTED.get()
    if noted is not None:
        noted.append(ranking)
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
    """Ranks the gallery for each query, nearest first, and says how far up the matches are.

    A match is a gallery image of the query's identity under another camera. Images of its identity under its own camera
    are left out of its ranking, and queries without a match out of the means (Zheng et al., "Scalable Person
    Re-identification: A Benchmark", ICCV 2015). Equal distances are ranked in the gallery's order.

    In CUHK03's metric the CMC curve is of one image of each identity, drawn at random, and the mean of 10 draws (Li et
    al., "DeepReID", CVPR 2014). They come from numpy's global generator, the same numbers in the same order as in
    torchreid. Which image a number stands for depends on the order of equal distances; here this is
    ``np.argsort``'s, as in torchreid, so that the same seed gives the same curve.

    Works in as many threads as torch does (``torch.get_num_threads()``), on a few rows each at a time.

    Args:
        distmat: (queries, gallery) distances, of any real type; smaller is nearer, infinity is allowed. Not changed.
        q_pids: (queries,) identities.
        g_pids: (gallery,) identities.
        q_camids: (queries,) cameras.
        g_camids: (gallery,) cameras.
        max_rank: length of the CMC curve, >= 1; the gallery's size where that is less.
        use_metric_cuhk03: CUHK03's metric in place of Market-1501's.

    Returns:
        the ranking's figures.

    Raises:
        ValueError: if shapes do not fit, there is no query or gallery image, ``max_rank`` is below 1, a distance is NaN
            or no query has a match.
        TypeError: if distances are not real numbers.
    """
    rows = np.asarray(distmat)
    if rows.ndim != 2 or 0 in rows.shape:
        raise ValueError(f"distmat must be a matrix (queries, gallery) with at least one of each, got {rows.shape}")
    if rows.dtype.kind not in "biuf":
        raise TypeError(f"distmat must hold real numbers, got {rows.dtype}")
    if max_rank < 1:
        raise ValueError(f"max_rank must be at least 1, got {max_rank}")
    num_queries, num_gallery = rows.shape
    queries = _Labels(_labels("q_pids", q_pids, num_queries), _labels("q_camids", q_camids, num_queries))
    gallery = _Labels(_labels("g_pids", g_pids, num_gallery), _labels("g_camids", g_camids, num_gallery))
    max_rank = min(max_rank, num_gallery)

    rank = _ranks_of_drawn_and_all_matches if use_metric_cuhk03 else _ranks_of_first_and_all_matches
    # In float32 query by query as torchreid's, whose rounding can exceed 1e-6 in CUHK03's metric.
    curves = np.zeros(max_rank, dtype=np.float32)
    precisions, penalties = [], []
    for first, matches in rank(rows, queries, gallery):
        found = np.bincount(first[first < max_rank], minlength=max_rank).cumsum() / len(first)
        curves += found.astype(np.float32)
        precisions.append(np.mean(np.arange(1, len(matches) + 1) / (matches + 1)))
        penalties.append(len(matches) / (matches[-1] + 1))
    if not precisions:
        raise ValueError(f"none of the {num_queries} queries has a gallery image of its identity under another camera")
    cmc = curves / np.float32(len(precisions))
    return Ranking(cmc, mean_ap=float(np.mean(precisions)), mean_inp=float(np.mean(penalties)))


@dataclass(frozen=True, eq=False)
class _Labels:
    pids: NDArray[Any]
    camids: NDArray[Any]


# For a query: ranks from 0 of the first match, in one drawing or in each of several, and of all matches, ascending.
_Ranks = tuple[NDArray[np.intp], NDArray[np.intp]]


def _ranks_of_first_and_all_matches(rows: NDArray[Any], queries: _Labels, gallery: _Labels) -> Iterator[_Ranks]:
    by_pid = np.argsort(gallery.pids, kind="stable")  # an identity's images lie side by side, in the gallery's order
    starts = np.searchsorted(gallery.pids, queries.pids, side="left", sorter=by_pid)
    ends = np.searchsorted(gallery.pids, queries.pids, side="right", sorter=by_pid)
    fast = np.result_type(rows.dtype, np.float32)  # floats that hold what rows hold and are sorted fast

    def ranks_of_matches(query: int) -> NDArray[np.intp]:
        _check_numbers(rows, query)
        row = rows[query].astype(fast)  # a copy
        same_pid = by_pid[starts[query] : ends[query]]
        same_camid = gallery.camids[same_pid] == queries.camids[query]
        row[same_pid[same_camid]] = np.nan  # sorted last, and equal to nothing
        matches: NDArray[np.intp] = same_pid[~same_camid]
        if not len(matches):
            return matches
        distances, in_order = row[matches], np.sort(row)
        ranks = np.searchsorted(in_order, distances, side="left")
        tied = np.searchsorted(in_order, distances, side="right") - ranks > 1
        for match in np.flatnonzero(tied):  # behind those that are as far and come first in the gallery
            ranks[match] += np.count_nonzero(row[: matches[match]] == distances[match])
        return np.sort(ranks)

    for matches in in_threads(ranks_of_matches, len(rows), "ranking"):
        if len(matches):
            yield matches[:1], matches


def _ranks_of_drawn_and_all_matches(rows: NDArray[Any], queries: _Labels, gallery: _Labels) -> Iterator[_Ranks]:
    pids, codes = np.unique(gallery.pids, return_inverse=True)
    if len(pids) < 1 << 15:
        codes = codes.astype(np.int16)  # what numpy sorts fastest

    def ranks_by_identity(query: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp], int] | None:
        """Ranks of each identity's images one after the other; the identities' starts and sizes; which is the query's.

        The identities are in the order in which they appear in the ranking.
        """
        _check_numbers(rows, query)
        same_pid = gallery.pids == queries.pids[query]
        left_out = same_pid & (gallery.camids == queries.camids[query])
        if np.array_equal(left_out, same_pid):
            return None
        order = np.argsort(rows[query])
        order = order[~left_out[order]]
        ranks = np.argsort(codes[order], kind="stable")
        sizes = np.bincount(codes[order])
        starts = np.cumsum(sizes) - sizes
        by_appearance = np.argsort(ranks[starts])
        own_code = codes[np.argmax(same_pid)]
        return ranks, starts[by_appearance], sizes[by_appearance], int(np.argmax(by_appearance == own_code))

    for ranked in in_threads(ranks_by_identity, len(rows), "ranking"):
        if ranked is not None:
            ranks, starts, sizes, own = ranked
            # Takes from the generator what np.random.choice would, identity by identity, draw by draw.
            drawn = ranks[starts + np.random.randint(0, sizes, size=(_CUHK03_DRAWS, len(sizes)))]
            yield np.sum(drawn < drawn[:, [own]], axis=1), ranks[starts[own] :][: sizes[own]]


def _check_numbers(rows: NDArray[Any], query: int) -> None:
    if np.isnan(rows[query].min()):
        raise ValueError(f"{np.isnan(rows[query]).sum()} of the distances of query {query} are NaN")


def _labels(name: str, labels: ArrayLike, length: int) -> NDArray[Any]:
    array = np.asarray(labels)
    if array.shape != (length,):
        rows = "row" if name.startswith("q") else "column"
        raise ValueError(f"{name} must be of shape ({length},), one for each {rows} of distmat, got {array.shape}")
    return array


def in_threads(function: Callable[[int], _T], count: int, description: str, unit: str = "query") -> Iterator[_T]:
    """Yields ``function(0)`` to ``function(count - 1)`` in this order, computed in as many threads as torch uses.

    Args:
        function: of an index.
        count: how many indices.
        description: what stands before the progress bar.
        unit: what an index counts.
    """
    with ThreadPoolExecutor(torch.get_num_threads()) as pool, progress_bar(description, count, unit) as bar:
        for start in range(0, count, _PER_TURN):
            end = min(start + _PER_TURN, count)
            yield from pool.map(function, range(start, end))
            bar.update(end - start)


_NOTED: ContextVar[list[Ranking] | None] = ContextVar("capture_rankings", default=None)


@contextlib.contextmanager
def capture_rankings() -> Iterator[list[Ranking]]:
    """Within it :func:`evaluate_rank` puts its rankings into the list that this gives. The innermost list gets them."""
    rankings: list[Ranking] = []
    token = _NOTED.set(rankings)
    try:
        yield rankings
    finally:
        _NOTED.reset(token)


def capturing(evaluate_rank: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """Lets another ``evaluate_rank``, torchreid's compiled one, note mINP too; what it gives stays as it is.

    Args:
        evaluate_rank: with torchreid's signature.

    Returns:
        the function, which within :func:`capture_rankings` notes its CMC and mAP with the mINP of :func:`rank_gallery`.
    """

    @functools.wraps(evaluate_rank)
    def evaluate(
        distmat: Any, q_pids: Any, g_pids: Any, q_camids: Any, g_camids: Any, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        cmc, mean_ap = evaluate_rank(distmat, q_pids, g_pids, q_camids, g_camids, *args, **kwargs)
        noted = _NOTED.get()
        if noted is not None:
            # mINP is the same in both metrics, and Market-1501's draws nothing.
            ranking = rank_gallery(distmat, q_pids, g_pids, q_camids, g_camids)
            noted.append(replace(ranking, cmc=np.asarray(cmc), mean_ap=float(mean_ap)))
        return cmc, mean_ap

    return evaluate
