"""Each anchor's nearest references."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["nearest", "nearest_by_sorting", "nearest_by_topk"]


def nearest(distances: Tensor, positive: Tensor, negative: Tensor, k: int) -> Tensor:
    """Columns of each anchor's `k` nearest references; of equally near ones positives go first, then lower columns.

    Args:
        distances: (N, M).
        positive: bool (N, M), the references with the anchor's label.
        negative: bool (N, M), those with another label. A column that is neither is taken last.
        k: How many, >= 1.

    Returns:
        int64 (N, min(k, M)) columns, in no particular order.
    """
    if k >= distances.shape[1]:
        return torch.arange(distances.shape[1], device=distances.device).expand_as(distances)
    masked = distances.masked_fill(~(positive | negative), torch.inf)
    # Sorting is slower than topk on a CPU; on a GPU a look at the ties would wait for the device.
    return (nearest_by_sorting if masked.is_cuda else nearest_by_topk)(masked, positive, k)


def nearest_by_topk(distances: Tensor, positive: Tensor, k: int) -> Tensor:
    """The columns that `nearest` describes, for `k` < M; rows with a tie at the `k`-th place are sorted."""
    values, columns = distances.topk(k + 1, dim=1, largest=False)
    columns = columns[:, :k]
    # topk leaves open which of equal distances it takes. That matters where they straddle the k-th place, as with an
    # image that stands in the batch twice.
    tied = values[:, k - 1] == values[:, k]
    if tied.any():
        columns = columns.clone()
        columns[tied] = nearest_by_sorting(distances[tied], positive[tied], k)
    return columns


def nearest_by_sorting(distances: Tensor, positive: Tensor, k: int) -> Tensor:
    """The columns that `nearest` describes, by two stable sorts; never waits for a device."""
    positives_first = (~positive).to(torch.uint8).sort(dim=1, stable=True).indices
    order = distances.gather(1, positives_first).sort(dim=1, stable=True).indices[:, :k]
    return positives_first.gather(1, order)
