"""Hard-aware point-to-set loss."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from torchreid_snloss.arguments import check_choice, check_number
from torchreid_snloss.losses.base import MetricLoss, Reduction
from torchreid_snloss.losses.search import DeclaredSpace, Interval, OnlyWith
from torchreid_snloss.losses.statistics import StatisticsCollector

__all__ = ["HAP2SLoss"]


class HAP2SLoss(MetricLoss):
    r"""Hard-aware point-to-set (HAP2S) loss.

    Yu et al., "Hard-Aware Point-to-Set Deep Metric for Person Re-identification", ECCV 2018, arXiv:1807.11206.

    The distance of an anchor to a set is a weighted mean in which harder samples (far positives, near negatives) weigh
    more. The loss is a triplet loss on the distances of an anchor to its positives $S^+$ and to its negatives $S^-$:

    $$
    D(a, S) = \frac{\sum_S w \, d}{\sum_S w}, \qquad \max(0, \; D(a, S^+) - D(a, S^-) + \text{margin}),
    $$

    with $w^\pm = e^{\pm d / \sigma}$ (`"exponential"`, the paper's HAP2S_E) or $w^+ = (d + 1)^{\alpha}$,
    $w^- = (d + 1)^{-2 \alpha}$ (`"polynomial"`, HAP2S_P). Gradients flow through the weights. $\sigma \to 0$ is the
    batch-hard triplet loss, $\sigma \to \infty$ the plain mean.

    `HAP2SLoss(sigma=1.0, margin=None, normalize=False)` is the weighted regularised triplet loss (WRT) of AGW (Ye et
    al., "Deep Learning for Person Re-identification: A Survey and Outlook", TPAMI 2022, arXiv:2001.04193). In
    fast-reid's form an image is also a positive of itself, at distance 0, as it is in `loss(x, pids, x, pids)`.

    Args:
        weighting: `"exponential"` (default) or `"polynomial"`.
        sigma: $\sigma$ > 0, for the exponential weighting, in the unit of the distances. Default is 0.5.
        alpha: $\alpha$ > 0, for the polynomial weighting. Default is 10.
        margin: at least 0, in the unit of the distances; None replaces the hinge by the softplus of the difference.
            Default is 0.3, as in torchreid.
        normalize: L2-normalise features. Default is True (our choice: on raw features $\sigma = 0.5$ is almost
            batch-hard).
        reduction: `"mean"` (default), `"sum"` or `"none"`.
        block_size: see `MetricLoss`.

    Statistics: `active`, the share of anchors whose positives are not nearer than their negatives by the margin.

    For shapes, dtypes and errors see `MetricLoss.forward` and `MetricLoss`.

    Examples:
        >>> import torch
        >>> loss = HAP2SLoss(sigma=0.5, margin=1.0)
        >>> features = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-0.6, 0.8]])
        >>> loss(features, torch.tensor([0, 0, 1, 1]))
        tensor(0.3501)
    """

    search_space: ClassVar[DeclaredSpace] = {  # raw features never won in our searches
        "sigma": OnlyWith("weighting", "exponential", Interval(0.1, 1.0, log=True)),
        "alpha": OnlyWith("weighting", "polynomial", Interval(2.0, 30.0, log=True)),
        "margin": (0.3, 0.5, 0.7, None),
    }

    def __init__(
        self,
        weighting: Literal["exponential", "polynomial"] = "exponential",
        sigma: float = 0.5,
        alpha: float = 10.0,
        margin: float | None = 0.3,
        normalize: bool = True,
        reduction: Reduction = "mean",
        block_size: int = 0,
    ) -> None:
        super().__init__(normalize, reduction, block_size)
        check_choice("weighting", weighting, ("exponential", "polynomial"))
        self.weighting = weighting
        self.sigma = check_number("sigma", sigma, above=0)
        self.alpha = check_number("alpha", alpha, above=0)
        self.margin = None if margin is None else check_number("margin", margin, at_least=0)

    def anchor_values(
        self, distances: Tensor, positive: Tensor, negative: Tensor, statistics: StatisticsCollector
    ) -> tuple[Tensor, Tensor]:
        """See `MetricLoss.anchor_values`."""
        rise: float | Tensor
        fall: float | Tensor
        if self.weighting == "exponential":
            rise, fall = 1 / self.sigma, -1 / self.sigma
            log_w_positive, log_w_negative = distances * rise, distances * fall
        else:
            rise, fall = self.alpha / (distances + 1), -2 * self.alpha / (distances + 1)
            log_w_positive = self.alpha * distances.log1p()
            log_w_negative = -2 * log_w_positive
        to_positives, slopes_positive = _point_to_set(distances, positive, log_w_positive, rise)
        to_negatives, slopes_negative = _point_to_set(distances, negative, log_w_negative, fall)
        hinge = (to_positives - to_negatives).add_(self.margin or 0.0)
        slopes = slopes_positive.sub_(slopes_negative)
        active = hinge > 0
        if statistics.collecting:
            statistics.log_statistic("active", active[:, 0].float())
        if self.margin is None:
            return F.softplus(hinge)[:, 0], slopes.mul_(hinge.sigmoid())
        return hinge.relu_()[:, 0], slopes.mul_(active)


def _point_to_set(
    distances: Tensor, members: Tensor, log_weights: Tensor, log_slopes: float | Tensor
) -> tuple[Tensor, Tensor]:
    r"""The weighted mean $D$ over each row's set, (N, 1), and its slopes $w (1 + (\log w)' (d - D))$, (N, M).

    The weights are computed with a softmax, so that none overflows.
    """
    weights = log_weights.masked_fill_(~members, -torch.inf).softmax(dim=1)
    mean = (weights * distances).sum(dim=1, keepdim=True)
    return mean, (distances - mean).mul_(log_slopes).add_(1).mul_(weights)
