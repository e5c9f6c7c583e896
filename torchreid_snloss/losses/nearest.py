"""Each anchor's nearest references."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["nearest", "nearest_by_sorting", "nearest_by_topk"]


def nearest(distances: Tensor, positive: Tensor, k: int) -> Tensor:
    """Columns of each anchor's `k` nearest references, in order.

    Of equally near ones positives go first, then lower columns.

    Args:
        distances: (N, M), infinite for references that are to be taken last.
        positive: bool (N, M), the references with the anchor's label.
        k: how many, >= 1.

    Returns:
        int64 (N, min(k, M)) columns.
    """
    # Sorting is slower than topk on a CPU; on a GPU a look at the ties would wait for the device.
    return (nearest_by_sorting if distances.device.type != "cpu" else nearest_by_topk)(distances, positive, k)


def nearest_by_topk(distances: Tensor, positive: Tensor, k: int) -> Tensor:
    """`nearest`, which sorts the few rows where two of the nearest are equally near."""
    values, columns = distances.topk(min(k + 1, distances.shape[1]), dim=1, largest=False)
    columns = columns[:, :k]
    # topk leaves open which of equal distances it takes and in which order, as with an image that stands in the batch
    # twice.
    tied = (values[:, :-1] == values[:, 1:]).any(dim=1)
    if tied.any():
        columns = columns.clone()
        columns[tied] = nearest_by_sorting(distances[tied], positive[tied], k)
    return columns


def nearest_by_sorting(distances: Tensor, positive: Tensor, k: int) -> Tensor:
    """`nearest`, by two stable sorts; never waits for a device."""
    positives_first = positive.view(torch.uint8).sort(dim=1, descending=True, stable=True).indices
    order = distances.gather(1, positives_first).sort(dim=1, stable=True).indices[:, :k]
    return positives_first.gather(1, order)
