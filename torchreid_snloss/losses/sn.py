"""Support neighbor loss."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from torchreid_snloss.arguments import check_choice, check_integer, check_number
from torchreid_snloss.losses.base import MetricLoss, Reduction
from torchreid_snloss.losses.nearest import nearest
from torchreid_snloss.losses.statistics import StatisticsCollector

__all__ = ["SNLoss"]


class SNLoss(MetricLoss):
    r"""Support neighbor (SN) loss.

    Li et al., "Support Neighbor Loss for Person Re-Identification", ACM MM 2018, arXiv:1808.06030, as in its authors'
    released code.

    The *support* of an anchor is its $K$ nearest references; of equally near ones positives go first (our choice). $P$
    are the positives in it (where there is none, the single nearest positive), $Q$ the negatives in it. For an anchor,
    *separation* pushes $Q$ behind $P$, *squeeze* pulls $P$ together:

    $$
    -\log \frac{\sum_P e^{-s d}}{\sum_P e^{-s d} + \sum_Q e^{-s d}} \; + \; \lambda \, (\max_P d - \min_P d).
    $$

    Separation is exactly 0 where $Q$ is empty.

    Args:
        num_neighbors: $K$, the size of the support, >= 1. Default is 10.
        scale: $s$ > 0, per unit of distance. 50 suits a pretrained network on unit features; from scratch about 10
            learns faster. Default is 50.
        squeeze_weight: $\lambda$ >= 0. Default is 0.1.
        squeeze: `"support"`: furthest minus nearest of $P$, and where $P$ has one member its distance (default);
            `"all"`: furthest of all positives minus nearest of $P$, the abstract's wording; `"nearest"`: nearest of
            $P$, what the released code ends with.
        normalize: L2-normalise features. Default is True.
        reduction: `"mean"` (default), `"sum"` or `"none"`.
        block_size: See `MetricLoss`.

    Statistics: `in_support`, the share of an anchor's positives that are in its support.

    For shapes, dtypes and errors see `MetricLoss.forward` and `MetricLoss`.

    Example:
        >>> import torch
        >>> loss = SNLoss(num_neighbors=2, scale=10.0)
        >>> features = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-0.6, 0.8]])
        >>> loss(features, torch.tensor([0, 0, 1, 1]))
        tensor(0.0986)
    """

    def __init__(
        self,
        num_neighbors: int = 10,
        scale: float = 50.0,
        squeeze_weight: float = 0.1,
        squeeze: Literal["support", "all", "nearest"] = "support",
        normalize: bool = True,
        reduction: Reduction = "mean",
        block_size: int = 0,
    ) -> None:
        super().__init__(normalize, reduction, block_size)
        check_choice("squeeze", squeeze, ("support", "all", "nearest"))
        self.num_neighbors = check_integer("num_neighbors", num_neighbors, at_least=1)
        self.scale = check_number("scale", scale, above=0)
        self.squeeze_weight = check_number("squeeze_weight", squeeze_weight, at_least=0)
        self.squeeze = squeeze

    def select_references(
        self, distances: Tensor, positive: Tensor, negative: Tensor, statistics: StatisticsCollector
    ) -> Tensor:
        """The support, the nearest positive, which stands in where P would be empty, and for "all" the furthest."""
        support = nearest(distances, positive, negative, self.num_neighbors)
        if statistics.collecting:
            statistics.log_statistic("in_support", positive.gather(1, support).sum(dim=1) / positive.sum(dim=1))
        not_positive = ~positive
        columns = [support, distances.masked_fill(not_positive, torch.inf).argmin(dim=1, keepdim=True)]
        if self.squeeze == "all":
            columns.append(distances.masked_fill(not_positive, -torch.inf).argmax(dim=1, keepdim=True))
        return torch.cat(columns, dim=1)

    def anchor_values(
        self, distances: Tensor, positive: Tensor, negative: Tensor, statistics: StatisticsCollector
    ) -> tuple[Tensor, Tensor]:
        """See `MetricLoss.anchor_values`."""
        in_p = positive.clone()
        extra = 2 if self.squeeze == "all" else 1
        in_p[:, -extra:] = False
        in_p[:, -extra] = in_p.any(dim=1).logical_not_()
        # P and Q, which the further columns are not in, since these are positives; (2, N, C).
        outside = torch.stack([in_p, negative]).logical_not_()

        lowest = torch.finfo(distances.dtype).min  # its exp() is 0 beside any distance; an empty Q gives 0, not NaN
        logits = (distances * -self.scale).masked_fill(outside, lowest)
        shares = logits.softmax(dim=2)
        # logits.logsumexp(dim=2), by the largest share, which is 1 / sum of exp(x - largest)
        log_p, log_q = (logits.amax(dim=2) - shares.amax(dim=2).log()).unbind()
        log_ratio = log_q - log_p
        values = F.softplus(log_ratio)
        slopes = (shares[0] - shares[1]).mul_(log_ratio.sigmoid_().mul_(self.scale)[:, None])
        if self.squeeze_weight:
            self._add_squeeze(distances, in_p, outside[0], values, slopes)
        return values, slopes

    def _add_squeeze(self, distances: Tensor, in_p: Tensor, outside_p: Tensor, values: Tensor, slopes: Tensor) -> None:
        """Adds the furthest of P, or of all positives, minus the nearest of P."""
        weight = self.squeeze_weight
        near, at_near = distances.masked_fill(outside_p, torch.inf).min(dim=1)
        if self.squeeze == "nearest":
            values.add_(near, alpha=weight)
            slopes.scatter_add_(1, at_near[:, None], torch.full_like(slopes[:, :1], weight))
            return
        if self.squeeze == "all":
            far, at_far = distances[:, -1], torch.full_like(at_near, distances.shape[1] - 1)
            counted = torch.ones_like(near)
        else:
            far, at_far = distances.masked_fill(outside_p, -torch.inf).max(dim=1)
            counted = (in_p.sum(dim=1) > 1).to(far)  # where P has one member, the squeeze is its distance
        values.add_(far.addcmul(near, counted, value=-1), alpha=weight)
        ends = torch.stack([at_far, at_near], dim=1)
        slopes.scatter_add_(1, ends, torch.stack([torch.ones_like(counted), counted.neg_()], dim=1).mul_(weight))
