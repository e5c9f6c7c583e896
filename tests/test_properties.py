"""What holds for any batch, tried on many."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchreid_snloss import FIDILoss, HAP2SLoss, SNLoss
from torchreid_snloss.losses import LOSSES as BY_NAME
from torchreid_snloss.losses import Interval, MetricLoss
from torchreid_snloss.losses.search import SearchSpace, tried

LOSSES: list[MetricLoss] = [
    SNLoss(num_neighbors=4, scale=5.0),
    SNLoss(num_neighbors=4, scale=2.0, squeeze="all", normalize=False),
    HAP2SLoss(margin=1.0),
    HAP2SLoss(weighting="polynomial", margin=None, normalize=False),
    FIDILoss(),
    FIDILoss(normalize=True, alpha=1.5),
]
EVERY = settings(max_examples=20, deadline=None)
INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """1 to 14 images in general position, of up to 5 identities in any mixture."""
    number, dimension = draw(st.integers(1, 14)), draw(st.integers(2, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    labels = draw(st.lists(st.integers(0, 4), min_size=number, max_size=number))
    return torch.from_numpy(rng.normal(size=(number, dimension))), torch.tensor(labels)


def value_and_gradient(loss: MetricLoss, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    features = features.clone().requires_grad_()
    value = loss(features, labels)
    value.backward()
    return value.detach(), features.grad


def rotation(dimension: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.from_numpy(np.random.default_rng(seed).normal(size=(dimension, dimension))))[0]


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@given(batch=batches(), seed=st.integers(0, 1000))
@EVERY
def test_order_of_the_batch_does_not_matter(loss: MetricLoss, batch: tuple[Tensor, Tensor], seed: int) -> None:
    features, labels = batch
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(features)))
    value, gradient = value_and_gradient(loss, features, labels)
    shuffled_value, shuffled_gradient = value_and_gradient(loss, features[order], labels[order])
    torch.testing.assert_close(shuffled_value, value)
    torch.testing.assert_close(shuffled_gradient, gradient[order])


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@given(batch=batches(), seed=st.integers(0, 1000))
@EVERY
def test_rotation_and_translation(loss: MetricLoss, batch: tuple[Tensor, Tensor], seed: int) -> None:
    features, labels = batch
    turn = rotation(features.shape[1], seed)
    value, gradient = value_and_gradient(loss, features, labels)
    turned_value, turned_gradient = value_and_gradient(loss, features @ turn, labels)
    torch.testing.assert_close(turned_value, value)
    torch.testing.assert_close(turned_gradient, gradient @ turn)
    if not loss.normalize:
        moved_value, moved_gradient = value_and_gradient(loss, features + turn[:1] * 10, labels)
        torch.testing.assert_close(moved_value, value)
        torch.testing.assert_close(moved_gradient, gradient)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@given(batch=batches(), names=st.permutations([0, 1, 17, 100, 126]), dtype=st.sampled_from(INTEGERS))
@EVERY
def test_only_which_labels_are_equal_matters(
    loss: MetricLoss, batch: tuple[Tensor, Tensor], names: list[int], dtype: torch.dtype
) -> None:
    features, labels = batch
    torch.testing.assert_close(loss(features, torch.tensor(names)[labels].to(dtype)), loss(features, labels))


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@given(batch=batches())
@EVERY
def test_an_anchor_of_the_batch_is_an_anchor_against_the_rest(loss: MetricLoss, batch: tuple[Tensor, Tensor]) -> None:
    features, labels = batch
    each = copy.copy(loss)
    each.reduction = "none"
    values = each(features, labels)
    for a in range(len(features)):
        rest = torch.arange(len(features)) != a
        value = each(features[a : a + 1], labels[a : a + 1], features[rest], labels[rest])
        torch.testing.assert_close(values[a : a + 1], value)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@given(batch=batches())
@EVERY
def test_float32_agrees_with_float64(loss: MetricLoss, batch: tuple[Tensor, Tensor]) -> None:
    features, labels = batch
    features = features.float()
    value, gradient = value_and_gradient(loss, features, labels)
    exact_value, exact_gradient = value_and_gradient(loss, features.double(), labels)
    torch.testing.assert_close(value.double(), exact_value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@given(batch=batches(), seed=st.integers(0, 1000))
@EVERY
def test_gradient_is_the_slope(loss: MetricLoss, batch: tuple[Tensor, Tensor], seed: int) -> None:
    features, labels = batch
    direction = torch.from_numpy(np.random.default_rng(seed).normal(size=tuple(features.shape)))
    _, gradient = value_and_gradient(loss, features, labels)
    step = 1e-7
    rise = loss(features + step * direction, labels) - loss(features - step * direction, labels)
    torch.testing.assert_close(rise / (2 * step), (gradient * direction).sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@given(batch=batches(), data=st.data())
@EVERY
def test_any_batch_gives_finite_numbers(loss: MetricLoss, batch: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    features, labels = batch
    features = features.to(data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])))
    size = data.draw(st.sampled_from([1.0, 1e4, 1e-4])) if features.dtype != torch.float16 else 1.0
    features = features * size
    if data.draw(st.booleans()):  # images drawn twice
        features = features[
            data.draw(st.lists(st.integers(0, len(features) - 1), min_size=len(features), max_size=len(features)))
        ]
    if data.draw(st.booleans()):  # not contiguous
        features = features.t().contiguous().t()
    value, gradient = value_and_gradient(loss, features, labels)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()
    assert gradient.dtype == features.dtype


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@given(batch=batches(), bad=st.sampled_from([float("nan"), float("inf"), -float("inf")]), row=st.integers(0, 13))
@EVERY
def test_a_broken_row_never_crashes(loss: MetricLoss, batch: tuple[Tensor, Tensor], bad: float, row: int) -> None:
    features, labels = batch
    features[row % len(features), 0] = bad
    value, _ = value_and_gradient(loss, features, labels)
    assert value.dim() == 0


# The losses as they are by default, and with the other values of an argument that decides what is tried.
SEARCHED: list[tuple[str, dict[str, Any]]] = [*((name, {}) for name in BY_NAME), ("hap2s", {"weighting": "polynomial"})]


def searched(name: str, given: dict[str, Any]) -> SearchSpace:
    """What a tuning tries of a loss with these arguments."""
    defaults = {key: found.default for key, found in inspect.signature(BY_NAME[name]).parameters.items()}
    return tried(BY_NAME[name].search_space, {**defaults, **given})


@pytest.mark.parametrize(("name", "fixed"), SEARCHED)
@given(data=st.data())
@EVERY
def test_every_value_of_a_search_space_is_accepted(name: str, fixed: dict[str, Any], data: st.DataObject) -> None:
    space = searched(name, fixed)
    chosen: dict[str, Any] = {
        argument: data.draw(
            st.floats(values.low, values.high) if isinstance(values, Interval) else st.sampled_from(values)
        )
        for argument, values in space.items()
    }
    loss = BY_NAME[name](**fixed, **chosen)
    assert {argument: getattr(loss, argument) for argument in space} == chosen


@pytest.mark.parametrize(("name", "fixed"), SEARCHED)
def test_a_search_space_holds_the_defaults(name: str, fixed: dict[str, Any]) -> None:
    for argument, values in searched(name, fixed).items():
        default = inspect.signature(BY_NAME[name]).parameters[argument].default
        if isinstance(values, Interval):
            assert values.low <= default <= values.high
        else:
            assert default in values


@pytest.mark.parametrize(("name", "fixed"), SEARCHED)
def test_every_argument_of_a_search_space_changes_the_loss(name: str, fixed: dict[str, Any]) -> None:
    torch.manual_seed(0)
    features, labels = torch.randn(24, 8), torch.arange(24) % 6
    for argument, values in searched(name, fixed).items():
        ends = (values.low, values.high) if isinstance(values, Interval) else (values[0], values[-1])
        one, other = (float(BY_NAME[name](**fixed, **{argument: end})(features, labels)) for end in ends)
        assert one != pytest.approx(other, rel=1e-3), argument


def test_hap2s_tries_what_its_weighting_uses() -> None:
    assert set(searched("hap2s", {})) == {"sigma", "margin"}
    assert set(searched("hap2s", {"weighting": "polynomial"})) == {"alpha", "margin"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1.0, 1.0), ValueError, "high must be greater than 1.0, got 1.0"),
        ((2.0, 1.0), ValueError, "high must be greater than 2.0, got 1.0"),
        ((0.0, 1.0, True), ValueError, "low must be greater than 0, got 0.0"),
        ((float("nan"), 1.0), ValueError, "low must be finite, got nan"),
        ((0.0, float("inf")), ValueError, "high must be finite, got inf"),
        (("0", 1.0), TypeError, "low must be a number, got '0'"),
        ((1.0, 2.0, "log"), TypeError, "log must be True or False, got 'log'"),
    ],
)
def test_bounds_of_an_interval(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Interval(*arguments)
    assert Interval(-1.0, 0.0).low == -1.0
