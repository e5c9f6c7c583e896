"""CMC and mAP on a test of Market-1501's size, CUHK03's metric, and re-ranking."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torchreid import metrics, utils

from benchmarks.alone import Usage, run_alone
from benchmarks.timing import Row
from torchreid_snloss import evaluation, rerank

__all__ = ["measure", "prepare"]

_CASES = {
    "Market-1501's metric, 3,368 x 15,913": ("market1501", 3368, 15913, 751),
    "CUHK03's metric, 1,400 x 5,332": ("cuhk03", 1400, 5332, 700),
    "re-ranking, 500 x 2,500": ("rerank", 500, 2500, 100),
}
_OURS, _THEIRS = "torchreid-snloss", "torchreid in Python"


def measure(repetitions: int = 3) -> list[Row]:
    """Time and peak memory above the given distances, each run in a process of its own."""
    results = []
    for case, size in _CASES.items():
        usages: dict[str, list[Usage]] = {_THEIRS: [], _OURS: []}
        for _ in range(repetitions):
            for who, runs in usages.items():
                runs.append(run_alone("benchmarks.evaluator", who, *size))
        for unit, scale, values in (
            ("ms", 1e3, {who: statistics.median(run.seconds for run in runs) for who, runs in usages.items()}),
            ("MiB", 1, {who: statistics.median(run.mib for run in runs) for who, runs in usages.items()}),
        ):
            results += [
                Row(f"evaluator, {unit}", case, who, scale * value, unit, value / values[_THEIRS])
                for who, value in values.items()
            ]
    return results


def prepare(who: str, what: str, queries: str, gallery: str, identities: str) -> Callable[[], Any]:
    """What is measured, on random features of identities under six cameras."""
    rng = np.random.default_rng(0)
    num_queries, num_images = int(queries), int(queries) + int(gallery)
    pids, camids = rng.integers(0, int(identities), num_images), rng.integers(0, 6, num_images)
    people = torch.from_numpy(rng.normal(size=(int(identities), 64)).astype(np.float32))
    features = people[torch.from_numpy(pids)] + torch.from_numpy(rng.normal(size=(num_images, 64)).astype(np.float32))
    query, rest = features[:num_queries], features[num_queries:]
    distances = metrics.compute_distance_matrix(query, rest).numpy()
    if what == "rerank":
        among = [metrics.compute_distance_matrix(part, part).numpy() for part in (query, rest)]
        re_ranking = rerank.re_ranking if who == _OURS else utils.re_ranking
        return lambda: re_ranking(distances, *among)
    labels = (pids[:num_queries], pids[num_queries:], camids[:num_queries], camids[num_queries:])
    evaluate_rank = evaluation.evaluate_rank if who == _OURS else metrics.evaluate_rank
    return lambda: evaluate_rank(distances, *labels, use_metric_cuhk03=what == "cuhk03", use_cython=False)
