"""Matrices of weights between anchors and references, dense or sparse, and their products with features."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Sparse", "column_sums", "from_columns", "plus_transposed"]

# A sparse product wins where the matrix has more than this many columns for each that is not 0.
_SPARSE = 16


class Sparse(NamedTuple):
    """A sparse matrix; torch's own ones are slow to make, and multiply on some machines only."""

    rows: Tensor
    columns: Tensor
    values: Tensor
    shape: tuple[int, int]

    def t(self) -> Sparse:
        return Sparse(self.columns, self.rows, self.values, self.shape[::-1])

    def __matmul__(self, dense: Tensor) -> Tensor:
        rows, order = self.rows.sort()
        starts = torch.searchsorted(rows, torch.arange(self.shape[0], device=rows.device))
        return F.embedding_bag(self.columns[order], dense, starts, mode="sum", per_sample_weights=self.values[order])


def from_columns(values: Tensor, columns: Tensor | None, width: int) -> Tensor | Sparse:
    """The (N, width) matrix with `values` (N, C) in `columns`, sparse where that is faster."""
    if columns is None:
        return values
    if width <= _SPARSE * columns.shape[1]:
        return values.new_zeros(len(values), width).scatter_add_(1, columns, values)
    rows = torch.arange(len(values), device=values.device).repeat_interleave(columns.shape[1])
    return Sparse(rows, columns.flatten(), values.flatten(), (len(values), width))


def column_sums(values: Tensor, columns: Tensor | None, width: int) -> Tensor:
    """The (width,) sums of that matrix's columns."""
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
