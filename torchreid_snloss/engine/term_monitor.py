"""Finds metric terms that do nothing, those with next to no gradient on the features, and features at one point."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchreid_snloss.engine.monitor import CollapseMonitor
from torchreid_snloss.losses import Criterion, FIDILoss, HAP2SLoss, SNLoss

__all__ = ["TermMonitor"]

_NO_EFFECT = 1e-3
_SATISFIED = 0.1  # of a term's first value
# Entries of a step's values. They have spaces, so that no term or statistic has the same name.
_GRADIENT, _VALUE, _SOFTMAX, _SPREAD, _LENGTH = "gradient of ", "value of ", "its softmax", "its spread", "its length"


@dataclass
class _Term:
    """What is known of a term."""

    first_value: float
    value: float
    effect: float = -1.0
    """The largest of the epoch, -1 before one was measured."""
    beside_softmax: bool = False
    collapsed: bool = False
    was_active: bool = False
    reported: bool = False
    satisfied: bool = False


class TermMonitor:
    """Prints a line on a metric term that does nothing for a whole epoch, and on features that collapse to one point.

    The effect of a term is the norm of its gradient on the features, divided by that of softmax's gradient there, both
    weighted as in the loss. Without a softmax term, or where its gradient on the features alone can't be computed (PCB,
    micro-batches, a compiled model), the effect is the norm of the term's gradient, times the distance of the features
    from their mean, divided by the term's value: the part of itself by which the term would change if the features
    moved as far as they differ. That depends on the scale of neither the features nor the loss, and it needs no other
    term, which may do nothing either.

    A term does nothing in an epoch if its effect is below 1e-3 in the first, the middle and the last step. If its value
    is then below a tenth of the first one, nothing is left for it to learn, which is no fault.

    These steps have a second backward pass of the losses and of the classifier. Gradients, random states and therefore
    results are the same as without it.

    Args:
        criteria: the metric losses by name.
    """

    def __init__(self, criteria: Mapping[str, Criterion]) -> None:
        self._criteria = criteria
        self._collapse = CollapseMonitor()
        self._resumed = False
        self._terms: dict[str, _Term] = {}
        self._step = 0
        self._measured: frozenset[int] = frozenset()

    def start_run(self, resumed: bool) -> None:
        """Starts a run.

        Args:
            resumed: whether it continues another one, in which a term may have been active.
        """
        self._resumed = resumed
        self._collapse = CollapseMonitor()
        self._terms.clear()

    def start_epoch(self, steps: int) -> None:
        """Starts an epoch; outside an epoch nothing is measured.

        Args:
            steps: how many steps it has.
        """
        self._step, self._measured = 0, frozenset((0, steps // 2, steps - 1))
        for term in self._terms.values():
            term.effect = -1.0

    def measure(
        self,
        terms: Mapping[str, Tensor],
        softmax: Tensor | None,
        outputs: Tensor | Sequence[Tensor],
        features: Tensor | Sequence[Tensor],
        scaler: Any,
    ) -> dict[str, Tensor]:
        """Measures the gradients, if they are to be measured in this step. All processes call it.

        Args:
            terms: scalars, this process's metric terms by name, weighted.
            softmax: a scalar, its softmax term, weighted; None if there is none, or none to compare with.
            outputs: the model's features, (batch, dimension), or several.
            features: the same in at least float32, on which the terms were computed.
            scaler: the `GradScaler` for float16; None for any other precision.

        Returns:
            scalars, for which `record` takes the means over processes; empty if nothing is measured.
        """
        now = self._step in self._measured
        self._step += 1
        outputs, features = ([each] if isinstance(each, Tensor) else list(each) for each in (outputs, features))
        if not now:
            return {}
        with torch.no_grad():
            measured = {
                _SPREAD: _sum_of_squares([feature - feature.mean(dim=0) for feature in features]),
                _LENGTH: _sum_of_squares(features),
            }
        if not all(feature.requires_grad for feature in features):
            return measured
        for name, term in terms.items():
            squares = _squared_gradient(term, features)
            measured[_GRADIENT + name] = torch.zeros_like(term) if squares is None else squares
            measured[_VALUE + name] = term.detach()
        if softmax is not None:
            # In float16 the gradient of one image would be 0 without the scale.
            scale = torch.ones_like(softmax) if scaler is None else scaler.scale(torch.ones_like(softmax))
            squares = _squared_gradient(softmax * scale, outputs)
            if squares is not None:
                measured[_SOFTMAX] = squares / scale.square()
        return measured

    def record(self, values: dict[str, float]) -> None:
        """Removes what `measure` returned from the values of a step, and notes it."""
        if _SPREAD not in values:
            return
        spread, length = values.pop(_SPREAD), values.pop(_LENGTH)
        # Twice the mean square of the distance from the mean is that of the distance between two.
        collapsed = self._collapse(math.sqrt(2 * spread / length) if length else 0.0)
        names = [key.removeprefix(_GRADIENT) for key in values if key.startswith(_GRADIENT)]
        softmax = values.pop(_SOFTMAX, 0.0)
        for name in names:
            gradient, value = math.sqrt(values.pop(_GRADIENT + name)), abs(values.pop(_VALUE + name))
            if not math.isfinite(softmax):  # it overflowed in float16
                continue
            if softmax > 0:
                effect = gradient / math.sqrt(softmax)
            else:
                effect = 0.0 if gradient == 0 else gradient * math.sqrt(spread) / value if value else math.inf
            if not math.isfinite(effect) and value:  # too large to be measured
                continue
            shown = values[f"loss_{name}"]
            term = self._terms.setdefault(name, _Term(shown, shown))
            term.effect, term.value, term.beside_softmax = max(term.effect, effect), shown, softmax > 0
            term.collapsed = collapsed

    def end_epoch(self, epoch: int) -> None:
        """Prints a line on each term that did nothing in the epoch, unless it was printed already.

        Args:
            epoch: the number of the epoch, counted from 1.
        """
        self._measured = frozenset()
        for name, term in self._terms.items():
            if term.effect >= _NO_EFFECT:
                term.was_active, term.reported = True, False
            elif term.effect >= 0 and not term.reported:
                self._report(epoch, name, term)

    def _report(self, epoch: int, name: str, term: _Term) -> None:
        term.reported = True
        what = f"its value is {term.value:.6g}, and "
        if term.beside_softmax:
            what += f"its gradient on the features is at most {term.effect:.1e} of softmax's"
        else:
            what += f"features moved as far as they differ would change it by at most {term.effect:.1e} of that"
        fallen = term.was_active and abs(term.value) <= _SATISFIED * abs(term.first_value)
        if fallen or (self._resumed and term.value == 0):
            if not term.satisfied:
                print(f"=> loss_{name} no longer does anything from epoch {epoch} on, nothing is left to learn: {what}")
            term.satisfied = True
            return
        what += f". Try {_remedy(self._criteria[name], term)}"
        if term.was_active:
            print(f"** loss_{name} no longer does anything from epoch {epoch} on: {what}")
        else:
            print(f"** loss_{name} does nothing in epoch {epoch}: {what}")


def _squared_gradient(term: Tensor, features: Sequence[Tensor]) -> Tensor | None:
    """The squared norm of a term's gradient on the features; None if it does not depend on them."""
    if not term.requires_grad:
        return None
    gradients = torch.autograd.grad(term, features, retain_graph=True, allow_unused=True)
    found = [gradient for gradient in gradients if gradient is not None]
    return _sum_of_squares(found) if found else None


def _sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(tensor.detach().float()) for tensor in tensors]).square().sum()


def _remedy(criterion: Criterion, term: _Term) -> str:
    """What to change, for a criterion that does nothing."""
    if term.collapsed:
        return "a smaller learning rate or a larger weight_x, since the features are at one point"
    without_pairs = ", or batches with several images of an identity if they have none" if term.value == 0 else ""
    if isinstance(criterion, FIDILoss):
        if not criterion.normalize:
            return "loss.fidi.normalize True, or a smaller loss.fidi.beta"
        return "another loss.fidi.beta, or a larger weight_m"
    if isinstance(criterion, SNLoss):
        return "a smaller loss.sn.scale, more loss.sn.num_neighbors, or a larger weight_m" + without_pairs
    if isinstance(criterion, HAP2SLoss):
        hardness = "sigma" if criterion.weighting == "exponential" else "alpha"
        return f"a larger loss.hap2s.margin, another loss.hap2s.{hardness}, or a larger weight_m" + without_pairs
    if term.value == 0:
        return "a larger margin" + without_pairs
    return (
        "normalised features, a smaller learning rate, another scale, sigma or margin of the loss, or a larger weight"
    )
