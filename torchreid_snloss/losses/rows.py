"""Lengths of features, without overflow or underflow."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["divided", "fill_diagonal", "lengths", "take", "wide"]


def wide(x: Tensor) -> torch.dtype:
    """float64, which holds the square of any float32; where the device has none, the dtype of `x`."""
    return x.dtype if x.device.type == "mps" else torch.float64


def lengths(x: Tensor) -> Tensor:
    """Lengths of rows, (N, 1), to divide by; float64 where the device has it.

    Infinite for a row of zeros, and for one so short that its inverse is beyond the dtype of `x`: divided by it, the
    row and its gradient are 0.
    """
    result: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide(x))
    return result.masked_fill_(result < 1 / torch.finfo(x.dtype).max, torch.inf)


def take(tensor: Tensor, rows: slice) -> Tensor:
    """`tensor[rows]`, without an operation where these are all rows."""
    return tensor if rows.start == 0 and rows.stop >= len(tensor) else tensor[rows]


def fill_diagonal(matrix: Tensor, value: float, offset: int) -> None:
    """Fills the pairs of an anchor with itself, of which the first is in column `offset`."""
    if offset == 0:
        matrix.fill_diagonal_(value)
    else:
        matrix.diagonal(offset).fill_(value)


def divided(slopes: Tensor, distances: Tensor) -> Tensor:
    """`slopes / distances`, of distances whose square is at least the smallest normal number; finite at 0."""
    least = distances.clamp(min=math.sqrt(torch.finfo(distances.dtype).tiny))
    return torch.div(slopes, least, out=least)
