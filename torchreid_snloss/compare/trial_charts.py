"""The charts of differences to a baseline, and of the trials of a tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from torchreid_snloss.compare.backend import Figure, MaxNLocator, matplotlib
from torchreid_snloss.compare.bootstrap import Difference
from torchreid_snloss.compare.drawing import COLORS, INK, STYLE, legend, shortened, styles_of, to_svg
from torchreid_snloss.compare.tuning import Trial

__all__ = ["forest", "trial_chart"]


def forest(differences: Mapping[str, Difference | None], baseline: str, dataset: str) -> Markup:
    """Plots the differences of mAP to a baseline, each with its interval as a line. 0 is marked.

    Args:
        differences: The difference by the name of the variant; None if it has no interval.
        baseline: The name of the baseline.
        dataset: The test set.
    """
    styles = styles_of(differences)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 0.9 + 0.26 * len(differences)), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color=INK, linewidth=1)
        for place, (variant, found) in enumerate(differences.items()):
            if found is None:
                axes.text(0, place, " no interval", va="center", fontsize=9)
                continue
            color, marker, _ = styles[variant]
            axes.hlines(place, 100 * found.low, 100 * found.high, color=color, linewidth=2).set_gid(f"interval-{place}")
            inside = "none" if found.holds_zero else color
            axes.plot(100 * found.mean, place, color=color, marker=marker, markersize=7, markerfacecolor=inside)
        axes.set_yticks(range(len(differences)), [shortened(variant) for variant in differences], fontsize=9)
        axes.set_ylim(len(differences) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(f"mAP - {baseline}, percentage points")
        texts = [f"{variant} {found or 'no interval'}" for variant, found in differences.items()]
        return to_svg(figure, f"Difference of mAP to {baseline} on {dataset}: {'; '.join(texts)}")


def trial_chart(name: str, trials: Sequence[Trial]) -> Markup:
    """Plots the trials of a tuning: the last mAP on the held-out identities by the number of the trial.

    Args:
        name: The name of the tuning.
        trials: The trials in their order.
    """
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "finished": ("finished", {"color": COLORS[1], "marker": "o"}),
        "pruned": ("ended early", {"color": COLORS[0], "marker": "o", "markerfacecolor": "none"}),
        "failed": ("failed", {"color": COLORS[8], "marker": "X"}),
    }
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.4, 2.6), layout="constrained")
        axes = figure.subplots()
        finished = [trial for trial in trials if trial.state == "finished" and trial.mean_ap is not None]
        if finished:
            best = np.maximum.accumulate([100 * (trial.mean_ap or 0) for trial in finished])
            numbers = [trial.number for trial in finished]
            ends = [*numbers, trials[-1].number], [*best, best[-1]]
            axes.plot(*ends, color=COLORS[1], linewidth=1.2, drawstyle="steps-post", label="best so far")
        for state, (label, style) in kinds.items():
            of_state = [trial for trial in trials if trial.state == state]
            values = [100 * (trial.mean_ap or 0) for trial in of_state]
            if of_state:
                axes.plot(
                    [trial.number for trial in of_state], values, linestyle="none", clip_on=False, label=label, **style
                )
        axes.set(xlabel="trial", ylabel="held-out mAP, %")
        axes.set_title(shortened(name), fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=0)
        axes.set_xlim(-0.5, trials[-1].number + 0.5)
        legend(figure, 2)
        return to_svg(figure, f"Trials of {name}: mAP on the held-out identities")
