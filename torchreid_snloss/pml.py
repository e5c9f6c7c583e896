"""The losses as pytorch-metric-learning's, for its wrappers and trainers. Needs that package."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_metric_learning import losses
from pytorch_metric_learning.utils import loss_and_miner_utils
from torch import Tensor

from torchreid_snloss.losses import MetricLoss

__all__ = ["CrossBatchMemory", "PairwiseLoss"]


class PairwiseLoss(losses.BaseMetricLossFunction):
    """One of this package's losses with pytorch-metric-learning's ``forward``, reducers and statistics.

    ``forward(embeddings, labels, indices_tuple=None, ref_emb=None, ref_labels=None)``: with a miner's pairs or triplets
    an anchor has the positives and negatives that they name, else all. With the default reducer the value is the
    loss's own. ``normalize`` is the loss's; no ``distance`` is taken.

    Args:
        loss: its reduction must be ``"mean"``.
        **options: ``reducer``, ``embedding_regularizer``, ``embedding_reg_weight``, ``collect_stats``.

    Attributes:
        d_pos, d_neg, anchors, spread, ...: the loss's ``statistics``, as floats, where ``collect_stats`` is set.

    Raises:
        ValueError: for another reduction.

    Example::

        loss = PairwiseLoss(SNLoss(scale=10.0))
        loss(features, labels, MultiSimilarityMiner()(features, labels))
        memory = CrossBatchMemory(loss, embedding_size=512, memory_size=4096)
    """

    def __init__(self, loss: MetricLoss, **options: Any) -> None:
        super().__init__(**options)
        if loss.reduction != "mean":
            raise ValueError(f"the loss's reduction must be 'mean', got {loss.reduction!r}; the reducer does the rest")
        self.loss = loss
        self.loss.collect_statistics = bool(self.collect_stats)

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor
    ) -> dict[str, Any]:
        """A value for each anchor that counts."""
        left_out = None
        if indices_tuple is not None:
            pairs = loss_and_miner_utils.convert_to_pairs(indices_tuple, labels, ref_labels)
            left_out = torch.ones(len(embeddings), len(ref_emb), dtype=torch.bool, device=embeddings.device)
            for anchors, others in (pairs[:2], pairs[2:]):
                left_out[anchors, others] = False
        own_column = 0 if ref_emb is embeddings else None
        values, numbers = self.loss.terms(embeddings, labels, ref_emb, ref_labels, own_column, left_out)
        for name, value in self.loss.statistics.items():
            self.add_to_recordable_attributes(name=name, is_stat=True)
            setattr(self, name, float(value))
        counting = numbers.nonzero()[:, 0]
        if len(counting) == 0:
            return self.zero_losses()  # type: ignore[no-any-return]
        # Their mean is the loss's own, which for FIDI is one over pairs.
        values = values[counting] * (len(counting) / numbers.sum())
        return {"loss": {"losses": values, "indices": counting, "reduction_type": "element"}}


class CrossBatchMemory(losses.CrossBatchMemory):
    """pytorch-metric-learning's, which takes its own losses alone, for :class:`PairwiseLoss` too."""

    @staticmethod
    def supported_losses() -> list[str]:
        """Names of classes."""
        return [*losses.CrossBatchMemory.supported_losses(), PairwiseLoss.__name__]

    def get_extra_state(self) -> dict[str, Any]:
        """Where its queue goes on, which its buffers do not say."""
        return {"queue_idx": self.queue_idx, "has_been_filled": self.has_been_filled}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Likewise."""
        self.queue_idx, self.has_been_filled = state["queue_idx"], state["has_been_filled"]
