"""A loss and a miner of pytorch-metric-learning, as one criterion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

__all__ = ["MinedLoss"]


class MinedLoss(nn.Module):
    """`loss(features, pids, miner(features, pids))`, the way pytorch-metric-learning combines losses and miners.

    Args:
        loss: takes features, identities, and what the miner returns.
        miner: takes features and identities.
    """

    def __init__(self, loss: Callable[..., Tensor], miner: Callable[..., Any]) -> None:
        super().__init__()
        self.loss, self.miner = loss, miner

    def forward(self, features: Tensor, pids: Tensor) -> Tensor:
        """The loss of (batch, dimension) features and (batch,) identities."""
        return self.loss(features, pids, self.miner(features, pids))
