"""Lengths of features, without overflow or underflow."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["inverse_lengths", "smallest_distance", "wide"]


def wide(x: Tensor) -> torch.dtype:
    """float64, which holds the square of any float32; where the device has none, the dtype of `x`."""
    return x.dtype if x.device.type == "mps" else torch.float64


def inverse_lengths(x: Tensor) -> Tensor:
    """Inverse lengths of rows, (N, 1), float64 where the device has it.

    They are 0 for a row without a length, and for one so short that the dtype of `x` cannot hold the inverse.
    """
    inverse: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide(x)).reciprocal_()
    return inverse.masked_fill_(inverse > torch.finfo(x.dtype).max, 0)


def smallest_distance(dtype: torch.dtype) -> float:
    """The smallest distance that a slope is divided by; its square is the smallest normal number."""
    return math.sqrt(torch.finfo(dtype).tiny)
