"""Warnings about a run while it trains."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torchreid_snloss.engine.options import NothingLearntError

__all__ = ["CollapseMonitor", "LearningMonitor"]

_COLLAPSED = 1e-2  # distance between features, divided by their length


class CollapseMonitor:
    """Warns once if the features collapse to one point. Training seldom recovers from that."""

    def __init__(self) -> None:
        self._warned = False

    def __call__(self, spread: float) -> bool:
        """Checks the features of one step, and returns whether they have collapsed.

        Args:
            spread: the distance between two features, divided by the length of a feature, both as root mean squares.
        """
        collapsed = spread < _COLLAPSED
        if collapsed and not self._warned:
            self._warned = True
            print(
                f"** The features collapse to one point: their mean distance is {spread:.1e} times their mean length. "
                "Try a smaller learning rate, a larger weight_x, or another scale, sigma, beta or margin of the loss"
            )
        return collapsed


class LearningMonitor:
    """Finds epochs that change no weight: all steps skipped, a learning rate of 0, nothing that needs a gradient.

    Args:
        optimizer: The optimizer of the weights.

    Attributes:
        steps: How many steps of the epoch came to their end, left out or not.
        skipped: How many of them were left out since something was not finite.
        overflowed: How many of them were left out since float16 overflowed.
        learnt: Whether an epoch of this run, or of the run that it resumed, has changed a weight.
        tried: Whether this run has trained an epoch.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self.steps = self.skipped = self.overflowed = 0
        self.learnt, self.tried = False, False
        self._before: list[int] = []
        self._rate = 0.0
        self._warned: set[str] = set()

    def start_run(self, resumed: bool) -> None:
        """Starts a run.

        Args:
            resumed: Whether it goes on with the weights that another one has trained.
        """
        self.learnt, self.tried = resumed, False
        self._warned.clear()

    def start_epoch(self) -> None:
        """Notes the weights."""
        self.steps = self.skipped = self.overflowed = 0
        self._before, self._rate = self._checksums(), self._learning_rate()

    def end_epoch(self, epoch: int, is_last: bool) -> None:
        """Compares the weights with those at the epoch's start, and prints a line if all are the same.

        Args:
            epoch: The number of the epoch, counted from 1.
            is_last: Whether it is the last one.

        Raises:
            NothingLearntError: If all steps were skipped; and in a run that has learnt nothing so far, if this is its
                last epoch or the next one can't be better.
        """
        self.tried = True
        if self.steps and self.skipped == self.steps:
            raise NothingLearntError(
                f"epoch {epoch} has skipped all its {self.steps} steps and learnt nothing, since the loss or the "
                "gradient was never finite"
            )
        if self._checksums() != self._before:
            self.learnt = True
            return
        reason, may_pass = self._reason()
        if not self.learnt and (is_last or not may_pass):
            raise NothingLearntError(f"epoch {epoch} has changed no weight, and the run has learnt nothing: {reason}")
        if reason not in self._warned:
            self._warned.add(reason)
            print(f"** Epoch {epoch} has changed no weight: {reason}")

    def _reason(self) -> tuple[str, bool]:
        """Why no weight changed, and whether that may pass."""
        if not self.steps:
            return "the training loader has no batch", False
        if self._rate == 0:
            return "the learning rate is 0", self._learning_rate() > 0
        if self.skipped + self.overflowed == self.steps:
            return "float16 overflowed in every step, and the loss scale has been lowered", True
        if not any(parameter.requires_grad for parameter in self._parameters()):
            return "no parameter of the optimizer requires a gradient", True  # some may be opened later
        if all(parameter.grad is None or not parameter.grad.any() for parameter in self._parameters()):
            return "the gradient is 0", True
        return "the steps are too small for the precision of the weights", True

    def _parameters(self) -> Iterator[Tensor]:
        return (parameter for group in self._optimizer.param_groups for parameter in group["params"])

    def _learning_rate(self) -> float:
        return max((float(group["lr"]) for group in self._optimizer.param_groups if group["params"]), default=0.0)

    @torch.no_grad()
    def _checksums(self) -> list[int]:
        """A number for each parameter, which nearly every change of its bits changes."""
        whole = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
        flat = (torch.view_as_real(value) if value.is_complex() else value for value in self._parameters())
        sums = [value.detach().view(whole[value.element_size()]).sum(dtype=torch.int64) for value in flat]
        return [int(number) for number in torch.stack([value.cpu() for value in sums]).tolist()] if sums else []
