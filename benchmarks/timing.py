"""Times that can be compared: medians of interleaved repetitions."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

__all__ = ["Row", "interleaved", "rows_of"]

_CALLS_LAST = 0.02  # seconds that the calls of one repetition take together, where a single one takes less


class Row(NamedTuple):
    """One line of the results."""

    suite: str
    case: str
    name: str
    value: float
    unit: str
    ratio: float
    """to the case's baseline"""


def interleaved(functions: Mapping[str, Callable[[], Any]], seconds: float, repetitions: int = 5) -> dict[str, float]:
    """Median seconds of a call, all functions in turn, so that a machine that slows down slows down all of them.

    Args:
        functions: what to time, by name.
        seconds: for all together; passed where the repetitions are not done by then.
        repetitions: of each, at least.
    """
    calls = {}
    for name, function in functions.items():
        function()
        once = _time(function, 1)
        calls[name] = max(1, round(_CALLS_LAST / once))
    times: dict[str, list[float]] = {name: [] for name in functions}
    gc.collect()
    gc.disable()
    try:
        end, done = time.perf_counter() + seconds, 0
        while time.perf_counter() < end or done < repetitions:
            for name, function in functions.items():
                times[name].append(_time(function, calls[name]))
            done += 1
    finally:
        gc.enable()
    return {name: statistics.median(values) for name, values in times.items()}


def _time(function: Callable[[], Any], calls: int) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def rows_of(suite: str, case: str, seconds: Mapping[str, float], baseline: str) -> list[Row]:
    """The results of a case in milliseconds, with their ratios to one of them."""
    return [Row(suite, case, name, 1e3 * value, "ms", value / seconds[baseline]) for name, value in seconds.items()]
