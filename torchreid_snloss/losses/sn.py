"""Support neighbor loss."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from torchreid_snloss.losses.base import MetricLoss, Reduction, check_choice, check_number
from torchreid_snloss.losses.distance import nearest

__all__ = ["SNLoss"]


class SNLoss(MetricLoss):
    r"""Support neighbor (SN) loss.

    Li et al., "Support Neighbor Loss for Person Re-Identification", ACM MM 2018, arXiv:1808.06030, as in its authors'
    released code.

    The *support* of an anchor is its K nearest references, of equally near ones positives first (ours). P are the
    positives in it (where there is none, the single nearest positive), Q the negatives in it. Per anchor, *separation*
    pushes Q behind P, *squeeze* pulls P together:

    .. math::
        -\log \frac{\sum_P e^{-s d}}{\sum_P e^{-s d} + \sum_Q e^{-s d}}
        \; + \; \lambda \, (\max_P d - \min_P d)

    Separation is exactly 0 where Q is empty.

    Args:
        num_neighbors: K, the size of the support, >= 1. Default is 10.
        scale: s, > 0, per unit of distance. 50 suits a pretrained network on unit features; from scratch about 10
            learns faster. Default is 50.
        squeeze_weight: lambda, >= 0. Default is 0.1.
        squeeze: ``"support"``: furthest minus nearest of P, and where P has one member its distance (default);
            ``"all"``: furthest of all positives minus nearest of P, the abstract's wording; ``"nearest"``: nearest of
            P, what the released code ends with.
        normalize: L2-normalise features. Default is True.
        reduction: ``"mean"`` (default), ``"sum"`` or ``"none"``.

    Watched: ``in_support``, the share of an anchor's positives that are in its support.

    Shapes, dtypes, and what is raised: see :meth:`MetricLoss.forward` and :class:`MetricLoss`.

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
    ) -> None:
        super().__init__(normalize, reduction)
        if isinstance(num_neighbors, bool) or not isinstance(num_neighbors, (int, np.integer)):
            raise TypeError(f"num_neighbors must be an integer, got {num_neighbors!r}")
        check_choice("squeeze", squeeze, ("support", "all", "nearest"))
        self.num_neighbors = int(check_number("num_neighbors", num_neighbors, at_least=1))
        self.scale = check_number("scale", scale, above=0)
        self.squeeze_weight = check_number("squeeze_weight", squeeze_weight, at_least=0)
        self.squeeze = squeeze

    def anchor_values(self, distances: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        support = nearest(distances, positive, negative, self.num_neighbors)
        nearest_positive = distances.detach().masked_fill(~positive, torch.inf).argmin(dim=1, keepdim=True)

        # K + 1 columns an anchor: its support, and its nearest positive, which stands in where P would be empty.
        in_p = positive.gather(1, support)
        in_p = torch.cat([in_p, ~in_p.any(dim=1, keepdim=True)], dim=1)
        in_q = F.pad(negative.gather(1, support), (0, 1), value=False)
        d = distances.gather(1, torch.cat([support, nearest_positive], dim=1))

        self.watch(in_support=in_p[:, :-1].sum(dim=1) / positive.sum(dim=1))

        lowest = torch.finfo(d.dtype).min  # exp() of it is 0 beside any distance, and an empty Q gives 0, not NaN
        log_p, log_q = ((-self.scale * d).masked_fill(~members, lowest).logsumexp(dim=1) for members in (in_p, in_q))
        separation = F.softplus(log_q - log_p)

        squeeze = min_p = d.masked_fill(~in_p, torch.inf).min(dim=1).values
        if self.squeeze == "support":
            max_p = d.masked_fill(~in_p, -torch.inf).max(dim=1).values
            squeeze = torch.where(in_p.sum(dim=1) == 1, min_p, max_p - min_p)
        elif self.squeeze == "all":
            squeeze = distances.masked_fill(~positive, -torch.inf).max(dim=1).values - min_p
        return separation + self.squeeze_weight * squeeze
