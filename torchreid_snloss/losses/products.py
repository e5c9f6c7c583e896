"""Distances from matrix products, and for near rows from their differences: fast for large batches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchreid_snloss.losses import near
from torchreid_snloss.losses.rows import divided, fill_diagonal, lengths, on_cpu, rows_at_once, take
from torchreid_snloss.losses.weights import (
    Sparse,
    column_sums,
    from_columns,
    plus_transposed,
    scaled,
    weighted_differences,
)

__all__ = ["Products"]

# |x|^2 + |y|^2 - 2xy loses its digits where the result is small beside its terms. A pair is near if its squared
# distance is at most this share of |x|^2; the distance of near rows, and its gradient, come from their difference.
_NEAR = 2e-3
# If anchors have more near references than this on average, the features crowd around one point. Distances do not
# depend on the origin but rounding does, so the origin is moved to that point.
_MAX_NEAR_PER_ROW = 4
# Rows with lengths outside this range are left to the differences, which are made in float64: float32 loses digits of
# their squares.
_SHORTEST, _LONGEST = 1e-15, 1e15
_ELEMENTS_AT_ONCE = 1 << 17
_ROWS_OF_HALF = 128


class _Side(NamedTuple):
    """The tensors of the anchors or of the references."""

    rows: Tensor
    """(N, D)"""
    points: Tensor
    """(N, D), what products are made of: the rows, or the raw or normalised rows minus an origin."""
    squares: Tensor
    """(N,), squared lengths of the points; 1 where `scale` normalises the products; NaN makes a row's pairs near."""
    scale: Tensor | None
    """(N,), inverse lengths of the rows, 0 where there is none; None where rows are not normalised."""

    def some(self, rows: slice) -> _Side:
        return _Side(
            take(self.rows, rows),
            take(self.points, rows),
            take(self.squares, rows),
            None if self.scale is None else take(self.scale, rows),
        )


class Prepared(NamedTuple):
    """The tensors of anchors `x_` and references `y_`, and the origin.

    Those of the references are None if they are the anchors. The origin is None if the points are the rows themselves.
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
        """Some anchors, and the references; the same object twice if both are all the anchors."""
        anchors = _Side(self.x_rows, self.x_points, self.x_squares, self.x_scale)
        if self.y_rows is not None and self.y_points is not None and self.y_squares is not None:
            return anchors.some(rows), _Side(self.y_rows, self.y_points, self.y_squares, self.y_scale)
        all_rows = rows.start == 0 and rows.stop >= len(self.x_rows)
        return anchors if all_rows else anchors.some(rows), anchors


class Block(NamedTuple):
    """Distances of some anchors, (N, M), and the near pairs: a mask, rows and columns, or None if there are none."""

    distances: Tensor
    is_near: Tensor | None
    near_rows: Tensor | None
    near_columns: Tensor | None


class Products:
    """Computes distances by one matrix product, and recomputes those of near rows from their differences.

    A block of anchors waits for a GPU once, to see if any pair is near, and up to four times more if some are. Under
    `torch.set_float32_matmul_precision("high")` distances on a GPU have three digits.
    """

    prepared_type, block_type = Prepared, Block

    def prepare(self, x: Tensor, y: Tensor | None, normalize: bool, in_blocks: bool) -> Prepared:
        """See `Distances.prepare`."""
        if in_blocks or _rounds_products(x):  # once for all blocks
            return _centred(x, y, normalize)
        side = _scaled_side if normalize else _raw_side
        return _prepared(side(x, x), None if y is None else side(y, y), None)

    def block(self, prepared: Prepared, rows: slice, self_offset: int | None) -> tuple[Prepared, Block]:
        """See `Distances.block`."""
        anchors, references = prepared.sides(rows)
        normalize = anchors.scale is not None
        squares = _squares(anchors, references, moved=prepared.origin is not None)
        if self_offset is not None:
            fill_diagonal(squares, torch.inf, self_offset)
        limits = _NEAR * anchors.squares
        is_near = near_rows = near_columns = None
        if not (squares.amin(dim=1) > limits).all():  # so that a NaN is near
            is_near = (squares > limits[:, None]).logical_not_()
            near_rows, near_columns = is_near.nonzero(as_tuple=True)
            if prepared.origin is None and len(near_rows) > _MAX_NEAR_PER_ROW * len(squares):
                return self.block(_centred(prepared.x_rows, prepared.y_rows, normalize), rows, self_offset)
        if self_offset is not None:
            fill_diagonal(squares, 0.0, self_offset)
        distances = squares.sqrt_()
        if near_rows is not None and near_columns is not None:
            near.fill_distances(distances, anchors.rows, references.rows, (near_rows, near_columns), normalize)
        return prepared, Block(distances, is_near, near_rows, near_columns)

    def select(self, block: Block, columns: Tensor) -> Block:
        """See `Distances.select`."""
        is_near = None if block.is_near is None else block.is_near.gather(1, columns)
        return block._replace(distances=block.distances.gather(1, columns), is_near=is_near)

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
        distances = block.distances
        weights = divided(slopes, distances)
        if block.is_near is None or block.near_rows is None or block.near_columns is None:
            return _gradients(anchors, references, prepared.origin, distances, slopes, weights, columns, wanted)
        # Near pairs have large weights; in a product they would cancel and lose all precision.
        # Equal rows pull with 0: left out, few pairs remain where features have collapsed. NaN and infinity stay.
        weights.masked_fill_((distances == 0) & weights.isfinite(), 0)
        i, j = block.near_rows, block.near_columns
        near_weights = weights[i, j] if columns is None else (weights[i] * (columns[i] == j[:, None])).sum(dim=1)
        kept = near_weights.nonzero().squeeze(1)
        i, j, near_weights = i[kept], j[kept], near_weights[kept]
        weights.masked_fill_(block.is_near, 0)
        slopes = slopes.masked_fill(block.is_near, 0)
        at_x, at_y = _gradients(anchors, references, prepared.origin, distances, slopes, weights, columns, wanted)
        at_references = at_x if references is anchors else at_y
        normalize = anchors.scale is not None
        near.add_gradients(at_x, at_references, anchors.rows, references.rows, (i, j), near_weights, normalize)
        return at_x, at_y


def _rounds_products(x: Tensor) -> bool:
    """Whether products of float32 lose digits, by TF32 or bfloat16: those of points around 0 lose fewer."""
    return not on_cpu(x) and x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"


def _prepared(anchors: _Side, references: _Side | None, origin: Tensor | None) -> Prepared:
    return Prepared(*anchors, *((None, None, None, None) if references is None else references), origin)  # type: ignore[call-arg]


def _raw_side(x: Tensor, points: Tensor) -> _Side:
    return _Side(x, points, torch.linalg.vector_norm(points, dim=1).square_(), None)


def _scaled_side(x: Tensor, _: Tensor) -> _Side:
    """Rows that are normalised by scaling their products."""
    row_lengths = torch.linalg.vector_norm(x, dim=1)
    unusable = row_lengths.clamp(_SHORTEST, _LONGEST) != row_lengths
    squares = torch.ones_like(row_lengths).masked_fill_(unusable, torch.nan)
    return _Side(x, x, squares, row_lengths.reciprocal_().masked_fill_(unusable, 0))


def _unit_side(x: Tensor, divisors: Tensor, origin: Tensor) -> _Side:
    """Normalised rows minus the origin, computed in float64 a few rows at a time and rounded once."""
    points = torch.empty_like(x)
    at_once = rows_at_once(x, _ELEMENTS_AT_ONCE)
    for part, rows, row_lengths in zip(points.split(at_once), x.split(at_once), divisors.split(at_once)):
        part.copy_((rows / row_lengths).sub_(origin))
    scale = divisors[:, 0].reciprocal().to(x.dtype)
    # A row of zeros stays zero when normalised, but the products assume rows of length 1, so its pairs are made near.
    squares = torch.linalg.vector_norm(points, dim=1).square_().masked_fill_(scale == 0, torch.nan)
    return _Side(x, points, squares, scale)


def _centred(x: Tensor, y: Tensor | None, normalize: bool) -> Prepared:
    """Moves the origin to the middle of the references, so that the points are around 0."""
    others = x if y is None else y
    if not normalize:
        # The row of median length serves as the origin, because a single outlier could move the mean far away.
        middle = torch.linalg.vector_norm(others, dim=1).median(dim=0, keepdim=True).indices
        origin = others.index_select(0, middle).squeeze(0)
        return _prepared(_raw_side(x, x - origin), None if y is None else _raw_side(y, y - origin), origin)
    x_lengths = lengths(x)
    y_lengths = x_lengths if y is None else lengths(y)
    origin = y_lengths[:, 0].reciprocal().to(x.dtype) @ others / len(others)
    references = None if y is None else _unit_side(y, y_lengths, origin)
    return _prepared(_unit_side(x, x_lengths, origin), references, origin)


def _squares(anchors: _Side, references: _Side, moved: bool) -> Tensor:
    """Squared distances from products, (N, M)."""
    x, y = anchors.points, references.points
    products = _own_products(x) if references is anchors else x @ y.t()
    if anchors.scale is None or references.scale is None or moved:
        products.mul_(-2)
    else:
        products.mul_(-2 * anchors.scale[:, None]).mul_(references.scale)
    return products.add_(anchors.squares[:, None]).add_(references.squares)


def _own_products(x: Tensor) -> Tensor:
    """`x @ x.t()`; on a CPU in blocks of rows up to the diagonal, since the other half is the same."""
    if len(x) <= _ROWS_OF_HALF or not on_cpu(x):
        return x @ x.t()
    products = x.new_empty(len(x), len(x))
    for start in range(0, len(x), _ROWS_OF_HALF):
        end = min(start + _ROWS_OF_HALF, len(x))
        torch.mm(x[start:end], x[:end].t(), out=products[start:end, :end])
        products[:start, start:end] = products[start:end, :start].t()
    return products


def _gradients(
    anchors: _Side,
    references: _Side,
    origin: Tensor | None,
    distances: Tensor,
    slopes: Tensor,
    weights: Tensor,
    columns: Tensor | None,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients at anchors and references of all pairs but the near ones, whose weights and slopes are 0.

    The gradient at `x[i]` is `sum_j weights[i, j] (x[i] - y[j])`; a pair's share of that at `y[j]` is the opposite. For
    normalised rows, `d |u - v| / du = (u - v) / |u - v|` loses its component along `u`, which is `|u - v| / 2`.
    """
    width = len(references.rows)
    pulls, along_x, along_y = weights, None, None
    if anchors.scale is not None:
        pulls = torch.addcmul(weights, slopes, distances, value=-0.5)
        if origin is not None:
            along = (slopes * distances).mul_(0.5)
            along_x, along_y = along.sum(dim=1), column_sums(along, columns, width)
    sums_x, sums_y = pulls.sum(dim=1), column_sums(pulls, columns, width)
    matrix = from_columns(weights, columns, width)
    if references is anchors:  # adding the weights of both sides saves one product
        along_both = None if along_x is None or along_y is None else along_x + along_y
        return _gradient(anchors, anchors, sums_x + sums_y, along_both, plus_transposed(matrix), origin), None
    at_x = _gradient(anchors, references, sums_x, along_x, matrix, origin) if wanted[0] else None
    at_y = _gradient(references, anchors, sums_y, along_y, matrix.t(), origin) if wanted[1] else None
    return at_x, at_y


def _gradient(
    own: _Side, others: _Side, sums: Tensor, along: Tensor | None, matrix: Tensor | Sparse, origin: Tensor | None
) -> Tensor:
    x, y = own.points, others.points
    if own.scale is None or others.scale is None:
        return weighted_differences(x, y, sums, matrix)
    if origin is None or along is None:
        return weighted_differences(x, y, sums * own.scale.square(), scaled(matrix, own.scale, others.scale))
    # A unit row is its point plus the origin.
    return weighted_differences(x, y, sums, matrix).addr_(along, origin, alpha=-1).mul_(own.scale[:, None])
