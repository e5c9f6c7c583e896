"""What the metric losses share: rows are anchors, columns are references."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from torchreid_snloss.losses.blocks import in_blocks
from torchreid_snloss.losses.distance import Pairs, centre, squared_distances, values_of_distances

__all__ = ["MetricLoss", "Reduction", "check_choice", "check_integer", "check_number", "quotients"]

Reduction = Literal["mean", "sum", "none"]


# Where there are more distances than this, anchors go in blocks of so many rows, or of so many distances.
_DISTANCES_AT_ONCE, _ROWS_AT_ONCE = 1 << 22, 256
_TINY = torch.finfo(torch.float32).tiny


class MetricLoss(nn.Module, ABC):
    """Base of the losses: distances, masks, references, which anchors count, row blocks, and the reduction.

    A loss is a subclass with one method, :meth:`anchor_values`, its formula; one that looks at few references of each
    anchor has a second, :meth:`columns`, which chooses them. Rows of ``inputs`` are the anchors, rows of
    ``references`` the images they are compared with; without references the batch is its own reference set and the
    pair of an anchor with itself is left out. *Positives* of an anchor are the references with its label, *negatives*
    the others.

    An anchor counts where it has at least one positive and one negative. ``"mean"`` divides by the number of anchors
    that count; where none does the loss is 0, and ``backward()`` gives zeros.

    Distances and what follows are computed in float32 at least, also under autocast.

    Attributes:
        collect_statistics: whether a call in training mode fills ``statistics``, at the cost of some passes over the
            distances. Default is False; the engines set it.
        sums: of the last batch in training mode, what ``statistics`` are quotients of: (2,) float32 each, a total and a
            number. Those of several processes add up.

    Args:
        normalize: L2-normalise inputs and references first. A row of zeros stays zero, with zero gradient.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for one value an anchor, 0 where it does not count.
        block_size: anchors at a time, >= 1. Memory is that of ``block_size`` rows of the distance matrix, which are
            computed again in the backward pass. 0: all at once up to 2^22 distances, above that so many at a time.

    Raises:
        TypeError, ValueError: for an argument of another type, or out of its range.
    """

    def __init__(self, normalize: bool, reduction: Reduction, block_size: int) -> None:
        super().__init__()
        if not isinstance(normalize, bool):
            raise TypeError(f"normalize must be True or False, got {normalize!r}")
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.normalize = normalize
        self.reduction = reduction
        self.block_size = check_integer("block_size", block_size, at_least=0)
        self.collect_statistics = False
        self.sums: dict[str, Tensor] = {}
        self._collected: dict[str, Tensor] | None = None  # the sums, while a call collects them
        self._counting: Tensor | None = None  # meanwhile, which anchors count

    @property
    def statistics(self) -> dict[str, Tensor]:
        """Of the last batch in training mode, scalars without gradient.

        ``d_pos`` and ``d_neg``, the mean distances of positive and of negative pairs; ``anchors``, the share of anchors
        that count; ``spread``, the mean distance in mean feature lengths, 0 where all features are one point; and what
        the loss itself watches. NaN where there is nothing to take a mean of; empty for an empty batch.
        """
        return quotients(self.sums)

    def columns(self, squares: Tensor, positive: Tensor, negative: Tensor) -> Tensor | None:
        """The few references of each anchor that its value depends on.

        Args:
            squares: squared distances (N, M), without gradient.
            positive: bool (N, M).
            negative: bool (N, M).

        Returns:
            int64 (N, C) columns, repeated ones among them or not; None: all references.
        """
        return None

    @abstractmethod
    def anchor_values(self, distances: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """The loss's formula, and its derivative.

        Args:
            distances: (N, M), float32 or float64; with :meth:`columns` these columns of it, (N, C).
            positive: bool, likewise, the references with the anchor's label. An anchor that counts has at least one.
            negative: bool, likewise those with another.

        Returns:
            (N,) one value an anchor, and, like ``distances``, the slope of an anchor's value by each of its distances;
            0 for a reference that is neither. What anchors give that don't count is thrown away.
        """

    @property
    def watching(self) -> bool:
        """Whether statistics are being collected, and :meth:`watch` is worth a call."""
        return self._collected is not None

    def watch(self, name: str, values: Tensor, numbers: Tensor | None = None) -> None:
        """For a subclass's two methods: adds to a statistic, which is a mean over the anchors that count.

        Args:
            name: of the statistic.
            values: (N,), of each anchor.
            numbers: (N,), of how many things ``values`` are sums; None: of one.
        """
        if self._collected is not None and self._counting is not None:
            weights = self._counting if numbers is None else numbers * self._counting
            _add(self._collected, name, values.masked_fill(~self._counting, 0).sum(), weights.sum())

    def term_counts(self, positives: Tensor, negatives: Tensor) -> Tensor:
        """How many terms each anchor adds to the mean: here 1, or 0 where the anchor does not count.

        Args:
            positives: int (N,), the number of an anchor's positives.
            negatives: int (N,), of its negatives.

        Returns:
            int (N,).
        """
        return ((positives > 0) & (negatives > 0)).int()

    def forward(
        self,
        inputs: Tensor,
        targets: Tensor,
        references: Tensor | None = None,
        reference_targets: Tensor | None = None,
    ) -> Tensor:
        """Computes the loss.

        Args:
            inputs: features of the anchors, (N, D), floating point.
            targets: their identity labels, (N,), any integer dtype.
            references: features of the references, (M, D); None: ``inputs`` are compared among themselves.
            reference_targets: their labels, (M,); given together with ``references``.

        Returns:
            a scalar, or (N,) with ``reduction="none"``; float64 for float64 features, else float32.

        Raises:
            TypeError, ValueError: for tensors of another type, shape or device.
        """
        _check_rows("inputs", inputs, "targets", targets)
        if (references is None) != (reference_targets is None):
            missing = "reference_targets" if reference_targets is None else "references"
            raise ValueError(f"references and reference_targets go together, but {missing} is None")
        if references is None or reference_targets is None:
            return self.reduce(*self.terms(inputs, targets, inputs, targets, own_column=0))
        _check_rows("references", references, "reference_targets", reference_targets)
        if references.shape[1] != inputs.shape[1]:
            raise ValueError(
                "inputs and references must have the same feature dimension, got shapes "
                f"{tuple(inputs.shape)} and {tuple(references.shape)}"
            )
        if references.device != inputs.device:
            raise ValueError(
                f"inputs and references must be on one device, got {inputs.device} and {references.device}"
            )
        return self.reduce(*self.terms(inputs, targets, references, reference_targets))

    def terms(
        self,
        inputs: Tensor,
        targets: Tensor,
        references: Tensor,
        reference_targets: Tensor,
        own_column: int | None = None,
        left_out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What each anchor adds to the loss, before the reduction.

        Args:
            inputs: features of the anchors, (N, D).
            targets: (N,).
            references: (M, D); ``inputs`` itself where the batch is its own reference set.
            reference_targets: (M,).
            own_column: where the anchors are among the references, in order, the column of the first. The pair of an
                anchor with itself is left out. None: they are not.
            left_out: bool (N, M), further pairs to leave out. None: there are none.

        Returns:
            (N,) values, 0 for an anchor that does not count, and int (N,) how many terms each adds to the mean.
        """
        with _float32_at_least(inputs.device):
            dtype = torch.promote_types(torch.promote_types(inputs.dtype, references.dtype), torch.float32)
            anchors = inputs.to(dtype)
            others = anchors if references is inputs else references.to(dtype)
            at_once = self.block_size or len(anchors)
            if not self.block_size and len(anchors) * len(others) > _DISTANCES_AT_ONCE:
                at_once = max(1, min(_ROWS_AT_ONCE, _DISTANCES_AT_ONCE // len(others)))
            in_one = at_once >= len(anchors)
            normalize, centred = self.normalize, None
            if not in_one and not anchors.is_cuda:  # once for all blocks; float64 on CUDA does without
                anchors, others, centred = centre(anchors, others, normalize)
                normalize = False

            def of_some(anchors: Tensor, others: Tensor, start: int) -> tuple[Tensor, Tensor]:
                rows = slice(start, start + len(anchors))
                own = None if own_column is None else own_column + start
                block = None if centred is None else (centred[0][rows], centred[1])
                with _float32_at_least(anchors.device):  # in_blocks calls it in the backward pass, too
                    pairs = squared_distances(anchors, others, normalize, own, block)
                    block_left_out = None if left_out is None else left_out[rows]
                    return self._terms_of(pairs, targets[rows], reference_targets, own, block_left_out)

            self._collected = {} if self.collect_statistics and self.training else None
            try:
                result = of_some(anchors, others, 0) if in_one else in_blocks(of_some, anchors, others, at_once)
                if self._collected is not None:
                    self.sums = self._collected
                    if not self.normalize and "spread" in self.sums:
                        lengths = torch.linalg.vector_norm(inputs.detach().float(), dim=1)
                        self.sums["spread"] *= torch.stack(
                            [torch.ones_like(lengths[0]), lengths.mean().clamp(min=_TINY)]
                        )
            finally:
                self._collected = self._counting = None
            return result

    def _terms_of(
        self,
        pairs: Pairs,
        targets: Tensor,
        reference_targets: Tensor,
        own_column: int | None,
        left_out: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """:meth:`terms` of some anchors."""
        same = targets[:, None] == reference_targets
        positives = same.sum(dim=1, dtype=torch.int32)
        negatives = len(reference_targets) - positives
        positive, negative = same, ~same
        if own_column is not None:
            positive.diagonal(own_column).fill_(False)
            positives = positives - 1
        if left_out is not None:
            positive, negative = positive & ~left_out, negative & ~left_out
            positives, negatives = (mask.sum(dim=1, dtype=torch.int32) for mask in (positive, negative))
        counts = self.term_counts(positives, negatives)
        if pairs.squares.numel() == 0:
            return pairs.x.sum(dim=1) * 0 + pairs.y.sum() * 0, counts
        if self._collected is not None:
            self._add_statistics(self._collected, pairs.squares.sqrt(), positive, negative, counts)
        # Anchors that don't count get every reference on both sides: the formula then meets no empty set, and neither a
        # NaN nor a special case comes of one.
        ignored = counts == 0
        some_ignored = counts.is_cuda or bool(ignored.any())  # to look is to wait for a CUDA device
        if some_ignored:
            positive, negative = positive | ignored[:, None], negative | ignored[:, None]
        columns = self.columns(pairs.squares, positive, negative)
        if columns is not None:
            positive, negative = positive.gather(1, columns), negative.gather(1, columns)
        values = values_of_distances(pairs, columns, lambda d: self.anchor_values(d, positive, negative))
        return (values.masked_fill(ignored, 0) if some_ignored else values), counts

    def _add_statistics(
        self, sums: dict[str, Tensor], distances: Tensor, positive: Tensor, negative: Tensor, counts: Tensor
    ) -> None:
        self._counting = counts > 0
        _add(sums, "d_pos", (distances * positive).sum(), positive.sum())
        _add(sums, "d_neg", (distances * negative).sum(), negative.sum())
        _add(sums, "anchors", self._counting.sum(), len(counts))
        _add(sums, "spread", distances.sum(), distances.numel())

    def reduce(self, values: Tensor, counts: Tensor) -> Tensor:
        """The loss of anchors' :meth:`terms`, as ``reduction`` says."""
        if self.reduction == "none":
            return values
        if self.reduction == "sum":
            return values.sum()
        return values.sum() / counts.sum().clamp(min=1)


def _float32_at_least(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)


def quotients(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The ``statistics`` of a loss's ``sums``."""
    return {name: total / number for name, (total, number) in sums.items()}


def _add(sums: dict[str, Tensor], name: str, total: Tensor, number: Tensor | int) -> None:
    if isinstance(number, int):
        number = torch.full_like(total, number)  # not from the CPU, which would be a wait for the device
    new = torch.stack([total.float(), number.float()])
    sums[name] = sums[name] + new if name in sums else new


def _check_rows(features_name: str, features: Tensor, labels_name: str, labels: Tensor) -> None:
    for name, value in ((features_name, features), (labels_name, labels)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if not features.is_floating_point():
        raise TypeError(f"{features_name} must be floating point, got {features.dtype}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{labels_name} must hold integer identity labels, got {labels.dtype}")
    if features.dim() != 2 or features.shape[1] == 0:
        raise ValueError(f"{features_name} must have shape (images, feature dimension), got {tuple(features.shape)}")
    if labels.shape != features.shape[:1]:
        raise ValueError(
            f"{labels_name} must have shape ({features.shape[0]},), one label a row of {features_name}, "
            f"got {tuple(labels.shape)}"
        )
    if labels.device != features.device:
        raise ValueError(
            f"{features_name} and {labels_name} must be on one device, got {features.device} and {labels.device}"
        )


def check_number(name: str, value: float, above: float | None = None, at_least: float | None = None) -> float:
    """Returns ``value`` as a float if it is a finite number in the range; raises TypeError or ValueError if not."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer beyond any float
        finite = False
    if not finite:
        raise ValueError(f"{name} must be finite, got {value!r}")
    if above is not None and not value > above:
        raise ValueError(f"{name} must be greater than {above}, got {value!r}")
    if at_least is not None and not value >= at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value!r}")
    return float(value)


def check_integer(name: str, value: int, at_least: int) -> int:
    """Returns ``value`` as an int; raises TypeError if it is none, ValueError if it is too small."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    return int(check_number(name, value, at_least=at_least))


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
