"""A model's outputs for the losses, and gradients averaged over several processes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torchreid_snloss import distributed

__all__ = ["ModelOutputs", "Parallel"]


class ModelOutputs(nn.Module):
    """A model's `(logits, features)`, without a graph for an output that the loss doesn't use.

    Args:
        model: returns `(logits, features)` in training.

    Attributes:
        used: whether the loss uses the logits, and the features.

    Raises:
        TypeError: when it is called, if the model returns anything else.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.used = (True, True)

    def forward(self, images: Tensor) -> tuple[Any, ...]:
        outputs = self.model(images)
        if not (isinstance(outputs, (tuple, list)) and len(outputs) == 2):
            raise TypeError(
                f"in training the model must return (logits, features), got {type(outputs).__name__}; "
                "build a torchreid model with loss='triplet'"
            )
        return tuple(output if used else _detached(output) for output, used in zip(outputs, self.used))


def _detached(output: Any) -> Any:
    return output.detach() if isinstance(output, Tensor) else [tensor.detach() for tensor in output]


class Parallel:
    """What to call in training: the model's outputs on one process, their `DistributedDataParallel` on several.

    The wrapper is made anew when layers open or close, since it holds the parameters that take part.

    Args:
        outputs: of the model.
    """

    def __init__(self, outputs: ModelOutputs) -> None:
        self.outputs = outputs
        self._wrapped: tuple[DistributedDataParallel, list[bool]] | None = None

    def module(self) -> nn.Module:
        """The module whose gradients are those of all processes' images."""
        if distributed.world_size() == 1:
            return self.outputs
        taking_part = [*self.outputs.used, *(p.requires_grad for p in self.outputs.model.parameters())]
        if self._wrapped is None or self._wrapped[1] != taking_part:
            # Buffers are averaged where they are used, which is not in training.
            new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
            options: dict[str, Any] = {"forward_sync_buffers" if new else "broadcast_buffers": False}
            unused = not all(self.outputs.used)
            wrapped = DistributedDataParallel(self.outputs, find_unused_parameters=unused, **options)
            self._wrapped = wrapped, taking_part
        return self._wrapped[0]

    def check_gradients(self) -> None:
        """Checks after the backward pass that every parameter has a gradient.

        Where one has none, `DistributedDataParallel` leaves others as they are, and says so a step later.

        Raises:
            ValueError: names the parameters without one.
        """
        if self._wrapped is None or not all(self.outputs.used):
            return
        parameters = self.outputs.model.named_parameters()
        missing = [name for name, p in parameters if p.requires_grad and p.grad is None]
        if missing:
            raise ValueError(f"nothing in the loss depends on {missing}; on several processes freeze such parameters")


def at_least_float32(output: Any) -> Any:
    """A model's output, a tensor or several, in the precision that the losses compute in."""
    if isinstance(output, Tensor):
        return output.to(torch.promote_types(output.dtype, torch.float32))
    return [at_least_float32(tensor) for tensor in output]
