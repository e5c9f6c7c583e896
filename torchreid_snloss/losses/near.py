"""Distances and gradients of pairs of rows that are close to each other, computed from the difference of the rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from torchreid_snloss.losses.rows import lengths, on_cpu, rows_at_once

__all__ = ["add_gradients", "fill_distances"]

_ELEMENTS_AT_ONCE = 1 << 17


def fill_distances(distances: Tensor, x: Tensor, y: Tensor, pairs: tuple[Tensor, Tensor], normalize: bool) -> None:
    """Writes the distances of `pairs`, rows and columns, into `distances` (N, M)."""
    for i, j in _in_parts(x, *pairs):
        difference = _UnitRows.of(x, i).each() - _UnitRows.of(y, j).each() if normalize else x[i] - y[j]
        distances[i, j] = torch.linalg.vector_norm(difference, dim=1).to(distances.dtype)


def add_gradients(
    at_x: Tensor | None,
    at_y: Tensor | None,
    x: Tensor,
    y: Tensor,
    pairs: tuple[Tensor, Tensor],
    weights: Tensor,
    normalize: bool,
) -> None:
    """Adds the gradients of pairs, `weights (x[i] - y[j])` and its negative, to `at_x`, (N, D), and `at_y`, (M, D)."""
    for i, j, w in _in_parts(x, *pairs, weights[:, None]):
        if not normalize:
            pulls = w * (x[i] - y[j])
            for gradient, rows, sign in ((at_x, i, 1), (at_y, j, -1)):
                if gradient is not None:
                    gradient.index_add_(0, rows, pulls, alpha=sign)
            continue
        unit_x, unit_y = _UnitRows.of(x, i), _UnitRows.of(y, j)
        pulls = w * (unit_x.each() - unit_y.each())
        for gradient, units, sign in ((at_x, unit_x, 1), (at_y, unit_y, -1)):
            if gradient is not None:
                gradient.index_add_(0, units.rows, units.gradient(pulls).to(gradient.dtype), alpha=sign)


class _UnitRows(NamedTuple):
    """The rows that some pairs have on one side, normalised; on a CPU each only once in a chunk."""

    rows: Tensor
    """int64 (R,), which rows."""
    of_pairs: Tensor
    """int64 (P,), the place in `rows` of each pair's row."""
    units: Tensor
    """(R, D), the normalised rows; float64 if the device supports it."""
    lengths: Tensor
    """(R, 1)"""

    @classmethod
    def of(cls, x: Tensor, rows: Tensor) -> _UnitRows:
        if on_cpu(x):
            rows, of_pairs = rows.unique(return_inverse=True)
        else:  # a GPU would be waited for, and normalising a row again costs it little
            of_pairs = torch.arange(len(rows), device=rows.device)
        own = x[rows]
        row_lengths = lengths(own)
        return cls(rows, of_pairs, own / row_lengths, row_lengths)

    def each(self) -> Tensor:
        """(P, D), the normalised row of each pair."""
        return self.units[self.of_pairs]

    def gradient(self, pulls: Tensor) -> Tensor:
        """(R, D), the sum of each row's pulls (P, D): its component orthogonal to the row, by the row's length."""
        sums = torch.zeros_like(self.units).index_add_(0, self.of_pairs, pulls)
        along = (sums * self.units).sum(dim=1, keepdim=True)
        return sums.addcmul_(along, self.units, value=-1).div_(self.lengths)


def _in_parts(x: Tensor, *pairs: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Splits the pairs into chunks, so that their differences take little memory."""
    yield from zip(*(tensor.split(rows_at_once(x, _ELEMENTS_AT_ONCE)) for tensor in pairs))
