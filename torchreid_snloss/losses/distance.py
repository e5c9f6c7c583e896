"""Euclidean distances between two sets of rows: fast as a matrix product, exact where rows coincide."""

from __future__ import annotations

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
        # Distances do not change with the origin, digits do: features that crowd around one point keep theirs.
        origin = (x if y is None or len(y) == 0 else y).mean(dim=0)
        x = x - origin
        references = x if y is None else y - origin

        norms = x.square().sum(dim=1)
        reference_norms = norms if y is None else references.square().sum(dim=1)
        squares = torch.addmm(reference_norms, x, references.t(), alpha=-2).add_(norms[:, None])
        near = squares <= (2 * _NEAR) * norms[:, None]
        if y is None:
            squares.fill_diagonal_(0)
            near.fill_diagonal_(False)
        rows, columns = near.nonzero(as_tuple=True)
        for part in torch.arange(len(rows), device=x.device).split(max(1, _ELEMENTS_AT_ONCE // x.shape[1])):
            i, j = rows[part], columns[part]
            squares[i, j] = (x[i] - references[j]).square().sum(dim=1)

        distances = squares.clamp_(min=0).sqrt_()
        ctx.self_distance = y is None
        ctx.save_for_backward(x, references, distances)
        return distances

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, references, distances = ctx.saved_tensors
        weights = (grad / distances).masked_fill_(distances == 0, 0)
        if ctx.self_distance:  # both sides are x: their weights add up, and one product does for two
            weights = weights + weights.t()
            return torch.addmm(x * weights.sum(dim=1, keepdim=True), weights, x, alpha=-1), None
        grad_x = grad_references = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.addmm(x * weights.sum(dim=1, keepdim=True), weights, references, alpha=-1)
        if ctx.needs_input_grad[1]:
            grad_references = torch.addmm(references * weights.sum(dim=0)[:, None], weights.t(), x, alpha=-1)
        return grad_x, grad_references


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
