"""Rankings and ranked lists from features, compared with those from the whole matrix and from torchreid's functions."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchreid import metrics, utils

from torchreid_snloss.evaluation import FeatureRanker, distances, nearest_gallery, rank_features, rank_gallery, reranked
from torchreid_snloss.rerank import re_ranking

SIZES = (23, 90)


def make(kind: str, seed: int = 0, sizes: tuple[int, int] = SIZES) -> list[Any]:
    """Makes features of queries and gallery, then identities, then cameras. Some queries have no match.

    The distances of the kind `"tied"` are the same numbers in any order of the computation, and many are equal.
    """
    rng = np.random.default_rng(seed)
    total = sum(sizes)
    pids, camids = rng.integers(0, total // 7, total), rng.integers(0, 3, total)
    features = rng.normal(size=(total // 7, 12))[pids] + 0.8 * rng.normal(size=(total, 12))
    if kind == "tied":
        features = np.eye(12)[rng.integers(0, 12, total)] * rng.choice([-2, 1, 4], (total, 1))
    if kind == "one camera":
        camids = (np.arange(total) >= sizes[0]).astype(int)
    pids[3:5] = [1000, -1]
    sides = slice(0, sizes[0]), slice(sizes[0], None)
    features = features.astype(np.float32)
    return [torch.from_numpy(features[side]) for side in sides] + [x[side] for x in (pids, camids) for side in sides]


def matrices(queries: torch.Tensor, gallery: torch.Tensor, metric: str) -> list[Any]:
    pairs = [(queries, gallery), (queries, queries), (gallery, gallery)]
    return [metrics.compute_distance_matrix(*pair, metric).numpy() for pair in pairs]


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("kind", ["random", "tied", "one camera"])
def test_same_as_from_the_whole_matrix(kind: str, metric: str) -> None:
    for seed in range(2):
        queries, gallery, *labels = make(kind, seed)
        matrix = metrics.compute_distance_matrix(queries, gallery, metric).numpy()
        for cuhk03 in (False, True):
            np.random.seed(seed)
            whole = rank_gallery(matrix, *labels, max_rank=20, use_metric_cuhk03=cuhk03)
            drawn = np.random.random()
            for block_size in (1, 7, None):
                np.random.seed(seed)
                ours = rank_features(queries, gallery, *labels, metric, 20, cuhk03, block_size=block_size)
                assert np.random.random() == drawn
                np.testing.assert_allclose(ours.cmc, whole.cmc, atol=1e-6)
                np.testing.assert_allclose(ours.average_precisions, whole.average_precisions, atol=1e-6)
                assert (ours.mean_ap, ours.mean_inp) == pytest.approx((whole.mean_ap, whole.mean_inp), abs=1e-6)
                assert np.isnan(ours.average_precisions[3:5]).all()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(("sizes", "block_size"), [((6, 16), 1), ((6, 16), 7), ((60, 200), 33), ((60, 200), None)])
def test_re_ranked_distances_are_torchreids(sizes: tuple[int, int], block_size: int | None, metric: str) -> None:
    queries, gallery, *_ = make("random", sizes=sizes)
    theirs = utils.rerank.re_ranking(*matrices(queries, gallery, metric))
    no_pids = [[-1] * sizes[0], [1] * sizes[1], [0] * sizes[0], [0] * sizes[1]]
    indices, ours = nearest_gallery(queries, gallery, *no_pids, sizes[1], metric, True, block_size)
    assert [sorted(row) for row in indices.tolist()] == [list(range(sizes[1]))] * sizes[0]
    np.testing.assert_allclose(ours, np.take_along_axis(theirs, indices, 1), atol=1e-5)
    assert (np.diff(ours) >= 0).all()


def test_re_ranked_result_is_that_of_the_whole_matrix() -> None:
    queries, gallery, *labels = make("random", sizes=(60, 200))
    whole = rank_gallery(utils.rerank.re_ranking(*matrices(queries, gallery, "cosine")), *labels)
    ranker = FeatureRanker(queries, gallery, *labels, "cosine", rerank=True)
    assert ranker.ranking().mean_ap == pytest.approx(whole.mean_ap, abs=1e-6)
    assert ranker.nearest(1)[0].tolist() == nearest_gallery(queries, gallery, *labels, 1, "cosine", True)[0].tolist()


def test_re_ranking_of_equal_distances_is_that_of_the_matrix() -> None:
    # Equal distances are taken in order there, queries first.
    queries, gallery, *_ = make("tied", sizes=(10, 40))
    whole = re_ranking(*matrices(queries, gallery, "cosine"))
    for block_size in (3, None):
        labels = [[-1] * 10, [1] * 40, [0] * 10, [0] * 40]
        indices, ours = nearest_gallery(queries, gallery, *labels, 40, "cosine", True, block_size)
        np.testing.assert_allclose(ours, np.take_along_axis(whole, indices, 1), atol=1e-6)


def test_no_distance_of_equal_features_is_below_0() -> None:
    queries = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))  # rounding would make one negative
    labels = (range(8), range(8), [0] * 8, [1] * 8)
    _, found = nearest_gallery(queries, queries.clone(), *labels, 1, "euclidean", True)
    assert (found >= 0).all()


@pytest.mark.parametrize("block_size", [1, None])
def test_ranked_lists_by_hand(block_size: int | None) -> None:
    # On a line. Gallery image 0 shows the first query's person from its own camera; 1 and 3 are equally far from it.
    queries, gallery = [[0.0], [10.0]], [[0.5], [2.0], [1.0], [-2.0]]
    indices, found = nearest_gallery(
        queries, gallery, [1, 2], [1, 1, 2, 3], [0, 0], [0, 1, 1, 0], 4, "euclidean", False, block_size
    )
    assert indices.dtype == np.int64
    assert indices.tolist() == [[2, 1, 3, -1], [1, 2, 0, 3]]
    np.testing.assert_array_equal(found, [[1, 4, 4, np.nan], [64, 81, 90.25, 144]])
    none_left = nearest_gallery([[0.0]], [[1.0]], [1], [1], [0], [0], 2)
    assert none_left[0].tolist() == [[-1, -1]]
    assert np.isnan(none_left[1]).all()


CONVERSIONS: list[Callable[[torch.Tensor], Any]] = [
    lambda x: x.half(),
    lambda x: x.bfloat16(),
    lambda x: x.half().numpy(),
    lambda x: x.numpy().astype(">f8"),
    lambda x: x.long(),
    lambda x: x.flip(0).numpy()[::-1],
    lambda x: x.T.contiguous().T,
    lambda x: x.clone().requires_grad_(),
    lambda x: x.tolist(),
]


@pytest.mark.parametrize("convert", CONVERSIONS)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_features_of_any_type(convert: Any, metric: str) -> None:
    queries, gallery, *labels = make("tied")  # small integers, which any type holds
    expected = rank_features(queries, gallery, *labels, metric)
    for ours in (
        rank_features(convert(queries), convert(gallery), *labels, metric),
        rank_features(queries, convert(gallery), *labels, metric, device="cpu"),
    ):
        np.testing.assert_array_equal(ours.average_precisions, expected.average_precisions)


def test_features_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, gallery, *labels = make("random")
    expected = nearest_gallery(queries.half().float(), gallery.half().float(), *labels, 5)
    monkeypatch.setattr(distances, "_CHUNK_BYTES", 1000)  # half precision is converted piece by piece
    monkeypatch.setattr(reranked, "_PAIRS_BYTES", 1000)
    found = nearest_gallery(queries.half(), gallery.half(), *labels, 5)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5)


def spoiled(row: int, value: float) -> torch.Tensor:
    features = make("random")[1].clone()
    features[row, 5] = value
    return features


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({0: spoiled(3, np.nan)}, r"the features of query 3 \(counted from 0\) hold NaN"),
        ({1: spoiled(17, -np.inf)}, r"the features of gallery image 17 \(counted from 0\) hold infinite values"),
        ({1: spoiled(17, 1e19)}, "the features of gallery image 17 are too large: squared distances overflow float32"),
        ({1: torch.zeros(0, 12)}, r"gallery_features must be of shape .*at least one of each, got \(0, 12\)"),
        ({0: torch.zeros(12)}, r"query_features must be of shape \(images, dimensions\).*got \(12,\)"),
        ({0: torch.zeros(23, 11)}, "the same number of dimensions, got 11 and 12"),
        ({3: [1, 2]}, r"g_pids must be of shape \(90,\), one for each gallery image, got \(2,\)"),
        ({2: [-5] * 23}, "none of the 23 queries has a gallery image of its identity under another camera"),
        ({6: "manhattan"}, "metric must be one of euclidean, cosine, got 'manhattan'"),
        ({7: 0}, "max_rank must be at least 1, got 0"),
        ({10: 0}, "block_size must be at least 1, got 0"),
    ],
)
def test_bad_input(changes: dict[int, Any], words: str) -> None:
    args = [*make("random"), "euclidean", 50, False, False, None]
    for number, value in changes.items():
        args[number] = value[: len(args[0])] if number == 0 and value.shape[-1] == 12 and value.ndim == 2 else value
    with pytest.raises(ValueError, match=words):
        rank_features(*args)


def test_bad_input_to_ranked_lists_and_re_ranking() -> None:
    args = make("random")
    with pytest.raises(ValueError, match="topk must be at least 1, got 0"):
        nearest_gallery(*args, topk=0)
    with pytest.raises(TypeError, match="query_features must hold real numbers, got <U1"):
        rank_features([["a"]], *args[1:])
    with pytest.raises(TypeError, match=re.escape("gallery_features must hold real numbers, got torch.complex64")):
        rank_features(args[0], args[1] + 0j, *args[2:])
    args[1] = spoiled(17, 1e11)
    with pytest.raises(ValueError, match="too large to re-rank: squared distances of query 0 overflow float32"):
        rank_features(*args, rerank=True)


class StopError(Exception):
    pass


def test_stops_between_blocks() -> None:
    args, calls = make("random"), 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise StopError

    for rerank in (False, True):
        calls = 0
        with pytest.raises(StopError):
            rank_features(*args, rerank=rerank, block_size=7, check_stop=stop)
        assert calls == 3


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("rerank", [False, True])
def test_takes_a_tenth_of_the_matrix(rerank: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "_BLOCK_BYTES", 4 << 20)
    monkeypatch.setattr(reranked, "_TILE_BYTES", 8 << 20)
    sizes = (100, 9900) if rerank else (2000, 50_000)  # all distances take 400 MB
    args = make("random", sizes=sizes)
    rank_features(*make("random"), rerank=rerank)  # what is allocated once
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = memory("VmRSS")
    rank_features(*args, rerank=rerank)
    assert memory("VmHWM") - before < 40e6


def memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))
