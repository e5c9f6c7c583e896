"""Statistics of a loss: sums and counts, which can be added up over row blocks and processes, and their means."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["StatisticsCollector", "add_totals", "means"]


class StatisticsCollector:
    """Collects the statistics of some anchors.

    Args:
        counting: bool (N,), the anchors that count; None collects nothing.

    Attributes:
        totals: (2,) float32 for each statistic: a sum and the number of values in it.
    """

    def __init__(self, counting: Tensor | None = None) -> None:
        self.counting = counting
        self.totals: dict[str, Tensor] = {}

    @property
    def collecting(self) -> bool:
        """Whether statistics are collected, so that computing one for `log_statistic` is worth its time."""
        return self.counting is not None

    def log_statistic(self, name: str, values: Tensor, numbers: Tensor | None = None) -> None:
        """Logs a mean over the anchors that count.

        Args:
            name: the statistic's name.
            values: (N,), one for each anchor.
            numbers: (N,), how many values each entry of `values` is the sum of; None for one each.
        """
        if self.counting is not None:
            weights = self.counting if numbers is None else numbers * self.counting
            self.log_total(name, values.masked_fill(~self.counting, 0).sum(), weights.sum())

    def log_total(self, name: str, total: Tensor, number: Tensor | int) -> None:
        """Logs a mean, given as a sum (a scalar) and the number of values in it."""
        if isinstance(number, int):
            number = torch.full_like(total, number)  # a copy from the CPU would synchronise with the device
        self.totals[name] = torch.stack([total.float(), number.float()])


def add_totals(totals: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    """Adds the totals of further anchors to `totals`."""
    for name, value in more.items():
        totals[name] = totals[name] + value if name in totals else value


def means(stat_totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The statistics themselves: scalars, NaN where there is nothing to take a mean of.

    Args:
        stat_totals: (2,) float32 for each statistic: a sum and the number of values in it.
    """
    return {name: total / number for name, (total, number) in stat_totals.items()}
