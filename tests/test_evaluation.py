"""CMC, mAP, mINP and re-ranking, compared with torchreid's own functions and with values computed by hand."""

from __future__ import annotations

import re
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_datamanager, make_engine, run
from torch import nn
from torchreid import metrics, utils

from torchreid_snloss import ImageSNEngine
from torchreid_snloss.evaluation import capture_rankings, capturing, evaluate_rank, rank_gallery
from torchreid_snloss.rerank import re_ranking
from torchreid_snloss.threads import in_threads

# Two queries with known ranks, and a third whose identity is not in the gallery. The image nearest to the first query
# is of its identity and from its own camera, so it is left out. Then come the identities 2, 1 (a match), 3, 2, 1 (a
# match). The second query has one match, which comes first: the other image of its identity is from its own camera.
G_PIDS, G_CAMIDS = np.array([1, 2, 1, 3, 2, 1]), np.array([0, 0, 1, 1, 1, 2])
Q_PIDS, Q_CAMIDS = np.array([1, 2, 9]), np.array([0, 1, 0])
DISTANCES = np.array([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.9, 0.2, 0.8, 0.7, 0.1, 0.6], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]])
BY_HAND = (DISTANCES, Q_PIDS, G_PIDS, Q_CAMIDS, G_CAMIDS)

Args = tuple[Any, Any, Any, Any, Any]


def make(num_queries: int, num_gallery: int, num_pids: int, *, tied: bool = False, seed: int = 0) -> Args:
    """Makes random distances, all different unless `tied`, and labels of three cameras.

    The identities of two queries are not in the gallery.
    """
    rng = np.random.default_rng(seed)
    g_pids, q_pids = rng.integers(0, num_pids, num_gallery), rng.integers(0, num_pids, num_queries)
    q_pids[3:5] = [num_pids, -1]
    shape = (num_queries, num_gallery)
    if tied:
        distances = rng.integers(0, 8, shape)
    else:  # images of the query's identity are nearer
        distances = rng.permutation(num_queries * num_gallery).reshape(shape)
        distances = np.where(q_pids[:, None] == g_pids, distances / 2 + 0.25, distances)
    q_camids, g_camids = rng.integers(0, 3, num_queries), rng.integers(0, 3, num_gallery)
    return distances.astype(np.float32), q_pids, g_pids, q_camids, g_camids


def by_the_formula(
    distances: Any, q_pids: Any, g_pids: Any, q_camids: Any, g_camids: Any
) -> tuple[Any, Any, list[float], list[float]]:
    """Computes the mean CMC curve; and for each query the first match's rank, average precision and inverse penalty."""
    curves, firsts, precisions, penalties = [], [], [], []
    for row, pid, camid in zip(distances, q_pids, q_camids):
        order = [i for i in sorted(range(len(row)), key=lambda i: row[i]) if (g_pids[i], g_camids[i]) != (pid, camid)]
        ranks = [rank for rank, i in enumerate(order, start=1) if g_pids[i] == pid]
        if ranks:
            firsts.append(ranks[0])
            curves.append([ranks[0] <= k for k in range(1, len(row) + 1)])
            precisions.append(float(np.mean([n / rank for n, rank in enumerate(ranks, start=1)])))
            penalties.append(len(ranks) / ranks[-1])
    return np.mean(curves, axis=0), firsts, precisions, penalties


@pytest.fixture
def _numpy_bool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Provides np.bool, which torchreid uses in CUHK03's metric and NumPy 1.24 to 1.26 do not have."""
    monkeypatch.setattr(np, "bool", np.bool_, raising=False)


def test_by_hand() -> None:
    ranking = rank_gallery(*BY_HAND, max_rank=3)
    np.testing.assert_allclose(ranking.cmc, [0.5, 1, 1])
    assert ranking.cmc.dtype == np.float32
    assert ranking.mean_ap == pytest.approx(((1 / 2 + 2 / 5) / 2 + 1) / 2)
    assert ranking.mean_inp == pytest.approx((2 / 5 + 1) / 2)
    assert ranking.average_precisions.dtype == np.float64
    np.testing.assert_allclose(ranking.average_precisions, [(1 / 2 + 2 / 5) / 2, 1, np.nan])


@pytest.mark.parametrize(
    ("row", "first"),
    [
        ([3, 3, 9], 2),
        ([3.0, 3.0, 3.0], 2),
        ([3.0, 3.0 - 1e-12, 9.0], 1),
        ([3, np.inf, np.inf], 2),
        ([2**40 + 1, 2**40, 9], 2),
    ],
)
def test_close_and_equal_distances(row: list[float], first: int) -> None:
    ranking = rank_gallery([row], [1], [2, 1, 2], [0], [0, 1, 0])  # the match is the second image of the gallery
    assert ranking.cmc.tolist() == [rank >= first for rank in (1, 2, 3)]


def test_cuhk03_by_hand() -> None:
    # The ranking of the first query is 2, 1, 3, 2, 1. If the nearer 1 and the nearer 2 are drawn, the match is second;
    # if the nearer 1 and the farther 2 are drawn, it is first; if the farther 1 is drawn, it is third. The only match
    # of the second query is always drawn and always first.
    np.random.seed(0)
    curves = [rank_gallery(*BY_HAND, max_rank=3, use_metric_cuhk03=True).cmc for _ in range(200)]
    np.testing.assert_allclose(np.mean(curves, axis=0), [(1 / 4 + 1) / 2, (1 / 2 + 1) / 2, 1], atol=0.03)


@pytest.mark.usefixtures("_numpy_bool")
@pytest.mark.parametrize("cuhk03", [False, True])
@pytest.mark.parametrize("size", [(40, 400, 60), (300, 70, 4), (20, 300, 2)])
def test_same_as_torchreid(size: tuple[int, int, int], cuhk03: bool) -> None:
    args = make(*size)
    results = []
    for evaluate in (metrics.rank.evaluate_py, evaluate_rank):
        np.random.seed(5)
        results.append((*evaluate(*args, 50, cuhk03), np.random.random()))
    (cmc, mean_ap, after), (our_cmc, our_mean_ap, our_after) = results
    assert len(our_cmc) == 50
    np.testing.assert_array_equal(our_cmc[: len(cmc)], cmc)  # torchreid's curve ends at the number of identities
    np.testing.assert_array_equal(our_cmc[len(cmc) :], 1)
    assert our_mean_ap == pytest.approx(mean_ap, abs=1e-6)
    assert our_after == after  # both took as many random numbers


@pytest.mark.usefixtures("_numpy_bool")
def test_cuhk03_draws_as_torchreid_where_distances_are_equal() -> None:
    args = make(50, 300, 40, tied=True)
    np.random.seed(5)
    cmc, mean_ap = metrics.rank.evaluate_py(*args, 20, True)
    np.random.seed(5)
    our_cmc, our_mean_ap = evaluate_rank(*args, 20, True)
    np.testing.assert_allclose(our_cmc, cmc, atol=1e-6)
    assert our_mean_ap == pytest.approx(mean_ap, abs=1e-6)


@pytest.mark.parametrize("cuhk03", [False, True])
def test_average_precisions_in_the_order_of_the_queries(cuhk03: bool) -> None:
    distances, *labels = make(60, 150, 12)
    ranking = rank_gallery(distances, *labels, use_metric_cuhk03=cuhk03)
    found = ranking.average_precisions
    assert np.flatnonzero(np.isnan(found)).tolist() == [3, 4]  # their identities are not in the gallery
    _, _, precisions, _ = by_the_formula(distances, *labels)
    np.testing.assert_allclose(found[~np.isnan(found)], precisions)
    assert ranking.mean_ap == pytest.approx(np.nanmean(found))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("infinite", [False, True])
def test_same_as_the_formula(tied: bool, infinite: bool) -> None:
    distances, *labels = make(60, 150, 12, tied=tied, seed=3)
    if infinite:
        distances[distances > 0.6 * distances.max()] = np.inf
        distances[distances < 0.1 * distances[np.isfinite(distances)].max()] = -np.inf
    curve, _, precisions, penalties = by_the_formula(distances, *labels)
    ranking = rank_gallery(distances, *labels, max_rank=150)
    np.testing.assert_allclose(ranking.cmc, curve, atol=1e-6)
    assert ranking.mean_ap == pytest.approx(np.mean(precisions))
    assert ranking.mean_inp == pytest.approx(np.mean(penalties))


def test_any_numbers_in_any_layout() -> None:
    distances, *labels = make(40, 100, 9, tied=True)
    expected = rank_gallery(distances, *labels)
    wide = np.repeat(distances, 2, axis=1)
    variants = [distances.astype(kind) for kind in (np.float16, np.float64, np.int64, np.uint8)]
    variants += [np.asfortranarray(distances), wide[:, ::2], torch.from_numpy(distances), distances.tolist()]
    for variant in variants:
        ranking = rank_gallery(variant, *labels)
        np.testing.assert_array_equal(ranking.cmc, expected.cmc)
        assert (ranking.mean_ap, ranking.mean_inp) == (expected.mean_ap, expected.mean_inp)
    lists = rank_gallery(distances, *[label.astype(np.int32).tolist() for label in labels])
    assert lists.mean_ap == expected.mean_ap


@pytest.mark.parametrize("cuhk03", [False, True])
def test_leaves_the_distances_as_they_are(cuhk03: bool) -> None:
    distances, *labels = make(40, 100, 9)
    distances.setflags(write=False)
    before = distances.copy()
    rank_gallery(distances, *labels, use_metric_cuhk03=cuhk03)
    np.testing.assert_array_equal(distances, before)


def test_a_small_gallery_shortens_the_curve(capsys: pytest.CaptureFixture[str]) -> None:
    args = make(30, 12, 2)
    cmc, mean_ap = evaluate_rank(*args)
    assert "the gallery has 12 images, so the CMC curve ends there, not at 50" in capsys.readouterr().out
    assert len(cmc) == 12
    # Fewer than 12 images are ranked for some queries, and torchreid can't average curves of different lengths.
    with pytest.raises(ValueError, match="inhomogeneous"):
        metrics.rank.evaluate_py(*args, 50, False)
    curve, _, precisions, _ = by_the_formula(*args)
    np.testing.assert_allclose(cmc, curve, atol=1e-6)
    assert mean_ap == pytest.approx(np.mean(precisions))


@pytest.mark.parametrize("cuhk03", [False, True])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({0: DISTANCES[0]}, r"distmat must be a matrix \(queries, gallery\) .* got \(6,\)"),
        ({0: DISTANCES[:0]}, r"at least one of each, got \(0, 6\)"),
        ({0: DISTANCES[:, :0]}, r"at least one of each, got \(3, 0\)"),
        ({1: Q_PIDS[:2]}, r"q_pids must be of shape \(3,\), one for each query, got \(2,\)"),
        ({2: G_PIDS[:, None]}, r"g_pids must be of shape \(6,\), one for each gallery image, got \(6, 1\)"),
        ({3: G_CAMIDS}, r"q_camids must be of shape \(3,\)"),
        ({4: Q_CAMIDS}, r"g_camids must be of shape \(6,\)"),
        ({5: 0}, "max_rank must be at least 1, got 0"),
        ({0: np.where(DISTANCES == 0.8, np.nan, DISTANCES)}, "1 of the distances of query 1 are NaN"),
        ({1: Q_PIDS + 10}, "none of the 3 queries has a gallery image of its identity under another camera"),
        ({4: np.zeros(6), 3: np.zeros(3)}, "none of the 3 queries"),
    ],
)
def test_bad_input(changes: dict[int, Any], words: str, cuhk03: bool) -> None:
    args = [changes.get(i, arg) for i, arg in enumerate([*BY_HAND, 50])]
    with pytest.raises(ValueError, match=words):
        evaluate_rank(*args, use_metric_cuhk03=cuhk03)


def test_distances_must_be_real() -> None:
    with pytest.raises(TypeError, match="distmat must hold real numbers, got complex128"):
        rank_gallery(DISTANCES + 0j, *BY_HAND[1:])


BIG = 2**53  # where float64 begins to leave out integers


@pytest.mark.parametrize("cuhk03", [False, True])
@pytest.mark.parametrize(
    ("q_pids", "g_pids"),
    [
        ([1.0, 2.0, 9.0], [1, 2, 1, 3, 2, 1]),
        (np.array([1, 2, 9], np.uint64), np.array([1, 2, 1, 3, 2, 1], np.int8)),
        (np.array([BIG, BIG + 1, -1]), np.array([BIG, BIG + 1, BIG, 2**64 - 1, BIG + 1, BIG], np.uint64)),
        ([BIG, BIG + 1, 9], np.array([BIG, BIG + 1, BIG, BIG + 2, BIG + 1, BIG], np.uint64)),
        ([2**63, -1, 9], [2**63, -1, 2**63, 2**63 + 1, -1, 2**63]),
        ([2**70, -1, 9], [2**70, -1, 2**70, 2**70 + 1, -1, 2**70]),
        (["a", "b", "x"], np.array(["a", "b", "a", "c", "b", "a"], dtype=object)),
        ([b"a", b"b", b"x"], [b"a", b"b", b"a", b"c", b"b", b"a"]),
        (torch.tensor([1, 2, 9]), torch.tensor([1, 2, 1, 3, 2, 1], dtype=torch.int32)),
    ],
    ids=str,
)
def test_identities_of_any_type(q_pids: Any, g_pids: Any, cuhk03: bool) -> None:
    results = []
    for args in (BY_HAND, (DISTANCES, q_pids, g_pids, Q_CAMIDS, G_CAMIDS)):
        np.random.seed(3)
        results.append(rank_gallery(*args, use_metric_cuhk03=cuhk03))
    np.testing.assert_array_equal(results[1].cmc, results[0].cmc)
    assert (results[1].mean_ap, results[1].mean_inp) == (results[0].mean_ap, results[0].mean_inp)


def test_cameras_of_any_type() -> None:
    texts = rank_gallery(*BY_HAND[:3], [f"c{c}" for c in Q_CAMIDS], [f"c{c}" for c in G_CAMIDS])
    mixed = rank_gallery(*BY_HAND[:3], Q_CAMIDS.astype(np.uint64), G_CAMIDS.astype(np.float16))
    assert texts.mean_ap == mixed.mean_ap == rank_gallery(*BY_HAND).mean_ap


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("label", "error", "words"),
    [
        (np.nan, ValueError, "must hold whole numbers, got nan at index 0"),
        (np.inf, ValueError, "must hold whole numbers, got inf at index 0"),
        (1.5, ValueError, "must hold whole numbers, got 1.5 at index 0"),
        (None, TypeError, "must hold only integers or only strings, got None at index 0"),
        ({}, TypeError, "must hold only integers or only strings, got {} at index 0"),
        (1j, TypeError, "must hold only integers or only strings, got complex128"),
        (np.datetime64("2020"), TypeError, "must hold only integers or only strings"),
        ("1", TypeError, "must hold only integers or only strings, got '1' at index 0"),
    ],
)
def test_labels_that_cant_be_compared(label: Any, error: type[Exception], words: str, number: int) -> None:
    args: list[Any] = [arg.tolist() for arg in BY_HAND]
    args[number] = [label, *args[number][1:]]
    name = ["q_pids", "g_pids", "q_camids", "g_camids"][number - 1]
    for evaluate in (evaluate_rank, capturing(lambda *_: pytest.fail("a compiled evaluator takes NaN for a number"))):
        with pytest.raises(error, match=re.escape(f"{name} {words}")):
            evaluate(*args)


def test_numbers_and_text_are_not_compared() -> None:
    with pytest.raises(TypeError, match=r"q_pids and g_pids must be of the same kind, got <U1 and int64"):
        rank_gallery(DISTANCES, ["1", "2", "9"], *BY_HAND[2:])
    with pytest.raises(TypeError, match=r"q_camids and g_camids must be of the same kind, got int64 and <U1"):
        rank_gallery(*BY_HAND[:4], ["0"] * 6)
    with pytest.raises(ValueError, match="q_pids must hold whole numbers, got masked values"):
        rank_gallery(DISTANCES, np.ma.array(Q_PIDS, mask=[True, False, False]), *BY_HAND[2:])


def test_works_in_as_many_threads_as_torch() -> None:
    torch.set_num_threads(3)
    together = threading.Barrier(3, timeout=20)
    assert len(list(in_threads(lambda _: together.wait(), 3, "waiting"))) == 3  # breaks unless three run at a time
    torch.set_num_threads(1)
    assert len(set(in_threads(lambda _: threading.get_ident(), 1000, "naming"))) == 1
    assert list(in_threads(lambda i: i, 1000, "counting")) == list(range(1000))


@pytest.mark.parametrize("cuhk03", [False, True])
def test_takes_little_memory(cuhk03: bool) -> None:
    args = make(1000, 2000, 50)
    tracemalloc.start()
    rank_gallery(*args, use_metric_cuhk03=cuhk03)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # torchreid's evaluator takes more than 3 times the 8 MB of the distances. CUHK03's metric holds up to 256 rankings.
    assert peak < args[0].nbytes * (0.8 if cuhk03 else 0.25)


def test_captures_rankings() -> None:
    evaluate_rank(*BY_HAND)
    with capture_rankings() as outer:
        cmc, mean_ap = evaluate_rank(*BY_HAND)
        with pytest.raises(ValueError, match="max_rank"), capture_rankings() as inner:  # noqa: PT012
            evaluate_rank(*BY_HAND)
            evaluate_rank(*BY_HAND, max_rank=0)
        evaluate_rank(*BY_HAND)
    evaluate_rank(*BY_HAND)
    assert (len(outer), len(inner)) == (2, 1)
    assert outer[0].cmc is cmc
    assert (outer[0].mean_ap, outer[0].mean_inp) == (mean_ap, pytest.approx(0.7))


def test_a_compiled_evaluator_keeps_its_results_and_captures_minp() -> None:
    given = (np.array([0.25, 0.5]), np.float64(0.125))

    def compiled(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        assert len(args) == 6
        assert kwargs == {"use_metric_cuhk03": True}
        return given

    evaluate = capturing(compiled)
    np.random.seed(5)
    before = np.random.get_state()[2]
    with capture_rankings() as rankings:
        results = [evaluate(*BY_HAND, 50, use_metric_cuhk03=True) for _ in range(2)]
    evaluate(*BY_HAND, 50, use_metric_cuhk03=True)
    assert results == [given, given]
    assert np.random.get_state()[2] == before  # capturing takes no random numbers
    assert [(ranking.cmc is given[0], ranking.mean_ap) for ranking in rankings] == [(True, 0.125)] * 2
    assert rankings[0].mean_inp == pytest.approx(0.7)
    np.testing.assert_allclose(rankings[0].average_precisions, [0.45, 1, np.nan])


PROBE = """
import sys
import torchreid, torchreid.engine
from torchreid import engine, metrics, utils
theirs, metrics.rank.IS_CYTHON_AVAI = metrics.rank.evaluate_rank, True
import torchreid_snloss
assert metrics.evaluate_rank is theirs, "importing changed torchreid"
torchreid_snloss.register()
assert metrics.evaluate_rank is metrics.rank.evaluate_rank is not theirs
assert metrics.evaluate_rank.__wrapped__ is theirs
by_name = sys.modules["torchreid.engine.engine"].re_ranking
assert utils.re_ranking is by_name is torchreid_snloss.rerank.re_ranking
"""


def test_register_keeps_a_compiled_evaluator_under_upstreams_layout(upstream_layout: Path) -> None:
    done = run("-W", "ignore", "-c", PROBE, path=upstream_layout)
    assert done.returncode == 0, done.stderr


class Writer:
    """The part of TensorBoard's SummaryWriter that torchreid calls."""

    def __init__(self) -> None:
        self.scalars: dict[str, float] = {}

    def add_scalar(self, name: str, value: float, epoch: int) -> None:
        assert epoch == 0
        self.scalars[name] = float(value)


@pytest.mark.parametrize("rerank", [False, True])
def test_an_engine_prints_minp(
    rerank: bool, reid_data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    datamanager = make_datamanager(reid_data)
    monkeypatch.setattr(metrics.rank, "evaluate_py", None)  # torchreid's own functions must not run
    monkeypatch.setattr(utils.rerank, "np", None)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 16))
    testing = make_engine(ImageSNEngine, datamanager, model)
    testing.writer = Writer()
    testing.test(rerank=rerank)
    printed = capsys.readouterr().out
    assert ("re-ranking" in printed) == rerank
    table = printed[printed.index("** Results **") :]
    match = re.fullmatch(r"mINP: (\d+\.\d)%", table.splitlines()[-1])
    assert match
    scalars = testing.writer.scalars
    assert set(scalars) == {f"Test/market1501/{name}" for name in ("rank1", "mAP", "mINP")}
    assert float(match[1]) == pytest.approx(100 * scalars["Test/market1501/mINP"], abs=0.05)
    assert 0 < scalars["Test/market1501/mINP"] < scalars["Test/market1501/mAP"]


def people(num_queries: int, num_gallery: int, seed: int = 0) -> tuple[Any, Any, Any]:
    """Computes the distance matrices of random features, with about 8 images of each person, as torchreid does."""
    torch.manual_seed(seed)
    pids = torch.randint(0, (num_queries + num_gallery) // 8 + 1, (num_queries + num_gallery,))
    features = torch.randn(int(pids.max()) + 1, 16)[pids] + 0.7 * torch.randn(len(pids), 16)
    queries, gallery = features[:num_queries], features[num_queries:]
    pairs = [(queries, gallery), (queries, queries), (gallery, gallery)]
    q_g, q_q, g_g = [metrics.compute_distance_matrix(a, b, "euclidean") for a, b in pairs]
    return q_g.numpy(), q_q, g_g


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("options", [(20, 6, 0.3), (9, 1, 0.0), (5, 2, 0.8), (2, 8, 0.5)], ids=str)
def test_re_ranking_is_torchreids(options: tuple[int, int, float]) -> None:
    # In float64, asymmetric, with all distances different and no image nearest to itself.
    every = np.random.default_rng(0).permutation(120 * 120).reshape(120, 120) / 120**2 + 0.2
    uneven = (every[:30, 30:], every[:30, :30], every[30:, 30:])
    for given in (people(50, 150), people(100, 20, seed=1), uneven):
        before = [np.asarray(matrix).copy() for matrix in given]
        theirs = utils.rerank.re_ranking(*given, *options)
        ours = re_ranking(*given, *options)
        assert (ours.dtype, ours.shape) == (np.float32, theirs.shape)
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        for matrix, copy in zip(given, before):
            np.testing.assert_array_equal(np.asarray(matrix), copy)


def test_re_ranking_of_fewer_images_than_neighbors() -> None:
    given = people(10, 20)
    np.testing.assert_allclose(re_ranking(*given, 50, 40), utils.rerank.re_ranking(*given, 50, 40), atol=1e-5)


def test_re_ranking_by_hand() -> None:
    # Images on a line at 0 (the query), 1, 3 and 7. With k1 = 1 the nearest images of an image are itself and one
    # other: 0 and 1 have each other, 3 has 1 and 7 has 3, but not the other way round. So the query has common
    # neighbours only with 1, and its Jaccard distance to 3 and 7 is 1. The largest squared distances from 0, 1, 3, 7
    # are 49, 36, 16, 49.
    points = np.array([0.0, 1.0, 3.0, 7.0])
    distances = np.abs(points[:, None] - points)
    ours = re_ranking(distances[:1, 1:], distances[:1, :1], distances[1:, 1:], k1=1, k2=1, lambda_value=0.25)
    near_to_query, near_to_1 = np.exp(-np.array([0, 1 / 49])), np.exp(-np.array([1 / 36, 0]))
    query, other = near_to_query / near_to_query.sum(), near_to_1 / near_to_1.sum()
    jaccard = 1 - np.minimum(query, other).sum() / np.maximum(query, other).sum()
    np.testing.assert_allclose(ours, [[0.75 * jaccard + 0.25 * 1 / 49, 0.75 + 0.25 * 9 / 49, 0.75 + 0.25]], atol=1e-6)


def test_re_ranking_takes_equal_distances_in_order() -> None:
    # All images are at distance 0, so the two nearest of each are the query and the first gallery image.
    ours = re_ranking(np.zeros((1, 4)), np.zeros((1, 1)), np.zeros((4, 4)), k1=1, k2=1, lambda_value=0.0)
    np.testing.assert_allclose(ours, [[0, 1, 1, 1]], atol=1e-6)


def test_re_ranking_takes_little_memory() -> None:
    given = people(200, 1800)
    tracemalloc.start()
    re_ranking(*given)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2000 * 2000 * 4  # the size of one matrix; torchreid's function makes about six


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {1: np.ones((3, 3))},
            r"must be of shapes \(Q, G\), \(Q, Q\) and \(G, G\).*got \(2, 3\), \(3, 3\) and \(3, 3\)",
        ),
        ({0: np.ones((0, 3)), 1: np.ones((0, 0))}, "at least one query and one gallery image"),
        ({3: 0}, "k1 and k2 must be at least 1 .* got k1=0, k2=6"),
        ({4: 0}, "k1 and k2 must be at least 1 .* k2=0"),
        ({5: 1.5}, "lambda_value=1.5"),
        ({2: np.array([[1, 1, 1], [1, 1, np.nan], [1, 1, 1]])}, "distances to image 4 of .* are not finite"),
        ({2: np.full((3, 3), 1e30)}, "distances to image 2 of .* are not finite in float32"),
    ],
)
def test_bad_input_to_re_ranking(changes: dict[int, Any], words: str) -> None:
    args = [np.ones((2, 3)), np.ones((2, 2)), np.ones((3, 3)), 20, 6, 0.3]
    with pytest.raises(ValueError, match=words):
        re_ranking(*[changes.get(i, arg) for i, arg in enumerate(args)])


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("dtype", [complex, object, str])
def test_re_ranking_takes_real_distances(dtype: type, number: int) -> None:
    args = [np.ones((2, 3)), np.ones((2, 2)), np.ones((3, 3))]
    args[number] = args[number].astype(dtype)
    name = ("q_g_dist", "q_q_dist", "g_g_dist")[number]
    with pytest.raises(TypeError, match=f"{name} must hold real numbers, got {args[number].dtype}"):
        re_ranking(*args)


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_integer_distances_beyond_float64_keep_their_order(dtype: Any) -> None:
    distances = np.array([[2**60 + 1, 2**60 + 2, 2**60]], dtype)
    for nearest, mean_ap in ((2, 1.0), (0, 0.5), (1, 1 / 3)):
        pids = np.where(np.arange(3) == nearest, 1, 2)
        assert rank_gallery(distances, [1], pids, [0], [1, 1, 1]).mean_ap == pytest.approx(mean_ap)
