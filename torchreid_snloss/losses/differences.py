"""Distances from the differences of all pairs of rows: exact, few operations, and no synchronisation with the GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchreid_snloss.losses.rows import divided, lengths, take

__all__ = ["Differences"]


class Prepared(NamedTuple):
    """The rows of anchors `x` and references `y`; `y` is None if the references are the anchors."""

    x: Tensor
    """(N, D); normalised rows are float64 if the device supports it."""
    x_lengths: Tensor | None
    """(N, 1), the lengths by which rows were divided; None if they are not normalised."""
    y: Tensor | None
    y_lengths: Tensor | None


class Block(NamedTuple):
    """Distances of some anchors, (N, M), and the differences of which they are the lengths, (N, M, D)."""

    distances: Tensor
    differences: Tensor


class Differences:
    """Computes the difference of every pair of rows, (N, M, D); for batches whose differences fit into memory.

    Normalised rows, (N, D), are kept in float64 until they are subtracted, because in float32 the difference of two
    rows that are 1e-6 apart would have one correct digit. The differences, and everything that follows, have the dtype
    of the features.
    """

    prepared_type, block_type = Prepared, Block

    def prepare(self, x: Tensor, y: Tensor | None, normalize: bool, in_blocks: bool) -> Prepared:
        """See `Distances.prepare`."""
        return Prepared(*_rows(x, normalize), *((None, None) if y is None else _rows(y, normalize)))

    def block(self, prepared: Prepared, rows: slice, self_offset: int | None) -> tuple[Prepared, Block]:
        """See `Distances.block`."""
        x, x_lengths, y, _ = prepared
        y = x if y is None else y
        dtype = x.dtype if x_lengths is None else x_lengths.dtype
        x = take(x, rows).unsqueeze(1)
        if x.dtype == dtype:
            differences = x - y
        else:
            differences = torch.empty(len(x), *y.shape, dtype=dtype, device=y.device)
            torch.sub(x, y, out=differences)
        return prepared, Block(torch.linalg.vector_norm(differences, dim=2), differences)

    def select(self, block: Block, columns: Tensor) -> Block:
        """See `Distances.select`."""
        return block

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
        weights = divided(slopes, distances)
        x, x_lengths, y, y_lengths = prepared
        if y is None and len(distances) == len(x):  # anchors are references: one product gives both gradients
            return _at_rows(weights + weights.t(), differences, x, x_lengths), None
        at_x = at_y = None
        if wanted[0]:
            some_lengths = None if x_lengths is None else take(x_lengths, rows)
            at_x = _at_rows(weights, differences, take(x, rows), some_lengths)
        if wanted[1]:
            y, y_lengths = (x, x_lengths) if y is None else (y, y_lengths)
            at_y = _at_rows(-weights.t(), differences.transpose(0, 1), y, y_lengths)
        return at_x, at_y


def _rows(x: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    if not normalize:
        return x, None
    row_lengths = lengths(x)
    return x / row_lengths, row_lengths.to(x.dtype)


def _at_rows(weights: Tensor, differences: Tensor, rows: Tensor, row_lengths: Tensor | None) -> Tensor:
    """`sum_j weights[i, j] differences[i, j]`, (N, D); for normalised rows, without the component along the row."""
    pull = torch.bmm(weights.unsqueeze(1), differences).squeeze(1)
    if row_lengths is None:
        return pull
    along = (pull * rows).sum(dim=1, keepdim=True)
    return pull.addcmul_(rows, along, value=-1).div_(row_lengths)
