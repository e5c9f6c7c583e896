"""From a loss to changed weights: backward pass, loss scaling, the check for finite numbers, the optimizer's step."""

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
    """Changes the weights by a loss's gradient, unless something is not finite.

    The device is waited for once a step: when all values are read together, before the weights change.

    Args:
        optimizer: of the weights.
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
        check_gradients: Callable[[], None] | None = None,
    ) -> dict[str, float] | None:
        """Makes one step.

        Args:
            loss: a scalar; of several processes their mean counts.
            summary: scalars to show; the terms of the loss, `loss_...`, among them.
            stat_totals: the losses' statistics, (2,) each: a total, and of how many things.
            check_finite: called with the terms and the gradient's norm; returns whether all are finite, or raises.
            backward_to_weights: called after the loss's backward pass, takes the gradient on to the weights; None: it
                is there.
            check_gradients: called when the gradients are there.

        Returns:
            the summary, averaged over the processes, and the statistics, as numbers; with float16 also `scale`. None if
            the step was left out.
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
        if check_gradients is not None:
            check_gradients()
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
            self.scaler.update()  # and not step(), which waits for the GPU to see whether there is an overflow
            shown["lowered"] = self.scaler.scale(one) < shown["scale"]
        shown["gradient"] = gradient_norm(self.optimizer)
        values = _read(shown, stat_totals)

        gradient = values.pop("gradient")
        # The scaler is looking for the largest scale that float16 takes; below 1 there is none.
        overflow = values.pop("lowered", 0.0) > 0 and values["scale"] > 1
        terms = {name: value for name, value in values.items() if name.startswith("loss_")}
        self.overflowed = False
        if not check_finite(terms if overflow else {**terms, "gradient": gradient}):
            if self.scaler is not None:
                self.scaler.update(values["scale"])  # a broken image says nothing about the scale
            return None
        self.overflowed = overflow
        if not overflow:
            self.optimizer.step()
        return values


def _read(summary: Mapping[str, Tensor], stat_totals: Mapping[str, Tensor]) -> dict[str, float]:
    """All values as numbers in one transfer: the processes' mean of the summary, and the means of all their totals."""
    scalars = [value.detach().float().reshape(1) for value in summary.values()]
    together = distributed.all_reduce_sum(torch.cat([*scalars, *stat_totals.values()]))
    averages, totals = together[: len(summary)] / distributed.world_size(), together[len(summary) :].view(-1, 2)
    statistics = means(dict(zip(stat_totals, totals)))
    values = torch.cat([averages, *(value[None] for value in statistics.values())])
    return dict(zip([*summary, *statistics], values.tolist()))


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """The norm of all gradients together, a scalar."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if hasattr(nn.utils, "get_total_norm"):
        norm: Tensor = nn.utils.get_total_norm(gradients)
    else:  # torch < 2.6
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return norm
