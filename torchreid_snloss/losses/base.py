"""What the metric losses share: rows are anchors, columns are references."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from torchreid_snloss.arguments import check_choice, check_integer
from torchreid_snloss.deprecation import renamed
from torchreid_snloss.losses.autograd import RowTerms, anchor_terms
from torchreid_snloss.losses.distances import Distances, choose
from torchreid_snloss.losses.inputs import check_inputs
from torchreid_snloss.losses.old_names import OldNames
from torchreid_snloss.losses.rows import fill_diagonal, take
from torchreid_snloss.losses.search import DeclaredSpace
from torchreid_snloss.losses.statistics import StatisticsCollector, means

__all__ = ["MetricLoss", "Reduction", "Terms"]

Reduction = Literal["mean", "sum", "none"]

# Above _DISTANCES_AT_ONCE distances a block has at most _ROWS_AT_ONCE anchors, and at most that many distances.
_DISTANCES_AT_ONCE, _ROWS_AT_ONCE = 1 << 22, 256


class Terms(NamedTuple):
    """What each anchor adds to a loss, before the reduction."""

    values: Tensor
    """(N,), 0 for an anchor that does not count."""
    counts: Tensor
    """int (N,), how many terms each anchor adds to the mean."""
    stat_totals: dict[str, Tensor]
    """Totals of the statistics, (2,) float32 each; empty if none were collected."""


class MetricLoss(OldNames, nn.Module, ABC):
    r"""Base class of the losses: distances, masks, references, which anchors count, row blocks, and the reduction.

    A loss is a subclass with one method, `anchor_values`, its formula. A loss that only uses a few references of each
    anchor also defines `select_references`, which chooses them. Rows of `inputs` are the anchors, and rows of
    `references` are the images they are compared with. Without references, the batch is its own reference set, and the
    pair of an anchor with itself is left out. The *positives* of an anchor are the references with its label, and its
    *negatives* are the others.

    An anchor counts if it has at least one positive and one negative. `"mean"` divides by the number of anchors that
    count; if there are none, the loss is 0 and its gradient is zero.

    Distances and everything that follows are computed in at least float32, under autocast too. A loss stores nothing on
    itself but statistics, those of the last call, so threads may share one.

    Args:
        normalize: L2-normalise inputs and references first. A row of zeros stays zero, with zero gradient.
        reduction: `"mean"`, `"sum"`, or `"none"` for one value per anchor, 0 where it does not count.
        block_size: anchors at a time, >= 1. Memory is that of `block_size` rows of the distance matrix, which are
            computed again in the backward pass. 0: all at once up to $2^{22}$ distances, above
            that 256 anchors at a time, or fewer.

    Attributes:
        default_weight: of the class: the weight of the loss beside softmax where none is given. Default is 1.
        search_space: of the class: the values that a tuning tries for an argument, by its name, as an `Interval` or a
            tuple of choices, either of them within `OnlyWith` if the loss uses the argument only with one value of
            another. Default is none; other arguments keep their values.
        collect_statistics: whether a call in training mode collects statistics, at the cost of some passes over the
            distances. Default is False; the engines set it.
        stat_totals: the totals from which `statistics` are computed, (2,) float32 each: a sum and a number of values.
            To combine those of several processes, add them up.
        distances: the algorithm for distances, `Products` or `Differences`; None (default) takes the faster one.

    Raises:
        TypeError: for an argument of another type.
        ValueError: for an argument out of its range.
    """

    default_weight: ClassVar[float] = 1.0
    search_space: ClassVar[DeclaredSpace] = {}

    def __init__(self, normalize: bool, reduction: Reduction, block_size: int) -> None:
        super().__init__()
        if not isinstance(normalize, bool):
            raise TypeError(f"normalize must be True or False, got {normalize!r}")
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.normalize = normalize
        self.reduction = reduction
        self.block_size = check_integer("block_size", block_size, at_least=0)
        self.collect_statistics = False
        self.stat_totals: dict[str, Tensor] = {}
        self.distances: Distances | None = None

    @property
    def statistics(self) -> dict[str, Tensor]:
        """The statistics of the last call in training mode, scalars without gradient.

        They are `d_pos` and `d_neg`, the mean distances of positive and of negative pairs; `anchors`, the share of
        anchors that count; and the statistics that the loss itself logs. A mean over nothing is NaN. For an empty batch
        there are no statistics.
        """
        return means(self.stat_totals)

    def select_references(
        self, distances: Tensor, positive: Tensor, negative: Tensor, statistics: StatisticsCollector
    ) -> Tensor | None:
        """Chooses the references that an anchor's value depends on, for losses that only use a few.

        Args:
            distances: (N, M), without gradient.
            positive: bool (N, M), the references with the anchor's label.
            negative: bool (N, M), the references with another label.
            statistics: the collector to which the loss logs its statistics.

        Returns:
            int64 (N, C), the columns, which may repeat; None for all references.
        """
        return None

    @abstractmethod
    def anchor_values(
        self, distances: Tensor, positive: Tensor, negative: Tensor, statistics: StatisticsCollector
    ) -> tuple[Tensor, Tensor]:
        """The loss's formula, and its derivative.

        Args:
            distances: (N, M), float32 or float64, or (N, C), those of the references selected.
            positive: bool, of the same shape, the references with the anchor's label. An anchor that counts has at
                least one.
            negative: bool, of the same shape, those with another label.
            statistics: takes what the loss logs.

        Returns:
            (N,) one value per anchor, and, shaped like `distances`, the derivative of an anchor's value with respect to
            each of its distances: 0 for a reference that is neither positive nor negative, and in memory of its own.
            Values and slopes of anchors that don't count are ignored, even NaN.
        """

    def term_counts(self, positives: Tensor, negatives: Tensor) -> Tensor:
        """How many terms each anchor adds to the mean: here 1, or 0 where the anchor does not count.

        Args:
            positives: int (N,), the number of an anchor's positives.
            negatives: int (N,), the number of its negatives.

        Returns:
            int (N,).
        """
        return torch.minimum(positives, negatives).clamp(max=1)  # two operations, where the plain form takes four

    def forward(
        self,
        inputs: Tensor,
        targets: Tensor,
        references: Tensor | None = None,
        reference_targets: Tensor | None = None,
    ) -> Tensor:
        """Computes the loss. It can be differentiated once.

        Args:
            inputs: features of the anchors, (N, D), floating point.
            targets: their identity labels, (N,), any integer dtype that torch compares with that of
                `reference_targets`.
            references: features of the references, (M, D); None: `inputs` are compared among themselves.
            reference_targets: their labels, (M,); given together with `references`.

        Returns:
            a scalar, or (N,) with `reduction="none"`; float64 for float64 features, else float32.

        Raises:
            TypeError: for arguments that are not tensors, or tensors of a wrong dtype.
            ValueError: for tensors of a wrong shape or on different devices.
            RuntimeError: under a transform of `torch.func` (`grad`, `vmap`, ...).
        """
        check_inputs(inputs, targets, references, reference_targets)
        if references is None or reference_targets is None:
            terms = self.terms(inputs, targets, inputs, targets, self_offset=0)
        else:
            terms = self.terms(inputs, targets, references, reference_targets)
        return self.reduce(terms.values, terms.counts)

    def terms(
        self,
        inputs: Tensor,
        targets: Tensor,
        references: Tensor,
        reference_targets: Tensor,
        self_offset: int | None = None,
        excluded_pairs: Tensor | None = None,
    ) -> Terms:
        """Computes what each anchor adds to the loss, before the reduction.

        Args:
            inputs: features of the anchors, (N, D).
            targets: (N,).
            references: (M, D); pass `inputs` itself if the batch is its own reference set.
            reference_targets: (M,).
            self_offset: if the anchors are among the references, in the same order, the column of the first anchor. The
                pair of an anchor with itself is then left out. None if they are not.
            excluded_pairs: bool (N, M), further pairs to leave out. None if there are none.
        """
        collect = self.collect_statistics and self.training
        dtype = torch.float64 if torch.float64 in (inputs.dtype, references.dtype) else torch.float32
        with torch.autocast(inputs.device.type, enabled=False):
            anchors = inputs.to(dtype)
            others = anchors if references is inputs else references.to(dtype)
            if anchors.numel() == 0 or others.numel() == 0:
                if collect:
                    self.stat_totals = {}
                none = targets.new_zeros(len(targets), dtype=torch.int32)
                return Terms(anchors.sum(dim=1) * 0 + others.sum() * 0, self.term_counts(none, none), {})

            def terms_of_rows(rows: slice, distances: Tensor, may_collect: bool) -> RowTerms:
                offset = None if self_offset is None else self_offset + rows.start
                masks = _masks(targets, reference_targets, offset, excluded_pairs, rows)
                return self._terms_of_rows(distances, *masks, collect and may_collect)

            at_once = self._rows_at_once(len(anchors), len(others))
            distances = self.distances or choose(at_once, len(others), anchors.shape[1], anchors.device)
            values, counts, totals = anchor_terms(
                anchors, others, terms_of_rows, distances, self.normalize, self_offset, at_once
            )
        if collect:
            self.stat_totals = totals
        return Terms(values, counts, totals)

    def _rows_at_once(self, anchors: int, references: int) -> int:
        if self.block_size:
            return min(self.block_size, anchors)
        if anchors * references <= _DISTANCES_AT_ONCE:
            return anchors
        return max(1, min(_ROWS_AT_ONCE, _DISTANCES_AT_ONCE // references))

    def _terms_of_rows(self, distances: Tensor, positive: Tensor, negative: Tensor, collect: bool) -> RowTerms:
        """Computes the values and slopes of some anchors from their distances, (N, M)."""
        counts = self.term_counts(*(mask.sum(dim=1, dtype=torch.int32) for mask in (positive, negative)))
        ignored = counts == 0
        statistics = StatisticsCollector(~ignored if collect else None)
        if statistics.collecting:
            statistics.log_total("d_pos", (distances * positive).sum(), positive.sum())
            statistics.log_total("d_neg", (distances * negative).sum(), negative.sum())
            statistics.log_total("anchors", (~ignored).sum(), len(counts))
        columns = self.select_references(distances, positive, negative, statistics)
        if columns is not None:
            distances, positive, negative = (m.gather(1, columns) for m in (distances, positive, negative))
        values, slopes = self.anchor_values(distances, positive, negative, statistics)
        values, slopes = values.masked_fill(ignored, 0), slopes.masked_fill_(ignored[:, None], 0)
        return RowTerms(values, counts, slopes, columns, statistics.totals)

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        names = inspect.signature(type(self).__init__).parameters
        return ", ".join(f"{name}={vars(self)[name]!r}" for name in names if name in vars(self))

    def reduce(self, values: Tensor, counts: Tensor) -> Tensor:
        """Reduces the anchors' `terms` to the loss, as specified by `reduction`."""
        if self.reduction == "none":
            return values
        if self.reduction == "sum":
            return values.sum()
        return values.sum() / counts.sum().clamp(min=1)


def _masks(
    targets: Tensor, reference_targets: Tensor, self_offset: int | None, excluded_pairs: Tensor | None, rows: slice
) -> tuple[Tensor, Tensor]:
    """The masks of the positives and of the negatives of each anchor, bool (N, M) each."""
    positive = take(targets, rows)[:, None] == reference_targets
    negative = ~positive
    if self_offset is not None:
        fill_diagonal(positive, False, self_offset)
    if excluded_pairs is not None:
        kept = ~take(excluded_pairs, rows)
        positive, negative = positive & kept, negative & kept
    return positive, negative


__getattr__ = renamed(
    __name__,
    {
        "check_number": "torchreid_snloss.arguments.check_number",
        "quotients": "torchreid_snloss.losses.means",
    },
)
