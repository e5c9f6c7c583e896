"""Losses on the batch of all processes, and on a memory of earlier batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from torchreid_snloss import distributed
from torchreid_snloss.losses.base import MetricLoss
from torchreid_snloss.losses.memory import Memory

__all__ = ["Criterion", "GlobalBatchLoss"]

Criterion = Callable[[Tensor, Tensor], Tensor]


class GlobalBatchLoss(nn.Module):
    """Compares this process's anchors with the features of all processes, and with those of a memory.

    The mean over processes of what it gives is the loss of the whole batch, and so is the mean of the parameters'
    gradients that ``DistributedDataParallel`` makes, whatever each process holds. Where there is one process and no
    memory it is the losses themselves.

    Args:
        criteria: losses by their names, each called ``criterion(features, pids)``. A :class:`MetricLoss` with the
            reduction ``"mean"`` computes a part on each process, anything else the whole loss on all.
        memory: features of earlier batches, in the order of the processes, the same on all of them. An image's own old
            feature is no reference of it. None: none.

    Raises:
        ValueError: for another reduction, and for a memory with a criterion that is no :class:`MetricLoss`.
    """

    def __init__(self, criteria: Mapping[str, Criterion], memory: Memory | None = None) -> None:
        super().__init__()
        for criterion in criteria.values():
            if isinstance(criterion, MetricLoss) and criterion.reduction != "mean":
                raise ValueError(f"over several batches the reduction must be 'mean', got {criterion.reduction!r}")
            if memory is not None and not isinstance(criterion, MetricLoss):
                raise ValueError(f"a memory takes this package's losses alone, got {type(criterion).__name__}")
        self.losses = dict(criteria)
        self.with_parameters = nn.ModuleDict({name: c for name, c in criteria.items() if isinstance(c, nn.Module)})
        self.memory = memory

    def forward(
        self,
        features: Tensor,
        pids: Tensor,
        images: Tensor | None = None,
        names: Iterable[str] | None = None,
        counts: list[int] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        values = self._values(features, pids, images, names, counts)
        several = len(self.losses) > 1
        return values, {
            f"{n}_{k}" if several else k: v for n in values for k, v in getattr(self.losses[n], "sums", {}).items()
        }

    def _values(
        self,
        features: Tensor,
        pids: Tensor,
        images: Tensor | None = None,
        names: Iterable[str] | None = None,
        counts: list[int] | None = None,
    ) -> dict[str, Tensor]:
        """Computes this process's share of the losses.

        Args:
            features: (n, D), of this process.
            pids: (n,).
            images: int64 (n,), numbers of the images; needed with a memory.
            names: of the criteria that are wanted; None: all.
            counts: of :func:`distributed.gather_counts`, where that is known already.

        Returns:
            a scalar for each criterion.

        Raises:
            ValueError: on all processes, if one of them has no image; or with a memory, if ``images`` are missing.
        """
        losses = {name: self.losses[name] for name in (self.losses if names is None else names)}
        counts = distributed.gather_counts(len(features)) if counts is None else counts
        memory = self.memory if self.memory is not None and self.memory.in_use else None
        if len(counts) == 1 and memory is None:
            return {name: criterion(features, pids) for name, criterion in losses.items()}
        if 0 in counts:
            raise ValueError(f"every process must have images, got {counts} on the {len(counts)} processes")
        all_features = distributed.gather_rows(features, counts)
        all_pids = distributed.gather_rows(pids, counts)
        references, reference_pids, left_out = all_features, all_pids, None
        if memory is not None:
            if images is None:
                raise ValueError("a memory needs to know which images the features are of, but images is None")
            old_features, old_pids, old_images = memory.features, memory.pids, memory.images
            memory.add(all_features, all_pids, distributed.gather_rows(images, counts))
            if old_features is not None and old_pids is not None and old_images is not None:
                references = torch.cat([references, old_features.to(features)])
                reference_pids = torch.cat([reference_pids, old_pids.to(pids)])
                # Two of one image in one batch are two images, as without a memory.
                in_batch = torch.zeros(len(images), len(all_pids), dtype=torch.bool, device=images.device)
                left_out = torch.cat([in_batch, images[:, None] == old_images.to(images)], dim=1)

        def share(criterion: Criterion) -> Tensor:
            if not isinstance(criterion, MetricLoss):
                return criterion(all_features, all_pids)
            own_column = distributed.rows_of(counts).start
            values, numbers = criterion.terms(features, pids, references, reference_pids, own_column, left_out)
            return values.sum() * len(counts) / distributed.all_reduce_sum(numbers.sum()).clamp(min=1)

        return {name: share(criterion) for name, criterion in losses.items()}
