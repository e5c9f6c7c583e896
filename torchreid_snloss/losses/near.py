"""Distances and gradients of pairs of rows that are close to each other, computed from the difference of the rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torchreid_snloss.losses.rows import lengths, rows_at_once

__all__ = ["add_gradients", "fill_distances"]

_ELEMENTS_AT_ONCE = 1 << 20


def fill_distances(distances: Tensor, x: Tensor, y: Tensor, pairs: tuple[Tensor, Tensor], normalize: bool) -> None:
    """Writes the distances of `pairs`, rows and columns, into `distances` (N, M)."""
    for i, j in _in_parts(x, *pairs):
        difference = x[i] / lengths(x[i]) - y[j] / lengths(y[j]) if normalize else x[i] - y[j]
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
    for i, j, w in _in_parts(x, *pairs, weights):
        pulls = (_pulls_of_unit_rows if normalize else _pulls)(x[i], y[j], w[:, None])
        for gradient, rows, pull in zip((at_x, at_y), (i, j), pulls):
            if gradient is not None:
                gradient.index_add_(0, rows, pull)


def _pulls(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    pull = weights * (x - y)
    return pull, -pull


def _pulls_of_unit_rows(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of a pair of normalised rows: the component orthogonal to the row, divided by the row's length."""
    x_lengths, y_lengths = lengths(x), lengths(y)
    unit_x, unit_y = x / x_lengths, y / y_lengths
    pull = weights * (unit_x - unit_y)

    def across(unit: Tensor, divisors: Tensor) -> Tensor:
        along = (pull * unit).sum(dim=1, keepdim=True)
        return (pull - along * unit).div_(divisors).to(x.dtype)

    return across(unit_x, x_lengths), across(unit_y, y_lengths).neg_()


def _in_parts(x: Tensor, *pairs: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Splits the pairs into chunks, so that their differences take little memory."""
    yield from zip(*(tensor.split(rows_at_once(x, _ELEMENTS_AT_ONCE)) for tensor in pairs))
