"""Checks of the tensors that a loss is called with."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_inputs"]


def check_inputs(
    inputs: Tensor, targets: Tensor, references: Tensor | None = None, reference_targets: Tensor | None = None
) -> None:
    """Raises `TypeError` or `ValueError` for tensors that do not fit together; see `MetricLoss.forward`."""
    _check_rows("inputs", inputs, "targets", targets)
    if (references is None) != (reference_targets is None):
        missing = "reference_targets" if reference_targets is None else "references"
        raise ValueError(f"references and reference_targets go together, but {missing} is None")
    if references is None or reference_targets is None:
        return
    _check_rows("references", references, "reference_targets", reference_targets)
    if references.shape[1] != inputs.shape[1]:
        raise ValueError(
            "inputs and references must have the same feature dimension, got shapes "
            f"{tuple(inputs.shape)} and {tuple(references.shape)}"
        )
    if references.device != inputs.device:
        raise ValueError(f"inputs and references must be on one device, got {inputs.device} and {references.device}")


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
