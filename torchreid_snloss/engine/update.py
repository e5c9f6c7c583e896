"""Updates the weights: backward pass, loss scaling, the check for finite numbers, the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchreid_snloss import distributed
from torchreid_snloss.losses import means

__all__ = ["Update", "gradient_norm", "non_finite"]


def non_finite(terms: Mapping[str, float]) -> str:
    """Names the terms that are NaN or infinite, such as "loss_m is nan"; empty where all are finite."""
    return ", ".join(f"{name} is {value}" for name, value in terms.items() if not math.isfinite(value))


class Update:
    """Updates the weights with the gradient of a loss, unless a term or the gradient is not finite.

    Each step synchronises with the device once, when it reads all values together before the weights change.

    Args:
        optimizer: the optimizer of the weights.
        scaler: torch's `GradScaler` for float16; None for any other precision.

    Attributes:
        overflowed: whether the last step was left out since float16 overflowed.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: Any = None) -> None:
        self.optimizer = optimizer
        self.scaler = scaler
        self.overflowed = False

    def __call__(
        self,
        loss: Tensor,
        summary: Mapping[str, Tensor],
        stat_totals: Mapping[str, Tensor],
        check_finite: Callable[[Mapping[str, float]], bool],
        backward_to_weights: Callable[[], None] | None = None,
        gradients_done: Callable[[], None] | None = None,
    ) -> dict[str, float] | None:
        """Performs one step.

        Args:
            loss: a scalar; with several processes, the loss is the mean over processes.
            summary: the scalars to show, among them the terms of the loss, `loss_...`.
            stat_totals: the losses' statistics, (2,) each: a total and the number of values in it.
            check_finite: called with the terms and the gradient norm; returns whether all are finite, or raises.
            backward_to_weights: called after the loss's backward pass to backpropagate the gradient to the weights;
                None if the backward pass does that already.
            gradients_done: called when the gradients have been computed, which it may change.

        Returns:
            the summary, averaged over the processes, and the statistics, as numbers; with float16 also `scale`. None if
            the step was skipped.
        """
        self.optimizer.zero_grad()
        shown = dict(summary)
        one = torch.ones_like(loss)
        if self.scaler is None:
            loss.backward()
        else:
            shown["scale"] = self.scaler.scale(one)
            self.scaler.scale(loss).backward()
        if backward_to_weights is not None:
            backward_to_weights()
        if gradients_done is not None:
            gradients_done()
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
            self.scaler.update()  # without step(), which would wait for the GPU to check for an overflow
            shown["lowered"] = self.scaler.scale(one) < shown["scale"]
        shown["gradient"] = gradient_norm(self.optimizer)
        values = _read(shown, stat_totals)

        gradient = values.pop("gradient")
        # An overflow is normal while the scaler searches for the largest scale that works, but not at a scale of 1.
        overflow = values.pop("lowered", 0.0) > 0 and values["scale"] > 1
        terms = {name: value for name, value in values.items() if name.startswith("loss_")}
        self.overflowed = False
        if not check_finite(terms if overflow else {**terms, "gradient": gradient}):
            if self.scaler is not None:
                self.scaler.update(values["scale"])  # keep the scale, since the batch is at fault
            return None
        self.overflowed = overflow
        if not overflow:
            self.optimizer.step()
        return values


def _read(summary: Mapping[str, Tensor], stat_totals: Mapping[str, Tensor]) -> dict[str, float]:
    """Reads all values in one transfer: the summary averaged over processes, and the means of the statistics."""
    scalars = [value.detach().float().reshape(1) for value in summary.values()]
    together = distributed.all_reduce_sum(torch.cat([*scalars, *stat_totals.values()]))
    averages, totals = together[: len(summary)] / distributed.world_size(), together[len(summary) :].view(-1, 2)
    statistics = means(dict(zip(stat_totals, totals)))
    values = torch.cat([averages, *(value[None] for value in statistics.values())])
    return dict(zip([*summary, *statistics], values.tolist()))


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """The total norm of all gradients, a scalar."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if hasattr(nn.utils, "get_total_norm"):
        norm: Tensor = nn.utils.get_total_norm(gradients)
    else:  # torch < 2.6
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return norm
