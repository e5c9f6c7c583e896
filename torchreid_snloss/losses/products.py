"""Distances from matrix products, and from the differences of rows where these are near: fast for large batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from torchreid_snloss.losses.rows import inverse_lengths, smallest_distance
from torchreid_snloss.losses.sparse import Sparse, column_sums, from_columns, plus_transposed

__all__ = ["Products"]

# |x|^2 + |y|^2 - 2xy loses its digits where the result is small beside its terms. A pair is near if its squared
# distance is at most this share of |x|^2; the distance of near rows, and its gradient, come from their difference.
_NEAR = 2e-3
# Where anchors have more near references than this on average, the features crowd around one point. Distances do not
# change with the origin, digits do, so the origin is moved there.
_MANY = 4
# Rows whose squares are outside this range are left to the differences, which are made in float64.
_SMALLEST_SQUARE, _LARGEST_SQUARE = 1e-30, 1e30
_ELEMENTS_AT_ONCE = 1 << 20
_ROWS_AT_ONCE = 128


class _Side(NamedTuple):
    """The anchors, or the references, (N, D)."""

    rows: Tensor
    points: Tensor
    """What products are made of: the rows, or the raw or normalised rows minus an origin."""
    squares: Tensor
    """(N,), squared lengths of the points, 1 if they are scaled; NaN for rows whose pairs all count as near."""
    scale: Tensor | None
    """(N,), inverse lengths of the rows, 0 where there is none; None where rows are not normalised."""

    def some(self, rows: slice) -> _Side:
        return _Side(*(None if tensor is None else tensor[rows] for tensor in self))  # type: ignore[arg-type]


class Prepared(NamedTuple):
    """`_Side` of the anchors and of the references, None where they are the anchors; and the origin of the points.

    The origin is None where the points are the rows.
    """

    x_rows: Tensor
    x_points: Tensor
    x_squares: Tensor
    x_scale: Tensor | None
    y_rows: Tensor | None
    y_points: Tensor | None
    y_squares: Tensor | None
    y_scale: Tensor | None
    origin: Tensor | None

    def sides(self, rows: slice) -> tuple[_Side, _Side]:
        """Some anchors, and the references; the same object where these are all anchors."""
        anchors = _Side(*self[:4])
        if self.y_rows is not None:
            return anchors.some(rows), _Side(*self[4:8])  # type: ignore[arg-type]
        return (anchors if range(len(self.x_rows))[rows] == range(len(self.x_rows)) else anchors.some(rows)), anchors


class Block(NamedTuple):
    """Distances of some anchors, (N, M), and which pairs are near: a mask, and rows and columns; None: no pair is."""

    distances: Tensor
    is_near: Tensor | None
    near_rows: Tensor | None
    near_columns: Tensor | None


class Products:
    """Takes distances from one matrix product, and those of near rows from their differences.

    It waits for the device once a block of anchors, to find the near pairs; a second time where features crowd.
    """

    prepared_type, block_type = Prepared, Block

    def prepare(self, x: Tensor, y: Tensor | None, normalize: bool, in_blocks: bool) -> Prepared:
        """See `Distances.prepare`."""
        if in_blocks:  # once for all blocks
            return _centred(x, y, normalize)
        return Prepared(*_side(x, normalize), *(_NONE if y is None else _side(y, normalize)), None)

    def block(self, prepared: Prepared, rows: slice, self_offset: int | None) -> tuple[Prepared, Block]:
        """See `Distances.block`."""
        anchors, references = prepared.sides(rows)
        squares = _squares(anchors, references, scaled=prepared.origin is None)
        if self_offset is not None:
            squares.diagonal(self_offset).fill_(torch.inf)
        is_near = (squares > (_NEAR * anchors.squares)[:, None]).logical_not_()  # where there is a NaN, too
        i, j = is_near.nonzero(as_tuple=True)
        if prepared.origin is None and len(i) > _MANY * len(squares):
            prepared = _centred(prepared.x_rows, prepared.y_rows, prepared.x_scale is not None)
            return self.block(prepared, rows, self_offset)
        if self_offset is not None:
            squares.diagonal(self_offset).fill_(0)
        distances = squares.sqrt_()
        if len(i) == 0:
            return prepared, Block(distances, None, None, None)
        for near in _in_parts(anchors.rows.shape[1], i, j):
            x, y = anchors.rows[near[0]], references.rows[near[1]]
            difference = x - y if anchors.scale is None else _unit(x)[0] - _unit(y)[0]
            distances[near] = torch.linalg.vector_norm(difference, dim=1).to(distances.dtype)
        return prepared, Block(distances, is_near, i, j)

    def gradients(
        self,
        prepared: Prepared,
        block: Block,
        rows: slice,
        slopes: Tensor,
        columns: Tensor | None,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """See `Distances.gradients`."""
        anchors, references = prepared.sides(rows)
        distances = block.distances if columns is None else block.distances.gather(1, columns)
        weights = slopes / distances.clamp(min=smallest_distance(slopes.dtype))
        if block.is_near is None or block.near_rows is None or block.near_columns is None:
            along = None if anchors.scale is None else slopes.mul_(distances).mul_(0.5)
            return _of_products(anchors, references, prepared.origin, weights, along, columns, wanted)
        # The weights of near pairs are large, and would cancel in a product without digits left.
        i, j = block.near_rows, block.near_columns
        if columns is None:
            near_weights, is_near = weights[i, j], block.is_near
        else:
            near_weights = (weights[i] * (columns[i] == j[:, None])).sum(dim=1)
            is_near = block.is_near.gather(1, columns)
        weights.masked_fill_(is_near, 0)
        along = None if anchors.scale is None else slopes.mul_(distances).mul_(0.5).masked_fill_(is_near, 0)
        at_x, at_y = _of_products(anchors, references, prepared.origin, weights, along, columns, wanted)
        at_references = at_x if references is anchors else at_y
        for part_i, part_j, part_weights in _in_parts(anchors.rows.shape[1], i, j, near_weights):
            pull_x, pull_y = _pulls(
                anchors.rows[part_i], references.rows[part_j], part_weights, anchors.scale is not None
            )
            if at_x is not None:
                at_x.index_add_(0, part_i, pull_x)
            if at_references is not None:
                at_references.index_add_(0, part_j, pull_y)
        return at_x, at_y


_NONE = (None, None, None, None)


def _side(x: Tensor, normalize: bool) -> _Side:
    """Rows as they are, with their scale."""
    squares = torch.linalg.vector_norm(x, dim=1).square_()
    if not normalize:
        return _Side(x, x, squares, None)
    out_of_range = (squares < _SMALLEST_SQUARE) | (squares > _LARGEST_SQUARE)
    return _Side(x, x, torch.ones_like(squares).masked_fill_(out_of_range, torch.nan), _scale(squares, out_of_range))


def _scale(squares: Tensor, out_of_range: Tensor) -> Tensor:
    return squares.rsqrt().masked_fill_(out_of_range, 0)


def _centred(x: Tensor, y: Tensor | None, normalize: bool) -> Prepared:
    """The rows with 0 in the midst of the references."""
    others = x if y is None else y
    if not normalize:
        # One outlier would move the mean far from all the others.
        origin = others[torch.linalg.vector_norm(others, dim=1).median(dim=0).indices]
        sides = [_Side(rows, points := rows - origin, _squares_of(points), None) for rows in (x, y) if rows is not None]
    else:
        inverses = [inverse_lengths(rows) for rows in (x, y) if rows is not None]
        origin = inverses[-1][:, 0].to(x.dtype) @ others / len(others)
        sides = [_unit_side(rows, inverse, origin) for rows, inverse in zip((x, y), inverses) if rows is not None]
    return Prepared(*sides[0], *(_NONE if y is None else sides[1]), origin)


def _unit_side(x: Tensor, inverse: Tensor, origin: Tensor) -> _Side:
    """Normalised rows minus the origin, rounded once; a few at a time, since the digits take float64."""
    points = torch.empty_like(x)
    at_once = max(1, _ELEMENTS_AT_ONCE // 8 // x.shape[1])
    for part, rows, scale in zip(points.split(at_once), x.split(at_once), inverse.split(at_once)):
        part.copy_((rows * scale).sub_(origin))
    scale = inverse[:, 0].to(x.dtype)
    # A row of zeros is not of length 1, as the gradient of products has it.
    return _Side(x, points, _squares_of(points).masked_fill_(scale == 0, torch.nan), scale)


def _squares_of(x: Tensor) -> Tensor:
    squares: Tensor = torch.linalg.vector_norm(x, dim=1).square_()
    return squares


def _squares(anchors: _Side, references: _Side, scaled: bool) -> Tensor:
    """Squared distances from products, (N, M)."""
    x, y = anchors.points, references.points
    products = _own_products(x) if references is anchors else x @ y.t()
    if scaled and anchors.scale is not None and references.scale is not None:
        products.mul_(-2 * anchors.scale[:, None]).mul_(references.scale)
    else:
        products.mul_(-2)
    return products.add_(anchors.squares[:, None]).add_(references.squares)


def _own_products(x: Tensor) -> Tensor:
    """`x @ x.t()` in blocks of rows up to the diagonal, since the other half is the same."""
    if len(x) <= _ROWS_AT_ONCE:
        return x @ x.t()
    products = x.new_empty(len(x), len(x))
    for start in range(0, len(x), _ROWS_AT_ONCE):
        end = min(start + _ROWS_AT_ONCE, len(x))
        torch.mm(x[start:end], x[:end].t(), out=products[start:end, :end])
        products[:start, start:end] = products[start:end, :start].t()
    return products


def _of_products(
    anchors: _Side,
    references: _Side,
    origin: Tensor | None,
    weights: Tensor,
    along: Tensor | None,
    columns: Tensor | None,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients at anchors and references of the pairs with `weights`, by products.

    At `x[i]` distances pull by `sum_j weights[i, j] (x[i] - y[j])`, at `y[j]` by the opposite. Of the pull at a unit row
    the part along the row is left out: `sum_j along[i, j]`, where `along` is `weights |x[i] - y[j]|^2 / 2`.
    """
    width = len(references.rows)
    row_sums, column_sums_ = weights.sum(dim=1), column_sums(weights, columns, width)
    along_rows = along_columns = None
    if along is not None:
        along_rows, along_columns = along.sum(dim=1), column_sums(along, columns, width)
    matrix = from_columns(weights, columns, width)
    if references is anchors:  # the weights of both sides add up, and one product does for two
        sums = row_sums + column_sums_
        along_sums = None if along_rows is None or along_columns is None else along_rows + along_columns
        return _weighted_differences(anchors, anchors, sums, along_sums, plus_transposed(matrix), origin), None
    at_x = at_y = None
    if wanted[0]:
        at_x = _weighted_differences(anchors, references, row_sums, along_rows, matrix, origin)
    if wanted[1]:
        at_y = _weighted_differences(references, anchors, column_sums_, along_columns, matrix.t(), origin)
    return at_x, at_y


def _weighted_differences(
    own: _Side, others: _Side, sums: Tensor, along: Tensor | None, matrix: Tensor | Sparse, origin: Tensor | None
) -> Tensor:
    """`sums[i] x[i] - sum_j matrix[i, j] y[j]` of the rows behind the points, (N, D); changes `matrix`."""
    if own.scale is None or others.scale is None or along is None:
        return _combine(own.points, others.points, sums, matrix)
    if origin is None:
        matrix = _scaled(matrix, own.scale, others.scale)
        return _combine(own.points, others.points, (sums - along) * own.scale.square(), matrix)
    pull = _combine(own.points, others.points, sums - along, matrix)
    return pull.addr_(along, origin, alpha=-1).mul_(own.scale[:, None])


def _scaled(matrix: Tensor | Sparse, row_scale: Tensor, column_scale: Tensor) -> Tensor | Sparse:
    if isinstance(matrix, Sparse):
        return matrix._replace(values=matrix.values * row_scale[matrix.rows] * column_scale[matrix.columns])
    return (matrix * row_scale[:, None]).mul_(column_scale)


def _combine(x: Tensor, y: Tensor, sums: Tensor, matrix: Tensor | Sparse) -> Tensor:
    """`sums[i] x[i] - sum_j matrix[i, j] y[j]`, (N, D)."""
    if isinstance(matrix, Sparse):
        return (matrix @ y).neg_().addcmul_(x, sums[:, None])
    if y is x:  # in one product
        matrix.diagonal().sub_(sums)
        return torch.addmm(x, matrix, x, beta=0, alpha=-1)
    return (x * sums[:, None]).addmm_(matrix, y, alpha=-1)


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows divided by their lengths, and the inverse lengths, (N, 1), in float64."""
    inverse = inverse_lengths(x)
    return x * inverse, inverse


def _pulls(x: Tensor, y: Tensor, weights: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """What each pair adds to the gradients at its two rows, (P, D)."""
    if not normalize:
        pull = weights[:, None] * (x - y)
        return pull, -pull
    unit_x, inverse_x = _unit(x)
    unit_y, inverse_y = _unit(y)
    pull = weights[:, None] * (unit_x - unit_y)

    def across(unit: Tensor, inverse: Tensor) -> Tensor:
        along = (pull * unit).sum(dim=1, keepdim=True)
        return (pull - along * unit).mul_(inverse).to(x.dtype)

    return across(unit_x, inverse_x), across(unit_y, inverse_y).neg_()


def _in_parts(dimension: int, *pairs: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Near pairs, so many at a time that their differences take little memory."""
    yield from zip(*(tensor.split(max(1, _ELEMENTS_AT_ONCE // dimension)) for tensor in pairs))
