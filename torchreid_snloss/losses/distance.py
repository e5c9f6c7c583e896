"""Euclidean distances of features: fast as matrix products, exact where rows coincide, with their gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Pairs", "centre", "nearest", "squared_distances", "values_of_distances"]

# |x|^2 + |y|^2 - 2xy loses its digits where the result is small beside its terms. A squared distance up to this share
# of a row's square is near. Where any is, the rows are moved so that 0 is in their middle; what is near then is
# computed from the difference of the two rows, and so is its gradient.
_NEAR = 2e-3
_SMALLEST_SQUARE = 1e-30
# To look for near pairs is to wait for a CUDA device. There products are made in float64, and what is left of |x - x|^2
# lies under this share.
_ZERO = 1e-13
_ELEMENTS_AT_ONCE = 1 << 22
_ROWS_AT_ONCE = 128
# A product with a sparse matrix wins where the matrix has more than this many columns for each that is not 0.
_SPARSE = 16


Formula = Callable[[Tensor], tuple[Tensor, Tensor]]


def once_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass that says so where it is asked for a graph of itself; torch's own mark gives wrong zeros then."""

    @functools.wraps(backward)
    def checked(*args: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("the metric losses can be differentiated once, but create_graph=True asks for more")
        return backward(*args)

    return checked


class Pairs(NamedTuple):
    """Anchors, references, and the squared Euclidean distances between them."""

    x: Tensor
    """(N, D)"""
    y: Tensor
    """(M, D); may be ``x`` itself."""
    rows: tuple[Tensor, Tensor]
    """Without gradient, what products are made of: ``x`` and ``y``, or these with 0 in their middle."""
    scales: tuple[Tensor, Tensor] | None
    """(N,) and (M,), inverse lengths of the rows where these are normalised; on CUDA in float64."""
    squares: Tensor
    """(N, M), without gradient."""
    limits: Tensor | None = None
    """(N,), up to this a square of the row is near; None: none is."""
    near: tuple[Tensor, Tensor] | None = None
    """Rows and columns of the near ones but a row with itself; None: none is."""


def squared_distances(
    x: Tensor,
    y: Tensor,
    normalize: bool,
    own_column: int | None = None,
    centred: tuple[Tensor, Tensor] | None = None,
) -> Pairs:
    """Squared Euclidean distances ``|x[i] - y[j]|^2``.

    Args:
        x: (N, D), float32 or float64.
        y: (M, D); may be ``x`` itself.
        normalize: divide each row by its length first. A row of zeros stays zero, with zero gradient.
        own_column: where ``x`` are rows of ``y``, the column of the first.
        centred: the rows that :func:`centre` gave with ``x`` and ``y``, which are not normalised then; None: it is
            called where it is needed.
    """
    with torch.no_grad():
        rows = centred or (x.detach(), y.detach())
        squares, norms, scales = _squares(*rows, normalize, itself=y is x)
        if x.is_cuda or squares.numel() == 0:
            return Pairs(x, y, rows, scales, squares)
        if own_column is not None:
            squares.diagonal(own_column).fill_(torch.inf)
        limits = _NEAR * norms
        near = _find_near(squares, limits)
        if own_column is not None:
            squares.diagonal(own_column).fill_(0)
        if near is None or centred:
            for i, j in _in_parts(x.shape[1], near):
                squares[i, j] = _squares_of_rows(x[i] - y[j])
            return Pairs(x, y, rows, scales, squares, limits, near)
    x, y, centred = centre(x, y, normalize)
    return squared_distances(x, y, False, own_column, centred)


def _squares(
    x: Tensor, y: Tensor, normalize: bool, itself: bool
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Squared distances, the squares of the rows of ``x``, and what rows were scaled by before."""
    dtype = x.dtype
    if x.is_cuda:
        x = x.double()
        y = x if itself else y.double()
    if itself:
        products = _own_products(x)
        norms = y_norms = products.diagonal().clone()
    else:
        products, norms, y_norms = x @ y.t(), _squares_of_rows(x), _squares_of_rows(y)
    if not normalize:
        scales = None
        squares = products.mul_(-2).add_(norms[:, None]).add_(y_norms)
    else:
        scale = _inverse_roots(norms)
        scales = scale, scale if itself else _inverse_roots(y_norms)
        squares = products.mul_(-2 * scale[:, None]).mul_(scales[1])
        if x.is_cuda:
            norms, y_norms = norms.sign(), y_norms.sign()
            squares.add_(norms[:, None]).add_(y_norms)
        else:  # a row of zeros has made NaN
            norms = torch.ones_like(norms)
            squares.add_(2)
    if x.is_cuda:
        squares.masked_fill_(squares <= _ZERO * (norms[:, None] + y_norms), 0)
        squares, norms = squares.to(dtype), norms.to(dtype)
    return squares, norms, scales


def _inverse_roots(squares: Tensor) -> Tensor:
    roots = squares.rsqrt()
    if squares.is_cuda:  # of float32 in float64, too large or small for nothing
        return roots.masked_fill_(squares == 0, 0)
    out_of_range = (squares < _SMALLEST_SQUARE) | (squares > 1 / _SMALLEST_SQUARE)
    return roots.masked_fill_(out_of_range, torch.nan)  # centre() has the digits for these


def _own_products(x: Tensor) -> Tensor:
    """``x @ x.t()`` in blocks of rows up to the diagonal, since the other half is the same."""
    if x.is_cuda or len(x) <= _ROWS_AT_ONCE:
        return x @ x.t()
    products = x.new_empty(len(x), len(x))
    for start in range(0, len(x), _ROWS_AT_ONCE):
        end = min(start + _ROWS_AT_ONCE, len(x))
        torch.mm(x[start:end], x[:end].t(), out=products[start:end, :end])
        products[:start, start:end] = products[start:end, :start].t()
    return products


def _squares_of_rows(x: Tensor) -> Tensor:
    squares: Tensor = torch.linalg.vector_norm(x, dim=1).square_()
    return squares


def _find_near(squares: Tensor, limits: Tensor) -> tuple[Tensor, Tensor] | None:
    if (squares.amin(dim=1) > limits).all():
        return None
    rows, columns = (squares <= limits[:, None]).nonzero(as_tuple=True)
    return rows, columns


def _in_parts(dimension: int, pairs: tuple[Tensor, ...] | None) -> Iterator[tuple[Tensor, ...]]:
    """Near pairs, so many at a time that their differences take little memory."""
    if pairs is not None:
        at_once = max(1, _ELEMENTS_AT_ONCE // dimension)
        yield from zip(*(tensor.split(at_once) for tensor in pairs))


def centre(x: Tensor, y: Tensor, normalize: bool) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Moves rows so that 0 is in their middle.

    Distances do not change with the origin, digits do: features that crowd around one point keep theirs.

    Args:
        x: (N, D), float32 or float64.
        y: (M, D); may be ``x`` itself.
        normalize: divide each row by its length first. A row of zeros counts as 0, with zero gradient.

    Returns:
        ``x`` and ``y``, if normalised moved and with gradient, else as they are; and both moved, without gradient.
    """
    if normalize:
        y_rows, origin = _UnitRows.apply(y, None)
        x_rows = y_rows if y is x else _UnitRows.apply(x, origin)[0]
        return x_rows, y_rows, (x_rows.detach(), y_rows.detach())
    with torch.no_grad():
        origin = _mean(y)
        y_rows = y - origin
        return x, y, (y_rows if y is x else x - origin, y_rows)


def _mean(rows: Tensor) -> Tensor:
    return rows.mean(dim=0) if len(rows) else rows.new_zeros(rows.shape[1])


class _UnitRows(torch.autograd.Function):
    """Features divided by their lengths, minus an origin, their mean if it is None; and the origin."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, origin: Tensor | None) -> tuple[Tensor, Tensor]:
        # The squares of float32 neither overflow nor vanish in float64.
        wide = features.dtype if features.device.type == "mps" else torch.float64
        lengths = torch.linalg.vector_norm(features, dim=1, keepdim=True, dtype=wide)
        inverse = lengths.reciprocal().to(features.dtype)
        inverse.masked_fill_(inverse.isinf(), 0)  # no length, or none that this dtype can divide by
        rows = features * inverse
        if origin is None:
            origin = _mean(rows)
            ctx.mark_non_differentiable(origin)
        rows -= origin
        ctx.save_for_backward(rows, origin, inverse)
        return rows, origin

    @staticmethod
    @once_only
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None]:
        rows, origin, inverse = ctx.saved_tensors
        # What is across the unit row, which is rows + origin. In place, since no one else has a gradient of these rows.
        with torch.autocast(grad.device.type, enabled=False):
            along = torch.einsum("nd,nd->n", grad, rows) + grad @ origin
            return grad.addcmul_(rows, along[:, None], value=-1).addr_(along, origin, alpha=-1).mul_(inverse), None


def values_of_distances(pairs: Pairs, columns: Tensor | None, formula: Formula) -> Tensor:
    """A value for each anchor, with the gradient that its distances' slopes make. Differentiable once.

    Where two rows coincide their distance has no slope; it counts as 0.

    Args:
        pairs: of :func:`squared_distances`; the distances may take the memory of its squares.
        columns: int64 (N, C), the references whose distances are asked for; None: all.
        formula: makes (N,) values of distances, (N, M) or (N, C), and the slope of a row's value by each of them.

    Returns:
        (N,) values.
    """
    references = None if pairs.y is pairs.x else pairs.y
    values: Tensor = _ValuesOfDistances.apply(pairs.x, references, pairs, columns, formula)
    return values


class _ValuesOfDistances(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | None, pairs: Pairs, columns: Tensor | None, formula: Formula
    ) -> Tensor:
        if columns is None:
            distances, ctx.near = pairs.squares.sqrt_(), pairs.near
        else:
            squares = pairs.squares.gather(1, columns)
            ctx.near = None if pairs.near is None or pairs.limits is None else _find_near(squares, pairs.limits)
            distances = squares.sqrt_()
        ctx.scales = pairs.scales
        values, slopes = formula(distances)
        ctx.save_for_backward(x, y, *pairs.rows, columns, distances, slopes)
        return values

    @staticmethod
    @once_only
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:
        x, y, rows_x, rows_y, columns, distances, slopes = ctx.saved_tensors
        with torch.autocast(grad_values.device.type, enabled=False):
            dtype = slopes.dtype
            if slopes.is_cuda:
                slopes, distances, rows_x, grad_values = (
                    tensor.double() for tensor in (slopes, distances, rows_x, grad_values)
                )
                rows_y = rows_x if y is None else rows_y.double()
            # At x[i] distances pull by sum_j w[i, j] (x[i] - y[j]), at y[j] likewise. Of the pull at a unit row the
            # part along the row, |x[i] - y[j]|^2 / 2 of each difference, is left out.
            if slopes.is_cuda:
                weights = (slopes / distances).masked_fill_(distances == 0, 0)
            else:  # where 0, the slope is 0, or the pair is near
                weights = slopes / distances.clamp(min=_SMALLEST_SQUARE)
            pairs = None
            if ctx.near is not None:  # their weights are large, and would cancel without digits left in a product
                near = ctx.near
                of_near = weights[near].masked_fill_(distances[near] == 0, 0) * grad_values[near[0]]
                pairs = (near[0], near[1] if columns is None else columns[near], of_near)
                weights[near] = 0
            pulls = weights
            row_factors = grad_values
            if ctx.scales is not None:
                scale_x, scale_y = ctx.scales
                beside = scale_y if columns is None else scale_y[columns]
                lengths = distances
                if slopes.is_cuda:  # elsewhere no row of zeros comes here; next to one the whole unit row is along
                    lengths = distances * (1 + (scale_x == 0).int()[:, None] + (beside == 0))
                pulls = torch.addcmul(weights, slopes, lengths, value=-0.5)
                row_factors = grad_values * scale_x
                weights = weights.mul_(beside)
            at_x, at_y = _sums(pulls, grad_values, columns, len(rows_y))
            weights = weights.mul_(row_factors[:, None])
            if ctx.scales is not None:
                at_x, at_y = at_x * scale_x.square(), at_y * scale_y.square()
            matrix = _matrix(weights, columns, len(rows_y))

            grad_x = grad_y = None
            if y is None:  # both sides are x: their weights add up, and one product does for two
                grad_x = grad_y = _pull(rows_x, rows_x, at_x + at_y, _plus_transposed(matrix))
            else:
                grad_x = _pull(rows_x, rows_y, at_x, matrix) if ctx.needs_input_grad[0] else None
                grad_y = _pull(rows_y, rows_x, at_y, matrix.t()) if ctx.needs_input_grad[1] else None
            for i, j, w in _in_parts(x.shape[1], pairs):
                difference = w[:, None] * (x[i] - (x if y is None else y)[j])
                if grad_x is not None:
                    grad_x.index_add_(0, i, difference)
                if grad_y is not None:
                    grad_y.index_add_(0, j, difference, alpha=-1)
            grad_x, grad_y = (None if grad is None else grad.to(dtype) for grad in (grad_x, grad_y))
        return grad_x, None if y is None else grad_y, None, None, None


class _Sparse(NamedTuple):
    """A sparse matrix; torch's own ones are slow to make, and multiply on some machines only."""

    rows: Tensor
    columns: Tensor
    values: Tensor
    shape: tuple[int, int]

    def t(self) -> _Sparse:
        return _Sparse(self.columns, self.rows, self.values, self.shape[::-1])

    def __matmul__(self, dense: Tensor) -> Tensor:
        rows, order = self.rows.sort()
        starts = torch.searchsorted(rows, torch.arange(self.shape[0], device=rows.device))
        return F.embedding_bag(self.columns[order], dense, starts, mode="sum", per_sample_weights=self.values[order])


def _matrix(values: Tensor, columns: Tensor | None, width: int) -> Tensor | _Sparse:
    """The (N, width) matrix with ``values`` (N, C) in ``columns``, sparse where that is faster."""
    if columns is None:
        return values
    if values.is_cuda or width <= _SPARSE * columns.shape[1]:
        return values.new_zeros(len(values), width).scatter_add_(1, columns, values)
    rows = torch.arange(len(values), device=values.device).repeat_interleave(columns.shape[1])
    return _Sparse(rows, columns.flatten(), values.flatten(), (len(values), width))


def _sums(values: Tensor, factors: Tensor, columns: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
    """The sums of that matrix's rows and columns, its rows multiplied by (N,) factors before."""
    if columns is None:
        return values.sum(dim=1) * factors, factors @ values
    values = values * factors[:, None]
    return values.sum(dim=1), values.new_zeros(width).index_add_(0, columns.flatten(), values.flatten())


def _plus_transposed(matrix: Tensor | _Sparse) -> Tensor | _Sparse:
    if isinstance(matrix, Tensor):
        return matrix.t().clone(memory_format=torch.contiguous_format).add_(matrix)
    other = matrix.t()
    rows, columns, values = (torch.cat(pair) for pair in zip(matrix[:3], other[:3]))
    return _Sparse(rows, columns, values, matrix.shape)


def _pull(x: Tensor, y: Tensor, own: Tensor, matrix: Tensor | _Sparse) -> Tensor:
    """``own[i] x[i] - sum_j matrix[i, j] y[j]``, (N, D)."""
    if isinstance(matrix, _Sparse):
        return (matrix @ y).neg_().addcmul_(x, own[:, None])
    if y is x:  # in one product
        matrix.diagonal().sub_(own)
        return torch.addmm(x, matrix, x, beta=0, alpha=-1)
    return (x * own[:, None]).addmm_(matrix, y, alpha=-1)


def nearest(squares: Tensor, positive: Tensor, negative: Tensor, k: int) -> Tensor:
    """Columns of each anchor's ``k`` nearest references; of equally near ones positives go first, then lower columns.

    Args:
        squares: squared distances, (N, M).
        positive: bool (N, M), the references with the anchor's label.
        negative: bool (N, M), those with another. A column that is neither is taken last.
        k: how many, >= 1.

    Returns:
        int64 (N, min(k, M)) columns, in no particular order.
    """
    k = min(k, squares.shape[1])
    if k == squares.shape[1]:
        return torch.arange(k, device=squares.device).expand_as(squares)
    masked = squares.masked_fill(~(positive | negative), torch.inf)
    if squares.is_cuda:  # to ask which rows have ties is to wait for the device
        return _first_in_order(masked, positive, k)
    values, columns = masked.topk(k + 1, dim=1, largest=False)
    columns = columns[:, :k]
    # topk leaves open which of equal distances it takes. That matters where they straddle the k-th place, as with an
    # image that stands in the batch twice.
    tied = values[:, k - 1] == values[:, k]
    if tied.any():
        columns = columns.clone()
        columns[tied] = _first_in_order(masked[tied], positive[tied], k)
    return columns


def _first_in_order(squares: Tensor, positive: Tensor, k: int) -> Tensor:
    positives_first = (~positive).to(torch.uint8).sort(dim=1, stable=True).indices
    order = squares.gather(1, positives_first).sort(dim=1, stable=True).indices[:, :k]
    return positives_first.gather(1, order)
