"""Both algorithms for distances: digits, operations, waits; losses in threads, under torch.compile and torch.func."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import NEEDS_COMPILE
from torch import Tensor
from torch.nn.functional import normalize as unit
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from torchreid_snloss import FIDILoss, HAP2SLoss, SNLoss
from torchreid_snloss.losses import LOSSES, Differences, GlobalBatchLoss, Memory, MetricLoss, Products
from torchreid_snloss.losses.distances import Distances, choose
from torchreid_snloss.losses.nearest import nearest_by_sorting, nearest_by_topk

ALGORITHMS: dict[str, Distances] = {"products": Products(), "differences": Differences()}
both_algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)


class SumOfDistances(MetricLoss):
    """An anchor's value is the sum of its distances, each with a weight of its own."""

    def __init__(self, algorithm: Distances, normalize: bool, block_size: int = 0) -> None:
        super().__init__(normalize, "none", block_size)
        self.distances = algorithm

    def anchor_values(self, distances: Tensor, positive: Tensor, negative: Tensor, _: Any) -> tuple[Tensor, Tensor]:
        weights = torch.linspace(1, 2, distances.shape[1], dtype=distances.dtype) * (positive | negative)
        return (distances * weights).sum(dim=1), weights.clone()

    def term_counts(self, positives: Tensor, negatives: Tensor) -> Tensor:
        return positives + negatives


def exactly(x: Tensor, y: Tensor, normalize: bool, itself: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Distances of float32 rows in float64, and the gradients of the sum that `SumOfDistances` makes."""
    rows = [tensor.double().requires_grad_() for tensor in (x, y)]
    a, b = (unit(row) for row in rows) if normalize else rows
    distances = (a[:, None] - b).square().sum(dim=2).clamp(min=1e-300).sqrt()
    weights = torch.linspace(1, 2, len(y), dtype=torch.float64).repeat(len(x), 1)
    (distances * (weights.fill_diagonal_(0) if itself else weights)).sum().backward()
    return distances.detach(), rows[0].grad, rows[1].grad


def near_rows(kind: str, dimension: int = 512) -> Tensor:
    generator = torch.Generator().manual_seed(0)

    def directions(number: int) -> Tensor:
        return unit(torch.randn(number, dimension, generator=generator, dtype=torch.float64))

    x = directions(8)
    if kind == "around 1e3":
        return (1e3 + 1e-3 * torch.randn(16, dimension, generator=generator, dtype=torch.float64)).float()
    if kind == "one crowd, 1e-6":
        return (x[:1] + 1e-6 * directions(16)).float()
    if kind == "two crowds, 1e-6":  # so that each row is in many pairs
        return torch.cat([x[:1] + 1e-6 * directions(8), 3 * (x[1:2] + 1e-6 * directions(8))]).float()
    if kind == "pairs of other lengths, 1e-6":
        return torch.cat([x * torch.linspace(1, 9, 8)[:, None], 3 * (x + 1e-6 * directions(8))]).float()
    return torch.cat([x, x + float(kind.split()[1]) * directions(8)]).float()


@both_algorithms
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("block_size", [0, 5])
@pytest.mark.parametrize(
    "kind",
    [
        "pairs 1e-3",
        "pairs 1e-6",
        "pairs 3e-7",
        "one crowd, 1e-6",
        "two crowds, 1e-6",
        "pairs of other lengths, 1e-6",
        "around 1e3",
    ],
)
def test_near_rows_keep_their_digits_in_float32(
    algorithm: Distances, normalize: bool, block_size: int, kind: str
) -> None:
    x = near_rows(kind)
    targets = torch.arange(len(x))
    for itself in (True, False):
        y = x if itself else x.flip(0)
        distances, grad_x, grad_y = exactly(x, y, normalize, itself)
        # One reference at a time, so that no small distance hides behind a large one.
        for j in range(len(y)):
            one = SumOfDistances(algorithm, normalize, block_size)(x, targets, y[j : j + 1], targets[:1])
            torch.testing.assert_close(one.double(), distances[:, j], rtol=1e-5, atol=1e-12)
        leaves = [x.clone().requires_grad_(), y.clone().requires_grad_()]
        loss = SumOfDistances(algorithm, normalize, block_size)
        values = loss(leaves[0], targets) if itself else loss(leaves[0], targets, leaves[1], targets)
        weights = torch.linspace(1, 2, len(y), dtype=torch.float64).repeat(len(x), 1)
        expected = (distances * (weights.fill_diagonal_(0) if itself else weights)).sum(dim=1)
        torch.testing.assert_close(values.detach().double(), expected, rtol=1e-5, atol=1e-12)
        values.sum().backward()
        for leaf, gradient in zip(leaves, [grad_x + grad_y] if itself else [grad_x, grad_y]):
            error = (leaf.grad.double() - gradient).norm(dim=1)
            assert (error <= 1e-5 * gradient.norm(dim=1)).all()


@pytest.mark.parametrize("kind", ["two crowds, 1e-6", "pairs 1e-6"])
def test_near_rows_keep_their_digits_as_a_gpu_computes_them(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchreid_snloss.losses.near.on_cpu", lambda _: False)
    test_near_rows_keep_their_digits_in_float32(Products(), True, 0, kind)


@pytest.mark.parametrize("loss", [SNLoss, HAP2SLoss, FIDILoss])
@pytest.mark.parametrize("block_size", [0, 5])
@pytest.mark.parametrize("upstream", [float("nan"), float("inf")])
def test_equal_rows_do_not_hide_a_gradient_that_is_not_finite(loss: Any, block_size: int, upstream: float) -> None:
    x = torch.ones(16, 64, requires_grad=True)
    (loss(normalize=False, block_size=block_size)(x, torch.arange(4).repeat_interleave(4)) * upstream).backward()
    assert not x.grad.isfinite().any()


class Operations(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def operations(loss: MetricLoss, algorithm: Distances, features: Tensor) -> Counter[str]:
    """Of a forward and a backward pass; 4 images an identity."""
    targets = torch.arange(len(features) // 4).repeat_interleave(4)
    loss.distances = algorithm
    features = features.clone().requires_grad_()
    with Operations() as seen:
        loss(features, targets).backward()
    return seen.counts


WAITS = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "_unique2")


@pytest.mark.parametrize(
    ("loss", "limit"),
    [(SNLoss(), 95), (HAP2SLoss(), 75), (FIDILoss(), 70), (FIDILoss(normalize=False), 60)],
    ids=["sn", "hap2s", "fidi", "fidi of raw features"],
)
def test_operations_of_a_small_batch(loss: MetricLoss, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchreid_snloss.losses.nearest.nearest_by_topk", nearest_by_sorting)  # as on a GPU
    monkeypatch.setattr("torchreid_snloss.losses.near.on_cpu", lambda _: False)
    features = torch.randn(64, 2048)
    counts = operations(loss, Differences(), features)
    assert sum(counts.values()) <= limit
    assert not any(counts[wait] for wait in WAITS), "a GPU would be waited for"
    for near, most in ((0, 1), (1, 3), (63, 3)):  # those of a crowd are looked for again after centring
        features[1 : 1 + near] = features[0] + 1e-3 * torch.randn(near, 2048)
        counts = operations(loss, Products(), features)
        assert 1 <= sum(counts[wait] for wait in WAITS) <= most


def test_which_algorithm_is_taken() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert isinstance(choose(64, 64, 2048, cpu), Products)
    assert isinstance(choose(128, 128, 2048, gpu), Differences)
    assert isinstance(choose(64, 65536, 2048, gpu), Products)


@pytest.mark.parametrize("loss", [SNLoss, HAP2SLoss, FIDILoss])
@pytest.mark.parametrize("kind", ["ordinary", "pairs 1e-6", "one crowd, 1e-6", "half near", "repeated", "zero row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_algorithms_agree(loss: Any, kind: str, dtype: torch.dtype) -> None:
    x = torch.randn(16, 512, generator=torch.Generator().manual_seed(0)) if " 1e" not in kind else near_rows(kind)
    if kind == "half near":
        x = 1 + 0.1 * x
    if kind == "repeated":
        x[5] = x[4]
    if kind == "zero row":
        x[3] = 0
    results = []
    for algorithm in ALGORITHMS.values():
        criterion = loss(**({"num_neighbors": 50, "squeeze_weight": 0.0} if loss is SNLoss else {}))
        criterion.distances = algorithm
        features = x.to(dtype, copy=True).requires_grad_()
        value = criterion(features, torch.arange(8).repeat(2))
        value.backward()
        results.append((value.detach(), features.grad))
    digits = 1e-4 if dtype == torch.float32 else 1e-8
    (value, gradient), *others = results
    for other_value, other_gradient in others:
        torch.testing.assert_close(value, other_value, rtol=digits, atol=0)
        torch.testing.assert_close(gradient, other_gradient, rtol=0, atol=digits * gradient.abs().max().item())


def test_nearest_is_the_same_by_topk_and_by_sorting() -> None:
    generator = torch.Generator().manual_seed(0)
    distances = torch.randint(0, 6, (50, 20), generator=generator).float()  # many ties
    distances[0, :9] = torch.inf
    positive = torch.rand(50, 20, generator=generator) < 0.3
    for k in (1, 3, 19, 20, 30):
        expected = [
            sorted(range(20), key=lambda j, i=i: (distances[i, j], not positive[i, j], j))[:k]  # type: ignore[misc]
            for i in range(50)
        ]
        assert nearest_by_sorting(distances, positive, k).tolist() == expected
        assert nearest_by_topk(distances, positive, k).tolist() == expected


@pytest.mark.parametrize("name", LOSSES)
def test_threads_share_a_loss_and_its_statistics_are_of_one_call(name: str) -> None:
    loss = LOSSES[name](block_size=3)
    loss.collect_statistics = True
    batches = [torch.randn(24, 16, generator=torch.Generator().manual_seed(seed)) * (1 + seed) for seed in range(8)]
    targets = torch.arange(6).repeat_interleave(4)

    def totals(features: Tensor) -> dict[str, Tensor]:
        return loss.terms(features, targets, features, targets, self_offset=0).stat_totals

    alone = [totals(features) for features in batches]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(totals, batches * 4))
    for number, statistics in enumerate(together):
        torch.testing.assert_close(statistics, alone[number % 8], rtol=0, atol=0, equal_nan=True)
    assert set(loss.stat_totals) == set(alone[0])


def test_statistics_are_returned_by_criterion() -> None:
    criteria = {"sn": SNLoss(), "fidi": FIDILoss()}
    criteria["sn"].collect_statistics = True
    features, pids = torch.randn(16, 8), torch.arange(4).repeat_interleave(4)
    values, stat_totals = GlobalBatchLoss(criteria)(features, pids)
    assert set(values) == {"sn", "fidi"}
    assert set(stat_totals) == {"sn_d_pos", "sn_d_neg", "sn_anchors", "sn_in_support"}
    assert stat_totals["sn_anchors"].tolist() == [16, 16]
    _, stat_totals = GlobalBatchLoss({"sn": criteria["sn"]}, Memory(32))(features, pids, torch.arange(16))
    assert set(stat_totals) == {"d_pos", "d_neg", "anchors", "in_support"}


@NEEDS_COMPILE
@pytest.mark.parametrize("name", LOSSES)
def test_torch_compile_leaves_a_loss_as_it_is(name: str) -> None:
    features, targets = torch.randn(16, 8), torch.arange(4).repeat_interleave(4)
    loss = LOSSES[name]()
    results = []
    for function in (loss, torch.compile(loss, backend="eager")):
        x = features.clone().requires_grad_()
        value = function(x, targets)
        value.backward()
        results.append((value.detach(), x.grad))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("name", LOSSES)
def test_transforms_of_torch_func_are_refused_in_one_line(name: str) -> None:
    x, targets = torch.randn(16, 8), torch.arange(4).repeat_interleave(4)

    def loss(features: Tensor) -> Tensor:
        return LOSSES[name]()(features, targets)

    for call in (lambda: torch.func.grad(loss)(x), lambda: torch.vmap(loss)(x.repeat(2, 1, 1))):
        with pytest.raises(RuntimeError, match=r"^the metric losses do not work under torch\.func's .*\.grad$"):
            call()


def test_old_names_warn() -> None:
    import torchreid_snloss.losses as package
    from torchreid_snloss.losses import base

    with pytest.warns(DeprecationWarning, match="means"):
        assert package.quotients is package.means
    with pytest.warns(DeprecationWarning, match="arguments"):
        assert base.check_number is package.check_number
    with pytest.warns(DeprecationWarning, match="stat_totals"):
        assert SNLoss().sums == {}


def test_a_subclass_written_for_0_2_works_and_warns() -> None:
    with pytest.warns(DeprecationWarning, match="Old") as warned:

        class Old(MetricLoss):
            """The distance to the nearest reference of another identity."""

            def columns(self, squares: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
                return squares.masked_fill(~negative, torch.inf).min(dim=1, keepdim=True).indices

            def anchor_values(self, distances: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
                if self.watching:
                    self.watch("nearest", distances[:, 0])
                return -distances[:, 0], -torch.ones_like(distances)

    assert [str(warning.message).split(" ")[0] for warning in warned] == ["Old.anchor_values", "Old.columns(squares,"]
    loss = Old(normalize=False, reduction="mean", block_size=0)
    loss.collect_statistics = True
    features = torch.tensor([[0.0], [1.0], [5.0], [8.0]], requires_grad=True)
    value = loss(features, torch.tensor([0, 0, 1, 1]))
    assert value.item() == pytest.approx(-(5 + 4 + 4 + 7) / 4)
    assert loss.statistics["nearest"].item() == pytest.approx(5.0)
    value.backward()
    assert features.grad.flatten().tolist() == pytest.approx([0.25, 0.75, -0.75, -0.25])


def test_a_subclass_written_for_0_2_may_call_the_loss_it_extends() -> None:
    with pytest.warns(DeprecationWarning, match="Twice"):

        class Twice(HAP2SLoss):
            def anchor_values(self, distances: Tensor, positive: Tensor, negative: Tensor) -> Any:
                values, slopes = super().anchor_values(distances, positive, negative)
                return values * 2, slopes * 2

    with pytest.warns(DeprecationWarning, match="FourTimes"):

        class FourTimes(Twice):
            def anchor_values(self, distances: Tensor, positive: Tensor, negative: Tensor) -> Any:
                values, slopes = super().anchor_values(distances, positive, negative)
                return values * 2, slopes * 2

    features, targets = torch.randn(16, 8), torch.arange(4).repeat_interleave(4)
    loss = FourTimes(margin=1.0)
    loss.collect_statistics = True
    torch.testing.assert_close(loss(features, targets), 4 * HAP2SLoss(margin=1.0)(features, targets))
    assert "active" in loss.statistics


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_activation_checkpointing(name: str, reentrant: bool) -> None:
    targets, gradients = torch.arange(4).repeat_interleave(4), []
    features = torch.randn(16, 8)
    for checkpointed in (False, True):
        leaf, loss = features.clone().requires_grad_(), LOSSES[name]()
        value = checkpoint(loss, leaf, targets, use_reentrant=reentrant) if checkpointed else loss(leaf, targets)
        value.backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
