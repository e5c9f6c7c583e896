"""Support neighbor loss."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from torchreid_snloss.arguments import check_choice, check_integer, check_number
from torchreid_snloss.losses.base import MetricLoss, Reduction
from torchreid_snloss.losses.nearest import nearest
from torchreid_snloss.losses.search import DeclaredSpace, Interval
from torchreid_snloss.losses.statistics import StatisticsCollector

__all__ = ["SNLoss"]


class SNLoss(MetricLoss):
    r"""Support neighbor (SN) loss.

    Li et al., "Support Neighbor Loss for Person Re-Identification", ACM MM 2018, arXiv:1808.06030, as in its authors'
    released code.

    The *support* of an anchor is the set of its $K$ nearest references; at equal distances, positives come first (our
    choice). $P$ is the set of positives in the support, or the single nearest positive if there is none. $Q$ is the set
    of negatives in the support. *Separation* pushes $Q$ farther away than $P$, and *squeeze* pulls $P$ together:

    $$
    -\log \frac{\sum_P e^{-s d}}{\sum_P e^{-s d} + \sum_Q e^{-s d}} \; + \; \lambda \, (\max_P d - \min_P d).
    $$

    Separation is exactly 0 where $Q$ is empty.

    Args:
        num_neighbors: $K$, the size of the support, >= 1. Default is 10.
        scale: $s$ > 0, per unit of distance. Default is 10 (our choice; the released code has 50, with which negatives
            that are 0.1 farther than positives are hardly pushed any more).
        squeeze_weight: $\lambda$ >= 0. Default is 0.1.
        squeeze: `"support"` (default): the largest minus the smallest distance in $P$, or the distance itself if $P$
            has one member; `"all"`: the largest distance of all positives minus the smallest in $P$ (as in the
            abstract); `"nearest"`: the smallest distance in $P$, as in the released code.
        normalize: L2-normalise features. Default is True.
        reduction: `"mean"` (default), `"sum"` or `"none"`.
        block_size: see `MetricLoss`.

    Statistics: `in_support`, the share of an anchor's positives that are in its support.

    For shapes, dtypes and errors see `MetricLoss.forward` and `MetricLoss`.

    Examples:
        >>> import torch
        >>> loss = SNLoss(num_neighbors=2)
        >>> features = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-0.6, 0.8]])
        >>> loss(features, torch.tensor([0, 0, 1, 1]))
        tensor(0.0986)
    """

    default_weight: ClassVar[float] = 0.1  # the slope of a distance is up to `scale`, where a hinge's is 1
    search_space: ClassVar[DeclaredSpace] = {
        "scale": Interval(3.0, 50.0, log=True),
        "num_neighbors": (5, 10, 20, 32),
        "squeeze": ("support", "all"),
        "squeeze_weight": Interval(0.01, 1.0, log=True),
    }

    def __init__(
        self,
        num_neighbors: int = 10,
        scale: float = 10.0,
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
        """The support, the nearest positive, which replaces an empty P, and for "all" also the furthest positive."""
        others = torch.where(positive | negative, distances, torch.inf)
        support = nearest(others, positive, self.num_neighbors)
        if statistics.collecting:
            statistics.log_statistic("in_support", positive.gather(1, support).sum(dim=1) / positive.sum(dim=1))
        columns = [support, others.masked_fill_(negative, torch.inf).min(dim=1, keepdim=True).indices]
        if self.squeeze == "all":
            columns.append(distances.masked_fill(~positive, -torch.inf).max(dim=1, keepdim=True).indices)
        return torch.cat(columns, dim=1)

    def anchor_values(
        self, distances: Tensor, positive: Tensor, negative: Tensor, statistics: StatisticsCollector
    ) -> tuple[Tensor, Tensor]:
        """See `MetricLoss.anchor_values`."""
        # Masks for P and Q, (2, N, C). The extra column for the nearest positive only counts if the support has no
        # positive; otherwise the nearest positive is in the support already. Q only has columns of the support, since
        # all extra columns are positives.
        k = distances.shape[1] - (2 if self.squeeze == "all" else 1)
        number = (in_support := positive[:, :k]).sum(dim=1, keepdim=True)
        parts = [in_support, number == 0]
        if self.squeeze == "all":
            parts.append(torch.zeros_like(parts[1]))
        outside_p = torch.cat(parts, dim=1).logical_not_()
        outside = torch.stack([outside_p, ~negative])

        lowest = torch.finfo(distances.dtype).min  # its exp() is 0 beside any distance; an empty Q gives 0, not NaN
        logits = (distances * -self.scale).masked_fill(outside, lowest)
        shares = logits.softmax(dim=2)
        # This equals logits.logsumexp(dim=2), because the largest share is 1 / sum of exp(x - largest).
        log_p, log_q = (logits.amax(dim=2, keepdim=True) - shares.amax(dim=2, keepdim=True).log_()).unbind()
        log_ratio = log_q - log_p
        values = F.softplus(log_ratio)
        shares_p, shares_q = shares.unbind()
        slopes = (shares_p - shares_q).mul_(log_ratio.sigmoid_().mul_(self.scale))

        # Squeeze: the furthest of P, or of all positives, minus the nearest of P.
        weight, near = self.squeeze_weight, distances[:, k : k + 1]
        if self.squeeze == "nearest":
            slopes[:, k].add_(weight)
            return values.add_(near, alpha=weight)[:, 0], slopes
        if self.squeeze == "all":
            slopes[:, -1].add_(weight)
            slopes[:, k].sub_(weight)
            return values.add_(distances[:, -1:] - near, alpha=weight)[:, 0], slopes
        far, at_far = distances.masked_fill(outside_p, -torch.inf).max(dim=1, keepdim=True)
        slopes.scatter_(1, at_far, weight, reduce="add")
        several = (number > 1).to(near)  # where P has one member, the squeeze is its distance
        slopes[:, k : k + 1].sub_(several, alpha=weight)
        return values.add_(far, alpha=weight).addcmul_(near, several, value=-weight)[:, 0], slopes
