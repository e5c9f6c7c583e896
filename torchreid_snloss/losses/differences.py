"""Distances from the differences of all pairs of rows: exact, few operations, and no wait for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchreid_snloss.losses.rows import inverse_lengths, smallest_distance

__all__ = ["Differences"]


class Prepared(NamedTuple):
    """Rows of both sides: `x + x_low` has twice the digits of the dtype. A `y` of None is `x`."""

    x: Tensor
    x_low: Tensor | None
    x_scale: Tensor | None
    """(N, 1), what a gradient at the unit rows is multiplied by; None where rows are not normalised."""
    y: Tensor | None
    y_low: Tensor | None
    y_scale: Tensor | None


class Block(NamedTuple):
    distances: Tensor
    differences: Tensor
    """(N, M, D)"""


class Differences:
    """Takes the difference of every pair of rows, (N, M, D); for batches whose differences fit into memory.

    Normalised rows are held in two floats each: of rows 1e-6 apart one float would leave the distance one digit.
    """

    prepared_type, block_type = Prepared, Block

    def prepare(self, x: Tensor, y: Tensor | None, normalize: bool, in_blocks: bool) -> Prepared:
        """See `Distances.prepare`."""
        return Prepared(*_rows(x, normalize), *((None, None, None) if y is None else _rows(y, normalize)))

    def block(self, prepared: Prepared, rows: slice, self_offset: int | None) -> tuple[Prepared, Block]:
        """See `Distances.block`."""
        x, x_low, _, y, y_low, _ = prepared
        if y is None:
            y, y_low = x, x_low
        differences = x[rows].unsqueeze(1) - y
        if x_low is not None and y_low is not None:
            differences.add_(x_low[rows].unsqueeze(1)).sub_(y_low)
        return prepared, Block(torch.linalg.vector_norm(differences, dim=2), differences)

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
        distances, differences = block
        if columns is not None:
            slopes = torch.zeros_like(distances).scatter_add_(1, columns, slopes)
        weights = slopes / distances.clamp(min=smallest_distance(slopes.dtype))
        x, _, x_scale, y, _, y_scale = prepared
        if y is None and len(distances) == len(x):  # the same rows on both sides: one product does for two
            return _at_rows(weights + weights.t(), differences, x, x_scale), None
        at_x = (
            _at_rows(weights, differences, x[rows], None if x_scale is None else x_scale[rows]) if wanted[0] else None
        )
        if not wanted[1]:
            return at_x, None
        y, y_scale = (x, x_scale) if y is None else (y, y_scale)
        return at_x, _at_rows(-weights.t(), differences.transpose(0, 1), y, y_scale)


def _rows(x: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Rows, what rounding left out of them, and their scale."""
    if not normalize:
        return x, None, None
    inverse = inverse_lengths(x)
    unit = x * inverse
    high = unit.to(x.dtype)
    low = None if unit.dtype == x.dtype else (unit - high).to(x.dtype)
    return high, low, inverse.to(x.dtype)


def _at_rows(weights: Tensor, differences: Tensor, rows: Tensor, scale: Tensor | None) -> Tensor:
    """`sum_j weights[i, j] differences[i, j]`, without the part along a unit row, (N, D)."""
    pull = torch.bmm(weights.unsqueeze(1), differences).squeeze(1)
    if scale is None:
        return pull
    along = (pull * rows).sum(dim=1, keepdim=True)
    return pull.addcmul_(rows, along, value=-1).mul_(scale)
