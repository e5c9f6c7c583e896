"""The autograd function of the losses: anchors' values from distances, and the gradient from the values' slopes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchreid_snloss.losses.distances import Distances
from torchreid_snloss.losses.statistics import add_totals

__all__ = ["RowTerms", "anchor_terms"]

# torch 2.2 has it elsewhere.
_is_compiling = torch.compiler.is_compiling if hasattr(torch.compiler, "is_compiling") else torch._utils.is_compiling


class RowTerms(NamedTuple):
    """The values of some anchors, and the slopes of the values with respect to the distances."""

    values: Tensor
    """(N,)"""
    counts: Tensor
    """int (N,)"""
    slopes: Tensor
    """The derivative of each value with respect to its row's distances, (N, M), or (N, C) with `columns`."""
    columns: Tensor | None
    """int64 (N, C), the references that the values depend on; None: all."""
    stat_totals: dict[str, Tensor]


class _Call(NamedTuple):
    """The arguments of a call of a loss, apart from the features."""

    terms_of_rows: Callable[[slice, Tensor, bool], RowTerms]
    distances: Distances
    normalize: bool
    self_offset: int | None
    block_size: int
    stat_totals: dict[str, Tensor]
    """Filled in the forward pass."""

    def blocks(self, anchors: int) -> list[slice]:
        starts = range(0, anchors, self.block_size)
        return [slice(start, min(start + self.block_size, anchors)) for start in starts]

    def selected(self, block: Any, columns: Tensor | None) -> Any:
        return block if columns is None else self.distances.select(block, columns)

    def offset(self, rows: slice) -> int | None:
        return None if self.self_offset is None else self.self_offset + int(rows.start)


def anchor_terms(
    anchors: Tensor,
    references: Tensor,
    terms_of_rows: Callable[[slice, Tensor, bool], RowTerms],
    distances: Distances,
    normalize: bool,
    self_offset: int | None,
    block_size: int,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The differentiable loss value of each anchor.

    Where the anchors go in several blocks, a block's distances are not kept but computed again in the backward pass.

    Args:
        anchors: (N, D), float32 or float64, N >= 1.
        references: (M, D), M >= 1; may be `anchors` itself.
        terms_of_rows: called with some of the anchors, their distances (n, M), and whether statistics may be collected.
        distances: the algorithm.
        normalize: whether to divide rows by their lengths first.
        self_offset: if the anchors are among the references, in order, the column of the first; otherwise None.
        block_size: how many anchors to process at a time, >= 1.

    Returns:
        (N,) values, int (N,) counts, and the totals of the statistics.

    Raises:
        RuntimeError: under a transform of `torch.func`, and for a second derivative.
    """
    call = _Call(terms_of_rows, distances, normalize, self_offset, block_size, {})
    apply = torch.compiler.disable(_AnchorValues.apply) if _is_compiling() else _AnchorValues.apply
    try:
        values, counts = apply(anchors, None if references is anchors else references, call)
    except RuntimeError as error:
        if "setup_context" not in str(error):  # which torch names for a function without one under torch.func
            raise
        raise RuntimeError(
            "the metric losses do not work under torch.func's transforms (grad, vmap, ...): use loss.backward() or "
            "torch.autograd.grad"
        ) from None
    return values, counts, call.stat_totals


class _AnchorValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None, call: _Call) -> tuple[Tensor, Tensor]:
        blocks = call.blocks(len(x))
        prepared = call.distances.prepare(x, y, call.normalize, len(blocks) > 1)
        values, counts, kept = [], [], ()
        for rows in blocks:
            prepared, block = call.distances.block(prepared, rows, call.offset(rows))
            terms = call.terms_of_rows(rows, block.distances, True)
            values.append(terms.values)
            counts.append(terms.counts)
            add_totals(call.stat_totals, terms.stat_totals)
            if len(blocks) == 1:
                kept = (terms.slopes, terms.columns, *call.selected(block, terms.columns))
            del block, terms  # before the next block's are made
        ctx.call, ctx.itself = call, y is None
        ctx.save_for_backward(*prepared, *kept)  # tensors stored on ctx itself would outlive the backward pass
        ctx.num_prepared = len(prepared)
        all_values, all_counts = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in (values, counts))
        ctx.mark_non_differentiable(all_counts)
        ctx.set_materialize_grads(False)
        return all_values, all_counts

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None, None]:
        if torch.is_grad_enabled():  # torch's once_differentiable would silently return zeros
            raise RuntimeError("the metric losses can be differentiated once, but create_graph=True asks for more")
        if grad is None:
            return None, None, None
        call: _Call = ctx.call
        saved = ctx.saved_tensors  # once: activation checkpointing unpacks them once
        prepared, kept = call.distances.prepared_type(*saved[: ctx.num_prepared]), saved[ctx.num_prepared :]
        wanted = (True, True) if ctx.itself else ctx.needs_input_grad[:2]
        with torch.autocast(grad.device.type, enabled=False):
            if kept:
                slopes, columns, *block = kept
                block = call.distances.block_type(*block)
                rows = slice(0, len(grad))
                # The gradient of a sum or a mean is one number for all anchors: it scales (N, D) numbers, not (N, M).
                one_for_all = grad.stride(0) == 0
                if not one_for_all:
                    slopes = slopes * grad[:, None]
                at_x, at_y = call.distances.gradients(prepared, block, rows, slopes, columns, wanted)
                if one_for_all:
                    at_x, at_y = (None if part is None else part.mul_(grad[:1]) for part in (at_x, at_y))
            else:
                at_x, at_y = _gradients_of_blocks(call, prepared, grad, wanted, ctx.itself)
        return at_x, None if ctx.itself else at_y, None


def _gradients_of_blocks(
    call: _Call, prepared: Any, grad: Tensor, wanted: tuple[bool, bool], itself: bool
) -> tuple[Tensor | None, Tensor | None]:
    x = prepared[0]
    total_at_x = torch.empty(x.shape, dtype=grad.dtype, device=x.device) if wanted[0] else None
    total_at_y: Tensor | None = None
    for rows in call.blocks(len(grad)):
        prepared, block = call.distances.block(prepared, rows, call.offset(rows))
        terms = call.terms_of_rows(rows, block.distances, False)
        slopes = terms.slopes.mul_(grad[rows, None])
        block = call.selected(block, terms.columns)
        part_at_x, part_at_y = call.distances.gradients(prepared, block, rows, slopes, terms.columns, wanted)
        if total_at_x is not None and part_at_x is not None:
            total_at_x[rows] = part_at_x
        if part_at_y is not None:
            total_at_y = part_at_y if total_at_y is None else total_at_y.add_(part_at_y)
        del block, terms, slopes, part_at_x, part_at_y  # before the next block's are made
    if itself and total_at_x is not None and total_at_y is not None:
        return total_at_x.add_(total_at_y), None
    return total_at_x, total_at_y
