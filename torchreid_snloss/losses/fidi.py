"""Fine-grained difference-aware pairwise loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchreid_snloss.losses.base import MetricLoss, Reduction, check_number

__all__ = ["FIDILoss"]


class FIDILoss(MetricLoss):
    r"""Fine-grained difference-aware (FIDI) pairwise loss.

    Yan et al., "Beyond Triplet Loss: Person Re-identification with Fine-grained Difference-aware Pairwise Loss", IEEE
    TMM 24:1665-1677, 2022, arXiv:2009.10295.

    With :math:`u = e^{-\beta d}` and k = 1 for a pair of the same identity, else 0, a pair's term is

    .. math::
        D(u \| k) + D(k \| u), \qquad D(p \| q) = p \log \frac{\alpha p}{(\alpha - 1) p + q}

    For different identities that is C u with C = log(alpha / (alpha - 1)): an exponential penalty on small
    differences. For the same identity it rises from 0 at d = 0 and is bounded by C.

    All pairs count, and ``"mean"`` is the mean over them (ours; the paper writes a sum).

    Args:
        alpha: > 1. Default is 1.05.
        beta: > 0, per unit of distance. Default is 0.5.
        normalize: L2-normalise features. Default is False. On raw features with distances near 30 the gradients are
            about 1e-6; on unit features the term of a negative never falls below 1.12.
        reduction: ``"mean"`` over pairs (default), ``"sum"``, or ``"none"``: one value an anchor, the sum over its
            pairs.

    Watched: ``u_pos`` and ``u_neg``, the mean u of positive and of negative pairs.

    Shapes, dtypes, and what is raised: see :meth:`MetricLoss.forward` and :class:`MetricLoss`.

    Example:
        >>> import torch
        >>> loss = FIDILoss()
        >>> features = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-0.6, 0.8]])
        >>> loss(features, torch.tensor([0, 0, 1, 1]))
        tensor(1.0582)
    """

    def __init__(
        self,
        alpha: float = 1.05,
        beta: float = 0.5,
        normalize: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(normalize, reduction)
        self.alpha = check_number("alpha", alpha, above=1)
        self.beta = check_number("beta", beta, above=0)

    def anchor_values(self, distances: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        log_u = -self.beta * distances
        u = log_u.exp()
        self.watch(
            u_pos=(u * positive).sum(dim=1) / positive.sum(dim=1), u_neg=(u * negative).sum(dim=1) / negative.sum(dim=1)
        )
        # D(u || 1) + D(1 || u), written with e = 1 - u so that it stays finite at any distance. (expm1 would give a
        # near pair's value more digits, but its backward, expm1(x) + 1, has none left for a far pair's gradient.)
        e = 1 - u
        same = u * (log_u - (e * (1 / self.alpha - 1)).log1p()) - (e / -self.alpha).log1p()
        different = math.log(self.alpha / (self.alpha - 1)) * u
        zero = distances.new_zeros(())
        return torch.where(positive, same, torch.where(negative, different, zero)).sum(dim=1)

    def term_counts(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Every pair is a term."""
        return positive.sum(dim=1) + negative.sum(dim=1)
