"""Fine-grained difference-aware pairwise loss."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from torchreid_snloss.arguments import check_number
from torchreid_snloss.losses.base import MetricLoss, Reduction
from torchreid_snloss.losses.search import DeclaredSpace, Interval
from torchreid_snloss.losses.statistics import StatisticsCollector

__all__ = ["FIDILoss"]


class FIDILoss(MetricLoss):
    r"""Fine-grained difference-aware (FIDI) pairwise loss.

    Yan et al., "Beyond Triplet Loss: Person Re-identification with Fine-grained Difference-aware Pairwise Loss", IEEE
    TMM 24:1665-1677, 2022, arXiv:2009.10295.

    With $u = e^{-\beta d}$, and $k = 1$ for a pair of the same identity, else 0, a pair's term is

    $$
    D(u \| k) + D(k \| u), \qquad D(p \| q) = p \log \frac{\alpha p}{(\alpha - 1) p + q}.
    $$

    For different identities that is $C u$ with $C = \log(\alpha / (\alpha - 1))$: an exponential penalty on small
    differences. For the same identity it rises from 0 at $d = 0$ and is bounded by $C$.

    All pairs count, and `"mean"` is the mean over them (our choice; the paper writes a sum).

    Args:
        alpha: $\alpha$ > 1, from 1.000001 on. Default is 1.05.
        beta: $\beta$ > 0, per unit of distance. Default is 3.0, which suits unit features: the term of a negative falls
            from $C$ = 3.04 at $d$ = 0 to 0.04 at $\sqrt 2$. With 0.5 it would never fall below 1.12.
        normalize: L2-normalise features. Default is True (our choice; we don't know whether the paper does). On raw
            features with distances near 30, a $\beta$ of 0.5 leaves gradients of about 1e-6, which do nothing.
        reduction: `"mean"` over pairs (default), `"sum"`, or `"none"`: one value per anchor, the sum over its pairs.
        block_size: see `MetricLoss`.

    Statistics: `u_pos` and `u_neg`, the mean $u$ of positive and of negative pairs.

    For shapes, dtypes and errors see `MetricLoss.forward` and `MetricLoss`.

    Examples:
        >>> import torch
        >>> loss = FIDILoss()
        >>> features = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-0.6, 0.8]])
        >>> loss(features, torch.tensor([0, 0, 1, 1]))
        tensor(0.5117)
    """

    search_space: ClassVar[DeclaredSpace] = {
        "alpha": (1.05, 1.5, 2.0),
        "beta": Interval(0.05, 8.0, log=True),  # small ones for the long distances of raw features
        "normalize": (True, False),
    }

    def __init__(
        self,
        alpha: float = 1.05,
        beta: float = 3.0,
        normalize: bool = True,
        reduction: Reduction = "mean",
        block_size: int = 0,
    ) -> None:
        super().__init__(normalize, reduction, block_size)
        self.alpha = check_number("alpha", alpha, at_least=1.000001)  # float32 has few digits of a smaller alpha - 1
        self.beta = check_number("beta", beta, above=0)

    def anchor_values(
        self, distances: Tensor, positive: Tensor, negative: Tensor, statistics: StatisticsCollector
    ) -> tuple[Tensor, Tensor]:
        """See `MetricLoss.anchor_values`."""
        log_u = distances * -self.beta
        u = log_u.exp()
        if statistics.collecting:
            for name, members in (("u_pos", positive), ("u_neg", negative)):
                statistics.log_statistic(name, (u * members).sum(dim=1), members.sum(dim=1))
        u.masked_fill_(~(positive | negative), 0)  # makes value and slope 0
        # k = 1: D(u || 1) + D(1 || u) = u (log u - log a) - log b and its derivative with respect to u. a and b are
        # expressed by e = 1 - u, so that the result is finite at any distance and its slope accurate at small ones.
        e = log_u.expm1().neg_()
        a_minus_1, b_minus_1 = e * (1 / self.alpha - 1), e * (-1 / self.alpha)
        log_u_by_a = log_u.sub_(a_minus_1.log1p())
        same = (u * log_u_by_a).sub_(b_minus_1.log1p())
        by_u = log_u_by_a.sub_(
            e.mul_(2 / self.alpha - 1).div_(a_minus_1.add_(1)).div_(b_minus_1.add_(1).mul_(self.alpha))
        )
        # k = 0: C u.
        c = -math.log1p(-1 / self.alpha)
        slopes = by_u.masked_fill_(negative, c).mul_(u).mul_(-self.beta)
        return torch.where(positive, same, u.mul_(c)).sum(dim=1), slopes

    def term_counts(self, positives: Tensor, negatives: Tensor) -> Tensor:
        """Every pair is a term."""
        return positives + negatives
