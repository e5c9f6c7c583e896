"""Whether the weights of a checkpoint fit a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torchreid_snloss.checkpoint.schema import check_tensor
from torchreid_snloss.errors import printable

__all__ = ["WeightsFit", "check_number_type", "fit_weights", "is_of_classifier", "num_classes"]

_LONGEST = 200  # characters about a layer


@dataclass(frozen=True)
class WeightsFit:
    """How the weights of a checkpoint fit a model.

    Attributes:
        fitting: The weights that fit, by their names in the model.
        misfits: For each other layer of the model or the checkpoint, a sentence that says what differs.
        classifier: The same for the layers of classifiers, which depend on the number of training identities.
        share: The share of the model's weights that fit, in [0, 1].
    """

    fitting: dict[str, Tensor]
    misfits: list[str]
    classifier: list[str]
    share: float

    def describe(self, number: int) -> str:
        """Describes the misfits, those of classifiers last. Names are cut, and what is not printable is escaped.

        Args:
            number: How many layers to name.
        """
        lines = [printable(line, _LONGEST) for line in (*self.misfits, *self.classifier)]
        more = f", and {len(lines) - number} more" if len(lines) > number else ""
        return "; ".join(lines[:number]) + more


def fit_weights(current: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> WeightsFit:
    """Compares the weights of a checkpoint with those of a model.

    Args:
        current: The state dict of the model.
        weights: The state dict of the checkpoint. Its names may have the prefix that `DataParallel` puts before them.

    Raises:
        ValueError: If a layer with the right name and shape has another type of numbers, or does not fit into the
            precision of the model's.
    """
    weights = {name.removeprefix("module."): value for name, value in weights.items()}
    fitting: dict[str, Tensor] = {}
    misfits: list[str] = []
    classifier: list[str] = []
    has_fc = any(name.startswith("fc.") for name in current)
    for name, value in current.items():
        lines = classifier if is_of_classifier(name) else misfits
        if name not in weights:
            # torch before 0.4.1 did not count batches, and no evaluation uses their number.
            if not name.endswith("num_batches_tracked"):
                lines.append(f"the checkpoint has no {name}")
        elif weights[name].shape != value.shape:
            shapes = tuple(weights[name].shape), tuple(value.shape)
            lines.append(f"{name} has shape {shapes[0]} in the checkpoint and {shapes[1]} in the model")
        else:
            check_number_type(name, value, weights[name])
            fitting[name] = weights[name]
    for name in weights:
        if name not in current:
            # torchvision's name of the classifier of a model that has no other layer of this name
            is_classifier = is_of_classifier(name) or (name in ("fc.weight", "fc.bias") and not has_fc)
            (classifier if is_classifier else misfits).append(f"the model has no {name}")
    total = sum(value.numel() for value in current.values())
    return WeightsFit(fitting, misfits, classifier, sum(value.numel() for value in fitting.values()) / max(1, total))


def is_of_classifier(name: str) -> bool:
    """Whether a weight of one of torchreid's models belongs to a classifier, by its name."""
    return name.startswith("classifier")


def num_classes(weights: Mapping[str, Tensor]) -> int:
    """The number of identities of the classifier in a state dict; 0 if it has none.

    Args:
        weights: The state dict of the checkpoint. Its names may have the prefix that `DataParallel` puts before them.
    """
    names = ("classifier", "fc.weight")  # the second one in models of torchvision
    found = [
        len(value)
        for start in names
        for name, value in weights.items()
        if name.removeprefix("module.").startswith(start) and name.endswith("weight") and value.ndim == 2
    ]
    return found[0] if found else 0


def check_number_type(name: str, value: Tensor, given: Tensor) -> None:
    """Checks that a tensor of a checkpoint holds the same kind of numbers as the one it is loaded into.

    Args:
        name: The name of the tensor.
        value: The tensor that it is loaded into.
        given: The tensor of the checkpoint.

    Raises:
        ValueError: If it does not, or if a number is too large for the precision of `value`.
    """
    if _number_type(value.dtype) != _number_type(given.dtype):
        raise ValueError(f"{name} is {given.dtype} in the checkpoint and {value.dtype} in the model")
    if value.dtype != given.dtype and value.is_floating_point():
        check_tensor(f"{name} as {value.dtype}", given.to(value.dtype))


def _number_type(dtype: torch.dtype) -> str:
    return "float" if dtype.is_floating_point else "bool" if dtype == torch.bool else "integer"
