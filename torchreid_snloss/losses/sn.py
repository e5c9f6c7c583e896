"""Support neighbor loss."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from torchreid_snloss.losses.base import MetricLoss, Reduction, check_choice, check_integer, check_number
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
        block_size: see :class:`MetricLoss`.

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
        block_size: int = 0,
    ) -> None:
        super().__init__(normalize, reduction, block_size)
        check_choice("squeeze", squeeze, ("support", "all", "nearest"))
        self.num_neighbors = check_integer("num_neighbors", num_neighbors, at_least=1)
        self.scale = check_number("scale", scale, above=0)
        self.squeeze_weight = check_number("squeeze_weight", squeeze_weight, at_least=0)
        self.squeeze = squeeze

    def columns(self, squares: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """The support, the nearest positive, which stands in where P would be empty, and for "all" the furthest."""
        support = nearest(squares, positive, negative, self.num_neighbors)
        if self.watching:
            self.watch("in_support", positive.gather(1, support).sum(dim=1) / positive.sum(dim=1))
        more = [squares.masked_fill(~positive, torch.inf).min(dim=1).indices]
        if self.squeeze == "all":
            more.append(squares.masked_fill(~positive, -torch.inf).max(dim=1).indices)
        return torch.cat([support, torch.stack(more, dim=1)], dim=1)

    def anchor_values(self, distances: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        extra = 2 if self.squeeze == "all" else 1
        in_p, in_q = positive.clone(), negative.clone()
        in_q[:, -extra:] = False
        in_p[:, -extra:] = False
        in_p[:, -extra] = ~in_p.any(dim=1)

        logits = distances * -self.scale
        lowest = torch.finfo(logits.dtype).min  # its exp() is 0 beside any distance; an empty Q gives 0, not NaN
        p, q = logits.masked_fill(~in_p, lowest), logits.masked_fill(~in_q, lowest)
        shares_p, shares_q = p.softmax(dim=1), q.softmax(dim=1)
        log_ratio = _log_sum_exp(q, shares_q) - _log_sum_exp(p, shares_p)
        values = F.softplus(log_ratio)
        slopes = (shares_p - shares_q).mul_(log_ratio.sigmoid().mul_(self.scale)[:, None])

        # Squeeze: the furthest of P, or of all positives, minus the nearest of P.
        weight = distances.new_full((), self.squeeze_weight)
        at_nearest = p.argmax(dim=1, keepdim=True)
        nearest_of_p = distances.gather(1, at_nearest)
        if self.squeeze == "nearest":
            squeeze, of_nearest = nearest_of_p, weight.expand_as(nearest_of_p)
        elif self.squeeze == "all":
            squeeze, of_nearest = distances[:, -1:] - nearest_of_p, -weight.expand_as(nearest_of_p)
            slopes[:, -1] += weight
        else:
            furthest, at_furthest = torch.where(in_p, distances, -torch.inf).max(dim=1, keepdim=True)
            alone = in_p.sum(dim=1, keepdim=True) == 1  # then its distance itself
            squeeze, of_nearest = furthest - nearest_of_p.masked_fill(alone, 0), -weight * ~alone
            slopes.scatter_add_(1, at_furthest, weight.expand_as(furthest))
        slopes.scatter_add_(1, at_nearest, of_nearest)
        return values + weight * squeeze[:, 0], slopes


def _log_sum_exp(logits: Tensor, softmax: Tensor) -> Tensor:
    """``logits.logsumexp(dim=1)`` by its softmax, whose largest share is 1 / sum of exp(x - largest)."""
    return logits.amax(dim=1) - softmax.amax(dim=1).log()
