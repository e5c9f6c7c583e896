"""Evaluation and re-ranking from features at the sizes of large test sets, beside their bare matrix products."""

from __future__ import annotations

import contextlib
import io
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torchreid import metrics, utils

from benchmarks.alone import Usage, run_alone
from benchmarks.timing import Row
from torchreid_snloss.evaluation import rank_features
from torchreid_snloss.progress import progress

__all__ = ["CASES", "Case", "measure", "prepare"]


class Case(NamedTuple):
    """A test set, and what is measured on it."""

    name: str
    queries: int
    gallery: int
    identities: int
    rerank: bool
    with_torchreid: bool = False
    """whether torchreid's own functions are measured too; they need many times the matrix"""


CASES = (
    Case("evaluation, small, 421 x 1,989", 421, 1989, 94, False, with_torchreid=True),
    Case("re-ranking, small, 421 x 1,989", 421, 1989, 94, True, with_torchreid=True),
    Case("evaluation, Market-1501, 3,368 x 15,913", 3368, 15913, 750, False),
    Case("re-ranking, Market-1501, 3,368 x 15,913", 3368, 15913, 750, True),
    Case("evaluation, MSMT17, 11,659 x 82,161", 11659, 82161, 3060, False),
    Case("re-ranking, half of MSMT17, 5,830 x 41,080", 5830, 41080, 1530, True),
    Case("re-ranking, MSMT17, 11,659 x 82,161", 11659, 82161, 3060, True),
    Case("evaluation, Market-1501 + 500k, 3,368 x 519,700", 3368, 519700, 20000, False),
)
_DIMENSION = 2048
_CAMERAS = 6
_BARE, _OURS, _THEIRS = "bare matrix products", "torchreid-snloss", "torchreid in Python"
_ROWS = 512  # of the bare products at a time


def measure(cases: Sequence[Case] = CASES, repetitions: int = 1) -> list[Row]:
    """Seconds by the clock and of the processor, and peak memory above the features; each run in a process of its own.

    The ratios are those to the bare products, and to the memory of the matrix of queries and gallery.
    """
    rows: list[Row] = []
    for case in progress("large", cases, "case", len(cases)):
        names = [_BARE, _OURS, *([_THEIRS] if case.with_torchreid else [])]
        usages: dict[str, list[Usage]] = {name: [] for name in names}
        for _ in range(repetitions):
            for name, runs in usages.items():
                size = (case.queries, case.gallery, case.identities, _DIMENSION)
                runs.append(run_alone(__name__, name, int(case.rerank), *size))
        seconds, cpu_seconds, mib = (
            {name: statistics.median(getattr(run, what) for run in runs) for name, runs in usages.items()}
            for what in ("seconds", "cpu_seconds", "mib")
        )
        matrix = 4 * case.queries * case.gallery / 2**20
        for suite, values in (("large, s", seconds), ("large, CPU s", cpu_seconds)):
            rows += [Row(suite, case.name, name, value, "s", value / values[_BARE]) for name, value in values.items()]
        rows += [Row("large, MiB", case.name, name, mib[name], "MiB", mib[name] / matrix) for name in names[1:]]
    return sorted(rows, key=lambda row: row.suite, reverse=True)


def prepare(who: str, rerank: str, queries: str, gallery: str, identities: str, dimension: str) -> Callable[[], Any]:
    """What is measured, on unit features around a center for each identity."""
    num_queries, total, width = int(queries), int(queries) + int(gallery), int(dimension)
    generator = torch.Generator().manual_seed(0)
    pids = torch.randint(int(identities), (total,), generator=generator)
    camids = torch.randint(_CAMERAS, (total,), generator=generator).numpy()
    centers = torch.randn(int(identities), width, generator=generator)
    features = torch.empty(total, width)
    for start in range(0, total, 4096):
        part = features[start : start + 4096].normal_(generator=generator).mul_(4)
        part += centers[pids[start : start + 4096]]
        part /= torch.linalg.vector_norm(part, dim=1, keepdim=True)
    query, rest = features[:num_queries], features[num_queries:]
    sides = [x[side] for x in (pids.numpy(), camids) for side in (slice(num_queries), slice(num_queries, None))]
    if who == _BARE:
        return lambda: _products(query, features if int(rerank) else rest, features if int(rerank) else None)
    if who == _OURS:
        return lambda: rank_features(query, rest, *sides, rerank=bool(int(rerank)))
    return lambda: _upstream(query, rest, sides, bool(int(rerank)))


def _products(query: torch.Tensor, others: torch.Tensor, every: torch.Tensor | None) -> None:
    """The products of queries and gallery; for re-ranking, those of all images, which include them."""
    left = query if every is None else every
    for start in range(0, len(left), _ROWS):
        torch.mm(left[start : start + _ROWS], others.T)


def _upstream(query: torch.Tensor, rest: torch.Tensor, sides: list[np.ndarray[Any, Any]], rerank: bool) -> Any:
    pairs = [(query, rest), (query, query), (rest, rest)][: 3 if rerank else 1]
    matrices = [metrics.compute_distance_matrix(*pair).numpy() for pair in pairs]
    matrix = utils.re_ranking(*matrices) if rerank else matrices[0]
    with contextlib.redirect_stdout(io.StringIO()):
        return metrics.evaluate_rank(matrix, *sides, use_cython=False)
