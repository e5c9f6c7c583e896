"""Each anchor's nearest references."""

from __future__ import annotations

import torch
from torch import Tensor

from torchreid_snloss.losses.rows import on_cpu

__all__ = ["nearest", "nearest_by_sorting", "nearest_by_topk"]


def nearest(distances: Tensor, positive: Tensor, k: int) -> Tensor:
    """The columns of each anchor's `k` nearest references, nearest first.

    At equal distances, positives come first, then references with a lower column.

    Args:
        distances: (N, M), infinite for references that are to be taken last.
        positive: bool (N, M), the references with the anchor's label.
        k: how many, >= 1.

    Returns:
        int64 (N, min(k, M)) columns.
    """
    # On a CPU, sorting is slower than topk; on a GPU, the check for ties would synchronise with the device.
    return (nearest_by_topk if on_cpu(distances) else nearest_by_sorting)(distances, positive, k)


def nearest_by_topk(distances: Tensor, positive: Tensor, k: int) -> Tensor:
    """Implements `nearest` with topk, and sorts only the few rows with ties among the nearest."""
    values, columns = distances.topk(min(k + 1, distances.shape[1]), dim=1, largest=False)
    columns = columns[:, :k]
    # topk does not specify which of several equal distances it returns, nor their order. Such ties occur, for example,
    # if an image is in the batch twice.
    tied = (values[:, :-1] == values[:, 1:]).any(dim=1)
    if tied.any():
        columns = columns.clone()
        columns[tied] = nearest_by_sorting(distances[tied], positive[tied], k)
    return columns


def nearest_by_sorting(distances: Tensor, positive: Tensor, k: int) -> Tensor:
    """Implements `nearest` with two stable sorts, without synchronising with the device."""
    positives_first = positive.view(torch.uint8).sort(dim=1, descending=True, stable=True).indices
    order = distances.gather(1, positives_first).sort(dim=1, stable=True).indices[:, :k]
    return positives_first.gather(1, order)
