"""Gradient caching: the exact gradient of a batch whose graph does not fit into memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchreid_snloss.engine.amp import Amp, autocast

__all__ = ["cached_forward"]

Outputs = list[Any]


def cached_forward(
    model: nn.Module, bare: nn.Module, images: Tensor, micro_batches: int, amp: Amp
) -> tuple[Outputs, Callable[[], None]]:
    """A model's outputs for a batch, of which only one of its ``micro_batches`` is in a graph at a time.

    The batch goes through the model without a graph first; the loss gives gradients on the outputs; then each
    micro-batch goes through again, with one, and takes its part of them on to the weights (Gao et al., RepL4NLP 2021,
    arXiv:2101.06983). Dropout is the same both times, and batch norm's running means take every image in once; in
    training it normalises by micro-batches.

    Args:
        model: the model, or its ``DistributedDataParallel``, which then averages gradients once.
        bare: the model.
        images: (batch, 3, height, width), on the model's device.
        micro_batches: how many, from 1 to the batch's size.
        amp: the precision.

    Returns:
        the outputs, tensors or lists of tensors, leaves of the loss's graph; and what to call once they have their
        gradients.
    """
    parts = images.tensor_split(micro_batches)
    buffers = [buffer.clone() for buffer in bare.buffers()]
    states, computed = [], []
    with torch.no_grad(), autocast(amp, images.device.type):
        for part in parts:
            states.append(_random_state(images))
            computed.append(bare(part))
        for buffer, before in zip(bare.buffers(), buffers):
            buffer.copy_(before)
    shape = computed[0]
    leaves = [torch.cat(same).requires_grad_() for same in zip(*map(_tensors, computed))]
    del computed

    def propagate() -> None:
        gradients = [None if leaf.grad is None else leaf.grad.tensor_split(micro_batches) for leaf in leaves]
        for number, (part, state) in enumerate(zip(parts, states)):
            _set_random_state(images, state)
            last = number == len(parts) - 1
            with contextlib.nullcontext() if last or model is bare else model.no_sync():  # type: ignore[operator]
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
    return outputs, propagate


def _tensors(outputs: Any) -> list[Tensor]:
    return [tensor for output in outputs for tensor in ([output] if isinstance(output, Tensor) else output)]


def _random_state(images: Tensor) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(images.device) if images.is_cuda else None


def _set_random_state(images: Tensor, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], images.device)
