"""What the metric losses share: rows are anchors, columns are references."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from torchreid_snloss.losses.distance import euclidean_distance

__all__ = ["MetricLoss", "Reduction", "check_choice", "check_number"]

Reduction = Literal["mean", "sum", "none"]


class MetricLoss(nn.Module, ABC):
    """Base of the losses: distances, masks, references, which anchors count, and the reduction.

    A loss is a subclass with one method, :meth:`anchor_values`, its formula. Rows of ``inputs`` are the anchors, rows
    of ``references`` the images they are compared with; without references the batch is its own reference set and
    the pair of an anchor with itself is left out. *Positives* of an anchor are the references with its label,
    *negatives* the others.

    An anchor counts where it has at least one positive and one negative. ``"mean"`` divides by the number of anchors
    that count; where none does the loss is 0, and ``backward()`` gives zeros.

    Distances and what follows are computed in float32 at least, also under autocast.

    Attributes:
        statistics: of the last batch in training mode, scalars without gradient: ``d_pos`` and ``d_neg``, the mean
            distances of positive and of negative pairs; ``anchors``, the share of anchors that count; ``spread``, the
            mean distance in mean feature lengths, 0 where all features are one point; and what the loss itself
            watches. NaN where there is nothing to take a mean of.

    Args:
        normalize: L2-normalise inputs and references first. A row of zeros stays zero, with zero gradient.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for one value an anchor, 0 where it does not count.

    Raises:
        TypeError, ValueError: for an argument of another type, or out of its range.
    """

    def __init__(self, normalize: bool, reduction: Reduction) -> None:
        super().__init__()
        if not isinstance(normalize, bool):
            raise TypeError(f"normalize must be True or False, got {normalize!r}")
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.normalize = normalize
        self.reduction = reduction
        self.statistics: dict[str, Tensor] = {}
        self._watched: dict[str, Tensor] = {}

    @abstractmethod
    def anchor_values(self, distances: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """The loss's formula.

        Args:
            distances: (N, M), float32 or float64.
            positive: bool (N, M), the references with the anchor's label. An anchor that counts has at least one.
            negative: bool (N, M), likewise those with another.

        Returns:
            (N,) one value an anchor. Values of anchors that don't count are thrown away.
        """

    def watch(self, **values: Tensor) -> None:
        """For :meth:`anchor_values`: adds to the statistics, one value an anchor, (N,)."""
        self._watched = {name: value.detach() for name, value in values.items()}

    def term_counts(self, positive: Tensor, negative: Tensor) -> Tensor:
        """How many terms each anchor adds to the mean, int64 (N,): here 1, or 0 where the anchor does not count."""
        return (positive.any(dim=1) & negative.any(dim=1)).long()

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
        if references is not None and reference_targets is not None:
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

        with torch.autocast(inputs.device.type, enabled=False):
            dtype = torch.promote_types(inputs.dtype, torch.float32)
            if references is not None:
                dtype = torch.promote_types(dtype, references.dtype)
            anchors = self._prepare(inputs, dtype)
            if references is None or reference_targets is None:
                values, counts = self.terms(anchors, targets, anchors, targets, own_column=0)
            else:
                values, counts = self.terms(anchors, targets, self._prepare(references, dtype), reference_targets)
            return self.reduce(values, counts)

    def terms(
        self,
        anchors: Tensor,
        targets: Tensor,
        references: Tensor,
        reference_targets: Tensor,
        own_column: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What each anchor adds to the loss, before the reduction.

        Args:
            anchors: (N, D), float32 or float64, normalised where the loss asks for it.
            targets: (N,).
            references: (M, D), likewise; ``anchors`` itself where the batch is its own reference set.
            reference_targets: (M,).
            own_column: where the anchors are rows of ``references``, the column of the first: N rows in a block from
                there on. The pair of an anchor with itself is left out. None: they are not.

        Returns:
            (N,) values, 0 for an anchor that does not count, and (N,) how many terms each adds to the mean.
        """
        distances = euclidean_distance(anchors, None if references is anchors else references)
        same = targets[:, None] == reference_targets[None, :]
        positive, negative = same, ~same
        if own_column is not None:
            positive.diagonal(own_column).fill_(False)
        counts = self.term_counts(positive, negative)
        if distances.numel() == 0:
            return distances.sum(dim=1), counts
        # Anchors that don't count get every reference on both sides: the formula then meets no empty set, and neither a
        # NaN nor a special case comes of one.
        ignored = (counts == 0)[:, None]
        values = self.anchor_values(distances, positive | ignored, negative | ignored)
        if self.training:
            self._note_statistics(anchors, distances, positive, negative, counts)
        return values.masked_fill(ignored[:, 0], 0), counts

    @torch.no_grad()
    def _note_statistics(
        self, anchors: Tensor, distances: Tensor, positive: Tensor, negative: Tensor, counts: Tensor
    ) -> None:
        d_pos, d_neg = ((distances * members).sum() / members.sum() for members in (positive, negative))
        length = torch.linalg.vector_norm(anchors, dim=1).mean()
        spread = distances.mean() / length.clamp(min=torch.finfo(length.dtype).tiny)
        self.statistics = {"d_pos": d_pos, "d_neg": d_neg, "anchors": (counts > 0).float().mean(), "spread": spread}
        for name, value in self._watched.items():
            self.statistics[name] = value.float().masked_fill(counts == 0, torch.nan).nanmean()

    def reduce(self, values: Tensor, counts: Tensor) -> Tensor:
        """The loss of anchors' :meth:`terms`, as ``reduction`` says."""
        if self.reduction == "none":
            return values
        if self.reduction == "sum":
            return values.sum()
        return values.sum() / counts.sum().clamp(min=1)

    def _prepare(self, features: Tensor, dtype: torch.dtype) -> Tensor:
        features = features.to(dtype)
        if not self.normalize or features.numel() == 0:
            return features
        # Divided by its largest entry first, a row's norm neither overflows nor vanishes.
        largest = features.detach().abs().amax(dim=1, keepdim=True)
        zero = largest == 0
        scaled = features / largest.masked_fill(zero, 1)
        unit: Tensor = scaled / torch.linalg.vector_norm(scaled, dim=1, keepdim=True).masked_fill(zero, 1)
        return unit.masked_fill(zero, 0)


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


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
