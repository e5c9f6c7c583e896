"""The charts of the seeds, of differences to a baseline, and of the trials of a tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from torchreid_snloss.compare.backend import Axes, Figure, MaxNLocator, matplotlib
from torchreid_snloss.compare.bootstrap import Difference
from torchreid_snloss.compare.drawing import (
    COLORS,
    INK,
    STYLE,
    hover_strips,
    legend,
    seeds_text,
    shortened,
    styles_of,
    to_svg,
)
from torchreid_snloss.compare.trial import Trial

__all__ = ["BySeed", "forest", "seed_chart", "trial_chart"]

BySeed = Mapping[int, float]
"""A value of each seed, averaged over the splits."""


def seed_chart(mean_aps: Mapping[str, BySeed], before: float, dataset: str) -> Markup:
    """Plots the mAP of each seed as a point, and the mean over the seeds as a bar across the row.

    Args:
        mean_aps: The mAP by the name of the variant, in percent.
        before: The mAP before training, in percent.
        dataset: The test set.
    """
    styles = styles_of(mean_aps)
    texts = []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 1.1 + 0.26 * len(mean_aps)), layout="constrained")
        axes = figure.subplots()
        axes.axvline(before, color=INK, linewidth=1, linestyle=":", label="before training")
        for place, (variant, by_seed) in enumerate(mean_aps.items()):
            color, marker, _ = styles[variant]
            mean = float(np.mean([*by_seed.values()]))
            axes.plot(mean, place, color=color, marker="|", markersize=14, markeredgewidth=2)
            _plot_seeds(axes, place, by_seed, color, marker)
            texts.append(f"{variant}: mean {mean:.1f}; {seeds_text(by_seed)}")
        _label_rows(axes, list(mean_aps), "mAP, %")
        legend(figure, 1)
        label = f"mAP of each seed on {dataset}, before training {before:.1f}: {'. '.join(texts)}"
        return to_svg(figure, label, {hover_strips(axes, range(len(mean_aps)), "y"): texts})


def forest(
    differences: Mapping[str, Difference | None], by_seed: Mapping[str, BySeed], baseline: str, dataset: str
) -> Markup:
    """Plots the differences of mAP to a baseline, each with its interval as a line and its seeds as points.

    Args:
        differences: The difference by the name of the variant; None if it has no interval.
        by_seed: The difference of each seed by the name of the variant, in percentage points.
        baseline: The name of the baseline.
        dataset: The test set.
    """
    styles = styles_of(differences)
    texts = []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 0.9 + 0.26 * len(differences)), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color=INK, linewidth=1)
        for place, (variant, found) in enumerate(differences.items()):
            texts.append(f"{variant} {f'{found}, {found.direction}' if found else 'no interval'}")
            if found is None:
                axes.text(0, place, " no interval", va="center", fontsize=9)
                continue
            color, marker, _ = styles[variant]
            axes.hlines(place, 100 * found.low, 100 * found.high, color=color, linewidth=2).set_gid(f"interval-{place}")
            inside = "none" if found.holds_zero else color
            axes.plot(100 * found.mean, place, color=color, marker=marker, markersize=7, markerfacecolor=inside)
            if found.seeds > 1:
                _plot_seeds(axes, place + 0.3, by_seed[variant], color, "o")
                texts[-1] += f"; {seeds_text(by_seed[variant], '+')}"
        _label_rows(axes, list(differences), f"mAP - {baseline}, percentage points")
        label = f"Difference of mAP to {baseline} on {dataset}: {'. '.join(texts)}"
        return to_svg(figure, label, {hover_strips(axes, range(len(differences)), "y"): texts})


def _plot_seeds(axes: Axes, height: float, by_seed: BySeed, color: str, marker: str) -> None:
    heights = [height] * len(by_seed)
    style: dict[str, Any] = {"linestyle": "none", "markersize": 4, "markeredgewidth": 0}
    axes.plot([*by_seed.values()], heights, color=color, marker=marker, gid=f"seeds-{height:g}", **style)


def _label_rows(axes: Axes, variants: Sequence[str], x_label: str) -> None:
    """Names the rows of a chart that has a row for each variant, the first one at the top."""
    axes.set_yticks(range(len(variants)), [shortened(variant) for variant in variants], fontsize=9)
    axes.set_ylim(len(variants) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.set(xlabel=x_label, ylabel="variant")


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
        finished = [trial for trial in trials if trial.state == "finished"]
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
        labels = [kinds[trial.state][0] for trial in trials]
        titles = [
            f"trial {trial.number}, {label}: mAP {'unknown' if trial.mean_ap is None else f'{100 * trial.mean_ap:.1f}'}"
            + "".join(f"\n{key} {value}" for key, value in trial.values.items())
            for trial, label in zip(trials, labels)
        ]
        strips = hover_strips(axes, [trial.number for trial in trials])
        counts = ", ".join(f"{labels.count(label)} {label}" for label in dict.fromkeys(labels))
        best_of = f", the best {max(best):.1f}" if finished else ""
        label = f"Trials of {name}: mAP on the held-out identities by trial; {counts}{best_of}"
        return to_svg(figure, label, {strips: titles})
