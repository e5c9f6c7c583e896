"""Deprecated names of `MetricLoss` and its subclasses, which keep working for one release with a DeprecationWarning."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from torchreid_snloss.losses.statistics import StatisticsCollector

__all__ = ["OldNames"]

_COLLECTOR: ContextVar[StatisticsCollector | None] = ContextVar("collector", default=None)
"""The statistics of the current call, for a subclass with the old signature, which does not receive them."""


class OldNames:
    """A mixin of `MetricLoss` that supports its old names.

    It adapts a subclass that defines `columns`, or `anchor_values` without `statistics`, to the current interface.
    """

    stat_totals: dict[str, Tensor]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        formula: Any = cls.__dict__.get("anchor_values")
        if formula is not None:
            is_old = len(inspect.signature(formula).parameters) == 4
            if is_old:
                _warn(f"{cls.__name__}.anchor_values now takes a fourth argument, statistics")
            cls.anchor_values = (_with_collector if is_old else _with_default)(formula)  # type: ignore[attr-defined]
        columns: Any = cls.__dict__.get("columns")
        if columns is not None:
            _warn(f"{cls.__name__}.columns(squares, ...) is now select_references(distances, ..., statistics)")
            cls.select_references = _with_collector(  # type: ignore[attr-defined]
                lambda self, distances, *masks: self.columns(distances.square(), *masks)
            )

    @property
    def sums(self) -> dict[str, Tensor]:
        """The old name of `stat_totals`."""
        _warn("sums is now stat_totals")
        return self.stat_totals

    @property
    def watching(self) -> bool:
        """The old name of `StatisticsCollector.collecting`."""
        collector = _COLLECTOR.get()
        return collector is not None and collector.collecting

    def watch(self, name: str, values: Tensor, numbers: Tensor | None = None) -> None:
        """The old name of `StatisticsCollector.log_statistic`."""
        collector = _COLLECTOR.get()
        if collector is not None:
            collector.log_statistic(name, values, numbers)


def _with_collector(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def called(self: Any, distances: Tensor, positive: Tensor, negative: Tensor, statistics: Any = None) -> Any:
        token = _COLLECTOR.set(statistics or _COLLECTOR.get())
        try:
            return method(self, distances, positive, negative)
        finally:
            _COLLECTOR.reset(token)

    return called


def _with_default(method: Callable[..., Any]) -> Callable[..., Any]:
    """Lets an old subclass call `super().anchor_values(distances, positive, negative)`."""

    @functools.wraps(method)
    def called(self: Any, distances: Tensor, positive: Tensor, negative: Tensor, statistics: Any = None) -> Any:
        return method(self, distances, positive, negative, statistics or _COLLECTOR.get() or StatisticsCollector())

    return called


def _warn(message: str) -> None:
    warnings.warn(f"{message}; the old form will be removed in 0.4", DeprecationWarning, stacklevel=3)
