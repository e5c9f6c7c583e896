"""Wraps the losses for pytorch-metric-learning, its memory and its trainers. It needs that package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pytorch_metric_learning import losses
from pytorch_metric_learning.utils import loss_and_miner_utils
from torch import Tensor

from torchreid_snloss.losses import MetricLoss, means
from torchreid_snloss.losses.inputs import check_inputs

__all__ = ["CrossBatchMemory", "PairwiseLoss"]


class PairwiseLoss(losses.BaseMetricLossFunction):
    """One of this package's losses with pytorch-metric-learning's `forward`, reducers and statistics.

    `forward(embeddings, labels, indices_tuple=None, ref_emb=None, ref_labels=None)`: with the pairs or triplets of a
    miner, an anchor has the positives and negatives that the miner selects; without a miner it has all of them. With
    the default reducer, the result equals that of the wrapped loss. The wrapped loss decides whether embeddings are
    normalised; the argument `distance` is not accepted.

    Args:
        loss: The loss to wrap. Its reduction must be `"mean"`.
        **options: `reducer`, `embedding_regularizer`, `embedding_reg_weight`, `collect_stats`.

    Attributes:
        d_pos, d_neg, anchors, ...: The loss's `statistics`, as floats, where `collect_stats` is set.

    Raises:
        TypeError: For a loss that is not one of this package's, and for a `distance`.
        ValueError: For another reduction; when called, for pairs of `indices_tuple` that the labels contradict.

    Example:
        ```python
        loss = PairwiseLoss(SNLoss(scale=10.0))
        loss(features, labels, MultiSimilarityMiner()(features, labels))
        memory = CrossBatchMemory(loss, embedding_size=512, memory_size=4096)
        ```
    """

    def __init__(self, loss: MetricLoss, **options: Any) -> None:
        if not isinstance(loss, MetricLoss):
            raise TypeError(f"loss must be one of this package's, a MetricLoss, got {type(loss).__name__}")
        if "distance" in options:
            raise TypeError("distance is not accepted: the loss has Euclidean distances")
        super().__init__(**options)
        if loss.reduction != "mean":
            raise ValueError(f"the loss's reduction must be 'mean', got {loss.reduction!r}; the reducer does the rest")
        self.loss = loss
        self.loss.collect_statistics = bool(self.collect_stats)

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor
    ) -> dict[str, Any]:
        """A value for each anchor that counts."""
        check_inputs(embeddings, labels, ref_emb, ref_labels)
        excluded = None
        if indices_tuple is not None:
            pairs = loss_and_miner_utils.convert_to_pairs(indices_tuple, labels, ref_labels)
            excluded = torch.ones(len(embeddings), len(ref_emb), dtype=torch.bool, device=embeddings.device)
            for kind, anchors, others in ("positive", *pairs[:2]), ("negative", *pairs[2:]):
                if ((labels[anchors] == ref_labels[others]) != (kind == "positive")).any():
                    raise ValueError(f"indices_tuple has {kind} pairs that the labels contradict")
                excluded[anchors, others] = False
        self_offset = 0 if ref_emb is embeddings else None
        values, counts, stat_totals = self.loss.terms(embeddings, labels, ref_emb, ref_labels, self_offset, excluded)
        for name, value in means(stat_totals).items():
            self.add_to_recordable_attributes(name=name, is_stat=True)
            setattr(self, name, float(value))
        counting = counts.nonzero()[:, 0]
        if len(counting) == 0:
            return self.zero_losses()  # type: ignore[no-any-return]
        # Scaled so that their mean equals the wrapped loss, which for FIDI is a mean over pairs.
        values = values[counting] * (len(counting) / counts.sum())
        return {"loss": {"losses": values, "indices": counting, "reduction_type": "element"}}


class CrossBatchMemory(losses.CrossBatchMemory):
    """pytorch-metric-learning's memory, extended to accept `PairwiseLoss` in addition to its own losses."""

    @staticmethod
    def supported_losses() -> list[str]:
        """The names of the loss classes that the memory accepts."""
        return [*losses.CrossBatchMemory.supported_losses(), PairwiseLoss.__name__]

    def get_extra_state(self) -> Tensor:
        """The position in the queue, which is not stored in the buffers, and whether it has been filled."""
        return torch.tensor([self.queue_idx, int(self.has_been_filled)])

    def set_extra_state(self, state: Tensor | Mapping[str, Any]) -> None:
        """Restores the position in the queue; versions before 0.3 kept it in a dictionary."""
        values = state.values() if isinstance(state, Mapping) else state
        self.queue_idx, self.has_been_filled = map(int, values)
