"""The results as a picture: what a newcomer compares, one panel a suite."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

from benchmarks.timing import Row

__all__ = ["draw"]

_NOT_DRAWN = ("sampler, memory", "loader, throughput", "loader, waiting for data", "large, CPU s")
_WIDE = 10  # the longest bar over the shortest from which the axis is logarithmic
_OURS, _OTHERS = "#1b7f5c", "#9aa5b1"


def draw(rows: list[Row], machine: str, path: Path) -> None:
    """Bars of the times and peaks of the suites that have peers, a panel a case."""
    cases = [
        (suite, case)
        for suite, case in dict.fromkeys((row.suite, row.case) for row in rows)
        if suite.startswith(("losses", "sampler", "evaluator", "training step", "loader", "large"))
        and suite not in _NOT_DRAWN
    ]
    if not cases:
        return
    columns = 3
    lines = -(-len(cases) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(17, 3.6 * lines), squeeze=False, layout="constrained")
    for axis, (suite, case) in zip(axes.flat, cases):
        group = sorted((row for row in rows if (row.suite, row.case) == (suite, case)), key=lambda row: -row.value)
        colours = [_OTHERS if _is_peer(row.name) else _OURS for row in group]
        bars = axis.barh([row.name for row in group], [row.value for row in group], color=colours)
        axis.bar_label(
            bars, [f" {row.value:,.{0 if row.value >= 100 else 2}f} {row.unit}" for row in group], fontsize=8
        )
        low, high = min(row.value for row in group), max(row.value for row in group)
        if high > _WIDE * low:
            axis.set_xscale("log")
            axis.set_xlim(low / 2, high * 4)
            axis.xaxis.set_minor_formatter(NullFormatter())
        else:
            axis.set_xlim(0, high * 1.2)
        axis.set_title(f"{suite}\n{case}", fontsize=10)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    figure.suptitle(f"{machine}; less is better, green: this package", fontsize=11)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _is_peer(name: str) -> bool:
    return name.startswith(("torchreid ", "PML ", "bare", "SN, anchor by anchor"))
