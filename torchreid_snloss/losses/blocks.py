"""Anchors a block of rows at a time, so that memory grows with one block of the distance matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchreid_snloss.losses.distance import once_only

__all__ = ["in_blocks"]

Terms = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def in_blocks(terms: Terms, anchors: Tensor, references: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """``terms`` of all anchors; its graph is not kept, but made again in the backward pass, block by block.

    Args:
        terms: called with some anchors, all references and the number of the first of these anchors; returns a value
            with gradient and an integer for each anchor.
        anchors: (N, D).
        references: (M, D); may be ``anchors`` itself.
        block_size: anchors at a time, >= 1.

    Returns:
        (N,) values and (N,) integers.
    """
    values, counts = _InBlocks.apply(anchors, None if references is anchors else references, terms, block_size)
    return values, counts


class _InBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, references: Tensor | None, terms: Terms, block_size: int
    ) -> tuple[Tensor, Tensor]:
        ctx.terms, ctx.block_size = terms, block_size
        ctx.save_for_backward(anchors, references)
        others = anchors if references is None else references
        starts = range(0, len(anchors), block_size)
        values, counts = zip(*(terms(anchors[start : start + block_size], others, start) for start in starts))
        ctx.mark_non_differentiable(all_counts := torch.cat(counts))
        return torch.cat(values), all_counts

    @staticmethod
    @once_only
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        anchors, references = ctx.saved_tensors
        itself = references is None
        others = (anchors if itself else references).detach().requires_grad_(itself or ctx.needs_input_grad[1])
        grad_anchors = torch.zeros_like(anchors)
        grad_others = grad_anchors if itself else torch.zeros_like(others) if others.requires_grad else None
        for start in range(0, len(anchors), ctx.block_size):
            rows = slice(start, start + ctx.block_size)
            with torch.enable_grad():
                block = anchors[rows].detach().requires_grad_()
                values, _counts = ctx.terms(block, others, start)
            wanted = [block] if grad_others is None else [block, others]
            at_block, *at_others = torch.autograd.grad(values, wanted, grad[rows])
            grad_anchors[rows] += at_block
            if grad_others is not None:
                grad_others += at_others[0]
            del values, at_others
        return grad_anchors, None if itself else grad_others, None, None
