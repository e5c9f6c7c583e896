"""Losses over the global batch of all processes, and over a memory of earlier batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchreid_snloss import distributed
from torchreid_snloss.losses.base import MetricLoss
from torchreid_snloss.losses.inputs import check_inputs
from torchreid_snloss.losses.memory import Memory

__all__ = ["Criterion", "GlobalBatchLoss"]

Criterion = Callable[[Tensor, Tensor], Tensor]


class _Batch(NamedTuple):
    """The features that this process's anchors are compared with."""

    features: Tensor
    """(m, D), the features of all processes."""
    pids: Tensor
    references: Tensor
    """(M, D), the features of all processes and of the memory."""
    reference_pids: Tensor
    excluded_pairs: Tensor | None
    """bool (n, M)"""


class GlobalBatchLoss(nn.Module):
    """Compares this process's anchors with the features of all processes, and with those of a memory.

    The mean of the values over processes is the loss of the global batch. The mean of the parameters' gradients, which
    `DistributedDataParallel` computes, is the gradient of that loss, even if processes hold different numbers of
    images. With one process and no memory, the module returns the losses themselves.

    Args:
        criteria: losses by name, each called as `criterion(features, pids)`. For a `MetricLoss`, whose reduction must
            be `"mean"`, each process computes its share; any other criterion is computed in full on each process.
        memory: features of earlier batches, in the order of the processes, the same on all of them. The old feature of
            an image is not a reference for the image itself. None if there is no memory.

    Attributes:
        losses: the criteria, by name.

    Raises:
        TypeError: for a `MetricLoss` with parameters.
        ValueError: for another reduction, and for a memory without a criterion or with one that is not a `MetricLoss`.
    """

    def __init__(self, criteria: Mapping[str, Criterion], memory: Memory | None = None) -> None:
        super().__init__()
        if memory is not None and not criteria:
            raise ValueError("a memory needs a metric loss that compares features with it, got none")
        for criterion in criteria.values():
            if isinstance(criterion, MetricLoss) and criterion.reduction != "mean":
                raise ValueError(f"over several batches the reduction must be 'mean', got {criterion.reduction!r}")
            if isinstance(criterion, MetricLoss) and any(weight.requires_grad for weight in criterion.parameters()):
                raise TypeError(
                    f"{type(criterion).__name__} has parameters, but a MetricLoss is trained by its features alone: "
                    "derive a loss that learns parameters from torch.nn.Module"
                )
            if memory is not None and not isinstance(criterion, MetricLoss):
                raise ValueError(f"a memory only works with this package's losses, got {type(criterion).__name__}")
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
        """Computes this process's share of the losses.

        Args:
            features: (n, D), of this process.
            pids: (n,).
            images: int64 (n,), numbers of the images; needed with a memory.
            names: of the criteria that are wanted; None: all.
            counts: the result of `distributed.gather_counts`, where that is known already.

        Returns:
            a scalar for each criterion; and the totals of the statistics, (2,) float32 each, a total and a number,
            which add up over processes. Where there are several criteria, a statistic's name begins with its
            criterion's and an underscore.

        Raises:
            TypeError, ValueError: as `MetricLoss.forward`.
            ValueError: on all processes, if one of them has no image; or with a memory, if `images` are missing.
        """
        wanted = list(self.losses if names is None else names)
        if any(isinstance(self.losses[name], MetricLoss) for name in wanted):
            check_inputs(features, pids)  # before a memory takes them in
        counts = distributed.gather_counts(len(features)) if counts is None else counts
        memory = self.memory if self.memory is not None and self.memory.in_use else None
        together = len(counts) > 1 or memory is not None
        batch = self._gather(features, pids, images, memory, counts) if together else None
        values, stat_totals = {}, {}
        for name in wanted:
            criterion = self.losses[name]
            if isinstance(criterion, MetricLoss):
                values[name], totals = _share(criterion, features, pids, batch, counts)
                prefix = f"{name}_" if len(self.losses) > 1 else ""
                stat_totals.update({prefix + key: total for key, total in totals.items()})
            else:
                values[name] = criterion(features, pids) if batch is None else criterion(batch.features, batch.pids)
        return values, stat_totals

    def _gather(
        self, features: Tensor, pids: Tensor, images: Tensor | None, memory: Memory | None, counts: list[int]
    ) -> _Batch:
        """Features of all processes and of the memory, which then takes in this batch."""
        if 0 in counts:
            raise ValueError(f"every process must have images, got {counts} on the {len(counts)} processes")
        all_features = distributed.gather_rows(features, counts)
        all_pids = distributed.gather_rows(pids, counts)
        batch = _Batch(all_features, all_pids, all_features, all_pids, None)
        if memory is None:
            return batch
        if images is None:
            raise ValueError("a memory needs to know which images the features are of, but images is None")
        old_features, old_pids, old_images = memory.features, memory.pids, memory.images
        memory.add(all_features, all_pids, distributed.gather_rows(images, counts))
        if old_features is None or old_pids is None or old_images is None:
            return batch
        # Repetitions of an image within a batch are compared with each other, as without a memory.
        in_batch = torch.zeros(len(images), len(all_pids), dtype=torch.bool, device=images.device)
        return batch._replace(
            references=torch.cat([all_features, old_features.to(features)]),
            reference_pids=torch.cat([all_pids, old_pids.to(pids)]),
            excluded_pairs=torch.cat([in_batch, images[:, None] == old_images.to(images)], dim=1),
        )


def _share(
    loss: MetricLoss, features: Tensor, pids: Tensor, batch: _Batch | None, counts: list[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """This process's share of a loss, and the totals of its statistics."""
    if batch is None:
        terms = loss.terms(features, pids, features, pids, self_offset=0)
        return loss.reduce(terms.values, terms.counts), terms.stat_totals
    offset = distributed.rows_of(counts).start
    terms = loss.terms(features, pids, batch.references, batch.reference_pids, offset, batch.excluded_pairs)
    number = distributed.all_reduce_sum(terms.counts.sum()).clamp(min=1)
    return terms.values.sum() * len(counts) / number, terms.stat_totals
