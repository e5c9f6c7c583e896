"""Wraps the model for training: its outputs for the losses, and `DistributedDataParallel` for several processes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torchreid_snloss import distributed

__all__ = ["ModelOutputs", "Parallel", "at_least_float32", "average_gradients"]


class ModelOutputs(nn.Module):
    """Returns a model's `(logits, features)`, and detaches an output that the loss doesn't use.

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
        for name, output in zip(("logits", "features"), outputs):
            several = isinstance(output, (tuple, list)) and output and all(isinstance(each, Tensor) for each in output)
            if not (isinstance(output, Tensor) or several):
                raise TypeError(f"the model's {name} must be a tensor or several, got {type(output).__name__}")
        return tuple(output if used else _detached(output) for output, used in zip(outputs, self.used))


def _detached(output: Any) -> Any:
    return output.detach() if isinstance(output, Tensor) else [tensor.detach() for tensor in output]


class Parallel:
    """Provides the module to call in training: `ModelOutputs`, with several processes in `DistributedDataParallel`.

    The wrapper is created again when layers are frozen or unfrozen, since it keeps a list of the trainable parameters.

    Args:
        outputs: the `ModelOutputs` of the model.
    """

    def __init__(self, outputs: ModelOutputs) -> None:
        self.outputs = outputs
        self._wrapped: tuple[DistributedDataParallel, list[bool]] | None = None

    def module(self) -> nn.Module:
        """The module to call; its gradients are averaged over all processes."""
        if distributed.world_size() == 1:
            return self.outputs
        taking_part = [*self.outputs.used, *(p.requires_grad for p in self.outputs.model.parameters())]
        if self._wrapped is None or self._wrapped[1] != taking_part:
            # Buffers are not synchronised in training; they are averaged before they are used in a test or checkpoint.
            new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
            options: dict[str, Any] = {"forward_sync_buffers" if new else "broadcast_buffers": False}
            unused = not all(self.outputs.used)
            wrapped = DistributedDataParallel(self.outputs, find_unused_parameters=unused, **options)
            self._wrapped = wrapped, taking_part
        return self._wrapped[0]

    def check_gradients(self) -> None:
        """Checks after the backward pass that every parameter has a gradient.

        If one has none, `DistributedDataParallel` does not reduce the others, and only reports it in the next step.

        Raises:
            ValueError: with the names of the parameters without a gradient.
        """
        if self._wrapped is None or not all(self.outputs.used):
            return
        parameters = self.outputs.model.named_parameters()
        missing = [name for name, p in parameters if p.requires_grad and p.grad is None]
        if missing:
            raise ValueError(
                f"nothing in the loss depends on {missing}; on several processes leave them out of the model"
            )


def average_gradients(module: nn.Module) -> None:
    """Replaces the gradients of a module's parameters by their means over processes; a missing one counts as 0."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if distributed.world_size() == 1 or not parameters:
        return
    there = distributed.all_reduce_sum(torch.tensor([int(parameter.grad is not None) for parameter in parameters]))
    for parameter, number in zip(parameters, there.tolist()):
        if number:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = distributed.all_reduce_sum(gradient).div_(distributed.world_size())


def at_least_float32(output: Any) -> Any:
    """Converts a model's output, one or several tensors, to at least float32, in which the losses are computed."""
    if isinstance(output, Tensor):
        return output.to(torch.promote_types(output.dtype, torch.float32))
    return [at_least_float32(tensor) for tensor in output]
