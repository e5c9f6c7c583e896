"""Gradient caching: the exact gradient of a batch whose graph does not fit into memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchreid_snloss.engine.amp import Amp, autocast
from torchreid_snloss.engine.random_state import set_torch_random_state, torch_random_state

__all__ = ["cached_forward"]

Outputs = list[Any]


def cached_forward(
    model: nn.Module, unwrapped_model: nn.Module, images: Tensor, micro_batches: int, amp: Amp
) -> tuple[Outputs, Callable[[], None]]:
    """Computes the model's outputs for a batch so that only one micro-batch has a graph at a time.

    The batch first goes through the model without a graph. The backward pass of the loss then computes the gradients of
    the outputs. After that, each micro-batch goes through the model again, with a graph, and its part of these
    gradients is backpropagated to the weights (Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory
    Limited Setup", RepL4NLP 2021, arXiv:2101.06983). Dropout masks are the same both times, and the running statistics
    of batch norm are updated once for each image. In training mode batch norm normalises each micro-batch by itself.

    Args:
        model: the model, or the model in `DistributedDataParallel`, which averages the gradients once per batch.
        unwrapped_model: the model without `DistributedDataParallel`.
        images: (batch, 3, height, width), on the model's device.
        micro_batches: the number of micro-batches, from 1 to the batch size.
        amp: the precision.

    Returns:
        the outputs (tensors or lists of tensors, which are leaves of the loss's graph), and a function that
        backpropagates their gradients to the weights. Call it after the backward pass of the loss.
    """
    parts = images.tensor_split(micro_batches)
    buffers = [buffer.clone() for buffer in unwrapped_model.buffers()]
    states, computed = [], []
    with torch.no_grad(), autocast(amp, images.device.type):
        for part in parts:
            states.append(torch_random_state(images.device))
            computed.append(unwrapped_model(part))
        for buffer, before in zip(unwrapped_model.buffers(), buffers):
            buffer.copy_(before)
    shape = computed[0]
    leaves = [torch.cat(same).requires_grad_() for same in zip(*map(_tensors, computed))]
    del computed

    def backward_to_weights() -> None:
        gradients = [None if leaf.grad is None else leaf.grad.tensor_split(micro_batches) for leaf in leaves]
        for number, (part, state) in enumerate(zip(parts, states)):
            set_torch_random_state(state, images.device)
            last = number == len(parts) - 1
            with contextlib.nullcontext() if last or model is unwrapped_model else model.no_sync():  # type: ignore[operator]
                with autocast(amp, images.device.type):
                    outputs = _tensors(model(part))
                pairs = [
                    (output, gradient[number])
                    for output, gradient in zip(outputs, gradients)
                    if gradient is not None and output.requires_grad
                ]
                torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])

    parts_of_shape = iter(leaves)
    outputs = [
        next(parts_of_shape) if isinstance(output, Tensor) else [next(parts_of_shape) for _ in output]
        for output in shape
    ]
    return outputs, backward_to_weights


def _tensors(outputs: Any) -> list[Tensor]:
    return [tensor for output in outputs for tensor in ([output] if isinstance(output, Tensor) else output)]
