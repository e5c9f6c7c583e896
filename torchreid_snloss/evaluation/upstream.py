"""`evaluate_rank` with the signature of torchreid's, and the mINP and average precisions that it does not return."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from torchreid_snloss.evaluation.ranking import Ranking, rank_gallery
from torchreid_snloss.labels import comparable_labels

__all__ = ["capture_rankings", "capturing", "evaluate_rank"]

_CAPTURED: ContextVar[list[Ranking] | None] = ContextVar("capture_rankings", default=None)


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
