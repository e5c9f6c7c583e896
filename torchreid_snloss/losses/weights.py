"""Matrices of weights between anchors and references, dense or sparse, and differences of rows weighted by them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Sparse", "column_sums", "from_columns", "plus_transposed", "scaled", "weighted_differences"]

# A sparse product is faster if a row has more than this many columns for each nonzero entry.
_SPARSE = 16


class Sparse(NamedTuple):
    """A sparse matrix. torch's own sparse tensors are slow to create, and not every build can multiply them."""

    rows: Tensor
    columns: Tensor
    values: Tensor
    shape: tuple[int, int]

    def t(self) -> Sparse:
        """The transpose."""
        return Sparse(self.columns, self.rows, self.values, self.shape[::-1])

    def __matmul__(self, dense: Tensor) -> Tensor:
        rows, order = self.rows.sort()
        starts = torch.searchsorted(rows, torch.arange(self.shape[0], device=rows.device))
        return F.embedding_bag(self.columns[order], dense, starts, mode="sum", per_sample_weights=self.values[order])


def from_columns(values: Tensor, columns: Tensor | None, width: int) -> Tensor | Sparse:
    """The (N, width) matrix with `values` (N, C) in `columns`; sparse if that is faster."""
    if columns is None:
        return values
    if width <= _SPARSE * columns.shape[1]:
        return values.new_zeros(len(values), width).scatter_add_(1, columns, values)
    rows = torch.arange(len(values), device=values.device).repeat_interleave(columns.shape[1])
    return Sparse(rows, columns.flatten(), values.flatten(), (len(values), width))


def column_sums(values: Tensor, columns: Tensor | None, width: int) -> Tensor:
    """The column sums, (width,), of the matrix that `from_columns` returns."""
    if columns is None:
        return values.sum(dim=0)
    return values.new_zeros(width).index_add_(0, columns.flatten(), values.flatten())


def plus_transposed(matrix: Tensor | Sparse) -> Tensor | Sparse:
    """The sum of a square matrix and its transpose."""
    if isinstance(matrix, Tensor):
        return matrix.t().clone(memory_format=torch.contiguous_format).add_(matrix)
    other = matrix.t()
    rows, columns, values = (torch.cat(pair) for pair in zip(matrix[:3], other[:3]))
    return Sparse(rows, columns, values, matrix.shape)


def scaled(matrix: Tensor | Sparse, row_scale: Tensor, column_scale: Tensor) -> Tensor | Sparse:
    """The matrix with its rows and columns multiplied by (N,) and (M,) factors."""
    if isinstance(matrix, Sparse):
        return matrix._replace(values=matrix.values * row_scale[matrix.rows] * column_scale[matrix.columns])
    return (matrix * row_scale[:, None]).mul_(column_scale)


def weighted_differences(x: Tensor, y: Tensor, row_sums: Tensor, matrix: Tensor | Sparse) -> Tensor:
    """`row_sums[i] x[i] - sum_j matrix[i, j] y[j]`, (N, D); modifies a dense `matrix` in place if `y` is `x`."""
    if isinstance(matrix, Sparse):
        return (matrix @ y).neg_().addcmul_(x, row_sums[:, None])
    if y is x:  # in one product
        matrix.diagonal().sub_(row_sums)
        return torch.addmm(x, matrix, x, beta=0, alpha=-1)
    return (x * row_sums[:, None]).addmm_(matrix, y, alpha=-1)
