"""The losses against reference values, finite differences, and what the papers' formulas imply."""

from __future__ import annotations

import inspect
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torchreid_snloss import FIDILoss, HAP2SLoss, SNLoss
from torchreid_snloss.losses import LOSSES, Differences, GlobalBatchLoss, MetricLoss, Products, StatisticsCollector
from torchreid_snloss.losses.distances import Distances

REFERENCE = json.loads((Path(__file__).parent / "data" / "losses.json").read_text())
CLASSES = {"SNLoss": SNLoss, "HAP2SLoss": HAP2SLoss, "FIDILoss": FIDILoss}
VARIANTS: list[MetricLoss] = [
    SNLoss(),
    SNLoss(num_neighbors=3, scale=5.0, squeeze="all"),
    SNLoss(squeeze="nearest", normalize=False, scale=2.0),
    HAP2SLoss(),
    HAP2SLoss(weighting="polynomial", normalize=False, margin=3.0),
    HAP2SLoss(margin=None),
    FIDILoss(),
    FIDILoss(normalize=True, alpha=2.0),
]


@pytest.fixture(params=[Products(), Differences()], ids=["products", "differences"])
def algorithm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Distances:
    """Each algorithm for distances in turn, as the one that all losses take."""
    monkeypatch.setattr("torchreid_snloss.losses.base.choose", lambda *_: request.param)
    return request.param


def distances_of(algorithm: Distances, x: Tensor, y: Tensor | None = None, normalize: bool = False) -> Tensor:
    """Without y those of x among themselves."""
    prepared = algorithm.prepare(x, y, normalize, False)
    return algorithm.block(prepared, slice(0, len(x)), 0 if y is None else None)[1].distances


def batch(identities: int = 4, images: int = 4, dimension: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(identities * images, dimension, generator=generator, dtype=torch.float64)
    return features, torch.arange(identities).repeat_interleave(images)


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "row", REFERENCE, ids=lambda row: f"{row['loss']}-{row['case']}-{list(row['params'].values())}".replace(" ", "_")
)
def test_reference_values(row: dict[str, Any], dtype: torch.dtype) -> None:
    tensors = [torch.tensor(row["inputs"], dtype=dtype, requires_grad=True), torch.tensor(row["targets"])]
    if row["references"] is not None:
        tensors += [torch.tensor(row["references"], dtype=dtype, requires_grad=True)]
        tensors += [torch.tensor(row["reference_targets"])]
    value = CLASSES[row["loss"]](**row["params"])(*tensors)
    value.backward()

    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5}[dtype]
    if row["case"].startswith("repeated"):
        tolerance = {torch.float64: 1e-6, torch.float32: 1e-3}[dtype]
    # HAP2S's hinge is a difference of distances that are themselves rounded to `ulp`; distances computed in float64 and
    # rounded once to float32 give it no closer value. Its weights are exponentials of their ratio to sigma: an error of
    # `ulp` changes a weight by a share of ulp / sigma.
    ulp, of_weights = 0.0, 0.0
    if row["loss"] == "HAP2SLoss":
        raw = not row["params"]["normalize"]
        ulp = torch.finfo(dtype).eps * (torch.cdist(tensors[0], tensors[-2]).max().item() if raw else 2.0)
        of_weights = ulp / row["params"]["sigma"] if row["params"]["weighting"] == "exponential" else 0.0

    def check(got: Tensor, expected: Any, relative: float, absolute: float) -> None:
        want = torch.tensor(expected, dtype=torch.float64)
        assert (got.double() - want).abs().max() <= relative * want.abs().max() + absolute

    check(value.detach(), row["value"], tolerance, max(ulp, 1e-15))
    check(tensors[0].grad, row["grad_inputs"], tolerance + of_weights, 1e-15)
    if row["references"] is not None:
        check(tensors[2].grad, row["grad_references"], tolerance + of_weights, 1e-15)


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("loss", VARIANTS, ids=str)
@pytest.mark.parametrize("separate", [False, True])
def test_gradcheck(loss: MetricLoss, separate: bool) -> None:
    features, targets = batch(3, 3, 5)
    references, reference_targets = batch(4, 2, 5, seed=1)
    features.requires_grad_()
    references.requires_grad_()
    if separate:
        assert torch.autograd.gradcheck(lambda x, y: loss(x, targets, y, reference_targets), (features, references))
    else:
        assert torch.autograd.gradcheck(lambda x: loss(x, targets), (features,))


def slowly(loss: MetricLoss, features: Tensor, targets: Tensor) -> list[float]:
    """Values of anchors that count, one anchor at a time in plain Python; FIDI's are per pair."""
    x = torch.nn.functional.normalize(features) if loss.normalize else features
    values = []
    for a in range(len(x)):
        others = [j for j in range(len(x)) if j != a]
        d = {j: math.dist(x[a].tolist(), x[j].tolist()) for j in others}
        positives = [j for j in others if targets[j] == targets[a]]
        negatives = [j for j in others if targets[j] != targets[a]]
        if isinstance(loss, FIDILoss):

            def divergence(p: float, q: float, alpha: float = loss.alpha) -> float:
                return p * math.log(alpha * p / ((alpha - 1) * p + q)) if p > 0 else 0.0

            for j in others:
                u, k = math.exp(-loss.beta * d[j]), float(j in positives)
                values.append(divergence(u, k) + divergence(k, u))
        elif not positives or not negatives:
            continue
        elif isinstance(loss, SNLoss):
            support = sorted(others, key=d.__getitem__)[: loss.num_neighbors]
            p = [d[j] for j in support if j in positives] or [min(d[j] for j in positives)]
            q = [d[j] for j in support if j in negatives]
            near, far = (sum(math.exp(-loss.scale * e) for e in side) for side in (p, q))
            squeeze = {
                "support": max(p) - min(p) if len(p) > 1 else p[0],
                "all": max(d[j] for j in positives) - min(p),
                "nearest": min(p),
            }[loss.squeeze]
            values.append(-math.log(near / (near + far)) + loss.squeeze_weight * squeeze)
        else:
            assert isinstance(loss, HAP2SLoss)

            def to_set(members: list[int], sign: int, loss: HAP2SLoss = loss, d: dict[int, float] = d) -> float:
                if loss.weighting == "exponential":
                    weights = [math.exp(sign * d[j] / loss.sigma) for j in members]
                else:
                    weights = [(d[j] + 1) ** (loss.alpha if sign > 0 else -2 * loss.alpha) for j in members]
                return sum(w * d[j] for w, j in zip(weights, members)) / sum(weights)

            gap = to_set(positives, 1) - to_set(negatives, -1)
            values.append(math.log1p(math.exp(gap)) if loss.margin is None else max(0.0, gap + loss.margin))
    return values


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("loss", VARIANTS, ids=str)
def test_equals_the_formula_written_out(loss: MetricLoss) -> None:
    for seed in range(5):
        features, _ = batch(5, 4, 6, seed=seed)
        targets = torch.randint(0, 6, (20,), generator=torch.Generator().manual_seed(seed))
        values = slowly(loss, features, targets)
        assert loss(features, targets).item() == pytest.approx(sum(values) / len(values), rel=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_reduction(name: str) -> None:
    features, _ = batch(4, 3)
    targets = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 4, 5])  # the last three have no positive
    each, total, mean = (LOSSES[name](reduction=kind)(features, targets) for kind in ("none", "sum", "mean"))
    assert each.shape == (12,)
    torch.testing.assert_close(each.sum(), total)
    if name == "fidi":
        torch.testing.assert_close(mean, total / (12 * 11))
    else:
        torch.testing.assert_close(mean, total / 9)
        assert (each[9:] == 0).all()


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("loss", VARIANTS, ids=str)
def test_batch_as_its_own_references_leaves_out_the_anchor(loss: MetricLoss) -> None:
    features, targets = batch()
    alone = type(loss)(**{**options(loss), "reduction": "none"})(features, targets)
    for a in range(len(features)):
        others = torch.arange(len(features)) != a
        against_others = loss(features[a : a + 1], targets[a : a + 1], features[others], targets[others])
        if isinstance(loss, FIDILoss):
            against_others = against_others * (len(features) - 1)
        torch.testing.assert_close(alone[a], against_others)


def options(loss: MetricLoss) -> dict[str, Any]:
    return {name: getattr(loss, name) for name in inspect.signature(type(loss)).parameters}


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("loss", VARIANTS, ids=str)
def test_nothing_to_compare_is_zero_with_zero_gradient(loss: MetricLoss) -> None:
    one_image = (torch.randn(1, 4, requires_grad=True), torch.tensor([3]))
    one_identity = (torch.randn(4, 4, requires_grad=True), torch.zeros(4, dtype=torch.long))
    all_different = (torch.randn(4, 4, requires_grad=True), torch.arange(4))
    no_image = (torch.randn(0, 4, requires_grad=True), torch.zeros(0, dtype=torch.long))
    cases = [one_image, no_image] if isinstance(loss, FIDILoss) else [one_image, no_image, one_identity, all_different]
    for features, targets in cases:
        value = loss(features, targets)
        value.backward()
        assert value.item() == 0
        assert (features.grad == 0).all()


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("loss", VARIANTS, ids=str)
@pytest.mark.parametrize("block_size", [0, 3])
def test_no_references(loss: MetricLoss, block_size: int) -> None:
    loss = type(loss)(**{**options(loss), "block_size": block_size})
    features, references = torch.randn(4, 3, requires_grad=True), torch.zeros(0, 3, requires_grad=True)
    value = loss(features, torch.arange(4), references, torch.zeros(0, dtype=torch.long))
    value.backward()
    assert value.item() == 0
    assert (features.grad == 0).all()
    assert references.grad.shape == (0, 3)


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("loss", VARIANTS, ids=str)
@pytest.mark.parametrize("kind", ["identical", "zero", "one zero row", "1e15", "1e4", "1e-4", "1e-15", "offset"])
def test_finite_on_odd_features(loss: MetricLoss, kind: str) -> None:
    features, targets = batch()
    features = features.float()
    if kind == "identical":
        features = features[:1].repeat(16, 1)
    elif kind == "zero":
        features = torch.zeros_like(features)
    elif kind == "one zero row":
        features[3] = 0
    else:
        features = features + 1e4 if kind == "offset" else features * float(kind)
    features.requires_grad_()
    value = loss(features, targets)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(features.grad).all()
    if kind in ("identical", "zero", "one zero row"):
        assert features.grad.abs().max() < 1e3


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("size", [1e-37, 1e20, 1e30])
def test_normalising_keeps_one_row_of_any_length(size: float) -> None:
    features, targets = batch()
    scaled = features.clone()
    scaled[7] *= size
    for loss in (SNLoss(reduction="none"), HAP2SLoss(reduction="none")):
        for references in ((), (scaled.float(), targets)):
            torch.testing.assert_close(
                loss(scaled.float(), targets, *references).double(),
                loss(features, targets, *((features, targets) if references else ())),
                rtol=1e-4,
                atol=1e-4,
            )


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_normalising_keeps_rows_of_any_length(size: float) -> None:
    features, targets = batch()
    assert SNLoss()((features * size).float(), targets) == pytest.approx(SNLoss()(features, targets).item(), rel=1e-5)


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("loss", VARIANTS, ids=str)
def test_terms_of_some_anchors_add_up_to_the_loss(loss: MetricLoss) -> None:
    features, _ = batch(5, 4)
    targets = torch.tensor([0] * 7 + [1] * 5 + [2] * 7 + [3])
    x = features
    blocks = [loss.terms(x[i : i + 6], targets[i : i + 6], x, targets, self_offset=i) for i in range(0, 20, 6)]
    values, counts = (torch.cat(parts) for parts in zip(*(block[:2] for block in blocks)))
    torch.testing.assert_close(loss.reduce(values, counts), loss(features, targets))


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("loss", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("block_size", [1, 5, 23])
def test_row_blocks_change_nothing(loss: MetricLoss, dtype: torch.dtype, block_size: int) -> None:
    features, _ = batch(6, 4)
    features[3] = features[2]  # an image that stands there twice
    features, targets = features.to(dtype), torch.tensor([0] * 7 + [1] * 5 + [2] * 7 + [3, 4, 4, 4, 4])
    references, reference_targets = batch(5, 3, seed=1)
    references = references.to(dtype)
    cases: list[tuple[Any, ...]] = [(), (references, reference_targets)]
    for more in cases:
        for reduction in ("mean", "none"):
            results = []
            for size in (1 << 30, block_size):
                blocks = type(loss)(**{**options(loss), "reduction": reduction, "block_size": size})
                leaves = [features.clone().requires_grad_(), *(tensor.clone() for tensor in more)]
                if more:
                    leaves[1].requires_grad_()
                value = blocks(leaves[0], targets, *leaves[1:])
                (value * torch.linspace(1, 2, value.numel(), dtype=dtype)).sum().backward()
                results.append([value.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)])
            small = torch.finfo(dtype).eps
            for blocked, whole, digits in zip(results[1], results[0], [8, 80, 80]):  # float32: 1e-6 and 1e-5
                torch.testing.assert_close(blocked, whole, rtol=0, atol=digits * small * whole.abs().max().item())


def test_row_blocks_are_taken_above_a_size_and_bound_memory() -> None:
    rows: list[int] = []

    class Noting(FIDILoss):
        def anchor_values(
            self, distances: Tensor, positive: Tensor, negative: Tensor, statistics: StatisticsCollector
        ) -> tuple[Tensor, Tensor]:
            rows.append(len(distances))
            return super().anchor_values(distances, positive, negative, statistics)

    loss = Noting()
    references, labels = torch.randn(1 << 16, 4), torch.arange(1 << 16) % 7
    loss(references[:64], labels[:64], references, labels)
    assert rows == [64]
    rows.clear()
    loss(references[:65], labels[:65], references, labels)
    assert rows == [64, 1]


def test_statistics_of_row_blocks_are_those_of_the_batch() -> None:
    features, _ = batch(6, 4)
    targets = torch.tensor([0] * 10 + [1] * 2 + [2] * 8 + [3, 4, 5, 6])
    for name in LOSSES:
        options = {"beta": 0.5, "normalize": False} if name == "fidi" else {}
        whole, blocked = LOSSES[name](**options), LOSSES[name](**options, block_size=5)
        for loss in (whole, blocked):
            loss.collect_statistics = True
            loss(features.requires_grad_(), targets).backward()
        assert set(whole.statistics) > {"d_pos", "d_neg", "anchors"}
        torch.testing.assert_close(blocked.statistics, whole.statistics)
    u = torch.exp(-0.5 * torch.cdist(features, features))
    same = targets[:, None] == targets
    torch.testing.assert_close(whole.statistics["u_pos"].double(), u[same.clone().fill_diagonal_(False)].mean())
    torch.testing.assert_close(whole.statistics["u_neg"].double(), u[~same].mean())


def test_distances_of_repeated_and_close_rows_are_exact_in_float32(algorithm: Distances) -> None:
    for size, dimension in ((1.0, 2048), (25.0, 512)):
        x = torch.nn.functional.normalize(torch.randn(32, dimension, dtype=torch.float64)) * size
        close = x + torch.randn_like(x) * 1e-5 * size / dimension**0.5
        rows = torch.cat([x, x, close]).float()
        exact = (rows.double()[:, None] - rows.double()[None]).norm(dim=2)
        distances = distances_of(algorithm, rows)
        assert (distances[:32, 32:64].diagonal() == 0).all()
        # The difference of two float32 rows is good to about an ulp of the rows.
        torch.testing.assert_close(distances.double(), exact, rtol=1e-5, atol=2e-7 * size)
        torch.testing.assert_close(
            distances_of(algorithm, rows, rows.clone()).double(), exact, rtol=1e-5, atol=2e-7 * size
        )


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-6])
def test_gradient_of_near_duplicates_in_float32(gap: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 512, generator=generator)
    x = torch.nn.functional.normalize(x)
    x[1::2] = x[::2] + gap * torch.nn.functional.normalize(torch.randn(16, 512, generator=generator))
    targets = torch.arange(8).repeat_interleave(4)
    # Every reference counts: which of two near ones is the K-th, and so gets the gradient, is beyond float32.
    loss = SNLoss(num_neighbors=100, squeeze_weight=0.0, normalize=False, scale=2.0)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        features = x.to(dtype, copy=True).requires_grad_()
        loss(features, targets).backward()
        gradients.append(features.grad.double())
    assert (gradients[0] - gradients[1]).abs().max() < 1e-5 * gradients[1].abs().max()


@pytest.mark.parametrize("size", [1e4, 1e7])
def test_an_outlier_leaves_the_others_their_digits(size: float, algorithm: Distances) -> None:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    x[7] *= size
    others = torch.arange(32) != 7
    exact = (x.double()[:, None] - x.double()[None]).norm(dim=2)
    torch.testing.assert_close(
        distances_of(algorithm, x).double()[others][:, others], exact[others][:, others], rtol=1e-6, atol=0
    )


def test_numpy_numbers_are_numbers() -> None:
    loss = SNLoss(num_neighbors=np.int64(3), scale=np.float32(2.0))
    assert (loss.num_neighbors, loss.scale) == (3, 2.0)
    with pytest.raises(ValueError, match="scale must be finite"):
        SNLoss(scale=10**400)


@pytest.mark.usefixtures("algorithm")
def test_equally_near_references_positives_first_then_lower_index() -> None:
    # Anchor 0; rows 1 to 4 stand in one place, of which 3 is the anchor's identity. The support takes two of them.
    features = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [9.0, 0.0]])
    targets = torch.tensor([0, 1, 2, 0, 3, 4])
    features.requires_grad_()
    loss = SNLoss(num_neighbors=2, scale=1.0, squeeze_weight=0.0, normalize=False, reduction="none")
    value = loss(features, targets)[0]
    value.backward()
    assert value.item() == pytest.approx(math.log(2))
    assert [row for row in range(1, 6) if features.grad[row].any()] == [1, 3]


@pytest.mark.parametrize("squeeze", ["support", "all", "nearest"])
def test_sn_shift_and_gradient_sum(squeeze: Any) -> None:
    features, targets = batch(4, 3)
    distances = torch.cdist(features, features)
    separation = SNLoss(squeeze_weight=0.0, scale=2.0)
    positive = (targets[:, None] == targets[None]).fill_diagonal_(False)
    negative = targets[:, None] != targets[None]

    def values_and_slopes(loss: SNLoss, distances: Tensor) -> tuple[Tensor, Tensor]:
        columns = loss.select_references(distances, positive, negative, StatisticsCollector())
        selected = (matrix.gather(1, columns) for matrix in (distances, positive, negative))
        return loss.anchor_values(*selected, StatisticsCollector())

    values, slopes = values_and_slopes(separation, distances)
    torch.testing.assert_close(values_and_slopes(separation, distances + 3.0)[0], values)
    torch.testing.assert_close(slopes.sum(dim=1), torch.zeros(12, dtype=torch.float64), atol=1e-12, rtol=0)
    both = SNLoss(num_neighbors=2, squeeze=squeeze, squeeze_weight=1.0)  # few of P: some have one member
    shift = values_and_slopes(both, distances + 3.0)[0] - values_and_slopes(both, distances)[0]
    assert torch.allclose(shift, torch.zeros_like(shift)) == (squeeze == "all")


def test_sn_without_negatives_in_the_support_is_exactly_zero() -> None:
    features = torch.cat([torch.randn(4, 3), torch.randn(4, 3) + 100]).requires_grad_()
    targets = torch.arange(2).repeat_interleave(4)
    value = SNLoss(num_neighbors=3, squeeze_weight=0.0, normalize=False)(features, targets)
    value.backward()
    assert value.item() == 0
    assert (features.grad == 0).all()


@pytest.mark.parametrize("weighting", ["exponential", "polynomial"])
def test_hap2s_limits(weighting: Any) -> None:
    features, targets = batch(4, 4)
    x = torch.nn.functional.normalize(features)
    d = torch.cdist(x, x)
    same = targets[:, None] == targets[None]
    positive = same.clone().fill_diagonal_(False)
    furthest, nearest = d.masked_fill(~positive, 0).amax(1), d.masked_fill(same, 9).amin(1)
    means = (d * positive).sum(1) / positive.sum(1) - (d * ~same).sum(1) / (~same).sum(1)
    margin = 10.0  # no anchor at zero
    values = HAP2SLoss(weighting=weighting, margin=margin, reduction="none")(features, targets) - margin
    assert (values <= furthest - nearest + 1e-12).all()
    assert (values >= means - 1e-12).all()
    hard = HAP2SLoss(sigma=1e-4, margin=margin, reduction="none")(features, targets) - margin
    flat = HAP2SLoss(sigma=1e6, margin=margin, reduction="none")(features, targets) - margin
    torch.testing.assert_close(hard, furthest - nearest)
    torch.testing.assert_close(flat, means, atol=1e-5, rtol=0)


def test_fidi_is_bounded_for_one_identity_and_exponential_for_two() -> None:
    loss = FIDILoss(beta=0.5, normalize=False)
    bound = math.log(loss.alpha / (loss.alpha - 1))
    distance = torch.tensor([0.0, 1e-6, 0.1, 1.0, 5.0, 30.0, 300.0, 1e4], dtype=torch.float64)
    pairs = torch.stack([torch.zeros_like(distance), distance])
    same = [loss(pairs[:, i : i + 1], torch.tensor([0, 0])).item() for i in range(len(distance))]
    other = [loss(pairs[:, i : i + 1], torch.tensor([0, 1])).item() for i in range(len(distance))]
    assert same[0] == 0
    assert all(a <= b + 1e-15 for a, b in itertools.pairwise(same))
    assert same[-1] == pytest.approx(bound)
    assert other == pytest.approx((bound * torch.exp(-0.5 * distance)).tolist(), rel=1e-12)


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("loss", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_computed_in_float32(loss: MetricLoss, dtype: torch.dtype) -> None:
    features, targets = batch()
    half = features.to(dtype).requires_grad_()
    value = loss(half, targets)
    value.backward()
    assert value.dtype == torch.float32
    assert half.grad.dtype == dtype
    torch.testing.assert_close(value, loss(half.detach().float(), targets))


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("loss", VARIANTS, ids=str)
@pytest.mark.parametrize("kind", ["plain", "repeated image", "row blocks"])
def test_autocast_changes_nothing(loss: MetricLoss, kind: str) -> None:
    features, targets = batch(4, 4, 512)
    if kind == "repeated image":
        features[5] = features[4]
    if kind == "row blocks":
        loss = type(loss)(**{**options(loss), "block_size": 7})
    features = features.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(features, targets)
        (gradient,) = torch.autograd.grad(inside, features)
    assert inside.dtype == torch.float32
    outside = loss(features, targets)
    assert inside == outside
    assert torch.equal(gradient, torch.autograd.grad(outside, features)[0])


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("loss", VARIANTS, ids=str)
def test_large_batch(loss: MetricLoss) -> None:
    """Of a size where products are made in parts, and are sparse."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 8, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(0, 60, (300,), generator=generator)
    value = loss(features, targets)
    value.backward()
    blocked = type(loss)(**{**options(loss), "block_size": 9})(features, targets)
    torch.testing.assert_close(value, blocked, rtol=1e-12, atol=0)
    step = 1e-7 * torch.randn(300, 8, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        rise = loss(features + step, targets) - loss(features - step, targets)
    torch.testing.assert_close(rise / 2, (features.grad * step).sum(), rtol=1e-5, atol=1e-14)


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("block_size", [0, 3])
def test_a_second_derivative_is_refused(block_size: int) -> None:
    features, targets = batch()
    for name in LOSSES:
        value = LOSSES[name](block_size=block_size)(features.requires_grad_(), targets)
        with pytest.raises(RuntimeError, match=r"differentiated once.*create_graph=True"):
            torch.autograd.grad(value, features, create_graph=True)


@pytest.mark.usefixtures("algorithm")
def test_backward_twice() -> None:
    features, targets = batch()
    for name in LOSSES:
        for block_size in (0, 3):
            value = LOSSES[name](block_size=block_size)(features.requires_grad_(), targets)
            first, second = (torch.autograd.grad(value, features, retain_graph=True)[0] for _ in range(2))
            assert torch.equal(first, second)


def test_labels_of_any_integer_type() -> None:
    features, targets = batch()
    expected = SNLoss()(features, targets)
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32):
        assert SNLoss()(features, targets.to(dtype)) == expected


X, T = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([[1.0]], T), TypeError, ["inputs", "torch.Tensor", "list"]),
        ((X, [0, 0, 1, 1]), TypeError, ["targets", "torch.Tensor", "list"]),
        ((X.long(), T), TypeError, ["inputs", "floating point", "int64"]),
        ((X, T.float()), TypeError, ["targets", "integer", "float32"]),
        ((X, T > 0), TypeError, ["targets", "integer", "bool"]),
        ((X[0], T), ValueError, ["inputs", r"\(3,\)"]),
        ((X[:, :0], T), ValueError, ["inputs", r"\(4, 0\)"]),
        ((X[None], T), ValueError, ["inputs", r"\(1, 4, 3\)"]),
        ((X, T[:3]), ValueError, ["targets", r"\(4,\)", r"\(3,\)"]),
        ((X, T[:, None]), ValueError, ["targets", r"\(4,\)", r"\(4, 1\)"]),
        ((X, T, X), ValueError, ["reference_targets is None"]),
        ((X, T, None, T), ValueError, ["references is None"]),
        ((X, T, X, T[:3]), ValueError, ["reference_targets", r"\(4,\)", r"\(3,\)"]),
        ((X, T, X[:, :2], T), ValueError, ["feature dimension", r"\(4, 3\)", r"\(4, 2\)"]),
        ((X, T.to("meta")), ValueError, ["inputs and targets", "cpu", "meta"]),
        ((X, T, X.to("meta"), T.to("meta")), ValueError, ["references", "cpu", "meta"]),
    ],
)
def test_bad_tensors(arguments: tuple[Any, ...], error: type[Exception], words: list[str]) -> None:
    for loss in LOSSES.values():
        with pytest.raises(error, match=".*".join(words)):
            loss()(*arguments)


@pytest.mark.parametrize(
    ("loss", "options", "error", "words"),
    [
        (SNLoss, {"num_neighbors": 0}, ValueError, "num_neighbors must be at least 1, got 0"),
        (SNLoss, {"num_neighbors": 2.5}, TypeError, "num_neighbors must be an integer, got 2.5"),
        (SNLoss, {"scale": 0}, ValueError, "scale must be greater than 0, got 0"),
        (SNLoss, {"scale": math.nan}, ValueError, "scale must be finite, got nan"),
        (SNLoss, {"scale": "10"}, TypeError, "scale must be a number, got '10'"),
        (SNLoss, {"squeeze_weight": -1.0}, ValueError, "squeeze_weight must be at least 0, got -1.0"),
        (SNLoss, {"squeeze": "none"}, ValueError, "squeeze must be one of 'support', 'all', 'nearest', got 'none'"),
        (SNLoss, {"normalize": 1}, TypeError, "normalize must be True or False, got 1"),
        (HAP2SLoss, {"weighting": "E"}, ValueError, "weighting must be one of 'exponential', 'polynomial', got 'E'"),
        (HAP2SLoss, {"sigma": 0.0}, ValueError, "sigma must be greater than 0"),
        (HAP2SLoss, {"alpha": -1.0}, ValueError, "alpha must be greater than 0"),
        (HAP2SLoss, {"margin": -0.1}, ValueError, "margin must be at least 0"),
        (HAP2SLoss, {"block_size": -1}, ValueError, "block_size must be at least 0, got -1"),
        (HAP2SLoss, {"block_size": 2.5}, TypeError, "block_size must be an integer, got 2.5"),
        (FIDILoss, {"alpha": 1.0}, ValueError, "alpha must be at least 1.000001, got 1.0"),
        (FIDILoss, {"alpha": 1 + 1e-8}, ValueError, "alpha must be at least 1.000001, got 1.00000001"),
        (FIDILoss, {"beta": 0.0}, ValueError, "beta must be greater than 0"),
        (FIDILoss, {"reduction": "avg"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'avg'"),
    ],
)
def test_bad_hyper_parameters(loss: Any, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        loss(**options)


@pytest.mark.parametrize("itself", [False, True], ids=["as in the paper", "an image is a positive of itself"])
def test_hap2s_is_the_weighted_regularised_triplet_loss(itself: bool) -> None:
    x, pids = (3 * torch.randn(12, 5, dtype=torch.float64)).requires_grad_(), torch.arange(4).repeat_interleave(3)

    def to_set(distances: list[Tensor], sign: int) -> Tensor:
        weights = [(sign * d).exp() for d in distances]
        return sum(w * d for w, d in zip(weights, distances)) / sum(weights)  # type: ignore[return-value]

    total = torch.zeros((), dtype=torch.float64)
    for i in range(12):
        positives, negatives = [], []
        for j in range(12):
            distance = (x[i] - x[j]).norm()
            if pids[i] != pids[j]:
                negatives.append(distance)
            elif itself or i != j:
                positives.append(distance)
        total = total + (1 + (to_set(positives, 1) - to_set(negatives, -1)).exp()).log() / 12
    loss = HAP2SLoss(sigma=1.0, margin=None, normalize=False)
    value = loss(x, pids, x, pids) if itself else loss(x, pids)
    assert value.item() == pytest.approx(total.item(), rel=1e-13)
    torch.testing.assert_close(*(torch.autograd.grad(one, x)[0] for one in (value, total)), rtol=1e-11, atol=1e-13)


def test_fidi_on_raw_features_after_a_batch_norm_is_a_constant() -> None:
    """C (K - 1) / (P K - 1) with C = ln(alpha / (alpha - 1)), for batches of 16 x 4."""
    x = torch.nn.functional.batch_norm(torch.randn(64, 2048), None, None, training=True).requires_grad_()
    pids = torch.arange(16).repeat_interleave(4)
    value = FIDILoss(alpha=1.05, beta=0.5, normalize=False)(x, pids)
    (gradient,) = torch.autograd.grad(value, x)
    assert value.item() == pytest.approx(math.log(1.05 / 0.05) * 3 / 63, abs=1e-6) == pytest.approx(0.144977, abs=1e-6)
    assert gradient.norm() < 1e-9
    (of_default,) = torch.autograd.grad(FIDILoss()(x, pids), x)
    assert of_default.norm() > 1e-5


@pytest.mark.parametrize("cls", LOSSES.values())
def test_an_empty_batch_has_no_statistics_of_the_batch_before(cls: type[MetricLoss]) -> None:
    loss = cls()
    loss.collect_statistics = True
    features, labels = torch.randn(8, 4), torch.arange(8) % 4
    loss(features, labels)
    assert loss.statistics
    loss(features[:0], labels[:0])
    assert loss.statistics == {}


def test_a_loss_shows_its_arguments() -> None:
    assert repr(HAP2SLoss(margin=None)) == (
        "HAP2SLoss(weighting='exponential', sigma=0.5, alpha=10.0, margin=None, normalize=True, reduction='mean', "
        "block_size=0)"
    )


def test_a_loss_with_parameters_is_refused() -> None:
    class Learned(HAP2SLoss):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

    with pytest.raises(TypeError, match="Learned has parameters, but a MetricLoss is trained by its features alone"):
        GlobalBatchLoss({"learned": Learned()})
