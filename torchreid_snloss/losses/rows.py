"""Operations on rows: lengths without overflow or underflow, slices, diagonals, safe division."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["divided", "fill_diagonal", "lengths", "on_cpu", "rows_at_once", "take", "wide"]

_ELEMENTS_ON_A_GPU = 1 << 22  # 16 MiB in float32


def wide(x: Tensor) -> torch.dtype:
    """float64, which holds the square of any float32; the dtype of `x` if the device does not support float64."""
    return x.dtype if x.device.type == "mps" else torch.float64


def lengths(x: Tensor) -> Tensor:
    """The lengths of rows, (N, 1), as divisors; float64 if the device supports it.

    The length is infinite for a row of zeros, and for a row so short that its inverse overflows in the dtype of `x`.
    Dividing by it makes the row and its gradient 0.
    """
    result: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide(x))
    return result.masked_fill_(result < 1 / torch.finfo(x.dtype).max, torch.inf)


def on_cpu(x: Tensor) -> bool:
    """Whether a tensor is on a CPU, where memory is the limit, rather than on a GPU, where launching kernels is."""
    return x.device.type == "cpu"


def rows_at_once(x: Tensor, elements_on_cpu: int) -> int:
    """How many rows to work on at a time; on a CPU few, so that they stay in its cache."""
    return max(1, (elements_on_cpu if on_cpu(x) else _ELEMENTS_ON_A_GPU) // x.shape[1])


def take(tensor: Tensor, rows: slice) -> Tensor:
    """`tensor[rows]`; returns `tensor` itself if the slice covers all rows."""
    return tensor if rows.start == 0 and rows.stop >= len(tensor) else tensor[rows]


def fill_diagonal(matrix: Tensor, value: float, offset: int) -> None:
    """Fills the entries for pairs of an anchor with itself; the first anchor is in column `offset`."""
    if offset == 0:
        matrix.fill_diagonal_(value)
    else:
        matrix.diagonal(offset).fill_(value)


def divided(slopes: Tensor, distances: Tensor) -> Tensor:
    """`slopes / distances`, where distances are clamped from below so that the result is finite for a distance of 0."""
    least = distances.clamp(min=math.sqrt(torch.finfo(distances.dtype).tiny))
    return torch.div(slopes, least, out=least)
