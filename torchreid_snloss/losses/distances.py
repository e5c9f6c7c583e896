"""The interface of the algorithms for Euclidean distances, and the choice between them."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from torchreid_snloss.losses.differences import Differences
from torchreid_snloss.losses.products import Products

__all__ = ["Distances", "choose"]

# Differences of all pairs of rows take this many numbers at most: 128 MiB in float32.
_DIFFERENCES_AT_ONCE = 1 << 25


class Distances(Protocol):
    """An algorithm for distances and their gradient: `Products` or `Differences`. It holds no tensors itself.

    In float32, `Differences` has a relative error of about 1e-6, even for rows that are much nearer to each other than
    to the origin. So has `Products` for near rows, and of a few 1e-4 at most for others of 2,048 numbers, more for
    longer ones. Rows may be divided by their lengths first; a row of zeros then stays zero, with zero gradient. Where
    two rows are equal, the distance has no derivative, and 0 is used.

    Attributes:
        prepared_type: the named tuple of tensors that `prepare` returns.
        block_type: the named tuple of tensors that `block` returns; its first is `distances`, (N, M).
    """

    @property
    def prepared_type(self) -> Any: ...

    @property
    def block_type(self) -> Any: ...

    def prepare(self, x: Tensor, y: Tensor | None, normalize: bool, in_blocks: bool) -> Any:
        """Does the computation that is needed once for all blocks of anchors.

        Args:
            x: the anchors, (N, D), float32 or float64.
            y: the references, (M, D); None if they are the anchors.
            normalize: whether to divide rows by their lengths.
            in_blocks: whether the anchors will be processed in several blocks.
        """

    def block(self, prepared: Any, rows: slice, self_offset: int | None) -> tuple[Any, Any]:
        """Computes the distances of some anchors to all references.

        Args:
            prepared: the result of `prepare`.
            rows: which anchors.
            self_offset: if these anchors are among the references, in order, the column of the first; otherwise None.

        Returns:
            `prepared` or a replacement for it, and the block. The distance of an anchor to itself is 0.
        """

    def select(self, block: Any, columns: Tensor) -> Any:
        """What `gradients` needs of a block whose values depend on few references: `columns`, int64 (N, C)."""

    def gradients(
        self,
        prepared: Any,
        block: Any,
        rows: slice,
        slopes: Tensor,
        columns: Tensor | None,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """Computes the gradients with respect to the anchors and the references.

        Args:
            prepared: as `block` returned it.
            block: as `block` returned it, or `select`, if there are `columns`.
            rows: which anchors.
            slopes: the derivative by each distance, (N, M), or (N, C) with `columns`.
            columns: int64 (N, C), the references that `slopes` belong to; None: all.
            wanted: whether the gradient at the anchors, and at the references, is needed.

        Returns:
            (N, D) of these anchors, and (M, D); None for one that is not wanted. Where the anchors are all the
            references the first is the sum of both, and the second None.
        """


def choose(anchors: int, references: int, dimension: int, device: torch.device) -> Distances:
    """Chooses the faster algorithm: `Products` on a CPU; on a GPU, `Differences` for small batches.

    For a small batch, a GPU spends most of the time on kernel launches and synchronisation, and `Differences` needs
    fewer of both.
    """
    small = anchors * references * dimension <= _DIFFERENCES_AT_ONCE
    return Differences() if small and device.type != "cpu" else Products()
