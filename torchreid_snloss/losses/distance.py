"""Euclidean distances between two sets of rows: fast as a matrix product, exact where rows coincide."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["euclidean_distance", "nearest"]

# |x|^2 + |y|^2 - 2xy loses its digits where the result is small beside its terms. Squared distances under this
# share of the squared norms are computed again, from the difference of the two rows.
_NEAR = 1e-3
_ELEMENTS_AT_ONCE = 1 << 22


def euclidean_distance(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Euclidean (not squared) distances ``d[i, j] = |x[i] - y[j]|``.

    The gradient is 0 where two rows coincide (the distance has none there). Differentiable once.

    Args:
        x: rows, (N, D), float32 or float64.
        y: rows, (M, D), of the same dtype; None stands for ``x`` itself, and is faster than passing ``x`` twice.

    Returns:
        (N, M) distances in the dtype of ``x``.
    """
    distances: Tensor = _EuclideanDistance.apply(x, y)
    return distances


class _EuclideanDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None) -> Tensor:
        references = x if y is None else y
        # Distances do not change with the origin, digits do: features that crowd around one point keep theirs.
        origin = (references if len(references) else x).mean(dim=0)
        centred = x - origin
        centred_references = centred if y is None else references - origin

        norms = centred.square().sum(dim=1)
        reference_norms = norms if y is None else centred_references.square().sum(dim=1)
        squares = torch.addmm(reference_norms, centred, centred_references.t(), alpha=-2).add_(norms[:, None])
        near = squares <= (2 * _NEAR) * norms[:, None]
        if y is None:
            squares.fill_diagonal_(0)
            near.fill_diagonal_(False)
        rows, columns = near.nonzero(as_tuple=True)
        for i, j in _in_parts(rows, columns, x.shape[1]):
            squares[i, j] = (x[i] - references[j]).square().sum(dim=1)

        distances = squares.clamp_(min=0).sqrt_()
        ctx.self_distance = y is None
        ctx.save_for_backward(x, references, origin, distances, rows, columns)
        return distances

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, references, origin, distances, rows, columns = ctx.saved_tensors
        grad_x = grad_references = None
        with torch.autocast(grad.device.type, enabled=False):
            weights = (grad / distances).masked_fill_(distances == 0, 0)
            if ctx.self_distance:  # both sides are x: their weights add up, and one product does for two
                weights = weights + weights.t()
            near_weights = weights[rows, columns]
            weights[rows, columns] = 0  # theirs are large, and would cancel without digits left in the product
            centred, centred_references = x - origin, references - origin
            if ctx.needs_input_grad[0]:
                grad_x = torch.addmm(centred * weights.sum(dim=1, keepdim=True), weights, centred_references, alpha=-1)
            if ctx.needs_input_grad[1]:
                row_sums = weights.sum(dim=0)[:, None]
                grad_references = torch.addmm(centred_references * row_sums, weights.t(), centred, alpha=-1)
            for i, j, w in _in_parts(rows, columns, x.shape[1], near_weights):
                along = w[:, None] * (x[i] - references[j])
                if grad_x is not None:
                    grad_x.index_add_(0, i, along)
                if grad_references is not None:
                    grad_references.index_add_(0, j, along, alpha=-1)
        return grad_x, grad_references


def _in_parts(rows: Tensor, columns: Tensor, dimension: int, *more: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The near pairs, so many at a time that their differences take little memory."""
    at_once = max(1, _ELEMENTS_AT_ONCE // dimension)
    return zip(*(tensor.split(at_once) for tensor in (rows, columns, *more)))


def nearest(distances: Tensor, positive: Tensor, negative: Tensor, k: int) -> Tensor:
    """Columns of each anchor's ``k`` nearest references; of equally near ones positives go first, then lower columns.

    Args:
        distances: (N, M).
        positive: bool (N, M), the references with the anchor's label.
        negative: bool (N, M), those with another. A column that is neither is taken last.
        k: how many, >= 1.

    Returns:
        int64 (N, min(k, M)) columns, in no particular order.
    """
    k = min(k, distances.shape[1])
    if k == distances.shape[1]:
        return torch.arange(k, device=distances.device).expand_as(distances)
    masked = distances.detach().masked_fill(~(positive | negative), torch.inf)
    values, columns = masked.topk(k + 1, dim=1, largest=False)
    columns = columns[:, :k]
    # topk leaves open which of equal distances it takes. That matters where they straddle the k-th place, as with an
    # image that stands in the batch twice: those rows are sorted out in full.
    tied = values[:, k - 1] == values[:, k]
    if tied.any():
        positives_first = (~positive[tied]).to(torch.uint8).sort(dim=1, stable=True).indices
        order = masked[tied].gather(1, positives_first).sort(dim=1, stable=True).indices[:, :k]
        columns = columns.clone()
        columns[tied] = positives_first.gather(1, order)
    return columns
